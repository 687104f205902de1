"""Settings that trainers share: flags, keys of a config file and keys of RUN/settings.yaml, defined once.

Each trainer adds its own in `unet/settings.py`, `vae/settings.py` and so on.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdcli.generation.settings import Device
from sdcli.request.schema import parse_size

DATA, SHAPE, STEPS, OPTIMIZER, OBJECTIVE, MODEL, WATCH, KEEP, MACHINE = (
    "Data",
    "Images",
    "Steps",
    "Optimizer",
    "Objective",
    "Model",
    "Watching",
    "Checkpoints",
    "Machine",
)
DEFAULT_STEPS = 1000

Precision = Literal["auto", "no", "bf16", "fp16"]
FixedPrecision = Literal["no", "bf16", "fp16"]
"""Of trainers for which bfloat16 has not been shown to learn as well as float32, so that `auto` would be a guess."""

LrScheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


def setting(default: Any, description: str, panel: str, *, also: tuple[str, ...] = (), **bounds: Any) -> Any:
    """A setting; `panel` is its group in --help, `also` are names that other trainers use for the same flag."""
    return Field(default, description=description, json_schema_extra={"panel": panel, "also": list(also)}, **bounds)


class TrainSettings(BaseModel):
    """Settings of every trainer. A field is a flag (`--kebab-case`), a key of --config and of RUN/settings.yaml.

    `None` means that the model or the data decide.
    """

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int = setting(0, "seed of all randomness", STEPS, ge=0, le=2**63 - 1)
    train_batch_size: int = setting(16, "samples per process and micro-batch", STEPS, ge=1)
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step", STEPS, ge=1)
    max_train_steps: int | None = setting(
        None, f"optimizer steps (default: {DEFAULT_STEPS} without another limit)", STEPS, ge=1
    )
    num_train_epochs: float | None = setting(None, "passes over the data; instead of --max-train-steps", STEPS, gt=0)
    max_hours: float | None = setting(None, "stop after so many hours, with a checkpoint and exit code 0", STEPS, gt=0)

    optimizer: Literal["adamw", "muon", "adamw-8bit", "sgd"] = setting(
        "adamw",
        "optimizer; muon trains matrices with Muon and the rest with AdamW, adamw-8bit needs bitsandbytes",
        OPTIMIZER,
    )
    learning_rate: float = setting(1e-4, "peak learning rate", OPTIMIZER, gt=0, also=("--lr",))
    lr_scheduler: LrScheduler = setting("constant", "learning rate schedule", OPTIMIZER)
    lr_warmup_steps: int = setting(0, "warm-up steps from 0 to the full learning rate", OPTIMIZER, ge=0)
    lr_num_cycles: int | None = setting(
        None, "number of restarts of cosine_with_restarts (default: 1)", OPTIMIZER, ge=1
    )
    adam_beta1: float = setting(
        0.9, "decay of the running mean of gradients; the momentum of sgd", OPTIMIZER, ge=0, lt=1
    )
    adam_beta2: float = setting(0.999, "decay of the running mean of squared gradients", OPTIMIZER, ge=0, lt=1)
    adam_weight_decay: float = setting(1e-2, "weight decay, decoupled from the gradients", OPTIMIZER, ge=0)
    adam_epsilon: float = setting(1e-8, "added to the denominator of the update", OPTIMIZER, gt=0)
    max_grad_norm: float = setting(1.0, "clip the norm of all gradients to this; 0: off", OPTIMIZER, ge=0)

    use_ema: bool = setting(False, "keep a moving average (EMA) of the weights, and generate with it", OPTIMIZER)
    ema_decay: float = setting(0.9999, "highest decay of the moving average", OPTIMIZER, ge=0, lt=1)
    ema_power: float = setting(0.75, "the decay rises as 1 - (1 + step)^-power up to --ema-decay", OPTIMIZER)

    mixed_precision: Precision = setting(
        "auto",
        "precision of the forward and backward passes; auto: bf16 on CPUs with instructions for bfloat16, else no; "
        "fp16 needs CUDA",
        MACHINE,
    )
    gradient_checkpointing: bool = setting(False, "save memory by computing activations twice", MACHINE)
    channels_last: bool = setting(False, "memory layout of convolutions; faster in half precision", MACHINE)
    compile: bool = setting(False, "use torch.compile if its gradients equal the uncompiled ones", MACHINE)
    device: Device = setting("auto", "device; auto: cuda, else mps, else cpu", MACHINE)
    num_processes: int | None = setting(
        None, "processes on this machine, one per GPU (default: 1, or those of `accelerate launch`)", MACHINE, ge=1
    )
    sharding: Literal["none", "full"] = setting(
        "none",
        "spread weights, gradients, optimizer state and averages over the processes (full: FSDP2), or not (none: DDP)",
        MACHINE,
    )
    dataloader_num_workers: int = setting(0, "worker processes that prepare samples; 0: a thread", MACHINE, ge=0)

    checkpointing_steps: int = setting(500, "steps between checkpoints", KEEP, ge=1, also=("--save-every-n-steps",))
    checkpoints_total_limit: int | None = setting(
        None, "keep at most so many checkpoints, the newest ones (default: all)", KEEP, ge=1
    )

    validation_steps: int | None = setting(
        None, "steps between validations (default: --checkpointing-steps)", WATCH, ge=1
    )
    sample_every_n_steps: int | None = setting(
        None, "steps between sample sheets (default: --checkpointing-steps)", WATCH, ge=1
    )
    log_steps: int = setting(1, "steps between lines of log.jsonl", WATCH, ge=1)
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = setting((), "tracker to report to; repeatable", WATCH)

    def given(self) -> set[str]:
        """The names of the fields that differ from their defaults."""
        return {name for name, info in type(self).model_fields.items() if getattr(self, name) != info.default}

    def total_batch_size(self, processes: int) -> int:
        """Samples of one optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def steps(self, samples_per_epoch: int, batch: int) -> int | None:
        """Optimizer steps of the run, `batch` samples each; None where only --max-hours limits it."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        if self.num_train_epochs is not None:
            return max(1, math.ceil(self.num_train_epochs * samples_per_epoch / batch))
        return None if self.max_hours is not None else DEFAULT_STEPS

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        if self.max_train_steps is not None and self.num_train_epochs is not None:
            raise ValueError("give either --max-train-steps or --num-train-epochs")
        endless = self.max_hours is not None and self.max_train_steps is None and self.num_train_epochs is None
        if endless and not self.lr_scheduler.startswith("constant"):
            raise ValueError(f"--lr-scheduler {self.lr_scheduler} needs the number of steps: add --max-train-steps")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("--lr-warmup-steps has no effect with constant; use --lr-scheduler constant_with_warmup")
        if self.lr_num_cycles is not None and self.lr_scheduler != "cosine_with_restarts":
            raise ValueError(f"--lr-num-cycles has no effect with --lr-scheduler {self.lr_scheduler}")
        if self.optimizer == "sgd" and {"adam_beta2", "adam_epsilon"} & self.given():
            raise ValueError("--adam-beta2 and --adam-epsilon have no effect with --optimizer sgd")
        if not self.use_ema and {"ema_decay", "ema_power"} & self.given():
            raise ValueError("--ema-decay and --ema-power have no effect without --use-ema")
        if self.sharding == "full":
            for flag, given, why in (
                ("--optimizer adamw-8bit", self.optimizer == "adamw-8bit", "its states are blocks across rows"),
                ("--channels-last", self.channels_last, "FSDP2 needs contiguous weights"),
                ("--compile", self.compile, "the compiled gradients could not be compared with uncompiled ones"),
            ):
                if given:
                    raise ValueError(f"--sharding full cannot be combined with {flag}: {why}")
        return self


def fixed_precision() -> Any:
    """The setting of trainers without `auto`."""
    return setting("no", "precision of the forward and backward passes; fp16 needs CUDA", MACHINE)


class ImageSettings(TrainSettings):
    """Settings of the trainers on images."""

    image_column: str | None = setting(None, "column with the image, in tables (default: found by name)", DATA)
    caption_column: str | None = setting(None, "column with the caption (default: text or caption)", DATA)
    caption_extension: str = setting(".txt", "extension of the caption files next to images", DATA)
    split: str = setting("train", "split to use, of a data set with several", DATA)
    validation_split: float = setting(0.05, "share of images held out for validation", DATA, ge=0, lt=1)
    max_train_samples: int | None = setting(
        None, "use only so many images, drawn by the seed from all classes", DATA, ge=1
    )
    shuffle_buffer: int = setting(10_000, "shuffling window of sharded data sets, in samples", DATA, ge=1)
    cache_dir: Path | None = setting(
        None, "folder for cached latents and text states (default: your cache folder)", DATA
    )

    resolution: str | None = setting(
        None, "image size in pixels, as 512 or 512x768, width x height (default: the model's)", SHAPE
    )
    random_crop: bool = setting(
        False, "crop at random positions instead of the center; turns the cache of latents off", SHAPE
    )
    random_flip: bool = setting(False, "mirror half of the samples", SHAPE)
    enable_bucket: bool = setting(
        False, "group images into buckets by aspect ratio instead of cropping to one size", SHAPE
    )
    bucket_reso_steps: int | None = setting(
        None, "sides of buckets are multiples of this, in pixels (default: an eighth of the resolution)", SHAPE, ge=8
    )
    min_bucket_reso: int | None = setting(
        None, "shortest side of a bucket in pixels (default: half the resolution)", SHAPE, ge=8
    )
    max_bucket_reso: int | None = setting(
        None, "longest side of a bucket in pixels (default: twice the resolution)", SHAPE, ge=8
    )

    def target_size(self, default: tuple[int, int]) -> tuple[int, int]:
        """Width and height in pixels from --resolution, or `default` without it. Raises UsageError."""
        if self.resolution is None:
            return default
        return parse_size(self.resolution if "x" in self.resolution.lower() else f"{self.resolution}x{self.resolution}")

    @model_validator(mode="after")
    def _every_image_setting_has_an_effect(self) -> Self:
        typed = {"bucket_reso_steps", "min_bucket_reso", "max_bucket_reso"} & self.given()
        if typed and not self.enable_bucket:
            raise ValueError(f"--{min(typed).replace('_', '-')} has no effect without --enable-bucket")
        return self


class DenoiserSettings(ImageSettings):
    """Settings of the trainers of denoisers: UNets and ControlNets."""

    caption_dropout: float = setting(
        0.1,
        "share of samples with an empty caption, which guidance needs",
        DATA,
        ge=0,
        le=1,
        also=("--caption-dropout-rate",),
    )
    shuffle_caption: bool = setting(False, "shuffle the comma-separated parts of captions", DATA)
    keep_tokens: int = setting(0, "first parts of a caption that --shuffle-caption keeps in place", DATA, ge=0)
    caption_prefix: str = setting("", "text put before every caption", DATA)
    prompt_template: str | None = setting(
        None, "template around captions, as '{prompt}, glossy style' (default: the model's)", DATA
    )
    cache_latents: bool = setting(True, "encode each image once and cache its latents", DATA)

    snr_gamma: float | None = setting(
        None,
        "weight the loss by min-SNR with this gamma; 5 is usual (default: off)",
        OBJECTIVE,
        gt=0,
        also=("--min-snr-gamma",),
    )
    noise_offset: float = setting(
        0.0, "amount of noise shared by each channel, for very dark and bright images; 0: off", OBJECTIVE, ge=0
    )
    input_perturbation: float = setting(0.0, "extra noise on the network's input; 0: off", OBJECTIVE, ge=0)
    stratified_timesteps: bool = setting(True, "spread the timesteps of each optimizer step evenly", OBJECTIVE)

    sample_prompts: tuple[str, ...] = setting(
        (),
        "prompt of the sample sheets; repeatable",
        WATCH,
        also=("--sample-prompt", "--validation-prompts"),
    )
    sample_steps: int | None = setting(None, "denoising steps of sample images (default: the model's)", WATCH, ge=1)

    @model_validator(mode="after")
    def _every_caption_setting_has_an_effect(self) -> Self:
        if self.keep_tokens and not self.shuffle_caption:
            raise ValueError("--keep-tokens has no effect without --shuffle-caption")
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError("--prompt-template lacks {prompt}, where the caption goes")
        return self


def cache_folder(cache_dir: Path | None = None) -> Path:
    """The folder of cached latents, text states, teachers' vectors and examined images; default: the user's cache."""
    return cache_dir.expanduser() if cache_dir is not None else platformdirs.user_cache_path("sdcli") / "training"
