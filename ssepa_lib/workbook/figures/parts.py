"""Three patches that a lesson follows, and where the mass of a map lies."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ssepa_lib.evaluation.maps import PARTS
from ssepa_lib.workbook.figures.images import (
    Array,
    mark_patch,
    plot_affinity_row,
    plot_cam,
    plot_image,
    to_numpy,
    to_pixels,
)
from ssepa_lib.workbook.figures.style import LANDMARKS, own_axes


def plot_landmarks(
    image: Array,
    landmarks: Mapping[str, int],
    grid: tuple[int, int],
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """An image with its landmark patches framed and named in their colours.

    Args:
        landmarks: result of `lesson.landmarks`.
        grid: h, w, patches per column and row.
    """
    ax = plot_image(image, ax, title)
    size = to_pixels(image).shape[:2]
    for name, patch in landmarks.items():
        mark_patch(ax, patch, grid, size, LANDMARKS[name])
    handles = [
        plt.Line2D([], [], marker="s", linestyle="", color=LANDMARKS[name], markersize=7, label=name)
        for name in landmarks
    ]
    if handles:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "ncols": 3}
        ax.legend(handles=handles, fontsize="small", handletextpad=0.2, columnspacing=0.8, **place)
    return ax


def plot_part_shares(shares: Array, ax: Axes | None = None, title: str = "") -> Axes:
    """How much of a map's mass lies on head, body and ground, as three bars.

    Args:
        shares: [3] as from `evaluation.maps.mass_by_part`.
    """
    ax, shares = own_axes(ax, (2.4, 1.4)), 100 * to_numpy(shares)
    bars = ax.barh(range(3), np.nan_to_num(shares), color=list(LANDMARKS.values()), height=0.7)
    ax.bar_label(bars, labels=[f"{s:.0f} %" if np.isfinite(s) else "–" for s in shares], padding=3)
    ax.set_yticks(range(3), PARTS)
    ax.invert_yaxis()
    ax.set(xlim=(0, 125), xticks=[0, 50, 100], xlabel="share of the map, %")
    ax.grid(False)
    if title:
        ax.set_title(title)
    return ax


def plot_maps_with_shares(
    image: Array,
    maps: Mapping[str, Array | None],
    shares: Mapping[str, Array] | None = None,
    *,
    landmarks: Mapping[str, int] | None = None,
    grid: tuple[int, int] = (1, 1),
    title: str = "image",
) -> np.ndarray:
    """An image and maps of it beside each other, below each map the share on head, body and ground.

    Args:
        maps: title → map [h, w] in 0..1, all on the same scale; None: under a curtain.
        shares: title → [3], for some of the maps; None: no bars.
        landmarks, grid: patches to frame on the image.
        title: of the image.

    Returns:
        axes [rows, 1 + maps].
    """
    rows = 1 if shares is None else 2
    size = (2.4 * (len(maps) + 1), 2.5 + 1.2 * (rows - 1))
    ratios = [2.1, 1][:rows]
    axes = plt.subplots(rows, len(maps) + 1, figsize=size, height_ratios=ratios, squeeze=False)[1]
    plot_landmarks(image, landmarks or {}, grid, axes[0, 0], title)
    shown = [name for name, values in maps.items() if values is not None]
    for ax, (name, values) in zip(axes[0, 1:], maps.items(), strict=True):
        if values is None:
            _plot_curtain(to_pixels(image).shape[:2], ax, name)
        else:
            plot_cam(values, image, ax, name, bar="activation, 0 to 1" if name == shown[-1] else "")
    if shares is not None:
        axes[1, 0].remove()
        for ax, name in zip(axes[1, 1:], maps, strict=True):
            if name in shares:
                plot_part_shares(shares[name], ax)
            else:
                ax.remove()
    return axes


def _plot_curtain(size: tuple[int, int], ax: Axes, title: str) -> None:
    """A grey panel with a question mark instead of an image of `size` (height, width)."""
    plot_image(np.full((*size, 3), 200, np.uint8), ax, title)
    ax.text(size[1] / 2, size[0] / 2, "?", fontsize=28, color="0.4", ha="center", va="center")


def plot_landmark_rows(
    image: Array,
    rows: Mapping[str, Mapping[str, Array]],
    landmarks: Mapping[str, int],
    grid: tuple[int, int],
) -> np.ndarray:
    """From where the landmark patches receive: one line of images per landmark, one column per affinity.

    Args:
        rows: affinity → landmark → its row [N]; every panel has a scale of its own.

    Returns:
        axes [landmarks, affinities].
    """
    size = (2.3 * len(rows), 2.3 * len(landmarks) + 0.3)
    axes = plt.subplots(len(landmarks), len(rows), figsize=size, squeeze=False)[1]
    for column, (title, of) in enumerate(rows.items()):
        for line, (name, patch) in enumerate(landmarks.items()):
            ax = axes[line, column]
            heading = title if line == 0 else ""
            plot_affinity_row(image, of[name], patch, grid, ax, heading, LANDMARKS[name])
            if column == 0:
                ax.set_ylabel(name, color=LANDMARKS[name], fontweight="bold")
    return axes


def plot_ranked(
    values: Mapping[str, float], label: str, highlight: Sequence[str] = (), ax: Axes | None = None
) -> Axes:
    """Named numbers as horizontal bars, largest first; some of them in the first colour, the rest grey."""
    ax = own_axes(ax, (6.4, 0.36 * len(values) + 0.9))
    ordered = sorted(values.items(), key=lambda item: -item[1])
    colours = ["C0" if name in highlight else "0.65" for name, _ in ordered]
    bars = ax.barh(range(len(ordered)), [value for _, value in ordered], color=colours, height=0.7)
    ax.bar_label(bars, fmt="%.1f", padding=3, fontsize="small")
    ax.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(False, axis="y")
    ax.set_xlabel(label)
    return ax
