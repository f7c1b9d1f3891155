"""Progress of runs and notebooks: a run writes where it is, the runner of the notebooks shows it.

A notebook's kernel is another process, so a run reports through a small file named by the environment
variable `SSEPA_PROGRESS`; without it, the same callback moves an ordinary progress bar.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssepa_lib.files import write_text

PROGRESS = "SSEPA_PROGRESS"
COLOURS = {"done": "green", "failed": "red", "skipped": "yellow", "running": "bold cyan"}


def progress_writer(label: str) -> Callable[[Mapping[str, Any]], None]:
    """A callback for `train(..., on_step=...)`, which calls it with {step, steps, loss, seconds_left, …}.

    Under the runner it reports where the run is; anywhere else it moves a progress bar.
    """
    target = os.environ.get(PROGRESS)
    if target is None:
        return _bar(label)

    def on_step(row: Mapping[str, Any]) -> None:
        state = {"label": label, **{name: row[name] for name in ("step", "steps", "loss", "seconds_left")}}
        write_text(Path(target), json.dumps(state))

    return on_step


def _bar(label: str) -> Callable[[Mapping[str, Any]], None]:
    from tqdm.auto import tqdm

    bar = tqdm(desc=label)

    def on_step(row: Mapping[str, Any]) -> None:
        bar.total = row["steps"]
        bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        bar.update(row["step"] - bar.n)

    return on_step


def clock(seconds: float) -> str:
    """Minutes and seconds, `m:ss`."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


class Display:
    """Rows of notebooks with their state and, while one trains, its step, loss and time left.

    Args:
        names: of the notebooks, in the order in which they run.
        progress: file through which a run in a notebook's kernel reports.
    """

    def __init__(self, names: Sequence[str], progress: Path):
        from rich.console import Console

        self.console = Console(highlight=False)
        self.progress = progress
        self.rows = {name: ["waiting", "", ""] for name in names}  # state, cell, time
        self.current, self.began, self.cell = "", 0.0, ""
        self.done = threading.Event()

    def training(self) -> str:
        """One line about the run in progress, or nothing."""
        try:
            state = json.loads(self.progress.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        if state["step"] >= state["steps"]:
            return ""
        left = clock(state["seconds_left"])
        return (
            f"{state['label']}: step {state['step']}/{state['steps']}, loss {state['loss']:.3f}, {left} left"
        )

    def render(self):
        """The table of notebooks, as of now."""
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("notebook", "", "cell", "time", ""):
            table.add_column(column, style="dim" if column == "time" else None)
        for name, (state, cell, taken) in self.rows.items():
            cells = (cell, taken, "")
            if state == "running":
                cells = (self.cell, clock(time.time() - self.began), self.training())
            table.add_row(name, f"[{COLOURS.get(state, 'dim')}]{state}[/]", *cells)
        return table

    def _lines(self) -> None:
        """Without a terminal: one plain line every 20 s while something trains."""
        last = ""
        while not self.done.wait(20):
            line = self.training()
            if line and line != last:
                self.console.print(f"    {line}", soft_wrap=True)
            last = line

    @contextmanager
    def show(self) -> Iterator[None]:
        """Keep the display up while the notebooks run."""
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
            self.done.set()
            thread.join()

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
