"""Laws of reading other tools' records: what was written is read, or named; bytes that nobody wrote are no prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from sdcli.errors import BadImage
from sdcli.metadata.a1111 import read_a1111
from sdcli.metadata.invokeai_prompt import converted as from_compel
from sdcli.metadata.read import ImageInfo, read_image, read_tool_record
from sdcli.metadata.text_bytes import plain_text
from sdcli.request.lora_tags import read_tags
from sdcli.request.prompt_syntax import subprompts
from tests.metadata import foreign_writers as write
from tests.metadata.test_other_tools import as_the_text_keeps_it, names_a_negative

FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))

PIECES = [
    "a red fox", "灯台", "夕暮れ、", "лиса", "naïve", "🦊", "שלום", "\n", " ", ",", ":", '"', "'", "\\", "(", ")", "[",
    "]",
    "{", "}", "|", "<", ">", "=", "+", "-", "AND", "BREAK", "[a|b]", "[a:b:0.5]", "(fox:1.3)", "Steps: 3", "::", "\t",
    "<lora:x:1>", "Steps: 1, Sampler: X, Seed: 2, Size: 3x4", "Template: x", "embedding:y", "\x0b", "\u3000", "ÄÖÜ",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(
    st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"]), max_size=40
)


# A1111's text in every kind of bytes

PAIRS = {"Steps": 22, "Sampler": "Euler a", "CFG scale": 6.5, "Seed": 4242, "Size": "512x640", "Version": "v1.7.0"}
COMMENT_BYTES: dict[str, Callable[[str], bytes]] = {
    "UNICODE, big-endian": lambda text: b"UNICODE\0" + text.encode("utf-16-be"),
    "UNICODE, little-endian": lambda text: b"UNICODE\0" + text.encode("utf-16-le"),
    "UNICODE with a mark": lambda text: b"UNICODE\0\xff\xfe" + text.encode("utf-16-le") + b"\0\0",
    "UNICODE, UTF-8": lambda text: b"UNICODE\0" + text.encode(),
    "ASCII, UTF-8": lambda text: b"ASCII\0\0\0" + text.encode() + b"\0",
    "no name": lambda text: bytes(8) + text.encode(),
    "bare": lambda text: text.encode(),
}
WAYS = {
    **{
        f"{kind}, {code}": lambda text, kind=kind, code=code: write.png(  # type: ignore[misc]
            write.text_chunk("parameters", text.encode(code), kind)
        )
        for kind in ("tEXt", "zTXt", "iTXt", "iTXt packed")
        for code in ("utf-8", "latin-1")
    },
    "JPEG comment": lambda text: write.jpeg((0xFE, text.encode())),
    "ImageDescription": lambda text: write.with_exif("jpeg", write.exif({0x010E: (2, text.encode() + b"\0")}, {}, "<")),
    "XPComment": lambda text: write.with_exif("webp", write.exif({0x9C9C: (1, text.encode("utf-16-le"))}, {}, "<")),
}
CONTAINERS = st.sampled_from(sorted(WAYS)).map(WAYS.__getitem__) | st.builds(
    lambda encode, format, inner, kind, order: (
        lambda text: write.commented(encode(text), format=format, inner=inner, kind=kind, order=order)
    ),
    st.sampled_from(sorted(COMMENT_BYTES)).map(COMMENT_BYTES.__getitem__),
    st.sampled_from(["jpeg", "webp", "png"]),
    st.booleans(),
    st.sampled_from([1, 2, 7]),
    st.sampled_from(["<", ">"]),
)


def read(tmp_path: Path, data: bytes) -> ImageInfo:
    path = tmp_path / "image"
    path.write_bytes(data)
    return read_image(path)


def check_a1111(tmp_path: Path, prompt: str, negative: str, contained: Callable[[str], bytes]) -> None:
    assume(not names_a_negative(prompt) and not names_a_negative(negative))
    text = write.a1111(prompt, negative, PAIRS)
    try:
        data = contained(text)
    except UnicodeEncodeError:
        assume(False)
    if contained in (WAYS["tEXt, latin-1"], WAYS["zTXt, latin-1"], WAYS["iTXt, latin-1"], WAYS["iTXt packed, latin-1"]):
        assume(plain_text(text.encode("latin-1")) in (text, None))  # nobody can tell valid UTF-8 from Latin-1
    info = read(tmp_path, data)
    if info.request is None:
        assert any("in no encoding" in str(reason) for reason in info.unmapped.values())
        return
    tags = read_tags(as_the_text_keeps_it(prompt))
    assert info.parameters == text
    assert (info.request.seed, info.request.steps, info.request.scheduler) == (4242, 22, "euler-a")
    if not tags.loras and not tags.refused:
        assert info.request.prompt == as_the_text_keeps_it(prompt)
    else:
        assert read_tags(info.request.prompt).text == info.request.prompt
        assert len(info.request.loras) >= len(tags.loras)
    assert info.request.negative_prompt.replace("\\<", "<") == as_the_text_keeps_it(negative).replace("\\<", "<")
    assert info.unmapped.get("Version") == "v1.7.0"


@given(TEXTS, TEXTS, CONTAINERS)
@FEW
def test_a1111s_text_is_read_from_all_bytes(tmp_path: Path, prompt: str, negative: str, contained: Any) -> None:
    check_a1111(tmp_path, prompt, negative, contained)


@pytest.mark.slow
@given(TEXTS, TEXTS, CONTAINERS)
@MANY
def test_a1111s_text_is_read_from_all_bytes_many_times(
    tmp_path: Path, prompt: str, negative: str, contained: Any
) -> None:
    check_a1111(tmp_path, prompt, negative, contained)


# every parameter

KEYS = st.sampled_from(
    ["RNG", "ENSD", "Hires prompt", "Lora hashes", "ControlNet 0", "Model", "VAE", "ADetailer-x", "Ünit"]
)
VALUES = st.lists(
    st.sampled_from(["a", "b c", ",", ": ", "\n", '"', "\\", "Seed: 3", "Template: x", "灯台", "🦊", "(", "}", "1.5"]),
    min_size=1,
    max_size=5,
).map("".join)
JSON_VALUES = st.recursive(
    st.integers() | st.sampled_from(["a, b", "Seed: 3", '"', "]", "}", "\n"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "Steps: 9, "]), inner, max_size=2)
    ),
    max_leaves=5,
).filter(lambda value: isinstance(value, (list, dict)))
BEHIND = st.dictionaries(
    st.sampled_from(["Template", "Negative Template", "Note"]),
    st.sampled_from(["{a|b}", "x\ny z", "12, 3: x"]),
    max_size=3,
)


def check_parameters(more: dict[str, str], values: dict[str, Any], behind: dict[str, str]) -> None:
    """Each value, quoted or JSON, and each line behind is taken over or named, with the value that was written."""
    assume(all(value == value.strip() and not value.startswith('"') for value in more.values()))
    text = write.a1111("a fox", "", {**PAIRS, **more})
    text += "".join(f", {key}: {json.dumps(value)}" for key, value in values.items())
    text += "".join(f"\n{label}: {lines}" for label, lines in behind.items())
    found = read_a1111(text)
    assert found is not None
    assert found.request is not None
    assert (found.request.prompt, found.request.seed, found.request.steps) == ("a fox", 4242, 22)
    named = {"Version": "v1.7.0", **more, **{key: json.dumps(value) for key, value in values.items()}, **behind}
    assert found.unmapped == named


JSON_PAIRS = st.dictionaries(
    st.sampled_from(["Hashes", "Civitai resources", "Civitai metadata"]), JSON_VALUES, max_size=2
)


@given(st.dictionaries(KEYS, VALUES, max_size=4), JSON_PAIRS, BEHIND)
@FEW
def test_every_parameter_is_taken_over_or_named(
    more: dict[str, str], values: dict[str, Any], behind: dict[str, str]
) -> None:
    check_parameters(more, values, behind)


@pytest.mark.slow
@given(st.dictionaries(KEYS, VALUES, max_size=4), JSON_PAIRS, BEHIND)
@MANY
def test_every_parameter_is_taken_over_or_named_many_times(
    more: dict[str, str], values: dict[str, Any], behind: dict[str, str]
) -> None:
    check_parameters(more, values, behind)


# the other tools' prompts, of texts without syntax of their own


def as_novelai(text: str) -> bytes:
    record = json.dumps({"prompt": text, "uc": text, "steps": 22, "seed": 4242})
    parts = {"Software": b"NovelAI", "Description": text.encode(), "Comment": record.encode()}
    return write.png(*[write.text_chunk(key, data) for key, data in parts.items()])


def as_swarmui(text: str) -> bytes:
    record = {"sui_image_params": {"prompt": text, "negativeprompt": text, "steps": 22, "seed": 4242}}
    return write.commented(
        b"UNICODE\0" + json.dumps(record, ensure_ascii=False, indent=2).encode("utf-16-le"), order="<"
    )


def as_invokeai(text: str) -> bytes:
    record = json.dumps({"positive_prompt": text, "negative_prompt": text, "seed": 4242, "steps": 22})
    return write.png(write.text_chunk("invokeai_metadata", record.encode()))


def as_easy_diffusion(text: str) -> bytes:
    record = {"prompt": text, "negative_prompt": text, "seed": 4242, "num_inference_steps": 22}
    record["use_stable_diffusion_model"] = "m"
    return write.commented(b"UNICODE\0" + json.dumps(record).encode("utf-16-be"))


def as_draw_things(text: str) -> bytes:
    return write.webp(xmp=write.draw_things(text, text, seed=4242, steps=22))


def as_fooocus(text: str) -> bytes:
    record = {
        "prompt": text,
        "negative_prompt": text,
        "full_prompt": [text],
        "full_negative_prompt": [text],
        "steps": 22,
    }
    record |= {"seed": "4242", "base_model": "m", "performance": "Speed"}
    return write.png(write.text_chunk("parameters", json.dumps(record).encode()))


def as_stealth(text: str) -> bytes:
    texts = {"Software": "NovelAI", "Comment": json.dumps({"prompt": text, "uc": text, "steps": 22, "seed": 4242})}
    return write.stealth(json.dumps(texts))


def as_dream(text: str) -> bytes:
    dream = f'"{text} [{text}]" -s 22 -S 4242 -W 64 -H 64 -C 7.5 -A k_euler'
    return write.png(write.text_chunk("Dream", dream.encode(), "iTXt"))


TOOLS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "novelai": (as_novelai, r"[{}\[\]]|::"),
    "stealth": (as_stealth, r"[{}\[\]]|::"),
    "swarmui": (as_swarmui, r"[<>()\\]|embedding:"),
    "invokeai": (as_invokeai, r"[()\"+\\-]|withLora|useLora"),
    "dream": (as_dream, r"[()\[\]\"+\\-]|withLora|useLora"),
    "easy-diffusion": (as_easy_diffusion, r"$^"),
    "draw-things": (as_draw_things, r"[()\\]|\[(?!a[|:]b)|(?<!\[a\|b)(?<!b:0\.5)\]|[\x00-\x08\x0b-\x1f\ufffe\uffff]"),
    "fooocus": (as_fooocus, r"[()\\]|embedding:"),
}
"""Tool -> its writer, and what is its own syntax."""


def meaning(prompt: str) -> str:
    """What the text encoder gets of a prompt that says one thing at all steps, with one weight."""
    (part,) = subprompts(prompt, steps=20)
    ((_, text),) = part.texts
    (section,) = text.sections
    assert all(abs(span.weight - 1) < 1e-9 for span in section)
    return "".join(span.text for span in section)


def check_tool(tmp_path: Path, tool: str, text: str) -> None:
    """What is only text to a tool is only text here, and its numbers are read."""
    writer, syntax = TOOLS[tool]
    assume(not re.search(syntax, text))
    assume(text.strip() == text and "\0" not in text)
    info = read(tmp_path, writer(text))
    assert info.source == {"stealth": "novelai", "dream": "invokeai"}.get(tool, tool)
    assert info.request is not None
    assert (info.request.seed, info.request.steps) == (4242, 22)
    assert info.request.loras == ()
    for prompt in (info.request.prompt, info.request.negative_prompt or ""):
        assert read_tags(prompt).text == prompt
        assert meaning(prompt) == text


@given(st.sampled_from(sorted(TOOLS)), TEXTS)
@example("invokeai", "[a|b] AND <lora:x:1> BREAK")
@FEW
def test_what_is_text_to_another_tool_is_text_here(tmp_path: Path, tool: str, text: str) -> None:
    check_tool(tmp_path, tool, text)


@pytest.mark.slow
@given(st.sampled_from(sorted(TOOLS)), TEXTS)
@MANY
def test_what_is_text_to_another_tool_is_text_here_many_times(tmp_path: Path, tool: str, text: str) -> None:
    check_tool(tmp_path, tool, text)


# InvokeAI's weights

WORDS = st.sampled_from(["fox", "red", "snow,", "at dusk", "trip-hop", "5 o'clock"])
TREES = st.recursive(
    WORDS,
    lambda inner: st.tuples(
        st.lists(inner, min_size=1, max_size=3), st.sampled_from(["", "+", "++", "-", "1.3", "0.5", "2"])
    ),
    max_leaves=6,
)


def spelled(tree: Any) -> str:
    if isinstance(tree, str):
        return tree
    return f"({' '.join(map(spelled, tree[0]))}){tree[1]}"


def weights_of(tree: Any, weight: float = 1.0) -> list[tuple[str, float]]:
    if isinstance(tree, str):
        return [(word, weight) for word in tree.split()]
    operator = tree[1]
    factor = {"": 1.0, "+": 1.1, "++": 1.21, "-": 0.9}.get(operator) or float(operator)
    return [one for part in tree[0] for one in weights_of(part, weight * factor)]


def check_weights(trees: list[Any]) -> None:
    prompt = from_compel(" ".join(map(spelled, trees))).text
    (part,) = subprompts(prompt, steps=20)
    ((_, text),) = part.texts
    (section,) = text.sections
    found = [(word, span.weight) for span in section for word in span.text.split()]
    written = [one for tree in trees for one in weights_of(tree)]
    assert [word for word, _ in found] == [word for word, _ in written]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in written], abs=1e-4)


@given(st.lists(TREES, max_size=4))
@FEW
def test_invokeais_weights_are_those_that_were_written(trees: list[Any]) -> None:
    check_weights(trees)


@pytest.mark.slow
@given(st.lists(TREES, max_size=4))
@MANY
def test_invokeais_weights_are_those_that_were_written_many_times(trees: list[Any]) -> None:
    check_weights(trees)


# bytes that nobody wrote

SCRAPS = [
    b"UNICODE\0", b"ASCII\0\0\0", b"JIS\0\0\0\0\0", b"\xff\xfe", b"{", b'"prompt"', b":", b"\0", b"Seed: 1", b"}",
    b"S\0t\0e\0p\0s\0", b"\x93\xfa", b"\xe7\x81", b"[", b"\n", b"c", b"x\x9c", b"sui_image_params",
]  # fmt: skip
GARBAGE = st.binary(max_size=120) | st.lists(st.sampled_from(SCRAPS), max_size=12).map(b"".join)
PLACES: list[Callable[[bytes], bytes]] = [
    *[
        lambda data, kind=kind, key=key: write.png(write.png_chunk(kind, key + b"\0" + data))  # type: ignore[misc]
        for kind in (b"tEXt", b"zTXt", b"iTXt")
        for key in (b"parameters", b"prompt", b"Comment", b"sdcli", b"Dream", b"sd-metadata", b"XML:com.adobe.xmp", b"")
    ],
    *[
        lambda data, inner=inner, format=format: write.commented(data, inner=inner, format=format)  # type: ignore[misc]
        for inner in (True, False)
        for format in ("png", "jpeg", "webp")
    ],
    lambda data: write.with_exif("jpeg", data),
    lambda data: write.with_exif("webp", data),
    lambda data: write.with_exif("png", data),
    lambda data: write.jpeg((0xFE, data)),
    lambda data: write.jpeg((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + data)),
    lambda data: write.webp(xmp=data),
]


def check_garbage(tmp_path: Path, data: bytes, place: Callable[[bytes], bytes]) -> None:
    """Bytes without a record give no error and no prompt, but the text itself where a text alone is a prompt."""
    info = read(tmp_path, place(data))
    json.dumps(info.unmapped, allow_nan=False)
    if info.request is not None and info.request.prompt:
        text = info.parameters
        assert text is not None
        assert text.encode() in data or text.encode("latin-1", errors="ignore") in data
        assert all(line.strip() in text for line in info.request.prompt.split("\n"))


@given(GARBAGE, st.sampled_from(PLACES))
@FEW
def test_bytes_that_nobody_wrote_are_no_prompt(tmp_path: Path, data: bytes, place: Any) -> None:
    check_garbage(tmp_path, data, place)


@pytest.mark.slow
@given(GARBAGE, st.sampled_from(PLACES))
@MANY
def test_bytes_that_nobody_wrote_are_no_prompt_many_times(tmp_path: Path, data: bytes, place: Any) -> None:
    check_garbage(tmp_path, data, place)


SAMPLES = [
    write.png(write.text_chunk("parameters", write.a1111("灯台", "ugly", PAIRS).encode(), kind))
    for kind in ("tEXt", "zTXt", "iTXt packed")
]
SAMPLES += [
    writer("a fox (x:1.3) AND [a|b] 灯台") for writer, _ in TOOLS.values() if writer not in (as_stealth, as_draw_things)
]
SAMPLES += [as_draw_things("a fox"), write.webp(write.exif({write.COMMENT: (2, b"Steps: 1, Seed: 2, Size: 8x8")}, {}))]


def check_damaged(tmp_path: Path, sample: bytes, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(sample)
    for place, new in changes:
        data[place % len(data) : place % len(data) + len(new)] = new
    sentence = ""
    try:
        info = read(tmp_path, bytes(data))
        json.dumps(info.unmapped, allow_nan=False)
    except BadImage as error:
        sentence = str(error).replace(str(tmp_path), "")
    assert not re.search(r"[A-Z]+_[A-Z]+|Error|<_io|0x[0-9a-f]|unexpected", sentence)


CHANGES = st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=6)), min_size=1, max_size=4)


@given(st.sampled_from(SAMPLES), CHANGES)
@FEW
def test_a_damaged_record_is_read_or_refused(tmp_path: Path, sample: bytes, changes: list[tuple[int, bytes]]) -> None:
    check_damaged(tmp_path, sample, changes)


@pytest.mark.slow
@given(st.sampled_from(SAMPLES), CHANGES)
@MANY
def test_a_damaged_record_is_read_or_refused_many_times(
    tmp_path: Path, sample: bytes, changes: list[tuple[int, bytes]]
) -> None:
    check_damaged(tmp_path, sample, changes)


RECORD_KEYS = [
    "prompt", "negative_prompt", "seed", "steps", "width", "height", "uc", "c", "sampler", "scheduler", "base_model",
    "performance", "full_prompt", "resolution", "loras", "loraweights", "sui_image_params", "num_inference_steps",
    "use_stable_diffusion_model", "positive_prompt", "image", "clip_skip", "noise_schedule", "size", "cfgscale",
]  # fmt: skip
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "a fox", "ink,x", "1,2", "64x64", "k_euler"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(RECORD_KEYS), inner, max_size=6),
    max_leaves=12,
)


@given(
    ANY_JSON,
    st.sampled_from(["parameters", "UserComment", "XMP UserComment", "Comment", "sd-metadata", "invokeai_metadata"]),
)
@settings(max_examples=60, deadline=None)
def test_any_json_in_any_place_is_read_without_an_error(value: Any, place: str) -> None:
    found = read_tool_record({place: json.dumps(value), "Software": "NovelAI"})
    if found is not None:
        json.dumps(found.unmapped, allow_nan=False)
