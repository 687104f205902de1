"""The jobs of `sdcli generate` that are refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sdcli.errors import SdcliError, UsageError
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob
from sdcli.generation.settings import OutputSettings
from sdcli.images.formats import MAX_SIDE
from sdcli.models.hub.folders import folder_of
from sdcli.models.registry import ControlNetSpec, ModelSpec


def refusals(
    jobs: Sequence[ResolvedJob | BadJob], output: OutputSettings, *, models: bool
) -> Iterator[tuple[int, SdcliError]]:
    """(index, error) of each job that is malformed, too large for its file format, or lacks a model on this machine.

    With --resume `models` are not looked for: the images that an earlier run finished need none.
    """
    missing: dict[tuple[type, str], SdcliError | None] = {}
    for job in jobs:
        if isinstance(job, BadJob):
            yield job.index, job.error
            continue
        width, height = job.request.final_size
        if max(width, height) > MAX_SIDE[output.format]:
            yield job.index, UsageError(f"an image of {width}x{height} is too long for {output.format}; use png")
            continue
        for spec in (job.model, job.refiner, *job.controlnets.values()) if models else ():
            if spec is None:
                continue
            key = type(spec), spec.name
            if key not in missing:
                missing[key] = _absence(spec)
            if (error := missing[key]) is not None:
                yield job.index, error
                break


def _absence(spec: ModelSpec | ControlNetSpec) -> SdcliError | None:
    """The error for a model whose files are not all on this machine, such as one that was never pulled."""
    try:
        folder_of(spec)
    except SdcliError as error:
        return error
    return None
