import json
from dataclasses import replace

import pytest
import torch

from ssepa_lib.benchmarks import naive_step
from ssepa_lib.benchmarks.bench import run_suites
from ssepa_lib.benchmarks.measure import count_flops, encoder_bytes, interleaved, make_row, pairwise
from ssepa_lib.benchmarks.part_suites import mask_logits
from ssepa_lib.benchmarks.setup import Setup
from ssepa_lib.cli import main
from ssepa_lib.data import Batch
from ssepa_lib.data.voc import VOC_CLASSES
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.memory import saved_activation_bytes
from ssepa_lib.labels import PseudoLabeler, build_refiner, multi_scale_cam
from ssepa_lib.methods.losses import dense_energy
from ssepa_lib.model import build_network
from ssepa_lib.training import Trainer

CLASSES = ("a", "b", "c")


@pytest.fixture
def scene():
    """Images, labels of which each shows another number of classes, and a box with padding."""
    image = torch.rand(3, 3, 4, 4).mul(255).repeat_interleave(8, 2).repeat_interleave(8, 3).byte()
    label = torch.tensor([[1.0, 0, 0], [1, 0, 1], [1, 1, 1]])
    box = torch.tensor([[0, 32, 0, 32], [0, 24, 4, 32], [0, 32, 0, 32]])
    return image, label, box


def test_naive_refinement_and_labels_are_the_library_ones(scene, tiny):
    image, label, box = scene
    config = tiny().cam
    labeler = PseudoLabeler(config)
    scores = torch.rand(3, 2, 32, 32)
    theirs = naive_step.naive_par(image, scores, config.par_dilations, config.par_iterations)
    torch.testing.assert_close(theirs, labeler.par(image, scores), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(theirs, scores, atol=0.05)
    cam = torch.rand(3, 3, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    theirs = naive_step.naive_labels(image, cam, label, box, config)
    ours = labeler.training_labels(image, cam * label[:, :, None, None], label, box)
    assert (theirs == ours).float().mean() > 0.999 and len(theirs.unique()) > 2


@pytest.mark.parametrize("per_scale", [True, False])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_naive_cam_is_the_library_one(scene, tiny, auxiliary, per_scale):
    image, label, _ = scene
    settings = {"affinity.auxiliary": auxiliary, "affinity.per_scale": per_scale, "affinity.iterations": 2}
    recipe = tiny("ssepa", **settings)
    network = build_network(recipe, CLASSES).eval()
    torch.nn.init.normal_(network.haaf.mlp[2].weight)  # weights that differ from layer to layer
    for block in network.backbone.vit.blocks:
        block.attn.qkv.weight.data *= 20  # peaked attention: refined maps differ by more than rounding
    refiner = build_refiner(recipe.affinity, network)
    theirs = naive_step.naive_cam(network, image, label, recipe.cam, refiner)
    ours = multi_scale_cam(network, image, label, recipe.cam, refiner)
    for name in ("main", "auxiliary", "refined"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=1e-3, atol=1e-4)
    assert (ours.refined - ours.main).abs().max() > 0.01


def test_naive_step_has_the_terms_and_gradients_of_the_library_step(scene, tiny):
    image, label, box = scene
    recipe = tiny("ssepa", **{"data.batch": 3})
    batch = Batch(["0", "1", "2"], image, box, label, image.flip(-1), image, None)
    found = []
    for kind in (Trainer, naive_step.NaiveTrainer):
        trainer = kind(recipe, CLASSES, torch.device("cpu"))
        trainer.index = recipe.segmentation_step
        terms = trainer.terms(batch)
        sum(terms.values()).backward()
        found.append((terms, torch.cat([p.grad.flatten() for p in trainer.network.decoder.parameters()])))
    (ours, gradient), (theirs, other) = found
    assert ours.keys() == theirs.keys() == {"cls", "aux_cls", "ptc", "ctc", "seg", "reg", "haaf"}
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-6, msg=name)
    assert (gradient - other).norm() < 1e-3 * gradient.norm()


def test_attention_maps_are_built_where_they_are_wanted(tiny):
    network = build_network(tiny(), CLASSES).eval()
    image = torch.rand(1, 3, 32, 32) * 255
    with naive_step.MaterialisedAttention(keep=True) as attention, torch.no_grad():
        built = network(image)
    assert len(attention.maps) == network.backbone.depth
    for weights in attention.maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 17))
    torch.testing.assert_close(built.scores, network(image).scores, rtol=1e-4, atol=1e-5)


def test_exact_and_fast_energy_stay_close_where_the_grid_is_used():
    setup = Setup(torch.device("cpu"), quick=True)
    image, mask = setup.images(1, 144)
    target, box = mask.long(), torch.tensor([[0, 144, 0, 144]])
    target[:, ::2] = 255
    logits = mask_logits(mask)
    fast, exact = (dense_energy(image, logits, target, box, exact=e) for e in (False, True))
    assert fast < 0 and abs(fast / exact - 1) < 0.03 and fast != exact


def test_ratios_and_targets():
    gain = make_row("s", "n", "x", "ms", 2.0, 8.0, target="≥ 4")
    assert gain.ratio == 4 and gain.met
    overhead = make_row("s", "n", "x", "MB", 106.0, 100.0, gain=False, target="≤ 1.05")
    assert overhead.ratio == pytest.approx(1.06) and overhead.met is False
    value = make_row("s", "n", "x", "ms", 6.0, 60.0, target="≤ 5 ms")
    assert value.met is False and value.ratio == 10
    assert make_row("s", "n", "x", "ms", 6.0).met is None
    assert pairwise([2, 4, 90], [1, 2, 30]) == 2  # the disturbed round does not move the median


def test_the_published_size_can_be_asked_for_on_a_cpu():
    small, full = (Setup(torch.device("cpu"), full=f) for f in (False, True))
    assert (small.side, full.side) == (224, 448) and full.describe(1).startswith("ViT-B/16, 448²")
    assert "base" in full.recipe().model.backbone and full.recipe().contrast.local_size == 96
    assert full.target("≥ 2") == "≥ 2"


def test_calls_are_interleaved():
    calls = []
    setup = Setup(torch.device("cpu"), quick=True)
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, setup)
    assert calls == ["a", "b"] * (setup.rounds + 1) and len(times["a"]) == setup.rounds


def test_flops_of_a_matrix_product():
    a, b = torch.rand(4, 5), torch.rand(5, 6)
    assert count_flops(lambda: a @ b) == 2 * 4 * 5 * 6


def test_suites_write_complete_rows(tmp_path, capsys):
    assert (
        main(
            ["bench", "par", "energy", "loader", "crf", "--quick", "--device", "cpu", "--out", str(tmp_path)]
        )
        == 0
    )
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {"device", "torch", "torch_threads", "cores"} <= report["machine"].keys()
    suites = {row["suite"] for row in report["rows"]}
    assert {"par", "energy", "loader"} <= suites
    assert "crf" in suites or "pydensecrf2" in capsys.readouterr().out
    check_rows(report["rows"])
    assert "| par | PAR time |" in (tmp_path / "bench.md").read_text()


def check_rows(rows):
    for row in rows:
        assert row["name"] and row["setting"] and row["unit"] and row["value"] >= 0
        assert row["target"] == "" and row["met"] is None, "targets do not count at toy size"
        assert (row["reference"] is None) == (row["ratio"] is None) == (row["ratio_of"] == "")
        assert row["ratio"] is None or 0 < row["ratio"] < 1e6


def test_unknown_suite_is_refused():
    with pytest.raises(UserError, match="afinity.*affinity, step"):
        run_suites(["afinity"], None, quick=True, device="cpu")


def test_formula_covers_what_the_encoder_keeps(tiny):
    """The three passes of a step, counted by formula, are most of what autograd keeps, and never more."""
    setup = Setup(torch.device("cpu"), quick=True)
    recipe = setup.recipe("toco", batch=2)
    recipe = replace(recipe, train=replace(recipe.train, precision="fp32"))
    trainer, batch = Trainer(recipe, VOC_CLASSES, setup.device), setup.batch(2)
    backbone = trainer.network.backbone

    def encode():
        local = batch.image[..., :32, :32].repeat_interleave(2, 0)
        return [backbone(x).patches for x in (batch.image, batch.global2, local)]

    measured = saved_activation_bytes(encode, backbone)
    assert encoder_bytes(trainer, 2) == pytest.approx(measured, rel=0.05)


def test_gpu_command_runs_all_parts_on_a_cpu(tmp_path):
    assert main(["gpu", "--dry-run", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert not report["errors"] and all(check["passed"] for check in report["checks"])
    assert {"par", "energy", "affinity", "step", "scaling"} == {row["suite"] for row in report["rows"]}
    check_rows(report["rows"])
    assert [run["finished"] for run in report["training"]] == [True, True]
    assert report["training"][1]["miou"]["refined_cam"] is not None
    assert {path.name for path in tmp_path.glob("*.png")} == set(report["figures"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_command_says_that_there_is_no_gpu(tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path / "new")]) == 2
    assert "--dry-run" in capsys.readouterr().err and not (tmp_path / "new").exists()
