"""A network that reads classes off colours and two images that it gets right: for the tests of evaluation."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn

from ssepa_lib.data import SegmentationDataset
from ssepa_lib.recipe import Recipe

CLASSES = ("circle", "square")


class ColourNetwork(nn.Module):
    """Reads class 1 off the red channel and class 2 off the green one, pixel by pixel: always right."""

    def __init__(self):
        super().__init__()
        self.backbone, self.haaf = SimpleNamespace(patch_size=(1, 1)), None
        self.classes, self.calls = CLASSES, []

    def forward(self, image, *, segment=True, capture=False, mask=None):
        self.calls.append((tuple(image.shape), segment, self.training, torch.is_grad_enabled()))
        cam = image[:, :2].float() / 255
        logits = torch.cat([torch.full_like(cam[:, :1], 0.5), cam], 1)
        return SimpleNamespace(
            scores=cam.amax((2, 3)),
            cam=cam,
            aux_cam=cam,
            segmentation=logits if segment else None,
            attention=None,
        )


class TwoImages(SegmentationDataset):
    """Two images of different sizes, a red half and a green quarter."""

    def __init__(self, masks=True, classes=CLASSES):
        super().__init__("val", classes, ["a", "b"])
        self.masks, self.name, self.opened = masks, "toy", []

    def label(self, i):
        return torch.eye(2)[i]

    def _ids(self, i):
        ids = np.zeros((8, 16) if i else (12, 8), dtype=np.uint8)
        ids[: ids.shape[0] // 2, : ids.shape[1] // (i + 1)] = i + 1
        return ids

    def image(self, i):
        self.opened.append(i)
        ids = self._ids(i)
        return Image.fromarray(np.stack([255 * (ids == 1), 255 * (ids == 2), 0 * ids], -1).astype(np.uint8))

    def mask(self, i):
        return torch.from_numpy(self._ids(i)) if self.masks else None


def recipe(size=0):
    """A recipe whose pixel-adaptive refinement is off, so that labels follow the CAM exactly."""
    made = Recipe(name="toy/toco")
    return replace(
        made,
        data=replace(made.data, eval_size=size, workers=0),
        train=replace(made.train, precision="fp32"),
        cam=replace(made.cam, par_dilations=[1], par_iterations=0),
    )


def without_crf(jobs, processes):
    """In the place of `crf_pool`: the most probable class, after a check of the jobs."""
    for image, probabilities, rest in jobs:
        assert image.shape[:2] == probabilities.shape[1:]
        assert abs(probabilities.sum(0) - 1).max() < 1e-5
        yield probabilities.argmax(0).astype(np.uint8), rest
