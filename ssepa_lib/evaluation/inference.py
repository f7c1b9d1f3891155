"""One walk over the images of a dataset: what a network says about each, computed when it is asked for.

Evaluation, predictions, pseudo-labels, the submission and the studies all consume `infer`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import wraps

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssepa_lib.data import SegmentationDataset, eval_batches
from ssepa_lib.data.images import resize_mask
from ssepa_lib.data.loaders import require_classes
from ssepa_lib.device import autocast, cores
from ssepa_lib.evaluation.multiscale import background_and_cam, cam_view, merge_scales, scale_logits
from ssepa_lib.evaluation.results import OUTPUTS, TEST_TIME, require_known
from ssepa_lib.labels.cam import Cams, multi_scale_cam
from ssepa_lib.labels.crf import crf_pool
from ssepa_lib.labels.pseudo_labels import PseudoLabeler
from ssepa_lib.labels.refine import Refiner, build_refiner
from ssepa_lib.model.network import Network, NetworkOutput, evaluating
from ssepa_lib.recipe import Recipe

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Maps:
    """Class activation maps of one image, 0..1, of the P classes present only: [P, h, w]."""

    present: Tensor  # [P] indices of the classes, counted from 0
    main: Tensor
    auxiliary: Tensor
    refined: Mapping[str, Tensor]  # by the refiner's name; the main map where the refiner is None
    final: Tensor  # the first refined map, else the main one


class Prediction:
    """What a network says about one image. `mode` is a test-time mode; `ms_crf` stands for the maps of `ms`.

    Attributes:
        id, index: name and place of the image in the dataset.
        label: [C], the image-level label on the network's device; NaN where it is withheld.
        mask: [H, W] class ids at original size, or None.
    """

    def __init__(self, batch: "_Batch", place: int, index: int, id: str, original: tuple):
        self.id, self.index, self.label = id, index, batch.labels[place]
        self._batch, self._place = batch, place
        self.mask, self._image = original
        self._segmentation: dict[str, Tensor] = {}

    @property
    def image(self) -> Image.Image:
        """The image at its original size."""
        if self._image is None:
            self._image = self._batch.walk.dataset.image(self.index)
        return self._image

    @property
    def input(self) -> Tensor:
        """What the network sees at scale 1, uint8 [3, h, w]."""
        return self._batch.images[self._place]

    @property
    def size(self) -> tuple[int, int]:
        """Original height and width."""
        return tuple(self.image.size[::-1]) if self.mask is None else tuple(self.mask.shape)

    @property
    def scores(self) -> Tensor:
        """Scores of the main classifier at scale 1, [C]."""
        return self._batch.output().scores[self._place].float()

    def maps(self, mode: str = "single") -> Maps:
        """Class activation maps at the network's input size."""
        return self._batch.maps(_base(mode))[self._place]

    def logits(self, mode: str = "single") -> list[Tensor]:
        """Segmentation logits at patch resolution, one [1, C+1, h, w] per scale, channel 0 background."""
        return [m[self._place : self._place + 1] for m in self._batch.logits(_base(mode))]

    def segmentation(self, mode: str = "single") -> Tensor:
        """Segmentation logits at original size, [C+1, H, W]."""
        if mode not in self._segmentation:
            self._segmentation[mode] = merge_scales(self.logits(mode), self.size)[0]
        return self._segmentation[mode]

    def labels(self, output: str, mode: str = "single") -> Tensor:
        """Class ids [H, W] at original size of the `segmentation`, or the `pseudo_label` after PAR."""
        if output == "segmentation":
            return self.segmentation(mode).max(0).indices
        pseudo = self._batch.pseudo_labels(_base(mode))[self._place]
        return resize_mask(pseudo, self.size).long()

    def crf_job(self, output: str) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """Input of the dense CRF: image [H, W, 3], probabilities [X, H, W] and their class ids [X]."""
        if output == "segmentation":
            probabilities = self.segmentation("ms").softmax(0)
            channels = torch.arange(len(probabilities), device=self.label.device)
        else:
            maps, background = self.maps("ms"), self._batch.walk.recipe.cam.background
            probabilities, channels = background_and_cam(maps.final, maps.present, background, self.size)
        return np.array(self.image), probabilities.cpu().numpy(), channels


def infer(
    network: Network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    *,
    device: torch.device | str,
    outputs: Sequence[str] = OUTPUTS,
    test_time: Sequence[str] = ("single",),
    refiners: Mapping[str, Refiner | None] | None = None,
    keep_images: bool = False,
    progress: Progress | None = None,
) -> Iterator[Prediction]:
    """Walk over a dataset in order; images are resized to `data.eval_size`² (0: native size, one by one).

    Nothing is computed before it is asked for, and nothing twice. A prediction keeps its whole batch alive,
    so do not collect them.

    Args:
        outputs, test_time: what may be asked for; see `evaluate`.
        refiners: name → refiner of the main map; None: the recipe's own as `refined_cam`, where it has one.
        keep_images: keep every decoded image at its original size, as is done for the CRF in any case;
            otherwise `Prediction.image` reads it again.
        progress: called with (images done, all images).

    Raises:
        UserError: an unknown output or test-time mode, classes that are not those of the network, or an
            unreadable file.
    """
    require_classes(dataset, network.classes, "the network was trained with")
    require_known("outputs", outputs, OUTPUTS)
    require_known("test_time", test_time, TEST_TIME)
    device = torch.device(device)
    network = network.to(device)
    if refiners is None:
        own = build_refiner(recipe.affinity, network)
        refiners = {} if own is None else {"refined_cam": own}
    if set(outputs) <= {"segmentation"}:
        refiners = {}
    segment = "segmentation" in outputs and "single" in test_time
    labeler = PseudoLabeler(recipe.cam).to(device)
    walk = _Walk(network, recipe, dataset, device, refiners, labeler, segment)
    return _predictions(walk, keep_images or "ms_crf" in test_time, progress)


def _predictions(walk: "_Walk", keep: bool, progress: Progress | None) -> Iterator[Prediction]:
    recipe, index = walk.recipe, 0
    source = _WithOriginals(walk.dataset, keep)
    batches = eval_batches(source, recipe.data.eval_size, recipe.eval.batch, recipe.data.workers)
    for ids, images, labels, originals in batches:
        batch = _Batch(walk, images.to(walk.device), labels.to(walk.device))
        for place, (id, original) in enumerate(zip(ids, originals, strict=True)):
            yield Prediction(batch, place, index, id, original)
            index += 1
            if progress:
                progress(index, len(source))


def label_maps(
    predictions: Iterable[Prediction], output: str, mode: str, processes: int | None = None
) -> Iterator[tuple[str, Image.Image, np.ndarray]]:
    """Final `segmentation` or `pseudo_label`, in order: id, image, class ids uint8 [H, W] at original size.

    Args:
        processes: worker processes of the dense CRF; None: one per CPU core of this process.
    """
    if mode != "ms_crf":
        for p in predictions:
            yield p.id, p.image, p.labels(output, mode).byte().cpu().numpy()
        return

    def jobs() -> Iterator[tuple]:
        for p in predictions:
            image, probabilities, channels = p.crf_job(output)
            yield image, probabilities, (p.id, p.image, channels.byte().cpu().numpy())

    with closing(crf_pool(jobs(), processes or cores())) as labelled:
        for labels, (id, image, channels) in labelled:
            yield id, image, channels[labels]


class _WithOriginals(SegmentationDataset):
    """A dataset whose "masks" are pairs of mask and decoded image, or None, so that a file is read once."""

    def __init__(self, dataset: SegmentationDataset, keep: bool):
        super().__init__(dataset.split, dataset.classes, dataset.ids)
        self.dataset, self.keep, self.last = dataset, keep, (-1, None)

    def image(self, i: int) -> Image.Image:
        image = self.dataset.image(i)
        self.last = (i, image)
        return image

    def label(self, i: int) -> Tensor:
        return self.dataset.label(i)

    def mask(self, i: int) -> tuple[Tensor | None, Image.Image | None]:
        place, image = self.last
        self.last = (-1, None)
        if self.keep and place != i:
            image = self.dataset.image(i)
        return self.dataset.mask(i), image if self.keep else None


@dataclass(frozen=True)
class _Walk:
    """What all batches share."""

    network: Network
    recipe: Recipe
    dataset: SegmentationDataset
    device: torch.device
    refiners: Mapping[str, Refiner | None]
    labeler: PseudoLabeler
    segment: bool

    @contextmanager
    def inferring(self) -> Iterator[None]:
        """No gradient, evaluation mode and the recipe's precision, whatever the caller is in."""
        with torch.no_grad(), evaluating(self.network), autocast(self.recipe.train.precision, self.device):
            yield


def _once(method: Callable) -> Callable:
    """Compute a part of a batch when it is first asked for, and keep it."""

    @wraps(method)
    def kept(self: "_Batch", *mode: str):
        key = (method.__name__, *mode)
        if key not in self.found:
            with self.walk.inferring():
                self.found[key] = method(self, *mode)
        return self.found[key]

    return kept


class _Batch:
    """Images [B, 3, h, w] on their way through the network; modes are `single` and `ms`."""

    def __init__(self, walk: _Walk, images: Tensor, labels: Tensor):
        self.walk, self.images, self.labels = walk, images, labels
        self.found: dict[tuple, object] = {}

    @_once
    def output(self) -> NetworkOutput:
        """The forward pass at scale 1, which everything shares."""
        capture = any(refiner is not None for refiner in self.walk.refiners.values())
        return self.walk.network(self.images, segment=self.walk.segment, capture=capture)

    @_once
    def logits(self, mode: str) -> list[Tensor]:
        """[B, C+1, h, w] per scale."""
        config = self.walk.recipe.eval
        if mode == "ms":
            return scale_logits(self.walk.network, self.images, config.scales, config.flip)
        return [self.output().segmentation.float()]

    def _cams(self, mode: str, refiner: Refiner | None) -> Cams:
        config, first = cam_view(self.walk.recipe.cam, mode), self.output()
        return multi_scale_cam(self.walk.network, self.images, self.labels, config, refiner, first=first)

    @_once
    def cams(self, mode: str) -> Cams:
        """Maps of all images with the first refiner, or without one."""
        return self._cams(mode, next(iter(self.walk.refiners.values()), None))

    @_once
    def maps(self, mode: str) -> list[Maps]:
        """Maps of every image."""
        present = [label.nonzero().flatten() for label in self.labels]

        def pack(maps: Tensor) -> list[Tensor]:
            return [m[classes] for m, classes in zip(maps, present, strict=True)]  # B × [P, h, w]

        names, cams = list(self.walk.refiners), self.cams(mode)
        main, auxiliary, final = pack(cams.main), pack(cams.auxiliary), pack(cams.final)
        refined = {name: pack(self._cams(mode, self.walk.refiners[name]).final) for name in names[1:]}
        refined = {name: final for name in names[:1]} | refined
        own = [{name: maps[i] for name, maps in refined.items()} for i in range(len(present))]
        return [Maps(*parts) for parts in zip(present, main, auxiliary, own, final, strict=True)]

    @_once
    def pseudo_labels(self, mode: str) -> Tensor:
        """[B, h, w] after pixel-adaptive refinement, at the background threshold."""
        cams = self.cams(mode)
        return self.walk.labeler.labels(self.images.float(), cams.for_labels, self.labels, cams.spread)


def _base(mode: str) -> str:
    return "single" if mode == "single" else "ms"
