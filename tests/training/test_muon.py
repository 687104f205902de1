"""Muon for matrices and convolutions beside AdamW for the rest, with torch's own optimizers as the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sdcli.training.optim.muon import MuonWithAdamW, orthogonal

ADAM = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.02}


def optimizer_of(model: nn.Module, *, lr: float = 1e-2) -> MuonWithAdamW:
    named = dict(model.named_parameters())
    return MuonWithAdamW([{"params": list(named.values()), "lr": lr}], names=list(named), **ADAM)


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 6))


def steps(model: nn.Module, optimizers: list[torch.optim.Optimizer], count: int = 5) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        loss = model(torch.randn(16, 12, generator=generator)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def test_matrices_are_moved_as_torchs_muon_does_and_the_rest_as_adamw() -> None:
    ours, oracle = a_model(), a_model()
    steps(ours, [optimizer_of(ours)])
    matrices = [p for p in oracle.parameters() if p.ndim == 2]
    others = [p for p in oracle.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(
        matrices, lr=1e-2, weight_decay=ADAM["weight_decay"], momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    steps(oracle, [muon, torch.optim.AdamW(others, lr=1e-2, **ADAM)])
    for one, other in zip(ours.parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_convolution_is_the_matrix_of_its_output_channels() -> None:
    torch.manual_seed(2)
    convolution, linear = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(27, 8, bias=False)
    gradient = torch.randn(8, 27)
    with torch.no_grad():
        linear.weight.copy_(convolution.weight.flatten(1))
    for model, own in ((convolution, gradient.view(8, 3, 3, 3)), (linear, gradient)):
        model.weight.grad = own.clone()
        optimizer_of(model).step()
    assert torch.equal(convolution.weight.flatten(1), linear.weight)


@pytest.mark.parametrize("name", ["conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"])
def test_layers_at_the_ends_get_adamw(name: str) -> None:
    ours, oracle = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    for parameter in (ours, oracle):
        parameter.grad = torch.arange(16.0).view(4, 4)
    MuonWithAdamW([{"params": [ours], "lr": 1e-3}], names=[name], **ADAM).step()
    torch.optim.AdamW([oracle], lr=1e-3, **ADAM).step()
    assert torch.equal(ours, oracle)


@pytest.mark.parametrize("shape", [(8, 8), (4, 40), (40, 4)])
def test_a_step_is_nearly_orthogonal_whatever_the_gradients_scale(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    values = singular_values(orthogonal(gradient * 1e-6))
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.3
    assert not orthogonal(torch.zeros(shape)).any(), "nothing to do, and no division by nothing"


def test_a_parameter_without_gradient_stays() -> None:
    model = a_model()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer_of(model).step()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def singular_values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.float())
