"""A plain vision transformer from timm: images of any size in, tokens out, queries and keys on request."""

from collections.abc import Iterator
from functools import partial

import torch
from timm.models import EfficientFormer, SwinTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssepa_lib.errors import UserError
from ssepa_lib.model.attention import Attention
from ssepa_lib.model.encoder import BackboneOutput, Encoder
from ssepa_lib.model.pyramid import EfficientFormerBackbone, SwinBackbone
from ssepa_lib.model.tap import AttentionTap
from ssepa_lib.model.weights import create_vit
from ssepa_lib.private_api import embed_positions, embeds_positions, is_compiled
from ssepa_lib.recipe import ModelConfig


class Backbone(Encoder):
    """timm vision transformer with prefix tokens, any patch size, square or rectangular input.

    `forward` takes images in 0..255 and normalises them itself. Sides that are no multiple of the patch are
    resized to the nearest one.

    Args:
        vit: the timm model; None: the one that `config` names.
        checkpointing: recompute blocks in the backward pass.
        attached: the last so many blocks whose captured queries and keys keep their gradient.
    """

    def __init__(
        self,
        config: ModelConfig,
        vit: nn.Module | None = None,
        *,
        checkpointing: bool = False,
        attached: int = 0,
    ):
        vit = create_vit(config) if vit is None else vit
        if not embeds_positions(vit):
            raise UserError(
                f"model.backbone '{config.backbone}' is not a plain vision transformer; choose a timm ViT."
            )
        widths = [vit.num_features] * len(vit.blocks)
        super().__init__(config, vit, widths, vit.patch_embed.patch_size, vit.num_features, checkpointing)
        self.depth = len(vit.blocks)
        if not hasattr(vit.blocks[0], "attn"):
            raise UserError(
                f"the attention of model.backbone '{config.backbone}' cannot be read, because its blocks are "
                "of another make; choose a plain ViT, for example vit_tiny_patch16_224."
            )
        self.heads: int = vit.blocks[0].attn.num_heads
        self.drop_prefix = config.aggregator != "class_token" and not config.keep_class_token
        self.num_prefix_tokens = 0 if self.drop_prefix else vit.num_prefix_tokens
        self.has_class_token = self.num_prefix_tokens > 0 and getattr(vit, "cls_token", None) is not None
        self.attached = attached
        if not config.train_pos_embed and vit.pos_embed is not None:
            vit.pos_embed.requires_grad_(False)
        for name in ("cls_token", "reg_token") if self.drop_prefix else ():
            if getattr(vit, name, None) is not None:
                getattr(vit, name).requires_grad_(False)

    def _embed(self, image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """Image [B, 3, H, W] in 0..255 → tokens [B, P+N, D] with positions, rotary embedding if any, grid."""
        h, w = self.grid(*image.shape[-2:])
        x = self.vit.patch_embed(self._normalised(image, (h, w))).reshape(len(image), h, w, -1)
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

    def _blocks(self, x: Tensor, rope: Tensor | None, tap: AttentionTap) -> Iterator[Tensor]:
        """The tokens [B, P+N, D] after every block."""
        needed = tap.capture or tap.visible is not None
        own = getattr(self.vit, "rope_mixed", False)  # then every block has rotary positions of its own
        for index, block in enumerate(self.vit.blocks):
            extra = {} if rope is None else {"rope": rope[index] if own else rope}
            call = partial(tap.run, block) if needed or not (is_compiled(block) or x.is_cuda) else block
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(call, x, use_reentrant=False, **extra)
            else:
                x = call(x, **extra)
            yield x
        tap.capture = False  # a recomputed block must not record again

    def _encode(self, image: Tensor, capture: bool, mask: Tensor | None) -> BackboneOutput:
        """Run the blocks; only the last `attached` layers are captured with their gradient."""
        x, rope, grid = self._embed(image, mask)
        tap = AttentionTap(capture)
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
            cls=x[:, 0] if self.has_class_token else None,
            grid=grid,
            attention=self._attention(tap, grid) if capture else None,
        )

    def _attention(self, tap: AttentionTap, grid: tuple[int, int]) -> Attention:
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
        if not self.has_class_token or rope is not None:
            return super().class_tokens(image, visible)
        counts = visible.sum(2)  # [B, V]
        order = visible.byte().sort(dim=2, descending=True, stable=True).indices  # [B, V, N], visible first
        longest = int(counts.max())  # L
        start = patches * torch.arange(len(x), device=x.device)[:, None, None]
        shown = x[:, first:].flatten(0, 1).index_select(0, (order[:, :, :longest] + start).flatten())
        shown = shown.view(len(x) * views, longest, x.shape[2])  # [B·V, L, D]
        x = torch.cat([x[:, :first].repeat_interleave(views, 0), shown], 1)  # [B·V, P+L, D]
        keys = torch.arange(x.shape[1], device=x.device) < (first + counts).flatten()[:, None]
        for tokens in self._blocks(x, None, AttentionTap(visible=keys[:, None, None])):
            x = tokens
        return self.vit.fc_norm(self.vit.norm(x))[:, 0].unflatten(0, visible.shape[:2])

    def _tokens(self, height: float, width: float) -> int:
        rows, columns = (max(1, round(s / p)) for s, p in zip((height, width), self.patch_size, strict=True))
        return rows * columns + self.num_prefix_tokens

    def attention_flops(self, height: float, width: float) -> float:
        """Quadratic in the number of tokens."""
        return 4 * self._tokens(height, width) ** 2 * self.width * self.depth

    def _linear_flops(self, height: float, width: float) -> float:
        matrices = sum(p.numel() for p in self.vit.blocks.parameters() if p.ndim == 2)
        return 2 * matrices * self._tokens(height, width)


def build_backbone(config: ModelConfig, *, checkpointing: bool = False, attached: int = 0) -> Encoder:
    """The backbone of a recipe: a plain ViT, a Swin or an EfficientFormer.

    Args:
        checkpointing, attached: see `Backbone`; only a plain ViT has attached layers.

    Raises:
        UserError: another kind of model, whose attention does not exist or cannot be read.
    """
    vit = create_vit(config)
    if isinstance(vit, SwinTransformer):
        return SwinBackbone(config, vit, checkpointing=checkpointing)
    if isinstance(vit, EfficientFormer):
        return EfficientFormerBackbone(config, vit, checkpointing=checkpointing)
    if not embeds_positions(vit):
        attends = any("attention" in type(module).__name__.lower() for module in vit.modules())
        reason = "its attention cannot be read" if attends else "it has no attention"
        raise UserError(
            f"model.backbone '{config.backbone}' cannot give an affinity, because {reason}; choose a timm "
            "ViT, Swin or EfficientFormer, for example vit_tiny_patch16_224 or swin_tiny_patch4_window7_224."
        )
    return Backbone(config, vit, checkpointing=checkpointing, attached=attached)
