"""Collects all texts in an image file, from whichever chunk, segment or EXIF field, by the name of their place."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from sdcli.images.png_chunks import TEXTS, chunk_data, is_sound, png_chunks, unpacked_text
from sdcli.metadata.stealth import stealth_texts
from sdcli.metadata.text_bytes import ByteOrder, plain_text, user_comment, utf8_text, windows_text
from sdcli.metadata.xmp import xmp_record, xmp_texts

USER_COMMENT, XMP_COMMENT = "UserComment", "XMP UserComment"
MAX_TEXTS = 1000
"""Texts of one file that are looked at."""
_XMP, _PROFILE = "XML:com.adobe.xmp", "Raw profile type "


@dataclass
class ImageTexts:
    """What an image file says, undigested."""

    texts: dict[str, str] = field(default_factory=dict)
    """Place -> text: a PNG's keyword, an EXIF field's name, `comment`, or `XMP ` and a property's name."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Place -> why its bytes are no text."""
    own: str | None = None
    """The text of sdcli's record."""

    def add(self, place: str, text: str | None, data: bytes) -> None:
        """Add a text; of several in one place the last counts, as in most readers, and the others are kept aside."""
        if text is None:
            self.unreadable[place] = f"{len(data):,} bytes in no encoding that is known for it"
            return
        if text in ("", self.texts.get(place)):
            return
        if place in self.texts:
            number = 1
            while f"{place} ({number})" in self.texts:
                number += 1
            self.texts[f"{place} ({number})"] = self.texts[place]
        self.texts[place] = text


def image_texts(source: Path | io.BytesIO, image: Image.Image) -> ImageTexts:
    """The texts in a file, and those hidden in the pixels of its decoded image. Raises BadImage for enormous ones."""
    found = ImageTexts()
    packet = image.info.get("xmp")
    if image.format == "PNG":
        profiles = _add_png(found, source)
        packet = profiles.get(_XMP, packet)
        if (data := _hex_profile(profiles.get("APP1", b""))).startswith(b"Exif\0\0"):  # ImageMagick's older name
            _add_exif(found, lambda: _loaded(data))
    else:
        found.own = xmp_record(image)
    for name, data in getattr(image, "applist", []):
        if name == "COM":
            found.add("comment", plain_text(data), data)
    _add_exif(found, image.getexif)
    if isinstance(packet, bytes):
        for name, text in xmp_texts(packet).items():
            found.add(f"XMP {name}", text, b"")
    for name, text in stealth_texts(image).items():
        if name not in found.texts:
            found.add(name, text, b"")
    return found


def _add_png(found: ImageTexts, source: Path | io.BytesIO) -> dict[str, bytes]:
    """Add the texts of a PNG's chunks; return those that hold XMP and EXIF."""
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.getvalue()) as file:
        profiles: dict[str, bytes] = {}
        chunks = [chunk for chunk in png_chunks(file) if chunk.kind in TEXTS]
        for chunk in chunks[:MAX_TEXTS]:
            keyword, data = unpacked_text(chunk.kind, chunk_data(file, chunk))
            key = keyword.decode("latin-1")
            if key == _XMP or key.startswith(_PROFILE):
                profiles[key.removeprefix(_PROFILE)] = data
                continue  # XMP and EXIF are read as such
            text = utf8_text(data) if chunk.kind == b"iTXt" else plain_text(data)
            if not is_sound(file, chunk):
                found.unreadable[key] = "damaged"
            elif key == "sdcli":
                found.own = data.decode("utf-8", errors="replace")
            else:
                found.add("parameters" if key.lower() == "parameters" else key, text, data)
    if len(chunks) > MAX_TEXTS:
        found.unreadable["more texts"] = f"{len(chunks) - MAX_TEXTS:,} more text chunks, not read"
    return profiles


_TEXT_FIELDS = {
    ExifTags.Base.ImageDescription: "ImageDescription",
    ExifTags.Base.Make: "Make",
    ExifTags.Base.Model: "Model",
    ExifTags.Base.Software: "Software",
    ExifTags.Base.Artist: "Artist",
    ExifTags.Base.MakerNote: "MakerNote",
}
_WINDOWS_FIELDS = {
    ExifTags.Base.XPTitle: "XPTitle",
    ExifTags.Base.XPComment: "XPComment",
    ExifTags.Base.XPKeywords: "XPKeywords",
    ExifTags.Base.XPSubject: "XPSubject",
}


def _hex_profile(text: bytes) -> bytes:
    """The data of ImageMagick's profiles: a line with a name, one with the length, and lines of hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.strip().split(b"\n")[2:]).decode("ascii"))
    except ValueError:
        return b""


def _loaded(data: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(data)
    return exif


def _add_exif(found: ImageTexts, load: Callable[[], Image.Exif]) -> None:
    try:
        exif = load()
        inner = exif.get_ifd(ExifTags.IFD.Exif)
        order: ByteOrder = "<" if exif.endian == "<" else ">"
        first, second = dict(exif), dict(inner)
    except Exception:  # damaged EXIF is no reason to refuse the image, and fails in a dozen ways
        found.unreadable["EXIF"] = "damaged"
        return
    for fields in (first, second):
        for tag, place in _TEXT_FIELDS.items():
            data = _bytes(fields.get(tag))
            # A camera's maker note is no text, and nobody misses it.
            if data and ((text := plain_text(data)) is not None or tag != ExifTags.Base.MakerNote):
                found.add(place, text, data)
        for tag, place in _WINDOWS_FIELDS.items():
            data = _bytes(fields.get(tag))
            if data:
                found.add(place, windows_text(data), data)
        data = _bytes(fields.get(ExifTags.Base.UserComment))
        if data.strip(b"\0 "):
            found.add(USER_COMMENT, user_comment(data, order), data)


def _bytes(value: Any) -> bytes:
    """The bytes of an EXIF field of type ASCII, BYTE or UNDEFINED; Pillow decodes ASCII as Latin-1, without loss."""
    if isinstance(value, str):
        return value.encode("latin-1", errors="replace")
    if isinstance(value, tuple) and all(isinstance(one, int) and 0 <= one < 256 for one in value):
        return bytes(value)
    return value if isinstance(value, bytes) else b""
