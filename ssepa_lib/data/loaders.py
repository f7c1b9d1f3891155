"""Batches of a dataset: shuffled views for training, images in order for evaluation."""

import os
import threading
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from multiprocessing import parent_process

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from ssepa_lib.data.datasets import SegmentationDataset
from ssepa_lib.data.views import TrainViews, collate
from ssepa_lib.errors import UserError
from ssepa_lib.recipe import Recipe

HANGS_AFTER = 900.0  # seconds without a batch after which loader processes count as hanging


def require_classes(dataset: SegmentationDataset, known: Sequence[str], whose: str) -> None:
    """Refuse a dataset whose classes are not those that are known, in the same order.

    Args:
        whose: who knows them, such as "the network was trained with".

    Raises:
        UserError: the first class that differs is named.
    """
    pairs = enumerate(zip_longest(dataset.classes, known, fillvalue="none"), start=1)
    for number, (found, expected) in pairs:
        if found != expected:
            raise UserError(
                f"class {number} of {dataset.name} is '{found}', but {whose} '{expected}' there; give the "
                "dataset the same classes in the same order (classes.txt in a folder), or train again."
            )


def _end_with_parent(_: int) -> None:
    """Let a loader process end as soon as its parent has, if only by a kill.

    torch's own check fails while a batch waits to be handed over: it then waits for ever.
    """

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Loader(DataLoader):
    """A DataLoader that leaves the global random state alone, and whose workers fail in one sentence."""

    def __init__(self, dataset: Dataset, num_workers: int, **settings) -> None:
        settings |= {"timeout": HANGS_AFTER if num_workers else 0, "worker_init_fn": _end_with_parent}
        super().__init__(dataset, num_workers=num_workers, generator=torch.Generator(), **settings)

    def __iter__(self) -> Iterator:
        try:
            yield from super().__iter__()
        except UserError as error:  # torch prepends the worker's traceback to the message
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from error
        except (MemoryError, RuntimeError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            if not (isinstance(error, MemoryError) or reason.startswith("DataLoader ")):
                raise
            raise UserError(
                f"the processes that load images have failed ({reason or 'memory is exhausted'}); see "
                "whether the disk of the images answers and memory suffices, or lower data.workers, "
                "and run the same command again."
            ) from error


def train_loader(
    dataset: SegmentationDataset, recipe: Recipe, start_step: int = 0, rank: int = 0, world: int = 1
) -> DataLoader:
    """Batches of the steps `start_step`..`recipe.train.steps` - 1, this process's share of each.

    Args:
        dataset: training images; shuffled anew every epoch; epochs follow each other without a gap.
        recipe: `data.batch` is the total over all processes.
        start_step: the first step of a resumed run.
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
    """The dataset in order, as (ids, images uint8 [B, 3, size, size], labels [B, C], masks at original size).

    Args:
        size: side to which images are resized (bilinear, not keeping the aspect); 0: original, one by one.
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
