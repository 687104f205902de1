"""`sdcli generate` with a warm worker does what it does without one: files, output and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Disk
from tests.server.running import RunningServer
from tests.server.warm import (
    LINE,
    TINY,
    command,
    environment,
    generate,
    runtime_folder,
    wait_until,
    warm_worker,
    workers,
)

HOMES = ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "HF_HOME")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One worker for all tests here; the environment in which commands fit it."""
    home = tmp_path_factory.mktemp("home")
    with runtime_folder() as runtime:
        variables = {name: str(home / name) for name in HOMES} | {"XDG_RUNTIME_DIR": str(runtime)}
        with warm_worker(runtime, variables):
            yield variables


@pytest.fixture
def warm(worker: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands find the worker; its runtime folder."""
    for name, value in worker.items():
        monkeypatch.setenv(name, value)
    return Path(worker["XDG_RUNTIME_DIR"])


def both(tmp_path: Path, *arguments: str | Path) -> None:
    """Run a command with the worker and without it, and compare everything."""
    done = []
    for name, options in (("warm", ["-v"]), ("cold", ["-v", "--no-server"])):
        folder = tmp_path / name
        folder.mkdir()
        Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(folder / "start.png")
        (folder / "prompts.txt").write_text("a fox\n\na cat\nan owl\n")
        (folder / "bad.jsonl").write_text('{"prompt": "fox"}\n{"prompt": "cat", "steps": -1}\n')
        done.append(generate(folder, *arguments, *TINY, *options))
    warm, cold = done
    assert "generating with the warm worker, process" in warm.err, warm.err
    assert "generating with the warm worker" not in cold.err
    assert LINE not in warm.err
    assert (warm.code, warm.out) == (cold.code, cold.out)
    assert told(warm.err) == told(cold.err)
    assert warm.files.keys() == cold.files.keys()
    assert [name for name in warm.files if warm.files[name] != cold.files[name]] == []


def told(err: str) -> list[str]:
    """The lines of stderr that do not depend on how long something takes or what is loaded already."""
    lines = [re.sub(r", [0-9.]+ s$", "", line) for line in err.splitlines()]
    timing = ("generating with the warm", "loading ", "step ", "Traceback", "  ", "sdcli.", "During", "The above")
    return [line for line in lines if line and not line.startswith(timing)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["fox", "cat", "-n", "2", "--outdir", "there"],
        ["fox", "--format", "jpeg", "--json"],
        ["--prompts-file", "bad.jsonl", "--json"],
        *(
            pytest.param(arguments, marks=pytest.mark.slow)
            for arguments in (
                ["fox", "--format", "webp", "--no-metadata", "-o", "{seed}/{prompt}"],
                ["a fox in snow", "--trace", "2", "--heatmap", "fox,snow", "--json"],
                ["fox", "--init-image", "start.png", "--strength", "0.5", "--batch-size", "2", "-n", "3"],
                ["--prompts-file", "prompts.txt", "-n", "2"],
                ["fox", "--sweep", "steps=2,3", "-o", "swept-{steps}.png"],
                ["fox " * 100],
                ["fox", "--strict-prompt", "cat " * 100],
            )
        ),
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_files_output_and_exit_code_are_those_of_a_cold_run(arguments: list[str], warm: Path, tmp_path: Path) -> None:
    both(tmp_path, *arguments)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["fox", "-m", "no-such-model"], 3),
        (["fox", "-m", "sd15"], 4),
        (["fox", "-m", "tiny", "--steps", "0"], 2),
        (["fox", "-m", "tiny", "-o", "there.png", "--outdir", "."], 8),
        (["fox", "-m", "tiny", "--keep-warm", "soon"], 2),
        (["fox", "-m", "tiny", "--keep-warm", "9s", "--dry-run"], 2),
        (["fox", "-m", "tiny", "--keep-warm", "9s", "--no-server"], 2),
        (["--from", "there.png", "--verify", "--keep-warm", "9s"], 2),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else " ".join(value),
)
def test_what_is_refused_is_refused_before_a_worker_is_asked(
    arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime_folder() as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        (tmp_path / "there.png").touch()
        done = generate(tmp_path, *arguments, "--device", "cpu")
        assert (done.code, done.out) == (code, "")
        assert done.err
        assert "warm worker" not in done.err
        assert list(runtime.iterdir()) == []


@pytest.mark.slow
def test_an_image_from_stdin_reaches_the_worker(warm: Path, tmp_path: Path) -> None:
    image = tmp_path / "in.png"
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save(image)
    done = []
    for options in ([], ["--no-server"]):
        folder = tmp_path / f"f{len(options)}"
        folder.mkdir()
        line = command("fox", "--init-image", "-", *TINY, "-v", *options)
        with image.open("rb") as given:
            run = subprocess.run(line, cwd=folder, env=environment(), stdin=given, capture_output=True, check=True)
        assert (b"with the warm worker" in run.stderr) == (not options)
        done.append([path.read_bytes() for path in folder.rglob("*.png")])
    assert done[0] == done[1] != []


def test_a_resumed_run_generates_what_is_missing(warm: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("fox\ncat\nowl\ndog\n")
    arguments = ["--prompts-file", tmp_path / "p.txt", *TINY, "--json"]
    whole = generate(tmp_path / "run", *arguments)
    images = sorted(name for name in whole.files if name.endswith(".png"))
    assert len(images) == 4
    for name in images[1:3]:
        (tmp_path / "run" / name).unlink()
    again = generate(tmp_path / "run", *arguments, "--resume", "-v")
    assert "with the warm worker" in again.err
    assert [json.loads(line)["status"] for line in again.out.splitlines()].count("skipped") == 2
    assert {name: again.files[name] for name in images} == {name: whole.files[name] for name in images}


def test_the_command_imports_no_torch(warm: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom sdcli.cli.app import main\ntry:\n    main()\n"
        "finally:\n    print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    line = [sys.executable, "-c", program, "generate", "fox", *TINY, "--trace", "2"]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "sdcli" in loaded
    assert loaded & {"torch", "numpy", "PIL", "diffusers", "transformers", "fastapi", "uvicorn", "rich"} == set()


@pytest.mark.parametrize("optout", ["option", "variable"])
def test_the_opt_outs_use_no_worker(optout: str, warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if optout == "variable":
        monkeypatch.setenv("SDCLI_NO_SERVER", "1")
    done = generate(tmp_path / "out", "fox", *TINY, "-v", *(["--no-server"] if optout == "option" else []))
    assert done.code == 0
    assert "warm worker" not in done.err


def test_another_setting_of_device_or_dtype_is_another_worker(warm: Path, tmp_path: Path) -> None:
    done = generate(tmp_path / "out", "fox", *TINY, "-v", "--dtype", "float32")
    assert done.code == 0
    assert "warm worker" not in done.err


def test_another_environment_falls_back_with_one_line(
    warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    done = generate(tmp_path / "out", "fox", *TINY)
    assert done.code == 0
    assert done.err.count(f"{LINE}it has another OMP_NUM_THREADS\n") == 1


def test_a_full_disk_ends_the_command_as_without_a_worker(warm: Path, tmp_path: Path, disk: Disk) -> None:
    disk.resize(8192)
    done = [
        generate(tmp_path / f"f{len(options)}", "fox", *TINY, "-o", disk.path / "a.png", *options)
        for options in ([], ["--no-server"])
    ]
    assert done[0].code == done[1].code == 8
    assert told(done[0].err) == told(done[1].err)


def test_ctrl_c_stops_after_the_image_and_twice_at_once_and_the_worker_stays(warm: Path, tmp_path: Path) -> None:
    line = command("fox", *TINY, "-n", "500", "--batch-size", "1")
    for signals in (1, 2):
        folder = tmp_path / str(signals)
        folder.mkdir()
        process = subprocess.Popen(
            line, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline().endswith("fox.png\n")
        process.send_signal(signal.SIGINT)
        if signals == 2:
            assert process.stderr is not None
            while "press Ctrl-C again" not in process.stderr.readline():
                pass
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "interrupted" in err
        printed = len(out.splitlines()) + 1
        assert printed <= len(list(folder.rglob("*.png"))) < printed + signals < 500
    (pid,) = workers(warm)
    after = generate(tmp_path / "after", "fox", *TINY, "-v")
    assert f"with the warm worker, process {pid}" in after.err


def test_a_server_lends_its_worker_to_the_command_line(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = dict(
        one.split("=", 1) for one in Path(f"/proc/{server.process.pid}/environ").read_text().split("\0") if "=" in one
    )
    for name in os.environ.keys() | own.keys():
        if name in own:
            monkeypatch.setenv(name, own[name])
        else:
            monkeypatch.delenv(name)
    cold, warm = (generate(tmp_path / f"f{len(more)}", "fox", *TINY, "-v", *more) for more in (["--no-server"], []))
    assert "with the warm worker" in warm.err, warm.err
    assert warm.code == 0
    assert warm.files == cold.files
    assert server.generate(prompt="a cat")  # and takes it back


@pytest.mark.slow
def test_a_worker_that_is_killed_in_the_middle_loses_nothing(warm: Path, tmp_path: Path) -> None:
    with runtime_folder() as runtime, warm_worker(runtime, {"XDG_RUNTIME_DIR": str(runtime)}) as pid:
        folder = tmp_path / "out"
        folder.mkdir()
        line = command("fox", *TINY, "-n", "40", "--batch-size", "1", "--steps", "20")
        process = subprocess.Popen(
            line,
            cwd=folder,
            env=environment(XDG_RUNTIME_DIR=str(runtime)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert err.count(f"{LINE}it has died\n") == 1
        assert len((first + out).splitlines()) == 40
        assert len(list(folder.rglob("*.png"))) == 40
        cold = generate(tmp_path / "cold", *line[4:], "--no-server")
        assert {path.name: path.read_bytes() for path in folder.rglob("*.png")} == {
            Path(name).name: data for name, data in cold.files.items()
        }


@pytest.mark.slow
def test_keep_warm_starts_one_worker_which_ends_by_itself(tmp_path: Path) -> None:
    with runtime_folder() as runtime:
        line = command("fox", *TINY, "--keep-warm", "3s", "-v")
        settings = {"env": environment(XDG_RUNTIME_DIR=str(runtime)), "stderr": subprocess.PIPE, "text": True}
        folders = [tmp_path / name for name in "ab"]
        for folder in folders:
            folder.mkdir()
        two = [subprocess.Popen(line, cwd=folder, **settings) for folder in folders]  # type: ignore[call-overload]
        told = [process.communicate(timeout=120)[1] for process in two]
        assert [process.returncode for process in two] == [0, 0], told
        (pid,) = workers(runtime)
        assert f"with the warm worker, process {pid}" in told[0] + told[1]
        images = [path.read_bytes() for folder in folders for path in folder.rglob("*.png")]
        assert len(images) == 2
        assert images[0] == images[1]
        wait_until(lambda: not workers(runtime))
        assert {path.suffix for path in (runtime / "sdcli").iterdir()} == {".lock", ".log"}


@pytest.mark.slow
def test_keep_warm_replaces_a_worker_that_does_not_fit_any_more(tmp_path: Path) -> None:
    with runtime_folder() as runtime, warm_worker(runtime, {"XDG_RUNTIME_DIR": str(runtime)}) as before:
        variables = environment(XDG_RUNTIME_DIR=str(runtime), OMP_NUM_THREADS="2")
        line = command("fox", *TINY, "--keep-warm", "600", "-v")
        done = subprocess.run(line, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
        (pid,) = workers(runtime)
        assert pid != before
        assert f"with the warm worker, process {pid}" in done.stderr
