"""Every figure and table of SS-EPA and FSR: which cell of which notebook makes it, and by which command.

A cell carries the name of its exhibits among its tags (`ssepa-figure-5`), which JupyterLab shows and the
report uses as an address. `tests/test_exhibits.py` holds the list and the notebooks together.
"""

import html
import shlex
from pathlib import Path
from typing import NamedTuple

from ssepa_lib.workbook.report_page import page

PAGE = "figures_and_tables.html"
TITLE = "Figures and tables of the papers"


class Exhibit(NamedTuple):
    """A figure or a table of a paper."""

    name: str  # tag of the cell
    title: str
    shows: str
    notebook: str  # name without its suffix
    beside: str  # what stands beside ours
    settings: str = ""  # parameters that it needs, as on the command line

    def command(self, preset: str) -> str:
        """The command that makes it for a preset."""
        number = self.notebook.partition("_")[0]
        settings = f" {self.settings}" if self.settings else ""
        return f"python -m ssepa_lib workbook --preset {shlex.quote(preset)} --only {number}{settings}"


_IMAGES = "the images of the preset; the paper's are not ours to show"
_STATEMENT = "the paper's statement, beside photographs and built-in images"
EXHIBITS = (
    Exhibit("ssepa-figure-1", "SS-EPA, Figure 1", "the framework", "03_training", "sizes of the run"),
    Exhibit(
        "ssepa-figure-2", "SS-EPA, Figure 2", "from heads to patch affinity", "02_method", "sizes of the run"
    ),
    Exhibit("ssepa-figure-3", "SS-EPA, Figure 3", "HAAF", "02_method", "weights of the run"),
    Exhibit(
        "ssepa-figure-4",
        "SS-EPA, Figure 4",
        "fusion of the enhanced affinity",
        "02_method",
        "weights of the run",
    ),
    Exhibit("ssepa-figure-5", "SS-EPA, Figure 5", "maps of ToCo, affinity and HAAF", "06_ablations", _IMAGES),
    Exhibit(
        "ssepa-figure-6", "SS-EPA, Figure 6", "pseudo-labels with and without CRF", "06_ablations", _IMAGES
    ),
    Exhibit("ssepa-figure-7", "SS-EPA, Figure 7", "segmentations on val and test", "06_ablations", _IMAGES),
    Exhibit("ssepa-table-1", "SS-EPA, Table 1", "pseudo-labels", "06_ablations", "published rows"),
    Exhibit("ssepa-table-2", "SS-EPA, Table 2", "segmentation", "06_ablations", "published rows"),
    Exhibit("ssepa-table-3", "SS-EPA, Table 3", "affinity and HAAF", "06_ablations", "published rows"),
    Exhibit(
        "ssepa-table-4",
        "SS-EPA, Table 4",
        "memory of a step",
        "07_memory_profiling",
        "published rows and formula",
    ),
    Exhibit("ssepa-table-5", "SS-EPA, Table 5", "backbones", "06_ablations", "published rows"),
    Exhibit(
        "fsr-overview", "FSR, overview", "teacher, student and masks", "03_training", "settings of the run"
    ),
    Exhibit("fsr-table-field", "FSR, comparison", "single-stage systems", "06_ablations", "published rows"),
    Exhibit(
        "fsr-table-terms",
        "FSR, terms",
        "unc.FSR and cer.FSR",
        "06_ablations",
        _STATEMENT,
        "-p fsr_tables=terms",
    ),
    Exhibit(
        "fsr-table-ratio",
        "FSR, mask ratio",
        "share of masked blocks",
        "06_ablations",
        _STATEMENT,
        "-p 'fsr_tables=[\"mask ratio\"]'",
    ),
    Exhibit(
        "fsr-table-selection",
        "FSR, selection",
        "which blocks are masked",
        "06_ablations",
        _STATEMENT,
        "-p fsr_tables=selection",
    ),
    Exhibit(
        "fsr-table-aggregation",
        "FSR, aggregation",
        "MCA, GAP and GMP",
        "06_ablations",
        _STATEMENT,
        "-p fsr_tables=aggregation",
    ),
    Exhibit(
        "fsr-table-augmentation",
        "FSR, augmentation",
        "blur, solarise and AutoAugment",
        "06_ablations",
        _STATEMENT,
        "-p fsr_tables=augmentation",
    ),
    Exhibit(
        "fsr-figure-entropy",
        "FSR, entropy of attention",
        "every head, with and without unc.FSR",
        "05_attention_entropy",
        "the paper's claim, and photographs",
        '-p \'methods=["fsr","fsr:cer-only"]\'',
    ),
    Exhibit(
        "fsr-figure-class-token",
        "FSR, class-to-patch attention",
        "where the class token looks",
        "05_attention_entropy",
        _IMAGES,
    ),
)


def exhibits_page(report: Path, preset: str) -> str:
    """The page that lists every figure and table with its cell and its command.

    Args:
        report: folder of the report's pages; an exhibit links to its cell where that page is there.
        preset: for the commands.
    """
    rows = []
    for exhibit in EXHIBITS:
        there = (report / f"{exhibit.notebook}.html").is_file()
        cell = html.escape(f"{exhibit.notebook}, cell {exhibit.name}")
        link = (
            f'<a href="{exhibit.notebook}.html#{exhibit.name}">{cell}</a>' if there else f"{cell} (not run)"
        )
        command = f"<code>{html.escape(exhibit.command(preset))}</code>"
        texts = (html.escape(text) for text in (exhibit.title, exhibit.shows, exhibit.beside))
        rows.append("".join(f"<td>{cell}</td>" for cell in (*texts, link, command)))
    head = "".join(f"<th>{name}</th>" for name in ("what", "shows", "beside ours", "made by", "command"))
    table = f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    note = (
        "Ours are made from the runs of the preset; a command trains what is missing and says beforehand how "
        "long that takes. Published numbers stand in the tables themselves, with the setting of every row."
    )
    nav = '<nav><a href="index.html">Index of the report</a></nav>'
    return page(TITLE, f'{nav}<main><h1>{TITLE}</h1><p>{note}</p><div class="wide">{table}</div></main>')
