"""Commands that compute nothing load nothing heavy: the promise behind their start-up times."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from sdcli.cli.app import COMMANDS, app
from sdcli.cli.ui.help import command_sections

HEAVY = ["torch", "diffusers", "transformers", "accelerate", "PIL", "numpy", "huggingface_hub"]

# Runs command lines as the console script does, one after the other in one process, up to the first that loads one of
# these modules. The last line of stderr is [command line, exit code, modules loaded] of each.
RUNNER = """
import json, sys
heavy, lines = map(json.loads, sys.argv[1:])
from sdcli.cli.app import main
seen = []
for line in lines:
    sys.argv = ["sdcli", *line]
    try:
        main()
    except SystemExit as ended:
        seen.append([line, ended.code, [name for name in heavy if name in sys.modules]])
    print("next", flush=True)
    print("next", file=sys.stderr, flush=True)
    if seen[-1][-1]:
        break
print(json.dumps(seen), file=sys.stderr)
"""

LIGHT = [
    ["--help"],
    ["--version"],
    ["generate", "--help"],
    ["generate", "--scheduler", "help"],
    ["generate", "--dry-run", "an apple"],
    ["train-unet", "--help"],
    ["train-controlnet", "--help"],
    ["train-vae", "--help"],
    ["train-text-encoder", "--help"],
    ["dataset", "--help"],
    ["dataset", "cache", "--help"],
    ["plot", "--help"],
    ["encode", "--help"],
    ["decode", "--help"],
    ["info", "--help"],
    ["control-map", "--help"],
    ["tokens", "--help"],
    ["tokens", "a (red:1.2) apple"],
    ["generate", "--dry-run", "--all-combinations", "a {red|green} apple"],
    ["compare", "--help"],
    ["grid", "--help"],
    ["noise", "--help"],
    ["gallery", "--help"],
    ["models", "--help"],
    ["models", "list"],
    ["models", "path"],
    ["models", "show", "starter"],
    ["selftest", "--help"],
]


def test_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    for line, code, loaded, out, _ in run(LIGHT, tmp_path):
        assert (code, loaded) == (0, []), line
        assert out, line


def test_the_version_and_the_list_of_commands_are_printed_without_any_command(tmp_path: Path) -> None:
    heavy = ["yaml", *(f"sdcli.cli.{name.replace('-', '_')}" for name in COMMANDS)]
    version, listed, unknown = run([["--version"], ["--help"], ["genrate"]], tmp_path, heavy=heavy)
    assert version[2] == listed[2] == unknown[2] == []
    assert run([["--version"]], tmp_path, heavy=["pydantic"])[0][2] == []
    assert version[3].startswith("sdcli ")
    assert "train-text-encoder  Train a small" in listed[3]
    assert "No such command 'genrate'" in unknown[4]


def test_the_list_of_commands_says_what_their_own_help_says() -> None:
    root = typer.main.get_command(app)
    listed = [(name, text) for section in root.sections().values() for name, text in section]  # type: ignore[attr-defined]
    own = [(name, text) for section in command_sections(root).values() for name, text in section]
    assert listed == own
    assert {name for name, _ in listed} == set(COMMANDS)


def test_a_first_image_loads_only_what_it_needs(tmp_path: Path) -> None:
    """No client for the network, no compiler, no other library for models than diffusers, none for terminals."""
    unneeded = [
        *("torch._dynamo", "torch._inductor", "sympy", "transformers", "peft", "accelerate", "scipy", "matplotlib"),
        *("requests", "urllib3", "httpcore2", "huggingface_hub.hf_api", "huggingface_hub.file_download", "rich"),
        *("diffusers.hooks.faster_cache", "diffusers.pipelines", "diffusers.models.transformers"),
    ]
    ((_, code, loaded, _, err),) = run(
        [["generate", "a", "-m", "tiny", "--steps", "1", "-o", "a.png"]], tmp_path, heavy=unneeded
    )
    assert (code, loaded) == (0, []), err


def test_help_loads_no_library_for_terminals(tmp_path: Path) -> None:
    lines = [[], ["-h"], ["generate", "--help"]]
    for line, _, loaded, out, _ in run(lines, tmp_path, heavy=["markdown_it", "pygments", "rich"]):
        assert "Usage: sdcli" in out, line
        assert loaded == [], line


MISTAKES = [
    (["generate", "a", "--size", "65x64"], 2),
    (["generate", "a", "--scheduler", "euler", "--eta", "0.5"], 2),
    (["generate", "a", "-m", "nope"], 3),
    (["generate", "a", "-m", "sd15"], 4),
    (["generate", "a", "-m", "somebody/finetune"], 4),
    (["generate", "a", "-o", "there/taken.png"], 8),
    (["generate", "--prompts-file", "missing.txt"], 3),
]
"""Command line -> exit code."""


def test_a_mistake_is_reported_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "taken.png").touch()
    done = run([line for line, _ in MISTAKES], tmp_path)
    assert [(line, code) for line, code, *_ in done] == MISTAKES
    for line, _, loaded, _, err in done:
        assert err.startswith("sdcli: "), line
        assert loaded == [], line


def run(
    lines: Sequence[Sequence[str]], tmp_path: Path, *, heavy: Sequence[str] = HEAVY
) -> list[tuple[list[str], int, list[str], str, str]]:
    """Command line, exit code, heavy modules loaded so far, stdout and stderr of each."""
    # An empty HOME of its own: what the user configured or downloaded must not matter.
    env = {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", RUNNER, json.dumps(heavy), json.dumps(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    *errors, seen = done.stderr.split("next\n")
    outputs = done.stdout.split("next\n")[:-1]
    found = [(*facts, out, err) for facts, out, err in zip(json.loads(seen), outputs, errors, strict=True)]
    assert len(found) == len(lines), found[-1]
    return found
