"""The model that a UNet is trained into: its frozen parts, its UNet (loaded or new), and RUN's model files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sdcli.encoders.clip import ClipTextEncoder
from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.errors import BadWeights, UsageError
from sdcli.io.files import PACKAGE, expanded, write_whole
from sdcli.io.json_files import read_json_object
from sdcli.io.lean_diffusers import UNet2DConditionModel, UNet2DModel
from sdcli.io.weights import network_described
from sdcli.models.families import family_from_scratch
from sdcli.models.families.family import Family
from sdcli.models.hub.folders import folder_of
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import Part, load_model
from sdcli.models.model_defaults import ModelDefaults
from sdcli.models.registry import ModelSpec
from sdcli.request.schema import did_you_mean
from sdcli.training.run_folder import write_json
from sdcli.training.text_encoder.network import text_encoder_class, use_stored_names
from sdcli.training.text_encoder.vocabulary import add_vocabulary_files
from sdcli.vae.autoencoder import cell, latent_channels, shift_factor

PIXEL_PRESET: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}
PRESETS: dict[str, str] = {
    "starter": "the shape of the embedded model's UNet, 13.5 million parameters",
    "sd15": "the shape of Stable Diffusion 1.x, 860 million parameters",
    "pixel": "a small UNet on RGB pixels, 1.1 million parameters",
    "pixel-grey": "the same on grey pixels",
    "latent": "a small UNet on latents, without text: for --unconditional and --class-conditional",
}
DDPM_SCHEDULE: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": True,
    "prediction_type": "epsilon",
}
"""Ho et al. 2020, section 4."""
LATENT_SCHEDULE: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
"""Of Stable Diffusion 1.x."""


def unet_config(name: str) -> dict[str, Any]:
    """The configuration of --from-scratch: a preset or a unet/config.json. Raises UsageError, NotFound, BadWeights."""
    match name:
        case "starter":
            return read_json_object(PACKAGE / "starter" / "unet" / "config.json")
        case "sd15":
            return read_json_object(PACKAGE / "models/families/configs/sd1" / "unet" / "config.json")
        case "pixel" | "latent":
            return dict(PIXEL_PRESET)
        case "pixel-grey":
            return {**PIXEL_PRESET, "in_channels": 1, "out_channels": 1}
    return config_file(name, "unet", presets=PRESETS)


def config_file(name: str, part: str, *, presets: Collection[str]) -> dict[str, Any]:
    """The config.json that --from-scratch names, itself or by its folder. Raises UsageError, NotFound, BadWeights."""
    path = expanded(name)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix != ".json":
        hint = did_you_mean(name, presets)
        raise UsageError(f"--from-scratch {name}: must be a {part}/config.json or one of {', '.join(presets)}{hint}")
    return read_json_object(path)


def new_unet(config: Mapping[str, Any], *, seed: int) -> nn.Module:
    """A UNet with torch's default initialisation, in float32. Raises UsageError and BadWeights."""
    return new_network(config, (UNet2DConditionModel, UNet2DModel), seed=seed)


def new_network(config: Mapping[str, Any], classes: Sequence[Any], *, seed: int) -> Any:
    """A network with random weights, of the class that the configuration names, by default the first of `classes`.

    Raises UsageError for another class, and BadWeights for an invalid configuration.
    """
    known = {one.__name__: one for one in classes}
    name = config.get("_class_name", classes[0].__name__)
    if name not in known:
        raise UsageError(f"--from-scratch: unknown class {name!r}; known: {', '.join(known)}")
    torch.manual_seed(seed)
    with network_described("--from-scratch"):
        return known[name].from_config({k: v for k, v in config.items() if not k.startswith("_")})


def fitted_config(
    config: Mapping[str, Any],
    *,
    resolution: tuple[int, int],
    vae_of: LoadedModel | None,
    text_of: LoadedModel | None,
    classes: Sequence[str],
    guidance_class: bool,
) -> dict[str, Any]:
    """A UNet configuration with the sizes that the VAE, the text encoder and the classes require."""
    factor = cell(vae_of.vae) if vae_of is not None else 1
    height, width = resolution[1] // factor, resolution[0] // factor
    fitted = {**config, "sample_size": height if height == width else [height, width]}
    if vae_of is not None:
        fitted["in_channels"] = fitted["out_channels"] = latent_channels(vae_of.vae)
    if text_of is not None:
        fitted["cross_attention_dim"] = text_of.text_encoder.config.hidden_size
    if classes:
        fitted["num_class_embeds"] = len(classes) + int(guidance_class)
    return fitted


def load_to_train(spec: ModelSpec, command: str, *, device: str, needs: Part = "unet") -> LoadedModel:
    """Load a model in float32 to be trained by a command. Raises what `load_model` raises.

    Raises UsageError for a family that it does not train; if the spec names the family, before the weights are read.
    Raises BadWeights for a UNet that takes other text states than its text encoders give.
    """
    for name in ("train", command):
        spec.family.refuse(name, spec.name)
    model = load_model(spec, device=device, dtype="float32", needs=needs)
    for name in ("train", command):
        model.family.refuse(name, spec.name)
    if model.family.is_refiner(model):
        raise UsageError(f"{spec.name} is a refiner, which sdcli does not train")
    if {"unet", "text_encoder"} <= model.parts.keys():
        wanted = model.family.text_width(model.unet.config)
        given = model.family.caption_encoder(model).width
        if isinstance(wanted, int) and wanted != given:
            made = f"its UNet takes text states of {wanted} numbers, and those of its text encoders have {given}"
            raise BadWeights(f"{spec.name}: {made}")
    return refuse_shifted(model)


def refuse_shifted(model: LoadedModel) -> LoadedModel:
    """Return the model. Raises UsageError for a VAE that shifts its latents, as that of Stable Diffusion 3."""
    if "vae" in model.parts and shift_factor(model.vae):
        raise UsageError(
            f"the VAE of {model.spec.name} shifts its latents (shift_factor), which training does not support"
        )
    return model


@dataclass(frozen=True)
class ModelFiles:
    """The files that make RUN a model folder: model_index.json and the parts that training does not change."""

    family: Family
    space: Literal["latent", "pixel"]
    scheduler_config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    """The model's defaults for generation, for sdcli.json."""
    frozen: Mapping[str, tuple[LoadedModel, str]]
    """Sub-folder -> the model that the part comes from, and the part's name (`vae`, `text_encoder`, `tokenizer`)."""
    trained: Mapping[str, str]
    """The parts in a checkpoint, by sub-folder -> the class of the network (`tokenizer`: CLIPTokenizer)."""
    averaged: tuple[str, ...] = ()
    """Those of them that have a moving average."""
    classes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The model_index.json of the base model."""

    @classmethod
    def around(cls, model: LoadedModel | None, *, trained: Mapping[str, str], averaged: tuple[str, ...]) -> ModelFiles:
        """Files for a trained VAE or text encoder: the other parts are those of `model`, or absent without one."""
        family, frozen = family_from_scratch(reads_text=True), {}
        generates = model is not None and "unet" in model.parts
        if model is not None:
            family = model.family if generates else family
            parts = [*{**model.parts, **dict.fromkeys(text_parts(model))}]
            _, components = family.components()
            frozen = {components[part].folder: (model, part) for part in parts if part not in trained}
        return cls(
            family=family,
            space="latent",
            scheduler_config=model.scheduler_config if model is not None else LATENT_SCHEDULE,
            defaults=model.spec.defaults.model_dump() if model is not None and generates else {},
            frozen=frozen,
            trained=trained,
            averaged=averaged,
            classes=model.spec.kind.classes if model is not None else (),
            settings=model.settings if model is not None else {},
        )

    def links(self) -> dict[str, str]:
        """RUN/<part> -> sub-folder of a checkpoint; with averages RUN has these, and RUN/raw the trained weights."""
        folders = {part: self._folder_of(part) for part in self.trained}
        links = {folders[part]: f"{part}_ema" if part in self.averaged else part for part in self.trained}
        return {**links, **({f"raw/{folders[part]}": part for part in self.trained} if self.averaged else {})}

    def _folder_of(self, part: str) -> str:
        """The folder of a part in a model folder."""
        return self.family.components(self.space)[1][part].folder

    def write(self, run: Path) -> None:
        """Write everything but the trained parts."""
        for folder in (run, *([run / "raw"] if self.averaged else [])):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "model_index.json", self._index())
            write_json(folder / "sdcli.json", {"schema": 1, "defaults": dict(self.defaults)})
            write_json(folder / "scheduler" / "scheduler_config.json", dict(self.scheduler_config))
            if self.classes:
                write_whole(folder / "classes.json", json.dumps(list(self.classes)).encode(), overwrite=True)
            for name, (model, part) in self.frozen.items():
                write_part(folder / name, model, part)

    def _index(self) -> dict[str, Any]:
        """model_index.json: each component with its library and class, or null if it is absent."""
        classes = {name: _class_name(model, part) for name, (model, part) in self.frozen.items()}
        classes |= {self._folder_of(part): kind for part, kind in self.trained.items()}
        pipeline, parts = self.family.components(self.space)
        components: dict[str, Any] = {
            name: ["transformers" if classes[name].startswith("CLIP") else "diffusers", classes[name]]
            if name in classes
            else [None, None]
            for name in (one.folder for one in parts.values())
        }
        scheduler = self.scheduler_config.get("_class_name", "DDIMScheduler")
        return {
            "_class_name": pipeline,
            "_diffusers_version": metadata.version("diffusers"),
            "scheduler": ["diffusers", scheduler],
            **components,
            **self.family.index,
            **{name: self.settings.get(name, usual) for name, usual in self.family.settings.items()},
        }


def _class_name(model: LoadedModel, part: str) -> str:
    """The class of a part as model_index.json names it."""
    if part.startswith("tokenizer"):
        return "CLIPTokenizer"
    network = model.parts[part]
    return text_encoder_class(network) if isinstance(network, ClipTextEncoder) else type(network).__name__


def write_part(folder: Path, model: LoadedModel, part: str) -> None:
    """Write a frozen part of a model: a copy of its files if it has a folder, else the network in memory.

    A text encoder gets the names of weights, and a tokenizer the files, that older versions of other tools need.
    """
    source = folder_of(model.spec)
    if source is not None and (source / part).is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source / part, folder)
        if part.startswith("text_encoder"):
            use_stored_names(folder)
    elif part.startswith("tokenizer"):
        shutil.copytree(PACKAGE / "encoders/clip_tokenizer", folder, dirs_exist_ok=True)
        _write_padding(folder, model.tokenizers[part.replace("tokenizer", "text_encoder")])
    else:
        from sdcli.training.unet.task import write_network

        network = model.parts[part]
        write_network(folder, network, network.state_dict())
    if part.startswith("tokenizer"):
        add_vocabulary_files(folder)


def _write_padding(folder: Path, tokenizer: ClipTokenizer) -> None:
    """Make a copy of CLIP's own tokenizer pad as one of OpenCLIP does."""
    file = folder / "tokenizer_config.json"
    config, pad = read_json_object(file), tokenizer.tokenizer.id_to_token(tokenizer.pad_id)
    if config["pad_token"] != pad:
        file.write_text(json.dumps({**config, "pad_token": pad}), encoding="utf-8")


def generation_defaults(
    base: ModelDefaults | None, *, resolution: tuple[int, int], guided: bool, prompt_template: str | None
) -> dict[str, Any]:
    """The defaults in sdcli.json: those of the base model, if any, with the size and the template of training."""
    width, height = resolution
    trained: dict[str, Any] = {"width": width, "height": height}
    if prompt_template is not None:
        trained["prompt_template"] = prompt_template
    if base is not None:
        return {**base.model_dump(), **trained}
    return {
        **trained,
        "steps": 50,
        "guidance_scale": 3.0 if guided else 1.0,
        "scheduler": "ddim",
        "dtype": "float32",
    }


def tokenizers_of(model: LoadedModel) -> tuple[ClipTokenizer, ...]:
    """The tokenizers of a model's text encoders. Raises UsageError for a model without."""
    if not model.tokenizers:
        raise UsageError(f"{model.spec.name} has no text encoder")
    return tuple(model.tokenizers.values())


def text_parts(model: LoadedModel) -> list[str]:
    """The text encoders of a model and their tokenizers, by their names."""
    return [name for part in model.tokenizers for name in (part, part.replace("text_encoder", "tokenizer"))]
