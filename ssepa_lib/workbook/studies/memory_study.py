"""What applying the affinity costs in memory, in blocks of rows too, and which image still fits."""

from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from ssepa_lib.evaluation.memory import (
    affinity_map_bytes,
    analytic_activation_bytes,
    peak_memory,
    saved_activation_bytes,
)
from ssepa_lib.model import Attention, PatchAffinity
from ssepa_lib.workbook.tables import benchmark

STRATEGIES = ("stack_heads", "stack_layers", "matrix_free")
BENCH_NAMES = {"haaf_fused": "matrix_free", "haaf_dense": "stack_layers", "all_heads": "stack_heads"}
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


def affinity_memory(attention: Attention, cam: Tensor, strategy: str) -> dict[str, float]:
    """Memory of applying the affinity of captured attention to maps [B, N, C], in MB of 10⁶ bytes.

    Returns:
        `stacked maps, MB` (formula), `peak, MB` (without gradient, as in training) and `kept for gradient,
        MB` (what autograd would save if a gradient passed through the maps).
    """
    tokens = cam.shape[1] + attention.num_prefix_tokens
    maps = affinity_map_bytes(len(cam), tokens, attention.depth, attention.heads, strategy)

    def propagated(gradient: bool) -> Tensor:
        sides = (attention.queries, attention.keys)
        queries, keys = ([t.detach().requires_grad_(gradient) for t in side] for side in sides)
        leaves = replace(attention, queries=queries, keys=keys)
        return PatchAffinity(leaves, strategy=strategy) @ cam

    peak = peak_memory(lambda: propagated(False), cam.device)
    kept = saved_activation_bytes(lambda: propagated(True))
    return {"stacked maps, MB": maps / 1e6, "peak, MB": peak / 1e6, "kept for gradient, MB": kept / 1e6}


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


def steps_at_published_size() -> pd.DataFrame:
    """Memory of whole training steps of ViT-B/16 at 448², as Table 4 of SS-EPA asks for it, from two sources.

    One is the peak of what a step allocates, measured on a CPU (`results/cpu`), the other the formula: what
    the encoder keeps for one pass, and the stack of maps of the largest pass of the multi-scale CAM.

    Returns:
        The columns of `published.table_4`.
    """
    bench, rows = benchmark("cpu/published_size.json"), []
    peaks = bench[bench["name"].str.startswith("peak memory of a step, ")]
    for _, row in peaks.iterrows():
        name, batch = row["name"].rpartition(", ")[2], int(row["setting"].rpartition(" ")[2])
        strategy = BENCH_NAMES.get(name, name)
        if strategy in STRATEGIES:
            rows += [("none", batch, row["reference"] / 1e3), (strategy, batch, row["value"] / 1e3)]
    measured = pd.DataFrame(rows, columns=["strategy", "batch", "gigabytes"]).drop_duplicates(
        ["strategy", "batch"]
    )
    measured = measured.assign(source="measured here", setting="peak of a step, CPU, bfloat16, 448²")
    counted = [
        (strategy, batch, sum(step_bytes(448, strategy, batch=batch, scale=1.5, flip=True).values()) / 1e9)
        for strategy in STRATEGIES
        for batch in (1, 2)
    ]
    formula = pd.DataFrame(counted, columns=["strategy", "batch", "gigabytes"])
    formula = formula.assign(source="formula", setting="one pass and the largest stack, float32, 448²")
    return pd.concat([measured, formula], ignore_index=True).assign(backbone="ViT-B")
