"""What every test stands on: no network, no user configuration, and micro models that diffusers itself wrote."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.forked import run_forked

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # --mixed-precision auto is the same on every CPU
os.environ.pop("SDCLI_MODELS_FILE", None)

# A busy machine is slow, not wrong.
settings.register_profile("sdcli", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sdcli")

REPOSITORY = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def _homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders to be made: `mktemp` would look through those of thousands of tests for a free name."""
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _own_home(_homes: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty HOME, so that no test reads or writes the user's files."""
    home = next(_homes)
    home.mkdir()
    for name in (
        "HOME",
        "XDG_CONFIG_HOME",
        "XDG_CACHE_HOME",
        "XDG_DATA_HOME",
        "XDG_STATE_HOME",
        "XDG_RUNTIME_DIR",
        "HF_HOME",
    ):
        monkeypatch.setenv(name, str(home if name == "HOME" else home / name.lower()))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


class Disk:
    """A real file system of its own, at the new folder `path`; needs the right to mount."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        mount = shutil.which("mount")
        if mount is None or self._mount("size=1g"):
            pytest.skip("no right to mount a small disk here")

    def resize(self, size: int) -> None:
        assert not self._mount(f"remount,size={size}")

    def read_only(self) -> None:
        assert not self._mount("remount,ro")

    def _mount(self, options: str) -> int:
        line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        return subprocess.run(line, capture_output=True).returncode


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    yield made
    subprocess.run(["umount", str(made.path)], check=True)


@pytest.fixture
def sdcli(tmp_path: Path) -> Run:
    """Run the command line in a process of its own, here in `tmp_path`.

    With options of subprocess.run, `env={}` at the least, that is a new interpreter, as a user starts it.
    """

    def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        if not options.keys() - {"input"}:
            return run_forked([*map(str, arguments)], cwd=tmp_path, timeout=240, given=str(options.get("input", "")))
        settings: dict[str, object] = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 240}
        command = [sys.executable, "-m", "sdcli", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **options.pop("env", {})}  # type: ignore[dict-item]
        return subprocess.run(command, env=environment, **{**settings, **options})  # type: ignore[call-overload,no-any-return]

    return run


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro Stable Diffusion 1.x in the diffusers layout."""
    from tests.tiny import save_tiny_pipeline

    return save_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny-sd")
