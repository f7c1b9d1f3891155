"""Shared small things: a four-layer network on 32-pixel images, and the optional real data."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from ssepa_lib.compose import load_recipe
from ssepa_lib.data import Batch, build_dataset, split_of, train_loader
from ssepa_lib.methods import TrainStep, take_step
from ssepa_lib.model import build_network
from ssepa_lib.recipe import Recipe
from ssepa_lib.training import Trainer

hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("no deadline")

EVERYTHING = {"cams", "token_label", "pseudo_label"}  # that an objective can need

TINY = {
    "model.backbone": "vit_tiny_patch16_224",
    "model.backbone_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
    "model.weights": "none",
    "data.crop": 32,
    "data.eval_size": 32,
    "data.batch": 2,
    "data.train_images": 8,
    "data.val_images": 4,
    "data.workers": 0,
    "cam.par_dilations": [1, 2],
    "contrast.local_size": 16,
    "contrast.local_crops": 3,
    "contrast.hidden": 16,
    "contrast.bottleneck": 8,
    "contrast.outputs": 12,
    "reinforce.outputs": 12,
    "reinforce.mask_block": 2,
    "train.steps": 6,
    "train.log_every": 1,
    "train.save_every": 2,
    "train.precision": "fp32",
    "train.device": "cpu",
}


@pytest.fixture
def tiny():
    """Factory of small recipes on the built-in data: `tiny("ssepa", **{"train.steps": 3})`."""

    def make(method: str = "toco", **overrides) -> Recipe:
        return load_recipe(f"shapes/{method}", {**TINY, **overrides})

    return make


@pytest.fixture
def trained(tiny):
    """An untrained network whose classifier gives positive maps, its recipe and a validation split."""
    recipe = tiny("ssepa")
    dataset = split_of(recipe, "val", 4)
    network = build_network(recipe, dataset.classes).eval()
    torch.nn.init.normal_(network.classifier.weight, std=0.5)
    return network, recipe, dataset


@pytest.fixture
def trainer_for():
    """Factory of a trainer on the CPU and its batches: `trainer, batches = trainer_for(recipe)`."""

    def make(recipe: Recipe) -> tuple[Trainer, Iterator[Batch]]:
        dataset = build_dataset(recipe.data, "train")
        return Trainer(recipe, dataset.classes, torch.device("cpu")), iter(train_loader(dataset, recipe))

    return make


@pytest.fixture
def step_of(trainer_for):
    """Factory of a trainer and a function that repeats its first step: `trainer, make = step_of(recipe)`."""

    def prepare(recipe: Recipe) -> tuple[Trainer, Callable[[], TrainStep]]:
        trainer, batches = trainer_for(recipe)
        batch = next(batches)
        return trainer, lambda: take_step(trainer.network, recipe, batch, 0, trainer.labeler, EVERYTHING)

    return prepare


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def voc_root() -> Path:
    """The real VOC-layout sample named by VOC_ROOT; tests that need it are skipped where it is absent."""
    root = os.environ.get("VOC_ROOT")
    if not root or not Path(root, "JPEGImages").is_dir():
        pytest.skip("VOC_ROOT names no VOC 2012 folder")
    return Path(root)


@pytest.fixture(scope="session")
def vit_tiny_weights() -> Path:
    """ImageNet weights in the folder named by SSEPA_WEIGHTS."""
    path = Path(
        os.environ.get("SSEPA_WEIGHTS") or ".", "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    )
    if not path.is_file():
        pytest.skip("SSEPA_WEIGHTS holds no ViT-Tiny weights")
    return path
