"""Image files and what they say about themselves: PNG, JPEG and WebP <-> request + provenance.

Where the two texts are kept, so that other tools find what they know and a plain reader finds the rest:

            A1111's `parameters`              sdcli's record (JSON in ASCII, exact)
    PNG     text chunk `parameters`           text chunk `sdcli`
    JPEG    EXIF UserComment, UTF-16          XMP property `sdcli:record`, in Extended XMP when it needs over 64 KB
    WebP    EXIF UserComment, UTF-16          XMP property `sdcli:record`

A JPEG's EXIF holds 64 KB at most: a `parameters` text over some 32,000 characters is left out there, the record is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.parsers import expat
from xml.sax.saxutils import escape

from PIL import ExifTags, Image, PngImagePlugin

from sdcli import __version__
from sdcli.errors import BadImage, SdcliError, UsageError
from sdcli.images.formats import ImageFormat
from sdcli.images.image_files import opened
from sdcli.metadata.foreign import Tool, a1111_text, load_json, read_foreign
from sdcli.request.input_files import check_readable
from sdcli.request.schema import GenerationRequest, parse_request

SCHEMA = 1
"""The version of the record's layout; the request inside has its own."""

MAX_SHOWN = 500
"""Characters of a text in `unmapped`, before it is cut."""


@dataclass(frozen=True)
class Record:
    """How an image was made: the request as generated (no None, its own seed), and the facts of the run, JSON-ready.

    Provenance holds no times: the same request twice must give the same file.
    """

    request: GenerationRequest
    provenance: dict[str, Any]


@dataclass(frozen=True)
class ImageInfo:
    """What an image file says about itself. `width` and `height` are pixels as stored, before any EXIF rotation."""

    path: Path
    width: int
    height: int
    format: ImageFormat
    record: Record | None = None
    """sdcli's own, exact."""
    parameters: str | None = None
    """A1111's text as it stands in the file."""
    source: Literal["sdcli"] | Tool | None = None
    """Whose record `request` was read from."""
    request: GenerationRequest | None = None
    """As far as the record maps; None where nothing does."""
    unmapped: dict[str, Any] = field(default_factory=dict)
    """What was there and could not be mapped, JSON-ready."""


def image_bytes(image: Image.Image, format: ImageFormat, record: Record | None) -> bytes:
    """An image [any mode, generated as RGB] as a whole file; equal arguments give equal bytes.

    PNG is lossless at the quickest compression level; JPEG is of quality 95 with full colour resolution; WebP is
    lossy, of quality 95. Without a record nothing is written but pixels, whatever `image.info` holds.
    """
    pixels = image.convert("RGB")
    # A new image of the same pixels: Pillow would write what the old one's `info` carries (comment, profile, dpi).
    clean = Image.frombytes("RGB", pixels.size, pixels.tobytes())
    options = _encoding(format) | (_embedded(record, format) if record is not None else {})
    file = io.BytesIO()
    clean.save(file, format=format, **options)
    return file.getvalue()


def pixels_digest(image: Image.Image) -> str:
    """`"sha256:<64 hex>"` of the size and the raw RGB bytes, row by row: equal exactly for equal images."""
    digest = hashlib.sha256(f"RGB {image.width}x{image.height}\n".encode())
    digest.update(image.convert("RGB").tobytes())
    return f"sha256:{digest.hexdigest()}"


def parameters_text(record: Record) -> str:
    """A1111's text for a record; the model's hash is that of its single file, or of its UNet."""
    weights = record.provenance.get("weights") or {}
    digest = weights.get("checkpoint", weights.get("unet", "")) if isinstance(weights, dict) else ""
    match = re.fullmatch(r"sha256:([0-9a-f]{10})[0-9a-f]{54}", str(digest))
    return a1111_text(
        record.request, version=__version__, model_hash=match[1] if match else None, lora_hashes=_lora_hashes(record)
    )


def _lora_hashes(record: Record) -> dict[str, str]:
    """Name -> the first 12 digits that the web UI writes; nothing where the provenance is not one of ours."""
    loras = record.provenance.get("loras")
    return {
        str(one.get("name")): str(one.get("tensors_sha256"))[:12]
        for one in (loras if isinstance(loras, list) else [])
        if isinstance(one, dict)
    }


def record_json(record: Record) -> str:
    """The record as one line of ASCII: `{"schema": 1, "request": {...}, "provenance": {...}}`."""
    whole = {"schema": SCHEMA, "request": record.request.typed(), "provenance": record.provenance}
    return json.dumps(whole, ensure_ascii=True, allow_nan=False)


def parse_record(text: str) -> Record:
    """The record of `record_json`. Raises UsageError with a sentence for a damaged or a newer one."""
    try:
        whole = load_json(text)
    except ValueError as error:
        raise UsageError(f"its sdcli record is damaged: {error}") from None
    if not isinstance(whole, dict) or not isinstance(whole.get("schema"), int):
        raise UsageError("its sdcli record is damaged: it is no object with a schema number")
    if whole["schema"] != SCHEMA:
        raise UsageError(f"its sdcli record has schema {whole['schema']}, and this sdcli knows {SCHEMA}")
    request, provenance = whole.get("request"), whole.get("provenance")
    if not isinstance(request, dict) or not isinstance(provenance, dict):
        raise UsageError("its sdcli record is damaged: request and provenance should be objects")
    try:
        return Record(parse_request(request), provenance)
    except UsageError as error:
        raise UsageError(f"its sdcli record holds a request that is not valid: {error}") from None


def read_image(path: Path) -> ImageInfo:
    """What a PNG, JPEG or WebP file says about itself. The records in it are read as data, hostile ones too.

    An own record that is damaged or newer is told in `unmapped["sdcli"]`, and the other texts are read instead.
    Raises NotFound, and BadPicture for a file that is truncated, too large, or no such image.
    """
    with image_and_info(path) as (_, info):
        return info


@contextlib.contextmanager
def image_and_info(path: Path) -> Iterator[tuple[Image.Image, ImageInfo]]:
    """An image file, decoded once, with what `read_image` says of it; raises what that raises, in the block too."""
    check_readable(path)
    try:
        with opened(path) as image:
            image.load()
            texts, own = _texts(image)
            format = _FORMATS[str(image.format)]
            info = ImageInfo(path, *image.size, format, parameters=texts.get("parameters"))
            yield image, _info(texts, own, info)
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None


def strip(data: bytes) -> bytes:
    """The same image without any metadata: chunks and segments are left out, nothing is encoded again.

    Colour profiles stay, and so does an EXIF orientation other than upright (alone): both change what is seen.
    Raises BadPicture.
    """
    try:
        if data.startswith(_PNG_SIGNATURE):
            return _PNG_SIGNATURE + b"".join(_kept_png_chunks(data, _orientation(data)))
        if data.startswith(b"\xff\xd8"):
            return b"\xff\xd8" + b"".join(_kept_jpeg_segments(data, _orientation(data)))
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            body = b"WEBP" + b"".join(_kept_webp_chunks(data, _orientation(data)))
            return b"RIFF" + struct.pack("<I", len(body)) + body
    except (struct.error, IndexError):
        raise BadImage("the image is truncated or damaged") from None
    raise BadImage("only PNG, JPEG and WebP images can be stripped")


# Writing


def _encoding(format: ImageFormat) -> dict[str, Any]:
    match format:
        case "png":
            return {"compress_level": 1}
        case "jpeg":
            return {"quality": 95, "subsampling": 0}
        case "webp":
            return {"quality": 95, "method": 4}


def _embedded(record: Record, format: ImageFormat) -> dict[str, Any]:
    """Pillow's options that put both texts into a file."""
    parameters, own = parameters_text(record), record_json(record)
    if format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", parameters)  # tEXt, or iTXt where Latin-1 has not all letters
        chunks.add_text("sdcli", own)
        return {"pnginfo": chunks}
    exif = _user_comment(parameters)
    if format == "webp":
        return {"exif": exif, "xmp": _xmp_packet(_xmp_property(own))}
    return {"extra": _jpeg_xmp(own), **({"exif": exif} if len(exif) <= _MAX_SEGMENT else {})}


_MAX_SEGMENT = 65533
"""Bytes of data in one JPEG segment."""


def _user_comment(text: str) -> bytes:
    """EXIF with the one tag, big-endian as A1111 writes it.

    By hand, since Pillow writes the tag as BYTE; the standard says UNDEFINED, and A1111's reader fails on the other.
    """
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    first = struct.pack(">2sHIHHHIII", b"MM", 42, 8, 1, ExifTags.IFD.Exif, _LONG, 1, 26, 0)
    second = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, _UNDEFINED, len(comment), 44, 0)
    return b"Exif\0\0" + first + second + comment


_LONG, _UNDEFINED = 4, 7
"""TIFF field types."""

_XMP_SIGNATURE = b"http://ns.adobe.com/xap/1.0/\0"
_EXTENSION_SIGNATURE = b"http://ns.adobe.com/xmp/extension/\0"
_SDCLI_NAMESPACE = "urn:sdcli:1.0:"
_NOTE_NAMESPACE = "http://ns.adobe.com/xmp/note/"


def _xmp_property(own: str) -> str:
    opening = f'<rdf:Description rdf:about="" xmlns:sdcli="{_SDCLI_NAMESPACE}">'
    return f"{opening}<sdcli:record>{escape(own)}</sdcli:record></rdf:Description>"


def _xmp_document(description: str) -> str:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f"{description}</rdf:RDF></x:xmpmeta>"
    )


def _xmp_packet(description: str) -> bytes:
    begin = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    return f'{begin}{_xmp_document(description)}<?xpacket end="r"?>'.encode()


def _jpeg_xmp(own: str) -> bytes:
    """APP1 segments: one packet, or one that names an extension, and the extension in pieces (XMP part 3, 1.1.3.1)."""
    packet = _xmp_packet(_xmp_property(own))
    if len(_XMP_SIGNATURE) + len(packet) <= _MAX_SEGMENT:
        return _segment(_APP1, _XMP_SIGNATURE + packet)
    extension = _xmp_document(_xmp_property(own)).encode()
    guid = hashlib.md5(extension, usedforsecurity=False).hexdigest().upper()
    note = f'<rdf:Description rdf:about="" xmlns:xmpNote="{_NOTE_NAMESPACE}" xmpNote:HasExtendedXMP="{guid}"/>'
    head = _EXTENSION_SIGNATURE + guid.encode() + struct.pack(">I", len(extension))
    room = _MAX_SEGMENT - len(head) - 4
    pieces = [
        _segment(_APP1, head + struct.pack(">I", offset) + extension[offset : offset + room])
        for offset in range(0, len(extension), room)
    ]
    return _segment(_APP1, _XMP_SIGNATURE + _xmp_packet(note)) + b"".join(pieces)


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


# Reading

_FORMATS: dict[str, ImageFormat] = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp"}
"""Pillow's names; MPO is a JPEG with a second image behind it, as phones write them."""


def _texts(image: Image.Image) -> tuple[dict[str, str], str | None]:
    """A decoded image's texts by their key, and sdcli's record apart."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        texts = {str(key): str(text) for key, text in image.text.items() if not key.startswith("XML:")}
        own = texts.pop("sdcli", None)
    else:
        texts, own = {}, _xmp_record(image)
    for key, text in _exif_texts(image).items():
        texts.setdefault(key, text)
    return texts, own


def _exif_texts(image: Image.Image) -> dict[str, str]:
    """A1111's comment, and ComfyUI's fields, which it writes as `key:{json}` into the tags of the camera."""
    try:
        exif = image.getexif()
        comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
        camera = [exif.get(tag) for tag in (ExifTags.Base.Model, ExifTags.Base.Make, ExifTags.Base.ImageDescription)]
    except SdcliError:
        raise
    except Exception:  # damaged EXIF is no reason to refuse the image, and fails in a dozen ways
        return {}
    texts = {}
    if isinstance(comment, bytes) and (text := _decoded_comment(comment)):
        texts["parameters"] = text
    for value in camera:
        if isinstance(value, str) and (match := re.match(r"(prompt|workflow):(?=\{)", value, re.IGNORECASE)):
            texts[match[1].lower()] = value[match.end() :].rstrip("\0")
    return texts


def _decoded_comment(comment: bytes) -> str:
    """An EXIF UserComment: 8 bytes name the encoding. Unicode has no fixed byte order; A1111's is big-endian."""
    code, text = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return text.decode("utf-16", errors="replace")
        big, little = (text.decode(f"utf-16-{order}", errors="replace") for order in ("be", "le"))
        return little if "Steps: " in little and "Steps: " not in big else big
    plain = text if code in (b"ASCII\0\0\0", b"\0" * 8) else comment
    return plain.decode("utf-8", errors="replace").strip("\0 ")


def _xmp_record(image: Image.Image) -> str | None:
    packet = image.info.get("xmp")
    if not isinstance(packet, bytes):
        return None
    found = _xmp_properties(packet)
    guid = found.get(f"{_NOTE_NAMESPACE} HasExtendedXMP")
    if guid is not None:
        found |= _xmp_properties(_extended_xmp(getattr(image, "applist", []), guid))
    return found.get(f"{_SDCLI_NAMESPACE} record")


def _extended_xmp(segments: list[tuple[str, bytes]], guid: str) -> bytes:
    """The extension that a packet names, from its pieces in any order; nothing where a piece is missing."""
    head = _EXTENSION_SIGNATURE + guid.encode()
    pieces = [data[len(head) + 4 :] for name, data in segments if name == "APP1" and data.startswith(head)]
    ordered = sorted((piece for piece in pieces if len(piece) >= 4), key=lambda piece: piece[:4])
    extension = b"".join(piece[4:] for piece in ordered)
    whole = hashlib.md5(extension, usedforsecurity=False).hexdigest().upper() == guid.upper()
    return extension if whole else b""


def _xmp_properties(packet: bytes) -> dict[str, str]:
    """`"namespace name"` -> text of a packet's elements and attributes; nothing where it is no plain XML."""
    found: dict[str, str] = {}
    open_texts: list[list[str]] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        found.update(attributes)
        open_texts.append([])

    def text(part: str) -> None:
        if open_texts:
            open_texts[-1].append(part)

    def end(name: str) -> None:
        found.setdefault(name, "".join(open_texts.pop()))

    def doctype(*_: object) -> None:
        raise ValueError("entities can mean gigabytes")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(packet, True)
    except (expat.ExpatError, ValueError):
        return {}
    return found


def _info(texts: dict[str, str], own: str | None, bare: ImageInfo) -> ImageInfo:
    """The image's info completed by the best of its records."""
    fields = {name: getattr(bare, name) for name in ("path", "width", "height", "format", "parameters")}
    unmapped: dict[str, Any] = {}
    if own is not None:
        try:
            record = parse_record(own)
            return ImageInfo(**fields, record=record, source="sdcli", request=record.request)
        except UsageError as error:
            unmapped["sdcli"] = str(error)
    foreign = read_foreign(texts)
    if foreign is not None:
        unmapped |= {key: _shown(value) for key, value in foreign.unmapped.items()}
        return ImageInfo(**fields, source=foreign.tool, request=foreign.request, unmapped=unmapped)
    return ImageInfo(**fields, unmapped=unmapped | {key: _shown(text) for key, text in texts.items()})


def _shown(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_SHOWN:
        return f"{value[:MAX_SHOWN]}... ({len(value):,} characters)"
    return value


# Stripping

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL", b"fcTL", b"fdAT"}
_PNG_COLOUR = {b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"cICP", b"mDCV", b"cLLI", b"bKGD", b"pHYs"}


def _kept_png_chunks(data: bytes, orientation: int) -> Iterator[bytes]:
    position, kind = len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        chunk = data[position : position + length + 12]
        if len(chunk) < length + 12:
            raise IndexError
        if kind in _PNG_PIXELS or kind in _PNG_COLOUR:
            yield chunk
        if kind == b"IHDR" and orientation > 1:
            body = b"eXIf" + _orientation_exif(orientation)
            yield struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        position += len(chunk)


_APP0, _APP1, _APP2, _APP14, _APP15 = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF
_COMMENT, _SCAN, _END = 0xFE, 0xDA, 0xD9
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


def _kept_jpeg_segments(data: bytes, orientation: int) -> Iterator[bytes]:
    position = 2
    if orientation > 1:
        yield _segment(_APP1, b"Exif\0\0" + _orientation_exif(orientation))
    while True:
        while data[position + 1] == 0xFF:  # fill bytes
            position += 1
        if data[position] != 0xFF:
            raise IndexError
        marker = data[position + 1]
        if marker == _END:
            yield b"\xff\xd9"  # what follows the end is no part of the image
            return
        (length,) = struct.unpack_from(">H", data, position + 2)
        segment = data[position : position + 2 + length]
        if len(segment) < 2 + length or length < 2:
            raise IndexError
        position += len(segment)
        if _jpeg_shows(marker, segment[4:]):
            yield segment
        if marker == _SCAN:
            following = _NEXT_MARKER.search(data, position)
            if following is None:
                raise IndexError
            yield data[position : following.start()]
            position = following.start()


def _jpeg_shows(marker: int, body: bytes) -> bool:
    """Whether a segment is needed to show the image as it is: all but comments and most application segments."""
    if marker in _JPEG_APPLICATIONS:
        return body.startswith(_JPEG_APPLICATIONS[marker])
    return marker != _COMMENT and not _APP0 <= marker <= _APP15


_JPEG_APPLICATIONS = {_APP0: b"JFIF\0", _APP2: b"ICC_PROFILE\0", _APP14: b"Adobe"}
"""The application segments that are kept; Adobe's says how the colours are coded."""

_WEBP_PIXELS = {b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"ICCP"}
_WEBP_EXIF_FLAG, _WEBP_XMP_FLAG = 0x08, 0x04


def _kept_webp_chunks(data: bytes, orientation: int) -> Iterator[bytes]:
    (size,) = struct.unpack_from("<I", data, 4)
    position, end = 12, 8 + size
    if end > len(data):
        raise IndexError
    extended = False
    while position + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, position)
        body = data[position + 8 : position + 8 + length]
        if len(body) < length:
            raise IndexError
        if kind == b"VP8X":
            extended = True
            exif = _WEBP_EXIF_FLAG if orientation > 1 else 0
            flags = (body[0] & ~(_WEBP_EXIF_FLAG | _WEBP_XMP_FLAG)) | exif
            yield _webp_chunk(kind, bytes([flags]) + body[1:])
        elif kind in _WEBP_PIXELS:
            yield _webp_chunk(kind, body)
        position += 8 + length + length % 2
    if extended and orientation > 1:
        yield _webp_chunk(b"EXIF", _orientation_exif(orientation))


def _webp_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 is upright, also where nothing says."""
    with opened(io.BytesIO(data)) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _orientation_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")
