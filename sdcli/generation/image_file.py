"""The file of a generated image: its pixels in a format, with the record of how it was generated."""

from __future__ import annotations

from sdcli.diffusion.pipeline import Pipeline
from sdcli.generation.events import Generated
from sdcli.generation.provenance import preset_facts, provenance
from sdcli.generation.settings import OutputSettings
from sdcli.images.image_files import pixels_digest
from sdcli.images.pixels import from_pixels
from sdcli.metadata.embed import image_bytes
from sdcli.metadata.record import Record


def image_file(
    pipeline: Pipeline, generated: Generated, output: OutputSettings, *, quality: int | None = None
) -> tuple[bytes, Record | None]:
    """The bytes of the file, and the record in it. Raises UsageError for an image that the format cannot hold, and
    OutOfMemory.

    `quality`: 0..100, of a JPEG or WebP; None for the usual one.
    """
    image = from_pixels(generated.pixels)
    record = None
    if output.metadata:
        batch = {"size": generated.batch_size, "index": generated.batch_index}
        facts = provenance(pipeline, **preset_facts(generated.job), batch=batch, fallbacks=generated.fallbacks)
        record = Record(generated.job.request, {**facts, "pixels": pixels_digest(image)})
    return image_bytes(image, output.format, record, quality=quality), record
