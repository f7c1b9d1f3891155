"""The HTML report: every executed notebook as a page, and an index with numbers and figures."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from ssepa_lib.evaluation.results import describe_size, read_results
from ssepa_lib.files import write_text

UNFINISHED = ".unfinished"  # in the name of a copy whose notebook failed or was interrupted
HEADLINE = {
    "cam": "CAM",
    "aux_cam": "auxiliary CAM",
    "refined_cam": "refined CAM",
    "pseudo_label": "pseudo-label",
    "segmentation": "segmentation",
}  # output in metrics.json → column

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
body {{ color: #222 }} h1, h2 {{ line-height: 1.2 }} a {{ color: #0b5fa5 }} .failed {{ color: #b00020 }}
.note {{ color: #555; font-size: .9rem }} table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd }}
td:not(:first-child) {{ text-align: right; font-variant-numeric: tabular-nums }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem }}
figure {{ margin: 0 }} img {{ max-width: 100%; border: 1px solid #ddd }}
figcaption {{ font-size: .85rem; color: #555 }}
</style><h1>{title}</h1>{body}</html>
"""


def read_runs(preset_folder: Path, run_name: str = "") -> dict[str, dict]:
    """`metrics.json` of every run directly below a preset's results, run name → split → result, sorted by
    name.

    Args:
        run_name: only the runs of this name, `<method>-<run_name>-seed<n>`; empty: all.
    """
    pattern = f"*-{run_name}-*" if run_name else "*"
    files = sorted(preset_folder.glob(f"{pattern}/metrics.json"))
    return {path.parent.name: read_results(path.parent) for path in files}


def _rows(preset_folder: Path, run_name: str) -> tuple[list[str], list[list[str]], list[str]]:
    """Columns, rows and the distinct settings of the headline table."""
    rows, settings = [], []
    for run, splits in read_runs(preset_folder, run_name).items():
        for split, result in splits.items():
            values = [result["miou"].get(output) for output in HEADLINE]
            rows.append([run, split, *("–" if value is None else f"{value:.1f}" for value in values)])
            s = result["setting"]
            size, steps = describe_size(s["size"]), f"{s['steps']} steps of {s['batch']}"
            settings.append(f"{s['data']} {split}: {s['images']} images, {size}, {steps}")
    return ["run", "split", *HEADLINE.values()], rows, list(dict.fromkeys(settings))


def headline(preset_folder: Path, run_name: str = "") -> str:
    """The mIoU table of a preset's runs as plain text, with the setting the numbers belong to."""
    columns, rows, settings = _rows(preset_folder, run_name)
    if not rows:
        return "No trained run has been evaluated yet."
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    sides = ["<", "<"] + [">"] * len(HEADLINE)
    lines = [f"mIoU, %  ({'; '.join(settings)})"]
    for row in [columns, *rows]:
        lines.append("  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)))
    return "\n".join(lines)


def _numbers(preset_folder: Path, run_name: str) -> str:
    columns, rows, settings = _rows(preset_folder, run_name)
    if not rows:
        return ""
    head = "".join(f"<th>{column}</th>" for column in columns)
    table = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
    note = html.escape("; ".join(settings)) + ". One confusion matrix over the split."
    return f'<h2>mIoU, %</h2><table><tr>{head}</tr>{table}</table><p class="note">{note}</p>'


def _thumbnail(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((640, 640))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _figures(folder: Path) -> str:
    items = []
    for path in sorted((folder / "figures").glob("*.png")):
        image = f'<img alt="{path.stem}" src="data:image/jpeg;base64,{_thumbnail(path)}">'
        caption = f"<figcaption>{path.stem.replace('_', ' ')}</figcaption>"
        items.append(f'<figure><a href="../figures/{path.name}">{image}</a>{caption}</figure>')
    return f'<h2>Figures</h2><div class="grid">{"".join(items)}</div>' if items else ""


def _title(notebook: Any) -> str:
    """First heading of a notebook."""
    for cell in notebook.cells:
        for line in cell.source.splitlines():
            if line.startswith("# ") and cell.cell_type == "markdown":
                return line[2:]
    return ""


def _item(path: Path, report: Path, exporter: Any) -> str:
    """Write the page of one executed notebook; its line of the index."""
    import nbformat

    name, unfinished = path.stem.removesuffix(UNFINISHED), path.stem.endswith(UNFINISHED)
    try:
        notebook = nbformat.read(path, as_version=4)
    except ValueError:  # the runner was killed while it saved this copy
        return f'<li>{name} <span class="failed">cut short: run it again</span></li>'
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": path.stem}})
    write_text(report / f"{path.stem}.html", page)
    failed = any(o.get("output_type") == "error" for c in notebook.cells for o in c.get("outputs", []))
    state = "failed" if failed else "cut short"
    mark = f' <span class="failed">last call {state}</span>' if unfinished else ""
    return f'<li><a href="{path.stem}.html">{html.escape(_title(notebook) or name)}</a>{mark}</li>'


def write_report(preset_folder: Path, run_name: str = "") -> Path:
    """Turn executed notebooks into pages and an `index.html`; returns the index.

    Args:
        preset_folder: `<results>/<preset>`, where the runs lie.
        run_name: report of the notebooks in `<preset_folder>/<run_name>/notebooks`; empty: of those in
            `<preset_folder>/notebooks`. The pages are written to the folder `report` beside `notebooks`.
    """
    from nbconvert import HTMLExporter

    folder = preset_folder / run_name
    report, exporter = folder / "report", HTMLExporter()
    items = [_item(path, report, exporter) for path in sorted((folder / "notebooks").glob("*.ipynb"))]
    for page in report.glob(f"*{UNFINISHED}.html"):
        if not (folder / "notebooks" / f"{page.stem}.ipynb").exists():
            page.unlink()  # it has succeeded since
    body = f"{_numbers(preset_folder, run_name)}<h2>Notebooks</h2><ul>{''.join(items)}</ul>{_figures(folder)}"
    title = ", ".join(filter(None, (f"SS-EPA workbook: {preset_folder.name}", run_name)))
    write_text(report / "index.html", _PAGE.format(title=title, body=body))
    return report / "index.html"
