"""The comparison with other programs: its turns, what it keeps of a run that was ended, and its figures."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
from diffusers import EulerDiscreteScheduler
from PIL import Image

from tests.conftest import REPOSITORY

STEPS = {"sdcli": [2.0, 2.2, 2.4], "diffusers": [4.4, 4.4, 4.4], "openvino": [1.1, 1.1, 1.1]}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    before = set(sys.modules)
    yield importlib.import_module("bench_peers")
    for name in set(sys.modules) - before:
        if name.startswith(("bench_peers", "peer_programs")):
            del sys.modules[name]


class Processes:
    """In place of the processes: which program was started, and how much slower the machine is each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bench: ModuleType, *, dies_before: int | None = None) -> None:
        self.started: list[str] = []
        self.dies_before = dies_before
        self.broken: set[str] = set()
        self.busy = 0.0
        monkeypatch.setattr(bench, "run_worker", self.run)
        monkeypatch.setattr(bench, "cpu_of_others", lambda: self.busy)

    def run(self, name: str) -> dict[str, Any]:
        if len(self.started) == self.dies_before:
            raise KeyboardInterrupt
        self.started.append(name)
        if name == "floor":
            return {"gflops": 100.0, "step_tflop": 0.1, "decode_tflop": 0.2}
        if name in self.broken:
            return {"failed": "MemoryError: the model is too large"}
        slower = 1 + self.started.count("sdcli")
        return {"load_s": 1.0, "version": "1", "peak_gb": 2.0, "step": [slower * s for s in STEPS[name]]}


def call(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, work: Path, *arguments: str) -> list[dict[str, Any]]:
    """What the file of figures holds after the script was called."""
    file = work / "figures.json"
    programs = ["--programs", *STEPS, "--parts", "step", "--rounds", "2", "--size", "64"]
    command = ["bench_peers.py", "--work", str(work), "--json", str(file), *programs, *arguments]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    return list(json.loads(file.read_text())) if file.exists() else []


def test_programs_take_turns_and_ratios_are_those_of_a_round(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = Processes(monkeypatch, bench)
    [result] = call(bench, monkeypatch, tmp_path)
    assert processes.started == ["floor", *STEPS, *STEPS]
    assert result["programs"]["diffusers"]["step"]["ratio"] == pytest.approx(2)
    assert result["programs"]["openvino"]["step"]["ratio"] == pytest.approx(0.5)
    assert result["programs"]["sdcli"]["step"] == {
        "s": pytest.approx(5.4),
        "least_s": pytest.approx(4),
        "most_s": pytest.approx(7.2),
    }
    shown = capsys.readouterr().out
    assert "2.00 of sdcli's" in shown
    assert "0.50 of sdcli's" in shown
    assert "19% of the floor" in shown, "1 s of 5.4"


def test_a_run_that_was_ended_goes_on_where_it_was(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = Processes(monkeypatch, bench, dies_before=3)
    with pytest.raises(KeyboardInterrupt):
        call(bench, monkeypatch, tmp_path)
    assert first.started == ["floor", "sdcli", "diffusers"]
    second = Processes(monkeypatch, bench)
    [result] = call(bench, monkeypatch, tmp_path)
    assert second.started == ["floor", "openvino", *STEPS]
    assert result["programs"]["diffusers"]["step"]["ratio"] == pytest.approx(2)
    third = Processes(monkeypatch, bench)
    assert len(call(bench, monkeypatch, tmp_path)) == 2, "a complete comparison is not continued"
    assert third.started == ["floor", *STEPS, *STEPS]


def test_a_process_that_other_work_overlapped_is_run_again(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    processes = Processes(monkeypatch, bench)
    run = processes.run

    def beside_others(name: str) -> dict[str, Any]:
        processes.busy += 5 if processes.started.count("diffusers") == 1 and name == "openvino" else 0
        return run(name)

    monkeypatch.setattr(bench, "run_worker", beside_others)
    assert call(bench, monkeypatch, tmp_path) == []
    monkeypatch.setattr(bench, "run_worker", run)
    processes.started.clear()
    [result] = call(bench, monkeypatch, tmp_path)
    assert processes.started == ["floor", "openvino"]
    assert result["programs"]["openvino"]["step"]["s"] == pytest.approx(2.2), "1.1 in this call, 3.3 in the first"
    assert result["programs"]["openvino"]["step"]["ratio"] == pytest.approx((0.25 + 0.5) / 2), "1.1 of 4.4, 3.3 of 6.6"


def test_a_rate_that_other_work_overlapped_is_left_out(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = Processes(monkeypatch, bench)
    run = processes.run

    def beside_others(name: str) -> dict[str, Any]:
        processes.busy += 5 if name == "floor" else 0
        return run(name)

    monkeypatch.setattr(bench, "run_worker", beside_others)
    [result] = call(bench, monkeypatch, tmp_path)
    assert result["floor"] == {"gflops": None, "step_tflop": 0.1, "decode_tflop": 0.2}
    assert "of the floor" not in capsys.readouterr().out


def test_the_cpu_of_others_leaves_out_what_was_started_here(bench: ModuleType) -> None:
    begun, before = bench.time.perf_counter(), bench.cpu_of_others()
    subprocess.run([sys.executable, "-c", "for _ in range(3_000_000): pass"], check=True)
    cores = bench.os.cpu_count()
    took = bench.time.perf_counter() - begun
    assert -0.2 <= bench.cpu_of_others() - before <= cores * took + 0.2


def test_figures_of_different_settings_are_not_mixed(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Processes(monkeypatch, bench, dies_before=3)
    with pytest.raises(KeyboardInterrupt):
        call(bench, monkeypatch, tmp_path)
    Processes(monkeypatch, bench)
    with pytest.raises(SystemExit, match=r"repeats 3: .*--restart"):
        call(bench, monkeypatch, tmp_path, "--repeats", "9")
    assert len(call(bench, monkeypatch, tmp_path, "--repeats", "9", "--restart")) == 1


def test_no_process_starts_that_may_end_too_late(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = [0.0]
    processes = Processes(monkeypatch, bench)
    run = processes.run

    def slowly(name: str) -> dict[str, Any]:
        clock[0] += 10
        return run(name)

    monkeypatch.setattr(bench, "run_worker", slowly)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    for expected in (
        ["floor", "sdcli", "diffusers"],
        ["floor", "openvino", "sdcli"],
        ["floor", "diffusers", "openvino"],
    ):
        processes.started.clear()
        result = call(bench, monkeypatch, tmp_path, "--seconds", "35")
        assert processes.started == expected
    assert len(result) == 1


def test_a_program_that_fails_says_why_and_the_others_go_on(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Processes(monkeypatch, bench).broken.add("diffusers")
    [result] = call(bench, monkeypatch, tmp_path)
    assert result["programs"]["diffusers"] == {"failed": "MemoryError: the model is too large"}
    assert result["programs"]["openvino"]["step"]["ratio"] == pytest.approx(0.5)
    assert "MemoryError: the model is too large" in capsys.readouterr().out


def test_a_process_that_fails_gives_the_last_line_it_said(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", "--work", str(tmp_path), "--size", "64"])
    figures = bench.run_worker("openvino")
    assert set(figures) == {"failed"}
    assert "openvino" in figures["failed"]


def test_outputs_are_compared_with_those_of_sdcli(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Processes(monkeypatch, bench)
    numpy.save(tmp_path / "sdcli-step-64.npy", numpy.zeros((1, 4, 8, 8)))
    numpy.save(tmp_path / "diffusers-step-64.npy", numpy.full((1, 4, 8, 8), 0.5))
    [result] = call(bench, monkeypatch, tmp_path)
    assert result["programs"]["diffusers"]["step"]["largest_difference"] == 0.5
    assert "largest_difference" not in result["programs"]["openvino"]["step"]
    numpy.save(tmp_path / "diffusers-step-64.npy", numpy.zeros((1, 4, 4, 4)))
    with pytest.raises(SystemExit, match="shape"):
        call(bench, monkeypatch, tmp_path)


def test_the_sigmas_are_those_of_diffusers(bench: ModuleType) -> None:
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noisiest_first = scheduler.sigmas[:-1]
    schedule = bench.sd_cpp.schedule(4)
    assert [t for t, _ in schedule] == [999, 749, 499, 250]
    for t, sigma in schedule:
        assert sigma == pytest.approx(float(noisiest_first[999 - t]), rel=1e-4)


def test_steps_of_stable_diffusion_cpp_are_timed_between_its_reports(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock, callbacks = [0.0], []

    class StableDiffusion:
        def __init__(self, **settings: Any) -> None:
            assert (settings["wtype"], settings["n_threads"]) == ("q8_0", 2)
            clock[0] += 5

        def generate_image(self, *, progress_callback: Any, sample_steps: int, **_: Any) -> list[Image.Image]:
            progress_callback(7, 1000, 0.0)  # reading weights is reported as well
            for step in range(sample_steps + 1):
                clock[0] += 100 if step == 1 else step
                progress_callback(step, sample_steps, 0.0)
            callbacks[0](1, b"latent 1 decoded, taking 3.25s\n", None)
            return [Image.new("RGB", (64, 64), (255, 0, 0))]

    package = types.SimpleNamespace(
        StableDiffusion=StableDiffusion,
        sd_log_callback=lambda function: function,
        sd_set_log_callback=lambda function, _data: callbacks.append(function),
    )
    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", package)  # type: ignore[arg-type]
    monkeypatch.setattr(bench.sd_cpp.importlib.metadata, "version", lambda _name: "9")
    monkeypatch.setattr(bench.sd_cpp.time, "perf_counter", lambda: clock[0])
    arguments = argparse.Namespace(
        work=tmp_path, worker="sd.cpp-q8_0", size=64, repeats=2, threads=2, sd_cpp_flash=False, sd_cpp_direct=False
    )
    figures = bench.sd_cpp.run_sd_cpp(arguments)
    assert figures["step"] == [2, 3], "the first, with what it sets up, is not measured"
    assert figures["decode"] == [3.25]
    assert figures["load_s"] == 5
    kept = numpy.load(bench.sd_cpp.image_file(arguments, "sd.cpp-q8_0"))
    assert kept.shape == (64, 64, 3)
    assert kept.max() == 1


def test_a_log_without_a_decode_is_refused(bench: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no time of a decode"):
        bench.sd_cpp.decode_seconds("sampling completed, taking 3.00s\n")


def test_help_names_what_is_to_be_installed() -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / "bench_peers.py"), "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "stable-diffusion-cpp-python" in shown
