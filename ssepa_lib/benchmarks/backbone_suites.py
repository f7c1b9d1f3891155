"""Suite over backbones: what ViT, Swin and EfficientFormer cost, what the affinity adds, how both grow."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from ssepa_lib.benchmarks.measure import (
    MB,
    Row,
    count_flops,
    full_step,
    interleaved,
    make_row,
    step_bytes,
    time_row,
)
from ssepa_lib.benchmarks.setup import Setup
from ssepa_lib.compose import load_recipe
from ssepa_lib.data import build_dataset, train_loader
from ssepa_lib.files import write_csv
from ssepa_lib.model.backbone import build_backbone
from ssepa_lib.recipe import ModelConfig, Recipe
from ssepa_lib.training import Trainer
from ssepa_lib.workbook.ablations import MICRO

METHODS = {"affinity": "ssepa_plus", "none": "toco"}
GROWING = {  # of about the same size
    "ViT-S": "vit_small_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "EfficientFormer-L3": "efficientformer_l3",
}
SIDES = (224, 336, 448, 672, 896, 1024)


def backbones(setup: Setup) -> Iterator[Row]:
    """The micro backbones of the built-in data, and the growth of cost with the side of an image."""
    for name, suffix in MICRO.items():
        yield from _micro(setup, name, suffix)
    yield from _growth(setup)


def _recipe(setup: Setup, method: str, suffix: str) -> Recipe:
    settings = {"model.weights": "none", "data.batch": 2 if setup.quick else 4, "train.steps": 2}
    return load_recipe(f"shapes/{method}{suffix}", {**settings, "train.device": setup.device.type})


def _micro(setup: Setup, name: str, suffix: str) -> Iterator[Row]:
    """Parameters, FLOP, and time and memory of a step with and without the affinity."""
    recipes = {kind: _recipe(setup, method, suffix) for kind, method in METHODS.items()}
    dataset = build_dataset(recipes["none"].data, "train")
    batch = next(iter(train_loader(dataset, recipes["none"]))).to(setup.device)
    trainers = {kind: Trainer(recipe, dataset.classes, setup.device) for kind, recipe in recipes.items()}
    backbone, side = trainers["none"].network.backbone, recipes["none"].data.crop
    setting = f"micro {name}, {side}², batch {len(batch.image)}"
    count = sum(p.numel() for p in backbone.parameters())
    yield make_row("backbones", "parameters", setting, "M", count / 1e6)
    image = batch.image[:1].float()
    with torch.no_grad():
        flops = count_flops(partial(backbone, image))
    yield make_row("backbones", "forward pass of an image", setting, "GFLOP", flops / 1e9)
    steps = {kind: partial(full_step, trainer, batch) for kind, trainer in trainers.items()}
    seconds = interleaved(steps, setup)
    yield time_row(
        "backbones", "step time, affinity", setting, seconds["affinity"], seconds["none"], gain=False
    )
    peaks = {kind: step_bytes(trainer, batch) / MB for kind, trainer in trainers.items()}
    yield make_row(
        "backbones",
        "peak memory of a step, affinity",
        setting,
        "MB",
        peaks["affinity"],
        peaks["none"],
        gain=False,
        target=setup.target("≤ 1.02"),
    )


def _growth(setup: Setup) -> Iterator[Row]:
    """Cost of a forward pass by formula at all sides, counted and timed at the smaller ones."""
    for name, model in GROWING.items():
        backbone = build_backbone(ModelConfig(backbone=model, weights="none")).to(setup.device).eval()
        for side in SIDES:
            setting, at = f"{side}²", {"side": side, "batch": 1, "depth": backbone.depth}
            forward = partial(backbone, torch.zeros(1, 3, side, side, device=setup.device))
            measured = side <= (SIDES[0] if setup.quick else 448)
            with torch.no_grad():
                counted = count_flops(forward) if measured else None
                seconds = interleaved({"forward": forward}, setup)["forward"] if measured else []
            parts = {"forward pass": backbone.flops, "attention": backbone.attention_flops}
            for what, formula in parts.items():
                value = formula(side, side) / 1e9
                flops = counted if what == "forward pass" else None
                more = {"at": at, "flops": flops, "note": "by formula"}
                yield make_row("backbones", f"{name}, {what}", setting, "GFLOP", value, **more)
            if seconds:
                yield time_row("backbones", f"{name}, forward time", setting, seconds, at=at)


def growth_table(rows: list[Row]) -> pd.DataFrame:
    """The rows on growth as a table: backbone, side, GFLOP of the blocks and of the attention, GFLOP counted
    (blocks, patch embedding and merging), and milliseconds; NaN where not measured."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    names = {"forward pass": "gflop", "attention": "attention_gflop", "forward time": "ms"}
    for row in rows:
        if row.at:
            backbone, what = row.name.rsplit(", ", 1)
            entry = found.setdefault((backbone, row.at["side"]), {})
            entry[names[what]] = row.value
            if row.flops:
                entry["counted_gflop"] = row.flops / 1e9
    columns = ["gflop", "attention_gflop", "counted_gflop", "ms"]
    index = pd.MultiIndex.from_tuples(found, names=["backbone", "side"])
    return pd.DataFrame(list(found.values()), index=index).reindex(columns=columns).reset_index()


def write_growth(rows: list[Row], out: Path) -> None:
    """`growth.csv` and the figure `growth.png` in a folder."""
    from ssepa_lib.workbook.figures import save_figure, use_style
    from ssepa_lib.workbook.figures.curves import plot_cost_growth

    table = growth_table(rows)
    write_csv(out / "growth.csv", list(table.columns), table.astype(object).where(table.notna(), "").values)
    use_style()
    save_figure(plot_cost_growth(table).figure, out / "growth.png")
