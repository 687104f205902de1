"""What a warm worker and a command must have in common, so that both would generate the same bytes.

The device and the dtype are not in here: they are in the socket's name.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping

from sdcli import __version__
from sdcli.io.files import PACKAGE

PREFIXES = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "ATEN_", "TORCH", "PYTORCH_", "CUDA_"),
    *("CUBLAS_", "CUDNN_", "NVIDIA_", "HIP_", "ROCR_", "LD_", "MALLOC_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_"),
    *("DIFFUSERS_", "SDCLI_"),
)
NAMES = {"HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"}
"""Variables, beside those of the prefixes, that decide how torch computes or where models are."""
IGNORED = {
    *("SDCLI_NO_SERVER", "SDCLI_SERVER_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    # sdcli sets these itself, sooner or later in every process
    *(
        "HF_HUB_DISABLE_TELEMETRY",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "HF_HUB_DISABLE_XET",
        "DIFFUSERS_DISABLE_REMOTE_CODE",
    ),
}


def identity(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Facts of this process; a worker and a command may work together where all of them are equal."""
    variables = os.environ if environment is None else environment
    return {
        "version of sdcli": f"{__version__} {_source_state()}",
        "Python environment": _python_state(),
        "number of processors": str(_processors()),
        **{
            name: variables[name]
            for name in sorted(variables)
            if name not in IGNORED and (name in NAMES or name.startswith(PREFIXES))
        },
    }


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """The name of the first fact that is not equal; None where all are."""
    return next((name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name)), None)


def _source_state() -> str:
    """Changes with every edit of the package, as in a checkout: names, sizes and times of its modules."""
    digest, folders = hashlib.sha256(), [str(PACKAGE)]
    for place in folders:
        for entry in sorted(os.scandir(place), key=lambda one: one.name):
            if entry.name.endswith(".py"):
                found = entry.stat()
                digest.update(f"{entry.path} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
            elif "." not in entry.name and entry.name not in _DATA and entry.is_dir():
                folders.append(entry.path)
    return digest.hexdigest()[:16]


_DATA = {"__pycache__", "starter", "clip_tokenizer"}
"""Folders of the package without modules."""


def _python_state() -> str:
    """Changes when a package is installed, upgraded or removed, which touches the folder that holds all of them."""
    folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and os.path.isdir(path)]
    return f"{sys.version} {sys.prefix} " + " ".join(f"{path} {os.stat(path).st_mtime_ns}" for path in folders)


def _processors() -> int | None:
    """The processors that this process may use, which decide how many threads torch takes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
