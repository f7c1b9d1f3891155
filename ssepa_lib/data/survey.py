"""What a folder of your own images holds, read leniently and without changing it.

`FolderDataset` is strict: it reads a folder that is complete. Here a folder is read as people have it, every
problem is noted with the files it concerns. `adopt.adopt` copies what is usable into a folder that
`FolderDataset` accepts.
"""

import csv
import hashlib
import re
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ssepa_lib.data.images import IGNORE, IMAGE_SUFFIXES, UNREADABLE, as_rgb, read_mask
from ssepa_lib.errors import UserError
from ssepa_lib.files import visible

SUFFIXES = (*IMAGE_SUFFIXES, ".gif", ".bmp", ".tif", ".tiff", ".webp")  # what may be in the folder
SMALLEST = 32  # pixels of the shorter side that an image must have


@dataclass(frozen=True)
class Photo:
    """One usable image.

    Attributes:
        name: as the table has it.
        classes: names, sorted, without the background.
        split: as the table has it, or empty.
        size: width and height, upright.
        turned: whether its EXIF tag turns it.
        converted: whether its mode is not plain RGB or grey with 8 bits, or it is an animation.
        digest: 16 × 16 brightness differences; equal for the same image saved twice.
    """

    name: str
    path: Path
    classes: tuple[str, ...]
    split: str
    size: tuple[int, int]
    turned: bool
    converted: bool
    digest: bytes

    @property
    def stem(self) -> str:
        """Its name in a folder without subfolders, without the suffix."""
        return Path(_plain(self.name).replace("/", "_")).stem.strip()


@dataclass
class Survey:
    """What a folder holds: the usable images, and what keeps the others from being used."""

    root: Path
    table: Path | None  # None: the folders name the classes
    classes: tuple[str, ...] = ()
    rows: int = 0  # rows of the table, before any was left out
    skipped: int = 0  # images that the limit leaves out
    photos: list[Photo] = field(default_factory=list)
    masks: dict[str, Path] = field(default_factory=dict)  # name of an image → its mask
    missing: list[str] = field(default_factory=list)  # rows without a file
    unlisted: list[str] = field(default_factory=list)  # files without a row
    unnamed: list[str] = field(default_factory=list)  # rows without a class
    twice: list[str] = field(default_factory=list)  # listed again; the classes are joined
    broken: dict[str, str] = field(default_factory=dict)  # image → why it cannot be used
    bad_masks: dict[str, str] = field(default_factory=dict)  # mask → why it cannot be used

    @property
    def copies(self) -> list[tuple[str, ...]]:
        """Groups of images that look the same."""
        groups: dict[bytes, list[str]] = {}
        for photo in self.photos:
            groups.setdefault(photo.digest, []).append(photo.name)
        return [tuple(names) for names in groups.values() if len(names) > 1]

    @property
    def key(self) -> str:
        """Eight characters that change when an image, a label or a mask does."""
        digest = hashlib.sha256()
        for photo in self.photos:
            mask = self.masks.get(photo.name)
            content = mask.read_bytes() if mask else b""
            line = (photo.name, photo.classes, photo.split, photo.size, photo.path.stat().st_size)
            digest.update(repr((line, photo.digest, hashlib.sha256(content).digest())).encode())
        digest.update(repr(self.classes).encode())
        return digest.hexdigest()[:8]


def survey(root: Path | str, limit: int = 0) -> Survey:
    """Look at a folder of images and the table of their classes; nothing is written.

    The table is `labels.csv`, or the only CSV file there, with the columns image and classes; it may be
    separated by commas, semicolons or tabs, and have any usual encoding. Images lie in `images/` or in the
    folder itself, masks in `masks/`. Without a table, the names of subfolders are the classes.

    Args:
        limit: look at so many images, evenly spread over the table; 0: all.

    Raises:
        UserError: there is no such folder, no table and no subfolders, or the table cannot be understood.
    """
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the folder that holds your images and labels.csv.")
    base = root / "images" if (root / "images").is_dir() else root
    table = _find_table(root)
    rows = list(_read_rows(table) if table else _rows_of_folders(root, base))
    found = Survey(root, table, rows=len(rows))
    labels = _joined(found, rows)
    found.classes = _class_list(root, labels)
    files = _files(root, base)
    wanted = list(labels)
    if limit and len(wanted) > limit:
        wanted = [wanted[i * len(wanted) // limit] for i in range(limit)]
    found.skipped = len(labels) - len(wanted)
    for name in wanted:
        path = files.get(_plain(name)) or files.get(_plain(name).casefold())
        if path is None:
            found.missing.append(name)
            continue
        try:
            found.photos.append(_look(name, path, *labels[name]))
        except UNREADABLE as error:
            found.broken[name] = reason(error)
    listed = {_plain(name).casefold() for name in (*labels, *found.unnamed)}
    inside = {path: key for key, path in files.items()}
    found.unlisted = sorted(key for key in inside.values() if key.casefold() not in listed)
    _find_masks(found)
    return found


def _plain(name: str) -> str:
    """A name as it is compared: one form of accents, forward slashes, no `images/` in front."""
    name = unicodedata.normalize("NFC", name.strip().replace("\\", "/")).removeprefix("./")
    return name.removeprefix("images/")


def _find_table(root: Path) -> Path | None:
    if (root / "labels.csv").is_file():
        return root / "labels.csv"
    tables = visible(root.glob("*.csv"))
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise UserError(f"{root} holds several tables ({names}); name the one of the labels labels.csv.")
    return tables[0] if tables else None


def decode_text(path: Path) -> str:
    """A text file in UTF-8 or UTF-16 with or without a byte order mark, or else in Windows-1252."""
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _read_rows(path: Path) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Name, classes and split of every row; classes are separated by `;`, `,` or `|`."""
    lines = [line for line in decode_text(path).splitlines() if line.strip()]
    head = lines[0] if lines else ""
    separator = max(",;\t", key=head.count)
    columns = [cell.strip().strip('"').lower() for cell in head.split(separator)]
    if not {"image", "classes"} <= set(columns):
        shown = ", ".join(columns)[:80] or "nothing"
        raise UserError(f"{path}: the first line names {shown}; it must name the columns image and classes.")
    try:
        table = list(csv.reader(lines[1:], delimiter=separator))
    except csv.Error as error:
        raise UserError(f"{path}: this is no table ({error}); save it as comma-separated UTF-8.") from error
    for cells in table:
        if len(cells) > len(columns) and columns[-1] == "classes":  # a,cat,dog under image,classes
            cells = [*cells[: len(columns) - 1], ";".join(cells[len(columns) - 1 :])]
        row = dict(zip(columns, [cell.strip() for cell in cells], strict=False))
        if row.get("image"):
            names = re.split(r"[;,|]", row.get("classes", ""))
            yield row["image"], tuple(name.strip() for name in names if name.strip()), row.get("split", "")


def _rows_of_folders(root: Path, base: Path) -> Iterator[tuple[str, tuple[str, ...], str]]:
    folders = [path for path in visible(base.iterdir()) if path.is_dir() and path.name != "masks"]
    if not folders:
        raise UserError(
            f"{root} has neither labels.csv nor a folder for each class; write one row per image with the "
            "columns image, classes."
        )
    for folder in folders:
        for path in visible(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                yield f"{folder.name}/{path.name}", (folder.name,), ""


def _joined(found: Survey, rows: list) -> dict[str, tuple[tuple[str, ...], str]]:
    """Classes and split by the name of the image; rows without a class are left out, repeated ones joined."""
    labels: dict[str, tuple[tuple[str, ...], str]] = {}
    spelt: dict[str, str] = {}  # how a name is compared → how it was written first
    for name, classes, split in rows:
        if not classes:
            found.unnamed.append(name)
            continue
        first = spelt.setdefault(_plain(name), name)
        known, kept = labels.get(first, ((), split))
        if first in labels:
            found.twice.append(name)
        labels[first] = tuple(sorted({*known, *classes} - {"background"})), kept
    return labels


def _class_list(root: Path, labels: dict) -> tuple[str, ...]:
    """The classes in the order of the mask ids: `classes.txt`, else those of the table by name."""
    named = sorted({name for classes, _ in labels.values() for name in classes})
    listed = root / "classes.txt"
    if listed.is_file():
        lines = [line.strip() for line in decode_text(listed).splitlines() if line.strip()]
        lacking = sorted(set(named) - set(lines))
        if lacking or len(set(lines)) < len(lines) or "background" in lines:
            wrong = (
                f"'{lacking[0]}' is missing"
                if lacking
                else "a class is listed twice, or the background is listed"
            )
            raise UserError(f"{listed}: {wrong}; list every class of the table once, or delete the file.")
        named = lines
    unfit = [name for name in named if not name.isprintable() or "$" in name]
    if unfit:
        raise UserError(f"{root}: '{unfit[0]}' cannot be a class; write names without '$'.")
    if len(named) >= IGNORE:
        raise UserError(
            f"{root}: the table names {len(named)} classes; at most {IGNORE - 1} can be told apart."
        )
    return tuple(named)


def _files(root: Path, base: Path) -> dict[str, Path]:
    """The images of a folder and its subfolders, by name as it is compared, also in small letters."""
    found: dict[str, Path] = {}
    aside = (root / "masks", base / "masks")
    for path in visible([*base.glob("*"), *base.glob("*/*")]):
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.parent not in aside:
            found[_plain(path.relative_to(base).as_posix())] = path
    return {key.casefold(): path for key, path in found.items()} | found


def _look(name: str, path: Path, classes: tuple[str, ...], split: str) -> Photo:
    """Decode an image, JPEG at reduced size, and note what it is.

    Raises:
        UNREADABLE: it is no image, damaged, too small or too large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        file = Image.open(path)
    with file:
        width, height = file.size
        if min(width, height) < SMALLEST:
            raise ValueError(f"{width}×{height} pixels; each side needs {SMALLEST}")
        converted = file.mode not in ("RGB", "L") or getattr(file, "n_frames", 1) > 1
        turn = file.getexif().get(ExifTags.Base.Orientation, 1)  # 1 upright, 5 and more on its side
        file.draft(None, (256, 256))
        upright = as_rgb(ImageOps.exif_transpose(file))
    size = (height, width) if turn >= 5 else (width, height)
    grey = np.asarray(upright.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    digest = np.packbits(np.diff(grey) > 0).tobytes()
    return Photo(name, path, classes, split, size, turn > 1, converted, digest)


def reason(error: BaseException) -> str:
    """Why an image cannot be used, in a few words."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image"
    return str(error)


def _find_masks(found: Survey) -> None:
    """Masks of the usable images; those that do not fit are noted."""
    folder = found.root / "masks"
    there = {_plain(path.stem): path for path in sorted(folder.glob("*.png"))}
    for photo in found.photos:
        path = there.get(_plain(photo.stem)) or there.get(_plain(Path(photo.name).stem))
        if path is None:
            continue
        try:
            read_mask(path, len(found.classes), photo.size)
            found.masks[photo.name] = path
        except UserError as error:
            found.bad_masks[path.name] = str(error)
