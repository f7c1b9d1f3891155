"""The pseudo-label also supervises the class activation map, through the main classifier.

The refined map otherwise reaches the decoder alone, and the classifier never learns what the affinity
added. The idea is the consistency between a map and its refined version of SEAM (CVPR 2020) and the CAM
loss of CoSA (ECCV 2024), with the affinity as the refiner. It is an addition of this workbook.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssepa_lib.methods.losses import segmentation_loss
from ssepa_lib.methods.objective import Objective
from ssepa_lib.methods.step import TrainStep
from ssepa_lib.model.network import Network, as_maps
from ssepa_lib.recipe import Recipe

ORDER = 30
ABSENT = -1e4  # logit of a class that the image does not show


def objectives(recipe: Recipe, network: Network) -> list[Objective]:
    """The feedback on the map where a recipe asks for it."""
    return [CamFeedback(recipe)] if recipe.losses.cam > 0 else []


def majority_labels(label: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """The most frequent label of each patch, [B, H, W] → [B, h, w]; ties go to the smaller id, 255 counts
    as a label.

    Args:
        label: long, 0..C or 255.
        grid: h, w.
        patch: height and width of a patch, pixels.
    """
    (h, w), (ph, pw) = grid, patch
    full = F.interpolate(label[:, None].float(), (h * ph, w * pw), mode="nearest")[:, 0].long()
    pixels = full.view(len(label), h, ph, w, pw).permute(0, 1, 3, 2, 4).flatten(3)  # [B, h, w, ph·pw]
    return pixels.mode(-1).values


class CamFeedback(Objective):
    """Cross-entropy of the softmax over a learned background logit and the classifier's logits of the
    classes present.

    Every patch is a pixel: the target is the majority of the pseudo-label in it, 255 is ignored, and
    background and foreground count alike, as in the segmentation loss.
    """

    def __init__(self, recipe: Recipe):
        super().__init__({"cam": recipe.losses.cam}, start=recipe.segmentation_step, needs=("pseudo_label",))
        self.background = nn.Parameter(torch.zeros(1))

    def forward(self, step: TrainStep) -> dict[str, Tensor]:
        network, output = step.network, step.output
        logits = as_maps(network.classifier(output.patches), output.grid).float()  # [B, C, h, w]
        logits = logits.masked_fill(step.batch.label[:, :, None, None] == 0, ABSENT)
        background = self.background.view(1, 1, 1, 1).expand(len(logits), -1, *output.grid)
        target = majority_labels(step.pseudo_label, output.grid, network.backbone.patch_size)
        return {"cam": segmentation_loss(torch.cat([background, logits], 1), target)}
