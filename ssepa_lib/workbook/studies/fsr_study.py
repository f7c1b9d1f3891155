"""FSR's ablations: what its paper says, and what was measured on photographs, on built-in images and live.

The paper's numbers are not among our sources, only its statements; ours are committed (`results/fsr_arms`,
`results/shapes_reference`, and for the two terms `results/slow_classifiers`) or come from the arms that a
notebook trains (`ablations.FSR_ARMS`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from ssepa_lib.compose import load_recipe
from ssepa_lib.workbook.ablations import FSR_ARMS
from ssepa_lib.workbook.study import folder_name
from ssepa_lib.workbook.tables import committed, committed_runs, in_words

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
    Question("Mask ratio 0.4 or 0.1?", "0.4 is best", "mask ratio", "r = 0.4", "r = 0.1"),
    Question("Mask ratio 0.4 or 0.25?", "0.4 is best", "mask ratio", "r = 0.4", "r = 0.25"),
    Question("Mask ratio 0.4 or 0.55?", "0.4 is best", "mask ratio", "r = 0.4", "r = 0.55"),
    Question("Mask ratio 0.4 or 0.7?", "0.4 is best", "mask ratio", "r = 0.4", "r = 0.7"),
    Question("Uncertain or random blocks?", "uncertain is mostly better", "selection", "loose", "random"),
    Question("Activation or edges?", "activation is better", "selection", "loose", "edge"),
    Question("Loose or strict selection?", "loose is better", "selection", "loose", "strict"),
    Question("MCA or GAP?", "MCA is far ahead", "aggregation", "mca", "gap"),
    Question("GAP or GMP?", "GAP is ahead", "aggregation", "gap", "gmp"),
    Question("Blur?", "changes little", "augmentation", "blur", "none"),
    Question("Solarise?", "changes little", "augmentation", "solarise", "none"),
    Question("AutoAugment?", "costs a little", "augmentation", "autoaugment", "none"),
    Question("FSR's views or ToCo's?", "not studied by itself", "views", "fsr", "toco"),
)
_TERMS = {"fsr": "unc and cer", "fsr cer-only": "cer only", "fsr unc-only": "unc only"}
_BUILT_IN = {
    ("terms", "unc and cer"): "as published",
    ("terms", "cer only"): "cer-only",
    ("terms", "unc only"): "unc-only",
    ("augmentation", "none"): "as published",
    ("augmentation", "autoaugment"): "autoaugment",
    ("views", "fsr"): "no-terms",
    ("views", "toco"): "neither",
}  # arm of FSR_ARMS → variant in the committed table


def _arm_names() -> pd.DataFrame:
    """Which arm of which question a run of `fsr` is: columns question, arm and variant.

    A variant bears the arm's name; the method itself, whose variant is empty, is one arm of every question.
    """
    method = load_recipe("voc_mini/fsr")
    rows = [
        (question, arm, "" if load_recipe("voc_mini/fsr", own) == method else folder_name(arm))
        for question, arms in FSR_ARMS.items()
        for arm, own in arms.items()
    ]
    return pd.DataFrame(rows, columns=["question", "arm", "variant"])


def committed_arms() -> dict[str, pd.DataFrame]:
    """The committed runs of FSR's arms, by world; columns question, arm and those of the runs.

    What was trained together has the same `preset`.
    """
    photos = committed_runs("fsr_arms", variants=True).merge(_arm_names(), on="variant")
    earlier = committed("slow_classifiers/runs.csv").query("split == 'val'")
    earlier = earlier.assign(preset="voc_mini", question="terms", arm=earlier["method"].map(_TERMS))
    built_in = committed("shapes_reference/fsr_arms.csv")
    named = [
        built_in[built_in["variant"] == variant].assign(question=question, arm=arm)
        for (question, arm), variant in _BUILT_IN.items()
    ]
    return {"photographs": pd.concat([photos, earlier.dropna(subset="arm")]), "built-in": pd.concat(named)}


def arm_difference(runs: pd.DataFrame, question: Question, output: str = "pseudo_label") -> pd.Series:
    """What an arm adds to another, points of mIoU, in the runs that were trained together.

    Args:
        runs: columns preset, question, arm, seed and the outputs.

    Returns:
        Index preset and seed; empty where one of the arms was not run.
    """
    own = runs[runs["question"] == question.arms] if len(runs) else runs
    if own.empty:
        return pd.Series(dtype=float)
    with_it, without = (
        own[own["arm"] == arm].set_index(["preset", "seed"])[output]
        for arm in (question.changed, question.base)
    )
    return (with_it - without).dropna().sort_index(level="seed")


def reads(difference: pd.Series) -> str:
    """What a paired difference shows: `helps`, `hurts`, or `not shown` where seeds disagree, the mean is
    below half a point, or there are fewer than three seeds: two agree by chance half of the time."""
    if difference.empty:
        return "not run"
    if len(difference) > 2 and abs(difference.mean()) >= SMALLEST:
        if (difference > 0).all():
            return "helps"
        if (difference < 0).all():
            return "hurts"
    return "not shown"


def questions(live: Mapping[str, pd.DataFrame] | None = None, output: str = "pseudo_label") -> pd.DataFrame:
    """Every question beside its answers: the paper's, on photographs, on built-in images, in this run.

    Args:
        live: question of FSR_ARMS → its runs of `run_study`.
        output: what is compared, at one scale.

    Returns:
        Columns question, compared, paper, photographs, built-in and, where there are live runs, this run.
        Differences in points of mIoU, same seed.
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
            difference = arm_difference(runs, question, output)
            said = reads(difference)
            row[world] = said if difference.empty else f"{said}: {in_words(difference)}"
        rows.append(row)
    return pd.DataFrame(rows)
