"""Queries and keys of all layers, as they enter the attention: what an affinity is made of."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Attention:
    """Queries and keys of all layers, as they enter the attention. P prefix tokens, N = h·w patches.

    Here every token attends to every other; `WindowedAttention` is that of hierarchical backbones.
    """

    queries: list[Tensor]  # per layer [B, H, P+N, d]
    keys: list[Tensor]
    num_prefix_tokens: int  # P
    grid: tuple[int, int]  # h, w

    @property
    def depth(self) -> int:
        """Number of layers K."""
        return len(self.queries)

    @property
    def heads(self) -> int:
        """Number of heads H of a layer, the first one where layers differ."""
        return self.heads_in(0)

    def heads_in(self, layer: int) -> int:
        """Number of heads of one layer."""
        return self.queries[layer].shape[1]

    @property
    def patches(self) -> int:
        """Number of patches N."""
        return self.queries[0].shape[2] - self.num_prefix_tokens

    def __getitem__(self, images: slice) -> "Attention":
        """The attention of some images of the batch."""
        return self.map(lambda tensor: tensor[images])

    def map(self, function: Callable[..., Tensor], *others: "Attention") -> "Attention":
        """Apply a function to the same tensor of this attention and of others, one after the other."""
        queries, keys = (
            [function(*layers) for layers in zip(*(getattr(a, side) for a in (self, *others)), strict=True)]
            for side in ("queries", "keys")
        )
        return replace(self, queries=queries, keys=keys)

    def sharing(self, known: dict[Hashable, Tensor]) -> "Attention":
        """The same attention, with what does not depend on the image taken from, or put into, `known`."""
        return self

    def times(self, layer: int, values: Tensor, *, probabilities: bool = True) -> Tensor:
        """Head mean of one layer's attention times values on all tokens, without the map: [B, P+N, V] → the
        same."""
        apply = self._attend if probabilities else self._project
        return apply(self.queries[layer], self.keys[layer], values)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, values: Tensor) -> Tensor:
        """Fused attention with values in pieces as wide as the keys, which fused kernels want."""
        heads, d = q.shape[1], q.shape[-1]
        mixed = []
        for piece in values.to(q.dtype).split(d, -1):
            wide = F.pad(piece, (0, d - piece.shape[-1])).unsqueeze(1).expand(-1, heads, -1, -1)
            mixed.append(F.scaled_dot_product_attention(q, k, wide)[..., : piece.shape[-1]])
        return torch.cat([m.float().mean(1) for m in mixed], -1)

    @staticmethod
    def _project(q: Tensor, k: Tensor, values: Tensor) -> Tensor:
        """Two thin products instead of the logits."""
        q, k = q.float(), k.float()
        with torch.autocast(q.device.type, enabled=False):  # sums that cancel do not survive bfloat16
            mixed = q @ (k.transpose(-2, -1) @ values.float().unsqueeze(1))  # [B, H, P+N, V]
            return mixed.mean(1) * q.shape[-1] ** -0.5

    def mean_map(self, layer: int, *, probabilities: bool = True) -> Tensor:
        """Head mean of one layer, [B, P+N, P+N], float32."""
        return self.layer_map(layer, probabilities=probabilities).mean(1)

    def layer_map(self, layer: int, rows: slice = slice(None), *, probabilities: bool = True) -> Tensor:
        """All heads of one layer, [B, H, rows, P+N], float32: softmax(QKᵀ/√d), or QKᵀ/√d itself."""
        queries, keys = self.queries[layer][:, :, rows].float(), self.keys[layer].float()
        with torch.autocast(queries.device.type, enabled=False):
            logits = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)  # [B, H, rows, P+N]
        return logits.softmax(-1) if probabilities else logits
