"""`sdcli train-unet` from its settings to a task: which model, which images, what is cached, what is generated."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import nn

from sdcli.data.cache.keys import CachedLatents, EncodedLatents, check_same_vae
from sdcli.data.latent_folders import LatentFiles
from sdcli.diffusion.attention.sliced import use_plain_small_attention
from sdcli.diffusion.noise_schedule import NoiseSchedule, schedule_config
from sdcli.errors import UsageError
from sdcli.io.lean_diffusers import UNet2DConditionModel
from sdcli.models.loader import LoadedModel, load_model
from sdcli.models.registry import ModelDefaults, ModelSpec, Registry
from sdcli.training import model_parts
from sdcli.training.events import Event, Preparation
from sdcli.training.inputs.conditioning import ClassConditioning, NoConditioning, SampleConditioning
from sdcli.training.inputs.encoding import computes_in_half, encode_captions, encode_images, frozen_text_encoder
from sdcli.training.inputs.image_data import ImageData, examine_data, list_data
from sdcli.training.inputs.order import Order
from sdcli.training.inputs.sources import Latents, NormalizedPixels, Pixels, Source
from sdcli.training.lora import TARGETS, TEXT_TARGETS, LoraShape, add_lora
from sdcli.training.memory import unet_memory
from sdcli.training.model_parts import ModelFiles
from sdcli.training.sample_images import SampleSheet, default_prompts
from sdcli.training.session import RunSetup, Session, fingerprint
from sdcli.training.unet.settings import UnetSettings
from sdcli.training.unet.task import Objective, UnetTask
from sdcli.vae.autoencoder import cell, scaling_factor


@dataclass(frozen=True)
class _Model:
    """What is trained, and what stands around it."""

    unet: nn.Module
    vae_of: LoadedModel | None
    """The model with the VAE; None in pixel space."""
    text_of: LoadedModel | None
    """The model with the text encoder and the tokenizer; None without text."""
    base_of: LoadedModel | None
    """The model whose UNet goes on; None from scratch."""
    scheduler_config: dict[str, Any]
    defaults: ModelDefaults | None
    resolution: tuple[int, int]
    classes: tuple[str, ...] = ()

    @property
    def size_step(self) -> int:
        depth = len(self.unet.config.block_out_channels)  # type: ignore[union-attr,arg-type]
        factor = cell(self.vae_of.vae) if self.vae_of is not None else 1
        return factor if isinstance(self.unet, UNet2DConditionModel) else factor * 2 ** (depth - 1)


class UnetSession(Session[UnetSettings]):
    """See `Session`."""

    command: ClassVar[str] = "train-unet"
    kind: ClassVar[type[UnetSettings]] = UnetSettings

    def __init__(self, data: str, run: Path, settings: UnetSettings, registry: Registry) -> None:
        super().__init__(data, run, settings)
        self._registry = registry

    def build(self) -> Generator[Event, None, RunSetup]:
        settings = self.settings
        images = list_data(self.data, settings)
        yield Preparation("loading the model", 0)
        model = self._model()
        self._check_effects(model)
        schedule = NoiseSchedule.from_config(model.scheduler_config)
        captions = not (settings.unconditional or settings.class_conditional or settings.space == "pixel")
        data = yield from examine_data(
            self.data,
            images,
            settings,
            resolution=model.resolution,
            size_step=model.size_step,
            captions=captions and model.text_of is not None and settings.caption_dropout < 1,
        )
        model = self._with_classes(model, data)
        networks, loras = self._networks(model)
        source, conditions = yield from self._inputs(model, data)
        if isinstance(source, Latents) and isinstance(source.cached, CachedLatents):
            data = data.only(source.cached.items)
        order = data.order(batch=self.batch, seed=settings.seed, buffer=settings.shuffle_buffer)
        files = self._files(model, networks)
        task = self._task(model, schedule, data, source, conditions, networks, loras, order)
        task.pipeline = self._pipeline(model, data, files)
        return RunSetup(
            task=task,
            samples=len(order),
            links=files.links(),
            write_frozen=files.write,
            memory_bytes=unet_memory(task, settings, size=data.largest()),
            facts={
                "data": self.data,
                "pictures": len(data.trained),
                "held_out": len(data.held_out),
                "dropped": data.dropped,
                "data_fingerprint": fingerprint(data.contents()),
                "buckets": data.buckets(),
                "trained_parameters": sum(
                    p.numel() for n in networks.values() for p in n.parameters() if p.requires_grad
                ),
                "base": _unchanging(model, networks, loras),
            },
        )

    # The model

    def _model(self) -> _Model:
        """Everything but the data's classes; loads only the parts that are needed."""
        settings = self.settings
        if settings.from_scratch is None:
            return self._from_model()
        return self._from_scratch()

    def _from_model(self) -> _Model:
        settings = self.settings
        spec = self._registry.find(settings.model)
        loaded = model_parts.load_to_train(spec, device=self._device())
        kind = loaded.spec.kind
        if settings.unconditional and kind.conditioning == "class":
            raise UsageError(f"{spec.name} generates classes; --unconditional goes with --from-scratch")
        if settings.class_conditional and kind.conditioning != "class":
            raise UsageError(f"{spec.name} generates no classes; --class-conditional goes with --from-scratch")
        defaults = loaded.spec.defaults
        return _Model(
            unet=loaded.unet,
            vae_of=loaded if kind.space == "latent" else None,
            text_of=loaded if kind.conditioning == "text" else None,
            base_of=loaded,
            scheduler_config=self._schedule(loaded.scheduler_config),
            defaults=defaults,
            resolution=settings.target_size((defaults.width, defaults.height)),
            classes=kind.classes,
        )

    def _from_scratch(self) -> _Model:
        settings = self.settings
        assert settings.from_scratch is not None
        config = model_parts.unet_config(settings.from_scratch)
        is_text = config.get("_class_name", "UNet2DConditionModel") == "UNet2DConditionModel"
        if settings.space == "pixel" and is_text:
            raise UsageError("--space pixel trains a UNet2DModel: --from-scratch pixel, pixel-grey, or its config.json")
        if settings.class_conditional and is_text:
            raise UsageError("--class-conditional trains a UNet2DModel: --from-scratch latent, or its config.json")
        if not is_text and not settings.class_conditional and not settings.unconditional and settings.space == "latent":
            raise UsageError("a UNet2DModel takes no captions: add --unconditional or --class-conditional")
        if settings.text_encoder is not None and not is_text:
            raise UsageError("--text-encoder has no effect: this UNet takes no captions")
        vae_of = text_of = None
        base = self._registry.find(settings.model)
        if settings.space == "latent":
            vae_of = self._part(settings.vae, base, "vae")
            text_of = self._part(settings.text_encoder, base, "text_encoder") if is_text else None
        otherwise = (32, 32) if vae_of is None else (base.defaults.width, base.defaults.height)
        resolution = settings.target_size(otherwise)
        schedule = dict(vae_of.scheduler_config) if vae_of is not None else model_parts.DDPM_SCHEDULE
        fitted = model_parts.fitted_config(
            config, resolution=resolution, vae_of=vae_of, text_of=text_of, classes=(), guidance_class=False
        )
        return _Model(
            unet=model_parts.new_unet(fitted, seed=settings.seed),
            vae_of=vae_of,
            text_of=text_of,
            base_of=None,
            scheduler_config=self._schedule(schedule),
            defaults=None,
            resolution=resolution,
        )

    def _part(self, name: str | None, base: ModelSpec, part: Any) -> LoadedModel:
        spec = base if name is None else self._registry.find(name)
        loaded = load_model(spec, device=self._device(), dtype="float32", parts=(part,))
        return model_parts.refuse_shifted(loaded)

    def _check_effects(self, model: _Model) -> None:
        """Refuse what speaks of captions where the model takes none."""
        if model.text_of is not None:
            return
        captions = {"shuffle_caption", "caption_prefix", "prompt_template", "train_text_encoder"}
        if not model.classes and not self.settings.class_conditional:
            captions |= {"caption_dropout", "sample_prompts"}
        typed = captions & self.settings.given()
        if typed:
            raise UsageError(f"--{min(typed).replace('_', '-')} has no effect: this model takes no captions")

    def _with_classes(self, model: _Model, data: ImageData) -> _Model:
        """With --class-conditional the UNet gets a row for each class of the data (and one for none)."""
        settings = self.settings
        if not settings.class_conditional and not model.classes:
            return model
        classes = tuple(data.images.classes)
        without = [data.images[int(i)].name for i in data.used if data.images[int(i)].label is None]
        if not classes or without:
            missing = f"{len(without)} images without a class ({', '.join(without[:3])})" if classes else "no classes"
            wants = "--class-conditional" if settings.class_conditional else "the model, which generates classes,"
            raise UsageError(f"{self.data} has {missing}; {wants} wants class folders or labels")
        if model.classes:
            if classes != model.classes:
                raise UsageError(f"the data's classes ({', '.join(classes[:5])}, ...) are not those of the model")
            return model
        fitted = model_parts.fitted_config(
            dict(model.unet.config),  # type: ignore[arg-type]
            resolution=model.resolution,
            vae_of=model.vae_of,
            text_of=None,
            classes=classes,
            guidance_class=settings.caption_dropout > 0,
        )
        unet = model_parts.new_unet({**fitted, "_class_name": "UNet2DModel"}, seed=settings.seed)
        return replace(model, unet=unet, text_of=None, classes=classes)

    def _schedule(self, base: Any) -> dict[str, Any]:
        s = self.settings
        return dict(
            schedule_config(
                base,
                beta_schedule=s.beta_schedule,
                beta_start=s.beta_start,
                beta_end=s.beta_end,
                prediction_type=s.prediction_type,
                rescale_betas_zero_snr=s.rescale_betas_zero_snr,
            )
        )

    def _device(self) -> str:
        return str(self.accelerator.device)

    # The inputs

    def _inputs(self, model: _Model, data: ImageData) -> Generator[Event, None, tuple[Source, SampleConditioning]]:
        """Where samples come from; fills the caches, the first process for all."""
        settings = self.settings
        with self.accelerator.main_process_first():
            source = yield from self._source(model, data)
            conditions = yield from self._conditions(model, data)
        if model.vae_of is not None and not isinstance(source, Pixels):
            model.vae_of.vae.to("cpu")  # wanted for sample images alone from here on
        if settings.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()  # type: ignore[operator]
        return source, conditions

    def _source(self, model: _Model, data: ImageData) -> Generator[Event, None, Source]:
        settings = self.settings
        if data.images.kind == "latents":
            if model.vae_of is None:
                raise UsageError(f"--space pixel cannot train on {self.data}, which holds latents")
            files = cast(LatentFiles, data.images)
            check_same_vae(files, identity=model.vae_of.identity("vae"), model=model.vae_of.spec.name)
            return Latents(EncodedLatents(files), scaling_factor(model.vae_of.vae), settings.seed)
        if model.vae_of is None:
            pixels = Pixels(data.images, data.framing, settings.seed, flip=settings.random_flip)
            return NormalizedPixels(pixels, channels=int(model.unet.config.in_channels))  # type: ignore[union-attr,arg-type]
        return (yield from encode_images(data, settings, model.vae_of, half=self._half))

    @property
    def _half(self) -> bool:
        return computes_in_half(settings=self.settings, device=self.accelerator.device)

    def _conditions(self, model: _Model, data: ImageData) -> Generator[Event, None, SampleConditioning]:
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

    def _networks(self, model: _Model) -> tuple[dict[str, nn.Module], dict[str, LoraShape]]:
        """What is trained, with gradients where they are wanted."""
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
            usual = TARGETS if name == "unet" else TEXT_TARGETS
            targets = settings.lora_targets if settings.lora_targets and name == "unet" else usual
            loras[name] = LoraShape(settings.rank, alpha, tuple(targets), settings.lora_dropout)
            add_lora(network, loras[name], seed=settings.seed)
        return networks, loras

    def _task(
        self,
        model: _Model,
        schedule: NoiseSchedule,
        data: ImageData,
        source: Source,
        conditions: SampleConditioning,
        networks: dict[str, nn.Module],
        loras: dict[str, LoraShape],
        order: Order,
    ) -> UnetTask:
        settings = self.settings
        frozen_text = None
        if model.text_of is not None and not settings.train_text_encoder:
            frozen_text = frozen_text_encoder(model.text_of, conditions, half=self._half)
        return UnetTask(
            networks=networks,
            objective=Objective.of(schedule, settings),
            order=order,
            source=source,
            conditions=conditions,
            seed=settings.seed,
            learning_rates={
                "unet": settings.learning_rate,
                "text_encoder": settings.text_encoder_lr or settings.learning_rate,
            },
            held_out=data.validation(),
            frozen_text_encoder=frozen_text,
            vae=model.vae_of.vae if model.vae_of is not None else None,
            loras=loras,
            name_of=lambda index: data.images[index].name,
        )

    def _pipeline(self, model: _Model, data: ImageData, files: ModelFiles) -> SampleSheet:
        settings = self.settings
        frozen: dict[str, nn.Module] = {}
        if model.vae_of is not None:
            frozen["vae"] = model.vae_of.vae
        if model.text_of is not None and not settings.train_text_encoder:
            frozen["text_encoder"] = model.text_of.text_encoder
        prompts = settings.sample_prompts or default_prompts(
            data.texts(), model.classes, unconditional=settings.unconditional or model.text_of is None
        )
        return SampleSheet(
            name=str(self.run),
            prompts=prompts,
            defaults=files.defaults,
            scheduler_config=model.scheduler_config,
            frozen=frozen,
            tokenizer=model.text_of.tokenizer if model.text_of is not None else None,
            classes=model.classes or None,
            steps=settings.sample_steps,
        )

    def _files(self, model: _Model, networks: dict[str, nn.Module]) -> ModelFiles:
        settings = self.settings
        frozen: dict[str, tuple[LoadedModel, str]] = {}
        if model.vae_of is not None:
            frozen["vae" if model.text_of is not None else "vqvae"] = (model.vae_of, "vae")
        if model.text_of is not None:
            frozen["tokenizer"] = (model.text_of, "tokenizer")
            if "text_encoder" not in networks:
                frozen["text_encoder"] = (model.text_of, "text_encoder")
        pipeline = "DDPMPipeline" if model.vae_of is None else "LDMPipeline"
        return ModelFiles(
            pipeline="StableDiffusionPipeline" if model.text_of is not None else pipeline,
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
        )


def _unchanging(model: _Model, networks: dict[str, nn.Module], loras: dict[str, LoraShape]) -> dict[str, str]:
    """The identities of the weights that are not trained themselves; those below a LoRA are among them."""
    of = {"vae": model.vae_of, "text_encoder": model.text_of, "unet": model.base_of}
    return {
        part: loaded.identity(part)
        for part, loaded in of.items()
        if loaded is not None and (part not in networks or part in loras)
    }
