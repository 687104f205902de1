"""The attention of half precision on the CPU: as good as torch's own, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from sdcli.diffusion.attention import sliced
from sdcli.diffusion.attention.sliced import (
    WAYS,
    PlainSmallAttention,
    SlicedSelfAttention,
    sliced_attention,
    use_plain_small_attention,
)
from sdcli.diffusion.pipeline import Pipeline, load_denoiser
from sdcli.diffusion.sampling import sample
from sdcli.errors import UsageError
from sdcli.generation.resolve.resolve import resolve
from sdcli.metadata.embed import image_bytes
from sdcli.metadata.read import read_image
from sdcli.metadata.record import Record
from sdcli.models.registry import load_registry
from sdcli.request.schema import GenerationRequest, ResolvedRequest
from tests.conftest import Run


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


@pytest.mark.parametrize(("dtype", "used"), [("float32", False), ("bfloat16", True)])
def test_only_half_precision_on_the_cpu_uses_it(dtype: str, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCLI_ATTENTION", "sliced")
    model = load_denoiser(load_registry().find("starter"), device="cpu", dtype=dtype)
    kinds = {name: isinstance(p, SlicedSelfAttention) for name, p in model.unet.attn_processors.items()}
    assert {kinds[name] for name in kinds if ".attn1." in name} == {used}
    assert {kinds[name] for name in kinds if ".attn2." in name} == {False}


@pytest.mark.parametrize(
    ("flags", "variable", "asked", "expected"),
    [
        ({"avx512_bf16"}, None, "auto", "sliced"),
        ({"avx512_bf16", "amx_tile"}, None, "auto", "sdpa"),
        ({"amx_tile"}, "sliced", "auto", "sliced"),
        ({"avx2"}, "sdpa", "auto", "sdpa"),
        ({"amx_tile"}, "auto", "auto", "sdpa"),
        ({"avx2"}, "sdpa", "sliced", "sliced"),
    ],
)
def test_the_cpu_chooses_the_attention_unless_the_variable_or_a_record_does(
    flags: set[str], variable: str | None, asked: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sliced, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.delenv("SDCLI_ATTENTION", raising=False)
    if variable:
        monkeypatch.setenv("SDCLI_ATTENTION", variable)
    assert sliced.quick_way(asked) == expected


def test_another_word_in_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCLI_ATTENTION", "flash")
    with pytest.raises(UsageError, match="SDCLI_ATTENTION is 'flash', but should be auto, sliced or sdpa"):
        load_denoiser(load_registry().find("tiny"), device="cpu", dtype="bfloat16")


@pytest.mark.slow
def test_the_record_names_the_attention_and_verifying_uses_it(
    sdcli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = {}
    for way in WAYS:
        monkeypatch.setenv("SDCLI_ATTENTION", way)
        options = ("-m", "tiny", "--seed", "1", "--size", "128x128", "--steps", "2", "--dtype", "bfloat16")
        assert sdcli("generate", "a castle", *options, "-o", f"{way}.png").returncode == 0
        record = read_image(tmp_path / f"{way}.png").record
        assert record is not None
        assert record.provenance["attention"] == way
        pixels[way] = record.provenance["pixels"]
    assert pixels["sliced"] != pixels["sdpa"], "the ways could be mixed up, and the test would not see it"
    for way in WAYS:
        verified = sdcli("generate", "--from", f"{way}.png", "--verify")
        assert verified.stdout.strip() == f"{way}.png: identical", verified.stderr


@pytest.mark.slow
def test_a_record_from_before_the_attention_was_recorded_is_of_the_sliced_one(
    sdcli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDCLI_ATTENTION", "sliced")
    options = ("-m", "tiny", "--seed", "1", "--size", "128x128", "--steps", "2", "--dtype", "bfloat16")
    assert sdcli("generate", "a castle", *options, "-o", "new.png").returncode == 0
    record = read_image(tmp_path / "new.png").record
    assert record is not None
    request = ResolvedRequest.model_validate(dict(record.request))
    facts = {name: value for name, value in record.provenance.items() if name != "attention"}
    with Image.open(tmp_path / "new.png") as image:
        (tmp_path / "old.png").write_bytes(image_bytes(image, "png", Record(request, facts)))
    monkeypatch.setenv("SDCLI_ATTENTION", "sdpa")
    verified = sdcli("generate", "--from", "old.png", "--verify")
    assert verified.stdout.strip() == "old.png: identical", verified.stderr


@pytest.mark.slow
def test_an_image_in_half_precision_stays_close_to_float32() -> None:
    spec = load_registry().find("starter")
    finals = []
    for dtype in ("float32", "bfloat16"):
        request = GenerationRequest(prompt="a castle", seed=3, width=256, height=256, steps=4)
        *_, last = sample(Pipeline.of(load_denoiser(spec, device="cpu", dtype=dtype)), [resolve(request, spec)])
        finals.append(last.latents)
    error = (finals[0] - finals[1]).square().mean().sqrt() / finals[0].square().mean().sqrt()
    assert error < 0.03


def test_plain_attention_has_the_same_images_and_gradients() -> None:
    unet = load_denoiser(load_registry().find("tiny"), device="cpu", dtype="float32").unet.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator)
    states = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)

    def output_and_gradients() -> list[torch.Tensor]:
        unet.zero_grad()
        output = unet(sample, torch.tensor([3, 700]), states, return_dict=False)[0]
        output.square().mean().backward()
        return [output.detach(), *(parameter.grad.clone() for parameter in unet.parameters())]

    usual = output_and_gradients()
    use_plain_small_attention(unet)
    assert all(isinstance(processor, PlainSmallAttention) for processor in unet.attn_processors.values())
    for one, other in zip(usual, output_and_gradients(), strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("queries", "keys", "plain"), [(64, 64, True), (128, 32, True), (256, 32, False), (64, 256, False)]
)
def test_only_few_tokens_are_mixed_plainly(queries: int, keys: int, plain: bool) -> None:
    asked: list[str] = []
    processor = PlainSmallAttention(lambda *_, **__: asked.append("usual"))
    processor._plain = lambda *_, **__: asked.append("plain")
    processor(None, torch.zeros(1, queries, 8), torch.zeros(1, keys, 8))
    assert asked == ["plain" if plain else "usual"]
