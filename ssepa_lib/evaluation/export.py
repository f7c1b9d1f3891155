"""Label maps that leave the project: predictions for your own images, and pseudo-labels to train on.

Masks are palette PNGs of class ids (0 background) at the original size of their image.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssepa_lib.data import IGNORE, SegmentationDataset
from ssepa_lib.data.datasets import FileDataset, Subset
from ssepa_lib.data.images import IMAGE_SUFFIXES, voc_palette
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.inference import Prediction, Progress, infer, label_maps
from ssepa_lib.files import FolderLock, remove_parts, visible, write_atomically, write_csv
from ssepa_lib.model.network import Network
from ssepa_lib.recipe import Recipe


class ImageFolder(FileDataset):
    """Images of a folder without labels or masks: what `predict_folder` reads.

    Raises:
        UserError: the folder is missing, holds no image, or two images differ only in their suffix.
    """

    upright = True

    def __init__(self, folder: Path | str, classes: Sequence[str]):
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; pass the folder that holds your images.")
        paths = [path for path in visible(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
        if not paths:
            raise UserError(
                f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}); pass the folder of your images."
            )
        seen: dict[str, Path] = {}
        for path in paths:
            if path.stem in seen:
                raise UserError(
                    f"{seen[path.stem]} and {path.name} would share one result; rename one of them."
                )
            seen[path.stem] = path
            if not path.name.isprintable():
                raise UserError(f"{folder}: {path.name!r} is not a name for a table; rename that image.")
        super().__init__("all", classes, paths, [None] * len(paths))

    def read_label(self, i: int) -> Tensor:
        return torch.full((len(self.classes),), torch.nan)


def palette_image(ids: np.ndarray, palette: Sequence[Sequence[int]]) -> Image.Image:
    """Class ids uint8 [H, W] as an image of mode P; `palette` holds up to 256 RGB colours in 0..255."""
    image = Image.fromarray(np.ascontiguousarray(ids, dtype=np.uint8))
    image.putpalette([channel for colour in palette for channel in colour])
    return image


def overlay_image(
    image: Image.Image, ids: np.ndarray, classes: Sequence[str], palette: Sequence[Sequence[int]]
) -> Image.Image:
    """The image with its classes in colour (half transparent) and a strip below that names those present."""
    colours = np.array(palette, dtype=np.uint8)[ids]
    pixels = np.asarray(image)
    mixed = np.where((ids > 0)[..., None], pixels // 2 + colours // 2, pixels)
    present = [int(i) for i in np.unique(ids) if 0 < i < IGNORE]
    font = ImageFont.load_default(14)
    rows, x = [[]], 6
    for i in present:  # break the legend into as many rows as the image's width needs
        width = 24 + int(font.getlength(classes[i - 1])) + 14
        if rows[-1] and x + width > image.width:
            rows.append([])
            x = 6
        rows[-1].append((x, i))
        x += width
    out = Image.new("RGB", (image.width, image.height + 22 * len(rows)), "white")
    out.paste(Image.fromarray(mixed), (0, 0))
    draw = ImageDraw.Draw(out)
    for row, entries in enumerate(rows):
        top = image.height + 22 * row
        for left, i in entries:
            draw.rectangle((left, top + 4, left + 14, top + 18), fill=tuple(palette[i]), outline="black")
            draw.text((left + 20, top + 2), classes[i - 1], fill="black", font=font)
        if not present:
            draw.text((6, top + 2), "no class found", fill="black", font=font)
    return out


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG or JPEG, as its suffix says, that is never half written."""
    options = {"format": "PNG"} if path.suffix == ".png" else {"format": "JPEG", "quality": 90}
    write_atomically(path, lambda part: image.save(part, **options))


def predict_folder(
    network: Network,
    recipe: Recipe,
    folder: Path | str,
    out: Path | str,
    *,
    device: torch.device | str,
    test_time: str = "ms",
    processes: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Segment your own images: `<name>.png` (class ids), `<name>_overlay.jpg` (to look at) and two tables.

    `classes.csv` is the legend (id, class and colour); `predictions.csv` lists the classes found in each
    image, as `image,classes` with `;` between classes, the layout that training on your own images reads.

    Args:
        test_time: `single` (scale 1), `ms` (`eval.scales` and flip) or `ms_crf` (dense CRF after `ms`).
        processes, progress: see `evaluate`.

    Raises:
        UserError: see `ImageFolder`; an unreadable image; `out` is the folder of the images.
    """
    dataset, out, palette = ImageFolder(folder, network.classes), Path(out), voc_palette()
    if out.resolve() == Path(folder).resolve():
        raise UserError(
            f"{out} holds your images, which masks would replace; choose another folder for the results."
        )
    drawn = [path.stem for path in dataset.images if (out / f"{path.stem}.png").exists()]
    if drawn and not (out / "classes.csv").exists():
        raise UserError(
            f"{out} holds {drawn[0]}.png, which is no earlier prediction; choose another folder, so that it "
            "stays."
        )
    names = ["background", *network.classes]
    legend = [(i, name, *palette[i]) for i, name in enumerate(names)]
    options = {"device": device, "outputs": ("segmentation",), "test_time": (test_time,)}
    predictions = infer(network, recipe, dataset, **options, keep_images=True, progress=progress)
    labelled = label_maps(predictions, "segmentation", test_time, processes)
    found = []
    with FolderLock(out), closing(labelled):
        _clean(out)
        write_csv(out / "classes.csv", ["id", "class", "red", "green", "blue"], legend)
        for path, (id, image, ids) in zip(dataset.images, labelled, strict=True):
            save_image(palette_image(ids, palette), out / f"{id}.png")
            save_image(overlay_image(image, ids, network.classes, palette), out / f"{id}_overlay.jpg")
            found.append((path.name, ";".join(names[i] for i in np.unique(ids) if i) or "background"))
        write_csv(out / "predictions.csv", ["image", "classes"], found)
    return out


def export_pseudo_labels(
    network: Network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    out: Path | str,
    *,
    device: torch.device | str,
    test_time: str = "ms",
    overlays: bool = False,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `<id>.png` pseudo-labels (0 background, 1..C) of a labelled dataset, for training something else.

    They come from the affinity-refined CAM where the recipe has one, with the background threshold
    `cam.background`; with a learned affinity (AFA) from the map that it propagates, with `cam.low`, but for
    `ms_crf`.

    Args:
        test_time: `single` (scale 1, no flip), `ms` (`cam.scales`, `cam.flip`), both with pixel-adaptive
            refinement, or `ms_crf` (as `ms`, with the dense CRF instead).
        overlays: also write `<id>_overlay.jpg`, to look at.
        processes, progress: see `evaluate`.

    Raises:
        UserError: an unknown test-time mode; an image without labels.
    """
    out = Path(out)
    files = dataset.dataset if isinstance(dataset, Subset) else dataset
    if isinstance(files, FileDataset):
        for path in filter(None, [*files.masks, *files.images]):
            if path.parent.resolve() == out.resolve():
                raise UserError(
                    f"{out} holds files of {dataset.name}; choose another folder, so that they stay."
                )
    options = {"device": device, "outputs": ("pseudo_label",), "test_time": (test_time,)}
    predictions = infer(network, recipe, dataset, **options, keep_images=True, progress=progress)
    checked = (_require_label(prediction, dataset) for prediction in predictions)
    with FolderLock(out), closing(label_maps(checked, "pseudo_label", test_time, processes)) as labelled:
        _clean(out)
        for id, image, ids in labelled:
            save_image(palette_image(ids, dataset.palette), out / f"{id}.png")
            if overlays:
                drawn = overlay_image(image, ids, dataset.classes, dataset.palette)
                save_image(drawn, out / f"{id}_overlay.jpg")
    return out


def _clean(out: Path) -> None:
    """Remove what a killed export has left half written."""
    for suffix in (".png", ".jpg"):
        remove_parts(out / f"*{suffix}")


def _require_label(prediction: Prediction, dataset: SegmentationDataset) -> Prediction:
    if torch.isnan(prediction.label).any():
        raise UserError(
            f"split '{dataset.split}' of {dataset.name} has no labels; choose a split that has them."
        )
    return prediction
