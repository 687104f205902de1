"""Prompts and prompts files of other tools on the command line, from the files of `tests/cases/generation`."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run

CASES = Path(__file__).parent.parent / "cases" / "generation"
DRY = ("-m", "tiny", "--dry-run")


def requests(run: Run, *arguments: str | Path, **given: object) -> list[dict[str, Any]]:
    done = run("generate", *arguments, *DRY, **given)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a __head__", {"a hat", "a turban"}),
        (
            "a __pets__ in a __colours*__ coat",
            {f"a {pet} in a {hue} coat" for pet in ("cat", "dog") for hue in ("green", "teal", "red", "orange")},
        ),
        (
            "a __pets__, __hair colour__ hair",
            {f"a {pet}, {hair} hair" for pet in ("cat", "dog") for hair in ("blond", "ginger")},
        ),
        ("{2$$__pets__}", {"cat,dog", "dog,cat"}),
        ("${s=!{summer|autumn}}${s} is here", {"summer is here", "autumn is here"}),
    ],
)
def test_sd_dynamic_prompts_syntax_is_read_as_that_tool_reads_it(sdcli: Run, prompt: str, expected: set[str]) -> None:
    found = requests(sdcli, prompt, "--wildcards", CASES / "wildcards", "--all-combinations")
    assert {one["prompt"] for one in found} == expected
    drawn = requests(sdcli, prompt, "--wildcards", CASES / "wildcards", "--seed", "3", "-n", "6")
    assert {one["prompt"] for one in drawn} <= expected


def test_a_heavy_line_is_drawn_before_a_light_one(sdcli: Run) -> None:
    drawn = requests(sdcli, "a __head__", "--wildcards", CASES / "wildcards", "--seed", "3", "-n", "30")
    assert [one["prompt"] for one in drawn].count("a hat") >= 28


def test_a_variable_that_is_not_used_is_no_text(sdcli: Run) -> None:
    (one,) = requests(sdcli, "${s=!{summer|autumn}} is here", "--dynamic-prompts", "--seed", "1")
    assert one["prompt"].strip() == "is here"


def test_the_web_uis_and_kohyas_lines_are_read(sdcli: Run) -> None:
    found = requests(sdcli, "--prompts-file", CASES / "a1111_prompts.txt")
    assert [one["prompt"] for one in found] == ["a harbour at night", "a barn", "a barn", "a mill", "a mill", "a mill"]
    first, barn, second, *mills = found
    assert {name: first[name] for name in ("negative_prompt", "scheduler", "steps", "guidance_scale", "seed")} == {
        "negative_prompt": "people, boats",
        "scheduler": "euler-a",
        "steps": 5,
        "guidance_scale": 5,
        "seed": 9,
    }
    assert second["seed"] == barn["seed"] + 1
    assert [(one["seed"], one["scheduler"], one["width"]) for one in mills] == [
        (4, "ddim", 64),
        (5, "ddim", 64),
        (3, "euler-a", 128),
    ]


def test_json_lines_with_a_mark_are_read_from_files_stdin_and_pipes(sdcli: Run, tmp_path: Path) -> None:
    expected = [("a red fox", 1), ("a castle", 2)]
    text = (CASES / "bom.jsonl").read_text(encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    feed = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,), kwargs={"encoding": "utf-8"})
    feed.start()
    ways = [
        requests(sdcli, "--prompts-file", CASES / "bom.jsonl"),
        requests(sdcli, "--prompts-file", "-", input=text),
        requests(sdcli, "--prompts-file", "pipe"),
    ]
    feed.join()
    for found in ways:
        assert [(one["prompt"], one["seed"]) for one in found] == expected


def test_choices_at_the_beginning_of_stdin_are_text(sdcli: Run) -> None:
    text = (CASES / "choices.txt").read_text()
    found = requests(sdcli, "--prompts-file", "-", "--dynamic-prompts", input=text)
    assert found[0]["prompt"] in ("red car", "blue car")
    assert found[1]["prompt"] == "a castle"


def test_a_column_that_is_there_twice_refuses_the_file(sdcli: Run) -> None:
    done = sdcli("generate", "--prompts-file", CASES / "duplicate_column.csv", *DRY)
    assert (done.returncode, done.stdout) == (2, "")
    assert "duplicate_column.csv, line 1: prompt is given twice" in done.stderr


def test_odd_values_are_refused_each_with_its_line(sdcli: Run) -> None:
    done = sdcli("generate", "--prompts-file", CASES / "odd_values.jsonl", *DRY)
    assert (done.returncode, done.stdout) == (7, "")
    first, second, third = done.stderr.splitlines()[:3]
    assert "line 1: seed is given twice" in first
    assert "line 2: steps: should be a number, not true" in second
    assert "line 3: num_images: should be a whole number from 1 to 100000, not 2.7" in third


def test_tokens_reads_tags_as_generate_does(sdcli: Run) -> None:
    taken = sdcli("tokens", "<lyco:ink:1> fox", "-m", "tiny")
    plain = sdcli("tokens", "fox", "-m", "tiny")
    assert (taken.returncode, taken.stdout) == (0, plain.stdout)
    missing = sdcli("generate", "<lyco:ink:1> fox", *DRY)
    assert (missing.returncode, "ink" in missing.stderr) == (2, True)
    for command in (("tokens", "-m", "tiny"), ("generate", *DRY)):
        for prompt in ("<lora:x:1:lbw=IN02> fox", "<hypernet:x:1> fox", "<random:red,blue> fox", "<loar:x:1> fox"):
            refused = sdcli(command[0], prompt, *command[1:])
            assert refused.returncode == 2
            assert f"sdcli: {prompt.removesuffix(' fox')}" in refused.stderr
        negative = sdcli(command[0], "fox", *command[1:], "--negative-prompt", "<lora:x:1>")
        assert (negative.returncode, "negative_prompt: <lora:x:1>" in negative.stderr) == (2, True)


@pytest.mark.parametrize(
    ("prompt", "option"),
    [
        ("a {red|blue} cat", "{red|blue} is text in the prompt; with --dynamic-prompts"),
        ("a __pets__ cat", "__pets__ is text in the prompt; with --wildcards DIR"),
        ("a {red} snake_case __init [a|b] cat", ""),
    ],
)
def test_alternatives_that_are_not_asked_for_are_text_and_a_note_says_so(sdcli: Run, prompt: str, option: str) -> None:
    done = sdcli("generate", prompt, *DRY)
    assert (done.returncode, json.loads(done.stdout)["prompt"]) == (0, prompt)
    assert option in done.stderr
    assert bool(done.stderr) == bool(option)
    assert sdcli("generate", prompt, *DRY, "-q").stderr == ""
