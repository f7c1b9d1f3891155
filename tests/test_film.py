import numpy as np
import pytest
import torch

from ssepa_lib.data import split_of
from ssepa_lib.evaluation import infer
from ssepa_lib.model import build_network
from ssepa_lib.training import RunFolder, train
from ssepa_lib.workbook import study
from ssepa_lib.workbook.film import Film


def film_of(recipe, folder, frames=3, first=0, side=32):
    dataset = split_of(recipe, "val", 4)
    shown = study.with_label(dataset, first, 2)
    images, labels, _ = study.samples(dataset, shown, side)
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
    film = film_of(recipe, tmp_path)
    network = build_network(recipe, split_of(recipe, "val", 1).classes).eval()
    for step in (0, 1, 2, 4):
        film(network, step)
    assert film.steps == [0, 2, 4] and film.maps("refined", 0) == {}  # ToCo refines nothing
    film(network, 0)
    assert film.steps == [0] and film_of(recipe, tmp_path).steps == [0]


def test_a_run_without_a_film_has_no_steps(tiny, tmp_path):
    assert film_of(tiny("toco"), tmp_path / "nothing").steps == []


@pytest.mark.parametrize("other", [{"first": 1}, {"side": 40}])
def test_a_film_of_other_images_counts_as_none(tiny, tmp_path, other):
    recipe = tiny("toco", **{"train.steps": 4})
    network = build_network(recipe, split_of(recipe, "val", 1).classes).eval()
    film = film_of(recipe, tmp_path)
    for step in (0, 2):
        film(network, step)
    changed = film_of(recipe, tmp_path, **other)
    assert changed.steps == [] and changed.maps("cam", 0) == {}
    assert film_of(recipe, tmp_path).steps == [0, 2], "to look for another film changes nothing"
    changed(network, 4)  # the run goes on
    assert film_of(recipe, tmp_path, **other).steps == [4], "no snapshot of the images before is kept"
    assert film_of(recipe, tmp_path).steps == []


def test_a_film_belongs_to_its_labels_and_classes(tiny, tmp_path):
    recipe = tiny("toco")
    film = film_of(recipe, tmp_path)
    film(build_network(recipe, split_of(recipe, "val", 1).classes).eval(), 0)
    images, labels, classes = film.images, film.labels, film.classes
    assert Film(recipe, tmp_path, images.clone(), labels.clone(), tuple(classes)).steps == [0]
    assert Film(recipe, tmp_path, images, 1 - labels, classes).steps == []
    assert Film(recipe, tmp_path, images, labels, [kind + 1 for kind in classes]).steps == []


def test_a_film_that_does_not_tell_its_images_counts_as_none(tiny, tmp_path):
    np.savez(tmp_path / "film.npz", **{"0/cam": np.zeros((2, 32, 32), dtype=np.uint8)})
    assert film_of(tiny("toco"), tmp_path).steps == []


@pytest.mark.parametrize("method", ["ssepa", "afa"])
def test_the_pseudo_labels_of_a_film_are_those_of_the_evaluation(tiny, tmp_path, method):
    recipe = tiny(method)
    dataset = split_of(recipe, "val", 2)
    network = build_network(recipe, dataset.classes).eval()
    torch.nn.init.normal_(network.classifier.weight, std=0.5)
    images, labels, _ = study.samples(dataset, [0, 1], 32)
    film = Film(recipe, tmp_path, images, labels, labels.argmax(1).tolist())
    film(network, 0)
    for i, prediction in enumerate(infer(network, recipe, dataset, device="cpu")):
        assert torch.equal(prediction.input.float(), images[i])
        found = torch.from_numpy(film.maps("pseudo_label", i)[0]).long()
        assert torch.equal(found, prediction._batch.pseudo_labels("single")[i])
        assert len(found.unique()) > 1, "the mask is not trivial"
