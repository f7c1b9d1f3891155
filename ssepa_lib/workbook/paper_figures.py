"""Figures 5 to 7 of SS-EPA from finished runs: maps, pseudo-labels and segmentations, the latter with CRF."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ssepa_lib.data import SegmentationDataset, split_of
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.multiscale import crf_pseudo_label, segmentation_logits
from ssepa_lib.labels import PseudoLabeler, build_refiner, multi_scale_cam
from ssepa_lib.labels.crf import crf_available, crf_labels
from ssepa_lib.model import Network
from ssepa_lib.recipe import Recipe
from ssepa_lib.workbook.figures.images import plot_cam_grid, plot_mask_grid
from ssepa_lib.workbook.studies.map_study import class_maps
from ssepa_lib.workbook.study import samples

Runs = Mapping[str, tuple[Network, Recipe]]  # column title → network and recipe


def images_without_masks(recipe: Recipe, count: int) -> SegmentationDataset | None:
    """The first images of the test split, whose masks are not looked at; None where the data has no such
    split."""
    try:
        return split_of(recipe, "test", count)
    except UserError:
        return None


def _given(runs: Runs, dataset: SegmentationDataset, shown: Sequence[int]) -> tuple:
    """Images on the network's device, labels, masks and class names, as they are measured."""
    network, recipe = next(iter(runs.values()))
    where, side = network.classifier.weight.device, recipe.data.eval_size or recipe.data.crop
    pixels, labels, masks = samples(dataset, shown, side)
    return pixels.to(where), labels.to(where), masks, dataset.classes


def plot_figure_5(runs: Runs, dataset: SegmentationDataset, shown: Sequence[int]) -> np.ndarray:
    """Maps of the first class of each image, each network's with its own affinity (SS-EPA, Figure 5).

    Args:
        shown: indices of images that show a class.

    Returns:
        axes [images, input, ground truth and runs].
    """
    pixels, labels, masks, classes = _given(runs, dataset, shown)
    kinds = labels.argmax(1).tolist()
    maps = {
        title: class_maps(
            network, recipe, pixels, labels, kinds, {"": build_refiner(recipe.affinity, network)}
        )[""]
        for title, (network, recipe) in runs.items()
    }
    return plot_cam_grid(pixels, masks, maps, classes, [classes[kind] for kind in kinds])


@torch.no_grad()
def pseudo_labels(
    network: Network, recipe: Recipe, pixels: Tensor, labels: Tensor
) -> dict[str, list[Tensor]]:
    """Pseudo-labels [n, H, W] after PAR and, where it is installed, after the CRF in its place."""
    refiner = build_refiner(recipe.affinity, network)
    cams = multi_scale_cam(network, pixels, labels, recipe.cam, refiner)
    labeler = PseudoLabeler(recipe.cam).to(pixels.device)
    found = {"": list(labeler.labels(pixels, cams.for_labels, labels, cams.spread))}
    if crf_available():
        each = zip(pixels, cams.final, labels, strict=True)
        found[", CRF"] = [crf_pseudo_label(*one, recipe.cam.background) for one in each]
    return found


def plot_figure_6(runs: Runs, dataset: SegmentationDataset, shown: Sequence[int]) -> np.ndarray:
    """Pseudo-labels with and without CRF of several runs (SS-EPA, Figure 6); see `plot_figure_5`."""
    pixels, labels, masks, classes = _given(runs, dataset, shown)
    columns = {} if masks is None else {"ground truth": masks}
    for title, (network, recipe) in runs.items():
        found = pseudo_labels(network, recipe, pixels, labels)
        columns |= {title + way: made for way, made in found.items()}
    return plot_mask_grid(pixels, columns, classes)


def segmentations(network: Network, recipe: Recipe, pixels: Tensor) -> dict[str, list[Tensor]]:
    """Segmentations [n, H, W] at the recipe's scales without CRF and, where it is installed, with it."""
    logits = segmentation_logits(network, pixels, recipe.eval.scales, recipe.eval.flip)  # [n, C+1, H, W]
    found = {"": list(logits.argmax(1))}
    if crf_available():
        images = pixels.permute(0, 2, 3, 1).round().clamp(0, 255).byte().contiguous().cpu().numpy()
        chances = logits.softmax(1).cpu().numpy()
        pairs = zip(images, chances, strict=True)
        found[", CRF"] = [torch.from_numpy(crf_labels(image, p)) for image, p in pairs]
    return found


def plot_figure_7(
    runs: Runs, dataset: SegmentationDataset, shown: Sequence[int], *, truth: bool = True
) -> np.ndarray:
    """Segmentations of several runs, with and without CRF (SS-EPA, Figure 7); no label is used.

    Args:
        truth: show the masks; the paper's half on the test split has none.
    """
    pixels, _, masks, classes = _given(runs, dataset, shown)
    columns = {"ground truth": masks} if truth and masks is not None else {}
    for title, (network, recipe) in runs.items():
        found = segmentations(network, recipe, pixels)
        columns |= {title + way: made for way, made in found.items()}
    return plot_mask_grid(pixels, columns, classes)
