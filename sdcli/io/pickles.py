"""Recognises pickles by their suffix and first bytes, and words their refusal: opening one can run any program."""

from __future__ import annotations

import shlex
from pathlib import Path

from sdcli.io.stand_ins import stand_in

PICKLE_SUFFIXES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def is_pickle(start: bytes, *, size: int) -> bool:
    """Whether a file of so many bytes that begins with these eight is a pickle, or a zip with one in it.

    The length of a safetensors header, with which such a file begins, may look like one: 640 is `80 02 00 ...`.
    """
    return start.startswith(PICKLE_STARTS) and int.from_bytes(start[:8], "little") > size - 8


def pickle_refused(path: Path | str) -> str:
    """The sentence for a pickle, which can run code when it is opened, or for what lies in place of one."""
    if (instead := stand_in(path)) is not None:
        return instead
    file = Path(path)
    refused = f"{path} is a pickle, which can run any code when opened; sdcli reads safetensors only. "
    if (folder := _model_folder(file)) is not None:
        quoted = shlex.quote(str(folder))
        return f"{refused}Convert the folder in a sandboxed process: sdcli models convert {quoted} {quoted}"
    source, target = (shlex.quote(str(one)) for one in (file, file.with_suffix(".safetensors")))
    return f"{refused}Convert it in a sandboxed process: sdcli models convert {source} {target}"


def _model_folder(file: Path) -> Path | None:
    """The folder to convert as a whole: the model's, or that of weights that stand beside their configuration."""
    folder = file.parent
    if (folder.parent / "model_index.json").is_file():
        return folder.parent
    stem = file.name.removesuffix(".bin").partition("-")[0]
    beside = ("config.json", "adapter_config.json", f"{stem}.bin.index.json")
    return folder if any((folder / name).is_file() for name in beside) else None
