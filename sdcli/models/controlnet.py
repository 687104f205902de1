"""ControlNet weights -> networks in memory, checked against the UNet that they are to guide.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv 2302.05543). A ControlNet is a
folder as diffusers writes it (config.json and safetensors), or a single .safetensors file with diffusers' names or the
original ones (`control_model.*`). A single file does not describe its shape, so it is taken to fit the UNet at hand.
Some files hold the difference to a UNet's weights (kohya's and lllyasviel's modules of 2023), as the empty tensor
`difference` in them says; the weights of the UNet at hand are added to those.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sdcli.errors import BadWeights, NotFound, UsageError
from sdcli.io.json_files import read_json_object
from sdcli.io.lean_diffusers import ControlNetModel, UNet2DConditionModel, lean_imports
from sdcli.io.weight_files import check_header, files_digest, in_background, shards
from sdcli.io.weight_kinds import CONTROLNET, kind_of
from sdcli.io.weights import empty_network, fill, read_tensors
from sdcli.models.hub.folders import folder_of
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.networks import placed
from sdcli.models.registry import ControlNetSpec
from sdcli.models.sources import FileSource, HubSource
from sdcli.vae.config import cell_of

PART = "controlnet:"
"""What the parts of a `LoadedModel` that are ControlNets are called, before the name that a request has for them."""

DIFFERENCE = "difference"
"""The empty tensor of a file that holds the difference to a UNet's weights."""
LORA_CONTROLNET = "lora_controlnet"
"""The empty tensor of a file whose ControlNet is a LoRA of the UNet (Stability's Control-LoRA)."""

_SHAPE = {
    "cross_attention_dim": "text states of {} numbers",
    "block_out_channels": "blocks of {} channels",
    "layers_per_block": "{} layers a block",
    "addition_embed_type": "a further condition {!r}",
    "projection_class_embeddings_input_dim": "a further condition of {} numbers",
}
"""What must be equal in both configurations -> how error messages describe it."""


@dataclass(frozen=True)
class ControlNet:
    """A network in memory, in the dtype and on the device of the model it was loaded for, and whose weights it has."""

    network: ControlNetModel
    identity: Future[str]


def load_controlnet(spec: ControlNetSpec, model: LoadedModel) -> ControlNet:
    """Load a ControlNet for a model. The network is never used.

    Raises NotFound, Offline, BadWeights, and UsageError for one that was made for another kind of model.
    """
    path, variant = _local(spec)
    unet = model.unet
    model.family.refuse("controls", model.spec.name)
    if path.is_dir():
        config = read_json_object(path / "config.json")
        check_fits(config, model, source=spec.name)
        files = shards(path, "diffusion_pytorch_model", variant=variant)
        tensors = {name: tensor for file in files for name, tensor in read_tensors(file, model.dtype).items()}
    else:
        files, header = [path], check_header(path)
        _check_kind(header, source=path)
        stored = read_tensors(path, model.dtype, rename=_without_rest)
        tensors = _modern(stored, dict(unet.config), source=path)
        if _is_difference(tensors, header):
            tensors = _added(tensors, unet.state_dict())
        config = _config_like(unet, tensors)
        check_fits(config, model, source=spec.name)
    network = empty_network(lambda: ControlNetModel.from_config(dict(config)), source=str(path))
    fill(network, tensors, source=str(path))
    (identity,) = in_background(partial(files_digest, files))
    return ControlNet(placed(network, model.device), identity)


def with_controlnets(model: LoadedModel, controlnets: Mapping[str, ControlNet]) -> LoadedModel:
    """The model with ControlNets as parts of it, by the names that requests have for them."""
    return replace(
        model,
        parts={**model.parts, **{PART + name: one.network for name, one in controlnets.items()}},
        identities={**model.identities, **{PART + name: one.identity for name, one in controlnets.items()}},
    )


def controlnet_of(model: LoadedModel, name: str) -> ControlNetModel:
    """The ControlNet that a request calls `name`. Raises UsageError where the model was loaded without it."""
    if PART + name not in model.parts:
        raise UsageError(f"{model.spec.name} was loaded without the ControlNet {name}")
    return model.parts[PART + name]


def check_fits(config: Mapping[str, Any], model: LoadedModel, *, source: str) -> None:
    """Raise UsageError where a ControlNet's configuration is not for the model's UNet, latents and RGB maps."""
    if config.get("_class_name", "ControlNetModel") != "ControlNetModel":
        raise UsageError(f"{source} is a {config['_class_name']}, and no ControlNet (ControlNetModel)")
    theirs, ours = _defaults() | dict(config), dict(model.unet.config)
    for name, words in _SHAPE.items():
        wanted, got = (_plain(one.get(name)) for one in (ours, theirs))
        if wanted != got:
            raise UsageError(
                f"the ControlNet {source} does not fit {model.spec.name}: it was made for {words.format(got)}, "
                f"and the model has {words.format(wanted)}"
            )
    latent, given = ours["out_channels"], theirs["in_channels"]
    if given != latent:
        raise UsageError(
            f"the ControlNet {source} takes latents of {given} channels, and {model.spec.name} has {latent}"
        )
    if theirs["conditioning_channels"] != 3:
        raise UsageError(f"the ControlNet {source} takes maps of {theirs['conditioning_channels']} channels, not RGB")
    cell = 2 ** (len(theirs["conditioning_embedding_out_channels"]) - 1)
    if cell != cell_of(model.vae.config):
        raise UsageError(f"the ControlNet {source} is for latent cells of {cell} pixels, unlike {model.spec.name}")


def _local(spec: ControlNetSpec) -> tuple[Path, str | None]:
    """The folder or file of a ControlNet, and the variant of its weights."""
    source = spec.source
    path = source.path if isinstance(source, FileSource) else folder_of(spec)
    if path is None or not path.exists():
        raise NotFound(f"no file or folder {path} (the ControlNet {spec.name})")
    return path, source.variant if isinstance(source, HubSource) else None


def _without_rest(name: str) -> str | None:
    """Of a whole checkpoint that holds a ControlNet too, only that; other files have nothing else."""
    others = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", DIFFERENCE)
    return None if name.startswith(others) else name


def _check_kind(header: Mapping[str, Any], *, source: Path) -> None:
    """Raise UsageError or BadWeights for a file of another kind, by its name."""
    own = any(name.startswith(("control_model.", "zero_convs.", "controlnet_cond_embedding.")) for name in header)
    kind = kind_of(header)
    if kind is None or kind is CONTROLNET or (own and LORA_CONTROLNET not in header):
        return
    error = UsageError if "cannot use" in kind.what else BadWeights
    raise error(f"{source} is not a ControlNet: it is {kind.described(source)}")


NORMS_OF_DIFFERENCES = 0.1
"""The scales of norms are near 1, and their differences to those of a UNet much smaller than this."""


def _is_difference(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bool:
    """Whether a file holds the difference to a UNet: it says so, or the scales of its norms are near 0."""
    norms = [name for name in tensors if ".norm" in name and name.endswith(".weight")]
    scales = [float(tensors[name].float().abs().mean()) for name in norms]
    return DIFFERENCE in header or (bool(scales) and sum(scales) / len(scales) < NORMS_OF_DIFFERENCES)


def _added(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor plus the UNet's of its name, if there is one; of an inpainting UNet's input the latents alone."""
    whole = dict(tensors)
    for name in tensors.keys() & base.keys():
        own, theirs = tensors[name], base[name].to("cpu")
        if name == "conv_in.weight" and own.ndim == theirs.ndim == 4:
            theirs = theirs[:, : own.shape[1]]
        if own.shape == theirs.shape:
            whole[name] = (own.float() + theirs.float()).to(own.dtype)
    return whole


def _modern(stored: Mapping[str, Tensor], unet_config: Mapping[str, Any], *, source: Path) -> dict[str, Tensor]:
    """The tensors by diffusers' names."""
    with lean_imports():
        from diffusers.loaders import single_file_utils as ldm

    original = "time_embed.0.weight" in stored or any(name.startswith("control_model.") for name in stored)
    if not original and "controlnet_cond_embedding.conv_in.weight" not in stored:
        raise BadWeights(f"{source} is not a ControlNet: it has no weights for a map")
    try:
        converted = ldm.convert_controlnet_checkpoint(dict(stored), unet_config)
    except (KeyError, IndexError, RuntimeError, AttributeError) as error:
        raise BadWeights(f"{source} is not laid out as a ControlNet of Stable Diffusion 1.x ({error})") from None
    return {name: tensor for name, tensor in converted.items() if tensor is not None}


def _config_like(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration that `ControlNetModel.from_unet` gives, with the tensors' sizes for input and map."""
    shared = {name: value for name, value in unet.config.items() if name in _defaults()}
    text = next((t for name, t in tensors.items() if name.endswith("attn2.to_k.weight")), None)
    embedding = "controlnet_cond_embedding"
    widths = [tensors[f"{embedding}.conv_in.weight"]] if f"{embedding}.conv_in.weight" in tensors else []
    while (name := f"{embedding}.blocks.{2 * len(widths) - 1}.weight") in tensors:
        widths.append(tensors[name])
    first = tensors.get("conv_in.weight")
    return {
        **shared,
        "in_channels": first.shape[1] if first is not None and first.ndim == 4 else unet.config["out_channels"],
        **({"cross_attention_dim": text.shape[1]} if text is not None and text.ndim == 2 else {}),
        "conditioning_embedding_out_channels": [int(weight.shape[0]) for weight in widths],
    }


@cache
def _defaults() -> dict[str, Any]:
    """The defaults of diffusers' class."""
    parameters = inspect.signature(ControlNetModel.__init__).parameters
    return {name: one.default for name, one in parameters.items() if name != "self"}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
