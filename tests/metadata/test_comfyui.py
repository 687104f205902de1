"""ComfyUI's records: graphs are followed from the saved image, and what is not taken over is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdcli.metadata.read import read_image, read_tool_record
from sdcli.metadata.tool_record import ToolRecord
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
