"""IP-Adapter weights -> a UNet that attends to an image beside the text, and the encoder of the image.

Ye et al. 2023, "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models" (arXiv
2308.06721). An adapter is a .safetensors file as in h94/IP-Adapter on the hub: `image_proj.*` makes tokens of the
encoder's output, and `ip_adapter.*` are keys and values for them in each cross-attention layer. The encoder is a folder
`image_encoder` near it, or one of the model's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdcli.encoders.clip_vision import CONFIG, ImageEncoder, Look, load_image_encoder
from sdcli.errors import BadWeights, NotFound, UsageError, first_line
from sdcli.io.json_files import read_json_object
from sdcli.io.out_of_memory import out_of_memory
from sdcli.io.weight_files import check_header, finished
from sdcli.io.weight_kinds import IP_ADAPTER, kind_of
from sdcli.io.weights import read_tensors
from sdcli.models.adapter_files import ip_adapter_path, pinned_ip_adapter
from sdcli.models.hub.folders import folder_of
from sdcli.models.loaded_model import LoadedModel
from sdcli.request.fields import FileRef

PART, ENCODER_PART = "ip_adapter:", "image_encoder:"
"""What the identities of a `LoadedModel` that are an adapter's are called, before the adapter's path."""


@dataclass(frozen=True)
class IpAdapter:
    """An adapter as it was read, in the dtype of the model it was loaded for, with the encoder of its images."""

    ref: FileRef
    weight: float
    tensors: Mapping[str, Mapping[str, Tensor]]
    """`image_proj` and `ip_adapter`, each by the names in it; on the CPU."""
    look: Look
    identity: str
    """`sha256:` and the file's digest."""


def load_ip_adapters(
    asked: Sequence[tuple[FileRef, float]], model: LoadedModel, *, encoders: Mapping[Path, ImageEncoder]
) -> list[IpAdapter]:
    """Read adapters, each with its weight, for a model; encoders that are there already, by their folders, are taken.

    Raises NotFound, BadWeights, and UsageError for one that was made for another kind of model.
    """
    known, adapters = dict(encoders), []
    for ref, weight in asked:
        adapter = _load(ref, weight, model, known)
        known[adapter.look.encoder.folder] = adapter.look.encoder
        adapters.append(adapter)
    return adapters


def with_ip_adapters(model: LoadedModel, adapters: Sequence[IpAdapter]) -> LoadedModel:
    """The model with a UNet of its own, which shares the given one's weights and attends to the adapters' tokens.

    The given model stays as it is. Raises BadWeights for an adapter whose image projection is not as it should be.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    shared = {id(tensor): tensor for tensor in (*model.unet.parameters(), *model.unet.buffers())}
    unet: Any = copy.deepcopy(model.unet, shared)
    own = unet.attn_processors
    unet.set_attn_processor(AttnProcessor2_0())  # the loader replaces the processors, and does not know our own
    try:
        with torch.random.fork_rng(devices=[]):  # it fills the layers with random numbers first
            unet._load_ip_adapter_weights([dict(one.tensors) for one in adapters], low_cpu_mem_usage=False)
    except (KeyError, RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if out_of_memory(error):
            raise
        names = " and ".join(str(one.ref) for one in adapters)
        raise BadWeights(f"{names}: not laid out as an IP-Adapter ({first_line(error)})") from None
    for name, processor in own.items():
        layer = unet.get_submodule(name.removesuffix(".processor"))
        if isinstance(layer.processor, IPAdapterAttnProcessor2_0):
            layer.processor.scale = [one.weight for one in adapters]
        else:
            layer.set_processor(processor)
    identities = {f"{PART}{one.ref}": finished(one.identity) for one in adapters}
    identities |= {f"{ENCODER_PART}{one.ref}": one.look.encoder.identity for one in adapters}
    networks = {f"{PART}{one.ref}": unet.encoder_hid_proj for one in adapters}
    networks |= {f"{ENCODER_PART}{one.ref}": one.look.encoder.network for one in adapters}
    return replace(
        model,
        parts={**model.parts, "unet": unet.eval().requires_grad_(False), **networks},
        identities={**model.identities, **identities},
        ip_adapters=tuple((one.ref, one.weight) for one in adapters),
    )


def _load(ref: FileRef, weight: float, model: LoadedModel, encoders: Mapping[Path, ImageEncoder]) -> IpAdapter:
    path, digest = ip_adapter_path(ref), pinned_ip_adapter(ref).sha256
    kind = kind_of(check_header(path))
    if kind is not None and kind is not IP_ADAPTER:
        raise BadWeights(f"{path} is not an IP-Adapter: it is {kind.described(path)}")
    tensors: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in read_tensors(path, model.dtype, rename=_of_adapter).items():
        part, _, rest = name.partition(".")
        tensors[part][rest] = tensor
    width, whole = _seen_by(tensors["image_proj"], source=path)
    _check_fits(tensors["ip_adapter"], model, source=path)
    folder = _encoder_folder(path, model, width=width, whole=whole)
    encoder = encoders.get(folder) or load_image_encoder(folder, device=model.device, dtype=model.dtype)
    return IpAdapter(ref, weight, tensors, Look(encoder, whole), f"sha256:{digest}")


def _of_adapter(name: str) -> str | None:
    return name if name.startswith(("image_proj.", "ip_adapter.")) else None


def _seen_by(projection: Mapping[str, Tensor], *, source: Path) -> tuple[int, bool]:
    """How many numbers of the encoder an image projection takes, and whether they are of the whole image or of each
    of its patches. Raises UsageError for faces, and BadWeights for a file that is not an IP-Adapter."""
    if "norm.weight" in projection and "proj.weight" not in projection:
        raise UsageError(f"{source} is an IP-Adapter for the embeddings of faces (FaceID), which sdcli cannot make")
    for name, whole in (("proj.weight", True), ("proj.0.weight", False), ("proj_in.weight", False)):
        if name in projection and projection[name].ndim == 2:
            return projection[name].shape[1], whole
    raise BadWeights(f"{source} is not an IP-Adapter: it has no image_proj that makes tokens of an image")


def _check_fits(layers: Mapping[str, Tensor], model: LoadedModel, *, source: Path) -> None:
    """Raise UsageError where an adapter's keys and values are not for the model's cross-attention layers."""
    unet = model.unet
    model.family.refuse("ip_adapters", model.spec.name)
    given = sum(name.endswith(".to_k_ip.weight") for name in layers)
    if not given:
        raise BadWeights(
            f"{source} is not an IP-Adapter for a UNet: it has no weights named ip_adapter.*.to_k_ip.weight"
        )
    names = [name.removesuffix(".processor") for name in unet.attn_processors if not name.endswith("attn1.processor")]
    misfit = f"the IP-Adapter {source} does not fit {model.spec.name}: it was made for"
    if given != len(names):
        raise UsageError(f"{misfit} {given} cross-attention layers, and the model has {len(names)}")
    for position, name in enumerate(names):
        attention = unet.get_submodule(name)
        for role in ("to_k", "to_v"):
            key, wanted = f"{2 * position + 1}.{role}_ip.weight", getattr(attention, role).weight.shape
            if key not in layers:
                raise BadWeights(f"{source} is damaged: it has no ip_adapter.{key}")
            if layers[key].shape != wanted:
                got, ours = ("x".join(map(str, shape)) for shape in (layers[key].shape, wanted))
                raise UsageError(f"{misfit} another UNet (ip_adapter.{key} is {got}, and the model has {ours} there)")


def _encoder_folder(path: Path, model: LoadedModel, *, width: int, whole: bool) -> Path:
    """The first image encoder whose embeddings have the width that an adapter takes: beside it, above it, where
    h94/IP-Adapter keeps the one that its SDXL adapters share, or the model's own. Raises NotFound, UsageError and
    BadWeights."""
    own, up = folder_of(model.spec), path.parent.parent
    near = [path.parent, up, up / "models", *([own] if own is not None else [])]
    folders = [folder / "image_encoder" for folder in near if (folder / "image_encoder" / CONFIG).is_file()]
    if not folders:
        raise NotFound(f"no image encoder for {path}: put the folder image_encoder that belongs to it beside it")
    name = "projection_dim" if whole else "hidden_size"
    for folder in folders:
        if read_json_object(folder / CONFIG).get(name) == width:
            return folder
    raise UsageError(f"{path} needs an image encoder whose {name} is {width}; that of {folders[0]} is different")
