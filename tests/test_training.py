"""The training loop: schedules, terms, resuming bit for bit, precision, and several processes."""

import csv
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from ssepa_lib.compose import load_recipe, save_recipe
from ssepa_lib.data import build_dataset
from ssepa_lib.errors import UserError
from ssepa_lib.methods import total_loss
from ssepa_lib.training import RunFolder, Trainer, load_run, train
from ssepa_lib.training.run import fingerprint
from ssepa_lib.training.trainer import learning_rate_factor


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


def test_terms_and_their_weights_start_at_the_published_step(tiny, trainer_for):
    recipe = tiny("toco", **{"train.steps": 20, "losses.segmentation_start": 0.1})
    trainer, batches = trainer_for(recipe)
    seen = []
    for batch in batches:
        terms = trainer.terms(batch)
        seen.append(set(terms))
        by_hand = terms["cls"] + terms["aux_cls"] + 0.2 * terms["ptc"] + 0.5 * terms["ctc"]
        if "seg" in terms:
            by_hand = by_hand + 0.1 * terms["seg"] + 0.05 * terms["reg"]
        torch.testing.assert_close(total_loss(terms, trainer.weights), by_hand)
        trainer.index += 1
        if trainer.index == 3:
            break
    early = {"cls", "aux_cls", "ptc", "ctc"}
    assert seen == [early, early, early | {"seg", "reg"}]
    assert load_recipe("voc/ssepa").segmentation_step == 2000


def losses(folder):
    """The rows of a history without the time they took."""
    with (folder / "history.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("method", ["toco", "ssepa_plus", "fsr+ssepa_plus", "afa", "mcc"])
def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(tiny, tmp_path, method):
    """The checkpoint of step 3 lies between two rows of the history, so their means are resumed as well."""
    rhythm = {"train.log_every": 2, "train.save_every": 3, "losses.segmentation_start": 0.3}
    recipe = tiny(method, **rhythm)
    train(recipe, tmp_path / "whole")

    def stop(row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "cut", on_step=stop)
    assert not RunFolder(tmp_path / "cut").is_finished(recipe)
    (tmp_path / "cut" / "history.csv").write_text("broken")
    train(recipe, tmp_path / "cut")
    states = [torch.load(tmp_path / run / "state.pt", weights_only=True) for run in ("whole", "cut")]
    parts = [
        {name: fingerprint(part) for name, part in state.items() if name != "history"} for state in states
    ]
    parts[0].pop("checksum"), parts[1].pop("checksum")  # they count the seconds as well
    assert parts[0] == parts[1]
    assert RunFolder(tmp_path / "whole").fingerprint() == RunFolder(tmp_path / "cut").fingerprint()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") and len(losses(tmp_path / "cut")) == 3


def test_watching_a_run_leaves_it_bit_for_bit_the_same(tiny, tmp_path):
    recipe = tiny("ssepa", **{"train.log_every": 2, "model.drop_path": 0.2})
    seen = []

    def watch(network, step):
        torch.manual_seed(step)  # a careless watcher
        assert not network.training and not torch.is_grad_enabled()
        seen.append((step, network(255 * torch.rand(2, 3, 32, 32)).scores.sum().item()))

    train(recipe, tmp_path / "alone")
    train(recipe, tmp_path / "watched", watch=watch)
    alone, watched = weights(tmp_path / "alone"), weights(tmp_path / "watched")
    assert all(torch.equal(alone[name], watched[name]) for name in alone)
    assert [step for step, _ in seen] == [0, 2, 4, 6]
    train(recipe, tmp_path / "watched", watch=watch)
    assert len(seen) == 4, "a finished run is not trained, so there is nothing to watch"


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


@pytest.mark.parametrize("method", ["ssepa", "afa", "ssepa_plus_mean"])
def test_attention_is_gone_once_nobody_needs_it(tiny, trainer_for, method):
    """Its queries and keys would be held through the passes over further views."""
    recipe = tiny(method, **{"losses.segmentation_start": 0.0, "affinity.start": 0.01})
    trainer, batches = trainer_for(recipe)
    seen = []
    for part in trainer.objectives:
        part.register_forward_pre_hook(
            lambda part, args: seen.append(("attention" in part.needs, args[0].output.attention is not None))
        )
    terms = trainer.step(next(batches))
    assert list(terms) == ["loss", *trainer.weights] and len(seen) == len(trainer.objectives)
    assert all(there for needed, there in seen if needed)
    assert not any(there for needed, there in seen if not needed)


def test_history_averages_a_term_over_the_steps_that_had_it(tiny, tmp_path):
    recipe, seen = tiny(**{"train.steps": 4, "train.log_every": 4, "losses.segmentation_start": 0.5}), []
    train(recipe, tmp_path / "whole", on_step=seen.append)
    single, each = tiny(**{"train.steps": 4, "train.log_every": 1, "losses.segmentation_start": 0.5}), []
    train(single, tmp_path / "single", on_step=each.append)
    late = [row["seg"] for row in each if "seg" in row]
    assert len(late) == 2 and seen[0]["seg"] == pytest.approx(sum(late) / 2)
    assert seen[0]["cls"] == pytest.approx(sum(row["cls"] for row in each) / 4)


def test_a_loss_that_is_not_finite_names_term_and_images_and_keeps_the_checkpoint(
    tiny, tmp_path, monkeypatch
):
    recipe, seen, terms = tiny(**{"train.log_every": 3, "train.save_every": 2}), [], Trainer.terms

    def break_one(self, batch):
        seen.append(batch.id)
        found = terms(self, batch)
        return found | {"ptc": found["ptc"] * float("nan")} if self.index == 2 else found

    monkeypatch.setattr(Trainer, "terms", break_one)
    with pytest.raises(UserError, match=r"at step 3 of run: ptc on the images .*optim\.lr") as error:
        train(recipe, tmp_path / "run")
    assert ", ".join(seen[2]) in str(error.value) and "\n" not in str(error.value)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"recipe.yaml", "state.pt"}, "nothing of a broken step is written"
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["index"] == 2 and all(value.isfinite().all() for value in state["network"].values())


def test_a_diverging_run_stops_with_advice(tiny, tmp_path):
    with pytest.raises(UserError, match="optim.lr"):
        train(tiny("toco", **{"optim.lr": 1e30, "optim.warmup": 0.0}), tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()


def test_cuda_on_a_machine_without_it(tiny, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="no CUDA GPU"):
        train(tiny(**{"train.device": "cuda"}), tmp_path)
    assert not any(tmp_path.iterdir())


def test_bf16_stays_close_to_fp32(tiny, trainer_for):
    losses = []
    for precision in ("fp32", "bf16"):
        recipe = tiny("toco", **{"train.precision": precision})
        trainer, batches = trainer_for(recipe)
        losses.append(trainer.terms(next(batches))["cls"].item())
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize("method", ["ssepa", "ssepa_fast", "fsr"])
def test_bf16_trains_what_fp32_trains(tiny, trainer_for, method):
    trained = []
    for precision in ("fp32", "bf16"):
        recipe = tiny(method, **{"train.precision": precision, "losses.segmentation_start": 0.0})
        trainer, batches = trainer_for(recipe)
        total_loss(trainer.terms(next(batches)), trainer.weights).backward()
        trained.append({name for name, p in trainer.network.named_parameters() if p.grad is not None})
    assert trained[0] == trained[1] and {"classifier.weight", "aux_classifier.weight"} <= trained[0]
    assert method == "fsr" or any(name.startswith("haaf") for name in trained[0])


@pytest.mark.parametrize(("steps", "start"), [(1, 0.0), (2, 0.5)])
def test_two_processes_have_the_gradient_of_one(tiny, tmp_path, steps, start):
    """2 processes × batch 2 against 1 process × batch 4, over gloo: all terms of SS-EPA, and their start."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\nfrom pathlib import Path\nfrom ssepa_lib.compose import load_recipe\n"
        "from ssepa_lib.training import train\ntorch.set_num_threads(1)\n"
        "train(load_recipe(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    settings = {
        "data.batch": 4,
        "train.steps": steps,
        "losses.segmentation_start": start,
        "optim.warmup": 0.0,
    }
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
    # Adam's first moment is a mean of the gradients; a second step starts from other roundings
    for index in one:
        assert one[index]["step"] == two[index]["step"]
        mine, other = one[index]["exp_avg"], two[index]["exp_avg"]
        torch.testing.assert_close(mine, other, rtol=2e-3, atol=2e-6 if steps == 1 else 2e-5)


def test_history_survives_as_json_numbers(tiny, tmp_path):
    rows = []
    train(tiny(), tmp_path, on_step=rows.append)
    assert json.loads(json.dumps(rows)) == rows
