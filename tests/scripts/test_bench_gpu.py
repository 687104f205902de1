"""The benchmark for GPUs, in miniature on the CPU: its parts, its budget, and what it keeps of a part that fails."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"

WORKER = """
import json, sys, time

def emit(**row): print(json.dumps({"rows": [row]}), flush=True)

part = sys.argv[1]
print("a line of a library")
emit(name="first", step_s=1.0)
emit(name="first", step_s=0.5, ratio=1.0)
if part == "vae":
    sys.exit("the decoder is broken")
if part == "train":
    time.sleep(600)
emit(name="second", skipped="it needs a CUDA device")
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, with parts that measure nothing."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("bench_gpu")
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(module, "WORKER", worker)
    yield module
    del sys.modules["bench_gpu"]


def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, file: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    command = ["bench_gpu.py", "--miniature", "--device", "cpu", "--json", str(file), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    code = bench.main()
    return code, json.loads(file.read_text())


def test_a_part_that_fails_is_recorded_and_the_others_go_on(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, result = run(bench, monkeypatch, tmp_path / "gpu.json", "--parts", "vae", "sdxl")
    assert code == 1
    assert list(result["parts"]) == ["vae", "sdxl"]
    assert result["parts"]["vae"]["error"] == "the decoder is broken"
    assert result["parts"]["vae"]["rows"] == [{"name": "first", "step_s": 0.5, "ratio": 1.0}]
    assert "error" not in result["parts"]["sdxl"]
    page = (tmp_path / "gpu.md").read_text()
    assert "Not measured to its end: the decoder is broken." in page
    assert "| first | 0.5000 s | 1 |" in page
    assert "- second: not measured: it needs a CUDA device" in page
    assert "the figures mean nothing" in page


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_and_keeps_its_rows(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, result = run(bench, monkeypatch, tmp_path / "gpu.json", "--parts", "train", "--budget", "13")
    assert code == 1
    assert "not finished within" in result["parts"]["train"]["error"]
    assert [row["name"] for row in result["parts"]["train"]["rows"]] == ["first"]


def test_a_part_that_does_not_fit_into_the_budget_is_skipped(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "PARTS", {"vae": ("The VAE", 10**6), "sdxl": ("SDXL", 1)})
    monkeypatch.setattr(bench, "facts", lambda options: {**FACTS, "miniature": False})
    options = bench.argparse.Namespace(
        parts=["vae", "sdxl"], budget=60, miniature=False, device="cpu", starter_work=None, json=tmp_path / "gpu.json"
    )
    monkeypatch.setattr(bench, "parse_arguments", lambda: options)
    assert bench.main() == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert "it takes about 1000000 s" in result["parts"]["vae"]["skipped"]
    assert [row["name"] for row in result["parts"]["sdxl"]["rows"]] == ["first", "second"]
    assert "Not measured: 50 s are left" in (tmp_path / "gpu.md").read_text()


FACTS: dict[str, Any] = {
    "date": "2026-01-01",
    "machine": "a machine",
    "gpu": None,
    "versions": {"torch": "2", "diffusers": "0"},
}


def test_without_a_gpu_it_says_how_to_try_it(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "bench_gpu.py"), "--device", "cpu", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "--miniature" in done.stderr
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.slow
def test_every_part_measures_in_miniature_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPTS / "bench_gpu.py"), "--miniature", "--device", "cpu", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    result = json.loads(file.read_text())
    assert {name: part["error"] for name, part in result["parts"].items() if "error" in part} == {}
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(result["parts"]) == 9
    for name, part in result["parts"].items():
        assert part["rows"], name
        measured = [row for row in part["rows"] if "skipped" not in row]
        assert measured or name == "train-compile", name
        for row in part["rows"]:
            assert row.get("skipped", "it needs a CUDA device") == "it needs a CUDA device", row
        for row in measured:
            figures = {key: value for key, value in row.items() if key.endswith("_s") or key in {"seconds", "rounding"}}
            assert figures, row
            assert all(value > 0 for value in figures.values()), row
    for row in result["parts"]["parity"]["rows"]:
        assert row["own_rounding"] < 2 * row["rounding"], row
