"""Where tensors live and in which precision: one processor or one GPU without any change of code."""

import platform
from contextlib import AbstractContextManager

import torch

from ssepa_lib.errors import UserError


def resolve_device(name: str = "auto") -> torch.device:
    """`auto` takes the GPU when there is one.

    Raises:
        UserError: `cuda` was asked for on a machine without a usable GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is 'cuda' but no CUDA GPU is usable here; set it to 'cpu' or 'auto'.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself (CUDA from Ampere on, processors with AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


def precision(setting: str, device: torch.device) -> str:
    """`fp32` or `bf16`; `auto` is resolved by `native_bf16`."""
    if setting == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    return setting


def autocast(setting: str, device: torch.device) -> AbstractContextManager:
    """Autocast context for `train.precision`; weights and losses stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision(setting, device) == "bf16")


def describe_device(device: torch.device) -> str:
    """Name of the GPU, or the processor with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
