"""Who may import whom: docs/architecture.md's layers, read off the source without running it."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sdcli"

# The one table: every module of sdcli stands in one layer. `cli.*` takes in everything under sdcli/cli/.
LAYERS: tuple[tuple[str, ...], ...] = (
    # 0: what is asked; starts in no time
    (
        "",
        "conditioning.prompt",  # pure text
        "embedding_files",
        "canvas",
        "controls",
        "errors",
        "files",
        "hub",
        "hub_cache",
        "image_prompts",
        "inputs",
        "jobs",
        "journal",
        "loras",
        "model_folder",
        "model_sources",
        "naming",
        "registry",
        "request",
        "request_parts",
        "schedulers",
        "settings",
        "single_file",
        "sheet_labels",
        "train_settings",
        "training",
        "training.events",
        "training.launch",
        "training.run_folder",
        "training.run_log",
        "training.smoothing",
        "dataset",
        "sweeping",
        "user_models",
        "wildcards",
    ),
    # 1: the parts
    (
        "conditioning.*",
        "comparison",
        "contact_sheet",
        "control_maps",
        "controlling",
        "controlnets",
        "convert",
        "counted",
        "dataset.cache",
        "dataset.cache_store",
        "dataset.duplicates",
        "dataset.examine",
        "dataset.folders",
        "dataset.framing",
        "dataset.hub_files",
        "dataset.pairs",
        "dataset.parquet",
        "dataset.records",
        "dataset.shards",
        "dataset.sources",
        "dataset.tables",
        "denoise.*",
        "devices",
        "foreign",
        "gallery",
        "glance",
        "heatmap",
        "images",
        "ip_adapters",
        "latent_files",
        "latents",
        "lean_imports",
        "loading",
        "lora_weights",
        "metadata",
        "metrics",
        "plotting",
        "safety",
        "spaces",
        "start_pictures",
        "starting",
        "trace",
        "watermark",
        "training.checkpoint",
        "training.objective",
        "training.state_files",
        "picture_files",  # the one way to open a picture; images and metadata stand on it
        "weights",
    ),
    # 2: one batch, from requests to pictures
    ("painter", "pipeline", "prediction"),
    # 3: many batches, kept warm; training
    ("codec", "dataset.encode_cache", "engine", "explaining", "forward_process", "selftest", "training.*", "verify"),
    # 4: the mouths
    ("__main__", "cli.*"),
)
QUICK_LAYERS = {0, 4}
HEAVY = {
    "accelerate",
    "datasets",
    "diffusers",
    "fsspec",
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "peft",
    "pyarrow",
    "PIL",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def layer_of(module: str) -> int | None:
    for number, names in enumerate(LAYERS):
        for name in names:
            if module == name or (name.endswith(".*") and (module + ".").startswith(name[:-1])):
                return number
    return None


def imports_of(module: str, *, at_start: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of what a module imports; with `at_start` only what runs when it is imported."""
    pending: list[ast.AST] = [ast.parse(MODULES[module].read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"sdcli/{module}:{node.lineno}: imports are absolute here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        pending += ast.iter_child_nodes(node)


def own_imports_of(module: str, *, at_start: bool = False) -> Iterator[tuple[int, str]]:
    """The same for modules of sdcli, without the leading `sdcli.`."""
    for line, name in imports_of(module, at_start=at_start):
        if name == "sdcli" or name.startswith("sdcli."):
            inner = name.removeprefix("sdcli").lstrip(".")
            while inner not in MODULES:  # `from sdcli.errors import SdcliError` names a class at its end
                inner = inner.rpartition(".")[0]
            yield line, inner


def test_every_module_stands_in_a_layer() -> None:
    homeless = [module for module in MODULES if layer_of(module) is None]
    assert not homeless, f"give these a place in LAYERS, at the top of {Path(__file__).name}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    own = layer_of(module)
    assert own is not None
    for line, imported in own_imports_of(module):
        theirs = layer_of(imported)
        assert theirs is not None
        assert theirs <= own, f"{MODULES[module]}:{line}: layer {own} imports {imported} of layer {theirs}"


def test_no_imports_go_in_a_circle() -> None:
    graph = {module: {name for _, name in own_imports_of(module) if name} - {module} for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("module", [module for module in MODULES if layer_of(module) in QUICK_LAYERS])
def test_what_starts_quickly_imports_nothing_heavy_at_its_top(module: str) -> None:
    for line, name in imports_of(module, at_start=True):
        assert name.partition(".")[0] not in HEAVY, f"{MODULES[module]}:{line} imports {name}"
    for line, name in own_imports_of(module, at_start=True):
        assert layer_of(name) in QUICK_LAYERS, f"{MODULES[module]}:{line} imports {name}, which may import torch"
