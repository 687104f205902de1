"""Writes an image set as WebDataset tar shards: all of them, or nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdcli.data.records import ImageSet
from sdcli.data.tar import BLOCK
from sdcli.errors import CannotWrite
from sdcli.images.formats import IMAGE_SUFFIXES
from sdcli.io.files import AlreadyExists, sync_folder, whole_file
from sdcli.io.temporary_files import sweep, temporary_path


@dataclass(frozen=True)
class WrittenShard:
    """A shard that is whole on the disk, in the folder that will get its name when all are."""

    name: str
    images: int
    size: int


def write_shards(
    images: ImageSet,
    folder: Path,
    *,
    indices: Iterable[int],
    max_bytes: int = 500 * 1000**2,
    max_pictures: int = 10_000,
) -> Iterator[WrittenShard]:
    """Write images to `folder/00000.tar`, ... in the order of `indices`, and yield each shard when it is done.

    Equal images give equal bytes. The folder appears with all its shards, or not at all: it is written under another
    name and renamed at the end. A shard exceeds `max_bytes` only where a single image does.
    Raises AlreadyExists where the folder is there and not empty, CannotWrite, and what reading raises.
    """
    folder = Path(os.path.abspath(folder))
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise AlreadyExists(f"{folder} exists already; shards go to a new folder")
    sweep(folder.parent)
    unfinished = temporary_path(folder.parent, f"{folder.name[:50]}-shards")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise CannotWrite(f"cannot make the folder {unfinished}: {error.strerror}") from None
    try:
        samples = _samples(images, indices)
        pending = next(samples, None)
        number = 0
        while pending is not None:
            name, count = f"{number:05d}.tar", 0
            with (
                whole_file(unfinished / name, overwrite=False) as temporary,
                open(temporary, "xb") as file,
                tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                room = max_bytes - 2 * BLOCK - tarfile.RECORDSIZE  # the end-of-archive mark and its padding
                while pending is not None and count < max_pictures:
                    need = sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for _, data in pending)
                    if count and tar.offset + need > room:
                        break
                    for member, data in pending:
                        facts = tarfile.TarInfo(member)
                        facts.size, facts.mode = len(data), 0o644
                        tar.addfile(facts, io.BytesIO(data))
                    count += 1
                    pending = next(samples, None)
            yield WrittenShard(name, count, (unfinished / name).stat().st_size)
            number += 1
        try:
            os.rename(unfinished, folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise CannotWrite(f"cannot make the folder {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _samples(images: ImageSet, indices: Iterable[int]) -> Iterator[list[tuple[str, bytes]]]:
    """(member, bytes) of the image, its captions and its record, for one image after the other."""
    for number, index in enumerate(indices):
        item, data = images[index], images.read(index)
        key = f"{number:09d}"
        record: dict[str, str | int] = {"name": item.name}
        if item.captions:
            record["caption"] = item.captions[0]
        if item.label is not None:
            record["label"] = item.label
        if item.repeats != 1:
            record["repeats"] = item.repeats
        sample = [(f"{key}{_suffix_of(data, item.name)}", data)]
        if item.captions:
            sample.append((f"{key}.txt", "".join(f"{caption}\n" for caption in item.captions).encode()))
        sample.append((f"{key}.json", json.dumps(record).encode()))  # ASCII, so that odd file names survive
        yield sample


_STARTS = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


def _suffix_of(data: bytes, name: str) -> str:
    """The suffix for the bytes' format; if unknown, that of the name."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    for start, suffix in _STARTS.items():
        if data.startswith(start):
            return suffix
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix in IMAGE_SUFFIXES else ".png"
