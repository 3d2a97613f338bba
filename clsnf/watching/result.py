"""What is said about one picture, as every output says it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["ok", "ng"]


@dataclass(frozen=True)
class Result:
    """The verdict on one picture. ``ng`` is "not ok": a defect, or what could not be judged.

    Attributes:
        id: unique among all results; of two results of one state, the later one is greater.
        at: when it was judged, UTC, ISO 8601 to the millisecond.
        source: path of the file, or name of the camera.
        frame: number of the frame since the start, from 0; None for a file.
        verdict: ``ok`` or ``ng``.
        score: of the picture in [0, 1]; None where it could not be judged.
        threshold: scores above it are defects.
        p_value: of the score among the validation normals; None where it could not be judged.
        category: the product that the model was trained on.
        model_version: of the saved detector, 12 hex digits.
        milliseconds: that reading and judging took.
        reason: why the picture could not be judged; None where it was.
        size: of the file in bytes; None for a frame.
        mtime_ns: time of the file's last change, in nanoseconds since 1970; None for a frame.
    """

    id: str
    at: str
    source: str
    frame: int | None
    verdict: Verdict
    score: float | None
    threshold: float
    p_value: float | None
    category: str
    model_version: str
    milliseconds: float
    reason: str | None = None
    size: int | None = None
    mtime_ns: int | None = None

    def to_plain(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """As one line of JSON."""
        # ASCII alone: names of files need not be valid text.
        return json.dumps(self.to_plain(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """The result that :meth:`to_json` wrote, also that of a newer version."""
        return cls(**{name: value for name, value in json.loads(text).items() if name in FIELDS})

    @property
    def line(self) -> str:
        """The result for people, in one line."""
        picture = self.source if self.frame is None else f"{self.source} frame {self.frame}"
        score = "-" if self.score is None else f"{self.score:.4f}"
        reason = f"  ({self.reason})" if self.reason else ""
        return f"{self.at}  {self.verdict}  {score}  {picture}{reason}"


FIELDS = tuple(field.name for field in dataclasses.fields(Result))


class Judgement(NamedTuple):
    """A result with what it was made from.

    Attributes:
        result: the verdict.
        image: (h, w, 3) uint8 RGB; None where it could not be read.
        score_map: (h, w) float32 in [0, 1]; None where there is none or nobody asked for it.
    """

    result: Result
    image: NDArray[np.uint8] | None = None
    score_map: NDArray[np.float32] | None = None


def now() -> str:
    """The time in UTC as ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
