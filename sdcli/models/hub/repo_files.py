"""Which files of a repository a model needs: its weights as safetensors, and small files by their names alone."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdcli.errors import BadWeights, UsageError
from sdcli.io.files import megabytes
from sdcli.io.json_files import read_json_object
from sdcli.io.weight_files import shard_names
from sdcli.models.families import FAMILIES
from sdcli.models.registry import ControlNetSpec, ModelSpec
from sdcli.models.sources import HubSource

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "text_encoder_3": "model",
}
"""Component -> the stem of its weight files."""
CONTROLNET_WEIGHTS = "diffusion_pytorch_model"
"""The same of a ControlNet, whose repository is one network."""
_TOKENIZER = {
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
}
SIDE_FILES = {
    **{part: {"config.json"} for part in WEIGHTS},
    "tokenizer": _TOKENIZER,
    "tokenizer_2": _TOKENIZER,
    "tokenizer_3": _TOKENIZER - {"vocab.json", "merges.txt"},
    "scheduler": {"scheduler_config.json"},
}
"""Component -> the small files it may have; no other name is ever downloaded."""
CHECKER = "safety_checker"
CHECKER_SIDE_FILES = {f"{CHECKER}/config.json", "feature_extractor/preprocessor_config.json"}
"""What a safety checker has beside its weights; both are downloaded with it alone."""
MAX_SIDE_FILE_BYTES = 32 * 1024**2


def wanted_files(
    present: Mapping[str, int],
    *,
    variant: str | None,
    repo: str,
    parts: Iterable[str] = ("unet", "vae", "text_encoder"),
) -> list[str]:
    """Which of a repository's files (path -> bytes) to download for some `weighty_parts`, the small ones first.

    The safety checker may be one of the parts. Raises BadWeights.
    """
    parts = list(parts)
    checker = CHECKER_SIDE_FILES if CHECKER in parts else set()
    small = [
        path
        for path in sorted(present)
        if path == "model_index.json"
        or path.partition("/")[2] in SIDE_FILES.get(path.partition("/")[0], ())
        or path in checker
    ]
    if "model_index.json" not in small:
        single = [path for path in present if "/" not in path and path.endswith(".safetensors")]
        hint = f"; download {single[0]} yourself and give its path as the model" if single else ""
        raise BadWeights(f"{repo} is not in the diffusers layout: it has no model_index.json{hint}")
    weights: list[str] = []
    for part in parts:
        stem = f"{part}/{'model' if part == CHECKER else WEIGHTS[part]}"
        names = weight_files(present, stem, variant=variant)
        if not names:
            if any(path.startswith(f"{part}/") and path.endswith((".bin", ".ckpt", ".pt")) for path in present):
                raise BadWeights(
                    f"{repo} has its {part} only as a pickle, which can run any code when opened; sdcli downloads "
                    "safetensors only (look for a revision or another repository that has them)"
                )
            raise BadWeights(f"{repo} has no {stem}.safetensors")
        weights += names
    for path in small:
        if present[path] > MAX_SIDE_FILE_BYTES:
            raise BadWeights(f"{repo}: {path} has {megabytes(present[path])}, which no such file has")
    return small + [path for path in weights if path not in small]


def wanted_of_controlnet(present: Mapping[str, int], source: HubSource) -> list[str]:
    """Which files to download of a repository that is one network, with its config.json at the top."""
    weights = weight_files(present, CONTROLNET_WEIGHTS, variant=source.variant)
    if not weights:
        raise BadWeights(f"{source.repo} has no {CONTROLNET_WEIGHTS}.safetensors, as a ControlNet has")
    if present["config.json"] > MAX_SIDE_FILE_BYTES:
        raise BadWeights(f"{source.repo}: config.json has {megabytes(present['config.json'])}, which no such file has")
    return ["config.json", *weights]


def first_missing(folder: Path, spec: ModelSpec | ControlNetSpec) -> str | None:
    """The first file that a model's (or ControlNet's) folder lacks to be generated with, or None. Raises BadWeights."""
    present = {
        path.relative_to(folder).as_posix()
        for pattern in ("*", "*/*")
        for path in folder.glob(pattern)
        if path.is_file()
    }
    if isinstance(spec, ControlNetSpec):
        required, stems = ["config.json"], [CONTROLNET_WEIGHTS]
    elif "model_index.json" not in present:
        return "model_index.json"
    else:
        index: dict[str, Any] = {}
        with contextlib.suppress(BadWeights):  # loading reports it
            index = read_json_object(folder / "model_index.json")
        parts = weighty_parts(index)
        stems = [f"{part}/{WEIGHTS[part]}" for part in parts]
        required = [*(f"{part}/config.json" for part in parts), "scheduler/scheduler_config.json"]
        for tokenizer in (one.replace("text_encoder", "tokenizer") for one in parts if one.startswith("text_encoder")):
            if tokenizer == "tokenizer_3":
                required.append(f"{tokenizer}/tokenizer.json")
            elif f"{tokenizer}/tokenizer.json" not in present:
                required += [f"{tokenizer}/vocab.json", f"{tokenizer}/merges.txt"]
    for stem in stems:
        names = weight_files(present, stem, variant=getattr(spec.source, "variant", None))
        required += names or [f"{stem}.safetensors"]
        for listing in (name for name in names if name.endswith(".index.json")):
            below = stem.rpartition("/")[0]
            required += [f"{below}/{shard}".removeprefix("/") for shard in shard_names(folder / listing)]
    return next((file for file in required if file not in present), None)


def weighty_parts(model_index: Mapping[str, Any]) -> list[str]:
    """The components with weights: UNet or transformer, VAE, and the text encoders that are named, one at least.

    An SDXL refiner's `text_encoder` is [null, null].
    """
    named = [part for part in WEIGHTS if part.startswith("text") and model_index.get(part) not in (None, [None, None])]
    denoiser = "unet" if model_index.get("transformer") is None else "transformer"
    return [denoiser, "vae", *(named or ["text_encoder"])]


def weight_files(present: Iterable[str], stem: str, *, variant: str | None) -> list[str]:
    """The safetensors files of one network among repo paths: the variant's where it has them, else the plain ones.

    `stem` is what their names begin with: `unet/diffusion_pytorch_model`.
    """
    paths = sorted(present)
    for suffix in ([f".{variant}"] if variant else []) + [""]:
        whole = f"{stem}{suffix}.safetensors"
        if whole in paths:
            return [whole]
        # Two spellings of a sharded variant are in use: name.fp16-00001-of and name-00001-of...fp16.
        for index in (f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors.index.json"):
            if index in paths:
                shards = [
                    path
                    for path in paths
                    if fnmatch.fnmatchcase(path, f"{stem}{suffix}-?????-of-?????.safetensors")
                    or fnmatch.fnmatchcase(path, f"{stem}-?????-of-?????{suffix}.safetensors")
                ]
                return [index, *shards]
    return []


def require_generation(model_index: Mapping[str, Any], *, name: str) -> None:
    """Raise UsageError where model_index.json is of a pipeline that sdcli does not know."""
    pipeline = model_index.get("_class_name")
    known = sorted(one for family in FAMILIES.values() if family.reads_text for one in family.pipelines)
    if pipeline not in known:
        raise UsageError(
            f"model {name!r} is made for {pipeline or 'an unnamed pipeline'}, which is not supported "
            f"(supported: {', '.join(known)})"
        )
