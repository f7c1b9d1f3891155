"""Affinities that come from anywhere else than attention: baselines that say what attention is worth."""

import torch
from torch import Tensor

from ssepa_lib.errors import UserError, require_index


class MatrixAffinity:
    """Any matrix instead of `PatchAffinity`, with the same interface: it has one layer and no heads.

    Args:
        matrix: [B, N, N]; row i says from where patch i receives. It is used as it is; divide the rows by
            their sums for a weighted mean.

    Raises:
        UserError: the matrix is not square, or has no batch dimension.
    """

    def __init__(self, matrix: Tensor):
        if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2]:
            raise UserError(
                f"an affinity has the shape [B, N, N], not {list(matrix.shape)}; pass one "
                "square matrix per image."
            )
        self.matrix = matrix.float()

    def __len__(self) -> int:
        return 1

    def __matmul__(self, cam: Tensor) -> Tensor:
        """Propagated map, [B, N, C] → [B, N, C]."""
        return self.matrix @ cam.float()

    @property
    def weights(self) -> Tensor:
        """Layer weights: ones, [B, 1]."""
        return self.matrix.new_ones(len(self.matrix), 1)

    def dense(self) -> Tensor:
        """The matrix, [B, N, N], without gradient."""
        return self.matrix.detach()

    def row(self, patch: int, layer: int | None = None, head: int | None = None) -> Tensor:
        """From where a patch receives, [B, N] without gradient.

        Args:
            patch: 0..N-1, row by row.
            layer: None or 0, the only one.
            head: None; there are no heads.

        Raises:
            UserError: an index that does not exist.
        """
        require_index("patch", patch, self.matrix.shape[1])
        if layer not in (None, 0) or head is not None:
            raise UserError("this affinity is one matrix without heads; leave out layer and head.")
        return self.dense()[:, patch]


def gaussian(features: Tensor, width: float) -> MatrixAffinity:
    """Weights exp(−|fᵢ − fⱼ|² / 2σ²), each row divided by its sum: a blur, or a bilateral kernel.

    Args:
        features: [B, N, F], what is compared: positions (`positions(grid)`), colours, tokens.
        width: σ, in the unit of the features, above 0.

    Raises:
        UserError: a width that is not above 0.
    """
    if not width > 0:
        raise UserError(f"the width of a Gaussian is {width}; it must be above 0.")
    squared = torch.cdist(features.float(), features.float()).square()  # [B, N, N]
    return MatrixAffinity((-squared / (2 * width**2)).softmax(-1))


def positions(grid: tuple[int, int]) -> Tensor:
    """Row and column of every patch, [1, N, 2], in patches."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    return torch.stack([rows.flatten(), columns.flatten()], 1)[None]


def same_object(objects: Tensor) -> MatrixAffinity:
    """The ceiling that only a mask can give: every patch receives the mean of the patches of its own object.

    Args:
        objects: integer [B, N], the object or class of each patch, 0 background.
    """
    alike = (objects[:, :, None] == objects[:, None, :]).float()  # [B, N, N]
    return MatrixAffinity(alike / alike.sum(-1, keepdim=True))
