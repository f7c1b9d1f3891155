"""Figures about your own images: the ladder of evidence, maps of every class, views of a map, intervals."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ssepa_lib.workbook.figures.images import Array, plot_cam, plot_image, to_numpy
from ssepa_lib.workbook.figures.style import own_axes

RUNGS = (
    ("labels only", "minutes", "Does the network distinguish the classes at all?"),
    ("explorer", "minutes", "Does an affinity follow objects, or edges and corners?"),
    ("flip consistency", "seconds", "Which images are certainly bad? Never: which are good."),
    ("ten masks", "an hour", "What is the mIoU, give or take the interval?"),
    ("full masks", "days", "Is one method a point better than another?"),
)  # what one has, what it costs, the question that it answers
REACHED, OPEN = "#0173b2", "#e8e8e8"


def plot_ladder(reached: int, ax: Axes | None = None) -> Axes:
    """What can be known about maps, from labels alone to masks for every image, as steps of a stair.

    Args:
        reached: so many of the five steps are possible with the folder; they are blue.
    """
    ax = own_axes(ax, (11, 4.2))
    for i, (name, cost, question) in enumerate(RUNGS):
        there = i < reached
        ax.bar(i, i + 1, width=0.98, color=REACHED if there else OPEN, edgecolor="white")
        ink = "white" if there else "0.25"
        ax.text(i, i + 0.9, name, ha="center", va="top", color=ink, weight="bold")
        ax.text(i, i + 0.55, cost, ha="center", va="top", color=ink, fontsize="small")
        ax.text(i, i + 1.08, textwrap.fill(question, 23), ha="center", va="bottom", fontsize="small")
    ax.set(xlim=(-0.6, len(RUNGS) - 0.4), ylim=(0, len(RUNGS) + 1.6), xticks=[], yticks=[])
    ax.set_xlabel("what you have, and what it costs a person")
    ax.set_ylabel("what it can tell")
    ax.grid(False)
    return ax


def plot_class_maps(
    images: Sequence[Array], maps: Array, scores: Array, labels: Array, classes: Sequence[str]
) -> np.ndarray:
    """Every class's map of some images, one column per image; a class of the label is named in black.

    Args:
        maps: [n, C, H, W] in 0..1; scores: [n, C], probability of each class, 0..1; labels: [n, C].

    Returns:
        axes [C + 1, n].
    """
    maps, scores, labels = to_numpy(maps), to_numpy(scores), to_numpy(labels)
    size = (1.75 * len(images), 1.95 * (len(classes) + 1))
    axes = plt.subplots(len(classes) + 1, len(images), figsize=size, squeeze=False)[1]
    for i, column in enumerate(axes.T):
        plot_image(images[i], column[0], f"image {chr(ord('A') + i)}")
        for c, ax in enumerate(column[1:]):
            plot_cam(maps[i, c], images[i], ax)
            here = labels[i, c] > 0
            name = textwrap.shorten(classes[c], 16, placeholder="…")
            style = {"color": "black", "weight": "bold"} if here else {"color": "0.5"}
            ax.set_xlabel(f"{name} {scores[i, c]:.2f}", fontsize="small", **style)
    return axes


def plot_views(
    images: Sequence[Array], views: Sequence[Sequence[Array]], numbers: pd.DataFrame, names: Sequence[str]
) -> np.ndarray:
    """A map of each image, and the maps of its flip (flipped back) and of the smaller image.

    Args:
        views: per image three maps [H, W] in 0..1.
        numbers: one row per image with the columns `flip` and `scale` of `evaluation.blind.judge`.
        names: the class that is mapped.

    Returns:
        axes [4, n].
    """
    axes = plt.subplots(4, len(images), figsize=(1.75 * len(images), 7.6), squeeze=False)[1]
    for i, column in enumerate(axes.T):
        plot_image(images[i], column[0], f"{chr(ord('A') + i)}: {names[i]}")
        for ax, map in zip(column[1:], views[i], strict=True):
            plot_cam(map, images[i], ax)
        for ax, key in zip(column[2:], ("flip", "scale"), strict=True):
            ax.set_xlabel(f"agreement {numbers[key].iloc[i]:.2f}", fontsize="small")
    for ax, name in zip(axes[:, 0], ("image", "map", "map of the flip", "map at 0.75"), strict=True):
        ax.set_ylabel(name)
    return axes


def plot_interval(
    scores: Array,
    interval: tuple[float, float],
    value: float,
    truth: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The mIoU of images drawn again and again, with the interval that holds most of them.

    Args:
        scores: [R], percent.
        value: of the images that have masks; truth: of all images, where that is known.
    """
    ax = own_axes(ax, (7, 2.8))
    ax.hist(to_numpy(scores), bins=40, color="0.75")
    ax.axvspan(*interval, color=REACHED, alpha=0.15, label="95 % of the draws")
    ax.axvline(value, color=REACHED, label="the images with masks")
    if truth is not None:
        ax.axvline(truth, color="black", linestyle="--", label="all images")
    ax.set(xlabel="mIoU, %", ylabel="draws")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_blind_threshold(
    curves: pd.DataFrame, chosen: float, best: float | None = None, ax: Axes | None = None
) -> Axes:
    """Flip agreement against the threshold and, where there are masks, the mIoU.

    Args:
        curves: index threshold; the columns `kappa` and, if measured, `mIoU` in percent.
        chosen, best: thresholds with the highest value of each.
    """
    ax = own_axes(ax, (7, 3.2))
    ax.plot(curves["kappa"], color=REACHED, marker=".", label="flip agreement (no mask)")
    ax.axvline(chosen, color=REACHED, linewidth=1)
    ax.set(xlabel="background threshold", ylabel="kappa", ylim=(0, 1))
    lines = ax.get_lines()[:1]
    if "mIoU" in curves:
        right = ax.twinx()
        lines += right.plot(curves["mIoU"].dropna(), color="0.4", marker="s", label="mIoU (masks)")
        right.axvline(best, color="0.4", linestyle="--", linewidth=1)
        right.set(ylabel="mIoU, %", ylim=(0, 100))
        right.grid(False)
    ax.legend(handles=lines, loc="lower left")
    return ax
