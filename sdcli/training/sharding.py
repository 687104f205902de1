"""Weights spread over the processes of a run (--sharding full): torch's FSDP2 under the loop that trains without it.

Each process holds some rows of every weight, and the same rows of its gradient, its optimizer state and its moving
average. The whole weights of a block exist only while it computes: they are gathered before its forward and its
backward pass and dropped after it; its gradients are averaged over the processes, of which each keeps its own rows.

Validation, samples and model files need whole weights. They are the work of the first process, which asks the others
for one tensor after another: it works inside of `Sharding.helped`, the others wait in `Sharding.help`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdcli.encoders.clip import ClipTextEncoder
from sdcli.io.devices import return_freed_memory
from sdcli.training.settings import TrainSettings
from sdcli.training.state.rows import fetching, has_rows, local, whole
from sdcli.training.task import Networks, Task

BLOCKS = frozenset({"BasicTransformerBlock", "ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D"})
"""Classes of diffusers whose weights are gathered together; the rest of a network is gathered as a whole."""
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_DONE = -1


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network whose weights are gathered one after another, in its order; no part is within another."""
    if isinstance(network, ClipTextEncoder):
        yield from network.encoder.layers
        return
    for child in network.children():
        if type(child).__name__ not in BLOCKS:
            yield from blocks(child)
        elif any(True for _ in child.parameters()):
            yield child


@dataclass
class Sharding:
    """The networks of a task, of which each process holds its rows; made by `shard`."""

    networks: Networks
    accelerator: Accelerator
    outlines: Networks
    """Copies of the networks without weights and of their own classes, which FSDP2 replaces in the networks."""
    averages: dict[str, nn.Module] = field(default_factory=dict)
    """The moving averages, by the name of their network."""

    def average_of(self, name: str) -> nn.Module:
        """A copy of a network for its moving average, which shares the rows of the frozen weights."""
        network = self.networks[name]
        frozen = {key for key, parameter in network.named_parameters() if not parameter.requires_grad}
        rows = network.state_dict()
        self.averages[name] = _with_tensors(
            self.outlines[name], {key: one if key in frozen else one.clone() for key, one in rows.items()}
        )
        return self.averages[name]

    def views(self) -> Networks:
        """The networks under their own classes, with the same rows in memory; their tensors are not whole."""
        return {name: _with_tensors(self.outlines[name], one.state_dict()) for name, one in self.networks.items()}

    def whole(self, networks: Networks) -> Networks:
        """Copies of networks, or of their averages, with whole weights; within `helped`, in the first process."""
        return {
            name: _with_tensors(self.outlines[name], {key: whole(one) for key, one in network.state_dict().items()})
            for name, network in networks.items()
        }

    @contextmanager
    def helped(self) -> Iterator[None]:
        """Inside the block `whole` works in this process, the first one, while the others are in `help`."""
        tensors = self._tensors()
        places = {local(one).data_ptr(): place for place, one in enumerate(tensors)}

        def fetch(tensor: Tensor) -> Tensor:
            place = places[local(tensor).data_ptr()]  # never 0: the first process has rows of every tensor
            self._agree_on(place)
            return _gathered(tensors[place])

        try:
            with fetching(fetch):
                yield
        finally:
            self._agree_on(_DONE)

    def help(self) -> None:
        """Send this process's rows of what the first process asks for, until that leaves `helped`."""
        tensors = self._tensors()
        while (place := self._agree_on(_DONE)) != _DONE:
            _gathered(tensors[place])

    def _tensors(self) -> list[Tensor]:
        """Every tensor of which a process holds its rows, in the same order in every process."""
        modules = [*self.networks.values(), *self.averages.values()]
        return [one for module in modules for one in module.state_dict().values() if has_rows(one)]

    def _agree_on(self, place: int) -> int:
        """The place that the first process has given."""
        message = torch.tensor(place, device=self.accelerator.device)
        torch.distributed.broadcast(message, src=0)
        return int(message)


def shard(task: Task, accelerator: Accelerator, settings: TrainSettings) -> Sharding:
    """Spread the networks of a task over the processes, each of which has whole ones before.

    The parameter groups of the task's phases have the new parameters afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    half = HALF.get(settings.mixed_precision)
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=None if half is None else torch.float32)
    outlines = {name: _outline(network) for name, network in task.networks.items()}
    names = {
        id(parameter): (name, key)
        for name, network in task.networks.items()
        for key, parameter in network.named_parameters()
    }
    for network in task.networks.values():
        _shard(network, mesh, policy)
    if mesh.device_type == "cpu":
        return_freed_memory(always=True)  # whole blocks come and go; kept, they took twice what a step holds
    for phase in task.phases:
        for group in phase.groups:
            found = {key: names[id(parameter)] for key, parameter in group["params"].items()}
            group["params"] = {key: task.networks[name].get_parameter(path) for key, (name, path) in found.items()}
    return Sharding(task.networks, accelerator, outlines)


def _shard(network: nn.Module, mesh: Any, policy: Any) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for block in blocks(network):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)
    if mesh.device_type != "cuda":
        # pytorch issue 162338: gloo summed the gradients instead of averaging them; torch 2.13 did not when tried here,
        # but whether it does is no longer asked: they are summed, then divided
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def _gathered(tensor: Any) -> Tensor:
    result: Tensor = tensor.full_tensor()
    return result


def _outline(network: nn.Module) -> nn.Module:
    """A copy of a network whose parameters have no data."""
    empty: dict[int, Any] = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=one.requires_grad)
        for one in network.parameters()
    }
    return copy.deepcopy(network, empty)


def _with_tensors(outline: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of an outline with these tensors, which are not copied."""
    network = copy.deepcopy(outline)
    network.load_state_dict({key: tensor.detach() for key, tensor in tensors.items()}, assign=True)
    return network


def largest_block(network: nn.Module, size: Callable[[Sequence[nn.Parameter]], int]) -> tuple[int, int]:
    """The sizes of the largest block of a network, and of what is in no block."""
    own = {id(parameter) for block in blocks(network) for parameter in block.parameters()}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in own]
    return max((size(list(block.parameters())) for block in blocks(network)), default=0), size(rest)
