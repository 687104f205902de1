"""The routes of the page's files. They are the same for everybody, so they need no token."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter, Response

PREFIX = "/page/"
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def is_page(path: str) -> bool:
    """Whether a path of the server is the page or one of its files."""
    return path == "/" or path.startswith(PREFIX)


def page_routes() -> APIRouter:
    """The page at `/` and its files below `/page/`."""
    router = APIRouter(include_in_schema=False)
    for file in resources.files("sdcli.server.page").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in MEDIA_TYPES:
            _add(router, PREFIX + file.name, file.read_bytes(), MEDIA_TYPES[suffix])
    index = resources.files("sdcli.server.page").joinpath("index.html")
    _add(router, "/", index.read_bytes(), "text/html")
    return router


def _add(router: APIRouter, path: str, content: bytes, media_type: str) -> None:
    @router.get(path)
    async def answer() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)
