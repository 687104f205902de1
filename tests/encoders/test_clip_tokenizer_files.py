"""The CLIP tokenizer and the Stable Diffusion 1.5 configuration that ship with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PACKAGE = Path(__file__).resolve().parents[2] / "sdcli"
START, END = 49406, 49407

# Ids of OpenAI's CLIP, as published with its examples and used by every Stable Diffusion 1.x.
GOLDEN = {
    "": [],
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a diagram": [320, 22697],
    "a dog": [320, 1929],
    "a cat": [320, 2368],
    "an astronaut riding a horse": [550, 18376, 6765, 320, 4558],
    "  An   ASTRONAUT\n riding a horse ": [550, 18376, 6765, 320, 4558],
}


@pytest.fixture(scope="module")
def shipped() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(PACKAGE / "encoders/clip_tokenizer" / "tokenizer.json"))


@pytest.fixture(scope="module")
def oracle() -> Any:
    """transformers' CLIPTokenizer, built from nothing but the vocabulary and the merges."""
    from transformers import CLIPTokenizer

    model = json.loads((PACKAGE / "encoders/clip_tokenizer" / "tokenizer.json").read_text())["model"]
    return CLIPTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=77)


@pytest.mark.parametrize("prompt", GOLDEN)
def test_prompts_get_the_ids_that_clip_was_trained_with(shipped: Any, prompt: str) -> None:
    assert shipped.encode(prompt).ids == [START, *GOLDEN[prompt], END]


def test_transformers_loads_the_folder_as_a_clip_tokenizer_of_77_tokens() -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(PACKAGE / "encoders/clip_tokenizer", local_files_only=True)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (START, END, END)
    assert (tokenizer.model_max_length, len(tokenizer)) == (77, 49408)
    padded = tokenizer(["a cat", "cat " * 200], padding="max_length", truncation=True, max_length=77).input_ids
    assert [len(ids) for ids in padded] == [77, 77]
    assert padded[0] == [START, *GOLDEN["a cat"], *[END] * 74]
    assert padded[1] == [START, *[2368] * 75, END]


@given(st.text() | st.text("abcdefghij klmnopqrst'uvwxyz0123456789,.!?ÄÖéß\t\n", max_size=200))
@settings(max_examples=300)
def test_any_text_gets_the_ids_of_transformers_clip_tokenizer(shipped: Any, oracle: Any, text: str) -> None:
    assert shipped.encode(text).ids == oracle(text).input_ids


def test_the_vocabulary_is_whole_and_every_merge_makes_a_token() -> None:
    model = json.loads((PACKAGE / "encoders/clip_tokenizer" / "tokenizer.json").read_text())["model"]
    vocabulary, merges = model["vocab"], model["merges"]
    assert sorted(vocabulary.values()) == list(range(49408))
    assert len(merges) == 49408 - 2 * 256 - 2
    assert [vocabulary["".join(pair)] for pair in merges] == list(range(512, 49406))


def test_the_configuration_is_that_of_stable_diffusion_1_5_to_the_last_parameter() -> None:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def config(part: str) -> Any:
        return json.loads((PACKAGE / "models/families/configs/sd1" / part / "config.json").read_text())

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config("unet"))
        vae = AutoencoderKL.from_config(config("vae"))
        text_encoder = CLIPTextModel(CLIPTextConfig(**config("text_encoder")))
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (unet, vae, text_encoder)]
    assert sizes == [859_520_964, 83_653_863, 123_060_480]
    assert vae.config.scaling_factor == 0.18215


def test_the_noise_schedule_is_that_of_stable_diffusion_1_5() -> None:
    from diffusers.schedulers.scheduling_pndm import PNDMScheduler

    scheduler = PNDMScheduler.from_pretrained(
        PACKAGE / "models/families/configs/sd1" / "scheduler", local_files_only=True
    )
    alphas_cumprod = scheduler.alphas_cumprod
    # sigma at the two ends of training, as every Stable Diffusion 1.x tool prints them: 0.0292 and 14.6146
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
    assert (round(sigmas[0].item(), 4), round(sigmas[-1].item(), 4)) == (0.0292, 14.6146)
    expected = {"steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True, "prediction_type": "epsilon"}
    assert {name: scheduler.config[name] for name in expected} == expected
