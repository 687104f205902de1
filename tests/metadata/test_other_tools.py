"""Other tools' records: A1111's text round trips, the others map as far as they do, and hostile ones do no harm."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sdcli.io.json_files import parse_json
from sdcli.metadata.a1111 import a1111_text, parse_a1111, read_a1111
from sdcli.metadata.read import read_tool_record
from sdcli.request.schedulers import SCHEDULERS
from sdcli.request.schema import MAX_SEED, GenerationRequest

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from(
        ["a cat", "\n", ",", '"', "Steps: 3", "Steps: 1, Seed: 2, Size: 3x4", ": ", "🐈", "שלום", " ", "\\", "{x}"]
    ),
    max_size=8,
).map("".join)

REQUESTS = st.builds(
    GenerationRequest,
    prompt=TEXTS,
    negative_prompt=TEXTS,
    seed=st.integers(0, MAX_SEED),
    width=st.integers(2, 1024).map(lambda eighth: eighth * 8),
    height=st.integers(2, 1024).map(lambda eighth: eighth * 8),
    steps=st.integers(1, 1000),
    guidance_scale=st.floats(0, 100) | st.integers(0, 100).map(float),
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
    eta=st.just(0.0),
    model=st.sampled_from(["starter", "owner/name@main", "a: b, c"]),
)

PLAIN = GenerationRequest(
    prompt="a cat", negative_prompt="", model="starter", seed=7, width=512, height=768, steps=20, guidance_scale=7.5,
    scheduler="dpmpp-2m-karras", eta=0.0, prompt_template="{prompt}",
)  # fmt: skip


def as_the_text_keeps_it(prompt: str) -> str:
    """What A1111's text can carry of a prompt: stripped lines, without blank ones at the start."""
    return "\n".join(line.strip() for line in prompt.split("\n")).lstrip("\n")


def names_a_negative(text: str) -> bool:
    return any(line.strip().startswith("Negative prompt:") for line in text.split("\n"))


@given(REQUESTS)
@example(PLAIN.changed(prompt="Steps: 3, Sampler: Euler, Seed: 4\nSteps: 5"))
@example(PLAIN.changed(prompt="", negative_prompt="\n\nbad"))
@example(PLAIN.changed(prompt="a\r\n b\n\n", negative_prompt='"quoted", \\'))
def test_a_request_written_as_a1111_text_is_read_back_the_same(request: GenerationRequest) -> None:
    if names_a_negative(request.prompt) or names_a_negative(request.negative_prompt):
        return  # ambiguous in the text itself
    found = read_a1111(a1111_text(request, version="1.0", model_hash="0123456789"))
    expected = request.changed(
        prompt=as_the_text_keeps_it(request.prompt),
        negative_prompt=as_the_text_keeps_it(request.negative_prompt),
        prompt_template="{prompt}",
    )
    assert found.request.typed() | {"model": request.model, "eta": 0.0} == expected.typed()


def test_the_text_is_the_one_a1111_writes() -> None:
    assert a1111_text(PLAIN.changed(negative_prompt="a dog"), version="1.0", model_hash="0123456789") == (
        "a cat\nNegative prompt: a dog\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, "
        "Size: 512x768, Model hash: 0123456789, Model: starter, RNG: CPU, Version: sdcli 1.0"
    )


def test_the_text_holds_the_prompt_inside_its_template_and_whole_numbers_without_a_point() -> None:
    text = a1111_text(PLAIN.changed(prompt_template="{prompt}, glossy", guidance_scale=7.0), version="1.0")
    assert text.startswith("a cat, glossy\nSteps: 20,")
    assert "CFG scale: 7, " in text


def test_a1111_would_not_take_its_own_automatic_schedule_for_ours() -> None:
    assert "Sampler: DPM++ 2M, Schedule type: Uniform," in a1111_text(PLAIN.changed(scheduler="dpmpp-2m"), version="1")
    assert "Sampler: Euler a, Schedule type: Automatic," in a1111_text(PLAIN.changed(scheduler="euler-a"), version="1")


def test_eta_survives_where_the_scheduler_uses_it() -> None:
    text = a1111_text(PLAIN.changed(scheduler="ddim", eta=0.5), version="1")
    assert read_a1111(text).request.eta == 0.5


def test_a_model_of_another_tool_is_told_and_not_asked_for() -> None:
    found = read_a1111("a cat\nSteps: 20, Sampler: Euler a, Seed: 1, Model hash: abc, Model: deliberate_v2")
    assert found.request.model is None
    assert found.unmapped == {"Model hash": "abc", "Model": "deliberate_v2"}


@pytest.mark.parametrize(
    ("pairs", "scheduler"),
    [
        ("Sampler: DPM++ 2M Karras", "dpmpp-2m-karras"),
        ("Sampler: DPM++ 2M, Schedule type: Karras", "dpmpp-2m-karras"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp-2m-karras"),
        ("Sampler: DPM++ 2M", "dpmpp-2m"),
        ("Sampler: Euler a, Schedule type: Automatic", "euler-a"),
        ("Sampler: PLMS", "pndm"),
        ("Sampler: DPM++ 2M SDE Exponential", None),
        ("Sampler: Euler, Schedule type: Karras", None),
        ("Sampler: Restart", None),
    ],
)
def test_samplers_of_all_ages_are_understood_or_left(pairs: str, scheduler: str | None) -> None:
    found = read_a1111(f"a cat\nSteps: 20, {pairs}, Seed: 1")
    assert found.request.scheduler == scheduler
    assert ("Sampler" in found.unmapped) == (scheduler is None)


def test_fewer_than_three_pairs_are_part_of_the_prompt() -> None:
    assert parse_a1111("a cat\nSteps: 3, Seed: 4") == ("a cat\nSteps: 3, Seed: 4", "", {})


def test_prompts_of_several_lines_and_quoted_values_are_read() -> None:
    prompt, negative, pairs = parse_a1111(
        'a cat\non a mat\nNegative prompt: ugly,\nblurry\nSteps: 20, Lora hashes: "a: 1, b: 2", Odd: "x, Size: 64x64'
    )
    assert (prompt, negative) == ("a cat\non a mat", "ugly,\nblurry")
    assert pairs == {"Steps": "20", "Lora hashes": "a: 1, b: 2", "Odd": '"x', "Size": "64x64"}


def test_values_that_are_not_valid_here_are_kept_aside() -> None:
    found = read_a1111("a cat\nSteps: 0, Sampler: Euler, CFG scale: nan, Seed: -1, Size: 500x512")
    assert found.request == GenerationRequest(
        prompt="a cat", negative_prompt="", prompt_template="{prompt}", height=512, scheduler="euler"
    )
    assert found.unmapped == {"steps": "0", "guidance_scale": "nan", "seed": "-1", "width": "500"}


@pytest.mark.parametrize("line", ["a" * 1_000_000, 'ab: "' + '\\"' * 400_000, 'ab:"x,' * 100_000, " " * 1_000_000])
def test_a_hostile_line_is_read_in_linear_time(line: str) -> None:
    started = time.monotonic()
    read_a1111(f"cat\n{line}")
    assert time.monotonic() - started < 5  # a quadratic reader takes hours


# InvokeAI


def test_invokeai_records_map() -> None:
    record = {
        "generation_mode": "txt2img", "positive_prompt": "a cat", "negative_prompt": "a dog", "width": 512,
        "height": 512, "seed": 5, "cfg_scale": 7.5, "steps": 30, "scheduler": "dpmpp_2m_k", "clip_skip": None,
        "model": {"name": "Deliberate", "hash": "blake3:1"},
    }  # fmt: skip
    found = read_tool_record({"invokeai_metadata": json.dumps(record)})
    assert found.tool == "invokeai"
    assert found.request == GenerationRequest(
        prompt="a cat", negative_prompt="a dog", prompt_template="{prompt}", seed=5, width=512, height=512, steps=30,
        guidance_scale=7.5, scheduler="dpmpp-2m-karras",
    )  # fmt: skip
    assert found.unmapped == {"generation_mode": "txt2img", "model": {"name": "Deliberate", "hash": "blake3:1"}}


def test_an_unknown_invokeai_scheduler_is_left() -> None:
    found = read_tool_record({"invokeai_metadata": json.dumps({"seed": 5, "scheduler": "kdpm_2_a_k"})})
    assert found.unmapped == {"scheduler": "kdpm_2_a_k"}


def test_old_invokeai_records_map_with_their_bracketed_negative_prompt() -> None:
    image = {
        "prompt": [{"prompt": "a cat [ugly] on a mat [blurry]", "weight": 1}], "steps": 50, "cfg_scale": 7.5,
        "height": 512, "width": 640, "seed": 9, "sampler": "k_euler_a", "type": "txt2img",
    }  # fmt: skip
    found = read_tool_record({"sd-metadata": json.dumps({"model_weights": "sd-1.5", "image": image})})
    assert found.request == GenerationRequest(
        prompt="a cat  on a mat", negative_prompt="ugly blurry", prompt_template="{prompt}", seed=9, width=640,
        height=512, steps=50, guidance_scale=7.5, scheduler="euler-a",
    )  # fmt: skip
    assert found.unmapped == {"model_weights": "sd-1.5", "type": "txt2img"}


# hostile records

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
INPUTS = ["seed", "noise_seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image"]
INPUTS += ["model", "text", "width", "height", "conditioning", "value", "ckpt_name", "lora_name", "batch_size"]
NODE = st.fixed_dictionaries(
    {
        "class_type": st.sampled_from(["KSampler", "KSamplerAdvanced", "CLIPTextEncode", "X"]) | JSON,
        "inputs": st.dictionaries(
            st.sampled_from(INPUTS), JSON | st.tuples(st.sampled_from("123"), st.just(0)).map(list), max_size=9
        ),
    }
)
FIELDS = ["positive_prompt", "negative_prompt", "seed", "steps", "cfg_scale", "scheduler", "width", "image", "prompt"]
RECORDS = st.one_of(
    st.dictionaries(st.sampled_from("123"), NODE), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=9), JSON
)


@given(RECORDS)
def test_any_json_at_all_is_read_without_an_error_and_stays_json(record: Any) -> None:
    for key in ("prompt", "invokeai_metadata", "sd-metadata", "parameters"):
        found = read_tool_record({key: json.dumps(record)})
        if found is not None:
            json.dumps(found.unmapped, allow_nan=False)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"a":' * 100_000, "[" * 70 + "]" * 70, "NaN", "[1e999]", "1" * 5000, "\ud800"]
)
def test_bad_json_is_refused_with_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text, strict=True)
    assert read_tool_record({"prompt": text, "invokeai_metadata": text, "sd-metadata": text}) is None
