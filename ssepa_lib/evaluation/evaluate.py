"""Scores of a trained network: one confusion matrix over the split for every product, with the setting it belongs to.

The rule for mIoU everywhere in this project: one confusion matrix over all pixels of the split, pixels marked 255 left
out, intersection over union per class in percent, averaged over background and those classes that occur in the ground
truth or in the prediction. It is never a mean over images.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix, multilabel_average_precision

from ssepa_lib.data.datasets import IGNORE, SegmentationDataset
from ssepa_lib.data.views import eval_batches
from ssepa_lib.device import autocast, describe_device
from ssepa_lib.errors import UserError
from ssepa_lib.labels.cam import multi_scale_cam
from ssepa_lib.labels.crf import crf_labels, crf_pool
from ssepa_lib.labels.par import PixelAdaptiveRefinement
from ssepa_lib.labels.pseudo_labels import single_threshold_labels
from ssepa_lib.model.network import evaluating
from ssepa_lib.recipe import CamConfig, Recipe

THRESHOLDS = tuple(i / 10 for i in range(1, 10))
MAPS = ("cam", "aux_cam", "refined_cam")
PRODUCTS = (*MAPS, "pseudo_label", "segmentation")
INFERENCE = {"raw": "", "ms": "_ms", "crf": "_ms_crf"}  # what each way of inference adds to a product's name


class Confusion:
    """Confusion matrix over a split: rows are the ground truth, columns the prediction, 0 is background.

    Args:
        classes: names of the C foreground classes.
    """

    def __init__(self, classes: Sequence[str], device: torch.device | str = "cpu"):
        self.names = ("background", *classes)
        self.matrix = torch.zeros(len(self.names), len(self.names), dtype=torch.long, device=device)

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """Add pixels: prediction 0..C and mask 0..C or 255 (left out), integer tensors of equal shape."""
        self.matrix += multiclass_confusion_matrix(
            prediction.long(), mask.long(), len(self.names), ignore_index=IGNORE, validate_args=False
        )

    @property
    def iou(self) -> Tensor:
        """Intersection over union [C+1] in percent; NaN for a class in neither ground truth nor prediction."""
        matrix = self.matrix.double().cpu()
        hit = matrix.diagonal()
        return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)

    @property
    def miou(self) -> float | None:
        """Mean over the classes that occur, percent; None before any pixel was added."""
        return _number(self.iou.nanmean())

    @property
    def per_class(self) -> dict[str, float | None]:
        """IoU by class name, percent; None for a class that does not occur."""
        return {name: _number(value) for name, value in zip(self.names, self.iou, strict=True)}


class ThresholdConfusion:
    """Confusion matrices of one thresholded map at many thresholds, from a single pass.

    The strongest class of a pixel does not depend on the threshold, so a histogram over (ground truth, strongest class,
    threshold interval) holds every matrix.
    """

    def __init__(
        self, classes: Sequence[str], thresholds: Sequence[float], device: torch.device | str = "cpu"
    ):
        self.classes, self.thresholds = classes, sorted(thresholds)
        self.edges = torch.tensor(self.thresholds, device=device)
        side = len(classes) + 1
        self.counts = torch.zeros(side, side, len(self.thresholds) + 1, dtype=torch.long, device=device)

    def update(self, value: Tensor, winner: Tensor, mask: Tensor) -> None:
        """Add pixels: largest score `value` (0..1), its class `winner` (1..C) and the mask, all [H, W]."""
        side, _, bins = self.counts.shape
        index = (mask.long() * side + winner) * bins + torch.bucketize(value, self.edges)
        counts = torch.bincount(
            index.flatten(), minlength=(IGNORE + 1) * side * bins
        )  # faster than leaving 255 out
        self.counts += counts[: self.counts.numel()].view_as(self.counts)

    def at(self, threshold: float) -> Confusion:
        """The matrix of the rule 'strongest class where its score exceeds the threshold, else background'."""
        cut = self.thresholds.index(threshold) + 1
        confusion = Confusion(self.classes, self.counts.device)
        confusion.matrix += self.counts[..., cut:].sum(-1)
        confusion.matrix[:, 0] += self.counts[..., :cut].sum((1, 2))
        return confusion


def _number(value: Tensor) -> float | None:
    return None if torch.isnan(value) else float(value)


def scale_logits(network, image: Tensor, scales: Sequence[float], flip: bool) -> list[Tensor]:
    """Per scale the logits [B, C+1, h, w] of the image, plus those of its mirror (mirrored back) with `flip`."""
    maps = []
    for scale in scales:
        size = [
            round(s * scale / p) * p
            for s, p in zip(image.shape[-2:], network.backbone.patch_size, strict=True)
        ]
        view = F.interpolate(image.float(), size=size, mode="bilinear", align_corners=False)
        logits = network(torch.cat([view, view.flip(-1)]) if flip else view).segmentation.float()
        if (
            flip
        ):  # resizing is linear and symmetric, so adding before it gives the same as adding at label size
            direct, mirrored = logits.chunk(2)
            logits = direct + mirrored.flip(-1)
        maps.append(logits)
    return maps


def merge_scales(maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Maximum over maps [B, C, h, w] of any size after resizing each to `size` (height, width)."""
    return reduce(torch.maximum, (F.interpolate(m, size=tuple(size), mode="bilinear") for m in maps))


@torch.no_grad()
def segmentation_logits(
    network, image: Tensor, scales: Sequence[float], flip: bool, size: Sequence[int] | None = None
) -> Tensor:
    """Multi-scale inference (ToCo, official evaluation): per scale the sum over mirror, then the maximum over scales.

    Args:
        image: [B, 3, H, W], 0..255.
        scales: factors on the image size; each view is resized to the nearest multiple of the patch side.
        flip: add the mirrored image.
        size: (height, width) of the result; None: the image's.

    Returns:
        logits [B, C+1, *size], channel 0 background.
    """
    return merge_scales(scale_logits(network, image, scales, flip), size or image.shape[-2:])


def background_and_cam(
    cam: Tensor, label: Tensor, background: float, size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """What a dense CRF starts from: constant background score and CAMs of the classes present, divided by their sum.

    Args:
        cam: [C, h, w] in 0..1; label: [C]; size: (height, width) of the result.

    Returns:
        probabilities [P+1, *size] of background and the P classes present, and their class ids [P+1].
    """
    present = label.nonzero().flatten()
    scores = cam.new_full((1, *size), background)
    if len(present):
        resized = F.interpolate(cam[None, present], size=tuple(size), mode="bilinear")[0]
        scores = torch.cat([scores, resized])
    return scores / scores.sum(0, keepdim=True), torch.cat([present.new_zeros(1), present + 1])


def crf_pseudo_label(image: Tensor, cam: Tensor, label: Tensor, background: float) -> Tensor:
    """Labels [H, W] (0..C) by a dense CRF from the CAMs [C, h, w] of the classes present; image [3, H, W] in 0..255."""
    probabilities, channels = background_and_cam(cam, label, background, image.shape[-2:])
    pixels = image.permute(1, 2, 0).round().clamp(0, 255).byte().contiguous().cpu().numpy()
    return channels.cpu()[torch.from_numpy(crf_labels(pixels, probabilities.cpu().numpy())).long()]


class _Pass:
    """One pass over a split: what is wanted, and what has been counted."""

    def __init__(
        self, network, recipe: Recipe, dataset: SegmentationDataset, products, inference, thresholds, device
    ):
        self.network, self.recipe, self.dataset, self.device = network, recipe, dataset, device
        self.refine = recipe.affinity.kind != "none"
        self.source = "refined_cam" if self.refine else "cam"  # the map that pseudo-labels are made of
        names = [
            n for n in product_names(products, inference) if self.refine or not n.startswith("refined_cam")
        ]
        maps = [name for name in names if name.removesuffix(INFERENCE["ms"]) in MAPS]
        self.curves = {name: ThresholdConfusion(dataset.classes, thresholds, device) for name in maps}
        self.labels = {name: Confusion(dataset.classes, device) for name in names if name not in maps}
        self.ways = [way for way in ("raw", "ms") if way in inference or (way == "ms" and "crf" in inference)]
        self.cams = not all(name.startswith("segmentation") for name in names)
        self.par = PixelAdaptiveRefinement(recipe.cam.par_dilations, recipe.cam.par_iterations).to(device)
        self.scores, self.truth, self.done = [], [], 0

    @torch.no_grad()
    def batch(self, ids, images: Tensor, labels: Tensor, masks) -> Iterator[tuple]:
        """Score one batch; yields the jobs it causes for `crf_pool`."""
        require_masks(ids, masks, self.dataset)
        images, labels = images.to(self.device), labels.to(self.device)
        with autocast(self.recipe.train.precision, self.device):
            output = self.network(images, segment="segmentation" in self.labels, affinity=self.refine)
            found = {way: self._forward(way, output, images, labels) for way in self.ways}
        self.scores.append(output.scores.float().cpu()), self.truth.append(labels.cpu())
        for i, mask in enumerate(masks):
            for way, (logits, maps, pseudo) in found.items():
                mine = (
                    [m[i : i + 1] for m in logits],
                    {name: m[i] for name, m in maps.items()},
                    pseudo[i : i + 1],
                )
                yield from self._count(way, *mine, labels[i], mask.to(self.device))
            self.done += 1

    def _forward(self, way: str, output, images: Tensor, labels: Tensor) -> tuple[list[Tensor], dict, Tensor]:
        """For one way of inference: logits before resizing, a map per scale; valid CAMs [B, C, H, W] by name; PAR's
        pseudo-labels [B, H, W]. Empty where not wanted."""
        config, suffix = self.recipe.eval, INFERENCE[way]
        logits, maps, pseudo = [], {}, images.new_empty(0)
        if way == "ms" and {"segmentation_ms", "segmentation_ms_crf"} & set(self.labels):
            logits = scale_logits(self.network, images, config.scales, config.flip)
        elif way == "raw" and "segmentation" in self.labels:
            logits = [output.segmentation.float()]
        if self.cams:
            cam = cam_view(self.recipe.cam, way)
            cams = multi_scale_cam(self.network, images, labels, cam, affinity=self.refine, first=output)
            maps = {"cam": cams.cam, "aux_cam": cams.aux_cam, "refined_cam": cams.refined}
            maps = {name: m for name, m in maps.items() if m is not None}
            if "pseudo_label" + suffix in self.labels:
                pseudo = single_threshold_labels(
                    images.float(), maps[self.source], labels, self.par, cam.background
                )
        return logits, maps, pseudo

    def _count(self, way, logits, maps, pseudo, label, mask: Tensor) -> Iterator[tuple]:
        """Compare one image's products with its mask; yields what has to pass the CRF first."""
        suffix, crf = INFERENCE[way], INFERENCE["crf"] if way == "ms" else None
        present = label.nonzero().flatten()
        for name, cam in maps.items():
            if name + suffix in self.curves:
                self.curves[name + suffix].update(*strongest(cam, present, mask.shape), mask)
        if len(pseudo):
            whole = F.interpolate(pseudo[None].float(), size=mask.shape, mode="nearest")[0, 0]
            self.labels["pseudo_label" + suffix].update(whole, mask)
        if logits:
            merged = merge_scales(logits, mask.shape)[0]
            if "segmentation" + suffix in self.labels:
                self.labels["segmentation" + suffix].update(merged.max(0).indices, mask)
            if crf and "segmentation" + crf in self.labels:
                channels = torch.arange(len(merged), device=self.device)
                yield self._job("segmentation" + crf, merged.softmax(0), channels, mask)
        if crf and "pseudo_label" + crf in self.labels:
            found = background_and_cam(maps[self.source], label, self.recipe.cam.background, mask.shape)
            yield self._job("pseudo_label" + crf, *found, mask)

    def _job(self, product: str, probabilities: Tensor, channels: Tensor, mask: Tensor) -> tuple:
        """Image [H, W, 3], probabilities [channels, H, W], and what `collect` needs with the result."""
        image = np.array(self.dataset.image(self.done))  # the CRF needs the image at its original size
        return image, probabilities.cpu().numpy(), (product, channels, mask)

    def collect(self, labels: np.ndarray, product: str, channels: Tensor, mask: Tensor) -> None:
        """Count a CRF result, channels [H, W]."""
        self.labels[product].update(channels[torch.from_numpy(labels).long().to(self.device)], mask)


def product_names(products: Sequence[str], inference: Sequence[str]) -> list[str]:
    """Names of the results of `evaluate`, such as `segmentation_ms`; maps have no CRF."""
    return [
        p + INFERENCE[way]
        for way in INFERENCE
        if way in inference
        for p in products
        if not (way == "crf" and p in MAPS)
    ]


def cam_view(config: CamConfig, way: str) -> CamConfig:
    """How CAMs are made for a way of inference: `raw` at scale 1 without mirror, otherwise as the recipe says."""
    return replace(config, scales=[1.0], flip=False) if way == "raw" else config


def require_masks(ids: Sequence[str], masks: Sequence[Tensor | None], dataset: SegmentationDataset) -> None:
    """Raise a UserError that names the first image without a mask."""
    for id, mask in zip(ids, masks, strict=True):
        if mask is None:
            raise UserError(
                f"split '{dataset.split}' of {dataset.name} has no mask for '{id}'; evaluate a split with masks, "
                "or write predictions or a submission instead."
            )


def strongest(cam: Tensor, present: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Largest value and its class id (1..C) [H, W] among the classes present, resized to `size`."""
    if not len(present):
        return cam.new_zeros(tuple(size)), present.new_ones(tuple(size))
    value, index = F.interpolate(cam[None, present], size=tuple(size), mode="bilinear")[0].max(0)
    return value, present[index] + 1


def _settings(recipe: Recipe, dataset: SegmentationDataset, device) -> dict:
    parts = recipe.name.split("/")
    return {
        "data": dataset.name,
        "split": dataset.split,
        "images": len(dataset),
        "size": recipe.data.eval_size,
        "recipe": recipe.name,
        "method": parts[1]
        if len(parts) in (2, 3) and not recipe.name.endswith((".yaml", ".yml"))
        else recipe.name,
        "affinity": recipe.affinity.kind,
        "supervision": recipe.affinity.supervision,
        "background": recipe.cam.background,
        "seed": recipe.train.seed,
        "steps": recipe.train.steps,
        "batch": recipe.data.batch,
        "backbone": recipe.model.backbone,
        "device": describe_device(device),
        "recipe_hash": recipe.hash(),
    }


def _views(names: Sequence[str], recipe: Recipe) -> dict[str, dict]:
    """Scales, mirror and CRF behind every result: what has to stand next to its number."""
    views = {}
    for name in names:
        several = recipe.eval if name.startswith("segmentation") else recipe.cam
        ms = "_ms" in name
        views[name] = {
            "scales": list(several.scales) if ms else [1.0],
            "flip": several.flip if ms else False,
            "crf": name.endswith("_crf"),
        }
    return views


def is_current(setting: dict, recipe: Recipe, images: int) -> bool:
    """Whether a result's setting is what the recipe says now: the training, images, size, threshold and views."""
    now = {
        "recipe_hash": recipe.hash(),
        "images": images,
        "size": recipe.data.eval_size,
        "background": recipe.cam.background,
        "products": _views(tuple(setting["products"]), recipe),
    }
    return all(setting.get(name) == value for name, value in now.items())


def describe_inference(view: dict) -> str:
    """Scales, mirror and CRF of one product in words, such as `scales 1/1.25/1.5 + mirror + CRF`."""
    scales = "/".join(f"{scale:g}" for scale in view["scales"])
    parts = [f"scale{'s' * (len(view['scales']) > 1)} {scales}"]
    return " + ".join(parts + ["mirror"] * view["flip"] + ["CRF"] * view["crf"])


def describe_setting(setting: dict, product: str) -> str:
    """One line to stand beside a number: `voc val, 1449 images, 448², scale 1, 2000 steps of 4, seed 0`."""
    size = f"{setting['size']}²" if setting["size"] else "original size"
    return (
        f"{setting['data']} {setting['split']}, {setting['images']} images, {size}, "
        f"{describe_inference(setting['products'][product])}, {setting['steps']} steps of {setting['batch']}, "
        f"seed {setting['seed']}"
    )


def describe_settings(settings: Sequence[dict], products: Sequence[str]) -> list[str]:
    """`describe_setting` once per way of inference, with the products it belongs to.

    Args:
        settings: of results that differ in seed or method alone; a product is looked up in the first that has it.
    """
    lines = {}
    for product in products:
        setting = next((s for s in settings if product in s["products"]), None)
        if setting:
            way = describe_inference(setting["products"][product])
            lines.setdefault(way, (describe_setting(setting, product), []))[1].append(product)
    return [f"{', '.join(names)}: {line}" for line, names in lines.values()]


def evaluate(
    network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    *,
    device: torch.device | str,
    products: Sequence[str] = PRODUCTS,
    inference: Sequence[str] = ("raw",),
    thresholds: Sequence[float] = THRESHOLDS,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Score a network on a split with masks.

    Images are resized to `data.eval_size`² (0: original size, one by one); every map is resized to its mask's original
    size before it is compared. CAMs are multiplied by the image-level labels, as everywhere in this field. The
    pseudo-label is the single-threshold label after pixel-adaptive refinement of the affinity-refined CAM, or of the
    plain CAM in a recipe without affinity.

    Args:
        products: any of `cam`, `aux_cam`, `refined_cam`, `pseudo_label`, `segmentation`.
        inference: any of `raw` (scale 1), `ms` (several scales and mirror: `cam.scales` for maps and pseudo-labels,
            `eval.scales` for the segmentation) and `crf` (dense CRF after `ms`; for pseudo-labels it takes the place
            of the pixel-adaptive refinement; maps have none). Every way is a column of its own: `pseudo_label`,
            `pseudo_label_ms`, `pseudo_label_ms_crf`.
        thresholds: background thresholds of the curve, 0..1.
        processes: worker processes of the dense CRF; None: one per processor core.
        progress: called with (images done, all images).

    Returns:
        `setting`, `miou` (percent, None where a product does not exist), `per_class`, `threshold_curve` and
        `mean_average_precision` (percent, over the classes that occur); ready for JSON.

    Raises:
        UserError: an unknown product or way of inference, an empty split or a missing mask.
    """
    device = torch.device(device)
    require_known("products", products, PRODUCTS)
    require_known("inference", inference, tuple(INFERENCE))
    if not len(dataset):
        raise UserError(f"split '{dataset.split}' of {dataset.name} is empty; check its list of images.")
    background = recipe.cam.background
    network = network.to(device)
    run = _Pass(network, recipe, dataset, products, inference, sorted({*thresholds, background}), device)

    def jobs() -> Iterator:
        for batch in eval_batches(dataset, recipe.data.eval_size, recipe.eval.batch, recipe.data.workers):
            yield from run.batch(*batch)
            if progress:
                progress(run.done, len(dataset))

    with evaluating(network):
        if any(name.endswith("_crf") for name in run.labels):
            for labels, rest in crf_pool(jobs(), processes or os.cpu_count() or 1):
                run.collect(labels, *rest)
        else:
            deque(jobs(), maxlen=0)

    confusions = {p: curve.at(background) for p, curve in run.curves.items()} | run.labels
    return {
        "setting": _settings(recipe, dataset, device) | {"products": _views(tuple(confusions), recipe)},
        "miou": dict.fromkeys(product_names(products, inference))
        | {p: c.miou for p, c in confusions.items()},
        "per_class": {p: c.per_class for p, c in confusions.items()},
        "threshold_curve": {"thresholds": list(thresholds)}
        | {p: [curve.at(t).miou for t in thresholds] for p, curve in run.curves.items()},
        "mean_average_precision": mean_average_precision(torch.cat(run.scores), torch.cat(run.truth)),
    }


def require_known(name: str, values: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise a UserError that names the first value which is not allowed."""
    for value in values:
        if value not in allowed:
            raise UserError(f"{name} '{value}' is unknown; choose from {', '.join(allowed)}.")


def mean_average_precision(scores: Tensor, labels: Tensor) -> float | None:
    """Mean average precision in percent of scores [n, C] against 0/1 labels [n, C], over the classes that occur."""
    occurs = labels.sum(0) > 0
    if not occurs.any():
        return None
    each = multilabel_average_precision(
        scores[:, occurs], labels[:, occurs].long(), int(occurs.sum()), average="none", validate_args=False
    )
    return 100 * float(each.mean())


_RESULT = {"setting", "miou", "per_class", "threshold_curve", "mean_average_precision"}
_SETTING = {"data", "split", "images", "size", "method", "seed", "steps", "batch", "backbone", "products"}


def read_metrics(run_dir: Path | str) -> dict[str, dict]:
    """A run's `metrics.json`, split → result of `evaluate`; empty where there is none.

    Raises:
        UserError: the file is not JSON or has another layout.
    """
    path = Path(run_dir) / "metrics.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        for split, result in content.items():
            lacking = (_RESULT - result.keys()) or (_SETTING - result["setting"].keys())
            if lacking:
                raise ValueError(f"'{min(lacking)}' of {split} is missing")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no metrics file of this version ({error}); delete it and evaluate the run again."
        ) from error
    return content


def write_metrics(run_dir: Path, split: str, result: dict) -> Path:
    """Merge the result of one split into a run's `metrics.json`; other splits stay, a crash leaves the old file.

    Raises:
        UserError: see `read_metrics`.
    """
    path = Path(run_dir) / "metrics.json"
    content = read_metrics(run_dir) | {split: result}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)
    return path
