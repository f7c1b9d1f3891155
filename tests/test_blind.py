"""What can be said of maps without masks, and how far a few masks can be trusted."""

import math

import pytest
import torch

from ssepa_lib.data import Subset
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation import evaluate
from ssepa_lib.evaluation.blind import agreement, flip_agreement, judge, kappa
from ssepa_lib.evaluation.bootstrap import bootstrap_interval, first_with_masks, image_matrices, miou_of
from ssepa_lib.evaluation.scores import Confusion
from ssepa_lib.labels import build_refiner


def test_agreement_by_hand():
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    assert agreement(one, one) == 1 and agreement(one, two) == pytest.approx(0.5 / 1.5)
    assert agreement(0 * one, 0 * one) == 1 and agreement(one, 0 * one) == 0


def test_kappa_by_hand():
    assert kappa(torch.tensor([[20, 5], [10, 15]])) == pytest.approx(0.4)  # observed 0.7, chance 0.5
    assert kappa(torch.tensor([[9, 0], [0, 3]])) == 1 and kappa(torch.tensor([[7, 0], [0, 0]])) == 0


def test_a_network_that_sees_no_left_and_right_agrees_with_its_flip(trained, monkeypatch):
    network, recipe, dataset = trained
    numbers = judge(network, recipe, dataset, None)
    assert (
        numbers[["flip", "scale", "median", "area"]].stack().between(0, 1).all() and numbers["flip"].min() < 1
    )
    assert (numbers["PAR"] >= 0).all() and len(numbers) == sum(int(dataset.label(i).sum()) for i in range(4))

    def forward(image, *, original=network.forward, **options):
        output = original(image, **options)
        output.cam[:] = image.mean(1, keepdim=True)[..., ::8, ::8]  # follows the image wherever it goes
        return output

    def columns_of_eight(i):
        image = type(dataset).image(dataset, i).resize((4, 4)).resize((32, 32), 0)
        return image

    monkeypatch.setattr(network, "forward", forward)
    monkeypatch.setattr(dataset, "image", columns_of_eight)
    same = judge(network, recipe, dataset, None)
    assert same["flip"].min() == pytest.approx(1, abs=1e-3)
    assert flip_agreement(network, recipe, dataset, None, [0.5]).loc[0.5] == pytest.approx(1, abs=1e-2)


def test_without_views_and_with_a_refiner_the_rest_is_the_same(trained):
    network, recipe, dataset = trained
    refiner = build_refiner(recipe.affinity, network)
    short, full = (judge(network, recipe, dataset, refiner, views=v) for v in (False, True))
    assert list(short) == ["index", "class", "median", "area", "PAR"]
    assert short.equals(full[list(short)])


def test_image_matrices_add_up_to_the_evaluation(trained):
    network, recipe, dataset = trained
    matrices = image_matrices(network, recipe, dataset, "segmentation")
    result = evaluate(network, recipe, dataset, device="cpu", outputs=("segmentation",))
    assert matrices.shape == (4, 7, 7)
    assert miou_of(matrices.sum(0)) == pytest.approx(result["miou"]["segmentation"])


def test_the_interval_of_equal_images_is_a_point_and_holds_the_score_of_others():
    right, wrong = torch.tensor([[[5, 0], [0, 5]]]), torch.tensor([[[5, 0], [5, 0]]])
    assert bootstrap_interval(right.repeat(6, 1, 1)) == (100, 100)
    mixed = torch.cat([right.repeat(5, 1, 1), wrong.repeat(5, 1, 1)])
    low, high = bootstrap_interval(mixed, seed=1)
    assert low < miou_of(mixed.sum(0)) < high and bootstrap_interval(mixed, seed=1) == (low, high)
    assert bootstrap_interval(mixed, level=0.5)[1] < high
    drawn = torch.randint(10, (1000, 10), generator=torch.Generator().manual_seed(1))
    ends = miou_of(mixed[drawn].sum(1)).quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    assert (low, high) == pytest.approx(tuple(ends.tolist()))
    assert miou_of(wrong[0]) == pytest.approx(25) and not math.isnan(low)


def test_only_images_with_masks_are_measured(trained, monkeypatch):
    network, recipe, dataset = trained
    masks = {1: dataset.mask(1), 3: dataset.mask(3)}
    monkeypatch.setattr(dataset, "mask", masks.get)
    assert Subset(dataset, [0, 1, 3]).masked == 2 and Subset(dataset, []).masked == 0
    assert first_with_masks(dataset) == [1, 3] and first_with_masks(dataset, 1) == [1]
    some = Subset(dataset, [3, 1])
    assert some.ids == [dataset.ids[3], dataset.ids[1]] and torch.equal(some.mask(0), masks[3])
    assert torch.equal(some.label(1), dataset.label(1)) and some.parts(0) is not None
    assert (
        len(image_matrices(network, recipe, some)) == 2 and Confusion(some.classes).names[0] == "background"
    )
    with pytest.raises(UserError, match="has no mask"):
        image_matrices(network, recipe, dataset)
    with pytest.raises(UserError, match="no image to measure"):
        image_matrices(network, recipe, Subset(dataset, []))
