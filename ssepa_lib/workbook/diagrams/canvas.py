"""The pen of all diagrams: named boxes, arrows of three kinds, thumbnails, one highlighted box."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from matplotlib.patheffects import Normal, withStroke

from ssepa_lib.errors import UserError
from ssepa_lib.workbook.figures.images import CAM_COLOURS, class_palette, to_numpy, to_pixels

Point = tuple[float, float]
STYLES = {  # kind of box → fill, edge
    "data": ("white", "0.35"),
    "learned": ("#cfe3f2", "#0173b2"),
    "fixed": ("#e4e4e4", "0.45"),
    "teacher": ("#fce3bd", "#c47a00"),
    "loss": ("white", "black"),
}
LINES = {  # kind of arrow → colour, line style
    "gradient": ("0.1", "-"),
    "stopped": ("0.45", (0, (3, 2))),
    "argmax": ("#b4375a", "-"),
}
HERE = "#ffcc00"  # halo of the highlighted box
UNIT = 0.08  # inches per unit of a diagram at full size


class Canvas:
    """Axes on which one diagram is drawn, in units of its own.

    Args:
        size: width and height in units.
        ax: where to draw; None: a new figure at full size.
        highlight: name of the box that is lit.
        images: thumbnails by the name of their box.
        margin: units below y = 0, for the legend.
    """

    def __init__(
        self,
        size: tuple[float, float],
        ax: Axes | None,
        highlight: str | None,
        images: Mapping[str, Any] | None = None,
        margin: float = 6,
    ):
        width, height = size[0], size[1] + margin
        if ax is None:
            figure = plt.figure(figsize=(UNIT * width, UNIT * height), layout="none")
            ax = figure.add_axes((0, 0, 1, 1))
        self.ax, self.highlight, self.images = ax, highlight, dict(images or {})
        self.boxes: dict[str, tuple[float, float, float, float]] = {}
        ax.set(xlim=(0, width), ylim=(-margin, height - margin), aspect="equal")
        ax.set_axis_off()
        ax.autoscale(False)
        room = ax.get_window_extent().width / ax.figure.dpi
        self.scale = min(room / (UNIT * width), 1.0)

    def box(
        self,
        name: str,
        at: tuple[float, float, float, float],
        title: str,
        kind: str = "data",
        side: str = "",
        **image: Any,
    ) -> None:
        """A box with its title inside or, with a `side`, beside it; a thumbnail needs a side.

        Args:
            at: left, bottom, width, height.
            kind: one of `STYLES`.
            side: n, e, s or w; empty: inside.
            image: options of `thumbnail`.
        """
        x, y, w, h = self.boxes[name] = at
        fill, edge = STYLES[kind]
        lit = name == self.highlight
        shape = "round,pad=0,rounding_size=" + str(min(h / 2, 2.4) if kind == "loss" else 0.6)
        patch = FancyBboxPatch((x, y), w, h, shape, facecolor=fill, edgecolor=edge, linewidth=1.2, zorder=3)
        patch.set_gid(name)
        if lit:
            patch.set(
                linewidth=2.2, path_effects=[withStroke(linewidth=8 * self.scale, foreground=HERE), Normal()]
            )
        self.ax.add_patch(patch)
        if name in self.images and side:
            self.thumbnail(at, self.images[name], **image)
        place, options = (x + w / 2, y + h / 2), {}
        if side:
            place = self.at(name, side)
            place, options = _beside(place, side, 0.5)
        self.text(place, title, 8, weight="bold" if lit else "normal", **options)

    def thumbnail(
        self,
        at: tuple[float, float, float, float],
        values: Any,
        *,
        matrix: bool = False,
        labels: bool = False,
        limit: float = 1,
    ) -> None:
        """Something small inside a box: an image [3, H, W], or a map [h, w] from 0 to `limit`.

        Args:
            matrix: it is an attention matrix, drawn in grey and brightened.
            labels: it holds class ids.
        """
        x, y, w, h = at
        extent = (x + 0.4, x + w - 0.4, y + 0.4, y + h - 0.4)
        colours = {"cmap": "Greys" if matrix else CAM_COLOURS, "vmin": 0, "vmax": limit}
        shown = to_numpy(values)
        if labels:
            shown = class_palette([values])[shown.astype(np.uint8)]
        if shown.ndim == 3:
            shown, colours = to_pixels(shown), {}
        elif matrix:
            shown = np.sqrt(np.clip(shown / max(float(np.quantile(shown, 0.98)), 1e-12), 0, 1))
        self.ax.imshow(shown, extent=extent, zorder=4, interpolation="nearest", aspect="auto", **colours)

    def text(self, at: Point, words: str, size: float = 7, **options: Any) -> None:
        """Words at a point, by default centred, in points at full size."""
        if not words:
            return
        options = {
            "ha": "center",
            "va": "center",
            "color": "black",
            "zorder": 6,
            "linespacing": 1.15,
        } | options
        self.ax.text(*at, words, fontsize=size * self.scale, **options)

    def at(self, name: str, side: str, share: float = 0.5) -> Point:
        """A point on the border of a box: side n, e, s or w; `share` from left or from below."""
        x, y, w, h = self.boxes[name]
        return {
            "n": (x + share * w, y + h),
            "s": (x + share * w, y),
            "e": (x + w, y + share * h),
            "w": (x, y + share * h),
        }[side]

    def arrow(
        self,
        *points: Point,
        shape: str = "",
        kind: str = "gradient",
        colour: str = "",
        side: str = "",
        part: int = -1,
    ) -> None:
        """An arrow through some points with the shape of what it carries.

        Args:
            kind: one of `LINES`.
            colour: another colour than that of the kind.
            side: where the shape stands: n or s of a horizontal segment, e or w of a vertical one.
            part: which segment carries the shape; -1: the longest.
        """
        own, style = LINES[kind]
        path = _zigzag(points) if kind == "argmax" else list(points)
        line = FancyArrowPatch(
            path=Path(path),
            arrowstyle="-|>,head_width=2.2,head_length=4",
            mutation_scale=max(self.scale, 0.6),
            color=colour or own,
            linestyle=style,
            linewidth=1.3 * max(self.scale, 0.7),
            capstyle="butt",
            joinstyle="miter",
            zorder=2,
        )
        self.ax.add_patch(line)
        lengths = [abs(b[0] - a[0]) + abs(b[1] - a[1]) for a, b in zip(points, points[1:], strict=False)]
        chosen = int(np.argmax(lengths)) if part < 0 else part
        (x0, y0), (x1, y1) = points[chosen], points[chosen + 1]
        middle, level = ((x0 + x1) / 2, (y0 + y1) / 2), abs(x1 - x0) >= abs(y1 - y0)
        side = side or ("n" if level else "e")
        place, options = _beside(middle, side, 1.1 if kind == "argmax" else 0.5)
        self.text(place, shape, 7, **options)

    def badge(self, name: str, words: str, side: tuple[float, float] = (0, 1)) -> None:
        """A small mark on a corner of a box: (0, 1) is the upper left one."""
        x, y, w, h = self.boxes[name]
        frame = {"boxstyle": "round,pad=0.18", "facecolor": "white", "edgecolor": "0.2"}
        self.text((x + side[0] * w, y + side[1] * h), words, 8, style="italic", weight="bold", bbox=frame)

    def crossed(self, at: tuple[float, float, float, float], words: str) -> None:
        """A crossed-out box, for what does not enter."""
        x, y, w, h = at
        self.ax.add_patch(
            FancyBboxPatch((x, y), w, h, "square,pad=0", facecolor="white", edgecolor="0.5", zorder=3)
        )
        if "mask" in self.images:
            self.thumbnail(at, self.images["mask"], labels=True)
        for a, b in (((x, y), (x + w, y + h)), ((x, y + h), (x + w, y))):
            self.ax.plot(*zip(a, b, strict=True), color="#b4375a", linewidth=2, zorder=5)
        self.text((x + w + 0.8, y + h / 2), words, 7, ha="left")

    def legend(
        self, at: Point, kinds: Sequence[str], lines: Sequence[str] = tuple(LINES), step: float = 15
    ) -> None:
        """What the colours and the arrows mean, in one row."""
        x, y = at
        names = {
            "data": "data",
            "learned": "learned",
            "fixed": "fixed",
            "teacher": "teacher (EMA)",
            "loss": "loss",
        }
        for kind in kinds:
            fill, edge = STYLES[kind]
            round_ = "round,pad=0,rounding_size=" + ("0.9" if kind == "loss" else "0.3")
            self.ax.add_patch(
                FancyBboxPatch((x, y - 0.9), 3, 1.8, round_, facecolor=fill, edgecolor=edge, zorder=3)
            )
            self.text((x + 3.6, y), names[kind], 7, ha="left")
            x += 5.5 + 0.62 * len(names[kind])
        meaning = {
            "gradient": "gradient flows back",
            "stopped": "gradient stopped",
            "argmax": "argmax: no gradient exists",
        }
        for kind in lines:
            self.arrow((x, y), (x + 5, y), kind=kind)
            self.text((x + 5.8, y), meaning[kind], 7, ha="left")
            x += 8 + 0.62 * len(meaning[kind])

    def done(self) -> Axes:
        """The finished axes.

        Raises:
            UserError: there is no box of the name that was to be highlighted.
        """
        if self.highlight is not None and self.highlight not in self.boxes:
            raise UserError(f"there is no box '{self.highlight}'; choose one of {', '.join(self.boxes)}.")
        return self.ax


def shape(*sizes: int) -> str:
    """`[144, 96]`."""
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def _zigzag(points: Sequence[Point], tooth: float = 0.55) -> list[Point]:
    """A path with teeth along every segment; its last stretch is straight, for the arrow head."""
    path = [points[0]]
    for a, b in zip(points, points[1:], strict=False):
        start, stop = np.array(a, float), np.array(b, float)
        along = stop - start
        length = float(np.hypot(*along))
        across = np.array([-along[1], along[0]]) / max(length, 1e-9)
        teeth = max(int((length - 1.6) / (2 * tooth)), 1)
        last = max(length - 1.6, 0.1) / max(length, 1e-9)
        for i in range(teeth):
            path.append(tuple(start + along * last * (i + 0.5) / teeth + across * tooth * (-1) ** i))
        path += [tuple(start + along * last), tuple(stop)]
    return path


def _beside(point: Point, side: str, gap: float) -> tuple[Point, dict[str, str]]:
    """Where words stand that belong to a point, and how they are aligned."""
    dx, dy, ha, va = {
        "n": (0, gap, "center", "bottom"),
        "s": (0, -gap, "center", "top"),
        "e": (gap, 0, "left", "center"),
        "w": (-gap, 0, "right", "center"),
    }[side]
    return (point[0] + dx, point[1] + dy), {"ha": ha, "va": va}
