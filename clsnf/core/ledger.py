"""The ledger ``ledger.jsonl``: when test images were read, and what for. Lines are only added."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path


def now() -> str:
    """The time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def record_unlock(folder: Path, category: str, purpose: str) -> None:
    """Record that a category's test images are about to be read."""
    entry = {"at": now(), "category": category, "opened": "test images", "for": purpose}
    with (folder / "ledger.jsonl").open("a") as ledger:
        ledger.write(json.dumps(entry) + "\n")
