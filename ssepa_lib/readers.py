"""Files that people write or exchange: one reader each for text, tables, JSON and YAML.

Every fault ends in one sentence that names the file. A text is UTF-8, with or without a byte order mark;
lines end as on any system. Nothing in a file is executed, expanded or looked up.
"""

import codecs
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import yaml

from ssepa_lib.errors import UserError

FORMULA = tuple("=+-@\t")  # a spreadsheet would calculate a cell that begins with one of these
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path, what: str) -> str:
    """A text file without byte order mark, its lines separated by a line feed.

    Args:
        path: the file.
        what: what it is, for the error, for example "recipe file".

    Raises:
        UserError: it is missing, no file, or no text in UTF-8.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{what} {path} cannot be read ({reason}); correct the path or the file.") from error
    return decode(content, f"{what} {path}")


def decode(content: bytes, name: str) -> str:
    """Bytes in UTF-8 as `read_text` gives them; `name` is for the error."""
    try:
        if content.startswith(_WIDE):
            raise ValueError("it is UTF-16")
        text = content.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds NUL bytes")
    except ValueError as error:
        raise UserError(
            f"{name} cannot be read as text ({error}); save it as plain text in UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file that are not empty, without blanks at both ends; see `read_text`."""
    lines = (line.strip() for line in read_text(path, what).split("\n"))
    return [line for line in lines if line]


def read_table(path: Path, what: str) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a comma-separated file whose first line names the columns.

    Blanks around a value are dropped, as is the apostrophe by which `files.write_csv` marks a text that looks
    like a formula.

    Raises:
        UserError: see `read_text`; no column, a column named twice, or a row with another number of values.
    """
    text = read_text(path, what)
    try:
        reader = csv.reader(io.StringIO(text), strict=True)
        (_, header), *rows = [(reader.line_num, row) for row in reader if row] or [(1, [])]
    except csv.Error as error:
        raise UserError(f"{path}: unreadable table ({error}); save it as comma-separated UTF-8.") from error
    columns = [name.strip() for name in header]
    if not any(columns):
        raise UserError(f"{path} is empty; write the names of the columns into its first line.")
    for name in columns:
        if columns.count(name) > 1:
            raise UserError(f"{path}: column '{name}' is there twice; give every column its own name.")
    for number, row in rows:
        if len(row) != len(columns):
            raise UserError(
                f"{path}, line {number}: {len(columns)} values expected, {len(row)} found; separate "
                "values by ',' and classes by ';'."
            )
    return columns, [dict(zip(columns, map(_plain, row), strict=True)) for _, row in rows]


def _plain(value: str) -> str:
    value = value.strip()
    return value[1:] if value.startswith("'") and value[1:].startswith(FORMULA) else value


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        what: what it is, for the error, for example "the metrics of a run".

    Raises:
        UserError: the file is missing, unreadable or not JSON; NaN and infinity are not JSON.
    """
    try:
        return parse_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{what} cannot be read from {path} ({reason}); correct or delete the file."
        ) from error


def parse_json(text: str | bytes) -> Any:
    """The value of a text in JSON.

    Raises:
        ValueError: it is none, is nested too deeply, or holds NaN or infinity.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, not a text, a key occurs once, and nothing refers to something else."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"'{key}' is there twice")
        return super().construct_mapping(node, deep)


_POWER_OF_TEN = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z")
FLOATS = ("tag:yaml.org,2002:float", _POWER_OF_TEN, list("-+.0123456789"))
_Loader.add_implicit_resolver(*FLOATS)


def parse_yaml(text: str) -> Any:
    """The value of a text in YAML.

    Raises:
        ValueError: it is none, names a key twice, refers to another part, or is nested too deeply.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
