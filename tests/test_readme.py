"""What the documents say is true: every command is parsed as its program does and, where it can, run tiny."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
import yaml
from conftest import TINY
from test_project import DOCUMENTS, LAYERS, LIBRARY, prose

from ssepa_lib import cli
from ssepa_lib.compose import load_recipe
from ssepa_lib.paths import PROJECT, RECIPES
from ssepa_lib.workbook import notebooks, runner

README = (PROJECT / "README.md").read_text()
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
PROGRAMS = ("make", "python", "papermill", "torchrun", "conda", "source", "sbatch", "pre-commit")
MAKE = shutil.which("make")


def blocks(text, language):
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text):
    """Every command in the bash blocks and in inline code, as (environment, words)."""
    text = text.replace("$SLURM_ARRAY_TASK_ID", "1")
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", "").splitlines()]
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", outside)]
    starts = tuple(f"{program} " for program in PROGRAMS)
    lines += [code for code in inline if code.startswith(starts) or " make " in code]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            part, words = words[:end], words[end + 1 :]
            variables = [word for word in part if re.match(r"[A-Z_]+=", word)]
            start = next(i for i, word in enumerate(part) if word not in variables or part[0] == "make")
            yield dict(v.split("=", 1) for v in variables), part[start:]


def of_the_library(words):
    """The arguments behind `-m ssepa_lib`, also where torchrun starts it or make passes them on."""
    if words[0] == "torchrun":
        from torch.distributed.run import parse_args

        given = parse_args(words[1:])
        assert given.module and given.training_script == "ssepa_lib"
        return given.training_script_args
    if words[0] == "make" and words[1] in ("workbook", "tour", "lesson"):
        passed = [shlex.split(word.partition("=")[2]) for word in words if word.startswith("ARGS=")]
        return ["lesson" if words[1] == "lesson" else "workbook", *sum(passed, [])]
    return words[3:] if words[:3] == ["python", "-m", "ssepa_lib"] else None


FOUND = [(path, *found) for path in DOCUMENTS for found in commands(path.read_text())]
NAMES = [f"{path.parent.name}/{path.name}: {' '.join(words)}" for path, _, words in FOUND]


def check_notebooks(preset, only, start, parameters, *, yes):
    """What `run_workbook` refuses before anything runs, but for the data."""
    assert (RECIPES / "data" / f"{preset}.yaml").is_file()
    chosen = notebooks.select(notebooks.discover(), only, start)
    assert chosen and notebooks.check_parameters(chosen, {**parameters, "preset": preset})
    return 0


def check_papermill(words):
    from papermill.__main__ import papermill

    given = papermill.make_context("papermill", list(words)).params
    notebook = next(n for n in notebooks.discover() if n.path == PROJECT / given["notebook_path"])
    values = dict(given["parameters"])
    for text in given["parameters_yaml"]:
        values |= yaml.safe_load(text)
    for name, value in values.items():
        notebooks.coerce(name, value, notebook.parameters[name])
    assert not isinstance(notebook.parameters["methods"], str) and isinstance(values["methods"], list)


@pytest.mark.parametrize(("path", "variables", "words"), FOUND, ids=NAMES)
def test_every_command_is_one(path, variables, words, monkeypatch):
    """Its program accepts it: make has the target, the library's parser and papermill take the arguments."""
    program = words[0]
    assert program in PROGRAMS
    known = {"ARGS", "LOCK", "PORT", "PYTHON", "FOLDER_ROOT", "VOC_ROOT"}
    assert set(variables) <= known
    if program == "make":
        targets = re.findall(r"^([a-z]+):.*##", (PROJECT / "Makefile").read_text(), re.M)
        assert [word for word in words[1:] if "=" not in word][0] in targets
    if program == "papermill":
        check_papermill(words[1:])
    if program == "conda" and "activate" in words:
        assert words[-1] == yaml.safe_load((PROJECT / "environment.yml").read_text())["name"]
    if program == "python" and words[1] != "-m":
        assert (PROJECT / words[1]).is_file()
    arguments = of_the_library(words)
    if arguments and "--help" not in arguments:
        bound = cli.parse(arguments[0], arguments[1:])
        if arguments[0] == "workbook":
            monkeypatch.setattr(runner, "run_workbook", check_notebooks)
            assert bound() == 0


def tiny_recipe(name, overrides=None):
    """The recipe that was asked for, made small, on your own images or else on built-in ones."""
    if name.endswith(".yaml"):
        return load_recipe(name, overrides)
    load_recipe(name, overrides)
    small = TINY | {"train.steps": 2}
    if not name.startswith("folder/"):
        small |= {"data.name": "shapes", "data.train_split": "train", "data.measured_train": ""}
    return load_recipe(name, {**(overrides or {}), **small})


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, with some images of one's own, where every recipe is small."""
    from PIL import Image

    from ssepa_lib.data.images import write_mask
    from ssepa_lib.data.shapes import render_scene

    (tmp_path / "my_data" / "images").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        image, mask = render_scene("test", i)
        Image.fromarray(image).save(tmp_path / "my_data" / "images" / f"{i}.png")
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.jpg")
        write_mask(tmp_path / "my_data" / "masks" / f"{i}.png", mask.clip(0, 2))
    rows = "".join(f"{i}.png,{'moth' if i % 2 else 'bee;moth'}\n" for i in range(4))
    (tmp_path / "my_data" / "labels.csv").write_text(f"image,classes\n{rows}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr("ssepa_lib.compose.load_recipe", tiny_recipe)
    monkeypatch.setattr("ssepa_lib.workbook.study.load_recipe", tiny_recipe)
    monkeypatch.setattr("ssepa_lib.data.prepare", lambda name, *_: SimpleNamespace(message=name))
    monkeypatch.setattr("ssepa_lib.benchmarks.gpu.run_gpu", lambda *_, **__: 0)
    monkeypatch.setattr(runner, "run_workbook", check_notebooks)
    return tmp_path


def test_the_readme_runs_from_top_to_bottom(workplace, capsys):
    """Small networks, few images, one seed; notebooks, downloads and the GPU command are only checked."""
    from ssepa_lib.labels.crf import crf_available

    shorter = {
        "study": {"seeds": (0,), "splits": ("val",), "processes": 1},
        "haaf": {"steps": 2, "splits": ("val",)},
    }
    for _, words in commands(README.replace("/path/to", str(workplace))):
        name, *arguments = of_the_library(words) or [None]
        if name is None or "--help" in arguments:
            continue
        if not crf_available():
            arguments = [word for word in arguments if word != "ms_crf"]
        bound = cli.parse(name, arguments)
        bound.keywords.update(shorter.get(name, {}))
        assert not bound(), words
    shown = capsys.readouterr().out
    assert "paired differences, points of mIoU" in shown and "| ssepa − toco " in shown
    assert "Table 3" in shown and "native size" in shown
    assert (
        len(list((workplace / "masks").glob("*.png"))) == len(list((workplace / "labels").glob("*.png"))) == 4
    )
    results = workplace / "results"
    runs = {str(path.parent.relative_to(results)) for path in results.rglob("weights.safetensors")}
    assert {"voc/ssepa-seed0", "voc/toco-seed0", "folder/ssepa-seed0", "voc_mini/fsr+ssepa-seed0"} <= runs


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_python_examples_print_what_they_say(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.M)
    assert expected and capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("script", [block for block in blocks(README, "bash") if block.startswith("#!")])
def test_scripts_are_bash(script):
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def anchors(path):
    """The anchors of a document's headings, as a forge derives them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s:]+)\)", path.read_text()):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for module in re.findall(r"`(?:ssepa_lib/)?([\w/]+\.py)`", path.read_text()):
        there = [*LIBRARY.rglob(module), *PROJECT.glob(module)]
        assert there, f"{path.name} names {module}, which is not there"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_documents_speak_in_todays_words(path):
    """Old names of settings and options occur in the changelog alone; lines other than tables fit."""
    old = r"--ms\b|--crf\b|--inference|--propagate|\bssepa_fsr\b|losses\.switch|haaf_fused|affinity\.steps"
    if path.name != "CHANGELOG.md":
        assert not re.findall(old, prose(path))
    long = [line for line in path.read_text().splitlines() if len(line) > 120 and line[0] not in "|!"]
    assert not long


def test_the_readme_lists_every_method_folder_and_notebook():
    for method in (RECIPES / "method").glob("*.yaml"):
        assert f"| `{method.stem}` |" in README
    assert not [name for name in LAYERS if f"`{name}/`" not in README]
    assert {9: "Nine", 10: "Ten"}[len(notebooks.discover())] + " notebooks follow" in README
    assert not [n.name for n in notebooks.discover() if f"(notebooks/{n.path.name})" not in README]


def test_versions_agree():
    version = PYPROJECT["version"]
    assert yaml.safe_load((PROJECT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## (.*)$", (PROJECT / "CHANGELOG.md").read_text(), re.M)[1] == version


def test_the_lock_names_every_dependency_and_no_host():
    lock = (PROJECT / "requirements.lock").read_text()
    assert "://" not in lock and "--" not in lock
    pinned = set(re.findall(r"^([\w-]+)==", lock, re.M))
    wanted = sum(PYPROJECT["optional-dependencies"].values(), PYPROJECT["dependencies"])
    assert {re.match(r"[\w-]+", line)[0] for line in wanted} <= pinned


def make(*words, **variables):
    """Run make in this environment as if it were set up."""
    ready = os.path.join(sys.prefix, ".ssepa-workbook")
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "CONDA_DEFAULT_ENV": "", **variables}
    command = [MAKE, "-o", ready, *words]
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # of the make that runs the tests: it would print more
        environment.pop(name, None)
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(MAKE is None, reason="make is not installed")
def test_make_targets():
    shown = make("help").stdout
    for target in ("setup", "workbook", "tour", "lesson", "lab", "test", "soak", "lint", "format", "lock"):
        assert f"make {target} " in shown and make("-n", target).returncode == 0
    assert "workbook --only 00" in make("-n", "tour").stdout
    assert ("--allow-root" in make("-n", "lab").stdout) == (os.getuid() == 0)


@pytest.mark.skipif(MAKE is None, reason="make is not installed")
def test_a_busy_port_ends_the_lab_in_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = make("lab", f"PORT={port}")
    assert done.returncode and not done.stdout
    assert done.stderr.splitlines()[0].startswith(f"Port {port} is busy") and "make lab PORT=" in done.stderr
