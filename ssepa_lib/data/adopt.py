"""A folder that `FolderDataset` reads, made of the usable images of somebody's own folder."""

import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ssepa_lib.data.images import IMAGE_SUFFIXES, as_rgb, read_mask, write_mask
from ssepa_lib.data.survey import Photo, Survey
from ssepa_lib.errors import UserError
from ssepa_lib.files import write_atomically, write_csv, write_text

LARGEST = 1024  # pixels of the longer side that a copy may have


def adopt(found: Survey, out: Path | str) -> Path:
    """Copy the usable images of a survey into a folder that `FolderDataset` reads.

    Images that are plain and not larger than 1024 pixels are copied as they are; others are saved as JPEG,
    upright and at most that large, and their masks with them. A folder that was written before, from the
    same images, labels and masks, is used again.

    Returns:
        `<out>/<name of the folder>-<key>`, with `images/`, `labels.csv`, `classes.txt` and `masks/`.

    Raises:
        UserError: no image of the survey is usable, or none shows a class.
    """
    if not any(photo.classes for photo in found.photos):
        raise UserError(f"{found.root}: no usable image shows a class; correct what the check table lists.")
    safe = re.sub(r"[^\w-]+", "_", found.root.name) or "images"
    folder = Path(out) / f"{safe}-{found.key}"
    if (folder / "labels.csv").is_file():  # written last
        return folder
    splits = {photo.split for photo in found.photos}
    rows, taken = [], set()
    for photo in found.photos:
        stem = photo.stem
        while stem.casefold() in taken:
            stem += "_"
        taken.add(stem.casefold())
        name = _copy(photo, folder / "images", stem)
        if photo.name in found.masks:
            _copy_mask(found, photo, folder / "masks" / f"{stem}.png")
        label = ";".join(photo.classes) or "background"
        rows.append([name, label, photo.split] if {"train", "val"} <= splits else [name, label])
    write_text(folder / "classes.txt", "\n".join(found.classes) + "\n")
    write_csv(folder / "labels.csv", ["image", "classes", "split"][: len(rows[0])], rows)
    return folder


def _copy(photo: Photo, folder: Path, stem: str) -> str:
    """Put an image into a folder; returns the name of the file."""
    plain = photo.path.suffix.lower() in IMAGE_SUFFIXES and not photo.converted
    if plain and max(photo.size) <= LARGEST:
        target = folder / f"{stem}{photo.path.suffix.lower()}"
        write_atomically(target, lambda part: shutil.copyfile(photo.path, part))
        return target.name
    target = folder / f"{stem}.jpg"
    with Image.open(photo.path) as file:
        file.draft(None, (LARGEST, LARGEST))
        image = as_rgb(ImageOps.exif_transpose(file))
    image = image.resize(_bounded(photo.size), Image.Resampling.LANCZOS)
    write_atomically(target, lambda part: image.save(part, format="JPEG", quality=95))
    return target.name


def _copy_mask(found: Survey, photo: Photo, target: Path) -> None:
    ids = read_mask(found.masks[photo.name], len(found.classes)).numpy()
    if _bounded(photo.size) != photo.size:
        ids = np.asarray(Image.fromarray(ids).resize(_bounded(photo.size), Image.Resampling.NEAREST))
    write_mask(target, ids)


def _bounded(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a copy."""
    scale = min(1.0, LARGEST / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
