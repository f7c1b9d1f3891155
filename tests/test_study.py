"""Runs in their places, on a ViT of two layers and width 32."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from PIL import Image

from ssepa_lib.cli import main
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.evaluate import evaluate
from ssepa_lib.recipe import load_recipe, save_recipe
from ssepa_lib.training.trainer import load_run
from ssepa_lib.workbook import study
from ssepa_lib.workbook.tables import paired_differences, summary, table_3

TINY = {
    "data.crop": 32,
    "data.eval_size": 32,
    "data.batch": 2,
    "data.train_images": 4,
    "contrast.local_size": 16,
    "contrast.local_crops": 2,
    "model.weights": "none",
    "model.aux_block": 0,
    "cam.par_dilations": [1, 2],
    "model.backbone_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "train.device": "cpu",
}
METHODS = ["toco", "ssepa_no_affinity", "ssepa"]
SPLITS = {"train": {"images": 4, "products": ("pseudo_label",)}, "val": {"images": 4}}


@pytest.fixture(scope="module")
def study_runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSEPA_RESULTS", str(tmp_path_factory.mktemp("results")))
        yield study.run_study("shapes", METHODS, [0, 1], splits=SPLITS, steps=2, arms={"": TINY})


def test_rows(study_runs):
    assert len(study_runs) == len(METHODS) * 2 * len(SPLITS)
    assert set(study_runs["images"]) == {4} and set(study_runs["steps"]) == {2}
    val = study_runs[study_runs["split"] == "val"]
    assert val["segmentation"].notna().all()
    assert val.set_index("method")["refined_cam"].notna().groupby(level=0).all().to_dict() == {
        "ssepa": True,
        "ssepa_no_affinity": False,
        "toco": False,
    }
    table = table_3(study_runs)
    assert (table["source"] != "published").sum() == len(METHODS)


def test_one_recipe_under_two_names_is_one_run(study_runs):
    folders = study_runs.groupby(["method", "seed"])["run"].first()
    assert folders["ssepa_no_affinity", 1] == folders["toco", 1] == "toco-seed1"
    differences = paired_differences(
        study_runs[study_runs["split"] == "val"], "method", "toco", ["segmentation"]
    )
    assert differences.set_index("method").loc["ssepa_no_affinity", "segmentation"] == 0


def test_a_second_call_reads_what_is_there(study_runs):
    folder = study.run_folder("shapes", "ssepa", 0)
    files = [folder / name for name in ("weights.safetensors", "metrics.json", "history.csv")]
    before = [path.stat().st_mtime_ns for path in files]
    again = study.run_study("shapes", METHODS, [0, 1], splits=SPLITS, steps=2, arms={"": TINY})
    assert [path.stat().st_mtime_ns for path in files] == before
    pd.testing.assert_frame_equal(again.drop(columns="settings"), study_runs.drop(columns="settings"))


def test_an_arm_is_a_run_of_its_own_unless_its_recipe_is_there(study_runs):
    arms = {"as it is": TINY, "no contrast": TINY | {"losses.ptc": 0.0, "losses.ctc": 0.0}}
    table = study.run_study("shapes", ["toco"], [0], splits={"val": {"images": 4}}, steps=2, arms=arms)
    assert table.set_index("variant")["run"].to_dict() == {
        "as it is": "toco-seed0",
        "no contrast": "toco-no-contrast-seed0",
    }
    assert list(summary(table, ["variant"], ["cam"])["variant"]) == list(arms)


def test_another_setting_is_evaluated_again_and_only_what_is_missing(study_runs, monkeypatch):
    folder, asked = study.run_folder("shapes", "ssepa", 1), []
    evaluate = study.evaluate
    monkeypatch.setattr(
        study, "evaluate", lambda *args, **o: asked.append(o["inference"]) or evaluate(*args, **o)
    )
    assert study.evaluate_run(folder, images=3, device="cpu")["setting"]["images"] == 3
    more = study.evaluate_run(folder, images=3, device="cpu", inference=("raw", "ms"))
    assert asked == [["raw"], ["ms"]]
    assert {"segmentation", "segmentation_ms"} <= set(more["miou"]), "what was there stays"
    assert {"segmentation", "segmentation_ms"} <= set(more["setting"]["products"])
    assert study.evaluate_run(folder, images=3, device="cpu") == more, (
        "a result with more in it serves as well"
    )


def test_fewer_images_leave_the_result_on_all_images(study_runs, monkeypatch):
    folder = study.run_folder("shapes", "toco", 1)
    path = folder / "recipe.yaml"
    recipe, before = load_recipe(str(path)), path.read_text()
    save_recipe(replace(recipe, data=replace(recipe.data, val_images=6)), path)
    whole = study.evaluate_run(folder, device="cpu")
    few = study.evaluate_run(folder, images=2, device="cpu")
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["val"] == whole and stored["val (2 images)"] == few
    assert (whole["setting"]["images"], few["setting"]["images"]) == (6, 2)
    monkeypatch.setattr(study, "evaluate", None)
    assert (
        study.evaluate_run(folder, device="cpu")
        == study.evaluate_run(folder, images=6, device="cpu")
        == whole
    )
    assert study.evaluate_run(folder, images=2, device="cpu") == few
    path.write_text(before)


def test_a_result_of_another_setting_is_not_read(study_runs):
    folder = study.run_folder("shapes", "toco", 1)
    path = folder / "recipe.yaml"
    recipe, before = load_recipe(str(path)), path.read_text()
    ask = {"images": 5, "device": "cpu", "inference": ("raw", "ms"), "products": ("cam", "segmentation")}
    study.evaluate_run(folder, **ask)
    for changes in ({"eval": {"flip": False}}, {"cam": {"background": 0.3}}, {"data": {"eval_size": 0}}):
        for section, fields in changes.items():
            recipe = replace(recipe, **{section: replace(getattr(recipe, section), **fields)})
        save_recipe(recipe, path)
        result = study.evaluate_run(folder, **ask)
        network, _ = load_run(folder, "cpu")
        options = {"products": ask["products"], "inference": ask["inference"], "device": "cpu"}
        assert (
            result["setting"]
            == evaluate(network, recipe, study.split_of(recipe, images=5), **options)["setting"]
        )
    assert not result["setting"]["products"]["segmentation_ms"]["flip"]
    path.write_text(before)


@pytest.mark.parametrize("content", ["{", '{"val (4 images)": {"miou": {}}}'])
def test_a_broken_metrics_file_is_named(study_runs, content):
    folder = study.run_folder("shapes", "toco", 0)
    path = folder / "metrics.json"
    before = path.read_text()
    path.write_text(content)
    with pytest.raises(UserError, match=r"toco-seed0.metrics\.json is no metrics file"):
        study.evaluate_run(folder, images=4, device="cpu")
    path.write_text(before)


def test_voc_is_measured_on_its_own_train_split(tmp_path, monkeypatch):
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    for folder, kind, suffix in (("JPEGImages", "RGB", "jpg"), ("SegmentationClass", "L", "png")):
        (tmp_path / folder).mkdir()
        for name in "abc":
            Image.new(kind, (40, 32), 1).save(tmp_path / folder / f"{name}.{suffix}")
    for split, ids in {"train": "a b", "train_aug": "a b c"}.items():
        (tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(ids)
    recipe = load_recipe(
        "voc/toco",
        TINY | {"data.root": str(tmp_path), "data.train_images": 0, "data.workers": 0, "train.steps": 1},
    )
    assert study.split_of(recipe, "train").ids == list("abc"), (
        "pseudo-labels are written for what is trained on"
    )
    study.train(recipe, tmp_path / "run")
    result = study.evaluate_run(tmp_path / "run", "train", device="cpu", products=("pseudo_label",))
    assert (result["setting"]["split"], result["setting"]["images"]) == ("train", 2)
    runs = pd.DataFrame(
        [result["setting"] | result["miou"] | {"preset": "voc", "variant": "", "settings": result["setting"]}]
    )
    assert table_3(runs)["pseudo-label (train)"].tolist()[1] != "–"
    trained_on = study.evaluate_run(tmp_path / "run", "train_aug", device="cpu", products=("pseudo_label",))
    assert trained_on["setting"]["images"] == 3 and set(study.read_metrics(tmp_path / "run")) == {
        "train",
        "train_aug",
    }
    assert load_recipe("voc/toco", {"data.measured_train": ""}).hash() == load_recipe("voc/toco").hash()


def test_study_names_the_setting_of_every_column(study_runs, monkeypatch):
    splits = {"val": {"images": 4, "inference": ("raw", "ms")}}
    rows = study.run_study("shapes", METHODS, [0, 1], splits=splits, steps=2, arms={"": TINY})
    monkeypatch.setattr(study, "run_study", lambda *_, **__: rows)
    assert main(["study", "shapes", *METHODS, "--seeds", "0", "1", "--ms"]) == 0
    lines = [
        line
        for line in (study.preset_folder("shapes") / "tables" / "study.md").read_text().splitlines()
        if line.startswith("- ")
    ]
    assert [line.split(": ")[0] for line in lines] == [
        "- cam, aux_cam, refined_cam, pseudo_label, segmentation",
        "- cam_ms, aux_cam_ms, refined_cam_ms, pseudo_label_ms",
        "- segmentation_ms",
    ]
    assert "scales 1/0.5/1.5 + mirror" in lines[1] and "scales 1/1.25/1.5 + mirror" in lines[2]


def test_opening_a_run(study_runs):
    network, recipe = study.open_run("shapes", "toco", 1, device="cpu", steps=2)
    assert recipe.train.seed == 1 and not network.training
    with pytest.raises(UserError, match="fsr-seed0; run notebook 03_training"):
        study.open_run("shapes", "fsr", device="cpu")
    with pytest.raises(UserError, match="run of 2 steps, not 300"):
        study.open_run("shapes", "toco", device="cpu", steps=300)


def test_another_affinity_for_a_while(study_runs):
    network, recipe = load_run(study.run_folder("shapes", "ssepa", 0), "cpu")
    image = torch.rand(1, 3, 32, 32) * 255
    haaf, config = network.haaf, network.affinity_config
    first = torch.tensor([2.0, 0.0])
    with study.other_affinity(network, recipe, weights=first, steps=2) as (changed, changed_recipe):
        affinity = changed(image, affinity=True).affinity
        assert (
            torch.equal(affinity.weights[0], first) and affinity.steps == changed_recipe.affinity.steps == 2
        )
    assert network.haaf is haaf and network.affinity_config is config
    dataset = study.split_of(recipe, "val", 4)
    alone = study.single_layers(network, recipe, dataset)
    assert list(alone.index) == [0, 1]
    assert alone[0] == study.refined_miou(network, recipe, dataset, weights=first)
    assert study.refined_miou(network, recipe, dataset, kind="none") >= 0
    scored = evaluate(network, recipe, dataset, device="cpu", products=("refined_cam",))["miou"][
        "refined_cam"
    ]
    assert study.refined_miou(network, recipe, dataset, kind="haaf") == scored


def test_haaf_is_trained_alone_and_the_network_stays(study_runs):
    network, recipe = load_run(study.run_folder("shapes", "toco", 0), "cpu")
    before, config = {k: v.clone() for k, v in network.state_dict().items()}, network.affinity_config
    variants = {"cut": {"supervision": "ncut"}, "raw": {"supervision": "cls", "source": "logits"}}
    table = study.compare_supervisions(network, recipe, variants, [study.split_of(recipe, "val", 4)], steps=3)
    assert network.haaf is None and network.affinity_config is config and not network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    table = table.set_index("affinity")
    alone = [f"layer {k} alone" for k in range(2)]
    assert list(table.index) == ["no affinity", "uniform mean", *alone, "HAAF, cut", "HAAF, raw"]
    assert table["val"].between(0, 100).all()
    assert table.loc["no affinity", "val"] == study.refined_miou(
        network, recipe, study.split_of(recipe, "val", 4), kind="none"
    )
    weights = table.loc["HAAF, cut", ["layer 0", "layer 1"]].astype(float)
    assert weights.sum() == pytest.approx(2, abs=1e-4) and abs(weights.iloc[0] - 1) > 1e-3, (
        "it has learned something"
    )


def test_memory_of_the_strategies_is_ordered(study_runs):
    network, _ = load_run(study.run_folder("shapes", "ssepa", 0), "cpu")
    with torch.no_grad():
        tokens = network.backbone(torch.rand(1, 3, 160, 160) * 255, capture=True)
    cam = torch.rand(1, 400, 6)
    memory = {s: study.affinity_memory(tokens, cam, s) for s in ("all_heads", "haaf_dense", "haaf_fused")}
    assert memory["all_heads"]["stacked maps, MB"] == pytest.approx(2 * 2 * 401**2 * 4 / 1e6)
    peaks = [row["peak, MB"] for row in memory.values()]
    assert peaks == sorted(peaks, reverse=True) and peaks[2] < peaks[0] / 4


def test_samples_have_one_size(study_runs):
    _, recipe = load_run(study.run_folder("shapes", "ssepa", 0), "cpu")
    pictures, labels, masks = study.samples(study.split_of(recipe, "val", 4), [0, 3], 40)
    assert pictures.shape == (2, 3, 40, 40) and labels.shape == (2, 6) and masks[1].shape == (40, 40)
