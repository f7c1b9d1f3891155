"""Hierarchical backbones from timm: Swin (windows) and EfficientFormer (attention in its last stage).

All tokens are brought to the grid of the second-last stage, at half the stride of the last one: 16 pixels
where a Swin ends with 32. The final tokens are enlarged bilinearly. The attention of every layer comes out as
an operator on the same grid (`WindowedAttention`).
"""

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssepa_lib.errors import UserError
from ssepa_lib.model.encoder import BackboneOutput, Encoder
from ssepa_lib.model.tap import AttentionTap
from ssepa_lib.model.windows import Grid, WindowedAttention, Windows
from ssepa_lib.private_api import is_compiled
from ssepa_lib.recipe import ModelConfig

_log = logging.getLogger(__name__)


class Pyramid(Encoder):
    """A backbone of stages, each with half the resolution of the one before.

    `forward` resizes an image to the nearest size that all stages divide. Batch norms keep the statistics of
    the checkpoint, as is usual in segmentation, unless `train_statistics` is set.
    """

    def __init__(self, config: ModelConfig, vit: nn.Module, stages: nn.Module, checkpointing: bool):
        info = vit.feature_info
        widths = [f["num_chs"] for f, stage in zip(info, stages, strict=True) for _ in stage.blocks]
        if len(info) < 2:
            raise UserError(
                f"model.backbone '{config.backbone}' has one stage; give it two at least in "
                "model.backbone_args."
            )
        stride = info[-2]["reduction"]
        super().__init__(config, vit, widths, (stride, stride), info[0]["num_chs"], checkpointing)
        self.stride, self.train_statistics = info[-1]["reduction"] // stride, False
        for module in vit.modules():
            if hasattr(module, "fused_attn"):  # timm calls it experimental here and leaves it off
                module.fused_attn = True

    @property
    def stages(self) -> nn.Module:
        """The stages, each with `downsample` and `blocks`."""
        raise NotImplementedError

    @property
    def blocks(self) -> list[nn.Module]:
        """Every block, from the first to the last."""
        return [block for stage in self.stages for block in stage.blocks]

    def train(self, mode: bool = True) -> "Pyramid":
        """Training mode; batch norms stay in evaluation mode."""
        super().train(mode)
        for module in self.modules() if mode and not self.train_statistics else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    @property
    def smallest(self) -> int:
        """Side of the smallest image that can be encoded, a token of the last stage, in pixels."""
        return self.stride * self.patch_size[0]

    def grid(self, height: int, width: int) -> Grid:
        """Tokens per column and per row of the common grid, multiples of what the last stage merges.

        Raises:
            UserError: the image is smaller than a token of the last stage.
        """
        last = self.smallest
        if min(height, width) < last:
            raise UserError(
                f"an image of {height}×{width} pixels is smaller than a {last}×{last} patch of the last "
                "stage; use a larger one, or a larger data.crop, data.eval_size, contrast.local_size, "
                "cam.scales or eval.scales."
            )
        return tuple(self.stride * max(1, round(side / last)) for side in (height, width))

    def _encode(self, image: Tensor, capture: bool, mask: Tensor | None) -> BackboneOutput:
        """Run the stages."""
        grid = self.grid(*image.shape[-2:])
        x = self._stem(self._normalised(image, grid))  # [B, h', w', C]
        if mask is not None:
            hidden = F.interpolate(mask.view(-1, 1, *grid).float(), x.shape[1:3]) > 0  # [B, 1, h', w']
            x = torch.where(hidden.movedim(1, -1), self.mask_token.to(x.dtype), x)
        taps: list[tuple[AttentionTap, Windows]] = []
        for index, tokens in enumerate(self._walk(x, capture, taps)):
            x = tokens  # [B, h', w', C]
            if index == self.aux_block:
                aux = x
        return BackboneOutput(
            patches=_on_grid(self.vit.norm(x), grid),
            aux=_on_grid(aux, grid),
            cls=None,
            grid=grid,
            attention=_attention(taps, len(image), grid) if capture else None,
        )

    def _stem(self, x: Tensor) -> Tensor:
        """Patches [B, h', w', C] of a normalised image."""
        raise NotImplementedError

    def _walk(self, x: Tensor, capture: bool, taps: list[tuple[AttentionTap, Windows]]) -> Iterator[Tensor]:
        """The tokens [B, h', w', C] behind every block; layers with attention are added to `taps`."""
        raise NotImplementedError

    def _run(self, block: nn.Module, x: Tensor, tap: AttentionTap, grid: Grid | None = None) -> Tensor:
        """One block through its tap, recomputed in the backward pass if so configured; `grid` is that of a
        `GridAttention`."""
        needed = tap.capture or tap.visible is not None or not (is_compiled(block) or x.is_cuda)
        call = partial(tap.run, block) if needed else block
        call = call if grid is None else partial(_on_its_grid, call, block.token_mixer, grid)
        if self.checkpointing and torch.is_grad_enabled():
            x = checkpoint(call, x, use_reentrant=False)
        else:
            x = call(x)
        tap.capture = False  # a recomputed block must not record again
        return x


def _on_its_grid(call: Callable[[Tensor], Tensor], attention: nn.Module, grid: Grid, x: Tensor) -> Tensor:
    """A block's call; before a block is recomputed, a pass of another size may have changed the grid."""
    attention.grid = grid
    return call(x)


def _on_grid(x: Tensor, grid: Grid) -> Tensor:
    """Tokens [B, h', w', C] on the common grid, [B, N, C]: enlarged bilinearly or averaged."""
    if x.shape[1:3] != grid:
        smaller = x.shape[1] < grid[0]
        options = {"mode": "bilinear", "align_corners": False} if smaller else {"mode": "area"}
        x = F.interpolate(x.movedim(-1, 1), grid, **options).movedim(1, -1)
    return x.flatten(1, 2)


def _attention(taps: list[tuple[AttentionTap, Windows]], images: int, grid: Grid) -> WindowedAttention:
    """What was captured of every layer, without gradient."""
    windows = [layout for _, layout in taps]
    if any(len(tap.queries) != 1 for tap, _ in taps):
        raise UserError(
            "the backbone does not use fused attention, so its affinity cannot be read; unset "
            "TIMM_FUSED_ATTN=0 or choose another model.backbone."
        )
    queries, keys = (
        [side[0].detach().unflatten(0, (images, -1)) for side in sides]  # [B, W, H, M, d]
        for sides in ([tap.queries for tap, _ in taps], [tap.keys for tap, _ in taps])
    )
    biases, hidden = zip(*(_split_bias(tap.biases[0].detach(), images) for tap, _ in taps), strict=True)
    return WindowedAttention(queries, keys, 0, grid, windows, list(biases), list(hidden))


def _split_bias(bias: Tensor, images: int) -> tuple[Tensor, Tensor | None]:
    """What is added to logits, [1 or B·W, H, M, M], as a bias of all windows [1, H, M, M] and the pairs that
    a shift or padding hides, bool [W, M, M]; apart, they take an H-th of the memory and less.

    A hidden pair has a bias of −∞ (padding) or one lower by 100 (timm's shift).
    """
    if len(bias) == 1:
        return bias, None
    windows = bias[: len(bias) // images]  # the same for every image
    shared = windows.amax(0, keepdim=True)
    return shared, windows[:, 0] < shared[:, 0] - 50


class SwinBackbone(Pyramid):
    """timm's Swin transformer: windows, shifted in every second block, with a bias by relative position.

    Where windows do not divide a grid, timm pads; the padding is hidden from every query here.
    """

    def __init__(self, config: ModelConfig, vit: nn.Module, *, checkpointing: bool = False):
        super().__init__(config, vit, vit.layers, checkpointing)
        self.depth = len(self.blocks)
        self.heads = self.blocks[-1].attn.num_heads

    @property
    def stages(self) -> nn.Module:
        """The stages, each with `downsample` and `blocks`."""
        return self.vit.layers

    def _stem(self, x: Tensor) -> Tensor:
        return self.vit.patch_embed(x)

    def _walk(self, x: Tensor, capture: bool, taps: list[tuple[AttentionTap, Windows]]) -> Iterator[Tensor]:
        for stage in self.stages:
            x = stage.downsample(x)
            for block in stage.blocks:
                windows = Windows(tuple(x.shape[1:3]), tuple(block.window_size), tuple(block.shift_size))
                visible = None
                if any(windows.padding):
                    _say_padded(windows.grid, windows.size)
                    visible = windows.inside(x.device)[:, None, None].repeat(len(x), 1, 1, 1)
                tap = AttentionTap(capture, visible)  # keys: bool [B·W, 1, 1, M]
                taps.append((tap, windows))
                x = self._run(block, x, tap)
                yield x

    def _tokens(self, height: float, width: float) -> Iterator[tuple[nn.Module, int]]:
        """Every block and the number of tokens that it sees."""
        side = self.vit.patch_embed.patch_size[0]
        for index, stage in enumerate(self.stages):
            tokens = ceil(height / side / 2**index) * ceil(width / side / 2**index)
            yield from ((block, tokens) for block in stage.blocks)

    def attention_flops(self, height: float, width: float) -> float:
        """Linear in the number of tokens, because a window is as large on any grid."""
        return sum(4 * n * block.window_area * block.dim for block, n in self._tokens(height, width))

    def _linear_flops(self, height: float, width: float) -> float:
        def matrices(block: nn.Module) -> int:
            parts = (block.attn.qkv, block.attn.proj, block.mlp)
            return sum(p.numel() for part in parts for p in part.parameters() if p.ndim == 2)

        return sum(2 * n * matrices(block) for block, n in self._tokens(height, width))


@lru_cache
def _say_padded(grid: Grid, size: Grid) -> None:
    """Once per grid: windows do not divide it."""
    _log.warning(
        "windows of %d×%d tokens do not divide a grid of %d×%d tokens; it is padded, unseen by all tokens.",
        *size,
        *grid,
    )


class GridAttention(nn.Module):
    """EfficientFormer's attention for any grid, fused; timm's own works on 7×7 tokens alone.

    The bias depends on the distance in rows and in columns; its table is resized to other grids.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.attention_biases = attention.attention_biases  # [H, side²], by rows and columns apart
        self.heads, self.sizes = (
            attention.num_heads,
            [attention.key_dim, attention.key_dim, attention.val_dim],
        )
        self.side = round(self.attention_biases.shape[1] ** 0.5)
        self.grid: Grid = (self.side, self.side)

    def bias(self) -> Tensor:
        """What is added to the logits on the present grid, [1, H, T, T]."""
        h, w = self.grid
        table = self.attention_biases.unflatten(1, (self.side, self.side))[None]  # [1, H, side, side]
        if self.grid != (self.side, self.side):
            table = F.interpolate(table, self.grid, mode="bilinear", align_corners=True)
        row, column = (torch.arange(n, device=table.device) for n in (h, w))
        rows = (row[:, None] - row).abs().repeat_interleave(w, 0).repeat_interleave(w, 1)  # [T, T]
        columns = (column[:, None] - column).abs().repeat(h, h)
        return table[:, :, rows, columns]

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, C] → [B, T, C]."""
        parts = self.qkv(x).unflatten(2, (self.heads, -1)).transpose(1, 2).split(self.sizes, -1)
        mixed = F.scaled_dot_product_attention(*parts, attn_mask=self.bias().to(parts[0].dtype))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class EfficientFormerBackbone(Pyramid):
    """timm's EfficientFormer: convolutions and pooling, and attention in the last of the blocks."""

    def __init__(self, config: ModelConfig, vit: nn.Module, *, checkpointing: bool = False):
        super().__init__(config, vit, vit.stages, checkpointing)
        mixers = [(block, getattr(block, "token_mixer", None)) for block in self.blocks]
        layers = [block for block, mixer in mixers if hasattr(mixer, "qkv")]
        if not layers:
            raise UserError(
                f"model.backbone '{config.backbone}' has no block with attention; set num_vit in "
                "model.backbone_args to 1 or more."
            )
        for block in layers:
            block.token_mixer = GridAttention(block.token_mixer)
        self.depth, self.heads = len(layers), layers[-1].token_mixer.heads

    @property
    def stages(self) -> nn.Module:
        """The stages, each with `downsample` and `blocks`."""
        return self.vit.stages

    def _stem(self, x: Tensor) -> Tensor:
        return self.vit.stem(x).movedim(1, -1)

    def _walk(self, x: Tensor, capture: bool, taps: list[tuple[AttentionTap, Windows]]) -> Iterator[Tensor]:
        x = x.movedim(-1, 1)  # [B, C, h', w'], later tokens [B, T, C]
        for stage in self.stages:
            x = stage.downsample(x)
            grid = tuple(x.shape[-2:])
            for block in stage.blocks:
                tap = AttentionTap(capture)
                attends = isinstance(getattr(block, "token_mixer", None), GridAttention)
                if attends:
                    taps.append((tap, Windows(grid, grid)))
                x = self._run(block, x, tap, grid if attends else None)
                yield x.unflatten(1, grid) if x.ndim == 3 else x.movedim(1, -1)

    def _tokens(self, height: float, width: float) -> list[int]:
        """Tokens of every stage."""
        strides = [info["reduction"] for info in self.vit.feature_info]
        return [ceil(height / stride) * ceil(width / stride) for stride in strides]

    def attention_flops(self, height: float, width: float) -> float:
        """Quadratic, but only in the tokens of the last stage."""
        mixer = self.blocks[-1].token_mixer
        channels = mixer.heads * (mixer.sizes[0] + mixer.sizes[2])
        return 2 * self.depth * self._tokens(height, width)[-1] ** 2 * channels

    def _linear_flops(self, height: float, width: float) -> float:
        pairs = zip(self.stages, self._tokens(height, width), strict=True)
        return sum(2 * n * p.numel() for stage, n in pairs for p in stage.blocks.parameters() if p.ndim > 1)
