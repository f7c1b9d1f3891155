"""Refiners: plain values that read one network in several ways, and layer weights fixed by hand."""

import pytest
import torch

from ssepa_lib.errors import UserError
from ssepa_lib.labels import MatrixRefiner, Refiner, build_refiner, multi_scale_cam
from ssepa_lib.model import LayerWeights, PatchAffinity, build_network
from ssepa_lib.recipe import AffinityConfig, CamConfig

CLASSES = ("ant", "bee", "cat", "dog")
DEPTH = 4


@pytest.fixture
def network(tiny):
    network = build_network(tiny("ssepa"), CLASSES).eval()
    torch.nn.init.normal_(network.haaf.mlp[2].weight)
    return network.requires_grad_(False)


@pytest.fixture
def output(network):
    return network(torch.rand(2, 3, 32, 48) * 255, segment=False, capture=True)


def by_matrix(refiner, output, maps):
    """The affinity as a matrix times the maps, [B, X, h, w]."""
    dense = refiner.affinity(output.attention).dense()
    for _ in range(refiner.config.iterations):
        columns = dense @ maps.flatten(2).transpose(1, 2)
        maps = columns.transpose(1, 2).reshape(maps.shape)
    return maps


@pytest.mark.parametrize("attention", ["probabilities", "logits"])
@pytest.mark.parametrize("strategy", ["stack_heads", "stack_layers", "matrix_free"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_refiner_equals_the_dense_matrix(network, output, attention, strategy, iterations):
    config = AffinityConfig(kind="haaf", attention=attention, strategy=strategy, iterations=iterations)
    refiner, maps = Refiner(config, network.haaf), torch.rand(2, 3, *output.grid)
    refined = refiner(output.attention, maps)
    assert refined.shape == maps.shape
    torch.testing.assert_close(refined, by_matrix(refiner, output, maps), rtol=1e-4, atol=1e-4)


def test_the_configuration_reaches_the_affinity(network, output):
    config = AffinityConfig(kind="haaf", attention="logits", strategy="stack_layers", descriptor="full")
    found = Refiner(config, network.haaf).affinity(output.attention)
    by_hand = PatchAffinity(
        output.attention, weigh=network.haaf, kind="logits", strategy="stack_layers", descriptor="full"
    )
    assert torch.equal(found.weights, by_hand.weights) and torch.equal(found.dense(), by_hand.dense())


def test_build_refiner_follows_the_recipe(tiny):
    for method, kind in (("toco", None), ("ssepa_affinity", "mean"), ("ssepa", "haaf")):
        recipe = tiny(method)
        network = build_network(recipe, CLASSES)
        refiner = build_refiner(recipe.affinity, network)
        assert (None if refiner is None else refiner.config.kind) == kind
        if refiner is not None:
            assert refiner.config == recipe.affinity and refiner.haaf is network.haaf
            assert (network.haaf is None) == (kind == "mean")


def test_two_refiners_read_one_network_at_the_same_time(network, output):
    maps = torch.rand(2, 3, *output.grid)
    learned = Refiner(AffinityConfig(kind="haaf"), network.haaf)
    logits = Refiner(AffinityConfig(kind="mean", attention="logits", iterations=2))
    alone = [learned(output.attention, maps), logits(output.attention, maps)]
    one, two = learned.affinity(output.attention), logits.affinity(output.attention)  # both are open
    torch.testing.assert_close(two.dense(), by_hand_mean(output, "logits"))
    columns = maps.flatten(2).transpose(1, 2)
    for _ in range(2):  # in turns
        assert torch.equal((two @ columns).transpose(1, 2).reshape(maps.shape), alone[1])
        assert torch.equal((one @ columns).transpose(1, 2).reshape(maps.shape), alone[0])
    assert not torch.allclose(*alone)


def by_hand_mean(output, kind):
    return PatchAffinity(output.attention, kind=kind).dense()


def test_two_refiners_give_their_maps_beside_each_other(tiny, network):
    recipe, label = tiny("ssepa"), torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])
    image = torch.rand(2, 3, 32, 32) * 255
    refiners = [Refiner(recipe.affinity, network.haaf), Refiner(recipe.affinity), None]
    first = [multi_scale_cam(network, image, label, recipe.cam, r).for_labels for r in refiners]
    again = [multi_scale_cam(network, image, label, recipe.cam, r).for_labels for r in reversed(refiners)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert not torch.allclose(first[0], first[1]) and not torch.allclose(first[1], first[2])


@pytest.mark.parametrize("layer", range(DEPTH))
def test_layer_weights_that_are_one_hot_give_that_layer_alone(output, layer):
    maps, weights = torch.rand(2, 3, *output.grid), torch.zeros(DEPTH)
    weights[layer] = DEPTH  # the affinity is a mean over the layers
    refiner = Refiner(AffinityConfig(kind="mean"), LayerWeights(weights))
    columns = PatchAffinity(output.attention).per_layer(maps.flatten(2).transpose(1, 2))[:, layer]
    expected = columns.transpose(1, 2).reshape(maps.shape)
    torch.testing.assert_close(refiner(output.attention, maps), expected)
    one = refiner.affinity(output.attention)
    torch.testing.assert_close(one.row(5), one.row(5, layer))


def test_layer_weights_may_be_a_list_of_whole_numbers(output):
    maps = torch.rand(2, 3, *output.grid)
    alike = Refiner(AffinityConfig(kind="mean"), LayerWeights([1, 1, 1, 1]))
    plain = Refiner(AffinityConfig(kind="mean"))
    assert torch.equal(alike(output.attention, maps), plain(output.attention, maps))
    assert alike.affinity(output.attention).weights.shape == (2, DEPTH)


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_wrong_number_of_layer_weights_is_one_sentence(output, number):
    refiner = Refiner(AffinityConfig(kind="mean"), LayerWeights([1.0] * number))
    with pytest.raises(UserError, match=rf"^{number} layer weights .* {DEPTH} layers.*\.$"):
        refiner(output.attention, torch.rand(2, 1, *output.grid))


def test_layer_weights_are_saved_and_never_trained():
    weights = LayerWeights([0.5, 1.5])
    assert not list(weights.parameters()) and weights.state_dict()["weights"].tolist() == [0.5, 1.5]


def test_a_refiner_of_any_matrix(network, output):
    maps = torch.rand(2, 3, *output.grid)
    same = MatrixRefiner(AffinityConfig(kind="mean"), matrix=lambda a: PatchAffinity(a).dense())
    mean = Refiner(AffinityConfig(kind="mean"))
    torch.testing.assert_close(same(output.attention, maps), mean(output.attention, maps))
    still = MatrixRefiner(AffinityConfig(kind="mean"), matrix=lambda a: torch.eye(a.patches)[None])
    assert torch.equal(still(output.attention, maps), maps)
    image, label = torch.rand(2, 3, 32, 32) * 255, torch.eye(4)[:2]
    cams = multi_scale_cam(network, image, label, CamConfig(scales=[1.0], flip=False), still)
    assert cams.refined.shape == (2, 4, 32, 32) and cams.refined.max() <= 1
