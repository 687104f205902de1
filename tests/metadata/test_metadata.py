"""What images say about themselves: exact round trips, nothing left after a strip, and no harm from hostile files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sdcli.errors import BadImage, NotFound, UsageError
from sdcli.images.formats import ImageFormat
from sdcli.images.image_files import pixels_digest
from sdcli.metadata.a1111 import read_a1111
from sdcli.metadata.embed import image_bytes, parameters_text
from sdcli.metadata.read import read_image
from sdcli.metadata.record import Record, parse_record, record_json
from sdcli.metadata.strip import strip
from sdcli.request.schema import GenerationRequest

FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)
SECRET = "a purple walrus, naïve façade"


def noise(width: int = 40, height: int = 24) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(0).randbytes(width * height * 3))


def record_of(prompt: str = SECRET, **changed: Any) -> Record:
    request = GenerationRequest(
        prompt=prompt, negative_prompt="blurry", prompt_template="{prompt}, glossy", model="starter", seed=2**40,
        width=40, height=24, steps=20, guidance_scale=5.0, scheduler="ddim", eta=0.0,
    )  # fmt: skip
    provenance = {
        "sdcli": "0.1.0",
        "weights": {"unet": "sha256:" + "0123456789abcdef" * 4},
        "batch": {"size": 1, "index": 0},
        "fallbacks": [],
        "path": "/tmp/\udce9 </sdcli:record>&amp;",
    }
    return Record(request.changed(**changed), provenance)


def written(tmp_path: Path, format: ImageFormat, record: Record) -> Path:
    path = tmp_path / f"picture.{format}"
    path.write_bytes(image_bytes(noise(), format, record))
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_a_record_is_read_back_exactly(tmp_path: Path, format: ImageFormat) -> None:
    record = record_of("Steps: 3\nNegative prompt: no\t🐈 \x01 <&> שלום ]]> ")
    info = read_image(written(tmp_path, format, record))
    assert (info.source, info.format, info.width, info.height) == ("sdcli", format, 40, 24)
    assert info.record == record
    assert info.request == record.request
    assert info.parameters == parameters_text(record)


@given(prompt=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_prompt_survives_in_every_format(tmp_path: Path, prompt: str) -> None:
    for format in FORMATS:
        record = record_of(prompt)
        info = read_image(written(tmp_path, format, record))
        assert info.record == record
        assert info.parameters == parameters_text(record)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("prompt", ["cat " * 25_000, "日本🐈" * 33_333])
def test_a_prompt_of_a_hundred_thousand_characters_is_not_lost(
    tmp_path: Path, format: ImageFormat, prompt: str
) -> None:
    record = record_of(prompt)
    info = read_image(written(tmp_path, format, record))
    assert info.record == record
    # A JPEG's EXIF cannot hold it, and then has none of it.
    assert info.parameters == (None if format == "jpeg" else parameters_text(record))


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_image_twice_is_the_same_file(format: ImageFormat) -> None:
    assert image_bytes(noise(), format, record_of()) == image_bytes(noise(), format, record_of())


def test_a_png_keeps_its_pixels() -> None:
    image = noise()
    decoded = Image.open(io.BytesIO(image_bytes(image, "png", record_of())))
    assert decoded.tobytes() == image.tobytes()
    assert pixels_digest(decoded) == pixels_digest(image)


def test_the_digest_tells_size_and_pixels_apart() -> None:
    image = noise()
    assert pixels_digest(image) != pixels_digest(Image.frombytes("RGB", (24, 40), image.tobytes()))
    image.putpixel((3, 3), (1, 2, 3))
    assert pixels_digest(image) != pixels_digest(noise())


@pytest.mark.parametrize("prompt", [SECRET, "a cat 🐈"])
def test_pillow_alone_sees_both_chunks_of_a_png(prompt: str) -> None:
    record = record_of(prompt)
    data = image_bytes(noise(), "png", record)
    image = Image.open(io.BytesIO(data))
    assert image.text == {"parameters": parameters_text(record), "sdcli": record_json(record)}
    assert (b"tEXtparameters\0" in data) == (prompt == SECRET)
    assert (b"iTXtparameters\0" in data) == (prompt != SECRET)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_pillow_alone_sees_a1111s_comment_and_the_xmp_packet(format: ImageFormat) -> None:
    record = record_of("a cat 🐈")
    image = Image.open(io.BytesIO(image_bytes(noise(), format, record)))
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + parameters_text(record).encode("utf-16-be")
    # The type of the field: UNDEFINED, without which A1111's reader fails.
    assert b"\x92\x86\x00\x07" in image.info["exif"]
    assert b"<sdcli:record>" in image.info["xmp"]


def test_the_models_hash_is_in_the_text_where_there_is_one() -> None:
    assert "Model hash: 0123456789, Model: starter" in parameters_text(record_of())
    assert "Model hash" not in parameters_text(Record(record_of().request, {"weights": "random:tiny:0"}))


def test_a_plain_prompt_is_text_for_the_web_ui_too() -> None:
    record = record_of("a (cat:1.2) AND [b|c]", prompt_syntax="plain", negative_prompt="(x)")
    found = read_a1111(parameters_text(record))
    assert found is not None
    assert found.request is not None
    assert found.request.prompt == r"a \(cat:1.2\) A\ND \[b|c\], glossy"
    assert found.request.negative_prompt == r"\(x\)"


# nothing


def spellings(text: str) -> list[bytes]:
    encoded = [text.encode(encoding) for encoding in ("utf-8", "latin-1", "utf-16-be", "utf-16-le")]
    return [*encoded, json.dumps(text).strip('"').encode(), b"walrus", b"sdcli", b"\0w\0a\0l"]


@pytest.mark.parametrize("format", FORMATS)
def test_no_record_means_nothing_at_all(format: ImageFormat) -> None:
    image = noise()
    image.info |= {"comment": SECRET.encode(), "exif": b"Exif\0\0" + SECRET.encode(), "xmp": SECRET, "dpi": (72, 72)}
    data = image_bytes(image, format, None)
    assert not any(spelling in data for spelling in spellings(SECRET))
    assert data == image_bytes(noise(), format, None)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("repeats", [1, 3000])
def test_a_stripped_image_says_nothing_and_looks_the_same(format: ImageFormat, repeats: int) -> None:
    data = image_bytes(noise(), format, record_of(SECRET * repeats))
    bare = strip(data)
    assert any(spelling in data for spelling in spellings(SECRET))
    assert not any(spelling in bare for spelling in spellings(SECRET))
    before, after = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(bare))
    assert after.tobytes() == before.tobytes()
    assert strip(bare) == bare
    if format != "webp":  # there the extended header stays
        assert bare == image_bytes(noise(), format, None)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_strip_finds_what_other_programs_hide_in_a_jpeg(progressive: bool) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = SECRET, 6
    file = io.BytesIO()
    noise(200, 160).save(
        file, "JPEG", progressive=progressive, exif=exif, comment=SECRET.encode(), xmp=SECRET.encode(),
        icc_profile=b"profile" * 20, restart_marker_rows=1,
    )  # fmt: skip
    data = file.getvalue() + SECRET.encode()
    bare = strip(data)
    assert not any(spelling in bare for spelling in spellings(SECRET))
    before, after = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(bare))
    assert before.tobytes() == after.tobytes()
    # What decides how it looks stays: the colours and which side is up.
    assert after.info["icc_profile"] == b"profile" * 20
    assert dict(after.getexif()) == {0x0112: 6}


def test_a_strip_finds_what_other_programs_hide_in_a_png_and_keeps_transparency() -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Comment", SECRET, zip=True)
    chunks.add_itxt("workflow", SECRET)
    chunks.add(b"prVt", SECRET.encode(), after_idat=True)
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = SECRET, 3
    file = io.BytesIO()
    noise().quantize(16).save(file, "PNG", pnginfo=chunks, exif=exif, transparency=3)
    data = file.getvalue() + SECRET.encode()
    bare = strip(data)
    assert not any(spelling in bare for spelling in spellings(SECRET))
    before, after = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(bare))
    assert before.convert("RGBA").tobytes() == after.convert("RGBA").tobytes()
    assert dict(after.getexif()) == {0x0112: 3}


@pytest.mark.parametrize("lossless", [False, True])
def test_a_strip_keeps_a_webps_transparency_and_frames(lossless: bool) -> None:
    frames = [noise().convert("RGBA").rotate(angle) for angle in (0, 45, 90)]
    file = io.BytesIO()
    frames[0].save(
        file, "WEBP", save_all=True, append_images=frames[1:], lossless=lossless, xmp=SECRET.encode(), exif=Image.Exif()
    )
    bare = strip(file.getvalue())
    assert b"walrus" not in bare
    before, after = Image.open(file), Image.open(io.BytesIO(bare))
    assert after.n_frames == 3
    for index in range(3):
        before.seek(index)
        after.seek(index)
        assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_not_stripped(format: ImageFormat) -> None:
    data = image_bytes(noise(), format, record_of())
    for length in (3, 15, 40, len(data) // 2, len(data) - 3):
        with pytest.raises(BadImage):
            strip(data[:length])


# other tools' files


def test_images_of_other_tools_are_read(tmp_path: Path) -> None:
    text = "a cat\nNegative prompt: a dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512"
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-le")
    noise().save(tmp_path / "little.jpeg", exif=exif)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    noise().save(tmp_path / "text.png", pnginfo=chunks)
    for name in ("little.jpeg", "text.png"):
        info = read_image(tmp_path / name)
        assert (info.source, info.parameters, info.record) == ("a1111", text, None)
        assert (info.request.prompt, info.request.scheduler, info.request.seed) == ("a cat", "euler-a", 5)


def test_comfyuis_webp_is_read(tmp_path: Path) -> None:
    graph = {"1": {"class_type": "KSampler", "inputs": {"seed": 4, "steps": 9}}}
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(graph)
    noise().save(tmp_path / "comfy.webp", exif=exif)
    info = read_image(tmp_path / "comfy.webp")
    assert (info.source, info.request.seed, info.request.steps) == ("comfyui", 4, 9)


def test_an_image_without_a_record_says_so_and_shows_what_is_there(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Software", "a brush")
    chunks.add_text("long", "x" * 9999)
    noise().save(tmp_path / "plain.png", pnginfo=chunks)
    info = read_image(tmp_path / "plain.png")
    assert (info.source, info.request, info.record, info.parameters) == (None, None, None, None)
    assert info.unmapped["Software"] == "a brush"
    assert info.unmapped["long"].endswith("(9,999 characters)")


# hostile files


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "damaged"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "not an object with a schema"),
        ('{"schema": 2, "request": {}, "provenance": {}}', "has schema 2, and this sdcli knows 1"),
        ('{"schema": 1, "request": [], "provenance": {}}', "should be objects"),
        ('{"schema": 1, "request": {"steps": "many"}, "provenance": {}}', "steps"),
        ('{"schema": 1, "request": {"prompt": "\\ud800"}, "provenance": {}}', "half a character"),
        ('{"schema": 1, "request": {"evil": 1}, "provenance": {}}', "no field 'evil'"),
    ],
)
def test_a_bad_record_is_told_in_a_sentence_and_the_other_text_is_read(
    tmp_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_record(text)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("sdcli", text)
    chunks.add_text("parameters", parameters_text(record_of()))
    noise().save(tmp_path / "bad.png", pnginfo=chunks)
    info = read_image(tmp_path / "bad.png")
    assert info.record is None
    assert sentence in info.unmapped["sdcli"]
    assert (info.source, info.request.seed, info.request.prompt) == ("a1111", 2**40, f"{SECRET}, glossy")


@pytest.mark.parametrize(
    "packet",
    [
        b"no xml",
        b"<a>" * 50_000,
        b"\xff\xfe<\0",
        b'<!DOCTYPE a [<!ENTITY x "y">]><rdf xmlns:sdcli="urn:sdcli:1.0:"><sdcli:record>&x;</sdcli:record></rdf>',
        b'<a xmlns:n="http://ns.adobe.com/xmp/note/" n:HasExtendedXMP="00000000000000000000000000000000"/>',
    ],
)
def test_a_bad_xmp_packet_is_no_record(tmp_path: Path, packet: bytes) -> None:
    noise().save(tmp_path / "bad.webp", xmp=packet)
    assert read_image(tmp_path / "bad.webp").source is None


def test_a_record_in_an_incomplete_extension_is_no_record(tmp_path: Path) -> None:
    data = image_bytes(noise(), "jpeg", record_of("cat " * 50_000))
    last = data.rindex(b"\xff\xe1")
    (length,) = struct.unpack_from(">H", data, last + 2)
    path = tmp_path / "cut.jpeg"
    path.write_bytes(data[:last] + data[last + 2 + length :])
    assert read_image(path).record is None


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_are_refused_or_read_and_nothing_else(tmp_path: Path, format: ImageFormat) -> None:
    data = image_bytes(noise(), format, record_of())
    path = tmp_path / f"damaged.{format}"
    dice = random.Random(1)
    for _ in range(150):
        damaged = bytearray(data[: dice.choice([len(data), dice.randrange(len(data))])])
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged)
        for attempt in (lambda: read_image(path), lambda: strip(path.read_bytes())):
            with contextlib.suppress(BadImage):
                attempt()


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8193, 8192), (9500, 9500), (30_000, 30_000), (65_000, 65_000)])
def test_a_bomb_is_refused_by_its_header(
    tmp_path: Path, size: tuple[int, int], recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(*size))
    with pytest.raises(BadImage, match="too many to be read safely"):
        read_image(path)
    assert not recwarn


def test_a_text_bomb_is_refused(tmp_path: Path) -> None:
    body = b"parameters\0\0" + zlib.compress(bytes(50_000_000), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    data = image_bytes(noise(), "png", None)
    path = tmp_path / "text.png"
    path.write_bytes(data[:33] + chunk + data[33:])
    with pytest.raises(BadImage, match="cannot be read"):
        read_image(path)


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_image_is_refused_with_its_name(tmp_path: Path, format: ImageFormat) -> None:
    path = tmp_path / f"half.{format}"
    data = image_bytes(noise(200, 200), format, record_of())
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(BadImage, match=f"half.{format}: "):
        read_image(path)


def test_what_is_no_image_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(BadImage, match="is a folder"):
        read_image(tmp_path)
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    noise().save(tmp_path / "gif.png", "GIF")
    for name in ("text.png", "empty.png", "gif.png"):
        with pytest.raises(BadImage, match="is not a PNG, JPEG or WebP image"):
            read_image(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadImage, match="not a regular file"):
        read_image(tmp_path / "pipe.png")


def test_the_digest_is_a_sha256_of_size_and_rgb_rows() -> None:
    image = noise()
    assert pixels_digest(image) == "sha256:" + hashlib.sha256(b"RGB 40x24\n" + image.tobytes()).hexdigest()
