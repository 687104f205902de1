"""Latent files: written so that they say what they are and ComfyUI reads them; read from sdcli, ComfyUI and numpy."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sdcli.errors import BadLatents, BadWeights, NotFound, SdcliError, UsageError
from sdcli.images.pixels import Fit
from sdcli.io.json_files import parse_json
from sdcli.io.pickles import PICKLE_SUFFIXES, is_pickle
from sdcli.io.weight_files import FLOATS, check_header
from sdcli.request.schema import first_problem

SCHEMA = 1
SUFFIXES = frozenset({".safetensors", ".latent", ".npy"})
COMFYUI_FACTOR = 0.18215
"""What ComfyUI's first `.latent` files, those without the marker, were multiplied by."""

_TENSOR, _MARKER, _RECORD = "latent_tensor", "latent_format_version_0", "sdcli"
MAX_NUMPY_HEADER = 10_000


class _Frozen(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class Source(_Frozen):
    """The image that one latent was made of. Sizes are pixels; `fitted` is what the VAE saw."""

    name: str
    sha256: str
    width: int
    height: int
    fitted_width: int
    fitted_height: int
    fit: Fit
    fallbacks: tuple[str, ...] = ()


class LatentRecord(_Frozen):
    """What a latent file says about itself."""

    schema_version: Literal[1] = Field(1, alias="schema")
    kind: Literal["latents"] = "latents"
    model: str
    vae: str
    """The identity of the VAE's weights: `sha256:...` or `random:...`."""
    scaling_factor: float = Field(gt=0)
    scaled: bool = False
    """Whether the numbers are multiplied by the scaling factor; sdcli writes the VAE's own, which are not."""
    sample: Literal["mean", "sample"]
    seed: int | None = None
    size: tuple[int, int] | None = None
    """The size that was asked for; None where every image kept its own."""
    dtype: str = "float32"
    """What the VAE computed in."""
    stored: Literal["float32", "float16"] = "float32"
    """What the tensor is stored as."""
    source: tuple[Source, ...]


@dataclass(frozen=True)
class LatentFile:
    """Latents [B, C, h, w], float32 and finite, with what is known about them."""

    latents: Tensor
    scaled: bool
    record: LatentRecord | None = None

    def unscaled(self, scaling_factor: float, shift_factor: float = 0.0) -> Tensor:
        """The VAE's own latents; the scaling factor counts only where the file does not say by which it was scaled."""
        if not self.scaled:
            return self.latents
        return self.latents / (self.record.scaling_factor if self.record is not None else scaling_factor) + shift_factor


def latent_bytes(latents: Tensor, record: LatentRecord) -> bytes:
    """Unscaled latents [B, C, h, w], float32 or float16, as a whole file; equal arguments give equal bytes.

    ComfyUI's LoadLatent takes the tensor as it is where the empty marker tensor is there.
    """
    tensors = {_TENSOR: latents.contiguous(), _MARKER: torch.zeros(0)}
    return save(tensors, metadata={_RECORD: json.dumps(record.model_dump(by_alias=True))})


def read_record(path: Path) -> LatentRecord | None:
    """What a file of sdcli says about itself, from its header alone; None where it is somebody else's.

    Raises NotFound, and BadLatents for a file that is damaged.
    """
    return _record(path, _header(path))


def read_latents(path: Path, *, scaled: bool | None = None) -> LatentFile:
    """The latents in a file of sdcli or ComfyUI (`.latent`), or in a plain `.safetensors` or `.npy`.

    Plain files do not say whether they are multiplied by the scaling factor, so there `scaled` must.
    Raises NotFound, BadLatents for what cannot be read or is not finite, and UsageError where `scaled` is missing
    or is not what the file says.
    """
    if path.suffix.lower() == ".npy":
        _refuse_pickles(path)
        return LatentFile(latents=_checked(path, _read_numpy(path)), scaled=_said(path, scaled))
    header = _header(path)
    record = _record(path, header)
    names = [name for name in header if name not in ("__metadata__", _MARKER)]
    if _TENSOR in names:
        _agree(path, scaled, record.scaled if record is not None else False)
        latents = _checked(path, _read_tensor(path, _TENSOR, header))
        if record is not None:
            if len(record.source) not in (0, len(latents)):
                raise BadLatents(f"{path} holds {len(latents)} latents and speaks of {len(record.source)} images")
            return LatentFile(latents=latents, scaled=record.scaled, record=record)
        return LatentFile(latents=latents if _MARKER in header else latents * (1.0 / COMFYUI_FACTOR), scaled=False)
    if len(names) != 1:
        raise BadLatents(f"{path} holds {len(names)} tensors; a latent file holds one, or one called {_TENSOR}")
    return LatentFile(latents=_checked(path, _read_tensor(path, names[0], header)), scaled=_said(path, scaled))


def _said(path: Path, scaled: bool | None) -> bool:
    if scaled is None:
        raise UsageError(
            f"{path} does not say whether its latents are multiplied by the VAE's scaling factor; "
            "--scaled or --unscaled must (diffusers' pipelines work with scaled ones)"
        )
    return scaled


def _agree(path: Path, said: bool | None, recorded: bool) -> None:
    if said is not None and said != recorded:
        raise UsageError(
            f"{path} says itself that its latents are {'' if recorded else 'un'}scaled; leave the option out"
        )


def _refuse_pickles(path: Path) -> None:
    try:
        if not path.is_file():
            raise NotFound(f"no file {path}") if not path.exists() else BadLatents(f"{path} is no ordinary file")
        with open(path, "rb") as file:
            start, size = file.read(8), path.stat().st_size
    except (OSError, ValueError) as error:
        raise BadLatents(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if is_pickle(start, size=size) or path.suffix.lower() in PICKLE_SUFFIXES:
        raise BadLatents(
            f"{path} is a pickle, which can run any program when it is opened; "
            "save the latents with safetensors.torch.save_file instead"
        )


def _header(path: Path) -> dict[str, Any]:
    _refuse_pickles(path)
    try:
        return check_header(path)
    except BadWeights as error:
        raise BadLatents(str(error)) from None


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
        raise BadLatents(f"{path}: its sdcli record is damaged: no JSON object") from None


def _read_tensor(path: Path, name: str, header: dict[str, Any]) -> Tensor:
    if header[name].get("dtype") not in FLOATS:
        raise BadLatents(f"{path}: {name} holds {header[name].get('dtype')!r}, not floating-point numbers")
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            return file.get_tensor(name).float()
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BadLatents(f"{path} is damaged: {error}") from None


def _read_numpy(path: Path) -> Tensor:
    """The header first: numpy reserves what it announces before it looks at the file's size."""
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(file, max_header_size=MAX_NUMPY_HEADER)
            if dtype.hasobject:
                raise BadLatents(f"{path} holds pickled objects, which can run any program when they are opened")
            if dtype.kind != "f":
                raise BadLatents(f"{path} holds {dtype}, not floating-point numbers")
            left = path.stat().st_size - file.tell()
            if math.prod(shape) * dtype.itemsize > left:
                raise BadLatents(f"{path} is cut short: its header announces {shape}, {left:,} bytes follow")
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused as that
            return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    except SdcliError:
        raise
    except Exception as error:  # numpy reads the header as a Python expression, which fails in a dozen ways
        raise BadLatents(f"{path} is no numpy array: {error}") from None


def _checked(path: Path, tensor: Tensor) -> Tensor:
    """[C, h, w] or [B, C, h, w] -> [B, C, h, w]. Raises BadLatents for another shape, nothing, NaN and infinity."""
    shape = "x".join(str(side) for side in tensor.shape) or "()"
    if tensor.ndim not in (3, 4) or not tensor.numel():
        raise BadLatents(f"{path} holds a tensor of shape {shape}; latents are [C, h, w] or [B, C, h, w]")
    if not tensor.isfinite().all():
        raise BadLatents(f"{path} holds NaN or infinite numbers")
    return tensor if tensor.ndim == 4 else tensor[None]
