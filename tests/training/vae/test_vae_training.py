"""Training a VAE: its losses, its metrics, its task, and what is written of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdcli.errors import BadOutput, BadWeights, NotFound, UsageError
from sdcli.images import metrics
from sdcli.images.pixels import from_pixels
from sdcli.io import rng
from sdcli.training.events import CheckpointSaved, Event, SamplesSaved, StepMetrics, ValidationMetrics
from sdcli.training.inputs.order import Order
from sdcli.training.loop import Plan, Trainer, make_accelerator
from sdcli.training.settings import TrainSettings
from sdcli.training.state.checkpoint import newest_checkpoint
from sdcli.training.task import Draw
from sdcli.training.vae import losses
from sdcli.training.vae.losses import LPIPS, PatchDiscriminator, load_lpips
from sdcli.training.vae.task import VaeObjective, VaeTask, measure_scaling_factor, plain
from sdcli.vae.autoencoder import draw_latents, generators_for, moments, scaling_factor


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    """accelerate keeps one state per process, and refuses another precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


class Shapes:
    """Images of two coloured rectangles on white; an `ImageSource` without files."""

    def item(self, draw: Draw) -> dict[str, Tensor]:
        assert draw.size is not None
        pixels = self.fixed(draw.index, draw.size)["pixels"]
        return {"pixels": pixels.flip(2) if rng.scalars(0, draw.counter, "flip").random() < 0.5 else pixels}

    def fixed(self, index: int, size: tuple[int, int]) -> dict[str, Tensor]:
        draw = rng.scalars(3, index, "shape")
        width, height = size
        pixels = torch.ones(3, height, width)
        for _ in range(2):
            left, top = draw.randrange(width // 2), draw.randrange(height // 2)
            colour = torch.tensor([draw.random() for _ in range(3)])
            pixels[:, top : top + height // 2, left : left + width // 2] = colour[:, None, None]
        return {"pixels": pixels}


def kl_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=32,
    )


def tiny_vae() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


VAES = {"AutoencoderKL": kl_vae, "AutoencoderTiny": tiny_vae}
WEIGHTS = "checkpoint-4/vae/diffusion_pytorch_model.safetensors"
both = pytest.mark.parametrize("kind", VAES)


def task_of(kind: str, *, items: int = 12, batch: int = 4, size: tuple[int, int] = (32, 32), **changes: Any) -> VaeTask:
    vae = VAES[kind]()
    return VaeTask(
        **{
            "vae": vae,
            "source": Shapes(),
            "order": Order({size: np.arange(items)}, batch, seed=1),
            "seed": 5,
            "learning_rate": 2e-3,
            "discriminator_channels": 4,
            "name_of": lambda index: f"shape {index}",
            **changes,
        }
    )


def batch_of(task: VaeTask, step: int = 0) -> dict[str, Any]:
    return task.collate([task.item(draw) for draw in task.draws(step)])


def settings(**changes: Any) -> TrainSettings:
    usual = {
        "train_batch_size": 4,
        "device": "cpu",
        "max_train_steps": 6,
        "learning_rate": 2e-3,
        "mixed_precision": "no",
    }
    return TrainSettings(**{**usual, **changes})


def trained(run: Path, task: VaeTask, chosen: TrainSettings, *, resume: bool = False, **plan: Any) -> list[Event]:
    made = Trainer(task, chosen, make_accelerator(chosen), run, Plan(**{"steps": chosen.max_train_steps, **plan}))
    done = made.resume(newest_checkpoint(run).path) if resume else 0
    return list(made.train(done=done))


# Losses


def test_the_kl_term_is_that_of_torchs_distributions_and_of_diffusers() -> None:
    mean, logvar = rng.noise(0, 0, "mean", (2, 4, 3, 5)), rng.noise(0, 0, "logvar", (2, 4, 3, 5))
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    assert torch.allclose(losses.kl(mean, logvar), expected, rtol=1e-5)
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    assert torch.allclose(
        losses.kl(mean, logvar), DiagonalGaussianDistribution(torch.cat([mean, logvar], 1)).kl(), rtol=1e-5
    )
    assert losses.kl(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)).item() == 0


def test_structure_sees_edges_and_not_brightness() -> None:
    pixels = torch.stack([Shapes().fixed(index, (32, 32))["pixels"] for index in range(3)]) * 2 - 1
    assert losses.structure(pixels, pixels).abs().max() == 0
    assert losses.structure(pixels, pixels - 0.3).abs().max() < 1e-6
    blurred = torch.nn.functional.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    very_blurred = torch.nn.functional.avg_pool2d(pixels, 7, stride=1, padding=3, count_include_pad=False)
    little, much = losses.structure(pixels, blurred), losses.structure(pixels, very_blurred)
    assert (little > 0).all()
    assert (much > little).all()


def test_structure_at_one_scale_is_the_l1_of_finite_differences() -> None:
    pixels, other = rng.noise(0, 0, "a", (1, 3, 2, 3)), rng.noise(0, 0, "b", (1, 3, 2, 3))  # halves to 1 x 1
    error = (pixels - other).numpy()[0]
    expected = (np.abs(np.diff(error, axis=2)).mean() + np.abs(np.diff(error, axis=1)).mean()) / 2
    assert losses.structure(pixels, other).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [losses.reconstruction, losses.structure])
def test_pixel_losses_are_of_each_image_alone(loss: Any) -> None:
    a, b = rng.noise(0, 0, "a", (3, 3, 16, 24)), rng.noise(0, 0, "b", (3, 3, 16, 24))
    together = loss(a, b)
    assert together.shape == (3,)
    assert torch.allclose(together, torch.cat([loss(a[i : i + 1], b[i : i + 1]) for i in range(3)]))
    assert torch.allclose(together, loss(b, a))


def test_regularised_latents_have_mean_0_and_deviation_1() -> None:
    latents = (rng.noise(0, 0, "z", (8, 4, 8, 8)) * 5 + 3).requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        losses.latents_regularisation(latents).backward()
        optimizer.step()
    channels = latents.detach().transpose(0, 1).flatten(1)
    assert channels.mean(dim=1).abs().max() < 0.05
    assert (channels.std(dim=1) - 1).abs().max() < 0.05
    alike = torch.zeros(2, 4, 2, 2, requires_grad=True)
    losses.latents_regularisation(alike).backward()
    assert alike.grad is not None
    assert alike.grad.isfinite().all()


def test_hinge_rests_where_the_discriminator_is_sure_and_right() -> None:
    sure = torch.full((2, 1, 3, 3), 1.5)
    assert losses.hinge(sure, -sure).tolist() == [0, 0]
    assert losses.hinge(-sure, sure).tolist() == [2.5, 2.5]
    assert losses.hinge(sure * 0, sure * 0).tolist() == [1, 1]
    assert losses.adversarial(sure).tolist() == [-1.5, -1.5]


def test_the_discriminator_is_the_one_of_latent_diffusion_and_sees_patches_of_70_pixels() -> None:
    judge = PatchDiscriminator(seed=0)
    assert [tuple(p.shape) for p in judge.parameters() if p.ndim == 4] == [
        (64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4),
    ]  # fmt: skip
    small = PatchDiscriminator(seed=0, channels=2)
    for part in small.modules():
        if isinstance(part, nn.InstanceNorm2d):
            part.forward = lambda x: x  # type: ignore[method-assign]  # what is normal depends on the whole image
    pixels = rng.noise(0, 0, "pixels", (1, 3, 128, 128)).requires_grad_()
    logits = small(pixels)
    assert logits.shape == (1, 1, 14, 14)
    (gradient,) = torch.autograd.grad(logits[0, 0, 7, 7], pixels)
    rows, columns = gradient.abs().sum(dim=(0, 1)).nonzero(as_tuple=True)
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (70, 70)


def test_the_discriminators_answer_does_not_depend_on_the_company_and_its_weights_on_the_seed_alone() -> None:
    judge, again, other = (PatchDiscriminator(seed=seed, channels=8).train() for seed in (3, 3, 4))
    pixels = rng.noise(0, 0, "pixels", (3, 3, losses.SMALLEST_FOR_DISCRIMINATOR, 40))
    assert torch.allclose(judge(pixels)[1:2], judge(pixels[1:2]), atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(judge.parameters()), next(other.parameters()))
    assert not list(judge.buffers())


# LPIPS


@pytest.fixture(scope="module")
def lpips_tensors() -> dict[str, Tensor]:
    """Random weights as in the files: He's for VGG16, positive ones for the linear layers."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in LPIPS().state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if name.startswith("lin"):
            tensors[name] = drawn.abs()
        elif tensor.ndim == 4:
            tensors[name] = drawn * math.sqrt(2 / (9 * tensor.shape[1]))
        else:
            tensors[name] = drawn * 0.01
    return tensors


@pytest.fixture(scope="module")
def lpips_folder(lpips_tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lpips")
    vgg = {name: tensor for name, tensor in lpips_tensors.items() if name.startswith("features")}
    save_file({**vgg, "classifier.0.bias": torch.zeros(5)}, folder / "vgg16.safetensors")
    save_file({name: t for name, t in lpips_tensors.items() if name not in vgg}, folder / "lpips.safetensors")
    return folder


def test_lpips_has_the_names_of_torchvision_and_of_lpips(lpips_tensors: dict[str, Tensor]) -> None:
    convolutions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # of vgg16().features
    expected = {f"features.{number}.{what}" for number in convolutions for what in ("weight", "bias")}
    assert set(lpips_tensors) == expected | {f"lin{number}.model.1.weight" for number in range(5)}
    assert lpips_tensors["features.28.weight"].shape == (512, 512, 3, 3)
    assert lpips_tensors["lin2.model.1.weight"].shape == (1, 256, 1, 1)


def test_lpips_is_a_distance_and_can_be_followed_downhill(lpips_folder: Path) -> None:
    distance = load_lpips(lpips_folder)
    assert not any(p.requires_grad for p in distance.parameters())
    a, b = (rng.noise(0, 0, name, (2, 3, 32, 32)).tanh() for name in "ab")
    assert distance(a, a).tolist() == [0, 0]
    assert torch.allclose(distance(a, b), distance(b, a))
    assert (distance(a, b) > 0).all()
    assert (distance(a, (a + b) / 2) < distance(a, b)).all()
    moved = b.clone().requires_grad_()
    before = distance(a, moved)
    before.sum().backward()
    assert moved.grad is not None
    assert moved.grad.isfinite().all()
    step = 1e-3 * moved.grad / moved.grad.abs().max()
    assert (distance(a, b - step) < before).all()
    same = a.clone().requires_grad_()
    distance(a, same).sum().backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()


def test_lpips_is_its_formula(lpips_folder: Path, lpips_tensors: dict[str, Tensor]) -> None:
    a, b = (rng.noise(0, 0, name, (1, 3, 16, 16)).tanh() for name in "ab")
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected = 0.0
    x, y = (((p - shift[:, None, None]) / scale[:, None, None]) for p in (a, b))
    taken = {2: 0, 7: 1, 14: 2, 21: 3, 28: 4}
    for number in range(30):
        if f"features.{number}.weight" in lpips_tensors:
            w, bias = lpips_tensors[f"features.{number}.weight"], lpips_tensors[f"features.{number}.bias"]
            x, y = (torch.relu(torch.nn.functional.conv2d(p, w, bias, padding=1)) for p in (x, y))
        elif number in (4, 9, 16, 23):
            x, y = (torch.nn.functional.max_pool2d(p, 2) for p in (x, y))
        if number in taken:
            unit_x, unit_y = (p / p.norm(dim=1, keepdim=True) for p in (x, y))
            weights = lpips_tensors[f"lin{taken[number]}.model.1.weight"]
            expected += float(((unit_x - unit_y) ** 2 * weights.view(1, -1, 1, 1)).sum(dim=1).mean())
    assert load_lpips(lpips_folder)(a, b).item() == pytest.approx(expected, rel=1e-4)


def test_lpips_reads_what_the_lpips_package_would_save(tmp_path: Path, lpips_tensors: dict[str, Tensor]) -> None:
    stages = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
    renamed = {}
    for name, tensor in lpips_tensors.items():
        kind, number, *rest = name.split(".")
        renamed[f"net.slice{stages[int(number)]}.{number}.{rest[0]}" if kind == "features" else name] = tensor
    save_file({**renamed, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, tmp_path / "one.safetensors")
    loaded = load_lpips(tmp_path / "one.safetensors").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in lpips_tensors.items())


def test_files_that_are_not_lpips_are_refused_with_a_sentence(tmp_path: Path, lpips_tensors: dict[str, Tensor]) -> None:
    with pytest.raises(NotFound, match=r"no LPIPS weights at .*lin0\.model\.1\.weight"):
        load_lpips(tmp_path / "nowhere")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "vgg.pth").write_bytes(b"\x80\x02")
    with pytest.raises(BadWeights, match=r"vgg\.pth is a pickle"):
        load_lpips(tmp_path / "pickled")
    file = tmp_path / "lpips.safetensors"
    save_file({name: t for name, t in lpips_tensors.items() if name.startswith("lin")}, file)
    with pytest.raises(BadWeights, match=r"lacks 26 of the 31 weights .* first features\.0\.weight"):
        load_lpips(file)
    save_file({**lpips_tensors, "lin0.model.1.weight": torch.zeros(1, 32, 1, 1)}, file)
    with pytest.raises(BadWeights, match=r"lin0\.model\.1\.weight has shape 1x32x1x1.*1x64x1x1"):
        load_lpips(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadWeights, match="cut short"):
        load_lpips(file)


# Metrics


def test_psnr_is_that_of_the_formula_and_of_encode_check() -> None:
    levels = torch.randint(0, 256, (2, 3, 20, 17), generator=torch.Generator().manual_seed(0))
    other = (levels + torch.randint(-20, 20, levels.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255)
    got = metrics.psnr(levels / 255, other / 255)
    for row in range(2):
        expected = metrics.distance(from_pixels(levels[row] / 255), from_pixels(other[row] / 255))
        assert expected is not None
        assert got[row].item() == pytest.approx(expected.psnr, abs=1e-4)
    assert metrics.psnr(levels / 255, levels / 255).tolist() == [metrics.BEST_PSNR] * 2


def test_ssim_is_that_of_its_formula_window_by_window() -> None:
    pixels = Shapes().fixed(0, (19, 14))["pixels"][None]
    other = (pixels + 0.1 * rng.noise(0, 0, "noise", pixels.shape)).clamp(0, 1)
    x, y = pixels[0].double().numpy(), other[0].double().numpy()
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for channel in range(3):
        for top in range(14 - 10):
            for left in range(19 - 10):
                a = x[channel, top : top + 11, left : left + 11]
                b = y[channel, top : top + 11, left : left + 11]
                ma, mb = (weights * a).sum(), (weights * b).sum()
                va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
                cov = (weights * (a - ma) * (b - mb)).sum()
                values.append(
                    (2 * ma * mb + 0.01**2) * (2 * cov + 0.03**2) / ((ma**2 + mb**2 + 0.01**2) * (va + vb + 0.03**2))
                )
    assert metrics.ssim(pixels, other).item() == pytest.approx(float(np.mean(values)), abs=1e-9)


def test_ssim_is_1_for_equal_images_symmetric_and_falls_with_noise() -> None:
    pixels = torch.stack([Shapes().fixed(index, (32, 24))["pixels"] for index in range(2)])
    noise = rng.noise(0, 0, "noise", pixels.shape)
    little, much = (metrics.ssim(pixels, pixels + amount * noise) for amount in (0.05, 0.3))
    assert torch.allclose(metrics.ssim(pixels, pixels), torch.ones(2, dtype=torch.float64))
    assert (little > much).all()
    assert torch.equal(metrics.ssim(pixels, pixels + noise), metrics.ssim(pixels + noise, pixels))
    with pytest.raises(ValueError, match="11"):
        metrics.ssim(torch.zeros(1, 3, 10, 32), torch.zeros(1, 3, 10, 32))


# The task


@both
def test_the_loss_reaches_every_parameter(kind: str) -> None:
    task = task_of(kind, discriminator=True)
    batch = batch_of(task)
    for phase in task.phases:
        phase.loss(task.networks, batch).loss.backward()
    for name, network in task.networks.items():
        for key, parameter in network.named_parameters():
            assert parameter.grad is not None, f"{name}.{key}"
            # softmax does not see what is added to all keys; while the hinge counts every patch, real and false ones
            # pull the last bias equally
            if not key.endswith("to_k.bias") and key != "layers.11.bias":
                assert parameter.grad.abs().sum() > 0, f"{name}.{key}"


@both
def test_the_networks_names_are_those_of_the_plain_vae(kind: str) -> None:
    task = task_of(kind)
    vae, network = task.vae, task.networks["vae"]
    assert list(network.state_dict()) == list(vae.state_dict())
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in vae.named_parameters()]
    assert all(a is b for a, b in zip(network.parameters(), vae.parameters(), strict=True))


def test_the_call_is_diffusers_own_encode_and_decode() -> None:
    task = task_of("AutoencoderKL")
    batch = batch_of(task)
    pixels = batch["pixels"] * 2 - 1
    with torch.no_grad():
        reconstructed, mean, logvar = task.networks["vae"](pixels, batch["noise"] * 0)
        assert torch.equal(reconstructed, task.vae(pixels, sample_posterior=False).sample)
        noisy, *_ = task.networks["vae"](pixels, batch["noise"])
        drawn = mean + (0.5 * logvar).exp() * batch["noise"]
        assert torch.equal(noisy, task.vae.decode(drawn).sample)
        expected_mean, expected_logvar = moments(task.vae, batch["pixels"])
        assert torch.equal(mean, expected_mean)
        assert torch.equal(logvar, expected_logvar)


def test_an_item_is_a_function_of_its_draw() -> None:
    task, again = task_of("AutoencoderKL"), task_of("AutoencoderKL")
    draw = task.draws(7)[2]
    one, other = task.item(draw), again.item(draw)
    assert one["step"] == other["step"] == 7
    assert all(torch.equal(one[name], other[name]) for name in ("pixels", "noise"))
    assert one["noise"].shape == (4, 16, 16)
    assert not torch.equal(one["noise"], task.item(task.draws(8)[2])["noise"])


@both
def test_each_phase_gives_gradients_to_its_own_network_alone(kind: str) -> None:
    task = task_of(kind, discriminator=True)
    batch = batch_of(task)
    judge = {name: tensor.clone() for name, tensor in task.networks["discriminator"].state_dict().items()}
    task.loss(task.networks, batch).loss.backward()
    assert all(p.grad is not None for p in task.networks["vae"].parameters())
    assert all(p.grad is None and p.requires_grad for p in task.networks["discriminator"].parameters())
    assert all(torch.equal(judge[name], t) for name, t in task.networks["discriminator"].state_dict().items())
    task.networks["vae"].zero_grad()
    task.discriminator_loss(task.networks, batch).loss.backward()
    assert all(p.grad is None and p.requires_grad for p in task.networks["vae"].parameters())
    assert all(p.grad is not None for p in task.networks["discriminator"].parameters())


def test_the_discriminator_changes_the_vaes_gradient_from_its_start_on() -> None:
    def gradient(step: int, **changes: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        task = task_of("AutoencoderKL", objective=VaeObjective(discriminator=0.5, discriminator_start=2), **changes)
        losses = task.loss(task.networks, {**batch_of(task), "step": step})
        losses.loss.backward()
        parameter = task.vae.decoder.conv_out.weight
        assert parameter.grad is not None
        return parameter.grad, losses.figures

    before, shown = gradient(1, discriminator=True)
    after, shown_then = gradient(2, discriminator=True)
    assert torch.equal(before, gradient(1)[0])
    assert shown["adversarial"] == 0
    assert not torch.allclose(before, after)
    assert shown_then["adversarial"] != 0


def test_a_resting_discriminator_stays_as_it_is(tmp_path: Path) -> None:
    objective = VaeObjective(discriminator_start=3)
    task = task_of("AutoencoderTiny", discriminator=True, objective=objective)
    first = {name: tensor.clone() for name, tensor in task.networks["discriminator"].state_dict().items()}
    trained(tmp_path / "run", task, settings(max_train_steps=3, adam_weight_decay=0.1))
    assert all(torch.equal(first[name], t) for name, t in task.networks["discriminator"].state_dict().items())
    trained(tmp_path / "run", task, settings(max_train_steps=4), resume=True)
    assert not any(
        torch.equal(first[name], parameter)
        for name, parameter in task.networks["discriminator"].named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    )
    assert not torch.equal(first["layers.0.weight"], task.networks["discriminator"].get_parameter("layers.0.weight"))


def test_under_ddp_both_phases_have_the_gradients_they_have_without(tmp_path: Path) -> None:
    def gradients(wrap: Any) -> list[Tensor]:
        task = task_of("AutoencoderKL", discriminator=True)
        networks = {name: wrap(network) for name, network in task.networks.items()}
        for step in range(3):  # DDP complains about a network whose parameters were left out at the next pass only
            for phase in task.phases:
                phase.loss(networks, batch_of(task, step)).loss.backward()
        return [p.grad for network in task.networks.values() for p in network.parameters() if p.grad is not None]

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = gradients(nn.parallel.DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()
    alone = gradients(lambda network: network)
    assert len(wrapped) == len(alone)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(wrapped, alone, strict=True))


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 24 pixels per side, not 16"):
        task_of("AutoencoderKL", size=(32, 16), discriminator=True)
    with pytest.raises(UsageError, match="LPIPS needs images of at least 16 pixels per side, not 8"):
        task_of("AutoencoderKL", held_out=[(0, (32, 8))], lpips=LPIPS())
    vae = tiny_vae()
    vae.enable_gradient_checkpointing()
    with pytest.raises(UsageError, match="AutoencoderTiny"):
        task_of("AutoencoderTiny", vae=vae)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        vae = kl_vae()
        if checkpointing:
            vae.enable_gradient_checkpointing()
        task = task_of("AutoencoderKL", vae=vae)
        task.networks["vae"].train()
        task.loss(task.networks, batch_of(task)).loss.backward()
        return [p.grad for p in vae.parameters() if p.grad is not None]

    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(True), gradients(False), strict=True))


@pytest.mark.slow
@both
def test_a_vae_learns_four_images_by_heart(tmp_path: Path, kind: str) -> None:
    held_out = [(index, (32, 32)) for index in range(4)]
    objective = VaeObjective(latent_noise=0.02)
    task = task_of(kind, items=4, held_out=held_out, objective=objective, learning_rate=5e-3)
    before = task.validate(task.networks)
    chosen = settings(max_train_steps=60, learning_rate=5e-3)
    events = trained(tmp_path / "run", task, chosen, validate_every=60, sample_every=60)
    (after,) = [event.figures for event in events if isinstance(event, ValidationMetrics)]
    assert after["psnr"] > before["psnr"] + 6
    assert after["ssim"] > before["ssim"] + 0.2
    assert after["l1"] < before["l1"] / 2
    assert {"loss", "latents_mean", "latents_std", "latents_mean_3", "latents_std_0"} <= set(after)
    (sheet,) = [path for event in events if isinstance(event, SamplesSaved) for path in event.paths]
    assert sheet == tmp_path / "run" / "samples" / "step-60.png"
    with Image.open(sheet) as image:
        assert json.loads(image.text["sdcli-sheet"])["pictures"] == [f"shape {index}" for index in range(4)]


@both
def test_validation_has_nothing_random_and_is_the_mean_over_images_of_all_sizes(kind: str) -> None:
    held_out = [(0, (32, 32)), (1, (48, 16)), (2, (32, 32)), (3, (48, 16)), (4, (32, 32))]
    task = task_of(kind, held_out=held_out)
    figures = task.validate(task.networks)
    assert figures == task.validate(task.networks)
    alone = []
    for one in held_out:
        task.held_out = [one]
        alone.append(task.validate(task.networks))
    names = {"psnr", "ssim", "l1", "structure"} | ({"loss", "kl"} if kind == "AutoencoderKL" else set())
    for name in names:
        assert figures[name] == pytest.approx(np.mean([some[name] for some in alone]), rel=1e-4, abs=1e-8)
    task.held_out = []
    assert task.validate(task.networks) == {}


def test_images_smaller_than_the_window_of_ssim_are_judged_without_it() -> None:
    task = task_of("AutoencoderKL", size=(8, 8), held_out=[(0, (8, 8)), (1, (8, 8))])
    figures = task.validate(task.networks)
    assert "ssim" not in figures
    assert math.isfinite(figures["psnr"])


def test_large_images_are_validated_in_smaller_batches() -> None:
    task = task_of("AutoencoderTiny")
    sizes = {(32, 32): 16, (256, 256): 16, (512, 512): 4, (2048, 1024): 1}
    for size, batch in sizes.items():
        batches = list(task._batches([(index, size) for index in range(batch + 1)]))
        assert [len(some) for some in batches] == [batch, 1]
        assert batches[0].shape[1:] == (3, size[1], size[0])


def test_lpips_counts_in_training_and_in_validation(lpips_folder: Path) -> None:
    objective = VaeObjective(lpips=0.5)
    task = task_of("AutoencoderKL", held_out=[(0, (32, 32))], lpips=load_lpips(lpips_folder), objective=objective)
    without = task_of("AutoencoderKL", held_out=[(0, (32, 32))])
    batch = batch_of(task)
    losses, plainly = task.loss(task.networks, batch), without.loss(without.networks, batch)
    assert losses.loss.item() == pytest.approx(plainly.loss.item() + 0.5 * losses.figures["lpips"].item(), rel=1e-5)
    losses.loss.backward()
    assert not any(p.grad is not None for p in task.lpips.parameters())  # type: ignore[union-attr]
    figures, fewer = task.validate(task.networks), without.validate(without.networks)
    assert figures["loss"] == pytest.approx(fewer["loss"] + 0.5 * figures["lpips"], rel=1e-5)
    assert list(task.networks) == ["vae"]  # the judge is no network of the run


def test_without_held_out_images_the_sheet_shows_the_first_trained_ones(tmp_path: Path) -> None:
    task = task_of("AutoencoderTiny")
    (path,) = task.samples(task.networks, 12, tmp_path)
    (again,) = task.samples(task.networks, 12, tmp_path / "again")
    assert path.name == "step-12.png"
    assert path.read_bytes() == again.read_bytes()
    with Image.open(path) as image:
        names = json.loads(image.text["sdcli-sheet"])["pictures"]
    assert names == [f"shape {draw.index}" for draw in task.draws(0)]


# Files


@both
def test_what_is_saved_is_what_diffusers_loads(tmp_path: Path, kind: str) -> None:
    task = task_of(kind)
    chosen = settings(max_train_steps=3, use_ema=True, ema_power=0.5)
    made = Trainer(task, chosen, make_accelerator(chosen), tmp_path / "run", Plan(steps=3))
    list(made.train())
    folder = tmp_path / "run" / "checkpoint-3"
    assert not (folder / "state" / "vae.safetensors").exists()  # it is held by vae/ already
    live = task.vae.config.scaling_factor
    assert live == VAES[kind]().config.scaling_factor
    pixels = Shapes().fixed(0, (32, 32))["pixels"][None]

    def measured(network: Any) -> float:
        images = torch.stack([Shapes().fixed(index, (32, 32))["pixels"] for index in range(12)])
        return measure_scaling_factor(network, [images])

    for name, network in (("vae", task.vae), ("vae_ema", plain(made.averages))):
        loaded = type(task.vae).from_pretrained(folder / name)
        written, own = json.loads((folder / name / "config.json").read_text()), json.loads(network.to_json_string())
        assert written.pop("scaling_factor") == pytest.approx(measured(network))
        own.pop("scaling_factor")
        assert written == own
        assert all(torch.equal(t, network.state_dict()[key]) for key, t in loaded.state_dict().items())
        assert torch.equal(moments(loaded, pixels)[0], moments(network, pixels)[0])
        assert loaded.config.scaling_factor != live
    raw, averaged = (load_file(folder / name / "diffusion_pytorch_model.safetensors") for name in ("vae", "vae_ema"))
    assert any(not torch.equal(raw[key], averaged[key]) for key in raw)


@both
def test_the_written_scaling_factor_makes_the_deviation_of_latents_1(tmp_path: Path, kind: str) -> None:
    task = task_of(kind, items=64)
    with torch.no_grad():  # latents that a scale and an offset matter for
        for parameter in task.vae.encoder.parameters():
            parameter.mul_(1.3)
    task.save(tmp_path, task.networks, {})
    loaded = type(task.vae).from_pretrained(tmp_path / "vae")
    pixels = torch.stack([Shapes().fixed(index, (32, 32))["pixels"] for index in range(64)])
    latents = draw_latents(loaded, moments(loaded, pixels), generators_for(range(64)))
    assert latents.std().item() == pytest.approx(1, rel=0.02)
    # however the images are divided into batches
    assert scaling_factor(loaded) == pytest.approx(
        measure_scaling_factor(task.vae, [pixels[:40], pixels[40:]]), rel=1e-5
    )


def test_the_scaling_factor_is_measured_on_a_bounded_part_of_the_data() -> None:
    many = task_of("AutoencoderKL", items=5000)
    chosen = many._measured()
    assert len(chosen) == len(set(chosen)) == 256
    assert chosen == many._measured()
    assert chosen[0][0] == 0
    assert chosen[-1][0] > 4900
    assert len(task_of("AutoencoderKL", items=5)._measured()) == 5
    assert len(task_of("AutoencoderKL", items=5000, size=(512, 512))._measured()) == 64


def test_latents_without_a_deviation_have_no_scaling_factor() -> None:
    task = task_of("AutoencoderTiny")
    with torch.no_grad():
        for parameter in task.vae.encoder.parameters():
            parameter.zero_()
    with pytest.raises(BadOutput, match="deviation"):
        measure_scaling_factor(task.vae, [torch.zeros(1, 3, 16, 16)])


@pytest.mark.slow
def test_images_of_files_are_trained_on_with_workers_as_without(tmp_path: Path) -> None:
    from sdcli.data.buckets import Bucketing
    from sdcli.data.sources import open_images
    from sdcli.training.inputs.sources import Pixels

    (tmp_path / "data").mkdir()
    for index in range(6):
        size = (40, 32) if index % 2 else (32, 48)
        from_pixels(Shapes().fixed(index, size)["pixels"]).save(tmp_path / "data" / f"{index}.png")
    images = open_images(tmp_path / "data")
    bucketing = Bucketing(buckets=((32, 32), (32, 48)), random_crop=True)

    def task() -> VaeTask:
        return task_of(
            "AutoencoderTiny",
            source=Pixels(images, bucketing, seed=1, flip=True),
            order=Order({(32, 32): np.array([1, 3, 5]), (32, 48): np.array([0, 2, 4])}, 2, seed=1),
            held_out=[(0, (32, 48)), (1, (32, 32))],
        )

    for name, workers in (("without", 0), ("with", 2)):
        chosen = settings(train_batch_size=2, max_train_steps=4, dataloader_num_workers=workers)
        trained(tmp_path / name, task(), chosen, validate_every=4, sample_every=4)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("without", "with"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (tmp_path / "with" / "samples" / "step-4.png").is_file()


RESUMED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("AutoencoderKL", {"discriminator": True}, {"use_ema": True, "ema_power": 0.5}),
    ("AutoencoderKL", {"discriminator": True, "objective": VaeObjective(discriminator_start=4)}, {}),
    ("AutoencoderTiny", {"discriminator": True}, {"gradient_accumulation_steps": 2, "train_batch_size": 2}),
    ("AutoencoderTiny", {}, {"mixed_precision": "bf16"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "changes", "chosen"), RESUMED)
def test_a_resumed_run_has_every_bit_of_an_uninterrupted_one(
    tmp_path: Path, kind: str, changes: dict[str, Any], chosen: dict[str, Any]
) -> None:
    straight = trained(tmp_path / "straight", task_of(kind, **changes), settings(**chosen))
    first = Trainer(
        task_of(kind, **changes),
        settings(**chosen),
        make_accelerator(settings(**chosen)),
        tmp_path / "cut",
        Plan(steps=6, checkpoint_every=3),
    )
    for event in first.train():
        if isinstance(event, CheckpointSaved):
            break
    rest = trained(tmp_path / "cut", task_of(kind, **changes), settings(**chosen), resume=True)

    one, other = tmp_path / "straight" / "checkpoint-6", tmp_path / "cut" / "checkpoint-6"
    names = {str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(other)) for path in other.rglob("*") if path.is_file()}
    assert "vae/config.json" in names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    figures = {event.step: (event.loss, event.figures) for event in straight if isinstance(event, StepMetrics)}
    for event in rest:
        if isinstance(event, StepMetrics):
            assert (event.loss, event.figures) == figures[event.step]


def _gradients_of_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    task = task_of("AutoencoderKL", batch=8, discriminator=True)
    networks = {name: nn.parallel.DistributedDataParallel(network) for name, network in task.networks.items()}
    draws = task.draws(0)[rank * 4 :][:4]
    for phase in task.phases:
        phase.loss(networks, task.collate([task.item(draw) for draw in draws])).loss.backward()
    if rank == 0:
        torch.save(_gradients(task), f"{folder}/gradients")
    torch.distributed.destroy_process_group()


def _gradients(task: VaeTask) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": parameter.grad
        for name, network in task.networks.items()
        for key, parameter in network.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_gradients_of_a_rank, (str(tmp_path),), nprocs=2)
    task = task_of("AutoencoderKL", batch=8, discriminator=True)
    for phase in task.phases:
        phase.loss(task.networks, batch_of(task)).loss.backward()
    together, alone = torch.load(tmp_path / "gradients", weights_only=True), _gradients(task)
    assert together.keys() == alone.keys()
    for name, gradient in alone.items():
        assert torch.allclose(together[name], gradient, rtol=1e-4, atol=1e-5), name
