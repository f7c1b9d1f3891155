"""What strangers' files may not do: run code, leave their folder, be a formula in a spreadsheet, or HTML."""

import ast
import json
import socket
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssepa_lib.data.datasets import FileDataset
from ssepa_lib.data.download import _StayEncrypted
from ssepa_lib.data.voc import SBD, VOC
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation import export_pseudo_labels
from ssepa_lib.files import require_place, write_csv
from ssepa_lib.paths import PROJECT, plain_name
from ssepa_lib.readers import parse_json, parse_yaml, read_lines, read_table
from ssepa_lib.training.history import history_rows, read_history
from ssepa_lib.workbook.notebooks import discover, forget_places
from ssepa_lib.workbook.report import headline, write_report
from ssepa_lib.workbook.report_page import markdown, without_html

SOURCES = sorted((PROJECT / "ssepa_lib").rglob("*.py"))
FORBIDDEN = {  # calls that execute what they read, or hand a text to a shell
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"),
    *("marshal.load", "marshal.loads", "shelve.open", "yaml.unsafe_load", "yaml.full_load", "dill.load"),
}


def called(node):
    """The name under which something is called: `torch.load`, `eval`."""
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_that_is_read_is_executed(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name, options = called(node), {each.arg: ast.unparse(each.value) for each in node.keywords}
        assert name not in FORBIDDEN, name
        assert options.get("shell") != "True" and options.get("allow_pickle") != "True", name
        if name == "torch.load":
            assert options["weights_only"] == "True"
        if name == "yaml.load":
            assert ast.unparse(node.args[1]) == "_Loader"
        if name.endswith(".extractall"):
            assert options["filter"] == "'data'"


def test_downloads_are_encrypted_checked_and_stay_so():
    for source in (VOC, SBD):
        assert len(source.md5) == 32 and all(url.startswith("https://") for url in source.urls)
    request = urllib.request.Request("https://example.org/a.tar")
    follow = _StayEncrypted().redirect_request
    with pytest.raises(OSError, match="not encrypted"):
        follow(request, None, 302, "Found", {}, "http://example.org/a.tar")
    assert follow(request, None, 302, "Found", {}, "https://example.org/b.tar").full_url.endswith("b.tar")


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1+1", "@SUM(A1)", "\tx", "=cmd|' /C calc'!A0"])
def test_a_name_is_no_formula_in_a_table(tmp_path, cell):
    write_csv(
        tmp_path / "a.csv", ["image", "value"], [(cell, -1.5), ("b.png", float("nan")), ("c.png", None)]
    )
    _, first, second, third = (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()
    assert first.lstrip('"').startswith("'") and first.endswith(",-1.5")
    assert (second, third) == ("b.png,", "c.png,")
    _, rows = read_table(tmp_path / "a.csv", "table")
    assert rows[0] == {"image": cell, "value": "-1.5"}


NASTY = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</details>", "<!-- x", "a<b", "`<b>`"]


@pytest.mark.parametrize("name", NASTY)
def test_a_name_is_no_html_in_a_report(name):
    page = markdown(f"- class {name} is the largest.")
    for tag in ("<script", "<img", "</details", "<!--", "<b>"):
        assert tag not in page
    assert "&lt;" in page
    assert without_html("`a<b>` 3 < 4") == "`a<b>` 3 < 4"


def test_a_report_survives_a_broken_run_and_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path))
    preset = tmp_path / "shapes"
    (preset / "<b>toco-seed0").mkdir(parents=True)
    (preset / "<b>toco-seed0" / "metrics.json").write_text("{")
    (preset / "figures").mkdir()
    (preset / "figures" / "04_cams.png").write_bytes(b"cut short")
    (preset / "notebooks").mkdir()
    (preset / "notebooks" / "<i>.ipynb").write_text("{}")
    index = write_report(preset).read_text(encoding="utf-8")
    assert "left out: " in index and "&lt;b&gt;toco-seed0" in index and "<b>toco" not in index
    assert str(tmp_path) not in index and "<i>" not in index
    assert "left out: " in headline(preset)


@given(st.text() | st.sampled_from(['"; import os #', "'''", '"""', "\\", "\n", "{x}", "\\N{DOLLAR SIGN}"]))
def test_a_notebook_parameter_is_a_literal(text):
    from papermill.translators import PythonTranslator

    values = {"run_name": text, "methods": [text], "overrides": {text: text, "a": 1.5}}
    code = ast.parse(PythonTranslator.codify(values, comment="Parameters"))
    assert all(isinstance(statement, ast.Assign) for statement in code.body)
    found = {statement.targets[0].id: ast.literal_eval(statement.value) for statement in code.body}
    assert found == values


def test_an_executed_notebook_forgets_the_machine(tmp_path, monkeypatch):
    results = tmp_path / "results"
    monkeypatch.setenv("VOC_ROOT", str(tmp_path / "voc"))
    said = [f"{results}/shapes/x", f"{PROJECT}/ssepa_lib/a.py", f"{Path.home()}/.cache", "results stay"]
    said += [f"{tmp_path}/voc/JPEGImages", f"held by 7 on {socket.gethostname()} since noon"]
    copy = tmp_path / "00.ipynb"
    papermill = {"input_path": str(PROJECT), "output_path": str(copy), "parameters": {"seed": 1}}
    cells = [{"cell_type": "code", "outputs": [{"text": said}], "source": "x"}]
    copy.write_text(json.dumps({"cells": cells, "metadata": {"papermill": papermill}, "nbformat": 4}))
    forget_places(copy, results)
    content = json.loads(copy.read_text())
    assert content["cells"][0]["outputs"][0]["text"] == [
        "results/shapes/x",
        "./ssepa_lib/a.py",
        "~/.cache",
        "results stay",
        "VOC_ROOT/JPEGImages",
        "held by 7 on <host> since noon",
    ]
    assert content["metadata"]["papermill"] == {"parameters": {"seed": 1}}
    copy.write_text("{")
    forget_places(copy, results)
    assert copy.read_text() == "{"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        "step,lr\n1,2\n",
        "step,lr,seconds\n1,2\n",
        "step,lr,seconds\nmany,1,1\n",
        "step,lr,seconds\n-1,1,1\n",
        "step,lr,seconds,loss\n1,1,,2\n",
        "step,lr,seconds,loss\n1,1,1,high\n",
        "step,lr,seconds,seconds\n1,1,1,1\n",
    ],
)
def test_a_broken_history_is_named(tmp_path, text):
    path = tmp_path / "history.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"history\.csv"):
        history_rows(path)
    assert read_history(path, 5)["rows"] == []
    path.write_text("step,lr,seconds,loss,ctc\n1,0.1,2,nan,\n")
    assert history_rows(path) == [{"step": "1", "lr": "0.1", "seconds": "2", "loss": "nan", "ctc": ""}]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        "5",
        "\0",
        "[" * 100_000,
        '{"cells": 5, "nbformat": 4, "metadata": {}}',
        "= =",
        "a = b",
    ],
)
def test_a_broken_notebook_is_named(tmp_path, content):
    """A file that is no notebook, or one whose parameters cell is not Python or no literal."""
    path = tmp_path / "00_mine.ipynb"
    if content in ("= =", "a = b"):
        cell = {"cell_type": "code", "source": content, "metadata": {"tags": ["parameters"]}, "outputs": []}
        cells = [cell | {"execution_count": None, "id": "a"}]
        content = json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    path.write_text(content)
    with pytest.raises(UserError, match=r"00_mine\.ipynb") as error:
        discover(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/x", ".x", "a\0", "a\nb", "=x", "-x", "x" * 300, "a\\b"]
)
def test_a_name_of_a_folder_leads_nowhere_else(name):
    with pytest.raises(UserError, match="run_name"):
        plain_name("run_name", name)
    assert plain_name("run_name", "fsr+ssepa-größe 2") == "fsr+ssepa-größe 2"


def test_places_for_results_are_checked_beforehand(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, folder in ((tmp_path / "file", True), (tmp_path / "file" / "x", True), (tmp_path, False)):
        with pytest.raises(UserError, match=str(path)):
            require_place(path, folder)
    require_place(tmp_path / "new" / "folder")
    require_place(tmp_path / "file", folder=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_an_export_does_not_replace_the_masks_of_its_dataset(tmp_path):
    dataset = FileDataset("train", ["moth"], [tmp_path / "a.jpg"], [tmp_path / "masks" / "a.png"])
    with pytest.raises(UserError, match="holds files of"):
        export_pseudo_labels(None, None, dataset, tmp_path / "masks", device="cpu")


def test_readers_say_what_is_wrong(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb c\r\r\n\n d \n")
    assert read_lines(path, "list") == ["a", "b c", "d"]
    for text in ("a: &x 1\nb: *x", "a: 1\na: 2", "a: {b: 1, b: 2}", "[" * 2000, "!!python/name:os.system"):
        with pytest.raises(ValueError):
            parse_yaml(text)
    for text in ("[" * 100_000, "NaN", "[Infinity]", "{", b"\xff"):
        with pytest.raises(ValueError):
            parse_json(text)
    assert parse_yaml("{a: 1e-4, b: [x, 2]}") == {"a": 1e-4, "b": ["x", 2]}
    assert parse_yaml("{root: 2e4_photos}") == {"root": "2e4_photos"}
