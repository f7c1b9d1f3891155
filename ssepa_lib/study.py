"""Runs in their places: where a run lies, train and evaluate it once, compare methods over seeds (SS-EPA, Table 3)."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ssepa_lib.datasets import SegmentationDataset, build_dataset
from ssepa_lib.device import resolve_device
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation import evaluate, write_metrics
from ssepa_lib.network import Network
from ssepa_lib.paths import results_root
from ssepa_lib.recipe import Recipe, load_recipe
from ssepa_lib.training import OnStep, is_finished, load_run, train

# mIoU %, VOC 2012: SS-EPA, Table 3
PUBLISHED_TABLE_3 = pd.DataFrame(
    [("toco", 77.3, 71.1, 72.2), ("ssepa_no_affinity", 76.2, 71.3, 71.6),
     ("ssepa_affinity", 79.0, 71.9, 72.7), ("ssepa", 79.5, 72.4, 73.3)],
    columns=["method", "pseudo-label, train", "segmentation, val", "segmentation, test"],
).set_index("method")  # fmt: skip


def run_folder(preset: str, method: str, seed: int = 0, run_name: str = "") -> Path:
    """`<results>/<preset>/<method>[-<run_name>]-seed<seed>`."""
    return results_root() / preset / "-".join(filter(None, (method, run_name, f"seed{seed}")))


def recipe_for(preset: str, method: str, *, steps: int = 0, seed: int = 0, device: str = "auto",
               changes: Mapping[str, Any] | None = None) -> Recipe:  # fmt: skip
    """Recipe `<preset>/<method>` with a seed, a device and, unless 0, another number of steps."""
    overrides: dict[str, Any] = {"train.seed": seed, "train.device": device, **(changes or {})}
    return load_recipe(f"{preset}/{method}", overrides | ({"train.steps": steps} if steps else {}))


def open_run(
    preset: str, method: str, seed: int = 0, run_name: str = "", device: str = "auto"
) -> tuple[Network, Recipe, Path]:
    """A finished run of notebook 03: network, recipe, folder.

    Raises:
        UserError: it is not there; says what to run.
    """
    folder = run_folder(preset, method, seed, run_name)
    if not (folder / "weights.safetensors").is_file():
        command = f"python -m ssepa_lib workbook --preset {preset} --only 03"
        raise UserError(f"there is no finished run in {folder}; run notebook 03_training first with the same preset, "
                        f"seed and run_name ({command}).")  # fmt: skip
    return *load_run(folder, device), folder


def split_of(recipe: Recipe, split: str = "val", images: int = 0) -> SegmentationDataset:
    """A split of a recipe's data: `train` and `val` stand for the recipe's own splits, other names for themselves.

    Args:
        images: the first so many; 0: as many as the recipe says.
    """
    if split == "train":
        return build_dataset(replace(recipe.data, train_images=images or recipe.data.train_images), "train")
    name = recipe.data.val_split if split == "val" else split
    return build_dataset(replace(recipe.data, val_split=name, val_images=images or recipe.data.val_images), "val")


def evaluate_run(folder: Path, split: str = "val", *, images: int = 0, device: str = "auto", **options: Any) -> dict:
    """Evaluate a finished run on a split once; later calls with the same setting read its `metrics.json`.

    Args:
        images: see `split_of`.
        options: for `evaluate` (products, segmentation, cam_scales, …).

    Returns:
        The result of that split, see `evaluate`.
    """
    network, recipe = load_run(folder, device)
    dataset = split_of(recipe, split, images)
    path = folder / "metrics.json"
    known = json.loads(path.read_text()).get(dataset.split) if path.is_file() else None
    key = {"recipe_hash": recipe.hash(), "images": len(dataset), "size": recipe.data.eval_size,
           "cam_scales": options.get("cam_scales", "raw")}  # fmt: skip
    if known and key.items() <= known["setting"].items() and set(options.get("products", ())) <= set(known["miou"]):
        return known
    result = evaluate(network, recipe, dataset, device=resolve_device(device), **options)
    write_metrics(folder, dataset.split, result)
    return result


def _place(recipe: Recipe, preset: str, method: str, run_name: str) -> Path:
    """Where a run of the study lies: the folder of notebook 03 if it holds this very recipe, else one of its own."""
    seed = recipe.train.seed
    main = run_folder(preset, method, seed, run_name)
    return main if is_finished(recipe, main) else results_root() / preset / "study" / f"seed{seed}-{recipe.hash()}"


def run_study(preset: str, methods: Sequence[str], seeds: Sequence[int], *, splits: Mapping[str, dict], steps: int = 0,
              device: str = "auto", run_name: str = "", progress: Callable[[str], OnStep] | None = None,
              ) -> pd.DataFrame:  # fmt: skip
    """Train and evaluate every method with every seed; what is there already is read, what was cut short goes on.

    Runs are kept by recipe hash, so methods that are the same recipe share one run.

    Args:
        splits: split → options of `evaluate_run` (images, products, …).
        progress: makes the `on_step` callback of a training from its label.

    Returns:
        One row per method, seed and split: method, seed, split, images, run and one mIoU column (percent) per product.
    """
    rows = []
    for seed in seeds:
        for method in methods:
            recipe = recipe_for(preset, method, steps=steps, seed=seed, device=device)
            folder = _place(recipe, preset, method, run_name)
            train(recipe, folder, on_step=progress(f"{method}, seed {seed}") if progress else None)
            for split, options in splits.items():
                result = evaluate_run(folder, split, device=device, **options)
                rows.append({"method": method, "seed": seed, "split": split, "images": result["setting"]["images"],
                             "run": folder.name, **result["miou"]})  # fmt: skip
    return pd.DataFrame(rows)


def compare(table: pd.DataFrame, split: str, product: str, baseline: str) -> pd.DataFrame:
    """Mean and sd over seeds of one product on one split, and the same of the difference to the baseline, seed by seed.

    Args:
        table: from `run_study`.

    Returns:
        Index method; columns mean, sd, difference, difference_sd (percentage points), seeds. Sd is NaN for one seed.
    """
    values = table[table["split"] == split].pivot(index="seed", columns="method", values=product).astype(float)
    difference = values.sub(values[baseline], axis=0)
    result = pd.DataFrame({"mean": values.mean(), "sd": values.std(), "difference": difference.mean(),
                           "difference_sd": difference.std(), "seeds": values.count()})  # fmt: skip
    return result.reindex(list(dict.fromkeys(table["method"])))


class LayerWeights(nn.Module):
    """Stands in for HAAF with weights fixed by hand, [K], the same for every image."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, descriptor: Tensor) -> Tensor:
        return self.weights.expand_as(descriptor)


def refined_miou(network: Network, recipe: Recipe, dataset: SegmentationDataset, device: torch.device | str,
                 weights: Tensor | None = None, **affinity: Any) -> float:  # fmt: skip
    """mIoU (percent) of the refined CAM of a trained network under another affinity, without training again.

    Args:
        weights: fixed layer weights [K]; None: uniform, or the trained HAAF with `kind="haaf"`.
        affinity: fields of `AffinityConfig` to change (kind, source, steps, …).
    """
    config = replace(recipe.affinity, **{"kind": "mean", "supervision": "none"} | affinity)
    before = network.affinity_config, network.haaf
    network.affinity_config = config
    if config.kind == "mean":
        network.haaf = None if weights is None else LayerWeights(weights).to(device)
    try:
        result = evaluate(network, replace(recipe, affinity=config), dataset, device=device, products=("refined_cam",))
    finally:
        network.affinity_config, network.haaf = before
    return result["miou"]["refined_cam"]


def single_layers(
    network: Network, recipe: Recipe, dataset: SegmentationDataset, device: torch.device | str
) -> pd.Series:
    """mIoU (percent) of the CAM refined by one layer at a time, index layer."""
    depth = network.backbone.depth
    weights = depth * torch.eye(depth)
    return pd.Series({k: refined_miou(network, recipe, dataset, device, weights[k]) for k in range(depth)}, name="mIoU")
