"""From a data set to batches: the views of ToCo and FSR for training, resized pictures for evaluation.

Every random number of an item is drawn from a generator seeded by (seed, position in the run), so a resumed run, or
one with another number of loader processes, sees the same views. Positions count from 0 over all steps and ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssepa_lib.data.datasets import SegmentationDataset
from ssepa_lib.errors import UserError
from ssepa_lib.recipe import Recipe

_SHUFFLE, _VIEWS = 0, 1  # random streams


class Views(NamedTuple):
    """The views of one image: as in `Batch`, without the first dimension."""

    id: str
    image: Tensor
    box: Tensor
    label: Tensor
    global2: Tensor | None
    local_source: Tensor | None
    view2: Tensor | None


@dataclass
class Batch:
    """Training views of B images, uint8 RGB 0..255 at crop side S."""

    id: list[str]
    image: Tensor  # [B, 3, S, S]: the training crop, at once the first global view (FSR: view 1)
    box: Tensor  # long [B, 4]: y0, y1, x0, x1 of the part of `image` that is not padding
    label: Tensor  # float [B, C]
    global2: Tensor | None  # [B, 3, S, S]: second global view; None without class token contrast
    local_source: (
        Tensor | None
    )  # [B, 3, S, S]: pixel for pixel the crop under another jitter, to cut local views from
    view2: Tensor | None  # [B, 3, S, S]: FSR's second view; None without self-reinforcement

    def _map(self, function) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{k: function(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (called by the loader)."""
        return self._map(Tensor.pin_memory)


def collate(views: list[Views]) -> Batch:
    """Stack the views of several images."""
    columns = dict(zip(Views._fields, zip(*views, strict=True), strict=True))
    stacked = {k: None if v[0] is None else torch.stack(v) for k, v in columns.items() if k != "id"}
    return Batch(id=list(columns["id"]), **stacked)


def _state(*key: int) -> int:
    """A well-mixed 32-bit seed of several numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _integer(high: int) -> int:
    """Uniform in 0..high."""
    return int(torch.randint(high + 1, ()))


def _blur(image: Image.Image) -> Image.Image:
    """Gaussian blur, σ uniform in 0.1..2 pixels (DINO, arXiv 2104.14294, Appendix)."""
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2))))


def _jitter(p: float) -> v2.Transform:
    return v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p)


def _padded(image: Image.Image, side: int, top: int, left: int) -> Tensor:
    """Place an image on a black square, uint8 [3, side, side]."""
    canvas = torch.zeros(3, side, side, dtype=torch.uint8)
    canvas[:, top : top + image.height, left : left + image.width] = F.pil_to_tensor(image)
    return canvas


class TrainViews(Dataset):
    """Item p is what position p of a run sees: an image of the shuffled data set and its random views.

    ToCo: random scale, mirror and crop; where the scaled image is smaller than the crop it lies at a random place on
    black. The crop is jittered and turned grey at random; it is not blurred because its pixels decide where
    pseudo-labels end. `local_source` is the same crop under an independent jitter, grey and blur (p 0.5), `global2`
    a RandomResizedCrop of the whole image with jitter, grey, blur (p 0.1) and solarise (p 0.2); the paper leaves the
    probabilities of blur open and these are DINO's for local and second global views. Padding stays black: colours
    change before it is added.

    FSR (`data.views`): a bicubic RandomResizedCrop with mirror and jitter (p 0.5), and the augmentation arm if the
    recipe names one; the box is the whole view. `view2`, for FSR's terms, is another such crop, drawn on its own.

    Args:
        dataset: pictures and labels; masks are not read.
        recipe: its fields data, the losses' ctc, unc and cer, contrast, reinforce and train.seed count.
    """

    def __init__(self, dataset: SegmentationDataset, recipe: Recipe) -> None:
        self.dataset, self.data, self.seed = dataset, recipe.data, recipe.train.seed
        self.positions = recipe.train.steps * recipe.data.batch
        self.reinforced, self.contrasted = recipe.self_reinforced, recipe.losses.ctc > 0
        colour = [_jitter(0.8), v2.RandomGrayscale(0.2)]
        self.crop_colour = v2.Compose(colour)
        self.local_colour = v2.Compose([*colour, v2.RandomApply([_blur], 0.5)])
        self.second_global = v2.Compose(
            [
                v2.RandomResizedCrop(recipe.data.crop, tuple(recipe.contrast.global_scale)),
                v2.RandomHorizontalFlip(),
                *colour,
                v2.RandomApply([_blur], 0.1),
                v2.RandomSolarize(128, 0.2),
            ]
        )
        self.fsr_geometry = v2.Compose(
            [
                v2.RandomResizedCrop(
                    recipe.data.crop,
                    tuple(recipe.reinforce.view_scale),
                    interpolation=v2.InterpolationMode.BICUBIC,
                ),
                v2.RandomHorizontalFlip(),
            ]
        )
        arms = {
            "none": [],
            "blur": [v2.RandomApply([_blur], 0.5)],
            "solarise": [v2.RandomSolarize(128, 0.2)],
            "autoaugment": [v2.AutoAugment()],
        }
        self.fsr_colour = v2.Compose([_jitter(0.5), *arms[recipe.reinforce.augmentation]])
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.positions

    def index(self, position: int) -> int:
        """Which image stands at a position: every epoch is another permutation."""
        epoch, place = divmod(position, len(self.dataset))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_state(self.seed, _SHUFFLE, epoch))
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator)
        return int(self._order[1][place])

    def __getitem__(self, position: int) -> Views:
        if not 0 <= position < self.positions:
            raise IndexError(position)
        i = self.index(position)
        image, label = self.dataset.image(i), self.dataset.label(i)
        # torchvision draws from the global generator only. Its state is put back, and only the CPU's is touched:
        # torch.manual_seed would reseed the GPU of a training process that loads its own data.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_state(self.seed, _VIEWS, position))
            return self._views(self.dataset.ids[i], image, label)

    def _views(self, name: str, image: Image.Image, label: Tensor) -> Views:
        side = self.data.crop
        if self.data.views == "fsr":
            crop, top, left = self.fsr_geometry(image), 0, 0
            coloured = self.fsr_colour(crop)
        else:
            crop = self._scaled_crop(image)
            top, left = _integer(side - crop.height), _integer(side - crop.width)
            coloured = self.crop_colour(crop)
        global2 = local_source = view2 = None
        if self.reinforced:
            view2 = F.pil_to_tensor(self.fsr_colour(self.fsr_geometry(image)))
        if self.contrasted:
            global2 = F.pil_to_tensor(self.second_global(image))
            local_source = _padded(self.local_colour(crop), side, top, left)
        box = torch.tensor([top, top + crop.height, left, left + crop.width])
        return Views(name, _padded(coloured, side, top, left), box, label, global2, local_source, view2)

    def _scaled_crop(self, image: Image.Image) -> Image.Image:
        """Random scale, crop and mirror; at most [crop, crop]. Only the crop's part of the scaled image is computed."""
        scale = float(torch.empty(()).uniform_(*self.data.scale))
        width, height = (max(1, round(length * scale)) for length in image.size)
        w, h = min(width, self.data.crop), min(height, self.data.crop)
        x, y = _integer(width - w), _integer(height - h)
        sx, sy = image.width / width, image.height / height
        box = (x * sx, y * sy, min((x + w) * sx, image.width), min((y + h) * sy, image.height))
        crop = image.resize((w, h), Image.Resampling.BILINEAR, box=box)
        return F.horizontal_flip(crop) if _integer(1) else crop


class _Loader(DataLoader):
    """A DataLoader that leaves the global random state alone and keeps a worker's UserError one sentence."""

    def __init__(self, dataset: Dataset, **settings) -> None:
        super().__init__(dataset, generator=torch.Generator(), **settings)

    def __iter__(self) -> Iterator:
        try:
            yield from super().__iter__()
        except UserError as error:  # torch prepends the worker's traceback to the message
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from error


def train_loader(
    dataset: SegmentationDataset, recipe: Recipe, start_step: int = 0, rank: int = 0, world: int = 1
) -> DataLoader:
    """Batches of the steps `start_step`..`recipe.train.steps` - 1, this process's share of each.

    Args:
        dataset: training images; shuffled anew every epoch, epochs follow each other without a gap.
        recipe: `data.batch` is the total over all processes.
        start_step: where a resumed run goes on.
        rank, world: number of this process and of all processes.

    Raises:
        UserError: the batch cannot be split evenly, or an image or label is unreadable.
    """
    batch = recipe.data.batch
    if batch % world:
        raise UserError(
            f"data.batch is {batch} but there are {world} processes; choose a multiple of {world}."
        )
    share = batch // world
    starts = (step * batch + rank * share for step in range(start_step, recipe.train.steps))
    return _Loader(
        TrainViews(dataset, recipe),
        batch_sampler=[range(start, start + share) for start in starts],
        collate_fn=collate,
        num_workers=recipe.data.workers,
        pin_memory=recipe.train.device != "cpu" and torch.cuda.is_available(),
    )


class _EvalItems(Dataset):
    def __init__(self, dataset: SegmentationDataset, size: int) -> None:
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[str, Tensor, Tensor, Tensor | None]:
        image = self.dataset.image(i)
        if self.size:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return self.dataset.ids[i], F.pil_to_tensor(image), self.dataset.label(i), self.dataset.mask(i)


def _collate_eval(items: list[tuple]) -> tuple[list[str], Tensor, Tensor, list[Tensor | None]]:
    ids, images, labels, masks = zip(*items, strict=True)
    return list(ids), torch.stack(images), torch.stack(labels), list(masks)


def eval_batches(dataset: SegmentationDataset, size: int, batch_size: int, workers: int = 0) -> DataLoader:
    """The data set in order, as (ids, images uint8 [B, 3, size, size], labels [B, C], masks at original size).

    Args:
        size: side to which images are resized (bilinear, not keeping the aspect); 0: original size, one by one.
        batch_size: images at once, where they are resized.
        workers: loader processes; 0: none.

    Raises:
        UserError: an unreadable image, mask or label.
    """
    return _Loader(
        _EvalItems(dataset, size),
        batch_size=batch_size if size else 1,
        collate_fn=_collate_eval,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
