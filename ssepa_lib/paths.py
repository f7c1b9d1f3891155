"""Where things lie on disk, anchored once. Every path can be moved by an environment variable."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssepa_lib.errors import UserError

PACKAGE = Path(__file__).resolve().parent
PROJECT = PACKAGE.parent  # the project's folder (an editable install)
RECIPES = PACKAGE / "recipes"
NOTEBOOKS = PROJECT / "notebooks"


def results_root() -> Path:
    """Folder for everything that is computed: `SSEPA_RESULTS`, default `results/`.

    Raises:
        UserError: there is a file of that name.
    """
    return _folder(Path(os.environ.get("SSEPA_RESULTS") or PROJECT / "results"), "SSEPA_RESULTS")


def _folder(path: Path, variable: str) -> Path:
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{path} is not a folder; set {variable} to a folder.")
    return path


def plain_name(what: str, name: str) -> str:
    """`name`, if it can be a folder directly below another one: no path, no `..`, no hidden folder.

    Args:
        what: what it names, for the error, for example "run_name".

    Raises:
        UserError: it cannot.
    """
    if not re.fullmatch(r"\w[^/\\\x00-\x1f\x7f]{0,199}", name):
        raise UserError(f"{what} '{name}' is not a plain folder name; use letters, digits, '-' and '_'.")
    return name


def folder_root() -> str:
    """Folder of your own images (it holds `images/` and `labels.csv`): `FOLDER_ROOT`, empty if not set."""
    root = os.environ.get("FOLDER_ROOT")
    return str(Path(root).resolve()) if root else ""


def weights_root() -> Path:
    """Folder of `<backbone>.safetensors`, read before timm's: `SSEPA_WEIGHTS`, default `data/weights`."""
    return _folder(Path(os.environ.get("SSEPA_WEIGHTS") or PROJECT / "data" / "weights"), "SSEPA_WEIGHTS")


@contextmanager
def variables_set(**values: str) -> Iterator[None]:
    """Environment variables that processes started meanwhile inherit; put back afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
