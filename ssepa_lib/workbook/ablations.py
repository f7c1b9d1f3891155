"""What is compared with what: a method with the one it extends, FSR's arms with FSR, backbones."""

from collections.abc import Sequence
from typing import Any

from ssepa_lib.errors import UserError

BASE = "toco"
COMPARED = {
    "ssepa_affinity": BASE,
    "ssepa": "ssepa_affinity",
    "ssepa_plus_mean": "ssepa_affinity",
    "ssepa_plus": "ssepa",
}  # method → the method it extends
ALSO = {"ssepa_plus": "ssepa_plus_mean"}  # method → another one that differs from it in HAAF alone
FSR_ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "terms": {"unc and cer": {}, "unc only": {"losses.cer": 0.0}, "cer only": {"losses.unc": 0.0}},
    "mask ratio": {f"r = {r}": {"reinforce.mask_ratio": r} for r in (0.1, 0.25, 0.4, 0.55, 0.7)},
    "selection": {s: {"reinforce.selection": s} for s in ("random", "edge", "strict", "loose")},
    "aggregation": {a: {"model.aggregator": a} for a in ("gap", "gmp", "mca")},
    "augmentation": {a: {"reinforce.augmentation": a} for a in ("none", "blur", "solarise", "autoaugment")},
    "views": {v: {"data.views": v} for v in ("toco", "fsr")},
}
"""Question → arm → recipe overrides on top of `fsr`."""
MICRO = {"ViT": "", "Swin": "/swin_micro", "EfficientFormer": "/efficientformer_micro"}
"""The backbones of the built-in data: family → what is added to the name of a method."""


def base_of(method: str, methods: Sequence[str]) -> str | None:
    """The method that another one is compared with, among those that were run; None for ToCo itself.

    A method that `COMPARED` does not name is compared with ToCo, one that is composed (`fsr+ssepa_plus`) with
    its last part.
    """
    if method in (BASE, "ssepa_no_affinity"):
        return None
    wanted = method.rpartition("+")[2] if "+" in method else COMPARED.get(method, BASE)
    return next((name for name in (wanted, BASE) if name in methods), None)


def chosen_arms(questions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The arms of some questions of FSR_ARMS, after the method as it is, whose name is empty.

    Raises:
        UserError: a question is unknown.
    """
    for name in questions:
        if name not in FSR_ARMS:
            raise UserError(f"--arms is '{name}'; choose one or more of {', '.join(FSR_ARMS)}.")
    return {"": {}} | {arm: own for name in questions for arm, own in FSR_ARMS[name].items()}
