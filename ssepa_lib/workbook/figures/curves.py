"""Curves: losses over steps, mIoU over thresholds, cost over size."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from ssepa_lib.evaluation import OUTPUTS, heading
from ssepa_lib.training.history import history_rows
from ssepa_lib.workbook.figures.style import BESIDE, own_axes

SCORED = ("toco", "ssepa", "ssepa_plus", "fsr+ssepa_plus", "mcc", "afa", "fsr")  # one colour in every figure
TERM_NAMES = {
    "lr": "learning rate of the backbone",
    "loss": "total loss",
    "cls": "classification",
    "aux_cls": "auxiliary classification",
    "ptc": "patch token contrast",
    "ctc": "class token contrast",
    "seg": "segmentation",
    "reg": "dense energy",
    "haaf": "HAAF objective",
    "aff": "affinity of pairs (AFA)",
    "unc": "uncertain patches (FSR)",
    "cer": "class token (FSR)",
}  # column of history.csv → title of its panel


def plot_learning_curves(
    histories: Mapping[str, pd.DataFrame | Path | str],
    terms: Sequence[str] | None = None,
    columns: int = 4,
    smooth: int = 1,
) -> np.ndarray:
    """One panel per loss term, one line per run.

    Args:
        histories: run → `history.csv` or its content (columns step, lr, seconds and the terms).
        terms: columns to show; None: the learning rate and every term some run has.
        smooth: running mean over so many rows.

    Returns:
        Axes of the panels, flat.
    """
    tables = {
        run: h if isinstance(h, pd.DataFrame) else pd.DataFrame(history_rows(Path(h))).apply(pd.to_numeric)
        for run, h in histories.items()
    }
    if terms is None:
        found = dict.fromkeys(column for table in tables.values() for column in table)
        terms = [column for column in found if column not in ("step", "seconds")]
    columns = min(columns, len(terms))
    rows = -(-len(terms) // columns)
    size = (2.7 * columns, 2 * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, squeeze=False)
    for ax, term in zip(axes.flat, terms, strict=False):
        _plot_term(tables, term, smooth, ax)
    for ax in axes.flat[len(terms) :]:
        ax.remove()
    for column in range(columns):
        last = max(r for r in range(rows) if r * columns + column < len(terms))
        axes[last, column].set_xlabel("step")
    if len(tables) > 1:
        entries = axes[0, 0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside lower center", ncols=min(len(tables), 4))
    return axes.ravel()[: len(terms)]


def _plot_term(tables: Mapping[str, pd.DataFrame], term: str, smooth: int, ax: Axes) -> None:
    """One panel; a run without the term has an empty line, so that colours stay with their runs."""
    for run, table in tables.items():
        if term in table:
            shown = table[["step", term]].dropna()
        else:
            shown = pd.DataFrame({"step": [], term: []})
        mean = shown[term].rolling(smooth, min_periods=1).mean()
        ax.plot(shown["step"], mean, label=run, linewidth=1.4)
    ax.set_title(TERM_NAMES.get(term, term), fontsize="small")
    ax.ticklabel_format(axis="y", scilimits=(-2, 3))


def plot_score_curves(curves: pd.DataFrame) -> np.ndarray:
    """What methods reach while they are trained: one panel per output, one line per method.

    Lines of other seeds than most methods have are dashed, and named with their seeds: one seed can be
    several points easier than another.

    Args:
        curves: from `score_curve.mean_curves`.

    Returns:
        Axes of the panels.
    """
    outputs = [name for name in OUTPUTS if name in curves and curves[name].notna().any()]
    usual = curves.drop_duplicates("method")["seeds"].mode()[0]
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys((*SCORED, *curves["method"])))}
    figure, axes = plt.subplots(
        1, len(outputs), figsize=(2.6 * len(outputs), 2.8), sharey=True, squeeze=False
    )
    for ax, output in zip(axes[0], outputs, strict=True):
        for method, rows in curves.groupby("method", sort=False):
            shown, seeds = rows.dropna(subset=[output]), rows["seeds"].iloc[0]
            only = f"{method}, only seed{'s' if ',' in seeds else ''} {seeds}"
            label, line = (method, "o-") if seeds == usual else (only, "o--")
            ax.plot(shown["step"], shown[output], line, color=colours[method], label=label, lw=1.4, ms=3)
        ax.set(title=heading(output), xlabel="step")
    axes[0, 0].set_ylabel("mIoU, %")
    entries = axes[0, 0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=4)
    return axes[0]


def plot_scaling_curves(
    table: pd.DataFrame, x: str, y: str, hue: str, labels: tuple[str, str], ax: Axes | None = None
) -> Axes:
    """Cost against size on logarithmic axes, one line per `hue`.

    Args:
        table: long table with the columns named by x, y and hue.
        labels: axis labels with units.
    """
    ax = own_axes(ax)
    sns.lineplot(table, x=x, y=y, hue=hue, style=hue, markers=True, dashes=False, errorbar="sd", ax=ax)
    ax.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    ticks = sorted(table[x].unique())
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    sns.move_legend(ax, **BESIDE, title="")
    return ax


def plot_cost_growth(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """GFLOP of a forward pass against the side of the image, both on logarithmic axes.

    Args:
        table: columns backbone, side (pixels), gflop (all blocks, by formula), attention_gflop (the part of
            it that the attention has) and counted_gflop (NaN where not counted).
        ax: where to draw; None: a new figure.
    """
    ax = own_axes(ax)
    for colour, (name, rows) in zip(sns.color_palette(), table.groupby("backbone", sort=False), strict=False):
        rows = rows.sort_values("side")
        ax.plot(rows["side"], rows["gflop"], color=colour, label=f"{name}, forward pass")
        ax.plot(rows["side"], rows["attention_gflop"], "--", color=colour, label=f"{name}, its attention")
        ax.plot(rows["side"], rows["counted_gflop"], "o", color=colour, fillstyle="none")
    sides = sorted(table["side"].unique())
    ax.set(xscale="log", yscale="log", xlabel="side of the image (pixels)", ylabel="GFLOP per image")
    ax.set_xticks(sides, [str(side) for side in sides])
    ax.minorticks_off()
    ax.set_title("Lines by formula, circles counted by the profiler")
    ax.legend(loc="lower right", fontsize="small")
    return ax
