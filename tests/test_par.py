"""Pixel-adaptive refinement against a loop over pixels; the dense CRF and its process pool."""

import math
import sys

import numpy as np
import pytest
import torch

from ssepa_lib.errors import UserError
from ssepa_lib.labels.crf import crf_available, crf_pool, dense_crf
from ssepa_lib.labels.par import PixelAdaptiveRefinement

needs_crf = pytest.mark.skipif(not crf_available(), reason="pydensecrf2 is not installed")


def softmax(values):
    return np.exp(values) / np.exp(values).sum()


def slow_refinement(image, scores, dilations, iterations):
    """One image [3, H, W] and its scores [C, H, W], pixel by pixel, straight from the definition."""
    _, h, w = image.shape
    shifts = [(d * y, d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    distance = np.array([math.hypot(*s) for s in shifts])
    position = softmax(-((distance / (0.3 * distance.std(ddof=1))) ** 2))
    for _ in range(iterations):
        result = np.zeros_like(scores)
        for y in range(h):
            for x in range(w):
                at = [(min(max(y + dy, 0), h - 1), min(max(x + dx, 0), w - 1)) for dy, dx in shifts]
                colours = np.stack([image[:, a, b] for a, b in at])  # [neighbours, 3]
                ratio = np.abs(colours - image[:, y, x]) / (0.3 * colours.std(0, ddof=1))
                weight = softmax(-(ratio**2).mean(1)) + 0.01 * position
                result[:, y, x] = sum(g * scores[:, a, b] for g, (a, b) in zip(weight, at, strict=True))
        scores = result
    return scores


def test_refinement_equals_the_definition_for_every_image_of_a_batch():
    rng = np.random.default_rng(0)
    image, scores = rng.integers(0, 256, (2, 3, 7, 9)).astype(float), rng.random((2, 3, 7, 9))
    refined = PixelAdaptiveRefinement([1, 2, 4], 2)(torch.tensor(image), torch.tensor(scores))
    slow = [slow_refinement(i, s, [1, 2, 4], 2) for i, s in zip(image, scores, strict=True)]
    np.testing.assert_allclose(refined, np.stack(slow), rtol=1e-5, atol=1e-6)


def test_default_dilations_give_48_neighbours_whose_weights_sum_to_1_01():
    weights = PixelAdaptiveRefinement([1, 2, 4, 8, 12, 24], 10).weights(torch.rand(1, 3, 16, 16) * 255)
    assert weights.shape == (1, 48, 16, 16)
    torch.testing.assert_close(weights.sum(1), torch.full((1, 16, 16), 1.01))


def test_scores_spread_along_colour_and_stop_at_edges():
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 200
    image += torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    scores = torch.zeros(1, 1, 16, 16)
    scores[..., 8, 2] = 1
    refined = PixelAdaptiveRefinement([1, 2, 4], 10)(image, scores)
    assert refined[..., :8].sum() > 100 * refined[..., 8:].sum() > 0


def test_a_flat_image_and_autocast_stay_finite_in_float32_and_need_no_gradient():
    par = PixelAdaptiveRefinement([1, 2], 3)
    scores = torch.rand(1, 2, 8, 8, requires_grad=True)
    plain = par(torch.full((1, 3, 8, 8), 128, dtype=torch.uint8), scores)
    assert plain.isfinite().all() and not plain.requires_grad
    image = torch.rand(1, 3, 8, 8) * 255
    with torch.autocast("cpu", torch.bfloat16):
        mixed = par(image, scores)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, par(image, scores))
    assert not par.state_dict() and not list(par.parameters())


def noisy_square(seed):
    """A bright square on black, uint8 [24, 24, 3], and noisy probabilities [2, 24, 24] of it."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((24, 24), dtype=bool)
    truth[6:18, 6:18] = True
    foreground = np.clip(np.where(truth, 0.7, 0.3) + 0.25 * rng.standard_normal(truth.shape), 0.05, 0.95)
    image = np.repeat((truth[..., None] * 255).astype(np.uint8), 3, axis=2)
    return image, np.stack([1 - foreground, foreground]).astype(np.float32), truth


@needs_crf
def test_dense_crf_follows_the_image():
    image, probabilities, truth = noisy_square(0)
    refined = dense_crf(image, probabilities)
    assert refined.shape == probabilities.shape and refined.dtype == np.float32
    np.testing.assert_allclose(refined.sum(0), 1, atol=1e-4)
    assert (probabilities.argmax(0) != truth).any() and (refined.argmax(0) == truth).all()


def all_classes(image, probabilities):
    """The CRF with every class, however unlikely."""
    from pydensecrf.densecrf import DenseCRF2D

    classes, height, width = probabilities.shape
    crf = DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy(-np.log(np.clip(probabilities, 1e-5, 1)).reshape(classes, -1))
    crf.addPairwiseGaussian(sxy=1, compat=1)
    crf.addPairwiseBilateral(sxy=121, srgb=5, rgbim=image, compat=4)
    return np.array(crf.inference(10)).reshape(classes, height, width)


@needs_crf
def test_classes_that_cannot_win_change_no_label_of_the_dense_crf():
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    logits = np.kron(rng.normal(0, 3, (12, 6, 8)), np.ones((1, 8, 8))) - np.linspace(0, 16, 12)[:, None, None]
    logits += rng.normal(0, 1, logits.shape)
    probabilities = np.exp(logits - logits.max(0)).astype(np.float32)
    probabilities /= probabilities.sum(0)
    refined, slow = dense_crf(image, probabilities), all_classes(image, probabilities)
    left_out = ~refined.any((1, 2))
    assert 2 <= left_out.sum() < 10 and (slow[left_out].max(0) < slow.max(0)).all()
    np.testing.assert_array_equal(refined.argmax(0), slow.argmax(0))


@needs_crf
@pytest.mark.parametrize("processes", [1, 2])
def test_crf_pool_keeps_the_order_and_draws_few_jobs_ahead(processes):
    drawn = []

    def jobs():
        for seed in range(7):
            drawn.append(seed)
            yield *noisy_square(seed)[:2], seed

    results = crf_pool(jobs(), processes)
    first = next(results)
    assert len(drawn) <= 2 * processes
    for seed, (labels, rest) in enumerate([first, *results]):
        assert rest == seed and labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, dense_crf(*noisy_square(seed)[:2]).argmax(0))


def test_a_missing_crf_package_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(UserError, match="crf"):
        dense_crf(*noisy_square(0)[:2])
