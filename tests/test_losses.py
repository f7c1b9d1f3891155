"""Every loss against a slow loop or a number worked out by hand, and its edge cases."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ssepa_lib.methods.bilateral import bilateral_filter
from ssepa_lib.methods.losses import (
    class_token_contrast,
    classification_loss,
    dense_energy,
    normalised_cut,
    patch_token_contrast,
    segmentation_loss,
    unexplained_variance,
)


def test_classification_loss_by_hand():
    scores, label = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    expected = (math.log(2) + math.log(1 + math.exp(2))) / 2
    assert classification_loss(scores, label).item() == pytest.approx(expected, rel=1e-6)


def slow_normalised_cut(tokens, foreground):
    total = 0.0
    for x, m in zip(tokens.double(), foreground.double(), strict=True):
        x = x - x.mean(0)
        pairs = []
        for i in range(len(x)):
            for j in range(len(x)):
                cosine = (x[i] @ x[j]) / (x[i].norm() * x[j].norm())
                pairs.append((i, j, max(0.0, cosine.item()) ** 2))
        cut = sum(m[i] * (1 - m[j]) * w for i, j, w in pairs)
        total += cut / sum(m[i] * w for i, j, w in pairs) + cut / sum((1 - m[i]) * w for i, j, w in pairs)
    return total / len(tokens)


def test_normalised_cut_against_loops_and_at_its_ends():
    tokens, foreground, all_valid = torch.randn(3, 7, 5), torch.rand(3, 7), torch.ones(3, 7)
    expected = slow_normalised_cut(tokens, foreground)
    torch.testing.assert_close(
        normalised_cut(tokens, foreground, all_valid).double(), expected, rtol=1e-4, atol=0
    )
    padded, valid = torch.cat([tokens, torch.full((3, 4, 5), 9.0)], 1), torch.arange(11).expand(3, 11) < 7
    found = normalised_cut(padded, torch.cat([foreground, torch.rand(3, 4)], 1), valid)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)  # padding changes nothing
    two = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])[None]  # two groups without an edge between them
    assert normalised_cut(two, torch.tensor([[1.0, 1, 0, 0]]), torch.ones(1, 4)).item() == pytest.approx(
        0, abs=1e-5
    )
    assert normalised_cut(two, torch.tensor([[1.0, 0, 1, 0]]), torch.ones(1, 4)).item() == pytest.approx(
        1, abs=1e-3
    )
    assert normalised_cut(two, torch.zeros(1, 4), torch.ones(1, 4)).isfinite()  # an image without foreground


def test_unexplained_variance_by_hand():
    """Two kinds of tokens, ±(1, -1) after centring, and padding that must not count."""
    tokens = torch.tensor([[[3.0, 0], [3, 0], [0, 3], [0, 3], [70, -9]]])
    valid = torch.tensor([[1.0, 1, 1, 1, 0]])
    maps = torch.tensor([[1.0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0.5] * 5]).T[None]  # [1, 5, 4]
    for present, expected in (
        ([1, 0, 0, 0], 0.0),  # the sides are the kinds: (2² / 2 + 2² / 2) / 4 is explained
        ([0, 1, 0, 0], 2 / 3),  # (1² / 1 + 1² / 3) / 4
        ([0, 0, 1, 0], 1.0),
        ([0, 0, 0, 1], 1.0),
        ([1, 1, 0, 0], 1 / 3),
    ):
        found = unexplained_variance(tokens, maps, valid, torch.tensor([present]).float())
        assert found.item() == pytest.approx(expected, abs=1e-4), present
    both = unexplained_variance(
        tokens.repeat(2, 1, 1), maps.repeat(2, 1, 1), valid.repeat(2, 1), torch.eye(4)[[0, 1]]
    )
    assert both.item() == pytest.approx(1 / 3, abs=1e-4)


def slow_patch_token_contrast(patches, labels):
    positive, negative = [], []
    for x, label in zip(patches.double(), labels.tolist(), strict=True):
        for i in range(len(x)):
            for j in range(len(x)):
                if i == j or 255 in (label[i], label[j]):
                    continue
                cosine = abs((x[i] @ x[j]) / (x[i].norm() * x[j].norm())).item()
                (positive if label[i] == label[j] else negative).append(cosine)
    return 0.5 * (1 - sum(positive) / (len(positive) + 1)) + 0.5 * sum(negative) / (len(negative) + 1)


@pytest.mark.parametrize(
    "labels", [[[0, 1, 1, 255, 0], [2, 2, 0, 0, 1]], [[0] * 5, [3] * 5], [[255] * 5, [255] * 5]], ids=str
)
def test_patch_token_contrast_equals_the_loop(labels):
    patches, labels = torch.randn(2, 5, 7), torch.tensor(labels)
    expected = slow_patch_token_contrast(patches, labels)
    assert patch_token_contrast(patches, labels).item() == pytest.approx(expected, rel=1e-5)


def slow_class_token_contrast(student, teacher, positive, temperature):
    total = 0
    for s, t, flags in zip(student.double(), teacher.double(), positive.tolist(), strict=True):
        loss = 0
        for i in range(2):
            score = [math.exp((t[i] @ s[j]).item() / temperature) for j in range(len(s))]
            negatives = sum(x for x, flag in zip(score, flags, strict=True) if not flag)
            loss -= sum(
                math.log(x / (x + negatives + 1e-4)) for x, flag in zip(score, flags, strict=True) if flag
            )
            loss -= math.log(1 / (1 + negatives + 1e-4))
        total += loss / (2 * (sum(flags) + 1e-4))
    return total / len(student)


@pytest.mark.parametrize("locals_", ["some", "none negative", "all negative"])
def test_class_token_contrast_equals_the_loop(locals_):
    student, teacher = torch.randn(3, 6, 4), torch.randn(3, 2, 4)
    positive = torch.rand(3, 6) > 0.5 if locals_ == "some" else torch.full((3, 6), locals_ == "none negative")
    positive[:, :2] = True
    expected = slow_class_token_contrast(student, teacher, positive, 0.5)
    assert class_token_contrast(student, teacher, positive, 0.5).item() == pytest.approx(expected, rel=1e-5)


def test_class_token_contrast_survives_huge_similarities_and_trains_the_student_only():
    student, teacher = torch.full((1, 3, 4), 50.0), torch.full((1, 2, 4), 50.0)
    student.requires_grad_(), teacher.requires_grad_()
    loss = class_token_contrast(student, teacher, torch.tensor([[True, True, False]]), 0.5)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and student.grad.any() and teacher.grad is None


def test_segmentation_loss_balances_background_and_foreground():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]])
    logits = probabilities.log().T.view(1, 3, 2, 2)
    target = torch.tensor([[[0, 0], [1, 255]]])
    background, foreground = -(math.log(0.5) + math.log(0.8)) / 2, -math.log(0.6)
    assert segmentation_loss(logits, target).item() == pytest.approx((background + foreground) / 2, rel=1e-6)
    only_background = target.masked_fill(target == 1, 255)
    assert segmentation_loss(logits, only_background).item() == pytest.approx(background / 2, rel=1e-6)
    only_foreground = target.masked_fill(target == 0, 255)
    assert segmentation_loss(logits, only_foreground).item() == pytest.approx(foreground / 2, rel=1e-6)


def test_segmentation_loss_without_labels_is_zero_with_a_zero_gradient():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def slow_bilateral(image, values, sigma_xy, sigma_rgb):
    """One image [3, H, W] and values [K, H, W]: the double loop over pixels."""
    k, h, w = values.shape
    result = np.zeros((k, h, w))
    for y, x in np.ndindex(h, w):
        for v, u in np.ndindex(h, w):
            distance = ((y - v) ** 2 + (x - u) ** 2) / (2 * sigma_xy**2)
            distance += ((image[:, y, x] - image[:, v, u]) ** 2).sum() / (2 * sigma_rgb**2)
            result[:, y, x] += math.exp(-distance) * values[:, v, u]
    return result


def smooth_image(batch, height, width, seed=0):
    """Soft blobs of colour with a little noise, 0..255."""
    rng = torch.Generator().manual_seed(seed)
    image = F.interpolate(torch.rand(batch, 3, 5, 5, generator=rng), (height, width), mode="bicubic") * 255
    return (image + 6 * torch.randn(image.shape, generator=rng)).clamp(0, 255)


def test_exact_bilateral_filter_equals_the_double_loop():
    image, values = smooth_image(2, 6, 7), torch.rand(2, 3, 6, 7)
    result = bilateral_filter(image, values, 4, 30, exact=True)
    slow = [
        slow_bilateral(i, v, 4, 30)
        for i, v in zip(image.double().numpy(), values.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(result, np.stack(slow), rtol=1e-5)


def half_by_hand(tensor, kind):
    """Half size: nearest takes every second pixel, bilinear averages 2 × 2."""
    return tensor[..., ::2, ::2] if kind == "nearest" else F.avg_pool2d(tensor, 2)


def test_dense_energy_has_the_stated_value_and_gradient():
    image = smooth_image(2, 12, 16)
    logits = torch.randn(2, 4, 12, 16, requires_grad=True)
    target = torch.randint(0, 4, (2, 12, 16))
    target[torch.rand(target.shape) < 0.3] = 255
    box = torch.tensor([[0, 12, 0, 16], [2, 12, 4, 14]])
    region = torch.zeros(2, 1, 12, 16)
    for r, (y0, y1, x0, x1) in zip(region, box.tolist(), strict=True):
        r[:, y0:y1, x0:x1] = 1

    s = half_by_hand(logits.softmax(1), "bilinear")
    inside = half_by_hand(region, "nearest")
    gate = (inside - s.detach().amax(1, keepdim=True)).clamp(min=0)
    gate[half_by_hand(target, "nearest")[:, None] == 255] = 1
    masked = (s * inside).detach()
    pairs = zip(half_by_hand(image, "nearest").double().numpy(), masked.double().numpy(), strict=True)
    filtered = torch.tensor(np.stack([slow_bilateral(i, m, 50, 15) for i, m in pairs])).float()
    energy = -1e-7 * (masked * gate * filtered).sum() / 2
    stated = torch.autograd.grad(s, logits, -2e-7 * gate * filtered * inside / 2)[0]

    for exact in (True, False):
        value = dense_energy(image, logits, target, box, exact=exact)
        torch.testing.assert_close(value, energy, rtol=1e-4, atol=0)
        gradient = torch.autograd.grad(3 * value, logits)[0]
        torch.testing.assert_close(gradient, 3 * stated, rtol=1e-3, atol=1e-3 * stated.abs().max().item())
    assert (
        gradient[1, :, 2:12, 4:14].any() and not gradient[1, :, :2].any() and not gradient[1, :, :, 14:].any()
    )


def test_dense_energy_takes_coarse_logits_bytes_and_mixed_precision():
    image = smooth_image(1, 32, 32).to(torch.uint8)
    target, box = torch.full((1, 32, 32), 255), torch.tensor([[0, 32, 0, 32]])
    coarse = torch.randn(1, 3, 4, 4, requires_grad=True)
    full = F.interpolate(coarse, (32, 32), mode="bilinear")
    expected = dense_energy(image, full, target, box)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dense_energy(image, coarse, target, box), expected)


def check_fast_energy(image):
    """Value and gradient of the grid within 2 % of the exact sum, for every image."""
    b, _, h, w = image.shape
    logits = (3 * F.interpolate(torch.randn(b, 5, 7, 7), (h, w), mode="bilinear")).requires_grad_()
    target = torch.where(torch.rand(b, h, w) < 0.5, 255, 0)
    for i in range(b):
        one = image[i : i + 1], logits[i : i + 1], target[i : i + 1], torch.tensor([[0, h, 0, w]])
        values = [dense_energy(*one, exact=exact) for exact in (True, False)]
        exact, fast = (torch.autograd.grad(v, logits)[0] for v in values)
        assert values[1].item() == pytest.approx(values[0].item(), rel=0.02)
        assert values[1].item() != values[0].item(), "the image is too small for the grid to be used"
        assert (fast - exact).norm() < 0.02 * exact.norm()


def test_fast_dense_energy_on_smooth_colours():
    check_fast_energy(smooth_image(2, 144, 160))


def test_fast_dense_energy_on_real_images(voc_root):
    files = sorted((voc_root / "JPEGImages").glob("*.jpg"))[:3]
    images = [np.array(Image.open(f).convert("RGB").resize((192, 192))) for f in files]
    check_fast_energy(torch.tensor(np.stack(images)).permute(0, 3, 1, 2))


def test_fast_bilateral_filter_on_flat_and_on_random_colours():
    values = torch.rand(1, 2, 72, 72)
    for image in (torch.full((1, 3, 72, 72), 200.0), torch.rand(1, 3, 72, 72) * 255):
        exact = bilateral_filter(image, values, 50, 15, exact=True)
        fast = bilateral_filter(image, values, 50, 15)
        assert (fast - exact).norm() < 0.02 * exact.norm()
        assert torch.equal(bilateral_filter(image, -values, 50, 15), -fast)
