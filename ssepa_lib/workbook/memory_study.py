"""Products with the affinity in blocks of rows, and which image still fits into a memory."""

import torch
from torch import Tensor

from ssepa_lib.evaluation.memory import affinity_map_bytes, analytic_activation_bytes
from ssepa_lib.model import Attention

STRATEGIES = ("stack_heads", "stack_layers", "matrix_free")
LARGEST = 16384  # side at which the search for an image that fits ends, pixels


def row_blocks(attention: Attention, cam: Tensor, rows: int) -> Tensor:
    """Uniform-mean affinity × map, so many rows of the affinity at a time: [B, N, C] → [B, N, C].

    Args:
        rows: 1 or more; the last block may be smaller.
    """
    first, end = attention.num_prefix_tokens, attention.num_prefix_tokens + attention.patches
    blocks = []
    for start in range(first, end, rows):
        part = slice(start, min(start + rows, end))
        maps = sum(attention.layer_map(k, part).mean(1) for k in range(attention.depth))  # [B, rows, T]
        blocks.append(maps[..., first:] @ cam / attention.depth)
    return torch.cat(blocks, 1)


def step_bytes(
    side: int,
    strategy: str,
    *,
    batch: int = 1,
    layers: int = 12,
    heads: int = 12,
    width: int = 768,
    patch: int = 16,
    prefix: int = 1,
    value: int = 4,
    scale: float = 1.0,
    flip: bool = False,
) -> dict[str, int]:
    """By formula: what the encoder keeps for the backward pass of a step, and the affinity's maps.

    Weights, optimizer and the other losses come on top.

    Args:
        side: of the training crop, pixels.
        strategy: see `affinity_map_bytes`.
        value: bytes per value, 4 or 2.
        scale, flip: of the pass whose maps are counted; with `flip` an image and its flip are stacked.

    Returns:
        `kept` and `maps`, bytes.
    """
    tokens = round(side / patch) ** 2 + prefix
    sizes = {"num_prefix_tokens": prefix, "pixels": 3 * side**2, "value": value}
    kept = analytic_activation_bytes(batch, tokens, width, layers, heads, **sizes)
    scaled = round(side * scale / patch) ** 2 + prefix
    maps = affinity_map_bytes(batch * (1 + flip), scaled, layers, heads, strategy, value)
    return {"kept": sum(kept.values()), "maps": maps}


def largest_side(strategy: str, budget: float, **network: float) -> int:
    """Side of the largest square image, a multiple of the patch, whose `step_bytes` fit into a memory.

    Args:
        budget: bytes.
        network: arguments of `step_bytes`.

    Returns:
        Pixels; 0 where not even one patch fits.
    """
    patch = network.get("patch", 16)
    side = 0
    while side + patch <= LARGEST and sum(step_bytes(side + patch, strategy, **network).values()) <= budget:
        side += patch
    return side
