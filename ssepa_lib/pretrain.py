"""Pre-training of the built-in micro ViT: what ImageNet weights are to VOC, these weights are to the built-in data.

Two tasks on pictures of single creatures, without any mask: name the class from the class token, and paint hidden
patches from the visible ones (masked image modelling; He et al., CVPR 2022; Xie et al., CVPR 2022). The second makes
patches attend to patches that look alike, which is the affinity that the workbook refines CAMs with.
"""

import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ssepa_lib.backbone import Backbone
from ssepa_lib.device import autocast, resolve_device
from ssepa_lib.recipe import load_recipe
from ssepa_lib.shapes import SHAPE_CLASSES, render_object
from ssepa_lib.training import atomic


def _patches(image: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] in 0..255 → pixels of every patch about the image's mean, [B, N, 3·size²]."""
    x = F.unfold(image.float() / 127.5 - 1, size, stride=size).transpose(1, 2)
    return x - x.mean((1, 2), keepdim=True)


def pretrain(
    out: Path, *, steps: int = 1600, batch: int = 32, pictures: int = 8192, mask_ratio: float = 0.5, seed: int = 0,
    device: str = "auto", on_step: Callable[[dict], None] | None = None,
) -> Path:  # fmt: skip
    """Pre-train the backbone of `shapes` recipes and write its weights in half precision, loadable by timm.

    Args:
        out: the `.safetensors` file.
        steps: updates; the learning rate follows a cosine after 5 % of warm-up.
        pictures: how many single creatures are drawn; mirrored at random.
        mask_ratio: share of hidden patches.
        on_step: called every 50 steps with {step, steps, loss, cls, pixels, seconds_left}.
    """
    place, recipe = resolve_device(device), load_recipe("shapes/toco")
    config = recipe.model
    torch.manual_seed(seed)
    config.weights, config.train_pos_embed = "none", True
    backbone = Backbone(config).to(place).train()
    side, size = config.backbone_args["img_size"], backbone.patch_size[0]
    number = (side // size) ** 2
    heads = nn.ModuleDict({"cls": nn.Linear(backbone.width, len(SHAPE_CLASSES)),
                           "pixels": nn.Linear(backbone.width, 3 * size**2)}).to(place)  # fmt: skip
    drawn = [render_object(index, side, seed) for index in range(pictures)]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in drawn])
    labels = torch.tensor([label for _, label in drawn])
    optimizer = torch.optim.AdamW([*backbone.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05, cycle_momentum=False)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        pick = torch.randint(pictures, (batch,))
        image, label = images[pick].to(place), labels[pick].to(place)
        image = torch.where(torch.rand(batch, 1, 1, 1, device=place) < 0.5, image, image.flip(-1))
        hidden = torch.rand(batch, number, device=place).argsort(1) < mask_ratio * number
        with autocast(recipe.train.precision, place):
            tokens = backbone(image, mask=hidden)
            painted, score = heads["pixels"](tokens.patches).float(), heads["cls"](tokens.cls).float()
        losses = {"cls": F.cross_entropy(score, label),
                  "pixels": F.mse_loss(painted[hidden], _patches(image, size)[hidden])}  # fmt: skip
        loss = losses["cls"] * 0.5 + losses["pixels"] * 4
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), 3.0)
        optimizer.step()
        schedule.step()
        if on_step and (step % 50 == 0 or step == steps):
            left = (time.perf_counter() - began) / step * (steps - step)
            on_step({"step": step, "steps": steps, "loss": loss.item(), "seconds_left": left,
                     **{name: value.item() for name, value in losses.items()}})  # fmt: skip
    state = {name: value.detach().cpu().half().contiguous() for name, value in backbone.vit.state_dict().items()}
    made = f"python -m ssepa_lib pretrain --out {Path(out).name} --steps {steps} --seed {seed}"
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic(out, lambda part: save_file(state, part, {"made by": made, "timm": timm.__version__}))
    return out
