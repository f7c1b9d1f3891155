import csv
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from toy_network import CLASSES, ColourNetwork, TwoImages, recipe, without_crf

from ssepa_lib.data import Subset
from ssepa_lib.data.images import voc_palette
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation import inference
from ssepa_lib.evaluation.export import (
    ImageFolder,
    export_pseudo_labels,
    overlay_image,
    palette_image,
    predict_folder,
)
from ssepa_lib.evaluation.submission import SUBMISSION_FOLDER, export_submission, validate_submission


class VocNetwork(ColourNetwork):
    """The colour network with VOC's 20 classes, 18 of them never predicted."""

    def __init__(self):
        super().__init__()
        self.classes = tuple(f"class {i}" for i in range(20))

    def forward(self, image, **options):
        output = super().forward(image, **options)
        output.segmentation = torch.nn.functional.pad(output.segmentation, (0, 0, 0, 0, 0, 18))
        return output


def opened(path):
    with Image.open(path) as image:
        return image.mode, image.getpalette(), np.array(image)


@pytest.mark.parametrize("test_time", ["single", "ms", "ms_crf"])
def test_predict_folder_writes_masks_overlays_and_tables(tmp_path, monkeypatch, test_time):
    monkeypatch.setattr(inference, "crf_pool", without_crf)
    data = TwoImages()
    (tmp_path / "mine").mkdir()
    data.image(0).save(tmp_path / "mine" / "first.png")
    data.image(1).save(tmp_path / "mine" / "second.PNG", format="PNG")
    out = predict_folder(
        ColourNetwork(), recipe(), tmp_path / "mine", tmp_path / "out", device="cpu", test_time=test_time
    )
    for i, name in enumerate(("first", "second")):
        mode, palette, ids = opened(out / f"{name}.png")
        assert mode == "P" and palette[3 * 1 : 3 * 2] == [128, 0, 0]
        assert (ids == data.mask(i).numpy()).all()
        assert (out / f"{name}_overlay.jpg").is_file()
    with (out / "predictions.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["image", "classes"],
            ["first.png", "circle"],
            ["second.PNG", "square"],
        ]
    with (out / "classes.csv").open() as file:
        assert list(csv.reader(file))[2] == ["1", "circle", "128", "0", "0"]
    assert not [p for p in out.iterdir() if p.name.endswith(".part")]


def test_predict_folder_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        predict_folder(ColourNetwork(), recipe(), tmp_path / "none", tmp_path / "out", device="cpu")
    with pytest.raises(UserError, match="holds no image"):
        predict_folder(ColourNetwork(), recipe(), tmp_path, tmp_path / "out", device="cpu")
    for suffix in ("png", "jpg"):
        TwoImages().image(0).save(tmp_path / f"same.{suffix}")
    with pytest.raises(UserError, match="same.png would share one result"):
        predict_folder(ColourNetwork(), recipe(), tmp_path, tmp_path / "out", device="cpu")
    (tmp_path / "same.k.png").write_bytes(b"")  # sorted between the two
    with pytest.raises(UserError, match="same.png would share one result"):
        predict_folder(ColourNetwork(), recipe(), tmp_path, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_predict_folder_does_not_write_over_the_images(tmp_path):
    TwoImages().image(0).save(tmp_path / "mine.png")
    before = (tmp_path / "mine.png").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "link"):
        with pytest.raises(UserError, match="holds your images"):
            predict_folder(ColourNetwork(), recipe(), tmp_path, out, device="cpu", test_time="single")
    assert (tmp_path / "mine.png").read_bytes() == before and not (tmp_path / "classes.csv").exists()


def test_pseudo_labels_do_not_write_over_the_images(tmp_path):
    TwoImages().image(0).save(tmp_path / "mine.png")
    before = (tmp_path / "mine.png").read_bytes()
    dataset = ImageFolder(tmp_path, CLASSES)
    for split in (dataset, Subset(dataset, [0])):
        with pytest.raises(UserError, match="holds files of"):
            export_pseudo_labels(ColourNetwork(), recipe(8), split, tmp_path, device="cpu")
    assert (tmp_path / "mine.png").read_bytes() == before


def test_hidden_files_are_no_images(tmp_path):
    for name in ("mine.png", "._mine.png", ".mine.1a2b.part.png"):
        TwoImages().image(0).save(tmp_path / name)
    assert ImageFolder(tmp_path, CLASSES).ids == ["mine"]


def test_overlay_colours_foreground_only_and_names_it():
    image = Image.new("RGB", (60, 20), (100, 100, 100))
    ids = np.zeros((20, 60), dtype=np.uint8)
    ids[:, 30:] = 1
    out = np.asarray(overlay_image(image, ids, CLASSES, voc_palette()))
    assert out[0, 0].tolist() == [100, 100, 100] and out[0, 40].tolist() == [114, 50, 50]
    assert out.shape[0] > 20 and out[20:].min() < 50  # the legend's text


@pytest.mark.parametrize("test_time", ["single", "ms", "ms_crf"])
def test_pseudo_labels_at_original_size(tmp_path, monkeypatch, test_time):
    monkeypatch.setattr(inference, "crf_pool", without_crf)
    data = TwoImages()
    out = export_pseudo_labels(ColourNetwork(), recipe(8), data, tmp_path, device="cpu", test_time=test_time)
    for i, id in enumerate(data.ids):
        mode, _, ids = opened(out / f"{id}.png")
        assert mode == "P" and ids.shape == data.mask(i).shape
        assert (ids == data.mask(i).numpy()).mean() > 0.9
        assert set(np.unique(ids)) == {0, i + 1}


def test_pseudo_labels_may_have_overlays(tmp_path):
    data, options = TwoImages(), {"device": "cpu", "test_time": "single", "overlays": True}
    out = export_pseudo_labels(ColourNetwork(), recipe(8), data, tmp_path, **options)
    assert sorted(path.name for path in out.glob("*.jpg")) == sorted(f"{id}_overlay.jpg" for id in data.ids)
    with Image.open(out / f"{data.ids[0]}_overlay.jpg") as image:
        assert (image.width, image.height > data.image(0).height) == (data.image(0).width, True)


def test_pseudo_labels_need_labels(tmp_path):
    class Unlabelled(TwoImages):
        def label(self, i):
            return torch.full((2,), torch.nan)

    with pytest.raises(UserError, match="no labels"):
        export_pseudo_labels(ColourNetwork(), recipe(), Unlabelled(), tmp_path, device="cpu")


def test_submission_layout_and_content(tmp_path):
    data = TwoImages(masks=False, classes=VocNetwork().classes)
    archive = export_submission(
        VocNetwork(), recipe(), data, tmp_path / "voc.tgz", device="cpu", test_time="single"
    )
    with tarfile.open(archive) as tar:
        assert tar.getnames() == [f"{SUBMISSION_FOLDER}/{id}.png" for id in data.ids]
        with Image.open(tar.extractfile(tar.getmembers()[1])) as image:
            assert image.mode == "P" and (np.array(image) == TwoImages().mask(1).numpy()).all()
            assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["voc.tgz"]
    with pytest.raises(UserError, match="20 classes"):
        export_submission(ColourNetwork(), recipe(), data, tmp_path / "b.tgz", device="cpu")
    with pytest.raises(UserError, match=r"\.tgz"):
        export_submission(VocNetwork(), recipe(), data, tmp_path / "b.zip", device="cpu")


def test_nothing_is_left_when_a_submission_fails(tmp_path):
    class Broken(TwoImages):
        def image(self, i):
            if i:
                raise UserError("unreadable image")
            return super().image(i)

    broken = Broken(classes=VocNetwork().classes)
    with pytest.raises(UserError, match="unreadable"):
        export_submission(
            VocNetwork(), recipe(), broken, tmp_path / "voc.tgz", device="cpu", test_time="single"
        )
    assert not list(tmp_path.iterdir())


def pack(path, **files):
    with tarfile.open(path, "w:gz") as tar:
        for name, image in files.items():
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            info = tarfile.TarInfo(f"{SUBMISSION_FOLDER}/{name}.png")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)
    return path


def mask(value=1, size=(4, 3)):
    return palette_image(np.full(size[::-1], value, dtype=np.uint8), voc_palette())


def test_validation_accepts_what_the_server_takes(tmp_path):
    archive = pack(tmp_path / "a.tgz", one=mask(0), two=mask(20))
    assert validate_submission(archive, ["one", "two"], {"one": (4, 3), "two": (4, 3)}) == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"one": mask()}, "1 of 2 images are missing, first two"),
        ({"one": mask(), "two": mask().convert("RGB")}, "two.png has mode RGB"),
        ({"one": mask(), "two": mask().convert("L")}, "two.png has mode L"),
        ({"one": mask(), "two": mask(size=(3, 4))}, r"two.png is 3×4 but its image 4×3"),
        ({"one": mask(), "two": mask(21)}, "two.png holds id 21"),
        ({"one": mask(), "two": mask(255)}, "two.png holds id 255"),
        (
            {"one": mask(), "two": palette_image(np.ones((3, 4), np.uint8), [(i, 9, 9) for i in range(256)])},
            "palette",
        ),
        ({"one": mask(), "two": mask(), "three": mask()}, "three.png does not belong"),
    ],
)
def test_validation_names_the_fault(tmp_path, files, message):
    archive = pack(tmp_path / "a.tgz", **files)
    with pytest.raises(UserError, match=message):
        validate_submission(archive, ["one", "two"], {"one": (4, 3), "two": (4, 3)})


def test_validation_of_something_else(tmp_path):
    (tmp_path / "a.tgz").write_text("no archive")
    with pytest.raises(UserError, match="not a readable tar"):
        validate_submission(tmp_path / "a.tgz", ["one"])
