"""Hierarchical backbones against timm and against affinities that are built entry by entry."""

import logging
import math
from dataclasses import replace

import pytest
import timm
import torch

from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.attention import attention_statistics, layer_tokens
from ssepa_lib.model import PatchAffinity, build_network
from ssepa_lib.model.backbone import build_backbone
from ssepa_lib.model.pyramid import GridAttention
from ssepa_lib.model.windows import Windows, resized
from ssepa_lib.recipe import ModelConfig
from ssepa_lib.training import Trainer
from ssepa_lib.training.run import RunFolder, load_run
from ssepa_lib.workbook.plan import step_cost

SWIN = {
    "model.backbone": "swin_tiny_patch4_window7_224",
    "model.backbone_args": {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 3,
    },
}
FORMER = {
    "model.backbone": "efficientformer_l1",
    "model.backbone_args": {"depths": [1, 1, 2], "embed_dims": [16, 24, 64], "num_vit": 1},
}
MEAN = {"model.mean": [0.5, 0.5, 0.5], "model.std": [0.5, 0.5, 0.5]}


def swin(**changes):
    arguments = {**SWIN["model.backbone_args"], **changes}
    torch.manual_seed(0)
    return build_backbone(
        ModelConfig(backbone=SWIN["model.backbone"], backbone_args=arguments, weights="none", aux_block=-3)
    ).eval()


def former(**changes):
    arguments = {**FORMER["model.backbone_args"], **changes}
    config = ModelConfig(backbone=FORMER["model.backbone"], backbone_args=arguments, weights="none")
    return build_backbone(config).eval()


def images(number=2, height=32, width=32):
    return torch.rand(number, 3, height, width) * 255


def normalised(backbone, image):
    return (image - backbone.mean) / backbone.std


@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_swin_tokens_equal_timm_where_windows_divide_the_grid(size):
    backbone, image = swin(window_size=4), images(2, *size)
    final, maps = backbone.vit.forward_intermediates(normalised(backbone, image))
    out = backbone(image)
    grid = tuple(side // 4 for side in size)
    assert out.grid == grid and out.cls is None and backbone.patch_size == (4, 4)
    large = torch.nn.functional.interpolate(final.movedim(-1, 1), grid, mode="bilinear")
    torch.testing.assert_close(out.patches, large.flatten(2).mT)
    torch.testing.assert_close(out.aux, maps[0].flatten(2).mT)
    assert (backbone.width, backbone.aux_width) == (32, 16)


def test_former_tokens_equal_timm_on_the_grid_of_its_checkpoint():
    backbone = former()
    image = images(1, 112, 112)  # 7×7 tokens in the last of three stages
    plain = timm.create_model("efficientformer_l1", num_classes=0, **FORMER["model.backbone_args"]).eval()
    for module, own in zip(plain.stages[-1].blocks, backbone.stages[-1].blocks, strict=True):
        if isinstance(getattr(own, "token_mixer", None), GridAttention):
            torch.nn.init.normal_(own.token_mixer.attention_biases)
            module.token_mixer.load_state_dict(own.token_mixer.state_dict(), strict=False)
    names = {name for name, _ in plain.named_parameters()} & {n for n, _ in backbone.vit.named_parameters()}
    state = backbone.vit.state_dict()
    plain.load_state_dict({name: state[name] for name in names}, strict=False)
    tokens = plain.forward_features(normalised(backbone, image))  # [1, 49, D]
    large = torch.nn.functional.interpolate(tokens.mT.unflatten(2, (7, 7)), (14, 14), mode="bilinear")
    torch.testing.assert_close(backbone(image).patches, large.flatten(2).mT, rtol=1e-4, atol=1e-4)


def test_former_works_on_every_grid_and_its_bias_is_by_distance():
    backbone = former()
    out = backbone(images(1, 48, 80), capture=True)
    assert out.grid == (6, 10) and out.attention.windows[0].grid == (3, 5) and backbone.depth == 1
    mixer = backbone.blocks[-1].token_mixer
    torch.nn.init.normal_(mixer.attention_biases)
    bias = mixer.bias()[0, 0].unflatten(0, (3, 5)).unflatten(2, (3, 5))
    assert torch.equal(bias[0, 1, 2, 3], bias[2, 4, 0, 2]) and torch.equal(bias[1, 1, 1, 1], bias[0, 0, 0, 0])


def test_windows_are_cut_and_merged_back():
    for windows in (
        Windows((5, 7), (3, 3), (1, 1)),
        Windows((4, 6), (2, 3)),
        Windows((3, 3), (7, 7), (3, 3)),
    ):
        x = torch.arange(float(windows.grid[0] * windows.grid[1])).view(1, *windows.grid, 1)
        assert torch.equal(windows.merge(windows.split(x)), x)
        assert windows.inside().sum() == x.numel()
    by_hand = Windows((2, 4), (2, 2)).split(torch.arange(8.0).view(1, 2, 4, 1))[0, :, :, 0]
    assert by_hand.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_a_value_on_another_grid_is_a_mean_or_a_copy():
    coarse = torch.tensor([[[1.0], [2], [3], [4]]])  # 2×2
    fine = resized(coarse, (2, 2), (4, 4))
    assert fine.view(4, 4).tolist()[1] == [1, 1, 2, 2]
    assert torch.equal(resized(fine, (4, 4), (2, 2)), coarse)


def dense_layer(backbone, attention, layer, image=0):
    """The affinity of one Swin layer on its own grid from its definition, pair by pair, head mean [n, n]."""
    block, windows = backbone.blocks[layer], attention.windows[layer]
    (h, w), (wh, ww), (sh, sw) = windows.grid, windows.size, windows.shift
    table = block.attn.relative_position_bias_table  # [(2·wh − 1)(2·ww − 1), H]
    places = [((r - sh) % h, (c - sw) % w) for r in range(h) for c in range(w)]  # after the roll
    seen = {}
    for head in range(attention.heads_in(layer)):
        logits = torch.full((h * w, h * w), -torch.inf)
        for i, (r, c) in enumerate(places):
            for j, (y, x) in enumerate(places):
                if (r // wh, c // ww) != (y // wh, x // ww):
                    continue
                if regions(windows, r, c) != regions(windows, y, x):
                    continue
                number = (r // wh) * windows.counts[1] + c // ww
                q = attention.queries[layer][image, number, head, (r % wh) * ww + c % ww]
                k = attention.keys[layer][image, number, head, (y % wh) * ww + x % ww]
                place = (r - y + wh - 1) * (2 * ww - 1) + (c - x + ww - 1)
                logits[i, j] = q @ k * len(q) ** -0.5 + table[place, head]
        seen[head] = logits.softmax(1)
    return torch.stack(list(seen.values()))


def regions(windows, row, column):
    """Which of the pieces that a shift brings together a rolled place belongs to, along both axes."""
    found = []
    for place, count, size, shift in zip(
        (row, column), windows.counts, windows.size, windows.shift, strict=True
    ):
        whole = count * size
        found.append(0 if not any(windows.shift) else (place >= whole - size) + (place >= whole - shift))
    return found


def pooling(source, target):
    """The matrix that brings values from one grid to another: [target, source]."""
    eye = torch.eye(source[0] * source[1])[None]
    return resized(eye, source, target)[0]


@pytest.mark.parametrize(("size", "window"), [((32, 32), 4), ((32, 32), 3), ((24, 40), 3)])
def test_swin_affinity_is_that_of_its_definition(size, window):
    backbone = swin(window_size=window)
    for block in backbone.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)
    with torch.no_grad():
        attention = backbone(images(2, *size), capture=True).attention
        affinity, expected = PatchAffinity(attention), 0
        assert any(any(w.shift) for w in attention.windows)
        for layer in range(attention.depth):
            grid = attention.windows[layer].grid
            up, down = pooling(attention.grid, grid), pooling(grid, attention.grid)
            heads = down @ dense_layer(backbone, attention, layer, image=1) @ up  # [H, N, N]
            torch.testing.assert_close(attention.layer_map(layer)[1], heads, rtol=1e-4, atol=1e-5)
            expected = expected + heads.mean(0) / attention.depth
        cam = torch.rand(2, attention.patches, 3)
        torch.testing.assert_close(affinity.dense()[1], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((affinity @ cam)[1], expected @ cam[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(affinity.row(5)[1], expected[5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expected.sum(1), torch.ones(attention.patches))


def test_captured_blocks_are_the_attention_that_was_used():
    """Also under padding: a layer's own map times its values gives what the layer computed."""
    backbone, used = swin(window_size=3), {}
    block = backbone.blocks[1]  # shifted, 8×8 tokens in windows of 3×3
    block.attn.proj.register_forward_pre_hook(lambda m, x: used.setdefault("mixed", x[0]))
    block.attn.qkv.register_forward_hook(lambda m, i, o: used.setdefault("qkv", o))
    with torch.no_grad():
        attention = backbone(images(2), capture=True).attention
    values = used["qkv"].unflatten(2, (3, 2, -1))[:, :, 2]  # [B·W, M, H, d]
    inside = attention.windows[1].inside().repeat(2, 1)  # [B·W, M]
    for head in range(2):
        mixed = attention.block(1, head).flatten(0, 1) @ values[:, :, head]
        expected = used["mixed"].unflatten(2, (2, -1))[:, :, head]
        torch.testing.assert_close(mixed[inside], expected[inside], rtol=1e-4, atol=1e-5)


def test_shifted_and_unshifted_layers_together_leave_a_window():
    attention = swin(window_size=4)(images(1), capture=True).attention
    own = [PatchAffinity(attention).row(0, layer)[0] > 1e-6 for layer in (0, 1)]
    assert own[0].view(8, 8).nonzero().amax() == 3, "one window of 4×4 tokens"
    twice = PatchAffinity(attention, iterations=2) @ torch.eye(64)[None]
    assert (twice[0, 0] > 1e-7).sum() > (own[0] | own[1]).sum()


def test_layers_with_different_heads_cannot_be_stacked_nor_read_as_logits():
    attention, cam = swin()(images(), capture=True).attention, torch.rand(2, 64, 2)
    assert (attention.heads_in(0), attention.heads_in(3)) == (2, 4)
    plain = PatchAffinity(attention) @ cam
    torch.testing.assert_close(PatchAffinity(attention, strategy="stack_layers") @ cam, plain)
    with pytest.raises(UserError, match="have \\[2, 4\\] heads"):
        PatchAffinity(attention, strategy="stack_heads") @ cam
    with pytest.raises(UserError, match="set it to probabilities"):
        PatchAffinity(attention, kind="logits") @ cam


@pytest.mark.parametrize("settings", [SWIN, FORMER], ids=["swin", "efficientformer"])
@pytest.mark.parametrize("method", ["ssepa_plus", "fsr+ssepa", "ssepa_plus+frozen"])
def test_a_step_of_training(tiny, trainer_for, settings, method):
    recipe = tiny(method, **settings, **MEAN, **{"losses.segmentation_start": 0.0, "model.drop_path": 0.0})
    trainer, batches = trainer_for(recipe)
    loss = trainer.step(next(batches))["loss"]
    assert loss.isfinite()
    network = trainer.network
    if "frozen" not in method:
        grads = [p.grad for p in network.backbone.parameters() if p.requires_grad]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert len(network.haaf(torch.rand(1, network.backbone.depth))[0]) == network.backbone.depth


def test_cached_features_share_their_biases(tiny):
    network = build_network(tiny("ssepa_plus+frozen", **SWIN, **MEAN), ("ant",))
    trainer = Trainer(tiny("ssepa_plus+frozen", **SWIN, **MEAN), ("ant",), torch.device("cpu"))
    backbone, image = trainer.network.backbone, images(2)
    first, again = (backbone(image, capture=True).attention for _ in range(2))
    assert backbone.cache.found == 2
    shared = [(first.biases, again.biases), (first.hidden, again.hidden)]
    assert all(a is b for ours, theirs in shared for a, b in zip(ours, theirs, strict=True))
    assert first.hidden[0].any(), "windows of 3 do not divide a grid of 8"
    known = {}
    first.sharing(known)
    coarse = replace(first, biases=[bias.bfloat16() for bias in first.biases]).sharing(known)
    assert {bias.dtype for bias in coarse.biases} == {torch.bfloat16}, "another precision is not shared"
    torch.testing.assert_close(PatchAffinity(first).dense(), PatchAffinity(again).dense())
    assert network.backbone.cache is None


@pytest.mark.parametrize(("make", "side"), [(swin, 32), (former, 96)], ids=["swin", "efficientformer"])
def test_checkpointing_changes_no_gradient(make, side):
    """Nor does a pass of another size, such as that of a local crop, before the backward pass."""
    image, small, grads = images(1, side, side), images(1, side // 3 * 2, side // 3 * 2), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = make()
        backbone.checkpointing = checkpointing
        whole, part = backbone(image, capture=True), backbone(small)
        (whole.patches.square().sum() + part.patches.square().sum()).backward()
        grads.append([p.grad for p in backbone.parameters() if p.grad is not None])
    assert len(grads[0]) > 10
    torch.testing.assert_close(*grads)


def test_statistics_and_costs_of_layers_with_different_heads(tiny):
    recipe = tiny("ssepa", **SWIN, **MEAN)
    network = build_network(recipe, ("ant",))
    table = attention_statistics(network, [images(2)], "cpu")
    assert table.groupby("layer")["head"].count().tolist() == [2, 2, 4, 4]
    assert table["entropy"].between(0, math.log(64)).all()
    with pytest.raises(UserError, match="plain ViT"):
        layer_tokens(network, images(1))
    assert step_cost(recipe).flops > 3 * recipe.data.batch * network.backbone.flops(32, 32)


def test_padding_is_said_once(caplog):
    backbone = swin(window_size=3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            backbone(images(1, 40, 56))
    said = [record.getMessage() for record in caplog.records if "10×14" in record.getMessage()]
    assert len(said) == 1 and "do not divide" in said[0] and "is padded" in said[0]


def test_batch_norms_keep_the_statistics_of_the_checkpoint(tiny, trainer_for):
    trainer, batches = trainer_for(tiny("toco", **FORMER, **MEAN))
    norm = trainer.network.backbone.vit.stem.norm1
    before = norm.running_mean.clone()
    trainer.step(next(batches))
    assert torch.equal(norm.running_mean, before) and trainer.network.backbone.training


@pytest.mark.parametrize("settings", [SWIN, FORMER], ids=["swin", "efficientformer"])
def test_a_finished_run_is_read_again(tiny, tmp_path, settings):
    recipe = tiny("ssepa_plus", **settings, **MEAN)
    network = build_network(recipe, ("ant", "bee"))
    folder = RunFolder(tmp_path)
    folder.prepare(recipe, resume=True)
    folder.save_weights(network, recipe, recipe.train.steps)
    again, _ = load_run(tmp_path, "cpu")
    for name, tensor in network.state_dict().items():  # among them integers, counters of batch norms
        torch.testing.assert_close(again.state_dict()[name], tensor)
    damaged = {k: v.float().fill_(torch.nan) if "norm" in k else v for k, v in network.state_dict().items()}
    again.load_state_dict(damaged)
    folder.save_weights(again, recipe, recipe.train.steps)
    with pytest.raises(UserError, match="values that are not finite"):
        load_run(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "it has no attention; choose a timm ViT, Swin or EfficientFormer"),
        ("convnext_atto", "it has no attention"),
        ("swinv2_cr_tiny_224", "its attention cannot be read"),
    ],
)
def test_backbones_without_readable_attention_are_refused(name, words):
    with pytest.raises(UserError, match=words):
        build_backbone(ModelConfig(backbone=name, weights="none"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.aux_block": 4}, "has 4 blocks; choose -4..3"),
        ({"model.backbone_args": {**SWIN["model.backbone_args"], "depths": [2], "num_heads": [2]}}, "two at"),
    ],
)
def test_bad_settings_of_a_swin_are_refused(tiny, change, words):
    with pytest.raises(UserError, match=words):
        build_network(tiny("ssepa", **{**SWIN, **MEAN, **change}), ("ant",))


def test_what_only_a_plain_transformer_can_do_is_refused(tiny, trainer_for):
    with pytest.raises(UserError, match="affinity.kind learned needs a plain ViT"):
        build_network(tiny("afa", **SWIN, **MEAN), ("ant",))
    with pytest.raises(UserError, match="smaller than a 8×8 patch of the last stage"):
        swin()(images(1, 7, 32))
    trainer, batches = trainer_for(tiny("mcc", **SWIN, **MEAN))
    with pytest.raises(UserError, match="needs a class token"):
        trainer.step(next(batches))
