"""What a run reaches while it is trained: its maps, its pseudo-labels and its decoder, scored at equal
distances."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from ssepa_lib.data import measured_split
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.evaluate import evaluate
from ssepa_lib.files import write_csv
from ssepa_lib.model import Network
from ssepa_lib.readers import read_table
from ssepa_lib.recipe import Recipe

SCORED = ("cam", "refined_cam", "pseudo_label", "segmentation")
IMAGES = 100
FILE = "curve.csv"


class ScoreCurve:
    """Scores of a run from its first step to its last: the `watch` of `training.train`.

    Scoring leaves the run as it is. The scores lie in `curve.csv` of the run folder, so that a resumed run
    continues its curve.

    Args:
        recipe: of the run.
        folder: the run folder.
        points: how many scores after the first step's, at equal distances; they fall on logged steps.
        split: with masks.
        images: only the first so many; 0: all.
    """

    def __init__(
        self, recipe: Recipe, folder: Path | str, points: int, split: str = "val", images: int = IMAGES
    ):
        self.recipe, self.path = recipe, Path(folder) / FILE
        self.dataset = measured_split(recipe, split, images)
        self.interval = recipe.train.steps / points
        self.rows = {int(row["step"]): row for row in read_curve(folder).to_dict("records")}

    def __call__(self, network: Network, step: int) -> None:
        """Score if it is time, and drop the scores of later steps (of a run that starts again)."""
        self.rows = {at: row for at, row in self.rows.items() if at < step}
        if step < len(self.rows) * self.interval and step < self.recipe.train.steps:
            return
        device = network.classifier.weight.device
        found = evaluate(network, self.recipe, self.dataset, device=device, outputs=SCORED)["miou"]
        self.rows[step] = {"step": step, **{name: found[name] for name in SCORED}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(self.path, ["step", *SCORED], [list(row.values()) for row in self.rows.values()])


def read_curve(folder: Path | str) -> pd.DataFrame:
    """The curve of a run: `step` and mIoU in percent of every output, NaN where the recipe has none.

    Returns:
        No rows where the run was not scored while it was trained.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return pd.DataFrame({name: pd.Series(dtype=float) for name in ("step", *SCORED)})
    columns, rows = read_table(path, "curve of a run")
    if columns != ["step", *SCORED]:
        raise UserError(f"{path} is no curve of a run; remove it, and train the run again to get another.")
    try:
        return pd.DataFrame(rows, columns=columns).replace("", None).astype(float)
    except ValueError as error:
        raise UserError(f"{path} holds something else than numbers ({error}); remove it.") from error


def mean_curves(folders: Mapping[str, Sequence[Path]]) -> pd.DataFrame:
    """The curves of several methods, mean over the seeds that have one.

    Args:
        folders: method → run folders.

    Returns:
        Columns method, seeds, step and the outputs; a step counts where every seed was scored at it.
    """
    tables = []
    for method, runs in folders.items():
        curves = [curve for curve in map(read_curve, runs) if len(curve)]
        if curves:
            steps = pd.concat(curves).groupby("step")
            mean = steps.mean()[steps.size() == len(curves)].reset_index()
            tables.append(mean.assign(method=method, seeds=len(curves)))
    columns = ["method", "seeds", "step", *SCORED]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


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

    by_method = runs.groupby("method", sort=False)["run"].unique()
    curves = mean_curves({method: [folder / run for run in found] for method, found in by_method.items()})
    if curves.empty:
        return []
    use_style()
    path = folder / "figures" / f"{name}-curves.png"
    save_figure(plot_score_curves(curves).item(0).figure, path)
    return [path]
