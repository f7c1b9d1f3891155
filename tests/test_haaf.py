"""What trains HAAF: every objective lowers itself, reaches nothing but the MLP, and leaves padding out."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ssepa_lib.data import IGNORE
from ssepa_lib.errors import UserError
from ssepa_lib.methods.haaf import HaafObjective, divergence_from_equal, objectives
from ssepa_lib.recipe import HAAF_OBJECTIVES


@pytest.mark.parametrize("kind", HAAF_OBJECTIVES[1:])
@pytest.mark.parametrize("attention", ["probabilities", "logits"])
def test_every_objective_trains_haaf_and_nothing_else(tiny, step_of, kind, attention):
    settings = {"affinity.haaf_objective": kind, "affinity.attention": attention}
    recipe = tiny("ssepa", **settings, **{"losses.segmentation_start": 0.0})
    trainer, step = step_of(recipe)
    torch.manual_seed(1)  # weights that are not saturated, where the loss would hardly change
    torch.nn.init.normal_(trainer.network.haaf.mlp[2].weight, std=0.5)
    part, haaf = HaafObjective(recipe), trainer.network.haaf
    before = part(step())["haaf"]
    assert before.isfinite()
    before.backward()
    touched = {name for name, p in trainer.network.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched and all(name.startswith("haaf.") for name in touched)
    with torch.no_grad():  # a small step against the gradient lowers the loss
        for p in haaf.parameters():
            p -= 0.002 * p.grad / (1e-8 + sum(q.grad.square().sum() for q in haaf.parameters()).sqrt())
        assert part(step())["haaf"] < before


def test_the_divergence_from_equal_weights_by_hand():
    assert divergence_from_equal(torch.ones(2, 5)) == 0
    one_layer = torch.tensor([[0.0, 4.0, 0.0, 0.0]])
    assert divergence_from_equal(one_layer).item() == pytest.approx(math.log(4))
    two = torch.tensor([[0.0, 4.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]])  # the mean over images
    assert divergence_from_equal(two).item() == pytest.approx((math.log(4) + math.log(2)) / 2)


@pytest.mark.parametrize("kind", ["ncut", "variance", "equivariance"])
def test_the_prior_adds_the_divergence_and_pulls_towards_equal_weights(tiny, step_of, kind):
    settings = {"affinity.haaf_objective": kind, "losses.segmentation_start": 0.0}
    recipe = tiny("ssepa", **settings)
    trainer, make = step_of(recipe)
    torch.manual_seed(1)
    haaf = trainer.network.haaf
    torch.nn.init.normal_(haaf.mlp[2].weight, std=0.5)
    step = make()
    plain = HaafObjective(recipe)(step)["haaf"]
    prior = HaafObjective(tiny("ssepa", **settings, **{"affinity.haaf_prior": 100.0}))
    weights = step.refiner.affinity(step.output.attention).weights
    added = prior(step)["haaf"] - plain
    if kind != "equivariance":  # which looks at a second pass too
        torch.testing.assert_close(added, 100 * divergence_from_equal(weights), rtol=1e-3, atol=1e-3)
    before = divergence_from_equal(weights).item()
    optimizer = torch.optim.SGD(haaf.parameters(), 1e-4)
    for _ in range(20):
        optimizer.zero_grad()
        prior(step)["haaf"].backward()
        optimizer.step()
    after = divergence_from_equal(step.refiner.affinity(step.output.attention).weights).item()
    assert 0 < after < before


def test_a_prior_without_an_objective_is_refused(tiny):
    with pytest.raises(UserError, match="haaf_prior needs an objective"):
        tiny("ssepa_affinity", **{"affinity.haaf_prior": 0.1})


def test_valid_tokens_lie_mostly_on_the_image(tiny, step_of):
    _, make = step_of(tiny("ssepa"))
    step = make()
    step.batch.box = torch.tensor([[0, 32, 0, 32], [5, 21, 8, 20]])  # patches of 8 pixels
    valid = step.valid_tokens.view(2, 4, 4)
    assert valid[0].all()
    # rows 8-16 and 16-21, columns 8-16; 16-20 is only half
    assert valid[1].nonzero().tolist() == [[1, 1], [2, 1]]


@pytest.mark.parametrize("kind", ["ncut", "pooling"])
def test_padding_does_not_supervise_haaf(tiny, step_of, kind):
    recipe = tiny("ssepa", **{"affinity.haaf_objective": kind, "losses.segmentation_start": 0.0})
    _, make = step_of(recipe)
    step, part = make(), HaafObjective(recipe)
    step.batch.box = torch.tensor([[0, 32, 0, 16]] * 2)
    before = part(step)["haaf"].detach()
    refined = part._refined
    part._refined = lambda step: torch.where(step.valid_tokens.bool().unsqueeze(2), refined(step), 0.7)
    torch.testing.assert_close(part(step)["haaf"].detach(), before)
    part._refined = lambda step: refined(step) * 0.7
    assert not torch.isclose(part(step)["haaf"].detach(), before)


def test_pooling_asks_what_the_map_covers_and_what_it_leaves_out(tiny, step_of):
    recipe = tiny("ssepa", **{"affinity.haaf_objective": "pooling", "losses.segmentation_start": 0.0})
    trainer, make = step_of(recipe)
    step, part = make(), HaafObjective(recipe)
    maps, weight, total, count = part._refined(step), trainer.network.aux_classifier.weight, 0.0, 0
    images = zip(step.output.aux, step.batch.label, maps, step.valid_tokens, strict=True)
    for tokens, label, cover, valid in images:
        cover = cover * valid[:, None]
        rest = (1 - cover.max(1).values) * valid
        outside = (rest[:, None] * tokens).sum(0) / rest.sum()
        for c in label.nonzero().flatten():
            inside = (cover[:, c, None] * tokens).sum(0) / cover[:, c].sum()
            total += torch.log1p((-(inside @ weight[c])).exp()) + torch.log1p((outside @ weight[c]).exp())
            count += 1
    torch.testing.assert_close(part(step)["haaf"], total / count)


def test_the_objective_waits_for_segmentation(tiny, trainer_for):
    recipe = tiny("ssepa", **{"losses.segmentation_start": 0.5})
    assert HaafObjective(recipe).start == recipe.segmentation_step == 3
    trainer, batches = trainer_for(recipe)
    seen = ["haaf" in trainer.step(next(batches)) for _ in range(5)]
    assert seen == [False, False, False, True, True]


def test_only_a_learned_haaf_has_an_objective(tiny):
    for overrides in (
        {"affinity.kind": "mean", "affinity.haaf_objective": "none"},
        {"affinity.haaf_objective": "none"},
    ):
        assert objectives(tiny("ssepa", **overrides), None) == []
    assert [type(part) for part in objectives(tiny("ssepa"), None)] == [HaafObjective]


def test_objectives_on_known_maps_by_other_formulas(tiny, step_of, monkeypatch):
    """Maps that HAAF would make are given; the objectives are computed with torch's own losses and loops."""
    recipe = tiny("ssepa", **{"losses.segmentation_start": 0.0})
    _, make = step_of(recipe)
    step, part = make(), HaafObjective(recipe)
    batch, tokens, classes = *step.output.cam.flatten(2).shape[::2], step.batch.label.shape[1]
    maps = 0.05 + 0.9 * torch.rand(batch, tokens, classes)
    monkeypatch.setattr(part, "_products", lambda *_: maps)
    expected = F.multilabel_soft_margin_loss(maps.max(1).values, step.batch.label)
    torch.testing.assert_close(part._cls(step), expected)

    label = torch.arange(batch * tokens).view(batch, tokens) % (classes + 1)
    label[:, ::3] = IGNORE
    mass = 0.1 + torch.rand(batch, tokens, classes + 1)
    monkeypatch.setattr(part, "_products", lambda *_: mass)
    shares = [
        -math.log(mass[b, n, label[b, n]] / mass[b, n].sum())
        for b in range(batch)
        for n in range(tokens)
        if label[b, n] != IGNORE
    ]
    found = part._affinity(replace(step, token_label=label)).item()
    assert found == pytest.approx(sum(shares) / len(shares), rel=1e-4)

    logits = torch.randn(batch, classes + 1, *step.output.grid)
    target = logits.softmax(1)[:, 1:].flatten(2).transpose(1, 2)
    monkeypatch.setattr(part, "_refined", lambda *_: maps)
    known = replace(step, output=replace(step.output, segmentation=logits))
    losses = F.binary_cross_entropy(maps, target, reduction="none").mean(1)
    present = step.batch.label.bool()
    torch.testing.assert_close(part._decoder(known), losses[present].mean())


def test_energy_and_equivariance_are_mean_distances_over_the_present_classes(tiny, step_of, monkeypatch):
    """On constant maps, which neither resizing nor flipping changes."""
    recipe = tiny("ssepa", **{"losses.segmentation_start": 0.0})
    _, make = step_of(recipe)
    step, part = make(), HaafObjective(recipe)
    batch, classes = step.batch.label.shape

    def refined(given, out=None):
        h, w = step.output.grid if out is None else out.grid
        return (0.8 if out is None else 0.3) * given.batch.label[:, None].expand(batch, h * w, classes)

    monkeypatch.setattr(part, "_refined", refined)
    halved = replace(step, labeler=SimpleNamespace(par=lambda image, maps: maps / 2))
    assert part._energy(halved).item() == pytest.approx(0.8 / 2, abs=1e-5)
    assert part._equivariance(step).item() == pytest.approx(0.8 - 0.3, abs=1e-5)
