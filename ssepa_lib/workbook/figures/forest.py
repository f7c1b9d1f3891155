"""Differences with their spread: the forest plot of an ablation."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

PUBLISHED = "published"
LINEAR = 2  # points up to which the axis is linear
MARKERS = "os^vPX"


def plot_forest(
    differences: pd.DataFrame, ruler: Mapping[str, float], axes: Mapping[str, Axes] | None = None
) -> dict[str, Axes]:
    """Paired differences as points: every seed, their mean and range; published numbers above ours.

    The axis is linear up to 2 points and logarithmic beyond, because published differences are small and
    those of short runs are large.

    Args:
        differences: rows of `ablation_study.differences`; the source "published" has no seeds.
        ruler: measure → half the width of the grey band around 0, points: differences that two code bases
            alone can make.

    Returns:
        Measure → axes, from left to right.
    """
    comparisons = list(dict.fromkeys(differences["comparison"]))
    order = dict.fromkeys(differences["source"])
    sources = sorted(order, key=lambda name: name != PUBLISHED)
    if axes is None:
        height = 0.24 * _lines(differences, comparisons, sources) + 1.6
        panels = plt.subplots(1, len(ruler), figsize=(10.5, height), sharey=True, squeeze=False)[1][0]
        axes = dict(zip(ruler, panels, strict=True))
    colours = {name: "black" if name == PUBLISHED else f"C{i}" for i, name in enumerate(sources)}
    for measure, ax in axes.items():
        shown = differences[differences["measure"] == measure]
        ticks = _plot_rows(shown, comparisons, sources, colours, differences, ax)
        band = ruler[measure]
        ax.axvspan(-band, band, color="0.85", zorder=0)
        ax.axvline(0, color="black", linewidth=1)
        ax.set_xscale("symlog", linthresh=LINEAR, linscale=0.8)
        span = [-20, -5, -2, 0, 2, 5, 20]
        ax.set_xticks(span, [f"{value:+d}" if value else "0" for value in span])
        ax.set_xlim(min(-6, 1.3 * shown["difference"].min()), max(6, 1.3 * shown["difference"].max()))
        ax.set_yticks(list(ticks.values()), list(ticks))
        ax.grid(False, axis="y")
        ax.set(xlabel="difference, points of mIoU", title=measure)
    first = next(iter(axes.values()))
    first.invert_yaxis()
    entries = [_entry(name, colours[name], sources) for name in sources]
    entries.append(Patch(color="0.85", label="two code bases,\none recipe"))
    list(axes.values())[-1].legend(handles=entries, loc="upper left", bbox_to_anchor=(1, 1))
    return dict(axes)


def _lines(differences: pd.DataFrame, comparisons: list[str], sources: list[str]) -> int:
    """Lines of the plot: one per source of a comparison, and one between two comparisons."""
    return len(comparisons) + sum(
        len(_sources_of(differences, comparison, sources)) for comparison in comparisons
    )


def _sources_of(differences: pd.DataFrame, comparison: str, sources: list[str]) -> list[str]:
    there = set(differences[differences["comparison"] == comparison]["source"])
    return [source for source in sources if source in there]


def _plot_rows(
    shown: pd.DataFrame,
    comparisons: list[str],
    sources: list[str],
    colours: Mapping[str, str],
    everything: pd.DataFrame,
    ax: Axes,
) -> dict[str, float]:
    """Draw one measure; returns the place of each comparison's name on the y axis."""
    ticks, line = {}, 0
    for comparison in comparisons:
        own = _sources_of(everything, comparison, sources)
        for source in own:
            rows = shown[(shown["comparison"] == comparison) & (shown["source"] == source)]
            values = rows["difference"].to_numpy(float)
            if len(values):
                style = _style(source, sources)
                ax.plot([values.min(), values.max()], [line, line], color=colours[source], linewidth=1.5)
                if source != PUBLISHED and len(values) > 1:
                    ax.plot(values, np.full(len(values), line), ".", color=colours[source], alpha=0.6)
                ax.plot(values.mean(), line, style, color=colours[source], markersize=6)
            line += 1
        ticks[comparison] = line - 0.5 * (len(own) + 1)
        ax.axhline(line, color="0.9", linewidth=1, zorder=0)
        line += 1
    return ticks


def _style(source: str, sources: list[str]) -> str:
    return "D" if source == PUBLISHED else MARKERS[sources.index(source) % len(MARKERS)]


def _entry(source: str, colour: str, sources: list[str]) -> Line2D:
    label = source if source == PUBLISHED else f"{source}\n(mean, range, seeds)"
    return Line2D([], [], color=colour, marker=_style(source, sources), label=label)
