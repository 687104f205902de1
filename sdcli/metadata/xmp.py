"""sdcli's record as the XMP property `sdcli:record` of a JPEG or WebP file, written and read.

A JPEG packet over 64 KB continues in Extended XMP (XMP specification, part 3, 1.1.3.1).
"""

from __future__ import annotations

import hashlib
import struct
from xml.parsers import expat
from xml.sax.saxutils import escape

from PIL import Image

_LEVELS = 8
"""Levels of a packet's elements that hold the texts of the elements in them."""
MAX_SEGMENT = 65533
"""Bytes of data in one JPEG segment."""
APP1 = 0xE1

_XMP_SIGNATURE = b"http://ns.adobe.com/xap/1.0/\0"
_EXTENSION_SIGNATURE = b"http://ns.adobe.com/xmp/extension/\0"
_SDCLI_NAMESPACE = "urn:sdcli:1.0:"
_NOTE_NAMESPACE = "http://ns.adobe.com/xmp/note/"


def xmp_packet(own: str) -> bytes:
    """An XMP packet that holds the record `own`."""
    return _packet(_property(own))


def jpeg_segments(own: str) -> bytes:
    """APP1 segments that hold the record: one packet, or one that names an extension, and the extension in pieces."""
    packet = _packet(_property(own))
    if len(_XMP_SIGNATURE) + len(packet) <= MAX_SEGMENT:
        return jpeg_segment(APP1, _XMP_SIGNATURE + packet)
    extension = _document(_property(own)).encode()
    guid = hashlib.md5(extension, usedforsecurity=False).hexdigest().upper()
    note = f'<rdf:Description rdf:about="" xmlns:xmpNote="{_NOTE_NAMESPACE}" xmpNote:HasExtendedXMP="{guid}"/>'
    head = _EXTENSION_SIGNATURE + guid.encode() + struct.pack(">I", len(extension))
    room = MAX_SEGMENT - len(head) - 4
    pieces = [
        jpeg_segment(APP1, head + struct.pack(">I", offset) + extension[offset : offset + room])
        for offset in range(0, len(extension), room)
    ]
    return jpeg_segment(APP1, _XMP_SIGNATURE + _packet(note)) + b"".join(pieces)


def jpeg_segment(marker: int, data: bytes) -> bytes:
    """One segment of a JPEG file."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def xmp_record(image: Image.Image) -> str | None:
    """The record in a decoded image's XMP, or None."""
    packet = image.info.get("xmp")
    if not isinstance(packet, bytes):
        return None
    found = _properties(packet)
    guid = found.get(f"{_NOTE_NAMESPACE} HasExtendedXMP")
    if guid is not None:
        found |= _properties(_extension(getattr(image, "applist", []), guid))
    return found.get(f"{_SDCLI_NAMESPACE} record")


def xmp_texts(packet: bytes) -> dict[str, str]:
    """The texts that other tools write into a packet: `CreatorTool`, `description`, `UserComment`; of lists all."""
    found = _properties(packet, nested=True)
    return {name.rpartition(" ")[2]: text.strip() for name in _SHOWN if (text := found.get(name, "")).strip()}


_SHOWN = (
    "http://ns.adobe.com/xap/1.0/ CreatorTool",
    "http://purl.org/dc/elements/1.1/ description",
    "http://ns.adobe.com/exif/1.0/ UserComment",
)


def _property(own: str) -> str:
    opening = f'<rdf:Description rdf:about="" xmlns:sdcli="{_SDCLI_NAMESPACE}">'
    return f"{opening}<sdcli:record>{escape(own)}</sdcli:record></rdf:Description>"


def _document(description: str) -> str:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f"{description}</rdf:RDF></x:xmpmeta>"
    )


def _packet(description: str) -> bytes:
    begin = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    return f'{begin}{_document(description)}<?xpacket end="r"?>'.encode()


def _extension(segments: list[tuple[str, bytes]], guid: str) -> bytes:
    """The extension that a packet names, from its pieces in any order; empty if a piece is missing."""
    head = _EXTENSION_SIGNATURE + guid.encode()
    pieces = [data[len(head) + 4 :] for name, data in segments if name == "APP1" and data.startswith(head)]
    ordered = sorted((piece for piece in pieces if len(piece) >= 4), key=lambda piece: piece[:4])
    extension = b"".join(piece[4:] for piece in ordered)
    whole = hashlib.md5(extension, usedforsecurity=False).hexdigest().upper() == guid.upper()
    return extension if whole else b""


def _properties(packet: bytes, *, nested: bool = False) -> dict[str, str]:
    """`"namespace name"` -> text of a packet's elements and attributes; empty if it is not plain XML.

    With `nested` an element's text holds those of the elements in it, within a few levels.
    """
    found: dict[str, str] = {}
    open_texts: list[list[str]] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        found.update(attributes)
        open_texts.append([])

    def text(part: str) -> None:
        if open_texts:
            open_texts[-1].append(part)

    def end(name: str) -> None:
        whole = "".join(open_texts.pop())
        found.setdefault(name, whole)
        if nested and 0 < len(open_texts) <= _LEVELS:
            open_texts[-1].append(whole)

    def doctype(*_: object) -> None:
        raise ValueError("entities can expand to gigabytes")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(packet, True)
    except (expat.ExpatError, ValueError):
        return {}
    return found
