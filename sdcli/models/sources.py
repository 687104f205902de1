"""Where a model may come from: the `source` of an entry of models.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")


class EmbeddedSource(Strict):
    """A diffusers folder inside the package."""

    kind: Literal["embedded"]
    folder: str


class RandomSource(Strict):
    """Random weights, made in memory from a seed: no files, no network."""

    kind: Literal["random"]
    architecture: Literal["tiny", "tiny-sdxl", "sd15", "sdxl"]
    seed: int = Field(0, ge=0)


class FolderSource(Strict):
    """A diffusers folder (model_index.json and its sub-folders)."""

    kind: Literal["folder"]
    path: Path


class FileSource(Strict):
    """A single .safetensors checkpoint with the original LDM keys."""

    kind: Literal["file"]
    path: Path


class HubSource(Strict):
    """A diffusers repository on the Hugging Face hub."""

    kind: Literal["hub"]
    repo: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
    revision: str = "main"
    variant: str | None = None


Source = Annotated[EmbeddedSource | RandomSource | FolderSource | FileSource | HubSource, Field(discriminator="kind")]
