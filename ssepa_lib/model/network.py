"""The network: backbone, main and auxiliary classifier, decoder and, where the recipe asks for it, HAAF.

Source: ToCo (CVPR 2023), Section 3.1 and its Appendix; SS-EPA, Figure 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssepa_lib.model.affinity import HAAF, PatchAffinity
from ssepa_lib.model.aggregator import ClassAggregator, pool_class
from ssepa_lib.model.backbone import Backbone
from ssepa_lib.recipe import OptimConfig, Recipe


@dataclass
class NetworkOutput:
    """Everything one forward pass gives. B images, C classes, N = h·w patches, D width, K layers."""

    scores: Tensor  # [B, C] main classifier on the globally max-pooled final tokens
    aux_scores: Tensor  # [B, C] the same on the auxiliary tokens
    cam: Tensor  # [B, C, h, w] main classifier on every token, before ReLU, no gradient
    aux_cam: Tensor  # [B, C, h, w]
    patches: Tensor  # [B, N, D] final tokens
    aux: Tensor  # [B, N, D] tokens of the auxiliary block
    cls: Tensor  # [B, D] class token, or the aggregator's
    grid: tuple[int, int]  # h, w
    segmentation: Tensor | None  # [B, C+1, h, w] logits; None when not asked for
    affinity: PatchAffinity | None  # None when not asked for


class LargeFOV(nn.Module):
    """Segmentation decoder of DeepLab-LargeFOV: two 3×3 convolutions with dilation 5 and a 1×1 classifier, no biases.

    Shape: [B, D, h, w] → [B, C+1, h, w].
    """

    def __init__(self, width: int, classes: int, hidden: int = 512):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, hidden, 3, padding=5, dilation=5, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=5, dilation=5, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, classes + 1, 1, bias=False),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ProjectionHead(nn.Module):
    """DINO head: three-layer perceptron, L2 normalisation, linear layer whose rows have length one.

    Shape: [..., D] → [..., outputs].
    """

    def __init__(self, width: int, hidden: int = 2048, bottleneck: int = 256, outputs: int = 1024):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = nn.Parameter(
            torch.empty(outputs, bottleneck).uniform_(-(bottleneck**-0.5), bottleneck**-0.5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.last, dim=-1))


class Network(nn.Module):
    """Image → scores, class activation maps, segmentation and, when asked, the patch affinity."""

    def __init__(self, recipe: Recipe, classes: Sequence[str]):
        super().__init__()
        self.classes = tuple(classes)
        self.affinity_config = recipe.affinity
        self.aggregation = recipe.model.aggregator
        self.backbone = Backbone(recipe.model, checkpointing=recipe.train.checkpointing)
        self.backbone.mask_token.requires_grad_(recipe.self_reinforced)
        width, number = self.backbone.width, len(self.classes)
        self.classifier = nn.Linear(width, number, bias=False)
        self.aux_classifier = nn.Linear(width, number, bias=False)
        self.decoder = LargeFOV(width, number)
        self.aggregator = ClassAggregator(width, self.backbone.heads) if self.aggregation == "mca" else None
        self.haaf = (
            HAAF(self.backbone.depth, recipe.affinity.hidden) if recipe.affinity.kind == "haaf" else None
        )
        if self.haaf is not None and recipe.affinity.supervision == "none":
            self.haaf.requires_grad_(False)  # the control: v' stays all ones

    def forward(
        self, image: Tensor, *, segment: bool = True, affinity: bool = False, mask: Tensor | None = None
    ) -> NetworkOutput:
        """Run the network.

        Args:
            image: [B, 3, H, W], 0..255.
            segment: run the decoder.
            affinity: return the patch affinity operator (detached).
            mask: bool [B, N], patches hidden behind the mask token.
        """
        tokens = self.backbone(image, capture=affinity, mask=mask)
        patches, cls = tokens.patches, tokens.cls
        if self.aggregation == "mca":
            cls = self.aggregator(patches)
        elif cls is None or self.aggregation != "class_token":
            cls = pool_class(patches, self.aggregation if self.aggregation != "class_token" else "gap")
        h, w = tokens.grid
        as_map = lambda x: x.transpose(1, 2).unflatten(2, (h, w))  # [B, N, X] → [B, X, h, w]  # noqa: E731
        # scores before maps: autocast keeps the first cast of a weight, which must be one with a gradient
        scores, aux_scores = self.classifier(patches.amax(1)), self.aux_classifier(tokens.aux.amax(1))
        with torch.no_grad():
            cam, aux_cam = as_map(self.classifier(patches)), as_map(self.aux_classifier(tokens.aux))
        return NetworkOutput(
            scores=scores,
            aux_scores=aux_scores,
            cam=cam.float(),
            aux_cam=aux_cam.float(),
            patches=patches,
            aux=tokens.aux,
            cls=cls,
            grid=(h, w),
            segmentation=self.decoder(as_map(patches)) if segment else None,
            affinity=self.patch_affinity(tokens.queries, tokens.keys, tokens.prefix) if affinity else None,
        )

    def patch_affinity(self, queries: list[Tensor], keys: list[Tensor], prefix: int) -> PatchAffinity:
        """The recipe's affinity over captured queries and keys; without one, the uniform mean (for viewing)."""
        a = self.affinity_config
        return PatchAffinity(
            queries,
            keys,
            prefix,
            weigh=self.haaf,
            source=a.source,
            strategy=a.strategy,
            descriptor=a.descriptor,
            steps=a.steps,
        )

    def parameter_groups(self, optim: OptimConfig, haaf_lr: float) -> list[dict]:
        """Groups for the optimiser: backbone at `lr`, what is on top at `lr·head_lr_factor`, HAAF at its own rate."""
        rates = {"backbone": optim.lr, "haaf": haaf_lr}
        groups = []
        for name, module in self.named_children():
            groups += optimiser_groups(module, rates.get(name, optim.lr * optim.head_lr_factor), optim)
        return groups


def optimiser_groups(module: nn.Module, lr: float, optim: OptimConfig) -> list[dict]:
    """A module's trainable parameters as optimiser groups: with weight decay and, unless `decay_all`, without it.

    Spared are biases, norms, and position, class and mask tokens (FSR).
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
    """Evaluation mode for a while; afterwards the mode that was, also after an error."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def build_network(recipe: Recipe, classes: Sequence[str]) -> Network:
    """The network of a recipe with its pre-trained backbone; the heads are initialised from `train.seed`."""
    torch.manual_seed(recipe.train.seed)
    return Network(recipe, classes)
