"""Feature self-reinforcement: masks, teacher, centres, losses and the aggregator."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ssepa_lib.compose import load_recipe
from ssepa_lib.methods.fsr import (
    Centers,
    SelfReinforcement,
    edge_strength,
    mask_blocks,
    self_distillation,
    teacher_momentum,
    teacher_temperature,
)
from ssepa_lib.methods.teacher import Teacher
from ssepa_lib.model import build_network
from ssepa_lib.model.heads import ClassAggregator, CrossAttentionBlock, pool_class
from ssepa_lib.recipe import ReinforceConfig

IMAGE = torch.zeros(2, 3, 64, 64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blocks(mask, grid, block):
    """[B, N] patch mask → [B, rows, columns] block mask; fails unless blocks are masked as a whole."""
    maps = mask.view(-1, *grid)
    rows = []
    for top in range(0, grid[0], block):
        cells = [
            maps[:, top : top + block, left : left + block].flatten(1) for left in range(0, grid[1], block)
        ]
        assert all((c.all(1) | ~c.any(1)).all() for c in cells)
        rows.append(torch.stack([c[:, 0] for c in cells], 1))
    return torch.stack(rows, 1)


class TinyNetwork(nn.Module):
    """Four patches of one pixel row each; class token and patches are a linear map of the pixels."""

    def __init__(self, width=6):
        super().__init__()
        self.backbone = SimpleNamespace(width=width)
        self.embed = nn.Linear(3, width)
        self.mask_token = nn.Parameter(torch.ones(width))
        self.calls = []

    def forward(self, image, *, segment=True, capture=False, mask=None):
        self.calls.append((image.clone(), mask, self.training, torch.is_grad_enabled()))
        patches = self.embed(image.float().mean(3).transpose(1, 2))  # one patch per row of pixels
        aux = patches[..., :2].detach().transpose(1, 2).unflatten(2, (2, 2))
        if mask is not None:
            patches = torch.where(mask[..., None], self.mask_token, patches)
        return SimpleNamespace(patches=patches, cls=patches.mean(1), cam=aux, aux_cam=aux, grid=(2, 2))


@pytest.fixture
def recipe():
    return load_recipe(
        "shapes/fsr",
        {
            "reinforce.outputs": 5,
            "reinforce.mask_block": 1,
            "reinforce.mask_ratio": 0.5,
            "contrast.hidden": 8,
            "contrast.bottleneck": 4,
            "reinforce.center_momentum": 0.75,
            "cam.scales": [1.0],
            "cam.flip": False,
        },
    )


@pytest.fixture
def tiny(recipe):
    torch.manual_seed(0)
    network = TinyNetwork()
    reinforce = SelfReinforcement(recipe, network)
    with torch.no_grad():  # as initialised, the head hardly tells inputs apart
        for parameter in reinforce.projector.parameters():
            parameter.normal_()
    reinforce.teacher.module["projector"].load_state_dict(reinforce.projector.state_dict())
    return network, reinforce


def views(seed=1):
    g = generator(seed)
    view1, view2 = 3 * torch.randn(2, 3, 3, 4, 4, generator=g)
    return view1, view2, torch.tensor([[1.0, 0.0]] * 3)


def step(network, recipe, view1, view2, label, *, fraction, seed=0, grid=(2, 2)):
    """What the objective reads of one step."""
    return SimpleNamespace(
        network=network,
        recipe=recipe,
        batch=SimpleNamespace(image=view1, view2=view2, label=label),
        output=SimpleNamespace(grid=grid),
        fraction=fraction,
        generator=generator(seed),
    )


# Masks


@pytest.mark.parametrize("selection", ["random", "edge", "loose"])
@pytest.mark.parametrize(
    ("grid", "block", "ratio"), [((28, 28), 4, 0.4), ((14, 10), 4, 0.4), ((6, 6), 2, 0.75)]
)
def test_masks_have_exactly_the_requested_ratio(selection, grid, block, ratio):
    config = ReinforceConfig(selection=selection, mask_block=block, mask_ratio=ratio)
    activation = torch.rand(2, *grid, generator=generator())
    for fraction in (0.0, 0.5):
        chosen = blocks(mask_blocks(activation, IMAGE, grid, config, fraction, generator()), grid, block)
        number = math.ceil(grid[0] / block) * math.ceil(grid[1] / block)
        assert chosen.flatten(1).sum(1).tolist() == [math.ceil(ratio * number)] * 2


def test_uncertain_blocks_are_masked_first():
    activation = torch.full((2, 8, 8), 0.9)
    activation[:, :2, :4] = 0.5  # two of sixteen 2×2 blocks
    config = ReinforceConfig(mask_block=2, mask_ratio=0.25)
    chosen = blocks(mask_blocks(activation, IMAGE, (8, 8), config, 0.5, generator()), (8, 8), 2)
    assert chosen[:, 0, :2].all() and chosen.flatten(1).sum(1).tolist() == [4, 4]
    config = replace(config, selection="strict")
    chosen = blocks(mask_blocks(activation, IMAGE, (8, 8), config, 0.5, generator()), (8, 8), 2)
    assert chosen[:, 0, :2].all() and chosen.flatten(1).sum(1).tolist() == [2, 2]
    activation[:] = 0.5  # more uncertain blocks than wanted
    chosen = blocks(mask_blocks(activation, IMAGE, (8, 8), config, 0.5, generator()), (8, 8), 2)
    assert chosen.flatten(1).sum(1).tolist() == [4, 4]


def test_uncertain_interval_is_open():
    activation = torch.tensor([[[0.2, 0.7], [0.3, 0.0]]])
    config = ReinforceConfig(selection="strict", mask_block=1, mask_ratio=0.75)
    assert mask_blocks(activation, IMAGE[:1], (2, 2), config, 1.0, generator()).tolist() == [
        [False, False, True, False]
    ]


def test_blocks_are_random_at_first_and_follow_the_generator():
    uncertain, certain = torch.full((1, 8, 8), 0.5), torch.zeros(1, 8, 8)
    config = ReinforceConfig(selection="strict", mask_block=1, mask_ratio=0.25)

    def mask(activation, fraction, seed=0):
        return mask_blocks(activation, IMAGE[:1], (8, 8), config, fraction, generator(seed))

    early = mask(certain, 0.19)
    assert early.sum() == 16  # nothing is uncertain, yet blocks are masked
    assert not mask(certain, 0.2).any()
    assert torch.equal(early, mask(uncertain, 0.0)) and torch.equal(early, mask(None, 0.0))
    assert not torch.equal(early, mask(uncertain, 0.0, seed=1))


def test_uncertainty_is_read_from_a_map_of_any_size():
    """The map lies at image size; each block takes the value of its nearest pixel."""
    activation = torch.full((1, 64, 48), 0.9)
    activation[:, 32:, :24] = 0.5  # the lower left quarter
    config = ReinforceConfig(selection="strict", mask_block=2, mask_ratio=0.9)
    chosen = mask_blocks(activation, IMAGE[:1], (8, 6), config, 1.0, generator()).view(8, 6)
    expected = torch.zeros(8, 6, dtype=torch.bool)
    expected[4:, :4] = True  # of three columns of blocks the second begins left of the middle
    assert torch.equal(chosen, expected)


def test_edge_selection_takes_the_strongest_gradient():
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, 16:, 40:] = 255.0  # an edge in block rows 1 to 3 and block column 2
    image[:, :, 16:32, 20] = 20.0  # a faint one
    strength = edge_strength(image, (8, 8), 2)
    assert strength.shape == (1, 4, 4)
    config = ReinforceConfig(selection="edge", mask_block=2, mask_ratio=3 / 16)
    chosen = blocks(mask_blocks(None, image, (8, 8), config, 1.0, generator()), (8, 8), 2)
    assert chosen[0, 1:, 2].all()


# Teacher and schedules


def test_teacher_equals_the_closed_form_and_never_learns():
    torch.manual_seed(0)
    student = nn.Linear(3, 2)
    teacher = Teacher(student)
    expected = [p.detach().clone() for p in student.parameters()]
    optimiser = torch.optim.SGD(student.parameters(), 0.5)
    for momentum in (0.9, 0.95, 1.0):
        x = torch.randn(4, 3)
        (teacher.module(x).detach() - student(x)).square().sum().add(student(x).sum()).backward()
        optimiser.step()
        teacher.follow(student, momentum)
        trained = list(student.parameters())
        expected = [
            momentum * e + (1 - momentum) * p.detach() for e, p in zip(expected, trained, strict=True)
        ]
        for t, e, p in zip(teacher.parameters(), expected, trained, strict=True):
            torch.testing.assert_close(t, e)
            assert not torch.equal(t, p) and t.grad is None and not t.requires_grad


def test_teacher_stays_in_evaluation_mode():
    parent = nn.ModuleList([Teacher(nn.Dropout(0.5))]).train()
    assert not parent[0].module.training


def test_schedules_at_their_ends():
    config = ReinforceConfig()
    assert teacher_momentum(config, 0) == pytest.approx(0.9995)
    assert teacher_momentum(config, 0.5) == pytest.approx(0.99975)
    assert teacher_momentum(config, 1) == 1
    assert [teacher_temperature(config, f) for f in (0, 0.0625, 0.125, 1)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07]
    )


# Losses


def test_distillation_equals_a_slow_version():
    """Three images: one token, none and two; the mean within an image, then over the images that have any."""
    student, teacher = torch.randn(2, 3, 4, generator=generator())
    center, owner, losses = torch.randn(4, generator=generator(1)), [0, 2, 2], {0: [], 1: [], 2: []}
    for image, s, t in zip(owner, student.tolist(), teacher.tolist(), strict=True):
        target = [math.exp((x - c) / 0.5) for x, c in zip(t, center.tolist(), strict=True)]
        predicted = [math.exp(x / 0.8) for x in s]
        pairs = zip(target, predicted, strict=True)
        losses[image].append(-sum(a / sum(target) * math.log(b / sum(predicted)) for a, b in pairs))
    expected = (losses[0][0] + sum(losses[2]) / 2) / 2
    found = self_distillation(student, teacher, center, torch.tensor(owner), 3, (0.8, 0.5))
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_distillation_keeps_float32_and_gradients_to_the_student_only():
    student = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = self_distillation(student, teacher, torch.zeros(4), torch.arange(3), 3, (0.1, 0.04))
    loss.backward()
    assert loss.dtype == torch.float32 and student.grad.abs().sum() > 0 and teacher.grad is None


def test_centres_follow_the_mean_of_all_tokens_separately():
    centers = Centers(2, momentum=0.9)
    cls, patches = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.full((2, 5, 2), 4.0)
    centers.update(cls, patches)
    centers.update(cls, patches)
    torch.testing.assert_close(centers.cls, torch.tensor([2 * (1 - 0.81), 0.0]))
    torch.testing.assert_close(centers.patches, torch.full((2,), 4 * (1 - 0.81)))


def test_centres_are_averaged_over_processes(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr(
        "torch.distributed.all_reduce", lambda means: means.add_(8.0)
    )  # the other process saw 8
    centers = Centers(2, momentum=0.0)
    centers.update(torch.full((3, 2), 2.0), torch.full((3, 4, 2), 4.0))
    assert centers.cls.tolist() == [5.0, 5.0] and centers.patches.tolist() == [6.0, 6.0]


def test_views_and_teacher_are_paired_as_published(tiny, recipe):
    network, reinforce = tiny
    view1, view2, label = views()
    reinforce.centers.update(torch.rand(2, 5), torch.rand(2, 5))
    before = (reinforce.centers.cls.clone(), reinforce.centers.patches.clone())
    losses = reinforce(step(network, recipe, view1, view2, label, fraction=0.0625))
    [(seen, mask, *_)] = network.calls  # the student: one pass, view 2, masked
    assert torch.equal(seen, view2) and mask.sum(1).tolist() == [2, 2, 2]

    project, teach = reinforce.projector, reinforce.teacher.module["network"]
    masked, whole1, whole2 = network(view2, mask=mask), teach(view1), teach(view2)

    def distil(student, teacher, center, image):
        return self_distillation(project(student), project(teacher), center, image, 3, (0.1, 0.055))

    image, every = mask.nonzero()[:, 0], torch.arange(3)
    unc = distil(masked.patches[mask], whole2.patches[mask], before[1], image)
    cer = distil(masked.cls, whole1.cls, before[0], every)
    torch.testing.assert_close(losses["unc"], unc)
    torch.testing.assert_close(losses["cer"], cer)
    swapped = distil(masked.cls, whole2.cls, before[0], every)
    assert abs(swapped - cer) > 0.01  # the inputs tell the views apart
    # each centre follows what it is compared with: class tokens of view 1, patches of view 2
    cls, patches = project(whole1.cls).mean(0), project(whole2.patches).mean((0, 1))
    torch.testing.assert_close(reinforce.centers.cls, 0.75 * before[0] + 0.25 * cls)
    torch.testing.assert_close(reinforce.centers.patches, 0.75 * before[1] + 0.25 * patches)


@pytest.mark.parametrize("selection", ["random", "edge", "strict", "loose"])
def test_only_uncertain_blocks_need_a_map_of_view_2(tiny, recipe, selection):
    network, reinforce = tiny
    reinforce.config = replace(reinforce.config, selection=selection)
    for fraction, needed in ((0.1, False), (0.5, selection in ("strict", "loose"))):
        network.calls.clear()
        view1, view2, label = views()
        reinforce(step(network.train(), recipe, view1, view2, label, fraction=fraction))
        *maps, (_, mask, training, gradient) = network.calls
        assert mask is not None and training and gradient  # the student's own pass
        assert len(maps) == needed and network.training
        for seen, hidden, training, gradient in maps:  # the whole view, as in inference
            assert torch.equal(seen, view2) and hidden is None and not training and not gradient


def test_only_the_student_and_projector_are_trained(tiny, recipe):
    network, reinforce = tiny
    losses = reinforce(step(network, recipe, *views(), fraction=0.0))
    (losses["unc"] + losses["cer"]).backward()
    trained = [*network.parameters(), *reinforce.projector.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert all(p.grad is None for p in reinforce.teacher.parameters())


def test_nothing_masked_gives_zero_with_a_gradient_path(tiny, recipe):
    network, reinforce = tiny
    reinforce.config = replace(reinforce.config, mask_ratio=0.0)
    losses = reinforce(step(network, recipe, *views(), fraction=0.5))
    assert losses["unc"] == 0 and losses["cer"] > 0
    losses["unc"].backward()
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())


def test_absent_classes_are_not_uncertain(tiny, recipe):
    network, reinforce = tiny
    reinforce.config = replace(reinforce.config, selection="strict", uncertain=[0.01, 1.0])
    view1, view2, label = views()
    assert reinforce(step(network, recipe, view1, view2, label, fraction=0.5))["unc"] > 0
    assert reinforce(step(network, recipe, view1, view2, 0 * label, fraction=0.5))["unc"] == 0


def test_evaluation_mode_leaves_the_centres_alone(tiny, recipe):
    network, reinforce = tiny
    reinforce.eval()(step(network, recipe, *views(), fraction=0.5))
    assert not reinforce.centers.cls.any()


def test_state_survives_saving_bit_for_bit(tiny, recipe, tmp_path):
    network, reinforce = tiny

    def train(network, reinforce, seed):
        optimiser = torch.optim.SGD([*network.parameters(), *reinforce.projector.parameters()], 0.1)
        losses = reinforce(step(network, recipe, *views(seed), fraction=0.3, seed=seed))
        (losses["unc"] + losses["cer"]).backward()
        optimiser.step()
        optimiser.zero_grad()
        reinforce.after_step(network, 0.3)
        return losses

    train(network, reinforce, 1)
    torch.save({"network": network.state_dict(), "reinforce": reinforce.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = TinyNetwork()
    resumed = SelfReinforcement(recipe, other)
    other.load_state_dict(state["network"])
    resumed.load_state_dict(state["reinforce"])
    a, b = train(network, reinforce, 2), train(other, resumed, 2)
    assert torch.equal(a["unc"], b["unc"]) and torch.equal(a["cer"], b["cer"])
    for name, value in reinforce.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# With the real network


@pytest.mark.parametrize("method", ["fsr", "ssepa_fsr"])
def test_network_learns_from_the_masked_view(method):
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    recipe = load_recipe(f"shapes/{method}", {"model.backbone_args": shape, "model.weights": "none"})
    network = build_network(recipe, ("a", "b")).train()
    reinforce = SelfReinforcement(recipe, network)
    view1, view2 = torch.randint(0, 256, (2, 2, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    label = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        losses = reinforce(step(network, recipe, view1, view2, label, fraction=0.5, grid=(4, 4)))
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 and loss > 0 for loss in losses.values())
    untouched = ("classifier", "aux_classifier", "decoder", "haaf")  # the other objectives train these
    for name, parameter in [*network.named_parameters(), *reinforce.projector.named_parameters()]:
        if parameter.requires_grad and name.split(".")[0] not in untouched:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert network.backbone.mask_token.grad.any() and network.aggregator.cls_token.grad.any()
    before = [p.clone() for p in reinforce.teacher.parameters()]
    reinforce.after_step(network, 0.5)
    for old, new in zip(before, reinforce.teacher.parameters(), strict=True):
        assert torch.equal(old, new)  # nothing has been optimised yet


def test_recipes_differ_only_in_what_they_compose():
    fsr, both, ssepa = (load_recipe(f"voc/{method}") for method in ("fsr", "fsr+ssepa", "ssepa"))
    assert both.affinity == ssepa.affinity
    assert both.losses == replace(
        fsr.losses, ptc_padding="ignore"
    )  # without effect: its views have no padding
    alike = replace(both, affinity=fsr.affinity)
    assert alike.hash() == fsr.hash() != both.hash()
    assert replace(alike, name=fsr.name, title=fsr.title, losses=fsr.losses) == fsr
    assert (
        fsr.self_reinforced
        and fsr.losses.ctc == 0
        and fsr.model.aggregator == "mca"
        and not fsr.optim.decay_all
    )


# Aggregator


def test_one_query_is_plain_attention_by_hand():
    torch.manual_seed(0)
    block = CrossAttentionBlock(4, 2)
    nn.init.normal_(block.attention.in_proj_bias)
    query, patches = torch.randn(1, 1, 4), torch.randn(1, 3, 4)
    q = block.norm_query(query)[0] @ block.attention.in_proj_weight[:4].T + block.attention.in_proj_bias[:4]
    seen = block.norm_patches(patches)[0]
    k = seen @ block.attention.in_proj_weight[4:8].T + block.attention.in_proj_bias[4:8]
    v = seen @ block.attention.in_proj_weight[8:].T + block.attention.in_proj_bias[8:]
    heads, weights = [], []
    for half in (slice(0, 2), slice(2, 4)):
        p = (q[:, half] @ k[:, half].T / math.sqrt(2)).softmax(-1)
        weights.append(p)
        heads.append(p @ v[:, half])
    mixed = query[0] + block.attention.out_proj(torch.cat(heads, 1))
    expected = mixed + block.mlp(block.norm_mlp(mixed))
    fused, none = block(query, patches)
    readable, maps = block(query, patches, maps=True)
    torch.testing.assert_close(fused[0], expected)
    torch.testing.assert_close(readable, fused)
    torch.testing.assert_close(maps[0, :, 0], torch.cat(weights))
    assert none is None


def test_aggregator_ignores_patch_order_and_trains_every_parameter():
    torch.manual_seed(0)
    aggregator = ClassAggregator(8, 2)
    patches = torch.randn(3, 5, 8)
    cls = aggregator(patches)
    assert cls.shape == (3, 8)
    torch.testing.assert_close(cls.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(aggregator(patches[:, [4, 2, 0, 1, 3]]), cls)
    attention = aggregator.attention(patches)
    assert attention.shape == (3, 2, 5)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2))
    (cls[:, 0].sum() + cls[:, 1].square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in aggregator.parameters())


def test_pooling_arms():
    patches = torch.tensor([[[1.0, 0.0], [3.0, -2.0]]])
    assert pool_class(patches, "gap").tolist() == [[2.0, -1.0]]
    assert pool_class(patches, "gmp").tolist() == [[3.0, 0.0]]
