"""What a training step keeps in memory: counted from what autograd saves, by formula, and as the peak.

Activation memory is exact on any device; the peak comes from the allocator of a GPU or the profiler of a CPU.
"""

import json
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


class _Saved:
    """Holds one tensor that autograd saved; dies with the graph node that owns it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def saved_activation_bytes(function: Callable[[], object], *modules: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of what `function` returns, exact on any device.

    Each storage counts once however many views of it are saved; parameters and buffers of `modules` do not
    count, low-precision copies of them made under autocast do. What a custom autograd function keeps
    outside `save_for_backward` is not seen.
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
    num_prefix_tokens: int = 1,
    pixels: int = 0,
    mlp_ratio: float = 4.0,
    value: int = 4,
    fused: bool = True,
    checkpointing: bool = False,
) -> dict[str, int]:
    """What a plain vision transformer keeps for its backward pass, in bytes: terms whose sum is the whole.

    Per block and token: the inputs of both norms (2D, always float32) with mean and deviation (4 float32),
    what both norms hand on (2D), queries, keys and values (3D), the attention's output (D), the MLP's
    hidden values before and after GELU (2·ratio·D). Fused attention adds one float32 per query and head,
    plain attention a T² map per head. Around the blocks: the image, for the patch embedding, and the final
    norm's input and statistics. Autocast adds a low-precision copy of every weight matrix. Checkpointing
    keeps only the input of every block. Not included: classifier, decoder, and what a CPU adds under
    autocast for attending to short sequences in float32 (10·D bytes per block and token).

    Args:
        batch, width, depth, heads: B, D, K, H.
        tokens: T, patches and prefix tokens; num_prefix_tokens of them have no patch.
        pixels: values per input image, 3·height·width; 0: the patch embedding is frozen.
        mlp_ratio: hidden width of the MLP over D.
        value: bytes per value: 4 in float32, 2 under bfloat16 autocast.
        fused: attention by a fused kernel.
        checkpointing: recompute blocks in the backward pass.
    """
    rows, token, stream = batch * tokens, batch * tokens * width, 4 * batch * tokens * width
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
    weights += width * pixels // (tokens - num_prefix_tokens)
    if checkpointing:
        block = {"residual stream": stream}
    terms = {name: depth * size for name, size in block.items()}
    terms |= {"final norm": stream + 2 * rows * 4, "image": batch * pixels * value}
    return terms if value == 4 else terms | {"weight copies": weights * value}


def affinity_map_bytes(
    batch: int, tokens: int, depth: int, heads: int, strategy: str = "matrix_free", value: int = 4
) -> int:
    """Bytes of the attention maps that a patch affinity stacks (SS-EPA, Table 4), for T = `tokens`.

    "stack_heads" stacks K·H maps of T² values, "stack_layers" the K head means, "matrix_free" none.
    """
    maps = {"stack_heads": depth * heads, "stack_layers": depth, "matrix_free": 0}
    return batch * maps[strategy] * tokens**2 * value


def peak_memory(function: Callable[[], object], device: torch.device | str) -> int:
    """Largest number of bytes that tensors made inside `function` occupy at once, beyond those before.

    On a GPU from the allocator's own counter; on the CPU from the profiler's record of every allocation,
    which is exact but slow (seconds for a large step).
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
    )  # otherwise the profiler announces itself on standard error
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
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
