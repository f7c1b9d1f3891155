"""What a set of runs reached: means over seeds, paired differences, precision and recall, test-time modes.

`study` prints these tables for the runs it has made, `tables runs` for those that lie in a folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.results import (
    MEASURES,
    OUTPUTS,
    TEST_TIME,
    column_names,
    describe_settings,
    describe_size,
    heading,
)
from ssepa_lib.files import write_csv, write_text
from ssepa_lib.workbook.ablations import ALSO, BASE, COMPARED, base_of
from ssepa_lib.workbook.plan import remedy
from ssepa_lib.workbook.score_curve import IMAGES, SCORED, curve_sizes, draw_curves, read_curve, stored_curves
from ssepa_lib.workbook.study import preset_folder, study_jobs
from ssepa_lib.workbook.tables import collect_runs, plus_minus_columns, require_seeds, summary, to_markdown

SHOWN = ("cam", "refined_cam", "pseudo_label", "segmentation")
FINAL = ("pseudo_label", "segmentation")
SCORE = "mean_average_precision"


def run_tables(runs: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> dict[str, pd.DataFrame]:
    """What runs reached: means, paired differences, further measures, test-time modes, and seed by seed.

    Args:
        runs: rows of `collect_runs` or `run_study`; every `method` is a row of the tables.
        pairs: method and the one it is compared with; a pair that has no seed in common makes no row.

    Returns:
        Title, which names split, images, size and steps, and the preset where there are several → table of
        texts. Means are in percent with their standard deviation over seeds, differences in points of mIoU,
        seed by seed. A number that not all seeds of its row have names its own.

    Raises:
        UserError: a seed appears twice under the same setting.
    """
    found = {}
    runs = runs.sort_values("images", ascending=False, kind="stable")
    keys = ["preset", "split", "images", "size", "steps", "batch"]
    several_presets = runs["preset"].nunique() > 1
    for (preset, split, images, size, steps, batch), rows in runs.groupby(keys, sort=False):
        where = f"{split}, {images} images, {describe_size(size)}, {steps} steps of {batch}"
        where = f"{preset}, {where}" if several_presets else where
        single, scored = _measured(rows, SHOWN), _measured(rows, (*SHOWN, SCORE))
        further = _measured(rows, [f"{name} {kind}" for name in FINAL for kind in MEASURES[1:]])
        modes = _measured(rows, [name + mode for name in FINAL for mode in TEST_TIME.values()])
        several = len(modes) > len(_measured(rows, FINAL))
        parts = {
            "mean ± sd, %": _means(rows, scored),
            "paired differences, points of mIoU": _differences(rows, pairs, single),
            "precision, recall and boundary IoU, %": _means(rows, further),
            "several scales and CRF, mIoU, %": _means(rows, modes if several else []),
            "several scales and CRF, paired differences": _differences(rows, pairs, modes if several else []),
            "seed by seed, %": _seeds(rows, scored),
        }
        found |= {f"{where}: {what}": table for what, table in parts.items() if len(table)}
    return found


def _measured(rows: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """Those of the columns that hold a number."""
    return [name for name in columns if name in rows and rows[name].notna().any()]


def _means(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Mean ± sd of every method that has a number in one of the columns."""
    rows = rows.dropna(subset=columns, how="all") if columns else rows[:0]
    if rows.empty:
        return rows
    table = plus_minus_columns(summary(rows, ["method"], columns), columns)
    own = {method: group.set_index("seed") for method, group in rows.groupby("method")}
    for name in columns:
        table[name] = [
            text + _only(own[m][name]) for m, text in zip(table["method"], table[name], strict=True)
        ]
    table["seeds"] = [", ".join(map(str, sorted(own[method].index))) for method in table["method"]]
    return table.rename(columns=heading)


def _only(values: pd.Series) -> str:
    """Which seeds have a number, where not all of a row do: ` [0, 1]`."""
    known = values.dropna().index
    return f" [{', '.join(map(str, sorted(known)))}]" if 0 < len(known) < len(values) else ""


def _differences(
    rows: pd.DataFrame, pairs: Sequence[tuple[str, str]], columns: Sequence[str]
) -> pd.DataFrame:
    """Every pair seed by seed, over the seeds that both have."""
    require_seeds(rows, ["method"])
    rows = rows.dropna(subset=columns, how="all") if columns else rows[:0]
    values = {name: own.set_index("seed")[columns].astype(float) for name, own in rows.groupby("method")}
    found = []
    for changed, base in pairs:
        if changed in values and base in values:
            apart = (values[changed] - values[base]).dropna(how="all")
            if len(apart):
                row = {"difference": f"{changed} − {base}", "seeds": ", ".join(map(str, apart.index))}
                found.append(row | {name: seed_by_seed(apart[name]) + _only(apart[name]) for name in columns})
    return pd.DataFrame(found).rename(columns=heading)


def _seeds(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The values of every seed of the methods that have several."""
    several = rows[rows.groupby("method")["seed"].transform("nunique") > 1]
    table = several.assign(method=pd.Categorical(several["method"], several["method"].unique()))
    return table.sort_values(["method", "seed"])[["method", "seed", *columns]].rename(columns=heading)


def seed_by_seed(differences: pd.Series) -> str:
    """`+6.2 (+4.1, +9.3, +5.4)`: the mean of paired differences and all of them; `–` without any."""
    known = differences.dropna()
    if known.empty:
        return "–"
    each = f" ({', '.join(f'{value:+z.1f}' for value in known)})" if len(known) > 1 else ""
    return f"{known.mean():+z.1f}{each}"


def with_variants(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs whose `method` says the variant too, `ssepa_plus-long`: what differs gets a row of its own."""
    names = ["-".join(filter(None, pair)) for pair in zip(runs["method"], runs["variant"], strict=True)]
    return runs.assign(method=names)


def runs_text(runs: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> str:
    """`run_tables` as Markdown, followed by the settings that the columns belong to."""
    columns = _measured(runs, column_names(OUTPUTS, tuple(TEST_TIME)))
    parts = [f"## {title}\n\n{to_markdown(table)}" for title, table in run_tables(runs, pairs).items()]
    most = runs.sort_values("images", ascending=False, kind="stable")
    for split, rows in most.groupby("split", sort=False):
        lines = "\n".join(f"- {line}" for line in describe_settings(rows["settings"].tolist(), columns))
        parts.append(f"Setting of {split}, one of its runs:\n\n{lines}")
    return "\n\n".join(parts)


def mixed_training(runs: pd.DataFrame) -> list[str]:
    """A sentence for every row of a table whose seeds were trained with different settings.

    Args:
        runs: rows of `tables.collect_runs`.
    """
    sentences = []
    keys = ["preset", "method", "variant", "steps", "backbone"]
    for (preset, method, *_), rows in runs.drop_duplicates(["preset", "run"]).groupby(keys, sort=False):
        known = [_training(settings) for settings in rows["settings"]]
        for run, other in zip(rows["run"], known, strict=True):
            apart = sorted(name for name in known[0] | other if known[0].get(name) != other.get(name))
            reason = f"their settings differ ({', '.join(apart[:3])})"
            if not (known[0] and other):
                reason = "an earlier version did not store the settings of one of them"
            if known[0] != other:
                sentences.append(
                    f"{preset}: {rows['run'].iloc[0]} and {run} share the row {method}, but {reason}; keep "
                    "them in different folders, or name one of them with --run-name."
                )
    return sentences


def _training(setting: dict) -> dict[str, object]:
    """What the weights of a run depend on, but for the seed: `section.name` → value."""
    training = setting.get("training") or {}  # none in results of an earlier version
    found = {f"{section}.{name}": value for section, own in training.items() for name, value in own.items()}
    found.pop("train.seed", None)
    return found


def curve_tables(folder: Path, runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What runs reached while they were trained, for those that were scored meanwhile (`study --curve`).

    Args:
        folder: which the runs lie below.
        runs: rows of `collect_runs`; every `method` is a row for each of its outputs.

    Returns:
        Title with the setting → table with a column per step; mean over seeds, percent.
    """
    # a run counts once, at its curve's size, or if that is not known where most images were scored
    most, sizes = runs.groupby(["preset", "run", "method"])["images"].idxmax(), curve_sizes(folder)
    once = runs[runs.index.isin(most)]
    names = zip(once["preset"], once["run"], once["size"], strict=True)
    once = once.assign(size=[sizes.get((preset, run), size) for preset, run, size in names])
    found = {}
    keys = ["preset", "size", "steps", "batch"]
    for (preset, size, steps, batch), rows in once.groupby(keys, sort=False):
        table = _against_steps(stored_curves(folder, rows))
        where = f"{preset}, at most {IMAGES} images, {describe_size(size)}, {steps} steps of {batch}"
        found |= {f"{where}: while it is trained, mIoU, %": table} if len(table) else {}
    return found


def _against_steps(curves: pd.DataFrame) -> pd.DataFrame:
    """Rows of `mean_curves` with one column per step, output by output."""
    rows = []
    for output in SCORED:
        for method, own in curves.dropna(subset=output).groupby("method", sort=False):
            row = {"output": heading(output), "method": method, "seeds": own["seeds"].iloc[0]}
            rows.append(row | own.set_index("step")[output].to_dict())
    table = pd.DataFrame(rows)
    steps = sorted(name for name in table if not isinstance(name, str))
    columns = {step: f"{step:g}" for step in steps}
    return table[["output", "method", "seeds", *steps]].rename(columns=columns) if rows else table


def write_study(runs: pd.DataFrame, preset: str, run_name: str, *, curve: bool = False) -> str:
    """Write the tables of a study as CSV and Markdown, and the figure of its curves.

    Args:
        runs: from `run_study`; differences are taken from the first row's method and arm.
        run_name: of the study; the files are `study-<run_name>`.
        curve: whether runs should have a curve; names those that have none.

    Returns:
        The tables and the files, as a user reads them.
    """
    folder = preset_folder(preset)
    path = folder / "tables" / "-".join(filter(None, ("study", run_name)))
    table = runs.drop(columns="settings")
    write_csv(path.with_name(f"{path.name}.csv"), table.columns, table.itertuples(index=False, name=None))
    named = with_variants(runs) if runs["variant"].nunique() > 1 else runs
    base, *others = dict.fromkeys(named["method"])
    text = runs_text(named, [(method, base) for method in others])
    write_text(path.with_name(f"{path.name}.md"), f"{text}\n")
    files = [path.with_name(f"{path.name}.md"), *draw_curves(named, folder, path.name)]
    parts = [text, *map(str, files)]
    bare = [run for run in dict.fromkeys(runs["run"]) if curve and read_curve(folder / run).empty]
    if bare:
        parts.append(
            f"Finished before, without a curve: {', '.join(bare)}; delete the folders to repeat them."
        )
    return "\n\n".join(parts)


def contrasts(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """The pairs that are worth comparing, in the names of `with_variants`.

    A method is compared with the one it extends, with ToCo, and with the one that `ALSO` names, within the
    same variant; a variant with the method itself.

    Args:
        runs: rows of `tables.collect_runs`.
    """
    known = list(dict.fromkeys(zip(runs["method"], runs["variant"], strict=True)))
    pairs = []
    for method, variant in known:
        siblings = [name for name, other in known if other == variant]
        wanted = (base_of(method, siblings), ALSO.get(method), BASE)
        bases = [(base, variant) for base in wanted if base in siblings and base != method]
        bases += [(method, "")] if variant and (method, "") in known else []
        pairs += [((method, variant), base) for base in dict.fromkeys(bases)]
    return [tuple("-".join(filter(None, name)) for name in pair) for pair in pairs]


def reading_order(runs: pd.DataFrame) -> pd.DataFrame:
    """Methods before their variants; ToCo, other systems, SS-EPA from the plain affinity on, compositions."""
    if runs.empty:
        return runs

    def place(name: tuple[str, str]) -> tuple:
        method, variant = name
        known = (BASE, "", *COMPARED)  # "": where methods of other papers stand
        return variant != "", "+" in method, known.index(method if method in known else ""), method, variant

    names = list(zip(runs["method"], runs["variant"], strict=True))
    ranks = {name: rank for rank, name in enumerate(sorted(set(names), key=place))}
    rank = [ranks[name] for name in names]
    return runs.assign(rank=rank).sort_values(["rank", "seed"], kind="stable").drop(columns="rank")


def stored_runs_text(folder: Path, preset: str) -> str:
    """`runs_text` of every run below a folder, each compared with what it extends.

    Args:
        preset: what is trained by the command that the error names.

    Raises:
        UserError: no run has been scored there.
    """
    runs = collect_runs(folder, every=True)
    if runs.empty:
        jobs = list(study_jobs(preset, [BASE, "ssepa"], [0], splits={}).values())
        made = remedy(jobs, f"python -m ssepa_lib study {preset} {BASE} ssepa --seeds 0")
        raise UserError(f"{folder} contains no evaluated run. {made}".rstrip())
    for sentence in mixed_training(runs):
        print(sentence, file=sys.stderr)
    runs = reading_order(runs)
    named = with_variants(runs)
    curves = [f"## {title}\n\n{to_markdown(t)}" for title, t in curve_tables(folder, named).items()]
    return "\n\n".join([runs_text(named, contrasts(runs)), *curves])
