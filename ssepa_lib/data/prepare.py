"""Bring data sets onto the disk: download, check, unpack, derive, verify. Everything can be run again at any time.

Nothing is shipped and nothing is left half done: downloads grow in `*.part` files and go on where they stopped,
archives are unpacked beside their place and renamed at the end, lists are written last. Files that are already there,
put by hand for example, are used and the network is left alone.
"""

import csv
import hashlib
import http.client
import io
import json
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from ssepa_lib import paths
from ssepa_lib.data.datasets import COCO_CLASSES, VOC_CLASSES, read_label_table, voc_palette
from ssepa_lib.errors import UserError

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all (None: unknown)
_DAMAGED = (tarfile.ReadError, EOFError, zlib.error, OSError)
_TIMEOUT, _ATTEMPTS, _CHUNK = 30, 3, 1 << 20  # seconds without a byte, tries per host, bytes


@dataclass(frozen=True)
class Source:
    """A file to download: the hosts are tried in order, the MD5 sum decides."""

    file: str
    md5: str
    urls: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a preparation did."""

    name: str
    root: Path
    changed: bool  # False: everything was there, nothing was done
    message: str


@dataclass
class Verification:
    """What is on the disk."""

    name: str
    root: Path
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)  # what: (found, expected)
    problems: list[str] = field(default_factory=list)  # one line each: what is missing and the remedy

    def count(self, what: str, found: int, expected: int, remedy: str) -> None:
        """Note a number; fewer than expected is a problem (more is none: VOC's test images share a folder)."""
        self.counts[what] = found, expected
        if found < expected:
            self.problems.append(f"{what}: {found} of {expected} found; {remedy}.")


_VOC_FILE = "VOCtrainval_11-May-2012.tar"
VOC = Source(
    _VOC_FILE,
    "6cd6e144f989b92b3379bac3b3de84fd",
    (
        f"https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/{_VOC_FILE}",
        f"http://host.robots.ox.ac.uk/pascal/VOC/voc2012/{_VOC_FILE}",
        f"https://d2l-data.s3-accelerate.amazonaws.com/{_VOC_FILE}",
    ),
)
_SBD_PATH = "Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz"
SBD = Source(
    "benchmark.tgz",
    "82b4d87ceb2ed10f6038a1cba92111cb",
    (f"https://www2.eecs.berkeley.edu/{_SBD_PATH}", f"http://www.eecs.berkeley.edu/{_SBD_PATH}"),
)
VOC_COUNTS = {"JPEGImages": 17125, "Annotations": 17125, "SegmentationClass": 2913}
VOC_SPLITS = {"train": 1464, "val": 1449}
TRAIN_AUG = 10582
COCO_IMAGES = {"train": 82783, "val": 40504}
COCO_ANNOTATED = {"train": 82081, "val": 40137}


def fetch(source: Source, folder: Path, progress: Progress | None = None) -> Path:
    """Download a file unless it lies in `folder` already; an interrupted download goes on where it stopped.

    Raises:
        UserError: no host delivered the file, or the file on the disk is another one.
    """
    target, part = folder / source.file, folder / f"{source.file}.part"
    if target.is_file():
        if _md5(target) != source.md5:
            raise UserError(
                f"{target}: wrong MD5 sum (expected {source.md5}); delete the file and run again."
            )
        return target
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in source.urls:
        for _ in range(_ATTEMPTS):
            resumed = part.is_file()
            try:
                _download(url, part, progress)
            except (OSError, http.client.HTTPException) as error:
                failures.append(f"{urlsplit(url).netloc}: {getattr(error, 'reason', None) or error}")
                if isinstance(error, _Interrupted):
                    continue
                break
            if _md5(part) == source.md5:
                part.rename(target)
                return target
            part.unlink()
            failures.append(f"{urlsplit(url).netloc}: wrong MD5 sum")
            if not resumed:  # a resumed file may have begun as something else: once more from the start
                break
    reasons = "; ".join(dict.fromkeys(failures))
    raise UserError(
        f"{source.file} could not be downloaded ({reasons}); run again later, or put the file at {target}."
    )


class _Interrupted(OSError):
    """The connection broke after some bytes: worth another attempt."""


def _download(url: str, part: Path, progress: Progress | None) -> None:
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "ssepa-workbook"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is left to send: the checksum will tell
            return
        raise
    with response:
        if "html" in response.headers.get("Content-Type", ""):
            raise OSError("answered with a web page instead of the file")
        if response.status != 206:
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        done = start
        with part.open("ab" if start else "wb") as file:
            try:
                while chunk := response.read(_CHUNK):
                    if done == 0 and chunk.lstrip()[:5].lower() in (b"<!doc", b"<html"):
                        raise OSError("answered with a web page instead of the file")
                    file.write(chunk)
                    done += len(chunk)
                    if progress:
                        progress(done, total)
            except (TimeoutError, ConnectionError, http.client.IncompleteRead) as error:
                raise _Interrupted(f"connection lost after {done} bytes") from error
    if total is not None and done < total:
        raise _Interrupted(f"connection lost after {done} of {total} bytes")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def unpack(archive: Path, inner: str, target: Path) -> None:
    """Unpack the folder `inner` of a tar archive to `target`, which appears complete or not at all.

    Raises:
        UserError: a damaged archive, one without `inner`, one with paths that leave the folder, or `target` exists.
    """
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} exists but is incomplete; move it away and run again.")
    temporary = target.with_name(f"{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        if not (temporary / inner).is_dir():
            raise UserError(f"{archive}: there is no {inner} in this archive; delete it and download again.")
        if target.is_dir():
            target.rmdir()
        (temporary / inner).rename(target)
    except tarfile.FilterError as error:
        raise UserError(
            f"{archive}: unsafe archive, nothing was unpacked ({error}); get it from the source."
        ) from error
    except _DAMAGED as error:
        raise UserError(
            f"{archive}: could not be unpacked ({error}); check the disk or download it again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _require_complete(name: str, root: Path, rubbish: str) -> None:
    """Raise UserError, naming what to delete, unless a data set that was just unpacked is whole."""
    problems = verify(name, root).problems
    if problems:
        reason = problems[0].split(";")[0]
        raise UserError(f"{root} after unpacking: {reason}; delete {rubbish} and run again.")


def prepare_voc(root: Path | None = None, source: Source = VOC, progress: Progress | None = None) -> Outcome:
    """VOC 2012 at `root` (default `voc_root()`); the archive is kept, or expected, in the folder above.

    Raises:
        UserError: no host answers, a damaged or unsafe archive, or an incomplete folder in the way.
    """
    root = Path(root or paths.voc_root())
    problems = verify("voc", root).problems
    if not problems:
        return Outcome("voc", root, False, f"VOC 2012 at {root} is complete; nothing to do.")
    if root.is_dir() and any(root.iterdir()):
        raise UserError(
            f"{root} exists but is incomplete ({problems[0].split(';')[0]}); move it away and run again."
        )
    archive = fetch(source, root.parent, progress)
    unpack(archive, "VOCdevkit/VOC2012", root)
    _require_complete("voc", root, f"{archive} and that folder")
    return Outcome("voc", root, True, f"VOC 2012 is at {root}; {archive} may be deleted.")


def _voc_list(root: Path, split: str) -> list[str]:
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    return path.read_text().split() if path.is_file() else []


def _write_text(path: Path, text: str) -> None:
    """Write a file that exists complete or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text)
    os.replace(temporary, path)


def _write_mask(ids: np.ndarray, path: Path) -> None:
    """Class ids [H, W] as a palette PNG with VOC's colours, complete or not at all."""
    image = Image.fromarray(ids.astype(np.uint8), mode="P")
    image.putpalette([value for colour in voc_palette() for value in colour])
    temporary = path.with_name(f"{path.name}.part")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)


def prepare_sbd(root: Path | None = None, source: Source = SBD, progress: Progress | None = None) -> Outcome:
    """The augmented training set on top of VOC 2012: `train_aug.txt` and masks in `SegmentationClassAug`.

    train_aug = (SBD train ∪ SBD val ∪ VOC train) − VOC val, sorted. Masks are written for the images that have none in
    VOC itself. The archive is read, never unpacked.

    Raises:
        UserError: VOC is not there yet, no host answers, or a damaged archive.
    """
    root = Path(root or paths.voc_root())
    train, val = _voc_list(root, "train"), _voc_list(root, "val")
    if not train or not val or not (root / "JPEGImages").is_dir():
        raise UserError(
            f"{root}: SBD extends VOC 2012, which is not there; run `python -m ssepa_lib data voc` first."
        )
    if not verify("sbd", root).problems:
        return Outcome("sbd", root, False, f"train_aug at {root} is complete; nothing to do.")
    masks = root / "SegmentationClassAug"
    if masks.is_dir() and any(masks.iterdir()):
        raise UserError(f"{masks} exists but is incomplete; move it away and run again.")
    archive = fetch(source, root.parent, progress)
    temporary = masks.with_name("SegmentationClassAug.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        listed = _convert_sbd(archive, temporary, skip=set(train) | set(val))
        ids = sorted((listed | set(train)) - set(val))
        _write_text(root / "ImageSets" / "Segmentation" / "train_aug.txt", "\n".join(ids) + "\n")
        if masks.is_dir():
            masks.rmdir()
        temporary.rename(masks)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _require_complete("sbd", root, f"{archive} and {masks}")
    return Outcome("sbd", root, True, f"train_aug has {len(ids)} images at {root}; {archive} may be deleted.")


def _read_sbd(content: bytes, name: str) -> np.ndarray:
    """Class ids [H, W] of one of SBD's MATLAB files."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        ids = np.asarray(loadmat(io.BytesIO(content))["GTcls"][0, 0]["Segmentation"])
    except (MatReadError, ValueError, LookupError, TypeError, NotImplementedError, zlib.error) as error:
        raise UserError(f"{name} is no SBD mask ({error}); delete the archive and run again.") from error
    if ids.ndim != 2 or ids.max() > len(VOC_CLASSES):
        raise UserError(f"{name} holds no class ids 0..{len(VOC_CLASSES)}; delete the archive and run again.")
    return ids


def _convert_sbd(archive: Path, folder: Path, skip: set[str]) -> set[str]:
    """Write the masks of SBD as PNGs, except those in `skip`; returns the ids of SBD's two lists."""
    listed: set[str] = set()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = Path(member.name)
                wanted = path.suffix == ".mat" and path.parent.name == "cls" and path.stem not in skip
                if member.isfile() and wanted:
                    ids = _read_sbd(tar.extractfile(member).read(), f"{archive}: {member.name}")
                    _write_mask(ids, folder / f"{path.stem}.png")
                elif member.isfile() and path.name in ("train.txt", "val.txt"):
                    listed |= set(tar.extractfile(member).read().decode().split())
    except _DAMAGED as error:
        raise UserError(f"{archive}: could not be read ({error}); delete it and run again.") from error
    if not listed:
        raise UserError(
            f"{archive}: there is no train.txt and val.txt in this archive; delete it and run again."
        )
    return listed


def prepare_coco(root: Path | None = None, splits: Iterable[str] = ("train", "val")) -> Outcome:
    """Semantic masks and labels of COCO 2014 from `annotations/instances_<split>2014.json`.

    Writes `semantic/<split>2014/*.png` and, last, `semantic/<split>.csv` (image, classes) for the images that have
    annotations. Ids are 1..80 in the order of COCO's category ids. Larger objects (field `area`) are painted first, so
    that small ones stay visible; crowd regions count as their class; nothing is marked 255. The label holds every
    annotated class. Masks that exist are kept, so an interrupted run goes on where it stopped.

    Raises:
        UserError: a missing or unreadable JSON, or one of another year.
    """
    root, done = Path(root or paths.coco_root()), []
    for split in splits:
        table = root / "semantic" / f"{split}.csv"
        if table.is_file():
            continue
        rows = _paint_split(root, split)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([("image", "classes"), *rows])
        _write_text(table, text.getvalue())
        done.append(f"{len(rows)} {split} images")
    if not done:
        return Outcome("coco", root, False, f"COCO masks at {root / 'semantic'} are complete; nothing to do.")
    return Outcome("coco", root, True, f"COCO masks for {' and '.join(done)} are at {root / 'semantic'}.")


def _paint_split(root: Path, split: str) -> list[tuple[str, str]]:
    """Paint the masks of one split; returns the rows (image, classes)."""
    source = root / "annotations" / f"instances_{split}2014.json"
    if not source.is_file():
        raise UserError(f"{source} is missing; unpack annotations_trainval2014.zip at {root}.")
    try:
        content = json.loads(source.read_bytes())
        images, categories = content["images"], sorted(content["categories"], key=lambda c: c["id"])
        annotations, names = content["annotations"], tuple(c["name"] for c in categories)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{source}: no COCO instances file ({error}); unpack annotations_trainval2014.zip again."
        ) from error
    foreign = [i["file_name"] for i in images if not i["file_name"].startswith(f"COCO_{split}2014_")]
    if foreign or names != COCO_CLASSES:
        what = f"lists {foreign[0]}" if foreign else "has other categories"
        raise UserError(
            f"{source} {what}: not the COCO 2014 {split} file; unpack annotations_trainval2014.zip."
        )
    ids = {category["id"]: number for number, category in enumerate(categories, start=1)}
    objects: dict[int, list[dict]] = {}
    for annotation in annotations:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    folder = root / "semantic" / f"{split}2014"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for image in images:
        found = objects.get(image["id"])
        if not found:
            continue
        path = folder / f"{Path(image['file_name']).stem}.png"
        if not path.is_file():
            _write_mask(paint(found, ids, image["height"], image["width"]), path)
        present = sorted({ids[annotation["category_id"]] for annotation in found})
        rows.append((image["file_name"], ";".join(COCO_CLASSES[i - 1] for i in present)))
    return rows


def paint(annotations: list[dict], ids: dict[int, int], height: int, width: int) -> np.ndarray:
    """Semantic mask uint8 [height, width] of COCO instances, larger ones first.

    Args:
        annotations: with `segmentation` (polygons or run lengths), `area` and `category_id`.
        ids: mask id of each category id.
    """
    from pycocotools import mask as runs

    canvas = np.zeros((height, width), np.uint8)
    for annotation in sorted(annotations, key=lambda a: -a["area"]):
        shape = annotation["segmentation"]
        if isinstance(shape, list):
            shape = runs.merge(runs.frPyObjects(shape, height, width))
        elif isinstance(shape["counts"], list):
            shape = runs.frPyObjects(shape, height, width)
        canvas[runs.decode(shape) > 0] = ids[annotation["category_id"]]
    return canvas


def _files(folder: Path, suffix: str) -> set[str]:
    return {path.stem for path in folder.iterdir() if path.suffix == suffix} if folder.is_dir() else set()


def verify(name: str, root: Path | None = None) -> Verification:
    """Count what is on the disk and compare with the published numbers.

    Args:
        name: voc, sbd or coco.
        root: default `voc_root()` or `coco_root()`.

    Raises:
        UserError: another name.
    """
    if name not in ("voc", "sbd", "coco"):
        raise UserError(f"there is no data set '{name}' to check; choose voc, sbd or coco.")
    root = Path(root or (paths.coco_root() if name == "coco" else paths.voc_root()))
    result = Verification(name, root)
    remedy = f"run `python -m ssepa_lib data {name}`"
    if name == "voc":
        for folder, expected in VOC_COUNTS.items():
            suffix = {"JPEGImages": ".jpg", "Annotations": ".xml"}.get(folder, ".png")
            result.count(folder, len(_files(root / folder, suffix)), expected, remedy)
        for split, expected in VOC_SPLITS.items():
            result.count(f"{split}.txt", len(_voc_list(root, split)), expected, remedy)
    elif name == "sbd":
        ids = _voc_list(root, "train_aug")
        masks = _files(root / "SegmentationClass", ".png") | _files(root / "SegmentationClassAug", ".png")
        result.count("train_aug.txt", len(ids), TRAIN_AUG, remedy)
        result.count("masks of train_aug", len(masks & set(ids)), TRAIN_AUG, remedy)
    else:
        for split, images in COCO_IMAGES.items():
            table = root / "semantic" / f"{split}.csv"
            rows = len(read_label_table(table)) if table.is_file() else 0
            archive = f"unpack {split}2014.zip at {root}"
            result.count(f"{split}2014", len(_files(root / f"{split}2014", ".jpg")), images, archive)
            result.count(f"semantic/{split}.csv", rows, COCO_ANNOTATED[split], remedy)
            painted = len(_files(root / "semantic" / f"{split}2014", ".png"))
            result.count(f"semantic/{split}2014", painted, COCO_ANNOTATED[split], remedy)
    return result
