"""The routes for forms: what can be generated, the settings of an uploaded image, and the command of a request."""

from __future__ import annotations

import base64
import io
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from starlette.testclient import TestClient

from sdcli.generation.resolve.resolve import resolve
from sdcli.metadata.embed import image_bytes
from sdcli.metadata.record import Record
from sdcli.models.registry import load_registry
from sdcli.request.schema import GenerationRequest, parse_request
from sdcli.server.app import make_app
from sdcli.server.settings import ServerSettings

A1111 = "a hare\nNegative prompt: fog\nSteps: 20, Sampler: Euler a, CFG scale: 6, Seed: 5, Size: 64x48, ENSD: 31337"


def client(**settings: Any) -> TestClient:
    """A client of a server without workers."""
    app, _ = make_app(ServerSettings(devices=(), **settings), load_registry())
    return TestClient(app, base_url="http://127.0.0.1:7860")


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def own(*, model: str = "tiny", **changes: Any) -> bytes:
    """A small PNG with sdcli's record of a request with these changes."""
    request = parse_request({"prompt": "a fox", "seed": 2**63 - 1, **changes})
    resolved = resolve(request, load_registry().find("tiny"), measure=lambda image, cell: (64, 64))
    named = resolved.model_copy(update={"model": model})
    return image_bytes(Image.new("RGB", (8, 8)), "png", Record(named, {}))


def theirs(parameters: str) -> bytes:
    """A small PNG with A1111's text."""
    chunks, file = PngImagePlugin.PngInfo(), io.BytesIO()
    chunks.add_text("parameters", parameters)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def read(image: bytes, **settings: Any) -> dict[str, Any]:
    answer = client(**settings).post("/v1/metadata", json={"image": base64_of(image)})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_every_default_of_the_capabilities_is_a_request_that_the_model_takes() -> None:
    registry, found = load_registry(), client().get("/v1/capabilities").json()
    assert found["default_model"] == registry.default
    usable = [model for model in found["models"] if model["usable"]]
    assert {"starter", "tiny"} <= {model["name"] for model in usable}
    for model in usable:
        spec, defaults = registry.find(model["name"]), model["defaults"]
        assert resolve(GenerationRequest(seed=1, **defaults), spec) == resolve(GenerationRequest(seed=1), spec)
        assert defaults["scheduler"] in model["schedulers"]
        assert set(model["schedulers"]) <= set(found["schedulers"])
    assert set(found["fields"]) <= set(GenerationRequest.model_fields)
    assert not {"ip_adapters", "embeddings", "controls"} & set(found["fields"]), "these are files of the server"
    assert found["fields"]["prompt_syntax"]["choices"] == ["a1111", "plain"]
    assert found["fields"]["loras"]["is_list"] is True
    pixels = 2048 * 2048
    limits = {"images": 16, "pixels": pixels, "upload_pixels": 4 * pixels, "body": 32 * 2**20, "keep": 900.0}
    assert found["limits"] == limits


def test_loras_of_the_folder_are_named_without_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = tmp_path / "sdcli" / "loras"
    folder.mkdir(parents=True)
    (folder / "ink.safetensors").touch()
    (folder / "notes.txt").touch()
    assert client().get("/v1/capabilities").json()["loras"] == ["ink"]


def test_the_settings_of_an_image_make_a_request_of_this_server() -> None:
    found = read(own(negative_prompt="fog", steps=3))
    request = resolve(parse_request(found["request"]), load_registry().find("tiny"))
    assert (request.prompt, request.negative_prompt, request.steps, request.seed) == ("a fox", "fog", 3, 2**63 - 1)
    assert (found["source"], found["format"], found["not_taken"]) == ("sdcli", "png", {})
    hare = read(theirs(A1111))
    assert (hare["source"], hare["request"]["scheduler"], hare["request"]["width"]) == ("a1111", "euler-a", 64)
    assert hare["not_taken"] == {"ENSD": "31337"}


def test_what_is_not_on_this_server_is_named_and_not_taken(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 64)).save(photo)
    found = read(own(init_image=str(photo), strength=0.5, loras=["/lora/a.safetensors:0.5"], model="sd15"))
    assert found["request"].keys().isdisjoint({"init_image", "strength", "loras", "model"})
    assert found["not_taken"]["model"] == "sd15: not a model of this server"
    assert found["not_taken"]["init_image"] == str(photo)
    assert found["not_taken"]["strength"] == 0.5
    assert found["not_taken"]["loras"] == ["/lora/a.safetensors:0.5: not a LoRA of this server"]


def test_an_image_without_settings_has_none() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    found = read(file.getvalue())
    assert (found["request"], found["source"], found["not_taken"]) == (None, None, {})


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ("/etc/passwd", "image: should be an image as base64 text, never a path or an address"),
        (base64_of(b"no image"), "image: is not a PNG, JPEG or WebP image"),
        (base64_of(own()[:200]), "image: "),
    ],
)
def test_what_is_no_image_is_refused_with_a_sentence(image: str, sentence: str) -> None:
    answer = client().post("/v1/metadata", json={"image": image})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(sentence)
    assert answer.json()["error"]["param"] == "image"


def test_the_limits_of_uploads_hold_for_metadata_too() -> None:
    file = io.BytesIO()
    Image.new("RGB", (100, 100)).save(file, "PNG")
    large = client(max_pixels=2_499).post("/v1/metadata", json={"image": base64_of(file.getvalue())})
    assert (large.status_code, large.json()["error"]["message"]) == (400, "image: 100x100 is more than 9996 pixels")
    long = client(max_body=1024).post("/v1/metadata", json={"image": "A" * 2000})
    assert long.status_code == 413


def test_the_command_is_the_request_in_a_shell() -> None:
    evil = "it's $(touch owned) `x` \\ = \n fox; -rf"
    request = {"prompt": evil, "seed": 2**63 - 1, "guidance_scale": "7..3", "init_image": "a b.png"}
    line = client().post("/v1/command", json={"request": request, "num_images": 3}).json()["command"]
    assert "\n" not in line
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    words = shown.decode().split("\0")[:-1]
    assert words[:4] == ["sdcli", "generate", "--num-images", "3"]
    assert words[-2:] == ["--", evil]
    assert words[words.index("--init-image") + 1] == "a b.png"
    assert shlex.split(line)[:2] == ["sdcli", "generate"]


def test_a_request_that_is_none_has_no_command() -> None:
    refused = client().post("/v1/command", json={"request": {"prompt": "a", "steps": "few"}})
    assert (refused.status_code, refused.json()["error"]["message"][:6]) == (400, "steps:")
    refused = client().post("/v1/command", json={"request": {"init_image": {"sha256": "0" * 64}}})
    assert refused.json()["error"]["message"] == "init_image: a command needs the name of a file"
    longest = json.dumps({"request": {"prompt": "x" * 200_000}})
    answer = client().post("/v1/command", content=longest, headers={"content-type": "application/json"})
    assert answer.json() == {"command": None}
