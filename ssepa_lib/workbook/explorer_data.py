"""What an explorer sends: arguments checked in one sentence, shapes made alike, numbers made small."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ssepa_lib.data import IGNORE
from ssepa_lib.errors import UserError, require_index
from ssepa_lib.evaluation.attention import attention_entropy, map_statistics, patch_distances
from ssepa_lib.evaluation.maps import patch_ids
from ssepa_lib.model import Attention
from ssepa_lib.workbook.explorer_host import LIMIT
from ssepa_lib.workbook.figures.images import Array, to_numpy, to_pixels

SIDE = 128  # pixels of the longer side of what is scored
TOP = {"uint8": 255, "uint16": 65535}


def image_pixels(image: Array) -> np.ndarray:
    """One image [3, H, W] in 0..255 as uint8 [H, W, 3]."""
    pixels = to_numpy(image)
    if pixels.ndim != 3 or 3 not in (pixels.shape[0], pixels.shape[-1]):
        raise UserError(
            f"the image has the shape {list(pixels.shape)}; an explorer shows one image [3, S, S] in 0..255."
        )
    return to_pixels(pixels)


def mask_ids(mask: Array, image: np.ndarray) -> np.ndarray:
    """Ids of a mask as large as its image, uint8 [H, W]."""
    ids = to_numpy(mask)
    if ids.shape != image.shape[:2]:
        raise UserError(
            f"a mask has the shape {list(ids.shape)}, but its image is {list(image.shape[:2])}; "
            "resize one of them (`study.samples` returns both alike)."
        )
    return ids.astype(np.uint8)


def patch_objects(mask: Array, image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The commonest id of each patch (`evaluation.maps.patch_ids`), uint8 [N]."""
    ids = torch.from_numpy(mask_ids(mask, image))
    return patch_ids(ids, grid).flatten().numpy().astype(np.uint8)


def object_ids(ids: np.ndarray) -> np.ndarray:
    """0 background, 1 any class, 255 ignored."""
    return np.where(ids == IGNORE, IGNORE, ids > 0)


def part_ids(ids: np.ndarray) -> np.ndarray:
    """0 ground, 1 head, 2 body, as they are."""
    if ids.max() > 2:
        raise UserError(f"a part mask holds the id {ids.max()}; 0 is ground, 1 head and 2 body.")
    return ids


def stacked_masks(
    masks: Sequence[Array], images: Sequence[np.ndarray], convert: Callable, what: str
) -> np.ndarray:
    """One reduced mask per image, uint8 [n, h, w]."""
    if len(masks) != len(images):
        raise UserError(f"there are {len(masks)} {what} for {len(images)} images; give one each.")
    pairs = zip(masks, images, strict=True)
    return np.stack([reduced(convert(mask_ids(mask, image))) for mask, image in pairs])


def dense_affinity(affinity: Any) -> tuple[np.ndarray, tuple[int, int]]:
    """The affinity of one image as a matrix [N, N] without negative entries, and its grid (h, w)."""
    if not hasattr(affinity, "dense"):
        raise UserError(
            f"the affinity is a {type(affinity).__name__}; give a PatchAffinity, such as "
            "refiner.affinity(output.attention), or MatrixAffinity(matrix)."
        )
    dense = affinity.dense()
    if len(dense) != 1:
        raise UserError(
            f"the affinity belongs to {len(dense)} images; an explorer shows one: pass the attention of one "
            "image, attention[0:1]."
        )
    matrix = not_negative(to_numpy(dense[0]))
    known = getattr(getattr(affinity, "attention", None), "grid", None)
    return matrix, tuple(known) if known else grid_of(len(matrix))


def not_negative(matrix: np.ndarray) -> np.ndarray:
    """The matrix, if explorers can show it."""
    if not np.isfinite(matrix).all() or matrix.min() < 0:
        raise UserError("the affinity has negative or infinite entries; show that of probabilities.")
    return matrix


def grid_of(patches: int, image: np.ndarray | None = None) -> tuple[int, int]:
    """The grid (h, w) that so many patches fill; square, or of the image's aspect ratio."""
    aspect = 1 if image is None else image.shape[0] / image.shape[1]
    rows = max(1, round((patches * aspect) ** 0.5))
    if patches % rows:
        raise UserError(f"{patches} patches do not fill a grid of the image's shape; use a square image.")
    return rows, patches // rows


def existing_patch(patch: int, grid: tuple[int, int]) -> int:
    """The patch, if it is one of the grid's."""
    require_index("patch", patch, grid[0] * grid[1])
    return int(patch)


def patch_names(names: Mapping[int, str] | None, grid: tuple[int, int]) -> dict[int, str]:
    """Names by patch, of patches that are in the grid."""
    return {existing_patch(patch, grid): str(name) for patch, name in (names or {}).items()}


def patch_map(values: Array, grid: tuple[int, int], what: str) -> np.ndarray:
    """A map [N] or [h, w] as float32 [N]."""
    found = np.asarray(to_numpy(values), np.float32)
    if found.size != grid[0] * grid[1]:
        raise UserError(
            f"{what} has the shape {list(found.shape)}; it must have one value per cell of {list(grid)}."
        )
    return found.ravel()


def unit_map(values: Array, size: tuple[int, int] | None = None) -> np.ndarray:
    """Maps [..., h, w] in 0..1 as codes uint8 [..., h, w], code / 255; with a size, resized bilinearly."""
    maps = torch.as_tensor(to_numpy(values)).float()
    if maps.ndim < 2 or not bool(torch.isfinite(maps).all()) or maps.min() < -1e-3 or maps.max() > 1 + 1e-3:
        raise UserError("a map must be [h, w] with values in 0..1; normalise it first (`normalise_cam`).")
    if size is not None:
        maps = F.interpolate(maps.reshape(1, -1, *maps.shape[-2:]), size, mode="bilinear")[0]
    return (255 * maps.clamp(0, 1)).round().byte().numpy()


def blocks(values: Array, grid: tuple[int, int] | None, what: str) -> tuple[np.ndarray, tuple[int, int]]:
    """One number per block, float32 [M], and the grid of blocks (rows, columns)."""
    found = np.asarray(to_numpy(values), np.float32)
    grid = grid or (found.shape if found.ndim == 2 else None)
    if grid is None:
        raise UserError(f"{what} is flat; give it as [rows, columns], or name the grid of blocks.")
    return patch_map(found, grid, what), tuple(grid)


def layer_weights(presets: Mapping[str, Array], depth: int) -> dict[str, list[float]]:
    """Named layer weights [K]; "uniform" is the first."""
    chosen = {}
    for name, weights in {"uniform": np.ones(depth), **presets}.items():
        found = [float(w) for w in np.ravel(to_numpy(torch.as_tensor(weights)))]
        if len(found) != depth or min(found) < 0 or sum(found) <= 0:
            raise UserError(
                f"the preset '{name}' has {len(found)} weights; give {depth}, none negative, not all zero."
            )
        chosen[str(name)] = found
    return chosen


def reduced_size(image: np.ndarray) -> tuple[int, int]:
    """Height and width of an image or mask [H, W, …] whose longer side is made at most SIDE."""
    height, width = image.shape[:2]
    factor = min(1, SIDE / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def reduced(ids: np.ndarray) -> np.ndarray:
    """Ids [H, W] in their `reduced_size`, by the nearest neighbour."""
    size = reduced_size(ids)[::-1]
    return np.asarray(Image.fromarray(ids.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))


def picture(pixels: np.ndarray) -> str:
    """An image as a data URL of a JPEG, its longer side at most 2·SIDE."""
    small = Image.fromarray(pixels)
    small.thumbnail((2 * SIDE, 2 * SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def quantise(matrices: np.ndarray, kind: str = "uint8") -> tuple[np.ndarray, np.ndarray]:
    """Matrices [..., N, N] of non-negative numbers as whole numbers, with one scale per row.

    Returns:
        codes of type `kind`, and scales float32 [..., N]: an entry is code · scale / TOP[kind], exact to
        half a code, 1/510 of the row's largest entry for uint8.
    """
    scales = matrices.max(-1)
    codes = np.rint(matrices / np.maximum(scales, 1e-30)[..., None] * TOP[kind])
    return codes.astype(kind), scales.astype(np.float32)


def shown_layers(attention: Attention, count: int) -> list[int]:
    """So many layers, evenly spaced; says so where that is not all of them."""
    if count < attention.depth:
        print(f"{count} of {attention.depth} layers are shown: {attention.patches} patches make large maps.")
    return np.unique(np.linspace(0, attention.depth - 1, count).round().astype(int)).tolist()


def layer_maps(affinity: Any, dense: np.ndarray) -> tuple[list, list[np.ndarray], list[float] | None]:
    """Which layers can be chosen (None: all of them), the matrices to send, and how to mix all of them.

    The mean over the layers is mixed in the browser where every layer fits; otherwise it is sent as it is,
    and as many layers as fit, evenly spaced.
    """
    attention = getattr(affinity, "attention", None)
    if attention is None:
        return [None], [dense], None
    first, room = attention.num_prefix_tokens, int(0.7 * LIMIT) // dense.size
    mixable = not affinity.balance and attention.depth <= room
    count = attention.depth if mixable else max(0, min(attention.depth, room - 1))
    layers = shown_layers(attention, count)
    maps = [affinity.layer_map(k)[0].mean(0)[first:, first:].detach() for k in layers]
    maps = [not_negative(to_numpy(m)) for m in maps]
    if mixable:
        return [None, *layers], maps, [float(w) for w in affinity.weights[0].detach()]
    return [None, *layers], [dense, *maps], None


def row_facts(
    maps: Sequence[np.ndarray], grid: tuple[int, int], ids: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Exact numbers about every row, float32 [maps · N] each.

    `received` and `given` are the sums of row and column, `entropy` (nats) and `distance` (patches) those of
    the row made to sum to one, `own` its share on patches of the same id.
    """
    stack = torch.from_numpy(np.stack(maps)).double()
    rows = stack / stack.sum(-1, keepdim=True).clamp_min(1e-12)
    facts = {"received": stack.sum(-1), "given": stack.sum(-2), "entropy": attention_entropy(rows)}
    facts["distance"] = (rows * patch_distances(grid, (1, 1))).sum(-1)
    if ids is not None:
        same = torch.from_numpy(ids[:, None] == ids)
        facts["own"] = (rows * same).sum(-1)
    return {name: value.numpy().astype(np.float32).ravel() for name, value in facts.items()}


def loss_curves(history: Any, rows: int = 200) -> dict[str, Any]:
    """A table of losses for JSON: `step` and `terms`, name → values, None where there is none."""
    table = history.iloc[:: max(1, -(-len(history) // rows))]
    columns = [c for c in table if c not in ("step", "seconds", "lr") and table[c].notna().any()]

    def numbers(column: str) -> list[float | None]:
        return [float(f"{x:.4g}") if np.isfinite(x) else None for x in table[column].astype(float)]

    return {"step": [int(s) for s in table["step"]], "terms": {c: numbers(c) for c in columns}}


def head_maps(attention: Attention) -> tuple[list[int], np.ndarray, dict[str, np.ndarray]]:
    """Patch-to-patch maps of every head of one image, of as many layers as fit, evenly spaced.

    Returns:
        The layers, the maps [layers · H, N, N], and per map `entropy` (nats), `distance` (patches) and
        `class_mass` (0..1, 0 without a class token), float32.
    """
    if len(attention.queries[0]) != 1:
        raise UserError("the attention belongs to several images; pass that of one image, attention[0:1].")
    p, room = attention.num_prefix_tokens, int(0.7 * LIMIT) // (attention.heads * attention.patches**2)
    layers = shown_layers(attention, max(1, min(attention.depth, room)))
    maps = [attention.layer_map(k)[0].detach().cpu() for k in layers]  # [H, T, T] each
    numbers = torch.cat([map_statistics(m, patch_distances(attention.grid, (1, 1)), p) for m in maps])
    facts = numbers.nan_to_num().numpy().astype(np.float32).T
    named = dict(zip(("entropy", "distance", "class_mass"), facts, strict=True))
    return layers, torch.cat([m[:, p:, p:] for m in maps]).numpy(), named


def memory_sliders(given: Mapping[str, int], fixed: Mapping[str, int]) -> dict[str, list]:
    """Label, [lowest, highest, step] and start of every size that can be changed; all sizes from 1 on."""
    for name, size in {**given, **fixed}.items():
        if size < 1:
            raise UserError(f"{name} is {size}; it must be at least 1.")
    patch = fixed["patch"]
    ranges = {
        "side": ("image side, pixels", patch, 1536),
        "batch": ("images per step", 1, 16),
        "layers": ("layers K", 1, 24),
        "heads": ("heads H", 1, 24),
        "budget": ("memory, GB", 1, 80),
    }
    return {
        name: [label, [step, max(most, given[name]), step], given[name]]
        for name, (label, step, most) in ranges.items()
    }
