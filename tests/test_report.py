"""The report: what a page keeps of a notebook, and what the index says first."""

import base64
import json
import re

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ssepa_lib.model import Attention, PatchAffinity
from ssepa_lib.workbook import explorers, lesson
from ssepa_lib.workbook.figures import save_figure
from ssepa_lib.workbook.report import write_report
from ssepa_lib.workbook.report_page import linked, markdown, mathml, notebook_page, takeaways_of

PIXEL = base64.b64encode(bytes.fromhex("89504e470d0a1a0a")).decode()
WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "Slider()"}


def microscope():
    sides = [[torch.randn(1, 2, 5, 4)] for _ in range(2)]
    return explorers.microscope(torch.zeros(3, 8, 8), PatchAffinity(Attention(*sides, 1, (2, 2))))


def shown(source, *data, tags=()):
    cell = new_code_cell(source, metadata={"tags": list(tags)})
    cell.outputs = [new_output("display_data", d) for d in data]
    return cell


@pytest.fixture
def notebook():
    made = new_notebook(metadata={"widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}}}})
    frozen = {"text/html": microscope().frozen(), "text/plain": ""}
    made.cells = [
        new_markdown_cell(
            "# What is $v'$?\n\nNot `$HOME`, but\n\n$$A = \\frac{QK^\\top}{\\sqrt d} * B * C$$"
        ),
        new_markdown_cell("## A figure\n\nIt costs 3 $ or 4 $."),
        shown("plot()", {"image/png": PIXEL, "text/plain": "<Figure>"}),
        shown("view", frozen, WIDGET),
        shown("progress", WIDGET),
        shown("answer = 42", tags=["solution"]),
        new_markdown_cell("## Takeaways"),
        shown("display", {"text/markdown": "- Gained $x^2$ points.\n- Next: **01**."}),
    ]
    return made


def visible(page):
    return re.sub(r'srcdoc=".*?"', "", page, flags=re.S)


def test_a_page_needs_neither_network_nor_scripts(notebook):
    page = notebook_page(notebook, "A page", after="01_b.html")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", page)
    assert "<script" not in page and "widget-view" not in page and "widget-state" not in page
    assert "Slider()" not in page and page.count("<iframe") == 1
    assert 'href="index.html"' in page and 'href="01_b.html"' in page
    assert "widgets" in notebook.metadata, "the notebook itself is not changed"


def test_equations_are_drawn_by_the_browser(notebook):
    text = visible(notebook_page(notebook, "A page"))
    assert text.count("<math") == 3 and "<mfrac>" in text and "\\frac" not in text and "EQUATION" not in text
    assert "<em>" not in text, "a product is no emphasis"
    assert "$HOME" in text and "3 $ or 4 $" in text
    assert mathml("\\frac{") == "<code>\\frac{</code>"
    assert "<math" in markdown("- $a_i$")


def test_figures_have_a_text_and_solutions_are_closed(notebook):
    page = visible(notebook_page(notebook, "A page"))
    assert 'alt="Figure of the section: A figure"' in page
    closed = re.search(r"<details>(.*?)</details>", page, re.S)[1]
    assert "Solution" in closed and "42" in closed and "plot" not in closed


def test_takeaways_leave_out_the_way_to_the_next_notebook(notebook):
    assert takeaways_of(notebook) == "- Gained $x^2$ points."


def result(method, seed, **miou):
    setting = {"data": "shapes", "split": "val", "images": 200, "size": 96, "steps": 300, "batch": 8}
    setting |= {"method": method, "seed": seed, "backbone": "vit", "outputs": {}}
    rest = dict.fromkeys(("precision", "recall", "boundary_iou", "per_class", "threshold_curve"), {})
    return {"val": {"setting": setting, "miou": miou} | rest | {"mean_average_precision": 80.0}}


def test_the_index_begins_with_question_and_answer(notebook, tmp_path):
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "00_a.ipynb")
    for method, seed, refined in (("toco", 0, None), ("ssepa", 0, 50.0), ("ssepa", 1, 54.0)):
        run = tmp_path / f"{method}-seed{seed}"
        run.mkdir()
        found = result(method, seed, cam=45.0, refined_cam=refined, segmentation=60.0 + seed)
        (run / "metrics.json").write_text(json.dumps(found))
    index = write_report(tmp_path).read_text()
    order = [
        "only told that it is there?",
        "60.5 ± 0.7 %",
        "<table>",
        "Notebooks",
        "Gained",
        "Origin",
        "commit",
    ]
    assert [index.index(part) for part in order] == sorted(index.index(part) for part in order)
    assert "raises the mIoU of the class activation map from 45.0 ± 0.0 to 52.0 ± 2.8 %" in index
    assert index.count("shapes val: 200 images") == 1 and "<td>52.0 ± 2.8</td>" in index
    assert 'href="00_a.html"' in index and "<math" in index and "http" not in index


def test_the_index_says_where_every_number_comes_from(tmp_path):
    old, new = result("toco", 0, cam=45.0), result("ssepa", 0, cam=45.0)
    new["val"]["setting"] |= {"weights": "0123456789abcdef", "versions": {"torch": "2.11"}, "commit": "<abc>"}
    for name, found in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(found))
    index = write_report(tmp_path).read_text()
    rows = re.findall(r"<tr><td>(?:new|old)</td><td>val</td>.*?</tr>", index)
    assert ["0123456789abcdef" in row and "torch 2.11" in row and "&lt;abc&gt;" in row for row in rows] == [
        True,
        False,
    ]
    assert rows[1].count("not recorded") == 6


def test_the_answer_does_without_an_output_that_was_not_scored(tmp_path):
    found = result("ssepa", 0, refined_cam=45.0)
    (tmp_path / "ssepa-seed0").mkdir()
    (tmp_path / "ssepa-seed0" / "metrics.json").write_text(json.dumps(found))
    assert "neither a segmentation nor a refined map" in write_report(tmp_path).read_text()


def test_an_index_without_results_says_so(tmp_path):
    (tmp_path / "notebooks").mkdir()
    assert "No trained run has been evaluated yet." in write_report(tmp_path).read_text()


def test_links_between_notebooks_become_links_between_pages():
    body = markdown("First [01_data](01_data.ipynb), then [02](02_method.ipynb) and [a file](x.csv).")
    page = linked(body, ["", "01_data.html", ""])
    assert '<a href="01_data.html">01_data</a>' in page
    assert "then 02 and" in page and ".ipynb" not in page and 'href="x.csv"' in page


def test_source_that_is_shown_brings_no_colours_of_its_own(notebook):
    """IPython's would colour every output of the page, for a light background alone."""
    notebook.cells.append(shown("source", {"text/html": lesson.source(lesson.reveal).data}))
    assert ".output_html" in notebook.cells[-1].outputs[0].data["text/html"]
    page = visible(notebook_page(notebook, "A page"))
    assert ".output_html" not in page and 'class="highlight"' in page and ".ssepa-untrusted" in page


def test_the_index_shows_the_figures_that_carry_the_argument(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("00_curtains", "01_samples", "04_baselines", "04_cams"):
        axes = plt.figure(figsize=(1, 1)).add_subplot(title=f"title of {name}")
        save_figure(axes.figure, tmp_path / "figures" / f"{name}.png")
    index = write_report(tmp_path).read_text()
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", index)
    assert captions[0].startswith("Maps of some") and captions[2] == "title of 00_curtains"
    assert len(captions) == 3 and captions[1].startswith("What every form")
