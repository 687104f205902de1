"""Converting pickles: what is good comes out the same, and nothing bad happens to the one who asks."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdcli.errors import BadWeights, CannotWrite, NotFound, UsageError
from sdcli.io.files import PACKAGE
from sdcli.models.convert import _Refused, _tensors, _unwrapped, convert


class Canary:
    """A pickle of this writes a file when it is opened carelessly."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.file}",)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(8, 16, generator=generator)
    return {
        "model.weight": matrix,
        "model.half": matrix.half(),
        "model.brain": matrix.bfloat16(),
        "model.turned": matrix.T,
        "model.row": matrix[3],
        "model.tied": matrix,
        "model.steps": torch.tensor(7),
    }


def lightning(state: Any) -> dict[str, Any]:
    """A checkpoint as PyTorch Lightning writes it: the weights and the trainer's own state."""
    return {"epoch": 3, "global_step": 100, "state_dict": state, "optimizer_states": [{"lr": 1e-4}], "callbacks": {}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    ["plain", "legacy", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("lightning", "nested"))],
)
def test_the_tensors_come_out_the_same_and_nothing_else(tmp_path: Path, layout: str) -> None:
    state = tensors()
    content = {"plain": {**state, "epoch": 3}, "nested": {"model": {"state_dict": state}}}.get(layout, lightning(state))
    torch.save(content, tmp_path / "in.ckpt", _use_new_zipfile_serialization=layout != "legacy")
    done = convert(tmp_path / "in.ckpt", tmp_path / "out.safetensors", overwrite=False)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in state.items())
    assert done.tensors == len(state)
    assert done.left_out == (("epoch",) if layout == "plain" else ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.ckpt", "out.safetensors"]


@pytest.mark.slow
def test_the_trainer_s_objects_in_old_checkpoints_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    checkpoint = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = checkpoint  # type: ignore[attr-defined]
    for package in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, name, module)
    trainer = checkpoint()
    trainer.best = 3
    torch.save({**lightning(tensors()), "callbacks": {checkpoint: {"best": trainer}}}, tmp_path / "in.ckpt")
    assert convert(tmp_path / "in.ckpt", tmp_path / "out.safetensors", overwrite=False).tensors == len(tensors())


def self_referential() -> Any:
    state: dict[str, Any] = {}
    state["state_dict"] = state
    return state


def nested(levels: int) -> Any:
    state: dict[str, Any] = {"weight": torch.zeros(1)}
    for _ in range(levels):
        state = {"state_dict": state}
    return state


def zipped(content: Any) -> Callable[[Path], None]:
    return lambda file: torch.save(content, file)


def raw(data: bytes) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_bytes(data)

    return write


def truncated(file: Path) -> None:
    torch.save({"weight": torch.zeros(100_000)}, file)
    os.truncate(file, 200_000)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bomb of one number seen as a million million": (
        zipped({"weight": torch.zeros(1).expand(10**12)}),
        r"needs more than the 1\.0 GB of memory",
    ),
    "a dictionary that holds itself": (zipped(self_referential()), "refers to itself"),
    "no pickle at all": (raw(b"hello " * 100), "is not a checkpoint that torch can read"),
    "a truncated file": (truncated, "is not a checkpoint that torch can read"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_converted_is_told_in_a_sentence(tmp_path: Path, case: str) -> None:
    write, sentence = HOSTILE[case]
    write(tmp_path / "in.ckpt")
    with pytest.raises(BadWeights, match=sentence):
        convert(tmp_path / "in.ckpt", tmp_path / "out.safetensors", overwrite=False, memory_gb=1, timeout_s=60)
    assert [path.name for path in tmp_path.iterdir()] == ["in.ckpt"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (nested(20), "nested more than 8 levels"),
        ({"epoch": 3}, "holds no tensors"),
        ({"state_dict": {3: torch.zeros(1)}}, "holds no tensors"),
        ([torch.zeros(1)], "holds a list"),
    ],
)
def test_what_holds_no_weights_is_told(content: Any, sentence: str) -> None:
    with pytest.raises(_Refused, match=sentence):
        _tensors(_unwrapped(content), torch)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["zip", pytest.param("pickle", marks=pytest.mark.slow)])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, format: str) -> None:
    canary = tmp_path / "canary"
    content = {"bad": Canary(canary), "epoch": 3}
    if format == "zip":
        torch.save(content, tmp_path / "in.ckpt")
    else:
        (tmp_path / "in.ckpt").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(BadWeights, match=r"wants to run (posix\.system|nt\.system)"):
        convert(tmp_path / "in.ckpt", tmp_path / "out.safetensors", overwrite=False)
    assert not canary.exists()
    torch.load(tmp_path / "in.ckpt", weights_only=False) if format == "zip" else pickle.loads(
        (tmp_path / "in.ckpt").read_bytes()
    )
    assert canary.exists(), "the trap works"


@pytest.mark.slow
def test_a_checkpoint_that_takes_for_ever_is_given_up(tmp_path: Path) -> None:
    # Magic number, protocol and system information of the old format, then None, put aside forty million times.
    head = b"".join(pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    (tmp_path / "in.ckpt").write_bytes(head + b"\x80\x02N" + b"q\x00" * 40_000_000 + b".")
    started = time.monotonic()
    with pytest.raises(BadWeights, match=r"not read within 4 s"):
        convert(tmp_path / "in.ckpt", tmp_path / "out.safetensors", overwrite=False, timeout_s=4)
    assert time.monotonic() - started < 10
    assert [path.name for path in tmp_path.iterdir()] == ["in.ckpt"]


def test_what_makes_no_sense_is_refused_before_a_process_is_started(tmp_path: Path) -> None:
    source, target = tmp_path / "in.ckpt", tmp_path / "out.safetensors"
    with pytest.raises(NotFound):
        convert(source, target, overwrite=False)
    os.mkfifo(source)
    with pytest.raises(UsageError, match="not a regular file"):
        convert(source, target, overwrite=False)
    source.unlink()
    source.write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(UsageError, match="safetensors file already"):
        convert(source, target, overwrite=False)
    source.write_bytes(b"x")
    with pytest.raises(UsageError, match=r"should end in \.safetensors"):
        convert(source, tmp_path / "out.ckpt", overwrite=False)
    target.write_bytes(b"mine")
    with pytest.raises(CannotWrite, match="--overwrite"):
        convert(source, target, overwrite=False)
    assert target.read_bytes() == b"mine"


def test_the_process_has_no_secrets_no_network_and_no_other_programs(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import os, socket\n"
        "from sdcli.models import convert\n"
        "convert._leave_the_network()\n"
        "convert._limit(cpu_s=10, memory=10**9)\n"
        "for harm in (lambda: os.system('true'), lambda: socket.create_connection(('127.0.0.1', 1)), os.fork):\n"
        "    try:\n"
        "        harm()\n"
        "    except PermissionError as error:\n"
        "        print(error)\n"
        "try:\n"
        "    bytearray(3 * 10**9)\n"
        "except MemoryError:\n"
        "    print('no memory')\n"
    )
    found = subprocess.run(
        [sys.executable, str(probe)],
        env={"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.count("not allowed while a checkpoint is opened") == 3
    assert "no memory" in found.stdout


@pytest.mark.slow
def test_the_command_prints_the_file_it_wrote(tmp_path: Path) -> None:
    torch.save({**lightning(tensors())["state_dict"], "epoch": 3}, tmp_path / "in.ckpt")
    command = [sys.executable, "-m", "sdcli", "models", "convert", "in.ckpt", "out.safetensors"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out.safetensors\n"
    assert "skipped entries other than weights: epoch" in done.stderr
    again = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)}, capture_output=True, text=True
    )
    assert again.returncode == 8
