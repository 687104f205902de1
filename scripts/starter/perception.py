"""Train the network that a larger decoder's perceptual loss is measured in: a small classifier of parts of drawings.

    python scripts/starter/perception.py WORK

WORK is the folder that `sprites.py --side 256` wrote. Writes WORK/perception.pt. The network names the thing and the
style of a window of 128x128 pixels, and how far it was blurred. So its features depend on shapes and on the sharpness
of outlines; their distance (LPIPS without its human judgements, Zhang et al. 2018, arXiv 1801.03924) is large where a
decoder draws something else or something softer. VGG16, the usual choice, is larger than the whole starter.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from scenes import DEFAULT_STYLE, STYLE_WORDS, Composer, most_detailed_crop
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW = 128
BLURS = (1, 2, 3, 5)
"""Class of blur -> the size of the mean that blurs, twice."""
EACH = 4
"""Windows per scene."""


class Perception(nn.Module):
    """Images [B, 3, H, W] in -1..1 -> logits for thing, style and blur; `distance` compares two images."""

    def __init__(self, concepts: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [
                _stage(3, 32, 5, 2),
                _stage(32, 64, 3, 2),
                _stage(64, 64, 3, 1),
                _stage(64, 128, 3, 2),
                _stage(128, 128, 3, 1),
            ]
        )
        self.heads = nn.ModuleList([nn.Linear(256, classes) for classes in (concepts, len(STYLE_WORDS), len(BLURS))])

    def features(self, images: Tensor) -> Iterator[Tensor]:
        """The states after each stage."""
        for stage in self.stages:
            images = stage(images)
            yield images

    def forward(self, images: Tensor) -> list[Tensor]:
        *_, last = self.features(images)
        pooled = torch.cat([last.mean(dim=(2, 3)), last.amax(dim=(2, 3))], dim=1)
        return [head(pooled) for head in self.heads]

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """The mean squared difference of the features, each position's scaled to length 1, averaged over stages; [B].

        Positions without detail have short features, whose difference counts less.
        """
        total = torch.zeros(len(images))
        for one, two in zip(self.features(images), self.features(others), strict=True):
            size = (one.detach().square() + two.square()).sum(1, keepdim=True).div(2)
            scale = (size + 0.1 * size.mean(dim=(2, 3), keepdim=True) + 1e-6).rsqrt()
            total = total + ((one - two) * scale).square().sum(1).flatten(1).mean(1)
        return total / len(self.stages)


def _stage(channels: int, out: int, kernel: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())


def load_perception(path: Path) -> Perception:
    """The network that was saved, frozen."""
    weights = torch.load(path, weights_only=True)
    network = Perception(weights["heads.0.weight"].shape[0])
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def train(work: Path, *, steps: int, batch: int = 32, seed: int = 5, every: int = 50) -> Perception:
    """AdamW with a cosine schedule; every step has new scenes.

    Every `every` steps the state is saved in WORK, from which an interrupted training continues.
    """
    torch.manual_seed(seed)
    composers = {style: Composer(work, styles=[style], shares=[1]) for style in STYLE_WORDS}
    network = Perception(len(composers[DEFAULT_STYLE].concepts))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.02)
    began, shown, start, state = time.monotonic(), torch.zeros(3), 0, work / "perception-state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        images, truth = windows(composers, random.Random(f"{seed}/{step}"), batch)
        logits = network(images)
        shown += torch.stack(
            [(one.argmax(1) == right).float().mean() for one, right in zip(logits, truth.T, strict=True)]
        )
        parts = [F.cross_entropy(one, right) for one, right in zip(logits, truth.T, strict=True)]
        loss = torch.stack(parts).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0:
            right = ", ".join(
                f"{name} {share:.0%}"
                for name, share in zip(("thing", "style", "blur"), (shown / every).tolist(), strict=True)
            )
            print(f"step {step + 1} of {steps}: {right}, {time.monotonic() - began:.0f} s", flush=True)
            shown.zero_()
            save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, state)
    return network.eval()


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write a file of tensors, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


def windows(composers: Mapping[str, Composer], source: random.Random, count: int) -> tuple[Tensor, Tensor]:
    """Windows of scenes with one thing, [count, 3, 128, 128] in -1..1, and the classes of their thing, style and blur.

    `composers`: style -> a composer of that style alone.
    """
    styles = list(composers)
    numbers = {concept.label: number for number, concept in enumerate(composers[DEFAULT_STYLE].concepts)}
    images: list[Tensor] = []
    truth = []
    while len(images) < count:
        style = source.choice(styles)
        scene = composers[style].plan(source.choice(["plain", "colour", "recoloured", "place"]), source)
        whole = composers[style].draw(scene, source)
        for _ in range(EACH):
            window = torch.from_numpy(most_detailed_crop(whole, WINDOW, source)).permute(2, 0, 1).float() / 127.5 - 1
            blur = source.randrange(len(BLURS))
            images.append(blurred(window[None], BLURS[blur])[0])
            truth.append([numbers[scene.labels[0]], styles.index(style), blur])
    return torch.stack(images[:count]), torch.tensor(truth[:count])


def blurred(images: Tensor, size: int) -> Tensor:
    """The mean of `size` x `size` pixels, twice: about a Gaussian."""
    for before in ((size - 1) // 2, size // 2):
        after = size - 1 - before
        images = F.avg_pool2d(F.pad(images, (before, after, before, after), mode="replicate"), size, 1)
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder that `sprites.py --side 256` wrote")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of 32 windows (%(default)s)")
    chosen = parser.parse_args()
    save(train(chosen.work, steps=chosen.steps).state_dict(), chosen.work / "perception.pt")


if __name__ == "__main__":
    main()
