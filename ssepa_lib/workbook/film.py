"""What a few images look like to a network while it learns: snapshots, kept in the run folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.evaluation.multiscale import cam_view
from ssepa_lib.files import write_atomically
from ssepa_lib.labels import PseudoLabeler, build_refiner, multi_scale_cam
from ssepa_lib.model import Network
from ssepa_lib.recipe import Recipe
from ssepa_lib.training.checkpoint import fingerprint
from ssepa_lib.training.run import FILM
from ssepa_lib.workbook.watch import Watch

MAPS = ("cam", "aux_cam", "refined")  # 0..1, stored in 256 levels
IDS = ("pseudo_label", "segmentation")  # class ids
SHOWN = "shown"  # the entry of the file that tells which images it shows


class Film(Watch):
    """Snapshots of some images at equal distances of a run, in `film.npz` of the run folder.

    A file that shows other images, labels or classes counts as no film, and the next snapshot replaces it.

    Args:
        recipe: of the run.
        folder: the run folder.
        images: [n, 3, S, S], 0..255.
        labels: [n, C].
        classes: index of the class whose maps are shown, one per image.
        frames: how many snapshots from the first step to the last.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path | str,
        images: Tensor,
        labels: Tensor,
        classes: Sequence[int],
        frames: int = 9,
    ):
        self.recipe, path = recipe, Path(folder) / FILM
        self.images, self.labels, self.classes = images, labels, list(classes)
        self.shown = fingerprint([images, labels, self.classes])
        super().__init__(path, recipe.train.steps, max(frames - 1, 1), _read(path, self.shown))

    def take(self, network: Network) -> dict[str, np.ndarray]:
        """One snapshot of every image."""
        return _shot(network, self.recipe, self.images, self.labels, self.classes)

    def store(self) -> None:
        """Write `film.npz`."""
        arrays = {
            f"{step}/{name}": values for step, shot in self.kept.items() for name, values in shot.items()
        }
        arrays[SHOWN] = np.array(self.shown)
        write_atomically(self.path, lambda part: _write(part, arrays))

    def maps(self, name: str, image: int) -> dict[int, np.ndarray]:
        """One kind of snapshot of one image: step → map float32 [S, S] in 0..1, or class ids uint8 [S, S].

        Args:
            name: cam, aux_cam, refined, pseudo_label or segmentation; `refined` is missing in a run without
                affinity, and then empty.
        """
        found = {step: shot[name][image] for step, shot in self.kept.items() if name in shot}
        return {s: v if name in IDS else v.astype(np.float32) / 255 for s, v in found.items()}


def _write(part: Path, arrays: dict[str, np.ndarray]) -> None:
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _read(path: Path, shown: str) -> dict[int, dict[str, np.ndarray]]:
    """The snapshots of a film, by step in order; none where there is no film of what is to be shown."""
    found: dict[int, dict[str, np.ndarray]] = {}
    if path.is_file():
        with np.load(path) as arrays:
            if SHOWN not in arrays.files or arrays[SHOWN].item() != shown:
                return {}
            for key in (key for key in arrays.files if key != SHOWN):
                step, name = key.split("/")
                found.setdefault(int(step), {})[name] = arrays[key]
    return dict(sorted(found.items()))


@torch.no_grad()
def _shot(
    network: Network, recipe: Recipe, images: Tensor, labels: Tensor, classes: Sequence[int]
) -> dict[str, np.ndarray]:
    """One snapshot at scale 1, as it would be measured."""
    device = network.classifier.weight.device
    images, labels, rows = images.to(device).float(), labels.to(device), torch.arange(len(images))
    refiner = build_refiner(recipe.affinity, network)
    output = network(images, capture=refiner is not None)
    cams = multi_scale_cam(network, images, labels, cam_view(recipe.cam, "single"), refiner, first=output)
    labeler = PseudoLabeler(recipe.cam).to(device)
    logits = F.interpolate(output.segmentation.float(), images.shape[-2:], mode="bilinear")
    found = {"cam": cams.main, "aux_cam": cams.auxiliary, "refined": cams.refined}
    shot = {name: maps[rows, classes] for name, maps in found.items() if maps is not None}
    shot = {name: (255 * maps).round().byte() for name, maps in shot.items()}
    shot["pseudo_label"] = labeler.labels(images, cams.for_labels, labels, cams.spread).byte()
    shot["segmentation"] = logits.argmax(1).byte()
    return {name: values.cpu().numpy() for name, values in shot.items()}
