"""Losses of a few steps and a small evaluation of every method, recorded before the library was rebuilt.

On the CPU model and torch version of the record the numbers must agree to 1e-6 (most are equal to the last
bit); elsewhere the kernels of the matrix products differ, and a relative 2e-3 is allowed. The recorded
overrides carry the old names of the settings, so the table of renamed fields is tested as well.

`python tests/test_pinned_numbers.py PATTERN` records the cases again whose name contains the pattern: only
after a deliberate change of the method, which the commit explains.
"""

import json
import logging
import os
import platform
import re
import sys
from pathlib import Path

import pytest
import torch

from ssepa_lib.compose import load_recipe
from ssepa_lib.data import build_dataset, train_loader
from ssepa_lib.evaluation import evaluate
from ssepa_lib.training import Trainer

FILE = Path(__file__).parent / "pinned_numbers.json"
RECORD = json.loads(FILE.read_text())
CPUINFO = Path("/proc/cpuinfo")
MODEL = re.search(r"model name\s*:\s*(.*)", CPUINFO.read_text()) if CPUINFO.is_file() else None
MACHINE = {"processor": MODEL[1] if MODEL else platform.machine(), "torch": torch.__version__}
SAME_MACHINE = all(RECORD[name] == value for name, value in MACHINE.items())
TOLERANCE = 1e-6 if SAME_MACHINE else 2e-3


def run_case(case: dict) -> dict:
    """Losses of the steps of a case and, where it has them, its scores, with one thread and in float32."""
    logging.disable(logging.WARNING)  # the old names
    recipe = load_recipe(case["recipe"], case["overrides"])
    logging.disable(logging.NOTSET)
    dataset = build_dataset(recipe.data, "train")
    trainer = Trainer(recipe, dataset.classes, torch.device("cpu"))
    batches = train_loader(dataset, recipe)
    found = {"losses": [{k: float(v) for k, v in trainer.step(batch).items()} for batch in batches]}
    if "miou" in case:
        val = build_dataset(recipe.data, "val")
        result = evaluate(trainer.network, recipe, val, device="cpu", test_time=("single", "ms"))
        found["miou"] = {name: value for name, value in result["miou"].items() if value is not None}
        found["mean_average_precision"] = result["mean_average_precision"]
    return found


@pytest.fixture(autouse=True)
def one_thread():
    """The order of a sum depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RECORD["cases"])
def test_numbers_have_not_moved(name, request):
    case = RECORD["cases"][name]
    if case["recipe"].startswith("voc"):
        request.getfixturevalue("voc_root")
        request.getfixturevalue("vit_tiny_weights")
    found = run_case(case)
    for terms, expected in zip(found["losses"], case["losses"], strict=True):
        assert terms == pytest.approx(expected, rel=TOLERANCE, abs=1e-9)
    if "miou" in case:  # a few pixels change sides on another machine
        scores = pytest.approx(case["miou"], rel=TOLERANCE if SAME_MACHINE else 0.1, abs=1e-6)
        assert found["miou"] == scores
        precision = pytest.approx(case["mean_average_precision"], rel=TOLERANCE if SAME_MACHINE else 0.05)
        assert found["mean_average_precision"] == precision


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    for name, case in RECORD["cases"].items():
        if any(pattern in name for pattern in sys.argv[1:]):
            case |= run_case(case)
            print(name, flush=True)
    cases = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in RECORD["cases"].items())
    head = json.dumps(MACHINE)[1:-1]
    FILE.write_text(f'{{{head}, "cases": {{\n{cases}\n}}}}\n')
