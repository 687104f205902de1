"""A script for any version of diffusers: load a run and the LoRA files of another, and write what came of them.

    python read_with_diffusers.py BASE_RUN LORA_RUN OUT.safetensors

OUT holds the text states of "a red fox" and an output of the UNet, by BASE_RUN alone (`plain.`) and with each of
LORA_RUN's two LoRA files (`diffusers.`, `kohya.`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel

FILES = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "lora_kohya.safetensors"}


@torch.no_grad()
def outputs(pipeline: Any, name: str) -> dict[str, torch.Tensor]:
    options: Any = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
    ids = pipeline.tokenizer("a red fox", **options).input_ids
    states = pipeline.text_encoder.eval()(ids)[0]
    return {f"{name}.text": states, f"{name}.unet": pipeline.unet.eval()(noisy(), torch.tensor([500]), states)[0]}


def noisy() -> torch.Tensor:
    return torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)


def main(base: Path, lora: Path, out: Path) -> None:
    _, loading = CLIPTextModel.from_pretrained(base / "text_encoder", output_loading_info=True)
    assert not loading["missing_keys"], loading
    found = outputs(StableDiffusionPipeline.from_pretrained(base), "plain")
    for name, file in FILES.items():
        pipeline = StableDiffusionPipeline.from_pretrained(base)
        pipeline.load_lora_weights(lora / "current", weight_name=file)
        found |= outputs(pipeline, name)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
