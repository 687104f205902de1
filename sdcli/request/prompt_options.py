"""Settings as other tools write them in prompts files: A1111's and kohya's options, and their names of fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sdcli.errors import UsageError
from sdcli.request.schedulers import scheduler_of
from sdcli.request.schema import field_name, is_list

KOHYA = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "guidance_scale",
    "ss": "sampler_name",
    "t": "strength",
}
"""kohya's short options of a prompt line (`a cat --n dog --s 20`)."""
_KOHYA_REFUSED = {
    "nl": "a guidance scale of the negative prompt is not supported",
    "g": "a guidance scale of its own, for FLUX, is not supported; --l is the guidance scale",
    "c": "a prompt for CLIP guidance is not supported",
    "am": "weights of LoRAs are given as <lora:NAME:WEIGHT> in the prompt",
    "f": "names of files are given by -o, as a template",
    "cn": "a ControlNet is given by --control MODEL=IMAGE",
    **dict.fromkeys(("ow", "oh", "nw", "nh", "ct", "cl"), "the sizes of SDXL's conditioning are not settable"),
    **dict.fromkeys(("dsd1", "dst1", "dsd2", "dst2", "dsr"), "Deep Shrink is not supported"),
    **dict.fromkeys(("glt", "glr", "gle", "gls", "glsn", "glus"), "Gradual Latent is not supported"),
    **dict.fromkeys(("ctr", "rcfg", "fs"), "there is no such setting here"),
}
_NAMES = {
    "subseed": "variation_seed",
    "subseed_strength": "variation_strength",
    "sample_steps": "steps",
    "scale": "guidance_scale",
}
"""Fields of the web UI's API and of kohya's JSON and TOML files -> ours."""
SAMPLER = ("sampler_name", "sample_sampler", "scheduler")
COUNTS = ("n_iter", "batch_size")
"""The web UI's numbers of images; their product counts."""
_REFUSED = {
    "sd_model": "a model is named by --model",
    "sampler_index": "a number of a sampler differs between versions; use --sampler_name",
    "styles": "styles are not read; write their words into the prompt",
    "outpath_samples": "the folder is named by --outdir",
    "outpath_grids": "no grids are written",
    "prompt_for_display": "the prompt itself is shown",
    "restore_faces": "faces are not restored",
    "tiling": "images that tile are not supported",
    "do_not_save_samples": "images are always saved",
    "do_not_save_grid": "",
    "seed_resize_from_w": "a seed of another size is not supported",
    "seed_resize_from_h": "a seed of another size is not supported",
    "enable_hr": "a second pass is given by --upscale 2x",
}
"""Settings of the web UI without a counterpart, and why; one that is off has no effect there, either."""
KNOWN = frozenset({*_NAMES, *SAMPLER, *COUNTS, *_REFUSED})
_OFF: tuple[Any, ...] = (None, False, "", "false", "False", "0", "-1", 0, -1, [], "none", "None")


def text_line(text: str) -> dict[str, Any]:
    """`a cat --n dog --steps 20` or `--prompt "a cat" --steps 20` -> the prompt and the options, under our names.

    kohya's letters and the web UI's words are known. Raises UsageError.
    """
    first = _OPTION.search(text)
    prompt = (text if first is None else text[: first.start()]).strip()
    given: dict[str, Any] = {"prompt": prompt} if prompt else {}
    for name, value in _options(text, strict=not prompt) if first is not None else ():
        short = name.lower()
        if short in _KOHYA_REFUSED:
            raise UsageError(f"--{name}: {_KOHYA_REFUSED[short]}")
        field = KOHYA.get(short, name)
        field = field if field.replace("-", "_") in KNOWN else field_name(field)
        if field == "seed" and re.fullmatch(r"\d+(?:,\d+)+", value):
            raise UsageError(f"--{name}: several seeds, {value}, are not supported; give each a line of its own")
        if is_list(field):
            given.setdefault(field, []).append(value)
        elif field in given:
            raise UsageError(f"{field} is given twice")
        else:
            given[field] = value
    return given


_OPTION = re.compile(r"(?:^|(?<=\s))--([A-Za-z][^\s=]*)(?:=|\s+|$)")
_BARE = re.compile(r"\s+|[^\s\"']+")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"|\'([^\']*)\'', re.DOTALL)


def _options(text: str, *, strict: bool) -> Iterator[tuple[str, str]]:
    """The names and values of a line's options. A value that begins with a quote is read as a shell does; in others
    quotes are text. With `strict` a quote that is not closed is refused, as it was meant to be one."""
    match = _OPTION.search(text)
    while match is not None:
        name, start = match[1], match.end()
        value, end = _quoted(text, start) if text[start : start + 1] in ("'", '"') else (None, start)
        if value is None:
            if strict and end > start:
                raise UsageError(f"--{name}: the quote is not closed in {text[start : start + 40]}")
            following = _OPTION.search(text, start)
            end = len(text) if following is None else following.start()
            value = text[start:end].strip()
            if not value:
                raise UsageError(f"--{name} has no value")
        yield name, value
        match = _OPTION.search(text, end)


def _quoted(text: str, start: int) -> tuple[str | None, int]:
    """Words of which some are in quotes, up to the next option, and where they end; None for a quote without an end."""
    pieces: list[str] = []
    place = start
    space = ""
    while place < len(text) and not (text[place - 1].isspace() and _OPTION.match(text, place)):
        match = (_QUOTED if text[place] in "\"'" else _BARE).match(text, place)
        if match is None:
            return None, place + 1
        place = match.end()
        if match[0].isspace():
            space = " "
            continue
        if text[match.start()] in "\"'":
            inner = re.sub(r'\\(["\\])', r"\1", match[1]) if match[1] is not None else match[2]
        else:
            inner = match[0]
        pieces.append(space + inner)
        space = ""
    return "".join(pieces), place


def translated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with other tools' names and values as ours. Raises UsageError for those without a counterpart."""
    found: dict[str, Any] = {}
    counts: dict[str, int] = {}
    samplers: dict[str, Any] = {}
    for name, value in values.items():
        plain = name.replace("-", "_")
        if plain in _REFUSED:
            if _REFUSED[plain] and not any(value is off or (value == off and type(value) is type(off)) for off in _OFF):
                raise UsageError(f"{name}: {_REFUSED[plain]}")
            continue
        if plain in COUNTS:
            if value is not None:
                counts[plain] = whole_count(name, value)
            continue
        field = _NAMES.get(plain, plain)
        if plain in SAMPLER or field_name(field) == "scheduler":
            samplers[plain] = value
        elif field in found:
            raise UsageError(f"{field} is given twice")
        elif field_name(field) in ("seed", "variation_seed") and value in (-1, "-1") and value is not True:
            found[field] = None  # random, in the web UI and in kohya's scripts
        else:
            found[field if plain in _NAMES else name] = value
    if samplers:
        found["scheduler"] = _scheduler(samplers)
    if counts:
        if {"n", "num_images"} & found.keys():
            raise UsageError("num_images is given twice")
        found["num_images"] = counts.get("n_iter", 1) * counts.get("batch_size", 1)
    return found


def _scheduler(given: Mapping[str, Any]) -> Any:
    """Our name of a sampler; the web UI's API has the schedule's type beside it, as `scheduler`."""
    names = {name: value for name, value in given.items() if value is not None}
    kind = names.pop("scheduler", None) if len(names) > 1 else None
    if len(names) > 1 or not names:
        if names:
            raise UsageError("scheduler is given twice")
        return None
    ((name, value),) = names.items()
    if not isinstance(value, str) or not isinstance(kind, str | None):
        return value if kind is None else kind
    known = scheduler_of(value, kind)
    if known is not None:
        return known
    if name in ("scheduler", "sampler") and kind is None:
        return value
    raise UsageError(f"{name}: no scheduler for {f'{value} {kind}' if kind else value} (--scheduler help lists them)")


def whole_count(name: str, value: Any) -> int:
    """A number of images from 1 to 100,000: an int, or text such as 4 and 4.0, as tables have it. Raises UsageError."""
    number = value
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,6}(\.0*)?\s*", value):
        number = int(float(value))
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 100_000:
        raise UsageError(f"{name}: should be a whole number from 1 to 100000, not {value!r:.60}")
    return number
