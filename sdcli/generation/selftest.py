"""Whether sdcli works on this machine, tried with the model `tiny`, offline; and what the machine can do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image

import sdcli
from sdcli.errors import SdcliError
from sdcli.generation.decode_files import decode_files
from sdcli.generation.decode_plan import DecodeSettings
from sdcli.generation.encode_files import encode_files
from sdcli.generation.encode_plan import EncodeSettings
from sdcli.generation.events import Result
from sdcli.generation.model_cache import ModelCache
from sdcli.generation.resolve.jobs import ResolvedJob, expand
from sdcli.generation.service import generate
from sdcli.generation.settings import OutputSettings, RunSettings
from sdcli.generation.verify import verify_image
from sdcli.generation.writer import Writer
from sdcli.images.image_files import open_image
from sdcli.images.pixels import to_pixels
from sdcli.io.devices import cpu_has_bfloat16, free_memory, pick_dtype
from sdcli.metadata.read import read_image
from sdcli.models.registry import Registry, packaged_registry_file, read_registry_file
from sdcli.request.input_files import InputFile
from sdcli.request.jobs import Line
from sdcli.vae.latent_files import read_latents

PROMPT, SEED = "an astronaut riding a horse", 7


@dataclass(frozen=True)
class Check:
    """One part that was tried, and the error if it failed."""

    name: str
    seconds: float
    error: str | None = None


def checks(run: RunSettings) -> Iterator[Check]:
    """Try every part once, in the order of an image's journey. A failure is yielded, not raised."""
    with tempfile.TemporaryDirectory(prefix="sdcli-selftest-") as folder:
        trial = _Trial(Path(folder), replace(run, offline=True))
        steps: dict[str, Callable[[], None]] = {
            "generate": trial.generate,
            "repetition": trial.repetition,
            "metadata": trial.metadata,
            "verify": trial.verify,
            "encode": trial.encode,
            "decode": trial.decode,
        }
        for name, step in steps.items():
            started, error = time.monotonic(), None
            try:
                step()
            except Exception as problem:  # whatever it is, it is what the user wants to hear of
                error = str(problem) or type(problem).__name__
            yield Check(name, time.monotonic() - started, error)


def machine() -> dict[str, Any]:
    """What this machine computes with, JSON-ready; memory in bytes."""
    devices = {"cpu": platform.processor() or platform.machine()}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    kinds = {name: torch.device(name) for name in devices}
    return {
        "devices": devices,
        "auto_dtype": {name: str(pick_dtype("auto", kind)).removeprefix("torch.") for name, kind in kinds.items()},
        "cpu_bfloat16": cpu_has_bfloat16(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": {name: _memory(kind) for name, kind in kinds.items() if name != "mps"},
        "versions": {
            "sdcli": sdcli.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "diffusers", "safetensors", "pillow")},
        },
    }


def _memory(device: torch.device) -> dict[str, int | None]:
    if device.type == "cuda":
        return {"total": torch.cuda.mem_get_info(device)[1], "free": free_memory(device)}
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {"total": total, "free": free_memory(device)}


@dataclass
class _Trial:
    """One image on its way through everything; each step stands on the files of those before."""

    folder: Path
    run: RunSettings

    def __post_init__(self) -> None:
        file = packaged_registry_file()  # without the user's own file, which may be the broken part
        self.registry = Registry(default="tiny", models=read_registry_file(file)[1], files=(file,))
        self.cache = ModelCache(self.run)
        self.image, self.again = self.folder / "first.png", self.folder / "second.png"
        self.latents, self.decoded = self.folder / "first.safetensors", self.folder / "decoded.png"

    def generate(self) -> None:
        self._generate("first")
        with Image.open(self.image) as image:
            image.load()

    def repetition(self) -> None:
        self._generate("second")
        _expect(self.image.read_bytes() == self.again.read_bytes(), "the same request gave other bytes")

    def metadata(self) -> None:
        record = read_image(self.image).record
        _expect(
            record is not None and record.request.key() == self._job().request.key(), "the record is not the request"
        )

    def verify(self) -> None:
        verdict = verify_image(self.image, self.registry, self.run)
        _expect(verdict.identical, verdict.sentence())

    def encode(self) -> None:
        with self.cache.lease_vae(self.registry.find("tiny")) as vae:
            files = [InputFile(self.image, PurePosixPath("first"))]
            (event,) = encode_files(files, vae, EncodeSettings(output=self.latents))
            expected, _ = vae.encode([to_pixels(open_image(self.image))], seeds=None)
        if event.error is not None:
            raise event.error
        stored = read_latents(self.latents).latents
        _expect(torch.equal(stored, expected), "the file holds other latents than the VAE made")

    def decode(self) -> None:
        settings = DecodeSettings(output=self.decoded)
        files = [InputFile(self.latents, PurePosixPath("first"))]
        (event,) = decode_files(files, self.registry, self.cache, settings)
        if event.error is not None:
            raise event.error
        with self.cache.lease_vae(self.registry.find("tiny")) as vae:
            expected, _ = vae.decode(read_latents(self.latents).latents[0])
        same = open_image(self.decoded).tobytes() == expected.tobytes()
        _expect(same, "the file holds another image than the VAE made")

    def _job(self) -> ResolvedJob:
        (job,) = expand([Line(0, {"prompt": PROMPT})], {"seed": SEED}, self.registry, num_images=1, base_seed=SEED)
        assert isinstance(job, ResolvedJob)
        return job

    def _generate(self, name: str) -> None:
        writer = Writer(OutputSettings(outdir=self.folder, template=name))
        (result,) = (event for event in generate([self._job()], self.cache, writer) if isinstance(event, Result))
        if result.error is not None:
            raise result.error


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SdcliError(otherwise)
