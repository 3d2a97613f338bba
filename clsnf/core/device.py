"""Choice of the device to compute on, and of the number type for training on it."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from clsnf.core.errors import SettingsError


def choose_device(name: str = "auto") -> torch.device:
    """The device of a name: ``auto`` or any name that torch knows.

    ``auto`` is CUDA if there is one, else MPS, else the CPU.

    Raises:
        SettingsError: the device does not exist here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingsError(
            f"There is no device {name!r} on this machine: choose auto, cpu, cuda, cuda:N or mps."
        ) from error
    return device


def training_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the device computes it in hardware, else float32.

    bfloat16 has float32's range, so training with it needs no loss scaling. On CPUs the
    instructions (AVX-512 BF16) make training about twice as fast.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context for training on `device`: mixed precision if it computes bfloat16, else none."""
    dtype = training_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
