"""Folders as people have them: problems are noted, what is usable is copied, nothing of theirs changes."""

import numpy as np
import pytest
from PIL import Image

from ssepa_lib.data.adopt import adopt
from ssepa_lib.data.folder import FolderDataset
from ssepa_lib.data.images import as_rgb
from ssepa_lib.data.survey import survey
from ssepa_lib.errors import UserError


def write_image(path, seed=0, width=48, height=40, mode="RGB", **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **settings)


@pytest.fixture
def root(tmp_path):
    """Four images of two classes, with the table in `labels.csv`."""
    folder = tmp_path / "meine Bilder"
    for seed, name in enumerate(("a.jpg", "b b.png", "käfer.jpg", "d.png")):
        write_image(folder / "images" / name, seed)
    (folder / "labels.csv").write_text(
        "image,classes\na.jpg,moth\nb b.png,bee\nkäfer.jpg,moth;bee\nd.png,bee\n"
    )
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def classes(found):
    return {photo.name: photo.classes for photo in found.photos}


def test_a_good_folder_is_copied_as_it_is_and_left_alone(root, tmp_path):
    before = contents(root)
    found = survey(root)
    assert (found.rows, len(found.photos), found.classes) == (4, 4, ("bee", "moth"))
    assert not (found.missing or found.unlisted or found.twice or found.broken or found.copies)
    copy = adopt(found, tmp_path / "out")
    dataset = FolderDataset(copy, "train")
    assert dataset.ids == ["a", "b b", "käfer", "d"] and dataset.label(2).tolist() == [1, 1]
    assert (copy / "images" / "a.jpg").read_bytes() == before[root / "images" / "a.jpg"]
    assert contents(root) == before and adopt(survey(root), tmp_path / "out") == copy
    write_image(root / "images" / "d.png", seed=9)
    assert adopt(survey(root), tmp_path / "out") != copy, "other images, another copy"


@pytest.mark.parametrize(
    "table",
    [
        "image;classes\na.jpg;moth\nb b.png;bee\nkäfer.jpg;moth,bee\nd.png;bee\n",
        "image\tclasses\na.jpg\tmoth\nb b.png\tbee\nkäfer.jpg\tmoth|bee\nd.png\tbee\n",
        "Image, Classes\na.jpg, moth\n b b.png ,bee\nkäfer.jpg,moth,bee\n\nimages\\d.png,bee\n",
        "classes,image\nmoth,a.jpg\nbee,b b.png\nbee;moth,ka\u0308fer.jpg\nbee,D.PNG\n",
    ],
    ids=["semicolons", "tabs", "spaces and extra commas", "other order, accents and letters"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_are_read_as_programs_write_them(root, table, encoding):
    (root / "labels.csv").write_text(table, encoding=encoding)
    found = survey(root)
    assert not found.missing and not found.unlisted
    assert list(classes(found).values()) == [("moth",), ("bee",), ("bee", "moth"), ("bee",)]


def test_a_table_of_an_old_windows_program_is_read(root):
    (root / "labels.csv").write_bytes("image;classes\nkäfer.jpg;Wespe über Käfer\n".encode("cp1252"))
    assert classes(survey(root)) == {"käfer.jpg": ("Wespe über Käfer",)}


def test_what_does_not_match_is_listed_and_the_rest_is_used(root, tmp_path):
    write_image(root / "images" / "extra.jpg", 7)
    (root / "labels.csv").write_text(
        "image,classes\na.jpg,moth\na.jpg,bee\ngone.jpg,wasp\nb b.png,\nd.png,background\n../x.jpg,bee\n"
    )
    found = survey(root)
    assert found.missing == ["gone.jpg", "../x.jpg"] and found.twice == ["a.jpg"]
    assert found.unnamed == ["b b.png"] and found.unlisted == ["extra.jpg", "käfer.jpg"]
    assert classes(found) == {"a.jpg": ("bee", "moth"), "d.png": ()}
    dataset = FolderDataset(adopt(found, tmp_path / "out"), "val")
    assert dataset.classes == ("bee", "moth", "wasp"), "ids of masks do not depend on missing images"
    assert dataset.label(0).tolist() == [1, 1, 0] and dataset.label(1).sum() == 0


def test_files_that_are_no_usable_images_are_named_with_the_reason(root):
    images = root / "images"
    (images / "a.jpg").write_text("not an image")
    (images / "b b.png").write_bytes((images / "b b.png").read_bytes()[:200])
    write_image(images / "d.png", width=1, height=1)
    write_image(images / "käfer.jpg", width=12_000, height=40)
    found = survey(root)
    assert found.broken["a.jpg"] == "no image" and "b b.png" in found.broken
    assert found.broken["d.png"] == "1×1 pixels; each side needs 32"
    (wide,) = found.photos
    assert wide.size == (12_000, 40)


def test_too_many_pixels_are_refused_by_the_header(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    assert survey(root).broken["a.jpg"].endswith("million pixels")


def test_unusual_images_are_converted_upright_and_bounded(root, tmp_path):
    images, tag = root / "images", Image.Exif()
    tag[0x0112] = 6  # turned by 90°
    write_image(images / "a.jpg", width=1500, height=700, exif=tag)
    write_image(images / "käfer.jpg", mode="CMYK")
    deep = np.linspace(1000, 5000, 48 * 40).reshape(40, 48).astype(np.uint16)
    Image.fromarray(deep).save(images / "d.png")
    frames = [Image.new("P", (48, 40), i) for i in range(3)]
    frames[0].save(images / "b b.gif", save_all=True, append_images=frames[1:])
    (images / "b b.png").unlink()
    (root / "labels.csv").write_text("image,classes\na.jpg,x\nkäfer.jpg,x\nd.png,x\nb b.gif,x\n")
    found = survey(root)
    assert [p.turned for p in found.photos] == [True, False, False, False]
    assert [p.converted for p in found.photos] == [False, True, True, True]
    dataset = FolderDataset(adopt(found, tmp_path / "out"), "train")
    assert [dataset.image(i).mode for i in range(4)] == ["RGB"] * 4
    assert found.photos[0].size == (700, 1500) and dataset.image(0).size == (478, 1024)
    low, high = np.asarray(dataset.image(2)).min(), np.asarray(dataset.image(2)).max()
    assert low < 5 and high > 250, "the image's own range"


def test_transparent_pixels_lie_on_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    shown = np.asarray(as_rgb(Image.fromarray(pixels)))
    assert shown[0, 0].tolist() == [10, 20, 30] and shown[1, 1].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 2))
    palette.info["transparency"] = 0
    assert np.asarray(as_rgb(palette)).min() == 255


def test_masks_follow_their_images_and_those_that_do_not_fit_are_left_out(root, tmp_path):
    write_image(root / "images" / "a.jpg", width=2048, height=1024)
    ids = np.zeros((1024, 2048), np.uint8)
    ids[:, 1024:] = 2
    for name, mask in (
        ("a", ids),
        ("d", np.zeros((5, 5), np.uint8)),
        ("käfer", np.full((40, 48), 9, np.uint8)),
    ):
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    found = survey(root)
    assert list(found.masks) == ["a.jpg"] and set(found.bad_masks) == {"d.png", "käfer.png"}
    dataset = FolderDataset(adopt(found, tmp_path / "out"), "train")
    mask = dataset.mask(0)
    assert mask.shape == (512, 1024) and mask[0, 511] == 0 and mask[0, 512] == 2 and dataset.mask(1) is None


def test_the_same_image_twice_is_found(root):
    (root / "images" / "d.png").unlink()
    with Image.open(root / "images" / "b b.png") as image:
        image.save(root / "images" / "d.png", compress_level=0)
    assert survey(root).copies == [("b b.png", "d.png")]


def test_folders_may_name_the_classes(tmp_path):
    for seed, name in enumerate(("cat/1.jpg", "cat/2.jpg", "dog/1.jpg")):
        write_image(tmp_path / "pets" / name, seed)
    found = survey(tmp_path / "pets")
    assert classes(found) == {"cat/1.jpg": ("cat",), "cat/2.jpg": ("cat",), "dog/1.jpg": ("dog",)}
    copy = adopt(found, tmp_path / "out")
    assert FolderDataset(copy, "train").ids == ["cat_1", "cat_2", "dog_1"]


def test_stems_that_collide_stay_apart(root, tmp_path):
    write_image(root / "images" / "a.png", 5)
    with (root / "labels.csv").open("a", encoding="utf-8") as file:
        file.write("a.png,bee\n")
    assert FolderDataset(adopt(survey(root), tmp_path), "train").ids == ["a", "b b", "käfer", "d", "a_"]


def test_a_limit_takes_evenly_spread_rows(root):
    found = survey(root, 2)
    assert list(classes(found)) == ["a.jpg", "käfer.jpg"] and found.skipped == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, r"neither labels\.csv nor a folder"),
        ("", "the first line names nothing"),
        ("a.jpg,moth\n", r"the first line names a\.jpg, moth"),
        ("image,classes\n" + 200_000 * "x", "this is no table"),
        ("image,classes\na.jpg,5$\n", r"'5\$' cannot be a class"),
        ("image,classes\n" + "".join(f"{i}.jpg,c{i}\n" for i in range(255)), "255 classes"),
    ],
)
def test_folders_that_cannot_be_understood_are_refused(root, table, message):
    (root / "labels.csv").unlink()
    for path in (root / "images").iterdir():
        path.unlink()
    if table is not None:
        (root / "labels.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        survey(root)


def test_a_folder_without_a_class_a_lost_folder_and_rival_tables_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        survey(tmp_path / "nowhere")
    (root / "labels.csv").write_text("image,classes\na.jpg,background\n")
    with pytest.raises(UserError, match="no usable image shows a class"):
        adopt(survey(root), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (root / "classes.txt").write_text("moth\nmoth\n")
    with pytest.raises(UserError, match="a class is listed twice"):
        survey(root)
    (root / "labels.csv").rename(root / "one.csv")
    (root / "two.csv").write_text("image,classes\n")
    with pytest.raises(UserError, match=r"several tables \(one\.csv, two\.csv\)"):
        survey(root)
