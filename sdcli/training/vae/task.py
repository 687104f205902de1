"""`sdcli train-vae`: train an autoencoder to compress images into latents and to reconstruct them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import default_collate

from sdcli.errors import BadOutput, UsageError
from sdcli.images import metrics
from sdcli.images.contact_sheet import contact_sheet, write_sheet
from sdcli.images.pixels import from_pixels
from sdcli.io import rng
from sdcli.io.lean_diffusers import VAE
from sdcli.training.inputs.order import Order
from sdcli.training.inputs.sources import ImageSource
from sdcli.training.task import Batch, Draw, Losses, Networks, OptimizerPhase
from sdcli.training.unet.task import write_network
from sdcli.training.vae import losses
from sdcli.training.vae.losses import LPIPS, PatchDiscriminator
from sdcli.vae.autoencoder import cell, has_distribution, latent_channels, moments

VALIDATION_BATCH = 16
"""Images per batch of validation ..."""
VALIDATION_PIXELS = 256 * 256 * VALIDATION_BATCH
"""... or fewer if they are larger than 256x256: validation should not need more memory than training with batches of
one image."""
SHEET_IMAGES = 8
"""Images on a sample sheet."""
MEASURED_IMAGES = 256
"""Images on which the scaling factor is measured, spread over the data ..."""
MEASURED_PIXELS = 256 * 256 * MEASURED_IMAGES
"""... or fewer if they are larger than 256x256, because it is measured at every checkpoint. 64 images of 512x512 have a
million latents."""

HURRIED_IMAGES = 8
"""The same where the run is about to be killed, so that its checkpoint is not too late; the next one measures again."""


@dataclass(frozen=True)
class VaeObjective:
    """The weights of the loss terms in `losses.py`, per value of an image in -1..1.

    The discriminator's weight is constant, unlike latent diffusion's ratio of two gradients, which would depend on the
    size of micro-batches.
    """

    l1: float = 1.0
    structure: float = 0.5
    kl: float = 1e-6
    """For a VAE with a distribution (AutoencoderKL); as in latent diffusion (see `losses.kl`)."""
    latents_regularisation: float = 3e-3
    """For a VAE without a distribution (AutoencoderTiny)."""
    latent_noise: float = 0.07
    """For a VAE without a distribution: the standard deviation of noise added before decoding, because a denoiser's
    latents are never free of noise."""
    lpips: float = 1.0
    discriminator: float = 0.05
    discriminator_start: int = 0
    """The step from which the discriminator is trained and its term counts."""


class Autoencoding(nn.Module):
    """A VAE whose `forward` does everything for training, so that autocast, DDP and torch.compile see one call.

    It has the VAE's sub-modules under their own names, so parameters and state_dict are those of the plain VAE.
    (AutoencoderKL's own `forward` does not return its moments, AutoencoderTiny's rounds latents to bytes, which stops
    gradients.)
    """

    plain: VAE

    def __init__(self, vae: VAE, *, latent_noise: float) -> None:
        super().__init__()
        # not as a sub-module
        object.__setattr__(self, "plain", vae)
        self.latent_noise = latent_noise
        for name, part in vae.named_children():
            self.add_module(name, part)

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images [B, 3, H, W] in -1..1 and normal noise [B, C, h, w] -> reconstructions of sampled latents, the
        latents' mean, and their log variance if the VAE has one."""
        vae = self.plain
        output = vae.encode(pixels)
        if has_distribution(vae):
            mean, logvar = output.latent_dist.mean, output.latent_dist.logvar
            latents = mean + torch.exp(0.5 * logvar) * noise
        else:
            mean, logvar = output.latents, None
            latents = mean + self.latent_noise * noise
        return vae.decode(latents).sample, mean, logvar


@dataclass
class VaeTask:
    """The task of `train-vae`; see `task.Task`. `networks` has "vae", and "discriminator" if there is one.

    The VAE is in float32, its parameters with gradients. Raises UsageError for combinations that cannot be trained.
    """

    vae: VAE
    source: ImageSource
    """Gives `pixels` (`sources.Pixels`)."""
    order: Order
    seed: int
    learning_rate: float
    objective: VaeObjective = field(default_factory=VaeObjective)
    held_out: Sequence[tuple[int, tuple[int, int]]] = ()
    """Indices of the validation images, each with its width and height."""
    lpips: LPIPS | None = None
    discriminator: bool = False
    discriminator_channels: int = 64
    name_of: Callable[[int], str] = str
    hurried: bool = field(init=False, default=False)
    networks: dict[str, nn.Module] = field(init=False)
    averaged: tuple[str, ...] = field(init=False, default=("vae",))
    phases: Sequence[OptimizerPhase] = field(init=False)

    def __post_init__(self) -> None:
        if not has_distribution(self.vae) and self.vae.encoder.gradient_checkpointing:
            # diffusers 0.42's EncoderTiny forgets to bring -1..1 to 0..1 in that branch
            raise UsageError("--gradient-checkpointing does not work with an AutoencoderTiny; it is small without")
        for name, used, minimum in (
            ("the discriminator", self.discriminator, losses.SMALLEST_FOR_DISCRIMINATOR),
            ("LPIPS", self.lpips is not None, losses.SMALLEST_FOR_LPIPS),
        ):
            if used and self._shortest_side() < minimum:
                raise UsageError(
                    f"{name} needs images of at least {minimum} pixels per side, not {self._shortest_side()}"
                )
        self.networks = {"vae": Autoencoding(self.vae, latent_noise=self.objective.latent_noise)}
        phases = [OptimizerPhase("vae", [self._group("vae")], self.loss)]
        if self.discriminator:
            self.networks["discriminator"] = PatchDiscriminator(seed=self.seed, channels=self.discriminator_channels)
            phases.append(OptimizerPhase("discriminator", [self._group("discriminator")], self.discriminator_loss))
        self.phases = tuple(phases)

    def _shortest_side(self) -> int:
        """The shortest side of all training and validation images, in pixels."""
        return min(
            min(size) for size in (*self.order.buckets, *(size for _, size in self.held_out)) if size is not None
        )

    def _group(self, name: str) -> dict[str, Any]:
        parameters = {key: p for key, p in self.networks[name].named_parameters() if p.requires_grad}
        return {"name": name, "params": parameters, "lr": self.learning_rate}

    # Samples

    def draws(self, step: int) -> list[Draw]:
        return self.order.draws(step)

    def item_name(self, index: int) -> str:
        return self.name_of(index)

    def item(self, draw: Draw) -> dict[str, Any]:
        """`pixels` [3, H, W] in 0..1, `noise` [C, h, w] to sample latents with, and the step's number."""
        pixels = self.source.item(draw)["pixels"]
        noise = rng.noise(self.seed, draw.counter, "posterior", self._latents_of(pixels))
        return {"pixels": pixels, "noise": noise, "step": draw.counter // self.order.batch}

    def collate(self, items: list[dict[str, Any]]) -> Batch:
        """Stack the tensors; `step` stays a number, because reading a tensor would wait for the device."""
        tensors = [{name: item[name] for name in ("pixels", "noise")} for item in items]
        return {**default_collate(tensors), "step": items[0]["step"]}

    def _latents_of(self, pixels: Tensor) -> tuple[int, int, int]:
        factor = cell(self.vae)
        return latent_channels(self.vae), pixels.shape[-2] // factor, pixels.shape[-1] // factor

    # The losses

    def loss(self, networks: Networks, batch: Batch) -> Losses:
        """The VAE's loss."""
        pixels = batch["pixels"] * 2 - 1
        reconstructed, mean, logvar = networks["vae"](pixels, batch["noise"])
        terms = self._terms(pixels, reconstructed, mean, logvar)
        if self.discriminator:
            terms["adversarial"] = (self.objective.discriminator, self._adversarial(reconstructed, batch["step"]))
        loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
        return Losses(loss, {name: term.detach() for name, (_, term) in terms.items()})

    def _terms(
        self, pixels: Tensor, reconstructed: Tensor, mean: Tensor, logvar: Tensor | None
    ) -> dict[str, tuple[float, Tensor]]:
        """Each term's weight and its mean over the images."""
        objective = self.objective
        terms = {"l1": (objective.l1, losses.reconstruction(pixels, reconstructed).mean())}
        if objective.structure:
            terms["structure"] = (objective.structure, losses.structure(pixels, reconstructed).mean())
        if logvar is not None:
            terms["kl"] = (objective.kl, losses.kl(mean, logvar).mean() / pixels[0].numel())
        elif objective.latents_regularisation:
            terms["latents"] = (objective.latents_regularisation, losses.latents_regularisation(mean))
        if self.lpips is not None:
            lpips = self.lpips.to(pixels.device)
            terms["lpips"] = (objective.lpips, lpips(pixels, reconstructed).mean())
        return terms

    def _adversarial(self, reconstructed: Tensor, step: int) -> Tensor:
        """The adversarial term. The discriminator is called with detached parameters, and outside DDP, which expects a
        backward pass through all of them."""
        if step < self.objective.discriminator_start:
            return torch.zeros((), device=reconstructed.device)
        discriminator = self.networks["discriminator"]
        fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
        return losses.adversarial(functional_call(discriminator, fixed, (reconstructed,))).mean()

    def discriminator_loss(self, networks: Networks, batch: Batch) -> Losses:
        """The discriminator's loss, against the VAE after its optimizer step (as in LDM)."""
        pixels = batch["pixels"] * 2 - 1
        if batch["step"] < self.objective.discriminator_start:
            # not connected to a parameter, so that none has a gradient and the optimizer changes nothing
            zero = torch.zeros((), device=pixels.device)
            return Losses(zero.clone().requires_grad_(), {"real": zero, "fake": zero})
        with torch.no_grad():
            reconstructed = networks["vae"](pixels, batch["noise"])[0]
        # one forward pass, as DDP expects before each backward pass
        real, fake = networks["discriminator"](torch.cat([pixels, reconstructed.float()])).chunk(2)
        loss = losses.hinge(real, fake).mean()
        return Losses(loss, {"real": real.detach().float().mean(), "fake": fake.detach().float().mean()})

    # Validation, with the mean latents and so without randomness

    def validate(self, networks: Networks) -> dict[str, float]:
        """Over the held-out images: the loss (without the discriminator), PSNR in decibels, SSIM, L1 (as in
        training, of images in -1..1), and mean and standard deviation of the latents, over all and per channel.
        SSIM is left out if images are smaller than its window."""
        if not self.held_out:
            return {}
        vae = plain(networks)
        device = next(vae.parameters()).device
        scores = {"psnr": metrics.psnr}
        if self._shortest_side() >= metrics.WINDOW:
            scores["ssim"] = metrics.ssim
        sums: dict[str, float] = {}
        statistics = _LatentStatistics()
        for pixels in self._batches(self.held_out):
            mean, logvar = moments(vae, pixels)
            reconstructed = _decoded(vae, mean)
            statistics.add(mean, logvar)
            terms = self._terms(
                (pixels * 2 - 1).to(device),  # LPIPS is slow elsewhere
                (reconstructed * 2 - 1).to(device),
                mean.to(device),
                None if logvar is None else logvar.to(device),
            )
            figures = {
                "loss": sum(weight * float(term) for weight, term in terms.values()),
                **{name: float(score(pixels, reconstructed).mean()) for name, score in scores.items()},
                **{name: float(term) for name, (_, term) in terms.items()},
            }
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + value * len(pixels)
        means = {name: value / len(self.held_out) for name, value in sums.items()}
        return {**means, **statistics.figures()}

    def samples(self, networks: Networks, step: int, folder: Path) -> list[Path]:
        """A sheet of held-out images (of the first trained ones if none are held out) above their reconstructions."""
        vae = plain(networks)
        chosen = (
            list(self.held_out[:SHEET_IMAGES])
            or list(dict.fromkeys((draw.index, draw.size) for draw in self.draws(0) if draw.size is not None))[
                :SHEET_IMAGES
            ]
        )
        originals, reconstructed, decibels = [], [], []
        for index, size in chosen:
            pixels = self.source.fixed(index, size)["pixels"][None]
            returned = _decoded(vae, moments(vae, pixels)[0])
            if not returned.isfinite().all():
                raise BadOutput("the VAE's reconstructions are not finite")
            originals.append(from_pixels(pixels[0]))
            reconstructed.append(from_pixels(returned[0]))
            decibels.append(float(metrics.psnr(pixels, returned)))
        names = [self.name_of(index) for index, _ in chosen]
        sheet = contact_sheet(
            [*originals, *reconstructed],
            columns=len(chosen),
            labels=[*names, *(f"{value:.1f} dB" for value in decibels)],
            enlarge=max(1, 64 // originals[0].width),
        )
        path = folder / f"step-{step}.png"
        facts = {"step": step, "pictures": names, "psnr": decibels}
        return [path, *write_sheet(path, sheet, facts, overwrite=True)]

    def _batches(self, chosen: Sequence[tuple[int, tuple[int, int]]]) -> Iterator[Tensor]:
        """Batches of images of equal size, [b, 3, H, W] in 0..1, without randomness."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, size in chosen:
            by_size.setdefault(size, []).append(index)
        for (width, height), indices in by_size.items():
            count = max(1, min(VALIDATION_BATCH, VALIDATION_PIXELS // (width * height)))
            for start in range(0, len(indices), count):
                some = indices[start : start + count]
                yield torch.stack([self.source.fixed(index, (width, height))["pixels"] for index in some])

    # Files

    def save(self, folder: Path, networks: Networks, averages: Mapping[str, nn.Module]) -> None:
        """`vae/` and `vae_ema/`, each with its own scaling factor in config.json, so that every checkpoint is a valid
        model. The configuration of the VAE in memory does not change. Raises BadOutput."""
        for name, some in (("vae", networks), ("vae_ema", averages)):
            if "vae" not in some:
                continue
            vae = plain(some)
            factor = measure_scaling_factor(vae, self._batches(self._measured()))
            write_network(folder / name, vae, vae.state_dict())
            _set_in_config(folder / name / "config.json", scaling_factor=factor)

    def _measured(self) -> list[tuple[int, tuple[int, int]]]:
        """The images on which the scaling factor is measured: the same ones at all steps, spread over the data."""
        everything = sorted(
            (int(index), size) for size, indices in self.order.buckets.items() if size is not None for index in indices
        )
        average = sum(width * height for _, (width, height) in everything) / len(everything)
        most = HURRIED_IMAGES if self.hurried else MEASURED_IMAGES
        count = max(1, min(len(everything), most, int(MEASURED_PIXELS / average)))
        return [everything[place * len(everything) // count] for place in range(count)]


def plain(networks: Mapping[str, nn.Module]) -> VAE:
    """The plain VAE within the task's networks or their averages."""
    network = networks["vae"]
    assert isinstance(network, Autoencoding)
    return network.plain


def measure_scaling_factor(vae: VAE, pixels: Iterable[Tensor]) -> float:
    """1 / the standard deviation of the latents of batches of images [b, 3, H, W] in 0..1.

    Rombach et al. 2022 (arXiv 2112.10752), appendix G: over all images, channels and places together, about their
    common mean. The variance of latents sampled from the VAE's distribution is that of the means plus the mean of the
    variances, so no sampling is needed and equal weights give an equal factor. An AutoencoderTiny's latents are their
    own means. Raises BadOutput for latents that are not finite or all equal.
    """
    statistics = _LatentStatistics()
    for some in pixels:
        statistics.add(*moments(vae, some))
    std = statistics.std()
    if not 0 < std < float("inf"):
        raise BadOutput(f"the standard deviation of the VAE's latents is {std}; so there is no scaling factor")
    return 1 / std


@dataclass
class _LatentStatistics:
    """Running sums over latents for their mean and standard deviation, in float64, each [C]."""

    count: int = 0
    """The number of latents per channel."""
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    variances: Tensor | float = 0.0

    def add(self, mean: Tensor, logvar: Tensor | None) -> None:
        values = mean.double().transpose(0, 1).flatten(1)
        self.count += values.shape[1]
        self.total = self.total + values.sum(dim=1)
        self.squares = self.squares + values.square().sum(dim=1)
        if logvar is not None:
            self.variances = self.variances + logvar.double().exp().transpose(0, 1).flatten(1).sum(dim=1)

    def std(self) -> float:
        """The standard deviation of all latents."""
        mean = torch.as_tensor(self.total).mean() / self.count
        second = (torch.as_tensor(self.squares) + self.variances).mean() / self.count
        return float((second - mean**2).clamp(min=0).sqrt())

    def figures(self) -> dict[str, float]:
        """Mean and standard deviation of all latents, and of each channel."""
        total = torch.as_tensor(self.total) / self.count
        second = (torch.as_tensor(self.squares) + self.variances) / self.count
        channels = {
            f"latents_{what}_{channel}": float(value)
            for what, values in (("mean", total), ("std", (second - total**2).clamp(min=0).sqrt()))
            for channel, value in enumerate(values)
        }
        return {"latents_mean": float(total.mean()), "latents_std": self.std(), **channels}


@torch.inference_mode()
def _decoded(vae: VAE, latents: Tensor) -> Tensor:
    """Decode unscaled latents to pixels in 0..1, float32 on the CPU."""
    pixels = vae.decode(latents.to(next(vae.parameters())), return_dict=False)[0]
    return (pixels.float().cpu() / 2 + 0.5).clamp(0, 1)


def _set_in_config(path: Path, **changes: Any) -> None:
    """Change entries of a config.json, in the format that diffusers writes."""
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
