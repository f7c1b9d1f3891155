"""Attention statistics, similarity of heads, robustness to noise."""

import math

import pandas as pd
import pytest
import torch

from ssepa_lib.compose import load_recipe
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.attention import (
    attention_entropy,
    attention_statistics,
    class_attention,
    deep_layers,
    deep_summary,
    head_disagreement,
    head_similarity,
    layer_maps,
    layer_tokens,
    map_statistics,
    noise_robustness,
    object_share,
    patch_distances,
    relative_changes,
    token_similarity,
)
from ssepa_lib.model import Attention, Network, PatchAffinity

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
    statistics = map_statistics(attention, patch_distances((1, 2), (16, 16)), num_prefix_tokens=1)
    assert statistics[0].tolist() == pytest.approx([entropy, distance, 0.35])
    assert map_statistics(attention[:, 1:, 1:], patch_distances((1, 2), (16, 16)), num_prefix_tokens=0)[
        0, 2
    ].isnan()


@torch.no_grad()
def test_streaming_equals_dense_over_unequal_batches():
    net = network().eval()
    batches = [images(3, seed=0), images(1, seed=1)]
    table = attention_statistics(net, batches, "cpu")
    assert list(table.columns) == ["layer", "head", "entropy", "distance", "class_mass", "images"]
    assert len(table) == 3 * 2 and (table["images"] == 4).all()

    out = net.backbone(torch.cat(batches), capture=True)
    operator = PatchAffinity(out.attention)
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
    maps = list(layer_maps(Attention([keys, queries], [keys, keys], 1, (2, 2)), 1))
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
        expected = PatchAffinity(out.attention).layer_map(1)[:, :, 0, 1:]
    torch.testing.assert_close(class_attention(net, image, layer=1).flatten(2), expected)
    maps = class_attention(network("mca").eval(), image)
    assert maps.shape == (2, 2, 4, 3)
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(2, 2))
    with pytest.raises(UserError, match="model.aggregator"):
        class_attention(network("gap"), image)
    with pytest.raises(UserError, match="model.aggregator"):  # the token is there, but no score depends on it
        class_attention(network("gap", **{"model.keep_class_token": True}), image)


def test_similarity_of_equal_opposite_and_mixed_heads():
    one, other = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 3.0], [0.0, 0.0]])
    assert head_similarity(torch.stack([one, 2 * one, one])) == pytest.approx(1)
    assert head_similarity(torch.stack([one, other])) == pytest.approx(0)
    between = one + other / 3  # at 45° to both
    assert head_similarity(torch.stack([one, other, between])) == pytest.approx(2 * 0.5**0.5 / 3)
    assert head_similarity(one[None]).isnan()


def test_similarity_equals_the_loop_over_pairs():
    maps = torch.rand(2, 3, 5, 5).softmax(-1)
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    each = [torch.cosine_similarity(maps[:, a].flatten(1), maps[:, b].flatten(1)) for a, b in pairs]
    torch.testing.assert_close(head_similarity(maps), torch.stack(each).mean(0))


def test_relative_changes_by_hand():
    clean = torch.tensor([[[3.0], [4.0]], [[5.0], [0.0]]])  # two heads, two patches, one class; norms 5 and 5
    noisy = clean + torch.tensor([[[1.0], [0.0]], [[-1.0], [2.0]]])
    mean = math.hypot(4, 2)
    found = relative_changes(clean, noisy)
    assert found["single_head"] == pytest.approx((1 / 5 + math.sqrt(5) / 5) / 2)
    assert found["mean_one_noisy"] == pytest.approx((1 / 2 + math.sqrt(5) / 2) / 2 / mean)
    assert found["mean_all_noisy"] == pytest.approx(math.hypot(0, 1) / mean)


def test_noise_in_equal_heads_averages_out():
    heads = 16
    logits, cam = torch.randn(1, 41, 41).expand(heads, -1, -1), torch.rand(40, 3)

    def changes(size):
        generator = torch.Generator().manual_seed(0)
        return noise_robustness(logits, cam, size, num_prefix_tokens=1, generator=generator)

    found = changes(0.1)
    assert found["mean_all_noisy"] == pytest.approx(found["single_head"] / heads**0.5, rel=0.25)
    assert found["mean_one_noisy"] == pytest.approx(found["single_head"] / heads, rel=1e-4)
    assert changes(0.2)["single_head"] == pytest.approx(2 * found["single_head"], rel=0.1)
    assert set(changes(0).values()) == {0.0}


def test_noise_reaches_the_map_through_the_softmax():
    logits, cam = torch.tensor([[[0.0, 2.0], [2.0, 0.0]]]), torch.tensor([[1.0], [0.0]])
    draw = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(3))
    noisy = logits + 0.5 * draw * math.sqrt(4 / 3)  # the standard deviation of 0, 2, 2, 0
    before = [1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))]
    after = [1 / (1 + math.exp(float(row[1] - row[0]))) for row in noisy[0]]
    expected = math.dist(before, after) / math.hypot(*before)
    generator = torch.Generator().manual_seed(3)
    found = noise_robustness(logits, cam, 0.5, num_prefix_tokens=0, generator=generator)
    assert found == pytest.approx(dict.fromkeys(found, expected))


def test_tokens_that_are_alike_orthogonal_and_opposite():
    assert token_similarity(torch.tensor([[2.0, 0], [5.0, 0]])).item() == pytest.approx(1)
    assert token_similarity(torch.eye(3)).item() == pytest.approx(0)
    assert token_similarity(torch.tensor([[1.0, 0], [-1.0, 0], [1.0, 0]])).item() == pytest.approx(-1 / 3)
    assert token_similarity(torch.ones(1, 4)).isnan()


def test_tokens_of_every_layer_end_in_those_of_the_network():
    net = network()
    net.train()
    image = torch.rand(2, 3, 32, 32) * 255
    tokens = layer_tokens(net, image)
    assert tokens.shape == (3, 2, 16, 24) and net.training
    with torch.no_grad():
        out = net.eval().backbone(image)
    torch.testing.assert_close(net.backbone.vit.norm(tokens[-1]), out.patches)
    torch.testing.assert_close(tokens[net.backbone.aux_block], out.aux)
    assert not any(block._forward_hooks for block in net.backbone.vit.blocks), "hooks are released"


def test_object_share_by_hand():
    attention = torch.tensor([[0.4, 0.4, 0.0], [0.1, 0.3, 0.4], [0.2, 0.2, 0.2]])
    share = object_share(attention, torch.tensor([1, 1, 0]))
    assert share.item() == pytest.approx((1 + 0.5) / 2)
    two = object_share(torch.full((2, 3, 3), 1 / 3), torch.tensor([1, 2, 0]))
    assert two.tolist() == pytest.approx([1 / 3, 1 / 3]), "another object is outside"
    assert object_share(attention, torch.zeros(3, dtype=torch.long)).isnan()


def test_heads_disagree_by_log_2_when_two_look_at_different_keys():
    one_hot = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # [H, T, keys]
    assert head_disagreement(one_hot).item() == pytest.approx(math.log(2))
    assert head_disagreement(torch.full((3, 2, 4, 4), 0.25)).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
