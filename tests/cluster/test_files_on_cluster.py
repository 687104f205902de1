"""`encode`, `decode` and `dataset cache` with --cluster: what is refused; their files are compared in test_faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Run


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("encode", "images", "--cluster", "local", "--shard", "1/2"), "--shard does not go with --cluster"),
        (("encode", "images/0.png", "--cluster", "local", "-o", "a.safetensors"), "-o names one file"),
        (("decode", "images/0.png", "--cluster", "local", "-o", "a.png"), "-o names one file"),
        (("dataset", "cache", "images", "--cluster", "local", "--shard", "1/2"), "--shard does not go with --cluster"),
        (("encode", "images", "--workers", "2"), "--workers has no effect without --cluster"),
        (("encode", "images", "--cluster", "ftp://x"), "--cluster takes local, auto or HOST:PORT"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused_before_anything_is_written(
    arguments: tuple[str, ...], reason: str, sdcli: Run, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.png")
    done = sdcli(*arguments)
    assert done.returncode == 2
    assert reason in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["images", "0.png"]
