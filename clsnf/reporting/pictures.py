"""Pictures as data URIs, within a budget: a page that carries all of them must open at once."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clsnf.reporting.study_files import Product

MOST_BYTES = 15_000_000  # of all pictures, as the page holds them
_MEDIA_TYPES = {".webp": "image/webp", ".png": "image/png", ".jpg": "image/jpeg"}


class PictureBudget:
    """Decides how many cases of each kind are shown: the same number for every product.

    Args:
        products: whose pictures are to be shown.
        most_bytes: limit for all data URIs together.

    Attributes:
        cases_per_kind: how many cases of each kind fit, 1 at least.
    """

    def __init__(self, products: Sequence[Product], most_bytes: int = MOST_BYTES) -> None:
        # Rank of a case among those of its kind -> bytes of the data URIs over all products.
        sizes: Counter[int] = Counter()
        for product in products:
            ranks: Counter[str] = Counter()
            for case in product.cases:
                ranks[case.kind] += 1
                files = [product.pictures / Path(name).name for name in case.files.values()]
                size = sum(file.stat().st_size for file in files if file.is_file())
                sizes[ranks[case.kind]] += size * 4 // 3
        total, self.cases_per_kind = 0, 1
        for rank in sorted(sizes):
            total += sizes[rank]
            if total <= most_bytes:
                self.cases_per_kind = rank


def data_uri(path: Path) -> str:
    """A picture as ``data:image/webp;base64,...``; empty where the file can't be read."""
    media_type = _MEDIA_TYPES.get(path.suffix)
    if media_type is None:
        return ""
    try:
        return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError:
        return ""
