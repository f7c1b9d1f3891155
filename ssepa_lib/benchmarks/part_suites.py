"""Suites over single parts: refinement (PAR), masked views, dense energy, loading and the dense CRF."""

import statistics
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.benchmarks import naive_step
from ssepa_lib.benchmarks.measure import (
    MB,
    Row,
    count_flops,
    full_step,
    interleaved,
    make_row,
    time_row,
    wait,
)
from ssepa_lib.benchmarks.setup import Setup
from ssepa_lib.data import IGNORE, train_loader
from ssepa_lib.data.images import classes_in
from ssepa_lib.data.voc import VOC_CLASSES
from ssepa_lib.device import cores
from ssepa_lib.evaluation.memory import peak_memory
from ssepa_lib.labels import PseudoLabeler
from ssepa_lib.labels.crf import crf_available, crf_pool
from ssepa_lib.methods.losses import dense_energy
from ssepa_lib.methods.mcc import masked_views
from ssepa_lib.training import Trainer


def mask_logits(mask: Tensor) -> Tensor:
    """A soft segmentation [B, C+1, h, w] at a sixteenth of the size of masks [B, H, W], as a decoder makes
    it."""
    classes = mask.long().where(mask != IGNORE, 0)
    onehot = F.one_hot(classes, len(VOC_CLASSES) + 1).permute(0, 3, 1, 2).float()
    return 5 * F.interpolate(onehot, tuple(max(2, s // 16) for s in mask.shape[-2:]), mode="area")


def par(setup: Setup) -> Iterator[Row]:
    """Pixel-adaptive refinement of a batch of 4 at 448², and the labels made with it."""
    size, side, channels = 4, 96 if setup.quick else 448, 4
    image, mask = setup.images(size, side)
    scores = torch.rand(size, channels, side, side, device=setup.device).softmax(1)
    config = setup.recipe().cam
    labeler = PseudoLabeler(config).to(setup.device)
    ours = partial(labeler.par, image, scores)
    theirs = partial(naive_step.naive_par, image, scores, config.par_dilations, config.par_iterations)
    neighbours, pixels = len(labeler.par.shifts), size * side**2
    setting = f"{channels} channels, {side}², batch {size}"
    seconds = interleaved({"ours": ours, "theirs": theirs}, setup)
    yield time_row(
        "par",
        "PAR time",
        setting,
        seconds["ours"],
        seconds["theirs"],
        target=setup.target("≥ 4"),
        floor_bytes=4 * pixels * (neighbours + config.par_iterations * (neighbours + 2 * channels)),
        flops=2 * neighbours * channels * pixels * config.par_iterations,
        note="floor: weights written once, read with the scores in each iteration",
    )
    peaks = [peak_memory(function, setup.device) / MB for function in (ours, theirs)]
    floor, note = 4 * pixels * (neighbours + channels), "floor: weights and scores"
    yield make_row("par", "PAR peak memory", setting, "MB", *peaks, floor_bytes=floor, note=note)
    yield _label_row(setup, image, mask, labeler)


def _label_row(setup: Setup, image: Tensor, mask: Tensor, labeler: PseudoLabeler) -> Row:
    """Time of two-threshold labels of images uint8 [B, 3, S, S], whose classes are those of the masks [B,
    S, S]."""
    size, side, count = len(mask), mask.shape[-1], len(VOC_CLASSES)
    label = torch.stack([classes_in(m.cpu(), count) for m in mask]).to(setup.device)
    cam = torch.rand(size, count, side, side, device=setup.device) * label[:, :, None, None]
    box = torch.tensor([[0, side, 0, side]] * size, device=setup.device)
    ours = partial(labeler.training_labels, image, cam, label, box)
    theirs = partial(naive_step.naive_labels, image, cam, label, box, setup.recipe().cam)
    seconds = interleaved({"ours": ours, "theirs": theirs}, setup)
    setting = f"{count} classes, {side}², batch {size}"
    return time_row("par", "two-threshold labels, time", setting, seconds["ours"], seconds["theirs"])


def masks(setup: Setup) -> Iterator[Row]:
    """A step of MCC with its hidden patches dropped against one with their keys masked, and beside ToCo's."""
    size = 1 if setup.full and not setup.gpu else 4
    batch, setting = setup.batch(size), setup.describe(size)
    block = {"contrast.mask_block": max(1, round(setup.side / 16 / 7))}  # 7×7 blocks, as at 448²
    recipes = {name: setup.recipe("mcc", batch=size, changes=block) for name in ("dropped", "masked")}
    recipes["toco"] = setup.recipe("toco", batch=size)
    trainers = {name: Trainer(recipe, VOC_CLASSES, setup.device) for name, recipe in recipes.items()}
    backbone = trainers["masked"].network.backbone
    backbone.class_tokens = partial(naive_step.masked_class_tokens, backbone)
    seconds = interleaved({n: partial(full_step, trainer, batch) for n, trainer in trainers.items()}, setup)
    for other, words in (("masked", "keys masked"), ("toco", "ToCo")):
        name = f"step time of MCC against {words}"
        yield time_row("masks", name, setting, seconds["dropped"], seconds[other], gain=False)
    grid = backbone.grid(setup.side, setup.side)
    regions = torch.ones(size, *grid, dtype=torch.long, device=setup.device)
    visible, _ = masked_views(regions, recipes["dropped"].contrast, torch.Generator().manual_seed(0))

    def views(trainer: Trainer) -> None:
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=trainer.bf16):
            trainer.network.backbone.class_tokens(batch.image, visible).sum().backward()

    both = {name: partial(views, trainers[name]) for name in ("dropped", "masked")}
    seconds, flops = interleaved(both, setup), count_flops(both["dropped"])
    target = setup.target("≤ 0.3")
    name, more = "masked views, forward and backward", {"gain": False, "target": target, "flops": flops}
    yield time_row("masks", name, setting, seconds["dropped"], seconds["masked"], **more)


def energy(setup: Setup) -> Iterator[Row]:
    """The fast filter of the dense energy against the sum over all pairs."""
    count, side = (2, 144) if setup.quick else (8, 448) if setup.gpu else (2, 448)
    image, mask = setup.images(count, side)
    target = mask.long()
    target[:, ::3] = IGNORE
    box = torch.tensor([[0, side, 0, side]], device=setup.device)
    setting = f"{len(VOC_CLASSES) + 1} channels, {side // 2}² (half of {side}²)"

    def run(i: int, exact: bool) -> tuple[Tensor, Tensor]:
        one = slice(i, i + 1)
        x = mask_logits(mask[one]).requires_grad_()
        value = dense_energy(image[one], x, target[one], box, exact=exact)
        return value.detach(), torch.autograd.grad(value, x)[0]

    errors: dict[str, list[float]] = {"value": [], "gradient": []}
    for i in range(count):
        for name, found, true in zip(errors, run(i, False), run(i, True), strict=True):
            errors[name].append(((found - true).norm() / true.norm()).item())
    for name, found in errors.items():
        yield make_row(
            "energy",
            f"relative error of the {name}",
            setting,
            "%",
            100 * max(found),
            target=setup.target("≤ 2 %"),
            note=f"largest of {count} images; mean {100 * statistics.mean(found):.2f} %",
        )
    seconds = interleaved({"fast": partial(run, 0, False), "exact": partial(run, 0, True)}, setup)
    yield time_row(
        "energy",
        "energy and gradient of one image",
        setting,
        seconds["fast"],
        seconds["exact"],
        target=setup.target("≤ 5 ms") if setup.gpu else "",
        floor_bytes=4 * (side // 2) ** 2 * (3 + 3 * 21),
        note="floor: image, probabilities, filtered values and gradient once",
    )


def idle_share(setup: Setup, workers: int, steps: int) -> float:
    """Share of the time that training waits for its next batch, 0..1, after the first three."""
    recipe = setup.recipe(changes={"data.workers": workers})
    dataset = setup.dataset()
    trainer = Trainer(recipe, dataset.classes, setup.device)
    batches, waited, began = iter(train_loader(dataset, recipe)), 0.0, 0.0
    for number in range(steps + 3):
        if number == 3:
            waited, began = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        full_step(trainer, batch)
        wait(setup.device)  # so that waiting is never hidden behind queued work: an upper bound
    return waited / (time.perf_counter() - began)


def loader(setup: Setup) -> Iterator[Row]:
    """Does loading keep the device busy?"""
    workers, steps = (8 if setup.gpu else 2), (4 if setup.quick else 60 if setup.gpu else 15)
    alone, shared = idle_share(setup, 0, max(4, steps // 4)), idle_share(setup, workers, steps)
    setting = f"{setup.describe(4)}, {'VOC' if setup.data else 'built-in scenes'}, {workers} workers"
    target, note = setup.target("≤ 5 %"), "reference: no worker"
    yield make_row(
        "loader", "device idle share", setting, "%", 100 * shared, 100 * alone, target=target, note=note
    )


def crf(setup: Setup) -> Iterator[Row]:
    """Dense CRF over images by worker processes."""
    if not crf_available():
        return
    number = cores()
    count, side, classes = (4, 64, 4) if setup.quick else (48 * number, 320, 6)
    images, random = setup.images(min(count, 4), side)[0].cpu(), np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(classes), (side, side)).transpose(2, 0, 1).astype(np.float32)
    jobs = [(images[i % len(images)].permute(1, 2, 0).numpy().copy(), probabilities, i) for i in range(count)]
    runs = {"all": lambda: list(crf_pool(jobs, number)), "one": lambda: list(crf_pool(jobs, 1))}
    seconds = interleaved(runs, Setup(setup.device, True, seconds=0))
    yield time_row(
        "crf",
        f"CRF by {number} processes",
        f"{count} images, {side}², {classes} classes",
        seconds["all"],
        seconds["one"],
        target=setup.target(f"≥ {0.8 * number:.1f}") if number > 1 else "",
        note="start of the processes included",
    )
