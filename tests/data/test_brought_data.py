"""Data sets that people brought (tests/cases/training): used rightly, or each loss counted and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from sdcli.cli.dataset import app
from sdcli.data.conditioning_images import with_maps_of_folder
from sdcli.data.records import Item
from sdcli.data.sources import open_images
from sdcli.errors import BadImage, SdcliError, SomeFailed
from sdcli.images.formats import IMAGE_SUFFIXES
from sdcli.images.image_files import READABLE, open_image
from sdcli.io.json_files import parse_json
from sdcli.training.config_files import read_config
from sdcli.training.settings import TrainSettings
from sdcli.training.text_encoder.caption_files import read_captions
from tests.conftest import Run
from tests.data.test_dataset_folders import IMAGE, dropped, folder_of, listed

CASES = Path(__file__).parent.parent / "cases" / "training"


def check(data: Path | str) -> tuple[dict[str, Any], str]:
    """What `dataset check` finds, and the sentence of its failure, "" without one."""
    result = CliRunner().invoke(app, ["check", str(data), "--json"])
    assert result.exception is None or type(result.exception) is SdcliError
    sentence = "" if result.exception is None else str(result.exception).removeprefix(f"{data}: ")
    return json.loads(result.stdout), sentence


def remarks_of(found: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["text"] for one in found["remarks"]}


def test_a_caption_with_nul_characters_is_dropped_before_training() -> None:
    found, sentence = check(CASES / "nul_caption")
    assert found["dropped"] == [
        {"name": "2.png", "reason": "its caption holds a NUL character (2.txt, byte 1); save it as UTF-8"}
    ]
    assert found["used"] == 3
    assert sentence == "1 dropped"


def test_a_lone_folder_is_no_caption_and_an_unknown_table_is_told() -> None:
    found, sentence = check(CASES / "lone_folder")
    assert found["uncaptioned"] == 4
    assert remarks_of(found) == {
        "images/": "is the only folder, so its name is neither a caption nor a class",
        "metadata1000.jsonl": ("is a table that is not read; only metadata.jsonl, metadata.csv, metadata.parquet are"),
    }
    assert sentence == "1 caption files or tables not read and 4 without a caption (--unconditional allows that)"


def test_captions_of_powershell_are_read() -> None:
    captions = read_captions(CASES / "captions_utf16.txt")
    assert len(captions.texts) == 40
    assert not captions.dropped
    assert not any("\0" in text for text in captions.texts)


def test_more_suffixes_are_read_and_a_caption_without_an_image_is_a_loss() -> None:
    found, sentence = check(CASES / "unread_suffix")
    assert found["used"] == 3
    assert remarks_of(found) == {"renamed_away.txt": "is a caption without an image of its name"}
    assert sentence == "1 caption files or tables not read"


def test_kohyas_repeats_are_told() -> None:
    found, sentence = check(CASES / "kohya_repeats")
    assert sentence == ""
    (text,) = remarks_of(found).values()
    assert text.endswith("as in kohya's scripts: '10_zzq kettle' 10 times, '1_kettle' 1 times")


def test_captions_in_class_folders_are_not_replaced_by_the_folders_names() -> None:
    found, sentence = check(CASES / "class_with_caption_files")
    assert found["uncaptioned"] == 3
    assert "--caption-extension .caption would read" in remarks_of(found)["10_kettle/0.png"]
    assert sentence == "3 without a caption (--unconditional allows that)"


def test_encode_reads_the_suffixes_that_data_sets_have(tmp_path: Path, sdcli: Run) -> None:
    folder = shutil.copytree(CASES / "encode_jfif", tmp_path / "in")
    done = sdcli("encode", folder, "--outdir", tmp_path / "out", "--size", "16x16", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    (folder / "d.heic").write_bytes(b"?")
    done = sdcli("encode", folder, "--outdir", tmp_path / "out", "--size", "16x16", "--device", "cpu", "-q")
    assert done.returncode == 7
    assert "d.heic" in done.stderr


def test_keys_with_dots_are_dropped_by_name() -> None:
    found, _ = check(CASES / "shard_dotted_keys")
    assert [one["name"] for one in found["dropped"]] == [f"00000.tar:photo.{number}.jpg" for number in range(3)]
    assert "has a dot in its name" in found["dropped"][0]["reason"]


def test_joined_shards_are_read_to_their_end(tmp_path: Path) -> None:
    found, sentence = check(CASES / "shard_concatenated")
    assert (found["used"], sentence) == (5, "")
    shard = (CASES / "shard_concatenated" / "00000.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(shard + b"something else" * 100)
    images = open_images(tmp_path)
    assert len(images) == 5
    (lost,) = images.dropped
    assert "has something else than an archive behind its end" in lost.reason


def test_brackets_in_a_folders_name_are_no_pattern() -> None:
    found, sentence = check(f"{CASES}/brackets/shoot [2023]/{{00000..00001}}.tar")
    assert (found["used"], sentence) == (5, "")
    assert len(open_images(f"{CASES}/brackets/shoot [2023]/*.tar")) == 5
    assert len(open_images(f"{CASES}/brackets/shoot*/0000[0-9].tar")) == 5


def test_what_shards_lose_is_told_with_q_and_by_the_exit_code(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["shard", str(CASES / "shard_loses"), "-o", str(tmp_path / "out"), "-q"])
    assert isinstance(result.exception, SomeFailed)
    assert str(result.exception) == "1 of 4 images were dropped; the others are in the shards"
    assert "its caption is not UTF-8 text (1.txt, byte 15); save it as UTF-8: 1.png" in result.stderr


def test_names_in_a_table_are_relative_to_its_folder_and_the_sentence_says_so() -> None:
    found, _ = check(CASES / "table_prefix")
    reasons = {one["reason"] for one in found["dropped"] if one["name"] == "train/0.png"}
    assert (
        "is listed in train/metadata.jsonl (line 1), but there is no train/train/0.png: "
        "names in it are relative to its folder train/"
    ) in reasons


def test_a_table_names_the_columns_that_it_has() -> None:
    found, sentence = check(CASES / "table_unknown_column")
    text = remarks_of(found)["metadata.jsonl"]
    assert text.startswith("has no column text or caption, but additional_feature, file_name")
    assert "2 without a caption" in sentence


def test_numbers_of_32_bits_are_refused_as_floating_point_numbers_are() -> None:
    with pytest.raises(BadImage, match="holds 32-bit whole numbers, whose black and white levels are unknown"):
        open_image(CASES / "int32_levels_0_to_252.tif")


# More of the same kinds


def test_the_suffixes_are_those_that_pillow_gives_to_the_formats_that_are_read() -> None:
    Image.init()
    formats = {*READABLE, "DIB", "MPO"}  # DIB and MPO are written as BMP and JPEG files
    assert {suffix for suffix, format in Image.registered_extensions().items() if format in formats} == IMAGE_SUFFIXES


@pytest.mark.parametrize(("numbers", "repeats"), [((0, 1, 2), (1, 1, 1)), ((10, 3), (10, 3)), ((1, 2), (1, 1))])
def test_numbered_classes_are_no_repeats(tmp_path: Path, numbers: tuple[int, ...], repeats: tuple[int, ...]) -> None:
    """`0_cat`, `1_dog` count classes; kohya's numbers are captions' and do not count up."""
    root = folder_of(tmp_path, {f"{number}_{'abc'[place]}/x.png": IMAGE for place, number in enumerate(numbers)})
    images = open_images(root)
    found: dict[str, Item] = {images[index].name.partition("/")[0]: images[index] for index in range(len(images))}
    for place, number in enumerate(numbers):
        item = found[f"{number}_{'abc'[place]}"]
        assert item.repeats == repeats[place]
        assert item.captions == (f"{number}_{'abc'[place]}" if repeats[place] == 1 else "abc"[place],)
    told = [remark.text for remark in images.remarks if "they are numbered classes" in remark.text]
    assert len(told) == (repeats == (1,) * len(repeats))


def test_a_folder_without_kohyas_number_makes_none_of_them_repeat(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"10_cat/1.png": IMAGE, "10_cat/1.txt": "cat", "dog/1.png": IMAGE, "dog/1.txt": "dog"})
    images = open_images(root)
    assert [images[index].repeats for index in range(2)] == [1, 1]


def test_strings_of_parquet_that_are_not_utf8_cost_their_row_only(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"caf\xe9", "кот".encode()], pa.binary()).view(pa.string())
    table = pa.table({"image": pa.array([IMAGE] * 3, pa.binary()), "text": raw})
    (tmp_path / "rows").mkdir()
    pq.write_table(table, tmp_path / "rows" / "0.parquet")
    assert [captions for _, captions, _ in listed(tmp_path / "rows")] == [("fine",), ("кот",)]
    assert dropped(tmp_path / "rows") == {"0.parquet:1": "its caption is not UTF-8 text (byte 3)"}
    folder = folder_of(tmp_path / "folder", {f"{number}.png": IMAGE for number in range(3)})
    pq.write_table(pa.table({"file_name": [f"{n}.png" for n in range(3)], "text": raw}), folder / "metadata.parquet")
    assert [captions for _, captions, _ in listed(folder)] == [("fine",), ("кот",)]
    assert dropped(folder)["1.png"].startswith("its caption is not UTF-8 text (byte 3), metadata.parquet row 2")


def test_bytes_are_captions_where_a_column_holds_bytes(tmp_path: Path) -> None:
    table = pa.table({"image": [IMAGE], "text": pa.array(["猫".encode("utf-16")], pa.binary())})
    pq.write_table(table, tmp_path / "0.parquet")
    assert [captions for _, captions, _ in listed(tmp_path, image_column="image")] == [("猫",)]


def test_other_splits_and_hidden_images_are_told(tmp_path: Path) -> None:
    files = {
        "train/a.png": IMAGE,
        "test/b.png": IMAGE,
        "test/c.png": IMAGE,
        "train/.d.png": IMAGE,
        "train/._a.png": b"x",
    }
    remarks = {one.name: one.text for one in open_images(folder_of(tmp_path, files)).remarks}
    assert remarks == {
        "test/": "is another split, whose 2 files are not used (--split)",
        "train/.d.png": "is hidden, since its name begins with a dot, and is not used",
    }


def test_an_absolute_path_inside_the_folder_is_that_file(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", {"a.png": IMAGE, "b.png": IMAGE})
    rows = [{"file_name": str(root / "a.png"), "text": "one"}, {"file_name": "D:\\set\\b.png", "text": "two"}]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert listed(root) == [("a.png", ("one",), None)]
    assert "a path of Windows" in dropped(root)["D:\\set\\b.png"]


def test_what_img2dataset_writes_beside_its_shards_is_named(tmp_path: Path) -> None:
    shard = (CASES / "brackets" / "shoot [2023]" / "00000.tar").read_bytes()
    root = folder_of(
        tmp_path, {"00000.tar": shard, "00000.parquet": b"?", "00000_stats.json": "{}", "captions.txt": "x"}
    )
    remarks = {one.name: one.text for one in open_images(root).remarks}
    assert set(remarks) == {"00000.parquet", "00000_stats.json", "captions.txt"}
    assert remarks["00000.parquet"] == "belongs to a shard and is not read: captions are in the shards"


def test_captions_without_an_image_are_told_to_the_trainer_of_text_encoders() -> None:
    captions = read_captions(CASES / "unread_suffix")
    assert len(captions.texts) == 3
    assert [one.name for one in captions.dropped] == ["renamed_away.txt"]


def test_the_folder_beside_the_maps_is_no_caption(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {f"{kind}/{name}.png": IMAGE for kind in ("one", "maps/one") for name in "ab"})
    images, maps = with_maps_of_folder(open_images(root), str(root / "maps"))
    assert [images[index] for index in range(2)] == [Item(f"one/{name}.png", ()) for name in "ab"]
    assert [maps[index].name for index in range(2)] == ["one/a.png", "one/b.png"]


def test_a_mark_before_json_and_toml_is_none_of_their_text(tmp_path: Path) -> None:
    assert parse_json("\ufeff{}") == parse_json("{}".encode("utf-8-sig")) == {}
    (tmp_path / "run.toml").write_text("seed = 3\n", encoding="utf-8-sig")
    assert read_config(tmp_path / "run.toml", TrainSettings) == {"seed": 3}
