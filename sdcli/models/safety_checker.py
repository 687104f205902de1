"""The safety checker that some models ship: whether it flags a finished image.

The network is diffusers' `StableDiffusionSafetyChecker`, which would blacken what it flags; here its answer alone is
used. It runs on the CPU in float32, an image at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdcli.errors import BadWeights, first_line
from sdcli.images.pixels import to_pixels
from sdcli.io.json_files import read_json_object
from sdcli.io.lean_diffusers import full_imports
from sdcli.io.pickles import pickle_refused

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, where feature_extractor/preprocessor_config.json names no others."""


@dataclass(frozen=True)
class SafetyChecker:
    """A loaded checker with the side and the colours of the images it looks at."""

    network: Any
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.inference_mode()
    def flags(self, image: Image.Image) -> bool:
        """Whether the image shows what the checker was made to find."""
        scale = self.side / min(image.size)
        size = [max(self.side, round(length * scale)) for length in image.size]
        resized = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC)
        left, top = (resized.width - self.side) // 2, (resized.height - self.side) // 2
        pixels = to_pixels(resized.crop((left, top, left + self.side, top + self.side)))
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (self.mean, self.std))
        _, flagged = self.network(clip_input=((pixels - mean) / std)[None], images=[torch.zeros(1)])
        return bool(flagged[0])


def load_safety_checker(folder: Path) -> SafetyChecker | None:
    """The checker of a diffusers folder; None where it ships none, or the download left it out. Raises BadWeights."""
    index, checker = read_json_object(folder / "model_index.json"), folder / "safety_checker"
    if index.get("safety_checker") in (None, [None, None]) or not checker.is_dir():
        return None
    weights = sorted(path.name for path in checker.glob("*.safetensors"))
    if not weights and not list(checker.glob("*.bin")):
        return None
    try:
        if not weights:
            raise BadWeights(pickle_refused(sorted(checker.glob("*.bin"))[0]))
        with full_imports():
            from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        # model.safetensors, model.fp16.safetensors, or in parts: model-00001-of-00002.safetensors
        variants = [name.removesuffix(".safetensors").split("-")[0].partition(".")[2] for name in weights]
        network = StableDiffusionSafetyChecker.from_pretrained(
            checker,
            use_safetensors=True,
            local_files_only=True,
            dtype=torch.float32,
            variant=None if "" in variants else variants[0],
        )
        side = int(network.config.vision_config.image_size)
    except Exception as error:  # transformers fails in a dozen ways on damaged files
        raise BadWeights(f"{checker}: {first_line(error)}; --safety off generates without it") from None
    preprocessor = folder / "feature_extractor" / "preprocessor_config.json"
    stated = read_json_object(preprocessor) if preprocessor.is_file() else {}
    mean, std = tuple(stated.get("image_mean") or MEAN), tuple(stated.get("image_std") or STD)
    return SafetyChecker(network.eval(), side, mean, std)
