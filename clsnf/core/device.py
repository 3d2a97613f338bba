"""The one place that decides on a device and on the arithmetic used there."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from clsnf.core.errors import SettingsError


def choose_device(name: str = "auto") -> torch.device:
    """The device to work on: ``auto`` takes CUDA, then MPS, then the CPU; any torch device name is
    taken at its word.

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
    """bfloat16 where the device computes it in hardware, else float32.

    bfloat16 has float32's range, so training with it needs no loss scaling. On CPUs the
    instructions (AVX-512 BF16) make training about twice as fast.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision for training on `device`, or nothing where it has none."""
    dtype = training_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
