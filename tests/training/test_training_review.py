"""Training commands at their edges: what is refused, what a resume may not change, what a stop says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from sdcli.cli.app import app
from sdcli.cli.training_command import TrainingCall, TrainingCommand, _resolved, settings_options
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.signals import GracefulStop
from sdcli.errors import CannotWrite, Interrupted, UsageError
from sdcli.io import rng
from sdcli.models.registry import load_registry
from sdcli.training.config_files import settings_from
from sdcli.training.controlnet.settings import ControlNetSettings
from sdcli.training.events import RunNote, SamplesSaved
from sdcli.training.loop import make_accelerator
from sdcli.training.run_folder import begin, check_free
from sdcli.training.settings import TrainSettings
from sdcli.training.state.checkpoint import newest_checkpoint
from sdcli.training.task import Networks
from sdcli.training.text_encoder.session import TextSession
from sdcli.training.text_encoder.settings import TextSettings
from sdcli.training.unet.session import UnetSession
from sdcli.training.unet.settings import UnetSettings
from sdcli.training.unet.task import UnetTask
from sdcli.training.vae.settings import VaeSettings
from tests.conftest import Run
from tests.forked import Forked
from tests.training_runs import (
    captioned_images,
    change_facts,
    class_images,
    fresh_accelerator,
    grey_images,
    run_session,
    train_pixels,
    train_unet,
)

GREY: dict[str, Any] = {"space": "pixel", "from_scratch": "pixel-grey", "resolution": "16", "sample_steps": 2}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return captioned_images(tmp_path / "pictures")


@pytest.mark.parametrize(
    ("kind", "typed", "sentence"),
    [
        (UnetSettings, {"prompt_template": "glossy"}, "lacks {prompt}"),
        (VaeSettings, {"caption_extension": ".cap"}, "without captions"),
        (TextSettings, {"gradient_checkpointing": True}, "no effect on a text encoder"),
        (TextSettings, {"channels_last": True}, "no effect on a text encoder"),
    ],
)
def test_settings_without_effect_are_refused(kind: type[TrainSettings], typed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        settings_from(kind, typed)


# Models without captions


@pytest.mark.slow
def test_a_model_that_paints_classes_goes_on_with_classes_alone(tmp_path: Path, images: Path) -> None:
    classes = class_images(tmp_path / "classes")
    train_unet(classes, tmp_path / "run", max_train_steps=1, class_conditional=True, **GREY)
    model = str(tmp_path / "run")
    train_unet(classes, tmp_path / "more", max_train_steps=1, model=model)
    with pytest.raises(UsageError, match="no classes; the model, which is class-conditional"):
        train_unet(images, tmp_path / "other", max_train_steps=1, model=model)
    with pytest.raises(UsageError, match="--train-text-encoder has no effect"):
        train_unet(classes, tmp_path / "other", max_train_steps=1, model=model, train_text_encoder=True)


def test_a_model_without_condition_goes_on_and_paints_its_samples(tmp_path: Path, images: Path) -> None:
    train_unet(class_images(tmp_path / "grey"), tmp_path / "run", max_train_steps=1, **GREY)
    changes = {"model": str(tmp_path / "run"), "sample_every_n_steps": 1, "sample_steps": 2}
    events = train_unet(images, tmp_path / "more", max_train_steps=1, **changes)
    assert any(isinstance(event, SamplesSaved) for event in events)
    with pytest.raises(UsageError, match="--sample-prompts has no effect"):
        train_unet(images, tmp_path / "other", max_train_steps=1, sample_prompts=("a cat",), **changes)


@pytest.mark.slow
def test_a_run_that_classes_condition_is_not_resumed_with_other_classes(tmp_path: Path) -> None:
    data, run = grey_images(tmp_path / "pictures", 4), tmp_path / "run"

    def labelled(*labels: str) -> None:
        rows = [{"file_name": f"{n}.png", "text": f"number {n}", "label": label} for n, label in enumerate(labels)]
        (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def resumed(steps: int) -> None:
        train_pixels(data, run, resume=True, class_conditional=True, max_train_steps=steps)

    labelled("cat", "cat", "dog", "dog")
    train_pixels(data, run, class_conditional=True, max_train_steps=1)
    labelled("cat", "dog", "cat", "dog")
    with pytest.raises(UsageError, match="changed since the run started: images have other classes"):
        resumed(2)
    change_facts(run, lambda facts: facts.pop("classes_fingerprint"))
    resumed(2)
    assert newest_checkpoint(run).step == 2
    train_pixels(data, tmp_path / "other", max_train_steps=1)
    assert "classes_fingerprint" not in newest_checkpoint(tmp_path / "other").facts


def test_a_temperature_without_distil_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.jsonl").write_text('{"text": ["a dog", "ein hund"]}\n')
    fresh_accelerator()
    settings = settings_from(TextSettings, {"model": "tiny", "objective": ("align",), "temperature": 0.1})
    with pytest.raises(UsageError, match="--temperature has no effect without --objective distil"):
        run_session(TextSession(str(tmp_path / "words.jsonl"), tmp_path / "run", settings, load_registry()))


@pytest.mark.slow
def test_a_text_encoder_is_not_resumed_on_other_groups_of_captions(tmp_path: Path) -> None:
    words, run = tmp_path / "words.jsonl", tmp_path / "run"

    def trained(groups: list[list[str]], steps: int, *, resume: bool = True) -> None:
        words.write_text("\n".join(json.dumps({"text": group}) for group in groups))
        fresh_accelerator()
        values = {"model": "tiny", "objective": ("align",), "validation_split": 0.0, "max_train_steps": steps}
        settings = settings_from(TextSettings, {**values, "train_batch_size": 2, "device": "cpu"})
        run_session(TextSession(str(words), run, settings, load_registry()), resume=resume)

    trained([["a dog", "ein hund"], ["a cat", "eine katze"]], 1, resume=False)
    with pytest.raises(UsageError, match="captions are alternatives of other captions"):
        trained([["a dog", "ein hund", "a cat"], ["eine katze"]], 2)
    change_facts(run, lambda facts: facts.pop("groups_fingerprint"))
    trained([["a dog", "ein hund"], ["a cat", "eine katze"]], 2)
    assert "groups_fingerprint" in newest_checkpoint(run).facts


def test_captions_for_a_new_pixel_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--caption-prefix has no effect"):
        train_unet(class_images(tmp_path / "grey"), tmp_path / "run", caption_prefix="x", **GREY)


# Resuming


@pytest.mark.slow
def test_a_lora_is_not_resumed_on_other_weights(tmp_path: Path, images: Path) -> None:
    train_unet(images, tmp_path / "base", max_train_steps=1)
    train_unet(images, tmp_path / "other", max_train_steps=2)
    shutil.copytree(tmp_path / "base", tmp_path / "model")
    changes = {"model": str(tmp_path / "model"), "rank": 2}
    train_unet(images, tmp_path / "run", max_train_steps=1, **changes)
    train_unet(images, tmp_path / "run", max_train_steps=2, resume=True, **changes)
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(tmp_path / "other", tmp_path / "model")
    with pytest.raises(UsageError, match="unet: the weights changed since the run started"):
        train_unet(images, tmp_path / "run", max_train_steps=3, resume=True, **changes)


@pytest.mark.slow
def test_all_weights_go_on_whatever_became_of_those_they_came_from(tmp_path: Path, images: Path) -> None:
    train_unet(images, tmp_path / "base", max_train_steps=1)
    changes = {"model": str(tmp_path / "base")}
    train_unet(images, tmp_path / "run", max_train_steps=1, **changes)
    train_unet(images, tmp_path / "base", max_train_steps=2, resume=True)
    train_unet(images, tmp_path / "run", max_train_steps=2, resume=True, **changes)


@pytest.mark.slow
def test_another_length_of_a_falling_learning_rate_is_told(tmp_path: Path, images: Path) -> None:
    def told(scheduler: str, steps: int) -> list[str]:
        events = train_unet(
            images, tmp_path / scheduler, max_train_steps=steps, lr_scheduler=scheduler, resume=steps > 1
        )
        return [event.text for event in events if isinstance(event, RunNote) and "learning rate" in event.text]

    assert [told("cosine", 1), told("constant", 1), told("constant", 2)] == [[], [], []]
    assert "--lr-scheduler cosine" in told("cosine", 2)[0]


def test_a_limit_in_a_config_file_replaces_the_one_the_run_began_with(tmp_path: Path) -> None:
    run, config = tmp_path / "run", tmp_path / "longer.yaml"
    run.mkdir()
    begin(run, UnetSettings(num_train_epochs=0.5, seed=7), command="train-unet", data="pictures")
    config.write_text("max_train_steps: 3\n")
    trainer = TrainingCommand("train-unet", UnetSettings, UnetSession, "DATA", "")
    asked = TrainingCall(None, run, config, True, False, False, {}, load_registry())
    data, _, settings = _resolved(trainer, asked)
    assert (data, settings.seed, settings.max_train_steps, settings.num_train_epochs) == ("pictures", 7, 3, None)


def test_a_value_is_refused_with_the_name_of_the_file_that_it_is_from(tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text("network-dim: 0\n")
    trainer = TrainingCommand("train-unet", UnetSettings, UnetSession, "DATA", "")

    def asked(**typed: Any) -> None:
        _resolved(trainer, TrainingCall("pictures", tmp_path / "run", config, False, False, False, typed, registry))

    registry = load_registry()
    with pytest.raises(UsageError, match=r"wrong.yaml: rank: "):
        asked()
    asked(rank=2)
    with pytest.raises(UsageError, match=r"^num_train_epochs: should be a finite number, not inf"):
        asked(rank=2, num_train_epochs=float("inf"))


@pytest.mark.parametrize("kind", [UnetSettings, ControlNetSettings, VaeSettings, TextSettings])
def test_every_name_of_every_setting_is_an_option(kind: type[TrainSettings]) -> None:
    @settings_options(kind)
    def command(*, typed: dict[str, Any]) -> None: ...

    app = typer.Typer()
    app.command()(command)
    known = {name for option in typer.main.get_command(app).params for name in option.opts}
    for name, info in kind.model_fields.items():
        assert {f"--{name.replace('_', '-')}", *info.json_schema_extra["also"]} <= known  # type: ignore[call-overload, index]


@pytest.mark.slow
def test_captions_are_wanted_of_the_images_that_are_used(tmp_path: Path) -> None:
    data = captioned_images(tmp_path / "pictures")
    left_out = int(rng.permutation(0, 0, "max train samples", 6)[5])
    (data / f"{left_out}.txt").unlink()
    with pytest.raises(UsageError, match="caption"):
        train_unet(data, tmp_path / "all", max_train_steps=1)
    train_unet(data, tmp_path / "some", max_train_steps=1, max_train_samples=5)


@pytest.mark.slow
def test_what_is_judged_is_in_evaluation_mode_averages_too(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[set[bool]] = []
    validate = UnetTask.validate

    def watched(task: UnetTask, networks: Networks) -> dict[str, float]:
        judged.append({module.training for network in networks.values() for module in network.modules()})
        return validate(task, networks)

    monkeypatch.setattr(UnetTask, "validate", watched)
    train_unet(images, tmp_path / "run", max_train_steps=1, use_ema=True, validation_split=0.4, validation_steps=1)
    assert judged == [{False}]


@pytest.mark.slow
def test_a_run_of_one_part_is_gone_on_with(tmp_path: Path, images: Path, sdcli: Run) -> None:
    quick = ("--max-train-steps", "1", "--train-batch-size", "2", "--validation-split", "0", "-q")
    vae, small = ("train-vae", images, "--resolution", "64"), ("--vocab-size", "514", "--hidden-size", "32")
    captions = sorted({line for file in images.glob("*.txt") for line in file.read_text().splitlines()})
    letters = torch.frombuffer(bytearray(json.dumps(captions).encode()), dtype=torch.uint8)
    save_file({"vectors": torch.randn(len(captions), 8), "texts": letters}, tmp_path / "teacher.safetensors")
    text = ("train-text-encoder", images, "--teacher", "teacher.safetensors")
    assert sdcli(*vae, "-o", "a", "--from-scratch", "tiny", *quick).returncode == 0
    assert sdcli(*text, "-o", "t", *small, "--num-attention-heads", "2", *quick).returncode == 0
    for command, begun, run in ((vae, "a", "b"), (text, "t", "u")):
        done = sdcli(*command, "-o", run, "-m", begun, *quick)
        assert done.returncode == 0, done.stderr
        ours, theirs = (sorted(p.name for p in (tmp_path / name).iterdir()) for name in (run, begun))
        assert ours == theirs
    for command, begun, sentence in ((vae, "t", "t has no VAE: it holds a"), (text, "a", "a has no text encoder: it")):
        refused = sdcli(*command, "-o", "c", "-m", f"./{begun}", *quick)
        assert refused.returncode == 2
        assert sentence in refused.stderr


@pytest.mark.slow
def test_a_vae_is_not_trained_from_a_model_without_one(tmp_path: Path, sdcli: Run) -> None:
    data = class_images(tmp_path / "classes")
    train_unet(data, tmp_path / "run", max_train_steps=1, space="pixel", from_scratch="pixel-grey", resolution="16")
    refused = sdcli("train-vae", data, "-o", "vae", "-m", "./run", "--max-train-steps", "1")
    assert refused.returncode == 2
    assert "has no VAE: it generates on pixels" in refused.stderr


# RUN


def test_a_folder_that_cannot_be_used_is_refused_before_any_work(tmp_path: Path, images: Path, sdcli: Run) -> None:
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for run, code, sentence in (
        ("run", 2, "already has a training run"),
        (images, 2, "has other content"),
        ("file/run", 8, "cannot write"),
    ):
        cache = tmp_path / "cache"
        done = sdcli("train-unet", images, "-m", "tiny", "-o", tmp_path / run, "--cache-dir", cache, "--dry-run")
        assert (done.returncode, sentence in done.stderr, cache.exists()) == (code, True, False), done.stderr


@pytest.mark.parametrize("option", ["-o", "--cache-dir"])
def test_nothing_is_written_among_the_images(tmp_path: Path, images: Path, option: str) -> None:
    before = sorted(images.rglob("*"))
    places = {"-o": tmp_path / "run", "--cache-dir": tmp_path / "cache", option: images / "below" / "it"}
    asked = ["train-unet", str(images), "-m", "tiny", *(str(part) for pair in places.items() for part in pair)]
    refusal = CliRunner().invoke(app, asked).exception
    assert isinstance(refusal, UsageError)
    assert f"is inside {images}, which is never changed; choose another {option}" in str(refusal)
    assert sorted(images.rglob("*")) == before
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o555)
    with pytest.raises(CannotWrite, match="is not writable"):
        check_free(tmp_path / "shut" / "deep" / "run")


def test_a_new_folder_below_new_folders_is_free(tmp_path: Path) -> None:
    check_free(tmp_path / "a" / "b" / "run")
    assert not (tmp_path / "a").exists()


# Processes and signals


def test_a_launcher_of_other_processes_than_asked_is_refused() -> None:
    fresh_accelerator()
    with pytest.raises(UsageError, match="--num-processes is 3, but a launcher started 1"):
        make_accelerator(TrainSettings(num_processes=3, device="cpu", mixed_precision="no"))


def test_a_signal_that_comes_twice_at_once_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    stop = GracefulStop(Console(), echo=0.2)
    stop._handle(signal.SIGINT, None)
    stop._handle(signal.SIGINT, None)
    assert isinstance(stop(), Interrupted)
    time.sleep(0.25)
    with pytest.raises(Interrupted, match="interrupted; finished images are kept"):
        stop._handle(signal.SIGINT, None)
    assert capsys.readouterr().err.count("press Ctrl-C again to stop at once") == 1


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_every_process_and_ends_them_gently(tmp_path: Path, images: Path) -> None:
    """The terminal signals the whole group, and the launcher passes the signal on: each process has it twice."""
    run = tmp_path / "run"
    command = ["train-unet", str(images), "-o", str(run), "-m", "tiny", "--num-processes", "2"]
    limits = ["--train-batch-size", "2", "--max-train-steps", "100000", "--checkpointing-steps", "100000"]
    places = ["--device", "cpu", "--cache-dir", str(tmp_path / "cache")]
    process = Forked([*command, *limits, *places], cwd=tmp_path, session=True)
    deadline = time.monotonic() + 120
    while not (run / "log.jsonl").exists() or (run / "log.jsonl").stat().st_size < 1500:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.count("sdcli: interrupted") == 1, said
    assert len(list(run.glob("checkpoint-*"))) == 1


@pytest.mark.slow
def test_the_proof_knows_the_models_of_a_models_file(tmp_path: Path, images: Path, sdcli: Run) -> None:
    (tmp_path / "models.yaml").write_text(
        "schema: 1\nmodels:\n  mine:\n    description: random\n"
        "    source: {kind: random, architecture: tiny, seed: 3}\n    family: sd1\n    license: none\n"
        "    defaults: {width: 64, height: 64, steps: 4, guidance_scale: 7.5, scheduler: ddim, dtype: float32}\n"
    )
    proved = sdcli(
        "train-unet", images, "-o", tmp_path / "run", "-m", "mine", "--models-file", tmp_path / "models.yaml",
        "--train-batch-size", "2", "--cache-dir", tmp_path / "cache", "--prove-resume",
    )  # fmt: skip
    assert proved.returncode == 0, proved.stderr
    assert proved.stdout.startswith("identical")


@pytest.mark.slow
def test_aligned_words_are_learned_the_same_after_a_stop(tmp_path: Path, sdcli: Run) -> None:
    """The states to learn are those of the model, not of the checkpoint that a run goes on from."""
    words = tmp_path / "words.jsonl"
    words.write_text('{"text": ["a dog", "ein hund"]}\n{"text": ["a cat", "eine katze"]}\n')
    proved = sdcli(
        "train-text-encoder", words, "-o", tmp_path / "run", "-m", "starter", "--objective", "align",
        "--train-batch-size", "4", "--validation-split", "0", "--prove-resume",
    )  # fmt: skip
    assert proved.returncode == 0, proved.stderr
    assert proved.stdout.startswith("identical")
