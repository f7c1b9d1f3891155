"""Calibration of maps: the threshold that splits a map best is moved to the fixed threshold of the pipeline.

The background thresholds 0.25, 0.5 and 0.7 were chosen for plain class activation maps. A map that was
propagated has another distribution, and a fixed threshold cuts it in the wrong place. Otsu's threshold
(1979) is found per image and class without any mask.
"""

import math

import torch
from torch import Tensor

BINS = 256


def otsu_threshold(maps: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The threshold of largest between-class variance of each map (Otsu, IEEE Trans. SMC 9(1), 1979).

    Args:
        maps: [B, C, H, W] in 0..1.
        valid: [B, H, W], 1 for pixels that count; None: all.

    Returns:
        Thresholds [B, C], strictly between 0 and 1, and bool [B, C], False for a map whose valid pixels all
        lie in one of the 256 bins of the histogram: it has no threshold.
    """
    b, c = maps.shape[:2]
    index = (maps.flatten(2).float() * BINS).long().clamp(0, BINS - 1)  # [B, C, H·W]
    weight = maps.new_ones(b, 1, index.shape[2]) if valid is None else valid.flatten(1).unsqueeze(1)
    counts = torch.zeros(b, c, BINS, device=maps.device)
    counts.scatter_add_(2, index, weight.float().expand(-1, c, -1))
    share = counts / counts.sum(2, keepdim=True).clamp(min=1)
    values = (torch.arange(BINS, device=maps.device) + 0.5) / BINS
    below = share.cumsum(2)  # [B, C, BINS], share of pixels up to and including a bin
    moment = (share * values).cumsum(2)
    spread = (moment[..., -1:] * below - moment).square() / (below * (1 - below)).clamp(min=1e-6)
    best, at = spread[..., :-1].max(2)
    return (at + 1).float() / BINS, best > 1e-8


def calibrate(maps: Tensor, valid: Tensor | None = None) -> Tensor:
    """Raise each map to the power that moves its Otsu threshold t to 0.5: x^γ with γ = ln 0.5 / ln t.

    The order of the pixels stays. Maps without a threshold (constant, all zero, one patch) stay as they are.

    Args:
        maps: [B, C, H, W] in 0..1.
        valid: [B, H, W], 1 on the image, 0 on padding; None: no padding.

    Returns:
        [B, C, H, W] in 0..1.
    """
    threshold, exists = otsu_threshold(maps, valid)
    gamma = torch.where(exists, math.log(0.5) / threshold.log(), 1.0)
    return maps.clamp(0, 1) ** gamma[:, :, None, None]
