"""The pseudo-label as a target of the class activation map."""

from types import SimpleNamespace

import pytest
import torch

from ssepa_lib.methods.feedback import CamFeedback, majority_labels, objectives


def test_the_majority_of_a_patch_counts_and_ties_go_to_the_smaller_label():
    label = torch.tensor([[[1, 1, 2, 0], [1, 0, 2, 0], [255, 255, 3, 3], [255, 0, 3, 3]]])
    assert majority_labels(label, (2, 2), (2, 2)).tolist() == [[[1, 0], [255, 3]]]


def test_labels_whose_size_is_no_multiple_of_the_patch_are_resized():
    label = torch.zeros(1, 5, 7, dtype=torch.long)
    label[:, :, 4:] = 2
    assert majority_labels(label, (2, 2), (3, 3)).tolist() == [[[0, 2], [0, 2]]]


def test_the_term_by_hand(tiny):
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


def test_it_is_part_of_a_recipe_that_weighs_it_and_starts_with_segmentation(tiny, trainer_for):
    assert objectives(tiny("ssepa"), None) == []
    recipe = tiny("ssepa", **{"losses.cam": 0.1, "losses.segmentation_start": 0.5})
    trainer, batches = trainer_for(recipe)
    assert trainer.weights["cam"] == pytest.approx(0.1)
    seen = ["cam" in trainer.step(next(batches)) for _ in range(4)]
    assert seen == [False, False, False, True]
    part = trainer.objectives[-1]
    assert isinstance(part, CamFeedback) and part.background.grad.isfinite().all() and part.background.any()
