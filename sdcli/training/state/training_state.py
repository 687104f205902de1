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
from sdcli.training.state.state_files import check_finite, load_optimizer, optimizer_tensors, read_state, write_tensors

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
        for name, tensors in self._changing().items():
            check_finite(tensors)
            if not _file_with(folder / name, tensors):
                write_tensors(folder / "state" / f"{name}.safetensors", tensors)
        facts: dict[str, Any] = {"schema": 1, "step": done, "optimizers": {}}
        for name, optimizer in self.optimizers.items():
            tensors, numbers = optimizer_tensors(optimizer, self.names[name])
            write_tensors(folder / "state" / f"optimizer_{name}.safetensors", tensors)
            facts["optimizers"][name] = numbers
        if scaler is not None:
            facts["scaler"] = scaler.state_dict()
        (folder / STATE).write_text(json.dumps(facts))

    def restore(self, folder: Path, *, scaler: Any = None) -> int:
        """Restore a checkpoint exactly; returns the number of steps it has done.

        Raises BadWeights for a checkpoint of another network or optimizer.
        """
        facts = json.loads((folder / STATE).read_text())
        for name, expected in self._changing().items():
            file = _file_with(folder / name, expected) or folder / "state" / f"{name}.safetensors"
            found, _ = read_state(file)
            stored = {key.removeprefix(STORED_PREFIX): tensor for key, tensor in found.items()}
            if set(stored) != set(expected) or any(stored[key].shape != expected[key].shape for key in expected):
                raise BadWeights(f"{file} is of another network than the settings describe; they must not change")
            with torch.no_grad():
                for key, tensor in expected.items():
                    tensor.copy_(stored[key])
        if set(facts["optimizers"]) != set(self.optimizers):
            raise BadWeights(f"{folder} was made with other optimizers ({', '.join(facts['optimizers'])})")
        for name, optimizer in self.optimizers.items():
            tensors, _ = read_state(folder / "state" / f"optimizer_{name}.safetensors")
            load_optimizer(optimizer, self.names[name], tensors, facts["optimizers"][name])
        if scaler is not None and "scaler" in facts:
            scaler.load_state_dict(facts["scaler"])
        return int(facts["step"])

    def _changing(self) -> dict[str, dict[str, Tensor]]:
        """The trained tensors of every network and average, by the name of their folder."""
        own = {name: _changing(network, self.trained[name]) for name, network in self.networks.items()}
        return {**own, **{f"{name}_ema": _changing(net, self.trained[name]) for name, net in self.averages.items()}}


def _changing(network: nn.Module, trained: frozenset[str]) -> dict[str, Tensor]:
    """The tensors that training changes: trained parameters, and the buffers in the state_dict."""
    parameters = {name for name, _ in network.named_parameters()}
    return {name: tensor for name, tensor in network.state_dict().items() if name in trained or name not in parameters}


def _file_with(folder: Path, tensors: Mapping[str, Tensor]) -> Path | None:
    """The weight file of a sub-folder if it has exactly these tensors in float32, their own format."""
    for file in (folder / name for name in WEIGHT_FILES):
        if file.is_file():
            header = {name: entry for name, entry in check_header(file).items() if name != "__metadata__"}
            expected = {name: ("F32", list(t.shape)) for name, t in tensors.items() if t.dtype == torch.float32}
            found = {
                name.removeprefix(STORED_PREFIX): (entry["dtype"], entry["shape"]) for name, entry in header.items()
            }
            if found == expected and len(expected) == len(tensors):
                return file
    return None
