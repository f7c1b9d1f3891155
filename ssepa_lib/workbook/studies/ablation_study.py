"""What an ablation shows: paired differences between methods, their noise, and how many seeds they need.

A method is compared with the one it extends (`ablations.base_of`), seed by seed.
"""

import itertools
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import pandas as pd
import torch
from IPython.display import HTML
from torch import Tensor

from ssepa_lib.compose import method_title
from ssepa_lib.data import SegmentationDataset
from ssepa_lib.evaluation import evaluate
from ssepa_lib.evaluation.attention import attention_entropy
from ssepa_lib.labels import Refiner, multi_scale_cam
from ssepa_lib.model import Attention, Network, PatchAffinity
from ssepa_lib.recipe import Recipe
from ssepa_lib.workbook import lesson
from ssepa_lib.workbook.ablations import BASE, COMPARED, MICRO, base_of
from ssepa_lib.workbook.studies.haaf_study import PAPER, uniform_refiner
from ssepa_lib.workbook.study import samples
from ssepa_lib.workbook.tables import in_words, plus_minus

SHORT = {
    BASE: "ToCo",
    "ssepa_no_affinity": "no affinity",
    "ssepa_affinity": "plain affinity",
    "ssepa": "HAAF",
    "ssepa_plus_mean": "balanced affinity",
    "ssepa_plus": "SS-EPA plus",
}  # method → a word for the axis of a figure
PLACES = {
    "every scale, 1 time": {},
    "every scale, 2 times": {"iterations": 2},
    "once on the sum, 1 time": {"per_scale": False},
    "once on the sum, 2 times": {"per_scale": False, "iterations": 2},
    "once on the sum, 3 times": {"per_scale": False, "iterations": 3},
    "every scale, 1 time, auxiliary map too": {"auxiliary": True},
}  # where the affinity acts → what differs from the paper's form, which refines the main map alone
MEASURES = {"pseudo-label": ("train", "pseudo_label"), "segmentation": ("val", "segmentation")}


def short_name(method: str) -> str:
    """A method in a word or two."""
    return SHORT.get(method, method_title(method))


def differences(runs: pd.DataFrame, source: str) -> pd.DataFrame:
    """Paired differences of every method from the one it extends, one row per seed.

    Args:
        runs: rows of `tables.collect_runs` of one preset, without variants. The pseudo-label is compared on
            `train` and the segmentation on `val`; where not both runs were measured there, on `test`, then on
            `val`.
        source: what a figure calls these runs.

    Returns:
        Columns comparison, measure, source, seed and difference (points of mIoU).
    """
    rows = []
    for measure, (split, output) in MEASURES.items():
        parts = [_by_method(runs, part, output) for part in (split, "test", "val")]
        for method in dict.fromkeys(itertools.chain(*parts)):
            for values in parts:
                base = base_of(method, list(values)) if method in values else None
                if base is not None:
                    row = {"comparison": f"{short_name(method)} − {short_name(base)}", "measure": measure}
                    apart = (values[method] - values[base]).dropna()
                    rows += [row | {"source": source, "seed": s, "difference": d} for s, d in apart.items()]
                    break
    return pd.DataFrame(rows, columns=["comparison", "measure", "source", "seed", "difference"])


def committed_differences(runs: pd.DataFrame, worlds: Mapping[str, str]) -> pd.DataFrame:
    """`differences` of the runs of `tables.evidence`, each paired with runs of its own folder.

    Args:
        runs: without variants.
        worlds: what a figure calls them → preset.
    """
    found = [
        differences(rows, name)
        for name, preset in worlds.items()
        for _, rows in runs[runs["preset"] == preset].groupby("folder")
    ]
    keys = ["comparison", "measure", "source", "seed"]
    return pd.concat(found, ignore_index=True).drop_duplicates(keys, ignore_index=True)


def gains_by_setting(runs: pd.DataFrame, worlds: Mapping[str, str], output: str) -> pd.DataFrame:
    """What methods reach in several settings, and what each gains there on the method it extends.

    Args:
        runs: rows of `tables.evidence` without variants; the validation split counts.
        worlds: name of a setting → preset.
        output: a column of mIoU.

    Returns:
        One row per method that every setting has: what it extends, and per setting its value and its gain.
    """
    values = {
        world: _by_method(runs[runs["preset"] == preset], "val", output) for world, preset in worlds.items()
    }
    known = dict.fromkeys([BASE, *COMPARED, *itertools.chain(*values.values())])
    methods = [m for m in known if all(m in by_method for by_method in values.values())]
    rows = []
    for method in methods:
        base = base_of(method, methods)
        row = {"method": short_name(method), "extends": "" if base is None else short_name(base)}
        for world, by_method in values.items():
            row[world] = plus_minus(by_method[method].mean(), by_method[method].std())
            row[f"{world}, gain"] = "" if base is None else in_words(by_method[method] - by_method[base])
        rows.append(row)
    return pd.DataFrame(rows)


def _by_method(runs: pd.DataFrame, split: str, output: str) -> dict[str, pd.Series]:
    """Method → value of every seed on a split."""
    if output not in runs:
        return {}
    chosen = runs[runs[output].notna() & (runs["split"] == split)]
    return {
        method: rows.drop_duplicates("seed").set_index("seed")[output].astype(float)
        for method, rows in chosen.groupby("method", sort=False)
    }


def spread(differences: pd.DataFrame) -> pd.DataFrame:
    """Differences seed by seed as one row each: mean, sd, smallest, largest and the share above 0.

    With fewer than three seeds there is no spread worth a number: `sd` is then NaN, and `seeds` says so.
    """
    by = differences.groupby(["comparison", "measure", "source"], sort=False)["difference"]
    table = by.agg(seeds="count", mean="mean", sd="std", least="min", most="max")
    table["above 0"] = by.agg(lambda values: (values > 0).mean())
    table.loc[table["seeds"] < 3, "sd"] = math.nan
    return table.reset_index()


def seeds_needed(difference: float, sd: float, share: float = 0.95) -> int:
    """Seeds whose mean paired difference has the right sign in a share of all cases.

    The mean of n differences that are normally distributed around the true one has the standard deviation
    sd/√n, so that n ≥ (z · sd / difference)², z the quantile of the share (1.645 for 0.95).

    Args:
        difference: the true one, points; not 0.
        sd: standard deviation of the paired difference over seeds, points.
    """
    return max(1, math.ceil((NormalDist().inv_cdf(share) * sd / difference) ** 2))


def permutation_p(differences: Sequence[float]) -> float:
    """One-sided p of a permutation test: the share of the 2ⁿ patterns of signs whose mean is as large.

    If a method does nothing, a difference is as likely to be +d as −d. With n seeds p is never below 2⁻ⁿ.
    """
    size = [abs(d) for d in differences]
    patterns = itertools.product((1, -1), repeat=len(size))
    sums = [sum(s * d for s, d in zip(signs, size, strict=True)) for signs in patterns]
    return sum(total >= sum(differences) - 1e-12 for total in sums) / len(sums)


def backbone_table(runs: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The micro backbones of the built-in data: what each costs and what it reaches.

    Args:
        runs: rows of `tables.evidence`; those of `ssepa_plus` on the built-in test stream count, in the form
            that multiplies every map three times, in which all backbones were trained.
        rows: rows of the benchmark `backbones`, from `tables.benchmark`.

    Returns:
        One row per backbone: parameters (M), GFLOP of a forward pass, peak memory of a step (MB) and its
        time (relative to the ViT's), seeds, and mIoU in percent, mean ± sd over seeds.
    """
    table = []
    test = runs[(runs["preset"] == "shapes") & (runs["method"] == "ssepa_plus") & (runs["split"] == "test")]
    for name, suffix in MICRO.items():
        costs = rows[rows["setting"].str.startswith(f"micro {name},")].set_index("name")["value"]
        found = test[test["variant"] == (suffix.strip("/") or "three")].drop_duplicates("seed")
        row = {
            "backbone": f"micro {name}",
            "M": f"{costs['parameters']:.2f}",
            "GFLOP": f"{costs['forward pass of an image']:.2f}",
            "MB": f"{costs['peak memory of a step, affinity']:.0f}",
            "time": costs["step time, affinity"],
            "seeds": len(found),
        }
        outputs = {"CAM": "cam", "refined map": "refined_cam", "pseudo-label": "pseudo_label"}
        for title, output in {**outputs, "segmentation": "segmentation"}.items():
            row[title] = plus_minus(found[output].astype(float).mean(), found[output].astype(float).std())
        table.append(row)
    first = table[0]["time"]
    return pd.DataFrame([row | {"time": f"{row['time'] / first:.2f}"} for row in table])


def supported(report: Mapping[str, str], numbers: Mapping[str, float]) -> int:
    """How many lines of a referee report rest on a number of the notebook, written with one or two decimals
    or, if it is a count, as it is.

    Args:
        report: topic → line.
        numbers: what the notebook has computed.
    """
    known = {f"{abs(value):.{digits}f}" for value in numbers.values() for digits in (1, 2)}
    known |= {str(value) for value in numbers.values() if isinstance(value, int)}
    lines = [str(line) for line in report.values()]
    return sum(bool(known & set(re.findall(r"\d+(?:\.\d+)?", line))) for line in lines)


def card(vote: object, choice: str, result: str, reason: str) -> HTML:
    """The computed half of a card: the reader's vote, what the experiment gave, what we chose and why.

    Args:
        vote: a letter or None; anything else is said to be no vote.
        choice: the letter of our reading.
    """
    voted = isinstance(vote, str) and len(vote.strip()) == 1 and vote.strip().isalpha()
    said = f"Your vote: {vote.strip().upper()}." if voted else "You have not voted."
    return lesson.seen(f"{said} Here: {result} Our choice: {choice}, {reason}")


@dataclass(frozen=True)
class Tempered(Refiner):
    """A refiner whose attention is divided by a temperature before the softmax: 1 leaves it as it is."""

    temperature: float = field(kw_only=True)

    def affinity(self, attention: Attention, valid: Tensor | None = None) -> PatchAffinity:
        """The affinity at the temperature; √H turns √d into √D."""
        queries = [q / self.temperature for q in attention.queries]
        return Refiner.affinity(self, replace(attention, queries=queries), valid)


@torch.no_grad()
def mean_entropy(attention: Attention, temperature: float = 1.0) -> float:
    """Entropy of the rows of all heads and layers at a temperature, mean in nats."""
    queries = [q / temperature for q in attention.queries]
    cooled = replace(attention, queries=queries)
    maps = (cooled.layer_map(layer) for layer in range(cooled.depth))
    return float(torch.stack([attention_entropy(m).mean() for m in maps]).mean())


@torch.no_grad()
def row_sums(attention: Attention) -> pd.DataFrame:
    """What a row of each layer adds up to, patch to patch, mean over heads, for probabilities and for logits.

    Returns:
        Per layer the mean of the row sums, `probabilities` and `logits`, and their standard deviations over
        the rows, `… sd`. The scale of a layer is its weight in a mean over layers.
    """
    first = attention.num_prefix_tokens
    rows = []
    for layer in range(attention.depth):
        row = {}
        for name, kind in (("probabilities", True), ("logits", False)):
            sums = attention.layer_map(layer, probabilities=kind)[..., first:, first:].mean(1).sum(-1)
            row |= {name: float(sums.mean()), f"{name} sd": float(sums.std())}
        rows.append(row)
    return pd.DataFrame(rows).rename_axis("layer")


@torch.no_grad()
def where_it_acts(network: Network, recipe: Recipe, dataset: SegmentationDataset) -> pd.DataFrame:
    """Maps of one network with the uniform mean applied in several places, at all scales with flip.

    Returns:
        One row per place; mIoU in percent of the `refined map` and the `auxiliary map`, and `ms per image`,
        the time of making both maps of four images (the quicker of two tries).
    """
    device = network.classifier.weight.device
    side = recipe.data.eval_size or recipe.data.crop
    pixels, labels, _ = samples(dataset, range(min(4, len(dataset))), side)
    pixels, labels, rows = pixels.to(device), labels.to(device), {}
    for name, fields in PLACES.items():
        refiner = uniform_refiner(recipe.affinity, **PAPER | {"auxiliary": False} | fields)
        changed = replace(recipe, affinity=refiner.config)
        outputs = ("aux_cam", "refined_cam")
        found = evaluate(network, changed, dataset, device=device, outputs=outputs, test_time=("ms",))["miou"]
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            multi_scale_cam(network, pixels, labels, recipe.cam, refiner).for_labels.sum().item()
            seconds.append(time.perf_counter() - began)
        rows[name] = {
            "refined map": found["refined_cam_ms"],
            "auxiliary map": found["aux_cam_ms"],
            "ms per image": 1000 * min(seconds) / len(pixels),
        }
    return pd.DataFrame(rows).T.rename_axis("affinity")
