"""What a call is going to train, before it starts: runs, steps, expected time and disk.

The time of a step is read from the history of an earlier run with the same settings where there is one.
Otherwise it is estimated: the floating-point operations of its passes through the encoder, divided by the
speed that whole training steps have reached on an x86 core, or by a share of the speed at which the GPU
multiplies matrices. Such an estimate may be wrong by a factor of three; it tells minutes from days.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf, prod
from pathlib import Path
from typing import Any

import torch

from ssepa_lib.data import build_dataset
from ssepa_lib.device import autocast, describe_device, precision, resolve_device
from ssepa_lib.errors import UserError
from ssepa_lib.model.backbone import build_backbone
from ssepa_lib.model.heads import LargeFOV
from ssepa_lib.recipe import Recipe
from ssepa_lib.training.history import history_rows
from ssepa_lib.training.run import RunFolder, find_finished
from ssepa_lib.workbook.ablations import FSR_ARMS
from ssepa_lib.workbook.queue import Job
from ssepa_lib.workbook.study import study_command, study_jobs

LONG = 30 * 60  # seconds of training from which a call of the notebooks has to be confirmed
FULL = 12 * 3600  # seconds from which a run without a GPU has to be confirmed
# FLOP/s of a core in a step: measured as 45e9 (shapes) and 75e9 (voc_mini without AMX) when a step of ToCo or
# SS-EPA was counted with one pass too many; scaled so that the times estimated for them are the same
CORE_SPEED = {"fp32": 42e9, "bf16": 70e9}
GPU_SHARE = 0.05  # of the speed of matrix products that a step reaches
GPU_SPEED = 20e12  # FLOP/s of a step on a data-centre GPU: that share of 400 TFLOP/s; not measured


@dataclass(frozen=True)
class Cost:
    """What a step and a run folder cost, by formula."""

    flops: float  # of one step, encoder only
    parameters: int  # of the encoder
    shape: tuple[int, int]  # tokens of a batch, width
    decoder: float  # operations of the decoder in a step, with the backward pass
    features: float  # bytes of all features of one view of an image, in half precision

    @property
    def disk(self) -> float:
        """Bytes of the weights and of the checkpoint with the two moments of AdamW."""
        return 4.0 * self.parameters * (1 + 3)


@dataclass(frozen=True)
class Planned:
    """A run that a call is going to train.

    Attributes:
        seconds: expected time of training; 0 if there is nothing left to train.
        source: where that comes from: "finished", "measured" or "estimated".
        disk: bytes of the run folder.
    """

    job: Job
    seconds: float
    source: str
    disk: float


def step_cost(recipe: Recipe) -> Cost:
    """The cost of one step with all passes of the table in `methods/step.py`.

    Raises:
        UserError: a backbone that cannot be built, or a crop that is smaller than a patch.
    """
    with torch.device("meta"):
        encoder = build_backbone(replace(recipe.model, weights="none"))
        decoder = LargeFOV(encoder.width, 1)
    side, batch, passes = recipe.data.crop, recipe.data.batch, list(_passes(recipe))
    flops = batch * sum(weight * encoder.flops(each, each) for each, weight in passes)
    tokens = prod(encoder.grid(side, side)) + encoder.num_prefix_tokens
    parameters, weights = (sum(p.numel() for p in part.parameters()) for part in (encoder, decoder))
    layers = 0 if recipe.affinity.kind == "none" else encoder.depth
    one = 4.0 * tokens * encoder.width * (1 + layers)  # final and auxiliary tokens, queries and keys
    features = one * sum((each / side) ** 2 for each, _ in passes)
    return Cost(flops, parameters, (batch * tokens, encoder.width), 6.0 * batch * tokens * weights, features)


def _passes(recipe: Recipe) -> Iterator[tuple[float, int]]:
    """Side of an image and 1, or 3 with the backward pass, for every pass of one image in a step."""
    side, contrast, affinity = recipe.data.crop, recipe.contrast, recipe.affinity
    views = [(scale * side, 1) for scale in recipe.cam.scales for _ in range(1 + recipe.cam.flip)]
    maps = views.copy()
    if recipe.model.drop_path == 0 and recipe.cam.teacher_momentum == 0 and (side, 1) in maps:
        maps.remove((side, 1))  # the image itself at scale 1 is the training pass
    yield (side, 1 if recipe.model.freeze else 3)
    yield from maps
    if recipe.losses.ctc:
        local = contrast.local_size if contrast.views == "crops" else side * (1 - contrast.mask_share) ** 0.5
        yield from [(side, 3), *[(local, 3)] * contrast.local_crops]  # masked views by their visible patches
    if affinity.kind == "haaf" and affinity.haaf_objective == "equivariance":
        yield (int(1.4 * side), 1)
    if recipe.self_reinforced:
        yield from [(side, 3), (side, 1), (side, 1)]
        yield from views if recipe.reinforce.selection in ("loose", "strict") else []


def full_steps(recipe: Recipe, cost: Cost, steps: int, images: int | None = None) -> float:
    """How many steps with all their passes take as long as `steps` steps of a run.

    As many, but for a frozen backbone. Its passes are made for views that are seen for the first time, and
    again for those whose features do not fit into `model.cache_gb`. The decoder, which is part of the speed
    of other runs, is added for every step.

    Args:
        images: of the training split; None: they are counted. Without the data every view counts as new.
    """
    if not recipe.model.freeze:
        return steps
    if images is None:
        with suppress(UserError):
            images = len(build_dataset(recipe.data, "train"))
    views = (images or 0) * recipe.data.fixed_views or inf
    first = min(steps, views / recipe.data.batch)
    kept = min(1.0, 1e9 * recipe.model.cache_gb / (views * cost.features))
    return first + (steps - first) * (1 - kept) + steps * cost.decoder / cost.flops


def seconds_per_step(recipe: Recipe, cost: Cost) -> float:
    """The expected time of a step on the recipe's device."""
    device = resolve_device(recipe.train.device)
    kind = precision(recipe.train.precision, device)
    if device.type == "cpu":  # not timed here, because a busy machine would seem slow for ever
        return cost.flops / (CORE_SPEED[kind] * torch.get_num_threads())
    tokens, width = cost.shape
    a, b = torch.ones(tokens, width, device=device), torch.ones(width, 4 * width, device=device)
    best = float("inf")
    with autocast(recipe.train.precision, device):
        for _ in range(4):
            began = time.perf_counter()
            (a @ b)[0, 0].item()  # waits for the GPU
            best = min(best, time.perf_counter() - began)
    return cost.flops / (GPU_SHARE * 8 * tokens * width**2 / max(best, 1e-6))


def seconds_on(recipe: Recipe, cost: Cost, kind: str) -> float:
    """The expected time of a step on another device than the recipe's, by formula alone.

    Args:
        kind: "cpu", the cores of this machine, or "gpu", a data-centre GPU.
    """
    if kind == "cpu":
        return seconds_per_step(replace(recipe, train=replace(recipe.train, device="cpu")), cost)
    return max(cost.flops / GPU_SPEED, 0.05)  # launching the kernels of a step takes that long


def _kind(recipe: Recipe) -> str:
    """The same for runs whose steps take equally long."""
    return replace(recipe, train=replace(recipe.train, seed=0, steps=1)).hash()


def _measured(folder: Path) -> dict[str, float]:
    """Seconds per step of the runs in a folder of results, by their kind."""
    found = {}
    for run in map(RunFolder, sorted(folder.glob("*/"))):
        with suppress(UserError, ZeroDivisionError):  # what cannot be read says nothing about time
            last = history_rows(run.history)[-1:]
            found |= {_kind(run.recipe()): float(row["seconds"]) / int(row["step"]) for row in last}
    return found


def plan(jobs: Sequence[Job], *, anew: bool = False, beside: bool = True) -> list[Planned]:
    """Every run of the jobs once, with its expected time and disk.

    Args:
        anew: finished runs are trained again.
        beside: a run of the same recipe in another folder of the preset serves as well.
    """
    recipes: dict[str, Job] = {}
    for job in jobs:
        recipes.setdefault(job.recipe.hash(), job)
    measured = {folder: _measured(folder) for folder in {job.folder.parent for job in jobs}}
    estimated: dict[str, float] = {}
    planned = []
    for job in recipes.values():
        folder = find_finished(job.recipe, job.folder) if beside else job.folder
        if not anew and RunFolder(folder).is_finished(job.recipe):
            planned.append(Planned(job, 0.0, "finished", 0.0))
            continue
        kind, cost = _kind(job.recipe), step_cost(job.recipe)
        known = measured[job.folder.parent].get(kind)
        if known is None and kind not in estimated:
            estimated[kind] = seconds_per_step(job.recipe, cost)
        steps = job.recipe.train.steps if anew else _steps_left(job)
        seconds = full_steps(job.recipe, cost, steps) * estimated[kind] if known is None else steps * known
        planned.append(Planned(job, seconds, "estimated" if known is None else "measured", cost.disk))
    return planned


def _steps_left(job: Job) -> int:
    """Steps that a run still needs: all, but for those up to the last row of an interrupted one's history."""
    folder, done = RunFolder(job.folder), 0
    with suppress(UserError):
        if folder.state.is_file() and folder.recipe().hash() == job.recipe.hash():
            done = max((int(row["step"]) for row in history_rows(folder.history)), default=0)
    return max(1, job.recipe.train.steps - done)


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h` or `4.6 days`."""
    for size, unit in ((86400 * 1.5, "days"), (3600 * 1.5, "h"), (90, "min")):
        if seconds >= size:
            value = seconds / {"days": 86400, "h": 3600, "min": 60}[unit]
            return f"{value:.0f} {unit}" if unit == "min" else f"{value:.1f} {unit}"
    return f"{seconds:.0f} s"


def describe(planned: Sequence[Planned]) -> str:
    """One line per run and their sum."""
    lines = []
    for each in planned:
        recipe, name = each.job.recipe, each.job.folder.name
        if each.source == "finished":
            lines.append(f"  {name:32} already finished")
            continue
        steps = f"{recipe.train.steps} steps of {recipe.data.batch}, seed {recipe.train.seed}"
        lines.append(f"  {name:32} {steps:28} about {duration(each.seconds)} ({each.source})")
    left = [each for each in planned if each.source != "finished"]
    if left:
        device = describe_device(resolve_device(left[0].job.recipe.train.device))
        disk = sum(each.disk for each in left) / 1e9
        total = duration(sum(each.seconds for each in left))
        many = f"{len(left)} run{'s' * (len(left) != 1)} to train"
        lines.append(f"  {many}: about {total} on {device}, {disk:.1f} GB of disk")
    return "\n".join(lines)


def remedy(jobs: Sequence[Job], command: str) -> str:
    """What makes runs that are asked for before they exist, in one sentence; empty where all are finished.

    Args:
        command: what the user types to make them.
    """
    left = [each for each in plan(jobs) if each.source != "finished"]
    if not left:
        return ""
    names = ", ".join(each.job.folder.name for each in left)
    device = describe_device(resolve_device(left[0].job.recipe.train.device))
    took = duration(sum(each.seconds for each in left))
    return f"Missing: {names}. `{command}` trains what is missing, in about {took} on {device}."


def missing_runs(
    preset: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    arms: str = "",
    steps: int = 0,
    device: str = "auto",
    run_name: str = "",
    changes: Mapping[str, object] | None = None,
) -> str:
    """`remedy` of the runs of a study: the command has the arguments that the runs are named by.

    Args:
        arms: key of FSR_ARMS; empty: the methods as they are.
        steps, device, run_name, changes: as for `study.run_study`.
    """
    options = {"steps": steps, "device": device, "run_name": run_name, "changes": changes}
    jobs = study_jobs(preset, methods, seeds, splits={}, arms=FSR_ARMS[arms] if arms else None, **options)
    command = study_command(
        preset, methods, seeds, arms=arms, steps=steps, run_name=run_name, changes=changes
    )
    return remedy(list(jobs.values()), command)


def confirm(planned: Sequence[Planned], yes: bool, limit: float = float("inf")) -> None:
    """Ask before something long starts: a full-size run without a GPU, or more than `limit` seconds in all.

    Args:
        yes: the answer, given beforehand.

    Raises:
        UserError: the answer is no, or nobody is there to give it.
    """
    total = sum(each.seconds for each in planned)
    slow = [each for each in planned if each.seconds > FULL and not _on_gpu(each.job.recipe)]
    if yes or not (slow or total > limit):
        return
    said = f"training would take about {duration(total)}"
    if slow:
        name, one = slow[0].job.recipe.name, duration(slow[0].seconds)
        said = f"without a GPU, {name} would take about {one} on this machine"
        if slow[0].job.recipe.data.name == "voc":
            said += "; voc_mini is a small recipe for a CPU"
    if sys.stdin.isatty() and sys.stdout.isatty():
        if input(f"{said[0].upper()}{said[1:]}. Start? [y/N] ").strip().lower() in ("y", "yes"):
            return
        raise UserError("nothing was started.")
    raise UserError(f"{said}; add --yes to start it nevertheless.")


def _on_gpu(recipe: Recipe) -> bool:
    return resolve_device(recipe.train.device).type == "cuda"


def notebook_jobs(trains: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> list[Job]:
    """The runs of a notebook.

    Args:
        trains: the entry `trains` of its metadata, one mapping per group of runs: `methods`, `seeds`, `steps`
            and `arms` name a parameter or say the value itself; `name` is added to the names of the runs. A
            group whose `arms` are an empty list makes none; `own` is a run of `own_images.own_jobs`.
        values: the notebook's parameters.

    Raises:
        UserError: an unknown method, setting or set of arms.
    """
    jobs: list[Job] = []
    for entry in trains:
        given = {
            key: values.get(value, value) if isinstance(value, str) else value for key, value in entry.items()
        }
        many = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
        if "own" in given or given.get("arms") == []:
            continue  # a run of no preset, or an ablation that was not asked for
        arms: dict[str, Mapping[str, Any]] = {}
        for question in many.get("arms", ()):
            if question not in FSR_ARMS:
                raise UserError(f"there is no FSR ablation '{question}'; choose among {', '.join(FSR_ARMS)}.")
            arms |= FSR_ARMS[question]
        steps = given.get("steps", 0)
        names = (values.get("run_name"), f"{given['name']}{steps}" if "name" in given else "")
        found = study_jobs(
            values["preset"],
            many["methods"],
            many["seeds"],
            splits={},
            steps=steps,
            device=values.get("device", "auto"),
            run_name="-".join(filter(None, names)),
            changes=values.get("overrides"),
            arms=arms or None,
        )
        jobs += found.values()
    return jobs
