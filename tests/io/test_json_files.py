"""JSON from outside: whatever is wrong with it, there is one kind of error and a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdcli.errors import BadWeights, NotFound
from sdcli.io.json_files import MAX_BYTES, parse_json, parse_object, read_json_list, read_json_object


@pytest.mark.parametrize("text", ["{oops", b"\xff", "[" * 100_000, b"[" * 100_000, "", "[1] 2"])
@pytest.mark.parametrize("strict", [False, True])
def test_what_is_not_json_is_a_value_error(text: str | bytes, strict: bool) -> None:
    with pytest.raises(ValueError, match=r"Exp|Extra|decode|nested"):
        parse_json(text, strict=strict)


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", "1e999", "[" * 65 + "]" * 65])
def test_strict_json_has_finite_numbers_and_a_limited_depth(text: str) -> None:
    parse_json(text)
    with pytest.raises(ValueError, match=r"not JSON|too large|nested"):
        parse_json(text, strict=True)


def test_an_object_is_no_list() -> None:
    assert parse_object('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="a list"):
        parse_object("[1]")


def test_a_missing_file_has_a_sentence_or_a_default(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(NotFound, match=r"no file .*config\.json; the model is incomplete"):
        read_json_object(path)
    with pytest.raises(NotFound, match="the tokenizer needs it"):
        read_json_list(path, missing="the tokenizer needs it")
    assert read_json_object(path, default={"a": 1}) == {"a": 1}
    assert read_json_list(path, default=[]) == []


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for data, reason in (
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b" " * (MAX_BYTES + 1), "larger than any configuration"),
        (b"[]", "should hold a JSON object"),
    ):
        path.write_bytes(data)
        with pytest.raises(BadWeights, match=rf"config\.json.*{reason}"):
            read_json_object(path, default={})
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(path) == {"a": 1}
    assert read_json_object(path, max_bytes=11) == {"a": 1}
    with pytest.raises(BadWeights, match="larger"):
        read_json_object(path, max_bytes=10)
