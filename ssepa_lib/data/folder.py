"""Your own images: a folder with `images/`, `labels.csv` and, to measure, `masks/`."""

from pathlib import Path

from ssepa_lib.data.datasets import refuse_missing, stems
from ssepa_lib.data.images import IGNORE, IMAGE_SUFFIXES
from ssepa_lib.data.tables import TableDataset, class_names, read_label_table
from ssepa_lib.errors import UserError


class FolderDataset(TableDataset):
    """Your own images: `images/*.jpg|png`, `labels.csv`, and optionally `classes.txt` and `masks/<stem>.png`.

    `labels.csv` has the columns image (file name), classes (separated by `;`, `background` for none) and
    optionally split; without that column every split is the whole folder. `classes.txt` has one class per
    line, in the order of the mask ids; without it, the classes are those of the table in alphabetical order.
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
        there = {path.name for path in folder.iterdir() if path.name.lower().endswith(IMAGE_SUFFIXES)}
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
        if path.is_file():
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
            names = [line for line in lines if line]
            if len(set(names)) < len(names) or "background" in names:
                raise UserError(f"{path}: list every class once, without the background.")
        else:
            names = sorted({name for row in rows for name in class_names(row)})
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
