"""Making maps follow the image: pixel-adaptive refinement for training, dense CRF for inference."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from math import hypot
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssepa_lib.errors import UserError

RING = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


class PixelAdaptiveRefinement(nn.Module):
    """Diffuse scores between neighbours of similar colour (AFA, Section 3.3; ToCo uses it unchanged).

    Every pixel has 8 neighbours at each dilation (replicate padding). A neighbour's weight is a softmax over all
    neighbours of −(|ΔI| / 0.3σ_I)², averaged over RGB, plus 0.01 times a softmax of −(|Δp| / 0.3σ_p)²; σ are unbiased
    standard deviations over the neighbours. Each iteration replaces a pixel's scores by the weighted sum of its
    neighbours' scores.
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
        logits = torch.stack([((n - image).square_() * scale).sum(1).neg_() for n in self._neighbours(image)], 1)
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
        scores = scores.float()
        weights = self.weights(image.float()).unsqueeze(2)  # [B, neighbours, 1, H, W]
        for _ in range(self.iterations):
            refined = torch.zeros_like(scores)
            for k, neighbour in enumerate(self._neighbours(scores)):
                refined.addcmul_(weights[:, k], neighbour)
            scores = refined
        return scores


def crf_available() -> bool:
    """Whether the optional package for the dense CRF is installed."""
    return find_spec("pydensecrf") is not None


def dense_crf(image: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Dense CRF with ToCo's settings: 10 iterations, Gaussian (σ 1 px, weight 1), bilateral (121 px, 5 levels, 4).

    Args:
        image: uint8 [H, W, 3], RGB.
        probabilities: [C, H, W], background first, sum 1 over C.

    Returns:
        Refined probabilities [C, H, W], float32.

    Raises:
        UserError: the package `pydensecrf2` is not installed.
    """
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise UserError("dense CRF needs pydensecrf2: install the project's `crf` extra, or go without CRF.") from error
    classes, height, width = probabilities.shape
    crf = DenseCRF2D(width, height, classes)
    unary = -np.log(np.clip(probabilities, 1e-5, 1.0))
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(classes, -1), dtype=np.float32))
    crf.addPairwiseGaussian(sxy=1, compat=1)
    crf.addPairwiseBilateral(sxy=121, srgb=5, rgbim=np.ascontiguousarray(image), compat=4)
    return np.array(crf.inference(10), dtype=np.float32).reshape(classes, height, width)


def crf_pool(jobs: Iterable[tuple[np.ndarray, np.ndarray]], processes: int) -> Iterator[np.ndarray]:
    """`dense_crf` of every (image, probabilities) job, in order, over worker processes; 0 or 1: in this process.

    Jobs are drawn lazily, at most two per worker ahead, so memory stays bounded and nothing goes through the disk.
    """
    if processes <= 1:
        yield from (dense_crf(*job) for job in jobs)
        return
    # "spawn", because a forked copy of a process that already uses the GPU or threads may hang
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_single_thread)
    waiting = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(dense_crf, *job))
            if len(waiting) >= 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _single_thread() -> None:
    torch.set_num_threads(1)
