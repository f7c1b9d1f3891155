"""One command for a machine with a GPU: is it right there, how fast is it, does it train? In under nine minutes.

Needs torch, torchvision, timm and the pure-Python dependencies; figures only where matplotlib is. Every part has a
share of the time, and what is there is written after each part.
"""

import csv
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ssepa_lib.benchmarks import bench
from ssepa_lib.benchmarks.bench import Row, Setup
from ssepa_lib.data.datasets import VOC_CLASSES, build_dataset
from ssepa_lib.data.views import train_loader
from ssepa_lib.errors import UserError
from ssepa_lib.labels.par import PixelAdaptiveRefinement
from ssepa_lib.methods.bilateral import bilateral_filter
from ssepa_lib.methods.losses import SIGMA_RGB, SIGMA_XY
from ssepa_lib.model.affinity import PatchAffinity
from ssepa_lib.model.network import Network, build_network
from ssepa_lib.recipe import Recipe, load_recipe
from ssepa_lib.training.trainer import Trainer, load_run, train

SHARES = {"checks": 0.08, "par": 0.04, "energy": 0.06, "affinity": 0.14, "step": 0.16, "scaling": 0.12}
TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
METHODS = ("toco", "ssepa")


@dataclass
class Check:
    """A number that must come out alike in two ways of computing it."""

    name: str
    error: float  # relative, L2 norm
    tolerance: float
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        self.passed = self.error <= self.tolerance


class _TimeIsUp(Exception):
    """Raised from a training callback at the end of its budget."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    expected = expected.detach().double().cpu()
    return ((found.detach().double().cpu() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@torch.no_grad()
def _affinity_checks(setup: Setup) -> Iterator[Check]:
    network = build_network(setup.recipe(), VOC_CLASSES).to(setup.device).eval()
    image = setup.pictures(2)[0]
    plain = network(image, affinity=True)
    with torch.autocast(setup.device.type, torch.bfloat16):
        half = network(image, affinity=True)
    cam = torch.rand(*plain.patches.shape[:2], len(VOC_CLASSES), device=setup.device)
    for kind, out, tolerance in (("float32", plain, 1e-4), ("bfloat16", half, 2e-2)):
        tokens = out.affinity.queries, out.affinity.keys, out.affinity.prefix
        for source in ("softmax", "logits"):
            fused, dense = (
                PatchAffinity(*tokens, weigh=network.haaf, source=source, strategy=s) @ cam
                for s in ("haaf_fused", "haaf_dense")
            )
            yield Check(
                f"affinity of {source} in {kind}: fused against dense",
                relative_error(fused, dense),
                tolerance,
            )
    yield Check("scores: bfloat16 against float32", relative_error(half.scores, plain.scores), 5e-2)
    yield Check("CAM: bfloat16 against float32", relative_error(half.cam, plain.cam), 5e-2)


def _toy_step(device: str, **train_settings) -> tuple[dict[str, Tensor], Network]:
    """Loss terms of one step of the toy network on a device, and the network with its gradients."""
    small = Setup(torch.device(device), quick=True)
    recipe = small.recipe()
    trainer = Trainer(
        replace(recipe, train=replace(recipe.train, **train_settings)), VOC_CLASSES, small.device
    )
    trainer.index = recipe.switch_step
    terms = trainer.terms(small.batch(4))
    sum(terms.values()).backward()
    return terms, trainer.network


def _gradient(network: Network) -> Tensor:
    """Of the backbone, flat."""
    return torch.cat([p.grad.flatten() for p in network.backbone.parameters() if p.grad is not None])


def _checks(setup: Setup) -> Iterator[Check]:
    """Everything that could differ between devices, precisions and fast paths."""
    yield from _affinity_checks(setup)
    side = 96 if setup.quick else 224
    image = setup.pictures(2, side)[0].float()
    values = torch.rand(2, 5, side, side, device=setup.device)
    exact, fast = (bilateral_filter(image, values, SIGMA_XY, SIGMA_RGB, exact=e) for e in (True, False))
    yield Check("energy filter: fast against exact", relative_error(fast, exact), 2e-2)
    small, few = image[:, :, :64, :64], values[:, :, :64, :64]
    here, there = (
        bilateral_filter(small.to(d), few.to(d), SIGMA_XY, SIGMA_RGB, exact=True)
        for d in (setup.device, "cpu")
    )
    yield Check("exact energy filter: this device against the processor", relative_error(here, there), 1e-4)
    config = setup.recipe().cam
    par = PixelAdaptiveRefinement(config.par_dilations, config.par_iterations)
    there = par(image.cpu(), values.cpu())
    yield Check(
        "PAR: this device against the processor",
        relative_error(par.to(setup.device)(image, values), there),
        1e-4,
    )
    here = setup.device.type
    with torch.backends.cudnn.flags(
        enabled=True, allow_tf32=False
    ):  # a threshold can magnify TF32's rounding
        terms, network = _toy_step(here, precision="fp32")
        there = _toy_step("cpu", precision="fp32")[0]
        again = _toy_step(here, precision="fp32", checkpointing=True)[1]
    for name, value in there.items():
        yield Check(
            f"loss term {name}: this device against the processor", relative_error(terms[name], value), 2e-2
        )
    yield Check(
        "gradient: checkpointing against none", relative_error(_gradient(again), _gradient(network)), 1e-4
    )
    half = _toy_step(here, precision="bf16")[1]
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    lost = trained - {name for name, p in half.named_parameters() if p.grad is not None}
    yield Check("parameters that lose their gradient in bfloat16", len(lost), 0)


def _training_recipe(method: str, setup: Setup, weights: Path | None, dry_run: bool) -> Recipe:
    """ViT-Tiny at 448² on VOC, or the built-in data with its micro ViT."""
    settings = {"train.device": setup.device.type, "data.workers": 0 if dry_run else 8, "train.log_every": 5}
    if dry_run:
        settings |= {
            "data.crop": 64,
            "data.eval_size": 64,
            "data.batch": 2,
            "data.val_images": 4,
            "contrast.local_size": 32,
            "contrast.local_crops": 2,
            "model.weights": "none",
        }
    if setup.data is None:
        return load_recipe(f"shapes/{method}", settings)
    file = weights / f"{TINY}.safetensors" if weights else None
    folders = {
        "data.root": str(setup.data),
        "data.train_split": "train",
        "data.val_images": 200,
        "model.weights": str(file) if file and file.is_file() else "none",
    }
    return load_recipe(f"voc/{method}/vit_tiny", folders | settings)


def _steps_that_fit(recipe: Recipe, setup: Setup, seconds: float) -> int:
    """Number of steps, from the time of a few with loading and all loss terms."""
    dataset = build_dataset(recipe.data, "train")
    trainer = Trainer(recipe, dataset.classes, setup.device)
    batches = iter(train_loader(dataset, recipe))
    for number in range(12):
        if number == 4:  # workers and kernels are warm
            began = time.perf_counter()
        bench.dense_step(trainer, next(batches))
        bench.wait(setup.device)
    each = (time.perf_counter() - began) / 8
    return int(min(4000, max(20, 0.75 * seconds / each)))


def _train(recipe: Recipe, folder: Path, setup: Setup, until: float) -> dict:
    """Train and score one recipe; a run that reaches `until` is stopped and not scored."""

    def on_step(row: dict) -> None:
        if time.perf_counter() > until:
            raise _TimeIsUp

    began = time.perf_counter()
    result = {"recipe": recipe.name, "steps": recipe.train.steps, "weights": recipe.model.weights}
    try:
        train(recipe, folder, resume=False, on_step=on_step)
        result["finished"] = True
    except _TimeIsUp:
        result["finished"] = False
    with (folder / "history.csv").open() as file:
        result["history"] = list(csv.DictReader(file))
    seconds = time.perf_counter() - began
    result |= {"seconds": seconds, "steps_per_second": int(result["history"][-1]["step"]) / seconds}
    if result["finished"]:
        from ssepa_lib.evaluation.evaluate import evaluate

        network, recipe = load_run(folder, setup.device.type)
        scores = evaluate(network, recipe, build_dataset(recipe.data, "val"), device=setup.device)
        result |= {"miou": scores["miou"], "setting": scores["setting"]}
    return result


def _training(out: Path, setup: Setup, weights: Path | None, dry_run: bool, until: float) -> Iterator[dict]:
    """Both rows with the same number of steps; a quarter of the time is left for scoring."""
    recipes = [_training_recipe(method, setup, weights, dry_run) for method in METHODS]
    seconds = 0.75 * (until - time.perf_counter()) / len(recipes)
    steps = 4 if dry_run else _steps_that_fit(recipes[-1], setup, seconds)
    for left, (method, recipe) in zip((2, 1), zip(METHODS, recipes, strict=True), strict=True):
        recipe.train.steps = recipe.train.save_every = steps
        end = time.perf_counter() + 0.85 * (until - time.perf_counter()) / left
        yield _train(recipe, out / "runs" / method, setup, end)


def _figures(out: Path, rows: list[Row], training: list[dict]) -> list[str]:
    """Memory by strategy, cost against image size and learning curves; none without matplotlib."""
    try:
        import pandas as pd

        from ssepa_lib.workbook import figures
    except ImportError:
        return []
    figures.use_style()
    drawn = {}
    memory = [
        {"strategy": r.name.split(", ")[1], "batch": int(r.setting[-1]), "gigabytes": r.value / 1e3}
        for r in rows
        if r.suite == "affinity" and r.name.startswith("peak memory")
    ]
    memory += [
        {"strategy": "none", "batch": int(r.setting[-1]), "gigabytes": r.reference / 1e3}
        for r in rows
        if r.name == "peak memory of a step, haaf_fused"
    ]
    if memory:
        drawn["memory"] = figures.memory_bars(pd.DataFrame(memory)).figure
    sizes = [r for r in rows if r.at and r.at["batch"] == 1]
    sizes = [r for r in sizes if r.at["depth"] == sizes[0].at["depth"]]
    for unit, label in (("ms", "forward and backward, ms"), ("MB", "peak memory, MB")):
        points = [
            {"side": r.at["side"], unit: y, "affinity": name}
            for r in sizes
            if r.unit == unit
            for name, y in (("haaf_fused", r.value), ("none", r.reference))
        ]
        if points:
            ax = figures.scaling_curves(
                pd.DataFrame(points), "side", unit, "affinity", ("image side, pixels", label)
            )
            drawn[f"scaling_{unit}"] = ax.figure
    histories = {t["recipe"]: pd.DataFrame(t["history"]).apply(pd.to_numeric) for t in training}
    if histories:
        drawn["learning"] = figures.learning_curves(histories, smooth=3)[0].figure
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
        dry_run: the whole path with toy sizes on the processor.

    Returns:
        0, or 1 where a check failed or a part could not run.

    Raises:
        UserError: there is no GPU (without `dry_run`), or `data` holds no VOC.
    """
    if not dry_run and not torch.cuda.is_available():
        raise UserError(
            "no CUDA GPU is usable here; run this on a machine with one, or add --dry-run to try the path."
        )
    out, minutes = Path(out), float("inf") if dry_run else minutes
    until = time.perf_counter() + 60 * minutes
    setup = bench.open_setup("cpu" if dry_run else "cuda", quick=dry_run, data=data, seconds=5)
    setup = setup if data else replace(setup, data=None)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    report = {
        "machine": bench.machine(setup.device),
        "data": "VOC" if data else "built-in",
        "dry_run": dry_run,
        "checks": [],
        "rows": [],
        "training": [],
        "figures": [],
        "seconds": {},
        "errors": {},
    }

    def part(name: str, produce) -> None:
        start = time.perf_counter()
        try:
            produce(min(until, start + 60 * minutes * SHARES.get(name, 1)))
        except Exception as error:  # one part that fails must not cost the others
            report["errors"][name] = "".join(traceback.format_exception(error))
        report["seconds"][name] = round(time.perf_counter() - start, 1)
        report["rows"] = [asdict(row) for row in rows]
        bench.write_report(out, "gpu", report, rows)
        print(
            f"{name}: {report['seconds'][name]} s{' FAILED' if name in report['errors'] else ''}", flush=True
        )

    part("checks", lambda end: report["checks"].extend(map(asdict, _checks(setup))))
    for suite in list(SHARES)[1:]:
        part(suite, lambda end, suite=suite: rows.extend(bench.measure(suite, setup, end)))

    def training(end: float) -> None:
        if end - time.perf_counter() < 60:
            raise TimeoutError("no time is left to train; allow more minutes")
        for run in _training(out, setup, weights, dry_run, end - 10):
            report["training"].append(run)
            bench.write_report(out, "gpu", report, rows)

    part("training", training)
    part("figures", lambda end: report["figures"].extend(_figures(out, rows, report["training"])))
    failed = [check["name"] for check in report["checks"] if not check["passed"]]
    print(bench.to_markdown(rows))
    print(
        f"{len(report['checks']) - len(failed)} of {len(report['checks'])} checks passed"
        + "".join(f"; failed: {name}" for name in [*failed, *report["errors"]])
    )
    for run in report["training"]:
        print(
            f"{run['recipe']}: {run['steps']} steps, {run['steps_per_second']:.1f} per second, "
            f"mIoU {run.get('miou', 'not scored')}"
        )
    return 1 if failed or report["errors"] else 0
