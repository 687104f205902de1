"""The files of LoRAs and IP-Adapters: where a request's entry is on the disk, and its digest. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import platformdirs

from sdcli.errors import BadWeights, NotFound, Offline, UsageError
from sdcli.io.digests import digest_of
from sdcli.io.files import expanded
from sdcli.io.pickles import PICKLE_SUFFIXES, pickle_refused
from sdcli.io.weight_files import check_header
from sdcli.models.hub.cache import cache_folder, cached_file
from sdcli.models.sources import HUB_PREFIX, HubFile
from sdcli.request.fields import FileRef, LoraRef
from sdcli.request.input_files import check_same_file
from sdcli.request.schema import did_you_mean

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The two files of a PEFT folder."""
PEFT_PREFIX = "base_model.model."
"""What the names of tensors begin with in files that peft wrote."""
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file of a LoRA folder that diffusers wrote."""


def pinned_lora(ref: LoraRef, folder: Path | None) -> LoraRef:
    """The entry with the digest of its file.

    Raises NotFound, Offline, UsageError for a pickle and for another file than the entry's own digest says, and
    BadWeights.
    """
    digest = lora_digest(find_lora(ref.path, folder))
    check_same_file(digest, ref.sha256, what=f"the LoRA {ref.path}")
    return ref.model_copy(update={"sha256": digest})


def is_in_folder(ref: LoraRef, folder: Path | None) -> bool:
    """Whether the LoRA folder has one of that name."""
    return _by_name(ref.path, folder) is not None


def find_lora(path: str, folder: Path | None) -> Path:
    """The .safetensors file or PEFT folder of an entry: a name of the LoRA folder, a path, or a cached file of the hub.

    Raises NotFound, Offline for a file of the hub that is not in the cache, and UsageError for a pickle or a folder of
    another kind.
    """
    if path.startswith(HUB_PREFIX):
        return _of_hub(path)
    found = _by_name(path, folder) or expanded(path)
    if os.path.isdir(found):
        if not os.path.isfile(found / ADAPTER_CONFIG) and os.path.isfile(found / DIFFUSERS_WEIGHTS):
            return found / DIFFUSERS_WEIGHTS
        pickled = (found / ADAPTER_WEIGHTS).with_suffix(".bin")
        if not os.path.isfile(found / ADAPTER_WEIGHTS) and os.path.isfile(pickled):
            raise UsageError(pickle_refused(pickled))
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not os.path.isfile(found / name):
                raise UsageError(f"{path} is a folder without {name}, so it is not a LoRA that peft wrote")
    elif not os.path.isfile(found):  # unlike Path's, these are false for a name that is too long for a file
        raise NotFound(f"no file {path}{f', and {lora_not_found(path, folder)}' if _is_name(path) else ''}")
    elif found.suffix.lower() in PICKLE_SUFFIXES:
        raise UsageError(pickle_refused(found))
    return found


def _of_hub(path: str) -> Path:
    """The file in the hub's cache that `hub:owner/name/file.safetensors` names."""
    file = HubFile.of(path)
    if file is None:
        raise UsageError(f"{path!r} is no file of the hub; it is written as hub:owner/name/file.safetensors")
    found = cached_file(file)
    if not found.is_file():
        raise Offline(f"the LoRA {path} is not in the cache {cache_folder()}; run `sdcli models pull {path}`")
    return found


def adapter_config(path: Path) -> Path | None:
    """PEFT's configuration of a LoRA: that of its folder, or what stands beside a file with the names of peft.

    Raises BadWeights for a file that is damaged.
    """
    if path.is_dir():
        return path / ADAPTER_CONFIG
    beside = path.parent / ADAPTER_CONFIG
    if not beside.is_file() or not any(name.startswith(PEFT_PREFIX) for name in check_header(path)):
        return None
    return beside


def lora_digest(path: Path) -> str:
    """64 hex digits: a file's SHA-256, or that of the digests of PEFT's two files. Raises BadWeights."""
    config, weights = adapter_config(path), path / ADAPTER_WEIGHTS if path.is_dir() else path
    try:
        if config is None:
            return digest_of(weights)
        return hashlib.sha256(f"{digest_of(config)} {digest_of(weights)}".encode()).hexdigest()
    except OSError as error:
        raise BadWeights(f"cannot read {path}: {error.strerror}") from None


def user_lora_folder() -> Path:
    """The user's own LoRA folder, `loras` in the data folder (XDG_DATA_HOME on Linux)."""
    return platformdirs.user_data_path("sdcli") / "loras"


def _is_name(path: str) -> bool:
    return Path(path).name == path != ".." and not path.endswith((".safetensors", *PICKLE_SUFFIXES))


def _by_name(path: str, folder: Path | None) -> Path | None:
    """The LoRA of that name in the folder, or None; `path` may be anything, and nothing outside is looked at."""
    root = folder or user_lora_folder()
    named = (root / f"{path}.safetensors", root / path) if _is_name(path) else ()
    return next((found for found in named if os.path.exists(found)), None)


def lora_not_found(name: str, folder: Path | None) -> str:
    """The sentence for a name that the LoRA folder does not have."""
    root = folder or user_lora_folder()
    names = sorted(path.name.removesuffix(".safetensors") for path in root.glob("*")) if root.is_dir() else []
    return f"no LoRA {name!r} in {root}{did_you_mean(name, names)}"


def pinned_ip_adapter(ref: FileRef) -> FileRef:
    """The reference to an adapter's weights with the digest of the file.

    Raises NotFound, UsageError for a pickle and for another file than the reference's own digest says, and BadWeights.
    """
    path = ip_adapter_path(ref)
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"{path} is not a .safetensors file, the only kind of IP-Adapter that sdcli reads")
    if not os.path.isfile(path):
        raise NotFound(f"no file {path}")
    try:
        digest = digest_of(path)
    except OSError as error:
        raise BadWeights(f"cannot read {path}: {error.strerror}") from None
    check_same_file(digest, ref.sha256, what=f"the IP-Adapter {path}")
    return ref.model_copy(update={"sha256": digest})


def ip_adapter_path(ref: FileRef) -> Path:
    """Where the weights are; from the root, so that their folder's parent has a name."""
    return Path(os.path.abspath(os.path.expanduser(ref.path)))
