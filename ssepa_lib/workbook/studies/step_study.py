"""One training step under the magnifying glass: which term moves which part, and how recipes differ."""

from collections.abc import Mapping
from dataclasses import fields

import pandas as pd
import torch
from torch import Tensor, nn

from ssepa_lib.fields import Section, info
from ssepa_lib.labels import PseudoLabeler
from ssepa_lib.labels.cam import Cams
from ssepa_lib.recipe import Recipe
from ssepa_lib.training import Trainer


def parts_of(trainer: Trainer) -> dict[str, nn.Module]:
    """The parts of a trainer that learn: the backbone up to and after the auxiliary block, and every head."""
    network = trainer.network
    blocks, split = nn.ModuleList(network.backbone.blocks), network.backbone.aux_block + 1
    found: dict[str, nn.Module] = {
        f"ViT, blocks 0 to {split - 1}": blocks[:split],
        f"ViT, blocks {split} to {len(blocks) - 1}": blocks[split:],
        "classifier": network.classifier,
        "auxiliary classifier": network.aux_classifier,
        "decoder": network.decoder,
    }
    if network.haaf is not None:
        found["HAAF"] = network.haaf
    if network.aggregator is not None:
        found["aggregator"] = network.aggregator
    heads = {type(part).__name__: part for part in trainer.objectives}
    if "ClassTokenContrast" in heads:
        found["projection head"] = heads["ClassTokenContrast"].student
    if "SelfReinforcement" in heads:
        found["projector"] = heads["SelfReinforcement"].projector
    return found


def gradient_norms(
    terms: Mapping[str, Tensor], parts: Mapping[str, nn.Module], weights: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """The length of every term's gradient in every part; NaN where no gradient arrives.

    Args:
        terms: name → scalar with a graph; the graph stays.
        parts: name → module.
        weights: name of a term → its weight in the total loss; None: all 1.

    Returns:
        One row per term, one column per part.
    """
    rows = {}
    for name, value in terms.items():
        scaled = value * (1.0 if weights is None else weights[name])
        rows[name] = {part: _norm(scaled, module) for part, module in parts.items()}
    return pd.DataFrame.from_dict(rows, orient="index")[list(parts)]


def _norm(value: Tensor, module: nn.Module) -> float:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters or not value.requires_grad:
        return float("nan")
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    squares = [g.detach().float().square().sum() for g in found if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else float("nan")


def differences(recipes: Mapping[str, Recipe]) -> pd.DataFrame:
    """The settings that are not the same in all recipes.

    Returns:
        One row per setting (`section.name`), one column per recipe, and `meaning`, the setting's own
        description.
    """
    rows = {}
    for section in fields(Recipe):
        if not all(isinstance(getattr(recipe, section.name), Section) for recipe in recipes.values()):
            continue
        kind = type(getattr(next(iter(recipes.values())), section.name))
        for item in fields(kind):
            chosen = {name: str(getattr(getattr(r, section.name), item.name)) for name, r in recipes.items()}
            if len(set(chosen.values())) > 1:
                rows[f"{section.name}.{item.name}"] = chosen | {
                    "meaning": info(kind, item.name).description or ""
                }
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*recipes, "meaning"])


@torch.no_grad()
def labels_of(recipe: Recipe, images: Tensor, labels: Tensor, cams: Cams) -> Tensor:
    """The training pseudo-label of the first image, [S, S]: class ids, 255 where it is undecided.

    Args:
        images: [n, 3, S, S], 0..255, without padding; labels: [n, C].
        cams: their maps.
    """
    size = images.shape[-2:]
    box = torch.tensor([[0, size[0], 0, size[1]]] * len(images), device=images.device)
    labeler = PseudoLabeler(recipe.cam).to(images.device)
    return labeler.training_labels(images, cams.for_labels, labels, box, cams.spread)[0]
