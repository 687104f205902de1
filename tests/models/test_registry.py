"""The registry: hostile files are refused in a sentence, overlays lie in order, every way to name a model is found."""

from __future__ import annotations

import contextlib
import string
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcli.errors import NotFound, SdcliError, UsageError
from sdcli.generation.resolve.resolve import resolve
from sdcli.io.files import PACKAGE
from sdcli.io.yaml_files import parse_own_yaml, parse_yaml, read_yaml
from sdcli.models import registry as registry_module
from sdcli.models.registry import load_registry, packaged_registry_file, read_registry_file
from sdcli.models.sources import FileSource, FolderSource, HubSource
from sdcli.request.schedulers import SCHEDULERS
from sdcli.request.schema import GenerationRequest

HOSTILE = {
    "a tag": ("models: !!python/object/apply:os.system ['touch canary']", "python/object"),
    "an unknown tag": ("models: !thing {}", "thing"),
    "an alias bomb": ("a: &a [x, x]\nmodels: {b: [*a, *a]}", "aliases are not allowed"),
    "deep nesting": ("models: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "deep mappings": ("models: " + "{a: " * 5000 + "}" * 5000, "nested too deeply"),
    "a key twice": ("default: tiny\ndefault: starter", "line 2: 'default' is there twice"),
    "an entry twice": ("models:\n  a: {}\n  a: {}", "line 3: 'a' is there twice"),
    "an unknown key": ("modles: {}", "unknown key 'modles'"),
    "another schema": ("schema: 9", "schema: 9 is not 1"),
    "a list": ("- a\n- b", "should be a mapping, not a list"),
    "models that are a list": ("models: [a]", "models: should be a mapping"),
    "an entry that is a word": ("models: {a: b}", "models.a: should be a mapping"),
    "a default that is a list": ("default: [a]", "default: should be the name of a model"),
    "broken syntax": ("models: {a: ", "line "),
    "a tab": ("models:\n\ta: b", "line 2"),
    "no source": ("models: {a: {license: MIT}}", "models.a.source"),
    "an unknown source": ("models: {a: {source: {kind: ftp}}}", "models.a.source"),
    "a repository with dots": ("models: {a: {source: {kind: hub, repo: ../../etc}}}", "models.a.source"),
    "an unknown field": ("models: {a: {source: {kind: hub, repo: a/b}, colour: red}}", "models.a.colour"),
    "a wrong type": (
        "models: {a: {source: {kind: hub, repo: a/b}, defaults: {steps: many}}}",
        "models.a.defaults.steps",
    ),
    "a size of nothing": ("models: {a: {source: {kind: hub, repo: a/b}, defaults: {width: 0}}}", "defaults.width"),
    "an unknown scheduler": (
        "models: {a: {source: {kind: hub, repo: a/b}, defaults: {scheduler: eulr}}}",
        "models.a.defaults.scheduler: no scheduler 'eulr'; did you mean 'euler'",
    ),
    "an unknown family": ("models: {a: {source: {kind: hub, repo: a/b}, family: sd9}}", "models.a.family"),
    "a timestamp for a name": ("models: {a: {source: {kind: hub, repo: 2001-01-01}}}", "models.a.source"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_sentence_that_names_file_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text, sentence = HOSTILE[case]
    file = tmp_path / "models.yaml"
    file.write_text(text)
    started = time.process_time()
    with pytest.raises(UsageError) as refused:
        read_registry_file(file)
    assert str(refused.value).startswith(str(file))
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert time.process_time() - started < 2
    assert not (tmp_path / "canary").exists()


def test_a_large_a_binary_and_an_absent_file_are_told(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    with pytest.raises(NotFound, match="no models file"):
        read_yaml(file)
    file.write_bytes(b"#" * 300_000)
    with pytest.raises(UsageError, match="larger than 256 KiB"):
        read_yaml(file)
    file.write_bytes(b"default: \xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_yaml(file)
    file.write_bytes(b"")
    assert read_yaml(file) == {}
    with pytest.raises(SdcliError):
        read_yaml(tmp_path)


@given(st.text(alphabet=string.ascii_letters + string.digits + " \n\t:-[]{}&*!|>'\"#%@`,?\0\x85é", max_size=200))
def test_any_text_is_read_or_refused_in_a_sentence(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_text(text, encoding="utf-8")
    with contextlib.suppress(SdcliError):
        read_registry_file(file)


def test_the_packaged_file_means_the_same_to_both_parsers() -> None:
    text = packaged_registry_file().read_text(encoding="utf-8")
    assert parse_own_yaml(text) == parse_yaml(text)


def test_a_changed_packaged_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "models.yaml"
    monkeypatch.setattr(registry_module, "packaged_registry_file", lambda: file)
    for name in ("first", "other"):
        file.write_text(f"default: {name}\nmodels: {{{name}: {{source: {{kind: hub, repo: a/{name}}}}}}}\n")
        assert load_registry().default == name
        assert [*load_registry().models] == [name]
    file.unlink()
    with pytest.raises(NotFound, match="no models file"):
        load_registry()


def test_the_packaged_file_is_sound() -> None:
    default, models, _ = read_registry_file(packaged_registry_file())
    assert default == "starter"
    for spec in models.values():
        assert spec.description, spec.name
        assert spec.license != "unknown", spec.name
        assert (spec.download_bytes > 0) == isinstance(spec.source, HubSource), spec.name
        assert spec.defaults.scheduler in SCHEDULERS
        resolve(GenerationRequest(prompt="a cat"), spec)


def test_later_files_lie_over_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    user, extra = tmp_path / "sdcli/models.yaml", tmp_path / "extra.yaml"
    user.parent.mkdir()
    user.write_text(
        "default: mine\nmodels:\n"
        "  mine: {source: {kind: hub, repo: a/mine}}\n"
        "  sd15: {source: {kind: hub, repo: a/b}}\n"
    )
    extra.write_text("models:\n  mine: {source: {kind: folder, path: sub/model}}\n")
    registry = load_registry()
    assert registry.default == "mine"
    assert registry.models["sd15"].origin() == "a/b"
    assert registry.models["starter"].origin() == "embedded in sdcli"
    laid_over = load_registry(extra)
    assert laid_over.default == "mine"
    assert laid_over.models["mine"].origin() == str(tmp_path / "sub/model"), "paths are relative to their file"
    monkeypatch.setenv("SDCLI_MODELS_FILE", str(extra))
    assert load_registry().models["mine"] == laid_over.models["mine"]
    extra.write_text("default: nobody\n")
    with pytest.raises(UsageError, match="no model 'nobody'"):
        load_registry(extra)


def test_a_model_is_found_by_name_folder_file_or_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    registry = load_registry()
    assert registry.find(None).name == "starter"
    assert registry.find("sd15").family.name == "sd1"
    folder = registry.find(str(PACKAGE / "starter"))
    assert folder.source == FolderSource(kind="folder", path=(PACKAGE / "starter").resolve())
    (tmp_path / "some.safetensors").write_bytes(b"")
    assert registry.find("some.safetensors").source == FileSource(kind="file", path=tmp_path / "some.safetensors")
    unknown = registry.find("maker/small@v1.0")
    assert unknown.source == HubSource(kind="hub", repo="maker/small", revision="v1.0")
    known = registry.find("stabilityai/sd-turbo")
    assert known.family.name == "sd2"
    assert known.defaults.steps == 1


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        ("sdturbo", NotFound, r"no model 'sdturbo' in models\.yaml; did you mean 'sd-turbo'\?"),
        ("./nothing", NotFound, "no file or folder"),
        ("gone.safetensors", NotFound, "no file or folder"),
        ("gone.ckpt", NotFound, "no file"),
        ("there.ckpt", UsageError, r"sdcli models convert there\.ckpt there\.safetensors"),
        ("a/b/c", NotFound, "no model"),
        ("../../etc", NotFound, "no file or folder"),
        ("a\0b", SdcliError, None),
        ("", NotFound, None),
        (".", NotFound, r"no model_index\.json"),
    ],
)
def test_a_name_that_means_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[SdcliError], sentence: str | None
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.ckpt").write_bytes(b"")
    with pytest.raises(error, match=sentence):
        load_registry().find(name)


def test_what_was_found_by_its_path_is_found_again_by_its_name(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine looks a request's model up once more, by the name in the resolved request."""
    file = tmp_path / "elsewhere" / "model.safetensors"
    file.parent.mkdir()
    file.touch()
    registry = load_registry()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starter").symlink_to(tiny_folder)
    for path in (str(tiny_folder), str(file), "./starter"):
        spec = registry.find(path)
        assert registry.find(spec.name) == spec
        assert registry.find(spec.name).source != registry.models["starter"].source
