"""Latent files: written with a record and readable by ComfyUI; read from sdcli, ComfyUI, safetensors and numpy."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

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
"""The factor that scaled ComfyUI's first `.latent` files, those without the marker tensor."""

_TENSOR, _MARKER, _RECORD = "latent_tensor", "latent_format_version_0", "sdcli"
MAX_NUMPY_HEADER = 10_000


class _Frozen(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class Source(_Frozen):
    """The image that a latent was encoded from. Sizes are pixels; the fitted size is what the VAE saw."""

    name: str
    sha256: str
    width: int
    height: int
    fitted_width: int
    fitted_height: int
    fit: Fit
    fallbacks: tuple[str, ...] = ()


class LatentRecord(_Frozen):
    """The record of how a latent file was made."""

    schema_version: Literal[1] = Field(1, alias="schema")
    kind: Literal["latents"] = "latents"
    model: str
    vae: str
    """The identity of the VAE's weights: `sha256:...` or `random:...`."""
    scaling_factor: float = Field(gt=0)
    scaled: bool = False
    """Whether the numbers are multiplied by the scaling factor; those that sdcli writes are not."""
    sample: Literal["mean", "sample"]
    seed: int | None = None
    size: tuple[int, int] | None = None
    """The requested size; None if every image kept its own."""
    dtype: str = "float32"
    """The dtype that the VAE computed in."""
    stored: Literal["float32", "float16"] = "float32"
    """The dtype of the stored tensor."""
    source: tuple[Source, ...]


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
    tensors = {_TENSOR: latents.contiguous(), _MARKER: torch.zeros(0)}
    return save(tensors, metadata={_RECORD: json.dumps(record.model_dump(by_alias=True))})


def read_record(path: Path) -> LatentRecord | None:
    """The record in a latent file, read from its header alone; None if sdcli did not write the file.

    Raises NotFound, and BadLatents for a damaged file.
    """
    return _record(path, _header(path))


def count_of(path: Path) -> int:
    """How many latents a file holds, by its header alone. Raises NotFound and BadLatents."""
    if path.suffix.lower() == ".npy":
        _refuse_pickles(path)
        with _reading_numpy(path), open(path, "rb") as file:
            shape = _numpy_header(file)[0]
    else:
        header = _header(path)
        names = [name for name in header if name not in ("__metadata__", _MARKER)]
        name = _TENSOR if _TENSOR in names else names[0] if len(names) == 1 else None
        shape = tuple(header[name].get("shape", ())) if name is not None else ()
    if len(shape) not in (3, 4):
        raise BadLatents(f"{path} holds no latents [C, h, w] or [B, C, h, w]")
    return int(shape[0]) if len(shape) == 4 else 1


def read_latents(path: Path, *, scaled: bool | None = None) -> LatentFile:
    """The latents in a file of sdcli or ComfyUI (`.latent`), or in a plain `.safetensors` or `.npy` file.

    Plain files do not record whether they are multiplied by the scaling factor, so they need `scaled`.
    Raises NotFound, BadLatents for files that cannot be read and numbers that are not finite, and UsageError if
    `scaled` is missing or contradicts the file.
    """
    if path.suffix.lower() == ".npy":
        _refuse_pickles(path)
        return LatentFile(latents=_checked(path, _read_numpy(path)), scaled=_required(path, scaled))
    header = _header(path)
    record = _record(path, header)
    names = [name for name in header if name not in ("__metadata__", _MARKER)]
    if _TENSOR in names:
        _check_agrees(path, scaled, record.scaled if record is not None else False)
        latents = _checked(path, _read_tensor(path, _TENSOR, header))
        if record is not None:
            if len(record.source) not in (0, len(latents)):
                raise BadLatents(f"{path} holds {len(latents)} latents, its record lists {len(record.source)} images")
            return LatentFile(latents=latents, scaled=record.scaled, record=record)
        return LatentFile(latents=latents if _MARKER in header else latents * (1.0 / COMFYUI_FACTOR), scaled=False)
    if len(names) != 1:
        raise BadLatents(f"{path} holds {len(names)} tensors; a latent file holds one, or one called {_TENSOR}")
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


def _refuse_pickles(path: Path) -> None:
    try:
        if not path.is_file():
            raise NotFound(f"no file {path}") if not path.exists() else BadLatents(f"{path} is not a regular file")
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
    with _reading_numpy(path):
        with open(path, "rb") as file:
            shape, dtype = _numpy_header(file)
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


def _numpy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array in a file, which is then at its first number."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file, max_header_size=MAX_NUMPY_HEADER)
    return shape, dtype


@contextlib.contextmanager
def _reading_numpy(path: Path) -> Iterator[None]:
    try:
        yield
    except SdcliError:
        raise
    except Exception as error:  # numpy reads the header as a Python expression, which fails in a dozen ways
        raise BadLatents(f"{path} is not a numpy array: {error}") from None


def _checked(path: Path, tensor: Tensor) -> Tensor:
    """[C, h, w] or [B, C, h, w] -> [B, C, h, w]. Raises BadLatents for another shape, no numbers, NaN and infinity."""
    shape = "x".join(str(side) for side in tensor.shape) or "()"
    if tensor.ndim not in (3, 4) or not tensor.numel():
        raise BadLatents(f"{path} holds a tensor of shape {shape}; latents are [C, h, w] or [B, C, h, w]")
    if not tensor.isfinite().all():
        raise BadLatents(f"{path} holds NaN or infinite numbers")
    return tensor if tensor.ndim == 4 else tensor[None]
