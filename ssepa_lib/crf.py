"""Dense CRF for inference, in worker processes. Imports no torch, so that a worker starts at once."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import numpy as np

from ssepa_lib.errors import UserError

GAUSSIAN, BILATERAL = 1, 4  # weights of the two pairwise terms, in nats


def crf_available() -> bool:
    """Whether the optional package for the dense CRF is installed."""
    return find_spec("pydensecrf") is not None


def dense_crf(image: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Dense CRF with ToCo's settings: 10 iterations, Gaussian (σ 1 px, weight 1), bilateral (121 px, 5 levels, 4).

    The pairwise terms move the log-ratio of two classes by at most about the sum of their weights, so a class that is
    nowhere within e⁵ of the strongest cannot win a pixel and is left out. On VOC images with 21 classes, half to all of
    the time remains, and the same labels up to one pixel in a million.

    Args:
        image: uint8 [H, W, 3], RGB.
        probabilities: [C, H, W], background first, sum 1 over C.

    Returns:
        Refined probabilities [C, H, W], float32; 0 for classes left out.

    Raises:
        UserError: the package `pydensecrf2` is not installed.
    """
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise UserError("dense CRF needs pydensecrf2: install the project's `crf` extra, or go without CRF.") from error
    _, height, width = probabilities.shape
    strongest = probabilities.max(0) * np.exp(-(GAUSSIAN + BILATERAL))
    possible = (probabilities >= strongest).any((1, 2))  # at least the strongest itself
    unary = -np.log(np.clip(probabilities[possible], 1e-5, 1.0))
    crf = DenseCRF2D(width, height, len(unary))
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(len(unary), -1), dtype=np.float32))
    crf.addPairwiseGaussian(sxy=1, compat=GAUSSIAN)
    crf.addPairwiseBilateral(sxy=121, srgb=5, rgbim=np.ascontiguousarray(image), compat=BILATERAL)
    refined = np.zeros(probabilities.shape, np.float32)
    refined[possible] = np.reshape(crf.inference(10), (-1, height, width))
    return refined


def crf_pool(jobs: Iterable[tuple[np.ndarray, np.ndarray]], processes: int) -> Iterator[np.ndarray]:
    """`dense_crf` of every (image, probabilities) job, in order, over worker processes; 0 or 1: in this process.

    Jobs are drawn lazily, at most two per worker ahead, so memory stays bounded and nothing goes through the disk.
    """
    if processes <= 1:
        yield from (dense_crf(*job) for job in jobs)
        return
    # "spawn", because a forked copy of a process that already uses the GPU or threads may hang
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
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
