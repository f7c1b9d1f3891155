"""Image and mask files: what is read is checked, and what is wrong is said in one sentence.

Masks hold class ids: 0 background, 1..C the classes of a dataset in order, 255 ignore.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ssepa_lib.errors import UserError
from ssepa_lib.files import write_atomically

IGNORE = 255
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    struct.error,
    zlib.error,
) + (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises at a file that is missing, damaged, not an image, or far too large."""


def voc_palette() -> list[tuple[int, int, int]]:
    """The 256 RGB colours of VOC masks: the bits of an id go to the channels in turn, high bits first."""
    return [
        tuple(sum((i >> (3 * k + c) & 1) << (7 - k) for k in range(3)) for c in range(3)) for i in range(256)
    ]


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: transparent pixels lie on white, more than 8 bits are stretched from the
    image's own range to 0..255, and of an animation the first frame is taken."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float64))
        values = (values - values.min()) / max(values.max() - values.min(), 1e-12)
        return Image.fromarray((255 * values).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


def read_image(path: Path, upright: bool = False) -> Image.Image:
    """An image of any mode as RGB (see `as_rgb`); `upright` turns it as its EXIF tag says.

    Raises:
        UserError: the file is missing, truncated or not an image.
    """
    try:
        with Image.open(path) as file:
            return as_rgb(ImageOps.exif_transpose(file) if upright else file)
    except UNREADABLE as error:
        raise UserError(
            f"{path}: unreadable image ({error}); replace the file or take it out of the list."
        ) from error


def read_mask(path: Path, classes: int, size: tuple[int, int] | None = None) -> Tensor:
    """Class ids of a palette or greyscale PNG, uint8 [H, W]; the palette's colours do not matter.

    Args:
        classes: C; ids beyond it, other than 255, are refused.
        size: (width, height) of the image it belongs to, checked if given.

    Raises:
        UserError: the mask is unreadable, has more than one channel or another size, or holds an id out of
            range.
    """
    try:
        with Image.open(path) as file:
            mode = file.mode
            ids = np.array(file)
    except UNREADABLE as error:
        raise UserError(f"{path}: unreadable mask ({error}); unpack or write it again.") from error
    if mode not in ("P", "L"):
        raise UserError(
            f"{path}: mask has mode {mode}; save class ids as a palette (P) or greyscale (L) PNG."
        )
    if size is not None and ids.shape != size[::-1]:
        raise UserError(
            f"{path}: mask is {ids.shape[1]}×{ids.shape[0]} but its image {size[0]}×{size[1]} pixels; "
            "make them the same size."
        )
    wrong = (ids > classes) & (ids != IGNORE)
    if wrong.any():
        raise UserError(f"{path}: mask holds id {ids[wrong][0]}; allowed are 0..{classes} and {IGNORE}.")
    return torch.from_numpy(ids)


def write_mask(path: Path, ids: np.ndarray) -> None:
    """Write class ids [H, W] as a palette PNG in VOC's colours; the file appears complete or not at all."""
    image = Image.fromarray(ids.astype(np.uint8), mode="P")
    image.putpalette([value for colour in voc_palette() for value in colour])
    write_atomically(path, lambda part: image.save(part, format="PNG"))


def resize_mask(ids: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Class ids [H, W] at another size, (height, width) or that of a square; nearest neighbour, uint8."""
    return F.interpolate(ids[None, None].float(), size, mode="nearest")[0, 0].byte()


def classes_in(mask: Tensor, classes: int) -> Tensor:
    """Multi-hot label float [C] of the classes that a mask shows."""
    return (torch.bincount(mask.flatten().int(), minlength=256)[1 : classes + 1] > 0).float()
