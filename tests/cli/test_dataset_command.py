"""`sdcli dataset check|stats|shard`: what they print, how they exit, and that the data stays as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sdcli.cli.dataset import app
from sdcli.data.sources import open_images
from sdcli.errors import BadImage, CannotWrite, SdcliError, SomeFailed, UsageError
from tests.data.test_dataset_folders import IMAGE, folder_of, image_bytes, latent_file, tree_digest


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Six captioned images in three sizes."""
    files: dict[str, bytes | str] = {}
    for number, size in enumerate([(64, 64)] * 3 + [(128, 64)] * 2 + [(64, 128)]):
        files |= {f"{number}.png": image_bytes(number, size), f"{number}.txt": f"an image of number {number}\nit\n"}
    return folder_of(tmp_path / "good", files)


def test_sound_data_pass_the_check_unchanged(good: Path) -> None:
    before = tree_digest(good)
    result = run("check", good, "--resolution", "64", "--bucket-reso-steps", "16", "--train-batch-size", "2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{good}: 6 of 6 are used, 0 dropped"
    assert lines[-1] == "no problems"
    assert "buckets: 2 for 6 training images, in steps of 2 samples" in lines
    assert tree_digest(good) == before


def test_lost_images_and_captions_fail_the_check(good: Path) -> None:
    folder_of(good, {"bad.png": b"?", "bad.txt": "x", "none.png": image_bytes(9), "none.caption": "unread"})
    before = tree_digest(good)
    result = run("check", good)
    assert result.exit_code == 1
    assert type(result.exception) is SdcliError
    assert str(result.exception) == f"{good}: 1 dropped and 1 without a caption (--unconditional allows that)"
    assert "--caption-extension .caption" in result.stdout
    allowed = run("check", good, "--unconditional")
    assert str(allowed.exception) == f"{good}: 1 dropped"
    (good / "bad.png").unlink()
    assert run("check", good, "--unconditional").exit_code == 0
    assert tree_digest(good) != before


def test_duplicates_and_tiny_images_are_told_and_are_no_failure(tmp_path: Path) -> None:
    files = {
        "a.png": IMAGE,
        "a.txt": "same",
        "b.png": IMAGE,
        "b.txt": "same",
        "c.png": image_bytes(1),
        "c.txt": "c",
    }
    result = run("check", folder_of(tmp_path, files))
    assert result.exit_code == 0
    assert "2 images are identical byte for byte: a.png = b.png" in result.stdout
    assert "2 share their caption; 2 have 'same'" in result.stdout
    assert "3 are less than 64 pixels wide or high: a.png, b.png, c.png" in result.stdout


def test_json_is_one_object_with_everything(good: Path) -> None:
    folder_of(good, {"bad.png": b"?", "bad.txt": "x"})
    result = run("check", good, "--json", "--resolution", "64x64", "--bucket-reso-steps", "16", "-q")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["ok"], found["used"], found["problems"]) == (False, 6, ["1 dropped"])
    assert found["dropped"] == [{"name": "bad.png", "reason": "is not a PNG, JPEG, WebP, BMP, GIF or TIFF image"}]
    assert sum(bucket["pictures"] for bucket in found["buckets"]) == 6


def test_the_second_check_remembers_the_first(good: Path, tmp_path: Path) -> None:
    assert run("check", good).exit_code == 0
    memory = list(Path(os.environ["XDG_CACHE_HOME"]).rglob("examined-*.json"))
    assert len(memory) == 1
    written = memory[0].stat().st_mtime_ns
    assert run("check", good).exit_code == 0
    assert memory[0].stat().st_mtime_ns == written


def test_stats_count_sizes_words_tokens_and_buckets(good: Path) -> None:
    folder_of(good, {"0.txt": "word " * 100})
    result = run("stats", good, "-m", "tiny", "--resolution", "64", "--bucket-reso-steps", "16")
    assert result.exit_code == 0, result.exception
    assert "captions: 11, words 1 to 100, median 5" in result.stdout
    assert "tokens of tiny: 1 to 100, median 5; 1 (9.1 %) have more than 75 and are cut" in result.stdout
    assert "sizes 64x64 to 128x64, median 64x64" in result.stdout
    found = json.loads(run("stats", good, "--json", "-m", "tiny").stdout)
    assert found["captions"]["tokens"] == {"least": 1, "median": 5, "most": 100, "limit": 75, "cut": 1}


def test_stats_count_classes(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"dog/1.png": IMAGE, "dog/2.png": IMAGE, "cat/1.png": IMAGE})
    assert json.loads(run("stats", root, "--json").stdout)["classes"] == {"cat": 1, "dog": 2}
    assert "classes: 2" in run("stats", root).stdout


def test_shards_hold_the_same_set(good: Path, tmp_path: Path) -> None:
    folder_of(good, {"bad.png": b"?", "bad.txt": "x"})
    before = tree_digest(good)
    result = run("shard", good, "-o", tmp_path / "out", "--shard-pictures", "4")
    assert isinstance(result.exception, SomeFailed)
    assert str(result.exception) == "1 of 7 images were dropped; the others are in the shards"
    assert result.stdout.splitlines() == [str(tmp_path / f"out/0000{n}.tar") for n in range(2)]
    assert "6 of 7 are used, 1 dropped" in result.stderr
    assert tree_digest(good) == before

    def content(root: Path) -> list[tuple[bytes, tuple[str, ...]]]:
        images = open_images(root)
        return [(images.read(index), images[index].captions) for index in range(len(images))]

    (good / "bad.png").unlink()
    assert content(tmp_path / "out") != content(good)
    assert sorted(content(tmp_path / "out")) == sorted(content(good))
    assert run("check", tmp_path / "out").exit_code == 0
    run("shard", good, "-o", tmp_path / "again", "--shard-pictures", "4")
    for name in ("00000.tar", "00001.tar"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    run("shard", good, "-o", tmp_path / "ordered", "--no-shuffle")
    assert content(tmp_path / "ordered") == content(good)
    run("shard", tmp_path / "out", "-o", tmp_path / "once-more")
    assert content(tmp_path / "once-more") == content(tmp_path / "out")


def test_class_folders_keep_their_classes_in_shards(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", {"dog/1.png": IMAGE, "cat/1.png": image_bytes(1)})
    run("shard", root, "-o", tmp_path / "out")
    shards = open_images(tmp_path / "out")
    assert shards.classes == ("cat", "dog")
    assert {(shards[index].label, shards[index].captions) for index in range(2)} == {
        ("cat", ("cat",)),
        ("dog", ("dog",)),
    }


def test_shards_never_overwrite_nor_go_into_the_data(good: Path, tmp_path: Path) -> None:
    folder_of(tmp_path / "full", {"x": "y"})
    broken = folder_of(tmp_path / "broken", {"a.png": b"?"})
    latents = folder_of(tmp_path / "latents", {"a.safetensors": latent_file("random:tiny:0", "a.png")})
    before = tree_digest(tmp_path)
    assert isinstance(run("shard", good, "-o", tmp_path / "full").exception, CannotWrite)
    inside = run("shard", good, "-o", good / "shards").exception
    assert isinstance(inside, UsageError)
    assert "which is never changed" in str(inside)
    assert isinstance(run("shard", broken, "-o", tmp_path / "new").exception, BadImage)
    assert "shards hold images" in str(run("shard", latents, "-o", tmp_path / "new").exception)
    assert tree_digest(tmp_path) == before


def test_options_that_make_no_sense_are_refused(good: Path) -> None:
    assert "has no effect without --resolution" in str(run("check", good, "--train-batch-size", "4").exception)
    assert "WIDTHxHEIGHT" in str(run("stats", good, "--resolution", "big").exception)
    assert run("check", good, "--split", "nonsense").exception is not None
