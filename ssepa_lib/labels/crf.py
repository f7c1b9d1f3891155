"""Dense CRF for inference (Krähenbühl and Koltun, NeurIPS 2011), in worker processes.

The file imports no torch, so that a worker starts at once.
"""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ssepa_lib.errors import UserError

GAUSSIAN, BILATERAL = 1, 4  # weights of the two pairwise terms, in nats

_MISSING = (
    "dense CRF needs pydensecrf2: run `pip install -e '.[crf]'` in the project's folder (with a C++ compiler "
    "and Python 3.11 or 3.12), or go without CRF."
)


def crf_available() -> bool:
    """Whether the optional package for the dense CRF is installed."""
    return find_spec("pydensecrf") is not None


def require_crf() -> None:
    """Refuse to begin what will need the dense CRF where it is not installed.

    Raises:
        UserError: the package `pydensecrf2` is not installed.
    """
    if not crf_available():
        raise UserError(_MISSING)


def dense_crf(image: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Dense CRF with ToCo's settings: 10 iterations, Gaussian (σ 1 px, weight 1), bilateral (121 px, 5
    levels, 4).

    The pairwise terms move the log-ratio of two classes by at most about the sum of their weights, so a class
    that is nowhere within e⁵ of the strongest cannot win a pixel and is left out. On VOC images with 21
    classes, half to all of the time remains, and the same labels up to one pixel in a million.

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
        raise UserError(_MISSING) from error
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


def crf_labels(image: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Most probable channel after `dense_crf`, uint8 [H, W]; arguments as there."""
    return dense_crf(image, probabilities).argmax(0).astype(np.uint8)


def crf_pool(
    jobs: Iterable[tuple[np.ndarray, np.ndarray, Any]], processes: int
) -> Iterator[tuple[np.ndarray, Any]]:
    """`crf_labels` over worker processes; 0 or 1: in this process.

    Jobs (image, probabilities, rest) become (labels, rest), in order. They are drawn lazily, at most two per
    worker ahead, so memory stays bounded and nothing goes through the disk; the rest stays in this process.
    The workers end with this process, however it ends, and at once where the iterator is closed early.

    Raises:
        UserError: a worker has died, or memory is exhausted; see also `dense_crf`.
    """
    if processes <= 1:
        yield from ((crf_labels(image, probabilities), rest) for image, probabilities, rest in jobs)
        return
    # "spawn", because a forked copy of a process that already uses the GPU or threads may hang
    context = get_context("spawn")
    theirs, lifeline = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, initializer=_end_with, initargs=(theirs,))
    waiting = deque()
    try:
        for image, probabilities, rest in jobs:
            waiting.append((pool.submit(crf_labels, image, probabilities), rest))
            if len(waiting) >= 2 * processes:
                future, kept = waiting.popleft()
                yield future.result(), kept
        for future, rest in waiting:
            yield future.result(), rest
    except (BrokenProcessPool, MemoryError) as error:
        raise UserError(
            "a worker of the dense CRF has died, most likely because memory ran out; close other programs, "
            "give the command fewer cores (taskset -c 0), or leave ms_crf out."
        ) from error
    except BaseException:
        lifeline.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        lifeline.close()
        theirs.close()


def _end_with(parent: Connection) -> None:
    """Let this process end as soon as the other end of the connection is closed, if only by a kill."""

    def watch() -> None:
        with suppress(EOFError, OSError):
            parent.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
