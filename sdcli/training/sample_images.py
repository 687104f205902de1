"""What a UNet generates while it is being trained: fixed prompts and seeds, through the engine of `generate`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from sdcli.diffusion.pipeline import Pipeline
from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.generation.engine import generate_images
from sdcli.generation.resolve.resolve import resolve
from sdcli.images.contact_sheet import contact_sheet, write_sheet
from sdcli.images.pixels import from_pixels
from sdcli.io.files import write_whole
from sdcli.metadata.embed import image_bytes
from sdcli.models.controlnet import PART
from sdcli.models.loader import model_in_memory
from sdcli.models.registry import ModelDefaults, ModelSpec
from sdcli.models.sources import FolderSource
from sdcli.request.fields import Control, FileRef
from sdcli.request.schema import GenerationRequest
from sdcli.training.task import Networks

MOST = 16
"""Images on a sheet where no prompts were given."""


@dataclass(frozen=True)
class SampleSheet:
    """Paints RUN/samples/step-<n>.png; seed number i belongs to prompt number i, at every step the same."""

    name: str
    prompts: Sequence[str]
    defaults: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    frozen: Mapping[str, nn.Module]
    """`vae` and `text_encoder`, as far as the model has them; also the `unet` where a ControlNet is trained."""
    tokenizer: ClipTokenizer | None = None
    classes: Sequence[str] | None = None
    steps: int | None = None
    maps: Sequence[Image.Image] = ()
    """With a ControlNet: what it sees, one for each prompt; they are written into RUN/samples, too."""

    def __call__(self, networks: Networks, step: int, folder: Path) -> list[Path]:
        """Paint with the networks as they are now; returns the sheet. Raises BadOutput for NaN."""
        spec = ModelSpec(
            name=self.name,
            source=FolderSource(kind="folder", path=folder.parent),
            defaults=ModelDefaults.model_validate(self.defaults),
        )
        parts = {
            **self.frozen,
            **{PART + self.name if name == "controlnet" else name: networks[name] for name in networks},
        }
        model = model_in_memory(
            spec,
            scheduler_config=self.scheduler_config,
            tokenizer=self.tokenizer,
            classes=self.classes,
            identity=f"{self.name} step {step}",
            **parts,
        )
        for network in self.frozen.values():
            network.to(model.device)
        pipeline = Pipeline.of(model)
        requests = [
            resolve(
                GenerationRequest(prompt=prompt, prompt_syntax="plain", seed=seed, steps=self.steps, controls=controls),
                model.spec,
            )
            for seed, (prompt, controls) in enumerate(zip(self.prompts, self._controls(folder), strict=True))
        ]
        images = [from_pixels(painted.pixels) for painted in generate_images(pipeline, requests)]
        labels, columns = [request.prompt for request in requests], None
        if self.maps:  # each beside what it led to
            columns = 2 * math.ceil(math.sqrt(len(images) / 2))
            images = [one for pair in zip(self.maps, images, strict=True) for one in pair]
            labels = [one for label in labels for one in ("", label)]
        path = folder / f"step-{step}.png"
        enlarge = max(1, 64 // images[0].width)
        sheet = contact_sheet(images, labels=labels, columns=columns, enlarge=enlarge)
        settings = {"step": step, "requests": [request.model_dump(by_alias=True) for request in requests]}
        write_sheet(path, sheet, settings, overwrite=True)
        return [path]

    def _controls(self, folder: Path) -> list[tuple[Control, ...]]:
        """What each image's ControlNet sees."""
        if not self.maps:
            return [()] * len(self.prompts)
        paths = [folder / f"map-{number}.png" for number in range(len(self.maps))]
        for path, image in zip(paths, self.maps, strict=True):
            write_whole(path, image_bytes(image, "png", None), overwrite=True)
        return [(Control(model=self.name, image=FileRef(path=str(path))),) for path in paths]


def default_prompts(captions: Sequence[tuple[str, ...]], classes: Sequence[str], *, unconditional: bool) -> list[str]:
    """What to generate where no prompts were given: the classes, or captions spread over the data, or nothing."""
    if classes:
        return [classes[number % len(classes)] for number in range(max(MOST, min(len(classes), 2 * MOST)))]
    if unconditional:
        return [""] * MOST
    firsts = [some[0] for some in captions if some]
    if not firsts:
        return [""] * MOST
    step = max(1, len(firsts) // MOST)
    return firsts[::step][:MOST]
