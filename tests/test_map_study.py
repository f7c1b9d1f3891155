from dataclasses import replace

import pandas as pd
import pytest
import torch

from ssepa_lib.data import IGNORE
from ssepa_lib.evaluation import refined_mious
from ssepa_lib.labels import build_refiner, normalise_cam
from ssepa_lib.workbook.studies import haaf_study, map_study
from ssepa_lib.workbook.study import samples


def test_map_iou_leaves_out_what_is_ignored():
    map = torch.tensor([[0.9, 0.9], [0.1, 0.9]])
    mask = torch.tensor([[2, 1], [2, IGNORE]])
    assert map_study.map_iou(map, mask, 1, 0.5) == pytest.approx(100 / 3)  # hit 1 of 3: found 2, there 2
    assert map_study.map_iou(map, torch.zeros(2, 2), 1, 0.95) == 0


def test_measured_maps_agree_with_the_evaluation(trained):
    network, recipe, dataset = trained
    refiners = {"CAM": None, "uniform": haaf_study.uniform_refiner(recipe.affinity)}
    table, curves = map_study.measure_maps(network, recipe, dataset, refiners)
    expected = refined_mious(network, recipe, dataset, refiners)
    assert curves.loc[recipe.cam.background].to_dict() == pytest.approx(expected)
    labelled = [i for i in range(len(dataset)) if dataset.label(i).any()]
    assert sorted(table["index"].unique()) == labelled and len(table) == 2 * len(labelled)
    sums = table[["head", "body", "ground"]].sum(axis=1)
    assert ((sums - 1).abs() < 1e-4).all() and table["iou"].between(0, 100).all()
    first = table[(table["map"] == "CAM") & (table["index"] == labelled[0])].iloc[0]
    _, maps, inside = map_study.case(network, recipe, dataset, labelled[0], refiners)
    again = map_study.map_iou(maps["CAM"], inside.long() * (first["class"] + 1), first["class"], 0.5)
    assert first["iou"] == pytest.approx(again)
    ious, shares = map_study.per_image(table, labelled[:1], ["CAM"])
    assert ious["CAM"] == [first["iou"]] and shares["CAM"] == [
        [first["head"], first["body"], first["ground"]]
    ]
    assert list(map_study.wide(table, "iou").columns) == ["CAM", "uniform"]


def test_maps_are_measured_at_native_size_too(trained):
    """The built-in scenes are not square."""
    network, recipe, dataset = trained
    native = replace(recipe, data=replace(recipe.data, eval_size=0))
    table, _ = map_study.measure_maps(network, native, dataset, {"CAM": None})
    sums = table[["head", "body", "ground"]].sum(axis=1)
    assert len(table) and ((sums - 1).abs() < 1e-4).all()


def test_the_oracle_is_perfect_where_the_map_is_highest_on_the_object(trained, monkeypatch):
    network, recipe, dataset = trained
    one = next(i for i in range(len(dataset)) if dataset.label(i).sum() == 1)
    block = torch.zeros(32, 32, dtype=torch.uint8)
    block[8:24, 8:24] = int(dataset.label(one).argmax()) + 1  # whole patches of 8
    label = dataset.label(one)
    dataset.ids = dataset.ids[:1]
    monkeypatch.setattr(dataset, "mask", lambda i: block)
    monkeypatch.setattr(dataset, "label", lambda i: label)
    with torch.no_grad():
        network.classifier.weight.zero_()
    curve = map_study.oracle_curve(network, recipe, dataset)
    assert curve.max() < 100  # a map of zeros helps nobody

    def forward(image, *, original=network.forward, **options):
        output = original(image, **options)
        output.cam[:] = torch.nn.functional.adaptive_avg_pool2d((block > 0).float()[None, None], output.grid)
        return output

    monkeypatch.setattr(network, "forward", forward)
    assert map_study.oracle_curve(network, recipe, dataset).max() == pytest.approx(100)


def test_pairs_differ_in_the_background_alone(trained):
    network, recipe, _ = trained
    pairs = map_study.background_pairs(network, recipe, {"CAM": None}, pairs=3)
    assert len(pairs) == 3 and pairs[["home", "foreign"]].stack().between(0, 1).all()
    scenes = [map_study._scenes("val", [0], [ground], 32) for ground in ("meadow", "brick")]
    (one, part), (other, same) = scenes
    assert torch.equal(part[0], same[0]) and not torch.equal(one, other)
    single = int(pairs["index"].iloc[0])
    home, foreign = map_study.scene_pair(single, 32)
    assert not torch.equal(home, foreign) and home.shape == (3, 32, 32)


def test_a_dataset_is_measured_where_every_image_has_a_mask(trained, monkeypatch, capsys):
    dataset = trained[2]
    assert map_study.has_masks(dataset) and not capsys.readouterr().out
    monkeypatch.setattr(type(dataset), "masked", 3)
    assert not map_study.has_masks(dataset) and "Only 3 of 4 images" in capsys.readouterr().out
    monkeypatch.setattr(type(dataset), "masked", 0)
    assert not map_study.has_masks(dataset) and "no masks" in capsys.readouterr().out


def test_propagation_ends_in_a_constant_and_starts_with_the_map():
    affinity = map_study.random_rows(9)
    assert torch.allclose(affinity.sum(1), torch.ones(9))
    cam = torch.eye(9)[0]
    start, once, late = map_study.propagated(affinity, cam, [0, 1, 50])
    assert torch.equal(start, cam) and torch.allclose(once, affinity @ cam / (affinity @ cam).max())
    assert late.std() < 1e-4


def test_always_serves_a_batch(trained):
    network, recipe, dataset = trained
    with torch.no_grad():
        attention = network(torch.zeros(2, 3, 32, 32), segment=False, capture=True).attention
    assert map_study.always(torch.eye(16))(attention).shape == (2, 16, 16)


def test_blind_numbers_need_no_mask(trained, monkeypatch):
    network, recipe, dataset = trained
    monkeypatch.setattr(dataset, "mask", lambda i: None)
    numbers = map_study.blind_numbers(network, recipe, dataset, build_refiner(recipe.affinity, network))
    assert list(numbers) == ["median", "area", "PAR"] and numbers.notna().all(axis=None)
    assert isinstance(numbers, pd.DataFrame) and numbers["area"].between(0, 1).all()


def test_a_dataset_without_masks_is_named_in_one_sentence(trained, monkeypatch, capsys):
    dataset = trained[2]
    assert map_study.has_masks(dataset) and capsys.readouterr().out == ""
    monkeypatch.setattr(dataset, "mask", lambda i: None)
    assert not map_study.has_masks(dataset) and "no masks" in capsys.readouterr().out


def test_the_plain_cam_can_be_cut_at_0_before_it_is_enlarged(trained):
    network, recipe, dataset = trained
    shown = [i for i in range(len(dataset)) if dataset.label(i).any()][:2]
    pixels, labels, _ = samples(dataset, shown, 32)
    kinds, refiners = (
        labels.argmax(1).tolist(),
        {"after": None, "before": map_study.unrefined(recipe.affinity)},
    )
    maps = map_study.class_maps(network, recipe, pixels, labels, kinds, refiners)
    with torch.no_grad():
        cam = network(pixels).cam[range(len(shown)), kinds][:, None]  # [n, 1, h, w]
    for name, small in {"after": cam, "before": cam.relu()}.items():
        enlarged = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear").relu()
        assert torch.allclose(maps[name], normalise_cam(enlarged)[:, 0], atol=1e-5)
    assert not torch.equal(maps["after"], maps["before"])


def test_the_menus_of_the_microscope_offer_every_class_of_an_image(trained):
    network, recipe, dataset = trained
    shown = [i for i in range(len(dataset)) if dataset.label(i).any()]
    forms = {
        "uniform": haaf_study.uniform_refiner(recipe.affinity),
        "plain": map_study.unrefined(recipe.affinity),
    }
    panel = map_study.microscopes(network, recipe, dataset, forms, shown)
    offered = panel.menus["image"].options
    assert len(offered) == sum(int(dataset.label(i).sum()) for i in shown)
    assert offered[0] == f"{dataset.ids[shown[0]]}: {dataset.classes[int(dataset.label(shown[0]).argmax())]}"
    before = panel.view.blob
    panel.menus["affinity"].value = "plain"
    assert panel.view.blob != before and panel.view.spec["layers"] == [None]
