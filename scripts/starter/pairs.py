"""Write drawings of 256x256 with the latents that the starter has of them, to train a larger decoder on.

    python scripts/starter/pairs.py WORK WORK/pairs --model RUN --count 6000 --seed 21

RUN is the starter with a VAE of 128x128. WORK is the folder that `sprites.py --side 256` wrote. Shard n of OUT is
nnn-images.npy, uint8 [scenes, 256, 256, 3],
and nnn-latents.npy, float16 [scenes, 3, 8, 16, 16], not scaled: the encoder's latents of the drawing at 128x128, and
those that the UNet returns after noise of a low and of a high strength was added and removed by DDIM steps with the
scene's caption. Such latents are what a decoder meets in use: nearly, but not exactly, those of a drawing. Existing
shards are kept, so that an interrupted run continues.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scenes import Composer
from torch import Tensor, nn

from sdcli.diffusion.scheduler_factory import make_scheduler
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry
from sdcli.vae.autoencoder import moments, scaling_factor

SHARD = 250
"""Scenes per shard."""
BATCH = 25
"""Scenes that the networks process at once."""
STRENGTHS = ((0.1, 0.4), (0.4, 0.85))
"""Ranges of the share of the noise schedule that is added and removed."""
STEPS = 6
"""Denoising steps of the whole schedule; a part of it takes its share of them."""
GUIDANCE = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder that `sprites.py --side 256` wrote")
    parser.add_argument("out", type=Path, help="the folder for the shards")
    parser.add_argument("--count", type=int, default=8000, help="number of scenes (%(default)s)")
    parser.add_argument("--seed", type=int, default=21, help="random seed (%(default)s)")
    parser.add_argument("--model", required=True, help="the model whose latents these are, for images of 128x128")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    composer = Composer(chosen.work)
    if composer.scale != 2:
        parser.error(f"the sprites in {chosen.work} have {composer.sprites.shape[1]} pixels per side, not 256")
    denoise = Denoise(load_model(load_registry().find(chosen.model), device="cpu", dtype="float32"))
    for start in range(0, chosen.count, SHARD):
        if (chosen.out / f"{start // SHARD:03d}-latents.npy").exists():
            continue
        began = time.monotonic()
        images, latents = shard(composer, denoise, chosen.seed, range(start, min(start + SHARD, chosen.count)))
        for name, array in (("images", images), ("latents", latents)):  # the latents last: they mark a whole shard
            partial = chosen.out / f"{start // SHARD:03d}-{name}.partial"
            with partial.open("wb") as file:
                np.save(file, array)
            partial.rename(partial.with_suffix(".npy"))
        print(f"{start + len(images)} of {chosen.count}, {time.monotonic() - began:.0f} s", flush=True)


def shard(composer: Composer, denoise: Denoise, seed: int, numbers: range) -> tuple[np.ndarray, np.ndarray]:
    """Images and latents of scenes by number."""
    images, latents = [], []
    for start in range(0, len(numbers), BATCH):
        some = numbers[start : start + BATCH]
        drawn = [composer.scene(seed, number) for number in some]
        sources = [random.Random(f"pairs {seed}/{number}") for number in some]
        captions = [source.choice(scene.captions) for (scene, _), source in zip(drawn, sources, strict=True)]
        pixels = np.stack([image for _, image in drawn])
        clean = denoise.encode(halved(pixels))
        returned = [
            denoise(clean, captions, [source.uniform(low, high) for source in sources], seed=seed * 10**7 + some[0])
            for low, high in STRENGTHS
        ]
        images.append(pixels)
        latents.append(torch.stack([clean, *returned], dim=1).half().numpy())
    return np.concatenate(images), np.concatenate(latents)


def halved(images: np.ndarray) -> Tensor:
    """uint8 [n, 256, 256, 3] -> [n, 3, 128, 128] in 0..1, each pixel the mean of four."""
    count, height, width, _ = images.shape
    means = images.reshape(count, height // 2, 2, width // 2, 2, 3).mean(axis=(2, 4))
    return torch.from_numpy(means).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Denoise:
    """Adds noise to latents and lets the model remove it: `(latents, captions, strengths)` -> latents, not scaled."""

    model: LoadedModel

    @torch.inference_mode()
    def __call__(self, latents: Tensor, captions: list[str], strengths: list[float], *, seed: int) -> Tensor:
        alphas = make_scheduler("ddim", self.model.scheduler_config).alphas_cumprod
        states, empty = self.text_states(captions), self.text_states([""])
        scaled = latents * scaling_factor(self.model.vae)
        noise = torch.randn(scaled.shape, generator=torch.Generator().manual_seed(seed))
        found = torch.empty_like(scaled)
        counts = torch.tensor([max(1, round(strength * STEPS)) for strength in strengths])
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero().flatten()
            start = torch.tensor([strengths[row] for row in rows.tolist()]) * (len(alphas) - 1)
            both = torch.cat([empty.expand(len(rows), -1, -1), states[rows]])
            times = [(start * (count - step) / count).round().long() for step in range(count)]
            a, s = _signal_and_noise(alphas, times[0])
            x = a * scaled[rows] + s * noise[rows]
            for step, t in enumerate(times):
                unguided, guided = self.model.unet(
                    torch.cat([x, x]), torch.cat([t, t]), encoder_hidden_states=both, return_dict=False
                )[0].chunk(2)
                v = unguided + GUIDANCE * (guided - unguided)
                a, s = _signal_and_noise(alphas, t)
                clean, eps = a * x - s * v, s * x + a * v
                if step + 1 < count:
                    a, s = _signal_and_noise(alphas, times[step + 1])
                    x = a * clean + s * eps
                else:
                    x = clean
            found[rows] = x
        return found / scaling_factor(self.model.vae)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [n, 3, 128, 128] in 0..1 -> latents [n, 8, 16, 16], not scaled."""
        return moments(self.model.vae, pixels)[0]

    def text_states(self, captions: list[str]) -> Tensor:
        """The text encoder's states, [n, tokens, width]."""
        tokenizer = next(iter(self.model.tokenizers.values()))
        encoder: nn.Module = self.model.text_encoder
        return encoder(torch.tensor([tokenizer(caption).ids for caption in captions]))


def _signal_and_noise(alphas: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of signal and noise at timesteps [n], each [n, 1, 1, 1]."""
    signal = alphas[t].view(-1, 1, 1, 1)
    return signal.sqrt(), (1 - signal).sqrt()


if __name__ == "__main__":
    main()
