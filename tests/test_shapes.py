"""The built-in scenes: reproducible, disjoint, well formed, and hard in the way they are meant to be."""

import hashlib
import time
from collections import Counter

import numpy as np
import pytest

from ssepa_lib.data.shapes import (
    BACKGROUNDS,
    HOME,
    SHAPE_CLASSES,
    _head,
    render_object,
    render_scene,
    scene_facts,
)
from ssepa_lib.errors import UserError


def scenes(split="train", count=60, **options):
    return [render_scene(split, index, **options) for index in range(count)]


def test_a_scene_depends_on_seed_split_and_index_alone():
    image, mask = render_scene("train", 3)
    render_scene("val", 8)
    again, mask_again = render_scene("train", 3)
    assert np.array_equal(image, again) and np.array_equal(mask, mask_again)
    for other in (render_scene("val", 3), render_scene("train", 4), render_scene("train", 3, seed=1)):
        assert other[0].shape != image.shape or not np.array_equal(other[0], image)


def test_scenes_are_well_formed_and_of_varied_shape():
    drawn = scenes()
    for image, mask in drawn:
        assert image.dtype == mask.dtype == np.uint8 and image.shape == (*mask.shape, 3)
        assert all(112 <= side <= 144 for side in mask.shape)
        assert mask.max() <= len(SHAPE_CLASSES)
        assert 0.03 < (mask > 0).mean() < 0.7
    assert any(image.shape[0] > image.shape[1] for image, _ in drawn)
    assert any(image.shape[0] < image.shape[1] for image, _ in drawn)
    assert all(56 <= side <= 72 for _, mask in scenes(count=5, size=64) for side in mask.shape)


def test_all_classes_occur_and_scenes_show_one_to_three():
    present = [set(np.unique(mask)) - {0} for _, mask in scenes(count=120)]
    assert set.union(*present) == set(range(1, len(SHAPE_CLASSES) + 1))
    assert {len(classes) for classes in present} == {1, 2, 3}


def test_bodies_stand_out_from_the_background():
    """Creatures are saturated and backgrounds are not, so the two differ whatever the class is."""

    def saturation(pixels):
        high, low = pixels.max(-1).astype(float), pixels.min(-1).astype(float)
        return np.median((high - low) / np.maximum(high, 1))

    for image, mask in scenes(count=30):
        assert saturation(image[mask > 0]) > saturation(image[mask == 0]) + 0.1


def test_bodies_say_nothing_about_the_class():
    """Guessing by the mean body colour is no better than chance, and the heads of any two classes differ."""
    drawn = [render_object(index, 64) for index in range(400)]
    colours = np.array([np.median(image[24:40, 24:40].reshape(-1, 3), 0) for image, _ in drawn])
    labels = np.array([label for _, label in drawn])
    means = np.stack([colours[:200][labels[:200] == c].mean(0) for c in range(len(SHAPE_CLASSES))])
    guess = np.linalg.norm(colours[200:, None] - means, axis=2).argmin(1)
    assert (guess == labels[200:]).mean() < 2.2 / len(SHAPE_CLASSES)
    v, u = np.mgrid[-1:1:21j, -1:1:21j].astype(np.float32)
    heads = [_head(c, u, v, np.float32([200, 30, 30])) for c in range(len(SHAPE_CLASSES))]
    assert min(np.abs(a - b).mean() for i, a in enumerate(heads) for b in heads[:i]) > 20


def test_classes_prefer_their_home_background():
    """Sea scenes are told by their blue; crosslets (home: sea) show it far more often than the others."""
    alone = Counter()
    for image, mask in scenes(count=400):
        classes = set(np.unique(mask)) - {0}
        if len(classes) == 1:
            red, _, blue = image[mask == 0].mean(0)
            alone[classes.pop() == 2, blue - red > 30] += 1
    share = {home: alone[home, True] / (alone[home, True] + alone[home, False]) for home in (True, False)}
    expected = HOME + (1 - HOME) / len(BACKGROUNDS)
    assert abs(share[True] - expected) < 0.2 and share[False] < 0.25


def test_scenes_stay_what_they_are():
    """Stored results and weights were made from these very pixels."""
    digest = hashlib.md5()
    for split in ("train", "val", "test"):
        for index in range(5):
            image, mask = render_scene(split, index, size=96, seed=index % 2)
            digest.update(image.tobytes() + mask.tobytes())
    digest.update(render_object(3)[0].tobytes())
    assert digest.hexdigest() == "33f66f344f6e25bd18e664d24fcca616"


def test_parts_divide_every_creature_into_head_and_body():
    areas = []
    for index in range(30):
        image, mask, parts = render_scene("val", index, parts=True)
        same_image, same_mask = render_scene("val", index)
        assert np.array_equal(image, same_image) and np.array_equal(mask, same_mask)
        assert parts.dtype == np.uint8 and parts.shape == mask.shape and set(np.unique(parts)) <= {0, 1, 2}
        assert np.array_equal(parts > 0, mask > 0)
        areas.append([(parts == 1).sum(), (parts == 2).sum()])
    heads, bodies = np.sum(areas, 0)
    assert 0.1 < heads / (heads + bodies) < 0.4


def test_facts_name_what_is_drawn():
    share = Counter()
    for index in range(200):
        facts = scene_facts("train", index)
        _, mask = render_scene("train", index, size=32)
        shown = {SHAPE_CLASSES[i - 1] for i in np.unique(mask) if i}
        assert shown <= set(facts.classes) and 1 <= len(facts.classes) <= 3
        share[BACKGROUNDS.index(facts.background) == SHAPE_CLASSES.index(facts.classes[0])] += 1
    assert abs(share[True] / 200 - HOME - (1 - HOME) / len(BACKGROUNDS)) < 0.1
    assert scene_facts("train", 0, seed=1) != scene_facts("train", 0)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_another_background_shows_the_same_creatures(background):
    for index in range(4):
        image, mask = render_scene("val", index)
        other, other_mask = render_scene("val", index, background=background)
        assert np.array_equal(mask, other_mask) and np.array_equal(image[mask > 0], other[mask > 0])
        own = scene_facts("val", index).background == background
        assert np.array_equal(image, other) == own
    with pytest.raises(UserError, match="no background 'moon'; choose meadow"):
        render_scene("val", 0, background="moon")


def test_single_creatures_are_centred_and_are_no_scenes():
    image, label = render_object(0)
    assert image.shape == (96, 96, 3) and image.dtype == np.uint8 and 0 <= label < len(SHAPE_CLASSES)
    assert np.array_equal(image, render_object(0)[0]) and not np.array_equal(
        image, render_object(0, seed=1)[0]
    )
    assert {render_object(index, 32)[1] for index in range(60)} == set(range(len(SHAPE_CLASSES)))
    saturated = [np.ptp(render_object(index)[0].astype(int), axis=2) > 90 for index in range(40)]
    assert np.mean([s[32:64, 32:64].mean() for s in saturated]) > 4 * np.mean(
        [s[:10].mean() for s in saturated]
    )


def test_unknown_split_is_refused():
    with pytest.raises(UserError, match="trainval"):
        render_scene("trainval", 0)


def test_drawing_is_fast():
    scenes(count=3, size=96)
    began = time.process_time()
    scenes(count=30, size=96)
    assert (time.process_time() - began) / 30 < 0.02  # about 1.5 ms on one core
