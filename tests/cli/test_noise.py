"""`sdcli noise`: the forward process against diffusers' parts, with and without a VAE, and how the command ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from sdcli.errors import BadImage, NotFound, UsageError
from sdcli.generation.forward_process import ForwardProcess
from sdcli.generation.settings import RunSettings
from sdcli.images.contact_sheet import GAP, KEY, LABEL_WIDTH, LINE_HEIGHT
from sdcli.images.pixels import from_pixels, to_pixels
from sdcli.io.files import AlreadyExists
from sdcli.models.registry import spec_of_folder
from sdcli.training.plot import draw_schedule
from tests.generation.test_encode_decode import draw, good, run

SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
    "zero snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in `tmp_path`; matplotlib's list of fonts is made once for all tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path_factory.getbasetemp() / "matplotlib"))


def pixel_model(*, channels: int = 3, schedule: Mapping[str, Any] = SCHEDULES["linear"]) -> Path:
    unet = UNet2DModel(
        sample_size=20, in_channels=channels, out_channels=channels, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(**schedule)).save_pretrained("pixels")
    return Path("pixels")


def process_of(folder: Path) -> ForwardProcess:
    return ForwardProcess.of(spec_of_folder(folder), RunSettings(device="cpu"))


def cells(path: str, count: int, side: int, shown: int) -> list[np.ndarray]:
    """The images of a strip of one row, without their labels, each `side` pixels wide and shown `shown` wide."""
    strip = Image.open(path).convert("RGB")
    width = max(shown, LABEL_WIDTH)
    assert strip.size == (GAP + count * (width + GAP), GAP + shown + 3 * LINE_HEIGHT + GAP)
    lefts = [GAP + k * (width + GAP) + (width - shown) // 2 for k in range(count)]
    step = shown // side
    return [np.asarray(strip.crop((left, GAP, left + shown, GAP + shown)))[::step, ::step] for left in lefts]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_noised_image_is_that_of_diffusers_bit_for_bit(schedule: Mapping[str, Any]) -> None:
    scheduler = DDPMScheduler(**schedule)
    process = process_of(pixel_model(schedule=schedule))
    x0 = to_pixels(Image.open(draw(Path("a.png"), size=(20, 20)))) * 2 - 1
    timesteps = list(range(len(process)))
    noise = torch.randn((1, 3, 20, 20), generator=torch.Generator().manual_seed(7))
    expected = scheduler.add_noise(x0[None].expand(len(process), -1, -1, -1), noise, torch.tensor(timesteps))
    assert torch.equal(process.noised(x0, timesteps, seed=7), expected)
    assert not torch.equal(process.noised(x0, timesteps, seed=8), expected)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_numbers_are_those_of_diffusers(schedule: Mapping[str, Any]) -> None:
    scheduler = DDPMScheduler(**schedule)
    process = process_of(pixel_model(schedule=schedule))
    assert len(process) == scheduler.config.num_train_timesteps
    for t in process.spread(7):
        level, alpha_bar = process.level(t), scheduler.alphas_cumprod[t].item()
        assert (level.t, level.beta, level.alpha_bar) == (t, scheduler.betas[t].item(), alpha_bar)
        assert 10 ** (level.snr_db / 10) == pytest.approx(alpha_bar / (1 - alpha_bar), rel=1e-6)


def test_timesteps_are_spread_from_the_first_to_the_last() -> None:
    process = process_of(pixel_model())
    assert process.spread(5) == [0, 250, 500, 749, 999]
    assert process.spread(1) == [0]
    assert process.spread(1000) == list(range(1000))


@pytest.mark.parametrize("shift", [None, 3.0])
@torch.inference_mode()
def test_the_strip_shows_what_diffusers_parts_make(tiny_folder: Path, shift: float | None) -> None:
    draw(Path("a.png"), size=(64, 64))
    shutil.copytree(tiny_folder, "shifted")
    vae = AutoencoderKL.from_pretrained("shifted/vae").eval()
    vae.register_to_config(shift_factor=shift)
    vae.save_pretrained("shifted/vae")
    (facts,) = run("noise", "a.png", "-m", "./shifted", "--at", "0,300,999", "-o", "strip.png", "--json").json
    scheduler = DDPMScheduler.from_pretrained("shifted/scheduler")
    pixels = to_pixels(Image.open("a.png"))[None]
    # as VaeImageProcessor's users in diffusers do it, such as StableDiffusion3Img2ImgPipeline.prepare_latents
    latents = (vae.encode(pixels * 2 - 1).latent_dist.mean - (shift or 0)) * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    for cell, t in zip(cells("strip.png", 3, 64, 64), (0, 300, 999), strict=True):
        x_t = scheduler.add_noise(latents, noise, torch.tensor([t]))
        decoded = vae.decode(x_t / vae.config.scaling_factor + (shift or 0)).sample / 2 + 0.5
        expected = np.asarray(from_pixels(decoded.clamp(0, 1)[0]), dtype=int)
        assert np.abs(cell - expected).max() <= 1
    assert [level["t"] for level in facts["levels"]] == [0, 300, 999]
    assert (facts["width"], facts["height"], facts["seed"], facts["timesteps"]) == (64, 64, 0, 1000)
    with Image.open("strip.png") as strip:
        on_it = json.loads(strip.text[KEY])  # type: ignore[attr-defined]
    assert (on_it["picture"], on_it["levels"]) == ("a.png", facts["levels"])


@pytest.mark.parametrize("channels", [1, 3])
def test_models_without_a_vae_noise_the_pixels(channels: int) -> None:
    image = Image.open(draw(Path("a.png"), size=(20, 20)))
    folder = pixel_model(channels=channels, schedule=SCHEDULES["zero snr"])
    (facts,) = run("noise", "a.png", "-m", folder, "--at", "0,200,999", "--seed", "5", "-o", "s.png", "--json").json
    x0 = to_pixels(image) * 2 - 1
    x0 = x0.mean(dim=0, keepdim=True) if channels == 1 else x0
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    scheduler = DDPMScheduler(**SCHEDULES["zero snr"])
    for cell, t in zip(cells("s.png", 3, 20, 60), (0, 200, 999), strict=True):
        x_t = scheduler.add_noise(x0, noise, torch.tensor(t))
        expected = from_pixels((x_t / 2 + 0.5).clamp(0, 1).expand(3, -1, -1))
        assert np.abs(cell - np.asarray(expected, dtype=int)).max() <= 1
    assert facts["levels"][-1] == {"t": 999, "beta": 1.0, "alpha_bar": 0.0, "snr_db": None}


def test_the_image_is_brought_to_the_models_own_size() -> None:
    process = process_of(pixel_model())
    wide = Image.open(draw(Path("wide.png"), size=(60, 30)))
    assert process.fitted(wide).size == (20, 20)
    same = Image.open(draw(Path("same.png"), size=(20, 20)))
    assert process.fitted(same).tobytes() == same.tobytes()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_curves_are_those_of_the_schedule(schedule: Mapping[str, Any]) -> None:
    scheduler = DDPMScheduler(**schedule)
    betas, alphas_cumprod = scheduler.betas.numpy(), scheduler.alphas_cumprod.numpy()
    figure = draw_schedule(betas, alphas_cumprod, name="$x", marked=[0, 20])
    beta, signal, snr = figure.axes
    assert np.array_equal(beta.lines[0].get_ydata(), betas)
    assert np.array_equal(signal.lines[0].get_ydata(), alphas_cumprod)
    drawn = np.asarray(snr.lines[0].get_ydata())
    finite = np.isfinite(drawn)
    assert np.array_equal(finite, alphas_cumprod > 0)
    assert (np.diff(drawn[finite]) < 0).all()
    for axes in figure.axes:
        low, high = axes.get_ylim()
        values = np.asarray(axes.lines[0].get_ydata())
        assert low < np.nanmin(values) <= np.nanmax(values) < high
        assert list(axes.lines[1].get_xdata()) == [0, 20]


def test_strip_and_curves_are_written_and_their_paths_printed() -> None:
    folder = pixel_model(schedule=SCHEDULES["cosine"])
    draw(Path("a.png"))
    assert good("noise", "a.png", "-m", folder, "-o", "s.png", "--steps", "3", "--curves", "c.svg") == [
        "s.png",
        "c.svg",
    ]
    first = Path("s.png").read_bytes(), Path("c.svg").read_bytes()
    assert b"<svg" in first[1]
    good("noise", "a.png", "-m", folder, "-o", "s.png", "--at", "0,24,49", "--curves", "c.svg", "--overwrite")
    assert (Path("s.png").read_bytes(), Path("c.svg").read_bytes()) == first
    assert isinstance(run("noise", "a.png", "-m", folder, "-o", "s.png").error, AlreadyExists)
    assert isinstance(run("noise", "a.png", "-m", folder, "-o", "n.png", "--curves", "c.svg").error, AlreadyExists)
    (facts,) = run("noise", "a.png", "-m", folder, "-o", "n.png", "--json").json
    assert (len(facts["levels"]), facts["levels"][-1]["t"], facts["curves"]) == (8, 49, None)


def test_each_wrong_wish_is_refused_with_its_sentence() -> None:
    folder = pixel_model()
    draw(Path("a.png"))
    Path("text.png").write_text("hello")
    cases = [
        (["a.png", "--at", "0,1000"], UsageError, "1000 is not a timestep of pixels: they are 0 to 999"),
        (["a.png", "--steps", "1001"], UsageError, "those of pixels are 0 to 999"),
        (["a.png", "--at", "-1"], UsageError, "--at takes timesteps"),
        (["a.png", "--at", "1,"], UsageError, "--at takes timesteps"),
        (["a.png", "--at", "1", "--steps", "1"], UsageError, "either --at or --steps"),
        (["a.png", "--curves", "c.gif"], UsageError, "should end in .png, .svg, .pdf"),
        (["a.png", "--curves", "s.png"], UsageError, "name the same file"),
        (["a.png", "-o", "s.jpg"], UsageError, "should end in .png"),
        (["absent.png"], NotFound, "no file absent.png"),
        (["text.png"], BadImage, "text.png"),
    ]
    for arguments, error, sentence in cases:
        outcome = run("noise", "-m", folder, "-o", "s.png", *arguments)
        assert type(outcome.error) is error, arguments
        assert sentence in str(outcome.error)
        assert outcome.out == []
    assert not Path("s.png").exists()
