"""Every family of vision transformers in timm, small and with random weights, through the whole way."""

import re

import pytest
import torch

from ssepa_lib.errors import UserError
from ssepa_lib.model import PatchAffinity, build_network
from ssepa_lib.model.backbone import build_backbone
from ssepa_lib.recipe import ModelConfig

READ = {  # name: prefix tokens
    "aimv2_large_patch14_224": 0,
    "beit3_base_patch16_224": 1,
    "deit_base_patch16_224": 1,
    "deit_base_distilled_patch16_224": 2,
    "deit3_base_patch16_224": 1,
    "eva02_base_patch14_224": 1,
    "eva02_base_patch16_clip_224": 1,
    "eva_giant_patch14_224": 1,
    "flexivit_base": 1,
    "vit_base_patch8_224": 1,
    "vit_base_patch16_224": 1,
    "vit_base_patch32_224": 1,
    "vit_base_patch14_dinov2": 1,
    "vit_base_patch14_reg4_dinov2": 5,
    "vit_base_patch14_reg1_tipsv2": 2,
    "vit_base_patch16_dinov3": 5,
    "vit_base_patch16_dinov3_qkvb": 5,
    "vit_base_patch16_clip_224": 1,
    "vit_base_patch16_clip_quickgelu_224": 1,
    "vit_base_patch16_siglip_224": 0,
    "vit_base_patch16_siglip_gap_224": 0,
    "vit_base_patch16_gap_224": 0,
    "vit_base_patch16_reg4_gap_256": 4,
    "vit_base_patch16_radio_v3": 8,
    "vit_base_patch16_rope_224": 1,
    "vit_base_patch16_rope_mixed_224": 1,
    "vit_base_patch16_rope_reg1_gap_256": 1,
    "vit_base_patch16_rpn_224": 0,
    "vit_base_patch16_lingbot": 5,
    "vit_pe_core_base_patch16_224": 1,
    "vit_pe_spatial_base_patch16_512": 1,
    "vit_so150m_patch16_reg4_map_256": 4,
}
REFUSED = [
    "beit_base_patch16_224",
    "samvit_base_patch16",
    "vit_relpos_base_patch16_224",
    "vit_base_patch16_18x2_224",
    "vit_base_patch16_xp_224",
]


def small(name):
    """Settings that make a family small: two blocks of width 48, a native grid of 2×2 patches."""
    found = re.search(r"patch(\d+)", name)
    patch = int(found[1]) if found else 16
    arguments = {"img_size": 2 * patch, "embed_dim": 48, "depth": 2, "num_heads": 2}
    settings = {"backbone": name, "backbone_args": arguments, "aux_block": -2, "weights": "none"}
    return patch, settings


@pytest.mark.parametrize(("name", "prefix"), READ.items())
def test_a_family_gives_scores_maps_affinity_and_learns(tiny, trainer_for, name, prefix):
    patch, settings = small(name)
    changes = {f"model.{key}": value for key, value in settings.items()}
    changes |= {"model.mean": [0.5] * 3, "model.std": [0.5] * 3, "data.crop": 2 * patch, "losses.ctc": 0.0}
    changes |= {"losses.segmentation_start": 0.0, "cam.scales": [1.0], "cam.par_iterations": 0}
    trainer, batches = trainer_for(tiny("ssepa", **changes))
    network, image = trainer.network, torch.rand(1, 3, 2 * patch, 3 * patch) * 255
    with torch.no_grad():
        out = network(image, capture=True)
    assert out.scores.isfinite().all() and out.cam.shape[2:] == out.grid == (2, 3)
    attention = out.attention
    assert attention.num_prefix_tokens == network.backbone.num_prefix_tokens == prefix
    assert (attention.depth, attention.heads, attention.patches) == (2, 2, 6)
    affinity = PatchAffinity(attention)
    assert torch.allclose(
        affinity.dense() @ out.cam.flatten(2).mT, affinity @ out.cam.flatten(2).mT, atol=1e-5
    )
    assert trainer.step(next(batches))["loss"].isfinite()


@pytest.mark.parametrize("name", READ)
def test_tokens_of_a_family_are_those_of_timm(name):
    patch, settings = small(name)
    backbone = build_backbone(ModelConfig(**settings, mean=[0.0] * 3, std=[1 / 255] * 3)).eval()
    image = torch.rand(1, 3, 2 * patch, 2 * patch)
    with torch.no_grad():
        expected = backbone.vit.fc_norm(backbone.vit.forward_features(image))[:, READ[name] :]
        torch.testing.assert_close(backbone(image).patches, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_a_remedy(name):
    patch, settings = small(name)
    with pytest.raises(UserError, match=f"{name}' cannot .* choose a"):
        build_backbone(ModelConfig(**settings))


def test_registers_are_no_class_token(tiny):
    changes = {f"model.{key}": value for key, value in small("vit_base_patch16_reg4_gap_256")[1].items()}
    network = build_network(tiny("toco", **changes), ("ant",)).eval()
    out = network(torch.rand(1, 3, 32, 32) * 255)
    assert network.backbone(torch.rand(1, 3, 32, 32)).cls is None
    torch.testing.assert_close(out.cls, out.patches.mean(1))
