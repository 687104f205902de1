"""Estimates the memory of a training run: weights, gradients, optimizer state and activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.training.controlnet.task import ControlNetTask
from sdcli.training.settings import TrainSettings
from sdcli.training.unet.task import UnetTask
from sdcli.training.vae.task import VaeTask, plain
from sdcli.vae.autoencoder import cell, latent_channels

MARGIN = 1.15
"""Factor for buffers of convolutions and unused memory of the allocator."""
RUNTIME_BYTES = 600 * 2**20
"""Python, torch and the libraries."""
MOMENTS = {"adamw": 2.0, "muon": 1.1, "adamw-8bit": 0.5, "sgd": 1.0}
"""The size of the optimizers' states relative to the trained weights."""


def unet_memory(task: UnetTask, settings: TrainSettings, *, size: tuple[int, int]) -> int:
    """Estimated peak bytes of a step; `size` is the width and height of the largest bucket in pixels."""
    unet: Any = task.networks["unet"]

    def run(network: Any) -> None:
        inputs = _inputs(unet.config, task, settings, size)
        task.family.call(network, inputs.pop("sample"), inputs.pop("timestep"), inputs)

    frozen = [part for part in (task.frozen_text_encoder, task.vae) if part is not None]
    return _total([*task.networks.values(), *frozen], settings, _activations([unet], run, settings))


def controlnet_memory(task: ControlNetTask, settings: TrainSettings, *, size: tuple[int, int]) -> int:
    """Estimated peak bytes of a step; `size` is the width and height of the largest bucket in pixels."""
    unet: Any = task.unet

    def run(controlnet: Any, frozen: Any) -> None:
        inputs = _inputs(unet.config, task, settings, size)
        pixels = torch.empty(settings.train_batch_size, 3, size[1], size[0])
        down, middle = controlnet(**inputs, controlnet_cond=pixels, return_dict=False)
        frozen(**inputs, down_block_additional_residuals=down, mid_block_additional_residual=middle)

    activations = _activations([task.networks["controlnet"], unet], run, settings)
    frozen = [part for part in (unet, task.frozen_text_encoder, task.vae) if part is not None]
    return _total([*task.networks.values(), *frozen], settings, activations)


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
    if config.get("num_class_embeds"):
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long)
    return inputs


def vae_memory(task: VaeTask, settings: TrainSettings, *, size: tuple[int, int]) -> int:
    """Estimated peak bytes of a step; `size` is the width and height of the largest bucket in pixels."""
    vae: Any = plain(task.networks)

    def run(network: Any) -> None:
        output = network.encode(torch.empty(settings.train_batch_size, 3, size[1], size[0]))
        network.decode(output.latents if hasattr(output, "latents") else output.latent_dist.mean)

    return _total(task.networks.values(), settings, _activations([vae], run, settings))


def _total(networks: Iterable[nn.Module], settings: TrainSettings, activations: int) -> int:
    parts = list(networks)
    weights = sum(t.numel() * t.element_size() for part in parts for t in part.state_dict().values())
    trained = sum(p.numel() * 4 for part in parts for p in part.parameters() if p.requires_grad)
    copies = 1 + MOMENTS[settings.optimizer] + (1 if settings.use_ema else 0)
    return int((weights + trained * copies + activations) * MARGIN) + RUNTIME_BYTES


def _activations(likes: Sequence[Any], run: Callable[..., None], settings: TrainSettings) -> int:
    """Bytes that a forward pass saves for the backward pass, counted with fake tensors, which have no data.

    Layers without trained weights in or before them save nothing, so frozen networks of `likes` are frozen here, too.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    saved: dict[int, int] = {}
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
                alive.append(tensor)  # so that its id is not reused
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=settings.mixed_precision != "no"),
        ):
            run(*networks)
    return sum(saved.values())
