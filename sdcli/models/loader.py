"""ModelSpec -> LoadedModel: the networks of a model in memory, in the run's dtype, on the run's device."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from sdcli.errors import UsageError
from sdcli.io.devices import keep_freed_memory, pick_device, pick_dtype
from sdcli.io.weight_files import in_background
from sdcli.models.folder import PartLoader, from_folder
from sdcli.models.hub.folders import folder_of
from sdcli.models.hub.network import use_offline
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.networks import placed
from sdcli.models.recipe import from_recipe
from sdcli.models.registry import ModelSpec, described
from sdcli.models.single_file import NAMES, from_single_file
from sdcli.models.sources import FileSource, HubSource, RandomSource

Part = Literal["text_encoder", "text_encoder_2", "text_encoder_3", "unet", "vae"]


def load_model(
    spec: ModelSpec,
    *,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    parts: Iterable[Part] | None = None,
    needs: Part = "unet",
    leave_out: Container[str] = (),
    large_buffers: bool = False,
) -> LoadedModel:
    """Load a model from the source of its spec, or some `parts` of it. The network is never used.

    With `large_buffers` the CPU's memory is kept for buffers above 32 MiB, too (see `keep_freed_memory`).

    Without `parts` everything is loaded except `leave_out`; a model without the part `needs` is refused.
    Raises NotFound, Offline (a hub model that is not in the cache; `sdcli models pull` gets it), BadWeights and
    UsageError, also for a part that this kind of model does not have.
    """
    spec.require_supported()
    spec = described(spec)
    target = pick_device(device)
    if target.type == "cpu":
        keep_freed_memory(large=large_buffers)
    number = pick_dtype(spec.defaults.dtype if dtype == "auto" else dtype, target)
    source = part_loader(spec, number, offline=offline)
    wanted = tuple(part for part in source.parts if part not in leave_out) if parts is None else tuple(parts)
    for part in (needs,) if parts is None else wanted:
        if part not in source.parts:
            raise UsageError(_lacks(spec.name, part, source.parts))
    texts = [part for part in source.parts if part.startswith("text_encoder")]
    if len(texts) > 1 and texts[0] in wanted and texts[1] not in wanted:
        raise UsageError(f"{spec.name} has {len(texts)} text encoders, and one alone is of no use here")
    hashes = in_background(*(partial(source.identity, part) for part in wanted))
    networks: dict[str, nn.Module] = {part: placed(source.network(part), target) for part in wanted}
    return LoadedModel(
        spec=spec,
        device=target,
        dtype=number,
        scheduler_config=source.scheduler_config,
        parts=networks,
        tokenizers={part: source.tokenizer(part) for part in texts if part in wanted},
        identities=dict(zip(wanted, hashes, strict=True)),
        settings=source.settings,
    )


def part_loader(spec: ModelSpec, dtype: torch.dtype, *, offline: bool) -> PartLoader:
    """What makes the parts of a described model. Raises what `load_model` raises."""
    match spec.source:
        case RandomSource() as source:
            return from_recipe(source, spec.family, dtype)
        case FileSource(path=path):
            return from_single_file(path, dtype)
        case HubSource():
            use_offline(offline)
    folder = folder_of(spec)
    assert folder is not None
    return from_folder(folder, spec.family, dtype, variant=getattr(spec.source, "variant", None))


def _lacks(name: str, part: str, held: Sequence[str]) -> str:
    listed = " and ".join(NAMES[one] for one in held)
    if part == "unet":
        return f"{name} holds a {listed} and no UNet, so it cannot generate; train-unet can build on it"
    if "unet" not in held:
        return f"{name} has no {NAMES[part]}: it holds a {listed}"
    why = "it generates on pixels, not on latents" if part == "vae" else "it generates without text"
    return f"{name} has no {NAMES[part]}: {why}"
