"""Commands on data, recipes, single runs and lessons; their signatures and docstrings are the command line.

Heavy imports stay inside the commands, so that help is fast.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from ssepa_lib.errors import UserError
from ssepa_lib.workbook.progress import counter, progress_writer

Device = Annotated[Literal["auto", "cpu", "cuda"], arg(help="auto takes a GPU if there is one.")]
TestTime = Literal["single", "ms", "ms_crf"]
TestTimes = Annotated[
    tuple[TestTime, ...],
    arg(help="One or more of: single (scale 1), ms (several scales and flip), ms_crf (dense CRF after ms)."),
]
OneTestTime = Annotated[
    TestTime, arg(help="single (scale 1), ms (several scales and flip) or ms_crf (with the dense CRF).")
]
Run = Annotated[Positional[Path], arg(metavar="RUN", help="Run folder, for example results/voc/ssepa-seed0.")]
Folder = Annotated[Path, arg(metavar="FOLDER")]
AnyFolder = Annotated[Path | None, arg(metavar="FOLDER")]
Number = Annotated[int | None, arg(metavar="N")]
Yes = Annotated[bool, arg(help="Do not ask before something that takes hours.")]
Changes = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(name="set", metavar="KEY=VALUE", help="Change a setting, for example train.steps=500."),
]


def train(
    recipe: Positional[str],
    *,
    run: Annotated[str | None, arg(metavar="NAME")] = None,
    seed: Number = None,
    changes: Changes = (),
    restart: bool = False,
    yes: Yes = False,
) -> None:
    """Train a recipe, or finish training it.

    Example: python -m ssepa_lib train voc/fsr+ssepa --seed 1 --set train.steps=500

    Args:
        recipe: data/method[/backbone] or a YAML file; the command recipe lists the parts.
        run: Name of the run folder; by default METHOD-seedN.
        seed: The same as --set train.seed=N.
        restart: Throw away what the run folder holds.
    """
    from ssepa_lib.compose import load_recipe
    from ssepa_lib.data import build_dataset
    from ssepa_lib.files import require_place
    from ssepa_lib.paths import plain_name, results_root
    from ssepa_lib.training.trainer import train
    from ssepa_lib.workbook.plan import confirm, plan
    from ssepa_lib.workbook.queue import Job

    made = load_recipe(recipe, pairs(changes) | ({} if seed is None else {"train.seed": seed}))
    preset, *method = [Path(recipe).stem] if recipe.endswith((".yaml", ".yml")) else recipe.split("/")
    name = f"{'-'.join(method) or preset}-seed{made.train.seed}"
    name = plain_name("--run", name if run is None else run)
    folder = results_root() / plain_name("preset", preset) / name
    require_place(folder)
    build_dataset(made.data, "train")  # missing data is reported before the time
    confirm(plan([Job(made, folder, {})], anew=restart, beside=False), yes)
    print(train(made, folder, resume=not restart, on_step=follow(name)))


def evaluate(
    run: Run,
    *,
    split: str = "val",
    images: int = 0,
    size: Number = None,
    test_time: TestTimes = ("single",),
    device: Device = "auto",
) -> None:
    """Score a trained run: CAM, auxiliary CAM, refined CAM, pseudo-labels, segmentation.

    Example: python -m ssepa_lib evaluate results/voc/ssepa-seed0 --size 0 --test-time single ms ms_crf

    Args:
        split: The split to score.
        images: Only the first so many images; 0: all.
        size: Side to which images are resized; 0: native image size; by default the recipe's data.eval_size.
    """
    from ssepa_lib.evaluation import describe_setting, evaluate_run

    at_least(0, images=images, size=size or 0)
    one_or_more(test_time=test_time)
    result = evaluate_run(
        run,
        split,
        images=images,
        size=size,
        test_time=test_time,
        device=device,
        progress=counter(split),
    )
    for column, value in result["miou"].items():
        if value is not None:
            print(f"{column:22} {value:6.2f}  {describe_setting(result['setting'], column)}")


def predict(
    run: Run, *, images: Folder, out: Folder, test_time: OneTestTime = "ms", device: Device = "auto"
) -> None:
    """Segment a folder of your own images.

    Example: python -m ssepa_lib predict results/voc/ssepa-seed0 --images photos --out masks

    Args:
        images: The images.
        out: For masks, overlays and tables.
    """
    from ssepa_lib.evaluation import predict_folder
    from ssepa_lib.files import require_place

    require_place(out)
    with_network(predict_folder, run, device, images, out, test_time=test_time, progress=counter("predict"))


def pseudo_labels(
    run: Run, *, out: Folder, split: str = "train", test_time: OneTestTime = "ms", device: Device = "auto"
) -> None:
    """Write the pseudo-labels of a labelled split as palette PNGs.

    Example: python -m ssepa_lib pseudo-labels results/voc/ssepa-seed0 --out labels --test-time ms_crf

    Args:
        out: For the PNGs.
        split: The split.
    """
    from ssepa_lib.data import split_of
    from ssepa_lib.evaluation import export_pseudo_labels
    from ssepa_lib.files import require_place
    from ssepa_lib.training.run import RunFolder

    require_place(out)
    dataset = split_of(RunFolder(run).recipe(), split)
    options = {"test_time": test_time, "progress": counter("pseudo-labels")}
    with_network(export_pseudo_labels, run, device, dataset, out, **options)


def submission(
    out: Annotated[Positional[Path], arg(metavar="ARCHIVE.tgz")],
    *,
    run: Annotated[Path | None, arg(metavar="RUN")] = None,
    check: bool = False,
    split: str = "test",
    test_time: OneTestTime = "ms_crf",
    device: Device = "auto",
) -> None:
    """Make or check the archive for the VOC evaluation server.

    Example: python -m ssepa_lib submission voc.tgz --run results/voc/ssepa-seed0

    Args:
        out: The archive.
        run: Run folder.
        check: Only check an archive that exists.
        split: The split.
    """
    from ssepa_lib.data.voc import VocDataset
    from ssepa_lib.evaluation import export_submission, validate_submission
    from ssepa_lib.files import require_place
    from ssepa_lib.training.run import RunFolder

    require_place(out, folder=False)
    if run is None and not check:
        raise UserError("submission needs --run RUN (a run folder), or --check to inspect an archive.")
    data = RunFolder(run).recipe().data if run else None
    root = data.root if data and data.name == "voc" else ""  # the folder of another dataset is not VOC's
    dataset = VocDataset(VocDataset.find_root(root), split)
    if check:
        sizes = {name: dataset.image(i).size for i, name in enumerate(dataset.ids)}
        number = validate_submission(out, dataset.ids, sizes)
        print(f"{out}: {number} masks, valid for the VOC server.")
        return
    options = {"test_time": test_time, "progress": counter("submission")}
    with_network(export_submission, run, device, dataset, out, **options)


def data(
    what: Annotated[Positional[str], arg(metavar="WHAT")],
    name: Annotated[Positional[str | None], arg(metavar="NAME")] = None,
    *,
    root: AnyFolder = None,
) -> int:
    """Download, convert or verify a dataset; verify ends with 1 if something is missing.

    Example: python -m ssepa_lib data voc

    Args:
        what: The dataset (voc, sbd, coco), or verify.
        name: With verify: only this one.
        root: Folder of the data; by default where VOC_ROOT and COCO_ROOT point.
    """
    from ssepa_lib.data import preparable, prepare, verify

    if what != "verify":
        if name:
            raise UserError(f"'{name}' belongs to data verify; write data {what} without it.")
        print(prepare(what, root, counter(what, "image" if what == "coco" else "B")).message)
        return 0
    results = [verify(each, root) for each in ([name] if name else preparable())]
    for result in results:
        print(f"{result.name} at {result.root}")
        for count, (found, expected) in result.counts.items():
            print(f"  {count:24} {found:6} of {expected}")
        for problem in result.problems:
            print(f"  missing: {problem}")
    return 1 if any(result.problems for result in results) else 0


def recipe(
    name: Annotated[Positional[str | None], arg(metavar="RECIPE")] = None,
    *,
    changes: Changes = (),
    explain: Annotated[str | None, arg(metavar="SETTING")] = None,
) -> None:
    """Show a recipe in full, explain a setting, or list the parts of which recipes are made.

    Example: python -m ssepa_lib recipe --explain model.backbone

    Args:
        name: data/method[/backbone] or a YAML file.
        explain: A setting such as model.backbone, or a section such as model.
    """
    from ssepa_lib import compose

    if explain is not None:
        print(compose.explain(explain))
    elif name is not None:
        made = compose.load_recipe(name, pairs(changes))
        print(f"# {made.title}, hash {made.hash()}\n{compose.to_yaml(made)}", end="")
    else:
        print(compose.list_parts())


def at_least(least: int, **values: int) -> None:
    """Refuse numbers of the command line that are too small.

    Raises:
        UserError: one is below `least`.
    """
    for name, value in values.items():
        if not least <= value <= 10**8:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is {value}; it must be a whole number from {least} to 100 000 000.")


def one_or_more(**values: Sequence[Any]) -> None:
    """Refuse options of the command line that were given without a value.

    Raises:
        UserError: one is empty.
    """
    for name, value in values.items():
        if not value:
            raise UserError(f"--{name.replace('_', '-')} is empty; give one value or more, or leave it out.")


def pairs(items: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments as a dictionary of texts."""
    for item in items:
        if "=" not in item:
            raise UserError(f"'{item}' is not NAME=VALUE; write train.steps=500 (--set) or steps=500 (-p).")
    return dict(item.split("=", 1) for item in items)


def follow(label: str) -> Callable[[Mapping[str, Any]], None]:
    """The progress of a run: a bar on a terminal, otherwise a line per row of its history."""
    return progress_writer(label) if sys.stderr.isatty() else print_row


def print_row(row: Mapping[str, Any]) -> None:
    """One line per row of the training history."""
    if "loss" not in row:
        print(f"already finished: {row['steps']} steps", flush=True)
        return
    known = ("step", "start", "steps", "lr", "seconds", "seconds_left")
    terms = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in known)
    print(f"step {row['step']}/{row['steps']}  {terms}  {row['seconds_left'] / 60:.1f} min left", flush=True)


def with_network(export: Callable, run: Path, device: str, *args: Any, **options: Any) -> None:
    """Call an export function with a run's network and recipe; print the path it returns."""
    from ssepa_lib.training.run import load_run

    network, recipe = load_run(run, device)
    print(export(network, recipe, *args, device=next(network.parameters()).device, **options))


def lesson(
    *,
    only: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NN")] = (),
    out: AnyFolder = None,
) -> None:
    """Write the notebooks for a class, once without and once with solutions.

    Example: python -m ssepa_lib lesson --only 00 --only 02

    Args:
        only: Write only this notebook.
        out: By default results/lesson.
    """
    from ssepa_lib.files import require_place
    from ssepa_lib.paths import results_root
    from ssepa_lib.workbook.handout import write_lesson
    from ssepa_lib.workbook.notebooks import discover, select

    place = out or results_root() / "lesson"
    require_place(place)
    for folder in write_lesson(select(discover(), list(only)), place):
        print(folder)
