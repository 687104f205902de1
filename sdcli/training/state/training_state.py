"""Saves and restores the state of a run: weights, moving averages and optimizers, without pickle.

It needs no random state (see `io/rng.py`), no learning rate (a function of the step) and no position in the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.encoders.clip import STORED_PREFIX
from sdcli.errors import BadWeights
from sdcli.io.weight_files import check_header
from sdcli.training.state.rows import has_rows
from sdcli.training.state.sharded_files import copy_tensors, read_shards, write_shards
from sdcli.training.state.state_files import (
    Tensors,
    check_finite,
    load_optimizer,
    named_parameters,
    optimizer_tensors,
    read_state,
    write_tensors,
)

STATE = "train_state.json"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""Names of the weight files of diffusers and transformers."""


@dataclass(frozen=True)
class TrainingState:
    """The networks and optimizers of a run; `names` are the optimizers' parameter names, in their order."""

    networks: Mapping[str, nn.Module]
    averages: Mapping[str, nn.Module]
    trained: Mapping[str, frozenset[str]]
    """The names of each network's trained parameters; its average has the same ones."""
    optimizers: Mapping[str, torch.optim.Optimizer]
    names: Mapping[str, Sequence[str]]

    def save(self, folder: Path, *, done: int, scaler: Any = None) -> None:
        """Write what the task's own files do not contain. Raises BadOutput for weights that are not finite."""
        states = self.checked()
        self.save_networks(folder)
        self.save_optimizers(folder, states, done=done, scaler=scaler)

    def checked(self) -> dict[str, tuple[Tensors, dict[str, Any]]]:
        """The optimizers' states as (tensors, JSON). Raises BadOutput for a value anywhere that is not finite.

        Where the processes hold rows of the tensors, that is about the rows of this one.
        """
        for tensors in self._changing().values():
            check_finite(tensors)
        return {name: optimizer_tensors(optimizer, self.names[name]) for name, optimizer in self.optimizers.items()}

    def save_networks(self, folder: Path) -> None:
        """Write the weights that the task's own files do not contain."""
        for name, tensors in self._changing().items():
            if not _file_with(folder / name, tensors):
                write_tensors(folder / "state" / f"{name}.safetensors", tensors)

    def save_optimizers(
        self,
        folder: Path,
        states: Mapping[str, tuple[Tensors, Mapping[str, Any]]],
        *,
        done: int,
        scaler: Any = None,
        first: bool = True,
    ) -> None:
        """Write the optimizers' states and the numbers of the run.

        Where the processes hold rows of the tensors, all of them call this together, `first` in the first one.
        """
        facts: dict[str, Any] = {"schema": 1, "step": done, "optimizers": {}}
        rows = {
            name: {key: tensor for key, tensor in tensors.items() if has_rows(tensor)}
            for name, (tensors, _) in states.items()
        }
        for name in (name for name in states if rows[name]):
            write_shards(_shards_of(folder, name), rows[name])
        if not first:
            return
        for name, (tensors, numbers) in states.items():
            others = {key: tensor for key, tensor in tensors.items() if key not in rows[name]}
            write_tensors(folder / "state" / f"optimizer_{name}.safetensors", others)
            facts["optimizers"][name] = {**numbers, **({"in_shards": sorted(rows[name])} if rows[name] else {})}
        if scaler is not None:
            facts["scaler"] = scaler.state_dict()
        (folder / STATE).write_text(json.dumps(facts))

    def restore(self, folder: Path, *, scaler: Any = None) -> int:
        """Restore a checkpoint exactly, of any number of processes; returns the number of steps it has done.

        Raises BadWeights for a checkpoint of another network or optimizer.
        """
        facts = json.loads((folder / STATE).read_text())
        for name, expected in self._changing().items():
            file = _file_with(folder / name, expected) or folder / "state" / f"{name}.safetensors"
            stored = {key.removeprefix(STORED_PREFIX): (key, entry["shape"]) for key, entry in _entries(file).items()}
            if {key: shape for key, (_, shape) in stored.items()} != {k: list(t.shape) for k, t in expected.items()}:
                raise BadWeights(f"{file} is of another network than the settings describe; they must not change")
            copy_tensors(file, {stored[key][0]: tensor for key, tensor in expected.items()})
        if set(facts["optimizers"]) != set(self.optimizers):
            raise BadWeights(f"{folder} was made with other optimizers ({', '.join(facts['optimizers'])})")
        for name, optimizer in self.optimizers.items():
            tensors = self._stored_state(folder, name, facts["optimizers"][name])
            load_optimizer(optimizer, self.names[name], tensors, facts["optimizers"][name])
        if scaler is not None and "scaler" in facts:
            scaler.load_state_dict(facts["scaler"])
        return int(facts["step"])

    def _stored_state(self, folder: Path, name: str, facts: Mapping[str, Any]) -> Tensors:
        """The tensors of an optimizer's state in a checkpoint; of those that are like a parameter, the rows held here.

        Raises BadWeights.
        """
        file = folder / "state" / f"optimizer_{name}.safetensors"
        in_shards = set(facts.get("in_shards", ()))
        parameters = named_parameters(self.optimizers[name], self.names[name])
        if not in_shards and not any(map(has_rows, parameters.values())):
            return read_state(file)[0]
        tensors = {key: _empty(key, kind, parameters) for key, kind in facts["tensors"].items()}
        if in_shards:
            read_shards(_shards_of(folder, name), {key: tensors[key] for key in in_shards})
        copy_tensors(file, {key: tensor for key, tensor in tensors.items() if key not in in_shards})
        return tensors

    def _changing(self) -> dict[str, dict[str, Tensor]]:
        """The trained tensors of every network and average, by the name of their folder."""
        own = {name: _changing(network, self.trained[name]) for name, network in self.networks.items()}
        return {**own, **{f"{name}_ema": _changing(net, self.trained[name]) for name, net in self.averages.items()}}


def _shards_of(folder: Path, name: str) -> Path:
    """The folder with the rows of an optimizer's state, where each process holds some."""
    return folder / "state" / f"optimizer_{name}"


def _empty(key: str, kind: Sequence[Any], parameters: Mapping[str, Tensor]) -> Tensor:
    """A tensor for an optimizer's state `<what>.<parameter>`: rows like those of the parameter, or whole on the CPU.

    Raises BadWeights for an impossible `kind`, a dtype and a shape.
    """
    parameter = parameters.get(key.partition(".")[2])
    dtype = getattr(torch, str(kind[0]), None)
    if not isinstance(dtype, torch.dtype):
        raise BadWeights(f"the optimizer's {key} has the dtype {kind[0]}, which does not exist")
    if parameter is not None and has_rows(parameter) and list(parameter.shape) == list(kind[1]):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(kind[1], dtype=dtype)


def _entries(file: Path) -> dict[str, Any]:
    """The header of a safetensors file without its metadata. Raises BadWeights."""
    return {name: entry for name, entry in check_header(file).items() if name != "__metadata__"}


def _changing(network: nn.Module, trained: frozenset[str]) -> dict[str, Tensor]:
    """The tensors that training changes: trained parameters, and the buffers in the state_dict."""
    parameters = {name for name, _ in network.named_parameters()}
    return {name: tensor for name, tensor in network.state_dict().items() if name in trained or name not in parameters}


def _file_with(folder: Path, tensors: Mapping[str, Tensor]) -> Path | None:
    """The weight file of a sub-folder if it has exactly these tensors in float32, their own format."""
    for file in (folder / name for name in WEIGHT_FILES):
        if file.is_file():
            header = _entries(file)
            expected = {name: ("F32", list(t.shape)) for name, t in tensors.items() if t.dtype == torch.float32}
            found = {
                name.removeprefix(STORED_PREFIX): (entry["dtype"], entry["shape"]) for name, entry in header.items()
            }
            if found == expected and len(expected) == len(tensors):
                return file
    return None
