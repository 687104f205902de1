"""WebDataset shards: our index against tarfile's, damaged and truncated ones, brace patterns, and the round trip."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcli.data.patterns import expand_braces
from sdcli.data.records import Item, Items, ListedImages
from sdcli.data.sources import open_images
from sdcli.data.tar import members_of
from sdcli.data.write_shards import write_shards
from sdcli.errors import BadImage, CannotWrite, NotFound, UsageError
from sdcli.io.files import AlreadyExists
from tests.data.test_dataset_folders import IMAGE, dropped, folder_of, image_bytes, listed


def tar_bytes(members: list[tuple[str, bytes | str]], *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            facts = tarfile.TarInfo(name)
            facts.size = len(data)
            tar.addfile(facts, io.BytesIO(data))
    return stream.getvalue()


def sample(key: str, caption: str = "hello", number: int = 0) -> list[tuple[str, bytes | str]]:
    """An image as img2dataset writes it."""
    record = {"caption": caption, "url": "http://x", "key": key, "status": "success"}
    return [
        (f"{key}.jpg", image_bytes(number, format="JPEG")),
        (f"{key}.txt", caption),
        (f"{key}.json", json.dumps(record)),
    ]


class Memory(ListedImages):
    """Images in memory, for round trips."""

    def read(self, index: int) -> bytes:
        return image_bytes(index)

    def stamp(self, index: int) -> str:
        return str(index)


# The index

names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=120
)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_the_members_are_those_that_tarfile_finds(
    tmp_path_factory: pytest.TempPathFactory, members: list, format: int
) -> None:  # type: ignore[type-arg]
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    path.write_bytes(tar_bytes(members, format=format))
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    with open(path, "rb") as file:
        assert [(member.name, member.offset, member.size) for member in members_of(file)] == expected


def test_links_folders_and_devices_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            facts = tarfile.TarInfo("a.png")
            facts.type, facts.linkname, facts.size = kind, "/etc/passwd", 0
            tar.addfile(facts)
        facts = tarfile.TarInfo("b.png")
        facts.size = len(IMAGE)
        tar.addfile(facts, io.BytesIO(IMAGE))
    assert listed(path) == [("x.tar:b", (), None)]


def seconds(act: Callable[[], object]) -> float:
    """Processor time, which what else runs on the machine disturbs least."""
    started = time.process_time()
    act()
    return time.process_time() - started


def test_ten_thousand_members_are_indexed_about_as_quickly_as_tarfile_lists_them(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes([(f"{number:05d}.jpg", b"x" * 600) for number in range(10_000)]))
    with tarfile.open(path) as tar:
        usual = seconds(tar.getmembers)
        assert len(tar.getmembers()) == 10_000
    assert seconds(lambda: open_images(path)) < 3 * usual
    assert len(open_images(path)) == 10_000


def test_captions_come_from_txt_and_else_from_json(tmp_path: Path) -> None:
    members = [
        *sample("000000001", "a cat"),
        ("000000002.png", IMAGE), ("000000002.json", '{"caption": "a dog", "label": "dog"}'),
        ("sub/000000003.WEBP", IMAGE), ("sub/000000003.TXT", "one\r\ntwo\n"), ("readme", "x"),
        ("000000004.jpg", IMAGE), ("000000005.jpg", IMAGE), ("000000005.json", '{"caption": null}'),
        ("000000006.png", IMAGE), ("000000006.cls", "3"),
    ]  # fmt: skip
    (tmp_path / "00003.tar").write_bytes(tar_bytes(members))
    images = pickle.loads(pickle.dumps(open_images(tmp_path)))
    assert images.streamed
    assert [tuple(item.captions) for item in images] == [("a cat",), ("a dog",), ("one", "two"), (), (), ()]
    assert [item.label for item in images] == [None, "dog", None, None, None, "3"]
    assert images[0].name == "00003.tar:000000001"
    assert images[2].name == "00003.tar:sub/000000003"
    assert images.read(1) == IMAGE
    assert images.read(0) == members[0][1]


def test_blocks_are_shards_and_side_tables_are_passed_over(tmp_path: Path) -> None:
    for shard in range(3):
        (tmp_path / f"{shard:05d}.tar").write_bytes(tar_bytes(sample(f"{shard:05d}0") + sample(f"{shard:05d}1")))
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"img2dataset's own table")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    images = open_images(tmp_path)
    assert [images[index].block for index in range(6)] == [0, 0, 1, 1, 2, 2]
    assert not images.dropped
    assert len({images.stamp(index) for index in range(6)}) == 6


def test_what_is_wrong_with_a_sample_costs_that_sample(tmp_path: Path) -> None:
    members = [
        *sample("a"), ("b.txt", "no image"), ("c.jpg", IMAGE), ("c.png", IMAGE), ("d.jpg", IMAGE),
        ("d.jpg", IMAGE), ("e.png", IMAGE), ("e.txt", b"caf\xe9"), ("f.png", IMAGE), ("f.json", "{"),
        ("g.png", IMAGE), ("g.json", "[]"), ("h.png", IMAGE), ("h.txt", "x" * 2_000_000), ("i.avif", b"?"),
        ("j.png", IMAGE), ("j.json", '{"caption": 3}'),
    ]  # fmt: skip
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    assert [name for name, *_ in listed(tmp_path)] == ["0.tar:a", "0.tar:c", "0.tar:d"]
    assert {name.removeprefix("0.tar:"): reason for name, reason in dropped(tmp_path).items()} == {
        "b": "is a sample without an image",
        "c.png": "is a second image of its key",
        "d.jpg": "is a second image of its key",
        "e": "its caption is not UTF-8 text (e.txt, byte 3); save it as UTF-8",
        "f": "its .json is damaged",
        "g": "its .json is not an object",
        "h": "its .txt is larger than 1 MiB",
        "i": "is in an unsupported format (.avif); convert it to PNG or JPEG",
        "j": "its caption is neither a text nor a list of texts",
    }


def test_a_shard_cut_anywhere_gives_whole_images_only_and_says_so(tmp_path: Path) -> None:
    samples = [sample(f"{number:03d}", f"caption {number}", number) for number in range(3)]
    whole = tar_bytes([member for one in samples for member in one])
    end = whole.rstrip(b"\0")
    path = tmp_path / "0.tar"
    for length in range(0, len(end), 397):
        path.write_bytes(whole[:length])
        images = open_images(path)
        assert images.dropped, length
        for index in range(len(images)):
            number = int(images[index].name.rpartition(":")[2])
            assert images.read(index) == samples[number][0][1]
            if number or len(images) > 1:  # of the first sample alone nobody can know what it lacks
                assert images[index].captions == (f"caption {number}",)
    path.write_bytes(whole)
    assert len(open_images(path)) == 3
    assert not open_images(path).dropped


def test_a_damaged_shard_does_not_cost_the_others(tmp_path: Path) -> None:
    whole = bytearray(tar_bytes(sample("a") + sample("b")))
    with tarfile.open(fileobj=io.BytesIO(bytes(whole))) as tar:
        offset = tar.getmember("b.jpg").offset
    whole[offset + 10] ^= 1
    files = {
        "0.tar": bytes(whole), "1.tar": tar_bytes(sample("c")), "2.tar": b"", "3.tar": b"no tar at all" * 100,
        "4.tar": gzip.compress(tar_bytes(sample("d"))), "5.tar": tar_bytes([]), "6.tar.gz": gzip.compress(b"x"),
    }  # fmt: skip
    folder_of(tmp_path, files)
    assert [name for name, *_ in listed(tmp_path)] == ["0.tar:a", "1.tar:c"]
    reasons = dropped(tmp_path)
    assert set(reasons) == {"0.tar", "2.tar", "3.tar", "4.tar", "5.tar", "6.tar.gz"}
    assert reasons["0.tar"].startswith(f"is damaged or cut short at byte {offset:,}")
    assert reasons["2.tar"] == "is empty; nothing of it is used"
    assert reasons["3.tar"] == "is no tar file; nothing of it is used"
    assert "gunzip" in reasons["4.tar"]
    assert reasons["5.tar"] == "holds no images"


@settings(max_examples=150)
@given(st.data())
def test_no_damage_makes_more_than_a_sentence(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = bytearray(tar_bytes(sample("a") + sample("b"), format=tarfile.PAX_FORMAT))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "0.tar"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    images = open_images(path)
    for index in range(len(images)):
        with contextlib.suppress(BadImage):
            images.read(index)


def test_a_hostile_size_neither_hangs_nor_allocates(tmp_path: Path) -> None:
    header = bytearray(tar_bytes([("a.png", b"x")])[:512])
    header[124:136] = b"\x80" + (2**80).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "0.tar").write_bytes(header)
    assert dropped(tmp_path) == {"0.tar:a": "is cut short because its shard is"}
    header[156:157] = b"x"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "0.tar").write_bytes(header)
    assert dropped(tmp_path) == {"0.tar": "ends without the end-of-archive mark; nothing of it is used"}


def test_a_shard_that_shrinks_after_the_listing_is_told(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(tar_bytes(sample("a")))
    images = open_images(path)
    path.write_bytes(b"x" * 600)
    with pytest.raises(BadImage, match=r"0.tar:a: is cut short"):
        images.read(0)
    path.unlink()
    with pytest.raises(NotFound, match=r"0.tar:a: no file"):
        images.read(0)


@pytest.mark.parametrize("repeats", [0, -1, 1_000_000, 1.5, True, "2"])
def test_repeats_that_are_no_count_cost_their_sample(tmp_path: Path, repeats: Any) -> None:
    record = json.dumps({"caption": "a", "repeats": repeats}).encode()
    (tmp_path / "x.tar").write_bytes(tar_bytes([*sample("a")[:-1], ("a.json", record), *sample("b")]))
    assert [name for name, *_ in listed(tmp_path)] == ["x.tar:b"]
    assert "repeats in its .json are not a whole number" in dropped(tmp_path)["x.tar:a"]


# Splits and patterns


def test_shards_of_a_split_are_chosen_by_their_names(tmp_path: Path) -> None:
    for name in ("train-00000.tar", "train-00001.tar", "val/00000.tar", "odd.tar"):
        folder_of(tmp_path, {name: tar_bytes(sample("a"))})
    assert [name for name, *_ in listed(tmp_path)] == ["train-00000.tar:a", "train-00001.tar:a"]
    assert dropped(tmp_path) == {"odd.tar": "belongs to no split, while other files do"}
    assert [name for name, *_ in listed(tmp_path, split="validation")] == ["val/00000.tar:a"]
    with pytest.raises(UsageError, match="no split 'test'; it has train, validation"):
        open_images(tmp_path, split="test")


def test_files_of_a_pattern_are_of_the_split_that_their_names_say(tmp_path: Path) -> None:
    root = tmp_path / "shards"
    for name in ("train-0.tar", "test-0.tar", "odd.tar", "val/0.tar", "val/1.tar"):
        folder_of(root, {name: tar_bytes(sample("a"))})
    pattern = f"{root}/*.tar"
    assert [name for name, *_ in listed(pattern, split="test")] == ["test-0.tar:a"]
    assert dropped(pattern, split="test") == {"odd.tar": "belongs to no split, while other files do"}
    with pytest.raises(UsageError, match="no split 'validation'; it has test, train"):
        open_images(pattern, split="validation")
    assert len(open_images(f"{root}/val/*.tar", split="valid")) == 2
    assert len(open_images(root / "test-0.tar", split="test")) == 1
    for data in (f"{root}/val/*.tar", root / "val" / "0.tar", root / "odd.tar"):
        with pytest.raises(UsageError, match=r"has no split 'test'; it has (train|validation) \(--split\)"):
            open_images(data, split="test")


def test_a_pattern_that_mixes_splits_is_told(tmp_path: Path) -> None:
    for name in ("train-0.tar", "test-0.tar"):
        folder_of(tmp_path, {name: tar_bytes(sample("a"))})
    mixed = open_images(f"{tmp_path}/*.tar")
    assert len(mixed) == 2
    assert ["matches files of several splits (test, train)" in one.text for one in mixed.remarks] == [True]
    for data, split in ((f"{tmp_path}/*.tar", "all"), (f"{tmp_path}/te*.tar", "train"), (f"{tmp_path}/*.tar", "test")):
        assert open_images(data, split=split).remarks == ()


def test_braces_are_expanded_as_bash_does() -> None:
    patterns = [
        "x", "{0..3}", "s/{00000..00012}.tar", "{a,b}{1..2}", "{3..1}", "{0..10..5}", "{x,{y,z}q}.tar", "{a,}b",
        "{00..02}-{a,b{1,2}}", "a{x}b", "{a,b}/{c}/{1..2}", "{-1..1}", "{08..11}",
    ]  # fmt: skip
    for pattern in patterns:
        bash = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
        assert expand_braces(pattern) == bash.stdout.splitlines(), pattern
    with pytest.raises(UsageError, match="not closed"):
        expand_braces("{0..3")
    with pytest.raises(UsageError, match="more than 1,000,000"):
        expand_braces("{0..9999999}")
    with pytest.raises(UsageError, match="more than 1,000,000"):
        expand_braces("{0..9999}{0..9999}")


def test_patterns_name_shards_and_missing_ones_are_dropped(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        (tmp_path / f"{number:05d}.tar").write_bytes(tar_bytes(sample("a")))
    pattern = f"{tmp_path}/{{00000..00003}}.tar"
    assert [name for name, *_ in listed(pattern)] == ["00000.tar:a", "00001.tar:a", "00003.tar:a"]
    assert dropped(pattern) == {f"{tmp_path}/00002.tar": "does not exist"}
    assert listed(f"{tmp_path}/*.tar") == listed(tmp_path)
    with pytest.raises(NotFound, match="no file matches"):
        open_images(f"{tmp_path}/{{5..9}}.tar")
    with pytest.raises(UsageError, match="--caption-column is for tables"):
        open_images(tmp_path, caption_column="text")


# Writing

captions = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(bool)
sets = st.lists(
    st.builds(
        Item,
        names,
        st.lists(captions, unique=True, min_size=1).map(tuple),
        st.none() | captions,
        repeats=st.just(1) | st.integers(1, 999_999),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40)
@given(sets, st.integers(1, 5))
def test_a_round_trip_gives_the_same_images_captions_labels_and_repeats(
    tmp_path_factory: pytest.TempPathFactory, items: list[Item], limit: int
) -> None:
    images, root = Memory("memory", Items.of(items)), tmp_path_factory.mktemp("shards")
    shards = list(write_shards(images, root / "a", indices=range(len(items)), max_pictures=limit))
    assert [shard.images for shard in shards[:-1]] == [limit] * (len(shards) - 1)
    back = open_images(root / "a")
    assert not back.dropped
    assert len(back) == len(items)
    for index, item in enumerate(items):
        assert back[index].captions == item.captions
        assert back[index].label == item.label
        assert back[index].repeats == item.repeats
        assert back.read(index) == images.read(index)
        assert back[index].block == index // limit
    told = {one.name for one in back.remarks if "count several times" in one.text}
    assert told == {f"{n // limit:05d}.tar" for n, item in enumerate(items) if item.repeats > 1}


def test_equal_images_give_equal_bytes_and_shards_keep_to_their_size(tmp_path: Path) -> None:
    images = Memory("memory", Items.of([Item(f"{n}.png", (f"c{n}",)) for n in range(40)]))
    first = list(write_shards(images, tmp_path / "a", indices=range(40), max_bytes=30_000))
    time.sleep(0.01)
    list(write_shards(images, tmp_path / "b", indices=range(40), max_bytes=30_000))
    assert len(first) > 1
    for shard in first:
        data = (tmp_path / "a" / shard.name).read_bytes()
        assert data == (tmp_path / "b" / shard.name).read_bytes()
        assert len(data) == shard.size <= 30_000
        with tarfile.open(tmp_path / "a" / shard.name) as tar:
            record = json.load(tar.extractfile(next(name for name in tar.getnames() if name.endswith(".json"))))  # type: ignore[arg-type]
        assert set(record) == {"name", "caption"}
    assert sum(shard.images for shard in first) == 40
    tiny = list(write_shards(images, tmp_path / "c", indices=range(3), max_bytes=1))
    assert [shard.images for shard in tiny] == [1, 1, 1]


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    images = Memory("memory", Items.of([Item("a.png", ())]))
    folder_of(tmp_path / "full", {"x": "y"})
    with pytest.raises(AlreadyExists, match="new folder"):
        next(write_shards(images, tmp_path / "full", indices=[0]))
    (tmp_path / "empty").mkdir()
    list(write_shards(images, tmp_path / "empty", indices=[0]))
    assert os.listdir(tmp_path / "empty") == ["00000.tar"]
    with pytest.raises(IndexError):
        list(write_shards(images, tmp_path / "new", indices=[0, 7]))
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotWrite):
        list(write_shards(images, tmp_path / "file" / "below", indices=[0]))
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full"]


KILLED = """
import sys
from pathlib import Path
from sdcli.data.write_shards import write_shards
from sdcli.data.sources import open_images
images = open_images(sys.argv[1])
for shard in write_shards(images, Path(sys.argv[2]), indices=list(range(len(images))) * 100000, max_pictures=1):
    print(shard.name, flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_folder_and_the_next_one_clears_up(tmp_path: Path) -> None:
    data, target = folder_of(tmp_path / "data", {"a.png": IMAGE}), tmp_path / "out" / "shards"
    process = subprocess.Popen([sys.executable, "-c", KILLED, data, target], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "00000.tar\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = target.parent.iterdir()
    assert left.name.endswith("-shards.tmp")
    images = open_images(data)
    list(write_shards(images, target, indices=[0]))
    assert [path.name for path in target.parent.iterdir()] == ["shards"]


FULL = """
import resource, sys
from pathlib import Path
from sdcli.data.write_shards import write_shards
from sdcli.data.sources import open_images
from sdcli.errors import CannotWrite
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
images = open_images(sys.argv[1])
try:
    list(write_shards(images, Path(sys.argv[2]), indices=[0] * 40))
except CannotWrite as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 700, 20_000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, room: int) -> None:
    data, target = folder_of(tmp_path / "data", {"a.png": IMAGE}), tmp_path / "out" / "shards"
    command = [sys.executable, "-c", FULL, data, target, str(room)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.stdout.startswith("cannot write ")
    assert "File too large" in done.stdout
    assert done.stderr == ""
    assert list(target.parent.iterdir()) == []
