"""Recognises pickles by their suffix and first bytes, and words their refusal: opening one can run any program."""

from __future__ import annotations

from pathlib import Path

PICKLE_SUFFIXES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def is_pickle(start: bytes, *, size: int) -> bool:
    """Whether a file of so many bytes that begins with these eight is a pickle, or a zip with one in it.

    The length of a safetensors header, with which such a file begins, may look like one: 640 is `80 02 00 ...`.
    """
    return start.startswith(PICKLE_STARTS) and int.from_bytes(start[:8], "little") > size - 8


def pickle_refused(path: Path | str) -> str:
    """The sentence for a pickle, which can run code when it is opened."""
    stem = Path(path).with_suffix(".safetensors")
    return (
        f"{path} is a pickle, which can run any code when opened; sdcli reads safetensors only. "
        f"Convert it in a sandboxed process: sdcli models convert {path} {stem}"
    )
