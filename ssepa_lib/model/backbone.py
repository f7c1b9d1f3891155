"""A plain vision transformer from timm: images of any size in, tokens out, queries and keys on request."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ssepa_lib.errors import UserError
from ssepa_lib.model.affinity import Attention
from ssepa_lib.model.weights import create_vit
from ssepa_lib.private_api import call_uncompiled, embed_positions, embeds_positions, is_compiled
from ssepa_lib.recipe import ModelConfig

SHORT = 128  # tokens; above, the gain in time is small and the memory twice as much


@dataclass
class BackboneOutput:
    """Tokens of one forward pass. B images, N = h·w patches, width D."""

    patches: Tensor  # [B, N, D] last block, after the final norm
    aux: Tensor  # [B, N, D] raw output of the auxiliary block
    cls: Tensor | None  # [B, D] class token after the final norm; None without prefix tokens
    grid: tuple[int, int]  # h, w
    attention: Attention | None  # queries and keys of every layer; None unless captured


class _AttentionTap(TorchFunctionMode):
    """Stands between a block and its fused attention, however timm names its modules.

    It records queries and keys where asked, hides keys where asked, and lets training on a CPU attend in
    float32 where the sequence is short: there the backward pass of the bfloat16 kernel is up to ten times
    slower.

    Args:
        capture: record queries and keys, with their gradient.
        visible: bool [B, 1, 1, T], the keys that may be attended to; None: all.
    """

    def __init__(self, capture: bool = False, visible: Tensor | None = None) -> None:
        super().__init__()
        self.capture, self.visible = capture, visible
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value, *rest = args
        if self.visible is not None:
            kwargs = {**(kwargs or {}), "attn_mask": self.visible}
        if self.capture:
            self.queries.append(query)
            self.keys.append(key)
        if query.device.type != "cpu" or not torch.is_grad_enabled() or query.shape[2] > SHORT:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):  # it would cast back
            return func(query.float(), key.float(), value.float(), *rest, **(kwargs or {})).to(query.dtype)

    def run(self, block: nn.Module, x: Tensor, **extra: Tensor) -> Tensor:
        """One block, past a compiled call, which would hide the attention."""
        with self:
            return call_uncompiled(block, x, **extra)


class Backbone(nn.Module):
    """timm vision transformer with prefix tokens, any patch size, square or rectangular input.

    `forward` takes images in 0..255 and normalises them itself. Sides that are no multiple of the patch are
    resized to the nearest one.

    Args:
        checkpointing: recompute blocks in the backward pass.
        attached: the last so many blocks whose captured queries and keys keep their gradient.
    """

    def __init__(self, config: ModelConfig, *, checkpointing: bool = False, attached: int = 0):
        super().__init__()
        self.vit = create_vit(config)
        if not embeds_positions(self.vit):
            raise UserError(
                f"model.backbone '{config.backbone}' is not a plain vision transformer; choose a timm ViT."
            )
        self.width: int = self.vit.num_features
        self.depth = len(self.vit.blocks)
        self.heads: int = self.vit.blocks[0].attn.num_heads
        if not -self.depth <= config.aux_block < self.depth:
            raise UserError(
                f"model.aux_block is {config.aux_block} but '{config.backbone}' has {self.depth} blocks; "
                f"choose {-self.depth}..{self.depth - 1}."
            )
        self.aux_block = config.aux_block % self.depth
        self.patch_size: tuple[int, int] = self.vit.patch_embed.patch_size
        self.drop_prefix = config.aggregator != "class_token" and not config.keep_class_token
        self.num_prefix_tokens = 0 if self.drop_prefix else self.vit.num_prefix_tokens
        self.checkpointing, self.attached = checkpointing, attached
        cfg = self.vit.pretrained_cfg
        self.register_buffer(
            "mean", 255 * torch.tensor(config.mean or cfg["mean"]).view(3, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", 255 * torch.tensor(config.std or cfg["std"]).view(3, 1, 1), persistent=False
        )
        self.mask_token = nn.Parameter(torch.zeros(self.width))
        if not config.train_pos_embed and self.vit.pos_embed is not None:
            self.vit.pos_embed.requires_grad_(False)
        if not config.train_norms:
            for name, parameter in self.vit.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and "norm" not in name)
        for name in ("cls_token", "reg_token") if self.drop_prefix else ():
            if getattr(self.vit, name, None) is not None:
                getattr(self.vit, name).requires_grad_(False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches per column and per row for an image of this size.

        Raises:
            UserError: the image is smaller than a patch.
        """
        ph, pw = self.patch_size
        if height < ph or width < pw:
            raise UserError(
                f"an image of {height}×{width} pixels is smaller than a {ph}×{pw} patch; use a larger one, "
                "or a larger data.crop, data.eval_size, contrast.local_size, cam.scales or eval.scales."
            )
        return round(height / ph), round(width / pw)

    def _embed(self, image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """Image [B, 3, H, W] in 0..255 → tokens [B, P+N, D] with positions, rotary embedding if any, grid."""
        h, w = self.grid(*image.shape[-2:])
        x = (image.float() - self.mean) / self.std
        size = (h * self.patch_size[0], w * self.patch_size[1])
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        x = self.vit.patch_embed(x).reshape(len(x), h, w, -1)  # [B, h, w, D]
        if mask is not None:
            x = torch.where(mask.view(-1, h, w, 1), self.mask_token.to(x.dtype), x)
        x, rope = embed_positions(self.vit, x)
        if self.drop_prefix:
            if rope is not None:
                raise UserError(
                    "model.aggregator other than class_token needs a backbone without rotary positions; "
                    "set model.keep_class_token or choose another model.backbone."
                )
            x = x[:, self.vit.num_prefix_tokens :]
        return self.vit.norm_pre(x), rope, (h, w)

    def _blocks(self, x: Tensor, rope: Tensor | None, tap: _AttentionTap) -> Iterator[Tensor]:
        """The tokens [B, P+N, D] after every block."""
        extra = {} if rope is None else {"rope": rope}
        needed = tap.capture or tap.visible is not None
        for block in self.vit.blocks:
            call = partial(tap.run, block) if needed or not (is_compiled(block) or x.is_cuda) else block
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(call, x, use_reentrant=False, **extra)
            else:
                x = call(x, **extra)
            yield x
        tap.capture = False  # a recomputed block must not record again

    def forward(self, image: Tensor, *, capture: bool = False, mask: Tensor | None = None) -> BackboneOutput:
        """Encode images.

        Args:
            image: [B, 3, H, W], 0..255, uint8 or float.
            capture: keep the queries and keys of every layer; only the last `attached` have a gradient.
            mask: bool [B, N]; these patch embeddings are replaced by the mask token before positions are
                added (FSR).
        """
        x, rope, grid = self._embed(image, mask)
        tap = _AttentionTap(capture)
        for index, tokens in enumerate(self._blocks(x, rope, tap)):
            x = tokens  # [B, P+N, D]
            if index == self.aux_block:
                aux = x
        if capture and len(tap.queries) != self.depth:
            raise UserError(
                "the backbone does not use fused attention, so its affinity cannot be read; "
                "unset TIMM_FUSED_ATTN=0 or choose a plain vision transformer."
            )
        x = self.vit.fc_norm(self.vit.norm(x))
        first = self.num_prefix_tokens
        return BackboneOutput(
            patches=x[:, first:],
            aux=aux[:, first:],
            cls=x[:, 0] if first else None,
            grid=grid,
            attention=self._attention(tap, grid) if capture else None,
        )

    def _attention(self, tap: _AttentionTap, grid: tuple[int, int]) -> Attention:
        """What was captured, without gradient but for the last `attached` layers."""
        free = self.depth - self.attached
        queries, keys = (
            [x.detach() if layer < free else x for layer, x in enumerate(side)]
            for side in (tap.queries, tap.keys)
        )
        return Attention(queries, keys, self.num_prefix_tokens, grid)

    def class_tokens(self, image: Tensor, visible: Tensor) -> Tensor:
        """Class tokens of views of images in which most patches are hidden (MCC, WACV 2024).

        Hiding means that no token may attend to the patch, in any block and head. A hidden patch is then
        nobody's key and influences nothing but itself, so it is dropped before the first block: the class
        token is the same and costs a fraction. Positions are those of the whole grid. Views show different
        numbers of patches; the shorter ones are filled up with keys that nobody attends to.

        Args:
            image: [B, 3, H, W], 0..255.
            visible: bool [B, V, N], the patches that each of the V views shows; a view may show none.

        Returns:
            [B, V, D], after the final norm.

        Raises:
            UserError: the backbone has no class token, or rotary positions.
        """
        x, rope, _ = self._embed(image, None)  # [B, P+N, D]
        first, (views, patches) = self.num_prefix_tokens, visible.shape[1:]
        if first == 0 or rope is not None:
            raise UserError(
                "contrast.views masked needs a class token and no rotary positions; choose another "
                "model.backbone."
            )
        counts = visible.sum(2)  # [B, V]
        order = visible.byte().sort(dim=2, descending=True, stable=True).indices  # [B, V, N], visible first
        longest = int(counts.max())  # L
        start = patches * torch.arange(len(x), device=x.device)[:, None, None]
        shown = x[:, first:].flatten(0, 1).index_select(0, (order[:, :, :longest] + start).flatten())
        shown = shown.view(len(x) * views, longest, x.shape[2])  # [B·V, L, D]
        x = torch.cat([x[:, :first].repeat_interleave(views, 0), shown], 1)  # [B·V, P+L, D]
        keys = torch.arange(x.shape[1], device=x.device) < (first + counts).flatten()[:, None]
        for tokens in self._blocks(x, None, _AttentionTap(visible=keys[:, None, None])):
            x = tokens
        return self.vit.fc_norm(self.vit.norm(x))[:, 0].unflatten(0, visible.shape[:2])
