"""Where every random number comes from: one function turns (purpose, seed, step, rank) into a seed.

Training seeds its generators here alone; the built-in scenes have streams of their own. A resumed run, a
run with another number of loader processes and a run that shares its batch among several processes
therefore draw the same numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

Purpose = Literal["network", "objectives", "crops", "drop path", "order", "views"]
_STREAMS = {"order": 0, "views": 1}


def derive_seed(purpose: Purpose, seed: int, step: int = 0, rank: int = 0) -> int:
    """The seed of one purpose.

    Args:
        purpose: "network" and "objectives" initialise weights; "crops" draws local crops and masked blocks,
            the same on every rank; "drop path" differs between ranks; "order" shuffles an epoch; "views"
            augments one item.
        seed: `train.seed`, 0 or more.
        step: the training step; for "order" the epoch, for "views" the position of the item in the run.
        rank: number of this process; only "drop path" depends on it.
    """
    if purpose in _STREAMS:  # well mixed, because neighbouring positions must not look alike
        return int(np.random.SeedSequence((seed, _STREAMS[purpose], step)).generate_state(1)[0])
    if purpose == "network":
        return seed
    if purpose == "objectives":
        return seed + 1  # heads start alike in every method, whatever the network drew
    return seed * 1_000_003 + step + (500_009 * rank if purpose == "drop path" else 0)


def generator(purpose: Purpose, seed: int, step: int = 0, rank: int = 0) -> torch.Generator:
    """A CPU generator, so that every device draws the same numbers; arguments as in `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(purpose, seed, step, rank))


@contextmanager
def seeded(
    purpose: Purpose, seed: int, step: int = 0, rank: int = 0, device: torch.device | None = None
) -> Iterator[None]:
    """Seed the global generators for a while and restore their states afterwards; arguments as in
    `derive_seed`.

    Args:
        device: a GPU whose generator is seeded too; without one only the CPU's generator is touched.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    value = derive_seed(purpose, seed, step, rank)
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(value)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(value)
        yield
