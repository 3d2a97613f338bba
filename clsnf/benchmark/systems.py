"""The five systems, and the candidates that selection chooses from in each.

Source: S. Oh and J. Kim, IEEE Access 12 (2024), for the method and its ablation; Gudovskiy et al.,
    WACV 2022, for the baseline.

Unusual: the same list of candidates serves all three columns: the validation defects choose one
    (``selected``), the settings alone name
one (``last``), and an oracle takes the best one on the test images, figure by figure. What the
oracle gains over the selected one is what a paper that reports the best epoch on the test set would
gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from clsnf.model.score_maps import fuse

# Fusion weights that fused systems choose from, beside the settings' own.
WEIGHTS = tuple(round(0.1 * step, 1) for step in range(11))


@dataclass(frozen=True)
class System:
    """What a system's map is made of.

    Attributes:
        flow: the backbone that its flows sit on, ``finetuned`` or ``pretrained``; None without
            flows.
        classifier: whether the pixelwise classifier takes part.
        about: one line for tables.
    """

    flow: str | None
    classifier: bool
    about: str


SYSTEMS: dict[str, System] = {
    "classifier": System(None, True, "pixelwise classifier on its finetuned backbone"),
    "flow": System("finetuned", False, "flows on the finetuned backbone"),
    "fused": System(
        "finetuned", True, "the method: flows and classifier on one finetuned backbone"
    ),
    "cflow": System("pretrained", False, "baseline: flows on the pretrained backbone"),
    "fused_unshared": System(
        "pretrained",
        True,
        "ablation: flows on the pretrained backbone, classifier on its finetuned copy",
    ),
}


@dataclass(frozen=True)
class Candidate:
    """One way to run a system.

    Attributes:
        epoch: joint epochs of the classifier; None without one.
        depth: coupling blocks of the flows; None without flows.
        weight: fusion weight; 0 for flows alone, 1 for the classifier alone.
        score_weight: fusion weight of the map that image scores are taken from; None for `weight`.
    """

    epoch: int | None
    depth: int | None
    weight: float
    score_weight: float | None = None


@dataclass(frozen=True)
class Parts:
    """Score maps of the same images, (N, H, W) each.

    Attributes:
        classifier: by number of joint epochs.
        density: by backbone (``finetuned``, ``pretrained``) and depth.
        smoothing: of the fused map, sigma in pixels.
    """

    classifier: dict[int, Tensor]
    density: dict[tuple[str, int], Tensor]
    smoothing: float

    def map_of(self, system: System, candidate: Candidate) -> Tensor:
        """A system's map under a candidate, (N, H, W)."""
        density = (
            self.density[system.flow, candidate.depth]
            if system.flow and candidate.depth is not None
            else None
        )
        classifier = None if candidate.epoch is None else self.classifier[candidate.epoch]
        if density is None or classifier is None:  # of one map, any weight gives that map
            density = classifier = density if classifier is None else classifier
        assert density is not None
        assert classifier is not None
        return fuse(density, classifier, candidate.weight, self.smoothing)

    def scored_map_of(self, system: System, candidate: Candidate) -> Tensor:
        """The map that a system's image scores are taken from, (N, H, W)."""
        weight = candidate.weight if candidate.score_weight is None else candidate.score_weight
        return self.map_of(system, replace(candidate, weight=weight))


def last_candidate(
    system: System, epochs: int, depth: int, weight: float, score_weight: float | None = None
) -> Candidate:
    """What the settings alone name: everything trained to its end, the fusion weight as it is set."""
    if system.flow is None:
        return Candidate(epochs, None, 1.0)
    return (
        Candidate(epochs, depth, weight, score_weight)
        if system.classifier
        else Candidate(None, depth, 0.0)
    )


def part_candidates(
    system: System, epochs: Sequence[int], depths: Sequence[int]
) -> list[Candidate]:
    """Candidates of a system without fusion: each epoch of the classifier, or each depth of the
    flows.
    """
    if system.flow is None:
        return [Candidate(epoch, None, 1.0) for epoch in epochs]
    return [Candidate(None, depth, 0.0) for depth in depths]


def fused_candidates(
    epochs: Sequence[int], depths: Sequence[int], weight: float
) -> list[Candidate]:
    """Candidates of a fused system: every fusion weight for the parts trained to their end, and for
    those that validation prefers.

    Args:
        epochs, depths: the preferred one and the last one.
        weight: the settings' own fusion weight.
    """
    pairs = dict.fromkeys(zip(epochs, depths, strict=True))
    return [
        Candidate(epoch, depth, w) for epoch, depth in pairs for w in sorted({*WEIGHTS, weight})
    ]
