"""From blocks to one HTML file that carries all it needs: styles, scripts, Plotly, pictures.

The page forbids itself the network. Its content-security policy allows no address, and only the
scripts whose hashes it lists. A text in a user's data could not run even if it were not escaped; it
is, by Jinja's autoescaping.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clsnf.reporting import formats


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("clsnf.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(formats.FORMATS)
    environment.filters |= {
        "interval": formats.interval,
        "slug": formats.slug,
        "json": script_json,
        "finite": formats.is_finite,
    }
    return environment


def script_json(content: Any) -> Markup:
    """JSON for a script element, which no text in it can end; what is not finite becomes null."""
    text = json.dumps(_finite(content), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def render(template: str, **content: Any) -> str:
    """Fill a template of ``clsnf/reporting/templates``.

    Args:
        template: its file's name.
        content: its variables.
    """
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), _asset("report.js")]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {hashes}"
    )
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(_asset("report.css")),
            scripts=[Markup(script) for script in scripts],
            policy=Markup(policy),
            **content,
        )
    )


def _asset(name: str) -> str:
    return (resources.files("clsnf.reporting") / "templates" / name).read_text(encoding="utf-8")
