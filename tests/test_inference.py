from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_network import ColourNetwork, TwoImages, recipe, without_crf

from ssepa_lib.data import build_dataset
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation import inference
from ssepa_lib.evaluation.evaluate import refined_mious
from ssepa_lib.evaluation.inference import infer, label_maps
from ssepa_lib.evaluation.multiscale import (
    background_and_cam,
    cam_view,
    crf_pseudo_label,
    segmentation_logits,
    top_class,
)
from ssepa_lib.labels.cam import multi_scale_cam
from ssepa_lib.labels.crf import crf_available
from ssepa_lib.labels.pseudo_labels import PseudoLabeler
from ssepa_lib.labels.refine import Refiner, build_refiner
from ssepa_lib.model import LayerWeights, build_network


def test_segmentation_logits_equal_the_plain_loop():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.conv = SimpleNamespace(patch_size=(4, 4)), nn.Conv2d(3, 3, 4, 4)

        def forward(self, image, **_):
            return SimpleNamespace(segmentation=self.conv(image / 255))

    network, image = Network(), torch.randint(0, 256, (2, 3, 32, 24), dtype=torch.uint8)
    each = []
    for size in ((32, 24), (40, 32)):  # 1.25 · 24 = 30 is 7.5 patches: 8
        view = F.interpolate(image.float(), size=size, mode="bilinear")
        total = F.interpolate(network(view).segmentation, size=(50, 41), mode="bilinear")
        flipped = F.interpolate(network(view.flip(-1)).segmentation, size=(50, 41), mode="bilinear")
        each.append(total + flipped.flip(-1))
    found = segmentation_logits(network, image, [1.0, 1.25], True, (50, 41))
    assert torch.allclose(found, torch.maximum(*each), atol=1e-5)
    assert segmentation_logits(network, image, [1.0], False).shape == (2, 3, 32, 24)


@pytest.mark.parametrize("names", [("second", "first"), ("first",), ("first", "second", "third")])
def test_other_classes_than_those_of_the_network_are_refused(names):
    dataset, network = TwoImages(), ColourNetwork()
    known = {"first": dataset.classes[0], "second": dataset.classes[1]}
    dataset.classes = tuple(known.get(name, name) for name in names)
    with pytest.raises(UserError, match="but the network was trained with"):
        infer(network, recipe(8), dataset, device="cpu")


def test_a_prediction_holds_what_the_parts_give(tiny):
    settings = tiny("ssepa", **{"eval.batch": 3, "data.val_images": 4})
    dataset = build_dataset(settings.data, "val")
    network = build_network(settings, dataset.classes).eval()
    refiner = build_refiner(settings.affinity, network)
    labeler = PseudoLabeler(settings.cam)
    predictions = infer(network, settings, dataset, device="cpu", test_time=("single", "ms"))
    for index, prediction in enumerate(predictions):
        item = dataset[index]
        image = item.image[None]
        assert prediction.id == item.id and prediction.index == index
        assert prediction.size == tuple(item.mask.shape) and torch.equal(prediction.mask, item.mask)
        image = F.interpolate(image.float(), (32, 32), mode="bilinear", antialias=True).round().byte()
        with torch.no_grad():
            scores = network(image).scores[0]
        assert torch.allclose(prediction.scores, scores, atol=0.05)  # two ways to resize
        for mode in ("single", "ms"):
            image = prediction._batch.images[prediction._place][None]
            config, label = cam_view(settings.cam, mode), item.label[None]
            cams, maps = multi_scale_cam(network, image, label, config, refiner), prediction.maps(mode)
            present = item.label.nonzero().flatten()
            assert torch.equal(maps.present, present)
            close = {"atol": 1e-4, "rtol": 0}
            torch.testing.assert_close(maps.main, cams.main[0, present], **close)
            torch.testing.assert_close(maps.auxiliary, cams.auxiliary[0, present], **close)
            torch.testing.assert_close(maps.refined["refined_cam"], cams.refined[0, present], **close)
            assert maps.final is maps.refined["refined_cam"]
            pseudo = labeler.labels(image.float(), cams.for_labels, label)
            whole = F.interpolate(pseudo[:, None].float(), prediction.size)[0, 0].long()
            assert (prediction.labels("pseudo_label", mode) == whole).float().mean() > 0.99
            scales, flip = ([1.0], False) if mode == "single" else (settings.eval.scales, settings.eval.flip)
            logits = segmentation_logits(network, image, scales, flip, prediction.size)[0]
            torch.testing.assert_close(prediction.segmentation(mode), logits, **close)
            assert torch.equal(prediction.labels("segmentation", mode), logits.argmax(0))
    assert index == 3


def test_nothing_is_computed_before_it_is_asked_for_and_nothing_twice():
    network = ColourNetwork().train()
    seen = list(infer(network, recipe(8), TwoImages(), device="cpu", test_time=("single", "ms")))
    assert network.calls == []
    for prediction in seen * 2:
        prediction.scores, prediction.maps("single"), prediction.labels("segmentation", "single")
        prediction.labels("pseudo_label", "single")
    assert network.calls == [((2, 3, 8, 8), True, False, False)]  # one pass, in evaluation mode, no gradient
    assert network.training
    for prediction in seen * 2:
        prediction.logits("ms")
    assert [shape for shape, *_ in network.calls[1:]] == [(4, 3, n, n) for n in (8, 10, 12)]


def test_the_decoder_runs_only_where_it_may_be_asked_for():
    network = ColourNetwork()
    next(infer(network, recipe(8), TwoImages(), device="cpu", outputs=("cam",))).maps()
    assert [segment for _, segment, *_ in network.calls] == [False]


def test_an_image_is_decoded_once():
    for test_time, keep in (("ms_crf", False), ("single", True)):
        dataset = TwoImages()
        options = {"device": "cpu", "test_time": (test_time,), "keep_images": keep}
        sizes = [p.image.size for p in infer(ColourNetwork(), recipe(8), dataset, **options)]
        assert sizes == [(8, 12), (16, 8)] and dataset.opened == [0, 1]
    dataset = TwoImages()
    first, second = infer(ColourNetwork(), recipe(8), dataset, device="cpu")
    assert dataset.opened == [0, 1] and second.image.size == second.image.size == (16, 8)
    assert dataset.opened == [0, 1, 1]  # not kept: read again, once


def test_the_size_is_that_of_the_original():
    for masks in (True, False):
        predictions = infer(ColourNetwork(), recipe(8), TwoImages(masks), device="cpu")
        assert [p.size for p in predictions] == [(12, 8), (8, 16)]


def test_progress_counts_images_and_bad_names_are_named_at_once():
    calls = []
    for prediction in infer(
        ColourNetwork(), recipe(), TwoImages(), device="cpu", progress=lambda *c: calls.append(c)
    ):
        assert prediction.index == len(calls)
    assert calls == [(1, 2), (2, 2)]
    with pytest.raises(UserError, match="cams"):
        infer(ColourNetwork(), recipe(), TwoImages(), device="cpu", outputs=("cams",))
    with pytest.raises(UserError, match="choose from single, ms, ms_crf"):
        infer(ColourNetwork(), recipe(), TwoImages(), device="cpu", test_time=("crf",))


@pytest.mark.parametrize("output", ["segmentation", "pseudo_label"])
@pytest.mark.parametrize("mode", ["single", "ms", "ms_crf"])
def test_label_maps_come_in_order_at_original_size(monkeypatch, output, mode):
    monkeypatch.setattr(inference, "crf_pool", without_crf)
    data = TwoImages()
    predictions = infer(ColourNetwork(), recipe(), data, device="cpu", outputs=(output,), test_time=(mode,))
    for i, (id, image, ids) in enumerate(label_maps(predictions, output, mode)):
        assert id == data.ids[i] and ids.dtype == np.uint8 and image.size == ids.shape[::-1]
        assert (ids == data.mask(i).numpy()).all()


def test_several_refiners_share_one_pass(tiny, monkeypatch):
    settings = tiny("ssepa")
    dataset = build_dataset(settings.data, "val")
    network = build_network(settings, dataset.classes)
    config = replace(settings.affinity, kind="mean", haaf_objective="none")
    first = LayerWeights(torch.tensor([4.0, 0, 0, 0]))
    refiners = {"none": None, "mean": Refiner(config), "first layer": Refiner(config, first)}
    refiners["own"] = build_refiner(settings.affinity, network)
    passes, forward = [], network.forward
    monkeypatch.setattr(network, "forward", lambda *a, **k: passes.append(k) or forward(*a, **k))
    together = refined_mious(network, settings, dataset, refiners)
    assert passes == [{"segment": False, "capture": True}]  # one batch
    assert together["own"] == together["mean"]  # HAAF starts at equal weights
    assert together["first layer"] != together["mean"] != together["none"]
    for name, refiner in refiners.items():
        assert refined_mious(network, settings, dataset, {name: refiner}) == {name: together[name]}
    settings = replace(settings, cam=replace(settings.cam, background=0.0))
    everything = refined_mious(network, settings, dataset, refiners)
    assert everything["mean"] != together["mean"]


def test_top_class_names_classes_from_one_on():
    maps = torch.tensor([[[0.2, 0.9]], [[0.4, 0.1]]])
    value, winner = top_class(maps, torch.tensor([1, 4]), (1, 2))
    assert winner.tolist() == [[5, 2]] and value.tolist() == [pytest.approx([0.4, 0.9])]
    value, winner = top_class(maps[:0], torch.tensor([], dtype=torch.long), (3, 2))
    assert value.eq(0).all() and winner.shape == (3, 2)


def test_background_and_cam_keeps_the_threshold():
    maps = torch.tensor([0.4, 0.6]).view(1, 1, 2)
    probabilities, channels = background_and_cam(maps, torch.tensor([1]), 0.5, (1, 2))
    assert probabilities.argmax(0).tolist() == [[0, 1]] and channels.tolist() == [0, 2]
    assert torch.allclose(probabilities.sum(0), torch.ones(1, 2))


@pytest.mark.skipif(not crf_available(), reason="pydensecrf2 is not installed")
def test_crf_labels_follow_the_image_and_name_only_classes_present():
    image = torch.zeros(3, 32, 32)
    image[:, :, 16:] = 255  # the right half is one bright object
    cam = torch.zeros(3, 8, 8)
    cam[2, :, 3:] = 1.0  # and a little too wide in the map
    cam[0] = 1.0  # absent from the label
    labels = crf_pseudo_label(image, cam, torch.tensor([0, 0, 1]), 0.4)
    assert labels.unique().tolist() == [0, 3] and (labels[:, 16:] == 3).all() and (labels[:, :12] == 0).all()
