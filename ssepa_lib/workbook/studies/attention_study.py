"""Numbers about every head over a dataset, what averaging heads blurs and steadies, and attention rollout."""

import pandas as pd
import torch
from torch import Tensor

from ssepa_lib.data import IGNORE, SegmentationDataset
from ssepa_lib.evaluation.attention import (
    deep_summary,
    head_disagreement,
    head_similarity,
    layer_maps,
    noise_robustness,
    object_share,
)
from ssepa_lib.evaluation.maps import patch_ids
from ssepa_lib.model import Attention, Network
from ssepa_lib.recipe import Recipe
from ssepa_lib.workbook.study import samples

QUANTITIES = ("entropy", "distance", "class_mass", "own_object")  # of a head or, as a mean, of a layer


@torch.no_grad()
def head_blur(network: Network, recipe: Recipe, dataset: SegmentationDataset) -> pd.Series:
    """`head_disagreement` of every layer in nats, mean over the images; index layer from 0."""
    images = samples(dataset, range(len(dataset)), recipe.data.eval_size or recipe.data.crop)[0]
    total = torch.zeros(network.backbone.depth, dtype=torch.double)
    for image in images.to(network.classifier.weight.device).split(1):
        attention = network.backbone(image, capture=True).attention
        for layer in range(attention.depth):
            total[layer] += head_disagreement(next(layer_maps(attention, layer))).cpu()
    return pd.Series((total / len(dataset)).tolist(), name="head disagreement, nats")


@torch.no_grad()
def head_average(
    network: Network, recipe: Recipe, dataset: SegmentationDataset, size: float = 0.2, seed: int = 0
) -> pd.DataFrame:
    """How alike the heads of every layer are, and how far noise moves the map that they refine.

    The map is the CAM of the classes that an image shows; images without a class are left out.

    Args:
        size: of the noise; see `noise_robustness`.
        seed: of the noise.

    Returns:
        One row per layer, median over the images: layer, `similarity` (see `head_similarity`) and the columns
        of `relative_changes`.
    """
    side, device = recipe.data.eval_size or recipe.data.crop, network.classifier.weight.device
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(len(dataset)):
        pixels, labels, _ = samples(dataset, [index], side)
        if not labels[0].any():
            continue
        output = network(pixels.to(device), segment=False, capture=True)
        cam = output.cam[0, labels[0].bool().to(device)].relu().flatten(1).T  # [N, C present]
        first = output.attention.num_prefix_tokens
        for layer in range(output.attention.depth):
            logits = output.attention.layer_map(layer, probabilities=False)[0]  # [H, T, T]
            moved = noise_robustness(logits, cam, size, num_prefix_tokens=first, generator=draw)
            rows.append({"layer": layer, "similarity": float(head_similarity(logits.softmax(-1)))} | moved)
    return pd.DataFrame(rows).groupby("layer", as_index=False).median()


@torch.no_grad()
def own_object_shares(network: Network, recipe: Recipe, dataset: SegmentationDataset) -> pd.DataFrame:
    """`object_share` of every head, mean over the images that show an object.

    Returns:
        Columns layer, head, own_object (0..1) and chance, the share of the patches that the objects of the
        shown class cover: what a head would reach that looks at random.
    """
    side, device = recipe.data.eval_size or recipe.data.crop, network.classifier.weight.device
    found, chances = [], []
    for index in range(len(dataset)):
        pixels, _, masks = samples(dataset, [index], side)
        attention = network.backbone(pixels.to(device), capture=True).attention
        objects = patch_ids(masks[0], attention.grid).flatten().to(device)  # [N]
        objects = objects.masked_fill(objects == IGNORE, 0)
        if not (objects > 0).any():
            continue
        first = attention.num_prefix_tokens
        maps = (next(layer_maps(attention, layer)) for layer in range(attention.depth))
        found.append(torch.stack([object_share(m[:, first:, first:], objects) for m in maps]))  # [K, H]
        uniform = torch.ones(len(objects), len(objects), device=device)
        chances.append(float(object_share(uniform, objects)))
    mean = torch.stack(found).double().mean(0).cpu()
    rows = [(k, h, float(value)) for k, heads in enumerate(mean) for h, value in enumerate(heads)]
    table = pd.DataFrame(rows, columns=["layer", "head", "own_object"])
    return table.assign(chance=sum(chances) / len(chances))


def rollout(attention: Attention) -> Tensor:
    """Attention rollout: the product of (A + I)/2 over the layers, A the head mean; [B, N, N].

    How much of each patch's token would come from which patch if every layer only mixed tokens (Abnar and
    Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020). The class token takes part on the way;
    its row and column are dropped at the end.
    """
    product = None
    for layer in range(attention.depth):
        mean = attention.layer_map(layer).mean(1)  # [B, T, T]
        step = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
        product = step if product is None else step @ product
    first = attention.num_prefix_tokens
    return product[:, first:, first:]


def paired_claim(deep: pd.DataFrame, changed: str, base: str) -> pd.DataFrame:
    """What a run has more than another in its deep layers, seed by seed.

    Args:
        deep: columns run, seed, entropy and entropy_spread; see `deep_summary`.

    Returns:
        One row per common seed: differences `entropy` and `entropy_spread`, nats.
    """
    values = ["entropy", "entropy_spread"]
    one, other = (deep[deep["run"] == name].set_index("seed")[values] for name in (changed, base))
    return (one - other).dropna()


def deep_table(measured: dict[tuple[str, int], pd.DataFrame]) -> pd.DataFrame:
    """`deep_summary` of several tables of `attention_statistics`, keyed by (run, seed): one row each."""
    return pd.DataFrame(
        [{"run": run, "seed": seed} | deep_summary(t).to_dict() for (run, seed), t in measured.items()]
    )
