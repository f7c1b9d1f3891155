"""What a run reaches while it is trained: its maps, its pseudo-labels and its decoder, scored at equal
distances."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

from ssepa_lib.data import measured_split
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.evaluate import evaluate
from ssepa_lib.files import write_csv
from ssepa_lib.model import Network
from ssepa_lib.readers import read_table
from ssepa_lib.recipe import Recipe
from ssepa_lib.training.run import CURVE, RunFolder
from ssepa_lib.workbook.watch import Watch

SCORED = ("cam", "refined_cam", "pseudo_label", "segmentation")
IMAGES = 100


class ScoreCurve(Watch):
    """Scores of a run from its first step to its last, in `curve.csv` of the run folder.

    Args:
        recipe: of the run.
        folder: the run folder.
        points: how many scores after the first step's.
        split: with masks.
        images: only the first so many; 0: all.
    """

    def __init__(
        self, recipe: Recipe, folder: Path | str, points: int, split: str = "val", images: int = IMAGES
    ):
        self.recipe, self.dataset = recipe, measured_split(recipe, split, images)
        kept = {int(row.pop("step")): row for row in read_curve(folder).to_dict("records")}
        super().__init__(Path(folder) / CURVE, recipe.train.steps, points, kept)

    def take(self, network: Network) -> dict[str, float | None]:
        """The mIoU of every output in percent; None where the recipe has none."""
        device = network.classifier.weight.device
        found = evaluate(network, self.recipe, self.dataset, device=device, outputs=SCORED)["miou"]
        return {name: found[name] for name in SCORED}

    def store(self) -> None:
        """Write `curve.csv`."""
        rows = [[step, *scores.values()] for step, scores in self.kept.items()]
        write_csv(self.path, ["step", *SCORED], rows)


def read_curve(folder: Path | str) -> pd.DataFrame:
    """The curve of a run: `step` and mIoU in percent of every output, NaN where the recipe has none.

    Returns:
        No rows where the run was not scored while it was trained.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / CURVE
    if not path.is_file():
        return pd.DataFrame({name: pd.Series(dtype=float) for name in ("step", *SCORED)})
    columns, rows = read_table(path, "curve of a run")
    if columns != ["step", *SCORED]:
        raise UserError(f"{path} is not the curve of a run; remove it, and train the run again.")
    try:
        table = pd.DataFrame(rows, columns=columns).replace("", None).astype(float)
    except ValueError as error:
        raise UserError(f"{path} contains something other than numbers ({error}); remove it.") from error
    steps, scores = table["step"], table[list(SCORED)]
    rising = steps.is_monotonic_increasing and steps.is_unique and bool((steps >= 0).all())
    if not rising or steps.isna().any() or ((scores < 0) | (scores > 100)).any(axis=None):
        raise UserError(
            f"{path} is damaged: steps must rise from 0 on, and mIoU lie in 0..100; remove it, and train the "
            "run again."
        )
    return table


def mean_curves(folders: Mapping[str, Sequence[Path]]) -> pd.DataFrame:
    """The curves of several methods, mean over the seeds that have one.

    Args:
        folders: method → run folders, whose names end in `-seed<k>`.

    Returns:
        Columns method, seeds (`0, 1`), step and the outputs; a step counts where every seed was scored at it.
    """
    tables = []
    for method, runs in folders.items():
        curves = {run.name.rpartition("-seed")[2]: curve for run in runs if len(curve := read_curve(run))}
        if curves:
            steps = pd.concat(curves.values()).groupby("step")
            mean = steps.mean()[steps.size() == len(curves)].reset_index()
            tables.append(mean.assign(method=method, seeds=", ".join(curves)))
    columns = ["method", "seeds", "step", *SCORED]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def curve_folders(folder: Path) -> dict[tuple[str, str], Path]:
    """The run folders below a folder that have a curve, by the name of their preset and their own."""
    return {(path.parent.parent.name, path.parent.name): path.parent for path in folder.rglob(CURVE)}


def curve_sizes(folder: Path) -> dict[tuple[str, str], int]:
    """The side at which each of `curve_folders` was scored: `data.eval_size` of its recipe, if it has one."""
    sizes = {}
    for run, path in curve_folders(folder).items():
        with suppress(UserError):
            sizes[run] = RunFolder(path).recipe().data.eval_size
    return sizes


def stored_curves(folder: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """`mean_curves` of runs of one setting that lie below a folder.

    Args:
        runs: columns preset, run and method, as `tables.collect_runs` has them.
    """
    paths = curve_folders(folder)
    runs = runs.drop_duplicates(["preset", "run", "method"])  # two methods can share a run
    runs = runs[[run in paths for run in zip(runs["preset"], runs["run"], strict=True)]]
    folders = pd.Series([paths[run] for run in zip(runs["preset"], runs["run"], strict=True)], dtype=object)
    return mean_curves(dict(list(folders.groupby(runs["method"].to_numpy(), sort=False))))


def draw_curves(runs: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Draw what the runs of a study reached while they were trained.

    Args:
        runs: from `run_study`.
        folder: of the preset, which holds the runs.
        name: of the study; the figure is `figures/<name>-curves.png`.

    Returns:
        The file that was written; none where no run was scored while it was trained.
    """
    from ssepa_lib.workbook.figures import plot_score_curves, save_figure, use_style

    curves = stored_curves(folder, runs)
    if curves.empty:
        return []
    use_style()
    path = folder / "figures" / f"{name}-curves.png"
    save_figure(plot_score_curves(curves).item(0).figure, path)
    return [path]
