"""D2 and D3: how attention becomes the patch affinity, and how HAAF weighs the layers (SS-EPA, Figures 2
to 4)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from ssepa_lib.model import Network
from ssepa_lib.workbook.diagrams.canvas import Canvas, shape
from ssepa_lib.workbook.diagrams.sizes import Shapes, shapes_of
from ssepa_lib.workbook.figures.images import to_numpy
from ssepa_lib.workbook.figures.style import LANDMARKS

STRUCK = "#b4375a"
OTHERS = ("#0072b2", "#e69f00", "#56b4e9")  # rows that are no landmarks


def affinity_extraction(
    source: Shapes | Network,
    ax: Axes | None = None,
    highlight: str | None = None,
    images: Mapping[str, Any] | None = None,
) -> Axes:
    """From the queries and keys of a layer to the patch affinity, and three of its rows (SS-EPA, Figure 2).

    Args:
        source: shapes of a run (`Shapes.of(network, recipe)`), or a network.
        ax: where to draw; None: a new figure.
        highlight: the box that is lit: queries, keys, softmax, heads, layer or affinity.
        images: `affinity`, a `PatchAffinity` of one image, fills the matrices; with `image` [3, H, W] and
            `landmarks`, name → patch, up to three rows are drawn as lines and as maps; `layer` is the one
            that is shown, the middle one unless given.

    Raises:
        UserError: no box has the name to be highlighted.
    """
    s, given = shapes_of(source), dict(images or {})
    landmarks = given.get("landmarks") or {
        "Head": s.patches // 5,
        "Body": s.patches // 2,
        "Ground": 4 * s.patches // 5,
    }
    c = Canvas((138, 34), ax, highlight, _matrices(given), margin=4)
    maps, d = shape(s.tokens, s.tokens), f"[{s.heads}, {s.tokens}, {s.head_width}]"
    c.box("queries", (2, 20, 10, 5), "queries Q")
    c.box("keys", (2, 9, 10, 5), "keys K")
    c.box("softmax", (25, 13, 14, 8), "softmax of\nQKᵀ / √d", "fixed")
    for back in (2.0, 1.0):
        c.ax.add_patch(Rectangle((48 + back, 10.5 + back), 13, 13, facecolor="white", edgecolor="0.35"))
    c.box("heads", (48, 10.5, 13, 13), f"{s.heads} maps of layer k", side="s", matrix=True)
    c.box("layer", (75, 10.5, 13, 13), "head mean", side="s", matrix=True)
    c.box("affinity", (103, 9, 16, 16), "patch affinity", side="s", matrix=True)
    c.arrow(c.at("queries", "e"), (20, 22.5), (20, 18.5), (25, 18.5), shape=d, part=0, kind="stopped")
    c.arrow(c.at("keys", "e"), (20, 11.5), (20, 15.5), (25, 15.5), shape=d, part=0, side="s", kind="stopped")
    c.arrow(
        c.at("softmax", "e"), (48, 17), shape=shape(s.heads, s.tokens, s.tokens), side="s", kind="stopped"
    )
    c.arrow((63, 17), c.at("layer", "w"), shape=f"mean over\nheads\n{maps}", kind="stopped")
    over = f"{shape(s.patches, s.patches)}\nmean over\n{s.layers} layers"
    c.arrow(c.at("layer", "e"), c.at("affinity", "w"), shape=over, kind="stopped")
    c.legend((80, -2), ("data", "fixed"), ("stopped",))
    _strike(c, s)
    _rows(c, s, landmarks, given)
    c.text((2, -2), s.letters, 7, ha="left")
    return c.done()


def _matrices(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The matrices of one image: a head of one layer, the mean of its heads, the affinity."""
    affinity = given.get("affinity")
    if affinity is None:
        return {}
    with torch.no_grad():
        layer = affinity.layer_map(given.get("layer", len(affinity) // 2))[0]  # [H, T, T]
        return {"heads": layer[0], "layer": layer.mean(0), "affinity": affinity.dense()[0]}


def _strike(c: Canvas, s: Shapes) -> None:
    """The class token's row and column of the head mean."""
    x, y, w, h = c.boxes["layer"]
    if not s.prefix:
        c.text((x + w / 2, y - 3.5), "no class token: nothing to strike out", 7)
        return
    for at, wide, high in (((x, y + h - 1.1), w, 1.1), ((x, y), 1.1, h)):
        c.ax.add_patch(Rectangle(at, wide, high, facecolor="white", edgecolor=STRUCK, hatch="////", zorder=5))
    c.text((x + w / 2, y - 4.3), "the class token's row and\ncolumn are struck out", 7, color=STRUCK)


def _rows(c: Canvas, s: Shapes, landmarks: Mapping[str, int], given: Mapping[str, Any]) -> None:
    """Landmark rows of the affinity as lines that end in small maps."""
    x, y, w, h = c.boxes["affinity"]
    order = sorted(landmarks.items(), key=lambda item: item[1])[:3]
    for i, (name, patch) in enumerate(order):
        colour = LANDMARKS.get(name, OTHERS[i])
        height, top = y + h * (1 - (patch + 0.5) / s.patches), 23 - 11.3 * i
        c.ax.plot((x, x + w), (height, height), color=colour, linewidth=2, zorder=5)
        c.arrow(
            (x + w, height), (121.5 - i % 2, height), (121.5 - i % 2, top + 5), (124, top + 5), colour=colour
        )
        c.box(f"row {name}", (124, top, 10, 10), "")
        if {"affinity", "image"} <= set(given):
            row = to_numpy(given["affinity"].row(patch)[0]).reshape(s.grid, s.grid)
            c.thumbnail(c.boxes[f"row {name}"], row, limit=max(float(np.quantile(row, 0.99)), 1e-12))
        _mark(c, f"row {name}", patch, s.grid, colour)
        c.text((135, top + 5), name, 8, rotation=90, color=colour, weight="bold", ha="left")


def _mark(c: Canvas, name: str, patch: int, grid: int, colour: str) -> None:
    """A frame around one patch of a small map."""
    x, y, w, h = c.boxes[name]
    row, column = divmod(patch, grid)
    cell = (w - 0.8) / grid
    corner = (x + 0.4 + column * cell, y + h - 0.4 - (row + 1) * cell)
    c.ax.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor="white", linewidth=2.6, zorder=6))
    c.ax.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor=colour, linewidth=1.4, zorder=7))


def haaf(
    source: Shapes | Network,
    ax: Axes | None = None,
    highlight: str | None = None,
    images: Mapping[str, Any] | None = None,
) -> Axes:
    """Head-average attention fusion: one number per layer in, one weight per layer out (SS-EPA, Figures 3
    and 4).

    Args:
        source: shapes of a run (`Shapes.of(network, recipe)`), or a network.
        ax: where to draw; None: a new figure.
        highlight: the box that is lit: means, pool, mlp, scale or affinity.
        images: `affinity`, a `PatchAffinity` of one image, fills the matrices and the bars; or `descriptor`
            and `weights` [K] fill the bars alone.

    Raises:
        UserError: no box has the name to be highlighted.
    """
    s, given = shapes_of(source), dict(images or {})
    c = Canvas((138, 46), ax, highlight, _matrices(given), margin=4)
    _weighing(c, s)
    _bars(c, s, given)
    if s.recipe.affinity.descriptor == "full":
        c.text(
            (50.5, 26.3),
            "locked: the full map's mean is\nthe same for every image",
            7,
            color=STRUCK,
            va="top",
        )
    c.text((2, -2), s.letters, 7, ha="left")
    return c.done()


def _weighing(c: Canvas, s: Shapes) -> None:
    """Head means in, weighted mean out."""
    n = s.patches if s.recipe.affinity.descriptor == "patch" else s.tokens
    k, full = f"[{s.layers}]", shape(s.tokens, s.tokens)
    for back in (2.0, 1.0):
        c.ax.add_patch(Rectangle((2 + back, 26.5 + back), 12, 12, facecolor="white", edgecolor="0.35"))
    if "layer" in c.images:
        c.images["means"] = c.images["layer"]
    c.box("means", (2, 26.5, 12, 12), f"{s.layers} head means", side="s", matrix=True)
    c.box("pool", (31, 28, 12, 8), "global\naverage pool", "fixed")
    c.box("mlp", (58, 28, 12, 8), "MLP\nand K·softmax", "learned")
    c.box("scale", (88, 28, 12, 8), "scale each\nhead mean", "fixed")
    c.box("affinity", (120, 26, 12, 12), "patch affinity", side="s", matrix=True)
    c.arrow((16, 32), c.at("pool", "w"), shape=f"{s.layers} maps\n{shape(n, n)}", kind="stopped")
    c.arrow(c.at("pool", "e"), c.at("mlp", "w"), shape=f"v {k}", kind="stopped")
    c.arrow(c.at("mlp", "e"), c.at("scale", "w"), shape=f"v′ {k}")
    around = ((8, 40.5), (8, 42.5), (94, 42.5), c.at("scale", "n"))
    c.arrow(*around, kind="stopped", shape=f"{s.layers} maps {full}")
    c.arrow(
        c.at("scale", "e"), c.at("affinity", "w"), shape=f"mean over layers\n{shape(s.patches, s.patches)}"
    )


def _bars(c: Canvas, s: Shapes, given: Mapping[str, Any]) -> None:
    """Descriptor and weights, layer by layer."""
    affinity = given.get("affinity")
    if affinity is not None:
        with torch.no_grad():
            given = {"descriptor": affinity.descriptor()[0], "weights": affinity.weights[0]} | dict(given)
    for name, left in (("descriptor", 31), ("weights", 76)):
        values = to_numpy(given[name]) if name in given else None
        _bar_chart(c, s.layers, values, left, name == "weights")
    c.text((29, 2.7), "layer", 6, ha="right")
    c.arrow((69, 9), (74, 9), colour="#0173b2")


def _bar_chart(c: Canvas, layers: int, values: np.ndarray | None, left: float, weights: bool) -> None:
    """The deviation of v from its mean, or the weights v′; empty bars where the values are not known."""
    base, high, width = (4.0, 13.0, 36 / layers) if weights else (10.5, 6.5, 36 / layers)
    title = "v′: the weights that HAAF gives (mean 1)" if weights else "v: what HAAF sees, against its mean"
    shown = np.full(layers, 0.5) if values is None else values if weights else values / values.mean() - 1
    most = max(float(np.abs(shown).max()), 1e-12)
    style = {"facecolor": "#0173b2" if weights else "0.55", "edgecolor": "none"}
    if values is None:
        most, style = 1.0, {"facecolor": "white", "edgecolor": "0.6", "linestyle": ":"}
    for k, value in enumerate(shown):
        corner = (left + (k + 0.1) * width, base)
        c.ax.add_patch(Rectangle(corner, 0.8 * width, high * value / most, zorder=3, **style))
        c.text((left + (k + 0.5) * width, 2.7), str(k), 6)
    c.ax.plot((left, left + 36), (base, base), color="0.3", linewidth=1, zorder=4)
    c.text((left + 18, 19), title, 8)
    if values is None:
        return
    if weights:
        level = base + high / most
        c.ax.plot((left, left + 36), (level, level), color="0.3", linestyle=":", linewidth=1.2, zorder=4)
        c.text((left + 36.6, level), "1", 7, ha="left")
    else:
        c.text((left - 0.8, base + high), f"+{100 * most:.2g} %", 6, ha="right")
        c.text((left - 0.8, base), "mean", 6, ha="right")
