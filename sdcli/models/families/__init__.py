"""The model families: one module, and one frozen `Family`, for each; FAMILIES is the only table of them.

Start with family.py, the type, then read sd1.py. A new family is a new module and a new row of the table (see "Adding
a family" in CONTRIBUTING.md). Outside this folder no code asks which family a model is. At import nothing here loads
torch, because the registry reads these values to describe models.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdcli.errors import BadWeights, SdcliError, UsageError
from sdcli.io.weight_files import check_header
from sdcli.io.weight_kinds import LORA, WHOLE_MODEL, kind_of
from sdcli.models.families.class_conditional import CLASS_CONDITIONAL
from sdcli.models.families.family import PART_NAMES, Configs, Family, ModelKind, SingleFile
from sdcli.models.families.flux import FLUX
from sdcli.models.families.sd1 import SD1
from sdcli.models.families.sd2 import SD2
from sdcli.models.families.sd3 import SD3
from sdcli.models.families.sdxl import SDXL
from sdcli.models.families.unconditional import UNCONDITIONAL
from sdcli.request.schema import did_you_mean

FAMILIES: dict[str, Family] = {
    family.name: family for family in (SD1, SD2, SDXL, SD3, FLUX, UNCONDITIONAL, CLASS_CONDITIONAL)
}
DEFAULT_FAMILY = SD1


def family_named(name: Any) -> Family:
    """The family that models.yaml calls so. Raises ValueError."""
    if isinstance(name, Family):
        return name
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ValueError(f"no family {name!r}{did_you_mean(str(name), FAMILIES)}; there are {', '.join(FAMILIES)}")
    return family


copyreg.pickle(Family, lambda family: (family_named, (family.name,)))  # another process has the same table


def pipelines() -> dict[str, list[Family]]:
    """The pipeline classes of model_index.json -> the families whose models have it."""
    found: dict[str, list[Family]] = {}
    for family in FAMILIES.values():
        for pipeline in family.pipelines:
            found.setdefault(pipeline, []).append(family)
    return found


def family_of(pipeline: str, denoiser: Mapping[str, Any], *, preferred: Family) -> Family:
    """The family of a folder: the preferred one, if it fits, or the first that does."""
    candidates = [family for family in pipelines()[pipeline] if family.claims(denoiser)]
    return preferred if preferred in candidates else candidates[0]


def family_from_scratch(*, reads_text: bool, has_classes: bool = False) -> Family:
    """The family of a new model for `train-unet --from-scratch`."""
    return next(
        family
        for family in FAMILIES.values()
        if family.supported and family.reads_text == reads_text and family.takes_prompt == (reads_text or has_classes)
    )


def family_with_recipe(architecture: str) -> Family:
    """The family that can make such random weights. Raises ValueError."""
    family = next((family for family in FAMILIES.values() if architecture in family.recipes), None)
    if family is None:
        known = [name for family in FAMILIES.values() for name in family.recipes]
        raise ValueError(f"no architecture {architecture!r} for random weights (there are {', '.join(known)})")
    return family


def single_file_of(names: Iterable[str]) -> tuple[Family, SingleFile]:
    """What a single file with tensors of these names is; Stable Diffusion 1.x where no family recognises them."""
    names = tuple(names)
    for family in FAMILIES.values():
        for layout in family.single_files:
            if any(name.startswith(layout.marks) for name in names if layout.marks):
                return family, layout
    return DEFAULT_FAMILY, DEFAULT_FAMILY.single_files[0]


@dataclass(frozen=True)
class FoundFile:
    """What the header of a single file says about the model in it."""

    family: Family
    layout: SingleFile
    channels: int | None
    """How many channels its denoiser takes; None where the file does not say."""
    problem: SdcliError | None
    """Why it cannot be generated with."""

    def kind(self) -> ModelKind:
        """The facts of the model that the header decides."""
        return self.family.kind if self.problem is not None else self._described()

    def _described(self) -> ModelKind:
        configs = self.layout.configs()
        own = {"in_channels": self.channels} if self.channels is not None else {}
        return self.family.describe(Configs({**configs["unet"], **own}, configs.get("vae"), None, "the file"))


def single_file_in(path: Path) -> FoundFile | None:
    """What a .safetensors file is; None for a file that is damaged or no such, which loading reports."""
    try:
        status = path.stat()
        return _single_file_in(path, status.st_mtime_ns, status.st_size)
    except (OSError, BadWeights):
        return None


@lru_cache(maxsize=8)
def _single_file_in(path: Path, changed: int, size: int) -> FoundFile:
    header = check_header(path)
    family, layout = single_file_of(header)
    found = FoundFile(family, layout, _channels(header, layout), None)
    try:
        check_single_file(path, header)
        found._described()
    except UsageError as error:
        return replace(found, problem=UsageError(str(error).replace("the file:", f"{path}:", 1)))
    except BadWeights as error:
        return replace(found, problem=error)
    return found


def _channels(header: Mapping[str, Any], layout: SingleFile) -> int | None:
    """The channels that the first convolution of the denoiser takes."""
    shape = header.get(f"{layout.prefixes['unet']}{layout.first_convolution}", {}).get("shape", [])
    return shape[1] if len(shape) == 4 else None


def check_single_file(path: Path, header: Mapping[str, Any]) -> None:
    """Raise BadWeights or UsageError for a file that is not a whole model, each kind of it with its own sentence."""
    names = [name for name in header if name != "__metadata__"]
    _, layout = single_file_of(names)
    for family in FAMILIES.values():
        for start, sentence in family.refused_files.items():
            if any(name.startswith(start) for name in names):
                raise UsageError(sentence.format(file=path))
    kind = kind_of(header)
    missing = [part for part, prefix in layout.prefixes.items() if not any(name.startswith(prefix) for name in names)]
    if missing and kind is not None and (len(missing) > 1 or kind.use) and kind is not WHOLE_MODEL:
        raise BadWeights(kind.sentence(path, wanted="a whole model"))
    if kind is not None and kind is LORA:
        raise BadWeights(kind.sentence(path, wanted="a whole model"))
    for part in missing:
        lacking = f"{PART_NAMES[part]} (no weights named {layout.prefixes[part]}*)"
        raise BadWeights(f"{path} has no {lacking}; it is not a whole {layout.title} checkpoint")
