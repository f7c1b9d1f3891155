"""What all figures share: the style, the names of quantities, and how a figure is saved."""

from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ssepa_lib.compose import method_title
from ssepa_lib.files import write_atomically

BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # a legend to the right of its axes
CLASS_COLOURS = (
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#f0e442",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
    "#999999",
)  # told apart by colour-blind readers (Okabe and Ito, 2008), and bright enough on black
MARKED = (("black", 2.0), ("#00e5ff", 1.0))  # colours and relative widths of a frame seen on any image

LANDMARKS = {
    "Head": "#de8f05",
    "Body": "#0173b2",
    "Ground": "#029e73",
}  # patches and parts, colour-blind safe


def use_style() -> None:
    """One look for all figures: seaborn's colour-blind safe palette, a light grid, a tight layout."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.85)
    plt.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "savefig.dpi": 120,
            "axes.titlesize": "medium",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "image.interpolation": "nearest",
        }
    )
    shell = get_ipython()
    if shell is not None:  # a figure speaks for itself: no `<Axes: …>` below it
        shell.display_formatter.formatters["text/plain"].for_type(Axes, lambda ax, printer, cycle: None)


def save_figure(figure: Figure, path: Path | str, limit: int = 400_000) -> Path:
    """Save as a PNG of at most `limit` bytes: first the colours are reduced to 256, then the resolution."""
    path = Path(path)
    write_atomically(path, lambda part: _save_within(figure, part, limit))
    return path


def _save_within(figure: Figure, path: Path, limit: int) -> None:
    title = {"Title": figure_title(figure)}
    fixed = figure.get_layout_engine() is None
    for dpi in (120, 96, 72, 54, 40):
        figure.savefig(path, format="png", dpi=dpi, metadata=title)
        if fixed:  # saving has given it the layout of the style, which complains about axes without a grid
            figure.set_layout_engine("none")
        if path.stat().st_size > limit:
            with Image.open(path) as image:
                colours = image.convert("RGB")
            palette = colours.quantize(255)
            palette.putpalette(palette.getpalette()[:765] + [255, 255, 255])  # paper stays white
            kept = PngInfo()
            kept.add_text(*next(iter(title.items())))
            colours.quantize(palette=palette).save(path, format="PNG", optimize=True, pnginfo=kept)
        if path.stat().st_size <= limit:
            return


def figure_title(figure: Figure) -> str:
    """What a figure shows, in words: its title, otherwise those of its axes, otherwise their labels."""
    if figure.get_suptitle():
        return figure.get_suptitle()
    titles = [ax.get_title() for ax in figure.axes]
    labels = [" against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel()))) for ax in figure.axes]
    words = list(dict.fromkeys(filter(None, titles))) or list(dict.fromkeys(filter(None, labels)))
    return "; ".join(words[:8]).replace("\n", " ")


def method_name(run: str) -> str:
    """What a figure calls a method or a run folder: `ssepa-seed0` → `<title of ssepa>, seed0`."""
    method, _, rest = run.partition("-")
    return ", ".join(filter(None, [method_title(method), rest.replace("-", ", ")]))


def own_axes(ax: Axes | None, size: tuple[float, float] = (6.4, 3.8)) -> Axes:
    """The axes given, or new ones of a figure of `size` inches."""
    return plt.subplots(figsize=size)[1] if ax is None else ax
