"""How a watch stands: what its heartbeat says on standard error, over MQTT and over Modbus."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Condition = Literal["ready", "away", "failing", "stalled", "stopped"]
# The numbers that a PLC reads.
CODES: dict[Condition, int] = {"stopped": 0, "ready": 1, "away": 2, "failing": 3, "stalled": 4}


@dataclass(frozen=True)
class Status:
    """A moment of a watch; counts are since its start.

    Attributes:
        at: UTC, ISO 8601.
        condition: ``ready``; ``away``: the source gives no pictures for now; ``failing``: the model
            failed on the last picture; ``stalled``: a picture has taken too long, or its result
            can't be stored; ``stopped``.
        reason: why it is not ready; empty where it is.
        judged: results, of which `ok`, `ng`, and among the latter `unjudged`.
        waiting: pictures that wait to be judged.
        overloaded: more pictures wait than may: the others stay in the folder.
        dropped: frames that came while another was judged.
        spooled, lost, refused: results that wait for an output, that had to be dropped because too
            many waited, and that its receiver did not take; by the output's name.
    """

    at: str
    condition: Condition
    reason: str = ""
    judged: int = 0
    ok: int = 0
    ng: int = 0
    unjudged: int = 0
    waiting: int = 0
    overloaded: bool = False
    dropped: int = 0
    spooled: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dataclasses.asdict(self)

    @property
    def line(self) -> str:
        """The status for people, in one line."""
        condition = f"{self.condition} ({self.reason})" if self.reason else self.condition
        more = " or more" if self.overloaded else ""
        text = (
            f"heartbeat: {condition}; {self.judged} judged: {self.ok} ok, {self.ng} ng "
            f"({self.unjudged} could not be judged); {self.waiting}{more} waiting"
        )
        if self.dropped:
            text += f"; {self.dropped} frames dropped"
        for what, numbers in (
            ("waiting for", self.spooled),
            ("lost for", self.lost),
            ("refused by", self.refused),
        ):
            text += "".join(f"; {n} {what} {name}" for name, n in numbers.items() if n)
        return text
