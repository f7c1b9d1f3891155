"""Your own images in a notebook: an example, what a folder is good for, a run on it, an uploaded image."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from IPython.display import HTML
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from ssepa_lib.compose import load_recipe
from ssepa_lib.data import SegmentationDataset, eval_batches
from ssepa_lib.data.adopt import adopt
from ssepa_lib.data.survey import Survey, survey
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.multiscale import cam_view
from ssepa_lib.labels import Refiner, multi_scale_cam
from ssepa_lib.model import Network
from ssepa_lib.model.network import evaluating
from ssepa_lib.paths import folder_root
from ssepa_lib.recipe import Recipe
from ssepa_lib.training.run import RunFolder
from ssepa_lib.training.trainer import OnStep, train
from ssepa_lib.workbook.example_images import example_folder
from ssepa_lib.workbook.plan import duration, full_steps, seconds_on, step_cost
from ssepa_lib.workbook.queue import Job
from ssepa_lib.workbook.studies.data_study import inseparable
from ssepa_lib.workbook.study import preset_folder

VERDICTS = {"go": "#1b7837", "fix": "#b35806", "stop": "#c1272d"}  # from good to bad, with their colours


def chosen_folder(folder: str, preset: str, out: Path) -> Path:
    """The folder that is worked on: the given one, with the preset `folder` that of FOLDER_ROOT, or else an
    example, which is written below `out`."""
    given = folder or (folder_root() if preset == "folder" else "")
    return Path(given).expanduser() if given else example_folder(out)


def check_table(found: Survey, side: int = 0) -> pd.DataFrame:
    """What a folder is good for, one row per question: `what`, `found`, `verdict` and `advice`.

    The verdict is go (nothing to do), fix (it works without, but some images are left out or little can be
    learnt) or stop (nothing can be learnt).

    Args:
        side: of the training crop in pixels, with which sizes are compared; 0: they are not.
    """
    rows = [*_file_rows(found), *_class_rows(found), *_image_rows(found, side)]
    return pd.DataFrame(rows, columns=["what", "found", "verdict", "advice"])


def verdict(table: pd.DataFrame) -> str:
    """The worst verdict of a check table."""
    return max(table["verdict"], key=list(VERDICTS).index)


def _some(names: Sequence[str], limit: int = 3) -> str:
    """How many, and the first of them by name."""
    if not names:
        return "none"
    more = "" if len(names) <= limit else ", …"
    return f"{len(names)}: {', '.join(names[:limit])}{more}"


def _row(what: str, names: Sequence[str], advice: str) -> tuple[str, str, str, str]:
    """A row that asks for something wherever there are names."""
    return (what, _some(names), "fix", advice) if names else (what, "none", "go", "")


def _file_rows(found: Survey) -> list[tuple[str, str, str, str]]:
    usable, name = len(found.photos), found.table.name if found.table else "names of the folders"
    counted = f"{usable} of {found.rows} rows ({name})"
    broken = [f"{image} ({reason})" for image, reason in found.broken.items()]
    good = ("usable images", counted, "go", "")
    none = ("usable images", counted, "stop", "see the rows below; nothing can be learnt from no image")
    kept = (
        (str(found.skipped), "go", "raise the parameter images to use them")
        if found.skipped
        else ("none", "go", "")
    )
    return [
        good if usable else none,
        ("left out by the limit", *kept),
        _row("rows without a file", found.missing, "correct the name, or delete the row"),
        _row("files without a row", found.unlisted, "add a row for each; until then they are left out"),
        _row("rows without a class", found.unnamed, "name the classes, or 'background' for none"),
        _row("listed twice", found.twice, "keep one row; here their classes are joined"),
        _row("unreadable or unusable", broken, "replace the file, or delete the row"),
    ]


def _class_rows(found: Survey) -> list[tuple[str, str, str, str]]:
    labels = _labels(found)
    each = labels.sum(0).int().tolist() if len(labels) else [0] * len(found.classes)
    counts = dict(zip(found.classes, each, strict=True))
    if not any(each):
        return [("images per class", "no class is named", "stop", "write the classes of each image")]
    fewest = min(counts, key=counts.get)
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:6])
    shown += ", …" if len(counts) > 6 else ""
    few = "" if counts[fewest] >= 20 else f"add images of {fewest}; below about 20 expect little"
    always = [name for name, count in counts.items() if count == len(labels)]
    pairs = [f"{first} never without {second}" for first, second in inseparable(labels, found.classes)]
    mean, most = float(labels.sum(1).mean()), int(labels.sum(1).max())
    return [
        ("images per class", shown, "fix" if few else "go", few),
        ("classes per image", f"{mean:.1f} on average, at most {most}", "go", ""),
        _row("classes in every image", always, "add images without it ('background', or another class)"),
        _row("classes that never separate", pairs, "add images with one of the two alone"),
    ]


def _labels(found: Survey) -> torch.Tensor:
    """Multi-hot labels of the usable images, [n, C]."""
    rows = [[float(name in photo.classes) for name in found.classes] for photo in found.photos]
    return torch.tensor(rows).view(len(rows), len(found.classes))


def _image_rows(found: Survey, side: int) -> list[tuple[str, str, str, str]]:
    sizes = [photo.size for photo in found.photos]
    small = [photo.name for photo in found.photos if min(photo.size) < side / 2]
    long = [photo.name for photo in found.photos if max(photo.size) > 3 * min(photo.size)]
    ends = (min(map(min, sizes)), max(map(max, sizes))) if sizes else (0, 0)
    turned = sum(photo.turned for photo in found.photos)
    converted = sum(photo.converted for photo in found.photos)
    copies = [" = ".join(names) for names in found.copies]
    bad = [f"{name} ({reason.split(': ', 1)[-1]})" for name, reason in found.bad_masks.items()]
    without = "" if found.masks else "nothing can be measured; sections 1 to 4 do without"
    return [
        ("sides, pixels", f"{ends[0]} to {ends[1]}", "go", ""),
        _row(
            f"smaller than half of {side} pixels",
            small,
            "they are enlarged and blurred; a smaller crop helps",
        ),
        _row(
            "longer than three times their width", long, "they are squeezed to a square; cut them into pieces"
        ),
        ("turned by EXIF", str(turned or "none"), "go", "turned upright by themselves" if turned else ""),
        ("other modes or animated", str(converted or "none"), "go", "converted" if converted else ""),
        _row("the same image twice", copies, "keep one of each, above all across a split"),
        ("masks", f"{len(found.masks)} of {len(found.photos)} images", "go", without),
        _row("masks that do not fit", bad, "they are left out; ids 0 to C, 255 ignored, size of the image"),
    ]


def show(table: pd.DataFrame) -> HTML:
    """A table with its whole text, escaped; a column `verdict` is coloured."""

    def cell(kind: str, value: Any, column: str = "") -> str:
        colour = f"; color: {VERDICTS[value]}; font-weight: bold" if column == "verdict" else ""
        style = f"text-align: left; vertical-align: top{colour}"
        return f'<{kind} style="{style}">{html.escape(str(value))}</{kind}>'

    lines = ["".join(cell("th", name) for name in table)]
    for row in table.itertuples(index=False):
        lines.append("".join(cell("td", value, name) for name, value in zip(table, row, strict=True)))
    return HTML(f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>")


def own_recipe(preset: str, method: str, folder: Path, **options: Any) -> Recipe:
    """The recipe of a method with the network and the sizes of a preset, on a folder of `adopt`.

    Args:
        options: `steps`, `seed`, `device`, `frozen` (the backbone stays as it is, its features are computed
            once: `<method>+frozen`) and `changes` (further recipe settings).
    """
    settings = {"data.name": "folder", "data.root": str(folder), "data.train_images": 0, "data.val_images": 0}
    settings |= {"data.train_split": "train", "data.val_split": "val", "data.measured_train": ""}
    settings |= {f"train.{name}": options[name] for name in ("steps", "seed", "device") if name in options}
    method += "+frozen" if options.get("frozen") else ""
    return load_recipe(f"{preset}/{method}", settings | dict(options.get("changes") or {}))


def train_on(recipe: Recipe, out: Path, on_step: OnStep | None = None) -> tuple[Network, Recipe, Path]:
    """Train the recipe of `own_recipe`, or take the run that is there.

    Returns:
        The network in evaluation mode, its recipe, and the folder of the run.
    """
    run = RunFolder(_run_folder(recipe, out))
    train(recipe, run.path, on_step=on_step)
    return *run.load(recipe.train.device), run.path


def _run_folder(recipe: Recipe, out: Path) -> Path:
    """Where a run lies; the images are part of its name."""
    return out / f"{Path(recipe.data.root).name}-{recipe.hash()}"


def own_jobs(parameters: Mapping[str, Any]) -> list[Job]:
    """The run that notebook 08 makes with its parameters.

    Returns:
        One job, or none where the folder cannot be learnt from: the check table of the notebook says why.

    Raises:
        UserError: an unknown preset, method or setting.
    """
    preset, changes = parameters["preset"], parameters["overrides"]
    place = preset_folder(preset, parameters["run_name"]) / "own"
    try:
        found = survey(chosen_folder(parameters["folder"], preset, place), parameters["images"])
        copy = adopt(found, place / "copies")
    except UserError:
        return []
    options = {name: parameters[name] for name in ("steps", "seed", "device", "frozen")}
    recipe = own_recipe(preset, parameters["method"], copy, changes=changes, **options)
    return [Job(recipe, _run_folder(recipe, place / "runs"), {})]


CHOICES = {
    "a first try": ("shapes", 60, ""),
    "frozen backbone": ("voc_mini", 500, "+frozen"),
    "small, on a CPU": ("voc_mini", 500, ""),
    "small, longer": ("folder", 2000, ""),
    "as published": ("voc", 20000, ""),
}  # what to set → preset, steps, what is added to the method


def decision_table(images: int, method: str) -> pd.DataFrame:
    """What can be set, from the fastest to the best: backbone, crop, batch, steps, and how long it takes.

    Times are estimates by formula (`plan.seconds_on`): they tell minutes from days.

    Args:
        images: of the folder; with the steps and the batch they give how often each is seen.
    """
    rows, built_in, cpu = [], "micro ViT (built in)", f"CPU, {torch.get_num_threads()} threads"
    for name, (preset, steps, more) in CHOICES.items():
        recipe = load_recipe(f"{preset}/{method}{more}", {"train.steps": steps})
        cost = step_cost(recipe)
        counted = full_steps(recipe, cost, steps, images)
        rows.append(
            {
                "setting": name,
                "preset": preset,
                "backbone": built_in
                if recipe.model.weights == "micro"
                else recipe.model.backbone.split(".")[0],
                "parameters": f"{cost.parameters / 1e6:.1f} M",
                "crop": recipe.data.crop,
                "batch": recipe.data.batch,
                "steps": steps,
                "epochs": f"{steps * recipe.data.batch / max(1, images):.0f}",
                cpu: duration(counted * seconds_on(recipe, cost, "cpu")),
                "a GPU": duration(counted * seconds_on(recipe, cost, "gpu")),
            }
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def class_scores(network: Network, recipe: Recipe, dataset: SegmentationDataset) -> Tensor:
    """The probability of every class in every image, [n, C] in 0..1, on the CPU."""
    found, where = [], network.classifier.weight.device
    with evaluating(network):
        for _, pixels, _, _ in eval_batches(dataset, recipe.data.eval_size, recipe.eval.batch):
            found.append(network(pixels.to(where), segment=False).scores.float().sigmoid().cpu())
    return torch.cat(found)


def all_class_maps(network: Network, recipe: Recipe, images: Tensor, refiner: Refiner | None) -> Tensor:
    """The maps of all classes, whatever the label, at scale 1: [n, C, H, W], each stretched to 0..1.

    Args:
        images: [n, 3, H, W], 0..255, on the network's device.
    """
    labels, config = images.new_ones(len(images), len(network.classes)), cam_view(recipe.cam, "single")
    return multi_scale_cam(network, images, labels, config, refiner).for_labels


def as_square(image: Image.Image, side: int) -> Tensor:
    """An RGB image as a batch of one, resized as images are when they are measured: [1, 3, side, side] in
    0..255."""
    return pil_to_tensor(image.resize((side, side), Image.Resampling.BILINEAR)).float()[None]


def from_worst_to_best(judged: pd.DataFrame, count: int = 6) -> list[int]:
    """Some images from the one whose map agrees least with its flip to the one whose map agrees most.

    Args:
        judged: of `evaluation.blind.judge`; the first class of an image counts.

    Returns:
        Up to `count` indices, in the order of the folder.
    """
    order = judged.groupby("index")["flip"].first().sort_values(kind="stable").index.tolist()
    count = min(count, len(order))
    picked = {order[round(k * (len(order) - 1) / max(1, count - 1))] for k in range(count)}
    return sorted(picked)


def at_threshold(curve: pd.Series, threshold: Any) -> float:
    """The value of a threshold curve.

    Raises:
        UserError: the curve has no such threshold.
    """
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not number or threshold not in curve.index:
        known = ", ".join(f"{t:g}" for t in curve.index)
        raise UserError(f"threshold {threshold!r} was not measured; choose one of {known}.")
    return float(curve[threshold])


SYMPTOMS = (
    (
        "no class is recognised",
        "mean average precision, %",
        "precision",
        "more steps; ImageNet weights; labels",
    ),
    ("maps show a part only", "share of the image above the threshold", "area", "the affinity; more steps"),
    ("maps change when flipped", "flip agreement", "flip", "more steps; more images of that kind"),
    (
        "maps show the background",
        "pairs of classes that never separate",
        "stuck",
        "images of one without the other",
    ),
    (
        "maps are flat blobs",
        "mean cosine of two tokens, last layer",
        "alike",
        "patch token contrast; fewer iterations",
    ),
    (
        "everything is foreground",
        "median of the maps (floor)",
        "median",
        "a higher threshold; cam.calibrate: otsu",
    ),
)  # symptom, number, its name in `checklist`, what to try


def checklist(**values: float) -> pd.DataFrame:
    """Symptoms of failure with the number to look at, its value here, and what to try.

    Args:
        values: the number of each symptom by its name in `SYMPTOMS`.
    """
    rows = [(symptom, number, f"{values[name]:.3g}", remedy) for symptom, number, name, remedy in SYMPTOMS]
    return pd.DataFrame(rows, columns=["symptom", "number to look at", "here", "what to try"])
