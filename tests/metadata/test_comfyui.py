"""ComfyUI's records: graphs are followed from the saved image, and what is not taken over is named."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdcli.cli.info import _described
from sdcli.cli.options.from_image import recorded_fields
from sdcli.cli.ui.console import Console
from sdcli.metadata.read import read_image, read_tool_record
from sdcli.metadata.tool_record import ToolRecord
from sdcli.request.fields import LoraRef, Upscale
from sdcli.request.schema import GenerationRequest

CASES = Path(__file__).parent.parent / "cases" / "generation"
MODEL = {"model": "someModel.safetensors"}


def graph(**changed: Any) -> dict[str, Any]:
    nodes = {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 42, "steps": 20, "cfg": 8.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0,
                "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
            },
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog", "clip": ["4", 1]}},
        "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "ink", "model": ["4", 0], "clip": ["4", 1]}},
    }  # fmt: skip
    return nodes | changed


def read_graph(nodes: Any) -> ToolRecord:
    found = read_tool_record({"prompt": json.dumps(nodes)})
    assert found is not None
    assert found.tool == "comfyui"
    return found


def test_a_comfyui_graph_is_followed_from_its_sampler() -> None:
    found = read_graph(graph())
    assert found.request == GenerationRequest(
        prompt="a cat", negative_prompt="a dog", prompt_template="{prompt}", seed=42, width=512, height=768, steps=20,
        guidance_scale=8.0, scheduler="dpmpp-2m-karras",
    )  # fmt: skip
    assert found.unmapped == {"model": "v1-5.safetensors", "loras": ["ink"]}


def test_comfyui_texts_are_found_through_other_nodes_and_links() -> None:
    nodes = graph()
    nodes["3"]["inputs"] |= {"positive": ["20", 0], "negative": ["20", 1], "seed": ["22", 0]}
    nodes["20"] = {"class_type": "ControlNetApplyAdvanced", "inputs": {"positive": ["21", 0], "negative": ["7", 0]}}
    nodes["21"] = {"class_type": "ConditioningSetArea", "inputs": {"conditioning": ["6", 0]}}
    nodes["22"] = {"class_type": "PrimitiveInt", "inputs": {"value": 99}}
    nodes["6"]["inputs"]["text"] = ["23", 0]
    nodes["23"] = {"class_type": "PrimitiveString", "inputs": {"value": "a linked cat"}}
    request = read_graph(nodes).request
    assert (request.prompt, request.negative_prompt, request.seed) == ("a linked cat", "a dog", 99)


def test_of_two_comfyui_samplers_the_one_with_the_empty_latent_counts() -> None:
    nodes = graph()
    second = {**nodes["3"]["inputs"], "seed": 1, "denoise": 0.5, "latent_image": ["3", 0]}
    found = read_graph({"1": {"class_type": "KSampler", "inputs": second}, **nodes})
    assert found.request.seed == 42
    assert found.unmapped["other_samplers"] == ["1"]


def test_comfyui_graphs_that_do_not_map_leave_what_they_are() -> None:
    nodes = graph()
    nodes["3"]["inputs"] |= {"sampler_name": "res_multistep", "denoise": 0.6, "seed": 2**64 - 1, "positive": ["9", 0]}
    found = read_graph(nodes)
    assert found.request.scheduler is None
    assert found.unmapped | {"sampler_name": "res_multistep", "denoise": 0.6} == found.unmapped
    assert found.unmapped["seed"] == 2**64 - 1
    assert found.unmapped["positive"] == "not known: it is linked to node 9, which is missing"
    assert read_graph({"1": {"class_type": "SomethingElse", "inputs": {}}}).request is None


def test_a_comfyui_graph_that_goes_in_circles_ends() -> None:
    nodes = graph()
    nodes["3"]["inputs"] |= {"positive": ["30", 0], "model": ["30", 0], "seed": ["30", 0]}
    loop = ["30", 0]
    nodes["30"] = {"class_type": "Reroute", "inputs": {"conditioning": loop, "model": loop, "seed": loop}}
    assert read_graph(nodes).request.seed is None


# The files of the cases


@pytest.mark.parametrize(
    ("name", "fields", "unmapped"),
    [
        ("nan_list", {}, {}),
        ("clip_last_layer", {"clip_skip": 2}, {}),
        (
            "controlnet",
            {},
            {
                "ControlNetApplyAdvanced": {"strength": 0.8, "start_percent": 0.0, "end_percent": 1.0},
                "ControlNetLoader": {"control_net_name": "edges.safetensors"},
                "LoadImage": {"image": "pose.png"},
            },
        ),
        ("string_replace", {"prompt": "a red lighthouse"}, {}),
        ("two_samplers", {"prompt": "a castle", "seed": 999, "steps": 30, "guidance_scale": 5.0}, {}),
        (
            "sampler_custom",
            {"scheduler": "euler-a", "guidance_scale": 1.0, "negative_prompt": None},
            {"negative_prompt": "blurry"},
        ),
    ],
)
def test_the_files_of_the_cases_are_read(name: str, fields: dict[str, Any], unmapped: dict[str, Any]) -> None:
    info = read_image(CASES / f"comfy_{name}.png")
    plain = {
        "prompt": "a lighthouse at dusk", "negative_prompt": "blurry", "prompt_template": "{prompt}", "seed": 4242,
        "steps": 22, "width": 512, "height": 640, "guidance_scale": 6.5, "scheduler": "euler",
    }  # fmt: skip
    assert info.source == "comfyui"
    assert info.request == GenerationRequest(**{**plain, **fields})
    assert info.unmapped == MODEL | unmapped


# What graphs are made of


def saved(**changed: Any) -> dict[str, Any]:
    """A graph whose image is decoded and saved."""
    decode = {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}}
    save = {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "x"}}
    return graph(**{"8": decode, "9": save, **changed})


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def test_loras_are_taken_over_with_the_weights_of_the_chains_that_they_are_in() -> None:
    nodes = saved(
        **{
            "10": node("LoraLoader", lora_name="a/ink.safetensors", strength_model=0.8, strength_clip=0.5,
                       model=["11", 0], clip=["4", 1]),
            "11": node("LoraLoaderModelOnly", lora_name="oil.safetensors", strength_model=-1, model=["4", 0]),
            "6": node("CLIPTextEncode", text="a cat", clip=["10", 1]),
            "7": node("CLIPTextEncode", text="a dog", clip=["10", 1]),
        }
    )  # fmt: skip
    found = read_graph(nodes)
    assert found.request.loras == (
        LoraRef(path="oil", unet_weight=-1.0, text_weight=0.0),
        LoraRef(path="ink", unet_weight=0.8, text_weight=0.5),
    )
    nodes["7"]["inputs"]["clip"] = ["4", 1]  # for the prompt alone, which there is no field for
    found = read_graph(nodes)
    assert [lora.path for lora in found.request.loras] == ["oil"]
    assert found.unmapped["LoraLoader"] == {
        "lora_name": "a/ink.safetensors", "strength_model": 0.8, "strength_clip": 0.5
    }  # fmt: skip


def test_a_power_lora_loader_is_taken_over_without_what_is_off() -> None:
    nodes = saved()
    nodes["10"] = node(
        "Power Lora Loader (rgthree)",
        lora_1={"on": True, "lora": "ink.safetensors", "strength": 0.7},
        lora_2={"on": False, "lora": "oil.safetensors", "strength": 1},
        model=["4", 0],
    )
    found = read_graph(nodes)
    assert found.request.loras == (LoraRef(path="ink", unet_weight=0.7, text_weight=0.0),)
    assert list(found.unmapped["Power Lora Loader (rgthree)"]) == ["lora_2"]


def test_an_enlarged_second_pass_is_an_upscale_and_what_differs_is_named() -> None:
    nodes = saved()
    nodes["20"] = node(
        "LatentUpscale", upscale_method="bislerp", width=768, height=1152, crop="disabled", samples=["3", 0]
    )
    nodes["21"] = node("KSampler", **nodes["3"]["inputs"] | {"denoise": 0.5, "latent_image": ["20", 0], "steps": 10})
    nodes["8"]["inputs"]["samples"] = ["21", 0]
    found = read_graph(nodes)
    assert (found.request.seed, found.request.steps, found.request.width) == (42, 20, 512)
    assert found.request.upscale == Upscale(factor=1.5, strength=0.5, how="latent")
    assert found.unmapped["other_samplers"] == ["21"]
    assert found.unmapped["LatentUpscale"] == {"upscale_method": "bislerp", "crop": "disabled"}
    assert "KSampler" not in found.unmapped  # all is as in the first pass
    nodes["21"]["inputs"] |= {"positive": ["22", 0], "cfg": 5.0}
    nodes["22"] = node("CLIPTextEncode", text="more detail", clip=["4", 1])
    found = read_graph(nodes)
    assert found.request.prompt == "a cat"
    assert found.unmapped["KSampler"] == {"cfg": 5.0}
    assert found.unmapped["CLIPTextEncode"] == {"text": "more detail"}


def test_a_sampler_that_begins_with_noise_is_the_first_whatever_its_latent_is() -> None:
    nodes = saved()
    nodes["21"] = node(
        "KSampler", **nodes["3"]["inputs"] | {"latent_image": ["3", 0], "seed": 7, "positive": ["22", 0]}
    )
    nodes["22"] = node("CLIPTextEncode", text="a boat", clip=["4", 1])
    nodes["8"]["inputs"]["samples"] = ["21", 0]
    found = read_graph(nodes)
    assert (found.request.prompt, found.request.seed, found.request.width) == ("a boat", 7, None)


def test_a_base_model_and_its_refiner_are_read_as_far_as_they_map() -> None:
    steps = {"steps": 25, "cfg": 7, "sampler_name": "euler", "scheduler": "normal", "negative": ["7", 0]}
    nodes = saved(
        **{
            "3": node("KSamplerAdvanced", add_noise="enable", noise_seed=5, start_at_step=0, end_at_step=20,
                      return_with_leftover_noise="enable", model=["4", 0], positive=["6", 0], latent_image=["5", 0],
                      **steps),
            "21": node("KSamplerAdvanced", add_noise="disable", noise_seed=0, start_at_step=20, end_at_step=10000,
                       return_with_leftover_noise="disable", model=["23", 0], positive=["6", 0], latent_image=["3", 0],
                       **steps),
            "23": node("CheckpointLoaderSimple", ckpt_name="refiner.safetensors"),
        }
    )  # fmt: skip
    nodes["8"]["inputs"]["samples"] = ["21", 0]
    found = read_graph(nodes)
    assert (found.request.seed, found.request.steps, found.request.guidance_scale) == (5, 25, 7.0)
    assert found.unmapped["model"] == "v1-5.safetensors"
    assert found.unmapped["end_at_step"] == 20
    assert found.unmapped["KSamplerAdvanced"]["start_at_step"] == 20
    assert found.unmapped["CheckpointLoaderSimple"] == {"ckpt_name": "refiner.safetensors"}


def test_where_the_image_may_be_from_two_samplers_only_what_is_the_same_is_taken_over() -> None:
    nodes = saved()
    nodes["21"] = node("KSampler", **nodes["3"]["inputs"] | {"seed": 7})
    nodes["22"] = node("VAEDecode", samples=["21", 0], vae=["4", 2])
    nodes["23"] = node("SaveImage", images=["22", 0], filename_prefix="y")
    found = read_graph(nodes)
    assert (found.request.prompt, found.request.steps, found.request.seed) == ("a cat", 20, None)
    assert found.unmapped["seed"] == [42, 7]
    assert "3, 21" in found.unmapped["sampler"]


def test_two_texts_of_sdxl_and_other_sizes_are_named() -> None:
    nodes = saved()
    sizes = {"width": 512, "height": 768, "crop_w": 0, "crop_h": 0, "target_width": 1024, "target_height": 768}
    nodes["6"] = node("CLIPTextEncodeSDXL", text_g="a cat", text_l="fur", clip=["4", 1], **sizes)
    found = read_graph(nodes)
    assert found.request.prompt == "a cat"
    assert found.unmapped["CLIPTextEncodeSDXL"] == {"text_l": "fur", "target_width": 1024}
    nodes["6"]["inputs"] |= {"text_l": "a cat", "target_width": 512}
    assert "CLIPTextEncodeSDXL" not in read_graph(nodes).unmapped


def test_combined_prompts_become_and_joined_ones_break() -> None:
    nodes = saved(**{"12": node("CLIPTextEncode", text="a [b] AND c", clip=["4", 1])})
    nodes["3"]["inputs"]["positive"] = ["11", 0]
    nodes["11"] = node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["12", 0])
    found = read_graph(nodes)
    assert found.request.prompt == "a cat :0.5 AND a \\[b\\] A\\ND c :0.5"
    assert found.unmapped["prompt_syntax"] == "plain text in ComfyUI, so escaped in the prompts: AND, [ ]"
    nodes["11"] = node("ConditioningConcat", conditioning_to=["6", 0], conditioning_from=["12", 0])
    assert read_graph(nodes).request.prompt == "a cat BREAK a \\[b\\] A\\ND c"


def test_mixed_and_bounded_prompts_are_named_and_not_made_up() -> None:
    nodes = saved(**{"12": node("CLIPTextEncode", text="a boat", clip=["4", 1])})
    nodes["3"]["inputs"]["positive"] = ["11", 0]
    nodes["11"] = node(
        "ConditioningAverage", conditioning_to=["6", 0], conditioning_from=["12", 0], conditioning_to_strength=0.7
    )
    found = read_graph(nodes)
    assert (found.request.prompt, found.unmapped["positive"]) == ("", ["a cat", "a boat"])
    assert found.unmapped["ConditioningAverage"] == {"conditioning_to_strength": 0.7}
    nodes["11"] = node("ConditioningCombine", conditioning_1=["13", 0], conditioning_2=["12", 0])
    nodes["13"] = node("ConditioningSetArea", conditioning=["6", 0], width=256, height=256, x=0, y=0, strength=1.0)
    found = read_graph(nodes)
    assert (found.request.prompt, found.unmapped["positive"]) == ("", ["a cat", "a boat"])
    nodes["11"] = node("FooMix", conditioning_1=["6", 0], conditioning_2=["12", 0])
    assert read_graph(nodes).request.prompt == ""


@pytest.mark.parametrize(
    "text",
    [
        node("DPRandomGenerator", text="{a|b} cat", seed=3),
        node("RegexReplace", string="a cat", regex_pattern="(a+)+$", replace="b"),
        node("StringFunction|pysssss", action="append", tidy_tags="yes", text_a="a", text_b="cat"),
        node("Text Multiline", text="# a cat\na dog"),
        node("ImpactWildcardProcessor", populated_text="__cats__", wildcard_text="__cats__", seed=1),
        node("StringReplace", string=["99", 0], find="a", replace="b"),
    ],
)
def test_a_text_that_is_not_certain_is_named_and_is_no_prompt(text: dict[str, Any]) -> None:
    nodes = saved(**{"20": text})
    nodes["6"]["inputs"]["text"] = ["20", 0]
    found = read_graph(nodes)
    assert found.request.prompt == ""
    assert found.unmapped["positive"].startswith("not known: its text is from node")
    assert text["class_type"] in found.unmapped


def test_texts_that_double_each_other_stay_small() -> None:
    nodes = saved(**{"100": node("PrimitiveString", value="ha" * 100)})
    for number in range(101, 150):
        before = [str(number - 1), 0]
        nodes[str(number)] = node("StringConcatenate", string_a=before, string_b=before, delimiter="")
    nodes["6"]["inputs"]["text"] = ["149", 0]
    found = read_graph(nodes)
    assert found.request.prompt == ""
    assert "too long" in found.unmapped["positive"]


def test_a_sampler_of_parts_is_read_from_its_nodes() -> None:
    nodes = saved(
        **{
            "3": node("SamplerCustomAdvanced", noise=["30", 0], guider=["31", 0], sampler=["32", 0], sigmas=["33", 0],
                      latent_image=["5", 0]),
            "30": node("RandomNoise", noise_seed=6),
            "31": node("BasicGuider", model=["34", 0], conditioning=["35", 0]),
            "32": node("KSamplerSelect", sampler_name="euler"),
            "33": node("BasicScheduler", scheduler="simple", steps=4, denoise=1.0, model=["34", 0]),
            "34": node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default"),
            "35": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
        }
    )  # fmt: skip
    found = read_graph(nodes)
    assert found.request == GenerationRequest(
        prompt="a cat", prompt_template="{prompt}", seed=6, steps=4, width=512, height=768, guidance_scale=1.0
    )
    assert found.unmapped == {
        "model": "flux.safetensors", "sampler_name": "euler", "scheduler": "simple", "FluxGuidance": {"guidance": 3.5},
        "CheckpointLoaderSimple": {"ckpt_name": "v1-5.safetensors"},
    }  # fmt: skip
    nodes["33"] = node("KarrasScheduler", steps=9, sigma_max=14.614642, sigma_min=0.0291675, rho=7.0)
    nodes["32"]["inputs"]["sampler_name"] = "dpmpp_2m"
    nodes["35"]["class_type"] = "FooPatch"
    assert (read_graph(nodes).request.scheduler, read_graph(nodes).request.steps) == ("dpmpp-2m-karras", 9)
    nodes["33"]["inputs"]["rho"] = 5.0
    found = read_graph(nodes)
    assert found.request.scheduler is None
    assert found.unmapped["KarrasScheduler"]["rho"] == 5.0


def test_an_image_of_an_image_names_the_file_and_the_strength() -> None:
    nodes = saved(**{"5": node("VAEEncode", pixels=["40", 0], vae=["4", 2]), "40": node("LoadImage", image="a.png")})
    nodes["3"]["inputs"]["denoise"] = 0.6
    found = read_graph(nodes)
    assert (found.request.width, found.request.strength) == (None, None)
    assert (found.unmapped["denoise"], found.unmapped["LoadImage"]) == (0.6, {"image": "a.png"})


def test_what_has_no_effect_without_guidance_is_named_as_sdcli_refuses_it() -> None:
    nodes = saved()
    nodes["3"]["inputs"] |= {"cfg": 1.0, "model": ["50", 0]}
    nodes["50"] = node("RescaleCFG", multiplier=0.7, model=["4", 0])
    found = read_graph(nodes)
    assert (found.request.negative_prompt, found.request.guidance_rescale) == (None, None)
    assert found.unmapped | {"negative_prompt": "a dog", "guidance_rescale": 0.7} == found.unmapped


def test_a_graph_without_a_sampler_names_its_nodes() -> None:
    found = read_graph({"1": node("LoadImage", image="a.png"), "2": node("SaveImage", images=["1", 0])})
    assert found.request is None
    assert found.unmapped == {"nodes": ["LoadImage", "SaveImage"], "LoadImage": {"image": "a.png"}}


def test_a_prompt_that_is_not_known_is_not_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = saved(**{"20": node("DPRandomGenerator", text="{a|b} cat", seed=3)})
    nodes["6"]["inputs"]["text"] = ["20", 0]
    chunks = PngInfo()
    chunks.add_text("prompt", json.dumps(nodes))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    whole: dict[str, Any] = {"without": None, "typed": {}, "replaced": (), "lora_dir": tmp_path}
    fields = recorded_fields(tmp_path / "a.png", console=Console(), **whole)
    assert "prompt" not in fields  # so that `generate` asks for one
    assert (fields["seed"], fields["negative_prompt"]) == (42, "a dog")
    assert "its prompt, which is not known; give one" in capsys.readouterr().err


def test_of_an_encoder_with_several_texts_an_empty_one_is_not_the_prompt() -> None:
    nodes = saved(**{"6": node("CLIPTextEncodeSD3", clip_l="a cat", clip_g="a cat", t5xxl="", clip=["4", 1])})
    found = read_graph(nodes)
    assert found.request.prompt == "a cat"
    assert found.unmapped["CLIPTextEncodeSD3"] == {"t5xxl": ""}


def test_a_saved_image_that_no_sampler_made_leaves_a_doubt() -> None:
    nodes = saved(**{"30": node("LoadImage", image="a.png"), "31": node("SaveImage", images=["30", 0])})
    found = read_graph(nodes)
    assert found.request.prompt == "a cat"
    assert found.unmapped["sampler"] == "not certain: node 31 (SaveImage) saves an image that no sampler made"


def test_efficiency_nodes_are_read() -> None:
    loader = {
        "ckpt_name": "v1-5.safetensors", "vae_name": "Baked VAE", "clip_skip": -2, "lora_name": "None",
        "lora_model_strength": 1, "lora_clip_strength": 1, "positive": "a (red) cat", "negative": "a dog",
        "token_normalization": "none", "weight_interpretation": "comfy", "empty_latent_width": 512,
        "empty_latent_height": 768, "batch_size": 1,
    }  # fmt: skip
    sampler = {
        "seed": 42, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
        "preview_method": "auto", "model": ["1", 0], "positive": ["1", 1], "negative": ["1", 2],
        "latent_image": ["1", 3],
        "optional_vae": ["1", 4],
    }  # fmt: skip
    nodes = {
        "1": node("Efficient Loader", **loader),
        "2": node("KSampler (Efficient)", **sampler),
        "3": node("SaveImage", images=["2", 5], filename_prefix="x"),
    }
    found = read_graph(nodes)
    assert found.request == GenerationRequest(
        prompt="a (red) cat", negative_prompt="a dog", prompt_template="{prompt}", clip_skip=2, seed=42, steps=20,
        width=512, height=768, guidance_scale=8.0, scheduler="euler",
    )  # fmt: skip
    assert found.unmapped == {"model": "v1-5.safetensors", "preview_method": "auto"}
    nodes["1"]["inputs"] |= {"lora_name": "ink.safetensors", "weight_interpretation": "A1111"}
    assert read_graph(nodes).unmapped["loras"] == ["ink.safetensors"]
    assert read_graph(nodes).unmapped["Efficient Loader"]["weight_interpretation"] == "A1111"


def test_long_chains_and_many_ways_are_read_in_a_moment() -> None:
    nodes = saved()
    for number in range(1000, 2000):
        first, before = number == 1000, [str(number - 1), 0]
        settings = nodes["3"]["inputs"] | {"latent_image": ["3", 0] if first else before, "denoise": 0.5}
        nodes[str(number)] = node(
            "KSampler", samples=["3", 0] if first else [str(max(1000, number - 2)), 0], **settings
        )
        nodes[f"{number}m"] = node("FreeU", b1=1, model=["4", 0] if first else [f"{number - 1}m", 0])
        nodes[f"{number}r"] = node("Reroute", **{"": ["6", 0] if first else [f"{number - 1}r", 0]})
        nodes[f"{number}c"] = node(
            "ConditioningCombine",
            **dict.fromkeys(("conditioning_1", "conditioning_2"), ["6", 0] if first else [f"{number - 1}c", 0]),
        )
    nodes["3"]["inputs"] |= {"model": ["1999m", 0], "positive": ["1999r", 0], "negative": ["1030c", 0]}
    for last, seed in ((1010, 42), (1999, None)):
        nodes["8"]["inputs"]["samples"] = [str(last), 0]
        started = time.monotonic()
        request = read_graph(nodes).request
        assert (request and request.seed) == seed
        assert time.monotonic() - started < 20  # a quadratic reader takes hours


def test_what_is_not_taken_over_is_shown_under_that_name(tmp_path: Path) -> None:
    shown = _described(read_image(CASES / "comfy_controlnet.png"))
    assert "ControlNetApplyAdvanced" in shown.partition("not taken over:")[2]
    nodes = saved(**{"6": node("FooEncode", text="a cat", clip=["4", 1])})
    chunks = PngInfo()
    chunks.add_text("prompt", json.dumps(nodes))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    shown, _, rest = _described(read_image(tmp_path / "a.png")).partition("not taken over:")
    assert "\n  prompt  " not in shown  # an empty one would look as if it were known
    assert "positive" in rest
