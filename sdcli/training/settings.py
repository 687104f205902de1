"""What a training command is told: flat, frozen settings that mean the same as flags, in a config file and in RUN."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdcli.errors import NotFound, UsageError
from sdcli.generation.settings import Device
from sdcli.models.registry import read_yaml
from sdcli.request.fields import MapMaker
from sdcli.request.schema import did_you_mean, first_problem, parse_size

S = TypeVar("S", bound="TrainSettings")

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

LrScheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


def _field(default: Any, description: str, panel: str, *, also: tuple[str, ...] = (), **bounds: Any) -> Any:
    """A setting. `also` are flags of other trainers for the same thing."""
    return Field(default, description=description, json_schema_extra={"panel": panel, "also": list(also)}, **bounds)


class TrainSettings(BaseModel):
    """What every trainer shares. A field is a flag (`--kebab-case`), a key of --config and of RUN/settings.yaml.

    `None` means that the model or the data decide.
    """

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")

    seed: int = _field(0, "where all randomness starts", STEPS, ge=0, le=2**63 - 1)
    train_batch_size: int = _field(16, "samples a process takes at once", STEPS, ge=1)
    gradient_accumulation_steps: int = _field(1, "batches that make one optimizer step", STEPS, ge=1)
    max_train_steps: int | None = _field(None, f"optimizer steps ({DEFAULT_STEPS} if no other limit)", STEPS, ge=1)
    num_train_epochs: float | None = _field(None, "passes over the data, instead of steps", STEPS, gt=0)
    max_hours: float | None = _field(None, "stop after this time, with a checkpoint and exit code 0", STEPS, gt=0)

    optimizer: Literal["adamw", "muon", "adamw-8bit", "sgd"] = _field(
        "adamw", "muon is for matrices, with adamw for the rest; adamw-8bit needs the package bitsandbytes", OPTIMIZER
    )
    learning_rate: float = _field(1e-4, "at its highest", OPTIMIZER, gt=0, also=("--lr",))
    lr_scheduler: LrScheduler = _field("constant", "how the learning rate goes on", OPTIMIZER)
    lr_warmup_steps: int = _field(0, "steps from 0 to the full learning rate", OPTIMIZER, ge=0)
    lr_num_cycles: int | None = _field(None, "hard restarts of cosine_with_restarts (1)", OPTIMIZER, ge=1)
    adam_beta1: float = _field(0.9, "decay of the mean of gradients", OPTIMIZER, ge=0, lt=1)
    adam_beta2: float = _field(0.999, "decay of the mean of their squares", OPTIMIZER, ge=0, lt=1)
    adam_weight_decay: float = _field(1e-2, "decoupled weight decay", OPTIMIZER, ge=0)
    adam_epsilon: float = _field(1e-8, "added to the denominator", OPTIMIZER, gt=0)
    max_grad_norm: float = _field(1.0, "clip the gradients' norm to this; 0 is off", OPTIMIZER, ge=0)

    use_ema: bool = _field(False, "keep a moving average of the weights, and generate with it", OPTIMIZER)
    ema_decay: float = _field(0.9999, "of the moving average, at its highest", OPTIMIZER, ge=0, lt=1)
    ema_power: float = _field(
        0.75, "warm-up: the decay is 1 - (1 + step)^-power until it reaches --ema-decay", OPTIMIZER
    )

    mixed_precision: Literal["no", "bf16", "fp16"] = _field("no", "number format of the heavy work", MACHINE)
    gradient_checkpointing: bool = _field(False, "less memory, more work: activations are computed twice", MACHINE)
    channels_last: bool = _field(False, "memory layout of convolutions; quicker in half precision", MACHINE)
    compile: bool = _field(False, "torch.compile; its gradients are compared with plain ones first", MACHINE)
    device: Device = _field("auto", "where to compute; auto takes cuda, mps or cpu", MACHINE)
    num_processes: int | None = _field(
        None, "processes on this machine, one a GPU (1; `accelerate launch` sets it too)", MACHINE, ge=1
    )
    dataloader_num_workers: int = _field(0, "processes that prepare samples; 0 is a thread", MACHINE, ge=0)

    checkpointing_steps: int = _field(500, "steps between checkpoints", KEEP, ge=1, also=("--save-every-n-steps",))
    checkpoints_total_limit: int | None = _field(
        None, "keep so many; the oldest goes once the newest is whole", KEEP, ge=1
    )

    validation_steps: int | None = _field(None, "steps between validations (as checkpoints)", WATCH, ge=1)
    sample_every_n_steps: int | None = _field(None, "steps between sample sheets (as checkpoints)", WATCH, ge=1)
    log_steps: int = _field(1, "steps between lines of log.jsonl", WATCH, ge=1)
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = _field((), "trackers to report to as well", WATCH)

    def given(self) -> set[str]:
        """The fields that differ from their defaults."""
        return {name for name, info in type(self).model_fields.items() if getattr(self, name) != info.default}

    def total_batch_size(self, processes: int) -> int:
        """Samples of one optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def steps(self, samples_per_epoch: int, batch: int) -> int | None:
        """Optimizer steps of `batch` samples to do; None where only --max-hours ends the run."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        if self.num_train_epochs is not None:
            return max(1, math.ceil(self.num_train_epochs * samples_per_epoch / batch))
        return None if self.max_hours is not None else DEFAULT_STEPS

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        if self.max_train_steps is not None and self.num_train_epochs is not None:
            raise ValueError("--max-train-steps and --num-train-epochs say the same thing; give one")
        endless = self.max_hours is not None and self.max_train_steps is None and self.num_train_epochs is None
        if endless and not self.lr_scheduler.startswith("constant"):
            raise ValueError(f"--lr-scheduler {self.lr_scheduler} must know the number of steps: add --max-train-steps")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("--lr-warmup-steps has no effect with constant; use --lr-scheduler constant_with_warmup")
        if self.lr_num_cycles is not None and self.lr_scheduler != "cosine_with_restarts":
            raise ValueError(f"--lr-num-cycles has no effect with --lr-scheduler {self.lr_scheduler}")
        if self.optimizer == "sgd" and {"adam_beta2", "adam_epsilon"} & self.given():
            raise ValueError("--adam-beta2 and --adam-epsilon have no effect with --optimizer sgd")
        if not self.use_ema and {"ema_decay", "ema_power"} & self.given():
            raise ValueError("--ema-decay and --ema-power have no effect without --use-ema")
        return self


class ImageSettings(TrainSettings):
    """What the trainers on images share."""

    image_column: str | None = _field(None, "column with the image, in tables", DATA)
    caption_column: str | None = _field(None, "column with the caption (text or caption)", DATA)
    caption_extension: str = _field(".txt", "of caption files beside images", DATA)
    split: str = _field("train", "of a data set that has several", DATA)
    validation_split: float = _field(0.05, "share of the images that is held out for validation", DATA, ge=0, lt=1)
    max_train_samples: int | None = _field(None, "use only so many images", DATA, ge=1)
    shuffle_buffer: int = _field(10_000, "how far a sample of a sharded set may move", DATA, ge=1)
    cache_dir: Path | None = _field(None, "for what was computed of the data (your cache folder)", DATA)

    resolution: str | None = _field(None, "pixels, as 512 or 512x768 (width x height); the model's own", SHAPE)
    random_crop: bool = _field(False, "cut out anywhere, not in the middle; latents cannot be cached then", SHAPE)
    random_flip: bool = _field(False, "mirror every second image", SHAPE)
    enable_bucket: bool = _field(False, "keep proportions: group images by aspect ratio", SHAPE)
    bucket_reso_steps: int | None = _field(None, "sides of buckets are multiples of this (an eighth)", SHAPE, ge=8)
    min_bucket_reso: int | None = _field(None, "shortest side of a bucket (half the resolution)", SHAPE, ge=8)
    max_bucket_reso: int | None = _field(None, "longest side of a bucket (twice the resolution)", SHAPE, ge=8)

    def target_size(self, otherwise: tuple[int, int]) -> tuple[int, int]:
        """Width and height of --resolution. Raises UsageError."""
        if self.resolution is None:
            return otherwise
        return parse_size(self.resolution if "x" in self.resolution.lower() else f"{self.resolution}x{self.resolution}")

    @model_validator(mode="after")
    def _every_image_setting_has_an_effect(self) -> Self:
        typed = {"bucket_reso_steps", "min_bucket_reso", "max_bucket_reso"} & self.given()
        if typed and not self.enable_bucket:
            raise ValueError(f"--{min(typed).replace('_', '-')} has no effect without --enable-bucket")
        return self


class DenoiserSettings(ImageSettings):
    """What the trainers share that teach to take noise away."""

    caption_dropout: float = _field(
        0.1,
        "share of samples with an empty caption, so that guidance works",
        DATA,
        ge=0,
        le=1,
        also=("--caption-dropout-rate",),
    )
    shuffle_caption: bool = _field(False, "shuffle the comma-separated parts of captions", DATA)
    keep_tokens: int = _field(0, "parts at the front that --shuffle-caption leaves there", DATA, ge=0)
    caption_prefix: str = _field("", "put before every caption", DATA)
    prompt_template: str | None = _field(None, "wraps captions, '{prompt}, glossy style' (the model's own)", DATA)
    cache_latents: bool = _field(True, "encode each image once, and keep its latents", DATA)

    snr_gamma: float | None = _field(None, "min-SNR weighting; 5 is usual", OBJECTIVE, gt=0, also=("--min-snr-gamma",))
    noise_offset: float = _field(0.0, "noise per channel, for very dark and bright images", OBJECTIVE, ge=0)
    input_perturbation: float = _field(0.0, "more noise on the input than in the target", OBJECTIVE, ge=0)
    stratified_timesteps: bool = _field(True, "spread the timesteps of a step evenly", OBJECTIVE)

    sample_prompts: tuple[str, ...] = _field(
        (),
        "a prompt of the sample sheets; several times for several",
        WATCH,
        also=("--sample-prompt", "--validation-prompts"),
    )
    sample_steps: int | None = _field(None, "denoising steps of sample images (the model's own)", WATCH, ge=1)

    @model_validator(mode="after")
    def _every_caption_setting_has_an_effect(self) -> Self:
        if self.keep_tokens and not self.shuffle_caption:
            raise ValueError("--keep-tokens has no effect without --shuffle-caption")
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError("--prompt-template has no {prompt} in it, where the captions go")
        return self


class UnetSettings(DenoiserSettings):
    """`sdcli train-unet`."""

    model: str | None = _field(
        None, "what to train on from: a name, a folder, a file (default: the embedded one)", MODEL
    )
    from_scratch: str | None = _field(
        None, "start with random weights instead: a unet/config.json, or starter, sd15, pixel", MODEL
    )
    vae: str | None = _field(None, "with --from-scratch: the model whose VAE to use (that of --model)", MODEL)
    text_encoder: str | None = _field(
        None, "with --from-scratch: the model whose text encoder to use (that of --model)", MODEL
    )
    space: Literal["latent", "pixel"] = _field("latent", "pixel: no VAE, the plain DDPM on small images", MODEL)
    unconditional: bool = _field(False, "no captions: learn to generate without a prompt", MODEL)
    class_conditional: bool = _field(False, "class folders' names instead of captions", MODEL)
    train_text_encoder: bool = _field(False, "train the text encoder along", MODEL)
    text_encoder_lr: float | None = _field(None, "its learning rate (that of the UNet)", MODEL, gt=0)

    rank: int | None = _field(
        None, "train a LoRA of this rank instead of all weights", MODEL, ge=1, also=("--network-dim",)
    )
    lora_alpha: float | None = _field(
        None, "LoRA's scale is alpha / rank (rank)", MODEL, gt=0, also=("--network-alpha",)
    )
    lora_targets: tuple[str, ...] = _field(
        (), "layers that get a LoRA (to_q to_k to_v to_out.0); several times for several", MODEL
    )
    lora_dropout: float = _field(0.0, "share of LoRA's inputs that are zeroed", MODEL, ge=0, lt=1)

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = _field(
        None, "what the UNet learns to predict (the model's own)", OBJECTIVE
    )
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = _field(
        None, "noise schedule (the model's own)", OBJECTIVE
    )
    beta_start: float | None = _field(None, "variance of the first step", OBJECTIVE, gt=0, lt=1)
    beta_end: float | None = _field(None, "variance of the last step", OBJECTIVE, gt=0, lt=1)
    rescale_betas_zero_snr: bool | None = _field(
        None, "let the last step be pure noise", OBJECTIVE, also=("--zero-terminal-snr",)
    )

    @model_validator(mode="after")
    def _every_unet_setting_has_an_effect(self) -> Self:
        lora = {"lora_alpha", "lora_targets", "lora_dropout"} & self.given()
        if lora and self.rank is None:
            raise ValueError(f"--{min(lora).replace('_', '-')} has no effect without --rank")
        if self.from_scratch is None and (self.vae or self.text_encoder):
            raise ValueError("--vae and --text-encoder go with --from-scratch; else the model's own are used")
        if self.from_scratch is not None and self.rank is not None:
            raise ValueError("--rank trains a LoRA on top of a model; --from-scratch has none")
        if self.unconditional and self.class_conditional:
            raise ValueError("either --unconditional or --class-conditional")
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            raise ValueError("--text-encoder-lr has no effect without --train-text-encoder")
        if self.train_text_encoder and (self.unconditional or self.class_conditional or self.space == "pixel"):
            raise ValueError("--train-text-encoder has no effect where there are no captions")
        captions = {"shuffle_caption", "caption_prefix", "prompt_template", "caption_column"} & self.given()
        if captions and (self.unconditional or self.class_conditional):
            raise ValueError(f"--{min(captions).replace('_', '-')} has no effect without captions")
        if self.unconditional and "caption_dropout" in self.given():
            raise ValueError("--caption-dropout has no effect with --unconditional")
        if self.space == "pixel" and (self.vae or self.model):
            raise ValueError("--space pixel uses no VAE and no other model: --from-scratch alone says what to train")
        if self.space == "pixel" and self.from_scratch is None:
            raise ValueError(
                "--space pixel starts from random weights: add --from-scratch pixel, or a unet/config.json"
            )
        return self


class ControlNetSettings(DenoiserSettings):
    """`sdcli train-controlnet`."""

    model: str | None = _field(
        None, "what it is to guide: a name, a folder, a file (default: the embedded one); stays as it is", MODEL
    )
    controlnet: str | None = _field(
        None, "go on with this ControlNet: a name, a folder, a file (default: a new one, made of the UNet)", MODEL
    )

    conditioning_image_column: str | None = _field(
        None, "column with the map that belongs to the image (conditioning_image)", DATA
    )
    conditioning_data_dir: str | None = _field(None, "folder with the maps, under the names of the images", DATA)
    preprocessor: MapMaker | None = _field(None, "make the maps of the images themselves", DATA)

    @model_validator(mode="after")
    def _every_controlnet_setting_has_an_effect(self) -> Self:
        names = ("conditioning_image_column", "conditioning_data_dir", "preprocessor")
        typed = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        if len(typed) > 1:
            raise ValueError(f"{' and '.join(typed)} both say where the maps come from; give one")
        return self


class VaeSettings(ImageSettings):
    """`sdcli train-vae`."""

    model: str | None = _field(None, "the model whose VAE to train on (default: the embedded one)", MODEL)
    from_scratch: str | None = _field(
        None, "start with random weights instead: a vae/config.json, or kl, tiny, sd15", MODEL
    )

    l1_weight: float = _field(1.0, "of the mean absolute error", OBJECTIVE, ge=0)
    structure_weight: float = _field(0.5, "of the structural term, which needs no other network", OBJECTIVE, ge=0)
    kl_weight: float = _field(1e-6, "of the distance of the latents' distribution from a normal one", OBJECTIVE, ge=0)
    latents_regularisation: float = _field(
        3e-3, "pull latents without a distribution (AutoencoderTiny) to mean 0 and deviation 1", OBJECTIVE, ge=0
    )
    latent_noise: float = _field(0.07, "noise on such latents that the decoder learns to bear", OBJECTIVE, ge=0)
    lpips: Path | None = _field(None, "weights of VGG16 and LPIPS in safetensors: adds that distance", OBJECTIVE)
    lpips_weight: float = _field(1.0, "of LPIPS", OBJECTIVE, ge=0)
    discriminator: bool = _field(False, "add a patch discriminator (PatchGAN)", OBJECTIVE)
    discriminator_weight: float = _field(0.05, "of its judgement", OBJECTIVE, ge=0)
    discriminator_start: int = _field(0, "first step at which it is listened to", OBJECTIVE, ge=0)
    discriminator_channels: int = _field(64, "its width", OBJECTIVE, ge=1)

    @model_validator(mode="after")
    def _every_vae_setting_has_an_effect(self) -> Self:
        if self.model is not None and self.from_scratch is not None:
            raise ValueError("either --model, whose VAE goes on, or --from-scratch")
        captions = {"caption_column", "caption_extension"} & self.given()
        if captions:
            raise ValueError(f"--{min(captions).replace('_', '-')} has no effect: a VAE learns without captions")
        if self.lpips is None and "lpips_weight" in self.given():
            raise ValueError("--lpips-weight has no effect without --lpips")
        typed = {"discriminator_weight", "discriminator_start", "discriminator_channels"} & self.given()
        if typed and not self.discriminator:
            raise ValueError(f"--{min(typed).replace('_', '-')} has no effect without --discriminator")
        return self


class TextSettings(TrainSettings):
    """`sdcli train-text-encoder`."""

    caption_column: str | None = _field(None, "column with the caption (text or caption)", DATA)
    caption_extension: str = _field(".txt", "of caption files beside images", DATA)
    split: str = _field("train", "of a data set that has several", DATA)
    validation_split: float = _field(0.05, "share of the captions that is held out for validation", DATA, ge=0, lt=1)
    cache_dir: Path | None = _field(None, "for the teacher's vectors (your cache folder)", DATA)

    model: str | None = _field(None, "go on with the text encoder and vocabulary of this model", MODEL)
    vocab_size: int = _field(8192, "tokens to learn from the captions", MODEL, ge=514)
    max_length: int = _field(32, "tokens of a caption, start and end included", MODEL, ge=3, le=77)
    hidden_size: int = _field(256, "width of the network", MODEL, ge=8)
    num_hidden_layers: int = _field(4, "layers", MODEL, ge=1)
    num_attention_heads: int = _field(4, "attention heads", MODEL, ge=1)
    intermediate_size: int | None = _field(None, "width inside a layer (4 times the network's)", MODEL, ge=8)

    objective: tuple[str, ...] = _field(
        (),
        "lm, contrastive, distil, distil-word (at the last word) or align (an image's captions get the states of its "
        "first one), with a weight as in lm:0.2; several times to add up (lm; distil with --teacher)",
        OBJECTIVE,
    )
    teacher: Path | None = _field(None, "a sentence encoder's folder, or a file of vectors, to learn from", OBJECTIVE)
    word_dropout: float = _field(0.0, "share of words that are left out of what is compared", OBJECTIVE, ge=0, lt=1)
    temperature: float = _field(0.05, "of the contrastive terms", OBJECTIVE, gt=0)

    @model_validator(mode="after")
    def _every_text_setting_has_an_effect(self) -> Self:
        if self.gradient_checkpointing or self.channels_last:
            raise ValueError(
                f"--{'gradient-checkpointing' if self.gradient_checkpointing else 'channels-last'} has no effect on a "
                "text encoder"
            )
        shape = {
            "vocab_size",
            "max_length",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        }
        typed = shape & self.given()
        if self.model is not None and typed:
            raise ValueError(f"--{min(typed).replace('_', '-')} has no effect with --model, whose network goes on")
        return self


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Where latents, text states, a teacher's vectors and what was examined are kept unless `--cache-dir` says so."""
    return cache_dir.expanduser() if cache_dir is not None else platformdirs.user_cache_path("sdcli") / "training"


def settings_from(
    kind: type[S], typed: Mapping[str, Any], *, config: Path | None = None, recorded: Mapping[str, Any] | None = None
) -> S:
    """Settings from what was typed, over a config file, over what a run recorded, over the defaults.

    Raises NotFound and UsageError with one sentence that names the setting.
    """
    read = read_config(config, kind) if config is not None else {}
    values = {**(recorded or {}), **{name: read[name] for name in read if name in kind.model_fields}, **typed}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = first_problem(error)
        raise UsageError(f"{config}: {problem}" if config is not None and not typed else problem) from None


def read_config(file: Path, kind: type[TrainSettings]) -> dict[str, Any]:
    """The settings in a TOML or YAML file, keys in kebab-case or snake_case; perhaps also `data` and `output`.

    RUN/settings.yaml names its command as well. Raises NotFound and UsageError.
    """
    if file.suffix.lower() == ".toml":
        try:
            data: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise NotFound(f"no file {file}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{file}: {error}") from None
    elif file.suffix.lower() in {".yaml", ".yml"}:
        data = read_yaml(file)
    else:
        raise UsageError(f"--config takes a .toml or .yaml file, not {file.name}")
    known = {*kind.model_fields, "data", "output", "command"}
    values = {}
    for name, value in data.items():
        field = str(name).replace("-", "_")
        if field not in known:
            raise UsageError(f"{file}: no setting {name!r}{did_you_mean(field, known)}")
        values[field] = tuple(value) if isinstance(value, list) else value
    return values
