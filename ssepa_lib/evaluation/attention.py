"""What attention does in every layer: entropy, distance, similarity of the heads, robustness to noise.

Statistics stream over a dataset: queries and keys of one batch are kept, maps exist for one layer of one
image at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssepa_lib.errors import UserError
from ssepa_lib.model.affinity import Attention
from ssepa_lib.model.backbone import Backbone
from ssepa_lib.model.network import Network, evaluating

if TYPE_CHECKING:
    import pandas as pd


def attention_entropy(attention: Tensor) -> Tensor:
    """Shannon entropy −Σ p log p of every query's distribution over keys, in nats. [..., T, T] → [..., T].

    Between 0 (one key) and log T (all keys alike).
    """
    return torch.special.entr(attention).sum(-1)


def patch_distances(grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Distances between patch centres in pixels, [N, N], for h·w patches of `patch_size` (height, width)."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    centres = torch.stack([rows.flatten() * patch_size[0], columns.flatten() * patch_size[1]], 1)
    return torch.cdist(centres, centres)


def map_statistics(attention: Tensor, distances: Tensor, num_prefix_tokens: int) -> Tensor:
    """Entropy, attention distance and class mass of every head of one map.

    Args:
        attention: [H, P+N, P+N], rows sum to one.
        distances: [N, N], pixels.
        num_prefix_tokens: P; the first one is the class token.

    Returns:
        [H, 3]: entropy in nats, mean over all queries; distance in pixels between a patch and the patches
        it attends to, weighted by the attention among patches; probability that patches give to the class
        token (NaN if P = 0).
    """
    p = num_prefix_tokens
    patches = attention[:, p:, p:]  # [H, N, N]
    among = patches.sum(-1).clamp_min(1e-12)  # what is left for patches beside the prefix tokens
    distance = ((patches * distances).sum(-1) / among).mean(-1)
    mass = attention[:, p:, 0].mean(-1) if p else torch.full_like(distance, torch.nan)
    return torch.stack([attention_entropy(attention).mean(-1), distance, mass], -1)


def layer_maps(attention: Attention, layer: int) -> Iterator[Tensor]:
    """Attention maps of one layer, image by image: B times [H, P+N, P+N], float32."""
    for image in range(len(attention.queries[layer])):
        yield attention[image : image + 1].layer_map(layer)[0]


@torch.no_grad()
def attention_statistics(
    network: Network, batches: Iterable[Tensor], device: torch.device | str
) -> pd.DataFrame:
    """Attention statistics per layer and head, mean over all images; `.to_csv(path, index=False)` saves them.

    Args:
        network: only its backbone is run, in evaluation mode.
        batches: images [B, 3, H, W], 0..255; sizes may differ between batches.
        device: where to run.

    Returns:
        Columns layer (from 0), head (from 0), entropy (nats), distance (pixels), class_mass (0..1, NaN
        without a class token), images; see `map_statistics`.

    Raises:
        UserError: there is no image.
    """
    import pandas as pd  # here, so that looking at attention does not need it

    images, total = 0, None
    with evaluating(network):
        for batch in batches:
            attention = network.backbone(batch.to(device), capture=True).attention
            distances = patch_distances(attention.grid, network.backbone.patch_size).to(device)
            maps = [layer_maps(attention, layer) for layer in range(attention.depth)]
            sums = [
                sum(map_statistics(m, distances, attention.num_prefix_tokens) for m in layer).double().cpu()
                for layer in maps
            ]  # K times [H, 3]
            total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
            images += len(batch)
    if total is None:
        raise UserError("attention statistics need at least one image; the dataset is empty.")
    mean = [(layer / images).tolist() for layer in total]
    rows = [
        (layer, head, *values, images)
        for layer, heads in enumerate(mean)
        for head, values in enumerate(heads)
    ]
    return pd.DataFrame(rows, columns=["layer", "head", "entropy", "distance", "class_mass", "images"])


def deep_layers(depth: int) -> list[int]:
    """The last 40 % of the layers, counted from 0: 7 to 11 of 12, as in FSR's entropy analysis."""
    return list(range(depth - round(0.4 * depth), depth))


def deep_summary(statistics: pd.DataFrame) -> pd.Series:
    """Deep-layer mean and spread of a table from `attention_statistics`.

    Spread is the standard deviation between the heads of a layer, mean over the deep layers: what FSR
    claims, deep layers "higher and tighter" with unc.FSR, is a larger `entropy` and a smaller
    `entropy_spread`.
    """
    import pandas as pd

    layers = deep_layers(int(statistics["layer"].max()) + 1)
    by_layer = statistics[statistics["layer"].isin(layers)].groupby("layer")[
        ["entropy", "distance", "class_mass"]
    ]
    spread = by_layer.std(ddof=0).mean().add_suffix("_spread")
    return pd.concat(
        [by_layer.mean().mean(), spread, pd.Series({"first_layer": layers[0], "last_layer": layers[-1]})]
    )


@torch.no_grad()
def class_attention(network: Network, image: Tensor, layer: int = -1) -> Tensor:
    """How much the class token attends to each patch, [B, 3, H, W] in 0..255 → [B, heads, h, w].

    From the attention aggregator where the network has one (`layer` is then ignored), else from the class
    token of backbone layer `layer`; there, a map sums to one minus the attention to prefix tokens.

    Raises:
        UserError: the network pools its class token, without attention.
    """
    out = network.backbone(image, capture=True)
    if network.aggregator is not None:
        maps = network.aggregator.attention(out.patches)  # [B, H, N]
    elif network.aggregation == "class_token" and out.attention.num_prefix_tokens:
        rows = out.attention.layer_map(layer, slice(0, 1))  # [B, H, 1, P+N]
        maps = rows[:, :, 0, out.attention.num_prefix_tokens :]
    else:
        raise UserError(
            "this network has no class token that attends; set model.aggregator to class_token or mca."
        )
    return maps.unflatten(-1, out.grid)


def head_similarity(attention: Tensor) -> Tensor:
    """How alike the heads of a layer are: mean cosine similarity of all pairs of heads.

    Similar heads lose little when they are averaged, which is SS-EPA's reason for head-average attention
    fusion.

    Args:
        attention: maps [..., H, T, T].

    Returns:
        [...], in 0..1 for probabilities; 1 where all heads agree, NaN for a single head.
    """
    maps = torch.nn.functional.normalize(attention.float().flatten(-2), dim=-1)  # [..., H, T²]
    heads = maps.shape[-2]
    together = maps.sum(-2).square().sum(-1)  # all pairs at once, each head with itself included
    return (together - heads) / (heads * (heads - 1) or torch.nan)


def relative_changes(clean: Tensor, noisy: Tensor) -> dict[str, float]:
    """How far maps move when their heads are disturbed, as norm of the change over norm of the map.

    Args:
        clean, noisy: maps refined by every head alone, [H, N, C], without and with noise.

    Returns:
        `single_head`: the map of one head with noise in it, mean over heads; `mean_one_noisy`: the head
        mean with noise in one head, mean over which; `mean_all_noisy`: the head mean with noise in all
        heads.
    """
    change, heads = noisy - clean, len(clean)
    each, mean = change.flatten(1).norm(dim=1), clean.mean(0).norm()  # [H], scalar
    return {
        "single_head": float((each / clean.flatten(1).norm(dim=1)).mean()),
        "mean_one_noisy": float((each / heads / mean).mean()),
        "mean_all_noisy": float(change.mean(0).norm() / mean),
    }


@torch.no_grad()
def noise_robustness(
    logits: Tensor, cam: Tensor, size: float, *, num_prefix_tokens: int, generator: torch.Generator
) -> dict[str, float]:
    """Relative change of a refined map when Gaussian noise is added to the attention logits of a layer.

    Independent noise in H heads partly cancels in their mean: by 1/√H where all heads are alike. This
    robustness is SS-EPA's other reason for averaging heads.

    Args:
        logits: one image's layer, [H, P+N, P+N]: `Attention.layer_map(layer, probabilities=False)[0]`.
        cam: the map that is refined, [N, C], not negative.
        size: standard deviation of the noise over that of the head's logits.
        num_prefix_tokens: P.
        generator: draws the noise, on the CPU.

    Returns:
        See `relative_changes`.
    """
    p = num_prefix_tokens
    noise = torch.randn(logits.shape, generator=generator).to(logits.device)
    noisy = logits + size * logits.std((-2, -1), keepdim=True) * noise
    clean, disturbed = (x.softmax(-1)[:, p:, p:] @ cam for x in (logits, noisy))  # [H, N, C]
    return relative_changes(clean, disturbed)


def token_similarity(tokens: Tensor) -> Tensor:
    """How alike the tokens of an image are: mean cosine similarity of all pairs. [..., N, D] → [...], −1..1.

    Near 1 the tokens are over-smoothed: every patch says the same. NaN for a single token.
    """
    directions, n = torch.nn.functional.normalize(tokens.float(), dim=-1), tokens.shape[-2]
    together = directions.sum(-2).square().sum(-1)  # all pairs at once, each token with itself included
    return (together - n) / (n * (n - 1) or torch.nan)


@torch.no_grad()
def layer_tokens(network: Network, image: Tensor) -> Tensor:
    """Patch tokens after every block, before the final norm: [B, 3, H, W] in 0..255 → [K, B, N, D].

    Raises:
        UserError: the backbone has stages, whose tokens differ in number and width.
    """
    if not isinstance(network.backbone, Backbone):
        raise UserError("tokens can be compared between the layers of a plain ViT only; choose one.")
    found: list[Tensor] = []
    first = network.backbone.num_prefix_tokens
    hooks = [
        block.register_forward_hook(lambda _, inputs, tokens: found.append(tokens[:, first:]))
        for block in network.backbone.vit.blocks
    ]
    try:
        with evaluating(network):
            network.backbone(image)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def object_share(attention: Tensor, objects: Tensor) -> Tensor:
    """Share of the attention among patches that stays inside the patch's own object.

    A mask is used here to measure, never to train.

    Args:
        attention: patch-to-patch maps [..., N, N], without prefix tokens.
        objects: integer [N], the object or class of each patch, 0 background.

    Returns:
        [...], 0..1, mean over the patches of objects; NaN where there is no object. Attention that looks at
        random gives the share of patches that the object covers.
    """
    inside = objects > 0
    own = (objects[:, None] == objects[None, :]) & inside[:, None]  # [N, N]
    share = (attention * own).sum(-1) / attention.sum(-1).clamp_min(1e-12)  # [..., N]
    return share[..., inside].mean(-1)


def head_disagreement(attention: Tensor) -> Tensor:
    """What averaging the heads blurs: entropy of their mean minus the mean of their entropies, in nats.

    Args:
        attention: maps [..., H, T, T], rows sum to one.

    Returns:
        [...], mean over the queries: the Jensen-Shannon divergence of the heads, 0 where all agree, at most
        log H.
    """
    blurred = attention_entropy(attention.mean(-3)) - attention_entropy(attention).mean(-2)  # [..., T]
    return blurred.mean(-1)
