"""Random graphs as ComfyUI writes them: well-formed ones whose right reading is known, and junk with marked values."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

WORDS = ["fox", "red", "lighthouse", "at dusk", "oil", "a", "the", "sea", "狐", "кот", "naïve", "🦊"]
LETTERS = "abcdefghij"


@dataclass
class Picture:
    """A graph, the fields that are right for it, and what has to be named."""

    nodes: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    named: list[Any] = field(default_factory=list)
    """Values that have to stand among what is not taken over."""


class Writer:
    """Writes a graph node by node, as a person would connect it."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.picture = Picture()
        self._ids = draw.sample(range(1, 10_000), 200)

    def node(self, kind: str, slot: int = 0, **inputs: Any) -> list[Any]:
        """Add a node, sometimes with a reroute behind it; returns the link to its output."""
        id = str(self._ids.pop())
        if self.draw.random() < 0.2:
            id = f"{self._ids.pop()}:{id}"  # a node of a subgraph
        self.picture.nodes[id] = {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
        if self.draw.random() < 0.1:
            return self.node("Reroute", 0, **{"": [id, slot]})
        return [id, slot]

    def output(self, link: list[Any], slot: int) -> list[Any]:
        """Another output of a node, behind its reroutes."""
        while self.picture.nodes[link[0]]["class_type"] == "Reroute":
            link = self.picture.nodes[link[0]]["inputs"][""]
        return [link[0], slot]

    def chance(self, share: float) -> bool:
        return self.draw.random() < share

    def number(self, value: Any) -> Any:
        """A number as it stands, or from a node that holds it."""
        if self.chance(0.8):
            return value
        kind = self.draw.choice(["PrimitiveInt", "INTConstant"] if isinstance(value, int) else ["PrimitiveFloat"])
        return self.node(kind, value=value)

    def words(self) -> str:
        return " ".join(self.draw.choices(WORDS, k=self.draw.randint(1, 5)))

    def text(self, depth: int = 0) -> tuple[Any, str]:
        """A text or a link to the nodes that compute it, and what it comes to."""
        kind = self.draw.randrange(9) if depth < 4 and self.chance(0.5) else 0
        if kind <= 1:
            words = self.words()
            return (words, words) if kind == 0 else (self.node("PrimitiveStringMultiline", value=words), words)
        (one, first), (two, second) = self.text(depth + 1), self.text(depth + 1)
        if kind == 2:
            return self.node("StringConcatenate", string_a=one, string_b=two, delimiter=", "), f"{first}, {second}"
        if kind == 3:
            find = self.draw.choice(WORDS)
            return self.node("StringReplace", string=one, find=find, replace=two), first.replace(find, second)
        if kind == 4:
            mode, case = self.draw.choice(
                [("UPPERCASE", str.upper), ("lowercase", str.lower), ("Title Case", str.title)]
            )
            return self.node("CaseConverter", string=one, mode=mode), case(first)
        if kind == 5:
            return self.node("StringTrim", string=one, mode="Both"), first.strip()
        if kind == 6:
            link = self.node("Text Concatenate", delimiter=" ", clean_whitespace="true", text_a=one, text_b=two)
            return link, " ".join(filter(None, (first.strip(), second.strip())))
        if kind == 7:
            link = self.node("StringFunction|pysssss", action="append", tidy_tags="no", text_a=one, text_b=two)
            return link, first + second
        return self.node("ShowText|pysssss", text=one), first

    def patch(self, kind: str, **inputs: Any) -> dict[str, Any]:
        """Inputs of a node that cannot be taken over: they have to be named."""
        self.picture.named += inputs.values()
        return inputs


def well_formed(seed: int) -> Picture:
    """A text-to-image graph with one answer: what is read has to be equal to `fields`, and hold all of `named`."""
    writer = Writer(random.Random(seed))
    draw, picture = writer.draw, writer.picture
    checkpoint = writer.node("CheckpointLoaderSimple", ckpt_name="some.safetensors")
    model, clip, vae = checkpoint, writer.output(checkpoint, 1), writer.output(checkpoint, 2)
    picture.named.append("some.safetensors")
    plain = model
    model, clip = _loras(writer, model, clip)
    if writer.chance(0.1):
        model = plain  # the LoRAs change the text encoder alone
        picture.fields["loras"] = [
            {**lora, "unet_weight": 0.0} for lora in picture.fields.pop("loras", []) if lora["text_weight"]
        ]
        if not picture.fields["loras"]:
            del picture.fields["loras"]
    model = _patched(writer, model)
    if writer.chance(0.3):
        layer = draw.randint(1, 4)
        clip = writer.node("CLIPSetLastLayer", stop_at_clip_layer=-layer, clip=clip)
        picture.fields["clip_skip"] = layer
    positive, prompt = _positive(writer, clip)
    given, negative_prompt = writer.text()
    negative = writer.node("CLIPTextEncode", text=given, clip=clip)
    positive, negative = _controlled(writer, positive, negative)
    if " AND " in prompt and picture.fields.get("pag_scale"):
        picture.named.append(picture.fields.pop("pag_scale"))  # they do not go together here
    width, height = draw.randrange(64, 1024, 8), draw.randrange(64, 1024, 8)
    latent = writer.node("EmptyLatentImage", width=writer.number(width), height=writer.number(height), batch_size=1)
    picture.fields |= {"prompt": prompt, "negative_prompt": negative_prompt, "width": width, "height": height}
    if writer.chance(0.2):
        latent = _image_to_image(writer, vae)
    made = _sampler(writer, model, positive, negative, latent)
    if writer.chance(0.3):
        made = _second_pass(writer, made, model, positive, negative, vae)
    image = writer.node("VAEDecode", samples=made, vae=vae)
    if writer.chance(0.2):
        upscaler = writer.node("UpscaleModelLoader", **writer.patch("UpscaleModelLoader", model_name="4x-sharp.pth"))
        image = writer.node("ImageUpscaleWithModel", upscale_model=upscaler, image=image)
    kind = draw.choice(["SaveImage", "SaveImageWebsocket", "SaveAnimatedWEBP", "Image Save", "SaveImageKJ"])
    writer.node(kind, images=image, **({"filename_prefix": "pic"} if kind == "SaveImage" else {}))
    if writer.chance(0.5):
        _preview(writer, model, positive, negative, latent, vae)
    picture.nodes = dict(draw.sample(list(picture.nodes.items()), len(picture.nodes)))
    return picture


def _positive(writer: Writer, clip: Any) -> tuple[Any, str]:
    """One text, or two that are combined or joined."""
    given, prompt = writer.text()
    positive = writer.node("CLIPTextEncode", text=given, clip=clip)
    if not writer.chance(0.2):
        return positive, prompt
    given, more = writer.text()
    other = writer.node("CLIPTextEncode", text=given, clip=clip)
    if writer.chance(0.5):
        combined = writer.node("ConditioningCombine", conditioning_1=positive, conditioning_2=other)
        return combined, f"{prompt} :0.5 AND {more} :0.5"
    return writer.node(
        "ConditioningConcat", conditioning_to=positive, conditioning_from=other
    ), f"{prompt} BREAK {more}"


def _image_to_image(writer: Writer, vae: Any) -> Any:
    """A latent of an image, whose size and file are not known here."""
    del writer.picture.fields["width"], writer.picture.fields["height"]
    image = writer.node("LoadImage", **writer.patch("LoadImage", image="start.png"))
    return writer.node("VAEEncode", pixels=image, vae=vae)


def _second_pass(writer: Writer, made: Any, model: Any, positive: Any, negative: Any, vae: Any) -> Any:
    """An enlarged image that is denoised again."""
    factor, strength = writer.draw.choice([1.5, 2.0, 2.25]), writer.draw.choice([0.4, 0.55])
    method = writer.patch("", upscale_method="bislerp")
    how = writer.draw.choice(["latent", "pixel"])
    if how == "latent":
        latent = writer.node("LatentUpscaleBy", samples=made, scale_by=factor, **method)
    else:
        image = writer.node("VAEDecode", samples=made, vae=vae)
        image = writer.node("ImageScaleBy", image=image, scale_by=factor, **method)
        latent = writer.node("VAEEncode", pixels=image, vae=vae)
    if int(writer.picture.fields["steps"] * strength) < 1:
        writer.picture.named += [factor, strength]
    else:
        writer.picture.fields["upscale"] = {"factor": factor, "strength": strength, "how": how}
    settings = writer.patch("KSampler", seed=987654321, cfg=3.21, sampler_name="dpm_fast", scheduler="sgm_uniform")
    return writer.node(
        "KSampler", steps=17, denoise=strength, model=model, positive=positive, negative=negative, latent_image=latent,
        **settings,
    )  # fmt: skip


def _loras(writer: Writer, model: Any, clip: Any) -> tuple[Any, Any]:
    loras = []
    for number in range(writer.draw.choice([0, 0, 1, 2])):
        weights = [round(writer.draw.uniform(-2, 2), 2) for _ in range(2)]
        name = writer.draw.choice([f"ink{number}", f"sub/ink{number}", f"sub\\ink{number}"])
        inputs = {"lora_name": f"{name}.safetensors", "strength_model": weights[0], "model": model}
        if writer.chance(0.5):
            model = writer.node("LoraLoader", clip=clip, strength_clip=weights[1], **inputs)
            clip = writer.output(model, 1)
        else:
            model, weights[1] = writer.node("LoraLoaderModelOnly", **inputs), 0
        loras.append({"path": f"ink{number}", "unet_weight": weights[0], "text_weight": weights[1]})
    if loras:
        writer.picture.fields["loras"] = loras
    return model, clip


def _patched(writer: Writer, model: Any) -> Any:
    if writer.chance(0.2):
        scale = round(writer.draw.uniform(0.5, 5), 2)
        model = writer.node("PerturbedAttentionGuidance", scale=writer.number(scale), model=model)
        writer.picture.fields["pag_scale"] = scale
    if writer.chance(0.2):
        model = writer.node("FreeU_V2", model=model, **writer.patch("FreeU_V2", b1=1.31, b2=1.42, s1=0.93, s2=0.24))
    if writer.chance(0.2):
        inputs = writer.patch("ApplyFooPatch", foo_strength=0.123, foo_mode="quick foo")
        model = writer.node("ApplyFooPatch", model=model, **inputs)
    return model


def _controlled(writer: Writer, positive: Any, negative: Any) -> tuple[Any, Any]:
    if writer.chance(0.2):
        positive = writer.node(
            "ConditioningSetTimestepRange",
            conditioning=positive,
            **writer.patch("ConditioningSetTimestepRange", start=0.111, end=0.777),
        )
    if writer.chance(0.3):
        net = writer.node("ControlNetLoader", **writer.patch("ControlNetLoader", control_net_name="edges.safetensors"))
        image = writer.node("LoadImage", **writer.patch("LoadImage", image="pose.png"))
        inputs = writer.patch("ControlNetApplyAdvanced", strength=0.815, start_percent=0.013, end_percent=0.987)
        positive = writer.node(
            "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=net, image=image, **inputs
        )
        negative = writer.output(positive, 1)
    return positive, negative


SCHEDULERS = {
    ("euler", "normal"): "euler",
    ("euler_ancestral", "normal"): "euler-a",
    ("dpmpp_2m", "karras"): "dpmpp-2m-karras",
    ("uni_pc", "normal"): "unipc",
    ("res_multistep", "beta"): None,
    ("euler", "kl_optimal"): None,
}


def _sampler(writer: Writer, model: Any, positive: Any, negative: Any, latent: Any) -> Any:
    draw, picture = writer.draw, writer.picture
    seed, steps, cfg = draw.randrange(2**50), draw.randint(1, 60), draw.choice([2.5, 7, 8.0])
    (sampler, schedule), scheduler = draw.choice(list(SCHEDULERS.items()))
    picture.fields |= {"seed": seed, "steps": steps, "guidance_scale": float(cfg)}
    if scheduler is not None:
        picture.fields["scheduler"] = scheduler
    else:
        picture.named += [sampler, schedule]
    kind = draw.choice(["KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced", "KSampler (Foo)"])
    number, conditioned = writer.number, {"positive": positive, "negative": negative}
    if kind.startswith("SamplerCustom"):
        sigmas = writer.node("BasicScheduler", scheduler=schedule, steps=number(steps), denoise=1.0, model=model)
        select = writer.node("KSamplerSelect", sampler_name=sampler)
        parts = {"sampler": select, "sigmas": sigmas, "latent_image": latent}
        if kind == "SamplerCustom":
            parts |= {"model": model, "add_noise": True, "noise_seed": number(seed), "cfg": number(cfg), **conditioned}
            return writer.node(kind, draw.choice([0, 1]), **parts)
        guider = writer.node("CFGGuider", model=model, cfg=number(cfg), **conditioned)
        noise = writer.node("RandomNoise", noise_seed=number(seed))
        return writer.node(kind, draw.choice([0, 1]), noise=noise, guider=guider, **parts)
    inputs = {
        "steps": number(steps), "cfg": number(cfg), "sampler_name": sampler, "scheduler": schedule, "model": model,
        "latent_image": latent, **conditioned,
    }  # fmt: skip
    if kind == "KSamplerAdvanced":
        bounds = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 10000}
        return writer.node(kind, noise_seed=number(seed), return_with_leftover_noise="disable", **bounds, **inputs)
    more = writer.patch(kind, foo_eta=0.456) if kind != "KSampler" else {}
    return writer.node(kind, seed=number(seed), denoise=1.0, **more, **inputs)


def _preview(writer: Writer, model: Any, positive: Any, negative: Any, latent: Any, vae: Any) -> None:
    """Another sampler of the same graph, whose image is only shown."""
    made = writer.node(
        "KSampler", seed=1, steps=1, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0, model=model,
        positive=negative, negative=positive, latent_image=latent,
    )  # fmt: skip
    writer.node("PreviewImage", images=writer.node("VAEDecode", samples=made, vae=vae))


INPUTS = {
    "KSampler": ["model", "positive", "negative", "latent_image"],
    "KSamplerAdvanced": ["model", "positive", "negative", "latent_image"],
    "SamplerCustom": ["model", "positive", "negative", "latent_image", "sampler", "sigmas"],
    "SamplerCustomAdvanced": ["noise", "guider", "sampler", "sigmas", "latent_image"],
    "CFGGuider": ["model", "positive", "negative"],
    "BasicGuider": ["model", "conditioning"],
    "DualCFGGuider": ["model", "cond1", "cond2", "negative"],
    "RandomNoise": [],
    "KSamplerSelect": [],
    "SamplerEulerAncestral": [],
    "BasicScheduler": ["model"],
    "KarrasScheduler": [],
    "SplitSigmas": ["sigmas"],
    "CheckpointLoaderSimple": [],
    "UNETLoader": [],
    "LoraLoader": ["model", "clip"],
    "LoraLoaderModelOnly": ["model"],
    "CLIPSetLastLayer": ["clip"],
    "PerturbedAttentionGuidance": ["model"],
    "RescaleCFG": ["model"],
    "CLIPTextEncode": ["clip"],
    "CLIPTextEncodeSDXL": ["clip"],
    "ConditioningCombine": ["conditioning_1", "conditioning_2"],
    "ConditioningConcat": ["conditioning_to", "conditioning_from"],
    "ConditioningAverage": ["conditioning_to", "conditioning_from"],
    "ConditioningSetArea": ["conditioning"],
    "ConditioningZeroOut": ["conditioning"],
    "ControlNetApplyAdvanced": ["positive", "negative", "control_net", "image"],
    "EmptyLatentImage": [],
    "VAEEncode": ["pixels", "vae"],
    "LatentUpscaleBy": ["samples"],
    "LatentUpscale": ["samples"],
    "LoadImage": [],
    "VAEDecode": ["samples", "vae"],
    "ImageScale": ["image"],
    "SaveImage": ["images"],
    "PreviewImage": ["images"],
    "PrimitiveString": [],
    "StringConcatenate": [],
    "StringReplace": [],
    "Reroute": [""],
    "FooNode": ["foo", "image", "model"],
    "Foo Text": [],
}
"""Kinds of nodes -> their linked inputs."""

NUMBERS = {
    "KSampler": ["seed", "steps", "cfg", "denoise"],
    "KSamplerAdvanced": ["noise_seed", "steps", "cfg", "start_at_step", "end_at_step"],
    "SamplerCustom": ["noise_seed", "cfg"],
    "CFGGuider": ["cfg"],
    "DualCFGGuider": ["cfg_conds", "cfg_cond2_negative"],
    "RandomNoise": ["noise_seed"],
    "SamplerEulerAncestral": ["eta", "s_noise"],
    "BasicScheduler": ["steps", "denoise"],
    "KarrasScheduler": ["steps", "sigma_max", "sigma_min", "rho"],
    "SplitSigmas": ["step"],
    "LoraLoader": ["strength_model", "strength_clip"],
    "LoraLoaderModelOnly": ["strength_model"],
    "CLIPSetLastLayer": ["stop_at_clip_layer"],
    "PerturbedAttentionGuidance": ["scale"],
    "RescaleCFG": ["multiplier"],
    "CLIPTextEncodeSDXL": ["width", "height", "crop_w", "target_width"],
    "ConditioningAverage": ["conditioning_to_strength"],
    "ConditioningSetArea": ["width", "x", "strength"],
    "ControlNetApplyAdvanced": ["strength", "start_percent"],
    "EmptyLatentImage": ["width", "height", "batch_size"],
    "LatentUpscaleBy": ["scale_by"],
    "LatentUpscale": ["width", "height"],
    "ImageScale": ["width", "height"],
    "FooNode": ["foo_number", "seed", "steps"],
    "Foo Text": ["seed"],
}
TEXTS = {
    "KSampler": ["sampler_name", "scheduler"],
    "KSamplerAdvanced": ["add_noise", "sampler_name", "scheduler", "return_with_leftover_noise"],
    "KSamplerSelect": ["sampler_name"],
    "BasicScheduler": ["scheduler"],
    "CheckpointLoaderSimple": ["ckpt_name"],
    "UNETLoader": ["unet_name", "weight_dtype"],
    "LoraLoader": ["lora_name"],
    "LoraLoaderModelOnly": ["lora_name"],
    "CLIPTextEncode": ["text"],
    "CLIPTextEncodeSDXL": ["text_g", "text_l"],
    "LatentUpscaleBy": ["upscale_method"],
    "LatentUpscale": ["upscale_method", "crop"],
    "ImageScale": ["upscale_method", "crop"],
    "LoadImage": ["image"],
    "PrimitiveString": ["value"],
    "StringConcatenate": ["string_a", "string_b", "delimiter"],
    "StringReplace": ["string", "find", "replace"],
    "FooNode": ["text", "foo_mode"],
    "Foo Text": ["text"],
}
VALUES = {"string_a", "string_b", "string", "value", "text", "text_g"}
"""Inputs that may be linked to a node that computes a text."""


@dataclass
class Junk:
    """A graph of any links, whose plain values are all different."""

    nodes: dict[str, Any]
    marks: dict[tuple[str, str], Any]
    """(id, input) -> the value that is nowhere else."""


def junk(seed: int, *, hostile: bool = False) -> Junk:
    """A graph with random nodes, links (also wrong, missing and in cycles) and marked values; `hostile`: any JSON."""
    draw = random.Random(seed)
    count = draw.randint(1, 30)
    kinds = [*draw.choices(list(INPUTS), k=count), "KSampler", "VAEDecode", "SaveImage"]
    ids = [str(number) for number in range(1, len(kinds) + 1)]
    draw.shuffle(ids)
    made, marks, mark = {}, {}, 100

    def link() -> Any:
        return [draw.choice([*ids, "none"] if draw.random() < 0.9 else ids), draw.choice([0, 0, 0, 1, 2])]

    by_kind = {kind: [id for id, other in zip(ids, kinds, strict=True) if other == kind] for kind in set(kinds)}
    for id, kind in zip(ids, kinds, strict=True):
        inputs: dict[str, Any] = {name: _likely(draw, name, by_kind) or link() for name in INPUTS[kind]}
        for name in NUMBERS.get(kind, []):
            mark += 1
            marks[id, name] = inputs[name] = mark + 0.5 if draw.random() < 0.5 else mark
        for name in TEXTS.get(kind, []):
            mark += 1
            marks[id, name] = inputs[name] = f"m{mark}m"
            if name in VALUES and draw.random() < 0.3:
                inputs[name] = _likely(draw, "text", by_kind) or link()
                del marks[id, name]
        made[id] = {"class_type": kind, "inputs": inputs}
    if hostile:
        for node in made.values():
            for name in node["inputs"]:
                if draw.random() < 0.1:
                    node["inputs"][name] = draw.choice(HOSTILE)
    return Junk(made, {} if hostile else marks)


HOSTILE = [
    None, True, [], {}, [1], ["1", "0"], ["1", -1], [[], 0], {"__value__": ["1", 0]}, float("nan"), float("inf"), -1,
    2**70, 1e308, "", "\ud800", "a\0b", "((((((((((", "(a:1e999)",
    "[a|b] AND c", "embedding:", "<lora:a:b:c:d>", "x" * 5000,
]  # fmt: skip

LIKELY = {
    "images": ["VAEDecode", "ImageScale", "FooNode"],
    "image": ["VAEDecode", "LoadImage", "ImageScale"],
    "samples": ["KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced", "LatentUpscaleBy"],
    "latent_image": ["EmptyLatentImage", "VAEEncode", "LatentUpscaleBy", "LatentUpscale", "KSampler"],
    "pixels": ["LoadImage", "VAEDecode", "ImageScale"],
    "positive": ["CLIPTextEncode", "CLIPTextEncodeSDXL", "ConditioningCombine", "ControlNetApplyAdvanced"],
    "conditioning": ["CLIPTextEncode", "ConditioningCombine", "ConditioningConcat"],
    "model": ["CheckpointLoaderSimple", "UNETLoader", "LoraLoader", "RescaleCFG", "FooNode"],
    "clip": ["CheckpointLoaderSimple", "LoraLoader", "CLIPSetLastLayer"],
    "sampler": ["KSamplerSelect", "SamplerEulerAncestral"],
    "sigmas": ["BasicScheduler", "KarrasScheduler", "SplitSigmas"],
    "guider": ["CFGGuider", "BasicGuider", "DualCFGGuider"],
    "noise": ["RandomNoise"],
    "text": ["PrimitiveString", "StringConcatenate", "StringReplace", "Foo Text"],
}
LIKELY["negative"] = LIKELY["positive"]
for _name in ("conditioning_1", "conditioning_2", "conditioning_to", "conditioning_from"):
    LIKELY[_name] = LIKELY["conditioning"]


def _likely(draw: random.Random, name: str, by_kind: dict[str, list[str]]) -> Any:
    """A link that makes sense, most of the time."""
    ids = [id for kind in LIKELY.get(name, []) for id in by_kind.get(kind, [])]
    return [draw.choice(ids), draw.choice([0, 0, 0, 1])] if ids and draw.random() < 0.8 else None
