"""What attention does in every layer, and what a training step keeps in memory.

Attention statistics stream over a data set: queries and keys of one batch are kept, maps exist for one layer of one
image at a time. Activation memory is counted exactly from what autograd saves, beside a formula.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssepa_lib.errors import UserError
from ssepa_lib.model.network import Network, evaluating

if TYPE_CHECKING:
    import pandas as pd


def attention_entropy(attention: Tensor) -> Tensor:
    """Shannon entropy −Σ p log p of every query's distribution over keys, in nats. [..., T, T] → [..., T].

    Between 0 (one key) and log T (all keys alike).
    """
    return torch.special.entr(attention).sum(-1)


def patch_distances(grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Distances between patch centres in pixels, [N, N], for a grid of h·w patches of `patch_size` (height, width)."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    centres = torch.stack([rows.flatten() * patch_size[0], columns.flatten() * patch_size[1]], 1)
    return torch.cdist(centres, centres)


def map_statistics(attention: Tensor, distances: Tensor, prefix: int) -> Tensor:
    """Entropy, attention distance and class mass of every head of one map.

    Args:
        attention: [H, P+N, P+N], rows sum to one.
        distances: [N, N], pixels.
        prefix: P; the first prefix token is the class token.

    Returns:
        [H, 3]: entropy in nats, mean over all queries; distance in pixels between a patch and the patches it attends
        to, weighted by the attention among patches; probability that patches give to the class token (NaN if P = 0).
    """
    patches = attention[:, prefix:, prefix:]
    among = patches.sum(-1).clamp_min(1e-12)  # what is left for patches beside the prefix tokens
    distance = ((patches * distances).sum(-1) / among).mean(-1)
    mass = attention[:, prefix:, 0].mean(-1) if prefix else torch.full_like(distance, torch.nan)
    return torch.stack([attention_entropy(attention).mean(-1), distance, mass], -1)


def layer_maps(queries: Tensor, keys: Tensor) -> Iterator[Tensor]:
    """Softmax attention of one layer, image by image: queries and keys [B, H, T, d] → B times [H, T, T], float32."""
    for q, k in zip(queries.float(), keys.float(), strict=True):
        yield (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


@torch.no_grad()
def attention_statistics(
    network: Network, batches: Iterable[Tensor], device: torch.device | str
) -> pd.DataFrame:
    """Attention statistics per layer and head, mean over all images; `.to_csv(path, index=False)` saves them.

    Args:
        network: only its backbone is run, in evaluation mode.
        batches: images [B, 3, H, W], 0..255; sizes may differ between batches.
        device: where to run.

    Returns:
        Columns layer (from 0), head (from 0), entropy (nats), distance (pixels), class_mass (0..1, NaN without a class
        token), images; see `map_statistics`.

    Raises:
        UserError: there is no image.
    """
    import pandas as pd  # here, so that counting memory does not need it

    backbone, images, total = network.backbone, 0, None
    with evaluating(network):
        for batch in batches:
            out = backbone(batch.to(device), capture=True)
            distances = patch_distances(out.grid, backbone.patch_size).to(device)
            sums = [
                sum(map_statistics(attention, distances, out.prefix) for attention in layer_maps(q, k))
                for q, k in zip(out.queries, out.keys, strict=True)
            ]
            sums = torch.stack(sums).double().cpu()  # [K, H, 3]
            total = sums if total is None else total + sums
            images += len(batch)
    if total is None:
        raise UserError("attention statistics need at least one image; the data set is empty.")
    mean = (total / images).tolist()
    rows = [
        (layer, head, *values, images)
        for layer, heads in enumerate(mean)
        for head, values in enumerate(heads)
    ]
    return pd.DataFrame(rows, columns=["layer", "head", "entropy", "distance", "class_mass", "images"])


def deep_layers(depth: int) -> list[int]:
    """The last 40 % of the layers, counted from 0: 7 to 11 of 12, as in FSR's entropy analysis."""
    return list(range(depth - round(0.4 * depth), depth))


def deep_summary(statistics: pd.DataFrame) -> pd.Series:
    """Deep-layer mean and spread of a table from `attention_statistics`.

    Spread is the standard deviation between the heads of a layer, mean over the deep layers: what FSR
    claims, deep layers "higher and tighter" with unc.FSR, is a larger `entropy` and a smaller `entropy_spread`.
    """
    import pandas as pd

    layers = deep_layers(int(statistics["layer"].max()) + 1)
    by_layer = statistics[statistics["layer"].isin(layers)].groupby("layer")[
        ["entropy", "distance", "class_mass"]
    ]
    spread = by_layer.std(ddof=0).mean().add_suffix("_spread")
    return pd.concat(
        [by_layer.mean().mean(), spread, pd.Series({"first_layer": layers[0], "last_layer": layers[-1]})]
    )


@torch.no_grad()
def class_attention(network: Network, image: Tensor, layer: int = -1) -> Tensor:
    """How much the class token attends to each patch, [B, 3, H, W] in 0..255 → [B, heads, h, w].

    From the attention aggregator where the network has one (`layer` is then ignored), else from the class token of
    backbone layer `layer`; there, a map sums to one minus the attention to prefix tokens.

    Raises:
        UserError: the network pools its class token, without attention.
    """
    out = network.backbone(image, capture=True)
    if network.aggregator is not None:
        maps = network.aggregator.attention(out.patches)
    elif out.prefix:
        query, keys = out.queries[layer][:, :, :1].float(), out.keys[layer].float()
        maps = (query @ keys.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)[:, :, 0, out.prefix :]
    else:
        raise UserError(
            "this network has no class token that attends; set model.aggregator to class_token or mca."
        )
    return maps.unflatten(-1, out.grid)


class _Saved:
    """Holds one tensor that autograd saved; dies with the graph node that owns it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def saved_activation_bytes(function: Callable[[], object], *modules: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of what `function` returns, exact on any device.

    Each storage counts once however many views of it are saved; parameters and buffers of `modules` do not count,
    low-precision copies of them made under autocast do. What a custom autograd function keeps outside
    `save_for_backward` is not seen.
    """
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # an output would hold its own graph node, and never be freed
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = function()  # keeps the graph alive while it is counted
    fixed = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
    storages = {s.data_ptr(): s.nbytes() for s in (saved.tensor.untyped_storage() for saved in alive)}
    del result
    return sum(size for pointer, size in storages.items() if pointer not in fixed)


def analytic_activation_bytes(
    batch: int,
    tokens: int,
    width: int,
    depth: int,
    heads: int,
    *,
    prefix: int = 1,
    pixels: int = 0,
    mlp_ratio: float = 4.0,
    value: int = 4,
    fused: bool = True,
    checkpointing: bool = False,
) -> dict[str, int]:
    """What a plain vision transformer keeps for its backward pass, term by term, in bytes; the sum is the whole.

    Per block and token: the inputs of both norms (2D, always float32) with mean and deviation (4 float32), what both
    norms hand on (2D), queries, keys and values (3D), the attention's output (D), the MLP's hidden values before and
    after GELU (2·ratio·D). Fused attention adds one float32 per query and head, plain attention a T² map per head.
    After the last block: the final norm's input and statistics. Before the first: the image, for the patch embedding.
    Autocast adds one low-precision copy of every weight matrix. Checkpointing keeps only the input of every block; one
    block at a time is rebuilt in the backward pass. Classifier and decoder are not included, nor what a processor adds
    under autocast for attending to short sequences in float32 (10·D bytes per block and token).

    Args:
        batch: B. tokens: T, patches and prefix tokens. width: D. depth: K. heads: H. prefix: tokens without a patch.
        pixels: values per input image, 3·height·width; 0: the patch embedding is frozen.
        mlp_ratio: hidden width of the MLP over D.
        value: bytes per value: 4 in float32, 2 under bfloat16 autocast.
        fused: attention by a fused kernel.
        checkpointing: recompute blocks in the backward pass.
    """
    rows, token = batch * tokens, batch * tokens * width
    stream = 4 * token
    block = {
        "residual stream": 2 * stream,
        "norm statistics": 4 * rows * 4,
        "norm outputs": 2 * token * value,
        "queries, keys, values": 3 * token * value,
        "attention output": token * value,
        "attention log-sums" if fused else "attention maps": rows * heads * (4 if fused else tokens * value),
        "MLP hidden values": round(2 * mlp_ratio * token) * value,
    }
    weights = 0 if checkpointing else round(depth * (4 + 2 * mlp_ratio) * width**2)
    weights += width * pixels // (tokens - prefix)
    if checkpointing:
        block = {"residual stream": stream}
    terms = {name: depth * size for name, size in block.items()}
    terms |= {"final norm": stream + 2 * rows * 4, "image": batch * pixels * value}
    return terms if value == 4 else terms | {"weight copies": weights * value}


def affinity_map_bytes(
    batch: int, tokens: int, depth: int, heads: int, strategy: str = "haaf_fused", value: int = 4
) -> int:
    """Bytes of the attention maps that a patch affinity stacks (SS-EPA, Table 4), for T = `tokens`.

    "all_heads" stacks K·H maps of T² values, "haaf_dense" the K head means, "haaf_fused" none.
    """
    maps = {"all_heads": depth * heads, "haaf_dense": depth, "haaf_fused": 0}
    return batch * maps[strategy] * tokens**2 * value


def peak_memory(function: Callable[[], object], device: torch.device | str) -> int:
    """Largest number of bytes that tensors made inside `function` occupy at once, beyond what was there before.

    On a GPU from the allocator's own counter; on the CPU from the profiler's record of every allocation, which is
    exact but slow (seconds for a large step).
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # the profiler announces itself on standard error otherwise
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        current += event["args"]["Bytes"]
        peak = max(peak, current)
    return peak
