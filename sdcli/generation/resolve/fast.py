"""`fast` in a request: replaced by the fields that the model's few-step preset sets."""

from __future__ import annotations

from sdcli.errors import Offline, UsageError
from sdcli.models.hub.cache import cache_folder, cached_file
from sdcli.models.registry import ModelSpec
from sdcli.models.sources import HubFile
from sdcli.request.schema import GenerationRequest


def with_fast_preset(request: GenerationRequest, spec: ModelSpec) -> GenerationRequest:
    """The request with the preset's scheduler, steps and guidance scale, where it gives none, and with its LoRA.

    What is returned says all that the image needs, so `fast` is None in it. Raises UsageError for a model without a
    preset and for fields that make no sense with it, and Offline for a LoRA of the hub that is not in the cache.
    """
    if not request.fast:
        return request if request.fast is None else request.model_copy(update={"fast": None})
    preset = spec.fast
    if preset is None:
        raise UsageError(
            f"--fast: {spec.name} has no few-step preset (no `fast` entry in the models file); "
            "`sdcli models list` shows the models that have one"
        )
    if request.steps is not None and request.steps > preset.most_steps:
        made_for = f"{preset.most_steps} steps at most" if preset.most_steps > 1 else "a single step"
        raise UsageError(f"--fast: {preset.name} was made for {made_for}, not {request.steps}; omit --steps or --fast")
    if request.refiner is not None:
        raise UsageError(f"--fast: {preset.name} does not go with a refiner, which was not made for few steps")
    if request.reuse is not None and request.reuse > 1:
        raise UsageError(f"--fast: {preset.name} does not go with reuse: its few steps are all needed whole")
    values = {name: value for name, value in preset.fields().items() if getattr(request, name) is None}
    loras = request.loras
    if preset.lora is not None:
        ref, source = preset.lora.ref, preset.lora.source
        if any(one.path == ref.path for one in loras):
            raise UsageError(f"--fast adds the LoRA {ref.path} itself; omit it, or --fast")
        if isinstance(source, HubFile) and not cached_file(source).is_file():
            raise Offline(
                f"the LoRA of --fast, {preset.name}, is not in the cache {cache_folder()}; "
                f"run `sdcli models pull {spec.name} --fast`{preset.lora.size}"
            )
        loras = (ref, *loras)
    return request.model_copy(update={**values, "loras": loras, "fast": None})
