"""What the server promises by default, each with an attempt to break it."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import time
import zlib
from pathlib import Path

import httpx
import pytest

from sdcli.errors import NotFound, UsageError
from sdcli.request.fields import EmbeddingRef
from sdcli.server import guard
from sdcli.server.native import ApiError
from sdcli.server.protocol import PreviewImage
from sdcli.server.remote_fields import Allowed, remote_fields
from sdcli.server.settings import ServerSettings
from tests.server.in_process import answer, answers, application, job_of, neighbour, png
from tests.server.running import RunningServer

TOKEN = {"authorization": "Bearer secret-word"}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "[::1", "@"])
def test_a_name_that_an_attacker_lets_point_here_is_refused(host: str) -> None:
    for path in ("/v1/jobs/x", "/healthz", "/"):
        assert answer(path, headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "[::1]:7860", "LOCALHOST:80", "127.9.9.9"])
def test_the_servers_own_addresses_are_accepted(host: str) -> None:
    assert answer("/healthz", headers={"host": host}).status_code == 200


def test_a_server_that_others_reach_accepts_addresses_and_named_hosts_only() -> None:
    settings = {"host": "0.0.0.0", "token": "secret-word", "hosts": ("images.lan",)}
    found = [
        answers({"url": "/v1/jobs/x", "headers": {"host": host, **TOKEN}}, **settings)[0].status_code
        for host in ("192.168.1.5:7860", "images.lan", "evil.example", "localhost")
    ]
    assert found == [404, 404, 403, 403]


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:3000", "file://", ""])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_a_page_of_another_origin_is_refused(origin: str, method: str) -> None:
    refused = answer("/v1/jobs", method=method, headers={"origin": origin, "content-type": "application/json"})
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "http://[evil]", "//]"])
@pytest.mark.parametrize("path", ["/v1/jobs/x", "/v1/models", "/sdapi/v1/options", "/healthz"])
def test_an_origin_that_is_no_address_is_a_foreign_one(origin: str, path: str) -> None:
    refused = answer(path, headers={"origin": origin})
    assert (refused.status_code, refused.headers["content-type"]) == (403, "application/json")
    assert ("detail" in refused.json()) == path.startswith("/sdapi")


def test_a_client_cannot_say_that_it_has_another_address(server: RunningServer) -> None:
    forged = {"x-forwarded-for": "203.0.113.7", "forwarded": "for=203.0.113.7", "x-real-ip": "203.0.113.7"}
    server.http.get("/healthz", headers={**forged, "x-request-id": "forged-1"})
    (line,) = server.logged("forged-1")
    assert "203.0.113.7" not in line
    assert "127.0.0.1" in line


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_that_embeds_the_server_gets_nothing(site: str) -> None:
    assert answer("/v1/jobs/x", headers={"sec-fetch-site": site}).status_code == 403
    assert answer("/v1/jobs/x", headers={"sec-fetch-site": "same-origin"}).status_code == 404


def test_an_origin_that_the_operator_named_may_use_the_server() -> None:
    headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
    settings = {"origins": ("https://app.example",), "token": "secret-word"}
    preflight, real, other = answers(
        {"method": "OPTIONS", "url": "/v1/jobs", "headers": headers},
        {"url": "/v1/jobs/x", "headers": {**headers, **TOKEN}},
        {"url": "/v1/jobs/x", "headers": {"origin": "https://app.example.evil", **TOKEN}},
        **settings,
    )
    assert (preflight.status_code, real.status_code, other.status_code) == (204, 404, 403)
    for allowed in (preflight, real):
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-credentials" not in allowed.headers


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "text/json"]
)
def test_a_body_that_a_page_could_send_without_asking_is_refused(kind: str) -> None:
    body = b'{"requests": {"prompt": "x", "model": "tiny"}}'
    refused = answer("/v1/jobs", method="POST", content=body, headers={"content-type": kind})
    assert refused.status_code == 415


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "my.host.example"])
def test_a_public_address_without_a_token_is_refused(host: str) -> None:
    with pytest.raises(UsageError, match="token"):
        ServerSettings(host=host).check()
    ServerSettings(host=host, token="secret-word").check()


@pytest.mark.parametrize("token", ["gehéim", "\u043f\u0430\u0440\u043e\u043b\u044c", "a\tb"])
def test_a_token_that_no_header_can_hold_is_refused_at_the_start(token: str) -> None:
    with pytest.raises(UsageError, match="ASCII"):
        ServerSettings(token=token).check()


def test_the_command_refuses_a_public_address_too(sdcli: object, tmp_path: Path) -> None:
    refused = sdcli("serve", "--host", "0.0.0.0")  # type: ignore[operator]
    assert refused.returncode == 2
    assert "--token-file" in refused.stderr


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer secret-wor",
        "Bearer secret-word2",
        "secret-word",
        "Digest secret-word",
    ],
)
def test_a_wrong_token_is_refused(given: str | None) -> None:
    headers = {} if given is None else {"authorization": given}
    (refused,) = answers({**job_of(), "headers": headers}, token="secret-word")
    assert refused.status_code == 401
    assert "secret-word" not in refused.text


def test_the_token_opens_and_health_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append(a) or a == b)
    with_token, health, metrics = answers(
        {**job_of(), "headers": TOKEN}, {"url": "/healthz"}, {"url": "/metrics"}, token="secret-word"
    )
    assert (with_token.status_code, health.status_code, metrics.status_code) == (202, 200, 401)
    assert compared == [b"secret-word"], "compared in constant time, by the library's function"


@pytest.mark.parametrize(
    "fields",
    [
        {"init_image": "/etc/passwd"},
        {"init_image": "../secret.png"},
        {"init_image": "http://169.254.169.254/latest/meta-data"},
        {"init_image": "file:///etc/passwd"},
        {"init_image": {"path": "/etc/passwd"}},
        {"init_image": {"sha256": "0" * 64}},
        {"init_image": ["/etc/passwd"]},
        {"init_image": "-"},
        {"init_image": png(8, 8), "mask": "/etc/passwd"},
        {"init-image": "/etc/passwd"},
        {"loras": ["/tmp/evil.safetensors"]},
        {"loras": ["evil.safetensors:1"]},
        {"loras": [{"path": "../evil"}]},
        {"loras": [{"path": "evil", "unet_weight": 1}]},
        {"loras": "evil"},
        {"prompt": "x <lora:evil:1>"},
        {"prompt": "x <lora:/tmp/evil:1>"},
        {"prompt": "x <lora:/tmp/evil.safetensors:1>", "prompt_syntax": "plain"},
        {"prompt_template": "{prompt} <lora:../evil:1>"},
        {"negative_prompt": "x <lora:/tmp/evil:1>"},
        {"model": "/tmp/model"},
        {"model": "model-folder"},
        {"model": "../model"},
        {"model": "owner/repository"},
        {"model": "https://example.org/model.safetensors"},
        {"refiner": "owner/repository"},
        {"refiner": "./model-folder"},
        {"embeddings": ["/tmp/evil.safetensors"]},
        {"embeddings": [{"path": "/tmp/evil.safetensors"}]},
        {"embeddings": ["evil"]},
        {"ip_adapters": [{"adapter": {"path": "/tmp/a"}, "image": png(8, 8)}]},
        {"controls": [{"model": "/tmp/net", "image": png(8, 8)}]},
        {"controls": [{"model": "owner/net", "image": png(8, 8)}]},
        {"controls": ["canny:/etc/passwd"]},
        {"models_file": "/tmp/models.yaml"},
        {"outdir": "/tmp"},
        {"output": "/tmp/x.png"},
    ],
    ids=lambda fields: " ".join(f"{name}={str(value)[:40]}" for name, value in fields.items()),
)
def test_no_field_of_a_request_reaches_a_file_or_an_address(
    fields: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is something to be had
    for name in ("evil", "evil.safetensors", "secret.png"):
        (tmp_path / name).write_bytes(b"secret content")
    (tmp_path / "model-folder").mkdir()
    (tmp_path / "model-folder" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    refused = answers(job_of(**fields))[0]
    assert refused.status_code in (400, 404), refused.text
    error = refused.json()["error"]
    assert error["type"] in ("bad_request", "not_found")
    assert str(tmp_path) not in refused.text
    assert "secret content" not in refused.text


def test_a_body_that_says_that_it_is_too_large_is_refused_at_once() -> None:
    (refused,) = answers(job_of(prompt="x" * 5000), max_body=4096)
    assert refused.status_code == 413


def test_a_body_that_does_not_say_how_large_it_is_is_cut_off(server: RunningServer) -> None:
    """A chunked body without end: the answer comes after `--max-body` bytes, not never."""
    block = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        head = "POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        sent = 0
        try:
            for _ in range(2000):  # 125 MiB
                connection.sendall(block)
                sent += len(block)
        except OSError:  # the server has closed it
            pass
        else:
            pytest.fail("the server read everything")
        assert sent < 60 * 2**20
    assert server.http.get("/healthz").status_code == 200


def bomb(width: int, height: int) -> str:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")).decode()


@pytest.mark.parametrize("size", [(50_000, 50_000), (4200, 4200), (2**31 - 1, 1)])
def test_an_image_that_would_be_huge_is_refused_before_it_is_decoded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    (refused,) = answers(job_of(init_image=bomb(*size)))
    assert refused.status_code == 400
    assert "pixels" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"width": 4096, "height": 4096}, {}),
        ({"width": 512, "height": 512}, {"max_pixels": 512 * 511}),
        ({"num_images": 17}, {}),
        ({"num_images": 100_000}, {}),
        ({"n": "100000"}, {}),
        ({"n": "100000.0"}, {}),
        ({"prompt": "x" * 32_001}, {}),
        ({"negative_prompt": "x" * 32_001, "guidance_scale": 5}, {}),
        ({"prompt_template": "{prompt}" * 5000}, {}),
        ({"prompt_template": "{prompt}" * 3000, "prompt": "x" * 30_000}, {}),
        ({"prompt_template": "{prompt}" + "x" * 30_000, "prompt": "a AND " * 5000}, {}),
        ({"prompt": "a AND " * 64}, {}),
        ({"custom_id": "x" * 201}, {}),
        ({"custom_id": {"a": 1}}, {}),
        ({"custom_id": "\ud800"}, {}),
        ({"width": 1024, "height": 1024, "upscale": 4}, {}),
    ],
)
def test_a_request_for_too_much_is_refused(fields: dict[str, object], settings: dict[str, object]) -> None:
    request = job_of(**fields)
    body = json.dumps(request.pop("json"))  # in ASCII, which holds halves of characters, too
    (refused,) = answers({**request, "content": body, "headers": {"content-type": "application/json"}}, **settings)
    assert refused.status_code == 400, refused.text


def test_images_are_counted_before_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdcli.server.native.expand", lambda *_, **__: pytest.fail("made"))
    one = {"model": "tiny", "prompt": "x", "num_images": 6}
    for requests in ({**one, "num_images": 100_000}, [one] * 3):
        (refused,) = answers({"method": "POST", "url": "/v1/jobs", "json": {"requests": requests}})
        assert (refused.status_code, "at most 16 images" in refused.text) == (400, True)


def test_a_prompt_of_the_largest_length_is_taken_and_no_longer_one_of_any_dialect() -> None:
    assert answers(job_of(prompt="x" * 32_000))[0].status_code == 202
    for url in ("/sdapi/v1/txt2img", "/v1/images/generations"):
        (refused,) = answers({"method": "POST", "url": url, "json": {"prompt": "x" * 32_001}})
        assert (refused.status_code, "prompt" in refused.text) == (400, True)


def test_a_custom_id_comes_back_with_its_images() -> None:
    lines = [{"model": "tiny", "prompt": "x", "custom_id": id} for id in ("a fox", 7, None)]
    (made,) = answers({"method": "POST", "url": "/v1/jobs", "json": {"requests": lines}})
    assert [image["custom_id"] for image in made.json()["images"]] == ["a fox", "7", None]


def test_a_task_of_another_address_is_neither_seen_nor_ended_nor_replaced() -> None:
    async def attack() -> None:
        async with application() as (mine, engine), neighbour(mine, "10.0.0.9") as theirs:
            body = {"prompt": "a", "force_task_id": "same"}
            calls = []
            for client in (mine, theirs):
                calls.append(asyncio.create_task(client.post("/sdapi/v1/txt2img", json=body)))
                while engine.waiting < len(calls):
                    await asyncio.sleep(0.01)
            own, other = engine._queue
            own.preview = PreviewImage(own.id, 0, 1, b"mine")
            await theirs.post("/sdapi/v1/interrupt", params={"id_task": "same"})
            assert (own.state, other.state) == ("queued", "cancelled")
            own.state = "running"  # of which the numbers alone are shown
            shown = (await theirs.get("/sdapi/v1/progress")).json()
            assert (shown["state"]["job"], shown["current_image"], shown["state"]["job_count"]) == ("", None, 1)
            named = (await theirs.get("/sdapi/v1/progress", params={"id_task": "same"})).json()
            assert (named["state"]["job_count"], named["current_image"]) == (0, None)
            assert (await mine.get("/sdapi/v1/progress")).json()["state"]["job"] == "same"
            own.state = "queued"
            assert (await theirs.get("/internal/pending-tasks")).json() == {"size": 0, "tasks": []}
            assert (await mine.get("/internal/pending-tasks")).json() == {"size": 1, "tasks": ["same"]}
            await theirs.post("/sdapi/v1/skip", params={"id_task": "same"})
            assert own.state == "queued"
            async with neighbour(mine, "10.0.0.10") as third:
                asked = {"id_task": "same", "live_preview": True}
                assert not (await third.post("/internal/progress", json=asked)).json()["queued"]
                assert (await mine.post("/internal/progress", json=asked)).json()["queued"]
            await mine.post("/sdapi/v1/interrupt", params={"id_task": "same"})
            assert [call.status_code for call in await asyncio.gather(*calls)] == [409, 409]

    asyncio.run(attack())


def test_an_image_is_prepared_only_for_a_job_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdcli.server.a1111.image_fields", lambda *_: pytest.fail("decoded"))
    image = {"prompt": "a", "init_images": [png(8, 8)], "mask": png(8, 8)}
    call = {"method": "POST", "url": "/sdapi/v1/img2img"}
    wrong, full = answers({**call, "json": {**image, "sampler_name": "Eulers"}}, {**call, "json": image}, max_queue=0)
    assert (wrong.status_code, full.status_code) == (404, 429)


def test_images_are_prepared_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    at_work: list[int] = []

    def slow(*_: object) -> dict[str, object]:
        at_work.append(1)
        assert len(at_work) == 1
        time.sleep(0.05)
        at_work.pop()
        raise ApiError(400, "bad_request", "prepared")

    monkeypatch.setattr("sdcli.server.a1111.image_fields", slow)

    async def ask() -> list[httpx.Response]:
        async with application() as (http, _):
            body = {"prompt": "a", "init_images": [png(8, 8)]}
            return await asyncio.gather(*(http.post("/sdapi/v1/img2img", json=body) for _ in range(4)))

    found = asyncio.run(ask())
    assert [(one.status_code, one.json()["detail"]) for one in found] == [(400, "prepared")] * 4


def test_an_image_that_would_become_too_large_is_refused_before_it_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdcli.server.a1111_images.filled", lambda *_: pytest.fail("filled"))
    (refused,) = answers(
        {
            "method": "POST",
            "url": "/sdapi/v1/img2img",
            "json": {"prompt": "a", "init_images": [png(128, 64)], "mask": png(128, 64), "inpainting_mask_invert": 1},
        },
        max_pixels=4096,
    )
    assert (refused.status_code, "4096 pixels" in refused.text) == (400, True)


def test_a_form_is_a_form_with_each_field_once() -> None:
    call = {"method": "POST", "url": "/v1/images/edits"}
    (not_a_form,) = answers({**call, "json": {"prompt": "a"}})
    assert (not_a_form.status_code, "multipart/form-data" in not_a_form.text) == (415, True)
    image = ("image", ("a.png", base64.b64decode(png(64, 64)), "image/png"))
    for name in ("prompt", "size", "seed", "mask"):
        text = [(name, (None, b"1")), (name, (None, b"2"))] if name != "mask" else []
        files = [("mask", image[1])] * 2 if name == "mask" else []
        prompt = [] if name == "prompt" else [("prompt", (None, b"a"))]
        (refused,) = answers({**call, "files": [*prompt, *text, *files, image]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name), refused.text


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"null", b"[]", b'"x"', b"\xff", b"[" * 100_000, b'{"requests": 1}', b'{"requests": []}'),
        *(b'{"requests": {}, "x": 1}', b'{"requests": {"prompt": {"a": 1}}}', b'{"requests": {"seed": 1e400}}'),
    ],
)
def test_nonsense_is_a_sentence_and_never_a_traceback(body: bytes) -> None:
    bad = answer("/v1/jobs", method="POST", content=body, headers={"content-type": "application/json"})
    assert bad.status_code in (400, 415)
    assert "Traceback" not in bad.text
    assert "site-packages" not in bad.text


def test_an_error_inside_shows_no_traceback_to_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr("sdcli.server.native.resolve_images", broken)
    failed = answers(job_of())[0]
    assert failed.status_code == 500
    assert "secret detail" not in failed.text
    assert failed.headers["x-should-retry"] == "false"


def test_a_token_file_that_others_can_read_is_refused(sdcli: object, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret-word\n")
    file.chmod(0o644)
    refused = sdcli("serve", "--host", "0.0.0.0", "--token-file", file)  # type: ignore[operator]
    assert refused.returncode == 2
    assert "chmod 600" in refused.stderr


def test_what_the_operator_gave_names_to_can_be_used(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    from sdcli.generation.settings import RunSettings

    save_file({"emb_params": np.zeros((1, 32), np.float32)}, tmp_path / "style.safetensors")
    (tmp_path / "loras").mkdir()
    save_file({"x.lora_down.weight": np.zeros((1, 4), np.float32)}, tmp_path / "loras" / "soft.safetensors")
    settings = {
        "run": RunSettings(lora_dir=tmp_path / "loras"),
        "embeddings": (EmbeddingRef(path=str(tmp_path / "style.safetensors"), token="my-style"),),
    }
    by_name = [
        job_of(embeddings=["my-style"], prompt="a fox in my-style"),
        job_of(loras=["soft:0.5"]),
        job_of(loras=[{"path": "soft", "unet_weight": 0.5}]),
        job_of(prompt="a fox <lora:soft:0.5>"),
    ]
    others = [job_of(embeddings=["style"]), job_of(loras=["hard"])]
    assert [answer.status_code for answer in answers(*by_name, *others, **settings)] == [202] * 4 + [404] * 2


NAMES = ("x (v2)", "x [fp16]", "<cat-toy>", "x, y & z", "été", "x~1", "100%", "$HOME", "x: y")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_the_server_offers_is_taken_whatever_it_consists_of(name: str, tmp_path: Path) -> None:
    ref = EmbeddingRef(path=str(tmp_path / "style.safetensors"), token=name)
    (tmp_path / f"{name}.safetensors").touch()
    allowed = Allowed({name: None}, {name: None}, tmp_path, {name: ref}, 64)
    taken = remote_fields({"model": name, "refiner": name, "embeddings": [name]}, allowed=allowed)
    assert taken == {"model": name, "refiner": name, "embeddings": [ref]}
    control = {"model": name, "image": png(8, 8)}
    assert remote_fields({"controls": [control]}, allowed=allowed)["controls"][0]["model"] == name
    if ":" not in name:  # which stands between a LoRA and its weight
        for loras in ([name], [f"{name}:0.5"], [{"path": name}]):
            assert remote_fields({"loras": loras}, allowed=allowed) == {"loras": loras}


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", ".x", "/x", "x/y", "../x", "\\x", "x\\y", "C:x", "C:\\x", "file:x", "hub:a", "http://x/y"),
        *("x\0", "x" * 300, "~", "~/x", "y (v2)", "<dog>", "NUL", "\ud800"),
    ],
)
def test_a_name_that_the_server_does_not_offer_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    for path in ("x", "y", "x.safetensors", "loras/.x.safetensors", "loras/x:y.safetensors"):
        (tmp_path / path).touch()
    allowed = Allowed({"z": None}, {"z": None}, tmp_path / "loras", {}, 64)
    for fields in (
        {"model": name},
        {"refiner": name},
        {"embeddings": [name]},
        {"loras": [{"path": name}]},
        {"controls": [{"model": name, "image": png(8, 8)}]},
    ):
        with pytest.raises((UsageError, NotFound)):
            remote_fields(fields, allowed=allowed)
