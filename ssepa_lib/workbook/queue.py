"""The queue of a study: every run is trained and scored once, by one process per core or GPU.

A run is claimed by the hash of its recipe before anything is computed. Whoever meets a run that another
process has claimed, on this machine or on another one that shares the folder of results, does other work
first, and reuses the run when it is finished.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from ssepa_lib.device import cores
from ssepa_lib.errors import UserError, explain_failure
from ssepa_lib.evaluation.evaluate import evaluate_run, stored_result
from ssepa_lib.files import FolderInUse, FolderLock
from ssepa_lib.paths import variables_set
from ssepa_lib.recipe import Recipe
from ssepa_lib.training.run import RunFolder, find_finished, find_run
from ssepa_lib.training.trainer import train
from ssepa_lib.workbook.score_curve import ScoreCurve

PAUSE = 2.0  # seconds before a run that another process has claimed is tried again

Report = Callable[[str, Mapping[str, Any]], None]
"""Called with the name of a run and what happens: a row of its history; {split, done, images} while it is
scored; {state} when it is done, busy or failed, with a message."""


@dataclass(frozen=True)
class Job:
    """A run to train and to score.

    Attributes:
        recipe: what to train.
        folder: where, unless a run of the same recipe lies beside it.
        splits: split → options of `evaluate_run`.
        curve: how often it is scored on the first of these splits while it is trained; see `ScoreCurve`.
    """

    recipe: Recipe
    folder: Path
    splits: Mapping[str, Mapping[str, Any]]
    curve: int = 0


@dataclass(frozen=True)
class Outcome:
    """A run that is finished: the name of its folder, and split → result of `evaluate_run`."""

    run: str
    results: Mapping[str, dict]


def number_of_workers(device: str = "auto") -> int:
    """One per GPU; without a GPU, one per core that this process may use."""
    return (torch.cuda.device_count() if device != "cpu" else 0) or cores()


def parse_shard(text: str) -> tuple[int, int]:
    """`2/4` as (2, 4).

    Raises:
        UserError: it is not I/N with I from 1 to N.
    """
    first, _, second = text.partition("/")
    if first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second):
        return int(first), int(second)
    raise UserError(f"there is no shard '{text}'; write I/N with I from 1 to N, for example 1/4.")


def share(jobs: Mapping[Any, Job], shard: tuple[int, int]) -> dict[Any, Job]:
    """The jobs of shard i of n: every n-th recipe, whatever names it goes by."""
    hashes = {key: job.recipe.hash() for key, job in jobs.items()}
    numbers = {each: number for number, each in enumerate(dict.fromkeys(hashes.values()))}
    i, n = shard
    return {key: job for key, job in jobs.items() if numbers[hashes[key]] % n == i - 1}


def stored_outcome(job: Job) -> Outcome | None:
    """The outcome of a job that is already there; None where anything would have to be computed."""
    run = RunFolder(find_finished(job.recipe, job.folder))
    if not run.is_finished(job.recipe):
        return None
    results = {split: stored_result(run.path, split, **options) for split, options in job.splits.items()}
    return None if None in results.values() else Outcome(run.name, results)


def perform(job: Job, report: Report, processes: int | None = None) -> Outcome:
    """Train and score one job in this process; what is there already is reused.

    Args:
        processes: see `evaluate_run`.

    Raises:
        FolderInUse: another process has claimed the recipe or trains in the folder.
        UserError: see `train` and `evaluate_run`.
    """
    name = job.folder.name
    with FolderLock(job.folder.parent, f".{job.recipe.hash()}.lock"):
        folder = find_run(job.recipe, job.folder)
        watched = job.curve and not RunFolder(folder).is_finished(job.recipe)
        watch = ScoreCurve(job.recipe, folder, job.curve, next(iter(job.splits))) if watched else None
        train(job.recipe, folder, on_step=partial(report, name), watch=watch)
        results = {}
        for split, options in job.splits.items():

            def progress(done: int, images: int, split: str = split) -> None:
                report(name, {"split": split, "done": done, "images": images})

            common = {"device": job.recipe.train.device, "processes": processes, "progress": progress}
            results[split] = evaluate_run(folder, split, **common, **options)
    return Outcome(folder.name, results)


def run_jobs(jobs: Sequence[Job], report: Report, processes: int = 1) -> list[Outcome]:
    """Train and score all jobs; a job that fails does not keep the others from being done.

    Args:
        report: see `Report`.
        processes: workers; 1: in this process, with all its threads.

    Returns:
        Their outcomes, in order.

    Raises:
        UserError: jobs have failed; the sentence is that of the first, and counts them and the finished ones.
    """
    agenda = _Agenda(jobs, report)
    processes = min(processes, len(set(agenda.hashes)))
    if processes <= 1:
        while not agenda.finished:
            index = agenda.take()
            if index is None:
                time.sleep(PAUSE / 4)
            else:
                agenda.settle(index, *_attempt(jobs[index], report))
    else:
        with _workers(processes, jobs[0].recipe.train.device) as workers:
            _hand_out(jobs, agenda, workers)
    if agenda.failures:
        failed, done = len(agenda.failures), len(agenda.outcomes)
        more = f" ({failed} of {len(jobs)} runs failed.)" if failed > 1 else ""
        more += f" The other {done} are finished; `tables runs` shows them." if done else ""
        raise UserError(f"{next(iter(agenda.failures.values()))}{more}")
    return [agenda.outcomes[index] for index in range(len(jobs))]


class _Agenda:
    """Which jobs wait, which are at work, and what has become of the others."""

    def __init__(self, jobs: Sequence[Job], report: Report):
        self.names = [job.folder.name for job in jobs]
        self.hashes = [job.recipe.hash() for job in jobs]
        self.report = report
        self.waiting = dict.fromkeys(range(len(jobs)), 0.0)  # job → time before which it is not tried again
        self.working: set[int] = set()
        self.outcomes: dict[int, Outcome] = {}
        self.failures: dict[int, str] = {}

    @property
    def finished(self) -> bool:
        return not self.waiting and not self.working

    def take(self) -> int | None:
        """The next job to begin; never one of a recipe that is at work."""
        taken, now = {self.hashes[index] for index in self.working}, time.monotonic()
        free = (i for i, start in self.waiting.items() if start <= now and self.hashes[i] not in taken)
        index = next(free, None)
        if index is not None:
            del self.waiting[index]
            self.working.add(index)
        return index

    def settle(self, index: int, state: str, content: Any) -> None:
        """Note what has become of a job."""
        self.working.discard(index)
        if state == "busy":
            self.waiting[index] = time.monotonic() + PAUSE
        elif state == "failed":
            self.failures[index] = content
        else:
            self.outcomes[index] = content
        message = content.run if state == "done" else content
        self.report(self.names[index], {"state": state, "message": message})


def _attempt(job: Job, report: Report, processes: int | None = None) -> tuple[str, Any]:
    """`perform`, as its state and either its outcome or a message."""
    try:
        return "done", perform(job, report, processes)
    except FolderInUse as error:
        return "busy", str(error)
    except UserError as error:
        return "failed", str(error)
    except ConnectionError:  # the reports go nowhere
        raise
    except (OSError, RuntimeError, MemoryError) as error:
        if reason := explain_failure(error):
            return "failed", reason
        raise


def _hand_out(jobs: Sequence[Job], agenda: _Agenda, workers: Mapping[Connection, BaseProcess]) -> None:
    """Keep every worker at work until all jobs are settled.

    Raises:
        UserError: a worker has died.
        RuntimeError: an unexpected error in a worker, with its traceback.
    """
    idle, at_work = list(workers), {}
    while not agenda.finished:
        while idle and (index := agenda.take()) is not None:
            connection = idle.pop()
            connection.send(jobs[index])
            at_work[connection] = index
        for connection in wait(list(at_work), timeout=PAUSE / 4):
            index = at_work[connection]
            try:
                state, content = connection.recv()
            except (EOFError, ConnectionError):
                raise UserError(
                    f"the process that worked on {agenda.names[index]} has died, perhaps because memory ran "
                    "out; run the same command again with a smaller --processes."
                ) from None
            if state == "crashed":
                raise RuntimeError(content)
            if state == "event":
                agenda.report(agenda.names[index], content)
                continue
            del at_work[connection]
            idle.append(connection)
            agenda.settle(index, state, content)


@contextmanager
def _workers(number: int, device: str) -> Iterator[dict[Connection, BaseProcess]]:
    """Worker processes by the connection to each; GPUs and cores are divided among them."""
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
    threads, context = max(1, cores() // number), get_context("spawn")
    workers = {}
    try:
        for i in range(number):
            ours, theirs = context.Pipe()
            variables = {"CUDA_VISIBLE_DEVICES": names[i % gpus]} if gpus else {}
            process = context.Process(target=_work, args=(theirs, threads))
            with variables_set(
                OMP_NUM_THREADS=str(threads), **variables
            ):  # which a process reads as it starts
                process.start()
            theirs.close()
            workers[ours] = process
        yield workers
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()


def _work(connection: Connection, threads: int) -> None:
    """A worker: performs the jobs that come in until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that locks are released
    torch.set_num_threads(threads)

    def report(_: str, event: Mapping[str, Any]) -> None:
        connection.send(("event", dict(event)))

    with suppress(EOFError, ConnectionError):
        while True:
            job = connection.recv()
            try:
                answer = _attempt(job, report, threads)
            except ConnectionError:
                return
            except Exception:
                answer = "crashed", traceback.format_exc()
            connection.send(answer)
