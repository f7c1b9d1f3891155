"""The step as the published code runs it, only to be measured against: same numbers, more time and memory.

Float32 throughout, attention maps built and kept, one forward pass per scale and mirror, pixel-adaptive refinement
image by image and threshold by threshold over unfolded neighbourhoods, the energy's filter on the processor.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import hypot

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ssepa_lib.data.views import Batch
from ssepa_lib.labels.cam import normalise_cam, valid_cam
from ssepa_lib.labels.par import RING
from ssepa_lib.labels.pseudo_labels import IGNORE, inside
from ssepa_lib.methods.losses import dense_energy, segmentation_loss
from ssepa_lib.methods.objectives import Segmentation, Step
from ssepa_lib.model.network import Network, NetworkOutput, evaluating
from ssepa_lib.recipe import CamConfig, Recipe
from ssepa_lib.training.trainer import Trainer


class MaterialisedAttention(TorchFunctionMode):
    """Attention maps are built where fused attention is called; with `keep` they stay in `maps`, [B, H, T, T] each."""

    def __init__(self, keep: bool = False):
        super().__init__()
        self.keep, self.maps = keep, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        if self.keep:
            self.maps.append(weights)
        return weights @ value


def stacked_affinity(network: Network, maps: list[Tensor]) -> Tensor:
    """The network's softmax affinity from attention maps of all layers and heads, stacked: [B, N, N]."""
    prefix, config = network.backbone.prefix, network.affinity_config
    stack = torch.stack(maps, 1).mean(2)  # [B, K, P+N, P+N]
    pooled = stack[..., prefix:, prefix:] if config.descriptor == "patch" else stack
    weights = (
        torch.ones_like(pooled[..., 0, 0]) if network.haaf is None else network.haaf(pooled.mean((-2, -1)))
    )
    return torch.einsum("bk,bkij->bij", weights, stack)[:, prefix:, prefix:] / len(maps)


@dataclass
class FullCams:
    """`cam.Cams` with every class kept, [B, C, H, W] each."""

    cam: Tensor
    aux_cam: Tensor
    refined: Tensor | None

    @property
    def best(self) -> Tensor:
        return self.cam if self.refined is None else self.refined


@torch.no_grad()
def reference_cam(
    network: Network, image: Tensor, label: Tensor, config: CamConfig, *, affinity: bool = False
) -> FullCams:
    """`cam.multi_scale_cam` with one forward pass per scale and mirror, all classes, and the affinity as a matrix."""
    steps, auxiliary = network.affinity_config.steps, network.affinity_config.auxiliary
    per_scale, size = affinity and network.affinity_config.per_scale, image.shape[-2:]

    def refine(maps: Tensor, matrix: Tensor) -> Tensor:
        flat = maps.relu().flatten(2).transpose(1, 2)
        for _ in range(steps):
            flat = matrix @ flat
        return flat.transpose(1, 2).unflatten(2, maps.shape[-2:])

    def add_refined(maps: list[Tensor], matrix: Tensor) -> list[Tensor]:
        return [maps[0], refine(maps[1], matrix) if auxiliary else maps[1], refine(maps[0], matrix)]

    def resize(maps: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
        return [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps]

    def encode(x: Tensor) -> tuple[NetworkOutput, list[Tensor]]:
        with MaterialisedAttention(keep=True) as attention:
            return network(x, segment=False), attention.maps

    def view(scale: float, mirror: bool) -> list[Tensor]:
        x = image.float()
        x = x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        out, attention = encode(x.flip(-1) if mirror else x)
        maps = [out.cam, out.aux_cam]
        maps = resize(add_refined(maps, stacked_affinity(network, attention)) if per_scale else maps, size)
        return [m.flip(-1) for m in maps] if mirror else maps

    totals: list[Tensor] = []
    for scale in config.scales:
        maps = view(scale, False)
        if config.flip:
            maps = [torch.maximum(a, b) for a, b in zip(maps, view(scale, True), strict=True)]
        totals = [m.relu() + (totals[i] if totals else 0) for i, m in enumerate(maps)]
    if affinity and not per_scale:
        out, attention = encode(image)
        refined = resize(add_refined(resize(totals, out.grid), stacked_affinity(network, attention)), size)
        totals = [totals[0], refined[1] if auxiliary else totals[1], refined[2]]
    cams = [valid_cam(normalise_cam(m), label) for m in totals]
    return FullCams(cams[0], cams[1], cams[2] if affinity else None)


def _unfolded(maps: Tensor, dilations: list[int]) -> Tensor:
    """Neighbours of every pixel as a tensor of their own: [1, C, H, W] → [1, C, 8·dilations, H, W]."""
    around = []
    for d in dilations:
        blocks = F.unfold(F.pad(maps, (d, d, d, d), mode="replicate"), 3, dilation=d)
        blocks = blocks.view(1, maps.shape[1], 9, *maps.shape[-2:])
        around.append(torch.cat([blocks[:, :, :4], blocks[:, :, 5:]], 2))
    return torch.cat(around, 2)


@torch.no_grad()
def reference_par(image: Tensor, scores: Tensor, dilations: list[int], iterations: int) -> Tensor:
    """`refinement.PixelAdaptiveRefinement`, one image after the other with unfolded neighbours. [B, C, H, W]."""
    distance = torch.tensor([d * hypot(y, x) for d in dilations for y, x in RING], device=image.device)
    position = (distance / (distance.std() + 1e-8) / 0.3).square().neg().softmax(0).view(1, -1, 1, 1)
    refined = []
    for one, score in zip(image.float().split(1), scores.float().split(1), strict=True):
        around = _unfolded(one, dilations)
        spread = around.std(2, keepdim=True) + 1e-8
        colour = ((around - one.unsqueeze(2)).abs() / spread / 0.3).square().neg().mean(1).softmax(1)
        weights = (colour + 0.01 * position).unsqueeze(1)  # [1, 1, neighbours, H, W]
        for _ in range(iterations):
            score = (_unfolded(score, dilations) * weights).sum(2)
        refined.append(score)
    return torch.cat(refined)


@torch.no_grad()
def reference_labels(image: Tensor, cam: Tensor, label: Tensor, box: Tensor, config: CamConfig) -> Tensor:
    """`pseudo_labels.two_threshold_labels`, one image and one threshold after the other. [B, H, W]."""
    height, width = cam.shape[-2:]
    half, result = (height // 2, width // 2), []
    for x, maps, present in zip(image.float().split(1), cam.split(1), label, strict=True):
        classes = present.nonzero()[:, 0]
        small, found = F.interpolate(x, half, mode="bilinear"), []
        for threshold in (config.high, config.low):
            scores = torch.cat([torch.full_like(maps[:, :1], threshold), maps[:, classes]], 1)
            scores = F.interpolate(scores, half, mode="bilinear").softmax(1)
            scores = reference_par(small, scores, config.par_dilations, config.par_iterations)
            winner = F.interpolate(scores, (height, width), mode="bilinear").argmax(1)
            found.append(F.pad(classes + 1, (1, 0))[winner])
        strict, lenient = found
        result.append(strict.masked_fill((strict == 0) & (lenient != 0), IGNORE))
    return torch.cat(result).masked_fill(~inside(box, (height, width)), IGNORE)


class _ReferenceStep(Step):
    @cached_property
    def cams(self) -> FullCams:
        with evaluating(self.network):
            return reference_cam(
                self.network, self.batch.image, self.batch.label, self.recipe.cam, affinity=self.with_affinity
            )

    @cached_property
    def pseudo_label(self) -> Tensor:
        return reference_labels(
            self.batch.image, self.cams.best, self.batch.label, self.batch.box, self.recipe.cam
        )


class _ReferenceSegmentation(nn.Module):
    """L_seg, and L_reg with its filter on the processor."""

    def __init__(self, exact: bool):
        super().__init__()
        self.exact = exact

    def forward(self, step: Step) -> dict[str, Tensor]:
        if not step.dense:
            return {}
        label, batch = step.pseudo_label, step.batch
        full = F.interpolate(step.out.segmentation, label.shape[-2:], mode="bilinear", align_corners=False)
        energy = dense_energy(*(x.cpu() for x in (batch.image, full, label, batch.box)), exact=self.exact)
        return {"seg": segmentation_loss(full, label), "reg": energy.to(full.device)}


class ReferenceTrainer(Trainer):
    """A `Trainer` whose step takes the long way round.

    Args:
        exact_energy: sum the energy's kernel over all pairs of pixels; False: with the fast filter, still on the
            processor, which is closer to the compiled approximate filter of the published code.
    """

    def __init__(
        self, recipe: Recipe, classes: tuple[str, ...], device: torch.device, *, exact_energy: bool = True
    ):
        recipe = replace(
            recipe,
            train=replace(recipe.train, precision="fp32", compile=False, checkpointing=False),
            affinity=replace(recipe.affinity, strategy="all_heads"),
        )
        super().__init__(recipe, classes, device)
        for index, part in enumerate(self.objectives):
            if isinstance(part, Segmentation):
                self.objectives[index] = _ReferenceSegmentation(exact_energy)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        seed = self.recipe.train.seed * 1_000_003 + self.index
        torch.manual_seed(seed)
        step = _ReferenceStep(
            self.network, self.recipe, batch, self.index, self.par, torch.Generator().manual_seed(seed)
        )
        with MaterialisedAttention():
            return {name: value for part in self.objectives for name, value in part(step).items()}
