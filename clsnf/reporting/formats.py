"""Numbers and names as people read them. A figure that is not finite, or not there, never looks
like a number.
"""

from __future__ import annotations

import math
import re
from typing import Any, TypeGuard

ABSENT = "–"
FIGURE_NAMES = {
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "image_f1_max": "Image F1-max (oracle)",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1_max": "Pixel F1-max (oracle)",
    "au_pro": "AU-PRO",
    "au_pro_05": "AU-PRO at 0.05",
    "aupimo": "AUPIMO",
    "latency": "Latency",
}


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether it is a number with a finite value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, pattern: str) -> str:
    """A number as `pattern` (such as ``.3f``) has it; what is none is said in words."""
    if value is None:
        return ABSENT
    if isinstance(value, float) and math.isnan(value):
        return "not a number"
    if isinstance(value, float) and math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    return format(value, pattern) if is_finite(value) else str(value)


def figure(value: Any) -> str:
    """A figure in [0, 1]."""
    return number(value, ".3f")


def gain(value: Any) -> str:
    """A difference of figures."""
    return number(value, "+.3f").replace("-", "−")


def percent(value: Any) -> str:
    """A share as a percentage; below ten with two digits."""
    if not is_finite(value):
        return number(value, "")
    return f"{100 * value:.0f} %" if value == 0 or abs(value) >= 0.0995 else f"{100 * value:.2g} %"


def interval(pair: Any, how: Any = figure) -> str:
    """``0.912 to 0.987``."""
    return ABSENT if pair is None else f"{how(pair[0])} to {how(pair[1])}"


def duration(seconds: Any) -> str:
    """Seconds as people say them."""
    if not is_finite(seconds):
        return number(seconds, "")
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def setting(value: Any) -> str:
    """A searched value."""
    if isinstance(value, float):
        return number(value, ".3g")
    return ABSENT if value is None else str(value)


def figure_name(name: str) -> str:
    """A figure's name for people."""
    return FIGURE_NAMES.get(name, name.replace("_", " "))


def slug(name: str) -> str:
    """A name that may stand in an anchor or a file's name."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-").lower() or "x"


FORMATS = {
    "text": lambda value: ABSENT if value is None else str(value),
    "count": lambda value: number(value, ",d" if isinstance(value, int) else ".0f"),
    "figure": figure,
    "gain": gain,
    "percent": percent,
    "seconds": duration,
    "setting": setting,
    "number": lambda value: number(value, ".4g"),
}
