"""How a class activation map is refined by the affinity between patches (SS-EPA, Equations 5 to 7; AFA)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ssepa_lib.labels.pseudo_labels import mostly_inside
from ssepa_lib.model.affinity import Attention, PatchAffinity
from ssepa_lib.model.learned_affinity import AffinityHead, LearnedAffinity
from ssepa_lib.model.matrix_affinity import MatrixAffinity
from ssepa_lib.model.network import Network, as_maps
from ssepa_lib.recipe import AffinityConfig


@dataclass(frozen=True)
class Refiner:
    """Affinity × map. A refiner is a plain value: one network can be read through several of them.

    Args:
        config: which attention, how many iterations, where it is applied.
        haaf: maps the descriptor [B, K] to layer weights [B, K] (`HAAF`, `LayerWeights`); None: all layers
            alike.
        head: makes the learned affinity (AFA) instead of the attention's own; None: the latter.
    """

    config: AffinityConfig
    haaf: Callable[[Tensor], Tensor] | None = None
    head: AffinityHead | None = None

    def scale(self, scales: Sequence[float]) -> float:
        """The image scale whose affinity serves the sum over scales: that of the image itself, but AFA's is
        the largest."""
        return 1.0 if self.head is None else max(scales)

    def affinity(self, attention: Attention, valid: Tensor | None = None) -> PatchAffinity | LearnedAffinity:
        """The affinity between the patches of some images; `valid` [B, H, W] is 1 on the image, 0 on
        padding."""
        c = self.config
        if self.head is not None:
            return self.spread(attention)
        if valid is not None:  # padding matters to these alone
            sees_padding = c.balance or c.deflate or c.coverage
            valid = mostly_inside(valid, attention.grid) if sees_padding else None  # [B, N]
        return PatchAffinity(
            attention,
            weigh=self.haaf,
            kind=c.attention,
            strategy=c.strategy,
            descriptor=c.descriptor,
            pooling=c.pooling,
            iterations=c.iterations,
            coverage=c.coverage,
            balance=c.balance,
            deflate=c.deflate,
            valid=valid,
        )

    def spread(self, attention: Attention) -> LearnedAffinity | None:
        """What class scores, background included, are propagated by instead of maps; AFA alone."""
        if self.head is None:
            return None
        return LearnedAffinity(attention, self.head, iterations=self.config.iterations)

    def __call__(self, attention: Attention, maps: Tensor, valid: Tensor | None = None) -> Tensor:
        """Propagate maps over the patches, [B, X, h, w] → [B, X, h, w]; `valid` as in `affinity`."""
        affinity = self.affinity(attention, valid)
        return as_maps(affinity @ maps.flatten(2).transpose(1, 2), attention.grid)


@dataclass(frozen=True)
class MatrixRefiner(Refiner):
    """A refiner whose affinity is any function of the attention: for baselines and experiments.

    Args:
        matrix: attention of B images → [B, N, N]; used as it is, once.
    """

    matrix: Callable[[Attention], Tensor] = field(kw_only=True)

    def affinity(self, attention: Attention, valid: Tensor | None = None) -> MatrixAffinity:
        """The matrix of some images; padding is not left out."""
        return MatrixAffinity(self.matrix(attention))


def build_refiner(config: AffinityConfig, network: Network) -> Refiner | None:
    """The refiner of a recipe for its network; None for a recipe without affinity."""
    if config.kind == "none":
        return None
    haaf = network.haaf if config.kind == "haaf" else None
    return Refiner(config, haaf, network.affinity_head if config.kind == "learned" else None)
