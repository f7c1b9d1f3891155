"""The cell for Google Colab: elsewhere nothing happens; a made-up Colab clones and installs first."""

import subprocess
import sys

import nbformat
import pytest
import torch

from ssepa_lib.errors import UserError
from ssepa_lib.paths import NOTEBOOKS, PROJECT
from ssepa_lib.workbook import colab

HERE = 'repository, folder = "", "/content/ssepa-workbook"'


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_has_the_same_cell(path):
    content = nbformat.read(path, as_version=4).cells
    first = next(cell for cell in content if cell.cell_type == "code")
    assert first.source == colab.cell() and first.metadata["tags"] == [colab.TAG]
    colab.write_cell(content)
    assert content == nbformat.read(path, as_version=4).cells, "writing it again changes nothing"


def test_elsewhere_nothing_happens(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", None)
    exec(colab.cell(), {})
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def on_colab(tmp_path, monkeypatch):
    """A Colab without network: `google.colab` can be imported, and commands are noted down instead of run."""
    (tmp_path / "google" / "colab").mkdir(parents=True)
    (tmp_path / "google" / "colab" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "google", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    noted, results = [], {}

    def run(words, **_):
        noted.append(words)
        code, said = results.get(words[0], (0, ""))
        return subprocess.CompletedProcess(words, code, "", said)

    monkeypatch.setattr(subprocess, "run", run)
    yield noted, results
    sys.modules.pop("google", None)


def run_cell(address="https://example.org/workbook.git"):
    before = list(sys.path)
    try:
        exec(colab.cell().replace(HERE, f'repository, folder = "{address}", "{PROJECT}"'), {})
    finally:
        sys.path[:] = before


def test_on_colab_the_project_is_cloned_and_installed(on_colab, monkeypatch, capsys):
    noted, _ = on_colab
    run_cell()
    clone, install = noted
    assert clone[:2] == ["git", "clone"] and clone[-2:] == ["https://example.org/workbook.git", str(PROJECT)]
    assert install == [sys.executable, "-m", "pip", "install", "--quiet", "--editable", str(PROJECT)]
    assert "There is no GPU" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    run_cell()
    assert capsys.readouterr().out == "The project is installed, and the GPU is a Tesla T4.\n"


def test_a_second_run_keeps_the_clone(on_colab):
    noted, results = on_colab
    results["git"] = (
        128,
        "fatal: destination path 'ssepa-workbook' already exists and is not an empty directory.",
    )
    run_cell()
    assert len(noted) == 2


def test_what_goes_wrong_on_colab_is_said(on_colab):
    noted, results = on_colab
    with pytest.raises(AssertionError, match="Write the address of the project"):
        run_cell(address="")
    assert not noted
    results["git"] = (128, "fatal: repository not found")
    with pytest.raises(AssertionError, match="repository not found"):
        run_cell()
    results["git"] = (0, "")
    results[sys.executable] = (1, "Collecting torch\nERROR: No space left on device\n")
    with pytest.raises(UserError, match=r"could not install .* \(ERROR: No space left on device\); run this"):
        run_cell()
