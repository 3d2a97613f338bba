"""A backbone's trial says what it found, whatever happens to its process."""

import multiprocessing
import os
import signal

from clsnf.core.config import DetectorSettings, replaced
from clsnf.serving.try_backbone import STEPS, TrialStep, try_backbone


def settings_of(name: str, levels: list[int] | None = None) -> DetectorSettings:
    values = {"backbone.name": name, "backbone.levels": levels}
    return replaced(DetectorSettings(), {"image.height": 64, "image.width": 64, **values})


def test_a_backbone_that_works_passes_every_step() -> None:
    seen: list[TrialStep] = []
    trial = try_backbone(settings_of("test_resnet"), formats=[], on_step=seen.append)
    assert trial.fault is None
    assert tuple(step.name for step in trial.steps) == STEPS
    assert seen == list(trial.steps)
    assert "random weights" in trial.steps[0].found
    peaks = [step.peak_bytes for step in trial.steps]
    assert peaks == sorted(peaks)


def test_a_refusal_is_told_from_a_fault() -> None:
    trial = try_backbone(settings_of("test_resnet", [1, 9]))
    assert trial.fault is not None
    assert (trial.fault.step, trial.fault.refused) == ("load", True)
    assert "levels 0 to 4" in trial.fault.reason


def test_a_process_that_dies_is_a_fault_of_its_step() -> None:
    def end_it(_: object) -> None:
        (child,) = multiprocessing.active_children()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)  # nothing more is reported before it dies
        os.kill(child.pid, signal.SIGKILL)

    trial = try_backbone(settings_of("test_resnet"), formats=[], on_step=end_it)
    assert trial.fault is not None
    assert "died by SIGKILL" in trial.fault.reason
    assert not trial.fault.refused


def test_a_trial_that_takes_too_long_is_ended() -> None:
    trial = try_backbone(settings_of("test_resnet"), time_limit=0.01)
    assert trial.fault is not None
    assert trial.fault.step == "load"
    assert "longer than 0.01 s" in trial.fault.reason
    assert multiprocessing.active_children() == []
