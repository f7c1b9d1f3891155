import numpy as np
import torch

from ssepa_lib.data import split_of
from ssepa_lib.training import RunFolder, train
from ssepa_lib.workbook import study
from ssepa_lib.workbook.film import Film


def film_of(recipe, folder, frames=3):
    dataset = split_of(recipe, "val", 4)
    shown = study.with_label(dataset, 0, 2)
    images, labels, _ = study.samples(dataset, shown, 32)
    return Film(recipe, folder, images, labels, labels.argmax(1).tolist(), frames)


def test_a_film_shows_the_run_from_start_to_end_and_leaves_it_alone(tiny, tmp_path):
    recipe = tiny("ssepa", **{"train.steps": 4})
    film = film_of(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run", watch=film)
    assert film.steps == [0, 2, 4]
    again = film_of(recipe, tmp_path / "run")
    assert again.steps == [0, 2, 4], "it is read from the run folder"
    first, last = again.maps("cam", 1)[0], again.maps("segmentation", 1)[4]
    assert first.shape == (32, 32) and first.min() >= 0 and first.max() <= 1 and last.dtype == np.uint8
    assert set(again.maps("refined", 0)) == {0, 2, 4}
    train(recipe, tmp_path / "unwatched")
    a, b = (RunFolder(tmp_path / name).load("cpu")[0].state_dict() for name in ("run", "unwatched"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_that_starts_again_starts_its_film_again(tiny, tmp_path):
    recipe = tiny("toco", **{"train.steps": 4})
    film, network = film_of(recipe, tmp_path), None
    from ssepa_lib.model import build_network

    network = build_network(recipe, split_of(recipe, "val", 1).classes).eval()
    for step in (0, 1, 2, 4):
        film(network, step)
    assert film.steps == [0, 2, 4] and film.maps("refined", 0) == {}  # ToCo refines nothing
    film(network, 0)
    assert film.steps == [0] and film_of(recipe, tmp_path).steps == [0]


def test_a_run_without_a_film_has_no_steps(tiny, tmp_path):
    assert film_of(tiny("toco"), tmp_path / "nothing").steps == []
