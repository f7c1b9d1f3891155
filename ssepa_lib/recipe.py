"""Recipes: everything that distinguishes one run from another, typed and checked before anything is computed.

A recipe is a composition of small YAML files, `data/method[/backbone]`: `load_recipe("voc/ssepa/deit_small")` merges
the defaults below with `recipes/data/voc.yaml`, `recipes/method/ssepa.yaml` and `recipes/backbone/deit_small.yaml`.
An unknown key or a value of the wrong type is an error. Steps are counted from 0; schedule points are fractions of
all steps, so that a shorter run keeps the shape of the published one.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssepa_lib.errors import UserError
from ssepa_lib.paths import RECIPES, folder_root

SUPERVISIONS = (
    "none",
    "cls",
    "affinity",
    "energy",
    "decoder",
    "equivariance",
    "pooling",
    "ncut",
)  # what trains HAAF


def _choice(section: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"recipe: {section}.{name} is '{value}'; choose one of {', '.join(allowed)}.")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"recipe: {message}")


def _fraction(name: str, value: float) -> None:
    _require(0 <= value <= 1, f"{name} is {value}; it must lie in 0..1.")


def _positive(name: str, values: list) -> None:
    _require(
        bool(values) and all(v > 0 for v in values), f"{name} must hold one or more values, all above 0."
    )


def _low_high(name: str, values: list[float]) -> None:
    _require(
        len(values) == 2 and 0 <= values[0] <= values[1], f"{name} must be [low, high], low not below 0."
    )


@dataclass
class DataConfig:
    """What is read and how it is cropped."""

    name: str = "shapes"  # shapes, voc, coco or folder
    root: str = ""  # folder of the data; empty: VOC_ROOT or COCO_ROOT or their defaults, or FOLDER_ROOT
    train_split: str = "train"
    measured_train: str = ""  # split that stands for train where results are measured; empty: train_split
    val_split: str = "val"
    train_images: int = 0  # use the first so many training images; 0: all
    val_images: int = 0  # the same for validation
    crop: int = 448  # side of a training crop, pixels
    views: str = "toco"  # training image: toco, a crop after a random resize; fsr, a random resized crop
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])  # random resize before the crop of toco
    batch: int = 4  # images per step over all processes (a different total changes results)
    workers: int = 2  # loader processes; 0: none
    eval_size: int = 448  # side of the square an image is resized to for evaluation; 0: original size

    def __post_init__(self) -> None:
        _choice("data", "name", self.name, ("shapes", "voc", "coco", "folder"))
        _choice("data", "views", self.views, ("toco", "fsr"))
        _require(self.crop > 0 and self.batch > 0, "data.crop and data.batch must be positive.")
        _require(self.workers >= 0, "data.workers must be 0 or more.")
        _require(
            min(self.train_images, self.val_images) >= 0,
            "data.train_images and val_images must be 0 or more.",
        )
        _require(
            len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1], "data.scale must be [low, high]."
        )
        if self.name == "folder":
            self.root = self.root or folder_root()  # kept in the recipe, because it says which data set it is


@dataclass
class ModelConfig:
    """The network of Section 1.1 of ToCo, and FSR's aggregator."""

    backbone: str = "vit_base_patch16_224.orig_in21k_ft_in1k"  # timm name, always with its tag
    backbone_args: dict[str, Any] = field(default_factory=dict)  # passed to timm (depth, patch_size, …)
    weights: str = (
        ""  # a .safetensors file; "none": random; empty: data/weights/<backbone>.safetensors, else timm's
    )
    mean: list[float] = field(default_factory=list)  # per channel, 0..1; empty: the checkpoint's own
    std: list[float] = field(default_factory=list)
    aux_block: int = -3  # block whose raw output feeds the auxiliary classifier
    train_pos_embed: bool = False  # ToCo freezes the position embedding, FSR trains it
    drop_path: float = 0.0
    aggregator: str = "class_token"  # where the class token comes from: class_token, mca, gap or gmp
    keep_class_token: bool = (
        False  # with another aggregator: leave the checkpoint's token in the blocks (FSR: not)
    )

    def __post_init__(self) -> None:
        _choice("model", "aggregator", self.aggregator, ("class_token", "mca", "gap", "gmp"))


@dataclass
class AffinityConfig:
    """Patch affinity (SS-EPA, equations 5 to 7)."""

    kind: str = "none"  # none; mean: all layers alike; haaf: layers weighted by a learned MLP
    source: str = "softmax"  # attention probabilities, or the literal reading: raw logits
    strategy: str = "haaf_fused"  # all_heads, haaf_dense or haaf_fused: same numbers, other memory
    descriptor: str = "patch"  # what HAAF pools: full (1+N)² map or the patch-to-patch block
    hidden: int = 32  # width of HAAF's MLP
    supervision: str = "none"  # what trains HAAF, one of SUPERVISIONS; see objectives.HaafSupervision
    supervision_weight: float = 0.1
    haaf_lr: float = 5e-3  # learning rate of HAAF's MLP
    steps: int = 1  # propagation steps
    per_scale: bool = (
        True  # refine the map of every scale; False: their sum, with the affinity of the image itself
    )
    auxiliary: bool = False  # refine the auxiliary CAM too

    def __post_init__(self) -> None:
        _choice("affinity", "kind", self.kind, ("none", "mean", "haaf"))
        _choice("affinity", "source", self.source, ("softmax", "logits"))
        _choice("affinity", "strategy", self.strategy, ("all_heads", "haaf_dense", "haaf_fused"))
        _choice("affinity", "descriptor", self.descriptor, ("full", "patch"))
        _choice("affinity", "supervision", self.supervision, SUPERVISIONS)
        _require(self.steps >= 1, "affinity.steps must be 1 or more.")
        _require(
            self.supervision == "none" or self.kind == "haaf",
            f"affinity.supervision '{self.supervision}' needs affinity.kind haaf: only haaf learns.",
        )


@dataclass
class CamConfig:
    """Class activation maps and pseudo-labels (ToCo, Section 3)."""

    scales: list[float] = field(default_factory=lambda: [1.0, 0.5, 1.5])
    flip: bool = True
    background: float = 0.5  # threshold for evaluation
    high: float = 0.7  # above: foreground
    low: float = 0.25  # below: background
    par_dilations: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 12, 24])
    par_iterations: int = 10

    def __post_init__(self) -> None:
        _require(0 < self.low < self.high < 1, "cam.low and cam.high must satisfy 0 < low < high < 1.")
        _positive("cam.scales", self.scales)
        _positive("cam.par_dilations", self.par_dilations)
        _require(self.par_iterations >= 0, "cam.par_iterations must be 0 or more.")
        _fraction("cam.background", self.background)


@dataclass
class LossConfig:
    """Weights of the loss terms; the classification loss has weight 1."""

    switch: float = 0.1  # fraction of all steps after which seg and reg count
    aux_cls: float = 1.0
    ptc: float = 0.2  # patch token contrast
    ctc: float = 0.5  # class token contrast
    seg: float = 0.1  # segmentation cross-entropy, from `switch` on
    reg: float = 0.05  # dense energy, from `switch` on
    unc: float = 0.0  # FSR on uncertain patches
    cer: float = 0.0  # FSR on the class token

    def __post_init__(self) -> None:
        _require(0 <= self.switch <= 1, "losses.switch is a fraction of all steps, 0..1.")


@dataclass
class ContrastConfig:
    """Class token contrast: views and projection head (ToCo, Section 3.3)."""

    global_scale: list[float] = field(default_factory=lambda: [0.4, 1.0])
    local_crops: int = 8
    local_size: int = 96  # pixels
    temperature: float = 0.5
    momentum: float = 0.9
    negative_below: float = 0.2  # a local view with a lower mean of the region map is negative
    hidden: int = 2048
    bottleneck: int = 256
    outputs: int = 1024

    def __post_init__(self) -> None:
        _low_high("contrast.global_scale", self.global_scale)
        _require(
            min(self.local_crops, self.local_size) >= 1,
            "contrast.local_crops and local_size must be 1 or more.",
        )
        _fraction("contrast.momentum", self.momentum)


@dataclass
class ReinforceConfig:
    """Feature self-reinforcement (FSR, Sections 3.2 to 3.4)."""

    view_scale: list[float] = field(default_factory=lambda: [0.32, 1.0])  # share of the image in a view
    augmentation: str = "none"  # extra augmentation of the views: none, blur, solarise or autoaugment
    selection: str = (
        "loose"  # masked blocks: random, edge, strict (uncertain only) or loose (uncertain first)
    )
    mask_ratio: float = 0.4
    mask_block: int = 4  # side of a masked block, patches
    random_until: float = 0.2  # fraction of all steps with random blocks
    uncertain: list[float] = field(
        default_factory=lambda: [0.2, 0.7]
    )  # auxiliary CAM values called uncertain
    student_temperature: float = 0.1
    teacher_temperature: list[float] = field(default_factory=lambda: [0.04, 0.07])
    teacher_warmup: float = 0.125  # fraction of all steps over which the teacher temperature rises
    center_momentum: float = 0.9
    momentum: float = 0.9995  # teacher's EMA, rising to 1 on a cosine
    outputs: int = 4096

    def __post_init__(self) -> None:
        _choice("reinforce", "augmentation", self.augmentation, ("none", "blur", "solarise", "autoaugment"))
        _choice("reinforce", "selection", self.selection, ("random", "edge", "strict", "loose"))
        _require(0 <= self.mask_ratio < 1, "reinforce.mask_ratio must lie in 0..1 (1 excluded).")
        _low_high("reinforce.view_scale", self.view_scale)
        _low_high("reinforce.uncertain", self.uncertain)
        _positive("reinforce.teacher_temperature", self.teacher_temperature)
        _require(len(self.teacher_temperature) == 2, "reinforce.teacher_temperature must be [first, last].")
        _fraction("reinforce.center_momentum", self.center_momentum)
        _fraction("reinforce.momentum", self.momentum)


@dataclass
class OptimConfig:
    """AdamW and its learning-rate curve."""

    lr: float = 6e-5  # backbone
    head_lr_factor: float = 10.0  # classifiers, decoder and projection head
    weight_decay: float = 0.01
    decay_all: bool = True  # False: no decay on biases, norms, position, class and mask tokens
    warmup: float = 0.075  # fraction of all steps
    warmup_factor: float = 1e-6
    schedule: str = "poly"  # poly (power 0.9) or cosine to 0

    def __post_init__(self) -> None:
        _choice("optim", "schedule", self.schedule, ("poly", "cosine"))
        _require(0 < self.lr < math.inf, f"optim.lr is {self.lr}; it must be a positive number.")
        _require(0 <= self.warmup < 1, "optim.warmup is a fraction of all steps, 0..1 (1 excluded).")


@dataclass
class TrainConfig:
    """How long, where and how exactly."""

    steps: int = 20000
    seed: int = 0
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # fp32, bf16, or auto: bf16 where the hardware multiplies it natively
    compile: bool = False  # torch.compile the backbone
    checkpointing: bool = False  # recompute blocks in the backward pass: less memory, same numbers
    log_every: int = 20  # steps between history rows
    save_every: int = 500  # steps between checkpoints

    def __post_init__(self) -> None:
        _choice("train", "device", self.device, ("auto", "cpu", "cuda"))
        _choice("train", "precision", self.precision, ("auto", "fp32", "bf16"))
        _require(self.steps >= 1, "train.steps must be 1 or more.")
        _require(
            min(self.log_every, self.save_every) >= 1,
            "train.log_every and train.save_every must be 1 or more.",
        )


@dataclass
class EvalConfig:
    """Inference: raw uses scale 1; MS adds scales and mirror; CRF follows MS."""

    scales: list[float] = field(default_factory=lambda: [1.0, 1.25, 1.5])
    flip: bool = True
    batch: int = 16

    def __post_init__(self) -> None:
        _positive("eval.scales", self.scales)
        _require(self.batch >= 1, "eval.batch must be 1 or more.")


_NOT_TRAINED = {  # fields that leave the weights alone
    "data": ("root", "workers", "eval_size", "val_images", "val_split", "measured_train"),
    "affinity": ("strategy",),
    "cam": ("background",),
    "train": ("device", "checkpointing", "log_every", "save_every"),
}


@dataclass
class Recipe:
    """One run: data → network → affinity → CAM → losses → optimiser. Immutable by convention once loaded."""

    name: str = "shapes/toco"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    affinity: AffinityConfig = field(default_factory=AffinityConfig)
    cam: CamConfig = field(default_factory=CamConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def switch_step(self) -> int:
        """First step at which the segmentation and energy terms count (2000 of 20 000 in the paper)."""
        return round(self.losses.switch * self.train.steps)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up (1500 of 20 000 in the paper)."""
        return round(self.optim.warmup * self.train.steps)

    @property
    def self_reinforced(self) -> bool:
        """Whether a full-network teacher and masked views are needed (FSR)."""
        return self.losses.unc > 0 or self.losses.cer > 0

    def hash(self) -> str:
        """Ten hex digits that change whenever the trained result could (not for logging, loading or evaluation)."""
        content = asdict(self)
        content.pop("name"), content.pop("eval")
        if not self.self_reinforced and self.data.views != "fsr":
            content.pop("reinforce")
        if self.model.aggregator == "class_token":
            content["model"].pop("keep_class_token")
        for section, names in _NOT_TRAINED.items():
            for name in names:
                content[section].pop(name)
        if self.data.name == "folder":  # elsewhere the name says which data set it is
            content["data"]["root"] = self.data.root
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def _files(name: str) -> list[Path]:
    """The YAML files behind `data/method[/backbone]`, in merge order."""
    parts = name.split("/")
    if len(parts) not in (2, 3):
        raise UserError(f"recipe '{name}': write data/method or data/method/backbone, for example voc/ssepa.")
    files = []
    for kind, part in zip(("data", "method", "backbone"), parts, strict=False):
        path = RECIPES / kind / f"{part}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in (RECIPES / kind).glob("*.yaml")))
            raise UserError(f"recipe '{name}': there is no {kind} '{part}'; choose one of {known}.")
        files.append(path)
    return files


def _read(path: Path) -> DictConfig:
    """The settings of one YAML file."""
    if not path.is_file():
        raise UserError(f"recipe file {path} does not exist; pass data/method or an existing YAML file.")
    try:
        content = OmegaConf.load(path)
    except Exception as error:  # of the reader's several libraries
        reason = " ".join(str(error).split())
        raise UserError(f"recipe file {path} cannot be read ({reason}); correct it, in UTF-8.") from error
    if not isinstance(content, DictConfig):
        raise UserError(
            f"recipe file {path} holds a list; write sections with settings, like `train: {{steps: 5}}`."
        )
    return content


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Compose a recipe.

    Args:
        name: `data/method`, `data/method/backbone` (files under `recipes/`), or the path of a full YAML recipe.
        overrides: dotted keys, for example `{"train.steps": 500, "data.root": "/voc"}`.

    Raises:
        UserError: an unknown name or key, a broken file, a value of the wrong type or out of range, or settings that
            contradict each other.
    """
    files = [Path(name)] if name.endswith((".yaml", ".yml")) else _files(name)
    config = OmegaConf.structured(Recipe)
    config.name = name
    for source in files + [overrides or {}]:
        where = source.name if isinstance(source, Path) else "override"
        try:
            if isinstance(source, Path):
                config = OmegaConf.merge(config, _read(source))
            else:
                for key, value in source.items():
                    OmegaConf.update(config, key, value, merge=True, force_add=False)
        except OmegaConfBaseException as error:
            reason = f"key '{getattr(error, 'full_key', None) or ''}': {str(error).splitlines()[0]}"
            remedy = f"see `python -m ssepa_lib recipe {name}`"
            raise UserError(f"recipe '{name}' ({where}): {reason}; {remedy}.") from error
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(f"recipe '{name}': {str(error).splitlines()[0]}.") from error


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML; `load_recipe(str(path))` reads it back unchanged."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(recipe)))
