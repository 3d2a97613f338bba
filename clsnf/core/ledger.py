"""The ledger: when test images were looked at, and what for. One line of JSON each, only ever added
to.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def record_unlock(folder: Path, category: str, purpose: str) -> None:
    """Write down that a category's test images are about to be looked at."""
    entry = {"at": now(), "category": category, "opened": "test images", "for": purpose}
    with (folder / "ledger.jsonl").open("a") as ledger:
        ledger.write(json.dumps(entry) + "\n")
