"""What a request's ControlNets see, as far as it shapes the request: that they can have an effect, and which files."""

from __future__ import annotations

from typing import Any

from sdcli.errors import UsageError
from sdcli.generation.resolve.init_image import identified
from sdcli.models.layout import ModelKind
from sdcli.request.schedulers import SCHEDULERS
from sdcli.request.schema import GenerationRequest, known


def controls_filled(request: GenerationRequest, kind: ModelKind, *, model: str) -> dict[str, Any]:
    """The controls with the digests of their images.

    Raises UsageError for what would have no effect with this `kind` of model, and what reading the files raises.
    """
    if not request.controls:
        return {}
    if kind.conditioning != "text":
        raise UsageError(f"{model} takes no captions, and ControlNets are made for models that do")
    pinned = (one.model_copy(update={"image": identified(one.image)}) for one in request.controls)
    return {"controls": tuple(pinned)}


def check_parts(request: GenerationRequest) -> None:
    """Raise UsageError for a control, or a guidance interval, of a resolved request that has a say in no step."""
    counts = [SCHEDULERS[known(request.scheduler)].calls(steps) for steps in request.passes]
    for one in request.controls:
        if not any(one.is_active(index, count) for count in counts for index in range(count)):
            raise UsageError(f"controls: {one.start:g}-{one.end:g} of {request.steps} steps leaves {one.model} no step")
    part = request.guidance_interval
    if part is not None and not any(part.indices(count) for count in counts):
        raise UsageError(f"guidance_interval: {part} of {request.steps} steps leaves guidance no step")
