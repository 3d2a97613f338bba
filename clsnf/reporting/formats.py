"""Numbers and names as people read them.

A value that is not finite, or not there, never looks like a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from clsnf.core import durations

ABSENT = "–"
METRIC_NAMES = {
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "image_f1_max": "Image F1-max (oracle)",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1_max": "Pixel F1-max (oracle)",
    "au_pro": "AU-PRO",
    "au_pro_05": "AU-PRO at 0.05",
    "au_spro": "AU-sPRO",
    "au_spro_05": "AU-sPRO at 0.05",
    "aupimo": "AUPIMO",
    "latency": "Latency",
}


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether it is a number with a finite value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, pattern: str) -> str:
    """A number in the format `pattern` (such as ``.3f``); words where it is not finite."""
    if value is None:
        return ABSENT
    if isinstance(value, float) and math.isnan(value):
        return "not a number"
    if isinstance(value, float) and math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    return format(value, pattern) if is_finite(value) else str(value)


def metric(value: Any) -> str:
    """The value of a metric in [0, 1]."""
    return number(value, ".3f")


def gain(value: Any) -> str:
    """A difference of two values of a metric, with its sign."""
    return number(value, "+.3f").replace("-", "−")


def percent(value: Any) -> str:
    """A share as a percentage, with two digits below ten percent."""
    if not is_finite(value):
        return number(value, "")
    return f"{100 * value:.0f} %" if value == 0 or abs(value) >= 0.0995 else f"{100 * value:.2g} %"


def interval(pair: Any, how: Any = metric) -> str:
    """An interval, such as ``0.912 to 0.987``."""
    return ABSENT if pair is None else f"{how(pair[0])} to {how(pair[1])}"


def duration(seconds: Any) -> str:
    """A duration in the unit that suits its length."""
    if not is_finite(seconds):
        return number(seconds, "")
    return f"{seconds:.1f} s" if seconds < 9.95 else durations.duration(seconds)


def setting(value: Any) -> str:
    """The value of a setting."""
    if isinstance(value, float):
        return number(value, ".3g")
    if isinstance(value, Mapping):  # of a joint choice
        return f"({settings(value)})"
    return ABSENT if value is None else str(value)


def settings(values: Mapping[str, Any]) -> str:
    """Settings in one line, such as ``flow_depth 4, fusion_weight 0.25``."""
    return ", ".join(f"{name} {setting(value)}" for name, value in values.items())


def metric_name(name: str) -> str:
    """The title of a metric."""
    return METRIC_NAMES.get(name, name.replace("_", " "))


def slug(name: str) -> str:
    """A name that may stand in an anchor or a file's name."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-").lower() or "x"


# Kind of a column (:class:`clsnf.reporting.blocks.Column`) -> how its values are shown.
FORMATS = {
    "text": lambda value: ABSENT if value is None else str(value),
    "count": lambda value: number(value, ",d" if isinstance(value, int) else ".0f"),
    "metric": metric,
    "gain": gain,
    "percent": percent,
    "seconds": duration,
    "setting": setting,
    "number": lambda value: number(value, ".4g"),
}
