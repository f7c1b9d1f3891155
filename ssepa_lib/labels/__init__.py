"""From tokens to labels.

In come a network, images and image-level labels; out come class activation maps in 0..1 at image size
(`multi_scale_cam`), refined by the patch affinity where a `Refiner` is given, and pseudo-labels per pixel and
per token (`PseudoLabeler`).
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Cams": "cam",
    "MatrixRefiner": "refine",
    "PseudoLabeler": "pseudo_labels",
    "Refiner": "refine",
    "build_refiner": "refine",
    "cam_to_label": "cam",
    "multi_scale_cam": "cam",
    "normalise_cam": "cam",
    "valid_cam": "cam",
}  # imported on first use, so that a worker process of the dense CRF starts without torch

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its file."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
