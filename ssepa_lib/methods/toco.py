"""The objectives of ToCo (CVPR 2023): classification, patch and class token contrast, segmentation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.errors import UserError
from ssepa_lib.methods.blocks import uniform
from ssepa_lib.methods.losses import (
    class_token_contrast,
    classification_loss,
    dense_energy,
    patch_token_contrast,
    segmentation_loss,
)
from ssepa_lib.methods.objective import Objective
from ssepa_lib.methods.step import TrainStep
from ssepa_lib.methods.teacher import Teacher
from ssepa_lib.model.heads import ProjectionHead
from ssepa_lib.model.network import Network
from ssepa_lib.recipe import Recipe

ORDER = 0  # first: other methods build on these objectives


def objectives(recipe: Recipe, network: Network) -> list[Objective]:
    """The parts of ToCo that a recipe asks for, in the order of SS-EPA's Eq. 8."""
    losses = recipe.losses
    parts: list[Objective] = [Classification(recipe)]
    if losses.ptc > 0:
        parts.append(PatchTokenContrast(recipe))
    if losses.ctc > 0 and recipe.contrast.views == "crops":
        parts.append(ClassTokenContrast(recipe, network.backbone.width))
    if losses.seg > 0 or losses.reg > 0:
        parts.append(Segmentation(recipe))
    return parts


class Classification(Objective):
    """L_cls and L_m.cls (SS-EPA, Eq. 2)."""

    def __init__(self, recipe: Recipe):
        super().__init__({"cls": 1.0, "aux_cls": recipe.losses.aux_cls})

    def forward(self, step: TrainStep) -> dict[str, Tensor]:
        label = step.batch.label
        return {
            "cls": classification_loss(step.output.scores, label),
            "aux_cls": classification_loss(step.output.aux_scores, label),
        }


class PatchTokenContrast(Objective):
    """L_ptc (ToCo, Section 3.2)."""

    def __init__(self, recipe: Recipe):
        super().__init__({"ptc": recipe.losses.ptc}, start=recipe.contrast_step, needs=("token_label",))

    def forward(self, step: TrainStep) -> dict[str, Tensor]:
        return {"ptc": patch_token_contrast(step.output.patches, step.token_label)}


class ClassTokenContrast(Objective):
    """L_ctc (ToCo, Section 3.3) on two global and several local views; the teacher is an EMA of the head.

    Another kind of local views overrides `local_tokens`.
    """

    def __init__(self, recipe: Recipe, width: int):
        super().__init__({"ctc": recipe.losses.ctc}, start=recipe.contrast_step, needs=("cams",))
        c = self.config = recipe.contrast
        self.student = ProjectionHead(width, c.hidden, c.bottleneck, c.outputs)
        self.teacher = Teacher(self.student)

    def local_tokens(self, step: TrainStep) -> tuple[Tensor, Tensor]:
        """Class tokens of the V local views [B, V, D], and whether each shows an object, bool [B, V]."""
        c, cam = self.config, step.recipe.cam
        regions = region_map(step.cams.auxiliary, cam.low, cam.high)
        crops, positive = local_views(
            step.batch.local_canvas, regions, c.local_crops, c.local_size, c.negative_below, step.generator
        )  # [B, V, 3, s, s], [B, V]
        tokens = step.network(crops.flatten(0, 1), segment=False).cls
        return tokens.unflatten(0, crops.shape[:2]), positive

    def forward(self, step: TrainStep) -> dict[str, Tensor]:
        second = step.network(step.batch.global2, segment=False).cls  # [B, D]
        local, positive = self.local_tokens(step)
        tokens = torch.cat([step.output.cls.unsqueeze(1), second.unsqueeze(1), local], 1)  # [B, 2+V, D]
        with torch.no_grad():
            target = self.teacher(tokens[:, :2].detach())
        positive = torch.cat([positive.new_ones(len(positive), 2), positive], 1)
        return {"ctc": class_token_contrast(self.student(tokens), target, positive, self.config.temperature)}

    def after_step(self, network: Network, fraction: float) -> None:
        self.teacher.follow(self.student, self.config.momentum)


class Segmentation(Objective):
    """L_seg and L_reg: the decoder learns from the pseudo-labels (SS-EPA, Section 3.4)."""

    def __init__(self, recipe: Recipe):
        weights = {"seg": recipe.losses.seg, "reg": recipe.losses.reg}
        used = {
            name: weight for name, weight in weights.items() if weight > 0
        }  # L_reg takes most of the time
        super().__init__(used, start=recipe.segmentation_step, needs=("pseudo_label",))

    def forward(self, step: TrainStep) -> dict[str, Tensor]:
        logits, label = step.output.segmentation.float(), step.pseudo_label
        full = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)  # [B, C+1, S, S]
        reg = {}
        if "reg" in self.weights:  # first: its filter is the peak of memory
            reg["reg"] = dense_energy(step.batch.image, full, label, step.batch.box)
        seg = {"seg": segmentation_loss(full, label)} if "seg" in self.weights else {}
        return seg | reg


@torch.no_grad()
def region_map(aux_cam: Tensor, low: float, high: float) -> Tensor:
    """Certainty of an object per pixel from a valid auxiliary CAM [B, C, H, W] in 0..1.

    Returns:
        long [B, H, W]: 0 where the strongest class is ≤ low, 2 where it is ≥ high, else 1.
    """
    value = aux_cam.amax(1)
    return torch.ones_like(value, dtype=torch.long).masked_fill(value <= low, 0).masked_fill(value >= high, 2)


@torch.no_grad()
def local_views(
    source: Tensor, regions: Tensor, number: int, size: int, negative_below: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cut square crops centred on background or uncertain places, and say which of them show an object.

    Args:
        source: [B, 3, S, S], any dtype.
        regions: [B, S, S], the `region_map` of the same pixels.
        number: crops per image (V), all centred at different pixels.
        size: side of a crop, pixels.
        negative_below: a crop whose mean region value is at most this is negative.
        generator: draws the places; a CPU generator gives the same crops on every device.

    Returns:
        crops [B, V, 3, size, size] and positive, bool [B, V].

    Raises:
        UserError: the source is too small for that many crops of that size.
    """
    b, _, height, width = source.shape
    rows, columns = height - size + 1, width - size + 1  # possible corners
    if min(rows, columns) < 1 or rows * columns < number:
        crop = min(height, width)
        raise UserError(
            f"contrast.local_size {size} leaves no room for {number} crops in data.crop {crop}; lower it."
        )
    middle = size // 2
    allowed = (regions[:, middle : middle + rows, middle : middle + columns] <= 1).flatten(1)
    allowed |= allowed.sum(1, keepdim=True) < number  # too few such places: anywhere
    lottery = uniform(b, (rows * columns,), generator).to(source.device)
    corner = lottery.masked_fill(~allowed, -1).topk(number).indices  # [B, V]
    side = torch.arange(size, device=source.device)
    y = (corner // columns)[:, :, None, None] + side[:, None]
    x = (corner % columns)[:, :, None, None] + side
    image = torch.arange(b, device=source.device)[:, None, None, None]
    crops = source.permute(0, 2, 3, 1)[image, y, x].permute(0, 1, 4, 2, 3)
    positive = regions[image, y, x].float().mean((2, 3)) > negative_below
    return crops.contiguous(), positive
