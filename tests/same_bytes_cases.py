"""Requests and short trainings whose results must keep their bytes: run through the command line, shown as digests.

`python -m tests.same_bytes_cases FOLDER [--only NAME]` works in FOLDER, which is to be empty, and prints JSON: case ->
what came of it. `--write` records that in same_bytes.json, with which test_same_bytes.py compares. Of a picture the
decoded pixels and the request of its record count, of a latent file or of weights the tensors; of all else only the
name. The instruction sets are held at AVX2 and the threads at one, so that sums round alike on the CPUs of one vendor.
Each has its outcomes in the file, because the matrix products of Intel's library add in another order elsewhere.
"""

from __future__ import annotations

import os

FIXED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBILITY",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
os.environ.update(FIXED)  # before torch is imported

import argparse  # noqa: E402
import contextlib  # noqa: E402
import hashlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image, ImageSequence  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import CLIPTextModel, CLIPTextModelWithProjection  # noqa: E402
from typer.main import get_command  # noqa: E402

from sdcli.cli.app import app  # noqa: E402
from sdcli.models import networks  # noqa: E402
from sdcli.models.families import family as family_configs  # noqa: E402
from tests.cpu import vendor  # noqa: E402
from tests.ldm import ldm_checkpoint, ldm_controlnet, sd2_checkpoint, sdxl_checkpoint  # noqa: E402
from tests.loras import random_pairs, save_diffusers, save_kohya, save_peft  # noqa: E402
from tests.tiny import (  # noqa: E402
    save_tiny_controlnet,
    save_tiny_ip_adapter,
    save_tiny_pipeline,
    save_tiny_sd3,
    save_tiny_sdxl,
)

networks.cpu_has_bfloat16_kernels = lambda: True  # type: ignore[attr-defined]
"""One path for bfloat16 on all CPUs, whichever kernels they have."""

SHIPPED_CONFIGS = (family_configs, "shipped_configs")
"""Where a single file's configurations come from; those of miniatures are put there."""

RECORDED = Path(__file__).with_name("same_bytes.json")
"""Vendor of the CPU -> case -> outcome."""
Outcome = dict[str, Any]
Command = list[str]
ANIMALS = ["cat", "dog", "red fox"]
SCHEDULERS = (
    *("ddpm", "ddim", "pndm", "euler", "euler-a", "heun", "dpmpp-2m", "dpmpp-2m-karras", "dpmpp-2m-sde"),
    *("unipc", "lms", "lcm"),
)
IN = "../../in"
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
PLAIN = ["--device", "cpu", "--dtype", "float32", "-q"]
SHAPES_OF_SD1 = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "vae_layers": 2,
}
SHAPES_OF_SDXL = {
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "vae_layers": 2,
}


# What the cases stand on


def make_inputs(folder: Path) -> None:
    """Models, adapters, pictures, latents and data sets, all from fixed seeds."""
    folder.mkdir()
    save_tiny_pipeline(folder / "sd1")
    save_tiny_pipeline(folder / "inpainting", in_channels=9)
    save_tiny_pipeline(folder / "distilled", time_cond_proj_dim=32)
    save_tiny_pipeline(folder / "sd2", hidden_act="gelu", use_linear_projection=True)
    edit(folder / "sd2" / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    save_tiny_sdxl(folder / "sdxl")
    save_tiny_sdxl(folder / "refiner", refiner=True, zeros_for_empty=False)
    save_tiny_sd3(folder / "sd3")
    save_tiny_sd3(folder / "sd3-without-t5", t5=False)
    save_pixel_models(folder)
    save_single_files(folder)
    for seed, name in enumerate(("one", "two"), start=1):
        save_tiny_controlnet(folder / f"control-{name}", folder / "sd1", seed=seed)
    save_tiny_controlnet(folder / "control-sdxl", folder / "sdxl", seed=3)
    for seed, kind in enumerate(("plain", "plus", "full"), start=1):
        save_tiny_ip_adapter(folder / "ip", folder / "sd1", kind=kind, seed=seed)
    save_tiny_ip_adapter(folder / "ip-sdxl", folder / "sdxl")
    save_loras(folder)
    save_inputs(folder)


def edit(file: Path, **fields: Any) -> None:
    """Change some fields of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def micro_unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    shape = {
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**{**shape, **changes}).eval()


def save_pixel_models(folder: Path) -> None:
    """UNets without a text encoder: on grey and coloured pixels, with classes, and on latents."""
    DDPMPipeline(micro_unet(), DDPMScheduler()).save_pretrained(folder / "grey")
    colour = micro_unet(in_channels=3, out_channels=3)
    DDPMPipeline(colour, DDPMScheduler()).save_pretrained(folder / "colour")
    DDPMPipeline(micro_unet(num_class_embeds=4), DDPMScheduler()).save_pretrained(folder / "classes")
    (folder / "classes" / "classes.json").write_text(json.dumps(ANIMALS))
    latent = micro_unet(sample_size=8, in_channels=4, out_channels=4)
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    LDMPipeline(vae.eval(), latent, scheduler).save_pretrained(folder / "latents")


def save_single_files(folder: Path) -> None:
    """Checkpoints with the original names, beside the folders whose configurations they need."""
    save_tiny_pipeline(folder / "whole-sd1", **SHAPES_OF_SD1)
    save_tiny_pipeline(folder / "whole-sd2", **SHAPES_OF_SD1, use_linear_projection=True, hidden_act="gelu")
    save_tiny_sdxl(folder / "whole-sdxl", **SHAPES_OF_SDXL)
    save_file(ldm_checkpoint(*states(folder / "whole-sd1")), folder / "sd1-file.safetensors")
    save_file(sd2_checkpoint(*states(folder / "whole-sd2")), folder / "sd2-file.safetensors")
    unet, vae, first = states(folder / "whole-sdxl")
    second = load_file(folder / "whole-sdxl" / "text_encoder_2" / "model.safetensors")
    save_file(sdxl_checkpoint(unet, vae, second, first), folder / "sdxl-file.safetensors")
    net = save_tiny_controlnet(folder / "whole-control", folder / "whole-sd1")
    stored = load_file(net / "diffusion_pytorch_model.safetensors")
    save_file(ldm_controlnet(stored), folder / "control-file.safetensors")


def states(model: Path) -> list[dict[str, torch.Tensor]]:
    """The tensors of the UNet, the VAE and the text encoder."""
    files = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    return [load_file(model / f"{file}.safetensors") for file in files]


def save_loras(folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder / "sd1" / "unet")
    text = CLIPTextModel.from_pretrained(folder / "sd1" / "text_encoder")
    both = random_pairs({"unet": unet, "text_encoder": text})
    save_kohya(folder / "kohya.safetensors", both, alpha=2.0)
    save_diffusers(folder / "diffusers.safetensors", random_pairs({"unet": unet}, seed=1), alpha=2.0)
    save_peft(folder / "peft", random_pairs({"unet": unet}, seed=2, only="attn"), alpha=1.5)
    parts: dict[str, torch.nn.Module] = {"unet": UNet2DConditionModel.from_pretrained(folder / "sdxl" / "unet")}
    parts["text_encoder"] = CLIPTextModel.from_pretrained(folder / "sdxl" / "text_encoder")
    parts["text_encoder_2"] = CLIPTextModelWithProjection.from_pretrained(folder / "sdxl" / "text_encoder_2")
    save_diffusers(folder / "sdxl-lora.safetensors", random_pairs({"unet": parts["unet"]}, seed=3, only="attn"))


def save_inputs(folder: Path) -> None:
    """Pictures, a mask, latents, embeddings, files of prompts, and pictures to train on."""
    source = np.random.default_rng(0)
    for name, size in (("a", (64, 48)), ("b", (48, 64)), ("c", (64, 64)), ("d", (77, 51))):
        coarse = Image.fromarray(source.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    np.save(folder / "latents.npy", source.normal(size=(1, 4, 8, 8)).astype(np.float32))
    drawn = torch.Generator().manual_seed(7)
    vectors = {name: torch.randn(2, width, generator=drawn) for name, width in (("clip_l", 32), ("clip_g", 40))}
    save_file(vectors, folder / "pomme.safetensors")
    (folder / "prompts.txt").write_text("a cat\na dog\n\na red fox in the snow\n")
    jobs = [
        {"prompt": "a cat", "custom_id": "first"},
        {"prompt": "a dog", "size": "96x64", "seed": 9},
        {"prompt": "a fox", "model": f"{IN}/sdxl", "scheduler": "euler", "steps": 2},
        {"prompt": "an owl", "negative_prompt": "blurred", "guidance_scale": "6..2"},
        {"prompt": "a hare", "model": "tiny", "seed": 4},
        {"prompt": "a cat", "seed": 5, "init_image": f"{IN}/c.png", "strength": 0.5},
        {"prompt": "nothing", "steps": 0},
    ]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    (folder / "jobs.csv").write_text("prompt,seed,guidance_scale\na cat,3,2.5\na dog,4,\n")
    (folder / "wildcards").mkdir()
    (folder / "wildcards" / "animals.txt").write_text("cat\ndog\nred fox\n{small|large} owl\n")
    for set_name, size in (("pictures", (64, 64)), ("small", (16, 16))):
        (folder / set_name).mkdir()
        for number in range(6):
            pixels = source.integers(0, 120, (*size, 3), dtype=np.uint8) + np.uint8(20 * number)
            Image.fromarray(pixels).save(folder / set_name / f"{number}.png")
            (folder / set_name / f"{number}.txt").write_text(f"picture number {number}\nthe {number}th picture\n")
    for place, name in enumerate(ANIMALS):
        (folder / "by-class" / name).mkdir(parents=True)
        for number in range(3):
            grey = source.integers(0, 120, (16, 16), dtype=np.uint8) + np.uint8(60 * place)
            Image.fromarray(grey).save(folder / "by-class" / name / f"{number}.png")
    colours, kinds, doings = ("red", "blue", "green"), ("fox", "hare", "owl"), ("sleeps", "jumps", "sits", "runs")
    sentences = [f"a {colour} {kind} {doing}" for colour in colours for kind in kinds for doing in doings]
    lines = [{"text": [one, f"here is {one}"], "image": str(n)} for n, one in enumerate(sentences)]
    (folder / "captions.txt").write_text("".join(f"{line['text'][0]}\n" for line in lines))
    texts = [line["text"][0] for line in lines]
    letters = torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)
    save_file(
        {"vectors": torch.randn(len(texts), 24, generator=drawn), "texts": letters}, folder / "teacher.safetensors"
    )
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(folder / "small-vae" / "vae")


# The cases


def paint(prompt: str | None, *arguments: str, model: str = f"{IN}/sd1") -> Command:
    """A short request; later arguments win over the first ones."""
    fixed = ["-m", model, "--seed", "1", "--steps", "3", "--batch-size", "1", *PLAIN]
    text = [] if prompt is None else ["--", prompt]
    return ["generate", *fixed, *(["--size", "64x64"] if sized(arguments, model) else []), *arguments, *text]


def sized(arguments: tuple[str, ...], model: str) -> bool:
    whole = {"--size", "--width", "--height", "--extend", "--from"} & set(arguments)
    small = model.rsplit("/", 1)[-1] in ("grey", "colour", "classes", "starter")
    return not whole and not small and not any(argument.startswith("size=") for argument in arguments)


CAT = "a cat"
LONG = ", ".join(
    f"a {colour} {what} number {n}" for n in range(5) for colour in ("red", "blue") for what in ("cat", "owl")
)
PROMPTS = {
    "weights": "a (cat:1.4) and ((dogs)) [in] snow, \\(not\\) (a (nested:1.2) one:0.7)",
    "in-turn": "a [cat:dog:0.5] [with a hat:0.4] [in snow::0.6]",
    "by-step-number": "a [cat:dog:2]",
    "alternating": "a [cat|dog|fox] in snow",
    "composed": "a cat :1.2 AND a dog :0.6 AND snow",
    "break": "a cat BREAK a dog in the snow",
    "long": LONG,
    "all": "a (cat:1.3) [in snow:in rain:0.5] AND a [red|blue] owl BREAK at night",
    "empty": "",
    "unicode": "ein Äffchen, 猫 — naïve",
}
FEATURES: dict[str, tuple[str, ...]] = {
    "plain-syntax": ("--prompt-syntax", "plain"),
    "template": ("--prompt-template", "{prompt}, glossy style"),
    "clip-skip": ("--clip-skip", "2"),
    "negative": ("--negative-prompt", "a (dog:1.3), blurred"),
    "unguided": ("--guidance-scale", "1"),
    "guidance-end": ("--guidance-scale", "7..1.5"),
    "rescale": ("--guidance-rescale", "0.7"),
    "interval": ("--guidance-interval", "0.3-0.8"),
    "pag": ("--pag-scale", "3"),
    "pag-unguided": ("--pag-scale", "3", "--guidance-scale", "1"),
    "variation": ("--variation-seed", "5", "--variation-strength", "0.4"),
    "eta": ("--scheduler", "ddim", "--eta", "0.7"),
    "watermark": ("--watermark", "A", "--size", "96x96"),
    "picture": ("--init-image", f"{IN}/c.png", "--strength", "0.6"),
    "picture-of-another-size": ("--init-image", f"{IN}/d.png", "--strength", "0.9"),
    "picture-with-all-noise": ("--init-image", f"{IN}/c.png", "--strength", "1"),
    "mask": ("--init-image", f"{IN}/c.png", "--mask", f"{IN}/mask.png", "--strength", "0.7"),
    "blurred-mask": ("--init-image", f"{IN}/c.png", "--mask", f"{IN}/mask.png", "--mask-blur", "6"),
    "inverted-mask": ("--init-image", f"{IN}/c.png", "--mask", f"{IN}/mask.png", "--invert-mask"),
    "extended": ("--init-image", f"{IN}/c.png", "--extend", "left=16,top=8"),
    "upscaled": ("--upscale", "1.5x:0.7"),
    "upscaled-latents": ("--upscale", "2x:0.5:latent"),
}
OF_SD1: dict[str, tuple[str, ...]] = {
    "embedding": ("--embedding", f"{IN}/pomme.safetensors"),
    "embedding-with-a-word": ("--embedding", f"{IN}/pomme.safetensors=cat"),
    "control": ("--control", f"{IN}/control-one={IN}/c.png:0.7"),
    "control-in-part": ("--control", f"{IN}/control-one={IN}/c.png:0.7@0.3-1"),
    "control-canny": ("--control", f"canny:{IN}/control-one={IN}/c.png"),
    "control-depth": ("--control", f"depth:{IN}/control-two={IN}/c.png"),
    "control-guess": ("--control", f"{IN}/control-one={IN}/c.png", "--guess-mode"),
    "controls": ("--control", f"scribble:{IN}/control-one={IN}/c.png", "--control", f"{IN}/control-two={IN}/a.png:0.5"),
    "control-and-picture": (*FEATURES["picture"], "--control", f"tile:{IN}/control-one={IN}/c.png"),
    "control-and-mask": (*FEATURES["mask"], "--control", f"blur:{IN}/control-one={IN}/c.png"),
    "control-and-pag": ("--pag-scale", "2", "--control", f"{IN}/control-one={IN}/c.png"),
    "ip-plain": ("--ip-adapter", f"{IN}/ip/plain.safetensors={IN}/a.png:0.6"),
    "ip-plus": ("--ip-adapter", f"{IN}/ip/plus.safetensors={IN}/a.png:0.6"),
    "ip-full": ("--ip-adapter", f"{IN}/ip/full.safetensors={IN}/b.png"),
    "ips": (
        *("--ip-adapter", f"{IN}/ip/plain.safetensors={IN}/a.png:0.6"),
        *("--ip-adapter", f"{IN}/ip/plus.safetensors={IN}/b.png:0.4"),
    ),
    "ip-control-lora": (
        *("--ip-adapter", f"{IN}/ip/plain.safetensors={IN}/a.png:0.6"),
        *("--control", f"{IN}/control-one={IN}/c.png:0.7", "--lora", f"{IN}/kohya.safetensors:0.5"),
    ),
    "lora-kohya": ("--lora", f"{IN}/kohya.safetensors:0.8"),
    "lora-two-weights": ("--lora", f"{IN}/kohya.safetensors:0.8:0.3"),
    "lora-diffusers": ("--lora", f"{IN}/diffusers.safetensors:0.8"),
    "lora-peft": ("--lora", f"{IN}/peft:1.2"),
    "loras": ("--lora", f"{IN}/kohya.safetensors:0.6", "--lora", f"{IN}/diffusers.safetensors:-0.5"),
    "hires": ("--upscale", "2x:0.7", "--scheduler", "euler-a", "--negative-prompt", "a dog", "--pag-scale", "2"),
    "mask-and-scheduler": (*FEATURES["mask"], "--scheduler", "euler-a"),
    "picture-and-heun": (*FEATURES["picture"], "--scheduler", "heun", "--steps", "5"),
    "picture-and-pndm": (*FEATURES["picture"], "--scheduler", "pndm", "--steps", "5"),
    "picture-and-dpmpp": (*FEATURES["picture"], "--scheduler", "dpmpp-2m", "--steps", "5"),
    "variation-of-a-picture": (*FEATURES["variation"], *FEATURES["picture"]),
    "tall": ("--size", "64x96"),
}


def requests() -> Iterator[tuple[str, list[Command]]]:
    """One picture a case."""
    for name, prompt in PROMPTS.items():
        yield f"prompt/{name}", [paint(prompt, "--steps", "4")]
    for name, arguments in {**FEATURES, **OF_SD1}.items():
        yield f"sd1/{name}", [paint("a cat and pomme", *arguments)]
    yield "sd1/plain-syntax-cut", [paint(LONG, "--prompt-syntax", "plain")]
    yield "sd1/template-composed", [paint(PROMPTS["composed"], "--prompt-template", "{prompt}, in oil")]
    yield "sd1/lora-tag", [paint("a cat <lora:kohya:0.7>", "--lora-dir", IN)]
    for name in SCHEDULERS:
        yield f"scheduler/{name}", [paint(CAT, "--scheduler", name, "--steps", "4")]
    for name in ("ddim", "pndm", "euler", "heun", "dpmpp-2m-karras", "dpmpp-2m-sde", "unipc", "lcm"):
        yield f"sd2/{name}", [paint(CAT, "--scheduler", name, model=f"{IN}/sd2")]
    yield "sd2/picture", [paint(CAT, *FEATURES["picture"], "--guidance-rescale", "0.5", model=f"{IN}/sd2")]
    yield (
        "starter/defaults",
        [["generate", "--seed", "3", "--steps", "4", "--batch-size", "1", *PLAIN, "--", "a red apple"]],
    )
    yield "starter/words", [paint("a (cat:1.3) and a house", "--negative-prompt", "a dog", model="starter")]
    yield "starter/control", [paint("a tree", *FEATURES["clip-skip"], "--scheduler", "euler-a", model="starter")]
    yield "tiny/defaults", [["generate", "-m", "tiny", "--seed", "3", "--batch-size", "1", *PLAIN, "--", CAT]]
    yield "sd1/bfloat16", [paint(CAT, "--dtype", "bfloat16")]
    yield "sdxl/bfloat16", [paint(CAT, "--dtype", "bfloat16", model=f"{IN}/sdxl")]
    yield "distilled/guided", [paint(CAT, "--guidance-scale", "5", model=f"{IN}/distilled")]
    for name in (
        "negative",
        "clip-skip",
        "pag",
        "rescale",
        "picture",
        "mask",
        "upscaled",
        "upscaled-latents",
        "template",
    ):
        yield f"sdxl/{name}", [paint("a (cat:1.2)", *FEATURES[name], model=f"{IN}/sdxl")]
    more: dict[str, tuple[str, ...]] = {
        "plain": (),
        "embedding": ("--embedding", f"{IN}/pomme.safetensors=cat"),
        "lora": ("--lora", f"{IN}/sdxl-lora.safetensors:0.7"),
        "control": ("--control", f"canny:{IN}/control-sdxl={IN}/c.png:0.8"),
        "ip": ("--ip-adapter", f"{IN}/ip-sdxl/plain.safetensors={IN}/a.png:0.6"),
        "refined": ("--refiner", f"{IN}/refiner", "--steps", "5"),
        "refined-early": (
            "--refiner",
            f"{IN}/refiner",
            "--refiner-start",
            "0.5",
            "--scheduler",
            "ddim",
            "--steps",
            "5",
        ),
        "refined-negative": (
            "--refiner",
            f"{IN}/refiner",
            "--steps",
            "5",
            "--negative-prompt",
            "a dog",
            "--clip-skip",
            "2",
        ),
    }
    for name, arguments in more.items():
        yield f"sdxl/{name}", [paint(PROMPTS["weights"], *arguments, model=f"{IN}/sdxl")]
    yield "sdxl/composed", [paint(PROMPTS["all"], model=f"{IN}/sdxl")]
    for name in (
        "negative",
        "clip-skip",
        "unguided",
        "interval",
        "rescale",
        "picture",
        "mask",
        "upscaled",
        "variation",
    ):
        yield f"sd3/{name}", [paint("a (cat:1.2)", *FEATURES[name], model=f"{IN}/sd3")]
    yield "sd3/plain", [paint(CAT, model=f"{IN}/sd3")]
    yield "sd3/long", [paint(PROMPTS["all"], model=f"{IN}/sd3")]
    yield "sd3/without-t5", [paint(CAT, model=f"{IN}/sd3-without-t5")]
    for name in ("mask", "blurred-mask", "extended", "inverted-mask"):
        yield f"inpainting/{name}", [paint(CAT, *FEATURES[name], model=f"{IN}/inpainting")]
    for name in ("grey", "colour", "latents"):
        for scheduler in ("ddim", "ddpm", "euler-a"):
            yield f"{name}/{scheduler}", [paint(None, "--scheduler", scheduler, model=f"{IN}/{name}")]
    yield "colour/picture", [paint(None, "--init-image", f"{IN}/c.png", "--strength", "0.7", model=f"{IN}/colour")]
    yield "colour/upscaled", [paint(None, "--upscale", "2x:0.5", "--scheduler", "ddim", model=f"{IN}/colour")]
    for name in ANIMALS:
        yield f"classes/{name}", [paint(name, "--guidance-scale", "3", model=f"{IN}/classes")]
    yield "classes/negative", [paint("cat", "--guidance-scale", "3", "--negative-prompt", "dog", model=f"{IN}/classes")]


def batches() -> Iterator[tuple[str, list[Command]]]:
    """Several pictures a case, and what is written beside them."""
    yield "batch/three", [paint(CAT, "-n", "3", "--batch-size", "3")]
    yield "batch/one-at-once", [paint(CAT, "-n", "3", "--batch-size", "1")]
    yield "batch/noisy", [paint(CAT, "-n", "3", "--batch-size", "3", "--scheduler", "euler-a", *FEATURES["mask"])]
    yield (
        "batch/prompts",
        [paint(None, "--prompts-file", f"{IN}/prompts.txt", "--batch-size", "2", "-o", "{index}.png")],
    )
    yield "batch/jobs", [paint_jobs(f"{IN}/jobs.jsonl", "-o", "{index}.png")]
    yield "batch/table", [paint_jobs(f"{IN}/jobs.csv", "-o", "{index:03}-{seed}-{prompt}.png")]
    yield "batch/resumed", [paint(None, "--prompts-file", f"{IN}/prompts.txt", "--resume", "-o", "{index}.png")] * 2
    yield "batch/wildcards", [paint("a {red|blue} __animals__", "-n", "3", "--wildcards", f"{IN}/wildcards")]
    yield (
        "batch/choices",
        [paint("{2$$cat|dog|owl} in {snow|rain}", "-n", "2", "--dynamic-prompts", "--batch-size", "2")],
    )
    yield "batch/combinations", [paint("a {red|blue} {cat|dog}", "--all-combinations", "--batch-size", "4")]
    yield (
        "batch/sweep",
        [paint(CAT, "--sweep", "guidance-scale=1..5x3", "--sweep", "scheduler=ddim,euler", "--batch-size", "3")],
    )
    yield "batch/sdxl", [paint(None, "--prompts-file", f"{IN}/prompts.txt", "--batch-size", "3", model=f"{IN}/sdxl")]
    yield "batch/sd3", [paint(None, "--prompts-file", f"{IN}/prompts.txt", "--batch-size", "3", model=f"{IN}/sd3")]
    yield "batch/control", [paint(CAT, *OF_SD1["control-guess"], "-n", "2", "--batch-size", "2")]
    yield "batch/ip", [paint(CAT, *OF_SD1["ips"], "-n", "2", "--batch-size", "2")]
    yield "batch/syntax", [[*paint(PROMPTS["all"], "--batch-size", "4", "-n", "2"), CAT]]
    yield "format/jpeg", [paint(CAT, "--format", "jpeg")]
    yield "format/webp", [paint(CAT, "-o", "cat.webp")]
    yield "format/without-metadata", [paint(CAT, "--no-metadata", "-o", "cat.png")]
    yield "beside/trace", [paint(CAT, "--trace", "3", "--steps", "4", "-o", "cat.png")]
    yield (
        "beside/trace-of-two-passes",
        [paint(CAT, "--trace", "all", "--upscale", "2x:0.7", "--trace-format", "webp", "-o", "cat.png")],
    )
    yield "beside/heatmap", [paint("a red fox in snow", "--heatmap", "fox,snow", "-o", "cat.png")]
    yield (
        "beside/all-words",
        [paint("a (red:1.2) fox", "--heatmap", "all", "--trace", "2", "-o", "cat.png", model=f"{IN}/sdxl")],
    )
    yield (
        "beside/batch",
        [paint("a fox", "-n", "2", "--batch-size", "2", "--heatmap", "fox", "--trace", "2", "-o", "{seed}.png")],
    )
    yield "beside/preview", [paint(CAT, "--preview", "preview.png", "-o", "cat.png")]
    yield (
        "from/picture",
        [paint(CAT, *FEATURES["picture"], "-o", "a.png"), ["generate", "--from", "a.png", "-o", "b.png", *PLAIN]],
    )
    yield (
        "from/changed",
        [
            paint(CAT, *OF_SD1["lora-kohya"], "-o", "a.png"),
            ["generate", "--from", "a.png", "--without", "lora", "--steps", "2", "-o", "b.png", *PLAIN],
        ],
    )
    yield "from/verified", [paint(CAT, "-o", "a.png"), ["generate", "--from", "a.png", "--verify", *PLAIN]]


def paint_jobs(file: str, *arguments: str) -> Command:
    """Requests of a file, which say their own models and sizes."""
    fixed = ["--width", "64", "--height", "64"] if file.endswith(".csv") else []
    model = [] if file.endswith(".jsonl") else ["-m", f"{IN}/sd1"]
    defaults = (
        [*model, "--seed", "1", "--steps", "3", "--batch-size", "2"] if fixed else ["--seed", "1", "--batch-size", "2"]
    )
    return ["generate", "--prompts-file", file, *defaults, *fixed, *arguments, *PLAIN]


def latents() -> Iterator[tuple[str, list[Command]]]:
    """`encode`, `decode`, `noise`, `control-map`, `grid`, `tokens`."""
    sd1 = ["-m", f"{IN}/sd1", *PLAIN]
    pictures = [f"{IN}/{name}.png" for name in "abcd"]
    yield "encode/mean", [["encode", *pictures, *sd1]]
    yield "encode/sampled", [["encode", *pictures, "--sample", "--seed", "5", *sd1]]
    yield "encode/packed", [["encode", *pictures, "--size", "64x48", "--pack", "-o", "all.safetensors", *sd1]]
    yield "encode/batched", [["encode", *pictures, "--size", "64x48", "--fit", "pad", "--batch-size", "3", *sd1]]
    yield "encode/half", [["encode", f"{IN}/c.png", "--half", "--check", *sd1]]
    yield "encode/stretched", [["encode", f"{IN}/d.png", "--size", "64x64", "--fit", "stretch", *sd1]]
    yield "encode/sd3", [["encode", f"{IN}/c.png", "-m", f"{IN}/sd3", *PLAIN]]
    yield "encode/starter", [["encode", f"{IN}/c.png", *PLAIN]]
    encode, packed = (
        ["encode", f"{IN}/c.png", "-o", "c.safetensors"],
        ["encode", *pictures, "--size", "64x48", "--pack"],
    )
    yield "decode/one", [[*encode, *sd1], ["decode", "c.safetensors", "-o", "c.png", *sd1]]
    yield "decode/packed", [[*packed, "-o", "all.safetensors", *sd1], ["decode", "all.safetensors", *sd1]]
    yield "decode/numpy", [["decode", f"{IN}/latents.npy", "--scaled", *sd1]]
    yield "decode/tiled", [["decode", f"{IN}/latents.npy", "--unscaled", "--tile", *sd1]]
    yield (
        "decode/sd3",
        [
            [*encode, "-m", f"{IN}/sd3", *PLAIN],
            ["decode", "c.safetensors", "--format", "webp", "-m", f"{IN}/sd3", *PLAIN],
        ],
    )
    yield "decode/and-paint", [[*encode, *sd1], paint(CAT, "--init-image", "c.safetensors", "--strength", "0.5")]
    yield "noise/steps", [["noise", f"{IN}/c.png", "-o", "n.png", "--steps", "4", "--json", *sd1]]
    yield (
        "noise/at",
        [["noise", f"{IN}/c.png", "-o", "n.png", "--at", "0,100,999", "--seed", "3", "-m", f"{IN}/sd2", *PLAIN]],
    )
    yield "noise/pixels", [["noise", f"{IN}/c.png", "-o", "n.png", "--steps", "3", "-m", f"{IN}/grey", *PLAIN]]
    for how in ("canny", "scribble", "softedge", "blur", "tile", "palette", "depth"):
        yield f"map/{how}", [["control-map", how, f"{IN}/d.png", "-o", "map.png", "--size", "64x64", "-q"]]
    yield "map/own-size", [["control-map", "canny", f"{IN}/d.png", "-o", "map.png", "-q"]]
    two = paint(CAT, "--sweep", "scheduler=ddim,euler", "--outdir", "two")
    yield "grid/labels", [two, ["grid", "two", "-o", "sheet.png", "--columns", "2", "-q"]]
    yield "grid/plain", [["grid", *pictures, "-o", "sheet.png", "--label", "none", "--enlarge", "2", "-q"]]
    yield (
        "info/watermark",
        [paint(CAT, *FEATURES["watermark"], "-o", "a.png"), ["info", "a.png", "--watermark", "--json"]],
    )
    yield "info/stripped", [paint(CAT, "-o", "a.png"), ["info", "a.png", "--strip", "-q"]]


def trainings() -> Iterator[tuple[str, list[Command]]]:
    """Two steps each."""
    shared = ["--max-train-steps", "2", "--train-batch-size", "2", "--device", "cpu", "--checkpointing-steps", "2"]
    shared += ["--lr", "1e-3", "-o", "run", "-q"]
    cached = ["--cache-dir", "../../cache"]
    sampled = ["--sample-every-n-steps", "2", "--sample-prompt", CAT, "--sample-steps", "2"]
    never = ["--sample-every-n-steps", "1000000"]

    def unet(*arguments: str, model: str = "tiny") -> Command:
        return ["train-unet", f"{IN}/pictures", "-m", model, *shared, *cached, *sampled, *arguments]

    yield "train-unet/plain", [unet(), paint(CAT, model="run")]
    yield "train-unet/lora", [unet("--rank", "2", "--lora-alpha", "3", "--lora-dropout", "0.1")]
    yield "train-unet/ema", [unet("--use-ema", "--gradient-accumulation-steps", "2", "--train-batch-size", "1")]
    yield "train-unet/text", [unet("--train-text-encoder", "--text-encoder-lr", "1e-4")]
    yield (
        "train-unet/objective",
        [
            unet(
                *(
                    "--snr-gamma",
                    "5",
                    "--noise-offset",
                    "0.1",
                    "--input-perturbation",
                    "0.1",
                    "--random-crop",
                    "--random-flip",
                )
            )
        ],
    )
    yield (
        "train-unet/captions",
        [unet("--shuffle-caption", "--keep-tokens", "1", "--caption-prefix", "x, ", "--enable-bucket")],
    )
    yield "train-unet/muon", [unet("--optimizer", "muon", "--lr-scheduler", "cosine", "--mixed-precision", "bf16")]
    yield (
        "train-unet/resumed",
        [
            unet("--max-train-steps", "1", "--checkpointing-steps", "1"),
            ["train-unet", "--resume", "-o", "run", "--max-train-steps", "2", "-q"],
        ],
    )
    yield "train-unet/v-prediction", [unet(*never, model=f"{IN}/sd2")]
    yield (
        "train-unet/classes",
        [
            [
                *(
                    "train-unet",
                    f"{IN}/by-class",
                    "--space",
                    "pixel",
                    "--from-scratch",
                    f"{IN}/classes/unet/config.json",
                ),
                *("--class-conditional", *shared, *cached, "--resolution", "16", *sampled, "--sample-prompt", "cat"),
            ]
        ],
    )
    yield (
        "train-unet/pixels",
        [
            [
                *("train-unet", f"{IN}/small", "--space", "pixel", "--from-scratch", f"{IN}/colour/unet/config.json"),
                *("--unconditional", *shared, *cached, "--resolution", "16", "--sample-every-n-steps", "2"),
            ]
        ],
    )
    vae = ["train-vae", f"{IN}/pictures", *shared, *cached, "--resolution", "32", "--sample-every-n-steps", "2"]
    yield "train-vae/plain", [[*vae, "-m", f"{IN}/sd1"]]
    yield "train-vae/discriminator", [[*vae, "-m", "tiny", "--discriminator", "--discriminator-channels", "4"]]
    yield "train-vae/small", [[*vae, "--from-scratch", f"{IN}/small-vae/vae/config.json"]]
    text = ["train-text-encoder", f"{IN}/captions.txt", *shared, *cached, "--vocab-size", "520", "--max-length", "16"]
    text += ["--hidden-size", "32", "--num-hidden-layers", "2", "--num-attention-heads", "2", "--train-batch-size", "4"]
    yield "train-text/distil", [[*text, "--teacher", f"{IN}/teacher.safetensors", "--objective", "distil"]]
    yield (
        "train-text/align",
        [["train-text-encoder", f"{IN}/pictures", *shared, *cached, "-m", f"{IN}/sd1", "--objective", "align"]],
    )
    control = ["train-controlnet", f"{IN}/pictures", "-m", "tiny", *shared, *cached, *sampled]
    yield "train-controlnet/canny", [[*control, "--preprocessor", "canny"]]


SINGLE_FILES: dict[str, tuple[str, list[Command]]] = {
    "file/sd1": ("whole-sd1", [paint(CAT, model=f"{IN}/sd1-file.safetensors")]),
    "file/sd2": ("whole-sd2", [paint(CAT, model=f"{IN}/sd2-file.safetensors")]),
    "file/sdxl": ("whole-sdxl", [paint(CAT, model=f"{IN}/sdxl-file.safetensors")]),
    "file/control": (
        "whole-sd1",
        [paint(CAT, "--control", f"{IN}/control-file.safetensors={IN}/c.png", model=f"{IN}/sd1-file.safetensors")],
    ),
    "file/inverted": (
        "whole-sd1",
        [paint(CAT, *FEATURES["inverted-mask"], *FEATURES["clip-skip"], model=f"{IN}/sd1-file.safetensors")],
    ),
}
"""Case -> the folder whose configurations stand in for the shipped ones, and the commands."""


def all_cases() -> dict[str, list[Command]]:
    single = {name: commands for name, (_, commands) in SINGLE_FILES.items()}
    return {**dict(requests()), **dict(batches()), **dict(latents()), **single, **dict(trainings())}


# Running them


def run_case(name: str, commands: list[Command], root: Path) -> Outcome:
    """Run a case in a folder of its own; the exit code of each command, and the digests of the files."""
    here = root / "cases" / name.replace("/", "-").replace(" ", "-")
    here.mkdir(parents=True)
    os.chdir(here)
    with configurations(root / "in", SINGLE_FILES[name][0] if name in SINGLE_FILES else None):
        codes = [run(command) for command in commands]
        files = digests(here, root)
    os.chdir(root)
    return {"codes": codes, "files": files}


def run(command: Command) -> int:
    """The exit code of one command line, run in this process."""
    return invoke(command)[0]


def invoke(command: Command) -> tuple[int, str]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    fresh_accelerator()
    torch.manual_seed(0)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            code = command_line().main(command, prog_name="sdcli", standalone_mode=False) or 0
    except (Exception, SystemExit) as error:
        code = getattr(error, "exit_code", getattr(error, "code", 1))
        print(f"{command}: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return int(code), said.getvalue()


@cache
def command_line() -> Any:
    """The commands, whose options typer takes a third of a second to make."""
    return get_command(app)


def fresh_accelerator() -> None:
    """accelerate keeps one state per process, and refuses another precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def configurations(folder: Path, model: str | None) -> Iterator[None]:
    """Let single files have the configurations of a miniature."""
    if model is None:
        yield
        return
    configs = {file.parent.name: json.loads(file.read_text()) for file in (folder / model).glob("*/*config.json")}
    if model == "whole-sd1":
        configs = {part: config for part, config in configs.items() if part != "tokenizer"}
    module, attribute = SHIPPED_CONFIGS
    before: Callable[..., Any] = getattr(module, attribute)
    setattr(module, attribute, lambda *_: configs)
    try:
        yield
    finally:
        setattr(module, attribute, before)


def digests(folder: Path, root: Path) -> dict[str, Any]:
    """File -> its digests; links are named and not followed.

    The digest in the name of a merged model is left out: it depends on the paths that the checkpoint records.
    """
    found: dict[str, Any] = {}
    for parent, folders, files in os.walk(folder):
        for name in [*files, *(one for one in folders if (Path(parent) / one).is_symlink())]:
            path = Path(parent) / name
            found[path.relative_to(folder).as_posix()] = "link" if path.is_symlink() else digest(path)
    for name, request in requests_in([name for name, one in found.items() if "pixels" in one], root).items():
        found[name]["request"] = request
    return dict(
        sorted((re.sub(r"/merged-(\d+)-[0-9a-f]{12}/", r"/merged-\1/", name), one) for name, one in found.items())
    )


def digest(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return {"tensors": tensors_digest(load_file(path))}
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            numbers = {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "fiu"}
            return {"tensors": tensors_digest(numbers)}
    return {"pixels": pixels_digest(path)} if path.suffix.lower() in PICTURES else "named"


def pixels_digest(path: Path) -> str:
    """Of all frames."""
    summed = hashlib.sha256()
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            summed.update(f"{frame.width}x{frame.height}".encode() + frame.convert("RGBA").tobytes())
    return summed.hexdigest()[:32]


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """By the names without `text_model.`, which the text encoders in files have for older versions of other tools."""
    summed = hashlib.sha256()
    for name, tensor in sorted((name.removeprefix("text_model."), tensor) for name, tensor in tensors.items()):
        summed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        summed.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return summed.hexdigest()[:32]


def requests_in(pictures: list[str], root: Path) -> dict[str, str | None]:
    """Picture -> the digest of what `sdcli info` says under `request`; None where the picture says nothing."""
    if not pictures:
        return {}
    _, said = invoke(["info", *pictures, "--json"])
    shown = [json.loads(line) for line in said.splitlines()]
    return {one["path"]: request_digest(one["request"], root) for one in shown if "request" in one}


def request_digest(request: dict[str, Any] | None, root: Path) -> str | None:
    if request is None:
        return None
    text = json.dumps(request, sort_keys=True).replace(str(root), "ROOT")
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def outcomes(root: Path, *, only: str | None = None, times: bool = False) -> dict[str, Outcome]:
    """Make the inputs and run the cases, or those whose name begins with `only`."""
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "HF_HOME"):
        os.environ[name] = str(root / "home" / name.lower())
        Path(os.environ[name]).mkdir(parents=True)
    for name in ("HF_HUB_CACHE", "SDCLI_MODELS_FILE"):
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    began = time.monotonic()
    make_inputs(root / "in")
    found = {}
    for name, commands in all_cases().items():
        if only is None or name.startswith(only):
            before = time.monotonic()
            found[name] = run_case(name, commands, root)
            if times:
                print(f"{time.monotonic() - before:6.2f} s {name}", file=sys.stderr)
    if times:
        print(f"{time.monotonic() - began:6.2f} s in all, {len(found)} cases", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="an empty folder to work in")
    parser.add_argument("--only", help="the cases whose names begin so")
    parser.add_argument("--times", action="store_true", help="tell the seconds of each case on stderr")
    parser.add_argument("--write", action="store_true", help=f"record the outcomes in {RECORDED.name}")
    asked = parser.parse_args()
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as temporary:
        found = outcomes(asked.folder or Path(temporary), only=asked.only, times=asked.times)
        os.chdir(here)
    if asked.write:
        every = json.loads(RECORDED.read_text())
        kept = every.get(vendor(), {}) if asked.only is not None else {}
        RECORDED.write_text(json.dumps({**every, vendor(): {**kept, **found}}, indent=1, sort_keys=True) + "\n")
    else:
        print(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
