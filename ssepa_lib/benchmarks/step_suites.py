"""Suites over whole training steps: the affinity's share, the published way of a step, and how cost grows."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from ssepa_lib.benchmarks import naive_step
from ssepa_lib.benchmarks.measure import (
    BY_FORMULA,
    MB,
    Row,
    count_flops,
    encoder_bytes,
    full_loss,
    full_step,
    interleaved,
    make_row,
    step_bytes,
    time_row,
)
from ssepa_lib.benchmarks.naive_step import NaiveTrainer
from ssepa_lib.benchmarks.part_suites import mask_logits
from ssepa_lib.benchmarks.setup import Setup
from ssepa_lib.compose import load_recipe
from ssepa_lib.data import Batch
from ssepa_lib.data.voc import VOC_CLASSES
from ssepa_lib.device import precision
from ssepa_lib.evaluation.memory import (
    affinity_map_bytes,
    analytic_activation_bytes,
    peak_memory,
    saved_activation_bytes,
)
from ssepa_lib.labels import build_refiner, multi_scale_cam
from ssepa_lib.methods.losses import dense_energy
from ssepa_lib.model import Network
from ssepa_lib.recipe import Recipe
from ssepa_lib.training import Trainer

# rows of the suite affinity: name → method and strategy; strategies that build maps are timed apart from the
# others, whose memory they would push out
MATRIX_FREE = {
    "matrix_free": ("ssepa", "matrix_free"),
    "matrix_free once per image": ("ssepa_fast", "matrix_free"),
}
STACKED = {"stack_layers": ("ssepa", "stack_layers"), "stack_heads": ("ssepa", "stack_heads")}


def affinity(setup: Setup) -> Iterator[Row]:
    """A full training step with each strategy against the step without affinity (SS-EPA, Table 4), for a
    plain ViT, and in windows for a Swin."""
    for size in (1,) if setup.quick else (1, 2):
        yield from _overheads(setup, size, MATRIX_FREE, "≤ 1.02", "≤ 1.05")
        yield from _overheads(setup, size, STACKED, "", "")
        yield from _overheads(setup, size, MATRIX_FREE, "≤ 1.02", "", family="Swin")


def _overheads(
    setup: Setup,
    size: int,
    group: dict[str, tuple[str, str]],
    memory_target: str,
    time_target: str,
    family: str = "ViT",
) -> Iterator[Row]:
    """Memory and time of the steps of a group, with their targets; its networks are gone with the last
    row."""
    batch, setting = setup.batch(size), setup.describe(size, family=family)
    methods = {**group, "none": ("toco", "matrix_free")}
    recipes = {
        name: setup.recipe(method, batch=size, strategy=strategy, family=family)
        for name, (method, strategy) in methods.items()
    }
    trainers = {name: Trainer(recipe, VOC_CLASSES, setup.device) for name, recipe in recipes.items()}
    steps = {name: partial(full_step, trainer, batch) for name, trainer in trainers.items()}
    seconds = interleaved(steps, setup)
    peaks = {name: step_bytes(trainer, batch) / MB for name, trainer in trainers.items()}
    backbone, largest = trainers["none"].network.backbone, 1.5 * setup.side
    tokens = prod(backbone.grid(largest, largest)) + backbone.num_prefix_tokens
    plain = family == "ViT"  # in windows there is no stack of maps to compare with
    for name, (_, strategy) in group.items():
        yield make_row(
            "affinity",
            f"peak memory of a step, {name}",
            setting,
            "MB",
            peaks[name],
            peaks["none"],
            gain=False,
            target=setup.target(memory_target),
            floor_bytes=affinity_map_bytes(2 * size, tokens, backbone.depth, backbone.heads, strategy)
            if plain
            else None,
            note="floor: the stack of maps at scale 1.5 with flip" if plain else "",
        )
        yield time_row(
            "affinity",
            f"step time, {name}",
            setting,
            seconds[name],
            seconds["none"],
            gain=False,
            target=setup.target(time_target),
            flops=count_flops(steps[name]),
        )
    if plain and "matrix_free" in trainers:
        yield _kept_by_affinity(trainers["matrix_free"], trainers["none"], batch, setting)


def _kept(trainer: Trainer, batch: Batch) -> float:
    """MB that autograd keeps of a step's forward passes, counted by its hooks."""
    loss = partial(full_loss, trainer, batch)
    return saved_activation_bytes(loss, trainer.network, trainer.objectives) / MB


def _kept_by_affinity(ours: Trainer, plain: Trainer, batch: Batch, setting: str) -> Row:
    kept = _kept(ours, batch), _kept(plain, batch)
    floor = encoder_bytes(ours, len(batch.image))
    name = "kept for the backward pass, matrix_free"
    return make_row("affinity", name, setting, "MB", *kept, gain=False, floor_bytes=floor, note=BY_FORMULA)


def step(setup: Setup) -> Iterator[Row]:
    """The step as published against ours, whole and by parts."""
    size = 1 if setup.full and not setup.gpu else 4  # as published it keeps 1.9 GB per image at full size
    batch, recipe = setup.batch(size), setup.recipe(batch=size)
    lean = setup.recipe(batch=size, changes={"train.checkpointing": True})
    trainers = {
        "ours": Trainer(recipe, VOC_CLASSES, setup.device),
        "lean": Trainer(lean, VOC_CLASSES, setup.device),
        "fast": NaiveTrainer(recipe, VOC_CLASSES, setup.device, exact_energy=False),
        "exact": NaiveTrainer(recipe, VOC_CLASSES, setup.device),
    }
    steps = {name: partial(full_step, trainer, batch) for name, trainer in trainers.items()}
    seconds, setting = interleaved(steps, setup), setup.describe(size)
    yield from _step_times(setup, setting, seconds, count_flops(steps["ours"]))
    yield from _step_memory(setup, setting, trainers, batch)
    yield _kept_by_naive(setup, recipe, setting)
    if not setup.large and not setup.quick:
        changes = {"model.weights": "none", "data.batch": 1, "train.device": setup.device.type}
        yield _kept_by_naive(setup, load_recipe("voc/ssepa", changes), "ViT-B/16, 448², batch 1")
    yield from _Parts(setup, trainers["ours"], trainers["fast"], batch).rows(
        statistics.median(seconds["ours"])
    )
    if setup.gpu and not setup.quick:
        yield _whole_run(setup, trainers["ours"], batch, statistics.median(seconds["ours"]))


def _step_times(setup: Setup, setting: str, seconds: dict[str, list[float]], flops: int) -> Iterator[Row]:
    ours = seconds["ours"]
    yield time_row(
        "step",
        "step time, reference style",
        setting,
        ours,
        seconds["exact"],
        target=setup.target("≥ 5" if setup.gpu else "≥ 2"),
        flops=flops,
        note="reference: exact filter on the CPU",
    )
    yield time_row(
        "step",
        "step time, reference style with our energy filter",
        setting,
        ours,
        seconds["fast"],
        flops=flops,
        note="the same without the cost of the exact filter",
    )
    note = "reference: without recomputing"
    yield time_row(
        "step", "step time, blocks recomputed", setting, seconds["lean"], ours, gain=False, note=note
    )


def _step_memory(setup: Setup, setting: str, trainers: dict[str, Trainer], batch: Batch) -> Iterator[Row]:
    peaks = {name: step_bytes(trainers[name], batch) / MB for name in ("ours", "lean", "fast")}
    floor = encoder_bytes(trainers["ours"], len(batch.image))
    for name, which, more in (
        ("peak memory of a step", "ours", {"floor_bytes": floor, "note": BY_FORMULA}),
        (
            "peak memory of a step, blocks recomputed",
            "lean",
            {"note": "train.checkpointing, the same numbers"},
        ),
    ):
        target = setup.target("≥ 2")
        yield make_row("step", name, setting, "MB", peaks[which], peaks["fast"], target=target, **more)


def _kept_by_naive(setup: Setup, recipe: Recipe, setting: str) -> Row:
    """What autograd keeps of a step, the same on every device of a precision."""
    batch = setup.batch(recipe.data.batch, recipe.data.crop)
    makers = Trainer, partial(NaiveTrainer, exact_energy=False)
    kept = [_kept(make(recipe, VOC_CLASSES, setup.device), batch) for make in makers]
    note = f"{precision(recipe.train.precision, setup.device)}, reference fp32"
    name = "kept for the backward pass of a step"
    return make_row("step", name, setting, "MB", *kept, target=setup.target("≥ 2"), note=note)


def _whole_run(setup: Setup, trainer: Trainer, batch: Batch, full: float) -> Row:
    """Minutes of 20 000 steps without loading, from the seconds of a step before and after segmentation
    starts."""

    def early() -> None:
        trainer.index = 0
        trainer.step(batch)

    start = trainer.recipe.losses.segmentation_start
    before = statistics.median(interleaved({"early": early}, setup)["early"])
    mean = start * before + (1 - start) * full
    note = f"{1 / mean:.1f} steps/s without loading"
    setting = setup.describe(len(batch.image))
    return make_row("step", "20 000 steps", setting, "min", 20000 * mean / 60, target="≤ 20 min", note=note)


@dataclass
class _Parts:
    """CAM, labels, energy and encoder of a step, each alone."""

    setup: Setup
    ours: Trainer
    theirs: Trainer
    batch: Batch

    def __post_init__(self) -> None:
        self.config = self.ours.recipe.cam
        self.cams = self.cam()
        self.target = self.labels()
        self.logits = mask_logits(self.setup.images(len(self.batch.image))[1])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.setup.device.type, torch.bfloat16, enabled=self.ours.bf16)

    def cam(self):
        """Multi-scale maps with affinity."""
        refiner = build_refiner(self.ours.recipe.affinity, self.ours.network)
        with self._autocast():
            return multi_scale_cam(
                self.ours.network, self.batch.image, self.batch.label, self.config, refiner
            )

    def naive_cam(self):
        """The same, one forward pass per scale and flip."""
        refiner = build_refiner(self.theirs.recipe.affinity, self.theirs.network)
        return naive_step.naive_cam(
            self.theirs.network, self.batch.image, self.batch.label, self.config, refiner
        )

    def labels(self) -> Tensor:
        """Two-threshold labels."""
        b = self.batch
        return self.ours.labeler.training_labels(b.image, self.cams.for_labels, b.label, b.box)

    def naive_labels(self) -> Tensor:
        """The same, image by image."""
        b = self.batch
        return naive_step.naive_labels(b.image, self.cams.for_labels, b.label, b.box, self.config)

    def encoder(self) -> None:
        """Three passes of the encoder, forward and backward."""
        batch, contrast = self.batch, self.ours.recipe.contrast
        with self._autocast():
            first = self.ours.network(batch.image)
            side = contrast.local_size
            local = batch.image[..., :side, :side].repeat_interleave(contrast.local_crops, 0)
            local = self.ours.network(local, segment=False).cls
            other = self.ours.network(batch.global2, segment=False).cls
        (first.segmentation.sum() + first.scores.sum() + other.sum() + local.sum()).backward()

    def energy(self, device: torch.device) -> None:
        """Dense energy with its gradient."""
        x = self.logits.to(device).requires_grad_()
        dense_energy(
            self.batch.image.to(device), x, self.target.to(device), self.batch.box.to(device)
        ).backward()

    def rows(self, whole: float) -> Iterator[Row]:
        """One row per part with its share of a step of `whole` seconds."""
        energies = [partial(self.energy, device) for device in (self.setup.device, torch.device("cpu"))]
        pairs = {
            "multi-scale CAM with affinity": (self.cam, self.naive_cam),
            "two-threshold labels": (self.labels, self.naive_labels),
            "dense energy": energies,
            "encoder, forward and backward of three passes": (self.encoder,),
        }
        setting = self.setup.describe(len(self.batch.image))
        for name, functions in pairs.items():
            seconds = interleaved(dict(zip(("ours", "reference"), functions, strict=False)), self.setup)
            note = f"{statistics.median(seconds['ours']) / whole:.0%} of the step"
            yield time_row("step", name, setting, seconds["ours"], seconds.get("reference"), note=note)


def scaling(setup: Setup) -> Iterator[Row]:
    """Forward and backward pass with the affinity applied, against image size, batch and depth."""
    sides, batches, depths = (64, 96), (2,), (4,)
    if not setup.quick:
        sides = (224, 320, 448, 672, 1024)
        batches, depths = ((2, 4, 8), (4, 8, 24)) if setup.gpu else ((2, 4), (4, 8))
    cases = [(side, 1, 0) for side in sides] + [(sides[0], batch, 0) for batch in batches]
    cases += [(sides[0], 1, depth) for depth in depths]
    for side, size, depth in cases:
        yield from _scaling_rows(setup, side, size, depth)


def _scaling_rows(setup: Setup, side: int, size: int, depth: int) -> Iterator[Row]:
    recipe = setup.recipe(depth=depth)
    network = Network(recipe, VOC_CLASSES).to(setup.device)
    refiner = build_refiner(recipe.affinity, network)
    image, backbone = setup.images(size, side)[0], network.backbone
    bf16 = precision("auto", setup.device) == "bf16"

    def run(with_affinity: bool) -> None:
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=bf16):
            out = network(image, capture=with_affinity)
            if with_affinity:
                with torch.no_grad():
                    refiner(out.attention, out.cam.relu())
        (out.scores.float().sum() + out.segmentation.float().mean()).backward()

    both = {"with": partial(run, True), "without": partial(run, False)}
    seconds = interleaved(both, setup)
    formula = analytic_activation_bytes(
        size,
        prod(backbone.grid(side, side)) + backbone.num_prefix_tokens,
        backbone.width,
        backbone.depth,
        backbone.heads,
        pixels=3 * side**2,
        value=2 if bf16 else 4,
    )
    setting = setup.describe(size, side, backbone.depth)
    at = {"side": side, "batch": size, "depth": backbone.depth}
    name = "forward and backward, matrix_free"
    flops = count_flops(both["with"])
    yield time_row(
        "scaling", name, setting, seconds["with"], seconds["without"], gain=False, flops=flops, at=at
    )
    peaks = [peak_memory(function, setup.device) / MB for function in both.values()]
    floor, note = sum(formula.values()), "floor: the encoder by formula"
    name = f"peak of {name}"
    yield make_row("scaling", name, setting, "MB", *peaks, gain=False, floor_bytes=floor, at=at, note=note)
