"""--sharding full: several processes that hold some rows each train as one process that holds everything."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from sdcli.training.run_log import read_log
from sdcli.training.settings import TrainSettings
from sdcli.training.state.checkpoint import newest_checkpoint
from sdcli.training.state.sharded_files import sort_metadata, write_one_by_one
from sdcli.training.unet.settings import UnetSettings
from sdcli.training.vae.settings import VaeSettings
from tests.training.ranks import run_ranks, together, training
from tests.training_runs import (
    MICRO_UNET,
    captioned_images,
    grey_images,
    same_checkpoint,
    train_controlnet,
    train_pixels,
    train_unet,
)

SAME: dict[str, Any] = {
    "max_train_steps": 3, "validation_split": 0.0, "sample_steps": 1, "sample_prompts": ("a picture",),
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "sgd without clipping": {"optimizer": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.05},
    "averages, accumulation, checkpointing": {
        "use_ema": True,
        "ema_power": 0.1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "max_grad_norm": 0.05,
    },
    "muon": {"optimizer": "muon"},
    "a text encoder along": {"train_text_encoder": True, "optimizer": "sgd", "learning_rate": 0.01},
    "a lora": {"rank": 3, "use_ema": True, "optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return captioned_images(tmp_path / "pictures", 8)


@pytest.fixture
def greys(tmp_path: Path) -> Path:
    return grey_images(tmp_path / "greys", 8)


def figures(run: Path) -> list[tuple[float, float]]:
    """Loss and norm of the gradients of each step."""
    log = read_log(run)
    return list(zip(log.series("train", "loss")[1], log.series("train", "grad_norm")[1], strict=True))


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of the files in a checkpoint but those of optimizers, by file and name."""
    files = [path for path in checkpoint.rglob("*.safetensors") if "optimizer" not in str(path.relative_to(checkpoint))]
    return {f"{path.relative_to(checkpoint)} {name}": one for path in files for name, one in load_file(path).items()}


def check_parity(one: Path, many: Path, *, step: int = 3, tolerance: float = 1e-5) -> None:
    for (loss, norm), (other_loss, other_norm) in zip(figures(one), figures(many), strict=True):
        assert other_loss == pytest.approx(loss, abs=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)
    expected, found = weights(one / f"checkpoint-{step}"), weights(many / f"checkpoint-{step}")
    assert expected
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        difference = (found[name] - tensor).abs()
        assert float(difference.max()) < tolerance, name
        assert float(difference.mean()) < 1e-5, name


def several(rank: int, data: str, folder: str, runs: dict[str, dict[str, Any]]) -> None:
    for place, (name, changes) in enumerate(runs.items()):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + (place > 0))
        training(rank, data, f"{folder}/{name}", changes)


def per_process(changes: dict[str, Any], processes: int) -> dict[str, Any]:
    return {"sharding": "full", **changes, "train_batch_size": 4 // processes}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "names"), [(2, tuple(VARIANTS)), (4, ("averages, accumulation, checkpointing", "muon"))]
)
def test_every_way_of_training_is_that_of_one_process(
    tmp_path: Path, data: Path, processes: int, names: tuple[str, ...]
) -> None:
    runs = {name: per_process({**SAME, **VARIANTS[name]}, processes) for name in names}
    together(processes, several, tmp_path, str(data), str(tmp_path / "many"), runs)
    for name in names:
        train_unet(data, tmp_path / name, train_batch_size=4, **SAME, **VARIANTS[name])
        # Muon makes its updates in bfloat16, where the last digit of a gradient can be a digit of the update.
        check_parity(tmp_path / name, tmp_path / "many" / name, tolerance=1e-4 if name == "muon" else 1e-5)
        shards = (tmp_path / "many" / name / "checkpoint-3" / "state").glob("optimizer_unet/shard-*")
        assert len(list(shards)) == processes, name


def conditioned(rank: int, data: str, run: str, changes: dict[str, Any]) -> None:
    """`sdcli train-controlnet` in a rank."""
    train_controlnet(Path(data), Path(run), **changes)


@pytest.mark.slow
def test_a_controlnet_on_two_processes_is_that_of_one(tmp_path: Path, data: Path) -> None:
    """SGD, as AdamW makes a whole step of the rounding of a gradient that is nearly zero, as many are at first."""
    changes = {**SAME, "preprocessor": "softedge", "optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    together(2, conditioned, tmp_path, str(data), str(tmp_path / "two"), per_process(changes, 2))
    train_controlnet(data, tmp_path / "one", train_batch_size=4, **changes)
    check_parity(tmp_path / "one", tmp_path / "two")
    first = weights(tmp_path / "one" / "checkpoint-3")
    assert any(float(tensor.abs().max()) > 0 for name, tensor in first.items() if "controlnet_mid_block" in name)
    assert list((tmp_path / "two" / "checkpoint-3" / "state").glob("optimizer_controlnet/shard-00002-*"))


# Resuming


def resumed(rank: int, data: str, run: str, changes: dict[str, Any]) -> None:
    training(rank, data, run, {**changes, "resume": True})


RESUMED: dict[str, Any] = {"max_train_steps": 4, "checkpointing_steps": 2, "use_ema": True, "ema_power": 0.1}


@pytest.mark.slow
def test_a_resumed_run_of_as_many_processes_has_the_same_bytes(tmp_path: Path, greys: Path) -> None:
    changes = {**per_process({}, 2), **RESUMED}
    runs = {"straight": {**changes, "max_train_steps": 4}, "cut": {**changes, "max_train_steps": 2}}
    together(2, several, tmp_path, str(greys), str(tmp_path), runs)
    together(2, resumed, tmp_path, str(greys), str(tmp_path / "cut"), {**changes, "max_train_steps": 4})
    straight, cut = tmp_path / "straight" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4"
    assert same_checkpoint(straight, cut)
    assert not same_checkpoint(straight, tmp_path / "straight" / "checkpoint-2")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_any_number_of_processes_resumes_what_another_began(tmp_path: Path, greys: Path, optimizer: str) -> None:
    """One whole, two, four, one, and two with all weights each, with a checkpoint after every other step."""
    changes = {**RESUMED, "optimizer": optimizer}
    train_pixels(greys, tmp_path / "one", train_batch_size=4, **{**changes, "max_train_steps": 10})
    run = tmp_path / "run"
    train_pixels(greys, run, train_batch_size=4, **{**changes, "max_train_steps": 2})
    for steps, processes, sharding in ((4, 2, "full"), (6, 4, "full"), (8, 1, "full"), (10, 2, "none")):
        now = {**changes, **per_process({}, processes), "max_train_steps": steps, "sharding": sharding}
        together(processes, resumed, tmp_path, str(greys), str(run), now)
    check_parity(tmp_path / "one", run, step=10)
    state = json.loads((run / "checkpoint-6" / "train_state.json").read_text())["optimizers"]["unet"]
    assert state["in_shards"]
    assert len(list((run / "checkpoint-6" / "state" / "optimizer_unet").glob("shard-*"))) == 4
    assert not (run / "checkpoint-8" / "state" / "optimizer_unet").exists()


@pytest.mark.slow
def test_the_run_is_a_model_folder_for_sdcli_and_for_diffusers(tmp_path: Path, data: Path, sdcli: Any) -> None:
    from diffusers import StableDiffusionPipeline

    run = tmp_path / "run"
    changes = {**per_process({**SAME, "use_ema": True}, 2), "sample_every_n_steps": 3, "validation_steps": 3}
    changes |= {"validation_split": 0.25, "sample_steps": 2, "sample_prompts": ("a picture",)}
    together(2, training, tmp_path, str(data), str(run), changes)
    pipeline = StableDiffusionPipeline.from_pretrained(run)
    averaged = load_file(run / "checkpoint-3" / "unet_ema" / "diffusion_pytorch_model.safetensors")
    assert type(pipeline.unet).__name__ == "UNet2DConditionModel"
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert sdcli("generate", "a picture", "-m", run, "--steps", "2", "-o", "one.png").returncode == 0
    assert (run / "samples" / "step-3.png").is_file()
    log = read_log(run)
    assert log.of("end")[-1]["failed"] == {}
    assert len(log.of("validation")) == 1


# What fails in one process


def dying(rank: int, data: str, run: str, changes: dict[str, Any], dies: int, where: str) -> None:
    """Train; the rank `dies` is killed within the save of step 4, at a place."""
    saves, second = 0, 3 if where == "a network" else 2  # a save writes the network and its average

    def kill(after: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal saves
            saves += 1
            result = after(*arguments, **named) if where.endswith("written") else None
            if saves == second and rank == dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return result if where.endswith("written") else after(*arguments, **named)

        return call

    place = {
        "the rows": "sdcli.training.state.training_state.write_shards",
        "the rows written": "sdcli.training.state.training_state.write_shards",
        "a network": "sdcli.training.unet.task.write_network",
        "the manifest": "sdcli.training.state.checkpoint.seal",
        "the manifest written": "sdcli.training.state.checkpoint.seal",
    }[where]
    module, _, name = place.rpartition(".")
    with mock.patch(place, kill(getattr(__import__(module, fromlist=[name]), name))):
        training(rank, data, run, changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dies", "where"),
    [(1, "the rows"), (1, "the rows written"), (0, "a network"), (0, "the manifest"), (0, "the manifest written")],
)
def test_a_kill_of_any_process_within_a_save_leaves_a_run_to_resume(
    tmp_path: Path, greys: Path, dies: int, where: str
) -> None:
    changes = {**per_process({}, 2), **RESUMED, "max_train_steps": 4}
    run = tmp_path / "run"
    codes = run_ranks(2, dying, tmp_path, str(greys), str(run), changes, dies, where)
    assert codes[dies] == -signal.SIGKILL
    assert codes[1 - dies] not in (0, -signal.SIGKILL), "the other one waits for ever"
    assert newest_checkpoint(run).step == 2
    together(2, resumed, tmp_path, str(greys), str(run), changes)
    together(2, training, tmp_path, str(greys), str(tmp_path / "straight"), changes)
    assert same_checkpoint(tmp_path / "straight" / "checkpoint-4", run / "checkpoint-4")
    assert not [path.name for path in run.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def without_room(rank: int, data: str, run: str, changes: dict[str, Any], full: int, where: str) -> None:
    """Train; the disk of the rank `full` has no room for what the second save writes at a place."""
    saves = 0
    module = {"rows": "torch.distributed.checkpoint.filesystem", "networks": "sdcli.training.unet.task"}[where]
    name = {"rows": "_write_files_from_queue", "networks": "write_network"}[where]
    original = getattr(__import__(module, fromlist=[name]), name)

    def write(*arguments: Any, **named: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves > (1 if where == "rows" else 2) and rank == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **named)

    with mock.patch(f"{module}.{name}", write):
        training(rank, data, run, changes)


@pytest.mark.slow
@pytest.mark.parametrize(("full", "where"), [(1, "rows"), (0, "rows"), (0, "networks")])
def test_a_full_disk_of_one_process_ends_all_of_them_with_a_sentence(
    tmp_path: Path, greys: Path, full: int, where: str
) -> None:
    changes = {**per_process({}, 2), **RESUMED, "max_train_steps": 4}
    run = tmp_path / "run"
    assert run_ranks(2, without_room, tmp_path, str(greys), str(run), changes, full, where) == [8, 8]
    assert "CannotWrite" in (tmp_path / f"rank-{full}.txt").read_text()
    assert newest_checkpoint(run).step == 2
    together(2, resumed, tmp_path, str(greys), str(run), changes)
    assert newest_checkpoint(run).step == 4


# Settings and files


@pytest.mark.parametrize("other", [{"compile": True}, {"channels_last": True}, {"optimizer": "adamw-8bit"}])
def test_what_cannot_be_spread_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="--sharding full cannot be combined with"):
        UnetSettings(sharding="full", **other)
    assert TrainSettings(**other).sharding == "none"


def test_a_vae_is_not_spread() -> None:
    with pytest.raises(ValidationError, match="a VAE fits any device"):
        VaeSettings(sharding="full")


def test_a_file_of_one_tensor_after_another_has_the_bytes_of_the_librarys(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"block.{number}.wéight": torch.randn(number + 1, 3) for number in range(12)}
    tensors["none"] = torch.empty(0, 4)
    save_file(tensors, tmp_path / "library", metadata={"format": "pt", "a": "b"})
    sort_metadata(tmp_path / "library")
    write_one_by_one(tmp_path / "ours", dict(reversed(tensors.items())), {"format": "pt", "a": "b"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_one_process_holds_everything_and_says_so(tmp_path: Path) -> None:
    from sdcli.models.registry import load_registry
    from sdcli.training.unet.session import UnetSession
    from tests.training_runs import QUICK, fresh_accelerator

    data = grey_images(tmp_path / "grey")
    changes = {"space": "pixel", "from_scratch": str(tmp_path / "micro.json"), "resolution": "8"}
    fresh_accelerator()
    values = {**{name: value for name, value in QUICK.items() if name != "model"}, **changes, "sharding": "full"}
    with UnetSession(str(data), tmp_path / "run", UnetSettings(**values), load_registry()) as session:
        list(session.prepare(resume=False))
        lines, plan = list(session.plan_lines(devices=True)), session.plan()
    assert any("has one process here" in line for line in lines)
    assert plan["sharding"] == "none"
    assert set(plan["memory_bytes_by_devices"]) == {"1", "2", "4", "8"}
    assert plan["memory_bytes"] == plan["memory_bytes_by_devices"]["1"]["none"]
    assert MICRO_UNET["_class_name"] == "UNet2DModel"
