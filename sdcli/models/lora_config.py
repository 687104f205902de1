"""How strong a LoRA is: PEFT's adapter_config.json, the metadata that diffusers writes, and alpha tensors.

    dialect      where alpha is
    kohya        a tensor `.alpha` for each layer; without it alpha is the rank, whatever `ss_network_alpha` says
    diffusers    `lora_adapter_metadata` in the header, the LoraConfig of each part; without it alpha is the rank
    peft         adapter_config.json in the folder, beside a file that is given by its own name too

alpha / rank is what the product of the two matrices is multiplied by; with rsLoRA (Kalajdzievski 2023, arXiv
2312.03732) it is alpha / sqrt(rank).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.errors import BadWeights, UsageError
from sdcli.io.json_files import parse_json, read_json_object
from sdcli.models.adapter_files import ADAPTER_CONFIG, PEFT_PREFIX, adapter_config

PEFT_ALPHA = 8
"""What LoraConfig has where a configuration does not give it."""
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "an activated LoRA (aLoRA)",
    "fan_in_fan_out": "for transposed layers",
    "layer_replication": "a LoRA that repeats layers (layer_replication)",
    "lora_bias": "a LoRA with a bias of its own (lora_bias)",
    "target_parameters": "a LoRA of parameters (target_parameters)",
}
"""Settings of PEFT that make of a LoRA something else -> its name."""
_EXPRESSION = re.compile(r"[\[\](){}*+?|\\$]")


@dataclass(frozen=True)
class Scales:
    """The LoraConfig of each part of a file, and what should be noted about its strength."""

    configs: Mapping[str, Mapping[str, Any]]
    """By what the names begin with: `unet.`, `text_encoder.`, or nothing."""
    notes: tuple[str, ...] = ()

    def scale(self, what: str, name: str, *, rank: int, alpha: float | None) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA; without any alpha it is the rank. Raises BadWeights."""
        prefix = next((prefix for prefix in self.configs if name.startswith(prefix)), None)
        config = self.configs[prefix] if prefix is not None else {}
        bare = name.removeprefix(prefix or "").removeprefix(PEFT_PREFIX)
        _check_rank(what, bare, config, rank)
        value = config.get("lora_alpha", PEFT_ALPHA if config else None)
        value = _special(_mapping(config.get("alpha_pattern")), bare, value)
        number = alpha if alpha is not None else rank if value is None else value
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise BadWeights(f"{what} has the alpha {number!r}, which is not a number")
        return number / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_scales(path: Path, metadata: Mapping[str, Any], names: Iterable[str]) -> Scales:
    """The configurations for a file or folder with this metadata and these names of tensors.

    Raises BadWeights for a configuration that cannot be read, UsageError for one of another kind.
    """
    names = list(names)
    peft = any(name.startswith(PEFT_PREFIX) for name in names)
    alphas = any(name.endswith(".alpha") for name in names)
    notes: list[str] = []
    if (beside := adapter_config(path)) is not None:
        configs: dict[str, Mapping[str, Any]] = {"": read_json_object(beside)}
    else:
        configs = _in_header(path, metadata)
        if peft and not configs and not alphas:
            notes.append(f"no {ADAPTER_CONFIG} is beside it, so alpha is taken to be the rank")
    stated = str(metadata.get("ss_network_alpha", ""))[:20]
    if stated and not configs and not alphas and stated != str(metadata.get("ss_network_dim")):
        notes.append(f"ss_network_alpha {stated} of its header is not taken over: no layer has an alpha")
    for config in configs.values():
        _check(path, config)
    return Scales(configs, tuple(notes))


def _in_header(path: Path, metadata: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    try:
        flat = parse_json(metadata.get("lora_adapter_metadata", "{}"))
    except (TypeError, ValueError):
        raise BadWeights(f"{path} has a lora_adapter_metadata that is not JSON") from None
    configs: dict[str, dict[str, Any]] = {}
    for key, value in _mapping(flat).items():
        part, _, name = key.partition(".")
        configs.setdefault(f"{part}.", {})[name] = value
    return dict(configs)


def _check(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type") or "LORA"
    special = next((what for name, what in _REFUSED.items() if config.get(name)), None)
    if kind != "LORA" or special is not None:
        what = str(kind)[:40] if kind != "LORA" else special
        raise UsageError(f"{path} is {what}, which sdcli cannot merge; it takes LoRAs")
    for pattern in _mapping(config.get("alpha_pattern")):
        if _EXPRESSION.search(pattern):
            raise UsageError(f"{path}: its alpha_pattern {pattern[:80]!r} is an expression, not a name")


def _check_rank(what: str, bare: str, config: Mapping[str, Any], rank: int) -> None:
    """Raise BadWeights for a configuration of another adapter, which would give the strength of that one."""
    patterns = _mapping(config.get("rank_pattern"))
    wanted = _special(patterns, bare, config.get("r"))
    if type(wanted) is int and wanted != rank and not any(map(_EXPRESSION.search, patterns)):
        raise BadWeights(f"{what} has the rank {rank}, and its configuration says {wanted}; it is of another adapter")


def _special(patterns: Mapping[str, Any], bare: str, usual: Any) -> Any:
    """The value for a layer: that of the first pattern that is its name or the end of it, as in PEFT."""
    name = bare.removeprefix("text_model.")
    for pattern, value in patterns.items():
        wanted = pattern.removeprefix("^").removeprefix("text_model.")
        if name == wanted or (not pattern.startswith("^") and name.endswith(f".{wanted}")):
            return value
    return usual


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
