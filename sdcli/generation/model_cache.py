"""The cache of loaded models: all warm state of one device, lent to one user at a time.

`ModelCache.lease(job)` gives a pipeline with everything that a job names. The model, its refiner, LoRAs,
ControlNets, IP-Adapters, image encoders and safety checker of the last job stay loaded; what the next job does not
share is dropped first. While a lease lasts, no one else has these networks, so attention processors and VAE tiling may
be changed on them for the time of a batch. Two caches share nothing that changes: two threads with a cache each
generate the bytes that each would generate alone.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sdcli.diffusion.pipeline import Pipeline, load_denoiser
from sdcli.encoders.clip_vision import ImageEncoder
from sdcli.generation.loaded_vae import LoadedVae
from sdcli.generation.plan import Limits
from sdcli.generation.prompt_notes import lora_notes
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.settings import RunSettings
from sdcli.io.digests import FileState
from sdcli.io.out_of_memory import free_caches
from sdcli.models.controlnet import ControlNet, load_controlnet, with_controlnets
from sdcli.models.hub.folders import folder_of
from sdcli.models.ip_adapter import load_ip_adapters
from sdcli.models.lora import with_loras
from sdcli.models.registry import ControlNetSpec, ModelSpec
from sdcli.models.safety_checker import SafetyChecker, load_safety_checker
from sdcli.models.sources import FileSource, FolderSource

State = tuple[object, ...]
"""A spec and the state of its files when it was loaded; another one means that it is to be loaded again."""


@dataclass(frozen=True)
class Lease:
    """Everything loaded that a job needs; `run_batch` generates with it."""

    pipeline: Pipeline
    safety_checker: SafetyChecker | None = None
    notes: tuple[str, ...] = ()
    """Sentences about what was loaded for this lease."""


class ModelCache:
    """Loads models and keeps the last ones. `run` gives device, dtype, and whether it may use the network."""

    def __init__(self, run: RunSettings) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._base: Pipeline | None = None
        """The model with its refiner, without anything that a request adds."""
        self._base_state: State = ()
        self._refiner_state: State = ()
        self._with_loras: Pipeline | None = None
        """The base with LoRAs merged; it shares the untouched weights."""
        self._adapted: tuple[Pipeline, Pipeline] | None = None
        """A pipeline without IP-Adapters, and the same with some."""
        self._controlnets: dict[str, tuple[State, ControlNet]] = {}
        self._image_encoders: dict[Path, ImageEncoder] = {}
        self._checker: tuple[State, SafetyChecker | None] | None = None
        self._vae: LoadedVae | None = None
        self._vae_state: State = ()

    @property
    def limits(self) -> Limits:
        """The limits of this device, to `plan` with."""
        device = self.run.device
        on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        return Limits(self.run.batch_size, on_gpu)

    @contextlib.contextmanager
    def lease(self, job: ResolvedJob) -> Iterator[Lease]:
        """Lend the networks that a job names, loaded as far as they are not yet; waits until no other lease is out.

        A model whose files have changed since they were loaded is loaded again. Raises BadWeights, NotFound, Offline
        and UsageError for anything that the job names.
        """
        with self._lock:
            self._load_models(job)
            checker, before = self._safety_checker(job.model), self._with_loras
            pipeline = self._with_controlnets(self._with_adapters(self._merged(job), job), job)
            notes = lora_notes(pipeline.model) if job.request.loras and self._with_loras is not before else []
            yield Lease(pipeline, checker, tuple(notes))

    @contextlib.contextmanager
    def lease_vae(self, spec: ModelSpec) -> Iterator[LoadedVae]:
        """Lend the VAE of a model alone, in float32 where no dtype was chosen; otherwise as `lease`."""
        with self._lock:
            state = _state(spec)
            if self._vae is None or self._vae_state != state:
                self._vae = None  # before the next one is loaded: two do not fit everywhere
                gc.collect()
                self._vae, self._vae_state = LoadedVae.load(spec, self.run), state
            yield self._vae

    def has_models(self, job: ResolvedJob) -> bool:
        """Whether a job's model, refiner and safety checker are loaded, and their files unchanged."""
        models = (_state(job.model), _state(job.refiner))
        return self._base is not None and (self._base_state, self._refiner_state) == models and self._checked(job.model)

    def unload(self) -> None:
        """Drop everything that is loaded, as after some time without a job; waits until no lease is out."""
        with self._lock:
            self._forget()
            free_caches()

    def _load_models(self, job: ResolvedJob) -> None:
        run = self.run
        options: dict[str, Any] = {
            "device": run.device,
            "dtype": run.dtype,
            "offline": run.offline,
            "attention": run.attention,
        }
        state, refiner_state = _state(job.model), _state(job.refiner)
        if self._base is None or self._base_state != state:
            if self._base is not None:
                checker = self._checker
                self._forget()
                self._checker = checker
                gc.collect()
            self._base, self._base_state = Pipeline.of(load_denoiser(job.model, **options)), state
            self._refiner_state = _state(None)
        if self._refiner_state != refiner_state:
            self._refine(lambda pipeline: pipeline.with_refiner(None))
            self._refiner_state = _state(None)
            gc.collect()
            if job.refiner is not None:
                refiner = load_denoiser(job.refiner, leave_out={"vae"}, **options)
                self._refine(lambda pipeline: pipeline.with_refiner(refiner))
                self._refiner_state = refiner_state

    def _refine(self, change: Callable[[Pipeline], Pipeline]) -> None:
        assert self._base is not None
        self._base, self._adapted = change(self._base), None
        self._with_loras = change(self._with_loras) if self._with_loras is not None else None

    def _merged(self, job: ResolvedJob) -> Pipeline:
        """The pipeline with the job's LoRAs."""
        assert self._base is not None
        loras = job.request.loras
        if not loras:
            return self._base
        if self._with_loras is None or tuple(one.ref for one in self._with_loras.model.loras) != loras:
            self._with_loras = self._adapted = None
            gc.collect()
            merged = with_loras(self._base.model, loras, folder=self.run.lora_dir)
            self._with_loras = self._base.with_model(merged)
        return self._with_loras

    def _with_adapters(self, pipeline: Pipeline, job: ResolvedJob) -> Pipeline:
        """The pipeline with the job's IP-Adapters."""
        wanted = tuple(one.adapting for one in job.request.ip_adapters)
        if not wanted:
            return pipeline
        held = self._adapted
        if held is None or held[0] is not pipeline or held[1].model.ip_adapters != wanted:
            self._adapted = held = None
            gc.collect()
            adapters = load_ip_adapters(wanted, pipeline.model, encoders=self._image_encoders)
            self._image_encoders = {one.look.encoder.folder: one.look.encoder for one in adapters}
            self._adapted = held = pipeline, pipeline.with_ip_adapters(adapters)
        return held[1]

    def _with_controlnets(self, pipeline: Pipeline, job: ResolvedJob) -> Pipeline:
        """The pipeline with the job's ControlNets among the parts of its model."""
        if not job.controlnets:
            return pipeline
        assert self._base is not None  # which they are loaded for: LoRAs do not change them
        states = {name: _state(spec) for name, spec in job.controlnets.items()}
        self._controlnets = {name: held for name, held in self._controlnets.items() if states.get(name) == held[0]}
        for name in sorted(set(states) - set(self._controlnets)):
            self._controlnets[name] = states[name], load_controlnet(job.controlnets[name], self._base.model)
        networks = {name: controlnet for name, (_, controlnet) in self._controlnets.items()}
        return replace(pipeline, model=with_controlnets(pipeline.model, networks))

    def _safety_checker(self, spec: ModelSpec) -> SafetyChecker | None:
        """The safety checker that a model ships, unless it is switched off. Raises BadWeights."""
        if self.run.safety == "off":
            return None
        if self._checker is None or not self._checked(spec):
            folder = folder_of(spec)
            self._checker = _state(spec), load_safety_checker(folder) if folder is not None else None
        return self._checker[1]

    def _checked(self, spec: ModelSpec) -> bool:
        return self.run.safety == "off" or (self._checker is not None and self._checker[0] == _state(spec))


_READ = {".json", ".safetensors", ".txt", ".model"}
"""Suffixes of the files that a model is loaded from."""


def _state(spec: ModelSpec | ControlNetSpec | None) -> State:
    """A spec with path, size, time and inode of its files; those of the hub's cache never change."""
    match None if spec is None else spec.source:
        case FileSource(path=path):
            files = [path]
        case FolderSource(path=path):
            files = [file for pattern in ("*", "*/*") for file in sorted(path.glob(pattern)) if file.suffix in _READ]
        case _:
            files = []
    return spec, *map(_file_state, files)


def _file_state(file: Path) -> FileState | None:
    try:
        return FileState.of(file)
    except OSError:  # gone since the folder was listed; loading it raises the right error
        return None
