"""`sdcli models` at the keyboard: what is listed, shown, added, removed and made the default."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sdcli.cli.models import app
from sdcli.errors import CannotWrite, NotFound, SdcliError, UsageError
from sdcli.io.files import PACKAGE
from sdcli.models.registry import load_registry, user_registry_file
from sdcli.models.sources import FolderSource, HubSource
from sdcli.models.user_registry import add_model, remove_model, set_default, source_of
from tests.forked import run_forked

HUB = {"kind": "hub", "repo": "maker/small"}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Homes of our own, in this process and for its children."""
    changes = {
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "PYTHONPATH": str(PACKAGE.parent),
    }
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "SDCLI_MODELS_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    return dict(os.environ)


@pytest.fixture
def models(environment: dict[str, str], tmp_path: Path) -> Run:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_forked(["models", *arguments], cwd=tmp_path, timeout=240)

    return run


def test_the_list_tells_what_is_here_and_marks_the_default(models: Run) -> None:
    listed = models("list")
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("*")] == ["starter"]
    by_name = {line[2:].split()[0]: line for line in lines}
    assert "embedded" in by_name["starter"]
    assert "in memory" in by_name["tiny"]
    assert "not downloaded" in by_name["sd15"]
    assert " sdxl " in by_name["sdxl"]
    rows = [json.loads(line) for line in models("list", "--json").stdout.splitlines()]
    assert [row["name"] for row in rows] == list(load_registry().models)


def test_the_list_imports_no_heavy_library(environment: dict[str, str]) -> None:
    code = "import sys; sys.argv = ['sdcli', 'models', 'list']\nfrom sdcli.cli.app import app\n"
    code += "app(standalone_mode=False)\nprint(sorted({'torch', 'huggingface_hub', 'diffusers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_show_prints_the_entry_and_its_files(models: Run) -> None:
    shown = json.loads(models("show", "starter", "--json").stdout)
    assert (shown["defaults"]["width"], shown["defaults"]["prompt_template"]) == (256, "{prompt}")
    assert "unet/diffusion_pytorch_model.safetensors" in [file["file"] for file in shown["files"]]
    unknown = models("show", "sd51")
    assert unknown.returncode == 3
    assert "did you mean" in unknown.stderr


@pytest.mark.slow
def test_an_added_folder_is_listed_found_and_removed_again(models: Run, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE / "starter", tmp_path / "mine")
    options = ["--size", "64x96", "--steps", "7", "--scheduler", "euler", "--license", "MIT", "--description", "ours"]
    added = models("add", "ours", "mine", *options)
    assert added.returncode == 0, added.stderr
    assert added.stdout.strip() == str(user_registry_file()) == models("path").stdout.strip()
    spec = load_registry().models["ours"]
    assert isinstance(spec.source, FolderSource)
    assert spec.source.path == tmp_path / "mine"
    assert (spec.defaults.width, spec.defaults.height, spec.defaults.steps) == (64, 96, 7)
    assert models("path", "ours").stdout.strip() == str(tmp_path / "mine")
    assert models("default", "ours").returncode == 0
    assert models("default").stdout == "ours\n"
    assert models("remove", "ours").returncode == 0
    assert "ours" not in load_registry().models
    assert load_registry().default == "starter", "a default that is gone is no default"
    assert (tmp_path / "mine/model_index.json").exists(), "the user's own files are never deleted"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["add", "starter", "maker/small"], 2, "a model of sdcli itself"),
        (["add", "canny", "maker/small"], 2, "'canny' is a ControlNet"),
        (["path", "canny"], 4, "sdcli models pull canny` (723 MB)"),
        (["add", "x", "nowhere"], 3, "no file or folder nowhere"),
        (["add", "x", "maker/small", "--scheduler", "eulr"], 2, "did you mean 'euler'"),
        (["add", "x", "maker/small", "--size", "100x100"], 2, "width"),
        (["remove", "sd15"], 2, "stays"),
        (["remove", "nothing-at-all"], 3, "no model"),
        (["default", "maker/small"], 3, "sdcli models add"),
        (["path", "tiny"], 2, "has no files"),
        (["path", "sd15"], 4, "sdcli models pull sd15` (2.1 GB)"),
        (["verify", "sd15"], 4, "not in the cache"),
        (["verify", "starter"], 2, "was not pulled"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_sentence(
    models: Run, arguments: list[str], code: int, sentence: str, tmp_path: Path
) -> None:
    refused = models(*arguments)
    assert refused.returncode == code, refused.stderr
    assert sentence in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert refused.stdout == ""
    assert not (tmp_path / "config/sdcli").exists()


def test_a_controlnet_is_shown_by_its_name() -> None:
    shown = CliRunner().invoke(app, ["show", "canny", "--json"], catch_exceptions=False)
    assert json.loads(shown.stdout)["origin"] == "lllyasviel/control_v11p_sd15_canny"
    spec = load_registry().find_controlnet("maker/net@v2")
    assert spec.origin() == "maker/net@v2"


@pytest.mark.parametrize("name", ["a/b", "", "../x", "x.safetensors", "x.ckpt", "a b", "-x", "é" * 80])
def test_a_name_that_would_be_taken_for_a_path_is_refused(environment: dict[str, str], name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a model"):
        add_model(name, {"source": HUB}, overwrite=False)


def test_other_entries_survive_and_lost_comments_are_kept_beside(environment: dict[str, str]) -> None:
    file = user_registry_file()
    file.parent.mkdir(parents=True)
    text = "# mine\ndefault: first\nmodels:\n  first: {source: {kind: hub, repo: a/b}, license: MIT}  # the good one\n"
    file.write_text(text)
    written = add_model("second", {"source": HUB, "description": "日本 #1"}, overwrite=False)
    assert written.backup is not None
    assert written.backup.read_text() == text
    data = yaml.safe_load(file.read_text())
    assert list(data["models"]) == ["first", "second"]
    assert data["models"]["first"] == {"source": {"kind": "hub", "repo": "a/b"}, "license": "MIT"}
    assert data["default"] == "first"
    assert load_registry().models["second"].description == "日本 #1"


def test_our_own_heading_is_no_comment_to_lose(environment: dict[str, str]) -> None:
    add_model("first", {"source": HUB}, overwrite=False)
    assert add_model("second", {"source": HUB}, overwrite=False).backup is None
    assert set_default("second").backup is None
    assert remove_model("second").backup is None
    assert list(load_registry().models)[-1] == "first"


def test_nothing_is_replaced_unasked(environment: dict[str, str]) -> None:
    add_model("mine", {"source": HUB}, overwrite=False)
    with pytest.raises(UsageError, match="--overwrite replaces it"):
        add_model("mine", {"source": HUB, "license": "MIT"}, overwrite=False)
    add_model("mine", {"source": HUB, "license": "MIT"}, overwrite=True)
    assert load_registry().models["mine"].license == "MIT"
    add_model("sd15", {"source": HUB}, overwrite=True)
    assert load_registry().models["sd15"].source == HubSource(**HUB)
    remove_model("sd15")
    assert load_registry().models["sd15"].origin().startswith("stable-diffusion-v1-5/")


def test_a_broken_file_of_the_user_is_not_written_over(environment: dict[str, str]) -> None:
    file = user_registry_file()
    file.parent.mkdir(parents=True)
    file.write_text("models: [1, 2]\n")
    with pytest.raises(UsageError, match="should be a mapping"):
        add_model("mine", {"source": HUB}, overwrite=False)
    assert file.read_text() == "models: [1, 2]\n"


def test_a_folder_that_cannot_be_written_is_told(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config").write_text("a file where the folder should be")
    with pytest.raises(CannotWrite):
        add_model("mine", {"source": HUB}, overwrite=False)


@pytest.mark.parametrize(
    ("text", "options", "found"),
    [
        ("maker/small", {}, {"kind": "hub", "repo": "maker/small"}),
        ("maker/small@v1", {}, {"kind": "hub", "repo": "maker/small", "revision": "v1"}),
        (
            "maker/small",
            {"revision": "v1", "variant": "fp16"},
            {"kind": "hub", "repo": "maker/small", "revision": "v1", "variant": "fp16"},
        ),
        ("maker/small@v1", {"revision": "v2"}, UsageError),
        ("a/b.ckpt", {}, NotFound),
        ("model.ckpt", {}, UsageError),
        ("model.txt", {}, UsageError),
        ("folder", {}, NotFound),
        ("model.safetensors", {"variant": "fp16"}, UsageError),
    ],
)
def test_a_source_is_told_by_how_it_looks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    options: dict[str, str],
    found: dict[str, str] | type[SdcliError],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model.ckpt", "model.txt", "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder").mkdir()
    chosen = {"revision": None, "variant": None} | options
    if isinstance(found, dict):
        assert source_of(text, **chosen) == found
    else:
        with pytest.raises(found):
            source_of(text, **chosen)


@pytest.mark.slow
def test_the_default_is_of_files_that_every_command_reads(
    models: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = tmp_path / "lab.yaml"
    lab.write_text("models:\n  lab: {source: {kind: random, architecture: tiny, seed: 1}}\n")
    monkeypatch.setenv("SDCLI_MODELS_FILE", str(lab))
    refused = models("default", "lab")
    assert (refused.returncode, "no model 'lab' in the models files" in refused.stderr) == (3, True)
    own = tmp_path / "config/sdcli/models.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("default: lab\n")
    assert models("default").stdout.strip() == "lab"  # a file on top may hold it
    monkeypatch.delenv("SDCLI_MODELS_FILE")
    assert models("default").returncode == 2
    assert models("default", "tiny").returncode == 0  # and this mends it
    assert models("default").stdout.strip() == "tiny"


def test_a_template_that_leaves_the_prompt_out_is_refused(models: Run) -> None:
    refused = models("add", "mine", "owner/name", "--prompt-template", "glossy style")
    assert (refused.returncode, "defaults.prompt_template" in refused.stderr) == (2, True)
