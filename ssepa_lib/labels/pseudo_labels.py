"""From class activation maps to labels: per pixel (with refinement) for the decoder, per token for the contrast."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.labels.par import PixelAdaptiveRefinement

IGNORE = 255


def _refined_labels(
    image: Tensor, cam: Tensor, label: Tensor, par: PixelAdaptiveRefinement, thresholds: list[float]
) -> list[Tensor]:
    """One label map [B, H, W] per background threshold: argmax of the refined softmax over the classes present."""
    b, _, height, width = cam.shape
    half = (height // 2, width // 2)
    present = label > 0
    slots = int(present.sum(1).max())
    order = (
        present.float().sort(dim=1, descending=True, stable=True).indices[:, :slots]
    )  # [B, slots], present first
    absent = ~present.gather(1, order)[:, :, None, None]
    cam = cam.float().gather(1, order[:, :, None, None].expand(-1, -1, height, width))
    cam = F.interpolate(cam, half, mode="bilinear") if slots else cam.new_zeros(b, 0, *half)
    cam = cam.masked_fill(absent, -torch.inf)  # probability 0: a padding slot can never win
    scores = [torch.cat([cam.new_full((b, 1, *half), t), cam], 1).softmax(1) for t in thresholds]
    # all thresholds share the neighbour weights, the costly part
    refined = par(F.interpolate(image.float(), half, mode="bilinear"), torch.cat(scores, 1))
    refined = F.interpolate(refined, (height, width), mode="bilinear")
    classes = F.pad(order + 1, (1, 0))  # slot → class id, slot 0 is background
    return [
        classes.gather(1, r.max(1).indices.flatten(1)).view(b, height, width)
        for r in refined.split(slots + 1, 1)
    ]


@torch.no_grad()
def two_threshold_labels(
    image: Tensor,
    cam: Tensor,
    label: Tensor,
    box: Tensor,
    par: PixelAdaptiveRefinement,
    high: float,
    low: float,
) -> Tensor:
    """Pixel pseudo-labels with a band of doubt between two background thresholds (ToCo, Section 3.4; AFA).

    Args:
        image: [B, 3, H, W], RGB in 0..255.
        cam: [B, C, H, W] in 0..1; only classes of `label` are looked at.
        label: [B, C], 1 for classes in the image, else 0.
        box: long [B, 4], the valid part of the crop as (y0, y1, x0, x1), half open.
        par: the refinement; it runs at half size.
        high, low: background scores; foreground must win against `high`, background must win even with `low`.

    Returns:
        long [B, H, W]: class id 1..C, 0 background, 255 where the two disagree or outside the box.
    """
    strict, lenient = _refined_labels(image, cam, label, par, [high, low])
    doubtful = (strict == 0) & (lenient != 0)
    return strict.masked_fill(doubtful | ~inside(box, cam.shape[-2:]), IGNORE)


@torch.no_grad()
def single_threshold_labels(
    image: Tensor, cam: Tensor, label: Tensor, par: PixelAdaptiveRefinement, background: float
) -> Tensor:
    """Pixel pseudo-labels for evaluation: as `two_threshold_labels` with one threshold, so that nothing is ignored.

    Returns:
        long [B, H, W]: 0..C.
    """
    return _refined_labels(image, cam, label, par, [background])[0]


@torch.no_grad()
def token_labels(aux_cam: Tensor, high: float, low: float) -> Tensor:
    """Token pseudo-labels from the auxiliary CAM at token resolution (ToCo, Section 3.2).

    Args:
        aux_cam: [B, C, h, w] in 0..1, zero for classes not in the image.

    Returns:
        long [B, h·w]: the strongest class (1..C) above `high`, 0 up to and including `low`, 255 between.
    """
    value, index = aux_cam.flatten(2).max(1)
    labels = (index + 1).masked_fill(value <= high, IGNORE)
    return labels.masked_fill(value <= low, 0)


def inside(box: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [B, 4] (y0, y1, x0, x1), half open, as masks: bool [B, H, W]."""
    y0, y1, x0, x1 = box.to(torch.long)[:, :, None, None].unbind(1)  # each [B, 1, 1]
    y = torch.arange(size[0], device=box.device)[:, None]
    x = torch.arange(size[1], device=box.device)
    return (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
