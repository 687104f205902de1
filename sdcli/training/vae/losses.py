"""The losses of VAE training: pixels, edges, regularisation of latents, and optionally LPIPS and a discriminator.

Images are [B, 3, H, W] in -1..1, as a VAE takes and returns them. Every loss is one number per image, float32 [B], so
that the mean over micro-batches and processes equals that over the whole batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcli.errors import BadWeights, NotFound
from sdcli.io import rng
from sdcli.io.pickles import pickle_refused
from sdcli.io.weight_files import check_header
from sdcli.io.weights import fill, read_tensors

SCALES = 4
"""The number of scales that `structure` compares: full size, half, quarter, eighth."""


def reconstruction(pixels: Tensor, reconstructed: Tensor) -> Tensor:
    """The mean absolute error, [B]."""
    return (pixels.float() - reconstructed.float()).abs().flatten(1).mean(dim=1)


def structure(pixels: Tensor, reconstructed: Tensor) -> Tensor:
    """Multi-scale gradient matching, [B]: the mean absolute difference of the slopes, averaged over scales.

    L1 alone tolerates blurred edges. The slopes of the error at several scales detect edges that are too soft or
    misplaced: Mathieu et al. 2016 (arXiv 1511.05440, section 3.2) compare the slopes of an image, Li &
    Snavely 2018 (MegaDepth, arXiv 1804.00607, eq. 4) those of the error at four scales, as here. Chosen over 1 - SSIM
    because its gradient is as strong in flat regions as elsewhere (SSIM divides by a local variance, which is zero on a
    white background), it is cheap, and SSIM remains an independent metric in validation.
    """
    error = pixels.float() - reconstructed.float()
    total = torch.zeros(len(error), device=error.device)
    scales = 0
    while scales < SCALES and min(error.shape[2:]) >= 2:
        across = (error[..., :, 1:] - error[..., :, :-1]).abs().flatten(1).mean(dim=1)
        down = (error[..., 1:, :] - error[..., :-1, :]).abs().flatten(1).mean(dim=1)
        total = total + (across + down) / 2
        error = F.avg_pool2d(error, 2)
        scales += 1
    return total / max(1, scales)


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over an image's latents [B, C, h, w] -> [B].

    Kingma & Welling 2013 (arXiv 1312.6114), appendix B. Latent diffusion (Rombach et al. 2022, arXiv 2112.10752,
    appendix G) adds 1e-6 of this sum to the reconstruction error summed over the image's pixels.
    """
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1)


def latents_regularisation(latents: Tensor) -> Tensor:
    """How far the latents [B, C, h, w] are from mean 0 and standard deviation 1 in each channel; a scalar.

    For a VAE without a distribution, whose decoder clips latents softly at 3. It is computed over a micro-batch, as one
    image's latents need not have mean 0, so it is the only term that depends on the size of micro-batches.
    """
    values = latents.float().transpose(0, 1).flatten(1)
    mean = values.mean(dim=1)
    std = (values - mean[:, None]).square().mean(dim=1).add(1e-8).sqrt()
    return (mean.square() + (std - 1).square()).mean()


# LPIPS

SMALLEST_FOR_LPIPS = 16
"""Pixels per side, of which four halvings leave one."""
WIDTHS = (64, 128, 256, 512, 512)
"""Channels of VGG16's five stages."""
CONVOLUTIONS = (2, 2, 3, 3, 3)


class LPIPS(nn.Module):
    """The learned perceptual distance of Zhang et al. 2018 (arXiv 1801.03924, eq. 1), version 0.1 on VGG16.

    The squared difference of unit-length features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, weighted per
    channel, averaged over the image and summed. The weights are random until `load_lpips` loads them; the parameters
    have the names in its files.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends: list[int] = []
        channels = 3
        for stage, (width, count) in enumerate(zip(WIDTHS, CONVOLUTIONS, strict=True)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.ends.append(len(layers))
        self.features = nn.Sequential(*layers)  # numbered as in torchvision's vgg16
        for stage, width in enumerate(WIDTHS):
            self.add_module(f"lin{stage}", _ChannelWeights(width))
        # the mean and deviation of ImageNet, for images in -1..1
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor, other: Tensor) -> Tensor:
        """Images [B, 3, H, W] in -1..1, at least 16 pixels per side -> distances [B]; 0 for equal images."""
        total = torch.zeros(len(pixels), device=pixels.device)
        for stage, (one, two) in enumerate(zip(self._stages(pixels), self._stages(other), strict=True)):
            weights = self.get_submodule(f"lin{stage}")
            total = total + weights((_unit(one) - _unit(two)).square()).flatten(1).mean(dim=1)
        return total

    def _stages(self, pixels: Tensor) -> Iterator[Tensor]:
        x = (pixels.float() - self.shift) / self.scale  # type: ignore[operator]
        start = 0
        for end in self.ends:
            x = self.features[start:end](x)
            start = end
            yield x


class _ChannelWeights(nn.Module):
    """A weight per channel, called `model.1.weight` in the files because a dropout layer precedes it in training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _unit(features: Tensor) -> Tensor:
    """Features normalised to length 1 at each place. Epsilon is under the root, so that the slope at 0 is finite."""
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()


_STORED = re.compile(r"(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))|(lin\d\.model\.1\.weight)")


def load_lpips(path: Path) -> LPIPS:
    """Load LPIPS from a .safetensors file or from all of a folder; float32, frozen, never downloaded.

    Expected are torchvision's VGG16 (`features.0.weight` [64, 3, 3, 3], `features.0.bias`, ... `features.28.bias`; in
    a saved `lpips.LPIPS(net="vgg")` they are called `net.slice1.0.weight` and so on, which works, too) and the
    linear layers of lpips 0.1 (`lin0.model.1.weight` [1, 64, 1, 1] to `lin4.model.1.weight`). Other
    tensors (VGG16's classifier) are ignored. Raises NotFound, and BadWeights for missing tensors or other shapes.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        pickles = sorted(file for file in path.iterdir() if file.suffix in {".pth", ".pt", ".bin"})
    else:
        files, pickles = ([path], []) if path.is_file() else ([], [])
    if not files:
        if pickles:
            raise BadWeights(pickle_refused(pickles[0]))
        raise NotFound(
            f"no LPIPS weights at {path}: expected a .safetensors file, or a folder of them, with VGG16's "
            "features.*.weight and LPIPS' lin0.model.1.weight to lin4.model.1.weight"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        check_header(file)
        tensors |= read_tensors(file, torch.float32, rename=_own_name)
    network = LPIPS().eval()
    fill(network, tensors, source=str(path))
    return network


def _own_name(stored: str) -> str | None:
    match = _STORED.fullmatch(stored)
    if match is None:
        return None
    return match[2] or f"features.{match[1]}"


# The discriminator

SMALLEST_FOR_DISCRIMINATOR = 24
"""Pixels per side."""


class PatchDiscriminator(nn.Module):
    """PatchGAN of Isola et al. 2017 (arXiv 1611.07004, appendix 6.1.2): a logit for every patch of 70x70 pixels.

    It has three strided layers, as in latent diffusion. Instance norm is what pix2pix had in effect, with batches of
    one; with batch norm the logits would depend on the other images of a micro-batch, and so on accumulation and the
    number of processes.
    """

    def __init__(self, *, seed: int, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for number in range(1, layers + 1):
            stride = 2 if number < layers else 1
            parts += [
                nn.Conv2d(widths[number - 1], widths[number], 4, stride=stride, padding=1, bias=False),
                nn.InstanceNorm2d(widths[number], affine=True),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        generator = torch.Generator().manual_seed(rng.key(seed, 0, "discriminator"))
        for part in self.layers:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=0.02, generator=generator)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, H, W] in -1..1, at least 24 pixels per side -> logits [B, 1, h, w]; above 0 looks real."""
        return self.layers(pixels)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss from its logits, [B]; Lim & Ye 2017 (arXiv 1705.02894), half of it as in LDM."""
    missed = F.relu(1 - real.float()).flatten(1).mean(dim=1)
    fooled = F.relu(1 + fake.float()).flatten(1).mean(dim=1)
    return (missed + fooled) / 2


def adversarial(fake: Tensor) -> Tensor:
    """The VAE's adversarial loss from the logits of reconstructions, [B]: lower for more realistic ones."""
    return -fake.float().flatten(1).mean(dim=1)
