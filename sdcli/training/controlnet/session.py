"""`sdcli train-controlnet`: from its settings to a task, with the model, the images and their maps."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from sdcli.data.cache.keys import CachedLatents
from sdcli.data.conditioning_images import Maps, with_maps_of_column, with_maps_of_folder
from sdcli.data.records import ImageSet
from sdcli.diffusion.attention.sliced import use_plain_small_attention
from sdcli.diffusion.noise_schedule import NoiseSchedule
from sdcli.errors import UsageError
from sdcli.images.pixels import from_pixels
from sdcli.models.controlnet import load_controlnet
from sdcli.models.loaded_model import LoadedModel
from sdcli.training import model_parts
from sdcli.training.controlnet.settings import ControlNetSettings
from sdcli.training.controlnet.task import ControlNetTask, new_controlnet
from sdcli.training.events import Event, Preparation, RunNote
from sdcli.training.inputs.encoding import computes_in_half, encode_captions, encode_images, frozen_text_encoder
from sdcli.training.inputs.image_data import ImageData, examine_data, examine_images, list_data, merge_buckets
from sdcli.training.inputs.sources import Latents, Pixels, WithMaps
from sdcli.training.memory import controlnet_memory
from sdcli.training.origin import origin, schedule_facts
from sdcli.training.sample_images import SampleSheet
from sdcli.training.session import RunSetup, Session, fingerprint
from sdcli.training.unet.task import DenoisingObjective

MAX_SAMPLES = 8
"""Images on a sample sheet without --sample-prompts, each with its map."""


class ControlNetSession(Session[ControlNetSettings]):
    """A run of `sdcli train-controlnet`."""

    command: ClassVar[str] = "train-controlnet"
    kind: ClassVar[type[ControlNetSettings]] = ControlNetSettings

    def build(self) -> Generator[Event, None, RunSetup]:
        settings = self.settings
        if "=" in str(self.run):
            raise UsageError(f"the name {self.run} has a =, which `generate --control RUN=IMAGE` could not parse")
        images, maps = self._listed()
        yield Preparation("loading the model", 0)
        model = self._model()
        defaults = model.spec.defaults
        resolution = settings.target_size((defaults.width, defaults.height))
        data = yield from examine_data(
            self.data,
            images,
            settings,
            resolution=resolution,
            size_step=model.spec.kind.size_step,
            captions=settings.caption_dropout < 1,
        )
        data, map_digests = yield from self._paired(data, maps)
        data = yield from merge_buckets(data, self.batch)
        controlnet = self._controlnet(model)
        half = computes_in_half(settings=settings, device=self.accelerator.device)
        with self.accelerator.main_process_first():
            source = yield from encode_images(data, settings, model, half=half)
            conditioning = yield from encode_captions(
                data, settings, model, template=model.spec.defaults.prompt_template
            )
        if isinstance(source, Latents) and isinstance(source.cached, CachedLatents):
            data = data.only(source.cached.items)
            model.vae.to("cpu")  # from here on needed for sample images only
        map_pixels = None  # None: the source's own pixels, from which a preprocessor makes maps
        if maps is not None or not isinstance(source, Pixels):
            map_pixels = Pixels(maps or data.images, data.bucketing, settings.seed, flip=settings.random_flip)
        task = ControlNetTask(
            networks={"controlnet": controlnet},
            unet=self._frozen_unet(model, controlnet),
            autocast=self.accelerator.autocast,
            objective=DenoisingObjective.of(NoiseSchedule.from_config(model.scheduler_config), settings),
            order=data.order(batch=self.batch, seed=settings.seed, buffer=settings.shuffle_buffer),
            source=WithMaps(source, map_pixels, settings.preprocessor or "none"),
            conditioning=conditioning,
            seed=settings.seed,
            learning_rates={"controlnet": settings.learning_rate},
            family=model.family,
            held_out=data.validation(),
            frozen_text_encoder=frozen_text_encoder(model, conditioning, half=half),
            vae=model.vae,
            name_of=lambda index: data.images[index].name,
        )
        task.sample_sheet = sheet = self._sample_sheet(model, task, data, resolution)
        averaged = "_ema" if settings.use_ema else ""
        return RunSetup(
            task=task,
            samples=len(task.order),
            links={
                "controlnet": f"controlnet{averaged}",
                **({"raw/controlnet": "controlnet"} if settings.use_ema else {}),
            },
            write_frozen=lambda run: None,
            origin=origin(
                {"model": model},
                {"noise schedule": schedule_facts(model.scheduler_config)},
            ),
            memory=controlnet_memory(task, settings, size=data.largest(), kept=sheet.frozen.values()),
            facts={
                "data": self.data,
                "pictures": len(data.trained),
                "held_out": len(data.held_out),
                "dropped": data.dropped,
                "data_fingerprint": fingerprint({**data.contents(), "": map_digests}),
                "buckets": data.buckets(),
                "sampling": data.sampling,
                "trained_parameters": sum(p.numel() for p in controlnet.parameters()),
                "base": {part: model.identity(part) for part in ("unet", "vae", "text_encoder")},
            },
        )

    # The data

    def _listed(self) -> tuple[ImageSet, Maps | None]:
        """The images, and their maps unless a preprocessor makes them."""
        settings = self.settings
        images = list_data(self.data, settings)
        if images.kind != "pictures":
            raise UsageError(f"{self.data} holds latents, but a ControlNet is trained on images and their maps")
        if settings.preprocessor is not None:
            return images, None
        if settings.conditioning_data_dir is not None:
            return with_maps_of_folder(images, settings.conditioning_data_dir)
        return with_maps_of_column(
            images,
            settings.conditioning_image_column,
            data=self.data,
            image_column=settings.image_column,
            split=settings.split,
        )

    def _paired(self, data: ImageData, maps: Maps | None) -> Generator[Event, None, tuple[ImageData, dict[str, str]]]:
        """The data without images that lack a usable map, and the digests of the maps by the images' names.

        Raises UsageError if no image is left.
        """
        if maps is None:
            return data, {}
        found = yield from examine_images(maps.listed, self.settings, what="maps")
        reasons = {one.name: one.reason for one in found.dropped}
        whole = set(found.used.tolist())
        digests: dict[str, str] = {}
        paired = []
        for index in data.used.tolist():
            name, place = data.images[index].name, int(maps.places[index])
            if place in whole:
                paired.append(index)
                digests[name] = found.digests[place]
            else:
                reason = f"its map {reasons.get(maps[index].name, 'cannot be used')}" if place >= 0 else "has no map"
                yield RunNote(f"dropped {name}: {reason}", warning=True)
        if not paired:
            raise UsageError(f"no image of {self.data} has a usable map")
        return data.only(np.array(paired)), digests

    # The networks

    def _model(self) -> LoadedModel:
        spec = self.registry.find(self.settings.model)
        if spec.kind.inpaints:
            raise UsageError(f"{spec.name} is an inpainting model; train the ControlNet with its base model instead")
        return model_parts.load_to_train(spec, self.command, device=str(self.accelerator.device))

    def _controlnet(self, model: LoadedModel) -> nn.Module:
        """The network to train, with gradients."""
        if self.settings.controlnet is None:
            network = new_controlnet(model, seed=self.settings.seed)
        else:
            network = load_controlnet(self.registry.find_controlnet(self.settings.controlnet), model).network
        if self.settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return network.requires_grad_(True)

    def _frozen_unet(self, model: LoadedModel, controlnet: nn.Module) -> nn.Module:
        """The UNet without gradients of its own; those of the ControlNet pass through its second half."""
        settings, unet = self.settings, model.unet.requires_grad_(False)
        if computes_in_half(settings=settings, device=self.accelerator.device):
            for network in (unet, controlnet):
                use_plain_small_attention(network)
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if settings.channels_last:
            unet.to(memory_format=torch.channels_last)
        return unet

    def _sample_sheet(
        self, model: LoadedModel, task: ControlNetTask, data: ImageData, resolution: tuple[int, int]
    ) -> SampleSheet:
        """The sample sheet with the maps of held-out images, or of trained ones if none are held out."""
        settings = self.settings
        pool = data.held_out if len(data.held_out) else data.trained
        count = len(settings.sample_prompts) or min(MAX_SAMPLES, len(pool))
        chosen = [int(pool[number * len(pool) // count]) for number in range(count)]
        captions = [(data.images[index].captions or ("",))[0] for index in chosen]
        return SampleSheet(
            name=str(self.run),
            prompts=settings.sample_prompts or captions,
            defaults=model_parts.generation_defaults(
                model.spec.defaults, resolution=resolution, guided=True, prompt_template=settings.prompt_template
            ),
            scheduler_config=model.scheduler_config,
            family=model.family,
            frozen={"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder},
            tokenizers=model.tokenizers,
            steps=settings.sample_steps,
            maps=[from_pixels(task.source.fixed(index, resolution)["map"]) for index in chosen],
        )
