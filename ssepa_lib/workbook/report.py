"""The HTML report: every executed notebook as a page, and an index that begins with question and answer."""

import base64
import glob
import html
import io
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from ssepa_lib.data.images import UNREADABLE
from ssepa_lib.evaluation.provenance import commit
from ssepa_lib.evaluation.results import OUTPUTS, describe_size, heading, read_all_results
from ssepa_lib.files import write_text
from ssepa_lib.workbook import exhibits
from ssepa_lib.workbook.figures.style import method_name
from ssepa_lib.workbook.lesson import words_page
from ssepa_lib.workbook.report_page import linked, markdown, notebook_page, page, takeaways_of, title_of

UNFINISHED = ".unfinished"  # in the name of a copy whose notebook failed or was interrupted
HEADLINE = {output: heading(output) for output in OUTPUTS}  # output in metrics.json → column
QUESTION = "How much of an object can a network find when it is only told that it is there?"
ARGUMENT = {  # the figures that carry the argument, in the order of preference, and what they show
    "04_cams": "Maps of some validation images beside the ground truth: plain, and in refined forms.",
    "04_baselines": "What every form of the affinity reaches, beside matrices that do not see the image.",
    "06_methods": "The mIoU of the methods, every seed a dot.",
    "04_layers": "The weight that every layer gets, and what a map refined by this layer alone is worth.",
    "00_cam_and_affinity": "One image, the map of its class, two refined forms of it, and the mask.",
    "02_affinity_and_haaf": "From the attention of the layers to the patch affinity; the weights of HAAF.",
}


def read_runs(preset_folder: Path, run_name: str = "") -> dict[str, dict]:
    """`metrics.json` of every run directly below a preset's results, run name → split → result, sorted by
    name; a run that cannot be read is left out.

    Args:
        run_name: only the runs of this name, `<method>-<run_name>-seed<n>`; empty: all.
    """
    found, _ = _read_runs(preset_folder, run_name)
    return {folder.name: results for folder, results in found.items()}


def _read_runs(preset_folder: Path, run_name: str) -> tuple[dict[Path, dict[str, dict]], list[str]]:
    """The results of every run, and a sentence for each that is left out."""
    pattern = f"*-{glob.escape(run_name)}-*" if run_name else "*"
    return read_all_results(path.parent for path in sorted(preset_folder.glob(f"{pattern}/metrics.json")))


def _setting(split: str, s: dict[str, Any]) -> str:
    """What the numbers of a run belong to."""
    size, steps = describe_size(s["size"]), f"{s['steps']} steps of {s['batch']}"
    return f"{s['data']} {split}: {s['images']} images, {size}, {steps}"


def _rows(preset_folder: Path, run_name: str) -> tuple[list[str], list[list[str]], list[str]]:
    """Columns, rows and the distinct settings of the headline table."""
    rows, settings = [], []
    for run, splits in read_runs(preset_folder, run_name).items():
        for split, result in splits.items():
            values = [result["miou"].get(output) for output in HEADLINE]
            rows.append([run, split, *("–" if value is None else f"{value:.1f}" for value in values)])
            settings.append(_setting(split, result["setting"]))
    return ["run", "split", *HEADLINE.values()], rows, list(dict.fromkeys(settings))


def headline(preset_folder: Path, run_name: str = "") -> str:
    """The mIoU table of a preset's runs as plain text, with the setting the numbers belong to."""
    columns, rows, settings = _rows(preset_folder, run_name)
    left_out = _read_runs(preset_folder, run_name)[1]
    if not rows:
        return "\n".join(["No trained run has been evaluated yet.", *left_out])
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    sides = ["<", "<"] + [">"] * len(HEADLINE)
    lines = [f"mIoU, %  ({'; '.join(settings)})"]
    for row in [columns, *rows]:
        lines.append("  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)))
    return "\n".join([*lines, *left_out])


def _by_method(preset_folder: Path, run_name: str) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Setting → method → output → mIoU of every seed."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run, splits in read_runs(preset_folder, run_name).items():
        name = method_name(run.rpartition("-seed")[0] or run)
        for split, result in splits.items():
            setting = _setting(split, result["setting"])
            outputs = found.setdefault(setting, {}).setdefault(name, {})
            for output in HEADLINE:
                if result["miou"].get(output) is not None:
                    outputs.setdefault(output, []).append(result["miou"][output])
    return found


def _mean(values: Sequence[float]) -> str:
    """mean ± sd over seeds, or the one value."""
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def _table(setting: str, methods: dict[str, dict[str, list[float]]]) -> str:
    columns = [output for output in HEADLINE if any(output in outputs for outputs in methods.values())]
    head = "".join(f"<th>{HEADLINE[c]}</th>" for c in columns)
    rows = []
    for name, outputs in methods.items():
        cells = "".join(f"<td>{_mean(outputs.get(c, []))}</td>" for c in columns)
        seeds = max(map(len, outputs.values()), default=0)
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{seeds}</td>{cells}</tr>")
    table = f"<table><tr><th>method</th><th>seeds</th>{head}</tr>{''.join(rows)}</table>"
    note = (
        f"{html.escape(setting)}. Mean ± standard deviation over seeds; one confusion matrix over the split."
    )
    return f'<div class="wide">{table}</div><p class="note">{note}</p>'


def _answer(found: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """The answer to the question in two sentences, from the first setting that has results."""
    if not found:
        return "No trained run has been evaluated yet."
    setting, methods = next(iter(found.items()))
    best = {m: np.mean(o["segmentation"]) for m, o in methods.items() if o.get("segmentation")}
    said = []
    if best:
        name = max(best, key=best.get)
        said.append(
            f"Trained with image-level labels alone, {name} labels the pixels of {setting.split(':')[0]} "
            f"with an mIoU of {_mean(methods[name]['segmentation'])} %."
        )
    refined = {
        m: np.mean(o["refined_cam"]) - np.mean(o["cam"])
        for m, o in methods.items()
        if o.get("refined_cam") and o.get("cam")
    }
    if refined:
        name = max(refined, key=refined.get)
        change = "raises" if refined[name] > 0 else "lowers"
        said.append(
            f"At best the patch affinity {change} the mIoU of the class activation map from "
            f"{_mean(methods[name]['cam'])} to {_mean(methods[name]['refined_cam'])} %, in runs of {name}."
        )
    return " ".join(said) or "The evaluated runs have neither a segmentation nor a refined map yet."


def _title(path: Path) -> str:
    """What the file of a figure says of itself."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Title") or path.stem[3:].replace("_", " ")


def _thumbnail(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((960, 960))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _figures(folder: Path, count: int = 3) -> str:
    """The figures that carry the argument, or others where there are none; the rest stands in the pages."""
    order = list(ARGUMENT)
    paths = sorted(
        (folder / "figures").glob("*.png"),
        key=lambda p: (order.index(p.stem) if p.stem in ARGUMENT else len(order), p.stem),
    )
    items = []
    for path in paths[:count]:
        try:
            title = html.escape(ARGUMENT.get(path.stem) or _title(path), quote=True)
            image = f'<img alt="{title}" src="data:image/jpeg;base64,{_thumbnail(path)}">'
        except UNREADABLE:  # cut short by a full disk, for example; the report can do without it
            continue
        link = f'<a href="../figures/{quote(path.name)}">{image}</a>'
        items.append(f"<figure>{link}<figcaption>{title}</figcaption></figure>")
    return f"<h2>Figures</h2>{''.join(items)}" if items else ""


def _item(path: Path, report: Path, around: tuple[str, str], pages: Sequence[str]) -> str:
    """Write the page of one executed notebook; its line of the index, with its takeaways."""
    import nbformat

    name, unfinished = path.stem.removesuffix(UNFINISHED), path.stem.endswith(UNFINISHED)
    try:
        notebook = nbformat.read(path, as_version=4)
    except (ValueError, AttributeError, nbformat.ValidationError):  # killed while it saved this copy
        return f'<li>{html.escape(name)} <span class="failed">cut short: run it again</span></li>'
    title = title_of(notebook) or name
    write_text(report / f"{path.stem}.html", notebook_page(notebook, title, *around, pages))
    failed = any(o.get("output_type") == "error" for c in notebook.cells for o in c.get("outputs", []))
    state = "failed" if failed else "cut short"
    mark = f' <span class="failed">last call {state}</span>' if unfinished else ""
    said = "" if unfinished else linked(markdown(takeaways_of(notebook)), pages)
    link = f'<a href="{quote(path.stem)}.html">{html.escape(f"{name[:2]} {title}")}</a>'
    return f"<li>{link}{mark}{said}</li>"


def _origin() -> str:
    """Environment, date and commit of this report."""
    from ssepa_lib.workbook.study import environment

    return f"{environment('auto')}; {datetime.now():%Y-%m-%d %H:%M}; commit {commit()}"


def _provenance(preset_folder: Path, run_name: str) -> str:
    """What the numbers of every run were measured with, as a table below the origin of the report."""
    names = {"weights": "weights", "pixels": "data", "recipe_hash": "recipe", "commit": "commit"}
    rows = []
    for run, splits in read_runs(preset_folder, run_name).items():
        for split, result in splits.items():
            setting = result["setting"]
            used = ", ".join(f"{name} {number}" for name, number in setting.get("versions", {}).items())
            known = [setting.get(name) or "not recorded" for name in names]
            cells = [run, split, *known, used or "not recorded", setting.get("device", "not recorded")]
            rows.append("".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells))
    heads = ["run", "split", *names.values(), "versions", "device"]
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    note = "Fingerprints: equal ones mean equal weights, pixels and settings of the training."
    summary = "<summary>Weights, data, recipe and versions of every number</summary>"
    table = f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
    return f'<details>{summary}{table}<p class="note">{note}</p></details>' if rows else ""


def write_report(preset_folder: Path, run_name: str = "") -> Path:
    """Turn executed notebooks into pages and an `index.html`; returns the index.

    The pages load nothing from a network: equations are MathML, explorers are frozen.

    Args:
        preset_folder: `<results>/<preset>`, where the runs lie.
        run_name: report of the notebooks in `<preset_folder>/<run_name>/notebooks`; empty: of those in
            `<preset_folder>/notebooks`. The pages are written to the folder `report` beside `notebooks`.
    """
    folder = preset_folder / run_name
    report, copies = folder / "report", sorted((folder / "notebooks").glob("*.ipynb"))
    pages = ["", *(f"{path.stem}.html" for path in copies), ""]
    items = [_item(path, report, (pages[i], pages[i + 2]), pages) for i, path in enumerate(copies)]
    for old in report.glob(f"*{UNFINISHED}.html"):
        if not (folder / "notebooks" / f"{old.stem}.ipynb").exists():
            old.unlink()  # it has succeeded since
    title = ", ".join(filter(None, (f"SS-EPA workbook: {preset_folder.name}", run_name)))
    found = _by_method(preset_folder, run_name)
    tables = "".join(_table(setting, methods) for setting, methods in found.items())
    left_out = [each.replace(f"{preset_folder}/", "") for each in _read_runs(preset_folder, run_name)[1]]
    notes = "".join(f'<p class="note">{html.escape(each)}</p>' for each in left_out)
    parts = [
        f"<h1>{html.escape(title)}</h1><p><strong>{QUESTION}</strong></p>",
        f'<p class="answer">{html.escape(_answer(found))}</p>',
        f"<h2>mIoU, %</h2>{tables}{notes}" if tables or notes else "",
        _figures(folder),
        f"<h2>Notebooks</h2><ul>{''.join(items)}</ul>",
        '<p><a href="words.html">Words and equations</a>, with the sections that build them</p>',
        f'<p><a href="{exhibits.PAGE}">{exhibits.TITLE}</a>: what each is made by.</p>',
        f'<h2>Origin</h2><p class="note">{html.escape(_origin())}</p>',
        _provenance(preset_folder, run_name),
    ]
    nav = '<nav><a href="index.html">Index of the report</a></nav>'
    words = f"{nav}<main>{linked(words_page(), pages)}</main>"
    write_text(report / "words.html", page("Words and equations", words))
    write_text(report / exhibits.PAGE, exhibits.exhibits_page(report, preset_folder.name))
    write_text(report / "index.html", page(title, "".join(parts)))
    return report / "index.html"
