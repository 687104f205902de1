"""Networks in half precision on CPUs that have no kernels for it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sdcli.models import networks
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry


def blocks() -> nn.Module:
    """A convolution, an activation and a linear layer with seeded bfloat16 weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(512, 3)).to(torch.bfloat16)


def test_float32_kernels_round_the_results_of_float32_to_bfloat16() -> None:
    network, x = blocks(), torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    exact = copy.deepcopy(network)
    networks.use_float32_kernels(network)
    expected = x
    for layer in exact:
        expected = layer.float()(expected.float()).bfloat16()
    assert torch.equal(network(x), expected)
    assert {one.dtype for one in network.parameters()} == {torch.bfloat16}
    assert network.state_dict().keys() == exact.state_dict().keys()


def test_a_copy_of_such_a_network_computes_with_its_own_weights() -> None:
    network, x = blocks(), torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    networks.use_float32_kernels(network)
    changed = copy.deepcopy(network)
    nn.init.zeros_(changed[0].weight)  # type: ignore[arg-type]
    assert not torch.equal(network(x), changed(x))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, True])
def test_a_model_in_bfloat16_uses_them_only_without_bfloat16_kernels(
    monkeypatch: pytest.MonkeyPatch, kernels: bool
) -> None:
    monkeypatch.setattr(networks, "cpu_has_bfloat16_kernels", lambda: kernels)
    tiny = load_registry().find("tiny")
    half, single = (load_model(tiny, dtype=dtype, device="cpu") for dtype in ("bfloat16", "float32"))
    own = {nn.Conv2d, nn.Linear}
    for part in ("unet", "vae", "text_encoder"):
        assert any(type(one) in own for one in half.parts[part].modules()) == kernels
        assert any(type(one) in own for one in single.parts[part].modules())
    latents, steps, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 32)
    with torch.inference_mode():
        expected = single.unet(latents, steps, text).sample
        found = half.unet(latents.bfloat16(), steps, text.bfloat16()).sample
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() <= 0.05 * expected.norm()
