"""One interface for every dataset: images, image-level labels and, for evaluation only, masks.

Training reads images and labels; masks are read where something is measured. A dataset is one class, which
also knows where its files lie and how to get and check them. Naming the class registers it in `DATASETS`.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset

from ssepa_lib.data.download import Progress
from ssepa_lib.data.images import UNREADABLE, read_image, read_mask, voc_palette
from ssepa_lib.errors import UserError
from ssepa_lib.files import require_place, visible
from ssepa_lib.recipe import DataConfig, Recipe

DATASETS: dict[str, type["SegmentationDataset"]] = {}


class Item(NamedTuple):
    """One image with everything known about it."""

    id: str
    image: Tensor  # uint8 [3, H, W], RGB 0..255
    label: Tensor  # float [C], 0 or 1; NaN where it is withheld (VOC test)
    mask: Tensor | None  # uint8 [H, W], class ids


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
        """Note a number; fewer than expected is a problem, more is not (VOC's test images share a folder)."""
        self.counts[what] = found, expected
        if found < expected:
            self.problems.append(f"{what}: {found} of {expected} found; {remedy}.")


class Preparation(NamedTuple):
    """How something is brought onto the disk, and checked; both can be repeated at any time."""

    prepare: Callable[[Path, Progress | None], Outcome]
    verify: Callable[[Path], Verification]


class SegmentationDataset(Dataset):
    """What every dataset offers: `name`, `split`, `classes`, `ids`; item i is the image `ids[i]`.

    Subclasses give `image`, `mask` and `label`, which can be called one by one so that nothing is decoded in
    vain. A subclass that sets `name` can be chosen by `data.name`; its constructor then takes (root, split),
    or it overrides `load`.
    """

    name: ClassVar[str] = ""
    root_variable: ClassVar[str] = ""  # environment variable that names the folder of the data
    default_root: ClassVar[Path | None] = None  # where the data lie otherwise; None: it has to be set
    preparations: ClassVar[dict[str, Preparation]] = {}  # name on the command line: how it is done

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            DATASETS[cls.name] = cls

    def __init__(self, split: str, classes: Iterable[str], ids: list[str]) -> None:
        self.split = split
        self.classes = tuple(classes)
        self.ids = ids

    @classmethod
    def find_root(cls, root: Path | str = "") -> Path:
        """Folder of the data: `root` if given, else the environment variable, else the default.

        Raises:
            UserError: none of the three is set.
        """
        variable = os.environ.get(cls.root_variable)
        if root:
            return Path(root)
        if variable:
            return Path(variable).resolve()
        if cls.default_root is None:
            raise UserError(
                f"data.root is empty; set it, or {cls.root_variable}, to the folder of your images."
            )
        return cls.default_root

    @classmethod
    def load(cls, root: Path | str, split: str, images: int = 0) -> Self:
        """The first so many images of a split (0: all) at `find_root(root)`."""
        dataset = cls(cls.find_root(root), split)
        dataset.ids = dataset.ids[: images or None]
        return dataset

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Item:
        pixels = torch.from_numpy(np.array(self.image(i))).permute(2, 0, 1).contiguous()  # [3, H, W]
        return Item(self.ids[i], pixels, self.label(i), self.mask(i))

    def image(self, i: int) -> Image.Image:
        """RGB image."""
        raise NotImplementedError

    def mask(self, i: int) -> Tensor | None:
        """Class ids uint8 [H, W], None where there is no mask."""
        raise NotImplementedError

    def label(self, i: int) -> Tensor:
        """Image-level label, multi-hot float [C]; no image is decoded for it."""
        raise NotImplementedError

    def parts(self, i: int) -> Tensor | None:
        """Parts of the objects uint8 [H, W], 1 head, 2 body, 0 background; None where they are not known."""
        return None

    @property
    def masked(self) -> int:
        """How many images have a mask: all or none, unless a dataset knows better."""
        return len(self) if len(self) and self.mask(0) is not None else 0

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """RGB colour of each of the 256 ids."""
        return voc_palette()

    def multi_hot(self, names: Iterable[str], file: Path) -> Tensor:
        """Label float [C] of class names, which were read from `file`.

        Raises:
            UserError: a name that is not a class.
        """
        label = torch.zeros(len(self.classes))
        for name in names:
            if name not in self.classes:
                raise UserError(f"{file}: unknown class '{name}'; known are {', '.join(self.classes)}.")
            label[self.classes.index(name)] = 1
        return label


class FileDataset(SegmentationDataset):
    """Images and masks on disk: `images[i]`, `masks[i]` (or None); a label is read once and remembered."""

    upright = False  # whether images are turned by their EXIF tag

    def __init__(
        self, split: str, classes: Iterable[str], images: list[Path], masks: list[Path | None]
    ) -> None:
        super().__init__(split, classes, [path.stem for path in images])
        self.images = images
        self.masks = masks
        self._labels: dict[int, Tensor] = {}

    @property
    def masked(self) -> int:
        return sum(mask is not None for mask in self.masks[: len(self)])

    def image(self, i: int) -> Image.Image:
        return read_image(self.images[i], self.upright)

    def mask(self, i: int) -> Tensor | None:
        if self.masks[i] is None:
            return None
        try:
            with Image.open(self.images[i]) as file:  # the header alone
                turned = self.upright and file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                size = file.size[::-1] if turned else file.size
        except UNREADABLE as error:
            raise UserError(f"{self.images[i]}: unreadable image ({error}); replace the file.") from error
        return read_mask(self.masks[i], len(self.classes), size)

    def label(self, i: int) -> Tensor:
        if i not in self._labels:
            self._labels[i] = self.read_label(i)
        return self._labels[i]

    def read_label(self, i: int) -> Tensor:
        """The label of image i from its file, float [C]."""
        raise NotImplementedError


class Subset(SegmentationDataset):
    """Some images of another dataset, in the order of `indices`."""

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        super().__init__(dataset.split, dataset.classes, [dataset.ids[i] for i in indices])
        self.name, self.dataset, self.indices = dataset.name, dataset, list(indices)

    @property
    def masked(self) -> int:
        return sum(self.mask(i) is not None for i in range(len(self)))

    def image(self, i: int) -> Image.Image:
        return self.dataset.image(self.indices[i])

    def mask(self, i: int) -> Tensor | None:
        return self.dataset.mask(self.indices[i])

    def label(self, i: int) -> Tensor:
        return self.dataset.label(self.indices[i])

    def parts(self, i: int) -> Tensor | None:
        return self.dataset.parts(self.indices[i])


def stems(folder: Path, suffix: str) -> set[str]:
    """Names, without the suffix, of a folder's files of one kind; none if the folder does not exist."""
    return {path.stem for path in visible(folder.glob(f"*{suffix}"))}


def refuse_missing(missing: list[str], total: int, what: str, remedy: str) -> None:
    """Raise a UserError that counts what is missing, if anything is."""
    if missing:
        raise UserError(f"{what}: {len(missing)} of {total} are missing, first {missing[0]}; {remedy}.")


def _dataset_class(data: DataConfig) -> type[SegmentationDataset]:
    if data.name not in DATASETS:
        raise UserError(f"recipe: data.name is '{data.name}'; choose one of {', '.join(sorted(DATASETS))}.")
    return DATASETS[data.name]


def resolve_root(data: DataConfig) -> Path:
    """Folder of a recipe's data: `data.root`, else the dataset's environment variable, else its default.

    Raises:
        UserError: an unknown dataset, or one whose folder has to be set and is not.
    """
    return _dataset_class(data).find_root(data.root)


def build_dataset(data: DataConfig, split: str) -> SegmentationDataset:
    """The dataset of a recipe.

    Args:
        data: `recipe.data`.
        split: the role, train or val; `data.train_split` / `data.val_split` name the split that plays it, and
            `data.train_images` / `data.val_images` limit it to its first images.

    Raises:
        UserError: an unknown dataset, a missing or half-unpacked folder, an unknown or empty split, or
            training images without labels.
    """
    if split not in ("train", "val"):
        raise UserError(
            f"'{split}' is not a role; choose train or val and set data.train_split or data.val_split."
        )
    if split == "train":
        name, images = data.train_split, data.train_images
    else:
        name, images = data.val_split, data.val_images
    dataset = _dataset_class(data).load(data.root, name, images)
    if split == "train" and bool(torch.isnan(dataset.label(0)).any()):
        raise UserError(f"data.train_split '{name}' has no labels; choose a split that has them.")
    return dataset


def split_of(recipe: Recipe, split: str = "val", images: int = 0) -> SegmentationDataset:
    """A split of a recipe's data: `train` and `val` stand for the recipe's own splits, other names for
    themselves.

    Args:
        recipe: its section `data` counts.
        split: train, val or the name of another split.
        images: use the first so many; 0: as many as the recipe says.
    """
    data = recipe.data
    if split == "train":
        return build_dataset(replace(data, train_images=images or data.train_images), "train")
    name = data.val_split if split == "val" else split
    return build_dataset(replace(data, val_split=name, val_images=images or data.val_images), "val")


def measured_split(recipe: Recipe, split: str = "val", images: int = 0) -> SegmentationDataset:
    """`split_of`, but `train` is `data.measured_train` where that is not what the recipe trains on."""
    if split == "train" and recipe.data.measured_train:
        recipe = replace(recipe, data=replace(recipe.data, train_split=recipe.data.measured_train))
    return split_of(recipe, split, images)


def _preparation(name: str) -> tuple[type[SegmentationDataset], Preparation]:
    known = {key: (cls, how) for cls in DATASETS.values() for key, how in cls.preparations.items()}
    if name not in known:
        raise UserError(f"there is no dataset '{name}' to prepare or check; choose {', '.join(known)}.")
    return known[name]


def _place(dataset: type[SegmentationDataset], root: Path | None) -> Path:
    place = dataset.find_root(root or "")
    require_place(place, writable=False)
    return place


def preparable() -> list[str]:
    """What `prepare` and `verify` know, each after what it builds on."""
    return [name for cls in DATASETS.values() for name in cls.preparations]


def prepare(name: str, root: Path | None = None, progress: Progress | None = None) -> Outcome:
    """Download or derive what is missing of a dataset; what is there is kept.

    Args:
        name: one of `preparable()`.
        root: folder of the data; default: the dataset's environment variable or default folder.
        progress: called with (done, all or None): bytes downloaded or unpacked, or images converted.

    Raises:
        UserError: another name, no host answers, or files that are damaged or in the way.
    """
    dataset, preparation = _preparation(name)
    return preparation.prepare(_place(dataset, root), progress)


def verify(name: str, root: Path | None = None) -> Verification:
    """Count what is on the disk and compare it with the published numbers.

    Args:
        name: one of `preparable()`.
        root: folder of the data; default: the dataset's environment variable or default folder.

    Raises:
        UserError: another name.
    """
    dataset, preparation = _preparation(name)
    return preparation.verify(_place(dataset, root))
