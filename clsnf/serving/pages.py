"""The pages for people: the one that inspects pictures, and the interface's documentation."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles

DOCS_STATIC = "/docs-static"
# The pages load nothing from another host, and stand in no other page's frame.
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def add_pages(app: FastAPI) -> None:
    """Add ``/``, its files below ``/page``, and ``/docs``."""
    folder = resources.files("clsnf.serving") / "page"
    index = (folder / "index.html").read_text(encoding="utf-8")
    app.mount("/page", StaticFiles(directory=str(folder)), name="page")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _page(index)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        root = request.scope.get("root_path", "")
        html = get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title=f"{app.title}: interface for programs",
            swagger_js_url=f"{root}{DOCS_STATIC}/swagger-ui-bundle.js",
            swagger_css_url=f"{root}{DOCS_STATIC}/swagger-ui.css",
            swagger_favicon_url=f"{root}/page/icon.svg",
        )
        return _page(bytes(html.body).decode())


def _page(html: str) -> Response:
    """A page that may run the scripts within it, and no others."""
    digests = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in _INLINE_SCRIPT.findall(html)
    ]
    scripts = " ".join(["script-src 'self'", *(f"'sha256-{digest}'" for digest in digests)])
    headers = {"Content-Security-Policy": f"{_POLICY}; {scripts}", "Cache-Control": "no-cache"}
    return Response(html, media_type="text/html", headers=headers)
