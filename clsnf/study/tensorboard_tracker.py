"""TensorBoard's files: a folder for each run below ``tune/tensorboard`` of the study's folder.

They are written without tensorboardX's ``SummaryWriter``, whose thread swallows a full disk and is
waited for at the end of the process.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

from clsnf.study.folder import StudyFolder
from clsnf.study.tracked_run import TrackedRun

_FOLDER = "tune/tensorboard"


class TensorBoardTracker:
    """Writes each run once, when it has ended; see :class:`clsnf.study.trackers.Tracker`.

    Args:
        folder: the study's.
    """

    place, batch = "TensorBoard", 50

    def __init__(self, folder: StudyFolder) -> None:
        import tensorboardX  # noqa: F401  takes seconds on a busy machine, and an interrupt has few

        self._folder = folder

    def send(self, runs: Sequence[TrackedRun]) -> None:
        """Write runs; a run that was half written is written anew."""
        for run in runs:
            if run.kind != "study":
                self._write(run)

    def _write(self, run: TrackedRun) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        name = f"{_FOLDER}/{run.name}"
        path = self._folder.path / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        writer = EventsWriter(str(path / "events"))
        try:
            for summary in _summaries(run):
                at = run.ended_at or time.time()
                writer.write_event(Event(wall_time=at, step=run.step, summary=summary))
        finally:
            writer.close()
        self._folder.publish(name)


def _summaries(run: TrackedRun) -> Iterator[Any]:
    """TensorBoard's protocol buffers: metrics, texts, and a line in its table of settings."""
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo
    from tensorboardX.summary import hparams, scalar, text

    for metric, value in run.metrics.items():
        yield scalar(metric, value)
    yield text("status", run.status)
    if run.cause is not None:
        yield text("cause", run.cause)
    settings = {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in run.config.items()
    }
    experiment, session, end = hparams(settings, run.metrics)
    if run.status == "failed":
        failure = HParamsPluginData(session_end_info=SessionEndInfo(status="STATUS_FAILURE"))
        end.value[0].metadata.plugin_data.content = failure.SerializeToString()
    yield from (experiment, session, end)
