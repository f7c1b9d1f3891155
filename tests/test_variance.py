"""HAAF's objective "variance": against loops, what it rewards, and what it trains."""

import torch

from ssepa_lib.data import build_dataset, train_loader
from ssepa_lib.methods.losses import unexplained_variance
from ssepa_lib.training import Trainer


def run(recipe, steps):
    dataset = build_dataset(recipe.data, "train")
    trainer = Trainer(recipe, dataset.classes, torch.device("cpu"))
    terms = []
    for batch in train_loader(dataset, recipe):
        if len(terms) == steps:
            break
        terms.append(trainer.step(batch))
    return trainer, terms


def test_unexplained_variance_against_loops():
    tokens, maps = torch.randn(2, 6, 5), torch.rand(2, 6, 3)
    valid, label = torch.ones(2, 6), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    valid[1, 4:] = 0
    total, count = 0.0, 0
    for b in range(2):
        rows = valid[b] == 1
        u = tokens[b][rows] - tokens[b][rows].mean(0)
        u = u / u.norm(dim=1, keepdim=True)
        for c in range(3):
            if label[b, c]:
                m = maps[b, rows, c]
                sides = [(s[:, None] * u).sum(0).square().sum() / s.sum() for s in (m, 1 - m)]
                total, count = total + 1 - sum(sides) / rows.sum(), count + 1
    found = unexplained_variance(tokens, maps, valid, label)
    assert torch.allclose(found, total / count, atol=1e-5)


def test_a_map_that_covers_its_cluster_explains_more_than_a_part_of_it():
    tokens = torch.cat([torch.randn(1, 1, 8).expand(-1, 6, -1), torch.randn(1, 1, 8).expand(-1, 6, -1)], 1)
    tokens = tokens + 0.1 * torch.randn(1, 12, 8)
    whole, part = torch.zeros(1, 12, 1), torch.zeros(1, 12, 1)
    whole[:, :6] = 1
    part[:, :2] = 1
    one = torch.ones(1, 12), torch.ones(1, 1)
    assert unexplained_variance(tokens, whole, *one) < unexplained_variance(tokens, part, *one)


def test_the_objective_trains_haaf_alone(tiny):
    trainer, terms = run(tiny("ssepa_plus", **{"losses.segmentation_start": 0.0}), 2)
    assert 0 <= float(terms[-1]["haaf"]) <= 1
    gradients = [parameter.grad for parameter in trainer.network.haaf.parameters()]
    assert all(torch.isfinite(g).all() for g in gradients) and gradients[-1].abs().sum() > 0
