"""Pulling from and verifying against a hub: a real client process, a real server on loopback, real faults."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdcli.errors import BadWeights, Offline, UsageError
from sdcli.io.files import PACKAGE, megabytes
from sdcli.models.hub.download import pull
from sdcli.models.hub.folders import folder_of
from sdcli.models.hub.manifest import verify
from sdcli.models.hub.repo_files import first_missing, wanted_files, weight_files, weighty_parts
from sdcli.models.registry import ControlNetSpec, ModelSpec
from sdcli.models.sources import HubSource
from tests.hub_server import HubServer, Repo, files_of

NAME = "maker/small"
UNET = "unet/diffusion_pytorch_model.safetensors"
CHUNK = 10 * 1024**2
"""huggingface_hub hands a download on in pieces of this size."""
EXTRAS = {
    "README.md": b"# small",
    "pipeline.py": b"import os",
    "unet/diffusion_pytorch_model.bin": b"\x80\x02}.",
    "unet/model.py": b"import os",
    "safety_checker/model.safetensors": b"\0" * 200_000,
    "v1-small.ckpt": b"\x80\x02}.",
}
"""What real repositories hold besides, and nobody should get."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def model_files() -> dict[str, bytes]:
    return files_of(PACKAGE / "starter") | EXTRAS


@pytest.fixture
def server(model_files: dict[str, bytes]) -> Iterator[HubServer]:
    server = HubServer()
    server.repos[NAME] = Repo()
    server.repos[NAME].commit(model_files)
    with server.running():
        yield server


@pytest.fixture
def environment(server: HubServer, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SDCLI_", "TRANSFORMERS"))}
    return kept | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "PYTHONPATH": str(PACKAGE.parent),
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def models(environment: dict[str, str], tmp_path: Path) -> Run:
    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sdcli", "models", *arguments]
        return subprocess.run(
            command, env=environment | changes, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )

    return run


def cached_blobs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "hf/hub/models--maker--small/blobs").glob("*"))


@pytest.mark.slow
def test_a_pulled_model_is_whole_verifies_and_is_found_by_other_tools(
    server: HubServer, models: Run, environment: dict[str, str], tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    pulled = models("pull", NAME, "--json")
    assert pulled.returncode == 0, pulled.stderr
    report = json.loads(pulled.stdout)
    folder = Path(report["folder"])
    assert files_of(folder) == {path: data for path, data in model_files.items() if path not in EXTRAS}
    assert report["commit"] == server.repos[NAME].revisions["main"] == folder.name

    verified = models("verify", NAME)
    assert verified.returncode == 0, verified.stderr
    assert f"{len(model_files) - len(EXTRAS)} files match the recorded hashes" in verified.stdout
    assert models("path", NAME).stdout.strip() == str(folder)
    assert '"here": "downloaded"' in models("show", NAME, "--json").stdout

    other = (
        "from huggingface_hub import snapshot_download as s; print(s('maker/small', allow_patterns='unet/config.json'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", other], env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(folder), found.stderr


@pytest.mark.slow
def test_a_controlnet_is_pulled_by_its_name_and_its_pickles_are_left(
    server: HubServer, models: Run, tmp_path: Path
) -> None:
    weights = {f"diffusion_pytorch_model{kind}": b"\0" * 200_000 for kind in (".safetensors", ".bin", ".fp16.bin")}
    server.repos["maker/edges"] = Repo()
    server.repos["maker/edges"].commit({"config.json": b"{}", "README.md": b"", "sd15.png": b"", **weights})
    (tmp_path / "own.yaml").write_text(
        "controlnets:\n  edges: {source: {kind: hub, repo: maker/edges, variant: fp16}}\n"
    )
    own = ("--models-file", "own.yaml")
    pulled = models("pull", "edges", *own)
    assert pulled.returncode == 0, pulled.stderr
    folder = Path(pulled.stdout.strip())
    assert set(files_of(folder)) == {"config.json", "diffusion_pytorch_model.safetensors"}
    listed = models("list", "--controlnets", "--json", *own).stdout.splitlines()
    here = {row["name"]: row["here"] for row in map(json.loads, listed)}
    assert (here["edges"], here["canny"]) == ("downloaded", "not downloaded")
    verified = models("verify", "edges", *own)
    assert "2 files match the recorded hashes" in verified.stdout, verified.stderr


@pytest.mark.slow
def test_a_safety_checker_comes_when_it_is_asked_for_and_stays(
    server: HubServer, models: Run, model_files: dict[str, bytes]
) -> None:
    index = json.loads(model_files["model_index.json"]) | {"safety_checker": ["stable_diffusion", "Checker"]}
    checker = {
        "safety_checker/config.json": b"{}",
        "safety_checker/model.safetensors": b"\0" * 200_000,
        "feature_extractor/preprocessor_config.json": b"{}",
    }
    unwanted = {"safety_checker/pytorch_model.bin": b"\x80\x02}.", "feature_extractor/pipeline.py": b"import os"}
    server.repos[NAME].commit(model_files | checker | unwanted | {"model_index.json": json.dumps(index).encode()})

    left_out = models("pull", NAME)
    assert left_out.returncode == 0, left_out.stderr
    assert "has a safety checker; --safety-checker downloads it" in left_out.stderr
    folder = Path(left_out.stdout.strip())
    assert not files_of(folder).keys() & checker.keys()
    refused = models("pull", NAME, "--safety-checker", "--offline")
    assert refused.returncode == 4
    assert "the safety checker of maker/small is not in the cache" in refused.stderr

    with_checker = models("pull", NAME, "--safety-checker")
    assert with_checker.returncode == 0, with_checker.stderr
    assert "left out" not in with_checker.stderr
    assert {path: data for path, data in files_of(folder).items() if path in checker} == checker
    assert not files_of(folder).keys() & unwanted.keys()
    again = models("pull", NAME)
    assert "left out" not in again.stderr
    (folder / "safety_checker/model.safetensors").resolve().write_bytes(b"\1" * 200_000)
    verified = models("verify", NAME)
    assert verified.returncode == 1
    assert "safety_checker/model.safetensors" in verified.stdout


def test_a_safety_checker_that_is_not_there_is_refused(models: Run) -> None:
    refused = models("pull", NAME, "--safety-checker")
    assert refused.returncode == 2
    assert "maker/small ships no safety checker" in refused.stderr


@pytest.mark.slow
def test_a_second_pull_downloads_nothing(server: HubServer, models: Run) -> None:
    assert models("pull", NAME).returncode == 0
    before = server.weight_bytes_sent()
    again = models("pull", NAME, "--json")
    assert json.loads(again.stdout)["downloaded_bytes"] == 0
    assert server.weight_bytes_sent() == before


@pytest.mark.slow
def test_a_broken_line_is_taken_up_again_within_the_pull(
    server: HubServer, models: Run, model_files: dict[str, bytes]
) -> None:
    server.faults.cut_after[UNET] = [CHUNK + 5000]
    pulled = models("pull", NAME)
    assert pulled.returncode == 0, pulled.stderr
    assert [served.range for served in server.sent(UNET)] == [None, f"bytes={CHUNK}-"]
    assert models("verify", NAME).returncode == 0


def test_a_killed_pull_goes_on_where_it_stopped(
    server: HubServer, models: Run, environment: dict[str, str], tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    server.faults.hold_after[UNET] = 2 * CHUNK + 5000
    command = [sys.executable, "-m", "sdcli", "models", "pull", NAME]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while not any(b.name.endswith("partial") and b.stat().st_size >= 2 * CHUNK for b in cached_blobs(tmp_path)):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.faults.hold_after.clear()
    assert "partly" in models("show", NAME).stdout or "not downloaded" in models("show", NAME).stdout

    assert models("pull", NAME).returncode == 0
    last = server.sent(UNET)[-1]
    assert last.range == f"bytes={2 * CHUNK}-"
    assert last.sent == len(model_files[UNET]) - 2 * CHUNK
    assert models("verify", NAME).returncode == 0
    assert not [blob for blob in cached_blobs(tmp_path) if blob.name.endswith("partial")]


@pytest.mark.slow
def test_a_line_that_stays_broken_fails_clearly_and_keeps_what_came(server: HubServer, models: Run) -> None:
    server.faults.cut_after[UNET] = [CHUNK + 5000] + [0] * 6
    failed = models("pull", NAME)
    assert failed.returncode == 4
    assert "what came so far is kept" in failed.stderr
    assert "Traceback" not in failed.stderr
    server.faults.cut_after.clear()
    assert models("pull", NAME).returncode == 0
    assert server.sent(UNET)[-1].range == f"bytes={CHUNK}-"


@pytest.mark.slow
def test_a_changed_file_is_named_and_the_next_pull_mends_it(models: Run, tmp_path: Path) -> None:
    folder = Path(models("pull", NAME).stdout.strip())
    blob = (folder / UNET).resolve()
    data = bytearray(blob.read_bytes())
    data[1_000_000] ^= 1
    blob.write_bytes(data)
    damaged = models("verify", NAME)
    assert damaged.returncode == 1
    assert UNET in damaged.stdout
    assert damaged.stdout.count("\n") == 1
    assert f"sdcli models pull {NAME}" in damaged.stderr
    assert models("pull", NAME).returncode == 0
    assert models("verify", NAME).returncode == 0


@pytest.mark.slow
def test_a_missing_and_a_cut_file_are_named(models: Run) -> None:
    folder = Path(models("pull", NAME).stdout.strip())
    (folder / "vae/config.json").resolve().unlink()
    os.truncate((folder / UNET).resolve(), 1000)
    found = models("verify", NAME, "--json")
    assert found.returncode == 1
    differences = json.loads(found.stdout)["differences"]
    assert any("vae/config.json is missing" in line for line in differences)
    assert any(UNET in line and "1000 bytes" in line for line in differences)


@pytest.mark.slow
def test_without_a_record_the_hashes_in_the_cache_are_compared(models: Run, tmp_path: Path) -> None:
    folder = Path(models("pull", NAME).stdout.strip())
    manifests = list((tmp_path / "data").rglob("*.json"))
    assert manifests
    for manifest in manifests:
        manifest.unlink()
    fine = models("verify", NAME)
    assert fine.returncode == 0
    assert "none were recorded" in fine.stdout
    (folder / "unet/config.json").resolve().write_text("{}")
    assert models("verify", NAME).returncode == 1


@pytest.mark.slow
def test_a_file_that_changed_on_the_hub_is_told(server: HubServer, models: Run, model_files: dict[str, bytes]) -> None:
    first = models("pull", NAME)
    config = model_files["unet/config.json"] + b"\n"
    server.repos[NAME].commit(model_files | {"unet/config.json": config})
    before = server.weight_bytes_sent()
    second = models("pull", NAME)
    assert second.returncode == 0
    assert "warning: maker/small: unet/config.json changed on the hub since the last pull" in second.stderr
    assert second.stdout != first.stdout
    assert server.weight_bytes_sent() == before, "unchanged weights are not downloaded again"


@pytest.mark.slow
def test_a_revision_is_pulled_beside_main(server: HubServer, models: Run, model_files: dict[str, bytes]) -> None:
    old = server.repos[NAME].commit(model_files | {"unet/config.json": b"{ }"}, revision="v1")
    pulled = models("pull", f"{NAME}@v1")
    assert Path(pulled.stdout.strip()).name == old
    assert models("path", f"{NAME}@v1").returncode == 0
    assert models("path", NAME).returncode == 4
    assert Path(models("pull", f"{NAME}@{old}").stdout.strip()).name == old


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "sentence"),
    [
        ("nobody/nothing", 3, "no repository nobody/nothing"),
        (f"{NAME}@v9", 3, "maker/small has no revision 'v9'"),
        ("tiny", 2, "needs no download"),
        ("maker/gated", 3, "accept its licence"),
        ("maker/other", 2, "made for FluxPipeline"),
        ("maker/pickles", 1, "only as a pickle"),
        ("maker/single", 1, "not in the diffusers layout"),
        ("maker/huge", 8, "needs 1000000 GB of disk"),
    ],
)
def test_each_refusal_has_its_sentence_and_comes_before_any_weights(
    server: HubServer, models: Run, model_files: dict[str, bytes], name: str, code: int, sentence: str
) -> None:
    index = json.loads(model_files["model_index.json"])
    pickles = {path.replace(".safetensors", ".bin"): data for path, data in model_files.items()}
    contents = {
        "maker/gated": model_files,
        "maker/other": model_files | {"model_index.json": json.dumps(index | {"_class_name": "FluxPipeline"}).encode()},
        "maker/pickles": pickles,
        "maker/single": {"model.safetensors": b"x"},
        "maker/huge": model_files,
    }
    for repo, files in contents.items():
        server.repos[repo] = Repo(gated=repo == "maker/gated")
        server.repos[repo].commit(files)
    if name == "maker/huge":
        server.faults.announced_size[UNET] = 10**15
    refused = models("pull", name)
    assert refused.returncode == code, refused.stderr
    assert sentence in refused.stderr
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""
    assert server.weight_bytes_sent() == 0


def test_no_network_is_told_quickly(models: Run) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        started = time.monotonic()
        failed = models("pull", NAME, HF_ENDPOINT=f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert failed.returncode == 4
    assert "cannot reach http://127.0.0.1" in failed.stderr
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("status", [500, pytest.param(429, marks=pytest.mark.slow)])
def test_a_hub_in_trouble_is_told(server: HubServer, models: Run, status: int) -> None:
    server.faults.status = status
    failed = models("pull", NAME)
    assert failed.returncode == 4
    assert f"({status})" in failed.stderr


@pytest.mark.slow
def test_offline_forbids_the_network_and_is_content_with_the_cache(server: HubServer, models: Run) -> None:
    for arguments, changes in (((NAME, "--offline"), {}), ((NAME,), {"HF_HUB_OFFLINE": "1"})):
        refused = models("pull", *arguments, **changes)
        assert refused.returncode == 4
        assert f"sdcli models pull {NAME}" in refused.stderr
    assert server.log == []
    folder = models("pull", NAME).stdout
    requests = len(server.log)
    assert models("pull", NAME, "--offline").stdout == folder
    assert len(server.log) == requests


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["short", pytest.param("other", marks=pytest.mark.slow)])
def test_bytes_that_are_not_what_the_hub_announced_are_refused(
    server: HubServer, models: Run, tmp_path: Path, model_files: dict[str, bytes], kind: str
) -> None:
    data = model_files[UNET]
    server.faults.instead[UNET] = data[:-1000] if kind == "short" else b"\0" + data[1:]
    failed = models("pull", NAME)
    assert failed.returncode == 1
    assert UNET in failed.stderr
    assert ("the hub announces" in failed.stderr) == (kind == "short") or "damaged" in failed.stderr
    assert models("path", NAME).returncode == 4, "nothing half-pulled is taken for a model"
    server.faults.instead.clear()
    assert models("pull", NAME).returncode == 0


def test_a_hash_that_is_a_path_is_refused(server: HubServer, models: Run, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    server.faults.oid = "../../../../precious"
    refused = models("pull", NAME)
    assert refused.returncode == 1
    assert "no proper hash" in refused.stderr
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_revision_that_is_a_path_is_refused(models: Run) -> None:
    refused = models("pull", f"{NAME}@a/../../../x")
    assert refused.returncode == 2
    assert "cannot be a revision" in refused.stderr


def test_one_failure_among_several_is_told_and_the_rest_is_pulled(models: Run) -> None:
    mixed = models("pull", "nobody/nothing", NAME)
    assert mixed.returncode == 7
    assert mixed.stdout.count("\n") == 1
    assert "1 of 2 models failed: nobody/nothing" in mixed.stderr


def test_a_token_is_shown_to_the_hub_and_not_to_its_storage(server: HubServer, models: Run) -> None:
    assert models("pull", NAME, HF_TOKEN="hf_secret").returncode == 0
    assert all(served.token == (not served.sent) for served in server.log)
    assert any(served.token for served in server.log)
    expired = models("pull", NAME, HF_TOKEN="hf_expired")
    assert expired.returncode == 3
    assert "check that HF_TOKEN is valid" in expired.stderr


@pytest.mark.slow
def test_a_pulled_model_paints_without_the_network(
    server: HubServer, models: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "sdcli", "generate", "a cup", "-m", NAME, "--size", "64x64", "--steps", "1"]

    def sample() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100)

    refused = sample()
    assert refused.returncode == 4
    assert f"sdcli models pull {NAME}" in refused.stderr
    assert models("pull", NAME).returncode == 0
    requests = len(server.log)
    painted = sample()
    assert painted.returncode == 0, painted.stderr
    assert (tmp_path / painted.stdout.strip()).is_file()
    assert len(server.log) == requests


@pytest.mark.slow
def test_remove_files_frees_the_cache(models: Run, tmp_path: Path, model_files: dict[str, bytes]) -> None:
    models("add", "mine", NAME)
    models("pull", "mine")
    removed = models("remove", "mine", "--files")
    assert removed.returncode == 0, removed.stderr
    size = sum(len(data) for path, data in model_files.items() if path not in EXTRAS)
    assert f"freed {megabytes(size)} (maker/small)" in removed.stderr
    assert cached_blobs(tmp_path) == []
    assert not list((tmp_path / "data").rglob("*.json"))
    assert models("path", NAME).returncode == 4


def test_weights_of_the_variant_come_first_and_plain_ones_fill_in() -> None:
    present = {
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.fp16-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.fp16.json",
    }
    assert weight_files(present, "unet/diffusion_pytorch_model", variant="fp16") == [
        "unet/diffusion_pytorch_model.fp16.safetensors"
    ]
    assert weight_files(present, "unet/diffusion_pytorch_model", variant=None) == [
        "unet/diffusion_pytorch_model.safetensors"
    ]
    assert weight_files(present, "vae/diffusion_pytorch_model", variant="fp16") == [
        "vae/diffusion_pytorch_model.safetensors"
    ]
    assert len(weight_files(present, "text_encoder/model", variant="fp16")) == 3
    assert weight_files(present, "text_encoder/model", variant=None) == []


@pytest.mark.slow
def test_a_partial_sdxl_names_the_first_missing_file(tmp_path: Path) -> None:
    from tests.tiny import save_tiny_sdxl

    spec = ModelSpec(name="small", source=HubSource(kind="hub", repo=NAME, variant="fp16"))
    for refiner in (False, True):
        folder = save_tiny_sdxl(tmp_path / str(refiner), refiner=refiner)
        assert first_missing(folder, spec) is None
        for path in ("text_encoder_2/model.safetensors", "text_encoder_2/config.json", "tokenizer_2/tokenizer.json"):
            (folder / path).rename(folder / "away")
            missing = first_missing(folder, spec)
            assert missing is not None
            assert missing.partition("/")[0] == path.partition("/")[0]
            (folder / "away").rename(folder / path)


def test_a_partial_snapshot_names_the_first_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    spec = ModelSpec(name="small", source=HubSource(kind="hub", repo=NAME), download_bytes=2_100_000_000)
    with pytest.raises(Offline, match=r"not in the cache .*`sdcli models pull small` \(2\.1 GB\)"):
        folder_of(spec)
    commit = "a" * 40
    folder = tmp_path / "models--maker--small/snapshots" / commit
    folder.mkdir(parents=True)
    refs = tmp_path / "models--maker--small/refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    for path, data in files_of(PACKAGE / "starter").items():
        with pytest.raises(Offline, match=r"only partly in the cache: .* is missing"):
            folder_of(spec)
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data[:100])
    assert folder_of(spec) == folder


def test_a_controlnet_without_its_shards_or_its_configuration_is_not_whole(tmp_path: Path) -> None:
    spec = ControlNetSpec(name="edges", source=HubSource(kind="hub", repo="maker/edges"))
    shards = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {str(number): shard for number, shard in enumerate(shards)}}
    files = {"config.json": "{}", "diffusion_pytorch_model.safetensors.index.json": json.dumps(index)}
    assert first_missing(tmp_path, spec) == "config.json"
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for shard in shards:
        assert first_missing(tmp_path, spec) == shard
        (tmp_path / shard).touch()
    assert first_missing(tmp_path, spec) is None


@pytest.mark.slow
def test_the_cache_is_where_huggingface_hub_has_it(tmp_path: Path) -> None:
    code = "from huggingface_hub.constants import HF_HUB_CACHE as theirs; from sdcli.models.hub import cache; "
    code += "print(theirs, cache.cache_folder())"
    base = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(PACKAGE.parent)}
    for variables in (
        {},
        {"HF_HOME": str(tmp_path / "a")},
        {"XDG_CACHE_HOME": str(tmp_path / "b")},
        {"HF_HUB_CACHE": str(tmp_path / "c"), "HF_HOME": str(tmp_path / "a")},
        {"HUGGINGFACE_HUB_CACHE": str(tmp_path / "d")},
        {"HF_HOME": "$HOME/e"},
    ):
        found = subprocess.run([sys.executable, "-c", code], env=base | variables, capture_output=True, text=True)
        theirs, ours = found.stdout.split()
        assert ours == theirs, variables


def test_the_parts_of_a_repository_are_those_that_its_index_names() -> None:
    base = {part: ["library", "Class"] for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
    assert weighty_parts(base) == ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert weighty_parts(base | {"text_encoder": [None, None]}) == ["unet", "vae", "text_encoder_2"]
    assert weighty_parts({}) == ["unet", "vae", "text_encoder"]
    sizes = dict.fromkeys(
        (
            *("model_index.json", "tokenizer_2/vocab.json", "text_encoder_2/config.json", "text_encoder_2/model.onnx"),
            *("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
            *("text_encoder_2/model.fp16.safetensors", "text_encoder_2/model.safetensors", "sd_xl.safetensors"),
        ),
        100,
    )
    parts = weighty_parts(base | {"text_encoder": [None, None]})
    wanted = wanted_files(sizes, variant="fp16", repo=NAME, parts=parts)
    assert set(sizes) - set(wanted) == {
        *("text_encoder_2/model.onnx", "text_encoder_2/model.safetensors", "sd_xl.safetensors")
    }
    with pytest.raises(BadWeights, match="has no text_encoder/model"):
        wanted_files(sizes, variant="fp16", repo=NAME, parts=weighty_parts(base))


def test_a_family_that_is_not_supported_is_refused_before_the_network_is_asked() -> None:
    source = HubSource(kind="hub", repo="maker/flux")
    with pytest.raises(UsageError, match="of the flux family, which is not yet supported"):
        pull(ModelSpec(name="flux", source=source, family="flux"), offline=False)


def test_a_model_of_another_source_is_not_pulled_or_verified() -> None:
    from sdcli.models.sources import RandomSource

    spec = ModelSpec(name="tiny", source=RandomSource(kind="random", architecture="tiny"), download_bytes=0)
    with pytest.raises(UsageError, match="needs no download"):
        pull(spec, offline=True)
    with pytest.raises(UsageError, match="was not pulled"):
        verify(spec)


def test_a_listing_that_lies_about_small_files_is_refused() -> None:
    sizes = dict.fromkeys(files_of(PACKAGE / "starter"), 100) | {"tokenizer/vocab.json": 10**10}
    with pytest.raises(BadWeights, match=r"vocab\.json has 10 GB"):
        wanted_files(sizes, variant=None, repo=NAME)


@pytest.mark.slow
def test_the_lora_of_a_preset_and_a_preview_vae_come_when_they_are_asked_for(
    server: HubServer, models: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    data = b"\0" * 150_000
    server.repos["maker/quick"] = Repo()
    server.repos["maker/quick"].commit({"a.safetensors": data, "b.safetensors": data + b"b", "README.md": b""})
    server.repos["madebyollin/taesd"] = Repo()
    tiny = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": data + b"c", "taesd_decoder.pth": b"."}
    server.repos["madebyollin/taesd"].commit(tiny)
    source = f"{{kind: folder, path: {PACKAGE / 'starter'}}}"
    lora = "{source: {kind: hub, repo: maker/quick, file: a.safetensors}}"
    preset = f"{{name: quick, scheduler: lcm, steps: 4, lora: {lora}}}"
    (tmp_path / "own.yaml").write_text(f"models:\n  mine: {{source: {source}, fast: {preset}}}\n")
    own = ("--models-file", "own.yaml")
    asked = [sys.executable, "-m", "sdcli", "generate", "a fox", "-m", "mine", "--fast", "--dry-run", *own]
    offline = {"env": environment | {"HF_HUB_OFFLINE": "1"}, "cwd": tmp_path, "capture_output": True, "text": True}

    refused = subprocess.run(asked, **offline)  # type: ignore[call-overload]
    assert refused.returncode == 4
    assert "the LoRA of --fast, quick, is not in the cache" in refused.stderr
    assert "run `sdcli models pull mine --fast`" in refused.stderr

    pulled = models("pull", "mine", "--fast", "--preview-vae", "--json", *own)
    assert pulled.returncode == 0, pulled.stderr
    first, second = map(json.loads, pulled.stdout.splitlines())
    assert set(files_of(Path(first["folder"]))) == {"a.safetensors"}
    assert set(files_of(Path(second["folder"]))) == {"config.json", "diffusion_pytorch_model.safetensors"}
    shown = subprocess.run(asked, **offline)  # type: ignore[call-overload]
    assert "hub:maker/quick/a.safetensors" in shown.stdout + shown.stderr, shown.stderr

    another = models("pull", "hub:maker/quick/b.safetensors")
    assert another.returncode == 0, another.stderr
    assert set(files_of(Path(another.stdout.strip()))) == {"a.safetensors", "b.safetensors"}
    again = models("pull", "hub:maker/quick/a.safetensors", "--json", "--offline")
    assert json.loads(again.stdout)["downloaded_bytes"] == 0
    missing = models("pull", "hub:maker/quick/c.safetensors")
    assert (missing.returncode, "has no file c.safetensors" in missing.stderr) == (3, True)
    nothing = models("pull", "starter", "--fast")
    assert (nothing.returncode, "it has no few-step preset" in nothing.stderr) == (2, True)
