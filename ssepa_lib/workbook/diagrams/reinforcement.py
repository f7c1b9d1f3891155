"""D4: feature self-reinforcement, teacher and student (FSR, Figure 2)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ssepa_lib.model import Network
from ssepa_lib.workbook.diagrams.canvas import STYLES, Canvas, shape
from ssepa_lib.workbook.diagrams.sizes import Shapes, shapes_of
from ssepa_lib.workbook.figures.images import to_numpy


def self_reinforcement(
    source: Shapes | Network,
    ax: Axes | None = None,
    highlight: str | None = None,
    images: Mapping[str, Any] | None = None,
) -> Axes:
    """A student that sees a masked view, and a teacher that sees both views whole (FSR, Section 3).

    Args:
        source: shapes of a run (`Shapes.of(network, recipe)`), or a network.
        ax: where to draw; None: a new figure.
        highlight: the box that is lit.
        images: `view1` and `view2` [3, H, W], and `mask` [N], true where a patch of view 2 is hidden.

    Raises:
        UserError: no box has the name to be highlighted.
    """
    s, given = shapes_of(source), dict(images or {})
    views = {
        f"{who}_{v}": given[v] for v in ("view1", "view2") if v in given for who in ("student", "teacher")
    }
    c = Canvas((138, 75), ax, highlight, views)
    hidden = to_numpy(given["mask"]).astype(bool) if "mask" in given else _example(s)
    _side(c, s, "student", "learned", {"view1": 6, "view2": 41})
    _side(c, s, "teacher", "teacher", {"view2": 86, "view1": 121})
    _hide(c, hidden.reshape(s.grid, s.grid))
    _student(c, s, int(hidden.sum()))
    _teacher(c, s, int(hidden.sum()))
    c.text((2, -2), s.letters + f"   E = {s.recipe.reinforce.outputs}", 7, ha="left")
    c.legend((2, -4.7), ("data", "learned", "teacher", "fixed", "loss"), ("gradient", "stopped"))
    return c.done()


def _example(s: Shapes) -> np.ndarray:
    """Blocks at random, as many as a recipe hides: bool [N]."""
    block = s.recipe.reinforce.mask_block
    side = -(-s.grid // block)
    chosen = np.zeros(side * side, bool)
    count = int(np.ceil(s.recipe.reinforce.mask_ratio * len(chosen)))
    chosen[np.random.default_rng(0).permutation(len(chosen))[:count]] = True
    blocks = chosen.reshape(side, side).repeat(block, 0).repeat(block, 1)
    return blocks[: s.grid, : s.grid].ravel()


def _side(c: Canvas, s: Shapes, who: str, kind: str, views: Mapping[str, float]) -> None:
    """Views, network and projector of the student or the teacher."""
    left = min(views.values()) - 4
    c.text((left + 27, 73.5), f"{who}", 8, weight="bold", color=STYLES[kind][1])
    for view, x in views.items():
        masked = ", masked" if who == "student" and view == "view2" else ""
        c.box(f"{who}_{view}", (x, 57, 11, 11), f"view {view[-1]}{masked}", side="n")
        c.arrow(
            (x + 5.5, 57),
            (x + 5.5, 52),
            kind="gradient" if who == "student" else "stopped",
            shape=shape(3, s.side, s.side),
        )
    c.box(who, (left, 46, 54, 6), "ViT of the " + who, kind)


def _hide(c: Canvas, hidden: np.ndarray) -> None:
    """Grey patches over the student's view 2."""
    x, y, w, h = c.boxes["student_view2"]
    side = (w - 0.8) / len(hidden)
    for row, column in np.argwhere(hidden):
        corner = (x + 0.4 + column * side, y + h - 0.4 - (row + 1) * side)
        c.ax.add_patch(
            Rectangle(corner, side, side, facecolor="0.55", edgecolor="0.55", linewidth=0.4, zorder=5)
        )


def _collector(s: Shapes) -> str:
    return {"mca": "MCA collects\na class token", "class_token": "class token"}.get(
        s.recipe.model.aggregator, "pooled\nclass token"
    )


def _student(c: Canvas, s: Shapes, hidden: int) -> None:
    """View 1 teaches what it taught before; masked view 2 has to answer the teacher."""
    config, tokens, e = s.recipe.reinforce, shape(s.patches, s.width), "E"
    c.box("others", (2, 33.5, 19, 5.5), "classifier, decoder:\nlosses of ToCo", "loss")
    c.box("student_mca", (25, 33.5, 13, 5.5), _collector(s), "learned")
    c.box("student_projector", (25, 22.5, 31, 5), "projector", "learned")
    c.box(
        "student_temperature",
        (25, 13.5, 31, 4),
        f"softmax at temperature {config.student_temperature:g}",
        "fixed",
    )
    c.box("cer", (65, 0.5, 10, 5), "$L_{cer}$", "loss")
    c.box("unc", (65, 8, 10, 5), "$L_{unc}$", "loss")
    c.arrow((11.5, 46), (11.5, 39), shape=tokens)
    c.arrow((31.5, 46), (31.5, 39), shape=tokens)
    c.arrow((31.5, 33.5), (31.5, 27.5), shape=shape(s.width))
    c.arrow((48, 46), (48, 27.5), shape=f"hidden patches\n{shape(hidden, s.width)}")
    c.arrow((31.5, 22.5), (31.5, 17.5), shape=f"[{e}]")
    c.arrow((48, 22.5), (48, 17.5), shape=f"[{hidden}, {e}]")
    c.arrow((31.5, 13.5), (31.5, 3), (65, 3), shape=f"class token of what is left [{e}]")
    c.arrow((48, 13.5), (48, 10.5), (65, 10.5), shape=f"hidden patches [{hidden}, {e}]", part=1)


def _teacher(c: Canvas, s: Shapes, hidden: int) -> None:
    """The average of the student; its answers are centred and sharpened."""
    config, tokens, stopped = s.recipe.reinforce, shape(s.patches, s.width), "stopped"
    low, high = config.teacher_temperature
    c.box("teacher_mca", (119.5, 33.5, 14, 5.5), _collector(s), "teacher")
    c.box("teacher_projector", (84, 22.5, 50, 5), "projector", "teacher")
    c.box("centre", (84, 13.5, 50, 4), f"minus centre, softmax at temperature {low:g} to {high:g}", "fixed")
    c.arrow(
        (56, 49),
        (82, 49),
        kind=stopped,
        colour=STYLES["teacher"][1],
        shape=f"moving average,\nmomentum {config.momentum:g} to 1",
    )
    c.arrow((91.5, 46), (91.5, 27.5), kind=stopped, shape=f"all patches\n{tokens}")
    c.arrow((126.5, 46), (126.5, 39), kind=stopped, shape=tokens)
    c.arrow((126.5, 33.5), (126.5, 27.5), kind=stopped, shape=shape(s.width))
    c.arrow((91.5, 22.5), (91.5, 17.5), kind=stopped, shape=f"[{s.patches}, E]")
    c.arrow((126.5, 22.5), (126.5, 17.5), kind=stopped, shape="[E]")
    c.arrow(
        (91.5, 13.5),
        (91.5, 10.5),
        (75, 10.5),
        kind=stopped,
        shape=f"same patches\n[{hidden}, E]",
        part=1,
        side="s",
    )
    c.arrow((126.5, 13.5), (126.5, 3), (75, 3), kind=stopped, shape="class token of view 1 [E]")
