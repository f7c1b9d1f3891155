"""Results: their columns, the setting that belongs to every number, what is still valid, what is stored.

A column is an output under a test-time mode, such as `segmentation_ms`. A number means nothing without its
`setting`: the dataset, split, number of images and size, the training, and per column the scales, flip and
CRF.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ssepa_lib.data import SegmentationDataset
from ssepa_lib.device import describe_device
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.provenance import commit, training_settings, versions
from ssepa_lib.fields import shown
from ssepa_lib.recipe import Recipe
from ssepa_lib.training.run import RunFolder

MAPS = ("cam", "aux_cam", "refined_cam")
OUTPUTS = (*MAPS, "pseudo_label", "segmentation")
TEST_TIME = {"single": "", "ms": "_ms", "ms_crf": "_ms_crf"}  # mode → what it adds to an output's name
MEASURES = ("miou", "precision", "recall", "boundary_iou")  # one number per column, percent

_WORDS = {
    "cam": "CAM",
    "aux_cam": "auxiliary CAM",
    "refined_cam": "refined CAM",
    "pseudo_label": "pseudo-label",
    "mean_average_precision": "mAP",
    "boundary_iou": "boundary IoU",
}  # of an output or a measure; others are called what they are
_MODES = {"single": "", "ms": ", MS", "ms_crf": ", MS + CRF"}

_RESULT = {"setting", *MEASURES, "per_class", "threshold_curve", "mean_average_precision"}
_SETTING = {
    **dict.fromkeys(("data", "split", "method", "backbone"), str),
    **dict.fromkeys(("images", "size", "seed", "steps", "batch"), int),
    "outputs": dict,
}


def require_known(name: str, values: Sequence[str], allowed: Collection[str]) -> None:
    """Raise a UserError that names the first value which is not allowed."""
    for value in values:
        if value not in allowed:
            raise UserError(f"{name} '{value}' is unknown; choose from {', '.join(allowed)}.")


def column_names(outputs: Sequence[str], test_time: Sequence[str]) -> list[str]:
    """Names of the columns of a result, such as `segmentation_ms`; maps have no CRF.

    Raises:
        UserError: an unknown output or test-time mode.
    """
    require_known("outputs", outputs, OUTPUTS)
    require_known("test_time", test_time, TEST_TIME)
    return [
        output + suffix
        for mode, suffix in TEST_TIME.items()
        if mode in test_time
        for output in outputs
        if not (mode == "ms_crf" and output in MAPS)
    ]


def heading(column: str) -> str:
    """A column in words, as tables and figures have it: `segmentation, MS + CRF`; `pseudo-label, recall`."""
    name, _, measure = column.partition(" ")
    output, mode = split_column(name)
    words = _WORDS.get(output, output) + _MODES[mode]
    return f"{words}, {_WORDS.get(measure, measure)}" if measure else words


def split_column(column: str) -> tuple[str, str]:
    """Output and test-time mode of a column."""
    for mode in ("ms_crf", "ms"):
        if column.endswith(TEST_TIME[mode]):
            return column.removesuffix(TEST_TIME[mode]), mode
    return column, "single"


def build_setting(
    recipe: Recipe,
    dataset: SegmentationDataset,
    device: torch.device,
    columns: Sequence[str],
    weights: str,
    pixels: str,
) -> dict[str, Any]:
    """Everything a number depends on, ready for JSON.

    Args:
        weights: `training.run.fingerprint` of the network.
        pixels: `Pixels.fingerprint` of the images, labels and masks.
    """
    parts = recipe.name.split("/")
    composed = len(parts) in (2, 3) and not recipe.name.endswith((".yaml", ".yml"))
    return {
        "data": dataset.name,
        "split": dataset.split,
        "images": len(dataset),
        "size": recipe.data.eval_size,
        "recipe": recipe.name if composed else Path(recipe.name).name,  # no folder of this machine
        "method": parts[1] if composed else Path(recipe.name).stem,
        "affinity": recipe.affinity.kind,
        "haaf_objective": recipe.affinity.haaf_objective,
        "background": recipe.cam.background,
        "seed": recipe.train.seed,
        "steps": recipe.train.steps,
        "batch": recipe.data.batch,
        "backbone": recipe.model.backbone,
        "device": describe_device(device),
        "recipe_hash": recipe.hash(),
        "training": training_settings(recipe),
        "weights": weights,
        "pixels": pixels,
        "versions": versions(),
        "commit": commit(),
        "outputs": {column: _view(column, recipe) for column in columns},
    }


def _view(column: str, recipe: Recipe) -> dict[str, Any]:
    """Scales, flip and CRF of one column."""
    output, mode = split_column(column)
    if mode == "single":
        return {"scales": [1.0], "flip": False, "crf": False}
    several = recipe.eval if output == "segmentation" else recipe.cam
    return {"scales": list(several.scales), "flip": several.flip, "crf": mode == "ms_crf"}


def current_columns(result: dict, recipe: Recipe, images: int, weights: str | None = None) -> set[str]:
    """Columns of a stored result that an evaluation of the recipe would give again.

    The training, number of images, size and background threshold must be the recipe's, for a column also
    its scales, flip and CRF.

    Args:
        weights: fingerprint of the weights there are; a result that was measured on others has no columns.
            None, or a result of an earlier version, which has no fingerprint: not compared.
    """
    setting = result["setting"]
    if weights is not None and setting.get("weights", weights) != weights:
        return set()
    now = {
        "recipe_hash": recipe.hash(),
        "images": images,
        "size": recipe.data.eval_size,
        "background": recipe.cam.background,
    }
    if any(setting.get(name) != value for name, value in now.items()):
        return set()
    views = setting["outputs"]  # without those outputs that the recipe does not have, whose mIoU is None
    return {column for column in result["miou"] if views.get(column) in (None, _view(column, recipe))}


def merge_results(known: dict, new: dict) -> dict:
    """A result with the columns of both; of a column that both have, the new one stays."""
    merged = dict(new)
    for part in (*MEASURES, "per_class", "threshold_curve"):
        merged[part] = known[part] | new[part]
    outputs = known["setting"]["outputs"] | new["setting"]["outputs"]
    return merged | {"setting": new["setting"] | {"outputs": outputs}}


def result_name(split: str, images: int | None, size: int | None) -> str:
    """Key of a result: `val`, or for example `val (10 images, native size)` where it is not the recipe's own.

    Args:
        images: number of images; None: as many as the recipe says.
        size: side in pixels, 0 for the native size; None: as the recipe says.
    """
    notes = [] if images is None else [f"{images} images"]
    if size is not None:
        notes.append(describe_size(size))
    return f"{split} ({', '.join(notes)})" if notes else split


def describe_size(size: int) -> str:
    """`448²`, or `native size` for 0."""
    return f"{size}²" if size else "native size"


def describe_view(view: dict) -> str:
    """Scales, flip and CRF of a column in words, such as `scales 1/1.25/1.5 + flip + CRF`."""
    scales = "/".join(f"{scale:g}" for scale in view["scales"])
    parts = [f"scale{'s' * (len(view['scales']) > 1)} {scales}"]
    return " + ".join(parts + ["flip"] * view["flip"] + ["CRF"] * view["crf"])


def describe_setting(setting: dict, column: str) -> str:
    """One line to stand beside a number: `voc val, 1449 images, 448², scale 1, 2000 steps of 4, seed 0`."""
    parts = [
        f"{setting['data']} {setting['split']}",
        f"{setting['images']} images",
        describe_size(setting["size"]),
        describe_view(setting["outputs"][column]),
        f"{setting['steps']} steps of {setting['batch']}",
        f"seed {setting['seed']}",
    ]
    return ", ".join(parts)


def describe_settings(settings: Sequence[dict], columns: Sequence[str]) -> list[str]:
    """`describe_setting` once per kind of view, with the columns it belongs to.

    Args:
        settings: of results that differ in seed or method alone; a column is looked up in the first that
            has it.
    """
    lines: dict[str, tuple[str, list[str]]] = {}
    for column in columns:
        setting = next((s for s in settings if column in s["outputs"]), None)
        if setting:
            view = describe_view(setting["outputs"][column])
            lines.setdefault(view, (describe_setting(setting, column), []))[1].append(column)
    return [f"{', '.join(names)}: {line}" for line, names in lines.values()]


def convert_result(result: dict) -> dict:
    """A stored result in today's layout.

    In format 1 the setting said `products` and `supervision`, and mIoU was the only measure: the others are
        None.

    Raises:
        ValueError: something is missing.
    """
    setting = dict(result["setting"])
    if "products" in setting:
        renamed = {"products": "outputs", "supervision": "haaf_objective"}
        setting = {renamed.get(name, name): value for name, value in setting.items()}
        unknown = dict.fromkeys(result.get("miou", {}))
        result = {"precision": unknown, "recall": unknown, "boundary_iou": unknown} | result
    result = result | {"setting": setting}
    lacking = (_RESULT - result.keys()) or (_SETTING - setting.keys())
    if lacking:
        raise ValueError(f"'{min(lacking)}' is missing")
    _check_setting(setting)
    _check_numbers(result)
    return result


def _check_setting(setting: dict) -> None:
    for name, kind in _SETTING.items():
        value = setting[name]
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
            raise ValueError(f"'{name}' is {shown(value)}")
    for column, view in setting["outputs"].items():
        whole = isinstance(view, dict) and all(isinstance(view.get(name), bool) for name in ("flip", "crf"))
        if not whole or not isinstance(view.get("scales"), list) or not all(map(_is_number, view["scales"])):
            raise ValueError(f"'outputs' of {column} is {shown(view)}")


def _check_numbers(result: dict) -> None:
    """Every number is a percentage, or None where an output does not exist."""
    curves = {name: values for name, values in result["threshold_curve"].items() if name != "thresholds"}
    tables = [(name, result[name]) for name in MEASURES]
    tables += [(f"per_class of {name}", values) for name, values in result["per_class"].items()]
    tables += [(f"threshold_curve of {name}", dict(enumerate(values))) for name, values in curves.items()]
    tables += [("mean_average_precision", {"": result["mean_average_precision"]})]
    for name, values in tables:
        for column, value in values.items():
            if value is not None and not (_is_number(value) and 0 <= value <= 100.001):
                raise ValueError(f"'{name}' {column} is {shown(value)}, not a percentage")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_all_results(folders: Iterable[Path]) -> tuple[dict[Path, dict[str, dict]], list[str]]:
    """`read_results` of several runs; one that cannot be read does not keep the others from being read.

    Returns:
        Run folder → its results, and one sentence per run that is left out.
    """
    found, problems = {}, []
    for folder in folders:
        try:
            found[folder] = read_results(folder)
        except UserError as error:
            problems.append(f"left out: {error}")
    return found, problems


def read_results(run_dir: Path | str) -> dict[str, dict]:
    """A run's `metrics.json` in today's layout, name → result of `evaluate`; empty where there is none.

    Raises:
        UserError: see `RunFolder.read_metrics`, or an entry is missing.
    """
    run = RunFolder(run_dir)
    results = {}
    for name, result in run.read_metrics().items():
        try:
            results[name] = convert_result(result)
        except (ValueError, TypeError, AttributeError) as error:  # a text where a table belongs, for example
            raise UserError(
                f"{run.metrics}: {error} in the result '{name}'; delete the file and evaluate the run again."
            ) from error
    return results
