"""Images, masks and maps: alone, side by side, and the views of one training step."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from ssepa_lib.data.images import IGNORE
from ssepa_lib.workbook.figures.style import CLASS_COLOURS, MARKED, own_axes

Array = np.ndarray | torch.Tensor
CAM_COLOURS = "inferno"
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "fontsize": "x-small", "handlelength": 1}


def to_pixels(image: Array | Image.Image) -> np.ndarray:
    """Any image (uint8 or float 0..255; [3, H, W], [H, W, 3] or PIL) as uint8 [H, W, 3]."""
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.shape[0] == 3 and array.shape[-1] != 3:
        array = array.transpose(1, 2, 0)
    return array.clip(0, 255).astype(np.uint8)


def to_numpy(x: Array) -> np.ndarray:
    """A tensor or an array as an array."""
    return x.detach().float().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map [h, w] at image size, bilinear."""
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))


def _bare(ax: Axes, title: str = "") -> Axes:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    sns.despine(ax=ax, left=True, bottom=True)
    ax.set_title(title)
    return ax


def plot_image(image: Array | Image.Image, ax: Axes | None = None, title: str = "") -> Axes:
    """An image without ticks: uint8 or float in 0..255; [3, H, W], [H, W, 3] or PIL."""
    ax = own_axes(ax, (3, 3))
    ax.imshow(to_pixels(image))
    return _bare(ax, title)


def class_palette(masks: Sequence[Array]) -> np.ndarray:
    """Colours of the classes that some masks show together, uint8 [256, 3]: background near black, ignored
    pixels white, every class a colour of its own as long as there are no more classes than colours.

    The same class has the same colour in every figure, unless another one of the figure has taken it.
    """
    safe = (255 * np.array([to_rgb(colour) for colour in CLASS_COLOURS])).round().astype(np.uint8)
    present = sorted({int(i) for mask in masks for i in np.unique(to_numpy(mask))} - {0, IGNORE})
    palette, taken = np.full((256, 3), 24, dtype=np.uint8), set()
    for id in present:
        wanted = [(id - 1 + shift) % len(safe) for shift in range(len(safe))]
        slot = next((slot for slot in wanted if slot not in taken), wanted[0])
        taken.add(slot)
        palette[id] = safe[slot]
    palette[IGNORE] = 255
    return palette


def mask_colours(mask: Array, among: Sequence[Array] | None = None) -> np.ndarray:
    """Class ids [H, W] in the colours of `class_palette`, uint8 [H, W, 3]; `among`: the figure's masks."""
    return class_palette([mask] if among is None else among)[to_numpy(mask).astype(np.uint8)]


def class_legend(masks: Sequence[Array], classes: Sequence[str]) -> list[Patch]:
    """Legend entries of the classes that some masks show, in the colours of `class_palette`."""
    present = sorted({int(i) for mask in masks for i in np.unique(to_numpy(mask))} - {0})
    names = {IGNORE: "not labelled"} | {i + 1: name for i, name in enumerate(classes)}
    colours = class_palette(masks) / 255
    return [Patch(facecolor=colours[i], edgecolor="0.5", label=names[i]) for i in present]


def plot_mask(
    mask: Array,
    classes: Sequence[str],
    ax: Axes | None = None,
    title: str = "",
    image: Array | Image.Image | None = None,
    legend: bool = True,
    among: Sequence[Array] | None = None,
) -> Axes:
    """A mask [H, W], over its image where given; the legend names the classes it shows.

    Args:
        among: all masks of a figure, so that they share their colours; None: this one alone.
    """
    ax = own_axes(ax, (3, 3))
    colours = mask_colours(mask, among)
    if image is not None:
        mixed = (0.4 * to_pixels(image) + 0.6 * colours).astype(np.uint8)
        colours = np.where((to_numpy(mask) > 0)[..., None], mixed, to_pixels(image))
    ax.imshow(colours)
    entries = class_legend([mask], classes) if legend else []
    if entries:
        ax.legend(handles=entries, ncols=2, columnspacing=1, **BELOW)
    return _bare(ax, title)


def opacity(shares: np.ndarray) -> np.ndarray:
    """How much of the image a map covers where it has so much of its range, 0..1; as in the explorers."""
    return 0.9 * np.sqrt(shares)


def colour_scale(low: float, high: float) -> ScalarMappable:
    """The colours of a map as they appear over a middle grey, for a colour bar."""
    shares = np.linspace(0, 1, 256)
    covered = opacity(shares)[:, None]
    colours = covered * colormaps[CAM_COLOURS](shares)[:, :3] + (1 - covered) * 0.5
    return ScalarMappable(plt.Normalize(low, high), ListedColormap(colours))


def plot_cam(
    cam: Array,
    image: Array | Image.Image,
    ax: Axes | None = None,
    title: str = "",
    limits: tuple[float, float] = (0, 1),
    bar: str = "",
) -> Axes:
    """A map [h, w] over its image in grey; bright is high, and where it is low the image stays visible.

    Args:
        limits: values of the darkest and the brightest colour.
        bar: label of a colour bar; without one there is none.
    """
    ax = own_axes(ax, (3, 3))
    pixels = to_pixels(image)
    ax.imshow(pixels.mean(-1), cmap="gray", vmin=0, vmax=255)
    low, high = limits
    values = _resized(to_numpy(cam), pixels.shape[:2])
    shares = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    ax.imshow(values, cmap=CAM_COLOURS, alpha=opacity(shares), vmin=low, vmax=high)
    if bar:
        ax.figure.colorbar(colour_scale(low, high), ax=ax, label=bar, shrink=0.8)
    return _bare(ax, title)


def _grid(rows: int, columns: int, width: float = 1.9) -> np.ndarray:
    return plt.subplots(rows, columns, figsize=(width * columns, width * 0.85 * rows + 0.6), squeeze=False)[1]


def _shared_legend(axes: np.ndarray, entries: list[Patch]) -> None:
    if entries:
        columns = min(len(entries), 6)
        axes[0, 0].figure.legend(handles=entries, loc="outside lower center", ncols=columns, handlelength=1)


def plot_cam_grid(
    images: Sequence[Array],
    masks: Sequence[Array] | None,
    maps: Mapping[str, Sequence[Array]],
    classes: Sequence[str],
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Maps side by side (SS-EPA, Figure 5): one row per image; columns input, ground truth, then each kind
    of map.

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
        plot_image(images[i], row[0])
        if masks is not None:
            plot_mask(masks[i], classes, row[1], legend=False, among=masks)
        for ax, values in zip(row[len(titles) - len(maps) :], maps.values(), strict=True):
            plot_cam(values[i], images[i], ax)
        if names is not None:
            row[0].set_ylabel(names[i])
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    axes[0, 0].figure.colorbar(
        colour_scale(0, 1), ax=axes, label="activation (0 to 1)", aspect=30, pad=0.02, panchor=False
    )
    _shared_legend(axes, class_legend(masks or [], classes))
    return axes


def plot_mask_grid(
    images: Sequence[Array],
    masks: Mapping[str, Sequence[Array]],
    classes: Sequence[str],
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Pseudo-labels or segmentations side by side (SS-EPA, Figures 6 and 7): rows images, columns input and
    masks.

    Args:
        masks: column title → one mask [H, W] per image.
        names: a word at the left of each row, such as the image's id.

    Returns:
        axes [rows, columns].
    """
    axes, everything = (
        _grid(len(images), 1 + len(masks)),
        [mask for column in masks.values() for mask in column],
    )
    for i, row in enumerate(axes):
        plot_image(images[i], row[0])
        for ax, values in zip(row[1:], masks.values(), strict=True):
            plot_mask(values[i], classes, ax, legend=False, among=everything)
        if names is not None:
            row[0].set_ylabel(names[i])
    for ax, title in zip(axes[0], ["input", *masks], strict=True):
        ax.set_title(title)
    _shared_legend(axes, class_legend(everything, classes))
    return axes


def plot_affinity_row(
    image: Array | Image.Image,
    row: Array,
    patch: int,
    grid: tuple[int, int],
    ax: Axes | None = None,
    title: str = "",
    colour: str = MARKED[-1][0],
) -> Axes:
    """From where one patch receives: a row [N] of the affinity over the image, the patch framed in a colour.

    The colour scale ends at the 99th percentile, so that the patch's own value does not hide the rest.
    """
    ax, (h, w) = own_axes(ax, (3, 3)), grid
    values = to_numpy(row).reshape(h, w)
    highest = max(np.quantile(values, 0.99), values.min() + 1e-12)
    plot_cam(values, image, ax, title, limits=(values.min(), highest))
    mark_patch(ax, patch, grid, to_pixels(image).shape[:2], colour)
    return ax


def mark_patch(ax: Axes, patch: int, grid: tuple[int, int], size: tuple[int, int], colour: str) -> None:
    """Frame one patch of a grid (h, w) on an image of `size` (height, width) that is drawn on `ax`."""
    high, wide = size[0] / grid[0], size[1] / grid[1]
    y, x = divmod(patch, grid[1])
    corner = (x * wide - 0.5, y * high - 0.5)
    for edge, line in (("black", 3.5), (colour, 1.75)):
        ax.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor=edge, linewidth=line))


def plot_crop_views(
    image: Array,
    box: Sequence[int],
    regions: Array,
    crops: Sequence[Array],
    positive: Sequence[bool],
    second: Array | None = None,
) -> np.ndarray:
    """One training crop with its valid box, the regions of the auxiliary CAM, and its local crops.

    Args:
        image: [3, S, S]; box: (y0, y1, x0, x1), half open; regions: [S, S] of 0, 1, 2 (`toco.region_map`).
        crops: local views [3, s, s]; positive: whether each counts as showing an object.
        second: second global view [3, S, S]; None: not shown.

    Returns:
        axes, flat: crop, second view, regions, then one per local view.
    """
    columns, large = max(2, -(-len(crops) // 2)), 2 + (second is not None)
    figure = plt.figure(figsize=(2.6 * large + 1.35 * columns, 3.2))
    grid = figure.add_gridspec(2, 2 * large + columns)
    axes = [figure.add_subplot(grid[:, 2 * i : 2 * i + 2]) for i in range(large)]
    plot_box(image, box, axes[0], "training crop")
    if second is not None:
        plot_image(second, axes[1], "second global view")
    _plot_regions(image, regions, axes[-1])
    for i, (crop, good) in enumerate(zip(crops, positive, strict=True)):
        ax = plot_image(crop, figure.add_subplot(grid[i // columns, 2 * large + i % columns]))
        colour = "C0" if good else "C3"
        ax.set_title("positive" if good else "negative", fontsize="small", color=colour)
        for spine in ax.spines.values():
            spine.set(visible=True, color=colour, linewidth=2.5)
        axes.append(ax)
    return np.array(axes)


def plot_box(image: Array, box: Sequence[int], ax: Axes | None = None, title: str = "") -> Axes:
    """The training crop [3, S, S] and the frame (y0, y1, x0, x1) of the part that is not padding."""
    ax = plot_image(image, ax, title)
    y0, y1, x0, x1 = (int(v) for v in box)
    inset = 0.012 * (y1 - y0)
    corner, size = (x0 + inset, y0 + inset), (x1 - x0 - 2 * inset, y1 - y0 - 2 * inset)
    for colour, line in MARKED:
        ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=2 * line))
    ax.set_xlabel("frame: image; outside: padding", fontsize="small")
    return ax


def _plot_regions(image: Array, regions: Array, ax: Axes) -> None:
    """Background, uncertain and object regions over the crop."""
    colours = sns.color_palette("cividis", 3)
    pixels = (255 * np.array(colours)[to_numpy(regions).astype(int)]).astype(np.uint8)
    mixed = (0.35 * to_pixels(image) + 0.65 * pixels).astype(np.uint8)
    plot_image(mixed, ax, "regions (auxiliary CAM)")
    names = ("background", "uncertain", "object")
    entries = [Patch(color=c, label=name) for c, name in zip(colours, names, strict=True)]
    ax.legend(handles=entries, ncols=3, columnspacing=0.8, **BELOW)
