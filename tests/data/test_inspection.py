"""Looking at every image before step 1: what is counted, what is remembered, and which images are twice there."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdcli.data import inspection as module
from sdcli.data.duplicates import same_bytes, similar
from sdcli.data.inspection import Inspection, difference_hash, inspect, summarize
from sdcli.data.records import ImageSet
from sdcli.data.sources import open_images
from sdcli.data.write_shards import write_shards
from sdcli.errors import BadImage
from sdcli.images.image_files import image_from_bytes, open_image
from tests.data.test_dataset_folders import IMAGE, folder_of, image_bytes, latent_file, tree_digest
from tests.images.test_images import bomb, sample_image


def jpeg(image: Image.Image, **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def examine(images: ImageSet, *, facts_folder: Path | None = None, workers: int | None = None) -> Inspection:
    """Every image looked at, and summed up."""
    return summarize(images, inspect(images, facts_folder=facts_folder, workers=workers))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good and bad images, as folders have them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    sample_image(40, 30).save(turned, "JPEG", exif=exif)
    whole = jpeg(sample_image(300, 200), quality=95)
    files = {
        "good.png": IMAGE, "good.txt": "fine", "turned.jpg": turned.getvalue(),
        "cut1.jpg": whole[:-200], "cut2.jpg": whole[:-305],
        "text.png": b"hello", "empty.png": b"", "bomb.png": bomb(100_000, 100_000), "sub/none.png": image_bytes(3),
        "twice.png": IMAGE, "twice.txt": "again", "odd.png": IMAGE, "odd.txt": b"caf\xe9",
    }  # fmt: skip
    return folder_of(tmp_path / "data", files)


def test_every_image_is_used_or_dropped_with_a_reason(mixed: Path) -> None:
    before = tree_digest(mixed)
    images = open_images(mixed)
    found = examine(images, workers=2)
    assert found.used.dtype == np.int64
    assert found.sizes.dtype == np.int32
    assert found.sizes.shape == (len(images), 2)
    assert [images[int(index)].name for index in found.used] == [
        "good.png",
        "sub/none.png",
        "turned.jpg",
        "twice.png",
    ]
    sizes = {images[int(index)].name: tuple(found.sizes[index]) for index in found.used}
    assert sizes["turned.jpg"] == (30, 40)
    assert {one.name for one in found.dropped} == {
        "cut1.jpg", "cut2.jpg", "text.png", "empty.png", "bomb.png", "odd.png"
    }  # fmt: skip
    assert [images[int(index)].name for index in found.uncaptioned] == ["sub/none.png", "turned.jpg"]
    assert found.smallest == "good.png"
    assert tree_digest(mixed) == before


def test_bytes_are_opened_as_files_are(mixed: Path) -> None:
    paths = list(mixed.rglob("*.*"))
    assert len(paths) > 5
    for path in paths:
        try:
            expected = open_image(path)
        except BadImage as error:
            with pytest.raises(BadImage, match=f"^{re.escape(str(error))}$"):
                image_from_bytes(path.read_bytes(), name=str(path))
        else:
            assert image_from_bytes(path.read_bytes(), name="x").tobytes() == expected.tobytes()


def test_the_report_names_at_most_three_examples_of_each_reason(tmp_path: Path) -> None:
    files = {f"{n}.png": b"no image" for n in range(5)} | {"a.png": IMAGE, "b.jpg": jpeg(sample_image(64, 48))[:-200]}
    found = examine(open_images(folder_of(tmp_path, files)), workers=1)
    lines = found.report()
    assert lines[0] == f"{tmp_path}: 1 of 7 are used, 6 dropped"
    assert lines[1] == "  dropped 5: is not a PNG, JPEG, WebP, BMP, GIF or TIFF image: 0.png, 1.png, 2.png, ..."
    assert lines[2].startswith("  dropped 1: cannot be read: image file is truncated")
    assert lines[3] == "  1 without a caption: a.png"
    assert lines[4] == "  sizes 12x10; the smallest is a.png"
    assert json.loads(json.dumps(found.as_dict()))["used"] == 1


def test_reasons_that_differ_in_numbers_are_one_line(mixed: Path) -> None:
    truncated = [line for line in examine(open_images(mixed)).report() if "truncated" in line]
    assert len(truncated) == 1
    assert "dropped 2:" in truncated[0]


def test_a_second_look_decodes_only_what_is_new(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    real = module.image_from_bytes

    def counting(data: bytes, *, name: str) -> Image.Image:
        decoded.append(name)
        return real(data, name=name)

    monkeypatch.setattr(module, "image_from_bytes", counting)
    first = examine(open_images(mixed), facts_folder=tmp_path / "memory")
    assert len(decoded) == len(open_images(mixed))
    decoded.clear()
    assert_equal(examine(open_images(mixed), facts_folder=tmp_path / "memory"), first)
    assert decoded == []
    (mixed / "text.png").write_bytes(IMAGE)
    (mixed / "empty.png").unlink()
    folder_of(mixed, {"new.png": IMAGE})
    changed = examine(open_images(mixed), facts_folder=tmp_path / "memory")
    assert sorted(decoded) == ["new.png", "text.png"]
    assert len(changed.used) == 6
    assert_equal(changed, examine(open_images(mixed)))
    (memory,) = (tmp_path / "memory").iterdir()
    assert "empty.png" not in memory.read_text()


def assert_equal(a: Inspection, b: Inspection) -> None:
    assert a.as_dict() == b.as_dict()
    assert a.digests == b.digests
    for mine, theirs in ((a.used, b.used), (a.sizes, b.sizes), (a.hashes, b.hashes), (a.uncaptioned, b.uncaptioned)):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"schema": 1}', b'{"schema": 9, "seen": {}}', b'{"schema": 1, "seen": []}']
)
def test_a_damaged_memory_is_no_memory(mixed: Path, tmp_path: Path, content: bytes) -> None:
    expected = examine(open_images(mixed), facts_folder=tmp_path / "memory")
    (memory,) = (tmp_path / "memory").iterdir()
    memory.write_bytes(content)
    assert_equal(examine(open_images(mixed), facts_folder=tmp_path / "memory"), expected)
    entries = json.loads(memory.read_text())["seen"]
    for entry, damage in zip(
        entries.values(), itertools.cycle([[], [1], ["a", 2, "", 0, ""], [1, 2, "", -1, ""]]), strict=False
    ):
        entry[:] = damage
    memory.write_text(json.dumps({"schema": 1, "seen": entries}))
    assert_equal(examine(open_images(mixed), facts_folder=tmp_path / "memory"), expected)


def test_a_memory_that_cannot_be_written_costs_nothing_but_time(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert len(examine(open_images(mixed), facts_folder=tmp_path / "file" / "below").used) == 4


def test_what_was_seen_before_an_interruption_is_remembered(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", {f"{n:03d}.png": image_bytes(n) for n in range(50)})
    seen = inspect(open_images(root), facts_folder=tmp_path / "memory", workers=1)
    for _ in range(10):
        next(seen)
    seen.close()
    (memory,) = (tmp_path / "memory").iterdir()
    assert len(json.loads(memory.read_text())["seen"]) >= 10


def test_few_images_are_held_while_the_caller_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of(tmp_path, {f"{n:03d}.png": IMAGE for n in range(60)})
    decoded: list[str] = []
    real = module.image_from_bytes
    monkeypatch.setattr(
        module, "image_from_bytes", lambda data, *, name: (decoded.append(name), real(data, name=name))[1]
    )
    seen = inspect(open_images(root), workers=2)
    next(seen)
    assert len(decoded) <= 9
    assert [one.index for one in seen] == list(range(1, 60))


def test_images_that_vanish_after_the_listing_are_dropped_and_not_remembered(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", {"a.png": IMAGE, "b.png": IMAGE})
    images = open_images(root)
    (root / "a.png").unlink()
    found = examine(images, facts_folder=tmp_path / "memory")
    assert [(one.name, one.reason) for one in found.dropped] == [("a.png", "is gone")]
    folder_of(root, {"a.png": IMAGE})
    assert len(examine(images, facts_folder=tmp_path / "memory").used) == 2


def test_shards_give_the_same_examination_as_their_files(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", {f"{n}.png": image_bytes(n, (20 + n, 30)) for n in range(9)})
    loose = open_images(root)
    list(write_shards(loose, tmp_path / "shards", indices=range(9), max_pictures=4))
    from_files, from_shards = (
        examine(loose),
        examine(open_images(tmp_path / "shards"), facts_folder=tmp_path / "memory"),
    )
    assert np.array_equal(from_files.sizes, from_shards.sizes)
    assert from_files.digests == from_shards.digests
    assert_equal(from_shards, examine(open_images(tmp_path / "shards"), facts_folder=tmp_path / "memory"))


def test_latents_are_examined_without_a_decoder(tmp_path: Path) -> None:
    good, bad = latent_file("random:tiny:0", "a.png", "b.png"), bytearray(latent_file("random:tiny:0", "c.png"))
    bad[-4:] = b"\xff\xff\xff\x7f"  # NaN
    found = examine(open_images(folder_of(tmp_path, {"good.safetensors": good, "bad.safetensors": bytes(bad)})))
    assert found.sizes[found.used].tolist() == [[32, 16], [32, 16]]
    assert [one.name for one in found.dropped] == ["bad.safetensors"]
    assert len(set(found.digests)) == 3


def test_an_empty_examination_has_a_report(tmp_path: Path) -> None:
    found = examine(open_images(folder_of(tmp_path, {"a.png": b""})))
    assert len(found.used) == 0
    assert found.report()[0].endswith("0 of 1 are used, 1 dropped")
    assert found.as_dict()["sizes"]["median"] is None
    assert summarize(open_images(tmp_path), ()).smallest == ""


# Duplicates


def textured(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (8, 9), dtype=np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC).convert("RGB")


def test_the_difference_hash_is_the_one_by_hand() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (8, 9), dtype=np.uint8)
    expected = 0
    for row in levels.astype(int):
        for left, right in itertools.pairwise(row):
            expected = 2 * expected + (left > right)
    assert difference_hash(Image.fromarray(levels).convert("RGB")) == expected
    assert difference_hash(Image.new("RGB", (50, 50), "red")) == 0


def test_equal_and_similar_images_are_found_and_others_are_not(tmp_path: Path) -> None:
    files = {f"{n:02d}.jpg": jpeg(textured(n), quality=95) for n in range(20)}
    files["a.jpg"] = files["00.jpg"]
    files["b.jpg"] = jpeg(textured(1).resize((192, 128), Image.Resampling.BICUBIC), quality=60)
    files["flat1.jpg"], files["flat2.jpg"] = jpeg(Image.new("RGB", (96, 64))), jpeg(Image.new("RGB", (96, 64), "red"))
    images = open_images(folder_of(tmp_path, files))
    found = examine(images)
    names = lambda groups: [[images[index].name for index in group] for group in groups]  # noqa: E731
    assert names(same_bytes(found.digests, found.used)) == [["00.jpg", "a.jpg"]]
    assert names(similar(found.hashes, found.sizes, found.digests, found.used)) == [["01.jpg", "b.jpg"]]


@settings(max_examples=40)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=25), st.integers(0, 3), st.data())
def test_similar_finds_what_comparing_all_pairs_finds(hashes: list[int], bits: int, data: st.DataObject) -> None:
    for value in list(hashes):
        for place in data.draw(st.lists(st.integers(0, 63), max_size=4)):
            hashes.append(value ^ (1 << place))
    looks = np.array(hashes, dtype=np.uint64)
    sizes = np.ones((len(hashes), 2), dtype=np.int32)
    found = similar(looks, sizes, [str(index) for index in range(len(hashes))], range(len(hashes)), bits=bits)
    together = {pair for group in found for pair in itertools.combinations(group, 2)}
    for a, b in itertools.combinations(range(len(hashes)), 2):
        sound = all(6 <= hashes[one].bit_count() <= 58 for one in (a, b))
        if sound and (hashes[a] ^ hashes[b]).bit_count() <= bits:
            assert (a, b) in together
    assert sum(map(len, found)) == len(set(itertools.chain(*found)))
