"""Views lie where they say, depend on (seed, position) alone, and reach every process once."""

from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image

from ssepa_lib.data import Batch, SegmentationDataset, eval_batches, train_loader
from ssepa_lib.data.shapes import ShapesDataset
from ssepa_lib.data.views import TrainViews, collate
from ssepa_lib.errors import UserError


class Ramp(SegmentationDataset):
    """Images whose red is the column + 1 and whose green is the row + 1: a crop tells where it was cut."""

    def __init__(self, width=50, height=40, images=5):
        super().__init__("train", ["one", "two"], [f"r{i}" for i in range(images)])
        self.width, self.height = width, height

    def image(self, i):
        pixels = np.zeros((self.height, self.width, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = np.arange(self.width) + 1, np.arange(self.height)[:, None] + 1
        return Image.fromarray(pixels)

    def mask(self, i):
        return torch.full((self.height, self.width), i, dtype=torch.uint8)

    def label(self, i):
        return torch.tensor([1.0, i % 2])


class Broken(Ramp):
    def image(self, i):
        raise UserError("r.jpg: unreadable image; replace the file.")


def plain(views):
    """Without colour changes, so that positions can be read from the pixels."""
    views.crop_colour = views.local_colour = views.fsr_colour = lambda image: image
    return views


def same(a: Batch, b: Batch) -> bool:
    return a.id == b.id and all(
        torch.equal(getattr(a, k), getattr(b, k))
        for k in ("image", "box", "label", "global2", "local_canvas")
    )


@pytest.mark.parametrize("width", [20, 50])
def test_crop_is_a_part_of_the_image_on_black(tiny, width):
    recipe = tiny(**{"data.scale": [1.0, 1.0], "train.steps": 20})
    places, flipped = set(), set()
    for position in range(20):
        item = plain(TrainViews(Ramp(width), recipe))[position]
        y0, y1, x0, x1 = item.box.tolist()
        assert (y1 - y0, x1 - x0) == (32, min(width, 32)) and 0 <= x0 <= x1 <= 32
        inside = item.image[:, y0:y1, x0:x1].int()
        assert item.image.int().sum() == inside.sum()  # black outside
        step = inside[0, 0].diff().unique().tolist()
        assert step in ([1], [-1]) and (inside[1].diff(dim=0) == 1).all()
        places.add((x0, int(inside[0].min()), int(inside[1].min())))
        flipped.add(step[0])
    assert len(places) > 10 and flipped == {1, -1}


def test_scale_spans_its_range_and_box_follows(tiny):
    recipe = tiny(**{"data.scale": [0.5, 2.0], "train.steps": 200})
    views, widths, slopes = plain(TrainViews(Ramp(24, 24), recipe)), set(), []
    for position in range(200):
        item = views[position]
        y0, y1, x0, x1 = item.box.tolist()
        widths.add(x1 - x0)
        row = item.image[0, (y0 + y1) // 2, x0:x1].float()
        slopes.append(abs(float(row[-3] - row[2])) / (len(row) - 5))  # 1 / scale
    assert min(widths) in (12, 13) and max(widths) == 32
    assert 0.4 < min(slopes) < 0.6 and 1.7 < max(slopes) < 2.3


def test_a_scaled_crop_equals_cropping_the_scaled_image(tiny):
    image = ShapesDataset("train", 1).image(0)
    views = TrainViews(Ramp(), tiny(**{"data.scale": [1.5, 1.5]}))
    scaled = image.resize((round(image.width * 1.5), round(image.height * 1.5)), Image.Resampling.BILINEAR)
    whole = torch.from_numpy(np.array(scaled)).int()
    torch.manual_seed(3)
    crop = torch.from_numpy(np.array(views._scaled_crop(image))).int()
    differences = [
        (whole[y : y + 32, x : x + 32] - c).abs()[1:-1, 1:-1].max()  # at the rim the neighbour is cut off
        for c in (crop, crop.flip(1))
        for y in range(whole.shape[0] - 31)
        for x in range(whole.shape[1] - 31)
    ]
    assert min(differences) <= 1


def test_local_canvas_is_the_crop_under_another_jitter(tiny):
    views = TrainViews(ShapesDataset("train", 4), tiny(**{"train.steps": 20}))
    items = [views[p] for p in range(20)]
    assert any(not torch.equal(item.image, item.local_canvas) for item in items)
    item = plain(views)[3]
    assert torch.equal(item.image, item.local_canvas)


def test_padding_stays_black_under_jitter(tiny):
    views = TrainViews(Ramp(16, 16), tiny(**{"data.scale": [1.0, 1.0], "train.steps": 20}))
    for position in range(20):
        item = views[position]
        outside = torch.ones(32, 32, dtype=torch.bool)
        outside[item.box[0] : item.box[1], item.box[2] : item.box[3]] = False
        assert outside.sum() == 32 * 32 - 16 * 16
        assert item.image[:, outside].sum() == 0 and item.local_canvas[:, outside].sum() == 0


def test_views_that_no_loss_needs_are_not_made(tiny):
    data = ShapesDataset("train", 4)
    item = TrainViews(data, tiny(**{"losses.ctc": 0.0}))[0]
    assert item.global2 is None and item.local_canvas is None and item.view2 is None
    item = TrainViews(data, tiny())[0]
    assert item.global2.shape == item.local_canvas.shape == (3, 32, 32) and item.view2 is None
    item = TrainViews(data, tiny("fsr", **{"losses.unc": 0.0, "losses.cer": 0.0}))[0]
    assert item.view2 is None


def test_terms_leave_the_training_image_alone(tiny):
    data, off = ShapesDataset("train", 4), {"losses.unc": 0.0, "losses.cer": 0.0}
    for views in ("toco", "fsr"):
        with_terms, without = (
            TrainViews(data, tiny("fsr", **{"data.views": views} | terms)) for terms in ({}, off)
        )
        for position in range(4):
            assert torch.equal(with_terms[position].image, without[position].image)
            assert not torch.equal(with_terms[position].image, with_terms[position].view2)


@pytest.mark.parametrize("arm", ["none", "blur", "solarise", "autoaugment"])
def test_fsr_views(tiny, arm):
    recipe = tiny("fsr", **{"reinforce.augmentation": arm, "train.steps": 10})
    views = TrainViews(ShapesDataset("train", 4), recipe)
    items = [views[p] for p in range(20)]
    for item in items:
        assert item.image.shape == item.view2.shape == (3, 32, 32) and item.image.dtype == torch.uint8
        assert item.box.tolist() == [0, 32, 0, 32] and item.global2 is None and item.local_canvas is None
        assert not torch.equal(item.image, item.view2)


def test_fsr_views_cover_the_named_share_of_the_image(tiny):
    settings = {"losses.unc": 0.0, "losses.cer": 0.0, "train.steps": 50}
    shares = {}
    for scale in ([0.32, 0.32], [1.0, 1.0]):
        views = plain(TrainViews(Ramp(60, 60), tiny("fsr", **settings, **{"reinforce.view_scale": scale})))
        spans = [views[p].image.float().amax((1, 2)) - views[p].image.float().amin((1, 2)) for p in range(60)]
        shares[scale[0]] = float(torch.stack([s[0] * s[1] for s in spans]).median()) / 59**2
    assert shares[0.32] == pytest.approx(0.32, abs=0.08) and shares[1.0] > 0.75


def test_views_depend_on_seed_and_position_alone(tiny):
    data = ShapesDataset("train", 4)
    views, other = TrainViews(data, tiny()), TrainViews(data, tiny(**{"train.seed": 1}))
    first = views[5]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = views[5]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.image, again.image) and torch.equal(first.global2, again.global2)
    assert not torch.equal(first.image, views[6].image) and not torch.equal(first.image, other[5].image)


def test_every_epoch_is_another_permutation(tiny):
    views = TrainViews(Ramp(images=7), tiny(**{"train.steps": 14}))
    epochs = [[views.index(p) for p in range(e * 7, e * 7 + 7)] for e in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert views.index(0) == epochs[0][0]  # going back works


def test_a_resumed_loader_continues_with_the_same_batches(tiny):
    recipe, data = tiny(), ShapesDataset("train", 8)
    whole, rest = list(train_loader(data, recipe)), list(train_loader(data, recipe, start_step=4))
    assert len(whole) == 6 and len(rest) == 2
    assert same(whole[4], rest[0]) and same(whole[5], rest[1]) and not same(whole[0], whole[1])


def test_loading_leaves_the_global_generator_alone(tiny):
    state = torch.get_rng_state()
    list(train_loader(ShapesDataset("train", 4), tiny()))
    list(eval_batches(ShapesDataset("val", 2), 32, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_ranks_share_a_batch(tiny):
    recipe, data = tiny(**{"data.batch": 4}), ShapesDataset("train", 8)
    whole = list(train_loader(data, recipe))
    parts = [list(train_loader(data, recipe, rank=r, world=2)) for r in range(2)]
    for batch, left, right in zip(whole, *parts, strict=True):
        assert batch.id == left.id + right.id
        assert torch.equal(batch.image, torch.cat([left.image, right.image]))
    with pytest.raises(UserError, match=r"data\.batch is 4 but there are 3 processes"):
        train_loader(data, recipe, world=3)


def test_worker_processes_change_nothing(tiny):
    data = Ramp()
    alone, helped = train_loader(data, tiny()), train_loader(data, tiny(**{"data.workers": 2}))
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("arm", ["none", "blur", "solarise", "autoaugment"])
def test_views_can_be_sent_to_a_spawned_worker(tiny, arm):
    views = TrainViews(ShapesDataset("train", 4), tiny(**{"reinforce.augmentation": arm}))
    assert ForkingPickler.dumps(views)  # a lambda or local function inside would fail here


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_input_stays_one_sentence(tiny, workers):
    with pytest.raises(UserError) as error:
        list(train_loader(Broken(), tiny(**{"data.workers": workers})))
    assert str(error.value) == "r.jpg: unreadable image; replace the file."


def test_batch_moves_as_a_whole(tiny):
    views = TrainViews(Ramp(), tiny())
    batch = collate([views[0], views[1]])
    assert batch.image.shape == (2, 3, 32, 32) and batch.box.shape == (2, 4) and batch.label.shape == (2, 2)
    moved = batch.to("meta")
    assert moved.id == batch.id and moved.view2 is None
    assert all(getattr(moved, k).is_meta for k in ("image", "box", "label", "global2", "local_canvas"))


@pytest.mark.parametrize(("size", "sizes"), [(16, [2, 2, 1]), (0, [1] * 5)])
def test_eval_batches_keep_order_and_masks(size, sizes):
    batches = list(eval_batches(Ramp(), size, 2))
    assert [len(ids) for ids, *_ in batches] == sizes
    assert sum((ids for ids, *_ in batches), []) == [f"r{i}" for i in range(5)]
    ids, images, labels, masks = batches[1]
    side = (16, 16) if size else (40, 50)
    assert images.shape[1:] == (3, *side) and images.dtype == torch.uint8 and labels.shape == (len(ids), 2)
    assert masks[0].shape == (40, 50) and int(masks[0].max()) == len(batches[0][0])


def test_eval_accepts_images_without_mask():
    class NoMask(Ramp):
        def mask(self, i):
            return None

    *_, masks = next(iter(eval_batches(NoMask(), 16, 2)))
    assert masks == [None, None]
