"""Runs in their places: where a run lies, train and evaluate it once, compare methods over seeds (SS-EPA, Table 3)."""

import itertools
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssepa_lib.data.datasets import SegmentationDataset, build_dataset
from ssepa_lib.data.views import eval_batches, train_loader
from ssepa_lib.device import autocast, describe_device, resolve_device
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.analysis import (
    affinity_map_bytes,
    attention_statistics,
    peak_memory,
    saved_activation_bytes,
)
from ssepa_lib.evaluation.evaluate import (
    PRODUCTS,
    ThresholdConfusion,
    cam_view,
    evaluate,
    is_current,
    product_names,
    read_metrics,
    require_masks,
    strongest,
    write_metrics,
)
from ssepa_lib.labels.cam import multi_scale_cam
from ssepa_lib.labels.par import PixelAdaptiveRefinement
from ssepa_lib.methods.objectives import HaafSupervision, Step
from ssepa_lib.model.affinity import HAAF, PatchAffinity
from ssepa_lib.model.backbone import BackboneOutput
from ssepa_lib.model.network import Network, evaluating
from ssepa_lib.paths import results_root
from ssepa_lib.recipe import Recipe, load_recipe
from ssepa_lib.training.trainer import OnStep, is_finished, learning_rate_factor, load_run, train


def environment(device: torch.device | str) -> str:
    """Versions and device in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "numpy"))
    return f"Python {platform.python_version()}, {packages}; {describe_device(resolve_device(str(device)))}"


def preset_folder(preset: str) -> Path:
    """`<results>/<preset>`, with the folders `figures` and `tables` made in it."""
    folder = results_root() / preset
    for name in ("figures", "tables"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return folder


def run_folder(preset: str, method: str, seed: int = 0, run_name: str = "") -> Path:
    """`<results>/<preset>/<method>[-<run_name>]-seed<seed>`."""
    return results_root() / preset / "-".join(filter(None, (method, run_name, f"seed{seed}")))


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
    """Network and recipe of a finished run of notebook 03.

    Args:
        steps: length that the run must have; 0: any.

    Raises:
        UserError: it is not there; says what to run.
    """
    folder = run_folder(preset, method, seed, run_name)
    wanted = {"methods": method, "seed": seed, "run_name": run_name, "steps": steps}
    options = "".join(f" -p {name}={value}" for name, value in wanted.items() if value or name == "seed")
    command = (
        f"run notebook 03_training first (python -m ssepa_lib workbook --preset {preset} --only 03{options})"
    )
    if not (folder / "weights.safetensors").is_file():
        raise UserError(f"there is no finished run in {folder}; {command}.")
    network, recipe = load_run(folder, device)
    if steps and steps != recipe.train.steps:
        found = recipe.train.steps
        raise UserError(
            f"{folder} holds a run of {found} steps, not {steps}; set steps={found} or another run_name."
        )
    return network, recipe


def split_of(recipe: Recipe, split: str = "val", images: int = 0) -> SegmentationDataset:
    """A split of a recipe's data: `train` and `val` stand for the recipe's own splits, other names for themselves.

    Args:
        images: the first so many; 0: as many as the recipe says.
    """
    if split == "train":
        return build_dataset(replace(recipe.data, train_images=images or recipe.data.train_images), "train")
    name = recipe.data.val_split if split == "val" else split
    return build_dataset(
        replace(recipe.data, val_split=name, val_images=images or recipe.data.val_images), "val"
    )


def measured_split(recipe: Recipe, split: str = "val", images: int = 0) -> SegmentationDataset:
    """`split_of` with `data.measured_train` for `train`: what is trained on can be more than what is measured on."""
    if split == "train" and recipe.data.measured_train:
        recipe = replace(recipe, data=replace(recipe.data, train_split=recipe.data.measured_train))
    return split_of(recipe, split, images)


def evaluate_run(
    folder: Path, split: str = "val", *, images: int = 0, device: str = "auto", **options: Any
) -> dict:
    """Evaluate a finished run on a split once; later calls with the same setting read its `metrics.json`.

    What the file already holds of the same setting is kept: asking for more computes only what is missing. Another
    number of images than the recipe's is a result of its own, stored as for example `val (10 images)`.

    Args:
        split, images: see `measured_split`.
        options: for `evaluate` (products, inference, …).

    Returns:
        The result of that split, see `evaluate`.
    """
    network, recipe = load_run(folder, device)
    dataset = measured_split(recipe, split, images)
    whole = not images or len(dataset) == len(measured_split(recipe, split))
    name = dataset.split if whole else f"{dataset.split} ({len(dataset)} images)"
    known = read_metrics(folder).get(name)
    if known and not is_current(known["setting"], recipe, len(dataset)):
        known = None
    products, inference = options.pop("products", PRODUCTS), options.pop("inference", ("raw",))
    there = set(known["miou"]) if known else set()
    missing = [way for way in inference if not there.issuperset(product_names(products, (way,)))]
    if known and not missing:
        return known
    result = evaluate(
        network,
        recipe,
        dataset,
        device=resolve_device(device),
        products=products,
        inference=missing,
        **options,
    )
    if known:
        for part in ("miou", "per_class", "threshold_curve"):
            result[part] = known[part] | result[part]
        result["setting"]["products"] = known["setting"]["products"] | result["setting"]["products"]
    write_metrics(folder, name, result)
    return result


def _place(recipe: Recipe, folder: Path) -> Path:
    """`folder`, unless a finished run beside it is of the same recipe."""
    beside = sorted(folder.parent.glob("*/")) if folder.parent.is_dir() else []
    return next((f for f in (folder, *beside) if is_finished(recipe, f)), folder)


def run_study(
    preset: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    splits: Mapping[str, dict],
    steps: int = 0,
    device: str = "auto",
    run_name: str = "",
    arms: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[str], OnStep] | None = None,
) -> pd.DataFrame:
    """Train and evaluate every method and arm with every seed; what is there is read, what was cut short goes on.

    The same recipe is never trained twice, whatever names it goes by: a finished run of its hash is taken.

    Args:
        splits: split → options of `evaluate_run` (images, products, …).
        arms: name → recipe overrides; None: every method as it is.
        progress: makes the `on_step` callback of a training from its label.

    Returns:
        One row per method, arm, seed and split, in the columns of `tables.collect_runs`; `variant` is the arm.
    """
    rows = []
    for seed, method, (arm, changes) in itertools.product(seeds, methods, (arms or {"": {}}).items()):
        variant = "-".join(filter(None, (run_name, arm.replace(" ", "-"))))
        recipe = recipe_for(preset, method, steps=steps, seed=seed, device=device, changes=changes)
        folder = _place(recipe, run_folder(preset, method, seed, variant))
        train(recipe, folder, on_step=progress(folder.name) if progress else None)
        for split, options in splits.items():
            result = evaluate_run(folder, split, device=device, **options)
            setting = result["setting"] | {"method": method}
            plain = {name: value for name, value in setting.items() if name != "products"}
            row = {
                "run": folder.name,
                "preset": preset,
                "variant": arm or run_name,
                **plain,
                **result["miou"],
            }
            row["mean_average_precision"] = result["mean_average_precision"]
            rows.append(row | {"settings": setting})
    return pd.DataFrame(rows)


class LayerWeights(nn.Module):
    """Stands in for HAAF with weights fixed by hand, [K], the same for every image."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, descriptor: Tensor) -> Tensor:
        return self.weights.expand_as(descriptor)


@contextmanager
def other_affinity(
    network: Network, recipe: Recipe, weights: Tensor | nn.Module | None = None, **changes: Any
) -> Iterator[tuple[Network, Recipe]]:
    """A trained network under another affinity for a while: by default the uniform mean of all layers.

    Args:
        weights: fixed layer weights [K], or a HAAF; None: uniform, or the network's own HAAF with `kind="haaf"`.
        changes: fields of `AffinityConfig` (kind, source, steps, …).
    """
    config = replace(recipe.affinity, **{"kind": "mean", "supervision": "none"} | changes)
    before = network.affinity_config, network.haaf
    network.affinity_config = config
    if isinstance(weights, Tensor):
        weights = LayerWeights(weights).to(network.classifier.weight.device)
    if weights is not None or config.kind != "haaf":
        network.haaf = weights
    try:
        yield network, replace(recipe, affinity=config)
    finally:
        network.affinity_config, network.haaf = before


@torch.no_grad()
def refined_mious(
    network: Network, recipe: Recipe, dataset: SegmentationDataset, variants: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """mIoU (percent) of the CAM at scale 1 under several affinities, from one pass over the data set.

    Args:
        variants: name → arguments of `other_affinity`; `kind="none"` leaves the CAM as it is.
    """
    device = network.classifier.weight.device
    cam = cam_view(recipe.cam, "raw")
    curves = {name: ThresholdConfusion(dataset.classes, [cam.background], device) for name in variants}
    batches = eval_batches(dataset, recipe.data.eval_size, recipe.eval.batch, recipe.data.workers)
    with evaluating(network):
        for ids, images, labels, masks in batches:
            require_masks(ids, masks, dataset)
            images, labels = images.to(device), labels.to(device)
            with autocast(recipe.train.precision, device):
                output = network(images, segment=False, affinity=True)
                tokens = output.affinity
                for name, variant in variants.items():
                    with other_affinity(network, recipe, **variant) as (changed, other):
                        output.affinity = changed.patch_affinity(tokens.queries, tokens.keys, tokens.prefix)
                        refined = other.affinity.kind != "none"
                        maps = multi_scale_cam(
                            changed, images, labels, cam, affinity=refined, first=output
                        ).best
                    for scores, label, mask in zip(maps, labels, masks, strict=True):
                        mask = mask.to(device)
                        curves[name].update(*strongest(scores, label.nonzero().flatten(), mask.shape), mask)
    return {name: curve.at(cam.background).miou for name, curve in curves.items()}


def refined_miou(network: Network, recipe: Recipe, dataset: SegmentationDataset, **affinity: Any) -> float:
    """`refined_mious` of a single affinity."""
    return refined_mious(network, recipe, dataset, {"": affinity})[""]


def layers_alone(depth: int) -> dict[str, dict[str, Tensor]]:
    """Arguments of `other_affinity` that use one layer only, by name."""
    return {f"layer {k} alone": {"weights": row} for k, row in enumerate(depth * torch.eye(depth))}


def single_layers(network: Network, recipe: Recipe, dataset: SegmentationDataset) -> pd.Series:
    """mIoU (percent) of the CAM refined by one layer at a time, index layer."""
    found = refined_mious(network, recipe, dataset, layers_alone(network.backbone.depth))
    return pd.Series(list(found.values()), name="mIoU")


def train_haaf(
    network: Network,
    recipe: Recipe,
    variants: Mapping[str, Mapping[str, Any]],
    *,
    steps: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, HAAF]:
    """HAAF alone on a trained network that stays as it is, once per variant; all variants see the same batches.

    Args:
        variants: name → fields of `AffinityConfig` (supervision, source, descriptor, …).
        steps: updates; the learning rate falls as in a training of this length.

    Returns:
        Name → trained HAAF.
    """
    device, depth = network.classifier.weight.device, network.backbone.depth
    recipe = replace(
        recipe, train=replace(recipe.train, steps=steps), losses=replace(recipe.losses, switch=0.0)
    )
    par = PixelAdaptiveRefinement(recipe.cam.par_dilations, recipe.cam.par_iterations).to(device)
    torch.manual_seed(recipe.train.seed)
    found, updates = {}, {}
    for name, changes in variants.items():
        config = replace(recipe.affinity, kind="haaf", **changes)
        found[name] = HAAF(depth, config.hidden).to(device)
        optimizer = torch.optim.AdamW(found[name].parameters(), config.haaf_lr)
        curve = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(recipe, step))
        updates[name] = optimizer, curve
    with evaluating(network):
        for index, batch in enumerate(train_loader(build_dataset(recipe.data, "train"), recipe)):
            with other_affinity(network, recipe) as (plain, uniform):
                shared = Step(
                    plain, uniform, batch.to(device), index, par, torch.Generator().manual_seed(index)
                )
                with torch.no_grad(), autocast(recipe.train.precision, device):
                    tokens = shared.out.affinity
            for name, changes in variants.items():
                with other_affinity(network, recipe, found[name], kind="haaf", **changes) as (changed, other):
                    shared.out.affinity = changed.patch_affinity(tokens.queries, tokens.keys, tokens.prefix)
                    with autocast(recipe.train.precision, device):
                        loss = HaafSupervision(other)(shared)["haaf"]
                optimizer, curve = updates[name]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.step()
            if progress:
                progress(index + 1, steps)
    return found


def compare_supervisions(
    network: Network,
    recipe: Recipe,
    variants: Mapping[str, Mapping[str, Any]],
    datasets: Sequence[SegmentationDataset],
    *,
    steps: int,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """What each way to train HAAF is worth on a trained network, beside every single layer and their uniform mean.

    Args:
        variants, steps: see `train_haaf`.
        datasets: splits to measure on.
        progress: called with (done, all) while HAAF is trained.

    Returns:
        One row per affinity; columns: `affinity`, mIoU of its map in percent per split, and the layers' weights
        `layer 0` … (for HAAF the mean over the first images of the first split).
    """
    depth = network.backbone.depth
    found = train_haaf(network, recipe, variants, steps=steps, progress=progress)
    learned = {
        f"HAAF, {name}": {"kind": "haaf", "weights": found[name], **variants[name]} for name in variants
    }
    rows = {
        "no affinity": {"kind": "none"},
        "uniform mean": {"weights": torch.ones(depth)},
        **layers_alone(depth),
    }
    rows |= learned
    scores = {d.split: refined_mious(network, recipe, d, rows) for d in datasets}
    shown = samples(datasets[0], range(min(32, len(datasets[0]))), recipe.data.crop)[0]
    weights = {}
    for name, affinity in rows.items():
        with torch.no_grad(), other_affinity(network, recipe, **affinity):
            output = network(shown.to(network.classifier.weight.device), segment=False, affinity=True)
            weights[name] = output.affinity.weights.mean(0).tolist()
    weights["no affinity"] = [float("nan")] * depth
    columns = [f"layer {k}" for k in range(depth)]
    return pd.DataFrame(
        [
            {"affinity": name}
            | {split: mious[name] for split, mious in scores.items()}
            | dict(zip(columns, weights[name], strict=True))
            for name in rows
        ]
    )


def attention_of(network: Network, recipe: Recipe, dataset: SegmentationDataset) -> pd.DataFrame:
    """`analysis.attention_statistics` over a data set at the recipe's evaluation size."""
    batches = eval_batches(dataset, recipe.data.eval_size, recipe.eval.batch, recipe.data.workers)
    return attention_statistics(network, (batch[1] for batch in batches), network.classifier.weight.device)


def samples(
    dataset: SegmentationDataset, indices: Sequence[int], side: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Some images to look at: pictures [n, 3, side, side] in 0..255, labels [n, C], masks uint8 [side, side]."""
    items = [dataset[i] for i in indices]
    pictures = [F.interpolate(item.image[None].float(), (side, side), mode="bilinear") for item in items]
    masks = [F.interpolate(item.mask[None, None].float(), (side, side))[0, 0].byte() for item in items]
    return torch.cat(pictures), torch.stack([item.label for item in items]), masks


def affinity_memory(tokens: BackboneOutput, cam: Tensor, strategy: str) -> dict[str, float]:
    """Memory of applying the affinity of captured tokens to maps [B, N, C], in MB of 10⁶ bytes.

    Returns:
        `stacked maps, MB` (formula), `peak, MB` (without gradient, as in training) and `kept for gradient, MB` (what
        autograd would save if a gradient passed through the maps).
    """
    heads, device = tokens.queries[0].shape[1], cam.device
    maps = affinity_map_bytes(len(cam), cam.shape[1] + tokens.prefix, len(tokens.queries), heads, strategy)

    def apply(gradient: bool) -> Tensor:
        queries, keys = (
            [t.detach().requires_grad_(gradient) for t in side] for side in (tokens.queries, tokens.keys)
        )
        return PatchAffinity(queries, keys, tokens.prefix, strategy=strategy) @ cam

    peak, kept = peak_memory(lambda: apply(False), device), saved_activation_bytes(lambda: apply(True))
    return {"stacked maps, MB": maps / 1e6, "peak, MB": peak / 1e6, "kept for gradient, MB": kept / 1e6}
