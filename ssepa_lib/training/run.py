"""A run and the folder it is kept in.

A run folder holds `recipe.yaml`, `history.csv`, `state.pt` (to resume; until the run is finished the one
before as well, as `state.previous.pt`), at the end `weights.safetensors`, and what was measured in
`metrics.json`.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ssepa_lib.compose import load_recipe, save_recipe
from ssepa_lib.device import launched, resolve_device
from ssepa_lib.errors import UserError
from ssepa_lib.fields import shown
from ssepa_lib.files import FolderLock, remove_parts, write_atomically, write_json
from ssepa_lib.model.network import Network
from ssepa_lib.readers import parse_json, read_json
from ssepa_lib.recipe import Recipe
from ssepa_lib.training.checkpoint import fingerprint, read_newest, write_checkpoint, write_weights

CURVE, FILM = "curve.csv", "film.npz"  # what a watcher keeps of a run while it is trained
METRICS_FORMAT = 3  # from 3 on, every result carries the checksum of its numbers


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
        self.previous_state = self.path / "state.previous.pt"
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
        except (SafetensorError, OSError):
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
        if not info or info.get("step") != str(recipe.train.steps) or not self.recipe_file.is_file():
            return False
        return self.recipe().hash() == recipe.hash()

    def require(self, recipe: Recipe) -> None:
        """Refuse a folder with a run of another recipe.

        Raises:
            UserError: it holds one.
        """
        begun = any(file.exists() for file in (self.state, self.weights, self.history, self.metrics))
        if begun and self.recipe_file.is_file() and self.recipe().hash() != recipe.hash():
            raise UserError(
                f"{self.path} holds a run of another recipe; choose another run name or remove it."
            )

    def prepare(self, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
        """Create the folder, or read the state to resume from.

        Args:
            resume: False throws away what the folder holds.

        Raises:
            UserError: the folder holds a run of another recipe, final weights without a recipe, or no
                readable state but an unreadable one.
        """
        files = (self.state, self.previous_state, self.weights, self.history, self.metrics)
        if not resume:
            for file in (*files, self.path / CURVE, self.path / FILM):
                file.unlink(missing_ok=True)
        elif self.recipe_file.is_file():
            self.require(recipe)
        elif self.weights.is_file():
            raise UserError(
                f"{self.path} holds weights but no recipe.yaml; restore that file or move the folder away."
            )
        for file in files:
            remove_parts(file)
        save_recipe(recipe, self.recipe_file)
        return read_newest((self.state, self.previous_state), recipe)

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the checkpoint to resume from, with its checksum; the one before stays beside it."""

        def write(part: Path) -> None:
            write_checkpoint(part, state)
            if self.state.is_file():
                os.replace(self.state, self.previous_state)

        write_atomically(self.state, write)

    def save_weights(self, network: Network, recipe: Recipe, step: int) -> None:
        """Write the weights with class names, recipe hash, step and fingerprint in the metadata of the
        file."""
        state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        metadata = {"classes": json.dumps(network.classes), "recipe": recipe.hash(), "step": str(step)}
        metadata["fingerprint"] = fingerprint(state)
        write_atomically(self.weights, lambda part: write_weights(part, state, metadata))
        self.previous_state.unlink(missing_ok=True)

    def adopt_evaluation_settings(self, recipe: Recipe) -> None:
        """Give a finished run the evaluation settings and folders of this recipe; its name stays."""
        old = self.recipe()
        if launched()[0] == 0 and old != replace(recipe, name=old.name):
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
            metadata, classes = self._metadata()
            state = load_file(self.weights)
            blank = replace(recipe, model=replace(recipe.model, weights="none"))
            network = Network(blank, classes)
            own = network.state_dict()
            for name, tensor in state.items():  # the counters of batch norms are integers
                right = own.get(name, tensor).is_floating_point() == tensor.is_floating_point()
                if not right or not bool(tensor.isfinite().all()):
                    raise ValueError(f"{name} holds {tensor.dtype} or values that are not finite")
            network.load_state_dict(state)
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.weights} does not fit {self.recipe_file} ({reason}); train the run again."
            ) from error
        if metadata.get("fingerprint", fingerprint(state)) != fingerprint(state):
            raise UserError(
                f"{self.weights} is damaged (its checksum differs); restore a copy, or delete it to make it "
                "again from the last checkpoint."
            )
        return network.to(resolve_device(device)).eval(), recipe

    def _metadata(self) -> tuple[dict[str, str], list[str]]:
        """The metadata of the weights, and the class names in it.

        Raises:
            ValueError: there are none, or something else than names.
        """
        with safe_open(self.weights, "pt") as file:
            metadata = file.metadata() or {}
        classes: Any = None
        with suppress(ValueError):
            classes = parse_json(metadata.get("classes", ""))
        whole = isinstance(classes, list) and all(
            isinstance(name, str) and name.strip() and name.isprintable() for name in classes
        )
        if not whole or not 0 < len(set(classes)) == len(classes) < 255:
            raise ValueError("its class names are missing or not a list of names in JSON")
        return metadata, classes

    def read_metrics(self) -> dict[str, dict]:
        """What was measured, split → result of `evaluation.evaluate`; empty where there is nothing.

        Raises:
            UserError: the file is not JSON, has another layout, or was written by a newer version.
        """
        if not self.metrics.exists():
            return {}
        content = read_json(self.metrics, "metrics file")
        remedy = "delete it and evaluate the run again"
        if not isinstance(content, dict):
            raise UserError(f"{self.metrics} is not a metrics file; {remedy}.")
        version = content.pop("format", 1)
        if not isinstance(version, int) or not 1 <= version <= METRICS_FORMAT:
            raise UserError(
                f"{self.metrics} was written by a newer version (format {shown(version)}); update this copy."
            )
        for split, result in content.items():
            if not isinstance(result, dict) or not isinstance(result.get("setting"), dict):
                raise UserError(f"{self.metrics}: 'setting' of {split} is missing; {remedy}.")
            stated = result.pop("checksum", None)
            if (stated is not None or version >= 3) and stated != _checksum(result):
                raise UserError(
                    f"{self.metrics}: the result {split} has been changed since it was measured; {remedy}."
                )
        return content

    def write_metrics(self, split: str, result: dict) -> None:
        """Store the result of one split; other splits stay, and a crash leaves the old file."""
        results = self.read_metrics() | {split: result}
        signed = {name: each | {"checksum": _checksum(each)} for name, each in results.items()}
        write_json(self.metrics, {"format": METRICS_FORMAT} | signed)


def _checksum(result: dict) -> str:
    """16 hex digits over everything that a result says."""
    text = json.dumps(json.loads(json.dumps(result)), sort_keys=True)  # as it is read from a file
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
