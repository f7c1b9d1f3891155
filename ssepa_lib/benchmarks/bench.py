"""The benchmark command: runs suites, prints their rows and writes them down."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ssepa_lib.benchmarks.backbone_suites import backbones, write_growth
from ssepa_lib.benchmarks.measure import MB, Row
from ssepa_lib.benchmarks.part_suites import crf, energy, loader, masks, par
from ssepa_lib.benchmarks.setup import Setup, machine, open_setup
from ssepa_lib.benchmarks.step_suites import affinity, scaling, step
from ssepa_lib.errors import UserError
from ssepa_lib.files import write_json, write_text
from ssepa_lib.paths import results_root
from ssepa_lib.workbook.progress import counter

SUITES: dict[str, Callable[[Setup], Iterator[Row]]] = {
    suite.__name__: suite for suite in (affinity, step, par, masks, energy, loader, crf, scaling, backbones)
}


def rows_of(suite: str, setup: Setup, until: float = float("inf")) -> Iterator[Row]:
    """The rows of one suite as they come; no further row is begun after `until` (`time.perf_counter()`)."""
    for row in SUITES[suite](setup):
        yield row
        if time.perf_counter() > until:
            return
    gc.collect()
    if setup.gpu:
        torch.cuda.empty_cache()


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.4g} {unit}".rstrip() if value < 1e4 else f"{value:,.0f} {unit}".rstrip()


def to_markdown(rows: list[Row]) -> str:
    """Rows as one table, without pandas: the GPU command runs where it is not installed."""
    columns = ("suite", "what", "setting", "value", "reference", "ratio", "target", "met", "floor", "note")
    lines = [columns, ["---"] * len(columns)]
    for r in rows:
        ratio = "" if r.ratio is None else f"{r.ratio:.3g}× ({r.ratio_of})"
        floor = [f"{r.floor_bytes / MB:,.4g} MB"] if r.floor_bytes is not None else []
        floor += [f"{r.flops / 1e9:,.4g} GFLOP"] if r.flops else []
        met = {None: "", True: "yes", False: "no"}[r.met]
        measured = [_number(r.value, r.unit), _number(r.reference, r.unit), ratio]
        lines.append([r.suite, r.name, r.setting, *measured, r.target, met, ", ".join(floor), r.note])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_report(out: Path, name: str, report: dict, rows: list[Row]) -> None:
    """`<name>.json` with everything and `<name>.md` with the table and the machine it was measured on."""
    write_json(out / f"{name}.json", report)
    described = "\n".join(f"- {key}: {value}" for key, value in report["machine"].items())
    write_text(out / f"{name}.md", f"{to_markdown(rows)}\n{described}\n")


def run_suites(
    suites: list[str], out: Path | None, *, quick: bool = False, full: bool = False, device: str = "auto"
) -> int:
    """Measure, print one table per suite, and write `bench.json` and `bench.md`; `backbones` adds a figure.

    Args:
        suites: names out of `SUITES`; empty: all.
        out: folder for the results; None: `results/bench`.
        quick: toy sizes and two rounds, to see that everything runs; targets do not count then.
        full: the published size, ViT-B at 448², on a CPU too.
        device: auto, cpu or cuda.

    Returns:
        0.

    Raises:
        UserError: an unknown suite or an unusable device.
    """
    for name in suites:
        if name not in SUITES:
            raise UserError(f"there is no suite '{name}'; choose from {', '.join(SUITES)}.")
    setup = open_setup(device, quick=quick, full=full)
    out = out or results_root() / "bench"
    report: dict[str, Any] = {
        "machine": machine(setup.device),
        "quick": quick,
        "data": "VOC" if setup.data else "built-in",
    }
    rows: list[Row] = []
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), flush=True)
    chosen, progress = suites or list(SUITES), counter("bench", "suite")
    for done, name in enumerate(chosen):
        progress(done, len(chosen))
        found = list(rows_of(name, setup))
        rows += found
        if name == "backbones":
            write_growth(found, out)
        absent = f"{name}: needs pydensecrf2, which is not installed.\n"
        print(to_markdown(found) if found else absent, flush=True)
        write_report(out, "bench", report | {"rows": [asdict(row) for row in rows]}, rows)
    progress(len(chosen), len(chosen))
    return 0
