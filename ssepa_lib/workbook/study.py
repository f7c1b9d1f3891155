"""Runs in their places: where a run lies, train and evaluate it once, compare methods over seeds."""

import itertools
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from ssepa_lib.compose import load_recipe
from ssepa_lib.data import SegmentationDataset, build_dataset, eval_batches, measured_split
from ssepa_lib.data.images import resize_mask
from ssepa_lib.device import describe_device, resolve_device
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.attention import attention_statistics
from ssepa_lib.labels.crf import require_crf
from ssepa_lib.model import Network
from ssepa_lib.paths import plain_name, results_root
from ssepa_lib.recipe import Recipe
from ssepa_lib.training.run import RunFolder, find_finished
from ssepa_lib.training.trainer import OnStep, train
from ssepa_lib.workbook.ablations import FSR_ARMS
from ssepa_lib.workbook.progress import bars
from ssepa_lib.workbook.queue import Job, Report, run_jobs, share, stored_outcome
from ssepa_lib.workbook.tables import result_row


def environment(device: torch.device | str) -> str:
    """Versions and device in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "numpy"))
    return f"Python {platform.python_version()}, {packages}; {describe_device(resolve_device(str(device)))}"


def preset_folder(preset: str, run_name: str = "") -> Path:
    """`<results>/<preset>[/<run_name>]`, with the folders `figures` and `tables` made in it.

    Raises:
        UserError: a run name that is not a plain name of a folder.
    """
    folder = results_root() / plain_name("preset", preset)
    folder = folder / plain_name("run_name", run_name) if run_name else folder
    for name in ("figures", "tables"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return folder


def run_folder(preset: str, method: str, seed: int = 0, run_name: str = "") -> Path:
    """`<results>/<preset>/<method>[-<backbone>][-<run_name>]-seed<seed>` of a method or `method/backbone`.

    Raises:
        UserError: a preset or run name that is not a plain name of a folder.
    """
    parts = (method.replace("/", "-"), plain_name("run_name", run_name) if run_name else "", f"seed{seed}")
    return results_root() / plain_name("preset", preset) / "-".join(filter(None, parts))


def folder_name(arm: str) -> str:
    """The name of an arm as part of the name of a folder: without blanks."""
    return arm.replace(" ", "-")


def _pair(method: str, run_name: str) -> tuple[str, str]:
    """`method:run_name` in two parts; the run name of a plain method is the given one."""
    method, _, own = method.partition(":")
    return method, own or run_name


def has_run(preset: str, method: str, seed: int = 0, run_name: str = "") -> bool:
    """Whether `open_run` would find the weights of a run."""
    method, run_name = _pair(method, run_name)
    return RunFolder(run_folder(preset, method, seed, run_name)).weights.is_file()


def recipe_for(
    preset: str,
    method: str,
    *,
    steps: int = 0,
    seed: int = 0,
    device: str = "auto",
    changes: Mapping[str, Any] | None = None,
) -> Recipe:
    """Recipe `<preset>/<method>` with a seed, a device and, unless 0, another number of steps."""
    overrides: dict[str, Any] = {"train.seed": seed, "train.device": device, **(changes or {})}
    return load_recipe(f"{preset}/{method}", overrides | ({"train.steps": steps} if steps else {}))


def open_run(
    preset: str, method: str, seed: int = 0, run_name: str = "", device: str = "auto", steps: int = 0
) -> tuple[Network, Recipe]:
    """Network and recipe of a finished run of notebook 03, or of an arm of 06.

    Args:
        method: with a colon and the run name for a run of another name: `fsr:cer-only`.
        steps: length that the run must have; 0: any.

    Raises:
        UserError: it is not there; says what to run.
    """
    method, run_name = _pair(method, run_name)
    folder = RunFolder(run_folder(preset, method, seed, run_name))
    if not folder.weights.is_file():
        wanted = {"methods": method, "seed": seed, "run_name": run_name, "steps": steps}
        options = "".join(f" -p {name}={value}" for name, value in wanted.items() if value or name == "seed")
        command = f"python -m ssepa_lib workbook --preset {preset} --only 03{options}"
        for question, arms in FSR_ARMS.items() if method == "fsr" else ():
            for arm in (folder_name(arm) for arm, own in arms.items() if own):
                if run_name == arm or run_name.endswith(f"-{arm}"):
                    options = {"steps": steps, "run_name": run_name.removesuffix(arm).strip("-")}
                    command = study_command(preset, ["fsr"], [seed], arms=question, **options)
                    raise UserError(f"there is no finished run in {folder.path}; train it first ({command}).")
        raise UserError(
            f"there is no finished run in {folder.path}; run notebook 03_training first ({command})."
        )
    network, recipe = folder.load(device)
    if steps and steps != recipe.train.steps:
        found = recipe.train.steps
        raise UserError(
            f"{folder.path} holds a run of {found} steps, not {steps}; set steps={found} or another run_name."
        )
    return network, recipe


def study_command(
    preset: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    arms: str = "",
    steps: int = 0,
    run_name: str = "",
    changes: Mapping[str, Any] | None = None,
) -> str:
    """What a user types to train the runs of `study_jobs`; `arms` is a key of FSR_ARMS."""
    words = ["study", preset, *methods, *(["--arms", arms] if arms else []), "--seeds", *map(str, seeds)]
    words += ["--steps", str(steps)] if steps else []
    words += ["--run-name", run_name] if run_name else []
    words += [word for name, value in (changes or {}).items() for word in ("--set", f"{name}={value}")]
    return f"python -m ssepa_lib {shlex.join(words)}"


def tour(
    preset: str,
    steps: int = 60,
    seed: int = 0,
    device: str = "auto",
    run_name: str = "",
    on_step: OnStep | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[Network, Recipe]:
    """The small run of SS-EPA that the first notebooks share: trained by whichever comes first, then reused.

    Args:
        on_step: see `train`.
        changes: recipe overrides.

    Returns:
        The network in evaluation mode, and its recipe.
    """
    recipe = recipe_for(preset, "ssepa", steps=steps, seed=seed, device=device, changes=changes)
    name = "-".join(filter(None, (run_name, f"tour{steps}")))
    folder = find_finished(recipe, run_folder(preset, "ssepa", seed, name))
    train(recipe, folder, on_step=on_step)
    return RunFolder(folder).load(device)


def study_jobs(
    preset: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    splits: Mapping[str, dict],
    steps: int = 0,
    device: str = "auto",
    run_name: str = "",
    changes: Mapping[str, Any] | None = None,
    arms: Mapping[str, Mapping[str, Any]] | None = None,
    curve: int = 0,
) -> dict[tuple[int, str, str], Job]:
    """The runs of a study, by seed, method and arm; for the arguments see `run_study`."""
    jobs = {}
    for seed, method, (arm, own) in itertools.product(seeds, methods, (arms or {"": {}}).items()):
        variant = "-".join(filter(None, (run_name, folder_name(arm))))
        both = {**(changes or {}), **own}
        recipe = recipe_for(preset, method, steps=steps, seed=seed, device=device, changes=both)
        jobs[seed, method, arm] = Job(recipe, run_folder(preset, method, seed, variant), splits, curve)
    return jobs


def run_study(
    preset: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    splits: Mapping[str, dict],
    steps: int = 0,
    device: str = "auto",
    run_name: str = "",
    changes: Mapping[str, Any] | None = None,
    arms: Mapping[str, Mapping[str, Any]] | None = None,
    curve: int = 0,
    progress: Callable[[str], OnStep] | None = None,
    report: Report | None = None,
    processes: int = 1,
    shard: tuple[int, int] = (1, 1),
) -> pd.DataFrame:
    """Train and evaluate every method and arm with every seed; finished runs are reused, interrupted runs
    resumed.

    The same recipe is never trained twice, whatever names it goes by: a finished run of its hash is taken.

    Args:
        splits: split → options of `evaluate_run` (images, outputs, test_time, …).
        changes: recipe overrides of every run.
        arms: name → further overrides; None: every method once.
        curve: how often every run is scored while it is trained, on the first split; see `ScoreCurve`.
        progress: makes the `on_step` callback of a run from its label.
        report: takes every report of the queue instead of `progress`; see `queue.Report`.
        processes: worker processes; 1: everything in this one.
        shard: (i, n): compute only the i-th of n shares of the runs.

    Returns:
        One row per method, arm, seed and split, in the columns of `tables.collect_runs`; `variant` is the
        arm. Of the runs of other shards, those that are finished.

    Raises:
        UserError: see `run_jobs`.
    """
    options = {"splits": splits, "steps": steps, "device": device, "run_name": run_name}
    jobs = study_jobs(preset, methods, seeds, **options, changes=changes, arms=arms, curve=curve)
    own = share(jobs, shard)
    outcomes = dict(zip(own, run_jobs(list(own.values()), report or bars(progress), processes), strict=True))
    rows = []
    for key, job in jobs.items():
        outcome, (_, method, arm) = outcomes.get(key) or stored_outcome(job), key
        for result in outcome.results.values() if outcome else ():
            named = result | {"setting": result["setting"] | {"method": method}}
            rows.append(result_row(outcome.run, preset, arm or run_name, named))
    return pd.DataFrame(rows)


def require_scoring(recipe: Recipe, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Report missing data, and what cannot be scored, before the first run is trained.

    Args:
        recipe: of one of the runs.
        splits: split → options of `evaluate_run`.

    Raises:
        UserError: see `build_dataset` and `require_crf`; a size out of range.
    """
    build_dataset(recipe.data, "train")
    for split, options in splits.items():
        size = recipe.data.eval_size if options.get("size") is None else options["size"]
        measured_split(replace(recipe, data=replace(recipe.data, eval_size=size)), split)
        if "ms_crf" in options.get("test_time", ()):
            require_crf()


def attention_of(network: Network, recipe: Recipe, dataset: SegmentationDataset) -> pd.DataFrame:
    """`attention_statistics` over a dataset at the recipe's evaluation size."""
    batches = eval_batches(dataset, recipe.data.eval_size, recipe.eval.batch, recipe.data.workers)
    return attention_statistics(network, (batch[1] for batch in batches), network.classifier.weight.device)


def samples(
    dataset: SegmentationDataset, indices: Sequence[int], side: int
) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    """Some images to look at, resized to squares as they are when they are measured.

    Returns:
        Images [n, 3, side, side] in 0..255, labels [n, C], and per image a mask uint8 [side, side], or None
        where one of them has no mask.
    """
    shown = [dataset.image(i).resize((side, side), Image.Resampling.BILINEAR) for i in indices]
    images = torch.stack([pil_to_tensor(image).float() for image in shown])
    masks = [dataset.mask(i) for i in indices]
    squares = None if any(mask is None for mask in masks) else [resize_mask(mask, side) for mask in masks]
    return images, torch.stack([dataset.label(i) for i in indices]), squares


def with_label(dataset: SegmentationDataset, first: int, count: int = 1) -> list[int]:
    """Up to `count` images that show a class, from image `first` on; after the last image comes the first.

    Raises:
        UserError: no image of the dataset shows a class.
    """
    order = [(first + i) % len(dataset) for i in range(len(dataset))]
    found = list(itertools.islice((i for i in order if bool(dataset.label(i).any())), count))
    if not found:
        raise UserError(f"no image of {dataset.name}, split '{dataset.split}', shows a class; check labels.")
    return found


def object_parts(
    dataset: SegmentationDataset, indices: Sequence[int], size: int | tuple[int, int], classes: Sequence[int]
) -> list[Tensor] | None:
    """Head and body of one class per image, as `evaluation.maps.mass_by_part` wants them.

    Args:
        size: of the result, (height, width) or that of a square.
        classes: index of that class for each image, from 0.

    Returns:
        Per image uint8 of that size: 1 head, 2 body of the class, 0 everything else. Where the dataset does
        not know parts, the whole object counts as body. None where an image has no mask.
    """
    found = []
    for i, kind in zip(indices, classes, strict=True):
        mask, parts = dataset.mask(i), dataset.parts(i)
        if mask is None:
            return None
        own = (mask == kind + 1).byte()
        found.append(resize_mask(own * (2 if parts is None else parts), size))
    return found
