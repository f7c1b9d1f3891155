"""What is going to be trained: its cost, measured and estimated times, and what has to be confirmed."""

import sys

import pytest
import torch
from conftest import TINY
from test_pyramid import MEAN, SWIN
from test_step import EXPECTED, UNCERTAIN

from ssepa_lib.cli import main
from ssepa_lib.compose import load_recipe, save_recipe
from ssepa_lib.errors import UserError
from ssepa_lib.model.backbone import build_backbone
from ssepa_lib.training import train
from ssepa_lib.workbook import plan
from ssepa_lib.workbook.ablations import FSR_ARMS
from ssepa_lib.workbook.notebooks import discover
from ssepa_lib.workbook.queue import Job
from ssepa_lib.workbook.study import recipe_for, run_folder

SLOW = 5e10  # operations per second of a small CPU


@pytest.fixture
def slow_cpu(tmp_path, monkeypatch):
    """A machine of known speed, with an empty folder of results and without anybody at the terminal."""
    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(plan, "seconds_per_step", lambda recipe, cost: cost.flops / SLOW)
    monkeypatch.setattr(plan, "_on_gpu", lambda recipe: False)
    for module in ("ssepa_lib.data", "ssepa_lib.workbook.runner"):
        monkeypatch.setattr(f"{module}.build_dataset", lambda *_: None)
    monkeypatch.setattr("ssepa_lib.workbook.study.require_scoring", lambda *_: None)
    return tmp_path / "results"


def job_of(name, **changes):
    preset, method = name.split("/")
    return Job(recipe_for(preset, method, device="cpu", changes=changes), run_folder(preset, method), {})


def test_the_cost_of_a_step_by_hand(tiny):
    """32² pixels in patches of 8: 17 tokens; four blocks of width 32 have 4·12·32² weights in matrices.

    The image itself at scale 1 is a pass of its own with FSR alone, whose drop path changes the training
    pass.
    """

    def forward(tokens):
        return 2 * 4 * 12 * 32**2 * tokens + 4 * tokens**2 * 32 * 4

    maps = forward(17) + 2 * (forward(5) + forward(37))  # the flip; scales 0.5 and 1.5 with flip
    toco = 3 * forward(17) + maps + 3 * forward(17) + 3 * 3 * forward(5)  # crop, maps, second view, local
    cost = plan.step_cost(tiny("toco"))
    assert cost.flops == 2 * toco and cost.shape == (34, 32)
    fsr = plan.step_cost(tiny("fsr")).flops
    without = {17: 16, 5: 4, 37: 36}  # FSR drops the class token
    maps = 2 * sum(forward(n) for n in without.values())
    assert fsr == 2 * (3 * forward(16) + maps + 3 * forward(16) + 2 * forward(16) + maps)


@pytest.mark.parametrize("method", ["toco", "ssepa", "afa", "fsr"])
def test_the_passes_are_those_that_a_step_makes(tiny, method):
    """The table of tests/test_step.py, which watches the network: (images, side, with gradient)."""
    recipe = tiny(method)
    forward = build_backbone(recipe.model).flops
    passes = EXPECTED[method] + (UNCERTAIN if method == "fsr" else [])
    expected = sum(n * forward(side, side) * (3 if gradient else 1) for n, side, gradient in passes)
    assert plan.step_cost(recipe).flops == pytest.approx(expected, rel=1e-12)


def test_settings_add_and_remove_passes(tiny):
    """An averaged network encodes the image itself, equivariance a copy; random masks need no maps; the
    masked views of MCC show a twentieth of 16 patches, one."""

    def flops(method="toco", **changes):
        return plan.step_cost(tiny(method, **changes)).flops

    plain, forward = flops(), build_backbone(tiny().model).flops
    assert flops(**{"cam.teacher_momentum": 0.5}) - plain == 2 * forward(32, 32)
    assert flops("ssepa", **{"affinity.haaf_objective": "equivariance"}) - plain == 2 * forward(44, 44)
    assert flops("mcc") - plain == 3 * 2 * 3 * (forward(8, 8) - forward(16, 16))
    without = build_backbone(tiny("fsr").model).flops
    maps = sum(n * without(side, side) for n, side, _ in UNCERTAIN)
    assert flops("fsr") - flops("fsr", **{"reinforce.selection": "random"}) == maps


def test_the_grid_of_a_pyramid_is_its_own(tiny):
    """44 pixels in patches of 4 are 11 rows, but the last stage merges two: 12 (of a width of 32)."""
    recipe = tiny("ssepa", **SWIN, **MEAN, **{"data.crop": 44, "data.eval_size": 44})
    assert plan.step_cost(recipe).shape == (2 * 12 * 12, 32)


FROZEN = {"data.train_images": 8, "train.steps": 100}  # four steps see every view


def test_a_frozen_backbone_encodes_every_view_once(tiny):
    """Two passes of 17 tokens, and a decoder of 9·32·512 + 9·512² + 2·512 weights at every step."""
    recipe = tiny("ssepa_plus+frozen", **FROZEN)
    cost, forward = plan.step_cost(recipe), build_backbone(recipe.model).flops(32, 32)
    assert cost.flops == 2 * 2 * forward
    assert cost.decoder == 3 * 2 * 2 * 17 * (9 * 32 * 512 + 9 * 512**2 + 2 * 512)
    decoder = 100 * cost.decoder / cost.flops

    def encoded(images=8, steps=100, **changes):
        return plan.full_steps(tiny("ssepa_plus+frozen", **FROZEN, **changes), cost, steps, images) - decoder

    assert encoded() == pytest.approx(4) and encoded(None) == pytest.approx(4), "images are counted"
    assert encoded(**{"data.fixed_views": 3}) == pytest.approx(12)
    assert encoded(1000) == encoded(0) == pytest.approx(100), "more than the run ever sees, and unknown"
    for forgetful in ({"model.cache_gb": 0}, {"data.fixed_views": 0}):
        assert encoded(**forgetful) == pytest.approx(100)
    assert plan.full_steps(tiny("ssepa_plus", **{"train.steps": 7}), cost, 7) == 7


def test_the_features_of_a_frozen_backbone_are_counted_as_they_are_kept(tiny, trainer_for):
    recipe = tiny("ssepa_plus+frozen", **{**FROZEN, "train.steps": 8, "losses.segmentation_start": 0.0})
    trainer, batches = trainer_for(recipe)
    for batch in batches:
        trainer.step(batch)
    kept, cost = trainer.network.backbone.cache.used, plan.step_cost(recipe)
    assert kept == pytest.approx(8 * cost.features, rel=0.1)
    half = tiny("ssepa_plus+frozen", **FROZEN, **{"model.cache_gb": 4 * cost.features / 1e9})
    encoded = plan.full_steps(half, cost, 100, 8) - 100 * cost.decoder / cost.flops
    assert encoded == pytest.approx(4 + 96 / 2), "what has no room is encoded again"


def test_a_frozen_run_is_planned_by_what_it_encodes(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "seconds_per_step", lambda recipe, cost: 1.0)
    recipe = tiny("ssepa_plus+frozen", **FROZEN)
    (planned,) = plan.plan([Job(recipe, tmp_path / "a-seed0", {})])
    cost = plan.step_cost(recipe)
    assert planned.seconds == pytest.approx(4 + 100 * cost.decoder / cost.flops)


def test_plain_recipes_take_as_long_as_measured(monkeypatch):
    """On one core: 0.35 s for a step of shapes/ssepa, 1.9 s of voc_mini/ssepa in bfloat16 without AMX."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for name, kind, seconds in (("shapes/ssepa", "fp32", 0.350), ("voc_mini/ssepa", "bf16", 1.934)):
        recipe = load_recipe(name, {"train.device": "cpu", "model.weights": "none"})
        monkeypatch.setattr(plan, "precision", lambda *_, kind=kind: kind)
        found = plan.seconds_per_step(recipe, plan.step_cost(recipe))
        assert found == pytest.approx(seconds, rel=0.02), name


def test_a_published_step_costs_about_nine_tera_operations():
    cost = plan.step_cost(load_recipe("voc/ssepa"))
    assert 8e12 < cost.flops < 10e12 and 1.3e9 < cost.disk < 1.5e9


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(40, "40 s"), (100, "2 min"), (5000, "83 min"), (9000, "2.5 h"), (4.6 * 86400, "4.6 days")],
)
def test_durations_are_short(seconds, text):
    assert plan.duration(seconds) == text


def test_times_are_measured_where_a_like_run_is_there(tiny, tmp_path):
    finished = Job(tiny("toco"), tmp_path / "toco-seed0", {})
    train(finished.recipe, finished.folder)
    (finished.folder / "history.csv").write_text("step,seconds\n6,12.0\n")
    other = Job(tiny("toco", **{"train.seed": 1, "train.steps": 50}), tmp_path / "toco-seed1", {})
    new = Job(tiny("ssepa"), tmp_path / "ssepa-seed0", {})
    again = Job(tiny("ssepa"), tmp_path / "again-seed0", {})
    planned = plan.plan([finished, other, new, again])
    assert [each.source for each in planned] == ["finished", "measured", "estimated"], "every recipe once"
    assert planned[0].seconds == 0 and planned[1].seconds == 100 and 0 < planned[2].seconds < 60
    text = plan.describe(planned)
    assert "already finished" in text and "50 steps of 2, seed 1" in text and "about 2 min (measured)" in text
    assert "2 runs to train: about" in text
    (other.folder / "state.pt").parent.mkdir()
    save_recipe(other.recipe, other.folder / "recipe.yaml")
    (other.folder / "state.pt").touch()
    (other.folder / "history.csv").write_text("step,seconds\n40,80.0\n")
    assert plan.plan([other])[0].seconds == 20, "the steps that an interrupted run has done are not repeated"
    elsewhere = Job(finished.recipe, tmp_path / "other-seed0", {})
    assert plan.plan([elsewhere])[0].source == "finished"
    assert plan.plan([elsewhere], beside=False)[0].source == plan.plan([finished], anew=True)[0].source
    assert plan.plan([finished], anew=True)[0].seconds == 12


def test_full_size_without_a_gpu_needs_a_yes_and_small_recipes_do_not(slow_cpu, monkeypatch):
    for name in ("shapes/ssepa", "voc_mini/fsr", "folder/ssepa"):
        plan.confirm(plan.plan([job_of(name)]), yes=False)
    full = plan.plan([job_of("voc/ssepa")])
    with pytest.raises(
        UserError, match=r"without a GPU, voc/ssepa would take about 39\.\d days .*voc_mini.*--yes"
    ):
        plan.confirm(full, yes=False)
    plan.confirm(full, yes=True)
    monkeypatch.setattr(plan, "_on_gpu", lambda recipe: True)
    plan.confirm(full, yes=False)
    with pytest.raises(UserError, match="training would take about"):
        plan.confirm(full, yes=False, limit=plan.LONG)


@pytest.mark.parametrize(("answer", "starts"), [("y", True), ("Yes", True), ("", False), ("n", False)])
def test_a_terminal_may_answer(slow_cpu, monkeypatch, answer, starts):
    asked = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answer)
    full = plan.plan([job_of("voc/ssepa")])
    if starts:
        plan.confirm(full, yes=False)
    else:
        with pytest.raises(UserError, match="nothing was started"):
            plan.confirm(full, yes=False)
    assert len(asked) == 1 and asked[0].startswith("Without a GPU, voc/ssepa") and "[y/N]" in asked[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "voc/ssepa"],
        ["study", "voc", "ssepa", "toco"],
        ["workbook", "--preset", "voc", "--only", "03"],
    ],
)
def test_nobody_starts_weeks_of_training_by_accident(slow_cpu, arguments, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "days on this machine" in shown.err
    assert "voc_mini" in shown.err and "--yes" in shown.err
    assert not list(slow_cpu.rglob("recipe.yaml"))


def test_the_workbook_says_what_it_trains_before_it_asks(slow_cpu, monkeypatch, capsys):
    long = ["workbook", "--only", "03", "-p", "methods=toco", "-p", "steps=20000"]
    assert main(long) == 2
    shown = capsys.readouterr()
    assert (
        "toco-seed0" in shown.out
        and "20000 steps of 4, seed 0" in shown.out
        and "2 runs to train" in shown.out
    )
    assert "training would take about" in shown.err and "--yes" in shown.err
    seen = []
    monkeypatch.setattr("ssepa_lib.workbook.runner._run_all", lambda *_: seen.append("ran") or {})
    assert main([*long, "--yes"]) == 0 and main(["workbook", "--only", "03"]) == 0 and len(seen) == 2


def test_all_notebooks_together_train_four_full_runs():
    jobs = []
    for notebook in discover():
        jobs += plan.notebook_jobs(notebook.trains, notebook.parameters | {"preset": "voc"})
    full = [job for job in jobs if job.recipe.train.steps == 20_000]
    assert len({job.recipe.hash() for job in full}) == 4
    names = {job.folder.name for job in full}
    assert {"toco-seed0", "ssepa_affinity-seed0"} <= names and "fsr-unc-only-seed0" not in names, (
        "FSR's arms are off"
    )


def test_the_runs_of_a_notebook_follow_its_parameters():
    entry = {"methods": "methods", "seeds": "fsr_seeds", "steps": 7, "arms": "questions"}
    values = {"preset": "shapes", "methods": "fsr", "fsr_seeds": [0, 2], "questions": ["terms", "views"]}
    values |= {"run_name": "try", "overrides": {"optim.lr": 1e-3}}
    jobs = plan.notebook_jobs([entry], values)
    assert len(jobs) == 2 * (len(FSR_ARMS["terms"]) + len(FSR_ARMS["views"]))
    assert {(job.recipe.train.steps, job.recipe.optim.lr) for job in jobs} == {(7, 1e-3)}
    assert jobs[1].folder.name == "fsr-try-unc-only-seed0" and jobs[1].recipe.losses.cer == 0
    with pytest.raises(UserError, match="no FSR ablation 'maskratio'; choose among terms"):
        plan.notebook_jobs([entry], values | {"questions": ["maskratio"]})
    assert plan.notebook_jobs([entry], values | {"questions": []}) == [], "not even the recipe itself"


def test_missing_runs_have_a_command_and_a_time(slow_cpu, monkeypatch):
    jobs = [job_of("voc/toco"), job_of("voc/ssepa")]
    said = plan.remedy(jobs, "make it")
    assert said.startswith("Missing: toco-seed0, ssepa-seed0. `make it` trains what is missing, in about ")
    assert " days on " in said
    monkeypatch.setattr(plan.RunFolder, "is_finished", lambda *_: True)
    assert plan.remedy(jobs, "make it") == ""


def test_an_override_is_checked_before_anything_runs(slow_cpu, capsys):
    def error(overrides, *more):
        assert main(["workbook", "--only", "03", "-p", f"overrides={overrides}", *more]) == 2
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1 and not slow_cpu.exists()
        return shown.err

    assert "there is no setting model.backbon" in error('{"model.backbon": "x"}')
    assert "optim.lr is" in error("{optim.lr: fast}")
    assert "must be of type dict" in error("5")
    assert "must be of type dict" in error("{optim.lr")
    assert "there is no method 'tocoo'" in error("{optim.lr: 1e-4}", "-p", "methods=tocoo")


def test_an_override_of_finished_runs_asks_for_another_name(slow_cpu, capsys):
    small = {**TINY, "train.steps": 2}
    recipe = recipe_for("shapes", "toco", device="cpu", changes=small)
    train(recipe, run_folder("shapes", "toco"))
    assert main(["workbook", "--only", "03", "-p", "methods=toco", "-p", "overrides={optim.lr: 1e-5}"]) == 2
    assert "toco-seed0 holds a run of another recipe; choose another run name" in capsys.readouterr().err
