"""Give the starter's VAE twice the resolution: 256x256 pixels for the same latents, so that the UNet stays as it is.

    python scripts/starter/enlarge.py WORK WORK/vae256 --model RUN --steps 3700

RUN is the starter with a VAE of 128x128, the last run of recipes/starter/cpu. WORK is the folder that sprites.py,
pairs.py (WORK/pairs and, of another seed, WORK/check) and perception.py wrote.
Encoder and decoder get one more stage each and start from the starter's weights: at first the encoder returns nearly
the latents that it had for the image reduced to 128x128, and the decoder an enlarged image. The encoder learns to
return exactly those latents. The decoder learns to draw the drawing from its latents and from those that the UNet
returns for it: L1 and multi-scale gradients (sdcli.training.vae.losses), the distance in the features of perception.py,
and a patch discriminator. The gradients of the last two are scaled to a share of the first two's (Esser et al. 2021,
arXiv 2012.09841, eq. 7, for the discriminator), and they start later: WORK/perception.pt is needed only then.

The first stages of the decoder see whole latents, the later, larger ones a window of 128x128 pixels. OUT receives
vae/ (the moving average, as diffusers stores it), state.pt, log.jsonl and sheets of held-out scenes. Every five
minutes and when it is interrupted, the state is saved; the same command continues.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderTiny
from pairs import halved
from perception import Perception, load_perception, save
from PIL import Image
from sharpness import outline_width
from torch import Tensor, nn
from torch.nn import functional as F

from sdcli.images.contact_sheet import contact_sheet
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry
from sdcli.training.vae import losses
from sdcli.vae.autoencoder import cell

CELL = 8
"""Pixels a side of a latent cell of the VAE that is enlarged."""
WINDOW = 128
"""Pixels per side of the windows that the decoder is trained on."""
STRIDE = 8
"""Pixels per cell of the states in the decoder from which a window is cut."""
SHARES = (0.35, 0.35, 0.3)
"""Shares of latents in the decoder's training: the encoder's, and the UNet's after little and much noise."""
TRUST = (1.0, 0.7, 0.3)
"""For the same, the weight of the difference to the drawing: after much noise the latents are of a slightly different
one, for which the least error is a blur. The discriminator wants all to be sharp."""
L1, STRUCTURE = 1.0, 0.5
"""Weights of losses."""
PERCEPTION, ADVERSARIAL = 1.0, 0.5
"""The norms of these losses' gradients relative to that of L1 and structure together."""
DECAY = 0.998
"""Of the moving average of the weights."""
SAVE_SECONDS = 300
CHECK_STEPS = 500


@dataclass(frozen=True)
class Plan:
    """How long to train, in steps, and with how many windows per step."""

    steps: int
    batch: int
    encoder_steps: int
    """The encoder is trained in this many steps, the first ones."""
    sharpen_start: int
    """The first step with the perceptual loss and the discriminator."""

    def rate(self, step: int, *, encoder: bool) -> float:
        """The learning rate as a share of the highest: a warm-up, and linearly to zero in the last 30 %."""
        steps = self.encoder_steps if encoder else self.steps
        return min(1.0, (step + 1) / 100, max(0.0, (steps - step) / max(1, 0.3 * steps)))


# The networks


def enlarged(vae: AutoencoderTiny) -> AutoencoderTiny:
    """An AutoencoderTiny of one more stage, which starts as `vae` behind a reduction and before an enlargement."""
    config = dict(vae.config)
    width = config["encoder_block_out_channels"][0]
    blocks = {name: tuple(config[name]) for name in ("num_encoder_blocks", "num_decoder_blocks")}
    widths = {
        f"{name}_block_out_channels": (width,) * (len(blocks[f"num_{name}_blocks"]) + 1)
        for name in ("encoder", "decoder")
    }
    new = AutoencoderTiny(
        **{
            **{
                name: value
                for name, value in config.items()
                if not name.startswith("_") and name != "block_out_channels"
            },
            **widths,
            "num_encoder_blocks": (0, *blocks["num_encoder_blocks"]),
            "num_decoder_blocks": (*blocks["num_decoder_blocks"][:-1], 1, 0),
        }
    )
    _start_encoder(new.encoder.layers, vae.encoder.layers)
    _start_decoder(new.decoder.layers, vae.decoder.layers)
    return new.requires_grad_(False)


@torch.no_grad()
def _start_encoder(new: nn.Sequential, old: nn.Sequential) -> None:
    """Two convolutions, the second with stride 2, that compute the old first convolution of the reduced image.

    The first copies every pixel of its 3x3 window into a channel of its own (and a constant 1 for the old bias), so
    that the second, which sees 3x3 of those, has all weights of a 5x5 window. Reduced by two, the old 3x3 window is one
    of 6x6 pixels; the outermost row and column are replaced by their neighbours.
    """
    copies, reduction, first = new[0], new[1], old[0]
    copies.weight[:27], copies.bias[:28] = 0, 0
    reduction.weight.zero_()
    for colour in range(3):
        for y in range(3):
            for x in range(3):
                copies.weight[colour * 9 + y * 3 + x, colour, y, x] = 1
    copies.weight[27], copies.bias[27] = 0, 1
    reduction.weight[:, 27, 1, 1] = first.bias
    # offset in the large image -> tap of the reduction, tap of the copies
    taps = {-2: (0, 0), -1: (0, 1), 0: (1, 1), 1: (1, 2), 2: (2, 2)}
    for y in range(3):
        for x in range(3):
            for down in (2 * (y - 1), 2 * (y - 1) + 1):
                for right in (2 * (x - 1), 2 * (x - 1) + 1):
                    (b, d), (c, e) = taps[min(down, 2)], taps[min(right, 2)]
                    for colour in range(3):
                        reduction.weight[:, colour * 9 + d * 3 + e, b, c] += first.weight[:, colour, y, x] / 4
    for number, layer in enumerate(list(old)[1:]):
        new[2 + number].load_state_dict(layer.state_dict())


@torch.no_grad()
def _start_decoder(new: nn.Sequential, old: nn.Sequential) -> None:
    """The old layers; a block whose first three channels are the old image; and convolutions that copy those.

    The block adds to its input h what its three convolutions return, and has a ReLU after each. Carried through them
    are the image (not negative), h and -h of three channels, and what comes out is image - h. The other channels start
    with small random weights.
    """
    end = len(old) - 1
    for number, layer in enumerate(list(old)[:end]):
        new[number].load_state_dict(layer.state_dict())
    block, copies, last, image = new[end], new[-2], new[-1], old[end]
    first, second, third = (layer for layer in block.conv if isinstance(layer, nn.Conv2d))
    carried, three = torch.arange(9), torch.arange(3)
    first.weight[:9], first.bias[:9] = 0, 0
    first.weight[:3], first.bias[:3] = image.weight, image.bias
    first.weight[3 + three, three, 1, 1] = 1
    first.weight[6 + three, three, 1, 1] = -1
    second.weight[:9], second.bias[:9] = 0, 0
    second.weight[carried, carried, 1, 1] = 1
    third.weight.mul_(0.1)
    third.weight[:3], third.bias[:3] = 0, 0
    for start, sign in ((0, 1), (3, -1), (6, 1)):
        third.weight[three, start + three, 1, 1] = sign
    copies.weight[:3] = 0
    copies.weight[three, three, 1, 1] = 1
    last.weight.mul_(0.02)
    last.bias.zero_()
    last.weight[:, :3] = 0
    last.weight[three, three, 1, 1] = 1


def decode_window(decoder: nn.Module, latents: Tensor, windows: Tensor) -> Tensor:
    """Decode one window of each latent [B, 8, 16, 16] -> [B, 3, 128, 128] in about -1..1; `windows` [B, 2] in cells."""
    layers = decoder.layers
    split = [number for number, layer in enumerate(layers) if isinstance(layer, nn.Upsample)][1]
    states = layers[:split](torch.tanh(latents / 3) * 3)  # as DecoderTiny.forward
    side = WINDOW // STRIDE
    cut = [one[:, y : y + side, x : x + side] for one, (y, x) in zip(states, windows.tolist(), strict=True)]
    return layers[split:](torch.stack(cut)) * 2 - 1


# Data


class Batch(NamedTuple):
    """Windows of B drawings, and the latents of the drawings."""

    latents: Tensor
    """[B, 8, 16, 16]"""
    windows: Tensor
    """[B, 2]: top and left in cells."""
    pixels: Tensor
    """[B, 3, 128, 128] in -1..1."""
    trust: Tensor
    """[B]: the weight of the difference to the drawing."""


class Pairs:
    """The shards of pairs.py: images and latents by number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[tuple[np.ndarray, np.ndarray]] = []
        self.refresh()

    def refresh(self) -> None:
        """Read shards that were written since."""
        for latents in sorted(self.folder.glob("*-latents.npy"))[len(self.shards) :]:
            images = latents.with_name(latents.name.replace("latents", "images"))
            self.shards.append((np.load(images, mmap_mode="r"), np.load(latents, mmap_mode="r")))

    def __len__(self) -> int:
        return sum(len(latents) for _, latents in self.shards)

    def sample(self, count: int, *, seed: int) -> Batch:
        """Random windows."""
        source = np.random.default_rng([7, seed])
        rows, places, pixels, trust = [], [], [], []
        for _ in range(count):
            images, latents = self.shards[source.integers(len(self.shards))]
            row = source.integers(len(latents))
            image = images[row]
            last = (image.shape[0] - WINDOW) // STRIDE
            # the most detailed of three, because a decoder learns little from a white background
            spots = [tuple(int(place) for place in source.integers(0, last + 1, 2)) for _ in range(3)]
            cut = [image[y * STRIDE : y * STRIDE + WINDOW, x * STRIDE : x * STRIDE + WINDOW] for y, x in spots]
            chosen = max(range(3), key=lambda one: float(cut[one][::4, ::4].std()))
            kind = source.choice(3, p=SHARES)
            rows.append(torch.from_numpy(latents[row, kind].astype(np.float32)))
            trust.append(TRUST[kind])
            places.append(spots[chosen])
            pixels.append(torch.from_numpy(cut[chosen].astype(np.float32)))
        drawings = torch.stack(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        return Batch(torch.stack(rows), torch.tensor(places), drawings, torch.tensor(trust))


# Training


@dataclass
class Training:
    """The networks in training, their optimizers, and the step that comes next."""

    plan: Plan
    old: AutoencoderTiny
    perception: Callable[[], Perception]
    """Loads the network of the perceptual loss, once, when it is needed."""
    vae: AutoencoderTiny = field(init=False)
    average: AutoencoderTiny = field(init=False)
    step: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    """Moving averages of the losses."""

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.vae = enlarged(self.old).requires_grad_(True)
        self.average = copy.deepcopy(self.vae).requires_grad_(False)
        self.discriminator = losses.PatchDiscriminator(seed=1, channels=32, layers=2)
        self.optimizers = {
            "encoder": torch.optim.Adam(self.vae.encoder.parameters(), betas=(0.9, 0.99)),
            "decoder": torch.optim.Adam(self.vae.decoder.parameters(), betas=(0.9, 0.99)),
            "discriminator": torch.optim.Adam(self.discriminator.parameters(), betas=(0.5, 0.99)),
        }
        self.rates = {"encoder": 2e-4, "decoder": 6e-4, "discriminator": 3e-4}

    def advance(self, pairs: Pairs) -> None:
        """One step."""
        batch = pairs.sample(self.plan.batch, seed=self.step)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name] * self.plan.rate(self.step, encoder=name == "encoder")
        if self.step < self.plan.encoder_steps:
            self._train_encoder(batch.pixels)
        self._train_decoder(batch)
        decay = min(DECAY, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for mean, new in zip(self.average.parameters(), self.vae.parameters(), strict=True):
                mean.lerp_(new, 1 - decay)
        self.step += 1

    def _train_encoder(self, pixels: Tensor) -> None:
        with torch.no_grad():
            wanted = self.old.encoder(F.avg_pool2d(pixels, 2))
        loss = (self.vae.encoder(pixels) - wanted).square().mean()
        self._update("encoder", loss)
        self._note(encoder=float(loss.detach()))

    def _train_decoder(self, batch: Batch) -> None:
        output = decode_window(self.vae.decoder, batch.latents, batch.windows)
        drawn, pixels, since = output.detach().requires_grad_(), batch.pixels, self.step - self.plan.sharpen_start
        l1, structure = losses.reconstruction(pixels, drawn), losses.structure(pixels, drawn)
        gradient = slope(((L1 * l1 + STRUCTURE * structure) * batch.trust).mean(), drawn)
        self._note(l1=float(l1.detach().mean()), structure=float(structure.detach().mean()))
        if since >= 0:
            perception = self._perception.distance(pixels, drawn)
            self._note(perception=float(perception.detach().mean()))
            wanted = gradient.norm() * min(1.0, (since + 1) / 500)
            for share, loss in (
                (PERCEPTION, (perception * batch.trust).mean()),
                (ADVERSARIAL, losses.adversarial(self.discriminator(drawn)).mean()),
            ):
                other = slope(loss, drawn)
                gradient = gradient + share * wanted / (other.norm() + 1e-8) * other
        optimizer = self.optimizers["decoder"]
        optimizer.zero_grad(set_to_none=True)
        output.backward(gradient)
        nn.utils.clip_grad_norm_(self.vae.decoder.parameters(), 1.0)
        optimizer.step()
        if since >= -200:  # it learns a little before it is listened to
            real, fake = self.discriminator(torch.cat([pixels, output.detach()])).chunk(2)
            self._update("discriminator", losses.hinge(real, fake).mean())
            self._note(real=float(real.mean().detach()), fake=float(fake.mean().detach()))

    @cached_property
    def _perception(self) -> Perception:
        return self.perception()

    def _update(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[name].step()

    def _note(self, **values: float) -> None:
        for name, value in values.items():
            self.figures[name] = self.figures.get(name, value) * 0.99 + value * 0.01

    # State

    def save(self, out: Path) -> None:
        """Write state.pt and vae/."""
        parts = {name: getattr(self, name).state_dict() for name in ("vae", "average", "discriminator")}
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        save({**parts, "optimizers": optimizers, "step": self.step, "figures": self.figures}, out / "state.pt")
        self.average.save_pretrained(out / "vae")

    def load(self, out: Path) -> None:
        """Read state.pt, if there is one."""
        if (out / "state.pt").exists():
            state: Mapping[str, Any] = torch.load(out / "state.pt", weights_only=True)
            for name in ("vae", "average", "discriminator"):
                getattr(self, name).load_state_dict(state[name])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
            self.step, self.figures = state["step"], dict(state["figures"])


def slope(loss: Tensor, images: Tensor) -> Tensor:
    """The gradient of a loss with respect to images."""
    return torch.autograd.grad(loss, images)[0]


@torch.inference_mode()
def check(training: Training, check_pairs: Pairs, out: Path, *, count: int = 48, shown: int = 8) -> dict[str, float]:
    """Figures of held-out scenes, and a sheet: the UNet's latents by the old decoder, by the new one, and the drawing.

    For each kind of latents the PSNR in dB; the width of outlines of drawings, of the old decoder's images, enlarged,
    and of the new one's; and the encoder's error relative to the deviation of the latents.
    """
    images = np.concatenate([images for images, _ in check_pairs.shards])[:count]
    latents = torch.from_numpy(
        np.concatenate([latents for _, latents in check_pairs.shards])[:count].astype(np.float32)
    )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    average, old = training.average, training.old

    def decoded(vae: AutoencoderTiny, kind: int) -> Tensor:
        return (
            torch.cat([vae.decode(one, return_dict=False)[0] for one in latents[:, kind].split(8)])
            .add(1)
            .div(2)
            .clamp(0, 1)
        )

    figures = {"outlines of drawings": outline_width(pixels)}
    for kind, name in enumerate(("clean", "light", "heavy")):
        before = F.interpolate(decoded(old, kind), scale_factor=2.0, mode="bicubic").clamp(0, 1)
        after = decoded(average, kind)
        for which, drawn in (("old", before), ("new", after)):
            figures[f"psnr {which} {name}"] = float(-10 * (drawn - pixels).square().mean(dim=(1, 2, 3)).log10().mean())
            figures[f"outlines {which} {name}"] = outline_width(drawn)
    found = torch.cat([average.encode(one, return_dict=False)[0] for one in (pixels * 2 - 1).split(8)])
    wanted = old.encode(halved(images) * 2 - 1, return_dict=False)[0]
    figures["encoder error"] = float((found - wanted).square().mean().sqrt() / wanted.std())
    rows = [before[:shown], after[:shown], pixels[:shown]]
    shown_images = [Image.fromarray((one.permute(1, 2, 0) * 255 + 0.5).byte().numpy()) for row in rows for one in row]
    (out / "sheets").mkdir(exist_ok=True)
    contact_sheet(shown_images, columns=shown).save(out / "sheets" / f"step-{training.step:06d}.png")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder with pairs/, check/ and perception.pt")
    parser.add_argument("out", type=Path, help="the folder to write to; an unfinished run in it continues")
    parser.add_argument(
        "--model", required=True, help="the model whose VAE is enlarged: the last run of another recipe"
    )
    parser.add_argument("--steps", type=int, default=6000, help="training steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows per step (%(default)s)")
    parser.add_argument(
        "--encoder-steps", type=int, default=1000, help="steps that train the encoder, too (%(default)s)"
    )
    parser.add_argument(
        "--sharpen-start",
        type=int,
        default=1000,
        help="first step with perceptual loss and discriminator (%(default)s)",
    )
    parser.add_argument("--max-minutes", type=float, help="stop after this time, with the state saved")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(chosen.steps, chosen.batch, chosen.encoder_steps, chosen.sharpen_start)
    old = load_model(load_registry().find(chosen.model), device="cpu", dtype="float32", parts=("vae",)).vae
    if cell(old) != CELL:
        parser.error(f"the latent cells of {chosen.model} have {cell(old)} pixels a side; those of a VAE to enlarge, 8")
    training = Training(plan, old.requires_grad_(False), partial(load_perception, chosen.work / "perception.pt"))
    training.load(chosen.out)
    pairs, held_out = Pairs(chosen.work / "pairs"), Pairs(chosen.work / "check")
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopped.append(received))
    began, saved, first = time.monotonic(), time.monotonic(), training.step

    def log(**facts: object) -> None:
        line = {"step": training.step, "scenes": len(pairs), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        with (chosen.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | facts) + "\n")

    def rounded(figures: Mapping[str, float]) -> dict[str, float]:
        return {name: float(f"{value:.4g}") for name, value in figures.items()}

    if training.step == 0:
        log(check=rounded(check(training, held_out, chosen.out)))
    while training.step < plan.steps and not stopped:
        if chosen.max_minutes is not None and time.monotonic() - began > chosen.max_minutes * 60:
            break
        training.advance(pairs)
        if training.step % 50 == 0:
            speed = (training.step - first) * plan.batch / (time.monotonic() - began)
            log(windows_per_second=round(speed, 2), cpu=round(time.process_time()), **rounded(training.figures))
        if training.step % CHECK_STEPS == 0:
            log(check=rounded(check(training, held_out, chosen.out)))
        if time.monotonic() - saved > SAVE_SECONDS:
            training.save(chosen.out)
            pairs.refresh()
            saved = time.monotonic()
    training.save(chosen.out)


if __name__ == "__main__":
    main()
