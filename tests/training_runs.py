"""What the tests of the trainers share: small captioned images, and a training command run in this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from torch import nn

from sdcli.errors import Stop
from sdcli.models.registry import load_registry
from sdcli.training.config_files import settings_from
from sdcli.training.controlnet.session import ControlNetSession
from sdcli.training.controlnet.settings import ControlNetSettings
from sdcli.training.events import Event
from sdcli.training.forecast import Forecast
from sdcli.training.memory import unet_memory
from sdcli.training.orders import SaveRequest
from sdcli.training.session import Session
from sdcli.training.state.checkpoint import newest_checkpoint
from sdcli.training.state.manifest import MANIFEST
from sdcli.training.unet.session import UnetSession
from sdcli.training.unet.settings import UnetSettings
from sdcli.training.unet.task import UnetTask

QUICK: dict[str, Any] = {
    "model": "tiny",
    "train_batch_size": 2,
    "device": "cpu",
    "checkpointing_steps": 100,
    "sample_every_n_steps": 10**9,
    "validation_steps": 10**9,
}


MICRO_UNET = {
    "_class_name": "UNet2DModel", "in_channels": 1, "out_channels": 1, "block_out_channels": [4, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 2, "layers_per_block": 1, "add_attention": False,
}  # fmt: skip


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


def grey_images(folder: Path, count: int = 6) -> Path:
    """Images of 8x8, with the configuration of a network in pixel space beside their folder, for `train_pixels`."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder.parent / "micro.json").write_text(json.dumps(MICRO_UNET))
    return folder


def change_facts(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the facts in the newest checkpoint's manifest, to those of an earlier version."""
    manifest = newest_checkpoint(run).path / MANIFEST
    content = json.loads(manifest.read_bytes())
    del content["digest"]
    change(content["facts"])
    digest = hashlib.sha256(_spelled(content)).hexdigest()
    manifest.write_bytes(_spelled({**content, "digest": digest}))


def _spelled(content: dict[str, Any]) -> bytes:
    """A manifest's one spelling."""
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"


def run_session(
    session: Session[Any],
    *,
    resume: bool = False,
    stop: Stop = lambda: None,
    save: SaveRequest | None = None,
    see: Callable[[Event], None] = lambda event: None,
) -> list[Event]:
    """Prepare and train; what happened. `see` is called with each event of the training."""
    with session:
        events = list(session.prepare(resume=resume))
        for event in session.train(stop=stop, save=save):
            events.append(event)
            see(event)
    return events


def train_pixels(data: Path, run: Path, *, resume: bool = False, **changes: Any) -> list[Event]:
    """A run on `grey_images` of 2 steps with a checkpoint after each, in a fraction of a second."""
    micro: dict[str, Any] = {
        "space": "pixel", "from_scratch": str(data.parent / "micro.json"), "resolution": "8", "validation_split": 0.0,
        "max_train_steps": 2, "checkpointing_steps": 1, "sample_steps": 1,
    }  # fmt: skip
    return train_unet(data, run, resume=resume, **{**micro, **changes})


def train_unet(
    data: Path,
    run: Path,
    *,
    resume: bool = False,
    stop: Stop = lambda: None,
    save: SaveRequest | None = None,
    see: Callable[[Event], None] = lambda event: None,
    **changes: Any,
) -> list[Event]:
    """`sdcli train-unet` in this process, on miniature networks."""
    fresh_accelerator()
    quick = {name: value for name, value in QUICK.items() if not (name == "model" and changes.get("space") == "pixel")}
    values = {**quick, "cache_dir": run.parent / "cache", **changes}
    settings = settings_from(UnetSettings, {name: value for name, value in values.items() if value is not None})
    session = UnetSession(str(data), run, settings, load_registry())
    with mock.patch("sdcli.training.unet.session.unet_memory", estimated_once):
        return run_session(session, resume=resume, stop=stop, save=save, see=see)


_estimates: dict[str, Forecast] = {}


def estimated_once(
    task: UnetTask, settings: UnetSettings, *, size: tuple[int, int], kept: Iterable[nn.Module]
) -> Forecast:
    """The estimated memory of a step, which takes a quarter of a short run: once for each kind of network and step."""
    network = task.networks["unet"]
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    of_step = ("train_batch_size", "mixed_precision", "gradient_checkpointing", "optimizer", "use_ema")
    values = settings.model_dump(mode="json")
    key = repr((dict(network.config), trained, task.vae is None, size, [values[name] for name in of_step]))
    if key not in _estimates:
        _estimates[key] = unet_memory(task, settings, size=size, kept=kept)
    return _estimates[key]


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
