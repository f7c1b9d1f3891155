"""Checkpoints that can be trusted: written with a checksum, and read only if they are whole and of this
recipe."""

import errno
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ssepa_lib.errors import UserError
from ssepa_lib.recipe import Recipe

_log = logging.getLogger(__name__)


def fingerprint(content: Any) -> str:
    """16 hex digits that tell weights, or any nested tensors and numbers, apart.

    SHA-256 over names, types, shapes and values; the order of names and the memory layout do not count.
    """
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.flatten().view(torch.uint8).numpy())
        elif isinstance(value, Mapping):
            for name in sorted(value, key=str):
                digest.update(f"{name!r}: ".encode())
                add(value[name])
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)} of ".encode())
            for each in value:
                add(each)
        else:
            digest.update(f"{value!r} ".encode())

    add(content)
    return digest.hexdigest()[:16]


def write_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Write nested tensors and numbers with their checksum."""
    with _disk_errors(), file.open("wb") as opened:
        torch.save(state | {"checksum": fingerprint(state)}, opened)


def write_weights(file: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file."""
    file.write_bytes(save(state, metadata))


def read_newest(files: Sequence[Path], recipe: Recipe) -> dict[str, Any] | None:
    """The first checkpoint that is whole and of this recipe; None where there is no file at all.

    Args:
        files: the newest first; a message is logged about those that are skipped, and the one that is read
            takes the place of the first.

    Raises:
        UserError: there are only others; the sentence says what is wrong with each.
    """
    problems = []
    for file in filter(Path.is_file, files):
        try:
            state = _read(file, recipe)
        except ValueError as error:
            problems.append(f"{file.name} {error}")
            continue
        if problems:
            said = f"{file.parent}: {'; '.join(problems)}; resuming from {file.name}"
            _log.warning("%s at step %d.", said, state["index"])
        if file != files[0]:  # otherwise the next checkpoint would push a damaged one onto this one
            os.replace(file, files[0])
        return state
    if problems:
        raise UserError(
            f"{files[0].parent}: {'; '.join(problems)}; remove what is named to train this run again from "
            "the start."
        )
    return None


def _read(file: Path, recipe: Recipe) -> dict[str, Any]:
    """A checkpoint of this recipe.

    Raises:
        ValueError: it is none; the message completes the sentence "state.pt …".
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything, and a file that holds code does as well
        raise ValueError("cannot be read") from error
    if not isinstance(state, dict):
        raise ValueError("is no checkpoint")
    checksum = state.pop("checksum", None)  # none in earlier versions
    if checksum is not None and checksum != fingerprint(state):
        raise ValueError("is damaged (its checksum differs)")
    for name in ("index", "network", "optimizer", "scheduler", "objectives"):
        if name not in state:
            raise ValueError(f"lacks '{name}'")
    if state.get("recipe", recipe.hash()) != recipe.hash():
        raise ValueError("belongs to another recipe")
    index, steps = state["index"], recipe.train.steps
    if type(index) is not int or not 0 <= index <= steps:
        raise ValueError(f"says that {index!r} of {steps} steps are done")
    return state


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Give the failures of torch to write a file the type that others have."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        code = cause.errno if cause else errno.EIO
        raise OSError(code, os.strerror(code)) from error
