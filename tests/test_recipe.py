"""Recipes: what is accepted, what is refused and how, the identity of a run, old names.

After a change that is meant to change hashes, `python tests/test_recipe.py` makes the table of hashes again.
"""

import json
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ssepa_lib import compose
from ssepa_lib.compose import FORMAT, KEYS, RENAMED, SECTIONS, explain, load_recipe, method_title, save_recipe
from ssepa_lib.errors import UserError
from ssepa_lib.fields import info
from ssepa_lib.paths import RECIPES
from ssepa_lib.recipe import AffinityConfig, CamConfig, Recipe, ReinforceConfig

HASHES = Path(__file__).with_name("recipe_hashes.json")
METHODS = [*sorted(path.stem for path in (RECIPES / "method").glob("*.yaml")), "fsr+ssepa", "mcc+ssepa"]
NAMES = [
    f"{data.stem}/{method}" for data in sorted((RECIPES / "data").glob("*.yaml")) for method in METHODS
] + [f"voc/ssepa/{file.stem}" for file in sorted((RECIPES / "backbone").glob("*.yaml"))]
CONTROL = "".join(map(chr, [*range(32), 127]))  # no path and no name holds one
OLD = """
name: voc_mini/ssepa
affinity: {kind: haaf, source: softmax, strategy: haaf_fused, steps: 2, supervision: ncut,
  supervision_weight: 0.2}
losses: {switch: 0.3, ptc: 0.2}
"""


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_loads(name):
    assert load_recipe(name).name == name


def test_what_a_method_needs_on_some_data_replaces_the_setting_of_the_data():
    def rate(name, **overrides):
        return load_recipe(name, overrides).optim.classifier_lr_factor

    found = [rate(name) for name in ("voc_mini/fsr", "voc_mini/fsr+ssepa_plus", "voc_mini/ssepa_plus+fsr")]
    assert found == [5.0] * 3 and rate("voc_mini/ssepa_plus") == 20.0 and rate("voc/fsr") == 1.0
    assert rate("voc_mini/fsr", **{"optim.classifier_lr_factor": 7}) == 7.0


@pytest.mark.parametrize("file", sorted((RECIPES / "pair").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_pair_belongs_to_data_and_a_method_that_exist(file):
    data, method = file.stem.split("+")
    assert (RECIPES / "data" / f"{data}.yaml").is_file() and (RECIPES / "method" / f"{method}.yaml").is_file()


def test_hashes_are_those_of_the_stored_table(monkeypatch):
    monkeypatch.delenv("FOLDER_ROOT", raising=False)
    assert {name: load_recipe(name).hash() for name in NAMES} == json.loads(HASHES.read_text())


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda f: f.stem)
def test_every_recipe_file_opens_with_a_comment(file):
    assert file.read_text().startswith("# ")


def test_another_backbone_starts_without_the_arguments_of_the_one_before():
    recipe = load_recipe("shapes/toco/swin_tiny")
    assert recipe.model.backbone_args == {} and recipe.model.weights == ""
    assert load_recipe("shapes/toco", {"model.backbone": "deit_tiny_patch16_224"}).model.backbone_args == {}
    same = load_recipe("shapes/toco", {"model.backbone_args": {"depth": 2}}).model
    assert same.backbone_args["depth"] == 2 and same.backbone_args["embed_dim"] == 96


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
        ({"eval.scales": [1e-9]}, "eval.scales"),
        ({"eval.scales": "[1.0"}, r"eval.scales=\[1.0"),
        ({"data.batch": 10**9}, "data.batch"),
        ({"data.workers": -1}, "data.workers"),
        ({"data.scale": [1e-9, 1.0]}, "data.scale"),
        ({"train.steps": 10**30}, "train.steps"),
        ({"train.steps": 2.5}, "train.steps"),
        ({"train.steps": None}, "train.steps"),
        ({"train.seed": -1}, "train.seed"),
        ({"train.seed": 2**32}, "train.seed"),
        ({"train.compile": "maybe"}, "train.compile is 'maybe'; it must be true or false"),
        ({"model.drop_path": 1.0}, "model.drop_path"),
        ({"model.mean": [0.5]}, "model.mean"),
        ({"model.std": [0.5, 0.5, 0.0]}, "model.std"),
        ({"cam.par_dilations": [1000]}, "cam.par_dilations"),
        ({"losses.ptc": -0.1}, "losses.ptc"),
        ({"losses.seg": float("nan")}, "losses.seg"),
        ({"losses.contrast_start": 1.5}, "losses.contrast_start"),
        ({"optim.head_lr_factor": -1.0}, "optim.head_lr_factor"),
        ({"optim.warmup": 1.0}, "optim.warmup"),
        ({"affinity.hidden": 0}, "affinity.hidden"),
        ({"affinity.iterations": 0}, "affinity.iterations"),
        (
            {"affinity.kind": "none", "affinity.haaf_objective": "none", "affinity.deflate": True},
            "deflate needs",
        ),
        ({"affinity.coverage": 0.3}, "set affinity.iterations to 2 or more"),
        ({"contrast.outputs": 0}, "contrast.outputs"),
        ({"contrast.temperature": 0.0}, "contrast.temperature"),
        ({"reinforce.mask_block": 0}, "reinforce.mask_block"),
        ({"reinforce.mask_ratio": 1.0}, "reinforce.mask_ratio"),
        ({"train.stepz": 1}, r"did you mean train\.steps\?"),
        ({"steps": 1}, r"did you mean .*train\.steps"),
        ({"train.lr": 1}, r"did you mean optim\.lr\?"),
        ({"train": 5}, "train is 5"),
        ({"quite": {"unlike": 1}}, "the sections are data, model"),
    ],
)
def test_bad_settings_are_named(overrides, word):
    with pytest.raises(UserError, match=word) as error:
        load_recipe("voc/ssepa", overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["voc", "voc/none_such", "nowhere/toco", "missing.yaml", "voc/fsr+", "voc/fsr+none_such"]
)
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
        b"5: 5",
        b"train: {5: 5}",
        b"format: 3",
        b"format: new",
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


def test_a_newer_file_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"format: {FORMAT + 1}\ntrain: {{unheard_of: 1}}")
    with pytest.raises(UserError, match=r"recipe\.yaml was written by a newer version"):
        load_recipe(str(path))


def test_texts_are_read_by_the_type_of_the_field():
    changes = {
        "train.steps": "500",
        "optim.lr": "1e-4",
        "train.compile": "true",
        "eval.scales": "[1, 1e0]",
        "model.backbone_args": "{depth: 4}",
        "model.backbone_args.mlp_ratio": "2e0",
        "model.backbone_args.qkv_bias": "false",
        "data.root": "5",
        "model.weights": "[x",
    }
    recipe = load_recipe("voc/toco", changes)
    assert (recipe.train.steps, recipe.optim.lr, recipe.train.compile) == (500, 1e-4, True)
    assert recipe.eval.scales == [1.0, 1.0] and recipe.data.root == "5" and recipe.model.weights == "[x"
    assert recipe.model.backbone_args == {"depth": 4, "mlp_ratio": 2.0, "qkv_bias": False}


def test_old_names_are_understood_everywhere(tmp_path, caplog):
    compose._warn_once.cache_clear()  # another test of this process may have met the same old names
    path = tmp_path / "recipe.yaml"
    path.write_text(OLD)
    recipe = load_recipe(str(path))
    assert (recipe.affinity.attention, recipe.affinity.strategy) == ("probabilities", "matrix_free")
    assert (recipe.affinity.haaf_objective, recipe.affinity.haaf_weight) == ("ncut", 0.2)
    assert recipe.affinity.iterations == 2 and recipe.losses.segmentation_start == 0.3
    (line,) = caplog.messages
    assert str(path) in line and "affinity.steps is now affinity.iterations" in line and "\n" not in line
    assert "affinity.strategy haaf_fused is now matrix_free" in line
    assert recipe.title == "SS-EPA (with Patch Affinity, HAAF)"
    caplog.clear()
    again = load_recipe("shapes/ssepa", {"losses.switch": "0.125", "affinity.source": "logits"})
    assert again.losses.segmentation_start == 0.125 and again.affinity.attention == "logits"
    assert "losses.switch is now losses.segmentation_start" in caplog.messages[0]
    with pytest.raises(UserError, match="affinity.iterations is 0"):
        load_recipe("voc/ssepa", {"affinity.steps": 0})


def test_the_table_of_renamed_settings_leads_to_settings():
    for key, new in RENAMED.items():
        if isinstance(new, str):
            assert new in KEYS and key not in KEYS
        else:
            section, name = key.split(".")
            assert set(new.values()) <= set(info(SECTIONS[section], name).annotation.__args__)


def test_methods_compose():
    both, alias = load_recipe("voc/fsr+ssepa"), load_recipe("voc/ssepa_fsr")
    assert replace(alias, name=both.name) == both and both.hash() == alias.hash()
    fsr, ssepa = load_recipe("voc/fsr"), load_recipe("voc/ssepa")
    assert both.affinity == ssepa.affinity and (both.model, both.optim) == (fsr.model, fsr.optim)
    assert replace(both.losses, ptc_padding="count") == fsr.losses
    assert both.title == alias.title == "FSR + SS-EPA" and fsr.title == "FSR"
    with pytest.raises(UserError, match="only haaf learns"):
        load_recipe("voc/ssepa+toco")


def test_titles():
    titles = {name: method_title(name) for name in METHODS}
    assert len(set(titles.values())) == len(titles)
    assert titles["toco"] == "ToCo" and titles["ssepa_no_affinity"] == "SS-EPA (w/o Patch Affinity)"
    assert method_title("voc/ssepa_affinity/vit_base") == "SS-EPA (with Patch Affinity)"
    assert method_title("my_own") == "my_own" and method_title("folder/small.yaml") == "small"


def test_coco_runs_in_stages():
    recipe = load_recipe("coco/ssepa")
    starts = recipe.losses.segmentation_start, recipe.losses.contrast_start, recipe.cam.main_from
    assert [round(start * recipe.train.steps) for start in starts] == [8000, 12000, 12000]
    assert (recipe.cam.background, recipe.cam.high, recipe.cam.low) == (0.45, 0.65, 0.25)


def test_recipes_are_frozen_and_checked_when_copied():
    recipe = load_recipe("voc/ssepa")
    with pytest.raises(FrozenInstanceError):
        recipe.train.steps = 5
    with pytest.raises(UserError, match="train.steps is 0; it must be a whole number from 1 to"):
        replace(recipe.train, steps=0)
    with pytest.raises(UserError, match="cam.low is 0.9"):
        CamConfig(low=0.9)
    with pytest.raises(UserError, match=r"no setting affinity.kinds; did you mean kind\?"):
        AffinityConfig(kinds="haaf")


def test_every_setting_is_documented_and_has_bounds():
    for key in KEYS:
        section, name = key.split(".")
        field = info(SECTIONS[section], name)
        assert field.description and field.description.endswith("."), key
        text = explain(key)
        assert text.startswith(f"{key}: ") and field.description in text and "default: " in text
        if field.annotation in (int, float):
            assert " from " in text or " above " in text, key
    assert explain("affinity.iterations").splitlines()[0] == (
        "affinity.iterations: a whole number from 1 to 100"
    )
    assert explain("model").count("default: ") == len(SECTIONS["model"].__pydantic_fields__)
    with pytest.raises(UserError, match=r"did you mean model\.backbone\?"):
        explain("model.backbon")


def test_identity_covers_only_trained_settings_that_act_and_differ(monkeypatch):
    assert Recipe().identity() == {}
    assert Recipe(affinity=AffinityConfig(iterations=3)).identity() == {}
    assert load_recipe("shapes/toco", {"contrast.temperature": 0.7, "losses.ctc": 0}).identity().keys() == {
        "data",
        "model",
        "losses",
        "optim",
        "train",
    }
    narrow = {"contrast.hidden": 64}  # the shape of FSR's projector too
    assert load_recipe("voc/fsr", narrow).hash() != load_recipe("voc/fsr").hash()
    assert load_recipe("voc/fsr").identity()["reinforce"] == {"REVISION": 2}
    before = load_recipe("voc/fsr").hash(), load_recipe("voc/toco").hash()
    monkeypatch.setattr(ReinforceConfig, "REVISION", 3)
    assert load_recipe("voc/fsr").hash() != before[0] and load_recipe("voc/toco").hash() == before[1]
    padding = {"losses.ptc_padding": "count"}
    assert load_recipe("voc/toco", padding).hash() != before[1]


@example(steps=1, lr=1e-4, scales=[1.0], title="1e5", root="0E0")
@example(steps=1, lr=1e-4, scales=[1.0], title="a\x85b\u2028", root="f\x85#")
@given(
    steps=st.integers(1, 10**8),
    lr=st.floats(1e-12, 100, exclude_min=True),
    scales=st.lists(st.floats(0.05, 20), min_size=1, max_size=4),
    title=st.text(max_size=20),
    root=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=CONTROL), max_size=20),
)
def test_any_recipe_survives_its_file(tmp_path_factory, steps, lr, scales, title, root):
    changes = {"train.steps": steps, "optim.lr": lr, "cam.scales": scales, "title": title, "data.root": root}
    recipe = load_recipe("voc/ssepa", changes)
    path = tmp_path_factory.mktemp("run") / "recipe.yaml"
    save_recipe(recipe, path)
    assert load_recipe(str(path)) == recipe
    stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert stored.pop("format") == FORMAT and stored.keys() == asdict(recipe).keys()


if __name__ == "__main__":
    table = {name: load_recipe(name).hash() for name in NAMES}
    HASHES.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{HASHES}: {len(table)} hashes")
