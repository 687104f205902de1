"""Settings of `sdcli train-vae`, in addition to those that all trainers share."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import model_validator

from sdcli.training.settings import MODEL, OBJECTIVE, FixedPrecision, ImageSettings, fixed_precision, setting


class VaeSettings(ImageSettings):
    """Settings of `sdcli train-vae`."""

    mixed_precision: FixedPrecision = fixed_precision()

    model: str | None = setting(None, "model whose VAE to fine-tune (default: the embedded model)", MODEL)
    from_scratch: str | None = setting(None, "start from random weights: a vae/config.json, or kl, tiny, sd15", MODEL)

    l1_weight: float = setting(1.0, "weight of the mean absolute error", OBJECTIVE, ge=0)
    structure_weight: float = setting(
        0.5, "weight of the gradient-matching term, which sharpens edges", OBJECTIVE, ge=0
    )
    kl_weight: float = setting(
        1e-6, "weight of the KL divergence of the latents from a normal distribution", OBJECTIVE, ge=0
    )
    latents_regularisation: float = setting(
        3e-3, "weight that pulls latents of an AutoencoderTiny to mean 0 and standard deviation 1", OBJECTIVE, ge=0
    )
    latent_noise: float = setting(0.07, "noise added to latents of an AutoencoderTiny before decoding", OBJECTIVE, ge=0)
    lpips: Path | None = setting(
        None, "file or folder with the weights of VGG16 and LPIPS; adds LPIPS to the loss", OBJECTIVE
    )
    lpips_weight: float = setting(1.0, "weight of LPIPS", OBJECTIVE, ge=0)
    discriminator: bool = setting(False, "add a patch discriminator (PatchGAN)", OBJECTIVE)
    discriminator_weight: float = setting(0.05, "weight of the discriminator's term", OBJECTIVE, ge=0)
    discriminator_start: int = setting(0, "step from which the discriminator counts", OBJECTIVE, ge=0)
    discriminator_channels: int = setting(64, "channels of the discriminator's first layer", OBJECTIVE, ge=1)

    @model_validator(mode="after")
    def _every_vae_setting_has_an_effect(self) -> Self:
        if self.model is not None and self.from_scratch is not None:
            raise ValueError("give either --model or --from-scratch")
        if self.sharding == "full":
            raise ValueError(
                "--sharding full is for UNets, ControlNets and text encoders; a VAE fits any device, so leave it out"
            )
        captions = {"caption_column", "caption_extension"} & self.given()
        if captions:
            raise ValueError(f"--{min(captions).replace('_', '-')} has no effect: a VAE is trained without captions")
        if self.lpips is None and "lpips_weight" in self.given():
            raise ValueError("--lpips-weight has no effect without --lpips")
        typed = {"discriminator_weight", "discriminator_start", "discriminator_channels"} & self.given()
        if typed and not self.discriminator:
            raise ValueError(f"--{min(typed).replace('_', '-')} has no effect without --discriminator")
        return self
