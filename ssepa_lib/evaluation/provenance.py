"""Where a number comes from: the versions, the commit, the settings of the training and the pixels."""

import hashlib
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from torch import Tensor

from ssepa_lib.paths import PROJECT
from ssepa_lib.recipe import Recipe

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a number depends on, by name."""
    return {"python": python_version()} | {name: version(name) for name in PACKAGES}


@cache
def commit() -> str:
    """The commit of this copy, with `-dirty` where tracked files have changed; `unknown` without git."""
    asked = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--exclude=*"]
    if not (PROJECT / ".git").exists():  # an outer repository would answer for this one
        return "unknown"
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def training_settings(recipe: Recipe) -> dict[str, Any]:
    """`Recipe.identity` without the folders of this machine."""
    settings = {section: dict(values) for section, values in recipe.identity().items()}
    settings.get("data", {}).pop("root", None)
    model = settings.get("model", {})
    if "weights" in model:
        model["weights"] = Path(model["weights"]).name
    return settings


class Pixels:
    """A fingerprint of images, labels and masks as the network and the scores meet them, in order."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def add(self, name: str, *tensors: Tensor) -> None:
        """Count one image; the tensors are its input, label and mask."""
        self.digest.update(name.encode())
        for tensor in tensors:
            self.digest.update(f" {tensor.dtype} {tuple(tensor.shape)}".encode())
            self.digest.update(tensor.cpu().contiguous().numpy())

    def fingerprint(self) -> str:
        """16 hex digits."""
        return self.digest.hexdigest()[:16]
