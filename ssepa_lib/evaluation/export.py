"""Results that leave the project: predictions for your own images, pseudo-labels, an archive for the VOC server.

Masks are palette PNGs of class ids (0 background) at the original size of their image. Files are written beside their
destination and renamed, so nothing is ever half written.
"""

import csv
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssepa_lib.data.datasets import IGNORE, IMAGE_SUFFIXES, SegmentationDataset, read_image, voc_palette
from ssepa_lib.data.views import eval_batches
from ssepa_lib.device import autocast
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.evaluate import (
    INFERENCE,
    background_and_cam,
    cam_view,
    merge_scales,
    require_known,
    scale_logits,
)
from ssepa_lib.labels.cam import multi_scale_cam
from ssepa_lib.labels.crf import crf_pool
from ssepa_lib.labels.par import PixelAdaptiveRefinement
from ssepa_lib.labels.pseudo_labels import single_threshold_labels
from ssepa_lib.model.network import evaluating
from ssepa_lib.recipe import Recipe

SUBMISSION_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
Progress = Callable[[int, int], None]


class ImageFolder(SegmentationDataset):
    """Images of a folder without labels or masks: what `predict_folder` reads.

    Raises:
        UserError: the folder is missing, holds no image, or two images differ only in their suffix.
    """

    name = "folder"

    def __init__(self, folder: Path | str, classes: Sequence[str]):
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; pass the folder that holds your images.")
        self.paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.paths:
            raise UserError(
                f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}); pass the folder of your images."
            )
        super().__init__("all", classes, [p.stem for p in self.paths])
        seen: dict[str, Path] = {}
        for path in self.paths:
            if path.stem in seen:
                raise UserError(
                    f"{seen[path.stem]} and {path.name} would share one result; rename one of them."
                )
            seen[path.stem] = path

    def image(self, i: int) -> Image.Image:
        return read_image(self.paths[i], upright=True)

    def mask(self, i: int) -> None:
        return None

    def label(self, i: int) -> Tensor:
        return torch.full((len(self.classes),), torch.nan)


def palette_image(ids: np.ndarray, palette: Sequence[Sequence[int]]) -> Image.Image:
    """Class ids uint8 [H, W] as an image of mode P; `palette` holds up to 256 RGB colours in 0..255."""
    image = Image.fromarray(np.ascontiguousarray(ids, dtype=np.uint8))
    image.putpalette([channel for colour in palette for channel in colour])
    return image


def overlay_image(image: Image.Image, ids: np.ndarray, classes: Sequence[str], palette) -> Image.Image:
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


def _save(image: Image.Image, path: Path, **options) -> None:
    part = path.with_name(f".{path.name}.part")
    image.save(part, format="PNG" if path.suffix == ".png" else "JPEG", **options)
    part.replace(path)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    part.replace(path)


@torch.no_grad()
def predictions(
    network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    *,
    device: torch.device | str,
    inference: str = "ms",
    processes: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Image.Image, np.ndarray]]:
    """Segment every image of a data set: id, image, class ids uint8 [H, W] at original size.

    Args:
        inference: `raw` (scale 1), `ms` (`eval.scales` and mirror) or `crf` (dense CRF after `ms`).
        processes: worker processes of the CRF; None: one per processor core.
    """
    require_known("inference", [inference], tuple(INFERENCE))
    device, config = torch.device(device), recipe.eval
    scales, flip = ([1.0], False) if inference == "raw" else (config.scales, config.flip)
    network = network.to(device)

    def segmented():
        done = 0
        for ids, images, _, _ in eval_batches(
            dataset, recipe.data.eval_size, config.batch, recipe.data.workers
        ):
            with evaluating(network), autocast(recipe.train.precision, device):
                maps = scale_logits(network, images.to(device), scales, flip)
            for i, id in enumerate(ids):
                original = dataset.image(done)
                logits = merge_scales([m[i : i + 1] for m in maps], original.size[::-1])[0]
                yield id, original, logits
                done += 1
                if progress:
                    progress(done, len(dataset))

    if inference != "crf":
        for id, original, logits in segmented():
            yield id, original, logits.argmax(0).byte().cpu().numpy()
        return
    jobs = ((np.array(o), x.softmax(0).cpu().numpy(), (id, o)) for id, o, x in segmented())
    for ids, (id, original) in crf_pool(jobs, processes or os.cpu_count() or 1):
        yield id, original, ids


def predict_folder(
    network,
    recipe: Recipe,
    folder: Path | str,
    out: Path | str,
    *,
    device: torch.device | str,
    inference: str = "ms",
    processes: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Segment your own images: `<name>.png` (class ids), `<name>_overlay.jpg` (to look at) and two tables.

    `classes.csv` is the legend (id, class and colour); `predictions.csv` lists the classes found in each image, as
    `image,classes` with `;` between classes, the layout that training on your own images reads.

    Raises:
        UserError: see `ImageFolder`; an unreadable image; `out` is the folder of the images.
    """
    dataset, out, palette = ImageFolder(folder, network.classes), Path(out), voc_palette()
    if out.resolve() == Path(folder).resolve():
        raise UserError(
            f"{out} holds your images, which masks would replace; choose another folder for the results."
        )
    out.mkdir(parents=True, exist_ok=True)
    names = ["background", *network.classes]
    _write_csv(
        out / "classes.csv",
        ["id", "class", "red", "green", "blue"],
        [(i, name, *palette[i]) for i, name in enumerate(names)],
    )
    found = []
    options = {"device": device, "inference": inference, "processes": processes, "progress": progress}
    for path, (id, image, ids) in zip(
        dataset.paths, predictions(network, recipe, dataset, **options), strict=True
    ):
        _save(palette_image(ids, palette), out / f"{id}.png")
        _save(overlay_image(image, ids, network.classes, palette), out / f"{id}_overlay.jpg", quality=90)
        found.append((path.name, ";".join(names[i] for i in np.unique(ids) if i) or "background"))
    _write_csv(out / "predictions.csv", ["image", "classes"], found)
    return out


@torch.no_grad()
def export_pseudo_labels(
    network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    out: Path | str,
    *,
    device: torch.device | str,
    inference: str = "ms",
    processes: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `<id>.png` pseudo-labels (0 background, 1..C) of a labelled data set, for training something else.

    They come from the affinity-refined CAM where the recipe has one, with the background threshold `cam.background`:
    after pixel-adaptive refinement or the dense CRF.

    Args:
        inference: `raw` (scale 1, no mirror), `ms` (`cam.scales`, `cam.flip`), both with pixel-adaptive refinement, or
            `crf` (as `ms`, with the dense CRF instead).

    Raises:
        UserError: an unknown way of inference; an image without labels.
    """
    device, out = torch.device(device), Path(out)
    require_known("inference", [inference], tuple(INFERENCE))
    config, crf = cam_view(recipe.cam, inference), inference == "crf"
    par = PixelAdaptiveRefinement(config.par_dilations, config.par_iterations).to(device)
    affinity, network = recipe.affinity.kind != "none", network.to(device)
    out.mkdir(parents=True, exist_ok=True)

    def maps():
        done = 0
        for ids, images, labels, _ in eval_batches(
            dataset, recipe.data.eval_size, recipe.eval.batch, recipe.data.workers
        ):
            if torch.isnan(labels).any():
                raise UserError(
                    f"split '{dataset.split}' of {dataset.name} has no labels; choose a split that has them."
                )
            images, labels = images.to(device), labels.to(device)
            with evaluating(network), autocast(recipe.train.precision, device):
                cam = multi_scale_cam(network, images, labels, config, affinity=affinity).best
            refined = None if crf else single_threshold_labels(images, cam, labels, par, config.background)
            for i, id in enumerate(ids):
                yield id, dataset.image(done), cam[i], labels[i], None if crf else refined[i]
                done += 1
                if progress:
                    progress(done, len(dataset))

    def jobs():
        for id, image, cam, label, _ in maps():
            probabilities, channels = background_and_cam(cam, label, config.background, image.size[::-1])
            yield np.array(image), probabilities.cpu().numpy(), (id, channels.byte().cpu().numpy())

    if crf:
        found = crf_pool(jobs(), processes or os.cpu_count() or 1)
        labelled = ((id, channels[labels]) for labels, (id, channels) in found)
    else:
        labelled = ((id, _resize_ids(ids, image.size)) for id, image, _, _, ids in maps())
    for id, ids in labelled:
        _save(palette_image(ids, dataset.palette), out / f"{id}.png")
    return out


def _resize_ids(ids: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Class ids [H, W] to (width, height) by the nearest pixel."""
    return F.interpolate(ids[None, None].float(), size=size[::-1], mode="nearest")[0, 0].byte().cpu().numpy()


def export_submission(
    network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    archive: Path | str,
    *,
    device: torch.device | str,
    inference: str = "ms",
    processes: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the archive that the PASCAL VOC evaluation server takes (comp6, segmentation), checked before it appears.

    Args:
        dataset: usually `VocDataset(root, "test")` with its 1456 images.
        archive: ends in `.tgz` or `.tar.gz`.

    Raises:
        UserError: another suffix, or a network without VOC's 20 classes.
    """
    archive = Path(archive)
    if not archive.name.endswith((".tgz", ".tar.gz")):
        raise UserError(f"{archive}: the VOC server takes .tgz archives; choose a name that ends in .tgz.")
    if len(network.classes) != 20:
        raise UserError(
            f"a VOC submission has 20 classes, this network {len(network.classes)}; use a VOC run."
        )
    archive.parent.mkdir(parents=True, exist_ok=True)
    part, sizes = archive.with_name(f".{archive.name}.part"), {}
    options = {"device": device, "inference": inference, "processes": processes, "progress": progress}
    try:
        with tarfile.open(part, "w:gz") as tar:
            for id, image, ids in predictions(network, recipe, dataset, **options):
                buffer = io.BytesIO()
                palette_image(ids, voc_palette()).save(buffer, format="PNG")
                info = tarfile.TarInfo(f"{SUBMISSION_FOLDER}/{id}.png")
                info.size, sizes[id] = buffer.tell(), image.size
                buffer.seek(0)
                tar.addfile(info, buffer)
        validate_submission(part, dataset.ids, sizes)
        part.replace(archive)
    finally:
        part.unlink(missing_ok=True)
    return archive


def validate_submission(
    archive: Path | str, ids: Sequence[str], sizes: Mapping[str, tuple[int, int]] | None = None
) -> int:
    """Check an archive for the VOC server; returns the number of masks.

    Args:
        ids: every image of the split.
        sizes: id → (width, height) of the image; None: not checked.

    Raises:
        UserError: a missing or foreign file, an image that is no palette PNG with the VOC colours, of another size, or
            with an id outside 0..20.
    """
    name = Path(archive).name
    colours = [channel for colour in voc_palette()[:21] for channel in colour]
    left = set(ids)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isdir():
                    continue
                path = Path(member.name)
                if (
                    path.parent.as_posix() != SUBMISSION_FOLDER
                    or path.stem not in left
                    or path.suffix != ".png"
                ):
                    raise UserError(
                        f"{name}: {member.name} does not belong there or is there twice; expected is one "
                        f"{SUBMISSION_FOLDER}/<id>.png per image of the split."
                    )
                left.remove(path.stem)
                with Image.open(tar.extractfile(member)) as image:
                    _check_mask(f"{name}: {path.name}", image, colours, (sizes or {}).get(path.stem))
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{archive} is not a readable tar archive of PNG files ({error}); write it again."
        ) from error
    if left:
        raise UserError(
            f"{name}: {len(left)} of {len(ids)} images are missing, first {min(left)}; predict the whole split."
        )
    return len(ids)


def _check_mask(what: str, image: Image.Image, colours: list[int], size: tuple[int, int] | None) -> None:
    if image.format != "PNG" or image.mode != "P":
        raise UserError(
            f"{what} has mode {image.mode}; the server takes palette PNGs (mode P), not colour images."
        )
    if image.getpalette()[: len(colours)] != colours:
        raise UserError(f"{what} has another palette; write it with the VOC colour map.")
    if size is not None and image.size != tuple(size):
        raise UserError(
            f"{what} is {image.width}×{image.height} but its image {size[0]}×{size[1]}; resize the mask."
        )
    highest = int(np.asarray(image).max())
    if highest > 20:
        raise UserError(f"{what} holds id {highest}; allowed are 0..20, without an ignore value.")
