"""`sdcli tokens`: what it says is what the text encoder reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sdcli.cli.tokens import command
from sdcli.encoders.tokenizer import load_tokenizer
from sdcli.errors import UsageError
from sdcli.models.hub.folders import tokenizer_folder
from sdcli.models.registry import load_registry
from tests.tiny import save_tiny_pipeline

RUNNER, APP = CliRunner(), typer.Typer()
APP.command()(command)


def lines(*arguments: str, **environment: str) -> list[str]:
    done = RUNNER.invoke(APP, arguments, env=environment, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout.splitlines()


def test_tokens_weights_chunks_steps_and_parts_are_told() -> None:
    said = [
        json.loads(line)
        for line in lines(
            "a (red:1.5) [fox|owl] BREAK x AND b:0.5", "-m", "tiny", "--steps", "3", "--negative-prompt", "c", "--json"
        )
    ]
    assert [(one["role"], one["weight"], one["steps"]) for one in said] == [
        ("prompt", 1.0, [[1, 1], [3, 3]]),
        ("prompt", 1.0, [[2, 2]]),
        ("prompt", 0.5, [[1, 3]]),
        ("negative prompt", 1.0, [[1, 3]]),
    ]
    first, second = said[0]["chunks"]
    assert [(token["token"], token["weight"]) for token in first] == [("a", 1.0), ("red", 1.5), ("fox", 1.0)]
    assert [token["token"] for token in second] == ["x"]
    tokenizer = load_tokenizer(tokenizer_folder(load_registry().find("tiny")))
    assert [token["id"] for token in first] == tokenizer.words("a red fox")


def test_a_plain_prompt_says_what_is_cut() -> None:
    said = lines("(a) " * 25 + "unicorn", "-m", "tiny", "--prompt-syntax", "plain", TERM="dumb")
    assert said[0] == "prompt: 75 tokens; steps 1-4"
    assert said[-1] == "  cut: unicorn"


def test_nothing_is_coloured_where_stdout_is_no_terminal_and_control_characters_are_not_shown() -> None:
    said = lines("a (fox) \x1b[31m")
    assert said[0].startswith("prompt: ")
    assert "fox*1.1·" in said[1]
    assert "\x1b" not in "".join(said)
    assert "\x1b[" in "".join(lines("a (fox)", FORCE_COLOR="1"))
    assert "\x1b[3" not in "".join(lines("a (fox)", FORCE_COLOR="1", NO_COLOR="1"))


def test_a_prompt_is_read_whatever_else_an_image_would_need_and_without_its_tags(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "inpainting", in_channels=9)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"))
    (folder / "sdcli.json").write_text('{"schema": 1, "defaults": {"guidance_scale": 1}}')
    assert load_registry().find(str(folder)).kind.inpaints
    said = lines("a cat <lora:x:0.8> AND b", "--negative-prompt", "c", "-m", str(folder), "--json")
    assert [json.loads(line)["prompt"].strip() for line in said] == ["a cat", "b", "c"]
    with pytest.raises(UsageError, match="half a character"):
        RUNNER.invoke(APP, ["a\udcff"], catch_exceptions=False)
