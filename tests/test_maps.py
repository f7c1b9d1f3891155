"""Measures of maps on four pixels, with the expected number beside them."""

import math

import pytest
import torch

from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.maps import floor, mass_by_part, patch_ids

PARTS = torch.tensor([[1, 2], [2, 0]])


def test_mass_by_part():
    map = torch.tensor([[4.0, 2.0], [1.0, 1.0]])
    assert mass_by_part(map, PARTS).tolist() == pytest.approx([4 / 8, 3 / 8, 1 / 8])
    negative = torch.tensor([[4.0, -2.0], [0.0, 4.0]])
    shares = mass_by_part(torch.stack([map, negative, torch.zeros(2, 2)]), torch.stack([PARTS] * 3))
    assert shares.shape == (3, 3) and shares[1].tolist() == [0.5, 0, 0.5] and shares[2].isnan().all()


def test_everything_else_is_ground():
    assert mass_by_part(torch.ones(1, 2), torch.tensor([[255, 2]])).tolist() == [0, 0.5, 0.5]


def test_floor():
    map, mask = torch.tensor([[0.1, 0.3, 0.2], [0.8, 0.4, 0.9]]), torch.tensor([[0, 0, 0], [1, 1, 255]])
    assert floor(map, mask) == pytest.approx(0.2 / 0.9)
    assert math.isnan(floor(map, torch.ones(2, 3))) and math.isnan(floor(torch.zeros(2, 3), mask))


def test_sizes_that_differ_are_refused():
    with pytest.raises(UserError, match="same size"):
        mass_by_part(torch.ones(4, 4), PARTS)
    with pytest.raises(UserError, match="same size"):
        floor(torch.ones(4, 4), PARTS)


def test_a_patch_belongs_to_the_class_of_most_of_its_pixels():
    mask = torch.tensor(
        [
            [7, 0, 3, 255],
            [7, 7, 255, 255],  # patch 1: one pixel of class 3 and three ignored ones
            [0, 2, 255, 255],
            [2, 0, 255, 255],  # patch 2: a tie, the lower class
        ],
        dtype=torch.uint8,
    )
    assert patch_ids(mask, (2, 2)).tolist() == [[7, 3], [0, 255]]
    assert patch_ids(mask, (1, 1)).tolist() == [[0]]
    assert patch_ids(mask[2:, 2:], (1, 1)).tolist() == [[255]]


def test_the_pixel_in_the_corner_of_a_patch_does_not_decide():
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[1:5, 1:5] = 1  # an object that begins one pixel after the corner of a patch
    assert patch_ids(mask, (2, 2)).tolist() == [[1, 0], [0, 0]]
    assert patch_ids(torch.ones(7, 5, dtype=torch.uint8), (3, 2)).tolist() == [[1, 1]] * 3
