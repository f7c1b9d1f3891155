"""Numbers about heads on examples that one can check by hand."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from toy_network import TwoImages, recipe

from ssepa_lib.model import Attention
from ssepa_lib.workbook.studies import attention_study


def attention(prefix=1, layers=2):
    q, k = ([torch.randn(1, 2, prefix + 4, 8) for _ in range(layers)] for _ in range(2))
    return Attention(q, k, prefix, (2, 2))


def test_rollout_multiplies_later_layers_from_the_left():
    a = attention()
    first, second = ((a.layer_map(k)[0].mean(0) + torch.eye(5)) / 2 for k in (0, 1))
    assert torch.allclose(attention_study.rollout(a)[0], (second @ first)[1:, 1:])


def test_rollout_without_prefix_tokens_keeps_the_mass():
    rolled = attention_study.rollout(attention(prefix=0, layers=3))
    assert torch.allclose(rolled.sum(-1), torch.ones(1, 4))


def test_a_claim_is_tested_seed_by_seed():
    deep = pd.DataFrame(
        {
            "run": ["fsr", "fsr", "toco", "toco"],
            "seed": [0, 1, 1, 2],
            "entropy": [3.0, 4.0, 3.5, 9.0],
            "entropy_spread": [0.2, 0.1, 0.3, 9.0],
        }
    )
    found = attention_study.paired_claim(deep, "fsr", "toco")
    assert found.index.tolist() == [1]
    assert found["entropy"].tolist() == [0.5] and found["entropy_spread"].iloc[0] == pytest.approx(-0.2)


class UniformBackbone:
    """Attends to every patch alike, in two layers of two heads on a grid of 2·2."""

    depth = 2

    def __call__(self, image, capture):
        nothing = [torch.zeros(len(image), 2, 4, 8)] * 2
        return SimpleNamespace(attention=Attention(nothing, nothing, 0, (2, 2)))


def test_attention_without_preference_stays_on_the_object_by_chance():
    network = SimpleNamespace(
        backbone=UniformBackbone(), classifier=SimpleNamespace(weight=torch.zeros(1, device="cpu"))
    )
    table = attention_study.own_object_shares(network, recipe(size=8), TwoImages())
    assert len(table) == 4 and table["chance"].tolist() == [pytest.approx((1 / 2 + 1 / 4) / 2)] * 4
    assert table["own_object"].tolist() == pytest.approx(table["chance"].tolist())
    blur = attention_study.head_blur(network, recipe(size=8), TwoImages())
    assert blur.tolist() == pytest.approx([0, 0], abs=1e-6), "heads that agree lose nothing"


class AlikeHeads:
    """Two layers whose four heads see the same logits; the CAM is class 1 in the left half of the grid."""

    classifier = SimpleNamespace(weight=torch.zeros(1))

    def __call__(self, image, *, segment, capture):
        draw = torch.Generator().manual_seed(1)
        sides = [torch.randn(1, 1, 17, 8, generator=draw).expand(1, 4, -1, -1) for _ in range(4)]
        cam = torch.zeros(1, 2, 4, 4)
        cam[:, 0, :, :2] = cam[:, 1, :2] = 1
        return SimpleNamespace(cam=cam, attention=Attention(sides[:2], sides[2:], 1, (4, 4)))


def test_averaging_equal_heads_takes_their_noise_down_and_nothing_else():
    table = attention_study.head_average(AlikeHeads(), recipe(size=16), TwoImages(), size=0.1)
    assert table["layer"].tolist() == [0, 1]
    assert table["similarity"].tolist() == pytest.approx([1, 1])
    assert (table["mean_one_noisy"] / table["single_head"]).tolist() == pytest.approx([1 / 4] * 2, rel=1e-4)
    assert (table["mean_all_noisy"] / table["single_head"]).tolist() == pytest.approx([1 / 2] * 2, rel=0.4)
    again = attention_study.head_average(AlikeHeads(), recipe(size=16), TwoImages(), size=0.1)
    pd.testing.assert_frame_equal(table, again)


def test_an_image_without_a_class_does_not_count():
    class OneLabelled(TwoImages):
        def label(self, i):
            return torch.eye(2)[0] * (1 - i)

    both = attention_study.head_average(AlikeHeads(), recipe(size=16), OneLabelled(), size=0.1)
    assert both["single_head"].notna().all()
