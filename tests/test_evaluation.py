import json
import re
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from toy_network import ColourNetwork, TwoImages, recipe, without_crf

from ssepa_lib.compose import save_recipe
from ssepa_lib.data import build_dataset, eval_batches
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.evaluate import evaluate, evaluate_run, stored_result
from ssepa_lib.evaluation.multiscale import segmentation_logits
from ssepa_lib.evaluation.provenance import training_settings
from ssepa_lib.evaluation.results import MEASURES
from ssepa_lib.evaluation.scores import BoundaryIoU, Confusion
from ssepa_lib.labels.cam import cam_to_label, multi_scale_cam
from ssepa_lib.labels.refine import build_refiner
from ssepa_lib.model import build_network
from ssepa_lib.training.run import RunFolder, fingerprint

EVALUATE = import_module("ssepa_lib.evaluation.evaluate")  # the function of that name hides the module


@pytest.fixture
def no_crf(monkeypatch):
    monkeypatch.setattr(EVALUATE, "crf_pool", without_crf)


def test_a_right_network_scores_100_everywhere():
    result = evaluate(ColourNetwork(), recipe(), TwoImages(), device="cpu", test_time=("single", "ms"))
    outputs = {"cam", "aux_cam", "pseudo_label", "segmentation"}
    columns = outputs | {f"{name}_ms" for name in outputs}
    for measure in MEASURES:
        assert result[measure].pop("refined_cam") is None and result[measure].pop("refined_cam_ms") is None
        assert result[measure] == dict.fromkeys(columns, 100.0), measure
    assert result["per_class"]["segmentation"] == {"background": 100.0, "circle": 100.0, "square": 100.0}
    assert result["threshold_curve"]["cam"] == [100.0] * 9
    assert result["mean_average_precision"] == 100
    json.dumps(result, allow_nan=False)


def test_batches_give_what_a_loop_over_images_gives(tiny):
    settings = tiny("ssepa", **{"eval.batch": 3, "data.val_images": 4})
    dataset = build_dataset(settings.data, "val")
    network = build_network(settings, dataset.classes).eval()
    network.decoder.layers[-1].weight.data *= 100
    refiner = build_refiner(settings.affinity, network)
    result = evaluate(network, settings, dataset, device="cpu", test_time=("single", "ms"))
    views = {
        "": (replace(settings.cam, scales=[1.0], flip=False), [1.0], False),
        "_ms": (settings.cam, settings.eval.scales, True),
    }
    counts = {}
    for _, image, label, (mask,) in eval_batches(dataset, 32, 1):
        for suffix, (view, scales, flip) in views.items():
            cams = multi_scale_cam(network, image, label, view, refiner)
            logits = segmentation_logits(network, image, scales, flip, mask.shape)
            found = {"segmentation": logits.argmax(1)[0]}
            maps = {"cam": cams.main, "aux_cam": cams.auxiliary, "refined_cam": cams.refined}
            for name, cam in maps.items():
                resized = F.interpolate(cam, size=mask.shape, mode="bilinear")
                found[name] = cam_to_label(resized, settings.cam.background)[0]
            for name, labels in found.items():
                both = Confusion(dataset.classes), BoundaryIoU(dataset.classes)
                for count in counts.setdefault(name + suffix, both):
                    count.update(labels, mask)
    for column, (confusion, boundary) in counts.items():
        values = (confusion.miou, confusion.precision, confusion.recall, boundary.mean)
        for measure, value in zip(MEASURES, values, strict=True):
            assert result[measure][column] == pytest.approx(value, abs=0.1)  # a batch rounds differently


def test_classes_the_image_does_not_show_are_not_predicted_by_the_cam():
    class Wrong(TwoImages):
        def label(self, i):
            return torch.tensor([0.0, 1.0])

    result = evaluate(ColourNetwork(), recipe(), Wrong(), device="cpu", outputs=("cam", "segmentation"))
    assert result["per_class"]["cam"]["circle"] == 0
    assert result["per_class"]["segmentation"]["circle"] == 100


def test_crf_results_meet_their_own_masks(no_crf):
    outputs = ("pseudo_label", "segmentation")
    options = {"device": "cpu", "test_time": ["ms_crf"], "outputs": outputs}
    result = evaluate(ColourNetwork(), recipe(), TwoImages(), **options)
    for measure in MEASURES:
        assert result[measure] == {"pseudo_label_ms_crf": 100.0, "segmentation_ms_crf": 100.0}
    assert result["setting"]["outputs"]["segmentation_ms_crf"]["crf"] is True


def test_an_image_without_any_class_is_all_background(no_crf):
    class Empty(TwoImages):
        def label(self, i):
            return torch.zeros(2)

    outputs = ("cam", "pseudo_label")
    options = {"device": "cpu", "test_time": ("single", "ms_crf"), "outputs": outputs}
    result = evaluate(ColourNetwork(), recipe(), Empty(), **options)
    for column in (*outputs, "pseudo_label_ms_crf"):
        assert result["per_class"][column]["circle"] == 0 and result["per_class"][column]["background"] > 0
    assert result["mean_average_precision"] is None


def test_bad_input_is_named():
    with pytest.raises(UserError, match="no mask for 'a'"):
        evaluate(ColourNetwork(), recipe(), TwoImages(masks=False), device="cpu")
    with pytest.raises(UserError, match="cams"):
        evaluate(ColourNetwork(), recipe(), TwoImages(), device="cpu", outputs=("cams",))
    with pytest.raises(UserError, match="choose from single, ms, ms_crf"):
        evaluate(ColourNetwork(), recipe(), TwoImages(), device="cpu", test_time=("multi",))
    empty = TwoImages()
    empty.ids = []
    with pytest.raises(UserError, match="split 'val' of toy is empty"):
        evaluate(ColourNetwork(), recipe(), empty, device="cpu")


def test_progress_counts_images_and_training_mode_returns():
    network, calls = ColourNetwork().train(), []
    options = {"device": "cpu", "outputs": ("cam",), "progress": lambda *c: calls.append(c)}
    evaluate(network, recipe(), TwoImages(), **options)
    assert calls == [(1, 2), (2, 2)] and network.training


@pytest.fixture
def run(tiny, tmp_path):
    """A finished run that was never trained."""
    settings = tiny("ssepa")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    save_recipe(settings, folder.recipe_file)
    network = build_network(settings, build_dataset(settings.data, "val").classes)
    folder.save_weights(network, settings, settings.train.steps)
    return folder


def columns_scored(monkeypatch):
    """Every call's columns."""
    calls, score = [], EVALUATE._score
    monkeypatch.setattr(EVALUATE, "_score", lambda *a: calls.append(list(a[3])) or score(*a))
    return calls


def test_a_run_is_evaluated_once_column_by_column(run, no_crf, monkeypatch):
    calls = columns_scored(monkeypatch)
    first = evaluate_run(run.path, outputs=("cam", "segmentation"), device="cpu")
    again = evaluate_run(run.path, outputs=("cam",), device="cpu")
    assert calls == [["cam", "segmentation"]] and again == json.loads(json.dumps(first))
    more = evaluate_run(
        run.path, outputs=("cam", "pseudo_label"), test_time=("single", "ms_crf"), device="cpu"
    )
    assert calls[1:] == [["pseudo_label", "pseudo_label_ms_crf"]]
    columns = {"cam", "segmentation", "pseudo_label", "pseudo_label_ms_crf"}
    for part in (*MEASURES, "per_class"):
        assert more[part].keys() == columns and more[part]["cam"] == first[part]["cam"]
    assert more["setting"]["outputs"].keys() == columns
    assert evaluate_run(run.path, outputs=("cam",), device="cpu") == json.loads(json.dumps(more))
    run.weights.unlink()  # what is known needs no network
    assert evaluate_run(run.path, outputs=("pseudo_label",), device="cpu")["miou"].keys() == columns
    with pytest.raises(UserError, match="no finished run"):
        evaluate_run(run.path, outputs=("aux_cam",), device="cpu")


def test_what_a_recipe_has_not_got_is_not_asked_again(run, monkeypatch):
    settings = run.recipe()
    plain = replace(settings, affinity=replace(settings.affinity, kind="none", haaf_objective="none"))
    run.save_weights(build_network(plain, build_dataset(plain.data, "val").classes), plain, 6)
    save_recipe(plain, run.recipe_file)
    calls = columns_scored(monkeypatch)
    for _ in range(2):
        result = evaluate_run(run.path, outputs=("cam", "refined_cam"), device="cpu")
        assert result["miou"]["refined_cam"] is None and "refined_cam" not in result["setting"]["outputs"]
    assert calls == [["cam", "refined_cam"]]


def test_a_changed_view_costs_its_own_columns_and_another_threshold_all(run, monkeypatch):
    calls = columns_scored(monkeypatch)
    options = {"outputs": ("cam", "segmentation"), "test_time": ("single", "ms"), "device": "cpu"}
    evaluate_run(run.path, **options)
    settings = run.recipe()
    flat = replace(settings, eval=replace(settings.eval, flip=False))
    save_recipe(flat, run.recipe_file)
    evaluate_run(run.path, **options)
    assert calls[1:] == [["segmentation_ms"]]
    other = replace(settings, cam=replace(settings.cam, background=0.4))
    save_recipe(other, run.recipe_file)
    evaluate_run(run.path, **options)
    assert calls[-1] == ["cam", "segmentation", "cam_ms", "segmentation_ms"]


def test_other_sizes_and_numbers_of_images_are_results_of_their_own(run):
    options = {"outputs": ("cam",), "device": "cpu"}
    own = evaluate_run(run.path, **options)
    native = evaluate_run(run.path, size=0, **options)
    assert evaluate_run(run.path, size=32, images=4, **options) == json.loads(json.dumps(own))
    few = evaluate_run(run.path, size=48, images=2, **options)
    assert (native["setting"]["size"], few["setting"]["size"], few["setting"]["images"]) == (0, 48, 2)
    assert native["miou"] != own["miou"]
    assert set(run.read_metrics()) == {"val", "val (native size)", "val (2 images, 48²)"}
    assert run.recipe().data.eval_size == 32


def test_a_result_of_an_older_version_is_scored_where_its_setting_is_current(run, monkeypatch):
    known = evaluate_run(run.path, outputs=("cam",), device="cpu")
    setting = dict(known["setting"])
    setting |= {"products": setting.pop("outputs"), "supervision": setting.pop("haaf_objective")}
    old = {name: value for name, value in known.items() if name not in MEASURES[1:]} | {"setting": setting}
    run.metrics.write_text(json.dumps({"val": old}))
    calls = columns_scored(monkeypatch)
    merged = evaluate_run(run.path, outputs=("cam", "aux_cam"), device="cpu")
    assert calls == [["aux_cam"]]
    assert merged["precision"]["cam"] is None and merged["precision"]["aux_cam"] is not None
    run.metrics.write_text(json.dumps({"format": 99, "val": old}))
    with pytest.raises(UserError, match="newer version"):
        evaluate_run(run.path, device="cpu")


def test_a_result_of_other_weights_is_measured_again(run, monkeypatch):
    """As after copying metrics.json from another run of the same recipe."""
    calls = columns_scored(monkeypatch)
    first = evaluate_run(run.path, outputs=("cam",), device="cpu")
    assert first["setting"]["weights"] == run.fingerprint() == fingerprint(load_file(run.weights))
    network, recipe = run.load("cpu")
    with torch.no_grad():
        network.classifier.weight.neg_()
    run.save_weights(network, recipe, recipe.train.steps)
    assert stored_result(run.path, outputs=("cam",)) is None
    second = evaluate_run(run.path, outputs=("cam",), device="cpu")
    assert calls == [["cam"]] * 2 and second["setting"]["weights"] == run.fingerprint()
    assert second["setting"]["weights"] != first["setting"]["weights"]
    assert second["setting"]["pixels"] == first["setting"]["pixels"]


def test_the_fingerprint_of_weights_tells_name_type_shape_and_value_apart():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(True)}
    found = {
        fingerprint(state)
        for state in (
            base,
            base | {"a": torch.tensor([1.0, -2.0])},
            base | {"a": torch.tensor([[1.0, 2.0]])},
            base | {"a": base["a"].view(torch.int32)},
            {"a": base["a"], "c": base["b"]},
        )
    }
    assert len(found) == 5 and all(len(each) == 16 for each in found)
    turned = {"b": base["b"], "a": torch.tensor([[1.0, 0], [2.0, 0]])[:, 0]}
    assert fingerprint(turned) == fingerprint(base), "neither order nor memory layout counts"


def test_the_setting_says_where_the_numbers_come_from_without_a_path(run):
    setting = evaluate_run(run.path, outputs=("cam",), device="cpu")["setting"]
    assert torch.__version__.startswith(setting["versions"]["torch"])
    assert setting["training"]["train"]["steps"] == 6
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?|unknown", setting["commit"])
    folder = replace(run.recipe().data, name="folder", root="/home/someone/images")
    private = replace(run.recipe(), data=folder)
    private = replace(private, model=replace(private.model, weights="/home/someone/vit.safetensors"))
    found = training_settings(private)
    assert "root" not in found["data"] and found["model"]["weights"] == "vit.safetensors"
    assert private.data.root and "someone" in private.model.weights, "the recipe itself stays"
