"""AFA: affinity from attention (Ru et al., CVPR 2022, arXiv 2203.02664), its mechanism on a plain ViT.

A layer learns to turn the attention logits of the last blocks into an affinity between patches, from pairs of
patches whose pseudo-labels are certain. From `affinity.start` on, pseudo-labels come from the CAM propagated
by this affinity; the order is AFA's own: the background joins the classes before the propagation, and PAR
follows it.

Ours are the backbone (AFA has a MiT-B1 with a pyramid of stages, and a SegFormer decoder; here it is the
ViT with LargeFOV of all methods), its global max pooling on the final tokens, and a window that is scaled
to the grid: 8 of 32 patches there, `affinity.radius` of the crop's side here. The CAM passes run in
evaluation mode. There is no stochastic depth in the backbone and no dropout in the decoder (0.1 each in
AFA); several scales and the CRF at test time have the values that all methods share, those of ToCo; and a
map over several scales takes the affinity of the largest one also in the evaluation, where AFA takes that
of the image itself. The CRF, in place of PAR, starts from the propagated maps without the background among
them, cut at `cam.background`, as that of all methods does.
"""

import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.methods.losses import affinity_pairs
from ssepa_lib.methods.objective import Objective
from ssepa_lib.methods.step import TrainStep
from ssepa_lib.model.learned_affinity import window
from ssepa_lib.model.network import Network
from ssepa_lib.recipe import Recipe

ORDER = 15


def objectives(recipe: Recipe, network: Network) -> list[Objective]:
    """The pair loss where a recipe trains a learned affinity."""
    return [AffinityPairs(recipe)] if recipe.losses.aff > 0 else []


class AffinityPairs(Objective):
    """L_aff of AFA on the affinity of the training crop.

    The pairs come from the labels of the CAM as it is, also when the decoder already learns from propagated
    ones: the affinity does not teach itself (AFA on VOC).
    """

    def __init__(self, recipe: Recipe):
        super().__init__(
            {"aff": recipe.losses.aff},
            start=recipe.segmentation_step,
            needs=("attention", "cams", "pseudo_label"),
        )

    def forward(self, step: TrainStep) -> dict[str, Tensor]:
        batch, grid, head = step.batch, step.output.grid, step.network.affinity_head
        label = step.pseudo_label
        if step.refiner is not None:  # then that one is propagated
            label = step.labeler.training_labels(batch.image, step.cams.main, batch.label, batch.box)
        tokens = F.interpolate(label[:, None].float(), grid, mode="nearest").flatten(1).long()  # [B, N]
        near = window(grid, head.radius, tokens.device)
        return {"aff": affinity_pairs(head(step.output.attention), tokens, near)}
