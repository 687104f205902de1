"""State files: what training keeps goes to the disk and comes back bit for bit, and nothing strange is taken."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from sdcli.errors import BadOutput, BadWeights, UsageError
from sdcli.training.state.state_files import (
    load_optimizer,
    optimizer_tensors,
    read_state,
    write_tensors,
)

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.95)),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "AdamW foreach amsgrad": lambda groups: torch.optim.AdamW(groups, foreach=True, amsgrad=True),
    "AdamW with a tensor as learning rate": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.003)),
    "Adam": torch.optim.Adam,
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "SGD with momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.5, centered=True),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "Adafactor": torch.optim.Adafactor,
}


def network(dtype: torch.dtype = torch.float32, *, channels_last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 5), nn.LayerNorm(5)).to(dtype)
    return made.to(memory_format=torch.channels_last) if channels_last else made  # type: ignore[call-overload]


def groups_of(model: nn.Module) -> tuple[list[dict[str, Any]], list[str]]:
    """Two groups, the biases with a rate of their own, and the names in their order."""
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    others = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    groups = [{"params": list(weights.values())}, {"params": list(others.values()), "weight_decay": 0.125}]
    return groups, [*weights, *others]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, first: int, count: int) -> None:
    for step in range(first, first + count):
        images = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(step))
        parameter = next(model.parameters())
        (model(images.to(parameter)) ** 3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def through_files(tensors: dict[str, Tensor], facts: dict[str, Any], folder: Path) -> tuple[dict[str, Tensor], Any]:
    write_tensors(folder / "optimizer.safetensors", tensors)
    return read_state(folder / "optimizer.safetensors")[0], json.loads(json.dumps(facts))


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, dtype and type included."""
    if isinstance(one, Tensor):
        kinds = isinstance(other, Tensor) and (one.dtype, one.shape, one.device) == (
            other.dtype,
            other.shape,
            other.device,
        )
        return kinds and bits(one) == bits(other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# Optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_training_goes_on_bit_for_bit_with_a_saved_optimizer(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer, list[str]]:
        model = network(dtype)
        groups, names = groups_of(model)
        return model, OPTIMIZERS[name](groups), names

    model, optimizer, names = made()
    train(model, optimizer, first=0, count=3)
    optimizer.param_groups[1]["weight_decay"] = 0.3  # what a schedule changes is state, too
    tensors, facts = through_files(*optimizer_tensors(optimizer, names), tmp_path)
    resumed, loaded, _ = made()
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    load_optimizer(loaded, names, tensors, facts)
    assert same(loaded.state_dict(), optimizer.state_dict())
    train(model, optimizer, first=3, count=3)
    train(resumed, loaded, first=3, count=3)
    assert same(dict(resumed.state_dict()), dict(model.state_dict()))
    assert same(loaded.state_dict(), optimizer.state_dict())


def test_tensors_are_called_after_what_they_are_and_their_parameter(tmp_path: Path) -> None:
    model = network()
    groups, names = groups_of(model)
    optimizer = torch.optim.AdamW(groups)
    assert optimizer_tensors(optimizer, names)[0] == {}
    train(model, optimizer, first=0, count=2)
    tensors, facts = optimizer_tensors(optimizer, names)
    assert set(tensors) == {f"{what}.{name}" for what in ("exp_avg", "exp_avg_sq", "step") for name in names}
    assert tensors["step.2.bias"].shape == ()
    assert tensors["step.2.bias"] == 2
    assert facts["optimizer"] == "AdamW"
    write_tensors(tmp_path / "a.safetensors", tensors)
    assert same(load_file(tmp_path / "a.safetensors"), dict(tensors))


def test_an_optimizer_that_has_not_stepped_comes_back_empty(tmp_path: Path) -> None:
    groups, names = groups_of(network())
    empty = through_files(*optimizer_tensors(torch.optim.AdamW(groups), names), tmp_path)
    model = network()
    used = torch.optim.AdamW(groups_of(model)[0])
    train(model, used, first=0, count=1)
    load_optimizer(used, names, *empty)
    assert not used.state


def test_a_state_of_another_dtype_than_its_parameter_keeps_it(tmp_path: Path) -> None:
    """torch's own load_state_dict casts it to the parameter's."""
    parameter = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    optimizer.state[parameter] = {
        "quantized": torch.tensor([0, 255, 3], dtype=torch.uint8),
        "half": torch.tensor([1.0, -0.0], dtype=torch.bfloat16),
        "step": 12,
        "factor": 0.1,
        "on": True,
        "none": None,
        "range": [1, 2.5],
    }
    saved = through_files(*optimizer_tensors(optimizer, ["p"]), tmp_path)
    other = torch.optim.SGD([nn.Parameter(torch.ones(4))], lr=2.0)
    load_optimizer(other, ["p"], *saved)
    assert same(other.state_dict(), optimizer.state_dict())


def test_the_memory_layout_of_the_parameters_comes_back(tmp_path: Path) -> None:
    model = network(channels_last=True)
    groups, names = groups_of(model)
    optimizer = torch.optim.AdamW(groups, fused=True)
    train(model, optimizer, first=0, count=2)
    saved = through_files(*optimizer_tensors(optimizer, names), tmp_path)
    resumed = network(channels_last=True)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    loaded = torch.optim.AdamW(groups_of(resumed)[0], fused=True)
    load_optimizer(loaded, names, *saved)
    moment = loaded.state[resumed[0].weight]["exp_avg"]
    assert moment.stride() == resumed[0].weight.stride() != moment.contiguous().stride()
    train(model, optimizer, first=2, count=2)
    train(resumed, loaded, first=2, count=2)
    assert same(dict(resumed.state_dict()), dict(model.state_dict()))


def test_how_a_step_is_computed_is_the_resuming_machines_affair(tmp_path: Path) -> None:
    model = network()
    groups, names = groups_of(model)
    optimizer = torch.optim.AdamW(groups, lr=0.5, fused=True)
    train(model, optimizer, first=0, count=1)
    saved = through_files(*optimizer_tensors(optimizer, names), tmp_path)
    loaded = torch.optim.AdamW(groups_of(network())[0], lr=0.25, foreach=True)
    load_optimizer(loaded, names, *saved)
    assert [(group["lr"], group["fused"], group["foreach"]) for group in loaded.param_groups] == [(0.5, None, True)] * 2


def test_accelerates_wrapper_is_seen_through(tmp_path: Path) -> None:
    model = network()
    groups, names = groups_of(model)
    optimizer = torch.optim.AdamW(groups)
    train(model, optimizer, first=0, count=1)
    wrapped = Accelerator(cpu=True).prepare_optimizer(torch.optim.AdamW(groups_of(network())[0]))
    load_optimizer(wrapped, names, *through_files(*optimizer_tensors(optimizer, names), tmp_path))
    assert same(wrapped.optimizer.state_dict(), optimizer.state_dict())
    assert optimizer_tensors(wrapped, names)[1] == optimizer_tensors(optimizer, names)[1]


def saved_adamw() -> tuple[torch.optim.Optimizer, list[str], dict[str, Tensor], dict[str, Any]]:
    model = network()
    groups, names = groups_of(model)
    optimizer = torch.optim.AdamW(groups)
    train(model, optimizer, first=0, count=2)
    tensors, facts = optimizer_tensors(optimizer, names)
    fresh = torch.optim.AdamW(groups_of(network())[0])
    return fresh, names, {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(facts))


def test_a_state_of_other_parameters_is_refused_and_changes_nothing() -> None:
    fresh, names, tensors, facts = saved_adamw()
    before = copy.deepcopy(fresh.state_dict())

    def refused(match: str, **changes: Any) -> None:
        given: dict[str, Any] = {"optimizer": fresh, "names": names, "tensors": tensors, "facts": facts, **changes}
        with pytest.raises(BadWeights, match=match):
            load_optimizer(given["optimizer"], given["names"], given["tensors"], given["facts"])

    refused("others: first 0.weight", names=[f"x.{name}" for name in names])
    refused("others: in another order", names=[*names[1:], names[0]])
    refused("of the optimizer AdamW, not SGD", optimizer=torch.optim.SGD(groups_of(network())[0], lr=0.1))
    wider = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten(), nn.Linear(8 * 4, 5), nn.LayerNorm(5))
    refused(r"0.weight is for the shape \[8, 3, 3, 3\]", optimizer=torch.optim.AdamW(groups_of(wider)[0]))
    one_group = torch.optim.AdamW([p for group in groups_of(network())[0] for p in group["params"]])
    refused("other parameter groups", optimizer=one_group)
    fewer = torch.optim.AdamW(groups_of(network())[0][:1])
    refused("of 6 parameters, and the run trains 2 others", optimizer=fewer, names=names[:2])
    refused("lacks exp_avg.0.weight", tensors={k: v for k, v in tensors.items() if k != "exp_avg.0.weight"})
    refused("has an unknown more", tensors={**tensors, "more": torch.ones(1)})
    cast = {**tensors, "exp_avg.0.bias": tensors["exp_avg.0.bias"].double()}
    refused(r"exp_avg.0.bias is \['float64', \[8\]\]", tensors=cast)
    refused("exp_avg.0.bias is", tensors={**tensors, "exp_avg.0.bias": torch.zeros(9)})
    refused("NaN or infinite", tensors={**tensors, "exp_avg.0.bias": torch.full((8,), float("nan"))})
    assert same(fresh.state_dict(), before)


@pytest.mark.parametrize("key", ["optimizer", "parameters", "groups", "numbers", "tensors", "device", "on_cpu"])
@pytest.mark.parametrize("value", [None, 5, "text", [], {}, [[]], [None], {"a": None}, {"0.weight": 1}])
def test_strange_json_is_refused_in_a_sentence(key: str, value: Any) -> None:
    fresh, names, tensors, facts = saved_adamw()
    harmless = key in {"device", "on_cpu"} or value == {}  # where tensors lie; an AdamW has no numbers
    with contextlib.suppress(BadWeights) if harmless else pytest.raises(BadWeights):
        load_optimizer(fresh, names, tensors, {**facts, key: value})
    with pytest.raises(BadWeights):
        load_optimizer(fresh, names, tensors, {name: value for name, value in facts.items() if name != "parameters"})


def test_numbers_that_went_wrong_are_not_saved() -> None:
    parameter = nn.Parameter(torch.ones(2))
    for state in ({"exp_avg": torch.tensor([0.0, float("nan")])}, {"factor": float("inf")}):
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        optimizer.state[parameter] = state
        with pytest.raises(BadOutput, match=r"exp_avg\.p|factor of p is inf"):
            optimizer_tensors(optimizer, ["p"])


def test_an_optimizer_whose_state_is_more_than_tensors_and_numbers_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(2))
    lbfgs = torch.optim.LBFGS([parameter])
    for _ in range(2):
        lbfgs.step(lambda: _loss(parameter, lbfgs))
    with pytest.raises(UsageError, match=r"the optimizer LBFGS keeps a list as [a-z_]+ of p; only optimizers whose"):
        optimizer_tensors(lbfgs, ["p"])
    odd = torch.optim.SGD([parameter], lr=1.0)
    odd.state["all"] = {"count": 1}  # type: ignore[index]
    with pytest.raises(UsageError, match="keeps a state of no parameter"):
        optimizer_tensors(odd, ["p"])


def _loss(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Any:
    optimizer.zero_grad()
    loss = (parameter**4).sum()
    loss.backward()
    return loss


def test_every_parameter_needs_a_name_of_its_own() -> None:
    groups, names = groups_of(network())
    for wrong in (names[:-1], [*names, "more"], [names[0]] * len(names)):
        with pytest.raises(ValueError, match="different names"):
            optimizer_tensors(torch.optim.AdamW(groups), wrong)


@pytest.mark.gpu
def test_tensors_come_back_to_the_devices_they_were_on(tmp_path: Path) -> None:
    for settings_, (saved_on, loaded_on) in itertools.product(
        ({}, {"fused": True}, {"capturable": True}), itertools.product(("cpu", "cuda"), repeat=2)
    ):
        if settings_.get("capturable") and "cpu" in (saved_on, loaded_on):
            continue
        model, other = network().to(saved_on), network().to(loaded_on)
        groups, names = groups_of(model)
        optimizer = torch.optim.AdamW(groups, **settings_)
        train(model, optimizer, first=0, count=2)
        saved = through_files(*optimizer_tensors(optimizer, names), tmp_path)
        fresh = torch.optim.AdamW(groups_of(other)[0], **settings_)
        load_optimizer(fresh, names, *saved)
        train(other, fresh, first=2, count=1)
        if saved_on == loaded_on:
            other.load_state_dict(model.state_dict())
            load_optimizer(fresh, names, *through_files(*optimizer_tensors(optimizer, names), tmp_path))
            assert same(fresh.state_dict(), optimizer.state_dict())
        moments = {state["exp_avg"].device.type for state in fresh.state.values()}
        counts = {state["step"].device.type for state in fresh.state.values()}
        assert moments == {loaded_on}
        assert counts == ({loaded_on} if settings_ else {"cpu"})


# Files

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    lottery = torch.Generator().manual_seed(0)
    size = torch.empty((), dtype=dtype).element_size()

    def filled(*shape: int) -> Tensor:
        high = 2 if dtype == torch.bool else 256  # any bits at all: NaN payloads are kept here, and refused elsewhere
        raw = torch.randint(0, high, (*shape, size), generator=lottery, dtype=torch.uint8)
        return raw.view(dtype).reshape(shape)

    tensors = {"scalar": filled(), "none": filled(0, 3), "one": filled(1), "many": filled(3, 4, 5)}
    write_tensors(tmp_path / "a" / "b.safetensors", tensors, {"step": "5"})
    back, metadata = read_state(tmp_path / "a" / "b.safetensors")
    assert same(back, tensors)
    assert metadata == {"format": "pt", "step": "5"}


def test_views_and_shared_tensors_are_written_apart(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base,
        "same": base,
        "column": base[:, 2],
        "row": base[1],
        "turned": base.t(),
        "wide": base[:1].expand(3, 6),
    }
    write_tensors(tmp_path / "a.safetensors", tensors)
    assert same(read_state(tmp_path / "a.safetensors")[0], tensors)
    write_tensors(tmp_path / "empty.safetensors", {})
    assert read_state(tmp_path / "empty.safetensors")[0] == {}


def test_a_file_that_is_damaged_or_hostile_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(100)})
    whole = path.read_bytes()
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 4]}}).encode()
    for data in (
        b"",
        whole[:50],
        whole[:-1],
        whole + b"\0",
        b"\x80\x02}q\0.",
        struct.pack("<Q", 2**63) + whole[8:],
        struct.pack("<Q", len(header)) + header + bytes(4),
        struct.pack("<Q", 60_000) + b"[" * 60_000,
    ):
        path.write_bytes(data)
        with pytest.raises(BadWeights):
            read_state(path)
    with pytest.raises(BadWeights, match="cannot read"):
        read_state(tmp_path / "none.safetensors")


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_damage_is_an_error_of_ours_or_other_numbers(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int64)})
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    with contextlib.suppress(BadWeights):
        read_state(path)
