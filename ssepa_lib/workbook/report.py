"""The HTML report of a preset: every executed notebook as a page, and an index with numbers and figures."""

import base64
import html
import io
import json
from pathlib import Path

from ssepa_lib.errors import UserError

HEADLINE = {
    "cam": "CAM",
    "aux_cam": "auxiliary CAM",
    "refined_cam": "refined CAM",
    "pseudo_label": "pseudo-label",
    "segmentation": "segmentation",
}  # product in metrics.json → column

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h1, h2 {{ line-height: 1.2 }} a {{ color: #0b5fa5 }} .note {{ color: #555; font-size: .9rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }} th, td {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd }}
td:not(:first-child) {{ text-align: right; font-variant-numeric: tabular-nums }} .failed {{ color: #b00020 }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem }}
figure {{ margin: 0 }} img {{ max-width: 100%; border: 1px solid #ddd }} figcaption {{ font-size: .85rem; color: #555 }}
</style><h1>{title}</h1>{body}</html>
"""


def read_runs(folder: Path) -> dict[str, dict]:
    """`metrics.json` of every run directly below a preset's results, run name → split → result, sorted by name."""
    runs = {}
    for path in sorted(folder.glob("*/metrics.json")):
        try:
            runs[path.parent.name] = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON; delete it and evaluate that run again.") from error
    return runs


def _rows(folder: Path) -> tuple[list[str], list[list[str]], list[str]]:
    """Columns, rows and the distinct settings of the headline table."""
    rows, settings = [], []
    for run, splits in read_runs(folder).items():
        for split, result in splits.items():
            values = [result["miou"].get(product) for product in HEADLINE]
            rows.append([run, split, *("–" if value is None else f"{value:.1f}" for value in values)])
            s = result["setting"]
            size = f"{s['size']}²" if s["size"] else "original size"
            settings.append(
                f"{s['data']} {split}: {s['images']} images, {size}, {s['steps']} steps of {s['batch']}"
            )
    return ["run", "split", *HEADLINE.values()], rows, list(dict.fromkeys(settings))


def headline(folder: Path) -> str:
    """The mIoU table of a preset's runs as plain text, with the setting the numbers belong to."""
    columns, rows, settings = _rows(folder)
    if not rows:
        return "No trained run has been evaluated yet."
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    sides = ["<", "<"] + [">"] * len(HEADLINE)
    lines = [
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True))
        for row in [columns, *rows]
    ]
    return "\n".join(["mIoU, %  (" + "; ".join(settings) + ")", *lines])


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


def _title(notebook) -> tuple[str, bool]:
    """First heading of an executed notebook, and whether one of its cells failed."""
    failed = any(o.get("output_type") == "error" for c in notebook.cells for o in c.get("outputs", []))
    for cell in notebook.cells:
        for line in cell.source.splitlines():
            if line.startswith("# ") and cell.cell_type == "markdown":
                return line[2:], failed
    return "", failed


def write_report(folder: Path) -> Path:
    """Turn `<folder>/notebooks/*.ipynb` into `<folder>/report/*.html` with an `index.html`; returns the index."""
    import nbformat
    from nbconvert import HTMLExporter

    report = folder / "report"
    report.mkdir(parents=True, exist_ok=True)
    exporter, items = HTMLExporter(), []
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        try:
            notebook = nbformat.read(path, as_version=4)
        except ValueError:  # a run was killed while it saved this copy
            items.append(f'<li>{path.stem} <span class="failed">cut short: run it again</span></li>')
            continue
        page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": path.stem}})
        (report / f"{path.stem}.html").write_text(page, encoding="utf-8")
        title, failed = _title(notebook)
        mark = ' <span class="failed">failed</span>' if failed else ""
        items.append(f'<li><a href="{path.stem}.html">{html.escape(title or path.stem)}</a>{mark}</li>')
    columns, rows, settings = _rows(folder)
    table = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
    head = "".join(f"<th>{c}</th>" for c in columns)
    numbers = f"<h2>mIoU, %</h2><table><tr>{head}</tr>{table}</table>" if rows else ""
    note = html.escape("; ".join(settings)) + ". One confusion matrix over the split."
    numbers += f'<p class="note">{note}</p>' if rows else ""
    body = f"{numbers}<h2>Notebooks</h2><ul>{''.join(items)}</ul>{_figures(folder)}"
    index = report / "index.html"
    index.write_text(_PAGE.format(title=f"SS-EPA workbook: {folder.name}", body=body), encoding="utf-8")
    return index
