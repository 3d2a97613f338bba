"""Beginning where an earlier study ended: its best points are tried first.

Their figures are not taken over: they were measured with other pictures, perhaps, or another
version. Trying them again costs little where nothing changed, and says the truth where something
did.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clsnf.core.errors import DataError

_MOST = 3
_PREFIX = "config/"


def warm_values(folder: Path | None, categories: Sequence[str]) -> list[dict[str, Any]]:
    """The best points of the categories' trials in an earlier study, best first, at most three a
    category.

    Args:
        folder: of the earlier study; None for none.
        categories: whose trials; a category that it did not have gives none.

    Raises:
        DataError: the folder holds no study's trials.
    """
    if folder is None:
        return []
    path = folder / "trials.parquet"
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{folder} holds no trials of an earlier study to start from (no readable "
            "trials.parquet)."
        ) from error
    values: list[dict[str, Any]] = []
    for category in categories:
        own = [row for row in rows if row["category"] == category and row["status"] == "finished"]
        best = sorted(own, key=lambda row: -row["objective"])[:_MOST]
        values += [
            {
                k.removeprefix(_PREFIX): v
                for k, v in row.items()
                if k.startswith(_PREFIX) and v is not None
            }
            for row in best
        ]
    return values
