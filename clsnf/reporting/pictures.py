"""Pictures as data URIs, within a budget: a page that opens from disk must carry all of them, and
still open at once.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from clsnf.reporting.study_files import Product

MOST_BYTES = 15_000_000  # of all pictures, as the page holds them
_KINDS = {".webp": "image/webp", ".png": "image/png", ".jpg": "image/jpeg"}


class Budget:
    """Shares room for pictures out evenly: the same number of cases of each kind for every product.

    Args:
        products: whose pictures are to be shown.
        most: bytes of all data URIs.

    Attributes:
        cases_of_a_kind: how many cases of each kind fit, 1 at least.
    """

    def __init__(self, products: Sequence[Product], most: int = MOST_BYTES) -> None:
        sizes: dict[int, int] = {}  # place among the cases of its kind -> bytes over all products
        for product in products:
            seen: dict[str, int] = {}
            for case in product.facts.get("pictures") or []:
                place = seen[case["kind"]] = seen.get(case["kind"], 0) + 1
                files = [
                    product.pictures / Path(name).name
                    for name in (case.get("files") or {}).values()
                ]
                sizes[place] = (
                    sizes.get(place, 0)
                    + sum(f.stat().st_size for f in files if f.is_file()) * 4 // 3
                )
        total, self.cases_of_a_kind = 0, 1
        for place in sorted(sizes):
            total += sizes[place]
            if total <= most:
                self.cases_of_a_kind = place

    def data_uri(self, path: Path) -> str:
        """The file's content as ``data:image/webp;base64,...``; empty where it is gone."""
        kind = _KINDS.get(path.suffix)
        try:
            return (
                ""
                if kind is None
                else f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
            )
        except OSError:
            return ""
