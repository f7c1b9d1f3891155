"""Teaching helpers: what a reader may type, what is escaped, and where the landmarks lie."""

import html
import importlib
import json
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from ssepa_lib.errors import UserError
from ssepa_lib.labels.cam import cam_to_label
from ssepa_lib.model import HAAF, PatchAffinity
from ssepa_lib.paths import NOTEBOOKS
from ssepa_lib.workbook import contents, lesson
from ssepa_lib.workbook.report_page import linked
from ssepa_lib.workbook.terms import EQUATIONS, GLOSSARY


def words(shown):
    return re.sub(r"<style.*?</style>|<[^>]+>", "", shown.data, flags=re.S)


def test_source_shows_the_code_without_docstring_and_where_it_lies():
    shown = words(lesson.source(HAAF))
    assert "ssepa_lib/model/affinity.py, line" in shown and "HAAF," in shown
    assert "self.mlp(x).softmax(1)" in shown and "Head-average attention fusion" not in shown
    assert "index + 1" in words(lesson.source(cam_to_label))
    assert "_resolve" in words(lesson.source(PatchAffinity.weights)), "a property"


def test_source_refuses_what_is_long_or_not_ours():
    with pytest.raises(UserError, match="PatchAffinity has .* lines; show one method"):
        lesson.source(PatchAffinity)
    for other in (torch.softmax, torch.nn.Linear, 3):
        with pytest.raises(UserError, match="not written in this library"):
            lesson.source(other)


@pytest.mark.parametrize(
    "guess, begins",
    [
        (None, "You have not guessed yet. The answer is B. Because 3 &gt; 2."),
        ("b", "Right, it is B."),
        (" C ", "You guessed C; it is B."),
        (2, "Your guess is 2; write one letter"),
        (["B"], "Your guess is [&#x27;B&#x27;]; write one letter"),
        ("", "Your guess is &#x27;&#x27;; write one letter"),
    ],
)
def test_reveal_answers_whatever_is_typed(guess, begins):
    assert words(lesson.reveal(guess, "B", "Because 3 > 2.")).startswith(begins)


def test_without_masks_there_is_no_answer():
    assert words(lesson.reveal("A", None)) == lesson.NO_MASKS


def test_the_machine_is_described():
    shown = words(lesson.check_machine("cpu"))
    assert "torch" in shown and torch.__version__.split("+")[0] in shown and "dense CRF" in shown
    assert words(lesson.seen("a < b")) == "a &lt; b"


def test_mark_says_how_far_it_is():
    assert words(lesson.mark(31.5, 40, " %")) == "Your value is 31.5 %, the target 40 %: 8.5 % to go."
    assert words(lesson.mark(torch.tensor(41.0), 40)).endswith("reached.")
    assert words(lesson.mark(0.2, 0.3, lower=True)).endswith("reached.")
    assert words(lesson.mark(5, 3, lower=True)).endswith("2 to go.")
    for wrong in (None, "forty", [40], torch.zeros(2), float("nan"), True):
        assert words(lesson.mark(wrong, 40)).startswith("The exercise expects one number, but got ")


def test_everything_from_outside_is_text():
    name = "<script>alert(1)</script>"
    for shown in (lesson.reveal("A", "A", name), lesson.reveal(name, "A"), lesson.mark(name, 1)):
        assert "<script" not in shown.data
    with pytest.raises(UserError, match="has no '<script>"):
        lesson.glossary(name)


def test_landmarks_with_parts_with_a_mask_and_without():
    parts = torch.zeros(40, 60, dtype=torch.uint8)  # a grid of 4 × 6 patches of 10 pixels
    parts[10:20, 10:50] = 2
    parts[10:20, 10:20] = 1
    cam = torch.zeros(4, 6)
    cam[1, 2], cam[0, 5] = 1, 2
    assert lesson.landmarks(cam, parts=parts) == {"Head": 7, "Body": 10, "Ground": 13}
    by_mask = lesson.landmarks(cam, mask=(parts > 0) * 5)
    assert by_mask == {"Head": 8, "Body": 10, "Ground": 13}
    alone = lesson.landmarks(cam)
    assert alone["Head"] == 5 and cam.flatten()[alone["Ground"]] == 0


def test_parts_of_patches_and_shares_in_words():
    parts = torch.zeros(4, 6, dtype=torch.uint8)
    parts[:2, :2], parts[2:, :2], parts[0, 2] = 1, 2, 2
    assert lesson.patch_parts(parts, (2, 3)) == ["head", "ground", "ground", "body", "ground", "ground"]
    assert lesson.patch_parts(None, (1, 2)) == ["unknown", "unknown"]
    values = torch.tensor([[2.0, 0, 1], [1, 0, 0]])
    assert lesson.part_shares(values, parts) == "head 50 %, body 25 %, ground 25 %"
    assert "zero everywhere" in lesson.part_shares(0 * values, parts)
    assert "no masks" in lesson.part_shares(values, None)
    whole = 2 * (parts > 0)
    cam = torch.tensor([[0.0, 0, 9], [1, 0, 0]])
    assert lesson.landmarks(cam, parts=whole)["Head"] == 3, "without a head: the peak inside the object"


def test_landmarks_of_a_constant_map_are_patches():
    found = lesson.landmarks(torch.ones(3, 3))
    assert all(0 <= patch < 9 for patch in found.values())


def test_glossary_and_equations():
    assert words(lesson.glossary("CAM", "PAR")).startswith("Glossary: 2 words")
    assert f"{len(GLOSSARY)} words" in lesson.glossary().data
    with pytest.raises(UserError, match="did you mean entropy"):
        lesson.glossary("entropie")
    assert "PA × CAM" in words(lesson.equations("5")) and "soft margin" in words(lesson.equations())
    with pytest.raises(UserError, match="no equation '9'"):
        lesson.equations("9")


def test_every_equation_names_functions_that_exist():
    for equation in EQUATIONS.values():
        for name in equation.functions:
            module, _, rest = name.partition(".")
            parts, found = rest.split("."), importlib.import_module(f"ssepa_lib.{module}")
            for part in parts:
                try:
                    found = getattr(found, part)
                except AttributeError:
                    found = importlib.import_module(f"{found.__name__}.{part}")
            assert callable(found) or isinstance(found, property), name


def test_every_word_is_one_sentence_and_every_place_is_a_section():
    assert all(term.meaning.endswith(".") and term.meaning.count(". ") == 0 for term in GLOSSARY.values())
    for entry in [*GLOSSARY.values(), *EQUATIONS.values()]:
        assert contents.places(entry.place) and set(contents.places(entry.place)) <= set(contents.addresses())


def test_links_lead_to_sections():
    assert contents.places("02 §3, §4; 06 and 07 §1") == ["02 §3", "02 §4", "06", "07 §1"]
    shown = contents.links("02 §2, 99 §1, 03")
    assert shown.startswith('<a href="02_method.ipynb#2-Attention-is-a-kernel-(Eq.-4)">02 §2</a>, ')
    assert shown.endswith(', <a href="03_training.ipynb">03</a>')
    assert contents.links("09 §1") == "09 §1"
    for page in (lesson.glossary().data, lesson.equations().data, lesson.words_page()):
        for stem, mark in re.findall(r'href="(\w+)\.ipynb#?([^"]*)"', page):
            titles = contents.headings(NOTEBOOKS / f"{stem}.ipynb")
            assert not mark or html.unescape(mark) in [contents.anchor(title) for title in titles]
    in_report = linked(lesson.words_page(), ["02_method.html"])
    assert 'href="02_method.html#2-Attention' in in_report and "01_data" not in in_report


def named(key, equation):
    """What a reader must find in the text where an equation is built."""
    paper, _, rest = equation.where.partition(" ")
    numbers = re.findall(r"\d", rest) if paper == "SS-EPA" else []
    kind = "Eq." if "Eq." in rest else "Figures?"
    if paper == "this":
        return [key]
    return [rf"{kind}( \d,?| to| and)* {n}\b" for n in numbers] or [paper]


@pytest.mark.parametrize("key", EQUATIONS)
def test_every_equation_is_named_where_it_is_built(key):
    equation = EQUATIONS[key]
    for number in {place[:2] for place in contents.places(equation.place)}:
        cells = json.loads(next(NOTEBOOKS.glob(f"{number}_*.ipynb")).read_text())["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
        text = re.sub(r"(\d) to (\d)", lambda m: " ".join(map(str, range(int(m[1]), int(m[2]) + 1))), text)
        for word in named(key, equation):
            assert re.search(word, text, re.I), f"{number} does not name {word}"


def test_two_worlds_share_a_scale():
    live = pd.Series({"uniform": 20.0, "HAAF": 15.0}, name="built-in, 60 steps")
    axes = lesson.two_worlds(live, pd.Series({"uniform": 33.0, "HAAF": 36.0}, name="photographs"))
    assert axes["live"].get_xlim() == axes["committed"].get_xlim()
    assert axes["live"].get_title(loc="left") == "built-in, 60 steps"
    assert [bar.get_width() for bar in axes["committed"].patches] == [33, 36]
    plt.close("all")
