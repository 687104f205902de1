"""The options of AUTOMATIC1111's dialect: those that can be set, and the facts that clients ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sdcli.images.formats import FORMAT_OF, ImageFormat
from sdcli.models.registry import Registry
from sdcli.server.model_names import check_model
from sdcli.server.native import ApiError
from sdcli.server.settings import ServerSettings

_FACTS: dict[str, Any] = {
    "samples_save": False,
    "save_images_before_highres_fix": False,
    "grid_save": False,
    "return_grid": False,
    "do_not_show_images": False,
    "enable_pnginfo": True,
    "sd_checkpoint_hash": "",
    "sd_vae": "Automatic",
    "sd_unet": "Automatic",
    "randn_source": "CPU",
    "eta_noise_seed_delta": 0,
    "img2img_fix_steps": False,
    "img2img_color_correction": False,
    "initial_noise_multiplier": 1.0,
    "enable_batch_seeds": True,
    "upcast_attn": False,
    "token_merging_ratio": 0.0,
    "live_previews_enable": True,
    "use_old_emphasis_implementation": False,
    "use_old_scheduling": False,
    "emphasis": "Original",
}
"""Options of the web UI with the value that this server always has."""
_SAME: dict[str, set[str | None]] = {"sd_vae": {"Automatic", "None", "", None}}
"""Other values that mean the same as what the server does."""


@dataclass(frozen=True)
class Options:
    """What can be set: by POST options for all clients of the dialect, by override_settings for one call."""

    sd_model_checkpoint: str
    CLIP_stop_at_last_layers: int = 1
    samples_format: ImageFormat = "png"

    @property
    def shown(self) -> dict[str, Any]:
        """The options as GET options shows them."""
        return {**vars(self), **_FACTS}

    def changed(
        self, given: Mapping[str, Any], registry: Registry, settings: ServerSettings, *, where: str = ""
    ) -> Options:
        """The options with those that are given. Raises ApiError for one that cannot be set, unless it is so."""
        options = self
        for name, value in given.items():
            param = f"{where}{name}"
            match name:
                case "sd_model_checkpoint":
                    options = replace(options, sd_model_checkpoint=_model(value, param, registry, settings))
                case "CLIP_stop_at_last_layers":
                    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(1, 101):
                        raise _refused(param, f"should be a whole number from 1 to 100, not {str(value)[:40]}")
                    options = replace(options, CLIP_stop_at_last_layers=int(value))
                case "samples_format":
                    suffix = f".{value}".lower()
                    if suffix not in FORMAT_OF:
                        raise _refused(param, f"should be png, jpg or webp, not {str(value)[:40]!r}")
                    options = replace(options, samples_format=FORMAT_OF[suffix])
                case "forge_additional_modules" if not value:
                    pass
                case _ if name in _FACTS:
                    if value != _FACTS[name] and not _is_same(name, value):
                        raise _refused(param, f"is always {_FACTS[name]!r} on this server")
                case _:
                    raise _refused(param, "there is no such option on this server")
        return options


def first_options(registry: Registry) -> Options:
    """The options of a server that nobody has changed yet."""
    return Options(registry.default)


def _is_same(name: str, value: Any) -> bool:
    return isinstance(value, str | None) and value in _SAME.get(name, ())


def _model(value: Any, param: str, registry: Registry, settings: ServerSettings) -> str:
    if not isinstance(value, str):
        raise _refused(param, "should be the title of a model")
    return check_model(value, registry, settings, param=param)


def _refused(param: str, sentence: str) -> ApiError:
    return ApiError(400, "bad_request", f"{param[:100]}: {sentence}", param=param[:100])
