"""Class activation maps against one image, scale and view at a time."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ssepa_lib.labels import build_refiner, cam_to_label, multi_scale_cam, normalise_cam, valid_cam
from ssepa_lib.labels.calibrate import calibrate
from ssepa_lib.labels.pseudo_labels import inside
from ssepa_lib.model import build_network

CLASSES = ("ant", "bee", "cat", "dog")
LABEL = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])


def slow(network, image, label, config, refiner=None):
    """The method, one image, scale and view at a time; every class."""
    result = []
    for b in range(len(image)):
        total = 0
        for scale in config.scales:
            views = []
            for flip in (False, True):
                x = image[b : b + 1]
                x = F.interpolate(x, scale_factor=scale, mode="bilinear") if scale != 1 else x
                out = network(x.flip(-1) if flip else x, segment=False, capture=refiner is not None)
                cam = out.cam
                if refiner is not None:
                    columns = cam.relu().flatten(2).transpose(1, 2)
                    dense = refiner.affinity(out.attention).dense()
                    cam = (dense @ columns).transpose(1, 2).reshape(cam.shape)
                cam = F.interpolate(cam, image.shape[-2:], mode="bilinear")
                views.append(cam.flip(-1) if flip else cam)
            total = total + torch.maximum(*views).relu()
        result.append(normalise_cam(total)[0] * label[b, :, None, None])
    return torch.stack(result)


def test_multi_scale_cam_equals_the_slow_way(tiny):
    recipe = tiny("ssepa")
    network, image = build_network(recipe, CLASSES).eval(), torch.rand(2, 3, 32, 48) * 255
    with torch.no_grad():
        torch.nn.init.normal_(network.haaf.mlp[2].weight)
        refiner = build_refiner(recipe.affinity, network)
        cams = multi_scale_cam(network, image, LABEL, recipe.cam, refiner)
        plain = slow(network, image, LABEL, recipe.cam)
        refined = slow(network, image, LABEL, recipe.cam, refiner)
    torch.testing.assert_close(cams.main, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(cams.refined, refined, rtol=1e-3, atol=1e-4)
    assert torch.equal(cams.for_labels, cams.refined) and not torch.equal(cams.for_labels, cams.main)


def test_without_a_refiner_labels_come_from_the_main_maps(tiny):
    recipe = tiny()
    network = build_network(recipe, CLASSES).eval()
    cams = multi_scale_cam(network, torch.rand(2, 3, 32, 32) * 255, LABEL, recipe.cam)
    assert cams.refined is None and torch.equal(cams.for_labels, cams.main)


def test_a_shared_first_pass_changes_nothing(tiny):
    for method, affinity, per_scale in (("toco", False, True), ("ssepa", True, True), ("ssepa", True, False)):
        recipe = tiny(method, **{"affinity.auxiliary": affinity, "affinity.per_scale": per_scale})
        network, image = build_network(recipe, CLASSES).eval(), torch.rand(2, 3, 32, 32) * 255
        refiner = build_refiner(recipe.affinity, network)
        alone = multi_scale_cam(network, image, LABEL, recipe.cam, refiner)
        first = network(image, capture=affinity)
        shared = multi_scale_cam(network, image, LABEL, recipe.cam, refiner, first=first)
        for name in ("main", "auxiliary", "refined") if affinity else ("main", "auxiliary"):
            torch.testing.assert_close(getattr(alone, name), getattr(shared, name))


@pytest.mark.parametrize("iterations", [1, 2])
def test_affinity_of_the_image_itself_on_the_sum_over_scales(tiny, iterations):
    """affinity.per_scale false: the matrix of scale 1, not flipped, on the summed maps at its patches."""
    recipe = tiny("ssepa", **{"affinity.per_scale": False, "affinity.iterations": iterations})
    network, image = build_network(recipe, CLASSES).eval(), torch.rand(2, 3, 32, 48) * 255
    with torch.no_grad():
        torch.nn.init.normal_(network.haaf.mlp[2].weight)
        for block in network.backbone.vit.blocks:  # peaked attention: a near-constant map magnifies rounding
            block.attn.qkv.weight *= 20
        total = 0
        for scale in recipe.cam.scales:
            x = F.interpolate(image, scale_factor=scale, mode="bilinear") if scale != 1 else image
            views = [network(x, segment=False).cam, network(x.flip(-1), segment=False).cam]
            plain, flipped = (F.interpolate(v, image.shape[-2:], mode="bilinear") for v in views)
            total = total + torch.maximum(plain, flipped.flip(-1)).relu()
        refiner = build_refiner(recipe.affinity, network)
        out = network(image, segment=False, capture=True)
        columns = F.interpolate(total, out.grid, mode="bilinear").flatten(2).transpose(1, 2)
        matrix = torch.linalg.matrix_power(refiner.affinity(out.attention).dense(), iterations)
        refined = (matrix @ columns).transpose(1, 2).unflatten(2, out.grid)
        expected = valid_cam(normalise_cam(F.interpolate(refined, image.shape[-2:], mode="bilinear")), LABEL)
        cams = multi_scale_cam(network, image, LABEL, recipe.cam, refiner)
        torch.testing.assert_close(cams.refined, expected, rtol=1e-3, atol=1e-4)
        plain = multi_scale_cam(network, image, LABEL, recipe.cam)
        assert torch.equal(cams.main, plain.main) and torch.equal(cams.auxiliary, plain.auxiliary)


def test_refining_the_auxiliary_map_is_a_switch(tiny):
    image, maps = torch.rand(1, 3, 32, 32) * 255, []
    for auxiliary in (False, True):
        recipe = tiny("ssepa", **{"affinity.auxiliary": auxiliary})
        network = build_network(recipe, CLASSES).eval()
        refiner = build_refiner(recipe.affinity, network)
        maps.append(multi_scale_cam(network, image, LABEL[:1], recipe.cam, refiner).auxiliary)
    assert not torch.allclose(*maps)


def test_maps_lie_in_the_unit_interval_and_absent_classes_are_zero(tiny):
    recipe = tiny()
    network = build_network(recipe, CLASSES).eval()
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    cam = multi_scale_cam(network, image, LABEL, recipe.cam).main
    assert cam.min() == 0 and 0.99 < cam.max() <= 1
    assert (cam.amax((2, 3)) > 0).equal(LABEL > 0)


def test_an_image_without_any_class_has_empty_maps(tiny):
    recipe = tiny()
    network = build_network(recipe, CLASSES).eval()
    cam = multi_scale_cam(network, torch.rand(1, 3, 32, 32) * 255, torch.zeros(1, 4), recipe.cam).main
    assert cam.shape == (1, 4, 32, 32) and not cam.any()


def test_normalise_and_threshold_by_hand():
    cam = torch.tensor([[[[1.0, 3.0], [5.0, 1.0]], [[0.0, 0.0], [0.0, 8.0]]]])
    unit = normalise_cam(cam)
    torch.testing.assert_close(unit[0, 0], torch.tensor([[0.0, 0.5], [1.0, 0.0]]), rtol=0, atol=1e-4)
    assert cam_to_label(unit, 0.6).tolist() == [[[0, 0], [1, 2]]]
    assert cam_to_label(unit, 0.4).tolist() == [[[0, 1], [1, 2]]]
    assert not valid_cam(unit, torch.tensor([[1.0, 0.0]]))[0, 1].any()


@pytest.mark.parametrize("method", ["toco", "ssepa"])
def test_only_the_maps_that_labels_are_made_from_are_calibrated(tiny, method):
    recipe = tiny(method)
    network, image = build_network(recipe, CLASSES).eval(), torch.rand(2, 3, 32, 32) * 255
    refiner, box = build_refiner(recipe.affinity, network), torch.tensor([[0, 32, 0, 32], [0, 32, 0, 20]])
    settings = [replace(recipe.cam, calibrate=kind) for kind in ("none", "otsu")]
    plain, otsu = (multi_scale_cam(network, image, LABEL, c, refiner, box=box) for c in settings)
    valid = inside(box, (32, 32)).float()
    torch.testing.assert_close(otsu.for_labels, calibrate(plain.for_labels, valid))
    assert not torch.allclose(otsu.for_labels, plain.for_labels)
    assert torch.equal(otsu.auxiliary, plain.auxiliary)
    assert refiner is None or torch.equal(otsu.main, plain.main)
