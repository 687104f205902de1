"""LoRAs as asked -> the files they mean: tags in a prompt, the folder that names are looked up in, digests."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import platformdirs
from pydantic import ValidationError

from sdcli.errors import BadWeights, NotFound, UsageError
from sdcli.io.files import expanded
from sdcli.models.registry import PICKLE_SUFFIXES, pickle_refused
from sdcli.request.fields import LoraRef, digits
from sdcli.request.input_files import check_same_file, digest_of
from sdcli.request.schema import GenerationRequest, did_you_mean, first_problem

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The two files of a PEFT folder."""

_TAG = re.compile(r" ?<lora:([^<>]*)>")


def find_loras(request: GenerationRequest, folder: Path | None) -> GenerationRequest:
    """A resolved request with its LoRAs found: tags of the prompt became entries, and every entry has its digest.

    Names are looked up in `folder`, or in the user's own. Raises UsageError for a tag that names no LoRA there, and
    what `pinned` raises.
    """
    prompt, tagged = take_tags(request.prompt)
    template, more = take_tags(request.prompt_template or "")
    for ref in (*tagged, *more):
        if not is_here(ref, folder):
            raise UsageError(_not_found(ref.path, folder))
    refs = tuple(pinned(ref, folder) for ref in (*request.loras, *tagged, *more))
    if not refs:
        return request
    return request.model_copy(update={"prompt": prompt, "prompt_template": template, "loras": refs})


def take_tags(prompt: str) -> tuple[str, tuple[LoraRef, ...]]:
    """A prompt without its tags, and what they ask for.

    A tag is the web UI's: `<lora:NAME>`, `<lora:NAME:WEIGHT>` or `<lora:NAME:TEXT_WEIGHT:UNET_WEIGHT>` (in this order,
    the other way round than in `--lora`), where `te=WEIGHT` and `unet=WEIGHT` may stand as well. Raises UsageError.
    """
    refs = tuple(_ref_of_tag(match[1]) for match in _TAG.finditer(prompt))
    return (_TAG.sub("", prompt).strip() if refs else prompt), refs


def tag(ref: LoraRef) -> str:
    """The web UI's tag for a LoRA, by the name of its file: `<lora:NAME:WEIGHT>`."""
    both = f":{digits(ref.unet_weight)}" if ref.unet_weight != ref.text_weight else ""
    return f"<lora:{lora_name(ref)}:{digits(ref.text_weight)}{both}>"


def lora_name(ref: LoraRef) -> str:
    """What a LoRA is called in the web UI's texts: its file's name, without what has a meaning there."""
    return re.sub(r"[<>:,=\n]", "", Path(ref.path).name.removesuffix(".safetensors"))


def pinned(ref: LoraRef, folder: Path | None) -> LoraRef:
    """The entry with the digest of its file.

    Raises NotFound, UsageError for a pickle and for another file than the entry's own digest says, and BadWeights.
    """
    digest = lora_digest(find_lora(ref.path, folder))
    check_same_file(digest, ref.sha256, what=f"the LoRA {ref.path}")
    return ref.model_copy(update={"sha256": digest})


def is_here(ref: LoraRef, folder: Path | None) -> bool:
    """Whether the LoRA folder has one of that name."""
    return _by_name(ref.path, folder) is not None


def find_lora(path: str, folder: Path | None) -> Path:
    """The .safetensors file or PEFT folder of an entry: a name of the LoRA folder, or else a path.

    Raises NotFound, and UsageError for a pickle or a folder of another kind.
    """
    found = _by_name(path, folder) or expanded(path)
    if os.path.isdir(found):
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not os.path.isfile(found / name):
                raise UsageError(f"{path} is a folder without {name}, so it is no LoRA that peft wrote")
    elif not os.path.isfile(found):  # unlike Path's, these say no to a name that is too long for a file
        raise NotFound(f"no file {path}{f', and {_not_found(path, folder)}' if _is_name(path) else ''}")
    elif found.suffix.lower() in PICKLE_SUFFIXES:
        raise UsageError(pickle_refused(found))
    return found


def lora_digest(path: Path) -> str:
    """64 hex digits: a file's SHA-256, or that of the two digests of a PEFT folder. Raises BadWeights."""
    if path.is_dir():
        both = " ".join(lora_digest(path / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        return hashlib.sha256(both.encode()).hexdigest()
    try:
        return digest_of(path)
    except OSError as error:
        raise BadWeights(f"cannot read {path}: {error.strerror}") from None


def user_lora_folder() -> Path:
    """The user's own LoRA folder, `loras` in the data folder (XDG_DATA_HOME on Linux)."""
    return platformdirs.user_data_path("sdcli") / "loras"


def _ref_of_tag(inner: str) -> LoraRef:
    """`NAME:0.8` -> the entry, by the web UI's rules."""
    named = dict(part.split("=", 1) for part in inner.split(":") if "=" in part)
    name, *weights = [part for part in inner.split(":") if "=" not in part] or [""]
    if len(weights) > 2 or set(named) - {"te", "unet"}:
        raise UsageError(f"<lora:{inner}> is not understood; a tag is <lora:NAME:WEIGHT>")
    text = named.get("te", weights[0] if weights else "1")
    unet = named.get("unet", weights[1] if len(weights) > 1 else text)
    try:
        return LoraRef.model_validate({"path": name.strip(), "unet_weight": unet, "text_weight": text})
    except ValidationError as error:
        raise UsageError(f"<lora:{inner}>: {first_problem(error)}") from None


def _is_name(path: str) -> bool:
    return Path(path).name == path != ".." and not path.endswith((".safetensors", *PICKLE_SUFFIXES))


def _by_name(path: str, folder: Path | None) -> Path | None:
    """The LoRA of that name in the folder, or None; `path` may be anything, and nothing outside is looked at."""
    root = folder or user_lora_folder()
    named = (root / f"{path}.safetensors", root / path) if _is_name(path) else ()
    return next((found for found in named if os.path.exists(found)), None)


def _not_found(name: str, folder: Path | None) -> str:
    root = folder or user_lora_folder()
    names = sorted(path.name.removesuffix(".safetensors") for path in root.glob("*")) if root.is_dir() else []
    return f"no LoRA {name!r} in {root}{did_you_mean(name, names)}"
