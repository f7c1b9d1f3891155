"""Explorers: views of one image's affinity, maps and labels that a reader can work with.

Each function returns an `Explorer`: put it on the last line of a cell. It needs no network, and no kernel to
be looked at; what the reader chose can be read back (`view.patch`, `view.layer`, `mix.weights`). Masks larger
than 128 pixels are made smaller, and the scores are those of the smaller masks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssepa_lib.errors import UserError
from ssepa_lib.workbook import explorer_data as data
from ssepa_lib.workbook.explorer_host import Explorer
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
        arrays["object"] = data.patch_ids(data.mask_ids(mask, pixels), grid)
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
        "names": {data.existing_patch(patch, grid): str(name) for patch, name in (names or {}).items()},
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
        "size": data.reduced(np.zeros(pixels[0].shape[:2])).shape,
        "depth": products.shape[1],
        "images": [data.picture(image) for image in pixels],
        "presets": chosen,
        "most": max(3.0, *(max(weights) for weights in chosen.values())),
        "background": background,
    }
    return Explorer("mixer", "Layer mixer", arrays, spec, weights=chosen["uniform"])
