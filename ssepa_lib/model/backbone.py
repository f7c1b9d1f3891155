"""A plain vision transformer from timm: images of any size in, patch tokens out, queries and keys on request."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ssepa_lib.errors import UserError
from ssepa_lib.paths import PACKAGE, weights_root
from ssepa_lib.recipe import ModelConfig

SHORT = 128  # tokens; above, the gain in time is small and the memory twice as much
MICRO_WEIGHTS = PACKAGE / "weights" / "vit_micro_shapes.safetensors"


@dataclass
class BackboneOutput:
    """Tokens of one forward pass. B images, P prefix tokens (class token, registers), N = h·w patches, width D."""

    patches: Tensor  # [B, N, D] last block, after the final norm
    aux: Tensor  # [B, N, D] raw output of the auxiliary block
    cls: Tensor | None  # [B, D] class token after the final norm; None without prefix tokens
    grid: tuple[int, int]  # h, w
    prefix: int  # P
    queries: list[Tensor]  # per layer [B, H, P+N, d], as they enter the attention; empty unless captured
    keys: list[Tensor]


class _Attention(TorchFunctionMode):
    """Stands between a block and its fused attention, however timm names its modules.

    Records queries and keys where asked, and lets training on a processor attend in float32 where the sequence is
    short: there the backward pass of the bfloat16 kernel is up to ten times slower.
    """

    def __init__(self, capture: bool) -> None:
        super().__init__()
        self.capture, self.queries, self.keys = capture, [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value, *rest = args
        if self.capture:
            self.queries.append(query.detach())
            self.keys.append(key.detach())
        if query.device.type != "cpu" or not torch.is_grad_enabled() or query.shape[2] > SHORT:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):  # it would cast back
            return func(query.float(), key.float(), value.float(), *rest, **(kwargs or {})).to(query.dtype)

    def run(self, block: nn.Module, x: Tensor, **extra: Tensor) -> Tensor:
        """One block, past a compiled call, which would hide the attention."""
        with self:
            return block._call_impl(x, **extra)


class Backbone(nn.Module):
    """timm vision transformer with prefix tokens, any patch size, square or rectangular input.

    `forward` takes images in 0..255 and normalises them itself. Sides that are no multiple of the patch are resized
    to the nearest one.
    """

    def __init__(self, config: ModelConfig, *, checkpointing: bool = False):
        super().__init__()
        self.vit = _create_vit(config)
        if not hasattr(self.vit, "blocks") or not hasattr(self.vit, "_pos_embed"):
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
        self.prefix = 0 if self.drop_prefix else self.vit.num_prefix_tokens
        self.checkpointing = checkpointing
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
        for name in ("cls_token", "reg_token") if self.drop_prefix else ():
            if getattr(self.vit, name, None) is not None:
                getattr(self.vit, name).requires_grad_(False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches per column and per row for an image of this size.

        Raises:
            UserError: the image is smaller than a patch.
        """
        (ph, pw) = self.patch_size
        if height < ph or width < pw:
            raise UserError(
                f"an image of {height}×{width} pixels is smaller than a {ph}×{pw} patch; use a larger one."
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
        embedded = self.vit._pos_embed(x)
        x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
        if self.drop_prefix:
            if rope is not None:
                raise UserError(
                    "model.aggregator other than class_token needs a backbone without rotary positions; "
                    "set model.keep_class_token or choose another model.backbone."
                )
            x = x[:, self.vit.num_prefix_tokens :]
        return self.vit.norm_pre(x), rope, (h, w)

    def forward(self, image: Tensor, *, capture: bool = False, mask: Tensor | None = None) -> BackboneOutput:
        """Encode images.

        Args:
            image: [B, 3, H, W], 0..255, uint8 or float.
            capture: keep the queries and keys of every layer (detached).
            mask: bool [B, N]; these patch embeddings are replaced by the mask token before positions are added (FSR).
        """
        x, rope, grid = self._embed(image, mask)
        extra = {} if rope is None else {"rope": rope}
        attention = _Attention(capture)
        for index, block in enumerate(self.vit.blocks):
            compiled = block._compiled_call_impl is not None
            call = partial(attention.run, block) if capture or not (compiled or x.is_cuda) else block
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(call, x, use_reentrant=False, **extra)
            else:
                x = call(x, **extra)
            if index == self.aux_block:
                aux = x
        attention.capture = False  # a recomputed block must not record again
        if capture and len(attention.queries) != self.depth:
            raise UserError(
                "the backbone does not use fused attention, so its affinity cannot be read; "
                "unset TIMM_FUSED_ATTN=0 or choose a plain vision transformer."
            )
        x = self.vit.fc_norm(self.vit.norm(x))
        return BackboneOutput(
            patches=x[:, self.prefix :],
            aux=aux[:, self.prefix :],
            cls=x[:, 0] if self.prefix else None,
            grid=grid,
            prefix=self.prefix,
            queries=attention.queries,
            keys=attention.keys,
        )


def weights_path(config: ModelConfig) -> Path | None:
    """Weight file a recipe asks for; None for random weights or timm's own download."""
    if config.weights == "micro":
        return MICRO_WEIGHTS
    if config.weights and config.weights != "none":
        return Path(config.weights)
    local = weights_root() / f"{config.backbone}.safetensors"
    return local if not config.weights and local.is_file() else None


def _create_vit(config: ModelConfig) -> nn.Module:
    path = weights_path(config)
    if path is not None and not path.is_file():
        raise UserError(f"weight file {path} does not exist; correct model.weights or leave it empty.")
    options = dict(
        config.backbone_args, num_classes=0, drop_path_rate=config.drop_path, dynamic_img_size=True
    )
    download = path is None and config.weights != "none"
    try:
        vit = timm.create_model(config.backbone, pretrained=download, **options)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"model.backbone '{config.backbone}': {str(error).splitlines()[0]}; correct it or "
            "model.backbone_args."
        ) from error
    except OSError as error:  # what a hub download raises without a network
        raise UserError(
            f"the weights of '{config.backbone}' cannot be downloaded; put {config.backbone}.safetensors "
            f"into {weights_root()} or set model.weights."
        ) from error
    if path is not None:
        _load_weights(vit, path, config.backbone)
    return vit


def _load_weights(vit: nn.Module, path: Path, name: str) -> None:
    """Load a timm checkpoint, resampling its position embedding to the model's native grid."""
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"weight file {path} is not a readable safetensors file ({error}); fetch it again."
        ) from error
    from timm.models.vision_transformer import checkpoint_filter_fn

    try:
        state = checkpoint_filter_fn({k: v.float() for k, v in state.items()}, vit)
        missing, unexpected = vit.load_state_dict(state, strict=False)
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"weight file {path} does not fit the backbone '{name}': "
            f"{str(error).splitlines()[-1].strip()}; correct model.backbone, model.backbone_args or "
            "model.weights."
        ) from error
    wrong = missing + [key for key in unexpected if not key.startswith(("head", "pre_logits", "fc_norm"))]
    if wrong:
        raise UserError(
            f"weight file {path} does not fit the backbone '{name}' ({len(wrong)} tensors differ, first "
            f"{wrong[0]}); correct model.backbone, model.backbone_args or model.weights."
        )
