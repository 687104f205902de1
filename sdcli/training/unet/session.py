"""`sdcli train-unet`: from its settings to a task, with the model, the data, the caches and the sample sheets."""

from __future__ import annotations

from collections.abc import Collection, Generator
from typing import Any, ClassVar, Literal, cast

from torch import nn

from sdcli.data.cache.keys import CachedLatents, EncodedLatents, check_same_vae
from sdcli.data.latent_folders import LatentFiles
from sdcli.diffusion.attention.sliced import use_plain_small_attention
from sdcli.diffusion.noise_schedule import SCHEDULES, NoiseSchedule, Schedule
from sdcli.errors import UsageError
from sdcli.models.loaded_model import LoadedModel
from sdcli.request.schedulers import TRAINED
from sdcli.training import model_parts
from sdcli.training.events import Event, Preparation
from sdcli.training.inputs.conditioning import ClassConditioning, NoConditioning, SampleConditioning
from sdcli.training.inputs.encoding import computes_in_half, encode_captions, encode_images, frozen_text_encoder
from sdcli.training.inputs.image_data import ImageData, examine_data, list_data, merge_buckets
from sdcli.training.inputs.order import Order
from sdcli.training.inputs.sources import ImageSource, Latents, NormalizedPixels, Pixels, WithSizes
from sdcli.training.lora import TEXT_TARGETS, LoraShape, add_lora
from sdcli.training.memory import unet_memory
from sdcli.training.model_parts import ModelFiles
from sdcli.training.origin import origin, schedule_facts
from sdcli.training.sample_images import SampleSheet, default_prompts
from sdcli.training.session import RunSetup, Session, fingerprint
from sdcli.training.unet.model import TrainedModel, trained_model, with_classes
from sdcli.training.unet.settings import UnetSettings
from sdcli.training.unet.task import DenoisingObjective, UnetTask
from sdcli.vae.autoencoder import scaling_factor


class UnetSession(Session[UnetSettings]):
    """A run of `sdcli train-unet`."""

    command: ClassVar[str] = "train-unet"
    kind: ClassVar[type[UnetSettings]] = UnetSettings
    presets: ClassVar[Collection[str]] = model_parts.PRESETS

    def build(self) -> Generator[Event, None, RunSetup]:
        settings = self.settings
        images = list_data(self.data, settings)
        yield Preparation("loading the model", 0)
        model = trained_model(settings, self.registry, device=str(self.accelerator.device))
        kind_of_schedule = SCHEDULES[model.family.process]
        without_effect = (NoiseSchedule.settings - kind_of_schedule.settings) & settings.given()
        if without_effect:
            name = min(without_effect).replace("_", "-")
            raise UsageError(f"--{name} has no effect: the model was trained {TRAINED[model.family.process]}")
        schedule = kind_of_schedule.from_config(model.scheduler_config)
        captions = not (settings.unconditional or settings.class_conditional or settings.space == "pixel")
        data = yield from examine_data(
            self.data,
            images,
            settings,
            resolution=model.resolution,
            size_step=model.size_step,
            captions=captions and model.text_of is not None and settings.caption_dropout < 1,
        )
        data = yield from merge_buckets(data, self.batch)
        model = with_classes(model, settings, data, source=self.data)
        networks, loras = self._networks(model)
        source, conditioning = yield from self._inputs(model, data)
        if isinstance(source, Latents) and isinstance(source.cached, CachedLatents):
            data = data.only(source.cached.items)
        if model.takes_sizes:
            source = WithSizes(source, data.originals, data.bucketing, settings.seed, flip=settings.random_flip)
        order = data.order(batch=self.batch, seed=settings.seed, buffer=settings.shuffle_buffer)
        files = self._files(model, networks)
        task = self._task(model, schedule, data, source, conditioning, networks, loras, order)
        task.sample_sheet = sheet = self._sample_sheet(model, data, files)
        return RunSetup(
            task=task,
            samples=len(order),
            links=files.links() if not loras else {},
            merged=files.links() if loras else {},
            write_merged=task.write_merged if loras else None,
            origin=origin(
                {"model": model.base_of, "vae": model.vae_of, "text encoder": model.text_of},
                {"noise schedule": schedule_facts(model.scheduler_config), "configuration": _configuration(settings)},
                replaced=() if loras else networks,
            ),
            write_frozen=files.write,
            memory=unet_memory(task, settings, size=data.largest(), kept=sheet.frozen.values()),
            facts={
                "data": self.data,
                "pictures": len(data.trained),
                "held_out": len(data.held_out),
                "dropped": data.dropped,
                "data_fingerprint": fingerprint(data.contents()),
                **({"classes_fingerprint": fingerprint(data.labels())} if model.classes else {}),
                "buckets": data.buckets(),
                "sampling": data.sampling,
                "trained_parameters": sum(
                    p.numel() for n in networks.values() for p in n.parameters() if p.requires_grad
                ),
                "base": _frozen_weights(model, networks, loras),
            },
        )

    # The inputs

    def _inputs(
        self, model: TrainedModel, data: ImageData
    ) -> Generator[Event, None, tuple[ImageSource, SampleConditioning]]:
        """The images and the conditioning of samples; the first process fills the caches."""
        settings = self.settings
        with self.accelerator.main_process_first():
            source = yield from self._source(model, data)
            conditioning = yield from self._conditioning(model, data)
        if model.vae_of is not None and not isinstance(source, Pixels):
            model.vae_of.vae.to("cpu")  # from here on needed for sample images only
        if settings.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()  # type: ignore[operator]
        return source, conditioning

    def _source(self, model: TrainedModel, data: ImageData) -> Generator[Event, None, ImageSource]:
        settings = self.settings
        if data.images.kind == "latents":
            if model.vae_of is None:
                raise UsageError(f"--space pixel cannot train on {self.data}, which holds latents")
            files = cast(LatentFiles, data.images)
            check_same_vae(files, identity=model.vae_of.identity("vae"), model=model.vae_of.spec.name)
            return Latents(EncodedLatents(files), scaling_factor(model.vae_of.vae), settings.seed)
        if model.vae_of is None:
            pixels = Pixels(data.images, data.bucketing, settings.seed, flip=settings.random_flip)
            return NormalizedPixels(pixels, channels=int(model.unet.config.in_channels))  # type: ignore[union-attr,arg-type]
        return (yield from encode_images(data, settings, model.vae_of, half=self._half))

    @property
    def _half(self) -> bool:
        return computes_in_half(settings=self.settings, device=self.accelerator.device)

    def _conditioning(self, model: TrainedModel, data: ImageData) -> Generator[Event, None, SampleConditioning]:
        settings = self.settings
        if model.classes:
            numbers = {name: number for number, name in enumerate(model.classes)}
            rows = int(model.unet.config.num_class_embeds)  # type: ignore[union-attr,arg-type]
            return ClassConditioning(
                data.images, numbers, settings.seed, dropout=settings.caption_dropout if rows > len(numbers) else 0.0
            )
        if model.text_of is None:
            return NoConditioning()
        base = model.defaults.prompt_template if model.defaults is not None else "{prompt}"
        return (
            yield from encode_captions(
                data,
                settings,
                model.text_of,
                template=base,
                ignored=settings.unconditional,
                trained=settings.train_text_encoder,
            )
        )

    # The task

    def _networks(self, model: TrainedModel) -> tuple[dict[str, nn.Module], dict[str, LoraShape]]:
        """The networks to train, with gradients, and the LoRAs in them."""
        settings = self.settings
        networks: dict[str, nn.Module] = {"unet": model.unet}
        if self._half:
            use_plain_small_attention(model.unet)
        if settings.train_text_encoder:
            assert model.text_of is not None
            networks["text_encoder"] = model.text_of.text_encoder
        if settings.rank is None:
            for network in networks.values():
                network.requires_grad_(True)
            return networks, {}
        alpha = settings.lora_alpha if settings.lora_alpha is not None else float(settings.rank)
        loras = {}
        for name, network in networks.items():
            usual = model.family.lora_targets if name == "unet" else TEXT_TARGETS
            targets = settings.lora_targets if settings.lora_targets and name == "unet" else usual
            loras[name] = LoraShape(settings.rank, alpha, tuple(targets), settings.lora_dropout)
            add_lora(network, loras[name], seed=settings.seed)
        return networks, loras

    def _task(
        self,
        model: TrainedModel,
        schedule: Schedule,
        data: ImageData,
        source: ImageSource,
        conditioning: SampleConditioning,
        networks: dict[str, nn.Module],
        loras: dict[str, LoraShape],
        order: Order,
    ) -> UnetTask:
        settings = self.settings
        frozen_text = None
        if model.text_of is not None and not settings.train_text_encoder:
            frozen_text = frozen_text_encoder(model.text_of, conditioning, half=self._half)
        return UnetTask(
            networks=networks,
            objective=DenoisingObjective.of(schedule, settings),
            order=order,
            source=source,
            conditioning=conditioning,
            seed=settings.seed,
            learning_rates={
                "unet": settings.learning_rate,
                "text_encoder": settings.text_encoder_lr or settings.learning_rate,
            },
            family=model.family,
            held_out=data.validation(),
            frozen_text_encoder=frozen_text,
            vae=model.vae_of.vae if model.vae_of is not None else None,
            loras=loras,
            name_of=lambda index: data.images[index].name,
        )

    def _sample_sheet(self, model: TrainedModel, data: ImageData, files: ModelFiles) -> SampleSheet:
        settings = self.settings
        frozen: dict[str, nn.Module] = {}
        if model.vae_of is not None:
            frozen["vae"] = model.vae_of.vae
        if model.text_of is not None and not settings.train_text_encoder:
            frozen |= {part: model.text_of.parts[part] for part in model.text_of.tokenizers}
        prompts = settings.sample_prompts or default_prompts(
            data.texts(), model.classes, unconditional=settings.unconditional or model.text_of is None
        )
        return SampleSheet(
            name=str(self.run),
            prompts=prompts,
            defaults=files.defaults,
            scheduler_config=model.scheduler_config,
            frozen=frozen,
            family=model.family,
            tokenizers=model.text_of.tokenizers if model.text_of is not None else {},
            settings=files.settings,
            classes=model.classes or None,
            steps=settings.sample_steps,
        )

    def _files(self, model: TrainedModel, networks: dict[str, nn.Module]) -> ModelFiles:
        settings = self.settings
        frozen: dict[str, tuple[LoadedModel, str]] = {}
        space: Literal["latent", "pixel"] = "pixel" if model.vae_of is None else "latent"
        _, components = model.family.components(space)
        if model.vae_of is not None:
            frozen[components["vae"].folder] = (model.vae_of, "vae")
        if model.text_of is not None:
            frozen |= {
                components[part].folder: (model.text_of, part)
                for part in model_parts.text_parts(model.text_of)
                if part not in networks
            }
        return ModelFiles(
            family=model.family,
            space=space,
            scheduler_config=model.scheduler_config,
            defaults=model_parts.generation_defaults(
                model.defaults,
                resolution=model.resolution,
                guided=model.text_of is not None or (bool(model.classes) and settings.caption_dropout > 0),
                prompt_template=settings.prompt_template,
            ),
            frozen=frozen,
            trained={
                name: "CLIPTextModel" if name == "text_encoder" else type(network).__name__
                for name, network in networks.items()
            },
            averaged=tuple(networks) if settings.use_ema else (),
            classes=model.classes,
            settings=model.base_of.settings if model.base_of is not None else {},
        )


def _configuration(settings: UnetSettings) -> dict[str, Any] | None:
    """The configuration of a new UNet, as it is written in its file."""
    return model_parts.unet_config(settings.from_scratch) if settings.from_scratch is not None else None


def _frozen_weights(model: TrainedModel, networks: dict[str, nn.Module], loras: dict[str, LoraShape]) -> dict[str, str]:
    """The digests of the weights that are not trained, including those that a LoRA is added to."""
    texts = dict.fromkeys(model.text_of.tokenizers, model.text_of) if model.text_of is not None else {}
    of = {"vae": model.vae_of, **texts, "unet": model.base_of}
    return {
        part: loaded.identity(part)
        for part, loaded in of.items()
        if loaded is not None and (part not in networks or part in loras)
    }
