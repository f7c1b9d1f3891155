"""Every random number comes from a derived seed, and the global generators stay as they were."""

import numpy as np
import pytest
import torch
from torch import nn

from ssepa_lib.data import build_dataset, train_loader
from ssepa_lib.methods import build_objectives
from ssepa_lib.model import build_network
from ssepa_lib.randomness import derive_seed, generator, seeded

PURPOSES = ["network", "objectives", "crops", "drop path", "order", "views"]
CLASSES = ("ant", "bee", "cat")


def mixed(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def test_every_purpose_gives_the_documented_number():
    assert derive_seed("network", 7) == derive_seed("network", 7, step=3, rank=2) == 7
    assert derive_seed("objectives", 7) == derive_seed("objectives", 7, step=3, rank=2) == 8
    assert derive_seed("crops", 7, 3) == derive_seed("crops", 7, 3, rank=2) == 7 * 1_000_003 + 3
    assert derive_seed("drop path", 7, 3) == 7 * 1_000_003 + 3
    assert derive_seed("drop path", 7, 3, rank=2) == 7 * 1_000_003 + 3 + 2 * 500_009
    assert derive_seed("order", 7, 3) == derive_seed("order", 7, 3, rank=2) == mixed(7, 0, 3)
    assert derive_seed("views", 7, 3) == derive_seed("views", 7, 3, rank=2) == mixed(7, 1, 3)


def test_the_numbers_themselves():
    """Recorded: another version of numpy or of this library would train other runs under the same seed."""
    found = {purpose: derive_seed(purpose, 1, 2, 3) for purpose in PURPOSES}
    assert found == {
        "network": 1,
        "objectives": 2,
        "crops": 1_000_005,
        "drop path": 2_500_032,
        "order": 4_158_717_079,
        "views": 3_005_640_382,
    }


@pytest.mark.parametrize("purpose", ["order", "views"])
def test_neighbouring_positions_are_far_apart(purpose):
    seeds = [derive_seed(purpose, seed, step) for seed in range(3) for step in range(100)]
    assert len(set(seeds)) == 300 and all(0 <= seed < 2**32 for seed in seeds)
    assert np.std(seeds) > 2**29


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_generator_of_ones_own_draws_what_the_seed_says(purpose):
    before = torch.get_rng_state()
    drawn = torch.rand(4, generator=generator(purpose, 3, 5, 1))
    seed = derive_seed(purpose, 3, 5, 1)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_draws_what_the_seed_says_and_restores_the_global_state():
    before = torch.get_rng_state()
    with seeded("drop path", 3, 5, 1):
        inside = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(inside, torch.rand(4, generator=generator("drop path", 3, 5, 1)))


def test_seeded_restores_the_global_state_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded("network", 3):
        torch.rand(4)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_seeded_restores_the_generator_of_a_gpu():
    device = torch.device("cuda")
    before = torch.cuda.get_rng_state(device)
    with seeded("drop path", 3, 5, 1, device):
        one = torch.rand(4, device=device)
    assert torch.equal(torch.cuda.get_rng_state(device), before)
    with seeded("drop path", 3, 5, 1, device):
        assert torch.equal(torch.rand(4, device=device), one)


@pytest.mark.parametrize("method", ["toco", "ssepa", "fsr"])
def test_building_a_network_or_a_loader_leaves_the_global_generator_alone(tiny, trainer_for, method):
    recipe, dataset = tiny(method), build_dataset(tiny(method).data, "train")
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    network = build_network(recipe, CLASSES)
    assert torch.equal(torch.get_rng_state(), torch_state), "the network"
    build_objectives(recipe, network)
    assert torch.equal(torch.get_rng_state(), torch_state), "the objectives"
    batches = iter(train_loader(dataset, recipe))
    next(batches)
    assert torch.equal(torch.get_rng_state(), torch_state), "the loader"
    trainer, batches = trainer_for(recipe)
    trainer.step(next(batches))
    assert torch.equal(torch.get_rng_state(), torch_state), "a training step"
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_heads_start_alike_in_every_method_and_whatever_was_drawn_before(tiny):
    starts = []
    for method, draws in (("toco", 0), ("ssepa", 5)):
        torch.rand(draws)
        recipe = tiny(method)
        network = build_network(recipe, CLASSES)
        starts.append((network.state_dict(), build_objectives(recipe, network).state_dict()))
    for one, two in zip(*starts, strict=True):
        shared = one.keys() & two.keys()
        assert "classifier.weight" in shared or "2.student.last" in shared
        assert all(torch.equal(one[name], two[name]) for name in shared)


def test_drop_path_follows_its_seed(tiny, trainer_for):
    recipe = tiny("fsr", **{"model.drop_path": 0.5})
    trainer, batches = trainer_for(recipe)
    batch = next(batches)
    one, two = (trainer.terms(batch)["cls"].item() for _ in range(2))
    trainer.index += 1
    assert one == two != trainer.terms(batch)["cls"].item()
    assert any(isinstance(m, nn.Module) and type(m).__name__ == "DropPath" for m in trainer.network.modules())
