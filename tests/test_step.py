"""One training step: its forward passes, what it derives, and the objectives that make up a method."""

import sys
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

from ssepa_lib import methods
from ssepa_lib.methods import build_objectives, take_step
from ssepa_lib.methods.toco import ClassTokenContrast
from ssepa_lib.recipe import HAAF_OBJECTIVES
from ssepa_lib.training import Trainer

METHODS = ["toco", "ssepa_affinity", "ssepa", "ssepa_fast", "fsr", "fsr+ssepa", "mcc", "mcc+ssepa", "afa"]


class Passes(list):
    """Records the forward passes of a network as (images, side, with gradient, segment, capture)."""

    def watch(self, network: nn.Module) -> None:
        network.forward = partial(self._record, network.forward)

    def _record(self, forward, image, *, segment=True, capture=False, mask=None):
        self.append((len(image), image.shape[-1], torch.is_grad_enabled(), segment, capture))
        return forward(image, segment=segment, capture=capture, mask=mask)


def passes_of(trainer, batch):
    """The forward passes of the network and, with FSR, of its teacher in the trainer's current step."""
    seen = Passes()
    seen.watch(trainer.network)
    for part in trainer.objectives:
        if hasattr(part, "teacher") and "network" in getattr(part.teacher.module, "_modules", {}):
            seen.watch(part.teacher.module["network"])
    trainer.terms(batch)
    return seen


# The table of forward passes in methods/step.py, for two images of side 32 and three local crops of side 16

CAM = [(2, 32, False), (4, 16, False), (4, 48, False)]  # flip at scale 1; the other scales with flip
CONTRAST = [(2, 32, True), (6, 16, True)]  # second global view; local crops
EXPECTED = {
    "toco": [(2, 32, True), *CAM, *CONTRAST],
    "ssepa": [(2, 32, True), *CAM, *CONTRAST],
    "mcc": [(2, 32, True), *CAM, (2, 32, True)],  # and the masked views, which take the backbone's short way
    "afa": [(2, 32, True), *CAM],
    # drop path: the image itself once more beside its flip; then the teacher's views and the masked view
    "fsr": [(2, 32, True), (4, 32, False), *CAM[1:], (4, 32, False), (2, 32, True)],
}


def test_the_learned_affinity_is_that_of_the_image_at_the_largest_scale(tiny, trainer_for):
    recipe = tiny("afa", **{"losses.segmentation_start": 0.0, "affinity.start": 0.5})
    trainer, batches = trainer_for(recipe)
    trainer.index = 3
    seen = passes_of(trainer, next(batches))
    flips = [(2, 32, False), (4, 16, False), (2, 48, False)]
    assert [entry[:3] for entry in seen] == [(2, 32, True), (2, 48, False), *flips]
    assert [entry[4] for entry in seen] == [True, True, False, False, False]


# once FSR no longer masks at random: the student's maps of the second view
UNCERTAIN = [(4, 32, False), (4, 16, False), (4, 48, False)]


@pytest.mark.parametrize("segmenting", [False, True])
@pytest.mark.parametrize("method", EXPECTED)
def test_the_table_of_forward_passes_is_true(tiny, trainer_for, method, segmenting):
    trainer, batches = trainer_for(tiny(method, **{"losses.segmentation_start": 0.0 if segmenting else 1.0}))
    seen = passes_of(trainer, next(batches))
    passes = EXPECTED[method][
        : 1 if method == "afa" and not segmenting else None
    ]  # until then it needs no maps
    assert [entry[:3] for entry in seen] == passes
    affinity = segmenting and method in ("ssepa", "afa")
    decoder = [entry[3] for entry in seen]
    assert decoder == [segmenting] + [False] * (len(seen) - 1), "the decoder runs on the training crop alone"
    captured = [entry[4] for entry in seen]
    number = 1 if method == "afa" else 4  # which is not used yet
    assert captured == [affinity] * number + [False] * (len(seen) - number), "crop and CAM passes give it"


@pytest.mark.parametrize(("selection", "more"), [("loose", UNCERTAIN), ("strict", UNCERTAIN), ("edge", [])])
def test_uncertain_masks_of_fsr_need_maps_of_the_second_view(tiny, trainer_for, selection, more):
    recipe = tiny("fsr", **{"reinforce.selection": selection, "reinforce.random_until": 0.5})
    trainer, batches = trainer_for(recipe)
    batch = next(batches)
    seen = passes_of(trainer, batch)
    assert [entry[:3] for entry in seen] == EXPECTED["fsr"], "random at first"
    seen.clear()
    trainer.index = 3
    trainer.terms(batch)
    assert [entry[:3] for entry in seen] == [*EXPECTED["fsr"][:-1], *more, EXPECTED["fsr"][-1]]


def test_an_averaged_network_makes_the_maps(tiny, trainer_for):
    """With cam.teacher_momentum the CAM passes, the image itself among them, go to the teacher."""
    trainer, batches = trainer_for(tiny("toco", **{"cam.teacher_momentum": 0.5}))
    batch = next(batches)
    teacher = Passes()
    teacher.watch(trainer.teacher.module)
    student = passes_of(trainer, batch)
    assert [entry[:3] for entry in student] == [(2, 32, True), *CONTRAST]
    assert [entry[:3] for entry in teacher] == [(4, 32, False), *CAM[1:]]


def test_the_averaged_network_follows_and_is_resumed(tiny, trainer_for):
    recipe = tiny("toco", **{"cam.teacher_momentum": 0.5})
    trainer, batches = trainer_for(recipe)
    old = trainer.network.classifier.weight.detach().clone()
    trainer.step(next(batches))
    new, mean = trainer.network.classifier.weight, trainer.teacher.module.classifier.weight
    torch.testing.assert_close(mean, (old + new.detach()) / 2)
    assert not torch.equal(old, new) and not mean.requires_grad
    other, _ = trainer_for(recipe)
    other.load_state_dict(trainer.state_dict())
    assert torch.equal(other.teacher.module.classifier.weight, mean)
    batch = next(batches)
    one, two = trainer.step(batch), other.step(batch)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_equivariance_adds_one_flipped_copy(tiny, trainer_for):
    settings = {"affinity.haaf_objective": "equivariance", "losses.segmentation_start": 0.0}
    trainer, batches = trainer_for(tiny("ssepa", **settings))
    seen = passes_of(trainer, next(batches))
    more = Counter(entry[:3] for entry in seen) - Counter(EXPECTED["ssepa"])
    assert more == Counter([(2, int(1.4 * 32), False)])


def test_the_affinity_adds_no_forward_pass(tiny, trainer_for):
    counts = {}
    for method in ("toco", "ssepa_affinity", "ssepa", "ssepa_fast"):
        trainer, batches = trainer_for(tiny(method, **{"losses.segmentation_start": 0.0}))
        counts[method] = Counter(entry[:3] for entry in passes_of(trainer, next(batches)))
    assert all(count == counts["toco"] for count in counts.values())


def test_without_a_need_no_cam_pass_runs(tiny, trainer_for):
    recipe = tiny("toco", **{"losses.ptc": 0, "losses.ctc": 0, "losses.segmentation_start": 1.0})
    trainer, batches = trainer_for(recipe)
    batch = next(batches)
    assert [entry[:3] for entry in passes_of(trainer, batch)] == [(2, 32, True)]
    step = take_step(trainer.network, recipe, batch, 0, trainer.labeler, frozenset())
    assert step.cams is step.token_label is step.pseudo_label is None


@pytest.mark.parametrize("need", ["cams", "token_label", "pseudo_label"])
def test_only_what_is_needed_is_made(tiny, trainer_for, need):
    recipe = tiny("toco", **{"losses.segmentation_start": 0.0})
    trainer, batches = trainer_for(recipe)
    step = take_step(trainer.network, recipe, next(batches), 0, trainer.labeler, {need})
    made = {name for name in ("cams", "token_label", "pseudo_label") if getattr(step, name) is not None}
    assert made == {"cams", need}


def test_the_maps_of_a_step_are_those_of_evaluation_mode_and_leave_the_mode_alone(tiny, trainer_for):
    recipe = tiny("fsr")  # with drop path
    trainer, batches = trainer_for(recipe)
    batch = next(batches)
    one, two = (
        take_step(trainer.network, recipe, batch, 0, trainer.labeler, {"cams"}).cams.main for _ in range(2)
    )
    assert recipe.model.drop_path > 0 and torch.equal(one, two) and trainer.network.training


def test_pseudo_labels_come_from_the_refined_map_and_are_computed_once(tiny, step_of, monkeypatch):
    recipe = tiny("ssepa_affinity", **{"losses.segmentation_start": 0.0})
    trainer, make = step_of(recipe)
    seen, labels = [], trainer.labeler.training_labels

    def record(image, cam, label, box, spread):
        seen.append(cam)
        return labels(image, cam, label, box, spread)

    monkeypatch.setattr(trainer.labeler, "training_labels", record)
    step = make()
    assert torch.equal(step.cams.for_labels, step.cams.refined) and not torch.equal(
        step.cams.refined, step.cams.main
    )
    assert len(seen) == 1 and torch.equal(seen[0], step.cams.refined)
    assert step.pseudo_label.shape == (2, 32, 32) and step.token_label.shape == (2, 16)
    allowed = {0, 255} | {int(c) + 1 for c in step.batch.label.sum(0).nonzero()}
    assert set(step.pseudo_label.unique().tolist()) <= allowed


def test_labels_come_from_the_auxiliary_maps_until_the_main_ones_are_trusted(tiny, trainer_for, monkeypatch):
    recipe = tiny("toco", **{"cam.main_from": 0.5, "losses.segmentation_start": 0.0})
    trainer, batches = trainer_for(recipe)
    batch, seen = next(batches), []
    monkeypatch.setattr(trainer.labeler, "training_labels", lambda image, cam, *rest: seen.append(cam))
    steps = [
        take_step(trainer.network, recipe, batch, index, trainer.labeler, {"pseudo_label"})
        for index in (2, 3)
    ]
    assert torch.equal(seen[0], steps[0].cams.auxiliary) and torch.equal(seen[1], steps[1].cams.main)
    assert not torch.equal(*seen)


def test_padding_leaves_patch_token_contrast_only_where_asked(tiny, trainer_for):
    labels = {}
    for padding in ("count", "ignore"):
        recipe = tiny("toco", **{"losses.ptc_padding": padding})
        trainer, batches = trainer_for(recipe)
        batch = next(batches)
        batch.box = torch.tensor([[0, 32, 0, 16]] * 2)  # two of four columns of patches
        step = take_step(trainer.network, recipe, batch, 0, trainer.labeler, {"token_label"})
        labels[padding] = step.token_label.view(2, 4, 4)
    assert (labels["ignore"][:, :, 2:] == 255).all()
    assert torch.equal(labels["ignore"][:, :, :2], labels["count"][:, :, :2])
    assert (labels["count"][:, :, 2:] != 255).any()


@pytest.mark.parametrize("crops", [1, 2])
def test_class_token_contrast_with_few_local_views(tiny, step_of, crops):
    trainer, make = step_of(tiny("toco", **{"contrast.local_crops": crops}))
    (part,) = (p for p in trainer.objectives if isinstance(p, ClassTokenContrast))
    assert part(make())["ctc"].isfinite()


def test_teacher_head_follows_by_its_momentum(tiny, step_of):
    trainer, _ = step_of(tiny("toco"))
    contrast = trainer.objectives[2]
    old = contrast.teacher.module.last.clone()
    with torch.no_grad():
        contrast.student.last += 1
    contrast.after_step(trainer.network, 0.0)
    torch.testing.assert_close(contrast.teacher.module.last, 0.9 * old + 0.1 * contrast.student.last)


# Methods are compositions of objectives


def test_methods_are_compositions_of_parts(tiny):
    def parts(method, **overrides):
        recipe = tiny(method, **overrides)
        network = Trainer(recipe, ("a", "b"), torch.device("cpu")).network
        return [type(part).__name__ for part in build_objectives(recipe, network)]

    toco = ["Classification", "PatchTokenContrast", "ClassTokenContrast", "Segmentation"]
    assert parts("toco") == parts("ssepa_affinity") == toco
    assert parts("ssepa") == [*toco, "HaafObjective"]
    assert parts("ssepa", **{"affinity.haaf_objective": "none"}) == toco
    assert parts("fsr") == ["Classification", "PatchTokenContrast", "Segmentation", "SelfReinforcement"]
    assert parts("ssepa_fsr") == [*parts("fsr")[:3], "HaafObjective", "SelfReinforcement"]
    nothing = {"losses.ptc": 0, "losses.ctc": 0, "losses.seg": 0, "losses.reg": 0}
    assert parts("toco", **nothing) == ["Classification"]


@pytest.mark.parametrize("method", METHODS)
def test_every_term_has_one_weight(tiny, trainer_for, method):
    recipe = tiny(method, **{"losses.segmentation_start": 0.0})
    trainer, batches = trainer_for(recipe)
    names = [name for part in trainer.objectives for name in part.weights]
    assert len(names) == len(set(names)) == len(trainer.weights)
    assert set(trainer.terms(next(batches))) == set(trainer.weights)


@pytest.mark.parametrize("kind", HAAF_OBJECTIVES[1:])
def test_every_haaf_objective_has_a_weight(tiny, trainer_for, kind):
    settings = {
        "affinity.haaf_objective": kind,
        "affinity.haaf_weight": 0.25,
        "losses.segmentation_start": 0.0,
    }
    trainer, batches = trainer_for(tiny("ssepa", **settings))
    assert trainer.weights["haaf"] == 0.25 and set(trainer.terms(next(batches))) == set(trainer.weights)


def test_terms_start_at_their_step(tiny, trainer_for):
    recipe = tiny("toco", **{"losses.contrast_start": 0.5, "losses.segmentation_start": 2 / 3})
    trainer, batches = trainer_for(recipe)
    assert (recipe.contrast_step, recipe.segmentation_step) == (3, 4)
    assert {part.start for part in trainer.objectives} == {0, 3, 4}
    seen = [set(trainer.step(next(batches))) - {"loss"} for _ in range(6)]
    early = {"cls", "aux_cls"}
    late = early | {"ptc", "ctc"}
    assert seen == [early] * 3 + [late] + [late | {"seg", "reg"}] * 2


def test_before_the_contrast_starts_no_cam_pass_runs(tiny, trainer_for):
    recipe = tiny("toco", **{"losses.contrast_start": 0.5, "losses.segmentation_start": 1.0})
    trainer, batches = trainer_for(recipe)
    batch = next(batches)
    trainer.index = 2
    assert len(passes_of(trainer, batch)) == 1
    trainer, batches = trainer_for(recipe)
    trainer.index = 3
    assert [entry[:3] for entry in passes_of(trainer, batch)] == EXPECTED["toco"]


NEW_METHOD = """
from ssepa_lib.methods import Objective

ORDER = {order}


class Smallness(Objective):
    def forward(self, step):
        return {{"smallness": step.output.patches.square().mean()}}


def objectives(recipe, network):
    return [Smallness({{"smallness": 0.5}})]
"""


@pytest.fixture
def new_file(tmp_path, monkeypatch):
    """Adds a file to the folder of methods for the length of a test."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    added = []

    def add(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        added.append(name)

    yield add
    for name in added:
        sys.modules.pop(f"{methods.__name__}.{name}", None)
        if hasattr(methods, name):
            delattr(methods, name)


@pytest.mark.parametrize(("order", "place"), [(-1, 0), (5, 4), (99, 5)])
def test_a_new_file_is_a_method_and_its_order_decides_its_place(tiny, trainer_for, new_file, order, place):
    new_file("a_new_method", NEW_METHOD.format(order=order))
    trainer, batches = trainer_for(tiny("ssepa"))
    names = [type(part).__name__ for part in trainer.objectives]
    assert names.index("Smallness") == place and len(names) == 6
    terms = trainer.step(next(batches))
    assert terms["smallness"] > 0 and trainer.weights["smallness"] == 0.5


def test_a_file_without_objectives_is_no_method(tiny, trainer_for, new_file):
    new_file("a_new_helper", "ORDER = 1\n")
    assert len(trainer_for(tiny("ssepa"))[0].objectives) == 5
