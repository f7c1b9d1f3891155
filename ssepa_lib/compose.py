"""Recipes from files: `load_recipe("voc/fsr+ssepa", {"train.steps": 500})`.

A name is `data/method[/backbone]`; its parts are YAML files below `recipes/`, merged in this order into the
defaults. Methods compose with `+`; what a method needs on some data alone is a file of `recipes/pair`, merged
directly after the method. A name ending in .yaml is a path, such as that of a run's `recipe.yaml`.
Settings that have been renamed are still understood, wherever they come from.
"""

import difflib
import itertools
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, get_origin

import yaml

from ssepa_lib.errors import UserError
from ssepa_lib.fields import Section, allowed, default, info, is_trained, shown
from ssepa_lib.files import write_text
from ssepa_lib.paths import RECIPES
from ssepa_lib.readers import FLOATS, parse_yaml, read_text
from ssepa_lib.recipe import Recipe

FORMAT = 2  # of recipe files; raised when an older version could not read them
SUFFIXES = (".yaml", ".yml")
KINDS = ("data", "method", "backbone")
PAIR = "pair"  # folder of what a method needs on some data alone, <data>+<method>.yaml
ALIASES = {"ssepa_fsr": "fsr+ssepa"}  # methods that have become compositions
RENAMED: dict[
    str, str | dict[str, str]
] = {  # old field: its new name; field: its old values and their new names
    "affinity.source": "affinity.attention",
    "affinity.steps": "affinity.iterations",
    "affinity.supervision": "affinity.haaf_objective",
    "affinity.supervision_weight": "affinity.haaf_weight",
    "losses.switch": "losses.segmentation_start",
    "affinity.attention": {"softmax": "probabilities"},
    "affinity.strategy": {
        "all_heads": "stack_heads",
        "haaf_dense": "stack_layers",
        "haaf_fused": "matrix_free",
    },
}
HEAD = ("format", "name", "title", "short")  # what a recipe file holds besides sections
SECTIONS: dict[str, type[Section]] = {
    item.name: item.default_factory for item in fields(Recipe) if isinstance(item.default_factory, type)
}
KEYS = [f"{section}.{item.name}" for section, kind in SECTIONS.items() for item in fields(kind)]
_log = logging.getLogger(__name__)


class _Dumper(yaml.SafeDumper):
    """One setting per line, lists on one line, texts with Unicode's line separators in double quotes."""


# a text such as 0E0, which would be read as a number, is quoted
_Dumper.add_implicit_resolver(*FLOATS)
_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True)
)
_Dumper.add_representer(  # PyYAML would write these three as line breaks and read them as blanks
    str,
    lambda dumper, data: dumper.represent_scalar(
        "tag:yaml.org,2002:str", data, '"' if set(data) & set("\x85\u2028\u2029") else None
    ),
)


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Compose a recipe.

    Args:
        name: `data/method`, `data/method/backbone` (files below `recipes/`), or the path of a YAML file.
        overrides: dotted keys, for example `{"train.steps": 500, "data.root": "/voc"}`; a text is read by the
            type of the field, so that the command line can pass "500", "true" or "[1.0, 1.5]".

    Raises:
        UserError: an unknown name or key, a broken file, a value of the wrong type or out of range, or
            settings that contradict each other.
    """
    is_file = name.endswith(SUFFIXES)
    merged: dict[str, Any] = {"name": name}
    for path in [Path(name)] if is_file else _files(name):
        _add(merged, _translated(_read(path), f"recipe file {path}"))
    if not is_file or "title" not in merged:
        merged["title"] = method_title(merged["name"])
    _add(merged, _translated(_nested(overrides or {}), f"recipe '{name}'"))
    try:
        return Recipe(**{key: value for key, value in merged.items() if key not in ("format", "short")})
    except UserError as error:
        raise UserError(f"recipe '{name}': {error}") from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a complete recipe as YAML; `load_recipe(str(path))` reads it back unchanged."""
    write_text(path, to_yaml(recipe))


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML, with the version of the file format."""
    content = {"format": FORMAT, **asdict(recipe)}
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def method_title(name: str) -> str:
    """Display name of a method ("ssepa", "fsr+ssepa") or of the method of a recipe ("voc/ssepa/vit_base")."""
    if name.endswith(SUFFIXES):
        return Path(name).stem
    method = name.split("/")[1] if "/" in name else name
    parts = ALIASES.get(method, method).split("+")
    paths = [RECIPES / "method" / f"{part}.yaml" for part in parts]
    if not all(path.is_file() for path in paths):
        return method
    contents = [_read(path) for path in paths]
    if len(contents) == 1:
        return contents[0].get("title", method)
    return " + ".join(content.get("short") or content.get("title", method) for content in contents)


def explain(key: str) -> str:
    """Meaning, allowed values and default of a setting ("model.backbone") or of those of a section ("model").

    Raises:
        UserError: there is no such setting.
    """
    section, _, name = key.partition(".")
    if section not in SECTIONS or (name and key not in KEYS):
        raise UserError(_unknown(key))
    kind = SECTIONS[section]
    items = {item.name: item for item in fields(kind)}
    if not name:
        return "\n".join([kind.__doc__ or "", "", *(explain(f"{section}.{item}") for item in items)])
    field = info(kind, name)
    lines = [f"{key}: {allowed(field.annotation, field.metadata)}", f"  {field.description}"]
    lines.append(f"  default: {default(items[name])!r}")
    if not is_trained(kind, name) or section == "eval":
        lines.append("  does not affect training")
    return "\n".join(lines)


def list_parts() -> str:
    """The parts of which recipes are made, each with the first sentence of its file."""
    lines = []
    for kind in (*KINDS, PAIR):
        lines.append(f"{kind}:")
        for path in sorted((RECIPES / kind).glob("*.yaml")):
            lines.append(f"  {path.stem:20} {_first_sentence(path.read_text(encoding='utf-8'))}")
    return "\n".join(lines)


def _first_sentence(text: str) -> str:
    """The first sentence of the comment at the top of a file; a full stop before a capital ends it."""
    comment = " ".join(line.lstrip("# ") for line in itertools.takewhile(_is_comment, text.splitlines()))
    return re.split(r"(?<=\.) (?=[A-Z])", comment)[0]


def _is_comment(line: str) -> bool:
    return line.startswith("#")


def _files(name: str) -> list[Path]:
    """The YAML files behind `data/method[/backbone]`, in merge order."""
    parts = name.split("/")
    if len(parts) not in (2, 3):
        raise UserError(f"recipe '{name}': write data/method or data/method/backbone, for example voc/ssepa.")
    parts[1] = ALIASES.get(parts[1], parts[1])
    files = []
    for kind, names in zip(KINDS, parts, strict=False):
        for part in names.split("+") if kind == "method" else [names]:
            path = RECIPES / kind / f"{part}.yaml"
            if not part or not path.is_file():
                known = sorted(p.stem for p in (RECIPES / kind).glob("*.yaml"))
                raise UserError(
                    f"recipe '{name}': there is no {kind} '{part}'; choose one of {', '.join(known)}."
                )
            files.append(path)
            pair = RECIPES / PAIR / f"{parts[0]}+{part}.yaml"
            files += [pair] if kind == "method" and pair.is_file() else []
    return files


def _read(path: Path) -> dict[str, Any]:
    """The settings in a YAML file."""
    if not path.exists():
        raise UserError(f"recipe file {path} does not exist; pass data/method or a YAML file.")
    try:
        content = parse_yaml(read_text(path, "recipe file"))
    except ValueError as error:
        raise UserError(f"recipe file {path} cannot be read ({error}); correct it, in UTF-8.") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"recipe file {path} holds no sections; write settings like `train: {{steps: 5}}`.")
    version = content.get("format", 1)
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT:
        raise UserError(
            f"recipe file {path} was written by a newer version (format {shown(version)}, known up to "
            f"{FORMAT}); update the library."
        )
    return content


def _nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections; texts are read as YAML where the field holds a list or a mapping."""
    content: dict[str, Any] = {}
    for key, value in overrides.items():
        section, *rest = key.split(".")
        if section in ("format", "short") or (section in HEAD and rest):
            raise UserError(_unknown(key))
        if isinstance(value, str) and rest and _kind(section, rest[0]) in (list, dict):
            value = _yaml(key, value)
        for part in reversed([section, *rest]):
            value = {part: value}
        _merge(content, value)
    return content


def _add(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    """Merge settings; another backbone starts without the arguments and the weights of the one before."""
    model = target.get("model", {})
    name = source.get("model", {}).get("backbone")
    if name is not None and name != model.get("backbone"):
        for key in ("backbone_args", "weights"):
            model.pop(key, None)
    _merge(target, source)


def _merge(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    """Merge mappings into mappings; anything else replaces what was there."""
    for key, value in source.items():
        if isinstance(value, Mapping):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            _merge(target[key], value)
        else:
            target[key] = value


def _kind(section: str, name: str) -> Any:
    """list or dict for a field that holds one."""
    return get_origin(info(SECTIONS[section], name).annotation) if f"{section}.{name}" in KEYS else None


def _yaml(key: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise UserError(f"'{key}={text}' is not YAML; write for example eval.scales=[1.0,1.5].") from error


def _translated(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings under today's names; one line on standard error says what has been renamed."""
    result: dict[str, Any] = {}
    changes: list[str] = []
    for section, settings in content.items():
        if section in HEAD:
            result[section] = settings
            continue
        if section not in SECTIONS:
            raise UserError(f"{source}: {_unknown(str(section))}")
        if not isinstance(settings, Mapping | None):
            raise UserError(
                f"{source}: {section} is {shown(settings)}; write settings, like `{section}: {{…}}`."
            )
        result[section] = {}
        for name, value in (settings or {}).items():
            key, value = _renamed(f"{section}.{name}", value, changes)
            if key not in KEYS:
                raise UserError(f"{source}: {_unknown(key)}")
            result[section][key.partition(".")[2]] = value
    if changes:
        _warn_once(f"{source}: {'; '.join(changes)}.")
    return result


def _renamed(key: str, value: Any, changes: list[str]) -> tuple[str, Any]:
    """A setting under today's name and with today's value; what was translated is added to `changes`."""
    new = RENAMED.get(key, key)
    new = new if isinstance(new, str) else key
    if new != key:
        changes.append(f"{key} is now {new}")
    values = RENAMED.get(new, {})
    if isinstance(value, str) and value in values:
        changes.append(f"{new} {value} is now {values[value]}")
        value = values[value]
    return new, value


def _unknown(key: str) -> str:
    """A sentence about a key that does not exist, with the nearest that does."""
    leaf = key.rpartition(".")[2]
    same = [known for known in KEYS if known.endswith(f".{leaf}")]
    close = same or difflib.get_close_matches(key, [*KEYS, *SECTIONS], n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the sections are {', '.join(SECTIONS)}."
    return f"there is no setting {key}; {hint}"


@lru_cache
def _warn_once(text: str) -> None:
    _log.warning(text)
