"""The private names of torch and timm exist in the installed versions, and only one file uses them."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch

import ssepa_lib
from ssepa_lib import private_api
from ssepa_lib.private_api import NAMES, call_uncompiled, embed_positions, embeds_positions, is_compiled

SUPPORTED = "torch 2.11 to 2.15 and timm from 1.0.20 on"
PACKAGE = Path(ssepa_lib.__file__).parent


def resolve(path):
    """The module or class behind an import path."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner in NAMES for name in NAMES[owner]])
def test_every_private_name_exists(owner, name):
    installed = f"torch {torch.__version__} and timm {timm.__version__}"
    advice = f"{owner}.{name} is missing in {installed}; supported are {SUPPORTED}."
    assert hasattr(resolve(owner), name), advice


def test_only_one_file_uses_them():
    names = [name for group in NAMES.values() for name in group]
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, names))})\b")
    files = {p for p in PACKAGE.rglob("*.py") if pattern.search(p.read_text(encoding="utf-8"))}
    assert files == {Path(private_api.__file__)}


def test_every_name_is_used():
    text = Path(private_api.__file__).read_text(encoding="utf-8").split("}", 1)[1]  # behind the table
    assert all(name in text for group in NAMES.values() for name in group)


def test_a_compiled_module_is_told_apart_and_called_past_its_compiled_form():
    plain, compiled = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    compiled._compiled_call_impl = lambda x: pytest.fail("the compiled form was called")
    assert not is_compiled(plain) and is_compiled(compiled)
    x = torch.rand(4, 3)
    assert torch.equal(call_uncompiled(compiled, x), compiled.forward(x))


def test_positions_of_a_plain_vision_transformer():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **options)
    tokens, rotary = embed_positions(vit, torch.rand(2, 4, 4, 32))
    assert embeds_positions(vit) and tokens.shape == (2, 17, 32) and rotary is None
    assert not embeds_positions(torch.nn.Linear(1, 1))


def test_a_cpu_multiplies_bf16_where_one_of_torchs_probes_says_so(monkeypatch):
    old, new = private_api.NAMES["torch.cpu"]
    monkeypatch.delattr(torch.cpu, old, raising=False)
    monkeypatch.delattr(torch.cpu, new, raising=False)
    assert not private_api.cpu_multiplies_bf16(), "a version of torch without probes"
    monkeypatch.setattr(torch.cpu, new, lambda: True, raising=False)
    assert private_api.cpu_multiplies_bf16()
    monkeypatch.setattr(torch.cpu, new, lambda: False)
    assert not private_api.cpu_multiplies_bf16()
