"""The network: shapes, scores, decoder, learning rates, and which parameters learn."""

import pytest
import torch

from ssepa_lib.model import PatchAffinity, build_network, evaluating
from ssepa_lib.model.heads import LargeFOV, ProjectionHead, pool_class
from ssepa_lib.training import Trainer

CLASSES = ("ant", "bee", "cat")


def test_output_shapes(tiny):
    network = build_network(tiny("ssepa"), CLASSES)
    out = network(torch.rand(2, 3, 32, 48) * 255, capture=True)
    assert out.scores.shape == out.aux_scores.shape == (2, 3)
    assert out.cam.shape == out.aux_cam.shape == (2, 3, 4, 6) and not out.cam.requires_grad
    assert out.segmentation.shape == (2, 4, 4, 6)
    assert out.patches.shape == (2, 24, 32) and out.cls.shape == (2, 32)
    assert (PatchAffinity(out.attention, weigh=network.haaf) @ torch.rand(2, 24, 3)).shape == (2, 24, 3)
    quick = network(torch.rand(2, 3, 32, 32) * 255, segment=False)
    assert quick.segmentation is None and quick.attention is None


def test_scores_are_the_classifier_of_the_max_pooled_tokens(tiny):
    network = build_network(tiny(), CLASSES)
    out = network(torch.rand(2, 3, 32, 32) * 255)
    torch.testing.assert_close(out.scores, out.patches.amax(1) @ network.classifier.weight.T)
    cam = (out.patches @ network.classifier.weight.T).detach().transpose(1, 2).reshape(2, 3, 4, 4)
    torch.testing.assert_close(out.cam, cam)


def test_decoder_has_large_field_of_view_and_no_bias():
    decoder = LargeFOV(8, 3, hidden=4)
    assert all(p.ndim == 4 for p in decoder.parameters())
    x = torch.zeros(1, 8, 25, 25, requires_grad=True)
    decoder(x + torch.rand(1, 8, 25, 25))[0, :, 12, 12].sum().backward()
    rows = x.grad[0].abs().sum((0, 2)).nonzero().flatten()
    assert set(rows.tolist()) == {2, 7, 12, 17, 22}  # reaches 10 to each side in steps of 5


def test_projection_head_is_bounded_by_cosines():
    head = ProjectionHead(8, 16, 4, 6)
    out = head(100 * torch.randn(5, 3, 8))
    assert out.shape == (5, 3, 6) and out.abs().max() <= 1 + 1e-5


def test_same_seed_same_network(tiny):
    one, two, other = (build_network(tiny(**{"train.seed": s}), CLASSES) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def test_evaluation_mode_ends_with_its_context_also_after_an_error(tiny):
    network = build_network(tiny(), CLASSES).train()
    with pytest.raises(ZeroDivisionError), evaluating(network):
        assert not network.training and not network.backbone.training
        raise ZeroDivisionError
    assert network.training and network.backbone.training
    with evaluating(network.eval()):
        pass
    assert not network.training


def test_learning_rates_of_the_groups(tiny):
    recipe = tiny("ssepa")
    network = build_network(recipe, CLASSES)
    rate = {id(p): g["lr"] for g in network.parameter_groups(recipe.optim, 5e-3) for p in g["params"]}
    assert rate[id(network.backbone.vit.blocks[0].attn.qkv.weight)] == recipe.optim.lr
    for part in (network.classifier, network.aux_classifier, network.decoder):
        assert all(rate[id(p)] == 10 * recipe.optim.lr for p in part.parameters())
    assert all(rate[id(p)] == 5e-3 for p in network.haaf.parameters())


def test_weight_decay_spares_biases_and_tokens_only_where_asked(tiny):
    for method, spared in (("toco", False), ("fsr", True)):
        recipe = tiny(method)
        trainer = Trainer(recipe, CLASSES, torch.device("cpu"))
        decay = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
        for name, p in (*trainer.network.named_parameters(), *trainer.objectives.named_parameters()):
            if p.requires_grad:
                free = spared and (
                    p.ndim < 2 or name.rsplit(".", 1)[-1] in ("pos_embed", "cls_token", "mask_token")
                )
                assert decay[id(p)] == (0 if free else recipe.optim.weight_decay), name


def frozen(recipe) -> set[str]:
    trainer = Trainer(recipe, CLASSES, torch.device("cpu"))
    return {name for name, p in trainer.network.named_parameters() if not p.requires_grad}


def test_the_frozen_parameters_are_these(tiny):
    assert frozen(tiny("toco")) == {"backbone.vit.pos_embed", "backbone.mask_token"}
    assert frozen(tiny("ssepa")) == {"backbone.vit.pos_embed", "backbone.mask_token"}
    haaf = {f"haaf.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    control = tiny("ssepa", **{"affinity.haaf_objective": "none"})
    assert frozen(control) == {"backbone.vit.pos_embed", "backbone.mask_token"} | haaf
    assert frozen(tiny("fsr")) == {"backbone.vit.cls_token"}  # its class token comes from the aggregator
    assert not frozen(tiny("fsr", **{"model.keep_class_token": True}))


@pytest.mark.parametrize("aggregator", ["mca", "gap", "gmp"])
def test_the_aggregator_makes_the_class_token_also_with_one_in_the_blocks(tiny, aggregator):
    recipe = tiny("fsr", **{"model.aggregator": aggregator, "model.keep_class_token": True})
    network = build_network(recipe, CLASSES).eval()
    out = network(torch.rand(2, 3, 32, 32) * 255)
    made = network.aggregator(out.patches) if aggregator == "mca" else pool_class(out.patches, aggregator)
    assert torch.equal(out.cls, made)


def test_every_trainable_parameter_gets_a_finite_gradient(tiny, trainer_for):
    for method in ("toco", "ssepa_affinity", "ssepa", "fsr", "ssepa_fsr"):
        trainer, batches = trainer_for(tiny(method, **{"losses.segmentation_start": 0.0}))
        # the last layer of HAAF starts at zero, so its first layer learns from the second step on
        for _ in range(3):
            trainer.step(next(batches))
        for name, p in (*trainer.network.named_parameters(), *trainer.objectives.named_parameters()):
            # without a class token in the blocks the pooled affinity is a constant: HAAF sees only its biases
            blind = method == "ssepa_fsr" and name == "haaf.mlp.0.weight"
            if p.requires_grad:
                assert p.grad is not None and p.grad.isfinite().all(), f"{method}: {name}"
                assert blind or p.grad.abs().sum() > 0, f"{method}: {name} has a zero gradient"
            else:
                assert p.grad is None, f"{method}: {name} is frozen but has a gradient"
