"""The notebooks for a class: the students' version without solutions, and the version with them.

Both run like the notebooks they come from, with the same parameters. Cells with the tag `solution`, and texts
that begin with "The solution", are left out for students; guesses and starter cells are theirs to fill in.
"""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssepa_lib.errors import UserError
from ssepa_lib.files import require_place, write_json, write_text
from ssepa_lib.readers import read_json
from ssepa_lib.workbook.contents import anchor, headings_of
from ssepa_lib.workbook.notebooks import Notebook
from ssepa_lib.workbook.report_page import title_of

SOLUTION = "solution"  # tag of a cell
VERSIONS = {"student": "students' version", "solution": "version with solutions"}  # folder → title
CHECKSUMS = "checksums.json"  # in the folder of both versions: what was written


def is_solution(cell: Any) -> bool:
    """Whether a cell is a solution, or a text about one."""
    about = cell.cell_type == "markdown" and cell.source.startswith(f"The {SOLUTION}")
    return about or SOLUTION in cell.metadata.get("tags", [])


def _links(notebook: Any, page: str = "") -> list[str]:
    """A Markdown link to every section, on this page or on another one."""
    return [f"[{heading}](<{page}#{anchor(heading)}>)" for heading in headings_of(notebook.cells)]


def version_of(notebook: Any, version: str) -> Any:
    """A notebook as students or as teachers get it, with a table of contents below its title.

    Args:
        notebook: as `nbformat` reads it; it is not changed.
        version: `student` or `solution`.
    """
    from nbformat.v4 import new_markdown_cell

    made = copy.deepcopy(notebook)
    cells, number = [], 0
    for cell in made.cells:
        if is_solution(cell) and version == "student":
            continue
        if is_solution(cell):
            cell.metadata.pop("jupyter", None)
        if is_solution(cell) and not is_solution(cells[-1]):
            number += 1
            cells.append(new_markdown_cell(f"**Solution {number}**", id=f"{SOLUTION}-{number}"))
        cells.append(cell)
    listed = "\n".join(f"- {link}" for link in _links(notebook))
    cells.insert(1, new_markdown_cell(f"*{VERSIONS[version].capitalize()}*\n\n{listed}", id="contents"))
    made.cells = cells
    return made


def _contents(version: str, notebooks: Sequence[tuple[Path, Any]]) -> str:
    """The table of contents of one version as a Markdown page."""
    lines = [f"# SS-EPA workbook: {VERSIONS[version]}", ""]
    for path, notebook in notebooks:
        lines.append(f"- [{path.stem[:2]} {title_of(notebook)}]({path.name})")
        lines += [f"  - {link}" for link in _links(notebook, path.name)]
    return "\n".join(lines) + "\n"


def _checksum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _checksums(file: Path) -> dict[str, str]:
    """Name → checksum of what was written before."""
    before = read_json(file, "the checksums of a lesson") if file.exists() else {}
    if not isinstance(before, dict):
        raise UserError(
            f"{file} does not hold the checksums of a lesson; delete it, or choose another --out."
        )
    return before


def write_lesson(notebooks: Sequence[Notebook], out: Path) -> list[Path]:
    """Write both versions and their tables of contents; returns the folders.

    A file that somebody has changed, or run, since it was written is never replaced; then nothing is written.

    Args:
        notebooks: the chosen ones.
        out: gets the folders `student` and `solution`.

    Raises:
        UserError: a file was changed, or `out` cannot be written to.
    """
    import nbformat

    require_place(out)
    read = [(notebook.path, nbformat.read(notebook.path, as_version=4)) for notebook in notebooks]
    texts = {}
    for version in VERSIONS:
        for path, notebook in read:
            texts[f"{version}/{path.name}"] = nbformat.writes(version_of(notebook, version)) + "\n"
        texts[f"{version}/contents.md"] = _contents(version, read)
    sums = {name: _checksum(text.encode()) for name, text in texts.items()}
    before = _checksums(out / CHECKSUMS)
    for name in texts:
        file = out / name
        if file.exists() and _checksum(file.read_bytes()) not in (sums[name], before.get(name)):
            raise UserError(
                f"{file} has been changed or run since it was written; move it away, or write to another "
                "folder with --out."
            )
    for name, text in texts.items():
        write_text(out / name, text)
    write_json(out / CHECKSUMS, before | sums)
    return [out / version for version in VERSIONS]
