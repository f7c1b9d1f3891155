"""D1, the whole pipeline of one training step (SS-EPA, Figure 1)."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from ssepa_lib.model import Network
from ssepa_lib.workbook.diagrams.canvas import Canvas, shape
from ssepa_lib.workbook.diagrams.sizes import Shapes, shapes_of

SIZE = (141, 77)


def pipeline(
    source: Shapes | Network,
    ax: Axes | None = None,
    highlight: str | None = None,
    images: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Axes:
    """From an image and its label to every loss (SS-EPA, Figure 1).

    Args:
        source: shapes of a run (`Shapes.of(network, recipe)`), or a network.
        ax: where to draw; None: a new figure.
        highlight: the box that is lit: "you are here".
        images: thumbnails by the name of their box: image [3, H, W]; cam, refined, aux_cam [h, w] in 0..1;
            attention, affinity [N, N]; pseudo_label, segmentation [H, W] class ids; and mask [H, W], which is
            crossed out.
        notes: short words at the upper right corner of boxes, such as the number of a notebook.

    Raises:
        UserError: no box has the name to be highlighted.
    """
    s = shapes_of(source)
    c = Canvas(SIZE, ax, highlight, images)
    _trunk(c, s)
    _classification(c, s)
    _refinement(c, s)
    _segmentation(c, s)
    _auxiliary(c, s)
    _frame(c, s)
    for name, words in (notes or {}).items():
        c.badge(name, words, (1, 1))
    return c.done()


def _trunk(c: Canvas, s: Shapes) -> None:
    """Image, patches, transformer, tokens."""
    c.box("image", (2, 36, 11, 11), "image", side="s")
    c.box("label", (2, 24, 11, 5), "image label")
    c.badge("label", "y")
    c.text((7.5, 21.8), "enters where y stands", 7)
    c.box("patches", (23, 38, 7, 7), "patches", side="s")
    c.box("vit", (40, 1, 10, 74), f"ViT\n{s.layers} blocks\n{s.heads} heads", "learned")
    c.box("tokens", (59, 49, 8, 13), "final\ntokens")
    if "image" in c.images:
        c.thumbnail(c.boxes["patches"], c.images["image"])
    x, y, w, h = c.boxes["patches"]
    for i in range(1, 4):
        c.ax.plot((x + i * w / 4,) * 2, (y, y + h), color="0.4", linewidth=0.8, zorder=5)
        c.ax.plot((x, x + w), (y + i * h / 4,) * 2, color="0.4", linewidth=0.8, zorder=5)
    c.arrow(c.at("image", "e"), c.at("patches", "w"), shape=shape(3, s.side, s.side))
    c.arrow(c.at("patches", "e"), (40, 41.5), shape=shape(s.patches, 3 * s.patch**2))
    c.arrow((50, 55.5), c.at("tokens", "w"), shape=shape(s.patches, s.width))


def _classification(c: Canvas, s: Shapes) -> None:
    """Main classifier: its scores teach, its map is read off."""
    c.box("classifier", (75.5, 51, 10, 9), "classifier", "learned")
    c.box("cls", (102, 55.5, 9, 5), "$L_{cls}$", "loss")
    c.box("cam", (76, 37, 9, 9), "CAM", side="s")
    c.badge("cls", "y")
    c.badge("cam", "y")
    c.arrow((67, 58), (75.5, 58), shape=f"max pool\n[{s.width}]")
    c.arrow((67, 53), (75.5, 53), shape=shape(s.patches, s.width), kind="stopped", side="s")
    c.arrow((85.5, 58), c.at("cls", "w"), shape=f"scores [{s.classes}]")
    c.arrow(c.at("classifier", "s"), c.at("cam", "n"), shape=shape(s.classes, s.grid, s.grid), kind="stopped")


def _refinement(c: Canvas, s: Shapes) -> None:
    """Attention, HAAF and affinity; CAM × affinity; pseudo-labels."""
    map_, full = shape(s.patches, s.classes), shape(s.classes, s.side, s.side)
    affinity = s.recipe.affinity
    c.box(
        "par",
        (122, 37.5, 14, 8),
        f"PAR, two\nthresholds\n{s.recipe.cam.low} and {s.recipe.cam.high}",
        "fixed",
    )
    c.box("pseudo_label", (124.5, 51.5, 9, 9), "pseudo-label", side="w", labels=True)
    c.arrow(c.at("par", "n"), c.at("pseudo_label", "s"), kind="argmax", shape=shape(s.side, s.side))
    if affinity.kind == "none":
        c.arrow(c.at("cam", "e"), c.at("par", "w"), shape=full, kind="stopped")
        return
    middle = (
        ("haaf", "HAAF", "learned") if affinity.kind == "haaf" else ("haaf", "mean over\nlayers", "fixed")
    )
    c.box("attention", (58, 24, 9, 9), "attention", side="s", matrix=True)
    c.box(middle[0], (73.5, 25, 9, 7), *middle[1:])
    c.box(
        "affinity",
        (90, 24, 9, 9),
        "patch affinity" + (", balanced" if affinity.balance else ""),
        side="s",
        matrix=True,
    )
    c.box("refined", (104, 37, 9, 9), "refined map", side="s")
    c.box("times", (92.75, 39.75, 3.5, 3.5), "×", "fixed")
    maps = shape(s.tokens, s.tokens)
    c.arrow((50, 28.5), c.at("attention", "w"), shape=f"{s.layers * s.heads} maps\n{maps}", kind="stopped")
    c.arrow(
        c.at("attention", "e"), c.at("haaf", "w"), shape=f"{s.layers} means\n{maps}", kind="stopped", side="n"
    )
    c.arrow(c.at("haaf", "e"), c.at("affinity", "w"), shape=shape(s.patches, s.patches), kind="stopped")
    c.arrow(c.at("affinity", "n"), c.at("times", "s"), shape=shape(s.patches, s.patches), kind="stopped")
    c.arrow(c.at("cam", "e"), c.at("times", "w"), shape=map_, kind="stopped")
    most = "up to " if affinity.coverage else ""
    again = f"{most}{affinity.iterations} times\n" if affinity.iterations > 1 else ""
    c.arrow(c.at("times", "e"), c.at("refined", "w"), shape=again + map_, kind="stopped")
    c.arrow(c.at("refined", "e"), c.at("par", "w"), shape=full, kind="stopped")
    if affinity.kind == "haaf" and affinity.haaf_objective != "none":
        c.box("haaf_loss", (72, 16.5, 12, 4), "$L_{HAAF}$: " + affinity.haaf_objective, "loss")
        c.arrow(c.at("haaf", "s"), c.at("haaf_loss", "n"), shape=f"v′ [{s.layers}]")


def _segmentation(c: Canvas, s: Shapes) -> None:
    """The decoder learns from the pseudo-label."""
    c.box("decoder", (75.5, 67, 10, 7), "decoder", "learned")
    c.box("segmentation", (93, 66, 9, 9), "segmentation", side="s", labels=True)
    c.box("seg", (122, 67.5, 14, 6), "$L_{seg}$, $L_{reg}$", "loss")
    c.arrow((63, 62), (63, 70.5), c.at("decoder", "w"), shape=shape(s.width, s.grid, s.grid), part=1)
    c.arrow(c.at("decoder", "e"), c.at("segmentation", "w"), shape=shape(s.classes + 1, s.grid, s.grid))
    c.arrow(c.at("segmentation", "e"), c.at("seg", "w"), shape=shape(s.classes + 1, s.side, s.side))
    c.arrow(c.at("pseudo_label", "n"), (129, 67.5), kind="argmax", shape=shape(s.side, s.side))


def _auxiliary(c: Canvas, s: Shapes) -> None:
    """The earlier block: its classifier, its map, and the two token contrasts or FSR."""
    block = str(s.recipe.model.aux_block).replace("-", "−")
    c.box("aux_tokens", (59, 2, 8, 9), f"tokens of\nblock {block}")
    c.box("aux_classifier", (75.5, 1.5, 10, 10), "auxiliary\nclassifier", "learned")
    c.box("aux_cam", (93, 5.5, 8.5, 8.5), "auxiliary CAM", side="n")
    c.box("token_labels", (109, 7, 9, 4.5), "token\nlabels", "fixed")
    c.box("ptc", (123, 7, 8, 4.5), "$L_{ptc}$", "loss")
    c.box("aux_cls", (123, 0.5, 8, 4.5), "$L_{m.cls}$", "loss")
    c.badge("aux_cls", "y")
    c.arrow((50, 6.5), c.at("aux_tokens", "w"), shape=shape(s.patches, s.width))
    c.arrow(c.at("aux_tokens", "e"), c.at("aux_classifier", "w"), shape=shape(s.patches, s.width))
    c.arrow((85.5, 9.5), (93, 9.5), shape=shape(s.classes, s.grid, s.grid), kind="stopped")
    c.arrow((85.5, 3), (123, 3), shape=f"max pool, scores [{s.classes}]", side="n")
    c.arrow((101.5, 9.2), (109, 9.2), kind="argmax", shape=shape(s.patches))
    c.arrow((118, 9.2), (123, 9.2), kind="argmax", shape=shape(s.patches))
    c.arrow((139, 9.2), (131, 9.2), shape="final\ntokens")
    _views(c, s)


def _views(c: Canvas, s: Shapes) -> None:
    """What teaches the class token: crops of the image, or FSR's teacher."""
    if s.recipe.losses.ctc > 0:
        views = 2 + s.recipe.contrast.local_crops
        c.box("crops", (111, 14.5, 9, 5), f"{views} views\nthrough ViT", "learned")
        c.box("ctc", (128, 14.5, 8, 5), "$L_{ctc}$", "loss")
        c.arrow(
            (101.5, 12.5), (103.5, 12.5), (103.5, 17), (111, 17), kind="stopped", shape=shape(s.side, s.side)
        )
        c.arrow(c.at("crops", "e"), c.at("ctc", "w"), shape=shape(views, s.width))
    elif s.recipe.self_reinforced:
        c.box("teacher", (111, 14.5, 11, 5), "teacher, and\nmasked view", "teacher")
        c.box("ctc", (129.5, 14.5, 10, 5), "$L_{unc}$, $L_{cer}$", "loss")
        c.arrow(
            (101.5, 12.5), (103.5, 12.5), (103.5, 17), (111, 17), kind="stopped", shape=shape(s.side, s.side)
        )
        c.arrow(c.at("teacher", "e"), c.at("ctc", "w"), shape=f"[{s.masked + 1}, E]")


def _frame(c: Canvas, s: Shapes) -> None:
    """Letters, legend, and the mask that enters nowhere."""
    c.crossed((2, 65, 9, 9), "the mask\nenters\nnowhere")
    c.text((2, -2), s.letters, 7, ha="left")
    c.legend((2, -4.7), ("data", "learned", "fixed", "loss"))


STRIP = {  # box of the strip → column, row from below, words, kind
    "image": (0, 1, "image", "data"),
    "vit": (1, 1, "ViT", "learned"),
    "tokens": (2, 1, "tokens", "data"),
    "classifier": (3, 1, "classifier", "learned"),
    "cam": (4, 1, "CAM", "data"),
    "refined": (5, 1, "refined map", "data"),
    "pseudo_label": (6, 1, "pseudo-label", "data"),
    "decoder": (7, 1, "decoder", "learned"),
    "losses": (8, 1, "losses", "loss"),
    "attention": (2, 0, "attention", "data"),
    "haaf": (3, 0, "HAAF", "learned"),
    "affinity": (4, 0, "affinity", "data"),
    "aux_cam": (6, 0, "auxiliary CAM", "data"),
    "contrast": (7, 0, "contrast", "loss"),
}


def you_are_here(highlight: str, ax: Axes | None = None) -> Axes:
    """The pipeline as a narrow strip with one box lit, for the head of a section.

    Args:
        highlight: image, vit, tokens, classifier, cam, refined, pseudo_label, decoder, losses, attention,
            haaf, affinity, aux_cam or contrast.

    Raises:
        UserError: no box has that name.
    """
    c = Canvas((138, 16), ax, highlight, margin=0)
    for name, (column, row, words, kind) in STRIP.items():
        c.box(name, (1 + 15.5 * column, 1.5 + 8 * row, 12, 5), words, kind)
    chain = [name for name, (_, row, _, _) in STRIP.items() if row]
    stopped = ("cam", "refined")
    for a, b in zip(chain, chain[1:], strict=False):
        kind = "argmax" if a == "pseudo_label" else "stopped" if b in stopped else "gradient"
        c.arrow(c.at(a, "e"), c.at(b, "w"), kind="stopped" if b == "pseudo_label" else kind)
    c.arrow(c.at("vit", "s"), (22.5, 4), c.at("attention", "w"), kind="stopped")
    c.arrow(c.at("attention", "e"), c.at("haaf", "w"), kind="stopped")
    c.arrow(c.at("haaf", "e"), c.at("affinity", "w"))
    c.arrow(c.at("affinity", "e"), (84.5, 4), c.at("refined", "s"), kind="stopped")
    c.arrow((88, 4), c.at("aux_cam", "w"), kind="stopped")  # from an earlier block
    c.arrow(c.at("aux_cam", "e"), c.at("contrast", "w"), kind="stopped")
    return c.done()
