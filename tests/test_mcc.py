"""MCC: dropped patches against hidden keys, masked views against loops, and the contrast in a step."""

from dataclasses import replace

import pytest
import torch

from ssepa_lib.benchmarks.naive_step import masked_class_tokens
from ssepa_lib.compose import load_recipe
from ssepa_lib.errors import UserError
from ssepa_lib.methods.blocks import block_grid, to_patches
from ssepa_lib.methods.mcc import MaskedContrast, masked_views
from ssepa_lib.methods.toco import ClassTokenContrast, region_map
from ssepa_lib.model.backbone import Backbone
from ssepa_lib.recipe import ContrastConfig, ModelConfig

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


def backbone(name="vit_tiny_patch16_224", checkpointing=False, **changes):
    torch.manual_seed(0)
    config = ModelConfig(backbone=name, weights="none", **{"backbone_args": ARGS, **changes})
    made = Backbone(config, checkpointing=checkpointing).eval()
    for block in made.vit.blocks:
        block.attn.qkv.weight.data *= 10  # attention that is far from uniform
    return made


def some_views(images, views, patches):
    """Views with none, one, some and all patches."""
    visible = torch.rand(images, views, patches) < torch.rand(images, views, 1)
    visible[0, 0], visible[0, 1], visible[-1, -1] = False, True, False
    visible[-1, -1, 5] = True
    return visible


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_dropping_patches_equals_hiding_their_keys(size):
    model = backbone()
    image = torch.rand(3, 3, *size) * 255
    visible = some_views(3, 4, size[0] * size[1] // 64)
    dropped, masked = model.class_tokens(image, visible), masked_class_tokens(model, image, visible)
    assert dropped.shape == (3, 4, 32)
    torch.testing.assert_close(dropped, masked, rtol=1e-4, atol=1e-5)
    assert (dropped[0, 0] - dropped[0, 1]).abs().max() > 0.1, "hiding matters"
    torch.testing.assert_close(dropped[0, 1], model(image).cls[0], rtol=1e-4, atol=1e-5)


def test_both_forms_give_the_same_gradient():
    model, image, visible = backbone(), torch.rand(2, 3, 32, 32) * 255, some_views(2, 3, 16)
    found = []
    for form in (model.class_tokens, lambda *x: masked_class_tokens(model, *x)):
        model.zero_grad()
        (form(image, visible) * torch.linspace(-1, 2, 32)).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and "vit.patch_embed.proj.weight" in found[0]
    for name, grad in found[0].items():
        scale = found[1][name].abs().max().item()
        torch.testing.assert_close(grad, found[1][name], rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_a_hidden_patch_has_no_influence_and_views_may_all_be_empty():
    model, image = backbone(), torch.rand(1, 3, 32, 32) * 255
    other = image.clone()
    other[:, :, 8:16, 8:16] = 0  # patch 5
    visible = torch.ones(1, 1, 16, dtype=torch.bool)
    assert not torch.allclose(model.class_tokens(image, visible), model.class_tokens(other, visible))
    visible[..., 5] = False
    assert torch.equal(model.class_tokens(image, visible), model.class_tokens(other, visible))
    nothing = torch.zeros(1, 2, 16, dtype=torch.bool)
    empty = model.class_tokens(image, nothing)
    torch.testing.assert_close(empty, masked_class_tokens(model, image, nothing))
    assert torch.equal(empty[:, 0], empty[:, 1])


def test_recomputed_blocks_hide_the_same_keys():
    image, visible, grads = torch.rand(2, 3, 32, 32) * 255, some_views(2, 3, 16), []
    for checkpointing in (False, True):
        model = backbone(checkpointing=checkpointing)
        (model.class_tokens(image, visible) * torch.linspace(-1, 2, 32)).sum().backward()
        grads.append(model.vit.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*grads)


def test_registers_stay_visible():
    model = backbone("vit_small_patch14_reg4_dinov2.lvd142m", backbone_args={"depth": 3, "img_size": 56})
    image, visible = torch.rand(1, 3, 56, 56) * 255, some_views(1, 3, 16)
    masked = masked_class_tokens(model, image, visible)
    torch.testing.assert_close(model.class_tokens(image, visible), masked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model",
    [{"aggregator": "gap"}, {"name": "eva02_tiny_patch14_224.mim_in22k", "backbone_args": {"depth": 3}}],
)
def test_a_backbone_that_cannot_drop_is_one_sentence(model):
    made = Backbone(
        ModelConfig(
            backbone=model.pop("name", "vit_tiny_patch16_224"),
            weights="none",
            **{"backbone_args": {}, **model},
        )
    )
    with pytest.raises(UserError, match=r"^contrast\.views masked needs .*\.$"):
        made.class_tokens(torch.rand(1, 3, 224, 224), torch.ones(1, 1, 196, dtype=torch.bool))


# What is hidden, and what still shows an object


def slow_views(regions, config, draw):
    """The definition with loops: `draw` [B, V, rows, columns]."""
    visible, positive = [], []
    for image, numbers in zip(regions.tolist(), draw.tolist(), strict=True):
        for view in numbers:
            keep = [[x >= config.mask_share for x in row] for row in view]
            if not any(map(any, keep)) and not config.mask_empty:
                best = max(x for row in view for x in row)
                keep = [[x == best for x in row] for row in view]
            side, patches = config.mask_block, []
            for y, row in enumerate(image):
                patches += [keep[y // side][x // side] for x in range(len(row))]
            values = [v for v, k in zip(sum(image, []), patches, strict=True) if k]
            visible.append(patches)
            positive.append(sum(values) > config.negative_below * len(values))
    return torch.tensor(visible), torch.tensor(positive)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
@pytest.mark.parametrize(
    ("share", "block", "empty"), [(0.5, 2, False), (0.95, 2, True), (0.95, 3, False), (0.0, 1, True)]
)
def test_masked_views_equal_the_loops(grid, share, block, empty):
    config = ContrastConfig(
        views="masked", mask_share=share, mask_block=block, mask_empty=empty, local_crops=5
    )
    regions = torch.randint(3, (3, *grid)) * (torch.rand(3, *grid) < 0.4)
    visible, positive = masked_views(regions, config, torch.Generator().manual_seed(3))
    draw = torch.rand(3, 5, *block_grid(grid, block), generator=torch.Generator().manual_seed(3))
    expected = slow_views(regions, config, draw)
    assert torch.equal(visible.flatten(0, 1), expected[0]) and torch.equal(positive.flatten(), expected[1])
    assert visible.any(2).all() or empty
    if share == 0:
        assert visible.all()


def test_flags_of_a_region_map_made_by_hand():
    regions = torch.zeros(1, 4, 4, dtype=torch.long)
    regions[0, :2, :2] = torch.tensor([[1, 0], [0, 0]])  # mean 0.25 in the first of four blocks
    config = ContrastConfig(
        views="masked", mask_share=0.75, mask_block=2, local_crops=256, negative_below=0.2
    )
    visible, positive = masked_views(regions, config, torch.Generator().manual_seed(0))
    blocks = visible.view(1, 256, 2, 2, 2, 2)[:, :, :, 0, :, 0].flatten(2)[0]  # [V, 4]
    assert torch.equal(positive[0], blocks[:, 0] & (blocks.sum(1) == 1)), "one object patch in 4 is above 0.2"
    assert positive.any() and not positive.all()
    assert 0.2 < blocks.float().mean() < 0.4  # a quarter, and those of the views that would be empty


def test_a_view_that_shows_nothing_is_negative():
    config = ContrastConfig(views="masked", mask_share=0.999, mask_empty=True)
    regions = torch.full((2, 8, 8), 2)
    visible, positive = masked_views(regions, config, torch.Generator().manual_seed(0))
    assert not visible.any() and not positive.any()
    shown, positive = masked_views(
        regions, replace(config, mask_empty=False), torch.Generator().manual_seed(0)
    )
    assert (shown.sum(2) == 16).all() and positive.all()


def test_blocks_at_the_border_are_smaller():
    assert block_grid((5, 7), 3) == (2, 3)
    patches = to_patches(torch.arange(6).view(2, 3), (5, 7), 3).view(5, 7)
    assert patches.tolist() == [[0, 0, 0, 1, 1, 1, 2]] * 3 + [[3, 3, 3, 4, 4, 4, 5]] * 2


# The objective


def contrast_of(trainer):
    (part,) = (part for part in trainer.objectives if isinstance(part, MaskedContrast))
    return part


def test_the_masked_contrast_takes_the_place_of_tocos(tiny, trainer_for):
    trainer, batches = trainer_for(tiny("mcc"))
    kinds = [type(part) for part in trainer.objectives]
    assert ClassTokenContrast not in kinds and kinds.count(MaskedContrast) == 1
    assert trainer.weights["ctc"] == 0.5
    before = trainer.network.backbone.vit.blocks[0].attn.qkv.weight.detach().clone()
    teacher = contrast_of(trainer).teacher.module.last.clone()
    terms = trainer.step(next(batches))
    assert set(terms) == {"loss", "cls", "aux_cls", "ptc", "ctc", "seg", "reg"} - {"seg", "reg"}
    assert terms["ctc"].isfinite() and not torch.equal(
        before, trainer.network.backbone.vit.blocks[0].attn.qkv.weight
    )
    assert not torch.equal(teacher, contrast_of(trainer).teacher.module.last)


@pytest.mark.parametrize(("index", "judge"), [(3, "auxiliary"), (4, "main")])
def test_the_auxiliary_cam_judges_the_views_first(tiny, step_of, monkeypatch, index, judge):
    trainer, make = step_of(tiny("mcc", **{"contrast.main_from": 0.6}))  # 3 of 6 steps are not yet 60 %
    step, seen = make(), []
    step.index = index
    part = contrast_of(trainer)

    def record(regions, config, generator):
        seen.append(regions)
        return masked_views(regions, config, generator)

    monkeypatch.setattr("ssepa_lib.methods.mcc.masked_views", record)
    tokens, positive = part.local_tokens(step)
    assert tokens.shape == (2, 3, 32) and positive.shape == (2, 3)
    small = torch.nn.functional.interpolate(
        getattr(step.cams, judge), (4, 4), mode="bicubic", align_corners=False
    )
    assert torch.equal(seen[0], region_map(small, 0.25, 0.7))
    assert not torch.allclose(step.cams.main, step.cams.auxiliary)


def test_views_are_tokens_of_the_local_canvas(tiny, step_of, monkeypatch):
    trainer, make = step_of(tiny("mcc"))
    step, seen = make(), []
    original = trainer.network.backbone.class_tokens

    def record(image, visible):
        seen.append((image, visible))
        return original(image, visible)

    monkeypatch.setattr(trainer.network.backbone, "class_tokens", record)
    contrast_of(trainer)(step)
    ((image, visible),) = seen
    assert torch.equal(image, step.batch.local_canvas) and visible.shape == (2, 3, 16)


@pytest.mark.parametrize("method", ["ssepa+mcc", "mcc+ssepa", "ssepa_plus+mcc", "mcc+toco"])
def test_mcc_composes_with_an_affinity(tiny, trainer_for, method):
    recipe = tiny(method, **{"losses.segmentation_start": 0.0})
    assert (recipe.affinity.kind == "haaf") == ("ssepa" in method) and recipe.contrast.views == "masked"
    trainer, batches = trainer_for(recipe)
    terms = trainer.terms(next(batches))
    assert ("haaf" in terms) == ("ssepa" in method) and terms["ctc"].isfinite()


@pytest.mark.parametrize("method", ["fsr+mcc", "mcc+fsr", "afa+mcc", "mcc+afa"])
def test_contradictory_compositions_are_one_sentence(method):
    with pytest.raises(UserError, match=r"contrast\.views masked needs losses\.ctc above 0.*\.$") as error:
        load_recipe(f"shapes/{method}")
    assert "\n" not in str(error.value)


def test_settings_that_do_not_act_leave_the_identity_alone():
    plain, masked = load_recipe("voc/toco"), load_recipe("voc/mcc")
    idle = {"contrast.mask_share": 0.5, "contrast.mask_block": 2, "contrast.main_from": 0.1}
    assert load_recipe("voc/toco", idle).hash() == plain.hash() != masked.hash()
    assert load_recipe("voc/mcc", {"contrast.local_size": 32}).hash() == masked.hash()
    for key, value in idle.items():
        assert load_recipe("voc/mcc", {key: value}).hash() != masked.hash(), key
    assert load_recipe("shapes/mcc").contrast.mask_block == 2 and masked.contrast.mask_block == 4


def test_on_coco_both_contrasts_act_from_the_first_step():
    masked, toco = load_recipe("coco/mcc"), load_recipe("coco/toco")
    assert (masked.contrast_step, toco.contrast_step) == (0, 12000)
    assert masked.segmentation_step == toco.segmentation_step == 8000
    assert masked.contrast.temperature == 0.5 and masked.contrast.main_from == 1
