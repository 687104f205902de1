"""`sdcli train-vae`: from its settings to a task, with the VAE, the images and the losses."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from typing import Any, ClassVar

from sdcli.errors import UsageError
from sdcli.io.files import PACKAGE
from sdcli.io.json_files import read_json_object
from sdcli.io.lean_diffusers import VAE, AutoencoderKL, AutoencoderTiny
from sdcli.models.loaded_model import LoadedModel
from sdcli.training.events import Event, Preparation
from sdcli.training.inputs.image_data import examine_data, list_data, merge_buckets
from sdcli.training.inputs.sources import Pixels
from sdcli.training.memory import vae_memory
from sdcli.training.model_parts import ModelFiles, config_file, load_to_train, new_network
from sdcli.training.origin import origin
from sdcli.training.session import RunSetup, Session, fingerprint
from sdcli.training.vae.losses import load_lpips
from sdcli.training.vae.settings import VaeSettings
from sdcli.training.vae.task import VaeObjective, VaeTask
from sdcli.vae.autoencoder import cell, has_distribution

KL_PRESET: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 64, 128, 128],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
DEFAULT_SIZE = (256, 256)
"""Width and height in pixels for a VAE without a UNet, which does not define a size."""
PRESETS = {
    "kl": "a small AutoencoderKL, 4.4 million parameters, 8 pixels a latent cell",
    "tiny": "the shape of the embedded model's AutoencoderTiny, 0.6 million parameters",
    "sd15": "the shape of Stable Diffusion's VAE, 84 million parameters",
}


class VaeSession(Session[VaeSettings]):
    """A run of `sdcli train-vae`."""

    command: ClassVar[str] = "train-vae"
    kind: ClassVar[type[VaeSettings]] = VaeSettings
    presets: ClassVar[Collection[str]] = tuple(PRESETS)

    def build(self) -> Generator[Event, None, RunSetup]:
        settings = self.settings
        images = list_data(self.data, settings)
        if images.kind != "pictures":
            raise UsageError(f"{self.data} holds latents, but a VAE is trained on images")
        yield Preparation("loading the model", 0)
        model, vae, default = self._vae()
        self._check_effects(vae)
        lpips = load_lpips(settings.lpips.expanduser()) if settings.lpips is not None else None
        resolution = settings.target_size(default)
        data = yield from examine_data(
            self.data, images, settings, resolution=resolution, size_step=cell(vae), captions=False
        )
        data = yield from merge_buckets(data, self.batch)
        if settings.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        task = VaeTask(
            vae=vae,
            source=Pixels(data.images, data.bucketing, settings.seed, flip=settings.random_flip),
            order=data.order(batch=self.batch, seed=settings.seed, buffer=settings.shuffle_buffer),
            seed=settings.seed,
            learning_rate=settings.learning_rate,
            objective=VaeObjective(
                l1=settings.l1_weight,
                structure=settings.structure_weight,
                kl=settings.kl_weight,
                latents_regularisation=settings.latents_regularisation,
                latent_noise=settings.latent_noise,
                lpips=settings.lpips_weight,
                discriminator=settings.discriminator_weight,
                discriminator_start=settings.discriminator_start,
            ),
            held_out=data.validation(),
            lpips=lpips,
            discriminator=settings.discriminator,
            discriminator_channels=settings.discriminator_channels,
            name_of=lambda index: data.images[index].name,
        )
        files = ModelFiles.around(
            model,
            trained={"vae": type(vae).__name__},
            averaged=("vae",) if settings.use_ema else (),
        )
        return RunSetup(
            task=task,
            samples=len(task.order),
            links=files.links(),
            write_frozen=files.write,
            origin=origin(
                {"model": model},
                {"configuration": vae_config(settings.from_scratch) if settings.from_scratch is not None else None},
                {} if settings.lpips is None else {"lpips": settings.lpips.expanduser()},
            ),
            memory=vae_memory(task, settings, size=data.largest()),
            facts={
                "data": self.data,
                "pictures": len(data.trained),
                "held_out": len(data.held_out),
                "dropped": data.dropped,
                "data_fingerprint": fingerprint({data.images[int(i)].name: data.digests[int(i)] for i in data.used}),
                "sampling": data.sampling,
                "trained_parameters": sum(p.numel() for n in task.networks.values() for p in n.parameters()),
            },
        )

    def _vae(self) -> tuple[LoadedModel | None, VAE, tuple[int, int]]:
        """The base model (None for a new VAE), the VAE to train, and its default image size."""
        settings = self.settings
        if settings.from_scratch is not None:
            return None, new_vae(vae_config(settings.from_scratch), seed=settings.seed), DEFAULT_SIZE
        model = load_to_train(self.registry.find(settings.model), self.command, device="cpu", needs="vae")
        model.vae.requires_grad_(True)
        defaults = model.spec.defaults
        return model, model.vae, (defaults.width, defaults.height) if "unet" in model.parts else DEFAULT_SIZE

    def _check_effects(self, vae: VAE) -> None:
        """Refuse settings of loss terms that this kind of VAE does not have."""
        without = {"kl_weight"} if not has_distribution(vae) else {"latents_regularisation", "latent_noise"}
        typed = without & self.settings.given()
        if typed:
            flag = min(typed).replace("_", "-")
            raise UsageError(f"--{flag} has no effect on an {type(vae).__name__}")


def vae_config(name: str) -> dict[str, Any]:
    """The VAE configuration of --from-scratch: a preset or a vae/config.json. Raises UsageError and NotFound."""
    match name:
        case "kl":
            return dict(KL_PRESET)
        case "tiny":
            return read_json_object(PACKAGE / "starter" / "vae" / "config.json")
        case "sd15":
            return read_json_object(PACKAGE / "models/families/configs/sd1" / "vae" / "config.json")
    return config_file(name, "vae", presets=PRESETS)


def new_vae(config: Mapping[str, Any], *, seed: int) -> VAE:
    """A VAE with torch's default initialisation, in float32. Raises UsageError and BadWeights."""
    vae: VAE = new_network(config, (AutoencoderKL, AutoencoderTiny), seed=seed)
    return vae
