"""A recipe: everything that distinguishes one run from another, checked before anything is computed.

`Recipe` and its sections are frozen: `dataclasses.replace` makes a checked copy.
"""

import hashlib
import json
from dataclasses import field, fields
from typing import Annotated, Any

from pydantic.dataclasses import dataclass

from ssepa_lib.fields import CONFIG, NotTrained, Section
from ssepa_lib.settings import HAAF_OBJECTIVES, AffinityConfig, CamConfig, DataConfig, ModelConfig
from ssepa_lib.train_settings import (
    ContrastConfig,
    EvalConfig,
    LossConfig,
    OptimConfig,
    ReinforceConfig,
    TrainConfig,
)

__all__ = [
    "HAAF_OBJECTIVES",
    "Recipe",
    "AffinityConfig",
    "CamConfig",
    "ContrastConfig",
    "DataConfig",
    "EvalConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ReinforceConfig",
    "TrainConfig",
]


@dataclass(frozen=True, config=CONFIG)
class Recipe(Section):
    """One run: data → network → affinity → CAM → losses → optimiser."""

    name: Annotated[str, NotTrained] = "shapes/toco"
    """data/method[/backbone], as typed, or the path of the file it was read from."""
    title: Annotated[str, NotTrained] = ""
    """The method's display name."""
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
    def segmentation_step(self) -> int:
        """First step at which the segmentation and energy terms count (2000 of 20 000 in the paper)."""
        return round(self.losses.segmentation_start * self.train.steps)

    @property
    def contrast_step(self) -> int:
        """First step at which the contrast terms count (0 in the papers but for ToCo on COCO)."""
        return round(self.losses.contrast_start * self.train.steps)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up (1500 of 20 000 in the paper)."""
        return round(self.optim.warmup * self.train.steps)

    @property
    def self_reinforced(self) -> bool:
        """Whether a full-network teacher and masked views are needed (FSR)."""
        return self.losses.unc > 0 or self.losses.cer > 0

    def identity(self) -> dict[str, Any]:
        """What the weights depend on: the settings of the acting parts that differ from their defaults."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        content = {k: v.identity() for k, v in content.items() if isinstance(v, Section) and k != "eval"}
        from_fsr = self.data.views == "fsr"
        if not self.self_reinforced and not from_fsr:
            content.pop("reinforce")
        if not self.self_reinforced and self.losses.ctc == 0:  # FSR's projector has the shape of this one
            content.pop("contrast")
        if self.affinity.kind == "none":
            content.pop("affinity")
        if self.model.aggregator == "class_token":
            content["model"].pop("keep_class_token", None)
        if from_fsr:  # whose views have no padding
            content["losses"].pop("ptc_padding", None)
        if self.data.name == "folder":  # elsewhere the name says which dataset it is
            content["data"]["root"] = self.data.root
        return {section: settings for section, settings in content.items() if settings}

    def hash(self) -> str:
        """Ten hex digits of the identity: they change whenever the trained weights could."""
        text = json.dumps(self.identity(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:10]
