"""Judging maps without masks: does a map survive a flip, another scale and the colours of its image?

A map that changes when its image is flipped cannot be right both times. The opposite does not hold: a map may
be wrong in the same way each time, so agreement finds bad images, it does not prove good ones.
"""

from collections.abc import Iterator, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.data import SegmentationDataset, eval_batches
from ssepa_lib.device import autocast
from ssepa_lib.evaluation.multiscale import cam_view, resized, top_class
from ssepa_lib.evaluation.scores import Confusion
from ssepa_lib.labels.cam import multi_scale_cam
from ssepa_lib.labels.pseudo_labels import PseudoLabeler
from ssepa_lib.labels.refine import Refiner
from ssepa_lib.model.network import Network, evaluating
from ssepa_lib.recipe import Recipe

SMALLER = 0.75  # scale of the second view
FINE = tuple(i / 20 for i in range(1, 20))  # thresholds


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Soft IoU of maps: the sum of their minima over the sum of their maxima.

    Args:
        first, second: [..., H, W], not negative.

    Returns:
        [...], 0..1; 1 where both are zero everywhere.
    """
    both = torch.minimum(first, second).sum((-2, -1))
    either = torch.maximum(first, second).sum((-2, -1))
    return torch.where(either > 0, both / either.clamp_min(1e-12), 1.0)


def kappa(matrix: Tensor) -> float:
    """Agreement of two label maps beyond what their class frequencies give by chance (Cohen's kappa).

    Args:
        matrix: counts [C, C], rows the first label map, columns the second.

    Returns:
        At most 1; 0 where a single class is all there is.
    """
    matrix = matrix.double()
    total = matrix.sum().clamp_min(1)
    observed = matrix.trace() / total
    chance = (matrix.sum(0) * matrix.sum(1)).sum() / total**2
    return float((observed - chance) / (1 - chance)) if chance < 1 else 0.0


def each_view(
    network: Network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    refiner: Refiner | None,
    smaller: bool = False,
) -> Iterator[tuple[int, Tensor, Tensor, list[Tensor]]]:
    """Index of an image, the image [3, S, S], its label [C], and its maps [C, S, S] from several views at
    scale 1: as it is, flipped and, where asked for, at 0.75 of its size."""
    device, config = network.classifier.weight.device, cam_view(recipe.cam, "single")
    index = 0

    def maps(images: Tensor, labels: Tensor) -> Tensor:
        return multi_scale_cam(network, images, labels, config, refiner).for_labels

    for _, pixels, labels, _ in eval_batches(dataset, recipe.data.eval_size, recipe.eval.batch):
        x, labels = pixels.to(device).float(), labels.to(device)
        with torch.no_grad(), evaluating(network), autocast(recipe.train.precision, device):
            views = [maps(x, labels), maps(x.flip(-1), labels).flip(-1)]
            if smaller:
                small = maps(resized(network, x, SMALLER), labels)
                views.append(F.interpolate(small, x.shape[-2:], mode="bilinear", align_corners=False))
        for each in range(len(x)):
            yield index, x[each], labels[each], [view[each] for view in views]
            index += 1


def judge(
    network: Network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    refiner: Refiner | None,
    *,
    views: bool = True,
) -> pd.DataFrame:
    """Numbers of the maps that need no mask, one row per image and class of its label.

    Args:
        refiner: of the maps; None: the maps as they are.
        views: also compare with the flipped and the smaller image.

    Returns:
        Columns `index` of the image, `class` from 0, `flip` and `scale` (`agreement` with the map of the
        flipped image and of the image at 0.75 of its size, 0..1), `median` (of the map: a floor without a
        mask), `area` (share above the recipe's background threshold) and `PAR` (mean absolute change under
        pixel-adaptive refinement).
    """
    par, rows = PseudoLabeler(recipe.cam).par.to(network.classifier.weight.device), []
    columns = ["index", "class", *(["flip", "scale"] if views else []), "median", "area", "PAR"]
    for index, image, label, found in each_view(network, recipe, dataset, refiner, smaller=views):
        kinds = label.nonzero().flatten()
        if not len(kinds):
            continue
        plain, *others = (view[kinds] for view in found)  # [P, S, S] each
        moved = (par(image[None], plain[None])[0] - plain).abs().mean((-2, -1))
        values = [agreement(plain, other) for other in others] if views else []
        values += [plain.flatten(1).median(1).values, (plain > recipe.cam.background).float().mean((-2, -1))]
        table = torch.stack([*values, moved], 1).tolist()
        rows += [[index, int(kind), *line] for kind, line in zip(kinds, table, strict=True)]
    return pd.DataFrame(rows, columns=columns)


def flip_agreement(
    network: Network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    refiner: Refiner | None,
    thresholds: Sequence[float] = FINE,
) -> pd.Series:
    """How well the labels of an image and of its flip agree at each background threshold, without a mask.

    At every threshold the two label maps, 0 where no class is above it, are counted in one matrix over the
    dataset; its `kappa` is 0 for labels that agree by being all alike.

    Returns:
        Threshold → kappa.
    """
    device = network.classifier.weight.device
    counts = {t: Confusion(dataset.classes, device) for t in thresholds}
    for _, image, label, found in each_view(network, recipe, dataset, refiner):
        kinds, size = label.nonzero().flatten(), image.shape[-2:]
        (one, first), (two, second) = (top_class(view[kinds], kinds, size) for view in found)
        for t, count in counts.items():
            count.update(first * (one > t), second * (two > t))
    return pd.Series({t: kappa(count.matrix) for t, count in counts.items()}, name="kappa")
