"""Where things lie on disk, anchored once. Every path can be moved by an environment variable."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
PROJECT = PACKAGE.parent  # the project's folder (an editable install)
RECIPES = PACKAGE / "recipes"
NOTEBOOKS = PROJECT / "notebooks"


def results_root() -> Path:
    """Folder for everything that is computed: `SSEPA_RESULTS`, default `results/`."""
    return Path(os.environ.get("SSEPA_RESULTS") or PROJECT / "results")


def folder_root() -> str:
    """Folder of your own images (it holds `images/` and `labels.csv`): `FOLDER_ROOT`, empty if not set."""
    root = os.environ.get("FOLDER_ROOT")
    return str(Path(root).resolve()) if root else ""


def weights_root() -> Path:
    """Folder of `<backbone>.safetensors`, read before timm's: `SSEPA_WEIGHTS`, default `data/weights`."""
    return Path(os.environ.get("SSEPA_WEIGHTS") or PROJECT / "data" / "weights")


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
