"""Pre-training of the micro backbones: what ImageNet weights are to VOC, they are to the built-in data.

Two tasks on images of single creatures, without any mask. Naming: images are set into mosaics, and the best
patch of each tile must name its class and deny the others, so that a class stays where it is seen instead
of leaking into every token. Painting: colours of hidden patches from the visible ones (masked image
modelling; He et al., CVPR 2022), which makes patches of one creature attend to each other: the affinity
that the workbook refines CAMs with.
"""

import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssepa_lib.compose import load_recipe
from ssepa_lib.data.shapes import SHAPE_CLASSES, render_object
from ssepa_lib.device import autocast, resolve_device
from ssepa_lib.files import write_atomically
from ssepa_lib.model.backbone import Backbone, build_backbone
from ssepa_lib.model.encoder import Encoder
from ssepa_lib.randomness import seeded
from ssepa_lib.recipe import ModelConfig
from ssepa_lib.training.checkpoint import write_weights

_CELLS = 2  # colours are painted per half patch side: mean colours, not pixel noise
_LEARNING_RATE = 1.5e-3


def _initialise(vit: nn.Module) -> None:
    """Sine-cosine positions and a louder patch embedding; timm's small values lead to neither in a short
    run."""
    width, side = vit.embed_dim, round((vit.pos_embed.shape[1] - 1) ** 0.5)
    frequency = 30 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # [side, D/2]
    grid = torch.cat([axis[:, None].expand(-1, side, -1), axis.expand(side, -1, -1)], 2)  # [side, side, D]
    with torch.no_grad():
        vit.pos_embed.copy_(F.pad(0.5 * grid.flatten(0, 1), (0, 0, 1, 0)))  # none for the class token
        vit.patch_embed.proj.weight.normal_(std=0.05)


def _cut(images: Tensor, side: int) -> Tensor:
    """Squares of one random size, each from a random place of its image, turned and flipped: [B, 3, side,
    side]."""
    full = images.shape[-1]
    size = int(torch.randint(full * 3 // 4, full + 1, ()))
    places = torch.randint(full + 1 - size, (len(images), 2)).tolist()
    cut = torch.stack([x[:, t : t + size, l : l + size] for x, (t, l) in zip(images, places, strict=True)])
    cut = F.interpolate(cut.float(), (side, side), mode="bilinear", align_corners=False)
    cut = cut.rot90(int(torch.randint(4, ())), (2, 3))
    return cut.flip(-1) if torch.rand(()) < 0.5 else cut


def _mosaic(images: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four images at half size each, rolled around the edges by whole patches.

    Returns:
        mosaics [B, 3, S, S], the tile 0..3 of every patch [N], and which images the tiles show [B, 4].
    """
    small = F.avg_pool2d(images, 2)
    shown = torch.randint(len(images), (len(images), 4))
    rows = torch.cat([small[shown[:, ::2]], small[shown[:, 1::2]]], -1)  # [B, 2, 3, S/2, S]
    side = images.shape[-1] // patch
    half = torch.arange(side) // ((side + 1) // 2)
    shift = torch.randint(side, (2,)).tolist()
    tile = (2 * half[:, None] + half).roll(shift, (0, 1)).flatten()
    return torch.cat([rows[:, 0], rows[:, 1]], -2).roll([patch * s for s in shift], (2, 3)), tile, shown


def _naming_loss(scores: Tensor, label: Tensor, tile: Tensor, shown: Tensor) -> Tensor:
    """Multi-label cross-entropy of each tile's maximum. scores [B, N, C], label [B], tile [N], shown [B,
    tiles]."""
    best = torch.stack([scores[:, tile == t].amax(1) for t in range(shown.shape[1])], 1)  # [B, tiles, C]
    wanted = F.one_hot(label, scores.shape[-1]).to(best.dtype)[shown]
    return F.binary_cross_entropy_with_logits(best, wanted, reduction="none").sum(-1).mean()


def _colours(images: Tensor, patch: int) -> Tensor:
    """Mean colours of the cells of each patch, -1..1: [B, 3, H, W] in 0..255 → [B, N, 3·cells²]."""
    cells = F.avg_pool2d(images / 127.5 - 1, patch // _CELLS)
    return F.unfold(cells, _CELLS, stride=_CELLS).transpose(1, 2)


class _Tasks(nn.Module):
    """The backbone with a head per task; one forward pass for the whole batch."""

    def __init__(self, backbone: Encoder):
        super().__init__()
        self.backbone = backbone
        self.name = nn.Linear(backbone.width, len(SHAPE_CLASSES))
        self.paint = nn.Linear(backbone.width, 3 * _CELLS**2)
        self.patch = backbone.patch_size[0]

    def losses(
        self, images: Tensor, label: Tensor, named: int, hidden: Tensor, precision: str
    ) -> dict[str, Tensor]:
        """The first `named` images are named, the others painted where `hidden` [B - named, N]."""
        tile = torch.zeros(hidden.shape[1], dtype=torch.long)
        shown = torch.arange(named)[:, None]
        parts = list(images.split([named, len(images) - named]))
        if torch.rand(()) < 0.5:
            parts[0], tile, shown = _mosaic(parts[0], self.patch)
        if torch.rand(()) < 0.5:
            parts[1] = _mosaic(parts[1], self.patch)[0]
        hide = F.pad(hidden, (0, 0, named, 0))
        with autocast(precision, images.device):
            patches = self.backbone(torch.cat(parts), mask=hide).patches
        patches = patches.float()
        painted = self.paint(patches[named:])[hidden]
        return {
            "naming": _naming_loss(self.name(patches[:named]), label[:named], tile, shown),
            "painting": F.mse_loss(painted, _colours(parts[1], self.patch)[hidden]),
        }


def _draw(number: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [number, 3, side, side] of single creatures and their classes [number]."""
    drawn = [render_object(index, side, seed) for index in range(number)]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in drawn])
    return images, torch.tensor([label for _, label in drawn])


def _report(step: int, steps: int, began: float, loss: Tensor, losses: dict[str, Tensor]) -> dict:
    """What `on_step` is called with."""
    left = (time.perf_counter() - began) / step * (steps - step)
    terms = {name: value.item() for name, value in losses.items()}
    return {"step": step, "steps": steps, "loss": loss.item(), "seconds_left": left, **terms}


def _train(
    tasks: _Tasks,
    images: Tensor,
    labels: Tensor,
    *,
    side: int,
    steps: int,
    batch: int,
    mask_ratio: float,
    device: torch.device,
    precision: str,
    on_step: Callable[[dict], None] | None,
) -> None:
    """Minimise both losses; arguments as in `pretrain`."""
    named, number = batch * 5 // 8, (side // tasks.patch) ** 2
    optimizer = torch.optim.AdamW(tasks.parameters(), lr=_LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    share = min(60, steps) / (steps + 1)
    curve = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, steps + 1, pct_start=share, cycle_momentum=False
    )
    began = time.perf_counter()
    for step in range(1, steps + 1):
        pick = torch.randint(len(images), (batch,))
        hidden = torch.rand(batch - named, number).argsort(1) < mask_ratio * number
        views = _cut(images[pick], side).to(device)
        losses = tasks.losses(views, labels[pick].to(device), named, hidden.to(device), precision)
        loss = losses["naming"] + 10 * losses["painting"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(tasks.parameters(), 3.0)
        optimizer.step()
        curve.step()
        if on_step and (step % 50 == 0 or step == steps):
            on_step(_report(step, steps, began, loss, losses))


def _scratch(config: ModelConfig) -> Encoder:
    """The backbone before its first step, in training mode."""
    encoder = build_backbone(config)
    if isinstance(encoder, Backbone):
        _initialise(encoder.vit)
    else:
        encoder.train_statistics = True
    return encoder.train()


def pretrain(
    out: Path,
    *,
    backbone: str = "",
    steps: int = 1800,
    batch: int = 32,
    images: int = 6000,
    mask_ratio: float = 0.6,
    seed: int = 0,
    device: str = "auto",
    on_step: Callable[[dict], None] | None = None,
) -> Path:
    """Pre-train the backbone of `shapes` recipes and write its weights in half precision, loadable by timm.

    Args:
        out: the `.safetensors` file; its metadata hold the command that made it.
        backbone: a backbone of the recipes, swin_micro or efficientformer_micro; empty: the micro ViT.
        steps: updates (AdamW, 60 of warm-up, then a cosine to 0).
        batch: images per step; five eighths are named, the others painted.
        images: how many single creatures are drawn.
        mask_ratio: share of hidden patches in painted images.
        on_step: called every 50 steps with {step, steps, loss, naming, painting, seconds_left}.
    """
    place, out = resolve_device(device), Path(out)
    name = "/".join(["shapes/toco", *([backbone] if backbone else [])])
    recipe = load_recipe(name, {"model.weights": "none", "model.train_pos_embed": True})
    side = recipe.data.crop
    drawn, labels = _draw(images, side * 7 // 6, seed)
    with seeded("network", seed):
        encoder = _scratch(recipe.model)
        _train(
            _Tasks(encoder).to(place),
            drawn,
            labels,
            side=side,
            steps=steps,
            batch=batch,
            mask_ratio=mask_ratio,
            device=place,
            precision=recipe.train.precision,
            on_step=on_step,
        )
    chosen = f" --backbone {backbone}" if backbone else ""
    made = f"python -m ssepa_lib pretrain --out {out.name}{chosen} --steps {steps} --seed {seed}"
    values = encoder.vit.state_dict().items()
    state = {name: value.detach().cpu().half().contiguous() for name, value in values}
    metadata = {"made by": made, "timm": timm.__version__}
    write_atomically(out, lambda part: write_weights(part, state, metadata))
    return out
