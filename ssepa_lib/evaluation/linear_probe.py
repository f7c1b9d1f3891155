"""A classifier on frozen tokens, trained in seconds: what labels can and cannot teach, without a run."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.data import SegmentationDataset, eval_batches
from ssepa_lib.errors import UserError
from ssepa_lib.model.network import Network, evaluating
from ssepa_lib.recipe import Recipe


@torch.no_grad()
def frozen_tokens(network: Network, recipe: Recipe, dataset: SegmentationDataset) -> Tensor:
    """Final patch tokens of every image, each of length 1: [n, N, D], on the CPU."""
    device, found = network.classifier.weight.device, []
    size = recipe.data.eval_size or recipe.data.crop
    with evaluating(network):
        for _, pixels, _, _ in eval_batches(dataset, size, recipe.eval.batch):
            found.append(F.normalize(network(pixels.to(device), segment=False).patches.float(), dim=-1).cpu())
    return torch.cat(found)


def linear_maps(tokens: Tensor, labels: Tensor, steps: int = 150, seed: int = 0) -> Tensor:
    """Maps of linear classifiers, trained with image labels on a smooth maximum over the patches.

    The smooth maximum (log-sum-exp) starts as the mean, so that small weights begin in the same direction
    whatever they are.

    Args:
        tokens: [n, N, D]; labels: multi-hot [n, C].
        seed: of the weights, which start small and differ from class to class.

    Returns:
        Scores of every patch above 0: [n, C, N].
    """
    with torch.enable_grad():
        start = torch.randn(labels.shape[1], tokens.shape[2], generator=torch.Generator().manual_seed(seed))
        weights = (0.01 * start).requires_grad_()
        optimiser = torch.optim.Adam([weights], lr=0.1)
        for _ in range(steps):
            scores = (tokens @ weights.T).logsumexp(1) - math.log(tokens.shape[1])  # [n, C]
            loss = F.binary_cross_entropy_with_logits(scores, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return (tokens @ weights.detach().T).relu().transpose(1, 2)


def with_class(labels: Tensor, extra: Any) -> Tensor:
    """Labels with one class more, [n, C] and [n] → [n, C+1].

    Args:
        extra: 0 or 1 for every image: a tensor, an array or a list.

    Raises:
        UserError: it is something else.
    """
    try:
        column = torch.as_tensor(extra, dtype=torch.float32).cpu()
    except (TypeError, ValueError, RuntimeError):
        column = torch.empty(0)
    if column.shape != labels.shape[:1] or not bool(((column == 0) | (column == 1)).all()):
        raise UserError(f"the labels of the new class must be {len(labels)} numbers, each 0 or 1.")
    return torch.cat([labels, column[:, None]], 1)


def map_correlation(maps: Tensor, first: int, second: int) -> float:
    """Correlation of the maps of two classes over all patches of all images, -1..1; 0 where one is constant.

    Args:
        maps: [n, C, N].
    """
    pair = torch.stack([maps[:, first].flatten(), maps[:, second].flatten()]).double()
    if bool((pair.std(1) == 0).any()):
        return 0.0
    return float(torch.corrcoef(pair)[0, 1])
