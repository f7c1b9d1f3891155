"""Labels from a table: one row per image, with the names of its classes."""

import csv
from collections.abc import Iterable
from pathlib import Path

from ssepa_lib.data.datasets import FileDataset
from ssepa_lib.errors import UserError


def read_label_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV with the columns image, classes (separated by `;`) and, optionally, split.

    Raises:
        UserError: missing file, missing or unknown columns, a row too long, without class, or for an image
            seen before.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; write one row per image with the columns image, classes.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: unreadable table ({error}); save it as comma-separated UTF-8.") from error
    lacking = {"image", "classes"} - set(columns)
    unknown = set(columns) - {"image", "classes", "split"}
    if lacking or unknown:
        problem = f"column '{min(lacking)}' is missing" if lacking else f"column '{min(unknown)}' is unknown"
        raise UserError(f"{path}: {problem}; the columns are image, classes and, optionally, split.")
    seen = set()
    for number, row in enumerate(rows, start=2):
        where = f"{path}, line {number}"
        if None in row or None in row.values():
            raise UserError(f"{where}: {len(columns)} values expected; separate classes by ';'.")
        row.update({key: value.strip() for key, value in row.items()})
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
    """Images whose labels stand in a table; `rows` are those of `read_label_table`."""

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
