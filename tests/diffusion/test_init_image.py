"""Start images, masks, new canvas, variations, second passes: parity with diffusers, and what must stay as it is."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from sdcli.diffusion.init_latents import slerp
from sdcli.diffusion.input_images import InputImages, measure
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.sampling import sample
from sdcli.errors import BadImage, BadOutput, NotFound, UsageError
from sdcli.generation.plan import Limits, plan
from sdcli.generation.resolve.jobs import ResolvedJob, expand
from sdcli.generation.resolve.resolve import resolve
from sdcli.images.pixels import from_pixels
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry, spec_of_folder
from sdcli.request.fields import FileRef
from sdcli.request.input_files import pinned
from sdcli.request.jobs import Line
from sdcli.request.schema import GenerationRequest, parse_request
from sdcli.vae import autoencoder
from sdcli.vae.latent_space import LatentSpace
from tests.oracle import comparable, latents, load_pipeline, prompts, reference_latents
from tests.schedulers import DIFFUSION_SCHEDULERS
from tests.service import generate_images, indices
from tests.tiny import save_tiny_pipeline

STEPS = 6
CAT, CATS = prompts("a cat", seeds=(7,)), prompts("a cat", "a cat")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image.png (64x48) and mask.png: white in the right half."""
    folder = tmp_path_factory.mktemp("start")
    source = np.random.default_rng(0)
    coarse = Image.fromarray(source.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    coarse.resize((64, 48), Image.Resampling.BICUBIC).save(folder / "image.png")
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def nine_channels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("models") / "inpainting", in_channels=9)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"))
    return folder


@cache
def loaded(folder: Path, kind: type) -> tuple[Pipeline, Any]:
    """A model in a pipeline of ours and in one of diffusers."""
    plain = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    return load_pipeline(folder), comparable(kind(**plain.components, requires_safety_checker=False))


@pytest.mark.parametrize("scheduler", DIFFUSION_SCHEDULERS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_start_image_gives_diffusers_latents_bit_for_bit(
    tiny_folder: Path, files: Path, scheduler: str, strength: float
) -> None:
    pipeline, reference = loaded(tiny_folder, StableDiffusionImg2ImgPipeline)
    image = Image.open(files / "image.png")
    fields = {"steps": STEPS, "guidance_scale": 5.0, "scheduler": scheduler, "strength": strength}
    config = pipeline.model.scheduler_config
    expected = reference_latents(reference, CATS, config=config, image=image, **fields)
    assert torch.equal(latents(pipeline, CATS, init_image=str(files / "image.png"), **fields), expected)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", DIFFUSION_SCHEDULERS)
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("channels", [4, 9])
def test_a_mask_gives_diffusers_latents_bit_for_bit(
    tiny_folder: Path, nine_channels: Path, files: Path, scheduler: str, strength: float, channels: int
) -> None:
    pipeline, reference = loaded(tiny_folder if channels == 4 else nine_channels, StableDiffusionInpaintPipeline)
    image, mask = (Image.open(files / name) for name in ("image.png", "mask.png"))
    more = {"image": image, "mask_image": mask, "width": 64, "height": 48, "config": pipeline.model.scheduler_config}
    fields = {"steps": STEPS, "guidance_scale": 5.0, "scheduler": scheduler, "strength": strength}
    # one image: for several, diffusers encodes the init image once, with the first one's generator
    expected = reference_latents(reference, CAT, **fields, **more)
    given = {"init_image": str(files / "image.png"), "mask": str(files / "mask.png")}
    assert torch.equal(latents(pipeline, CAT, **fields, **given), expected)


def generated(pipeline: Pipeline, **fields: Any) -> Image.Image:
    request = resolve(
        parse_request({"prompt": "a cat", "seed": 3, "steps": 4, **fields}), pipeline.model.spec, measure=measure
    )
    (one,) = generate_images(pipeline, [request])
    return from_pixels(one.pixels)


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return Pipeline.of(load_model(load_registry().find("tiny"), device="cpu"))


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("blur", [0, 5])
def test_what_a_mask_keeps_is_the_same_to_the_bit_and_the_rest_is_not(
    tiny: Pipeline, files: Path, inverted: bool, blur: int
) -> None:
    given = {"init_image": str(files / "image.png"), "mask": str(files / "mask.png")}
    result = np.asarray(generated(tiny, **given, invert_mask=inverted, mask_blur=blur))
    before = np.asarray(Image.open(files / "image.png"))
    kept, anew = (slice(32, 64), slice(0, 32)) if inverted else (slice(0, 32), slice(32, 64))
    assert (result[:, kept] == before[:, kept]).all()
    assert (result[:, anew] != before[:, anew]).mean() > 0.5


@pytest.mark.parametrize(
    ("name", "painted"), [("mask_white_strokes_on_transparent.png", True), ("mask_erased_picture.png", False)]
)
def test_a_mask_of_another_tool_changes_what_was_painted_or_erased_alone(
    tiny: Pipeline, name: str, painted: bool
) -> None:
    cases = Path(__file__).parents[1] / "cases" / "generation"
    result = generated(tiny, init_image=str(cases / "start.png"), mask=str(cases / name), steps=2)
    before = np.asarray(Image.open(cases / "start.png").convert("RGB"))
    anew = (np.asarray(Image.open(cases / name))[..., 3] > 0) == painted
    changed = (np.asarray(result) != before).any(axis=2)
    assert not changed[~anew].any()
    assert changed[anew].mean() > 0.5


def test_new_canvas_surrounds_the_image_which_stays_as_it_is(tiny: Pipeline, files: Path) -> None:
    result = generated(tiny, init_image=str(files / "image.png"), extend="left=16,bottom=8")
    assert result.size == (64 + 16, 48 + 8)
    assert result.crop((16, 0, 80, 48)).tobytes() == Image.open(files / "image.png").tobytes()


@pytest.mark.slow
def test_a_latent_file_starts_as_the_image_that_it_was_encoded_from(
    tiny: Pipeline, files: Path, tmp_path: Path, sdcli: Any
) -> None:
    done = sdcli("encode", files / "image.png", "-m", "tiny", "-o", tmp_path / "x.safetensors", "-q")
    assert done.returncode == 0, done.stderr
    fields = {"prompt": "a cat", "seed": 3, "steps": 4, "init_image": str(tmp_path / "x.safetensors")}
    request = resolve(parse_request(fields), tiny.model.spec, measure=measure)
    assert (request.width, request.height, request.strength) == (64, 48, 0.8)
    *_, last = sample(tiny, [request])
    assert last.latents.shape == (1, 4, 6, 8)
    with pytest.raises(UsageError, match="keep their size"):
        resolve(parse_request({**fields, "width": 128}), tiny.model.spec, measure=measure)


def test_an_init_image_is_read_again_only_where_it_has_changed(tiny: Pipeline, files: Path, tmp_path: Path) -> None:
    ref = pinned(FileRef(path=str(files / "image.png")))
    request = resolve(parse_request({"prompt": "x", "init_image": ref.path}), tiny.model.spec, measure=measure)
    images = InputImages()
    assert images.init_image(request) is images.init_image(request.model_copy(update={"init_image": pinned(ref)}))
    (tmp_path / "a").write_bytes(b"one")
    first = pinned(FileRef(path=str(tmp_path / "a")))
    (tmp_path / "a").write_bytes(b"other")
    with pytest.raises(UsageError, match="is another file than the one that was generated with"):
        pinned(first)


def test_an_image_does_not_depend_on_the_other_starts_of_its_batch(tiny: Pipeline, files: Path) -> None:
    given = {"steps": 4, "width": 64, "height": 48, "strength": 0.7}
    starts = [str(files / "image.png"), str(files / "mask.png")]
    asked = [parse_request({"seed": n, "init_image": start, **given}) for n, start in enumerate(starts)]
    requests = [resolve(one, tiny.model.spec) for one in asked]
    together = generate_images(tiny, requests, batch_size=2)
    for n, request in enumerate(requests):
        company = generate_images(tiny, [request, request], batch_size=2)[0]
        assert (together[n].pixels - company.pixels).abs().max() < 2 / 255


def test_what_many_images_begin_with_is_encoded_once(
    tiny: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    moments = autoencoder.moments
    monkeypatch.setattr(autoencoder, "moments", lambda *given, **how: calls.append(how) or moments(*given, **how))
    for name, colour in (("start", "green"), ("mask", "white")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    given = {"prompt": "a cat", "init_image": str(tmp_path / "start.png"), "mask": str(tmp_path / "mask.png")}
    asked = [parse_request({**given, "steps": 2, "seed": seed}) for seed in range(3)]
    requests = [resolve(one, tiny.model.spec, measure=measure) for one in asked]
    generate_images(tiny, requests, batch_size=2)
    assert len(calls) == 1


def test_a_start_that_needs_too_much_memory_is_encoded_in_tiles(
    tiny: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = autoencoder.moments

    def crowded(*given: Any, tiled: bool) -> Any:
        if not tiled:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return moments(*given, tiled=tiled)

    monkeypatch.setattr(autoencoder, "moments", crowded)
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "start.png")
    asked = parse_request({"prompt": "a cat", "init_image": str(tmp_path / "start.png"), "steps": 2, "seed": 1})
    (image,) = generate_images(tiny, [resolve(asked, tiny.model.spec, measure=measure)])
    assert image.fallbacks == ("encoded in tiles: out of memory",)


def test_images_in_memory_give_the_same_image_as_their_files(tiny: Pipeline, files: Path) -> None:
    paths = {"init_image": files / "image.png", "mask": files / "mask.png"}
    from_files = generated(tiny, **{name: str(path) for name, path in paths.items()})
    from_memory = generated(tiny, **{name: path.read_bytes() for name, path in paths.items()})
    assert from_memory.tobytes() == from_files.tobytes()


def test_masked_and_plain_starts_are_painted_in_batches_of_their_own(files: Path) -> None:
    spec = load_registry().find("tiny")
    given = {"init_image": str(files / "image.png"), "strength": 1.0}
    asked = [{}, {"mask": str(files / "mask.png")}, {"extend": "left=8", "width": 72}, {}]
    jobs = [ResolvedJob(n, resolve(parse_request({**given, **one}), spec), spec) for n, one in enumerate(asked)]
    assert indices(plan(jobs, Limits(4))) == [[0, 3], [1], [2]]


def test_a_variation_goes_from_one_seed_to_the_other(tiny: Pipeline) -> None:
    plain, other = generated(tiny), generated(tiny, seed=8)
    variations = [generated(tiny, variation_seed=8, variation_strength=share) for share in (0, 0.3, 1)]
    assert variations[0].tobytes() == plain.tobytes()
    assert variations[1].tobytes() not in (plain.tobytes(), other.tobytes())
    assert variations[2].tobytes() == other.tobytes()


def test_spherical_interpolation_keeps_the_length_of_noise() -> None:
    a, b = torch.randn((2, 4, 32, 32), generator=torch.Generator().manual_seed(0))
    for share in (0.25, 0.5, 0.75):
        assert slerp(a, b, share).norm() == pytest.approx(float(a.norm()), rel=0.05)
    assert torch.allclose(slerp(a, a, 0.5), a, atol=1e-5)


def test_several_variations_count_their_own_seed() -> None:
    fields = {"prompt": "a cat", "seed": 3, "variation_seed": 8, "variation_strength": 0.1}
    jobs = list(expand([Line(0, fields)], {"model": "tiny"}, load_registry(), num_images=3, base_seed=0))
    assert [(job.request.seed, job.request.variation_seed) for job in jobs if isinstance(job, ResolvedJob)] == [
        (3, 8),
        (3, 9),
        (3, 10),
    ]


def test_a_second_pass_is_the_first_image_enlarged_and_painted_on(tiny: Pipeline, tmp_path: Path) -> None:
    assert generated(tiny, upscale="2x:0.5").size == (128, 128)
    assert generated(tiny, upscale="1.5x:1:latent").size == (96, 96)
    *steps, last = sample(tiny, [resolve(parse_request({"seed": 3, "upscale": "2x:0.5"}), tiny.model.spec)])
    assert [step.index for step in steps] + [last.index] == [0, 1, 2, 3, 0, 1]
    assert last.latents.shape == (1, 4, 16, 16)
    plain = generated(tiny)
    assert generated(tiny, upscale="2x:0.25").resize((64, 64)).tobytes() != plain.tobytes()


def test_a_first_pass_that_is_no_image_is_not_painted_on(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = LatentSpace.decode

    def broken(space: LatentSpace, x: Tensor, **how: Any) -> Tensor:
        return decode(space, x, **how) * (torch.nan if x.shape[-1] == 8 else 1)

    monkeypatch.setattr(LatentSpace, "decode", broken)
    with pytest.raises(BadOutput):
        generated(tiny, upscale="2x:0.5")


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_rescale_equals_diffusers(tiny_folder: Path, rescale: float) -> None:
    pipeline, reference = loaded(tiny_folder, StableDiffusionPipeline)
    fields = {"steps": STEPS, "guidance_scale": 5.0, "scheduler": "ddim", "width": 64, "height": 64}
    fields |= {"guidance_rescale": rescale}
    expected = reference_latents(reference, CATS, config=pipeline.model.scheduler_config, **fields)
    got = latents(pipeline, CATS, **fields)
    assert torch.equal(got, expected)


def test_guidance_over_all_steps_and_a_level_schedule_are_plain_guidance(tiny: Pipeline) -> None:
    plain = generated(tiny, guidance_scale=5.0)
    assert generated(tiny, guidance_scale="5..5").tobytes() == plain.tobytes()
    assert generated(tiny, guidance_scale=5.0, guidance_interval="0-1").tobytes() == plain.tobytes()
    assert generated(tiny, guidance_scale="9..1").tobytes() != plain.tobytes()
    assert generated(tiny, guidance_scale=5.0, guidance_interval="0.5-").tobytes() != plain.tobytes()


def test_outside_its_interval_guidance_computes_no_unconditional_half(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = tiny.model.unet.forward

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(x))
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(tiny.model.unet, "forward", counted)
    generated(tiny, steps=10, guidance_interval="0.2-0.8")
    assert rows == [1, 1, 2, 2, 2, 2, 2, 2, 1, 1]


REFUSED = [
    ({"strength": 0.5}, "--strength has no effect without --init-image"),
    ({"mask": "mask.png"}, "--mask has no effect without --init-image"),
    ({"init_image": "image.png", "mask_blur": 3}, "--mask-blur has no effect without --mask or --extend"),
    ({"init_image": "image.png", "invert_mask": True}, "--invert-mask has no effect without --mask"),
    ({"init_image": "image.png", "strength": 0.1, "steps": 4}, "leaves no step"),
    ({"init_image": "image.png", "extend": "left=9"}, "left should be a multiple of 8"),
    ({"init_image": "image.png", "extend": "left=8", "width": 64}, "makes the image 72x48"),
    ({"init_image": "image.png", "extend": "left=8", "upscale": "2x"}, "--upscale does not go with"),
    ({"init_image": "image.png", "extend": "up=8"}, "extend: is written as left=64,top=32"),
    ({"init_image": "image.png", "extend": "left=0"}, "extend: adds nothing"),
    ({"upscale": "2"}, None),
    ({"upscale": "0.5x"}, "upscale.factor"),
    ({"upscale": "big"}, "upscale: is written as 2x"),
    ({"upscale": "2x:0.1"}, "upscale: 0.1 of 4 steps leaves no step"),
    ({"guidance_interval": "0.8-0.2"}, "should end after it starts"),
    ({"guidance_interval": "0.2-0.8", "guidance_scale": 1}, "guidance_interval has no effect at guidance scale 1"),
    ({"guidance_scale": "7..x"}, "guidance_end"),
    ({"variation_seed": 3}, "--variation-seed has no effect without --variation-strength"),
    ({"variation_seed": 0}, "--variation-seed has no effect without --variation-strength"),
    ({"variation_seed": 3, "variation_strength": 0}, None),
    ({"init_image": "image.png", "mask_blur": 0}, "--mask-blur has no effect without --mask or --extend"),
    ({"width": 8192, "height": 8192, "upscale": "2x"}, "an image of 16384x16384 would have more than"),
]


@pytest.mark.parametrize(("fields", "problem"), REFUSED)
def test_what_would_have_no_effect_is_refused(files: Path, fields: dict[str, Any], problem: str | None) -> None:
    here = {name: str(files / value) if str(value).endswith(".png") else value for name, value in fields.items()}

    def resolved() -> GenerationRequest:
        return resolve(parse_request(here), load_registry().find("tiny"), measure=measure)

    if problem is None:
        assert resolved()
        return
    with pytest.raises(UsageError, match=problem):
        resolved()


def test_an_inpainting_model_needs_a_mask(nine_channels: Path) -> None:
    with pytest.raises(UsageError, match="is an inpainting model; it needs --init-image, and --mask or --extend"):
        resolve(GenerationRequest(prompt="a cat"), spec_of_folder(nine_channels))


def test_broken_starts_are_told_apart(tiny: Pipeline, files: Path, tmp_path: Path) -> None:
    image = str(files / "image.png")
    Image.new("L", (64, 48)).save(tmp_path / "black.png")
    Image.new("L", (32, 48), 255).save(tmp_path / "narrow.png")
    (tmp_path / "cut.png").write_bytes((files / "image.png").read_bytes()[:200])
    with pytest.raises(UsageError, match="the mask is black all over"):
        generated(tiny, init_image=image, mask=str(tmp_path / "black.png"))
    Image.new("L", (64, 48), 255).save(tmp_path / "white.png")
    with pytest.raises(UsageError, match=r"the mask is white all over, .* without --invert-mask"):
        generated(tiny, init_image=image, mask=str(tmp_path / "white.png"), invert_mask=True)
    with pytest.raises(UsageError, match="the mask is 32x48 pixels, the init image 64x48"):
        generated(tiny, init_image=image, mask=str(tmp_path / "narrow.png"))
    with pytest.raises(BadImage, match=r"cut\.png"):
        generated(tiny, init_image=str(tmp_path / "cut.png"))
    with pytest.raises(NotFound, match=r"none\.png"):
        generated(tiny, init_image=str(tmp_path / "none.png"))


def test_another_image_under_the_same_name_is_not_painted_from(tiny: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "start.png"
    Image.new("RGB", (64, 64), "red").save(path)
    request = resolve(parse_request({"init_image": str(path)}), tiny.model.spec, measure=measure)
    assert parse_request(request.typed()).typed() == request.typed()
    Image.new("RGB", (64, 64), "blue").save(path)
    with pytest.raises(UsageError, match=r"start\.png is another file than the one that was generated with"):
        InputImages().init_image(request)


@pytest.mark.slow
def test_a_start_from_stdin_is_painted_recorded_and_verified(files: Path, tmp_path: Path, sdcli: Any) -> None:
    begin = ["generate", "a cat", "-m", "tiny", "--steps", "3", "--seed", "5", "-q"]
    with open(files / "image.png", "rb") as piped:
        first = sdcli(*begin, "--init-image", "-", "-o", "a.png", stdin=piped)
    assert first.returncode == 0, first.stderr
    second = sdcli(*begin, "--init-image", files / "image.png", "-o", "b.png")
    assert second.returncode == 0, second.stderr
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()
    verified = sdcli("generate", "--from", "b.png", "--verify")
    assert verified.returncode == 0, verified.stderr
    assert "identical" in verified.stdout
    again = sdcli("generate", "--from", "b.png", "-o", "c.png", "-q")
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "b.png").read_bytes(), again.stderr
