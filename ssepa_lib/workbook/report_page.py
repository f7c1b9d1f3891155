"""One page of the report: an executed notebook as HTML that needs no network and no script of its own."""

import copy
import html
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ssepa_lib.workbook.explorer_host import WIDGET

CSS = Path(__file__).parent / "assets" / "report.css"
_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{css}</style></head>
<body>{body}</body></html>
"""
_CELLS = """{%- extends 'basic/index.html.j2' -%}
{%- block any_cell -%}
{%- for tag in cell.metadata.get('tags', []) if '-' in tag %}<a id="{{ tag | e }}"></a>{% endfor -%}
{%- if 'colab' in cell.metadata.get('tags', []) -%}
{%- elif 'solution' in cell.metadata.get('tags', []) -%}
<details><summary>Solution</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock any_cell -%}"""
_MATH = re.compile(
    r"(?P<code>```.*?```|`[^`\n]+`)|\$\$(?P<block>.+?)\$\$|(?<![\\$])\$(?P<line>[^\s$](?:[^$\n]*[^\s$\\])?)\$",
    re.S,
)


@cache
def _css() -> str:
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=s).get_style_defs(".highlight") for s in ("default", "github-dark"))
    plain = ".highlight{background:none!important}"
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}{plain}{CSS.read_text(encoding='utf-8')}"


def page(title: str, body: str) -> str:
    """A complete HTML document, readable on a phone, in light and in dark."""
    return _PAGE.format(title=html.escape(title), css=_css(), body=body)


class _Equations:
    """LaTeX out of a Markdown text, MathML into the HTML made from it; in between stands a plain word."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def take(self, text: str) -> str:
        """The text with a word for every `$…$` and `$$…$$` outside of code."""
        return _MATH.sub(self._word, text)

    def _word(self, match: re.Match) -> str:
        if match["code"]:
            return match[0]
        self.found.append(mathml(match["block"] or match["line"], block=bool(match["block"])))
        return f"EQUATION{len(self.found) - 1}N"

    def give(self, page: str) -> str:
        """The HTML with every word replaced by its equation; addresses of headings go without."""
        page = re.sub(r'(id|href)="[^"]*"', lambda m: re.sub(r"EQUATION\d+N", "", m[0]), page)
        return re.sub(r"EQUATION(\d+)N", lambda m: self.found[int(m[1])], page)


def mathml(latex: str, block: bool = False) -> str:
    """An equation in LaTeX as MathML; as code where it cannot be read."""
    import latex2mathml.converter

    try:
        made = latex2mathml.converter.convert(latex.strip(), display="block" if block else "inline")
    except Exception:  # the converter has no common error; a reader still gets the equation
        return f"<code>{html.escape(latex)}</code>"
    return re.sub(r' xmlns="[^"]*"', "", made)


def markdown(text: str) -> str:
    """A short Markdown text as HTML, equations included."""
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    equations = _Equations()
    return equations.give(markdown2html_mistune(equations.take(without_html(text))))


def without_html(text: str) -> str:
    """A computed Markdown text in which `<` is a character: the name of a class or a file is no HTML."""
    return re.sub(
        r"(```.*?```|`[^`\n]+`)|<(?=[A-Za-z/!?])", lambda match: match[1] or "&lt;", text, flags=re.S
    )


def _without_widgets(outputs: list[Any]) -> list[Any]:
    """Outputs without live views: only the frozen one beside each is complete without a kernel."""
    kept = []
    for output in outputs:
        data = output.get("data", {})
        if data.pop(WIDGET, None) is None or set(data) - {"text/plain"}:
            kept.append(output)
    return kept


def _prepared(notebook: Any, equations: _Equations) -> Any:
    """A copy without widgets, with words for equations, and with a text for every image."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata.pop("widgets", None)
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = re.findall(r"^#+ (.+)$", cell.source, re.M)
            heading = found[-1] if found else heading
            cell.source = equations.take(cell.source)
            continue
        cell.outputs = _without_widgets(cell.get("outputs", []))
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                alt = f"Figure of the section: {heading}".replace('"', "'")
                output.setdefault("metadata", {}).setdefault("image/png", {}).setdefault("alt", alt)
            if "text/markdown" in data:
                data["text/markdown"] = equations.take(without_html("".join(data["text/markdown"])))
    return notebook


@cache
def _exporter() -> Any:
    from nbconvert import HTMLExporter

    return HTMLExporter(template_name="basic", raw_template=_CELLS)


def linked(body: str, pages: Sequence[str]) -> str:
    """Links to notebooks as links to their pages, or as plain text where this report has no such page."""

    def link(match: re.Match) -> str:
        page, section = f"{match[1]}.html", match[2] or ""
        return f'<a href="{page}{section}">{match[3]}</a>' if page in pages else match[3]

    return re.sub(r'<a href="(\d\d_\w+)\.ipynb(#[^"]*)?"[^>]*>(.*?)</a>', link, body, flags=re.S)


def notebook_page(
    notebook: Any, title: str, before: str = "", after: str = "", pages: Sequence[str] = ()
) -> str:
    """An executed notebook as a page.

    Args:
        notebook: as `nbformat` reads it; it is not changed.
        title: of the page.
        before, after: addresses of the neighbouring pages; the index is `index.html` beside them.
        pages: names of all pages of the report; a link to another notebook becomes plain text.
    """
    equations = _Equations()
    body, _ = _exporter().from_notebook_node(_prepared(notebook, equations))
    body = re.sub(
        r"<script\b.*?</script>|<style>[^<]*\.output_html[^<]*</style>", "", body, flags=re.S | re.I
    )
    body = linked(equations.give(body), pages)
    links = [("index.html", "Index of the report"), (before, "← before"), (after, "next →")]
    nav = "".join(f'<a href="{html.escape(to)}">{text}</a>' for to, text in links if to)
    return page(title, f"<nav>{nav}</nav><main>{body}</main><nav>{nav}</nav>")


def title_of(notebook: Any) -> str:
    """First heading of a notebook."""
    for cell in notebook.cells:
        for line in cell.source.splitlines():
            if line.startswith("# ") and cell.cell_type == "markdown":
                return line[2:]
    return ""


def takeaways_of(notebook: Any) -> str:
    """What the cells below the heading "Takeaways" have said, in Markdown."""
    below, said = False, []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            below = below or cell.source.startswith("## Takeaways")
        elif below:
            for output in cell.get("outputs", []):
                said.append("".join(output.get("data", {}).get("text/markdown", "")))
    lines = [line for text in said for line in text.splitlines()]
    return "\n".join(line for line in lines if not line.startswith("- Next:"))
