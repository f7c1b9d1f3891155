"""An image from the reader's computer, taken by a button in a running notebook."""

import html
import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipywidgets import HTML, FileUpload, VBox
from PIL import Image, ImageOps

from ssepa_lib.data.images import UNREADABLE, as_rgb
from ssepa_lib.data.survey import SMALLEST, reason
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.export import save_image
from ssepa_lib.workbook.explorer_host import display_both

BYTES = 20_000_000  # of an uploaded file
UPLOADED = 1024  # pixels of its longer side that are kept


def read_upload(name: str, content: bytes) -> tuple[str, Image.Image]:
    """An uploaded file as a safe name without suffix and an upright RGB image of at most 1024 pixels a side.

    Raises:
        UserError: it is too large, no image, damaged, or smaller than 32 pixels.
    """
    stem = re.sub(r"[^\w-]+", "_", Path(name.replace("\\", "/")).stem).strip("_")[:60] or "upload"
    if len(content) > BYTES:
        raise UserError(
            f"{stem}: {len(content) / 1e6:.0f} MB are too large; upload at most {BYTES / 1e6:.0f} MB."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = Image.open(io.BytesIO(bytes(content)))
        with file:
            file.draft(None, (UPLOADED, UPLOADED))
            image = as_rgb(ImageOps.exif_transpose(file))
    except UNREADABLE as error:
        raise UserError(
            f"{stem}: this is no image that can be read ({reason(error)}); upload another."
        ) from error
    if min(image.size) < SMALLEST:
        raise UserError(
            f"{stem}: {image.width}×{image.height} pixels are too few; each side needs {SMALLEST}."
        )
    image.thumbnail((UPLOADED, UPLOADED), Image.Resampling.LANCZOS)
    return stem, image


class Upload(VBox):
    """A button that takes an image from the reader's computer; `image` is the last good one, or None.

    Every image is saved as `<folder>/<safe name>.png`. What cannot be read is said in one sentence below the
    button, and changes nothing.
    """

    def __init__(self, folder: Path | str):
        self.folder, self.image, self.name = Path(folder), None, ""
        self.button, self.said = FileUpload(accept="image/*", multiple=False), HTML()
        self.button.observe(self._take, "value")
        super().__init__([self.button, self.said])

    def _take(self, change: Mapping[str, Any]) -> None:
        for file in change["new"]:
            try:
                self.name, self.image = read_upload(file["name"], file["content"])
                save_image(self.image, self.folder / f"{self.name}.png")
                said = (
                    f"{self.name}: {self.image.width}×{self.image.height} pixels. Run the next cells again."
                )
            except (UserError, OSError) as error:
                said = str(error)
            self.said.value = html.escape(said)

    def _ipython_display_(self) -> None:
        display_both(self, "<p>An upload button appears here in a running notebook.</p>")
