import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion

from ssepa_lib.evaluation.scores import (
    BoundaryIoU,
    Confusion,
    ThresholdConfusion,
    boundary_band,
    mean_average_precision,
)

CLASSES = ("circle", "square")


def test_confusion_by_hand():
    confusion = Confusion(CLASSES)
    confusion.update(torch.tensor([0, 1, 1, 1, 0]), torch.tensor([0, 1, 0, 1, 255]))
    assert confusion.matrix.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert confusion.per_class == {"background": 50.0, "circle": pytest.approx(200 / 3), "square": None}
    assert confusion.miou == pytest.approx((50 + 200 / 3) / 2)


def test_confusion_is_over_the_split_not_a_mean_over_images():
    together, first, second = Confusion(CLASSES), Confusion(CLASSES), Confusion(CLASSES)
    pairs = [(torch.tensor([1, 1, 1, 1]), torch.tensor([1, 1, 1, 1])), (torch.tensor([0]), torch.tensor([1]))]
    for part, pair in zip((first, second), pairs, strict=True):
        part.update(*pair)
        together.update(*pair)
    assert together.per_class["circle"] == 80.0
    assert together.per_class["circle"] != (first.per_class["circle"] + second.per_class["circle"]) / 2


def test_an_empty_confusion_has_no_number():
    empty = Confusion(CLASSES)
    assert empty.miou is empty.precision is empty.recall is BoundaryIoU(CLASSES).mean is None


def test_predicted_but_absent_class_counts_as_zero():
    confusion = Confusion(CLASSES)
    confusion.update(torch.tensor([0, 2]), torch.tensor([0, 0]))
    assert confusion.miou == pytest.approx((50 + 0) / 2)


def test_precision_and_recall_by_hand():
    confusion = Confusion(CLASSES)
    confusion.update(torch.tensor([1, 1, 1, 0, 0, 1]), torch.tensor([1, 1, 0, 1, 0, 255]))
    assert confusion.precision == pytest.approx(200 / 3) and confusion.recall == pytest.approx(200 / 3)
    confusion.update(torch.tensor([0, 0]), torch.tensor([2, 1]))  # the square is there and never predicted
    assert confusion.precision == pytest.approx((200 / 3 + 0) / 2)
    assert confusion.recall == pytest.approx((50 + 0) / 2)
    only_predicted = Confusion(CLASSES)
    only_predicted.update(torch.tensor([1, 2]), torch.tensor([1, 0]))
    assert (only_predicted.precision, only_predicted.recall) == (50, 50)


def test_foreground_alone_counts_for_precision_and_recall():
    confusion = Confusion(CLASSES)
    confusion.update(torch.tensor([0, 0]), torch.tensor([0, 0]))
    assert confusion.miou == 100 and confusion.precision is None and confusion.recall is None


def test_threshold_histogram_equals_one_argmax_per_threshold():
    cam = torch.rand(2, 40, 30)
    cam[:, 0, :5] = 0.5  # ties with a threshold stay background
    mask = torch.randint(0, 4, (40, 30)).where(torch.rand(40, 30) > 0.1, torch.tensor(255))
    mask[mask == 3] = 0
    curve = ThresholdConfusion(CLASSES, (0.1, 0.5, 0.9))
    value, index = cam.max(0)
    curve.update(value, index + 1, mask)
    for threshold in (0.1, 0.5, 0.9):
        slow = Confusion(CLASSES)
        slow.update(torch.cat([torch.full_like(cam[:1], threshold), cam]).argmax(0), mask)
        assert torch.equal(curve.at(threshold).matrix, slow.matrix)


@pytest.mark.parametrize(("size", "distance"), [((12, 9), 1), ((120, 90), 3), ((300, 400), 10)])
def test_the_band_is_what_erosion_removes_from_every_class(size, distance):
    noise = torch.nn.functional.interpolate(torch.rand(1, 1, 5, 6), size, mode="bilinear")[0, 0]
    labels = (4 * noise).byte()
    labels[noise > 0.9] = 255
    slow = torch.zeros(size, dtype=torch.bool)
    for i in labels.unique():
        own = (labels == i).numpy()
        eroded = binary_erosion(own, np.ones((3, 3)), iterations=distance, border_value=0)
        slow |= torch.from_numpy(own & ~eroded)
    assert torch.equal(boundary_band(labels), slow) and not slow.all()


def test_boundary_iou_by_hand():
    mask = torch.zeros(10, 10, dtype=torch.uint8)  # the distance is 1 pixel
    mask[2:8, 2:8] = 1
    prediction = torch.zeros_like(mask)
    prediction[2:8, 2:7] = 1  # one column too narrow
    score = BoundaryIoU(CLASSES)
    score.update(prediction, mask)
    # circle: rings of 20 and 18 pixels share the left column (6) and four each of the top and bottom rows
    # background: the image edge (36) and the ring around the square (28, 26); of the second ring 6 are circle
    assert score.intersection.tolist() == [36 + 26 - 6, 14, 0]
    assert score.union.tolist() == [(36 + 28) + (36 + 26) - 56, 20 + 18 - 14, 0]
    assert score.mean == pytest.approx(100 * (56 / 70 + 14 / 24) / 2)


def test_boundary_iou_of_equal_and_of_thick_shapes():
    mask = torch.zeros(200, 200, dtype=torch.long)
    mask[50:150, 50:150] = 2
    same, wider, plain = BoundaryIoU(CLASSES), BoundaryIoU(CLASSES), Confusion(CLASSES)
    same.update(mask, mask)
    assert same.mean == 100
    prediction = torch.zeros_like(mask)
    prediction[45:155, 45:155] = 2
    wider.update(prediction, mask, boundary_band(mask))
    plain.update(prediction, mask)
    assert wider.mean < 35 < 85 < plain.miou  # nearly the whole area is right, the boundary is not


def test_what_the_mask_leaves_out_does_not_count_at_the_boundary():
    mask = torch.zeros(60, 60, dtype=torch.long)
    mask[20:40, 20:40] = 1
    prediction = mask.clone()
    mask[18:22] = mask[38:42] = 255  # the prediction's boundary lies in between
    score = BoundaryIoU(CLASSES)
    score.update(prediction, mask)
    assert score.mean == 100


def test_boundary_counts_add_up_over_images():
    first, second = torch.randint(0, 3, (2, 30, 30)), torch.randint(0, 3, (2, 30, 30))
    together, parts = BoundaryIoU(CLASSES), [BoundaryIoU(CLASSES) for _ in range(2)]
    for part, pair in zip(parts, (first, second), strict=True):
        part.update(*pair)
        together.update(*pair)
    union = sum(part.union for part in parts)
    assert torch.equal(together.union, union)
    assert together.mean == pytest.approx(100 * float((sum(p.intersection for p in parts) / union).mean()))


def test_mean_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert mean_average_precision(scores, labels) == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert mean_average_precision(scores, torch.zeros(3, 2)) is None


def test_mean_average_precision_ranks_high_scores():
    """A sigmoid in single precision is 1 from 17 on, which would make them equal."""
    scores, labels = torch.tensor([[20.0], [21.0], [22.0]]), torch.tensor([[1.0], [0.0], [1.0]])
    assert mean_average_precision(scores, labels) == mean_average_precision(scores - 20, labels)
