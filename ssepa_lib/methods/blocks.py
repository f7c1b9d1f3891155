"""What the random views of ToCo, FSR and MCC share: draws that devices agree on, and blocks of patches."""

import torch
from torch import Tensor

from ssepa_lib.device import rank_slice


def uniform(images: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform random numbers [images, *shape] in 0..1, on the generator's device.

    Several processes draw for the whole batch and take their share, so that they see what one would see.
    """

    def draw(rows: int) -> Tensor:
        return torch.rand(rows, *shape, generator=generator, device=generator.device)

    return rank_slice(draw, images)


def block_grid(grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Blocks of side² patches per column and per row of a grid (h, w); those at the border may be smaller."""
    return -(-grid[0] // side), -(-grid[1] // side)


def to_patches(blocks: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """A value per block [..., rows, columns] as a value per patch of the grid (h, w): [..., h·w]."""
    spread = blocks.repeat_interleave(side, -2).repeat_interleave(side, -1)
    return spread[..., : grid[0], : grid[1]].flatten(-2)
