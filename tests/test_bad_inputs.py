"""The catalogue of bad inputs: every row of `bad_inputs.yaml` ends in one sentence and changes nothing.

A group of rows shares a command (`{value}` in it is the row's own part), prepared files and settings:

- `value`: what the row puts into the command;
- `file` with `content`, or `files`: what is written into the prepared folder beforehand; a content is a text,
  bytes (`!!binary`), null (the file is removed), `{folder: true}`, `{encoding: …, text: …}`,
  `{repeat: …, times: …}`, `{json: {dotted path: value}}` (a JSON file with values replaced; null removes) or
  `{make: name}` (a function below);
- `environment`: variables;
- `exit` (2 if not given) and `says`: the exit code and the words that the message must contain;
- `new`: files that may appear. Everything else, prepared or not, must be as before.
"""

import contextlib
import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ssepa_lib.cli import main
from ssepa_lib.compose import load_recipe, save_recipe
from ssepa_lib.data.coco import COCO_CLASSES

GROUPS = yaml.safe_load(Path(__file__).with_name("bad_inputs.yaml").read_text(encoding="utf-8"))
CASES = [{**group, **row} for group in GROUPS for row in group.get("rows", [{}])]
RUN = "results/shapes/toco-seed0"


def label(case):
    words = case["command"].replace("{value}", str(case.get("value", "")))
    return f"{words} {case.get('file', '')} {str(case.get('says'))[:40]}".replace("/", "|")


def voc(root):
    """Three images in the layout of VOC, one of them without a label (split test)."""
    lists = root / "ImageSets" / "Segmentation"
    for folder in (lists, root / "JPEGImages", root / "Annotations", root / "SegmentationClass"):
        folder.mkdir(parents=True)
    for split, name in {"train": "a", "val": "b", "test": "c"}.items():
        (lists / f"{split}.txt").write_text(f"{name}\n")
        Image.new("RGB", (32, 32), "grey").save(root / "JPEGImages" / f"{name}.jpg")
    for name in "ab":
        (root / "Annotations" / f"{name}.xml").write_text(
            "<annotation><object><name>cat</name></object></annotation>"
        )
        Image.fromarray(np.full((32, 32), 8, np.uint8)).save(root / "SegmentationClass" / f"{name}.png")


def own(root):
    """Two images of one's own, of the classes moth and bee, and a mask for each."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (32, 32), "grey").save(root / "images" / f"{name}.png")
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(root / "masks" / f"{name}.png")
    (root / "labels.csv").write_text("image,classes\na.png,moth\nb.png,bee\n")
    (root / "classes.txt").write_text("moth\nbee\n")


def coco(root):
    """One image with one object per split, as COCO 2014 describes it; nothing is painted yet."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2014").mkdir()
        name = f"COCO_{split}2014_000000000007.jpg"
        Image.new("RGB", (10, 8)).save(root / f"{split}2014" / name)
        thing = {"id": 1, "image_id": 7, "category_id": 1, "area": 4, "iscrowd": 0}
        thing["segmentation"] = [[0, 0, 2, 0, 2, 2, 0, 2]]
        content = {
            "images": [{"id": 7, "file_name": name, "height": 8, "width": 10}],
            "annotations": [thing],
            "categories": [{"id": i, "name": each} for i, each in enumerate(COCO_CLASSES, 1)],
        }
        (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """What every row begins with: three datasets, images, recipes, and a finished and measured run."""
    root = tmp_path_factory.mktemp("prepared")
    voc(root / "voc")
    own(root / "own")
    coco(root / "coco")
    shutil.copytree(root / "own" / "images", root / "photos")
    small = {**TINY, "train.steps": 2, "train.save_every": 2}
    save_recipe(load_recipe("shapes/toco", small), root / "small.yaml")
    save_recipe(
        load_recipe("shapes/toco", small | {"data.name": "folder", "data.root": "own"}), root / "own.yaml"
    )
    save_recipe(
        load_recipe("voc/toco", small | {"data.root": "voc", "data.train_split": "train"}), root / "voc.yaml"
    )
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSEPA_RESULTS", "results")
        save_recipe(load_recipe("shapes/toco", small), root / "shapes.yaml")
        assert main(["train", "shapes.yaml", "--run", "toco-seed0"]) == 0
        assert main(["evaluate", RUN, "--device", "cpu"]) == 0
    (root / RUN / "state.pt").unlink()  # large, and of no use to a finished run
    return root


def _weights(path, change):
    """Rewrite a weight file; `change` takes its tensors and metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state, metadata = change(load_file(path), metadata)
    save_file(state, path, metadata)


def int8(path):
    _weights(path, lambda state, info: ({k: v.to(torch.int8) for k, v in state.items()}, info))


def nonfinite(path):
    _weights(path, lambda state, info: ({k: v * float("nan") for k, v in state.items()}, info))


def another_shape(path):
    _weights(path, lambda state, info: (state | {"classifier.weight": torch.zeros(3, 5)}, info))


def one_tensor_less(path):
    _weights(path, lambda state, info: (dict(list(state.items())[1:]), info))


def classes_no_json(path):
    _weights(path, lambda state, info: (state, info | {"classes": "moth, bee"}))


def classes_no_list(path):
    _weights(path, lambda state, info: (state, info | {"classes": "5"}))


def classes_of_numbers(path):
    _weights(path, lambda state, info: (state, info | {"classes": "[1, 2, 3, 4]"}))


def classes_too_few(path):
    _weights(path, lambda state, info: (state, info | {"classes": '["moth"]'}))


def step_no_number(path):
    _weights(path, lambda state, info: (state, info | {"step": "many"}))


def no_metadata(path):
    _weights(path, lambda state, info: (state, None))


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def perturbed(path):
    _weights(path, lambda state, info: ({k: v + 0.1 for k, v in state.items()}, info))


class Surprise:
    """What a pickle of a stranger would do."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def _state(path, content):
    """An unfinished run whose checkpoint is a content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_recipe(load_recipe("small.yaml"), path.with_name("recipe.yaml"))
    torch.save(content, path)


def state_that_is_a_list(path):
    _state(path, [1, 2])


def state_without_weights(path):
    _state(path, {"index": 1})


def state_beyond_the_end(path):
    parts = dict.fromkeys(("network", "optimizer", "scheduler", "objectives"), {})
    _state(path, {"index": 99, **parts})


def state_of_other_weights(path):
    parts = dict.fromkeys(("network", "optimizer", "scheduler", "objectives"), {"x": torch.zeros(2)})
    _state(path, {"index": 1, **parts})


def state_that_runs_code(path):
    _state(path, {"index": Surprise()})


def state_cut_short(path):
    _state(path, {"index": 1, "network": torch.zeros(1000)})
    half(path)


MAKERS = {f.__name__.replace("_", " "): f for f in list(globals().values()) if callable(f)}


def write(path, content):
    """Bring one file of a row into the prepared folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8", newline="")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif "folder" in content:
        path.unlink(missing_ok=True)
        path.mkdir()
    elif "encoding" in content:
        path.write_bytes(content["text"].encode(content["encoding"]))
    elif "repeat" in content:
        path.write_text(content["repeat"] * content["times"] + content.get("end", ""))
    elif "json" in content:
        edit_json(path, content["json"])
    else:
        MAKERS[content["make"]](path)


def edit_json(path, changes):
    """Replace values of a JSON file by their dotted paths; a value of `remove` takes the entry out."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
        holder = content
        for part in parents:
            holder = holder[part]
        if value == "remove":
            del holder[last]
        else:
            holder[last] = value
    path.write_text(json.dumps(content))


def snapshot(root):
    """What lies below a folder: small files by content, large ones by size and time."""
    found = {}
    for path in sorted(root.rglob("*")):
        name, facts = path.relative_to(root).as_posix(), path.lstat()
        if path.is_dir():
            found[name] = "folder"
        else:
            small = facts.st_size < 100_000
            found[name] = path.read_bytes() if small else (facts.st_size, facts.st_mtime_ns)
    return found


def restore(pristine, root):
    """Make a folder as it was prepared."""
    before, now = snapshot(pristine), snapshot(root)
    for name in sorted(now.keys() | before.keys(), reverse=True):
        path = root / name
        if name in now and now[name] != before.get(name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in sorted(before):
        path = root / name
        if not path.exists():
            path.mkdir() if before[name] == "folder" else shutil.copy2(pristine / name, path)


def run(words, process):
    """Exit code and standard error of a command, in this process or in one of its own."""
    if process:
        done = subprocess.run([sys.executable, "-m", "ssepa_lib", *words], capture_output=True, text=True)
        return done.returncode, done.stderr, done.stdout
    said, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
        code = main(words)
    return code, said.getvalue(), shown.getvalue()


@pytest.fixture(scope="session")
def copied(prepared, tmp_path_factory):
    """A copy of what is prepared, to be restored before every row."""
    root = tmp_path_factory.mktemp("rows") / "work"
    shutil.copytree(prepared, root)
    return root


@pytest.mark.parametrize("case", CASES, ids=label)
def test_bad_input(case, prepared, copied, monkeypatch):
    restore(prepared, copied)
    monkeypatch.chdir(copied)
    for name in ("VOC_ROOT", "COCO_ROOT", "FOLDER_ROOT", "SSEPA_WEIGHTS"):
        monkeypatch.setenv(name, str(copied / "nothing"))
    monkeypatch.setenv("SSEPA_RESULTS", str(copied / "results"))
    for name, value in case.get("environment", {}).items():
        monkeypatch.setenv(name, str(value))
    files = {case["file"]: case.get("content")} if "file" in case else case.get("files", {})
    for name, content in files.items():
        write(copied / name, content)
    before = snapshot(copied.parent)
    words = shlex.split(case["command"].replace("{value}", str(case.get("value", ""))))
    code, said, shown = run(words, case.get("process"))
    assert code == case.get("exit", 2), said + shown
    assert "Traceback" not in said + shown
    expected = [case["says"]] if isinstance(case["says"], str) else case["says"]
    assert all(word in said + shown for word in expected), said + shown
    if code == 2:
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and said.endswith(f"{lines[0]}\n") and len(lines[0]) < 700, said
    after = snapshot(copied.parent)
    allowed = tuple(f"work/{name}" for name in case.get("new", ()))
    changed = [name for name in after if name not in before and not name.startswith(allowed or ("//",))]
    changed += [name for name in before if after.get(name) != before[name]]
    assert not changed


def test_the_catalogue_is_large_and_covers_every_command():
    from ssepa_lib.cli import COMMANDS

    assert len(CASES) >= 150
    assert {case["command"].split()[0] for case in CASES} >= set(COMMANDS)
