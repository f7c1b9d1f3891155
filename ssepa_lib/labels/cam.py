"""Class activation maps: multi-scale, mirrored, refined by the patch affinity (ToCo, Section 3.2; SS-EPA, Eq. 7)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
class Cams:
    """Maps in 0..1 at image size, [B, C, H, W]; zero for classes the image label excludes.

    Only the maps of classes present are kept; each property fills in the zeros anew.
    """

    select: _Selection
    packed: list[Tensor]  # [B, P, H, W]: main, auxiliary and, with affinity, refined maps

    @property
    def cam(self) -> Tensor:
        """Main classifier."""
        return self.select.unpack(self.packed[0])

    @property
    def aux_cam(self) -> Tensor:
        """Auxiliary classifier."""
        return self.select.unpack(self.packed[1])

    @property
    def refined(self) -> Tensor | None:
        """Main map after the affinity; None when not asked for."""
        return self.select.unpack(self.packed[2]) if len(self.packed) > 2 else None

    @property
    def best(self) -> Tensor:
        """The map pseudo-labels are made from: refined where there is one (SS-EPA, Section 3.3)."""
        return self.cam if len(self.packed) == 2 else self.refined


def normalise_cam(cam: Tensor) -> Tensor:
    """Min-max per image and class: (x − min) / (max − min + 1e-5). [B, C, H, W] → 0..1."""
    cam = cam - cam.amin((-2, -1), keepdim=True)
    return cam / (cam.amax((-2, -1), keepdim=True) + 1e-5)


def valid_cam(cam: Tensor, label: Tensor) -> Tensor:
    """Remove the classes an image does not show. [B, C, H, W] × [B, C] → [B, C, H, W]."""
    return cam * label[:, :, None, None]


def cam_to_label(cam: Tensor, background: float) -> Tensor:
    """Class ids by the maximum of the maps and a constant background score, [B, C, H, W] → [B, H, W]."""
    score, index = cam.max(1)
    return torch.where(score > background, index + 1, 0)


def refine(output: NetworkOutput, maps: Tensor) -> Tensor:
    """Affinity × map. [B, X, h, w] → [B, X, h, w]."""
    return (output.affinity @ maps.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, output.grid)


def _maps(output: NetworkOutput, select: _Selection, affinity: bool, auxiliary: bool) -> list[Tensor]:
    """Packed main, auxiliary and refined maps of one forward pass at patch resolution."""
    cam, aux = select.pack(output.cam), select.pack(output.aux_cam)
    if not affinity:
        return [cam, aux]
    if not auxiliary:
        return [cam, aux, refine(output, cam.relu())]
    both = refine(output, torch.cat([cam, aux], 1).relu())
    return [cam, both[:, cam.shape[1] :], both[:, : cam.shape[1]]]


@torch.no_grad()
def multi_scale_cam(
    network: Network,
    image: Tensor,
    label: Tensor,
    config: CamConfig,
    *,
    affinity: bool = False,
    first: NetworkOutput | None = None,
) -> Cams:
    """Multi-scale class activation maps of the classes an image shows.

    For each scale image and mirror are encoded; the maps are resized to the image, mirrored back, and their
    element-wise maximum taken, then ReLU; the sum over scales is min-max normalised. The affinity is applied at each
    scale, to the ReLU'd map, before resizing; without `affinity.per_scale` to the sum, at the patches of scale 1: the
    affinity of the image itself serves all scales.

    Args:
        image: [B, 3, H, W], 0..255.
        label: [B, C], 0 or 1; maps of absent classes are zero ("valid CAM").
        affinity: also return the refined main map (and refine the auxiliary one where the recipe says so).
        first: output of the network on `image` itself, when it is already there; saves that pass at scale 1.
    """
    auxiliary = affinity and network.affinity_config.auxiliary
    once = affinity and not network.affinity_config.per_scale
    per_scale = affinity and not once
    if once and first is None:
        first = network(image, segment=False, affinity=True)
    select, size, totals = _Selection(label), image.shape[-2:], None
    for scale in config.scales:
        x = image.float()
        if scale != 1:
            x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        views = [x] if not (scale == 1 and first is not None) else []
        views += [x.flip(-1)] if config.flip else []
        maps: list[Tensor] = []
        if views:
            output = network(torch.cat(views), segment=False, affinity=per_scale)
            maps = _maps(output, select, per_scale, auxiliary)
        if scale == 1 and first is not None:
            shared = _maps(first, select, per_scale, auxiliary)
            maps = [torch.cat([a, b]) for a, b in zip(shared, maps, strict=True)] if maps else shared
        maps = [_full_size(m.float(), size, config.flip) for m in maps]
        totals = maps if totals is None else [a.add_(b) for a, b in zip(totals, maps, strict=True)]
    if once:
        totals = _refine_total(first, totals, auxiliary)
    return Cams(select, [normalise_cam(m) for m in totals])


def _full_size(maps: Tensor, size: torch.Size, flip: bool) -> Tensor:
    """Maps, with `flip` followed by those of the mirrored images, at image size: their maximum, then ReLU."""
    plain, *mirrored = maps.chunk(2) if flip else (maps,)
    full = F.interpolate(plain, size, mode="bilinear", align_corners=False)
    for other in mirrored:  # mirroring back first is the same, and cheaper
        other = F.interpolate(other.flip(-1), size, mode="bilinear", align_corners=False)
        torch.maximum(full, other, out=full)
    return full.relu_()


def _refine_total(output: NetworkOutput, totals: list[Tensor], auxiliary: bool) -> list[Tensor]:
    """Main, auxiliary and refined sums over scales at image size, from the first two and the affinity of scale 1."""
    size, count = totals[0].shape[-2:], totals[0].shape[1]
    maps = torch.cat(totals, 1) if auxiliary else totals[0]
    maps = refine(output, F.interpolate(maps, output.grid, mode="bilinear", align_corners=False))
    maps = F.interpolate(maps.float(), size, mode="bilinear", align_corners=False)
    return [totals[0], maps[:, count:] if auxiliary else totals[1], maps[:, :count]]
