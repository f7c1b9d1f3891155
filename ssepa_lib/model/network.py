"""The network: backbone, both classifiers, decoder and, where the recipe asks, HAAF or AFA's affinity.

Source: ToCo (CVPR 2023), Section 3.1 and its appendix; SS-EPA, Figure 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssepa_lib.errors import UserError
from ssepa_lib.model.affinity import HAAF, Attention
from ssepa_lib.model.backbone import Backbone, build_backbone
from ssepa_lib.model.heads import ClassAggregator, LargeFOV, pool_class
from ssepa_lib.model.learned_affinity import AffinityHead
from ssepa_lib.randomness import seeded
from ssepa_lib.recipe import OptimConfig, Recipe


@dataclass
class NetworkOutput:
    """Everything that one forward pass gives. B images, C classes, N = h·w patches, D width."""

    scores: Tensor  # [B, C] main classifier on the globally max-pooled final tokens
    aux_scores: Tensor  # [B, C] the same on the auxiliary tokens
    cam: Tensor  # [B, C, h, w] main classifier on every token, before ReLU, no gradient
    aux_cam: Tensor  # [B, C, h, w]
    patches: Tensor  # [B, N, D] final tokens
    aux: Tensor  # [B, N, A] tokens of the auxiliary block
    cls: Tensor  # [B, D] class token, or the aggregator's
    grid: tuple[int, int]  # h, w
    segmentation: Tensor | None  # [B, C+1, h, w] logits; None when not asked for
    attention: Attention | None  # queries and keys of every layer; None when not asked for


def as_maps(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, N, X] on their grid: [B, X, h, w]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


class Network(nn.Module):
    """Image → scores, class activation maps, segmentation and, when asked, attention."""

    def __init__(self, recipe: Recipe, classes: Sequence[str]):
        super().__init__()
        self.classes = tuple(classes)
        self.aggregation = recipe.model.aggregator
        affinity, learned = recipe.affinity, recipe.affinity.kind == "learned"
        attached = affinity.blocks if learned else 0
        checkpointing = recipe.train.checkpointing
        self.backbone = build_backbone(recipe.model, checkpointing=checkpointing, attached=attached)
        self.backbone.mask_token.requires_grad_(recipe.self_reinforced)
        if recipe.model.freeze:
            self.backbone.freeze()
        width, number = self.backbone.width, len(self.classes)
        self.classifier = nn.Linear(width, number, bias=False)
        self.aux_classifier = nn.Linear(self.backbone.aux_width, number, bias=False)
        self.decoder = LargeFOV(width, number)
        self.aggregator = ClassAggregator(width, self.backbone.heads) if self.aggregation == "mca" else None
        layers = self.backbone.depth
        signed = affinity.attention == "logits"
        self.haaf = HAAF(layers, affinity.hidden, signed=signed) if affinity.kind == "haaf" else None
        if self.haaf is not None and recipe.affinity.haaf_objective == "none":
            self.haaf.requires_grad_(False)  # the control: v' stays all ones
        self.affinity_head = self._affinity_head(recipe) if learned else None
        self._check_sizes(recipe)

    def _check_sizes(self, recipe: Recipe) -> None:
        """Refuse images that would have less than a patch, before the first of them is met."""
        data, smallest, patch = recipe.data, min(recipe.cam.scales), self.backbone.smallest
        sides = {"data.crop": data.crop, "the smallest of cam.scales times data.crop": smallest * data.crop}
        if data.eval_size:
            sides["data.eval_size"] = data.eval_size
            sides["the smallest of eval.scales times data.eval_size"] = (
                min(recipe.eval.scales) * data.eval_size
            )
        if recipe.losses.ctc > 0 and recipe.contrast.views == "crops":
            sides["contrast.local_size"] = recipe.contrast.local_size
        for name, side in sides.items():
            if side < patch:
                raise UserError(f"{name} is {side:g} pixels, less than a patch of {patch}; use a larger one.")

    def _affinity_head(self, recipe: Recipe) -> AffinityHead:
        """The layer of the learned affinity; its reach is counted in patches of the training crop."""
        config, backbone = recipe.affinity, self.backbone
        if not isinstance(backbone, Backbone):
            raise UserError(
                "affinity.kind learned needs a plain ViT; choose another model.backbone, or affinity.kind "
                "mean or haaf."
            )
        if config.blocks > backbone.depth:
            raise UserError(
                f"affinity.blocks is {config.blocks}, but the backbone has only {backbone.depth} blocks; "
                "set it to that number or less."
            )
        side = max(backbone.grid(recipe.data.crop, recipe.data.crop))
        return AffinityHead(backbone.heads, config.blocks, max(1, round(config.radius * side)))

    def forward(
        self, image: Tensor, *, segment: bool = True, capture: bool = False, mask: Tensor | None = None
    ) -> NetworkOutput:
        """Run the network.

        Args:
            image: [B, 3, H, W], 0..255.
            segment: run the decoder.
            capture: return the attention of every layer (detached but for the blocks of a learned affinity).
            mask: bool [B, N], patches hidden behind the mask token.
        """
        tokens = self.backbone(image, capture=capture, mask=mask)
        patches, grid = tokens.patches, tokens.grid
        # scores before maps: autocast keeps the first cast of a weight, which must be one with a gradient
        scores = self.classifier(patches.amax(1))  # [B, C]
        aux_scores = self.aux_classifier(tokens.aux.amax(1))
        with torch.no_grad():
            cam = as_maps(self.classifier(patches), grid)  # [B, C, h, w]
            aux_cam = as_maps(self.aux_classifier(tokens.aux), grid)
        return NetworkOutput(
            scores=scores,
            aux_scores=aux_scores,
            cam=cam.float(),
            aux_cam=aux_cam.float(),
            patches=patches,
            aux=tokens.aux,
            cls=self._class_token(patches, tokens.cls),
            grid=grid,
            segmentation=self.decoder(as_maps(patches, grid)) if segment else None,
            attention=tokens.attention,
        )

    def _class_token(self, patches: Tensor, own: Tensor | None) -> Tensor:
        """The class token [B, D]: the backbone's own, or one gathered or pooled from the patches."""
        if self.aggregation == "mca":
            return self.aggregator(patches)
        if self.aggregation == "class_token":
            return pool_class(patches, "gap") if own is None else own
        return pool_class(patches, self.aggregation)

    def parameter_groups(self, optim: OptimConfig, haaf_lr: float) -> list[dict]:
        """Groups for the optimiser: backbone at `lr`, heads at `lr·head_lr_factor`, HAAF at its own rate."""
        heads = optim.lr * optim.head_lr_factor
        classifiers = dict.fromkeys(("classifier", "aux_classifier"), heads * optim.classifier_lr_factor)
        rates = {"backbone": optim.lr, "haaf": haaf_lr} | classifiers
        groups = []
        for name, module in self.named_children():
            groups += optimiser_groups(module, rates.get(name, heads), optim)
        return groups


def optimiser_groups(module: nn.Module, lr: float, optim: OptimConfig) -> list[dict]:
    """A module's trainable parameters as optimiser groups: with weight decay and, unless `decay_all`, without
    it.

    Biases, norms, and position, class and mask tokens are spared (FSR).
    """
    decayed, spared = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            token = name.rsplit(".", 1)[-1] in ("pos_embed", "cls_token", "reg_token", "mask_token")
            plain = not optim.decay_all and (parameter.ndim < 2 or token)
            (spared if plain else decayed).append(parameter)
    groups = ((decayed, optim.weight_decay), (spared, 0.0))
    return [{"params": params, "lr": lr, "weight_decay": decay} for params, decay in groups if params]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards the previous mode, also after an error."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def build_network(recipe: Recipe, classes: Sequence[str]) -> Network:
    """The network of a recipe with its pre-trained backbone; the heads are initialised from `train.seed`."""
    with seeded("network", recipe.train.seed):
        return Network(recipe, classes)
