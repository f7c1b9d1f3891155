"""A frozen backbone: what learns, what is kept in memory, and that nothing stale is ever read."""

import pytest
import torch
from safetensors.torch import load_file

from ssepa_lib.compose import load_recipe
from ssepa_lib.data import build_dataset, train_loader
from ssepa_lib.errors import UserError
from ssepa_lib.model import build_network
from ssepa_lib.model.frozen import FeatureCache
from ssepa_lib.training import Trainer, train

CLASSES = ("ant", "bee", "cat")
STEPS = {"train.steps": 6, "data.train_images": 4, "losses.segmentation_start": 1 / 3}


@pytest.fixture
def backbone(tiny):
    return build_network(tiny("ssepa+frozen"), CLASSES).backbone


def images(number=2, side=32):
    return torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8)


def test_only_the_heads_learn_and_the_backbone_never_enters_training_mode(tiny, trainer_for):
    trainer, batches = trainer_for(tiny("ssepa+frozen", **STEPS))
    network = trainer.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for _ in range(3):
        trainer.step(next(batches))
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"classifier", "aux_classifier", "decoder", "haaf"}
    assert network.training and not network.backbone.training
    assert not any(id(p) in optimised for p in network.backbone.parameters())
    assert not network(images()).patches.requires_grad


def test_terms_without_weight_are_not_computed(tiny, trainer_for):
    trainer, batches = trainer_for(tiny("ssepa+frozen", **{"losses.segmentation_start": 0.0}))
    assert set(trainer.step(next(batches))) == {"loss", "cls", "aux_cls", "seg", "haaf"}


def test_the_features_of_a_view_are_computed_once(tiny, trainer_for):
    trainer, batches = trainer_for(tiny("ssepa_plus+frozen", **STEPS))
    cache = trainer.network.backbone.cache
    counts = []
    for (
        batch
    ) in batches:  # four images, two in a batch: an epoch has two steps, labels count from the third on
        trainer.step(batch)
        counts.append(cache.missed)
    assert counts == [2, 4, 6, 8, 8, 8]  # the views, then their flips
    assert cache.found == 2 * 2 + 2 * 4


def test_known_features_are_those_of_the_backbone(backbone):
    image, cache = images(3), FeatureCache(10**8)
    plain = [backbone(image[i : i + 1], capture=True) for i in range(3)]
    backbone.cache = cache
    first = backbone(image[:2], capture=True)
    second = backbone(image, capture=True)
    assert (cache.found, cache.missed) == (2, 3)
    assert torch.equal(first.patches, second.patches[:2]) and second.patches.dtype == torch.float32
    torch.testing.assert_close(second.aux, torch.cat([p.aux for p in plain]), rtol=1e-3, atol=1e-3)
    for layer, queries in enumerate(second.attention.queries):
        expected = torch.cat([p.attention.queries[layer] for p in plain])
        torch.testing.assert_close(queries, expected, rtol=1e-3, atol=1e-3)
    assert backbone(image).attention is None


def test_attention_that_was_not_kept_is_computed_when_it_is_needed(backbone):
    backbone.cache, image = FeatureCache(10**8), images(1)
    backbone(image)
    assert backbone(image, capture=True).attention is not None
    backbone(image)
    assert (backbone.cache.found, backbone.cache.missed) == (1, 2)


def test_other_pixels_sizes_precisions_and_weights_are_never_confused(backbone):
    backbone.cache, image = FeatureCache(10**8), images(1)
    tokens = backbone(image).patches
    changed = image.clone()
    changed[0, 0, 0, 0] ^= 1
    for other in (changed, image.float(), image[..., :24]):
        backbone(other)
    with torch.autocast("cpu", torch.bfloat16):
        backbone(image)
    assert (backbone.cache.found, backbone.cache.missed) == (0, 5)
    with torch.no_grad():
        backbone.vit.norm.weight.mul_(2)
    assert not torch.allclose(backbone(image).patches, tokens), "changed weights empty the cache"
    backbone.load_state_dict(backbone.state_dict())
    backbone(image)
    assert backbone.cache.found == 0


def test_a_cache_of_another_backbone_is_refused(backbone, tiny):
    backbone.cache = FeatureCache(10**8)
    backbone(images(1))
    other = build_network(tiny("ssepa+frozen", **{"model.mean": [0.1, 0.1, 0.1]}), CLASSES).backbone
    other.cache = backbone.cache
    with pytest.raises(UserError, match="belong to another backbone; give every"):
        other(images(1))


def test_memory_is_bounded(backbone):
    backbone(images(1))
    one = backbone(images(1)).nbytes // 2  # in half precision
    backbone.cache = FeatureCache(3 * one)
    image = images(5)
    first, again = backbone(image).patches, backbone(image).patches
    assert backbone.cache.used == 3 * one and backbone.cache.found == 3
    assert torch.equal(first, again), "what is not kept is rounded alike"


def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path):
    recipe = tiny("ssepa_plus+frozen", **STEPS, **{"train.save_every": 3})

    class Interrupted(Exception):
        pass

    def stop(row):
        if row["step"] == 4:
            raise Interrupted

    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "parts", on_step=stop)
    parts = train(recipe, tmp_path / "parts")
    first, second = (load_file(folder / "weights.safetensors") for folder in (whole, parts))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_views_return_after_as_many_epochs_as_there_are(tiny):
    recipe = tiny("ssepa_plus+frozen", **STEPS, **{"data.fixed_views": 2})
    dataset = build_dataset(recipe.data, "train")
    seen: dict[str, list] = {}
    for batch in train_loader(dataset, recipe):
        for name, image in zip(batch.id, batch.image, strict=True):
            seen.setdefault(name, []).append(image)
    for views in seen.values():
        assert len(views) == 3 and not torch.equal(views[0], views[1]) and torch.equal(views[0], views[2])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("losses.ptc", 0.2),
        ("losses.ctc", 0.5),
        ("losses.unc", 0.1),
        ("losses.cer", 0.1),
        ("cam.teacher_momentum", 0.9),
        ("model.train_pos_embed", True),
        ("model.drop_path", 0.1),
    ],
)
def test_settings_that_train_the_backbone_are_refused(setting, value):
    with pytest.raises(UserError, match=rf"{setting} trains the backbone; set {setting} to (0|false) "):
        load_recipe("voc/ssepa_plus+frozen", {setting: value})


def test_new_views_need_no_cache(tiny):
    trainer = Trainer(tiny("ssepa+frozen", **{"data.fixed_views": 0}), CLASSES, torch.device("cpu"))
    assert trainer.network.backbone.cache is None


def test_the_memory_changes_no_result(tiny, trainer_for):
    """Nothing is kept, or everything: the features and what is learnt from them are equal bit for bit."""
    features, learnt = [], []
    for change in ({}, {"model.cache_gb": 0}):
        trainer, batches = trainer_for(tiny("ssepa_plus+frozen", **STEPS, **change))
        for batch in batches:
            trainer.step(batch)
        backbone = trainer.network.backbone
        assert (backbone.cache.found == 0) == (backbone.cache.used == 0) == bool(change)
        output = backbone(batch.image, capture=True)
        features.append([output.patches, output.aux, output.cls, *output.attention.queries])
        learnt.append(list(trainer.network.state_dict().values()))
    for one, two in (features, learnt):
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
