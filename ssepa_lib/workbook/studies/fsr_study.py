"""FSR's ablations: what its paper says, and what was measured on photographs, on built-in images and live.

The paper's numbers are not among our sources, only its statements; ours are committed (`results/voc_mini`,
`results/shapes_reference`) or come from the arms that a notebook trains (`ablations.FSR_ARMS`).
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from ssepa_lib.workbook.ablations import FSR_ARMS
from ssepa_lib.workbook.plan import remedy
from ssepa_lib.workbook.studies.ablation_study import in_words
from ssepa_lib.workbook.study import study_jobs
from ssepa_lib.workbook.tables import committed

SMALLEST = (
    0.5  # points below which a difference is not worth the name: the smallest claim of SS-EPA's Table 3
)


class Question(NamedTuple):
    """One question of FSR's ablations."""

    asks: str
    paper: str  # what FSR reports for VOC
    arms: str  # key of FSR_ARMS
    changed: str  # the arm that has what is asked about …
    base: str  # … and the one without it


QUESTIONS = (
    Question(
        "Does unc.FSR help?", "helps much, pseudo-labels and segmentation", "terms", "unc and cer", "cer only"
    ),
    Question("Does cer.FSR add to it?", "adds to unc.FSR", "terms", "unc and cer", "unc only"),
    Question("Which mask ratio?", "r = 0.4 is best", "mask ratio", "r = 0.4", "r = 0.1"),
    Question("Uncertain or random blocks?", "uncertain is mostly better", "selection", "loose", "random"),
    Question(
        "Activation or edges?",
        "activation, and loose selection better than strict",
        "selection",
        "loose",
        "edge",
    ),
    Question("Which aggregator?", "MCA far ahead of GAP, GAP ahead of GMP", "aggregation", "mca", "gap"),
    Question("Blur?", "changes little", "augmentation", "blur", "none"),
    Question("AutoAugment?", "costs a little", "augmentation", "autoaugment", "none"),
    Question("FSR's views or ToCo's?", "not studied by itself", "views", "fsr", "toco"),
)
_PHOTOS = {
    ("terms", "unc and cer"): "fsr",
    ("terms", "cer only"): "fsr cer-only",
    ("terms", "unc only"): "fsr unc-only",
}
_BUILT_IN = {
    ("terms", "unc and cer"): "as published",
    ("terms", "cer only"): "cer-only",
    ("terms", "unc only"): "unc-only",
    ("augmentation", "none"): "as published",
    ("augmentation", "autoaugment"): "autoaugment",
    ("views", "fsr"): "no-terms",
    ("views", "toco"): "neither",
}  # arm of FSR_ARMS → variant in the committed table


def committed_arms() -> dict[str, pd.DataFrame]:
    """The committed runs of FSR's arms, by world; columns question, arm and those of the runs."""
    photos = committed("voc_mini/runs.csv").query("split == 'val'")
    built_in = committed("shapes_reference/fsr_arms.csv")
    worlds = {"photographs": (photos, "method", _PHOTOS), "built-in": (built_in, "variant", _BUILT_IN)}
    return {
        world: pd.concat(
            runs[runs[column] == name].assign(question=question, arm=arm)
            for (question, arm), name in names.items()
        )
        for world, (runs, column, names) in worlds.items()
    }


def arm_difference(runs: pd.DataFrame, question: Question, output: str = "pseudo_label") -> pd.Series:
    """What an arm adds to another, points of mIoU, index seed; empty where one of them was not run.

    Args:
        runs: columns question, arm, seed and the outputs.
    """
    own = runs[runs["question"] == question.arms] if len(runs) else runs
    if own.empty:
        return pd.Series(dtype=float)
    with_it, without = (
        own[own["arm"] == arm].set_index("seed")[output] for arm in (question.changed, question.base)
    )
    return (with_it - without).dropna()


def reads(difference: pd.Series) -> str:
    """What a paired difference shows: `helps`, `hurts`, or `not shown` where seeds disagree, the mean is
    below half a point, or there are fewer than two seeds."""
    if difference.empty:
        return "not run"
    if len(difference) > 1 and abs(difference.mean()) >= SMALLEST:
        if (difference > 0).all():
            return "helps"
        if (difference < 0).all():
            return "hurts"
    return "not shown"


def questions(live: Mapping[str, pd.DataFrame] | None = None) -> pd.DataFrame:
    """Every question beside its answers: the paper's, on photographs, on built-in images, in this run.

    Args:
        live: question of FSR_ARMS → its runs of `run_study`.

    Returns:
        Columns question, compared, paper, photographs, built-in and, where there are live runs, this run.
        Differences are those of the pseudo-label at one scale, points of mIoU, same seed.
    """
    worlds = committed_arms()
    if live:
        parts = [runs.assign(question=name, arm=runs["variant"]) for name, runs in live.items()]
        worlds["this run"] = pd.concat(parts)
    rows = []
    for question in QUESTIONS:
        row = {"question": question.asks, "compared": f"{question.changed} − {question.base}"}
        row["FSR's paper"] = question.paper
        for world, runs in worlds.items():
            difference = arm_difference(runs, question)
            said = reads(difference)
            row[world] = said if difference.empty else f"{said}: {in_words(difference)}"
        rows.append(row)
    return pd.DataFrame(rows)


def missing_arms(
    preset: str,
    question: str,
    seeds: Sequence[int],
    *,
    steps: int = 0,
    device: str = "auto",
    run_name: str = "",
    changes: Mapping[str, object] | None = None,
) -> str:
    """What makes the runs of a question that are not there yet, and how long it takes; empty if all are.

    Args:
        question: key of FSR_ARMS.
        steps, device, run_name, changes: as for `study.run_study`.
    """
    options = {"steps": steps, "device": device, "run_name": run_name, "changes": changes}
    jobs = study_jobs(preset, ["fsr"], seeds, splits={}, arms=FSR_ARMS[question], **options)
    words = ["study", preset, "fsr", "--arms", question, "--seeds", *map(str, seeds)]
    words += ["--steps", str(steps)] if steps else []
    words += ["--run-name", run_name] if run_name else []
    words += [word for name, value in (changes or {}).items() for word in ("--set", f"{name}={value}")]
    return remedy(list(jobs.values()), f"python -m ssepa_lib {shlex.join(words)}")
