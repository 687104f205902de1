"""Data sets as other tools write them: everything in a folder is used, or named, and captions are what was written."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcli.data.sources import open_images
from sdcli.errors import NotFound
from sdcli.training.text_encoder.caption_files import read_captions
from tests.data.foreign_writers import BAD, GOOD, WORDS, Brought, Shard, imagefolders, kohya_folders, shards
from tests.data.test_dataset_folders import folder_of


@contextmanager
def folder(brought: Brought) -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="brought-"))
    try:
        yield folder_of(root, brought.files)
    finally:
        shutil.rmtree(root)


def check_folder(brought: Brought) -> None:
    """What is used, with captions and repeats; and every other file is read, or named once or more."""
    with folder(brought) as root:
        try:
            images = open_images(root)
        except NotFound:  # not one image that is read: the sentence says so
            assert not brought.used
            return
        items = [images[index] for index in range(len(images))]
        dropped, remarked = {one.name for one in images.dropped}, {one.name for one in images.remarks}
    assert {item.name: item.captions for item in items} == brought.used
    assert dropped == brought.dropped
    assert brought.remarked <= remarked
    named = {*brought.used, *dropped, *remarked, *brought.read}
    assert set(brought.files) <= named, "a file is neither used nor named"
    for item in items:
        expected = brought.repeats.get(item.name.partition("/")[0] + "/", 1)
        assert item.repeats == expected
    if any(repeats > 1 for repeats in brought.repeats.values()) and items:
        assert any("as in kohya's scripts" in one.text for one in images.remarks)


def check_shard(shard: Shard) -> None:
    root = Path(tempfile.mkdtemp(prefix="brought-"))
    try:
        (root / "0.tar").write_bytes(shard.data)
        images = open_images(root)
        items = [images[index] for index in range(len(images))]
        dropped = Counter(one.name.removeprefix("0.tar:") for one in images.dropped)
        counts = [re.search(r"holds (\d+) members", one.text) for one in images.remarks]
    finally:
        shutil.rmtree(root)
    assert {item.name.removeprefix("0.tar:"): item.captions for item in items} == shard.used
    assert dropped == Counter(shard.dropped or ([] if shard.used else ["0.tar"]))
    assert sum(int(count[1]) for count in counts if count is not None) == shard.unread


@settings(max_examples=60)
@given(kohya_folders())
def test_everything_in_kohyas_folders_is_used_or_named(brought: Brought) -> None:
    check_folder(brought)


@settings(max_examples=60)
@given(imagefolders())
def test_everything_in_an_imagefolder_is_used_or_named(brought: Brought) -> None:
    check_folder(brought)


@settings(max_examples=60)
@given(shards())
def test_everything_in_a_shard_is_used_or_named(shard: Shard) -> None:
    check_shard(shard)


lines = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6, unique=True)


def check_text(texts: list[str], good: str, bad: str) -> None:
    """A file of captions, one a line, in any encoding that tells itself; in another no line becomes a caption."""
    root = Path(tempfile.mkdtemp(prefix="brought-"))
    try:
        text = "".join(f"{one}\n" for one in texts)
        path = root / "captions [v2].txt"
        path.write_bytes(GOOD[good](text))
        assert read_captions(path).texts == tuple(texts)
        path.write_bytes(GOOD["utf-8"](text) + BAD[bad](texts[0]))
        found = read_captions(path)
        assert found.texts == tuple(texts)
        assert len(found.dropped) == 1
    finally:
        shutil.rmtree(root)


@settings(max_examples=60)
@given(lines, st.sampled_from(list(GOOD)), st.sampled_from(list(BAD)))
def test_a_file_of_captions_is_read_in_every_encoding_that_tells_itself(texts: list[str], good: str, bad: str) -> None:
    check_text(texts, good, bad)


@pytest.mark.slow
@settings(max_examples=400)
@given(kohya_folders())
def test_hundreds_of_kohyas_folders(brought: Brought) -> None:
    check_folder(brought)


@pytest.mark.slow
@settings(max_examples=400)
@given(imagefolders())
def test_hundreds_of_imagefolders(brought: Brought) -> None:
    check_folder(brought)


@pytest.mark.slow
@settings(max_examples=400)
@given(shards())
def test_hundreds_of_shards(shard: Shard) -> None:
    check_shard(shard)
