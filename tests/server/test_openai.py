"""OpenAI's images API, as its own client library sees it."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdcli.server.steps import partial_steps
from tests.server.running import RunningServer


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as made:
        yield made


def decoded(b64_json: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json or "")))


def file_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def post(server: RunningServer, **body: Any) -> httpx.Response:
    return server.http.post("/v1/images/generations", json={"prompt": "a fox", "model": "tiny", **body})


def cancelled(server: RunningServer) -> int:
    """How many jobs were cancelled so far."""
    match = re.search(
        r'^sdcli_jobs_ended_total{state="cancelled"} (\d+)', server.http.get("/metrics").text, re.MULTILINE
    )
    return int(match[1]) if match else 0


def test_an_image_has_the_bytes_of_the_native_api(server: RunningServer, client: openai.OpenAI) -> None:
    extra = {"seed": 7, "num_inference_steps": 3, "guidance_scale": 2.5, "negative_prompt": "blue"}
    made = client.images.generate(prompt="a fox", model="tiny", size="72x64", n=2, extra_body=extra)
    native = {"prompt": "a fox", "steps": 3, "guidance_scale": 2.5, "negative_prompt": "blue", "size": "72x64"}
    files = server.generate_all(**native, seed=7, num_images=2)
    assert made.data is not None
    assert [base64.b64decode(one.b64_json or "") for one in made.data] == files
    assert (made.size, made.output_format, made.data[1].seed) == ("72x64", "png", 8)  # type: ignore[attr-defined]


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_output_compression_is_the_quality_of_the_file(client: openai.OpenAI, format: Any) -> None:
    sizes = []
    for quality in (10, 90):
        made = client.images.generate(
            prompt="a fox", model="tiny", output_format=format, output_compression=quality, extra_body={"seed": 1}
        )
        assert made.data is not None
        assert decoded(made.data[0].b64_json).format == format.upper()
        sizes.append(len(made.data[0].b64_json or ""))
    assert sizes[0] < sizes[1]


def test_an_address_of_an_image_leads_to_it_and_cannot_be_made_up(server: RunningServer, client: openai.OpenAI) -> None:
    made = client.images.generate(
        prompt="a fox", model="tiny", response_format="url", n=2, output_format="webp", extra_body={"seed": 1}
    )
    assert made.data is not None
    first, second = (one.url or "" for one in made.data)
    files = [httpx.get(address) for address in (first, second)]
    assert [(one.status_code, one.headers["content-type"]) for one in files] == [(200, "image/webp")] * 2
    assert files[0].content != files[1].content
    id, number, rest = first.rpartition("/")[2].split(".", 2)
    assert httpx.get(f"{server.url}/v1/images/files/{id}.{int(number) + 1}.{rest}").status_code == 404


@pytest.mark.slow
def test_partial_images_come_while_the_image_is_denoised(server: RunningServer, client: openai.OpenAI) -> None:
    before = server.metric("sdcli_images_total")
    shown: list[Image.Image] = []
    extra = {"num_inference_steps": 80, "seed": 3}
    for event in client.images.generate(
        prompt="a fox", model="tiny", size="128x64", stream=True, partial_images=3, extra_body=extra
    ):
        shown.append(decoded(event.b64_json))
        if event.type == "image_generation.partial_image":
            assert event.partial_image_index == len(shown) - 1
        if len(shown) == 1:
            assert server.metric("sdcli_images_total") == before, "the first one is sent before the image is done"
            assert server.metric("sdcli_jobs_running") == 1
    assert event.type == "image_generation.completed"
    assert event.usage.total_tokens == 0
    assert [image.size for image in shown] == [(128, 64)] * 4
    assert len({image.convert("RGB").tobytes() for image in shown}) == 4, "each is of another step"
    whole = server.generate(prompt="a fox", size="128x64", steps=80, seed=3)
    assert decoded(event.b64_json).tobytes() == Image.open(io.BytesIO(whole)).tobytes(), "watching changes nothing"


def test_a_mask_is_generated_anew_where_it_is_transparent_and_kept_elsewhere(client: openai.OpenAI) -> None:
    image = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    mask = Image.new("RGBA", image.size, "white")  # sdcli's own rule would take white on transparent for strokes
    mask.paste((255, 255, 255, 0), (48, 0, 96, 64))
    made = client.images.edit(
        image=("a.png", file_of(image)), mask=("m.png", file_of(mask)), prompt="a fox", model="tiny"
    )
    assert made.data is not None
    result = decoded(made.data[0].b64_json)
    assert result.size == (96, 64), "the size is the image's own"
    kept, anew = (0, 0, 48, 64), (52, 0, 96, 64)
    assert result.crop(kept).tobytes() == image.crop(kept).tobytes()
    assert result.crop(anew).tobytes() != image.crop(anew).tobytes()


def test_an_edit_streams_too_and_strength_says_how_much_changes(client: openai.OpenAI) -> None:
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    distances = []
    for strength in (0.3, 1.0):
        extra = {"strength": strength, "seed": 1, "num_inference_steps": 10}
        events = list(
            client.images.edit(
                image=[("a.png", file_of(image))], prompt="a fox", model="tiny", stream=True, extra_body=extra
            )
        )
        assert [event.type for event in events] == ["image_edit.completed"]
        result = decoded(events[0].b64_json).convert("RGB")
        distances.append(sum(abs(a - b) for a, b in zip(result.tobytes(), image.tobytes(), strict=True)))
    assert distances[0] < distances[1]


DEFAULTS = {
    "background": ("auto", "transparent"),
    "moderation": ("auto", "low"),
    "quality": ("standard", "high"),
    "style": ("vivid", "natural"),
    "size": ("auto", "64x60"),
    "n": (1, 11),
    "stream": (False, "perhaps"),
    "partial_images": (0, 2),
    "response_format": ("b64_json", "hex"),
    "output_compression": (100, 50),
    "num_inference_steps": (2, 0),
    "guidance_scale": (None, -1),
    "seed": (0, -1),
    "scheduler": ("ddim", "magic"),
    "user": ("someone", 5),
    "prompt_syntax": ("plain", "html"),
}
"""Field -> a value that is taken, and one that cannot be honoured."""


def test_every_default_of_a_client_is_taken(server: RunningServer) -> None:
    answer = post(server, **{name: taken for name, (taken, _) in DEFAULTS.items()})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("field", DEFAULTS)
def test_what_cannot_be_honoured_is_refused_by_name(server: RunningServer, field: str) -> None:
    answer = post(server, **{field: DEFAULTS[field][1]})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), answer.text
    names = {"size": "height"}
    assert names.get(field, field) in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


def test_an_unknown_field_is_refused_by_name(server: RunningServer) -> None:
    error = post(server, true_cfg_scale=4.0).json()["error"]
    assert (error["param"], error["message"]) == ("true_cfg_scale", "true_cfg_scale: there is no such field here")


def test_the_models_are_those_that_a_request_can_name(server: RunningServer, client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "tiny", "the one that was loaded at the start comes first"
    assert {"starter", "tiny"} <= set(names)
    assert "sd15" not in names, "its files are not on this machine"
    assert client.models.retrieve("starter").owned_by == "sdcli"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a fox", model="../models/tiny")
    assert caught.value.code == "model_not_found"
    assert server.http.get("/v1/images/generations").json()["error"]["code"] == "method_not_allowed"
    assert server.http.get("/v1/chat/completions").json()["error"]["code"] == "not_found"


def test_a_client_that_goes_away_cancels_its_job(server: RunningServer) -> None:
    before = cancelled(server)
    for stream in (False, True):
        body = {"prompt": "a fox", "model": "tiny", "num_inference_steps": 999, "size": "256x256", "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=1.0)
        before, until = before + 1, time.monotonic() + 60
        while cancelled(server) < before:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_render_that_fails_is_not_rendered_again(strict_server: RunningServer) -> None:
    before = strict_server.metric("sdcli_jobs_accepted_total")
    token = strict_server.http.headers["authorization"].partition(" ")[2]
    extra = {"num_inference_steps": 999}
    client = openai.OpenAI(base_url=f"{strict_server.url}/v1", api_key=token, max_retries=2)
    with client, pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="a fox", model="tiny", size="256x256", extra_body=extra)
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "took longer than 1.5 s" in caught.value.message
    assert strict_server.metric("sdcli_jobs_accepted_total") == before + 1


def test_an_error_of_a_stream_is_raised_by_the_client(strict_server: RunningServer) -> None:
    token = strict_server.http.headers["authorization"].partition(" ")[2]
    extra = {"num_inference_steps": 999}
    with openai.OpenAI(base_url=f"{strict_server.url}/v1", api_key=token) as client:
        events = client.images.generate(prompt="a", model="tiny", size="256x256", stream=True, extra_body=extra)
        with pytest.raises(openai.APIError, match="took longer than"):
            list(events)


def test_a_full_queue_and_every_guard_answer_in_the_dialect(strict_server: RunningServer) -> None:
    http = strict_server.http
    long = {"requests": [{"prompt": "", "model": "tiny", "steps": 999, "size": "256x256"}]}
    busy = [http.post("/v1/jobs", json=long).json()["id"] for _ in range(2)]
    full = post(strict_server)
    assert (full.status_code, full.headers["x-should-retry"]) == (429, "true")
    assert int(full.headers["retry-after"]) >= 1
    for id in busy:
        http.delete(f"/v1/jobs/{id}")
    body = {"prompt": "a fox"}
    cases: dict[int, dict[str, Any]] = {
        401: {"json": body, "headers": {"authorization": "Bearer wrong"}},
        403: {"json": body, "headers": {"origin": "https://evil.example"}},
        413: {"json": {"prompt": "x" * 20_000}},
        415: {"content": json.dumps(body), "headers": {"content-type": "text/plain"}},
        400: {"content": "{", "headers": {"content-type": "application/json"}},
    }
    answers = {status: http.post("/v1/images/generations", **case) for status, case in cases.items()}
    answers[429] = full
    for status, answer in answers.items():
        assert answer.status_code == status, answer.text
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"]


def test_an_address_of_an_image_needs_no_token(strict_server: RunningServer) -> None:
    answer = post(strict_server, num_inference_steps=1, response_format="url")
    assert answer.status_code == 200, answer.text
    assert httpx.get(answer.json()["data"][0]["url"]).headers["content-type"] == "image/png"
    assert httpx.get(f"{strict_server.url}/v1/images/files/job-00.0.{'0' * 32}.png").status_code == 404


def test_an_address_begins_with_https_where_the_proxy_says_that_the_client_uses_it(server: RunningServer) -> None:
    body = {"prompt": "a", "model": "tiny", "num_inference_steps": 1, "response_format": "url"}
    found = {}
    for protocol in ("https", "http", "javascript"):
        headers = {"x-forwarded-proto": protocol, "host": "localhost:1234"}
        made = server.http.post("/v1/images/generations", json=body, headers=headers).json()
        found[protocol] = made["data"][0]["url"].partition("/v1/")[0]
    plain = "http://localhost:1234"
    assert found == {"https": "https://localhost:1234", "http": plain, "javascript": plain}


@given(steps=st.integers(1, 1000), count=st.integers(0, 3))
def test_there_are_as_many_as_fit_and_none_after_the_last_step(steps: int, count: int) -> None:
    chosen = partial_steps(steps, count)
    assert all(1 <= step < steps for step in chosen)
    assert len(chosen) == count or steps <= count + 1
