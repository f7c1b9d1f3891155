"""Every setting, far outside of what it allows: a valid recipe, or one sentence that names the setting.

The values are generated from the declarations: a new setting is tested without a line here.
"""

import math
from dataclasses import replace
from typing import Annotated, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from ssepa_lib.compose import KEYS, SECTIONS, load_recipe, to_yaml
from ssepa_lib.errors import UserError
from ssepa_lib.fields import info
from ssepa_lib.readers import parse_yaml

BASE = {"voc/ssepa": load_recipe("voc/ssepa"), "shapes/afa": load_recipe("shapes/afa")}
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["${oc.env:HOME}", "../../x", "a\0b", "\u2028", "-1", "1e400", "nan", "true", "x" * 5000]
    ),
)
NESTED = st.recursive(
    ANYTHING,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


def rules(metadata):
    """The bounds in the metadata of a field, by name."""
    found = {}
    for item in metadata:
        for rule in item.metadata if isinstance(item, FieldInfo) else [item]:
            names = ("ge", "gt", "le", "lt", "min_length", "max_length")
            found |= {name: getattr(rule, name) for name in names if getattr(rule, name, None) is not None}
    return found


def unfold(kind, metadata):
    """A type without `Annotated`, and its bounds."""
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        metadata = [*metadata, *more]
    return kind, rules(metadata)


def beyond(kind, metadata=()):
    """Values around and beyond the bounds of a type, and of every other type."""
    kind, bounds = unfold(kind, metadata)
    if get_origin(kind) is list:
        most = bounds.get("max_length", 4) + 2
        return st.lists(beyond(get_args(kind)[0]), max_size=most) | NESTED
    edges = [value for name, value in bounds.items() if name in ("ge", "gt", "le", "lt")]
    near = [value + step for value in edges for step in (-1, -1e-9, 0, 1e-9, 1)]
    allowed = list(get_args(kind)) if kind not in (int, float) else []
    choices = [
        ANYTHING,
        *([st.sampled_from(near)] if near else []),
        *([st.sampled_from(allowed)] if allowed else []),
    ]
    return st.one_of(*choices) | NESTED


def is_within(kind, metadata, value):
    """Whether a value that was accepted keeps what its declaration says."""
    kind, bounds = unfold(kind, metadata)
    if get_origin(kind) is list:
        right = bounds.get("min_length", 0) <= len(value) <= bounds.get("max_length", math.inf)
        return right and all(is_within(get_args(kind)[0], (), each) for each in value)
    if kind not in (int, float):
        return not isinstance(value, str) or len(value) <= 4000
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    right = type(value) is kind and math.isfinite(value) and low <= value <= high
    return right and value != bounds.get("gt") and value != bounds.get("lt")


@pytest.mark.parametrize("key", KEYS)
@settings(max_examples=20)
@given(data=st.data())
def test_a_setting_far_outside_is_named(key, data):
    section, name = key.split(".")
    field = info(SECTIONS[section], name)
    value = data.draw(beyond(field.annotation, field.metadata))
    recipe = BASE[data.draw(st.sampled_from(sorted(BASE)))]
    try:
        changed = replace(recipe, **{section: replace(getattr(recipe, section), **{name: value})})
    except UserError as error:
        assert key in str(error) and len(str(error)) < 400
        return
    assert is_within(field.annotation, field.metadata, getattr(getattr(changed, section), name))
    assert len(changed.hash()) == 10


@settings(max_examples=60)
@given(key=st.sampled_from(KEYS), text=ANYTHING.map(str) | st.text())
def test_a_text_of_the_command_line_is_named_or_survives_a_file(key, text):
    try:
        recipe = load_recipe("shapes/toco", {key: text})
    except UserError as error:
        assert key in str(error)
        return
    section, name = key.split(".")
    stored = parse_yaml(to_yaml(recipe))[section][name]
    assert stored == getattr(getattr(recipe, section), name)
    if isinstance(stored, str):
        assert stored == text  # neither resolved nor interpreted
