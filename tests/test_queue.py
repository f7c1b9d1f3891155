"""The queue of a study: shards, workers, claimed runs, and what is shown meanwhile."""

import subprocess
import sys
import threading
from dataclasses import replace
from multiprocessing import Pipe

import pytest
from conftest import TINY

from ssepa_lib.cli import main
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.evaluate import evaluate_run, stored_result
from ssepa_lib.files import FolderLock
from ssepa_lib.training import RunFolder, train
from ssepa_lib.training.run import find_run
from ssepa_lib.workbook import queue
from ssepa_lib.workbook.progress import StudyDisplay, bars

SPLITS = {"val": {"images": 2, "outputs": ("cam",)}}


@pytest.fixture
def job_of(tiny, tmp_path):
    """Factory of jobs of two steps: `job_of("toco", seed=1, name="mine")`."""

    def make(method="toco", seed=0, name=None, **changes):
        recipe = tiny(method, **{"train.steps": 2, "train.seed": seed, **changes})
        return queue.Job(recipe, tmp_path / "runs" / (name or f"{method}-seed{seed}"), SPLITS)

    return make


def trained(folder):
    """The names of the run folders with weights below a folder."""
    return sorted(path.parent.name for path in folder.rglob("weights.safetensors"))


@pytest.mark.parametrize("text", ["0/2", "3/2", "-1/2", "1/0", "1", "a/b", "1/2/3", ""])
def test_a_shard_that_does_not_exist_is_refused_in_one_sentence(text, capsys):
    assert main(["study", "shapes", "toco", f"--shard={text}"]) == 2
    error = capsys.readouterr().err
    assert f"no shard '{text}'; write I/N with I from 1 to N" in error and error.count("\n") == 1


def test_shards_divide_the_recipes_and_keep_equal_ones_together(job_of):
    jobs = {(m, s): job_of(m, s) for s in range(3) for m in ("toco", "ssepa_no_affinity", "ssepa")}
    shares = [queue.share(jobs, (i, 4)) for i in (1, 2, 3, 4)]
    assert sorted(key for each in shares for key in each) == sorted(jobs)
    for seed in range(3):  # ToCo under another name
        assert [("toco", seed) in each for each in shares] == [
            ("ssepa_no_affinity", seed) in each for each in shares
        ]
    sizes = [len({job.recipe.hash() for job in each.values()}) for each in shares]
    assert sorted(sizes) == [1, 1, 2, 2]


def test_two_shards_at_once_train_every_run_once(tmp_path, monkeypatch, capsys):
    """Two processes share a folder of results; the table is made once all runs are there."""
    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path))
    small = {**TINY, "train.steps": 2, "data.val_images": 2}
    changes = [f"--set={key}={value}" for key, value in small.items() if key != "train.device"]
    options = ["toco", "ssepa_no_affinity", "ssepa", "--seeds", "0", "--splits", "val", "--device", "cpu"]
    command = ["study", "shapes", *options, *changes, "--processes", "1"]
    shards = [
        subprocess.Popen(
            [sys.executable, "-m", "ssepa_lib", *command, "--shard", f"{i}/2"], stdout=-1, text=True
        )
        for i in (1, 2)
    ]
    first, second = (shard.communicate(timeout=300)[0] for shard in shards)
    assert [shard.returncode for shard in shards] == [0, 0]
    assert "[2/2] ssepa_no_affinity-seed0: done (the run of toco-seed0)" in first
    assert "[1/1] ssepa-seed0: done" in second and "toco" not in second.partition("##")[0]
    assert trained(tmp_path) == ["ssepa-seed0", "toco-seed0"] and not list(tmp_path.rglob("*.lock"))
    assert any("| ssepa − toco " in out for out in (first, second)), "the last has the table"
    files = [path for name in ("weights.safetensors", "metrics.json") for path in tmp_path.rglob(name)]
    before = [path.stat().st_mtime_ns for path in files]
    assert main(command) == 0
    assert [path.stat().st_mtime_ns for path in files] == before and len(files) == 4
    assert "| ssepa − toco " in capsys.readouterr().out


def test_a_shard_says_what_is_still_to_come(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path))
    monkeypatch.setattr("ssepa_lib.workbook.study.load_recipe", lambda name, _: tiny(name.split("/")[1]))
    monkeypatch.setattr(
        "ssepa_lib.workbook.study.run_jobs", lambda jobs, *_: [queue.Outcome("x", {})] * len(jobs)
    )
    command = ["study", "shapes", "toco", "ssepa", "fsr", "--seeds", "0", "--shard", "2/3"]
    assert main(command) == 0
    assert "Shard 2/3 is done; 3 runs are still missing" in capsys.readouterr().out


def test_workers_do_all_jobs_and_report_a_failed_one(job_of, tmp_path):
    """Two processes; the job without data fails in a sentence and does not stop the other two."""
    events = []
    broken = job_of("toco", 5, **{"data.name": "voc", "data.root": str(tmp_path / "nowhere")})
    jobs = [job_of("toco"), broken, job_of("ssepa"), job_of("toco", name="again")]
    with pytest.raises(UserError, match="nowhere.* other 3 are finished; `tables runs` shows them"):
        queue.run_jobs(jobs, lambda name, event: events.append((name, dict(event))), processes=2)
    assert trained(tmp_path) == ["ssepa-seed0", "toco-seed0"]
    states = {name: event["state"] for name, event in events if "state" in event}
    assert states == {"toco-seed0": "done", "toco-seed5": "failed", "ssepa-seed0": "done", "again": "done"}
    assert ("again", {"state": "done", "message": "toco-seed0"}) in events, "reused, not trained again"
    rows = [event["step"] for name, event in events if name == "ssepa-seed0" and "step" in event]
    assert rows == [1, 2]
    assert ("toco-seed0", {"split": "val", "done": 2, "images": 2}) in events


def test_a_run_that_another_process_has_claimed_waits_and_is_reused(job_of, monkeypatch):
    """Other work is done first; then the run is there under another name, and is taken."""
    monkeypatch.setattr(queue, "PAUSE", 0.05)
    claimed, free = job_of("toco"), job_of("ssepa")
    lock = FolderLock(claimed.folder.parent, f".{claimed.recipe.hash()}.lock")
    lock.__enter__()
    order = []

    def report(name, event):
        if "state" in event:
            order.append((name, event["state"]))
        if (name, event.get("state")) == ("ssepa-seed0", "done"):
            train(claimed.recipe, claimed.folder.with_name("elsewhere"))
            lock.__exit__()

    outcomes = queue.run_jobs([claimed, free], report)
    assert order[:2] == [("toco-seed0", "busy"), ("ssepa-seed0", "done")] and order[-1][1] == "done"
    assert [outcome.run for outcome in outcomes] == ["elsewhere", "ssepa-seed0"]
    assert trained(free.folder.parent) == ["elsewhere", "ssepa-seed0"]


def test_a_run_that_is_being_trained_under_another_name_is_found(job_of):
    job, other = job_of("toco"), job_of("toco", name="other")
    RunFolder(other.folder).prepare(other.recipe, resume=True)
    assert find_run(job.recipe, job.folder) == job.folder, "nobody is at work on the other"
    with FolderLock(other.folder):
        assert find_run(job.recipe, job.folder) == other.folder
        assert find_run(job_of("toco", 1).recipe, job.folder) == job.folder
        with pytest.raises(UserError, match="in use"):
            queue.perform(job, lambda *_: None)


def test_what_is_stored_is_what_would_be_computed(job_of):
    job = job_of("toco")
    assert queue.stored_outcome(job) is None
    train(job.recipe, job.folder)
    assert queue.stored_outcome(job) is None and stored_result(job.folder, "val", images=2) is None
    result = evaluate_run(job.folder, "val", images=2, outputs=("cam",), device="cpu")
    assert stored_result(job.folder, "val", images=2, outputs=("cam",)) == result
    assert stored_result(job.folder, "val", images=2) is None, "the other outputs are missing"
    assert queue.stored_outcome(job) == queue.Outcome("toco-seed0", {"val": result})


def test_a_worker_that_dies_is_named(job_of):
    job = job_of("toco")
    agenda = queue._Agenda([job], lambda *_: None)
    ours, theirs = Pipe()

    def die():
        theirs.recv()
        theirs.close()

    thread = threading.Thread(target=die)
    thread.start()
    with pytest.raises(UserError, match="toco-seed0 has died.*--processes"):
        queue._hand_out([job], agenda, {ours: None})
    thread.join()


def test_settings_of_evaluation_do_not_mix(job_of, tmp_path):
    """Two arms of one training that differ in the threshold of evaluation: each has its own numbers."""
    job = job_of("toco")
    cam = replace(job.recipe.cam, background=0.1)
    other = replace(job, recipe=replace(job.recipe, cam=cam), folder=job.folder.with_name("arm"))
    outcomes = queue.run_jobs([job, other], lambda *_: None)
    assert [outcome.run for outcome in outcomes] == ["toco-seed0"] * 2
    assert [outcome.results["val"]["setting"]["background"] for outcome in outcomes] == [0.5, 0.1]


def test_the_display_counts_runs_and_time(monkeypatch, capsys):
    display = StudyDisplay({"a": 100, "b": 100, "c": 50})
    now = display.began + 60
    monkeypatch.setattr("ssepa_lib.workbook.progress.time.time", lambda: now)
    display("a", {"step": 100, "steps": 100, "seconds_left": 0.0})
    assert "already trained" in display.line()
    display("a", {"state": "done", "message": "a"})
    display("b", {"step": 70, "start": 40, "steps": 100, "loss": 0.5, "seconds_left": 60.0})
    assert display.line().startswith("1/3 runs done, about 2:40 left; b: step 70/100, loss 0.500, 1:00 left")
    assert display.share() == pytest.approx(170 / 250)
    display("b", {"split": "val", "done": 3, "images": 10})
    assert "b: scoring val 3/10" in display.line()
    for _ in range(2):
        display("c", {"state": "busy", "message": "x is in use by process 7"})
    display("c", {"state": "done", "message": "a"})
    out = capsys.readouterr().out
    assert out.count("c waits: x is in use by process 7") == 1
    assert "[2/3] c: done (the run of a)" in out


def test_bars_say_that_a_run_was_finished(capsys):
    from ssepa_lib.workbook.progress import progress_writer

    report = bars(progress_writer)
    report("toco-seed0", {"step": 5, "steps": 5, "seconds_left": 0.0})
    report("toco-seed0", {"state": "done", "message": "toco-seed0"})
    shown = capsys.readouterr()
    assert shown.out == "toco-seed0: already finished\n" and not shown.err, "and no empty bar"
