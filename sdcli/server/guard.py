"""What every request passes before any route: Host, Origin, token, content type and size. Pure ASGI.

A browser sends requests of any web page to this machine. Such a page is kept out by three checks: the Host header must
be an address of the server (against DNS rebinding), the Origin must be the server's own or one that the operator named
(against cross-site requests), and bodies must be JSON or form data of a route that takes them, so that no page can send
them without the browser asking first (no `text/plain`).
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdcli.server.dialects import ascii_json, dialect_of, error_body
from sdcli.server.page.files import is_page
from sdcli.server.settings import ServerSettings

log = logging.getLogger("sdcli.server.access")

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz"})
"""Answered without a token: they give nothing away; supervisors have none, and the web page asks for it."""
FORM_PATHS = frozenset({"/v1/images/edits"})
"""Where a body is form data with files; everywhere else it is JSON."""
FORM_KIND = "multipart/form-data"
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
"""What an X-Request-ID of a client may look like to be taken over."""
SIGNED_PATHS = ("/v1/images/files/",)
"""Answered without a token: the address itself was given to someone who had it, and cannot be guessed."""
METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class Refused(Exception):
    """A request that is not let in: an HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers or {}


class Guard:
    """Lets requests through to `app`, or answers them itself; gives each an id, and logs one line for it."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, on_answer: Callable[[int], None]) -> None:
        self._app, self._settings, self._on_answer = app, settings, on_answer
        self._hosts = _host_names(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        began, status = time.monotonic(), 0
        id = headers.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(id):
            id = f"req-{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = id

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self._extra_headers(id, headers.get("origin"))]
                if status == 413:  # or the rest of the body would be read
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, _bounded(receive, self._settings.max_body), sending)
        except Refused as refused:
            if status == 0:
                await _answer(sending, scope["path"], refused)
        finally:
            status = status or 499  # the client was gone before there was an answer
            self._on_answer(status)
            _log(scope, id, status, time.monotonic() - began, self._settings.log)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raise Refused for a request from where none should come."""
        if not self._is_own_host(_host_of(headers.get("host", ""))):
            raise Refused(403, "the Host header is not an address of this server; --allow-host NAME adds one")
        origin = headers.get("origin")
        if origin is not None and not self._same_origin(origin, headers["host"]):
            raise Refused(403, f"web pages of {origin!r} may not use this server; --allow-origin adds one")
        if origin is None and headers.get("sec-fetch-site") in {"cross-site", "same-site"} and scope["path"] != "/":
            raise Refused(403, "another web page may not use this server")
        if scope["method"] == "OPTIONS" and origin is not None:
            raise Refused(204, "")
        token = self._settings.token
        path: str = scope["path"]
        free = path in OPEN_PATHS or is_page(path) or path.startswith(SIGNED_PATHS)
        if token is not None and not free and not _token_matches(path, headers, token):
            scheme = 'Basic realm="sdcli"' if dialect_of(path) == "a1111" else "Bearer"
            raise Refused(401, "this server needs a token", {"www-authenticate": scheme})
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._settings.max_body:
            raise Refused(413, f"the body is larger than {self._settings.max_body} bytes")
        if scope["method"] in METHODS_WITH_BODY and (length != "0" or "transfer-encoding" in headers):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            what, wanted = ("a form", FORM_KIND) if path in FORM_PATHS else ("JSON", "application/json")
            if kind != wanted:
                raise Refused(415, f"the body should be {what} (Content-Type: {wanted})")

    def _is_own_host(self, host: str) -> bool:
        """Whether a Host header means this server. A name of an attacker can point here, an address cannot."""
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host in self._hosts
        return host in self._hosts or address.is_loopback or not self._settings.loopback

    def _same_origin(self, origin: str, host: str) -> bool:
        return origin in self._settings.origins or _netloc_of(origin) == host.lower()

    def _extra_headers(self, id: str, origin: str | None) -> Iterable[tuple[bytes, bytes]]:
        yield b"x-request-id", id.encode()
        yield b"x-content-type-options", b"nosniff"
        yield b"cross-origin-resource-policy", b"same-origin"
        if origin is not None and origin in self._settings.origins:
            yield b"access-control-allow-origin", origin.encode("latin-1")
            yield b"access-control-allow-headers", b"authorization, content-type, last-event-id"
            yield b"access-control-allow-methods", b"GET, POST, DELETE"
            yield b"vary", b"origin"


def _host_names(settings: ServerSettings) -> frozenset[str]:
    """The names in Host headers that mean this server; an address that is not a wildcard is one of them."""
    own = {"localhost", "127.0.0.1", "::1"} if settings.loopback else set()
    named = {settings.host} - {"0.0.0.0", "::", ""}
    return frozenset(name.lower() for name in {*own, *named, *settings.hosts})


def _host_of(header: str) -> str:
    """The host of a Host header, without the port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _netloc_of(origin: str) -> str:
    """The host and port of an Origin header; empty, which is no server's, for one that is malformed."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _token_matches(path: str, headers: dict[str, str], token: str) -> bool:
    """Whether a request has the token: as a bearer, or in A1111's dialect as the password of any user name."""
    kind, _, given = headers.get("authorization", "").partition(" ")
    given = given.strip()
    if kind.lower() == "basic" and dialect_of(path) == "a1111":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except ValueError:
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(given.encode(), token.encode())


def _bounded(receive: Receive, limit: int) -> Receive:
    """`receive` that raises HTTPException when a body without an honest length passes the limit."""
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, f"the body is larger than {limit} bytes")
        return message

    return bounded


async def _answer(send: Send, path: str, refused: Refused) -> None:
    body = b"" if refused.status == 204 else ascii_json(error_body(path, refused.status, "refused", str(refused)))
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-should-retry": "false",
        **refused.headers,
    }
    await send(
        {
            "type": "http.response.start",
            "status": refused.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})


def _log(scope: Scope, id: str, status: int, seconds: float, form: str) -> None:
    """One line for a request; the path without its query, which may hold secrets."""
    client = scope.get("client")
    facts: dict[str, Any] = {
        "request": id,
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "ms": round(seconds * 1000, 1),
    }
    if form == "json":
        log.info(json.dumps(facts))
    else:
        log.info(
            "%s %s %r %s in %s ms (%s)", *(facts[name] for name in ("client", "method", "path", "status", "ms")), id
        )
