"""The command line of a request: the inverse of the flags in `cli/options/request_flags.py`."""

from __future__ import annotations

import contextlib
import io
import subprocess
from typing import Any

import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdcli.cli.app import app
from sdcli.generation.resolve.resolve import resolve
from sdcli.models.registry import load_registry
from sdcli.request.command_line import command_line, request_arguments
from sdcli.request.schema import MAX_SEED, GenerationRequest, ResolvedRequest, parse_request

COMMANDS = typer.main.get_command(app)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


@given(
    prompt=TEXTS,
    negative=TEXTS,
    template=TEXTS.map(lambda text: text + "{prompt}"),
    seed=st.integers(0, MAX_SEED),
    scale=st.floats(1.001, 100),
    sides=st.tuples(st.integers(4, 32), st.integers(4, 32)),
    sampling=st.sampled_from([("ddim", 0.3), ("ddim", 1e-7), ("euler-a", None), ("dpmpp-2m", 0.0)]),
    width=st.booleans(),
)
@example("-rf", "--seed", "{prompt}", 0, 7.5, (8, 8), ("ddim", 1.0), True)
@example("", "", "--{prompt}", MAX_SEED, 7.5, (8, 8), ("ddim", None), False)
@example("--help", "-", "{prompt}", 1, 2.0, (8, 8), ("ddim", None), False)
@settings(max_examples=12)
def test_a_request_and_its_command_line_are_the_same_request(
    prompt: str, negative: str, template: str, seed: int, scale: float, sides: Any, sampling: Any, width: bool
) -> None:
    scheduler, eta = sampling
    asked = GenerationRequest(
        prompt=prompt, negative_prompt=negative, prompt_template=template, seed=seed, guidance_scale=scale,
        scheduler=scheduler, eta=eta, height=16 * sides[1], width=16 * sides[0] if width else None,
    )  # fmt: skip
    resolved = resolve(asked, load_registry().find(None))
    for one in (asked, resolved):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            COMMANDS.main(["generate", "--dry-run", "--json", *request_arguments(one)], standalone_mode=False)
        assert ResolvedRequest.model_validate_json(printed.getvalue()) == resolved


def test_fields_that_were_not_given_are_left_out_and_lists_and_switches_are_flags_too() -> None:
    controls = ("m=a.png:1", "canny:n=b c:0.5@0-0.5")
    asked = parse_request({"prompt": "a fox", "seed": 7, "invert_mask": True, "controls": controls})
    flags = ["--seed", "7", "--invert-mask", "--control", controls[0], "--control", controls[1]]
    assert request_arguments(asked) == [*flags, "--", "a fox"]
    assert "--invert-mask" not in request_arguments(asked.changed(invert_mask=False))


def test_no_digit_of_a_part_is_lost() -> None:
    asked = parse_request({"upscale": "1.33333333x:0.4444444", "guidance_interval": "0.1234567-0.7654321"})
    upscale, interval = (
        asked.changed(**{name: str(getattr(asked, name))}) for name in ("upscale", "guidance_interval")
    )
    assert upscale == interval == asked


def test_a_shell_reads_the_arguments_back_from_one_printable_line() -> None:
    texts = [
        "", "a fox", "it's", "=ls", "~", "$HOME `id` $(id) !!", 'a "b" \\ c', "a\nb", "'\n\\!", "\x03\nid\n",
        "\x1b[201~id\n", "é 東京 🦊\u200d", "\u202eevil", "".join(map(chr, range(1, 0x180))), "{prompt} 5", "%s", "\t7",
    ]  # fmt: skip
    line = " ; ".join(
        command_line(GenerationRequest(prompt=text, negative_prompt=text)).replace("sdcli generate", "printf '%s\\0'")  # type: ignore[union-attr]
        for text in texts
    )
    assert line.isprintable()
    printed = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout.decode().split("\0")
    assert printed == [one for text in texts for one in ("--negative-prompt", text, "--", text)] + [""]


def test_the_command_of_a_plain_request_is_what_one_would_type() -> None:
    line = command_line(GenerationRequest(prompt="a red fox", model="starter", guidance_scale=7.5))
    assert line == "sdcli generate --model starter --guidance-scale 7.5 -- 'a red fox'"


def test_a_prompt_that_no_command_line_can_hold_has_no_command() -> None:
    longest = 128 * 1024 - 1
    assert subprocess.run(["true", "x" * longest]).returncode == 0
    assert command_line(GenerationRequest(prompt="x" * longest)) is not None
    assert command_line(GenerationRequest(prompt="x" * (longest + 1))) is None
