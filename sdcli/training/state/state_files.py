"""Saves and loads optimizer states exactly, as safetensors and JSON without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdcli.errors import BadOutput, BadWeights, UsageError
from sdcli.io.weight_files import check_header
from sdcli.training.state.rows import has_rows, local
from sdcli.training.state.sharded_files import sort_metadata, write_one_by_one

Tensors = dict[str, Tensor]
IMPLEMENTATION_SETTINGS = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Settings of a parameter group that choose an implementation; a resumed run keeps those of its own machine."""


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[Tensors, dict[str, Any]]:
    """An optimizer's state as (tensors, JSON); `names` are its parameters' names, in the order of its groups.

    A tensor is called `<kind>.<parameter>` (`exp_avg.down.0.weight`); it is not a copy, so it must be written before
    the next step. Numbers, the groups' settings and the shapes are in the JSON.
    Raises BadOutput for NaN and infinity, and UsageError for a state with other values than tensors and numbers.
    """
    optimizer = _own(optimizer)
    parameters = named_parameters(optimizer, names)
    if len(optimizer.state.keys() - set(parameters.values())):
        raise _unsaveable(optimizer, "a state of no parameter")
    tensors: Tensors = {}
    numbers: dict[str, dict[str, Any]] = {}
    on_cpu: list[str] = []
    for name, parameter in parameters.items():
        for what, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{what}.{name}"] = value.detach()
                if value.device.type == "cpu" != parameter.device.type:
                    on_cpu.append(f"{what}.{name}")
            else:
                numbers.setdefault(name, {})[what] = _plain(value, f"{what} of {name}", optimizer)
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        settings = {}
        for what, value in group.items():
            if what == "params":
                continue
            if isinstance(value, Tensor):
                tensors[f"group {index}.{what}"] = value.detach()
            else:
                settings[what] = _plain(value, f"{what} of a parameter group", optimizer)
        groups.append({"parameters": len(group["params"]), "settings": settings})
    check_finite(tensors)
    facts = {
        "optimizer": type(optimizer).__name__,
        "parameters": {name: list(parameter.shape) for name, parameter in parameters.items()},
        "device": next((parameter.device.type for parameter in parameters.values()), "cpu"),
        "on_cpu": on_cpu,
        "groups": groups,
        "numbers": numbers,
        "tensors": {name: _kind(tensor) for name, tensor in tensors.items()},
    }
    return tensors, facts


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Restore the state that `optimizer_tensors` returned, exactly, and the groups' settings.

    Unlike torch's `load_state_dict` it keeps every dtype. Tensors move to the device and memory layout of their
    parameters; those that were on the CPU although the parameters were not (`step`) stay there. They are not copied.
    Raises BadWeights where the optimizer, its parameters' names or shapes, or the tensors differ from those saved, and
    for NaN and infinity; the optimizer is unchanged then.
    """
    optimizer = _own(optimizer)
    parameters = named_parameters(optimizer, names)
    try:
        _check(optimizer, parameters, tensors, facts)
        settings = [_settings(group, index, tensors, facts) for index, group in enumerate(optimizer.param_groups)]
        entries, numbers = _entries(facts), facts["numbers"]
        if not set(entries) | set(numbers) <= set(parameters):
            raise ValueError("a state of no parameter")
        state = {
            name: {**numbers.get(name, {}), **_state(parameters[name], group, entries.get(name, ()), tensors, facts)}
            for name, group in zip(names, _groups(optimizer), strict=True)
        }
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise BadWeights(f"the optimizer's state does not have the layout that sdcli writes: {error!r}") from None
    for group, changed in zip(optimizer.param_groups, settings, strict=True):
        group.update(changed)
    optimizer.state.clear()
    for name, values in state.items():
        if values:
            optimizer.state[parameters[name]] = values


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file and its folder; meant for the inside of a checkpoint, which syncs it.

    Tensors that share memory are copied; of those of which each process holds some rows the first process writes the
    whole (see `sharding.Sharding.helped`). Raises OSError and SafetensorError, which `save_checkpoint` turns into
    CannotWrite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {"format": "pt", **(metadata or {})}
    if any(has_rows(tensor) for tensor in tensors.values()):
        write_one_by_one(path, tensors, entries)
        return
    # by its full name, so that a test can make it fail
    safetensors.torch.save_file(_separate(tensors), path, metadata=entries)
    sort_metadata(path)


def read_state(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, in their own dtypes, and its metadata. Raises BadWeights."""
    check_header(path)
    try:
        # pread instead of mmap: see weights.read_tensors
        with safe_open(path, framework="pt", backend="pread") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadWeights(f"{path} is damaged: {error}") from None


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise BadOutput for NaN or infinite values in this process; call it before tensors are saved."""
    bad = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if bad:
        raise BadOutput(
            f"{len(bad)} of {len(tensors)} tensors hold NaN or infinite numbers, first {bad[0]}; they are not saved"
        )


# Optimizers


def _own(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper, or the optimizer itself."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The group of each parameter, in the optimizer's order."""
    return [group for group in optimizer.param_groups for _ in group["params"]]


def named_parameters(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """An optimizer's parameters by their names, which are given in its order."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(names) != len(parameters) or len(set(names)) != len(names):
        raise ValueError(f"{len(set(names))} different names for the {len(parameters)} parameters of an optimizer")
    return dict(zip(names, parameters, strict=True))


def _plain(value: Any, place: str, optimizer: torch.optim.Optimizer) -> Any:
    """A number, text, None, or a list of them, for JSON; tuples become lists, which `_like` reverses."""
    match value:
        case None | bool() | int() | float() | str():
            return _jsonable(value, place)
        case list() | tuple() if not any(isinstance(inner, Tensor) for inner in value):
            return [_plain(inner, place, optimizer) for inner in value]
    raise _unsaveable(optimizer, f"a {type(value).__name__} as {place}")


def _unsaveable(optimizer: torch.optim.Optimizer, what: str) -> UsageError:
    return UsageError(
        f"the optimizer {type(optimizer).__name__} keeps {what}; only optimizers whose state is one tensor or "
        "number of each kind per parameter can be saved"
    )


def _jsonable(value: Any, place: str) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise BadOutput(f"{place} is {value}; it is not saved") from None
    return value


def _check(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Raise BadWeights for a state of another optimizer, of other parameters, or an incomplete one."""
    if facts["optimizer"] != type(optimizer).__name__:
        raise BadWeights(f"the saved state is of the optimizer {facts['optimizer']}, not {type(optimizer).__name__}")
    saved: dict[str, list[int]] = facts["parameters"]
    if list(saved) != list(parameters):
        strange = [name for name in saved if name not in parameters] + [
            name for name in parameters if name not in saved
        ]
        which = f"first {strange[0]}" if strange else "in another order"
        raise BadWeights(
            f"the optimizer's state is of {len(saved)} parameters, and the run trains {len(parameters)} others: {which}"
        )
    for name, parameter in parameters.items():
        if saved[name] != list(parameter.shape):
            raise BadWeights(
                f"the optimizer's state of {name} is for the shape {saved[name]}, the parameter has "
                f"{list(parameter.shape)}"
            )
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if [group["parameters"] for group in facts["groups"]] != sizes:
        raise BadWeights(f"the optimizer's state has other parameter groups than the run's {sizes}")
    expected: dict[str, list[Any]] = facts["tensors"]
    for name in (*expected, *tensors):
        if name not in tensors or name not in expected:
            raise BadWeights(f"the optimizer's state {'lacks' if name in expected else 'has an unknown'} {name}")
        if expected[name] != _kind(tensors[name]):
            raise BadWeights(f"the optimizer's {name} is {_kind(tensors[name])}, and was {expected[name]} when saved")
    try:
        check_finite(tensors)
    except BadOutput as error:
        raise BadWeights(f"the optimizer's state is damaged: {error}") from None


def _kind(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _settings(
    group: Mapping[str, Any], index: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """A group's saved settings without `IMPLEMENTATION_SETTINGS`; a learning rate that is a tensor stays a tensor."""
    start = f"group {index}."
    saved = {what: _like(value, group.get(what)) for what, value in facts["groups"][index]["settings"].items()}
    saved |= {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    for what, value in saved.items():
        present = group.get(what)
        if isinstance(value, Tensor) and isinstance(present, Tensor):
            saved[what] = value.to(present.device)
    return {what: value for what, value in saved.items() if what not in IMPLEMENTATION_SETTINGS}


def _like(value: Any, present: Any) -> Any:
    """Turn a list from JSON back into a tuple where the optimizer has a tuple (`betas`)."""
    return tuple(value) if isinstance(value, list) and isinstance(present, tuple) else value


def _state(
    parameter: Tensor,
    group: Mapping[str, Any],
    entries: Sequence[tuple[str, str]],
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> dict[str, Tensor]:
    """One parameter's tensors on their devices; `entries` are pairs (kind, key in `tensors`)."""
    values: dict[str, Tensor] = {}
    for what, key in entries:
        same_device = facts["device"] == parameter.device.type
        on_cpu = key in facts["on_cpu"] if same_device else _counts_on_cpu(what, group)
        values[what] = tensors[key] if on_cpu else _match_layout(tensors[key], parameter)
    return values


def _entries(facts: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Parameter name -> (kind, key) of each of its tensors."""
    found: dict[str, list[tuple[str, str]]] = {}
    for key in facts["tensors"]:
        what, _, name = key.partition(".")
        if not what.startswith("group "):
            found.setdefault(name, []).append((what, key))
    return found


def _counts_on_cpu(what: str, group: Mapping[str, Any]) -> bool:
    """Whether torch expects the step count on the CPU when a state comes from another kind of device."""
    return what == "step" and not (group.get("capturable") or group.get("fused"))


def _match_layout(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor on the parameter's device and in its memory layout (channels_last), which fused kernels require."""
    if tensor.shape != parameter.shape or tensor.stride() == parameter.stride():
        return tensor.to(parameter.device)
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


# Files


def _separate(tensors: Mapping[str, Tensor]) -> Tensors:
    """Contiguous tensors that share no memory, as safetensors requires; copied only where necessary."""
    storages: set[tuple[torch.device, int]] = set()
    separate: Tensors = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        packed = tensor.detach().contiguous()
        if packed.data_ptr() == tensor.data_ptr() and place in storages and tensor.numel():
            packed = packed.clone()
        storages.add(place)
        separate[name] = packed
    return separate


def _finite(tensor: Tensor) -> bool:
    tensor = local(tensor)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    return bool(wide.isfinite().all())
