"""Preparation from tiny archives and a local server: errors are named, interrupted work is resumed."""

import hashlib
import io
import json
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ssepa_lib.data import coco, download, preparable, prepare, verify, voc
from ssepa_lib.data.coco import COCO_CLASSES, CocoDataset, paint, prepare_coco
from ssepa_lib.data.download import Source, fetch, unpack
from ssepa_lib.data.voc import VocDataset, prepare_sbd, prepare_voc
from ssepa_lib.errors import UserError

# pycocotools 2.0 under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def source(content, *urls, file="data.tar"):
    return Source(file, hashlib.md5(content).hexdigest(), urls)


def jpeg():
    stream = io.BytesIO()
    Image.new("RGB", (6, 4)).save(stream, "JPEG")
    return stream.getvalue()


def mask(number):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 6), number, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def server():
    """`server.files[path]` is bytes or a function of the handler; `server.log` lists (path, Range)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            host.log.append((self.path, wanted))
            content = host.files.get(self.path)
            if content is None:
                self.send_error(404)
            elif callable(content):
                content(self)
            else:
                start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
                if start >= len(content):
                    return self.send_error(416)
                self.answer(content[start:], 206 if start else 200)

        def answer(self, content, status=200, kind="application/x-tar", length=None):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(length or len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    host = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    host.files, host.log = {}, []
    host.url = f"http://127.0.0.1:{host.server_address[1]}"
    thread = threading.Thread(target=host.serve_forever, args=(0.01,))
    thread.start()
    yield host
    host.shutdown()
    thread.join()
    host.server_close()


CONTENT = bytes(range(256)) * 40


def test_download_reports_progress_and_is_not_repeated(server, tmp_path):
    server.files["/a"] = CONTENT
    seen = []
    path = fetch(source(CONTENT, f"{server.url}/a"), tmp_path, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT and seen[-1] == (len(CONTENT), len(CONTENT))
    assert list(tmp_path.iterdir()) == [path]
    fetch(source(CONTENT, f"{server.url}/a"), tmp_path)
    assert len(server.log) == 1


def test_file_put_by_hand_needs_no_host(tmp_path):
    (tmp_path / "data.tar").write_bytes(CONTENT)
    assert fetch(source(CONTENT), tmp_path) == tmp_path / "data.tar"
    (tmp_path / "data.tar").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"data\.tar: wrong MD5 sum .*delete the file"):
        fetch(source(CONTENT), tmp_path)


def test_lost_connection_is_resumed(server, tmp_path):
    def broken(handler):
        server.files["/a"] = CONTENT
        handler.answer(CONTENT[:3000], length=len(CONTENT))

    server.files["/a"] = broken
    assert fetch(source(CONTENT, f"{server.url}/a"), tmp_path).read_bytes() == CONTENT
    assert server.log == [("/a", None), ("/a", "bytes=3000-")]


def test_download_of_an_earlier_run_is_resumed_even_from_another_host(server, tmp_path):
    (tmp_path / "data.tar.part").write_bytes(CONTENT[:5000])
    server.files["/b"] = CONTENT
    assert fetch(source(CONTENT, f"{server.url}/a", f"{server.url}/b"), tmp_path).read_bytes() == CONTENT
    assert server.log == [("/a", "bytes=5000-"), ("/b", "bytes=5000-")]


def test_server_without_ranges_starts_again(server, tmp_path):
    (tmp_path / "data.tar.part").write_bytes(b"x" * 5000)
    server.files["/a"] = lambda handler: handler.answer(CONTENT)
    assert fetch(source(CONTENT, f"{server.url}/a"), tmp_path).read_bytes() == CONTENT
    assert len(server.log) == 1


def test_wrong_beginning_is_thrown_away_once(server, tmp_path):
    (tmp_path / "data.tar.part").write_bytes(b"x" * 5000)
    server.files["/a"] = CONTENT
    assert fetch(source(CONTENT, f"{server.url}/a"), tmp_path).read_bytes() == CONTENT
    assert server.log == [("/a", "bytes=5000-"), ("/a", None)]


def test_complete_part_of_an_earlier_run_is_used(server, tmp_path):
    (tmp_path / "data.tar.part").write_bytes(CONTENT)
    server.files["/a"] = CONTENT
    assert fetch(source(CONTENT, f"{server.url}/a"), tmp_path).read_bytes() == CONTENT


def test_every_failure_is_named_and_the_place_for_the_file(server, tmp_path):
    page = b"<!DOCTYPE html><p>moved</p>"
    server.files["/page"] = lambda handler: handler.answer(page, kind="text/html")
    server.files["/disguised"] = page
    server.files["/other"] = b"something else"
    urls = [f"{server.url}/{name}" for name in ("page", "disguised", "other", "gone")]
    with pytest.raises(UserError) as error:
        fetch(source(CONTENT, *urls, "http://127.0.0.1:9/closed"), tmp_path)
    text = str(error.value)
    for reason in (
        "web page instead",
        "wrong MD5 sum",
        "Not Found",
        "refused",
        f"put the file at {tmp_path / 'data.tar'}",
    ):
        assert reason in text
    assert "\n" not in text and not (tmp_path / "data.tar").exists()


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/x-tar"])
def test_web_page_does_not_spoil_a_part(server, tmp_path, kind):
    (tmp_path / "data.tar.part").write_bytes(CONTENT[:5000])
    server.files["/page"] = lambda handler: handler.answer(b"<html>", kind=kind)
    with pytest.raises(UserError, match="web page"):
        fetch(source(CONTENT, f"{server.url}/page"), tmp_path)
    assert (tmp_path / "data.tar.part").read_bytes() == CONTENT[:5000]


def test_silent_host_is_left(server, tmp_path, monkeypatch):
    released = threading.Event()
    server.files["/silent"] = lambda handler: released.wait(5)
    server.files["/a"] = CONTENT
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    try:
        path = fetch(source(CONTENT, f"{server.url}/silent", f"{server.url}/a"), tmp_path)
    finally:
        released.set()
    assert path.read_bytes() == CONTENT and [name for name, _ in server.log] == ["/silent", "/a"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["../evil.txt", "inner/../../evil.txt"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, name):
    archive = tar(tmp_path / "a.tar", {"inner/good.txt": b"1", name: b"2"})
    with pytest.raises(UserError, match=r"a\.tar: unsafe archive, nothing was unpacked"):
        unpack(archive, "inner", tmp_path / "place" / "target")
    assert not list(tmp_path.rglob("evil.txt")) and not list((tmp_path / "place").iterdir())


def test_links_that_leave_the_folder_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("inner/link")
        link.type, link.linkname = tarfile.SYMTYPE, "../../../secret"
        archive.addfile(link)
    with pytest.raises(UserError, match="unsafe archive"):
        unpack(tmp_path / "a.tar", "inner", tmp_path / "target")


def test_damaged_archives_leave_nothing(tmp_path):
    archive = tar(tmp_path / "a.tar", {"inner/a": bytes(9000)}, "w:gz")
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(UserError, match="could not be unpacked"):
        unpack(archive, "inner", tmp_path / "target")
    with pytest.raises(UserError, match="no inner in this archive"):
        unpack(tar(tmp_path / "b.tar", {"x": b""}), "inner", tmp_path / "target")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_unpacking_reports_the_bytes_of_the_archive(tmp_path):
    archive, seen = tar(tmp_path / "a.tar", {f"inner/{i}": bytes(100_000) for i in range(4)}), []
    unpack(archive, "inner", tmp_path / "target", lambda *given: seen.append(given))
    size = archive.stat().st_size
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and len(seen) == 5
    assert {total for _, total in seen} == {size} and [done for done, _ in seen].count(size) == 1


@pytest.fixture
def small(monkeypatch):
    """VOC with 2 training images and 1 for validation, SBD with 5 more lines, COCO with 2 + 1 images."""
    monkeypatch.setattr(voc, "COUNTS", {"JPEGImages": 5, "Annotations": 5, "SegmentationClass": 3})
    monkeypatch.setattr(voc, "SPLITS", {"train": 2, "val": 1})
    monkeypatch.setattr(voc, "TRAIN_AUG", 4)
    monkeypatch.setattr(coco, "IMAGES", {"train": 2, "val": 1})
    monkeypatch.setattr(coco, "ANNOTATED", {"train": 1, "val": 1})


def voc_files(images="abcde"):
    inner = "VOCdevkit/VOC2012"
    files = {
        f"{inner}/ImageSets/Segmentation/train.txt": b"a\nb\n",
        f"{inner}/ImageSets/Segmentation/val.txt": b"c\n",
    }
    note = b"<annotation><object><name>cow</name></object></annotation>"
    files |= {f"{inner}/JPEGImages/{i}.jpg": jpeg() for i in images}
    files |= {f"{inner}/Annotations/{i}.xml": note for i in "abcde"}
    return files | {f"{inner}/SegmentationClass/{i}.png": mask(10) for i in "abc"}


def sbd_archive(path, mode="w:gz"):
    inner, files = "benchmark_RELEASE/dataset", {}
    for name, number in zip("abcde", (1, 1, 1, 4, 5), strict=True):
        stream = io.BytesIO()
        ids = np.full((4, 6), number, np.uint8)
        savemat(stream, {"GTcls": {"Segmentation": ids, "CategoriesPresent": [number]}}, do_compression=True)
        files[f"{inner}/cls/{name}.mat"] = stream.getvalue()
    files |= {f"{inner}/train.txt": b"a\nd\n", f"{inner}/val.txt": b"c\ne\n", f"{inner}/img/a.jpg": jpeg()}
    return tar(path, files, mode)


def test_voc_from_archive_to_dataset_and_again(tmp_path, small):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    root.parent.mkdir()
    archive = tar(root.parent / "data.tar", voc_files())
    outcome = prepare_voc(root, source=source(archive.read_bytes()))
    assert outcome.changed and not verify("voc", root).problems
    assert VocDataset(root, "train")[0].label.sum() == 1
    assert sorted(p.name for p in root.parent.iterdir()) == ["VOC2012", "data.tar"]
    archive.unlink()
    outcome = prepare_voc(root, source=source(b""))
    assert not outcome.changed and "nothing to do" in outcome.message


def test_voc_half_there_is_not_touched(tmp_path, small):
    root = tmp_path / "VOC2012"
    tar(tmp_path / "half.tar", voc_files("ab"))
    unpack(tmp_path / "half.tar", "VOCdevkit/VOC2012", root)
    with pytest.raises(UserError, match="incomplete .JPEGImages: 2 of 5 found.; move it away"):
        prepare_voc(root, source=source(b""))
    result = verify("voc", root)
    assert result.counts["JPEGImages"] == (2, 5) and result.counts["val.txt"] == (1, 1)
    assert result.problems == ["JPEGImages: 2 of 5 found; run `python -m ssepa_lib data voc`."]


@pytest.mark.parametrize("mode", ["w:gz", "w"])  # the file has been served unzipped under its .tgz name
def test_sbd_makes_the_augmented_split(tmp_path, small, mode):
    root = tmp_path / "VOC2012"
    archive = sbd_archive(tmp_path / "benchmark.tgz", mode)
    sbd = source(archive.read_bytes(), file="benchmark.tgz")
    with pytest.raises(UserError, match="data voc` first"):
        prepare_sbd(root, source=sbd)
    unpack(tar(tmp_path / "voc.tar", voc_files()), "VOCdevkit/VOC2012", root)
    assert prepare_sbd(root, source=sbd).changed
    assert (root / "ImageSets/Segmentation/train_aug.txt").read_text().split() == [
        "a",
        "b",
        "d",
        "e",
    ]  # c is val
    assert sorted(p.name for p in (root / "SegmentationClassAug").iterdir()) == ["d.png", "e.png"]
    written = Image.open(root / "SegmentationClassAug" / "d.png")
    assert written.mode == "P" and written.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    dataset = VocDataset(root, "train_aug")
    assert [int(dataset.mask(i).max()) for i in range(4)] == [10, 10, 4, 5]
    assert not prepare_sbd(root, source=replace(sbd, md5="")).changed


def test_sbd_refuses_other_archives(tmp_path, small):
    root = tmp_path / "VOC2012"
    unpack(tar(tmp_path / "voc.tar", voc_files()), "VOCdevkit/VOC2012", root)
    for files, message in (
        ({"x/cls/d.mat": b"no matlab"}, r"d\.mat is not an SBD mask"),
        ({"x/y.txt": b""}, "no train.txt and val.txt"),
    ):
        archive = tar(tmp_path / "data.tar", files)
        with pytest.raises(UserError, match=message):
            prepare_sbd(root, source=source(archive.read_bytes()))
        archive.unlink()
    assert not list(root.glob("SegmentationClassAug*"))


def square(identity, image, category, top, left, side, crowd=False):
    """A square object, as polygon or (crowd) as run lengths down the columns of a 8×10 image."""
    if crowd:
        grid = np.zeros((8, 10), int)
        grid[top : top + side, left : left + side] = 1
        flat = grid.T.flatten()
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
        counts = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
        shape = {"counts": counts, "size": [8, 10]}
    else:
        bottom, right = top + side, left + side
        shape = [[left, top, right, top, right, bottom, left, bottom]]
    return {
        "id": identity,
        "image_id": image,
        "category_id": category,
        "segmentation": shape,
        "area": side * side,
        "iscrowd": int(crowd),
    }


def coco_json(root, split, images, annotations, categories=COCO_CLASSES):
    (root / "annotations").mkdir(exist_ok=True)
    content = {
        "info": {"year": 2014},
        "images": [{"id": i, "file_name": name, "height": 8, "width": 10} for i, name in images],
        "annotations": annotations,
        "categories": [{"id": 2 * i + 1, "name": name} for i, name in enumerate(categories)],
    }
    (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(content))


def test_small_objects_are_painted_last():
    ids = {1: 1, 3: 2}
    small_first = [square(1, 0, 1, 2, 2, 3), square(2, 0, 3, 0, 0, 8, crowd=True)]
    for order in (small_first, small_first[::-1]):
        canvas = paint(order, ids, 8, 10)
        expected = np.zeros((8, 10), int)
        expected[:8, :8] = 2
        expected[2:5, 2:5] = 1
        assert canvas.tolist() == expected.tolist()


def test_coco_from_json_to_dataset_and_again(tmp_path, small):
    name = "COCO_train2014_000000000007.jpg"
    empty = "COCO_train2014_000000000008.jpg"
    coco_json(
        tmp_path, "train", [(7, name), (8, empty)], [square(1, 7, 159, 0, 0, 2), square(2, 7, 1, 4, 4, 2)]
    )
    coco_json(tmp_path, "val", [(9, "COCO_val2014_000000000009.jpg")], [square(3, 9, 3, 0, 0, 4)])
    (tmp_path / "train2014").mkdir()
    for file in (name, empty):
        Image.new("RGB", (10, 8)).save(tmp_path / "train2014" / file)
    assert "1 train images" in prepare_coco(tmp_path).message
    dataset = CocoDataset(tmp_path, "train")
    assert len(dataset) == 1 and dataset.label(0).nonzero().flatten().tolist() == [0, 79]
    assert (
        dataset.mask(0)[0].tolist() == [80, 80] + [0] * 8
        and dataset.mask(0)[4].tolist() == [0] * 4 + [1, 1] + [0] * 4
    )
    assert not prepare_coco(tmp_path).changed
    assert [line.split(":")[0] for line in verify("coco", tmp_path).problems] == ["val2014"]


def test_coco_of_another_year_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"instances_train2014\.json is missing"):
        prepare_coco(tmp_path)
    coco_json(tmp_path, "train", [(7, "000000000007.jpg")], [])
    with pytest.raises(UserError, match=r"lists 000000000007\.jpg: not the COCO 2014 train file"):
        prepare_coco(tmp_path)
    coco_json(tmp_path, "train", [(7, "COCO_train2014_000000000007.jpg")], [], categories=COCO_CLASSES[:79])
    with pytest.raises(UserError, match="other categories"):
        prepare_coco(tmp_path)
    (tmp_path / "annotations" / "instances_train2014.json").write_text("{")
    with pytest.raises(UserError, match="no COCO instances file"):
        prepare_coco(tmp_path)


def test_three_names_can_be_prepared_and_verified(tmp_path, small, monkeypatch):
    assert sorted(preparable()) == ["coco", "sbd", "voc"] and preparable().index("voc") < preparable().index(
        "sbd"
    )
    assert len(verify("voc", tmp_path).problems) == 5 and len(verify("sbd", tmp_path).problems) == 2
    monkeypatch.setenv("VOC_ROOT", str(tmp_path / "VOC2012"))
    assert verify("sbd").root == (tmp_path / "VOC2012").resolve()
    unpack(tar(tmp_path / "voc.tar", voc_files()), "VOCdevkit/VOC2012", tmp_path / "VOC2012")
    assert not prepare("voc").changed and not prepare("voc", tmp_path / "VOC2012").changed
    for work in (prepare, verify):
        with pytest.raises(UserError, match="no dataset 'imagenet' .* choose coco, voc, sbd"):
            work("imagenet", tmp_path)
