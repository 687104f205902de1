"""Folders are layers: a folder imports only from the folders below it. Read from the source, without running it."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sdcli"

FOLDERS = (
    "cli",
    "server",
    "cluster",
    "training",
    "data",
    "generation",
    "diffusion",
    "models",
    "encoders",
    "vae",
    "metadata",
    "images",
    "request",
    "io",
    "errors",
)
"""The layers from the top down; the package itself (`sdcli`, its version) is below all of them, `__main__` above."""

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def height(module: str) -> int:
    """The layer of a module, counted from the bottom."""
    folder = module.partition(".")[0]
    if folder in {"", "__main__"}:
        return -1 if not folder else len(FOLDERS)
    assert folder in FOLDERS, f"sdcli/{folder} has no place in FOLDERS, at the top of {Path(__file__).name}"
    return len(FOLDERS) - FOLDERS.index(folder)


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports_of(module: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a module."""
    found = []
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{MODULES[module]}:{node.lineno}: imports are absolute here"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def own_imports_of(module: str) -> Iterator[tuple[int, str]]:
    """(line, module of sdcli without the leading `sdcli.`) of every import of such a module."""
    for line, name in imports_of(module):
        if name == "sdcli" or name.startswith("sdcli."):
            inner = name.removeprefix("sdcli").lstrip(".")
            while inner not in MODULES:  # `from sdcli.errors import SdcliError` names a class at its end
                inner = inner.rpartition(".")[0]
            yield line, inner


def test_imports_point_down() -> None:
    upward = [
        f"{MODULES[module]}:{line} imports sdcli.{imported}"
        for module in MODULES
        for line, imported in own_imports_of(module)
        if height(imported) > height(module)
    ]
    assert len(MODULES) > 300
    assert upward == []


def test_no_imports_form_a_cycle() -> None:
    graph = {module: {name for _, name in own_imports_of(module) if name} - {module} for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


HEAVY = frozenset(
    {"accelerate", "datasets", "diffusers", "fsspec", "huggingface_hub", "matplotlib", "numpy", "peft", "pyarrow"}
    | {"PIL", "rich", "safetensors", "tokenizers", "torch", "transformers"}
)
TORCH = frozenset({"torch", "diffusers", "transformers"})
SERVER = frozenset({"fastapi", "starlette", "uvicorn", "prometheus_client"})


@pytest.mark.parametrize(
    ("place", "unwanted"),
    [
        ("request", HEAVY),
        ("cli", HEAVY | SERVER),
        ("images.formats", HEAVY),
        ("vae.config", HEAVY),
        ("generation.resolve", TORCH),
        ("generation.settings", TORCH),
        ("generation.journal", TORCH),
        ("models.registry", TORCH),
        ("models.layout", TORCH),
        ("server", TORCH),
    ],
)
def test_what_plans_and_parses_imports_nothing_heavy(place: str, unwanted: frozenset[str]) -> None:
    modules = [f"sdcli.{name}" for name in MODULES if name == place or name.startswith(f"{place}.")]
    assert modules
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, *modules], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert set(done.stdout.split()) & unwanted == set()


def test_no_class_has_the_name_of_another() -> None:
    names = [node.name for module in MODULES for node in tree_of(module).body if isinstance(node, ast.ClassDef)]
    assert len(names) > 100
    assert sorted(names) == sorted(set(names))
