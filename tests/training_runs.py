"""What the tests of the trainers share: small captioned images, and a training command run in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdcli.models.registry import load_registry
from sdcli.training.config_files import settings_from
from sdcli.training.controlnet.session import ControlNetSession
from sdcli.training.controlnet.settings import ControlNetSettings
from sdcli.training.events import Event
from sdcli.training.session import Session
from sdcli.training.unet.session import UnetSession
from sdcli.training.unet.settings import UnetSettings

QUICK: dict[str, Any] = {
    "model": "tiny",
    "train_batch_size": 2,
    "device": "cpu",
    "checkpointing_steps": 100,
    "sample_every_n_steps": 10**9,
    "validation_steps": 10**9,
}


def captioned_images(folder: Path, count: int = 6, *, sizes: Sequence[tuple[int, int]] = ((64, 64),)) -> Path:
    """`count` images of noise in colours of their own, each with a .txt of two captions."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8) // 2 + np.uint8(20 * number % 120)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}\nthe {number}th image\n")
    return folder


def class_images(folder: Path, classes: Sequence[str] = ("cat", "dog"), *, each: int = 3, size: int = 16) -> Path:
    """Class folders of grey images."""
    generator = np.random.default_rng(1)
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = generator.integers(0, 120, (size, size), dtype=np.uint8) + np.uint8(100 * place % 130)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def run_session(session: Session[Any], *, resume: bool = False) -> list[Event]:
    """Prepare and train; what happened."""
    with session:
        events = list(session.prepare(resume=resume))
        events += list(session.train(stop=lambda: None))
    return events


def train_unet(data: Path, run: Path, *, resume: bool = False, **changes: Any) -> list[Event]:
    """`sdcli train-unet` in this process, on miniature networks."""
    fresh_accelerator()
    quick = {name: value for name, value in QUICK.items() if not (name == "model" and changes.get("space") == "pixel")}
    values = {**quick, "cache_dir": run.parent / "cache", **changes}
    settings = settings_from(UnetSettings, {name: value for name, value in values.items() if value is not None})
    return run_session(UnetSession(str(data), run, settings, load_registry()), resume=resume)


def controlnet_session(data: Path, run: Path, **changes: Any) -> ControlNetSession:
    """The session of `sdcli train-controlnet` on miniature networks."""
    fresh_accelerator()
    values = {**QUICK, "cache_dir": run.parent / "cache", **changes}
    return ControlNetSession(str(data), run, settings_from(ControlNetSettings, values), load_registry())


def train_controlnet(data: Path, run: Path, *, resume: bool = False, **changes: Any) -> list[Event]:
    """`sdcli train-controlnet` in this process."""
    return run_session(controlnet_session(data, run, **changes), resume=resume)


def fresh_accelerator() -> None:
    """accelerate keeps one state per process, and refuses another precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def same_checkpoint(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same files, byte for byte."""
    files = [json.loads((folder / "manifest.json").read_text())["files"] for folder in (one, other)]
    return bool(files[0]) and files[0] == files[1]
