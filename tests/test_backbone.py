"""The backbone against timm, for many transformers, sizes and weight files."""

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from ssepa_lib.compose import load_recipe
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.memory import saved_activation_bytes
from ssepa_lib.model.backbone import Backbone
from ssepa_lib.model.weights import _load_weights
from ssepa_lib.recipe import ModelConfig

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


def micro(**changes) -> Backbone:
    config = {"backbone": "vit_tiny_patch16_224", "backbone_args": ARGS, "weights": "none", **changes}
    return Backbone(ModelConfig(**config)).eval()


def test_tokens_equal_timm(tmp_path):
    backbone, image = micro(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    plain = backbone.vit.forward_features((image / 255 - 0.5) / 0.5)
    out = backbone(image)
    torch.testing.assert_close(out.patches, plain[:, 1:])
    torch.testing.assert_close(out.cls, plain[:, 0])


def test_auxiliary_tokens_are_the_raw_output_of_the_third_last_block():
    backbone, image = micro(), torch.rand(1, 3, 32, 32) * 255
    seen = {}
    backbone.vit.blocks[1].register_forward_hook(lambda m, i, o: seen.setdefault("x", o))
    torch.testing.assert_close(backbone(image).aux, seen["x"][:, 1:])


@pytest.mark.parametrize(("height", "width", "grid"), [(32, 32, (4, 4)), (24, 48, (3, 6)), (30, 50, (4, 6))])
def test_rectangles_and_odd_sizes(height, width, grid):
    out = micro()(torch.rand(1, 3, height, width) * 255)
    assert out.grid == grid and out.patches.shape == (1, grid[0] * grid[1], 32)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_small_patch14_reg4_dinov2.lvd142m", 5),
        ("deit_small_patch16_224.fb_in1k", 1),
        ("eva02_tiny_patch14_224.mim_in22k", 1),
        ("vit_small_patch16_dinov3.lvd1689m", 5),
    ],
)
def test_other_vision_transformers(name, prefix):
    backbone = Backbone(ModelConfig(backbone=name, weights="none")).eval()
    with torch.no_grad():
        out = backbone(torch.rand(1, 3, 56, 84) * 255, capture=True)
    attention, patches = out.attention, out.grid[0] * out.grid[1]
    assert backbone.num_prefix_tokens == attention.num_prefix_tokens == prefix
    assert len(attention.queries) == len(attention.keys) == attention.depth == backbone.depth
    assert attention.queries[0].shape[2] == prefix + patches == attention.keys[-1].shape[2]
    assert attention.patches == patches and attention.grid == out.grid and attention.heads == backbone.heads


def test_captured_attention_is_the_attention_that_was_used():
    backbone, image = micro(), torch.rand(1, 3, 32, 32) * 255
    used = {}
    attention = backbone.vit.blocks[2].attn
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda m, i, o: used.setdefault("map", o))
    backbone(image)
    attention.fused_attn = True
    taken = backbone(image, capture=True).attention
    q, k = taken.queries[2], taken.keys[2]
    torch.testing.assert_close((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1), used["map"])


def test_capture_changes_nothing_and_needs_fused_attention():
    backbone, image = micro(), torch.rand(1, 3, 32, 32) * 255
    assert torch.equal(backbone(image).patches, backbone(image, capture=True).patches)
    backbone.vit.blocks[0].attn.fused_attn = False
    with pytest.raises(UserError, match="fused attention"):
        backbone(image, capture=True)


def test_mask_token_replaces_exactly_the_masked_patches():
    backbone, mask = micro(), torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    image = torch.rand(1, 3, 32, 32) * 255
    changed = image.clone()
    changed[:, :, 8:16, 8:16] = 0  # patch 5 of a 4×4 grid
    assert torch.allclose(backbone(image, mask=mask).patches, backbone(changed, mask=mask).patches)
    assert not torch.allclose(backbone(image).patches, backbone(changed).patches)


@pytest.mark.parametrize("capture", [False, True])
def test_checkpointing_changes_no_gradient(capture):
    image, grads, kept = torch.rand(1, 3, 32, 32) * 255, [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = ModelConfig(backbone="vit_tiny_patch16_224", backbone_args=ARGS, weights="none")
        backbone = Backbone(config, checkpointing=checkpointing)
        out = backbone(image, capture=capture)
        out.patches.square().sum().backward()
        grads.append(backbone.vit.blocks[0].attn.qkv.weight.grad)
        recorded = [] if out.attention is None else [len(out.attention.queries), len(out.attention.keys)]
        assert recorded == [backbone.depth] * 2 * capture, "not recorded again when recomputed"
        kept.append(saved_activation_bytes(partial(backbone, image, capture=capture), backbone))
    torch.testing.assert_close(*grads)
    assert 2 * kept[1] < kept[0], "blocks are recomputed, with affinity too"


def test_pooled_class_token_drops_prefix_tokens():
    backbone = micro(aggregator="gap")
    out = backbone(torch.rand(1, 3, 32, 32) * 255)
    assert backbone.num_prefix_tokens == 0 and out.cls is None and out.patches.shape == (1, 16, 32)


def test_class_token_may_stay_in_the_blocks_of_an_aggregator():
    image = torch.rand(1, 3, 32, 32) * 255
    kept, plain = micro(aggregator="mca", keep_class_token=True), micro()
    kept.load_state_dict(plain.state_dict())
    torch.testing.assert_close(kept(image).patches, plain(image).patches)
    assert kept.num_prefix_tokens == 1 and kept.vit.cls_token.requires_grad


def test_weights_round_trip(tmp_path):
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=7, **ARGS)
    save_file({k: v.half() for k, v in reference.state_dict().items()}, tmp_path / "w.safetensors")
    backbone = micro(weights=str(tmp_path / "w.safetensors"))
    expected = reference.blocks[3].mlp.fc1.weight.half().float()
    assert torch.equal(backbone.vit.blocks[3].mlp.fc1.weight, expected)


def test_bad_weights_are_explained(tmp_path):
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**ARGS, "embed_dim": 48})
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not a weight file")
    for name, word in (("other", "does not fit"), ("broken", "not a readable"), ("absent", "does not exist")):
        with pytest.raises(UserError, match=word):
            micro(weights=str(tmp_path / f"{name}.safetensors"))


def test_old_vit_small_attends_as_it_was_trained(tmp_path):
    """timm's vit_small of 2020 divided QKᵀ by √768 where every head has 96 values."""
    torch.manual_seed(0)
    config = load_recipe("voc/toco/vit_small_depth8").model
    loaded = Backbone(replace(config, weights="none")).eval()
    state = {key: value.clone() for key, value in loaded.vit.state_dict().items()}
    for key in (key for key in state if key.endswith("qkv.weight")):
        state[key] = torch.randn_like(state[key]) * 0.1  # sharp enough for the scale to matter
    torch.save(state | {"head.weight": torch.zeros(3, 768)}, tmp_path / "old.pth")
    _load_weights(loaded.vit, tmp_path / "old.pth", "vit_small")
    image = torch.rand(1, 3, 32, 32) * 255
    with torch.no_grad():
        x, *_ = loaded._embed(image, None)
        for i in range(8):
            block = {
                k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")
            }
            x = x + slow_attention(norm(x, block, "norm1"), block)
            hidden = F.gelu(F.linear(norm(x, block, "norm2"), block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
            x = x + F.linear(hidden, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
        expected = F.layer_norm(x, (768,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 1:]
        torch.testing.assert_close(loaded(image).patches, expected, atol=1e-4, rtol=1e-4)


def norm(x, block, name):
    return F.layer_norm(x, (768,), block[f"{name}.weight"], block[f"{name}.bias"], 1e-6)


def slow_attention(x, block):
    """Head by head, with the old scale 768**-0.5: [1, T, 768] → [1, T, 768]."""
    q, k, v = F.linear(x, block["attn.qkv.weight"]).chunk(3, -1)
    heads = [slice(96 * h, 96 * (h + 1)) for h in range(8)]
    mixed = [(q[..., h] @ k[..., h].mT * 768**-0.5).softmax(-1) @ v[..., h] for h in heads]
    return F.linear(torch.cat(mixed, -1), block["attn.proj.weight"], block["attn.proj.bias"])


def test_only_the_old_shape_is_converted(tmp_path):
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=0, **ARGS)
    torch.save({"model": reference.state_dict()}, tmp_path / "w.pth")
    backbone = micro(weights=str(tmp_path / "w.pth"))
    assert torch.equal(backbone.vit.blocks[0].attn.qkv.weight, reference.blocks[0].attn.qkv.weight)
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, word in (("broken", "not a readable PyTorch"), ("list", "no tensors by name")):
        with pytest.raises(UserError, match=word):
            micro(weights=str(tmp_path / f"{name}.pth"))


def test_bad_settings_are_explained():
    with pytest.raises(UserError, match="smaller than a"):
        micro()(torch.rand(1, 3, 7, 32))
    with pytest.raises(UserError, match="aux_block"):
        micro(aux_block=-9)
    with pytest.raises(UserError, match="model.backbone"):
        micro(backbone="vit_of_no_kind")
    with pytest.raises(UserError, match="not a plain vision transformer"):
        Backbone(ModelConfig(backbone="swin_tiny_patch4_window7_224", weights="none"))


def test_real_weights_load(vit_tiny_weights):
    backbone = Backbone(ModelConfig(backbone=vit_tiny_weights.stem))
    assert backbone.vit.blocks[0].attn.qkv.weight.std() > 0.02
    assert backbone.mean.flatten().tolist() == [127.5] * 3


class AttentionDtypes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("side, dtype", [(32, torch.float32), (96, torch.bfloat16)])
def test_training_on_a_cpu_attends_to_short_sequences_in_float32(side, dtype):
    backbone, image = micro(), torch.rand(1, 3, side, side) * 255
    for grad, expected in ((True, dtype), (False, torch.bfloat16)):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16), AttentionDtypes() as mode:
            backbone(image)
        assert mode.seen == [expected] * backbone.depth
