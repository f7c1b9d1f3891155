"""The command line: `python -m ssepa_lib COMMAND`. Bad input ends with one sentence and exit code 2."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ssepa_lib.errors import UserError

# Heavy imports stay inside the commands, so that --help answers at once.


def _pairs(items: list[str]) -> dict[str, Any]:
    """`key=value` arguments as a dictionary."""
    broken = [item for item in items if "=" not in item]
    if broken:
        raise UserError(f"'{broken[0]}' is not NAME=VALUE; write train.steps=500 (--set) or steps=500 (-p).")
    return {key: _value(key, text) for key, text in (item.split("=", 1) for item in items)}


def _value(key: str, text: str) -> Any:
    """The text itself; for a dotted key (a recipe's) a list, a mapping or an argument of the backbone as in YAML."""
    if not key.startswith("model.backbone_args.") and not ("." in key and text.startswith(("[", "{"))):
        return text
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except Exception as error:  # of the reader's several libraries
        raise UserError(
            f"'{key}={text}' is not readable as YAML; write for example eval.scales=[1.0,1.5]."
        ) from error


def _counter(what: str, unit: str = "image"):
    """A progress callback (done, all) that shows a bar on a terminal and a line now and then elsewhere."""
    from tqdm import tqdm

    bar = tqdm(desc=what, disable=None, unit=unit, unit_scale=unit == "B")

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return progress


def _line_per_row(row: dict[str, Any]) -> None:
    """One line per row of the training history."""
    terms = "  ".join(
        f"{k} {v:.4f}" for k, v in row.items() if k not in ("step", "steps", "lr", "seconds", "seconds_left")
    )
    print(f"step {row['step']}/{row['steps']}  {terms}  {row['seconds_left'] / 60:.1f} min left", flush=True)


def workbook(args: argparse.Namespace) -> int:
    """Run the notebooks and write the report."""
    from ssepa_lib.workbook.runner import run_workbook

    return run_workbook(args.preset, args.only, args.start, _pairs(args.parameter))


def train(args: argparse.Namespace) -> int:
    """Train a recipe into its run folder, or finish training it."""
    from ssepa_lib.paths import results_root
    from ssepa_lib.recipe import load_recipe
    from ssepa_lib.training.trainer import train as run

    recipe = load_recipe(
        args.recipe, _pairs(args.set) | ({"train.seed": args.seed} if args.seed is not None else {})
    )
    preset, *method = (
        Path(args.recipe).stem.split("/") if args.recipe.endswith(("yaml", "yml")) else args.recipe.split("/")
    )
    name = args.run or f"{'-'.join(method) or preset}-seed{recipe.train.seed}"
    print(run(recipe, results_root() / preset / name, resume=not args.restart, on_step=_line_per_row))
    return 0


def _inference(args: argparse.Namespace) -> tuple[str, ...]:
    """Ways of inference behind --ms and --crf."""
    return ("raw", *(["ms"] if args.ms or args.crf else []), *(["crf"] if args.crf else []))


def evaluate(args: argparse.Namespace) -> int:
    """Score a run on a split; prints every product with its setting."""
    from ssepa_lib.evaluation.evaluate import describe_setting
    from ssepa_lib.workbook.study import evaluate_run

    result = evaluate_run(
        args.run,
        args.split,
        images=args.images,
        device=args.device,
        inference=_inference(args),
        progress=_counter(args.split),
    )
    for product, value in result["miou"].items():
        if value is not None:
            print(f"{product:22} {value:6.2f}  {describe_setting(result['setting'], product)}")
    return 0


def predict(args: argparse.Namespace) -> int:
    """Segment a folder of images."""
    from ssepa_lib.evaluation.export import predict_folder
    from ssepa_lib.training.trainer import load_run

    network, recipe = load_run(args.run, args.device)
    device = next(network.parameters()).device
    print(
        predict_folder(
            network,
            recipe,
            args.images,
            args.out,
            device=device,
            inference=args.inference,
            progress=_counter("predict"),
        )
    )
    return 0


def pseudo_labels(args: argparse.Namespace) -> int:
    """Write a split's pseudo-labels as palette PNGs."""
    from ssepa_lib.evaluation.export import export_pseudo_labels
    from ssepa_lib.training.trainer import load_run
    from ssepa_lib.workbook.study import split_of

    network, recipe = load_run(args.run, args.device)
    device = next(network.parameters()).device
    print(
        export_pseudo_labels(
            network,
            recipe,
            split_of(recipe, args.split),
            args.out,
            device=device,
            inference=args.inference,
            progress=_counter("pseudo-labels"),
        )
    )
    return 0


def submission(args: argparse.Namespace) -> int:
    """Make the archive for the VOC server, or check one."""
    from ssepa_lib.data.datasets import VocDataset
    from ssepa_lib.evaluation.export import export_submission, validate_submission
    from ssepa_lib.paths import voc_root
    from ssepa_lib.training.trainer import load_run

    if args.run is None and not args.check:
        raise UserError("submission needs --run RUN (a run folder), or --check to inspect an archive.")
    network, recipe = load_run(args.run, args.device) if args.run else (None, None)
    root = recipe.data.root if recipe and recipe.data.name == "voc" else ""  # of another data set: not VOC's
    dataset = VocDataset(root or voc_root(), args.split)
    if args.check:
        number = validate_submission(
            args.out, dataset.ids, {i: dataset.image(k).size for k, i in enumerate(dataset.ids)}
        )
        print(f"{args.out}: {number} masks, valid for the VOC server.")
        return 0
    print(
        export_submission(
            network,
            recipe,
            dataset,
            args.out,
            device=next(network.parameters()).device,
            inference=args.inference,
            progress=_counter("submission"),
        )
    )
    return 0


def data(args: argparse.Namespace) -> int:
    """Download, convert or verify data; `verify` returns 1 when something is missing."""
    from ssepa_lib.data import prepare

    if args.what == "verify":
        names = [args.name] if args.name else ["voc", "sbd", "coco"]
        results = [prepare.verify(name, args.root) for name in names]
        for result in results:
            print(f"{result.name} at {result.root}")
            for what, (found, expected) in result.counts.items():
                print(f"  {what:24} {found:6} of {expected}")
            for problem in result.problems:
                print(f"  missing: {problem}")
        return 1 if any(result.problems for result in results) else 0
    makers = {"voc": prepare.prepare_voc, "sbd": prepare.prepare_sbd, "coco": prepare.prepare_coco}
    options = {} if args.what == "coco" else {"progress": _counter(args.what, "B")}
    print(makers[args.what](args.root, **options).message)
    return 0


def recipe(args: argparse.Namespace) -> int:
    """Print a recipe in full, or the parts there are."""
    from omegaconf import OmegaConf

    from ssepa_lib.paths import RECIPES
    from ssepa_lib.recipe import load_recipe

    if args.name is None:
        for kind in ("data", "method", "backbone"):
            print(f"{kind}:")
            for path in sorted((RECIPES / kind).glob("*.yaml")):
                print(f"  {path.stem:20} {path.read_text().splitlines()[0].lstrip('# ')}")
        return 0
    made = load_recipe(args.name, _pairs(args.set))
    print(f"# {made.name}, hash {made.hash()}\n{OmegaConf.to_yaml(OmegaConf.structured(made))}", end="")
    return 0


def pretrain(args: argparse.Namespace) -> int:
    """Pre-train the built-in data's ViT."""
    from ssepa_lib.benchmarks.pretrain_shapes import pretrain as run

    options = {"steps": args.steps} if args.steps else {}
    print(run(args.out, seed=args.seed, on_step=_line_per_row, **options))
    return 0


def tables(args: argparse.Namespace) -> int:
    """Print the paper's tables beside the runs of a preset."""
    from ssepa_lib.paths import results_root
    from ssepa_lib.workbook import tables as t

    runs = t.collect_runs(results_root() / args.preset)
    for number in args.number or (1, 2, 3, 5):
        print(f"\nTable {number}\n\n{t.to_markdown(getattr(t, f'table_{number}')(runs))}")
    return 0


def study(args: argparse.Namespace) -> int:
    """Train and score methods over seeds; writes `tables/study.csv` and `.md` below the preset."""
    import pandas as pd

    from ssepa_lib.evaluation.evaluate import INFERENCE, PRODUCTS, describe_settings, product_names
    from ssepa_lib.workbook import tables as t
    from ssepa_lib.workbook.study import preset_folder, run_study

    options: dict[str, Any] = {"inference": _inference(args)}
    runs = run_study(
        args.preset,
        args.methods,
        args.seeds,
        splits={split: options for split in args.splits},
        steps=args.steps,
        device=args.device,
        run_name=args.run_name,
        arms={"": _pairs(args.set)},
        progress=lambda label: print(label, flush=True) or _line_per_row,
    )
    products = [n for n in product_names(PRODUCTS, tuple(INFERENCE)) if n in runs and runs[n].notna().any()]
    folder, text = preset_folder(args.preset) / "tables", []
    for split, of_split in runs.groupby("split", sort=False):
        mean, paired = (
            t.summary(of_split, ["method"], products),
            t.paired_differences(of_split, "method", args.methods[0], products),
        )
        for title, table in (
            (f"{split}: mIoU, %", mean),
            (f"{split}: difference from {args.methods[0]}", paired),
        ):
            cells = {
                p: [t.plus_minus(m, s, 2) for m, s in zip(table[p], table[f"{p}_sd"], strict=True)]
                for p in products
            }
            text.append(
                f"## {title}\n\n{t.to_markdown(pd.DataFrame({'method': table.method, 'seeds': table.seeds, **cells}))}"
            )
        lines = describe_settings(of_split["settings"].tolist(), products)
        text.append(
            "\n".join([f"Setting (mean ± sd over seeds {args.seeds}):\n", *(f"- {line}" for line in lines)])
        )
    name = "-".join(filter(None, ("study", args.run_name)))
    runs.drop(columns="settings").to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text), folder / f"{name}.md", sep="\n\n")
    return 0


def haaf(args: argparse.Namespace) -> int:
    """Train HAAF alone on a finished run with every supervision, and compare with every layer alone."""
    from ssepa_lib.recipe import SUPERVISIONS
    from ssepa_lib.training.trainer import load_run
    from ssepa_lib.workbook import figures
    from ssepa_lib.workbook import tables as t
    from ssepa_lib.workbook.study import compare_supervisions, measured_split

    network, recipe = load_run(args.run, args.device)
    settings = {"source": args.source, "descriptor": args.descriptor, "steps": args.propagate}
    variants = {kind: {"supervision": kind} | settings for kind in SUPERVISIONS[1:]}
    datasets = [measured_split(recipe, split) for split in args.splits]
    out = args.out or args.run
    out.mkdir(parents=True, exist_ok=True)
    progress = _counter("HAAF", "step")
    table = compare_supervisions(network, recipe, variants, datasets, steps=args.steps, progress=progress)
    table.round(3).to_csv(out / "haaf.csv", index=False)
    figures.use_style()
    axes = figures.supervisions(table, datasets[0].split)
    figures.save_figure(axes[0].figure, out / "haaf.png")
    print(t.to_markdown(table), *(out / name for name in ("haaf.csv", "haaf.png")), sep="\n")
    return 0


def bench(args: argparse.Namespace) -> int:
    """Run benchmark suites."""
    from ssepa_lib.benchmarks.bench import run_suites

    return run_suites(args.suite, args.out, quick=args.quick, full=args.full, device=args.device)


def gpu(args: argparse.Namespace) -> int:
    """Check, measure and train on a GPU."""
    from ssepa_lib.benchmarks.gpu import run_gpu

    return run_gpu(args.out, args.minutes, data=args.data, weights=args.weights, dry_run=args.dry_run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ssepa_lib",
        description=("Weakly supervised semantic segmentation from image labels: ToCo, SS-EPA and FSR."),
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(function, text: str, name: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name or function.__name__, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    def device(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))

    def inference(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--ms", action="store_true", help="also several scales and mirror")
        sub.add_argument("--crf", action="store_true", help="also the dense CRF after that")

    def run(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "run", type=Path, metavar="RUN", help="run folder, for example results/voc/ssepa-seed0"
        )
        device(sub)

    sub = add(workbook, "run the notebooks headlessly and write the report")
    sub.add_argument(
        "--preset", default="shapes", help="data recipe: shapes, voc_mini, voc, … (default shapes)"
    )
    sub.add_argument(
        "--only", action="append", default=[], metavar="NN", help="only this notebook (repeatable)"
    )
    sub.add_argument("--from", dest="start", metavar="NN", help="start with this notebook")
    sub.add_argument(
        "-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="override (repeatable)"
    )

    sub = add(train, "train a recipe, or finish training it")
    sub.add_argument("recipe", help="data/method[/backbone] or a YAML file; `recipe` lists what there is")
    sub.add_argument("--run", metavar="NAME", help="name of the run folder (default METHOD-seedN)")
    sub.add_argument("--seed", type=int)
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. train.steps=500"
    )
    sub.add_argument("--restart", action="store_true", help="throw away what the run folder holds")

    sub = add(evaluate, "score a trained run: CAM, auxiliary CAM, refined CAM, pseudo-labels, segmentation")
    run(sub)
    sub.add_argument("--split", default="val")
    sub.add_argument("--images", type=int, default=0, help="only the first so many images")
    inference(sub)

    sub = add(predict, "segment a folder of your own images")
    run(sub)
    sub.add_argument("--images", type=Path, required=True, metavar="FOLDER")
    sub.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    sub.add_argument("--inference", default="ms", choices=("raw", "ms", "crf"))

    sub = add(pseudo_labels, "write the pseudo-labels of a labelled split as palette PNGs", "pseudo-labels")
    run(sub)
    sub.add_argument("--split", default="train")
    sub.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    sub.add_argument(
        "--inference",
        default="ms",
        choices=("raw", "ms", "crf"),
        help=(
            "scale 1, several scales with mirror, or those with the dense CRF instead of pixel-adaptive refinement"
        ),
    )

    sub = add(submission, "make or check the archive for the VOC evaluation server")
    sub.add_argument("out", type=Path, metavar="ARCHIVE.tgz")
    sub.add_argument("--run", type=Path, metavar="RUN", help="run folder")
    sub.add_argument("--check", action="store_true", help="only check an archive that exists")
    sub.add_argument("--split", default="test")
    sub.add_argument("--inference", default="crf", choices=("raw", "ms", "crf"))
    device(sub)

    sub = add(data, "download, convert or verify a data set")
    sub.add_argument("what", choices=("voc", "sbd", "coco", "verify"))
    sub.add_argument("name", nargs="?", choices=("voc", "sbd", "coco"), help="with verify: only this one")
    sub.add_argument("--root", type=Path, metavar="FOLDER")

    sub = add(recipe, "show a recipe in full, or list the parts recipes are made of")
    sub.add_argument("name", nargs="?", help="data/method[/backbone]")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")

    sub = add(
        study, "train and score several methods with the same seeds; mean, spread and paired differences"
    )
    sub.add_argument("preset", help="data recipe")
    sub.add_argument("methods", nargs="+", metavar="METHOD", help="the first is the base of the differences")
    sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    sub.add_argument("--splits", nargs="+", default=["val", "train"], metavar="SPLIT")
    sub.add_argument("--steps", type=int, default=0, help="length of each training; 0: what the recipe says")
    inference(sub)
    sub.add_argument("--run-name", default="", metavar="NAME", help="added to the folders' names")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override for every run")
    device(sub)

    sub = add(
        haaf, "train HAAF alone on a finished run, once per supervision; compare with every layer alone"
    )
    run(sub)
    sub.add_argument("--steps", type=int, default=350, help="updates of HAAF (default 350)")
    sub.add_argument("--splits", nargs="+", default=["train", "val"], metavar="SPLIT")
    sub.add_argument("--source", default="softmax", choices=("softmax", "logits"))
    sub.add_argument("--descriptor", default="patch", choices=("patch", "full"))
    sub.add_argument("--propagate", type=int, default=1, metavar="N", help="propagation steps (default 1)")
    sub.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for haaf.csv and haaf.png; default: the run folder"
    )

    sub = add(tables, "print the paper's tables with this workbook's runs beside them")
    sub.add_argument("--preset", default="voc")
    sub.add_argument(
        "number", type=int, nargs="*", choices=(1, 2, 3, 5), metavar="N", help="1, 2, 3 or 5; default all"
    )

    sub = add(bench, "measure speed and memory; every row is a ratio within one run")
    sub.add_argument(
        "suite", nargs="*", help="affinity, step, par, energy, loader, crf, scaling; default all"
    )
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="default results/bench")
    size = sub.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="smaller sizes, fewer repeats")
    size.add_argument(
        "--full", action="store_true", help="ViT-B at 448² also on a processor (minutes per row)"
    )
    device(sub)

    sub = add(
        gpu, "check, measure and train on a GPU within a few minutes; writes one JSON, a table and figures"
    )
    sub.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    sub.add_argument(
        "--data", type=Path, metavar="VOC_ROOT", help="VOC 2012 folder (default: built-in scenes)"
    )
    sub.add_argument(
        "--weights", type=Path, metavar="FOLDER", help="folder with ViT-Tiny weights (default: random)"
    )
    sub.add_argument("--minutes", type=float, default=9.0)
    sub.add_argument("--dry-run", action="store_true", help="the whole path with toy sizes on the processor")

    sub = add(pretrain, "pre-train the micro ViT of the built-in data again")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    sub.add_argument("--steps", type=int, default=0)
    sub.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn bad input into one line on standard error and exit code 2."""
    args = _parser().parse_args(argv)
    try:
        return args.function(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 130
