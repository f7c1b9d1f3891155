"""Scores of a run while it is trained: the run stays as it is, and an interrupted curve is continued."""

import dataclasses

import pandas as pd
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from ssepa_lib.cli import main
from ssepa_lib.data import measured_split
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation import evaluate
from ssepa_lib.training.run import load_run
from ssepa_lib.training.trainer import train
from ssepa_lib.workbook.figures import plot_score_curves
from ssepa_lib.workbook.score_curve import SCORED, ScoreCurve, mean_curves, read_curve
from ssepa_lib.workbook.watch import Watch


def test_scoring_leaves_the_run_as_it_is_and_ends_with_its_result(tiny, tmp_path):
    recipe = tiny("ssepa", **{"train.steps": 4, "train.log_every": 1})
    watched, plain = tmp_path / "watched", tmp_path / "plain"
    train(recipe, plain)
    train(recipe, watched, watch=ScoreCurve(recipe, watched, points=2, images=3))
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (watched, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    curve = read_curve(watched)
    assert curve["step"].tolist() == [0, 2, 4] and list(curve) == ["step", *SCORED]
    network, recipe = load_run(watched, "cpu")
    expected = evaluate(network, recipe, measured_split(recipe, "val", 3), device="cpu", outputs=SCORED)
    assert curve.iloc[-1][list(SCORED)].to_dict() == pytest.approx(expected["miou"])


def test_an_interrupted_curve_is_continued_and_a_restarted_one_begins_anew(tiny, tmp_path):
    recipe = tiny("toco", **{"train.steps": 4, "train.log_every": 1, "train.save_every": 2})

    class Stop(Exception):
        pass

    def stop(row):
        if row["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        train(recipe, tmp_path, on_step=stop, watch=ScoreCurve(recipe, tmp_path, points=4, images=2))
    assert read_curve(tmp_path)["step"].tolist() == [0, 1, 2]
    train(recipe, tmp_path, watch=ScoreCurve(recipe, tmp_path, points=4, images=2))
    curve = read_curve(tmp_path)
    assert curve["step"].tolist() == [0, 1, 2, 3, 4] and curve["refined_cam"].isna().all()
    shorter = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=2))
    train(shorter, tmp_path / "b", watch=ScoreCurve(shorter, tmp_path / "b", points=1, images=2))
    train(
        shorter, tmp_path / "b", resume=False, watch=ScoreCurve(shorter, tmp_path / "b", points=1, images=2)
    )
    assert read_curve(tmp_path / "b")["step"].tolist() == [0, 2]


def write(folder, steps, value):
    folder.mkdir()
    rows = "".join(f"{step},{value + step},,{value},{2 * value}\n" for step in steps)
    (folder / "curve.csv").write_text(f"step,{','.join(SCORED)}\n{rows}")
    return folder


def test_curves_are_averaged_over_the_seeds_that_have_one(tmp_path):
    runs = [write(tmp_path / "toco-seed1", (0, 10, 20), 1), write(tmp_path / "toco-seed3", (0, 20), 3)]
    table = mean_curves({"toco": [*runs, tmp_path / "none"], "fsr": [tmp_path / "none"]})
    assert table["method"].tolist() == ["toco", "toco"] and table["seeds"].tolist() == ["1, 3", "1, 3"]
    assert table["step"].tolist() == [0, 20] and table["cam"].tolist() == [2, 22]
    axes = plot_score_curves(table)
    assert [ax.get_title() for ax in axes] == ["CAM", "pseudo-label", "segmentation"]
    assert axes[0].lines[0].get_ydata().tolist() == [2, 22]
    assert mean_curves({"toco": [tmp_path / "none"]}).empty


def test_a_line_of_fewer_seeds_is_dashed_and_says_so():
    seeds = {"toco": "0, 1", "mcc": "0, 1", "afa": "1", "fsr": "1, 2"}
    rows = [(method, seeds[method], step, 1.0) for method in seeds for step in (0, 10)]
    axes = plot_score_curves(pd.DataFrame(rows, columns=["method", "seeds", "step", "cam"]))
    lines = {line.get_label(): line.get_linestyle() for line in axes[0].lines}
    assert lines == {"toco": "-", "mcc": "-", "afa, only seed 1": "--", "fsr, only seeds 1, 2": "--"}


@pytest.mark.parametrize(
    ("text", "words"), [("a,b\n1,2\n", "not the curve"), ("", "empty"), (None, "numbers")]
)
def test_a_damaged_curve_is_named(tmp_path, text, words):
    header = ",".join(["step", *SCORED])
    (tmp_path / "curve.csv").write_text(f"{header}\n1,much,,2,3\n" if text is None else text)
    with pytest.raises(UserError, match=rf"curve\.csv.*{words}"):
        read_curve(tmp_path)


@pytest.mark.parametrize("rows", ["5,1,,1,1\n0,1,,1,1", "-5,1,,1,1", ",1,,1,1", "0,101,,1,1"])
def test_a_curve_of_impossible_numbers_is_named(tmp_path, rows):
    (tmp_path / "curve.csv").write_text(f"{','.join(['step', *SCORED])}\n{rows}\n")
    with pytest.raises(UserError, match=r"curve\.csv is damaged"):
        read_curve(tmp_path)


def test_a_curve_that_begins_late_does_not_catch_up(tmp_path):
    class Steps(Watch):
        take, store = (lambda self, network: {}), (lambda self: None)

    seen = Steps(tmp_path / "steps", 100, 4, {})
    for step in range(50, 101, 5):
        seen(None, step)
    assert seen.steps == [50, 75, 100]


def test_a_study_scores_its_runs_and_draws_their_curves(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path))
    small = {**TINY, "train.steps": 2, "data.val_images": 2}
    changes = [f"--set={key}={value}" for key, value in small.items() if key != "train.device"]
    options = ["--seeds", "0", "1", "--splits", "val", "--device", "cpu", "--processes", "1"]
    command = ["study", "shapes", "toco", "ssepa", *options, *changes, "--run-name", "long"]
    assert main(command) == 0 and "curves.png" not in capsys.readouterr().out
    assert main([*command, "--set=optim.lr=0.001", "--curve", "2"]) == 2, "the folders hold other runs"
    command[-1] = "longer"
    assert main([*command, "--set=optim.lr=0.001", "--curve", "2"]) == 0
    figure = tmp_path / "shapes" / "figures" / "study-longer-curves.png"
    assert str(figure) in capsys.readouterr().out and figure.stat().st_size > 3000
    assert read_curve(tmp_path / "shapes" / "ssepa-longer-seed1")["step"].tolist() == [0, 1, 2]
    for run in ("toco-longer-seed0", "ssepa-longer-seed1"):
        (tmp_path / "shapes" / run / "curve.csv").unlink()
    assert main([*command, "--set=optim.lr=0.001", "--curve", "2"]) == 0
    assert "without a curve: toco-longer-seed0, ssepa-longer-seed1;" in capsys.readouterr().out
    assert main(["study", "shapes", "toco", "--curve", "-1"]) == 2
    assert "curve is -1" in capsys.readouterr().err
