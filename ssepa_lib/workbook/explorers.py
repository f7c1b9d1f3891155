"""Explorers: views of one image's affinity, maps and labels that a reader can work with.

Each function returns an `Explorer`: put it on the last line of a cell. It needs no network, and no kernel to
be looked at; what the reader chose can be read back (`view.patch`, `view.layer`, `mix.weights`). Masks larger
than 128 pixels are made smaller, and the scores are those of the smaller masks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ipywidgets import Dropdown, HBox, VBox

from ssepa_lib.errors import UserError
from ssepa_lib.model import Attention
from ssepa_lib.workbook import explorer_data as data
from ssepa_lib.workbook.explorer_host import Explorer, display_both
from ssepa_lib.workbook.figures.images import Array, to_numpy


def microscope(
    image: Array,
    affinity: Any,
    *,
    cam: Array | None = None,
    mask: Array | None = None,
    start: int = 0,
    names: Mapping[int, str] | None = None,
) -> Explorer:
    """From where a patch receives, and where it gives to, layer by layer.

    Args:
        image: [3, S, S], 0..255.
        affinity: `PatchAffinity` or `MatrixAffinity` of this one image (batch 1).
        cam: [N] or [h, w], not negative; adds the product row · CAM, term by term.
        mask: [S, S] class ids, 0 background, 255 ignored; adds how much stays on the patch's own object.
        start: the patch shown first, 0..N-1.
        names: patch → its name.

    Raises:
        UserError: shapes that do not fit, more than one image, a patch out of range, negative affinities.
    """
    pixels = data.image_pixels(image)
    dense, grid = data.dense_affinity(affinity)
    arrays = {}
    if mask is not None:
        arrays["object"] = data.patch_objects(mask, pixels, grid)
    if cam is not None:
        arrays["cam"] = data.patch_map(cam, grid, "the CAM")
    layers, maps, weights = data.layer_maps(affinity, dense)
    arrays |= data.row_facts(maps if weights is None else [dense, *maps], grid, arrays.get("object"))
    arrays["codes"], arrays["scales"] = data.quantise(np.stack(maps))
    spec = {
        "grid": grid,
        "image": data.picture(pixels),
        "layers": layers,
        "weights": weights,
        "names": data.patch_names(names, grid),
        "prefix": weights is not None and affinity.attention.num_prefix_tokens > 0,
    }
    return Explorer("microscope", "Affinity microscope", arrays, spec, patch=data.existing_patch(start, grid))


def mixer(
    images: Array | Sequence[Array],
    products: Array,
    masks: Sequence[Array] | None,
    *,
    presets: Mapping[str, Array] | None = None,
    parts: Sequence[Array] | None = None,
    background: float = 0.5,
) -> Explorer:
    """A refined map built with the reader's own layer weights, scored while the sliders move.

    Args:
        images: [n, 3, S, S], 0..255.
        products: [n, K, N], each layer's affinity × CAM of the shown class (`PatchAffinity.per_layer`).
        masks: per image [S, S]; 0 background, 255 ignored, any other id the object; None: no scores.
        presets: name → K layer weights; "uniform" is always there.
        parts: per image [S, S], 0 ground, 1 head, 2 body; adds the share of each.
        background: threshold at the start, 0.05..0.95.

    Raises:
        UserError: shapes that do not fit, or weights that are negative.
    """
    pixels = [data.image_pixels(image) for image in images]
    products = np.asarray(to_numpy(products), np.float32)
    if products.ndim != 3 or len(products) != len(pixels):
        raise UserError(
            f"the products have the shape {list(products.shape)}; they must be [n, K, N] with n = "
            f"{len(pixels)}, K maps per image."
        )
    arrays = {"products": products}
    if masks is not None:
        arrays["masks"] = data.stacked_masks(masks, pixels, data.object_ids, "masks")
    if parts is not None:
        arrays["parts"] = data.stacked_masks(parts, pixels, data.part_ids, "parts")
    chosen = data.layer_weights(presets or {}, products.shape[1])
    spec = {
        "grid": data.grid_of(products.shape[2], pixels[0]),
        "size": data.reduced_size(pixels[0]),
        "depth": products.shape[1],
        "images": [data.picture(image) for image in pixels],
        "presets": chosen,
        "most": max(3.0, *(max(weights) for weights in chosen.values())),
        "background": background,
    }
    return Explorer("mixer", "Layer mixer", arrays, spec, weights=chosen["uniform"])


def thresholds(
    image: Array,
    cam: Array,
    *,
    refined: Array | None = None,
    mask: Array | None = None,
    classes: Sequence[str] | None = None,
    kinds: tuple[str, str] = ("CAM", "refined"),
) -> Explorer:
    """From a map to labels: two thresholds, what lies between them ignored.

    Args:
        image: [3, S, S], 0..255.
        cam: [h, w] in 0..1, or [C, h, w] with one map per class.
        refined: the same after the affinity or PAR, [h', w'] or [C, h', w']; to switch to.
        mask: [S, S]; 0 background, 255 ignored, 1..C in the order of the maps (one map: any id).
        classes, kinds: C names; what the two maps are called.

    Raises:
        UserError: shapes that do not fit, or values outside 0..1.
    """
    pixels = data.image_pixels(image)
    size = data.reduced_size(pixels)
    maps = [data.unit_map(values, size) for values in (cam, refined) if values is not None]
    count = len(maps[0])
    names = list(classes or [f"class {i + 1}" for i in range(count)])
    if len(names) != count or any(len(m) != count for m in maps):
        raise UserError(f"there are {len(names)} class names for {count} maps; give one name per map.")
    arrays = {"maps": np.stack(maps)}
    if mask is not None:
        ids = data.mask_ids(mask, pixels)
        arrays["mask"] = data.reduced(data.object_ids(ids) if count == 1 else ids)
    spec = {"size": size, "image": data.picture(pixels), "kinds": list(kinds[: len(maps)]), "classes": names}
    return Explorer("thresholds", "From map to labels", arrays, spec, thresholds=[0.7, 0.25])


def propagation(
    image: Array, affinity: Any, *, cam: Array, mask: Array | None = None, steps: int = 16
) -> Explorer:
    """The affinity applied again and again, to the CAM or to one patch.

    Args:
        image: [3, S, S], 0..255.
        affinity: `PatchAffinity` or `MatrixAffinity` of this one image; one iteration of it is a step.
        cam: [N] or [h, w], not negative.
        mask: [S, S]; 0 background, 255 ignored, any other id the object; adds the IoU.
        steps: the most that can be chosen.

    Raises:
        UserError: shapes that do not fit, more than one image, negative affinities.
    """
    pixels = data.image_pixels(image)
    dense, grid = data.dense_affinity(affinity)
    codes, scales = data.quantise(dense, "uint16")
    arrays = {"cam": data.patch_map(cam, grid, "the CAM"), "scales": scales, "codes": codes}
    if mask is not None:
        arrays["mask"] = data.reduced(data.object_ids(data.mask_ids(mask, pixels)))
    size = data.reduced_size(pixels)
    spec = {"grid": grid, "size": size, "image": data.picture(pixels), "steps": steps}
    start = int(arrays["cam"].argmax())
    return Explorer("propagation", "Propagation, step by step", arrays, spec, patch=start, step=1)


class Chooser(VBox):
    """Menus above an explorer; `view` is the explorer, `chosen` what the menus say."""

    def __init__(self, make: Callable[..., Explorer], choices: Mapping[str, Sequence[Any]]):
        menus = {name: Dropdown(options=list(options), description=name) for name, options in choices.items()}
        self.menus = menus
        self.view = make(**self.chosen)
        for menu in menus.values():
            menu.observe(lambda change: self.view.show(make(**self.chosen)), "value")
        super().__init__([HBox(list(menus.values()), layout={"flex_flow": "row wrap"}), self.view])

    @property
    def chosen(self) -> dict[str, Any]:
        """Name of a menu → its value."""
        return {name: menu.value for name, menu in self.menus.items()}

    def _ipython_display_(self) -> None:
        display_both(self, self.view.frozen())


def chooser(make: Callable[..., Explorer], **choices: Sequence[Any]) -> Chooser:
    """An explorer whose run, image or class is chosen from menus; every choice runs `make` in Python.

    Without a kernel the explorer of the first choices is shown, without menus.

    Args:
        make: called with one value per menu, by name; returns the explorer.
        choices: name of a menu → its values, at least one; the first ones are shown first.

    Raises:
        UserError: a menu without a value.
    """
    for name, options in choices.items():
        if not len(options):
            raise UserError(f"there is nothing to choose from for '{name}'; give at least one value.")
    return Chooser(make, choices)


MAPS = {
    "cam": "CAM",
    "aux_cam": "auxiliary CAM",
    "refined": "refined map",
    "pseudo_label": "pseudo-label",
}  # key of a snapshot → caption


def timeline(image: Array, snapshots: Sequence[Mapping[str, Any]], history: Any) -> Explorer:
    """How the maps of one image grow while a network is trained, beside the losses.

    Args:
        image: [3, S, S], 0..255.
        snapshots: per snapshot `step` and any of `cam`, `aux_cam`, `refined` ([h, w] in 0..1) and
            `pseudo_label` (ids [H, W], 255 ignored); the same keys and shapes in each.
        history: `history.csv` as a table, with the column `step` and one column per loss.

    Raises:
        UserError: no snapshot, or snapshots that differ in keys or shapes.
    """
    pixels = data.image_pixels(image)
    keys = [key for key in MAPS if snapshots and key in snapshots[0]]
    if not keys or any(set(s) != set(snapshots[0]) for s in snapshots):
        raise UserError(f"every snapshot needs a step and the same maps, of {', '.join(MAPS)}.")
    arrays, maps = {}, {}
    for key in keys:
        shapes = {to_numpy(s[key]).shape for s in snapshots}
        if len(shapes) > 1:
            raise UserError(f"{key} changes its shape between snapshots: {sorted(shapes)}; keep one size.")
        each = [s[key] for s in snapshots]
        labels = key == "pseudo_label"
        arrays[MAPS[key]] = np.stack(
            [data.reduced(to_numpy(m)) if labels else data.unit_map(m) for m in each]
        )
        maps[MAPS[key]] = {"size": arrays[MAPS[key]].shape[-2:], "labels": labels}
    spec = {
        "image": data.picture(pixels),
        "steps": [int(s["step"]) for s in snapshots],
        "maps": maps,
        "history": data.loss_curves(history),
    }
    return Explorer("timeline", "Training, step by step", arrays, spec, step=len(snapshots) - 1)


def masks(
    image: Array,
    activation: Array,
    edges: Array,
    order: Array,
    *,
    grid: tuple[int, int] | None = None,
    ratio: float = 0.4,
    uncertain: tuple[float, float] = (0.2, 0.7),
) -> Explorer:
    """Which blocks FSR hides from the student (`fsr.mask_blocks`), for every way of selecting them.

    Args:
        image: [3, S, S], 0..255.
        activation: [rows, columns] or flat, 0..1; the auxiliary CAM, its maximum over the classes.
        edges: the same; strength of the image gradient (`fsr.edge_strength`).
        order: the same; a random number 0..1 per block.
        grid: rows and columns of blocks where the three are flat.
        ratio: share of the blocks that is masked at the start.
        uncertain: a block is uncertain between these two values.

    Raises:
        UserError: shapes that do not fit.
    """
    pixels = data.image_pixels(image)
    arrays = {}
    for name, values in (("activation", activation), ("edges", edges), ("order", order)):
        arrays[name], grid = data.blocks(values, grid, name)
    spec = {"grid": grid, "image": data.picture(pixels), "ratio": ratio}
    return Explorer("masks", "What the student does not see", arrays, spec, thresholds=list(uncertain))


def heads(
    image: Array,
    attention: Attention,
    *,
    mask: Array | None = None,
    start: int = 0,
    names: Mapping[int, str] | None = None,
) -> Explorer:
    """Every head of every layer: how widely it looks, and from where one patch receives in it.

    Args:
        image: [3, S, S], 0..255.
        attention: of this one image (batch 1).
        mask: [S, S] class ids, 0 background, 255 ignored; adds how much stays on the patch's own object.
        start: the patch shown first, 0..N-1.
        names: patch → its name.

    Raises:
        UserError: shapes that do not fit, more than one image, a patch out of range.
    """
    pixels, grid = data.image_pixels(image), attention.grid
    layers, maps, arrays = data.head_maps(attention)
    if mask is not None:
        arrays["own"] = data.row_facts(maps, grid, data.patch_objects(mask, pixels, grid))["own"]
    arrays["codes"], arrays["scales"] = data.quantise(maps)
    spec = {
        "grid": grid,
        "image": data.picture(pixels),
        "layers": layers,
        "heads": attention.heads,
        "limit": float(np.log(attention.patches + attention.num_prefix_tokens)),
        "prefix": attention.num_prefix_tokens > 0,
        "names": data.patch_names(names, grid),
    }
    shown = {"patch": data.existing_patch(start, grid), "layer": layers[-1]}
    return Explorer("heads", "Every head of every layer", arrays, spec, **shown)


def memory(
    *,
    side: int = 448,
    batch: int = 1,
    layers: int = 12,
    heads: int = 12,
    width: int = 768,
    patch: int = 16,
    prefix: int = 1,
    budget: int = 24,
) -> Explorer:
    """What the encoder and the maps of the affinity take, by formula (`memory_study.step_bytes`).

    Args:
        side, batch, layers, heads: S, B, K, H at the start; all of them can be changed.
        width, patch, prefix: D, side of a patch in pixels, P.
        budget: memory at the start, GB of 10⁹ bytes.

    Raises:
        UserError: a size below 1.
    """
    given = {"side": side, "batch": batch, "layers": layers, "heads": heads, "budget": budget}
    sliders = data.memory_sliders(given, {"width": width, "patch": patch})
    spec = {"sliders": sliders, "width": width, "patch": patch, "prefix": prefix}
    return Explorer("memory", "What fits into memory", {}, spec)
