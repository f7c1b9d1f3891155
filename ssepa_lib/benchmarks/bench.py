"""Speed and memory as ratios within one run, beside analytic floors and the targets they are held against.

What is compared is timed interleaved (A B A B …) and the median of the pairwise ratios reported, so that a busy machine
disturbs both sides alike. Steps are always those of the second phase, with every loss term. Inputs are photographs
where VOC is at hand, else built-in scenes; weights are random, which changes no cost.
"""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssepa_lib.benchmarks import naive_step as reference
from ssepa_lib.data.datasets import (
    IGNORE,
    VOC_CLASSES,
    SegmentationDataset,
    ShapesDataset,
    VocDataset,
    classes_in,
)
from ssepa_lib.data.shapes import render_scene
from ssepa_lib.data.views import Batch, train_loader
from ssepa_lib.device import describe_device, precision, resolve_device
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.analysis import (
    affinity_map_bytes,
    analytic_activation_bytes,
    peak_memory,
    saved_activation_bytes,
)
from ssepa_lib.labels.cam import multi_scale_cam, refine
from ssepa_lib.labels.crf import crf_available, crf_pool
from ssepa_lib.labels.par import PixelAdaptiveRefinement
from ssepa_lib.labels.pseudo_labels import two_threshold_labels
from ssepa_lib.methods.losses import dense_energy
from ssepa_lib.methods.objectives import total_loss
from ssepa_lib.model.network import Network
from ssepa_lib.paths import results_root, voc_root
from ssepa_lib.recipe import Recipe, load_recipe
from ssepa_lib.training.trainer import Trainer

BACKBONES = {
    True: "vit_base_patch16_224.orig_in21k_ft_in1k",
    False: "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
}
# rows of the suite affinity: method and strategy
FUSED = {"haaf_fused": ("ssepa", "haaf_fused"), "haaf_fused once per image": ("ssepa_fast", "haaf_fused")}
STACKED = {"haaf_dense": ("ssepa", "haaf_dense"), "all_heads": ("ssepa", "all_heads")}
MB = 1e6


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
    """A row with its ratio and, with a target such as "≥ 4" (ratio) or "≤ 5 ms" (value), whether that is met."""
    if ratio is None and reference is not None:
        ratio = reference / value if gain else value / reference
    of = "" if ratio is None else "reference ÷ value" if gain else "value ÷ reference"
    met = None
    if target:
        sign, number, *units = target.split()
        measured = value if units else ratio
        met = measured >= float(number) if sign == "≥" else measured <= float(number)
    return Row(suite, name, setting, unit, value, reference, ratio, of, target, met, **more)


@dataclass
class Setup:
    """Where and how large: ViT-B at 448² on a GPU or with `full`, else ViT-Tiny at 224²; a toy with `quick`."""

    device: torch.device
    quick: bool = False
    data: Path | None = None  # VOC folder; None: built-in scenes
    seconds: float = 60.0  # after which a comparison starts no further round
    full: bool = False  # the published size on a processor too
    _scenes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def large(self) -> bool:
        return self.gpu or self.full

    @property
    def side(self) -> int:
        return 64 if self.quick else 448 if self.large else 224

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 10 if self.gpu else 5

    def target(self, text: str) -> str:
        """The target, which only counts at full size."""
        return "" if self.quick else text

    def recipe(
        self,
        method: str = "ssepa",
        *,
        batch: int = 4,
        strategy: str = "haaf_fused",
        depth: int = 0,
        checkpointing: bool = False,
    ) -> Recipe:
        """A recipe at this setup's size with random weights."""
        settings = {
            "model.backbone": BACKBONES[self.large],
            "model.weights": "none",
            "data.crop": self.side,
            "data.batch": batch,
            "affinity.strategy": strategy,
            "train.device": self.device.type,
            "train.checkpointing": checkpointing,
        }
        if self.quick:
            small = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 2}
            head = {"local_size": 32, "local_crops": 2, "hidden": 64, "bottleneck": 32, "outputs": 64}
            settings |= {"model.backbone_args": small} | {f"contrast.{k}": v for k, v in head.items()}
        elif not self.large:
            settings |= {"contrast.local_size": 64, "contrast.hidden": 512, "contrast.bottleneck": 128}
        if depth:
            settings["model.backbone_args"] = {**settings.get("model.backbone_args", {}), "depth": depth}
        return load_recipe(f"voc/{method}", settings)

    def describe(self, batch: int, side: int = 0, depth: int = 0) -> str:
        name = "toy ViT" if self.quick else "ViT-B/16" if self.large else "ViT-Ti/16"
        return f"{name}{f', {depth} blocks' if depth else ''}, {side or self.side}², batch {batch}"

    def dataset(self) -> SegmentationDataset:
        return (
            VocDataset(self.data, "train") if self.data else ShapesDataset("train", 64 if self.quick else 512)
        )

    def pictures(self, count: int, side: int = 0) -> tuple[Tensor, Tensor]:
        """Images uint8 [count, 3, side, side] and masks uint8 [count, side, side] that fill the square."""
        side = side or self.side
        if len(self._scenes.get(side, [()])[0]) < count:
            self._scenes[side] = self._load(count, side)
        return tuple(x[:count].to(self.device) for x in self._scenes[side])

    def _load(self, count: int, side: int) -> tuple[Tensor, Tensor]:
        if self.data:
            items = [(item.image, item.mask) for item in map(self.dataset().__getitem__, range(count))]
        else:
            scenes = [render_scene("train", i, size=round(1.15 * side)) for i in range(count)]
            items = [
                (torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)) for image, mask in scenes
            ]
        image = [F.interpolate(i[None].float(), (side, side), mode="area")[0].byte() for i, _ in items]
        mask = [F.interpolate(m[None, None].float(), (side, side))[0, 0].byte() for _, m in items]
        return torch.stack(image), torch.stack(mask)

    def batch(self, count: int, side: int = 0) -> Batch:
        """A training batch without padding."""
        image, mask = self.pictures(count, side)
        label = torch.stack([classes_in(m.cpu(), len(VOC_CLASSES)) for m in mask]).to(self.device)
        box = torch.tensor([[0, image.shape[-2], 0, image.shape[-1]]] * count, device=self.device)
        return Batch([str(i) for i in range(count)], image, box, label, image.flip(-1), image, None)


def interleaved(functions: dict[str, Callable[[], object]], setup: Setup) -> dict[str, list[float]]:
    """Seconds of each function, called in turn: a warm-up, then `setup.rounds` rounds while time lasts (2 at least)."""
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
    """Until a GPU has done what is queued; a processor always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gain(suite, name, setting, ours, reference, **more) -> Row:
    return make_row(
        suite,
        name,
        setting,
        "ms",
        1e3 * statistics.median(ours),
        1e3 * statistics.median(reference),
        ratio=pairwise(reference, ours),
        **more,
    )


def _overhead(suite, name, setting, ours, reference, **more) -> Row:
    return make_row(
        suite,
        name,
        setting,
        "ms",
        1e3 * statistics.median(ours),
        1e3 * statistics.median(reference),
        ratio=pairwise(ours, reference),
        gain=False,
        **more,
    )


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention calls of a function."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def dense_step(trainer: Trainer, batch: Batch) -> None:
    """One update with every loss term."""
    trainer.index = trainer.recipe.switch_step
    trainer.step(batch)


def _dense_loss(trainer: Trainer, batch: Batch) -> Tensor:
    trainer.index = trainer.recipe.switch_step
    return total_loss(trainer.terms(batch), trainer.recipe)


def step_bytes(trainer: Trainer, batch: Batch) -> int:
    """Peak of a step that has run before: weights, optimiser state, and the most that a step adds to them."""
    trainer.optimizer.zero_grad(set_to_none=True)
    fixed = [*trainer.network.parameters(), *trainer.network.buffers(), *trainer.objectives.parameters()]
    fixed += [
        x for state in trainer.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)
    ]
    return sum(x.nbytes for x in fixed) + peak_memory(partial(dense_step, trainer, batch), trainer.device)


def encoder_bytes(trainer: Trainer, batch: int) -> int:
    """What the encoder's three passes (crop, second view, local crops) keep for the backward pass, by formula."""
    backbone, recipe = trainer.network.backbone, trainer.recipe
    hidden = backbone.vit.blocks[0].mlp.fc1.out_features
    total, copies = 0, 0
    local = (batch * recipe.contrast.local_crops, recipe.contrast.local_size)
    for images, side in ((batch, recipe.data.crop), (batch, recipe.data.crop), local):
        tokens = prod(backbone.grid(side, side)) + backbone.prefix
        terms = analytic_activation_bytes(
            images,
            tokens,
            backbone.width,
            backbone.depth,
            backbone.heads,
            prefix=backbone.prefix,
            pixels=3 * side**2,
            mlp_ratio=hidden / backbone.width,
            value=2 if trainer.bf16 else 4,
        )
        copies = terms.pop("weight copies", 0)  # one set serves all passes
        total += sum(terms.values())
    return total + copies


def affinity(setup: Setup) -> Iterator[Row]:
    """A full training step with each strategy against the step without affinity (SS-EPA, Table 4).

    The strategies that build maps are timed apart from the others, whose memory they would push out.
    """
    for size in (1,) if setup.quick else (1, 2):
        yield from _overheads(setup, size, FUSED, "≤ 1.02", "≤ 1.05")
        yield from _overheads(setup, size, STACKED)


def _overheads(
    setup: Setup, size: int, group: dict[str, tuple[str, str]], memory_target: str = "", time_target: str = ""
) -> Iterator[Row]:
    """Memory and time of the steps of a group, with their targets; its networks are gone with the last row."""
    batch, setting = setup.batch(size), setup.describe(size)
    recipes = {
        name: setup.recipe(method, batch=size, strategy=strategy)
        for name, (method, strategy) in group.items()
    }
    recipes["none"] = setup.recipe("toco", batch=size)
    trainers = {name: Trainer(recipe, VOC_CLASSES, setup.device) for name, recipe in recipes.items()}
    steps = {name: partial(dense_step, trainer, batch) for name, trainer in trainers.items()}
    seconds = interleaved(steps, setup)
    peaks = {name: step_bytes(trainer, batch) for name, trainer in trainers.items()}
    backbone = trainers["none"].network.backbone
    side = 1.5 * setup.side
    tokens = prod(backbone.grid(side, side)) + backbone.prefix
    for name, (_, strategy) in group.items():
        maps = affinity_map_bytes(2 * size, tokens, backbone.depth, backbone.heads, strategy)
        yield make_row(
            "affinity",
            f"peak memory of a step, {name}",
            setting,
            "MB",
            peaks[name] / MB,
            peaks["none"] / MB,
            gain=False,
            target=setup.target(memory_target),
            floor_bytes=maps,
            note="floor: the stack of maps at scale 1.5 with mirror",
        )
        yield _overhead(
            "affinity",
            f"step time, {name}",
            setting,
            seconds[name],
            seconds["none"],
            target=setup.target(time_target),
            flops=count_flops(steps[name]),
        )
    if "haaf_fused" in group:
        kept = {
            name: saved_activation_bytes(partial(_dense_loss, t, batch), t.network, t.objectives)
            for name, t in trainers.items()
            if name in ("haaf_fused", "none")
        }
        yield make_row(
            "affinity",
            "kept for the backward pass, haaf_fused",
            setting,
            "MB",
            kept["haaf_fused"] / MB,
            kept["none"] / MB,
            gain=False,
            floor_bytes=encoder_bytes(trainers["haaf_fused"], size),
            note="floor: the encoder's passes by formula",
        )


def step(setup: Setup) -> Iterator[Row]:
    """The reference-style step against ours, whole and by parts."""
    size = (
        1 if setup.full and not setup.gpu else 4
    )  # the reference keeps 1.9 GB per image at the published size
    batch, setting, recipe = setup.batch(size), setup.describe(size), setup.recipe(batch=size)
    ours = Trainer(recipe, VOC_CLASSES, setup.device)
    exact = reference.ReferenceTrainer(recipe, VOC_CLASSES, setup.device)
    fast = reference.ReferenceTrainer(recipe, VOC_CLASSES, setup.device, exact_energy=False)
    lean = Trainer(setup.recipe(batch=size, checkpointing=True), VOC_CLASSES, setup.device)
    trainers = {"ours": ours, "lean": lean, "fast": fast, "exact": exact}
    steps = {name: partial(dense_step, trainer, batch) for name, trainer in trainers.items()}
    seconds = interleaved(steps, setup)
    flops = count_flops(steps["ours"])
    least = "≥ 5" if setup.gpu else "≥ 2"
    yield _gain(
        "step",
        "step time, reference style",
        setting,
        seconds["ours"],
        seconds["exact"],
        target=setup.target(least),
        flops=flops,
        note="reference: exact filter on the processor",
    )
    yield _gain(
        "step",
        "step time, reference style with our energy filter",
        setting,
        seconds["ours"],
        seconds["fast"],
        flops=flops,
        note="the same without the cost of the exact filter",
    )
    peaks = {name: step_bytes(trainer, batch) / MB for name, trainer in trainers.items() if name != "exact"}
    yield make_row(
        "step",
        "peak memory of a step",
        setting,
        "MB",
        peaks["ours"],
        peaks["fast"],
        target=setup.target("≥ 2"),
        floor_bytes=encoder_bytes(ours, size),
        note="floor: the encoder's passes by formula",
    )
    yield make_row(
        "step",
        "peak memory of a step, blocks recomputed",
        setting,
        "MB",
        peaks["lean"],
        peaks["fast"],
        target=setup.target("≥ 2"),
        note="train.checkpointing, the same numbers",
    )
    yield _overhead(
        "step",
        "step time, blocks recomputed",
        setting,
        seconds["lean"],
        seconds["ours"],
        note="reference: without recomputing",
    )
    yield _kept(setup, recipe, setting)
    if not setup.large and not setup.quick:
        changes = {"model.weights": "none", "data.batch": 1, "train.device": setup.device.type}
        yield _kept(setup, load_recipe("voc/ssepa", changes), "ViT-B/16, 448², batch 1")
    yield from _parts(setup, ours, fast, batch, setting, statistics.median(seconds["ours"]))
    if setup.gpu and not setup.quick:
        plain = interleaved({"early": lambda: (setattr(ours, "index", 0), ours.step(batch))}, setup)["early"]
        switch = recipe.losses.switch
        mean = switch * statistics.median(plain) + (1 - switch) * statistics.median(seconds["ours"])
        yield make_row(
            "step",
            "20 000 steps",
            setting,
            "min",
            20000 * mean / 60,
            target="≤ 20 min",
            note=f"{1 / mean:.1f} steps/s without loading",
        )


def _kept(setup: Setup, recipe: Recipe, setting: str) -> Row:
    """What autograd keeps of a step's forward passes, counted by its hooks: the same on every device of a precision."""
    batch, kept = setup.batch(recipe.data.batch, recipe.data.crop), []
    makers = Trainer, partial(reference.ReferenceTrainer, exact_energy=False)
    for trainer in (make(recipe, VOC_CLASSES, setup.device) for make in makers):
        kept.append(
            saved_activation_bytes(partial(_dense_loss, trainer, batch), trainer.network, trainer.objectives)
        )
    ours, theirs = (count / MB for count in kept)
    note = f"{precision(recipe.train.precision, setup.device)}, reference fp32"
    return make_row(
        "step",
        "kept for the backward pass of a step",
        setting,
        "MB",
        ours,
        theirs,
        target=setup.target("≥ 2"),
        note=note,
    )


def _parts(
    setup: Setup, ours: Trainer, theirs: Trainer, batch: Batch, setting: str, whole: float
) -> Iterator[Row]:
    """CAM, labels, energy and encoder alone, each with its share of the whole step."""
    config, cams = ours.recipe.cam, []

    def cam() -> None:
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=ours.bf16):
            cams[:] = [multi_scale_cam(ours.network, batch.image, batch.label, config, affinity=True)]

    def encoder() -> None:
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=ours.bf16):
            first = ours.network(batch.image)
            side, crops = ours.recipe.contrast.local_size, ours.recipe.contrast.local_crops
            local = batch.image[..., :side, :side].repeat_interleave(crops, 0)
            local = ours.network(local, segment=False).cls
            other = ours.network(batch.global2, segment=False).cls
        (first.segmentation.sum() + first.scores.sum() + other.sum() + local.sum()).backward()

    cam()
    labels = partial(
        two_threshold_labels,
        batch.image,
        cams[0].best,
        batch.label,
        batch.box,
        ours.par,
        config.high,
        config.low,
    )
    target, logits = labels(), _logits(setup.pictures(len(batch.image))[1])

    def energy(device: torch.device) -> None:
        x = logits.to(device).requires_grad_()
        dense_energy(batch.image.to(device), x, target.to(device), batch.box.to(device)).backward()

    pairs = {
        "multi-scale CAM with affinity": (
            cam,
            lambda: reference.reference_cam(theirs.network, batch.image, batch.label, config, affinity=True),
        ),
        "two-threshold labels": (
            labels,
            lambda: reference.reference_labels(batch.image, cams[0].best, batch.label, batch.box, config),
        ),
        "dense energy": (partial(energy, setup.device), partial(energy, torch.device("cpu"))),
        "encoder, forward and backward of three passes": (encoder, None),
    }
    for name, (new, old) in pairs.items():
        seconds = interleaved({"ours": new} | ({"reference": old} if old else {}), setup)
        note = f"{statistics.median(seconds['ours']) / whole:.0%} of the step"
        if old:
            yield _gain("step", name, setting, seconds["ours"], seconds["reference"], note=note)
        else:
            yield make_row("step", name, setting, "ms", 1e3 * statistics.median(seconds["ours"]), note=note)


def _logits(mask: Tensor) -> Tensor:
    """A soft segmentation [B, C+1, h, w] at a sixteenth of the masks' size, as a decoder makes it."""
    classes = mask.long().where(mask != IGNORE, 0)
    onehot = F.one_hot(classes, len(VOC_CLASSES) + 1).permute(0, 3, 1, 2).float()
    return 5 * F.interpolate(onehot, tuple(max(2, s // 16) for s in mask.shape[-2:]), mode="area")


def par(setup: Setup) -> Iterator[Row]:
    """Pixel-adaptive refinement of a batch of 4 at 448², and the labels made with it."""
    size, side, channels = 4, 96 if setup.quick else 448, 4
    image, mask = setup.pictures(size, side)
    scores = torch.rand(size, channels, side, side, device=setup.device).softmax(1)
    config = setup.recipe().cam
    module = PixelAdaptiveRefinement(config.par_dilations, config.par_iterations).to(setup.device)
    ours = partial(module, image, scores)
    theirs = partial(reference.reference_par, image, scores, config.par_dilations, config.par_iterations)
    neighbours, pixels = len(module.shifts), size * side**2
    setting = f"{channels} channels, {side}², batch {size}"
    moved = 4 * pixels * (neighbours + config.par_iterations * (neighbours + 2 * channels))
    seconds = interleaved({"ours": ours, "theirs": theirs}, setup)
    yield _gain(
        "par",
        "PAR time",
        setting,
        seconds["ours"],
        seconds["theirs"],
        target=setup.target("≥ 4"),
        floor_bytes=moved,
        flops=2 * neighbours * channels * pixels * config.par_iterations,
        note="floor: weights written once, read with the scores in each iteration",
    )
    yield make_row(
        "par",
        "PAR peak memory",
        setting,
        "MB",
        peak_memory(ours, setup.device) / MB,
        peak_memory(theirs, setup.device) / MB,
        floor_bytes=4 * pixels * (neighbours + channels),
        note="floor: weights and scores",
    )
    label = torch.stack([classes_in(m.cpu(), len(VOC_CLASSES)) for m in mask]).to(setup.device)
    cam = torch.rand(size, len(VOC_CLASSES), side, side, device=setup.device) * label[:, :, None, None]
    box = torch.tensor([[0, side, 0, side]] * size, device=setup.device)
    seconds = interleaved(
        {
            "ours": lambda: two_threshold_labels(image, cam, label, box, module, config.high, config.low),
            "theirs": lambda: reference.reference_labels(image, cam, label, box, config),
        },
        setup,
    )
    setting = f"{len(VOC_CLASSES)} classes, {side}², batch {size}"
    yield _gain("par", "two-threshold labels, time", setting, seconds["ours"], seconds["theirs"])


def energy(setup: Setup) -> Iterator[Row]:
    """The fast filter of the dense energy against the sum over all pairs."""
    count, side = (2, 144) if setup.quick else (8, 448) if setup.gpu else (2, 448)
    image, mask = setup.pictures(count, side)
    target = mask.long()
    target[:, ::3] = IGNORE
    box = torch.tensor([[[0, side, 0, side]]] * count, device=setup.device)
    setting = f"{len(VOC_CLASSES) + 1} channels, {side // 2}² (half of {side}²)"

    def run(i: int, exact: bool) -> tuple[Tensor, Tensor]:
        x = _logits(mask[i : i + 1]).requires_grad_()
        value = dense_energy(image[i : i + 1], x, target[i : i + 1], box[i], exact=exact)
        return value.detach(), torch.autograd.grad(value, x)[0]

    errors = []
    for i in range(count):
        (value, gradient), (true_value, true_gradient) = run(i, False), run(i, True)
        errors.append(
            [
                ((value - true_value) / true_value).abs().item(),
                ((gradient - true_gradient).norm() / true_gradient.norm()).item(),
            ]
        )
    for name, column in zip(("value", "gradient"), zip(*errors, strict=True), strict=True):
        yield make_row(
            "energy",
            f"relative error of the {name}",
            setting,
            "%",
            100 * max(column),
            target=setup.target("≤ 2 %"),
            note=f"largest of {count} images; mean {100 * statistics.mean(column):.2f} %",
        )
    seconds = interleaved({"fast": lambda: run(0, False), "exact": lambda: run(0, True)}, setup)
    pixels = (side // 2) ** 2
    yield _gain(
        "energy",
        "energy and gradient of one image",
        setting,
        seconds["fast"],
        seconds["exact"],
        target=setup.target("≤ 5 ms") if setup.gpu else "",
        floor_bytes=4 * pixels * (3 + 3 * 21),
        note="floor: image, probabilities, filtered values and gradient once",
    )


def idle_share(setup: Setup, workers: int, steps: int) -> float:
    """Share of the time that a training loop waits for its next batch, 0..1, after the first three."""
    recipe = setup.recipe()
    recipe.data.workers = workers
    dataset = setup.dataset()
    trainer = Trainer(recipe, dataset.classes, setup.device)
    batches, waited, began = iter(train_loader(dataset, recipe)), 0.0, 0.0
    for number in range(steps + 3):
        if number == 3:
            waited, began = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        dense_step(trainer, batch)
        wait(setup.device)  # so that waiting is never hidden behind queued work: an upper bound
    return waited / (time.perf_counter() - began)


def loader(setup: Setup) -> Iterator[Row]:
    """Does loading keep the device busy?"""
    workers, steps = (8 if setup.gpu else 2), (4 if setup.quick else 60 if setup.gpu else 15)
    alone, shared = idle_share(setup, 0, max(4, steps // 4)), idle_share(setup, workers, steps)
    setting = f"{setup.describe(4)}, {'VOC' if setup.data else 'built-in scenes'}, {workers} workers"
    yield make_row(
        "loader",
        "device idle share",
        setting,
        "%",
        100 * shared,
        100 * alone,
        target=setup.target("≤ 5 %"),
        note="reference: no worker",
    )


def crf(setup: Setup) -> Iterator[Row]:
    """Dense CRF over images by worker processes."""
    if not crf_available():
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count, side, classes = (4, 64, 4) if setup.quick else (48 * cores, 320, 6)
    images, random = setup.pictures(min(count, 4), side)[0].cpu(), np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(classes), (side, side)).transpose(2, 0, 1).astype(np.float32)
    jobs = [(images[i % len(images)].permute(1, 2, 0).numpy().copy(), probabilities, i) for i in range(count)]
    once = Setup(setup.device, True, seconds=0)
    seconds = interleaved(
        {"all": lambda: list(crf_pool(jobs, cores)), "one": lambda: list(crf_pool(jobs, 1))}, once
    )
    target = setup.target(f"≥ {0.8 * cores:.1f}") if cores > 1 else ""
    yield _gain(
        "crf",
        f"CRF by {cores} processes",
        f"{count} images, {side}², {classes} classes",
        seconds["all"],
        seconds["one"],
        target=target,
        note="start of the processes included",
    )


def scaling(setup: Setup) -> Iterator[Row]:
    """Forward and backward pass with the affinity applied, against image size, batch and depth."""
    if setup.quick:
        sides, batches, depths = (64, 96), (2,), (4,)
    elif setup.gpu:
        sides, batches, depths = (224, 320, 448, 672, 1024), (2, 4, 8), (4, 8, 24)
    else:
        sides, batches, depths = (224, 320, 448, 672, 1024), (2, 4), (4, 8)
    cases = [(side, 1, 0) for side in sides] + [(sides[0], batch, 0) for batch in batches]
    cases += [(sides[0], 1, depth) for depth in depths]
    bf16 = precision("auto", setup.device) == "bf16"
    for side, size, depth in cases:
        network = Network(setup.recipe(depth=depth), VOC_CLASSES).to(setup.device)
        image = setup.pictures(size, side)[0]

        def run(affinity: bool, network=network, image=image) -> Tensor:
            with torch.autocast(setup.device.type, torch.bfloat16, enabled=bf16):
                out = network(image, affinity=affinity)
                if affinity:
                    with torch.no_grad():
                        refine(out, out.cam.relu())
            return out.scores.float().sum() + out.segmentation.float().mean()

        both = {"with": lambda: run(True).backward(), "without": lambda: run(False).backward()}
        seconds, backbone = interleaved(both, setup), network.backbone
        tokens = prod(backbone.grid(side, side)) + backbone.prefix
        formula = analytic_activation_bytes(
            size,
            tokens,
            backbone.width,
            backbone.depth,
            backbone.heads,
            pixels=3 * side**2,
            value=2 if bf16 else 4,
        )
        setting = setup.describe(size, side, backbone.depth)
        at = {"side": side, "batch": size, "depth": backbone.depth}
        yield _overhead(
            "scaling",
            "forward and backward, haaf_fused",
            setting,
            seconds["with"],
            seconds["without"],
            flops=count_flops(both["with"]),
            at=at,
        )
        peaks = [peak_memory(function, setup.device) / MB for function in both.values()]
        yield make_row(
            "scaling",
            "peak of forward and backward, haaf_fused",
            setting,
            "MB",
            *peaks,
            gain=False,
            floor_bytes=sum(formula.values()),
            at=at,
            note="floor: the encoder by formula",
        )


SUITES: dict[str, Callable[[Setup], Iterator[Row]]] = {
    f.__name__: f for f in (affinity, step, par, energy, loader, crf, scaling)
}


def machine(device: torch.device) -> dict[str, object]:
    """What the numbers were measured on."""
    return {
        "device": describe_device(device),
        "type": device.type,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "precision": precision("auto", device),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("torch", "torchvision", "timm", "numpy")},
    }


def measure(suite: str, setup: Setup, until: float = float("inf")) -> Iterator[Row]:
    """The rows of one suite as they come; no further row is begun after `until` (`time.perf_counter()`)."""
    for row in SUITES[suite](setup):
        yield row
        if time.perf_counter() > until:
            return
    gc.collect()
    if setup.gpu:
        torch.cuda.empty_cache()


def _number(value: float | None, unit: str = "") -> str:
    return (
        ""
        if value is None
        else f"{value:,.4g} {unit}".rstrip()
        if value < 1e4
        else f"{value:,.0f} {unit}".rstrip()
    )


def to_markdown(rows: list[Row]) -> str:
    """Rows as one table."""
    lines = [
        "| suite | what | setting | value | reference | ratio | target | met | floor | note |",
        "|---" * 10 + "|",
    ]
    for r in rows:
        ratio = "" if r.ratio is None else f"{r.ratio:.3g}× ({r.ratio_of})"
        floor = [f"{r.floor_bytes / MB:,.4g} MB"] if r.floor_bytes is not None else []
        floor += [f"{r.flops / 1e9:,.4g} GFLOP"] if r.flops else []
        met = {None: "", True: "yes", False: "no"}[r.met]
        cells = (
            r.suite,
            r.name,
            r.setting,
            _number(r.value, r.unit),
            _number(r.reference, r.unit),
            ratio,
            r.target,
            met,
            ", ".join(floor),
            r.note,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def open_setup(
    device: str, *, quick: bool = False, full: bool = False, data: Path | None = None, seconds: float = 60.0
) -> Setup:
    """A setup on a device; photographs are taken from `data`, else from VOC where it is at hand."""
    root = data or voc_root()
    found = (root / "JPEGImages").is_dir() and (root / "ImageSets" / "Segmentation" / "train.txt").is_file()
    if data and not found:
        raise UserError(f"{data} holds no VOC 2012 data; name the folder with JPEGImages/ and ImageSets/.")
    return Setup(
        resolve_device(device), quick, root if found and not (quick and not data) else None, seconds, full
    )


def run_suites(
    suites: list[str], out: Path | None, *, quick: bool = False, full: bool = False, device: str = "auto"
) -> int:
    """Measure, print one table per suite, and write `bench.json` and `bench.md`.

    Args:
        suites: names out of `SUITES`; empty: all.
        out: folder for the results; None: `results/bench`.
        quick: toy sizes and two rounds, to see that everything runs; targets do not count then.
        full: the published size, ViT-B at 448², on a processor too.
        device: auto, cpu or cuda.

    Returns:
        0.

    Raises:
        UserError: an unknown suite or an unusable device.
    """
    for name in suites:
        if name not in SUITES:
            raise UserError(f"there is no suite '{name}'; choose from {', '.join(SUITES)}.")
    setup = open_setup(device, quick=quick, full=full)
    out = out or results_root() / "bench"
    out.mkdir(parents=True, exist_ok=True)
    report, rows = (
        {"machine": machine(setup.device), "quick": quick, "data": "VOC" if setup.data else "built-in"},
        [],
    )
    print(" ".join(f"{key} {value}," for key, value in report["machine"].items()).rstrip(","), flush=True)
    for name in suites or SUITES:
        found = list(measure(name, setup))
        rows += found
        print(
            to_markdown(found) if found else f"{name}: needs pydensecrf2, which is not installed.\n",
            flush=True,
        )
        write_report(out, "bench", report | {"rows": [asdict(row) for row in rows]}, rows)
    return 0


def write_report(out: Path, name: str, report: dict, rows: list[Row]) -> None:
    """`<name>.json` with everything and `<name>.md` with the table and the machine it was measured on."""
    (out / f"{name}.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    described = "\n".join(f"- {key}: {value}" for key, value in report["machine"].items())
    (out / f"{name}.md").write_text(f"{to_markdown(rows)}\n{described}\n")
