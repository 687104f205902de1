"""The decoder of texts: every encoding that tells itself gives the text, everything else a sentence with the byte."""

from __future__ import annotations

import codecs
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcli.io.rows import text_lines
from sdcli.io.text import CHUNK, NotText, decode_text, utf8_stream

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\r\t"))
MARKS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
encodings = st.sampled_from(list(MARKS))


def encoded(text: str, encoding: str) -> bytes:
    return MARKS[encoding] + text.encode(encoding)


def check_round_trip(text: str, encoding: str) -> None:
    if encoding == "utf-8":
        text = text.removeprefix("\ufeff")
    data = encoded(text, encoding)
    assert decode_text(data) == text
    plain = utf8_stream(io.BytesIO(data)).read().decode("utf-8-sig")
    assert plain == text


def check_any_bytes(data: bytes) -> None:
    """Text, or a sentence with a byte within the data; the stream never has a character that decoding refuses."""
    text, wrong = "", -1
    try:
        text = decode_text(data)
    except NotText as problem:
        wrong = problem.byte
    assert -1 <= wrong < max(1, len(data))
    assert "\0" not in text
    if wrong < 0:
        assert utf8_stream(io.BytesIO(data)).read().decode().lstrip("\ufeff") == text.lstrip("\ufeff")


@given(texts, encodings)
def test_a_text_in_any_encoding_that_tells_itself_is_that_text(text: str, encoding: str) -> None:
    check_round_trip(text, encoding)


@given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda data: codecs.BOM_UTF16_LE + data))
def test_any_bytes_are_text_or_a_sentence_with_the_byte(data: bytes) -> None:
    check_any_bytes(data)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"caf\xe9", "is not UTF-8 text (byte 3)"),
        ("a kettle".encode("utf-16-le"), "holds a NUL character (byte 1)"),
        ("кот".encode("utf-16-le"), "holds the control character U+0004 (byte 1)"),
        (codecs.BOM_UTF16_LE + b"a\0\0\xd8", "is not UTF-16 text (byte 4)"),
        (codecs.BOM_UTF16_BE + b"\0a\0", "is not UTF-16 text (byte 4)"),
        (b"one\0two", "holds a NUL character (byte 3)"),
        (codecs.BOM_UTF32_LE + b"a\0\0\0\xff\xff\xff\xff", "is not UTF-32 text (byte 8)"),
    ],
)
def test_what_is_no_text_is_named_with_its_byte(data: bytes, sentence: str) -> None:
    with pytest.raises(NotText) as found:
        decode_text(data)
    assert str(found.value) == sentence


def test_a_long_file_of_utf16_is_read_line_by_line_across_its_chunks() -> None:
    lines = [f"{number} 🐈 кот {'x' * (1 + number % 97)}" for number in range(3 * CHUNK // 100)]
    data = "".join(f"{line}\r\n" for line in lines).encode("utf-16")
    assert len(data) > 2 * CHUNK
    assert [line.text for line in text_lines(utf8_stream(io.BytesIO(data)))] == lines


def test_half_a_character_at_the_end_of_a_stream_costs_its_line_only() -> None:
    data = "one\ntwo\n".encode("utf-16") + b"\x41"
    found = list(text_lines(utf8_stream(io.BytesIO(data)), utf8=True))
    assert [line.text for line in found] == ["one", "two", ""]
    assert found[-1].problem == "is not UTF-8 text"


@pytest.mark.slow
@settings(max_examples=3000)
@given(texts, encodings)
def test_thousands_of_texts(text: str, encoding: str) -> None:
    check_round_trip(text, encoding)


@pytest.mark.slow
@settings(max_examples=3000)
@given(st.binary(max_size=60))
def test_thousands_of_bytes(data: bytes) -> None:
    check_any_bytes(data)
