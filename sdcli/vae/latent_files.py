"""Latent files: written with a record and readable by ComfyUI; read from sdcli, ComfyUI, safetensors and numpy."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sdcli.errors import BadLatents, UsageError
from sdcli.io.json_files import parse_json
from sdcli.io.weight_files import FLOATS
from sdcli.request.schema import first_problem
from sdcli.vae.latent_headers import MARKER, TENSOR, header_of, numpy_header, reading_numpy, refuse_pickles
from sdcli.vae.latent_record import LatentRecord

SCHEMA = 1
SUFFIXES = frozenset({".safetensors", ".latent", ".npy"})
COMFYUI_FACTOR = 0.18215
"""The factor that scaled ComfyUI's first `.latent` files, those without the marker tensor."""

_RECORD = "sdcli"


@dataclass(frozen=True)
class LatentFile:
    """Latents [B, C, h, w], float32 and finite, whether they are scaled, and their record if there is one."""

    latents: Tensor
    scaled: bool
    record: LatentRecord | None = None

    def unscaled(self, scaling_factor: float, shift_factor: float = 0.0) -> Tensor:
        """The VAE's own latents; the arguments are used if the file does not say what it was scaled with."""
        if not self.scaled:
            return self.latents
        return self.latents / (self.record.scaling_factor if self.record is not None else scaling_factor) + shift_factor


def latent_bytes(latents: Tensor, record: LatentRecord) -> bytes:
    """Unscaled latents [B, C, h, w], float32 or float16, as a whole file; equal arguments give equal bytes.

    The empty marker tensor tells ComfyUI's LoadLatent to use the latents as they are.
    """
    tensors = {TENSOR: latents.contiguous(), MARKER: torch.zeros(0)}
    return save(tensors, metadata={_RECORD: json.dumps(record.model_dump(by_alias=True))})


def read_record(path: Path) -> LatentRecord | None:
    """The record in a latent file, read from its header alone; None if sdcli did not write the file.

    Raises NotFound, and BadLatents for a damaged file.
    """
    return _record(path, header_of(path))


def read_latents(path: Path, *, scaled: bool | None = None) -> LatentFile:
    """The latents in a file of sdcli or ComfyUI (`.latent`), or in a plain `.safetensors` or `.npy` file.

    Plain files do not record whether they are multiplied by the scaling factor, so they need `scaled`.
    Raises NotFound, BadLatents for files that cannot be read and numbers that are not finite, and UsageError if
    `scaled` is missing or contradicts the file.
    """
    if path.suffix.lower() == ".npy":
        refuse_pickles(path)
        return LatentFile(latents=_checked(path, _read_numpy(path)), scaled=_required(path, scaled))
    header = header_of(path)
    record = _record(path, header)
    names = [name for name in header if name not in ("__metadata__", MARKER)]
    if TENSOR in names:
        _check_agrees(path, scaled, record.scaled if record is not None else False)
        latents = _checked(path, _read_tensor(path, TENSOR, header))
        if record is not None:
            if len(record.source) not in (0, len(latents)):
                raise BadLatents(f"{path} holds {len(latents)} latents, its record lists {len(record.source)} images")
            return LatentFile(latents=latents, scaled=record.scaled, record=record)
        return LatentFile(latents=latents if MARKER in header else latents * (1.0 / COMFYUI_FACTOR), scaled=False)
    if len(names) != 1:
        raise BadLatents(f"{path} holds {len(names)} tensors; a latent file holds one, or one called {TENSOR}")
    return LatentFile(latents=_checked(path, _read_tensor(path, names[0], header)), scaled=_required(path, scaled))


def _required(path: Path, scaled: bool | None) -> bool:
    if scaled is None:
        raise UsageError(
            f"{path} does not record whether its latents are multiplied by the VAE's scaling factor; "
            "add --scaled or --unscaled (latents of diffusers' pipelines are scaled)"
        )
    return scaled


def _check_agrees(path: Path, scaled: bool | None, recorded: bool) -> None:
    if scaled is not None and scaled != recorded:
        raise UsageError(f"{path} records that its latents are {'' if recorded else 'un'}scaled; leave the option out")


def _record(path: Path, header: dict[str, Any]) -> LatentRecord | None:
    text = header.get("__metadata__", {}).get(_RECORD)
    if text is None:
        return None
    try:
        data = parse_json(text)
        if isinstance(data, dict) and isinstance(data.get("schema"), int) and data["schema"] > SCHEMA:
            raise BadLatents(f"{path} was written by a newer sdcli: its schema is {data['schema']}, not {SCHEMA}")
        return LatentRecord.model_validate(data)
    except ValidationError as error:
        raise BadLatents(f"{path}: its sdcli record is damaged: {first_problem(error)}") from None
    except (TypeError, ValueError):
        raise BadLatents(f"{path}: its sdcli record is damaged: not a JSON object") from None


def _read_tensor(path: Path, name: str, header: dict[str, Any]) -> Tensor:
    if header[name].get("dtype") not in FLOATS:
        raise BadLatents(f"{path}: {name} holds {header[name].get('dtype')!r}, not floating-point numbers")
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            return file.get_tensor(name).float()
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BadLatents(f"{path} is damaged: {error}") from None


def _read_numpy(path: Path) -> Tensor:
    """Checks the header first: numpy allocates the size it announces before it looks at the file's size."""
    with reading_numpy(path):
        with open(path, "rb") as file:
            shape, dtype = numpy_header(file)
            if dtype.hasobject:
                raise BadLatents(f"{path} holds pickled objects, which can run any program when they are opened")
            if dtype.kind != "f":
                raise BadLatents(f"{path} holds {dtype}, not floating-point numbers")
            left = path.stat().st_size - file.tell()
            if math.prod(shape) * dtype.itemsize > left:
                raise BadLatents(f"{path} is cut short: its header announces {shape}, but {left:,} bytes follow")
        with np.errstate(over="ignore"):  # numbers too large become infinite, which is refused later
            return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    raise AssertionError("unreachable")


def _checked(path: Path, tensor: Tensor) -> Tensor:
    """[C, h, w] or [B, C, h, w] -> [B, C, h, w]. Raises BadLatents for another shape, no numbers, NaN and infinity."""
    shape = "x".join(str(side) for side in tensor.shape) or "()"
    if tensor.ndim not in (3, 4) or not tensor.numel():
        raise BadLatents(f"{path} holds a tensor of shape {shape}; latents are [C, h, w] or [B, C, h, w]")
    if not tensor.isfinite().all():
        raise BadLatents(f"{path} holds NaN or infinite numbers")
    return tensor if tensor.ndim == 4 else tensor[None]
