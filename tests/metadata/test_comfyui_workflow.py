"""ComfyUI's `workflow`: the graph as it is drawn reads like the one that was run, as far as it says what was run."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdcli.metadata.comfyui.record import read_comfyui, read_comfyui_workflow
from sdcli.metadata.comfyui.workflow import WIDGETS
from sdcli.metadata.read import read_image, read_tool_record
from sdcli.metadata.tool_record import ToolRecord
from sdcli.request.schema import GenerationRequest
from tests.metadata.comfyui_graphs import well_formed

DEFAULT: dict[str, Any] = json.loads(Path(__file__).with_name("comfyui_workflow.json").read_text())
"""ComfyUI's first workflow, as its user interface stores it."""

REQUEST = GenerationRequest(
    prompt="a lighthouse", negative_prompt="blurry", prompt_template="{prompt}", seed=4242, steps=22, width=512,
    height=640, guidance_scale=6.5, scheduler="euler",
)  # fmt: skip


def workflow(**nodes: dict[str, Any]) -> dict[str, Any]:
    """The first workflow with changes of its nodes, by `n` and their ids; others are added."""
    drawn = copy.deepcopy(DEFAULT)
    by_id = {node["id"]: node for node in drawn["nodes"]}
    for name, changed in nodes.items():
        id = int(name[1:])
        if id in by_id:
            by_id[id].update(changed)
        else:
            drawn["nodes"].append({"id": id, "mode": 0, **changed})
    return drawn


def read(drawn: dict[str, Any]) -> ToolRecord:
    found = read_tool_record({"workflow": json.dumps(drawn)})
    assert found is not None
    assert found.tool == "comfyui"
    return found


def test_a_workflow_alone_is_read() -> None:
    found = read(DEFAULT)
    assert (found.request, found.unmapped) == (REQUEST, {"model": "some.safetensors"})


def test_the_graph_that_was_run_goes_before_the_one_that_was_drawn() -> None:
    prompt = {"1": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 2}}}
    found = read_tool_record({"workflow": json.dumps(DEFAULT), "prompt": json.dumps(prompt)})
    assert found.request.steps == 2


def test_exif_holds_both_graphs_or_the_drawn_one_alone(tmp_path: Path) -> None:
    prompt = {"1": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 2}}}
    for number, (steps, fields) in enumerate(
        {
            22: {0x010F: f"workflow:{json.dumps(DEFAULT)}"},
            2: {0x010F: f"Workflow:{json.dumps(DEFAULT)}", 0x0110: f"prompt:{json.dumps(prompt)}"},
        }.items()
    ):
        exif = Image.Exif()
        exif.update(fields)
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.webp", exif=exif)
        info = read_image(tmp_path / f"{number}.webp")
        assert (info.source, info.request.steps) == ("comfyui", steps)
        assert "other texts" not in info.unmapped


def test_links_may_be_objects() -> None:
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    drawn = workflow()
    drawn["links"] = [dict(zip(names, link, strict=True)) for link in drawn["links"]]
    assert read(drawn).request == REQUEST


def test_a_muted_node_is_not_there_and_a_bypassed_one_passes_on() -> None:
    lora = {
        "type": "LoraLoader", "mode": 4, "widgets_values": ["ink.safetensors", 1, 1],
        "inputs": [{"name": "model", "type": "MODEL", "link": 20}, {"name": "clip", "type": "CLIP", "link": None}],
        "outputs": [{"name": "MODEL", "type": "MODEL", "links": [1]}, {"name": "CLIP", "type": "CLIP", "links": []}],
    }  # fmt: skip
    drawn = workflow(n10=lora)
    drawn["links"][0] = [1, 10, 0, 3, 0, "MODEL"]
    drawn["links"].append([20, 4, 0, 10, 0, "MODEL"])
    assert (read(drawn).request, read(drawn).unmapped) == (REQUEST, {"model": "some.safetensors"})
    drawn["nodes"][-1]["mode"] = 0
    assert [lora.path for lora in read(drawn).request.loras] == ["ink"]
    drawn["nodes"][-1]["mode"] = 2
    assert (read(drawn).request.loras, "model" in read(drawn).unmapped) == ((), False)


def test_widgets_that_are_linked_take_the_value_of_their_link() -> None:
    sampler = DEFAULT["nodes"][3]
    inputs = [*sampler["inputs"], {"name": "seed", "type": "INT", "link": 30, "widget": {"name": "seed"}}]
    drawn = workflow(
        n3={"inputs": inputs},
        n11={"type": "PrimitiveNode", "outputs": [{"type": "INT", "links": [30]}], "widgets_values": [77, "fixed"]},
    )
    drawn["links"].append([30, 11, 0, 3, 4, "INT"])
    assert read(drawn).request.seed == 77


def test_choices_of_the_user_interface_are_no_prompt_and_comments_are_dropped() -> None:
    found = read(workflow(n6={"widgets_values": ["a {red|blue} fox"]}))
    assert found.request.prompt == ""
    assert found.unmapped["positive"].startswith("not known")
    assert found.unmapped["CLIPTextEncode"] == {"text": {"random choices": "a {red|blue} fox"}}
    found = read(workflow(n6={"widgets_values": ["a fox // in red\n/* or blue */ \\{sic\\}"]}))
    assert found.request.prompt == "a fox \n {sic}"


def test_widgets_of_other_nodes_are_named_only_where_the_file_names_them() -> None:
    patch = {
        "type": "FooPatch", "widgets_values": [0.5, "quick"],
        "inputs": [{"name": "model", "type": "MODEL", "link": 20}],
        "outputs": [{"name": "MODEL", "type": "MODEL", "links": [1]}],
    }  # fmt: skip
    drawn = workflow(n10=patch)
    drawn["links"][0] = [1, 10, 0, 3, 0, "MODEL"]
    drawn["links"].append([20, 4, 0, 10, 0, "MODEL"])
    assert read(drawn).unmapped["FooPatch"] == {"widgets_values": {"names not stored": [0.5, "quick"]}}
    drawn["nodes"][-1]["inputs"] += [{"name": name, "link": None, "widget": {"name": name}} for name in ("foo", "mode")]
    assert read(drawn).unmapped["FooPatch"] == {"foo": 0.5, "mode": "quick"}


def test_subgraphs_are_replaced_by_their_nodes() -> None:
    drawn = workflow()
    sampler = next(node for node in drawn["nodes"] if node["id"] == 3)
    drawn["nodes"].remove(sampler)
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    inner = [[1, -10, 0, 3, 0, "MODEL"], [4, -10, 1, 3, 1, "CONDITIONING"], [6, -10, 2, 3, 2, "CONDITIONING"],
             [2, -10, 3, 3, 3, "LATENT"], [7, 3, 0, -20, 0, "LATENT"]]  # fmt: skip
    subgraph = {
        "id": "c0ffee", "nodes": [sampler], "links": [dict(zip(names, link, strict=True)) for link in inner],
        "inputs": [{"name": one["name"], "type": one["type"]} for one in sampler["inputs"]],
        "outputs": [{"name": "LATENT", "type": "LATENT"}],
    }  # fmt: skip
    drawn["definitions"] = {"subgraphs": [subgraph]}
    drawn["nodes"].append({**sampler, "type": "c0ffee", "widgets_values": []})
    assert (read(drawn).request, read(drawn).unmapped) == (REQUEST, {"model": "some.safetensors"})


def test_subgraphs_that_hold_themselves_end() -> None:
    drawn = workflow(n10={"type": "c0ffee"})
    nodes = [{"id": number, "type": "c0ffee", "mode": 0} for number in range(20)]
    drawn["definitions"] = {"subgraphs": [{"id": "c0ffee", "nodes": nodes, "links": [], "inputs": [], "outputs": []}]}
    assert read(drawn).request == REQUEST


def drawn_from(nodes: dict[str, Any]) -> dict[str, Any]:
    """The workflow of a graph: newer versions store an input for each widget, in the order of the values.

    A widget whose value is linked keeps the value that it had before.
    """
    drawn: dict[str, Any] = {"nodes": [], "links": [], "version": 0.4}
    for id, node in nodes.items():
        inputs, values = [], []
        for name, value in node["inputs"].items():
            linked = isinstance(value, list)
            widget = not linked or name in WIDGETS.get(node["class_type"], "").split()
            inputs.append({"name": name, "type": "*", "link": None, **({"widget": {"name": name}} if widget else {})})
            if widget:
                values.append("a stale value" if linked else value)
            if linked:
                inputs[-1]["link"] = len(drawn["links"]) + 1
                drawn["links"].append([inputs[-1]["link"], *value, id, len(inputs) - 1, "*"])
        drawn["nodes"].append(
            {
                "id": id,
                "type": f"{node['class_type']}",
                "mode": 0,
                "inputs": inputs,
                "outputs": [],
                "widgets_values": values,
            }
        )
    return drawn


def with_known_widgets(nodes: dict[str, Any]) -> dict[str, Any]:
    """The graph with its nodes' inputs in the order in which ComfyUI stores them."""
    ordered = {}
    for id, node in nodes.items():
        names = [name for name in WIDGETS.get(node["class_type"], "").split() if name in node["inputs"]]
        rest = [name for name in node["inputs"] if name not in names]
        ordered[id] = {**node, "inputs": {name: node["inputs"][name] for name in [*names, *rest]}}
    return ordered


def check_drawn_and_run(seed: int) -> None:
    picture = well_formed(seed)
    run = read_comfyui(json.dumps(picture.nodes))
    drawn = read_comfyui_workflow(json.dumps(drawn_from(with_known_widgets(picture.nodes))))
    assert drawn.request == run.request, seed
    assert drawn.unmapped.keys() == run.unmapped.keys(), seed


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_drawn_graph_is_read_as_the_one_that_was_run(seed: int) -> None:
    check_drawn_and_run(seed)


def damaged(seed: int) -> Any:
    """The first workflow with values of any type in a few places."""
    draw = random.Random(seed)
    drawn = copy.deepcopy(DEFAULT)
    drawn["definitions"] = {"subgraphs": [{"id": "KSampler", "nodes": drawn["nodes"][:3], "links": drawn["links"]}]}
    for _ in range(draw.randint(1, 6)):
        value: Any = drawn
        while True:
            key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
            if not isinstance(value[key], dict | list) or not value[key] or draw.random() < 0.15:
                break
            value = value[key]
        value[key] = draw.choice(
            [None, True, -1, 3, 10**30, "x", "KSampler", [], {}, [1, 2], [["a"]], {"id": 1}, float("nan")]
        )
    return drawn


@given(st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_a_damaged_workflow_is_read_without_an_error(seed: int) -> None:
    check_damaged(seed)


def check_damaged(seed: int) -> None:
    found = read_comfyui_workflow(json.dumps(damaged(seed)))
    if found is not None:
        json.dumps(found.unmapped, allow_nan=False)
        texts = {"", "a lighthouse", "blurry", "x", "KSampler"}
        prompts = {found.request.prompt, found.request.negative_prompt or ""} if found.request is not None else set()
        assert prompts <= texts, seed


@pytest.mark.slow
def test_many_workflows() -> None:
    for seed in range(800):
        check_damaged(seed)
        check_drawn_and_run(seed)
