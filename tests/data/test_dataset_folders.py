"""Folders of images as people have them: tables, caption files, class folders, splits, latents, and what is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdcli.data.records import Item, Items, Strings, UnusableEntry, captions_of_file, captions_of_value
from sdcli.data.sources import open_images
from sdcli.errors import BadImage, BadLatents, NotFound, UsageError
from sdcli.vae.latent_files import latent_bytes
from sdcli.vae.latent_record import LatentRecord, Source


def image_bytes(number: int = 0, size: tuple[int, int] = (12, 10), *, format: str = "PNG") -> bytes:
    """A small image, another for every number."""
    stream = io.BytesIO()
    levels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(levels).save(stream, format)
    return stream.getvalue()


IMAGE = image_bytes()


def folder_of(root: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write files with their folders."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def tree_digest(root: Path) -> str:
    """Everything about a folder that a command could change."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        facts = path.lstat()
        digest.update(f"{path.relative_to(root)} {facts.st_mode} {facts.st_mtime_ns} {facts.st_size}".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def listed(root: Path | str, **options: str) -> list[tuple[str, tuple[str, ...], str | None]]:
    return [(item.name, item.captions, item.label) for item in open_images(root, **options)]  # type: ignore[arg-type, attr-defined]


def dropped(root: Path | str, **options: str) -> dict[str, str]:
    return {one.name: one.reason for one in open_images(root, **options).dropped}  # type: ignore[arg-type]


# Packed items

texts = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs", "Cc"]), min_size=1)
any_items = st.lists(
    st.builds(Item, texts, st.lists(texts).map(tuple), st.none() | st.sampled_from(["cat", "dog"]), st.integers(0, 9))
)


@given(any_items)
def test_packed_items_are_the_items(items: list[Item]) -> None:
    packed = pickle.loads(pickle.dumps(Items.of(items)))
    assert [packed[index] for index in range(len(packed))] == items
    with pytest.raises(IndexError):
        packed[len(items)]


def test_names_that_are_not_utf8_survive_packing() -> None:
    name = os.fsdecode(b"caf\xe9.png")
    assert Strings([name, "b"])[0] == name


@given(st.lists(texts.map(str.strip).filter(bool).filter(lambda text: not {"\r", "\ufeff"} & {*text}), unique=True))
def test_captions_in_a_file_are_its_lines_whatever_ends_them(captions: list[str]) -> None:
    for end in ("\n", "\r\n", "\r"):
        for start in ("", "\ufeff"):
            data = (start + "".join(f"  {caption} {end}{end}" for caption in captions)).encode()
            assert captions_of_file(data, name="a.txt") == tuple(captions)


def test_what_is_no_caption_is_refused_with_a_reason() -> None:
    for data in (b"caf\xe9", "cat".encode("utf-16-le"), "c\ud800".encode("utf-16-le", "surrogatepass")):
        with pytest.raises(
            UnusableEntry, match=r"its caption (is not UTF-8 text|holds a NUL character) \(a.txt, byte [13]\)"
        ):
            captions_of_file(data, name="a.txt")
    for value in (3, {"a": 1}, [1], ["a", None]):
        with pytest.raises(UnusableEntry, match="neither a text nor a list"):
            captions_of_value(value)
    with pytest.raises(UnusableEntry, match="not UTF-8"):
        captions_of_value("\ud800")
    assert captions_of_value(None) == captions_of_value("  ") == captions_of_value([]) == ()
    assert captions_of_value([" a\n b ", "c", "c"]) == ("a b", "c")


# Caption files


def test_caption_files_give_alternatives_also_in_nested_folders(tmp_path: Path) -> None:
    files = {
        "a.png": IMAGE, "a.txt": "one\n\n two \r\n", "deep/er/B.JPG": IMAGE, "deep/er/B.TXT": "\ufeffbee",
        "c.v2.webp": IMAGE, "c.v2.txt": "see", "d.png": IMAGE, ".hidden.png": IMAGE, ".cache/e.png": IMAGE,
        "__MACOSX/f.png": IMAGE, "notes.md": "x",
    }  # fmt: skip
    root = folder_of(tmp_path, files)
    assert listed(root) == [
        ("a.png", ("one", "two"), None),
        ("c.v2.webp", ("see",), None),
        ("d.png", (), None),
        ("deep/er/B.JPG", ("bee",), None),
    ]
    assert dropped(root) == {}


@pytest.mark.parametrize("seed", range(3))
def test_the_listing_does_not_depend_on_the_order_of_creation(tmp_path: Path, seed: int) -> None:
    names = [f"{a}/{b}.{suffix}" for a in "xyz" for b in range(4) for suffix in ("png", "txt")]
    expected = listed(folder_of(tmp_path / "sorted", {name: name for name in names}))
    random.Random(seed).shuffle(names)
    assert listed(folder_of(tmp_path / "mixed", {name: name for name in names})) == expected
    assert len(expected) == 12


def test_captions_that_cannot_be_used_drop_their_image_with_a_reason(tmp_path: Path) -> None:
    files = {"a.png": IMAGE, "a.txt": b"caf\xe9", "b.png": IMAGE, "b.txt": "b" * 2_000_000, "c.png": IMAGE}
    root = folder_of(tmp_path, {**files, "c.txt": "see", "d.jpg": IMAGE, "d.png": IMAGE, "d.txt": "dee"})
    assert dropped(root) == {
        "a.png": "its caption is not UTF-8 text (a.txt, byte 3); save it as UTF-8",
        "b.png": "its caption is larger than 1 MiB (b.txt)",
        "d.png": "has the same name as d.jpg, to which the caption belongs",
    }
    assert [name for name, *_ in listed(root)] == ["c.png", "d.jpg"]


def test_a_caption_in_another_extension_is_pointed_at(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": IMAGE, "a.caption": "hello", "b.png": IMAGE, "b.txt": "\n\n"})
    remarks = {one.name: (one.text, one.loses) for one in open_images(root).remarks}
    assert remarks["a.png"] == (
        "has no .txt caption, but a .caption file, which --caption-extension .caption would read",
        True,
    )
    assert remarks["b.png"] == ("its caption file is empty", True)
    assert listed(root, caption_extension="caption")[0] == ("a.png", ("hello",), None)
    for wrong in (".png", "", ".json"):
        with pytest.raises(UsageError, match="cannot be the extension"):
            open_images(root, caption_extension=wrong)


def test_links_are_followed_but_not_in_circles_and_odd_files_never_hang(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", {"a.png": IMAGE, "a.txt": "ay", "sub/b.png": IMAGE})
    folder_of(tmp_path / "other", {"c.png": IMAGE})
    (root / "sub/loop").symlink_to(root)
    (root / "linked").symlink_to(tmp_path / "other")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "itself.png").symlink_to(root / "itself.png")
    (root / "through.png").symlink_to(root / "a.txt" / "b.png")
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "sub/b.txt")
    assert [name for name, *_ in listed(root)] == ["a.png", "linked/c.png", "sub/b.png"]
    assert dropped(root) == {
        "gone.png": "is a broken link",
        "itself.png": "cannot be examined: Too many levels of symbolic links",
        "through.png": "cannot be examined: Not a directory",
        "pipe.png": "is not a regular file",
    }


def test_images_of_kinds_that_are_not_read_are_told(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": IMAGE, "b.avif": b"?", "c.HEIC": b"?"})
    assert set(dropped(root)) == {"b.avif", "c.HEIC"}
    assert "(.avif)" in dropped(root)["b.avif"]


def test_names_that_are_not_utf8_can_be_read(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(IMAGE)
    images = open_images(tmp_path)
    assert images.read(0) == IMAGE


# Class folders


def test_class_folders_give_labels_and_captions(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"dog/1.png": IMAGE, "cat/1.png": IMAGE, "cat/more/2.png": IMAGE})
    assert open_images(root).classes == ("cat", "dog")
    assert listed(root) == [
        ("cat/1.png", ("cat",), "cat"),
        ("cat/more/2.png", ("cat",), "cat"),
        ("dog/1.png", ("dog",), "dog"),
    ]


def test_folders_above_the_classes_are_no_classes(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"images/all/cat/1.png": IMAGE, "images/all/dog/1.png": IMAGE})
    assert open_images(root).classes == ("cat", "dog")


def test_there_are_no_classes_where_there_are_captions_or_images_outside_of_folders(tmp_path: Path) -> None:
    captioned = folder_of(tmp_path / "a", {"cat/1.png": IMAGE, "dog/1.png": IMAGE, "dog/1.txt": "a dog"})
    assert listed(captioned) == [("cat/1.png", (), None), ("dog/1.png", ("a dog",), None)]
    loose = folder_of(tmp_path / "b", {"cat/1.png": IMAGE, "1.png": IMAGE})
    assert [label for *_, label in listed(loose)] == [None, None]
    assert open_images(loose).classes == ()


# Splits


def test_splits_are_chosen_by_name(tmp_path: Path) -> None:
    files = {f"{split}/{name}/1.png": IMAGE for split in ("train", "val", "test") for name in ("cat", "dog")}
    root = folder_of(tmp_path, files)
    assert listed(root) == [("train/cat/1.png", ("cat",), "cat"), ("train/dog/1.png", ("dog",), "dog")]
    assert [name for name, *_ in listed(root, split="validation")] == ["val/cat/1.png", "val/dog/1.png"]
    assert len(listed(root, split="all")) == 6
    assert open_images(root, split="all").classes == ("cat", "dog")
    with pytest.raises(UsageError, match=r"no split 'holdout'; it has test, train, validation"):
        open_images(root, split="holdout")


def test_a_folder_without_splits_is_train(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": IMAGE})
    assert listed(root) == listed(root, split="all")
    with pytest.raises(UsageError, match="it has train"):
        open_images(root, split="validation")


def test_a_split_beside_other_folders_is_asked_about(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {f"{name}/1.png": IMAGE for name in ("train", "tram", "bus")})
    with pytest.raises(UsageError, match="has train beside bus, tram, so they may be splits or classes"):
        open_images(root)
    assert open_images(root, split="all").classes == ("bus", "train", "tram")


# Metadata tables


def tables(rows: list[dict[str, object]]) -> dict[str, bytes]:
    """The same rows as each of the three kinds of tables."""
    csv = (
        "\ufeff"
        + ",".join(rows[0])
        + "\r\n"
        + "".join(
            ",".join('"' + str(value).replace('"', '""') + '"' for value in row.values()) + "\r\n" for row in rows
        )
    )
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    return {
        "metadata.jsonl": ("\ufeff" + "\r\n".join(json.dumps(row) for row in rows)).encode(),
        "metadata.csv": csv.encode(),
        "metadata.parquet": parquet.getvalue(),
    }


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
@pytest.mark.parametrize("file_column", ["file_name", "image_path", "image"])
@pytest.mark.parametrize("caption_column", ["text", "caption"])
def test_a_table_says_which_captions_images_have(
    tmp_path: Path, kind: str, file_column: str, caption_column: str
) -> None:
    rows: list[dict[str, object]] = [
        {file_column: "sub/b.png", caption_column: 'a "big", grey\nbee', "other": 1},
        {file_column: "a.png", caption_column: " é ", "other": 2},
        {file_column: "gone.png", caption_column: "x", "other": 3},
        {file_column: "../out.png", caption_column: "x", "other": 3},
        {file_column: "/etc/passwd", caption_column: "x", "other": 3},
        {file_column: "C:\\out.png", caption_column: "x", "other": 3},
        {file_column: "notes.md", caption_column: "x", "other": 3},
    ]  # fmt: skip
    files = {"a.png": IMAGE, "sub/b.png": IMAGE, "c.png": IMAGE, "notes.md": "x", kind: tables(rows)[kind]}
    root = folder_of(tmp_path / "data", files)
    folder_of(tmp_path, {"out.png": IMAGE})
    assert listed(root) == [("a.png", ("é",), None), ("sub/b.png", ('a "big", grey bee',), None)]
    reasons = dropped(root)
    assert set(reasons) == {"gone.png", "../out.png", "/etc/passwd", "C:\\out.png", "notes.md", "c.png"}
    assert all("outside the folder" in reasons[name] for name in ("../out.png", "/etc/passwd", "C:\\out.png"))
    assert "there is no such file" in reasons["gone.png"]
    assert "no image that is read" in reasons["notes.md"]
    assert reasons["c.png"] == f"has no row in {kind}"


def test_columns_can_be_named_and_wrong_names_are_told(tmp_path: Path) -> None:
    row = {"path": "a.png", "prompt": ["one", "two"], "text": "three"}
    root = folder_of(tmp_path, {"a.png": IMAGE, "metadata.jsonl": json.dumps(row)})
    assert listed(root, image_column="path", caption_column="prompt") == [("a.png", ("one", "two"), None)]
    assert listed(root, image_column="path") == [("a.png", ("three",), None)]
    with pytest.raises(UsageError, match=r"no column file_name or image_path or image .*it has path, prompt, text"):
        open_images(root)
    with pytest.raises(UsageError, match=r"no column 'promt' \(--caption-column\); did you mean 'prompt'"):
        open_images(root, image_column="path", caption_column="promt")
    bare = folder_of(tmp_path / "bare", {"a.png": IMAGE})
    with pytest.raises(UsageError, match=r"--caption-column needs a metadata table, and .* has no metadata.jsonl"):
        open_images(bare, caption_column="text")


def test_several_rows_of_an_image_are_alternatives_and_labels_must_agree(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "text": "one", "label": "cat"},
        {"file_name": "a.png", "text": "two"},
        {"file_name": "./a.png", "text": "one"},
        {"file_name": "b.png", "text": "x", "label": "cat"},
        {"file_name": "b.png", "text": "y", "label": "dog"},
    ]
    root = folder_of(tmp_path, {"a.png": IMAGE, "b.png": IMAGE, "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    assert listed(root) == [("a.png", ("one", "two"), "cat")]
    assert dropped(root) == {"b.png": "is listed as cat and as dog"}
    assert "several rows" in open_images(root).remarks[0].text


def test_labels_without_captions_are_the_captions(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": IMAGE, "metadata.csv": "file_name,label\na.png,cat\n"})
    assert listed(root) == [("a.png", ("cat",), "cat")]


def test_damaged_lines_cost_their_own_image_only(tmp_path: Path) -> None:
    lines = [
        b'{"file_name": "a.png", "text": "fine"}', b'{"file_name": "b.png", "text": "caf\xe9"}', b"{oops", b"[1]",
        b'{"text": "no file"}', b'{"file_name": "c.png", "text": {"a": 1}}', b"[" * 10_000,
        b'{"file_name": "d.png", "text": "\\ud800"}',
    ]  # fmt: skip
    files = {f"{name}.png": IMAGE for name in "abcd"}
    root = folder_of(tmp_path / "jsonl", {**files, "metadata.jsonl": b"\n".join(lines)})
    assert listed(root) == [("a.png", ("fine",), None)]
    assert {name: reason for name, reason in dropped(root).items() if name != "c.png"} == {
        "b.png": "its caption is not UTF-8 text (byte 3), metadata.jsonl line 2",
        "d.png": "its caption is not UTF-8 text (byte 0), metadata.jsonl line 8",
        "metadata.jsonl line 3": (
            "is not a JSON object (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"
        ),
        "metadata.jsonl line 4": "is not a JSON object (a list)",
        "metadata.jsonl line 5": "has no file_name",
        "metadata.jsonl line 7": "is not a JSON object (nested too deeply)",
    }
    table = b'file_name,text\na.png,fine\nb.png,red, big\nc.png,caf\xe9\nd.png,"open\n'
    root = folder_of(tmp_path / "csv", {**files, "metadata.csv": table})
    assert listed(root) == [("a.png", ("fine",), None)]
    reasons = dropped(root)
    assert "more cells than the header" in reasons["metadata.csv line 3"]
    assert reasons["c.png"] == "its caption is not UTF-8 text (byte 3), metadata.csv line 4"
    assert any("is not CSV" in reason for reason in reasons.values())
    root = folder_of(tmp_path / "parquet", {**files, "metadata.parquet": b"PAR1 no"})
    with pytest.raises(BadImage, match=r"metadata.parquet cannot be read as a parquet file"):
        open_images(root)


def test_tables_stand_in_split_folders_or_above_them(tmp_path: Path) -> None:
    rows = [{"file_name": f"{split}/1.png", "text": split} for split in ("train", "test")]
    files: dict[str, bytes | str] = {"train/1.png": IMAGE, "test/1.png": IMAGE}
    above = folder_of(tmp_path / "above", {**files, "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    row = json.dumps({"file_name": "1.png", "text": "train"})
    inside = folder_of(tmp_path / "inside", {**files, "train/metadata.jsonl": row, "test/metadata.jsonl": "{}"})
    for root in (above, inside):
        assert listed(root) == [("train/1.png", ("train",), None)]
        assert dropped(root) == {}


def test_windows_slashes_and_other_spellings_of_accents_find_their_file(tmp_path: Path) -> None:
    rows = [{"file_name": "sub\\a.png", "text": "a"}, {"file_name": "cafe\u0301.png", "text": "b"}]
    files = {"sub/a.png": IMAGE, "caf\u00e9.png": IMAGE}
    root = folder_of(tmp_path, {**files, "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    assert sorted(captions for _, captions, _ in listed(root)) == [("a",), ("b",)]


def test_what_is_ambiguous_is_asked_about(tmp_path: Path) -> None:
    row = json.dumps({"file_name": "a.png", "text": "table"})
    root = folder_of(tmp_path / "both", {"a.png": IMAGE, "a.txt": "file", "metadata.jsonl": row})
    with pytest.raises(UsageError, match=r"in metadata.jsonl and in 1 .txt files \(a.txt\): .*--caption-column"):
        open_images(root)
    assert listed(root, caption_column="text") == [("a.png", ("table",), None)]
    root = folder_of(
        tmp_path / "silent", {"a.png": IMAGE, "a.txt": "file", "metadata.csv": "file_name,label\na.png,x\n"}
    )
    assert listed(root) == [("a.png", ("file",), "x")]
    root = folder_of(tmp_path / "two", {"a.png": IMAGE, "metadata.jsonl": row, "metadata.csv": "file_name\na.png\n"})
    with pytest.raises(UsageError, match=r"has both metadata.csv and metadata.jsonl; keep one of them"):
        open_images(root)
    root = folder_of(tmp_path / "kinds", {"a.png": IMAGE, "0.tar": b"", "x.parquet": b""})
    with pytest.raises(
        UsageError, match=r"pictures \(1: a.png, ...\) and tar shards \(1: 0.tar, ...\) and parquet files"
    ):
        open_images(root)


def test_where_there_is_nothing_it_says_what_was_looked_for(tmp_path: Path) -> None:
    empty = folder_of(tmp_path / "empty", {"readme.md": "x"})
    with pytest.raises(
        NotFound, match=r"nothing to train on: only files of other kinds \(1\); looked for images \(.*\.tar.*parquet"
    ):
        open_images(empty)
    for missing in (tmp_path / "missing", "./missing/data", "/nowhere"):
        with pytest.raises(NotFound, match="no folder or file"):
            open_images(missing)
    with pytest.raises(UsageError, match="give the folder"):
        open_images(folder_of(tmp_path, {"one.png": IMAGE}) / "one.png")


def test_reading_says_what_went_wrong(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": IMAGE, "b.png": IMAGE})
    images = pickle.loads(pickle.dumps(open_images(root)))
    assert images.read(1) == IMAGE
    before = images.stamp(0)
    (root / "a.png").write_bytes(IMAGE + b"more")
    assert images.stamp(0) != before
    (root / "a.png").unlink()
    for act in (images.read, images.stamp):
        with pytest.raises(NotFound, match=r"no file .*a.png"):
            act(0)


# Latents


def latent_file(vae: str = "random:tiny:0", *names: str, height: int = 2) -> bytes:
    sources = tuple(
        Source(
            name=name, sha256="0" * 64, width=40, height=30, fitted_width=32, fitted_height=8 * height, fit="crop"
        )
        for name in names
    )  # fmt: skip
    latents = torch.arange(len(names) * 4 * height * 4, dtype=torch.float32).reshape(len(names), 4, height, 4)
    record = LatentRecord(model="tiny", vae=vae, scaling_factor=0.18215, sample="mean", source=sources)
    return latent_bytes(latents, record)


def test_latents_are_listed_with_captions_and_sizes(tmp_path: Path) -> None:
    vae = "random:tiny:0"
    files = {
        "a.safetensors": latent_file(vae, "a.png"), "a.txt": "one\ntwo", "y.txt": "why",
        "pack.safetensors": latent_file(vae, "x.png", "y.jpg"), "bad.safetensors": b"broken", "notes.txt": "x",
    }  # fmt: skip
    root = folder_of(tmp_path, files)
    images = pickle.loads(pickle.dumps(open_images(root)))
    assert images.kind == "latents"
    assert (images.vae, images.scaling_factor) == (vae, 0.18215)
    assert [(item.name, item.captions) for item in images] == [
        ("a.safetensors", ("one", "two")),
        ("pack.safetensors:0", ()),
        ("pack.safetensors:1", ("why",)),
    ]
    assert images.sizes.tolist() == [[32, 16]] * 3
    assert list(dropped(root)) == ["bad.safetensors"]
    whole = torch.arange(2 * 32, dtype=torch.float32).reshape(2, 4, 2, 4)
    assert torch.equal(images.read_latents(2).latents, whole[1:])
    assert torch.equal(images.read_latents(0).latents, whole[:1])
    assert images.read(0) == files["a.safetensors"]


def test_latents_of_two_vaes_are_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {f"{n}.safetensors": latent_file(f"random:tiny:{n}", "a.png") for n in range(2)})
    with pytest.raises(BadLatents, match=r"different VAEs, 0.safetensors and 1.safetensors"):
        open_images(root)
