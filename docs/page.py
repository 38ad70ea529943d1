"""make page        docs/index.html, in seconds

The reading page: the explanations of splam.py beside the code that they are about, with the equations of equations.md
where they belong, and the explorer. It is one file that asks nothing of the network.

splam.py and equations.md are cut into pieces and laid out as one Markdown text, and pandoc makes HTML of it: it knows
GitHub's formulas (as MathML) and colours code. What belongs together follows from the texts themselves: an equation
stands beside the definition that its text names first as `splam.…`, or else in the section of splam.py that the title
of its chapter names.
"""

import argparse
import inspect
import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import NamedTuple

import pypandoc  # pip install pypandoc_binary: the package brings pandoc

DOCS = Path(__file__).parent
EXPLORER_AFTER = "sub_path_point"  # what it shows

# Where a piece of splam.py ends: before two empty lines, before a method, before and after a framed comment.
CUT = re.compile(r"\n\n\n+|\n\n(?=    (?:def |@))|\n+(?=# -{9,}\n# \d)|(?<=-\n)\n+")
DEFINED = re.compile(r"( *)(?:@.*\n *)?(?:def|class) (\w+)")
DOCSTRING = re.compile(r'^ *"""(.*?)"""\n*', re.DOTALL | re.MULTILINE)

# x_t, σ_γ, x̂_0, F_θ⁻ or t_{n+k}: a letter and its index. Code and displayed lines stay as they are.
SYMBOL = re.compile(r"(?m)`[^`]*`|^ {4}.*$|(?<!\w)(d?[^\W\d_]\u0302?)_(skip|out|[^\W²]⁻?|\{.*?\}|∅)(?![^\W²])")

# What a text refers to by name. What must not hold a link is matched first, and stays.
REFERENCE = re.compile(
    r"<(?P<kept>a|math|h\d|nav|option|style)\b.*?</(?P=kept)>"
    r"|(?P<equations>Eq\. \d+(?:(?:-| to |,? (?:and|or) |, )\d+)*)|(?P<note>[Nn]ote \d+)|(?P<algorithm>Algorithm 1)"
    r"|<code>(?:splam\.)?(?P<name>[\w.]+)</code>|<[^>]*>",
    re.DOTALL,
)


class Piece(NamedTuple):
    """A framed comment of splam.py, whose `name` is "section-2", or a documented definition: "draw", "Schedule.at".

    `code` are the parts around the docstring, each with the number of its first line.
    """

    name: str
    line: int
    text: str
    code: list[tuple[int, str]]


def pieces(source: str) -> list[Piece]:
    """splam.py in its order.

    What has no docstring belongs to its neighbour: a function or a method to the piece before it, constants to the one
    after them.
    """
    found, owner, waiting = [], "", []
    for start, end in pairwise([0, *(cut.end() for cut in CUT.finditer(source)), len(source)]):
        chunk, line = source[start:end].rstrip("\n"), source.count("\n", 0, start) + 1
        docstring, defined = DOCSTRING.search(chunk), DEFINED.match(chunk)
        if chunk.startswith("# ---"):  # a framed comment; its first line is the title, with the number in front
            text = re.sub(r"(?m)^# ?(-{9,}$)?", "", chunk).strip("\n")
            found.append(Piece(f"section-{text[0]}", line, text, []))
        elif docstring:
            name = ""  # the file's own docstring
            if defined:
                name = f"{owner}.{defined[2]}" if defined[1] else defined[2]
                owner = name.partition(".")[0]
            before, after = chunk[: docstring.start()], chunk[docstring.end() :]
            around = [(line, before), (line + chunk.count("\n", 0, docstring.end()), after)]
            around = [*waiting, *(part for part in around if part[1])]
            found.append(Piece(name, line, inspect.cleandoc(docstring[1]), around))
            waiting = []
        elif defined:  # without a docstring
            found[-1].code.append((line, chunk))
        else:  # constants
            waiting.append((line, chunk))
    return found


def prose(text: str) -> str:
    """A comment as Markdown: named columns are a list, indented ones code; indices hang below their letters."""
    text = re.sub(r"(?m)^(\S.{0,18}?) {3,}(?=\S)", r"- `\1`: ", text)
    text = re.sub(r"(?m)^(?! )(.+)\n(?= {4})", r"\1\n\n", text)  # Markdown wants an empty line before a code block
    text = re.sub(r" {40,}", "     ", text)  # the number of a displayed formula need not be at the margin
    return SYMBOL.sub(lambda m: f"<i>{m[1]}</i><sub>{m[2].strip('{}')}</sub>" if m[1] else m[0], text)


def code(piece: Piece) -> str:
    """Its parts as Markdown's code blocks, numbered as in the file."""
    parts = [(f'{{.python .numberLines startFrom="{line}"}}', text.strip("\n")) for line, text in piece.code]
    return "\n".join(f"``` {style}\n{text}\n```" for style, text in parts)


def equations(text: str, names: set[str]) -> tuple[dict[str, list[str]], str, str]:
    """equations.md as Markdown: what stands beside the code, by the name of its place; the rest; and an index.

    Headings go down by one level, since the page has sections of its own. Equations and notes get short ids, such as
    "eq-12", by which splam.py can refer to them. A chapter's title is dropped if only equations stand below it.
    """
    placed, rest, index, section = defaultdict(list), [], [], ""
    text = re.sub(r"\(#(note-\d+)[^)]*\)", r"(#\1)", text)  # GitHub's ids have the whole title
    text = text.replace(r"\qquad", "\n```\n```math\n")  # formulas that are set apart may stand below each other
    for marks, title, body in re.findall(r"(?ms)^(##+) (.*?)\n(.*?)(?=^##+ |\Z)", text):
        numbered = re.match(r"(Eq|Note|Algorithm)\.? (\d+)", title)
        name = f" {{#{numbered[1].lower()}-{numbered[2]}}}" if numbered else ""
        part = f"{marks}# {title}{name}\n\n{body}"
        if marks == "##":
            section = "section-" + "".join(re.findall(r"`splam\.py`, section (\d)", title))
        place = next((found for found in re.findall(r"`splam\.(\w+)", body) if found in names), section)
        if marks == "##" and body.strip() or title.startswith("Note"):
            rest.append(part)
        elif marks == "###":
            placed[place].append(f"::: equation\n{part}\n:::\n")
            index += [f"- [{title}](#{numbered[1].lower()}-{numbered[2]})"] if numbered else []
    return placed, "\n".join(rest), "\n".join(index)


def linked(page: str, names: set[str]) -> str:
    """The same HTML, in which equations, notes and definitions that it names are links.

    This is done to the HTML and not to the Markdown, so that comments in the code have their links too.
    """

    def link(found: re.Match) -> str:
        """The links for one match; "Eq. 9 to 11" has two. What was matched to be kept comes back as it is."""
        if found["equations"]:
            return re.sub(r"(?:Eq\. )?(\d+)", r'<a href="#eq-\1">\g<0></a>', found[0])
        if found["note"] or found["algorithm"]:
            return f'<a href="#{found[0].lower().replace(" ", "-")}">{found[0]}</a>'
        return f'<a href="#splam.{found["name"]}">{found[0]}</a>' if found["name"] in names else found[0]

    return REFERENCE.sub(link, page)


def build(files: str) -> str:
    """The page. `files` is the address of the project's root, for links to its files."""
    chapter = pieces((DOCS.parent / "splam.py").read_text())
    names = {piece.name for piece in chapter}
    placed, rest, index = equations((DOCS / "equations.md").read_text(), names)
    explorer = re.search(r'<section id="explorer".*</section>', (DOCS / "explorer.html").read_text(), re.DOTALL)[0]

    # pandoc's fenced divs make the two columns. Each definition begins a row: text and equations on the left, the code
    # on the right. A section's own text has the equations without code on its right.
    layout = [f"::: index\n{index}\n:::\n"]
    for piece in chapter:
        cards, text = "\n".join(placed.pop(piece.name, [])), prose(piece.text)
        if piece.name.startswith("section-"):
            title, _, text = text.partition("\n")
            layout.append(f"## {title} {{#{piece.name}}}\n")
            left, right = text, cards
        else:
            heading = (
                f"### [`{piece.name}`](../splam.py#L{piece.line}) {{#splam.{piece.name}}}\n\n" if piece.name else ""
            )
            left, right = f"{heading}{text}\n\n{cards}", code(piece)
        layout.append(f":::: pair\n::: text\n{left}\n:::\n::: side\n{right}\n:::\n::::\n")
        if piece.name == EXPLORER_AFTER:
            layout.append(f"``` {{=html}}\n{explorer}\n```\n")
    layout += ["::: reference\n", *(card for cards in placed.values() for card in cards), rest, ":::\n"]
    # GitHub's Markdown with its formulas, and what the layout above needs: ids, divs, and the explorer as it is.
    reader = "gfm+attributes+fenced_divs+raw_attribute"
    body = pypandoc.convert_text("\n".join(layout), "html", reader, extra_args=["--mathml", "--wrap=none"])
    for accent, alone in {"\u0302": "\u02c6", "\u0303": "\u02dc"}.items():  # browsers misplace a combining one
        body = body.replace(f'<mo accent="true">{accent}</mo>', f'<mo stretchy="false">{alone}</mo>')
    page = Template((DOCS / "page.html").read_text()).substitute(
        body=linked(body, names), script=(DOCS / "explorer.js").read_text()
    )
    return page.replace('href="../', f'href="{files}/')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", default="..", help="address of the project's files, to which the page links")
    (DOCS / "index.html").write_text(build(parser.parse_args().files))


if __name__ == "__main__":
    main()
