"""Model files on the disk, read without torch: headers of safetensors, shards and digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sdcli.errors import BadWeights
from sdcli.io.digests import digest_of
from sdcli.io.json_files import parse_json
from sdcli.io.pickles import is_pickle, pickle_refused
from sdcli.io.stand_ins import other_format, stand_in, unfinished

MAX_HEADER_BYTES = 20_000_000
MAX_TENSORS = 20_000
FLOATS = {"F64", "F32", "F16", "BF16"}


def check_header(path: Path) -> dict[str, Any]:
    """The parsed header of a safetensors file, checked before anything else reads it.

    Raises BadWeights with a sentence of its own for a pickle, an empty, truncated or hostile file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if is_pickle(start, size=size):
                raise BadWeights(pickle_refused(path))
            if (instead := stand_in(path)) is not None:
                raise BadWeights(instead)
            if size < 8 + 2 or (length > MAX_HEADER_BYTES and length > size):
                raise BadWeights(_not_safetensors(path, start, size=size))
            if length > MAX_HEADER_BYTES:
                raise BadWeights(
                    f"{path} has a header of {length:,} bytes; no model needs more than {MAX_HEADER_BYTES:,}"
                )
            if length > size - 8:
                raise BadWeights(
                    f"{path} is cut short: its header alone has {length:,} bytes, the file {size:,}; {unfinished(path)}"
                )
            raw = file.read(length)
        header = parse_json(raw)
    except OSError as error:
        raise BadWeights(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise BadWeights(f"{path} is not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise BadWeights(f"{path} is not a safetensors file: its header is not a table of tensors")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(tensors) > MAX_TENSORS:
        raise BadWeights(
            f"{path} has {len(tensors):,} tensors; no model that sdcli knows has more than {MAX_TENSORS:,}"
        )
    ends = [
        entry["data_offsets"][1]
        for entry in tensors.values()
        if _are_numbers(entry.get("shape")) and _are_numbers(entry.get("data_offsets"), count=2)
    ]
    if len(ends) != len(tensors):
        raise BadWeights(f"{path} is not a safetensors file: a tensor in its header has no place or no shape")
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise BadWeights(f"{path} is cut short: {size:,} bytes of {expected:,}; {unfinished(path)}")
    if size > expected:
        raise BadWeights(
            f"{path} is damaged: it has {size:,} bytes, and its header describes {expected:,}; {unfinished(path)}"
        )
    return header


def _not_safetensors(path: Path, start: bytes, *, size: int) -> str:
    if size == 0:
        return f"{path} is not a safetensors file: it is empty; {unfinished(path)}"
    other = other_format(start)
    return f"{path} is not a safetensors file{f': it is {other}' if other is not None else ''}"


def _are_numbers(value: Any, *, count: int | None = None) -> bool:
    if not isinstance(value, list) or len(value) != (len(value) if count is None else count):
        return False
    return all(type(number) is int and number >= 0 for number in value)


def shards(folder: Path, stem: str, *, variant: str | None = None) -> list[Path]:
    """The weight files of a diffusers sub-folder: `stem.safetensors`, its variant, or the shards of its index."""
    for suffix in (f".{variant}", "") if variant else ("", ".fp16"):
        if (folder / f"{stem}{suffix}.safetensors").is_file():
            return [folder / f"{stem}{suffix}.safetensors"]
        for index in (f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors.index.json"):
            if (folder / index).is_file():
                return [folder / name for name in _present(folder / index)]
    pickles = [path for path in folder.glob("*") if path.suffix in {".bin", ".ckpt", ".pt", ".pth"}]
    if pickles:
        raise BadWeights(pickle_refused(pickles[0]))
    raise BadWeights(f"{folder} has no weights: expected {stem}.safetensors")


def _present(index: Path) -> list[str]:
    """The shards that an index names, each of which is beside it. Raises BadWeights."""
    names = shard_names(index)
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise BadWeights(f"{index} names the shard {name!r}, which is not beside it")
    return names


def shard_names(index: Path) -> list[str]:
    """The file names in a `.safetensors.index.json`, sorted. Raises BadWeights."""
    try:
        names = set(parse_json(index.read_bytes())["weight_map"].values())
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a shard's name is not text")
        return sorted(names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadWeights(stand_in(index) or f"{index} is not an index of weight files: {error}") from None


def files_digest(files: list[Path]) -> str:
    """`sha256:` of one file, or of the digests of several shards."""
    digests = [digest_of(file) for file in files]
    return f"sha256:{digests[0] if len(digests) == 1 else hashlib.sha256(' '.join(digests).encode()).hexdigest()}"


def finished(identity: str) -> Future[str]:
    """An identity that needs no hashing."""
    known: Future[str] = Future()
    known.set_result(identity)
    return known


def in_background(*hashings: Callable[[], str]) -> list[Future[str]]:
    """Identities, computed one after the other in a thread of their own."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights-sha256")
    futures = [thread.submit(hashing) for hashing in hashings]
    thread.shutdown(wait=False)
    return futures
