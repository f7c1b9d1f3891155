"""Images in, training views out.

A recipe's section `data` names a dataset; `build_dataset` opens it. Each item is an image, its image-level
label and, where there is one, its mask. `train_loader` turns images and labels into batches of the random
views that the losses need; `eval_batches` gives images in order, with the masks that only measuring may see.
`survey` looks at a folder of somebody's own images, `adopt` makes a dataset of what is usable.
A dataset is one file in this folder: every module here is imported, and every class that has a `name` can be
chosen by `data.name`.
"""

from importlib import import_module
from pkgutil import iter_modules

from ssepa_lib.data.datasets import (
    DATASETS,
    Item,
    SegmentationDataset,
    Subset,
    build_dataset,
    measured_split,
    preparable,
    prepare,
    resolve_root,
    split_of,
    verify,
)
from ssepa_lib.data.images import IGNORE
from ssepa_lib.data.loaders import eval_batches, train_loader
from ssepa_lib.data.views import Batch

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "DATASETS",
    "IGNORE",
    "Batch",
    "Item",
    "SegmentationDataset",
    "Subset",
    "build_dataset",
    "eval_batches",
    "measured_split",
    "preparable",
    "prepare",
    "resolve_root",
    "split_of",
    "train_loader",
    "verify",
]
