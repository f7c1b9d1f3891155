"""Where things lie on disk, anchored once. Every path can be moved by an environment variable."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
PROJECT = PACKAGE.parent  # the project's folder (an editable install)
RECIPES = PACKAGE / "recipes"
NOTEBOOKS = PROJECT / "notebooks"


def results_root() -> Path:
    """Folder for everything that is computed: `SSEPA_RESULTS`, default `results/`."""
    return Path(os.environ.get("SSEPA_RESULTS") or PROJECT / "results")


def voc_root() -> Path:
    """VOC 2012 folder (the one that holds `JPEGImages/`): `VOC_ROOT`, default `data/VOCdevkit/VOC2012`."""
    return Path(os.environ.get("VOC_ROOT") or PROJECT / "data" / "VOCdevkit" / "VOC2012")


def coco_root() -> Path:
    """COCO 2014 folder (the one that holds `annotations/`): `COCO_ROOT`, default `data/coco`."""
    return Path(os.environ.get("COCO_ROOT") or PROJECT / "data" / "coco")


def folder_root() -> str:
    """Folder of your own images (it holds `images/` and `labels.csv`): `FOLDER_ROOT`, empty if not set."""
    root = os.environ.get("FOLDER_ROOT")
    return str(Path(root).resolve()) if root else ""


def weights_root() -> Path:
    """Folder of `<backbone>.safetensors`, read before timm's: `SSEPA_WEIGHTS`, default `data/weights`."""
    return Path(os.environ.get("SSEPA_WEIGHTS") or PROJECT / "data" / "weights")
