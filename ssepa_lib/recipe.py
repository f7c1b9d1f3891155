"""A recipe: everything that distinguishes one run from another, checked before anything is computed.

`Recipe` and its sections are frozen: `dataclasses.replace` makes a checked copy.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import field, fields
from typing import Annotated, Any

from pydantic.dataclasses import dataclass

from ssepa_lib.errors import UserError
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


_BACKBONE_ONLY = {  # settings without a purpose once the backbone is frozen
    "losses": ("ptc", "ctc", "unc", "cer"),
    "cam": ("teacher_momentum",),
    "model": ("train_pos_embed", "drop_path"),
}


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

    def __post_init__(self) -> None:
        losses, kind = self.losses, self.affinity.kind
        if (losses.aff > 0) != (kind == "learned"):
            raise UserError(
                f"losses.aff is {losses.aff:g} and affinity.kind {kind}: the pairs train affinity.kind "
                "learned and nothing else; use both or neither."
            )
        self._require_trained_sources()
        if self.contrast.views == "masked" and (losses.ctc == 0 or self.model.aggregator != "class_token"):
            raise UserError(
                "contrast.views masked needs losses.ctc above 0 and model.aggregator class_token: it "
                "contrasts the backbone's own class tokens."
            )
        if self.model.freeze:
            self._require_frozen()

    def _require_trained_sources(self) -> None:
        """Refuse terms and labels that read what no term trains."""
        losses, objective = self.losses, self.affinity.haaf_objective
        chosen = self.reinforce.selection in ("loose", "strict")
        readers = {
            "losses.ptc": losses.ptc > 0,
            "losses.ctc": losses.ctc > 0,
            "losses.unc": losses.unc > 0,
            "losses.cer": losses.cer > 0 and chosen,
            "cam.main_from": self.cam.main_from > losses.segmentation_start,
            f"affinity.haaf_objective {objective}": objective in ("affinity", "pooling", "variance"),
        }
        reading = [name for name, reads in readers.items() if reads]
        if losses.aux_cls == 0 and reading:
            raise UserError(
                f"losses.aux_cls is 0, so the auxiliary CAM is not trained, but {' and '.join(reading)} "
                f"{'reads' if len(reading) == 1 else 'read'} it; set losses.aux_cls above 0, or do without."
            )
        if losses.seg == 0 and objective == "decoder":
            raise UserError(
                "affinity.haaf_objective decoder follows the decoder, which losses.seg 0 leaves untrained; "
                "set losses.seg above 0 or choose another objective."
            )
        if self.affinity.kind == "learned" and self.affinity.start <= losses.segmentation_start < 1:
            raise UserError(
                f"affinity.start is {self.affinity.start:g} and losses.segmentation_start "
                f"{losses.segmentation_start:g}, so the learned affinity would be used before it is trained; "
                "set affinity.start above losses.segmentation_start."
            )

    def _require_frozen(self) -> None:
        """Refuse settings that train the backbone, or heads that serve its training alone."""
        for section, names in _BACKBONE_ONLY.items():
            for name in names:
                value = getattr(getattr(self, section), name)
                if value:
                    off = "false" if value is True else "0"
                    raise UserError(
                        f"model.freeze is true, but {section}.{name} trains the backbone; set "
                        f"{section}.{name} to {off} (the method frozen does so, as in voc/ssepa_plus+frozen) "
                        "or model.freeze to false."
                    )

    @property
    def segmentation_step(self) -> int:
        """First step at which the segmentation and energy terms count (2000 of 20 000 in the paper)."""
        return round(self.losses.segmentation_start * self.train.steps)

    @property
    def affinity_step(self) -> int:
        """First step whose pseudo-labels use the affinity; the learned one is trained beforehand (AFA)."""
        learned = self.affinity.kind == "learned"
        start = round(self.affinity.start * self.train.steps) if learned else 0
        return max(self.segmentation_step, start)

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
        for section, name in self._idle():
            content.get(section, {}).pop(name, None)
        if self.data.name == "folder":  # elsewhere the name says which dataset it is
            content["data"]["root"] = self.data.root
        return {section: settings for section, settings in content.items() if settings}

    def _idle(self) -> Iterator[tuple[str, str]]:
        """Settings that do nothing in this recipe, as (section, name)."""
        if self.model.aggregator == "class_token":
            yield "model", "keep_class_token"
        if self.data.views == "fsr":  # whose views have no padding
            yield "losses", "ptc_padding"
        if self.affinity.kind != "haaf":
            haaf = ("descriptor", "pooling", "hidden", "haaf_weight", "haaf_lr")
            yield from (("affinity", name) for name in haaf)
        if self.affinity.kind == "learned":
            yield "affinity", "attention"
        else:
            yield from (("affinity", name) for name in ("blocks", "radius", "start"))
        masked = ("mask_share", "mask_block", "mask_empty", "main_from")
        idle = masked if self.contrast.views == "crops" else ("local_size",)
        yield from (("contrast", name) for name in idle)
        if self.optim.schedule != "poly":
            yield "optim", "power"

    def hash(self) -> str:
        """Ten hex digits of the identity: they change whenever the trained weights could."""
        text = json.dumps(self.identity(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:10]
