"""Every private interface of torch and timm that the library relies on, behind functions of our own.

No other file uses such a name; `tests/test_private_api.py` says which versions are supported when one
disappears.
"""

import torch
from torch import Tensor, nn

NAMES = {
    "torch.nn.Module": ("_call_impl", "_compiled_call_impl"),
    "torch.cpu": ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
    "torch.Tensor": ("_version",),
    "timm.models.vision_transformer.VisionTransformer": ("_pos_embed",),
}  # import path → private attributes used here


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX or AVX-512 BF16)."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    avx512 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return any(probe is not None and probe() for probe in (amx, avx512))


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def call_uncompiled(module: nn.Module, x: Tensor, **arguments: Tensor) -> Tensor:
    """Call a module past its compiled form, which would hide what happens inside."""
    return module._call_impl(x, **arguments)


def versions(module: nn.Module) -> tuple[int, ...]:
    """A number per parameter that grows whenever the parameter is written to."""
    return tuple(parameter._version for parameter in module.parameters())


def embeds_positions(vit: nn.Module) -> bool:
    """Whether a timm model is a plain vision transformer whose positions can be embedded from outside."""
    return hasattr(vit, "blocks") and hasattr(vit, "_pos_embed")


def embed_positions(vit: nn.Module, patches: Tensor) -> tuple[Tensor, Tensor | None]:
    """Add position embeddings and prefix tokens.

    Args:
        patches: [B, h, w, D].

    Returns:
        Tokens [B, P+N, D] and the rotary embedding where the model has one.
    """
    embedded = vit._pos_embed(patches)
    return embedded if isinstance(embedded, tuple) else (embedded, None)
