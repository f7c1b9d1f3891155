"""The notebooks as files: their order, their parameters, and what may be injected into them.

papermill only warns about a misspelt parameter and injects a value of any type, so names and types are
checked here against the notebook's `parameters` cell. It has no notion of dependence or cost either, so each
notebook names what it needs and trains in its metadata: `{"ssepa": {"needs": [...], "trains": [...]}}`.
"""

import ast
import json
import math
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssepa_lib.errors import UserError
from ssepa_lib.fields import shown
from ssepa_lib.files import write_text
from ssepa_lib.paths import NOTEBOOKS, PROJECT
from ssepa_lib.readers import parse_yaml

_BROKEN = (
    OSError,
    ValueError,
    AttributeError,
    KeyError,
    TypeError,
    RecursionError,
)  # what a broken one raises


@dataclass(frozen=True)
class Notebook:
    """One `NN_topic.ipynb`.

    Attributes:
        needs: names of the notebooks it needs.
        trains: the runs it makes; see `plan.notebook_jobs`.
        parameters: name → default, a literal.
        comments: name → what its parameters cell says about it.
    """

    path: Path
    needs: tuple[str, ...]
    trains: tuple[dict, ...]
    parameters: dict[str, Any]
    comments: dict[str, str]

    @property
    def name(self) -> str:
        """`NN_topic`."""
        return self.path.stem


def read_parameters(path: Path, cells: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Defaults (literals) and comments of the one cell tagged `parameters`, by name.

    Raises:
        UserError: there is not exactly one such cell, or it holds more than assignments of literals.
    """
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise UserError(f"{path.name} has {len(tagged)} cells tagged 'parameters'; tag exactly one.")
    defaults = {}
    try:
        statements = ast.parse(tagged[0]["source"]).body
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path.name}: its parameters cell is not Python ({error}); correct it.") from error
    for statement in statements:
        try:
            (target,) = statement.targets
            defaults[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError) as error:
            line = statement.lineno
            raise UserError(
                f"{path.name}: line {line} of its parameters cell is not `name = literal`."
            ) from error
    comments = re.findall(r"^(\w+) = .*?  # (.*)$", tagged[0]["source"], re.M)
    return defaults, dict(comments)


def discover(folder: Path = NOTEBOOKS) -> list[Notebook]:
    """All notebooks `NN_topic.ipynb` of a folder in the order in which they can run."""
    import nbformat

    waiting = []
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        try:
            content = nbformat.read(path, as_version=4)
            own = content.metadata.get("ssepa", {})
            needs, trains = tuple(own.get("needs", ())), tuple(own.get("trains", ()))
        except (*_BROKEN, nbformat.ValidationError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is not a notebook ({reason}); restore it with git checkout.") from error
        waiting.append(Notebook(path, needs, trains, *read_parameters(path, content.cells)))
    if not waiting:
        raise UserError(f"no notebook NN_topic.ipynb in {folder}; run from a complete checkout.")
    ordered: list[Notebook] = []
    while waiting:
        done = {n.name for n in ordered}
        ready = next((n for n in waiting if done.issuperset(n.needs)), None)
        if ready is None:
            stuck = ", ".join(n.name for n in waiting)
            raise UserError(
                f"notebooks {stuck} need a missing one or each other; correct their 'needs' metadata."
            )
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


def select(
    notebooks: Sequence[Notebook], only: Sequence[str] = (), start: str | None = None
) -> list[Notebook]:
    """Notebooks named in `only` (number or name; empty: all), from `start` on."""

    def position(key: str) -> int:
        for i, notebook in enumerate(notebooks):
            if key in (notebook.name, notebook.name.split("_")[0], notebook.path.name):
                return i
        raise UserError(f"there is no notebook '{key}'; choose among {', '.join(n.name for n in notebooks)}.")

    wanted = {position(key) for key in only} or set(range(len(notebooks)))
    first = 0 if start is None else position(start)
    return [notebook for i, notebook in enumerate(notebooks) if i in wanted and i >= first]


def coerce(name: str, value: Any, default: Any) -> Any:
    """`value` (text from a command line, or a Python value) as the type of `default`.

    Raises:
        UserError: it is not one.
    """
    kind = type(default)
    if isinstance(value, str) and kind is dict:
        with suppress(ValueError):
            value = parse_yaml(value)
    elif isinstance(value, str) and kind is not str:
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):  # what deep nesting raises
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if kind in (list, tuple):
        value = list(value) if isinstance(value, (list, tuple)) else [value]
        return [coerce(f"an item of {name}", item, default[0]) if default else item for item in value]
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(
            f"parameter {name} is {shown(value)}, but it must be of type {kind.__name__} (default "
            f"{default!r})."
        )
    return value


def check_parameters(
    notebooks: Sequence[Notebook], given: Mapping[str, Any], others: Sequence[Notebook] = ()
) -> dict[str, dict[str, Any]]:
    """What to inject into each notebook, name of the notebook → its parameters.

    Args:
        notebooks: those that are selected.
        others: further notebooks, in which an unknown parameter is looked for.

    Raises:
        UserError: a name that no selected notebook knows, or a wrong type.
    """
    known = sorted({name for notebook in notebooks for name in notebook.parameters})
    for name in given:
        if name not in known:
            owners = [each.name for each in others if name in each.parameters]
            if owners:
                raise UserError(
                    f"parameter '{name}' belongs to {', '.join(owners)}, not to "
                    f"{', '.join(each.name for each in notebooks)}; drop it or select another notebook."
                )
            choices = ", ".join(known)
            raise UserError(f"no selected notebook has a parameter '{name}'; choose among {choices}.")
    values = {}
    for notebook in notebooks:
        defaults = notebook.parameters
        names = [name for name in given if name in defaults]
        values[notebook.name] = {name: coerce(name, given[name], defaults[name]) for name in names}
    return values


def folder_variables() -> list[str]:
    """The environment variables that name folders of data or weights."""
    from ssepa_lib.data import DATASETS  # here, because the help of the command line does without data

    return ["SSEPA_WEIGHTS", *(dataset.root_variable for dataset in DATASETS.values())]


def forget_places(copy: Path, results: Path) -> None:
    """Take the folders of this machine, and with them user and host, out of an executed notebook.

    Args:
        copy: the notebook; nothing happens if it cannot be read.
        results: folder of everything computed, from now on `results`.
    """
    places = {Path(os.environ[name]).resolve(): name for name in folder_variables() if os.environ.get(name)}
    places |= {Path.home(): "~", Path(sys.prefix): "<python>", PROJECT: ".", results: "results"}
    try:
        content = json.loads(copy.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # its kernel has not even started
        return
    for name in ("input_path", "output_path"):
        content.get("metadata", {}).get("papermill", {}).pop(name, None)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    for place in sorted(places, key=lambda each: -len(str(each))):
        if place != Path(place.root):
            text = text.replace(json.dumps(str(place), ensure_ascii=False)[1:-1], places[place])
    text = text.replace(f" on {socket.gethostname()} since ", " on <host> since ")  # of a lock
    write_text(copy, f"{text}\n")


def describe_parameters(notebooks: Sequence[Notebook]) -> str:
    """Every parameter with its default, its comment and the numbers of the notebooks that have it so."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for notebook in notebooks:
        for name, default in notebook.parameters.items():
            key = (name, repr(default), notebook.comments.get(name, ""))
            found.setdefault(key, []).append(notebook.name.split("_")[0])
    lines = []
    for (name, default, comment), numbers in sorted(found.items()):
        lines.append(f"  {f'{name}={default}':24} {comment} ({', '.join(numbers)})")
    return "\n".join(lines)
