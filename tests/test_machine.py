"""What a machine can do to a run: a full or read-only disk, a closed pipe, workers that die or hang."""

import errno
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from multiprocessing import active_children

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from toy_network import TwoImages
from toy_network import recipe as toy_recipe

from ssepa_lib.cli import main
from ssepa_lib.compose import save_recipe
from ssepa_lib.data import eval_batches, loaders
from ssepa_lib.device import launched
from ssepa_lib.errors import UserError, explain_failure
from ssepa_lib.evaluation import submission
from ssepa_lib.evaluation.export import export_pseudo_labels, save_image
from ssepa_lib.files import FolderLock, write_csv
from ssepa_lib.labels.crf import crf_available, crf_pool
from ssepa_lib.training import RunFolder, train
from ssepa_lib.training.history import History
from ssepa_lib.training.run import fingerprint
from ssepa_lib.workbook import queue, runner
from ssepa_lib.workbook.figures import save_figure
from ssepa_lib.workbook.report import write_report

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def mount(folder, *options):
    """Whether a small disk could be mounted on, or changed at, a folder."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    return ROOT and subprocess.run(command, capture_output=True).returncode == 0


def gone(pids, seconds=10.0):
    """Whether all processes end within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def disk(tmp_path):
    """A folder, on a small disk of its own where this process may mount one, and a context in which it is
    full: by a file that fills it, otherwise by a limit on the size of files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = mount(folder, "size=4m")

    @contextmanager
    def full():
        if mounted:
            filler = folder / "filler"
            with filler.open("wb", buffering=0) as file:
                for size in (65536, 512):
                    try:
                        while True:
                            file.write(bytes(size))
                    except OSError as error:
                        assert error.errno == errno.ENOSPC
            yield
            filler.unlink()
            return
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield folder, full
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


class TwentyClasses(torch.nn.Module):
    """Only what an export looks at before it writes."""

    classes = tuple("abcdefghijklmnopqrst")


def writers(folder, tiny):
    """What the library writes: name → (file, a call that writes it)."""
    run = RunFolder(folder)
    figure = plt.figure()
    network = TwentyClasses()
    network.weight = torch.nn.Parameter(torch.arange(1000.0))
    history = History(run.history)

    def flush():
        history.add(["a"], {"loss": torch.tensor(1.0)})
        history.flush(1, 0.1)

    image = Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64))
    return {
        "checkpoint": (run.state, lambda: run.save_state({"index": 1, "network": {"w": torch.rand(50_000)}})),
        "weights": (run.weights, lambda: run.save_weights(network, tiny(), 6)),
        "metrics": (run.metrics, lambda: run.write_metrics("val", {"setting": {}, "miou": {}})),
        "history": (run.history, flush),
        "mask": (folder / "a.png", lambda: save_image(image, folder / "a.png")),
        "overlay": (folder / "a.jpg", lambda: save_image(image, folder / "a.jpg")),
        "table": (folder / "a.csv", lambda: write_csv(folder / "a.csv", ["a"], [[1]] * 5000)),
        "figure": (folder / "a.png", lambda: save_figure(figure, folder / "a.png")),
        "report": (folder / "report" / "words.html", lambda: write_report(folder)),
        "recipe": (run.recipe_file, lambda: save_recipe(tiny(), run.recipe_file)),
    }


WRITERS = [
    "checkpoint",
    "weights",
    "metrics",
    "history",
    "mask",
    "overlay",
    "table",
    "figure",
    "report",
    "recipe",
]


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_sentence_and_leaves_what_was_written(name, disk, tiny):
    folder, full = disk
    file, write = writers(folder, tiny)[name]
    write()
    before, content = names(folder), file.read_bytes()
    with full(), pytest.raises(UserError, match=r"cannot be written \(.*free some space|ulimit") as error:
        write()
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert file.read_bytes() == content and names(folder) == before
    write()
    plt.close("all")


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_folder_is_one_sentence(name, tmp_path, tiny, monkeypatch):
    """Root may write everywhere, so the calls of the system refuse."""
    file, write = writers(tmp_path, tiny)[name]
    write()
    content, before = file.read_bytes(), names(tmp_path)
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS))

    def refuse(*_, **__):
        raise refused

    monkeypatch.setattr("ssepa_lib.files.os.replace", refuse)
    with pytest.raises(UserError, match="Read-only file system.*choose a folder that can be written"):
        write()
    assert file.read_bytes() == content and names(tmp_path) == before
    plt.close("all")


def test_a_lock_on_a_full_disk_or_below_a_file_leaves_nothing(disk):
    folder, full = disk
    with full(), pytest.raises(UserError, match=r"\.lock cannot be written"):
        FolderLock(folder).__enter__()
    assert names(folder) == []
    (folder / "file").write_text("mine")
    with pytest.raises(UserError, match="a file"):
        FolderLock(folder / "file").__enter__()
    with pytest.raises(UserError, match="a file"):
        FolderLock(folder / "file" / "run").__enter__()


def test_a_training_that_fills_the_disk_says_so_and_goes_on_later(tmp_path, tiny, monkeypatch, capsys):
    """A real disk: the first checkpoint fits, the second does not, because the first is kept beside it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    recipe = tiny(**{"train.save_every": 1, "losses.segmentation_start": 0.0})
    save_recipe(recipe, tmp_path / "small.yaml")
    train(recipe, tmp_path / "whole")
    size = (tmp_path / "whole" / "state.pt").stat().st_size
    if not mount(disk, f"size={int(1.5 * size)}"):
        pytest.skip("no disk can be mounted here")
    try:
        monkeypatch.setenv("SSEPA_RESULTS", str(disk))
        command = ["train", str(tmp_path / "small.yaml"), "--run", "run"]
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "state.pt cannot be written (No space left on device)" in said
        folder = RunFolder(disk / "small" / "run")
        assert names(folder.path) == ["history.csv", "recipe.yaml", "state.pt"]
        assert torch.load(folder.state, weights_only=True)["index"] == 1
        assert mount(disk, "remount", f"size={8 * size}")
        assert main(command) == 0
        assert folder.fingerprint() == RunFolder(tmp_path / "whole").fingerprint()
        assert mount(disk, "remount", "ro")
        assert main([*command, "--set=train.seed=1", "--run", "other"]) == 2
        said = capsys.readouterr().err
        assert "Read-only file system" in said and said.count("\n") == 1
        assert main(["evaluate", str(folder.path), "--device", "cpu"]) == 2
        assert "Read-only file system" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_closed_pipe_is_one_line_and_an_exit_code(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        assert main(["recipe", "shapes/toco"]) == 141
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nobody reads the output" in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "memory is exhausted; for a training, lower data.batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory is exhausted"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory is exhausted"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory is exhausted"),
        (OSError(errno.ENOSPC, "No space left on device", "/disk/a.png"), "/disk/a.png cannot be written"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENOENT, "No such file"), None),
        (RuntimeError("a mistake"), None),
    ],
)
def test_failures_of_the_machine_are_told_from_mistakes(error, words, monkeypatch, capsys):
    def fail(**_):
        raise error

    monkeypatch.setattr("ssepa_lib.compose.list_parts", fail)
    if words is None:
        assert explain_failure(error) is None
        with pytest.raises(type(error)):
            main(["recipe"])
        return
    assert main(["recipe"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is no number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE 0"),
        ({"WORLD_SIZE": "2"}, "RANK or MASTER_ADDR is missing"),
        ({"SLURM_NTASKS": "3", "SLURM_PROCID": "3"}, "there is no such process"),
    ],
)
def test_malformed_numbers_of_processes(variables, words, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        launched()


def test_numbers_of_processes_as_torchrun_and_slurm_set_them(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host"}.items():
        monkeypatch.setenv(name, value)
    assert launched() == (1, 4)
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert launched() == (1, 2)


# Processes that load images


class Bad(TwoImages):
    """Two images, of which reading the second does something to its process."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def image(self, i):
        if i:
            self.act()
        return super().image(i)


def exhaust():
    raise MemoryError


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by signal: Killed|exited unexpectedly"),
        (lambda: os._exit(3), "exited unexpectedly"),
        (exhaust, "MemoryError"),
        (lambda: time.sleep(30), "timed out after 0.4 seconds"),
    ],
)
def test_a_loader_process_that_dies_or_hangs_is_one_sentence(act, words, monkeypatch):
    monkeypatch.setattr(loaders, "HANGS_AFTER", 0.4 if "timed" in words else 60.0)
    with pytest.raises(UserError, match="processes that load images have failed") as error:
        list(eval_batches(Bad(act), 8, 1, workers=1))
    text = str(error.value)
    assert "lower data.workers" in text and "\n" not in text
    assert any(word in text for word in words.split("|")), text


def test_a_mistake_in_a_loader_process_keeps_its_traceback():
    def mistake():
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        list(eval_batches(Bad(mistake), 8, 1, workers=1))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux")
def test_loader_processes_end_with_a_parent_that_is_killed():
    """Also while a batch waits that does not fit into a pipe, as the decoded images of an evaluation do."""

    class Large(TwoImages):
        def mask(self, i):
            return bytes(200_000)

    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        try:
            others = set(active_children())
            iterator = iter(eval_batches(Large(), 8, 1, workers=1))
            os.write(writer, b"about to start")
            next(iterator)
            own = set(active_children()) - others
            os.write(writer, " ".join(str(process.pid) for process in own).encode())
            time.sleep(60)
        finally:
            os._exit(1)
    assert os.read(reader, 1000) == b"about to start"
    workers = os.read(reader, 1000).decode().split()
    assert workers and not gone(workers, 0.5), "the second batch is made, and waits"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert gone(workers)


# Processes of the dense CRF


def crf_jobs(number=50):
    image, probabilities = np.zeros((8, 8, 3), np.uint8), np.full((2, 8, 8), 0.5, np.float32)
    return ((image, probabilities, i) for i in range(number))


needs_crf = pytest.mark.skipif(not crf_available(), reason="pydensecrf2 is not installed")


@needs_crf
def test_a_crf_process_that_is_killed_is_one_sentence_and_the_others_end():
    others = set(active_children())
    labelled = crf_pool(crf_jobs(), 2)
    next(labelled)
    workers = [process.pid for process in set(active_children()) - others]
    os.kill(workers[0], signal.SIGKILL)
    with pytest.raises(UserError, match="a worker of the dense CRF has died.*taskset"):
        list(labelled)
    assert gone(workers)


@needs_crf
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux")
def test_crf_processes_end_with_a_parent_that_is_killed():
    """As with `kill -9` during an evaluation; closing the iterator early ends them as well."""
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        try:
            others = set(active_children())
            labelled = crf_pool(crf_jobs(), 2)
            next(labelled)
            own = set(active_children()) - others
            os.write(writer, " ".join(str(process.pid) for process in own).encode())
            time.sleep(60)
        finally:
            os._exit(1)
    workers = os.read(reader, 1000).decode().split()
    assert len(workers) == 2 and not gone(workers, 0.1)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert gone(workers)


# Workers of a study, kernels of notebooks


def test_a_job_without_space_fails_in_a_sentence_and_the_others_go_on(tiny, tmp_path, monkeypatch):
    def perform(job, report, processes=None):
        if job.folder.name == "full":
            raise OSError(errno.ENOSPC, "No space left on device", "a.png")
        return queue.Outcome(job.folder.name, {})

    monkeypatch.setattr(queue, "perform", perform)
    jobs = [queue.Job(tiny(**{"train.seed": i}), tmp_path / name, {}) for i, name in enumerate(("full", "b"))]
    events = []
    with pytest.raises(UserError, match="a.png cannot be written"):
        queue.run_jobs(jobs, lambda name, event: events.append((name, event["state"])))
    assert events == [("full", "failed"), ("b", "done")]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("Kernel died")]
)
def test_a_notebook_whose_copy_or_kernel_fails_is_one_line(error, tmp_path, monkeypatch):
    from ssepa_lib.workbook.notebooks import discover

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("papermill.execute_notebook", fail)
    (notebook, *_) = discover()
    line = runner._execute(notebook, tmp_path, {}, "engine")
    assert line.startswith(f"{notebook.name}: ") and "\n" not in line and str(error)[-8:] in line


# Checkpoints


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A folder that was left after step 4, with the checkpoints of steps 3 and 4."""
    from conftest import TINY

    from ssepa_lib.compose import load_recipe

    recipe = load_recipe("shapes/toco", {**TINY, "train.save_every": 1})
    folder = tmp_path_factory.mktemp("runs") / "unfinished"

    def stop(row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, folder, on_step=stop)
    return recipe, folder


class Code:
    """Something that a careless reader of a pickle would run."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def damage(state, kind):
    """Damage a checkpoint in one of several ways."""
    content = state.read_bytes()
    if kind == "cut short":
        state.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        state.write_bytes(b"")
    elif kind == "a flipped bit":
        middle = content.rindex(b"PK\x01\x02") // 2
        state.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif kind == "a list":
        torch.save([1, 2], state)
    elif kind == "code":
        state.write_bytes(pickle.dumps(Code()))
    else:
        known = torch.load(state, weights_only=True)
        del known["checksum"]
        changes = {
            "no network": {"network": None},
            "another recipe": {"recipe": "0123456789"},
            "beyond the end": {"index": 7},
            "before the start": {"index": -1},
            "no number": {"index": "4"},
        }
        made = known | changes[kind]
        made = {name: value for name, value in made.items() if value is not None}
        torch.save(made | {"checksum": fingerprint(made)}, state)


KINDS = {
    "cut short": "cannot be read",
    "empty": "cannot be read",
    "a flipped bit": "damaged|cannot be read",
    "a list": "is no checkpoint",
    "code": "cannot be read",
    "no network": "lacks 'network'",
    "another recipe": "belongs to another recipe",
    "beyond the end": "says that 7 of 6 steps are done",
    "before the start": "says that -1 of 6",
    "no number": "says that '4' of 6",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(kind, unfinished, tmp_path, monkeypatch, caplog):
    recipe, folder = unfinished
    run = RunFolder(shutil.copytree(folder, tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    damage(run.state, kind)
    state = run.prepare(recipe, resume=True)
    assert state["index"] == 3 and "resuming from state.previous.pt at step 3" in caplog.text
    assert any(f"state.pt {words}" in caplog.text or words in caplog.text for words in KINDS[kind].split("|"))
    assert run.prepare(recipe, resume=True)["index"] == 3, "it has taken the place of the damaged one"
    damage(run.state, kind)
    with pytest.raises(UserError, match=r"state\.pt .*remove what is named") as error:
        run.prepare(recipe, resume=True)
    assert "\n" not in str(error.value) and names(tmp_path) == ["run"], "no code was run"


def test_a_kill_between_two_renames_loses_nothing(unfinished, tmp_path):
    recipe, folder = unfinished
    run = RunFolder(shutil.copytree(folder, tmp_path / "run"))
    os.replace(run.state, run.previous_state)
    parts = [run.path / f".state.{i}.part.pt" for i in "ab"]
    for part in parts:
        part.write_bytes(b"half")
    assert run.prepare(recipe, resume=True)["index"] == 4
    assert not any(part.exists() for part in parts), "what a kill leaves does not fill the disk"
    train(recipe, run.path)
    assert names(run.path) == ["history.csv", "recipe.yaml", "state.pt", "weights.safetensors"]


def test_a_checkpoint_of_an_earlier_version_takes_its_history_from_the_file(unfinished, tmp_path):
    recipe, folder = unfinished
    run = RunFolder(shutil.copytree(folder, tmp_path / "run"))
    state = torch.load(run.state, weights_only=True)
    torch.save({k: v for k, v in state.items() if k not in ("history", "recipe", "checksum")}, run.state)
    before = run.history.read_text().splitlines()
    train(recipe, run.path)
    after = run.history.read_text().splitlines()
    assert len(before) == 6 and len(after) == 7 and before[:5] == after[:5], "the rows up to step 4 stay"


def test_weights_that_are_damaged_in_their_values_are_refused(unfinished, tmp_path):
    recipe, folder = unfinished
    run = RunFolder(shutil.copytree(folder, tmp_path / "run"))
    train(recipe, run.path)
    content = bytearray(run.weights.read_bytes())
    content[-5] ^= 1
    run.weights.write_bytes(content)
    with pytest.raises(UserError, match="damaged .its checksum differs.*from the last checkpoint"):
        run.load("cpu")
    run.weights.unlink()
    train(recipe, run.path)
    run.load("cpu")


def test_a_second_evaluation_or_export_is_told_who_holds_the_folder(unfinished, tmp_path):
    from ssepa_lib.evaluation import evaluate_run

    recipe, folder = unfinished
    run = RunFolder(shutil.copytree(folder, tmp_path / "run"))
    train(recipe, run.path)
    refused = []

    def second(*_):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on ") as error:
            evaluate_run(run.path, outputs=("cam",), device="cpu")
        refused.append(str(error.value))

    evaluate_run(run.path, images=2, outputs=("cam",), device="cpu", progress=second)
    assert len(refused) == 2 and not list(run.path.glob("*.lock")) and not list(run.path.glob(".*"))
    network, _ = run.load("cpu")
    with FolderLock(tmp_path / "labels"), pytest.raises(UserError, match="labels is in use by process"):
        dataset = TwoImages(classes=network.classes)
        export_pseudo_labels(network, recipe, dataset, tmp_path / "labels", device="cpu")


def test_a_submission_on_a_full_disk(disk, monkeypatch):
    """The archive is written by another library."""
    folder, full = disk
    noise = torch.randint(21, (200, 200), dtype=torch.uint8).numpy()
    predictions = [(str(i), Image.fromarray(noise), noise) for i in range(5)]
    monkeypatch.setattr(submission, "label_maps", lambda *_: predictions)
    with full(), pytest.raises(UserError, match=r"voc\.tgz cannot be written"):
        network, dataset = TwentyClasses(), TwoImages(classes=TwentyClasses.classes)
        submission.export_submission(network, toy_recipe(), dataset, folder / "voc.tgz", device="cpu")
    assert names(folder) == []
