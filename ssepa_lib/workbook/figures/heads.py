"""Every head of every layer: where one patch looks, and how widely."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ssepa_lib.workbook.figures.images import Array, plot_affinity_row, to_numpy
from ssepa_lib.workbook.figures.style import BESIDE, CLASS_COLOURS


def head_colours(heads: int) -> list:
    """One colour per head, the same in every figure."""
    few = heads <= len(CLASS_COLOURS)
    return sns.color_palette(CLASS_COLOURS[:heads] if few else "husl", heads)


def plot_head_atlas(
    image: Array,
    rows: Array,
    statistics: pd.DataFrame,
    patch: int,
    grid: tuple[int, int],
    limit: float,
) -> Axes:
    """Where one patch looks, a column per layer and a line per head; below, the entropy of every head.

    Args:
        image: [3, S, S], 0..255.
        rows: attention of the patch, [K, H, N]; every panel has a scale of its own.
        statistics: table of `attention_statistics`: layer, head, entropy.
        patch: which one; it is framed.
        limit: ln T, the entropy of attention that is spread over all tokens.

    Returns:
        Axes of the entropies.
    """
    rows = to_numpy(rows)
    layers, heads = rows.shape[:2]
    side = 10.5 / max(layers, 6)
    figure = plt.figure(figsize=(12, heads * side + 2.8))
    area = figure.add_gridspec(heads + 1, layers, height_ratios=[side] * heads + [2.4])
    colours = head_colours(heads)
    for h in range(heads):
        for k in range(layers):
            ax = figure.add_subplot(area[h, k])
            plot_affinity_row(image, rows[k, h], patch, grid, ax, f"layer {k}" if h == 0 else "")
            for spine in ax.spines.values():
                spine.set(visible=True, color=colours[h], linewidth=2.5)
            if k == 0:
                ax.set_ylabel(f"head {h}", color=colours[h])
    return _plot_entropies(statistics, colours, limit, figure.add_subplot(area[heads, :]))


def _plot_entropies(statistics: pd.DataFrame, colours: list, limit: float, ax: Axes) -> Axes:
    """One dot per head in its colour, against the layer, below the columns of the atlas."""
    for h, table in statistics.groupby("head"):
        shift = 0.5 * ((h + 0.5) / len(colours) - 0.5)
        ax.plot(table["layer"] + shift, table["entropy"], "o", color=colours[int(h)], markersize=6)
    ax.axhline(limit, color="black", linestyle="--", linewidth=1)
    layers = int(statistics["layer"].max()) + 1
    ax.set(xlim=(-0.5, layers - 0.5), ylim=(0, 1.12 * limit), ylabel="entropy, nats")
    ax.set_xlabel("layer (0 = first); dashed: ln T, all keys alike")
    ax.set_xticks(range(layers))
    return ax


def plot_number_against_miou(table: pd.DataFrame, numbers: Mapping[str, str]) -> np.ndarray:
    """What a layer alone is worth against several numbers about it: one panel per number, one dot per layer.

    Args:
        table: one row per layer; the column `mIoU` and those of `numbers`.
        numbers: column → label of its axis.

    Returns:
        axes [numbers].
    """
    size = (2.9 * len(numbers), 3)
    axes = plt.subplots(1, len(numbers), figsize=size, sharey=True, squeeze=False)[1][0]
    for ax, (column, label) in zip(axes, numbers.items(), strict=True):
        ax.plot(table[column], table["mIoU"], "o", color="C0")
        for layer, (x, y) in enumerate(zip(table[column], table["mIoU"], strict=True)):
            ax.annotate(str(layer), (x, y), xytext=(4, 4), textcoords="offset points", fontsize="small")
        ax.set_xlabel(label)
        ax.margins(0.15)
    axes[0].set_ylabel("mIoU of the layer alone, %")
    return axes


def plot_head_average(table: pd.DataFrame, heads: int) -> np.ndarray:
    """What is lost and won by averaging the heads of a layer: their similarity, and how far noise moves a
    map.

    Args:
        table: from `attention_study.head_average`.
        heads: H; the dotted line is what averaging H equal heads would leave of a single head's change.

    Returns:
        axes: the similarity, and the relative changes.
    """
    axes = plt.subplots(1, 2, figsize=(10.5, 3.2))[1]
    axes[0].plot(table["layer"], table["similarity"], "o-", color="C0")
    axes[0].set(ylabel="cosine similarity of two heads", ylim=(0, 1.05))
    lines = {"single_head": "one head alone", "mean_all_noisy": "mean, noise in all heads"}
    lines |= {"mean_one_noisy": "mean, noise in one head"}
    for i, (column, label) in enumerate(lines.items()):
        axes[1].plot(table["layer"], 100 * table[column], "o-", color=f"C{i}", label=label)
    bound = 100 * table["single_head"] / heads**0.5
    axes[1].plot(table["layer"], bound, ":", color="black", label="one head alone / √H")
    axes[1].set(ylabel="change of the refined map, %", ylim=(0, None))
    axes[1].legend(**BESIDE)
    for ax in axes:
        ax.set_xlabel("layer (0 = first)")
    return axes


def plot_claim(deep: pd.DataFrame, runs: Mapping[str, str]) -> np.ndarray:
    """Deep layers of several runs, seed by seed: a line joins the runs of one seed.

    Args:
        deep: columns run, seed, entropy, entropy_spread.
        runs: name in the table → label, in the order of the axis.

    Returns:
        axes: the entropy, and its spread between the heads.
    """
    axes = plt.subplots(1, 2, figsize=(9.5, 3.2))[1]
    titles = {"entropy": "entropy, nats", "entropy_spread": "spread between heads, nats"}
    seeds = sorted(deep["seed"].unique())
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        for i, seed in enumerate(seeds):
            of_seed = deep[deep["seed"] == seed].set_index("run")[column].reindex(list(runs))
            ax.plot(range(len(runs)), of_seed, "o-", color=f"C{i}")
        ax.set_xticks(range(len(runs)), list(runs.values()))
        ax.margins(x=0.15)
        ax.set_ylabel(title)
    entries = [Line2D([], [], color=f"C{i}", marker="o", label=f"seed {s}") for i, s in enumerate(seeds)]
    axes[1].legend(handles=entries, **BESIDE)
    return axes
