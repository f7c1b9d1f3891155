"""Short runs of two methods on this machine, timed and scored."""

import csv
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ssepa_lib.benchmarks.measure import full_step, wait
from ssepa_lib.benchmarks.setup import BACKBONES, Setup
from ssepa_lib.compose import load_recipe
from ssepa_lib.data import build_dataset, train_loader
from ssepa_lib.evaluation.evaluate import evaluate
from ssepa_lib.recipe import Recipe
from ssepa_lib.training import RunFolder, Trainer, train

METHODS = ("toco", "ssepa")
TOY = {
    "data.crop": 64,
    "data.eval_size": 64,
    "data.batch": 2,
    "data.val_images": 4,
    "contrast.local_size": 32,
    "contrast.local_crops": 2,
    "model.weights": "none",
}


class _TimeIsUp(Exception):
    """Raised from the callback of a run at the end of its budget."""


def _recipe(method: str, setup: Setup, weights: Path | None, dry_run: bool) -> Recipe:
    """ViT-Tiny at 448² on VOC, or the built-in data with its micro ViT."""
    settings = {"train.device": setup.device.type, "data.workers": 0 if dry_run else 8, "train.log_every": 5}
    settings |= TOY if dry_run else {}
    if setup.data is None:
        return load_recipe(f"shapes/{method}", settings)
    name, _ = BACKBONES["ViT"][False]
    file = weights / f"{name}.safetensors" if weights else None
    folders = {
        "data.root": str(setup.data),
        "data.train_split": "train",
        "data.val_images": 200,
        "model.weights": str(file) if file and file.is_file() else "none",
    }
    return load_recipe(f"voc/{method}/vit_tiny", folders | settings)


def _steps_that_fit(recipe: Recipe, setup: Setup, seconds: float) -> int:
    """Number of steps, from the time of a few with loading and all loss terms."""
    dataset = build_dataset(recipe.data, "train")
    trainer = Trainer(recipe, dataset.classes, setup.device)
    batches = iter(train_loader(dataset, recipe))
    for number in range(12):
        if number == 4:  # workers and kernels are warm
            began = time.perf_counter()
        full_step(trainer, next(batches))
        wait(setup.device)
    each = (time.perf_counter() - began) / 8
    return int(min(4000, max(20, 0.75 * seconds / each)))


def _train(recipe: Recipe, folder: RunFolder, setup: Setup, until: float) -> dict:
    """Train and score one recipe; a run that reaches `until` is stopped and not scored."""

    def on_step(row: dict) -> None:
        if time.perf_counter() > until:
            raise _TimeIsUp

    began = time.perf_counter()
    result = {"recipe": recipe.name, "steps": recipe.train.steps, "weights": recipe.model.weights}
    try:
        train(recipe, folder.path, resume=False, on_step=on_step)
        result["finished"] = True
    except _TimeIsUp:
        result["finished"] = False
    with folder.history.open(newline="") as file:
        result["history"] = list(csv.DictReader(file))
    seconds = time.perf_counter() - began
    result |= {"seconds": seconds, "steps_per_second": int(result["history"][-1]["step"]) / seconds}
    if result["finished"]:
        network, recipe = folder.load(setup.device.type)
        scores = evaluate(network, recipe, build_dataset(recipe.data, "val"), device=setup.device)
        result |= {"miou": scores["miou"], "setting": scores["setting"]}
    return result


def short_runs(out: Path, setup: Setup, weights: Path | None, dry_run: bool, until: float) -> Iterator[dict]:
    """Train and score both methods with the same number of steps.

    Args:
        out: folder; the runs lie in `runs/` below it.
        weights: folder with the ViT-Tiny weight file; None: random weights.
        dry_run: toy sizes and four steps.
        until: when to be done (`time.perf_counter()`); a quarter of the time is left for scoring.

    Yields:
        Per run: recipe, steps, finished, history, seconds, steps_per_second and, if finished, miou and
        setting.
    """
    recipes = [_recipe(method, setup, weights, dry_run) for method in METHODS]
    seconds = 0.75 * (until - time.perf_counter()) / len(recipes)
    steps = 4 if dry_run else _steps_that_fit(recipes[-1], setup, seconds)
    for left, method, recipe in zip((2, 1), METHODS, recipes, strict=True):
        recipe = replace(recipe, train=replace(recipe.train, steps=steps, save_every=steps))
        end = time.perf_counter() + 0.85 * (until - time.perf_counter()) / left
        yield _train(recipe, RunFolder(out / "runs" / method), setup, end)
