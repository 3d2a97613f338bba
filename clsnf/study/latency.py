"""How long a detector takes for one picture: an objective beside the figures, measured on the
machine that runs the trial.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from clsnf.model.network import ScoreNetwork

LATENCY = "latency"
_WARMUP, _REPEATS = 3, 15


@torch.inference_mode()
def latency(network: ScoreNetwork, images: Tensor, device: torch.device) -> float:
    """Milliseconds from a picture on the canvas to both of its score maps back in memory: the
    median of several, one at a time.

    Args:
        network: in evaluation mode on the device.
        images: (N, 3, H, W) uint8; the first is used.
        device: where the network is.
    """

    def once() -> float:
        started = time.perf_counter()
        batch = (
            images[:1].to(device).float().div_(255).contiguous(memory_format=torch.channels_last)
        )
        for maps in network(batch):
            maps.cpu()  # waits for the device
        return 1000 * (time.perf_counter() - started)

    for _ in range(_WARMUP):
        once()
    return statistics.median(once() for _ in range(_REPEATS))
