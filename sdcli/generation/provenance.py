"""The facts of a run that go into an image's record: versions, weights, device. No times, so that bytes repeat."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

import sdcli
from sdcli.diffusion.pipeline import Pipeline
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.models.loaded_model import AppliedLora
from sdcli.request.lora_tags import lora_name


def provenance(pipeline: Pipeline, **facts: Any) -> dict[str, Any]:
    """The facts of a pipeline, JSON-ready, with more `facts` of one image."""
    model = pipeline.model
    return {
        "sdcli": sdcli.__version__,
        "model": model.spec.name,
        "origin": model.spec.origin(),
        "weights": pipeline.weights(),
        **({"loras": [_lora_facts(one) for one in model.loras]} if model.loras else {}),
        "torch": torch.__version__,
        "diffusers": importlib.metadata.version("diffusers"),
        "device": model.device.type,
        "hardware": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine(),
        "dtype": str(model.dtype).removeprefix("torch."),
        **({"attention": model.attention} if model.attention else {}),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()},
    }


def preset_facts(job: ResolvedJob) -> dict[str, str]:
    """The name of the model's few-step preset, where the request of a job is one of it."""
    preset = job.model.fast
    return {} if preset is None or not preset.is_in(job.request) else {"fast": preset.name}


def _lora_facts(lora: AppliedLora) -> dict[str, Any]:
    return {
        "name": lora_name(lora.ref),
        "sha256": lora.ref.sha256,
        "tensors_sha256": lora.tensors_sha256,
        "layers": lora.layers,
        "unmatched": len(lora.unmatched),
    }
