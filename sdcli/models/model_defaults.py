"""The defaults of a model: the values of a request's fields that it leaves open, from models.yaml or its own folder."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from sdcli.errors import UsageError
from sdcli.models.families.family import ModelKind
from sdcli.models.layout import ModelFolder
from sdcli.models.sources import Strict
from sdcli.request.fields import with_prompt
from sdcli.request.schema import first_problem, parse_request


class ModelDefaults(Strict):
    """The values of a request's fields that are left open."""

    width: int = Field(512, ge=8, le=8192)
    height: int = Field(512, ge=8, le=8192)
    steps: int = Field(25, ge=1, le=1000)
    guidance_scale: float = Field(7.5, ge=0, le=100, allow_inf_nan=False)
    scheduler: str = "dpmpp-2m-karras"
    prompt_template: Annotated[str, AfterValidator(with_prompt)] = "{prompt}"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def usual_defaults(folder: ModelFolder) -> dict[str, Any]:
    """What suits a folder that has no sdcli.json: the size it was trained on, and the habits of its family."""
    family, size = folder.family, folder.size
    if size is None and not family.reads_text:
        size = (folder.kind.size_step * 8,) * 2
    return {**family.defaults, **(dict(zip(("width", "height"), size, strict=True)) if size is not None else {})}


def own_defaults(folder: ModelFolder) -> dict[str, Any]:
    """The defaults in a folder's sdcli.json, checked as those of models.yaml are. Raises UsageError."""
    try:
        checked = ModelDefaults.model_validate(folder.defaults).model_dump(exclude_unset=True)
        parse_request({name: value for name, value in checked.items() if name != "dtype"})
    except ValidationError as error:
        raise UsageError(f"{folder.defaults_file}: defaults.{first_problem(error)}") from None
    except UsageError as error:
        raise UsageError(f"{folder.defaults_file}: defaults.{error}") from None
    for side in {"width", "height"} & set(checked):
        problem = size_problem(checked[side], folder.kind)
        if problem is not None:
            raise UsageError(f"{folder.defaults_file}: defaults.{side}: {problem}")
    return checked


def size_problem(side: int, kind: ModelKind) -> str | None:
    """What is wrong with a width or height for a kind of model."""
    if side < kind.smallest_size:
        return f"should be greater than or equal to {kind.smallest_size}, not {side}"
    if side % kind.size_step:
        return f"should be a multiple of {kind.size_step}, not {side}"
    return None
