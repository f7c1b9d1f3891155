"""One interface for every data set: pictures, image-level labels and, for evaluation only, masks.

Masks hold class ids: 0 background, 1..C the classes in the order of `classes`, 255 ignore. Training reads pictures and
labels; masks are read where something is measured.
"""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ssepa_lib import paths
from ssepa_lib.data.shapes import SHAPE_CLASSES, render_scene
from ssepa_lib.errors import UserError
from ssepa_lib.recipe import DataConfig

IGNORE = 255
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
COCO_CLASSES = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)


class Item(NamedTuple):
    """One picture with everything known about it."""

    id: str
    image: Tensor  # uint8 [3, H, W], RGB 0..255
    label: Tensor  # float [C], 0 or 1; NaN where it is withheld (VOC test)
    mask: Tensor | None  # uint8 [H, W], class ids


def voc_palette() -> list[tuple[int, int, int]]:
    """The 256 RGB colours of VOC masks: the bits of an id are dealt to the channels in turn, high bits first."""
    return [
        tuple(sum((i >> (3 * k + c) & 1) << (7 - k) for k in range(3)) for c in range(3)) for i in range(256)
    ]


def read_image(path: Path, upright: bool = False) -> Image.Image:
    """A picture of any mode as RGB; `upright` turns it as its EXIF tag says.

    Raises:
        UserError: the file is missing, truncated or no picture.
    """
    try:
        with Image.open(path) as file:
            return (ImageOps.exif_transpose(file) if upright else file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path}: unreadable image ({error}); replace the file or take it out of the list."
        ) from error


def read_mask(path: Path, classes: int, size: tuple[int, int] | None = None) -> Tensor:
    """Class ids of a palette or greyscale PNG, uint8 [H, W]; the palette's colours are not looked at.

    Args:
        classes: C; ids beyond it, other than 255, are refused.
        size: (width, height) of the picture it belongs to, checked if given.

    Raises:
        UserError: unreadable, more than one channel, another size, or an id out of range.
    """
    try:
        with Image.open(path) as file:
            mode, ids = file.mode, np.array(file)
    except (OSError, SyntaxError, ValueError) as error:
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


def classes_in(mask: Tensor, classes: int) -> Tensor:
    """Multi-hot label float [C] of the classes that a mask shows."""
    return (torch.bincount(mask.flatten().int(), minlength=256)[1 : classes + 1] > 0).float()


class SegmentationDataset(Dataset):
    """What every data set offers: `name`, `split`, `classes`, `ids`; item i is the picture `ids[i]`.

    Subclasses give `image`, `mask` and `label`, which can be asked for one by one so that nothing is decoded in vain.
    """

    name = ""

    def __init__(self, split: str, classes: Iterable[str], ids: list[str]) -> None:
        self.split, self.classes, self.ids = split, tuple(classes), ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Item:
        pixels = torch.from_numpy(np.array(self.image(i))).permute(2, 0, 1).contiguous()
        return Item(self.ids[i], pixels, self.label(i), self.mask(i))

    def image(self, i: int) -> Image.Image:
        """RGB picture."""
        raise NotImplementedError

    def mask(self, i: int) -> Tensor | None:
        """Class ids uint8 [H, W], None where there is no mask."""
        raise NotImplementedError

    def label(self, i: int) -> Tensor:
        """Image-level label, multi-hot float [C]; remembered after the first call, no picture is decoded."""
        raise NotImplementedError

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """RGB colour of each of the 256 ids."""
        return voc_palette()

    def multi_hot(self, names: Iterable[str], source: Path) -> Tensor:
        """Label float [C] of class names; `source` is the file they were read from.

        Raises:
            UserError: a name that is no class.
        """
        label = torch.zeros(len(self.classes))
        for name in names:
            if name not in self.classes:
                raise UserError(f"{source}: unknown class '{name}'; known are {', '.join(self.classes)}.")
            label[self.classes.index(name)] = 1
        return label


class ShapesDataset(SegmentationDataset):
    """Built-in scenes (`ssepa_lib.data.shapes`), drawn when first asked for and kept in memory (64 kB each).

    Args:
        split: train, val or test.
        images: number of scenes.
        seed: another seed, another data set.
    """

    name = "shapes"

    def __init__(self, split: str, images: int = 512, seed: int = 0) -> None:
        super().__init__(split, SHAPE_CLASSES, [f"{split}_{i:05d}" for i in range(images)])
        self.seed = seed
        self._scenes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _scene(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        if i not in self._scenes:
            self._scenes[i] = render_scene(self.split, i, seed=self.seed)
        return self._scenes[i]

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self._scene(i)[0])

    def mask(self, i: int) -> Tensor:
        return torch.from_numpy(self._scene(i)[1].copy())

    def label(self, i: int) -> Tensor:
        return classes_in(torch.from_numpy(self._scene(i)[1]), len(self.classes))


class _FileDataset(SegmentationDataset):
    """Pictures and masks on disk: `images[i]`, `masks[i]` (or None)."""

    upright = False  # whether pictures are turned by their EXIF tag

    def __init__(
        self, split: str, classes: Iterable[str], images: list[Path], masks: list[Path | None]
    ) -> None:
        super().__init__(split, classes, [path.stem for path in images])
        self.images, self.masks = images, masks
        self._labels: dict[int, Tensor] = {}

    def image(self, i: int) -> Image.Image:
        return read_image(self.images[i], self.upright)

    def mask(self, i: int) -> Tensor | None:
        if self.masks[i] is None:
            return None
        try:
            with Image.open(self.images[i]) as file:  # the header alone
                turned = self.upright and file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                size = file.size[::-1] if turned else file.size
        except OSError as error:
            raise UserError(f"{self.images[i]}: unreadable image ({error}); replace the file.") from error
        return read_mask(self.masks[i], len(self.classes), size)

    def label(self, i: int) -> Tensor:
        if i not in self._labels:
            self._labels[i] = self._read_label(i)
        return self._labels[i]

    def _read_label(self, i: int) -> Tensor:
        raise NotImplementedError


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _refuse_missing(missing: list[str], of: int, what: str, remedy: str) -> None:
    if missing:
        raise UserError(f"{what}: {len(missing)} of {of} are missing, first {missing[0]}; {remedy}.")


class VocDataset(_FileDataset):
    """PASCAL VOC 2012 in its own layout.

    Labels come from the object names of `Annotations/<id>.xml` (difficult objects count), or from the mask's classes
    where there is no such file. Masks come from `SegmentationClass`, or from `SegmentationClassAug` where only that
    has the file; images of the split `test` have neither (label NaN, mask None).

    Args:
        root: the folder that holds `JPEGImages`.
        split: name of a list in `ImageSets/Segmentation`.

    Raises:
        UserError: missing or half-unpacked folder, unknown or empty split, or images without label.
    """

    name = "voc"

    def __init__(self, root: Path | str, split: str) -> None:
        root = Path(root)
        ids = self._read_list(root, split)
        pictures = _names(root / "JPEGImages")
        again = "unpack the archive again with `python -m ssepa_lib data voc`"
        _refuse_missing(
            [i for i in ids if f"{i}.jpg" not in pictures],
            len(ids),
            f"{root / 'JPEGImages'}: images of split '{split}'",
            again,
        )
        where = {
            name: folder
            for folder in ("SegmentationClassAug", "SegmentationClass")
            for name in _names(root / folder)
        }
        masks = [root / where[f"{i}.png"] / f"{i}.png" if f"{i}.png" in where else None for i in ids]
        notes = _names(root / "Annotations")
        self.annotations = [root / "Annotations" / f"{i}.xml" if f"{i}.xml" in notes else None for i in ids]
        rows = list(zip(ids, masks, self.annotations, strict=True))
        if split == "val":
            _refuse_missing(
                [i for i, mask, _ in rows if mask is None],
                len(ids),
                f"{root / 'SegmentationClass'}: masks of split 'val'",
                again,
            )
        if split != "test":
            _refuse_missing(
                [i for i, mask, note in rows if mask is None and note is None],
                len(ids),
                f"{root}: labels (Annotations or masks) of split '{split}'",
                again,
            )
        super().__init__(split, VOC_CLASSES, [root / "JPEGImages" / f"{i}.jpg" for i in ids], masks)

    @staticmethod
    def _read_list(root: Path, split: str) -> list[str]:
        lists = root / "ImageSets" / "Segmentation"
        if not (root / "JPEGImages").is_dir() or not lists.is_dir():
            inner = [
                p for p in (root / "VOC2012", root / "VOCdevkit" / "VOC2012") if (p / "JPEGImages").is_dir()
            ]
            remedy = (
                f"set it to {inner[0]}"
                if inner
                else "run `python -m ssepa_lib data voc` or set VOC_ROOT or data.root"
            )
            raise UserError(
                f"{root}: no VOC 2012 folder (JPEGImages and ImageSets/Segmentation expected); {remedy}."
            )
        path = lists / f"{split}.txt"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in lists.glob("*.txt")))
            aug = " (train_aug comes with `python -m ssepa_lib data sbd`)" if split == "train_aug" else ""
            raise UserError(f"{path}: there is no such split{aug}; choose one of {known}.")
        ids = path.read_text().split()
        if not ids:
            raise UserError(
                f"{path}: the split is empty; unpack the archive again with `python -m ssepa_lib data voc`."
            )
        return ids

    def _read_label(self, i: int) -> Tensor:
        path = self.annotations[i]
        if path is not None:
            try:
                objects = ElementTree.parse(path).getroot().findall("object")
            except (OSError, ElementTree.ParseError) as error:
                raise UserError(
                    f"{path}: unreadable annotation ({error}); unpack the archive again."
                ) from error
            return self.multi_hot([thing.findtext("name", "").strip() for thing in objects], path)
        if self.masks[i] is not None:
            return classes_in(read_mask(self.masks[i], len(self.classes)), len(self.classes))
        return torch.full((len(self.classes),), torch.nan)


def read_label_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV with the columns image, classes (separated by `;`) and, optionally, split.

    Raises:
        UserError: missing file, missing or unknown columns, a row too long, without class, or for an image seen before.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; write one row per image with the columns image, classes.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: unreadable table ({error}); save it as comma-separated UTF-8.") from error
    lacking, unknown = {"image", "classes"} - set(columns), set(columns) - {"image", "classes", "split"}
    if lacking or unknown:
        problem = f"column '{min(lacking)}' is missing" if lacking else f"column '{min(unknown)}' is unknown"
        raise UserError(f"{path}: {problem}; the columns are image, classes and, optionally, split.")
    seen = set()
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UserError(
                f"{path}, line {number}: {len(columns)} values expected; separate classes by ';'."
            )
        row.update({key: value.strip() for key, value in row.items()})
        if not row["classes"]:
            raise UserError(
                f"{path}, line {number}: {row['image']} has no class; name one, or 'background' for none."
            )
        if row["image"] in seen:
            raise UserError(
                f"{path}, line {number}: {row['image']} is listed twice; keep one row and join its classes by ';'."
            )
        seen.add(row["image"])
    return rows


class _TableDataset(_FileDataset):
    """Pictures whose labels stand in a table; `rows` are those of `read_label_table`."""

    def __init__(
        self,
        split: str,
        classes: Iterable[str],
        table: Path,
        rows: list[dict[str, str]],
        images: list[Path],
        masks: list[Path | None],
    ) -> None:
        super().__init__(split, classes, images, masks)
        for i, row in enumerate(rows):
            names = {name.strip() for name in row["classes"].split(";")} - {"", "background"}
            self._labels[i] = self.multi_hot(sorted(names), table)


class CocoDataset(_TableDataset):
    """COCO 2014 as semantic segmentation, from the files that `python -m ssepa_lib data coco` derives.

    Args:
        root: the folder that holds `train2014`, `val2014` and the derived `semantic`.
        split: train or val.

    Raises:
        UserError: missing or half-prepared files, or an unknown split.
    """

    name = "coco"

    def __init__(self, root: Path | str, split: str) -> None:
        root, remedy = Path(root), "run `python -m ssepa_lib data coco`"
        if split not in ("train", "val"):
            raise UserError(f"coco: there is no split '{split}'; choose train or val.")
        table = root / "semantic" / f"{split}.csv"
        if not table.is_file():
            raise UserError(f"{table} is missing; {remedy}, or set COCO_ROOT or data.root.")
        rows = read_label_table(table)
        if not rows:
            raise UserError(f"{table}: the split is empty; delete the file and {remedy} again.")
        pictures, masks = root / f"{split}2014", table.parent / f"{split}2014"
        names, present, painted = [row["image"] for row in rows], _names(pictures), _names(masks)
        stems = [name.removesuffix(".jpg") for name in names]
        _refuse_missing(
            [n for n in names if n not in present],
            len(rows),
            f"{pictures}: images",
            "unpack the archive again",
        )
        _refuse_missing([s for s in stems if f"{s}.png" not in painted], len(rows), f"{masks}: masks", remedy)
        super().__init__(
            split,
            COCO_CLASSES,
            table,
            rows,
            [pictures / n for n in names],
            [masks / f"{s}.png" for s in stems],
        )


class FolderDataset(_TableDataset):
    """Your own images: `images/*.jpg|png`, `labels.csv`, and optionally `classes.txt` and `masks/<stem>.png`.

    `labels.csv` has the columns image (file name), classes (separated by `;`, `background` for none) and optionally
    split; without that column every split is the whole folder. `classes.txt` has one class per line, in the order of
    the mask ids; without it the classes of the table in alphabetical order count. Masks are needed only where
    something is measured. Pictures are turned upright by their EXIF tag.

    Raises:
        UserError: missing files, a row without its image, an image without its row, a mask without its image, an
            unknown class or an empty split.
    """

    name = "folder"
    upright = True

    def __init__(self, root: Path | str, split: str) -> None:
        root = Path(root)
        pictures, table = root / "images", root / "labels.csv"
        if not pictures.is_dir():
            raise UserError(
                f"{pictures} is missing; put your images there or set data.root to the folder that holds it."
            )
        rows = read_label_table(table)
        present = {name for name in _names(pictures) if name.lower().endswith(IMAGE_SUFFIXES)}
        listed = [row["image"] for row in rows]
        _refuse_missing(
            [n for n in listed if n not in present],
            len(rows),
            f"{table}: images listed",
            f"add them to {pictures} or delete their rows",
        )
        _refuse_missing(
            sorted(present - set(listed)),
            len(present),
            f"{pictures}: rows of labels.csv for its images",
            "add a row for each or move the images away",
        )
        stems = {Path(name).stem: name for name in listed}
        if len(stems) < len(listed):
            twice = next(name for name in listed if stems[Path(name).stem] != name)
            raise UserError(
                f"{pictures / twice}: another image has the same name before the suffix; rename one."
            )
        painted = {Path(name).stem for name in _names(root / "masks") if name.endswith(".png")}
        _refuse_missing(
            sorted(painted - set(stems)),
            len(painted),
            f"{root / 'masks'}: images of masks",
            f"add them to {pictures} or delete the masks",
        )
        classes = self._classes(root / "classes.txt", rows)
        if rows and "split" in rows[0]:
            known = sorted({row["split"] for row in rows})
            rows = [row for row in rows if row["split"] == split]
            if not rows:
                raise UserError(
                    f"{table}: split '{split}' is empty; the column split holds {', '.join(known)}."
                )
        if not rows:
            raise UserError(f"{table}: there is no row; write one per image.")
        images = [pictures / row["image"] for row in rows]
        masks = [root / "masks" / f"{p.stem}.png" if p.stem in painted else None for p in images]
        super().__init__(split, classes, table, rows, images, masks)

    @staticmethod
    def _classes(path: Path, rows: list[dict[str, str]]) -> list[str]:
        if path.is_file():
            names = [
                line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()
            ]
            if len(set(names)) < len(names) or "background" in names:
                raise UserError(f"{path}: list every class once, without the background.")
        else:
            names = sorted(
                {n.strip() for row in rows for n in row["classes"].split(";")} - {"", "background"}
            )
        if not 0 < len(names) < IGNORE:
            raise UserError(f"{path}: {len(names)} classes; give 1 to {IGNORE - 1}.")
        return names


def build_dataset(data: DataConfig, split: str) -> SegmentationDataset:
    """The data set of a recipe.

    Args:
        data: `recipe.data`.
        split: the role, train or val; `data.train_split` / `data.val_split` name the split that plays it, and
            `data.train_images` / `data.val_images` limit it to its first images.

    Raises:
        UserError: missing or half-unpacked folder, unknown or empty split, or training images without labels.
    """
    if split not in ("train", "val"):
        raise UserError(
            f"'{split}' is no role of a split; choose train or val and set data.train_split or data.val_split."
        )
    name, limit = (
        (data.train_split, data.train_images) if split == "train" else (data.val_split, data.val_images)
    )
    if data.name == "shapes":
        return ShapesDataset(name, limit or 512)
    if data.name == "folder":
        if not data.root:
            raise UserError(
                "data.root is empty; set it, or FOLDER_ROOT, to the folder of your images and labels.csv."
            )
        dataset: SegmentationDataset = FolderDataset(data.root, name)
    elif data.name == "voc":
        dataset = VocDataset(data.root or paths.voc_root(), name)
    else:
        dataset = CocoDataset(data.root or paths.coco_root(), name)
    if limit:
        dataset.ids = dataset.ids[:limit]
    if split == "train" and bool(torch.isnan(dataset.label(0)).any()):
        raise UserError(f"data.train_split '{name}' has no labels; choose a split that has them.")
    return dataset
