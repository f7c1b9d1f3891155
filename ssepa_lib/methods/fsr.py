"""Feature self-reinforcement: a teacher of the whole network guides a student that sees a masked view (FSR,
AAAI 2024).

unc.FSR recovers the patches that were masked because their class is uncertain; cer.FSR asks the class token
of what is left to agree with the teacher's class token of another view of the same image.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ssepa_lib.device import global_ratio
from ssepa_lib.labels.cam import multi_scale_cam
from ssepa_lib.methods.blocks import block_grid, to_patches, uniform
from ssepa_lib.methods.objective import Objective
from ssepa_lib.methods.step import TrainStep
from ssepa_lib.methods.teacher import Teacher
from ssepa_lib.model.heads import ProjectionHead
from ssepa_lib.model.network import Network, evaluating
from ssepa_lib.recipe import Recipe, ReinforceConfig

ORDER = 20


def objectives(recipe: Recipe, network: Network) -> list[Objective]:
    """FSR's terms where a recipe asks for them."""
    return [SelfReinforcement(recipe, network)] if recipe.self_reinforced else []


def teacher_momentum(config: ReinforceConfig, fraction: float) -> float:
    """Momentum of the teacher after `fraction` (0..1) of all steps: from `momentum` to 1 on a half cosine."""
    return 1 - (1 - config.momentum) * (1 + math.cos(math.pi * fraction)) / 2


def teacher_temperature(config: ReinforceConfig, fraction: float) -> float:
    """Temperature of the teacher after `fraction` (0..1) of all steps: linear, then constant."""
    low, high = config.teacher_temperature
    return low + (high - low) * min(fraction / max(config.teacher_warmup, 1e-9), 1.0)


def edge_strength(image: Tensor, grid: tuple[int, int], block: int) -> Tensor:
    """Mean grey-value gradient per block of patches, [B, 3, H, W] in 0..255 → [B, ⌈h/block⌉, ⌈w/block⌉]."""
    down, right = torch.gradient(image.float().mean(1), dim=(1, 2))
    patches = F.interpolate(torch.hypot(down, right).unsqueeze(1), grid, mode="area")  # [B, 1, h, w]
    return F.avg_pool2d(patches, block, ceil_mode=True)[:, 0]


def selection_at(config: ReinforceConfig, fraction: float) -> str:
    """How blocks are selected after `fraction` (0..1) of all steps: at random first, then as configured."""
    return config.selection if fraction >= config.random_until else "random"


def mask_blocks(
    activation: Tensor | None,
    image: Tensor,
    grid: tuple[int, int],
    config: ReinforceConfig,
    fraction: float,
    generator: torch.Generator,
) -> Tensor:
    """Choose the patches hidden from the student in FSR (Section 3.2).

    The grid is cut into blocks of `mask_block`² patches (smaller at the right and lower border if it does
    not divide) and ⌈mask_ratio · blocks⌉ of them are masked. Until `random_until` of the run they are
    random; then "loose" takes uncertain blocks first and fills up at random, "strict" takes uncertain ones
    only, "edge" takes those with the strongest image gradient, and "random" stays random. A block is
    uncertain when the activation, resized to the grid of blocks by nearest neighbour, lies strictly between
    the two values of `uncertain`.

    Args:
        activation: [B, H, W], 0..1, maximum of the auxiliary CAM over the classes of the label; read by
            "loose" and "strict" alone.
        image: [B, 3, H, W], 0..255, the view to be masked.
        grid: h, w, patches per column and row.
        fraction: share of all steps done, 0..1.
        generator: source of the random order.

    Returns:
        bool [B, h·w], True where masked.
    """
    block, batch = config.mask_block, len(image)
    rows, columns = block_grid(grid, block)
    selection = selection_at(config, fraction)
    order = uniform(batch, (rows * columns,), generator).to(image.device)  # [B, M]
    if selection == "edge":
        order = edge_strength(image, grid, block).flatten(1)
    elif selection != "random":
        blocks = F.interpolate(activation[:, None], (rows, columns), mode="nearest").flatten(1)  # [B, M]
        low, high = config.uncertain
        uncertain = (blocks > low) & (blocks < high)
        order = order + uncertain
    count = math.ceil(config.mask_ratio * rows * columns)
    chosen = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order.topk(count).indices, True)
    if selection == "strict":
        chosen &= uncertain
    return to_patches(chosen.view(batch, rows, columns), grid, block)


class Centers(nn.Module):
    """Running means of the teacher's outputs, one for class tokens and one for patches; subtracting them
    keeps the
    teacher from answering the same for every input (DINO, Section 3.1)."""

    def __init__(self, outputs: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("cls", torch.zeros(outputs))
        self.register_buffer("patches", torch.zeros(outputs))

    @torch.no_grad()
    def update(self, cls: Tensor, patches: Tensor) -> None:
        """Move both centres to the means of `cls` [..., E] and `patches` [..., E] over all processes."""
        means = torch.stack([x.float().flatten(0, -2).mean(0) for x in (cls, patches)])  # [2, E]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        self.cls.lerp_(means[0], 1 - self.momentum)
        self.patches.lerp_(means[1], 1 - self.momentum)


def self_distillation(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    image: Tensor,
    batch: int,
    temperatures: tuple[float, float],
) -> Tensor:
    """Cross-entropy from the teacher's centred, sharpened distribution to the student's (FSR, Equations 5
    and 6).

    Args:
        student, teacher: [M, E] projector outputs of M tokens; the teacher gets no gradient.
        center: [E] running mean of teacher outputs.
        image: long [M], which image of the batch a token belongs to.
        batch: number of images.
        temperatures: of student and teacher.

    Returns:
        Mean over the tokens of each image, then over the images that have any, in nats and float32; 0, still
        differentiable, if M is 0.
    """
    target = ((teacher.detach().float() - center) / temperatures[1]).softmax(-1)
    loss = -(target * (student.float() / temperatures[0]).log_softmax(-1)).sum(-1)  # [M]
    count = torch.bincount(image, minlength=batch)  # [B]
    mean = loss.new_zeros(batch).index_add(0, image, loss) / count.clamp(min=1)
    return global_ratio(mean.sum(), (count > 0).sum())


class SelfReinforcement(Objective):
    """unc.FSR and cer.FSR (FSR, Section 3).

    The projector is trained with the network; the teacher, an EMA of network and projector, and the centres
    are part of `state_dict()`, so that a run resumes exactly. The teacher sees both views whole, the
    student the second one masked. What is uncertain is read from the student's own auxiliary CAM of view 2,
    at several scales with flip. The class centre follows the teacher's class tokens of view 1, the patch
    centre its patches of view 2: what each is compared with.
    """

    def __init__(self, recipe: Recipe, network: Network):
        super().__init__({"unc": recipe.losses.unc, "cer": recipe.losses.cer})
        self.config, shape = recipe.reinforce, recipe.contrast
        self.projector = ProjectionHead(
            network.backbone.width, shape.hidden, shape.bottleneck, self.config.outputs
        )
        self.teacher = Teacher(self._student(network))
        self.centers = Centers(self.config.outputs, self.config.center_momentum)

    def _student(self, network: Network) -> nn.ModuleDict:
        return nn.ModuleDict({"network": network, "projector": self.projector})

    def forward(self, step: TrainStep) -> dict[str, Tensor]:
        """Both terms of one batch; in training mode the centres move afterwards.

        Returns:
            "unc" (masked patches of view 2) and "cer" (class token of masked view 2 against the teacher's of
            view 1).
        """
        view1, view2, batch = step.batch.image, step.batch.view2, len(step.batch.image)
        teacher = self.teacher.module
        with torch.no_grad():
            seen = teacher["network"](torch.cat([view1, view2]), segment=False)
            cls = _project(teacher["projector"], seen.cls[:batch])  # [B, E]
            patches = _project(teacher["projector"], seen.patches[batch:])  # [B, N, E]
        mask = mask_blocks(
            self._activation(step), view2, step.output.grid, self.config, step.fraction, step.generator
        )
        student, at = step.network(view2, segment=False, mask=mask), mask.nonzero(as_tuple=True)
        temperatures = self.config.student_temperature, teacher_temperature(self.config, step.fraction)
        hidden, whole = (_project(self.projector, tokens) for tokens in (student.patches[at], student.cls))
        every = torch.arange(batch, device=mask.device)
        losses = {
            "unc": self_distillation(hidden, patches[at], self.centers.patches, at[0], batch, temperatures),
            "cer": self_distillation(whole, cls, self.centers.cls, every, batch, temperatures),
        }
        if self.training:
            self.centers.update(cls, patches)
        return losses

    def _activation(self, step: TrainStep) -> Tensor | None:
        """Maximum over the classes of the image of the student's auxiliary CAM of view 2, [B, H, W], where
        needed."""
        if selection_at(self.config, step.fraction) not in ("strict", "loose"):
            return None
        with evaluating(step.network):
            cams = multi_scale_cam(step.network, step.batch.view2, step.batch.label, step.recipe.cam)
        return cams.auxiliary.amax(1)

    def after_step(self, network: Network, fraction: float) -> None:
        self.teacher.follow(self._student(network), teacher_momentum(self.config, fraction))


def _project(projector: nn.Module, tokens: Tensor) -> Tensor:
    """Projector in float32: cosines divided by a temperature of 0.04 do not survive bfloat16."""
    with torch.autocast(tokens.device.type, enabled=False):
        return projector(tokens.float())
