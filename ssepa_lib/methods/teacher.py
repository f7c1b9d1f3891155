"""A teacher that follows its student: exponential moving average of the parameters."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Teacher(AveragedModel):
    """Exponential moving average of a student: never trained, always in evaluation mode."""

    def __init__(self, student: nn.Module):
        super().__init__(student)
        self.requires_grad_(False)
        self.n_averaged.fill_(1)  # otherwise the first update would copy instead of average
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode."""
        return super().train(False)

    def follow(self, student: nn.Module, momentum: float) -> None:
        """teacher ← momentum · teacher + (1 − momentum) · student, for every parameter."""
        self.multi_avg_fn = get_ema_multi_avg_fn(momentum)
        self.update_parameters(student)
