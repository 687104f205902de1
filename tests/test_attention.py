"""The sliced self-attention of half precision: as good as torch's own, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sdcli.denoise.attention import SlicedSelfAttention, sliced_attention
from sdcli.loading import load_model
from sdcli.pipeline import Painter, paint
from sdcli.registry import load_registry, resolve
from sdcli.request import GenerationRequest


@pytest.mark.parametrize(("tokens", "size"), [(1024, 40), (576, 80), (300, 160)])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_it_is_attention_up_to_the_rounding_of_half_precision(tokens: int, size: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, tokens, 3, size, generator=generator).bfloat16() for _ in range(3))
    keys = keys + offset * torch.randn(size, generator=generator).bfloat16()
    exact = F.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (queries, keys, values))).transpose(
        1, 2
    )
    error = (sliced_attention(queries, keys, values).float() - exact).square().mean().sqrt()
    assert error / exact.square().mean().sqrt() < 0.01


def test_in_float32_it_is_exact_attention() -> None:
    queries, keys, values = (torch.randn(1, 700, 2, 16) for _ in range(3))
    exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (queries, keys, values))).transpose(1, 2)
    assert torch.allclose(sliced_attention(queries, keys, values), exact, atol=1e-5)


@pytest.mark.parametrize(("dtype", "sliced"), [("float32", False), ("bfloat16", True)])
def test_only_half_precision_on_the_cpu_uses_it(dtype: str, sliced: bool) -> None:
    model = load_model(load_registry().find("starter"), device="cpu", dtype=dtype)
    kinds = {name: isinstance(p, SlicedSelfAttention) for name, p in model.unet.attn_processors.items()}
    assert all(kinds[name] is sliced for name in kinds if ".attn1." in name)
    assert not any(kinds[name] for name in kinds if ".attn2." in name)


def test_a_picture_in_half_precision_stays_close_to_float32() -> None:
    spec = load_registry().find("starter")
    finals = []
    for dtype in ("float32", "bfloat16"):
        request = GenerationRequest(prompt="a castle", seed=3, width=256, height=256, steps=4)
        *_, last = paint(Painter.of(load_model(spec, device="cpu", dtype=dtype)), [resolve(request, spec)])
        finals.append(last.latents)
    error = (finals[0] - finals[1]).square().mean().sqrt() / finals[0].square().mean().sqrt()
    assert error < 0.03
