"""How speed and memory are measured: rows with a ratio and a target, interleaved timing, counted bytes and
FLOP.

What is compared is timed interleaved (A B A B …) and the median of the pairwise ratios is reported, so that
a busy machine disturbs both sides alike.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssepa_lib.benchmarks.setup import Setup
from ssepa_lib.data import Batch
from ssepa_lib.evaluation.memory import analytic_activation_bytes, peak_memory
from ssepa_lib.methods import total_loss
from ssepa_lib.training import Trainer

MB = 1e6
BY_FORMULA = "floor: the encoder's passes by formula"


@dataclass
class Row:
    """One measurement."""

    suite: str
    name: str  # what was measured
    setting: str
    unit: str  # of value and reference
    value: float
    reference: float | None = None
    ratio: float | None = None  # median of pairwise ratios where timed
    ratio_of: str = ""  # "reference ÷ value" (a gain) or "value ÷ reference" (an overhead)
    target: str = ""  # of the ratio, or of the value where it has a unit
    met: bool | None = None
    floor_bytes: int | None = None  # analytic
    flops: int | None = None  # counted
    at: dict[str, int] = field(default_factory=dict)  # side, batch and depth of a scaling row
    note: str = ""


def make_row(
    suite: str,
    name: str,
    setting: str,
    unit: str,
    value: float,
    reference: float | None = None,
    *,
    ratio: float | None = None,
    gain: bool = True,
    target: str = "",
    **more,
) -> Row:
    """A row with its ratio and, with a target such as "≥ 4" (ratio) or "≤ 5 ms" (value), whether that is met.

    Args:
        gain: the ratio is reference ÷ value; False: value ÷ reference, an overhead.
        more: other fields of `Row`.
    """
    if ratio is None and reference is not None:
        ratio = reference / value if gain else value / reference
    of = "" if ratio is None else "reference ÷ value" if gain else "value ÷ reference"
    met = None
    if target:
        sign, number, *units = target.split()
        measured = value if units else ratio
        met = measured >= float(number) if sign == "≥" else measured <= float(number)
    return Row(suite, name, setting, unit, value, reference, ratio, of, target, met, **more)


def time_row(
    suite: str,
    name: str,
    setting: str,
    ours: list[float],
    reference: list[float] | None = None,
    *,
    gain: bool = True,
    **more,
) -> Row:
    """A row in ms from seconds of `interleaved`: medians, and the median of the pairwise ratios.

    Args:
        ours, reference: seconds of each round.
        gain, more: see `make_row`.
    """
    value = 1e3 * statistics.median(ours)
    if reference is None:
        return make_row(suite, name, setting, "ms", value, **more)
    ratio = pairwise(reference, ours) if gain else pairwise(ours, reference)
    other = 1e3 * statistics.median(reference)
    return make_row(suite, name, setting, "ms", value, other, ratio=ratio, gain=gain, **more)


def interleaved(functions: Mapping[str, Callable[[], object]], setup: Setup) -> dict[str, list[float]]:
    """Seconds of each function, called in turn: a warm-up, then `setup.rounds` rounds while time lasts (2
    at least)."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    stop = time.perf_counter() + setup.seconds
    for turn in range(setup.rounds + 1):
        if turn > 2 and time.perf_counter() > stop:
            break
        for name, function in functions.items():
            wait(setup.device)
            began = time.perf_counter()
            function()
            wait(setup.device)
            if turn:
                times[name].append(time.perf_counter() - began)
    return times


def pairwise(over: list[float], under: list[float]) -> float:
    """Median of the ratios of values measured in the same round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what is queued; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention calls of a function."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def full_step(trainer: Trainer, batch: Batch) -> None:
    """One update with every loss term."""
    trainer.index = trainer.recipe.segmentation_step
    trainer.step(batch)


def full_loss(trainer: Trainer, batch: Batch) -> Tensor:
    """The loss with every term, without an update."""
    trainer.index = trainer.recipe.segmentation_step
    return total_loss(trainer.terms(batch), trainer.weights)


def step_bytes(trainer: Trainer, batch: Batch) -> int:
    """Peak of a step that has run before: weights, optimiser state, and the most that a step adds to them."""
    trainer.optimizer.zero_grad(set_to_none=True)
    fixed = [*trainer.network.parameters(), *trainer.network.buffers(), *trainer.objectives.parameters()]
    for state in trainer.optimizer.state.values():
        fixed += [x for x in state.values() if isinstance(x, Tensor)]
    return sum(x.nbytes for x in fixed) + peak_memory(partial(full_step, trainer, batch), trainer.device)


def encoder_bytes(trainer: Trainer, batch: int) -> int:
    """What the encoder's three passes (crop, second view, local crops) keep for the backward pass, by
    formula."""
    backbone, recipe = trainer.network.backbone, trainer.recipe
    hidden = backbone.vit.blocks[0].mlp.fc1.out_features
    total, copies = 0, 0
    local = (batch * recipe.contrast.local_crops, recipe.contrast.local_size)
    for images, side in ((batch, recipe.data.crop), (batch, recipe.data.crop), local):
        terms = analytic_activation_bytes(
            images,
            prod(backbone.grid(side, side)) + backbone.num_prefix_tokens,
            backbone.width,
            backbone.depth,
            backbone.heads,
            num_prefix_tokens=backbone.num_prefix_tokens,
            pixels=3 * side**2,
            mlp_ratio=hidden / backbone.width,
            value=2 if trainer.bf16 else 4,
        )
        copies = terms.pop("weight copies", 0)  # one set serves all passes
        total += sum(terms.values())
    return total + copies
