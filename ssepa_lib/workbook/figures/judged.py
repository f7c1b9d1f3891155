"""Maps with what they are worth: IoU in every panel, and where their mass lies."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from ssepa_lib.evaluation.maps import PARTS
from ssepa_lib.workbook.figures.images import Array, plot_cam, plot_image, plot_mask, to_numpy, to_pixels
from ssepa_lib.workbook.figures.style import BESIDE, LANDMARKS, own_axes

WORSE = "#c1272d"


def plot_judged_grid(
    images: Sequence[Array],
    masks: Sequence[Array],
    maps: Mapping[str, Sequence[Array]],
    ious: Mapping[str, Sequence[float]],
    shares: Mapping[str, Sequence[Array]],
    classes: Sequence[str],
    names: Sequence[str],
    base: str,
) -> np.ndarray:
    """Maps beside the ground truth (SS-EPA, Figure 5) with the IoU of each, and below it its mass as a bar.

    Args:
        maps: column title → one map [h, w] in 0..1 per image.
        ious: column title → percent per image.
        shares: column title → [3] per image, on head, body and ground.
        names: what is mapped in each row.
        base: the column that the others are compared with; a panel with a lower IoU has a red frame.

    Returns:
        axes [rows, columns].
    """
    titles = ["input", "ground truth", *maps]
    size = (1.75 * len(titles), 2.15 * len(images) + 0.7)
    figure, axes = plt.subplots(len(images), len(titles), figsize=size, squeeze=False)
    for i, row in enumerate(axes):
        plot_image(images[i], row[0])
        row[0].set_ylabel(names[i])
        plot_mask(masks[i], classes, row[1], legend=False, among=masks)
        for ax, title in zip(row[2:], maps, strict=True):
            plot_cam(maps[title][i], images[i], ax)
            worse = ious[title][i] < ious[base][i]
            ax.set_xlabel(f"IoU {ious[title][i]:.0f} %", color=WORSE if worse else "black", labelpad=16)
            _mass_bar(ax, shares[title][i], to_pixels(images[i]).shape[:2])
            if worse:
                _frame(ax)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize="small")
    entries = [
        Patch(facecolor=colour, label=f"on the {name}")
        for colour, name in zip(LANDMARKS.values(), PARTS, strict=True)
    ]
    entries.append(Patch(facecolor="white", edgecolor=WORSE, linewidth=2, label=f"worse than {base}"))
    figure.legend(handles=entries, loc="outside lower center", ncols=4, handlelength=1.2)
    return axes


def _mass_bar(ax: Axes, shares: Array, size: tuple[int, int]) -> None:
    """Head, body and ground as one stacked bar under an image."""
    bar, left = ax.inset_axes((0, -0.1, 1, 0.06)), 0.0
    for share, colour in zip(np.nan_to_num(to_numpy(shares)), LANDMARKS.values(), strict=True):
        bar.barh(0, share, left=left, color=colour, height=1)
        left += share
    bar.set(xlim=(0, 1), ylim=(-0.5, 0.5))
    bar.set_axis_off()


def _frame(ax: Axes) -> None:
    """A red frame around a panel."""
    ax.add_patch(Rectangle((0, 0), 1, 1, transform=ax.transAxes, fill=False, edgecolor=WORSE, linewidth=4))


def plot_mass(shares: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Where the mass of several kinds of maps lies, as stacked bars in percent.

    Args:
        shares: index name of the map; columns head, body and ground, 0..1.
    """
    ax, left = own_axes(ax, (7, 0.42 * len(shares) + 0.9)), np.zeros(len(shares))
    for part, colour in zip(PARTS, LANDMARKS.values(), strict=True):
        values = 100 * shares[part].to_numpy()
        bars = ax.barh(range(len(shares)), values, left=left, color=colour, label=part, height=0.7)
        ax.bar_label(bars, [f"{v:.0f}" if v >= 4 else "" for v in values], label_type="center", color="white")
        left += values
    ax.set_yticks(range(len(shares)), shares.index)
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), xlabel="share of the map's mass, %")
    ax.grid(False)
    ax.legend(**BESIDE)
    return ax


def plot_better_or_worse(ious: pd.DataFrame, base: str, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """IoU of every image under the base map and under each other one; above the diagonal it became better.

    Args:
        ious: one row per image, one column per map, percent.
    """
    others = [name for name in ious if name != base]
    if axes is None:
        axes = plt.subplots(1, len(others), figsize=(2.7 * len(others), 3.2), sharey=True, squeeze=False)[1][
            0
        ]
    for ax, name in zip(axes, others, strict=True):
        better = ious[name] > ious[base]
        ax.scatter(ious[base][better], ious[name][better], s=14, color="#0173b2", label="better")
        ax.scatter(
            ious[base][~better], ious[name][~better], s=18, marker="x", color=WORSE, label="not better"
        )
        ax.plot((0, 100), (0, 100), color="0.6", linewidth=1)
        title = f"{name}\nbetter in {better.sum()} of {len(ious)}"
        ax.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", xlabel=f"IoU of {base}, %", title=title)
        ax.title.set_fontsize("small")
    axes[0].set_ylabel("IoU of the map, %")
    axes[-1].legend(**BESIDE)
    return axes


def plot_threshold_curves(curves: pd.DataFrame, fixed: float, ax: Axes | None = None) -> Axes:
    """mIoU against the background threshold, one line per map; dots: the best, dotted line: the fixed one.

    Args:
        curves: as from `map_study.measure_maps`.
    """
    ax = own_axes(ax, (6.4, 3.4))
    for name, style in zip(curves, ("--", "-", "-", "-", ":", "-.") * len(curves.columns), strict=False):
        (line,) = ax.plot(curves.index, curves[name], style, label=name)
        ax.plot(curves[name].idxmax(), curves[name].max(), "o", color=line.get_color())
    ax.axvline(fixed, color="0.5", linestyle=":")
    ax.set(xlabel="background threshold (0 to 1)", ylabel="mIoU, %", ylim=(0, None))
    ax.legend(**BESIDE)
    return ax


def plot_film(
    image: Array, frames: Mapping[str, Mapping[str, Array]], notes: Mapping[str, Sequence[str]] | None = None
) -> np.ndarray:
    """A film strip: one line of panels per kind of map, one column per moment.

    Args:
        frames: kind → moment → map [h, w] in 0..1, or class ids [H, W] of an integer type.
        notes: kind → a word under each panel.

    Returns:
        axes [kinds, moments].
    """
    kinds, moments = list(frames), list(next(iter(frames.values())))
    size = (1.3 * len(moments) + 0.5, 1.45 * len(kinds) + 0.4)
    labels = [m for kind in frames.values() for m in kind.values() if _holds_ids(m)]
    axes = plt.subplots(len(kinds), len(moments), figsize=size, squeeze=False)[1]
    for line, kind in zip(axes, kinds, strict=True):
        for i, (ax, moment) in enumerate(zip(line, moments, strict=True)):
            values = frames[kind][moment]
            if _holds_ids(values):
                plot_mask(values, (), ax, image=image, legend=False, among=labels)
            else:
                plot_cam(values, image, ax)
            if notes and kind in notes:
                ax.set_xlabel(notes[kind][i], fontsize="x-small", labelpad=2)
        line[0].set_ylabel(kind, fontsize="small")
    for ax, moment in zip(axes[0], moments, strict=True):
        ax.set_title(moment, fontsize="small")
    return axes


def _holds_ids(values: Array) -> bool:
    """Whether an array is of an integer type."""
    return not (
        values.is_floating_point()
        if isinstance(values, torch.Tensor)
        else np.issubdtype(values.dtype, np.floating)
    )


def plot_case(
    image: Array,
    maps: Mapping[str, Array],
    inside: Array,
    titles: Mapping[str, str] | None = None,
    histograms: bool = False,
) -> np.ndarray:
    """One image under several maps with the outline of its object.

    Args:
        maps: name → [H, W] in 0..1.
        inside: bool [H, W], where the object is; its outline is drawn on every map.
        histograms: below each map, its values on the object and on the background.

    Returns:
        axes [1 or 2, 1 + maps].
    """
    rows, inside = 1 + histograms, to_numpy(inside).astype(bool)
    size = (1.9 * (len(maps) + 1), 2.3 + 1.3 * histograms)
    ratios = [2.2, 1][:rows]
    axes = plt.subplots(rows, len(maps) + 1, figsize=size, squeeze=False, height_ratios=ratios)[1]
    plot_image(image, axes[0, 0], "image")
    for ax, (name, values) in zip(axes[0, 1:], maps.items(), strict=True):
        plot_cam(values, image, ax, bar="0 to 1" if ax is axes[0, -1] else "")
        ax.set_title(name, fontsize="small")
        ax.contour(inside, levels=[0.5], colors="white", linewidths=1)
    if histograms:
        axes[1, 0].set_axis_off()
        for ax, values in zip(axes[1, 1:], maps.values(), strict=True):
            _histogram(ax, to_numpy(values), inside)
        axes[1, 1].legend(**{"fontsize": "x-small", "loc": "upper right", "handlelength": 1})
    return axes


def _histogram(ax: Axes, values: np.ndarray, inside: np.ndarray) -> None:
    """How the values of a map are spread on the object and on the background, each side as shares."""
    for where, name, colour in (
        (~inside, "background", LANDMARKS["Ground"]),
        (inside, "object", LANDMARKS["Body"]),
    ):
        weights = np.full(where.sum(), 1 / max(where.sum(), 1))
        ax.hist(values[where], np.linspace(0, 1, 21), weights=weights, color=colour, alpha=0.6, label=name)
    ax.axvline(np.median(values[~inside]) if (~inside).any() else 0, color="black", linewidth=1)
    ax.set(xlim=(0, 1), xticks=[0, 0.5, 1], yticks=[], xlabel="value of the map")
    ax.xaxis.label.set_fontsize("x-small")


def plot_arrows(
    vectors: Sequence[Sequence[float]],
    names: Sequence[str],
    colours: Sequence[str],
    ax: Axes,
    title: str = "",
) -> Axes:
    """Unit vectors of a plane as arrows in a circle: how alike tokens are.

    Args:
        vectors: [n, 2]; their lengths do not matter.
    """
    angles = np.linspace(0, 2 * np.pi, 100)
    ax.plot(np.cos(angles), np.sin(angles), color="0.85", linewidth=1)
    for i, (vector, name, colour) in enumerate(zip(vectors, names, colours, strict=True)):
        x, y = np.array(vector, float) / np.linalg.norm(vector)
        ax.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2})
        ax.text(
            1.14 * x,
            1.14 * y + 0.14 * (-1) ** i,
            name,
            color=colour,
            ha="center",
            va="center",
            fontsize="x-small",
        )
    ax.set(xlim=(-1.5, 1.5), ylim=(-1.4, 1.4), aspect="equal")
    ax.set_axis_off()
    ax.set_title(title, fontsize="small")
    return ax


def plot_gradients(norms: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Which term moves which part: a table of gradient lengths, dark where large, a cross where none arrives.

    Args:
        norms: one row per term, one column per part, NaN for no gradient.
    """
    ax = own_axes(ax, (1.15 * len(norms.columns) + 1.2, 0.36 * len(norms) + 1.4))
    values = norms.to_numpy(float)
    shown = np.log10(np.where(values > 0, values, np.nan))
    ax.imshow(shown, cmap="Blues", aspect="auto", vmin=np.nanmin(shown) - 1, vmax=np.nanmax(shown) + 1)
    for (row, column), value in np.ndenumerate(values):
        words, colour = (f"{value:.2g}", "black") if np.isfinite(value) else ("×", "0.6")
        ax.text(column, row, words, ha="center", va="center", color=colour, fontsize="small")
    ax.set_xticks(range(len(norms.columns)), [name.replace(", ", ",\n") for name in norms], fontsize="small")
    ax.set_yticks(range(len(norms)), norms.index, fontsize="small")
    ax.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.grid(False)
    return ax
