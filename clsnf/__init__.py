"""clsnf finds defects in pictures of products after seeing only good ones.

from clsnf import Detector
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clsnf.core.errors import ClsnfError

if TYPE_CHECKING:
    from clsnf.core.config import DetectorSettings
    from clsnf.detector import Detector

__version__ = "0.1.0"
__all__ = ["ClsnfError", "Detector", "DetectorSettings"]


def __getattr__(name: str) -> Any:
    """Import the detector on first use, so that ``clsnf --help`` does not wait for torch."""
    if name == "Detector":
        from clsnf.detector import Detector

        return Detector
    if name == "DetectorSettings":
        from clsnf.core.config import DetectorSettings

        return DetectorSettings
    raise AttributeError(f"module 'clsnf' has no attribute {name!r}")
