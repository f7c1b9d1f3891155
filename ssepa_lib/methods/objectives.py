"""What a run minimises: each objective is a part with its own parameters; a recipe is the list of parts it needs.

One training step is a `Step`: it computes class activation maps, pseudo-labels and token labels once, on first use,
and every objective reads them from there.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssepa_lib.data.views import Batch
from ssepa_lib.device import over_processes
from ssepa_lib.labels.cam import Cams, multi_scale_cam
from ssepa_lib.labels.par import PixelAdaptiveRefinement
from ssepa_lib.labels.pseudo_labels import inside, token_labels, two_threshold_labels
from ssepa_lib.methods.contrast import local_views, region_map
from ssepa_lib.methods.fsr import SelfReinforcement
from ssepa_lib.methods.losses import (
    class_token_contrast,
    classification_loss,
    dense_energy,
    normalised_cut,
    patch_token_contrast,
    segmentation_loss,
)
from ssepa_lib.model.network import Network, NetworkOutput, ProjectionHead, evaluating
from ssepa_lib.recipe import Recipe


@dataclass
class Step:
    """One training step: inputs, and everything derived from them, computed once."""

    network: Network
    recipe: Recipe
    batch: Batch
    index: int  # counted from 0
    par: PixelAdaptiveRefinement
    generator: torch.Generator  # for crops and masks; on the processor, so that every device draws the same

    @property
    def fraction(self) -> float:
        """How far the run is, 0..1."""
        return self.index / self.recipe.train.steps

    @property
    def dense(self) -> bool:
        """Whether the terms that need pseudo-labels count yet (λ1 and λ5 in SS-EPA, Eq. 8)."""
        return self.index >= self.recipe.switch_step

    @property
    def with_affinity(self) -> bool:
        return self.dense and self.recipe.affinity.kind != "none"

    @cached_property
    def out(self) -> NetworkOutput:
        return self.network(self.batch.image, segment=self.dense, affinity=self.with_affinity)

    @cached_property
    def cams(self) -> Cams:
        stochastic = self.recipe.model.drop_path > 0  # then the training pass is not the inference pass
        first = None if stochastic else self.out
        with evaluating(self.network):
            return multi_scale_cam(
                self.network,
                self.batch.image,
                self.batch.label,
                self.recipe.cam,
                affinity=self.with_affinity,
                first=first,
            )

    @cached_property
    def pseudo_label(self) -> Tensor:
        """[B, H, W], two-threshold labels of the (refined) CAM after PAR."""
        cam = self.recipe.cam
        return two_threshold_labels(
            self.batch.image, self.cams.best, self.batch.label, self.batch.box, self.par, cam.high, cam.low
        )

    @cached_property
    def token_label(self) -> Tensor:
        """[B, N], token labels of the auxiliary CAM."""
        aux = F.interpolate(self.cams.aux_cam, self.out.grid, mode="bilinear", align_corners=False)
        return token_labels(aux, self.recipe.cam.high, self.recipe.cam.low)

    @cached_property
    def valid_tokens(self) -> Tensor:
        """[B, N], 1 where a patch lies mostly on the image, 0 on padding."""
        area = inside(self.batch.box, self.batch.image.shape[-2:])[:, None].float()
        return (F.adaptive_avg_pool2d(area, self.out.grid) > 0.5).flatten(1).float()


class Classification(nn.Module):
    """L_cls and L_m.cls (SS-EPA, Eq. 2)."""

    def forward(self, step: Step) -> dict[str, Tensor]:
        return {
            "cls": classification_loss(step.out.scores, step.batch.label),
            "aux_cls": classification_loss(step.out.aux_scores, step.batch.label),
        }


class PatchTokenContrast(nn.Module):
    """L_ptc (ToCo, Section 3.2)."""

    def forward(self, step: Step) -> dict[str, Tensor]:
        return {"ptc": patch_token_contrast(step.out.patches, step.token_label)}


class ClassTokenContrast(nn.Module):
    """L_ctc (ToCo, Section 3.3): two global and several local views; the teacher is an EMA of the head only."""

    def __init__(self, width: int, recipe: Recipe):
        super().__init__()
        c = self.config = recipe.contrast
        self.student = ProjectionHead(width, c.hidden, c.bottleneck, c.outputs)
        self.teacher = ProjectionHead(width, c.hidden, c.bottleneck, c.outputs)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    def forward(self, step: Step) -> dict[str, Tensor]:
        c, batch, cam = self.config, step.batch, step.recipe.cam
        regions = region_map(step.cams.aux_cam, cam.low, cam.high)
        crops, positive = local_views(
            batch.local_source, regions, c.local_crops, c.local_size, c.negative_below, step.generator
        )
        views = [step.out.cls.unsqueeze(1), step.network(batch.global2, segment=False).cls.unsqueeze(1)]
        local = step.network(crops.flatten(0, 1), segment=False).cls.unflatten(0, crops.shape[:2])
        tokens = torch.cat([*views, local], 1)  # [B, 2+V, D]
        with torch.no_grad():
            target = self.teacher(tokens[:, :2].detach())
        positive = torch.cat([positive.new_ones(len(positive), 2), positive], 1)
        return {"ctc": class_token_contrast(self.student(tokens), target, positive, c.temperature)}

    @torch.no_grad()
    def finish(self, network: Network, fraction: float) -> None:
        """Move the teacher after the optimiser's step."""
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.lerp_(new, 1 - self.config.momentum)


class Segmentation(nn.Module):
    """L_seg and L_reg: the decoder learns from the pseudo-labels (SS-EPA, Section 3.4)."""

    def forward(self, step: Step) -> dict[str, Tensor]:
        if not step.dense:
            return {}
        logits, label = step.out.segmentation.float(), step.pseudo_label
        full = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)
        reg = dense_energy(
            step.batch.image, full, label, step.batch.box
        )  # first: its filter is the peak of memory
        return {"seg": segmentation_loss(full, label), "reg": reg}


def _unit(maps: Tensor) -> Tensor:
    """Min-max per column over patches: [B, N, X] → 0..1."""
    maps = maps - maps.amin(1, keepdim=True)
    return maps / (maps.amax(1, keepdim=True) + 1e-5)


class HaafSupervision(nn.Module):
    """Trains HAAF's MLP, which the pseudo-labels' argmax leaves without a gradient. Our addition, not in the paper.

    Only the MLP learns: maps, tokens and predictions are constants here. R_k = A_k·CAM is computed once, so that the
    refined map Σ_k v'_k R_k / K is linear in the weights. Terms:

    - cls: multi-label soft margin on the maximum of the refined map.
    - affinity: of the affinity a confidently labelled patch spends on confident patches, the share that stays inside
      its own label (AFA's pair loss without the pairs).
    - energy: the refined map should not change under pixel-adaptive refinement, i.e. follow image edges.
    - decoder: the refined map should agree with the decoder's soft prediction.
    - equivariance: the refined map of a mirrored 1.4× copy, mirrored back, should be the same map.
    - pooling: tokens pooled under the refined map are of its class to the auxiliary classifier, the rest's are not.
    - ncut: the refined foreground should be a good segment of the graph of final tokens (normalised cut).
    """

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.kind = recipe.affinity.supervision

    def forward(self, step: Step) -> dict[str, Tensor]:
        if not step.dense:
            return {}
        return {"haaf": getattr(self, f"_{self.kind}")(step)}

    @staticmethod
    def _products(out: NetworkOutput, maps: Tensor) -> Tensor:
        """Σ_k v'_k A_k · maps / K with a gradient to v' only. [B, N, X] → [B, N, X]."""
        with torch.no_grad():
            products, descriptor = out.affinity.propagate(maps.float())
        weights = out.affinity.weigh(descriptor)
        return (weights[:, :, None, None] * products).mean(1)

    def _refined(self, step: Step, out: NetworkOutput | None = None) -> Tensor:
        """Refined single-scale map, absent classes zero, [B, N, C] in 0..1."""
        out = step.out if out is None else out
        cam = out.cam.flatten(2).transpose(1, 2).relu()
        return _unit(self._products(out, cam)) * step.batch.label[:, None]

    def _cls(self, step: Step) -> Tensor:
        maps = self._products(step.out, step.out.cam.flatten(2).transpose(1, 2))
        return classification_loss(maps.amax(1), step.batch.label)

    def _affinity(self, step: Step) -> Tensor:
        label, known = step.token_label, step.token_label != 255
        classes = step.batch.label.shape[1] + 1
        onehot = F.one_hot(label.where(known, 0), classes).float() * known.unsqueeze(-1)
        mass = self._products(step.out, onehot)  # [B, N, C+1]
        share = mass.gather(2, label.where(known, 0).unsqueeze(2)).squeeze(2) / (mass.sum(2) + 1e-6)
        return over_processes(-(share.clamp_min(1e-6).log() * known).sum(), known.sum())

    def _energy(self, step: Step) -> Tensor:
        h, w = step.out.grid
        maps = self._refined(step).transpose(1, 2).unflatten(2, (h, w))
        small = F.interpolate(step.batch.image.float(), (4 * h, 4 * w), mode="area")
        with torch.no_grad():
            target = step.par(
                small, F.interpolate(maps, (4 * h, 4 * w), mode="bilinear", align_corners=False)
            )
            target = F.adaptive_avg_pool2d(target, (h, w))
        return over_processes((maps - target).abs().mean((2, 3)).sum(), step.batch.label.sum())

    def _decoder(self, step: Step) -> Tensor:
        target = step.out.segmentation.detach().float().softmax(1)[:, 1:].flatten(2).transpose(1, 2)
        maps = self._refined(step).clamp(1e-4, 1 - 1e-4)
        pixel = -(target * maps.log() + (1 - target) * (1 - maps).log()).mean(1)  # [B, C]
        return over_processes((pixel * step.batch.label).sum(), step.batch.label.sum())

    def _equivariance(self, step: Step) -> Tensor:
        copy = F.interpolate(
            step.batch.image.float().flip(-1), scale_factor=1.4, mode="bilinear", align_corners=False
        )
        with torch.no_grad():
            other = step.network(copy, segment=False, affinity=True)
        as_map = lambda x, out: x.transpose(1, 2).unflatten(2, out.grid)  # noqa: E731
        there = F.interpolate(as_map(self._refined(step, other), other), step.out.grid, mode="bilinear").flip(
            -1
        )
        here = as_map(self._refined(step), step.out)
        return over_processes((here - there).abs().mean((2, 3)).sum(), step.batch.label.sum())

    def _pooling(self, step: Step) -> Tensor:
        maps, tokens, label = self._refined(step), step.out.aux.detach().float(), step.batch.label
        weight, valid = step.network.aux_classifier.weight.detach().float(), step.valid_tokens.unsqueeze(2)
        maps, rest = maps * valid, (1 - maps.amax(2, keepdim=True)) * valid
        inner, outer = (F.normalize(m, p=1, dim=1).mT @ tokens for m in (maps, rest))  # [B, C, D], [B, 1, D]
        inner, outer = (inner * weight).sum(2), outer[:, 0] @ weight.mT  # [B, C]
        loss = (F.softplus(-inner) + F.softplus(outer)) * label
        return over_processes(loss.sum(), label.sum())

    def _ncut(self, step: Step) -> Tensor:
        return normalised_cut(step.out.patches.detach(), self._refined(step).amax(2), step.valid_tokens)


class FeatureReinforcement(nn.Module):
    """unc.FSR and cer.FSR (FSR, Section 3): a teacher of the whole network guides a student that sees a masked view."""

    def __init__(self, network: Network, recipe: Recipe):
        super().__init__()
        self.core = SelfReinforcement(network, recipe)

    def forward(self, step: Step) -> dict[str, Tensor]:
        batch = step.batch
        return self.core(
            step.network,
            batch.image,
            batch.view2,
            batch.label,
            fraction=step.fraction,
            generator=step.generator,
        )

    def finish(self, network: Network, fraction: float) -> None:
        """Move the teacher after the optimiser's step."""
        self.core.update(network, fraction)


def build_objectives(recipe: Recipe, network: Network) -> nn.ModuleList:
    """The parts a recipe asks for, in the order of SS-EPA's Eq. 8, then HAAF's supervision and FSR's terms."""
    parts: list[nn.Module] = [Classification()]
    if recipe.losses.ptc > 0:
        parts.append(PatchTokenContrast())
    if recipe.losses.ctc > 0:
        parts.append(ClassTokenContrast(network.backbone.width, recipe))
    if recipe.losses.seg > 0 or recipe.losses.reg > 0:
        parts.append(Segmentation())
    if recipe.affinity.kind == "haaf" and recipe.affinity.supervision != "none":
        parts.append(HaafSupervision(recipe))
    if recipe.self_reinforced:
        parts.append(FeatureReinforcement(network, recipe))
    return nn.ModuleList(parts)


def total_loss(terms: dict[str, Tensor], recipe: Recipe) -> Tensor:
    """Weighted sum of the terms (SS-EPA, Eq. 8)."""
    weights = {"cls": 1.0, "haaf": recipe.affinity.supervision_weight, **vars(recipe.losses)}
    return sum(weights[name] * value for name, value in terms.items())
