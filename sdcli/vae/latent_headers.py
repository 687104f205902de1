"""The headers of latent files: what can be known without reading a number. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sdcli.errors import BadLatents, BadWeights, NotFound, SdcliError
from sdcli.io.pickles import PICKLE_SUFFIXES, is_pickle
from sdcli.io.weight_files import check_header

TENSOR, MARKER = "latent_tensor", "latent_format_version_0"
"""The names of the tensors in a latent file of ComfyUI; the empty marker says that it is to be used as it is."""
MAX_NUMPY_HEADER = 10_000


def count_of(path: Path) -> int:
    """How many latents a file holds, by its header alone. Raises NotFound and BadLatents."""
    if path.suffix.lower() == ".npy":
        refuse_pickles(path)
        with reading_numpy(path), open(path, "rb") as file:
            shape = numpy_header(file)[0]
    else:
        header = header_of(path)
        names = [name for name in header if name not in ("__metadata__", MARKER)]
        name = TENSOR if TENSOR in names else names[0] if len(names) == 1 else None
        shape = tuple(header[name].get("shape", ())) if name is not None else ()
    count = shape[0] if len(shape) == 4 else 1
    if len(shape) not in (3, 4) or not 0 < count <= path.stat().st_size:
        raise BadLatents(f"{path} holds no latents [C, h, w] or [B, C, h, w]")
    return int(count)


def refuse_pickles(path: Path) -> None:
    """Raise BadLatents for a pickle and what is no file, NotFound for what is not there."""
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


def header_of(path: Path) -> dict[str, Any]:
    """The parsed header of a safetensors file. Raises NotFound and BadLatents."""
    refuse_pickles(path)
    try:
        return check_header(path)
    except BadWeights as error:
        raise BadLatents(str(error)) from None


def numpy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array in a file, which is then at its first number."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file, max_header_size=MAX_NUMPY_HEADER)
    return shape, dtype


@contextlib.contextmanager
def reading_numpy(path: Path) -> Iterator[None]:
    """Whatever goes wrong with an array inside the block becomes BadLatents."""
    try:
        yield
    except SdcliError:
        raise
    except Exception as error:  # numpy reads the header as a Python expression, which fails in a dozen ways
        raise BadLatents(f"{path} is not a numpy array: {error}") from None
