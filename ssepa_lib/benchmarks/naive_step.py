"""The step as the published code runs it, only to be measured against: same numbers, more time and memory.

Float32 throughout, attention maps built and kept, one forward pass per scale and flip, pixel-adaptive
refinement image by image and threshold by threshold over unfolded neighbourhoods, the energy's filter on
the CPU.
"""

from dataclasses import dataclass, replace
from math import hypot

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ssepa_lib.data import IGNORE, Batch
from ssepa_lib.labels import Refiner, normalise_cam, valid_cam
from ssepa_lib.labels.par import RING
from ssepa_lib.labels.pseudo_labels import inside
from ssepa_lib.methods import TrainStep, take_step
from ssepa_lib.methods.losses import dense_energy, segmentation_loss
from ssepa_lib.methods.toco import Segmentation
from ssepa_lib.model import Network, NetworkOutput, evaluating
from ssepa_lib.model.affinity import covered
from ssepa_lib.model.backbone import Backbone
from ssepa_lib.randomness import seeded
from ssepa_lib.recipe import CamConfig, Recipe
from ssepa_lib.training import Trainer


class MaterialisedAttention(TorchFunctionMode):
    """Attention maps are built where fused attention is called; with `keep` they stay in `maps`, [B, H, T,
    T] each."""

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


def stacked_affinity(refiner: Refiner, maps: list[Tensor], prefix: int) -> Tensor:
    """The affinity of a refiner from the attention maps of all layers and heads, stacked: [B, N, N].

    Args:
        maps: per layer [B, H, P+N, P+N], rows sum to one.
        prefix: number P of prefix tokens.
    """
    stack = torch.stack(maps, 1).mean(2)  # [B, K, P+N, P+N]
    pooled = stack[..., prefix:, prefix:] if refiner.config.descriptor == "patch" else stack
    descriptor = pooled.mean((-2, -1))  # [B, K]
    weights = torch.ones_like(descriptor) if refiner.haaf is None else refiner.haaf(descriptor)
    return torch.einsum("bk,bkij->bij", weights, stack)[:, prefix:, prefix:] / len(maps)


class _HiddenKeys(TorchFunctionMode):
    """Every attention sees the visible keys alone, bool [B, 1, 1, T]."""

    def __init__(self, visible: Tensor):
        super().__init__()
        self.visible = visible

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            kwargs = {**(kwargs or {}), "attn_mask": self.visible}
        return func(*args, **(kwargs or {}))


def masked_class_tokens(backbone: Backbone, image: Tensor, visible: Tensor) -> Tensor:
    """`Backbone.class_tokens` as published: whole images, whose hidden keys are masked. [B, V, D]."""
    views, first = visible.shape[1], backbone.num_prefix_tokens
    keys = F.pad(visible.flatten(0, 1), (first, 0), value=True)  # [B·V, P+N]
    with _HiddenKeys(keys[:, None, None]):
        return backbone(image.repeat_interleave(views, 0)).cls.unflatten(0, visible.shape[:2])


@dataclass
class FullCams:
    """`labels.Cams` with every class kept, [B, C, H, W] each."""

    main: Tensor
    auxiliary: Tensor
    refined: Tensor | None

    @property
    def for_labels(self) -> Tensor:
        """The maps from which pseudo-labels are made."""
        return self.main if self.refined is None else self.refined


def _resized(maps: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
    return [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps]


def _propagated(maps: list[Tensor], matrix: Tensor, refiner: Refiner) -> list[Tensor]:
    """Main, auxiliary and refined maps [B, C, h, w] from the first two and the affinity [B, N, N]."""

    def propagate(m: Tensor) -> Tensor:
        flat = m.relu().flatten(2).transpose(1, 2)  # [B, N, C]
        for done in range(refiner.config.iterations):
            further = matrix @ flat
            if done and refiner.config.coverage:
                further = torch.where(covered(flat) < refiner.config.coverage, further, flat)
            flat = further
        return flat.transpose(1, 2).unflatten(2, m.shape[-2:])

    main, auxiliary = maps
    auxiliary = propagate(auxiliary) if refiner.config.auxiliary else auxiliary
    return [main, auxiliary, propagate(main)]


def _encode(network: Network, image: Tensor) -> tuple[NetworkOutput, list[Tensor]]:
    """One forward pass with its attention maps."""
    with MaterialisedAttention(keep=True) as attention:
        return network(image, segment=False), attention.maps


@torch.no_grad()
def naive_cam(
    network: Network, image: Tensor, label: Tensor, config: CamConfig, refiner: Refiner | None = None
) -> FullCams:
    """`labels.multi_scale_cam` with one pass per scale and flip, all classes, and the affinity as a
    matrix."""
    prefix, size = network.backbone.num_prefix_tokens, image.shape[-2:]
    per_scale = refiner is not None and refiner.config.per_scale

    def view(scale: float, flip: bool) -> list[Tensor]:
        x = image.float()
        x = x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        out, attention = _encode(network, x.flip(-1) if flip else x)
        maps = [out.cam, out.aux_cam]
        if per_scale:
            maps = _propagated(maps, stacked_affinity(refiner, attention, prefix), refiner)
        maps = _resized(maps, size)
        return [m.flip(-1) for m in maps] if flip else maps

    totals: list[Tensor] = []
    for scale in config.scales:
        maps = view(scale, False)
        if config.flip:
            maps = [torch.maximum(a, b) for a, b in zip(maps, view(scale, True), strict=True)]
        totals = [m.relu() + (totals[i] if totals else 0) for i, m in enumerate(maps)]
    if refiner is not None and not per_scale:
        out, attention = _encode(network, image)
        matrix = stacked_affinity(refiner, attention, prefix)
        _, auxiliary, refined = _resized(_propagated(_resized(totals, out.grid), matrix, refiner), size)
        totals = [totals[0], auxiliary if refiner.config.auxiliary else totals[1], refined]
    cams = [valid_cam(normalise_cam(m), label) for m in totals]
    return FullCams(*cams[:2], cams[2] if refiner is not None else None)


def _unfolded(maps: Tensor, dilations: list[int]) -> Tensor:
    """Neighbours of every pixel as a tensor of their own: [1, C, H, W] → [1, C, 8·dilations, H, W]."""
    around = []
    for d in dilations:
        blocks = F.unfold(F.pad(maps, (d, d, d, d), mode="replicate"), 3, dilation=d)
        blocks = blocks.view(1, maps.shape[1], 9, *maps.shape[-2:])
        around.append(torch.cat([blocks[:, :, :4], blocks[:, :, 5:]], 2))
    return torch.cat(around, 2)


@torch.no_grad()
def naive_par(image: Tensor, scores: Tensor, dilations: list[int], iterations: int) -> Tensor:
    """`PixelAdaptiveRefinement`, one image after the other with unfolded neighbours. [B, C, H, W]."""
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
def naive_labels(image: Tensor, cam: Tensor, label: Tensor, box: Tensor, config: CamConfig) -> Tensor:
    """`PseudoLabeler.training_labels`, one image and one threshold after the other. [B, H, W]."""
    height, width = cam.shape[-2:]
    half, result = (height // 2, width // 2), []
    for x, maps, present in zip(image.float().split(1), cam.split(1), label, strict=True):
        classes = present.nonzero()[:, 0]
        small, found = F.interpolate(x, half, mode="bilinear"), []
        for threshold in (config.high, config.low):
            scores = torch.cat([torch.full_like(maps[:, :1], threshold), maps[:, classes]], 1)
            scores = F.interpolate(scores, half, mode="bilinear").softmax(1)
            scores = naive_par(small, scores, config.par_dilations, config.par_iterations)
            winner = F.interpolate(scores, (height, width), mode="bilinear").argmax(1)
            found.append(F.pad(classes + 1, (1, 0))[winner])
        strict, lenient = found
        result.append(strict.masked_fill((strict == 0) & (lenient != 0), IGNORE))
    return torch.cat(result).masked_fill(~inside(box, (height, width)), IGNORE)


class _NaiveSegmentation(Segmentation):
    """L_seg, and L_reg with its filter on the CPU."""

    def __init__(self, recipe: Recipe, exact: bool):
        super().__init__(recipe)
        self.exact = exact

    def forward(self, step: TrainStep) -> dict[str, Tensor]:
        label, batch = step.pseudo_label, step.batch
        logits = step.output.segmentation
        full = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)  # [B, C+1, S, S]
        energy = dense_energy(*(x.cpu() for x in (batch.image, full, label, batch.box)), exact=self.exact)
        return {"seg": segmentation_loss(full, label), "reg": energy.to(full.device)}


class NaiveTrainer(Trainer):
    """A `Trainer` whose step takes the long way round.

    Args:
        exact_energy: sum the energy's kernel over all pairs of pixels; False: with the fast filter, still
            on the CPU, which is closer to the compiled approximate filter of the published code.
    """

    def __init__(
        self, recipe: Recipe, classes: tuple[str, ...], device: torch.device, *, exact_energy: bool = True
    ):
        recipe = replace(
            recipe,
            train=replace(recipe.train, precision="fp32", compile=False, checkpointing=False),
            affinity=replace(recipe.affinity, strategy="stack_heads"),
        )
        super().__init__(recipe, classes, device)
        for index, part in enumerate(self.objectives):
            if isinstance(part, Segmentation):
                self.objectives[index] = _NaiveSegmentation(recipe, exact_energy)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """All loss terms of one batch, unweighted."""
        active = [part for part in self.objectives if self.index >= part.start]
        drop_path = seeded("drop path", self.recipe.train.seed, self.index, device=self.device)
        with drop_path, MaterialisedAttention():
            step = self._step(batch)
            return {name: value for part in active for name, value in part(step).items()}

    def _step(self, batch: Batch) -> TrainStep:
        """`methods.take_step` with maps and labels made the long way."""
        config = self.recipe.cam
        step = take_step(self.network, self.recipe, batch, self.index, self.labeler, frozenset())
        with evaluating(self.network):
            step.cams = naive_cam(self.network, batch.image, batch.label, config, step.refiner)
        step.token_label = self.labeler.token_labels(step.cams.auxiliary, step.output.grid)
        if self.recipe.losses.ptc_padding == "ignore":
            step.token_label = step.token_label.masked_fill(step.valid_tokens == 0, IGNORE)
        maps = step.cams.for_labels
        step.pseudo_label = naive_labels(batch.image, maps, batch.label, batch.box, config)
        return step
