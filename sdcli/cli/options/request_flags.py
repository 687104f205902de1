"""The flags of `sdcli generate`, one per field of the request."""

from __future__ import annotations

from sdcli.cli.options.flags import Flag
from sdcli.request.command_line import NOT_FLAGS
from sdcli.request.schema import GenerationRequest, flag_of

MODEL, IMAGE, START, CONTROL = "Model and prompt", "The image", "Init image", "ControlNet"
ALIASES = {"guidance_scale": ("--cfg-scale",), "scheduler": ("--sampler",), "model": ("-m",)}
SECTIONS = {
    **dict.fromkeys(("model", "refiner", "negative_prompt", "prompt_template", "prompt_syntax", "clip_skip"), MODEL),
    **dict.fromkeys(("embeddings", "loras", "ip_adapters"), MODEL),
    **dict.fromkeys(("init_image", "strength", "mask", "mask_blur", "invert_mask", "extend"), START),
    **dict.fromkeys(("controls", "guess_mode"), CONTROL),
}
METAVARS = {
    "model": "MODEL",
    "refiner": "MODEL",
    "scheduler": "NAME",
    **dict.fromkeys(("width", "height", "mask_blur"), "PIXELS"),
    "embeddings": "FILE[=WORD]",
    "guidance_scale": "NUMBER|FIRST..LAST",
    "guidance_interval": "START-STOP",
    "reuse": "N",
    "init_image": "FILE|-",
    "mask": "FILE|-",
    "extend": "SIDE=PIXELS,...",
    "upscale": "FACTORx[:STRENGTH[:latent]]",
    "loras": "FILE[:WEIGHT[:TEXT_WEIGHT]]",
    "ip_adapters": "FILE=IMAGE[:WEIGHT]",
    "controls": "[HOW:]MODEL=IMAGE[:WEIGHT][@START-END]",
}


def _flag(name: str) -> Flag:
    return Flag(
        (flag_of(name), *ALIASES.get(name, ())),
        SECTIONS.get(name, IMAGE),
        METAVARS.get(name),
        as_text=name == "guidance_scale",  # a number, or the first and the last of a schedule
    )


FLAGS = {name: _flag(name) for name in GenerationRequest.model_fields if name not in NOT_FLAGS}
