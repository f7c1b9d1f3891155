import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from ssepa_lib.workbook import figures
from ssepa_lib.workbook.figures.images import class_palette

CLASSES = ("circle", "square")


@pytest.fixture(autouse=True)
def _style():
    figures.use_style()
    yield
    plt.close("all")


@pytest.fixture
def sample():
    image = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8)
    mask = torch.zeros(24, 32, dtype=torch.uint8)
    mask[4:12, 4:12], mask[0, 0] = 2, 255
    return image, mask


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_plot_mask_names_the_classes_it_shows(sample):
    image, mask = sample
    ax = figures.plot_mask(mask, CLASSES, title="truth")
    assert legend_texts(ax) == ["square", "not labelled"] and ax.get_title() == "truth"
    colours = ax.images[0].get_array()
    assert colours[5, 5].tolist() == [0x56, 0xB4, 0xE9] and colours[0, 0].tolist() == [255] * 3
    assert (colours[20, 20] == 24).all()
    over = figures.plot_mask(mask, CLASSES, image=image).images[0].get_array()
    assert (over[20] == image[:, 20].T.numpy()).all()  # background shows the image


@pytest.mark.parametrize("convert", [lambda x: x, lambda x: x.permute(1, 2, 0).numpy(), lambda x: x.float()])
def test_images_of_any_kind(sample, convert):
    shown = figures.plot_image(convert(sample[0])).images[0].get_array()
    assert (shown == sample[0].permute(1, 2, 0).numpy()).all()


def test_plot_cam_covers_the_image(sample):
    ax = figures.plot_cam(torch.eye(4), sample[0], bar="activation")
    assert ax.images[1].get_array().shape == (24, 32) and ax.images[1].get_clim() == (0, 1)
    assert len(ax.figure.axes) == 2 and ax.figure.axes[1].get_ylabel() == "activation"


def test_functions_draw_on_the_axes_given(sample):
    ax = plt.subplots()[1]
    assert figures.plot_cam(torch.rand(3, 4), sample[0], ax) is ax and len(plt.get_fignums()) == 1


def test_cam_grid_layout(sample):
    image, mask = sample
    maps = {"CAM": [torch.rand(3, 4)] * 2, "HAAF": [torch.rand(3, 4)] * 2}
    axes = figures.plot_cam_grid([image] * 2, [mask] * 2, maps, CLASSES, ["circle", "square"])
    assert axes.shape == (2, 4)
    assert [ax.get_title() for ax in axes[0]] == ["input", "ground truth", "CAM", "HAAF"]
    assert [row[0].get_ylabel() for row in axes] == ["circle", "square"]
    assert figures.plot_cam_grid([image], None, {"CAM": maps["CAM"][:1]}, CLASSES).shape == (1, 2)


def test_mask_grid_has_one_legend_for_all(sample):
    image, mask = sample
    axes = figures.plot_mask_grid([image], {"truth": [mask], "ours": [torch.ones(24, 32)]}, CLASSES)
    assert axes.shape == (1, 3)
    assert [t.get_text() for t in axes[0, 0].figure.legends[0].get_texts()] == [
        "circle",
        "square",
        "not labelled",
    ]


def test_affinity_row_frames_its_patch(sample):
    ax = figures.plot_affinity_row(sample[0], torch.rand(12), patch=6, grid=(3, 4))
    frame = ax.patches[-1]
    assert (frame.get_x() + 0.5, frame.get_y() + 0.5) == (16, 8)  # row 1, column 2 of 8-pixel patches
    assert (frame.get_width(), frame.get_height()) == (8, 8)


def test_layer_weights_above_single_layers():
    weights = {"trained": torch.tensor([[0.5, 1.5, 1.0], [1.5, 0.5, 1.0]]), "static": np.ones(3)}
    axes = figures.plot_layer_weights(weights, pd.Series([20.0, 30.0, 25.0]), uniform=28.0)
    assert axes[0].lines[0].get_ydata().tolist() == [1, 1, 1]
    assert [bar.get_height() for bar in axes[1].patches] == [20, 30, 25]
    assert "mIoU" in axes[1].get_ylabel() and "layer" in axes[1].get_xlabel()
    assert len(figures.plot_layer_weights(weights)) == 1


def test_haaf_objectives_are_sorted_and_marked_against_the_best_layer():
    table = pd.DataFrame(
        {
            "affinity": [
                "no affinity",
                "uniform mean",
                "layer 0 alone",
                "layer 1 alone",
                "HAAF, a",
                "HAAF, b",
            ],
            "val": [10.0, 20, 18, 25, 19, 26],
            "layer 0": [None, 1, 2, 0, 1.5, 0.2],
            "layer 1": [None, 1, 0, 2, 0.5, 1.8],
        }
    )
    top, heat, right = figures.plot_haaf_objectives(table, "val")
    assert [bar.get_height() for bar in top.patches] == [18, 25]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["b", "a"]
    assert [bar.get_width() for bar in right.patches] == [26, 19]
    assert [line.get_xdata()[0] for line in right.lines] == [20, 25]


def test_references_are_marked_in_both_worlds():
    axes = plt.subplots(1, 2)[1]
    miou = pd.Series({"no affinity": 1.0, "uniform mean": 2.0, "layer 0 alone": 1.5, "layer 1 alone": 2.5})
    figures.mark_references({axes[0]: miou, axes[1]: miou + 1})
    assert [line.get_xdata()[0] for line in axes[0].lines] == [1.0, 2.0, 2.5]
    assert [text.get_text() for text in axes[1].get_legend().texts][-1] == "best single layer"
    plt.close("all")


def test_learning_curves_skip_terms_a_run_lacks(tmp_path):
    history = pd.DataFrame({"step": [1, 2, 3], "lr": [1.0, 2.0, 3.0], "seconds": 1.0, "cls": [3.0, 2.0, 1.0]})
    history.assign(seg=[None, 5.0, 4.0]).to_csv(tmp_path / "history.csv", index=False)
    axes = figures.plot_learning_curves({"a": history, "b": tmp_path / "history.csv"})
    assert [ax.get_title() for ax in axes] == [
        "learning rate of the backbone",
        "classification",
        "segmentation",
    ]
    assert [len(line.get_xdata()) for line in axes[2].lines] == [0, 2]
    smooth = figures.plot_learning_curves({"a": history}, ["cls"], smooth=2)[0]
    assert smooth.lines[0].get_ydata().tolist() == [3, 2.5, 1.5]


def test_attention_strip_shows_every_head():
    rows = [(layer, head, layer + head, 1.0, 0.1) for layer in range(3) for head in range(2)]
    table = pd.DataFrame(rows, columns=["layer", "head", "entropy", "distance", "class_mass"])
    ax = figures.plot_attention_strip({"ToCo": table, "FSR": table})
    assert sum(len(points.get_offsets()) for points in ax.collections) == 12
    means = [list(line.get_ydata()) for line in ax.lines if len(line.get_ydata()) == 3]
    assert means == [[0.5, 1.5, 2.5]] * 2
    assert "nats" in ax.get_ylabel() and legend_texts(ax) == ["ToCo", "FSR"]
    without = figures.plot_attention_strip(
        {"ToCo": table, "FSR": table.assign(class_mass=float("nan"))}, "class_mass"
    )
    assert (
        sum(np.ma.masked_invalid(points.get_offsets()[:, 1]).count() for points in without.collections) == 6
    )


def test_memory_bars_stand_beside_the_published():
    rows = [(s, b, 2.0 * b) for s in ("none", "matrix_free") for b in (1, 2)]
    ax = figures.plot_memory_bars(pd.DataFrame(rows, columns=["strategy", "batch", "gigabytes"]))
    assert sorted(bar.get_height() for bar in ax.patches if bar.get_height()) == [2, 2, 4, 4]
    diamonds = [line.get_ydata()[0] for line in ax.lines if line.get_marker() == "D"]
    assert diamonds == [6.6, 10.4]  # the fused form was not published
    assert legend_texts(ax) == ["batch 1", "batch 2", "published"]


def test_scaling_curves_are_logarithmic():
    table = pd.DataFrame(
        {"n": [1, 10] * 2, "gb": [1.0, 100.0, 1.0, 10.0], "s": ["dense"] * 2 + ["fused"] * 2}
    )
    ax = figures.plot_scaling_curves(table, "n", "gb", "s", ("patches", "memory, GB"))
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_ylabel()) == ("log", "log", "memory, GB")
    assert legend_texts(ax) == ["dense", "fused"]


def test_crop_views_say_which_are_positive(sample):
    crops = [sample[0][:, :8, :8]] * 3
    axes = figures.plot_crop_views(sample[0], (0, 24, 0, 20), torch.ones(24, 32), crops, [True, False, True])
    assert [ax.get_title() for ax in axes[2:]] == ["positive", "negative", "positive"]
    axes = figures.plot_crop_views(sample[0], (0, 24, 0, 20), torch.ones(24, 32), crops, [1, 0, 1], sample[0])
    assert [ax.get_title() for ax in axes[1:4]] == [
        "second global view",
        "regions (auxiliary CAM)",
        "positive",
    ]


def test_the_card_shows_the_label_without_places(sample):
    label, mask = torch.tensor([0.0, 1.0]), torch.zeros(24, 32, dtype=torch.uint8)
    mask[4:9, 4:9] = 2
    *_, scored, vector = figures.plot_card(sample[0], sample[0], (0, 24, 0, 32), label, ["ox", "elk"], mask)
    assert [text.get_text() for text in vector.texts] == ["0", "1"]
    assert [text.get_text() for text in scored.get_legend().get_texts()] == ["elk"]
    scored = figures.plot_card(sample[0], sample[0], (0, 24, 0, 32), label, ["ox", "elk"], None)[2]
    assert [text.get_text() for text in scored.texts] == ["no mask"]


def test_samples_have_a_row_for_what_is_known(sample):
    images, ids = [sample[0]] * 2, [torch.zeros(24, 32, dtype=torch.uint8)] * 2
    assert figures.plot_samples(images, None, None, ["ox"], ["a", "b"]).shape == (1, 2)
    axes = figures.plot_samples(images, ids, ids, ["ox"], ["a", "b"])
    assert axes.shape == (3, 2) and axes[0, 1].get_title() == "b"


def test_the_atlas_has_a_panel_per_head_and_a_dot_per_head(sample):
    table = pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "entropy": [1.0, 2.0, 1.5, 0.5]})
    ax = figures.plot_head_atlas(sample[0], torch.rand(2, 2, 12), table, 5, (3, 4), 2.6)
    assert len(ax.figure.axes) == 5 and ax.get_ylim()[1] > 2.6
    dots = sorted(y for line in ax.lines[:2] for y in line.get_ydata())
    assert dots == [0.5, 1.0, 1.5, 2.0]


def test_a_claim_joins_the_runs_of_one_seed():
    deep = pd.DataFrame(
        {"run": ["a", "b", "a"], "seed": [0, 0, 1], "entropy": [1.0, 2.0, 3.0], "entropy_spread": 0.1}
    )
    axes = figures.plot_claim(deep, {"a": "without", "b": "with"})
    lines = [line.get_ydata().tolist() for line in axes[0].lines]
    assert lines[0] == [1.0, 2.0] and lines[1][0] == 3.0 and np.isnan(lines[1][1])


def test_numbers_of_a_layer_have_a_panel_each():
    layers = pd.DataFrame({"mIoU": [10.0, 20.0], "entropy": [1.0, 2.0]})
    (ax,) = figures.plot_number_against_miou(layers, {"entropy": "entropy, nats"})
    assert [text.get_text() for text in ax.texts] == ["0", "1"]


def test_changes_of_the_head_mean_are_drawn_in_percent_beside_the_bound():
    table = pd.DataFrame({"layer": [0, 1], "similarity": [0.5, 0.9], "single_head": [0.4, 0.2]})
    table = table.assign(mean_all_noisy=[0.3, 0.1], mean_one_noisy=[0.1, 0.05])
    alike, moved = figures.plot_head_average(table, heads=4)
    assert alike.lines[0].get_ydata().tolist() == [0.5, 0.9]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in moved.lines}
    assert drawn["one head alone"] == pytest.approx([40, 20])
    assert drawn["one head alone / √H"] == pytest.approx([20, 10])


def test_forest_puts_published_above_ours():
    rows = [
        ("a − b", "x", "ours", 0, 4.0),
        ("a − b", "x", "ours", 1, 6.0),
        ("a − b", "x", "published", -1, 0.5),
    ]
    rows.append(("c − b", "y", "ours", 0, -3.0))
    table = pd.DataFrame(rows, columns=["comparison", "measure", "source", "seed", "difference"])
    axes = figures.plot_forest(table, {"x": 1.1, "y": 0.2})
    points = {
        line.get_marker(): line.get_xydata().tolist()
        for line in axes["x"].lines
        if line.get_marker() != "None"
    }
    assert points["D"] == [[0.5, 0]] and points["s"] == [[5.0, 1]] and points["."] == [[4.0, 1], [6.0, 1]]
    assert [text.get_text() for text in axes["x"].get_yticklabels()] == ["a − b", "c − b"]
    assert axes["x"].yaxis_inverted() and axes["x"].get_xscale() == "symlog"
    plt.close("all")


def test_compare_runs_shows_means_and_seeds():
    runs = pd.DataFrame(
        {
            "method": ["toco", "toco", "ssepa"],
            "seed": [0, 1, 0],
            "cam": [50, 60, 70],
            "refined_cam": [None, None, 72],
        }
    )
    ax = figures.plot_runs(runs, ["cam", "refined_cam"])
    assert sorted(bar.get_height() for bar in ax.patches if bar.get_height() > 0) == [55, 70, 72]
    assert sorted(y for points in ax.collections for _, y in points.get_offsets().data) == [50, 60, 70, 72]


def test_class_scores_are_sorted_and_skip_absent_classes():
    result = {"per_class": {"cam": {"background": 90.0, "circle": 20.0, "square": None}}}
    ax = figures.plot_class_scores({"run": result}, "cam")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["circle", "background"]


def test_method_names():
    assert figures.method_name("toco-seed0") == "ToCo, seed0"
    assert figures.method_name("own") == "own"


def test_saved_figures_stay_small(tmp_path):
    ax = figures.plot_image(np.random.default_rng(0).integers(0, 256, (400, 400, 3)).astype(np.uint8))
    path = figures.save_figure(ax.figure, tmp_path / "deep" / "noise.png", limit=60_000)
    assert path.stat().st_size <= 60_000
    with Image.open(path) as image:
        assert image.format == "PNG" and image.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
    assert [p.name for p in path.parent.iterdir()] == ["noise.png"]


def test_maps_with_their_shares_and_landmarks():
    image, map = np.zeros((3, 8, 8)), np.eye(2)
    shares = {"CAM": np.array([0.7, 0.2, 0.1]), "refined": np.array([np.nan] * 3)}
    marks = {"Head": 0, "Body": 1, "Ground": 3}
    maps = {"CAM": map, "refined": map}
    axes = figures.plot_maps_with_shares(image, maps, shares, landmarks=marks, grid=(2, 2))
    assert axes.shape == (2, 3) and [ax.get_title() for ax in axes[0]] == ["image", "CAM", "refined"]
    assert [bar.get_width() for bar in axes[1, 1].patches] == pytest.approx([70, 20, 10])
    assert "–" in [text.get_text() for text in axes[1, 2].texts]
    frames = [p for p in axes[0, 0].patches if p.get_edgecolor()[:3] == to_rgb(figures.LANDMARKS["Ground"])]
    assert len(frames) == 1 and frames[0].get_xy() == (3.5, 3.5)
    curtain = figures.plot_maps_with_shares(image, maps | {"mask": None}, shares)
    assert [t.get_text() for t in curtain[0, 3].texts] == ["?"] and curtain[1, 3] not in curtain[
        0, 0
    ].figure.axes
    assert figures.plot_maps_with_shares(image, maps).shape == (1, 3)


def test_landmark_rows_name_their_landmarks():
    row = np.linspace(0, 1, 4)
    rows = {"mean": {"Head": row, "Body": row}, "HAAF": {"Head": row, "Body": row}}
    axes = figures.plot_landmark_rows(np.zeros((3, 8, 8)), rows, {"Head": 0, "Body": 1}, (2, 2))
    assert axes.shape == (2, 2) and [ax.get_ylabel() for ax in axes[:, 0]] == ["Head", "Body"]
    assert axes[0, 1].get_title() == "HAAF" and axes[1, 1].get_title() == ""


def test_ranked_bars_are_sorted():
    ax = figures.plot_ranked({"a": 1.0, "b": 3.0}, "mIoU, %", ["a"])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "a"]
    assert [bar.get_width() for bar in ax.patches] == [3, 1]


def test_a_worse_panel_is_framed_and_the_mass_adds_up(sample):
    image, mask = sample
    maps = {"CAM": [torch.zeros(6, 8)], "refined": [torch.ones(6, 8)]}
    ious, shares = {"CAM": [40.0], "refined": [30.0]}, {name: [[0.5, 0.3, 0.2]] for name in maps}
    axes = figures.plot_judged_grid([image], [mask], maps, ious, shares, CLASSES, ["square"], "CAM")
    assert [len(ax.patches) for ax in axes[0]] == [0, 0, 0, 1]
    assert axes[0, 3].get_xlabel() == "IoU 30 %" and axes[0, 3].xaxis.label.get_color() != "black"
    (bar,) = axes[0, 3].child_axes
    assert sum(part.get_width() for part in bar.patches) == pytest.approx(1)


def test_better_and_not_better_are_counted():
    ious = pd.DataFrame({"CAM": [10.0, 20, 30], "a": [20.0, 20, 10]})
    (ax,) = figures.plot_better_or_worse(ious, "CAM")
    assert ax.get_title() == "a\nbetter in 1 of 3"
    assert [len(dots.get_offsets()) for dots in ax.collections] == [1, 2]


def test_mass_and_thresholds(sample):
    ax = figures.plot_mass(pd.DataFrame({"head": [0.2], "body": [0.3], "ground": [0.5]}, index=["CAM"]))
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([20, 30, 50])
    curves = pd.DataFrame({"CAM": [10.0, 20, 5]}, index=[0.3, 0.5, 0.7])
    ax = figures.plot_threshold_curves(curves, 0.3)
    assert ax.lines[1].get_xdata() == [0.5] and ax.lines[2].get_xdata() == [0.3, 0.3]


def test_film_case_and_gradients(sample):
    image, mask = sample
    axes = figures.plot_film(
        image, {"map": {"0": torch.rand(24, 32)}, "labels": {"0": mask}}, {"map": ["IoU 3 %"]}
    )
    assert axes.shape == (2, 1) and axes[0, 0].get_xlabel() == "IoU 3 %" and len(axes[1, 0].images) == 1
    axes = figures.plot_case(image, {"CAM": torch.rand(24, 32)}, mask > 0, histograms=True)
    heights = sum(bar.get_height() for bar in axes[1, 1].patches)
    assert axes.shape == (2, 2) and heights == pytest.approx(2)  # both sides add up to one
    norms = pd.DataFrame({"decoder": [1.0, float("nan")]}, index=["seg", "cls"])
    assert [text.get_text() for text in figures.plot_gradients(norms).texts] == ["1", "×"]
    ax = figures.plot_arrows([[1, 0], [0, 2]], "ab", ["red", "blue"], plt.subplots()[1], "two")
    assert [text.get_text() for text in ax.texts if text.get_text()] == ["a", "b"]


def test_classes_of_a_figure_have_different_colours_although_there_are_few():
    palette = class_palette([np.array([[1, 9]]), np.array([[17, 255]])])
    assert len({tuple(palette[i]) for i in (0, 1, 9, 17, 255)}) == 5
    assert (class_palette([np.array([[9, 0]])])[9] == palette[1]).all()  # alone, a class has its usual colour


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_class_colours_stand_out_from_the_background():
    palette = class_palette([np.arange(1, 9)]) / 255
    for colour in palette[1:9]:
        assert (luminance(colour) + 0.05) / (luminance(palette[0]) + 0.05) > 3


def test_a_low_value_leaves_the_image_visible(sample):
    values = torch.tensor([[0.0, 1.0]])
    shown = figures.plot_cam(values, sample[0]).images[1].get_alpha()
    assert shown.min() == 0 and shown.max() == pytest.approx(0.9)
    ax = figures.plot_cam(values * 4, sample[0], limits=(0, 4), bar="activation")
    assert ax.figure.axes[1].get_ylim() == (0, 4)


def test_a_saved_figure_carries_its_title(tmp_path):
    ax = figures.plot_image(np.zeros((8, 8, 3), np.uint8), title="input")
    with Image.open(figures.save_figure(ax.figure, tmp_path / "a.png")) as image:
        assert image.info["Title"] == "input"
    noise = figures.plot_image(np.random.default_rng(0).integers(0, 256, (400, 400, 3)), title="noise")
    with Image.open(figures.save_figure(noise.figure, tmp_path / "b.png", limit=60_000)) as image:
        assert image.info["Title"] == "noise"
