"""Help pages are for people in a hurry: plain names, ranges in words, a sentence for every option."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from sdcli.cli.app import app
from sdcli.cli.ui.help import interval, option_sections, with_facts


def commands(command: Any, path: str = "sdcli") -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, f"{path} {name}")


COMMANDS = dict(commands(typer.main.get_command(app)))


def page(path: str, width: int) -> str:
    context = COMMANDS[path].make_context(path, [], resilient_parsing=True, terminal_width=width)
    return re.sub(r"\x1b\[\d+m", "", COMMANDS[path].get_help(context))


@pytest.mark.parametrize("path", COMMANDS)
@pytest.mark.parametrize("width", [80, 110])
def test_a_page_fits_the_terminal_and_shows_no_types(path: str, width: int) -> None:
    text = page(path, width)
    assert text.startswith(f"Usage: {path}")
    assert not re.search(r"<(bool|int|float|str|path|list)|<=|RANGE|\[default", text)
    assert not [line for line in text.splitlines() if len(line) > width]


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_has_a_metavar_in_capitals_or_choices_and_a_sentence(path: str) -> None:
    context = COMMANDS[path].make_context(path, [], resilient_parsing=True)
    rows = [row for section in option_sections(COMMANDS[path], context).values() for row in section]
    assert rows
    for names, text in rows:
        assert re.fullmatch(r"[A-Z\"'{].*[.]", text, re.DOTALL), (names, text)
        assert not re.search(r"\) \(|\.\.\.?$", text), (names, text)


def test_a_range_is_written_as_people_write_it() -> None:
    assert interval(ge=1, le=1000) == "1 to 1000"
    assert interval(ge=0) == "0 or more"
    assert interval(ge=0, le=2**63 - 1) == "0 or more"
    assert interval(gt=0) == "above 0"
    assert interval(ge=0, lt=1) == "0 to below 1"
    assert interval(gt=0, le=1) == "above 0 to 1"
    assert interval(le=1) == "at most 1"
    assert interval() == ""


def test_facts_follow_the_sentence_in_parentheses() -> None:
    assert with_facts("Denoising steps.", "1 to 1000", "", "default: 20") == "Denoising steps (1 to 1000; default: 20)."
    assert with_facts("Seeds: 1, 2, ...", "0 or more") == "Seeds: 1, 2, ... (0 or more)."
    assert with_facts("Print the version.") == "Print the version."
    assert with_facts("Steps; default: the model's", "1 to 9") == "Steps (1 to 9; default: the model's)."
    assert with_facts("Images at once (auto).", "1 to 9") == "Images at once (1 to 9; auto)."


def test_arguments_come_first() -> None:
    for path in ("sdcli generate", "sdcli train-unet"):
        context = COMMANDS[path].make_context(path, [], resilient_parsing=True)
        assert next(iter(option_sections(COMMANDS[path], context))) == "Arguments"


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--dtype", "int8", "'int8' is not one of 'auto', 'float32', 'bfloat16', 'float16'."),
        ("--steps", "0", "should be greater than or equal to 1"),
        ("--steps", "many", "should be a valid integer, unable to parse string as an integer"),
    ],
)
def test_a_refusal_begins_with_what_is_wrong_and_not_with_the_name_of_an_exception(
    option: str, value: str, sentence: str
) -> None:
    command = COMMANDS["sdcli generate"]
    with pytest.raises(typer.BadParameter) as refused:
        command.make_context("generate", ["a fox", option, value])
    assert refused.value.message == sentence
