"""The random views of an image that ToCo and FSR train on.

Every random number of an item is drawn from a generator seeded by (seed, position in the run), so a resumed
run, or one with another number of loader processes, sees the same views. Positions count from 0 over all
steps and ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssepa_lib.data.datasets import SegmentationDataset
from ssepa_lib.randomness import generator, seeded
from ssepa_lib.recipe import Recipe


class Views(NamedTuple):
    """The views of one image: as in `Batch`, without the first dimension."""

    id: str
    image: Tensor
    box: Tensor
    label: Tensor
    global2: Tensor | None
    local_canvas: Tensor | None
    view2: Tensor | None


@dataclass
class Batch:
    """Training views of B images, uint8 RGB 0..255 at crop side S."""

    id: list[str]
    image: Tensor  # [B, 3, S, S]: the training crop, at once the first global view (FSR: view 1)
    box: Tensor  # long [B, 4]: y0, y1, x0, x1 of the part of `image` that is not padding
    label: Tensor  # float [B, C]
    global2: Tensor | None  # [B, 3, S, S]: second global view; None without class token contrast
    local_canvas: Tensor | None  # [B, 3, S, S]: the crop under another jitter, to cut local views from
    view2: Tensor | None  # [B, 3, S, S]: FSR's second view; None without self-reinforcement

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
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
    """Item p is what position p of a run sees: an image of the shuffled dataset and its random views.

    ToCo: random scale, flip and crop; an image that is smaller than the crop after scaling lies at a random
    place on black. The crop is jittered and turned grey at random; it is not blurred because its pixels
    decide where pseudo-labels end. `local_canvas` is the same crop under an independent jitter, grey and blur
    (p 0.5), `global2` a RandomResizedCrop of the whole image with jitter, grey, blur (p 0.1) and solarise (p
    0.2); the paper leaves the probabilities of blur open and these are DINO's for local and second global
    views. Padding stays black: colours change before it is added.

    AFA (`data.views: plain`): ToCo's crop without jitter and grey.

    FSR (`data.views`): a bicubic RandomResizedCrop with flip and jitter (p 0.5), and the augmentation arm if
    the recipe names one; the box is the whole view. `view2`, for FSR's terms, is another such crop, drawn on
    its own.

    Args:
        dataset: images and labels; masks are not read.
        recipe: its fields data, the losses' ctc, unc and cer, contrast, reinforce and train.seed count.
    """

    def __init__(self, dataset: SegmentationDataset, recipe: Recipe) -> None:
        self.dataset, self.data, self.seed = dataset, recipe.data, recipe.train.seed
        self.positions = recipe.train.steps * recipe.data.batch
        self.reinforced, self.contrasted = recipe.self_reinforced, recipe.losses.ctc > 0
        colour = [_jitter(0.8), v2.RandomGrayscale(0.2)]
        self.crop_colour = v2.Identity() if self.data.views == "plain" else v2.Compose(colour)
        self.local_colour = v2.Compose([*colour, v2.RandomApply([_blur], 0.5)])
        crop = v2.RandomResizedCrop(recipe.data.crop, tuple(recipe.contrast.global_scale))
        blur, solarise = v2.RandomApply([_blur], 0.1), v2.RandomSolarize(128, 0.2)
        self.second_global = v2.Compose([crop, v2.RandomHorizontalFlip(), *colour, blur, solarise])
        bicubic = v2.InterpolationMode.BICUBIC
        scale = tuple(recipe.reinforce.view_scale)
        crop = v2.RandomResizedCrop(recipe.data.crop, scale, interpolation=bicubic)
        self.fsr_geometry = v2.Compose([crop, v2.RandomHorizontalFlip()])
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
        """Index of the image at a position; every epoch is another permutation of the dataset."""
        epoch, place = divmod(position, len(self.dataset))
        if self._order[0] != epoch:
            order = torch.randperm(len(self.dataset), generator=generator("order", self.seed, epoch))
            self._order = epoch, order
        return int(self._order[1][place])

    def _draw(self, position: int) -> int:
        """Number of the random view at a position: its own, or one that returns (`data.fixed_views`)."""
        if self.data.fixed_views == 0:
            return position
        epoch, size = position // len(self.dataset), len(self.dataset)
        return self.index(position) + size * (epoch % self.data.fixed_views)

    def __getitem__(self, position: int) -> Views:
        if not 0 <= position < self.positions:
            raise IndexError(position)
        i = self.index(position)
        image, label = self.dataset.image(i), self.dataset.label(i)
        # torchvision draws from the global generator only. The GPU's is left alone, because a training
        # process that loads its own data would otherwise reseed it.
        with seeded("views", self.seed, self._draw(position)):
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
        global2 = local_canvas = view2 = None
        if self.reinforced:
            view2 = F.pil_to_tensor(self.fsr_colour(self.fsr_geometry(image)))
        if self.contrasted:
            global2 = F.pil_to_tensor(self.second_global(image))
            local_canvas = _padded(self.local_colour(crop), side, top, left)
        box = torch.tensor([top, top + crop.height, left, left + crop.width])
        return Views(name, _padded(coloured, side, top, left), box, label, global2, local_canvas, view2)

    def _scaled_crop(self, image: Image.Image) -> Image.Image:
        """Random scale, crop and flip; at most [crop, crop]. Nothing outside it is computed."""
        scale = float(torch.empty(()).uniform_(*self.data.scale))
        width, height = (max(1, round(length * scale)) for length in image.size)
        w, h = min(width, self.data.crop), min(height, self.data.crop)
        x, y = _integer(width - w), _integer(height - h)
        sx, sy = image.width / width, image.height / height
        box = (x * sx, y * sy, min((x + w) * sx, image.width), min((y + h) * sy, image.height))
        crop = image.resize((w, h), Image.Resampling.BILINEAR, box=box)
        return F.horizontal_flip(crop) if _integer(1) else crop
