"""One finished network, its maps read in several ways: plain, calibrated, propagated, balanced, with HAAF.

Nothing is trained: what differs is the affinity and the calibration at test time. The same calibration is
offered to the plain class activation map, so that a comparison with ToCo is fair.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from ssepa_lib.data import measured_split
from ssepa_lib.device import resolve_device
from ssepa_lib.evaluation.evaluate import evaluate
from ssepa_lib.evaluation.results import MEASURES
from ssepa_lib.recipe import Recipe
from ssepa_lib.training.run import load_run
from ssepa_lib.workbook.studies.haaf_study import PAPER, UNTRAINED

THREE_TIMES = {"balance": True, "iterations": 3}
BALANCED = THREE_TIMES | {"coverage": 0.25}  # as in the recipe ssepa_plus
PROPAGATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "1 iteration": ({"iterations": 1}, "none"),
    "2 iterations": ({"iterations": 2}, "none"),
    "3 iterations": ({"iterations": 3}, "none"),
    "2 iterations, Otsu": ({"iterations": 2}, "otsu"),
    "2 iterations, deflated, Otsu": ({"iterations": 2, "deflate": True}, "otsu"),
    "3 iterations, deflated, Otsu": ({"iterations": 3, "deflate": True}, "otsu"),
    "balanced, 3 iterations": (THREE_TIMES, "none"),
    "balanced, up to 3 iterations": (BALANCED, "none"),
    "balanced, 3 iterations, Otsu": (THREE_TIMES, "otsu"),
}  # name → fields of the affinity, calibration; the first is the paper's


def readings(recipe: Recipe, haaf: bool) -> dict[str, Recipe]:
    """The recipes under which the maps of one network are read, by name.

    Args:
        recipe: that of the network.
        haaf: the network has a HAAF.
    """
    plain = PAPER | UNTRAINED
    found = {"learned affinity": recipe} if recipe.affinity.kind == "learned" else {}
    for name, calibration in (("CAM", "none"), ("CAM, Otsu", "otsu")):
        found[name] = _changed(recipe, plain | {"kind": "none"}, calibration)
    for kind, title in (("mean", "uniform mean"), *((("haaf", "HAAF"),) if haaf else ())):
        for name, (fields, calibration) in PROPAGATIONS.items():
            if fields.get("balance") and recipe.affinity.attention == "logits":
                continue  # a balance needs entries that are not negative
            found[f"{title}, {name}"] = _changed(recipe, plain | {"kind": kind} | fields, calibration)
    return found


def _changed(recipe: Recipe, affinity: dict[str, Any], calibration: str) -> Recipe:
    return replace(
        recipe,
        affinity=replace(recipe.affinity, **affinity),
        losses=replace(recipe.losses, aff=0.0),  # the pairs belong to the learned affinity alone
        cam=replace(recipe.cam, calibrate=calibration),
    )


def compare_readings(
    folder: Path | str,
    split: str = "train",
    *,
    images: int = 0,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Maps and pseudo-labels of a finished run under every reading, single scale, scored in percent.

    Args:
        folder: run folder.
        split, images: see `measured_split`; settings are chosen on the training split.
        progress: called with (readings done, all readings).

    Returns:
        One row per reading: `reading`, the mIoU of the `map` (at the background threshold) and of the
        `pseudo_label` (after PAR), and precision, recall and boundary IoU of the pseudo-label, named as in
        `tables.collect_runs`.

    Raises:
        UserError: the folder holds no finished run, or the split has no masks.
    """
    network, recipe = load_run(folder, device)
    dataset = measured_split(recipe, split, images)
    rows, recipes = [], readings(recipe, network.haaf is not None)
    for name, changed in recipes.items():
        shown = "cam" if changed.affinity.kind == "none" else "refined_cam"
        found = evaluate(
            network, changed, dataset, device=resolve_device(device), outputs=(shown, "pseudo_label")
        )
        row = {"reading": name, "map": found["miou"][shown], "pseudo_label": found["miou"]["pseudo_label"]}
        further = {f"pseudo_label {kind}": found[kind]["pseudo_label"] for kind in MEASURES[1:]}
        rows.append(row | further)
        if progress:
            progress(len(rows), len(recipes))
    return pd.DataFrame(rows)
