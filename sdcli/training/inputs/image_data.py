"""The images of a run: listed, examined, assigned to buckets, and split into training and validation images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdcli.data.buckets import Bucketing, bucket_sizes
from sdcli.data.inspection import Inspection, inspect, summarize
from sdcli.data.records import ImageSet
from sdcli.data.sources import open_images
from sdcli.errors import UsageError
from sdcli.training.events import Event, Preparation, RunNote
from sdcli.training.inputs.order import Order
from sdcli.training.settings import ImageSettings, cache_folder


@dataclass(frozen=True)
class ImageData:
    """The usable images of a run."""

    images: ImageSet
    bucketing: Bucketing
    trained: np.ndarray
    """int64 indices into `images`"""
    held_out: np.ndarray
    sizes: dict[int, tuple[int, int]]
    """The bucket of each usable image, by index: width and height in pixels."""
    digests: tuple[str, ...]
    """The SHA-256 of each image's bytes, by index."""
    dropped: int

    def only(self, usable: np.ndarray) -> ImageData:
        """The data without images outside `usable`. Raises UsageError if no training image is left."""
        trained = np.intersect1d(self.trained, usable)
        if not len(trained):
            raise UsageError("no image could be encoded")
        held_out = np.intersect1d(self.held_out, usable)
        lost = len(self.trained) + len(self.held_out) - len(trained) - len(held_out)
        return replace(self, trained=trained, held_out=held_out, dropped=self.dropped + lost)

    @property
    def used(self) -> np.ndarray:
        """The indices of training and validation images, in the order of the set."""
        return np.sort(np.concatenate([self.trained, self.held_out]))

    def largest(self) -> tuple[int, int]:
        """The width and height of the largest bucket."""
        return max({self.sizes[int(index)] for index in self.used}, key=lambda size: size[0] * size[1])

    def validation(self) -> list[tuple[int, tuple[int, int]]]:
        """The validation images with their buckets."""
        return [(int(index), self.sizes[int(index)]) for index in self.held_out]

    def order(self, *, batch: int, seed: int, buffer: int) -> Order:
        """The order of the training images, for steps of `batch` samples."""
        buckets: dict[tuple[int, int] | None, list[int]] = {}
        for index in self.trained.tolist():
            buckets.setdefault(self.sizes[index], []).append(index)
        blocks, window = None, self.images.shuffle_window
        if window is not None:  # a larger window would read shards again and again
            buffer = min(buffer, window)
        if self.images.streamed:
            blocks = np.array([self.images[index].block for index in range(len(self.images))])
        return Order(
            {size: np.array(indices) for size, indices in buckets.items()}, batch, seed, blocks=blocks, buffer=buffer
        )

    def contents(self) -> dict[str, Any]:
        """Digest and captions of every usable image by name; a resumed run must find the same."""
        named = ((self.images[int(index)], self.digests[int(index)]) for index in self.used)
        return {item.name: (digest, item.captions) for item, digest in named}

    def buckets(self) -> dict[str, int]:
        """The number of training images in each bucket, by its size as `512x768`."""
        return dict(Counter("{}x{}".format(*self.sizes[index]) for index in self.trained.tolist()))

    def texts(self) -> list[tuple[str, ...]]:
        """The captions of every usable image."""
        return [self.images[int(index)].captions for index in self.used]


def list_data(data: str, settings: ImageSettings) -> ImageSet:
    """List the images of DATA without reading them. Raises NotFound, UsageError, Offline and BadLatents."""
    return open_images(
        data,
        image_column=settings.image_column,
        caption_column=settings.caption_column,
        caption_extension=settings.caption_extension,
        split=settings.split,
    )


def examine_data(
    data: str,
    images: ImageSet,
    settings: ImageSettings,
    *,
    resolution: tuple[int, int],
    size_step: int,
    captions: bool,
) -> Generator[Event, None, ImageData]:
    """Examine every image of DATA; yields progress, and a note for everything that is not used.

    With `captions` each image must have one. Raises UsageError if no image is left or captions are missing.
    """
    if images.kind == "latents":
        _refuse_framing(settings, data)
    bucketing = _bucketing(settings, resolution, size_step=size_step)
    found = yield from examine_images(images, settings, what="images")
    for line in found.report():
        yield RunNote(line, warning=line.lstrip().startswith(("dropped", "note")))
    used = found.used
    if not len(used):
        raise UsageError(f"{data} has no usable image")
    if settings.max_train_samples is not None:
        used = used[: settings.max_train_samples]
    if captions:
        _require_captions(images, used, data)
    held_out = _held_out(images, used, settings.validation_split)
    size_of = {
        int(index): (int(width), int(height))
        if images.kind == "latents"
        else bucketing.bucket_for((int(width), int(height)))
        for index, (width, height) in zip(found.used, found.sizes[found.used], strict=True)
    }
    return ImageData(
        images=images,
        bucketing=bucketing,
        trained=np.setdiff1d(used, held_out),
        held_out=held_out,
        sizes=size_of,
        digests=found.digests,
        dropped=len(found.dropped),
    )


def examine_images(images: ImageSet, settings: ImageSettings, *, what: str) -> Generator[Event, None, Inspection]:
    """Examine every image of a set; yields progress about `what`."""
    facts = []
    for one in inspect(images, facts_folder=cache_folder(settings.cache_dir) / "examined"):
        facts.append(one)
        if len(facts) % 100 == 0 or len(facts) == len(images):
            yield Preparation(f"examining {what}", len(facts), len(images))
    return summarize(images, facts)


def _bucketing(settings: ImageSettings, resolution: tuple[int, int], *, size_step: int) -> Bucketing:
    for side in resolution:
        if side % size_step or side < size_step:
            raise UsageError(f"--resolution: must be a multiple of {size_step}, not {side}")
    if not settings.enable_bucket:
        return Bucketing((resolution,), settings.random_crop)
    step = settings.bucket_reso_steps or max(size_step, min(resolution) // 8 // size_step * size_step)
    if step % size_step:
        raise UsageError(f"--bucket-reso-steps: must be a multiple of {size_step}, not {step}")
    buckets = bucket_sizes(resolution, step=step, smallest=settings.min_bucket_reso, largest=settings.max_bucket_reso)
    return Bucketing(buckets, settings.random_crop)


def _refuse_framing(settings: ImageSettings, data: str) -> None:
    """Refuse settings of cropping and mirroring: latents have the size that they were encoded at."""
    framed = {"resolution", "random_crop", "random_flip", "enable_bucket"}
    for name in sorted(framed):
        if getattr(settings, name):
            raise UsageError(f"--{name.replace('_', '-')} has no effect on {data}, which holds latents")


def _require_captions(images: ImageSet, used: np.ndarray, data: str) -> None:
    without = [images[int(index)].name for index in used if not images[int(index)].captions]
    if without:
        shown = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        raise UsageError(
            f"{len(without)} of {len(used)} images in {data} have no caption ({shown}); "
            "caption them, or train without captions: --unconditional, or --caption-dropout 1"
        )


def _held_out(images: ImageSet, used: np.ndarray, share: float) -> np.ndarray:
    """The validation images, chosen by their names only, so that every run on this data holds out the same ones."""
    count = int(len(used) * share)
    digests = [hashlib.blake2b(images[int(index)].name.encode(errors="surrogateescape")).digest() for index in used]
    chosen = sorted(range(len(used)), key=lambda place: digests[place])[:count]
    return np.sort(used[np.array(chosen, dtype=np.int64)])
