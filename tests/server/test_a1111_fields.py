"""What the fields of AUTOMATIC1111's dialect mean, without a server."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays
from PIL import Image

from sdcli.models.registry import load_registry
from sdcli.request.schedulers import AUTOMATIC, SCHEDULERS
from sdcli.server.a1111_fields import request_fields
from sdcli.server.a1111_images import filled, image_fields
from sdcli.server.a1111_models import Img2Img, Txt2Img
from sdcli.server.a1111_options import Options
from sdcli.server.native import ApiError
from sdcli.server.settings import ServerSettings

REGISTRY = load_registry()


def fields(*, model: str = "tiny", **body: Any) -> dict[str, Any]:
    return request_fields(Txt2Img(**body), Options(model), REGISTRY, ServerSettings())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_reached_by_its_sampler_and_schedule(name: str) -> None:
    row = SCHEDULERS[name]
    schedule = row.a1111_type or "Uniform"
    for spelled in (schedule, schedule.lower()):
        assert fields(sampler_name=row.a1111, scheduler=spelled)["scheduler"] == name
    if row.a1111_type is not None:
        assert fields(sampler_name=f"{row.a1111} {row.a1111_type}", scheduler="automatic")["scheduler"] == name


@pytest.mark.parametrize("schedule", [None, "", "automatic", "Automatic"])
def test_automatic_is_what_the_web_ui_means_by_it(schedule: str | None) -> None:
    for sampler, means in AUTOMATIC.items():
        known = [row for row in SCHEDULERS.values() if (row.a1111, row.a1111_type) == (sampler, means)]
        if known:
            found = SCHEDULERS[fields(sampler_name=sampler, scheduler=schedule)["scheduler"]]
            assert found.a1111_type == means
        else:
            with pytest.raises(ApiError, match="send Uniform"):
                fields(sampler_name=sampler, scheduler=schedule)
    assert fields(sampler_name="Euler a", scheduler=schedule)["scheduler"] == "euler-a"


def test_euler_is_that_of_flow_matching_for_such_a_model() -> None:
    assert fields(model="sd3-medium", sampler_name="Euler")["scheduler"] == "flow-euler"


def test_eta_without_a_sampler_is_that_of_the_models_own() -> None:
    own = {name: SCHEDULERS[spec.defaults.scheduler] for name, spec in REGISTRY.models.items()}
    assert any(row.uses_eta for row in own.values())
    assert any(row.stochastic for row in own.values())
    for name, row in own.items():
        if row.stochastic and not row.uses_eta:
            with pytest.raises(ApiError, match="eta: "):
                fields(model=name, eta=0.5)
        else:
            assert fields(model=name, eta=0.5).get("eta") == (0.5 if row.uses_eta else None)
        assert "scheduler" not in fields(model=name, eta=1)


@pytest.mark.parametrize("comments", [{"a": float("nan")}, {"a": 1}])
def test_comments_are_refused_since_nothing_would_hold_them(comments: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="comments"):
        fields(comments=comments)
    assert "comments" not in fields(comments={})


def test_what_is_omitted_or_random_is_left_to_the_model() -> None:
    assert fields(seed=-1, subseed=5, subseed_strength=0, negative_prompt="", clip_skip=1) == {
        "prompt": "",
        "num_images": 1,
        "model": "tiny",
    }


def test_a_second_pass_by_size_needs_the_same_proportions() -> None:
    second = {"enable_hr": True, "width": 64, "height": 128}
    assert fields(**second, hr_resize_x=128, hr_resize_y=256)["upscale"]["factor"] == 2
    with pytest.raises(ApiError, match="hr_resize_x"):
        fields(**second, hr_resize_x=128, hr_resize_y=128)


@pytest.mark.parametrize(
    ("upload", "mode", "wanted"),
    [
        ((512, 256), 0, (128, 64)),
        ((512, 256), 1, (128, 64)),
        ((512, 512), 1, (128, 128)),
        ((512, 512), 0, (128, 64)),
        ((64, 32), 1, (64, 32)),
        ((999, 7), 1, (999, 7)),
    ],
)
def test_an_image_is_filled_at_the_size_that_it_will_have(
    upload: tuple[int, int], mode: int, wanted: tuple[int, int]
) -> None:
    mask = Image.new("L", upload, 0)
    mask.paste(255, (0, 0, upload[0] // 2, upload[1]))
    texts = []
    for image in (Image.new("RGB", upload, "red"), mask):
        file = io.BytesIO()
        image.save(file, "PNG")
        texts.append(base64.b64encode(file.getvalue()).decode())
    body = Img2Img(init_images=texts[:1], mask=texts[1], width=128, height=64, resize_mode=mode)
    made = image_fields(body, ServerSettings())
    for name in ("init_image", "mask"):
        assert Image.open(io.BytesIO(made[name].data)).size == wanted


@given(
    colours=arrays(np.uint8, (24, 16, 3)),
    mask=arrays(np.bool_, (24, 16)).filter(lambda mask: 0 < mask.sum() < mask.size),
)
def test_a_filled_image_keeps_what_is_not_masked_and_knows_nothing_of_the_rest(
    colours: np.ndarray, mask: np.ndarray
) -> None:
    white = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
    result = np.asarray(filled(Image.fromarray(colours), white))
    assert (result[~mask] == colours[~mask]).all()
    other = np.where(mask[..., None], 255 - colours, colours)
    assert (np.asarray(filled(Image.fromarray(other), white)) == result).all()


def test_a_filled_image_has_the_colours_from_around() -> None:
    image = Image.new("RGB", (64, 64), (200, 40, 10))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    image.paste("white", (16, 16, 48, 48))
    result = np.asarray(filled(image, mask), dtype=int)
    assert abs(result - [200, 40, 10]).max() <= 12
