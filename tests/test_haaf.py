import pytest
import torch

from ssepa_lib.data.datasets import build_dataset
from ssepa_lib.data.views import train_loader
from ssepa_lib.methods.objectives import ClassTokenContrast, HaafSupervision, Step, build_objectives
from ssepa_lib.recipe import SUPERVISIONS
from ssepa_lib.training.trainer import Trainer


def step_of(recipe):
    dataset = build_dataset(recipe.data, "train")
    trainer = Trainer(recipe, dataset.classes, torch.device("cpu"))
    batch = next(iter(train_loader(dataset, recipe)))
    return trainer, lambda: Step(
        trainer.network, recipe, batch, 0, trainer.par, torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("kind", SUPERVISIONS[1:])
@pytest.mark.parametrize("source", ["softmax", "logits"])
def test_every_supervision_trains_haaf_and_nothing_else(tiny, kind, source):
    recipe = tiny("ssepa", **{"affinity.supervision": kind, "affinity.source": source, "losses.switch": 0.0})
    trainer, step = step_of(recipe)
    torch.nn.init.normal_(trainer.network.haaf.mlp[2].weight, std=0.5)
    part, haaf = HaafSupervision(recipe), trainer.network.haaf
    before = part(step())["haaf"]
    assert before.isfinite()
    before.backward()
    touched = {name for name, p in trainer.network.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched and all(name.startswith("haaf.") for name in touched)
    with torch.no_grad():  # a small step against the gradient lowers the loss
        for p in haaf.parameters():
            p -= 0.002 * p.grad / (1e-8 + sum(q.grad.square().sum() for q in haaf.parameters()).sqrt())
        assert part(step())["haaf"] < before


def test_valid_tokens_lie_mostly_on_the_image(tiny):
    _, make = step_of(tiny("ssepa"))
    step = make()
    step.batch.box = torch.tensor([[0, 32, 0, 32], [5, 21, 8, 20]])  # patches of 8 pixels
    valid = step.valid_tokens.view(2, 4, 4)
    assert valid[0].all()
    assert valid[1].nonzero().tolist() == [
        [1, 1],
        [2, 1],
    ]  # rows 8-16 and 16-21, columns 8-16; 16-20 is only half


@pytest.mark.parametrize("kind", ["ncut", "pooling"])
def test_padding_does_not_supervise_haaf(tiny, kind):
    recipe = tiny("ssepa", **{"affinity.supervision": kind, "losses.switch": 0.0})
    _, make = step_of(recipe)
    step, part = make(), HaafSupervision(recipe)
    step.batch.box = torch.tensor([[0, 32, 0, 16]] * 2)
    before = part(step)["haaf"].detach()
    refined = part._refined
    part._refined = lambda step: torch.where(step.valid_tokens.bool().unsqueeze(2), refined(step), 0.7)
    torch.testing.assert_close(part(step)["haaf"].detach(), before)
    part._refined = lambda step: refined(step) * 0.7
    assert not torch.isclose(part(step)["haaf"].detach(), before)


def test_pooling_asks_what_the_map_covers_and_what_it_leaves_out(tiny):
    recipe = tiny("ssepa", **{"affinity.supervision": "pooling", "losses.switch": 0.0})
    trainer, make = step_of(recipe)
    step, part = make(), HaafSupervision(recipe)
    maps, weight, total, count = part._refined(step), trainer.network.aux_classifier.weight, 0.0, 0
    for tokens, label, cover, valid in zip(
        step.out.aux, step.batch.label, maps, step.valid_tokens, strict=True
    ):
        cover = cover * valid[:, None]
        rest = (1 - cover.max(1).values) * valid
        outside = (rest[:, None] * tokens).sum(0) / rest.sum()
        for c in label.nonzero().flatten():
            inside = (cover[:, c, None] * tokens).sum(0) / cover[:, c].sum()
            total += torch.log1p((-(inside @ weight[c])).exp()) + torch.log1p((outside @ weight[c]).exp())
            count += 1
    torch.testing.assert_close(part(step)["haaf"], total / count)


@pytest.mark.parametrize("crops", [1, 2])
def test_class_token_contrast_with_few_local_views(tiny, crops):
    trainer, make = step_of(tiny("toco", **{"contrast.local_crops": crops}))
    (part,) = (p for p in trainer.objectives if isinstance(p, ClassTokenContrast))
    assert part(make())["ctc"].isfinite()


def test_supervision_waits_for_the_switch(tiny):
    recipe = tiny("ssepa", **{"losses.switch": 0.5})
    assert HaafSupervision(recipe)(step_of(recipe)[1]()) == {}


def test_methods_are_compositions_of_parts(tiny):
    def parts(method, **overrides):
        recipe = tiny(method, **overrides)
        network = Trainer(recipe, ("a", "b"), torch.device("cpu")).network
        return [type(part).__name__ for part in build_objectives(recipe, network)]

    toco = ["Classification", "PatchTokenContrast", "ClassTokenContrast", "Segmentation"]
    assert parts("toco") == parts("ssepa_affinity") == toco
    assert parts("ssepa") == [*toco, "HaafSupervision"]
    assert parts("ssepa", **{"affinity.supervision": "none"}) == toco
    assert parts("fsr") == ["Classification", "PatchTokenContrast", "Segmentation", "FeatureReinforcement"]
    assert parts("ssepa_fsr") == [*parts("fsr")[:3], "HaafSupervision", "FeatureReinforcement"]
    assert parts("toco", **{"losses.ptc": 0, "losses.ctc": 0, "losses.seg": 0, "losses.reg": 0}) == [
        "Classification"
    ]


def test_pseudo_labels_come_from_the_refined_map_and_are_computed_once(tiny):
    recipe = tiny("ssepa_affinity", **{"losses.switch": 0.0})
    _, make = step_of(recipe)
    step = make()
    assert torch.equal(step.cams.best, step.cams.refined) and step.cams is step.cams
    assert step.pseudo_label.shape == (2, 32, 32) and step.token_label.shape == (2, 16)
    allowed = {0, 255} | {int(c) + 1 for c in step.batch.label.sum(0).nonzero()}
    assert set(step.pseudo_label.unique().tolist()) <= allowed


def test_teacher_head_follows_by_its_momentum(tiny):
    recipe = tiny("toco")
    trainer, _ = step_of(recipe)
    contrast = trainer.objectives[2]
    old = contrast.teacher.last.clone()
    with torch.no_grad():
        contrast.student.last += 1
    contrast.finish(trainer.network, 0.0)
    torch.testing.assert_close(contrast.teacher.last, 0.9 * old + 0.1 * contrast.student.last)
