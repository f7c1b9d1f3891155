"""What a map is worth, image by image: IoU, where its mass lies, how high its background is.

Masks and parts are used here to measure; nothing is trained.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.data import IGNORE, SegmentationDataset
from ssepa_lib.data.images import resize_mask
from ssepa_lib.data.shapes import SHAPE_CLASSES, render_scene, scene_facts
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation import infer
from ssepa_lib.evaluation.blind import judge
from ssepa_lib.evaluation.evaluate import THRESHOLDS
from ssepa_lib.evaluation.maps import PARTS, floor, mass_by_part, patch_ids
from ssepa_lib.evaluation.multiscale import cam_view, top_class
from ssepa_lib.evaluation.scores import ThresholdConfusion
from ssepa_lib.labels import MatrixRefiner, Refiner, multi_scale_cam, normalise_cam
from ssepa_lib.model import Attention, Network
from ssepa_lib.model.matrix_affinity import same_object
from ssepa_lib.recipe import AffinityConfig, Recipe
from ssepa_lib.workbook.explorers import Chooser, chooser, microscope
from ssepa_lib.workbook.lesson import NO_MASKS, landmarks
from ssepa_lib.workbook.studies.data_study import PLACES, ground_of, single_creatures
from ssepa_lib.workbook.study import object_parts, samples


def has_masks(dataset: SegmentationDataset) -> bool:
    """Whether a dataset can be measured, as it can if every image has a mask; prints one sentence where it
    cannot."""
    masked = dataset.masked
    if not masked:
        print(NO_MASKS)
    elif masked < len(dataset):
        print(f"Only {masked} of {len(dataset)} images have a mask; notebook 08 measures with those alone.")
    return 0 < masked == len(dataset)


@torch.no_grad()
def class_maps(
    network: Network,
    recipe: Recipe,
    images: Tensor,
    labels: Tensor,
    classes: Sequence[int],
    refiners: Mapping[str, Refiner | None],
) -> dict[str, Tensor]:
    """The map of one class per image under several refiners, at scale 1 without flip, as it is measured.

    Args:
        images: [n, 3, H, W], 0..255; labels: [n, C].
        classes: index of the class for each image, from 0.
        refiners: name → refiner; None: the map as it is.

    Returns:
        Name → [n, H, W] in 0..1.
    """
    config, rows = cam_view(recipe.cam, "single"), torch.arange(len(images))
    first = network(images, segment=False, capture=True)
    return {
        name: multi_scale_cam(network, images, labels, config, refiner, first=first).for_labels[rows, classes]
        for name, refiner in refiners.items()
    }


def map_iou(map: Tensor, mask: Tensor, kind: int, threshold: float) -> float:
    """IoU in percent of one class's map [H, W], cut at a threshold, with that class in a mask [H, W].

    Args:
        kind: index of the class, from 0; pixels of 255 do not count.
    """
    counted, found, there = mask != IGNORE, map > threshold, mask == kind + 1
    union = ((found | there) & counted).sum()
    return 100 * float((found & there & counted).sum() / union.clamp(min=1))


def measure_maps(
    network: Network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    refiners: Mapping[str, Refiner | None],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Maps of one network under several refiners, at scale 1, from one walk over a dataset.

    Args:
        refiners: name of the map → its refiner; None: the map as it is.

    Returns:
        One row per image and map: `index` of the image, `class` (the first of its label, from 0), `map`,
        `iou` (percent, at the background threshold), the shares `head`, `body` and `ground` of its mass
        (0..1) and its `floor`; and the mIoU in percent of all classes, one row per threshold, one column per
        map.

    Raises:
        UserError: an image without a mask.
    """
    device, background = network.classifier.weight.device, recipe.cam.background
    thresholds = sorted({*THRESHOLDS, background})
    counts = {name: ThresholdConfusion(dataset.classes, thresholds, device) for name in refiners}
    rows = []
    walk = infer(network, recipe, dataset, device=device, outputs=("refined_cam",), refiners=refiners)
    for prediction in walk:
        if prediction.mask is None:
            raise UserError(f"'{prediction.id}' has no mask; choose a split with masks.")
        maps, mask = prediction.maps(), prediction.mask.to(device)
        for name, count in counts.items():
            count.update(*top_class(maps.refined[name], maps.present, mask.shape), mask)
        if len(maps.present):
            rows += _image_rows(prediction.index, maps, mask, dataset, background)
    curves = {name: [count.at(t).miou for t in thresholds] for name, count in counts.items()}
    return pd.DataFrame(rows), pd.DataFrame(curves, index=pd.Index(thresholds, name="threshold"), dtype=float)


def _image_rows(
    index: int, maps, mask: Tensor, dataset: SegmentationDataset, background: float
) -> list[dict]:
    """The rows of one image, for the first class of its label."""
    kind, rows = int(maps.present[0]), []
    size = tuple(maps.main.shape[-2:])
    small = resize_mask(mask, size).long()
    parts = object_parts(dataset, [index], size, [kind])[0].to(mask.device)
    for name, refined in maps.refined.items():
        shown = refined[0]
        shares = mass_by_part(shown, parts).tolist()
        row = {"index": index, "class": kind, "map": name, "iou": map_iou(shown, small, kind, background)}
        rows.append(row | dict(zip(PARTS, shares, strict=True)) | {"floor": floor(shown, small == kind + 1)})
    return rows


def oracle_curve(network: Network, recipe: Recipe, dataset: SegmentationDataset) -> pd.Series:
    """mIoU in percent per threshold of a map in which every patch has the mean of its own object: a ceiling
    that only masks can give.

    The maps are those of `measure_maps`, and the objects those of `patch_ids`.
    """
    device, background = network.classifier.weight.device, recipe.cam.background
    thresholds = sorted({*THRESHOLDS, background})
    count, patch = ThresholdConfusion(dataset.classes, thresholds, device), network.backbone.patch_size
    for prediction in infer(network, recipe, dataset, device=device, outputs=("cam",), refiners={"": None}):
        maps, mask = prediction.maps(), prediction.mask.to(device)
        size = maps.main.shape[-2:]
        grid = network.backbone.grid(*size)
        small = F.adaptive_avg_pool2d(maps.main, grid).flatten(1).T[None]  # [1, N, P]
        objects = patch_ids(mask, grid).flatten()[None]  # [1, N]
        spread = (same_object(objects) @ small)[0].T.unflatten(1, grid)  # [P, h, w]
        full = F.interpolate(spread[None], (grid[0] * patch[0], grid[1] * patch[1]), mode="nearest")
        count.update(*top_class(normalise_cam(full)[0], maps.present, mask.shape), mask)
    return pd.Series([count.at(t).miou for t in thresholds], index=thresholds, dtype=float)


def wide(images: pd.DataFrame, column: str) -> pd.DataFrame:
    """One column of `measure_maps`, one row per image and one column per map."""
    return images.pivot(index="index", columns="map", values=column)[list(images["map"].unique())]


@torch.no_grad()
def background_pairs(
    network: Network,
    recipe: Recipe,
    refiners: Mapping[str, Refiner | None],
    pairs: int = 50,
    split: str = "val",
) -> pd.DataFrame:
    """Built-in scenes of one creature, each on its class's home background and on a foreign one.

    Args:
        refiners: as in `measure_maps`.
        pairs: how many scenes, the first ones of the split.

    Returns:
        One row per scene and map: `index`, `class`, `map`, and the share of the map's mass on the ground at
        `home` and on `foreign` ground, 0..1.
    """
    chosen, kinds = zip(*itertools.islice(single_creatures(split), pairs), strict=True)
    device, side = network.classifier.weight.device, recipe.data.eval_size or recipe.data.crop
    labels = torch.eye(len(SHAPE_CLASSES), device=device)[list(kinds)]
    rows: dict[tuple[int, str], dict] = {}
    for place in PLACES:
        grounds = [ground_of(kind, place) for kind in kinds]
        pixels, parts = _scenes(split, chosen, grounds, side)
        for name, refiner in refiners.items():
            found = class_maps(network, recipe, pixels.to(device), labels, kinds, {name: refiner})[name]
            for map, part, scene, kind in zip(found, parts, chosen, kinds, strict=True):
                ground = float(mass_by_part(map.cpu(), part)[2])
                rows.setdefault((scene, name), {"index": scene, "class": kind, "map": name})[place] = ground
    return pd.DataFrame(list(rows.values()))


def scene_pair(index: int, side: int, split: str = "val") -> Tensor:
    """A built-in scene of one creature on its home background and on a foreign one, [2, 3, side, side]."""
    kind = SHAPE_CLASSES.index(scene_facts(split, index).classes[0])
    return _scenes(split, [index, index], [ground_of(kind, place) for place in PLACES], side)[0]


def _scenes(
    split: str, indices: Sequence[int], grounds: Sequence[str], side: int
) -> tuple[Tensor, list[Tensor]]:
    """Scenes on chosen backgrounds: images [n, 3, side, side] in 0..255, and their parts [side, side]."""
    pixels, parts = [], []
    for index, ground in zip(indices, grounds, strict=True):
        image, _, part = render_scene(split, index, parts=True, background=ground)
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        pixels.append(F.interpolate(tensor, (side, side), mode="bilinear"))
        parts.append(resize_mask(torch.from_numpy(part), side))
    return torch.cat(pixels), parts


def propagated(affinity: Tensor, cam: Tensor, steps: Sequence[int]) -> Tensor:
    """A map after several numbers of multiplications.

    Args:
        affinity: [N, N].
        cam: [N], not negative.
        steps: increasing, from 0.

    Returns:
        [len(steps), N], each divided by its own maximum.
    """
    found, current, done = [], cam.float(), 0
    for wanted in steps:
        while done < wanted:
            current, done = affinity @ current, done + 1
        found.append(current / current.max().clamp_min(1e-12))
    return torch.stack(found)


def random_rows(patches: int, seed: int = 0) -> Tensor:
    """A random matrix [N, N] whose rows sum to 1."""
    matrix = torch.rand(patches, patches, generator=torch.Generator().manual_seed(seed))
    return matrix / matrix.sum(1, keepdim=True)


def unrefined(config: AffinityConfig) -> MatrixRefiner:
    """A refiner that multiplies by the identity, for the plain CAM beside refined maps.

    A refined map is cut at 0 on the patches and enlarged then, the plain map of `multi_scale_cam` the other
    way round, which makes it narrower: negative patches take away from their positive neighbours. This
    refiner gives both one order.

    Args:
        config: of the affinity that is compared.
    """

    def identity(attention: Attention) -> Tensor:
        like = attention.queries[0]  # [B, H, T, d]
        return torch.eye(attention.patches, device=like.device).expand(len(like), -1, -1)

    return MatrixRefiner(replace(config, per_scale=True, auxiliary=False), matrix=identity)


def always(matrix: Tensor) -> Callable[[Attention], Tensor]:
    """The same matrix [N, N] for every image, as `MatrixRefiner` wants it."""
    return lambda attention: matrix.expand(len(attention.queries[0]), -1, -1)


def per_image(
    table: pd.DataFrame, indices: Sequence[int], names: Sequence[str]
) -> tuple[dict[str, list[float]], dict[str, list[list[float]]]]:
    """IoU and shares of some images out of `measure_maps`: name of the map → one entry per image."""
    found = table.set_index(["map", "index"])
    ious = {name: [float(found.loc[(name, i), "iou"]) for i in indices] for name in names}
    shares = {name: [found.loc[(name, i), list(PARTS)].tolist() for i in indices] for name in names}
    return ious, shares


def case(
    network: Network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    index: int,
    refiners: Mapping[str, Refiner | None],
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """One image of a dataset: its pixels [3, S, S], the maps of its first class by name, and where that
    class is, bool [S, S]."""
    side, where = recipe.data.eval_size or recipe.data.crop, network.classifier.weight.device
    pixels, labels, masks = samples(dataset, [index], side)
    kind = int(labels.argmax())
    found = class_maps(network, recipe, pixels.to(where), labels.to(where), [kind], refiners)
    return pixels[0], {name: maps[0].cpu() for name, maps in found.items()}, masks[0] == kind + 1


def blind_numbers(
    network: Network, recipe: Recipe, dataset: SegmentationDataset, refiner: Refiner | None
) -> pd.DataFrame:
    """`median`, `area` and `PAR` of `blind.judge`, of the first class of each image with a label."""
    found = judge(network, recipe, dataset, refiner, views=False)
    return found.groupby("index").first()[["median", "area", "PAR"]]


def microscopes(
    network: Network,
    recipe: Recipe,
    dataset: SegmentationDataset,
    refiners: Mapping[str, Refiner],
    indices: Sequence[int],
) -> Chooser:
    """The affinity microscope with menus for an image, one of its classes, and the form of the affinity.

    Args:
        refiners: name in the menu → refiner.
        indices: images of the dataset; each is listed once per class of its label.
    """
    side, device = recipe.data.eval_size or recipe.data.crop, network.classifier.weight.device
    scenes = {
        f"{dataset.ids[i]}: {dataset.classes[kind]}": (i, kind)
        for i in indices
        for kind in dataset.label(i).nonzero().flatten().tolist()
    }

    def make(image: str, affinity: str) -> Any:
        index, kind = scenes[image]
        pixels, _, masks = samples(dataset, [index], side)
        with torch.no_grad():
            output = network(pixels.to(device), segment=False, capture=True)
        cam, parts = output.cam[0, kind].relu(), object_parts(dataset, [index], side, [kind])
        spots = landmarks(cam, parts=parts and parts[0])
        return microscope(
            pixels[0],
            refiners[affinity].affinity(output.attention),
            cam=cam.flatten(),
            mask=masks and masks[0],
            start=spots["Body"],
            names={patch: name for name, patch in spots.items()},
        )

    return chooser(make, image=list(scenes), affinity=list(refiners))
