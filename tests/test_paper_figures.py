import pytest
import torch

from ssepa_lib.data import split_of
from ssepa_lib.evaluation import infer
from ssepa_lib.model import build_network
from ssepa_lib.workbook import paper_figures, study


@pytest.mark.parametrize("method", ["ssepa", "afa"])
def test_pseudo_labels_are_those_of_the_evaluation(tiny, monkeypatch, method):
    recipe = tiny(method, **{"cam.low": 0.5})
    dataset = split_of(recipe, "val", 2)
    network = build_network(recipe, dataset.classes).eval()
    torch.nn.init.normal_(network.classifier.weight, std=0.5)
    pixels, labels, _ = study.samples(dataset, [0, 1], 32)
    monkeypatch.setattr(paper_figures, "crf_available", lambda: True)
    monkeypatch.setattr(paper_figures, "crf_pseudo_label", lambda image, maps, *_: maps)
    found = paper_figures.pseudo_labels(network, recipe, pixels, labels)
    for i, prediction in enumerate(infer(network, recipe, dataset, device="cpu", test_time=("ms",))):
        assert torch.equal(found[""][i], prediction._batch.pseudo_labels("ms")[i])
        assert len(found[""][i].unique()) > 1, "the mask is not trivial"
        given, maps = found[", CRF"][i], prediction.maps("ms")
        torch.testing.assert_close(given[maps.present], maps.final, msg="the CRF gets the maps to score")
