"""A backbone tried out: does it load, train, save, reload and export?

The trial is a small training on pictures drawn here. It runs in a process of its own with a time
limit, because a network that PyTorch can't run may take its process with it. The command
``clsnf backbones --check`` prints the steps, and a test tries one architecture of every family.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clsnf.core.config import DetectorSettings, replaced
from clsnf.core.errors import ClsnfError
from clsnf.data.images import write_image
from clsnf.serving.export import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

STEPS = ("load", "forward", "backward", "train", "save", "reload", "export")
# A training of seconds: what is tried is the way, not the figures.
_SMALL: dict[str, Any] = {
    "finetune.frozen_epochs": 1,
    "finetune.joint_epochs": 1,
    "finetune.decay_epochs": 1,
    "finetune.decoder_width": 16,
    "flow.depth": 1,
    "flow.passes": 0.2,
    "flow.condition_dims": 8,
    "flow.memory": 20,
    "flow.permutation": "hard",
}
_PICTURES = 8


@dataclass(frozen=True)
class TrialStep:
    """A step that worked.

    Attributes:
        name: one of :data:`STEPS`.
        seconds: that it took.
        peak_bytes: the most memory that the process has held so far.
        found: what there is to say about it; may be empty.
    """

    name: str
    seconds: float
    peak_bytes: int
    found: str


@dataclass(frozen=True)
class TrialFault:
    """Why a trial ended before its last step.

    Attributes:
        step: one of :data:`STEPS`.
        reason: one line.
        refused: clsnf said so itself; False: an error that it did not expect, a process that died
            or one that was ended because it took too long.
    """

    step: str
    reason: str
    refused: bool


@dataclass(frozen=True)
class BackboneTrial:
    """What was found: the steps that worked, and the fault that ended the trial, if one did."""

    steps: tuple[TrialStep, ...]
    fault: TrialFault | None


def try_backbone(
    settings: DetectorSettings,
    *,
    formats: Sequence[str] = tuple(FORMATS),
    time_limit: float = 600.0,
    on_step: Callable[[TrialStep], None] = lambda step: None,
) -> BackboneTrial:
    """Try the backbone of these settings in a process of its own, on the CPU.

    Args:
        settings: image and backbone are used as they are. Without ``backbone.weights``, the
            network gets random ones: nothing is fetched.
        formats: to export to, of :data:`clsnf.serving.export.FORMATS`.
        time_limit: seconds after which the process is ended.
        on_step: called after each step that worked.
    """
    context = multiprocessing.get_context("forkserver")
    # Children are forked from a process that has these, and no threads: they begin at once.
    context.set_forkserver_preload(["timm", "clsnf.detector", "clsnf.serving.export", __name__])
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="clsnf-try-") as folder:
        process = context.Process(
            target=_run, args=(settings, tuple(formats), Path(folder), theirs), daemon=True
        )
        process.start()
        theirs.close()
        steps: list[TrialStep] = []
        fault: TrialFault | None = None
        ends = time.monotonic() + time_limit
        try:
            while len(steps) < len(STEPS) and fault is None:
                if not ours.poll(max(0.0, ends - time.monotonic())):
                    reason = f"it took longer than {time_limit:g} s and was ended"
                    fault = TrialFault(STEPS[len(steps)], reason, False)
                    break
                message = ours.recv()
                if isinstance(message, TrialStep):
                    steps.append(message)
                    on_step(message)
                else:
                    fault = message
        except EOFError:
            process.join()
            fault = TrialFault(STEPS[len(steps)], _death(process.exitcode, Path(folder)), False)
        finally:
            process.kill()
            process.join()
            ours.close()
    return BackboneTrial(tuple(steps), fault)


def _death(exit_code: int | None, folder: Path) -> str:
    """How a process ended that was not meant to, with the last line that it wrote."""
    code = exit_code or 0
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    lines = (folder / "stderr.txt").read_text(errors="replace").strip().splitlines()
    return f"the process died {how}" + (f" ({lines[-1][:160]})" if lines else "")


def _run(
    settings: DetectorSettings, formats: tuple[str, ...], folder: Path, report: Connection
) -> None:
    """The trial's process."""
    import torch

    with (folder / "stderr.txt").open("w") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
        os.dup2(errors.fileno(), sys.stdout.fileno())
    # One thread: trials run side by side, and two of one network give the same bits.
    torch.set_num_threads(1)
    trial = _Trial(settings, formats, folder)
    for name in STEPS:
        begun = time.monotonic()
        try:
            found = getattr(trial, name)()
        except ClsnfError as error:
            report.send(TrialFault(name, _one_line(error), True))
            return
        except Exception as error:  # whatever timm, torch or an exporter raise: it is a finding
            report.send(TrialFault(name, f"{type(error).__name__}: {_one_line(error)}", False))
            import traceback

            traceback.print_exc()
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report.send(TrialStep(name, time.monotonic() - begun, peak, found))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


class _Trial:
    """The steps, in the order of :data:`STEPS`; each returns what there is to say."""

    def __init__(self, settings: DetectorSettings, formats: tuple[str, ...], folder: Path) -> None:
        self._folder = folder
        self._formats = formats
        self._settings = replaced(settings, _SMALL)

    def load(self) -> str:
        import timm
        import torch
        from safetensors.torch import save_file

        from clsnf.model.architectures import architecture_of
        from clsnf.model.backbone import load_backbone
        from clsnf.model.resolve import resolved

        said = ""
        if self._settings.backbone.weights is None and self._settings.backbone.name != "demo":
            name = architecture_of(self._settings.backbone)
            file = self._folder / f"{name}.safetensors"
            torch.manual_seed(0)
            state = timm.create_model(name, pretrained=False).state_dict()
            save_file({key: value.contiguous().clone() for key, value in state.items()}, file)
            self._settings = replaced(self._settings, {"backbone.weights": str(file)})
            said = "random weights; "
        self._settings = resolved(self._settings)
        self._backbone, _ = load_backbone(self._settings.backbone, self._settings.image.size)
        info = self._backbone.info
        maps = ", ".join(
            f"{c} x {h}x{w}" for c, (h, w) in zip(info.channels, info.grids, strict=True)
        )
        return f"{said}maps {maps}"

    def forward(self) -> str:
        import torch

        with torch.inference_mode():
            maps = self._backbone(self._random_images())
        if not all(bool(torch.isfinite(level).all()) for level in maps):
            raise ValueError("the maps hold values that are not finite")
        return ""

    def _random_images(self) -> Tensor:
        import torch

        images = torch.rand(4, 3, *self._settings.image.size)
        return images.contiguous(memory_format=torch.channels_last)

    def backward(self) -> str:
        """In float32, whatever this machine trains in: others train in float32."""
        import torch

        from clsnf.model.layers import to_channels_last

        to_channels_last(self._backbone)
        for _ in range(3):  # what writes beside its memory is rarely caught the first time
            torch.stack(
                [level.mean() for level in self._backbone(self._random_images())]
            ).sum().backward()
        return ""

    def train(self) -> str:
        from clsnf.data.layouts import read_normals
        from clsnf.data.splits import assign_splits
        from clsnf.detector import Detector

        del self._backbone
        table = assign_splits(read_normals(self._drawn()), 0.4, 0, minimum=2)
        self._detector = Detector.fit(table, self._settings, device="cpu")
        return ""

    def _drawn(self) -> Path:
        """A folder of pictures: stripes with noise, no two alike."""
        folder = self._folder / "pictures"
        folder.mkdir()
        rng = np.random.default_rng(0)
        rows, columns = np.mgrid[:96, :96]
        self._pictures = []
        for number in range(_PICTURES):
            stripes = 110 + 30 * np.sin(columns / 4 + rng.uniform(0, 6)) + 10 * np.cos(rows / 9)
            noisy = stripes[:, :, None] + rng.normal(0, 6, (96, 96, 3))
            self._pictures.append(np.clip(noisy, 0, 255).astype(np.uint8))
            write_image(folder / f"{number}.png", self._pictures[-1])
        return folder

    def save(self) -> str:
        self._detector.save(self._folder / "detector")
        size = sum(file.stat().st_size for file in (self._folder / "detector").iterdir())
        return f"{size / 1e6:.1f} MB"

    def reload(self) -> str:
        from clsnf.detector import Detector

        again = Detector.load(self._folder / "detector", "cpu")
        before = self._detector.predict(self._pictures)
        after = again.predict(self._pictures)
        if not np.array_equal(before.maps, after.maps):
            worst = float(np.abs(before.maps - after.maps).max())
            raise ValueError(f"the reloaded detector's maps differ by {worst:.2g}")
        if not np.isfinite(before.maps).all():
            raise ValueError("the detector's maps hold values that are not finite")
        self._detector = again
        return "bit for bit the same"

    def export(self) -> str:
        from clsnf.serving.export import export_detector

        said = []
        for kind in self._formats:
            file = self._folder / f"detector.{kind}"
            found = export_detector(self._detector, file, kind)
            said.append(f"{kind} differs by {found.difference:.1g}")
        return ", ".join(said)
