"""Runs in their places, on a ViT of two layers and width 32."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from toy_network import TwoImages

from ssepa_lib.cli import main
from ssepa_lib.data import split_of
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation import evaluate, refined_mious
from ssepa_lib.labels import build_refiner
from ssepa_lib.model import LayerWeights
from ssepa_lib.training import load_run
from ssepa_lib.workbook import paper_figures, study
from ssepa_lib.workbook.published import table_3
from ssepa_lib.workbook.studies import ablation_study, haaf_study
from ssepa_lib.workbook.studies.ablation_study import PLACES, where_it_acts
from ssepa_lib.workbook.studies.memory_study import affinity_memory
from ssepa_lib.workbook.tables import collect_runs, committed, paired_differences, summary

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
SPLITS = {"train": {"images": 4, "outputs": ("pseudo_label",)}, "val": {"images": 4}}


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


def test_study_names_the_setting_of_every_column(study_runs, monkeypatch):
    modes = ("single", "ms")
    splits = {"val": {"images": 4, "test_time": modes}}
    rows = study.run_study("shapes", METHODS, [0, 1], splits=splits, steps=2, arms={"": TINY})
    monkeypatch.setattr(study, "run_study", lambda *_, **__: rows)
    assert main(["study", "shapes", *METHODS, "--seeds", "0", "1", "--test-time", *modes]) == 0
    text = (study.preset_folder("shapes") / "tables" / "study.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert [line.split(": ")[0] for line in lines] == [
        "- cam, aux_cam, refined_cam, pseudo_label, segmentation",
        "- cam_ms, aux_cam_ms, refined_cam_ms, pseudo_label_ms",
        "- segmentation_ms",
    ]
    assert "scales 1/0.5/1.5 + flip" in lines[1] and "scales 1/1.25/1.5 + flip" in lines[2]


def test_a_method_with_a_backbone_has_a_flat_folder(study_runs):
    names = ["toco", "toco/vit_tiny"]
    rows = study.run_study("shapes", names, [0], splits={"val": {"images": 4}}, steps=2, arms={"": TINY})
    assert rows.set_index("method")["run"].to_dict() == {
        "toco": "toco-seed0",
        "toco/vit_tiny": "toco-vit_tiny-seed0",
    }
    assert summary(rows, ["method"], ["cam"])["method"].tolist() == names
    assert study.run_folder("shapes", "toco/vit_tiny", 1, "mine").name == "toco-vit_tiny-mine-seed1"
    network, recipe = study.open_run("shapes", "toco/vit_tiny", 0, device="cpu", steps=2)
    assert recipe.name == "shapes/toco/vit_tiny"
    found = collect_runs(study.preset_folder("shapes")).query("run == 'toco-vit_tiny-seed0'").iloc[0]
    assert (found["method"], found["variant"]) == ("toco", "vit_tiny")


def test_a_run_name_has_a_folder_of_its_own(study_runs):
    assert study.preset_folder("shapes", "other") == study.preset_folder("shapes") / "other"
    for name in ("a/b", "..", ".hidden"):
        with pytest.raises(UserError, match="plain folder name"):
            study.preset_folder("shapes", name)


def test_opening_a_run(study_runs):
    network, recipe = study.open_run("shapes", "toco", 1, device="cpu", steps=2)
    assert recipe.train.seed == 1 and not network.training
    assert study.has_run("shapes", "toco", 1) and not study.has_run("shapes", "toco:other", 1)
    with pytest.raises(UserError, match="fsr-cer-only-seed0; .*study shapes fsr --arms terms --seeds 0\\)"):
        study.open_run("shapes", "fsr:cer-only", device="cpu")
    with pytest.raises(UserError, match="fsr-seed0; run notebook 03_training"):
        study.open_run("shapes", "fsr", device="cpu")
    with pytest.raises(UserError, match="run of 2 steps, not 300"):
        study.open_run("shapes", "toco", device="cpu", steps=300)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("open_run('shapes', 'ssepa', device='cpu')", "there is no finished run"),  # 04 before 03
        ("open_run('voc_mini', 'ssepa', device='cpu')", "--preset voc_mini --only 03"),  # of another preset
        ("recipe_for('shpaes', 'ssepa')", "shpaes"),
        ("preset_folder('shapes', '../x')", "plain folder name"),
    ],
)
def test_a_notebook_shows_one_sentence_and_no_stack_trace(line, sentence, tmp_path, monkeypatch, capsys):
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path / "results"))
    monkeypatch.chdir(tmp_path)
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
    shell.run_cell(f"from ssepa_lib.workbook import study\nstudy.{line}")
    shown = capsys.readouterr().out
    assert shown.startswith("UserError: ") and sentence in shown and len(shown.splitlines()) == 1


def test_one_network_under_several_refiners(study_runs):
    network, recipe = load_run(study.run_folder("shapes", "ssepa", 0), "cpu")
    dataset, config = split_of(recipe, "val", 4), recipe.affinity
    uniform = haaf_study.uniform_refiner(config)
    first = replace(uniform, haaf=LayerWeights([2.0, 0.0]))
    alone = haaf_study.single_layers(network, recipe, dataset)
    assert list(alone.index) == [0, 1]
    refiners = {"first": first, "uniform": uniform, "own": build_refiner(config, network), "none": None}
    found = refined_mious(network, recipe, dataset, refiners)
    assert found["first"] == alone[0] and found["none"] >= 0
    scored = evaluate(network, recipe, dataset, device="cpu", outputs=("refined_cam",))
    assert found["own"] == scored["miou"]["refined_cam"]
    assert haaf_study.uniform_refiner(config, iterations=3).config.iterations == 3
    images = torch.rand(2, 3, 32, 32) * 255
    weights = haaf_study.mean_layer_weights(network, images, {"first": first, "none": None})
    assert weights.iloc[0].tolist() == [2, 0] and weights.iloc[1].isna().all()


def test_haaf_is_trained_alone_and_the_network_stays(study_runs):
    network, recipe = load_run(study.run_folder("shapes", "toco", 0), "cpu")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    variants = {
        "cut": {"haaf_objective": "ncut"},
        "raw": {"haaf_objective": "cls", "attention": "logits"},
        "pairs": {"haaf_objective": "affinity"},
    }
    dataset = split_of(recipe, "val", 4)
    state = torch.get_rng_state()
    table = haaf_study.compare_haaf_objectives(network, recipe, variants, [dataset], steps=3)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers are left alone"
    assert network.haaf is None and not network.training
    learned = haaf_study.train_haaf(network, recipe, variants, steps=1)
    assert [refiner.haaf.signed for refiner in learned.values()] == [False, True, False]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    table = table.set_index("affinity")
    alone = [f"layer {k} alone" for k in range(2)]
    learned = ["HAAF, cut", "HAAF, raw", "HAAF, pairs"]
    assert list(table.index) == ["no affinity", "uniform mean", *alone, *learned]
    assert table["val"].between(0, 100).all()
    assert table.loc["no affinity", "val"] == refined_mious(network, recipe, dataset, {"": None})[""]
    weights = table.loc["HAAF, cut", ["layer 0", "layer 1"]].astype(float)
    assert weights.sum() == pytest.approx(2, abs=1e-4) and abs(weights.iloc[0] - 1) > 1e-3, "it has learned"


def titles(axes):
    return [ax.get_title() for ax in axes[0]]


def test_the_papers_figures_from_runs(study_runs, monkeypatch):
    runs = {m: load_run(study.run_folder("shapes", m, 0), "cpu") for m in ("toco", "ssepa")}
    dataset = split_of(runs["toco"][1], "val", 4)
    shown = study.with_label(dataset, 0, 2)
    assert titles(paper_figures.plot_figure_5(runs, dataset, shown)) == [
        "input",
        "ground truth",
        "toco",
        "ssepa",
    ]
    monkeypatch.setattr(paper_figures, "crf_available", lambda: False)
    assert titles(paper_figures.plot_figure_6(runs, dataset, shown)) == [
        "input",
        "ground truth",
        "toco",
        "ssepa",
    ]
    seen = paper_figures.images_without_masks(runs["toco"][1], 3)
    assert seen.split == "test" and len(seen) == 3
    monkeypatch.setattr(paper_figures, "crf_available", lambda: True)
    monkeypatch.setattr(paper_figures, "crf_labels", lambda image, p: p.argmax(0).astype("uint8"))
    axes = paper_figures.plot_figure_7(runs, seen, [0, 1], truth=False)
    assert titles(axes) == ["input", "toco", "toco, CRF", "ssepa", "ssepa, CRF"]
    network, recipe = runs["toco"]
    pixels = study.samples(seen, [0], 32)[0]
    found = paper_figures.segmentations(network, recipe, pixels)
    assert torch.equal(found[""][0], found[", CRF"][0].long()), "the CRF gets the same scores"
    without = replace(recipe, data=replace(recipe.data, name="voc", root="nowhere"))
    assert paper_figures.images_without_masks(without, 3) is None
    plt.close("all")


def test_where_the_affinity_acts(study_runs):
    network, recipe = load_run(study.run_folder("shapes", "toco", 0), "cpu")
    table = where_it_acts(network, recipe, split_of(recipe, "val", 4))
    assert list(table.index) == list(PLACES) and (table["ms per image"] > 0).all()
    assert table["refined map"].between(0, 100).all()
    plain, auxiliary = table["auxiliary map"].iloc[[0, -1]]
    assert table["auxiliary map"].iloc[:-1].eq(plain).all() and auxiliary >= 0


def test_the_place_is_all_that_changes_where_the_affinity_acts(study_runs, monkeypatch):
    network, recipe = load_run(study.run_folder("shapes", "toco", 0), "cpu")
    seen, uniform = [], haaf_study.uniform_refiner
    monkeypatch.setattr(ablation_study, "PLACES", {"every scale, 1 time": {}})

    def noted(*arguments, **fields):
        seen.append(uniform(*arguments, **fields))
        return seen[-1]

    monkeypatch.setattr(ablation_study, "uniform_refiner", noted)
    plus = replace(recipe, affinity=study.recipe_for("shapes", "ssepa_plus").affinity)
    where_it_acts(network, plus, split_of(recipe, "val", 2))
    config = seen[0].config
    assert (config.iterations, config.per_scale, config.balance, config.coverage) == (1, True, False, 0)


def test_memory_of_the_strategies_is_ordered(study_runs):
    network, _ = load_run(study.run_folder("shapes", "ssepa", 0), "cpu")
    with torch.no_grad():
        tokens = network.backbone(torch.rand(1, 3, 160, 160) * 255, capture=True)
    cam = torch.rand(1, 400, 6)
    strategies = ("stack_heads", "stack_layers", "matrix_free")
    memory = {s: affinity_memory(tokens.attention, cam, s) for s in strategies}
    assert memory["stack_heads"]["stacked maps, MB"] == pytest.approx(2 * 2 * 401**2 * 4 / 1e6)
    peaks = [row["peak, MB"] for row in memory.values()]
    assert peaks == sorted(peaks, reverse=True) and peaks[2] < peaks[0] / 4


def test_samples_have_one_size(study_runs):
    _, recipe = load_run(study.run_folder("shapes", "ssepa", 0), "cpu")
    images, labels, masks = study.samples(split_of(recipe, "val", 4), [0, 3], 40)
    assert images.shape == (2, 3, 40, 40) and labels.shape == (2, 6) and masks[1].shape == (40, 40)


def test_the_tour_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path))
    plain = study.recipe_for
    monkeypatch.setattr(study, "recipe_for", lambda *a, **k: plain(*a, **k | {"changes": TINY}))
    rows = []
    network, recipe = study.tour("shapes", steps=2, device="cpu", on_step=rows.append)
    assert (tmp_path / "shapes" / "ssepa-tour2-seed0" / "weights.safetensors").is_file()
    assert recipe.train.steps == 2 and not network.training and network.haaf is not None and rows
    again, _ = study.tour("shapes", steps=2, device="cpu", run_name="mine", on_step=rows.append)
    assert torch.equal(again.classifier.weight, network.classifier.weight)
    assert ["loss" in row for row in rows] == [True, False], (
        "one row of training, one report of a finished run"
    )
    assert len(list((tmp_path / "shapes").iterdir())) == 1, "the finished run of another name is reused"


def test_samples_and_parts_with_and_without_masks():
    dataset = split_of(study.recipe_for("shapes", "toco"), "val", 3)
    images, labels, masks = study.samples(dataset, [0, 1], 32)
    classes = labels.argmax(1).tolist()
    parts = study.object_parts(dataset, [0, 1], 32, classes)
    for part, mask, kind in zip(parts, masks, classes, strict=True):
        assert part.shape == (32, 32) and torch.equal(part > 0, mask == kind + 1)
        assert {1, 2} <= set(part.unique().tolist())
    plain = TwoImages()
    assert [p.unique().tolist() for p in study.object_parts(plain, [0, 1], 8, [0, 1])] == [[0, 2], [0, 2]]
    bare = TwoImages(masks=False)
    assert study.samples(bare, [0, 1], 8)[2] is None and study.object_parts(bare, [0], 8, [0]) is None


def test_images_that_show_a_class_are_found_beyond_the_end():
    dataset = TwoImages()
    assert study.with_label(dataset, 5) == [1] and study.with_label(dataset, 1, 6) == [1, 0]
    dataset.label = lambda i: torch.tensor([0.0, float(i == 0)])
    assert study.with_label(dataset, 1, 3) == [0]
    dataset.label = lambda i: torch.zeros(2)
    with pytest.raises(UserError, match="no image of toy, split 'val', shows a class"):
        study.with_label(dataset, 0)


def test_committed_tables_are_read_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = committed("balanced_affinity/rows.csv")
    assert {"preset", "method", "seed", "refined_cam"} <= set(rows)
    with pytest.raises(UserError, match="nothing.csv is missing"):
        committed("nothing.csv")
