"""The command line: every command, what its help says, and bad input in one sentence."""

import inspect
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from conftest import TINY

from ssepa_lib.cli import COMMANDS, main
from ssepa_lib.compose import load_recipe, save_recipe
from ssepa_lib.workbook.notebooks import discover


@pytest.fixture
def run(tiny, tmp_path, monkeypatch, capsys):
    """A small finished run, made by the command line itself."""
    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path / "results"))
    save_recipe(tiny("ssepa"), tmp_path / "small.yaml")
    assert main(["train", str(tmp_path / "small.yaml"), "--run", "mine"]) == 0
    assert "step 6/6" in capsys.readouterr().out
    return tmp_path / "results" / "small" / "mine"


def test_train_evaluate_predict_and_pseudo_labels(run, tmp_path, capsys):
    from PIL import Image

    from ssepa_lib.data.shapes import render_scene

    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {
        "cam",
        "aux_cam",
        "refined_cam",
        "pseudo_label",
        "segmentation",
    }
    assert all("seed 0" in line for line in lines)
    (tmp_path / "mine").mkdir()
    image, _ = render_scene("test", 0)
    Image.fromarray(image).save(tmp_path / "mine" / "a.png")
    out = tmp_path / "out"
    assert (
        main(
            [
                "predict",
                str(run),
                "--images",
                str(tmp_path / "mine"),
                "--out",
                str(out),
                "--test-time",
                "single",
            ]
        )
        == 0
    )
    with Image.open(out / "a.png") as mask:
        assert mask.size == image.shape[1::-1] and mask.mode == "P"
    assert main(["pseudo-labels", str(run), "--split", "val", "--out", str(tmp_path / "labels")]) == 0
    assert len(list((tmp_path / "labels").glob("*.png"))) == 4


def test_haaf_writes_its_table_and_figure(run, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert (
        main(["haaf", str(run), "--steps", "2", "--splits", "val", "--device", "cpu", "--out", str(out)]) == 0
    )
    assert "| HAAF, ncut" in capsys.readouterr().out
    assert (out / "haaf.csv").read_text().startswith("affinity,val,layer 0")
    assert (out / "haaf.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["train", "shapes/none_such"], "none_such"),
        (["train", "shapes/toco", "--set", "train.stepz=1"], "stepz"),
        (["train", "shapes/toco", "--set", "nonsense"], "NAME=VALUE"),
        (["evaluate", "nowhere"], "nowhere"),
        (["train", "voc/toco", "--set", "data.root=nowhere"], "nowhere"),
        (["predict", "nowhere", "--images", "x", "--out", "y"], "nowhere"),
        (["train", "voc/toco", "--set", "eval.scales=[1.0"], "eval.scales=[1.0"),
        (["submission", "new.tgz"], "--run RUN"),
        (["submission", "new.tgz", "--check"], "no-voc"),
        (["workbook", "--preset", "none_such"], "none_such"),
        (["workbook", "-p", "preset=voc_mini"], "--preset NAME"),
        (["workbook", "--only", "03", "-p", "fsr_steps=5"], "belongs to 06_ablations, not to 03_training"),
        (["workbook", "--only", "03", "-p", "overrides={optim.l: 1}"], "did you mean optim.lr?"),
        (["recipe", "--explain", "model.backbon"], "did you mean model.backbone?"),
        (["data", "voc", "sbd"], "data verify"),
        (["data", "mnist"], "mnist"),
        (["study", "shapes"], "study needs methods"),
        (["study", "shapes", "toco", "--seeds"], "seeds"),
        (["study", "shapes", "toco", "--processes", "0"], "must be 1 or more"),
        (["study", "shapes", "tocoo"], "no method 'tocoo'"),
        (["evaluat"], "did you mean evaluate?"),
        (["evaluate"], "RUN"),
        (["evaluate", "x", "--split"], "--split"),
        (["evaluate", "x", "--images", "many"], "many"),
        (["evaluate", "x", "--test-time", "crf"], "'crf'"),
        (["evaluate", "x", "--nonsense"], "--nonsense"),
        (["haaf", "x", "--device", "gpu"], "'gpu'"),
        (["haaf", "x", "--iterations", "0"], "--iterations is 0"),
        (["tables", "4"], "'4'"),
        (["bench", "--quick", "--full"], "--full"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path))
    monkeypatch.setenv("VOC_ROOT", str(tmp_path / "no-voc"))
    monkeypatch.setenv("SSEPA_WEIGHTS", str(tmp_path / "no-weights"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and word in error
    assert not list(tmp_path.rglob("weights.safetensors"))


@pytest.fixture
def voc_test(tmp_path):
    """A VOC folder whose split test lists one image."""
    from PIL import Image

    root = tmp_path / "voc"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "test.txt").write_text("one\n")
    Image.new("RGB", (4, 3)).save(root / "JPEGImages" / "one.jpg")
    return root


def test_submission_checks_an_archive(voc_test, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VOC_ROOT", str(voc_test))
    archive = tmp_path / "voc.tgz"
    assert main(["submission", str(archive), "--check"]) == 2
    assert f"{archive} is not a readable tar archive" in capsys.readouterr().err
    archive.write_bytes(b"no archive")
    assert main(["submission", str(archive), "--check"]) == 2
    assert f"{archive} is not a readable tar archive" in capsys.readouterr().err


def test_submission_reads_the_folder_of_the_run(voc_test, tmp_path, monkeypatch):
    import torch

    seen = []
    monkeypatch.setenv("VOC_ROOT", str(voc_test))
    monkeypatch.setattr(
        "ssepa_lib.evaluation.export_submission", lambda n, r, data, *_, **__: seen.append(data.images[0])
    )
    other = voc_test.rename(tmp_path / "other")
    for name, root, expected in (("voc", other, 0), ("voc", "", 2), ("folder", other, 2)):
        recipe = load_recipe(f"{name}/toco", {"data.root": str(root)})
        save_recipe(recipe, tmp_path / "mine" / "recipe.yaml")
        monkeypatch.setattr(
            "ssepa_lib.training.run.load_run", lambda *_, recipe=recipe: (torch.nn.Linear(1, 1), recipe)
        )
        assert main(["submission", "new.tgz", "--run", str(tmp_path / "mine")]) == expected
    assert seen == [other / "JPEGImages" / "one.jpg"]


def test_set_takes_lists_and_numbers_of_the_backbone(capsys):
    changes = [
        "eval.scales=[1.0, 2]",
        "model.backbone_args={depth: 4}",
        "model.backbone_args.mlp_ratio=2e0",
        "model.backbone_args.qkv_bias=false",
    ]
    assert main(["recipe", "voc/toco", *(f"--set={item}" for item in changes)]) == 0
    made = yaml.safe_load(capsys.readouterr().out)
    assert made["eval"]["scales"] == [1.0, 2.0]
    assert made["model"]["backbone_args"] == {"depth": 4, "mlp_ratio": 2.0, "qkv_bias": False}


def test_options_arrive(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "ssepa_lib.workbook.runner.run_workbook", lambda *given, yes: seen.update(workbook=(*given, yes))
    )
    options = [
        "--preset",
        "voc",
        "--only",
        "03",
        "--only",
        "04",
        "--from",
        "02",
        "-p",
        "seed=1",
        "-p",
        "a=[1, 2]",
    ]
    assert main(["workbook", *options]) == 0
    assert seen["workbook"] == ("voc", ["03", "04"], "02", {"seed": "1", "a": "[1, 2]"}, False)
    monkeypatch.setattr(
        "ssepa_lib.benchmarks.bench.run_suites", lambda *given, **named: seen.update(bench=(given, named))
    )
    assert main(["bench", "par", "crf", "--quick", "--device", "cpu"]) == 0
    assert seen["bench"] == ((["par", "crf"], None), {"quick": True, "full": False, "device": "cpu"})
    result = {"miou": {}, "setting": {}}
    monkeypatch.setattr(
        "ssepa_lib.evaluation.evaluate_run", lambda *given, **named: seen.update(evaluate=named) or result
    )
    assert main(["evaluate", "x", "--size", "0", "--test-time", "single", "ms_crf", "--images", "5"]) == 0
    assert seen["evaluate"]["size"] == 0 and seen["evaluate"]["test_time"] == ("single", "ms_crf")


def test_study_writes_its_tables(run, tiny, tmp_path, monkeypatch, capsys):
    def tiny_recipe(preset, method, *, steps, seed, device, changes):
        return replace(tiny(method, **{"train.seed": seed, **changes}), name=f"{preset}/{method}")

    monkeypatch.setattr("ssepa_lib.workbook.study.recipe_for", tiny_recipe)
    options = ["--seeds", "0", "1", "--splits", "val", "--device", "cpu", "--set", "train.steps=2"]
    options += ["--processes", "1"]
    assert main(["study", "shapes", "toco", "ssepa", "--run-name", "try", *options]) == 0
    out = capsys.readouterr().out
    assert ": mean ± sd, %" in out and "| ssepa − toco " in out and "toco-try-seed1" in out
    tables = tmp_path / "results" / "shapes" / "tables"
    assert (tables / "study-try.md").read_text() in out + "\n"
    assert len((tables / "study-try.csv").read_text().splitlines()) == 5


def test_recipe_prints_what_a_recipe_file_reads(tmp_path, capsys):
    assert main(["recipe", "voc/ssepa", "--set", "train.steps=7"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert main(["recipe", str(tmp_path / "again.yaml")]) == 0
    assert "steps: 7" in capsys.readouterr().out
    assert main(["recipe"]) == 0
    assert "ssepa_affinity" in capsys.readouterr().out


def test_recipe_explains(capsys):
    assert main(["recipe", "--explain", "model.backbone"]) == 0
    assert capsys.readouterr().out.startswith(
        "model.backbone: a name of letters, digits, '_', '-' and '.'\n  A timm model name"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "usage" in shown
    assert f"Example: python -m ssepa_lib {command}" in shown
    for name in inspect.signature(COMMANDS[command]).parameters.values():
        if name.kind is name.KEYWORD_ONLY and name.name not in ("changes", "start"):
            assert f"--{name.name.replace('_', '-')}" in shown


def test_help_lists_exit_codes_and_notebook_parameters(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {code} +\w", shown, re.M) for code in (0, 1, 2, 130, 143))
    with pytest.raises(SystemExit):
        main(["workbook", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for notebook in discover():
        for name, default in notebook.parameters.items():
            (line,) = [
                each
                for each in lines
                if each.startswith(f"  {name}={default!r} ")
                and notebook.comments[name] in each
                and notebook.name[:2] in each.rpartition("(")[2]
            ]
            assert notebook.comments[name]


def test_the_list_of_parts_has_whole_sentences(capsys):
    assert main(["recipe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 20 and all(line.endswith((".", ":")) for line in lines)
    (ssepa,) = [line for line in lines if line.split()[0] == "vit_small_depth8"]
    assert "MLP ratio 3" in ssepa and "Today's" not in ssepa


def test_a_scheduler_that_stops_a_run_leaves_no_lock(tmp_path):
    """SIGTERM, as at the end of a time limit: exit code 143, and the next call resumes."""
    changes = [f"--set={key}={value}" for key, value in TINY.items()]
    command = [sys.executable, "-m", "ssepa_lib", "train", "shapes/toco", *changes, "--set=train.steps=90000"]
    environment = {**os.environ, "SSEPA_RESULTS": str(tmp_path)}
    with subprocess.Popen([*command, "--yes"], env=environment, stdout=-1, text=True) as process:
        assert process.stdout.readline().startswith("step 1/90000")
        process.terminate()
        process.stdout.read()
    assert process.returncode == 143
    assert (tmp_path / "shapes" / "toco-seed0" / "history.csv").is_file() and not list(
        tmp_path.rglob(".lock")
    )


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"]])
def test_help_is_fast(arguments):
    def seconds():
        code = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)"
        )
        command = [sys.executable, "-c", code, sys.executable, "-m", "ssepa_lib", *arguments]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert min(seconds() for _ in range(3)) < 0.5
    loaded = "import sys; from ssepa_lib import cli; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert shown.stdout == "False False\n"


def test_studies_and_tables_work_where_there_is_no_notebook():
    """A machine that only trains has no JupyterLab."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('IPython', 'anywidget', 'ipywidgets', 'papermill')))\n"
        "import ssepa_lib.workbook.plan, ssepa_lib.workbook.queue, ssepa_lib.workbook.run_tables\n"
        "from ssepa_lib.cli import main; sys.exit(main(['tables', 'fsr', 'field']))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "| MCA or GAP? " in shown and "FSR's ablations: segmentation" in shown and "Table field" in shown


def test_verify_lists_what_is_missing(tmp_path, capsys):
    assert main(["data", "verify", "voc", "--root", str(tmp_path)]) == 1
    assert "missing: JPEGImages: 0 of 17125 found" in capsys.readouterr().out
