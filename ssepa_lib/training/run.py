"""A run and the folder it is kept in.

A run folder holds `recipe.yaml`, `history.csv`, `state.pt` (to resume), at the end `weights.safetensors`, and
what was measured in `metrics.json`.
"""

import csv
import hashlib
import json
import os
import pickle  # only to name the exception of an unreadable file
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssepa_lib.compose import load_recipe, save_recipe
from ssepa_lib.device import resolve_device
from ssepa_lib.errors import UserError
from ssepa_lib.files import FolderLock, read_json, write_atomically, write_json
from ssepa_lib.model.network import Network
from ssepa_lib.recipe import Recipe

METRICS_FORMAT = 2


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """16 hex digits that tell weights apart: SHA-256 over names, types, shapes and values, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=256)
def _file_fingerprint(path: Path, size: int, changed: int) -> str | None:
    """`fingerprint` of a file of this size, last changed then (in nanoseconds); None if it is unreadable."""
    try:
        return fingerprint(load_file(path))
    except (SafetensorError, OSError):
        return None


class RunFolder:
    """The files of one run: the only place that knows their names.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.history = self.path / "history.csv"
        self.state = self.path / "state.pt"
        self.weights = self.path / "weights.safetensors"
        self.metrics = self.path / "metrics.json"

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    def recipe(self) -> Recipe:
        """The recipe of the run; old field names are translated.

        Raises:
            UserError: there is none, it cannot be read, or a newer version wrote it.
        """
        return load_recipe(str(self.recipe_file))

    def weights_info(self) -> dict[str, str] | None:
        """Metadata of the final weights (classes, recipe, step); None without a readable file."""
        if not self.weights.is_file():
            return None
        try:
            with safe_open(self.weights, "pt") as file:
                return file.metadata() or {}
        except SafetensorError:
            return None

    def fingerprint(self) -> str | None:
        """`fingerprint` of the final weights; None without a readable file."""
        if not self.weights.is_file():
            return None
        found = self.weights.stat()
        return _file_fingerprint(self.weights.resolve(), found.st_size, found.st_mtime_ns)

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether the folder holds the final weights of this recipe, under today's field names or older
        ones."""
        info = self.weights_info()
        if not info or int(info.get("step", -1)) != recipe.train.steps or not self.recipe_file.is_file():
            return False
        return self.recipe().hash() == recipe.hash()

    def require(self, recipe: Recipe) -> None:
        """Refuse a folder with a run of another recipe.

        Raises:
            UserError: it holds one.
        """
        if self.recipe_file.is_file() and self.recipe().hash() != recipe.hash():
            raise UserError(
                f"{self.path} holds a run of another recipe; choose another run name or remove it."
            )

    def prepare(self, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
        """Create the folder, or read the state to resume from.

        Args:
            resume: False throws away what the folder holds.

        Raises:
            UserError: the folder holds a run of another recipe, final weights without a recipe, or an
                unreadable state.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume:
            for file in (self.state, self.weights, self.history, self.metrics):
                file.unlink(missing_ok=True)
        elif self.recipe_file.is_file():
            self.require(recipe)
        elif self.weights.is_file():
            raise UserError(
                f"{self.path} holds weights but no recipe.yaml; restore that file or move the folder away."
            )
        save_recipe(recipe, self.recipe_file)
        if not self.state.is_file():
            return None
        try:
            return torch.load(self.state, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{self.state} cannot be read; remove it to train this run again from the start."
            ) from error

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the checkpoint to resume from."""
        write_atomically(self.state, lambda part: torch.save(state, part))

    def save_weights(self, network: Network, recipe: Recipe, step: int) -> None:
        """Write the weights with class names, recipe hash and step in the metadata of the file."""
        state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        metadata = {"classes": json.dumps(network.classes), "recipe": recipe.hash(), "step": str(step)}
        write_atomically(self.weights, lambda part: save_file(state, part, metadata))

    def adopt_evaluation_settings(self, recipe: Recipe) -> None:
        """Give a finished run the evaluation settings and folders of this recipe; its name stays."""
        old = self.recipe()
        first = not int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
        if first and old != replace(recipe, name=old.name):
            save_recipe(replace(recipe, name=old.name), self.recipe_file)

    def load(self, device: str = "auto") -> tuple[Network, Recipe]:
        """The trained network in evaluation mode, and its recipe.

        Raises:
            UserError: the folder holds no finished run, or its files do not fit each other.
        """
        if not self.weights.is_file():
            raise UserError(
                f"{self.path} holds no finished run; train it first (notebook 03, or `ssepa_lib train`)."
            )
        recipe = self.recipe()
        try:
            with safe_open(self.weights, "pt") as file:
                classes = json.loads(file.metadata()["classes"])
            blank = replace(recipe, model=replace(recipe.model, weights="none"))
            network = Network(blank, classes)
            network.load_state_dict(load_file(self.weights))
        except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.weights} does not fit {self.recipe_file} ({reason}); train the run again."
            ) from error
        return network.to(resolve_device(device)).eval(), recipe

    def read_metrics(self) -> dict[str, dict]:
        """What was measured, split → result of `evaluation.evaluate`; empty where there is nothing.

        Raises:
            UserError: the file is not JSON, has another layout, or was written by a newer version.
        """
        if not self.metrics.is_file():
            return {}
        content = read_json(self.metrics, "metrics file")
        remedy = "delete it and evaluate the run again"
        if not isinstance(content, dict):
            raise UserError(f"{self.metrics} is no metrics file; {remedy}.")
        version = content.pop("format", 1)
        if not isinstance(version, int) or version > METRICS_FORMAT:
            raise UserError(
                f"{self.metrics} was written by a newer version (format {version}); update this copy."
            )
        for split, result in content.items():
            if not isinstance(result, dict) or not isinstance(result.get("setting"), dict):
                raise UserError(f"{self.metrics}: 'setting' of {split} is missing; {remedy}.")
        return content

    def write_metrics(self, split: str, result: dict) -> None:
        """Store the result of one split; other splits stay, and a crash leaves the old file."""
        write_json(self.metrics, {"format": METRICS_FORMAT} | self.read_metrics() | {split: result})


def find_finished(recipe: Recipe, folder: Path) -> Path:
    """`folder`, unless a finished run beside it is of the same recipe; what cannot be read is another's."""
    if RunFolder(folder).is_finished(recipe):
        return folder
    for beside in sorted(folder.parent.glob("*/")) if folder.parent.is_dir() else []:
        with suppress(UserError):  # for example the recipe of a newer version
            if RunFolder(beside).is_finished(recipe):
                return beside
    return folder


def find_run(recipe: Recipe, folder: Path) -> Path:
    """`find_finished`, or a run of the same recipe beside `folder` that another process is training."""
    found = find_finished(recipe, folder)
    if RunFolder(found).is_finished(recipe):
        return found
    for run in map(RunFolder, sorted(folder.parent.glob("*/"))):
        with suppress(UserError):
            if (
                FolderLock(run.path).taken
                and run.recipe_file.is_file()
                and run.recipe().hash() == recipe.hash()
            ):
                return run.path
    return folder


def load_run(run_dir: Path | str, device: str = "auto") -> tuple[Network, Recipe]:
    """`RunFolder.load`."""
    return RunFolder(run_dir).load(device)


class History:
    """history.csv: one row every `log_every` steps; per term the mean over the steps since the last row that
    had it.

    Args:
        path: the file; rows of it up to step `start` are kept.
    """

    def __init__(self, path: Path, start: int):
        self.path = path
        self.sums: dict[str, tuple[Any, int]] = {}  # term → (sum, number of steps that had it)
        rows = []
        if path.is_file():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        self.rows: list[dict[str, Any]] = [row for row in rows if int(row["step"]) <= start]
        self.seconds = float(self.rows[-1]["seconds"]) if self.rows else 0.0
        self.clock = time.perf_counter()

    def add(self, terms: dict[str, Tensor]) -> None:
        """Count the terms of one step."""
        for name, value in terms.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = total + value, count + 1

    def flush(self, step: int, lr: float) -> dict[str, float]:
        """Write a row and return it."""
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now
        row = {"step": step, "lr": lr, "seconds": round(self.seconds, 2)}
        row |= {name: float(total) / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        self.rows.append(row)
        names = list(dict.fromkeys(name for r in self.rows for name in r))
        write_atomically(self.path, lambda part: self._write(part, names))
        return row

    def _write(self, part: Path, names: list[str]) -> None:
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
