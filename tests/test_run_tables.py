from pathlib import Path

import pandas as pd
import pytest
from conftest import TINY

from ssepa_lib.cli import main
from ssepa_lib.compose import save_recipe
from ssepa_lib.errors import UserError
from ssepa_lib.paths import PROJECT
from ssepa_lib.workbook import study, tables
from ssepa_lib.workbook.run_tables import (
    contrasts,
    curve_tables,
    mixed_training,
    run_tables,
    seed_by_seed,
    stored_runs_text,
    with_variants,
)
from ssepa_lib.workbook.tables import to_markdown

HERE = "val, 500 images, 224², 500 steps of 4"
COMMITTED = [path.parent for path in sorted((PROJECT / "results").glob("*/tables.md"))]


def runs(**methods):
    """Rows of `collect_runs`: name of a method → (pseudo-label, segmentation) of the seeds 0, 1, …"""
    setting = {
        "split": "val",
        "images": 500,
        "size": 224,
        "steps": 500,
        "batch": 4,
        "variant": "",
        "preset": "voc",
    }
    rows = [
        {**setting, "method": name, "seed": seed, "pseudo_label": label, "segmentation": segmentation}
        for name, values in methods.items()
        for seed, (label, segmentation) in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_means_and_paired_differences_by_hand():
    found = run_tables(
        runs(toco=[(30, 10), (34, 20), (38, 30)], ssepa=[(36, 11), (38, 19)]), [("ssepa", "toco")]
    )
    means = found[f"{HERE}: mean ± sd, %"].set_index("method")
    assert means.loc["toco"].tolist() == ["0, 1, 2", "34.0 ± 4.0", "20.0 ± 10.0"]
    assert means.loc["ssepa", "pseudo-label"] == "37.0 ± 1.4"
    apart = found[f"{HERE}: paired differences, points of mIoU"].iloc[0]
    assert apart.tolist() == ["ssepa − toco", "0, 1", "+5.0 (+6.0, +4.0)", "+0.0 (+1.0, -1.0)"]
    assert len(found[f"{HERE}: seed by seed, %"]) == 5


def test_differences_are_over_common_seeds_and_known_numbers():
    table = runs(toco=[(30, None), (34, None)], mcc=[(31, None)])
    found = run_tables(table, [("mcc", "toco"), ("afa", "toco")])
    apart = found[f"{HERE}: paired differences, points of mIoU"]
    assert apart.to_dict("records") == [{"difference": "mcc − toco", "seeds": "0", "pseudo-label": "+1.0"}]
    assert seed_by_seed(pd.Series([float("nan")])) == "–" and seed_by_seed(pd.Series([-0.01])) == "+0.0"


def test_a_number_of_some_seeds_names_them():
    table = runs(toco=[(30, 10), (34, 20)], mcc=[(31, 12), (36, 20)])
    table["segmentation_ms"] = [11.0, None, 13.5, None]
    found = run_tables(table, [("mcc", "toco")])
    modes = found[f"{HERE}: several scales and CRF, mIoU, %"].set_index("method")
    assert modes.loc["toco"].tolist() == ["0, 1", "32.0 ± 2.8", "15.0 ± 7.1", "11.0 [0]"]
    apart = found[f"{HERE}: several scales and CRF, paired differences"].iloc[0]
    assert apart.tolist() == ["mcc − toco", "0, 1", "+1.5 (+1.0, +2.0)", "+1.0 (+2.0, +0.0)", "+2.5 [0]"]


def test_a_row_of_differently_trained_seeds_is_named():
    rates = [{"optim": {"lr": lr}, "train": {"seed": seed}} for seed, lr in enumerate((1e-4, 1e-4, 2e-4))]
    table = runs(toco=[(1, 1)] * 3, mcc=[(1, 1)] * 2).assign(backbone="vit")
    table["run"] = table["method"] + "-seed" + table["seed"].astype(str)
    table["settings"] = [{"training": rate} for rate in rates] + [{}, {"training": rates[0]}]
    of_rates, of_unknown = mixed_training(table)
    assert "toco-seed0 and toco-seed2 share the row toco, but their settings differ (optim.lr)" in of_rates
    assert "mcc-seed0 and mcc-seed1" in of_unknown and "earlier version" in of_unknown
    assert not mixed_training(table[table["seed"] < 2][:2])


def test_every_setting_has_its_own_tables_and_further_columns_theirs():
    few = runs(toco=[(20, 5)]).assign(images=100, segmentation_ms_crf=7.0)
    table = pd.concat([few, runs(toco=[(30, 10)]).assign(**{"segmentation boundary_iou": 3.0})])
    found = run_tables(table, [])
    assert [title.split(": ")[0] for title in found] == [HERE, HERE, *[HERE.replace("500 i", "100 i")] * 2]
    further = found[f"{HERE}: precision, recall and boundary IoU, %"]
    assert further.columns.tolist() == ["method", "seeds", "segmentation, boundary IoU"]
    modes = list(found.values())[-1]
    assert modes.columns.tolist()[2:] == ["pseudo-label", "segmentation", "segmentation, MS + CRF"]


def test_a_seed_that_appears_twice_is_refused():
    with pytest.raises(UserError, match="several runs share method toco, seed 0"):
        run_tables(pd.concat([runs(toco=[(30, 10)])] * 2), [])


def test_what_is_worth_comparing():
    table = runs(toco=[(1, 1)], ssepa_plus_mean=[(1, 1)], ssepa_plus=[(1, 1)], mcc=[(1, 1)])
    long = table[table["method"] != "mcc"].assign(variant="long")
    assert contrasts(table) == [
        ("ssepa_plus_mean", "toco"),
        ("ssepa_plus", "toco"),
        ("ssepa_plus", "ssepa_plus_mean"),
        ("mcc", "toco"),
    ]
    both = pd.concat([table, long])
    assert {pair for pair in contrasts(both) if pair[0] == "ssepa_plus-long"} == {
        ("ssepa_plus-long", "toco-long"),
        ("ssepa_plus-long", "ssepa_plus_mean-long"),
        ("ssepa_plus-long", "ssepa_plus"),
    }
    assert ("toco-long", "toco") in contrasts(both)
    assert set(with_variants(long)["method"]) == {"toco-long", "ssepa_plus_mean-long", "ssepa_plus-long"}


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_the_committed_tables_are_those_of_the_command(folder, capsys):
    assert main(["tables", "runs", "--folder", str(folder)]) == 0
    assert capsys.readouterr().out == (folder / "tables.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", sorted(tables.evidence()["folder"].unique()))
def test_every_committed_folder_has_tables(folder):
    text = stored_runs_text(PROJECT / "results" / folder, "shapes")
    assert "mean ± sd, %" in text and "Setting of" in text


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_the_tables_of_a_readme_are_the_committed_ones(folder):
    made = set((folder / "tables.md").read_text(encoding="utf-8").splitlines())
    readme = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    titles = ("| method  ", "| difference  ", "| output  ")  # padded: those that the command made
    starts = [place for place, line in enumerate(readme) if line.startswith(titles)]
    assert len(starts) >= 4
    for start in starts:
        rows = readme[start : start + readme[start:].index("")]
        assert set(rows) <= made, [row for row in rows if row not in made]


def test_a_study_trains_the_arms_of_fsr_beside_the_method(tmp_path, monkeypatch, capsys):
    """An arm that is the method itself is not trained again; every arm is compared with the method."""
    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path))
    small = {**TINY, "train.steps": 2, "data.val_images": 2}
    changes = [f"--set={key}={value}" for key, value in small.items() if key != "train.device"]
    options = ["--seeds", "0", "--splits", "val", "--device", "cpu", "--processes", "1", "--run-name", "s"]
    assert main(["study", "shapes", "fsr", "--arms", "selection", "aggregation", *options, *changes]) == 0
    shown = capsys.readouterr().out
    folders = {path.parent.name for path in tmp_path.rglob("weights.safetensors")}
    assert folders == {f"fsr-s{arm}-seed0" for arm in ("", "-random", "-edge", "-strict", "-gap", "-gmp")}
    rows = [line for line in shown.splitlines() if line.startswith("| fsr-")]
    assert sum("− fsr-s " in line for line in rows) == 7, "the arms of both questions, but not the method"
    assert main(["study", "shapes", "fsr", "--arms", "mask", *options, *changes]) == 2
    assert "--arms is 'mask'; choose one or more of terms, mask ratio," in capsys.readouterr().err
    assert main(["study", "shapes", "toco", "--arms", "terms", *options, *changes]) == 2
    assert "--arms changes nothing in toco" in capsys.readouterr().err
    assert main(["study", "shapes", "toco", *options, *changes, "--set", "train.seed=5"]) == 2
    assert "use --seeds instead" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--folder", "nowhere"], "--folder nowhere does not exist"), (["--preset", "shpaes"], "shpaes")],
)
def test_tables_of_a_place_that_does_not_exist_are_refused(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path))
    assert main(["tables", "1", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_tables_of_runs_that_do_not_exist_name_the_command(tmp_path):
    with pytest.raises(UserError, match=r"contains no evaluated run\. Missing: .*study shapes toco ssepa"):
        stored_runs_text(Path(tmp_path), "shapes")


def test_curves_stand_output_by_output_with_a_column_per_step(tmp_path):
    """The mean is over the seeds that have a curve; an output without a number has no row."""
    for run, last in (("toco-seed0", 40), ("toco-seed1", 44), ("ssepa-seed0", 50)):
        (tmp_path / "voc" / run).mkdir(parents=True)
        text = f"step,cam,refined_cam,pseudo_label,segmentation\n0,7,,5,1\n500,{last},,33,0.5\n"
        (tmp_path / "voc" / run / "curve.csv").write_text(text)
    rows = runs(toco=[(1, 1), (1, 1)], ssepa=[(1, 1), (1, 1)])
    rows["run"] = [f"{name}-seed{seed}" for name, seed in zip(rows["method"], rows["seed"], strict=True)]
    (title,), (table,) = zip(*curve_tables(tmp_path, rows).items(), strict=True)
    assert title == "voc, at most 100 images, 224², 500 steps of 4: while it is trained, mIoU, %"
    assert list(table.columns) == ["output", "method", "seeds", "0", "500"]
    assert table.iloc[:2].values.tolist() == [
        ["CAM", "toco", "0, 1", 7.0, 42.0],
        ["CAM", "ssepa", "0", 7.0, 50.0],
    ]
    assert table["output"].unique().tolist() == ["CAM", "pseudo-label", "segmentation"]
    assert curve_tables(tmp_path / "none", rows) == {}
    shared = rows[rows["run"] == "toco-seed0"].assign(method="ssepa_no_affinity")  # one run, two names
    resized = rows.assign(size=448, images=10)
    (again,) = curve_tables(tmp_path, pd.concat([resized, rows, shared], ignore_index=True)).items()
    assert again[0] == title, "the curve is that of the study, not of a result at another size"
    assert again[1].query("output == 'CAM'")["method"].tolist() == ["toco", "ssepa", "ssepa_no_affinity"]
    own = study.recipe_for("voc_mini", "toco", changes={"data.eval_size": 96})
    for run in ("toco-seed0", "toco-seed1", "ssepa-seed0"):
        save_recipe(own, tmp_path / "voc" / run / "recipe.yaml")
    (found,) = curve_tables(tmp_path, rows.assign(size=[0, 448, 448, 0]))
    assert found == title.replace("224²", "96²"), "the size of the recipe, whatever came after"


def test_a_row_is_readable_markdown():
    table = run_tables(runs(toco=[(30, 10)]), [])[f"{HERE}: mean ± sd, %"]
    assert to_markdown(table).splitlines()[-1].split() == [
        "|",
        "toco",
        "|",
        "0",
        "|",
        "30.0",
        "|",
        "10.0",
        "|",
    ]
