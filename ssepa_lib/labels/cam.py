"""Class activation maps: multi-scale, flipped, refined by the affinity (ToCo, Section 3.2; SS-EPA, Eq. 7)."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.labels.calibrate import calibrate
from ssepa_lib.labels.pseudo_labels import inside
from ssepa_lib.labels.refine import Refiner
from ssepa_lib.model.learned_affinity import LearnedAffinity
from ssepa_lib.model.network import Network, NetworkOutput
from ssepa_lib.recipe import CamConfig


class _Selection:
    """The classes present in each image, packed to the front: maps of absent classes are never computed."""

    def __init__(self, label: Tensor):
        self.classes = label.shape[1]
        count = max(1, int(label.sum(1).max()))
        self.present, self.index = label.topk(count, dim=1)  # [B, P]

    def pack(self, maps: Tensor) -> Tensor:
        """[b·B, C, h, w] → [b·B, P, h, w]."""
        index = self.index.repeat(len(maps) // len(self.index), 1)
        return maps.gather(1, index[:, :, None, None].expand(-1, -1, *maps.shape[-2:]))

    def unpack(self, maps: Tensor) -> Tensor:
        """[B, P, H, W] → [B, C, H, W], zero for absent classes."""
        full = maps.new_zeros(len(maps), self.classes, *maps.shape[-2:])
        index = self.index[:, :, None, None].expand_as(maps)
        return full.scatter_(1, index, maps * self.present[:, :, None, None].to(maps.dtype))


@dataclass
class _Packed:
    """Maps of the classes present: main and auxiliary and, with a refiner, the refined main map."""

    main: Tensor  # [b, P, h, w]
    auxiliary: Tensor
    refined: Tensor | None

    def map(self, function, *others: "_Packed") -> "_Packed":
        """Apply a function to the main, auxiliary and refined maps of several of these."""
        columns = zip(*((p.main, p.auxiliary, p.refined) for p in (self, *others)), strict=True)
        return _Packed(*(None if maps[0] is None else function(*maps) for maps in columns))


@dataclass
class Cams:
    """Maps in 0..1 at image size, [B, C, H, W]; zero for classes that the image label excludes.

    Only the maps of the classes present are kept; each property fills in the zeros anew.
    """

    select: _Selection
    packed: _Packed
    spread: LearnedAffinity | None = None  # what class scores, background included, are propagated by (AFA)

    @property
    def main(self) -> Tensor:
        """Maps of the main classifier."""
        return self.select.unpack(self.packed.main)

    @property
    def auxiliary(self) -> Tensor:
        """Maps of the auxiliary classifier."""
        return self.select.unpack(self.packed.auxiliary)

    @property
    def refined(self) -> Tensor | None:
        """Main maps after the affinity; None without a refiner."""
        return None if self.packed.refined is None else self.select.unpack(self.packed.refined)

    @property
    def final(self) -> Tensor:
        """The maps to look at and to score: refined where there are any."""
        return self.main if self.packed.refined is None else self.refined

    @property
    def for_labels(self) -> Tensor:
        """The maps that pseudo-labels are made from: refined where there are any (SS-EPA, Section 3.3), but
        the main ones with `spread`, which acts once the background is among the scores."""
        return self.final if self.spread is None else self.main


def normalise_cam(cam: Tensor) -> Tensor:
    """Min-max per image and class: (x − min) / (max − min + 1e-5). [B, C, H, W] → 0..1."""
    cam = cam - cam.amin((-2, -1), keepdim=True)
    return cam / (cam.amax((-2, -1), keepdim=True) + 1e-5)


def valid_cam(cam: Tensor, label: Tensor) -> Tensor:
    """Remove the classes that an image does not show. [B, C, H, W] × [B, C] → [B, C, H, W]."""
    return cam * label[:, :, None, None]


def cam_to_label(cam: Tensor, background: float) -> Tensor:
    """Class ids by the maximum of the maps and a constant background score, [B, C, H, W] → [B, H, W]."""
    score, index = cam.max(1)
    return torch.where(score > background, index + 1, 0)


def _patch_maps(
    output: NetworkOutput, select: _Selection, refiner: Refiner | None, valid: Tensor | None
) -> _Packed:
    """Packed maps of one forward pass at patch resolution; `valid` [b, H, W] is 0 on padding."""
    main, auxiliary = select.pack(output.cam), select.pack(output.aux_cam)  # [b, P, h, w]
    if refiner is None:
        return _Packed(main, auxiliary, None)
    if not refiner.config.auxiliary:
        return _Packed(main, auxiliary, refiner(output.attention, main.relu(), valid))
    both = refiner(output.attention, torch.cat([main, auxiliary], 1).relu(), valid)
    refined, auxiliary = both.chunk(2, 1)
    return _Packed(main, auxiliary, refined)


@torch.no_grad()
def multi_scale_cam(
    network: Network,
    image: Tensor,
    label: Tensor,
    config: CamConfig,
    refiner: Refiner | None = None,
    *,
    first: NetworkOutput | None = None,
    box: Tensor | None = None,
) -> Cams:
    """Multi-scale class activation maps of the classes that an image shows.

    For each scale the image and its flip are encoded; the maps are resized to the image, flipped back, and
    their element-wise maximum is taken, then ReLU; the sum over scales is min-max normalised. The affinity
    is applied at each scale, to the ReLU'd map, before resizing. With `affinity.per_scale: false` it is
    applied once, to the sum, at the patches of scale 1: the affinity of the image itself then serves all
    scales. A learned affinity (AFA) is that of the largest scale. With `cam.calibrate` the map that labels
    are made from is calibrated at the end (but for the auxiliary one, which serves before `cam.main_from`).

    Args:
        image: [B, 3, H, W], 0..255.
        label: [B, C], 0 or 1; maps of absent classes are zero ("valid CAM").
        refiner: also return the refined main maps (and refine the auxiliary ones where it says so).
        first: output of the network on `image` itself, with attention if there is a refiner; saves a pass.
        box: long [B, 4], the part that is not padding; the affinity and the calibration ignore the rest.

    Returns:
        Main, auxiliary and refined maps in 0..1 at the size of the image.
    """
    once = refiner is not None and not refiner.config.per_scale
    per_scale = None if once else refiner
    known = {} if first is None else {1.0: first}  # scale → output of the image there, without its flip
    source = refiner.scale(config.scales) if once else None
    if once and source not in known:
        known[source] = network(_resized(image, source), segment=False, capture=True)
    select, size = _Selection(label), image.shape[-2:]
    valid = None if box is None else inside(box, size).float()  # [B, H, W]
    totals = None
    for scale in config.scales:
        maps = _one_scale(network, image, scale, config.flip, select, per_scale, known.get(scale), valid)
        maps = maps.map(lambda m: _full_size(m.float(), size, config.flip))
        totals = maps if totals is None else totals.map(Tensor.add_, maps)
    if once:
        totals = _refine_total(refiner, known[source], totals, valid)
    spread = refiner.spread(known[source].attention) if once else None
    maps = totals.map(normalise_cam)
    if config.calibrate == "otsu":
        name = "main" if maps.refined is None or spread is not None else "refined"
        maps = replace(maps, **{name: calibrate(getattr(maps, name), valid)})
    return Cams(select, maps, spread)


def _resized(image: Tensor, scale: float) -> Tensor:
    """Images [B, 3, H, W] at another scale, float."""
    x = image.float()
    return x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


def _one_scale(
    network: Network,
    image: Tensor,
    scale: float,
    flip: bool,
    select: _Selection,
    refiner: Refiner | None,
    first: NetworkOutput | None,
    valid: Tensor | None,
) -> _Packed:
    """Patch maps of the image at one scale and, with `flip`, of the flipped image, [b·B, P, h, w]."""
    x = _resized(image, scale)
    shared = None if first is None else _patch_maps(first, select, refiner, valid)
    views = [x] if first is None else []
    views += [x.flip(-1)] if flip else []
    if not views:
        return shared
    if valid is not None:
        valid = torch.cat(([valid] if first is None else []) + ([valid.flip(-1)] if flip else []))
    output = network(torch.cat(views), segment=False, capture=refiner is not None)
    maps = _patch_maps(output, select, refiner, valid)
    return maps if shared is None else shared.map(lambda a, b: torch.cat([a, b]), maps)


def _full_size(maps: Tensor, size: torch.Size, flip: bool) -> Tensor:
    """Maps, with `flip` followed by those of the flipped images, at image size: their maximum, then ReLU."""
    plain, *flipped = maps.chunk(2) if flip else (maps,)
    full = F.interpolate(plain, size, mode="bilinear", align_corners=False)
    for other in flipped:  # flipping back first is the same, and cheaper
        other = F.interpolate(other.flip(-1), size, mode="bilinear", align_corners=False)
        torch.maximum(full, other, out=full)
    return full.relu_()


def _refine_total(refiner: Refiner, output: NetworkOutput, totals: _Packed, valid: Tensor | None) -> _Packed:
    """Sums over scales at image size, refined by the affinity of one output."""
    size, grid = totals.main.shape[-2:], output.grid
    both = refiner.config.auxiliary
    maps = torch.cat([totals.main, totals.auxiliary], 1) if both else totals.main
    small = F.interpolate(maps, grid, mode="bilinear", align_corners=False)  # [B, P, h, w]
    maps = refiner(output.attention, small, valid)
    maps = F.interpolate(maps.float(), size, mode="bilinear", align_corners=False)
    refined, auxiliary = maps.chunk(2, 1) if both else (maps, totals.auxiliary)
    return _Packed(totals.main, auxiliary, refined)
