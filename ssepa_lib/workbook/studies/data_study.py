"""What labels say, leave out and could mislead to, counted before anything is trained.

Masks are used here to measure the answers of guesses that never look at an image.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ssepa_lib.data import SegmentationDataset
from ssepa_lib.data.shapes import BACKGROUNDS, SHAPE_CLASSES, render_scene, scene_facts
from ssepa_lib.evaluation.scores import Confusion

PLACES = {"home": 0, "foreign": len(BACKGROUNDS) // 2}  # where a creature is shown → places after its home


def class_backgrounds(split: str, count: int, seed: int = 0) -> pd.DataFrame:
    """On how many of the first `count` built-in scenes each class stands on each background.

    Returns:
        One row per class, one column per background; the home of class i is background i.
    """
    table = pd.DataFrame(0, index=list(SHAPE_CLASSES), columns=list(BACKGROUNDS))
    for index in range(count):
        facts = scene_facts(split, index, seed)
        table.loc[sorted(set(facts.classes)), facts.background] += 1
    return table


def inseparable(labels: Tensor, classes: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of classes of which the first never appears without the second, so that labels cannot part them.

    Args:
        labels: multi-hot [n, C].
    """
    together = (labels.T @ labels).int()  # [C, C]
    alone = together.diagonal()
    return [
        (first, second)
        for i, first in enumerate(classes)
        for j, second in enumerate(classes)
        if i != j and alone[i] > 0 and together[i, j] == alone[i]
    ]


def constant_guess(dataset: SegmentationDataset, answer: int) -> Confusion:
    """Confusion matrix over a dataset with masks of one id, 0..C, at every pixel of every image."""
    confusion = Confusion(dataset.classes)
    for i in range(len(dataset)):
        mask = dataset.mask(i)
        confusion.update(torch.full_like(mask, answer), mask)
    return confusion


def border_colour(image: Tensor) -> Tensor:
    """Mean colour of a frame around an image, a sixteenth of its shorter side wide: [3, H, W] → [3]."""
    width = max(1, min(image.shape[-2:]) // 16)
    frame = torch.ones(image.shape[-2:], dtype=torch.bool)
    frame[width:-width, width:-width] = False
    return image[:, frame].float().mean(1)


def border_colours(dataset: SegmentationDataset, indices: Iterable[int]) -> Tensor:
    """`border_colour` of some images of a dataset, [n, 3]."""
    images = (torch.from_numpy(np.array(dataset.image(i))).permute(2, 0, 1) for i in indices)
    return torch.stack([border_colour(image) for image in images])


def ground_of(kind: int, place: str) -> str:
    """The background of a class (from 0) at "home", or at a "foreign" place, half the list away."""
    return BACKGROUNDS[(kind + PLACES[place]) % len(BACKGROUNDS)]


def single_creatures(split: str, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Index and class, from 0, of the built-in scenes with one creature, one after the other, without end."""
    for index in itertools.count():
        facts = scene_facts(split, index, seed)
        if len(facts.classes) == 1:
            yield index, SHAPE_CLASSES.index(facts.classes[0])


def moved_scenes(split: str, count: int, seed: int = 0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Built-in scenes of one creature, each on the home background of its class and on a foreign one.

    Returns:
        class index [count], images at home and images abroad, [3, H, W] in 0..255 each; the two of a scene
        differ in the background alone.
    """
    scenes = list(itertools.islice(single_creatures(split, seed), count))
    images = {
        place: [render_scene(split, i, seed=seed, background=ground_of(kind, place))[0] for i, kind in scenes]
        for place in PLACES
    }
    home, abroad = ([torch.from_numpy(p).permute(2, 0, 1) for p in images[place]] for place in PLACES)
    return torch.tensor([kind for _, kind in scenes]), home, abroad
