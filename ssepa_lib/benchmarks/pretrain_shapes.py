"""Pre-training of the built-in micro ViT: what ImageNet weights are to VOC, these weights are to the built-in data.

Two tasks on pictures of single creatures, without any mask. Naming: pictures are set into mosaics, and the best patch
of each tile must name its class and deny the others, so that a class stays where it is seen instead of leaking into
every token. Painting: colours of hidden patches from the visible ones (masked image modelling; He et al., CVPR 2022),
which makes patches of one creature attend to each other: the affinity that the workbook refines CAMs with.
"""

import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ssepa_lib.data.shapes import SHAPE_CLASSES, render_object
from ssepa_lib.device import autocast, resolve_device
from ssepa_lib.model.backbone import Backbone
from ssepa_lib.recipe import load_recipe
from ssepa_lib.training.trainer import atomic

_CELLS = 2  # colours are painted per half patch side: mean colours, not pixel noise
_LEARNING_RATE = 1.5e-3


def _initialise(vit: nn.Module) -> None:
    """Sine-cosine positions and a louder patch embedding; a short training from timm's small values finds neither."""
    width, side = vit.embed_dim, round((vit.pos_embed.shape[1] - 1) ** 0.5)
    frequency = 30 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # [side, D/2]
    grid = torch.cat([axis[:, None].expand(-1, side, -1), axis.expand(side, -1, -1)], 2)  # [side, side, D]
    with torch.no_grad():
        vit.pos_embed.copy_(F.pad(0.5 * grid.flatten(0, 1), (0, 0, 1, 0)))  # none for the class token
        vit.patch_embed.proj.weight.normal_(std=0.05)


def _cut(pictures: Tensor, side: int) -> Tensor:
    """Squares of one random size, each from a random place of its picture, turned and mirrored: [B, 3, side, side]."""
    full = pictures.shape[-1]
    size = int(torch.randint(full * 3 // 4, full + 1, ()))
    places = torch.randint(full + 1 - size, (len(pictures), 2)).tolist()
    cut = torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(pictures, places, strict=True)])
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
    """Multi-label cross-entropy of each tile's maximum. scores [B, N, C], label [B], tile [N], shown [B, tiles]."""
    best = torch.stack([scores[:, tile == t].amax(1) for t in range(shown.shape[1])], 1)  # [B, tiles, C]
    wanted = F.one_hot(label, scores.shape[-1]).to(best.dtype)[shown]
    return F.binary_cross_entropy_with_logits(best, wanted, reduction="none").sum(-1).mean()


def _colours(images: Tensor, patch: int) -> Tensor:
    """Mean colours of the cells of each patch, -1..1: [B, 3, H, W] in 0..255 → [B, N, 3·cells²]."""
    cells = F.avg_pool2d(images / 127.5 - 1, patch // _CELLS)
    return F.unfold(cells, _CELLS, stride=_CELLS).transpose(1, 2)


class _Tasks(nn.Module):
    """The backbone with a head per task; one forward pass for the whole batch."""

    def __init__(self, backbone: Backbone):
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


def pretrain(
    out: Path,
    *,
    steps: int = 1800,
    batch: int = 32,
    pictures: int = 6000,
    mask_ratio: float = 0.6,
    seed: int = 0,
    device: str = "auto",
    on_step: Callable[[dict], None] | None = None,
) -> Path:
    """Pre-train the backbone of `shapes` recipes and write its weights in half precision, loadable by timm.

    Args:
        out: the `.safetensors` file; its metadata hold the command that made it.
        steps: updates (AdamW, 60 of warm-up, then a cosine to 0).
        batch: pictures per step; five eighths are named, the others painted.
        pictures: how many single creatures are drawn.
        mask_ratio: share of hidden patches in painted pictures.
        on_step: called every 50 steps with {step, steps, loss, naming, painting, seconds_left}.
    """
    place, recipe = resolve_device(device), load_recipe("shapes/toco")
    config = recipe.model
    config.weights, config.train_pos_embed = "none", True
    side, named = config.backbone_args["img_size"], batch * 5 // 8
    drawn = [render_object(index, side * 7 // 6, seed) for index in range(pictures)]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in drawn])
    labels = torch.tensor([label for _, label in drawn])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = Backbone(config).train()
        _initialise(backbone.vit)
        tasks = _Tasks(backbone).to(place)
        number = (side // tasks.patch) ** 2
        optimizer = torch.optim.AdamW(
            tasks.parameters(), lr=_LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98)
        )
        warmup = min(60, steps)
        curve = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, _LEARNING_RATE, steps + 1, pct_start=warmup / (steps + 1), cycle_momentum=False
        )
        began = time.perf_counter()
        for step in range(1, steps + 1):
            pick = torch.randint(pictures, (batch,))
            hidden = torch.rand(batch - named, number).argsort(1) < mask_ratio * number
            views = _cut(images[pick], side).to(place)
            losses = tasks.losses(
                views, labels[pick].to(place), named, hidden.to(place), recipe.train.precision
            )
            loss = losses["naming"] + 10 * losses["painting"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(tasks.parameters(), 3.0)
            optimizer.step()
            curve.step()
            if on_step and (step % 50 == 0 or step == steps):
                left = (time.perf_counter() - began) / step * (steps - step)
                on_step(
                    {
                        "step": step,
                        "steps": steps,
                        "loss": loss.item(),
                        "seconds_left": left,
                        **{name: value.item() for name, value in losses.items()},
                    }
                )
    made = f"python -m ssepa_lib pretrain --out {Path(out).name} --steps {steps} --seed {seed}"
    state = {
        name: value.detach().cpu().half().contiguous() for name, value in backbone.vit.state_dict().items()
    }
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic(out, lambda part: save_file(state, part, {"made by": made, "timm": timm.__version__}))
    return out
