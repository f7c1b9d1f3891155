"""Stands between a transformer block and its attention: records queries and keys, and hides keys."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ssepa_lib.private_api import call_uncompiled

SHORT = 128  # tokens; above, the gain in time is small and the memory twice as much


class AttentionTap(TorchFunctionMode):
    """Stands between a block and its fused attention, however timm names its modules.

    It records queries and keys where asked, hides keys where asked, and lets training on a CPU attend in
    float32 where the sequence is short: there the backward pass of the bfloat16 kernel is up to ten times
    slower.

    Args:
        capture: record queries and keys, with their gradient.
        visible: bool [B, 1, 1, T], the keys that may be attended to; None: all. B counts windows where a
            block attends in windows.
    """

    def __init__(self, capture: bool = False, visible: Tensor | None = None) -> None:
        super().__init__()
        self.capture, self.visible = capture, visible
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.biases: list[Tensor | None] = []  # what is added to the logits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value, *rest = args
        kwargs = dict(kwargs or {})
        if self.visible is not None:
            kwargs["attn_mask"] = self._masked(kwargs.get("attn_mask"))
        bias = kwargs.get("attn_mask")
        if self.capture:
            self.queries.append(query)
            sharing = query.shape[1] // key.shape[1]  # heads that share a key
            self.keys.append(key if sharing == 1 else key.repeat_interleave(sharing, 1))
            self.biases.append(bias)
        if query.device.type != "cpu" or not torch.is_grad_enabled() or query.shape[2] > SHORT:
            return func(*args, **kwargs)
        if bias is not None and bias.is_floating_point():
            kwargs["attn_mask"] = bias.float()
        with torch.autocast("cpu", enabled=False):  # it would cast back
            return func(query.float(), key.float(), value.float(), *rest, **kwargs).to(query.dtype)

    def _masked(self, bias: Tensor | None) -> Tensor:
        """The visible keys, as a bias where there is one already."""
        return self.visible if bias is None else torch.where(self.visible, bias, -torch.inf)

    def run(self, block: nn.Module, x: Tensor, **extra: Tensor) -> Tensor:
        """One block, past a compiled call, which would hide the attention."""
        with self:
            return call_uncompiled(block, x, **extra)
