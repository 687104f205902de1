"""Commands that compute nothing load nothing heavy: the promise behind their start-up times."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer

from sdcli.cli.app import COMMANDS, app
from sdcli.cli.ui.help import command_sections

HEAVY = ["torch", "diffusers", "transformers", "accelerate", "PIL", "numpy", "huggingface_hub"]

# Runs the command line as the console script does; the last line of stderr names which of these modules were loaded.
RUNNER = """
import json, sys
heavy = json.loads(sys.argv.pop(1))
sys.argv[0] = "sdcli"
from sdcli.cli.app import main
try:
    main()
finally:
    print(json.dumps([name for name in heavy if name in sys.modules]), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
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
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_loaded(arguments: list[str], tmp_path: Path) -> None:
    done = run(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert json.loads(done.stderr.splitlines()[-1]) == []


def test_the_version_is_printed_without_any_command(tmp_path: Path) -> None:
    done = run(["--version"], tmp_path, heavy=["pydantic", "yaml", "sdcli.cli.generate"])
    assert done.stdout.startswith("sdcli ")
    assert json.loads(done.stderr.splitlines()[-1]) == []


@pytest.mark.parametrize("arguments", [["--help"], ["genrate"]], ids=" ".join)
def test_the_list_of_commands_is_printed_without_any_command(arguments: list[str], tmp_path: Path) -> None:
    done = run(arguments, tmp_path, heavy=["yaml", *(f"sdcli.cli.{name.replace('-', '_')}" for name in COMMANDS)])
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert "train-text-encoder  Train a small" in done.stdout or "No such command 'genrate'" in done.stderr


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
    done = run(["generate", "a", "-m", "tiny", "--steps", "1", "-o", "a.png"], tmp_path, heavy=unneeded)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []


@pytest.mark.parametrize("arguments", [[], ["-h"], ["generate", "--help"]], ids=" ".join)
def test_help_loads_no_library_for_terminals(arguments: list[str], tmp_path: Path) -> None:
    done = run(arguments, tmp_path, heavy=["markdown_it", "pygments", "rich"])
    assert "Usage: sdcli" in done.stdout
    assert json.loads(done.stderr.splitlines()[-1]) == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["generate", "a", "--size", "65x64"], 2),
        (["generate", "a", "--scheduler", "euler", "--eta", "0.5"], 2),
        (["generate", "a", "-m", "nope"], 3),
        (["generate", "a", "-m", "sd15"], 4),
        (["generate", "a", "-m", "somebody/finetune"], 4),
        (["generate", "a", "-o", "there/taken.png"], 8),
        (["generate", "--prompts-file", "missing.txt"], 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_reported_before_anything_heavy_is_loaded(arguments: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "taken.png").touch()
    done = run(arguments, tmp_path)
    assert done.returncode == code, done.stderr
    *_, sentence, loaded = done.stderr.splitlines()
    assert sentence.startswith("sdcli: ")
    assert json.loads(loaded) == []


def run(arguments: list[str], tmp_path: Path, *, heavy: Sequence[str] = HEAVY) -> subprocess.CompletedProcess[str]:
    # An empty HOME of its own: what the user configured or downloaded must not matter.
    env = {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", RUNNER, json.dumps(heavy), *arguments]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
