"""What streams did in a study, for its summary and its table: sums of what every trial reports of
its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

STEPS = ("read", "decode", "defects")


def streamed(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of trials' records: images that came to training, seconds that it waited for them, and a
    worker's images a second at each step.
    """
    sums: dict[str, float] = {}
    for record in records:
        for name, value in record["figures"].items():
            if name.startswith("stream_") and value is not None:
                sums[name] = sums.get(name, 0) + value
    pace = {
        step: sums[f"stream_{step}_images"] / sums[f"stream_{step}_seconds"]
        for step in STEPS
        if sums.get(f"stream_{step}_seconds")
    }
    return {
        "images": int(sums.get("stream_images", 0)),
        "waited_seconds": sums.get("stream_waited", 0.0),
        "images_per_second": pace,
    }
