"""`sdcli train-unet` on miniature networks: what it learns from, what RUN is, and that it goes on exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdcli.errors import NotFound, UsageError
from sdcli.models.registry import load_registry
from sdcli.training.events import CheckpointSaved, RunNote, StepMetrics, ValidationMetrics
from sdcli.training.run_log import read_log
from sdcli.training.state.checkpoint import newest_checkpoint
from tests.conftest import REPOSITORY, Run
from tests.forked import Forked
from tests.training_runs import captioned_images, change_facts, class_images, same_checkpoint, train_unet


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return captioned_images(tmp_path / "pictures")


def unet_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema and accumulation": {"use_ema": True, "gradient_accumulation_steps": 2, "train_batch_size": 1},
    "lora": {"rank": 2, "lora_dropout": 0.1, "lora_alpha": 3.0},
    "text encoder along": {"train_text_encoder": True, "text_encoder_lr": 1e-5},
    "workers, flips and buckets": {
        "dataloader_num_workers": 2,
        "random_flip": True,
        "enable_bucket": True,
        "cache_latents": False,
    },
    "random crops": {"random_crop": True, "snr_gamma": 5.0, "noise_offset": 0.1, "input_perturbation": 0.1},
    "shuffled captions": {
        "shuffle_caption": True,
        "keep_tokens": 1,
        "caption_prefix": "x, ",
        "mixed_precision": "bf16",
    },
}


IN_THE_SLOW_SET = {
    "workers, flips and buckets",
    "lora",
    "ema and accumulation",
    "text encoder along",
    "random crops",
    "shuffled captions",
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * (name in IN_THE_SLOW_SET)) for name in VARIANTS]
)
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, variant: str) -> None:
    data = captioned_images(tmp_path / "pictures", sizes=((64, 64), (96, 64), (80, 72)))
    changes = {**VARIANTS[variant], "validation_split": 0.0}
    train_unet(data, tmp_path / "straight", max_train_steps=4, checkpointing_steps=2, **changes)
    train_unet(data, tmp_path / "cut", max_train_steps=2, **changes)
    train_unet(data, tmp_path / "cut", max_train_steps=4, resume=True, **changes)
    assert same_checkpoint(tmp_path / "straight" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    assert not same_checkpoint(tmp_path / "straight" / "checkpoint-4", tmp_path / "straight" / "checkpoint-2")


@pytest.mark.slow
def test_run_is_a_model_folder_for_sdcli_and_for_diffusers(tmp_path: Path, images: Path, sdcli: Run) -> None:
    from diffusers import StableDiffusionPipeline

    run = tmp_path / "run"
    train_unet(images, run, max_train_steps=3, use_ema=True)
    reference = StableDiffusionPipeline.from_pretrained(run)
    weights = reference.unet.state_dict()
    averaged = load_file(run / "checkpoint-3" / "unet_ema" / "diffusion_pytorch_model.safetensors")
    raw = unet_of(run / "checkpoint-3")
    assert all(torch.equal(weights[name], averaged[name]) for name in averaged)
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)
    assert torch.equal(
        load_file(run / "raw" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.bias"], raw["conv_in.bias"]
    )
    for model in (run, run / "raw"):
        painted = sdcli("generate", "picture number 1", "-m", model, "--steps", "2", "-o", f"{model.name}.png")
        assert painted.returncode == 0, painted.stderr
    assert oct((run / "unet" / "config.json").stat().st_mode)[-3:] == "644"


@pytest.mark.slow
def test_training_lowers_the_loss_on_held_out_noise_levels(tmp_path: Path, images: Path) -> None:
    events = train_unet(
        images, tmp_path / "run", max_train_steps=40, learning_rate=2e-3, validation_split=0.4, validation_steps=39
    )
    first, last = (event.figures for event in events if isinstance(event, ValidationMetrics))
    losses = [event.loss for event in events if isinstance(event, StepMetrics)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert set(first) == {"loss", "loss_level_0", "loss_level_1", "loss_level_2", "loss_level_3"}
    assert last["loss"] == pytest.approx(sum(last[f"loss_level_{n}"] for n in range(4)) / 4)


@pytest.mark.slow
def test_the_validation_loss_does_not_depend_on_the_run(tmp_path: Path, images: Path) -> None:
    """Untrained (learning rate nearly 0), two runs with other seeds and batches measure the same."""
    figures = [
        next(
            event.figures
            for event in train_unet(
                images, tmp_path / str(seed), max_train_steps=1, learning_rate=1e-12, validation_split=0.5,
                validation_steps=1, seed=seed, train_batch_size=seed + 1, from_scratch=None,
            )
            if isinstance(event, ValidationMetrics)
        )
        for seed in (0, 1)
    ]  # fmt: skip
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)


@pytest.mark.slow
def test_cached_latents_train_as_online_ones(tmp_path: Path, images: Path) -> None:
    given: dict[str, Any] = {"max_train_steps": 3, "validation_split": 0.4}
    cached = train_unet(images, tmp_path / "cached", **given)
    online = train_unet(images, tmp_path / "online", cache_latents=False, **given)
    losses = [[event.loss for event in events if isinstance(event, StepMetrics)] for events in (cached, online)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    figures = [
        next(event.figures for event in events if isinstance(event, ValidationMetrics)) for events in (cached, online)
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


@pytest.mark.slow
def test_captions_that_would_fill_the_memory_are_encoded_in_the_loop(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = train_unet(images, tmp_path / "cached", max_train_steps=3)
    monkeypatch.setattr("sdcli.training.inputs.encoding.MAX_TEXT_BYTES", 1)
    looped = train_unet(images, tmp_path / "looped", max_train_steps=3)
    losses = [[event.loss for event in events if isinstance(event, StepMetrics)] for events in (cached, looped)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    told = [[event.text for event in events if isinstance(event, RunNote)] for events in (cached, looped)]
    assert [any("encoded at each step" in text for text in texts) for texts in told] == [False, True]


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "no"), ("bfloat16", "bf16")])
@pytest.mark.slow
def test_training_finds_what_dataset_cache_encoded(
    tmp_path: Path, images: Path, sdcli: Run, dtype: str, precision: str
) -> None:
    cache = tmp_path / "cache"
    done = sdcli("dataset", "cache", images, "-m", "tiny", "--cache-dir", cache, "--dtype", dtype, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (cache / "latents").rglob("*"))
    assert files
    train_unet(images, tmp_path / "run", max_train_steps=1, mixed_precision=precision, cache_dir=cache)
    assert sorted(path.name for path in (cache / "latents").rglob("*")) == files, "nothing was encoded again"


@pytest.mark.slow
def test_latents_that_encode_wrote_are_trained_on_like_the_images(tmp_path: Path, images: Path, sdcli: Run) -> None:
    latents = tmp_path / "latents"
    encoded = sdcli("encode", images, "-m", "tiny", "--dtype", "float32", "--outdir", latents, "-q")
    assert encoded.returncode == 0, encoded.stderr
    for caption in images.glob("*.txt"):
        (latents / caption.name).write_text(caption.read_text())
    one = train_unet(latents, tmp_path / "one", max_train_steps=2)
    assert len([event for event in one if isinstance(event, StepMetrics)]) == 2
    with pytest.raises(UsageError, match="--random-flip has no effect"):
        train_unet(latents, tmp_path / "two", max_train_steps=2, random_flip=True)
    with pytest.raises(UsageError, match="another VAE"):
        train_unet(latents, tmp_path / "three", max_train_steps=2, model="starter")


@pytest.mark.slow
def test_a_lora_file_gives_the_merged_network_in_diffusers_and_in_kohyas_dialect(tmp_path: Path, images: Path) -> None:
    from diffusers import UNet2DConditionModel

    run = tmp_path / "run"
    train_unet(images, run, max_train_steps=3, rank=2, lora_alpha=4.0, learning_rate=1e-2)
    merged = unet_of(run)
    train_unet(images, tmp_path / "plain", max_train_steps=1, learning_rate=1e-12)
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "plain", subfolder="unet")
    base = unet_of(tmp_path / "plain")
    changed = [name for name in base if not torch.allclose(base[name], merged[name], atol=1e-7)]
    assert changed
    assert all("attn" in name for name in changed)

    plain.load_lora_adapter(run / "current", weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    plain.fuse_lora()
    fused = {
        name.replace(".base_layer", ""): tensor for name, tensor in plain.state_dict().items() if "lora_" not in name
    }
    for name in changed:
        assert torch.allclose(fused[name], merged[name], atol=1e-6), name

    kohya = load_file(run / "current" / "lora_kohya.safetensors")
    for name in changed:
        layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        down, up, alpha = kohya[f"{layer}.lora_down.weight"], kohya[f"{layer}.lora_up.weight"], kohya[f"{layer}.alpha"]
        assert torch.allclose(base[name] + alpha / len(down) * up @ down, merged[name], atol=1e-6), name


def test_unknown_lora_targets_are_refused_with_the_names_there_are(tmp_path: Path, images: Path) -> None:
    with pytest.raises(UsageError, match=r"--lora-targets nonsense.*to_q"):
        train_unet(images, tmp_path / "run", rank=2, lora_targets=("nonsense",))


@pytest.mark.slow
def test_a_class_conditional_pixel_model_is_trained_and_painted(tmp_path: Path, sdcli: Run) -> None:
    from diffusers import DDPMPipeline

    data = class_images(tmp_path / "data")
    run = tmp_path / "run"
    config = {
        "_class_name": "UNet2DModel", "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    train_unet(
        data, run, max_train_steps=2, space="pixel", from_scratch=str(tmp_path / "config.json"), class_conditional=True,
        resolution="16", sample_every_n_steps=2, sample_steps=2,
    )  # fmt: skip
    assert json.loads((run / "classes.json").read_text()) == ["cat", "dog"]
    assert DDPMPipeline.from_pretrained(run).unet.config.num_class_embeds == 3
    assert (run / "samples" / "step-2.png").is_file()
    painted = sdcli("generate", "dog", "-m", run, "--steps", "2", "-o", "dog.png", "--json")
    assert painted.returncode == 0, painted.stderr
    assert json.loads(painted.stdout)["width"] == 16
    assert sdcli("generate", "horse", "-m", run).returncode == 2


@pytest.mark.slow
def test_missing_captions_are_an_error_before_the_first_step(tmp_path: Path, images: Path) -> None:
    (images / "3.txt").unlink()
    with pytest.raises(UsageError, match=r"1 of 6 images .* have no caption \(3\.png\).*--unconditional"):
        train_unet(images, tmp_path / "run", max_train_steps=1)
    assert not (tmp_path / "run").exists()
    train_unet(images, tmp_path / "dropped", max_train_steps=1, caption_dropout=1.0)
    train_unet(images, tmp_path / "unconditional", max_train_steps=1, unconditional=True)


@pytest.mark.slow
def test_broken_images_are_counted_and_never_fatal(tmp_path: Path, images: Path) -> None:
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    (images / "2.png").write_bytes(before["2.png"][:200])
    events = train_unet(images, tmp_path / "run", max_train_steps=2)
    told = "\n".join(event.text for event in events if isinstance(event, RunNote))
    assert "5 of 6 are used, 1 dropped" in told
    assert "2.png" in told
    assert {path.name: path.read_bytes() for path in images.iterdir() if path.name != "2.png"} == {
        name: data for name, data in before.items() if name != "2.png"
    }


@pytest.mark.slow
def test_what_a_resumed_run_may_not_change_is_refused(tmp_path: Path, images: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(NotFound, match="no checkpoint"):
        train_unet(images, run, max_train_steps=1, resume=True)
    train_unet(images, run, max_train_steps=1)
    with pytest.raises(UsageError, match=r"--learning-rate was 0\.0001"):
        train_unet(images, run, max_train_steps=2, learning_rate=0.5, resume=True)
    with pytest.raises(UsageError, match="2 samples, but would now have 3"):
        train_unet(images, run, max_train_steps=2, train_batch_size=3, resume=True)
    with pytest.raises(UsageError, match="already has a training run"):
        train_unet(images, run, max_train_steps=2)
    train_unet(images, run, max_train_steps=2, train_batch_size=1, gradient_accumulation_steps=2, resume=True)
    assert newest_checkpoint(run).step == 2


@pytest.mark.slow
def test_a_run_whose_checkpoints_name_processes_instead_of_a_batch_goes_on(tmp_path: Path, images: Path) -> None:
    run = tmp_path / "run"
    train_unet(images, run, max_train_steps=1)
    change_facts(run, lambda facts: facts.update(processes=facts.pop("batch") // 2))
    with pytest.raises(UsageError, match="2 samples, but would now have 3"):
        train_unet(images, run, max_train_steps=2, train_batch_size=3, resume=True)
    train_unet(images, run, max_train_steps=2, resume=True)
    assert newest_checkpoint(run).step == 2


@pytest.mark.slow
@pytest.mark.parametrize("change", ["caption", "picture", "one more"])
def test_a_run_on_other_data_is_not_resumed(tmp_path: Path, images: Path, change: str) -> None:
    run = tmp_path / "run"
    train_unet(images, run, max_train_steps=1)
    if change == "caption":
        (images / "1.txt").write_text("something else\n")
    elif change == "picture":
        (images / "1.png").write_bytes((images / "2.png").read_bytes())
    else:
        captioned_images(images, 7)
    with pytest.raises(UsageError, match=r"changed since the run started.*-m .*run -o"):
        train_unet(images, run, max_train_steps=2, resume=True)


@pytest.mark.slow
def test_a_broken_checkpoint_is_passed_over_told_and_left_alone(tmp_path: Path, images: Path) -> None:
    run = tmp_path / "run"
    train_unet(images, run, max_train_steps=4, checkpointing_steps=2)
    weights = run / "checkpoint-4" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    events = train_unet(images, run, max_train_steps=6, resume=True)
    told = "\n".join(event.text for event in events if isinstance(event, RunNote))
    assert "skipped" in told
    assert "checkpoint-4" in told
    assert next(event.step for event in events if isinstance(event, StepMetrics)) == 3
    assert weights.read_bytes() == bytes(data)
    train_unet(images, tmp_path / "straight", max_train_steps=6)
    assert same_checkpoint(run / "checkpoint-6", tmp_path / "straight" / "checkpoint-6")


@pytest.mark.slow
def test_the_log_of_a_resumed_run_reads_as_one_run(tmp_path: Path, images: Path) -> None:
    train_unet(images, tmp_path / "cut", max_train_steps=2)
    train_unet(images, tmp_path / "cut", max_train_steps=4, resume=True)
    train_unet(images, tmp_path / "straight", max_train_steps=4)
    cut, straight = (read_log(tmp_path / name).series("train", "loss") for name in ("cut", "straight"))
    assert cut == straight
    assert cut[0] == [1, 2, 3, 4]


@pytest.mark.slow
def test_old_checkpoints_go_only_after_the_new_one_is_whole(tmp_path: Path, images: Path) -> None:
    run = tmp_path / "run"
    train_unet(images, run, max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=2)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"space": "pixel", "model": None}, "add --from-scratch"),
        ({"from_scratch": "pixle"}, "did you mean 'pixel'"),
        ({"from_scratch": "latent"}, "--unconditional or --class-conditional"),
        ({"class_conditional": True}, "needs --from-scratch"),
        ({"resolution": "65"}, "multiple of 8"),
        ({"rescale_betas_zero_snr": True}, "--prediction-type v_prediction"),
        ({"report_to": ("wandb",)}, "wandb"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_a_sentence(
    tmp_path: Path, images: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        train_unet(images, tmp_path / "run", max_train_steps=1, **changes)


# Real processes


def command(data: Path, run: Path, *more: str) -> list[str]:
    quick = [
        "--train-batch-size",
        "2",
        "--sample-every-n-steps",
        "1000000",
        "--sample-steps",
        "1",
        "--validation-split",
        "0",
        "-m",
        "tiny",
        "-q",
    ]
    return ["train-unet", str(data), "-o", str(run), *quick, *more]


def begun(data: Path, run: Path, *more: str) -> Forked:
    """The command as a process of its own."""
    return Forked(command(data, run, *more), cwd=data.parent)


def finished(data: Path, run: Path, *more: str) -> str:
    """What the command prints in a process of its own, which must end well."""
    process = begun(data, run, *more)
    out, error = process.communicate()
    assert process.returncode == 0, error
    return out


def interpreted(*line: str) -> None:
    """Run a new interpreter, with hashes of its own, to a good end."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *line], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_kill_9_and_resume_give_the_same_bytes_as_no_kill(tmp_path: Path, images: Path) -> None:
    limits = ["--max-train-steps", "12", "--checkpointing-steps", "3"]
    interpreted("-m", "sdcli", *command(images, tmp_path / "straight", *limits))
    process = begun(images, tmp_path / "cut", *limits)
    process.stdout.readline()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    finished(images, tmp_path / "cut", *limits, "--resume")
    assert same_checkpoint(tmp_path / "straight" / "checkpoint-12", tmp_path / "cut" / "checkpoint-12")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_finishes_the_step_saves_and_ends_with_its_code(
    tmp_path: Path, images: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    process = begun(images, run, "--max-train-steps", "100000", "--checkpointing-steps", "5")
    process.stdout.readline()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert "checkpoint at step" in error
    assert "Traceback" not in error
    found = newest_checkpoint(run)
    assert read_log(run).of("end")[-1]["step"] == found.step


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    data = captioned_images(tmp_path / "pictures", 8)
    finished(data, tmp_path / "one", "--max-train-steps", "4", "--train-batch-size", "4")
    two_of_two = ("--train-batch-size", "2", "--num-processes", "2")
    finished(data, tmp_path / "two", "--max-train-steps", "4", *two_of_two)
    losses = [read_log(tmp_path / name).series("train", "loss")[1] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    weights = [unet_of(tmp_path / name) for name in ("one", "two")]
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-5
    for steps, traded in ((5, ("--train-batch-size", "4", "--num-processes", "1")), (6, two_of_two)):
        finished(data, tmp_path / "two", "--max-train-steps", str(steps), *traded, "--resume")
        assert newest_checkpoint(tmp_path / "two").step == steps


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_of_others_do_the_same(tmp_path: Path, launcher: str) -> None:
    """On the CPU accelerate's launcher starts one process (more need mpirun), torch's as many as are asked for."""
    data = captioned_images(tmp_path / "pictures", 8)
    limits = ["--max-train-steps", "3", "--device", "cpu"]
    if launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29411"]
        limits_of_own = [*limits, "--num-processes", "2"]
    else:
        start = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
        start += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        limits_of_own = limits
    interpreted(*start, "-m", "sdcli", *command(data, tmp_path / "launched", *limits))
    finished(data, tmp_path / "own", *limits_of_own)
    assert same_checkpoint(tmp_path / "launched" / "checkpoint-3", tmp_path / "own" / "checkpoint-3")


@pytest.mark.slow
def test_a_signal_to_two_processes_stops_both_after_the_same_step(tmp_path: Path, images: Path) -> None:
    endless = ("--max-train-steps", "100000", "--checkpointing-steps", "5", "--num-processes", "2")
    process = begun(images, tmp_path / "run", *endless)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert newest_checkpoint(tmp_path / "run").step > 0


@pytest.mark.slow
def test_random_kills_never_cost_more_than_the_last_interval(tmp_path: Path, images: Path) -> None:
    import random

    limits = ["--max-train-steps", "30", "--checkpointing-steps", "2", "--checkpoints-total-limit", "2"]
    finished(images, tmp_path / "straight", *limits)
    chance = random.Random(3)
    run, step = tmp_path / "cut", 0
    for _ in range(40):
        resume = ["--resume"] if any(run.glob("checkpoint-*")) else []
        process = begun(images, run, *limits, *resume)
        process.stdout.readline()
        time.sleep(chance.random() * 0.4)
        process.kill()
        process.wait()
        found = newest_checkpoint(run).step
        assert found >= step
        step = found
        if step == 30:
            break
    assert same_checkpoint(tmp_path / "straight" / "checkpoint-30", run / "checkpoint-30")


@pytest.mark.slow
def test_prove_resume_says_identical_on_the_users_own_set_up(tmp_path: Path, images: Path) -> None:
    assert "identical" in finished(images, tmp_path / "unused", "--use-ema", "--prove-resume")
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("pictures",)] == []


@pytest.mark.slow
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path, images: Path) -> None:
    plan = json.loads(finished(images, tmp_path / "run", "--max-train-steps", "7", "--dry-run"))
    assert (plan["steps"], plan["batch"], plan["pictures"]) == (7, 2, 6)
    assert plan["memory_bytes"] > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_checkpoints_are_told_as_soon_as_they_are_whole(tmp_path: Path, images: Path) -> None:
    events = train_unet(images, tmp_path / "run", max_train_steps=4, checkpointing_steps=2)
    paths = [event.path for event in events if isinstance(event, CheckpointSaved)]
    assert [path.name for path in paths] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.slow
def test_the_settings_of_a_run_repeat_it(tmp_path: Path, images: Path) -> None:
    from sdcli.training.config_files import settings_from
    from sdcli.training.unet.session import UnetSession
    from sdcli.training.unet.settings import UnetSettings
    from tests.training_runs import fresh_accelerator, run_session

    train_unet(images, tmp_path / "first", max_train_steps=2, rank=2, seed=5)
    settings = settings_from(UnetSettings, {}, config=tmp_path / "first" / "settings.yaml")
    fresh_accelerator()
    run_session(UnetSession(str(images), tmp_path / "second", settings, load_registry()))
    assert same_checkpoint(tmp_path / "first" / "checkpoint-2", tmp_path / "second" / "checkpoint-2")
