"""`generate --trace`: the guess of x_0 against diffusers' own, and files beside an image that they do not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from sdcli.diffusion.loop import denoise
from sdcli.diffusion.noise_schedule import NoiseSchedule
from sdcli.diffusion.predict import scale_input
from sdcli.diffusion.sampling import sample as sample
from sdcli.diffusion.scheduler_factory import make_scheduler
from sdcli.diffusion.timesteps import last_timesteps
from sdcli.diffusion.x0_prediction import x0_of, x0_predictor, x_t_and_x0
from sdcli.errors import UsageError
from sdcli.generation.observers.trace_images import chosen
from sdcli.generation.settings import TraceSettings
from sdcli.images.contact_sheet import GAP, KEY, LABEL_WIDTH
from sdcli.io.files import AlreadyExists
from sdcli.models.registry import load_registry
from tests.generation.test_encode_decode import (
    _here,  # noqa: F401
    draw,
    good,
    run,
)
from tests.generation.test_service import jobs_of
from tests.schedulers import DIFFUSION_SCHEDULERS
from tests.service import cache_of, pipeline_for
from tests.tiny import save_tiny_sdxl

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}


def network(x: Tensor, t: Tensor) -> Tensor:
    """Some function of x and t."""
    return torch.sin(3 * x) + t.float() / 1000


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", DIFFUSION_SCHEDULERS)
def test_the_guess_is_that_of_the_scheduler_itself(name: str, prediction: str, strength: float) -> None:
    if prediction == "sample" and name.startswith(("euler", "heun", "pndm")):
        prediction = "epsilon"  # diffusers has no such scheduler
    config = {**SD, "prediction_type": prediction}
    scheduler = make_scheduler(name, config)
    scheduler.set_timesteps(6)
    timesteps = last_timesteps(scheduler, strength)
    theirs: list[Tensor] = []

    def advance(output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        if hasattr(scheduler, "convert_model_output"):
            if scheduler.step_index is None:
                scheduler._init_step_index(t)
            theirs.append(scheduler.convert_model_output(output, sample=x))
        after = scheduler.step(output, t, x)
        if name == "lcm":  # a mixture of the guess and x_t
            skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t)
            theirs.append((after.denoised - skip * x) / out)
        elif hasattr(after, "pred_original_sample"):
            theirs.append(after.pred_original_sample)
        elif name == "pndm":  # says nothing of it; here the trainer's formula is the oracle
            schedule = NoiseSchedule.from_config(config)
            signal, noise = schedule.signal_and_noise(t.long()[None], x)
            theirs.append(x0_of(schedule.prediction_type, output, x, signal, noise))
        return after.prev_sample

    x = torch.randn((2, 4, 5, 5), generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    again = make_scheduler(name, config)
    again.set_timesteps(6)
    for step in denoise(scale_input(network, scheduler), advance, x, timesteps):
        seen, guess = x_t_and_x0(again, step)
        torch.testing.assert_close(guess, theirs[-1], rtol=1e-4, atol=1e-4 * float(theirs[-1].abs().max()))
        torch.testing.assert_close(network(seen, step.t), step.output, rtol=1e-4, atol=1e-4)
    assert len(theirs) == len(timesteps)


@pytest.mark.slow
def test_the_last_guess_of_a_refiner_is_what_euler_ends_with() -> None:
    base, refiner = save_tiny_sdxl(Path("base")), save_tiny_sdxl(Path("refiner"), refiner=True)
    registry = load_registry()
    fields = {"model": str(base), "refiner": str(refiner), "refiner_start": 0.5, "steps": 4, "scheduler": "euler"}
    (job,) = jobs_of(registry, "a cat", seed=1, width=64, height=64, **fields)
    pipeline = pipeline_for(cache_of(), job.request)
    guesses = x0_predictor(pipeline, job.request)
    for step in sample(pipeline, [job.request]):
        seen, guess = guesses(step)
        assert seen.isfinite().all()
    torch.testing.assert_close(guess, step.latents, rtol=1e-4, atol=1e-4)


def test_an_epsilon_without_any_signal_says_nothing() -> None:
    scheduler = make_scheduler("ddim", {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    scheduler.set_timesteps(2)
    x = torch.randn((1, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    first = next(denoise(network, lambda output, t, x: x, x, scheduler.timesteps))
    assert x_t_and_x0(scheduler, first)[1].isfinite().all()


def test_steps_are_spread_from_the_first_to_the_last() -> None:
    assert chosen(3, 20) == {1, 10, 20} or chosen(3, 20) == {1, 11, 20}
    assert chosen(1, 20) == {1}
    assert chosen(50, 4) == chosen(None, 4) == {1, 2, 3, 4}
    assert chosen((2, 9), 4) == {2}
    for count in range(1, 40):
        for steps in range(2, count + 1):
            assert len(chosen(steps, count)) == steps
            assert {1, count} <= chosen(steps, count)


@pytest.mark.parametrize("text", ["", "0", "a cat", "3,0", "1.5", "-2", ",", "1,,2", "٣"])
def test_what_is_no_list_of_steps_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--trace takes"):
        TraceSettings.of(text, "webp")


def results(*arguments: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in good("generate", *arguments, "--json", "--batch-size", "2", "-m", "tiny")]


@pytest.mark.slow
def test_an_image_is_the_same_with_a_trace(tmp_path: Path) -> None:
    job = ["a cat", "-n", "2", "--seed", "3", "--steps", "3", "--scheduler", "euler-a", "--upscale", "1.5x"]
    results(*job, "-o", "plain/{index}")
    for form, steps, frames in (("apng", "3", 4), ("gif", "all", 4), ("webp", "1,2", 3)):  # the second pass has one
        pair = results(*job, "-o", f"{form}/{{index}}", "--trace", steps, "--trace-format", form)
        for number, result in enumerate(pair, start=1):
            strip, moving = (tmp_path / path for path in result["beside"])
            assert (strip.name, moving.name) == (f"{number}.trace.png", f"{number}.trace.{form}")
            assert Path(result["path"]).read_bytes() == Path(f"plain/{number}.png").read_bytes()
            with Image.open(strip) as sheet, Image.open(moving) as frame:
                said = json.loads(sheet.info[KEY])["steps"]  # type: ignore[union-attr]
                assert getattr(frame, "n_frames", 1) == len(said) == frames
                assert [step["second_pass"] for step in said] == [False] * (frames - 1) + [True]
    first, second = (Image.open(f"apng/{number}.trace.png").tobytes() for number in (1, 2))
    assert first != second


def test_masks_and_start_images_have_traces(tmp_path: Path) -> None:
    draw(Path("start.png"), size=(64, 64))
    draw(Path("mask.png"), seed=1, size=(64, 64))
    job = [
        "a cat",
        "--seed",
        "3",
        "--steps",
        "4",
        "--init-image",
        "start.png",
        "--mask",
        "mask.png",
        "--strength",
        "0.5",
    ]
    (plain,) = results(*job, "-o", "plain.png")
    (traced,) = results(*job, "-o", "traced.png", "--trace", "all")
    assert Path(plain["path"]).read_bytes() == Path(traced["path"]).read_bytes()
    with Image.open(traced["beside"][0]) as sheet:
        assert [step["of"] for step in json.loads(sheet.info[KEY])["steps"]] == [2, 2]  # type: ignore[index]


def test_the_last_guess_of_a_pixel_model_is_its_image() -> None:
    unet = UNet2DModel(
        sample_size=32, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained("pixels")
    line = good(
        "generate", "-m", "pixels", "--seed", "1", "--steps", "5", "--scheduler", "ddim", "--trace", "5", "--json"
    )
    result = json.loads(line[0])
    image = np.asarray(Image.open(result["path"]).convert("RGB")).astype(int)
    strip = Image.open(result["beside"][0])
    left = GAP + 4 * (LABEL_WIDTH + GAP) + (LABEL_WIDTH - 64) // 2
    top = strip.height // 2
    row = np.asarray(strip)[:, left : left + 64].astype(int)
    shown = row[top + GAP // 2 : top + GAP // 2 + 64]
    assert np.abs(shown[::2, ::2] - image).max() <= 1


@pytest.mark.slow
def test_a_resumed_run_adds_what_is_missing_beside_finished_images(tmp_path: Path) -> None:
    Path("jobs.txt").write_text("a cat\na dog\n")
    plain = results("--prompts-file", "jobs.txt", "-o", "{index}.png")
    before = [Path(result["path"]).read_bytes() for result in plain]
    traced = results("--prompts-file", "jobs.txt", "-o", "{index}.png", "--resume", "--trace", "2")
    assert [result["status"] for result in traced] == ["done", "done"]
    assert [result["path"] for result in traced] == [result["path"] for result in plain]
    Path(traced[1]["beside"][1]).unlink()
    third = results("--prompts-file", "jobs.txt", "-o", "{index}.png", "--resume", "--trace", "2")
    assert [result["status"] for result in third] == ["skipped", "done"]
    assert third[0]["beside"] == traced[0]["beside"]
    assert [Path(result["path"]).read_bytes() for result in third] == before
    assert len(list(tmp_path.glob("*.png"))) == 4


@pytest.mark.slow
def test_a_taken_name_beside_an_image_is_kept() -> None:
    draw(Path("cat.trace.png"))
    kept = Path("cat.trace.png").read_bytes()
    job = ["generate", "a cat", "-m", "tiny", "--steps", "1", "--trace", "1"]
    assert isinstance(run(*job, "-o", "cat.png").error, AlreadyExists)
    assert not Path("cat.png").exists()
    draw(Path("1.trace.png"))
    assert good(*job, "-o", "{index}.png") == ["1-2.png"]
    assert good(*job, "-o", "cat.png", "--overwrite") == ["cat.png"]
    assert Path("cat.trace.png").read_bytes() != kept


@pytest.mark.parametrize(
    "arguments",
    [["--trace", "1,9"], ["--trace-format", "gif"], ["--trace", "nine"]],
    ids=" ".join,
)
def test_a_trace_that_cannot_be_is_refused(arguments: list[str], tmp_path: Path) -> None:
    outcome = run("generate", "a cat", "-m", "tiny", "--steps", "2", *arguments)
    assert isinstance(outcome.error, UsageError)
    assert not list(tmp_path.rglob("*.png"))
