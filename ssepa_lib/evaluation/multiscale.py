"""Scales and flips at test time, and what they give at the original size: classes, and the CRF's input."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.labels.crf import crf_labels
from ssepa_lib.model.network import Network
from ssepa_lib.recipe import CamConfig


def cam_view(config: CamConfig, mode: str) -> CamConfig:
    """How maps are made in a test-time mode: `single` at scale 1 without flip, else as the recipe says."""
    return replace(config, scales=[1.0], flip=False) if mode == "single" else config


def top_class(maps: Tensor, present: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Largest value and its class id (1..C) at `size`, both [H, W], of the maps [P, h, w] of some classes."""
    if not len(present):
        return maps.new_zeros(tuple(size)), present.new_ones(tuple(size))
    value, index = F.interpolate(maps[None], size=tuple(size), mode="bilinear")[0].max(0)
    return value, present[index] + 1


def resized(network: Network, image: Tensor, scale: float) -> Tensor:
    """Images [B, 3, H, W] at a scale, whose sides are rounded to the nearest multiples of the patch."""
    sides = zip(image.shape[-2:], network.backbone.patch_size, strict=True)
    size = [max(1, round(side * scale / patch)) * patch for side, patch in sides]
    return F.interpolate(image.float(), size=size, mode="bilinear", align_corners=False)


def scale_logits(network: Network, image: Tensor, scales: Sequence[float], flip: bool) -> list[Tensor]:
    """Logits [B, C+1, h, w] per scale; with `flip`, plus those of the flipped image, flipped back."""
    maps = []
    for scale in scales:
        view = resized(network, image, scale)
        logits = network(torch.cat([view, view.flip(-1)]) if flip else view).segmentation.float()
        if flip:  # resizing is linear and symmetric, so adding first gives the same as adding at label size
            direct, flipped = logits.chunk(2)
            logits = direct + flipped.flip(-1)
        maps.append(logits)
    return maps


def merge_scales(maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Maximum over maps [B, C, h, w] of any size after resizing each to `size` (height, width)."""
    return reduce(torch.maximum, (F.interpolate(m, size=tuple(size), mode="bilinear") for m in maps))


@torch.no_grad()
def segmentation_logits(
    network: Network,
    image: Tensor,
    scales: Sequence[float],
    flip: bool,
    size: Sequence[int] | None = None,
) -> Tensor:
    """Multi-scale inference (ToCo, official evaluation): sum over flips, then maximum over scales.

    Args:
        image: [B, 3, H, W], 0..255.
        scales: factors on the image size; each view is resized to the nearest multiple of the patch side.
        flip: add the flipped image.
        size: (height, width) of the result; None: the image's.

    Returns:
        logits [B, C+1, *size], channel 0 background.
    """
    return merge_scales(scale_logits(network, image, scales, flip), size or image.shape[-2:])


def background_and_cam(
    maps: Tensor, present: Tensor, background: float, size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Input of a dense CRF: a constant background score and the maps of some classes, over their sum.

    Args:
        maps: [P, h, w] in 0..1, of the classes `present` [P].
        size: (height, width) of the result.

    Returns:
        probabilities [P+1, *size] of background and the P classes, and their class ids [P+1].
    """
    scores = maps.new_full((1, *size), background)
    if len(present):
        resized = F.interpolate(maps[None], size=tuple(size), mode="bilinear")[0]
        scores = torch.cat([scores, resized])  # [P+1, H, W]
    return scores / scores.sum(0, keepdim=True).clamp_min(1e-9), torch.cat(
        [present.new_zeros(1), present + 1]
    )


def crf_pseudo_label(image: Tensor, cam: Tensor, label: Tensor, background: float) -> Tensor:
    """Labels [H, W] (0..C) by a dense CRF from maps [C, h, w]; image [3, H, W] in 0..255, label [C]."""
    present = label.nonzero().flatten()
    probabilities, channels = background_and_cam(cam[present], present, background, image.shape[-2:])
    pixels = image.permute(1, 2, 0).round().clamp(0, 255).byte().contiguous().cpu().numpy()
    return channels.cpu()[torch.from_numpy(crf_labels(pixels, probabilities.cpu().numpy())).long()]
