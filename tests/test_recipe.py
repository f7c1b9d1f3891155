import pytest

from ssepa_lib.errors import UserError
from ssepa_lib.paths import RECIPES
from ssepa_lib.recipe import load_recipe, save_recipe

NAMES = [
    f"{data.stem}/{method.stem}"
    for data in sorted((RECIPES / "data").glob("*.yaml"))
    for method in sorted((RECIPES / "method").glob("*.yaml"))
] + [f"voc/ssepa/{file.stem}" for file in sorted((RECIPES / "backbone").glob("*.yaml"))]


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_loads(name):
    assert load_recipe(name).name == name


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda f: f.stem)
def test_every_recipe_file_opens_with_a_comment(file):
    assert file.read_text().startswith("# ")


def test_published_schedule():
    recipe = load_recipe("voc/ssepa")
    assert (recipe.train.steps, recipe.warmup_steps, recipe.switch_step, recipe.data.batch) == (20000, 1500, 2000, 4)
    assert load_recipe("coco/ssepa").warmup_steps == 1500
    losses = recipe.losses
    assert (losses.seg, losses.aux_cls, losses.ptc, losses.ctc, losses.reg) == (0.1, 1.0, 0.2, 0.5, 0.05)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"train.stepz": 1}, "stepz"),
        ({"train.steps": "many"}, "steps"),
        ({"train.steps": 0}, "train.steps"),
        ({"affinity.source": "keys"}, "affinity.source"),
        ({"affinity.kind": "none", "affinity.supervision": "cls"}, "only haaf learns"),
        ({"cam.low": 0.9}, "cam.low"),
        ({"data.scale": [2.0, 0.5]}, "data.scale"),
    ],
)
def test_bad_settings_are_named(overrides, word):
    with pytest.raises(UserError, match=word):
        load_recipe("voc/ssepa", overrides)


@pytest.mark.parametrize("name", ["voc", "voc/none_such", "nowhere/toco", "missing.yaml"])
def test_unknown_recipes_are_refused(name):
    with pytest.raises(UserError):
        load_recipe(name)


def test_text_numbers_are_coerced():
    assert load_recipe("voc/toco", {"optim.lr": "6e-5"}).optim.lr == pytest.approx(6e-5)


def test_round_trip_and_hash(tmp_path):
    recipe = load_recipe("voc/ssepa", {"train.steps": 500})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again == recipe and again.hash() == recipe.hash()
    assert load_recipe("voc/ssepa", {"train.steps": 501}).hash() != recipe.hash()
    assert load_recipe("voc/ssepa", {"train.steps": 500, "data.workers": 0, "data.root": "x"}).hash() == recipe.hash()
    assert load_recipe("voc/toco").hash() == load_recipe("voc/ssepa_no_affinity").hash()
    masks = {"reinforce.mask_ratio": 0.2}  # of no effect without self-reinforcement
    assert load_recipe("voc/toco", masks).hash() == load_recipe("voc/toco").hash()
    kept = {"model.keep_class_token": True}
    assert load_recipe("voc/toco", kept).hash() == load_recipe("voc/toco").hash()
    arms = ({"data.views": "fsr"}, {"data.views": "fsr", "reinforce.view_scale": [0.5, 1.0]})
    assert len({load_recipe("voc/toco", arm).hash() for arm in ({}, *arms)}) == 3
    assert load_recipe("voc/fsr", kept).hash() != load_recipe("voc/fsr").hash()
    assert load_recipe("voc/fsr", masks).hash() != load_recipe("voc/fsr").hash()
