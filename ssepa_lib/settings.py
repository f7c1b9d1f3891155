"""The sections of a recipe: every setting with its type, bounds, default and meaning.

Points of the schedule are fractions of all steps, so that a shorter run keeps the shape of the published one.
A new field with a neutral default leaves every hash as it is, so that finished runs are recognised. Whoever
changes what unchanged settings train raises the section's `REVISION`.
"""

from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from ssepa_lib.errors import UserError
from ssepa_lib.fields import CONFIG, NotTrained, Section, values
from ssepa_lib.paths import folder_root

Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Temperature = Annotated[float, Field(gt=0, le=100)]
Scale = Annotated[float, Field(ge=0.05, le=20)]
Share = Annotated[float, Field(ge=0.001, le=1)]
Count = Annotated[int, Field(ge=1, le=100_000_000)]
Images = Annotated[int, Field(ge=0, le=100_000_000)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
Batch = Annotated[int, Field(ge=1, le=65536)]
Width = Annotated[int, Field(ge=1, le=1_048_576)]
Scales = Annotated[list[Scale], Field(min_length=1, max_length=16)]
Dilation = Annotated[int, Field(ge=1, le=512)]
TWO = Field(min_length=2, max_length=2)  # [low, high] or [first, last]

HaafObjective = Literal[
    "none", "cls", "affinity", "energy", "decoder", "equivariance", "pooling", "ncut", "variance"
]
HAAF_OBJECTIVES: tuple[str, ...] = get_args(HaafObjective)


@dataclass(frozen=True, config=CONFIG)
class DataConfig(Section, key="data"):
    """What is read and how it is cropped."""

    name: Annotated[str, Field(min_length=1, max_length=64)] = "shapes"
    """The dataset: shapes (built in), voc, coco, or folder (your own images)."""
    root: Annotated[str, NotTrained] = ""
    """Folder of the data; empty: VOC_ROOT, COCO_ROOT or FOLDER_ROOT, else the default below data/."""
    train_split: str = "train"
    """The split to train on."""
    measured_train: Annotated[str, NotTrained] = ""
    """The split that stands for train where results are measured; empty: train_split."""
    val_split: Annotated[str, NotTrained] = "val"
    """The split for validation."""
    train_images: Images = 0
    """Use only the first so many training images; 0: all."""
    val_images: Annotated[Images, NotTrained] = 0
    """Use only the first so many validation images; 0: all."""
    crop: Pixels = 448
    """Side of a training crop, in pixels."""
    views: Literal["toco", "fsr"] = "toco"
    """How the training view is cut: toco, a crop after a random resize; fsr, a random resized crop."""
    scale: Annotated[list[Scale], TWO] = values(0.5, 2.0)
    """Random resize before the crop of the toco view, [low, high]."""
    batch: Batch = 4
    """Images per step over all processes; a different total changes the results."""
    workers: Annotated[int, Field(ge=0, le=1024), NotTrained] = 2
    """Loader processes; 0: load in the training process."""
    eval_size: Annotated[int, Field(ge=0, le=8192), NotTrained] = 448
    """Side of the square to which images are resized for evaluation, in pixels; 0: native image size."""

    def __post_init__(self) -> None:
        self.require_order("scale")
        if (
            self.name == "folder" and not self.root
        ):  # stored in the recipe, because it says which dataset it is
            object.__setattr__(self, "root", folder_root())


@dataclass(frozen=True, config=CONFIG)
class ModelConfig(Section, key="model"):
    """The network of ToCo (Section 1.1 of the method notes) and FSR's aggregator."""

    backbone: Annotated[str, Field(min_length=1, max_length=200)] = "vit_base_patch16_224.orig_in21k_ft_in1k"
    """A timm model name, always with its tag."""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """Arguments passed to timm, for example depth or patch_size."""
    weights: str = ""
    """A .safetensors file; none: random; empty: data/weights/<backbone>.safetensors, else timm's download."""
    mean: Annotated[list[Fraction], Field(max_length=3)] = values()
    """Mean of the input per channel, 0..1; empty: the checkpoint's own."""
    std: Annotated[list[Share], Field(max_length=3)] = values()
    """Standard deviation of the input per channel, 0..1; empty: the checkpoint's own."""
    aux_block: Annotated[int, Field(ge=-1000, le=1000)] = -3
    """The block whose raw output feeds the auxiliary classifier; negative: counted from the end."""
    train_pos_embed: bool = False
    """Train the position embedding: ToCo freezes it, FSR trains it."""
    drop_path: BelowOne = 0.0
    """Rate of stochastic depth in the backbone."""
    aggregator: Literal["class_token", "mca", "gap", "gmp"] = "class_token"
    """Where the class token comes from: the backbone, FSR's cross-attention, average or maximum pooling."""
    keep_class_token: bool = False
    """With another aggregator: leave the checkpoint's class token in the blocks (FSR removes it)."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, 3):
                raise UserError(f"model.{name} is {getattr(self, name)}; it must hold three values, or none.")


@dataclass(frozen=True, config=CONFIG)
class AffinityConfig(Section, key="affinity"):
    """Patch affinity and HAAF (SS-EPA, equations 5 to 7)."""

    kind: Literal["none", "mean", "haaf"] = "none"
    """none; mean: all layers alike; haaf: layers weighted by a learned MLP."""
    attention: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged: attention probabilities, or the paper's literal reading, raw logits."""
    strategy: Annotated[Literal["stack_heads", "stack_layers", "matrix_free"], NotTrained] = "matrix_free"
    """How the product is computed: equal numbers, different memory (SS-EPA, Table 4)."""
    descriptor: Literal["full", "patch"] = "patch"
    """What HAAF pools: the full (1+N)×(1+N) map or its N×N patch-to-patch block."""
    pooling: Literal["mean", "max"] = "mean"
    """How HAAF pools a map to one number."""
    hidden: Width = 32
    """Width of HAAF's MLP."""
    haaf_objective: HaafObjective = "none"
    """The loss term that trains HAAF; none: every layer keeps weight 1."""
    haaf_weight: Weight = 0.1
    """Weight of that term in the total loss."""
    haaf_lr: Annotated[float, Field(ge=0, le=100)] = 5e-3
    """Learning rate of HAAF's MLP."""
    haaf_prior: Weight = 0.0
    """Weight, within that term, of the Kullback-Leibler divergence of the weights from equal weights."""
    iterations: Annotated[int, Field(ge=1, le=100)] = 1
    """How many times the affinity is applied to a map (paper: once)."""
    balance: bool = False
    """Divide the columns of the affinity, then its rows, by their sums, and symmetrise it."""
    deflate: bool = False
    """Subtract the mean over the patches from the propagated map: what is left of the constant map."""
    per_scale: bool = True
    """Propagate the map of every scale; false: their sum, with the affinity of the image itself."""
    auxiliary: bool = False
    """Propagate the auxiliary CAM too."""

    def __post_init__(self) -> None:
        if self.haaf_objective != "none" and self.kind != "haaf":
            raise UserError(
                f"affinity.haaf_objective '{self.haaf_objective}' needs affinity.kind haaf: only haaf learns."
            )
        if self.haaf_prior > 0 and self.haaf_objective == "none":
            raise UserError(
                "affinity.haaf_prior needs an objective; set affinity.haaf_objective, or the prior to 0."
            )
        for name in ("balance", "deflate"):
            if getattr(self, name) and self.kind == "none":
                raise UserError(f"affinity.{name} needs an affinity; set affinity.kind to mean or haaf.")
        if self.balance and self.attention == "logits":
            raise UserError("affinity.balance needs probabilities; set affinity.attention to probabilities.")


@dataclass(frozen=True, config=CONFIG)
class CamConfig(Section, key="cam"):
    """Class activation maps and pseudo-labels (ToCo, Section 3)."""

    scales: Scales = values(1.0, 0.5, 1.5)
    """Image scales whose maps are added."""
    flip: bool = True
    """Also use the flipped image at every scale."""
    background: Annotated[Fraction, NotTrained] = 0.5
    """Threshold below which a pixel is background in evaluation."""
    high: Fraction = 0.7
    """Training labels: foreground above."""
    low: Fraction = 0.25
    """Training labels: background below."""
    par_dilations: Annotated[list[Dilation], Field(min_length=1, max_length=16)] = values(1, 2, 4, 8, 12, 24)
    """Distances of the neighbours in pixel-adaptive refinement (PAR), in pixels."""
    par_iterations: Annotated[int, Field(ge=0, le=1000)] = 10
    """Iterations of PAR."""
    calibrate: Literal["none", "otsu"] = "none"
    """otsu: a power per image and class moves the map's best threshold to 0.5 (Otsu 1979)."""
    teacher_momentum: Fraction = 0.0
    """Momentum of a moving average of the network that makes the CAMs; 0: the network itself."""
    main_from: Fraction = 0.0
    """Fraction of all steps from which labels come from the main CAM; before, the auxiliary one (COCO)."""

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < 1:
            raise UserError(
                f"cam.low is {self.low} and cam.high {self.high}; they must satisfy 0 < low < high < 1."
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
    unc: Weight = 0.0
    """FSR on uncertain patches."""
    cer: Weight = 0.0
    """FSR on the class token."""


@dataclass(frozen=True, config=CONFIG)
class ContrastConfig(Section, key="contrast"):
    """Class token contrast: views and projection head (ToCo, Section 3.3)."""

    global_scale: Annotated[list[Share], TWO] = values(0.4, 1.0)
    """Share of the image in the second global view, [low, high]."""
    local_crops: Annotated[int, Field(ge=1, le=256)] = 8
    """Local views per image."""
    local_size: Pixels = 96
    """Side of a local view, in pixels."""
    temperature: Temperature = 0.5
    """Temperature of the similarities."""
    momentum: Fraction = 0.9
    """Momentum of the teacher head."""
    negative_below: Fraction = 0.2
    """A local view whose region map has a lower mean is a negative."""
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

    lr: Annotated[float, Field(gt=0)] = 6e-5
    """Learning rate of the backbone."""
    head_lr_factor: Annotated[float, Field(ge=0, le=100_000)] = 10.0
    """The same for classifiers, decoder and projection head, as a multiple of it."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.01
    """Weight decay of AdamW."""
    decay_all: bool = True
    """Decay every parameter; false: not biases, norms, position embedding, class and mask tokens (FSR)."""
    warmup: BelowOne = 0.075
    """Fraction of all steps over which the learning rate rises linearly."""
    warmup_factor: Fraction = 1e-6
    """Where it starts, as a multiple of the learning rate."""
    schedule: Literal["poly", "cosine"] = "poly"
    """Decay after the warm-up: poly (power 0.9) or cosine, both to 0."""


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
