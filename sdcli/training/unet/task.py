"""`sdcli train-unet`: train a UNet to denoise latents or pixels, conditioned on text, classes or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from sdcli.data.cache.keys import sample_latents
from sdcli.diffusion.noise_schedule import NoiseSchedule, Schedule, add_noise
from sdcli.encoders.caption_encoder import HIDDEN, POOLED, CaptionEncoder
from sdcli.encoders.condition import Conditioning
from sdcli.io import rng
from sdcli.io.lean_diffusers import VAE
from sdcli.models.families.family import Family
from sdcli.training.inputs.conditioning import SampleConditioning
from sdcli.training.inputs.order import Order
from sdcli.training.inputs.sources import ImageSource
from sdcli.training.lora import LoraShape, merged_tensors, write_lora
from sdcli.training.objective import (
    diffusion_loss,
    perturb,
    snr_weights,
    target,
    timestep,
    timesteps,
    training_noise,
)
from sdcli.training.settings import DenoiserSettings
from sdcli.training.state.state_files import write_tensors
from sdcli.training.task import Batch, Draw, Losses, Networks, OptimizerPhase
from sdcli.training.text_encoder.network import write_text_encoder
from sdcli.vae.autoencoder import cell, moments, scaling_factor

VALIDATION_TIMES = 4
"""Noise levels at which every held-out image is validated, evenly spaced."""
VALIDATION_BATCH = 16


@dataclass(frozen=True)
class DenoisingObjective:
    """The diffusion objective: the noise schedule, and how noise and timesteps are drawn and weighted."""

    schedule: Schedule
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    stratified: bool = True

    @classmethod
    def of(cls, schedule: Schedule, settings: DenoiserSettings) -> DenoisingObjective:
        return cls(
            schedule,
            snr_gamma=settings.snr_gamma,
            noise_offset=settings.noise_offset,
            input_perturbation=settings.input_perturbation,
            stratified=settings.stratified_timesteps,
        )


@dataclass
class UnetTask:
    """The task of `train-unet`; see `task.Task`. `networks` has "unet", and "text_encoder" if that is trained, too."""

    networks: dict[str, nn.Module]
    objective: DenoisingObjective
    order: Order
    source: ImageSource
    conditioning: SampleConditioning
    seed: int
    learning_rates: Mapping[str, float]
    family: Family
    held_out: Sequence[tuple[int, tuple[int, int]]] = ()
    """Indices of the validation images, each with its width and height."""
    frozen_text_encoder: CaptionEncoder | None = None
    """Encodes `ids` if text states are not cached."""
    vae: VAE | None = None
    """Encodes `pixels` if latents are not cached; None in pixel space."""
    loras: Mapping[str, LoraShape] = field(default_factory=dict)
    """The networks that are trained as LoRAs."""
    sample_sheet: Callable[[Networks, int, Path], list[Path]] | None = None
    name_of: Callable[[int], str] = str
    averaged: tuple[str, ...] = field(init=False)
    phases: Sequence[OptimizerPhase] = field(init=False)

    def __post_init__(self) -> None:
        self.averaged = tuple(self.networks)
        groups = [
            {
                "name": name,
                "params": {key: p for key, p in network.named_parameters() if p.requires_grad},
                "lr": self.learning_rates[name],
            }
            for name, network in self.networks.items()
        ]
        self.phases = (OptimizerPhase(next(iter(self.networks)), groups, self.loss),)

    # Samples

    def draws(self, step: int) -> list[Draw]:
        return self.order.draws(step)

    def item_name(self, index: int) -> str:
        return self.name_of(index)

    def item(self, draw: Draw) -> dict[str, Any]:
        """`x0` [C, h, w] or `pixels` [3, H, W]; `noise` like x0; `t`; the conditioning."""
        item = {**self.source.item(draw), **self.conditioning.item(draw)}
        shape = self._shape(item)
        item["t"] = torch.tensor(self._timestep(draw.counter))
        item["noise"] = training_noise(self.seed, draw.counter, shape, noise_offset=self.objective.noise_offset)
        if self.objective.input_perturbation:
            item["input_noise"] = perturb(
                item["noise"], self.seed, draw.counter, input_perturbation=self.objective.input_perturbation
            )
        if "pixels" in item:
            item["posterior"] = rng.noise(self.seed, draw.counter, "posterior", shape)
        return item

    def collate(self, items: list[dict[str, Any]]) -> Batch:
        return default_collate(items)

    # The loss

    def loss(self, networks: Networks, batch: Batch) -> Losses:
        return Losses(self.losses(networks, batch).mean())

    def losses(self, networks: Networks, batch: Batch, *, weighted: bool = True) -> Tensor:
        """The mean squared error of each sample, float32 [B]; weighted by min-SNR where the objective says so."""
        objective = self.objective
        x0 = batch["x0"] if "x0" in batch else self._encoded(batch["pixels"], batch.get("posterior"))
        noised = add_noise(
            objective.schedule, x0, batch["input_noise"] if "input_noise" in batch else batch["noise"], batch["t"]
        )
        output = self.predicted(networks, noised, batch)
        weights = None
        if weighted and objective.snr_gamma is not None and isinstance(objective.schedule, NoiseSchedule):
            weights = snr_weights(objective.schedule, batch["t"], objective.snr_gamma)
        return diffusion_loss(output, target(objective.schedule, x0, batch["noise"], batch["t"]), weights)

    def predicted(self, networks: Networks, noised: Tensor, batch: Batch) -> Tensor:
        """The denoiser's output for noised latents [B, C, h, w] at `t`, with the batch's conditioning."""
        t = self.objective.schedule.times(batch["t"])
        return self.family.call(networks["unet"], noised, t, self.conditioning_arguments(networks, batch))

    def conditioning_arguments(self, networks: Networks, batch: Batch) -> dict[str, Any]:
        """The conditioning as keyword arguments of diffusers' networks."""
        if "label" in batch:
            return {"class_labels": batch["label"]}
        texts = self._texts(networks, batch)
        if not texts:
            return {}
        inputs = {"encoder_hidden_states": texts[HIDDEN]}
        if POOLED in texts:
            inputs |= {"text_embeds": texts[POOLED], "time_ids": batch["time_ids"]}
        return Conditioning(inputs).arguments()

    def _texts(self, networks: Networks, batch: Batch) -> Mapping[str, Tensor]:
        """The captions' states: cached ones, or those that the text encoders give now; {} without captions."""
        if "ids" not in batch:
            return {name: batch[name] for name in (HIDDEN, POOLED) if name in batch}
        if "text_encoder" in networks:
            return {HIDDEN: networks["text_encoder"](batch["ids"][:, 0])}
        assert self.frozen_text_encoder is not None
        with torch.no_grad():
            return {name: states.float() for name, states in self.frozen_text_encoder(batch["ids"]).items()}

    @torch.no_grad()
    def _encoded(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        """Pixels [B, 3, H, W] in 0..1 -> scaled latents; without noise the mean of the VAE's distribution."""
        assert self.vae is not None
        mean, log_variance = moments(self.vae, pixels)
        if log_variance is not None and noise is not None:
            return sample_latents(mean, log_variance, noise.cpu(), scaling_factor(self.vae)).to(pixels.device)
        return (mean * scaling_factor(self.vae)).to(pixels.device)

    def _timestep(self, counter: int) -> int:
        total = len(self.objective.schedule)
        if not self.objective.stratified:
            return int(timestep(self.seed, counter, total))
        step, place = divmod(counter, self.order.batch)
        return int(timesteps(self.seed, step, self.order.batch, total)[place])

    def _shape(self, item: Mapping[str, Tensor]) -> tuple[int, ...]:
        if "x0" in item:
            return tuple(item["x0"].shape)
        assert self.vae is not None
        height, width = item["pixels"].shape[1:]
        factor = cell(self.vae)
        return int(self.vae.config.latent_channels), height // factor, width // factor

    # Validation, with the same images, noise and timesteps in every run, so that curves can be compared

    def validate(self, networks: Networks) -> dict[str, float]:
        """The mean loss over the held-out images, and the loss at each noise level, the lowest first."""
        if not self.held_out:
            return {}
        total = len(self.objective.schedule)
        levels = [int((level + 0.5) * total / VALIDATION_TIMES) for level in range(VALIDATION_TIMES)]
        device = next(next(iter(networks.values())).parameters()).device
        sums = torch.zeros(VALIDATION_TIMES)
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, size in self.held_out:
            by_size.setdefault(size, []).append(index)
        for size, indices in by_size.items():
            for start in range(0, len(indices), VALIDATION_BATCH):
                some = indices[start : start + VALIDATION_BATCH]
                items = [{**self.source.fixed(index, size), **self.conditioning.fixed(index)} for index in some]
                fixed = {name: value.to(device) for name, value in self.collate(items).items()}
                if "x0" not in fixed:  # encoded once for all levels
                    fixed["x0"] = self._encoded(fixed["pixels"], None)
                for level, t in enumerate(levels):
                    noise = [rng.noise(level, index, "validation", fixed["x0"].shape[1:]) for index in some]
                    batch = {"t": torch.full((len(some),), t).to(device), "noise": torch.stack(noise).to(device)}
                    sums[level] += self.losses(networks, {**fixed, **batch}, weighted=False).sum().cpu()
        means = sums / len(self.held_out)
        return {
            "loss": float(means.mean()),
            **{f"loss_level_{level}": float(value) for level, value in enumerate(means)},
        }

    def samples(self, networks: Networks, step: int, folder: Path) -> list[Path]:
        return self.sample_sheet(networks, step, folder) if self.sample_sheet is not None else []

    # Files

    def save(self, folder: Path, networks: Networks, averages: Mapping[str, nn.Module]) -> None:
        """`unet/`, `unet_ema/`, `text_encoder/` and so on; of a LoRA its own files only, without the frozen network."""
        for name, network in _with_averages(networks, averages):
            if not self.loras:
                write_network(folder / name, network, network.state_dict())
        if self.loras:
            lora = {name: averages.get(name, networks[name]) for name in self.loras}
            write_lora(folder, lora, self.loras, self.family)

    def write_merged(self, folder: Path, networks: Networks, averages: Mapping[str, nn.Module]) -> None:
        """The networks with their LoRAs merged into them, as `save` writes networks without a LoRA."""
        for name, network in _with_averages(networks, averages):
            write_network(folder / name, network, merged_tensors(network))


def _with_averages(networks: Networks, averages: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """The networks and their averages by the names of their folders: `unet`, `unet_ema`."""
    return [*networks.items(), *((f"{name}_ema", network) for name, network in averages.items())]


def write_network(folder: Path, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and the weights, in the layout of diffusers or, for a text encoder, of transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(network, "save_config"):
        network.save_config(folder)  # type: ignore[operator]
        write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
    else:
        write_text_encoder(folder, network, tensors)
