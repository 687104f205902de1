"""Digests of what a run starts from, so that a resumed run may find the same in another place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sdcli.io.files import sha256
from sdcli.models.loaded_model import LoadedModel

SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "shift",
    "use_dynamic_shifting",
)


def origin(
    models: Mapping[str, LoadedModel | None],
    facts: Mapping[str, Any],
    files: Mapping[str, Path] | None = None,
    *,
    replaced: Collection[str] = (),
) -> dict[str, str]:
    """The digests of models (of each of their loaded parts), of JSON facts, and of files or folders, by their names.

    `replaced` are the parts of the model that every checkpoint has whole: what they began with no longer matters. A
    fact that is None is left out. The facts must not depend on the version of a library.
    """
    digests = {
        f"{name} ({part})" if name == "model" else name: _short(model.identity(_part(name, part)))
        for name, model in models.items()
        if model is not None
        for part in (sorted({*model.parts} - {*replaced}) if name == "model" else [name])
    }
    digests |= {
        name: _short(json.dumps(value, sort_keys=True, default=str))
        for name, value in facts.items()
        if value is not None
    }
    for name, path in (files or {}).items():
        found = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        digests[name] = _short(" ".join(sha256(one) for one in found))
    return digests


def schedule_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a scheduler's configuration the noise of training depends on."""
    return {key: config[key] for key in SCHEDULE_KEYS if config.get(key) is not None}


def _part(name: str, part: str) -> str:
    return part if name == "model" else name.replace(" ", "_")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
