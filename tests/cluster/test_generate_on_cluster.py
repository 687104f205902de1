"""`sdcli generate --cluster`: the images of one process, byte for byte, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from tests.cluster.driver import LOCAL, driver
from tests.cluster.processes import listening
from tests.conftest import Run

JOURNAL = ".sdcli-journal.jsonl"
PROMPTS = [f"a fox number {number}" for number in range(8)]
OPTIONS = ("-m", "tiny", "--seed", "3", "--batch-size", "2", "--prompts-file", "prompts.txt")
LOOPBACK = ("0100007F:", "00000000000000000000000001000000:", "0000000000000000FFFF00000100007F:")
"""127.0.0.1 and ::1 in the kernel's hex."""


def sessions() -> set[Path]:
    """The folders of local clusters."""
    return set(Path("/tmp").glob("sdcli-ray-*"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def images(folder: Path) -> dict[str, bytes]:
    assert not list(folder.glob("*.tmp"))
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def journal(folder: Path) -> list[str]:
    """The names in the journal, which has no parts left."""
    assert [path.name for path in folder.glob(".sdcli-journal*")] == [JOURNAL]
    rows = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    return [row["path"] for row in rows if "path" in row]


@pytest.fixture
def expected(sdcli: Run, prompts: Path, tmp_path: Path) -> dict[str, bytes]:
    """The images of one process with one thread."""
    done = sdcli("generate", *OPTIONS, "--outdir", "one", "--threads", "1", "-q")
    assert done.returncode == 0, done.stderr
    found = images(tmp_path / "one")
    assert len(found) == len(PROMPTS)
    return found


@pytest.mark.slow
def test_two_workers_make_the_images_of_one_process(expected: dict[str, bytes], sdcli: Run, tmp_path: Path) -> None:
    """And nothing of the cluster is seen: not on stdout, not by other machines, not by another user, not afterwards."""
    before = sessions()
    with driver(tmp_path, "generate", *OPTIONS, "--outdir", "out", *LOCAL, "-v") as running:
        running.busy_worker()
        mapped = Path(f"/proc/{running.process.pid}/maps").read_text()
        assert "libtorch" not in mapped, "the driver needs no torch"
        addresses = listening({running.process.pid, *running.seen})
        assert addresses
        assert {one for one in addresses if not one.startswith(LOOPBACK)} == set(), "only this machine can connect"
        (session,) = sessions() - before
        assert stat.S_IMODE(session.stat().st_mode) == 0o700
        code, out, err = running.end()
    assert code == 0, err
    assert sessions() == before
    assert images(tmp_path / "out") == expected
    assert sorted(out.split()) == sorted(f"out/{name}" for name in expected)
    assert sorted(journal(tmp_path / "out")) == sorted(expected)
    assert "starting 2 workers" in err
    assert "the cluster took " in err
    lines = [line for line in err.splitlines() if line.startswith(("worker 1 on ", "worker 2 on "))]
    assert len(lines) == 2
    for word in ("raylet", "INFO", "WARNING", "Traceback", "dashboard", "usage"):
        assert word not in err
    began = time.monotonic()
    again = sdcli("generate", *OPTIONS, "--outdir", "out", *LOCAL, "--resume", "--json")
    assert time.monotonic() - began < 3, "no cluster is started where nothing is left to do"
    assert [json.loads(line)["status"] for line in again.stdout.splitlines()] == ["skipped"] * 8
    assert images(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_killed_worker_costs_no_image(expected: dict[str, bytes], tmp_path: Path) -> None:
    with driver(tmp_path, "generate", *OPTIONS, "--outdir", "out", *LOCAL) as running:
        os.kill(running.busy_worker(), signal.SIGKILL)
        code, out, err = running.end()
    assert code == 0, err
    assert "died: " in err
    assert len(out.splitlines()) == len(expected)
    assert images(tmp_path / "out") == expected
    assert sorted(journal(tmp_path / "out")) == sorted(expected)


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [LOCAL, ("--threads", "1")], ids=["on a cluster", "in one process"])
def test_a_killed_driver_leaves_no_process_and_resume_makes_the_same_set(
    expected: dict[str, bytes], cluster: tuple[str, ...], tmp_path: Path
) -> None:
    with driver(tmp_path, "generate", *OPTIONS, "--outdir", "out", *LOCAL) as running:
        running.wait_for_image(tmp_path / "out")
        running.process.kill()
        code, _, _ = running.end()
    assert code == -signal.SIGKILL
    kept = {name: (tmp_path / "out" / name).read_bytes() for name in os.listdir(tmp_path / "out") if "png" in name}
    assert 0 < len(kept) < len(expected)
    assert kept.items() <= expected.items()
    with driver(tmp_path, "generate", *OPTIONS, "--outdir", "out", *cluster, "--resume", "--json") as running:
        code, out, err = running.end()
    assert code == 0, err
    statuses = [json.loads(line)["status"] for line in out.splitlines()]
    assert statuses.count("skipped") == len(kept)
    assert images(tmp_path / "out") == expected


@pytest.mark.slow
def test_ctrl_c_stops_within_a_step_and_keeps_what_is_finished(expected: dict[str, bytes], tmp_path: Path) -> None:
    many = ("--steps", "900")
    with driver(tmp_path, "generate", *OPTIONS, "--outdir", "out", *LOCAL, *many) as running:
        running.busy_worker()
        time.sleep(1)
        began = time.monotonic()
        os.killpg(running.process.pid, signal.SIGINT)  # to all of the terminal's processes, as Ctrl-C does
        code, _, err = running.end()
    assert code == 130, err
    assert time.monotonic() - began < 15
    assert "stopping after the current step" in err
    assert err.rstrip().endswith("sdcli: interrupted after the current step; finished images are kept")
    with driver(tmp_path, "generate", *OPTIONS, "--outdir", "some", *LOCAL) as running:
        running.wait_for_image(tmp_path / "some")
        os.killpg(running.process.pid, signal.SIGINT)
        code, _, err = running.end()
    assert code in (130, 0), err
    assert images(tmp_path / "some").items() <= expected.items()
    assert sorted(journal(tmp_path / "some")) == sorted(images(tmp_path / "some"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--preview", "p.png"], "--preview cannot be combined with --cluster"),
        (["--trace", "4"], "--trace cannot be combined with --cluster"),
        (["--heatmap", "fox"], "--heatmap cannot be combined with --cluster"),
        (["--keep-warm", "1m"], "--keep-warm cannot be combined with --cluster"),
        (["--dry-run"], "--dry-run cannot be combined with --cluster"),
        (["--device", "mps"], "--cluster takes --device cpu or cuda, not mps"),
        (["--gpus-per-worker", "0.5", "--device", "cpu"], "--gpus-per-worker has no effect with --device cpu"),
        (["--gpus-per-worker", "1.5"], "--gpus-per-worker takes a number, such as 1 or 0.5; not 1.5"),
        (["--cluster", "ray://host:10001"], "--cluster takes local, auto or HOST:PORT, not 'ray://host:10001'"),
        (["--cluster", "host"], "--cluster takes local, auto or HOST:PORT, not 'host'"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused(options: list[str], reason: str, sdcli: Run, prompts: Path) -> None:
    done = sdcli("generate", *OPTIONS, "--cluster", "local", *options)
    assert done.returncode == 2
    assert reason in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a fox", "--cluster", "local"], "--cluster needs --prompts-file"),
        (["a fox", "--workers", "2"], "--workers has no effect without --cluster"),
        (["a fox", "--gpus-per-worker", "1"], "--gpus-per-worker has no effect without --cluster"),
    ],
)
def test_options_of_a_cluster_without_what_they_need_are_refused(arguments: list[str], reason: str, sdcli: Run) -> None:
    done = sdcli("generate", "-m", "tiny", *arguments)
    assert done.returncode == 2
    assert reason in done.stderr
