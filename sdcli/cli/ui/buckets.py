"""The buckets that a training would use, as `sdcli dataset` shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sdcli.errors import UsageError
from sdcli.training.config_files import settings_from
from sdcli.training.settings import ImageSettings

if TYPE_CHECKING:
    from sdcli.data.buckets import BucketFill
    from sdcli.data.inspection import Inspection
    from sdcli.data.records import ImageSet

SIZE_STEP = 8
"""Sides are multiples of this, in pixels, as for the models in latent space."""


def framing_of(
    resolution: str | None, step: int | None, batch_size: int | None, validation_split: float | None
) -> ImageSettings | None:
    """The settings of a training with buckets, None without --resolution. Raises UsageError."""
    typed = {"train_batch_size": batch_size, "validation_split": validation_split, "bucket_reso_steps": step}
    if resolution is None:
        for name, value in typed.items():
            if value is not None:
                raise UsageError(f"--{name.replace('_', '-')} has no effect without --resolution")
        return None
    if validation_split is not None and batch_size is None:
        raise UsageError("--validation-split has no effect without --train-batch-size")
    values = {"train_batch_size": 1, **{name: value for name, value in typed.items() if value is not None}}
    if batch_size is None:
        values["validation_split"] = 0.0
    return settings_from(ImageSettings, {"resolution": resolution.strip(), "enable_bucket": True, **values})


def bucket_fills_of(images: ImageSet, found: Inspection, framing: ImageSettings | None) -> list[BucketFill]:
    """The buckets as the trainers make them."""
    if framing is None:
        return []
    from sdcli.data.buckets import bucket_fills
    from sdcli.training.inputs.image_data import bucketing_of, own_buckets, training_images

    bucketing = bucketing_of(framing, framing.target_size((0, 0)), size_step=SIZE_STEP)
    trained = training_images(images, found.used, framing)[0].tolist()
    own = own_buckets(images, found, bucketing)
    return bucket_fills(
        [(int(found.sizes[index][0]), int(found.sizes[index][1])) for index in trained],
        [own[index] for index in trained],
        batch_size=framing.train_batch_size,
        repeats=[images[index].repeats for index in trained],
    )


def bucket_row(fill: BucketFill) -> dict[str, Any]:
    """A bucket as a JSON object."""
    width, height = fill.size
    return {
        "width": width,
        "height": height,
        "pictures": fill.images,
        "repeats": fill.repeats,
        "enlarged": fill.enlarged,
        "merged": fill.merged,
    }


def bucket_lines(fills: Sequence[BucketFill], batch_size: int | None) -> Iterator[str]:
    """The buckets as lines of text, with what steps of `batch_size` samples make of them."""
    if not fills:
        return
    images = sum(fill.images for fill in fills)
    about = f" for {images:,} training images, in steps of {batch_size:,} samples" if batch_size is not None else ""
    yield f"buckets: {len(fills)}{about}"
    for fill in fills:
        width, height = fill.size
        enlarged = f", {fill.enlarged:,} smaller than it" if fill.enlarged else ""
        merged = f", {fill.merged:,} of them from buckets too small for a step" if fill.merged else ""
        repeated = f"; a step repeats {fill.repeats:,} samples" if batch_size is not None and fill.repeats else ""
        yield f"  {fill.images:>8,}  {width}x{height}{enlarged}{merged}{repeated}"
