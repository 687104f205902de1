"""`--mixed-precision auto`: what it is on which processor, and that a run keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sdcli.cli.training_command import TrainingCall, TrainingCommand, _resolved
from sdcli.data.cache.networks import load_encoders
from sdcli.errors import UsageError
from sdcli.generation.settings import RunSettings
from sdcli.io import devices
from sdcli.models.registry import load_registry
from sdcli.training.config_files import settings_from
from sdcli.training.precision import check_same_precision, with_precision
from sdcli.training.run_log import read_log
from sdcli.training.settings import TrainSettings
from sdcli.training.text_encoder.settings import TextSettings
from sdcli.training.unet.session import UnetSession
from sdcli.training.unet.settings import UnetSettings
from sdcli.training.vae.settings import VaeSettings
from tests.training_runs import grey_images, same_checkpoint, train_pixels


@pytest.fixture
def greys(tmp_path: Path) -> Path:
    return grey_images(tmp_path / "greys")


def processor(monkeypatch: pytest.MonkeyPatch, *, native: bool, kernels: bool | None = None) -> None:
    """Give this machine a processor with or without instructions for bfloat16."""
    monkeypatch.delenv(devices.LAUNCHED_PRECISION, raising=False)
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: native)
    monkeypatch.setattr(devices, "cpu_has_bfloat16_kernels", lambda: native if kernels is None else kernels)


@pytest.mark.parametrize(
    ("native", "kernels", "expected"),
    [(True, True, "bf16"), (False, False, "no"), (False, True, "no"), (True, False, "no")],
)
def test_auto_is_bf16_on_processors_that_multiply_it_natively(
    monkeypatch: pytest.MonkeyPatch, native: bool, kernels: bool, expected: str
) -> None:
    processor(monkeypatch, native=native, kernels=kernels)
    assert UnetSettings().mixed_precision == "auto"
    assert with_precision(UnetSettings(device="cpu")).mixed_precision == expected


def test_auto_is_no_on_other_devices_whatever_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, native=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert with_precision(UnetSettings()).mixed_precision == "no"


@pytest.mark.parametrize("launched", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("native", [True, False])
def test_under_accelerate_launch_auto_is_what_that_was_told(
    monkeypatch: pytest.MonkeyPatch, launched: str, native: bool
) -> None:
    processor(monkeypatch, native=native)
    monkeypatch.setenv(devices.LAUNCHED_PRECISION, launched)
    assert with_precision(UnetSettings(device="cpu")).mixed_precision == launched


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_cache_is_filled_in_what_auto_reads(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    processor(monkeypatch, native=native)
    vae, text_encoder = load_encoders(load_registry().find("tiny"), RunSettings(device="cpu"), texts=True)
    assert text_encoder is not None
    assert (vae.dtype, text_encoder.dtype) == (expected, expected)


@pytest.mark.parametrize("chosen", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("native", [True, False])
def test_a_precision_that_was_chosen_stays(monkeypatch: pytest.MonkeyPatch, chosen: Any, native: bool) -> None:
    processor(monkeypatch, native=native)
    settings = UnetSettings(device="cpu", mixed_precision=chosen)
    assert with_precision(settings) == settings


@pytest.mark.parametrize("kind", [VaeSettings, TextSettings])
def test_trainers_that_were_not_compared_in_bfloat16_have_no_auto(kind: type[TrainSettings]) -> None:
    assert kind().mixed_precision == "no"
    with pytest.raises(UsageError, match="mixed_precision"):
        settings_from(kind, {"mixed_precision": "auto"})


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "no")])
def test_a_run_records_its_precision_and_equals_one_that_chose_it(
    tmp_path: Path, greys: Path, monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    processor(monkeypatch, native=native)
    train_pixels(greys, tmp_path / "auto")
    recorded = yaml.safe_load((tmp_path / "auto" / "settings.yaml").read_text())
    assert recorded["mixed_precision"] == expected
    assert [entry["mixed_precision"] for entry in read_log(tmp_path / "auto").of("start")] == [expected]
    processor(monkeypatch, native=not native)
    train_pixels(greys, tmp_path / "chosen", mixed_precision=expected)
    assert same_checkpoint(tmp_path / "auto" / "checkpoint-2", tmp_path / "chosen" / "checkpoint-2")


def test_bfloat16_changes_the_weights(tmp_path: Path, greys: Path) -> None:
    for name in ("no", "bf16"):
        train_pixels(greys, tmp_path / name, mixed_precision=name)
    assert not same_checkpoint(tmp_path / "no" / "checkpoint-2", tmp_path / "bf16" / "checkpoint-2")


@pytest.mark.parametrize("typed", [{}, {"mixed_precision": "auto"}])
@pytest.mark.parametrize("native", [True, False])
def test_a_resumed_run_keeps_its_precision_on_another_processor(
    tmp_path: Path, greys: Path, monkeypatch: pytest.MonkeyPatch, native: bool, typed: dict[str, Any]
) -> None:
    processor(monkeypatch, native=native)
    train_pixels(greys, tmp_path / "whole")
    train_pixels(greys, tmp_path / "run", max_train_steps=1)
    processor(monkeypatch, native=not native)
    config = tmp_path / "train.yaml"
    config.write_text("mixed-precision: auto\n")
    command = TrainingCommand("train-unet", UnetSettings, UnetSession, data_metavar="DATA", data_help="")
    call = TrainingCall(
        data=None,
        output=tmp_path / "run",
        config=config if typed else None,
        resume=True,
        dry_run=False,
        prove_resume=False,
        typed={**typed, "max_train_steps": 2},
        registry=load_registry(),
    )
    data, run, settings = _resolved(command, call)
    assert settings.mixed_precision == ("bf16" if native else "no")
    train_pixels(Path(data), run, resume=True, mixed_precision=settings.mixed_precision)
    assert same_checkpoint(tmp_path / "whole" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")


def test_a_precision_that_the_run_did_not_begin_with_is_refused(
    tmp_path: Path, greys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, native=True)
    train_pixels(greys, tmp_path / "run", max_train_steps=1)
    with pytest.raises(UsageError, match=r"--mixed-precision was bf16 .*\(now no\)"):
        train_pixels(greys, tmp_path / "run", resume=True, mixed_precision="no")


class Processes:
    """An accelerator of two processes, the other of which chose `other`."""

    num_processes = 2
    device = "cpu"

    def __init__(self, other: str) -> None:
        self.other = other

    def gather(self, mine: Any) -> Any:
        row = [[int(name == self.other) for name in devices.PRECISIONS]]
        return torch.cat([mine, torch.tensor(row)])


def test_processes_on_different_processors_are_asked_to_choose() -> None:
    check_same_precision(Processes("bf16"), "bf16")  # type: ignore[arg-type]
    for mine, other in (("bf16", "no"), ("no", "bf16")):
        with pytest.raises(UsageError, match="processors differ"):
            check_same_precision(Processes(other), mine)  # type: ignore[arg-type]
