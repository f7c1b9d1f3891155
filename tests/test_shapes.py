"""The built-in scenes: reproducible, disjoint, well formed, and hard in the way they are meant to be."""

import time
from collections import Counter

import numpy as np
import pytest

from ssepa_lib.data.shapes import BACKGROUNDS, HOME, SHAPE_CLASSES, _head, render_object, render_scene
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
    """Creatures are saturated, backgrounds are not: a network can tell them apart without knowing the class."""

    def saturation(pixels):
        high, low = pixels.max(-1).astype(float), pixels.min(-1).astype(float)
        return np.median((high - low) / np.maximum(high, 1))

    for image, mask in scenes(count=30):
        assert saturation(image[mask > 0]) > saturation(image[mask == 0]) + 0.1


def test_bodies_say_nothing_about_the_class():
    """The nearest class mean of body colours guesses no better than chance, and heads of any two classes differ."""
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
