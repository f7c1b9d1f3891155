"""The loss terms of ToCo as pure functions of tensors, computed in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.data import IGNORE
from ssepa_lib.device import global_ratio, rank_and_world
from ssepa_lib.labels.pseudo_labels import inside
from ssepa_lib.methods.bilateral import bilateral_filter

ENERGY_WEIGHT, SIGMA_XY, SIGMA_RGB = 1e-7, 50.0, 15.0  # at half image size; colours in 0..255


def classification_loss(scores: Tensor, label: Tensor) -> Tensor:
    """Multi-label soft margin loss of scores [B, C] against labels [B, C] of 0 and 1 (ToCo, L_cls)."""
    return F.multilabel_soft_margin_loss(scores.float(), label.float())


def patch_token_contrast(patches: Tensor, token_labels: Tensor) -> Tensor:
    """Pull tokens of one label together, push the others apart (ToCo, equation 4).

    Args:
        patches: [B, N, D], final tokens.
        token_labels: [B, N], class ids; pairs with a 255 and pairs of a token with itself do not count.

    Returns:
        0.5·(1 − Σpos/(#pos + 1)) + 0.5·Σneg/(#neg + 1) over absolute cosine similarities of the whole batch.
    """
    with torch.autocast(patches.device.type, enabled=False):
        unit = F.normalize(patches.float(), dim=-1, eps=1e-8)
        similarity = (unit @ unit.mT).abs()  # [B, N, N]
    same = token_labels[:, :, None] == token_labels[:, None, :]
    known = token_labels != IGNORE
    counted = (
        known[:, :, None]
        & known[:, None, :]
        & ~torch.eye(same.shape[1], dtype=torch.bool, device=same.device)
    )
    positive, negative = same & counted, ~same & counted
    # the 1 in the denominator is the whole batch's, whatever share of it this process has
    one = 1 / rank_and_world()[1]
    attract = 1 - global_ratio((similarity * positive).sum(), positive.sum() + one)
    return 0.5 * attract + 0.5 * global_ratio((similarity * negative).sum(), negative.sum() + one)


def affinity_pairs(affinity: Tensor, token_labels: Tensor, near: Tensor) -> Tensor:
    """Raise the affinity of patches with one label and lower that of patches with different ones (AFA).

    Args:
        affinity: [B, N, N], 0..1.
        token_labels: [B, N], class ids; pairs with a 255 do not count. Pairs of two background patches and
            of a patch with itself do.
        near: bool [N, N], which pairs count.

    Returns:
        ½ Σ_pos (1 − A) / (#pos + 1) + ½ Σ_neg A / (#neg + 1), sums and counts over the whole batch.
    """
    same = token_labels[:, :, None] == token_labels[:, None, :]
    known = token_labels != IGNORE
    counted = known[:, :, None] & known[:, None, :] & near
    positive, negative = same & counted, ~same & counted
    one = 1 / rank_and_world()[1]  # of the whole batch
    attract = global_ratio(((1 - affinity) * positive).sum(), positive.sum() + one)
    return 0.5 * attract + 0.5 * global_ratio((affinity * negative).sum(), negative.sum() + one)


def class_token_contrast(student: Tensor, teacher: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """InfoNCE between class tokens of global and local views (ToCo, equation 5).

    With s_ij = exp(teacher_i · student_j / temperature) and Σneg_i over the negative views, each image
    contributes Σ_i [Σ_positive j −log(s_ij / (s_ij + Σneg_i + 1e-4)) − log(1 / (1 + Σneg_i + 1e-4))] /
    2(#positive + 1e-4).

    Args:
        student: [B, V, E], projected class tokens of all views.
        teacher: [B, 2, E], projected class tokens of the two global views; receives no gradient.
        positive: bool [B, V], views that show an object (the two global ones always do).
        temperature: of the similarities.

    Returns:
        The mean over the batch.
    """
    with torch.autocast(student.device.type, enabled=False):
        logits = teacher.detach().float() @ student.float().mT / temperature  # [B, 2, V]
    positive = positive[:, None, :]
    # log(Σneg + 1e-4); the extra column keeps it finite without negatives
    masked = F.pad(logits.masked_fill(positive, -torch.inf), (0, 1), value=torch.tensor(1e-4).log().item())
    negatives = masked.logsumexp(-1, keepdim=True)  # [B, 2, 1]
    attract = (F.softplus(negatives - logits) * positive).sum((1, 2))
    repel = F.softplus(negatives).sum((1, 2))
    return ((attract + repel) / (2 * (positive.sum((1, 2)) + 1e-4))).mean()


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy averaged over background and over foreground pixels separately, then the mean of both.

    Args:
        logits: [B, C+1, H, W].
        target: long [B, H, W], 255 ignored.

    Returns:
        A scalar; a side without pixels counts 0, so a crop without labels gives 0 (with a zero gradient),
        never NaN.
    """
    pixel = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none")
    background = target == 0
    foreground = ~background & (target != IGNORE)
    return 0.5 * sum(global_ratio((pixel * side).sum(), side.sum()) for side in (background, foreground))


def normalised_cut(tokens: Tensor, foreground: Tensor, valid: Tensor) -> Tensor:
    """Normalised cut of soft two-way segmentations on the graph of tokens (Shi and Malik, 2000; Tang et al.
    2018).

    An edge weighs max(0, cosine)² between tokens centred per image. Tokens on padding have none: the
    strongest cut would be the one between image and padding.

    Args:
        tokens: [B, N, D].
        foreground: [B, N], 0..1.
        valid: [B, N], 1 on the image, 0 on padding.

    Returns:
        The mean over the batch of cut/assoc(foreground) + cut/assoc(background), 0..2.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        tokens, foreground, valid = tokens.float(), foreground.float(), valid.float().unsqueeze(2)
        mean = (tokens * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        unit = F.normalize(tokens - mean, dim=-1) * valid
        edges = (unit @ unit.mT).clamp(min=0).square()  # [B, N, N]
        degree = edges.sum(2)
        sides = torch.stack([foreground, 1 - foreground])  # [2, B, N]
        cut = torch.einsum("bi,bij,bj->b", foreground, edges, 1 - foreground)
    return (cut / ((sides * degree).sum(2) + 1e-5)).sum(0).mean()


def unexplained_variance(tokens: Tensor, foreground: Tensor, valid: Tensor, label: Tensor) -> Tensor:
    """Share of the variance of the tokens that soft two-way segmentations leave unexplained.

    This is Otsu's criterion in the space of tokens. With u the unit tokens after centring, a segmentation m
    explains the share (‖Σ m u‖² / Σ m + ‖Σ (1−m) u‖² / Σ (1−m)) / N: the more, the more alike the tokens are
    within both sides. A region that stays on a part of the object leaves the rest in the background, which
    lowers the share; this rewards recruiting what looks like the seed. An objective of this workbook.

    Args:
        tokens: [B, N, D].
        foreground: [B, N, C], 0..1.
        valid: [B, N], 1 on the image, 0 on padding.
        label: [B, C], 1 for classes in the image, else 0.

    Returns:
        The mean over images and the classes present, 0..1.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        tokens, maps, valid = tokens.float(), foreground.float(), valid.float().unsqueeze(2)
        number = valid.sum(1).clamp(min=1)  # [B, 1]
        mean = (tokens * valid).sum(1, keepdim=True) / number.unsqueeze(2)
        unit = F.normalize(tokens - mean, dim=-1) * valid
        explained = 0
        for side in (maps * valid, (1 - maps) * valid):  # [B, N, C]
            explained = explained + (side.mT @ unit).square().sum(2) / (side.sum(1) + 1e-6)  # [B, C]
    return global_ratio(((1 - explained / number) * label).sum(), label.sum())


class _DenseEnergy(torch.autograd.Function):
    """−(1/B) Σ sᵀ[G ∘ Ws] with the gradient −2·(G ∘ Ws)/B, the gate G held constant."""

    @staticmethod
    def forward(ctx, inside_probabilities: Tensor, image: Tensor, gate: Tensor, exact: bool) -> Tensor:
        smooth = gate * bilateral_filter(image, inside_probabilities, SIGMA_XY, SIGMA_RGB, exact) / len(gate)
        ctx.save_for_backward(smooth)
        return -(inside_probabilities * smooth).sum()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return -2 * gradient * ctx.saved_tensors[0], None, None, None


def dense_energy(
    image: Tensor, logits: Tensor, target: Tensor, box: Tensor, *, exact: bool = False
) -> Tensor:
    """Dense conditional-random-field energy of a soft segmentation, times 1e-7 (Tang et al., ECCV 2018; ToCo,
    L_reg).

    Everything runs at half size: image and masks by nearest, softmax probabilities S by bilinear resizing.
    With R the crop box, G = max(R − max_k S, 0), or 1 where the target is 255, and W the bilateral kernel (σ
    50 px, 15 grey levels), the energy is −(1/B) Σ_k (S∘R)ᵀ[G ∘ W(S∘R)] and its gradient −2·(G ∘ W(S∘R))/B ∘
    R.

    Args:
        image: [B, 3, H, W], RGB in 0..255.
        logits: [B, C+1, h, w], any size; resized to H×W.
        target: long [B, H, W], pseudo-labels with 255 for unlabelled.
        box: long [B, 4], valid part of the crop as (y0, y1, x0, x1), half open.
        exact: evaluate the kernel over all pairs, instead of the fast approximation.
    """
    height, width = target.shape[-2:]
    half = (height // 2, width // 2)
    probabilities = F.interpolate(logits.float(), (height, width), mode="bilinear").softmax(1)
    probabilities = F.interpolate(probabilities, half, mode="bilinear")
    region = F.interpolate(inside(box, (height, width))[:, None].float(), half)  # [B, 1, H/2, W/2]
    unlabelled = F.interpolate((target == IGNORE)[:, None].float(), half) > 0
    gate = (region - probabilities.detach().amax(1, keepdim=True)).clamp(min=0).masked_fill(unlabelled, 1)
    return ENERGY_WEIGHT * _DenseEnergy.apply(
        probabilities * region, F.interpolate(image.float(), half), gate, exact
    )
