"""Jobs through the generation service, without the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sdcli.diffusion.pipeline import Pipeline
from sdcli.generation import service
from sdcli.generation.events import Event, Generated, Result
from sdcli.generation.journal import Journal
from sdcli.generation.model_cache import Lease, ModelCache
from sdcli.generation.plan import Batch, Limits
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.settings import OutputSettings, RunSettings
from sdcli.generation.writer import Writer
from sdcli.models.registry import ModelSpec, load_registry
from sdcli.request.schema import ResolvedRequest


def cache_of(**run: Any) -> ModelCache:
    """A cache without any model, on the CPU."""
    return ModelCache(RunSettings(device="cpu", **run))


def generate_files(
    jobs: Sequence[ResolvedJob],
    outdir: Path,
    *,
    cache: ModelCache | None = None,
    run: dict[str, Any] | None = None,
    journal: Journal | None = None,
    **output: Any,
) -> list[Event]:
    """All events of jobs whose images are written into a folder; `run` and `output` are fields of the settings."""
    writer = Writer(OutputSettings(outdir=outdir, **output), journal)
    return list(service.generate(jobs, cache or cache_of(**(run or {})), writer))


def results(events: Sequence[Event]) -> list[Result]:
    return [event for event in events if isinstance(event, Result)]


def generate_images(
    pipeline: Pipeline, requests: Sequence[ResolvedRequest], *, batch_size: int | None = None
) -> list[Generated]:
    """The images of requests, by a pipeline that is at hand."""
    jobs = [ResolvedJob(index, request, pipeline.model.spec) for index, request in enumerate(requests)]
    return service.generate_images(Lease(pipeline), jobs, Limits(batch_size))


def pipeline_for(cache: ModelCache, request: ResolvedRequest) -> Pipeline:
    """The pipeline that the cache lends for a request. The tests use it without the lease."""
    with cache.lease(ResolvedJob.of(1, request, load_registry())) as lease:
        return lease.pipeline


def pipeline_of(cache: ModelCache, spec: ModelSpec, *, refiner: ModelSpec | None = None) -> Pipeline:
    """The pipeline that the cache lends for a model, with a refiner or without."""
    request: Any = SimpleNamespace(model=spec.name, loras=(), ip_adapters=(), controls=())
    with cache.lease(ResolvedJob(1, request, spec, refiner)) as lease:
        return lease.pipeline


def indices(batches: Sequence[Batch]) -> list[list[int]]:
    return [[job.index for job in batch.jobs] for batch in batches]
