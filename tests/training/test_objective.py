"""The training objective, compared with the closed forms of the papers and with diffusers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_snr
from torch import Tensor

from sdcli.diffusion.noise_schedule import PREDICTIONS, NoiseSchedule, add_noise
from sdcli.diffusion.x0_prediction import x0_of
from sdcli.training.objective import (
    diffusion_loss,
    perturb,
    snr,
    snr_weights,
    target,
    timestep,
    timesteps,
    training_noise,
)
from tests.diffusion.test_noise_schedule import (
    COSINE,
    LINEAR,
    SCALED,
    TIMES,
    ZERO,
    every_prediction,
    every_schedule,
    of,
    oracle,
    some,
)


def x0_from(schedule: NoiseSchedule, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    return x0_of(schedule.prediction_type, output, x_t, *schedule.signal_and_noise(t, x_t))


# What is predicted


@every_schedule
@every_prediction
def test_every_prediction_gives_x0_back(config: Mapping[str, Any], prediction: str) -> None:
    schedule = of(config, prediction_type=prediction)
    x0, noise = some("x0"), some("noise")
    t = torch.tensor([1, 100, 500, 800, 900])
    x_t = add_noise(schedule, x0, noise, t)
    output = target(schedule, x0, noise, t)
    assert torch.allclose(x0_from(schedule, output, x_t, t), x0, atol=2e-4)


def test_v_says_everything_where_no_signal_is_left_and_where_no_noise_is_added() -> None:
    schedule = of(ZERO)
    x0, noise = some("x0"), some("noise")
    for t in (0, 999):
        at = torch.full((5,), t)
        x_t, v = add_noise(schedule, x0, noise, at), target(schedule, x0, noise, at)
        assert torch.allclose(x0_from(schedule, v, x_t, at), x0, atol=1e-5)
    last = torch.full((5,), 999)
    assert torch.equal(add_noise(schedule, x0, noise, last), noise)
    assert torch.equal(target(schedule, x0, noise, last), -x0)


@every_schedule
def test_v_is_diffusers_velocity_and_the_slope_along_the_angle(config: Mapping[str, Any]) -> None:
    schedule = of(config, prediction_type="v_prediction")
    x0, noise = some("x0"), some("noise")
    v = target(schedule, x0, noise, TIMES)
    assert torch.allclose(v, oracle(config).get_velocity(x0, noise, TIMES), rtol=1e-6, atol=1e-7)
    # Salimans & Ho 2022, appendix D: x = cos(phi) x_0 + sin(phi) noise, and v = dx / dphi
    signal, amount = schedule.signal_and_noise(TIMES, x0)
    phi = torch.atan2(amount.double(), signal.double())
    step = 1e-4
    ahead, behind = ((phi + d).cos() * x0 + (phi + d).sin() * noise for d in (step, -step))
    assert torch.allclose(v.double(), (ahead - behind) / (2 * step), atol=1e-5)
    x_t = add_noise(schedule, x0, noise, TIMES)
    assert torch.allclose(x_t**2 + v**2, x0**2 + noise**2, rtol=1e-4, atol=1e-5)  # a rotation keeps lengths


# The loss


def test_l_simple_is_the_mean_squared_error_of_the_noise() -> None:
    schedule = of(LINEAR)
    x0, noise, output = some("x0"), some("noise"), some("output")
    losses = diffusion_loss(output, target(schedule, x0, noise, TIMES))
    assert losses.shape == (5,)
    assert torch.allclose(losses.mean(), torch.nn.functional.mse_loss(output, noise))
    assert losses[2].item() == pytest.approx(float(((output[2] - noise[2]) ** 2).mean()), rel=1e-6)
    weights = torch.arange(5.0)
    assert torch.equal(diffusion_loss(output, noise, weights), losses * weights)
    assert diffusion_loss(output.half(), noise.half()).dtype == torch.float32


@every_schedule
def test_the_snr_is_diffusers(config: Mapping[str, Any]) -> None:
    everything = torch.arange(1000)
    assert torch.allclose(snr(of(config)), compute_snr(oracle(config), everything), rtol=1e-3, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("gamma", [1.0, 5.0, 1e9])
def test_the_same_error_in_x0_costs_the_same_however_it_is_predicted(config: Mapping[str, Any], gamma: float) -> None:
    """Hang et al. 2023, section 3.4: the weights are min(SNR, gamma) of the error in x_0 in all parametrisations."""
    t = torch.tensor([1, 100, 500, 800, 900])
    x0, noise, error = some("x0"), some("noise"), some("error")
    costs = {}
    for prediction in PREDICTIONS:
        schedule = of(config, prediction_type=prediction)
        x_t = add_noise(schedule, x0, noise, t)
        signal, amount = schedule.signal_and_noise(t, x0)
        wrong_noise = (x_t - signal * (x0 + error)) / amount
        wrong = target(schedule, x0 + error, wrong_noise, t)
        right = target(schedule, x0, noise, t)
        costs[prediction] = diffusion_loss(wrong, right, snr_weights(schedule, t, gamma))
    expected = snr(of(config))[t].clamp(max=gamma) * error.square().flatten(1).mean(dim=1)
    for cost in costs.values():
        assert torch.allclose(cost, expected, rtol=5e-3)


def test_the_weights_are_those_of_diffusers_training_script() -> None:
    t = torch.arange(0, 1000, 7)
    for config in (LINEAR, SCALED, COSINE):
        ratio = compute_snr(oracle(config), t)
        least = torch.stack([ratio, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0]
        assert torch.allclose(snr_weights(of(config), t, 5.0), least / ratio, rtol=1e-3)
        v = of(config, prediction_type="v_prediction")
        assert torch.allclose(snr_weights(v, t, 5.0), least / (ratio + 1), rtol=1e-3)


@every_prediction
def test_min_snr_without_a_bound_is_the_plain_loss_of_epsilon(prediction: str) -> None:
    schedule = of(SCALED, prediction_type=prediction)
    weights = snr_weights(schedule, TIMES, math.inf)
    ratio = snr(schedule)[TIMES]
    expected = {"epsilon": torch.ones(5), "sample": ratio, "v_prediction": ratio / (ratio + 1)}[prediction]
    assert torch.allclose(weights, expected)


@every_prediction
def test_the_weight_of_pure_noise_is_the_limit_and_not_nan(prediction: str) -> None:
    schedule = of(ZERO, prediction_type=prediction)
    weights = snr_weights(schedule, torch.tensor([999, 998, 0]), 5.0)
    assert weights[0].item() == {"epsilon": 1, "sample": 0, "v_prediction": 0}[prediction]
    assert weights[1].item() == pytest.approx(weights[0].item(), abs=1e-3)
    assert weights.isfinite().all()


# Randomness


def test_stratified_timesteps_have_one_in_each_stratum() -> None:
    for step in range(50):
        drawn = timesteps(3, step, 8, 1000)
        assert sorted(t // 125 for t in drawn) == list(range(8))
    assert any(list(timesteps(3, step, 8, 1000)) != sorted(timesteps(3, step, 8, 1000)) for step in range(5))
    many = timesteps(3, 0, 300, 100)
    assert set(many) == set(range(100))
    assert set(Counter(many).values()) <= {2, 3, 4}


def test_each_place_of_a_stratified_batch_is_uniform_over_all_timesteps() -> None:
    draws = [timesteps(1, step, 4, 10) for step in range(8000)]
    for place in range(4):
        counts = Counter(draw[place] for draw in draws)
        chi_squared = sum((counts[t] - 800) ** 2 / 800 for t in range(10))
        assert chi_squared < 27.9  # 9 degrees of freedom, p = 0.001


def test_independent_timesteps_are_uniform() -> None:
    counts = Counter(timestep(1, counter, 10) for counter in range(8000))
    assert set(counts) == set(range(10))
    assert sum((counts[t] - 800) ** 2 / 800 for t in range(10)) < 27.9


def test_stratified_timesteps_vary_less_from_step_to_step() -> None:
    stratified = torch.tensor([timesteps(2, step, 8, 1000) for step in range(300)]).double().mean(dim=1)
    independent = torch.tensor(
        [[timestep(2, step * 8 + place, 1000) for place in range(8)] for step in range(300)]
    ).double()
    assert stratified.std() < independent.mean(dim=1).std() / 2


def test_what_a_sample_is_given_is_a_function_of_its_counter_alone() -> None:
    shape = (4, 3, 2)
    first = training_noise(7, 20, shape, noise_offset=0.1), timestep(7, 20, 1000), timesteps(7, 2, 8, 1000)
    torch.manual_seed(99)
    timesteps.cache_clear()
    training_noise(7, 21, shape)
    again = training_noise(7, 20, shape, noise_offset=0.1), timestep(7, 20, 1000), timesteps(7, 2, 8, 1000)
    assert torch.equal(first[0], again[0])
    assert first[1:] == again[1:]
    assert not torch.equal(training_noise(7, 20, shape), training_noise(7, 21, shape))
    assert not torch.equal(training_noise(7, 20, shape), training_noise(8, 20, shape))


def test_offset_noise_moves_whole_channels() -> None:
    shape = (4, 3, 2)
    plain = training_noise(0, 5, shape)
    moved = training_noise(0, 5, shape, noise_offset=0.1) - plain
    assert torch.allclose(moved, moved[:, :1, :1].expand(shape), atol=1e-6)
    assert torch.allclose(training_noise(0, 5, shape, noise_offset=0.2) - plain, 2 * moved, atol=1e-6)
    offsets = torch.stack(
        [training_noise(0, n, (2, 1), noise_offset=0.1) - training_noise(0, n, (2, 1)) for n in range(3000)]
    )
    assert offsets.mean().item() == pytest.approx(0, abs=0.005)
    assert offsets.std().item() == pytest.approx(0.1, rel=0.05)


def test_input_perturbation_adds_independent_noise_to_the_input() -> None:
    noise = training_noise(0, 5, (4, 64, 64))
    more = perturb(noise, 0, 5, input_perturbation=0.1) - noise
    assert more.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs(torch.corrcoef(torch.stack([more.flatten(), noise.flatten()]))[0, 1].item()) < 0.03
    assert torch.equal(perturb(noise, 0, 5, input_perturbation=0.0), noise)
