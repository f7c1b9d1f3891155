"""From labels to a loss: one file per method.

In comes a `TrainStep` (the network's output on a batch, class activation maps and labels); out come the named
terms of the loss. Every file with a function `objectives(recipe, network)` is a method and is found by
itself: a new method is such a file, its settings in `settings.py` or `train_settings.py` and its recipe.
"""

from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from ssepa_lib.methods.objective import Objective, total_loss
from ssepa_lib.methods.step import TrainStep, take_step
from ssepa_lib.model.network import Network
from ssepa_lib.randomness import seeded
from ssepa_lib.recipe import Recipe

__all__ = ["Objective", "TrainStep", "build_objectives", "take_step", "total_loss"]


def build_objectives(recipe: Recipe, network: Network) -> nn.ModuleList:
    """The objectives of all methods that a recipe asks for, initialised from `train.seed`."""
    modules = [import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__)]
    methods = sorted((m for m in modules if hasattr(m, "objectives")), key=lambda method: method.ORDER)
    with seeded("objectives", recipe.train.seed):
        return nn.ModuleList(part for method in methods for part in method.objectives(recipe, network))
