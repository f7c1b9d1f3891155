"""What one step of training keeps in memory: counted, by formula, and as the peak."""

import pytest
import timm
import torch
from torch import nn

from ssepa_lib.compose import load_recipe
from ssepa_lib.evaluation.memory import (
    affinity_map_bytes,
    analytic_activation_bytes,
    peak_memory,
    saved_activation_bytes,
)
from ssepa_lib.model import PatchAffinity
from ssepa_lib.model.backbone import Backbone

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


def tiny_recipe():
    return load_recipe("shapes/toco", {"model.backbone_args": TINY, "model.weights": "none"})


def images(number, size):
    return torch.randint(0, 256, (number, 3, *size), dtype=torch.uint8)


def test_saved_bytes_of_a_known_graph():
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)

    def step():
        hidden = layer(x)  # saves x: 5·4 values
        activated = hidden.tanh()  # saves its output: 5·3
        return (activated * activated).sum()  # saves the same storage twice more

    assert saved_activation_bytes(step, layer) == 4 * (20 + 15)
    assert saved_activation_bytes(step) == 4 * (20 + 15)  # the weight is not saved: x needs no gradient
    x.requires_grad_()
    assert saved_activation_bytes(step, layer) == 4 * (20 + 15)
    assert saved_activation_bytes(step) == 4 * (20 + 15 + 12)
    with torch.no_grad():
        assert saved_activation_bytes(step, layer) == 0


def test_saved_bytes_do_not_count_graphs_already_dropped():
    x = torch.randn(100, requires_grad=True)

    def step():
        x.exp().exp()  # dropped at once
        return x.tanh()

    assert saved_activation_bytes(step) == 400


@pytest.mark.parametrize("checkpointing", [False, True])
def test_formula_equals_the_measured_bytes(checkpointing):
    recipe = tiny_recipe()
    backbone, image = Backbone(recipe.model, checkpointing=checkpointing), images(2, (32, 32))
    measured = saved_activation_bytes(lambda: backbone(image), backbone)
    terms = analytic_activation_bytes(2, 17, 24, 3, 2, pixels=3 * 32 * 32, checkpointing=checkpointing)
    assert measured == sum(terms.values())


def test_formula_holds_under_autocast_and_with_plain_attention(monkeypatch):
    recipe = tiny_recipe()
    backbone, image = Backbone(recipe.model), images(2, (32, 32))

    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return backbone(image)

    terms = analytic_activation_bytes(2, 17, 24, 3, 2, pixels=3 * 32 * 32, value=2)
    in_float32 = (
        3 * (3 * 2 + 4) * 2 * 17 * 24
    )  # three layers: queries, keys, values; the output beside its bf16 copy
    assert saved_activation_bytes(autocast, backbone) == sum(terms.values()) + in_float32
    monkeypatch.setattr("ssepa_lib.model.tap.SHORT", 0)
    assert saved_activation_bytes(autocast, backbone) == sum(terms.values())

    timm.layers.set_fused_attn(False)
    try:
        plain = Backbone(recipe.model)
    finally:
        timm.layers.set_fused_attn(True)
    terms = analytic_activation_bytes(2, 17, 24, 3, 2, pixels=3 * 32 * 32, fused=False)
    assert saved_activation_bytes(lambda: plain(image), plain) == sum(terms.values())


@pytest.mark.parametrize("strategy", ["stack_heads", "stack_layers", "matrix_free"])
def test_affinity_maps_are_as_large_as_said(strategy):
    attention = Backbone(tiny_recipe().model)(images(2, (32, 24)), capture=True).attention
    operator = PatchAffinity(attention, strategy=strategy)
    stacked = affinity_map_bytes(2, 13, 3, 2, strategy)
    peak = peak_memory(lambda: operator @ torch.zeros(2, 12, 1), "cpu")
    assert peak >= stacked
    assert stacked == {"stack_heads": 3 * 2, "stack_layers": 3, "matrix_free": 0}[strategy] * 2 * 13 * 13 * 4


def test_peak_memory_counts_what_lives_together():
    def step():
        a = torch.zeros(1000)
        b = torch.zeros(1000)
        del a
        return b, torch.zeros(500)

    assert peak_memory(step, "cpu") == 8000
