import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ssepa_lib.methods import take_step
from ssepa_lib.workbook.studies import step_study


def test_gradient_norms_by_hand():
    a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        a.weight.fill_(2.0)
        b.weight.fill_(3.0)
    terms = {"both": (a.weight * b.weight).sum(), "one": (4 * a.weight).sum(), "none": torch.ones(())}
    norms = step_study.gradient_norms(terms, {"a": a, "b": b}, {"both": 10.0, "one": 1.0, "none": 1.0})
    assert norms.loc["both"].tolist() == [30.0, 20.0] and norms.loc["one", "a"] == 4
    assert math.isnan(norms.loc["one", "b"]) and norms.loc["none"].isna().all()


def test_haaf_hears_of_its_own_term_alone(tiny, trainer_for):
    trainer, batches = trainer_for(tiny("ssepa"))
    trainer.index = trainer.recipe.segmentation_step
    torch.nn.init.normal_(trainer.network.haaf.mlp[2].weight)
    norms = step_study.gradient_norms(trainer.terms(next(batches)), step_study.parts_of(trainer))
    heard = norms["HAAF"].dropna()
    assert list(heard.index) == ["haaf"] and norms.loc["haaf"].notna().sum() == 1
    assert math.isnan(norms.loc["seg", "classifier"]) and norms.loc["seg", "decoder"] > 0
    assert (
        math.isnan(norms.loc["aux_cls", "ViT, blocks 2 to 3"])
        and norms.loc["aux_cls", "ViT, blocks 0 to 1"] > 0
    )


def test_parts_of_fsr(tiny, trainer_for):
    assert {"aggregator", "projector"} <= set(step_study.parts_of(trainer_for(tiny("fsr"))[0]))


def test_only_settings_that_differ_are_listed_with_their_meaning(tiny):
    recipes = {"a": tiny("toco"), "b": tiny("toco", **{"losses.ptc": 0.7})}
    table = step_study.differences(recipes)
    assert table.index.tolist() == ["losses.ptc"] and table.loc["losses.ptc", "b"] == "0.7"
    assert table.loc["losses.ptc", "meaning"] == "Patch token contrast."
    assert step_study.differences({"a": recipes["a"]}).empty


@pytest.mark.parametrize("method", ["ssepa", "afa"])
def test_labels_of_an_image_without_padding_are_those_of_the_trainer(tiny, trainer_for, method):
    recipe = tiny(method)
    trainer, batches = trainer_for(recipe)
    nn.init.normal_(trainer.network.classifier.weight, std=0.5)
    batch = next(batches)
    batch = replace(batch, box=torch.tensor([[0, 32, 0, 32]] * len(batch.image)))
    last = recipe.train.steps - 1
    step = take_step(trainer.network, recipe, batch, last, trainer.labeler, {"pseudo_label"})
    assert (step.cams.spread is not None) == (method == "afa")
    found = step_study.labels_of(recipe, batch.image, batch.label, step.cams)
    assert found.shape == (32, 32) and torch.equal(found, step.pseudo_label[0])
    present = set((batch.label[0].nonzero().flatten() + 1).tolist())
    kinds = set(found.unique().tolist())
    assert kinds & present and len(kinds) > 1 and kinds <= present | {0, 255}, "the mask is not trivial"


@pytest.mark.parametrize("method", ["toco", "fsr"])
def test_every_part_has_parameters(tiny, trainer_for, method):
    parts = step_study.parts_of(trainer_for(tiny(method))[0])
    assert all(any(True for _ in part.parameters()) for part in parts.values())
