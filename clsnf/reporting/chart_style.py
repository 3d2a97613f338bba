"""What all charts share: colours, markers, axes, texts.

Charts are Plotly figures in plain types. Marker, dash or place tells the parts of a chart apart as
well as colour does. Colours are names of the page's palette (``@1`` to ``@5``, ``@ink``,
``@muted``, ``@shade``, ``@clear``): ``report.js`` replaces them when it draws a chart, so that
charts follow a light or dark screen. Texts from the user's data pass :func:`escape`, because Plotly
reads tags in texts as markup.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
_COLOURS = ("@1", "@2", "@3", "@4", "@5", "@ink")


class Style(NamedTuple):
    """How one of several series looks."""

    colour: str
    dash: str
    marker: str


def style_of(index: int) -> Style:
    """The style of the index-th series."""
    return Style(
        _COLOURS[index % len(_COLOURS)],
        _DASHES[index % len(_DASHES)],
        _MARKERS[index % len(_MARKERS)],
    )


def escape(text: Any) -> str:
    """A text from outside, with nothing in it that Plotly reads as markup."""
    return html.escape(str(text), quote=False)


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title}, **more}


def scatter(
    name: str, x: Sequence[Any], y: Sequence[Any], *, mode: str = "markers", **more: Any
) -> dict[str, Any]:
    """A trace of points, lines or both; `more` are other attributes of Plotly's ``scatter``."""
    return {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y, **more}


def vertical_line(x: float, text: str) -> dict[str, Any]:
    """The part of a layout that draws a dashed line at `x`, with a text above it."""
    line = {"color": "@ink", "dash": "dash", "width": 1.5}
    ends = {"x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper"}
    label = {"x": x, "y": 1.01, "yref": "paper", "yanchor": "bottom", "showarrow": False}
    return {
        "shapes": [{"type": "line", **ends, "line": line}],
        "annotations": [{**label, "text": text}],
    }
