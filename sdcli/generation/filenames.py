"""File names from templates: safe on Linux, macOS and Windows, and never outside the output folder."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from sdcli.errors import UsageError
from sdcli.generation.settings import DEFAULT_TEMPLATE, OutputSettings
from sdcli.images.formats import FORMAT_OF, SUFFIX_OF, ImageFormat
from sdcli.io.files import check_folder, check_new, expanded
from sdcli.request.schema import did_you_mean

if TYPE_CHECKING:
    from sdcli.generation.resolve.jobs import ResolvedJob

FIELDS = ("index", "seed", "prompt", "model", "width", "height", "steps", "guidance_scale", "scheduler", "custom_id")
MAX_PROMPT_BYTES = 80
MAX_NAME_BYTES = 200
OTHER_FORMATS = {
    ".apng", ".avi", ".avif", ".bmp", ".dds", ".exr", ".gif", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jfif",
    ".jp2", ".jpe", ".json", ".jsonl", ".jxl", ".mkv", ".mov", ".mp4", ".npy", ".npz", ".pbm", ".pdf", ".pgm",
    ".pnm", ".ppm", ".psd", ".safetensors", ".svg", ".tga", ".tif", ".tiff", ".txt", ".webm", ".xcf",
}  # fmt: skip
"""Suffixes of files that people know and that are not written here; any other is part of the name, as in `v1.5`."""
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def output_settings(output: str | None, outdir: Path | None, image_format: ImageFormat | None) -> OutputSettings:
    """Folder, name and form. -o's own folder part counts from here, as for any tool; with --outdir it stays in that.

    Raises UsageError.
    """
    if output == "-":
        raise UsageError("-o - would mean stdout, where only the names of files are printed; name a file")
    if output is not None and (output.endswith("/") or output.rpartition("/")[2] in ("", ".", "..")):
        raise UsageError(f"-o {output!r} names a folder, not a file; --outdir names the folder of the images")
    template = output or DEFAULT_TEMPLATE
    if output is not None and outdir is None:
        fixed = output.partition("{")[0]
        cut = max(fixed.rfind("/") + 1, 0)
        outdir, template = expanded(output[:cut] or "."), output[cut:]
    check_template(template)
    suffix = Path(template).suffix.lower()
    named = FORMAT_OF.get(suffix)
    if suffix in OTHER_FORMATS:
        raise UsageError(f"-o names a {suffix} file, but images are written as {', '.join(FORMAT_OF)}")
    if named is not None and image_format is not None and named != image_format:
        raise UsageError(f"-o names a {named} file, --format asks for {image_format}")
    folder = outdir if outdir is not None else OutputSettings.outdir
    chosen: Any = image_format or named or "png"
    return OutputSettings(outdir=folder, template=template, format=chosen)


def check_output(output: OutputSettings) -> None:
    """Raise CannotWrite or AlreadyExists now for what would fail after minutes of generating."""
    check_folder(output.outdir)
    for path in known_paths(output):
        check_new(path, overwrite=output.overwrite)


def known_paths(output: OutputSettings) -> list[Path]:
    """The files that will be written, as far as their names are known beforehand."""
    if not is_literal(output.template):
        return []
    image = output.outdir / image_name(output.template, {}, suffix=SUFFIX_OF[output.format])
    return [image, *output.beside(image)]


def check_template(template: str) -> None:
    """Raise UsageError for a template that names unknown fields, leaves its folder, or is not a file name."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"the output template {template!r} is not well formed: {error}") from None
    for _, field, spec, conversion in pieces:
        if field is not None and (field not in FIELDS or conversion or "{" in (spec or "")):
            hint = did_you_mean(field, FIELDS) or f"; fields: {', '.join(FIELDS)}"
            raise UsageError(f"the output template {template!r} has no field {{{field}}}{hint}")
    if not template or template.endswith("/"):
        raise UsageError(f"the output template {template!r} ends in a folder, not in a file name")
    odd = next((letter for letter in template if letter < " " or letter in "\\\x7f"), None)
    if odd is not None:
        raise UsageError(f"the output template {template!r} has a {odd!r}, which no file name here may have")
    _check_inside(template, template)


def is_literal(template: str) -> bool:
    """Whether a template names one file, having no fields."""
    return all(field is None for _, field, _, _ in string.Formatter().parse(template))


def name_of(job: ResolvedJob, output: OutputSettings) -> PurePosixPath:
    """The relative path of a job's image, where it is free. Raises UsageError for one that cannot be made."""
    request = job.request
    width, height = request.final_size
    fields = {
        "index": job.index,
        "seed": request.seed,
        "prompt": request.prompt,
        "model": request.model,
        "width": width,
        "height": height,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "scheduler": request.scheduler,
        "custom_id": job.custom_id or "none",
    }
    return image_name(output.template, fields, suffix=SUFFIX_OF[output.format])


def check_distinct_names(jobs: Iterable[ResolvedJob], output: OutputSettings) -> None:
    """Raise UsageError where two jobs would write one file, which only a run that writes both can number.

    A template whose file names begin with the index needs no look at the jobs; of another one every name is looked at.
    """
    if begins_with_index(output.template):
        return
    seen: dict[int, int] = {}
    for job in jobs:
        name = str(name_of(job, output)).casefold()
        first = seen.setdefault(hash(name), job.index)
        if first != job.index:
            raise UsageError(
                f"images {first} and {job.index} would both be {name}; where a run is divided, each needs its own "
                "name: put {index} into the template, as in -o '{index:05}-{prompt}'"
            )


def begins_with_index(template: str) -> bool:
    """Whether the names of a template differ for all jobs, as the file name begins with the index."""
    return _BEGINS_WITH_INDEX.match(template.rpartition("/")[2]) is not None


_BEGINS_WITH_INDEX = re.compile(r"\{index(?::0?\d*d?)?\}(?:$|\{\{|\}\}|[^\d{}])")
"""Whatever follows, the digits at the beginning of such a name tell its job from all others."""


def image_name(template: str, fields: Mapping[str, Any], *, suffix: str) -> PurePosixPath:
    """A relative path for an image; `suffix` (".png") is added unless the template has it.

    Raises UsageError where the path would leave the output folder.
    """
    named = _fields_of(template)  # of a run of millions, no other texts are made fit for names
    safe = {name: slug(value) if isinstance(value, str) else value for name, value in fields.items() if name in named}
    try:
        rendered = template.format_map(safe)
    except (ValueError, TypeError) as error:
        raise UsageError(f"the output template {template!r} does not fit: {error}") from None
    _check_inside(rendered, template)
    parts = PurePosixPath(rendered).parts if _is_path(rendered) else (rendered,)
    *folders, name = (_portable(part) for part in parts)
    dot = name.rfind(".")
    if FORMAT_OF.get(name[dot:].lower() if dot > 0 else "") == FORMAT_OF[suffix]:
        name, suffix = name[: name.rindex(".")], name[name.rindex(".") :]
    return PurePosixPath(*folders, _cut(name, MAX_NAME_BYTES) + suffix)


def slug(text: str) -> str:
    """Words of a prompt as part of a file name: letters and digits of any script, joined by dashes, cut by bytes."""
    words = re.findall(r"\w+", unicodedata.normalize("NFC", text.lower()))
    return _cut("-".join(words), MAX_PROMPT_BYTES).strip("-_") or "picture"


@cache
def _fields_of(template: str) -> frozenset[str]:
    return frozenset(field for _, field, _, _ in string.Formatter().parse(template) if field is not None)


def _is_path(rendered: str) -> bool:
    """Whether a name is more than one part, or a special one; looked at for each image, so without pathlib."""
    return not rendered.strip(".") or any(letter in rendered for letter in "/\\:")


def _check_inside(path: str, template: str) -> None:
    if not _is_path(path):
        return
    parts = PureWindowsPath(path).parts  # knows both kinds of slashes, and drives
    if PureWindowsPath(path).anchor or path.startswith("/") or ".." in parts:
        raise UsageError(f"the output template {template!r} leaves the output folder")


def _portable(part: str) -> str:
    part = re.sub(r'[<>:"|?*\\\x00-\x1f]', "-", part).rstrip(". ") or "picture"
    return f"_{part}" if part.split(".")[0].lower() in _RESERVED else part


def _cut(text: str, size: int) -> str:
    """The text with at most so many bytes in UTF-8; bytes that are no UTF-8 in a typed name count as one each."""
    while len(text.encode(errors="surrogateescape")) > size:
        text = text[:-1]
    return text
