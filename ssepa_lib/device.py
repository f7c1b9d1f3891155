"""Where tensors live and in which precision, and how several processes share a batch."""

import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from ssepa_lib.errors import UserError
from ssepa_lib.private_api import cpu_multiplies_bf16


def resolve_device(name: str = "auto") -> torch.device:
    """`auto` takes the GPU when there is one.

    Raises:
        UserError: `cuda` was asked for on a machine without a usable GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device or train.device is cuda, but no CUDA GPU is usable here; set it to cpu or auto."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself (CUDA from Ampere on; CPUs with AMX or AVX-512
    BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_multiplies_bf16()


def precision(setting: str, device: torch.device) -> str:
    """`fp32` or `bf16`; `auto` is resolved by `native_bf16`."""
    if setting == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    return setting


def autocast(setting: str, device: torch.device) -> AbstractContextManager:
    """Autocast context for `train.precision`; weights and losses stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision(setting, device) == "bf16")


def describe_device(device: torch.device) -> str:
    """Name of the GPU, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"


def number_in(*variables: str, otherwise: int) -> int:
    """The number in the first of these environment variables that is set.

    Raises:
        UserError: it is no number of 0 or more.
    """
    for name in variables:
        if text := os.environ.get(name, "").strip():
            if text.isdecimal():
                return int(text)
            raise UserError(f"{name} is '{text}', which is no number; unset it, or start with torchrun.")
    return otherwise


def launched() -> tuple[int, int]:
    """Number of this process and number of all processes, as torchrun or SLURM started them; (0, 1) for one.

    Raises:
        UserError: the environment variables contradict each other, or torchrun has not set all of them.
    """
    rank = number_in("RANK", "SLURM_PROCID", otherwise=0)
    world = number_in("WORLD_SIZE", "SLURM_NTASKS", otherwise=1)
    if not rank < world:
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {world}: there is no such process; unset both, or start with "
            "torchrun."
        )
    if world > 1 and "SLURM_PROCID" not in os.environ and not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        raise UserError(
            f"WORLD_SIZE is {world} but RANK or MASTER_ADDR is missing; unset it, or start with torchrun."
        )
    return rank, world


def rank_and_world() -> tuple[int, int]:
    """The number of this process and the number of all processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def global_ratio(total: Tensor, count: Tensor) -> Tensor:
    """total / count where the batch is shared among processes.

    `count` is summed over processes and the quotient scaled such that averaging values and gradients over
    processes gives exactly what one process with the whole batch has. With one process it is the plain
    quotient.
    """
    world = rank_and_world()[1]
    if world > 1:
        count = count.clone()
        dist.all_reduce(count)
    return world * total / count.clamp(min=1)


def rank_slice(draw: Callable[[int], Tensor], batch: int) -> Tensor:
    """Random numbers for the images of this process out of a draw for the whole batch."""
    rank, world = rank_and_world()
    return draw(batch * world)[rank * batch : (rank + 1) * batch]
