"""Attention in windows, and on several grids: the patch affinity of hierarchical backbones.

What changes in equations 4 to 7 of SS-EPA, which are written for a plain ViT:

- Equation 4, the map of a head. A Swin layer attends within windows of M = 7·7 tokens, so that its N×N map is
  zero outside M×M blocks, and the logits get a bias by relative position: softmax(QKᵀ/√d + B). Every second
  layer shifts its windows by half their side. Tokens that the shift brings together from opposite borders do
  not see each other, and neither does anybody see the padding where windows do not divide the grid. Rows
  still sum to one.
- Equation 5, the mean over layers. Layers of different stages have different grids, and a mean needs one.
  With D the mean over, and U the copy to, the tokens of a layer that lie in a patch of the common grid, the
  layer's map is D A U: row-stochastic again. Where the layer is the coarser one, the two change places.
- Equation 6, HAAF. It weighs layers as before, and thereby stages. Without a class token a row-stochastic map
  always has the mean 1/N, so that the pooled descriptor tells layers apart only with `affinity.pooling: max`.
- Equation 7, the product with the map. One application does not leave a window, but the mean of a shifted and
  an unshifted layer connects neighbouring windows: its second power reaches into them, and the third
  further. `affinity.iterations` decides how far a map spreads; in a plain ViT one application reaches
  everywhere.

The EfficientFormer attends in its last stage alone, on a coarse grid: one window that covers it.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.errors import UserError
from ssepa_lib.model.attention import Attention

Grid = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """How a layer cuts its grid into windows: rolled by `shift`, padded at the end, cut. M = wh·ww tokens."""

    grid: Grid  # h, w
    size: Grid  # wh, ww
    shift: Grid = (0, 0)

    @property
    def counts(self) -> Grid:
        """Windows per column and per row."""
        return -(-self.grid[0] // self.size[0]), -(-self.grid[1] // self.size[1])

    @property
    def padding(self) -> Grid:
        """Rows and columns that are missing to whole windows."""
        return tuple(c * s - g for c, s, g in zip(self.counts, self.size, self.grid, strict=True))

    def split(self, x: Tensor) -> Tensor:
        """Values on the grid [B, h, w, V] by window, zero on padding: [B, W, M, V]."""
        x = x.roll((-self.shift[0], -self.shift[1]), (1, 2))
        x = F.pad(x, (0, 0, 0, self.padding[1], 0, self.padding[0]))
        (a, b), (wh, ww) = self.counts, self.size
        return x.view(len(x), a, wh, b, ww, -1).transpose(2, 3).reshape(len(x), a * b, wh * ww, -1)

    def merge(self, x: Tensor) -> Tensor:
        """The inverse of `split`; what stands on padding is dropped: [B, W, M, V] → [B, h, w, V]."""
        (a, b), (wh, ww), (h, w) = self.counts, self.size, self.grid
        x = x.view(len(x), a, b, wh, ww, -1).transpose(2, 3).reshape(len(x), a * wh, b * ww, -1)
        return x[:, :h, :w].roll(self.shift, (1, 2))

    def inside(self, device: torch.device | None = None) -> Tensor:
        """Where a window holds a token and no padding, bool [W, M]."""
        return self.split(torch.ones(1, *self.grid, 1, device=device))[0, :, :, 0] > 0


def resized(values: Tensor, source: Grid, target: Grid) -> Tensor:
    """Values [B, h·w, V] on another grid: the mean over, or a copy to, the tokens that lie in one another."""
    if source == target:
        return values
    mode = "area" if target[0] * target[1] < source[0] * source[1] else "nearest"
    maps = values.transpose(1, 2).unflatten(2, source)
    return F.interpolate(maps, target, mode=mode).flatten(2).transpose(1, 2)


@dataclass
class WindowedAttention(Attention):
    """Attention of a hierarchical backbone as an operator on one common `grid` (h, w), N = h·w.

    Per layer, queries and keys are [B, W, H, M, d]: W windows of M tokens. Nothing larger than the blocks of
    one head exists when a map is propagated.
    """

    windows: list[Windows]
    biases: list[Tensor]  # per layer [1, H, M, M], added to the logits of every window
    hidden: list[Tensor | None]  # per layer bool [W, M, M], pairs that do not see each other; None: all do

    def heads_in(self, layer: int) -> int:
        """Number of heads of one layer."""
        return self.queries[layer].shape[2]

    @property
    def patches(self) -> int:
        """Number of patches N of the common grid."""
        return self.grid[0] * self.grid[1]

    def sharing(self, known: dict[Hashable, Tensor]) -> "WindowedAttention":
        """The same attention with biases and hidden pairs that images of one size and precision share."""
        biases = [
            known.setdefault((self.grid, layer, bias.dtype), bias) for layer, bias in enumerate(self.biases)
        ]
        hidden = [
            None if pairs is None else known.setdefault((self.grid, layer, pairs.dtype), pairs)
            for layer, pairs in enumerate(self.hidden)
        ]
        return replace(self, biases=biases, hidden=hidden)

    def block(self, layer: int, head: int) -> Tensor:
        """The attention of one head within every window, [B, W, M, M], float32; rows sum to one."""
        q, k = self.queries[layer][:, :, head].float(), self.keys[layer][:, :, head].float()
        with torch.autocast(q.device.type, enabled=False):
            logits = q @ k.mT * q.shape[-1] ** -0.5  # [B, W, M, M]
        logits = logits + self.biases[layer][:, head].float()
        hidden = self.hidden[layer]
        return (logits if hidden is None else logits.masked_fill(hidden, -torch.inf)).softmax(-1)

    def _applied(self, layer: int, blocks: Tensor, values: Tensor) -> Tensor:
        """Blocks [B, W, M, M] of a layer times values [1 or B, N, V] on the common grid: [B, N, V]."""
        windows = self.windows[layer]
        x = resized(values.float(), self.grid, windows.grid).unflatten(1, windows.grid)
        with torch.autocast(blocks.device.type, enabled=False):
            x = windows.merge(blocks @ windows.split(x)).flatten(1, 2)  # [B, h'·w', V]
        return resized(x, windows.grid, self.grid)

    def times(self, layer: int, values: Tensor, *, probabilities: bool = True) -> Tensor:
        """Head mean of one layer's attention times values [B, N, V]: [B, N, V].

        Raises:
            UserError: logits are asked for; outside a window there are none.
        """
        _require_probabilities(probabilities)
        heads = self.heads_in(layer)
        blocks = sum(self.block(layer, head) for head in range(heads)) / heads
        return self._applied(layer, blocks, values)

    def mean_map(self, layer: int, *, probabilities: bool = True) -> Tensor:
        """Head mean of one layer on the common grid, [B, N, N]."""
        eye = torch.eye(self.patches, device=self.queries[layer].device)[None]
        return self.times(layer, eye, probabilities=probabilities)

    def layer_map(self, layer: int, rows: slice = slice(None), *, probabilities: bool = True) -> Tensor:
        """All heads of one layer on the common grid, [B, H, rows, N], float32."""
        _require_probabilities(probabilities)
        eye = torch.eye(self.patches, device=self.queries[layer].device)[None]
        heads = [
            self._applied(layer, self.block(layer, h), eye)[:, rows] for h in range(self.heads_in(layer))
        ]
        return torch.stack(heads, 1)


def _require_probabilities(probabilities: bool) -> None:
    if not probabilities:
        raise UserError(
            "affinity.attention logits needs a plain ViT, because between windows there are no logits; set "
            "it to probabilities."
        )
