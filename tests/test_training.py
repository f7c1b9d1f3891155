import csv
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from ssepa_lib.data.datasets import build_dataset
from ssepa_lib.data.views import train_loader
from ssepa_lib.errors import UserError
from ssepa_lib.methods.objectives import total_loss
from ssepa_lib.recipe import load_recipe
from ssepa_lib.training.trainer import Trainer, is_finished, learning_rate_factor, load_run, train


def weights(folder):
    return load_run(folder, "cpu")[0].state_dict()


def test_learning_rate_curve_of_the_published_recipe():
    recipe = load_recipe("voc/ssepa")
    assert learning_rate_factor(recipe, 0) == pytest.approx(1e-6)
    assert learning_rate_factor(recipe, 200) == pytest.approx(1e-6 + (1 - 1e-6) * 200 / 1500)
    assert learning_rate_factor(recipe, 1500) == pytest.approx((1 - 1500 / 20000) ** 0.9)
    assert learning_rate_factor(recipe, 19999) == pytest.approx((1 / 20000) ** 0.9)


def test_learning_rate_curve_of_fsr():
    recipe = load_recipe("voc/fsr")
    assert learning_rate_factor(recipe, 0) == pytest.approx(0.1)
    assert learning_rate_factor(recipe, 1500) == pytest.approx(1)
    assert learning_rate_factor(recipe, 10750) == pytest.approx(0.5)
    assert learning_rate_factor(recipe, 19999) < 1e-6


def test_terms_and_their_weights_switch_at_the_published_step(tiny):
    recipe = tiny("toco", **{"train.steps": 20, "losses.switch": 0.1})
    dataset = build_dataset(recipe.data, "train")
    trainer = Trainer(recipe, dataset.classes, torch.device("cpu"))
    seen = []
    for batch in train_loader(dataset, recipe):
        terms = trainer.terms(batch)
        seen.append(set(terms))
        by_hand = terms["cls"] + terms["aux_cls"] + 0.2 * terms["ptc"] + 0.5 * terms["ctc"]
        if "seg" in terms:
            by_hand = by_hand + 0.1 * terms["seg"] + 0.05 * terms["reg"]
        torch.testing.assert_close(total_loss(terms, recipe), by_hand)
        trainer.index += 1
        if trainer.index == 3:
            break
    early = {"cls", "aux_cls", "ptc", "ctc"}
    assert seen == [early, early, early | {"seg", "reg"}]
    assert load_recipe("voc/ssepa").switch_step == 2000


@pytest.mark.parametrize("method", ["toco", "ssepa", "ssepa_fsr"])
def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(tiny, tmp_path, method):
    recipe = tiny(method, **{"losses.switch": 0.3})
    train(recipe, tmp_path / "whole")

    def stop(row):
        if row["step"] == 5:  # the last checkpoint is at step 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "cut", on_step=stop)
    assert not is_finished(recipe, tmp_path / "cut")
    train(recipe, tmp_path / "cut")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    rows = [list(csv.DictReader((tmp_path / run / "history.csv").open())) for run in ("whole", "cut")]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]] and len(rows[0]) == 6


def test_training_learns_and_reports(tiny, tmp_path):
    recipe, rows = tiny("toco", **{"train.steps": 30, "optim.lr": 1e-3, "train.log_every": 5}), []
    folder = train(recipe, tmp_path / "run", on_step=rows.append)
    assert rows[-1]["cls"] < rows[0]["cls"]
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30] and rows[-1]["seconds_left"] == 0
    assert {p.name for p in folder.iterdir()} == {
        "recipe.yaml",
        "history.csv",
        "state.pt",
        "weights.safetensors",
    }
    network, again = load_run(folder, "cpu")
    assert again == recipe and network.classes == build_dataset(recipe.data, "train").classes


def test_a_finished_run_is_not_trained_again_and_restart_is(tiny, tmp_path):
    recipe, calls = tiny(), []
    train(recipe, tmp_path, on_step=calls.append)
    train(recipe, tmp_path, on_step=calls.append)
    assert len(calls) == 6
    train(recipe, tmp_path, resume=False, on_step=calls.append)
    assert len(calls) == 12


def test_a_finished_run_takes_over_evaluation_settings(tiny, tmp_path):
    train(tiny(), tmp_path)
    train(tiny(**{"data.eval_size": 48, "eval.flip": False}), tmp_path)
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe.data.eval_size == 48 and not recipe.eval.flip and is_finished(tiny(), tmp_path)


def test_weights_without_our_metadata_are_not_a_finished_run(tiny, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert not is_finished(tiny(), tmp_path)


def test_history_averages_a_term_over_the_steps_that_had_it(tiny, tmp_path):
    recipe, seen = tiny(**{"train.steps": 4, "train.log_every": 4, "losses.switch": 0.5}), []
    train(recipe, tmp_path / "whole", on_step=seen.append)
    single, each = tiny(**{"train.steps": 4, "train.log_every": 1, "losses.switch": 0.5}), []
    train(single, tmp_path / "single", on_step=each.append)
    late = [row["seg"] for row in each if "seg" in row]
    assert len(late) == 2 and seen[0]["seg"] == pytest.approx(sum(late) / 2)
    assert seen[0]["cls"] == pytest.approx(sum(row["cls"] for row in each) / 4)


def test_another_recipe_in_the_folder_is_refused(tiny, tmp_path):
    train(tiny(), tmp_path)
    before = (tmp_path / "weights.safetensors").read_bytes()
    with pytest.raises(UserError, match="another recipe"):
        train(tiny("ssepa"), tmp_path)
    assert (tmp_path / "weights.safetensors").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_with_advice(tiny, tmp_path):
    with pytest.raises(UserError, match="optim.lr"):
        train(tiny("toco", **{"optim.lr": 1e30, "optim.warmup": 0.0}), tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()


def test_unreadable_state_and_missing_run_are_explained(tiny, tmp_path):
    recipe = tiny()
    train(recipe, tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    (tmp_path / "state.pt").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"state\.pt"):
        train(recipe, tmp_path)
    with pytest.raises(UserError, match="train it first"):
        load_run(tmp_path / "nothing")


def test_cuda_on_a_machine_without_it(tiny, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="no CUDA GPU"):
        train(tiny(**{"train.device": "cuda"}), tmp_path)
    assert not any(tmp_path.iterdir())


def test_bf16_stays_close_to_fp32(tiny):
    losses = []
    for precision in ("fp32", "bf16"):
        recipe = tiny("toco", **{"train.precision": precision})
        dataset = build_dataset(recipe.data, "train")
        trainer = Trainer(recipe, dataset.classes, torch.device("cpu"))
        losses.append(trainer.terms(next(iter(train_loader(dataset, recipe))))["cls"].item())
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize("method", ["ssepa", "ssepa_fast", "fsr"])
def test_bf16_trains_what_fp32_trains(tiny, method):
    trained = []
    for precision in ("fp32", "bf16"):
        recipe = tiny(method, **{"train.precision": precision, "losses.switch": 0.0})
        dataset = build_dataset(recipe.data, "train")
        trainer = Trainer(recipe, dataset.classes, torch.device("cpu"))
        total_loss(trainer.terms(next(iter(train_loader(dataset, recipe)))), recipe).backward()
        trained.append({name for name, p in trainer.network.named_parameters() if p.grad is not None})
    assert trained[0] == trained[1] and {"classifier.weight", "aux_classifier.weight"} <= trained[0]
    assert method == "fsr" or any(name.startswith("haaf") for name in trained[0])


@pytest.mark.parametrize(("steps", "switch"), [(1, 0.0), (2, 0.5)])
def test_two_processes_have_the_gradient_of_one(tiny, tmp_path, steps, switch):
    """2 processes × batch 2 against 1 process × batch 4, over gloo: all terms of SS-EPA; and the switch to them."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\nfrom pathlib import Path\nfrom ssepa_lib.recipe import load_recipe\n"
        "from ssepa_lib.training.trainer import train\ntorch.set_num_threads(1)\n"
        "train(load_recipe(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    from ssepa_lib.recipe import save_recipe

    settings = {"data.batch": 4, "train.steps": steps, "losses.switch": switch, "optim.warmup": 0.0}
    recipe = tiny("ssepa_affinity", **settings)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    ]
    for name, command in (("one", [sys.executable]), ("two", launcher)):
        done = subprocess.run(
            [*command, str(script), str(tmp_path / "recipe.yaml"), str(tmp_path / name)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        torch.load(tmp_path / n / "state.pt", weights_only=True)["optimizer"]["state"] for n in ("one", "two")
    )
    assert one.keys() == two.keys()
    for (
        index
    ) in one:  # Adam's first moment is a mean of the gradients; a second step starts from other roundings
        assert one[index]["step"] == two[index]["step"]
        mine, other = one[index]["exp_avg"], two[index]["exp_avg"]
        torch.testing.assert_close(mine, other, rtol=2e-3, atol=2e-6 if steps == 1 else 2e-5)


def test_history_survives_as_json_numbers(tiny, tmp_path):
    rows = []
    train(tiny(), tmp_path, on_step=rows.append)
    assert json.loads(json.dumps(rows)) == rows
