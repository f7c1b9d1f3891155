"""What a dataset offers: to the reader, to training, to the score."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from ssepa_lib.workbook.figures.images import (
    BELOW,
    Array,
    plot_box,
    plot_image,
    plot_mask,
    to_numpy,
    to_pixels,
)
from ssepa_lib.workbook.figures.style import LANDMARKS, own_axes

NOTHING = "no mask"


def plot_card(
    image: Array, crop: Array, box: Sequence[int], label: Array, classes: Sequence[str], mask: Array | None
) -> list[Axes]:
    """Three columns: what a reader sees, what training sees, what the score sees.

    Args:
        image: [3, H, W], 0..255.
        crop: training crop [3, S, S]; box: (y0, y1, x0, x1), the part that is not padding.
        label: multi-hot [C].
        mask: [H, W]; None: the dataset has none.

    Returns:
        Axes of the image, the crop, the mask and the label.
    """
    figure = plt.figure(figsize=(9.5, 4))
    grid = figure.add_gridspec(2, 3, height_ratios=(6, 1))
    seen, trained, scored = (figure.add_subplot(grid[0, i]) for i in range(3))
    plot_image(image, seen, "what you see")
    plot_box(crop, box, trained, "what training sees")
    if mask is None:
        plot_image(np.full((1, 1, 3), 255), scored, "what the score sees")
        scored.text(0, 0, NOTHING, ha="center", va="center")
    else:
        plot_mask(mask, classes, scored, "what the score sees")
    vector = figure.add_subplot(grid[1, 1])
    vector.imshow(to_numpy(label)[None], cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    vector.set_xticks(range(len(classes)), classes, rotation=90, fontsize="x-small")
    vector.set_yticks([])
    vector.grid(False)
    for i, value in enumerate(to_numpy(label)):
        vector.text(i, 0, f"{value:.0f}", ha="center", va="center", fontsize="small")
    vector.set_xlabel("the label: no places")
    return [seen, trained, scored, vector]


def plot_parts(image: Array, parts: Array, ax: Axes | None = None, title: str = "") -> Axes:
    """Head and body over their image, in the colours of the landmarks.

    Args:
        parts: [H, W], 0 ground, 1 head, 2 body.
    """
    ax, ids = own_axes(ax, (3, 3)), to_numpy(parts).astype(int)
    colours = np.array([(0, 0, 0), *(to_rgb(LANDMARKS[n]) for n in ("Head", "Body"))])
    pixels = to_pixels(image)
    mixed = np.where(ids[..., None] > 0, 0.3 * pixels + 0.7 * 255 * colours[ids], 0.6 * pixels)
    plot_image(mixed, ax, title)
    entries = [Patch(color=LANDMARKS[name], label=name.lower()) for name in ("Head", "Body")]
    ax.legend(handles=entries, ncols=2, columnspacing=1, **BELOW)
    return ax


def plot_samples(
    images: Sequence[Array],
    masks: Sequence[Array] | None,
    parts: Sequence[Array] | None,
    classes: Sequence[str],
    names: Sequence[str],
) -> np.ndarray:
    """Some images above their masks and, where the dataset knows them, their parts.

    Args:
        names: words above each image, usually its classes.

    Returns:
        axes [rows, images].
    """
    rows = 1 + (masks is not None) + (parts is not None)
    size = (2.2 * max(2, len(images)), 2.4 * rows)
    axes = plt.subplots(rows, len(images), figsize=size, squeeze=False)[1]
    for i, column in enumerate(axes.T):
        plot_image(images[i], column[0], names[i])
        if masks is not None:
            plot_mask(masks[i], classes, column[1])
        if parts is not None:
            plot_parts(images[i], parts[i], column[-1])
    return axes
