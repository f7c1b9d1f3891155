"""AFA: the learned affinity, its propagation, its labels and its loss against literal loops."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ssepa_lib.benchmarks.naive_step import naive_par
from ssepa_lib.compose import load_recipe
from ssepa_lib.data import build_dataset, split_of
from ssepa_lib.data.views import TrainViews
from ssepa_lib.errors import UserError
from ssepa_lib.evaluation import evaluate
from ssepa_lib.labels import PseudoLabeler, build_refiner, multi_scale_cam
from ssepa_lib.methods.afa import AffinityPairs
from ssepa_lib.methods.losses import affinity_pairs
from ssepa_lib.model import build_network, learned_affinity
from ssepa_lib.model.affinity import Attention
from ssepa_lib.model.backbone import Backbone
from ssepa_lib.model.learned_affinity import AffinityHead, LearnedAffinity, window
from ssepa_lib.training.trainer import learning_rate_factor

CLASSES = ("ant", "bee", "cat", "dog")
GRID = (3, 4)


@pytest.fixture
def attention():
    """Three layers of two heads, one prefix token and a grid of 3×4 patches; keys have a common part."""
    layers = [[torch.randn(2, 2, 13, 5) for _ in range(3)] for _ in range(2)]
    layers[1] = [keys + 5 * torch.randn(1, 2, 1, 5) for keys in layers[1]]
    return Attention(*layers, 1, GRID)


@pytest.fixture
def head():
    made = AffinityHead(heads=2, blocks=2, radius=1)
    torch.nn.init.normal_(made.mix.bias)
    return made


def slow_affinity(attention, head):
    """A 1×1 convolution over the stacked logits of the last blocks and their transposes."""
    stack = []
    for queries, keys in zip(attention.queries[-2:], attention.keys[-2:], strict=True):
        q, k = queries[:, :, 1:], keys[:, :, 1:]
        k = k - k.mean(2, keepdim=True)
        stack.append(torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(5))
    logits = torch.cat(stack, 1)  # [B, 4, N, N]
    logits = logits + logits.mT
    return F.conv2d(logits, head.mix.weight.view(1, 4, 1, 1), head.mix.bias)[:, 0].sigmoid()


def test_the_affinity_equals_a_convolution_over_stacked_logits(attention, head):
    found = head(attention)
    torch.testing.assert_close(found, slow_affinity(attention, head))
    torch.testing.assert_close(found, found.mT)
    assert found.min() > 0 and found.max() < 1
    sides = head.sides(attention)
    torch.testing.assert_close(head.between(*sides, slice(4, 7)), found[:, 4:7])


def test_what_all_keys_share_changes_neither_attention_nor_affinity(attention, head):
    shifted = Attention(attention.queries, [keys + 7 for keys in attention.keys], 1, GRID)
    torch.testing.assert_close(shifted.layer_map(2), attention.layer_map(2), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head(shifted), head(attention), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("radius", [1, 2, 9])
def test_the_window_is_a_square(radius):
    near = window(GRID, radius)
    for i in range(12):
        for j in range(12):
            rows, columns = abs(i // 4 - j // 4), abs(i % 4 - j % 4)
            assert near[i, j] == (max(rows, columns) <= radius)


def slow_propagation(affinity, maps, radius):
    """M' = Pᵀ M with P_ij = Â_ij² / (Σ_i Â_ij² + 0.1), pair by pair."""
    near, result = window(GRID, radius), torch.zeros_like(maps)
    for b, a in enumerate(affinity):
        for j in range(12):
            column = [a[i, j].item() ** 2 if near[i, j] else 0.0 for i in range(12)]
            total = sum(column) + 0.1
            for i in range(12):
                result[b, j] += column[i] / total * maps[b, i]
    return result


@pytest.mark.parametrize("entries", [2**22, 30])
@pytest.mark.parametrize("iterations", [1, 2])
def test_propagation_equals_the_loops(attention, head, iterations, entries, monkeypatch):
    monkeypatch.setattr(learned_affinity, "ENTRIES", entries)  # all rows at once; two at a time
    operator, maps = LearnedAffinity(attention, head, iterations=iterations), torch.rand(2, 12, 3)
    expected = maps
    for _ in range(iterations):
        expected = slow_propagation(slow_affinity(attention, head).detach(), expected, 1)
    torch.testing.assert_close(operator @ maps, expected)
    dense = operator.dense()
    torch.testing.assert_close(torch.linalg.matrix_power(dense, iterations) @ maps, expected)
    torch.testing.assert_close(operator.row(5), dense[:, 5])
    assert (dense.sum(2) < 1).all() and not (operator @ maps).requires_grad
    with pytest.raises(UserError, match=r"patch 12 does not exist; choose 0\.\.11\."):
        operator.row(12)


def slow_pairs(affinity, labels, near):
    positive, negative = [], []
    for a, label in zip(affinity.double(), labels.tolist(), strict=True):
        for i in range(len(label)):
            for j in range(len(label)):
                if near[i, j] and 255 not in (label[i], label[j]):
                    (positive if label[i] == label[j] else negative).append(a[i, j].item())
    attract = sum(1 - x for x in positive) / (len(positive) + 1)
    return 0.5 * attract + 0.5 * sum(negative) / (len(negative) + 1)


@pytest.mark.parametrize("labels", ["mixed", "one", "none"])
def test_the_pair_loss_equals_the_loops(labels):
    values = {"mixed": [0, 1, 2, 255], "one": [3], "none": [255]}[labels]
    target = torch.tensor(values)[torch.randint(len(values), (2, 12))]
    affinity = torch.rand(2, 12, 12, requires_grad=True)
    loss = affinity_pairs(affinity, target, window(GRID, 1))
    assert loss.item() == pytest.approx(slow_pairs(affinity, target, window(GRID, 1)), rel=1e-5)
    loss.backward()
    assert affinity.grad.isfinite().all() and bool(affinity.grad.any()) == (labels != "none")


# The gradient through captured queries and keys


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_blocks_are_captured_with_their_gradient(tiny, checkpointing):
    backbone = Backbone(tiny().model, checkpointing=checkpointing, attached=2)
    image = torch.rand(1, 3, 32, 32) * 255
    taken = backbone(image, capture=True).attention
    assert (
        [x.requires_grad for x in taken.queries]
        == [x.requires_grad for x in taken.keys]
        == [False] * 2 + [True] * 2
    )
    head = AffinityHead(2, 2, 1)
    head(taken).square().sum().backward()
    grads = [block.attn.qkv.weight.grad for block in backbone.vit.blocks]
    assert all(grad.abs().sum() > 0 for grad in grads) and head.mix.weight.grad.abs().sum() > 0
    assert not grads[3][64:].any(), "the values of the last block play no part"
    with torch.no_grad():
        assert not any(x.requires_grad for x in backbone(image, capture=True).attention.queries)


def test_recomputed_blocks_give_the_same_gradient(tiny):
    image, found = torch.rand(1, 3, 32, 32) * 255, []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone, head = (
            Backbone(tiny().model, checkpointing=checkpointing, attached=2),
            AffinityHead(2, 2, 1),
        )
        head(backbone(image, capture=True).attention).square().sum().backward()
        found.append(backbone.vit.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*found)


# Labels in AFA's own order


@pytest.fixture
def network(tiny):
    recipe = tiny("afa")
    made = build_network(recipe, CLASSES).eval().requires_grad_(False)
    for block in made.backbone.vit.blocks:
        block.attn.qkv.weight.data *= 10
    return recipe, made


def slow_labels(image, cam, label, box, spread, config):
    """One image after the other: background, softmax, propagation, resizing, PAR in the box, argmax."""
    dense, grid, result = spread.dense(), spread.attention.grid, []
    for i, (y0, y1, x0, x1) in enumerate(box.tolist()):
        classes = label[i].nonzero()[:, 0]
        small = F.interpolate(cam[i : i + 1, classes], grid, mode="bilinear")[0]
        part, found = image[i : i + 1, :, y0:y1, x0:x1].float(), []
        half = ((y1 - y0) // 2, (x1 - x0) // 2)
        for threshold in (config.high, config.low):
            scores = (
                torch.cat([torch.full_like(small[:1], threshold), small]).softmax(0).flatten(1)
            )  # [1+P, N]
            scores = (dense[i] @ scores.T).T.unflatten(1, grid)[None]
            scores = F.interpolate(scores, image.shape[-2:], mode="bilinear")[:, :, y0:y1, x0:x1]
            scores = F.interpolate(scores, half, mode="bilinear")
            scores = naive_par(
                F.interpolate(part, half, mode="bilinear"),
                scores,
                config.par_dilations,
                config.par_iterations,
            )
            winner = F.interpolate(scores, (y1 - y0, x1 - x0), mode="bilinear")[0].argmax(0)
            found.append(F.pad(classes + 1, (1, 0))[winner])
        full = torch.full(image.shape[-2:], 255)
        full[y0:y1, x0:x1] = found[0].masked_fill((found[0] == 0) & (found[1] != 0), 255)
        result.append(full)
    return torch.stack(result)


def scene():
    image = torch.rand(2, 3, 4, 4).mul(255).repeat_interleave(8, 2).repeat_interleave(8, 3)
    label = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0]])
    return image, label, torch.tensor([[0, 32, 0, 32], [4, 30, 2, 28]])


def test_labels_equal_the_loops(network):
    recipe, net = network
    image, label, box = scene()
    spread = build_refiner(recipe.affinity, net).spread(net(image, capture=True).attention)
    cam = 0.2 * torch.rand(2, 4, 32, 32)
    cam[0, 0, :, :14] += 0.8
    cam[1, 1, :14, :18] += 0.8
    cam[1, 2, 20:, 12:] += 0.8
    cam *= label[:, :, None, None]
    labeler = PseudoLabeler(recipe.cam)
    found = labeler.training_labels(image, cam, label, box, spread)
    expected = slow_labels(image, cam, label, box, spread, recipe.cam)
    assert (found == expected).float().mean() > 0.999 and set(found.unique().tolist()) == {0, 1, 2, 3, 255}
    plain = labeler.training_labels(image, cam, label, box)
    assert (found != plain).float().mean() > 0.05, "the propagation changes labels"
    whole, low = torch.tensor([[0, 32, 0, 32]] * 2), recipe.cam.low
    once = SimpleNamespace(**vars(recipe.cam) | {"high": low})
    expected = slow_labels(image, cam, label, whole, spread, once)
    assert (labeler.labels(image, cam, label, spread) == expected).float().mean() > 0.999


def test_the_affinity_of_the_largest_scale_spreads_the_scores(network):
    recipe, net = network
    image, label, _ = scene()
    refiner = build_refiner(recipe.affinity, net)
    cams = multi_scale_cam(net, image, label, recipe.cam, refiner)
    large = F.interpolate(image, scale_factor=1.5, mode="bilinear", align_corners=False)
    attention = net(large, segment=False, capture=True).attention
    torch.testing.assert_close(cams.spread.dense(), LearnedAffinity(attention, net.affinity_head).dense())
    plain = multi_scale_cam(net, image, label, recipe.cam)
    torch.testing.assert_close(cams.main, plain.main, rtol=1e-4, atol=1e-5)
    assert torch.equal(cams.for_labels, cams.main) and torch.equal(cams.final, cams.refined)
    assert plain.spread is None and torch.equal(plain.final, plain.main)
    assert (cams.refined - cams.main).abs().max() > 0.01
    single = multi_scale_cam(net, image, label, recipe.cam.__class__(scales=[1.0], flip=False), refiner)
    assert single.spread.attention.grid == (4, 4)


def test_evaluation_scores_the_propagated_labels(tiny):
    recipe = tiny("afa")
    dataset = build_dataset(recipe.data, "val")
    net = build_network(recipe, dataset.classes)
    found = evaluate(net, recipe, dataset, device="cpu", test_time=("single", "ms"))["miou"]
    assert all(found[name] is not None for name in ("cam", "refined_cam", "pseudo_label", "refined_cam_ms"))


# A training step


def pairs_of(trainer):
    (part,) = (part for part in trainer.objectives if isinstance(part, AffinityPairs))
    return part


def test_a_step_trains_the_head_and_leaves_norms_alone(tiny, trainer_for):
    trainer, batches = trainer_for(tiny("afa", **{"losses.segmentation_start": 0.0, "optim.lr": 0.01}))
    old = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    terms = [trainer.step(next(batches)) for _ in range(2)][1]
    assert set(terms) == {"loss", "cls", "aux_cls", "seg", "reg", "aff"}
    expected = terms["cls"] + 0.1 * terms["seg"] + 0.01 * terms["reg"] + 0.1 * terms["aff"]
    torch.testing.assert_close(terms["loss"], expected)
    same = {n for n, p in trainer.network.named_parameters() if torch.equal(p, old[n])}
    norms = {name for name in old if name.startswith("backbone.vit") and "norm" in name}
    assert norms and norms <= same and not any(name.startswith("affinity_head") for name in same)
    assert "backbone.vit.blocks.3.attn.qkv.weight" not in same


def test_pseudo_labels_are_propagated_from_start_and_pairs_never(tiny, trainer_for):
    settings = {"losses.segmentation_start": 0.0, "affinity.start": 0.5, "train.steps": 6}
    trainer, batches = trainer_for(tiny("afa", **settings))
    assert trainer.recipe.affinity_step == 3
    batch, calls = next(batches), []
    labels = trainer.labeler.training_labels

    def record(image, cam, label, box, spread=None):
        calls.append(spread is not None)
        return labels(image, cam, label, box, spread)

    trainer.labeler.training_labels = record
    trainer.terms(batch)
    assert calls == [False], "one map of labels serves both"
    trainer.index = 3
    trainer.terms(batch)
    assert calls == [False, True, False], "propagated for the decoder, as it is for the pairs"


def test_pairs_are_read_at_the_patches(tiny, step_of, monkeypatch):
    trainer, make = step_of(tiny("afa", **{"losses.segmentation_start": 0.0, "affinity.start": 1.0}))
    step = make()
    from ssepa_lib.methods.step import take_step

    step = take_step(trainer.network, trainer.recipe, step.batch, 0, trainer.labeler, pairs_of(trainer).needs)
    tokens = step.pseudo_label[:, ::8, ::8].flatten(1)
    expected = affinity_pairs(trainer.network.affinity_head(step.output.attention), tokens, window((4, 4), 1))
    torch.testing.assert_close(pairs_of(trainer)(step)["aff"], expected)


@pytest.mark.parametrize(("crop", "radius"), [(512, 8), (448, 7), (224, 4)])
def test_the_reach_is_a_quarter_of_the_grid(crop, radius):
    args = {"depth": 3, "embed_dim": 32, "num_heads": 2}
    recipe = load_recipe(
        "voc/afa",
        {
            "data.crop": crop,
            "model.weights": "none",
            "model.backbone": "vit_tiny_patch16_224",
            "model.backbone_args": args,
        },
    )
    assert build_network(recipe, CLASSES).affinity_head.radius == radius


def test_the_published_schedule():
    recipe = load_recipe("voc/afa")
    assert (recipe.segmentation_step, recipe.affinity_step, recipe.warmup_steps) == (2000, 6000, 1500)
    assert learning_rate_factor(recipe, 5000) == pytest.approx(0.75)
    assert learning_rate_factor(load_recipe("voc/toco"), 5000) == pytest.approx(0.75**0.9)
    assert (recipe.cam.high, recipe.cam.low, recipe.cam.background) == (0.55, 0.35, 0.45)
    coco = load_recipe("coco/afa")
    assert coco.affinity_step == 15000 and coco.cam.main_from == 0 and coco.cam.high == 0.55


def test_plain_views_keep_their_colours(tiny):
    items = {}
    for views in ("toco", "plain"):
        recipe = tiny("afa", **{"data.views": views, "data.scale": [1.0, 1.0], "data.crop": 96})
        dataset = build_dataset(recipe.data, "train")
        items[views] = [TrainViews(dataset, recipe)[i] for i in range(4)], dataset
    (plain, dataset), (jittered, _) = items["plain"], items["toco"]
    views = TrainViews(dataset, tiny("afa"))
    for i, (a, b) in enumerate(zip(plain, jittered, strict=True)):
        y0, y1, x0, x1 = a.box.tolist()
        assert torch.equal(a.box, b.box) and a.global2 is None
        colours = set(map(tuple, a.image[:, y0:y1, x0:x1].flatten(1).T.tolist()))
        source = torch.from_numpy(__import__("numpy").array(dataset.image(views.index(i)))).flatten(0, 1)
        assert colours <= set(map(tuple, source.tolist())), "no colour that the image does not have"
    assert any(not torch.equal(a.image, b.image) for a, b in zip(plain, jittered, strict=True))


# What does not go together


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("afa+ssepa", {}, "both or neither"),
        ("ssepa+afa", {}, "only haaf learns"),
        ("afa+toco", {}, "both or neither"),
        ("fsr+afa", {}, "auxiliary CAM is not trained"),
        ("afa+fsr", {}, "auxiliary CAM is not trained"),
        ("toco", {"losses.aff": 0.1}, "both or neither"),
        ("afa", {"losses.aff": 0}, "both or neither"),
        ("afa", {"affinity.per_scale": True}, "propagates the main CAM once"),
        ("afa", {"affinity.balance": True}, "set affinity.kind to mean or haaf"),
        ("afa", {"affinity.radius": 0}, "affinity.radius is 0"),
        ("afa", {"affinity.blocks": 0}, "affinity.blocks is 0"),
        ("afa", {"optim.power": 0}, "optim.power is 0"),
        ("toco", {"losses.aux_cls": 0}, "losses.ptc and losses.ctc read it"),
        ("afa", {"losses.cer": 0.1, "reinforce.selection": "loose"}, "losses.cer reads it"),
        ("afa", {"cam.main_from": 0.5}, "cam.main_from reads it"),
        ("afa", {"affinity.start": 0.2, "losses.segmentation_start": 0.2}, "used before it is trained"),
        ("ssepa", {"affinity.haaf_objective": "decoder", "losses.seg": 0}, "follows the decoder"),
        (
            "ssepa",
            {"losses.aux_cls": 0, "losses.ptc": 0, "losses.ctc": 0, "affinity.haaf_objective": "pooling"},
            "affinity.haaf_objective pooling reads it",
        ),
    ],
)
def test_contradictions_are_one_sentence(name, changes, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        load_recipe(f"shapes/{name}", changes)
    assert "\n" not in str(error.value)


def test_a_classifier_that_is_not_trained_is_not_measured(tiny):
    recipe = tiny("afa")
    dataset = split_of(recipe, "val", 2)
    network = build_network(recipe, dataset.classes)
    miou = evaluate(network, recipe, dataset, outputs=("cam", "aux_cam"), device="cpu")["miou"]
    assert miou["aux_cam"] is None and miou["cam"] is not None


def test_more_blocks_than_the_backbone_has_are_refused(tiny):
    with pytest.raises(UserError, match=r"affinity\.blocks is 9, but the backbone has only 4 blocks"):
        build_network(tiny("afa", **{"affinity.blocks": 9}), CLASSES)


def test_settings_of_the_learned_affinity_belong_to_it_alone():
    idle = {"affinity.blocks": 3, "affinity.radius": 0.5, "affinity.start": 0.9}
    for method in ("toco", "ssepa"):
        assert load_recipe(f"voc/{method}", idle).hash() == load_recipe(f"voc/{method}").hash()
    haaf = {
        "affinity.hidden": 7,
        "affinity.descriptor": "full",
        "affinity.haaf_weight": 3,
        "affinity.haaf_lr": 1,
    }
    assert load_recipe("voc/ssepa_affinity", haaf).hash() == load_recipe("voc/ssepa_affinity").hash()
    assert (
        load_recipe("voc/afa", haaf | {"affinity.attention": "logits"}).hash()
        == load_recipe("voc/afa").hash()
    )
    for key, value in haaf.items():
        assert load_recipe("voc/ssepa", {key: value}).hash() != load_recipe("voc/ssepa").hash(), key
    for key, value in idle.items():
        assert load_recipe("voc/afa", {key: value}).hash() != load_recipe("voc/afa").hash(), key
    power = {"optim.power": 0.5}
    assert load_recipe("voc/fsr", power).hash() == load_recipe("voc/fsr").hash()
    assert load_recipe("voc/toco", power).hash() != load_recipe("voc/toco").hash()
