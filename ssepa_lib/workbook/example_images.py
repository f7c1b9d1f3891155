"""An example of a folder of somebody's own images, made of built-in scenes."""

import io
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ssepa_lib.data.images import write_mask
from ssepa_lib.data.shapes import SHAPE_CLASSES, render_scene, scene_facts
from ssepa_lib.files import write_atomically, write_csv

EXAMPLE = {"ringlet": "porthole", "crosslet": "signpost"}  # built-in class → its name in the example


def example_folder(out: Path | str, count: int = 80) -> Path:
    """A folder as somebody might bring it, made of built-in scenes of two classes under new names.

    Masks lie beside the images. One image is turned by its EXIF tag, one is a CMYK image, and the table
    names a file that is not there, so that a check has something to find.

    Returns:
        `<out>/example`; a complete one is used again.
    """
    folder = Path(out) / "example"
    if (folder / "labels.csv").is_file():
        return folder
    kinds, rows, index = [SHAPE_CLASSES.index(name) + 1 for name in EXAMPLE], [], 0
    while len(rows) < count:
        index += 1
        shown = set(scene_facts("test", index).classes)
        if not shown <= set(EXAMPLE):
            continue
        pixels, mask = render_scene("test", index)
        name = f"photo {len(rows) + 1:02d}"
        content = _photo(Image.fromarray(pixels), turned=len(rows) == 1, printed=len(rows) == 2)
        write_atomically(folder / "images" / f"{name}.jpg", partial(Path.write_bytes, data=content))
        write_mask(folder / "masks" / f"{name}.png", np.searchsorted([0, *kinds], mask))
        rows.append([f"{name}.jpg", ";".join(sorted(EXAMPLE[kind] for kind in shown))])
    rows.append([f"photo {count + 1:02d}.jpg", "signpost"])
    write_csv(folder / "labels.csv", ["image", "classes"], rows)
    return folder


def _photo(image: Image.Image, turned: bool, printed: bool) -> bytes:
    """A JPEG file; `turned` lies on its side and says so in its EXIF tag, `printed` is in CMYK."""
    tag, file = Image.Exif(), io.BytesIO()
    if turned:
        image = image.transpose(Image.Transpose.ROTATE_90)
        tag[ExifTags.Base.Orientation] = 6  # to be turned by 90° clockwise
    image.convert("CMYK" if printed else "RGB").save(file, "JPEG", quality=92, exif=tag)
    return file.getvalue()
