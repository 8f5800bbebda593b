"""The page at `/`: files of this folder, nothing from outside."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

_FOLDER = Path(__file__).parent / "page"
_FILES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "column.js": "text/javascript",
    "service.js": "text/javascript",
    "trace.js": "text/javascript",
}
# The page loads its own files and talks to its own server, and nobody may frame it.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def page_routes() -> APIRouter:
    """`/`, and the files that it names."""
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page() -> Response:
        return _file("index.html")

    for name in _FILES:
        router.add_api_route(f"/page/{name}", _answering(name), methods=["GET", "HEAD"])
    return router


def _answering(name: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return _file(name)

    return answer


def _file(name: str) -> Response:
    return FileResponse(_FOLDER / name, media_type=_FILES[name], headers=_HEADERS)
