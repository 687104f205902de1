"""Recognises what often lies in place of a file: Git LFS pointers, web pages, unfinished downloads, other formats."""

from __future__ import annotations

import os
from pathlib import Path

START_BYTES = 512
"""How much of a file's beginning is looked at."""
UNFINISHED = {".part", ".partial", ".crdownload", ".incomplete", ".download", ".opdownload", ".aria2", ".filepart"}
"""What browsers and download programs append to a name until they are done."""
_LFS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body")
_FORMATS = {
    b"GGUF": "a GGUF file (of llama.cpp and stable-diffusion.cpp)",
    b"\x89HDF\r\n": "an HDF5 file (of Keras)",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"RIFF": "a WebP image or another RIFF file",
    b"%PDF": "a PDF document",
}


def stand_in(path: Path | str) -> str | None:
    """The sentence for a file that is not what its name says; None for any other, also for one that cannot be read."""
    try:
        if not os.path.isfile(path):  # opening a pipe would wait
            return None
        with open(path, "rb") as file:
            start = file.read(START_BYTES)
        size = os.path.getsize(path)
    except (OSError, ValueError):
        return None
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(_LFS):
        return f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in its folder"
    if start.startswith((b"/annex/objects/", b".git/annex/objects/")):
        return f"{path} is a git-annex pointer, not the file itself; run git annex get on it"
    if text.startswith(_PAGES):
        return f"{path} is a web page (HTML) in place of the file; download the file itself, logged in if need be"
    if text.startswith(b"<?xml"):
        return f"{path} is an XML answer of a server, saved in place of the file; download the file again"
    if size < START_BYTES and text.startswith((b'{"error', b"entry not found", b"invalid ", b"access ", b"not found")):
        said = " ".join(start.decode("utf-8", "replace").split())[:100]
        return f"{path} is the answer of a server ({said}), saved in place of the file; download the file again"
    return None


def other_format(start: bytes) -> str | None:
    """What a file of weights is that begins with these bytes, if it is of a known other format."""
    return next((what for mark, what in _FORMATS.items() if start.startswith(mark)), None)


def unfinished(path: Path) -> str:
    """The end of a sentence about a file that is too short: what to do."""
    if path.suffix.lower() in UNFINISHED or os.path.exists(f"{path}.aria2"):
        return "its download is not finished; let it finish, or download it again"
    return "download or copy it again"
