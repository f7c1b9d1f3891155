"""Differences between methods, their noise, and the questions of FSR, on numbers checked by hand."""

import json
import math
import statistics

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from ssepa_lib.model import Attention
from ssepa_lib.paths import PROJECT
from ssepa_lib.recipe import AffinityConfig
from ssepa_lib.workbook import plan, tables
from ssepa_lib.workbook.ablations import FSR_ARMS, base_of
from ssepa_lib.workbook.studies import ablation_study as ablation
from ssepa_lib.workbook.studies import fsr_study
from ssepa_lib.workbook.tables import in_words


def runs_of(values, split="val"):
    """Rows of `collect_runs`: method → segmentation of the seeds 0, 1, …"""
    return pd.DataFrame(
        [
            {"method": method, "split": split, "seed": seed, "segmentation": value}
            for method, numbers in values.items()
            for seed, value in enumerate(numbers)
        ]
    )


def test_a_method_is_compared_with_the_one_it_extends():
    methods = ["toco", "ssepa_affinity", "ssepa", "mcc", "fsr+ssepa"]
    assert base_of("ssepa", methods) == "ssepa_affinity"
    assert base_of("ssepa", ["toco", "ssepa"]) == "toco", "its own base was not run"
    assert base_of("mcc", methods) == "toco" and base_of("fsr+ssepa", methods) == "ssepa"
    assert base_of("toco", methods) is None and base_of("mcc", ["mcc"]) is None


def test_differences_are_paired_by_seed():
    runs = runs_of({"toco": [10, 20, 30], "ssepa_affinity": [12, 21], "ssepa": [11, 25]})
    table = ablation.differences(runs, "here")
    assert table["comparison"].unique().tolist() == ["plain affinity − ToCo", "HAAF − plain affinity"]
    assert table["difference"].tolist() == [2, 1, -1, 4] and set(table["source"]) == {"here"}
    assert set(table["measure"]) == {"segmentation"}, "no pseudo-label was measured"
    on_test = ablation.differences(runs_of({"toco": [1.0], "mcc": [3.0]}, "test"), "here")
    assert on_test["difference"].tolist() == [2], "measured on the test stream alone"
    assert ablation.differences(runs_of({"mcc": [1.0]}), "here").empty


def test_committed_runs_are_paired_within_their_folder():
    first = runs_of({"toco": [10], "ssepa_affinity": [12]}).assign(folder="a", preset="shapes")
    second = runs_of({"toco": [20], "mcc": [23], "ssepa_affinity": [30]}).assign(folder="b", preset="shapes")
    table = ablation.committed_differences(pd.concat([first, second]), {"built-in": "shapes"})
    assert table.set_index("comparison")["difference"].to_dict() == {
        "plain affinity − ToCo": 2,
        "MCC − ToCo": 3,
    }


def test_spread_says_nothing_with_two_seeds():
    runs = runs_of({"toco": [0, 0, 0], "mcc": [1, 2, -3], "afa": [1, 2]})
    table = ablation.spread(ablation.differences(runs, "here")).set_index("comparison")
    three, two = table.iloc[0], table.iloc[1]
    assert (three["seeds"], three["mean"], three["least"], three["most"]) == (3, 0, -3, 2)
    assert three["sd"] == pytest.approx(math.sqrt(7)) and three["above 0"] == pytest.approx(2 / 3)
    assert two["seeds"] == 2 and math.isnan(two["sd"])
    assert in_words([1, 2, -3]) == "+0.0 ± 2.6 (3 seeds)"
    assert in_words([1, -2]) == "+1.0, -2.0 (2 seeds)" and in_words([]) == "– (0 seeds)"


def test_seeds_needed_by_hand():
    """z of 0.95 is 1.645: with sd 1 and half a point 3.29² = 10.8 seeds."""
    assert ablation.seeds_needed(0.5, 1.0) == 11 and ablation.seeds_needed(-0.5, 1.0) == 11
    assert ablation.seeds_needed(5.0, 1.0) == 1
    noise = torch.randn(4000, 11, generator=torch.Generator().manual_seed(0)) + 0.5
    assert float((noise.mean(1) > 0).float().mean()) == pytest.approx(0.95, abs=0.015)


def test_three_seeds_cannot_be_significant():
    assert ablation.permutation_p([1, 2, 3]) == 1 / 8
    assert ablation.permutation_p([1, 2, -3]) == 5 / 8  # sums ±6, ±4, ±2 and 0 twice; at least 0: five
    assert ablation.permutation_p([0.0]) == 1.0


def test_a_line_of_a_report_needs_a_number():
    numbers = {"ruler": 1.1, "seeds": 14, "gain": -2.25}
    report = {"seeds": "It takes 14.", "baseline": "They differ by 1.1 points.", "gain": "2.2 lost"}
    assert ablation.supported(report, numbers) == 3
    assert ablation.supported({"seeds": "many", "other": "114 or 11.1"}, numbers) == 0
    assert ablation.supported({"seeds": 3}, {"n": 3}) == 1, "an answer of the wrong type is no failure"


@pytest.mark.parametrize("vote", [None, 3, "AB", "", ["A"]])
def test_what_is_no_letter_is_no_vote(vote):
    text = ablation.card(vote, "B", "it is so.", "because.").data
    assert "You have not voted. Here: it is so. Our choice: B, because." in text
    assert "Your vote: A." in ablation.card(" a ", "B", "", "").data


@pytest.fixture
def attention():
    make = torch.Generator().manual_seed(0)
    sides = [[torch.randn(2, 3, 5, 4, generator=make) for _ in range(2)] for _ in range(2)]
    return Attention(*sides, num_prefix_tokens=1, grid=(2, 2))


def test_a_temperature_divides_the_logits(attention):
    config = AffinityConfig(kind="mean")
    plain = ablation.Tempered(config, temperature=1.0).affinity(attention).dense()
    warm = ablation.Tempered(config, temperature=2.0).affinity(attention).dense()
    logits = torch.stack([attention.layer_map(k, probabilities=False) for k in range(2)])
    by_hand = (logits / 2).softmax(-1).mean((0, 2))[:, 1:, 1:]
    torch.testing.assert_close(warm, by_hand)
    assert not torch.allclose(plain, warm)
    assert ablation.mean_entropy(attention, 2.0) > ablation.mean_entropy(attention)
    assert ablation.mean_entropy(attention, 1e6) == pytest.approx(math.log(5), abs=1e-4)


def test_row_sums_of_both_readings(attention):
    table = ablation.row_sums(attention)
    maps = attention.layer_map(1)[..., 1:, 1:].mean(1).sum(-1)
    assert table.loc[1, "probabilities"] == pytest.approx(float(maps.mean())) and len(table) == 2
    assert (table["probabilities"] <= 1).all() and (table["logits sd"] > table["probabilities sd"]).all()


def test_every_question_of_fsr_has_its_arms():
    for question in fsr_study.QUESTIONS:
        assert {question.changed, question.base} <= set(FSR_ARMS[question.arms])
    assert {question.arms for question in fsr_study.QUESTIONS} == set(FSR_ARMS)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([1, 2, 1], "helps"),
        ([-1, -2, -1], "hurts"),
        ([1, -1, 3], "not shown"),
        ([0.1, 0.2, 0.3], "not shown"),
        ([3, 4], "not shown"),
        ([9.0], "not shown"),
        ([], "not run"),
    ],
)
def test_what_a_difference_shows(values, word):
    assert fsr_study.reads(pd.Series(values, dtype=float)) == word


def test_fsr_questions_on_committed_runs_and_live_ones():
    table = fsr_study.questions().set_index("question")
    assert table.loc["Does unc.FSR help?", "photographs"] == "helps: +3.8 ± 1.1 (3 seeds)"
    assert table.loc["Does unc.FSR help?", "built-in"].startswith("not shown: -0.1 ± 0.0")
    assert table.loc["AutoAugment?", "built-in"].startswith("hurts: -4.7")
    assert table.loc["MCA or GAP?", "photographs"] == "not shown: -2.6, +2.5 (2 seeds)"
    assert table.loc["MCA or GAP?", "built-in"] == "not run" and "this run" not in table
    arms = [
        {"preset": "shapes", "variant": arm, "seed": seed, "pseudo_label": 10.0 * i + seed}
        for i, arm in enumerate(FSR_ARMS["views"])
        for seed in (0, 1, 2)
    ]
    live = fsr_study.questions({"views": pd.DataFrame(arms)}).set_index("question")
    assert live.loc["FSR's views or ToCo's?", "this run"] == "helps: +10.0 ± 0.0 (3 seeds)"
    assert live.loc["MCA or GAP?", "this run"] == "not run"


def test_committed_arms_of_fsr_are_the_stored_runs():
    """By hand: loose − strict from the two files; the method itself stands for its arm of every question."""
    folder = PROJECT / "results/fsr_arms/gpu"
    own, strict = (
        json.loads((folder / run / "metrics.json").read_text())["val"]["miou"]["segmentation"]
        for run in ("fsr-seed1", "fsr-strict-seed1")
    )
    arms = fsr_study.committed_arms()["photographs"]
    question = next(q for q in fsr_study.QUESTIONS if q.base == "strict")
    difference = fsr_study.arm_difference(arms, question, "segmentation")
    assert difference["gpu", 1] == pytest.approx(own - strict)
    method = arms[(arms["preset"] == "gpu") & (arms["run"] == "fsr-seed1")]
    assert dict(zip(method["question"], method["arm"], strict=True)) == {
        "terms": "unc and cer",
        "mask ratio": "r = 0.4",
        "selection": "loose",
        "aggregation": "mca",
        "augmentation": "none",
        "views": "fsr",
    }


@pytest.mark.parametrize("output", ["pseudo_label", "segmentation"])
def test_the_page_of_the_arms_shows_the_answers(output):
    page = (PROJECT / "results/fsr_arms/README.md").read_text(encoding="utf-8")
    assert tables.to_markdown(fsr_study.questions(output=output)) in page


def test_arms_are_compared_within_what_was_trained_together():
    question = fsr_study.QUESTIONS[0]
    rows = [("a", question.changed, 50.0), ("b", question.changed, 30.0), ("b", question.base, 20.0)]
    runs = pd.DataFrame(rows, columns=["preset", "arm", "pseudo_label"]).assign(question="terms", seed=0)
    assert fsr_study.arm_difference(runs, question).to_dict() == {("b", 0): 10.0}


def test_missing_arms_say_command_and_time(tmp_path, monkeypatch):
    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path))
    said = plan.missing_runs("shapes", ["fsr"], [0, 1], arms="mask ratio", device="cpu")
    assert "fsr-r-=-0.1-seed0" in said
    assert "`python -m ssepa_lib study shapes fsr --arms 'mask ratio' --seeds 0 1` trains" in said
    assert " min on " in said or " s on " in said
    changes = {"losses.cer": 0.0, "train.precision": "fp32"}
    said = plan.missing_runs(
        "shapes", ["fsr"], [0], arms="views", steps=7, run_name="a", changes=changes, device="cpu"
    )
    assert "--seeds 0 --steps 7 --run-name a --set losses.cer=0.0 --set train.precision=fp32` trains" in said


def test_gains_are_those_of_one_setting_each():
    strong = runs_of({"toco": [30.0, 32.0], "ssepa": [31.0, 31.0], "ssepa_plus": [33.0, 34.0]})
    strong = pd.concat([strong, runs_of({"mcc": [35.0]})])
    weak = runs_of({"mcc": [5.0], "toco": [10.0], "ssepa": [20.0], "afa": [5.0]})
    runs = pd.concat([strong.assign(preset="b"), weak.assign(preset="a")])
    table = ablation.gains_by_setting(runs, {"weak": "a", "strong": "b"}, "segmentation")
    assert table["method"].tolist() == ["ToCo", "HAAF", "MCC"], "the others are not in both settings"
    assert table["extends"].tolist() == ["", "ToCo", "ToCo"]
    assert table["weak"].tolist() == ["10.0", "20.0", "5.0"]
    assert table["strong"].tolist() == ["31.0 ± 1.4", "31.0 ± 0.0", "35.0"]
    assert table["weak, gain"].tolist() == ["", "+10.0 (1 seed)", "-5.0 (1 seed)"]
    assert table["strong, gain"].tolist() == ["", "+1.0, -1.0 (2 seeds)", "+5.0 (1 seed)"]


def test_micro_backbones_stand_beside_each_other_with_cost_and_quality():
    table = ablation.backbone_table(tables.evidence(), tables.benchmark("backbones/bench.json"))
    assert table["backbone"].tolist() == ["micro ViT", "micro Swin", "micro EfficientFormer"]
    assert table["seeds"].tolist() == [3, 3, 3] and table["time"][0] == "1.00"
    folder = PROJECT / "results" / "backbones" / "shapes"
    found = [
        json.loads(path.read_text())["test"]["miou"]["segmentation"]
        for path in sorted(folder.glob("ssepa_plus-swin_micro-seed*/metrics.json"))
    ]
    mean, sd = statistics.mean(found), statistics.stdev(found)
    assert table["segmentation"][1] == f"{mean:.1f} ± {sd:.1f}"
    weights = PROJECT / "ssepa_lib" / "weights"
    for name, file in (("Swin", "swin"), ("EfficientFormer", "efficientformer")):
        state = load_file(weights / f"{file}_micro_shapes.safetensors")
        count = sum(x.numel() for k, x in state.items() if "running" not in k and "num_batches" not in k)
        shown = float(table.set_index("backbone")["M"][f"micro {name}"])
        assert count / 1e6 == pytest.approx(shown, rel=0.1), "the costs are those of these networks"
