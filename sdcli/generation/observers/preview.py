"""A quick image of the x0 prediction of a step, for a preview while the batch is denoised."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from sdcli.diffusion.loop import Step
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.x0_prediction import x0_predictor
from sdcli.images.contact_sheet import contact_sheet, empty
from sdcli.images.pixels import from_pixels
from sdcli.io.out_of_memory import MemoryAttempt
from sdcli.models.safety_checker import SafetyChecker
from sdcli.request.schema import ResolvedRequest


def preview_image(
    pipeline: Pipeline, requests: Sequence[ResolvedRequest], step: Step, checker: SafetyChecker | None = None
) -> Image.Image:
    """The x0 prediction of a step, roughly decoded; several images on one sheet, where a flagged one is left empty."""
    _, x0 = x0_predictor(pipeline, requests[0])(step)
    images = [from_pixels(pipeline.previews.pixels(pipeline.model, pipeline.space, x)) for x in x0]
    if checker is not None:
        images = [empty(image.size) if checker.flags(image) else image for image in images]
    whole = images[0] if len(images) == 1 else contact_sheet(images)
    whole.info["decoded"] = pipeline.previews.described
    return whole


def preview_or_none(
    pipeline: Pipeline, requests: Sequence[ResolvedRequest], step: Step, checker: SafetyChecker | None
) -> Image.Image | None:
    """`preview_image`, or None where memory runs out."""
    attempt = MemoryAttempt()
    with attempt:
        return preview_image(pipeline, requests, step, checker)
    attempt.ran_out()
    return None
