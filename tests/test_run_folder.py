"""Run folders: what counts as finished, what is never overwritten, and what a damaged folder says."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssepa_lib.compose import load_recipe
from ssepa_lib.data import build_dataset
from ssepa_lib.errors import UserError
from ssepa_lib.files import FolderLock
from ssepa_lib.model import build_network
from ssepa_lib.training import RunFolder, find_finished, load_run, train
from ssepa_lib.training.checkpoint import write_checkpoint

FILES = {"recipe.yaml", "history.csv", "state.pt", "weights.safetensors"}

# The recipe of a run from before fields were renamed and files carried a format.
OLD_RECIPE = """\
name: shapes/toco
data:
  name: shapes
  root: ''
  train_split: train
  measured_train: ''
  val_split: val
  train_images: 512
  val_images: 200
  crop: 96
  views: toco
  scale: [0.8, 1.5]
  batch: 4
  workers: 0
  eval_size: 96
model:
  backbone: vit_tiny_patch16_224
  backbone_args:
    img_size: 96
    patch_size: 8
    embed_dim: 96
    depth: 6
    num_heads: 3
  weights: micro
  mean: [0.5, 0.5, 0.5]
  std: [0.5, 0.5, 0.5]
  aux_block: -3
  train_pos_embed: false
  drop_path: 0.0
  aggregator: class_token
  keep_class_token: false
affinity:
  kind: none
  source: softmax
  strategy: haaf_fused
  descriptor: patch
  hidden: 32
  supervision: none
  supervision_weight: 0.1
  haaf_lr: 0.005
  steps: 1
  per_scale: true
  auxiliary: false
cam:
  scales: [1.0, 0.5, 1.5]
  flip: true
  background: 0.5
  high: 0.7
  low: 0.25
  par_dilations: [1, 2, 4, 8, 12, 24]
  par_iterations: 10
losses:
  switch: 0.25
  aux_cls: 1.0
  ptc: 0.2
  ctc: 0.5
  seg: 0.1
  reg: 0.05
  unc: 0.0
  cer: 0.0
contrast:
  global_scale: [0.4, 1.0]
  local_crops: 8
  local_size: 32
  temperature: 0.5
  momentum: 0.9
  negative_below: 0.2
  hidden: 256
  bottleneck: 64
  outputs: 128
reinforce:
  view_scale: [0.32, 1.0]
  augmentation: none
  selection: loose
  mask_ratio: 0.4
  mask_block: 2
  random_until: 0.2
  uncertain: [0.2, 0.7]
  student_temperature: 0.1
  teacher_temperature: [0.04, 0.07]
  teacher_warmup: 0.125
  center_momentum: 0.9
  momentum: 0.9995
  outputs: 256
optim:
  lr: 0.00015
  head_lr_factor: 10.0
  weight_decay: 0.01
  decay_all: true
  warmup: 0.075
  warmup_factor: 1.0e-06
  schedule: poly
train:
  steps: 200
  seed: 0
  device: auto
  precision: fp32
  compile: false
  checkpointing: false
  log_every: 10
  save_every: 50
eval:
  scales: [1.0, 1.25, 1.5]
  flip: true
  batch: 50
"""
OLD_HAAF = OLD_RECIPE.replace("shapes/toco", "shapes/ssepa").replace("kind: none", "kind: haaf")
OLD_HAAF = OLD_HAAF.replace("supervision: none", "supervision: ncut")


def finish(recipe, path):
    """A finished run without the training: the weights of an untrained network."""
    folder = RunFolder(path)
    folder.prepare(recipe, resume=True)
    network = build_network(recipe, build_dataset(recipe.data, "train").classes)
    folder.save_weights(network, recipe, recipe.train.steps)
    return folder


def content(path):
    """Every file of a folder with its bytes."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


# Finished


def test_a_finished_run_is_not_trained_again_and_restart_is(tiny, tmp_path):
    recipe, calls = tiny(), []
    train(recipe, tmp_path, on_step=calls.append)
    train(recipe, tmp_path, on_step=calls.append)
    assert len(calls) == 7 and "loss" not in calls[6] and calls[6]["seconds_left"] == 0
    (tmp_path / "curve.csv").touch()
    assert RunFolder(tmp_path).is_finished(recipe)
    train(recipe, tmp_path, resume=False, on_step=calls.append)
    assert len(calls) == 13 and not (tmp_path / "curve.csv").exists()


def test_a_wrong_setting_does_not_cost_a_finished_run(tiny, tmp_path):
    finish(tiny(), tmp_path)
    before = content(tmp_path)
    for resume in (True, False):
        with pytest.raises(UserError, match=r"model\.aux_block"):
            train(tiny(**{"model.aux_block": 20}), tmp_path, resume=resume)
    assert content(tmp_path) == before


def test_weights_can_be_read_by_whoever_can_read_the_recipe(tiny, tmp_path):
    folder = finish(tiny(), tmp_path)
    modes = {file.stat().st_mode for file in (folder.weights, folder.path / "recipe.yaml")}
    assert len(modes) == 1


def test_a_run_is_not_resumed_with_other_classes(tiny, tmp_path):
    recipe = tiny(**{"train.steps": 2})
    train(recipe, tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state.pop("checksum")
    write_checkpoint(tmp_path / "state.pt", state | {"classes": state["classes"][::-1]})
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"class 1 of shapes is '\w+', but the unfinished run began with"):
        train(recipe, tmp_path)


def test_a_finished_run_adopts_evaluation_settings(tiny, tmp_path):
    finish(tiny(), tmp_path)
    train(tiny(**{"data.eval_size": 48, "eval.flip": False}), tmp_path)
    recipe = RunFolder(tmp_path).recipe()
    assert recipe.data.eval_size == 48 and not recipe.eval.flip and RunFolder(tmp_path).is_finished(tiny())


def test_only_the_first_process_adopts_evaluation_settings(tiny, tmp_path, monkeypatch):
    folder = finish(tiny(), tmp_path)
    before = content(tmp_path)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    folder.adopt_evaluation_settings(tiny(**{"eval.flip": False}))
    assert content(tmp_path) == before


def test_weights_without_our_metadata_are_not_a_finished_run(tiny, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert not RunFolder(tmp_path).is_finished(tiny())


def test_unreadable_weights_and_weights_of_an_earlier_step_are_not_a_finished_run(tiny, tmp_path):
    recipe = tiny()
    folder = finish(recipe, tmp_path)
    assert folder.is_finished(recipe) and not folder.is_finished(
        replace(recipe, train=replace(recipe.train, seed=1))
    )
    network = build_network(recipe, ("a", "b"))
    folder.save_weights(network, recipe, recipe.train.steps - 1)
    assert not folder.is_finished(recipe)
    folder.weights.write_bytes(b"cut short")
    assert folder.weights_info() is None and not folder.is_finished(recipe)


def test_a_finished_run_is_found_beside_the_folder(tiny, tmp_path):
    recipe = tiny()
    finish(recipe, tmp_path / "another-name")
    finish(tiny("ssepa"), tmp_path / "ssepa")
    assert find_finished(recipe, tmp_path / "toco") == tmp_path / "another-name"
    assert find_finished(tiny(**{"train.seed": 5}), tmp_path / "toco") == tmp_path / "toco"
    assert find_finished(recipe, tmp_path / "absent" / "toco") == tmp_path / "absent" / "toco"
    newer = tmp_path / "a-newer-one"  # sorts before the run that is found
    shutil.copytree(tmp_path / "another-name", newer)
    recipe_file = newer / "recipe.yaml"
    recipe_file.write_text(recipe_file.read_text().replace("lr:", "rate_of_the_future:", 1))
    assert find_finished(recipe, tmp_path / "toco") == tmp_path / "another-name"
    finish(recipe, tmp_path / "toco")
    assert find_finished(recipe, tmp_path / "toco") == tmp_path / "toco"


@pytest.mark.parametrize(("method", "text"), [("toco", OLD_RECIPE), ("ssepa", OLD_HAAF)])
def test_a_run_with_old_field_names_is_recognised_as_finished(tmp_path, method, text):
    settings = {"losses.ptc_padding": "count"}  # what such a run was trained with
    recipe = load_recipe(f"shapes/{method}", settings)
    folder = RunFolder(tmp_path / "old")
    folder.path.mkdir()
    folder.recipe_file.write_text(text)
    network = build_network(recipe, build_dataset(recipe.data, "train").classes)
    state = network.state_dict()
    metadata = {"classes": json.dumps(network.classes), "recipe": "an old one", "step": "200"}
    save_file(state, folder.weights, metadata)
    before = folder.weights.read_bytes()
    assert folder.is_finished(recipe) and find_finished(recipe, tmp_path / "new") == folder.path
    rows = []
    train(recipe, folder.path, on_step=rows.append)
    assert len(rows) == 1 and "loss" not in rows[0], "it was trained again"
    assert folder.weights.read_bytes() == before and set(content(folder.path)) <= FILES
    again, found = load_run(folder.path, "cpu")
    assert found.hash() == recipe.hash()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


# Never overwritten


def test_another_recipe_in_the_folder_is_refused(tiny, tmp_path):
    train(tiny(), tmp_path)
    before = content(tmp_path)
    assert set(before) == FILES
    with pytest.raises(UserError, match="another recipe"):
        train(tiny("ssepa"), tmp_path)
    assert content(tmp_path) == before


def test_another_recipe_in_the_folder_of_an_unfinished_run_is_refused(tiny, tmp_path):
    train(tiny(), tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    before = content(tmp_path)
    with pytest.raises(UserError, match="another recipe"):
        train(tiny(**{"train.seed": 1}), tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("method", ["toco", "ssepa"])
def test_weights_without_their_recipe_are_never_overwritten(tiny, tmp_path, method):
    """As after moving a folder by halves: the recipe of the weights is unknown, even if it is the same."""
    folder = finish(tiny(), tmp_path)
    folder.recipe_file.unlink()
    before = content(tmp_path)
    assert not folder.is_finished(tiny(method))
    with pytest.raises(UserError, match=r"no recipe\.yaml; restore that file"):
        train(tiny(method), tmp_path)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load_run(tmp_path, "cpu")
    assert content(tmp_path) == before


def test_a_second_writer_is_told_who_holds_the_folder(tiny, tmp_path):
    recipe, refused = tiny(), []

    def second(row):
        with pytest.raises(UserError) as error:
            train(recipe, tmp_path)
        refused.append(str(error.value))

    train(recipe, tmp_path, on_step=second)
    assert len(refused) == 6 and all(f"process {os.getpid()}" in text for text in refused)
    assert all(str(tmp_path) in text and "\n" not in text for text in refused)
    assert RunFolder(tmp_path).is_finished(recipe) and set(content(tmp_path)) == FILES


def test_the_folder_of_a_dead_process_is_taken_over(tiny, tmp_path):
    script = "import sys, time; from pathlib import Path; from ssepa_lib.files import FolderLock\n"
    script += "with FolderLock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid}"):
            train(tiny(), tmp_path)
        assert not (tmp_path / "recipe.yaml").exists()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    train(tiny(), tmp_path)
    assert set(content(tmp_path)) == FILES


def test_the_folder_is_free_again_after_an_error(tiny, tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(tiny(), tmp_path, on_step=lambda row: 1 / 0)
    with FolderLock(tmp_path):
        pass


# Damaged


def test_unreadable_state_and_missing_run_are_explained(tiny, tmp_path):
    recipe = tiny()
    train(recipe, tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    (tmp_path / "state.pt").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"state\.pt"):
        train(recipe, tmp_path)
    with pytest.raises(UserError, match="train it first"):
        load_run(tmp_path / "nothing")


def test_a_state_of_another_version_is_explained(tiny, tmp_path):
    recipe = tiny()
    train(recipe, tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["checksum"]  # as in earlier versions
    state["network"]["renamed"] = state["network"].pop("classifier.weight")
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"does not fit this version .* remove its state\.pt"):
        train(recipe, tmp_path)


def test_weights_that_do_not_fit_their_recipe_are_explained(tiny, tmp_path):
    folder = finish(tiny(), tmp_path)
    state, info = load_file(folder.weights), folder.weights_info()
    save_file({k: v for k, v in state.items() if k != "classifier.weight"}, folder.weights, info)
    with pytest.raises(UserError, match="does not fit"):
        folder.load("cpu")
    save_file(state, folder.weights)
    with pytest.raises(UserError, match="does not fit"):
        folder.load("cpu")
    folder.weights.write_bytes(b"cut short")
    with pytest.raises(UserError, match="does not fit"):
        folder.load("cpu")


# Metrics


def test_metrics_of_several_splits_stay_beside_each_other(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_metrics() == {}
    first, second = {"setting": {"size": 48}, "miou": {"cam": 1.5}}, {"setting": {}, "miou": {}}
    folder.write_metrics("val", first)
    folder.write_metrics("train", second)
    assert folder.read_metrics() == {"val": first, "train": second}
    folder.write_metrics("val", second)
    assert folder.read_metrics() == {"val": second, "train": second}


def test_a_failed_write_leaves_the_old_metrics(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_metrics("val", {"setting": {}})
    before = content(tmp_path)
    with pytest.raises(TypeError):
        folder.write_metrics("val", {"setting": {}, "miou": object()})
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": 99, "val": {"setting": {}}}', "newer version"),
        ('{"format": "two", "val": {"setting": {}}}', "newer version"),
        ("[1, 2]", "not a metrics file"),
        ('{"val": {"setting"', r"metrics\.json"),
        ('{"val": {"miou": {}}}', "'setting' of val is missing"),
        ('{"val": 3}', "'setting' of val is missing"),
    ],
)
def test_metrics_of_another_format_are_refused_and_kept(tmp_path, text, reason):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text(text)
    for access in (folder.read_metrics, lambda: folder.write_metrics("val", {"setting": {}})):
        with pytest.raises(UserError, match=reason) as error:
            access()
        assert str(folder.metrics) in str(error.value)
    assert folder.metrics.read_text() == text
