"""Explorers: what Python sends, what the JavaScript makes of it, and what the frozen page contains."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from py_mini_racer import MiniRacer

from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.attention import attention_entropy
from ssepa_lib.labels.cam import cam_to_label, normalise_cam
from ssepa_lib.methods.blocks import uniform
from ssepa_lib.methods.fsr import edge_strength, mask_blocks
from ssepa_lib.model import Attention, LayerWeights, PatchAffinity
from ssepa_lib.recipe import ReinforceConfig
from ssepa_lib.workbook import explorers
from ssepa_lib.workbook.explorer_host import LIMIT, MODULE, pack
from ssepa_lib.workbook.studies.memory_study import STRATEGIES, largest_side, step_bytes

GRID, LAYERS, SIDE = (4, 4), 3, 32


@pytest.fixture(scope="module")
def script():
    """Calls a function of the module: `script("iou", labels, mask)`."""
    source = re.sub(r"^export (default .*$|)", "", MODULE.read_text(), flags=re.M)
    engine = MiniRacer()
    engine.eval("const matrix = (codes, scales, top) => ({codes, scales, top, n: scales.length});" + source)

    def call(name, *arguments):
        given = ", ".join(a if isinstance(a, str) else json.dumps(np.asarray(a).tolist()) for a in arguments)
        return json.loads(engine.eval(f"JSON.stringify({name}({given}), (k, x) => x?.buffer ? [...x] : x)"))

    yield call
    engine.close()


def affinity(batch=1, **options):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 2, 1 + GRID[0] * GRID[1], 8)
    q, k = ([3 * torch.randn(shape, generator=generator) for _ in range(LAYERS)] for _ in range(2))
    return PatchAffinity(Attention(q, k, 1, GRID), **options)


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8)


@pytest.fixture
def mask():
    ids = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    ids[8:24, 8:24], ids[0, 0] = 2, 255
    return ids


def unpacked(view, name):
    place = view.spec["parts"][name]
    kind = {"f4": np.float32, "u2": np.uint16, "u1": np.uint8}[place["type"]]
    return np.frombuffer(view.blob, kind, place["count"], place["at"])


def matrices(view):
    """Argument `matrix(codes, scales, top)` for every map that an explorer sends."""
    n = GRID[0] * GRID[1]
    codes, scales = unpacked(view, "codes").reshape(-1, n * n), unpacked(view, "scales").reshape(-1, n)
    pairs = zip(codes.tolist(), scales.tolist(), strict=True)
    return [f"matrix({c}, {s}, 255)" for c, s in pairs]


def test_the_microscope_shows_the_rows_and_columns_of_the_affinity(script, image, mask):
    weights = torch.tensor([2.0, 1.0, 0.0])
    a = affinity(weigh=LayerWeights(weights))
    view = explorers.microscope(image, a, mask=mask, start=5)
    sent = matrices(view)
    assert view.spec["layers"] == [None, 0, 1, 2] and view.patch == 5 and view.layer is None
    for layer, matrix in enumerate(sent):
        exact = a.layer_map(layer)[0].mean(0)[1:, 1:]
        for patch in (0, 5, 15):
            assert np.allclose(script("row", matrix, patch), exact[patch], atol=2e-3 * exact.max())
            assert np.allclose(script("column", matrix, patch), exact[:, patch], atol=2e-3 * exact.max())
    rows = [script("row", matrix, 5) for matrix in sent]
    mean = script("mix", rows, view.spec["weights"])
    assert np.allclose(mean, a.row(5)[0], atol=2e-3 * float(a.dense().max()))
    cam = torch.rand(16)
    found = script("propagate", sent[1], cam)
    assert np.allclose(found, a.layer_map(1)[0].mean(0)[1:, 1:] @ cam, atol=4e-3)


def test_the_numbers_about_a_row_are_exact(image, mask):
    a = affinity()
    view = explorers.microscope(image, a, mask=mask)
    row = a.row(5)[0]
    share = row / row.sum()
    assert unpacked(view, "own")[5] == pytest.approx(float(share[[5, 6, 9, 10]].sum()), abs=1e-5)
    assert unpacked(view, "received")[5] == pytest.approx(float(row.sum()), abs=1e-5)
    assert unpacked(view, "given")[5] == pytest.approx(float(a.dense()[0, :, 5].sum()), abs=1e-5)
    assert np.exp(unpacked(view, "entropy")[5]) < 16
    assert unpacked(view, "object").tolist() == [2 * (i in (5, 6, 9, 10)) for i in range(16)]


def test_a_balanced_affinity_is_sent_as_it_is(script, image):
    a = affinity(balance=True)
    view = explorers.microscope(image, a)
    assert view.spec["weights"] is None and view.spec["layers"] == [None, 0, 1, 2]
    assert np.allclose(script("row", matrices(view)[0], 3), a.row(3)[0], atol=2e-3 * float(a.dense().max()))


def test_the_mixer_scores_as_the_library_does(script, image, mask):
    a, cam = affinity(weigh=LayerWeights(torch.tensor([0.5, 2.0, 0.5]))), torch.rand(1, 16, 1)
    view = explorers.mixer([image], a.per_layer(cam)[..., 0], [mask], presets={"own": [0.5, 2, 0.5]})
    products = unpacked(view, "products").reshape(3, 16)
    assert view.weights == [1, 1, 1] and view.spec["presets"]["own"] == [0.5, 2, 0.5]
    mixed = script("mix", products, [0.5, 2, 0.5])
    assert np.allclose(mixed, (a @ cam)[0, :, 0], atol=1e-6)
    full = F.interpolate((a @ cam)[0, :, 0].view(1, 1, *GRID), (SIDE, SIDE), mode="bilinear")
    exact = normalise_cam(full)
    values = script("normalise", script("resize", mixed, GRID, (SIDE, SIDE)))
    assert np.allclose(values, exact.flatten(), atol=1e-4)
    labels = script("threshold", [values], 0.5)
    assert np.mean(labels == cam_to_label(exact, 0.5).flatten().numpy()) > 0.999
    target = unpacked(view, "masks")
    counted = (mask != 255).flatten().numpy()
    guess, truth = (exact > 0.5).flatten().numpy() & counted, (mask == 2).flatten().numpy()
    assert script("iou", labels, target) == pytest.approx(
        (guess & truth).sum() / (guess | truth).sum(), abs=1e-3
    )
    curve = [
        ((g := (exact.flatten().numpy() > t / 100) & counted) & truth).sum() / (g | truth).sum()
        for t in range(1, 100)
    ]
    assert script("bestThreshold", values, target)[0] == pytest.approx(max(curve), abs=5e-3)


def test_two_thresholds_leave_a_band_of_doubt(script):
    maps = [[0.9, 0.2, 0.5, 0.4], [0.1, 0.8, 0.2, 0.3]]
    assert script("threshold", maps, 0.7, 0.4) == [1, 2, 255, 0]
    assert script("threshold", maps, 0.5) == [1, 2, 0, 0]
    assert script("iou", [1, 1, 0, 1], [1, 0, 1, 255]) == pytest.approx(1 / 3)
    assert script("iou", [0, 0], [0, 0]) is None


def test_a_frozen_page_needs_no_network_and_runs_no_foreign_script(image, mask):
    name = "<script>alert(1)</script>"
    view = explorers.mixer([image], torch.rand(1, 3, 16), [mask], presets={name: [1, 0, 0]})
    page = view.page()
    assert "http" not in page and name not in page and page.count("<script") == 3
    assert json.loads(re.search(r'id="state">(.*?)</script>', page)[1])["spec"]["presets"][name] == [1, 0, 0]
    assert "<script" not in view.frozen() and view.payload < 30_000


def test_too_much_data_is_said_and_not_frozen(image):
    view = explorers.microscope(image, affinity())
    view.blob = bytes(LIMIT)
    assert "running notebook only" in view.frozen() and "iframe" not in view.frozen()


def test_what_is_sent_keeps_its_type_and_order():
    places, blob = pack({"a": np.array([1, 2], np.uint8), "b": np.array([1.5], np.float32)})
    assert places == {"a": {"at": 0, "count": 2, "type": "u1"}, "b": {"at": 2, "count": 1, "type": "f4"}}
    assert blob[:2] == b"\x01\x02" and np.frombuffer(blob[2:], "<f4") == 1.5


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"affinity": affinity(batch=2)}, "belongs to 2 images"),
        ({"start": 16}, "patch 16 does not exist; choose 0..15"),
        ({"start": -1}, "patch -1 does not exist"),
        ({"names": {99: "Head"}}, "patch 99 does not exist"),
        ({"cam": torch.rand(15)}, "one value per cell of [4, 4]"),
        ({"mask": torch.zeros(8, 8)}, "its image is"),
        ({"image": torch.rand(2, 3, 8, 8)}, "one image"),
        ({"affinity": torch.rand(16, 16)}, "give a PatchAffinity"),
        ({"affinity": affinity(kind="logits")}, "negative"),
    ],
)
def test_bad_arguments_of_the_microscope(image, change, sentence):
    arguments = {"image": image, "affinity": affinity()} | change
    with pytest.raises(UserError, match=re.escape(sentence)):
        explorers.microscope(arguments.pop("image"), arguments.pop("affinity"), **arguments)


@pytest.mark.parametrize(
    "products, options, sentence",
    [
        (torch.rand(2, 3, 16), {}, r"must be [n, K, N] with n = 1"),
        (torch.rand(1, 3, 16), {"presets": {"x": [1, 2]}}, "'x' has 2 weights; give 3"),
        (torch.rand(1, 3, 16), {"presets": {"x": [-1, 2, 0]}}, "none negative"),
        (torch.rand(1, 3, 16), {"parts": [torch.full((SIDE, SIDE), 3)]}, "holds the id 3"),
        (torch.rand(1, 3, 16), {"parts": []}, "0 parts for 1 images"),
    ],
)
def test_bad_arguments_of_the_mixer(image, mask, products, options, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        explorers.mixer([image], products, [mask], **options)


def test_a_patch_set_by_hand_must_exist(image):
    view = explorers.microscope(image, affinity())
    view.patch = 15
    with pytest.raises(UserError, match="patch 16"):
        view.patch = 16


def test_propagation_follows_the_affinity_for_sixteen_steps(script, image, mask):
    a, cam = affinity(), torch.rand(16)
    view = explorers.propagation(image, a, cam=cam, mask=mask)
    codes, scales = unpacked(view, "codes"), unpacked(view, "scales")
    map_ = cam.tolist()
    for _ in range(16):
        map_ = script("propagate", f"matrix({codes.tolist()}, {scales.tolist()}, 65535)", map_)
        cam = a.dense()[0] @ cam
    assert np.allclose(map_, cam, atol=2e-3 * float(cam.max()))
    assert unpacked(view, "mask").max() == 255 and view.spec["size"] == (SIDE, SIDE)


@pytest.mark.parametrize("selection", ["random", "loose", "strict", "edge"])
def test_the_same_blocks_are_hidden_as_in_training(script, selection):
    config = ReinforceConfig(mask_block=2, mask_ratio=0.4, selection=selection, random_until=0)
    activation, image = torch.rand(1, 12, 12), torch.rand(1, 3, 48, 48) * 255
    order = uniform(1, (36,), torch.Generator().manual_seed(3))
    exact = mask_blocks(activation, image, (12, 12), config, 1.0, torch.Generator().manual_seed(3))
    blocks = F.interpolate(activation[None], (6, 6), mode="nearest").flatten()
    edges = edge_strength(image, (12, 12), 2).flatten()
    given = {"activation": blocks, "edges": edges, "order": order.flatten()}
    given = json.dumps({name: values.tolist() for name, values in given.items()})
    found = script("hidden", given, 0.4, json.dumps(selection), *config.uncertain)["blocks"]
    assert found == exact.view(12, 12)[::2, ::2].flatten().tolist()


def test_maps_are_sent_as_codes_of_the_whole_range(image, mask):
    cam = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    view = explorers.thresholds(image, cam, refined=torch.rand(8, 8), mask=mask, classes=["newt"])
    sent = unpacked(view, "maps").reshape(2, SIDE, SIDE)
    exact = F.interpolate(cam[None, None], (SIDE, SIDE), mode="bilinear")[0, 0]
    assert np.abs(sent[0] / 255 - exact.numpy()).max() <= 0.5 / 255 + 1e-6
    assert view.spec["kinds"] == ["CAM", "refined"] and view.thresholds == [0.7, 0.25]
    assert set(unpacked(view, "mask")) == {0, 1, 255}


def snapshot(step, **maps):
    label = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    return {"step": step, "cam": torch.rand(4, 4), "pseudo_label": label} | maps


def test_the_timeline_carries_its_losses(image):
    history = pd.DataFrame({"step": [1, 2, 3], "lr": 1.0, "seconds": 1.0, "cls": [3.0, 2.0, 1.0]})
    view = explorers.timeline(image, [snapshot(0), snapshot(3)], history.assign(seg=[None, 1.0, 0.5]))
    assert view.spec["history"] == {"step": [1, 2, 3], "terms": {"cls": [3, 2, 1], "seg": [None, 1, 0.5]}}
    assert view.spec["steps"] == [0, 3] and view.step == 1
    assert [m["labels"] for m in view.spec["maps"].values()] == [False, True]
    json.dumps(view.spec, allow_nan=False)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda i: explorers.thresholds(i, torch.full((4, 4), 2.0)), "values in 0..1"),
        (lambda i: explorers.thresholds(i, torch.rand(2, 4, 4), classes=["a"]), "1 class names for 2 maps"),
        (lambda i: explorers.propagation(i, affinity(), cam=torch.rand(3)), "value per cell of [4, 4]"),
        (lambda i: explorers.timeline(i, [], pd.DataFrame({"step": []})), "every snapshot needs a step"),
        (lambda i: explorers.timeline(i, [snapshot(0, cam=torch.rand(2, 2)), snapshot(1)], None), "shape"),
        (lambda i: explorers.masks(i, torch.rand(4), torch.rand(4), torch.rand(4)), "activation is flat"),
        (lambda i: explorers.masks(i, torch.rand(2, 2), torch.rand(9), torch.rand(4)), "edges has the shape"),
    ],
)
def test_bad_arguments_of_the_others(image, call, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        call(image)


def test_one_view_can_take_over_another(image, mask):
    view, other = (
        explorers.microscope(image, affinity()),
        explorers.propagation(image, affinity(), cam=torch.rand(16)),
    )
    view.show(other)
    assert view.spec["kind"] == "propagation" and view.blob == other.blob and view.step == 1


@pytest.mark.parametrize("value", [2, 4])
def test_the_memory_explorer_counts_as_the_library_does(script, value):
    sizes = {"batch": 3, "layers": 5, "heads": 4, "width": 96, "patch": 8, "prefix": 1, "value": value}
    sizes |= {"scale": 1.5, "flip": True}
    found = script("stepBytes", json.dumps({"side": 104} | sizes))
    for strategy in STRATEGIES:
        exact = step_bytes(104, strategy, **sizes)
        assert found["kept"] == exact["kept"] and found["maps"][strategy] == exact["maps"]
        largest = script("largestSide", json.dumps(sizes), json.dumps(strategy), 3e8)
        assert largest == largest_side(strategy, 3e8, **sizes)


def test_the_memory_explorer_starts_where_it_is_told():
    view = explorers.memory(side=224, budget=8)
    assert view.spec["sliders"]["side"] == ["image side, pixels", [16, 1536, 16], 224]
    assert view.spec["sliders"]["budget"][2] == 8 and "http" not in view.page()
    with pytest.raises(UserError, match="patch is 0"):
        explorers.memory(patch=0)


def test_every_head_is_sent_with_its_numbers(script, image, mask):
    attention = affinity().attention
    view = explorers.heads(image, attention, mask=mask, start=5, names={5: "Body"})
    maps, sent = [attention.layer_map(k)[0] for k in range(LAYERS)], matrices(view)
    assert len(sent) == LAYERS * 2 and (view.layer, view.head, view.patch) == (2, 0, 5)
    exact = maps[1][1, 6, 1:]  # layer 1, head 1, patch 5
    assert np.allclose(script("row", sent[3], 5), exact, atol=2e-3 * float(exact.max()))
    entropies = [attention_entropy(m).mean(-1) for m in maps]
    assert np.allclose(unpacked(view, "entropy"), np.concatenate(entropies), atol=1e-5)
    share = exact / exact.sum()
    assert unpacked(view, "own")[3 * 16 + 5] == pytest.approx(float(share[[5, 6, 9, 10]].sum()), abs=1e-5)
    with pytest.raises(UserError, match="several images"):
        explorers.heads(image, affinity(batch=2).attention)


def test_a_menu_changes_what_is_shown(image):
    panel = explorers.chooser(
        lambda start: explorers.microscope(image, affinity(), start=start), start=[3, 7]
    )
    assert panel.view.patch == 3 and panel.chosen == {"start": 3}
    panel.menus["start"].value = 7
    assert panel.view.patch == 7
    with pytest.raises(UserError, match="nothing to choose from for 'image'"):
        explorers.chooser(None, image=[])
