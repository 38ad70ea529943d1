"""The reading page: nothing of splam.py is lost on it, each link leads somewhere, and it needs no network."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("pypandoc", reason="only `make page` needs pandoc: pip install pypandoc_binary")
from docs import page  # noqa: E402

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "splam.py").read_text()
EQUATIONS = (ROOT / "docs" / "equations.md").read_text()
NUMBERED = [f"eq-{n}" for n in range(1, 29)]


@pytest.fixture(scope="module")
def built():
    return page.build("..")


@pytest.fixture(scope="module")
def markup(built):
    """The page without its script and its styles."""
    return re.sub(r"(?s)<(script|style)\b.*?</\1>", "", built)


def attribute(name, markup):
    return re.findall(rf' {name}="([^"]*)"', markup)


def letters(text):
    """Without white space and without what is markup in comments but not on a page."""
    return re.sub(r'[\s#`"_{}-]', "", text)


def test_code_and_texts_together_are_the_file(markup):
    """Each line of splam.py is code under its own number or part of a text, in the file's order."""
    lines, pieces, shown = SOURCE.splitlines(), page.pieces(SOURCE), []
    on_page = html.unescape(re.sub("<[^>]*>", "", markup))
    for first, code in [part for piece in pieces for part in piece.code]:
        assert code.strip("\n") in on_page
        for number, line in enumerate(code.rstrip("\n").splitlines(), first):
            assert lines[number - 1] == line
            shown.append(number)
    assert shown == sorted(set(shown))
    rest = [line for number, line in enumerate(lines, 1) if number not in shown]
    assert letters("".join(piece.text for piece in pieces)) == letters("".join(rest))


def test_each_equation_stands_where_its_text_says(markup):
    """Beside the first definition that it names, or else in the section of splam.py that its chapter names."""
    ids = attribute("id", markup)
    assert sorted(name for name in ids if name in NUMBERED) == sorted(NUMBERED)
    assert [link[1:] for link in attribute("href", markup) if link.startswith("#eq-")][:28] == NUMBERED  # the index
    places = [name for name in ids if name in NUMBERED or name.startswith(("splam.", "section-"))]
    chapters = re.split(r"(?m)^## .*?(?:`splam\.py`, section (\d).*)?$", EQUATIONS)
    for section, chapter in zip(chapters[1::2], chapters[2::2], strict=True):
        for number, body in re.findall(r"(?ms)^### Eq\. (\d+):(.*?)(?=^### |\Z)", chapter):
            above = [name for name in places[: places.index(f"eq-{number}")] if name not in NUMBERED]
            defined = [name for name in re.findall(r"`(splam\.\w+)", body) if name in ids]
            assert above[-1] == (defined[0] if defined else f"section-{section}"), number


def test_each_link_has_a_target(markup):
    ids = attribute("id", markup)
    assert len(ids) == len(set(ids))
    assert {"algorithm-1", "explorer", *(f"note-{n}" for n in range(1, 21))} <= set(ids)
    for link in attribute("href", markup):
        path, _, place = link.partition("#")
        if not path:
            assert place.partition("?")[0] in ids, link
        elif not path.startswith(("https://", "data:")):
            assert (ROOT / "docs" / path).exists(), link
    assert "https://example.org/splam.py" in attribute("href", page.build("https://example.org"))
    assert page.linked("Eq. 9 to 11", set()) == '<a href="#eq-9">Eq. 9</a> to <a href="#eq-11">11</a>'


def test_formulas_are_mathml(markup):
    """As many as equations.md has, and none that pandoc did not understand, which it would leave as LaTeX."""
    blocks = re.findall(r"(?s)```math\n(.*?)```", EQUATIONS)
    assert markup.count('<math display="block"') == sum(1 + block.count(r"\qquad") for block in blocks)
    assert markup.count('<math display="inline"') == len(re.findall(r"(?s)\$`.*?`\$", EQUATIONS))
    said = re.sub(r"(?s)<(annotation|pre)\b.*?</\1>|<[^>]*>", "", markup)
    assert not re.search(r"\\[a-zA-Z]|\$|```", said)


class Nested(HTMLParser):
    """Fails where elements end in another order than they began, and at a link in a link."""

    path = ()

    def handle_starttag(self, tag, attributes):
        assert tag != "a" or "a" not in self.path
        self.path = self.path if tag in ("meta", "link", "input", "br") else (*self.path, tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        *self.path, begun = self.path
        assert begun == tag


def test_page_is_well_formed_and_asks_nothing_of_the_network(built, markup):
    Nested().feed(built)
    fetched = re.findall(r'<(\w+)[^>]* (?:src|href)="([^"]*)"', markup)
    assert all(tag == "a" or value.startswith(("data:", "#")) for tag, value in fetched)
    assert not re.search(r"@import|url\((?!#)|\bfetch\(|XMLHttpRequest", built)
