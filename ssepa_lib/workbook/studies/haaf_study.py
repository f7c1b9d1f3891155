"""How HAAF's objectives compare: HAAF alone is trained on a finished network that stays as it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from ssepa_lib.data import SegmentationDataset, build_dataset, train_loader
from ssepa_lib.device import autocast
from ssepa_lib.evaluation.evaluate import refined_mious
from ssepa_lib.labels import PseudoLabeler, Refiner
from ssepa_lib.methods import TrainStep, take_step
from ssepa_lib.methods.haaf import HaafObjective
from ssepa_lib.model import HAAF, LayerWeights, Network, evaluating
from ssepa_lib.randomness import seeded
from ssepa_lib.recipe import AffinityConfig, Recipe
from ssepa_lib.training.trainer import learning_rate_factor
from ssepa_lib.workbook.study import samples

PAPER = {"iterations": 1, "per_scale": True, "balance": False, "deflate": False, "coverage": 0.0}
"""Fields of an affinity in the paper's form."""
UNTRAINED = {"haaf_objective": "none", "haaf_prior": 0.0}  # fields of an affinity that nothing trains
Progress = Callable[[int, int], None]  # steps done, all steps


def uniform_refiner(config: AffinityConfig, **changes: Any) -> Refiner:
    """All layers alike.

    Args:
        config: where the other settings of the affinity come from.
        changes: its fields to replace (attention, iterations, …).
    """
    return Refiner(replace(config, **{"kind": "mean"} | UNTRAINED | changes))


def single_layer_refiners(config: AffinityConfig, depth: int) -> dict[str, Refiner]:
    """One layer at a time: `layer <k> alone` → its refiner."""
    uniform = uniform_refiner(config)
    weights = depth * torch.eye(depth)
    return {f"layer {k} alone": replace(uniform, haaf=LayerWeights(row)) for k, row in enumerate(weights)}


def single_layers(network: Network, recipe: Recipe, dataset: SegmentationDataset) -> pd.Series:
    """mIoU (percent) of the CAM refined by one layer at a time, index layer from 0."""
    refiners = single_layer_refiners(recipe.affinity, network.backbone.depth)
    found = refined_mious(network, recipe, dataset, refiners)
    return pd.Series(list(found.values()), name="mIoU")


class _HaafTrainer:
    """One HAAF with its objective and optimiser; the network is a constant.

    Args:
        recipe: recipe of the network, with the affinity settings of this HAAF.
        depth: number of layers K.
    """

    def __init__(self, recipe: Recipe, depth: int, device: torch.device):
        signed = recipe.affinity.attention == "logits"
        self.haaf = HAAF(depth, recipe.affinity.hidden, signed=signed).to(device)
        self.refiner = Refiner(recipe.affinity, self.haaf)
        self.objective = HaafObjective(recipe)
        self.optimizer = torch.optim.AdamW(self.haaf.parameters(), recipe.affinity.haaf_lr)
        schedule = partial(learning_rate_factor, recipe)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)

    def update(self, step: TrainStep, precision: str) -> None:
        """One update from one training step that all variants share."""
        with autocast(precision, step.batch.image.device):
            loss = self.objective(replace(step, refiner=self.refiner))["haaf"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()


def train_haaf(
    network: Network,
    recipe: Recipe,
    variants: Mapping[str, Mapping[str, Any]],
    *,
    steps: int,
    progress: Progress | None = None,
) -> dict[str, Refiner]:
    """Train HAAF alone on a trained network, once per variant; all variants see the same batches.

    Args:
        variants: name → fields of `AffinityConfig` (haaf_objective, attention, descriptor, …).
        steps: updates; the learning rate falls as in a run of this length.

    Returns:
        Name → the refiner with its trained HAAF.
    """
    device, depth = network.classifier.weight.device, network.backbone.depth
    uniform = replace(
        recipe,
        train=replace(recipe.train, steps=steps),
        losses=replace(recipe.losses, segmentation_start=0.0, aff=0.0),
        affinity=uniform_refiner(recipe.affinity).config,
    )
    configs = {name: replace(recipe.affinity, kind="haaf", **fields) for name, fields in variants.items()}
    with seeded("network", recipe.train.seed):
        trainers = {
            name: _HaafTrainer(replace(uniform, affinity=config), depth, device)
            for name, config in configs.items()
        }
    needs = frozenset().union(*(trainer.objective.needs for trainer in trainers.values()))
    labeler = PseudoLabeler(recipe.cam).to(device)
    with evaluating(network):
        for index, batch in enumerate(train_loader(build_dataset(recipe.data, "train"), uniform)):
            with torch.no_grad(), autocast(recipe.train.precision, device):
                step = take_step(network, uniform, batch.to(device), index, labeler, needs)
            for trainer in trainers.values():
                trainer.update(step, recipe.train.precision)
            if progress:
                progress(index + 1, steps)
    return {name: trainer.refiner for name, trainer in trainers.items()}


def compare_haaf_objectives(
    network: Network,
    recipe: Recipe,
    variants: Mapping[str, Mapping[str, Any]],
    datasets: Sequence[SegmentationDataset],
    *,
    steps: int,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """What each way to train HAAF is worth, beside every single layer and their uniform mean.

    Args:
        variants, steps: see `train_haaf`.
        datasets: splits to measure on.
        progress: called with (done, all) while HAAF is trained.

    Returns:
        One row per affinity; columns: `affinity`, mIoU of its map in percent per split, and the weights of
        the layers, `layer 0` … (for HAAF the mean over the first images of the first split).
    """
    depth = network.backbone.depth
    refiners: dict[str, Refiner | None] = {
        "no affinity": None,
        "uniform mean": uniform_refiner(recipe.affinity),
        **single_layer_refiners(recipe.affinity, depth),
    }
    learned = train_haaf(network, recipe, variants, steps=steps, progress=progress)
    refiners |= {f"HAAF, {name}": refiner for name, refiner in learned.items()}
    table = pd.DataFrame({"affinity": list(refiners)})
    for dataset in datasets:
        table[dataset.split] = list(refined_mious(network, recipe, dataset, refiners).values())
    first = datasets[0]
    images = samples(first, range(min(32, len(first))), recipe.data.crop)[0]
    weights = mean_layer_weights(network, images, refiners)
    return pd.concat([table, weights], axis=1)


@torch.no_grad()
def mean_layer_weights(
    network: Network, images: torch.Tensor, refiners: Mapping[str, Refiner | None]
) -> pd.DataFrame:
    """Layer weights as the mean over images [n, 3, H, W], one row per refiner and one column per layer."""
    images = images.to(network.classifier.weight.device)
    attention = network(images, segment=False, capture=True).attention
    nothing = torch.full((1, attention.depth), torch.nan)
    rows = [nothing if r is None else r.affinity(attention).weights for r in refiners.values()]
    means = [row.mean(0).tolist() for row in rows]
    return pd.DataFrame(means, columns=[f"layer {k}" for k in range(attention.depth)])
