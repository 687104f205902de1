"""Noise schedules and the forward process, compared with the closed forms of the papers and with diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sdcli.diffusion.noise_schedule import PREDICTIONS, NoiseSchedule, add_noise, schedule_config
from sdcli.errors import BadWeights, UsageError
from sdcli.io import rng

LINEAR: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
SCALED: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
ZERO: dict[str, Any] = {**SCALED, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SCHEDULES = {"linear": LINEAR, "scaled": SCALED, "cosine": COSINE, "zero-snr": ZERO}
every_schedule = pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def of(config: Mapping[str, Any], **changes: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config({**config, **changes})


def oracle(config: Mapping[str, Any], **changes: Any) -> DDPMScheduler:
    return DDPMScheduler(**{**config, "clip_sample": False, **changes})


def some(name: str, count: int = 5) -> Tensor:
    return rng.noise(0, 0, name, (count, 4, 3, 2))


TIMES = torch.tensor([0, 1, 350, 998, 999])


# The noise schedules


@every_schedule
def test_the_schedule_is_diffusers(config: Mapping[str, Any]) -> None:
    schedule = of(config)
    assert torch.equal(schedule.alphas_cumprod, oracle(config).alphas_cumprod)
    assert schedule.alphas_cumprod.dtype == torch.float32
    assert all(later < earlier for earlier, later in pairwise(schedule.alphas_cumprod.tolist()))


def test_the_linear_schedule_is_that_of_ho_et_al() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # section 4
    expected = torch.cumprod(1 - betas, dim=0)
    assert torch.allclose(of(LINEAR).alphas_cumprod.double(), expected, rtol=1e-4)


def test_the_scaled_linear_schedule_is_linear_in_the_root_of_beta() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert torch.allclose(of(SCALED).alphas_cumprod.double(), torch.cumprod(1 - betas, dim=0), rtol=1e-4)


def test_the_cosine_schedule_is_that_of_nichol_and_dhariwal() -> None:
    def f(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    table = of(COSINE).alphas_cumprod
    # eq. 17 counts timesteps from 1; the last beta is cut to 0.999, which is where the curve would reach 0
    for t in range(999):
        assert table[t].item() == pytest.approx(f(t + 1) / f(0), rel=2e-4, abs=1e-9)
    assert table[999].item() == pytest.approx(table[998].item() * 0.001, rel=1e-3)


@pytest.mark.parametrize("config", [LINEAR, SCALED, COSINE], ids=["linear", "scaled", "cosine"])
def test_zero_terminal_snr_is_algorithm_1_of_lin_et_al(config: Mapping[str, Any]) -> None:
    before = of(config).alphas_cumprod
    after = of(config, rescale_betas_zero_snr=True, prediction_type="v_prediction").alphas_cumprod
    root = before.double().sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    assert torch.allclose(after.double(), expected, rtol=1e-3, atol=1e-9)
    assert after[-1].item() == 0
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-6)
    assert of(ZERO).alphas_cumprod[-1].item() == 0


def test_betas_that_a_model_lists_itself_are_its_schedule() -> None:
    betas = [0.1, 0.2, 0.5]
    config = {**SCALED, "trained_betas": betas}
    assert of(config).alphas_cumprod.tolist() == pytest.approx([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.5])
    assert torch.equal(of(config).alphas_cumprod, oracle(config).alphas_cumprod)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "exponential"},
        {"beta_start": "small"},
        {"beta_start": math.nan},
        {"beta_start": 0.5, "beta_end": 1.5},
        {"trained_betas": [0.1, -0.2, 0.3]},
        {"trained_betas": [0.0, 0.1]},
        {"num_train_timesteps": 0},
    ],
)
def test_what_is_no_noise_schedule_is_refused_with_a_sentence(config: Mapping[str, Any]) -> None:
    sentence = r"scheduler_config.json (describes no|does not describe a) noise schedule: .+"
    with pytest.raises((UsageError, BadWeights), match=sentence) as refused:
        NoiseSchedule.from_config(config)
    assert "\n" not in str(refused.value)


# The forward process


@every_schedule
def test_one_step_of_q_is_all_the_small_steps_together(config: Mapping[str, Any]) -> None:
    """x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) noise, Ho et al. 2020, eq. 2; its mean and variance by recursion."""
    schedule = of(config)
    betas = oracle(config).betas.double()
    factor, variance = 1.0, 0.0
    x0 = some("x0", 1)
    for t, beta in enumerate(betas.tolist()):
        factor, variance = factor * math.sqrt(1 - beta), (1 - beta) * variance + beta
        if t in (0, 1, 10, 500, 998, 999):
            at = torch.tensor([t])
            mean = add_noise(schedule, x0, torch.zeros_like(x0), at)
            amount = add_noise(schedule, torch.zeros_like(x0), torch.ones_like(x0), at)
            assert torch.allclose(mean, factor * x0, rtol=1e-3, atol=1e-6)
            assert torch.allclose(amount**2, torch.full_like(x0, variance), rtol=1e-3)


def test_many_small_noisy_steps_are_distributed_like_the_one() -> None:
    config = {**LINEAR, "num_train_timesteps": 20, "beta_end": 0.3}
    x0 = torch.full((40_000, 1), 2.0)
    x = x0
    for number, beta in enumerate(oracle(config).betas.tolist()):
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * rng.noise(0, number, "small step", x.shape)
    at_once = add_noise(of(config), x0, rng.noise(0, 0, "at once", x0.shape), torch.full((40_000,), 19))
    assert x.mean().item() == pytest.approx(at_once.mean().item(), abs=0.02)
    assert x.std().item() == pytest.approx(at_once.std().item(), abs=0.02)


@every_schedule
def test_adding_noise_is_diffusers_add_noise(config: Mapping[str, Any]) -> None:
    x0, noise = some("x0"), some("noise")
    got = add_noise(of(config), x0, noise, TIMES)
    assert torch.allclose(got, oracle(config).add_noise(x0, noise, TIMES), rtol=1e-6, atol=1e-7)
    assert got.dtype == torch.float32
    alone = [add_noise(of(config), *one) for one in zip(x0.split(1), noise.split(1), TIMES.split(1), strict=True)]
    assert torch.equal(got, torch.cat(alone))


def test_half_precision_is_noised_in_full() -> None:
    x0, noise = some("x0").half(), some("noise").half()
    got = add_noise(of(LINEAR), x0, noise, TIMES)
    assert torch.equal(got, add_noise(of(LINEAR), x0.float(), noise.float(), TIMES))


def test_a_prediction_nobody_can_train_is_refused() -> None:
    config = {**LINEAR, "prediction_type": "flow_prediction"}
    with pytest.raises(UsageError, match=r"flow_prediction.*epsilon, v_prediction, sample"):
        NoiseSchedule.from_config(config)


# The configuration


def test_a_configuration_keeps_what_was_not_asked_for() -> None:
    base = {**SCALED, "clip_sample": False, "steps_offset": 1, "timestep_spacing": "leading"}
    assert schedule_config(base) == base
    changed = schedule_config(base, prediction_type="v_prediction", beta_end=0.02)
    assert changed == {**base, "prediction_type": "v_prediction", "beta_end": 0.02}
    assert base["beta_end"] == 0.012
    again = schedule_config({**base, "trained_betas": [0.1, 0.2]}, beta_schedule="linear")
    assert "trained_betas" not in again
    assert len(NoiseSchedule.from_config(again).alphas_cumprod) == 1000


def test_zero_terminal_snr_begins_sampling_at_the_last_timestep() -> None:
    changed = schedule_config(
        {**SCALED, "timestep_spacing": "leading"}, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    assert changed["timestep_spacing"] == "trailing"
    scheduler = oracle(changed)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0].item() == 999
    assert schedule_config(changed, rescale_betas_zero_snr=False)["rescale_betas_zero_snr"] is False


@pytest.mark.parametrize(
    ("base", "asked", "sentence"),
    [
        (SCALED, {"rescale_betas_zero_snr": True}, "--prediction-type v_prediction"),
        (
            {**SCALED, "prediction_type": "epsilon"},
            {"rescale_betas_zero_snr": True},
            "predicting epsilon teaches nothing",
        ),
        (ZERO, {"prediction_type": "epsilon"}, "predicting epsilon teaches nothing"),
        (SCALED, {"beta_start": 0.5}, "--beta-start 0.5 must be smaller than --beta-end 0.012"),
        (SCALED, {"beta_schedule": "squaredcos_cap_v2", "beta_end": 0.02}, "have no effect"),
        (COSINE, {"beta_start": 0.001}, "have no effect"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    base: Mapping[str, Any], asked: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        schedule_config(base, **asked)
