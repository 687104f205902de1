"""The API of AUTOMATIC1111's web UI, as the clients that speak it see it."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import webuiapi
from PIL import Image

from tests.server.conftest import TOKEN
from tests.server.running import RunningServer

API = "/sdapi/v1"
INFO_KEYS = {
    *("prompt", "all_prompts", "negative_prompt", "all_negative_prompts", "seed", "all_seeds", "subseed"),
    *("all_subseeds", "subseed_strength", "width", "height", "sampler_name", "cfg_scale", "steps", "batch_size"),
    *("restore_faces", "face_restoration_model", "sd_model_name", "sd_model_hash", "sd_vae_name", "sd_vae_hash"),
    *("seed_resize_from_w", "seed_resize_from_h", "denoising_strength", "extra_generation_params"),
    *("index_of_first_image", "infotexts", "styles", "job_timestamp", "clip_skip"),
    *("is_using_inpainting_conditioning", "version"),
}


@pytest.fixture
def api(server: RunningServer) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{server.url}{API}", sampler="DDIM", steps=3)


def post(server: RunningServer, call: str, **body: Any) -> httpx.Response:
    return server.http.post(f"{API}/{call}", json=body)


def text_of(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def in_thread(call: Callable[[], httpx.Response]) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    return thread, answers


def until(condition: Callable[[], Any]) -> Any:
    ends = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < ends
        time.sleep(0.05)
    return found


def test_images_have_the_bytes_of_the_native_api_and_info_has_their_seeds(
    server: RunningServer, api: webuiapi.WebUIApi
) -> None:
    made = api.txt2img(prompt="a fox", negative_prompt="blue", seed=5, width=64, height=72, n_iter=2, batch_size=2)
    native = {"prompt": "a fox", "negative_prompt": "blue", "steps": 3, "guidance_scale": 7.0, "scheduler": "ddim"}
    files = server.generate_all(**native, eta=1.0, size="64x72", seed=5, num_images=4)
    assert [base64.b64decode(one) for one in made.json["images"]] == files
    assert made.info.keys() >= INFO_KEYS
    assert (made.info["all_seeds"], made.info["seed"], made.info["batch_size"]) == ([5, 6, 7, 8], 5, 2)
    assert made.info["all_prompts"] == ["a fox"] * 4
    assert [image.info["parameters"] for image in made.images] == made.info["infotexts"]
    assert (made.parameters["seed"], made.info["sampler_name"], made.info["sd_model_name"]) == (5, "DDIM", "tiny")


def test_a_variation_is_that_of_sdcli(server: RunningServer, api: webuiapi.WebUIApi) -> None:
    made = api.txt2img(prompt="a", seed=5, subseed=9, subseed_strength=0.3, width=64, height=64, batch_size=2, eta=0)
    fields = {"prompt": "a", "seed": 5, "variation_strength": 0.3, "steps": 3, "guidance_scale": 7.0, "eta": 0.0}
    files = server.generate_all(**fields, scheduler="ddim", variation_seed=9, num_images=2)
    assert [base64.b64decode(one) for one in made.json["images"]] == files
    assert (made.info["all_seeds"], made.info["all_subseeds"]) == ([5, 5], [9, 10])
    random = api.txt2img(prompt="a", width=64, height=64)
    assert random.info["seed"] >= 0
    assert (
        api.txt2img(prompt="a", width=64, height=64, seed=random.info["seed"]).json["images"] == random.json["images"]
    )


def test_a_second_pass_is_an_upscale(server: RunningServer, api: webuiapi.WebUIApi) -> None:
    for upscaler, how in {"Latent": "latent", "Lanczos": "pixel"}.items():
        second = {"enable_hr": True, "hr_upscaler": upscaler, "hr_scale": 1.5, "denoising_strength": 0.5}
        made = api.txt2img(prompt="a", seed=1, width=64, height=64, steps=4, eta=0, **second)
        upscale = {"factor": 1.5, "strength": 0.5, "how": how}
        native = {"prompt": "a", "steps": 4, "guidance_scale": 7.0, "scheduler": "ddim", "upscale": upscale}
        assert base64.b64decode(made.json["images"][0]) == server.generate(**native)
        assert made.image.size == (96, 96)


def test_a_mask_is_white_where_it_is_generated_anew(server: RunningServer, api: webuiapi.WebUIApi) -> None:
    image = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    left, right = (0, 0, 48, 64), (48, 0, 96, 64)
    white, brush = Image.new("L", image.size, 0), Image.new("RGBA", image.size, (0, 0, 0, 0))
    white.paste(255, left)
    brush.paste((0, 0, 0, 255), left)  # what the web UI's brush makes, whatever its colour
    common = {"images": [image], "prompt": "a", "seed": 1, "inpaint_full_res": False, "width": 96, "height": 64}
    for mask in (white, brush, white.resize((48, 32))):
        result = api.img2img(mask_image=mask, **common).image
        assert result.crop(right).tobytes() == image.crop(right).tobytes()
        assert result.crop(left).tobytes() != image.crop(left).tobytes()
    inverted = api.img2img(mask_image=white, inpainting_mask_invert=1, **common).image
    assert inverted.crop(left).tobytes() == image.crop(left).tobytes()
    fills = {api.img2img(mask_image=white, inpainting_fill=fill, **common).image.tobytes() for fill in (0, 1)}
    assert len(fills) == 2, "to fill the masked part is another start than the original"


def test_an_image_is_stretched_or_cropped(api: webuiapi.WebUIApi) -> None:
    image = Image.new("RGB", (128, 64), "red")
    image.paste("blue", (0, 0, 32, 64))
    results = [
        api.img2img(images=[image], prompt="a", seed=1, width=64, height=64, resize_mode=mode, denoising_strength=0.34)
        for mode in (0, 1)
    ]
    assert [one.image.size for one in results] == [(64, 64)] * 2
    assert results[0].image.tobytes() != results[1].image.tobytes()
    assert results[0].parameters["init_images"] is None


REFUSED = {
    "styles": ["photo"],
    "script_name": "xyz plot",
    "alwayson_scripts": {"ADetailer": {"args": [True]}},
    "restore_faces": True,
    "tiling": True,
    "hr_second_pass_steps": 7,
    "hr_upscaler": "R-ESRGAN 4x+",
    "hr_sampler_name": "Heun",
    "seed_resize_from_w": 64,
    "s_churn": 1.0,
    "infotext": "a fox\nSteps: 3",
    "batch_size": 0,
    "steps": True,
    "scheduler": "Beta",
    "override_settings": {"sd_vae": "other.safetensors"},
    "firstpass_image": "x",
    "distilled_cfg_scale": 3.5,
    "no_such_field": 1,
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(server: RunningServer, field: str) -> None:
    answer = post(server, "txt2img", **{"prompt": "a", "enable_hr": True, "steps": 3, field: REFUSED[field]})
    body = answer.json()
    assert answer.status_code in (400, 404, 422), answer.text
    assert body.keys() == {"error", "detail", "body", "errors"}
    assert field in body["detail"]


@pytest.mark.parametrize(
    ("field", "value"),
    {"inpainting_fill": 2, "inpaint_full_res": True, "resize_mode": 2, "mask_blur_x": 9, "init_images": []}.items(),
)
def test_what_masks_cannot_do_is_refused_by_name(server: RunningServer, field: str, value: Any) -> None:
    image = text_of(Image.new("RGB", (64, 64), "red"))
    body = {"init_images": [image], "mask": image, "mask_blur": 4, field: value}
    answer = post(server, "img2img", **body)
    assert answer.status_code in (400, 404)
    assert field in answer.json()["body"]


def test_no_address_and_no_path_is_opened(server: RunningServer) -> None:
    for image in ("/etc/passwd", "http://127.0.0.1:1/a.png", "file:///etc/passwd"):
        answer = post(server, "img2img", init_images=[image], prompt="a")
        assert (answer.status_code, answer.json()["body"]) == (400, "init_images")
    for model in ("../tiny", "/etc/passwd", "."):
        answer = post(server, "txt2img", prompt="a", override_settings={"sd_model_checkpoint": model})
        assert (answer.status_code, answer.json()["error"]) == (404, "model_not_found")


@pytest.mark.slow
def test_each_sampler_of_the_list_is_taken_with_a_schedule_of_the_list(server: RunningServer) -> None:
    schedules = [one["name"] for one in server.http.get(f"{API}/schedulers").json()]
    for sampler in server.http.get(f"{API}/samplers").json():
        body = {"prompt": "a", "steps": 2, "sampler_name": sampler["name"], "eta": 1}
        statuses = [post(server, "txt2img", **body, scheduler=schedule).status_code for schedule in schedules]
        assert (200 in statuses) is (sampler["name"] != "Flow Euler"), sampler
        assert set(statuses) <= {200, 400}, sampler
    unknown = post(server, "txt2img", prompt="a", sampler_name="Euler b")
    assert (unknown.status_code, unknown.json()["detail"].startswith("sampler_name: Sampler not found")) == (404, True)
    assert "did you mean 'Euler" in unknown.json()["detail"]


def test_settings_of_one_call_leave_those_of_others_alone(server: RunningServer) -> None:
    own = {"sd_model_checkpoint": "starter", "CLIP_stop_at_last_layers": 2, "samples_format": "jpg"}
    made = post(server, "txt2img", prompt="a fox", steps=1, width=64, height=64, override_settings=own).json()
    info = json.loads(made["info"])
    assert (info["sd_model_name"], info["clip_skip"]) == ("starter", 2)
    assert Image.open(io.BytesIO(base64.b64decode(made["images"][0]))).format == "JPEG"
    options = server.http.get(f"{API}/options").json()
    assert (options["sd_model_checkpoint"], options["samples_format"]) == ("tiny", "png")


def test_png_info_is_the_text_of_the_image(server: RunningServer, api: webuiapi.WebUIApi) -> None:
    made = api.txt2img(prompt="a fox", negative_prompt="blue", seed=5, width=64, height=64)
    answer = post(server, "png-info", image=made.json["images"][0]).json()
    assert answer["info"] == made.info["infotexts"][0]
    found = {key: answer["parameters"][key] for key in ("Prompt", "Negative prompt", "Seed", "Size-1")}
    assert found == {"Prompt": "a fox", "Negative prompt": "blue", "Seed": "5", "Size-1": "64"}
    assert answer["items"]["sdcli"]["seed"] == 5
    assert post(server, "png-info", image="aGVsbG8=").status_code == 400


LONG = {"prompt": "a", "steps": 999, "width": 512, "height": 512, "sampler_name": "DDIM"}


@pytest.mark.slow
def test_progress_is_that_of_the_task_and_interrupt_ends_it(server: RunningServer, api: webuiapi.WebUIApi) -> None:
    thread, answers = in_thread(lambda: post(server, "txt2img", **LONG, force_task_id="mine"))
    ask = lambda **more: server.http.post("/internal/progress", json={"id_task": "mine", **more}).json()  # noqa: E731
    until(lambda: ask()["active"] and api.get_progress()["state"]["sampling_step"])
    waiting, others = in_thread(lambda: post(server, "txt2img", prompt="a", steps=1, force_task_id="next"))
    until(lambda: server.http.get("/internal/pending-tasks").json() == {"size": 1, "tasks": ["next"]})
    assert server.http.post("/internal/progress", json={"id_task": "next"}).json()["queued"]
    next_one = server.http.get(f"{API}/progress", params={"id_task": "next"}).json()
    assert (next_one["progress"], next_one["textinfo"]) == (0, "waiting, place 1 in the queue")
    shown = until(lambda: server.http.get(f"{API}/progress", params={"id_task": "mine"}).json()["current_image"])
    assert Image.open(io.BytesIO(base64.b64decode(shown))).size == (64, 64)
    state = api.get_progress()
    assert 0 < state["progress"] < 1
    assert (state["state"]["job"], state["state"]["job_count"], state["state"]["sampling_steps"]) == ("mine", 1, 999)
    assert api.interrupt() == {}
    thread.join()
    waiting.join()
    assert (answers[0].status_code, others[0].status_code) == (409, 200), "the waiting one goes on"
    idle = api.get_progress()
    assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)
    done = ask()
    assert (done["active"], done["completed"]) == (False, True)


def test_skip_goes_on_with_the_next_images(server: RunningServer) -> None:
    body = {**LONG, "width": 264, "height": 256, "steps": 6, "n_iter": 3}  # each is a batch of its own at that size
    thread, answers = in_thread(lambda: post(server, "txt2img", **body, seed=1, force_task_id="skipped"))
    until(lambda: server.http.get(f"{API}/progress?id_task=skipped").json()["state"]["sampling_step"])
    server.http.post(f"{API}/skip")
    thread.join()
    answer = answers[0].json()
    info = json.loads(answer["info"])
    assert len(answer["images"]) == len(info["all_seeds"]) == 3 - info["comments"].count("skipped")
    assert 0 < len(answer["images"]) < 3


def test_the_password_of_any_user_is_the_token(strict_server: RunningServer) -> None:
    url = f"{strict_server.url}{API}/options"
    assert httpx.get(url, auth=("anyone", TOKEN)).status_code == 200
    for auth in (None, ("anyone", "wrong"), (TOKEN, "")):
        answer = httpx.get(url, auth=auth)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Basic realm="sdcli"')
        assert answer.json().keys() == {"error", "detail", "body", "errors"}
    assert httpx.get(f"{strict_server.url}/v1/models", auth=("anyone", TOKEN)).status_code == 401
    client = webuiapi.WebUIApi(baseurl=f"{strict_server.url}{API}", username="me", password=TOKEN)
    assert client.get_scripts() == {"txt2img": [], "img2img": []}


def test_webuiapi_finds_all_its_lists(api: webuiapi.WebUIApi) -> None:
    assert "DDIM" in [one["name"] for one in api.get_samplers()]
    assert {"tiny", "starter"} <= set(api.util_get_model_names())
    assert [one["name"] for one in api.get_upscalers()] == ["None", "Lanczos"]
    assert api.get_latent_upscale_modes() == [{"name": "Latent"}]
    assert api.get_sd_vae() == api.get_loras() == api.get_hypernetworks() == api.get_face_restorers() == []
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.get_memory()["ram"]["total"] > 0
    assert api.get_cmd_flags()["api"] is True
    assert api.util_get_current_model() == "tiny"
    api.refresh_checkpoints()
