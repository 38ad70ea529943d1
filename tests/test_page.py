"""The reading page: nothing of splam.py is lost on it, each link leads somewhere, and it needs no network."""

import ast
import re
from collections import Counter
from pathlib import Path

import html5lib
import pytest
import torch
from diffusers import DDIMScheduler

from docs import page
from splam import Schedule
from toy.distributions import DISTRIBUTIONS

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "splam.py").read_text()
EQUATIONS = (ROOT / "docs" / "equations.md").read_text()
SIZE = 2_000_000  # bytes
HTML, SVG = "http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg"


@pytest.fixture(scope="module")
def built():
    return page.build("..")


@pytest.fixture(scope="module")
def tree(built):
    """The page's elements. `strict` raises on all that the HTML standard calls a parse error."""
    root = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(re.sub(r"(?s)<!--.*?-->", "", built))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # without the namespaces of MathML and SVG
    return root


def with_class(tree, name):
    return [element for element in tree.iter() if name in element.get("class", "").split()]


def text_of(element, without=()):
    """The text of an element, without that of elements below it with one of these tags."""
    below = [text_of(child, without) + (child.tail or "") for child in element]
    return "" if element.tag in without else (element.text or "") + "".join(below)


def code_lines(tree):
    """[(number, text)] of all lines of code, in the order of the page."""
    for line in with_class(tree, "line"):
        number, *rest = line
        yield int(number.text), "".join([number.tail or "", *(text_of(child) + (child.tail or "") for child in rest)])


def letters(text):
    """Without white space, and without what is markup in comments and docstrings but not on a page."""
    text = re.sub(r"(?m)^(- |-+$)", "", text)
    return re.sub(r"[\s`_{}]", "", text)  # an index is shown without its _


def test_code_and_text_together_are_the_file(tree):
    """Each line of splam.py is on the page once: as code under its own number, or in the texts, in the file's order."""
    lines = SOURCE.splitlines()
    shown = list(code_lines(tree))
    numbers = [number for number, _ in shown]
    assert numbers == sorted(set(numbers))
    for number, text in shown:
        assert text.rstrip("\n") == lines[number - 1]
    rest = [line for number, line in enumerate(lines, 1) if number not in numbers]
    said = letters("\n".join(re.sub(r'^# ?|"""', "", line.strip()) for line in rest))
    titles = [h for h in tree.iter("h2") if h.get("id", "").startswith("section-")]
    texts = [e for e in tree.iter() if e in titles or e.get("class") == "text"]
    assert letters("".join(text_of(text, without=("h3", "figure")) for text in texts)) == said


def test_each_definition_is_on_the_page_once(tree):
    shown = "".join(text for _, text in code_lines(tree))
    defined = Counter(re.findall(r"(?m)^(?:def|class) (\w+)", shown))
    assert defined == Counter(node.name for node in ast.parse(SOURCE).body if hasattr(node, "name"))
    headings = [h.get("id") for h in tree.iter("h3") if h.get("id", "").startswith("splam.")]
    assert headings == [f"splam.{row.name}" for row in page.rows(SOURCE) if row.name]


def test_each_equation_has_a_place_beside_the_text_or_code_that_names_it(tree):
    numbers = {str(n) for n in range(1, 29)}
    assert numbers <= set(page.named(SOURCE))
    for pair in with_class(tree, "pair"):
        here = page.named(text_of(pair, without=("figure",)))
        heading = next((text_of(h[0]) for h in pair.iter("h3")), "nothing")
        for figure in pair.iter("figure"):
            if number := figure.get("id", "").partition("eq-")[2]:
                _, _, code = page.parts(EQUATIONS)[f"eq-{number}-text"].text.partition("Code:")
                assert number in here or heading in code, number
                numbers.discard(number)
    assert not numbers


def test_index_leads_to_each_equation_and_each_line_of_algorithm_1(tree):
    [index] = with_class(tree, "index")
    links = [a.get("href") for a in index.iter("a")]
    numbered = [f"#eq-{n}" for n in range(1, 29)]
    assert [link for link in links if re.fullmatch(r"#eq-\d+", link)] == numbered
    assert [link for link in links if "algorithm" in link] == [
        "#algorithm-1",
        *(f"#algorithm-1-line-{n}" for n in range(1, 9)),
    ]
    ids = {e.get("id"): e for e in tree.iter()}
    for line, start in page.ALGORITHM.items():
        [link] = [a.get("href") for a in with_class(ids[f"algorithm-1-line-{line}"], "place")]
        assert SOURCE.splitlines()[int(link.removeprefix("#L")) - 1].strip().startswith(start)


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("Eq. 9 to 11 split", ["9", "10", "11"]),
        ("Eq. 4-6, 15, 17", ["4", "5", "6", "15", "17"]),
        ("Eq. 21\nand 22 say", ["21", "22"]),
        ("Eq. 12, or 26", ["12", "26"]),
        ("below Eq. 15, or as in Eq. 24 and 28", ["below-15", "24", "28"]),
        ("(Eq. 7) lets 3 be 4", ["7"]),
    ],
)
def test_names_of_equations_are_understood(text, numbers):
    assert page.named(text) == numbers


def test_no_link_leads_nowhere(tree):
    ids = Counter(e.get("id") for e in tree.iter() if e.get("id"))
    assert max(ids.values()) == 1
    for link in [a.get("href") for a in tree.iter("a")]:
        path, _, place = link.partition("#")
        if not path:
            assert place.partition("?")[0] in ids, link
        elif not path.startswith("https://"):
            assert (ROOT / "docs" / path).exists(), link
            if path.endswith(".md"):
                titles = re.findall(r"(?m)^#+ (.*)", (ROOT / "docs" / path).read_text())
                assert not place or place in map(page.slug, titles), link


def test_links_to_files_can_lead_to_a_repository():
    address = "https://example.org/files"
    links = re.findall(r'href="([^"#][^"]*)"', page.build(address))
    first = SOURCE.splitlines().index("import math") + 1
    assert f"{address}/splam.py#L{first}" in links and f"{address}/toy/README.md#table-3" in links
    assert not [link for link in links if link.startswith("..")]


def test_page_asks_nothing_of_the_network(built, tree):
    """A browser fetches what stands in these attributes and in CSS; a link that a reader clicks is not among them."""
    for element in tree.iter():
        for attribute, value in element.attrib.items():
            if attribute in ("src", "srcset", "poster", "data", "action") or (
                attribute == "href" and element.tag != "a"
            ):
                assert value.startswith(("data:", "#")), (element.tag, attribute, value[:80])
            assert "url(" not in value
    for style in tree.iter("style"):
        assert not re.search(r"@import|url\(", style.text)
    for script in tree.iter("script"):
        assert not re.search(
            r"\bfetch\(|XMLHttpRequest|\bimport\b|https?:", script.text.replace(SVG, "").replace(HTML, "")
        )
    assert len(built.encode()) < SIZE


def test_formulas_are_mathml_and_no_latex_is_left(tree):
    """As many as equations.md has, and nothing that the converter did not understand: a command, a brace, an &."""
    displayed, inline = re.findall(r"(?s)```math\n.*?```", EQUATIONS), re.findall(r"(?s)\$`.*?`\$", EQUATIONS)
    shown = [e for e in with_class(tree, "formula") if any(child.tag == "math" for child in e)]
    per_card = len([e for figure in with_class(tree, "equation") for e in with_class(figure, "formula")])
    assert len(shown) - per_card == len(displayed)
    assert len([e for e in tree.iter("math") if e.get("display") == "inline"]) == len(inline)
    visible = text_of(tree, without=("script", "style", "pre"))
    assert not re.search(r"\\[a-zA-Z]|\$", visible)
    for formula in tree.iter("math"):
        assert not re.search(r"[\\&{}$]", text_of(formula))


def test_figures_say_what_they_show_and_what_came_out(tree):
    """A conclusion's numbers stand in the chapter that its link leads to."""
    figures = with_class(tree, "result")
    assert len(figures) == len(page.FIGURES)
    chapters = dict(re.findall(r"(?ms)^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "toy" / "README.md").read_text()))
    for figure in figures:
        [image], [link] = figure.iter("img"), figure.iter("a")
        title = link.text.partition("“")[2].strip("”")
        assert image.get("alt") and image.get("alt") in chapters[title].replace("\n", " ")
        conclusion = text_of(figure).partition("Measured here.")[2].partition("toy/README.md")[0]
        for number in re.findall(r"\d+\.\d+|\d{3}", conclusion):
            assert number in chapters[title], (title, number)


def test_explorer_gets_the_schedule_of_stable_diffusion_and_its_mixtures():
    """To the last bit of float32."""
    data = page.explorer_data()
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule = Schedule(scheduler.alphas_cumprod)
    assert torch.equal(torch.tensor(data["alphas"]), schedule.alpha)
    assert torch.equal(torch.tensor(data["sigmas"]), schedule.sigma)
    assert list(data["mixtures"]) == ["8gaussians", "moons", "checkerboard"]
    for name, mixture in data["mixtures"].items():
        assert torch.equal(torch.tensor(mixture["means"]), DISTRIBUTIONS[name].means)
        assert mixture["std"] == DISTRIBUTIONS[name].std
