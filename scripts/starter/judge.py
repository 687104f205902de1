"""Train the judge: a small classifier that names the contents of the starter's images, trained on real sprites.

    python scripts/starter/judge.py WORK

trains it and writes WORK/judge.pt. It is trained on scenes in the three trained styles, never in the fourth (twemoji),
and predicts the things, their number, the colour that was given to the thing, and the background. `report` measures its
accuracy on new scenes. It classifies images of 128x128 or 256x256 downscaled to 64x64 and, where two things are
expected, a window of 5/8 of the width around each: in the whole image it finds both in only 70 % of real ones.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from scenes import BACKGROUNDS, HUES, KINDS, PLACES, SIDE, STYLE_WORDS, Composer
from torch import Tensor, nn
from torch.nn import functional as F

from sdcli.io.devices import cpu_has_bfloat16_kernels

INPUT_SIDE = 64
"""Width and height of the judge's input in pixels."""
HELD_OUT_STYLE = "twemoji"
COUNTS = 4
PLACE_NAMES = ("white", *BACKGROUNDS, *PLACES)
COLOUR_NAMES = (*HUES, "brown")
STEPS = 2500
UNKNOWN = -100
"""The class index that cross_entropy ignores."""


@dataclass(frozen=True)
class Truth:
    """The labels of B images."""

    things: Tensor
    """float32 [B, concepts]: each concept's share of the things in the image."""
    count: Tensor
    """int64 [B]: the number of things, minus 1; UNKNOWN for two kinds."""
    place: Tensor
    """int64 [B]: indices into PLACE_NAMES."""
    colour: Tensor
    """int64 [B]: indices into COLOUR_NAMES; UNKNOWN for several colours or none of these."""

    def rows(self, indices: Tensor) -> Truth:
        return Truth(self.things[indices], self.count[indices], self.place[indices], self.colour[indices])


class Block(nn.Module):
    """Halves the resolution, then applies a residual pair of convolutions (He et al. 2016)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return F.relu(x + self.second(self.first(x)))


class Judge(nn.Module):
    """Images [B, 3, 64, 64] in 0..1 -> features [B, 768] and logits for things, count, place and colour."""

    def __init__(self, concepts: int, widths: Sequence[int] = (32, 64, 128, 256, 384)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 5, 2, 2, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in pairwise(widths[:-1])))
        self.last = nn.Sequential(
            nn.Conv2d(widths[-2], widths[-1], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[-1]), nn.ReLU()
        )
        features = 2 * widths[-1]
        self.things = nn.Linear(features, concepts)
        self.count = nn.Linear(features, COUNTS)
        self.place = nn.Linear(features, len(PLACE_NAMES))
        self.colour = nn.Linear(features, len(COLOUR_NAMES))

    def features(self, images: Tensor) -> Tensor:
        """[B, 768]: mean and maximum over the positions."""
        states = self.last(self.blocks(self.stem(images * 2 - 1)))
        return torch.cat([states.mean(dim=(2, 3)), states.amax(dim=(2, 3))], dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = self.features(images)
        return self.things(found), self.count(found), self.place(found), self.colour(found)


# Labelled scenes


def scenes(
    work: Path, jobs: Sequence[tuple[int, str]], styles: Sequence[str] = tuple(STYLE_WORDS)
) -> tuple[np.ndarray, Truth]:
    """Images of scenes by (seed, kind), uint8 [n, side, side, 3], and their labels."""
    composer = Composer(work, styles=styles, shares=[1] * len(styles))
    side = SIDE * composer.scale
    numbers = {concept.label: number for number, concept in enumerate(composer.concepts)}
    images = np.empty((len(jobs), side, side, 3), np.uint8)
    things = torch.zeros(len(jobs), len(numbers))
    targets = torch.full((3, len(jobs)), UNKNOWN)
    for row, (seed, kind) in enumerate(jobs):
        source = random.Random(seed)
        scene = composer.plan(kind, source)
        images[row] = composer.draw(scene, source)
        for label in scene.labels:
            things[row, numbers[label]] += 1 / len(scene.labels)
        if len(set(scene.labels)) == 1:
            targets[0, row] = len(scene.labels) - 1
        targets[1, row] = PLACE_NAMES.index(scene.place)
        hue = composer.hue(scene.placed[0].sprite)
        if scene.placed[0].colour is not None:
            targets[2, row] = COLOUR_NAMES.index(scene.placed[0].colour)
        elif len(scene.labels) == 1 and hue is not None:
            targets[2, row] = COLOUR_NAMES.index(hue[1])
    return images, Truth(things, *targets)


def _small_scenes(work: Path, jobs: Sequence[tuple[int, str]]) -> tuple[np.ndarray, Truth]:
    images, truth = scenes(work, jobs)
    return downscale(images), truth


def downscale(images: np.ndarray) -> np.ndarray:
    """uint8 [n, side, side, 3] -> [n, 64, 64, 3], each pixel the mean of four or sixteen."""
    count, height, width, _ = images.shape
    parts = images.reshape(count, INPUT_SIDE, height // INPUT_SIDE, INPUT_SIDE, width // INPUT_SIDE, 3)
    return (parts.mean(axis=(2, 4)) + 0.5).astype(np.uint8)


def many_scenes(work: Path, count: int, *, seed: int) -> tuple[np.ndarray, Truth]:
    """`count` scenes of all kinds, drawn by all processors; easy kinds are slightly rarer."""
    source = random.Random(seed)
    kinds = source.choices(list(KINDS), [30, 12, 14, 16, 8, 10, 10, 4], k=count)
    jobs = [(seed * 10**9 + number, kind) for number, kind in enumerate(kinds)]
    chunks = [jobs[start : start + 500] for start in range(0, count, 500)]
    with Pool() as pool:
        parts = list(pool.imap(partial(_small_scenes, work), chunks))
    truths = [truth for _, truth in parts]
    return np.concatenate([images for images, _ in parts]), Truth(
        *(torch.cat([getattr(truth, name) for truth in truths]) for name in ("things", "count", "place", "colour"))
    )


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment images [B, 3, 64, 64] to resemble a decoder's: shifted by a few pixels, some blurred, some noisy."""
    shifts = torch.randint(-3, 4, (len(images), 2), generator=generator)
    padded = F.pad(images, (3, 3, 3, 3), mode="replicate")
    shifted = torch.stack(
        [
            one[:, 3 + y : 3 + y + INPUT_SIDE, 3 + x : 3 + x + INPUT_SIDE]
            for one, (y, x) in zip(padded, shifts.tolist(), strict=True)
        ]
    )
    blurred = F.interpolate(F.avg_pool2d(shifted, 2), scale_factor=2.0, mode="bilinear")
    share = torch.rand(len(images), 1, 1, 1, generator=generator) ** 2
    noise = (
        torch.randn(shifted.shape, generator=generator) * 0.05 * torch.rand(len(images), 1, 1, 1, generator=generator)
    )
    return (shifted + share * (blurred - shifted) + noise).clamp(0, 1)


# Training and inference


def train(work: Path, *, steps: int = STEPS, count: int = 80_000, batch: int = 128, seed: int = 3) -> Judge:
    """Train a judge on `count` scenes: AdamW with a cosine schedule, bfloat16 where the CPU has kernels for it."""
    torch.manual_seed(seed)
    images, truth = many_scenes(work, count, seed=seed)
    judge = Judge(truth.things.shape[1])
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.02)
    generator = torch.Generator().manual_seed(seed)
    autocast, began = cpu_has_bfloat16_kernels(), time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.01 + 0.99 * (1 + np.cos(np.pi * step / steps)) / 2)
        rows = torch.randint(len(images), (batch,), generator=generator)
        batch_images = augment(as_tensor(images[rows.numpy()]), generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = [head.float() for head in judge(batch_images)]
        loss = loss_of(logits, truth.rows(rows))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 200 == 0:
            elapsed = time.monotonic() - began
            print(f"step {step + 1} of {steps}: loss {float(loss.detach()):.3f}, {elapsed:.0f} s", flush=True)
    return judge.eval()


def loss_of(logits: Sequence[Tensor], truth: Truth) -> Tensor:
    """The weighted sum of the four cross-entropy losses."""
    things, count, place, colour = logits
    return (
        F.cross_entropy(things, truth.things, label_smoothing=0.02)
        + 0.3 * F.cross_entropy(count, truth.count)
        + 0.3 * F.cross_entropy(place, truth.place)
        + (0.3 * F.cross_entropy(colour, truth.colour) if (truth.colour != UNKNOWN).any() else 0)
    )


def as_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in 0..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Predictions:
    """The judge's predictions for n images."""

    features: Tensor
    things: Tensor
    """int64 [n, concepts], the most likely first."""
    count: Tensor
    """int64 [n]"""
    place: Tensor
    colour: Tensor

    def has_both(self, row: int, wanted: Sequence[set[int]], top_k: int) -> bool:
        """Whether each of these is in the top k of one of the two windows of image `row` (see `windows`)."""
        return all(any(self.has(2 * row + part, one, top_k) for part in (0, 1)) for one in wanted)

    def has(self, row: int, wanted: set[int], top_k: int) -> bool:
        """Whether one of these concepts is in the top k of an image."""
        return bool(wanted & set(self.things[row, :top_k].tolist()))


@torch.inference_mode()
def predict(judge: Judge, images: np.ndarray) -> Predictions:
    """Classify images, uint8 [n, 64, 64, 3]."""
    parts = []
    for start in range(0, len(images), 256):
        features = judge.features(as_tensor(images[start : start + 256]))
        things = judge.things(features).argsort(dim=1, descending=True)
        rest = [head(features).argmax(dim=1) for head in (judge.count, judge.place, judge.colour)]
        parts.append([features, things, *rest])
    features, things, count, place, colour = (torch.cat(column) for column in zip(*parts, strict=True))
    return Predictions(features, things, count + 1, place, colour)


PAIR_TOP_K = 3
"""Each of two things counts as found if it is among the judge's first k predictions for a window."""
WINDOW = 80
"""Width and height of a window, of 128 for the whole image."""
BESIDE, ABOVE = ((36, 60), (92, 68)), ((64, 34), (64, 84))
"""The windows' centres in the same units, for things side by side and one above the other."""


def windows(images: np.ndarray, centres: Sequence[tuple[int, int]]) -> np.ndarray:
    """uint8 [n, side, side, 3] -> [windows * n, 64, 64, 3], the windows of an image in sequence."""
    scale = images.shape[1] // SIDE
    side = WINDOW * scale
    padded = np.pad(images, ((0, 0), (side // 2, side // 2), (side // 2, side // 2), (0, 0)), mode="edge")
    parts = np.stack([padded[:, y * scale :, x * scale :][:, :side, :side] for x, y in centres], axis=1)
    smaller = F.interpolate(as_tensor(parts.reshape(-1, side, side, 3)), INPUT_SIDE, mode="area")
    return (smaller * 255 + 0.5).byte().permute(0, 2, 3, 1).numpy()


def accuracy(judge: Judge, work: Path, style: str, *, each: int = 300, seed: int = 8) -> dict[str, float]:
    """Accuracy of the judge on new scenes in a style, in percent."""
    found = {}
    for number, kind in enumerate(("plain", "pair", "ride", "count", "place", "recoloured")):
        jobs = [((seed * 100 + number) * 10**6 + index, kind) for index in range(each)]
        images, truth = scenes(work, jobs, [style])
        if kind in ("pair", "ride"):
            seen = predict(judge, windows(images, ABOVE if kind == "ride" else BESIDE))
        else:
            seen = predict(judge, downscale(images))
        wanted = [set(row.nonzero().flatten().tolist()) for row in truth.things]
        if kind == "plain":
            for name, top_k in (("objects top-1", 1), ("objects top-5", 5)):
                found[name] = _percent(seen.has(row, one, top_k) for row, one in enumerate(wanted))
        elif kind in ("pair", "ride"):
            found[f"{kind}: both"] = _percent(
                seen.has_both(row, [{thing} for thing in both], PAIR_TOP_K) for row, both in enumerate(wanted)
            )
        elif kind == "count":
            found["counts"] = _percent(seen.count == truth.count + 1)
        elif kind == "place":
            found["backgrounds"] = _percent(seen.place == truth.place)
        else:
            known = truth.colour != UNKNOWN
            found["colours"] = _percent((seen.colour == truth.colour)[known])
    return found


def _percent(right: Iterator[bool] | Tensor) -> float:
    values = [float(one) for one in right]
    return 100 * sum(values) / len(values)


def new_judge(work: Path, *, steps: int = STEPS) -> Judge:
    """Train a judge and save it in WORK."""
    judge = train(work, steps=steps)
    torch.save(judge.state_dict(), work / "judge.pt")
    return judge


def load_judge(work: Path) -> Judge:
    """The judge saved in WORK, or a new one."""
    if not (work / "judge.pt").exists():
        return new_judge(work)
    weights = torch.load(work / "judge.pt", weights_only=True)
    judge = Judge(weights["things.weight"].shape[0])
    judge.load_state_dict(weights)
    return judge.eval()


def report(judge: Judge, work: Path) -> str:
    """The judge's own accuracy, one line per style."""
    lines = []
    for style in (*STYLE_WORDS, HELD_OUT_STYLE):
        figures = ", ".join(f"{name} {value:.1f} %" for name, value in accuracy(judge, work, style).items())
        lines.append(f"{style}{' (held out)' if style == HELD_OUT_STYLE else ''}: {figures}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder that sprites.py wrote")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (%(default)s)")
    chosen = parser.parse_args()
    print(report(new_judge(chosen.work, steps=chosen.steps), chosen.work))


if __name__ == "__main__":
    main()
