"""Where and how large a benchmark runs.

Inputs are photographs where VOC is at hand, else built-in scenes; weights are random, which changes no cost.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssepa_lib.compose import load_recipe
from ssepa_lib.data import Batch, SegmentationDataset
from ssepa_lib.data.images import classes_in, resize_mask
from ssepa_lib.data.shapes import ShapesDataset, render_scene
from ssepa_lib.data.voc import VOC_CLASSES, VocDataset
from ssepa_lib.device import describe_device, precision, resolve_device
from ssepa_lib.errors import UserError
from ssepa_lib.recipe import Recipe

BACKBONES = {  # family → whether it is the published size → model and its name in a table
    "ViT": {
        True: ("vit_base_patch16_224.orig_in21k_ft_in1k", "ViT-B/16"),
        False: ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "ViT-Ti/16"),
    },
    "Swin": {
        True: ("swin_base_patch4_window7_224.ms_in22k_ft_in1k", "Swin-B"),
        False: ("swin_tiny_patch4_window7_224.ms_in22k_ft_in1k", "Swin-T"),
    },
}
TOYS: dict[str, dict[str, Any]] = {
    "ViT": {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 2},
    "Swin": {"img_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
}
STATISTICS = {"ViT": {}, "Swin": {"model.mean": [0.485, 0.456, 0.406], "model.std": [0.229, 0.224, 0.225]}}


@dataclass
class Setup:
    """Where and how large: ViT-B at 448² on a GPU or with `full`, else ViT-Tiny at 224²; a toy with
    `quick`."""

    device: torch.device
    quick: bool = False
    data: Path | None = None  # VOC folder; None: built-in scenes
    seconds: float = 60.0  # after which a comparison starts no further round
    full: bool = False  # the published size on a CPU too
    _scenes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def large(self) -> bool:
        """Whether the published size is measured."""
        return self.gpu or self.full

    @property
    def side(self) -> int:
        """Side of the images in pixels."""
        return 64 if self.quick else 448 if self.large else 224

    @property
    def rounds(self) -> int:
        """How often a comparison is repeated at most."""
        return 2 if self.quick else 10 if self.gpu else 5

    def target(self, text: str) -> str:
        """The target, which only counts at full size."""
        return "" if self.quick else text

    def recipe(
        self,
        method: str = "ssepa",
        *,
        batch: int = 4,
        strategy: str = "matrix_free",
        depth: int = 0,
        family: str = "ViT",
        changes: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """A recipe at this setup's size with random weights.

        Args:
            depth: number of blocks; 0: the backbone's own.
            family: of backbones, one of `BACKBONES`.
            changes: further settings of the recipe, dotted name → value.
        """
        settings: dict[str, Any] = {
            "model.backbone": BACKBONES[family][self.large][0],
            "model.weights": "none",
            **STATISTICS[family],
            "data.crop": self.side,
            "data.batch": batch,
            "affinity.strategy": strategy,
            "train.device": self.device.type,
        }
        if self.quick:
            head = {"local_size": 32, "local_crops": 2, "hidden": 64, "bottleneck": 32, "outputs": 64}
            settings |= {"model.backbone_args": TOYS[family]} | {f"contrast.{k}": v for k, v in head.items()}
        elif not self.large:
            settings |= {"contrast.local_size": 64, "contrast.hidden": 512, "contrast.bottleneck": 128}
        if depth:
            settings["model.backbone_args"] = {**settings.get("model.backbone_args", {}), "depth": depth}
        return load_recipe(f"voc/{method}", {**settings, **(changes or {})})

    def describe(self, batch: int, side: int = 0, depth: int = 0, family: str = "ViT") -> str:
        """Backbone, image size and batch in words."""
        name = f"toy {family}" if self.quick else BACKBONES[family][self.large][1]
        return f"{name}{f', {depth} blocks' if depth else ''}, {side or self.side}², batch {batch}"

    def dataset(self) -> SegmentationDataset:
        """Training images to load from."""
        if self.data:
            return VocDataset(self.data, "train")
        return ShapesDataset("train", 64 if self.quick else 512)

    def images(self, count: int, side: int = 0) -> tuple[Tensor, Tensor]:
        """Images uint8 [count, 3, side, side] and masks uint8 [count, side, side] that fill the square."""
        side = side or self.side
        if side not in self._scenes or len(self._scenes[side][0]) < count:
            self._scenes[side] = self._load(count, side)
        image, mask = self._scenes[side]
        return image[:count].to(self.device), mask[:count].to(self.device)

    def _load(self, count: int, side: int) -> tuple[Tensor, Tensor]:
        if self.data:
            items = [(item.image, item.mask) for item in map(self.dataset().__getitem__, range(count))]
        else:
            scenes = [render_scene("train", i, size=round(1.15 * side)) for i in range(count)]
            items = [(torch.from_numpy(i).permute(2, 0, 1), torch.from_numpy(m)) for i, m in scenes]
        image = [F.interpolate(i[None].float(), (side, side), mode="area")[0].byte() for i, _ in items]
        mask = [resize_mask(m, side) for _, m in items]
        return torch.stack(image), torch.stack(mask)

    def batch(self, count: int, side: int = 0) -> Batch:
        """One batch of training views without padding."""
        image, mask = self.images(count, side)
        label = torch.stack([classes_in(m.cpu(), len(VOC_CLASSES)) for m in mask]).to(self.device)
        box = torch.tensor([[0, image.shape[-2], 0, image.shape[-1]]] * count, device=self.device)
        return Batch([str(i) for i in range(count)], image, box, label, image.flip(-1), image, None)


def open_setup(
    device: str, *, quick: bool = False, full: bool = False, data: Path | None = None, seconds: float = 60.0
) -> Setup:
    """A setup on a device; photographs are taken from `data`, else from VOC where it is at hand.

    Raises:
        UserError: `data` holds no VOC 2012 data, or the device cannot be used.
    """
    root = data or VocDataset.find_root()
    found = (root / "JPEGImages").is_dir() and (root / "ImageSets" / "Segmentation" / "train.txt").is_file()
    if data and not found:
        raise UserError(f"{data} holds no VOC 2012 data; name the folder with JPEGImages/ and ImageSets/.")
    photographs = root if found and not (quick and not data) else None
    return Setup(resolve_device(device), quick, photographs, seconds, full)


def machine(device: torch.device) -> dict[str, object]:
    """What the numbers were measured on."""
    return {
        "device": describe_device(device),
        "type": device.type,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "precision": precision("auto", device),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("torch", "torchvision", "timm", "numpy")},
    }
