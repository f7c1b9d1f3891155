import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ssepa_lib.data.datasets import SegmentationDataset, build_dataset
from ssepa_lib.data.views import eval_batches
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation import evaluate as evaluation
from ssepa_lib.evaluation.evaluate import (
    Confusion,
    ThresholdConfusion,
    background_and_cam,
    describe_setting,
    describe_settings,
    evaluate,
    is_current,
    mean_average_precision,
    read_metrics,
    segmentation_logits,
    write_metrics,
)
from ssepa_lib.labels.cam import cam_to_label, multi_scale_cam
from ssepa_lib.labels.crf import crf_available
from ssepa_lib.model.network import build_network
from ssepa_lib.recipe import AffinityConfig, Recipe

CLASSES = ("circle", "square")


class ColourNetwork(nn.Module):
    """Reads class 1 off the red channel and class 2 off the green one, pixel by pixel: always right."""

    def __init__(self):
        super().__init__()
        self.backbone, self.affinity_config = SimpleNamespace(patch_size=(1, 1)), AffinityConfig()
        self.classes = CLASSES

    def forward(self, image, *, segment=True, affinity=False, mask=None):
        cam = image[:, :2].float() / 255
        logits = torch.cat([torch.full_like(cam[:, :1], 0.5), cam], 1)
        return SimpleNamespace(
            scores=cam.amax((2, 3)),
            cam=cam,
            aux_cam=cam,
            segmentation=logits if segment else None,
            affinity=None,
        )


class TwoImages(SegmentationDataset):
    """Two images of different sizes, a red half and a green quarter."""

    name = "toy"

    def __init__(self, masks=True):
        super().__init__("val", CLASSES, ["a", "b"])
        self.masks = masks

    def label(self, i):
        return torch.eye(2)[i]

    def _ids(self, i):
        ids = np.zeros((8, 16) if i else (12, 8), dtype=np.uint8)
        ids[: ids.shape[0] // 2, : ids.shape[1] // (i + 1)] = i + 1
        return ids

    def image(self, i):
        ids = self._ids(i)
        return Image.fromarray(np.stack([255 * (ids == 1), 255 * (ids == 2), 0 * ids], -1).astype(np.uint8))

    def mask(self, i):
        return torch.from_numpy(self._ids(i)) if self.masks else None


def recipe(size=0):
    made = Recipe(name="toy/toco")
    made.data.eval_size, made.data.workers, made.train.precision = size, 0, "fp32"
    made.cam.par_dilations, made.cam.par_iterations = (
        [1],
        0,
    )  # refinement off: labels must follow the CAM exactly
    return made


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
        part.update(*pair), together.update(*pair)
    assert together.per_class["circle"] == 80.0
    assert together.per_class["circle"] != (first.per_class["circle"] + second.per_class["circle"]) / 2


def test_empty_confusion_has_no_miou():
    assert Confusion(CLASSES).miou is None


def test_predicted_but_absent_class_counts_as_zero():
    confusion = Confusion(CLASSES)
    confusion.update(torch.tensor([0, 2]), torch.tensor([0, 0]))
    assert confusion.miou == pytest.approx((50 + 0) / 2)


def test_threshold_histogram_equals_one_argmax_per_threshold():
    torch.manual_seed(0)
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


def test_segmentation_logits_equal_the_plain_loop():
    torch.manual_seed(0)

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
        mirrored = F.interpolate(network(view.flip(-1)).segmentation, size=(50, 41), mode="bilinear")
        each.append(total + mirrored.flip(-1))
    expected = torch.maximum(*each)
    assert torch.allclose(
        segmentation_logits(network, image, [1.0, 1.25], True, (50, 41)), expected, atol=1e-5
    )
    assert segmentation_logits(network, image, [1.0], False).shape == (2, 3, 32, 24)


def test_a_right_network_scores_100_everywhere():
    result = evaluate(ColourNetwork(), recipe(), TwoImages(), device="cpu", inference=("raw", "ms"))
    assert result["miou"].pop("refined_cam") is None and result["miou"].pop("refined_cam_ms") is None
    assert all(value == 100 for value in result["miou"].values()), result["miou"]
    products = {"cam", "aux_cam", "pseudo_label", "segmentation"}
    assert set(result["miou"]) == products | {f"{name}_ms" for name in products}
    assert result["per_class"]["segmentation"] == {"background": 100.0, "circle": 100.0, "square": 100.0}
    assert result["threshold_curve"]["cam"] == [100.0] * 9
    assert result["mean_average_precision"] == 100
    json.dumps(result, allow_nan=False)


def test_the_setting_tells_scales_mirror_and_crf():
    setting = evaluate(ColourNetwork(), recipe(8), TwoImages(), device="cpu", inference=("raw", "ms"))[
        "setting"
    ]
    assert setting["products"]["segmentation"] == {"scales": [1.0], "flip": False, "crf": False}
    assert setting["products"]["segmentation_ms"] == {"scales": [1.0, 1.25, 1.5], "flip": True, "crf": False}
    assert setting["method"] == "toco" and setting["split"] == "val" and setting["images"] == 2
    line = describe_setting(setting, "segmentation_ms")
    assert line == "toy val, 2 images, 8², scales 1/1.25/1.5 + mirror, 20000 steps of 4, seed 0"
    assert setting["products"]["cam_ms"] == {"scales": [1.0, 0.5, 1.5], "flip": True, "crf": False}


def test_every_way_of_inference_is_described_once():
    products = ("cam", "segmentation", "cam_ms", "segmentation_ms", "pseudo_label")
    first, second = (
        evaluate(ColourNetwork(), recipe(8), TwoImages(), device="cpu", inference=ways, products=names)[
            "setting"
        ]
        for ways, names in ((("raw",), ("cam", "segmentation")), (("ms",), ("cam", "segmentation")))
    )
    lines = describe_settings([first, second], products)
    assert [line.split(": ")[0] for line in lines] == ["cam, segmentation", "cam_ms", "segmentation_ms"]
    for line, way in zip(
        lines, ("scale 1,", "scales 1/0.5/1.5 + mirror,", "scales 1/1.25/1.5 + mirror,"), strict=True
    ):
        assert f"8², {way}" in line


def test_a_setting_is_current_while_the_recipe_says_the_same():
    made = recipe(8)
    setting = evaluate(ColourNetwork(), made, TwoImages(), device="cpu", inference=("raw", "ms"))["setting"]
    setting = json.loads(json.dumps(setting))
    assert is_current(setting, made, 2) and not is_current(setting, made, 1)
    for section, name, value in (
        ("cam", "background", 0.4),
        ("cam", "flip", False),
        ("eval", "flip", False),
        ("eval", "scales", [1.0]),
        ("data", "eval_size", 0),
        ("train", "seed", 1),
    ):
        changed = replace(made, **{section: replace(getattr(made, section), **{name: value})})
        assert not is_current(setting, changed, 2), name


def test_batches_give_what_a_loop_over_images_gives(tiny):
    settings = tiny("ssepa", **{"eval.batch": 3, "data.val_images": 4})
    dataset = build_dataset(settings.data, "val")
    network = build_network(settings, dataset.classes).eval()
    result = evaluate(network, settings, dataset, device="cpu", inference=("raw", "ms"))
    names = ("cam", "refined_cam", "cam_ms", "refined_cam_ms", "segmentation", "segmentation_ms")
    slow = {name: Confusion(dataset.classes) for name in names}
    single = replace(settings.cam, scales=[1.0], flip=False)
    for _, image, label, masks in eval_batches(dataset, 32, 1):
        mask = masks[0]
        with torch.no_grad():
            raw, ms = (
                multi_scale_cam(network, image, label, c, affinity=True) for c in (single, settings.cam)
            )
        maps = {"cam": raw.cam, "refined_cam": raw.refined, "cam_ms": ms.cam, "refined_cam_ms": ms.refined}
        for name, cam in maps.items():
            resized = F.interpolate(cam, size=mask.shape, mode="bilinear")
            slow[name].update(cam_to_label(resized, settings.cam.background)[0], mask)
        for name, scales, flip in (
            ("segmentation", [1.0], False),
            ("segmentation_ms", settings.eval.scales, True),
        ):
            logits = segmentation_logits(network, image, scales, flip, mask.shape)
            slow[name].update(logits.argmax(1)[0], mask)
    for name, confusion in slow.items():
        assert result["miou"][name] == pytest.approx(confusion.miou, abs=0.02), (
            name
        )  # a batch rounds differently


def test_classes_the_image_does_not_show_are_not_predicted_by_the_cam():
    class Wrong(TwoImages):
        def label(self, i):
            return torch.tensor([0.0, 1.0])

    result = evaluate(ColourNetwork(), recipe(), Wrong(), device="cpu", products=("cam", "segmentation"))
    assert result["per_class"]["cam"]["circle"] == 0
    assert result["per_class"]["segmentation"]["circle"] == 100


@pytest.mark.skipif(not crf_available(), reason="pydensecrf2 is not installed")
def test_crf_labels_follow_the_image_and_name_only_classes_present():
    image = torch.zeros(3, 32, 32)
    image[:, :, 16:] = 255  # the right half is one bright object
    cam = torch.zeros(3, 8, 8)
    cam[2, :, 3:] = 1.0  # and a little too wide in the map
    cam[0] = 1.0  # absent from the label
    labels = evaluation.crf_pseudo_label(image, cam, torch.tensor([0, 0, 1]), 0.4)
    assert labels.unique().tolist() == [0, 3] and (labels[:, 16:] == 3).all() and (labels[:, :12] == 0).all()


def test_crf_results_meet_their_own_masks(monkeypatch):
    seen = []

    def unchanged(jobs, processes):
        for image, probabilities, rest in jobs:
            assert image.shape[:2] == probabilities.shape[1:] and abs(probabilities.sum(0) - 1).max() < 1e-5
            seen.append(len(probabilities))
            yield probabilities.argmax(0).astype(np.uint8), rest

    monkeypatch.setattr(evaluation, "crf_pool", unchanged)
    products = ("pseudo_label", "segmentation")
    result = evaluate(
        ColourNetwork(), recipe(), TwoImages(), device="cpu", inference=["crf"], products=products
    )
    assert result["miou"] == {"pseudo_label_ms_crf": 100.0, "segmentation_ms_crf": 100.0}
    assert seen == [3, 2, 3, 2]  # segmentation: all classes; pseudo-label: background and the one present
    assert result["setting"]["products"]["segmentation_ms_crf"]["crf"] is True


def test_background_and_cam_keeps_the_threshold():
    cam = torch.tensor([[9.0, 9.0], [0.4, 0.6]]).view(2, 1, 2)
    probabilities, channels = background_and_cam(cam, torch.tensor([0.0, 1.0]), 0.5, (1, 2))
    assert probabilities.argmax(0).tolist() == [[0, 1]] and channels.tolist() == [0, 2]
    assert torch.allclose(probabilities.sum(0), torch.ones(1, 2))


def test_an_image_without_any_class_is_all_background(monkeypatch):
    class Empty(TwoImages):
        def label(self, i):
            return torch.zeros(2)

    monkeypatch.setattr(evaluation, "crf_pool", lambda jobs, _: ((p.argmax(0), rest) for _, p, rest in jobs))
    products = ("cam", "pseudo_label")
    result = evaluate(
        ColourNetwork(), recipe(), Empty(), device="cpu", products=products, inference=("raw", "crf")
    )
    for product in (*products, "pseudo_label_ms_crf"):
        assert result["per_class"][product]["circle"] == 0 and result["per_class"][product]["background"] > 0
    assert result["mean_average_precision"] is None


def test_bad_input_is_named():
    with pytest.raises(UserError, match="no mask for 'a'"):
        evaluate(ColourNetwork(), recipe(), TwoImages(masks=False), device="cpu")
    with pytest.raises(UserError, match="cams"):
        evaluate(ColourNetwork(), recipe(), TwoImages(), device="cpu", products=("cams",))
    with pytest.raises(UserError, match="choose from raw, ms, crf"):
        evaluate(ColourNetwork(), recipe(), TwoImages(), device="cpu", inference=("multi",))


def test_progress_counts_images_and_training_mode_returns():
    network, calls = ColourNetwork().train(), []
    evaluate(
        network, recipe(), TwoImages(), device="cpu", products=("cam",), progress=lambda *c: calls.append(c)
    )
    assert calls[-1] == (2, 2) and network.training


def test_mean_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert mean_average_precision(scores, labels) == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert mean_average_precision(scores, torch.zeros(3, 2)) is None


def test_metrics_of_several_splits_merge(tmp_path):
    result = evaluate(ColourNetwork(), recipe(), TwoImages(), device="cpu", products=("cam",))
    one, two, three = (result | {"miou": {"cam": value}} for value in (1.0, 2.0, 3.0))
    assert read_metrics(tmp_path / "run") == {}
    write_metrics(tmp_path / "run", "val", one)
    path = write_metrics(tmp_path / "run", "train", two)
    write_metrics(tmp_path / "run", "val", three)
    assert read_metrics(tmp_path / "run") == {"val": three, "train": two}
    with pytest.raises(ValueError):
        write_metrics(tmp_path / "run", "val", result | {"miou": {"cam": float("nan")}})
    assert read_metrics(tmp_path / "run")["val"] == three and list((tmp_path / "run").iterdir()) == [path]
    old = {
        "val": result | {"setting": {name: v for name, v in result["setting"].items() if name != "products"}}
    }
    for content in ("{", "[]", '{"val": 1}', '{"val": {"setting": {}, "miou": {}}}', json.dumps(old)):
        path.write_text(content)
        with pytest.raises(UserError, match=r"metrics\.json is no metrics file .*; delete it and evaluate"):
            write_metrics(tmp_path / "run", "val", one)
