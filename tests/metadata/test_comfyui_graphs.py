"""Any graph of ComfyUI: each field is taken over rightly or named, no prompt is made up, and nothing fails."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcli.metadata.comfyui.graph import Graph, Node
from sdcli.metadata.comfyui.record import read_comfyui
from sdcli.metadata.tool_record import ToolRecord
from tests.metadata.comfyui_graphs import Junk, junk, well_formed

SEEDS = st.integers(0, 2**32)
MANY = range(100_000, 101_700)
"""Seeds of the slow set."""


def read(nodes: dict[str, Any]) -> ToolRecord:
    found = read_comfyui(json.dumps(nodes))
    assert found is not None
    assert json.loads(json.dumps(found.unmapped, allow_nan=False)) is not None
    return found


def check_well_formed(seed: int) -> None:
    picture = well_formed(seed)
    found = read(picture.nodes)
    assert found.request is not None
    fields = found.request.typed()
    fields = {name: value for name, value in fields.items() if name not in ("schema", "prompt_template")}
    assert fields == picture.fields, seed
    named = json.dumps(found.unmapped, ensure_ascii=False)
    assert [value for value in picture.named if json.dumps(value, ensure_ascii=False) not in named] == [], seed
    assert not {"positive", "negative", "sampler"} & found.unmapped.keys(), seed


def check_nothing_is_lost(graph: Junk, found: ToolRecord, seed: int) -> None:
    parsed = Graph({id: Node(id, node["class_type"], node["inputs"]) for id, node in graph.nodes.items()})
    part = {node.id for node in parsed.upstream(parsed.outputs())}
    said = json.dumps([found.request.typed() if found.request is not None else {}, found.unmapped])
    numbers = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", said)}
    for (id, name), mark in graph.marks.items():
        node = graph.nodes[id]
        # The texts of nodes that compute a text are said by the text that they come to.
        computed = name in ("find", "replace", "string", "delimiter") and node["class_type"].startswith("String")
        behind_the_last_step = name in ("end_at_step", "return_with_leftover_noise")
        if id not in part or computed or behind_the_last_step:
            continue
        assert mark in said if isinstance(mark, str) else float(mark) in numbers, (seed, id, name, node)


def check_no_prompt_is_made_up(graph: Junk, found: ToolRecord, seed: int) -> None:
    if found.request is None:
        return
    written = {str(mark) for (_, name), mark in graph.marks.items() if isinstance(mark, str)}
    foreign = {mark for (id, _), mark in graph.marks.items() if graph.nodes[id]["class_type"].startswith("Foo")}
    for prompt in (found.request.prompt, found.request.negative_prompt or ""):
        words = set(re.findall(r"m\d+m", prompt))
        rest = re.sub(r"m\d+m|\bAND\b|\bBREAK\b|:0\.\d+|\s", "", prompt)
        assert words <= written - foreign, (seed, prompt)
        assert rest == "", (seed, prompt)


def check_junk(seed: int) -> None:
    graph = junk(seed)
    found = read(graph.nodes)
    check_nothing_is_lost(graph, found, seed)
    check_no_prompt_is_made_up(graph, found, seed)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_well_formed_graphs_are_read_as_they_were_drawn(seed: int) -> None:
    check_well_formed(seed)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_of_any_graph_every_value_is_taken_over_or_named_and_no_prompt_is_made_up(seed: int) -> None:
    check_junk(seed)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_graphs_with_values_of_any_type_are_read_without_an_error(seed: int) -> None:
    read(junk(seed, hostile=True).nodes)


@pytest.mark.slow
def test_many_graphs_of_each_kind() -> None:
    for seed in MANY:
        check_well_formed(seed)
        check_junk(seed)
        read(junk(seed, hostile=True).nodes)
