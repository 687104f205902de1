"""Settings of `sdcli train-unet`, in addition to those that all trainers share."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from sdcli.training.settings import MODEL, OBJECTIVE, DenoiserSettings, setting


class UnetSettings(DenoiserSettings):
    """Settings of `sdcli train-unet`."""

    model: str | None = setting(
        None, "model to fine-tune: a name, a folder or a file (default: the embedded model)", MODEL
    )
    from_scratch: str | None = setting(
        None, "start from random weights: a unet/config.json, or starter, sd15, latent, pixel, pixel-grey", MODEL
    )
    vae: str | None = setting(None, "with --from-scratch: model whose VAE to use (default: that of --model)", MODEL)
    text_encoder: str | None = setting(
        None, "with --from-scratch: model whose text encoder to use (default: that of --model)", MODEL
    )
    space: Literal["latent", "pixel"] = setting(
        "latent", "latent: with a VAE; pixel: DDPM on small images without one", MODEL
    )
    unconditional: bool = setting(False, "ignore captions and learn to generate without a prompt", MODEL)
    class_conditional: bool = setting(False, "condition on the names of class folders instead of captions", MODEL)
    train_text_encoder: bool = setting(False, "train the text encoder, too", MODEL)
    text_encoder_lr: float | None = setting(
        None, "learning rate of the text encoder (default: --learning-rate)", MODEL, gt=0
    )

    rank: int | None = setting(
        None,
        "train a LoRA of this rank instead of all weights (default: all weights)",
        MODEL,
        ge=1,
        also=("--network-dim",),
    )
    lora_alpha: float | None = setting(
        None,
        "alpha of the LoRA, whose scale is alpha / rank (default: the rank)",
        MODEL,
        gt=0,
        also=("--network-alpha",),
    )
    lora_targets: tuple[str, ...] = setting(
        (), "name ending of layers that get a LoRA; repeatable (default: to_q to_k to_v to_out.0)", MODEL
    )
    lora_dropout: float = setting(0.0, "dropout on the inputs of the LoRA", MODEL, ge=0, lt=1)

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = setting(
        None, "what the UNet predicts (default: the model's)", OBJECTIVE
    )
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = setting(
        None, "noise schedule (default: the model's)", OBJECTIVE
    )
    beta_start: float | None = setting(
        None, "noise variance of the first timestep (default: the model's)", OBJECTIVE, gt=0, lt=1
    )
    beta_end: float | None = setting(
        None, "noise variance of the last timestep (default: the model's)", OBJECTIVE, gt=0, lt=1
    )
    rescale_betas_zero_snr: bool | None = setting(
        None, "make the last timestep pure noise (default: the model's)", OBJECTIVE, also=("--zero-terminal-snr",)
    )

    @model_validator(mode="after")
    def _every_unet_setting_has_an_effect(self) -> Self:
        lora = {"lora_alpha", "lora_targets", "lora_dropout"} & self.given()
        if lora and self.rank is None:
            raise ValueError(f"--{min(lora).replace('_', '-')} has no effect without --rank")
        if self.from_scratch is None and (self.vae or self.text_encoder):
            raise ValueError("--vae and --text-encoder need --from-scratch; fine-tuning uses the model's own")
        if self.from_scratch is not None and self.rank is not None:
            raise ValueError("--rank trains a LoRA of an existing model, so it cannot be combined with --from-scratch")
        if self.unconditional and self.class_conditional:
            raise ValueError("give either --unconditional or --class-conditional")
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            raise ValueError("--text-encoder-lr has no effect without --train-text-encoder")
        if self.train_text_encoder and (self.unconditional or self.class_conditional or self.space == "pixel"):
            raise ValueError("--train-text-encoder has no effect without captions")
        captions = {"shuffle_caption", "caption_prefix", "prompt_template", "caption_column"} & self.given()
        if captions and (self.unconditional or self.class_conditional):
            raise ValueError(f"--{min(captions).replace('_', '-')} has no effect without captions")
        if self.unconditional and "caption_dropout" in self.given():
            raise ValueError("--caption-dropout has no effect with --unconditional")
        if self.space == "pixel" and (self.vae or self.model):
            raise ValueError("--space pixel uses neither a VAE nor a base model: leave out --vae and --model")
        if self.space == "pixel" and self.from_scratch is None:
            raise ValueError("--space pixel starts from random weights: add --from-scratch pixel or a unet/config.json")
        return self
