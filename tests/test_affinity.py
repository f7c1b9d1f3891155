"""Patch affinity against equations 5 to 7 written as loops, its single rows, and HAAF's weights."""

import pytest
import torch

from ssepa_lib.errors import UserError
from ssepa_lib.model import HAAF, Attention, PatchAffinity

B, K, H, D, P, GRID, C = 2, 3, 4, 8, 1, (3, 4), 5
N = GRID[0] * GRID[1]


@pytest.fixture
def attention():
    queries = [torch.randn(B, H, P + N, D) for _ in range(K)]
    keys = [torch.randn(B, H, P + N, D) for _ in range(K)]
    return Attention(queries, keys, P, GRID)


@pytest.fixture
def haaf():
    module = HAAF(K)
    torch.nn.init.normal_(module.mlp[2].weight, std=2)
    return module


def head_map(attention, image, layer, head, kind):
    """One attention map among patches, [N, N], from its definition."""
    logits = attention.queries[layer][image, head] @ attention.keys[layer][image, head].T / D**0.5
    maps = logits.softmax(1) if kind == "probabilities" else logits
    return maps[P:, P:]


def slow(attention, cam, kind, weights, iterations=1):
    """Equation 5 to 7, one number at a time."""
    affinity = torch.zeros(B, N, N)
    for b in range(B):
        for k in range(K):
            for h in range(H):
                affinity[b] += weights[b, k] * head_map(attention, b, k, h, kind) / (K * H)
    for _ in range(iterations):
        cam = torch.stack([affinity[b] @ cam[b] for b in range(B)])
    return cam, affinity


def test_attention_knows_its_sizes_and_gives_single_images(attention):
    assert (attention.depth, attention.heads, attention.patches) == (K, H, N)
    one = attention[1:2]
    assert (one.depth, one.heads, one.patches, one.grid) == (K, H, N, GRID)
    cam = torch.rand(B, N, C)
    torch.testing.assert_close(PatchAffinity(one) @ cam[1:], (PatchAffinity(attention) @ cam)[1:])


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
@pytest.mark.parametrize("strategy", ["stack_heads", "stack_layers", "matrix_free"])
@pytest.mark.parametrize("descriptor", ["full", "patch"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_every_strategy_equals_the_definition(attention, haaf, kind, strategy, descriptor, iterations):
    cam = torch.rand(B, N, C)
    options = {"kind": kind, "strategy": strategy, "descriptor": descriptor, "iterations": iterations}
    operator = PatchAffinity(attention, weigh=haaf, **options)
    with torch.no_grad():
        propagated = operator @ cam
        expected, dense = slow(attention, cam, kind, operator.weights, iterations)
        torch.testing.assert_close(propagated, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(operator.dense(), dense, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(operator.row(7), dense[:, 7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_a_row_of_one_layer_or_one_head(attention, haaf, kind):
    operator = PatchAffinity(attention, weigh=haaf, kind=kind)
    for patch, layer in ((0, 0), (7, 1), (N - 1, K - 1)):
        heads = [
            torch.stack([head_map(attention, b, layer, h, kind)[patch] for b in range(B)]) for h in range(H)
        ]
        for h in range(H):
            torch.testing.assert_close(operator.row(patch, layer, h), heads[h], rtol=1e-4, atol=1e-6)
        mean = torch.stack(heads).mean(0)
        torch.testing.assert_close(operator.row(patch, layer), mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "size"), [("patch", N), ("layer", K), ("head", H)])
def test_a_row_that_does_not_exist_is_refused_with_the_range(attention, name, size):
    operator = PatchAffinity(attention)
    for wrong in (-1, size):
        place = {"patch": 0, "layer": 0, "head": 0} | {name: wrong}
        with pytest.raises(UserError, match=rf"^{name} {wrong} does not exist; choose 0\.\.{size - 1}\.$"):
            operator.row(**place)
    operator.row(**({"patch": 0, "layer": 0, "head": 0} | {name: size - 1}))


def test_a_head_needs_its_layer(attention):
    with pytest.raises(UserError, match="name the layer"):
        PatchAffinity(attention).row(0, head=1)


@pytest.mark.parametrize("strategy", ["stack_heads", "stack_layers", "matrix_free"])
def test_matrix_and_rows_carry_no_gradient_although_haaf_has_one(attention, haaf, strategy):
    operator = PatchAffinity(attention, weigh=haaf, strategy=strategy)
    assert operator.weights.requires_grad
    for result in (operator.dense(), operator.row(3), operator.row(3, 1), operator.row(3, 1, 2)):
        assert not result.requires_grad
    operator.dense().numpy()
    operator.row(3).numpy()


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
@pytest.mark.parametrize("descriptor", ["full", "patch"])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_descriptor_is_the_mean_or_maximum_of_the_map(attention, kind, descriptor, pooling):
    fused, dense = (
        PatchAffinity(attention, kind=kind, strategy=s, descriptor=descriptor, pooling=pooling)
        for s in ("matrix_free", "stack_layers")
    )
    first = P if descriptor == "patch" else 0
    for layer in range(K):
        pooled = fused.layer_map(layer).mean(1)[:, first:, first:].flatten(1)
        by_hand = pooled.mean(1) if pooling == "mean" else pooled.max(1).values
        torch.testing.assert_close(fused.descriptor()[:, layer], by_hand, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused.descriptor(), dense.descriptor(), rtol=1e-4, atol=1e-6)


def test_full_descriptor_of_probabilities_is_constant(attention):
    descriptor = PatchAffinity(attention, descriptor="full").descriptor()
    torch.testing.assert_close(descriptor, torch.full((B, K), 1 / (P + N)))


def test_untrained_haaf_is_plain_affinity(attention):
    cam, untrained = torch.rand(B, N, C), HAAF(K)
    plain, weighted = PatchAffinity(attention), PatchAffinity(attention, weigh=untrained)
    assert torch.equal(weighted.weights, torch.ones(B, K))
    assert torch.equal(plain @ cam, weighted @ cam)


def test_haaf_weights_are_non_negative_with_mean_one(haaf):
    weights = haaf(torch.rand(6, K))
    assert (weights >= 0).all() and weights.std() > 0
    torch.testing.assert_close(weights.mean(1), torch.ones(6))


def test_propagation_is_differentiable_in_the_weights(attention, haaf):
    (PatchAffinity(attention, weigh=haaf) @ torch.rand(B, N, C)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in haaf.parameters())
    assert haaf.mlp[2].weight.grad.abs().sum() > 0


def test_more_classes_than_head_channels(attention):
    cam = torch.rand(B, N, 3 * D + 1)
    fused, dense = (PatchAffinity(attention, strategy=s) @ cam for s in ("matrix_free", "stack_layers"))
    torch.testing.assert_close(fused, dense, rtol=1e-4, atol=1e-6)


def test_per_layer_products_average_to_the_propagated_map(attention):
    cam, operator = torch.rand(B, N, C), PatchAffinity(attention)
    torch.testing.assert_close(operator.per_layer(cam).mean(1), operator @ cam)


def test_works_without_prefix_tokens():
    attention = Attention([torch.randn(B, H, N, D)], [torch.randn(B, H, N, D)], 0, GRID)
    propagated = PatchAffinity(attention) @ torch.ones(B, N, 1)
    torch.testing.assert_close(propagated, torch.ones(B, N, 1))  # rows of a softmax sum to one


@pytest.mark.parametrize("strategy", ["stack_heads", "stack_layers", "matrix_free"])
def test_deflation_removes_what_all_patches_share(attention, strategy):
    cam = torch.rand(B, N, C)
    plain = PatchAffinity(attention, strategy=strategy) @ cam
    deflated = PatchAffinity(attention, strategy=strategy, deflate=True) @ cam
    torch.testing.assert_close(deflated, (plain - plain.mean(1, keepdim=True)).relu())


def test_haaf_on_logits_keeps_their_sign_and_forgets_their_scale():
    signed = HAAF(K, signed=True)
    torch.nn.init.normal_(signed.mlp[2].weight, std=2)
    descriptor = torch.randn(6, K)
    weights = signed(descriptor)
    torch.testing.assert_close(signed(100 * descriptor), weights)
    assert not torch.allclose(signed(-descriptor), weights)
    torch.testing.assert_close(weights.mean(1), torch.ones(6))
    assert signed(torch.zeros(1, K)).isfinite().all()
