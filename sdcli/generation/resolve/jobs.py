"""Lines of a prompts file and typed options -> resolved jobs, one for each image; a bad line gives a `BadJob`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sdcli.errors import SdcliError, UsageError
from sdcli.generation.resolve.inputs import Measure, find_loras
from sdcli.generation.resolve.resolve import resolve
from sdcli.models.registry import ControlNetSpec, ModelSpec, Registry
from sdcli.models.weight_digests import weights_digest
from sdcli.request.jobs import DYNAMIC, Line, Occurrences, derived_seed
from sdcli.request.prompt_options import whole_count
from sdcli.request.replaced import given_fields
from sdcli.request.schema import MAX_SEED, GenerationRequest, ResolvedRequest, parse_request
from sdcli.request.wildcards import Wildcards


@dataclass(frozen=True)
class ResolvedJob:
    """One image to generate, and the models that it takes, looked up once. `index` counts from 1 over the whole run."""

    index: int
    request: ResolvedRequest
    model: ModelSpec
    refiner: ModelSpec | None = None
    controlnets: Mapping[str, ControlNetSpec] = field(default_factory=dict)
    """By the names that the request's `controls` have for them."""
    custom_id: str | None = None
    line: int | None = None
    """The line of the prompts file that it is from."""

    def key(self, digest: Callable[[ModelSpec | ControlNetSpec], str] = weights_digest) -> str:
        """64 hex digits that are equal for equal requests with equal weights, as they are on the disk now.

        The request itself has the digests of its LoRAs, IP-Adapters, embeddings and images. Reads files: `digest`
        may remember those of many jobs. Raises what `weights_digest` raises.
        """
        controlnets = [self.controlnets[name] for name in sorted(self.controlnets)]
        specs: list[ModelSpec | ControlNetSpec] = [
            self.model,
            *([self.refiner] if self.refiner is not None else []),
            *controlnets,
        ]
        return hashlib.sha256(" ".join([self.request.key(), *map(digest, specs)]).encode()).hexdigest()

    @classmethod
    def of(cls, index: int, request: ResolvedRequest, registry: Registry) -> ResolvedJob:
        """A request that is already resolved, with the models that it names. Raises what finding them raises."""
        return cls(
            index,
            request,
            model=registry.find(request.model),
            refiner=None if request.refiner is None else registry.find(request.refiner),
            controlnets={one.model: registry.find_controlnet(one.model) for one in request.controls},
        )


def key_of(job: ResolvedJob, digest: Callable[[ModelSpec | ControlNetSpec], str] = weights_digest) -> str | None:
    """The key of a job; None where its weights are missing or damaged, which loading them will report."""
    try:
        return job.key(digest)
    except SdcliError:
        return None


@dataclass(frozen=True)
class BadJob:
    """An entry that cannot be generated, and the error that says why."""

    index: int
    error: SdcliError
    custom_id: str | None = None
    line: int | None = None


def expand(
    lines: Iterable[Line],
    typed: Mapping[str, Any],
    registry: Registry,
    *,
    num_images: int,
    base_seed: int,
    measure: Measure | None = None,
    lora_dir: Path | None = None,
    wildcards: Wildcards | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> Iterator[ResolvedJob | BadJob]:
    """Lines -> resolved jobs. A line's own fields win over the `typed` options, and these over the fields `recorded` in
    an image, with all that belongs to what they replace; each image gets its own seed.

    Of images with a variation strength each gets its own variation seed instead. LoRAs that are named, not given as
    files, are those of `lora_dir`, or of the user's own folder. With `wildcards` the choices in the prompts of each
    image are made by its seed.

    The seed of a line without one is derived from `base_seed`, the line's content and how often it occurred, so that
    the same file gets the same seeds again when it was reordered or extended in between.
    """
    find, find_controlnet = cache(registry.find), cache(registry.find_controlnet)
    seen = Occurrences()
    index = 0
    for line in lines:
        fields = dict(line.fields)
        custom_id = fields.pop("custom_id", None)
        custom_id = None if custom_id is None else str(custom_id)
        try:
            if line.problem is not None:
                raise UsageError(line.problem)
            count = _count(fields, num_images)
            given = given_fields(fields, typed, recorded or {})
            request = parse_request(given)
            spec = find(request.model)
            if given.get("prompt") is None and spec.family.takes_prompt:
                raise UsageError("has no prompt")
            spec.require_supported()
            refiner = None if request.refiner is None else find(request.refiner)
            if refiner is not None:
                refiner.require_supported()
            controlnets = {control.model: find_controlnet(control.model) for control in request.controls}
            seeds = _seeds(request, base_seed, seen)
            counted = list(seeds)[-1]
            if seeds[counted] + count - 1 > MAX_SEED:
                first = seeds[counted]
                raise UsageError(f"{counted}: {count} images from seed {first} pass the largest seed, {MAX_SEED}")
            each = [{**seeds, counted: seeds[counted] + offset} for offset in range(count)]
            if wildcards is None:
                resolved = find_loras(resolve(request.changed(**seeds), spec, measure=measure), lora_dir)
                images = [resolved.model_copy(update=own) for own in each]
            else:
                chosen = [request.changed(**own, **_texts(request, wildcards, seed=own["seed"])) for own in each]
                images = [find_loras(resolve(one, spec, measure=measure), lora_dir) for one in chosen]
        except SdcliError as error:
            index += 1
            prefix = f"line {line.number}: " if line.number else ""
            yield BadJob(index, type(error)(f"{prefix}{error}"), custom_id, line.number or None)
            continue
        for image in images:
            index += 1
            yield ResolvedJob(index, image, spec, refiner, controlnets, custom_id, line.number or None)


def _seeds(request: GenerationRequest, base_seed: int, seen: Occurrences) -> dict[str, int]:
    """The seed of a request, and its variation seed where it varies; those that it leaves open are derived."""
    given = {"seed": request.seed}
    if request.variation_strength is not None:
        given["variation_seed"] = request.variation_seed
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) == len(given):
        return found
    key = request.key()
    occurrence = seen.add(key)
    derived = {"seed": key, "variation_seed": f"{key}:variation"}
    return {name: found.get(name, derived_seed(base_seed, derived[name], occurrence)) for name in given}


def _texts(request: GenerationRequest, wildcards: Wildcards, *, seed: int) -> dict[str, str]:
    """The prompts of one image with their choices made by its seed."""
    texts = {name: text for name in DYNAMIC if (text := getattr(request, name))}
    return {name: wildcards.choose(text, seed=seed, purpose=name) for name, text in texts.items()}


def _count(fields: dict[str, Any], typed: int) -> int:
    """Take the number of images out of a line's fields; without one it is the typed number. Raises UsageError."""
    given = [fields.pop(name) for name in ("num_images", "n") if name in fields]
    if len(given) > 1:
        raise UsageError("num_images is given twice")
    return typed if not given or given[0] is None else whole_count("num_images", given[0])
