import json
import math

import pandas as pd
import pytest

from ssepa_lib.errors import UserError
from ssepa_lib.workbook import published, tables
from ssepa_lib.workbook.studies.memory_study import steps_at_published_size

VIEWS = {
    "pseudo_label": {"scales": [1.0], "flip": False, "crf": False},
    "segmentation": {"scales": [1.0], "flip": False, "crf": False},
    "segmentation_ms": {"scales": [1.0, 1.5], "flip": True, "crf": False},
}


def write_run(folder, name, method, seed, values, preset="voc", splits=("train", "val"), images=10):
    run = folder / preset / name
    run.mkdir(parents=True)
    setting = {
        "data": preset,
        "images": images,
        "size": 448,
        "method": method,
        "seed": seed,
        "steps": 50,
        "batch": 4,
        "backbone": "vit_x",
        "outputs": VIEWS,
    }
    content = {
        split: {
            "setting": setting | {"split": split},
            "miou": {"refined_cam": None} | values,
            "precision": {},
            "recall": {},
            "boundary_iou": {},
            "per_class": {},
            "threshold_curve": {},
            "mean_average_precision": 80,
        }
        for split in splits
    }
    (run / "metrics.json").write_text(json.dumps(content))


@pytest.fixture
def runs(tmp_path):
    for seed, (base, better) in enumerate([(50.0, 52.0), (60.0, 61.0), (55.0, 58.0)]):
        write_run(
            tmp_path, f"toco-seed{seed}", "toco", seed, {"pseudo_label": base + 5, "segmentation": base}
        )
        if seed < 2:
            values = {"pseudo_label": better + 5, "segmentation": better, "segmentation_ms": better + 1}
            write_run(tmp_path, f"ssepa-seed{seed}", "ssepa", seed, values)
    return tables.collect_runs(tmp_path)


def test_collect_runs_gives_one_row_per_run_and_split(runs):
    assert len(runs) == 10
    row = runs[(runs.run == "ssepa-seed1") & (runs.split == "val")].iloc[0]
    assert (row.method, row.seed, row.variant, row.preset) == ("ssepa", 1, "", "voc")
    assert row.segmentation == 61 and pd.isna(row.refined_cam)


def test_variant_is_what_the_name_adds(tmp_path):
    write_run(tmp_path, "ssepa-logits-seed3", "ssepa", 3, {"segmentation": 1.0})
    assert tables.collect_runs(tmp_path).variant.tolist() == ["logits", "logits"]


def test_collect_runs_survives_a_broken_file_and_names_it(tmp_path, capsys):
    write_run(tmp_path, "ssepa-seed3", "ssepa", 3, {"segmentation": 1.0})
    (tmp_path / "run").mkdir()
    for content in ("{", '{"val": {"miou": {}}}', "", "[" * 100_000):
        (tmp_path / "run" / "metrics.json").write_text(content)
        assert set(tables.collect_runs(tmp_path).run) == {"ssepa-seed3"}
        (line,) = capsys.readouterr().err.splitlines()
        assert str(tmp_path / "run" / "metrics.json") in line
    assert tables.collect_runs(tmp_path / "none").empty


def test_the_result_on_the_most_images_counts(tmp_path):
    write_run(tmp_path, "ssepa-seed0", "ssepa", 0, {"segmentation": 50.0}, splits=["val"], images=100)
    path = tmp_path / "voc" / "ssepa-seed0" / "metrics.json"
    content = json.loads(path.read_text())
    few = content["val"] | {
        "setting": content["val"]["setting"] | {"images": 10},
        "miou": {"segmentation": 90.0},
    }
    path.write_text(json.dumps(content | {"val (10 images)": few}))
    runs = tables.collect_runs(tmp_path)
    assert runs[["split", "images", "segmentation"]].to_numpy().tolist() == [["val", 100, 50.0]]
    path.write_text(json.dumps({"val (10 images)": few}))
    assert tables.collect_runs(tmp_path)[["split", "images"]].to_numpy().tolist() == [["val", 10]]


def test_a_mean_over_seeds_is_over_the_same_images(tmp_path):
    for seed, images in enumerate((100, 100, 10)):
        write_run(
            tmp_path, f"ssepa-seed{seed}", "ssepa", seed, {"segmentation": 50.0 + 20 * seed}, images=images
        )
    row = published.table_2(tables.collect_runs(tmp_path)).iloc[-1]
    assert row["val"] == "60.0 ± 14.1" and "val 100 images" in row["setting"] and "2 seeds" in row["setting"]


def at_native_size(path, value):
    """The content of a metrics.json with the same result at the native size of the images."""
    content = json.loads(path.read_text())
    other = {"setting": content["val"]["setting"] | {"size": 0}, "miou": {"segmentation": value}}
    return content | {"val (native size)": content["val"] | other}


def test_of_two_sizes_the_recipes_own_counts(tmp_path):
    write_run(tmp_path, "ssepa-seed0", "ssepa", 0, {"segmentation": 50.0}, splits=["val"])
    path = tmp_path / "voc" / "ssepa-seed0" / "metrics.json"
    content = at_native_size(path, 90.0)
    for order in (content, dict(reversed(content.items()))):
        path.write_text(json.dumps(order))
        assert tables.collect_runs(tmp_path)["segmentation"].tolist() == [50]
        assert sorted(tables.collect_runs(tmp_path, every=True)["segmentation"]) == [50, 90]


def test_a_mean_over_seeds_is_at_one_size(tmp_path):
    for seed in range(3):
        values = {"segmentation": 50.0 + 20 * seed}
        write_run(tmp_path, f"ssepa-seed{seed}", "ssepa", seed, values, splits=["val"])
    path = tmp_path / "voc" / "ssepa-seed0" / "metrics.json"
    content = at_native_size(path, 10.0)
    del content["val"]
    path.write_text(json.dumps(content))
    row = published.table_2(tables.collect_runs(tmp_path)).iloc[-1]
    assert row["val"] == "80.0 ± 14.1" and "448²" in row["setting"] and "2 seeds" in row["setting"]


def test_summary_is_mean_and_sample_deviation(runs):
    table = tables.summary(runs[runs.split == "val"], ["method"], ["segmentation"]).set_index("method")
    assert table.loc["toco", "segmentation"] == 55 and table.loc["toco", "segmentation_sd"] == 5
    assert table.loc["toco", "seeds"] == 3 and table.loc["ssepa", "seeds"] == 2
    assert table.loc["ssepa", "segmentation_sd"] == pytest.approx(math.sqrt(0.5) * 9)


def test_summary_refuses_to_mix_splits(runs):
    with pytest.raises(UserError, match="filter by split"):
        tables.summary(runs, ["method"], ["segmentation"])


def test_paired_differences_use_common_seeds_only(runs):
    table = tables.paired_differences(
        runs[runs.split == "val"], "method", "toco", ["segmentation"]
    ).set_index("method")
    assert table.loc["ssepa", "segmentation"] == pytest.approx(
        1.5
    )  # (52 − 50, 61 − 60); the means differ by 1.5 ± 9
    assert table.loc["ssepa", "segmentation_sd"] == pytest.approx(math.sqrt(0.5))
    assert table.loc["ssepa", "seeds"] == 2 and table.loc["toco", "segmentation"] == 0
    with pytest.raises(UserError, match="choose one of ssepa, toco"):
        tables.paired_differences(runs[runs.split == "val"], "method", "afa", ["segmentation"])


def test_markdown_by_hand():
    table = pd.DataFrame({"name": ["a|b", "c"], "mIoU": [1.25, None], "n": [3, 4]})
    assert tables.to_markdown(table).splitlines() == [
        "| name   |   mIoU |   n |",
        "|:-------|-------:|----:|",
        "| a\\|b   |    1.2 |   3 |",
        "| c      |      – |   4 |",
    ]
    spread = pd.DataFrame({"method": ["x", "y"], "mIoU": ["72.4 ± 0.3", "–"]})
    assert tables.to_markdown(spread).splitlines()[1:] == [
        "|:---------|-----------:|",
        "| x        | 72.4 ± 0.3 |",
        "| y        |          – |",
    ]
    assert len(tables.to_markdown(table.iloc[:0]).splitlines()) == 2


def test_mean_and_deviation_become_one_column():
    table = pd.DataFrame({"method": ["x"], "cam": [50.0], "cam_sd": [float("nan")], "seeds": [1]})
    assert tables.plus_minus_columns(table, ["cam"]).to_dict("records") == [
        {"method": "x", "seeds": 1, "cam": "50.0"}
    ]


def test_published_rows_stand_without_runs():
    last = published.table_3().iloc[-1]
    assert (last["pseudo-label (train)"], last["seg (val)"], last["seg (test)"]) == ("79.5", "72.4", "73.3")
    assert [
        len(t()) for t in (published.table_1, published.table_2, published.table_4, published.table_5)
    ] == [
        13,
        20,
        3,
        6,
    ]
    for table in (
        published.table_1,
        published.table_2,
        published.table_3,
        published.table_4,
        published.table_5,
    ):
        assert set(table()["source"]) == {"published"}
    assert sorted(published.NOTES) == [1, 2, 3, 4, 5]


def test_published_numbers_agree_between_tables():
    ours = published.table_3().set_index("method").loc["SS-EPA (with Patch Affinity, HAAF)"]
    base = published.table_5().iloc[-1]
    assert (
        ours["seg (val)"] == base["seg (val)"] == "72.4"
        and ours["seg (test)"] == base["seg (test)"] == "73.3"
    )


def test_table_3_puts_ours_below_the_published_row(runs):
    table = published.table_3(runs)
    at = table[table["method"] == "SS-EPA (with Patch Affinity, HAAF)"]
    assert at["source"].tolist() == ["published", "this workbook (voc)", "this workbook (voc)"]
    assert at["seg (val)"].tolist() == ["72.4", "56.5 ± 6.4", "57.5 ± 6.4"]
    assert at["pseudo-label (train)"].tolist()[1] == "61.5 ± 6.4"
    assert (
        at["setting"].tolist()[1] == "scale 1; 448²; train 10 images; val 10 images; 50 steps of 4; 2 seeds"
    )
    assert at["setting"].tolist()[2] == "scales 1/1.5 + flip; 448²; val 10 images; 50 steps of 4; 2 seeds"
    assert at["pseudo-label (train)"].tolist()[2] == "–"
    assert len(table[table["method"] == "ToCo"]) == 2  # no MS run, no row


def test_other_tables_take_our_runs(runs):
    assert published.table_1(runs).iloc[-1][["train", "val"]].tolist() == ["60.0 ± 5.0", "60.0 ± 5.0"]
    assert published.table_2(runs)["source"].str.startswith("this workbook").sum() == 3
    assert published.table_5(runs).iloc[0]["depth"] == 8


def test_published_differences_and_their_ruler():
    table = published.differences().set_index(["method", "measure"])["difference"]
    assert table["ssepa", "pseudo-label"] == 0.5 and table["ssepa_affinity", "segmentation"] == 0.8
    assert table["mcc", "segmentation"] == 0.5, "both with DeiT-B"
    assert published.noise_ruler() == {"pseudo-label": 1.1, "segmentation": 0.2}


def test_systems_with_further_data_stand_below_ours(runs):
    table = published.table_field(runs)
    origin = (table["source"] != "published").astype(int) + 2 * (table["extra data"] != "–")
    assert origin.is_monotonic_increasing and set(origin) == {0, 1, 2}
    assert table.set_index("method").loc["WeCLIP+ (TPAMI 2025)", "test"] == "83.9"


def test_one_reading_of_the_two_tables_fits_the_text():
    one = pd.to_numeric(published.table_1().set_index("method")["train"], errors="coerce")
    three = published.table_3().set_index("method")["pseudo-label (train)"].astype(float)
    gain = three["SS-EPA (with Patch Affinity, HAAF)"] - one["ToCo+MS+CRF"]
    assert one["SS-EPA"] > one["ToCo"] and round(gain, 1) == 2.2
    assert all(published.ONE_READING in published.NOTES[number] for number in (1, 3))


def test_table_5_fills_in_depth_and_size(runs):
    runs = runs.assign(backbone="vit_small_patch16_224")
    for setting in runs["settings"]:
        setting["recipe"] = "voc/ssepa/vit_small_depth8"
    ours = published.table_5(runs).iloc[-1]
    assert (ours["depth"], ours["img_size"]) == (8, 224)
    assert published.backbone_shape("shapes/toco", "vit_tiny_patch16_224") == (6, 96)
    assert published.backbone_shape("mine.yaml", "vit_tiny_patch16_224") is None
    for setting in runs["settings"]:
        setting["recipe"] = "gone/ssepa"
    assert published.table_5(runs).iloc[-1]["depth"] == "–"


def test_evidence_takes_new_folders_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PROJECT", tmp_path)
    for folder in ("first", "second", "voc"):
        (tmp_path / "results" / folder).mkdir(parents=True)
        (tmp_path / "results" / folder / "README.md").write_text("")
    write_run(tmp_path / "results" / "first", "mcc-seed0", "mcc", 0, {"segmentation": 50.0}, splits=["val"])
    write_run(tmp_path / "results" / "second", "mcc-seed0", "mcc", 0, {"segmentation": 60.0}, splits=["val"])
    write_run(tmp_path / "results" / "voc", "afa-seed0", "afa", 0, {"segmentation": 70.0}, splits=["val"])
    found = tables.evidence()
    assert found["segmentation"].tolist() == [50.0, 60.0], "and not a user's own runs"
    assert found["folder"].tolist() == ["first", "second"]


def test_committed_evidence_has_every_method_of_the_table():
    found = tables.evidence()
    assert {"toco", "ssepa_affinity", "ssepa", "ssepa_plus"} <= set(found["method"])
    assert {"shapes", "voc_mini"} <= set(found["preset"]) and len(published.table_3(found)) > 4


def test_table_4_takes_measurements():
    columns = ["strategy", "batch", "gigabytes", "backbone", "setting"]
    measured = pd.DataFrame(
        [
            ("matrix_free", 1, 2.31, "ViT-B", "H100"),
            ("stack_heads", 1, 9.0, "ViT-B", "H100"),
            ("stack_heads", 2, 16.0, "ViT-B", "H100"),
        ],
        columns=columns,
    )
    table = published.table_4(measured)
    assert table["batch 1"].tolist()[3:] == ["9.0", "2.3"] and table["batch 2"].tolist()[3:] == ["16.0", "–"]
    sources = published.table_4(steps_at_published_size()).groupby("source", sort=False).size().to_dict()
    assert sources == {"published": 3, "measured here": 4, "formula": 3}
