"""Few-step presets, the `fast` entries of models.yaml: a scheduler, steps and a guidance scale that go together.

Most have a LoRA with which the model was distilled (LCM-LoRA, Lightning, Hyper-SD, DMD2); models that are distilled
themselves need none. `fast: true` in a request stands for the fields that a preset sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from sdcli.models.families.family import Family
from sdcli.models.sources import FileSource, HubFile, Strict
from sdcli.request.fields import MAX_LORA_WEIGHT, LoraRef
from sdcli.request.schedulers import SCHEDULERS, TRAINED
from sdcli.request.schema import GenerationRequest, did_you_mean


def _known_scheduler(name: str) -> str:
    if name not in SCHEDULERS:
        raise ValueError(f"no scheduler {name!r}{did_you_mean(name, SCHEDULERS)}")
    return name


class PresetLora(Strict):
    """The LoRA of a preset: a file of the hub, or one on this machine, whose path counts from the models file."""

    source: Annotated[HubFile | FileSource, Field(discriminator="kind")]
    weight: float = Field(1.0, gt=0, le=MAX_LORA_WEIGHT, allow_inf_nan=False)
    download_bytes: int = Field(0, ge=0)

    @property
    def size(self) -> str:
        """Its size in parentheses, for the end of a sentence; empty if it is not known."""
        return f" ({round(self.download_bytes / 1e6)} MB)" if self.download_bytes else ""

    @property
    def ref(self) -> LoraRef:
        """The LoRA as an entry of a request."""
        path = self.source.spelled if isinstance(self.source, HubFile) else str(self.source.path)
        return LoraRef(path=path, unet_weight=self.weight, text_weight=self.weight)


class FastPreset(Strict):
    """What `--fast` sets together. `most_steps` is how many the distillation is for; default: `steps`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]{0,63}$")
    scheduler: Annotated[str, AfterValidator(_known_scheduler)]
    steps: int = Field(ge=1, le=50)
    most_steps: int = Field(0, ge=0, le=50)
    guidance_scale: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    lora: PresetLora | None = None
    license: str = "unknown"

    @model_validator(mode="before")
    @classmethod
    def _most_steps(cls, value: Any) -> Any:
        return {"most_steps": value.get("steps"), **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.most_steps < self.steps:
            raise ValueError(f"most_steps: should be at least the steps, {self.steps}, not {self.most_steps}")
        return self

    def fields(self) -> dict[str, Any]:
        """The fields of a request that it sets, but for the LoRA, which goes before the request's own."""
        return {"steps": self.steps, "guidance_scale": self.guidance_scale, "scheduler": self.scheduler}

    def is_in(self, request: GenerationRequest) -> bool:
        """Whether a resolved request is one of the preset: it names its LoRA, or has the settings of one without."""
        if self.lora is not None:
            return any(one.path == self.lora.ref.path for one in request.loras)
        same = (request.scheduler, request.guidance_scale) == (self.scheduler, self.guidance_scale)
        return same and (request.steps or 0) <= self.most_steps

    def problem_with(self, family: Family) -> str | None:
        """What is wrong with it for models of a family."""
        if SCHEDULERS[self.scheduler].process != family.process:
            trained = TRAINED[family.process]
            return f"fast.scheduler: the {self.scheduler} scheduler does not go with a model trained {trained}"
        if self.lora is not None and "loras" in family.refuses:
            return f"fast.lora: models of the {family.name} family take no LoRAs yet"
        return None

    def with_source(self, change: Callable[[HubFile | FileSource], HubFile | FileSource]) -> FastPreset:
        """The preset with another source of its LoRA."""
        if self.lora is None:
            return self
        lora = self.lora.model_copy(update={"source": change(self.lora.source)})
        return self.model_copy(update={"lora": lora})
