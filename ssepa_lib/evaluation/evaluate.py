"""Evaluate a network on a split with masks; evaluate a finished run once, column by column."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssepa_lib.data import SegmentationDataset, measured_split
from ssepa_lib.device import cores, resolve_device
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.inference import Prediction, Progress, infer
from ssepa_lib.evaluation.multiscale import top_class
from ssepa_lib.evaluation.provenance import Pixels
from ssepa_lib.evaluation.results import (
    MAPS,
    OUTPUTS,
    build_setting,
    column_names,
    current_columns,
    merge_results,
    read_results,
    result_name,
    split_column,
)
from ssepa_lib.evaluation.scores import (
    BoundaryIoU,
    Confusion,
    ThresholdConfusion,
    boundary_band,
    mean_average_precision,
)
from ssepa_lib.files import FolderLock, remove_parts
from ssepa_lib.labels.crf import crf_pool
from ssepa_lib.labels.refine import Refiner
from ssepa_lib.model.network import Network
from ssepa_lib.recipe import Recipe
from ssepa_lib.training.run import RunFolder, fingerprint

THRESHOLDS = tuple(i / 10 for i in range(1, 10))


def evaluate(
    network: Network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    *,
    device: torch.device | str,
    outputs: Sequence[str] = OUTPUTS,
    test_time: Sequence[str] = ("single",),
    processes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a network on a split with masks.

    Images are resized to `data.eval_size`² (0: native size, one by one); every map is resized to its mask's
    original size before it is compared. CAMs are multiplied by the image-level labels, as everywhere in
    this field, and cut at `cam.background`. The pseudo-label is the single-threshold label after
    pixel-adaptive refinement of the affinity-refined CAM, or of the plain CAM in a recipe without affinity.

    Args:
        outputs: any of `cam`, `aux_cam`, `refined_cam`, `pseudo_label`, `segmentation`.
        test_time: any of `single` (scale 1), `ms` (several scales and flip: `cam.scales` for maps and
            pseudo-labels, `eval.scales` for the segmentation) and `ms_crf` (dense CRF after `ms`; for
            pseudo-labels it takes the place of the pixel-adaptive refinement; maps have none). Every mode
            is a column of its own: `pseudo_label`, `pseudo_label_ms`, `pseudo_label_ms_crf`.
        processes: worker processes of the dense CRF; None: one per CPU core.
        progress: called with (images done, all images).

    Returns:
        `setting`; per column `miou`, `precision`, `recall` and `boundary_iou` (percent, None where the
        output does not exist; see `scores`); `per_class` (IoU), `threshold_curve` (mIoU of maps at
        `THRESHOLDS`) and `mean_average_precision` (percent, over the classes that occur); ready for JSON.

    Raises:
        UserError: an unknown output or test-time mode, an empty split or a missing mask.
    """
    columns = column_names(outputs, test_time)
    return _score(network, recipe, dataset, columns, torch.device(device), processes, progress)


def evaluate_run(
    folder: Path | str,
    split: str = "val",
    *,
    images: int = 0,
    size: int | None = None,
    outputs: Sequence[str] = OUTPUTS,
    test_time: Sequence[str] = ("single",),
    device: str = "auto",
    processes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a finished run once; later calls with the same setting read its `metrics.json`.

    Asking for more computes only the missing columns; where none is missing, the network is not even
    loaded. Another number of images or another size than the recipe's is a result of its own beside the
    recipe's, stored as for example `val (10 images)` or `val (native size)`.

    Args:
        folder: run folder.
        split, images: see `measured_split`.
        size: side to which images are resized, 0 for their native size; None: the recipe's `data.eval_size`.
        outputs, test_time, processes, progress: see `evaluate`.

    Returns:
        The result of that split with every column known so far, see `evaluate`.

    Raises:
        FolderInUse: another process evaluates this run.
        UserError: see `evaluate` and `RunFolder.load`.
    """
    columns, run = column_names(outputs, test_time), RunFolder(folder)
    known = stored_result(folder, split, images=images, size=size, outputs=outputs, test_time=test_time)
    if known:
        return known
    network, _ = run.load(device)
    with FolderLock(run.path, ".evaluation.lock"):
        remove_parts(run.metrics)
        recipe, dataset, name, known, there = _stored(run, split, images, size)
        missing = [column for column in columns if column not in there]
        if known and not missing:  # another process has just measured it
            return known
        result = _score(network, recipe, dataset, missing, resolve_device(device), processes, progress)
        if there:
            result = merge_results(known, result)
        run.write_metrics(name, result)
    return result


def stored_result(
    folder: Path | str,
    split: str = "val",
    *,
    images: int = 0,
    size: int | None = None,
    outputs: Sequence[str] = OUTPUTS,
    test_time: Sequence[str] = ("single",),
) -> dict[str, Any] | None:
    """What `evaluate_run` would return without computing anything; None if something is missing."""
    *_, known, there = _stored(RunFolder(folder), split, images, size)
    return known if known and there.issuperset(column_names(outputs, test_time)) else None


def _stored(
    run: RunFolder, split: str, images: int, size: int | None
) -> tuple[Recipe, SegmentationDataset, str, dict | None, set[str]]:
    """The recipe and dataset of an evaluation, the name of its result, what is stored, and which columns of
    that still hold."""
    recipe = run.recipe()
    other_size = None if size == recipe.data.eval_size else size
    if other_size is not None:
        recipe = replace(recipe, data=replace(recipe.data, eval_size=other_size))
    dataset = measured_split(recipe, split, images)
    whole = not images or len(dataset) == len(measured_split(recipe, split))
    name = result_name(dataset.split, None if whole else len(dataset), other_size)
    known = read_results(run.path).get(name)
    there = current_columns(known, recipe, len(dataset), run.fingerprint()) if known else set()
    return recipe, dataset, name, known, there


def refined_mious(
    network: Network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    refiners: dict[str, Refiner | None],
) -> dict[str, float | None]:
    """mIoU (percent) of the CAM at scale 1 under several refiners, from one walk over the dataset.

    Args:
        refiners: name → refiner; None leaves the CAM as it is.

    Raises:
        UserError: an image has no mask.
    """
    background, device = recipe.cam.background, next(network.parameters()).device
    curves = {name: ThresholdConfusion(dataset.classes, [background], device) for name in refiners}
    for prediction in infer(
        network, recipe, dataset, device=device, outputs=("refined_cam",), refiners=refiners
    ):
        mask, maps = _mask(prediction, dataset).to(device), prediction.maps()
        for name, curve in curves.items():
            curve.update(*top_class(maps.refined[name], maps.present, mask.shape), mask)
    return {name: curve.at(background).miou for name, curve in curves.items()}


def _mask(prediction: Prediction, dataset: SegmentationDataset) -> Tensor:
    if prediction.mask is None:
        raise UserError(
            f"split '{dataset.split}' of {dataset.name} has no mask for '{prediction.id}'; "
            "evaluate a split with masks, or write predictions or a submission instead."
        )
    return prediction.mask


class _Counts:
    """What has been counted for every column of a result."""

    def __init__(
        self, columns: Sequence[str], classes: Sequence[str], background: float, device: torch.device
    ):
        self.background, self.device = background, device
        thresholds = sorted({*THRESHOLDS, background})
        maps = [column for column in columns if split_column(column)[0] in MAPS]
        self.curves = {column: ThresholdConfusion(classes, thresholds, device) for column in maps}
        self.labels = {column: Confusion(classes, device) for column in columns if column not in maps}
        self.boundaries = {column: BoundaryIoU(classes, device) for column in columns}

    def add_map(self, column: str, value: Tensor, winner: Tensor, mask: Tensor, band: Tensor) -> None:
        """Count a map: largest value [H, W] and its class id."""
        self.curves[column].update(value, winner, mask)
        self.boundaries[column].update(winner * (value > self.background), mask, band)

    def add_labels(self, column: str, labels: Tensor, mask: Tensor, band: Tensor) -> None:
        """Count class ids [H, W]."""
        self.labels[column].update(labels, mask)
        self.boundaries[column].update(labels, mask, band)

    def result(self, columns: Sequence[str]) -> dict[str, Any]:
        """The measures, per class IoU and threshold curves; None for columns that were not counted."""
        counted = {column: curve.at(self.background) for column, curve in self.curves.items()} | self.labels
        absent = dict.fromkeys(columns)
        curves = {column: [curve.at(t).miou for t in THRESHOLDS] for column, curve in self.curves.items()}
        return {
            "miou": absent | {column: c.miou for column, c in counted.items()},
            "precision": absent | {column: c.precision for column, c in counted.items()},
            "recall": absent | {column: c.recall for column, c in counted.items()},
            "boundary_iou": absent | {column: b.mean for column, b in self.boundaries.items()},
            "per_class": {column: c.per_class for column, c in counted.items()},
            "threshold_curve": {"thresholds": list(THRESHOLDS)} | curves,
        }


def _score(
    network: Network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    columns: Sequence[str],
    device: torch.device,
    processes: int | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """The result of some columns; see `evaluate`."""
    if not len(dataset):
        raise UserError(f"split '{dataset.split}' of {dataset.name} is empty; check its list of images.")
    absent = ("refined_cam",) * (recipe.affinity.kind == "none") + ("aux_cam",) * (recipe.losses.aux_cls == 0)
    wanted = [column for column in columns if not column.startswith(absent)]
    outputs, modes = zip(*map(split_column, wanted), strict=True) if wanted else ((), ())
    counts = _Counts(wanted, dataset.classes, recipe.cam.background, device)
    scores, truth, pixels = [], [], Pixels()

    def crf_jobs() -> Iterator[tuple]:
        for prediction in infer(
            network, recipe, dataset, device=device, outputs=outputs, test_time=modes, progress=progress
        ):
            mask = _mask(prediction, dataset).to(device)
            scores.append(prediction.scores.cpu())
            truth.append(prediction.label.cpu())
            pixels.add(prediction.id, prediction.input, prediction.label, prediction.mask)
            yield from _count(counts, wanted, prediction, mask)

    with closing(crf_pool(crf_jobs(), processes or cores())) as labelled:
        for labels, (column, channels, mask, band) in labelled:
            counts.add_labels(column, channels[torch.from_numpy(labels).long().to(device)], mask, band)
    return {
        "setting": build_setting(
            recipe, dataset, device, wanted, fingerprint(network.state_dict()), pixels.fingerprint()
        ),
        **counts.result(columns),
        "mean_average_precision": mean_average_precision(torch.stack(scores), torch.stack(truth)),
    }


def _count(
    counts: _Counts, columns: Sequence[str], prediction: Prediction, mask: Tensor
) -> Iterator[tuple[np.ndarray, np.ndarray, tuple]]:
    """Compare one image with its mask; yields what has to pass the CRF first, as jobs of `crf_pool`."""
    band = boundary_band(mask)
    for column in columns:
        output, mode = split_column(column)
        if output in MAPS:
            maps = prediction.maps(mode)
            found = {"cam": maps.main, "aux_cam": maps.auxiliary} | dict(maps.refined)
            counts.add_map(column, *top_class(found[output], maps.present, mask.shape), mask, band)
        elif mode == "ms_crf":
            image, probabilities, channels = prediction.crf_job(output)
            yield image, probabilities, (column, channels, mask, band)
        else:
            counts.add_labels(column, prediction.labels(output, mode), mask, band)
