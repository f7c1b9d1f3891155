"""The archive that the PASCAL VOC evaluation server takes (comp6, segmentation): written, and checked."""

import io
import lzma
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ssepa_lib.data import SegmentationDataset
from ssepa_lib.data.images import UNREADABLE, voc_palette
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.export import palette_image
from ssepa_lib.evaluation.inference import Progress, infer, label_maps
from ssepa_lib.files import write_atomically
from ssepa_lib.model.network import Network
from ssepa_lib.recipe import Recipe

SUBMISSION_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"


def export_submission(
    network: Network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    archive: Path | str,
    *,
    device: torch.device | str,
    test_time: str = "ms",
    processes: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the archive, which is checked before it appears.

    Args:
        dataset: usually `VocDataset(root, "test")` with its 1456 images.
        archive: ends in `.tgz` or `.tar.gz`.
        test_time, processes, progress: see `evaluate`.

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
    options = {"device": device, "outputs": ("segmentation",), "test_time": (test_time,)}
    predictions = infer(network, recipe, dataset, **options, keep_images=True, progress=progress)

    def write(part: Path) -> None:
        sizes = {}
        with tarfile.open(part, "w:gz") as tar:
            for id, image, ids in label_maps(predictions, "segmentation", test_time, processes):
                sizes[id] = image.size
                _add(tar, f"{SUBMISSION_FOLDER}/{id}.png", palette_image(ids, voc_palette()))
        validate_submission(part, dataset.ids, sizes)

    write_atomically(archive, write)
    return archive


def _add(tar: tarfile.TarFile, name: str, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    info = tarfile.TarInfo(name)
    info.size = buffer.tell()
    buffer.seek(0)
    tar.addfile(info, buffer)


def validate_submission(
    archive: Path | str, ids: Sequence[str], sizes: Mapping[str, tuple[int, int]] | None = None
) -> int:
    """Check an archive for the VOC server; returns the number of masks.

    Args:
        ids: every image of the split.
        sizes: id → (width, height) of the image; None: not checked.

    Raises:
        UserError: a missing or foreign file, an image that is no palette PNG with the VOC colours, of
            another size, or with an id outside 0..20.
    """
    name = Path(archive).name
    left = set(ids)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isdir():
                    continue
                path = Path(member.name)
                belongs = path.parent.as_posix() == SUBMISSION_FOLDER and path.suffix == ".png"
                if not belongs or path.stem not in left or not member.isfile():
                    raise UserError(
                        f"{name}: {member.name} does not belong there or is there twice; expected is one "
                        f"{SUBMISSION_FOLDER}/<id>.png per image of the split."
                    )
                left.remove(path.stem)
                with Image.open(tar.extractfile(member)) as image:
                    _check_mask(f"{name}: {path.name}", image, (sizes or {}).get(path.stem))
    except (*UNREADABLE, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{archive} is not a readable tar archive of PNG files ({error}); write it again."
        ) from error
    if left:
        raise UserError(
            f"{name}: {len(left)} of {len(ids)} images are missing, first {min(left)}; "
            "predict the whole split."
        )
    return len(ids)


def _check_mask(what: str, image: Image.Image, size: tuple[int, int] | None) -> None:
    colours = [channel for colour in voc_palette()[:21] for channel in colour]
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
