"""The UNet that `sdcli train-unet` trains, new or loaded, with the VAE and the text encoder around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sdcli.diffusion.noise_schedule import schedule_config
from sdcli.errors import UsageError
from sdcli.models.families import family_from_scratch
from sdcli.models.families.family import Configs, Family
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.model_defaults import ModelDefaults
from sdcli.models.registry import ModelSpec, Registry
from sdcli.training import model_parts
from sdcli.training.inputs.image_data import ImageData
from sdcli.training.unet.settings import UnetSettings


@dataclass(frozen=True)
class TrainedModel:
    """The UNet to train, and the models that its other parts come from."""

    unet: nn.Module
    vae_of: LoadedModel | None
    """The model with the VAE; None in pixel space."""
    text_of: LoadedModel | None
    """The model with the text encoder and the tokenizer; None for a UNet without text."""
    base_of: LoadedModel | None
    """The model whose UNet is fine-tuned; None for a new UNet."""
    family: Family
    scheduler_config: dict[str, Any]
    defaults: ModelDefaults | None
    """The base model's defaults for generation."""
    resolution: tuple[int, int]
    classes: tuple[str, ...] = ()

    @property
    def takes_sizes(self) -> bool:
        """Whether the UNet is conditioned on the sizes of images, as SDXL's is."""
        unet: Any = self.unet
        return unet.config.get("addition_embed_type") == "text_time"

    @property
    def size_step(self) -> int:
        """Pixels that the sides of images must be a multiple of."""
        if self.base_of is not None:
            return self.base_of.spec.kind.size_step
        unet: Any = self.unet
        vae: Any = None if self.vae_of is None else self.vae_of.vae.config
        return self.family.describe(Configs(unet.config, vae, None, "--from-scratch")).size_step


def trained_model(settings: UnetSettings, registry: Registry, *, device: str) -> TrainedModel:
    """Load --model or make the network of --from-scratch; only the parts that are needed are loaded.

    A new class-conditional UNet gets its classes later, by `with_classes`. Raises UsageError and what loading raises.
    """
    model = _from_model if settings.from_scratch is None else _from_scratch
    trained = model(settings, registry, device)
    _check_effects(trained, settings)
    return trained


def _from_model(settings: UnetSettings, registry: Registry, device: str) -> TrainedModel:
    spec = registry.find(settings.model)
    loaded = model_parts.load_to_train(spec, "train-unet", device=device)
    if settings.train_text_encoder:
        loaded.family.refuse("train_text_encoder", spec.name)
    kind = loaded.spec.kind
    if settings.unconditional and kind.classes:
        raise UsageError(f"{spec.name} is class-conditional; --unconditional needs --from-scratch")
    if settings.class_conditional and not kind.classes:
        raise UsageError(f"{spec.name} is not class-conditional; --class-conditional needs --from-scratch")
    defaults = loaded.spec.defaults
    return TrainedModel(
        unet=loaded.unet,
        vae_of=loaded if kind.space == "latent" else None,
        text_of=loaded if loaded.family.reads_text else None,
        base_of=loaded,
        family=loaded.family,
        scheduler_config=_schedule(loaded.scheduler_config, settings),
        defaults=defaults,
        resolution=settings.target_size((defaults.width, defaults.height)),
        classes=kind.classes,
    )


def _from_scratch(settings: UnetSettings, registry: Registry, device: str) -> TrainedModel:
    assert settings.from_scratch is not None
    config = model_parts.unet_config(settings.from_scratch)
    is_text = config.get("_class_name", "UNet2DConditionModel") == "UNet2DConditionModel"
    if config.get("addition_embed_type") is not None:
        raise UsageError("--from-scratch: SDXL's kind of UNet is only fine-tuned; name a model of it by --model")
    if settings.space == "pixel" and is_text:
        raise UsageError("--space pixel trains a UNet2DModel: --from-scratch pixel, pixel-grey, or its config.json")
    if settings.class_conditional and is_text:
        raise UsageError("--class-conditional trains a UNet2DModel: --from-scratch latent, or its config.json")
    if not is_text and not settings.class_conditional and not settings.unconditional and settings.space == "latent":
        raise UsageError("a UNet2DModel takes no captions: add --unconditional or --class-conditional")
    if settings.text_encoder is not None and not is_text:
        raise UsageError("--text-encoder has no effect: this UNet takes no captions")
    vae_of = text_of = None
    base = registry.find(settings.model)
    if settings.space == "latent":
        vae_of = _part(settings.vae, base, "vae", registry, device)
        text_of = _part(settings.text_encoder, base, "text_encoder", registry, device) if is_text else None
    default = (32, 32) if vae_of is None else (base.defaults.width, base.defaults.height)
    resolution = settings.target_size(default)
    schedule = dict(vae_of.scheduler_config) if vae_of is not None else model_parts.DDPM_SCHEDULE
    fitted = model_parts.fitted_config(
        config, resolution=resolution, vae_of=vae_of, text_of=text_of, classes=(), guidance_class=False
    )
    return TrainedModel(
        unet=model_parts.new_unet(fitted, seed=settings.seed),
        vae_of=vae_of,
        text_of=text_of,
        base_of=None,
        family=family_from_scratch(reads_text=is_text),
        scheduler_config=_schedule(schedule, settings),
        defaults=None,
        resolution=resolution,
    )


def _part(name: str | None, base: ModelSpec, part: Any, registry: Registry, device: str) -> LoadedModel:
    spec = base if name is None else registry.find(name)
    loaded = load_model(spec, device=device, dtype="float32", parts=(part,))
    return model_parts.refuse_shifted(loaded)


def _schedule(base: Mapping[str, Any], settings: UnetSettings) -> dict[str, Any]:
    return schedule_config(
        base,
        beta_schedule=settings.beta_schedule,
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
        prediction_type=settings.prediction_type,
        rescale_betas_zero_snr=settings.rescale_betas_zero_snr,
    )


def _check_effects(model: TrainedModel, settings: UnetSettings) -> None:
    """Refuse settings about captions for a model without captions."""
    if model.text_of is not None:
        return
    captions = {"shuffle_caption", "caption_prefix", "prompt_template", "train_text_encoder"}
    if not model.classes and not settings.class_conditional:
        captions |= {"caption_dropout", "sample_prompts"}
    given = captions & settings.given()
    if given:
        raise UsageError(f"--{min(given).replace('_', '-')} has no effect: this model takes no captions")


def with_classes(model: TrainedModel, settings: UnetSettings, data: ImageData, *, source: str) -> TrainedModel:
    """The model for the classes of the data: a new UNet gets an embedding for each (and one for no class).

    `source` is the data's name. Raises UsageError for images without a class and for classes of another model.
    """
    if not settings.class_conditional and not model.classes:
        return model
    classes = tuple(data.images.classes)
    without = [data.images[int(i)].name for i in data.used if data.images[int(i)].label is None]
    if not classes or without:
        missing = f"{len(without)} images without a class ({', '.join(without[:3])})" if classes else "no classes"
        needs = "--class-conditional" if settings.class_conditional else "the model, which is class-conditional,"
        raise UsageError(f"{source} has {missing}; {needs} needs class folders or labels")
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
    family = family_from_scratch(reads_text=False, has_classes=True)
    return replace(model, unet=unet, text_of=None, classes=classes, family=family)
