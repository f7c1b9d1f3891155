"""Scores of runs and memory of strategies as bars and dots."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from ssepa_lib.evaluation import heading
from ssepa_lib.workbook.figures.style import BESIDE, method_name, own_axes
from ssepa_lib.workbook.published import STRATEGIES, table_4


def plot_runs(runs: pd.DataFrame, outputs: Sequence[str], ax: Axes | None = None) -> Axes:
    """mIoU by method: bars are means over seeds, dots single runs.

    Args:
        runs: rows of `tables.collect_runs`, of one split.
        outputs: what to show, one group of bars each.
    """
    ax = own_axes(ax, (8.5, 3.8))
    outputs = list(outputs)
    long = runs.melt(id_vars=["method", "seed"], value_vars=outputs, var_name="output", value_name="miou")
    names = [method_name(method) for method in long["method"]]
    long = long.assign(miou=long["miou"].astype(float), method=names).dropna()
    order = [output for output in outputs if output in set(long["output"])]
    common = {"x": "output", "y": "miou", "hue": "method", "order": order, "ax": ax}
    sns.barplot(long, errorbar=None, alpha=0.75, **common)
    dots = {"size": 3.5, "color": "black", "jitter": 0.05, "palette": "dark:black"}
    sns.stripplot(long, dodge=True, legend=False, **dots, **common)
    ax.set_xticks(range(len(order)), [heading(output).replace(", ", ",\n") for output in order])
    ax.set(xlabel="", ylabel="mIoU, %")
    sns.move_legend(ax, **BESIDE, title="bar: mean, dot: one seed")
    return ax


def plot_class_scores(results: Mapping[str, dict], output: str, ax: Axes | None = None) -> Axes:
    """IoU of every class, one dot per run, classes sorted by the first run.

    Args:
        results: run → result of `evaluate`.
        output: which of its outputs.
    """
    table = pd.DataFrame({run: result["per_class"][output] for run, result in results.items()}, dtype=float)
    table = table.dropna(how="all").sort_values(table.columns[0])
    ax = own_axes(ax, (6.4, 0.22 * len(table) + 1))
    for run, marker in zip(table.columns, "os^Dv" * len(table.columns), strict=False):
        ax.plot(table[run], range(len(table)), marker, label=run, markersize=5, alpha=0.85)
    ax.set_yticks(range(len(table)), table.index)
    ax.set(xlabel=f"IoU of {heading(output)}, %", xlim=(0, 100), ylim=(-0.7, len(table) - 0.3))
    ax.legend(**BESIDE)
    return ax


def plot_memory_bars(measured: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Memory of one training step by strategy and batch (SS-EPA, Table 4); diamonds are published numbers.

    Args:
        measured: columns `strategy`, `batch`, `gigabytes`, as for `published.table_4`.
    """
    ax = own_axes(ax, (7.5, 3.8))
    order = [s for s in STRATEGIES if s in set(measured["strategy"])]
    batches = sorted(measured["batch"].unique())
    colours = sns.color_palette("Blues", len(batches) + 1)[1:]
    common = {"order": order, "palette": colours, "edgecolor": "0.3", "ax": ax}
    sns.barplot(measured, x="strategy", y="gigabytes", hue="batch", **common)
    for bars in ax.containers:
        ax.bar_label(bars, fmt="%.1f", padding=2, fontsize="x-small")
    diamond = {"marker": "D", "color": "C1", "markeredgecolor": "black", "linestyle": ""}
    published = table_4().set_index("method")
    for x, strategy in enumerate(order):
        for b, batch in enumerate(batches):
            if STRATEGIES[strategy] in published.index and f"batch {batch}" in published:
                at = x + 0.8 * ((b + 0.5) / len(batches) - 0.5)
                number = float(published.loc[STRATEGIES[strategy], f"batch {batch}"])
                ax.plot(at, number, markersize=6, **diamond)
    names = {
        "none": "no affinity",
        "stack_heads": "all heads",
        "stack_layers": "HAAF\n(head means)",
        "matrix_free": "HAAF\n(matrix-free)",
    }
    ax.set_xticks(range(len(order)), [names[s] for s in order])
    ax.set(xlabel="", ylabel="peak memory of a step, GB")
    handles, labels = ax.get_legend_handles_labels()
    handles.append(plt.Line2D([], [], **diamond))
    ax.legend(handles, [f"batch {label}" for label in labels] + ["published"], **BESIDE)
    return ax
