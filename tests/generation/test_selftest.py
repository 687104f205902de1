"""`sdcli selftest`: says that all is well, and does not say so when it is not."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from sdcli.errors import Interrupted
from sdcli.generation import run_batch
from sdcli.generation import selftest as selftest_module
from sdcli.generation.selftest import Check, checks, machine
from sdcli.generation.settings import RunSettings
from sdcli.vae import autoencoder
from tests.conftest import Run

NAMES = ["generate", "repetition", "metadata", "verify", "encode", "decode"]


def failures() -> dict[str, str]:
    return {check.name: check.error for check in checks(RunSettings(device="cpu")) if check.error is not None}


def test_a_sound_installation_passes_in_seconds_and_leaves_nothing(sdcli: Run, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    started = time.monotonic()
    result = sdcli("selftest", env={"TMPDIR": str(tmp_path / "tmp")})
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[: len(NAMES)] == [f"ok {name}" for name in NAMES]
    assert lines[len(NAMES)].startswith("device cpu: ")
    assert "torch 2." in lines[-1]
    assert result.stderr == ""
    assert time.monotonic() - started < 30
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_a_broken_user_registry_does_not_stop_it(sdcli: Run, tmp_path: Path) -> None:
    folder = tmp_path / "config" / "sdcli"
    folder.mkdir(parents=True)
    (folder / "models.yaml").write_text("models: [")
    result = sdcli("selftest", "--json", env={"XDG_CONFIG_HOME": str(tmp_path / "config")})
    assert result.returncode == 0, result.stderr
    *found, last = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["check"], line["status"]) for line in found] == [(name, "ok") for name in NAMES]
    assert set(last["machine"]) == {
        "devices", "auto_dtype", "cpu_bfloat16", "cores", "threads", "memory", "versions",
    }  # fmt: skip


@pytest.mark.slow
def test_an_image_that_comes_out_otherwise_each_time_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = iter(range(100))
    monkeypatch.setattr(
        run_batch,
        "sample",
        lambda pipeline, requests, **how: sample(
            pipeline, [r.model_copy(update={"seed": next(seeds)}) for r in requests], **how
        ),
    )
    from sdcli.diffusion.sampling import sample

    assert {"repetition", "verify"} <= set(failures())


@pytest.mark.slow
def test_a_vae_that_fails_is_told_with_its_reason_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel for this machine")

    monkeypatch.setattr(autoencoder, "moments", broken)
    found = failures()
    assert found["encode"] == "no kernel for this machine"
    assert set(found) == {"encode", "decode"}


def test_a_failure_ends_with_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from sdcli.cli.app import app

    monkeypatch.setattr(
        selftest_module, "checks", lambda _: iter([Check("generate", 0.1), Check("encode", 0.1, "it is broken")])
    )
    result = CliRunner().invoke(app, ["selftest"])
    assert result.stdout.splitlines()[:2] == ["ok generate", "FAILED encode: it is broken"]
    assert getattr(result.exception, "exit_code", None) == 1


def test_a_signal_is_no_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Interrupted("interrupted")

    monkeypatch.setattr(run_batch, "sample", stopped)
    with pytest.raises(Interrupted):
        list(checks(RunSettings(device="cpu")))


def test_the_machine_is_described_in_json() -> None:
    facts = machine()
    assert json.loads(json.dumps(facts)) == facts
    assert "cpu" in facts["devices"]
    assert facts["memory"]["cpu"]["free"] <= facts["memory"]["cpu"]["total"]
    assert set(facts["versions"]) == {"sdcli", "python", "torch", "diffusers", "safetensors", "pillow"}
