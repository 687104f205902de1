"""The set-up scripts and the wheel: the first command in a fresh checkout or installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"

# A stand-in for python3.11: creates a venv of itself, records the arguments of pip, and else runs Python.
FAKE_PYTHON = r"""#!/usr/bin/env bash
case "$*" in
    "-m venv "*)
        echo "venv" >>"$LOG"
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        echo "command = $0 -m venv $3" >"$3/pyvenv.cfg"
        echo noise from venv ;;
    "-m pip install "*)
        echo "pip $*" >>"$LOG"
        echo noise from pip
        sleep "${PIP_SECONDS:-0}"
        [ ! -e "$PIP_FAILS" ] || exit 1
        echo 'import os, sys; print(os.getcwd(), *sys.argv[1:], sep="|")' >"${0%/*}/sdcli"
        chmod +x "${0%/*}/sdcli" ;;
    "-c import torch"*) [ ! -e "$IMPORTS_FAIL" ] ;;
    "-c import pip" | "-c import ensurepip, venv") ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


class Checkout:
    """A copy of the scripts with a stand-in for Python, so that a set-up takes no time."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.caller = folder / "elsewhere"
        self.log = folder / "log"
        self.path = folder / "bin"
        for made in (self.root / "scripts", self.caller, self.path):
            made.mkdir(parents=True)
        for script in ("sdcli", "_venv.sh"):
            shutil.copy(SCRIPTS / script, self.root / "scripts")
        (self.root / "pyproject.toml").write_text("[project]\n")
        (self.root / "constraints.txt").write_text("torch==2.13.0\n")
        (self.path / "python3.11").write_text(FAKE_PYTHON)
        (self.path / "python3.11").chmod(0o755)
        self.env = {
            "PATH": f"{self.path}:/usr/bin:/bin",
            "LOG": str(self.log),
            "REAL_PYTHON": sys.executable,
            "PIP_FAILS": str(folder / "pip-fails"),
            "IMPORTS_FAIL": str(folder / "imports-fail"),
        }

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "scripts" / "sdcli", *arguments],
            cwd=self.caller,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def done(self) -> list[str]:
        """What was set up since the last call: "venv" for a new .venv, "pip" for each of pip's runs."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line.split()[0] for line in lines]


NEW = ["venv", "pip", "pip"]
IN_PLACE = ["pip", "pip"]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_first_call_sets_up_and_a_second_finds_it_done(checkout: Checkout) -> None:
    first = checkout.run("generate", "a red fox", "-o", "x.png")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{checkout.caller}|generate|a red fox|-o|x.png\n", "stdout and folder are the tool's own"
    assert "noise from pip" in first.stderr
    assert checkout.done() == NEW
    second = checkout.run("--help")
    assert (second.stdout, second.stderr) == (f"{checkout.caller}|--help\n", "")
    assert checkout.done() == []


def test_a_link_to_the_script_works_from_anywhere(checkout: Checkout, tmp_path: Path) -> None:
    link = tmp_path / "bin" / "generate"
    link.symlink_to(checkout.root / "scripts" / "sdcli")
    shown = subprocess.run([link, "x"], cwd="/", env=checkout.env, capture_output=True, text=True, check=True)
    assert shown.stdout == "/|x\n"


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_in_place(checkout: Checkout, file: str) -> None:
    checkout.run()
    checkout.done()
    (checkout.root / file).open("a").write("# changed\n")
    assert checkout.run().returncode == 0
    assert checkout.done() == IN_PLACE
    assert checkout.run().returncode == 0
    assert checkout.done() == []


def test_a_set_up_that_was_killed_is_taken_up_again(checkout: Checkout) -> None:
    killed = checkout.start(PIP_SECONDS="1")
    while not checkout.log.exists() or "pip" not in checkout.log.read_text():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait(timeout=60)
    checkout.done()
    again = checkout.run("x")
    assert again.stdout == f"{checkout.caller}|x\n"
    assert "waiting for it" in again.stderr, "pip outlived the script that was killed, and still holds the lock"
    assert "venv" not in checkout.done()
    assert killed.communicate(timeout=60)[0] == ""


def test_a_failed_install_is_reported_and_the_next_call_tries_again(checkout: Checkout) -> None:
    fails = Path(checkout.env["PIP_FAILS"])
    fails.touch()
    failed = checkout.run("x")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "could not install the packages" in failed.stderr
    fails.unlink()
    assert checkout.run("x").returncode == 0


def test_without_a_network_a_working_venv_is_not_thrown_away(checkout: Checkout) -> None:
    checkout.run()
    (checkout.root / "constraints.txt").write_text("torch==2.14.0\n")
    Path(checkout.env["PIP_FAILS"]).touch()
    failed = checkout.run()
    assert failed.returncode == 1
    assert "could not bring" in failed.stderr
    assert (checkout.root / ".venv" / "bin" / "sdcli").exists()


def test_damaged_packages_lead_to_a_new_venv(checkout: Checkout) -> None:
    checkout.run()
    checkout.done()
    (checkout.root / ".venv" / ".sdcli-stamp-run").unlink()
    Path(checkout.env["IMPORTS_FAIL"]).touch()
    failed = checkout.run()
    assert checkout.done() == IN_PLACE + NEW
    assert "could not install the packages" in failed.stderr


@pytest.mark.parametrize("damage", ["python is gone", "python is a dangling link", "pyvenv.cfg is gone", "empty"])
def test_a_broken_venv_is_made_anew(checkout: Checkout, damage: str) -> None:
    checkout.run()
    checkout.done()
    venv = checkout.root / ".venv"
    if damage == "empty":
        shutil.rmtree(venv)
        venv.mkdir()
    elif damage == "pyvenv.cfg is gone":
        (venv / "pyvenv.cfg").unlink()
        (venv / ".sdcli-stamp-run").unlink()
    else:
        (venv / "bin" / "python").unlink()
        if "link" in damage:
            (venv / "bin" / "python").symlink_to("/no/such/python3.11")
    assert checkout.run("x").stdout == f"{checkout.caller}|x\n"
    assert checkout.done() == NEW


def test_a_moved_checkout_gets_a_new_venv(checkout: Checkout) -> None:
    checkout.run()
    checkout.done()
    checkout.root = checkout.root.rename(checkout.root.parent / "moved")
    assert checkout.run("x").returncode == 0
    assert checkout.done() == NEW


def test_two_first_calls_at_once_make_one_venv(checkout: Checkout) -> None:
    calls = [checkout.start("x", PIP_SECONDS="0.5") for _ in range(3)]
    results = [call.communicate(timeout=60) for call in calls]
    assert [call.returncode for call in calls] == [0, 0, 0], results
    assert checkout.done() == NEW
    assert sum("waiting for it" in err for _, err in results) == 2


def test_without_a_supported_python_the_error_names_the_versions(checkout: Checkout) -> None:
    for name in ("python3.11", "python3.12", "python3.13", "python3", "python"):
        (checkout.path / name).write_text("#!/bin/sh\nexit 1\n")
        (checkout.path / name).chmod(0o755)
    failed = checkout.run()
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("sdcli: found no Python 3.11, 3.12 or 3.13")
    assert len(failed.stderr.splitlines()) == 1


def test_sdcli_torch_index_is_used_for_torch_alone(checkout: Checkout) -> None:
    checkout.run(SDCLI_TORCH_INDEX="https://example.org/cpu")
    torch, rest = (line for line in checkout.log.read_text().splitlines() if line.startswith("pip"))
    assert "torch==2.13.0 -c constraints.txt --extra-index-url https://example.org/cpu" in torch
    assert "example.org" not in rest


def test_every_dependency_is_pinned_within_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned in constraints.txt"
        assert version in requirement.specifier, f"constraints.txt pins {requirement.name} {version}, outside {text}"
    assert "+" not in pins["torch"], "a local version is found in one index only"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy without what git ignores."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv*", ".git", ".*_cache", "outputs", "dist"))
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist"],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_carries_everything_that_is_needed_offline(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "sdcli").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    assert package <= names
    assert {
        "sdcli/models.yaml",
        "sdcli/py.typed",
        "sdcli/encoders/clip_tokenizer/tokenizer.json",
        "sdcli/models/families/configs/sd1/unet/config.json",
        "sdcli/models/families/configs/sdxl/unet/config.json",
        "sdcli/starter/unet/diffusion_pytorch_model.safetensors",
    } <= names
    licenses = {name.split("/", 1)[1] for name in names if ".dist-info/licenses/" in name}
    assert licenses == {"licenses/LICENSE", "licenses/NOTICE"}
    assert {name.split("/")[0] for name in names} == {"sdcli", next(n for n in names if "METADATA" in n).split("/")[0]}


@pytest.mark.slow
def test_an_installed_wheel_works_from_any_folder_with_an_empty_home(wheel: Path, tmp_path: Path) -> None:
    home, elsewhere, venv = tmp_path / "home", tmp_path / "elsewhere", tmp_path / "venv"
    home.mkdir()
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    install = ["-m", "pip", "--python", venv / "bin" / "python", "install", "--no-deps", "--no-index", "-q", wheel]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    # The dependencies are this environment's own, named by a .pth file after the wheel's packages.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(str(Path(pytest.__file__).parent.parent) + "\n")
    env = {"PATH": os.environ["PATH"], "HOME": str(home)}

    def installed(*arguments: str) -> str:
        command = [str(venv / "bin" / "sdcli"), *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [venv / "bin" / "python", "-c", "import sdcli; print(sdcli.__file__)"]
    assert subprocess.check_output(where, cwd=elsewhere, env=env, text=True).startswith(str(site))
    assert "starter" in installed("models", "list")
    assert (elsewhere / installed("generate", "an apple", "--seed", "1", "--steps", "2").strip()).is_file()


@pytest.mark.slow
def test_the_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    source = wheel.parent.parent / "source"
    build = [sys.executable, "-m", "hatchling", "build", "-d", tmp_path]
    subprocess.run([*build, "-t", "sdist"], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extraction_filter = getattr(tarfile, "data_filter", None)  # which Python 3.11 has from 3.11.4 on
        packed.extractall(tmp_path)
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    subprocess.run([*build, "-t", "wheel"], cwd=unpacked, check=True, capture_output=True)
    (rebuilt,) = tmp_path.glob("*.whl")
    assert zipfile.ZipFile(rebuilt).namelist() == zipfile.ZipFile(wheel).namelist()
