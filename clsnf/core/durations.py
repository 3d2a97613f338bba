"""Durations for people."""


def duration(seconds: float) -> str:
    """``40 s``, ``30 min``, ``1.5 h``: whole seconds and minutes, hours to a tenth."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{round(minutes / 60, 1):g} h"
