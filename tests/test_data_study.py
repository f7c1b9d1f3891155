"""What a dataset could mislead to, counted by hand on little."""

import pytest
import torch
from toy_network import TwoImages

from ssepa_lib.data.shapes import BACKGROUNDS, SHAPE_CLASSES, ShapesDataset, scene_facts
from ssepa_lib.workbook.studies import data_study


def test_classes_and_backgrounds_are_counted_scene_by_scene():
    table = data_study.class_backgrounds("val", 40)
    facts = [scene_facts("val", i) for i in range(40)]
    assert table.to_numpy().sum() == sum(len(set(f.classes)) for f in facts)
    assert table.loc["dotlet", "sand"] == sum("dotlet" in f.classes and f.background == "sand" for f in facts)
    assert list(table.index) == list(SHAPE_CLASSES) and list(table) == list(BACKGROUNDS)


def test_a_class_that_never_comes_alone_is_named():
    labels = torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]])
    assert data_study.inseparable(labels, "abcd") == [("a", "b"), ("c", "b")]


def test_a_constant_guess_is_right_where_its_class_is():
    data = TwoImages()
    counted = torch.cat([data.mask(i).flatten() for i in range(len(data))])
    counted = counted[counted != 255]
    found = data_study.constant_guess(data, 0)
    assert found.matrix[:, 1:].sum() == 0 and found.matrix.sum() == len(counted)
    assert found.iou[0] == pytest.approx(100 * float((counted == 0).float().mean()))


def test_the_border_is_a_frame():
    image = torch.zeros(3, 32, 48)
    image[0, 2:-2, 2:-2] = 200.0  # inside: not seen
    image[1] = 7.0
    assert data_study.border_colour(image).tolist() == [0.0, 7.0, 0.0]
    colours = data_study.border_colours(ShapesDataset("val", 4), [0, 3])
    assert colours.shape == (2, 3) and colours.min() > 0


def test_a_moved_creature_keeps_its_pixels_and_changes_its_ground():
    kinds, home, abroad = data_study.moved_scenes("val", 3)
    first = [i for i in range(10) if len(scene_facts("val", i).classes) == 1][0]
    assert SHAPE_CLASSES[kinds[0]] == scene_facts("val", first).classes[0]
    for one, other in zip(home, abroad, strict=True):
        assert one.shape == other.shape
        assert (data_study.border_colour(one) - data_study.border_colour(other)).abs().max() > 5
