"""Every figure of the notebooks. Functions take and return axes, never show; the style is set once by `use_style`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from ssepa_lib.data.datasets import IGNORE, voc_palette
from ssepa_lib.workbook.tables import METHODS, STRATEGIES, table_4

Array = np.ndarray | torch.Tensor
CAM_COLOURS = "inferno"
PRODUCT_NAMES = {
    "cam": "CAM",
    "aux_cam": "auxiliary CAM",
    "refined_cam": "refined CAM",
    "pseudo_label": "pseudo-label",
    "cam_ms": "CAM, MS",
    "aux_cam_ms": "auxiliary CAM, MS",
    "refined_cam_ms": "refined CAM, MS",
    "pseudo_label_ms": "pseudo-label, MS",
    "pseudo_label_ms_crf": "pseudo-label, MS + CRF",
    "segmentation": "segmentation, raw",
    "segmentation_ms": "segmentation, MS",
    "segmentation_ms_crf": "segmentation, MS + CRF",
}
TERM_NAMES = {
    "lr": "learning rate of the backbone",
    "loss": "total loss",
    "cls": "classification",
    "aux_cls": "auxiliary classification",
    "ptc": "patch token contrast",
    "ctc": "class token contrast",
    "seg": "segmentation",
    "reg": "dense energy",
    "haaf": "HAAF supervision",
    "unc": "uncertain patches (FSR)",
    "cer": "class token (FSR)",
}


def use_style() -> None:
    """One look for all figures: seaborn's colour-blind safe palette, light grid, tight layout."""
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


def save_figure(figure: Figure, path: Path | str, limit: int = 400_000) -> Path:
    """Save as PNG of at most `limit` bytes: colours are reduced to 256, then the resolution until it fits."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    for dpi in (120, 96, 72, 54, 40):
        figure.savefig(part, format="png", dpi=dpi)
        if part.stat().st_size > limit:
            with Image.open(part) as image:
                colours = image.convert("RGB")
            palette = colours.quantize(255)
            palette.putpalette(palette.getpalette()[:765] + [255, 255, 255])  # paper stays white
            colours.quantize(palette=palette).save(part, format="PNG", optimize=True)
        if part.stat().st_size <= limit:
            break
    part.replace(path)
    return path


def method_name(run: str) -> str:
    """What a figure calls a method or a run folder: `ssepa-seed0` → `SS-EPA (with Patch Affinity, HAAF), seed0`."""
    method, _, rest = run.partition("-")
    return ", ".join(filter(None, [METHODS.get(method, method), rest.replace("-", ", ")]))


def _axes(ax: Axes | None, size: tuple[float, float] = (6.4, 3.8)) -> Axes:
    return plt.subplots(figsize=size)[1] if ax is None else ax


def _pixels(image: Array | Image.Image) -> np.ndarray:
    """Any image (uint8 or float 0..255; [3, H, W], [H, W, 3] or PIL) as uint8 [H, W, 3]."""
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.shape[0] == 3 and array.shape[-1] != 3:
        array = array.transpose(1, 2, 0)
    return array.clip(0, 255).astype(np.uint8)


def _numpy(x: Array) -> np.ndarray:
    return x.detach().float().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def _fit(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map [h, w] at image size, bilinear."""
    return np.asarray(
        Image.fromarray(values.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
    )


def _bare(ax: Axes, title: str = "") -> Axes:
    ax.set_xticks([]), ax.set_yticks([])
    ax.grid(False)
    sns.despine(ax=ax, left=True, bottom=True)
    ax.set_title(title)
    return ax


def show_image(image: Array | Image.Image, ax: Axes | None = None, title: str = "") -> Axes:
    """A picture without axes."""
    ax = _axes(ax, (3, 3))
    ax.imshow(_pixels(image))
    return _bare(ax, title)


def mask_colours(mask: Array) -> np.ndarray:
    """Class ids [H, W] as VOC colours uint8 [H, W, 3]; 255 (ignore) is white."""
    palette = np.array(voc_palette(), dtype=np.uint8)
    palette[IGNORE] = 255
    return palette[_numpy(mask).astype(np.uint8)]


def class_legend(masks: Sequence[Array], classes: Sequence[str]) -> list[Patch]:
    """Legend entries of the classes that some masks show."""
    present = sorted({int(i) for mask in masks for i in np.unique(_numpy(mask))} - {0})
    names = {IGNORE: "not labelled"} | {i + 1: name for i, name in enumerate(classes)}
    colours = np.array(voc_palette()) / 255
    colours[IGNORE] = 1
    return [Patch(facecolor=colours[i], edgecolor="0.5", label=names[i]) for i in present]


def show_mask(
    mask: Array,
    classes: Sequence[str],
    ax: Axes | None = None,
    title: str = "",
    image: Array | Image.Image | None = None,
    legend: bool = True,
) -> Axes:
    """A mask [H, W] in VOC colours, over its image where given; the legend names the classes it shows."""
    ax = _axes(ax, (3, 3))
    colours = mask_colours(mask)
    if image is not None:
        mixed = (0.4 * _pixels(image) + 0.6 * colours).astype(np.uint8)
        colours = np.where((_numpy(mask) > 0)[..., None], mixed, _pixels(image))
    ax.imshow(colours)
    entries = class_legend([mask], classes) if legend else []
    if entries:
        ax.legend(
            handles=entries,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            ncols=2,
            fontsize="x-small",
            handlelength=1,
            columnspacing=1,
        )
    return _bare(ax, title)


def show_cam(
    cam: Array,
    image: Array | Image.Image,
    ax: Axes | None = None,
    title: str = "",
    opacity: float = 0.65,
    limits: tuple[float, float] = (0, 1),
    bar: str = "",
) -> Axes:
    """A map [h, w] over its image in grey; bright is high. `bar` labels a colour bar."""
    ax = _axes(ax, (3, 3))
    pixels = _pixels(image)
    ax.imshow(pixels.mean(-1), cmap="gray", vmin=0, vmax=255)
    drawn = ax.imshow(
        _fit(_numpy(cam), pixels.shape[:2]), cmap=CAM_COLOURS, alpha=opacity, vmin=limits[0], vmax=limits[1]
    )
    if bar:
        solid = ScalarMappable(drawn.norm, drawn.cmap)
        ax.figure.colorbar(solid, ax=ax, label=bar, shrink=0.8)
    return _bare(ax, title)


def _grid(rows: int, columns: int, width: float = 1.9) -> np.ndarray:
    return plt.subplots(rows, columns, figsize=(width * columns, width * 0.85 * rows + 0.6), squeeze=False)[1]


def _shared_legend(axes: np.ndarray, entries: list[Patch]) -> None:
    if entries:
        axes[0, 0].figure.legend(
            handles=entries, loc="outside lower center", ncols=min(len(entries), 6), handlelength=1
        )


def cam_grid(
    images: Sequence[Array],
    masks: Sequence[Array] | None,
    maps: Mapping[str, Sequence[Array]],
    classes: Sequence[str],
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Maps side by side (SS-EPA, Figure 5): one row per image; columns input, ground truth, then each kind of map.

    Args:
        masks: ground truth; None: no such column.
        maps: column title → one map [h, w] in 0..1 per image.
        names: what is mapped in each row, usually the class.

    Returns:
        axes [rows, columns].
    """
    titles = ["input"] + ["ground truth"] * (masks is not None) + list(maps)
    axes = _grid(len(images), len(titles))
    for i, row in enumerate(axes):
        show_image(images[i], row[0])
        if masks is not None:
            show_mask(masks[i], classes, row[1], legend=False)
        for ax, values in zip(row[len(titles) - len(maps) :], maps.values(), strict=True):
            show_cam(values[i], images[i], ax)
        if names is not None:
            row[0].set_ylabel(names[i])
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    bar = ScalarMappable(plt.Normalize(0, 1), CAM_COLOURS)
    axes[0, 0].figure.colorbar(bar, ax=axes, label="activation (0 to 1)", aspect=30, pad=0.02, panchor=False)
    _shared_legend(axes, class_legend(masks or [], classes))
    return axes


def mask_grid(
    images: Sequence[Array],
    masks: Mapping[str, Sequence[Array]],
    classes: Sequence[str],
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Pseudo-labels or segmentations side by side (SS-EPA, Figures 6 and 7): rows images, columns input and masks.

    Args:
        masks: column title → one mask [H, W] per image.
        names: a word at the left of each row, such as the image's id.

    Returns:
        axes [rows, columns].
    """
    axes = _grid(len(images), 1 + len(masks))
    for i, row in enumerate(axes):
        show_image(images[i], row[0])
        for ax, values in zip(row[1:], masks.values(), strict=True):
            show_mask(values[i], classes, ax, legend=False)
        if names is not None:
            row[0].set_ylabel(names[i])
    for ax, title in zip(axes[0], ["input", *masks], strict=True):
        ax.set_title(title)
    _shared_legend(axes, class_legend([mask for column in masks.values() for mask in column], classes))
    return axes


def affinity_row(
    image: Array | Image.Image,
    row: Array,
    patch: int,
    grid: tuple[int, int],
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """From where one patch receives: a row [N] of the affinity over the image, the patch framed.

    The colour scale ends at the 99th percentile, so that the patch's own value does not hide the rest.
    """
    ax, (h, w) = _axes(ax, (3, 3)), grid
    pixels, values = _pixels(image), _numpy(row).reshape(h, w)
    show_cam(
        values, image, ax, title, limits=(values.min(), max(np.quantile(values, 0.99), values.min() + 1e-12))
    )
    high, wide = pixels.shape[0] / h, pixels.shape[1] / w
    y, x = divmod(patch, w)
    for colour, line in (("black", 3.5), ("#00e5ff", 1.8)):  # dark below light: seen on any picture
        ax.add_patch(
            Rectangle(
                (x * wide - 0.5, y * high - 0.5), wide, high, fill=False, edgecolor=colour, linewidth=line
            )
        )
    return ax


def layer_weights(
    weights: Mapping[str, Array],
    miou: pd.Series | None = None,
    uniform: float | None = None,
    axes: Sequence[Axes] | None = None,
) -> Sequence[Axes]:
    """HAAF's weight v' of every layer, and how good each layer is alone.

    Args:
        weights: run → weights [K] or, per image, [n, K] (the band is their standard deviation).
        miou: mIoU in percent of the CAM refined by one layer at a time, index layer from 0.
        uniform: mIoU of the uniform mean of all layers.

    Returns:
        The axes used, one above the other.
    """
    count = 1 if miou is None else 2
    if axes is None:
        axes = plt.subplots(count, 1, figsize=(6.4, 2.4 * count + 0.4), sharex=True, squeeze=False)[1][:, 0]
    for (name, values), style in zip(
        weights.items(), ["-o", "-s", "-^", "-D", "-v"] * len(weights), strict=False
    ):
        values = np.atleast_2d(_numpy(values))
        layers, mean, sd = np.arange(values.shape[1]), values.mean(0), values.std(0)
        (line,) = axes[0].plot(layers, mean, style, label=name, markersize=5)
        axes[0].fill_between(layers, mean - sd, mean + sd, color=line.get_color(), alpha=0.2, linewidth=0)
    axes[0].axhline(1, color="0.4", linestyle=":", label="uniform (all layers alike)")
    axes[0].set(ylabel="layer weight v'", xticks=layers, ylim=(0, None))
    title = (
        "band: ± sd over images" if any(np.ndim(w) == 2 and len(w) > 1 for w in weights.values()) else None
    )
    axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1), title=title)
    if miou is not None:
        axes[1].bar(miou.index, miou, color="0.65", label="this layer alone")
        if uniform is not None:
            axes[1].axhline(uniform, color="0.4", linestyle=":", label="uniform mean of all layers")
        axes[1].set(ylabel="mIoU of refined CAM, %")
        axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes[-1].set_xlabel("layer (0 = first)")
    return axes


def supervisions(table: pd.DataFrame, split: str) -> Sequence[Axes]:
    """What each way to train HAAF weighs and what it is worth, beside every layer alone.

    Args:
        table: result of `study.compare_supervisions`.
        split: the column of mIoU to show.

    Returns:
        Axes of the single layers (above), the weights, and the scores (right).
    """
    layers = [column for column in table if column.startswith("layer ")]
    miou = table.set_index("affinity")[split]
    alone = miou[[f"{name} alone" for name in layers]].to_numpy()
    learned = table[table["affinity"].str.startswith("HAAF")].sort_values(split, ascending=False)
    height = 0.32 * len(learned)
    figure, ((top, corner), (heat, right)) = plt.subplots(
        2,
        2,
        figsize=(9, height + 2.6),
        width_ratios=(3, 1.2),
        height_ratios=(1.5, height),
        sharex="col",
        sharey="row",
    )
    corner.remove()
    at = np.arange(len(layers)) + 0.5
    top.bar(at, alone, color="0.65")
    top.axhline(miou["uniform mean"], color="C0", linestyle="--")
    top.set(ylabel="mIoU, %", title=f"refined CAM, {split}: one layer alone")
    names = [name.removeprefix("HAAF, ") for name in learned["affinity"]]
    sns.heatmap(
        learned[layers].to_numpy(),
        ax=heat,
        cmap="Blues",
        annot=True,
        fmt=".1f",
        cbar=False,
        linewidths=0.5,
        yticklabels=names,
        annot_kws={"size": "x-small"},
    )
    heat.set_xticks(at, range(len(layers)))
    heat.tick_params(axis="y", rotation=0)
    heat.set(xlabel="layer (0 = first)", ylabel="HAAF trained by")
    heat.set_title("weights v' (mean 1)", fontsize="small")
    bars = right.barh(np.arange(len(learned)) + 0.5, learned[split], color="0.65", height=0.7)
    right.bar_label(bars, fmt="%.1f", padding=3, fontsize="x-small")
    right.axvline(miou["uniform mean"], color="C0", linestyle="--", label="uniform mean")
    right.axvline(alone.max(), color="C1", label="best single layer")
    low = min(miou.min(), learned[split].min())
    right.set(xlabel=f"mIoU on {split}, %", xlim=(max(0, low - 2), None))
    right.margins(x=0.15)
    right.tick_params(labelleft=False)
    right.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize="small")
    return [top, heat, right]


def learning_curves(
    histories: Mapping[str, pd.DataFrame | Path | str],
    terms: Sequence[str] | None = None,
    columns: int = 4,
    smooth: int = 1,
) -> np.ndarray:
    """One panel per loss term, one line per run.

    Args:
        histories: run → `history.csv` or its content (columns step, lr, seconds and the terms).
        terms: columns to show; None: the learning rate and every term some run has.
        smooth: running mean over so many rows.

    Returns:
        Axes of the panels, flat.
    """
    tables = {run: h if isinstance(h, pd.DataFrame) else pd.read_csv(h) for run, h in histories.items()}
    if terms is None:
        terms = [
            c for c in dict.fromkeys(c for t in tables.values() for c in t) if c not in ("step", "seconds")
        ]
    columns = min(columns, len(terms))
    rows = -(-len(terms) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.7 * columns, 2 * rows + 0.5), sharex=True, squeeze=False
    )
    for ax, term in zip(axes.flat, terms, strict=False):
        for run, table in tables.items():
            shown = (
                table[["step", term]].dropna()
                if term in table
                else table[["step"]].iloc[:0].assign(**{term: []})
            )
            ax.plot(
                shown["step"], shown[term].rolling(smooth, min_periods=1).mean(), label=run, linewidth=1.4
            )
        ax.set_title(TERM_NAMES.get(term, term), fontsize="small")
        ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    for ax in axes.flat[len(terms) :]:
        ax.remove()
    for column in range(columns):
        axes[max(r for r in range(rows) if r * columns + column < len(terms)), column].set_xlabel("step")
    if len(tables) > 1:
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(tables), 4)
        )
    return axes.ravel()[: len(terms)]


def threshold_curve(
    results: Mapping[str, dict], products: Sequence[str] = ("cam", "refined_cam"), ax: Axes | None = None
) -> Axes:
    """mIoU of thresholded maps against the background threshold.

    Args:
        results: run → result of `evaluate`; the dot marks the best threshold.
    """
    ax = _axes(ax)
    for i, (run, result) in enumerate(results.items()):
        curve = result["threshold_curve"]
        for product, style in zip(products, ("--", "-", ":"), strict=False):
            if product in curve:
                label = f"{run}: {PRODUCT_NAMES[product]}"
                ax.plot(curve["thresholds"], curve[product], style, color=f"C{i}", label=label)
                best = int(np.argmax(curve[product]))
                ax.plot(curve["thresholds"][best], curve[product][best], "o", color=f"C{i}")
    ax.set(xlabel="background threshold", ylabel="mIoU, %")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


STATISTICS = {
    "entropy": "attention entropy, nats",
    "distance": "attention distance, pixels",
    "class_mass": "attention of patches to the class token",
}


def attention_strip(
    statistics: Mapping[str, pd.DataFrame], value: str = "entropy", ax: Axes | None = None
) -> Axes:
    """One dot per head against depth, one colour per run; lines join the means over heads (FSR, entropy analysis).

    Args:
        statistics: run → table of `analysis.attention_statistics`.
        value: `entropy`, `distance` or `class_mass`.
    """
    ax = _axes(ax, (8, 3.8))
    table = pd.concat([t.assign(run=run) for run, t in statistics.items()], ignore_index=True)
    dodge = len(statistics) > 1
    colours = sns.color_palette(n_colors=len(statistics))
    sns.stripplot(
        table,
        x="layer",
        y=value,
        hue="run",
        dodge=dodge,
        jitter=0.08,
        size=4,
        alpha=0.7,
        palette=colours,
        ax=ax,
    )
    for i, (_, t) in enumerate(statistics.items()):
        mean = t.groupby("layer")[value].mean()
        shift = 0.8 * ((i + 0.5) / len(statistics) - 0.5) if dodge else 0
        ax.plot(mean.index + shift, mean, color=colours[i], linewidth=1.2, alpha=0.8)
    ax.set(xlabel="layer (0 = first)", ylabel=STATISTICS[value])
    sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), title="dot: one head\nline: mean of heads")
    return ax


def memory_bars(measured: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Memory of a training step by strategy and batch (SS-EPA, Table 4); diamonds are the published numbers.

    Args:
        measured: columns `strategy`, `batch`, `gigabytes`, as for `tables.table_4`.
    """
    ax = _axes(ax, (7.5, 3.8))
    order = [s for s in STRATEGIES if s in set(measured["strategy"])]
    colours = sns.color_palette("Blues", measured["batch"].nunique() + 1)[1:]
    common = {"order": order, "palette": colours, "edgecolor": "0.3", "ax": ax}
    sns.barplot(measured, x="strategy", y="gigabytes", hue="batch", **common)
    published = table_4().set_index("method")
    batches = sorted(measured["batch"].unique())
    for x, strategy in enumerate(order):
        for b, batch in enumerate(batches):
            if STRATEGIES[strategy] in published.index and f"batch {batch}" in published:
                at = x + 0.8 * ((b + 0.5) / len(batches) - 0.5)
                ax.plot(
                    at,
                    float(published.loc[STRATEGIES[strategy], f"batch {batch}"]),
                    "D",
                    color="C1",
                    markeredgecolor="black",
                    markersize=6,
                )
    for bars in ax.containers:
        ax.bar_label(bars, fmt="%.1f", padding=2, fontsize="x-small")
    names = {
        "none": "no affinity",
        "all_heads": "all heads",
        "haaf_dense": "HAAF\n(head mean)",
        "haaf_fused": "HAAF\n(fused)",
    }
    ax.set_xticks(range(len(order)), [names[s] for s in order])
    ax.set(xlabel="", ylabel="peak memory of a step, GB")
    handles, labels = ax.get_legend_handles_labels()
    handles.append(plt.Line2D([], [], marker="D", color="C1", markeredgecolor="black", linestyle=""))
    ax.legend(
        handles,
        [f"batch {label}" for label in labels] + ["published"],
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )
    return ax


def scaling_curves(
    table: pd.DataFrame, x: str, y: str, hue: str, labels: tuple[str, str], ax: Axes | None = None
) -> Axes:
    """Cost against size on logarithmic axes, one line per `hue`.

    Args:
        table: long table with the columns named by x, y and hue.
        labels: axis labels with units.
    """
    ax = _axes(ax)
    sns.lineplot(table, x=x, y=y, hue=hue, style=hue, markers=True, dashes=False, errorbar="sd", ax=ax)
    ax.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    ticks = sorted(table[x].unique())
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), title="")
    return ax


def crop_views(
    image: Array, box: Sequence[int], regions: Array, crops: Sequence[Array], positive: Sequence[bool]
) -> np.ndarray:
    """A training crop with its valid box, the region map of the auxiliary CAM, and the local crops cut from it.

    Args:
        image: [3, S, S]; box: (y0, y1, x0, x1), half open; regions: [S, S] of 0, 1, 2 (`contrast.region_map`).
        crops: local views [3, s, s]; positive: whether each counts as showing an object.

    Returns:
        axes, flat: crop, regions, then one per local view.
    """
    columns = max(2, -(-len(crops) // 2))
    figure = plt.figure(figsize=(2.6 * 2 + 1.35 * columns, 3.2))
    grid = figure.add_gridspec(2, 4 + columns)
    axes = [figure.add_subplot(grid[:, :2]), figure.add_subplot(grid[:, 2:4])]
    show_image(image, axes[0], "training crop")
    y0, y1, x0, x1 = (int(v) for v in box)
    inset = 0.012 * (y1 - y0)
    corner, size = (x0 + inset, y0 + inset), (x1 - x0 - 2 * inset, y1 - y0 - 2 * inset)
    for colour, line in (("black", 4), ("#00e5ff", 2)):
        axes[0].add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=line))
    axes[0].set_xlabel("frame: picture; outside: padding", fontsize="small")
    colours = sns.color_palette("cividis", 3)
    pixels = (255 * np.array(colours)[_numpy(regions).astype(int)]).astype(np.uint8)
    show_image((0.35 * _pixels(image) + 0.65 * pixels).astype(np.uint8), axes[1], "regions (auxiliary CAM)")
    entries = [
        Patch(color=c, label=n) for c, n in zip(colours, ("background", "uncertain", "object"), strict=True)
    ]
    axes[1].legend(
        handles=entries,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=3,
        fontsize="x-small",
        handlelength=1,
        columnspacing=0.8,
    )
    for i, (crop, good) in enumerate(zip(crops, positive, strict=True)):
        ax = show_image(crop, figure.add_subplot(grid[i // columns, 4 + i % columns]))
        ax.set_title("positive" if good else "negative", fontsize="small", color="C0" if good else "C3")
        for spine in ax.spines.values():
            spine.set(visible=True, color="C0" if good else "C3", linewidth=2.5)
        axes.append(ax)
    return np.array(axes)


def compare_runs(runs: pd.DataFrame, metrics: Sequence[str], ax: Axes | None = None) -> Axes:
    """mIoU by method: bars are means over seeds, dots single runs.

    Args:
        runs: rows of `tables.collect_runs`, of one split.
        metrics: products to show, one group of bars each.
    """
    ax = _axes(ax, (8.5, 3.8))
    long = runs.melt(
        id_vars=["method", "seed"], value_vars=list(metrics), var_name="product", value_name="miou"
    )
    long = long.assign(
        miou=long["miou"].astype(float), method=[METHODS.get(m, m) for m in long["method"]]
    ).dropna()
    order = [p for p in metrics if p in set(long["product"])]
    common = {"x": "product", "y": "miou", "hue": "method", "order": order, "ax": ax}
    sns.barplot(long, errorbar=None, alpha=0.75, **common)
    sns.stripplot(
        long, dodge=True, size=3.5, color="black", jitter=0.05, legend=False, palette="dark:black", **common
    )
    ax.set_xticks(range(len(order)), [PRODUCT_NAMES[p].replace(", ", ",\n") for p in order])
    ax.set(xlabel="", ylabel="mIoU, %")
    sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), title="bar: mean, dot: one seed")
    return ax


def class_scores(results: Mapping[str, dict], product: str, ax: Axes | None = None) -> Axes:
    """IoU of every class, one dot per run, classes sorted by the first run.

    Args:
        results: run → result of `evaluate`.
    """
    table = pd.DataFrame({run: result["per_class"][product] for run, result in results.items()}, dtype=float)
    table = table.dropna(how="all").sort_values(table.columns[0])
    ax = _axes(ax, (6.4, 0.22 * len(table) + 1))
    for run, marker in zip(table.columns, "os^Dv" * len(table.columns), strict=False):
        ax.plot(table[run], range(len(table)), marker, label=run, markersize=5, alpha=0.85)
    ax.set_yticks(range(len(table)), table.index)
    ax.set(xlabel=f"IoU of {PRODUCT_NAMES[product]}, %", xlim=(0, 100), ylim=(-0.7, len(table) - 0.3))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax
