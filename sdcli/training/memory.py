"""Estimates the memory of a training run: weights, gradients, optimizer state and activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.training.controlnet.task import ControlNetTask
from sdcli.training.forecast import Forecast
from sdcli.training.settings import TrainSettings
from sdcli.training.sharding import HALF, largest_block
from sdcli.training.unet.task import UnetTask
from sdcli.training.vae.task import VaeTask, plain
from sdcli.vae.autoencoder import cell, latent_channels

SIZES = 6
"""The numbers of `time_ids` in SDXL's conditioning."""
MOMENTS = {"adamw": 2.0, "muon": 1.1, "adamw-8bit": 0.5, "sgd": 1.0}
"""The size of the optimizers' states relative to the trained weights."""


def unet_memory(
    task: UnetTask, settings: TrainSettings, *, size: tuple[int, int], kept: Iterable[nn.Module] = ()
) -> Forecast:
    """The memory of a step; `size` is the width and height of the largest bucket in pixels.

    `kept`: frozen networks that stay in memory for the samples.
    """
    unet: Any = task.networks["unet"]

    def run(network: Any) -> None:
        inputs = _inputs(unet.config, task, settings, size)
        task.family.call(network, inputs.pop("sample"), inputs.pop("timestep"), inputs)

    frozen = [part for part in (task.frozen_text_encoder, task.vae, *kept) if part is not None]
    return forecast(task.networks.values(), settings, activations([unet], run, settings), frozen=frozen)


def controlnet_memory(
    task: ControlNetTask, settings: TrainSettings, *, size: tuple[int, int], kept: Iterable[nn.Module] = ()
) -> Forecast:
    """The memory of a step, as of `unet_memory`."""
    unet: Any = task.unet

    def run(controlnet: Any, frozen: Any) -> None:
        inputs = _inputs(unet.config, task, settings, size)
        pixels = torch.empty(settings.train_batch_size, 3, size[1], size[0])
        down, middle = controlnet(**inputs, controlnet_cond=pixels, return_dict=False)
        frozen(**inputs, down_block_additional_residuals=down, mid_block_additional_residual=middle)

    saved = activations([task.networks["controlnet"], unet], run, settings)
    frozen = [part for part in (unet, task.frozen_text_encoder, task.vae, *kept) if part is not None]
    return forecast(task.networks.values(), settings, saved, frozen=frozen)


def _inputs(config: Any, task: UnetTask, settings: TrainSettings, size: tuple[int, int]) -> dict[str, Any]:
    """Empty inputs of a denoiser in one step."""
    factor = 1 if task.vae is None else cell(task.vae)
    channels = config.in_channels if task.vae is None else latent_channels(task.vae)
    text_width = task.family.text_width(config)
    batch = settings.train_batch_size
    inputs: dict[str, Any] = {
        "sample": torch.empty(batch, channels, size[1] // factor, size[0] // factor),
        "timestep": torch.zeros(batch, dtype=torch.long),
    }
    if text_width is not None:
        inputs["encoder_hidden_states"] = torch.empty(batch, 77, text_width)
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.empty(batch, pooled),
            "time_ids": torch.empty(batch, SIZES),
        }
    if config.get("num_class_embeds"):
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long)
    return inputs


def vae_memory(task: VaeTask, settings: TrainSettings, *, size: tuple[int, int]) -> Forecast:
    """The memory of a step; `size` is the width and height of the largest bucket in pixels."""
    vae: Any = plain(task.networks)

    def run(network: Any) -> None:
        output = network.encode(torch.empty(settings.train_batch_size, 3, size[1], size[0]))
        network.decode(output.latents if hasattr(output, "latents") else output.latent_dist.mean)

    return forecast(task.networks.values(), settings, activations([vae], run, settings), shardable=False)


def forecast(
    networks: Iterable[nn.Module],
    settings: TrainSettings,
    kept: Activations,
    *,
    frozen: Iterable[nn.Module] = (),
    shardable: bool = True,
) -> Forecast:
    """The memory of a step of trained networks, with frozen ones around them and what is kept for the backward pass."""
    trained = list(networks)
    changing = sum(p.numel() * 4 for network in trained for p in network.parameters() if p.requires_grad)
    in_work = 0
    if shardable:
        half = settings.mixed_precision in HALF
        in_work = sum(_in_work(*largest_block(network, _numbers), 2 if half else 4) for network in trained)
    return Forecast(
        weights=_bytes_of(trained),
        frozen=_bytes_of(frozen),
        gradients=changing,
        optimizer=int(changing * MOMENTS[settings.optimizer]),
        average=changing if settings.use_ema else 0,
        activations=kept.bytes,
        casts=kept.casts,
        in_work=in_work if shardable else None,
        on_cpu=all(p.device.type == "cpu" for network in trained for p in network.parameters()),
    )


def _in_work(block: int, rest: int, size: int) -> int:
    """Bytes of whole weights and gradients that FSDP2 holds at its peak; `size` is that of a number while it computes.

    Of the largest block: its weights, those of the next one, which are on their way, the buffer that they arrive in,
    the gradients, and the buffer that these leave by, in float32. What is in no block is held for the whole step.
    """
    return 2 * rest * size + max(block * (4 * size + 4), rest * 4)


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes_of(networks: Iterable[nn.Module]) -> int:
    """Bytes of the tensors of networks; those that several of them share count once."""
    tensors = {id(one): one for network in networks for one in network.state_dict(keep_vars=True).values()}
    return sum(one.numel() * one.element_size() for one in tensors.values())


@dataclass(frozen=True)
class Activations:
    """What a forward pass keeps for the backward pass, in bytes."""

    bytes: int
    casts: int = 0
    """Copies of weights in half precision, which autocast makes; FSDP2 needs none."""


def activations(likes: Sequence[Any], run: Callable[..., None], settings: TrainSettings) -> Activations:
    """What a forward pass keeps for the backward pass, counted with fake tensors, which have no data.

    Layers without trained weights in or before them save nothing, so frozen networks of `likes` are frozen here, too.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    saved: dict[int, int] = {}
    casts: set[int] = set()
    alive: list[Tensor] = []
    with FakeTensorMode():
        networks = [type(like).from_config(like.config) for like in likes]
        for like, network in zip(likes, networks, strict=True):
            network.train().requires_grad_(any(parameter.requires_grad for parameter in like.parameters()))
            if settings.gradient_checkpointing:
                network.enable_gradient_checkpointing()
        own = {parameter.untyped_storage()._cdata for network in networks for parameter in network.parameters()}

        def save(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:  # views of one storage count once
                saved[storage._cdata] = storage.nbytes()
                if _is_weight(tensor.grad_fn):
                    casts.add(storage._cdata)
                alive.append(tensor)  # so that its id is not reused
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=settings.mixed_precision != "no"),
        ):
            run(*networks)
    of_casts = sum(saved[one] for one in casts)
    return Activations(sum(saved.values()) - of_casts, of_casts)


def _is_weight(node: Any) -> bool:
    """Whether a tensor is a weight in another precision or shape, by the node of the graph that made it."""
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return node is not None and type(node).__name__ == "AccumulateGrad"
