"""Pixel and token pseudo-labels against loops over images and pixels."""

import pytest
import torch
import torch.nn.functional as F

from ssepa_lib.labels import PseudoLabeler
from ssepa_lib.labels.pseudo_labels import inside
from ssepa_lib.recipe import CamConfig


def slow_labels(image, cam, label, par, threshold):
    """One image [3, H, W] at a time, only the classes present, argmax mapped back to class ids."""
    h, w = image.shape[-2:]
    classes = [c for c in range(len(label)) if label[c] > 0]
    scores = torch.cat([torch.full((1, h, w), threshold), cam[classes]])[None]
    scores = F.interpolate(scores, (h // 2, w // 2), mode="bilinear", align_corners=False).softmax(1)
    small = F.interpolate(image[None].float(), (h // 2, w // 2), mode="bilinear", align_corners=False)
    refined = F.interpolate(par(small, scores), (h, w), mode="bilinear", align_corners=False)
    return torch.tensor([0] + [c + 1 for c in classes])[refined[0].argmax(0)]


@pytest.fixture
def crops():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 3, 24, 20), dtype=torch.uint8)
    cam = F.interpolate(torch.rand(3, 5, 4, 4), (24, 20), mode="bilinear")
    # three, one and no class present
    label = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0.0]])
    return image, cam, label


@pytest.fixture
def labeler():
    return PseudoLabeler(
        CamConfig(high=0.7, low=0.25, background=0.5, par_dilations=[1, 2], par_iterations=3)
    )


def test_training_labels_equal_the_loop(crops, labeler):
    image, cam, label = crops
    box = torch.tensor([[0, 24, 0, 20], [5, 24, 0, 13], [2, 20, 3, 20]])
    result = labeler.training_labels(image, cam, label, box)
    assert result.dtype == torch.long
    for i in range(3):
        high = slow_labels(image[i], cam[i], label[i], labeler.par, 0.7)
        low = slow_labels(image[i], cam[i], label[i], labeler.par, 0.25)
        expected = torch.full((24, 20), 255)
        y0, y1, x0, x1 = box[i].tolist()
        for y in range(y0, y1):
            for x in range(x0, x1):
                if high[y, x] != 0:
                    expected[y, x] = high[y, x]
                elif low[y, x] == 0:
                    expected[y, x] = 0
        assert torch.equal(result[i], expected)
    assert set(result[0].unique().tolist()) >= {2, 4, 255}
    assert set(result[2].unique().tolist()) == {0, 255}, (
        "without classes everything inside the box is background"
    )


def test_absent_classes_never_appear_and_need_no_masking_first(crops, labeler):
    image, cam, label = crops
    box = torch.tensor([[0, 24, 0, 20]] * 3)
    loud = torch.where(label[:, :, None, None] > 0, cam, 1.0)
    silent = cam * label[:, :, None, None]
    assert torch.equal(
        labeler.training_labels(image, loud, label, box), labeler.training_labels(image, silent, label, box)
    )


def test_a_batch_without_any_class_is_background(crops, labeler):
    image, cam, label = crops
    assert (labeler.labels(image, cam, torch.zeros_like(label)) == 0).all()


def test_evaluation_labels_equal_the_loop_and_ignore_nothing(crops, labeler):
    image, cam, label = crops
    result = labeler.labels(image, cam, label)
    for i in range(3):
        assert torch.equal(result[i], slow_labels(image[i], cam[i], label[i], labeler.par, 0.5))


def test_token_labels_at_and_between_the_thresholds(labeler):
    cam = torch.tensor([[0.9, 0.7, 0.71, 0.1, 0.25, 0.0], [0.8, 0.0, 0.72, 0.2, 0.26, 0.0]]).view(1, 2, 2, 3)
    cam = torch.cat([cam, torch.zeros_like(cam)])
    assert labeler.token_labels(cam, (2, 3)).tolist() == [[1, 255, 2, 0, 255, 0], [0] * 6]


def test_inside_is_half_open():
    mask = inside(torch.tensor([[1, 3, 0, 2]]), (4, 3))
    assert mask.long().tolist() == [[[0, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0]]]


def test_the_labeler_has_nothing_to_learn_or_to_save(labeler):
    assert not list(labeler.parameters()) and not labeler.state_dict()
