"""Pixel-adaptive refinement (PAR): maps are made to follow the colours of the image."""

from collections.abc import Iterator
from math import hypot

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RING = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


class PixelAdaptiveRefinement(nn.Module):
    """Diffuse scores between neighbours of similar colour (AFA, Section 3.3; ToCo uses it unchanged).

    Every pixel has 8 neighbours at each dilation (replicate padding). A neighbour's weight is a softmax over
    all neighbours of −(|ΔI| / 0.3σ_I)², averaged over RGB, plus 0.01 times a softmax of −(|Δp| / 0.3σ_p)²; σ
    are unbiased standard deviations over the neighbours. Each iteration replaces a pixel's scores by the
    weighted sum of its neighbours' scores.
    """

    SPREAD, POSITION, EPSILON = 0.3, 0.01, 1e-8

    def __init__(self, dilations: list[int], iterations: int) -> None:
        super().__init__()
        self.shifts = [(d * y, d * x) for d in dilations for y, x in RING]
        self.margin, self.iterations = max(dilations), iterations
        distance = torch.tensor([hypot(y, x) for y, x in self.shifts])
        nearness = (distance / (distance.std() + self.EPSILON) / self.SPREAD).square().neg().softmax(0)
        self.register_buffer("position", self.POSITION * nearness, persistent=False)  # [neighbours]

    def _neighbours(self, maps: Tensor) -> Iterator[Tensor]:
        """The maps [B, C, H, W] seen from each neighbour in turn: views of one padded copy."""
        m, (h, w) = self.margin, maps.shape[-2:]
        padded = F.pad(maps, (m, m, m, m), mode="replicate")
        for y, x in self.shifts:
            yield padded[..., m + y : m + y + h, m + x : m + x + w]

    def weights(self, image: Tensor) -> Tensor:
        """Neighbour weights [B, neighbours, H, W] of an image [B, 3, H, W] in 0..255; they sum to 1.01."""
        count = len(self.shifts)
        mean = sum(self._neighbours(image)) / count
        variance = sum((n - mean).square_() for n in self._neighbours(image)) / (count - 1)
        scale = 1 / (image.shape[1] * (self.SPREAD * (variance.sqrt() + self.EPSILON)) ** 2)
        logits = torch.stack(
            [((n - image).square_() * scale).sum(1).neg_() for n in self._neighbours(image)], 1
        )
        return logits.softmax(1).add_(self.position.view(-1, 1, 1))

    @torch.no_grad()
    def forward(self, image: Tensor, scores: Tensor) -> Tensor:
        """Refine.

        Args:
            image: [B, 3, H, W], RGB in 0..255, any dtype.
            scores: [B, C, H, W].

        Returns:
            Refined scores [B, C, H, W], float32, without gradient.
        """
        # a GPU wants the whole batch at once; on a CPU one image at a time stays in the cache
        size = 1 if scores.device.type == "cpu" else len(scores)
        pairs = zip(image.float().split(size), scores.float().split(size), strict=True)
        return torch.cat([self._diffuse(self.weights(i).unsqueeze(2), s) for i, s in pairs])

    def _diffuse(self, weights: Tensor, scores: Tensor) -> Tensor:
        for _ in range(self.iterations):
            refined = torch.zeros_like(scores)
            for k, neighbour in enumerate(self._neighbours(scores)):
                refined.addcmul_(weights[:, k], neighbour)  # [B, 1, H, W], [B, C, H, W]
            scores = refined
        return scores
