"""Commands on notebooks, studies, tables and benchmarks; see `commands`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg, create_mutex_group

from ssepa_lib.commands import (
    AnyFolder,
    Changes,
    Device,
    Folder,
    Number,
    Run,
    TestTimes,
    Yes,
    at_least,
    follow,
    one_or_more,
    pairs,
)
from ssepa_lib.errors import UserError
from ssepa_lib.files import require_place
from ssepa_lib.workbook.progress import counter

if TYPE_CHECKING:
    import pandas as pd

_SIZE = create_mutex_group(required=False)


def workbook(
    *,
    preset: str = "shapes",
    only: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NN")] = (),
    start: Annotated[str | None, arg(name="from", metavar="NN")] = None,
    parameter: Annotated[UseAppendAction[tuple[str, ...]], arg(aliases=["-p"], metavar="NAME=VALUE")] = (),
    yes: Yes = False,
) -> int:
    """Run the notebooks headlessly and write the report.

    Example: python -m ssepa_lib workbook --preset voc_mini --only 03 -p seed=1

    Args:
        preset: Data recipe: shapes, voc_mini, voc, …
        only: Run only this notebook.
        start: Start with this notebook.
        parameter: Set a parameter of the notebooks.
    """
    from ssepa_lib.workbook.runner import run_workbook

    return run_workbook(preset, list(only), start, pairs(parameter), yes=yes)


def notebook_parameters() -> str:
    """What `-p` can set, for the help of `workbook`."""
    from ssepa_lib.workbook.notebooks import describe_parameters, discover

    return f"parameters of the notebooks, for -p NAME=VALUE:\n{describe_parameters(discover())}"


def study(
    preset: Positional[str],
    methods: Annotated[Positional[tuple[str, ...]], arg(metavar="METHOD …")],
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    splits: tuple[str, ...] = ("val", "train"),
    steps: int = 0,
    size: Number = None,
    test_time: TestTimes = ("single",),
    run_name: str = "",
    curve: int = 0,
    arms: tuple[str, ...] = (),
    changes: Changes = (),
    device: Device = "auto",
    processes: Number = None,
    shard: Annotated[str, arg(metavar="I/N")] = "1/1",
    yes: Yes = False,
) -> None:
    """Train and score several methods with the same seeds: mean, spread and paired differences.

    Example: python -m ssepa_lib study voc_mini toco ssepa --seeds 0 1 --test-time single ms

    Args:
        preset: Data recipe.
        methods: Methods; differences are taken from the first.
        seeds: Seeds.
        splits: Splits to score.
        steps: Length of each run; 0: what the recipe says.
        size: Side to which images are resized for scoring, as in evaluate.
        run_name: Added to the names of the folders and tables; a later study of the name replaces the tables.
        curve: How often to score a run while it is trained, on 100 images of the first split; 0: never.
        arms: Train FSR's arms too: terms, mask ratio, selection, aggregation, augmentation or views.
        processes: Worker processes; by default one per GPU, without a GPU one per CPU core.
        shard: Only the I-th of N shares of the runs, for several machines; the last makes the tables.
    """
    from ssepa_lib.workbook.ablations import chosen_arms
    from ssepa_lib.workbook.run_tables import write_study

    if not (methods and seeds and splits):
        raise UserError("study needs methods, seeds and splits: study shapes toco ssepa --seeds 0 1.")
    at_least(0, steps=steps, size=size or 0, curve=curve)
    one_or_more(test_time=test_time)
    scoring = {"test_time": test_time, "size": size}
    options = {"splits": dict.fromkeys(splits, scoring), "changes": pairs(changes), "steps": steps}
    options |= {"device": device, "run_name": run_name, "curve": curve, "arms": chosen_arms(arms)}
    runs, missing = _queue((preset, methods, seeds), options, processes, shard, yes)
    if missing:
        print(f"Shard {shard} is done; {missing} runs are still missing from the other shards.")
    else:
        print(write_study(runs, preset, run_name, curve=curve > 0))


def _queue(
    what: tuple[str, Sequence[str], Sequence[int]],
    options: Mapping[str, Any],
    processes: int | None,
    shard: str,
    yes: bool,
) -> tuple["pd.DataFrame", int]:
    """The rows of a study after this shard of it, and how many runs are still missing."""
    from ssepa_lib.workbook import queue
    from ssepa_lib.workbook.plan import FULL, confirm, describe, plan
    from ssepa_lib.workbook.progress import StudyDisplay
    from ssepa_lib.workbook.study import require_scoring, run_study, study_jobs

    number = queue.number_of_workers(options["device"]) if processes is None else processes
    if number < 1:
        raise UserError(f"--processes is {number}; it must be 1 or more.")
    if "train.seed" in options["changes"]:
        raise UserError("--set train.seed gives every run of a study the same seed; use --seeds instead.")
    part = queue.parse_shard(shard)
    jobs = study_jobs(*what, **options)
    own = queue.share(jobs, part).values()
    for method in what[1] if len(options["arms"]) > 1 else ():
        if len({job.recipe.hash() for (_, name, _), job in jobs.items() if name == method}) == len(what[2]):
            raise UserError(f"--arms changes nothing in {method}; arms are those of fsr and what extends it.")
    require_scoring(next(iter(jobs.values())).recipe, options["splits"])
    planned = plan(list(own))
    print(f"Runs:\n{describe(planned)}", flush=True)
    confirm(planned, yes, FULL)
    display = StudyDisplay({job.folder.name: job.recipe.train.steps for job in own})
    with display.show():
        runs = run_study(*what, **options, report=display, processes=number, shard=part)
    done = runs.drop_duplicates(["method", "variant", "seed"]) if len(runs) else runs
    return runs, len(jobs) - len(done)


def readings(
    run: Run,
    *,
    split: str = "train",
    images: int = 0,
    out: AnyFolder = None,
    device: Device = "auto",
) -> None:
    """Read the maps of a finished run in several ways: calibrated, propagated, balanced, with HAAF.

    Example: python -m ssepa_lib readings results/voc_mini/ssepa_plus-seed0 --images 100

    Args:
        split: The split to score.
        images: Only the first so many images; 0: all.
        out: Where to write readings.csv; by default the run folder.
    """
    from ssepa_lib.files import require_place, write_csv
    from ssepa_lib.workbook.studies.readings import compare_readings
    from ssepa_lib.workbook.tables import to_markdown

    at_least(0, images=images)
    require_place(out or run)
    table = compare_readings(
        run, split, images=images, device=device, progress=counter("readings", "reading")
    )
    path = (out or run) / "readings.csv"
    write_csv(path, table.columns, table.round(2).itertuples(index=False, name=None))
    print(to_markdown(table), path, sep="\n")


def haaf(
    run: Run,
    *,
    steps: int = 350,
    splits: tuple[str, ...] = ("train", "val"),
    attention: Literal["probabilities", "logits"] = "probabilities",
    descriptor: Literal["patch", "full"] = "patch",
    iterations: int = 1,
    out: AnyFolder = None,
    device: Device = "auto",
) -> None:
    """Train HAAF alone on a finished run with every objective; compare with every layer alone.

    Example: python -m ssepa_lib haaf results/voc_mini/ssepa-seed0 --iterations 2

    Args:
        steps: Updates of HAAF.
        splits: Splits to score.
        attention: What the affinity is made of.
        descriptor: What HAAF pools.
        iterations: How often the affinity is applied.
        out: For haaf.csv and haaf.png; by default the run folder.
    """
    from ssepa_lib.data import measured_split
    from ssepa_lib.files import require_place, write_csv
    from ssepa_lib.recipe import HAAF_OBJECTIVES
    from ssepa_lib.training.run import load_run
    from ssepa_lib.workbook import figures, tables
    from ssepa_lib.workbook.studies.haaf_study import compare_haaf_objectives

    at_least(1, steps=steps, iterations=iterations)
    one_or_more(splits=splits)
    require_place(out or run)
    network, recipe = load_run(run, device)
    settings = {"attention": attention, "descriptor": descriptor, "iterations": iterations}
    replace(recipe.affinity, **settings)  # checked before anything is computed
    variants = {kind: {"haaf_objective": kind} | settings for kind in HAAF_OBJECTIVES[1:]}
    datasets = [measured_split(recipe, split) for split in splits]
    progress = counter("HAAF", "step")
    table = compare_haaf_objectives(network, recipe, variants, datasets, steps=steps, progress=progress)
    files = [(out or run) / name for name in ("haaf.csv", "haaf.png")]
    write_csv(files[0], table.columns, table.round(3).itertuples(index=False, name=None))
    figures.use_style()
    axes = figures.plot_haaf_objectives(table, datasets[0].split)
    figures.save_figure(axes[0].figure, files[1])
    print(tables.to_markdown(table), *files, sep="\n")


def tables(
    number: Positional[tuple[Literal[1, 2, 3, 5, "field", "fsr", "runs"], ...]] = (1, 2, 3, 5, "field"),
    *,
    preset: str = "voc",
    folder: AnyFolder = None,
) -> None:
    """Print tables: the paper's and the field's with this workbook's runs beside them, and the runs alone.

    Example: python -m ssepa_lib tables runs --folder results/classifier_rate

    Args:
        number: Numbers of the paper's tables; field: other systems; fsr: the questions of FSR's ablations and
            what the committed runs say, whatever the preset and folder; runs: what the runs of the preset or
            folder reached.
        preset: Data recipe whose runs are shown.
        folder: Show the runs below this folder instead.
    """
    from ssepa_lib.compose import load_recipe
    from ssepa_lib.paths import plain_name, results_root

    if folder is not None and not folder.is_dir():
        raise UserError(f"--folder {folder} does not exist; pass the folder that contains the runs.")
    folder = folder or results_root() / plain_name("preset", preset)
    if not folder.is_dir():
        load_recipe(f"{preset}/toco")  # names an unknown preset
    from ssepa_lib.evaluation import heading
    from ssepa_lib.workbook import published
    from ssepa_lib.workbook.run_tables import FINAL, reading_order, stored_runs_text
    from ssepa_lib.workbook.studies import fsr_study
    from ssepa_lib.workbook.tables import collect_runs, to_markdown

    beside = set(number) - {"runs", "fsr"}
    runs = reading_order(collect_runs(folder)) if beside else None
    for each in number:
        if each == "runs":
            print(stored_runs_text(folder, preset))
        elif each == "fsr":
            for output in FINAL:
                title = f"FSR's ablations: {heading(output)}, points of mIoU"
                print(f"\n## {title}\n\n{to_markdown(fsr_study.questions(output=output))}")
        else:
            print(f"\nTable {each}\n\n{to_markdown(getattr(published, f'table_{each}')(runs))}")


def bench(
    suite: Annotated[Positional[tuple[str, ...]], arg(metavar="SUITE …")] = (),
    *,
    out: AnyFolder = None,
    quick: Annotated[bool, _SIZE] = False,
    full: Annotated[bool, _SIZE] = False,
    device: Device = "auto",
) -> int:
    """Measure speed and memory; every row is a ratio within one run.

    Example: python -m ssepa_lib bench affinity step --quick

    Args:
        suite: affinity, step, par, masks, energy, loader, crf, scaling or backbones; by default all.
        out: By default results/bench.
        quick: Smaller sizes, fewer repeats.
        full: ViT-B at 448² on a CPU too (minutes per row).
    """
    from ssepa_lib.benchmarks.bench import run_suites
    from ssepa_lib.paths import results_root

    require_place(out or results_root() / "bench")
    return run_suites(list(suite), out, quick=quick, full=full, device=device)


def gpu(
    *,
    out: Folder,
    data: Annotated[Path | None, arg(metavar="VOC_ROOT")] = None,
    weights: AnyFolder = None,
    minutes: float = 9.0,
    dry_run: bool = False,
) -> int:
    """Check, measure and train on a GPU within a few minutes; writes one JSON, a table and figures.

    Example: python -m ssepa_lib gpu --out results/my_gpu --minutes 5

    Args:
        out: For the results.
        data: VOC 2012 folder; by default the built-in scenes.
        weights: Folder with ViT-Tiny's weights; by default random weights.
        minutes: Time for everything.
        dry_run: The whole path with toy sizes on the CPU.
    """
    from ssepa_lib.benchmarks.gpu import run_gpu

    if not 0 < minutes <= 10_000:
        raise UserError(f"--minutes is {minutes}; it must be above 0 and at most 10 000.")
    require_place(out)
    if weights is not None and not weights.is_dir():
        raise UserError(f"--weights {weights} is not a folder; name the one that holds ViT-Tiny's weights.")
    if weights is not None and data is None:
        raise UserError("--weights belong to photographs; pass --data as well, or do without --weights.")
    return run_gpu(out, minutes, data=data, weights=weights, dry_run=dry_run)


def pretrain(
    *, out: Annotated[Path, arg(metavar="FILE")], backbone: str = "", steps: int = 1800, seed: int = 0
) -> None:
    """Pre-train a micro backbone of the built-in data again.

    Example: python -m ssepa_lib pretrain --out vit_micro.safetensors

    Args:
        out: The .safetensors file.
        backbone: swin_micro or efficientformer_micro; by default the micro ViT.
        steps: Updates.
        seed: Seed.
    """
    from ssepa_lib.benchmarks.pretrain_shapes import pretrain

    at_least(1, steps=steps)
    at_least(0, seed=seed)
    require_place(out, folder=False)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} must end in .safetensors; that is the format of the weights.")
    print(pretrain(out, backbone=backbone, steps=steps, seed=seed, on_step=follow("pretrain")))
