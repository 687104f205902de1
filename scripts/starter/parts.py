"""Carry the making of the starter to a machine that forgets everything and takes little: pack WORK small, unpack it.

    python scripts/starter/parts.py pack WORK OUT
    python scripts/starter/parts.py unpack IN WORK

OUT holds no file of more than 15 MiB and, for the starter, less than 64 MiB in all: the sprites as lossless WebP, the
texts, and the weights of finished runs in float16. Optimizers stay behind, so pack between runs: a step of the plan
that was not finished begins again. After `unpack`, train.py goes on with the next step.
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
from assemble import halved
from PIL import Image

CHUNK = 15 * 2**20
"""Bytes a file."""
COLUMNS = 96
"""Sprites in a row of the packed image; WebP takes at most 16,383 pixels a side."""
SMALL_FILES = ("sprites.json", "texts.txt")
MADE_AGAIN = "scenes"
"""Steps whose shards are not carried."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    chosen = parser.parse_args()
    if not chosen.source.is_dir():
        sys.exit(f"no folder {chosen.source}")
    chosen.target.mkdir(parents=True, exist_ok=True)
    (pack if chosen.action == "pack" else unpack)(chosen.source, chosen.target)


def pack(work: Path, out: Path) -> None:
    """WORK as one archive, cut into files of at most CHUNK bytes."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        put(archive, "sprites.webp", sprites_as_webp(np.load(work / "sprites.npy", mmap_mode="r")))
        for name in SMALL_FILES:
            if (work / name).exists():
                put(archive, f"{name}.gz", gzip.compress((work / name).read_bytes(), mtime=0))
        for marker in sorted((work / "done").glob("*")):
            run = work / "runs" / marker.name
            if not marker.name.startswith(MADE_AGAIN):
                put(archive, f"done/{marker.name}", b"")
            for path in sorted(parts_of(run)):
                put(archive, str(path.relative_to(work)), halved(path))
    data = whole.getvalue()
    for place, start in enumerate(range(0, len(data), CHUNK)):
        (out / f"part-{place:02d}").write_bytes(data[start : start + CHUNK])


def unpack(source: Path, work: Path) -> None:
    """The contrary of `pack`."""
    whole = io.BytesIO(b"".join(path.read_bytes() for path in sorted(source.glob("part-*"))))
    with tarfile.open(fileobj=whole) as archive:
        archive.extractall(work, filter="data")
    np.save(work / "sprites.npy", sprites_of_webp((work / "sprites.webp").read_bytes()))
    (work / "sprites.webp").unlink()
    for path in work.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()


def parts_of(run: Path) -> list[Path]:
    """The files of a finished run that make it a model: RUN's links, not its checkpoints."""
    if not (run / "model_index.json").exists():
        return []
    index = json.loads((run / "model_index.json").read_text(encoding="utf-8"))
    folders = [run / name for name in index if (run / name).is_dir()]
    return [path for path in run.glob("*.json") if path.is_file()] + [
        path for folder in folders for path in folder.iterdir() if path.is_file()
    ]


def put(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def sprites_as_webp(sprites: np.ndarray) -> bytes:
    """uint8 [n, S, S, 4] -> one lossless image; behind the last sprite there is nothing."""
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


def sprites_of_webp(data: bytes) -> np.ndarray:
    """The contrary of `sprites_as_webp`."""
    with Image.open(io.BytesIO(data)) as image:
        facts = json.loads(image.info["exif"].removeprefix(b"Exif\0\0"))
        sheet = np.asarray(image.convert("RGBA"))
    side = facts["side"]
    rows = sheet.shape[0] // side
    sprites = sheet.reshape(rows, side, COLUMNS, side, 4).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 4)
    return np.ascontiguousarray(sprites[: facts["count"]])


if __name__ == "__main__":
    main()
