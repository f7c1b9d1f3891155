"""The questions of FSR's ablations, each as arms: name → recipe overrides on top of `fsr`."""

from typing import Any

FSR_ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "terms": {"unc and cer": {}, "unc only": {"losses.cer": 0.0}, "cer only": {"losses.unc": 0.0}},
    "mask ratio": {f"r = {r}": {"reinforce.mask_ratio": r} for r in (0.1, 0.25, 0.4, 0.55, 0.7)},
    "selection": {s: {"reinforce.selection": s} for s in ("random", "edge", "strict", "loose")},
    "aggregation": {a: {"model.aggregator": a} for a in ("gap", "gmp", "mca")},
    "augmentation": {a: {"reinforce.augmentation": a} for a in ("none", "blur", "solarise", "autoaugment")},
    "views": {v: {"data.views": v} for v in ("toco", "fsr")},
}
