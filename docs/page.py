"""make page        docs/index.html, a few seconds

The reading page: beside the explanations of splam.py the code that they are about, with the equations of
docs/equations.md and the figures of toy/results where they belong. The page is one file that asks nothing of the
network, so that it opens from a folder as well as from a server. What it says stands in those sources; this program
knows only what belongs together:

- An equation stands beside the definition that its text in equations.md names after "Code:", and also beside the
  paragraph of splam.py that is the first to name it.
- A figure stands below the definition that FIGURES names.
"""

import argparse
import ast
import base64
import html
import io
import json
import re
from collections.abc import Collection, Iterator
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import NamedTuple

from diffusers import DDPMScheduler
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from splam import Schedule
from toy.distributions import DISTRIBUTIONS

ROOT = Path(__file__).parents[1]

# A definition and the figure of toy/results that stands below it, and what toy/README.md concludes from the figure.
FIGURES = {
    "guided": "fig3_guidance",
    "multiple_estimation": "fig2a_skip_size",
    "sub_path_point": "appb_sigma",
    "ConsistencyFunction": "tab3_sl_vs_dl",
    "distance": "fig2c_error",
    "draw": "what_decides_grid",
    "splad_loss": "fig2b_convergence",
    "ema_update": "what_decides_recipe",
}
CONCLUSIONS = {
    "fig3_guidance": "All methods, and the guided PF-ODE too, gain fidelity and lose diversity as w grows.",
    "fig2a_skip_size": "With multiple estimation (ME) k = 200 has little more error than k = 100, for LCM too.",
    "appb_sigma": "Approximate, then exact σ: 0.163 and 0.167 (the same) with the embedding, 0.079 and 0.213 with t'.",
    "tab3_sl_vs_dl": "LCM has the smallest map error; with t' SL and DL cannot be told apart.",
    "fig2c_error": "At k = 100 SPLAM t' has smaller errors between neighbours (left) than LCM, but not to the end.",
    "what_decides_grid": "LCM fails (0.578) if sub-paths end between the grid's times; SPLAM t' does not (0.078).",
    "fig2b_convergence": "At equal k SPLAM stays behind LCM; long sub-paths that are solved well help both.",
    "what_decides_recipe": "Without EMA nothing works well; half of γ at 1 takes the embedding's error to 0.071.",
}
EXPLORER = "<!-- the explorer -->"  # it is about sub_path_point, and follows it
FIGURE_WIDTH = 1200  # pixels: enough to read, and small enough for a page that a phone loads

# The lines of Algorithm 1, and how the line of splam.py begins that does each. Lines 2 and 7 are in distill.py.
ALGORITHM = {
    1: "n = torch.randint(",
    3: "x_t = alpha_t * x0",
    4: "x_s = solver(",
    5: "point = sub_path_point(",
    6: "losses.append(",
    8: "torch._foreach_lerp_(",
}

EQUATIONS = r"(?:below\s+)?Eq\.\s+\d+(?:(?:-|\s+to\s+|,?\s+(?:and|or)\s+|,\s+)\d+)*"  # "Eq. 9 to 11", "Eq. 12, or 26"
# What texts refer to by name. Headings, formulas, links and the insides of tags are here to stay as they are.
REFERENCE = re.compile(
    rf"<(?P<kept>a|math|h\d)\b.*?</(?P=kept)>|(?P<equations>{EQUATIONS})|[Nn]ote\s+(?P<note>\d+)"
    r"|(?P<algorithm>Algorithm 1)|(?P<file>toy/README\.md)|<code>(?:splam\.)?(?P<name>[\w.]+)[^<]*</code>|<[^>]*>",
    re.DOTALL,
)
# Two or more columns, set apart by spaces; a longer last column goes on, indented, in the next lines.
COLUMNS = re.compile(r"(?m)^( *)(\S+(?: \S+)*) {2,}(.*(?:\n\1 {5,}.*)*)\n?")
GAP = re.compile(r"(?<=\S) {2,}(?=\S)")

# x_t, σ_γ, x̂_0, F_θ⁻ or t_{n+k} in a text: a letter and its index. Code, formulas and the insides of tags are not.
SYMBOL = re.compile(
    r"<(?P<kept>code|math)\b.*?</(?P=kept)>|<[^>]*>"
    r"|(?<![\w_])([^\W\d_]\u0302?)_(skip|out|[^\W²]⁻?|\{.*?\}|∅)(?![^\W²])",
    re.DOTALL,
)

MARKDOWN = MarkdownIt("js-default")


class Row(NamedTuple):
    """A text of splam.py and the numbers of the code lines that it explains. `name` is that of the documented
    definition if it is one's docstring: "draw", "Schedule.at"."""

    name: str
    line: int
    text: str
    code: list[int]


class Part(NamedTuple):
    """A heading of equations.md and what stands below it. For Eq. 12 `id` is "eq-12-text" and `key` "12", which is
    empty for what is no equation."""

    id: str
    key: str
    level: int
    title: str
    text: str


def documented(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """The definitions that have a docstring, methods too, with their names."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node):
                yield owner + node.name, node
            yield from documented(node.body, f"{owner}{node.name}.")


def first_line(node: ast.stmt) -> int:
    return min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])


def rows(source: str) -> list[Row]:
    """splam.py in its order. A row begins with a documented definition, or with a comment outside of definitions."""
    lines, tree = source.splitlines(), ast.parse(source)
    begins = {1: Row("", 1, ast.get_docstring(tree), [])}
    texts = set(range(1, tree.body[0].end_lineno + 1))  # lines that are no code
    for name, node in documented(tree.body):
        begins[first_line(node)] = Row(name, node.lineno, ast.get_docstring(node), [])
        texts |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for number, line in enumerate(lines, 1):
        if line.startswith("#") and number not in texts:
            after = enumerate([*lines[number:], ""], 1)
            length = next(i for i, line in after if not line.startswith("#"))
            comment = range(number, number + length)
            begins[number] = Row("", number, "\n".join(lines[i - 1][2:] for i in comment), [])
            texts |= set(comment)
    # A constant without a comment belongs to the definition that follows it, if there is no comment between them.
    for before, node in pairwise(tree.body):
        between = [line for line in range(before.lineno, first_line(node) + 1) if line - 1 in texts or line in begins]
        if isinstance(before, ast.Assign) and between == [first_line(node)]:
            begins[before.lineno] = begins.pop(first_line(node))
    row = begins[1]
    for number in range(1, len(lines) + 1):
        row = begins.get(number, row)
        if number not in texts:
            row.code.append(number)
    return [begins[number] for number in sorted(begins)]


def slug(title: str) -> str:
    """The id that GitHub gives a heading, and a short one for what is referred to by number: "note-2"."""
    name = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    name = re.sub(r"^(note-\d+|algorithm-\d+)-.*", r"\1", name)
    return re.sub(r"^.*(below-)eq-(\d+)$|^eq-(\d+)-.*", lambda m: f"eq-{m[1] or ''}{m[2] or m[3]}-text", name)


def parts(text: str) -> dict[str, Part]:
    """equations.md, cut at its headings; by id."""
    found = {}
    for marks, title, body in re.findall(r"(?ms)^(#+) (.*?)\n(.*?)(?=^#+ |\Z)", text):
        name = slug(title)
        key = re.fullmatch(r"eq-(.*)-text|.*", name)[1] or ""
        found[name] = Part(name, key, len(marks), title, body)
    return found


def named(text: str) -> list[str]:
    """The equations that a text names, in its order: "Eq. 9 to 11" names 9, 10, 11, "below Eq. 15" below-15."""
    found = []
    for name in re.findall(EQUATIONS, text):
        each = re.sub(r"(\d+)(?:-|\s+to\s+)(\d+)", lambda m: " ".join(map(str, range(int(m[1]), int(m[2]) + 1))), name)
        found += [("below-" if name.startswith("below") else "") + number for number in re.findall(r"\d+", each)]
    return list(dict.fromkeys(found))


def mathml(latex: str, display: str) -> str:
    """What LaTeX says, spelt as latex2mathml needs it."""
    # It has no `aligned`, no size for a \bigr with an exponent, a \sim as high as an accent, other spaces
    # around log, max, / and the empty set than LaTeX, and takes a \ at the end of a line for a letter.
    latex = " ".join(html.unescape(latex).split())
    for other, liked in [("aligned", "align*"), (r"\bigl", r"\left"), (r"\bigr", r"\right"), (r"\sim", r"\thicksim")]:
        latex = latex.replace(other, liked)
    page = convert(latex, display=display)
    for other, liked in [
        ("<mi>log</mi>", '<mo lspace="0.17em" rspace="0.17em">log</mo>'),
        ("<mo>max</mo>", '<mo lspace="0.17em" rspace="0em">max</mo>'),
        ("<mo>&#x0002F;</mo>", "<mi>/</mi>"),
        ("<mo>&#x02205;</mo>", "<mi>&#x02205;</mi>"),
    ]:
        page = page.replace(other, liked)
    return page


def markdown(text: str) -> str:
    """HTML of a Markdown text with GitHub's two kinds of formulas."""

    def display(match: re.Match) -> str:
        # What \qquad sets apart may stand in lines of its own where the screen is narrow.
        formulas = [mathml(latex, "block") for latex in re.split(r"(?:\\qquad)+", match[1])]
        return f'<div class="formula">{"".join(formulas)}</div>'

    block = re.compile(r'<pre><code class="language-math">(.*?)</code></pre>', re.DOTALL)
    page = block.sub(display, MARKDOWN.render(text))
    # A browser would begin a line with the comma after a formula.
    inline = re.compile(r"\$<code>(.*?)</code>\$([.,;:)]*)", re.DOTALL)
    return inline.sub(lambda match: f'<span class="whole">{mathml(match[1], "inline")}{match[2]}</span>', page)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The paragraphs, list items, tables and displayed lines of a comment: each as it stands there, and as HTML.

    Two habits of comments are no Markdown: columns, and a hanging indent, which makes a list item here.
    """
    text = re.sub(r"(?m)^(\S.*\n)(?= {4}\S+ {2})", r"\1\n", text)  # a title stands directly above its columns
    # A single displayed line stays with the sentence that it ends.
    for block in re.split(r"\n\n(?! {4}.*(?:\n\n|\Z))|\n(?=- )", text):
        columns = [(term, GAP.sub("\N{EM SPACE}", said)) for _, term, said in COLUMNS.findall(block)]
        if len(columns) > 1 and not COLUMNS.sub("", block):
            items = [f"<dt>{html.escape(term)}</dt><dd>{html.escape(said)}</dd>" for term, said in columns]
            yield block, f"<dl>{''.join(items)}</dl>"
        else:
            yield block, markdown(re.sub(r"(?m)^(?=\S.*\n {4}\S)", "- ", GAP.sub("\N{EM SPACE}", block)))


def typeset(page: str) -> str:
    """The same HTML of a comment, with indices below their letters."""
    return SYMBOL.sub(lambda m: f"<i>{m[2]}</i><sub>{m[3].strip('{}')}</sub>" if m[2] else m[0], page)


def linked(page: str, names: Collection[str]) -> str:
    """The same HTML, in which what it refers to by name is a link: equations, notes, definitions of splam.py."""

    def link(match: re.Match) -> str:
        """The link for one name, or what stood there if nothing on the page has it."""
        if match["equations"]:
            below = "below-" if match[0].startswith("below") else ""
            return re.sub(r"(?:(?:below\s+)?Eq\.\s+)?(\d+)", rf'<a href="#eq-{below}\1">\g<0></a>', match[0])
        if match["note"]:
            return f'<a href="#note-{match["note"]}">{match[0]}</a>'
        if match["algorithm"]:
            return f'<a href="#algorithm-1">{match[0]}</a>'
        if match["file"]:
            return f'<a href="../{match["file"]}">{match[0]}</a>'
        if match["name"] in names:
            return f'<a href="#splam.{match["name"]}">{match[0]}</a>'
        return match[0]

    # The notes' own links have GitHub's long ids.
    return re.sub(r'href="#(note-\d+)[^"]*"', r'href="#\1"', REFERENCE.sub(link, page))


def coloured(source: str) -> list[str]:
    """The HTML of each line of code."""
    return highlight(source, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).split("\n")


def code(numbers: list[int], lines: list[str], label: str) -> str:
    """Lines of code with their numbers, without empty ones at the ends."""
    full = [number for number in numbers if lines[number - 1]]
    if not full:
        return ""
    shown = [
        f'<span class="line" id="L{n}"><a href="../splam.py#L{n}" tabindex="-1" title="line {n} of splam.py">{n}</a>'
        f"{lines[n - 1]}\n</span>"
        for n in numbers
        if full[0] <= n <= full[-1]
    ]
    return f'<pre class="code" tabindex="0" role="region" aria-label="Code: {label}">{"".join(shown)}</pre>'


def equation(part: Part, is_place: bool) -> str:
    """The formulas of an equation, with a link to what equations.md says about them. Links to it lead to its place."""
    formulas = re.findall(r'<div class="formula">.*?</div>', markdown(part.text), re.DOTALL)
    name = f' id="eq-{part.key}"' if is_place else ""
    caption = f'<figcaption><a href="#{part.id}">{html.escape(part.title)}</a></figcaption>'
    return f'<figure class="equation"{name}>{caption}{"".join(formulas)}</figure>'


def result(name: str) -> str:
    """A figure of the laboratory with its conclusion and a link to its chapter of toy/README.md."""
    file, readme = FIGURES[name], (ROOT / "toy" / "README.md").read_text()
    before, alt = re.search(rf"(.*)!\[([^]]*)\]\(results/{file}\.png\)", readme, re.DOTALL).groups()
    title = re.findall(r"(?m)^## (.*)", before)[-1]
    image = Image.open(ROOT / "toy" / "results" / f"{file}.png").convert("RGB")
    image.thumbnail((FIGURE_WIDTH, FIGURE_WIDTH), Image.Resampling.LANCZOS)
    picture = io.BytesIO()
    image.save(picture, "WEBP", quality=85)
    data = base64.b64encode(picture.getvalue()).decode()
    chapter = f'<a href="../toy/README.md#{slug(title)}">toy/README.md, “{html.escape(title)}”</a>'
    return (
        f'<figure class="result"><div class="picture" tabindex="0"><img alt="{html.escape(alt)}" width="{image.width}" '
        f'height="{image.height}" src="data:image/webp;base64,{data}"></div><figcaption><b>Measured here.</b> '
        f"{html.escape(CONCLUSIONS[file])} {chapter}</figcaption></figure>"
    )


def algorithm(part: Part, source: str) -> str:
    """Algorithm 1, each line with the line of splam.py that does it."""
    before, *items = markdown(part.text).split("<li>")
    lines = [line.strip() for line in source.splitlines()]
    for number, item in enumerate(items, 1):
        does = [at for at, line in enumerate(lines, 1) if number in ALGORITHM and line.startswith(ALGORITHM[number])]
        links = "".join(f'<a class="place" href="#L{at}">line {at}</a> ' for at in does)
        before += f'<li id="algorithm-1-line-{number}">{links}{item}'
    return f'<section class="algorithm" id="{part.id}"><h3>{html.escape(part.title)}</h3>{before}</section>'


def pair(left: str, right: str) -> str:
    return f'<div class="pair"><div class="text">{left}</div><div class="side">{right}</div></div>\n'


def chapter(source: str, equations: dict[str, Part]) -> str:
    """splam.py: its texts and their equations beside its code."""
    table, lines = rows(source), coloured(source)
    keys = {part.key: part for part in equations.values() if part.key}
    places = {key: place(part, {row.name for row in table}) for key, part in keys.items()}
    above, page = set(), []

    def cards(text: str, name: str) -> str:
        here = [key for key in keys if places[key] == name or (key in named(text) and key not in above)]
        above.update(here)
        return "".join(equation(keys[key], places[key] in (name, None)) for key in here)

    for row in table:
        comments = "\n".join(source.splitlines()[number - 1] for number in row.code)
        if row.text.startswith("---"):
            title, text = row.text.strip("-\n").split("\n", 1)
            page.append(f'<h2 id="section-{title[0]}">{html.escape(title)}</h2>')
            for block, shown in blocks(text.strip("\n")):
                page.append(pair(typeset(shown), cards(block, "")))
            if "Algorithm 1" in title:
                page.append(algorithm(equations["algorithm-1"], source))
        else:
            # Lines of code are too many to be stops of the Tab key, so a definition's first line is one here.
            file = f'<a class="place" href="../splam.py#L{row.line}">line {row.line}</a>'
            heading = f'<h3 id="splam.{row.name}"><code>{row.name}</code> {file}</h3>' if row.name else ""
            text = typeset("".join(shown for _, shown in blocks(row.text)))
            # The first rows are an overview, which names all equations.
            formulas = cards(row.text + comments, row.name) if above else ""
            figure = result(row.name) if row.name in FIGURES else ""
            side = code(row.code, lines, row.name or f"from line {row.line} on") + figure
            page.append(pair(heading + text + formulas, side))
        if row.name == "sub_path_point":
            page.append(EXPLORER)
    return "".join(page)


def place(part: Part, names: Collection[str]) -> str | None:
    """The definition of splam.py that an equation's text names first after "Code:"."""
    mentioned = re.findall(r"`(?:splam\.)?([\w.]+)", part.text.partition("Code:")[2])
    return next((name for name in mentioned if name in names), None)


def explained(equations: dict[str, Part]) -> str:
    """equations.md, but for Algorithm 1, which stands in section 4."""
    page = []
    for part in equations.values():
        if part.id != "algorithm-1":
            back = f' <a class="place" href="#eq-{part.key}">beside the code</a>' if part.key else ""
            heading = MARKDOWN.renderInline(part.title)
            page.append(f'<h{part.level + 1} id="{part.id}">{heading}{back}</h{part.level + 1}>{markdown(part.text)}')
    return "\n".join(page)


def index(equations: dict[str, Part]) -> str:
    """A list of links to all equations and to each line of Algorithm 1."""
    titles = [(f"eq-{part.key}", part.title) for part in equations.values() if part.key]
    items = [f'<li><a href="#{name}">{html.escape(title)}</a></li>' for name, title in titles]
    steps = " ".join(f'<a href="#algorithm-1-line-{n}" aria-label="line {n}">{n}</a>' for n in range(1, 9))
    return (
        f'<ul>{"".join(items)}<li><a href="#algorithm-1">{equations["algorithm-1"].title}</a>, lines {steps}</li></ul>'
    )


def explorer_data() -> dict:
    """What the explorer computes with: Stable Diffusion's schedule, and three mixtures."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule = Schedule(scheduler.alphas_cumprod)
    mixtures = {name: DISTRIBUTIONS[name] for name in ["8gaussians", "moons", "checkerboard"]}
    return {
        "alphas": schedule.alpha.tolist(),
        "sigmas": schedule.sigma.tolist(),
        "mixtures": {name: {"means": m.means.tolist(), "std": m.std} for name, m in mixtures.items()},
    }


def build(files: str) -> str:
    """The page. `files` is the address of the project's root, for links to its files."""
    source = (ROOT / "splam.py").read_text()
    equations = parts((ROOT / "docs" / "equations.md").read_text())
    names = {row.name for row in rows(source)}
    explorer = (ROOT / "docs" / "explorer.html").read_text()
    page = Template((ROOT / "docs" / "page.html").read_text()).substitute(
        index=index(equations),
        chapter=linked(chapter(source, equations), names).replace(EXPLORER, explorer),
        equations=linked(explained(equations), names),
        data=json.dumps(explorer_data()),
        script=(ROOT / "docs" / "explorer.js").read_text(),
    )
    return page.replace('href="../', f'href="{files}/')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", default="..", help="address of the project's files, to which the page links")
    (ROOT / "docs" / "index.html").write_text(build(parser.parse_args().files))


if __name__ == "__main__":
    main()
