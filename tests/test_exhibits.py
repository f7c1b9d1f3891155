"""Figures and tables of the papers: each is made by a cell that carries its name."""

import re
import shlex

import nbformat
import pytest

from ssepa_lib.paths import NOTEBOOKS
from ssepa_lib.workbook.exhibits import EXHIBITS, PAGE, exhibits_page
from ssepa_lib.workbook.notebooks import check_parameters, discover
from ssepa_lib.workbook.report import write_report
from ssepa_lib.workbook.report_page import notebook_page

TAG = re.compile(r"(ssepa|fsr)-")


@pytest.fixture(scope="module")
def tagged():
    """Tag → the (notebook, cell) pairs that carry it."""
    found = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for tag in cell.metadata.get("tags", []):
                if TAG.match(tag):
                    found.setdefault(tag, []).append((path.stem, cell))
    return found


def test_every_exhibit_has_its_cell_and_every_named_cell_its_exhibit(tagged):
    assert {e.name: [e.notebook] for e in EXHIBITS} == {
        tag: [notebook for notebook, _ in places] for tag, places in tagged.items()
    }
    assert all(cell.cell_type == "code" for places in tagged.values() for _, cell in places)


def test_the_papers_are_complete():
    names = [exhibit.name for exhibit in EXHIBITS]
    assert [n for n in names if n.startswith("ssepa-figure")] == [f"ssepa-figure-{i}" for i in range(1, 8)]
    assert [n for n in names if n.startswith("ssepa-table")] == [f"ssepa-table-{i}" for i in range(1, 6)]
    assert len(set(names)) == len(names)


def test_a_figure_is_saved_and_a_table_is_written(tagged):
    for exhibit in EXHIBITS:
        ((_, cell),) = tagged[exhibit.name]
        made = "to_csv(" if "-table-" in exhibit.name else "save_figure("
        assert made in cell.source, exhibit.name


def test_commands_name_parameters_that_exist():
    by_number = {notebook.name[:2]: notebook for notebook in discover()}
    for exhibit in EXHIBITS:
        words = shlex.split(exhibit.command("voc"))
        notebook = by_number[words[words.index("--only") + 1]]
        given = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "-p")
        check_parameters([notebook], given)


def test_the_page_links_to_the_cells_that_were_run(tmp_path):
    (tmp_path / "06_ablations.html").write_text("")
    page = exhibits_page(tmp_path, "it's")
    assert (
        'href="06_ablations.html#ssepa-table-3"' in page
        and "02_method, cell ssepa-figure-2 (not run)" in page
    )
    assert page.count("<tr>") == len(EXHIBITS) + 1 and "http" not in page
    assert "--preset &#x27;it&#x27;&quot;&#x27;&quot;&#x27;s&#x27;" in page, (
        "quoted for a shell, then for HTML"
    )


def test_a_named_cell_can_be_addressed_in_the_report(tmp_path):
    made = nbformat.v4.new_notebook()
    made.cells = [nbformat.v4.new_code_cell("1", metadata={"tags": ["ssepa-figure-5", 'x-"<']})]
    page = notebook_page(made, "x")
    assert '<a id="ssepa-figure-5"></a>' in page and 'x-"&lt;' in page
    (tmp_path / "notebooks").mkdir()
    assert f'href="{PAGE}"' in write_report(tmp_path).read_text() and (tmp_path / "report" / PAGE).is_file()
