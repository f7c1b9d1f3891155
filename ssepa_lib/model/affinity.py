"""Patch affinity from attention, and head-average attention fusion (SS-EPA, Sections 3.2 and 3.3).

The N×N affinity is a linear operator on class activation maps. It is almost never built: `affinity @ cam` is ordinary
attention with the map as its values, which fused attention computes in O(N) memory.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HAAF(nn.Module):
    """Head-average attention fusion: an MLP from one pooled number per layer to one weight per layer (SS-EPA, Eq. 6).

    The output is K·softmax: non-negative, mean 1, and all ones before training, so that an untrained HAAF is plain
    patch affinity. The descriptor is about 1/N at any depth, so it enters as its logarithm, centred over layers.

    Shape:
        descriptor [B, K] → weights [B, K].
    """

    def __init__(self, layers: int, hidden: int = 32):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(layers, hidden), nn.GELU(), nn.Linear(hidden, layers))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    def forward(self, descriptor: Tensor) -> Tensor:
        x = descriptor.float().abs().clamp_min(1e-12).log()
        x = x - x.mean(1, keepdim=True)
        with torch.autocast(x.device.type, enabled=False):
            return descriptor.shape[1] * self.mlp(x).softmax(1)


class PatchAffinity:
    """Patch affinity A = (1/K) Σ_k w_k · mean_h A_kh without the prefix tokens' rows and columns (SS-EPA, Eq. 5 to 7).

    A_kh is the attention map of layer k and head h: `softmax(QKᵀ/√d)`, or QKᵀ/√d itself with `source="logits"`.

    Args:
        queries, keys: per layer [B, H, P+N, d].
        prefix: number P of prefix tokens.
        weigh: maps the pooled descriptor [B, K] to layer weights [B, K] (HAAF); None weighs all layers alike.
        source: "softmax" or "logits".
        strategy: "haaf_fused" never builds a map; "haaf_dense" stacks head means [B, K, P+N, P+N]; "all_heads" stacks
            every head [B, K, H, P+N, P+N]. The numbers are the same, the memory is not.
        descriptor: "full" pools the (P+N)² map, "patch" the patch-to-patch block.
        steps: how often the map is multiplied.
    """

    def __init__(
        self,
        queries: list[Tensor],
        keys: list[Tensor],
        prefix: int,
        *,
        weigh: Callable[[Tensor], Tensor] | None = None,
        source: str = "softmax",
        strategy: str = "haaf_fused",
        descriptor: str = "patch",
        steps: int = 1,
    ):
        self.queries, self.keys, self.prefix = queries, keys, prefix
        self.weigh, self.source, self.strategy, self.pooling, self.steps = (
            weigh,
            source,
            strategy,
            descriptor,
            steps,
        )
        self.scale = queries[0].shape[-1] ** -0.5
        self.patches = queries[0].shape[2] - prefix
        self._weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.queries)

    def _map(self, layer: int, rows: slice = slice(None)) -> Tensor:
        """Attention map of one layer, [B, H, rows, P+N], float32."""
        q, k = self.queries[layer][:, :, rows].float(), self.keys[layer].float()
        with torch.autocast(q.device.type, enabled=False):
            logits = q @ k.transpose(-2, -1) * self.scale
        return logits.softmax(-1) if self.source == "softmax" else logits

    def layer_map(self, layer: int) -> Tensor:
        """All heads of one layer with prefix tokens, [B, H, P+N, P+N], for viewing and analysis."""
        return self._map(layer)

    def _pool(self, maps: Tensor) -> Tensor:
        """Global average pool of head-mean maps [..., P+N, P+N] → [...]."""
        p = self.prefix if self.pooling == "patch" else 0
        return maps[..., p:, p:].mean((-2, -1))

    def _columns(self, values: Tensor) -> list[tuple[Tensor, int]]:
        """Values [B, P+N, V] in pieces as wide as the keys, which fused kernels want: [B, H, P+N, d], filled up with
        0, and how many of the d count."""
        q = self.queries[0]
        heads, d = q.shape[1], q.shape[-1]
        pieces = [(F.pad(c, (0, d - c.shape[-1])), c.shape[-1]) for c in values.to(q.dtype).split(d, -1)]
        return [(c.unsqueeze(1).expand(-1, heads, -1, -1), width) for c, width in pieces]

    def _attend(self, layer: int, columns: list[tuple[Tensor, int]]) -> Tensor:
        """Head mean of one layer's attention applied to `_columns(values)`, [B, P+N, V], without the map."""
        q, k = self.queries[layer], self.keys[layer]
        mixed = [F.scaled_dot_product_attention(q, k, c)[..., :width] for c, width in columns]
        return torch.cat([m.float().mean(1) for m in mixed], -1)

    def _project(self, layer: int, values: Tensor) -> Tensor:
        """Head mean of one layer's logits applied to values on all tokens, [B, P+N, V] → [B, P+N, V]."""
        q, k = self.queries[layer].float(), self.keys[layer].float()
        with torch.autocast(q.device.type, enabled=False):  # sums that cancel do not survive bfloat16
            return (q @ (k.transpose(-2, -1) @ values.float().unsqueeze(1))).mean(1) * self.scale

    def propagate(self, cam: Tensor) -> tuple[Tensor, Tensor]:
        """Per-layer products [B, K, N, C] and, from one more value column, the descriptor [B, K]."""
        values = torch.cat([cam, cam.new_ones(*cam.shape[:2], 1)], -1)
        skip = values.new_zeros(len(cam), self.prefix, values.shape[-1])
        if self.pooling == "full":
            skip[..., -1] = 1
        values = torch.cat([skip, values], 1)  # [B, P+N, C+1]
        products, descriptor = [], []
        if self.source == "softmax":
            apply, prepared = self._attend, self._columns(values)
        else:
            apply, prepared = self._project, values
        first = self.prefix if self.pooling == "patch" else 0
        for layer in range(len(self)):
            out = apply(layer, prepared)
            products.append(out[:, self.prefix :, :-1])
            descriptor.append(out[:, first:, -1].mean(1) / (values.shape[1] - first))
        return torch.stack(products, 1), torch.stack(descriptor, 1)

    def _stack(self) -> Tensor:
        """Head-mean maps of all layers, [B, K, P+N, P+N]."""
        stack = None
        for layer in range(len(self)):
            maps = self._map(layer) if self.strategy == "all_heads" else self._map(layer).mean(1)
            if stack is None:  # filled in place: the stack exists once
                stack = maps.new_empty(len(maps), len(self), *maps.shape[1:])
            stack[:, layer] = maps
        return stack.mean(2) if self.strategy == "all_heads" else stack

    def _resolve(self, descriptor: Tensor) -> Tensor:
        """Layer weights [B, K], computed once."""
        if self._weights is None:
            self._weights = torch.ones_like(descriptor) if self.weigh is None else self.weigh(descriptor)
        return self._weights

    def descriptor(self) -> Tensor:
        """Pooled affinity per layer, [B, K]; what HAAF's MLP sees."""
        if self.strategy == "haaf_fused":
            batch = self.queries[0].shape[0]
            return self.propagate(self.queries[0].new_zeros(batch, self.patches, 0, dtype=torch.float32))[1]
        return self._pool(self._stack())

    @property
    def weights(self) -> Tensor:
        """Layer weights v', [B, K]."""
        return self._weights if self._weights is not None else self._resolve(self.descriptor())

    def per_layer(self, cam: Tensor) -> Tensor:
        """Head-mean affinity of each layer applied to a map, [B, N, C] → [B, K, N, C], without weights."""
        return self.propagate(cam)[0]

    def __matmul__(self, cam: Tensor) -> Tensor:
        """Refined map, [B, N, C] → [B, N, C], propagated `steps` times."""
        if self.strategy != "haaf_fused":
            with torch.autocast(cam.device.type, enabled=False):
                dense = self.dense()
                for _ in range(self.steps):
                    cam = dense @ cam.float()
            return cam
        for _ in range(self.steps):
            products, descriptor = self.propagate(cam)
            cam = (self._resolve(descriptor)[:, :, None, None] * products).mean(1)
        return cam

    def dense(self) -> Tensor:
        """The affinity of one step as a matrix, [B, N, N]: row i says from where patch i receives."""
        p = self.prefix
        if self.strategy == "haaf_fused":  # one layer at a time: for viewing, within O(N²)
            weights = self.weights
            maps = (weights[:, k, None, None] * self._map(k).mean(1)[:, p:, p:] for k in range(len(self)))
            return sum(maps) / len(self)
        maps = self._stack()
        weights = self._resolve(self._pool(maps))
        return torch.einsum("bk,bkij->bij", weights, maps)[:, p:, p:] / len(self)

    def row(self, patch: int) -> Tensor:
        """One row of `dense()`, [B, N], in O(N)."""
        at = slice(self.prefix + patch, self.prefix + patch + 1)
        weights = self.weights
        rows = [weights[:, k, None] * self._map(k, at).mean(1)[:, 0, self.prefix :] for k in range(len(self))]
        return sum(rows) / len(self)
