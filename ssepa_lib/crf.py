"""Dense CRF for inference, in worker processes. Imports no torch, so that a worker starts at once."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import numpy as np

from ssepa_lib.errors import UserError


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
