import itertools

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch

from ssepa_lib.compose import load_recipe
from ssepa_lib.data import build_dataset
from ssepa_lib.errors import UserError
from ssepa_lib.labels import build_refiner
from ssepa_lib.model import build_network
from ssepa_lib.workbook import diagrams, figures
from ssepa_lib.workbook.diagrams import Shapes

DIAGRAMS = ("pipeline", "affinity_extraction", "haaf", "self_reinforcement", "memory")
PRESETS = {  # recipe → shapes of its network
    "shapes/ssepa": Shapes(96, 8, 6, 96, 6, 3, 1, load_recipe("shapes/ssepa")),
    "shapes/fsr": Shapes(96, 8, 6, 96, 6, 3, 0, load_recipe("shapes/fsr")),
    "voc_mini/ssepa_plus": Shapes(224, 16, 20, 192, 12, 3, 1, load_recipe("voc_mini/ssepa_plus")),
    "voc/toco": Shapes(448, 16, 20, 768, 12, 12, 1, load_recipe("voc/toco")),
    "voc/ssepa": Shapes(448, 16, 20, 768, 12, 12, 1, load_recipe("voc/ssepa")),
}


@pytest.fixture(autouse=True)
def _style():
    figures.use_style()
    yield
    plt.close("all")


def words(ax):
    return [text.get_text() for text in ax.texts]


def overlaps(ax):
    """Pairs of texts of which one lies on the other, and texts that leave the axes."""
    renderer = ax.figure.canvas.get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in ax.texts]
    frame = ax.get_window_extent(renderer).padded(1)
    found = [(a, b) for (a, at), (b, to) in itertools.combinations(boxes, 2) if at.padded(-0.5).overlaps(to)]
    corners = [(name, [(box.x0, box.y0), (box.x1, box.y1)]) for name, box in boxes]
    return found + [name for name, ends in corners if not all(frame.contains(*end) for end in ends)]


@pytest.mark.parametrize("name", DIAGRAMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_diagram_draws_for_every_preset_and_no_words_overlap(name, preset):
    ax = getattr(diagrams, name)(PRESETS[preset])
    assert ax.texts and overlaps(ax) == []


@pytest.mark.parametrize(
    "name, expected",
    [
        ("pipeline", {"[784, 768]", "[20, 448, 448]", "144 maps\n[785, 785]", "scores [20]"}),
        ("affinity_extraction", {"[12, 785, 64]", "[12, 785, 785]", "12 maps of layer k"}),
        ("haaf", {"v [12]", "v′ [12]", "12 maps\n[784, 784]"}),
        ("self_reinforcement", {"hidden patches [320, E]", "[784, E]", "softmax at temperature 0.1"}),
        ("memory", {"355 MB", "29.6 MB", "2.41 MB"}),  # 4·144·785², 4·12·785², 4·785·768 bytes
    ],
)
def test_the_letters_are_replaced_by_the_numbers_of_the_run(name, expected):
    """785 = 1 + 28² tokens; 20 of 7² blocks of 16 patches are masked (0.4 · 49, rounded up)."""
    assert expected <= set(words(getattr(diagrams, name)(PRESETS["voc/ssepa"])))


def look(ax):
    """What each box looks like, by its name."""
    kept = {}
    for patch in ax.patches:
        if patch.get_gid():
            kept[patch.get_gid()] = (
                patch.get_linewidth(),
                bool(patch.get_path_effects()),
                patch.get_facecolor(),
            )
    return kept


@pytest.mark.parametrize(
    "name, box",
    [
        ("pipeline", "cam"),
        ("affinity_extraction", "heads"),
        ("haaf", "mlp"),
        ("self_reinforcement", "unc"),
        ("memory", "stack_layers"),
    ],
)
def test_highlight_changes_exactly_one_box(name, box):
    draw, shapes = getattr(diagrams, name), PRESETS["shapes/ssepa"]
    plain, lit = look(draw(shapes)), look(draw(shapes, highlight=box))
    assert [key for key in plain if plain[key] != lit[key]] == [box]
    with pytest.raises(UserError, match="no box 'nothing'.*choose one of"):
        draw(shapes, highlight="nothing")


def test_the_strip_lights_one_box_and_no_words_overlap():
    ax = diagrams.you_are_here("affinity")
    assert overlaps(ax) == [] and [key for key, (_, halo, _) in look(ax).items() if halo] == ["affinity"]
    with pytest.raises(UserError, match="no box"):
        diagrams.you_are_here("mask")


def test_the_method_decides_what_the_pipeline_shows():
    boxes = {preset: set(look(diagrams.pipeline(shapes))) for preset, shapes in PRESETS.items()}
    assert "haaf" in boxes["voc/ssepa"] and "haaf_loss" in boxes["voc/ssepa"]
    assert not {"attention", "haaf", "affinity", "refined"} & boxes["voc/toco"]
    assert (
        "teacher" in boxes["shapes/fsr"]
        and "crops" in boxes["voc/toco"]
        and "crops" not in boxes["shapes/fsr"]
    )


def test_shapes_of_a_network_and_its_recipe(tiny):
    recipe = tiny("ssepa")
    network = build_network(recipe, build_dataset(recipe.data, "train").classes)
    shapes = Shapes.of(network, recipe)
    assert (shapes.side, shapes.grid, shapes.patches, shapes.tokens) == (32, 4, 16, 17)
    assert (shapes.width, shapes.layers, shapes.heads, shapes.head_width, shapes.classes) == (32, 4, 2, 16, 6)
    assert Shapes.of(network).side == 32 and Shapes.of(network).recipe.affinity.kind == "haaf"
    image = torch.randint(0, 256, (1, 3, 32, 32)).float()
    with torch.no_grad():
        output = network.eval()(image, capture=True)
    affinity = build_refiner(recipe.affinity, network).affinity(output.attention)
    given = {"image": image[0], "affinity": affinity, "landmarks": {"Head": 1, "Body": 6, "Ground": 15}}
    ax = diagrams.affinity_extraction(network, images=given)
    assert len(ax.images) == 6  # a head, the head mean, the affinity, three rows
    row = ax.images[3].get_array()
    assert torch.allclose(torch.as_tensor(row.data).flatten(), affinity.row(1)[0]) and "Body" in words(ax)
    assert overlaps(ax) == [] and overlaps(diagrams.haaf(network, images=given)) == []


def test_masked_patches_are_drawn_where_they_are():
    hidden = torch.zeros(144, dtype=torch.bool)
    hidden[:24] = True
    view = torch.zeros(3, 96, 96)
    ax = diagrams.self_reinforcement(
        PRESETS["shapes/fsr"], images={"view1": view, "view2": view, "mask": hidden}
    )
    assert len(ax.images) == 4 and "hidden patches [24, E]" in words(ax)
    grey = [patch for patch in ax.patches if patch.get_facecolor()[:3] == (0.55,) * 3 and not patch.get_gid()]
    assert len(grey) == 24


def test_notes_stand_at_their_boxes():
    assert {"02", "04"} <= set(
        words(diagrams.pipeline(PRESETS["shapes/ssepa"], notes={"cam": "02", "haaf": "04"}))
    )
