"""Affinities that are plain matrices, on grids small enough to check by hand."""

import math

import pytest
import torch

from ssepa_lib.errors import UserError
from ssepa_lib.model import Attention, PatchAffinity
from ssepa_lib.model.matrix_affinity import MatrixAffinity, gaussian, positions, same_object


def test_it_stands_in_for_the_patch_affinity():
    attention = Attention([torch.randn(2, 3, 7, 8)] * 2, [torch.randn(2, 3, 7, 8)] * 2, 1, (2, 3))
    patch, cam = PatchAffinity(attention), torch.rand(2, 6, 4)
    matrix = MatrixAffinity(patch.dense())
    torch.testing.assert_close(matrix @ cam, patch @ cam)
    assert torch.equal(matrix.dense(), patch.dense()) and torch.equal(matrix.row(5), patch.dense()[:, 5])
    assert matrix.weights.tolist() == [[1], [1]] and len(matrix) == 1
    torch.testing.assert_close(matrix.row(5), patch.row(5))


def test_identity_moves_nothing_and_a_constant_gives_the_mean():
    cam = torch.tensor([[[0.0], [3.0], [6.0]]])
    assert torch.equal(MatrixAffinity(torch.eye(3)[None]) @ cam, cam)
    assert (MatrixAffinity(torch.full((1, 3, 3), 1 / 3)) @ cam).flatten().tolist() == pytest.approx([3, 3, 3])


def test_gaussian_of_two_patches_by_hand():
    assert positions((2, 2)).tolist() == [[[0, 0], [0, 1], [1, 0], [1, 1]]]
    near = math.exp(-0.5)  # distance 1, width 1
    expected = [1 / (1 + near), near / (1 + near)]
    assert gaussian(positions((1, 2)), 1.0).row(0)[0].tolist() == pytest.approx(expected)
    rows = gaussian(torch.rand(2, 9, 3), 0.2).dense().sum(-1)
    torch.testing.assert_close(rows, torch.ones(2, 9))


def test_same_object_averages_within_objects():
    cam = torch.tensor([[[8.0], [0.0], [1.0], [3.0]]])
    means = same_object(torch.tensor([[1, 1, 0, 0]])) @ cam
    assert means.flatten().tolist() == [4, 4, 2, 2]


def test_what_does_not_fit_is_refused_in_a_sentence():
    with pytest.raises(UserError, match=r"\[3, 3\]"):
        MatrixAffinity(torch.eye(3))
    affinity = MatrixAffinity(torch.eye(3)[None])
    for patch in (-1, 3):
        with pytest.raises(UserError, match=f"patch {patch} does not exist; choose 0..2"):
            affinity.row(patch)
    with pytest.raises(UserError, match="without heads"):
        affinity.row(0, layer=1)
    with pytest.raises(UserError, match="above 0"):
        gaussian(positions((2, 2)), 0.0)
