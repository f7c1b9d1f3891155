"""Kill a run at random moments, again and again, and compare the end with that of an undisturbed run.

`make soak` trains five methods for 24 steps each, scores them with the dense CRF and writes pseudo-labels.
Twenty times SIGKILL ends the command in between: in a step, while a checkpoint is written, in an evaluation,
with CRF workers at work, in an export. The same command then resumes it. The losses, the final weights, the
checkpoint (optimiser, scheduler, teacher, centres), the scores and the pseudo-labels must be those of the
undisturbed run, bit for bit, and no process may be left. The report goes to `results/soak`.

Every command runs in a forked process, so that the libraries are loaded once; apart from that it is the
command line. `python tests/soak.py FOLDER quick` kills one short run three times, as the tests do.
"""

import contextlib
import csv
import hashlib
import mmap
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path

STAGES = ("step", "checkpoint", "evaluation", "crf", "export")
METHODS = ("toco", "ssepa_plus", "fsr+ssepa_plus", "afa", "mcc")


def mark(stage: mmap.mmap) -> None:
    """Let the functions of each stage say when they begin; only in a process that is about to be killed."""
    names = ("evaluation.evaluate", "evaluation.export", "training.run", "training.trainer")
    evaluate, export, run, trainer = (import_module(f"ssepa_lib.{name}") for name in names)

    def announce(module, name: str, number: int) -> None:
        function = getattr(module, name)

        def told(*args, **options):
            stage[0] = number
            return function(*args, **options)

        setattr(module, name, told)

    announce(trainer.Trainer, "step", 1)
    announce(run, "write_checkpoint", 2)
    announce(evaluate, "_count", 3)
    announce(evaluate, "crf_pool", 4)
    announce(export, "save_image", 5)


def command(recipe: Path, results: Path) -> None:
    """Train, evaluate with the dense CRF, and write pseudo-labels, by the command line."""
    from ssepa_lib.cli import main

    os.environ["SSEPA_RESULTS"] = str(results)
    run = str(results / recipe.stem / "run")
    for words in (
        ["train", str(recipe), "--run", "run"],
        ["evaluate", run, "--test-time", "single", "ms_crf", "--device", "cpu"],
        ["pseudo-labels", run, "--out", str(results / "labels"), "--test-time", "single", "--device", "cpu"],
    ):
        if code := main(words):
            os._exit(code)


def start(recipe: Path, results: Path, stage: mmap.mmap) -> int:
    """Run `command` in a process of its own, with a session of its own; returns its number."""
    stage[0] = 0
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        with (results.parent / f"{results.name}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        mark(stage)
        command(recipe, results)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def ended(process: int) -> int | None:
    """The exit code of a process; None while it is alive."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def survivors(session: int) -> list[int]:
    """Processes of a session, apart from zombies."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def kill(recipe: Path, results: Path, stage: mmap.mmap, wanted: int, dice: random.Random) -> dict:
    """Start the command and kill it at a random moment of a stage; returns what happened."""
    delay = dice.uniform(0, (0.05, 0.01, 0.05, 0.6, 0.02)[wanted - 1])  # about as long as the stage lasts
    seen = 1 if wanted == 4 else dice.randint(1, 2)
    process = start(recipe, results, stage)
    while (code := ended(process)) is None and seen:
        if stage[0] == wanted:
            stage[0] = 0
            seen -= 1
        time.sleep(0.0005)
    until = time.monotonic() + delay
    while code is None and time.monotonic() < until:
        code = ended(process)
        time.sleep(0.0005)
    if code is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return {
        "stage": STAGES[wanted - 1],
        "seconds after its beginning": round(delay, 3),
        "killed": code is None,
        "exit code": code,
        "session": process,
    }


def losses(run: Path) -> list[dict]:
    """The history without the times."""
    with (run / "history.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def outcome(results: Path, name: str) -> dict:
    """Everything that must be equal: losses, fingerprints of weights and checkpoint, scores, labels."""
    import torch

    from ssepa_lib.training import RunFolder
    from ssepa_lib.training.run import fingerprint

    run = RunFolder(results / name / "run")
    state = torch.load(run.state, weights_only=True)
    names = ("network", "teacher", "objectives", "optimizer", "scheduler", "index")
    metrics = {split: {k: v for k, v in result.items()} for split, result in run.read_metrics().items()}
    digest = hashlib.sha256()
    for path in sorted((results / "labels").glob("*.png")):
        digest.update(path.name.encode() + path.read_bytes())
    return {
        "losses": losses(run.path),
        "weights": run.fingerprint(),
        "checkpoint": {part: fingerprint(state[part]) for part in names if part in state},
        "scores": metrics,
        "labels": digest.hexdigest()[:16],
        "files": sorted(path.name for path in run.path.iterdir()),
    }


def kills(folder: Path, method: str, settings: dict, stages: list[int], dice: random.Random) -> list[dict]:
    """Kill the run of one method once per stage, in this order, and compare its end with the undisturbed one.

    Returns:
        One entry per kill; `survived` says that everything is equal and no process is left.
    """
    from ssepa_lib.compose import load_recipe, save_recipe

    name = method.replace("+", "_")
    recipe, stage = folder / f"{name}.yaml", mmap.mmap(-1, 1)
    save_recipe(load_recipe(f"shapes/{method}", settings), recipe)
    whole, cut = folder / f"{name}-whole", folder / f"{name}-cut"
    code = os.waitstatus_to_exitcode(os.waitpid(start(recipe, whole, stage), 0)[1])
    assert code == 0, (folder / f"{whole.name}.log").read_text()[-2000:]
    entries = [{"method": method} | kill(recipe, cut, stage, wanted, dice) for wanted in sorted(stages)]
    code = os.waitstatus_to_exitcode(os.waitpid(start(recipe, cut, stage), 0)[1])
    assert code == 0, (folder / f"{cut.name}.log").read_text()[-2000:]
    expected, found = outcome(whole, name), outcome(cut, name)
    differs = [part for part in expected if expected[part] != found[part]]
    until = time.monotonic() + 12  # loader processes look for their parent every five seconds
    while any(survivors(entry["session"]) for entry in entries) and time.monotonic() < until:
        time.sleep(0.2)
    for entry in entries:
        left = survivors(entry.pop("session"))
        entry |= {"differs": differs, "processes left": len(left)}
        entry["survived"] = entry["killed"] and not differs and not left
    return entries


def report(entries: list[dict], settings: dict, seed: int) -> tuple[dict, str]:
    """The report as data and as Markdown."""
    from ssepa_lib.evaluation.provenance import commit, versions

    survived = sum(entry["survived"] for entry in entries)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    minutes = sum(each.ru_utime + each.ru_stime for each in used) / 60
    data = {
        "survived": survived,
        "kills": len(entries),
        "core minutes": round(minutes, 1),
        "seed": seed,
        "commit": commit(),
        "versions": versions(),
        "settings": settings,
        "entries": entries,
    }
    rows = [
        f"| {e['method']} | {e['stage']} | {e['seconds after its beginning']:.3f} | "
        f"{'yes' if e['survived'] else 'no: ' + ', '.join(e['differs']) or 'a process is left'} |"
        for e in entries
    ]
    text = [
        f"# {survived} of {len(entries)} kills survived",
        "",
        __doc__.partition("\n\n")[2].strip(),
        "",
        f"Seed {seed}, {minutes:.1f} core minutes, commit {data['commit']}; `make soak` repeats it.",
        "",
        "| method | killed in | seconds after its beginning | everything equal, no process left |",
        "|---|---|---|---|",
        *rows,
    ]
    return data, "\n".join(text) + "\n"


def main(out: Path, quick: bool = False, seed: int = 0) -> int:
    """Twenty kills, every method in four of the five stages; quick: three of one method."""
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    from conftest import TINY

    from ssepa_lib.files import write_json, write_text

    for name in ("cli", "evaluation", "training"):  # once, and not in every process
        import_module(f"ssepa_lib.{name}")
    torch.set_num_threads(1)
    settings = TINY | {"train.steps": 24, "train.save_every": 4, "train.log_every": 3, "data.workers": 1}
    settings["data.val_images"] = 2
    plan = [(method, [1 + (number + i) % 5 for i in range(4)]) for number, method in enumerate(METHODS)]
    if quick:
        settings |= {"train.steps": 6, "train.save_every": 2, "data.workers": 0}
        plan = [("fsr+ssepa_plus", [1, 2, 4])]
    dice, entries = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        for method, stages in plan:
            for entry in kills(Path(folder), method, settings, stages, dice):
                print(entry, flush=True)
                entries.append(entry)
    data, text = report(entries, settings, seed)
    write_json(out / "soak.json", data)
    write_text(out / "README.md", text)
    print(text.splitlines()[0])
    return data["survived"] < len(entries)


if __name__ == "__main__":
    arguments = sys.argv[1:] or ["results/soak"]
    sys.exit(main(Path(arguments[0]), quick="quick" in arguments[1:]))
