"""Calibration, deflation and balance of maps against slow versions, and on degenerate input."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssepa_lib.compose import load_recipe
from ssepa_lib.errors import UserError
from ssepa_lib.labels import Refiner, multi_scale_cam
from ssepa_lib.labels.calibrate import BINS, calibrate, otsu_threshold
from ssepa_lib.model import Attention, PatchAffinity, build_network
from ssepa_lib.model.affinity import covered


def slow_otsu(values: np.ndarray) -> float:
    """The best of the thresholds k / BINS by trying them all."""
    bins = np.minimum((values * BINS).astype(int), BINS - 1)
    centres = (bins + 0.5) / BINS
    best, at = -1.0, 0
    for k in range(1, BINS):
        low, high = centres[bins < k], centres[bins >= k]
        if len(low) and len(high):
            spread = len(low) * len(high) * (low.mean() - high.mean()) ** 2
            if spread > best * (1 + 1e-9):
                best, at = spread, k
    return at / BINS


def attention(batch=2, layers=3, heads=2, patches=9, prefix=1, width=4, seed=0) -> Attention:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, prefix + patches, width)
    queries, keys = (
        [2 * torch.randn(shape, generator=generator) for _ in range(layers)] for _ in ("queries", "keys")
    )
    return Attention(queries, keys, prefix, (3, patches // 3))


def test_otsu_equals_trying_every_threshold():
    maps = torch.rand(2, 3, 12, 10) ** torch.tensor([1.0, 2.0, 0.5])[None, :, None, None]
    found, exists = otsu_threshold(maps)
    assert exists.all()
    for b in range(2):
        for c in range(3):
            assert found[b, c] == pytest.approx(slow_otsu(maps[b, c].numpy().ravel()), abs=1e-6)


def test_otsu_ignores_padding():
    maps = torch.rand(1, 2, 8, 8)
    valid = torch.zeros(1, 8, 8)
    valid[:, :5] = 1
    alone, _ = otsu_threshold(maps[:, :, :5])
    padded = maps.clone()
    padded[:, :, 5:] = 0
    assert torch.equal(otsu_threshold(padded, valid)[0], alone)


def test_calibration_moves_the_threshold_to_one_half_and_keeps_the_order():
    maps = torch.rand(1, 1, 16, 16) ** 3
    threshold, _ = otsu_threshold(maps)
    calibrated = calibrate(maps)
    assert torch.equal(calibrated > 0.5, maps > threshold[..., None, None])
    assert torch.equal(calibrated.flatten().argsort(), maps.flatten().argsort())
    assert calibrated.amin() >= 0 and calibrated.amax() <= 1


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_a_constant_map_stays_as_it_is(value):
    maps = torch.full((1, 2, 4, 4), value)
    assert torch.allclose(calibrate(maps), maps)


def test_one_pixel_and_all_padding_are_finite():
    assert torch.isfinite(calibrate(torch.ones(1, 1, 1, 1))).all()
    assert torch.isfinite(calibrate(torch.rand(1, 1, 4, 4), torch.zeros(1, 4, 4))).all()


def test_deflation_removes_the_mean_of_the_valid_patches():
    qk = attention()
    cam = torch.rand(2, 9, 3)
    valid = torch.ones(2, 9)
    valid[0, 6:] = 0
    plain = PatchAffinity(qk, iterations=2) @ cam
    found = PatchAffinity(qk, iterations=2, deflate=True, valid=valid) @ cam
    for b in range(2):
        rows = valid[b] == 1
        expected = (plain[b] - plain[b][rows].mean(0)).clamp(min=0) * valid[b][:, None]
        assert torch.allclose(found[b], expected, atol=1e-6)
    everywhere = PatchAffinity(qk, deflate=True) @ torch.ones(2, 9, 1)
    assert torch.isfinite(everywhere).all()


@pytest.mark.parametrize("strategy", ["matrix_free", "stack_layers", "stack_heads"])
def test_balance_against_loops(strategy):
    qk = attention()
    plain = PatchAffinity(qk).dense()
    affinity = PatchAffinity(qk, balance=True, iterations=2, strategy=strategy)
    for b in range(2):
        matrix = plain[b].clone()
        for j in range(9):
            matrix[:, j] = matrix[:, j] / matrix[:, j].sum()
        for i in range(9):
            matrix[i] = matrix[i] / matrix[i].sum()
        matrix = (matrix + matrix.T) / 2
        assert torch.allclose(affinity.dense()[b], matrix, atol=1e-6)
        cam = torch.rand(9, 2)
        assert torch.allclose((affinity @ cam.expand(2, -1, -1))[b], matrix @ (matrix @ cam), atol=1e-6)
    assert torch.allclose(affinity.row(4), affinity.dense()[:, 4])
    assert torch.allclose(affinity.dense(), affinity.dense().mT, atol=1e-6)


def test_balance_leaves_padding_out():
    qk = attention(batch=1)
    valid = torch.ones(1, 9)
    valid[0, 3] = 0
    matrix = PatchAffinity(qk, balance=True, valid=valid).dense()[0]
    assert (matrix[3] == 0).all() and (matrix[:, 3] == 0).all()
    nothing = PatchAffinity(qk, balance=True, valid=torch.zeros(1, 9)) @ torch.rand(1, 9, 2)
    assert torch.equal(nothing, torch.zeros(1, 9, 2))


@pytest.mark.parametrize("options", [{}, {"balance": True}, {"strategy": "stack_layers"}])
def test_maps_that_cover_enough_are_not_multiplied_again(options):
    qk, limit = attention(), 0.45
    cam = torch.rand(2, 9, 4) ** 3
    cam[0, :, 0] = 0.0
    valid = torch.ones(2, 9)
    valid[0, 6:] = 0
    matrix = PatchAffinity(qk, valid=valid, **options).dense()
    found = PatchAffinity(qk, iterations=3, coverage=limit, valid=valid, **options) @ cam
    lengths = set()
    for b, c in itertools.product(range(2), range(4)):
        column, times = matrix[b] @ cam[b, :, c], 1
        while times < 3:
            inside = column[valid[b] == 1]
            scaled = (inside - inside.min()) / max(float(inside.max() - inside.min()), 1e-9)
            if scaled.mean() >= limit:
                break
            column, times = matrix[b] @ column, times + 1
        lengths.add(times)
        assert torch.allclose(found[b, :, c], column, atol=1e-6)
    assert len(lengths) > 1, "some maps spread further than others"


def test_coverage_of_degenerate_maps():
    assert covered(torch.zeros(1, 4, 1)).item() == 0 == covered(torch.ones(1, 1, 1)).item()
    assert covered(torch.rand(1, 4, 1), torch.zeros(1, 4)).isfinite().all()
    half = torch.tensor([1.0, 1, 0, 0, 9]).view(1, 5, 1)
    assert covered(half, torch.tensor([[1.0, 1, 1, 1, 0]])).item() == 0.5


def test_one_patch_alone():
    qk = attention(batch=1, patches=3)
    single = Attention([q[:, :, :2] for q in qk.queries], [k[:, :, :2] for k in qk.keys], 1, (1, 1))
    for options in ({"deflate": True}, {"balance": True, "iterations": 3, "coverage": 0.25}):
        assert torch.isfinite(PatchAffinity(single, **options) @ torch.ones(1, 1, 2)).all()


def test_pooling_by_maximum():
    qk = attention()
    for descriptor, first in (("patch", 1), ("full", 0)):
        for strategy in ("matrix_free", "stack_layers"):
            affinity = PatchAffinity(qk, descriptor=descriptor, pooling="max", strategy=strategy)
            expected = [qk.layer_map(k).mean(1)[:, first:, first:].amax((1, 2)) for k in range(3)]
            assert torch.allclose(affinity.descriptor(), torch.stack(expected, 1), atol=1e-6)


@pytest.mark.parametrize("method", ["toco", "ssepa_plus"])
@pytest.mark.parametrize("label", [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]])
def test_calibrated_cams_on_any_label(tiny, method, label):
    """Only the map that labels are made from is calibrated, and it is finite for no, one and every class."""
    recipe = tiny(method)
    network = build_network(recipe, tuple("abcdef")).eval()
    image = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    labels, box = torch.tensor([label, label]).float(), torch.tensor([[0, 32, 0, 20], [0, 0, 0, 0]])
    refiner = None if method == "toco" else Refiner(replace(recipe.affinity, deflate=True), network.haaf)
    plain = multi_scale_cam(network, image, labels, recipe.cam, refiner, box=box)
    cams = multi_scale_cam(network, image, labels, replace(recipe.cam, calibrate="otsu"), refiner, box=box)
    assert torch.isfinite(cams.for_labels).all()
    assert torch.equal(cams.auxiliary, plain.auxiliary)
    assert (method == "toco") or torch.equal(cams.main, plain.main)
    valid = torch.zeros(2, 32, 32)
    valid[0, :, :20] = 1
    expected = calibrate(plain.for_labels, valid)
    assert torch.allclose(cams.for_labels, expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"affinity.kind": "none", "affinity.deflate": True}, "needs an affinity"),
        ({"affinity.kind": "none", "affinity.balance": True}, "needs an affinity"),
        (
            {"affinity.kind": "mean", "affinity.balance": True, "affinity.attention": "logits"},
            "probabilities",
        ),
        ({"cam.calibrate": "median"}, "calibrate"),
    ],
)
def test_contradictions_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        load_recipe("shapes/toco", changes)


def test_gamma_is_finite_at_the_ends():
    low = torch.zeros(1, 1, 10, 10)
    low[..., 0, 0] = 1
    threshold, exists = otsu_threshold(low)
    assert exists.all() and 0 < threshold.item() < 1
    assert math.isfinite(calibrate(low).sum().item())
