"""The diffusion objective against the closed forms of the papers, and against diffusers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from sdcli.errors import BadWeights, UsageError
from sdcli.io import rng
from sdcli.training.objective import (
    PREDICTIONS,
    NoiseSchedule,
    add_noise,
    diffusion_loss,
    perturbed,
    schedule_config,
    snr,
    snr_weights,
    target,
    timestep,
    timesteps,
    training_noise,
    x0_from,
)

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
    assert snr(of(ZERO))[-1].item() == 0


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
    sentence = r"scheduler_config.json describes no noise schedule: .+"
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


def test_a_prediction_nobody_can_train_is_refused() -> None:
    config = {**LINEAR, "prediction_type": "flow_prediction"}
    with pytest.raises(UsageError, match=r"flow_prediction.*epsilon, v_prediction, sample"):
        NoiseSchedule.from_config(config)


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
    more = perturbed(noise, 0, 5, input_perturbation=0.1) - noise
    assert more.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs(torch.corrcoef(torch.stack([more.flatten(), noise.flatten()]))[0, 1].item()) < 0.03
    assert torch.equal(perturbed(noise, 0, 5, input_perturbation=0.0), noise)


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
        ({**SCALED, "prediction_type": "epsilon"}, {"rescale_betas_zero_snr": True}, "epsilon says nothing"),
        (ZERO, {"prediction_type": "epsilon"}, "epsilon says nothing"),
        (SCALED, {"beta_start": 0.5}, "--beta-start 0.5 should be smaller than --beta-end 0.012"),
        (SCALED, {"beta_schedule": "squaredcos_cap_v2", "beta_end": 0.02}, "have no effect"),
        (COSINE, {"beta_start": 0.001}, "have no effect"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    base: Mapping[str, Any], asked: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        schedule_config(base, **asked)
