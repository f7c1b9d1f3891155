"""Your own images: a folder with `images/`, a table of labels and, to measure, `masks/`."""

from collections.abc import Iterable
from pathlib import Path

from ssepa_lib.data.datasets import FileDataset, refuse_missing, stems
from ssepa_lib.data.images import IGNORE, IMAGE_SUFFIXES
from ssepa_lib.errors import UserError
from ssepa_lib.files import visible
from ssepa_lib.readers import read_lines, read_table


def read_label_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV with the columns image, classes (separated by `;`) and, optionally, split.

    Raises:
        UserError: missing file, missing or unknown columns, a row too long, without class, or for an image
            seen before.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; write one row per image with the columns image, classes.")
    columns, rows = read_table(path, "table of labels")
    lacking = {"image", "classes"} - set(columns)
    unknown = set(columns) - {"image", "classes", "split"}
    if lacking or unknown:
        problem = f"column '{min(lacking)}' is missing" if lacking else f"column '{min(unknown)}' is unknown"
        raise UserError(f"{path}: {problem}; the columns are image, classes and, optionally, split.")
    seen = set()
    for number, row in enumerate(rows, start=2):
        where = f"{path}, line {number}"
        if not row["classes"]:
            raise UserError(f"{where}: {row['image']} has no class; name one, or 'background' for none.")
        if row["image"] in seen:
            raise UserError(
                f"{where}: {row['image']} is listed twice; keep one row and join its classes by ';'."
            )
        seen.add(row["image"])
    return rows


def class_names(row: dict[str, str]) -> list[str]:
    """Names of the classes in a row of the table, sorted, without the background."""
    return sorted({name.strip() for name in row["classes"].split(";")} - {"", "background"})


class TableDataset(FileDataset):
    """Images whose labels are in a table; `rows` are those of `read_label_table`."""

    def __init__(
        self,
        split: str,
        classes: Iterable[str],
        table: Path,
        rows: list[dict[str, str]],
        images: list[Path],
        masks: list[Path | None],
    ) -> None:
        super().__init__(split, classes, images, masks)
        self._labels = {i: self.multi_hot(class_names(row), table) for i, row in enumerate(rows)}


class FolderDataset(TableDataset):
    """Your own images: `images/*.jpg|png`, `labels.csv`, and optionally `classes.txt` and `masks/<stem>.png`.

    `labels.csv` has the columns image (file name), classes (separated by `;`, `background` for none) and
    optionally split; without that column every split is the whole folder. `classes.txt` has one class per
    line, without `;` and `$`, in the order of the mask ids; without it, the classes are those of the table in
    alphabetical order.
    Masks are needed only where something is measured. Images are turned upright by their EXIF tag.

    Raises:
        UserError: missing files, a row without its image, an image without its row, a mask without its image,
            an unknown class or an empty split.
    """

    name = "folder"
    root_variable = "FOLDER_ROOT"
    upright = True

    def __init__(self, root: Path | str, split: str) -> None:
        root = Path(root)
        folder = root / "images"
        table = root / "labels.csv"
        if not folder.is_dir():
            raise UserError(
                f"{folder} is missing; put your images there or set data.root to the folder that holds it."
            )
        rows = read_label_table(table)
        self._match_images(folder, table, [row["image"] for row in rows])
        painted = self._match_masks(root, [row["image"] for row in rows])
        classes = self._read_classes(root / "classes.txt", rows)
        rows = self._select(table, rows, split)
        images = [folder / row["image"] for row in rows]
        masks = [root / "masks" / f"{p.stem}.png" if p.stem in painted else None for p in images]
        super().__init__(split, classes, table, rows, images, masks)

    @staticmethod
    def _match_images(folder: Path, table: Path, listed: list[str]) -> None:
        """Raise UserError unless the table lists exactly the folder's images, each with its own stem."""
        there = {path.name for path in visible(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
        missing = [name for name in listed if name not in there]
        refuse_missing(
            missing, len(listed), f"{table}: images listed", f"add them to {folder} or delete their rows"
        )
        refuse_missing(
            sorted(there - set(listed)),
            len(there),
            f"{folder}: rows of labels.csv for its images",
            "add a row for each or move the images away",
        )
        last = {Path(name).stem: name for name in listed}
        for name in listed:
            if last[Path(name).stem] != name:
                raise UserError(
                    f"{folder / name}: another image has the same name before the suffix; rename one."
                )

    @staticmethod
    def _match_masks(root: Path, listed: list[str]) -> set[str]:
        """Stems of the masks; raise UserError if one has no image."""
        painted = stems(root / "masks", ".png")
        refuse_missing(
            sorted(painted - {Path(name).stem for name in listed}),
            len(painted),
            f"{root / 'masks'}: images of masks",
            f"add them to {root / 'images'} or delete the masks",
        )
        return painted

    @staticmethod
    def _read_classes(path: Path, rows: list[dict[str, str]]) -> list[str]:
        if path.exists():
            names = read_lines(path, "list of classes")
            if len(set(names)) < len(names) or "background" in names:
                raise UserError(f"{path}: list every class once, without the background.")
        else:
            path = path.with_name("labels.csv")
            names = sorted({name for row in rows for name in class_names(row)})
        for name in names:
            if not name.isprintable() or set(name) & set(";$"):
                raise UserError(f"{path}: '{name}' cannot be a class; write names without ';' and '$'.")
        if not 0 < len(names) < IGNORE:
            raise UserError(f"{path}: {len(names)} classes; give 1 to {IGNORE - 1}.")
        return names

    @staticmethod
    def _select(table: Path, rows: list[dict[str, str]], split: str) -> list[dict[str, str]]:
        """The rows of a split; all, where the table has no such column."""
        if not rows:
            raise UserError(f"{table}: there is no row; write one per image.")
        if "split" not in rows[0]:
            return rows
        chosen = [row for row in rows if row["split"] == split]
        if not chosen:
            known = ", ".join(sorted({row["split"] for row in rows}))
            raise UserError(f"{table}: split '{split}' is empty; the column split holds {known}.")
        return chosen
