"""Commands that compute nothing load nothing heavy: the promise behind their start-up times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["torch", "diffusers", "transformers", "accelerate", "PIL", "numpy", "huggingface_hub"]

# Runs the command line as the console script does, and tells on stderr's last line what was loaded by then.
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["generate", "--scheduler", "help"],
        ["generate", "--dry-run", "an apple"],
        ["train-unet", "--help"],
        ["train-vae", "--help"],
        ["train-text-encoder", "--help"],
        ["dataset", "--help"],
        ["dataset", "cache", "--help"],
        ["plot", "--help"],
        ["encode", "--help"],
        ["decode", "--help"],
        ["info", "--help"],
        ["models", "--help"],
        ["models", "list"],
        ["models", "path"],
        ["models", "show", "starter"],
        ["selftest", "--help"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_loaded(arguments: list[str], tmp_path: Path) -> None:
    # An empty HOME of its own: what the user configured or downloaded must not matter.
    env = {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", RUNNER, json.dumps(HEAVY), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert json.loads(done.stderr.splitlines()[-1]) == []
