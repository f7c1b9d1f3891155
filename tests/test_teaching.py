"""What the page for lecturers names is there: sections, cells, exercises; and its plans add up."""

import re

import pytest
from test_project import cells, heading, sections

from ssepa_lib.paths import NOTEBOOKS
from ssepa_lib.workbook.contents import addresses, places

TEXT = (NOTEBOOKS / "TEACHING.md").read_text()
KINDS = r"Predict \d|Build|Look|Explore|Show|Two worlds"


def notebook(number):
    return next(NOTEBOOKS.glob(f"{number}_*.ipynb"))


def named_cells(text):
    """Every (notebook, section, kind of cell), as in "02 §3 Build"."""
    found, number = [], ""
    for given, section, kind in re.findall(rf"\b(0\d)\b|§(\d+)(?: ({KINDS}))?", text):
        number = given or number
        if kind:
            found.append((number, section, kind))
    return found


def test_every_place_is_a_section():
    assert places(TEXT) and set(places(TEXT)) <= set(addresses())


@pytest.mark.parametrize("number, section, kind", sorted(set(named_cells(TEXT))))
def test_every_cell_is_in_its_section(number, section, kind):
    (found,) = (part for part in sections(notebook(number)) if heading(part).startswith(f"## {section} "))
    text = "\n".join(cell.source for cell in found if cell.cell_type == "markdown")
    assert re.search(rf"\*\*{kind}", text, re.I), f"{heading(found)} has no {kind}"


def test_every_exercise_is_in_its_notebook():
    exercises = set(re.findall(r"\b(0\d) Exercise (\d)", TEXT))
    assert len(exercises) >= 8
    for number, exercise in exercises:
        assert any(f"**Exercise {exercise}" in cell.source for cell in cells(notebook(number)))


def test_every_heading_in_quotation_marks_is_in_its_notebook():
    for number, title in re.findall(r'\b(0\d), "([^"]+)"', TEXT):
        assert f"## {title}" in [heading(part) for part in sections(notebook(number))]


def test_every_class_lasts_ninety_minutes():
    plans = re.split(r"^##+ .*$", TEXT, flags=re.M)
    spans = [re.findall(r"^\| (\d+)–(\d+) \|", plan, re.M) for plan in plans]
    spans = [[(int(start), int(end)) for start, end in span] for span in spans if span]
    assert len(spans) == 5
    for span in spans:
        assert span[0][0] == 0 and span[-1][1] == 90
        assert [end for _, end in span[:-1]] == [start for start, _ in span[1:]]


def test_the_reading_path_of_students_has_every_notebook():
    (line,) = (line for line in TEXT.splitlines() if line.startswith("| *You study*"))
    assert re.findall(r"\b(0\d) \(", line) == sorted(path.stem[:2] for path in NOTEBOOKS.glob("0*.ipynb"))
