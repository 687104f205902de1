"""`--shard i/n`: shards together are one run, to the byte; really at the same moment, and really killed."""

from __future__ import annotations

import hashlib
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Run
from tests.forked import Forked

TINY = ("-m", "tiny", "--steps", "2", "-q")


def digests(folder: Path) -> dict[str, str]:
    """The digests of all files but the journal, by their paths."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".sdcli-journal")
    }


def prompts_of(folder: Path, name: str = "jobs.jsonl") -> Path:
    """Lines of two sizes, so that batches differ in length, with and without seeds, two of them equal."""
    lines: list[dict[str, object]] = [{"prompt": f"thing {n}", "size": "64x64" if n % 3 else "32x32"} for n in range(7)]
    lines += [{"prompt": "thing 3", "size": "32x32", "seed": 4}] * 3
    path = folder / name
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def start(folder: Path, *arguments: str) -> Forked:
    return Forked(arguments, cwd=folder)


def ended(processes: list[Forked]) -> list[str]:
    """The lines that processes printed, all of which must have succeeded."""
    printed = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        printed += out.splitlines()
    return printed


@pytest.mark.parametrize(
    "count", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.slow)]
)
def test_shards_at_the_same_moment_in_one_folder_are_one_run(sdcli: Run, tmp_path: Path, count: int) -> None:
    file = prompts_of(tmp_path)
    options = ("generate", "--prompts-file", str(file), *TINY, "--batch-size", "2")
    assert sdcli(*options, "--outdir", "whole", "--shard", "1/1").returncode == 0
    shards = [f"{index}/{count}" for index in range(1, count + 1)]
    printed = ended([start(tmp_path, *options, "--outdir", "parts", "--shard", shard) for shard in shards])
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert len(digests(tmp_path / "whole")) == 10
    assert sorted(printed) == sorted(f"parts/{name}" for name in digests(tmp_path / "parts"))


def test_each_line_that_cannot_be_generated_is_reported_by_one_shard(sdcli: Run, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        "\n".join(['{"prompt": "a"}', '{"steps": 0}', '{"prompt": "b"}', "nonsense", '{"prompt": "c", "seeds": 1}'])
    )
    found = []
    for shard in ("1/2", "2/2"):
        done = sdcli("generate", "--prompts-file", "p.jsonl", *TINY, "--json", "--shard", shard)
        found += [json.loads(line) for line in done.stdout.splitlines()]
        assert done.returncode == 7, done.stderr
    assert sorted((row["index"], row["status"]) for row in found) == [
        (1, "done"), (2, "failed"), (3, "done"), (4, "failed"), (5, "failed"),
    ]  # fmt: skip


def test_more_shards_than_batches_leave_some_without_work(sdcli: Run, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a fox\n")
    options = ("generate", "--prompts-file", "p.txt", "-m", "tiny", "--steps", "2")
    done = sdcli(*options, "--shard", "2/5")
    assert (done.returncode, done.stdout) == (0, "")
    assert "shard 2/5 has nothing to do" in done.stderr
    assert sdcli(*options, "--shard", "1/5").stdout.count("\n") == 1
    other = sdcli(*options, "--seed", "3", "--shard", "3/5")
    assert (other.returncode, other.stdout) == (2, ""), "it has another plan than the shards before it"
    assert "divides other batches" in other.stderr


def test_options_that_shards_cannot_honour_are_refused(sdcli: Run, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a fox\na cat\na fox\n")
    file = ("--prompts-file", "p.txt")
    refused = {
        ("generate", "a fox"): "--prompts-file",
        ("generate", *file, "--sweep", "steps=1,2"): "--sweep",
        ("generate", *file, "--keep-warm", "1m"): "--keep-warm",
        ("generate", *file, "-o", "cat.png"): "template",
        ("generate", *file, "-o", "{prompt}"): "would both be a-fox.png",
        ("encode", "p.txt", "-o", "a.safetensors"): "--outdir",
        ("encode", "p.txt", "--pack", "-o", "a.safetensors"): "--outdir",
        ("decode", "p.txt", "-o", "a.png"): "--outdir",
    }
    for command, sentence in refused.items():
        done = sdcli(*command, "--shard", "1/2")
        assert done.returncode == 2, (command, done.stderr)
        assert sentence in done.stderr
    assert sdcli("generate", *file, *TINY, "--shard", "3/2").returncode == 2
    assert digests(tmp_path).keys() == {"p.txt"}


def test_a_dry_run_of_all_shards_shows_each_request_once(sdcli: Run, tmp_path: Path) -> None:
    file = prompts_of(tmp_path)
    rows = [
        line
        for shard in ("1/2", "2/2")
        for line in sdcli(
            "generate", "--prompts-file", file, *TINY, "--dry-run", "--json", "--shard", shard
        ).stdout.splitlines()
    ]
    whole = sdcli("generate", "--prompts-file", file, *TINY, "--dry-run", "--json", "--shard", "1/1").stdout
    assert sorted(rows) == sorted(whole.splitlines())
    assert len(rows) == 10
    assert digests(tmp_path).keys() == {file.name}


@pytest.mark.slow
def test_shards_killed_again_and_again_are_completed_by_themselves_or_by_a_whole_run(
    sdcli: Run, tmp_path: Path
) -> None:
    """Each shard with --resume completes its part; so does one run with --resume, with the seeds of the shards."""
    seeded = [{"prompt": f"thing number {n % 20}", "seed": n % 10} for n in range(30)]
    lines = [*seeded, *({"prompt": f"cat {n}"} for n in range(30))]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ("generate", "--prompts-file", "jobs.jsonl", *TINY, "--steps", "6", "--batch-size", "3")
    assert sdcli(*options, "--outdir", "whole", "--shard", "1/1").returncode == 0
    rng = random.Random(3)
    for turn, outdir in enumerate(("shards", "whole-resume")):
        parts = [(*options, "--resume", "--outdir", outdir, "--shard", f"{index}/3") for index in (1, 2, 3)]
        for _ in range(3):
            processes = [start(tmp_path, *part) for part in parts]
            processes[rng.randrange(3)].stdout.readline()
            time.sleep(rng.random() * 0.3)
            for process in processes:
                process.kill()
            for process in processes:
                process.communicate()
        if turn == 0:
            ended([start(tmp_path, *part) for part in parts])
        else:
            assert 0 < len(digests(tmp_path / outdir)) < 60
            ended([start(tmp_path, *options, "--resume", "--outdir", outdir)])
        assert digests(tmp_path / outdir) == digests(tmp_path / "whole")


@pytest.mark.slow
def test_a_model_that_one_machine_lacks_does_not_move_batches_to_other_shards(sdcli: Run, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("models: {gone: {source: {kind: folder, path: nowhere}, family: sd1}}")
    lines = [{"prompt": f"{n}", "model": "gone" if n == 0 else "tiny"} for n in range(5)]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = (
        "--models-file",
        "models.yaml",
        "--prompts-file",
        "jobs.jsonl",
        "--batch-size",
        "1",
        "--steps",
        "1",
        "-q",
    )
    results = [sdcli("generate", *options, "--json", "--shard", shard) for shard in ("1/2", "2/2")]
    rows = [json.loads(line) for done in results for line in done.stdout.splitlines()]
    assert sorted((row["index"], row["status"]) for row in rows) == [
        (1, "failed"), (2, "done"), (3, "done"), (4, "done"), (5, "done"),
    ]  # fmt: skip
    assert sorted(done.returncode for done in results) == [0, 7]


# encode and decode


def folder_of(folder: Path, count: int) -> Path:
    """Images of which some neighbours have one size, one cannot be read, and one is cut in the middle."""
    folder.mkdir(parents=True)
    for k in range(count):
        pixels = np.random.default_rng(k).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        size = (40, 32) if k % 5 < 3 else (32, 40)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{k:02}.png")
    (folder / "04-broken.png").write_bytes(b"no image")
    whole = (folder / "06.png").read_bytes()
    (folder / "06.png").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("--batch-size", "2"),
        pytest.param(("--pack", "--batch-size", "2"), marks=pytest.mark.slow),
        pytest.param(("--pack", "--size", "16x16", "--half"), marks=pytest.mark.slow),
    ],
)
def test_shards_of_encode_and_decode_are_one_run(sdcli: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    folder_of(tmp_path / "images", 12)
    encode = ("encode", "images", "-m", "tiny", "-q", *options)
    assert sdcli(*encode, "--outdir", "whole").returncode == 7
    processes = [start(tmp_path, *encode, "--outdir", "parts", "--shard", f"{index}/3") for index in (1, 2, 3)]
    codes = {process.wait() for process in processes}
    assert codes & {1, 7}, "the bad images fail in their shards, with 1 where a shard has nothing else"
    assert codes <= {0, 1, 7}
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert digests(tmp_path / "whole")
    decode = ("decode", "whole", "-m", "tiny", "-q")
    assert sdcli(*decode, "--outdir", "images-whole").returncode == 0
    ended([start(tmp_path, *decode, "--outdir", "images-parts", "--shard", f"{index}/3") for index in (1, 2, 3)])
    assert digests(tmp_path / "images-parts") == digests(tmp_path / "images-whole")
    assert len(digests(tmp_path / "images-whole")) == 11


@pytest.mark.slow
def test_a_resumed_batch_encodes_its_finished_images_along_and_writes_the_others(sdcli: Run, tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 9)
    encode = ("encode", "images", "-m", "tiny", "-q", "--batch-size", "3")
    sdcli(*encode, "--outdir", "whole")
    before = digests(tmp_path / "whole")
    (tmp_path / "whole" / "01.safetensors").unlink()
    assert sdcli(*encode, "--outdir", "whole").stdout.split() == ["whole/01.safetensors"]
    assert digests(tmp_path / "whole") == before


@pytest.mark.slow
def test_decode_resumes_what_was_killed_and_replaces_nothing(sdcli: Run, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder_of(folder, 30)
    (folder / "06.png").unlink()
    (folder / "04-broken.png").unlink()
    assert sdcli("encode", "images", "-m", "tiny", "-q", "--outdir", "latents").returncode == 0
    decode = ("decode", "latents", "-q", "--resume")
    ended([start(tmp_path, *decode, "--outdir", "whole")])
    for index in (1, 2):
        process = start(tmp_path, *decode, "--outdir", "parts", "--shard", f"{index}/2")
        for _ in range(4):
            process.stdout.readline()
        process.kill()
        process.communicate()
    assert 0 < len(digests(tmp_path / "parts")) < 29
    shards = [start(tmp_path, *decode, "--outdir", "parts", "--shard", f"{index}/2") for index in (1, 2)]
    printed = ended(shards)
    assert 0 < len(printed) < 29
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    journals = list((tmp_path / "parts").glob(".sdcli-journal*"))
    assert len(journals) == 2
    for path in journals:  # without them the images are decoded again and found to be the same
        path.unlink()
    again = sdcli(*decode, "--outdir", "parts", "--json")
    assert {json.loads(line)["status"] for line in again.stdout.splitlines()} == {"skipped"}
    (tmp_path / "parts" / "00.png").write_bytes(b"another file")
    assert sdcli(*decode, "--outdir", "parts").returncode == 7
    assert (tmp_path / "parts" / "00.png").read_bytes() == b"another file"
