"""Every dataset gives the same items from the same files, and names what is wrong with the files."""

import numpy as np
import pytest
import torch
from PIL import Image

from ssepa_lib.data import (
    DATASETS,
    SegmentationDataset,
    build_dataset,
    measured_split,
    resolve_root,
    split_of,
)
from ssepa_lib.data.coco import COCO_CLASSES, CocoDataset
from ssepa_lib.data.folder import FolderDataset
from ssepa_lib.data.images import classes_in, read_mask, voc_palette
from ssepa_lib.data.shapes import ShapesDataset
from ssepa_lib.data.voc import VOC_CLASSES, VocDataset
from ssepa_lib.errors import UserError
from ssepa_lib.recipe import DataConfig, Recipe


def write_image(path, width=6, height=4, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **settings)
    return pixels


def write_mask(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(ids, np.uint8))
    image.putpalette([value for colour in voc_palette() for value in colour])
    image.save(path)


def write_note(root, name, *objects):
    (root / "Annotations").mkdir(exist_ok=True)
    things = "".join(f"<object><name>{o}</name><part><name>head</name></part></object>" for o in objects)
    (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{things}</annotation>")


@pytest.fixture
def voc(tmp_path):
    """Three 6×4 images a, b (train) and c (val); masks of class 1, 20 and 2; no annotations."""
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")
    for name, number in zip("abc", (1, 20, 2), strict=True):
        write_image(tmp_path / "JPEGImages" / f"{name}.jpg")
        write_mask(tmp_path / "SegmentationClass" / f"{name}.png", [[0, number, 255, 0, 0, 0]] * 4)
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    """Own images: two with masks of 2 classes, one pure background."""
    for name in ("a.jpg", "b.png", "c.jpg"):
        write_image(tmp_path / "images" / name)
    write_mask(tmp_path / "masks" / "a.png", [[0, 1, 2, 255, 0, 0]] * 4)
    (tmp_path / "labels.csv").write_text(
        "image,classes,split\na.jpg,moth;bee,train\nb.png,bee,val\nc.jpg,background,train\n"
    )
    return tmp_path


def names(dataset, i):
    return [c for c, on in zip(dataset.classes, dataset.label(i), strict=True) if on]


def test_voc_item(voc):
    dataset = VocDataset(voc, "train")
    item = dataset[1]
    assert (dataset.name, dataset.split, dataset.ids, item.id) == ("voc", "train", ["a", "b"], "b")
    assert item.image.shape == (3, 4, 6) and item.image.dtype == torch.uint8
    assert item.mask.dtype == torch.uint8 and item.mask[0].tolist() == [0, 20, 255, 0, 0, 0]
    assert names(dataset, 0) == ["aeroplane"] and names(dataset, 1) == ["tvmonitor"]


def test_voc_annotation_beats_mask_and_parts_are_no_objects(voc):
    write_note(voc, "a", "dog", "person", "dog")
    dataset = VocDataset(voc, "train")
    assert names(dataset, 0) == ["dog", "person"]
    assert names(dataset, 1) == ["tvmonitor"]


def test_voc_mask_from_aug_only_where_voc_has_none(voc):
    (voc / "SegmentationClass" / "b.png").unlink()
    write_mask(voc / "SegmentationClassAug" / "a.png", [[3] * 6] * 4)
    write_mask(voc / "SegmentationClassAug" / "b.png", [[4] * 6] * 4)
    dataset = VocDataset(voc, "train")
    assert dataset.mask(0).max() == 255 and dataset.mask(1).unique().tolist() == [4]


def test_voc_test_split_has_neither_mask_nor_label(voc):
    write_image(voc / "JPEGImages" / "t.jpg")
    (voc / "ImageSets" / "Segmentation" / "test.txt").write_text("t\n")
    item = VocDataset(voc, "test")[0]
    assert item.mask is None and item.label.isnan().all()
    with pytest.raises(UserError, match="no labels"):
        build_dataset(DataConfig(name="voc", root=str(voc), train_split="test"), "train")


def test_label_is_read_once(voc):
    dataset = VocDataset(voc, "train")
    first = dataset.label(0)
    (voc / "SegmentationClass" / "a.png").unlink()
    assert dataset.label(0) is first


@pytest.mark.parametrize(
    ("break_it", "split", "message"),
    [
        (lambda r: (r / "JPEGImages" / "a.jpg").unlink(), "train", "1 of 2 are missing, first a"),
        (lambda r: (r / "SegmentationClass" / "c.png").unlink(), "val", "masks of split 'val'"),
        (
            lambda r: (r / "SegmentationClass" / "a.png").unlink(),
            "train",
            "labels .* 1 of 2 are missing, first a",
        ),
        (
            lambda r: (r / "ImageSets" / "Segmentation" / "train.txt").write_text(""),
            "train",
            "split is empty",
        ),
        (lambda r: None, "train_aug", "data sbd.*choose one of train, val"),
    ],
)
def test_voc_refuses_incomplete_folders(voc, break_it, split, message):
    break_it(voc)
    with pytest.raises(UserError, match=message):
        VocDataset(voc, split)


def test_voc_missing_folder_names_the_remedy(voc, tmp_path_factory):
    with pytest.raises(UserError, match="python -m ssepa_lib data voc"):
        VocDataset(tmp_path_factory.mktemp("empty"), "train")
    outer = tmp_path_factory.mktemp("outer")
    (outer / "VOC2012").symlink_to(voc)
    with pytest.raises(UserError, match="set it to .*VOC2012"):
        VocDataset(outer, "train")


def test_voc_unknown_class_and_broken_annotation(voc):
    write_note(voc, "a", "unicorn")
    with pytest.raises(UserError, match=r"a\.xml.*unknown class 'unicorn'"):
        VocDataset(voc, "train").label(0)
    (voc / "Annotations" / "a.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"a\.xml: unreadable"):
        VocDataset(voc, "train").label(0)


def test_truncated_image_is_refused(voc):
    path = voc / "JPEGImages" / "a.jpg"
    write_image(path, 64, 64)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"a\.jpg: unreadable image"):
        VocDataset(voc, "train").image(0)
    path.write_text("not an image")
    with pytest.raises(UserError, match=r"a\.jpg: unreadable image"):
        VocDataset(voc, "train")[0]


def test_masks_are_refused_by_size_id_and_mode(voc):
    path = voc / "SegmentationClass" / "a.png"
    dataset = VocDataset(voc, "train")
    write_mask(path, [[0] * 4] * 6)
    with pytest.raises(UserError, match=r"a\.png: mask is 4×6 but its image 6×4"):
        dataset.mask(0)
    write_mask(path, [[21] * 6] * 4)
    with pytest.raises(UserError, match="holds id 21; allowed are 0..20"):
        dataset.mask(0)
    write_image(path)
    with pytest.raises(UserError, match="mode RGB"):
        dataset.mask(0)


def test_palette_colours_do_not_matter(tmp_path):
    ids = np.array([[0, 3], [255, 1]], np.uint8)
    image = Image.fromarray(ids)
    image.putpalette([7] * 768)
    image.save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", 3).tolist() == ids.tolist()


def test_classes_in_mask_skip_background_and_ignore():
    assert classes_in(torch.tensor([[0, 255], [3, 1]], dtype=torch.uint8), 3).tolist() == [1, 0, 1]


def test_palette_is_that_of_voc():
    assert voc_palette()[:3] == [(0, 0, 0), (128, 0, 0), (0, 128, 0)] and voc_palette()[15] == (192, 128, 128)
    assert voc_palette()[255] == (224, 224, 192) and len(set(voc_palette())) == 256


def test_folder_item(folder):
    train, val = FolderDataset(folder, "train"), FolderDataset(folder, "val")
    assert train.classes == ("bee", "moth") and train.ids == ["a", "c"] and val.ids == ["b"]
    assert names(train, 0) == ["bee", "moth"] and names(train, 1) == [] and names(val, 0) == ["bee"]
    assert train.mask(0).shape == (4, 6) and train.mask(1) is None and (train.masked, val.masked) == (1, 0)


def test_folder_class_file_sets_the_order_and_the_column_split_is_optional(folder):
    (folder / "classes.txt").write_text("moth\nwasp\nbee\n")
    (folder / "labels.csv").write_text("image,classes\na.jpg,moth\nb.png,bee\nc.jpg,background\n")
    dataset = FolderDataset(folder, "anything")
    assert dataset.classes == ("moth", "wasp", "bee") and len(dataset) == 3
    assert dataset.label(1).tolist() == [0, 0, 1]


def test_folder_turns_images_upright(folder):
    tag = Image.Exif()
    tag[0x0112] = 6  # turned by 90°
    write_image(folder / "images" / "a.jpg", 4, 6, exif=tag)
    assert FolderDataset(folder, "train")[0].image.shape == (3, 4, 6)  # and the 6×4 mask fits


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,classes,weight\na.jpg,bee,1\n", "column 'weight' is unknown"),
        ("image;classes\na.jpg;bee\n", "column 'classes' is missing"),
        ("image,classes\na.jpg,bee,moth\n", "line 2: 2 values expected"),
        ("image,classes\n\n\na.jpg,bee,moth\n", "line 4: 2 values expected"),
        ("image,classes\na.jpg,\n", r"line 2: a\.jpg has no class"),
        ("image,classes\na.jpg,bee\na.jpg,moth\n", r"line 3: a\.jpg is listed twice"),
        (
            "image,classes\na.jpg,bee\nb.png,bee\nc.jpg,bee\nd.jpg,bee\n",
            r"images listed: 1 of 4 are missing, first d\.jpg",
        ),
        ("image,classes\na.jpg,bee\nb.png,bee\n", r"1 of 3 are missing, first c\.jpg"),
        (
            "image,classes,split\na.jpg,bee,val\nb.png,bee,val\nc.jpg,bee,val\n",
            "split 'train' is empty.*holds val",
        ),
        ("image,classes\n", "are missing"),
    ],
)
def test_folder_refuses_bad_tables(folder, table, message):
    (folder / "labels.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        FolderDataset(folder, "train")


def test_folder_refuses_stray_masks_unknown_classes_and_twins(folder):
    (folder / "classes.txt").write_text("bee\n")
    with pytest.raises(UserError, match="unknown class 'moth'"):
        FolderDataset(folder, "train")
    (folder / "classes.txt").unlink()
    write_mask(folder / "masks" / "z.png", [[0]])
    with pytest.raises(UserError, match="masks.*first z"):
        FolderDataset(folder, "train")
    (folder / "masks" / "z.png").unlink()
    write_image(folder / "images" / "a.png")
    with (folder / "labels.csv").open("a") as file:
        file.write("a.png,bee,train\n")
    with pytest.raises(UserError, match="same name before the suffix"):
        FolderDataset(folder, "train")
    with pytest.raises(UserError, match=r"labels\.csv is missing"):
        (folder / "labels.csv").unlink()
        FolderDataset(folder, "train")


def test_coco_reads_prepared_files(tmp_path):
    stem = "COCO_val2014_000000000001"
    with pytest.raises(UserError, match="python -m ssepa_lib data coco"):
        CocoDataset(tmp_path, "val")
    (tmp_path / "semantic").mkdir()
    (tmp_path / "semantic" / "val.csv").write_text(f"image,classes\n{stem}.jpg,person;toothbrush\n")
    write_image(tmp_path / "val2014" / f"{stem}.jpg")
    with pytest.raises(UserError, match="masks: 1 of 1 are missing"):
        CocoDataset(tmp_path, "val")
    write_mask(tmp_path / "semantic" / "val2014" / f"{stem}.png", [[0, 1, 80, 0, 0, 0]] * 4)
    item = CocoDataset(tmp_path, "val")[0]
    assert item.label.nonzero().flatten().tolist() == [0, 79] and item.mask.max() == 80
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80


def test_shapes_are_reproducible_and_labelled_by_their_mask():
    first, again = ShapesDataset("train", 4), ShapesDataset("train", 4)
    other = ShapesDataset("train", 4, seed=1)
    item, same = first[2], again[2]
    assert torch.equal(item.image, same.image) and torch.equal(item.mask, same.mask)
    assert item.image.shape[1:] == item.mask.shape and not torch.equal(
        item.image[:, :64, :64], other[2].image[:, :64, :64]
    )
    assert torch.equal(item.label, classes_in(item.mask, len(first.classes))) and item.label.sum() >= 1
    assert len(list(first)) == 4


def test_build_dataset_plays_roles_and_limits(voc, monkeypatch):
    monkeypatch.setenv("VOC_ROOT", str(voc))
    data = DataConfig(name="voc", train_images=1, train_split="train")
    assert build_dataset(data, "train").ids == ["a"] and build_dataset(data, "val").ids == ["c"]
    assert len(build_dataset(DataConfig(train_images=3, val_images=2), "val")) == 2
    with pytest.raises(UserError, match="role"):
        build_dataset(data, "test")


def test_splits_of_a_recipe(voc):
    (voc / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("a\nb\nc\n")
    data = DataConfig(name="voc", root=str(voc), train_split="train_aug", measured_train="train")
    recipe = Recipe(data=data)
    assert split_of(recipe, "train").ids == ["a", "b", "c"] and measured_split(recipe, "train").ids == [
        "a",
        "b",
    ]
    assert split_of(recipe).ids == measured_split(recipe).ids == ["c"]
    assert split_of(recipe, "train_aug", 2).ids == measured_split(recipe, "train_aug", 2).ids == ["a", "b"]


def test_root_is_set_by_recipe_variable_or_default(monkeypatch, folder):
    monkeypatch.delenv("FOLDER_ROOT", raising=False)
    with pytest.raises(UserError, match="data.root is empty; set it, or FOLDER_ROOT"):
        build_dataset(DataConfig(name="folder"), "train")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("FOLDER_ROOT", folder.name)
    assert resolve_root(DataConfig(name="folder")) == folder.resolve()
    assert build_dataset(DataConfig(name="folder"), "train").ids == ["a", "c"]
    assert resolve_root(DataConfig(name="folder", root="elsewhere")).name == "elsewhere"
    monkeypatch.delenv("COCO_ROOT", raising=False)
    assert resolve_root(DataConfig(name="coco")).parts[-2:] == ("data", "coco")
    assert resolve_root(DataConfig()).is_dir()


def test_a_class_with_a_name_can_be_chosen(monkeypatch, tmp_path):
    known = dict(DATASETS)

    class Squares(SegmentationDataset):
        name = "squares"
        root_variable = "SQUARES_ROOT"

        def __init__(self, root, split):
            super().__init__(split, ["square"], [f"{root.name}_{i}" for i in range(5)])

        def label(self, i):
            return torch.ones(1)

    try:
        monkeypatch.setenv("SQUARES_ROOT", str(tmp_path / "here"))
        assert build_dataset(DataConfig(name="squares"), "train").ids[0] == "here_0"
        assert len(build_dataset(DataConfig(name="squares", val_images=2), "val")) == 2
        with pytest.raises(UserError, match="data.name is 'circles'; choose one of coco, .*, squares, voc"):
            build_dataset(DataConfig(name="circles"), "train")
    finally:
        del DATASETS["squares"]
    assert known == DATASETS


def test_real_voc_sample(voc_root):
    dataset = VocDataset(voc_root, "val")
    item = dataset[0]
    assert dataset.classes == VOC_CLASSES and item.image.shape[1:] == item.mask.shape
    assert item.label.sum() >= 1 and set(item.mask.unique().tolist()) <= {*range(21), 255}
