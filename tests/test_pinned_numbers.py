"""Losses of a few steps and a small evaluation of every method, recorded before the library was restructured.

On the CPU model and torch version of the record the numbers must be equal to the last bit but for a handful of
operations (1e-6); elsewhere the kernels of the matrix products differ, and a relative 2e-3 is allowed. The recorded
overrides carry the old names of the settings, so the table of renamed fields is tested as well.
"""

import json
import platform
import warnings
from pathlib import Path

import pytest
import torch

from ssepa_lib.compose import load_recipe
from ssepa_lib.data.datasets import build_dataset
from ssepa_lib.data.loaders import train_loader
from ssepa_lib.evaluation.evaluate import evaluate
from ssepa_lib.training.trainer import Trainer

RECORD = json.loads((Path(__file__).parent / "pinned_numbers.json").read_text())
SAME_MACHINE = (RECORD["processor"], RECORD["torch"]) == (
    platform.processor() or platform.machine(),
    torch.__version__,
)
TOLERANCE = 1e-6 if SAME_MACHINE else 2e-3


@pytest.fixture(autouse=True)
def one_thread():
    """The order of a sum depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", RECORD["cases"])
def test_numbers_have_not_moved(case, request):
    record = RECORD["cases"][case]
    if record["recipe"].startswith("voc"):
        request.getfixturevalue("voc_root")
        request.getfixturevalue("vit_tiny_weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old names
        recipe = load_recipe(record["recipe"], record["overrides"])
    dataset = build_dataset(recipe.data, "train")
    trainer = Trainer(recipe, dataset.classes, torch.device("cpu"))
    for batch, expected in zip(train_loader(dataset, recipe), record["losses"], strict=True):
        terms = {name: float(value) for name, value in trainer.step(batch).items()}
        assert terms == pytest.approx(expected, rel=TOLERANCE, abs=1e-9)
    if "miou" in record:
        result = evaluate(
            trainer.network,
            recipe,
            build_dataset(recipe.data, "val"),
            device="cpu",
            test_time=("single", "ms"),
        )
        found = {name: value for name, value in result["miou"].items() if value is not None}
        assert found == pytest.approx(record["miou"], rel=TOLERANCE if SAME_MACHINE else 0.1, abs=1e-6)
        assert result["mean_average_precision"] == pytest.approx(
            record["mean_average_precision"], rel=TOLERANCE if SAME_MACHINE else 0.05
        )
