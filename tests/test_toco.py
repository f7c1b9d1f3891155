"""Region map and local crops on images whose pixels tell their own place."""

import pytest
import torch

from ssepa_lib.errors import UserError
from ssepa_lib.methods import toco
from ssepa_lib.methods.toco import ClassTokenContrast, local_views, region_map


def coordinates(batch, side):
    """Images [B, 3, side, side] whose channels are image number, row and column."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.stack([torch.full_like(y, i), y, x]) for i in range(batch)])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_region_map_takes_the_strongest_class_and_includes_both_thresholds():
    cam = torch.tensor([[0.1, 0.25, 0.3, 0.69, 0.7, 0.1], [0.2, 0.0, 0.0, 0.1, 0.0, 0.9]]).view(1, 2, 2, 3)
    assert region_map(cam, 0.25, 0.7).tolist() == [[[0, 0, 1], [1, 2, 2]]]


def test_crops_are_contiguous_squares_of_their_own_image_and_flags_follow_the_mean():
    torch.manual_seed(1)
    regions = torch.zeros(3, 40, 40, dtype=torch.long)
    regions[0, 20:, :] = 1
    regions[1, :, 25:] = 2
    crops, positive = local_views(coordinates(3, 40), regions, 30, 9, 0.2, generator())
    assert crops.shape == (3, 30, 3, 9, 9) and positive.shape == (3, 30) and positive.dtype == torch.bool
    for i in range(3):
        places = set()
        for v in range(30):
            y, x = crops[i, v, 1, 0, 0].item(), crops[i, v, 2, 0, 0].item()
            places.add((y, x))
            assert torch.equal(crops[i, v], coordinates(3, 40)[i, :, y : y + 9, x : x + 9])
            assert regions[i, y + 4, x + 4] <= 1, "centred on background or uncertain pixels"
            assert positive[i, v] == (regions[i, y : y + 9, x : x + 9].sum().item() / 81 > 0.2)
        assert len(places) == 30
    assert positive[:2].any() and not positive[:2].all() and not positive[2].any()


@pytest.mark.parametrize("free", [7, 8])
def test_fewer_than_eight_free_places_means_anywhere(free):
    regions = torch.full((1, 32, 32), 2)
    regions[0, 10, 8 : 8 + free] = 0
    crops, positive = local_views(coordinates(1, 32), regions, 8, 5, 0.2, generator())
    centres = {(crops[0, v, 1, 2, 2].item(), crops[0, v, 2, 2, 2].item()) for v in range(8)}
    assert (centres == {(10, 8 + k) for k in range(8)}) == (free == 8)
    assert positive.all()


def test_crops_depend_on_the_generator_only():
    regions = torch.zeros(1, 32, 32, dtype=torch.long)
    first, second, other = (
        local_views(coordinates(1, 32), regions, 4, 8, 0.2, generator(s))[0] for s in (3, 3, 4)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_a_crop_larger_than_the_image_is_an_error():
    with pytest.raises(UserError, match="local_size"):
        local_views(coordinates(1, 32), torch.zeros(1, 32, 32, dtype=torch.long), 8, 33, 0.2, generator())


def test_a_crop_may_be_the_whole_image():
    source, regions = coordinates(2, 8), torch.zeros(2, 8, 8, dtype=torch.long)
    crops, positive = local_views(source, regions, 1, 8, 0.2, generator())
    assert torch.equal(crops[:, 0], source) and positive.shape == (2, 1)


def test_two_global_views_teach_all_views(tiny, step_of, monkeypatch):
    """The first is the training crop; the student projects every view, the teacher the global ones."""
    trainer, make = step_of(tiny("toco"))
    (part,) = [part for part in trainer.objectives if isinstance(part, ClassTokenContrast)]
    seen = []
    monkeypatch.setattr(toco, "class_token_contrast", lambda *given: seen.append(given) or given[0].sum())
    step = make()
    part(step)
    ((student, target, positive, temperature),) = seen
    assert student.shape[:2] == (2, 2 + 3) and target.shape[:2] == (2, 2) and positive.shape == (2, 5)
    assert positive.dtype == torch.bool and positive[:, :2].all() and temperature == 0.5
    crop = step.output.cls
    torch.testing.assert_close(student[:, 0], part.student(crop))
    torch.testing.assert_close(target[:, 0], part.teacher(crop))
    second = step.network(step.batch.global2, segment=False).cls
    torch.testing.assert_close(target[:, 1], part.teacher(second))
    assert student.requires_grad and not target.requires_grad


def test_the_teacher_of_the_contrast_follows_the_student(tiny, trainer_for):
    trainer, _ = trainer_for(tiny("toco", **{"contrast.momentum": 0.75}))
    (part,) = [part for part in trainer.objectives if isinstance(part, ClassTokenContrast)]
    before = [p.clone() for p in part.teacher.module.parameters()]
    with torch.no_grad():
        for p in part.student.parameters():
            p.add_(4)
    part.after_step(trainer.network, 0.5)
    for old, new in zip(before, part.teacher.module.parameters(), strict=True):
        torch.testing.assert_close(new, old + 1)  # 0.75 · old + 0.25 · (old + 4)
