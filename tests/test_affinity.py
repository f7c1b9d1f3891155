import pytest
import torch

from ssepa_lib.model.affinity import HAAF, PatchAffinity

B, K, H, D, P, N, C = 2, 3, 4, 8, 1, 12, 5


@pytest.fixture
def attention():
    make = lambda: [torch.randn(B, H, P + N, D) for _ in range(K)]  # noqa: E731
    return make(), make()


@pytest.fixture
def haaf():
    module = HAAF(K)
    torch.nn.init.normal_(module.mlp[2].weight, std=2)
    return module


def slow(queries, keys, cam, source, weights, steps=1):
    """Equation 5 to 7, one number at a time."""
    affinity = torch.zeros(B, N, N)
    for b in range(B):
        for k in range(K):
            for h in range(H):
                logits = queries[k][b, h] @ keys[k][b, h].T / D**0.5
                maps = logits.softmax(1) if source == "softmax" else logits
                affinity[b] += weights[b, k] * maps[P:, P:] / (K * H)
    for _ in range(steps):
        cam = torch.stack([affinity[b] @ cam[b] for b in range(B)])
    return cam, affinity


@pytest.mark.parametrize("source", ["softmax", "logits"])
@pytest.mark.parametrize("strategy", ["all_heads", "haaf_dense", "haaf_fused"])
@pytest.mark.parametrize("pooling", ["full", "patch"])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_strategy_equals_the_definition(attention, haaf, source, strategy, pooling, steps):
    cam = torch.rand(B, N, C)
    options = {"source": source, "strategy": strategy, "descriptor": pooling, "steps": steps}
    operator = PatchAffinity(*attention, P, weigh=haaf, **options)
    with torch.no_grad():
        refined = operator @ cam
        expected, dense = slow(*attention, cam, source, operator.weights, steps)
        torch.testing.assert_close(refined, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(operator.dense(), dense, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(operator.row(7), dense[:, 7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["softmax", "logits"])
@pytest.mark.parametrize("pooling", ["full", "patch"])
def test_descriptor_is_the_mean_of_the_map(attention, source, pooling):
    fused, dense = (
        PatchAffinity(*attention, P, source=source, strategy=s, descriptor=pooling)
        for s in ("haaf_fused", "haaf_dense")
    )
    first = P if pooling == "patch" else 0
    for layer in range(K):
        by_hand = fused.layer_map(layer).mean(1)[:, first:, first:].mean((1, 2))
        torch.testing.assert_close(fused.descriptor()[:, layer], by_hand, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused.descriptor(), dense.descriptor(), rtol=1e-4, atol=1e-6)


def test_full_descriptor_of_softmax_maps_is_constant(attention):
    descriptor = PatchAffinity(*attention, P, descriptor="full").descriptor()
    torch.testing.assert_close(descriptor, torch.full((B, K), 1 / (P + N)))


def test_untrained_haaf_is_plain_affinity(attention):
    cam, untrained = torch.rand(B, N, C), HAAF(K)
    plain, weighted = PatchAffinity(*attention, P), PatchAffinity(*attention, P, weigh=untrained)
    assert torch.equal(weighted.weights, torch.ones(B, K))
    assert torch.equal(plain @ cam, weighted @ cam)


def test_haaf_weights_are_non_negative_with_mean_one(haaf):
    weights = haaf(torch.rand(6, K))
    assert (weights >= 0).all() and weights.std() > 0
    torch.testing.assert_close(weights.mean(1), torch.ones(6))


def test_refinement_is_differentiable_in_the_weights(attention, haaf):
    (PatchAffinity(*attention, P, weigh=haaf) @ torch.rand(B, N, C)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in haaf.parameters())
    assert haaf.mlp[2].weight.grad.abs().sum() > 0


def test_more_classes_than_head_channels(attention):
    cam = torch.rand(B, N, 3 * D + 1)
    fused, dense = (PatchAffinity(*attention, P, strategy=s) @ cam for s in ("haaf_fused", "haaf_dense"))
    torch.testing.assert_close(fused, dense, rtol=1e-4, atol=1e-6)


def test_per_layer_products_sum_to_the_refined_map(attention):
    cam, operator = torch.rand(B, N, C), PatchAffinity(*attention, P)
    torch.testing.assert_close(operator.per_layer(cam).mean(1), operator @ cam)


def test_works_without_prefix_tokens():
    queries, keys = [torch.randn(B, H, N, D)], [torch.randn(B, H, N, D)]
    refined = PatchAffinity(queries, keys, 0) @ torch.ones(B, N, 1)
    torch.testing.assert_close(refined, torch.ones(B, N, 1))  # rows of a softmax sum to one
