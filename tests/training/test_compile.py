"""torch.compile is used only where its gradients are right; the compiler here is a stand-in, but in the last test."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdcli.errors import Interrupted
from sdcli.training.optim.compile import compile_if_correct, difference
from sdcli.training.task import Batch, Losses, Networks, OptimizerPhase

Compiler = Callable[[nn.Module], nn.Module]


class Micro(nn.Module):
    """Two layers with dropout, which must draw the same numbers in both computations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.first(x))))  # type: ignore[no-any-return]


class Compiled(nn.Module):
    """What a compiler returns: the same function, with the plain network's own parameters."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self._plain = plain

    def forward(self, *arguments: Any) -> Any:
        return self._plain(*arguments)


def phase_of(networks: dict[str, nn.Module]) -> OptimizerPhase:
    def loss(networks: Networks, batch: Batch) -> Losses:
        return Losses((networks["unet"](batch["x"]) - batch["y"]).square().mean())

    groups = [
        {"name": name, "params": dict(network.named_parameters()), "lr": 0.1} for name, network in networks.items()
    ]
    return OptimizerPhase("unet", groups, loss)


def tried(monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> tuple[Networks, Networks, str | None]:
    """The plain networks, those that were chosen, and the note."""
    monkeypatch.setattr(torch, "compile", compiler)
    networks: dict[str, nn.Module] = {"unet": Micro()}
    before = {name: tensor.clone() for name, tensor in networks["unet"].state_dict().items()}
    torch.manual_seed(1)
    batch = {"x": torch.randn(6, 4), "y": torch.randn(6, 1)}
    chosen, note = compile_if_correct(networks, phase_of(networks), batch)
    assert all(torch.equal(before[name], tensor) for name, tensor in networks["unet"].state_dict().items())
    assert all(parameter.grad is None for parameter in networks["unet"].parameters()), "a trial leaves no gradients"
    return networks, chosen, note


def losing(names: set[str], factor: float = 0.0) -> Compiler:
    """A compiler whose forward is right and whose backward scales some gradients, as torch 2.13's zeroed them."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, tensor: Tensor) -> Tensor:
            return tensor.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            return gradient * factor

    def compile(plain: nn.Module) -> nn.Module:
        class Wrong(Compiled):
            def forward(self, *arguments: Any) -> Any:
                tensors = {name: Scaled.apply(p) if name in names else p for name, p in self._plain.named_parameters()}
                return torch.func.functional_call(self._plain, tensors, arguments)

        return Wrong(plain)

    return compile


def test_a_right_compiler_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, chosen, note = tried(monkeypatch, Compiled)
    assert note is None
    assert isinstance(chosen["unet"], Compiled)
    assert next(chosen["unet"].parameters()) is next(plain["unet"].parameters()), "training changes the plain network"


@pytest.mark.parametrize("names", [{"first.weight"}, {"last.bias"}, {"first.weight", "first.bias", "last.weight"}])
def test_zero_gradients_under_a_right_loss_are_noticed(monkeypatch: pytest.MonkeyPatch, names: set[str]) -> None:
    plain, chosen, note = tried(monkeypatch, losing(names))
    assert chosen is plain
    assert note is not None
    assert note.startswith(f"--compile is off: the compiled gradients of {len(names)} of 5 parameters differ")
    assert f"first unet.{min(names, key=list(dict(plain['unet'].named_parameters())).index)} (by 100%)" in note


@pytest.mark.parametrize(("factor", "right"), [(1.01, True), (0.98, True), (1.1, False), (-1.0, False)])
def test_rounding_is_forgiven_and_more_is_not(monkeypatch: pytest.MonkeyPatch, factor: float, right: bool) -> None:
    """Half precision differs by about 1%."""
    plain, chosen, note = tried(monkeypatch, losing({"first.weight"}, factor))
    assert (note is None) == right
    assert (chosen is plain) != right


def test_gradients_that_are_not_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, chosen, note = tried(monkeypatch, losing({"first.weight"}, float("nan")))
    assert chosen is plain
    assert note is not None
    assert "unet.first.weight" in note


def test_a_compiler_that_fails_leaves_the_plain_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    def lazily(plain: nn.Module) -> nn.Module:
        class Failing(Compiled):
            def forward(self, *arguments: Any) -> Any:
                raise RuntimeError("C++ compiler not found\nand many more lines")

        return Failing(plain)

    def at_once(plain: nn.Module) -> nn.Module:
        raise RuntimeError("Dynamo is not supported on Python 3.99")

    def silently(plain: nn.Module) -> nn.Module:
        class Silent(Compiled):
            def forward(self, *arguments: Any) -> Any:
                raise AssertionError

        return Silent(plain)

    for compiler, reason in (
        (lazily, "(RuntimeError: C++ compiler not found)"),
        (at_once, "(RuntimeError: Dynamo is not supported on Python 3.99)"),
        (silently, "(AssertionError"),
    ):
        plain, chosen, note = tried(monkeypatch, compiler)
        assert chosen is plain
        assert note is not None
        assert note.startswith("--compile is off: compiling failed")
        assert reason in note
        assert "\n" not in note


def test_an_interrupt_while_compiling_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(plain: nn.Module) -> nn.Module:
        raise Interrupted("interrupted")

    with pytest.raises(Interrupted):
        tried(monkeypatch, interrupted)


def test_a_gradient_that_is_zero_by_nature_may_be_rounding() -> None:
    zero, noise = torch.zeros(4), torch.full((4,), 1e-9)
    assert difference(zero, noise, floor=1e-3) < 1e-5
    assert difference(torch.ones(4), torch.ones(4), floor=1e-3) == 0
    assert difference(torch.ones(4), torch.zeros(4), floor=1e-3) == 1
    assert difference(zero, zero, floor=0.0) == 0


@pytest.mark.slow
def test_a_run_whose_compiler_is_wrong_trains_plainly_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdcli.training.events import RunNote
    from tests.training_runs import captioned_images, same_checkpoint, train_unet

    data = captioned_images(tmp_path / "pictures")
    train_unet(data, tmp_path / "plain", max_train_steps=2)

    def refuses(plain: nn.Module) -> nn.Module:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", refuses)
    events = train_unet(data, tmp_path / "compiled", max_train_steps=2, compile=True)
    assert any("--compile is off" in event.text for event in events if isinstance(event, RunNote))
    assert same_checkpoint(tmp_path / "plain" / "checkpoint-2", tmp_path / "compiled" / "checkpoint-2")


@pytest.mark.slow
def test_the_real_compiler_is_right_on_a_micro_network_or_found_out() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler here")
    networks: dict[str, nn.Module] = {"unet": Micro().eval()}  # in training, dropout draws others when compiled
    torch.manual_seed(1)
    batch = {"x": torch.randn(6, 4), "y": torch.randn(6, 1)}
    chosen, note = compile_if_correct(networks, phase_of(networks), batch)
    assert note is None, note
    assert torch.allclose(chosen["unet"](batch["x"]), networks["unet"](batch["x"]), atol=1e-6)
