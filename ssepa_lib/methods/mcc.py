"""MCC: masked collaborative contrast (Wu et al., WACV 2024, arXiv 2305.08491).

ToCo with another kind of local views: instead of small crops the whole crop, of which most blocks of patches
are hidden in every attention. Its class token has to agree with that of the global views if what is left
shows an object, and to disagree otherwise. Everything else is ToCo's.

Ours is that hidden patches are dropped instead of masked, with the same result (`Backbone.class_tokens`),
and that a view always shows one block at least. A view and the region map that judges it are cut and flipped
alike; in the published code they are flipped independently, so that half of the views are judged by a
flipped map. Shared with ToCo, and therefore other than in MCC: the training crop is not blurred, the masked
views show the crop with one colour jitter of their own, not with two, and at test time the maximum is taken
over scales on COCO too, where MCC takes it over an image and its flip.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.methods.blocks import block_grid, to_patches, uniform
from ssepa_lib.methods.objective import Objective
from ssepa_lib.methods.step import TrainStep
from ssepa_lib.methods.toco import ClassTokenContrast, region_map
from ssepa_lib.model.network import Network
from ssepa_lib.recipe import ContrastConfig, Recipe

ORDER = 5  # after ToCo, instead of its class token contrast


def objectives(recipe: Recipe, network: Network) -> list[Objective]:
    """The contrast of masked views where a recipe asks for it."""
    masked = recipe.contrast.views == "masked"  # then losses.ctc is above 0
    return [MaskedContrast(recipe, network.backbone.width)] if masked else []


class MaskedContrast(ClassTokenContrast):
    """L_mcc: ToCo's L_ctc on two global views and several masked ones."""

    def local_tokens(self, step: TrainStep) -> tuple[Tensor, Tensor]:
        """Class tokens of the V masked views [B, V, D], and whether each shows an object, bool [B, V]."""
        cam, grid = step.recipe.cam, step.output.grid
        judge = step.cams.main if step.fraction >= self.config.main_from else step.cams.auxiliary
        small = F.interpolate(judge, grid, mode="bicubic", align_corners=False)  # [B, C, h, w]
        regions = region_map(small, cam.low, cam.high)
        visible, positive = masked_views(regions, self.config, step.generator)
        return step.network.backbone.class_tokens(step.batch.local_canvas, visible), positive


@torch.no_grad()
def masked_views(
    regions: Tensor, config: ContrastConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hide blocks of patches at random, and say which views still show an object.

    The grid is cut into blocks of `mask_block`² patches (smaller at the right and lower border if it does not
    divide), and each is hidden with probability `mask_share`. A view in which all are hidden shows the block
    that came closest to staying, unless `mask_empty`.

    Args:
        regions: [B, h, w], the `region_map` of the patches: 0 background, 1 doubtful, 2 object.
        config: `local_crops` is the number V of views; a view is positive when the mean of the regions that
            it shows is above `negative_below`; one that shows nothing is negative.
        generator: draws the blocks; a CPU generator gives the same on every device.

    Returns:
        visible, bool [B, V, h·w], and positive, bool [B, V].
    """
    batch, *grid = regions.shape
    shape = (config.local_crops, *block_grid(grid, config.mask_block))
    draw = uniform(batch, shape, generator).to(regions.device)
    visible = draw >= config.mask_share  # [B, V, rows, columns]
    if not config.mask_empty:
        visible |= draw == draw.amax((2, 3), keepdim=True)
    visible = to_patches(visible, grid, config.mask_block)  # [B, V, N]
    shown = visible * regions.flatten(1)[:, None]
    return visible, shown.sum(2) > config.negative_below * visible.sum(2)
