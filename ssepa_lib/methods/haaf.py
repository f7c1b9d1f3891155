"""What trains HAAF, whose MLP gets no gradient from the pseudo-labels because they pass through an argmax.

This is our addition; SS-EPA leaves it open. Only the MLP learns: maps, tokens and predictions are constants
here. With A_k the head mean of layer k and M the class activation map, the products R_k = A_k·M are computed
once, so that the refined map Σ_k v'_k R_k / K is linear in the weights v'.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.data import IGNORE
from ssepa_lib.device import global_ratio
from ssepa_lib.labels.pseudo_labels import inside
from ssepa_lib.labels.refine import Refiner
from ssepa_lib.methods.losses import classification_loss, normalised_cut, unexplained_variance
from ssepa_lib.methods.objective import Objective
from ssepa_lib.methods.step import TrainStep
from ssepa_lib.model.network import Network, NetworkOutput, as_maps
from ssepa_lib.recipe import Recipe

ORDER = 10
SLOPE = 10.0  # of the soft threshold at 0.5 in the objective "variance"


def objectives(recipe: Recipe, network: Network) -> list[Objective]:
    """HAAF's objective where a recipe trains it."""
    trained = recipe.affinity.kind == "haaf" and recipe.affinity.haaf_objective != "none"
    return [HaafObjective(recipe)] if trained else []


def _unit(maps: Tensor) -> Tensor:
    """Min-max per column over patches: [B, N, X] → 0..1."""
    maps = maps - maps.amin(1, keepdim=True)
    return maps / (maps.amax(1, keepdim=True) + 1e-5)


def divergence_from_equal(weights: Tensor) -> Tensor:
    """KL(v'/K ‖ 1/K) = of layer weights [B, K] of mean 1, averaged over images, 0..log K."""
    return torch.special.xlogy(weights, weights).mean()


class HaafObjective(Objective):
    """One of several ways to train HAAF. r is the refined map in 0..1, y the image label, C the classes
    present.

    - cls: multi-label soft margin of max_i of the propagated CAM before ReLU and normalisation, against y.
    - affinity: −mean_i log(Σ_j∈same label A_ij / Σ_j∈labelled A_ij) over patches i with a confident token
      label: of the affinity that a patch spends on labelled patches, the share that stays inside its own
      label (AFA's pair loss without the pairs).
    - energy: mean |r − PAR(r)|: the refined map should not change under pixel-adaptive refinement.
    - decoder: binary cross-entropy of r against the soft prediction of the decoder.
    - equivariance: mean |r(x) − flip(r(flip(x) at 1.4 times the size))|.
    - pooling: softplus(−s(r)) + softplus(s(1 − max_c r)), where s scores the auxiliary tokens pooled under a
      map with the auxiliary classifier: the refined map holds its class, the rest does not.
    - ncut: normalised cut of max_c r on the graph of final tokens (`losses.normalised_cut`).
    - variance: share of the variance of the auxiliary tokens which sigmoid(10·(r − 0.5)), as a segmentation,
      does not explain (`losses.unexplained_variance`); r is the map after all iterations of the refiner.

    `affinity.haaf_prior` adds KL(v'/K ‖ 1/K) = mean_k v'_k log v'_k, which is 0 for equal weights and log K
    for a single layer: no objective here sees a mask, and a mean of layers is safer than a proxy's favourite.
    """

    def __init__(self, recipe: Recipe):
        kind = recipe.affinity.haaf_objective
        super().__init__(
            {"haaf": recipe.affinity.haaf_weight},
            start=recipe.segmentation_step,
            needs=("attention", "token_label") if kind == "affinity" else ("attention",),
        )
        self.kind, self.prior = kind, recipe.affinity.haaf_prior

    def forward(self, step: TrainStep) -> dict[str, Tensor]:
        used = []  # the layer weights of every pass, [B, K]

        def weigh(descriptor: Tensor) -> Tensor:
            used.append(step.refiner.haaf(descriptor))
            return used[-1]

        refiner = replace(step.refiner, haaf=weigh)
        value = getattr(self, f"_{self.kind}")(replace(step, refiner=refiner))
        if self.prior > 0:
            value = value + self.prior * divergence_from_equal(torch.cat(used))
        return {"haaf": value}

    def _products(self, refiner: Refiner, out: NetworkOutput, maps: Tensor) -> Tensor:
        """Σ_k v'_k A_k · maps / K with a gradient to v' only. [B, N, X] → [B, N, X]."""
        with torch.no_grad():
            products, descriptor = refiner.affinity(out.attention).propagate(
                maps.float()
            )  # [B, K, N, X], [B, K]
        weights = refiner.haaf(descriptor)
        return (weights[:, :, None, None] * products).mean(1)

    def _refined(self, step: TrainStep, out: NetworkOutput | None = None) -> Tensor:
        """Refined single-scale map, absent classes zero, [B, N, C] in 0..1."""
        out = step.output if out is None else out
        cam = out.cam.flatten(2).transpose(1, 2).relu()
        return _unit(self._products(step.refiner, out, cam)) * step.batch.label[:, None]

    def _cls(self, step: TrainStep) -> Tensor:
        maps = self._products(step.refiner, step.output, step.output.cam.flatten(2).transpose(1, 2))
        return classification_loss(maps.amax(1), step.batch.label)

    def _affinity(self, step: TrainStep) -> Tensor:
        label, known = step.token_label, step.token_label != IGNORE
        classes = step.batch.label.shape[1] + 1
        onehot = F.one_hot(label.where(known, 0), classes).float() * known.unsqueeze(-1)
        mass = self._products(step.refiner, step.output, onehot)  # [B, N, C+1]
        share = mass.gather(2, label.where(known, 0).unsqueeze(2)).squeeze(2) / (mass.sum(2) + 1e-6)
        return global_ratio(-(share.clamp_min(1e-6).log() * known).sum(), known.sum())

    def _energy(self, step: TrainStep) -> Tensor:
        h, w = step.output.grid
        maps = as_maps(self._refined(step), (h, w))  # [B, C, h, w]
        small = F.interpolate(step.batch.image.float(), (4 * h, 4 * w), mode="area")
        with torch.no_grad():
            target = step.labeler.par(
                small, F.interpolate(maps, (4 * h, 4 * w), mode="bilinear", align_corners=False)
            )
            target = F.adaptive_avg_pool2d(target, (h, w))
        return global_ratio((maps - target).abs().mean((2, 3)).sum(), step.batch.label.sum())

    def _decoder(self, step: TrainStep) -> Tensor:
        target = step.output.segmentation.detach().float().softmax(1)[:, 1:].flatten(2).transpose(1, 2)
        maps = self._refined(step).clamp(1e-4, 1 - 1e-4)
        pixel = -(target * maps.log() + (1 - target) * (1 - maps).log()).mean(1)  # [B, C]
        return global_ratio((pixel * step.batch.label).sum(), step.batch.label.sum())

    def _equivariance(self, step: TrainStep) -> Tensor:
        copy = F.interpolate(
            step.batch.image.float().flip(-1), scale_factor=1.4, mode="bilinear", align_corners=False
        )
        with torch.no_grad():
            other = step.network(copy, segment=False, capture=True)
        there = as_maps(self._refined(step, other), other.grid)  # [B, C, 1.4·h, 1.4·w]
        there = F.interpolate(there, step.output.grid, mode="bilinear").flip(-1)
        here = as_maps(self._refined(step), step.output.grid)
        return global_ratio((here - there).abs().mean((2, 3)).sum(), step.batch.label.sum())

    def _pooling(self, step: TrainStep) -> Tensor:
        maps, tokens, label = self._refined(step), step.output.aux.detach().float(), step.batch.label
        weight, valid = step.network.aux_classifier.weight.detach().float(), step.valid_tokens.unsqueeze(2)
        maps, rest = maps * valid, (1 - maps.amax(2, keepdim=True)) * valid
        inner, outer = (F.normalize(m, p=1, dim=1).mT @ tokens for m in (maps, rest))  # [B, C, D], [B, 1, D]
        inner, outer = (inner * weight).sum(2), outer[:, 0] @ weight.mT  # [B, C]
        loss = (F.softplus(-inner) + F.softplus(outer)) * label
        return global_ratio(loss.sum(), label.sum())

    def _ncut(self, step: TrainStep) -> Tensor:
        return normalised_cut(step.output.patches.detach(), self._refined(step).amax(2), step.valid_tokens)

    def _variance(self, step: TrainStep) -> Tensor:
        output, pixels = step.output, step.batch.image.shape[-2:]
        affinity = step.refiner.affinity(output.attention, inside(step.batch.box, pixels).float())
        maps = _unit(
            affinity @ output.cam.flatten(2).transpose(1, 2).relu()
        )  # [B, N, C], gradient to v' only
        soft = torch.sigmoid(SLOPE * (maps - 0.5))
        return unexplained_variance(output.aux.detach(), soft, step.valid_tokens, step.batch.label)
