"""One trained network, its maps read in several ways, on a ViT of four layers."""

from dataclasses import replace

import pytest

from ssepa_lib.cli import main
from ssepa_lib.data import measured_split
from ssepa_lib.evaluation import evaluate
from ssepa_lib.readers import read_table
from ssepa_lib.training import load_run, train
from ssepa_lib.workbook.studies.haaf_study import uniform_refiner
from ssepa_lib.workbook.studies.readings import BALANCED, readings


@pytest.fixture
def run(tiny, tmp_path):
    recipe = tiny("ssepa_plus", **{"train.steps": 2})
    train(recipe, tmp_path / "ssepa_plus-seed0")
    return tmp_path / "ssepa_plus-seed0"


def test_readings_are_what_evaluate_says_under_their_recipes(run, capsys):
    assert main(["readings", str(run), "--split", "val", "--images", "3", "--device", "cpu"]) == 0
    assert str(run / "readings.csv") in capsys.readouterr().out
    columns, rows = read_table(run / "readings.csv", "readings")
    assert columns[:3] == ["reading", "map", "pseudo_label"]
    assert columns[3:] == [f"pseudo_label {kind}" for kind in ("precision", "recall", "boundary_iou")]
    network, recipe = load_run(run, "cpu")
    named = {row["reading"]: {name: float(row[name]) for name in columns[1:]} for row in rows}
    assert list(named) == list(readings(recipe, haaf=True))
    dataset = measured_split(recipe, "val", 3)
    own = evaluate(network, recipe, dataset, device="cpu")
    balanced = named["HAAF, balanced, up to 3 iterations"]
    assert balanced["map"] == pytest.approx(own["miou"]["refined_cam"], abs=0.01)
    for kind in ("precision", "recall", "boundary_iou"):
        assert balanced[f"pseudo_label {kind}"] == pytest.approx(own[kind]["pseudo_label"], abs=0.01)
    assert named["CAM"]["map"] == pytest.approx(own["miou"]["cam"], abs=0.01)


def test_the_balanced_reading_is_the_recipe_of_ssepa_plus(tiny):
    recipe = tiny("ssepa_plus")
    assert {name: getattr(recipe.affinity, name) for name in BALANCED} == BALANCED
    read = readings(recipe, haaf=True)["HAAF, balanced, up to 3 iterations"]
    assert replace(read.affinity, haaf_objective=recipe.affinity.haaf_objective) == recipe.affinity


def test_runs_with_a_prior_or_with_logits_are_read_too(tiny):
    prior = tiny("ssepa", **{"affinity.haaf_prior": 0.1})
    assert {read.affinity.haaf_prior for read in readings(prior, haaf=True).values()} == {0}
    logits = readings(tiny("ssepa", **{"affinity.attention": "logits"}), haaf=True)
    assert "HAAF, 2 iterations" in logits and not any("balanced" in name for name in logits)
    assert {read.affinity.attention for read in logits.values()} == {"logits"}
    assert uniform_refiner(prior.affinity).config.haaf_prior == 0
