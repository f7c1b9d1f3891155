"""What the layers attend to, how HAAF weighs them, and what each layer is worth."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from ssepa_lib.workbook.figures.images import Array, to_numpy
from ssepa_lib.workbook.figures.style import BESIDE, own_axes

STATISTICS = {
    "entropy": "attention entropy, nats",
    "distance": "attention distance, pixels",
    "class_mass": "attention of patches to the class token",
}
LAYER = "layer (0 = first)"


def plot_layer_weights(
    weights: Mapping[str, Array],
    miou: pd.Series | None = None,
    uniform: float | None = None,
    axes: Sequence[Axes] | None = None,
) -> Sequence[Axes]:
    """HAAF's weight v' of every layer, and how good each layer is alone.

    Args:
        weights: run → weights [K] or, per image, [n, K] (the band is their standard deviation).
        miou: mIoU in percent of the CAM refined by one layer at a time, index layer from 0.
        uniform: mIoU of the uniform mean of all layers.

    Returns:
        The axes used, one above the other.
    """
    count = 1 if miou is None else 2
    if axes is None:
        axes = plt.subplots(count, 1, figsize=(6.4, 2.4 * count + 0.4), sharex=True, squeeze=False)[1][:, 0]
    styles = ["-o", "-s", "-^", "-D", "-v"] * len(weights)
    for (name, values), style in zip(weights.items(), styles, strict=False):
        values = np.atleast_2d(to_numpy(values))  # [n, K]
        layers, mean, sd = np.arange(values.shape[1]), values.mean(0), values.std(0)
        (line,) = axes[0].plot(layers, mean, style, label=name, markersize=5)
        axes[0].fill_between(layers, mean - sd, mean + sd, color=line.get_color(), alpha=0.2, linewidth=0)
    axes[0].axhline(1, color="0.4", linestyle=":", label="uniform (all layers alike)")
    axes[0].set(ylabel="layer weight v'", xticks=layers, ylim=(0, None))
    banded = any(np.ndim(w) == 2 and len(w) > 1 for w in weights.values())
    axes[0].legend(**BESIDE, title="band: ± sd over images" if banded else None)
    if miou is not None:
        axes[1].bar(miou.index, miou, color="0.65", label="this layer alone")
        if uniform is not None:
            axes[1].axhline(uniform, color="0.4", linestyle=":", label="uniform mean of all layers")
        axes[1].set(ylabel="mIoU of refined CAM, %")
        axes[1].legend(**BESIDE)
    axes[-1].set_xlabel(LAYER)
    return axes


def plot_haaf_objectives(table: pd.DataFrame, split: str) -> Sequence[Axes]:
    """How each HAAF objective weighs the layers and what it is worth, beside every layer alone.

    Args:
        table: result of `haaf_study.compare_haaf_objectives`.
        split: the column of mIoU to show.

    Returns:
        Axes of the single layers (above), the weights, and the scores (right).
    """
    layers = [column for column in table if column.startswith("layer ")]
    miou = table.set_index("affinity")[split]
    alone = miou[[f"{name} alone" for name in layers]].to_numpy()
    uniform = miou["uniform mean"]
    learned = table[table["affinity"].str.startswith("HAAF")].sort_values(split, ascending=False)
    height = 0.32 * len(learned)
    _, ((top, corner), (heat, right)) = plt.subplots(
        2,
        2,
        figsize=(9, height + 2.6),
        width_ratios=(3, 1.2),
        height_ratios=(1.5, height),
        sharex="col",
        sharey="row",
    )
    corner.remove()
    at = np.arange(len(layers)) + 0.5
    top.bar(at, alone, color="0.65")
    top.axhline(uniform, color="C0", linestyle="--")
    top.set(ylabel="mIoU, %", title=f"refined CAM, {split}: one layer alone")
    _plot_weight_table(learned, layers, heat)
    heat.set_xticks(at, range(len(layers)))
    bars = right.barh(np.arange(len(learned)) + 0.5, learned[split], color="0.65", height=0.7)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # keeps lines out of the numbers
    right.bar_label(bars, fmt="%.1f", padding=3, fontsize="x-small", bbox=paper)
    right.axvline(uniform, color="C0", linestyle="--", label="uniform mean")
    right.axvline(alone.max(), color="C1", label="best single layer")
    low = min(miou.min(), learned[split].min())
    right.set(xlabel=f"mIoU on {split}, %", xlim=(max(0, low - 2), None))
    right.margins(x=0.15)
    right.tick_params(labelleft=False)
    right.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize="small")
    return [top, heat, right]


def mark_references(tables: Mapping[Axes, pd.Series]) -> None:
    """Lines on horizontal bars: a map without affinity, with all layers alike, with the best layer alone.

    Args:
        tables: axes → mIoU by the names of `haaf_study.compare_haaf_objectives`.
    """
    for ax, miou in tables.items():
        alone = miou[miou.index.str.endswith("alone")].max()
        lines = {
            "no affinity": (miou["no affinity"], ":", "black"),
            "uniform mean": (miou["uniform mean"], "--", "C3"),
        }
        for name, (value, style, colour) in (lines | {"best single layer": (alone, "-", "C1")}).items():
            ax.axvline(value, linestyle=style, color=colour, linewidth=1.5, label=name)
    last = list(tables)[-1]
    last.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")


def _plot_weight_table(learned: pd.DataFrame, layers: list[str], ax: Axes) -> None:
    """One row per objective, one column per layer, the weight written in each cell."""
    sns.heatmap(
        learned[layers].to_numpy(),
        ax=ax,
        cmap="Blues",
        annot=True,
        fmt=".1f",
        cbar=False,
        linewidths=0.5,
        yticklabels=[name.removeprefix("HAAF, ") for name in learned["affinity"]],
        annot_kws={"size": "x-small"},
    )
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel=LAYER, ylabel="HAAF trained by")
    ax.set_title("weights v' (mean 1)", fontsize="small")


def plot_attention_strip(
    statistics: Mapping[str, pd.DataFrame], value: str = "entropy", ax: Axes | None = None
) -> Axes:
    """One dot per head against depth, one colour per run; lines join the means over heads (FSR, entropy
    analysis).

    Args:
        statistics: run → table of `attention_statistics`.
        value: `entropy`, `distance` or `class_mass`.
    """
    ax = own_axes(ax, (8, 3.8))
    table = pd.concat([t.assign(run=run) for run, t in statistics.items()], ignore_index=True)
    dodge = len(statistics) > 1
    colours = sns.color_palette(n_colors=len(statistics))
    dots = {"jitter": 0.08, "size": 4, "alpha": 0.7}
    sns.stripplot(table, x="layer", y=value, hue="run", dodge=dodge, palette=colours, ax=ax, **dots)
    for i, t in enumerate(statistics.values()):
        mean = t.groupby("layer")[value].mean()
        shift = 0.8 * ((i + 0.5) / len(statistics) - 0.5) if dodge else 0
        ax.plot(mean.index + shift, mean, color=colours[i], linewidth=1.2, alpha=0.8)
    ax.set(xlabel=LAYER, ylabel=STATISTICS[value])
    sns.move_legend(ax, **BESIDE, title="dot: one head\nline: mean of heads")
    return ax
