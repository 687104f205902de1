"""Decodes every image of a set once before training, and reports which can be used, which not, and why."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdcli.data.latent_folders import LatentFiles
from sdcli.data.records import DroppedItem, ImageSet, Remark
from sdcli.errors import BadImage, BadLatents, CannotWrite, NotFound
from sdcli.images.image_files import image_from_bytes
from sdcli.io.files import write_whole
from sdcli.io.json_files import parse_json

SCHEMA = 2
"""To be raised when the same bytes may be judged differently: facts that were stored before are then ignored."""
EXAMPLES = 3
"""How many images a line of the report names."""


@dataclass(frozen=True)
class ImageFacts:
    """The facts about one image that decoding it gives."""

    index: int
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels, upright; (0, 0) if it cannot be used."""
    digest: str = ""
    """The SHA-256 of its bytes, in hexadecimal."""
    hash: int = 0
    """Its difference hash; see `difference_hash`."""
    reason: str = ""
    """Why it cannot be used."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """The facts about all images of a set."""

    source: str
    used: np.ndarray
    """int64 [m]: the indices of the images that can be used, rising."""
    sizes: np.ndarray
    """int32 [n, 2]: width and height in pixels of every image, upright; 0 for those that are not used."""
    digests: tuple[str, ...]
    """[n] The SHA-256 of each image's bytes, in hexadecimal; empty for those that are not used."""
    hashes: np.ndarray
    """uint64 [n]: difference hashes."""
    dropped: tuple[DroppedItem, ...]
    """What is not used: found while listing, or while decoding."""
    uncaptioned: np.ndarray
    """int64: the indices of used images without a caption."""
    remarks: tuple[Remark, ...]
    smallest: str = ""
    """The name of the used image with the fewest pixels."""
    uncaptioned_examples: tuple[str, ...] = ()
    lost: int = 0
    """The number of captions and tables that nothing read, without those of `uncaptioned` images."""

    def report(self) -> list[str]:
        """Lines for people: how many images are used and how many not, each reason with up to three examples."""
        total = len(self.used) + len(self.dropped)
        lines = [f"{self.source}: {len(self.used):,} of {total:,} are used, {len(self.dropped):,} dropped"]
        lines += [f"  dropped {line}" for line in _grouped((one.name, one.reason) for one in self.dropped)]
        if len(self.uncaptioned):
            lines.append(f"  {len(self.uncaptioned):,} without a caption: {_examples(self.uncaptioned_examples)}")
        lines += [f"  lost {line}" for line in _grouped((one.name, one.text) for one in self.remarks if one.loses)]
        lines += [f"  note {line}" for line in _grouped((one.name, one.text) for one in self.remarks if not one.loses)]
        if len(self.used):
            lines.append(f"  sizes {_sizes_line(self.sizes[self.used])}; the smallest is {self.smallest}")
        return lines

    def warnings(self) -> list[str]:
        """The lines of `report` about what is not used, for -q, too."""
        return [line.strip() for line in self.report() if line.startswith(("  dropped", "  lost"))]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON; lists are complete."""
        sizes = self.sizes[self.used]
        return {
            "source": self.source,
            "used": len(self.used),
            "dropped": [{"name": one.name, "reason": one.reason} for one in self.dropped],
            "uncaptioned": len(self.uncaptioned),
            "uncaptioned_examples": list(self.uncaptioned_examples),
            "lost": self.lost,
            "remarks": [{"name": one.name, "text": one.text, "loses": one.loses} for one in self.remarks],
            "smallest": self.smallest,
            "sizes": {
                "smallest": sizes[_areas(sizes).argmin()].tolist() if len(sizes) else None,
                "median": np.median(sizes, axis=0).astype(int).tolist() if len(sizes) else None,
                "largest": sizes[_areas(sizes).argmax()].tolist() if len(sizes) else None,
            },
        }


def inspect(images: ImageSet, *, facts_folder: Path | None = None, workers: int | None = None) -> Iterator[ImageFacts]:
    """Decode every image once, in threads, and yield its facts in order of the index.

    `facts_folder` is where the facts are stored by name and stamp (size, time of change, place in the shard), so that
    a second run decodes new images only. If it cannot be written, the next run takes as long as this one.
    `workers`: threads, by default one per CPU.
    Raises Offline where streamed images cannot be fetched.
    """
    known_facts = _KnownFacts.read(facts_folder, images.source) if facts_folder is not None else _KnownFacts(None)
    count = workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix="examine")
    waiting: deque[Future[ImageFacts]] = deque()
    complete = False
    try:
        for index in range(len(images)):
            waiting.append(pool.submit(_facts_of, images, index, known_facts))
            if len(waiting) >= 4 * count:  # bounded, so that only a few images are held
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        complete = True
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        known_facts.write(complete=complete)


def summarize(images: ImageSet, seen: Iterable[ImageFacts]) -> Inspection:
    """The facts about all images, as `inspect` yields them, as one value."""
    number = len(images)
    sizes, hashes = np.zeros((number, 2), dtype=np.int32), np.zeros(number, dtype=np.uint64)
    digests, dropped = [""] * number, list(images.dropped)
    uncaptioned: list[int] = []
    examples: list[str] = []
    for one in seen:
        if one.reason:
            dropped.append(DroppedItem(images[one.index].name, one.reason))
            continue
        sizes[one.index], hashes[one.index], digests[one.index] = one.size, one.hash, one.digest
        item = images[one.index]
        if not item.captions:
            uncaptioned.append(one.index)
            examples += [item.name] if len(examples) < EXAMPLES else []
    used = np.flatnonzero(sizes[:, 0])
    smallest = images[int(used[_areas(sizes[used]).argmin()])].name if len(used) else ""
    without = {images[index].name for index in uncaptioned}
    return Inspection(
        source=images.source,
        used=used.astype(np.int64),
        sizes=sizes,
        digests=tuple(digests),
        hashes=hashes,
        dropped=tuple(dropped),
        uncaptioned=np.array(uncaptioned, dtype=np.int64),
        remarks=images.remarks,
        smallest=smallest,
        uncaptioned_examples=tuple(examples),
        lost=sum(one.loses for one in images.remarks if one.name not in without),
    )


def difference_hash(image: Image.Image) -> int:
    """64 bits: for each cell of an 8x8 grid, whether the image gets darker to the right.

    Images that were only resized or compressed again differ in a few bits. (dHash, N. Krawetz, "Kind of Like That",
    hackerfactor.com 2013.)
    """
    grey = np.asarray(image.resize((9, 8), Image.Resampling.BOX).convert("L"), dtype=np.int16)
    bits = np.packbits(grey[:, :-1] > grey[:, 1:])
    return int.from_bytes(bits.tobytes(), "big")


# One image


def _facts_of(images: ImageSet, index: int, known_facts: _KnownFacts) -> ImageFacts:
    name = images[index].name
    try:
        key = f"{name}\n{images.stamp(index)}"
        known = known_facts.recall(key, index)
        if known is not None:
            return known
        data = images.read(index)
    except NotFound:
        return ImageFacts(index, reason="is gone")
    except BadImage as error:
        return ImageFacts(index, reason=_reason(str(error), name))
    seen = _decode(images, index, data, name)
    known_facts.add(key, seen)
    return seen


def _decode(images: ImageSet, index: int, data: bytes, name: str) -> ImageFacts:
    digest = hashlib.sha256(data).hexdigest()
    try:
        if isinstance(images, LatentFiles):
            images.read_latents(index)
            width, height = (int(side) for side in images.sizes[index])
            place = int(images.places[index])
            return ImageFacts(index, (width, height), digest if place < 0 else f"{digest}:{place}")
        image = image_from_bytes(data, name=name)
    except (BadImage, BadLatents, NotFound) as error:
        return ImageFacts(index, digest=digest, reason=_reason(str(error), name))
    except MemoryError:
        return ImageFacts(index, digest=digest, reason="does not fit into memory")
    return ImageFacts(index, image.size, digest, difference_hash(image))


def _reason(sentence: str, name: str) -> str:
    """What follows the name in `folder/name: is cut short`, or in `folder/name is damaged`."""
    known = name if sentence.startswith(name) else name.rpartition("/")[2]
    _, found, reason = sentence.partition(known)
    return reason.removeprefix(":").strip() if found and reason.strip(": ") else sentence


# Facts of earlier runs


class _KnownFacts:
    """Facts about a source's images by name and stamp, stored in one file."""

    def __init__(self, path: Path | None, known: dict[str, list[Any]] | None = None) -> None:
        self._path = path
        self._known = known or {}
        self._current: dict[str, list[Any]] = {}
        self._changed = False

    @classmethod
    def read(cls, folder: Path, source: str) -> _KnownFacts:
        """The stored facts; none if the file is missing, damaged or of another version."""
        identity = hashlib.sha256(os.fsencode(os.path.abspath(source))).hexdigest()[:32]
        path = folder / f"examined-{identity}.json"
        try:
            content = parse_json(path.read_bytes())
            known = content["seen"] if content["schema"] == SCHEMA else {}
        except (OSError, ValueError, KeyError, TypeError):
            known = {}
        return cls(path, known if isinstance(known, dict) else {})

    def recall(self, key: str, index: int) -> ImageFacts | None:
        entry = self._known.get(key)
        match entry:
            case [int(width), int(height), str(digest), int(hash_), str(reason)] if 0 <= hash_ < 2**64:
                self._current[key] = entry
                return ImageFacts(index, (width, height), digest, hash_, reason)
        return None

    def add(self, key: str, seen: ImageFacts) -> None:
        self._current[key] = [*seen.size, seen.digest, seen.hash, seen.reason]
        self._changed = True

    def write(self, *, complete: bool) -> None:
        """Store new facts; after a complete inspection, entries of images that are gone are removed."""
        if self._path is None or not self._changed:
            return
        seen = self._current if complete else self._known | self._current
        data = json.dumps({"schema": SCHEMA, "seen": seen}).encode()
        with contextlib.suppress(CannotWrite):
            write_whole(self._path, data, overwrite=True)


# The report


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """`reason (3): a, b, c`, the most frequent first. Reasons that differ in numbers and names only are one."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, reason in pairs:
        alike = re.sub(r"\d[\d,.]*|\([^)]*\)", "#", reason)
        groups.setdefault(alike, []).append((name, reason))
    ordered = sorted(groups.values(), key=lambda group: -len(group))
    return [f"{len(group):,}: {group[0][1]}: {_examples([name for name, _ in group])}" for group in ordered]


def _examples(names: Sequence[str]) -> str:
    shown = ", ".join(names[:EXAMPLES])
    return f"{shown}, ..." if len(names) > EXAMPLES else shown


def _sizes_line(sizes: np.ndarray) -> str:
    areas = _areas(sizes)
    least, most = sizes[areas.argmin()], sizes[areas.argmax()]
    if (sizes == sizes[0]).all():
        return f"{least[0]}x{least[1]}"
    middle = np.median(sizes, axis=0).astype(int)
    return f"{least[0]}x{least[1]} to {most[0]}x{most[1]}, median {middle[0]}x{middle[1]}"


def _areas(sizes: np.ndarray) -> np.ndarray:
    return sizes[:, 0].astype(np.int64) * sizes[:, 1]
