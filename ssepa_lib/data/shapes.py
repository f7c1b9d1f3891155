"""Built-in teaching data: VOC-shaped images of invented creatures, drawn on the fly from (seed, split,
index).

A creature is a small head, whose pattern is the only thing that tells its class, on a larger body whose
colours and texture come from families that all classes share. A classifier trained on image-level labels
therefore needs the head alone, and its CAM shows the head alone: the failure that patch affinity repairs.
Each class has a home background on which it appears more often than elsewhere, so that context can mislead as
it does in photographs.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssepa_lib.data.datasets import SegmentationDataset
from ssepa_lib.data.images import classes_in
from ssepa_lib.errors import UserError
from ssepa_lib.paths import PACKAGE

SHAPE_CLASSES = ("ringlet", "crosslet", "dotlet", "barlet", "checklet", "raylet")
BACKGROUNDS = ("meadow", "sea", "sand", "stone", "brick", "dusk")
TEXTURES = ("plain", "stripes", "spots", "checks")
HUES = 6  # body colour families, evenly spaced
HOME = 0.6  # probability that a scene shows the home background of its first creature
_STREAMS = {"train": 0, "val": 1, "test": 2, "object": 3}

_BACKGROUND_RGB = np.array(
    [[104, 132, 92], [92, 120, 146], [178, 162, 130], [132, 132, 134], [150, 112, 100], [112, 98, 130]],
    np.float32,
)
_DARK, _LIGHT = (24, 22, 28), (246, 244, 238)
_HEAD_RGB = np.array(  # main and second colour per class
    [
        [_LIGHT, _DARK],
        [_DARK, _LIGHT],
        [(255, 176, 198), _DARK],
        [(118, 64, 28), _LIGHT],
        [(166, 238, 194), _DARK],
        [(190, 172, 248), _LIGHT],
    ],
    np.float32,
)


def _rng(seed: int, stream: str, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _STREAMS[stream], index])))


def _noise(rng: np.random.Generator, height: int, width: int, rows: int, columns: int) -> np.ndarray:
    """Smooth noise, of unit variance at its grid points: a random grid, enlarged to [height, width]."""

    def enlarge(length: int, cells: int) -> np.ndarray:
        position = np.linspace(0, cells, length, dtype=np.float32)[:, None]
        return np.maximum(1 - np.abs(position - np.arange(cells + 1, dtype=np.float32)), 0)

    grid = rng.standard_normal((rows + 1, columns + 1), dtype=np.float32)
    return enlarge(height, rows) @ grid @ enlarge(width, columns).T


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB 0..255 [3] of a hue in turns."""
    phase = (np.float32([5, 3, 1]) + 6 * hue) % 6
    return 255 * value * (1 - saturation * np.clip(np.minimum(phase, 4 - phase), 0, 1)).astype(np.float32)


def _background(rng: np.random.Generator, kind: int, height: int, width: int) -> np.ndarray:
    """Textured background of one family, RGB 0..255 [height, width, 3] float32, always of low saturation."""
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    large = _noise(rng, height, width, 4, 4)
    period = rng.uniform(9, 14)
    match BACKGROUNDS[kind]:
        case "meadow":
            shade = 13 * _noise(rng, height, width, height // 12, width // 2)
        case "sea":
            shade = 15 * np.sin(2 * np.pi * y / period + 1.2 * large)
        case "sand":
            shade = 12 * _noise(rng, height, width, height // 2, width // 2)
        case "stone":
            shade = 9 - 45 * (np.abs(_noise(rng, height, width, height // 10, width // 10)) < 0.13)
        case "brick":
            row = y // period
            mortar = (y % period < 2) | ((x + row % 2 * period) % (2 * period) < 2)
            shade = 32 * mortar - 4
        case _:
            shade = 16 * np.sin(2 * np.pi * (x + y) / (2 * period) + large)
    shade = shade + 9 * large + rng.normal(0, 10)
    return (
        _BACKGROUND_RGB[kind] + rng.normal(0, 6, 3).astype(np.float32) + shade[..., None].astype(np.float32)
    )


def _outline(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Body silhouette in its own coordinates (±1 at the ends of the axes): ellipse, box, blob or bean."""
    kind = rng.integers(4)
    if kind == 0:
        return u**2 + v**2 < 1
    if kind == 1:
        return u**4 + v**4 < 0.9
    if kind == 2:
        phase = rng.uniform(0, 2 * np.pi, 2)
        angle = np.arctan2(v, u)
        return (
            u**2 + v**2
            < (0.9 + 0.1 * np.cos(3 * angle + phase[0]) + 0.07 * np.cos(5 * angle + phase[1])) ** 2
        )
    bend = rng.choice([-1, 1]) * rng.uniform(0.3, 0.5)
    return u**2 + (v - bend * (u**2 - 0.5)) ** 2 < 1


def _texture(rng: np.random.Generator, kind: int, x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    """Share 0..1 of the second body colour, in pixels along the body's axes."""
    a, b = 2 * np.pi * x / period, 2 * np.pi * y / period
    match TEXTURES[kind]:
        case "stripes":
            return (np.sin(a) > 0.2).astype(np.float32)
        case "spots":
            return (np.cos(a) + np.cos(b) > 0.7).astype(np.float32)
        case "checks":
            return (np.sin(a) * np.sin(b) > 0).astype(np.float32)
        case _:
            return 0.3 + 0.2 * np.sin(a / 3)


def _head(kind: int, u: np.ndarray, v: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Head of a class: a pattern in its own two colours on the body's; u, v in head radii; RGB [..., 3]."""
    radius, angle = np.sqrt(u**2 + v**2), np.arctan2(v, u)
    rim = radius > 0.85
    match SHAPE_CLASSES[kind]:
        case "ringlet":
            main, second = np.abs(radius - 0.6) < 0.25, radius < 0.2
        case "crosslet":
            main, second = np.minimum(np.abs(u), np.abs(v)) < 0.27, rim
        case "dotlet":
            main, second = radius < 0.65, rim
        case "barlet":
            main, second = np.abs(v) < 0.35, np.abs(v) > 0.7
        case "checklet":
            main, second = u * v > 0, u * v <= 0
        case _:
            main, second = (np.cos(5 * angle) > -0.2) & ~rim, radius < 0.25
    first_colour, second_colour = _HEAD_RGB[kind]
    return np.where(main[..., None], first_colour, np.where(second[..., None], second_colour, 0.8 * colour))


def _creature(
    rng: np.random.Generator,
    image: np.ndarray,
    mask: np.ndarray,
    parts: np.ndarray,
    kind: int,
    centre: np.ndarray,
    radius: float,
) -> None:
    """Draw a creature of class index `kind` into image, mask and parts; `radius` is half its length."""
    height, width = mask.shape
    angle = rng.uniform(0, 2 * np.pi)
    half = np.float32([0.82, rng.uniform(0.48, 0.66)]) * radius  # body half axes
    head = rng.uniform(0.34, 0.42) * radius
    top, left = np.maximum(np.floor(centre - 1.3 * radius).astype(int), 0)
    bottom, right = np.minimum(np.ceil(centre + 1.3 * radius).astype(int), (height, width))
    y = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(centre[0])
    x = np.arange(left, right, dtype=np.float32) - np.float32(centre[1])
    along = (x * np.cos(angle) + y * np.sin(angle)).astype(np.float32) + 0.18 * radius  # the body's axes
    across = (y * np.cos(angle) - x * np.sin(angle)).astype(np.float32)
    body = _outline(rng, along / half[0], across / half[1])
    hue = (rng.integers(HUES) + rng.uniform(-0.18, 0.18)) / HUES
    colour = _hsv(hue, rng.uniform(0.7, 0.9), rng.uniform(0.8, 1.0))
    share = _texture(rng, rng.integers(len(TEXTURES)), along, across, rng.uniform(0.35, 0.5) * radius)
    shading = 1 - 0.12 * np.clip(across / half[1], -1, 1)[..., None]
    drawn = colour * (1 - 0.5 * share[..., None]) * shading
    tilt = rng.uniform(-0.4, 0.4)
    u, v = (along - 0.9 * half[0]) / head, (across - tilt * half[1]) / head
    inside = u**2 + v**2 < 1
    drawn[inside] = _head(kind, u[inside], v[inside], colour)
    shown = body | inside
    image[top:bottom, left:right][shown] = drawn[shown]
    mask[top:bottom, left:right][shown] = kind + 1
    parts[top:bottom, left:right][shown] = np.where(inside, 1, 2)[shown]


def _finish(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Uneven light and sensor noise; uint8."""
    height, width, _ = image.shape
    image *= rng.uniform(0.85, 1.1) + 0.05 * _noise(rng, height, width, 2, 2)[..., None]
    image += rng.standard_normal(image.shape, dtype=np.float32) * 5
    return np.clip(image, 0, 255).astype(np.uint8)


def _place(rng: np.random.Generator, height: int, width: int, radius: float, others: list) -> np.ndarray:
    """The one of 12 random centres that keeps the largest distance from the creatures already there."""
    centres = rng.uniform((0.8 * radius,) * 2, (height - 0.8 * radius, width - 0.8 * radius), (12, 2))
    if not others:
        return centres[0]
    gap = np.stack([np.linalg.norm(centres - centre, axis=1) - other for centre, other in others])
    return centres[gap.min(0).argmax()]


class SceneFacts(NamedTuple):
    """What a scene was made of."""

    classes: tuple[str, ...]  # of every creature, in the order in which they are drawn
    background: str  # one of BACKGROUNDS; the home of class i is background i


def _plan(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
    """The first draws of a scene: relative height and width [2], class index of each creature, background."""
    sides = rng.uniform(0.875, 1.125, 2)
    kinds = rng.integers(len(SHAPE_CLASSES), size=rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15]))
    home = rng.uniform() < HOME
    return sides, kinds, int(kinds[0] if home else rng.integers(len(BACKGROUNDS)))


def _scene_rng(seed: int, split: str, index: int) -> np.random.Generator:
    _require_split(split)
    return _rng(seed, split, index)


def _require_split(split: str) -> None:
    if split not in ("train", "val", "test"):
        raise UserError(f"shapes: there is no split '{split}'; choose train, val or test.")


def scene_facts(split: str, index: int, seed: int = 0) -> SceneFacts:
    """Classes and background of a scene, without drawing it; see `render_scene`.

    Raises:
        UserError: an unknown split.
    """
    _, kinds, ground = _plan(_scene_rng(seed, split, index))
    return SceneFacts(tuple(SHAPE_CLASSES[kind] for kind in kinds), BACKGROUNDS[ground])


def render_scene(
    split: str, index: int, size: int = 128, seed: int = 0, *, parts: bool = False, background: str = ""
) -> tuple[np.ndarray, ...]:
    """One scene with one to three creatures.

    Args:
        split: train, val or test: disjoint random streams.
        index: 0 or more; every index is another scene.
        size: mean side, pixels; each side varies by an eighth, so scenes are rectangular.
        seed: another seed, another dataset.
        parts: whether the part mask is returned as well.
        background: one of `BACKGROUNDS`, for the same creatures on another one; empty: the scene's own.

    Returns:
        image uint8 [H, W, 3] RGB and mask uint8 [H, W], 0 background, 1.. class (`SHAPE_CLASSES` + 1); with
        `parts` also uint8 [H, W], 0 background, 1 head, 2 body.

    Raises:
        UserError: an unknown split or background.
    """
    rng = _scene_rng(seed, split, index)
    sides, kinds, ground = _plan(rng)
    height, width = (int(side) for side in np.rint(size * sides))
    before = copy.deepcopy(rng)
    image = _background(rng, ground, height, width)  # always: the creatures' random numbers follow its own
    if background:
        if background not in BACKGROUNDS:
            known = ", ".join(BACKGROUNDS)
            raise UserError(f"shapes: there is no background '{background}'; choose {known}.")
        image = _background(before, BACKGROUNDS.index(background), height, width)
    mask, part = np.zeros((2, height, width), np.uint8)
    placed: list = []
    for kind in kinds:
        radius = size * rng.uniform(0.3, 0.42) / len(kinds) ** 0.25
        centre = _place(rng, height, width, radius, placed)
        _creature(rng, image, mask, part, int(kind), centre, radius)
        placed.append((centre, radius))
    image = _finish(rng, image)
    return (image, mask, part) if parts else (image, mask)


def render_object(index: int, size: int = 96, seed: int = 0) -> tuple[np.ndarray, int]:
    """One centred creature on a random background, for pre-training: no mask, its own random stream.

    Args:
        index: 0 or more.
        size: side, pixels.
        seed: another seed, other images.

    Returns:
        image uint8 [size, size, 3] RGB and the class index 0..C-1.
    """
    rng = _rng(seed, "object", index)
    kind = int(rng.integers(len(SHAPE_CLASSES)))
    image = _background(rng, rng.integers(len(BACKGROUNDS)), size, size)
    centre = size * rng.uniform(0.42, 0.58, 2)
    mask, part = np.zeros((2, size, size), np.uint8)  # drawn, but nobody asks for them
    _creature(rng, image, mask, part, kind, centre, size * rng.uniform(0.28, 0.45))
    return _finish(rng, image), kind


class ShapesDataset(SegmentationDataset):
    """The built-in scenes, drawn when first asked for and kept in memory (64 kB each).

    Args:
        split: train, val or test.
        images: number of scenes.
        seed: another seed, another dataset.
    """

    name = "shapes"
    default_root = PACKAGE / "data"  # nothing is read: this folder's code draws the images

    def __init__(self, split: str, images: int = 512, seed: int = 0) -> None:
        _require_split(split)
        super().__init__(split, SHAPE_CLASSES, [f"{split}_{i:05d}" for i in range(images)])
        self.seed = seed
        self._scenes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def load(cls, root: object, split: str, images: int = 0) -> "ShapesDataset":
        if images > 1_000_000:
            raise UserError(f"shapes: {images} images are too many; choose 1 000 000 or fewer.")
        return cls(split, images or 512)

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

    def parts(self, i: int) -> Tensor:
        return torch.from_numpy(render_scene(self.split, i, seed=self.seed, parts=True)[2])

    def label(self, i: int) -> Tensor:
        return classes_in(torch.from_numpy(self._scene(i)[1]), len(self.classes))
