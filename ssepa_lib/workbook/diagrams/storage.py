"""D5: what the affinity keeps in memory, drawn to scale (SS-EPA, Table 4)."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ssepa_lib.evaluation.memory import affinity_map_bytes
from ssepa_lib.model import Network
from ssepa_lib.workbook.diagrams.canvas import Canvas, shape
from ssepa_lib.workbook.diagrams.sizes import Shapes, shapes_of

ROWS_AT_ONCE = 16  # of the matrix-free product, as drawn


def memory(
    source: Shapes | Network,
    ax: Axes | None = None,
    highlight: str | None = None,
    images: Mapping[str, Any] | None = None,
) -> Axes:
    """The maps of one image under the three strategies, a tile for every T×T map, and the tokens to scale.

    Args:
        source: shapes of a run (`Shapes.of(network, recipe)`), or a network.
        ax: where to draw; None: a new figure.
        highlight: the box that is lit: stack_heads, stack_layers, matrix_free or tokens.
        images: not used; all diagrams take the same arguments.

    Raises:
        UserError: no box has the name to be highlighted.
    """
    s = shapes_of(source)
    c = Canvas((138, 48), ax, highlight, None, margin=4)
    tile, top = min(36 / s.layers, 44 / s.heads), 44  # side of a T×T map, units
    wide = {"stack_heads": tile * s.heads, "stack_layers": tile, "matrix_free": tile}
    wide["tokens"] = tile * s.width / s.tokens
    gap = (130 - sum(max(w, 20) for w in wide.values())) / 3
    left, x = {}, 5.0
    for name, w in wide.items():
        left[name] = x
        x += max(w, 20) + gap
    _tiles(c, "stack_heads", (left["stack_heads"], top), tile, s.heads, s.layers)
    _tiles(c, "stack_layers", (left["stack_layers"], top), tile, 1, s.layers)
    _tiles(c, "matrix_free", (left["matrix_free"], top), tile, 1, 1)
    c.box("tokens", (left["tokens"], top - tile, wide["tokens"], tile), "")
    c.text((3.8, top - tile * s.layers / 2), f"{s.layers} layers", 7, rotation=90)
    c.text((5 + tile * s.heads / 2, top + 1.3), f"{s.heads} heads", 7)
    c.text((left["stack_layers"] + tile / 2, top + 1.3), "head mean", 7)
    _slide(c, left["matrix_free"], top, tile, s.tokens)
    _words(c, s, left, top - tile * s.layers)
    c.text((2, -2), s.letters + f"   one tile: one map {shape(s.tokens, s.tokens)}", 7, ha="left")
    return c.done()


def _slide(c: Canvas, x: float, top: float, tile: float, tokens: int) -> None:
    """The rows that exist at one moment, and where they move."""
    share = min(ROWS_AT_ONCE / tokens, 1)
    corner = (x, top - 0.6 * tile)
    c.ax.add_patch(Rectangle(corner, tile, max(share * tile, 0.25), facecolor="#0173b2", zorder=4))
    c.arrow((x + 1.2 + tile, top), (x + 1.2 + tile, top - tile), colour="#0173b2")
    words = f"{ROWS_AT_ONCE} rows at a\ntime: the map\nnever exists"
    c.text((x + 2.5 + tile, top - tile / 2), words, 7, ha="left")


def _tiles(c: Canvas, name: str, at: tuple[float, float], tile: float, columns: int, rows: int) -> None:
    """So many maps side by side, below a point."""
    x, y = at[0], at[1] - tile * rows
    c.box(name, (x, y, tile * columns, tile * rows), "", "fixed" if name != "matrix_free" else "data")
    for i in range(1, columns):
        c.ax.plot((x + i * tile,) * 2, (y, y + tile * rows), color="0.45", linewidth=0.7, zorder=4)
    for i in range(1, rows):
        c.ax.plot((x, x + tile * columns), (y + i * tile,) * 2, color="0.45", linewidth=0.7, zorder=4)


def _words(c: Canvas, s: Shapes, left: Mapping[str, float], bottom: float) -> None:
    """The formula and the size of every rectangle, in float32 for one image."""
    stacked = {
        name: affinity_map_bytes(1, s.tokens, s.layers, s.heads, name)
        for name in ("stack_heads", "stack_layers")
    }
    rows = min(ROWS_AT_ONCE, s.tokens)
    named = {
        "stack_heads": ("every head: K·H·T²", stacked["stack_heads"]),
        "stack_layers": ("head means: K·T²", stacked["stack_layers"]),
        "matrix_free": (f"matrix-free: {rows}·T", 4 * rows * s.tokens),
        "tokens": ("tokens: T·D", 4 * s.tokens * s.width),
    }
    for name, (formula, size) in named.items():
        c.text((left[name], bottom - 1.6), formula, 8, ha="left", va="top")
        c.text((left[name], bottom - 4.8), _bytes(size), 8, ha="left", va="top", weight="bold")


def _bytes(size: float) -> str:
    """A size in kB, MB or GB, of three digits."""
    power = 1 if size < 1e6 else 2 if size < 1e9 else 3
    return f"{size / 1000**power:.3g} {('kB', 'MB', 'GB')[power - 1]}"
