"""The sections of the notebooks, and links to them."""

import html
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ssepa_lib.paths import NOTEBOOKS
from ssepa_lib.readers import read_json


def headings_of(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The headings of a notebook's sections, in order: what follows `## ` in its Markdown cells."""
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return [found for text in texts for found in re.findall(r"^## (.+)$", text, re.M)]


def headings(path: Path) -> list[str]:
    """The headings of the sections in an `.ipynb` file."""
    return headings_of(read_json(path, "a notebook")["cells"])


def anchor(heading: str) -> str:
    """The address of a heading inside its page, the same in JupyterLab and in the report."""
    return heading.replace(" ", "-")


@cache
def addresses() -> dict[str, str]:
    """Every place, such as `02` or `02 §3`, with its address as `name of the notebook#anchor`."""
    found = {}
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        found[path.stem[:2]] = path.stem
        for heading in headings(path):
            number = re.match(r"(\d+) ", heading)
            if number:
                found[f"{path.stem[:2]} §{number[1]}"] = f"{path.stem}#{anchor(heading)}"
    return found


def places(text: str) -> list[str]:
    """Every place that a text names: "02 §3, §4; 06" has `02 §3`, `02 §4` and `06`."""
    found, notebook = [], ""
    for number, section in re.findall(r"\b(0\d)\b|§(\d+)", text):
        if number:
            notebook = number
            found.append(number)
        elif found and found[-1] == notebook:
            found[-1] += f" §{section}"
        else:
            found.append(f"{notebook} §{section}")
    return found


def links(text: str) -> str:
    """The places that a text names, as links in HTML; a place that is not there stays a word."""
    made = []
    for place in places(text):
        stem, _, mark = addresses().get(place, "").partition("#")
        to = html.escape(f"{stem}.ipynb" + (f"#{mark}" if mark else ""))
        made.append(f'<a href="{to}">{place}</a>' if stem else place)
    return ", ".join(made)
