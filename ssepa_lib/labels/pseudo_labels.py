"""From class activation maps to labels: per pixel (after PAR) for the decoder, per token for the contrast."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssepa_lib.data import IGNORE
from ssepa_lib.labels.par import PixelAdaptiveRefinement
from ssepa_lib.recipe import CamConfig


class PseudoLabeler(nn.Module):
    """Turns maps into labels with the thresholds of a recipe; owns pixel-adaptive refinement (PAR).

    Args:
        config: the thresholds `high`, `low` and `background`, and the settings of PAR.
    """

    def __init__(self, config: CamConfig):
        super().__init__()
        self.high, self.low, self.background = config.high, config.low, config.background
        self.par = PixelAdaptiveRefinement(config.par_dilations, config.par_iterations)

    @torch.no_grad()
    def training_labels(self, image: Tensor, cam: Tensor, label: Tensor, box: Tensor) -> Tensor:
        """Pixel pseudo-labels with a band of doubt between two background thresholds (ToCo, Section 3.4;
        AFA).

        Foreground must win against `high`, background must win even with `low`.

        Args:
            image: [B, 3, H, W], RGB in 0..255.
            cam: [B, C, H, W] in 0..1; only classes of `label` are looked at.
            label: [B, C], 1 for classes in the image, else 0.
            box: long [B, 4], the valid part of the crop as (y0, y1, x0, x1), half open.

        Returns:
            long [B, H, W]: class id 1..C, 0 background, 255 where the two disagree or outside the box.
        """
        strict, lenient = self._refined_labels(image, cam, label, [self.high, self.low])
        doubtful = (strict == 0) & (lenient != 0)
        return strict.masked_fill(doubtful | ~inside(box, cam.shape[-2:]), IGNORE)

    @torch.no_grad()
    def labels(self, image: Tensor, cam: Tensor, label: Tensor) -> Tensor:
        """Pixel pseudo-labels for evaluation, with the one threshold `background`, so that nothing is
        ignored.

        Args:
            image, cam, label: as in `training_labels`.

        Returns:
            long [B, H, W]: 0..C.
        """
        return self._refined_labels(image, cam, label, [self.background])[0]

    @torch.no_grad()
    def token_labels(self, aux_cam: Tensor, grid: tuple[int, int]) -> Tensor:
        """Token pseudo-labels from the auxiliary CAM (ToCo, Section 3.2).

        Args:
            aux_cam: [B, C, H, W] in 0..1, zero for classes not in the image.
            grid: h, w, patches per column and row.

        Returns:
            long [B, h·w]: the strongest class (1..C) above `high`, 0 up to and including `low`, 255 between.
        """
        small = F.interpolate(aux_cam, grid, mode="bilinear", align_corners=False)
        value, index = small.flatten(2).max(1)  # [B, N]
        labels = (index + 1).masked_fill(value <= self.high, IGNORE)
        return labels.masked_fill(value <= self.low, 0)

    def _refined_labels(
        self, image: Tensor, cam: Tensor, label: Tensor, thresholds: list[float]
    ) -> list[Tensor]:
        """One label map [B, H, W] per threshold: argmax of the refined softmax over the classes present."""
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
        refined = self.par(F.interpolate(image.float(), half, mode="bilinear"), torch.cat(scores, 1))
        refined = F.interpolate(refined, (height, width), mode="bilinear")
        classes = F.pad(order + 1, (1, 0))  # slot → class id, slot 0 is background
        return [
            classes.gather(1, r.max(1).indices.flatten(1)).view(b, height, width)
            for r in refined.split(slots + 1, 1)
        ]


def inside(box: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [B, 4] (y0, y1, x0, x1), half open, as masks: bool [B, H, W]."""
    y0, y1, x0, x1 = box.to(torch.long)[:, :, None, None].unbind(1)  # each [B, 1, 1]
    y = torch.arange(size[0], device=box.device)[:, None]
    x = torch.arange(size[1], device=box.device)
    return (y >= y0) & (y < y1) & (x >= x0) & (x < x1)


def mostly_inside(area: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches of a grid (h, w) of which more than half counts, [B, H, W] of 0 and 1 → [B, N] of 0 and 1."""
    return (F.adaptive_avg_pool2d(area[:, None], grid) > 0.5).flatten(1).float()
