"""What a run minimises: the base class of all objectives."""

from torch import Tensor, nn

from ssepa_lib.methods.step import TrainStep
from ssepa_lib.model.network import Network


class Objective(nn.Module):
    """One or more terms of the loss, with the parameters that only they need.

    Args:
        weights: name of each term → its weight in the total loss.
        start: the first training step at which the terms count, from 0.
        needs: what they read of a `TrainStep` beside the network's output, out of "attention" (that of the
            training crop), "cams", "token_label" and "pseudo_label". Objectives that
            need the attention are called first; its memory is then freed, so that the others cannot read it.
    """

    def __init__(self, weights: dict[str, float], *, start: int = 0, needs: tuple[str, ...] = ()):
        super().__init__()
        self.weights, self.start, self.needs = weights, start, frozenset(needs)

    def forward(self, step: TrainStep) -> dict[str, Tensor]:
        """The unweighted terms of one step, scalars by name."""
        raise NotImplementedError

    def after_step(self, network: Network, fraction: float) -> None:
        """Called after every update of the optimiser; `fraction` is the share of all steps done, 0..1."""


def total_loss(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Weighted sum of the terms (SS-EPA, Eq. 8)."""
    return sum(weights[name] * value for name, value in terms.items())
