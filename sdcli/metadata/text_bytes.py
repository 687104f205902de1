"""Bytes of texts in image files -> text: the encodings that tools really write, or None where none is plausible."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

ByteOrder = Literal["<", ">"]

_LABELS = {b"UNICODE": "unicode", b"ASCII": "plain", b"JIS": "jis", b"": "plain"}
"""The names of encodings in the first 8 bytes of an EXIF UserComment, without their NULs."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_ACCENTED = re.compile(r"[¡-ÿ]{3,}")


def plain_text(data: bytes) -> str | None:
    """The text of a PNG's tEXt, a JPEG's comment or an EXIF field of type ASCII; None if it is no plausible text.

    PNG says Latin-1, EXIF ASCII; stable-diffusion.cpp and others write UTF-8 there. What is valid UTF-8 is not by
    accident valid UTF-8. Another encoding of an alphabet, read as Latin-1, has words of accented letters alone.
    """
    data = data.rstrip(b"\0").removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
        if re.search("[\x7f-\x9f]", text) or _has_foreign_word(text):
            return None
    return text if len(_CONTROL.findall(text)) * 20 <= len(text) else None


def utf8_text(data: bytes) -> str | None:
    """The text of a PNG's iTXt, which is UTF-8; what is not is read as `plain_text`."""
    try:
        return data.decode("utf-8").rstrip("\0")
    except UnicodeDecodeError:
        return plain_text(data)


def windows_text(data: bytes) -> str | None:
    """The text of Windows' EXIF fields (XPComment ...), UTF-16 in little-endian order; None if it is no text."""
    return _utf16(data, "<")


def user_comment(data: bytes, order: ByteOrder) -> str | None:
    """The text of an EXIF UserComment, where 8 bytes name the encoding, or do not; None if it is no plausible text.

    Behind UNICODE stands UTF-16 in either byte order (A1111 big-endian, SwarmUI little-endian), with or without a byte
    order mark, or UTF-8. `order` is the byte order of the EXIF data.
    """
    label = _LABELS.get(data[:8].rstrip(b"\0 ").upper()) if len(data) >= 8 else None
    if label is None:
        return _utf16(data, order) if b"\0" in data.rstrip(b"\0") else plain_text(data)
    body = data[8:]
    if label == "jis":
        try:
            return body.rstrip(b"\0").decode("iso2022_jp")
        except UnicodeDecodeError:
            return plain_text(body)
    if b"\0" in body.rstrip(b"\0"):
        return _utf16(body, order)
    text = plain_text(body)
    if label == "plain" or (text is not None and (text.isascii() or _is_utf8(body))):
        return text
    return _utf16(body, order)


def _has_foreign_word(text: str) -> bool:
    """Whether a text has what no language has that is written in Latin-1: a word without a letter of ASCII."""
    for match in _ACCENTED.finditer(text):
        letters = sum(letter.isalpha() for letter in match[0])
        around = text[max(0, match.start() - 1) : match.start()] + text[match.end() : match.end() + 1]
        alone = not any(letter.isalpha() for letter in around)
        if letters >= 2 and (alone or letters >= 4):
            return True
    return False


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _utf16(data: bytes, order: ByteOrder) -> str | None:
    """UTF-16 of either byte order: that of its mark, or the one that gives more ASCII, or else `order`."""
    data += b"\0" * (len(data) % 2)  # half a character: an EXIF field of type ASCII has lost its last NUL
    marks: dict[bytes, ByteOrder] = {b"\xff\xfe": "<", b"\xfe\xff": ">"}
    marked = marks.get(data[:2])
    if marked is not None:
        text = _decoded(data[2:], marked)
        return None if text is None else text.rstrip("\0")
    texts = {one: text for one in ("<", ">") if (text := _decoded(data, one)) is not None}
    scores = {one: _ascii_score(text) for one, text in texts.items()}
    if not scores:
        return None
    best = max(scores.values())
    winners = [one for one, score in scores.items() if score == best]
    text = texts[order if order in winners else winners[0]].rstrip("\0")
    if best == (False, 0) and any(unicodedata.category(letter) in ("Cn", "Co", "Cc") for letter in text):
        return None
    return text


def _decoded(data: bytes, order: str) -> str | None:
    try:
        return data.decode("utf-16-le" if order == "<" else "utf-16-be")
    except UnicodeDecodeError:
        return None


def _ascii_score(text: str) -> tuple[bool, int]:
    """How much a text looks like a record: whether A1111's or JSON's marks are in it, and how much is ASCII."""
    record = "Steps: " in text or text.lstrip().startswith(("{", "["))
    return record, sum(" " <= letter <= "~" or letter in "\t\r\n" for letter in text)
