"""The record of how an image was made (request and provenance), and its JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sdcli.errors import UsageError
from sdcli.io.json_files import parse_json
from sdcli.request.schema import GenerationRequest, parse_request

SCHEMA = 1
"""The version of the record's layout; the request inside has its own."""


@dataclass(frozen=True)
class Record:
    """How an image was made: the request as generated (no None, its own seed), and the facts of the run, JSON-ready.

    Provenance holds no times: the same request twice must give the same file.
    """

    request: GenerationRequest
    provenance: dict[str, Any]


def record_json(record: Record) -> str:
    """The record as one line of ASCII: `{"schema": 1, "request": {...}, "provenance": {...}}`."""
    whole = {"schema": SCHEMA, "request": record.request.typed(), "provenance": record.provenance}
    return json.dumps(whole, ensure_ascii=True, allow_nan=False)


def parse_record(text: str) -> Record:
    """Parse what `record_json` returned. Raises UsageError for a damaged record, and for one of a newer schema."""
    try:
        whole = parse_json(text, strict=True)
    except ValueError as error:
        raise UsageError(f"its sdcli record is damaged: {error}") from None
    if not isinstance(whole, dict) or not isinstance(whole.get("schema"), int):
        raise UsageError("its sdcli record is damaged: it is not an object with a schema number")
    if whole["schema"] != SCHEMA:
        raise UsageError(f"its sdcli record has schema {whole['schema']}, and this sdcli knows {SCHEMA}")
    request, provenance = whole.get("request"), whole.get("provenance")
    if not isinstance(request, dict) or not isinstance(provenance, dict):
        raise UsageError("its sdcli record is damaged: request and provenance should be objects")
    try:
        return Record(parse_request(request), provenance)
    except UsageError as error:
        raise UsageError(f"its sdcli record holds a request that is not valid: {error}") from None
