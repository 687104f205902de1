"""The calls of programs that speak AUTOMATIC1111's dialect, in their order and with the bodies that they send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.running import RunningServer


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of its own, which puts the options back."""
    with httpx.Client(base_url=server.url, timeout=120) as client:
        options = client.get("/sdapi/v1/options").json()
        yield client
        assert client.post("/sdapi/v1/options", json=options).status_code == 200


def ok(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_open_webui(http: httpx.Client) -> None:
    """`routers/images.py`: the address is verified, a model chosen, an image generated."""
    empty = {"authorization": ""}
    options = ok(http.get("/sdapi/v1/options", headers=empty))
    models = [(one["title"], one["model_name"]) for one in ok(http.get("/sdapi/v1/sd-models", headers=empty))]
    assert ("starter", "starter") in models
    whole = {**options, "sd_model_checkpoint": "starter"}
    ok(http.post("/sdapi/v1/options", json=whole, headers=empty))
    assert ok(http.get("/sdapi/v1/options"))["sd_model_checkpoint"] == "starter"
    body = {"prompt": "a red apple", "batch_size": 1, "width": 64, "height": 64, "steps": 2, "negative_prompt": "blue"}
    made = ok(http.post("/sdapi/v1/txt2img", json={**body, "cfg_scale": 3}, headers=empty))
    assert made["images"][0].startswith("iVBOR")
    assert json.loads(made["info"])["sd_model_name"] == "starter"


def test_open_webui_by_openai(http: httpx.Client) -> None:
    """The same program with the OpenAI engine: generations, and edits as a form."""
    headers = {"authorization": "Bearer none"}
    body = {"model": "tiny", "prompt": "a fox", "n": 1, "size": "64x64", "response_format": "b64_json"}
    made = ok(http.post("/v1/images/generations", json=body, headers=headers))
    assert made["data"][0].keys() == {"b64_json", "seed"}
    files = {"image": ("a.png", httpx.get(_address(http)).content, "image/png")}
    edited = ok(http.post("/v1/images/edits", data={**body, "n": "1"}, files=files, headers=headers))
    assert edited["data"][0]["b64_json"] != made["data"][0]["b64_json"]


def _address(http: httpx.Client) -> str:
    body = {"model": "tiny", "prompt": "a fox", "response_format": "url"}
    address: str = ok(http.post("/v1/images/generations", json=body))["data"][0]["url"]
    return address


def test_sillytavern(http: httpx.Client) -> None:
    """`src/endpoints/stable-diffusion.js`: a ping, lists, a model, an image, and interrupt where its caller leaves."""
    auth = {"authorization": "Basic Og=="}
    assert http.get("/sdapi/v1/options", headers=auth).is_success
    lists = {"samplers": "name", "schedulers": "name", "sd-models": "title", "sd-vae": "model_name"}
    lists |= {"upscalers": "name", "latent-upscale-modes": "name"}
    found = {name: [one[key] for one in ok(http.get(f"/sdapi/v1/{name}"))] for name, key in lists.items()}
    assert "DDIM" in found["samplers"]
    assert "karras" in found["schedulers"]
    assert http.get("/sdapi/v1/sd-modules").status_code == 404, "Forge's list, whose failure it expects"
    ok(http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "starter"}, headers=auth))
    state = ok(http.get("/sdapi/v1/progress", headers=auth))
    assert (state["progress"], state["state"]["job_count"]) == (0.0, 0), "what it waits for after a change of the model"
    assert "forge_preset" not in ok(http.get("/sdapi/v1/options"))
    body = {
        "url": "http://localhost:7860",
        "auth": "me:secret",
        "prompt": "a red apple",
        "negative_prompt": "blurry",
        "sampler_name": "DDIM",
        "scheduler": "automatic",
        "steps": 2,
        "cfg_scale": 3,
        "width": 64,
        "height": 64,
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": "Latent",
        "hr_scale": 1,
        "hr_additional_modules": [],
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }
    made = http.post("/sdapi/v1/txt2img", json=body, headers=auth)
    assert ok(made)["images"]
    assert "secret" not in made.text
    assert "nothing was saved" in json.loads(made.json()["info"])["comments"]
    assert ok(http.post("/sdapi/v1/interrupt", headers=auth)) == {}
