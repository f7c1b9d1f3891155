"""The history of a run: what is logged, and the check that the loss is still a number."""

import csv
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssepa_lib.errors import UserError
from ssepa_lib.fields import shown
from ssepa_lib.files import write_atomically
from ssepa_lib.readers import read_table

NAMED = 8  # at most so many ids of a batch are named


class History:
    """history.csv: one row every `log_every` steps; per term the mean over the steps since the last row that
    had it.

    Args:
        path: the file.
        state: `state_dict` of the checkpoint a run resumes from; the file is written anew from it.
    """

    def __init__(self, path: Path, state: dict[str, Any] | None = None):
        self.path = path
        self.rows: list[dict[str, Any]] = list(state["rows"]) if state else []
        # term → (sum, number of steps that had it)
        self.sums: dict[str, tuple[Any, int]] = dict(state["sums"]) if state else {}
        self.seconds: float = state["seconds"] if state else 0.0
        self.clock = time.perf_counter()
        self.unchecked: list[tuple[Sequence[str], dict[str, Tensor]]] = []  # ids and terms of a step
        if self.rows:
            self._save()

    def add(self, ids: Sequence[str], terms: dict[str, Tensor]) -> None:
        """Count the terms of one step, `loss` among them."""
        self.unchecked.append((ids, terms))
        for name, value in terms.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = total + value, count + 1

    def require_finite(self, step: int, run: str) -> None:
        """Refuse a loss that is infinite or not a number, of any step since the last call.

        Args:
            step: the number of steps done.
            run: name of the run, for the sentence.

        Raises:
            UserError: it names the terms and the images.
        """
        first = step - len(self.unchecked) + 1
        finite = torch.stack([terms["loss"] for _, terms in self.unchecked]).isfinite()
        if finite.all():  # one look at the device for all steps
            self.unchecked = []
            return
        at = int((~finite).nonzero()[0])
        ids, terms = self.unchecked[at]
        broken = [name for name, value in terms.items() if name != "loss" and not value.isfinite()]
        images = ", ".join(ids[:NAMED]) + " …" * (len(ids) > NAMED)
        raise UserError(
            f"the loss is no longer finite at step {first + at} of {run}: {', '.join(broken) or 'the sum'} "
            f"on the images {images}; the last checkpoint stays as it is; look at these images, lower "
            "optim.lr or set train.precision to fp32, and train it again with another run name."
        )

    def flush(self, step: int, lr: float) -> dict[str, float]:
        """Write a row and return it."""
        self._count_time()
        row = {"step": step, "lr": lr, "seconds": round(self.seconds, 2)}
        row |= {name: float(total) / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        self.rows.append(row)
        self._save()
        return row

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to write the same file."""
        self._count_time()
        sums = {name: (float(total), count) for name, (total, count) in self.sums.items()}
        return {"rows": list(self.rows), "sums": sums, "seconds": self.seconds}

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def _save(self) -> None:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        write_atomically(self.path, lambda part: self._write(part, names))

    def _write(self, part: Path, names: list[str]) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)


def read_history(path: Path, steps: int) -> dict[str, Any]:
    """The `History.state_dict` of a run whose checkpoint, of an earlier version, has none.

    Its rows are those of the file up to `steps`. A file that cannot be read has no rows.
    """
    try:
        rows: list[dict[str, Any]] = [row for row in history_rows(path) if int(row["step"]) <= steps]
    except UserError:
        rows = []
    return {"rows": rows, "sums": {}, "seconds": float(rows[-1]["seconds"]) if rows else 0.0}


def history_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a history.csv, oldest first; an empty cell is a term that did not count then.

    Raises:
        UserError: it cannot be read, a column is missing, or a cell holds no number.
    """
    columns, rows = read_table(path, "history of a run")
    first = ("step", "seconds")
    lacking = [name for name in first if name not in columns]
    if lacking:
        raise UserError(f"{path}: column '{lacking[0]}' is missing; restore the file or delete it.")
    for number, row in enumerate(rows, start=2):
        for name, text in row.items():
            if not _is_number(text, whole=name == "step") and (text or name in first):
                value = f"{name} is {shown(text)}, no number"
                raise UserError(f"{path}, line {number}: {value}; restore the file or delete it.")
    return rows


def _is_number(text: str, whole: bool) -> bool:
    """Whether a cell holds a step, or a float; the loss of a run that failed may be NaN."""
    with suppress(ValueError):
        return int(text) >= 0 if whole else isinstance(float(text), float)
    return False
