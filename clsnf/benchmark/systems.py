"""The five systems, and the candidates of each.

A candidate is one way to run a system. Selection chooses one on the validation defects
(``selected``), the settings name one (``last``), and an oracle takes the best one on the test
images, metric by metric. All three choose from the same candidates. What the oracle gains is what a
paper gains that reports the best epoch on the test set.

Source: S. Oh and J. Kim, IEEE Access 12 (2024), for the method and its ablation; Gudovskiy et al.,
WACV 2022, for the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from clsnf.core.config import FlowSettings, Fusion
from clsnf.model.score_maps import Scores
from clsnf.training.pipeline import ScoreMaps

# Fusion weights that fused systems choose from, beside the settings' own.
WEIGHTS = tuple(round(0.1 * step, 1) for step in range(11))
METHOD = "fused"  # the system that all others are compared with


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

    @property
    def is_fused(self) -> bool:
        """Whether it has both flows and the classifier."""
        return self.flow is not None and self.classifier


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
        joint_epochs: of the classifier; None without one.
        depth: coupling blocks of the flows; None without flows.
        fusion_weight: 0 for flows alone, 1 for the classifier alone.
        score_weight: fusion weight of the map that image scores are taken from; None for
            `fusion_weight`.
    """

    joint_epochs: int | None
    depth: int | None
    fusion_weight: float
    score_weight: float | None = None


@dataclass(frozen=True)
class ComponentMaps:
    """Score maps of the same images, (N, H, W) each, that all systems are made of.

    Attributes:
        classifier: by number of joint epochs.
        density: by backbone (``finetuned``, ``pretrained``) and depth.
        valid: (N, H, W) bool, False on padding; None where there is none.
        smoothing: of the fused map, sigma in pixels.
    """

    classifier: dict[int, Tensor]
    density: dict[tuple[str, int], Tensor]
    valid: Tensor | None
    smoothing: float

    def pair(self, system: System, candidate: Candidate) -> ScoreMaps:
        """Both maps of a candidate; a system with one map has it twice."""
        density = classifier = None
        if system.flow is not None and candidate.depth is not None:
            density = self.density[system.flow, candidate.depth]
        if candidate.joint_epochs is not None:
            classifier = self.classifier[candidate.joint_epochs]
        if density is None or classifier is None:  # fused with itself, a map stays what it is
            density = classifier = density if classifier is None else classifier
        assert density is not None
        assert classifier is not None
        return ScoreMaps(density, classifier, self.smoothing)

    def scores(self, system: System, candidate: Candidate) -> Scores:
        """A candidate's maps and image scores."""
        fusion = Fusion(candidate.fusion_weight, candidate.score_weight, self.smoothing)
        return self.pair(system, candidate).scores(fusion, self.valid)


def candidate_depths(flow: FlowSettings) -> list[int]:
    """Depths of the flows to choose from.

    Flows that start from the data are a density before training, too.
    """
    return [0, flow.depth] if flow.start == "data" and flow.depth else [flow.depth]


def last_candidate(
    system: System,
    joint_epochs: int,
    depth: int,
    fusion_weight: float,
    score_weight: float | None = None,
) -> Candidate:
    """What the settings name: everything trained to its end, the fusion weights as they are set."""
    if system.flow is None:
        return Candidate(joint_epochs, None, 1.0)
    if not system.classifier:
        return Candidate(None, depth, 0.0)
    return Candidate(joint_epochs, depth, fusion_weight, score_weight)


def single_candidates(
    system: System, joint_epochs: Sequence[int], depths: Sequence[int]
) -> list[Candidate]:
    """Candidates of a system with one map: each epoch of the classifier, or each depth of the
    flows.
    """
    if system.flow is None:
        return [Candidate(epochs, None, 1.0) for epochs in joint_epochs]
    return [Candidate(None, depth, 0.0) for depth in depths]


def fused_candidates(
    joint_epochs: Sequence[int], depths: Sequence[int], fusion_weight: float
) -> list[Candidate]:
    """Candidates of a fused system: every fusion weight, for two pairs of epochs and depth.

    Args:
        joint_epochs, depths: each first what validation prefers, then the last one.
        fusion_weight: the settings' own, tried beside :data:`WEIGHTS`.
    """
    pairs = dict.fromkeys(zip(joint_epochs, depths, strict=True))
    weights = sorted({*WEIGHTS, fusion_weight})
    return [Candidate(epochs, depth, weight) for epochs, depth in pairs for weight in weights]
