"""A quick image of the x0 prediction of a step, for a preview while the batch is denoised."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from sdcli.diffusion.loop import Step
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.x0_prediction import x0_predictor
from sdcli.errors import BadOutput, OutOfMemory
from sdcli.images.contact_sheet import contact_sheet, empty
from sdcli.images.pixels import from_pixels
from sdcli.io.out_of_memory import MemoryAttempt
from sdcli.models.safety_checker import SafetyChecker
from sdcli.request.schema import ResolvedRequest
from sdcli.vae.decode import decode_with_fallbacks

T = TypeVar("T")


def preview_image(
    pipeline: Pipeline,
    requests: Sequence[ResolvedRequest],
    step: Step,
    checker: SafetyChecker | None = None,
    *,
    exact: bool = False,
) -> Image.Image:
    """The x0 prediction of a step; several images on one sheet, where a flagged one is left empty.

    Roughly decoded, or with `exact` by the VAE in full size. Raises BadOutput where that gives no image.
    """
    images = preview_images(pipeline, requests, step, checker, exact=exact)
    whole = images[0] if len(images) == 1 else contact_sheet(images)
    if not exact:
        whole.info["decoded"] = pipeline.previews.described
    return whole


def preview_images(
    pipeline: Pipeline,
    requests: Sequence[ResolvedRequest],
    step: Step,
    checker: SafetyChecker | None = None,
    *,
    exact: bool = False,
    rows: Sequence[int] | None = None,
) -> list[Image.Image]:
    """The x0 prediction of a step, an image for each request or for those of some `rows`; a flagged one is empty.

    Raises BadOutput where `exact` decoding gives no image.
    """
    _, x0 = x0_predictor(pipeline, requests[0])(step)
    if rows is not None:
        requests, x0 = [requests[row] for row in rows], x0[list(rows)]
    if exact:
        images = [from_pixels(_decoded(pipeline, request, x)) for request, x in zip(requests, x0, strict=True)]
    else:
        images = [from_pixels(pipeline.previews.pixels(pipeline.model, pipeline.space, x)) for x in x0]
    if checker is not None:
        images = [empty(image.size) if checker.flags(image) else image for image in images]
    return images


def preview_or_none(*arguments: Any, **options: Any) -> Image.Image | None:
    """`preview_image`, or None where memory runs out, or the numbers are no image."""
    return _if_possible(lambda: preview_image(*arguments, **options), otherwise=None)


def previews_or_none(*arguments: Any, **options: Any) -> list[Image.Image]:
    """`preview_images`, or none where memory runs out, or the numbers are no image."""
    return _if_possible(lambda: preview_images(*arguments, **options), otherwise=[])


def _if_possible(compute: Callable[[], T], *, otherwise: T) -> T:
    attempt = MemoryAttempt()
    with attempt, contextlib.suppress(BadOutput, OutOfMemory):
        return compute()
    attempt.ran_out()
    return otherwise


def _decoded(pipeline: Pipeline, request: ResolvedRequest, x: Tensor) -> Tensor:
    """x [C, h, w] -> pixels [3, H, W], with the kept part of a masked init image laid over them."""
    pixels, _ = decode_with_fallbacks(pipeline.space, x, may_be_black=True)
    return pipeline.inputs.init_image(request).pasted(pixels) if request.masked else pixels
