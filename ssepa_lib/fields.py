"""What a section of settings is: typed fields with bounds, one sentence per error, and an identity.

`settings.py` declares the sections. Pydantic checks values wherever a section is made, by `load_recipe` as
well as by `dataclasses.replace`; its report becomes one sentence with setting, value and what is allowed.
"""

import reprlib
from dataclasses import MISSING, asdict, field, fields
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from ssepa_lib.errors import UserError, nearest

Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Temperature = Annotated[float, Field(gt=0, le=100)]
Scale = Annotated[float, Field(ge=0.05, le=20)]
Share = Annotated[float, Field(ge=0.001, le=1)]
Count = Annotated[int, Field(ge=1, le=100_000_000)]
Images = Annotated[int, Field(ge=0, le=100_000_000)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
Batch = Annotated[int, Field(ge=1, le=65536)]
Width = Annotated[int, Field(ge=1, le=65536)]
Rate = Annotated[float, Field(gt=0, le=100)]
Scales = Annotated[list[Scale], Field(min_length=1, max_length=16)]
Dilation = Annotated[int, Field(ge=1, le=512)]
TWO = Field(min_length=2, max_length=2)  # [low, high] or [first, last]
_TEXTS = {  # pattern of a text: in words
    r"^[^\x00-\x1f\x7f]{0,4000}$": "a path without control characters",
    r"^[^/\\\x00-\x1f\x7f]{1,200}$": "a name without slashes and control characters",
    r"^[^/\\\x00-\x1f\x7f]{0,200}$": "empty, or a name without slashes and control characters",
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$": "a name of letters, digits, '_', '-' and '.'",
}
_PATH, _NAME, _OPTIONAL_NAME, _WORD = (Field(pattern=pattern) for pattern in _TEXTS)
PathText = Annotated[str, _PATH]
Name = Annotated[str, _NAME]
OptionalName = Annotated[str, _OPTIONAL_NAME]
Word = Annotated[str, _WORD]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class NotTrained:
    """Marks a field that leaves the trained weights alone: it is not part of a recipe's identity."""


CONFIG = ConfigDict(
    extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, coerce_numbers_to_str=True
)


def values(*default: Any) -> Any:
    """The default of a field that holds a list."""
    return field(default_factory=lambda: list(default))


@dataclass(frozen=True, config=CONFIG)
class Section:
    """A group of settings; an unknown field or a value that is not allowed raises `UserError`."""

    __pydantic_fields__: ClassVar[dict[str, FieldInfo]]
    KEY: ClassVar[str] = ""
    """Name of the section in a recipe."""
    REVISION: ClassVar[int] = 1
    """Raised when the same settings would train something else; part of the identity above 1."""

    def __init_subclass__(cls, key: str = "") -> None:
        cls.KEY = key

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_sentence(cls, given: Any, handler: Any) -> Any:
        _refuse_truth_values(cls, given)
        try:
            return handler(given)
        except ValidationError as error:
            raise UserError(_sentence(cls, error.errors()[0])) from None

    def require_order(self, *names: str) -> None:
        """Refuse [low, high] fields whose values are the wrong way round."""
        for name in names:
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"{self.KEY}.{name} is [{low}, {high}]; it must be [low, high], low first.")

    def identity(self) -> dict[str, Any]:
        """The trained fields that differ from their defaults, and the revision if there has been one."""
        content = {} if self.REVISION == 1 else {"REVISION": self.REVISION}
        for item, value in zip(fields(self), asdict(self).values(), strict=True):
            if is_trained(type(self), item.name) and value != default(item):
                content[item.name] = value
        return content


def _refuse_truth_values(section: type[Section], given: Any) -> None:
    """Pydantic would read true as 1 where a number is wanted."""
    content = getattr(given, "kwargs", given)  # of a call, or of a mapping
    for name, value in content.items() if isinstance(content, dict) else ():
        field = section.__pydantic_fields__.get(str(name))
        if field is None or not (field.annotation in (int, float) or get_origin(field.annotation) is list):
            continue
        for place, each in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(each, bool):
                loc = (name, place) if isinstance(value, list) else (name,)
                raise UserError(_sentence(section, {"loc": loc, "input": each}))


def default(item: Any) -> Any:
    """The default of a dataclass field."""
    return item.default if item.default is not MISSING else item.default_factory()


def info(section: type[Section], name: str) -> FieldInfo:
    """Type, bounds, markers and description of a field."""
    return section.__pydantic_fields__[name]


def is_trained(section: type[Section], name: str) -> bool:
    """Whether the field may change the trained weights."""
    return NotTrained not in info(section, name).metadata


def allowed(kind: Any, metadata: tuple | list = ()) -> str:
    """What a type lets through, in words: "a whole number from 1 to 10", "one of mean, max"."""
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        metadata = [*metadata, *more]
    bounds = {}
    for item in metadata:
        for rule in item.metadata if isinstance(item, FieldInfo) else [item]:
            names = ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern")
            bounds |= {name: getattr(rule, name) for name in names if getattr(rule, name, None) is not None}
    if "pattern" in bounds:
        return _TEXTS[bounds["pattern"]]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        return _allowed_list(get_args(kind)[0], bounds)
    if kind in (int, float):
        return f"a {'whole ' if kind is int else ''}number {_range(bounds)}"
    words = {bool: "true or false", str: "a text"}
    return words.get(kind, "a mapping")


def _allowed_list(kind: Any, bounds: dict[str, Any]) -> str:
    least, most = bounds.get("min_length", 0), bounds.get("max_length")
    length = f"{least}" if least == most else f"{least} to {most}"
    return f"a list of {length} values, each {allowed(kind)}"


def _range(bounds: dict[str, Any]) -> str:
    def number(value: float) -> str:
        return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:g}"

    words = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}
    return " ".join(words[name].format(number(bounds[name])) for name in words if name in bounds)


def _sentence(section: type[Section], error: dict[str, Any]) -> str:
    """One report of pydantic as one sentence."""
    if not error["loc"]:
        return f"{section.KEY} holds {shown(error['input'])}; write settings, like `{section.KEY}: {{…}}`."
    name = str(error["loc"][0])
    key = f"{section.KEY}.{name}".lstrip(".")
    known = section.__pydantic_fields__
    if name not in known:
        return f"there is no setting {key}; {nearest(name, list(known))}"
    what = allowed(info(section, name).annotation, info(section, name).metadata)
    return f"{key} is {_shown(error, name)}; it must be {what}."


def shown(value: Any) -> str:
    """A value as it is written in Python, cut after 60 characters."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "…"


def _shown(error: dict[str, Any], name: str) -> str:
    """The value that was refused, with its place in a list."""
    text = shown(error["input"])
    return text if len(error["loc"]) == 1 else f"{text} (value {error['loc'][1]})"
