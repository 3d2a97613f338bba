"""What all charts share. Charts are Plotly figures in plain types, told apart by marker, dash and
place as well as by colour.

Unusual: no colour is named here. ``@1`` to ``@5``, ``@ink``, ``@muted`` are looked up in the page's
    palette (``report.js``) when a chart is
drawn, which follows the reader's light or dark screen. Texts from the user's data pass
:func:`shown`, because Plotly takes tags in texts for markup.
"""

from __future__ import annotations

import html
from typing import Any

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
_COLOURS = ("@1", "@2", "@3", "@4", "@5", "@ink")


def shown(text: Any) -> str:
    """A text from outside, for Plotly: it decodes entities and takes tags for markup."""
    return html.escape(str(text), quote=False)


def style(index: int) -> dict[str, str]:
    """Colour, dash and marker of the index-th of several things."""
    return {
        "colour": _COLOURS[index % len(_COLOURS)],
        "dash": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title}, **more}


def rule(name: str, value: float) -> dict[str, Any]:
    """A dashed line across the chart at a value of an axis."""
    other = "y" if name == "x" else "x"
    line = {"color": "@ink", "dash": "dash", "width": 1.5}
    return {
        "type": "line",
        f"{name}0": value,
        f"{name}1": value,
        f"{other}0": 0,
        f"{other}1": 1,
        f"{other}ref": "paper",
        "line": line,
    }
