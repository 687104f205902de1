"""A web page of a folder's images: their metadata and thumbnails as JSON inside the template `gallery.html`.

The page needs no network and no other file; only its large view loads the images themselves, by relative address. It is
safe with hostile metadata: the JSON is ASCII with `<` escaped, in an element that is never executed; the script creates
text nodes only; and a Content-Security-Policy allows that script by its digest, and nothing else.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image, ImageOps

from sdcli.errors import SdcliError
from sdcli.metadata.read import ImageInfo, image_and_info

THUMBNAIL = 192
"""Pixels of a thumbnail's longer side."""
MOST_EMBEDDED = 20_000
"""With more images the page has no embedded thumbnails (about 4 KB each); it shows the images themselves."""


@dataclass(frozen=True)
class Entry:
    """One image of the page, or the error that keeps it off."""

    path: Path
    info: ImageInfo | None = None
    modified: int = 0
    """Milliseconds since 1970."""
    thumbnail: bytes | None = None
    """WebP of at most THUMBNAIL pixels a side, upright."""
    error: SdcliError | None = None


def read_entries(paths: Sequence[Path]) -> Iterator[Entry]:
    """Read every image, in threads, and yield it in the order of `paths`."""
    count = min(8, os.cpu_count() or 1)  # each may hold an image of 8192x8192: a quarter of a gigabyte
    thumbnails = len(paths) <= MOST_EMBEDDED
    pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix="gallery")
    waiting: deque[Future[Entry]] = deque()
    try:
        for path in paths:
            waiting.append(pool.submit(_entry, path, thumbnails))
            if len(waiting) >= 4 * count:  # bounded, so that only a few images are in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def entry_json(entry: Entry, *, name: str, page: Path, command: str | None) -> dict[str, Any]:
    """The JSON-ready data of an entry without error; `page` is the path of the page.

    Every value of a record is text, because JavaScript's numbers cannot hold every seed.
    """
    info = entry.info
    assert info is not None
    return {
        "name": name,
        "url": _address(entry.path, page),
        "thumbnail": _data_url(entry.thumbnail) if entry.thumbnail is not None else None,
        "modified": entry.modified,
        "size": f"{info.width} × {info.height} {info.format}",
        "source": info.source,
        "request": _texts(info.request.typed()) if info.request is not None else {},
        "provenance": _texts(info.record.provenance) if info.record is not None else {},
        "parameters": info.parameters if info.record is None else None,  # sdcli writes it from its record
        "unmapped": _texts(info.unmapped),
        "command": command,
    }


def page(title: str, images: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The page in pieces of text; `images` as `entry_json` returns them are consumed one by one."""
    template = resources.files("sdcli.metadata").joinpath("gallery.html").read_text(encoding="utf-8")
    for kind in ("script", "style"):
        source = re.search(rf"<{kind}>(.*?)</{kind}>", template, re.DOTALL)
        assert source is not None
        digest = base64.b64encode(hashlib.sha256(source[1].encode()).digest()).decode()
        template = template.replace(f"@{kind}@", f"sha256-{digest}")
    before, _, after = template.partition("@images@")
    yield before.replace("@title@", _json(title))
    for number, image in enumerate(images):
        yield (",\n" if number else "") + _json(image)
    yield after


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def _texts(fields: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in fields.items()
    }


def _address(path: Path, page: Path) -> str:
    """A URL relative to the page, so that both can move together; quoting keeps names from acting as scheme or host."""
    try:
        relative = os.path.relpath(path, page.parent)
    except ValueError:  # Windows: no relative path leads to another drive
        return path.absolute().as_uri()
    return quote(os.fsencode(relative.replace(os.sep, "/")))


def _data_url(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def _entry(path: Path, thumbnails: bool) -> Entry:
    try:
        with image_and_info(path) as (image, info):
            modified = path.stat().st_mtime_ns // 1_000_000
            return Entry(path, info, modified, _thumbnail(image) if thumbnails else None)
    except SdcliError as error:
        return Entry(path, error=error)


def _thumbnail(image: Image.Image) -> bytes:
    if image.mode.startswith("I"):  # scale 16 bits to 8; Pillow would clip them
        image = image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    small = image if image.mode == mode else image.convert(mode)  # no copy where none is needed
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    with contextlib.suppress(Exception):  # damaged EXIF is no reason to refuse the image, and fails in a dozen ways
        small = ImageOps.exif_transpose(small)
    clean = Image.frombytes(small.mode, small.size, small.tobytes())  # drops the profile and EXIF in its `info`
    file = io.BytesIO()
    clean.save(file, format="WEBP", quality=60, method=4)
    return file.getvalue()
