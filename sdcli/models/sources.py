"""Where a model may come from: the `source` of an entry of models.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


class Strict(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")


def _known_architecture(name: str) -> str:
    from sdcli.models.families import family_with_recipe

    family_with_recipe(name)
    return name


class EmbeddedSource(Strict):
    """A diffusers folder inside the package."""

    kind: Literal["embedded"]
    folder: str


class RandomSource(Strict):
    """Random weights, made in memory from a seed: no files, no network."""

    kind: Literal["random"]
    architecture: Annotated[str, AfterValidator(_known_architecture)]
    """A recipe of one of the families."""
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


HUB_PREFIX = "hub:"
_HUB_FILE = re.compile(r"hub:([A-Za-z0-9][\w.-]*/[\w.-]+)/([^@]+?)(?:@(.+))?")


class HubFile(Strict):
    """One safetensors file of a repository on the Hugging Face hub, such as a LoRA."""

    kind: Literal["hub"] = "hub"
    repo: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
    file: str = Field(pattern=r"^(?:[\w-][\w.-]*/)*[\w-][\w.-]*\.safetensors$")
    revision: str = "main"

    @classmethod
    def of(cls, text: str) -> Self | None:
        """From `hub:owner/name/file.safetensors[@revision]`; None for a text that is not spelled so."""
        match = _HUB_FILE.fullmatch(text)
        try:
            return match and cls(repo=match[1], file=match[2], revision=match[3] or "main")
        except ValidationError:
            return None

    @property
    def spelled(self) -> str:
        """How a request names it."""
        return f"{HUB_PREFIX}{self.repo}/{self.file}{'' if self.revision == 'main' else f'@{self.revision}'}"

    @property
    def source(self) -> HubSource:
        """Its repository."""
        return HubSource(kind="hub", repo=self.repo, revision=self.revision)


Source = Annotated[EmbeddedSource | RandomSource | FolderSource | FileSource | HubSource, Field(discriminator="kind")]
