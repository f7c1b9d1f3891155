"""Pre-training of the micro ViT, and what the weights that come with the project must be able to do."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ssepa_lib.benchmarks.pretrain_shapes import _colours, _mosaic, _naming_loss, pretrain
from ssepa_lib.compose import load_recipe
from ssepa_lib.data.shapes import render_scene
from ssepa_lib.model.backbone import Backbone, build_backbone
from ssepa_lib.model.weights import MICRO_WEIGHTS

QUICK = {"steps": 2, "batch": 8, "images": 12, "device": "cpu"}


def micro(weights):
    return Backbone(load_recipe("shapes/toco", {"model.weights": str(weights)}).model).eval()


def test_weights_load_into_the_recipe_and_name_their_command(tmp_path):
    rows = []
    out = pretrain(tmp_path / "new" / "micro.safetensors", seed=3, on_step=rows.append, **QUICK)
    assert {value.dtype for value in load_file(out).values()} == {torch.float16}
    with safe_open(out, "pt") as file:
        assert file.metadata()["made by"].endswith("pretrain --out micro.safetensors --steps 2 --seed 3")
    assert torch.equal(micro(out).vit.norm.weight, load_file(out)["norm.weight"].float())
    assert rows[-1]["step"] == rows[-1]["steps"] == 2
    assert {"loss", "naming", "painting", "seconds_left"} <= set(rows[-1])


@pytest.mark.parametrize("name", ["swin_micro", "efficientformer_micro"])
def test_hierarchical_backbones_are_pretrained_by_the_same_script(tmp_path, name):
    out = pretrain(tmp_path / "w.safetensors", backbone=name, **QUICK)
    assert out.stat().st_size < 4e6
    with safe_open(out, "pt") as file:
        assert f"--backbone {name} --steps 2" in file.metadata()["made by"]
    recipe = load_recipe(f"shapes/toco/{name}", {"model.weights": str(out)})
    backbone, state = build_backbone(recipe.model), load_file(out)
    found = dict(backbone.vit.named_parameters())
    assert all(torch.equal(found[key], value.float()) for key, value in state.items() if key in found)
    assert found.keys() <= state.keys() and backbone.grid(96, 96) == (12, 12)
    statistics = [value for key, value in state.items() if key.endswith("running_mean")]
    assert all(value.abs().sum() > 0 for value in statistics), "batch norms have seen the images"


def test_a_seed_fixes_the_weights_and_leaves_the_callers_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    first = load_file(pretrain(tmp_path / "a.safetensors", **QUICK))
    after = torch.rand(3)
    second = load_file(pretrain(tmp_path / "b.safetensors", **QUICK))
    other = load_file(pretrain(tmp_path / "c.safetensors", seed=1, **QUICK))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["norm.weight"], other["norm.weight"])
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


def test_mosaic_says_which_patch_shows_which_image():
    images = torch.arange(1.0, 6)[:, None, None, None].expand(5, 3, 48, 48)  # image i is i + 1 everywhere
    for seed in range(5):
        torch.manual_seed(seed)
        mosaic, tile, shown = _mosaic(images, 8)
        patches = mosaic.unfold(2, 8, 8).unfold(3, 8, 8).mean((1, 4, 5)).flatten(1)  # [B, N]
        assert torch.equal(patches, shown[:, tile] + 1.0)
        assert tile.bincount().tolist() == [9, 9, 9, 9]


def test_naming_loss_takes_the_best_patch_of_each_tile():
    scores = torch.tensor([[[9.0, -9], [-9, -9], [-9, 9], [-9, -9]]])  # B=1, N=4, C=2
    tile, right, wrong = torch.tensor([0, 0, 1, 1]), torch.tensor([[0, 1]]), torch.tensor([[1, 0]])
    label = torch.tensor([0, 1])  # image 0 shows class 0, image 1 class 1
    assert _naming_loss(scores, label, tile, right) < 0.001
    assert _naming_loss(scores, label, tile, wrong) == pytest.approx(18, abs=0.01)


def test_colours_are_those_of_quarters_of_a_patch():
    image = torch.zeros(1, 3, 16, 16)
    image[0, 0, :4, 4:8] = 255  # top right quarter of the first patch is red
    colours = _colours(image, 8)
    assert colours.shape == (1, 4, 12)
    assert (
        torch.equal(colours[0, 0], torch.tensor([-1.0, 1, -1, -1] + [-1] * 8))
        and (colours[0, 1:] == -1).all()
    )


def _own_over_other(backbone) -> float:
    """Attention within a creature over attention between creature and background, mean over layers."""
    own = other = 0.0
    for index in range(12):
        image, mask = render_scene("val", index, size=96)
        image = torch.from_numpy(image[:80, :80]).permute(2, 0, 1)[None]
        mask = torch.from_numpy(mask[4:80:8, 4:80:8]).flatten().long()  # class at each patch's centre
        with torch.no_grad():
            out = backbone(image, capture=True).attention
        layers = [out.layer_map(k).mean(1)[0, 1:, 1:] for k in range(out.depth)]
        attention = torch.stack(layers).mean(0).fill_diagonal_(0)
        own += attention[(mask[:, None] == mask) & (mask > 0)].mean().item()
        other += attention[(mask[:, None] > 0) & (mask == 0)].mean().item()
    return own / other


def test_the_weights_of_the_project_attend_within_creatures():
    assert MICRO_WEIGHTS.stat().st_size < 4e6
    assert _own_over_other(micro(MICRO_WEIGHTS)) > 2
    torch.manual_seed(0)
    assert _own_over_other(micro("none")) < 1.2
