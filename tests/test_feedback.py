"""Feedback of labels on the map, the EMA copy that makes the maps, and the objective "variance" of HAAF."""

from types import SimpleNamespace

import torch

from ssepa_lib.data import build_dataset, train_loader
from ssepa_lib.methods.feedback import ABSENT, CamFeedback, majority_labels
from ssepa_lib.methods.losses import unexplained_variance
from ssepa_lib.training import Trainer


def test_majority_against_counting():
    label = torch.randint(0, 4, (2, 8, 12))
    label[0, :4, :4] = 255
    found = majority_labels(label, (2, 3), (4, 4))
    for b in range(2):
        for i in range(2):
            for j in range(3):
                pixels = label[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten().tolist()
                counts = {value: pixels.count(value) for value in pixels}
                best = min(value for value, count in counts.items() if count == max(counts.values()))
                assert found[b, i, j] == best


def test_labels_whose_size_is_no_multiple_of_the_patch_are_resized():
    label = torch.zeros(1, 5, 7, dtype=torch.long)
    label[:, :, 4:] = 2
    assert majority_labels(label, (2, 2), (3, 3)).tolist() == [[[0, 2], [0, 2]]]


def test_feedback_by_hand(tiny):
    part = CamFeedback(tiny("toco", **{"losses.cam": 0.1}))
    with torch.no_grad():
        part.background.fill_(0.5)
    patches = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # two patches of width 2, side by side
    weight = torch.tensor([[1.0, 3.0], [9.0, 9.0], [2.0, 0.0]])  # the second of three classes is absent
    network = SimpleNamespace(classifier=lambda x: x @ weight.T, backbone=SimpleNamespace(patch_size=(1, 1)))
    step = SimpleNamespace(
        network=network,
        output=SimpleNamespace(patches=patches, grid=(1, 2)),
        batch=SimpleNamespace(label=torch.tensor([[1.0, 0.0, 1.0]])),
        pseudo_label=torch.tensor([[[3, 0]]]),
    )
    first = -torch.tensor([0.5, 1.0, 2.0]).log_softmax(0)[2]  # background, class 1, class 3
    second = -torch.tensor([0.5, 6.0, 0.0]).log_softmax(0)[0]
    torch.testing.assert_close(part(step)["cam"], (first + second) / 2)


def run(recipe, steps):
    dataset = build_dataset(recipe.data, "train")
    trainer = Trainer(recipe, dataset.classes, torch.device("cpu"))
    terms = []
    for batch in train_loader(dataset, recipe):
        if len(terms) == steps:
            break
        terms.append(trainer.step(batch))
    return trainer, terms


def test_feedback_reaches_the_main_classifier_and_starts_with_segmentation(tiny):
    recipe = tiny("ssepa_affinity", **{"losses.cam": 0.1, "losses.segmentation_start": 0.5})
    trainer, terms = run(recipe, 6)
    assert ["cam" in step for step in terms] == [False] * 3 + [True] * 3
    feedback = next(part for part in trainer.objectives if "cam" in part.weights)
    assert feedback.background.grad is not None
    assert trainer.weights["cam"] == 0.1 and ABSENT < 0


def test_the_maps_come_from_the_teacher(tiny):
    """With momentum 1 the teacher stays at the initial weights."""
    recipe = tiny("ssepa_affinity", **{"cam.teacher_momentum": 1.0, "losses.segmentation_start": 0.0})
    trainer, _ = run(recipe, 3)
    first = Trainer(recipe, trainer.network.classes, torch.device("cpu"))
    for new, old in zip(trainer.teacher.module.parameters(), first.network.parameters(), strict=True):
        assert torch.equal(new, old)
    state = trainer.state_dict()
    first.load_state_dict(state)
    assert first.index == 3
    moving, _ = run(tiny("ssepa_affinity", **{"cam.teacher_momentum": 0.5}), 3)
    changed = zip(moving.teacher.module.parameters(), first.teacher.module.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in changed)


def test_unexplained_variance_against_loops():
    tokens, maps = torch.randn(2, 6, 5), torch.rand(2, 6, 3)
    valid, label = torch.ones(2, 6), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    valid[1, 4:] = 0
    total, count = 0.0, 0
    for b in range(2):
        rows = valid[b] == 1
        u = tokens[b][rows] - tokens[b][rows].mean(0)
        u = u / u.norm(dim=1, keepdim=True)
        for c in range(3):
            if label[b, c]:
                m = maps[b, rows, c]
                sides = [(s[:, None] * u).sum(0).square().sum() / s.sum() for s in (m, 1 - m)]
                total, count = total + 1 - sum(sides) / rows.sum(), count + 1
    found = unexplained_variance(tokens, maps, valid, label)
    assert torch.allclose(found, total / count, atol=1e-5)


def test_a_map_that_covers_its_cluster_explains_more_than_a_part_of_it():
    tokens = torch.cat([torch.randn(1, 1, 8).expand(-1, 6, -1), torch.randn(1, 1, 8).expand(-1, 6, -1)], 1)
    tokens = tokens + 0.1 * torch.randn(1, 12, 8)
    whole, part = torch.zeros(1, 12, 1), torch.zeros(1, 12, 1)
    whole[:, :6] = 1
    part[:, :2] = 1
    one = torch.ones(1, 12), torch.ones(1, 1)
    assert unexplained_variance(tokens, whole, *one) < unexplained_variance(tokens, part, *one)


def test_the_objective_trains_haaf_alone(tiny):
    trainer, terms = run(tiny("ssepa_plus", **{"losses.segmentation_start": 0.0}), 2)
    assert 0 <= float(terms[-1]["haaf"]) <= 1
    gradients = [parameter.grad for parameter in trainer.network.haaf.parameters()]
    assert all(torch.isfinite(g).all() for g in gradients) and gradients[-1].abs().sum() > 0
