"""How long a detector takes for one image: an objective beside the metrics.

It is measured on the machine that runs the trial.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from clsnf.model.network import ScoreNetwork, to_network_input

_WARMUP, _REPEATS = 3, 15


@torch.inference_mode()
def measure_latency(network: ScoreNetwork, images: Tensor, device: torch.device) -> float:
    """Milliseconds from an image of the network's size to both of its score maps in host memory.

    The median of several runs, one image at a time. Fusing the maps is not measured: it depends on
    no setting that the latency should choose.

    Args:
        network: in evaluation mode on the device.
        images: (N, 3, H, W) uint8; the first is used.
        device: where the network is.
    """

    def run_once() -> float:
        started = time.perf_counter()
        for maps in network(to_network_input(images[:1], device)):
            maps.cpu()  # waits for the device
        return 1000 * (time.perf_counter() - started)

    for _ in range(_WARMUP):
        run_once()
    return statistics.median(run_once() for _ in range(_REPEATS))
