"""ModelSpec -> LoadedModel: the networks of a model in memory, in the run's dtype, on the run's device.

Which folders there are, and what stands where in them, is in `model_folder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdcli.encoders.clip import ACTIVATIONS, ClipTextConfig, ClipTextEncoder, ProjectedClipTextEncoder
from sdcli.encoders.t5 import T5Tokenizer, empty_t5, load_t5_tokenizer, spare_float16
from sdcli.encoders.tokenizer import ClipTokenizer, load_tokenizer
from sdcli.errors import BadWeights, UsageError
from sdcli.io.devices import keep_freed_memory, pick_device, pick_dtype
from sdcli.io.files import PACKAGE
from sdcli.io.json_files import read_json_object
from sdcli.io.lean_diffusers import (
    VAE,
    AutoencoderKL,
    AutoencoderTiny,
    SD3Transformer2DModel,
    UNet,
    UNet2DConditionModel,
    UNet2DModel,
    lean_imports,
)
from sdcli.io.weight_files import check_header, files_digest, finished, in_background, shards
from sdcli.io.weights import N, empty_network, fill, random_tensors, read_tensors
from sdcli.models.hub.download import folder_of, use_offline
from sdcli.models.layout import kind_of, network_config, read_layout
from sdcli.models.registry import ModelSpec, described
from sdcli.models.single_file import SD2, SDXL, SingleFileLayout, layout_of
from sdcli.models.sources import FileSource, HubSource, RandomSource
from sdcli.request.fields import FileRef, LoraRef

Part = Literal["text_encoder", "text_encoder_2", "text_encoder_3", "unet", "vae"]
CONFIGS = PACKAGE / "models" / "families" / "configs"
"""The configurations that the package ships, a folder each."""
PARTS: tuple[Part, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "vae")
NAMES: dict[str, str] = {
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "text_encoder_3": "third text encoder",
    "unet": "UNet",
    "vae": "VAE",
}
TEXT_ENCODERS = {"text_encoder", "text_encoder_2", "text_encoder_3"}
NETWORKS: dict[str, Any] = {
    "UNet2DConditionModel": UNet2DConditionModel,
    "UNet2DModel": UNet2DModel,
    "SD3Transformer2DModel": SD3Transformer2DModel,
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
}
"""diffusers' classes by the names in config.json; the text encoders are our own."""


@dataclass(frozen=True)
class AppliedLora:
    """A LoRA that is merged into a model's weights."""

    ref: LoraRef
    layers: int
    """How many layers of the model it changes."""
    unmatched: tuple[str, ...]
    """What it holds beside that, by the file's names: layers that the model does not have, and tensors of no LoRA."""
    tensors_sha256: str
    """64 hex digits of the file behind its header: what the web UI and Civitai know a LoRA by."""


@dataclass(frozen=True)
class LoadedModel:
    """The parts of a model, ready to compute with; a part that was not asked for is absent (AttributeError)."""

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    scheduler_config: Mapping[str, Any]
    parts: Mapping[str, nn.Module]
    tokenizer: ClipTokenizer | None
    identities: Mapping[str, Future[str]] = field(repr=False)
    """Of the parts as they were loaded, without the LoRAs."""
    loras: tuple[AppliedLora, ...] = ()
    ip_adapters: tuple[tuple[FileRef, float], ...] = ()
    """What the UNet listens to beside the text, and how strongly."""
    tokenizer_2: ClipTokenizer | None = None
    """SDXL's second text encoder has its own; a refiner has only that."""
    tokenizer_3: T5Tokenizer | None = None
    """Of Stable Diffusion 3's third text encoder, which may be absent."""
    zeros_for_empty_prompt: bool = False
    """Whether an empty negative prompt is all zeros; SDXL's base model was trained so."""

    @property
    def is_sdxl(self) -> bool:
        """Whether it has the text encoders of SDXL, and takes the conditions that they make."""
        return "text_encoder_2" in self.parts and self.spec.kind.process == "diffusion"

    @cached_property
    def unet(self) -> UNet:
        return self._part("unet")

    @cached_property
    def vae(self) -> VAE:
        return self._part("vae")

    @cached_property
    def text_encoder(self) -> ClipTextEncoder:
        return self._part("text_encoder")

    @cached_property
    def text_encoder_2(self) -> ProjectedClipTextEncoder:
        return self._part("text_encoder_2")

    @cached_property
    def text_encoder_3(self) -> nn.Module:
        return self._part("text_encoder_3")

    def _part(self, name: str) -> Any:
        if name not in self.parts:
            raise AttributeError(f"the {name} of {self.spec.name} was not loaded")
        return self.parts[name]

    def identity(self, part: str) -> str:
        """Which weights a part has: `sha256:<64 hex digits>` of its file, or `random:<architecture>:<seed>`."""
        return self.identities[part].result()

    def weights(self) -> dict[str, str]:
        """The identity of every loaded part."""
        return {part: self.identity(part) for part in self.parts}

    def with_parts(self, *, identity: str = "memory", **networks: nn.Module) -> LoadedModel:
        """The same model with some of its networks replaced, as they stand in memory: what a trainer generates with.

        `identity` is what the records of images call their weights. The networks are of the same kind as those they
        replace, bare (not inside DDP), on the model's device; a text encoder is a `ClipTextEncoder`.
        """
        return replace(
            self,
            parts={**self.parts, **networks},
            identities={**self.identities, **dict.fromkeys(networks, finished(identity))},
        )


def model_in_memory(
    spec: ModelSpec,
    *,
    scheduler_config: Mapping[str, Any],
    tokenizer: ClipTokenizer | None = None,
    classes: Sequence[str] | None = None,
    identity: str = "memory",
    **networks: nn.Module,
) -> LoadedModel:
    """A model of networks made in memory: `unet`, and `vae` and `text_encoder` (with a tokenizer) if it has them.

    What it generates from, and on what, is read off the networks' own configurations; of the spec its name and defaults
    are used, and its source need not exist. `classes` names the classes of a class-conditional UNet.
    Device and dtype are those of the UNet. Raises UsageError and BadWeights where the networks do not fit together.
    """
    unet: Any = networks["unet"]
    vae: Any = networks.get("vae")
    kind = kind_of(
        unet.config,
        vae=None if vae is None else vae.config,
        has_text="text_encoder" in networks,
        classes=classes,
        source=spec.name,
    )
    parameter = next(unet.parameters())
    return LoadedModel(
        spec=spec.model_copy(update={"kind": kind}),
        device=parameter.device,
        dtype=parameter.dtype,
        scheduler_config=scheduler_config,
        parts=networks,
        tokenizer=tokenizer,
        identities=dict.fromkeys(networks, finished(identity)),
    )


def _lacks(name: str, part: Part, held: Sequence[Part]) -> str:
    listed = " and ".join(NAMES[one] for one in held)
    if part == "unet":
        return f"{name} holds a {listed} and no UNet, so it cannot generate; train-unet can build on it"
    if "unet" not in held:
        return f"{name} has no {NAMES[part]}: it holds a {listed}"
    why = "it generates on pixels, not on latents" if part == "vae" else "it generates without text"
    return f"{name} has no {NAMES[part]}: {why}"


def load_model(
    spec: ModelSpec,
    *,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    parts: Iterable[Part] | None = None,
    needs: Part = "unet",
    leave_out: Container[Part] = (),
) -> LoadedModel:
    """Load a model from wherever its spec says, or some `parts` of it. The network is never used.

    Without `parts` it is all that is there but `leave_out`; `needs` is what it is of no use without.
    Raises NotFound, Offline (a hub model that is not in the cache; `sdcli models pull` gets it), BadWeights and
    UsageError, also for a part that this kind of model does not have.
    """
    spec.require_supported()
    spec = described(spec)
    target = pick_device(device)
    if target.type == "cpu":
        keep_freed_memory()
    number = pick_dtype(spec.defaults.dtype if dtype == "auto" else dtype, target)
    match spec.source:
        case RandomSource() as source:
            build = _from_recipe(source, number)
        case FileSource(path=path):
            build = _from_single_file(path, number)
        case source:
            if isinstance(source, HubSource):
                use_offline(offline)
            folder = folder_of(spec)
            assert folder is not None
            build = _from_folder(folder, number, variant=getattr(source, "variant", None))
    wanted = tuple(part for part in build.parts if part not in leave_out) if parts is None else tuple(parts)
    for part in (needs,) if parts is None else wanted:
        if part not in build.parts:
            raise UsageError(_lacks(spec.name, part, build.parts))
    if "text_encoder" in wanted and "text_encoder_2" not in wanted and "text_encoder_2" in build.parts:
        raise UsageError(f"{spec.name} has two text encoders (SDXL) or more, and one alone is of no use here")
    hashes = in_background(*(partial(build.identity, part) for part in wanted))
    networks: dict[str, nn.Module] = {part: placed(build.network(part), target) for part in wanted}
    return LoadedModel(
        spec=spec,
        device=target,
        dtype=number,
        scheduler_config=build.scheduler_config,
        parts=networks,
        tokenizer=build.tokenizer("text_encoder") if "text_encoder" in wanted else None,
        identities=dict(zip(wanted, hashes, strict=True)),
        tokenizer_2=build.tokenizer("text_encoder_2") if "text_encoder_2" in wanted else None,
        tokenizer_3=build.tokenizer_3() if "text_encoder_3" in wanted else None,
        zeros_for_empty_prompt=build.zeros_for_empty_prompt,
    )


def placed(network: N, device: torch.device) -> N:
    """On the device; convolutions channels-last in half precision, where it is quicker (float32 stays bit-exact)."""
    network = network.to(device)
    half = next(network.parameters()).dtype != torch.float32
    return network.to(memory_format=torch.channels_last) if half else network  # type: ignore[call-overload]


@dataclass(frozen=True)
class _Build:
    """How one kind of source makes its parts."""

    parts: tuple[Part, ...]
    network: Callable[[str], nn.Module]
    tokenizer: Callable[[str], ClipTokenizer]
    """The tokenizer of a text encoder."""
    identity: Callable[[str], str]
    scheduler_config: Mapping[str, Any]
    zeros_for_empty_prompt: bool = False
    tokenizer_3: Callable[[], T5Tokenizer | None] = lambda: None


# Random weights


def _from_recipe(source: RandomSource, dtype: torch.dtype) -> _Build:
    configs = _recipe_configs(source.architecture)

    def network(part: str) -> nn.Module:
        empty = _empty(part, configs[part], source=f"random-{source.architecture}")
        number = _dtype_for(part, configs[part], dtype, parts=configs)
        fill(empty, random_tensors(empty, number, seed=source.seed), source=source.architecture)
        return empty

    return _Build(
        tuple(part for part in PARTS if part in configs),
        network,
        tokenizer=lambda part: _shipped_tokenizer(open_clip=part == "text_encoder_2"),
        identity=lambda part: f"random:{source.architecture}:{source.seed}",
        scheduler_config=configs["scheduler"],
        zeros_for_empty_prompt="text_encoder_2" in configs,
    )


def _recipe_configs(architecture: str) -> dict[str, dict[str, Any]]:
    match architecture:
        case "sd15":
            return _shipped_configs("sd1")
        case "sdxl":
            return _shipped_configs("sdxl")
        case "tiny-sdxl":
            return {**_shipped_configs("sdxl"), **_TINY_SDXL_CONFIGS}
        case _:
            return {**_shipped_configs("sd1"), **_TINY_CONFIGS}


def _shipped_configs(name: str) -> dict[str, dict[str, Any]]:
    """Component -> its configuration, of a family whose small files are in the package."""
    return {file.parent.name: read_json_object(file) for file in (CONFIGS / name).glob("*/*config.json")}


def _shipped_tokenizer(*, open_clip: bool) -> ClipTokenizer:
    """CLIP's own; the text encoders of OpenCLIP (SD 2.x, SDXL's second) have the same one, but pad with number 0."""
    tokenizer = load_tokenizer(PACKAGE / "encoders/clip_tokenizer")
    return replace(tokenizer, pad_id=0) if open_clip else tokenizer


_TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
    "vae": {
        "block_out_channels": [8, 8, 16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
    },
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
_TINY_SDXL_CONFIGS: dict[str, dict[str, Any]] = {
    **_TINY_CONFIGS,
    "unet": {
        **_TINY_CONFIGS["unet"],
        "transformer_layers_per_block": [2, 1],
        "use_linear_projection": True,
        "cross_attention_dim": 64,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
    "text_encoder_2": {**_TINY_CONFIGS["text_encoder"], "hidden_act": "gelu", "eos_token_id": 2, "projection_dim": 32},
}


# A diffusers folder


def _from_folder(folder: Path, dtype: torch.dtype, *, variant: str | None = None) -> _Build:
    layout = read_layout(folder)
    several = "text_encoder_2" in layout.components

    def files(part: str) -> list[Path]:
        stem = "model" if part in TEXT_ENCODERS else "diffusion_pytorch_model"
        return shards(folder / layout.folder_of(part), stem, variant=variant)

    def network(part: str) -> nn.Module:
        config = {"_class_name": layout.components[part][1][0], **network_config(folder, layout, part)}
        empty = _empty(part, config, source=str(folder / layout.folder_of(part)))
        number = _dtype_for(part, config, dtype, parts=layout.components)
        wanted = set(empty.state_dict())
        tensors: dict[str, Tensor] = {}
        for file in files(part):
            tensors |= read_tensors(file, number, rename=lambda stored: _modern_name(part, stored, wanted))
        if part == "text_encoder_3" and "shared.weight" in tensors:  # one matrix by two names, stored once
            tensors.setdefault("encoder.embed_tokens.weight", tensors["shared.weight"])
        fill(empty, tensors, source=str(files(part)[0]))
        return spare_float16(empty) if part == "text_encoder_3" else empty

    index = read_json_object(folder / "model_index.json")
    scheduler = read_json_object(folder / "scheduler" / "scheduler_config.json")
    return _Build(
        tuple(part for part in PARTS if part in layout.components),
        network,
        tokenizer=lambda part: load_tokenizer(folder / part.replace("text_encoder", "tokenizer")),
        identity=lambda part: files_digest(files(part)),
        scheduler_config=_mended_scheduler_config(scheduler) if layout.has_text and not several else scheduler,
        tokenizer_3=lambda: load_t5_tokenizer(folder / "tokenizer_3"),
        zeros_for_empty_prompt=several and index.get("force_zeros_for_empty_prompt", True) is True,
    )


def _modern_name(part: str, stored: str, wanted: set[str]) -> str | None:
    """The present name of a parameter: older transformers and diffusers spelled some otherwise."""
    if part in TEXT_ENCODERS:
        name = stored.removeprefix("text_model.")
        return None if name.endswith("position_ids") else name
    if part == "vae" and stored not in wanted:
        for old, new in (
            (".query.", ".to_q."),
            (".key.", ".to_k."),
            (".value.", ".to_v."),
            (".proj_attn.", ".to_out.0."),
        ):
            if old in stored and stored.replace(old, new) in wanted:
                return stored.replace(old, new)
    return stored


def _mended_scheduler_config(config: dict[str, Any]) -> dict[str, Any]:
    """Old SD 1.x folders lack two settings that the model was trained with; diffusers' pipeline mends them as well."""
    return {**config, "steps_offset": 1, "clip_sample": False}


# A single file with the original LDM keys


def _from_single_file(path: Path, dtype: torch.dtype) -> _Build:
    names = set(check_header(path)) - {"__metadata__"}
    layout = layout_of(names)
    _check_ldm_names(path, names, layout)
    configs: dict[str, dict[str, Any]] = {}
    for folder in layout.configs:
        configs |= _shipped_configs(folder)

    def network(part: str) -> nn.Module:
        with lean_imports():
            from diffusers.loaders import single_file_utils as ldm

        prefix, number = layout.prefixes[part], _dtype_for(part, configs[part], dtype, parts=layout.prefixes)
        stored = read_tensors(path, number, rename=lambda name: name if name.startswith(prefix) else None)
        empty = _empty(part, configs[part], source=str(path))
        try:
            if part == "unet":
                tensors = ldm.convert_ldm_unet_checkpoint(stored, configs[part])
            elif part == "vae":
                tensors = ldm.convert_ldm_vae_checkpoint(stored, configs[part])
            elif layout.has_open_clip(part):
                tensors = ldm.convert_open_clip_checkpoint(empty, stored, prefix=prefix)
            else:
                tensors = ldm.convert_ldm_clip_checkpoint(stored)
        except (KeyError, IndexError, RuntimeError) as error:
            raise BadWeights(f"{path}: its {NAMES[part]} is not laid out as that of {layout.title} ({error})") from None
        if part in TEXT_ENCODERS:
            tensors = {
                name.removeprefix("text_model."): tensor
                for name, tensor in tensors.items()
                if not name.endswith("position_ids")
            }
        fill(empty, tensors, source=f"{path} ({part})")
        return empty

    return _Build(
        tuple(part for part in PARTS if part in layout.prefixes),
        network,
        tokenizer=lambda part: _shipped_tokenizer(open_clip=layout.has_open_clip(part)),
        identity=lambda part: files_digest([path]),
        scheduler_config={**configs["scheduler"], **_prediction(path, names, layout)},
        zeros_for_empty_prompt=layout is SDXL,
    )


def _prediction(path: Path, names: set[str], layout: SingleFileLayout) -> dict[str, Any]:
    """What the UNet was trained to predict, where it is not the noise: SDXL files of v-prediction carry marks.

    SD 2.x files have none. There ComfyUI's observation helps: in a v-prediction model one bias is spread wider.
    """
    bias = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    v = "v_pred" in names
    if layout is SD2 and bias in names:
        (values,) = read_tensors(path, torch.float32, rename=lambda name: name if name == bias else None).values()
        v = bool(values.std(correction=0) > 0.09)
    return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in names} if v else {}


def _check_ldm_names(path: Path, names: set[str], layout: SingleFileLayout) -> None:
    """Tell the files that people confuse with a checkpoint apart, each with its own sentence."""

    def some(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    if some("lora_unet_", "lora_te") or any(".lora_A." in name or ".lora.down." in name for name in names):
        raise BadWeights(f"{path} is a LoRA, not a whole model; generate with it by --lora {path}")
    if some("model.diffusion_model.joint_blocks.", "joint_blocks."):
        raise UsageError(
            f"{path} is a Stable Diffusion 3, which sdcli reads as a diffusers folder, not as a single file"
        )
    if some("edm_mean", "edm_vpred."):
        raise UsageError(f"{path} was trained on the noise levels of EDM, which sdcli does not know")
    if some("down_blocks.", "decoder.up_blocks.", "text_model.", "encoder.layers."):
        raise BadWeights(f"{path} is one part of a diffusers model; give the folder that holds model_index.json")
    for part, prefix in layout.prefixes.items():
        if not some(prefix):
            missing = f"{NAMES[part]} (no weights named {prefix}*)"
            raise BadWeights(f"{path} has no {missing}; it is no whole {layout.title} checkpoint")


# Shared


def _dtype_for(part: str, config: Mapping[str, Any], dtype: torch.dtype, *, parts: Container[str]) -> torch.dtype:
    """The number format of a part. SDXL's VAE overflows in float16, so it is float32 unless its configuration knows
    better (`force_upcast`), as in diffusers; in bfloat16 it does not overflow."""
    overflows = part == "vae" and "text_encoder_2" in parts and config.get("force_upcast", True)
    return torch.float32 if overflows and dtype == torch.float16 else dtype


def _empty(part: str, config: dict[str, Any], *, source: str) -> nn.Module:
    """A part's network without weights, from its config.json. Raises BadWeights."""
    if part == "vae" and config.get("latents_mean") is not None:
        raise UsageError(f"{source}: its latents have a mean of their own, which sdcli does not know")
    return empty_network(lambda: _network(part, config), source=source)


def _network(part: str, config: dict[str, Any]) -> nn.Module:
    if part == "text_encoder_3":
        return empty_t5(config)
    if part not in TEXT_ENCODERS:
        usual = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}[part]
        network_class = NETWORKS.get(config.get("_class_name", usual))
        if network_class is None:
            raise ValueError(f"unknown class {config['_class_name']!r}")
        if network_class is SD3Transformer2DModel and not config.get("pos_embed_max_size"):
            raise ValueError("no pos_embed_max_size")
        network: nn.Module = network_class.from_config(config)
        return network
    if config.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
        raise ValueError(f"unknown activation {config['hidden_act']!r}")
    clip = ClipTextConfig.from_dict(config)
    if part == "text_encoder" and config.get("_class_name") != "CLIPTextModelWithProjection":
        return ClipTextEncoder(clip)
    return ProjectedClipTextEncoder(clip, projection_dim=config.get("projection_dim", 512))  # transformers' own default
