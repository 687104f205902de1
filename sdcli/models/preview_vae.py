"""The tiny autoencoders that latent previews are decoded with (TAESD), where the hub's cache has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcli.errors import BadWeights, UsageError
from sdcli.io.json_files import read_json_object
from sdcli.models.families.family import Component, Family
from sdcli.models.hub.cache import snapshot_folder
from sdcli.models.sources import HubSource

if TYPE_CHECKING:
    import torch

    from sdcli.io.lean_diffusers import AutoencoderTiny

PREVIEW_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
"""What is downloaded of its repository."""


def preview_source(family: Family) -> HubSource:
    """The repository of the tiny autoencoder for the latents of a family that has one."""
    assert family.preview_vae is not None
    return HubSource(kind="hub", repo=family.preview_vae.repo)


def cached_preview_vae(family: Family, vae_config: Any) -> Path | None:
    """The folder of a tiny autoencoder in the hub's cache that decodes the latents of a VAE with this configuration.

    It knows those of the family's own VAE alone, which the scaling factor tells from others. Never uses the network.
    """
    tiny = family.preview_vae
    if tiny is None or (vae_config.get("scaling_factor"), vae_config.get("latent_channels")) != tiny.latents:
        return None
    folder = snapshot_folder(preview_source(family))
    return folder if all((folder / name).is_file() for name in PREVIEW_FILES) else None


def load_preview_vae(folder: Path, device: torch.device) -> AutoencoderTiny:
    """A tiny autoencoder of a folder, in float32. Raises BadWeights for one that is damaged or of another kind."""
    import torch

    from sdcli.io.weights import fill, read_tensors
    from sdcli.models.networks import build_empty, network_class

    config = read_json_object(folder / PREVIEW_FILES[0])
    component = Component("", ("AutoencoderTiny",))
    try:
        kind = network_class(config, component, _NO_FAMILY)
        network: Any = build_empty(kind, config, source=str(folder))
    except UsageError as error:
        raise BadWeights(f"{folder}: {error}") from None
    fill(network, read_tensors(folder / PREVIEW_FILES[1], torch.float32), source=str(folder / PREVIEW_FILES[1]))
    return network.to(device).eval()


_NO_FAMILY = Family(name="")
