"""How long a detector takes for one image: an objective beside the metrics.

A trial measures its architecture on its machine, while others work there. That is enough to search
by. Before a front rests on the numbers, they are measured again, all architectures in turn: what
slows the machine down meanwhile then slows all of them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from clsnf.core.config import DetectorSettings, key_content, to_dict
from clsnf.core.hashing import content_key
from clsnf.core.progress import Progress
from clsnf.model.network import ScoreNetwork, to_network_input
from clsnf.results import LATENCY, TrialResult
from clsnf.study.context import StudyContext
from clsnf.study.space import settings_of_trial
from clsnf.study.worker import WORKBENCHES

_WARMUP, _REPEATS = 3, 15


def architecture_content(settings: DetectorSettings) -> dict[str, Any]:
    """The settings that a network's latency depends on."""
    decoder = ("decoder", "decoder_width", "skips")
    flow = ("depth", "start", "neighbourhood", "covariance", "memory")
    return {
        "image": key_content(settings.image),
        "backbone": to_dict(settings.backbone),
        "decoder": {name: getattr(settings.finetune, name) for name in decoder},
        "flow": {name: getattr(settings.flow, name) for name in flow},
    }


@torch.inference_mode()
def measure_in_turn(networks: Sequence[ScoreNetwork]) -> list[float]:
    """Milliseconds from an image of a network's size to both of its score maps in host memory.

    The median of several runs, one image at a time. Each round runs every network once. Fusing the
    maps is not measured: it depends on no setting that the latency should choose.

    Args:
        networks: in evaluation mode, each on its device.

    Returns:
        For each network its latency.
    """
    rounds = [[_run_once(network) for network in networks] for _ in range(_WARMUP + _REPEATS)]
    return [statistics.median(times) for times in zip(*rounds[_WARMUP:], strict=True)]


def _run_once(network: ScoreNetwork) -> float:
    image = torch.zeros(1, 3, *network.decoder.image_size, dtype=torch.uint8)
    device = next(network.parameters()).device
    started = time.perf_counter()
    for maps in network(to_network_input(image, device)):
        maps.cpu()  # waits for the device
    return 1000 * (time.perf_counter() - started)


def with_latencies_in_turn(
    context: StudyContext, category: str, trials: Sequence[TrialResult], progress: Progress
) -> list[TrialResult]:
    """A category's finished trials with latencies that this process measures in turn.

    Trials of one architecture have one latency.

    Args:
        context: the study.
        category: its name.
        trials: its finished trials.
        progress: told about every architecture.
    """
    if LATENCY not in context.study.objectives:
        return list(trials)
    settings = [settings_of_trial(context.settings, trial.config) for trial in trials]
    keys = [content_key(architecture_content(each)) for each in settings]
    networks: dict[str, ScoreNetwork] = {}
    for key, each in zip(keys, settings, strict=True):
        if key not in networks:
            pipeline = WORKBENCHES.get(context, category, each).pipeline
            networks[key] = pipeline.network(each.finetune.joint_epochs, each.flow.depth)
            progress("latency", len(networks), len(set(keys)))
    latencies = dict(zip(networks, measure_in_turn(list(networks.values())), strict=True))
    return [
        dataclasses.replace(
            trial, measured=dataclasses.replace(trial.measured, latency=latencies[key])
        )
        for trial, key in zip(trials, keys, strict=True)
    ]
