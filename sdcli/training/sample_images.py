"""What a UNet generates while it is being trained: fixed prompts and seeds, through the service behind `generate`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError
from torch import nn

from sdcli.diffusion.pipeline import Pipeline
from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.generation.model_cache import Lease
from sdcli.generation.plan import Limits
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.resolve.resolve import resolve
from sdcli.generation.service import generate_images
from sdcli.images.contact_sheet import contact_sheet, write_sheet
from sdcli.images.pixels import from_pixels
from sdcli.io.files import write_whole
from sdcli.metadata.embed import image_bytes
from sdcli.models.controlnet import PART
from sdcli.models.families.family import Family
from sdcli.models.loaded_model import model_in_memory
from sdcli.models.model_defaults import ModelDefaults
from sdcli.models.registry import ModelSpec
from sdcli.models.sources import FolderSource
from sdcli.request.fields import Control, FileRef
from sdcli.request.schema import GenerationRequest
from sdcli.training.evaluation import evaluating
from sdcli.training.task import Networks

MAX_IMAGES = 16
"""Images on a sheet without --sample-prompts."""


@dataclass(frozen=True)
class SampleSheet:
    """Generates RUN/samples/step-<n>.png; prompt number i has seed i at every step."""

    name: str
    prompts: Sequence[str]
    defaults: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    frozen: Mapping[str, nn.Module]
    """The VAE and the text encoders, if the model has them and they are not trained; the `unet` of a ControlNet."""
    family: Family
    tokenizers: Mapping[str, ClipTokenizer] = field(default_factory=dict)
    """Text encoder -> its tokenizer."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The model_index.json of the base model."""
    classes: Sequence[str] | None = None
    steps: int | None = None
    maps: Sequence[Image.Image] = ()
    """The ControlNet's maps, one for each prompt; they are also written into RUN/samples."""

    def __call__(self, networks: Networks, step: int, folder: Path) -> list[Path]:
        """Generate with the networks in their current state; returns the sheet's path. Raises BadOutput for NaN."""
        spec = ModelSpec(
            name=self.name,
            source=FolderSource(kind="folder", path=folder.parent),
            family=self.family,
            defaults=ModelDefaults.model_validate(self.defaults),
        )
        parts = {
            **self.frozen,
            **{PART + self.name if name == "controlnet" else name: networks[name] for name in networks},
        }
        model = model_in_memory(
            spec,
            scheduler_config=self.scheduler_config,
            tokenizers=self.tokenizers,
            settings=self.settings,
            classes=self.classes,
            identity=f"{self.name} step {step}",
            **parts,
        )
        for network in self.frozen.values():
            network.to(model.device)
        requests = [
            resolve(
                GenerationRequest(prompt=prompt, prompt_syntax="plain", seed=seed, steps=self.steps, controls=controls),
                model.spec,
            )
            for seed, (prompt, controls) in enumerate(zip(self.prompts, self._controls(folder), strict=True))
        ]
        jobs = [ResolvedJob(index, request, model.spec) for index, request in enumerate(requests)]
        with evaluating(model.parts.values()):
            generated = generate_images(Lease(Pipeline.of(model)), jobs, Limits(on_gpu=model.device.type == "cuda"))
        images = [from_pixels(one.pixels) for one in generated]
        labels, columns = [request.prompt for request in requests], None
        if self.maps:  # each map next to its image
            columns = 2 * math.ceil(math.sqrt(len(images) / 2))
            images = [one for pair in zip(self.maps, images, strict=True) for one in pair]
            labels = [one for label in labels for one in ("", label)]
        path = folder / f"step-{step}.png"
        enlarge = max(1, 64 // images[0].width)
        sheet = contact_sheet(images, labels=labels, columns=columns, enlarge=enlarge)
        settings = {"step": step, "requests": [request.model_dump(by_alias=True) for request in requests]}
        return [path, *write_sheet(path, sheet, settings, overwrite=True)]

    def _controls(self, folder: Path) -> list[tuple[Control, ...]]:
        """The ControlNet input of each image."""
        if not self.maps:
            return [()] * len(self.prompts)
        paths = [folder / f"map-{number}.png" for number in range(len(self.maps))]
        for path, image in zip(paths, self.maps, strict=True):
            write_whole(path, image_bytes(image, "png", None), overwrite=True)
        return [(Control(model=self.name, image=FileRef(path=str(path))),) for path in paths]


def default_prompts(captions: Sequence[tuple[str, ...]], classes: Sequence[str], *, unconditional: bool) -> list[str]:
    """Prompts of the sample sheet without --sample-prompts: the classes, captions spread over the data, or none."""
    if classes:
        return [classes[number % len(classes)] for number in range(max(MAX_IMAGES, min(len(classes), 2 * MAX_IMAGES)))]
    if unconditional:
        return [""] * MAX_IMAGES
    firsts = [some[0] for some in captions if some]
    if not firsts:
        return [""] * MAX_IMAGES
    step = max(1, len(firsts) // MAX_IMAGES)
    return [text for text in firsts[::step][:MAX_IMAGES] if _is_prompt(text)] or [""]


def _is_prompt(text: str) -> bool:
    """Whether a caption can be generated from; one with a NUL, for example, cannot."""
    try:
        GenerationRequest(prompt=text, prompt_syntax="plain")
    except ValidationError:
        return False
    return True
