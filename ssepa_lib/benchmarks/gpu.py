"""One command for a machine with a GPU: is it right there, how fast is it, does it train? In under nine
minutes.

It needs torch, torchvision, timm and the pure-Python dependencies; figures are drawn only where matplotlib
is. Every part has a share of the time, and what is there is written after each part.
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ssepa_lib.benchmarks.bench import rows_of, to_markdown, write_report
from ssepa_lib.benchmarks.gpu_checks import all_checks
from ssepa_lib.benchmarks.gpu_training import short_runs
from ssepa_lib.benchmarks.measure import Row
from ssepa_lib.benchmarks.setup import Setup, machine, open_setup
from ssepa_lib.errors import UserError

SHARES = {"checks": 0.08, "par": 0.04, "energy": 0.06, "affinity": 0.14, "step": 0.16, "scaling": 0.12}


class _Report:
    """What was found so far, written to `gpu.json` and `gpu.md` after every part.

    Args:
        out: folder for both.
        until: when everything must be done (`time.perf_counter()`).
        seconds: for everything, of which each part has its share.
    """

    def __init__(self, out: Path, setup: Setup, dry_run: bool, until: float, seconds: float):
        self.out, self.until, self.seconds = out, until, seconds
        self.rows: list[Row] = []
        self.content: dict[str, Any] = {
            "machine": machine(setup.device),
            "data": "VOC" if setup.data else "built-in",
            "dry_run": dry_run,
            "checks": [],
            "rows": [],
            "training": [],
            "figures": [],
            "seconds": {},
            "errors": {},
        }

    def write(self) -> None:
        """Write both files."""
        self.content["rows"] = [asdict(row) for row in self.rows]
        write_report(self.out, "gpu", self.content, self.rows)

    def part(self, name: str, produce: Callable[[float], None]) -> None:
        """Run one part, which is called with the time at which it should end; its failure is written down."""
        start, errors = time.perf_counter(), self.content["errors"]
        try:
            produce(min(self.until, start + self.seconds * SHARES.get(name, 1)))
        except Exception as error:  # one part that fails must not cost the others
            errors[name] = "".join(traceback.format_exception(error))
        taken = self.content["seconds"][name] = round(time.perf_counter() - start, 1)
        self.write()
        print(f"{name}: {taken} s{' FAILED' if name in errors else ''}", flush=True)

    def summary(self) -> bool:
        """Print what came out; whether every check passed and every part ran."""
        checks, errors = self.content["checks"], self.content["errors"]
        failed = [check["name"] for check in checks if not check["passed"]]
        print(to_markdown(self.rows))
        wrong = "".join(f"; failed: {name}" for name in [*failed, *errors])
        print(f"{len(checks) - len(failed)} of {len(checks)} checks passed{wrong}")
        for run in self.content["training"]:
            speed, miou = run["steps_per_second"], run.get("miou", "not scored")
            print(f"{run['recipe']}: {run['steps']} steps, {speed:.1f} per second, mIoU {miou}")
        return not failed and not errors


def _memory(rows: list[Row]) -> list[dict]:
    """Peak memory of a step in GB by strategy and batch."""
    points = []
    for r in rows:
        if r.suite == "affinity" and r.name.startswith("peak memory"):
            strategy, batch = r.name.split(", ")[1], int(r.setting[-1])
            points.append({"strategy": strategy, "batch": batch, "gigabytes": r.value / 1e3})
            if strategy == "matrix_free":
                points.append({"strategy": "none", "batch": batch, "gigabytes": r.reference / 1e3})
    return points


def _scaling(rows: list[Row], unit: str) -> list[dict]:
    """Cost against image size at batch 1 and the first depth, with the affinity and without."""
    sizes = [r for r in rows if r.at and r.at["batch"] == 1]
    points = []
    for r in sizes:
        if r.unit == unit and r.at["depth"] == sizes[0].at["depth"]:
            points.append({"side": r.at["side"], unit: r.value, "affinity": "matrix_free"})
            points.append({"side": r.at["side"], unit: r.reference, "affinity": "none"})
    return points


def _figures(out: Path, rows: list[Row], training: list[dict]) -> list[str]:
    """Memory by strategy, cost against image size and learning curves; none without matplotlib."""
    try:
        import pandas as pd

        from ssepa_lib.workbook import figures
    except ImportError:
        return []
    figures.use_style()
    drawn = {}
    if memory := _memory(rows):
        drawn["memory"] = figures.plot_memory_bars(pd.DataFrame(memory)).figure
    for unit, label in (("ms", "forward and backward, ms"), ("MB", "peak memory, MB")):
        if points := _scaling(rows, unit):
            labels = ("image side, pixels", label)
            ax = figures.plot_scaling_curves(pd.DataFrame(points), "side", unit, "affinity", labels)
            drawn[f"scaling_{unit}"] = ax.figure
    if training:
        histories = {t["recipe"]: pd.DataFrame(t["history"]).apply(pd.to_numeric) for t in training}
        drawn["learning"] = figures.plot_learning_curves(histories, smooth=3)[0].figure
    return [figures.save_figure(figure, out / f"{name}.png").name for name, figure in drawn.items()]


def run_gpu(
    out: Path,
    minutes: float = 9.0,
    *,
    data: Path | None = None,
    weights: Path | None = None,
    dry_run: bool = False,
) -> int:
    """Check, measure and train on this machine's GPU; write `gpu.json`, `gpu.md` and figures to `out`.

    Args:
        out: folder, created if missing; `runs/` in it holds the two trained runs.
        minutes: for everything; a dry run takes the time it needs.
        data: VOC 2012 folder; None: built-in scenes.
        weights: folder with the ViT-Tiny weight file; None: random weights.
        dry_run: the whole path with toy sizes on the CPU.

    Returns:
        0, or 1 where a check failed or a part could not run.

    Raises:
        UserError: there is no GPU (without `dry_run`), or `data` holds no VOC.
    """
    if not dry_run and not torch.cuda.is_available():
        raise UserError(
            "no CUDA GPU is usable here; run this on a machine with one, or add --dry-run to try the path."
        )
    seconds = float("inf") if dry_run else 60 * minutes
    until = time.perf_counter() + seconds
    setup = open_setup("cpu" if dry_run else "cuda", quick=dry_run, data=data, seconds=5)
    setup = setup if data else replace(setup, data=None)
    report = _Report(Path(out), setup, dry_run, until, seconds)
    content, rows = report.content, report.rows

    def training(end: float) -> None:
        if end - time.perf_counter() < 60:
            raise TimeoutError("no time is left to train; allow more minutes")
        for run in short_runs(report.out, setup, weights, dry_run, end - 10):
            content["training"].append(run)
            report.write()

    report.part("checks", lambda end: content["checks"].extend(map(asdict, all_checks(setup))))
    for suite in list(SHARES)[1:]:
        report.part(suite, lambda end, suite=suite: rows.extend(rows_of(suite, setup, end)))
    report.part("training", training)
    report.part(
        "figures", lambda end: content["figures"].extend(_figures(report.out, rows, content["training"]))
    )
    return 0 if report.summary() else 1
