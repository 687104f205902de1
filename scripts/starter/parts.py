"""Pack the training state of the starter into small files, and unpack it on a machine that keeps nothing.

    python scripts/starter/parts.py pack WORK OUT
    python scripts/starter/parts.py unpack IN WORK

The files in OUT have at most 15 MiB each and, for the starter, less than 64 MiB in all: the sprites as lossless WebP,
the texts, and the weights of finished runs in float16. Optimizer states are not packed, so pack between runs: an
unfinished step of the plan starts again. After `unpack`, train.py continues with the next step.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from assemble import float16_bytes
from PIL import Image

CHUNK = 15 * 2**20
"""Maximum bytes of a file."""
COLUMNS = 96
"""Sprites in a row of the packed image; WebP allows at most 16,383 pixels per side."""
SMALL_FILES = ("sprites.json", "texts.txt")
NOT_PACKED = "scenes"
"""Prefix of the steps whose shards are not packed, but made again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    chosen = parser.parse_args()
    if not chosen.source.is_dir():
        sys.exit(f"{chosen.source} is not a folder")
    chosen.target.mkdir(parents=True, exist_ok=True)
    (pack if chosen.action == "pack" else unpack)(chosen.source, chosen.target)


def pack(work: Path, out: Path) -> None:
    """Write WORK to `out` as one archive, split into files of at most CHUNK bytes."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        add_file(archive, "sprites.webp", encode_sprites(np.load(work / "sprites.npy", mmap_mode="r")))
        for name in SMALL_FILES:
            if (work / name).exists():
                add_file(archive, f"{name}.gz", gzip.compress((work / name).read_bytes(), mtime=0))
        for marker in sorted((work / "done").glob("*")):
            run = work / "runs" / marker.name
            if not marker.name.startswith(NOT_PACKED):
                add_file(archive, f"done/{marker.name}", b"")
            for path in sorted(model_files(run)):
                add_file(archive, str(path.relative_to(work)), float16_bytes(path))
    data = whole.getvalue()
    for place, start in enumerate(range(0, len(data), CHUNK)):
        (out / f"part-{place:02d}").write_bytes(data[start : start + CHUNK])


def unpack(source: Path, work: Path) -> None:
    """The inverse of `pack`."""
    whole = io.BytesIO(b"".join(path.read_bytes() for path in sorted(source.glob("part-*"))))
    with tarfile.open(fileobj=whole) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # which Python 3.11 has from 3.11.4 on
        archive.extractall(work)
    np.save(work / "sprites.npy", decode_sprites((work / "sprites.webp").read_bytes()))
    (work / "sprites.webp").unlink()
    for path in work.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()


def model_files(run: Path) -> list[Path]:
    """The files of a finished run that make up its model, without the checkpoints."""
    if not (run / "model_index.json").exists():
        return []
    index = json.loads((run / "model_index.json").read_text(encoding="utf-8"))
    folders = [run / name for name in index if (run / name).is_dir()]
    return [path for path in run.glob("*.json") if path.is_file()] + [
        path for folder in folders for path in folder.iterdir() if path.is_file()
    ]


def add_file(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to an archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def encode_sprites(sprites: np.ndarray) -> bytes:
    """uint8 [n, S, S, 4] -> one lossless WebP; the cells after the last sprite are transparent."""
    count, side = sprites.shape[:2]
    rows = -(-count // COLUMNS)
    padded = np.zeros((rows * COLUMNS, side, side, 4), np.uint8)
    padded[:count] = sprites
    sheet = (
        padded.reshape(rows, COLUMNS, side, side, 4).transpose(0, 2, 1, 3, 4).reshape(rows * side, COLUMNS * side, 4)
    )
    buffer = io.BytesIO()
    comment = json.dumps({"count": count, "side": side}).encode()
    Image.fromarray(np.ascontiguousarray(sheet), "RGBA").save(
        buffer, "WEBP", lossless=True, exact=True, method=3, exif=b"Exif\0\0" + comment
    )
    return buffer.getvalue()


def decode_sprites(data: bytes) -> np.ndarray:
    """The inverse of `encode_sprites`."""
    with Image.open(io.BytesIO(data)) as image:
        facts = json.loads(image.info["exif"].removeprefix(b"Exif\0\0"))
        sheet = np.asarray(image.convert("RGBA"))
    side = facts["side"]
    rows = sheet.shape[0] // side
    sprites = sheet.reshape(rows, side, COLUMNS, side, 4).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 4)
    return np.ascontiguousarray(sprites[: facts["count"]])


if __name__ == "__main__":
    main()
