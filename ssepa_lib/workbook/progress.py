"""Progress of runs, studies and notebooks: bars on a terminal, plain lines elsewhere.

A notebook's kernel is another process, so what runs there reports through a small file named by the
environment variable `SSEPA_PROGRESS`; without it, the same callbacks move an ordinary progress bar.
"""

import json
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssepa_lib.files import write_text

PROGRESS = "SSEPA_PROGRESS"
COLOURS = {"done": "green", "failed": "red", "skipped": "yellow", "running": "bold cyan"}
EVERY = 20  # seconds between plain lines


def progress_writer(label: str) -> Callable[[Mapping[str, Any]], None]:
    """A callback for `train(..., on_step=...)`, which calls it with {step, steps, loss, seconds_left, …}.

    Under the runner it reports where the run is; anywhere else it moves a progress bar, which appears with
    the first row. A run that was finished before says so in one line.
    """
    bar = None

    def on_step(row: Mapping[str, Any]) -> None:
        nonlocal bar
        if "loss" not in row:
            print(f"{label}: already finished")
        elif PROGRESS in os.environ:
            _tell(label, step_text(row), over=row["step"] == row["steps"])
        else:
            if bar is None:  # a bar without a total has no truth value
                bar = _bar(label, unit="step", initial=row.get("start", 0))
            bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            bar = _move(bar, row["step"], row["steps"])

    return on_step


def counter(label: str, unit: str = "image") -> Callable[[int, int | None], None]:
    """A callback (done, all) that moves a bar on a terminal and in a notebook, and is silent elsewhere.

    Under the runner it reports like `progress_writer`.
    """
    bar, began = None, time.time()

    def progress(done: int, total: int | None) -> None:
        nonlocal bar
        if PROGRESS in os.environ:
            left = clock((time.time() - began) * (total - done) / done) if done and total else "0:00"
            _tell(label, f"{unit} {done}/{total}, {left} left", over=done == total)
            return
        hidden = not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        if bar is None:
            bar = _bar(label, unit=unit, unit_scale=unit == "B", disable=hidden)
        bar = _move(bar, done, total)

    return progress


def bars(
    progress: Callable[[str], Callable[[Mapping[str, Any]], None]] | None,
) -> Callable[[str, Mapping[str, Any]], None]:
    """Reports of a queue (see `queue.Report`) by `progress`, such as `progress_writer`, one run after the
    other; None: only what a run waits for is said."""
    callbacks, said = {}, set()

    def report(name: str, event: Mapping[str, Any]) -> None:
        if event.get("state") == "busy" and event["message"] not in said:
            said.add(event["message"])
            print(f"{name} waits: {event['message']}")
        if "split" in event and progress:
            label = f"{name}, {event['split']}"
            callbacks.setdefault(label, counter(label))(event["done"], event["images"])
        if "step" in event and progress:
            callbacks.setdefault(name, progress(name))(event)

    return report


def _tell(label: str, text: str, over: bool) -> None:
    """Write one line for the runner; it is shown until it is over."""
    write_text(Path(os.environ[PROGRESS]), json.dumps({"line": "" if over else f"{label}: {text}"}))


def _bar(label: str, **options: Any) -> Any:
    """A bar of plain text: a saved notebook still shows it when it is opened again."""
    from tqdm import tqdm

    return tqdm(desc=label, **options)


def _move(bar: Any, done: int, total: int | None) -> Any:
    """Move a bar; None when it has come to its end, after which another one may begin."""
    bar.total = total
    bar.update(done - bar.n)
    if done != total:
        return bar
    bar.close()
    return None


def clock(seconds: float) -> str:
    """Minutes and seconds, `m:ss`."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def step_text(row: Mapping[str, Any]) -> str:
    """`step 200/300, loss 0.512, 0:50 left` of a row {step, steps, loss, seconds_left}."""
    left = clock(row["seconds_left"])
    return f"step {row['step']}/{row['steps']}, loss {row['loss']:.3f}, {left} left"


class _Screen(ABC):
    """Something that is kept on a terminal while work is done, and is told in plain lines elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)
        self.closed = threading.Event()

    @abstractmethod
    def render(self):
        """What a terminal shows, as of now."""

    @abstractmethod
    def line(self) -> str:
        """The same in one plain line, or nothing."""

    def _lines(self) -> None:
        last = ""
        while not self.closed.wait(EVERY):
            line = self.line()
            if line and line != last:
                self.console.print(f"    {line}", soft_wrap=True, markup=False)
            last = line

    @contextmanager
    def show(self) -> Iterator[None]:
        """Keep the display up while the work is done."""
        from rich.live import Live

        if self.console.is_terminal:
            with Live(get_renderable=self.render, console=self.console, refresh_per_second=4):
                yield
            return
        thread = threading.Thread(target=self._lines, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.closed.set()
            thread.join()


class Display(_Screen):
    """Rows of notebooks with their state and, while one trains, its step, loss and time left.

    Args:
        names: of the notebooks, in the order in which they run.
        progress: file through which a run in a notebook's kernel reports.
    """

    def __init__(self, names: Sequence[str], progress: Path):
        super().__init__()
        self.progress = progress
        self.rows = {name: ["waiting", "", ""] for name in names}  # state, cell, time
        self.current, self.began, self.cell = "", 0.0, ""

    def line(self) -> str:
        """One line about what the notebook trains or scores, or nothing."""
        try:
            return json.loads(self.progress.read_text(encoding="utf-8"))["line"]
        except (OSError, ValueError):
            return ""

    def render(self):
        """The table of notebooks, as of now."""
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("notebook", "", "cell", "time", ""):
            table.add_column(column, style="dim" if column == "time" else None)
        for name, (state, cell, taken) in self.rows.items():
            cells = (cell, taken, "")
            if state == "running":
                cells = (self.cell, clock(time.time() - self.began), self.line())
            table.add_row(name, f"[{COLOURS.get(state, 'dim')}]{state}[/]", *cells)
        return table

    def start(self, name: str) -> None:
        """A notebook begins."""
        self.progress.unlink(missing_ok=True)
        self.current, self.began, self.cell = name, time.time(), ""
        self.rows[name][0] = "running"

    def at_cell(self, index: int, total: int) -> None:
        """The notebook that runs has come to a cell, counted from 0."""
        self.cell = f"{index + 1}/{total}"

    def end(self, name: str, state: str) -> None:
        """A notebook is done, failed or skipped."""
        taken = clock(time.time() - self.began) if name == self.current else ""
        self.rows[name] = [state, self.cell if taken else "", taken]
        if not self.console.is_terminal:
            position = list(self.rows).index(name) + 1
            line = f"[{position}/{len(self.rows)}] {name}: {state} {taken}".rstrip()
            self.console.print(line, markup=False)


class StudyDisplay(_Screen):
    """The runs of a queue: which are at work, how many are done, and the time left.

    Args:
        steps: name of a run → its steps.
    """

    def __init__(self, steps: Mapping[str, int]):
        super().__init__()
        self.steps = dict(steps)
        self.began = time.time()
        self.first: dict[str, int] = {}  # run → steps that were there before this call
        self.at: dict[str, int] = {}  # run → steps that are done now
        self.texts: dict[str, str] = {}  # run at work → what it does
        self.ended: dict[str, str] = {}  # run → state
        self.said: set[str] = set()

    def __call__(self, name: str, event: Mapping[str, Any]) -> None:
        """Take a report of the queue; see `queue.Report`."""
        if "state" in event:
            self._settle(name, event["state"], event["message"])
        elif "split" in event:
            self.texts[name] = f"scoring {event['split']} {event['done']}/{event['images']}"
        else:
            known = "loss" in event
            self.first.setdefault(name, event.get("start", 0) if known else event["steps"])
            self.at[name] = event["step"]
            self.texts[name] = step_text(event) if known else "already trained"

    def _settle(self, name: str, state: str, message: str) -> None:
        self.texts.pop(name, None)
        if state == "busy":
            if message not in self.said:
                self.console.print(f"{name} waits: {message}", markup=False, soft_wrap=True)
            self.said.add(message)
            return
        self.ended[name] = state
        self.first.setdefault(name, self.steps[name])
        self.at[name] = self.steps[name]
        run = "" if state != "done" or message == name else f" (the run of {message})"
        reason = f": {message}" if state == "failed" else ""
        line = f"[{len(self.ended)}/{len(self.steps)}] {name}: {state}{run}{reason}"
        self.console.print(line if self.console.is_terminal else f"{line}{self._left()}", markup=False)

    def share(self) -> float:
        """How much of all steps is done, 0..1."""
        return sum(self.at.values()) / max(1, sum(self.steps.values()))

    def _left(self) -> str:
        """`, about 2:10 left` by the speed of this call, as soon as there is one."""
        at, first = dict(self.at), dict(self.first)  # copies: reports come in from another thread
        done = sum(at.get(name, start) - start for name, start in first.items())
        left = sum(self.steps.values()) - sum(at.values())
        return f", about {clock((time.time() - self.began) * left / done)} left" if done and left else ""

    def line(self) -> str:
        """How many runs are done, what the others do, and the time left."""
        texts = "; ".join(f"{name}: {text}" for name, text in dict(self.texts).items())
        return f"{len(self.ended)}/{len(self.steps)} runs done{self._left()}; {texts}".rstrip("; ")

    def render(self):
        """A bar over all runs, and a row for each that is at work."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        taken = clock(time.time() - self.began)
        head = f"{len(self.ended)}/{len(self.steps)} runs done, {taken} so far{self._left()}"
        table.add_row("study", ProgressBar(total=1, completed=self.share(), width=24), head)
        for name, text in dict(self.texts).items():
            part = self.at.get(name, 0) / self.steps[name]
            table.add_row(name, ProgressBar(total=1, completed=part, width=24), text)
        return Group(table)
