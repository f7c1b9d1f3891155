"""What notebook 08 calls: the example folder, the check table, the run, uploads, the tables."""

import io

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY
from PIL import Image

from ssepa_lib.data import split_of
from ssepa_lib.data.adopt import adopt
from ssepa_lib.data.survey import survey
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.linear_probe import frozen_tokens, linear_maps, map_correlation, with_class
from ssepa_lib.labels import build_refiner
from ssepa_lib.model import build_network
from ssepa_lib.workbook import figures, own_images, plan, upload
from ssepa_lib.workbook.example_images import example_folder
from ssepa_lib.workbook.notebooks import discover
from ssepa_lib.workbook.runner import run_workbook


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return example_folder(tmp_path_factory.mktemp("own"), 6)


def row(table, what):
    return table[table["what"] == what].iloc[0]


def test_the_example_is_complete_but_for_what_is_put_in_on_purpose(example):
    found = survey(example)
    assert found.classes == ("porthole", "signpost") and len(found.photos) == len(found.masks) == 6
    assert [p.turned for p in found.photos[:3]] == [False, True, False] and found.photos[2].converted
    assert found.missing == ["photo 07.jpg"] and not found.bad_masks
    stamp = (example / "labels.csv").stat().st_mtime_ns
    assert example_folder(example.parent, 6) == example
    assert (example / "labels.csv").stat().st_mtime_ns == stamp, "a complete example is used again"


def test_masks_of_the_example_show_its_labels(example, tmp_path):
    copy = adopt(survey(example), tmp_path)
    recipe = own_images.own_recipe("shapes", "toco", copy, steps=2)
    dataset = split_of(recipe, "train")
    for i in range(len(dataset)):
        shown = set(dataset.mask(i).unique().tolist()) - {0}
        assert shown == {k + 1 for k in range(2) if dataset.label(i)[k]}


def test_the_check_says_go_fix_or_stop_and_what_to_do(example, tmp_path):
    found = survey(example)
    table = own_images.check_table(found, side=96)
    assert own_images.verdict(table) == "fix"
    assert row(table, "rows without a file")["found"] == "1: photo 07.jpg"
    assert row(table, "images per class")["verdict"] == "fix" and row(table, "turned by EXIF")["found"] == "1"
    assert row(table, "usable images")["found"] == "6 of 7 rows (labels.csv)"
    assert (table["advice"].ne("") | (table["verdict"] == "go")).all(), "what is to be fixed has an advice"


def test_a_folder_without_a_positive_class_is_stopped(tmp_path):
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / "a.png")
    (tmp_path / "labels.csv").write_text("image,classes\na.png,background\n")
    table = own_images.check_table(survey(tmp_path))
    assert own_images.verdict(table) == "stop" and row(table, "images per class")["verdict"] == "stop"
    (tmp_path / "labels.csv").write_text("image,classes\nb.png,cat\n")
    table = own_images.check_table(survey(tmp_path))
    assert (
        row(table, "usable images")["verdict"] == "stop"
        and row(table, "files without a row")["verdict"] == "fix"
    )


def test_the_check_warns_of_classes_that_labels_cannot_part(tmp_path):
    rows = ["cat;sofa", "cat;sofa", "sofa"]
    (tmp_path / "images").mkdir()
    for i, _ in enumerate(rows):
        noise = np.random.default_rng(i).integers(0, 256, (40, 200, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "labels.csv").write_text(
        "image,classes\n" + "".join(f"{i}.png,{classes}\n" for i, classes in enumerate(rows))
    )
    table = own_images.check_table(survey(tmp_path), side=224)
    assert row(table, "classes that never separate")["found"] == "1: cat never without sofa"
    assert row(table, "classes in every image")["found"] == "1: sofa"
    assert row(table, "smaller than half of 224 pixels")["found"].startswith("3: 0.png")
    assert row(table, "longer than three times their width")["verdict"] == "fix"
    assert row(table, "masks")["verdict"] == "go", "nothing here needs masks"


def test_a_shown_table_is_escaped_and_coloured(tmp_path):
    import pandas as pd

    shown = own_images.show(pd.DataFrame({"what": ["<script>x</script>"], "verdict": ["stop"]})).data
    assert "<script>" not in shown and "&lt;script&gt;" in shown and own_images.VERDICTS["stop"] in shown


def test_two_images_per_class_without_masks_are_enough(example, tmp_path):
    rows = (example / "labels.csv").read_text().splitlines()
    bare = tmp_path / "zwei Klassen"
    (bare / "images").mkdir(parents=True)
    wanted = {"porthole": 2, "signpost": 2}
    kept = [rows[0]]
    for line in rows[1:7]:
        name, classes = line.split(",")
        if wanted.get(classes, 0):
            wanted[classes] -= 1
            (bare / "images" / name).write_bytes((example / "images" / name).read_bytes())
            kept.append(line)
    (bare / "labels.csv").write_text("\n".join(kept) + "\n")
    copy = adopt(survey(bare), tmp_path / "out")
    small = {
        key: value
        for key, value in TINY.items()
        if not key.startswith(("data.train_i", "data.val", "train."))
    }
    options = {"steps": 2, "device": "cpu", "changes": small}
    recipe = own_images.own_recipe("shapes", "ssepa_plus", copy, **options)
    network, recipe, run = own_images.train_on(recipe, tmp_path / "runs")
    assert set(network.classes) <= {"porthole", "signpost"} and recipe.data.root == str(copy)
    dataset = split_of(recipe, "train")
    assert dataset.mask(0) is None
    scores = own_images.class_scores(network, recipe, dataset)
    assert scores.shape == (len(dataset), len(network.classes)) and ((scores > 0) & (scores < 1)).all()
    again = []
    assert own_images.train_on(recipe, tmp_path / "runs", again.append)[2] == run
    assert "loss" not in again[0], "the finished run is used again"
    maps = own_images.all_class_maps(
        network, recipe, torch.rand(2, 3, 32, 32), build_refiner(recipe.affinity, network)
    )
    assert maps.shape == (2, len(network.classes), 32, 32) and 0 <= maps.min() <= maps.max() <= 1


def test_a_long_run_has_the_checkpoints_of_its_preset(tmp_path):
    for preset, every in (("shapes", 50), ("voc_mini", 100), ("voc", 500)):
        recipe = own_images.own_recipe(preset, "toco", tmp_path, steps=20_000)
        assert (recipe.train.steps, recipe.train.save_every) == (20_000, every)


@pytest.fixture
def notebook(example, tmp_path, monkeypatch):
    """Notebook 08 with an empty folder of results, and its parameters on the example."""
    monkeypatch.setenv("SSEPA_RESULTS", str(tmp_path / "results"))
    (found,) = (each for each in discover() if each.name == "08_your_images")
    return found, found.parameters | {"folder": str(example)}


def test_the_planned_run_is_that_of_the_notebook(notebook, monkeypatch):
    """Its own cells make the recipe and name the folder of the run."""
    found, parameters = notebook
    (job,) = own_images.own_jobs(parameters)
    cells = [cell.source for cell in nbformat.read(found.path, 4).cells if cell.cell_type == "code"]
    names, trained = {}, []

    def stop(recipe, folder, on_step):
        trained.append((recipe, folder))
        raise InterruptedError

    monkeypatch.setattr(own_images, "train", stop)
    for start in ("import matplotlib", "figures.use_style()", "copy = adopt(", "network, recipe, run ="):
        (source,) = (cell for cell in cells if cell.startswith(start))
        names |= parameters if not names else {}
        try:
            exec(source, names)
        except InterruptedError:
            break
    assert trained == [(job.recipe, job.folder)]


def test_a_finished_run_on_a_folder_is_not_planned_again(notebook):
    small = {key: value for key, value in TINY.items() if key.split(".")[0] != "train"}
    parameters = notebook[1] | {"steps": 2, "device": "cpu", "overrides": small}
    (job,) = own_images.own_jobs(parameters)
    assert plan.plan([job])[0].source == "estimated"
    own_images.train_on(job.recipe, job.folder.parent)
    assert plan.plan(own_images.own_jobs(parameters))[0].source == "finished"


def test_what_cannot_be_learnt_from_is_left_to_the_notebook(notebook, tmp_path):
    assert own_images.own_jobs(notebook[1] | {"folder": str(tmp_path)}) == []
    with pytest.raises(UserError, match="there is no method 'tocoo'"):
        own_images.own_jobs(notebook[1] | {"method": "tocoo"})


def test_a_long_run_on_a_folder_has_to_be_confirmed(notebook, example, monkeypatch, capsys):
    started = []
    monkeypatch.setattr("ssepa_lib.workbook.runner._run_all", lambda *_: started.append("ran") or {})
    monkeypatch.setattr(plan, "seconds_per_step", lambda recipe, cost: 1.0)
    long = {"folder": str(example), "steps": 20_000}
    with pytest.raises(UserError, match="training would take about 5.6 h; add --yes"):
        run_workbook(only=["08"], parameters=long)
    assert not started and "20000 steps of 4, seed 0" in capsys.readouterr().out
    assert run_workbook(only=["08"], parameters=long, yes=True) == 0
    assert run_workbook(only=["08"], parameters={"folder": str(example)}) == 0 and len(started) == 2


def test_the_decision_table_orders_what_can_be_set_by_time():
    table = own_images.decision_table(80, "ssepa")
    assert table.drop_duplicates("preset")["preset"].tolist() == ["shapes", "voc_mini", "folder", "voc"]
    assert row(table.rename(columns={"setting": "what"}), "a first try")["epochs"] == "3"  # 60 · 4 / 80
    assert table["crop"].is_monotonic_increasing and table["steps"].is_monotonic_increasing


def test_the_figures_of_the_notebook():
    plots, images, maps = figures, torch.rand(2, 3, 8, 8), torch.rand(2, 2, 8, 8)
    ax = plots.plot_ladder(3)
    blue = [bar for bar in ax.patches if bar.get_facecolor()[2] > bar.get_facecolor()[0]]
    assert len(blue) == 3 and len(ax.patches) == 5
    labels, scores = torch.tensor([[1, 0], [1, 1]]), torch.tensor([[0.9, 0.1], [0.8, 0.7]])
    axes = plots.plot_class_maps(images, maps, scores, labels, ["cat", "dog"])
    assert axes.shape == (3, 2) and axes[2, 0].get_xlabel() == "dog 0.10"
    assert [axes[k, 0].xaxis.label.get_weight() for k in (1, 2)] == ["bold", "normal"]
    numbers = pd.DataFrame({"flip": [0.25, 0.5], "scale": [0.75, 1.0]})
    axes = plots.plot_views(images, [[m, m, m] for m in maps[:, 0]], numbers, ["cat", "dog"])
    assert axes.shape == (4, 2) and axes[2, 0].get_xlabel() == "agreement 0.25"
    ax = plots.plot_interval(torch.linspace(40, 60, 100), (41, 59), 50, 52)
    assert len(ax.get_legend().get_texts()) == 3
    curves = pd.DataFrame({"kappa": [0.2, 0.9], "mIoU": [30.0, 50.0]}, index=[0.3, 0.5])
    ax = plots.plot_blind_threshold(curves, 0.5, 0.5)
    assert len(ax.get_legend().get_texts()) == 2
    assert len(plots.plot_blind_threshold(curves[["kappa"]], 0.5).get_legend().get_texts()) == 1
    plt.close("all")


def test_jupyter_shows_bad_input_as_one_sentence():
    assert UserError("there is no folder; give one.")._render_traceback_() == [
        "UserError: there is no folder; give one."
    ]


def content(kind="PNG", size=(48, 40), mode="RGB", **settings):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(file, kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "file", "stem"),
    [
        ("../../etc/my cat.png", content(), "my_cat"),
        ("C:\\photos\\Käfer (1).JPG", content("JPEG", mode="CMYK"), "Käfer_1"),
        (".gif", content("GIF", mode="P", save_all=True, append_images=[Image.new("P", (48, 40))]), "gif"),
        ("wide.png", content(size=(12_000, 40)), "wide"),
        ("palette.png", content(mode="P", transparency=0), "palette"),
        ("x" * 300 + ".png", content(), "x" * 60),
    ],
    ids=["path", "CMYK", "animated", "12 000 pixels wide", "palette with transparency", "long name"],
)
def test_an_upload_becomes_a_small_rgb_image_with_a_safe_name(name, file, stem):
    found, image = upload.read_upload(name, file)
    assert found == stem and image.mode == "RGB" and max(image.size) <= 1024


def test_an_upload_of_16_bits_is_stretched():
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 900, 1600).reshape(40, 40).astype(np.uint16)).save(file, "PNG")
    assert np.asarray(upload.read_upload("deep.png", file.getvalue())[1]).max() == 255


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"not an image", "this is no image that can be read"),
        (b"", "this is no image"),
        (content()[:100], "this is no image"),
        (content(size=(1, 1)), "1×1 pixels are too few"),
        (b"\0" * (upload.BYTES + 1), "20 MB are too large"),
    ],
)
def test_an_upload_that_is_no_usable_image_is_refused_in_one_sentence(file, message):
    with pytest.raises(UserError, match=message) as error:
        upload.read_upload("a.png", file)
    assert "\n" not in str(error.value)


def test_the_button_keeps_the_last_good_image(tmp_path):
    button = upload.Upload(tmp_path / "uploads")
    assert button.image is None
    button._take({"new": ({"name": "a b.png", "content": memoryview(content())},)})
    assert button.image.size == (48, 40) and "Run the next cells" in button.said.value
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == ["a_b.png"]
    button._take({"new": ({"name": "<b>.png", "content": memoryview(b"junk")},)})
    assert button.name == "a_b" and button.image is not None and "no image" in button.said.value
    assert len(list((tmp_path / "uploads").iterdir())) == 1


def test_classes_that_always_come_together_get_the_same_map():
    torch.manual_seed(0)
    sign = torch.randn(2, 16)
    labels = torch.tensor([[1.0, 1], [0, 0]]).repeat(8, 1)
    tokens = 0.1 * torch.randn(16, 9, 16)
    tokens[labels[:, 0] > 0, 4] += sign[0]
    maps = linear_maps(torch.nn.functional.normalize(tokens, dim=-1), labels)
    assert maps.shape == (16, 2, 9) and map_correlation(maps, 0, 1) > 0.9
    assert map_correlation(0 * maps, 0, 1) == 0


@pytest.mark.parametrize("answer", [None, "yes", [1, 0], [[1, 0, 1]], [0.5, 0, 1], {"a": 1}])
def test_an_exercise_answered_with_the_wrong_type_gets_a_sentence(answer):
    with pytest.raises(UserError, match="must be 3 numbers, each 0 or 1"):
        with_class(torch.zeros(3, 1), answer)
    with pytest.raises(UserError, match="was not measured; choose one of 0.1, 0.5"):
        own_images.at_threshold(pd.Series({0.1: 30.0, 0.5: 40.0}), answer)


def test_an_exercise_answered_as_asked():
    assert with_class(torch.zeros(3, 1), [1, 0, True]).tolist() == [[0, 1], [0, 0], [0, 1]]
    assert own_images.at_threshold(pd.Series({0.1: 30.0, 0.5: 40.0}), 0.5) == 40


def test_an_image_becomes_a_square_batch():
    square = own_images.as_square(Image.new("RGB", (40, 20), (255, 0, 7)), 8)
    assert square.shape == (1, 3, 8, 8) and square[0, :, 0, 0].tolist() == [255, 0, 7]


def test_images_are_chosen_from_the_worst_to_the_best():
    judged = pd.DataFrame(
        {"index": [3, 3, 5, 8, 9], "class": [0, 1, 0, 1, 0], "flip": [0.9, 0.1, 0.2, 0.7, 0.5]}
    )
    assert own_images.from_worst_to_best(judged, 2) == [3, 5]  # 0.9 and 0.2, in the order of the folder
    assert own_images.from_worst_to_best(judged, 9) == [3, 5, 8, 9]


def test_frozen_tokens_have_length_one(tiny):
    recipe = tiny("toco")
    dataset = split_of(recipe, "val", 3)
    tokens = frozen_tokens(build_network(recipe, dataset.classes), recipe, dataset)
    assert tokens.shape == (3, 16, 32) and torch.allclose(tokens.norm(dim=-1), torch.ones(3, 16), atol=1e-4)


def test_the_checklist_has_a_number_for_every_symptom():
    values = {name: 0.5 for _, _, name, _ in own_images.SYMPTOMS}
    assert own_images.checklist(**values)["here"].tolist() == ["0.5"] * len(values)
