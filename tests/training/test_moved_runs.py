"""Runs that are extended, resumed from another folder, moved or copied without links, and runs of earlier versions."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sdcli.errors import CannotWrite, NotFound, UsageError
from sdcli.models.registry import load_registry
from sdcli.training.run_folder import absolute_data
from sdcli.training.run_log import RunLog, read_log
from sdcli.training.state.checkpoint import newest_checkpoint, save_checkpoint
from sdcli.training.state.copied_run import restore_links
from sdcli.training.state.manifest import Manifest, seal
from sdcli.training.state.merged_model import is_merged, write_merged
from sdcli.training.state.model_links import current_checkpoint, link_model_folder
from sdcli.training.state.run_lock import run_lock
from tests.training.state.test_checkpoint import no_links
from tests.training_runs import captioned_images, grey_images, same_checkpoint, train_pixels, train_unet


@pytest.fixture
def greys(tmp_path: Path) -> Path:
    return grey_images(tmp_path / "greys")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captioned_images(tmp_path_factory.mktemp("data") / "images")


def lora(data: Path, run: Path, **changes: Any) -> None:
    """A LoRA of miniature networks with averages, a checkpoint at each step."""
    quick: dict[str, Any] = {
        "rank": 2, "use_ema": True, "validation_split": 0.0, "checkpointing_steps": 1, "learning_rate": 1e-2,
        "cache_dir": data.parent / "cache",
    }  # fmt: skip
    train_unet(data, run, **{**quick, **changes})


def recorded(run: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((run / "settings.yaml").read_text()))


# Limits that a resume changes


@pytest.mark.slow
@pytest.mark.parametrize(
    "limits", [{"max_train_steps": 4}, {"max_train_steps": None, "num_train_epochs": 1.34}, {"max_hours": 1.0}]
)
def test_what_a_resume_extends_is_recorded_for_the_next(tmp_path: Path, greys: Path, limits: dict[str, Any]) -> None:
    train_pixels(greys, tmp_path / "run", max_train_steps=1)
    train_pixels(greys, tmp_path / "run", resume=True, checkpointing_steps=2, **limits)
    values = recorded(tmp_path / "run")
    assert values["checkpointing_steps"] == 2
    for name, value in limits.items():
        assert values.get(name) == value


def test_settings_yaml_is_not_touched_where_nothing_changes(tmp_path: Path, greys: Path) -> None:
    train_pixels(greys, tmp_path / "run")
    file = tmp_path / "run" / "settings.yaml"
    file.write_text(f"# mine\n{file.read_text()}")
    train_pixels(greys, tmp_path / "run", resume=True)
    assert file.read_text().startswith("# mine\n")


# Paths


@pytest.mark.slow
def test_paths_are_recorded_as_absolute_ones_and_names_as_they_are(
    tmp_path: Path, tiny_folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "there" / "base")
    shutil.copytree(images, tmp_path / "there" / "images")
    (tmp_path / "there" / "tiny").mkdir()  # a model's name comes before a folder's
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    lora(Path("images"), Path("../run"), model="base", max_train_steps=1, cache_dir=Path("../cache"))
    lora(Path("images"), Path("../named"), max_train_steps=1, cache_dir=Path("../cache"))
    values = recorded(tmp_path / "run")
    assert values["model"] == str(tmp_path / "there" / "base")
    assert values["data"] == str(tmp_path / "there" / "images")
    assert values["cache_dir"] == str(tmp_path / "cache")
    assert recorded(tmp_path / "named")["model"] == "tiny"

    monkeypatch.chdir(tmp_path / "elsewhere")
    for model in (values["model"], "../there/base"):
        lora(Path(values["data"]), tmp_path / "run", model=model, max_train_steps=2, resume=True)
    os.rename(tmp_path / "there", tmp_path / "moved")
    with pytest.raises(NotFound, match=r"If it was moved, say where it is now: .*-m NEW_MODEL"):
        lora(tmp_path / "moved" / "images", tmp_path / "run", model=values["model"], max_train_steps=3, resume=True)
    with pytest.raises(NotFound, match="NEW_DATA"):
        lora(Path(values["data"]), tmp_path / "run", model="../moved/base", max_train_steps=3, resume=True)
    lora(tmp_path / "moved" / "images", tmp_path / "run", model="../moved/base", max_train_steps=3, resume=True)
    assert recorded(tmp_path / "run")["model"] == str(tmp_path / "moved" / "base")
    assert recorded(tmp_path / "run")["data"] == str(tmp_path / "moved" / "images")

    with pytest.raises(UsageError, match=r"the weights changed|not the same as when this run started"):
        lora(tmp_path / "moved" / "images", tmp_path / "run", model="tiny", max_train_steps=3, resume=True)


@pytest.mark.slow
def test_another_model_in_the_same_place_is_noticed(tmp_path: Path, tiny_folder: Path, images: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "base")
    train_unet(images, tmp_path / "run", model=str(tmp_path / "base"), max_train_steps=1)
    file = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"beta_end": 0.012', '"beta_end": 0.013'))
    with pytest.raises(UsageError, match=r"noise schedule: not the same as when this run started"):
        train_unet(images, tmp_path / "run", model=str(tmp_path / "base"), max_train_steps=2, resume=True)


@pytest.mark.parametrize(
    ("data", "kept"),
    [("owner/name", True), ("hf://datasets/owner/name:config", True), ("shards/{00..09}.tar", False), ("*.tar", False)],
)
def test_only_what_is_a_path_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, kept: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_data(data) == (data if kept else str(tmp_path / data))


# Copies


def follow_links(run: Path, copy: Path) -> None:
    """`cp -rL`, `rsync -L`: links become what they point to."""
    shutil.copytree(run, copy, symlinks=False)


def leave_links_out(run: Path, copy: Path) -> None:
    """`rsync -r`: links are skipped."""
    shutil.copytree(run, copy, symlinks=True)
    for path in [path for path in copy.rglob("*") if path.is_symlink()]:
        path.unlink()


def zipped(run: Path, copy: Path) -> None:
    """`zip -r`, and unpacked: no links, no permissions, times to two seconds, no empty folders."""
    with zipfile.ZipFile(copy.with_suffix(".zip"), "w") as file:
        for place, _, names in os.walk(run, followlinks=True):
            for name in names:
                file.write(Path(place, name), Path(place, name).relative_to(run))
    with zipfile.ZipFile(copy.with_suffix(".zip")) as file:
        file.extractall(copy)


def links_as_text(run: Path, copy: Path) -> None:
    """Unpacked on a system without links: a link becomes a file with its target."""
    shutil.copytree(run, copy, symlinks=True)
    for path in [path for path in copy.rglob("*") if path.is_symlink()]:
        target = os.readlink(path)
        path.unlink()
        path.write_text(target)


def hard_linked(run: Path, copy: Path) -> None:
    """`cp -al`: both share their files."""
    shutil.copytree(run, copy, symlinks=True, copy_function=os.link)


def with_junk(run: Path, copy: Path) -> None:
    """What macOS and Windows leave in folders."""
    shutil.copytree(run, copy, symlinks=False)
    for folder in [path for path in copy.rglob("*") if path.is_dir()]:
        for name in (".DS_Store", "._unet", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"\0")


def read_only(run: Path, copy: Path) -> None:
    """Unpacked from an archive with the permissions of a read-only medium."""
    shutil.copytree(run, copy, symlinks=False)
    for path in copy.rglob("*"):
        if path.is_file():
            path.chmod(0o444)


COPIES = [
    follow_links,
    links_as_text,
    hard_linked,
    *(pytest.param(copy, marks=pytest.mark.slow) for copy in (leave_links_out, zipped, with_junk, read_only)),
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A LoRA run of 2 steps, `run`, and one of 3, `straight`."""
    root = tmp_path_factory.mktemp("begun")
    lora(images, root / "run", max_train_steps=2)
    lora(images, root / "straight", max_train_steps=3)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("copy", COPIES)
def test_a_copied_run_goes_on_as_the_original_would(
    tmp_path: Path, begun: Path, images: Path, copy: Callable[[Path, Path], None]
) -> None:
    log = (begun / "run" / "log.jsonl").read_bytes()
    copied = tmp_path / "copied"
    copy(begun / "run", copied)
    lora(images, copied, max_train_steps=2, resume=True)  # nothing is left to do, but RUN is a model folder again
    assert sorted(path.name for path in (copied / "unet").iterdir()) == sorted(os.listdir(begun / "run" / "unet"))
    lora(images, copied, max_train_steps=3, resume=True)
    assert same_checkpoint(begun / "straight" / "checkpoint-3", copied / "checkpoint-3")
    assert os.readlink(copied / "current") == "checkpoint-3"
    assert os.readlink(copied / "unet") == "merged/unet_ema"
    assert os.readlink(copied / "raw" / "unet") == "../merged/unet"
    assert len([path for path in copied.iterdir() if path.name.startswith("merged-")]) == 1
    one, other = (next((run / "unet").glob("*.safetensors")).read_bytes() for run in (copied, begun / "straight"))
    assert one == other
    assert read_log(copied).of("end")[-1]["step"] == 3
    assert (begun / "run" / "log.jsonl").read_bytes() == log, "the original is not touched"
    assert os.readlink(begun / "run" / "current") == "checkpoint-2"


def small_run(run: Path, *values: int) -> Path:
    """Checkpoints with a folder `unet` each, and the links to it."""

    def write(folder: Path, value: int) -> None:
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text(str(value))
        (folder / "unet" / "weights").write_bytes(bytes([value]) * 1000)

    for value in values:
        save_checkpoint(run, value, lambda folder, value=value: write(folder, value), facts={}, keep=None)  # type: ignore[misc]
        link_model_folder(run, {"unet": "unet", "raw/unet": "unet"})
    return run


PARTS = {"unet": "unet", "raw/unet": "unet"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("template") / "run", 10, 20)


def test_a_folder_that_is_no_copy_is_never_deleted_and_named(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", 10, 20)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "unet" / "weights").write_bytes(b"merged by hand")
    with pytest.raises(CannotWrite, match=r"copy/unet is a folder where the run has a link.*weights; move it away"):
        restore_links(copy, "checkpoint-20", PARTS, {})
    assert (copy / "unet" / "weights").read_bytes() == b"merged by hand"
    os.rename(copy / "unet", copy / "mine")
    assert restore_links(copy, "checkpoint-20", PARTS, {}) == ["raw/unet"]
    assert (copy / "unet" / "config.json").read_text() == "20"
    assert current_checkpoint(copy) == copy / "checkpoint-20"


@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_copy_loses_a_byte_that_is_in_no_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, template: Path, data: st.DataObject
) -> None:
    check_copy(template, tmp_path_factory.mktemp("copy"), data)


@pytest.mark.slow
@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_copy_of_many_loses_a_byte_that_is_in_no_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, template: Path, data: st.DataObject
) -> None:
    check_copy(template, tmp_path_factory.mktemp("copy"), data)


def check_copy(template: Path, root: Path, data: st.DataObject) -> None:
    """Any mixture of links, copies, texts and foreign files in the links' places: mended, or refused untouched."""
    run = Path(shutil.copytree(template, root / "run", symlinks=True))
    places = {run / name: (run / name).resolve() for name in ("current", "unet", "raw/unet")}
    for place, real in places.items():
        target = os.readlink(place)
        how = data.draw(st.sampled_from(["link", "copy", "older", "partial", "text", "absent", "changed", "extra"]))
        if how == "link":
            continue
        place.unlink()
        if how in {"copy", "partial", "changed", "extra", "older"}:
            source = real if how != "older" else Path(str(real).replace("checkpoint-20", "checkpoint-10"))
            shutil.copytree(source, place)
        if how == "partial":
            next(place.rglob("weights")).unlink()
        if how == "changed":
            next(place.rglob("config.json")).write_text(data.draw(st.text("ab", min_size=3, max_size=5)))
        if how == "extra":
            (place / data.draw(st.sampled_from(["mine", "unet2", "weights.bak", ".hidden"]))).write_text("precious")
        if how == "text":
            place.write_text(target)
    checkpoints = {path: path.read_bytes() for path in run.glob("checkpoint-*/**/*") if path.is_file()}
    others = {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and not path.is_symlink() and "checkpoint-" not in str(path.relative_to(run))
    }
    precious = {path: content for path, content in others.items() if content not in checkpoints.values()}
    precious = {path: content for path, content in precious.items() if path.parent != run and path.name != "unet"}
    try:
        restore_links(run, "checkpoint-20", PARTS, {})
    except CannotWrite:
        assert precious
    else:
        assert not precious
        assert (run / "unet" / "config.json").read_text() == (run / "current" / "unet" / "config.json").read_text()
        assert current_checkpoint(run) is not None
        assert (run / "unet").is_symlink()
        assert (run / "raw" / "unet").is_symlink()
    for path, content in {**checkpoints, **precious}.items():
        assert path.read_bytes() == content
    shutil.rmtree(root)


def test_a_run_on_a_disk_without_links_keeps_its_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "symlink", no_links)
    run = small_run(tmp_path / "run", 10)
    assert restore_links(run, "checkpoint-10", PARTS, {}) == []
    assert (run / "unet" / "config.json").read_text() == "10"
    (run / "current").unlink()
    shutil.copytree(run / "checkpoint-10", run / "current")  # copied there from a disk with links
    assert restore_links(run, "checkpoint-10", PARTS, {}) == ["current"]
    assert (run / "current").read_text() == "checkpoint-10\n"


def test_a_log_that_a_copy_shares_is_copied_before_it_is_written(tmp_path: Path) -> None:
    with RunLog.open(tmp_path) as log:
        log.write("note", text="both")
    (tmp_path / "copy").mkdir()
    os.link(tmp_path / "log.jsonl", tmp_path / "copy" / "log.jsonl")
    with RunLog.open(tmp_path / "copy") as log:
        log.write("note", text="the copy's")
    assert "the copy's" not in (tmp_path / "log.jsonl").read_text()
    assert len((tmp_path / "copy" / "log.jsonl").read_text().splitlines()) == 2


def test_a_lock_that_a_copy_shares_becomes_its_own_and_stays_a_lock(tmp_path: Path) -> None:
    one, copy = tmp_path / "one", tmp_path / "copy"
    with run_lock(one):
        copy.mkdir()
        os.link(one / ".lock", copy / ".lock")
        with pytest.raises(CannotWrite, match=r"shares its files with that run, by hard links, delete .*\.lock"):
            run_lock(copy).__enter__()
    with run_lock(copy), pytest.raises(CannotWrite, match="in use"), run_lock(copy):
        pass
    with run_lock(copy), run_lock(one):
        pass


# LoRA checkpoints, and those of earlier versions


def test_a_lora_checkpoint_holds_what_is_trained_and_no_more(begun: Path) -> None:
    files = {path.relative_to(begun / "run" / "checkpoint-2").as_posix() for path in files_of(begun / "run")}
    assert files == {
        "lora_kohya.safetensors", "pytorch_lora_weights.safetensors", "manifest.json", "train_state.json",
        "state/unet.safetensors", "state/unet_ema.safetensors", "state/optimizer_unet.safetensors",
    }  # fmt: skip
    merged = sum(path.stat().st_size for path in (begun / "run" / "unet").iterdir())
    weights = sum(path.stat().st_size for path in files_of(begun / "run") if path.suffix == ".safetensors")
    assert weights < merged


def files_of(run: Path) -> list[Path]:
    return [path for path in (run / "checkpoint-2").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_merged_model_that_does_not_fit_on_the_disk_ends_no_run(
    tmp_path: Path, images: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdcli.training.unet.task import UnetTask

    def full(self: UnetTask, folder: Path, *networks: Any) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(UnetTask, "write_merged", full)
        lora(images, tmp_path / "run", max_train_steps=3)
    run = tmp_path / "run"
    assert not (run / "unet").exists()
    assert not list(run.glob(".sdcli-*"))
    assert read_log(run).of("end")[-1]["failed"]["merged models"] == 3
    lora(images, run, max_train_steps=3, resume=True)
    assert is_merged(run, run / "checkpoint-3", ["unet", "raw/unet"])
    one, other = (next((some / "unet").glob("*.safetensors")).read_bytes() for some in (run, begun / "straight"))
    assert one == other


def test_the_merged_model_is_that_of_the_checkpoint_and_there_is_one(tmp_path: Path) -> None:
    run = small_run(tmp_path, 10, 20)
    for step in (10, 20):
        write_merged(run, run / f"checkpoint-{step}", lambda folder: (folder / "unet").mkdir(), {"unet": "unet"})
        assert is_merged(run, run / f"checkpoint-{step}", ["unet"])
    assert not is_merged(run, run / "checkpoint-10", ["unet"])
    assert len(list(run.glob("merged-*"))) == 1


def as_of_an_earlier_version(run: Path) -> None:
    """Turn a LoRA run into the layout of 0.1.0: the merged network in each checkpoint, relative paths, no origin."""
    merged = run / os.readlink(run / "merged")
    for checkpoint in run.glob("checkpoint-*"):
        facts = dict(newest_checkpoint(run).facts)
        facts.pop("origin", None)
        for part in merged.iterdir():
            shutil.copytree(part, checkpoint / part.name)
        (checkpoint / "manifest.json").unlink()
        seal(checkpoint, Manifest(int(checkpoint.name.removeprefix("checkpoint-")), {}, facts))
    shutil.rmtree(merged)
    for name in ("merged", "unet", "raw/unet"):
        (run / name).unlink()
    link_model_folder(run, {"unet": "unet_ema", "raw/unet": "unet"})
    values = recorded(run)
    values["data"] = os.path.relpath(values["data"])
    (run / "settings.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("copied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_lora_run_of_an_earlier_version_resumes_bit_for_bit(
    tmp_path: Path, begun: Path, images: Path, copied: bool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun / "run", run, symlinks=True)
    as_of_an_earlier_version(run)
    if copied:
        run = Path(shutil.copytree(run, tmp_path / "copy"))
    assert newest_checkpoint(run).step == 2
    assert (run / "checkpoint-2" / "unet_ema" / "config.json").is_file()
    lora(images, run, max_train_steps=3, resume=True)
    assert same_checkpoint(begun / "straight" / "checkpoint-3", run / "checkpoint-3")
    assert os.readlink(run / "unet") == "merged/unet_ema"
    assert (run / "checkpoint-2" / "unet_ema" / "config.json").is_file(), "the old checkpoint stays as it is"


@pytest.mark.slow
def test_a_run_of_an_earlier_version_whose_model_moved_is_compared_by_its_weights(
    tmp_path: Path, tiny_folder: Path, images: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "base")
    lora(images, tmp_path / "run", model=str(tmp_path / "base"), max_train_steps=2)
    as_of_an_earlier_version(tmp_path / "run")
    os.rename(tmp_path / "base", tmp_path / "moved")
    lora(images, tmp_path / "run", model=str(tmp_path / "moved"), max_train_steps=3, resume=True)
    assert newest_checkpoint(tmp_path / "run").step == 3
    assert "tiny" in load_registry().models
    with pytest.raises(UsageError, match="weights changed"):
        lora(images, tmp_path / "run", model="tiny", max_train_steps=4, resume=True)


@pytest.mark.slow
def test_diffusers_loads_a_lora_run_and_its_copy(begun: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    subprocess.run(["cp", "-rL", begun / "run", tmp_path / "copy"], check=True)
    for run in (begun / "run", tmp_path / "copy"):
        assert StableDiffusionPipeline.from_pretrained(run).unet is not None
