"""The error bodies of the dialects, by the path of the request: native, OpenAI's, and A1111's.

    native    {"error": {"type", "message", "param"}}
    OpenAI    {"error": {"message", "type", "param", "code"}}
    A1111     {"error", "detail", "body", "errors"}

Every failure of a path has the body of its dialect, whether a route, the validation, the guard or the router found it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi.responses import JSONResponse

from sdcli.errors import in_own_words

Dialect = Literal["native", "openai", "a1111"]

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    499: "cancelled_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_CODES = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}


def dialect_of(path: str) -> Dialect:
    """The dialect that is spoken under a path."""
    if path.startswith(("/sdapi/", "/internal/")):
        return "a1111"
    if path.startswith("/v1/") and not (path == "/v1/jobs" or path.startswith("/v1/jobs/")):
        return "openai"
    return "native"


def error_body(path: str, status: int, kind: str, sentence: str, param: str | None = None) -> dict[str, Any]:
    """The body of an answer that is an error. `kind` is a word for programs, `param` the field that is wrong."""
    match dialect_of(path):
        case "openai":
            type = _OPENAI_TYPES.get(status, "invalid_request_error")
            code = _CODES.get(status, kind) if kind in ("http", "refused") else kind
            return {"error": {"message": sentence, "type": type, "param": param, "code": code}}
        case "a1111":
            return {"error": kind, "detail": sentence, "body": param or "", "errors": sentence}
    return {"error": {"type": kind, "message": sentence, "param": param}}


class AsciiAnswer(JSONResponse):
    """JSON in ASCII: answers repeat texts that were sent, which may hold halves of characters."""

    def render(self, content: Any) -> bytes:
        return ascii_json(content)


def ascii_json(content: Any) -> bytes:
    """JSON in ASCII, which any text can be written in."""
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def error_answer(
    path: str,
    status: int,
    kind: str,
    sentence: str,
    *,
    param: str | None = None,
    retry_after: int | None = None,
    should_retry: bool = False,
    headers: Mapping[str, str] | None = None,
) -> AsciiAnswer:
    """An error in the dialect of a path.

    Client libraries send a failed request again unless told otherwise, which would generate the image again: so
    `x-should-retry` is always there, and is true only where nothing was generated and waiting helps.
    """
    own = {"x-should-retry": "true" if should_retry else "false"}
    if retry_after is not None:
        own["retry-after"] = str(retry_after)
    body = error_body(path, status, kind, sentence, param)
    return AsciiAnswer(body, status, headers={**(headers or {}), **own})


def validation_problem(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(field, sentence) of the first problem that pydantic has with a body."""
    first = errors[0]
    places = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    if first["type"] == "json_invalid":
        return "", f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    where = ".".join(places)
    if first["type"] == "extra_forbidden":
        return where, f"{where}: there is no such field here"
    if first["type"] == "missing":
        return where, f"{where}: is missing" if where else "the body is missing"
    message = in_own_words(first["msg"])
    return where, f"{where}: {message}" if where else message
