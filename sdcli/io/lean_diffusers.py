"""Import diffusers' model and scheduler classes without the two seconds of other things they pull in.

Measured on a 2-core AMD EPYC: `import torch` takes 1.0 s, the UNet class 2.4 s on top, and 0.4 s inside `lean_imports`.
The rest goes to packages whose `__init__` imports every model family, to `torch._dynamo` (for one decorator),
and to optional packages such as transformers, peft and scipy.stats (for features that generation does not use). Inside
the block they are absent, which diffusers allows for; after it everything is as before, so that other code in the
process imports the real ones. Of accelerate, requests and the hub's client diffusers keeps names that import them when
they are used (see `deferred_modules`). Where this fails, because of a package that diffusers began to look for, the
ordinary imports are used, with a note.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sdcli.io.deferred_modules import DeferredDistributions, DeferredModule, DeferredName

os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")

_EAGER_PACKAGES = (
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "diffusers.models.autoencoders",
    "diffusers.models.controlnets",
    "diffusers.hooks",
)
_PIPELINES_LORA = ("diffusers.loaders.lora_base", "diffusers.loaders.lora_pipeline")
"""Part of pipelines, not of models; imported without peft, they could not fuse a LoRA afterwards."""
_ABSENT = ("transformers", "scipy", "peft")
"""Packages that cannot be imported inside the block; all other optional ones are only reported as not installed."""
_NEEDED = {"torch", "safetensors", "accelerate", "hf_hub"}
"""Packages that diffusers looks for and that sdcli depends on, by the names that diffusers has for them."""
_DEFERRED = (
    *("accelerate", "accelerate.hooks", "accelerate.utils", "requests"),
    *("diffusers.utils.dynamic_modules_utils", "diffusers.utils.remote_utils", "huggingface_hub.file_download"),
)
"""Modules that diffusers takes names from at import, and uses for what generation never does."""
_DEFERRED_OF_HUB = (
    *("ModelCard", "ModelCardData", "create_repo", "hf_hub_download", "model_info", "resolve_revision"),
    *("snapshot_download", "split_torch_state_dict_into_shards", "upload_folder"),
)
"""The same of huggingface_hub itself, whose own names bring its client for the network."""

_importing = threading.RLock()


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """A block in which `from diffusers... import SomeClass` loads little more than that class.

    One thread at a time: until the block ends, the hidden packages cannot be imported (see `full_imports`).
    """
    with _importing:
        if "diffusers.loaders" in sys.modules or "transformers" in sys.modules:
            yield  # already paid for, by a test or by a program that uses sdcli as a library
            return
        hidden = _hide()
        try:
            yield
        finally:
            _show(hidden)


@contextlib.contextmanager
def _ordinary_imports() -> Iterator[None]:
    """A block in which diffusers imports whatever it wants, without its warnings."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    yield


@contextlib.contextmanager
def full_imports() -> Iterator[None]:
    """A block that may import transformers, scipy or peft: it waits until no other thread hides them."""
    with _importing:
        yield


@dataclass
class _Hidden:
    modules: dict[str, Any]
    """By name; None where the module was not imported yet."""
    hub_names: list[str]
    """Names that huggingface_hub did not have yet."""
    availability: dict[str, bool]
    """By the name of diffusers' variable."""


def _hide() -> _Hidden:
    import huggingface_hub

    deferred = [name for name in _DEFERRED if name not in sys.modules]
    modules: dict[str, Any] = {name: sys.modules.get(name) for name in (*_ABSENT, "torch._dynamo", *deferred)}
    hidden = _Hidden(modules, [name for name in _DEFERRED_OF_HUB if name not in vars(huggingface_hub)], {})
    try:
        if modules["torch._dynamo"] is None:
            sys.modules["torch._dynamo"] = _dynamo_stand_in()
        sys.modules.update({name: DeferredModule(name) for name in deferred})
        for name in hidden.hub_names:
            setattr(huggingface_hub, name, DeferredName("huggingface_hub", name))
        with _deferred_distributions():
            import diffusers
            from diffusers.utils import import_utils

        diffusers.utils.logging.set_verbosity_error()
        hidden.availability = {
            name: True
            for name, value in vars(import_utils).items()
            if name.endswith("_available") and value is True and name[1 : -len("_available")] not in _NEEDED
        }
        for name in hidden.availability:
            setattr(import_utils, name, False)
        for name in _ABSENT:
            sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say "not installed"
        for name in _EAGER_PACKAGES:
            sys.modules[name] = _package_without_init(name, diffusers.__path__[0])
    except BaseException:
        _show(hidden)
        raise
    return hidden


def _show(hidden: _Hidden) -> None:
    import huggingface_hub

    for name, module in hidden.modules.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module
    for name in hidden.hub_names:
        delattr(huggingface_hub, name)
    if hidden.availability:
        from diffusers.utils import import_utils

        for name, available in hidden.availability.items():
            setattr(import_utils, name, available)
    for name in (*_EAGER_PACKAGES, "diffusers.loaders", *_PIPELINES_LORA):
        sys.modules.pop(name, None)


@contextlib.contextmanager
def _deferred_distributions() -> Iterator[None]:
    """A block in which the package of every installed file is not looked up; diffusers does so at import."""
    real = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = DeferredDistributions
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = real


def _package_without_init(name: str, root: str) -> types.ModuleType:
    package = types.ModuleType(name)
    package.__path__ = [os.path.join(root, *name.split(".")[1:])]
    return package


def _dynamo_stand_in() -> types.ModuleType:
    """The two names that diffusers decorates with at import; they matter to torch.compile alone."""

    def unchanged(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
        return function if function is not None else unchanged

    module: Any = types.ModuleType("torch._dynamo")
    module.__path__ = []
    module.allow_in_graph = module.disable = unchanged
    return module


def _forget_diffusers(error: Exception) -> None:
    """Drop what was imported of diffusers before the error, for another attempt with the ordinary imports."""
    for name in [name for name in sys.modules if name == "diffusers" or name.startswith("diffusers.")]:
        del sys.modules[name]
    reason = (str(error).splitlines() or [type(error).__name__])[-1]
    print(
        f"sdcli: note: diffusers cannot be imported in the quick way, so the start is slower: {reason}", file=sys.stderr
    )


def _scale_lora_layers_lazily() -> None:
    """Spare the import of peft, and with it of transformers, where nothing is to be scaled.

    diffusers imports it in every forward pass, to multiply all LoRA layers by a scale that is 1 if none was given.
    """
    from diffusers.utils import peft_utils

    def unless_one(scale: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(scale)
        def scaled(model: Any, weight: float | None = None) -> None:
            if weight != 1.0:
                scale(model, weight)

        return scaled

    for name in ("scale_lora_layers", "unscale_lora_layers"):
        setattr(peft_utils, name, unless_one(getattr(peft_utils, name)))


import torch  # noqa: E402  (torch first: it must not be imported inside the block)

for attempt in (lean_imports, _ordinary_imports):
    try:
        with attempt():
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
            from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
            from diffusers.models.controlnets.controlnet import ControlNetModel
            from diffusers.models.unets.unet_2d import UNet2DModel
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        break
    except Exception as error:
        if attempt is not lean_imports:
            raise
        _forget_diffusers(error)

_scale_lora_layers_lazily()

UNet = UNet2DConditionModel | UNet2DModel
VAE = AutoencoderKL | AutoencoderTiny

__all__ = [
    "VAE",
    "AutoencoderKL",
    "AutoencoderTiny",
    "ControlNetModel",
    "UNet",
    "UNet2DConditionModel",
    "UNet2DModel",
    "full_imports",
    "lean_imports",
    "torch",
]
