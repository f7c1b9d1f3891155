"""How far an mIoU from a few masks can be trusted: a bootstrap over images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssepa_lib.data import SegmentationDataset
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.inference import infer
from ssepa_lib.evaluation.scores import Confusion
from ssepa_lib.model.network import Network
from ssepa_lib.recipe import Recipe


def image_matrices(
    network: Network, recipe: Recipe, dataset: SegmentationDataset, output: str = "pseudo_label"
) -> Tensor:
    """The confusion matrix of every image, rows the mask: long [n, C+1, C+1], on the CPU.

    Args:
        output: `pseudo_label` or `segmentation`, at a single scale.

    Raises:
        UserError: no image, or one without a mask.
    """
    device, found = network.classifier.weight.device, []
    for prediction in infer(network, recipe, dataset, device=device, outputs=(output,)):
        if prediction.mask is None:
            raise UserError(f"'{prediction.id}' has no mask; measure images with masks only.")
        count = Confusion(dataset.classes, device)
        count.update(prediction.labels(output), prediction.mask.to(device))
        found.append(count.matrix.cpu())
    if not found:
        raise UserError("there is no image to measure; give at least one image with a mask.")
    return torch.stack(found)


def miou_of(matrices: Tensor) -> Tensor:
    """mIoU in percent of confusion matrices, long [..., C+1, C+1] → [...]; classes that do not occur are
    left out."""
    hit = matrices.diagonal(dim1=-2, dim2=-1).double()
    return 100 * (hit / (matrices.sum(-1) + matrices.sum(-2) - hit)).nanmean(-1)


def bootstrap_interval(
    matrices: Tensor, repeats: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """An interval of the mIoU over images drawn again and again with replacement (Efron, 1979).

    The images are what varies: with another ten of the same kind, the mIoU would differ about so much.

    Args:
        matrices: `image_matrices` of n images; every draw adds up n of them.
        level: share of the draws that lie inside, 0..1.

    Returns:
        Its lower and upper end, percent.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(matrices), (repeats, len(matrices)), generator=generator)  # [R, n]
    times = torch.zeros(drawn.shape, dtype=torch.double)
    times.scatter_add_(1, drawn, torch.ones_like(times))  # how often each draw has each image
    sums = times @ matrices.flatten(1).double()  # [R, (C+1)²], exact: whole numbers below 2⁵³
    scores = miou_of(sums.view(repeats, *matrices.shape[1:]))  # [R]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double)
    low, high = scores.quantile(ends).tolist()
    return low, high


def first_with_masks(dataset: SegmentationDataset, count: int = 0) -> Sequence[int]:
    """The first so many images of a dataset that have a mask (0: all of them)."""
    found = [i for i in range(len(dataset)) if dataset.mask(i) is not None]
    return found[: count or None]
