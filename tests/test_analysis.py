"""Attention statistics and activation accounting."""

import math

import pandas as pd
import pytest
import timm
import torch
from torch import nn

from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.analysis import (
    affinity_map_bytes,
    analytic_activation_bytes,
    attention_entropy,
    attention_statistics,
    class_attention,
    deep_layers,
    deep_summary,
    layer_maps,
    map_statistics,
    patch_distances,
    peak_memory,
    saved_activation_bytes,
)
from ssepa_lib.model.affinity import PatchAffinity
from ssepa_lib.model.backbone import Backbone
from ssepa_lib.model.network import Network
from ssepa_lib.recipe import load_recipe

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


def network(aggregator="class_token", **model):
    overrides = {"model.backbone_args": TINY, "model.weights": "none", "model.aggregator": aggregator}
    torch.manual_seed(0)
    return Network(load_recipe("shapes/toco", overrides | model), ("a", "b"))


def images(number=3, size=(32, 24), seed=0):
    return torch.randint(
        0, 256, (number, 3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def test_entropy_of_uniform_and_one_hot_attention():
    attention = torch.stack([torch.full((5,), 0.2), torch.eye(5)[2]])
    assert attention_entropy(attention).tolist() == pytest.approx([math.log(5), 0.0])


def test_distances_are_pixels_between_patch_centres():
    distances = patch_distances((2, 3), (8, 16))
    assert distances.shape == (6, 6)
    assert distances[0].tolist() == pytest.approx([0, 16, 32, 8, math.hypot(8, 16), math.hypot(8, 32)])


def test_map_statistics_by_hand():
    attention = torch.tensor(
        [[[1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [0.2, 0.8, 0.0]]]
    )  # class token and two patches
    entropy = (0 + (0.5 * math.log(2) + 0.5 * math.log(4)) - 0.2 * math.log(0.2) - 0.8 * math.log(0.8)) / 3
    distance = (
        0.5 * 16 + 1.0 * 16
    ) / 2  # patch 0 gives half of its attention among patches to patch 1, patch 1 all
    statistics = map_statistics(attention, patch_distances((1, 2), (16, 16)), prefix=1)
    assert statistics[0].tolist() == pytest.approx([entropy, distance, 0.35])
    assert map_statistics(attention[:, 1:, 1:], patch_distances((1, 2), (16, 16)), prefix=0)[0, 2].isnan()


@torch.no_grad()
def test_streaming_equals_dense_over_unequal_batches():
    net = network().eval()
    batches = [images(3, seed=0), images(1, seed=1)]
    table = attention_statistics(net, batches, "cpu")
    assert list(table.columns) == ["layer", "head", "entropy", "distance", "class_mass", "images"]
    assert len(table) == 3 * 2 and (table["images"] == 4).all()

    out = net.backbone(torch.cat(batches), capture=True)
    operator = PatchAffinity(out.queries, out.keys, out.prefix)
    rows, columns = torch.arange(12) // 3, torch.arange(12) % 3
    pixels = 8 * torch.hypot((rows[:, None] - rows).float(), (columns[:, None] - columns).float())
    for layer in range(3):
        p = operator.layer_map(layer).double()  # [4, H, 13, 13]
        among = p[..., 1:, 1:] / p[..., 1:, 1:].sum(-1, keepdim=True)
        for head in range(2):
            row = table[(table["layer"] == layer) & (table["head"] == head)].iloc[0]
            assert row["entropy"] == pytest.approx(float(-(p * p.log()).sum(-1)[:, head].mean()), rel=1e-5)
            assert row["distance"] == pytest.approx(float((among * pixels).sum(-1)[:, head].mean()), rel=1e-5)
            assert row["class_mass"] == pytest.approx(float(p[:, head, 1:, 0].mean()), rel=1e-5)


def test_maps_are_yielded_one_image_at_a_time():
    queries, keys = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    maps = list(layer_maps(queries, keys))
    assert [m.shape for m in maps] == [(3, 5, 5)] * 2
    torch.testing.assert_close(torch.stack(maps), (queries @ keys.mT / 2).softmax(-1))


def test_statistics_keep_the_mode_and_refuse_no_image():
    net = network().train()
    with pytest.raises(UserError, match="at least one image"):
        attention_statistics(net, [], "cpu")
    attention_statistics(net, [images(1)], "cpu")
    assert net.training


def test_without_class_token_its_mass_is_missing():
    table = attention_statistics(network("mca"), [images(1)], "cpu")
    assert table["class_mass"].isna().all() and table["entropy"].between(0, math.log(12)).all()


def test_deep_layers_are_those_of_the_paper():
    assert deep_layers(12) == [7, 8, 9, 10, 11]
    assert deep_layers(8) == [5, 6, 7]


def test_deep_summary_by_hand():
    table = pd.DataFrame(
        {
            "layer": [0, 0, 1, 1, 2, 2],
            "head": [0, 1] * 3,
            "entropy": [9.0, 9.0, 9.0, 9.0, 1.0, 3.0],
            "distance": 5.0,
            "class_mass": 0.25,
        }
    )
    summary = deep_summary(table)
    assert summary["first_layer"] == summary["last_layer"] == 2
    assert (summary["entropy"], summary["entropy_spread"], summary["distance"]) == (2.0, 1.0, 5.0)


def test_class_attention_of_backbone_and_aggregator():
    net, image = network().eval(), images(2)
    with torch.no_grad():
        out = net.backbone(image, capture=True)
        expected = PatchAffinity(out.queries, out.keys, out.prefix).layer_map(1)[:, :, 0, 1:]
    torch.testing.assert_close(class_attention(net, image, layer=1).flatten(2), expected)
    maps = class_attention(network("mca").eval(), image)
    assert maps.shape == (2, 2, 4, 3)
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(2, 2))
    with pytest.raises(UserError, match="model.aggregator"):
        class_attention(network("gap"), image)


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
    recipe = load_recipe("shapes/toco", {"model.backbone_args": TINY, "model.weights": "none"})
    backbone, image = Backbone(recipe.model, checkpointing=checkpointing), images(2, (32, 32))
    measured = saved_activation_bytes(lambda: backbone(image), backbone)
    terms = analytic_activation_bytes(2, 17, 24, 3, 2, pixels=3 * 32 * 32, checkpointing=checkpointing)
    assert measured == sum(terms.values())


def test_formula_holds_under_autocast_and_with_plain_attention(monkeypatch):
    recipe = load_recipe("shapes/toco", {"model.backbone_args": TINY, "model.weights": "none"})
    backbone, image = Backbone(recipe.model), images(2, (32, 32))

    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return backbone(image)

    terms = analytic_activation_bytes(2, 17, 24, 3, 2, pixels=3 * 32 * 32, value=2)
    in_float32 = (
        3 * (3 * 2 + 4) * 2 * 17 * 24
    )  # three layers: queries, keys, values; the output beside its bf16 copy
    assert saved_activation_bytes(autocast, backbone) == sum(terms.values()) + in_float32
    monkeypatch.setattr("ssepa_lib.model.backbone.SHORT", 0)
    assert saved_activation_bytes(autocast, backbone) == sum(terms.values())

    timm.layers.set_fused_attn(False)
    try:
        plain = Backbone(recipe.model)
    finally:
        timm.layers.set_fused_attn(True)
    terms = analytic_activation_bytes(2, 17, 24, 3, 2, pixels=3 * 32 * 32, fused=False)
    assert saved_activation_bytes(lambda: plain(image), plain) == sum(terms.values())


@pytest.mark.parametrize("strategy", ["all_heads", "haaf_dense", "haaf_fused"])
def test_affinity_maps_are_as_large_as_said(strategy):
    out = network().backbone(images(2), capture=True)
    operator = PatchAffinity(out.queries, out.keys, out.prefix, strategy=strategy)
    stacked = affinity_map_bytes(2, 13, 3, 2, strategy)
    peak = peak_memory(lambda: operator @ torch.zeros(2, 12, 1), "cpu")
    assert peak >= stacked
    assert stacked == {"all_heads": 3 * 2, "haaf_dense": 3, "haaf_fused": 0}[strategy] * 2 * 13 * 13 * 4


def test_peak_memory_counts_what_lives_together():
    def step():
        a = torch.zeros(1000)
        b = torch.zeros(1000)
        del a
        return b, torch.zeros(500)

    assert peak_memory(step, "cpu") == 8000
