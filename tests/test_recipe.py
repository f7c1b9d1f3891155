import pytest

from ssepa_lib.errors import UserError
from ssepa_lib.paths import RECIPES
from ssepa_lib.compose import load_recipe, save_recipe

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
    assert (recipe.train.steps, recipe.warmup_steps, recipe.segmentation_step, recipe.data.batch) == (
        20000,
        1500,
        2000,
        4,
    )
    assert load_recipe("coco/ssepa").warmup_steps == 1500
    losses = recipe.losses
    assert (losses.seg, losses.aux_cls, losses.ptc, losses.ctc, losses.reg) == (0.1, 1.0, 0.2, 0.5, 0.05)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"train.stepz": 1}, "stepz"),
        ({"train.steps": "many"}, "steps"),
        ({"train.steps": 0}, "train.steps"),
        ({"affinity.attention": "keys"}, "affinity.attention"),
        ({"affinity.kind": "none", "affinity.haaf_objective": "cls"}, "only haaf learns"),
        ({"cam.low": 0.9}, "cam.low"),
        ({"data.scale": [2.0, 0.5]}, "data.scale"),
        ({"data.train_images": -1}, "data.train_images"),
        ({"data.val_images": -1}, "val_images"),
        ({"cam.scales": [1.0, 0.0]}, "cam.scales"),
        ({"cam.background": 1.1}, "cam.background"),
        ({"cam.par_dilations": []}, "cam.par_dilations"),
        ({"cam.par_dilations": [1, 0]}, "cam.par_dilations"),
        ({"cam.par_iterations": -1}, "cam.par_iterations"),
        ({"contrast.local_crops": 0}, "contrast.local_crops"),
        ({"contrast.local_size": 0}, "local_size"),
        ({"contrast.momentum": 1.5}, "contrast.momentum"),
        ({"contrast.global_scale": [1.0]}, "contrast.global_scale"),
        ({"reinforce.view_scale": [1.0, 0.3]}, "reinforce.view_scale"),
        ({"reinforce.uncertain": [0.2, 0.5, 0.7]}, "reinforce.uncertain"),
        ({"reinforce.teacher_temperature": [0.04]}, "reinforce.teacher_temperature"),
        ({"reinforce.teacher_temperature": [0.0, 0.07]}, "reinforce.teacher_temperature"),
        ({"reinforce.center_momentum": -0.1}, "reinforce.center_momentum"),
        ({"reinforce.momentum": 9995.0}, "reinforce.momentum"),
        ({"optim.lr": "nan"}, "optim.lr"),
        ({"optim.lr": "inf"}, "optim.lr"),
        ({"optim.lr": 0.0}, "optim.lr"),
        ({"eval.batch": 0}, "eval.batch"),
        ({"eval.scales": []}, "eval.scales"),
        ({"eval.scales": [1.0, -0.5]}, "eval.scales"),
    ],
)
def test_bad_settings_are_named(overrides, word):
    with pytest.raises(UserError, match=word):
        load_recipe("voc/ssepa", overrides)


@pytest.mark.parametrize("name", ["voc", "voc/none_such", "nowhere/toco", "missing.yaml"])
def test_unknown_recipes_are_refused(name):
    with pytest.raises(UserError):
        load_recipe(name)


@pytest.mark.parametrize(
    "content",
    [
        b"a: [",
        b"train:\n\tsteps: 5",
        b"- train",
        b"3",
        "# Größe\n".encode("latin-1"),
        b"train: 5",
        b"train: [5]",
    ],
)
def test_a_broken_recipe_file_is_named(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_recipe(str(path))


def test_text_numbers_are_coerced():
    assert load_recipe("voc/toco", {"optim.lr": "6e-5"}).optim.lr == pytest.approx(6e-5)


def test_round_trip_and_hash(tmp_path):
    recipe = load_recipe("voc/ssepa", {"train.steps": 500})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again == recipe and again.hash() == recipe.hash()
    assert load_recipe("voc/ssepa", {"train.steps": 501}).hash() != recipe.hash()
    assert (
        load_recipe("voc/ssepa", {"train.steps": 500, "data.workers": 0, "data.root": "x"}).hash()
        == recipe.hash()
    )
    assert load_recipe("voc/toco").hash() == load_recipe("voc/ssepa_no_affinity").hash()
    masks = {"reinforce.mask_ratio": 0.2}  # of no effect without self-reinforcement
    assert load_recipe("voc/toco", masks).hash() == load_recipe("voc/toco").hash()
    kept = {"model.keep_class_token": True}
    assert load_recipe("voc/toco", kept).hash() == load_recipe("voc/toco").hash()
    arms = ({"data.views": "fsr"}, {"data.views": "fsr", "reinforce.view_scale": [0.5, 1.0]})
    assert len({load_recipe("voc/toco", arm).hash() for arm in ({}, *arms)}) == 3
    assert load_recipe("voc/fsr", kept).hash() != load_recipe("voc/fsr").hash()
    assert load_recipe("voc/fsr", masks).hash() != load_recipe("voc/fsr").hash()


def test_hash_ignores_what_leaves_the_weights_alone():
    plain = load_recipe("voc/ssepa").hash()
    for same in (
        {"train.checkpointing": True},
        {"train.device": "cpu"},
        {"cam.background": 0.4},
        {"affinity.strategy": "stack_heads"},
    ):
        assert load_recipe("voc/ssepa", same).hash() == plain, same
    for other in ({"train.precision": "bf16"}, {"train.compile": True}, {"cam.low": 0.2}):
        assert load_recipe("voc/ssepa", other).hash() != plain, other


def test_the_root_of_your_own_images_belongs_to_the_recipe(tmp_path, monkeypatch):
    monkeypatch.delenv("FOLDER_ROOT", raising=False)
    hashes = {load_recipe("folder/toco", {"data.root": root}).hash() for root in ("", "a", "b")}
    assert (
        len(hashes) == 3
        and len({load_recipe("voc/toco", {"data.root": r}).hash() for r in ("", "a", "b")}) == 1
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOLDER_ROOT", "mine")
    assert load_recipe("folder/toco").data.root == str(tmp_path / "mine")
    assert load_recipe("folder/toco").hash() not in hashes
    assert load_recipe("folder/toco", {"data.root": "a"}).data.root == "a"
    assert load_recipe("voc/toco").data.root == ""
