"""What must come out alike on every device, in every precision and along every fast path."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssepa_lib.benchmarks.setup import Setup
from ssepa_lib.data.voc import VOC_CLASSES
from ssepa_lib.labels import PseudoLabeler
from ssepa_lib.methods.bilateral import bilateral_filter
from ssepa_lib.methods.losses import SIGMA_RGB, SIGMA_XY
from ssepa_lib.model import Network, PatchAffinity, build_network
from ssepa_lib.training import Trainer


@dataclass
class Check:
    """A number that must come out alike in two ways of computing it."""

    name: str
    error: float  # relative, L2 norm
    tolerance: float
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        self.passed = self.error <= self.tolerance


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    expected = expected.detach().double().cpu()
    return ((found.detach().double().cpu() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def all_checks(setup: Setup) -> Iterator[Check]:
    """Everything that could differ between devices, precisions and fast paths."""
    yield from _affinity_checks(setup)
    yield from _filter_checks(setup)
    yield from _step_checks(setup.device.type)


@torch.no_grad()
def _affinity_checks(setup: Setup) -> Iterator[Check]:
    """The affinity without its matrix against the matrix, and bfloat16 against float32."""
    network = build_network(setup.recipe(), VOC_CLASSES).to(setup.device).eval()
    image = setup.images(2)[0]
    plain = network(image, capture=True)
    with torch.autocast(setup.device.type, torch.bfloat16):
        half = network(image, capture=True)
    cam = torch.rand(*plain.patches.shape[:2], len(VOC_CLASSES), device=setup.device)
    for dtype, out, tolerance in (("float32", plain, 1e-4), ("bfloat16", half, 2e-2)):
        for kind in ("probabilities", "logits"):
            free, stacked = (
                PatchAffinity(out.attention, weigh=network.haaf, kind=kind, strategy=strategy) @ cam
                for strategy in ("matrix_free", "stack_layers")
            )
            name = f"affinity of {kind} in {dtype}: matrix-free against stacked"
            yield Check(name, relative_error(free, stacked), tolerance)
    yield Check("scores: bfloat16 against float32", relative_error(half.scores, plain.scores), 5e-2)
    yield Check("CAM: bfloat16 against float32", relative_error(half.cam, plain.cam), 5e-2)


def _filter_checks(setup: Setup) -> Iterator[Check]:
    """The energy's filter and pixel-adaptive refinement."""
    side = 96 if setup.quick else 224
    image = setup.images(2, side)[0].float()
    values = torch.rand(2, 5, side, side, device=setup.device)
    exact, fast = (bilateral_filter(image, values, SIGMA_XY, SIGMA_RGB, exact=e) for e in (True, False))
    yield Check("energy filter: fast against exact", relative_error(fast, exact), 2e-2)
    small, few = image[:, :, :64, :64], values[:, :, :64, :64]
    here, there = (
        bilateral_filter(small.to(device), few.to(device), SIGMA_XY, SIGMA_RGB, exact=True)
        for device in (setup.device, "cpu")
    )
    yield Check("exact energy filter: this device against the CPU", relative_error(here, there), 1e-4)
    par = PseudoLabeler(setup.recipe().cam).par
    there = par(image.cpu(), values.cpu())
    here = par.to(setup.device)(image, values)
    yield Check("PAR: this device against the CPU", relative_error(here, there), 1e-4)


def _step_checks(here: str) -> Iterator[Check]:
    """Loss terms and gradients of a whole step of a toy network."""
    # a threshold can magnify TF32's rounding
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        terms, network = _toy_step(here, precision="fp32")
        there = _toy_step("cpu", precision="fp32")[0]
        again = _toy_step(here, precision="fp32", checkpointing=True)[1]
    for name, value in there.items():
        error = relative_error(terms[name], value)
        yield Check(f"loss term {name}: this device against the CPU", error, 2e-2)
    error = relative_error(_gradient(again), _gradient(network))
    yield Check("gradient: checkpointing against none", error, 1e-4)
    half = _toy_step(here, precision="bf16")[1]
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    lost = trained - {name for name, p in half.named_parameters() if p.grad is not None}
    yield Check("parameters that lose their gradient in bfloat16", len(lost), 0)


def _toy_step(device: str, **settings) -> tuple[dict[str, Tensor], Network]:
    """Loss terms of one step of the toy network on a device, and the network with its gradients.

    Args:
        settings: fields of `TrainConfig`.
    """
    small = Setup(torch.device(device), quick=True)
    recipe = small.recipe(changes={f"train.{name}": value for name, value in settings.items()})
    trainer = Trainer(recipe, VOC_CLASSES, small.device)
    trainer.index = recipe.segmentation_step
    terms = trainer.terms(small.batch(4))
    sum(terms.values()).backward()
    return terms, trainer.network


def _gradient(network: Network) -> Tensor:
    """Of the backbone, flat."""
    return torch.cat([p.grad.flatten() for p in network.backbone.parameters() if p.grad is not None])
