"""ModelSpec -> LoadedModel: the networks of a model in memory, in the run's dtype, on the run's device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdcli.conditioning.clip import ACTIVATIONS, ClipTextConfig, ClipTextEncoder
from sdcli.conditioning.tokenizer import ClipTokenizer, load_tokenizer
from sdcli.denoise.attention import use_sliced_self_attention
from sdcli.devices import keep_freed_memory, pick_device, pick_dtype
from sdcli.errors import BadWeights, NotFound, UsageError
from sdcli.hub import PIPELINES, local_snapshot, use_offline
from sdcli.lean_imports import VAE, AutoencoderKL, AutoencoderTiny, UNet2DConditionModel, lean_imports
from sdcli.registry import (
    PACKAGE,
    EmbeddedSource,
    FileSource,
    FolderSource,
    HubSource,
    ModelSpec,
    RandomSource,
)
from sdcli.weights import build_empty, check_header, fill, random_tensors, read_tensors, shards

Part = Literal["text_encoder", "unet", "vae"]
PARTS: tuple[Part, ...] = ("text_encoder", "unet", "vae")
VAE_CLASSES: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
COMPONENTS = {
    "unet": {"UNet2DConditionModel"},
    "vae": set(VAE_CLASSES),
    "text_encoder": {"CLIPTextModel"},
    "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"},
}
"""The classes that a model_index.json may name; sdcli never looks a class up by a name from a file."""


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

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        return self._part("unet")

    @cached_property
    def vae(self) -> VAE:
        return self._part("vae")

    @cached_property
    def text_encoder(self) -> ClipTextEncoder:
        return self._part("text_encoder")

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


def load_model(
    spec: ModelSpec,
    *,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    parts: Iterable[Part] = PARTS,
) -> LoadedModel:
    """Load a model from wherever its spec says. The network is never used; `sdcli models pull` does that.

    Raises NotFound, Offline (a hub model that is not in the cache), BadWeights and UsageError.
    """
    spec.require_supported()
    target = pick_device(device)
    if target.type == "cpu":
        keep_freed_memory()
    number = pick_dtype(spec.defaults.dtype if dtype == "auto" else dtype, target)
    match spec.source:
        case RandomSource() as source:
            build = _from_recipe(source, number)
        case FileSource(path=path):
            build = _from_single_file(path, number)
        case EmbeddedSource(folder=name):
            build = _from_folder(PACKAGE / name, number)
        case FolderSource(path=path):
            build = _from_folder(path, number)
        case HubSource() as hub:
            use_offline(offline)
            build = _from_folder(
                local_snapshot(hub, name=spec.name, size=spec.download_bytes), number, variant=hub.variant
            )
    hashing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights-sha256")
    wanted = tuple(parts)
    identities: dict[str, Future[str]] = {part: hashing.submit(build.identity, part) for part in wanted}
    hashing.shutdown(wait=False)
    networks: dict[str, nn.Module] = {part: _placed(build.network(part), target, number) for part in wanted}
    if "unet" in networks and target.type == "cpu" and number != torch.float32:
        use_sliced_self_attention(networks["unet"])
    return LoadedModel(
        spec=spec,
        device=target,
        dtype=number,
        scheduler_config=build.scheduler_config,
        parts=networks,
        tokenizer=build.tokenizer() if "text_encoder" in wanted else None,
        identities=identities,
    )


def _placed(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """On the device; convolutions channels-last in half precision, where it is quicker (float32 stays bit-exact)."""
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if dtype != torch.float32 else network  # type: ignore[call-overload]


@dataclass(frozen=True)
class _Build:
    """How one kind of source makes its parts."""

    network: Callable[[str], nn.Module]
    tokenizer: Callable[[], ClipTokenizer]
    identity: Callable[[str], str]
    scheduler_config: Mapping[str, Any]


# Random weights


def _from_recipe(source: RandomSource, dtype: torch.dtype) -> _Build:
    configs = _sd15_configs() if source.architecture == "sd15" else _TINY_CONFIGS

    def network(part: str) -> nn.Module:
        empty = _empty(part, configs[part], source=f"random-{source.architecture}")
        fill(empty, random_tensors(empty, dtype, seed=source.seed), source=source.architecture)
        return empty

    return _Build(
        network,
        tokenizer=lambda: load_tokenizer(PACKAGE / "clip_tokenizer"),
        identity=lambda part: f"random:{source.architecture}:{source.seed}",
        scheduler_config=_sd15_configs()["scheduler"],
    )


def _sd15_configs() -> dict[str, dict[str, Any]]:
    folder = PACKAGE / "sd1_config"
    names = {"scheduler": "scheduler_config.json"}
    return {part: _read_json(folder / part / names.get(part, "config.json")) for part in (*PARTS, "scheduler")}


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


# A diffusers folder


def _from_folder(folder: Path, dtype: torch.dtype, *, variant: str | None = None) -> _Build:
    _check_index(folder)
    stems = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}

    def files(part: str) -> list[Path]:
        return shards(folder / part, stems[part], variant=variant)

    def network(part: str) -> nn.Module:
        config = _read_json(folder / part / "config.json")
        empty = _empty(part, config, source=str(folder / part))
        wanted = set(empty.state_dict())
        tensors: dict[str, Tensor] = {}
        for file in files(part):
            tensors |= read_tensors(file, dtype, rename=lambda stored: _modern_name(part, stored, wanted))
        fill(empty, tensors, source=str(files(part)[0]))
        return empty

    return _Build(
        network,
        tokenizer=lambda: load_tokenizer(folder / "tokenizer"),
        identity=lambda part: _files_digest(files(part)),
        scheduler_config=_mended_scheduler_config(_read_json(folder / "scheduler" / "scheduler_config.json")),
    )


def _check_index(folder: Path) -> None:
    """Refuse a folder whose model_index.json names other parts than sdcli knows, or that lacks some."""
    if not folder.is_dir():
        raise NotFound(f"no folder {folder}")
    index = _read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise UsageError(f"{folder} is a {pipeline}; sdcli paints with Stable Diffusion 1.x and 2.x so far")
    for part, allowed in COMPONENTS.items():
        named = index.get(part)
        if not isinstance(named, list) or len(named) != 2 or named[1] not in allowed:
            shown = named[1] if isinstance(named, list) and len(named) == 2 else named
            raise BadWeights(
                f"{folder}/model_index.json names {shown!r} as its {part}; known: {', '.join(sorted(allowed))}"
            )
        if not (folder / part).is_dir():
            raise BadWeights(f"{folder} has no {part} folder; the model is incomplete")


def _modern_name(part: str, stored: str, wanted: set[str]) -> str | None:
    """The present name of a parameter: older transformers and diffusers spelled some otherwise."""
    if part == "text_encoder":
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
    _check_ldm_layout(path, names)
    configs = _sd15_configs()
    prefixes = {
        "unet": ("model.diffusion_model.",),
        "vae": ("first_stage_model.",),
        "text_encoder": ("cond_stage_model.",),
    }

    def network(part: str) -> nn.Module:
        with lean_imports():
            from diffusers.loaders import single_file_utils as ldm

        stored = read_tensors(path, dtype, rename=lambda name: name if name.startswith(prefixes[part]) else None)
        empty = _empty(part, configs[part], source=str(path))
        try:
            if part == "unet":
                tensors = ldm.convert_ldm_unet_checkpoint(stored, configs[part])
            elif part == "vae":
                tensors = ldm.convert_ldm_vae_checkpoint(stored, configs[part])
            else:
                tensors = {
                    name.removeprefix("text_model."): tensor
                    for name, tensor in ldm.convert_ldm_clip_checkpoint(stored).items()
                    if not name.endswith("position_ids")
                }
        except (KeyError, IndexError, RuntimeError) as error:
            raise BadWeights(f"{path}: its {part} is not laid out as Stable Diffusion 1.x ({error})") from None
        fill(empty, tensors, source=f"{path} ({part})")
        return empty

    return _Build(
        network,
        tokenizer=lambda: load_tokenizer(PACKAGE / "clip_tokenizer"),
        identity=lambda part: _files_digest([path]),
        scheduler_config=configs["scheduler"],
    )


def _check_ldm_layout(path: Path, names: set[str]) -> None:
    """Tell the files that people confuse with a checkpoint apart, each with its own sentence."""

    def some(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    if some("lora_unet_", "lora_te_") or any(".lora_A." in name or ".lora.down." in name for name in names):
        raise BadWeights(f"{path} is a LoRA, not a whole model")
    if some("conditioner.embedders."):
        raise UsageError(f"{path} is of the sdxl family, which is not yet supported")
    if some("cond_stage_model.model."):
        raise UsageError(f"{path} is Stable Diffusion 2.x in a single file; use its diffusers folder instead")
    if some("down_blocks.", "decoder.up_blocks.", "text_model.", "encoder.layers."):
        raise BadWeights(f"{path} is one part of a diffusers model; give the folder that holds model_index.json")
    for prefix, part in (
        ("model.diffusion_model.", "UNet"),
        ("first_stage_model.", "VAE"),
        ("cond_stage_model.transformer.", "text encoder"),
    ):
        if not some(prefix):
            raise BadWeights(f"{path} has no {part} (no weights named {prefix}*); it is no whole SD 1.x checkpoint")


# Shared


def _empty(part: str, config: dict[str, Any], *, source: str) -> nn.Module:
    """A part's network without weights, from its config.json. Raises BadWeights."""
    try:
        match part:
            case "text_encoder":
                if config.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
                    raise ValueError(f"unknown activation {config['hidden_act']!r}")
                clip = ClipTextConfig.from_dict(config)
                return build_empty(lambda: ClipTextEncoder(clip))
            case "vae":
                vae_class = VAE_CLASSES.get(config.get("_class_name", "AutoencoderKL"))
                if vae_class is None:
                    raise ValueError(f"unknown class {config['_class_name']!r}")
                return build_empty(lambda: vae_class.from_config(config))
            case _:
                return build_empty(lambda: UNet2DConditionModel.from_config(config))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise BadWeights(f"{source}: its configuration describes no network: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > 2**20:
            raise BadWeights(f"{path} is larger than any configuration")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"no file {path}; the model is incomplete") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadWeights(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise BadWeights(f"{path} should hold a JSON object")
    return data


def _files_digest(files: list[Path]) -> str:
    """`sha256:` of one file, or of the digests of several shards."""
    digests = [_sha256(file) for file in files]
    return f"sha256:{digests[0] if len(digests) == 1 else hashlib.sha256(' '.join(digests).encode()).hexdigest()}"


def _sha256(file: Path) -> str:
    """The digest of a file; the hub's cache names its large files by theirs, which saves reading gigabytes again."""
    blob = file.resolve()
    if blob.parent.name == "blobs" and len(blob.name) == 64:
        return blob.name
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
