"""The sections of a recipe on data, network and maps: every setting with its type, bounds, default and
meaning. Those on losses and optimisation are in `train_settings.py`.

Points of the schedule are fractions of all steps, so that a shorter run keeps the shape of the published one.
A new field with a neutral default leaves every hash as it is, so that finished runs are recognised. Where a
change of the code makes unchanged settings train something else, the section's `REVISION` has to be raised.
"""

from dataclasses import field
from types import NoneType
from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from ssepa_lib.errors import UserError
from ssepa_lib.fields import (
    CONFIG,
    TWO,
    Batch,
    BelowOne,
    Dilation,
    Fraction,
    Images,
    Name,
    NotTrained,
    OptionalName,
    PathText,
    Pixels,
    Scale,
    Scales,
    Section,
    Share,
    Weight,
    Width,
    Word,
    shown,
    values,
)
from ssepa_lib.paths import folder_root

HaafObjective = Literal[
    "none", "cls", "affinity", "energy", "decoder", "equivariance", "pooling", "ncut", "variance"
]
HAAF_OBJECTIVES: tuple[str, ...] = get_args(HaafObjective)
_SIZES = {"depth": 1000, "embed_dim": 65536, "num_heads": 1024, "patch_size": 8192, "img_size": 8192}
_FOREIGN_ARGS = (  # which timm would take for itself, or the recipe says elsewhere
    "pretrained",
    "checkpoint",
    "cache",
    "hf_",
    "num_classes",
    "drop_path",
    "drop_rate",
    "proj_drop",
    "attn_drop",
    "pos_drop",
    "patch_drop",
    "dynamic_img",
    "features_only",
    "kwargs",
    "scriptable",
    "exportable",
    "no_jit",
)


def _number(value: Any) -> float:
    """A number as it is, and everything that is none as NaN."""
    return value if isinstance(value, (int, float)) else float("nan")


@dataclass(frozen=True, config=CONFIG)
class DataConfig(Section, key="data"):
    """What is read and how it is cropped."""

    name: Word = "shapes"
    """The dataset: shapes (built in), voc, coco, or folder (your own images)."""
    root: Annotated[PathText, NotTrained] = ""
    """Folder of the data; empty: VOC_ROOT, COCO_ROOT or FOLDER_ROOT, else the default below data/."""
    train_split: Name = "train"
    """The split to train on."""
    measured_train: Annotated[OptionalName, NotTrained] = ""
    """The split that stands for train where results are measured; empty: train_split."""
    val_split: Annotated[Name, NotTrained] = "val"
    """The split for validation."""
    train_images: Images = 0
    """Use only the first so many training images; 0: all."""
    val_images: Annotated[Images, NotTrained] = 0
    """Use only the first so many validation images; 0: all."""
    crop: Pixels = 448
    """Side of a training crop, in pixels."""
    views: Literal["toco", "plain", "fsr"] = "toco"
    """The training view: toco, a crop after a random resize; plain, without jitter; fsr, a resized crop."""
    scale: Annotated[list[Scale], TWO] = values(0.5, 2.0)
    """Random resize before the crop of the toco view, [low, high]."""
    fixed_views: Images = 0
    """Draw so many random views of each image, which return in later epochs; 0: a new one every time."""
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

    backbone: Word = "vit_base_patch16_224.orig_in21k_ft_in1k"
    """A timm model name, always with its tag."""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """Arguments passed to timm, for example depth or patch_size."""
    weights: PathText = ""
    """A file (.safetensors, or PyTorch's); none: random; micro: the built-in ones; empty:
    data/weights/<backbone>.safetensors, else timm's download."""
    mean: Annotated[list[Fraction], Field(max_length=3)] = values()
    """Mean of the input per channel, 0..1; empty: the checkpoint's own."""
    std: Annotated[list[Share], Field(max_length=3)] = values()
    """Standard deviation of the input per channel, 0..1; empty: the checkpoint's own."""
    aux_block: Annotated[int, Field(ge=-1000, le=1000)] = -3
    """The block whose raw output feeds the auxiliary classifier; negative: counted from the end."""
    train_pos_embed: bool = False
    """Train the position embedding: ToCo freezes it, FSR trains it."""
    train_norms: bool = True
    """Train the norms of the backbone; AFA freezes them."""
    drop_path: BelowOne = 0.0
    """Rate of stochastic depth in the backbone."""
    aggregator: Literal["class_token", "mca", "gap", "gmp"] = "class_token"
    """Where the class token comes from: the backbone, FSR's cross-attention, average or maximum pooling."""
    keep_class_token: bool = False
    """With another aggregator: leave the checkpoint's class token in the blocks (FSR removes it)."""
    freeze: bool = False
    """Keep the backbone as it is and train classifiers, decoder and HAAF alone."""
    cache_gb: Annotated[float, Field(ge=0, le=10_000), NotTrained] = 3.0
    """Memory for the features of a frozen backbone on the views of data.fixed_views, in GB; 0: none. Features
    are rounded to half precision whether they are kept or not."""

    def __post_init__(self) -> None:
        self._check_backbone_args()
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, 3):
                raise UserError(f"model.{name} is {getattr(self, name)}; it must hold three values, or none.")

    def _check_backbone_args(self) -> None:
        """Sizes are whole numbers from 1 on, and nothing can name weights, files or addresses."""
        for name, value in self.backbone_args.items():
            key = f"model.backbone_args.{name}"
            if not isinstance(name, str) or not name.isidentifier() or name.startswith(_FOREIGN_ARGS):
                raise UserError(f"{key} is not an argument of a network; write for example {{depth: 4}}.")
            for number in value if isinstance(value, list) else [value]:
                whole = isinstance(number, int) and not isinstance(number, bool)
                if name in _SIZES and not (whole and 1 <= number <= _SIZES[name]):
                    most = f"{_SIZES[name]:,}".replace(",", " ")
                    raise UserError(f"{key} is {shown(value)}; it must be a whole number from 1 to {most}.")
                if not isinstance(number, (bool, str, NoneType)) and not abs(_number(number)) <= 65536:
                    raise UserError(
                        f"{key} is {shown(value)}; it must be a number up to 65 536, a truth value, a text "
                        "or a list."
                    )
        width, heads = (self.backbone_args.get(name) for name in ("embed_dim", "num_heads"))
        if isinstance(width, int) and isinstance(heads, int) and width % heads:
            raise UserError(
                f"model.backbone_args.embed_dim is {width}, which {heads} heads do not divide; change "
                "embed_dim or num_heads."
            )


@dataclass(frozen=True, config=CONFIG)
class AffinityConfig(Section, key="affinity"):
    """Patch affinity and HAAF (SS-EPA, equations 5 to 7)."""

    kind: Literal["none", "mean", "haaf", "learned"] = "none"
    """none; mean: all layers alike; haaf: layers weighted by an MLP; learned: trained on pairs (AFA)."""
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
    """How many times the affinity is applied to a map, at most (paper: once)."""
    coverage: Fraction = 0.0
    """Apply it again only to maps whose mean, scaled to 0..1, is below this share; 0: to all."""
    balance: bool = False
    """Divide the columns of the affinity, then its rows, by their sums, and symmetrise it."""
    deflate: bool = False
    """Subtract the mean over the patches from the propagated map: what is left of the constant map."""
    per_scale: bool = True
    """Propagate the map of every scale; false: their sum, with the affinity of the image itself."""
    auxiliary: bool = False
    """Propagate the auxiliary CAM too."""
    blocks: Annotated[int, Field(ge=1, le=1000)] = 2
    """Learned affinity: the last so many blocks whose heads it is made of."""
    radius: Annotated[float, Field(ge=0.01, le=1)] = 0.25
    """Learned affinity: how far it reaches, as a share of the patches along a side of the crop."""
    start: Fraction = 0.3
    """Learned affinity: fraction of all steps from which pseudo-labels use it; until then it is trained."""

    def __post_init__(self) -> None:
        if self.haaf_objective != "none" and self.kind != "haaf":
            raise UserError(
                f"affinity.haaf_objective '{self.haaf_objective}' needs affinity.kind haaf: only haaf learns "
                "from it."
            )
        if self.haaf_prior > 0 and self.haaf_objective == "none":
            raise UserError(
                "affinity.haaf_prior needs an objective; set affinity.haaf_objective, or the prior to 0."
            )
        for name in ("balance", "deflate", "coverage"):
            if getattr(self, name) and self.kind in ("none", "learned"):
                raise UserError(f"affinity.{name} needs an affinity; set affinity.kind to mean or haaf.")
        if self.kind == "learned" and (self.per_scale or self.auxiliary):
            raise UserError(
                "affinity.kind learned propagates the main CAM once; set affinity.per_scale and "
                "affinity.auxiliary to false."
            )
        if self.coverage and self.iterations == 1:
            raise UserError("affinity.coverage limits repetitions; set affinity.iterations to 2 or more.")
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
