"""Errors of jobs that can be found without torch, reported before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from sdcli.errors import SdcliError, UsageError
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob
from sdcli.generation.settings import OutputSettings
from sdcli.images.formats import MAX_SIDE
from sdcli.models.hub.download import folder_of
from sdcli.models.registry import ControlNetSpec, ModelSpec, Registry


class Preflight:
    """Looks at the jobs of one run; at each model and ControlNet once."""

    def __init__(self, registry: Registry, output: OutputSettings) -> None:
        self._output = output
        self._model = cache(partial(_absence, registry.find))
        self._controlnet = cache(partial(_absence, registry.find_controlnet))

    def refusal(self, job: ResolvedJob | BadJob) -> SdcliError | None:
        """Why it cannot be generated: it is not understood, too large for its file, or what it needs is not here.

        With --resume nobody asks for models: what an earlier run generated needs none.
        """
        if isinstance(job, BadJob):
            return job.error
        request, image_format = job.request, self._output.format
        if max(request.final_size) > MAX_SIDE[image_format]:
            width, height = request.final_size
            return UsageError(f"an image of {width}x{height} is too long for {image_format}; use png")
        if self._output.resume:
            return None
        models = (self._model(name) for name in (request.model, request.refiner) if name is not None)
        return next(filter(None, (*models, *(self._controlnet(one.model) for one in request.controls))), None)


def _absence(find: Callable[[str], ModelSpec | ControlNetSpec], name: str) -> SdcliError | None:
    """What is to be said of what is not wholly here, as a model of the hub that was never pulled."""
    try:
        folder_of(find(name))
    except SdcliError as error:
        return error
    return None
