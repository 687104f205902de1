"""The `info` of an answer, the JSON text in which clients of the web UI find seeds and settings; and png-info."""

from __future__ import annotations

import json
from typing import Any

from sdcli import __version__
from sdcli.errors import SdcliError
from sdcli.metadata.a1111 import parse_a1111
from sdcli.metadata.read import read_image_bytes
from sdcli.request.schedulers import SCHEDULERS
from sdcli.server.a1111_fields import all_seeds
from sdcli.server.a1111_models import PngInfo, Txt2Img
from sdcli.server.a1111_tasks import ImageTask, timestamp

SAVES_NOTHING = "save_images: this server keeps no files, so nothing was saved; the images are in the answer"


def info_text(body: Txt2Img, task: ImageTask) -> str:
    """The info of the images that are done, as a JSON text."""
    job = task.job
    numbers = sorted(job.done)
    requests = [job.images[number].request for number in numbers]
    first = requests[0]
    seeds = [one.seed for one in requests]
    all_seed, all_subseeds = all_seeds(body, seeds, [one.variation_seed for one in requests])
    texts = [job.done[number].parameters for number in numbers]
    written = parse_a1111(texts[0])[2]
    prompt, negative = body.prompt or "", body.negative_prompt or ""
    info: dict[str, Any] = {
        "prompt": prompt,
        "all_prompts": [prompt] * len(numbers),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(numbers),
        "seed": all_seed[0],
        "all_seeds": all_seed,
        "subseed": all_subseeds[0],
        "all_subseeds": all_subseeds,
        "subseed_strength": first.variation_strength or 0,
        "width": first.width,
        "height": first.height,
        "sampler_name": SCHEDULERS[first.scheduler].a1111,
        "cfg_scale": first.guidance_scale,
        "steps": first.steps,
        "batch_size": task.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": first.model,
        "sd_model_hash": written.get("Model hash"),
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first.upscale.strength if first.upscale else first.strength,
        "extra_generation_params": {key: written[key] for key in _EXTRA if key in written},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": timestamp(job),
        "clip_skip": first.clip_skip or 1,
        "is_using_inpainting_conditioning": job.images[0].model.kind.inpaints,
        "version": f"sdcli {__version__}",
        "comments": "\n".join(_comments(body, task)),
    }
    return json.dumps(info)


_EXTRA = ("Schedule type", "Eta", "Mask blur", "Hires upscale", "Refiner", "Refiner switch at", "RNG", "Lora hashes")


def _comments(body: Txt2Img, task: ImageTask) -> list[str]:
    """What the user should know of the images: cut prompts, fallbacks, those that were skipped."""
    job = task.job
    notes = [str(event["text"]) for event in job.events if event and event["type"] == "note"]
    why = "skipped" if task.skipped else "interrupted"
    missing = [
        f"image {number + 1}: {why if failed.kind == 'cancelled' else failed.sentence}"
        for number, failed in sorted(job.failed.items())
    ]
    return list(dict.fromkeys([*notes, *missing, *([SAVES_NOTHING] if body.save_images else [])]))


def png_info(data: bytes) -> PngInfo:
    """What an image file says of itself. Raises BadImage."""
    found, texts = read_image_bytes(data, name="image")
    text = found.parameters or ""
    items: dict[str, Any] = {place: one for place, one in texts.items() if place != "parameters"}
    if found.record is not None:
        items["sdcli"] = found.record.request.typed()
    return PngInfo(info=text, items=items, parameters=_parameters(text))


def _parameters(text: str) -> dict[str, Any]:
    """A parameters text as the web UI's dictionary."""
    if not text:
        return {}
    try:
        prompt, negative, pairs = parse_a1111(text)
    except SdcliError:
        return {}
    width, _, height = pairs.get("Size", "").partition("x")
    size = {"Size-1": width, "Size-2": height} if height else {}
    return {"Prompt": prompt, "Negative prompt": negative, **pairs, **size}
