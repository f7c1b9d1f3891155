import json
from dataclasses import replace
from pathlib import Path

import pytest
from toy_network import ColourNetwork, TwoImages, recipe

from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.evaluate import evaluate
from ssepa_lib.evaluation.results import (
    MEASURES,
    OUTPUTS,
    column_names,
    convert_result,
    current_columns,
    describe_setting,
    describe_settings,
    merge_results,
    read_results,
    result_name,
    split_column,
)
from ssepa_lib.training.run import RunFolder

COMMITTED = sorted((Path(__file__).parent.parent / "results").glob("*/*/metrics.json"))


def result(*test_time, size=8, **options):
    return evaluate(
        ColourNetwork(),
        recipe(size),
        TwoImages(),
        device="cpu",
        test_time=test_time or ("single",),
        **options,
    )


def changed(made, section, name, value):
    return replace(made, **{section: replace(getattr(made, section), **{name: value})})


def test_columns_are_outputs_under_test_time_modes():
    names = column_names(("cam", "segmentation"), ("ms_crf", "single", "ms"))
    assert names == ["cam", "segmentation", "cam_ms", "segmentation_ms", "segmentation_ms_crf"]
    for column, parts in (
        ("cam", ("cam", "single")),
        ("aux_cam_ms", ("aux_cam", "ms")),
        ("pseudo_label_ms_crf", ("pseudo_label", "ms_crf")),
    ):
        assert split_column(column) == parts
    with pytest.raises(UserError, match="cams"):
        column_names(("cams",), ("single",))
    with pytest.raises(UserError, match="choose from single, ms, ms_crf"):
        column_names(("cam",), ("multi",))


def test_the_setting_tells_scales_flip_and_crf():
    setting = result("single", "ms")["setting"]
    assert setting["outputs"]["segmentation"] == {"scales": [1.0], "flip": False, "crf": False}
    assert setting["outputs"]["segmentation_ms"] == {"scales": [1.0, 1.25, 1.5], "flip": True, "crf": False}
    assert setting["outputs"]["cam_ms"] == {"scales": [1.0, 0.5, 1.5], "flip": True, "crf": False}
    assert setting["method"] == "toco" and setting["split"] == "val" and setting["images"] == 2
    line = describe_setting(setting, "segmentation_ms")
    assert line == "toy val, 2 images, 8², scales 1/1.25/1.5 + flip, 20000 steps of 4, seed 0"
    native = setting | {"size": 0, "outputs": {"cam": {"scales": [1.0], "flip": False, "crf": True}}}
    assert "2 images, native size, scale 1 + CRF, " in describe_setting(native, "cam")


def test_every_view_is_described_once():
    columns = ("cam", "segmentation", "cam_ms", "segmentation_ms", "pseudo_label")
    outputs = ("cam", "segmentation")
    settings = [result(mode, outputs=outputs)["setting"] for mode in ("single", "ms")]
    lines = describe_settings(settings, columns)
    assert [line.split(": ")[0] for line in lines] == ["cam, segmentation", "cam_ms", "segmentation_ms"]
    views = ("scale 1,", "scales 1/0.5/1.5 + flip,", "scales 1/1.25/1.5 + flip,")
    for line, view in zip(lines, views, strict=True):
        assert f"8², {view}" in line


def test_a_column_is_current_while_the_recipe_says_the_same():
    made, known = recipe(8), json.loads(json.dumps(result("single", "ms")))
    single, both = set(column_names(OUTPUTS, ("single",))), set(known["miou"])
    assert current_columns(known, made, 2) == both and current_columns(known, made, 1) == set()
    for section, name, value in (("cam", "background", 0.4), ("data", "eval_size", 0), ("train", "seed", 1)):
        assert current_columns(known, changed(made, section, name, value), 2) == set(), name
    flat = changed(made, "cam", "flip", False)
    known["setting"]["recipe_hash"] = flat.hash()
    assert current_columns(known, flat, 2) == single | {"segmentation_ms", "refined_cam_ms"}


def test_merging_keeps_the_new_column_of_two():
    old, new = result("single"), result("ms", outputs=("cam",))
    new["miou"]["cam"] = new["setting"]["outputs"]["cam"] = 1
    merged = merge_results(old, new)
    assert merged["miou"] == old["miou"] | {"cam_ms": 100.0, "cam": 1}
    assert merged["setting"]["outputs"]["cam"] == 1 and "segmentation" in merged["setting"]["outputs"]
    for part in (*MEASURES, "per_class", "threshold_curve"):
        assert {"aux_cam", "cam_ms"} <= merged[part].keys(), part


def test_results_of_another_size_or_number_of_images_have_their_own_name():
    assert result_name("val", None, None) == "val"
    assert result_name("val", 10, None) == "val (10 images)"
    assert result_name("val", None, 0) == "val (native size)"
    assert result_name("test", 10, 336) == "test (10 images, 336²)"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_results_of_older_versions_are_read(path):
    old, new = json.loads(path.read_text()), read_results(path.parent)
    old.pop("format", None)
    assert new.keys() == old.keys()
    for name, found in new.items():
        setting = found["setting"]
        assert found["miou"] == old[name]["miou"]
        assert {"products", "supervision"}.isdisjoint(setting) and "haaf_objective" in setting
        for column in setting["outputs"]:
            assert describe_setting(setting, column)
            assert found["miou"][column] is not None and found["boundary_iou"].get(column, 1) != 0


def test_an_old_result_says_that_it_lacks_measures():
    assert COMMITTED
    old = result()
    old["setting"] |= {"products": old["setting"].pop("outputs")}
    old["setting"] |= {"supervision": old["setting"].pop("haaf_objective")}
    for measure in MEASURES[1:]:
        old.pop(measure)
    new = convert_result(old)
    assert new["precision"] == new["recall"] == new["boundary_iou"] == dict.fromkeys(old["miou"])
    assert new["setting"] == result()["setting"] and convert_result(new) == new


def test_what_is_no_result_is_named(tmp_path):
    run = RunFolder(tmp_path)
    run.write_metrics("val", result())
    assert read_results(tmp_path)["val"] == json.loads(json.dumps(result()))
    assert read_results(tmp_path / "none") == {}
    run.write_metrics("val", {name: value for name, value in result().items() if name != "miou"})
    with pytest.raises(UserError, match=r"metrics\.json: 'miou' is missing in the result 'val'; delete"):
        read_results(tmp_path)
    setting = {name: value for name, value in result()["setting"].items() if name != "outputs"}
    run.write_metrics("val", result() | {"setting": setting})
    with pytest.raises(UserError, match="'outputs' is missing"):
        read_results(tmp_path)
