"""Result tables: runs collected from disk, mean and standard deviation over seeds, paired differences,
Markdown."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.results import MEASURES, read_all_results
from ssepa_lib.paths import PROJECT, RECIPES


def result_row(run: str, preset: str, variant: str, result: dict) -> dict:
    """One row of the table of runs from a result of `evaluate`; see `collect_runs` for its columns."""
    setting = result["setting"]
    plain = {name: value for name, value in setting.items() if name != "outputs"}
    row = {"run": run, "preset": preset, "variant": variant, **plain, **result["miou"]}
    others = {f"{name} {kind}": value for kind in MEASURES[1:] for name, value in result[kind].items()}
    row |= others | {"mean_average_precision": result["mean_average_precision"]}
    return row | {"settings": setting}


def _rank(named: tuple[str, dict]) -> tuple[int, bool]:
    """How much a result by its name counts: its images, then whether its size is the recipe's own."""
    name, setting = named[0], named[1]["setting"]
    return setting["images"], name == setting["split"]


def collect_runs(folder: Path | str, *, every: bool = False) -> pd.DataFrame:
    """Every evaluated run below a folder, one row per run and split: the result on the most images, and of
    several at that, the one at the recipe's own size.

    A run whose metrics cannot be read is left out; a line on standard error names it.

    Args:
        every: one row per stored result, whatever the number and the size of its images.

    Columns: `run`, `preset` (folder names), the entries of the setting (`data`, `split`, `method`, `seed`,
    `steps`, …), `variant` (what the run's name adds to the method), one column of mIoU in percent per output
    (`segmentation_ms`) and one per output and further measure (`segmentation_ms recall`),
    `mean_average_precision`, and `settings`, the whole setting as a dict.
    """
    rows = []
    found, problems = read_all_results(path.parent for path in sorted(Path(folder).rglob("metrics.json")))
    for problem in problems:
        print(problem, file=sys.stderr)
    for run, stored in found.items():
        results = [result for _, result in sorted(stored.items(), key=_rank)]
        most = {result["setting"]["split"]: result for result in results}
        for result in results if every else most.values():
            setting = result["setting"]
            variant = run.name.removesuffix(f"-seed{setting['seed']}").removeprefix(setting["method"])
            rows.append(result_row(run.name, run.parent.name, variant.strip("-"), result))
    return pd.DataFrame(rows)


def require_seeds(runs: pd.DataFrame, by: Sequence[str]) -> None:
    """Raise a UserError where a group has a seed twice: different things would be averaged."""
    twice = runs.duplicated([*by, "seed"])
    if twice.any():
        first = runs[twice].iloc[0]
        where = ", ".join(f"{name} {first[name]}" for name in [*by, "seed"])
        raise UserError(f"several runs share {where}; filter by split or add a column to the grouping.")


def summary(runs: pd.DataFrame, by: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Mean and sample standard deviation over seeds.

    Returns:
        The columns `by`, `seeds`, and per metric `<metric>` and `<metric>_sd` (NaN with a single seed).

    Raises:
        UserError: a seed appears twice in a group, so that different things would be averaged.
    """
    require_seeds(runs, by)
    groups = runs.groupby(list(by), sort=False, dropna=False)
    table = groups["seed"].nunique().rename("seeds").to_frame()
    for metric in metrics:
        values = groups[metric]
        table[metric] = values.agg(lambda x: x.astype(float).mean())
        table[f"{metric}_sd"] = values.agg(lambda x: x.astype(float).std())
    return table.reset_index()


def paired_differences(runs: pd.DataFrame, by: str, base: str, metrics: Sequence[str]) -> pd.DataFrame:
    """Difference from a base row, seed by seed over the seeds both have: seed-to-seed variation cancels.

    Returns:
        `by`, `seeds` (common ones), and per metric `<metric>` (mean difference) and `<metric>_sd`.

    Raises:
        UserError: no run is the base row; a seed appears twice.
    """
    require_seeds(runs, [by])
    names = list(dict.fromkeys(runs[by]))
    if base not in names:
        choices = ", ".join(sorted(map(str, names)))
        raise UserError(f"no run has {by} '{base}'; choose one of {choices}.")
    values = {name: runs[runs[by] == name].set_index("seed")[list(metrics)].astype(float) for name in names}
    rows = []
    for name, ours in values.items():
        common = ours.index.intersection(values[base].index)
        difference = ours.loc[common] - values[base].loc[common]
        row = {by: name, "seeds": len(difference)}
        for metric in metrics:
            row |= {metric: difference[metric].mean(), f"{metric}_sd": difference[metric].std()}
        rows.append(row)
    return pd.DataFrame(rows)


def plus_minus(mean: float, sd: float = float("nan"), digits: int = 1) -> str:
    """`72.4 ± 0.3`; without the spread when it is unknown, `–` when there is no number."""
    if pd.isna(mean):
        return "–"
    return f"{mean:.{digits}f}" + ("" if pd.isna(sd) else f" ± {sd:.{digits}f}")


def in_words(values: Sequence[float]) -> str:
    """`+3.2 ± 1.1 (3 seeds)`, but both values where there are two, and the one where there is one."""
    numbers = pd.Series(values, dtype=float).dropna()
    count = f"({len(numbers)} seed{'s' * (len(numbers) != 1)})"
    if len(numbers) < 3:
        return f"{', '.join(f'{v:+.1f}' for v in numbers) or '–'} {count}"
    return f"{numbers.mean():+.1f} ± {numbers.std():.1f} {count}"


def plus_minus_columns(table: pd.DataFrame, metrics: Sequence[str], digits: int = 1) -> pd.DataFrame:
    """Columns `<metric>` and `<metric>_sd` (of `summary` or `paired_differences`) as one text column per
    metric."""
    pairs = {metric: zip(table[metric], table[f"{metric}_sd"], strict=True) for metric in metrics}
    texts = {metric: [plus_minus(*pair, digits) for pair in each] for metric, each in pairs.items()}
    return table.drop(columns=[name for m in metrics for name in (m, f"{m}_sd")]).assign(**texts)


def to_markdown(table: pd.DataFrame, digits: int = 1) -> str:
    """A table as GitHub Markdown: columns padded, numbers to the right, `–` for what is missing."""

    def cell(value) -> str:
        if value is None or (isinstance(value, float) and pd.isna(value)):
            return "–"
        text = f"{value:.{digits}f}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    cells = table.astype(object).map(cell).rename(columns=cell)
    numbers = [len(cells) > 0 and column.str.match(r"[\d–+−-]").all() for _, column in cells.items()]
    sides = ["right" if number else "left" for number in numbers]
    return cells.to_markdown(index=False, disable_numparse=True, colalign=sides if len(cells) else None)


def committed(name: str) -> pd.DataFrame:
    """A table of measurements that comes with the project.

    Args:
        name: a CSV file below `results/`, for example "balanced_affinity/rows.csv".

    Raises:
        UserError: it is not there.
    """
    return pd.read_csv(_committed_file(name))


def committed_runs(name: str, split: str = "val", *, variants: bool = False) -> pd.DataFrame:
    """The runs of one folder of `results/` on one split, in the columns of `collect_runs`.

    Args:
        variants: with the variants of the methods.

    Raises:
        UserError: it holds none.
    """
    runs = collect_runs(PROJECT / "results" / name)
    if runs.empty:
        raise UserError(f"{PROJECT / 'results' / name} holds no run; restore it with git checkout.")
    return runs[(runs["split"] == split) & (variants | (runs["variant"] == ""))]


def evidence() -> pd.DataFrame:
    """Every run whose results come with the project, in the columns of `collect_runs` and `folder`.

    They lie in the folders of `results/` that have a README and not the name of a preset, whose folder holds
    a user's own runs. New folders count by themselves. Several folders may hold a run of the same method and
    seed; compare runs of one folder, which were measured together.
    """
    presets = {path.stem for path in (RECIPES / "data").glob("*.yaml")}
    folders = [path.parent for path in sorted((PROJECT / "results").glob("*/README.md"))]
    found = [collect_runs(f).assign(folder=f.name) for f in folders if f.name not in presets]
    return pd.concat([table for table in found if len(table)], ignore_index=True)


def benchmark(name: str) -> pd.DataFrame:
    """Rows of a benchmark on a CPU that comes with the project; a README beside it says how it was made.

    Args:
        name: a JSON file below `results/`, for example "cpu/published_size.json".

    Raises:
        UserError: it is not there.
    """
    path = _committed_file(name)
    return pd.DataFrame(json.loads(path.read_text(encoding="utf-8"))["rows"])


def _committed_file(name: str) -> Path:
    path = PROJECT / "results" / name
    if not path.is_file():
        raise UserError(f"{path} is missing; restore it with git checkout.")
    return path
