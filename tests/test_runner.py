"""The runner on tiny notebooks: selection, checks before anything runs, order, failures, products."""

import json
import re

import nbformat
import pytest

from ssepa_lib.errors import UserError
from ssepa_lib.workbook.notebooks import check_parameters, coerce, discover, select
from ssepa_lib.workbook.progress import PROGRESS, Display, counter, progress_writer
from ssepa_lib.workbook.report import headline
from ssepa_lib.workbook.runner import run_workbook

DEFAULTS = 'preset = "shapes"\nsteps = 3\nlr = 1e-3\nquick = True\nseeds = [0, 1]'


def write(folder, name, *cells, needs=(), parameters=DEFAULTS, tags=("parameters",)):
    notebook = nbformat.v4.new_notebook(metadata={"ssepa": {"needs": list(needs)}})
    notebook.cells = [nbformat.v4.new_markdown_cell(f"# Title of {name}")]
    notebook.cells += [nbformat.v4.new_code_cell(parameters, metadata={"tags": list(tags)})]
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "notebooks"
    path.mkdir()
    return path


def test_order_follows_needs_not_only_numbers(folder):
    write(folder, "00_a", needs=["02_c"])
    write(folder, "01_b")
    write(folder, "02_c")
    write(folder, "scratch")
    assert [n.name for n in discover(folder)] == ["01_b", "02_c", "00_a"]
    write(folder, "02_c", needs=["00_a"])
    with pytest.raises(UserError, match="00_a, 02_c"):
        discover(folder)


def test_selection(folder):
    for name in ("00_a", "01_b", "02_c"):
        write(folder, name)
    notebooks = discover(folder)
    assert [n.name for n in select(notebooks, ["02", "00_a"])] == ["00_a", "02_c"]
    assert [n.name for n in select(notebooks, start="01")] == ["01_b", "02_c"]
    with pytest.raises(UserError, match="no notebook '07'.*00_a, 01_b, 02_c"):
        select(notebooks, ["07"])


@pytest.mark.parametrize(
    "source, tags",
    [("steps = 3\ntotal = steps * 2", ["parameters"]), ("print(1)", ["parameters"]), (DEFAULTS, [])],
)
def test_a_parameters_cell_holds_literals_only(folder, source, tags):
    write(folder, "00_a", parameters=source, tags=tags)
    with pytest.raises(UserError, match="00_a.*parameters"):
        discover(folder)


@pytest.mark.parametrize(
    "text, default, value",
    [
        ("6e-5", 1.0, 6e-5),
        ("1", 0.5, 1.0),
        ("1e3", 3, 1000),
        ("false", True, False),
        ("6e-5", "x", "6e-5"),
        ("[2, 3]", [0], [2, 3]),
        ("4", [0, 1], [4]),
        ([1], [0.5], [1.0]),
        (7, 3, 7),
    ],
)
def test_values_become_the_type_of_the_default(text, default, value):
    result = coerce("p", text, default)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    "value, default",
    [("six", 3), ("2.5", 3), ("1", True), (True, 3), ("x", 0.5), (3, "x"), ("[1, 'a']", [0])],
)
def test_a_wrong_type_is_an_error(value, default):
    with pytest.raises(UserError, match="p is"):
        coerce("p", value, default)


def test_a_parameter_must_be_known_to_some_notebook_and_reaches_only_those(folder):
    write(folder, "00_a", parameters="steps = 3")
    write(folder, "01_b", parameters="seed = 0")
    notebooks = discover(folder)
    assert check_parameters(notebooks, {"steps": "5"}) == {"00_a": {"steps": 5}, "01_b": {}}
    with pytest.raises(UserError, match="'stpes'.*seed, steps"):
        check_parameters(notebooks, {"stpes": "5"})


def test_bad_input_runs_nothing(folder, tmp_path):
    write(folder, "00_a")
    for arguments in ({"preset": "nowhere"}, {"parameters": {"stpes": 5}}, {"parameters": {"steps": "many"}}):
        with pytest.raises(UserError):
            run_workbook(notebooks=folder, results=tmp_path / "results", **arguments)
    assert not (tmp_path / "results").exists()


def test_missing_data_is_told_before_anything_runs(folder, tmp_path, monkeypatch):
    write(folder, "00_a")
    monkeypatch.setenv("VOC_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        run_workbook("voc_mini", notebooks=folder, results=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_your_own_images_are_found_by_their_variable(folder, tmp_path, monkeypatch):
    """FOLDER_ROOT relative to where the command is given, although the kernels run elsewhere."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FOLDER_ROOT", raising=False)
    cell = "import os, pathlib\nfrom ssepa_lib.compose import load_recipe\n"
    cell += (
        "from ssepa_lib.data import resolve_root\nroot = resolve_root(load_recipe(f'{preset}/toco').data)\n"
    )
    cell += "pathlib.Path(os.environ['SSEPA_RESULTS'], 'root').write_text(str(root))"
    write(folder, "00_a", cell)
    with pytest.raises(UserError, match="data.root"):
        run_workbook("folder", notebooks=folder, results=tmp_path / "results")
    (tmp_path / "mine" / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "mine" / "images" / "a.png")
    (tmp_path / "mine" / "labels.csv").write_text("image,classes\na.png,cat\n")
    monkeypatch.setenv("FOLDER_ROOT", "mine")
    assert run_workbook("folder", notebooks=folder, results=tmp_path / "results") == 0
    assert (tmp_path / "results" / "root").read_text() == str(tmp_path / "mine")


def test_a_folder_of_yours_may_be_named_as_a_parameter(folder, tmp_path, monkeypatch):
    """Relative to where the command is given; the notebook that reads it checks it, not the runner."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FOLDER_ROOT", raising=False)
    cell = "import os, pathlib\npathlib.Path(os.environ['SSEPA_RESULTS'], 'root').write_text(folder)"
    write(folder, "00_a", cell, parameters='preset = "shapes"\nfolder = ""')
    (tmp_path / "my images").mkdir()
    options = {"notebooks": folder, "results": tmp_path / "results"}
    assert run_workbook("folder", parameters={"folder": "my images"}, **options) == 0
    assert (tmp_path / "results" / "root").read_text() == str(tmp_path / "my images")
    with pytest.raises(UserError, match="lost does not exist"):
        run_workbook("folder", parameters={"folder": "lost"}, **options)


def test_run(folder, tmp_path, capfd):
    """Overrides arrive; a failure keeps its copy and stops only what depends on it; exit status 1."""
    record = "import os, pathlib\n"
    record += "pathlib.Path(os.environ['SSEPA_RESULTS'], '{0}').write_text(repr((preset, steps, lr)))"
    write(folder, "00_good", record.format("good"))
    write(folder, "01_bad", "seen = 41", "1 / 0", "never = 1")
    write(folder, "02_after", record.format("after"), needs=["01_bad"])
    write(folder, "03_later", record.format("later"), needs=["02_after"])
    write(folder, "04_other", record.format("other"), needs=["00_good"])
    results = tmp_path / "results"
    assert (
        run_workbook("shapes", parameters={"steps": "5", "lr": "6e-5"}, results=results, notebooks=folder)
        == 1
    )
    assert (results / "good").read_text() == (results / "other").read_text() == "('shapes', 5, 6e-05)"
    assert not (results / "after").exists() and not (results / "later").exists()
    copy = nbformat.read(results / "shapes" / "notebooks" / "01_bad.unfinished.ipynb", as_version=4)
    assert any(o.output_type == "error" for c in copy.cells for o in c.get("outputs", []))
    printed = capfd.readouterr().out
    assert "01_bad, cell In [3] `1 / 0`: ZeroDivisionError: division by zero" in printed
    assert (
        "02_after: skipped" in printed
        and "03_later: skipped" in printed
        and "[5/5] 04_other: done" in printed
    )
    report = results / "shapes" / "report"
    index = (report / "index.html").read_text()
    assert "Title of 04_other" in index and "failed" in index and (report / "00_good.html").exists()


def test_a_failed_call_does_not_replace_the_page_of_a_good_one(folder, tmp_path):
    def run():
        return run_workbook("shapes", results=tmp_path, notebooks=folder)

    report = tmp_path / "shapes" / "report"
    write(folder, "00_a", "print('all is well')")
    assert run() == 0
    write(folder, "00_a", "print('going wrong')", "1 / 0")
    assert run() == 1
    assert "all is well" in (report / "00_a.html").read_text()
    assert "going wrong" in (report / "00_a.unfinished.html").read_text()
    index = (report / "index.html").read_text()
    assert 'href="00_a.html"' in index and "last call failed" in index
    write(folder, "00_a", "print('well again')")
    assert run() == 0
    assert "well again" in (report / "00_a.html").read_text()
    index = (report / "index.html").read_text()
    assert "last call failed" not in index and not (report / "00_a.unfinished.html").exists()


def test_another_run_name_has_copies_and_a_report_of_its_own(folder, tmp_path):
    cell = "from ssepa_lib.workbook.study import preset_folder\n"
    cell += "(preset_folder(preset, run_name) / 'figures' / 'mark').touch()"
    write(folder, "00_a", cell, parameters='preset = "shapes"\nrun_name = ""')
    for parameters in ({}, {"run_name": "other"}):
        assert run_workbook("shapes", results=tmp_path, notebooks=folder, parameters=parameters) == 0
    for place in (tmp_path / "shapes", tmp_path / "shapes" / "other"):
        assert (place / "notebooks" / "00_a.ipynb").is_file() and (place / "figures" / "mark").is_file()
        assert (place / "report" / "00_a.html").is_file() and (place / "report" / "index.html").is_file()
    with pytest.raises(UserError, match="run_name '../x'"):
        run_workbook("shapes", results=tmp_path, notebooks=folder, parameters={"run_name": "../x"})


def test_the_preset_is_no_parameter(folder, tmp_path):
    write(folder, "00_a")
    with pytest.raises(UserError, match="--preset"):
        run_workbook("shapes", results=tmp_path, notebooks=folder, parameters={"preset": "voc_mini"})
    assert not list(tmp_path.glob("shapes*"))


def test_what_a_widget_shows_becomes_output_of_its_cell(folder, tmp_path):
    write(folder, "00_a", "from ipywidgets import interact\ninteract(lambda x: print('shown', x), x=(1, 3));")
    assert run_workbook("shapes", results=tmp_path / "results", notebooks=folder) == 0
    cell = nbformat.read(tmp_path / "results" / "shapes" / "notebooks" / "00_a.ipynb", 4).cells[-1]
    assert [o["text"] for o in cell["outputs"] if o["output_type"] == "stream"] == ["shown 2\n"]


def test_a_run_tells_the_runner_where_it_is(tmp_path, monkeypatch):
    target = tmp_path / "progress.json"
    monkeypatch.setenv(PROGRESS, str(target))
    on_step = progress_writer("toco-seed0")
    display = Display(["03"], target)
    on_step({"step": 200, "steps": 300, "loss": 0.5, "seconds_left": 50.2, "lr": 1e-4})
    assert display.line() == "toco-seed0: step 200/300, loss 0.500, 0:50 left"
    on_step({"step": 300, "steps": 300, "loss": 0.5, "seconds_left": 0.0})
    assert display.line() == ""
    scoring = counter("toco-seed0, val")
    scoring(50, 200)
    assert re.fullmatch(r"toco-seed0, val: image 50/200, \d+:\d\d left", display.line())
    scoring(200, 200)
    assert display.line() == ""


def test_a_bar_without_a_total_moves_on():
    download = counter("images.tar", "B")
    for done in (10, 20, 30):
        download(done, None)


def test_settings_of_haaf_are_no_error_before_a_notebook_of_ssepa_runs(folder, tmp_path):
    write(folder, "00_a", parameters='preset = "shapes"\noverrides = {}')
    given = {"overrides": "{affinity.haaf_objective: variance}"}
    assert run_workbook(notebooks=folder, results=tmp_path / "results", parameters=given) == 0


def test_headline_shows_every_run_with_its_setting(tmp_path):
    assert "No trained run" in headline(tmp_path)
    setting = {"data": "shapes", "split": "val", "images": 200, "size": 96, "steps": 300, "batch": 8}
    setting |= {"method": "toco", "seed": 0, "backbone": "vit", "outputs": {}}
    rest = dict.fromkeys(("precision", "recall", "boundary_iou", "per_class", "threshold_curve"), {})
    for run, value in (("toco-seed0", None), ("ssepa-seed0", 41.25), ("ssepa-other-seed0", 50.0)):
        (tmp_path / run).mkdir()
        result = {"setting": setting, "miou": {"cam": 30.0, "refined_cam": value}}
        result |= rest | {"mean_average_precision": 80.0}
        (tmp_path / run / "metrics.json").write_text(json.dumps({"val": result}))
    text = headline(tmp_path)
    assert "shapes val: 200 images, 96², 300 steps of 8" in text.splitlines()[0]
    assert text.splitlines()[3].split() == ["ssepa-seed0", "val", "30.0", "–", "41.2", "–", "–"]
    assert [line.split()[0] for line in headline(tmp_path, "other").splitlines()[2:]] == ["ssepa-other-seed0"]
