"""PASCAL VOC 2012, and the augmented training split that SBD (Hariharan et al., ICCV 2011) adds to it."""

import io
import shutil
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from ssepa_lib.data.datasets import FileDataset, Outcome, Preparation, Verification, refuse_missing, stems
from ssepa_lib.data.download import DAMAGED, Progress, Source, fetch, members, unpack
from ssepa_lib.data.images import classes_in, read_mask, write_mask
from ssepa_lib.errors import UserError
from ssepa_lib.files import write_text
from ssepa_lib.paths import PROJECT
from ssepa_lib.readers import decode, read_text

_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)
VOC_CLASSES = tuple(_NAMES.split())
_VOC_FILE = "VOCtrainval_11-May-2012.tar"
VOC = Source(
    _VOC_FILE,
    "6cd6e144f989b92b3379bac3b3de84fd",
    (
        f"https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/{_VOC_FILE}",
        f"https://d2l-data.s3-accelerate.amazonaws.com/{_VOC_FILE}",
    ),
)
_SBD_PATH = "Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz"
SBD = Source(
    "benchmark.tgz",
    "82b4d87ceb2ed10f6038a1cba92111cb",
    (f"https://www2.eecs.berkeley.edu/{_SBD_PATH}",),
)
COUNTS = {"JPEGImages": 17125, "Annotations": 17125, "SegmentationClass": 2913}
SPLITS = {"train": 1464, "val": 1449}
TRAIN_AUG = 10582
_SUFFIX = {"JPEGImages": ".jpg", "Annotations": ".xml", "SegmentationClass": ".png"}
_AGAIN = "unpack the archive again with `python -m ssepa_lib data voc`"


def _list_file(root: Path, split: str) -> Path:
    return root / "ImageSets" / "Segmentation" / f"{split}.txt"


def _listed(root: Path, split: str) -> list[str]:
    """The ids in the list of a split; none without such a file.

    Raises:
        UserError: it is no text, or a line holds more than one id, or one that was there before.
    """
    path = _list_file(root, split)
    lines = read_text(path, "list of a split").split("\n") if path.is_file() else []
    ids = {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
    twice = {i for i, count in Counter(ids.values()).items() if count > 1}
    for number, i in ids.items():
        if len(i.split()) > 1 or i in twice:
            fault = "is listed twice" if i in twice else "is more than one id"
            raise UserError(f"{path}, line {number}: '{i[:80]}' {fault}; write one id per line, each once.")
    return list(ids.values())


def _require_complete(result: Verification, rubbish: str) -> None:
    """Raise UserError, naming what to delete, unless something that was just unpacked is whole."""
    if result.problems:
        reason = result.problems[0].split(";")[0]
        raise UserError(f"{result.root} after unpacking: {reason}; delete {rubbish} and run again.")


def prepare_voc(root: Path, progress: Progress | None = None, source: Source = VOC) -> Outcome:
    """VOC 2012 at `root`; the archive is kept, or expected, in the folder above.

    Raises:
        UserError: no host answers, a damaged or unsafe archive, or an incomplete folder in the way.
    """
    problems = verify_voc(root).problems
    if not problems:
        return Outcome("voc", root, False, f"VOC 2012 at {root} is complete; nothing to do.")
    if root.is_dir() and any(root.iterdir()):
        raise UserError(
            f"{root} exists but is incomplete ({problems[0].split(';')[0]}); move it away and run again."
        )
    archive = fetch(source, root.parent, progress)
    unpack(archive, "VOCdevkit/VOC2012", root, progress)
    _require_complete(verify_voc(root), f"{archive} and that folder")
    return Outcome("voc", root, True, f"VOC 2012 is at {root}; {archive} may be deleted.")


def verify_voc(root: Path) -> Verification:
    """Count images, annotations, masks and the lists of the two splits."""
    result = Verification("voc", root)
    remedy = "run `python -m ssepa_lib data voc`"
    for folder, expected in COUNTS.items():
        result.count(folder, len(stems(root / folder, _SUFFIX[folder])), expected, remedy)
    for split, expected in SPLITS.items():
        result.count(f"{split}.txt", len(_listed(root, split)), expected, remedy)
    return result


def prepare_sbd(root: Path, progress: Progress | None = None, source: Source = SBD) -> Outcome:
    """The augmented training set on top of VOC 2012: `train_aug.txt` and masks in `SegmentationClassAug`.

    train_aug = (SBD train ∪ SBD val ∪ VOC train) − VOC val, sorted. Masks are written for the images that
    have none in VOC itself. The archive is read, never unpacked.

    Raises:
        UserError: VOC is not there yet, no host answers, or a damaged archive.
    """
    train, val = _listed(root, "train"), _listed(root, "val")
    if not train or not val or not (root / "JPEGImages").is_dir():
        raise UserError(
            f"{root}: SBD extends VOC 2012, which is not there; run `python -m ssepa_lib data voc` first."
        )
    if not verify_sbd(root).problems:
        return Outcome("sbd", root, False, f"train_aug at {root} is complete; nothing to do.")
    masks = root / "SegmentationClassAug"
    if masks.is_dir() and any(masks.iterdir()):
        raise UserError(f"{masks} exists but is incomplete; move it away and run again.")
    archive = fetch(source, root.parent, progress)
    temporary = masks.with_name(f"{masks.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        listed = _convert_sbd(archive, temporary, set(train) | set(val), progress)
        ids = sorted((listed | set(train)) - set(val))
        write_text(_list_file(root, "train_aug"), "\n".join(ids) + "\n")
        if masks.is_dir():
            masks.rmdir()
        temporary.rename(masks)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _require_complete(verify_sbd(root), f"{archive} and {masks}")
    return Outcome("sbd", root, True, f"train_aug has {len(ids)} images at {root}; {archive} may be deleted.")


def _convert_sbd(archive: Path, folder: Path, skip: set[str], progress: Progress | None) -> set[str]:
    """Write the masks of SBD as PNGs, except those in `skip`; returns the ids of SBD's two lists."""
    listed: set[str] = set()
    try:
        with archive.open("rb") as raw, tarfile.open(fileobj=raw) as tar:
            for member in members(tar, raw, progress):
                path = Path(member.name)
                wanted = path.suffix == ".mat" and path.parent.name == "cls" and path.stem not in skip
                if member.isfile() and wanted:
                    ids = _read_sbd(tar.extractfile(member).read(), f"{archive}: {member.name}")
                    write_mask(folder / f"{path.stem}.png", ids)
                elif member.isfile() and path.name in ("train.txt", "val.txt"):
                    content = tar.extractfile(member).read()
                    listed |= set(decode(content, f"{archive}: {member.name}").split())
    except DAMAGED as error:
        raise UserError(f"{archive}: could not be read ({error}); delete it and run again.") from error
    if not listed:
        raise UserError(
            f"{archive}: there is no train.txt and val.txt in this archive; delete it and run again."
        )
    return listed


def _read_sbd(content: bytes, name: str) -> np.ndarray:
    """Class ids [H, W] of one of SBD's MATLAB files."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        ids = np.asarray(loadmat(io.BytesIO(content))["GTcls"][0, 0]["Segmentation"])
    except (MatReadError, ValueError, LookupError, TypeError, NotImplementedError, zlib.error) as error:
        raise UserError(f"{name} is not an SBD mask ({error}); delete the archive and run again.") from error
    if ids.ndim != 2 or not np.isin(ids, [*range(len(VOC_CLASSES) + 1)]).all():
        raise UserError(f"{name} holds no class ids 0..{len(VOC_CLASSES)}; delete the archive and run again.")
    return ids


def verify_sbd(root: Path) -> Verification:
    """Count the ids of train_aug and their masks."""
    result = Verification("sbd", root)
    remedy = "run `python -m ssepa_lib data sbd`"
    ids = _listed(root, "train_aug")
    masks = stems(root / "SegmentationClass", ".png") | stems(root / "SegmentationClassAug", ".png")
    result.count("train_aug.txt", len(ids), TRAIN_AUG, remedy)
    result.count("masks of train_aug", len(masks & set(ids)), TRAIN_AUG, remedy)
    return result


class VocDataset(FileDataset):
    """PASCAL VOC 2012 in its own layout.

    Labels come from the object names of `Annotations/<id>.xml` (difficult objects count), or from the mask's
    classes where there is no such file. Masks come from `SegmentationClass`, or from `SegmentationClassAug`
    where only that has the file; images of the split `test` have neither (label NaN, mask None).

    Args:
        root: the folder that holds `JPEGImages`.
        split: name of a list in `ImageSets/Segmentation`.

    Raises:
        UserError: missing or half-unpacked folder, unknown or empty split, or images without label.
    """

    name = "voc"
    root_variable = "VOC_ROOT"
    default_root = PROJECT / "data" / "VOCdevkit" / "VOC2012"
    preparations = {
        "voc": Preparation(prepare_voc, verify_voc),
        "sbd": Preparation(prepare_sbd, verify_sbd),
    }

    def __init__(self, root: Path | str, split: str) -> None:
        root = Path(root)
        ids = self._read_list(root, split)
        images = stems(root / "JPEGImages", ".jpg")
        missing = [i for i in ids if i not in images]
        refuse_missing(missing, len(ids), f"{root / 'JPEGImages'}: images of split '{split}'", _AGAIN)
        masks = self._find(root, ids, ".png", "SegmentationClass", "SegmentationClassAug")
        self.annotations = self._find(root, ids, ".xml", "Annotations")
        if split == "val":
            missing = [i for i, mask in zip(ids, masks, strict=True) if mask is None]
            refuse_missing(missing, len(ids), f"{root / 'SegmentationClass'}: masks of split 'val'", _AGAIN)
        if split != "test":
            sources = zip(ids, masks, self.annotations, strict=True)
            missing = [i for i, mask, annotation in sources if mask is None and annotation is None]
            what = f"{root}: labels (Annotations or masks) of split '{split}'"
            refuse_missing(missing, len(ids), what, _AGAIN)
        super().__init__(split, VOC_CLASSES, [root / "JPEGImages" / f"{i}.jpg" for i in ids], masks)

    @staticmethod
    def _find(root: Path, ids: list[str], suffix: str, *folders: str) -> list[Path | None]:
        """The file of each id in the first folder that has it, None where none has."""
        found: dict[str, Path] = {}
        for folder in folders:
            for stem in stems(root / folder, suffix):
                found.setdefault(stem, root / folder / f"{stem}{suffix}")
        return [found.get(i) for i in ids]

    @staticmethod
    def _read_list(root: Path, split: str) -> list[str]:
        path = _list_file(root, split)
        if not (root / "JPEGImages").is_dir() or not path.parent.is_dir():
            inner = [root / "VOC2012", root / "VOCdevkit" / "VOC2012"]
            inner = [folder for folder in inner if (folder / "JPEGImages").is_dir()]
            remedy = "run `python -m ssepa_lib data voc` or set VOC_ROOT or data.root"
            if inner:
                remedy = f"set it to {inner[0]}"
            raise UserError(
                f"{root}: no VOC 2012 folder (JPEGImages and ImageSets/Segmentation expected); {remedy}."
            )
        if not path.is_file():
            known = ", ".join(sorted(stems(path.parent, ".txt")))
            aug = " (train_aug comes with `python -m ssepa_lib data sbd`)" if split == "train_aug" else ""
            raise UserError(f"{path}: there is no such split{aug}; choose one of {known}.")
        ids = _listed(root, split)
        if not ids:
            raise UserError(f"{path}: the split is empty; {_AGAIN}.")
        return ids

    def read_label(self, i: int) -> Tensor:
        path = self.annotations[i]
        if path is not None:
            try:
                note = ElementTree.parse(path).getroot()
                if note.tag != "annotation":
                    raise ValueError(f"<{note.tag}> instead of <annotation>")
                objects = note.findall("object")
            except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
                raise UserError(
                    f"{path}: unreadable annotation ({error}); unpack the archive again."
                ) from error
            return self.multi_hot([thing.findtext("name", "").strip() for thing in objects], path)
        if self.masks[i] is not None:
            return classes_in(read_mask(self.masks[i], len(self.classes)), len(self.classes))
        return torch.full((len(self.classes),), torch.nan)
