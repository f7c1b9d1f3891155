"""What every backbone offers: images of any size in, tokens on one grid out, attention on request."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssepa_lib.errors import UserError
from ssepa_lib.model.attention import Attention
from ssepa_lib.recipe import ModelConfig


@dataclass
class BackboneOutput:
    """Tokens of one forward pass on one grid. B images, N = h·w patches, width D."""

    patches: Tensor  # [B, N, D] last block, after the final norm
    aux: Tensor  # [B, N, A] raw output of the auxiliary block, whose stage may have another width A
    cls: Tensor | None  # [B, D] class token after the final norm; None without one
    grid: tuple[int, int]  # h, w
    attention: Attention | None  # queries and keys of every layer; None unless captured

    def map(self, function: Callable[..., Tensor], *others: "BackboneOutput") -> "BackboneOutput":
        """Apply a function to the same tensor of this output and of others, one after the other."""
        every = (self, *others)
        tokens = {
            name: None if getattr(self, name) is None else function(*(getattr(o, name) for o in every))
            for name in ("patches", "aux", "cls")
        }
        attention = self.attention and self.attention.map(function, *(o.attention for o in others))
        return replace(self, **tokens, attention=attention)

    def without_attention(self) -> "BackboneOutput":
        """The tokens alone."""
        return replace(self, attention=None)

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes."""
        attention = [] if self.attention is None else [*self.attention.queries, *self.attention.keys]
        return sum(x.nbytes for x in (self.patches, self.aux, self.cls, *attention) if x is not None)


class Encoder(nn.Module):
    """The interface of plain and hierarchical backbones; a subclass builds `vit` and implements `_encode`.

    Args:
        vit: the timm model.
        block_widths: channels behind every block, from the first to the last.
        patch_size: height and width of a token of the output, in pixels.
        stem: channels behind the patch embedding, where the mask token takes the place of a patch.
        checkpointing: recompute blocks in the backward pass.

    Attributes:
        width, aux_width: channels of final and auxiliary tokens.
        depth: layers whose attention can be captured, K. heads: of the last one.
        blocks: every block, attention or not. aux_block: index of the auxiliary one.
        num_prefix_tokens: tokens without a patch that the attention sees.
        cache: features of a frozen backbone; None: every image is encoded anew.
    """

    depth: int
    heads: int
    num_prefix_tokens: int = 0

    def __init__(
        self,
        config: ModelConfig,
        vit: nn.Module,
        block_widths: list[int],
        patch_size: tuple[int, int],
        stem: int,
        checkpointing: bool,
    ):
        super().__init__()
        self.vit, self.patch_size, self.checkpointing = vit, patch_size, checkpointing
        self.frozen, self.cache = False, None
        number = len(block_widths)
        if not -number <= config.aux_block < number:
            raise UserError(
                f"model.aux_block is {config.aux_block} but '{config.backbone}' has {number} blocks; "
                f"choose {-number}..{number - 1}."
            )
        self.aux_block = config.aux_block % number
        self.width, self.aux_width = vit.num_features, block_widths[self.aux_block]
        for name in ("mean", "std"):
            value = 255 * torch.tensor(getattr(config, name) or vit.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self.mask_token = nn.Parameter(torch.zeros(stem))
        if not config.train_norms:
            for name, parameter in vit.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and "norm" not in name)

    @property
    def blocks(self) -> list[nn.Module]:
        """Every block, from the first to the last."""
        return list(self.vit.blocks)

    @property
    def smallest(self) -> int:
        """Side of the smallest image that can be encoded, in pixels."""
        return max(self.patch_size)

    def freeze(self) -> None:
        """Train no parameter any more, stay in evaluation mode and build no graph."""
        self.requires_grad_(False)
        self.frozen = True
        self.eval()

    def train(self, mode: bool = True) -> "Encoder":
        """Training mode, which a frozen backbone never enters."""
        return super().train(mode and not self.frozen)

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

    def _normalised(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images [B, 3, H, W] in 0..255 as the checkpoint expects them, resized to whole patches."""
        x = (image.float() - self.mean) / self.std
        size = (grid[0] * self.patch_size[0], grid[1] * self.patch_size[1])
        return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)

    def forward(self, image: Tensor, *, capture: bool = False, mask: Tensor | None = None) -> BackboneOutput:
        """Encode images.

        Args:
            image: [B, 3, H, W], 0..255, uint8 or float.
            capture: keep the queries and keys of every layer, without gradient but for those that a learned
                affinity trains.
            mask: bool [B, N]; these patch embeddings are replaced by the mask token before positions are
                added (FSR).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if self.cache is None or mask is not None:
                return self._encode(image, capture, mask)
            return self.cache.encode(self, partial(self._encode, mask=None), image, capture)

    def _encode(self, image: Tensor, capture: bool, mask: Tensor | None) -> BackboneOutput:
        """`forward` without the cache."""
        raise NotImplementedError

    def class_tokens(self, image: Tensor, visible: Tensor) -> Tensor:
        """Class tokens of masked views (MCC), where a backbone has any; see `Backbone.class_tokens`.

        Raises:
            UserError: it has none.
        """
        raise UserError(
            "contrast.views masked needs a class token and no rotary positions; choose another "
            "model.backbone."
        )

    def flops(self, height: float, width: float) -> float:
        """Floating-point operations of the forward pass of one image, by formula: the blocks' products."""
        return self._linear_flops(height, width) + self.attention_flops(height, width)

    def attention_flops(self, height: float, width: float) -> float:
        """The part of `flops` that queries, keys and values of all layers have in one another's products.

        One application of the affinity to as many columns as a head has channels costs the same.
        """
        raise NotImplementedError

    def _linear_flops(self, height: float, width: float) -> float:
        """The part of `flops` that grows with the number of tokens."""
        raise NotImplementedError
