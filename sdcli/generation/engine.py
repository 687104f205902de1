"""Jobs in, files out: keeps the model warm, batches jobs of equal shape, falls back when memory runs out, saves."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import itertools
import platform
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

import sdcli
from sdcli.diffusion.loop import Step
from sdcli.diffusion.pipeline import Pipeline, load_denoiser
from sdcli.diffusion.sampling import check_request, sample
from sdcli.encoders.clip_vision import ImageEncoder
from sdcli.errors import (
    BadImage,
    BadLatents,
    BadOutput,
    BadWeights,
    NotFound,
    Offline,
    OutOfMemory,
    SdcliError,
    Stop,
    UsageError,
    stop_if_asked,
)
from sdcli.generation.filenames import image_name, is_literal
from sdcli.generation.journal import Journal
from sdcli.generation.observers.observer import File, Observe, Observer, check, observers_for, preview_image
from sdcli.generation.resolve.jobs import ResolvedJob, key_of
from sdcli.generation.settings import OutputSettings, RunSettings
from sdcli.images.formats import SUFFIX_OF
from sdcli.images.image_files import pixels_digest
from sdcli.images.pixels import from_pixels, to_pixels
from sdcli.images.watermark import marked
from sdcli.io.devices import free_caches, out_of_memory
from sdcli.io.files import AlreadyExists, check_new, numbered, write_whole
from sdcli.io.temporary_files import sweep
from sdcli.metadata.embed import image_bytes
from sdcli.metadata.record import Record
from sdcli.models.controlnet import ControlNet, load_controlnet, with_controlnets
from sdcli.models.hub.download import folder_of
from sdcli.models.ip_adapter import load_ip_adapters
from sdcli.models.loader import AppliedLora, LoadedModel
from sdcli.models.lora import with_loras
from sdcli.models.registry import ModelSpec, Registry
from sdcli.models.safety_checker import SafetyChecker, load_safety_checker
from sdcli.models.weight_digests import weights_digest
from sdcli.request.fields import FileRef, LoraRef
from sdcli.request.input_files import is_latents
from sdcli.request.lora_tags import lora_name
from sdcli.request.schema import ResolvedRequest
from sdcli.vae.latent_space import decode_with_fallbacks


@dataclass(frozen=True)
class Phase:
    """The engine begins something that takes time; `steps` is 0 where the length is not known."""

    name: Literal["load", "encode", "denoise", "decode", "save", "explain"]
    detail: str = ""
    steps: int = 0


@dataclass(frozen=True)
class Progress:
    """One denoising step is done."""

    index: int
    count: int
    images: int
    look: Callable[[], Image.Image | None]
    """What the images look like now, by the network's guess; takes time, and gives None where memory runs out."""


@dataclass(frozen=True)
class Note:
    """Something the user should hear: a fall-back, a prompt that was cut, a LoRA that fits in part."""

    text: str


@dataclass(frozen=True)
class Result:
    """What became of one job; `path`, and all that stands beside it, is whole on the disk when this is yielded."""

    status: Literal["done", "skipped", "failed", "flagged"]
    job: ResolvedJob
    path: Path | None = None
    seconds: float = 0.0
    fallbacks: tuple[str, ...] = ()
    error: SdcliError | None = None
    beside: tuple[Path, ...] = ()
    """The files that explain the image."""


Event = Phase | Progress | Note | Result

_OF_ONE_IMAGE = (UsageError, NotFound, BadWeights, BadImage, BadLatents, BadOutput, OutOfMemory)
"""Failures that concern one image, or those denoised with it; the rest of the batch goes on."""


_OF_LOADING = (BadWeights, NotFound, Offline, UsageError)
"""Failures of what requests name, be it a model or what is added to it."""


@dataclass(frozen=True)
class DecodedImage:
    """One decoded image with what its record needs beside the request."""

    job: ResolvedJob
    pixels: Tensor
    batch_size: int
    batch_index: int
    fallbacks: tuple[str, ...]
    beside: Iterable[File] = ()
    """What explains it, made file by file as this is gone through."""


@dataclass
class Engine:
    """Paints jobs with one warm model at a time, and one set of LoRAs and of ControlNets on it.

    `stop` is asked between batches for a reason to end.
    """

    registry: Registry
    run: RunSettings
    output: OutputSettings
    stop: Stop = lambda: None
    _pipeline: Pipeline | None = None
    _checker: tuple[ModelSpec, SafetyChecker | None] | None = None
    _with_loras: Pipeline | None = None
    """Of the same model, which it shares the untouched weights with."""
    _controlnets: dict[str, ControlNet] = field(default_factory=dict)
    """Of the same model, by the names that requests have for them."""
    _with_ip_adapters: tuple[Pipeline, Pipeline] | None = None
    """A painter of the same model without any, and with some."""
    _image_encoders: dict[Path, ImageEncoder] = field(default_factory=dict)
    """Theirs, by their folders."""
    _names: set[str] = field(default_factory=set)
    _keys: dict[int, str | None] = field(default_factory=dict)
    """Of the jobs of the batch, for the journal."""

    def generate_all(self, jobs: Sequence[ResolvedJob], *, journal: Journal | None = None) -> Iterator[Event]:
        """Paint every job and save it. With a journal, jobs that it knows as finished are skipped.

        Batches are planned over all jobs, finished ones included, so that a resumed run generates what is missing in
        the same company, and with that to the same bytes, as an uninterrupted one.
        Raises what `stop` answers, and what concerns every job (no such model and all want it, cannot write).
        """
        there: dict[int, Path] = {}
        if journal is not None and self.output.resume:
            sweep(self.output.outdir)
            taken: set[str] = set()
            digest = cache(weights_digest)
            for job in jobs:
                path = journal.finished(job.request.key(), partial(key_of, job, digest), taken=taken)
                if path is not None:
                    taken.add(path)
                    there[job.index] = self.output.outdir / path
            self._names |= {path.lower() for path in taken}
        beside = {index: tuple(self.output.beside(path)) for index, path in there.items()}
        done = {index for index, files in beside.items() if all(file.exists() for file in files)}
        alone = len({_models(job) for job in jobs}) == 1  # there is nothing to go on with where these cannot be loaded
        absent: dict[tuple[str | None, ...], SdcliError] = {}
        for batch in plan(jobs, self.run):
            for job in batch:
                if job.index in done:
                    yield Result("skipped", job, path=there[job.index], beside=beside[job.index])
            wanted = {job.index for job in batch} - done
            if not wanted:
                continue
            stop_if_asked(self.stop)
            started, models = time.monotonic(), _models(batch[0])
            if journal is not None:  # before loading: weights that change meanwhile are not those of these images
                digest = cache(weights_digest)
                self._keys = {job.index: key_of(job, digest) for job in batch}
            if models not in absent:
                try:
                    yield from self._load_for(batch[0].request)
                except _OF_LOADING as error:
                    if alone:
                        raise
                    absent[models] = error
            if models in absent:
                yield from _failed(batch, wanted, absent[models])
            else:
                yield from self._run_batch(batch, wanted, there, journal, started=started)
        stop_if_asked(self.stop)

    def load(self, spec: ModelSpec, loras: tuple[LoraRef, ...] = (), *, refiner: ModelSpec | None = None) -> Pipeline:
        """The painter of a model with some LoRAs merged into it, and a refiner; the last one of each stays warm."""
        how: dict[str, Any] = {"device": self.run.device, "dtype": self.run.dtype, "offline": self.run.offline}
        if self._pipeline is None or self._pipeline.model.spec != spec:
            if self._pipeline is not None:
                self._pipeline = self._with_loras = None
                self._controlnets, self._with_ip_adapters, self._image_encoders = {}, None, {}
                gc.collect()
            self._pipeline = Pipeline.of(load_denoiser(spec, **how))
        if _specs(self._pipeline) != (spec, refiner):
            if self._pipeline.refiner is not None:
                self._refine(None)
                gc.collect()
            if refiner is not None:
                self._refine(load_denoiser(refiner, leave_out={"vae"}, **how))
        if not loras:
            return self._pipeline
        if self._with_loras is None or tuple(one.ref for one in self._with_loras.model.loras) != loras:
            self._with_loras = self._with_ip_adapters = None
            gc.collect()
            self._with_loras = self._pipeline.with_model(
                with_loras(self._pipeline.model, loras, folder=self.run.lora_dir)
            )
        return self._with_loras

    def _refine(self, model: LoadedModel | None) -> None:
        assert self._pipeline is not None
        self._pipeline = self._pipeline.with_refiner(model)
        if self._with_loras is not None:
            self._with_loras = self._with_loras.with_refiner(model)

    def _specs_for(self, request: ResolvedRequest) -> tuple[ModelSpec, ModelSpec | None]:
        """The model of a resolved request, and its refiner."""
        refiner = self.registry.find(request.refiner) if request.refiner is not None else None
        return self.registry.find(request.model), refiner

    def pipeline_for(self, request: ResolvedRequest) -> Pipeline:
        """The painter of a resolved request, its ControlNets among the model's parts; the last ones stay warm.

        Raises what finding and loading its models, LoRAs, IP-Adapters and ControlNets raises.
        """
        spec, refiner = self._specs_for(request)
        pipeline = self.load(spec, request.loras, refiner=refiner)
        pipeline = self._listening(pipeline, tuple(one.adapting for one in request.ip_adapters))
        wanted = {one.model for one in request.controls}
        if not wanted:
            return pipeline
        self._controlnets = {name: held for name, held in self._controlnets.items() if name in wanted}
        for name in sorted(wanted - set(self._controlnets)):
            self._controlnets[name] = load_controlnet(self.registry.find_controlnet(name), pipeline.model)
        return replace(pipeline, model=with_controlnets(pipeline.model, self._controlnets))

    def _listening(self, pipeline: Pipeline, asked: tuple[tuple[FileRef, float], ...]) -> Pipeline:
        """The painter with IP-Adapters; the last ones and their image encoders stay warm. Raises what they raise."""
        if not asked:
            return pipeline
        held = self._with_ip_adapters
        if held is None or held[0] is not pipeline or held[1].model.ip_adapters != asked:
            self._with_ip_adapters = held = None
            gc.collect()
            adapters = load_ip_adapters(asked, pipeline.model, encoders=self._image_encoders)
            self._image_encoders = {one.look.encoder.folder: one.look.encoder for one in adapters}
            self._with_ip_adapters = held = pipeline, pipeline.with_ip_adapters(adapters)
        return held[1]

    def run_batch(self, batch: Sequence[ResolvedJob], wanted: set[int]) -> Iterator[Event | DecodedImage]:
        """Denoise one batch and decode the `wanted` images of it, falling back when memory runs out."""
        return run_batch(self.pipeline_for(batch[0].request), batch, wanted, observers_for(self.output))

    def _load_for(self, request: ResolvedRequest) -> Iterator[Phase]:
        """Make what many requests share warm: the model, its refiner and its safety checker."""
        spec, refiner = self._specs_for(request)
        if self._pipeline is None or _specs(self._pipeline) != (spec, refiner):
            yield Phase("load", request.model or "")
        self.load(spec, refiner=refiner)
        self._checker_of(spec)
        stop_if_asked(self.stop)

    def _run_batch(
        self,
        batch: Sequence[ResolvedJob],
        wanted: set[int],
        there: Mapping[int, Path],
        journal: Journal | None,
        *,
        started: float,
    ) -> Iterator[Event]:
        """Paint the `wanted` of a batch. Of those whose images are `there` only what explains them is missing."""
        warm = self._with_loras
        try:
            pipeline = self.pipeline_for(batch[0].request)
        except _OF_LOADING as error:  # of what these requests add alone
            yield from _failed(batch, wanted, error)
            return
        checker = self._checker_of(pipeline.model.spec)
        for text in lora_notes(pipeline.model) if self._with_loras is not warm else ():
            yield Note(text)
        fitting = []
        for job in batch:
            try:
                notes = prompt_notes(pipeline, job, strict=self.run.strict_prompt)
                check_request(pipeline, job.request)
                fitting.append(job)
                if job.index in wanted:
                    yield from map(Note, notes)
                    check(pipeline, job.request, self.output)
            except _OF_ONE_IMAGE as error:
                if job.index in wanted:
                    yield Result("failed", job, error=error)
                wanted = wanted - {job.index}  # what only cannot be explained stays company for the others
        for event in run_batch(pipeline, fitting, wanted, observers_for(self.output), checker):
            if not isinstance(event, DecodedImage):
                yield event
                continue
            share = (time.monotonic() - started) / len(wanted)
            path = there.get(event.job.index)
            again = path is not None
            try:
                if checker is not None and checker.flags(from_pixels(event.pixels)):
                    yield Result("flagged", event.job, error=_flagged_by(pipeline))
                    continue
                if path is None:
                    yield Phase("save")
                    path = self._save(event, pipeline, journal)
                result = Result("done", event.job, path=path, seconds=share, fallbacks=event.fallbacks)
                if self.output.beside(path):
                    yield Phase("explain")
                    result = self._explained(result, event.beside, overwrite=again or self.output.overwrite)
                yield result
            except _OF_ONE_IMAGE as error:
                yield Result("failed", event.job, error=error)

    def _checker_of(self, spec: ModelSpec) -> SafetyChecker | None:
        """The safety checker that the model ships, if it is to be asked; the last one stays warm. Raises BadWeights."""
        if self.run.safety == "off":
            return None
        if self._checker is None or self._checker[0] != spec:
            folder = folder_of(spec)
            self._checker = spec, load_safety_checker(folder) if folder is not None else None
        return self._checker[1]

    def _save(self, painted: DecodedImage, pipeline: Pipeline, journal: Journal | None) -> Path:
        """Write one image under a name that is free, or that may be overwritten."""
        image = from_pixels(painted.pixels)
        request, output = painted.job.request, self.output
        facts = provenance(
            pipeline,
            batch={"size": painted.batch_size, "index": painted.batch_index},
            fallbacks=painted.fallbacks,
            pixels=pixels_digest(image),
        )
        data = image_bytes(image, output.format, Record(request, facts) if output.metadata else None)
        size = dict(zip(("width", "height"), request.final_size, strict=True))
        own = {"index": painted.job.index, "custom_id": painted.job.custom_id or "none"}
        fields = {**request.model_dump(), **size, **own}
        name = image_name(output.template, fields, suffix=SUFFIX_OF[output.format])
        for number in itertools.count(1):
            candidate = numbered(name, number)
            if str(candidate).lower() in self._names:
                continue
            try:
                for file in output.beside(output.outdir / candidate):
                    check_new(file, overwrite=output.overwrite)
                if journal is not None:
                    journal.note(request.key(), self._keys[painted.job.index], str(candidate), data)
                write_whole(output.outdir / candidate, data, overwrite=output.overwrite)
            except AlreadyExists:
                if is_literal(output.template) and number == 1:
                    raise
                continue
            self._names.add(str(candidate).lower())
            return output.outdir / candidate
        raise AssertionError("unreachable")

    def _explained(self, result: Result, files: Iterable[File], *, overwrite: bool) -> Result:
        """The result with what explains its image written beside it; who has the image's name has theirs, too."""
        assert result.path is not None
        path, written = result.path, []
        try:
            for suffix, data in files:
                written.append(path.parent / f"{path.stem}{suffix}")
                write_whole(written[-1], data, overwrite=overwrite)
        except (BadOutput, OutOfMemory, UsageError) as error:
            text = f"{path} is generated, but not all that explains it: {error}"
            return replace(result, status="failed", error=type(error)(text))
        return replace(result, beside=tuple(written))


def run_batch(
    pipeline: Pipeline,
    batch: Sequence[ResolvedJob],
    wanted: set[int],
    observed_by: Sequence[Observe] = (),
    checker: SafetyChecker | None = None,
) -> Iterator[Event | DecodedImage]:
    """Denoise one batch and decode the `wanted` images of it, falling back when memory runs out.

    Images whose prompts come to other lengths are denoised apart, each with its like. What fails is the images that
    are denoised together: a Result says so of each, and the others go on. The `checker` hides what it flags from those
    who look on; what it says of the images is the caller's to ask.
    """
    alike: dict[Hashable, list[ResolvedJob]] = {}
    for job in batch:
        alike.setdefault(pipeline.encode.shape(job.request), []).append(job)
    for jobs in alike.values():
        yield from _run_alike(pipeline, jobs, wanted, observed_by, checker)


def _run_alike(
    pipeline: Pipeline,
    batch: list[ResolvedJob],
    wanted: set[int],
    observed_by: Sequence[Observe],
    checker: SafetyChecker | None,
) -> Iterator[Event | DecodedImage]:
    decode = partial(_decoded_anyhow, pipeline)
    pieces = [batch]
    fallbacks: tuple[str, ...] = ()
    while pieces:
        piece = pieces.pop(0)
        asked_for = [job for job in piece if job.index in wanted]
        if not asked_for:
            continue
        requests = [job.request for job in piece]
        step, crowded = None, False
        told: list[str] = []
        observers: list[Observer] = []
        try:
            yield Phase("encode")
            guided, passes = requests[0].guided, list(requests[0].passes)
            pipeline.encode(requests, guided=guided, steps=passes[0]).at(1)  # `generate` finds it done
            denoising = partial(Phase, "denoise", f"{len(piece)} images" if len(piece) > 1 else "")
            yield denoising(passes.pop(0))
            with contextlib.ExitStack() as stack:
                observers += [stack.enter_context(observe(pipeline, requests, decode)) for observe in observed_by]
                for step in sample(pipeline, requests, report=told.append):
                    for observer in observers:
                        observer.see(step)
                    look = partial(_preview_image, pipeline, requests, step, checker)
                    yield Progress(step.index, step.count, len(piece), look)
                    if passes and step.index + 1 == step.count:
                        yield denoising(passes.pop(0))
        except _OF_ONE_IMAGE as error:
            yield from (Result("failed", job, error=error) for job in asked_for)
            continue
        except Exception as error:
            if not out_of_memory(error):
                raise
            crowded = True
        if crowded or step is None:  # outside `except`: the exception would keep the memory alive
            observers.clear()
            free_caches()
            if len(piece) == 1:
                alone = OutOfMemory("out of memory while denoising a single image; try a smaller --size")
                yield Result("failed", piece[0], error=alone)
                continue
            half = (len(piece) + 1) // 2
            pieces = [piece[:half], piece[half:], *pieces]
            fallbacks = (*fallbacks, f"batch of {len(piece)} halved: out of memory while denoising")
            yield Note(f"out of memory with {len(piece)} images at once; going on with {half}")
            continue
        latents = step.latents
        told = list(dict.fromkeys(told))
        yield from map(Note, told)
        yield Phase("decode")
        for position, job in enumerate(piece):
            if job.index not in wanted:
                continue
            try:
                pixels, notes = decode_with_fallbacks(pipeline.space, latents[position])
                pixels = finished(pipeline, job.request, pixels)
            except _OF_ONE_IMAGE as error:
                yield Result("failed", job, error=error)
                continue
            for note in notes:
                yield Note(note)
            beside = _explanation(observers, position, pixels)
            yield DecodedImage(job, pixels, len(piece), position, (*fallbacks, *told, *notes), beside)


def _explanation(observers: Sequence[Observer], position: int, pixels: Tensor) -> Iterator[File]:
    for observer in observers:
        yield from observer.files(position, pixels)


def _preview_image(
    pipeline: Pipeline, requests: Sequence[ResolvedRequest], step: Step, checker: SafetyChecker | None
) -> Image.Image | None:
    try:
        return preview_image(pipeline, requests, step, checker)
    except Exception as error:
        if not out_of_memory(error):
            raise
    free_caches()
    return None


def _decoded_anyhow(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """The pixels of latents that need not be an image yet, whatever had to be done for them."""
    return decode_with_fallbacks(pipeline.space, latents, may_be_black=True)[0]


def _flagged_by(pipeline: Pipeline) -> BadOutput:
    name = pipeline.model.spec.name
    return BadOutput(f"the safety checker of {name} flagged the image, so it was not saved (--safety off saves it)")


def finished(pipeline: Pipeline, request: ResolvedRequest, pixels: Tensor) -> Tensor:
    """What is done to decoded pixels [3, H, W]: what a mask keeps is laid over them, and a watermark is put in.

    Raises BadOutput for a watermark that the image cannot carry.
    """
    if request.masked:
        pixels = pipeline.inputs.init_image(request).pasted(pixels)
    if request.watermark is not None:
        pixels = to_pixels(marked(from_pixels(pixels), request.watermark))
    return pixels


def generate_images(
    pipeline: Pipeline, requests: Sequence[ResolvedRequest], *, batch_size: int | None = None
) -> list[DecodedImage]:
    """Paint resolved requests with a painter that is at hand, and return the images in their order; no files.

    The way of a trainer to its sample images: the batches and fall-backs are those of `sdcli generate`, so an image
    has the same pixels as one that `generate` generates with these weights, device, dtype and batch size. The networks
    are in evaluation mode meanwhile. Raises what is wrong with an image: UsageError, BadOutput and OutOfMemory.
    """
    jobs = [ResolvedJob(index, request, pipeline.model.spec) for index, request in enumerate(requests)]
    painted: dict[int, DecodedImage] = {}
    with evaluating(pipeline.model.parts.values()):
        for batch in plan(jobs, RunSettings(device=pipeline.model.device.type, batch_size=batch_size)):
            for event in run_batch(pipeline, batch, {job.index for job in batch}):
                if isinstance(event, DecodedImage):
                    painted[event.job.index] = event
                elif isinstance(event, Result) and event.error is not None:
                    raise event.error
    return [painted[job.index] for job in jobs]


@contextlib.contextmanager
def evaluating(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Dropout and its like are off inside, and each layer is as it was afterwards."""
    training = [module for network in networks for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


PER_IMAGE = {
    *("prompt", "negative_prompt", "prompt_template", "seed", "variation_seed", "variation_strength"),
    *("init_image", "mask", "mask_blur", "invert_mask", "extend", "watermark"),
    *("controls", "ip_adapters"),
}
"""The fields in which the requests of one batch may differ; controls and IP-Adapters in their images alone."""


def plan(jobs: Sequence[ResolvedJob], run: RunSettings) -> list[list[ResolvedJob]]:
    """Batches of jobs that can be denoised together: their requests differ in what `PER_IMAGE` names alone.

    The same jobs always give the same batches; models come in the order of their first job, and so do what goes with
    them, LoRAs and ControlNets.
    """
    groups: dict[tuple[Any, ...], list[ResolvedJob]] = {}
    for job in jobs:
        r = job.request
        shared = tuple(value for name, value in r if name not in PER_IMAGE)
        controls = tuple(one.model_copy(update={"image": None}) for one in r.controls)
        adapting = tuple(one.adapting for one in r.ip_adapters)
        groups.setdefault((shared, r.masked, is_latents(r.init_image), controls, adapting), []).append(job)
    models, weights = (list(dict.fromkeys(kind(job) for job in jobs)) for kind in (_models, _weights))
    batches = []
    for group in sorted(groups.values(), key=lambda g: (models.index(_models(g[0])), weights.index(_weights(g[0])))):
        width, height = group[0].request.final_size
        size = run.batch_size or automatic_batch_size(width * height, device=run.device)
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def _failed(batch: Sequence[ResolvedJob], wanted: set[int], error: SdcliError) -> Iterator[Result]:
    return (Result("failed", job, error=error) for job in batch if job.index in wanted)


def _models(job: ResolvedJob) -> tuple[str | None, ...]:
    return job.request.model, job.request.refiner


def _weights(job: ResolvedJob) -> tuple[Any, ...]:
    request = job.request
    adapting = tuple(one.adapting for one in request.ip_adapters)
    return _models(job), request.loras, adapting, tuple(control.model for control in request.controls)


def automatic_batch_size(pixels: int, *, device: str) -> int:
    """Images per batch: from size and device alone, not from what is free now, so that it is always the same.

    A CPU is busy with one 512x512 image, and gains from batches only for small ones; a GPU needs several.
    """
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    room = 16 * 512 * 512 if on_gpu else 8 * 128 * 128
    return max(1, min(16 if on_gpu else 8, room // pixels))


def _specs(pipeline: Pipeline) -> tuple[ModelSpec, ModelSpec | None]:
    return pipeline.model.spec, pipeline.refiner.model.spec if pipeline.refiner is not None else None


def prompt_notes(pipeline: Pipeline, job: ResolvedJob, *, strict: bool) -> list[str]:
    """What the text encoder will not see of a job's prompts, which is nothing unless they are plain.

    Raises UsageError instead with `strict`, and for what the model's text encoder cannot do.
    """
    pipeline.encode.shape(job.request)
    tokenizer = pipeline.model.tokenizer
    if tokenizer is None:
        return []
    notes = []
    for kind, text in (("prompt", job.request.full_prompt), ("negative prompt", job.request.negative_prompt or "")):
        tokens = tokenizer(text)
        if tokens.cut and job.request.prompt_syntax == "plain":
            cut = tokens.cut if len(tokens.cut) <= 100 else f"{tokens.cut[:60]} ... {tokens.cut[-30:]}"
            problem = f"the {kind} has {tokens.count} tokens, {tokenizer.room} fit; cut: {cut!r}"
            if strict:
                raise UsageError(problem)
            notes.append(problem)
        if "<|endoftext|>" in text or "<|startoftext|>" in text:
            notes.append(f"the {kind} spells a special token of CLIP; what follows it may have no effect")
    return notes


def lora_notes(model: LoadedModel) -> list[str]:
    """What the LoRAs of a model hold that has no effect."""
    return [
        f"{one.ref.path}: {len(one.unmatched)} of its names have no place in {model.spec.name} and no effect, first "
        f"{one.unmatched[0]} ({one.layers} layers do)"
        for one in model.loras
        if one.unmatched
    ]


def provenance(pipeline: Pipeline, **facts: Any) -> dict[str, Any]:
    """The facts of a run that belong into an image's record. No times: the same request gives the same bytes."""
    model = pipeline.model
    return {
        "sdcli": sdcli.__version__,
        "model": model.spec.name,
        "origin": model.spec.origin(),
        "weights": pipeline.weights(),
        **({"loras": [_lora_facts(one) for one in model.loras]} if model.loras else {}),
        "torch": torch.__version__,
        "diffusers": importlib.metadata.version("diffusers"),
        "device": model.device.type,
        "hardware": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine(),
        "dtype": str(model.dtype).removeprefix("torch."),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()},
    }


def _lora_facts(lora: AppliedLora) -> dict[str, Any]:
    return {
        "name": lora_name(lora.ref),
        "sha256": lora.ref.sha256,
        "tensors_sha256": lora.tensors_sha256,
        "layers": lora.layers,
        "unmatched": len(lora.unmatched),
    }
