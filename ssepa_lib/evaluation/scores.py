"""Scores of label maps and thresholded maps, each counted over a whole split.

The rule for mIoU everywhere in this project: one confusion matrix over all pixels of the split, pixels
marked 255 left out, intersection over union per class in percent, averaged over the background and those
classes that occur in the ground truth or in the prediction. It is never a mean over images.
"""

from collections.abc import Callable, Sequence
from math import hypot

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix, multilabel_average_precision

from ssepa_lib.data import IGNORE

BOUNDARY = 0.02  # width of the boundary band as a share of the image diagonal (Cheng et al., CVPR 2021)


class Confusion:
    """Confusion matrix over a split: rows are the ground truth, columns the prediction, 0 is the background.

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
        """Intersection over union [C+1], percent; NaN for a class in neither ground truth nor prediction."""
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

    @property
    def precision(self) -> float | None:
        """Share of the pixels predicted as a class that belong to it: mean over foreground classes, percent.

        The classes are those of mIoU without the background: they occur in the ground truth or in the
        prediction. A class that is never predicted counts as 0, so that a network cannot gain by leaving
        classes out. None where no foreground class occurs.
        """
        return self._mean_share(self.matrix.sum(0))

    @property
    def recall(self) -> float | None:
        """Share of a class's pixels that are found: mean over the classes of `precision`, percent.

        A class that is predicted without being there counts as 0.
        """
        return self._mean_share(self.matrix.sum(1))

    def _mean_share(self, total: Tensor) -> float | None:
        """Mean of diagonal / total in percent over the foreground classes that occur; 0/0 counts as 0."""
        occurs = (self.matrix.sum(0) + self.matrix.sum(1) > 0)[1:]
        share = 100 * self.matrix.diagonal().double()[1:] / total[1:].clamp_min(1)
        return _number(share[occurs].mean())


class ThresholdConfusion:
    """Confusion matrices of one thresholded map at many thresholds, from a single pass.

    The top class of a pixel does not depend on the threshold, so a histogram over (ground truth, top class,
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
        # counting 255 and dropping it is faster than leaving it out
        counts = torch.bincount(index.flatten(), minlength=(IGNORE + 1) * side * bins)
        self.counts += counts[: self.counts.numel()].view_as(self.counts)

    def at(self, threshold: float) -> Confusion:
        """The matrix of the rule 'the top class where its score exceeds the threshold, else background'."""
        cut = self.thresholds.index(threshold) + 1
        confusion = Confusion(self.classes, self.counts.device)
        confusion.matrix += self.counts[..., cut:].sum(-1)
        confusion.matrix[:, 0] += self.counts[..., :cut].sum((1, 2))
        return confusion


def boundary_band(labels: Tensor) -> Tensor:
    """Pixels of each class that lie within d pixels of its boundary, bool [H, W] for a label map [H, W].

    d is 2 % of the image diagonal, at least 1 pixel; distances are those of d erosions with a 3×3 square.
    The edge of the image is a boundary too. A pixel is in the band exactly where an erosion of its class
    removes it (Cheng et al., "Boundary IoU", CVPR 2021, and their implementation). One band serves all
    classes at once, because a pixel survives d erosions if and only if the (2d + 1)² window around it holds
    a single class.
    """
    height, width = labels.shape
    d = max(1, round(BOUNDARY * hypot(height, width)))
    padded = F.pad(labels.short(), (1, 1, 1, 1), value=-1)  # outside is a class of its own
    edge = _pooled(padded, torch.maximum) != _pooled(padded, torch.minimum)  # what the first erosion removes
    # the other d − 1 erosions widen the band; with an integral image they cost the same at any width
    sums = F.pad(edge.int(), (d, d - 1, d, d - 1)).cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    rows = sums[2 * d - 1 :] - sums[: -(2 * d - 1)]
    return rows[:, 2 * d - 1 :] - rows[:, : -(2 * d - 1)] > 0


def _pooled(labels: Tensor, extreme: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Maximum or minimum of 3×3 windows, [H + 2, W + 2] → [H, W]; on a CPU far faster than `max_pool2d`."""
    rows = extreme(extreme(labels[:-2], labels[1:-1]), labels[2:])
    return extreme(extreme(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


class BoundaryIoU:
    """Boundary IoU over a split: that of the boundary bands of prediction and ground truth.

    Per class, the pixels in both bands and those in either are counted over all images, as a confusion
    matrix counts pixels. Pixels marked 255 are left out of the prediction as well: around them both have
    the same boundary, so that a prediction which is right outside of them scores 100. Source: Cheng et al.,
    CVPR 2021.

    Args:
        classes: names of the C foreground classes.
    """

    def __init__(self, classes: Sequence[str], device: torch.device | str = "cpu"):
        self.intersection = torch.zeros(len(classes) + 1, dtype=torch.long, device=device)
        self.union = torch.zeros_like(self.intersection)

    def update(self, prediction: Tensor, mask: Tensor, band: Tensor | None = None) -> None:
        """Add an image: prediction 0..C and mask 0..C or 255, integer tensors [H, W].

        Args:
            band: `boundary_band(mask)` if it is there already.
        """
        mask = mask.long()
        prediction = prediction.long().masked_fill(mask == IGNORE, IGNORE)
        truth = boundary_band(mask) if band is None else band
        found = boundary_band(prediction)
        both = self._count(mask[truth & found & (mask == prediction)])
        self.intersection += both
        self.union += self._count(mask[truth]) + self._count(prediction[found]) - both

    def _count(self, ids: Tensor) -> Tensor:
        return torch.bincount(ids, minlength=IGNORE + 1)[: len(self.union)]

    @property
    def mean(self) -> float | None:
        """Mean over background and those classes that occur, percent; None before any pixel was added."""
        return _number((100 * self.intersection.double() / self.union).nanmean())


def mean_average_precision(scores: Tensor, labels: Tensor) -> float | None:
    """Mean average precision, percent, of scores [n, C] and 0/1 labels [n, C], over classes that occur."""
    occurs = labels.sum(0) > 0
    if not occurs.any():
        return None
    exact, truth = scores[:, occurs].double(), labels[:, occurs].long()  # a single sigmoid is 1 from 17 on
    count = int(occurs.sum())
    each = multilabel_average_precision(exact, truth, count, average="none", validate_args=False)
    return 100 * float(each.mean())


def _number(value: Tensor) -> float | None:
    return None if torch.isnan(value) else float(value)
