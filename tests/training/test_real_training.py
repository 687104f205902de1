"""Training that really learns: scikit-learn's digits in pixel space, and a LoRA that takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdcli.training.events import StepMetrics, ValidationMetrics
from tests.conftest import Run
from tests.training_runs import train_unet

pytestmark = pytest.mark.slow

DIGITS_UNET = {
    "_class_name": "UNet2DModel", "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8, "layers_per_block": 1, "attention_head_dim": 16,
}  # fmt: skip


def digits(folder: Path, count: int = 600) -> Path:
    """scikit-learn's handwritten digits, 8x8 with values 0..16, as grey images."""
    from sklearn.datasets import load_digits

    folder.mkdir()
    for number, image in enumerate(load_digits().images[:count]):
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(folder / f"{number:04d}.png")
    return folder


def test_a_small_ddpm_learns_the_digits(tmp_path: Path, sdcli: Run) -> None:
    data = digits(tmp_path / "digits")
    (tmp_path / "config.json").write_text(json.dumps(DIGITS_UNET))
    run = tmp_path / "run"
    events = train_unet(
        data, run, space="pixel", from_scratch=str(tmp_path / "config.json"), resolution="8", unconditional=True,
        max_train_steps=300, train_batch_size=32, learning_rate=2e-3, lr_scheduler="cosine", use_ema=True,
        validation_split=0.1, validation_steps=100, random_flip=False,
    )  # fmt: skip
    curve = [event.figures["loss"] for event in events if isinstance(event, ValidationMetrics)]
    # Who always predicts zero noise has a loss of 1, the variance of the noise.
    assert curve[-1] < 0.2
    assert curve[-1] < curve[0]
    levels = next(event.figures for event in reversed(events) if isinstance(event, ValidationMetrics))
    assert levels["loss_level_3"] < levels["loss_level_0"], "noise is easiest to tell where there is most of it"

    painted = sdcli(
        "generate", "", "-m", run, "-n", "48", "--batch-size", "16", "--steps", "50", "--seed", "0",
        "--outdir", tmp_path / "painted", "-q",
    )  # fmt: skip
    assert painted.returncode == 0, painted.stderr
    samples, real = pixels_of(tmp_path / "painted"), pixels_of(data)
    assert len(samples) == 48
    assert samples.mean() == pytest.approx(real.mean(), abs=0.08)
    assert samples.std() == pytest.approx(real.std(), abs=0.12)
    # The borders of digits are empty and their middle is not; noise of that mean and deviation has no such shape.
    shape, wanted = samples.mean(axis=0), real.mean(axis=0)
    assert np.corrcoef(shape.ravel(), wanted.ravel())[0, 1] > 0.85


def pixels_of(folder: Path) -> np.ndarray:
    """[N, 8, 8] in 0..1."""
    return np.stack([np.asarray(Image.open(path).convert("L")) / 255 for path in sorted(folder.glob("*.png"))])


def discs(folder: Path, count: int = 4) -> Path:
    """Magenta discs on green, which the starter generates for no prompt."""
    folder.mkdir()
    rows, columns = np.mgrid[:64, :64]
    for number in range(count):
        inside = (rows - 28 - 3 * number) ** 2 + (columns - 32) ** 2 < (14 + 2 * number) ** 2
        pixels = np.where(inside[..., None], (230, 20, 200), (20, 160, 60)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("zorple disc\n")
    return folder


def test_a_lora_on_the_starter_takes(tmp_path: Path) -> None:
    data = discs(tmp_path / "discs")
    common: dict[str, Any] = {
        "model": "starter", "resolution": "64", "train_batch_size": 4, "caption_dropout": 0.0, "rank": 8,
        "validation_split": 0.0, "cache_dir": tmp_path / "cache",
    }  # fmt: skip
    train_unet(data, tmp_path / "before", max_train_steps=1, learning_rate=1e-12, **common)
    events = train_unet(data, tmp_path / "lora", max_train_steps=100, learning_rate=1e-3, **common)
    losses = [event.loss for event in events if isinstance(event, StepMetrics)]
    assert np.mean(losses[-25:]) < 0.5 * np.mean(losses[:10])
    before, after = loss_of(tmp_path / "before", data), loss_of(tmp_path / "lora", data)
    assert after < 0.5 * before


def loss_of(run: Path, data: Path) -> float:
    """The noise prediction's error of RUN, generated with as diffusers loads it, on fixed noise and noise levels."""
    from diffusers import StableDiffusionPipeline

    reference = StableDiffusionPipeline.from_pretrained(run, torch_dtype=torch.float32)  # some parts are stored in half
    scheduler = reference.scheduler
    files = sorted(data.glob("*.png"))
    pixels = torch.stack([torch.tensor(np.asarray(Image.open(file).resize((64, 64)))) for file in files])
    template = json.loads((run / "sdcli.json").read_text())["defaults"].get("prompt_template") or "{prompt}"
    prompts = [template.replace("{prompt}", file.with_suffix(".txt").read_text().strip()) for file in files]
    noise_of = torch.Generator().manual_seed(123)
    errors = []
    with torch.no_grad():
        encoded = reference.vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
        latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        latents = latents * reference.vae.config.scaling_factor
        hidden, _ = reference.encode_prompt(prompts, "cpu", 1, False)
        for t in range(50, 1000, 100):
            noise = torch.randn(latents.shape, generator=noise_of)
            times = torch.full((len(files),), t)
            noised = scheduler.add_noise(latents, noise, times)
            output = reference.unet(noised, times, encoder_hidden_states=hidden).sample
            if scheduler.config.prediction_type == "v_prediction":
                target = scheduler.get_velocity(latents, noise, times)
            else:
                target = noise
            errors.append(float((output - target).square().mean()))
    return float(np.mean(errors))
