"""Outside models/families/ no code asks which family a model is: it asks the `Family` for a capability, or calls it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdcli.models.families import FAMILIES

PACKAGE = Path(__file__).resolve().parents[3] / "sdcli"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if PACKAGE / "models" / "families" not in path.parents]
PROCESSES = {"diffusion", "flow"}
PIPELINES = {pipeline for family in FAMILIES.values() for pipeline in family.pipelines}
OBJECTS = {family.name.upper().replace("-", "_") for family in FAMILIES.values()}
PROCESS_TABLES = {PACKAGE / "request" / "schedulers.py", PACKAGE / "diffusion" / "noise_schedule.py"}
"""They say what each process is, whoever uses it."""


def questions(source: str) -> Iterator[str]:
    """What in a module's source depends on the family, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare | ast.Match | ast.Subscript | ast.Dict):
            for inner in compared(node):
                if isinstance(inner, ast.Constant) and inner.value in {*FAMILIES, *PIPELINES, *PROCESSES}:
                    yield f"{node.lineno}: asks for {inner.value!r}"
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name.removeprefix("is_") != name and name.removeprefix("is_").upper() in OBJECTS:
                yield f"{node.lineno}: asks {name}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sdcli.models.families"):
            for alias in node.names:
                if alias.name in OBJECTS:
                    yield f"{node.lineno}: imports {alias.name}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            kinds = {inner.id for inner in ast.walk(node.args[1]) if isinstance(inner, ast.Name)}
            if any("Transformer" in kind or kind.startswith("UNet") for kind in kinds):
                yield f"{node.lineno}: isinstance of {', '.join(sorted(kinds))}"


def compared(node: ast.Compare | ast.Match | ast.Subscript | ast.Dict) -> Iterator[ast.AST]:
    """The constants that decide: those that are compared with, matched, or keys."""
    match node:
        case ast.Compare():
            for side in (node.left, *node.comparators):
                yield from ast.walk(side)
        case ast.Match():
            for case in node.cases:
                yield from ast.walk(case.pattern)
        case ast.Subscript():
            yield node.slice
        case ast.Dict():
            yield from (key for key in node.keys if key is not None)


def test_no_module_asks_which_family_a_model_is() -> None:
    assert len(MODULES) > 300
    found = [(path, question) for path in MODULES for question in questions(path.read_text(encoding="utf-8"))]
    unexpected = [
        f"{path}: {question}"
        for path, question in found
        if path not in PROCESS_TABLES or not any(f"{process!r}" in question for process in PROCESSES)
    ]
    assert unexpected == []


@pytest.mark.parametrize(
    "source",
    [
        'if spec.family.name == "sdxl": pass',
        'if name in ("sd1", "sd2"): pass',
        'if spec.family.process == "flow": pass',
        'match family.name:\n    case "sd3": pass',
        'sizes = {"sd1": 512}',
        'size = sizes["sdxl"]',
        "if model.is_sdxl: pass",
        "from sdcli.models.families import SDXL",
        "isinstance(unet, SD3Transformer2DModel)",
        "isinstance(unet, UNet2DModel | UNet2DConditionModel)",
        'if pipeline == "LDMPipeline": pass',
    ],
)
def test_such_questions_are_found(source: str) -> None:
    assert list(questions(source))
