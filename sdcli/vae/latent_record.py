"""The record in a latent file: which image it was encoded from, and how. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sdcli.images.formats import Fit


class _Frozen(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class Source(_Frozen):
    """The image that a latent was encoded from. Sizes are pixels; the fitted size is what the VAE saw."""

    name: str
    sha256: str
    width: int
    height: int
    fitted_width: int
    fitted_height: int
    fit: Fit
    fallbacks: tuple[str, ...] = ()


class LatentRecord(_Frozen):
    """The record of how a latent file was made."""

    schema_version: Literal[1] = Field(1, alias="schema")
    kind: Literal["latents"] = "latents"
    model: str
    vae: str
    """The identity of the VAE's weights: `sha256:...` or `random:...`."""
    scaling_factor: float = Field(gt=0)
    scaled: bool = False
    """Whether the numbers are multiplied by the scaling factor; those that sdcli writes are not."""
    sample: Literal["mean", "sample"]
    seed: int | None = None
    size: tuple[int, int] | None = None
    """The requested size; None if every image kept its own."""
    dtype: str = "float32"
    """The dtype that the VAE computed in."""
    stored: Literal["float32", "float16"] = "float32"
    """The dtype of the stored tensor."""
    source: tuple[Source, ...]
