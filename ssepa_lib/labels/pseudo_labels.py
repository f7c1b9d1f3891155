"""From class activation maps to labels: per pixel (after PAR) for the decoder, per token for the contrast."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssepa_lib.data import IGNORE
from ssepa_lib.labels.par import PixelAdaptiveRefinement
from ssepa_lib.model.learned_affinity import LearnedAffinity
from ssepa_lib.model.network import as_maps
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
    def training_labels(
        self,
        image: Tensor,
        cam: Tensor,
        label: Tensor,
        box: Tensor,
        spread: LearnedAffinity | None = None,
    ) -> Tensor:
        """Pixel pseudo-labels with a band of doubt between two background thresholds (ToCo, Section 3.4;
        AFA).

        Foreground must win against `high`, background must win even with `low`.

        Args:
            image: [B, 3, H, W], RGB in 0..255.
            cam: [B, C, H, W] in 0..1; only classes of `label` are looked at.
            label: [B, C], 1 for classes in the image, else 0.
            box: long [B, 4], the valid part of the crop as (y0, y1, x0, x1), half open.
            spread: propagates the scores of background and classes before PAR, which then stays inside
                the box (AFA); None: no propagation.

        Returns:
            long [B, H, W]: class id 1..C, 0 background, 255 where the two disagree or outside the box.
        """
        strict, lenient = self._refined_labels(image, cam, label, [self.high, self.low], spread, box)
        doubtful = (strict == 0) & (lenient != 0)
        return strict.masked_fill(doubtful | ~inside(box, cam.shape[-2:]), IGNORE)

    @torch.no_grad()
    def labels(
        self, image: Tensor, cam: Tensor, label: Tensor, spread: LearnedAffinity | None = None
    ) -> Tensor:
        """Pixel pseudo-labels for evaluation, with one threshold, so that nothing is ignored: `background`,
        or `low` with `spread`, as in AFA's validation.

        Args:
            image, cam, label, spread: as in `training_labels`; there is no padding.

        Returns:
            long [B, H, W]: 0..C.
        """
        threshold = self.background if spread is None else self.low
        return self._refined_labels(image, cam, label, [threshold], spread)[0]

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
        self,
        image: Tensor,
        cam: Tensor,
        label: Tensor,
        thresholds: list[float],
        spread: LearnedAffinity | None = None,
        box: Tensor | None = None,
    ) -> list[Tensor]:
        """One label map [B, H, W] per threshold: argmax of the refined softmax over the classes present."""
        b, _, height, width = cam.shape
        grid = (height // 2, width // 2) if spread is None else spread.attention.grid
        present = label > 0
        slots = int(present.sum(1).max())
        order = (
            present.float().sort(dim=1, descending=True, stable=True).indices[:, :slots]
        )  # [B, slots], present first
        absent = ~present.gather(1, order)[:, :, None, None]
        cam = cam.float().gather(1, order[:, :, None, None].expand(-1, -1, height, width))
        cam = F.interpolate(cam, grid, mode="bilinear") if slots else cam.new_zeros(b, 0, *grid)
        cam = cam.masked_fill(absent, -torch.inf)  # probability 0: a padding slot can never win
        scores = [torch.cat([cam.new_full((b, 1, *grid), t), cam], 1).softmax(1) for t in thresholds]
        # all thresholds share the neighbour weights, the costly part
        if spread is None:
            refined = self._at_half_size(image, torch.cat(scores, 1))
        else:
            scores = as_maps(spread @ torch.cat(scores, 1).flatten(2).mT, grid)
            scores = F.interpolate(scores, (height, width), mode="bilinear")
            refined = self._inside(image, scores, box)
        classes = F.pad(order + 1, (1, 0))  # slot → class id, slot 0 is background
        return [
            classes.gather(1, r.max(1).indices.flatten(1)).view(b, height, width)
            for r in refined.split(slots + 1, 1)
        ]

    def _at_half_size(self, image: Tensor, scores: Tensor) -> Tensor:
        """PAR at half the size of images [B, 3, H, W] on scores of any size, [B, X, h, w] → [B, X, H, W]."""
        size = image.shape[-2:]
        half = tuple(max(1, side // 2) for side in size)
        scores = scores if scores.shape[-2:] == half else F.interpolate(scores, half, mode="bilinear")
        scores = self.par(F.interpolate(image.float(), half, mode="bilinear"), scores)
        return F.interpolate(scores, size, mode="bilinear")

    def _inside(self, image: Tensor, scores: Tensor, box: Tensor | None) -> Tensor:
        """PAR of scores [B, X, H, W] which sees nothing outside the box of each image; None: no box."""
        if box is None:
            return self._at_half_size(image, scores)
        for i, (y0, y1, x0, x1) in enumerate(box.tolist()):
            part = (slice(i, i + 1), slice(None), slice(y0, y1), slice(x0, x1))
            scores[part] = self._at_half_size(image[part], scores[part])
        return scores


def inside(box: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [B, 4] (y0, y1, x0, x1), half open, as masks: bool [B, H, W]."""
    y0, y1, x0, x1 = box.to(torch.long)[:, :, None, None].unbind(1)  # each [B, 1, 1]
    y = torch.arange(size[0], device=box.device)[:, None]
    x = torch.arange(size[1], device=box.device)
    return (y >= y0) & (y < y1) & (x >= x0) & (x < x1)


def mostly_inside(area: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches of a grid (h, w) of which more than half counts, [B, H, W] of 0 and 1 → [B, N] of 0 and 1."""
    return (F.adaptive_avg_pool2d(area[:, None], grid) > 0.5).flatten(1).float()
