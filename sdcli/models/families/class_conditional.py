"""Models whose prompt is the name of a class: diffusers' UNet2DModel with a class embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcli.errors import BadWeights
from sdcli.models.families import unconditional
from sdcli.models.families.family import Configs, Family, Loaded, ModelKind

if TYPE_CHECKING:
    from sdcli.encoders.conditioning import Encode

MAX_CLASSES = 100_000


def describe(configs: Configs) -> ModelKind:
    """The class embedding has a row for each class, and may have one more for "no class"."""
    sizes, rows = unconditional.sizes(configs), configs.denoiser.get("num_class_embeds")
    if type(rows) is not int or not 1 <= rows <= MAX_CLASSES:
        raise BadWeights(f"{configs.source}: its UNet cannot have {rows!r} classes")
    names = tuple(map(str, range(rows))) if configs.classes is None else configs.classes
    if len(names) not in (rows - 1, rows):
        raise BadWeights(f"{configs.source}: classes.json names {len(names)} classes, and its UNet has {rows}")
    if len(names) < rows:
        return ModelKind(**sizes, classes=names, null_label=len(names))
    return ModelKind(**sizes, classes=names, unguided="always generates a class, never none")


def encoding(model: Loaded) -> Encode:
    """Names of classes as labels."""
    from sdcli.encoders.conditioning import ClassEncoding

    return ClassEncoding(model.spec.kind.label, model.device)


CLASS_CONDITIONAL = Family(
    name="class-conditional",
    pipelines=unconditional.PIPELINES,
    defaults=unconditional.DEFAULTS,
    reads_text=False,
    refuses=unconditional.NO_TEXT,
    claims=lambda denoiser: denoiser.get("num_class_embeds") is not None,
    describe=describe,
    encoding=encoding,
)
