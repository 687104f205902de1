"""The images of a run: listed, examined, assigned to buckets, and split into training and validation images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sdcli.data.buckets import Bucketing, bucket_sizes, merged_buckets, samples_of
from sdcli.data.inspection import Inspection, inspect, summarize
from sdcli.data.records import ImageSet
from sdcli.data.sources import open_images
from sdcli.errors import UsageError
from sdcli.io import rng
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
    originals: np.ndarray
    """int [N, 2]: the width and height of each image as it is stored."""
    digests: tuple[str, ...]
    """The SHA-256 of each image's bytes, by index."""
    dropped: int
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """What is particular about the samples: merged buckets, repeated images, a limit. A resumed run must find the same;
    {} for runs that versions without these rules trained in the same way."""

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
            buckets.setdefault(self.sizes[index], []).extend([index] * self.images[index].repeats)
        blocks, window = None, self.images.shuffle_window
        if window is not None:  # a larger window would read shards again and again
            buffer = min(buffer, window)
        if self.images.streamed:
            blocks = np.array([self.images[index].block for index in range(len(self.images))])
        return Order(
            {size: np.array(indices) for size, indices in buckets.items()}, batch, seed, blocks=blocks, buffer=buffer
        )

    def merged(self, batch: int) -> ImageData:
        """The data with small buckets merged for steps of `batch` samples; see `buckets.merged_buckets`.

        Latents keep their size, as they cannot be cropped.
        """
        if self.images.kind == "latents":
            return self
        own = [self.sizes[index] for index in self.trained.tolist()]
        into = merged_buckets(samples_of(own, self.repeats()), batch)
        moved = {size: target for size, target in into.items() if target != size}
        if not moved:
            return self
        sizes = {**self.sizes, **{index: into[self.sizes[index]] for index in self.trained.tolist()}}
        named = {shown_size(size): shown_size(target) for size, target in moved.items()}
        return replace(self, sizes=sizes, sampling={**self.sampling, "merged_buckets": named})

    def repeats(self) -> list[int]:
        """How often each training image is sampled in an epoch."""
        return [self.images[index].repeats for index in self.trained.tolist()]

    def contents(self) -> dict[str, Any]:
        """Digest and captions of every usable image by name; a resumed run must find the same."""
        named = ((self.images[int(index)], self.digests[int(index)]) for index in self.used)
        return {item.name: (digest, item.captions) for item, digest in named}

    def labels(self) -> dict[str, str | None]:
        """The class of every usable image by name."""
        items = (self.images[int(index)] for index in self.used)
        return {item.name: item.label for item in items}

    def buckets(self) -> dict[str, int]:
        """The number of training images in each bucket, by its size as `512x768`."""
        return dict(Counter(shown_size(self.sizes[index]) for index in self.trained.tolist()))

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
    bucketing = bucketing_of(settings, resolution, size_step=size_step)
    found = yield from examine_images(images, settings, what="images")
    for line in found.report():
        yield RunNote(line, warning=line.lstrip().startswith(("dropped", "lost", "note")))
    if not len(found.used):
        raise UsageError(f"{data} has no usable image")
    trained, held_out = training_images(images, found.used, settings)
    if captions:
        _require_captions(images, np.sort(np.concatenate([trained, held_out])), data)
    sampling: dict[str, Any] = {}
    if settings.max_train_samples is not None and settings.max_train_samples < len(found.used):
        sampling["max_train_samples"] = "drawn by the seed"
    repeated = sum(images[index].repeats for index in trained.tolist())
    if repeated != len(trained):
        sampling["repeats"] = repeated
    return ImageData(
        images=images,
        bucketing=bucketing,
        trained=trained,
        held_out=held_out,
        sizes=own_buckets(images, found, bucketing),
        originals=found.sizes,
        digests=found.digests,
        dropped=len(found.dropped),
        sampling=sampling,
    )


def merge_buckets(data: ImageData, batch: int) -> Generator[Event, None, ImageData]:
    """`ImageData.merged` for steps of `batch` samples, with a note about every bucket that is too small for a step."""
    merged = data.merged(batch)
    counts = Counter(data.sizes[index] for index in data.trained.tolist())
    moved = merged.sampling.get("merged_buckets", {})
    if moved:
        shown = ", ".join(f"{size} to {moved[size]}" for size in sorted(moved))
        images = sum(count for size, count in counts.items() if shown_size(size) in moved)
        yield RunNote(
            f"{images:,} images are in buckets of fewer samples than the {batch:,} of a step, and are cropped to the "
            f"next bucket instead ({shown}); a smaller --train-batch-size keeps more aspect ratios"
        )
    samples = samples_of([merged.sizes[index] for index in merged.trained.tolist()], merged.repeats())
    small = {size: count for size, count in samples.items() if count < batch}
    if small:
        shown = ", ".join(f"{count:,} of {shown_size(size)}" for size, count in sorted(small.items()))
        yield RunNote(
            f"a step of {batch:,} samples repeats images, because there are only {shown}; a smaller --train-batch-size "
            "repeats fewer"
        )
    return merged


def own_buckets(images: ImageSet, found: Inspection, bucketing: Bucketing) -> dict[int, tuple[int, int]]:
    """The bucket of each usable image, by index; latents have the size that they were encoded at."""
    sizes = ((int(width), int(height)) for width, height in found.sizes[found.used])
    return {
        int(index): size if images.kind == "latents" else bucketing.bucket_for(size)
        for index, size in zip(found.used, sizes, strict=True)
    }


def training_images(images: ImageSet, used: np.ndarray, settings: ImageSettings) -> tuple[np.ndarray, np.ndarray]:
    """The indices of training and of validation images, rising, out of the `used` ones."""
    if settings.max_train_samples is not None:
        used = _limited(images, used, settings.max_train_samples, seed=settings.seed)
    held_out = _held_out(images, used, settings.validation_split)
    return np.setdiff1d(used, held_out), held_out


def _limited(images: ImageSet, used: np.ndarray, limit: int, *, seed: int) -> np.ndarray:
    """`limit` of the images, drawn by the seed: one of each class first, then from each in proportion to its size."""
    drawn = used[rng.permutation(seed, 0, "max train samples", len(used))].tolist()
    labels = [images[index].label for index in drawn]
    sizes, seen = Counter(labels), Counter[str | None]()
    turns = []
    for label in labels:
        turns.append(seen[label] / sizes[label])
        seen[label] += 1
    order = np.argsort(np.array(turns), kind="stable")
    return np.sort(np.array(drawn, dtype=np.int64)[order[:limit]])


def examine_images(images: ImageSet, settings: ImageSettings, *, what: str) -> Generator[Event, None, Inspection]:
    """Examine every image of a set; yields progress about `what`."""
    facts = []
    for one in inspect(images, facts_folder=cache_folder(settings.cache_dir) / "examined"):
        facts.append(one)
        if len(facts) % 100 == 0 or len(facts) == len(images):
            yield Preparation(f"examining {what}", len(facts), len(images))
    return summarize(images, facts)


def bucketing_of(settings: ImageSettings, resolution: tuple[int, int], *, size_step: int) -> Bucketing:
    """The buckets of a run; sides are multiples of `size_step` pixels. Raises UsageError."""
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


def shown_size(size: tuple[int, int]) -> str:
    """`512x768`: width and height."""
    return f"{size[0]}x{size[1]}"


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
