"""The type of a model family: everything that is particular to one kind of model, in one frozen value.

No module in this folder imports torch at its top; the hooks import what they need when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic_core import CoreSchema, core_schema

from sdcli.errors import UsageError
from sdcli.io.files import PACKAGE
from sdcli.io.json_files import read_json_object
from sdcli.request.schedulers import Process
from sdcli.request.schema import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from sdcli.encoders.caption_encoder import CaptionEncoder
    from sdcli.encoders.conditioning import ClipReader, Encode
    from sdcli.vae.latent_space import Space

NO_EFFECT = {"prompt_syntax": "plain", "clip_skip": 1, "reuse": 1}
"""Values of request fields that change nothing, beside those that are false."""
SHOWN_CLASSES = 20
"""How many classes an error message lists."""


@dataclass(frozen=True)
class Component:
    """Where a part of a model is inside its folder, and the classes it may have; the first is the usual one."""

    folder: str
    classes: tuple[str, ...]


PART_NAMES: dict[str, str] = {
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "text_encoder_3": "third text encoder",
    "unet": "UNet",
    "vae": "VAE",
}
"""What error messages call the parts."""

Components = Mapping[str, Component]
"""Part -> its component. The denoiser is `unet` in every family, whatever its folder is called."""


@dataclass(frozen=True)
class ModelKind:
    """The facts of one model that decide which requests it can generate; the defaults are Stable Diffusion's."""

    space: Literal["latent", "pixel"] = "latent"
    size_step: int = 8
    """Width and height are multiples of this."""
    smallest_size: int = 16
    cell: int = 8
    """Pixels a side of a cell of the latents; 1 on pixels."""
    classes: tuple[str, ...] = ()
    """The names of the classes, in the order of their labels."""
    null_label: int | None = None
    """The label that was learned for "no class"; None if there is none."""
    inpaints: bool = False
    """The network takes a mask, and what the mask keeps, as further channels."""
    unguided: str = ""
    """Why there is no unconditional half that guidance could lead away from; empty if the model can be guided."""

    def label(self, prompt: str) -> int:
        """The label of a class by its name, or else its number; of no class for an empty prompt. Raises UsageError."""
        name = prompt.strip()
        if not name and self.null_label is not None:
            return self.null_label
        if name in self.classes:
            return self.classes.index(name)
        if name.isascii() and name.isdigit() and len(name) < 10 and int(name) < len(self.classes):
            return int(name)
        problem = f"no class {name!r}{did_you_mean(name, self.classes)}" if name else "the prompt names no class"
        raise UsageError(f"{problem} (the model's classes: {self.listed_classes})")

    @property
    def listed_classes(self) -> str:
        """The names of the classes for people, the first twenty of them."""
        more = len(self.classes) - SHOWN_CLASSES
        return ", ".join(self.classes[:SHOWN_CLASSES]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Configs:
    """The small files that describe a model."""

    denoiser: Mapping[str, Any]
    vae: Mapping[str, Any] | None
    """None for a model that generates on pixels."""
    classes: tuple[str, ...] | None
    """The names in classes.json; None if there is no such file."""
    source: str
    """What error sentences begin with."""


Tensors = dict[str, "Tensor"]


@dataclass(frozen=True)
class SingleFile:
    """Single-file checkpoints of a family: how they are recognised, and what they do not contain."""

    title: str
    """What error messages call such models."""
    prefixes: Mapping[str, str]
    """Part -> what the names of its tensors begin with."""
    configs: Callable[[], dict[str, dict[str, Any]]]
    """The configuration of each part, and of the scheduler."""
    marks: tuple[str, ...] = ()
    """Beginnings of tensor names that only such files have."""
    first_convolution: str = "input_blocks.0.0.weight"
    """The denoiser's first layer, which gives the number of its channels; after the prefix of the denoiser."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of requests, as in models.yaml."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of model_index.json that the family needs."""
    convert: Mapping[str, Callable[[Tensors, dict[str, Any]], Tensors]] = field(default_factory=dict)
    """Part -> its tensors (named as in the file) and its configuration -> tensors named as in the network.

    Parts that are not listed have the names of the original Stable Diffusion code.
    """
    prediction: Callable[[Path, Collection[str]], Mapping[str, Any]] | None = None
    """The file and its tensors' names -> settings of the scheduler; None: by the marks of v-prediction."""


class Loaded(Protocol):
    """What the hooks use of a `LoadedModel`, which is defined above this folder."""

    @property
    def spec(self) -> Any: ...
    @property
    def parts(self) -> Mapping[str, nn.Module]: ...
    @property
    def tokenizers(self) -> Mapping[str, Any]: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def unet(self) -> Any: ...
    @property
    def vae(self) -> Any: ...


# The hooks that most families share


def text_encoding(model: Loaded) -> Encode:
    """Prompts through one CLIP text encoder."""
    from sdcli.encoders.conditioning import TextEncoding

    return TextEncoding(model.spec.name, clip_readers(model))


def caption_encoder(model: Loaded) -> CaptionEncoder:
    """All CLIP text encoders of a model."""
    from sdcli.encoders.caption_encoder import CaptionEncoder

    return CaptionEncoder(clip_readers(model))


def clip_readers(model: Loaded) -> list[ClipReader]:
    """The CLIP text encoders of a model that are loaded, with their tokenizers."""
    from sdcli.encoders.conditioning import ClipReader

    parts: Any = model.parts
    names = ("text_encoder", "text_encoder_2")
    return [ClipReader(model.tokenizers[name], parts[name]) for name in names if name in parts]


def latents_or_pixels(model: Loaded) -> Space:
    """The latents of the model's VAE, or pixels."""
    from sdcli.vae.latent_space import LatentSpace, PixelSpace

    return PixelSpace(model.unet.config.in_channels) if model.spec.kind.space == "pixel" else LatentSpace(model.vae)


def call_unet(network: Callable[..., Any], x: Tensor, t: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """x [B, C, h, w], t [] or [B] -> the output of diffusers' UNets."""
    output: Tensor = network(x, t, **arguments, return_dict=False)[0]
    return output


def call_transformer(network: Callable[..., Any], x: Tensor, t: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """x [B, C, h, w], t [] or [B] -> the output of those of diffusers' transformers that take images as they are."""
    output: Tensor = network(x, timestep=t.expand(len(x)), **arguments, return_dict=False)[0]
    return output


def same_dtype(part: str, config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """Every part in the dtype of the run."""
    return dtype


LORA_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": (
        "lora_unet_",
        "unet_",
        "diffusion_model_",
        "model_diffusion_model_",
        "lycoris_",
        "lycoris_unet_",
        "base_model_model_",
        "base_model_model_unet_",
        "base_model_model_diffusion_model_",
        "unet_base_model_model_",
        "",
    ),
    "text_encoder": (
        "lora_te_",
        "lora_te1_",
        "text_encoder_",
        "lycoris_",
        "lycoris_text_encoder_",
        "clip_l_",
        "text_encoders_clip_l_transformer_",
        "base_model_model_",
        "base_model_model_text_encoder_",
        "text_encoder_base_model_model_",
        "",
    ),
    "text_encoder_2": (
        "lora_te2_",
        "text_encoder_2_",
        "clip_g_",
        "text_encoders_clip_g_transformer_",
        "text_encoder_2_base_model_model_",
    ),
}
"""What layer names in LoRA files begin with, with underscores for dots; PEFT's folders do not name the part."""


@dataclass(frozen=True)
class LoraNames:
    """What a part is called in LoRA files of two dialects."""

    kohya: str
    diffusers: str
    original: bool = False
    """Whether kohya's dialect has the layers' names of the original code (`input_blocks_4_1_...`) for the part."""


LORA_NAMES: Mapping[str, LoraNames] = {
    "unet": LoraNames("lora_unet", "unet"),
    "text_encoder": LoraNames("lora_te", "text_encoder"),
}


@dataclass(frozen=True)
class PreviewVae:
    """A tiny autoencoder on the hub that previews are decoded with."""

    repo: str
    latents: tuple[float, int]
    """Scaling factor and channels of the VAE whose latents it knows."""


@dataclass(frozen=True, eq=False)
class Family:
    """A model family. Outside this folder no code asks which family a model is: it asks this value, or calls it."""

    name: str
    """What models.yaml calls it."""
    pipelines: Mapping[str, Components] = field(default_factory=dict)
    """`_class_name` of model_index.json -> the parts of such a folder. The first is what `train-unet` writes."""
    optional: frozenset[str] = frozenset()
    """Parts that may be absent, all of them together."""
    index: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of the model_index.json that `train-unet` writes."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Entries of model_index.json that the family reads, and their usual values; `train-unet` keeps the base's."""
    supported: bool = True
    process: Process = "diffusion"
    kind: ModelKind = ModelKind()
    """Of models whose small files are not on this machine."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of requests that neither models.yaml nor the model's folder sets."""
    reads_text: bool = True
    """Whether the prompt is text for a text encoder."""
    takes_prompt: bool = True
    """Whether a prompt has an effect at all."""
    preview_vae: PreviewVae | None = None
    """A tiny autoencoder for its latents."""
    takes_refiners: bool = False
    """Whether a second model of the family can take over for the last steps."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Field of a request, or command -> why it cannot be used; with {name} of the field and {model}."""
    single_files: tuple[SingleFile, ...] = ()
    refused_files: Mapping[str, str] = field(default_factory=dict)
    """Beginning of a tensor's name in a single file that cannot be loaded -> why."""
    recipes: Mapping[str, Callable[[], dict[str, dict[str, Any]]]] = field(default_factory=dict)
    """Architecture of random weights -> the configuration of each part."""
    open_clip: frozenset[str] = frozenset()
    """Text encoders that come from OpenCLIP: their tokenizer pads with 0, and single files name them differently."""
    networks: Mapping[str, Callable[[dict[str, Any]], nn.Module]] = field(default_factory=dict)
    """Class of config.json -> what builds it from its configuration; those of models/networks.py need no entry."""
    lora_prefixes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: LORA_PREFIXES)
    """Part -> what its layers' names begin with in the LoRA files that are read."""
    lora_names: Mapping[str, LoraNames] = field(default_factory=lambda: LORA_NAMES)
    """Part -> what its layers' names begin with in the LoRA files that are written."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """The layers of the denoiser that `train-unet --lora` adds to, by the ends of their names."""
    lora_architecture: str = "stable-diffusion-v1/lora"
    """`modelspec.architecture` of LoRA files."""

    claims: Callable[[Mapping[str, Any]], bool] = lambda denoiser: True
    """Whether a folder with this configuration of the denoiser is of the family, if several share a pipeline class."""
    describe: Callable[[Configs], ModelKind] = lambda configs: ModelKind()
    """Raises BadWeights and UsageError for networks that do not fit together."""
    scheduler_config: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    """The scheduler_config.json of a folder -> the settings the model was trained with."""
    part_dtype: Callable[[str, Mapping[str, Any], torch.dtype], torch.dtype] = same_dtype
    """(part, its configuration, the run's dtype) -> the dtype that is safe for the part."""
    encoding: Callable[[Loaded], Encode] = text_encoding
    """How prompts become conditioning."""
    caption_encoder: Callable[[Loaded], CaptionEncoder] = caption_encoder
    """What training encodes captions with, as `encoding` does."""
    space: Callable[[Loaded], Space] = latents_or_pixels
    """Where the model denoises, and the way to pixels."""
    call: Callable[[Callable[..., Any], Tensor, Tensor, Mapping[str, Any]], Tensor] = call_unet
    """(denoiser, x [B, C, h, w], t, conditioning) -> its output in x's shape; packs and unpacks latents if need be."""
    timesteps: Callable[[Mapping[str, Any], int, int], Mapping[str, Any]] = lambda config, height, width: {}
    """(scheduler's configuration, height and width of the latents) -> further arguments of `set_timesteps`."""
    text_width: Callable[[Mapping[str, Any]], int | None] = lambda denoiser: denoiser.get("cross_attention_dim")
    """The denoiser's configuration -> the width of the text states that it takes; None if it takes none."""
    is_refiner: Callable[[Loaded], bool] = lambda model: False
    """Whether a model can only end what another one began."""

    def components(self, space: Literal["latent", "pixel"] = "latent") -> tuple[str, Components]:
        """The pipeline class, and its parts, of models that generate in a space."""
        return next(
            (pipeline, parts) for pipeline, parts in self.pipelines.items() if ("vae" in parts) == (space == "latent")
        )

    def refuse(self, name: str, model: str) -> None:
        """Raise UsageError if the family cannot use a field of a request, or a command."""
        if name in self.refuses:
            raise UsageError(self.refuses[name].format(name=name, model=model))

    def check(self, fields: Mapping[str, Any], model: str) -> None:
        """Raise UsageError for a field of a request that the family cannot use and that has a value with an effect."""
        for name in self.refuses:
            value = fields.get(name)
            if value and value != NO_EFFECT.get(name):
                self.refuse(name, model)

    def __repr__(self) -> str:
        return f"<family {self.name}>"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return core_schema.is_instance_schema(cls)


def shipped_configs(name: str) -> dict[str, dict[str, Any]]:
    """Part -> its configuration, of a folder of configs/."""
    folder = PACKAGE / "models" / "families" / "configs" / name
    return {file.parent.name: read_json_object(file) for file in folder.glob("*/*config.json")}


def shipped(*names: str, **parts: Mapping[str, Any]) -> Callable[[], dict[str, dict[str, Any]]]:
    """What reads some folders of configs/, later ones replacing earlier ones, with some parts replaced."""
    return partial(_configs, names, parts)


def _configs(names: tuple[str, ...], parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    configs: dict[str, dict[str, Any]] = {}
    for name in names:
        configs |= shipped_configs(name)
    return configs | {part: dict(config) for part, config in parts.items()}
