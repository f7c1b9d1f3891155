"""COCO 2014 as semantic segmentation: 80 classes, masks painted from the instances."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from ssepa_lib.data.datasets import Outcome, Preparation, Verification, refuse_missing, stems
from ssepa_lib.data.download import Progress
from ssepa_lib.data.folder import TableDataset, read_label_table
from ssepa_lib.data.images import write_mask
from ssepa_lib.errors import UserError
from ssepa_lib.files import write_csv
from ssepa_lib.paths import PROJECT
from ssepa_lib.readers import parse_json

_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, "
    "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, "
    "backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, "
    "baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, "
    "bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, "
    "potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, "
    "oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
COCO_CLASSES = tuple(_NAMES.split(", "))
IMAGES = {"train": 82783, "val": 40504}
ANNOTATED = {"train": 82081, "val": 40137}
_REMEDY = "run `python -m ssepa_lib data coco`"


def prepare_coco(root: Path, progress: Progress | None = None) -> Outcome:
    """Semantic masks and labels of COCO 2014 from `annotations/instances_<split>2014.json`.

    Writes `semantic/<split>2014/*.png` and, last, `semantic/<split>.csv` (image, classes) for the images that
    have annotations. Ids are 1..80 in the order of COCO's category ids. Larger objects (field `area`) are
    painted first, so that small ones stay visible; crowd regions count as their class; nothing is marked 255.
    The label holds every annotated class. Masks that exist are kept, so an interrupted preparation is
    resumed. Nothing is downloaded.

    Args:
        progress: called with (images done, images of the split).

    Raises:
        UserError: a missing or unreadable JSON, or one of another year.
    """
    done = []
    for split in IMAGES:
        table = root / "semantic" / f"{split}.csv"
        if not table.is_file():
            rows = _paint_split(root, split, progress)
            write_csv(table, ("image", "classes"), rows)
            done.append(f"{len(rows)} {split} images")
    if not done:
        return Outcome("coco", root, False, f"COCO masks at {root / 'semantic'} are complete; nothing to do.")
    return Outcome("coco", root, True, f"COCO masks for {' and '.join(done)} are at {root / 'semantic'}.")


def _read_instances(root: Path, split: str) -> tuple[list[dict], list[dict], dict[int, int]]:
    """Images, annotations and the mask id of each category id, from the file of one split."""
    path = root / "annotations" / f"instances_{split}2014.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; unpack annotations_trainval2014.zip at {root}.")
    try:
        content = parse_json(path.read_bytes())
        images, annotations, categories = check_instances(content)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no COCO instances file ({error}); unpack annotations_trainval2014.zip again."
        ) from error
    categories = sorted(categories, key=lambda category: category["id"])
    names = tuple(category["name"] for category in categories)
    foreign = [i["file_name"] for i in images if not i["file_name"].startswith(f"COCO_{split}2014_")]
    if foreign or names != COCO_CLASSES:
        what = f"lists {foreign[0]}" if foreign else "has other categories"
        raise UserError(
            f"{path} {what}: not the COCO 2014 {split} file; unpack annotations_trainval2014.zip."
        )
    return images, annotations, {category["id"]: i for i, category in enumerate(categories, start=1)}


_FIELDS: dict[str, dict[str, Any]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {"image_id": int, "category_id": int, "area": (int, float), "segmentation": (list, dict)},
    "categories": {"id": int, "name": str},
}


def check_instances(content: Any) -> list[list[dict[str, Any]]]:
    """Images, annotations and categories of an instances file, if they are as COCO describes them.

    Raises:
        ValueError: something is missing, of another type, out of range, or refers to what is not there.
    """
    if not isinstance(content, dict):
        raise ValueError("it holds no sections")
    for kind, fields in _FIELDS.items():
        if not isinstance(content.get(kind), list):
            raise ValueError(f"the list '{kind}' is missing")
        for number, entry in enumerate(content[kind]):
            for name, wanted in fields.items():
                value = entry.get(name) if isinstance(entry, dict) else None
                if not isinstance(value, wanted) or isinstance(value, bool):
                    raise ValueError(f"'{name}' of {kind}[{number}] is missing or malformed")
    for kind in ("images", "categories"):
        if len({entry["id"] for entry in content[kind]}) < len(content[kind]):
            raise ValueError(f"two entries of '{kind}' have the same id")
    images = {image["id"]: image for image in content["images"]}
    known = {category["id"] for category in content["categories"]}
    for number, image in enumerate(content["images"]):
        if not re.fullmatch(r"[\w-]+\.jpg", image["file_name"]):
            raise ValueError(f"'file_name' of images[{number}] is no name of a .jpg file")
        if not (1 <= image["height"] <= 20_000 and 1 <= image["width"] <= 20_000):
            raise ValueError(f"the size of images[{number}] is not within 1 to 20 000 pixels")
    for number, thing in enumerate(content["annotations"]):
        if thing["image_id"] not in images or thing["category_id"] not in known:
            raise ValueError(f"annotations[{number}] belongs to an image or a category that is not there")
        if not _is_shape(thing["segmentation"], images[thing["image_id"]]):
            raise ValueError(f"'segmentation' of annotations[{number}] is no polygon and no run lengths")
    return [content[kind] for kind in _FIELDS]


def _is_shape(shape: list | dict, image: dict[str, Any]) -> bool:
    """Whether a segmentation is a list of polygons, or run lengths that fill the image exactly."""
    size = [image["height"], image["width"]]
    if isinstance(shape, dict):
        counts = shape.get("counts")
        whole = isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
        return whole and shape.get("size") == size and sum(counts) == size[0] * size[1]
    return bool(shape) and all(
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(type(value) in (int, float) and abs(value) <= 40_000 for value in polygon)
        for polygon in shape
    )


def _paint_split(root: Path, split: str, progress: Progress | None) -> list[tuple[str, str]]:
    """Paint the masks of one split; returns the rows (image, classes)."""
    images, annotations, ids = _read_instances(root, split)
    objects: dict[int, list[dict]] = {}
    for annotation in annotations:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    rows = []
    for number, image in enumerate(images, 1):
        if progress:
            progress(number, len(images))
        found = objects.get(image["id"])
        if not found:
            continue
        path = root / "semantic" / f"{split}2014" / f"{Path(image['file_name']).stem}.png"
        if not path.is_file():
            write_mask(path, paint(found, ids, image["height"], image["width"]))
        present = sorted({ids[annotation["category_id"]] for annotation in found})
        rows.append((image["file_name"], ";".join(COCO_CLASSES[i - 1] for i in present)))
    return rows


def paint(annotations: list[dict], ids: dict[int, int], height: int, width: int) -> np.ndarray:
    """Semantic mask uint8 [height, width] of COCO instances, larger ones first.

    Args:
        annotations: with `segmentation` (polygons or run lengths), `area` and `category_id`.
        ids: mask id of each category id.
    """
    from pycocotools import mask as runs

    canvas = np.zeros((height, width), np.uint8)
    for annotation in sorted(annotations, key=lambda a: -a["area"]):
        shape = annotation["segmentation"]
        if isinstance(shape, list):
            shape = runs.merge(runs.frPyObjects(shape, height, width))
        else:
            shape = runs.frPyObjects(shape, height, width)
        canvas[runs.decode(shape) > 0] = ids[annotation["category_id"]]
    return canvas


def verify_coco(root: Path) -> Verification:
    """Count images, table rows and painted masks."""
    result = Verification("coco", root)
    for split, images in IMAGES.items():
        table = root / "semantic" / f"{split}.csv"
        rows = len(read_label_table(table)) if table.is_file() else 0
        folder = f"{split}2014"
        found = len(stems(root / folder, ".jpg"))
        painted = len(stems(root / "semantic" / folder, ".png"))
        result.count(folder, found, images, f"unpack {folder}.zip at {root}")
        result.count(f"semantic/{split}.csv", rows, ANNOTATED[split], _REMEDY)
        result.count(f"semantic/{folder}", painted, ANNOTATED[split], _REMEDY)
    return result


class CocoDataset(TableDataset):
    """COCO 2014 as semantic segmentation, from the files that `prepare_coco` derives.

    Args:
        root: the folder that holds `train2014`, `val2014` and the derived `semantic`.
        split: train or val.

    Raises:
        UserError: missing or half-prepared files, or an unknown split.
    """

    name = "coco"
    root_variable = "COCO_ROOT"
    default_root = PROJECT / "data" / "coco"
    preparations = {"coco": Preparation(prepare_coco, verify_coco)}

    def __init__(self, root: Path | str, split: str) -> None:
        if split not in IMAGES:
            raise UserError(f"coco: there is no split '{split}'; choose train or val.")
        table = Path(root, "semantic", f"{split}.csv")
        if not table.is_file():
            raise UserError(f"{table} is missing; {_REMEDY}, or set COCO_ROOT or data.root.")
        rows = read_label_table(table)
        if not rows:
            raise UserError(f"{table}: the split is empty; delete the file and {_REMEDY} again.")
        folder = Path(root, f"{split}2014")
        names = [row["image"].removesuffix(".jpg") for row in rows]
        there = stems(folder, ".jpg")
        missing = [f"{name}.jpg" for name in names if name not in there]
        refuse_missing(missing, len(rows), f"{folder}: images", "unpack the archive again")
        masks = table.parent / f"{split}2014"
        painted = stems(masks, ".png")
        missing = [name for name in names if name not in painted]
        refuse_missing(missing, len(rows), f"{masks}: masks", _REMEDY)
        images = [folder / f"{name}.jpg" for name in names]
        super().__init__(split, COCO_CLASSES, table, rows, images, [masks / f"{name}.png" for name in names])
