"""The learned affinity of AFA: one layer turns the attention logits of the last blocks into an affinity.

Source: Ru et al., Learning Affinity from Attention (CVPR 2022, arXiv 2203.02664). There the encoder is a
MiT-B1 with two blocks in its last stage; here it is a plain ViT, whose last blocks take their place. Three
things are ours, because raw logits of a plain ViT reach 100 and a sigmoid of such numbers does not learn:
logits are divided by √d; the mean over patches is subtracted from the keys, which no attention sees,
because softmax ignores what a row has in common; and the first weights are smaller (fan-in, not fan-out).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ssepa_lib.errors import require_index
from ssepa_lib.model.affinity import Attention

POWER, EPSILON = 2.0, 0.1  # of the propagation: α and what is added to a sum of affinities
ENTRIES = 2**22  # of the affinity that propagation holds at once


class AffinityHead(nn.Module):
    """Attention logits of the last blocks → affinity between patches, symmetric and in 0..1.

    With S_c = Q_c (K_c − mean K_c)ᵀ / √d the logits of channel c, one of the heads of one of the blocks,
    A = sigmoid(Σ_c w_c (S_c + S_cᵀ) + b): a 1×1 convolution over channels. It is linear, so that the sum over
    channels is one product of weighted queries with keys and no S_c is built.

    Args:
        heads: of a block, H.
        blocks: the last so many blocks.
        radius: how far propagation and pairs reach, in patches along each side.
    """

    def __init__(self, heads: int, blocks: int, radius: int):
        super().__init__()
        self.blocks, self.radius = blocks, radius
        self.mix = nn.Linear(blocks * heads, 1)
        nn.init.kaiming_normal_(self.mix.weight, a=5**0.5)
        nn.init.zeros_(self.mix.bias)

    def sides(self, attention: Attention) -> tuple[Tensor, Tensor]:
        """Weighted queries and centred keys, channels side by side, [B, N, blocks·H·d] each, float32."""
        queries, keys = (
            torch.cat(side[-self.blocks :], 1)[:, :, attention.num_prefix_tokens :].float()
            for side in (attention.queries, attention.keys)
        )  # [B, blocks·H, N, d]
        keys = keys - keys.mean(2, keepdim=True)
        queries = queries * self.mix.weight.view(-1, 1, 1) * queries.shape[-1] ** -0.5
        return queries.transpose(1, 2).flatten(2), keys.transpose(1, 2).flatten(2)

    def between(self, queries: Tensor, keys: Tensor, rows: slice = slice(None)) -> Tensor:
        """The affinity [B, rows, N] out of both `sides`."""
        with torch.autocast(queries.device.type, enabled=False):
            logits = queries[:, rows] @ keys.mT + keys[:, rows] @ queries.mT
            return (logits + self.mix.bias).sigmoid()

    def forward(self, attention: Attention) -> Tensor:
        """The affinity [B, N, N] of the patches, with a gradient where the attention has one."""
        return self.between(*self.sides(attention))


def window(grid: tuple[int, int], radius: int, device: torch.device | None = None) -> Tensor:
    """Which patches of a grid (h, w) are at most `radius` rows and columns apart, bool [N, N]."""
    row, column = (torch.arange(n, device=device) for n in grid)
    near = [(x[:, None] - x).abs() <= radius for x in (row, column)]
    return (near[0][:, None, :, None] & near[1][None, :, None, :]).reshape(2 * [grid[0] * grid[1]])


class LearnedAffinity:
    """One propagation step of AFA as an operator on maps.

    Patch i receives Σ_j W_ij x_j with W_ij = Â_ij² / (Σ_k Â_ik² + 0.1), where Â is the affinity inside the
    window of i and 0 outside. It has no low rank, so its entries are computed, a few rows at a time and
    without gradient.

    Args:
        attention: captured queries and keys.
        head: makes the affinity out of them.
        iterations: how often the map is multiplied (AFA: once).
    """

    def __init__(self, attention: Attention, head: AffinityHead, *, iterations: int = 1):
        self.attention, self.head, self.iterations = attention, head, iterations

    def _pieces(self, image: int) -> Iterator[Tensor]:
        """W of one image in pieces of rows, [1, rows, N]."""
        attention, number = self.attention[image : image + 1], self.attention.patches
        near = window(attention.grid, self.head.radius, attention.queries[0].device)
        sides, size = self.head.sides(attention), max(1, ENTRIES // number)
        for rows in (slice(start, start + size) for start in range(0, number, size)):
            strength = self.head.between(*sides, rows).pow(POWER) * near[rows]
            yield strength / (strength.sum(2, keepdim=True) + EPSILON)

    def _times(self, image: int, maps: Tensor) -> Tensor:
        """W of one image times maps [1, N, X]."""
        return torch.cat([piece @ maps for piece in self._pieces(image)], 1)

    @torch.no_grad()
    def __matmul__(self, maps: Tensor) -> Tensor:
        """Propagated maps, [B, N, X] → [B, N, X]."""
        with torch.autocast(maps.device.type, enabled=False):
            for _ in range(self.iterations):
                parts = maps.float().split(1)
                maps = torch.cat([self._times(image, part) for image, part in enumerate(parts)])
        return maps

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The matrix W of one iteration, [B, N, N]; row i says from where i receives."""
        images = range(len(self.attention.queries[0]))
        return torch.cat([torch.cat(list(self._pieces(image)), 1) for image in images])

    def row(self, patch: int) -> Tensor:
        """From where a patch receives: a row of `dense()`, [B, N].

        Args:
            patch: index of the receiving patch, 0..N-1, row by row.

        Raises:
            UserError: the patch does not exist.
        """
        require_index("patch", patch, self.attention.patches)
        return self.dense()[:, patch]
