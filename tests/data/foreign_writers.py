"""Strategies that write data sets as other tools do, with the truth about them: what is used, what must be named."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import strategies as st

from tests.data.test_dataset_folders import IMAGE

READ = (".png", ".JPG", ".jpe", ".jfif", ".webp", ".apng", ".bmp", ".TIFF", ".gif")
UNREAD = (".heic", ".ppm", ".avif", ".CR2", ".mp4", ".jxl")
WORDS = ("a red kettle", "кот", "猫 on a mat", "café au lait", "🐈, cat", "1girl, solo", "x")
GOOD: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode,
    "utf-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "PowerShell's >": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "big endian": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
}
BAD: dict[str, Callable[[str], bytes]] = {
    "utf-16 without a mark": lambda text: text.encode("utf-16-le"),
    "cp1252": lambda text: b"caf\xe9 " + text.encode("ascii", "replace"),
    "a NUL": lambda text: text.encode() + b"\0",
}
captions = st.lists(st.sampled_from(WORDS), min_size=1, max_size=2, unique=True).map(tuple)


@dataclass
class Brought:
    """A folder that a tool wrote."""

    files: dict[str, bytes] = field(default_factory=dict)
    used: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Image -> its captions."""
    dropped: set[str] = field(default_factory=set)
    remarked: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    """Files that are read besides the images: captions and tables."""
    repeats: dict[str, int] = field(default_factory=dict)

    def add_image(self, draw: st.DrawFn, stem: str, texts: tuple[str, ...], extension: str) -> None:
        """An image with a caption file; now and then in a format or an encoding that is not read."""
        if draw(st.integers(0, 9)) == 0:
            name = stem + draw(st.sampled_from(UNREAD))
            self.files[name] = b"?"
            self.dropped.add(name)
            self.remarked.add(stem + extension)  # its caption has no image
            encode: Callable[[str], bytes] = str.encode
        else:
            name = stem + draw(st.sampled_from(READ))
            self.files[name] = IMAGE
            self.read.add(stem + extension)
            if draw(st.integers(0, 9)) == 0:
                encode = draw(st.sampled_from(list(BAD.values())))
                self.dropped.add(name)
            else:
                encode = draw(st.sampled_from(list(GOOD.values())))
                self.used[name] = texts
        self.files[stem + extension] = encode("".join(f"{text}\n" for text in texts))

    def add_rubbish(self, draw: st.DrawFn, folder: str) -> None:
        """Files that no trainer reads, but that people wonder about."""
        for name in draw(
            st.lists(
                st.sampled_from(["lone.txt", "lone.caption", "notes.md", "old.csv", "meta_cap.json", "cache.npz", "x"]),
                max_size=3,
                unique=True,
            )
        ):
            self.files[folder + name] = b"x"
            self.remarked.add(folder + name)
        if draw(st.integers(0, 5)) == 0:
            name = draw(st.sampled_from(["IMG_0001", "b.jpg_large", "c.png~"]))
            self.files[folder + name] = IMAGE
            self.dropped.add(folder + name)


@st.composite
def kohya_folders(draw: st.DrawFn) -> Brought:
    """`10_zzq kettle/0.png` with `0.txt` (kohya's sd-scripts and its GUI, which also writes latents beside images)."""
    brought = Brought()
    names = draw(st.lists(st.sampled_from(["zzq kettle", "cat", "1girl", "кот"]), min_size=1, max_size=3, unique=True))
    for place, name in enumerate(names):
        repeats = draw(st.integers(1, 40))
        folder = f"{repeats}_{name}/"
        for number in range(draw(st.integers(1, 4))):
            brought.add_image(draw, f"{folder}{place}-{number}", draw(captions), ".txt")
        brought.repeats[folder] = repeats
        brought.add_rubbish(draw, folder)
    brought.add_rubbish(draw, "")
    return brought


@st.composite
def imagefolders(draw: st.DrawFn) -> Brought:
    """`metadata.jsonl` or `.csv` of Hugging Face's datasets, beside the images or above them, in any encoding."""
    brought = Brought()
    kind, below = draw(st.sampled_from(["jsonl", "csv"])), draw(st.sampled_from(["", "train/"]))
    column, rows = draw(st.sampled_from(["text", "caption"])), []
    for number in range(draw(st.integers(1, 5))):
        name, fate = f"{number}{draw(st.sampled_from(READ))}", draw(st.integers(0, 9))
        text = draw(st.sampled_from(WORDS))
        if fate == 0:  # listed, but not there
            brought.dropped.add(name)
        else:
            brought.files[below + name] = IMAGE
        if fate == 1:  # there, but not listed
            brought.dropped.add(below + name)
        elif fate == 2:
            rows.append((name, f"{text}\0"))
            brought.dropped.add(below + name)
        else:
            rows.append((name, text))
            if fate:
                brought.used[below + name] = (text,)
    if kind == "jsonl":
        ascii = draw(st.booleans())
        text = "".join(json.dumps({"file_name": n, column: t}, ensure_ascii=ascii) + "\n" for n, t in rows)
    else:
        stream = io.StringIO()
        csv.writer(stream).writerows([("file_name", column), *rows])
        text = stream.getvalue()
    table = f"{below}metadata.{kind}"
    brought.files[table] = draw(st.sampled_from(list(GOOD.values())))(text)
    brought.read.add(table)
    brought.files[below + "keep.png"] = IMAGE  # so that the folder is never without an image
    brought.dropped.add(below + "keep.png")
    if not rows:
        brought.dropped = {name for name in brought.files if name != table}
        brought.used = {}
    brought.add_rubbish(draw, below)
    return brought


@dataclass
class Shard:
    """A tar with the truth about it, by the names that a listing shows."""

    data: bytes
    used: dict[str, tuple[str, ...]]
    dropped: list[str]
    unread: int
    """Members that are read by nothing and belong to no dropped sample."""


@st.composite
def shards(draw: st.DrawFn) -> Shard:
    """Shards of webdataset's TarWriter and img2dataset, perhaps joined by `cat`, with what people put into them."""
    used: dict[str, tuple[str, ...]] = {}
    dropped: list[str] = []
    unread, parts = 0, []
    claimed: set[str] = set()
    """The keys of earlier archives."""
    part = 0
    for _ in range(draw(st.integers(1, 3))):
        members: list[tuple[str, bytes | None]] = []
        for number in range(draw(st.integers(0, 4))):
            key = f"{number:05d}"
            shown = f"{key}@{part + 1}" if key in claimed else key
            suffix, texts = draw(st.sampled_from(READ)), draw(captions)
            body = "".join(f"{text}\n" for text in texts)
            match draw(st.integers(0, 9)):
                case 0:  # no image
                    members.append((f"{key}.txt", body.encode()))
                    dropped.append(shown)
                case 1:
                    members += [(f"{key}{draw(st.sampled_from(UNREAD))}", b"?"), (f"{key}.txt", body.encode())]
                    dropped.append(shown)
                case 2:  # a dot in the name
                    members += [(f"{key}.v{n}{suffix}", IMAGE) for n in range(2)]
                    dropped += [f"{shown}.v{n}{suffix.lower()}" for n in range(2)]
                case 3:
                    bad = draw(st.sampled_from(list(BAD.values())))
                    members += [(f"{key}{suffix}", IMAGE), (f"{key}.txt", bad(body))]
                    dropped.append(shown)
                case 4:
                    members.append((f"{key}{suffix}", None))
                    dropped.append(f"{key}{suffix}")
                case 5:
                    good = draw(st.sampled_from(list(GOOD.values())))
                    record = json.dumps({"caption": texts[0], "url": "u"}, ensure_ascii=draw(st.booleans()))
                    members += [(f"{key}{suffix}", IMAGE), (f"{key}.json", good(record))]
                    used[shown] = texts[:1]
                case _:
                    good = draw(st.sampled_from(list(GOOD.values())))
                    members += [(f"{key}{suffix}", IMAGE), (f"{key}.txt", good(body))]
                    used[shown] = texts
                    if draw(st.booleans()):
                        members.append((f"{key}.npy", b"?"))
                        unread += 1
        claimed |= {name.partition(".")[0] for name, data in members if data is not None}
        if draw(st.integers(0, 3)) == 0:
            members.append(("README", b"x"))
            unread += 1
        part += bool(members)  # an archive without members is nothing but zeros
        parts.append(
            _tar(members, draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
        )
    return Shard(b"".join(parts), used, dropped, unread)


def _tar(members: list[tuple[str, bytes | None]], format: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, data in members:
            facts = tarfile.TarInfo(name)
            if data is None:
                facts.type, facts.linkname = tarfile.SYMTYPE, "elsewhere.png"
            else:
                facts.size = len(data)
            tar.addfile(facts, io.BytesIO(data or b""))
    return stream.getvalue()
