"""One training step on one page: forward → class activation maps → labels; the objectives turn them into
terms.

Forward passes of one step, for B images of side S, local crops of side s, and CAM scales 1, 0.5 and 1.5 with
flip:

| pass | images | side | gradient | in |
|---|---|---|---|---|
| training crop; also the CAM at scale 1 | B | S | yes | every method |
| CAM, flip at scale 1 | B | S | no | every method |
| CAM, scale 0.5 with flip | 2B | S/2 | no | every method |
| CAM, scale 1.5 with flip | 2B | 1.5·S | no | every method |
| the same in two calls, image and flip | B + B | 1.5·S | no | AFA, from `affinity.start` on |
| second global view | B | S | yes | class token contrast (ToCo, SS-EPA, MCC) |
| eight local crops | 8B | s | yes | class token contrast (ToCo, SS-EPA) |
| eight masked views, visible patches alone | 8B | S | yes | masked contrast (MCC) |
| teacher, both views | 2B | S | no | FSR |
| masked second view | B | S | yes | FSR |
| CAM, image itself in evaluation mode | B | S | no | FSR, whose drop path changes the training pass |
| CAM of the second view, per scale with flip | 2B | S, S/2, 1.5·S | no | FSR with uncertain blocks |
| flipped copy of the crop | B | 1.4·S | no | HAAF's objective "equivariance" |

The decoder runs on the training crop alone, from `losses.segmentation_start` on; AFA makes no maps before.
The patch affinity adds no forward pass: it reads the attention of the passes above. With
`cam.teacher_momentum` the CAM passes, then with the image itself, go to the averaged network. The image
itself and its flip share one call. With `model.freeze` no pass has a gradient, and one on a view that has
been seen before is read from memory.
"""

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from ssepa_lib.data import IGNORE
from ssepa_lib.data.views import Batch
from ssepa_lib.labels.cam import Cams, multi_scale_cam
from ssepa_lib.labels.pseudo_labels import PseudoLabeler, inside, mostly_inside
from ssepa_lib.labels.refine import Refiner, build_refiner
from ssepa_lib.model.network import Network, NetworkOutput, evaluating
from ssepa_lib.randomness import generator
from ssepa_lib.recipe import Recipe


@dataclass
class TrainStep:
    """Everything that the objectives of one step read. B images, C classes, N patches."""

    network: Network
    recipe: Recipe
    batch: Batch
    index: int  # counted from 0
    generator: torch.Generator  # for crops and masks; on the CPU, so that every device draws the same
    labeler: PseudoLabeler
    refiner: Refiner | None  # None before pseudo-labels use it, and in a recipe without affinity
    output: NetworkOutput  # of the training crop
    cams: Cams | None = None  # None unless an objective needs them, likewise below
    token_label: Tensor | None = None  # [B, N] long, from the auxiliary CAM; 255 unknown
    pseudo_label: Tensor | None = None  # [B, S, S] long, from the (refined) CAM after PAR; 255 unknown

    @property
    def fraction(self) -> float:
        """How much of the run is done, 0..1."""
        return self.index / self.recipe.train.steps

    @property
    def valid_tokens(self) -> Tensor:
        """[B, N], 1 where a patch lies mostly on the image, 0 on padding."""
        area = inside(self.batch.box, self.batch.image.shape[-2:]).float()  # [B, S, S]
        return mostly_inside(area, self.output.grid)


def take_step(
    network: Network,
    recipe: Recipe,
    batch: Batch,
    index: int,
    labeler: PseudoLabeler,
    needs: Set[str],
    teacher: Network | None = None,
) -> TrainStep:
    """Run the network on a batch and derive what the objectives need.

    Args:
        index: the training step, from 0.
        needs: out of "attention", "cams", "token_label" and "pseudo_label"; labels imply the maps they are
            made from.
        teacher: an EMA copy that makes the maps; None: the network itself.
    """
    image, label = batch.image, batch.label
    refiner = build_refiner(recipe.affinity, network) if index >= recipe.affinity_step else None
    kept = network.backbone.cache is not None and recipe.affinity.kind != "none"  # needed in a later epoch
    capture = refiner is not None or "attention" in needs or kept
    output = network(image, segment=index >= recipe.segmentation_step, capture=capture)
    crops = generator("crops", recipe.train.seed, index)
    step = TrainStep(network, recipe, batch, index, crops, labeler, refiner, output)
    if needs - {"attention"}:
        source = network if teacher is None else teacher
        own = (
            teacher is None and recipe.model.drop_path == 0
        )  # else the training pass is not the inference pass
        its_refiner = None if refiner is None else build_refiner(recipe.affinity, source)
        with evaluating(source):
            step.cams = multi_scale_cam(
                source, image, label, recipe.cam, its_refiner, first=output if own else None, box=batch.box
            )
    if "token_label" in needs:
        step.token_label = labeler.token_labels(step.cams.auxiliary, output.grid)
        if recipe.losses.ptc_padding == "ignore":
            step.token_label = step.token_label.masked_fill(step.valid_tokens == 0, IGNORE)
    if "pseudo_label" in needs:
        early = step.fraction < recipe.cam.main_from  # COCO: the main classifier is not trusted yet
        maps = step.cams.auxiliary if early else step.cams.for_labels
        step.pseudo_label = labeler.training_labels(image, maps, label, batch.box, step.cams.spread)
    return step
