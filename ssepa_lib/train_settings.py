"""The sections of a recipe on losses, views, optimisation and evaluation; see `settings.py` for the rules."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ssepa_lib.fields import (
    CONFIG,
    TWO,
    Batch,
    BelowOne,
    Count,
    Fraction,
    NotTrained,
    Pixels,
    Rate,
    Scales,
    Section,
    Share,
    Temperature,
    Weight,
    Width,
    values,
)


@dataclass(frozen=True, config=CONFIG)
class LossConfig(Section, key="losses"):
    """Weights of the loss terms; the classification loss has weight 1 (ToCo, Section 3.4)."""

    segmentation_start: Fraction = 0.1
    """Fraction of all steps from which seg and reg count."""
    contrast_start: Fraction = 0.0
    """Fraction of all steps from which ptc and ctc count (ToCo on COCO)."""
    aux_cls: Weight = 1.0
    """Classification by the auxiliary classifier."""
    ptc: Weight = 0.2
    """Patch token contrast."""
    ptc_padding: Literal["count", "ignore"] = "count"
    """Tokens on padding in patch token contrast; count is the published behaviour."""
    ctc: Weight = 0.5
    """Class token contrast."""
    seg: Weight = 0.1
    """Cross-entropy of the segmentation against pseudo-labels."""
    reg: Weight = 0.05
    """Dense energy of the segmentation."""
    cam: Weight = 0.0
    """Cross-entropy of the CAM against pseudo-labels, through the main classifier."""
    aff: Weight = 0.0
    """Pairs of patches with confident pseudo-labels, which train the learned affinity (AFA)."""
    unc: Weight = 0.0
    """FSR on uncertain patches."""
    cer: Weight = 0.0
    """FSR on the class token."""


@dataclass(frozen=True, config=CONFIG)
class ContrastConfig(Section, key="contrast"):
    """Class token contrast: views and projection head (ToCo, Section 3.3)."""

    global_scale: Annotated[list[Share], TWO] = values(0.4, 1.0)
    """Share of the image in the second global view, [low, high]."""
    views: Literal["crops", "masked"] = "crops"
    """Local views: crops, small crops (ToCo); masked, the whole crop with most patches hidden (MCC)."""
    local_crops: Annotated[int, Field(ge=1, le=256)] = 8
    """Local views per image."""
    local_size: Pixels = 96
    """Side of a local crop, in pixels."""
    mask_share: BelowOne = 0.95
    """Masked views: probability that a block of patches is hidden."""
    mask_block: Annotated[int, Field(ge=1, le=256)] = 4
    """Masked views: side of a block, in patches."""
    mask_empty: bool = False
    """Masked views: allow views that show no patch, as published; false: one block always stays."""
    main_from: Fraction = 0.6
    """Masked views: fraction of all steps from which the main CAM judges them; before, the auxiliary one."""
    temperature: Temperature = 0.5
    """Temperature of the similarities."""
    momentum: Fraction = 0.9
    """Momentum of the teacher head."""
    negative_below: Fraction = 0.2
    """A local view whose region map has no higher mean is a negative."""
    hidden: Width = 2048
    """Width of the projection head's MLP."""
    bottleneck: Width = 256
    """Width before the last layer of the projection head."""
    outputs: Width = 1024
    """Outputs of the projection head."""

    def __post_init__(self) -> None:
        self.require_order("global_scale")


@dataclass(frozen=True, config=CONFIG)
class ReinforceConfig(Section, key="reinforce"):
    """Feature self-reinforcement (FSR, Sections 3.2 to 3.4)."""

    REVISION: ClassVar[int] = 2

    view_scale: Annotated[list[Share], TWO] = values(0.32, 1.0)
    """Share of the image in a view, [low, high]."""
    augmentation: Literal["none", "blur", "solarise", "autoaugment"] = "none"
    """Additional augmentation of the views."""
    selection: Literal["random", "edge", "strict", "loose"] = "loose"
    """Masked blocks: random, on edges, strict (uncertain only) or loose (uncertain first, then random)."""
    mask_ratio: BelowOne = 0.4
    """Share of the blocks that is masked."""
    mask_block: Annotated[int, Field(ge=1, le=256)] = 4
    """Side of a masked block, in patches."""
    random_until: Fraction = 0.2
    """Fraction of all steps with random blocks."""
    uncertain: Annotated[list[Fraction], TWO] = values(0.2, 0.7)
    """Values of the auxiliary CAM that are called uncertain, [low, high]."""
    student_temperature: Temperature = 0.1
    """Temperature of the student's outputs."""
    teacher_temperature: Annotated[list[Temperature], TWO] = values(0.04, 0.07)
    """Temperature of the teacher's outputs, [first, last]."""
    teacher_warmup: Fraction = 0.125
    """Fraction of all steps over which the teacher's temperature rises."""
    center_momentum: Fraction = 0.9
    """Momentum of the centres of the teacher's outputs."""
    momentum: Fraction = 0.9995
    """Momentum of the teacher network at the start; it rises to 1 on a cosine."""
    outputs: Width = 4096
    """Outputs of the projector."""

    def __post_init__(self) -> None:
        self.require_order("view_scale", "uncertain")


@dataclass(frozen=True, config=CONFIG)
class OptimConfig(Section, key="optim"):
    """AdamW and its learning-rate curve."""

    lr: Rate = 6e-5
    """Learning rate of the backbone."""
    head_lr_factor: Annotated[float, Field(ge=0, le=100_000)] = 10.0
    """The same for classifiers, decoder and projection head, as a multiple of it."""
    classifier_lr_factor: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """The same for both classifiers, as a multiple of the heads'; short and frozen runs want more."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.01
    """Weight decay of AdamW."""
    decay_all: bool = True
    """Decay every parameter; false: not biases, norms, position embedding, class and mask tokens (FSR)."""
    warmup: BelowOne = 0.075
    """Fraction of all steps over which the learning rate rises linearly."""
    warmup_factor: Fraction = 1e-6
    """Where it starts, as a multiple of the learning rate."""
    schedule: Literal["poly", "cosine"] = "poly"
    """Decay after the warm-up: poly, (1 − share of steps done)^power, or cosine; both end at 0."""
    power: Annotated[float, Field(ge=0.01, le=10)] = 0.9
    """Exponent of poly; 1: linear (AFA)."""


@dataclass(frozen=True, config=CONFIG)
class TrainConfig(Section, key="train"):
    """How long, where and how exactly."""

    steps: Count = 20000
    """Optimiser steps."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of everything random."""
    device: Annotated[Literal["auto", "cpu", "cuda"], NotTrained] = "auto"
    """auto takes a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the hardware multiplies it natively, otherwise fp32."""
    compile: bool = False
    """Compile the backbone with torch.compile."""
    checkpointing: Annotated[bool, NotTrained] = False
    """Recompute blocks in the backward pass: less memory, equal numbers."""
    log_every: Annotated[Count, NotTrained] = 20
    """Steps between rows of the history."""
    save_every: Annotated[Count, NotTrained] = 500
    """Steps between checkpoints."""


@dataclass(frozen=True, config=CONFIG)
class EvalConfig(Section, key="eval"):
    """Inference: single uses scale 1; ms adds scales and flip; ms_crf adds the dense CRF."""

    scales: Scales = values(1.0, 1.25, 1.5)
    """Image scales of the segmentation."""
    flip: bool = True
    """Also use the flipped image at every scale."""
    batch: Batch = 16
    """Images at once, where they are resized to one size."""
