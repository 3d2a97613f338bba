"""What every process of a study knows: the driver makes it, trials and winners get it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from clsnf.core.config import DetectorSettings, StudySettings
from clsnf.core.hashing import content_key
from clsnf.results import TrialResult
from clsnf.streams.choice import StreamChoice
from clsnf.study.folder import StudyFolder


@dataclass(frozen=True)
class StudyContext:
    """A study as its workers need it.

    Attributes:
        folder: where the study's files are.
        settings: what every trial starts from.
        study: how to search.
        joint_epochs_choices: numbers of joint epochs that some trial may ask for.
        pruning_epochs: epochs after which a trial is compared with others, and stopped where it is
            far behind; empty where none is.
        fusion_weights: what each trial sweeps on its maps; the settings' own alone where the space
            has no fusion weight.
        textures: folder of texture pictures, or None.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        threads: CPU threads of a trial.
        stream: what brings the images to training.
    """

    folder: StudyFolder
    settings: DetectorSettings
    study: StudySettings
    joint_epochs_choices: tuple[int, ...]
    pruning_epochs: tuple[int, ...]
    fusion_weights: tuple[float, ...]
    textures: str | None
    device: str
    threads: int
    stream: StreamChoice = field(default_factory=lambda: StreamChoice("memory", ""))

    @property
    def sweeps(self) -> bool:
        """Whether the fusion weight is searched."""
        return self.fusion_weights != (self.settings.fusion_weight,)

    def selection_key(self, finished: Sequence[TrialResult]) -> str:
        """Hash of what decides a category's winner: its finished trials and how to choose."""
        study = self.study
        numbers = [trial.number for trial in finished]
        return content_key([numbers, study.selection, study.refine, list(study.objectives)])
