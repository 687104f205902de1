"""The values of ComfyUI's nodes that hold or compute a text or a number, where they are certain. Nothing is run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sdcli.metadata.comfyui.graph import Graph, Node

MAX_TEXT = 100_000
"""Characters of a computed text; a few nodes that double a text make more than fits in memory."""
MAX_DEPTH = 64
"""Nodes that compute one value, one behind the other."""


class Unknown(Exception):
    """A value that cannot be determined; the message is why, without a subject: `is from node 3 (Foo), which ...`."""


@dataclass(frozen=True)
class Known:
    """A value, and the inputs that it comes from: (id of a node, name)."""

    value: Any
    sources: frozenset[tuple[str, str]]


Arguments = Callable[..., Any]
"""Name of an input, and its default value if it may be missing -> its value. Raises Unknown."""


class Values:
    """Evaluates inputs of a graph's nodes."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[tuple[str, int], Known | str] = {}

    def of(self, node: Node, name: str, *, depth: int = 0) -> Known:
        """The value of an input. Raises Unknown, also for an input that is missing or holds no plain value."""
        if name not in node.inputs:
            raise Unknown(f"is missing from node {node.id} ({node.kind})")
        value = node.inputs[name]
        if isinstance(value, dict) and value.keys() == {"__value__"}:  # how ComfyUI distinguishes a list from a link
            value = value["__value__"]
        elif self._graph.is_link(value):
            output = self._graph.linked(value)
            if output is None:
                raise Unknown(f"is from node {value[0]}, which is missing")
            found = self._computed(output.node, output.slot, depth)
            return Known(found.value, found.sources | {(node.id, name)})
        if isinstance(value, list | dict) or value is None:
            raise Unknown(f"is no plain value in node {node.id} ({node.kind})")
        return Known(value, frozenset({(node.id, name)}))

    def _computed(self, node: Node, slot: int, depth: int) -> Known:
        key = node.id, slot
        if key not in self._known:
            self._known[key] = f"is from a loop at node {node.id} ({node.kind})"
            try:
                self._known[key] = self._compute(node, slot, depth)
            except Unknown as error:
                self._known[key] = str(error)
        found = self._known[key]
        if isinstance(found, str):
            raise Unknown(found)
        return found

    def _compute(self, node: Node, slot: int, depth: int) -> Known:
        compute = _NODES.get(node.kind)
        if compute is None or slot != 0:
            raise Unknown(f"is from node {node.id} ({node.kind}), whose value is not stored")
        if depth >= MAX_DEPTH:
            raise Unknown("is computed by too many nodes")
        used: set[tuple[str, str]] = set()

        def argument(name: str, *default: Any) -> Any:
            if name not in node.inputs and default:
                return default[0]
            found = self.of(node, name, depth=depth + 1)
            used.update(found.sources)
            return found.value

        try:
            value = compute(argument, node.inputs)
        except (TypeError, ValueError, AttributeError):
            raise Unknown(f"is from node {node.id} ({node.kind}), whose inputs are of the wrong type") from None
        if value is None:
            raise Unknown(f"is from node {node.id} ({node.kind}), whose value is not certain")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise Unknown(f"is from node {node.id} ({node.kind}), which makes too long a text")
        return Known(value, frozenset(used))


def _held(name: str) -> Callable[[Arguments, Mapping[str, Any]], Any]:
    """A node whose output is one of its inputs."""
    return lambda argument, inputs: argument(name)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _concatenated(argument: Arguments, inputs: Mapping[str, Any]) -> Any:
    return _text(argument("delimiter", "")).join((_text(argument("string_a")), _text(argument("string_b"))))


def _replaced(argument: Arguments, inputs: Mapping[str, Any]) -> Any:
    return replaced(_text(argument("string")), _text(argument("find")), _text(argument("replace")))


def replaced(text: str, find: str, new: str) -> str | None:
    """`text.replace(find, new)`, or None where it would be too long."""
    if len(text) + text.count(find) * max(0, len(new) - len(find)) > MAX_TEXT:
        return None
    return text.replace(find, new)


def _trimmed(argument: Arguments, inputs: Mapping[str, Any]) -> Any:
    text, mode = _text(argument("string")), argument("mode", "Both")
    return {"Both": text.strip, "Left": text.lstrip, "Right": text.rstrip}.get(mode, lambda: None)()


def _cased(argument: Arguments, inputs: Mapping[str, Any]) -> Any:
    text = _text(argument("string"))
    cases = {"UPPERCASE": text.upper, "lowercase": text.lower, "Capitalize": text.capitalize, "Title Case": text.title}
    return cases.get(argument("mode"), lambda: None)()


def _substring(argument: Arguments, inputs: Mapping[str, Any]) -> Any:
    return _text(argument("string"))[argument("start") : argument("end")]


def _was_concatenated(argument: Arguments, inputs: Mapping[str, Any]) -> Any:
    """WAS Node Suite: the texts that are not empty, in the order of their names."""
    names = sorted(inputs.keys() - {"delimiter", "clean_whitespace"})
    if not names or not all(re.fullmatch(r"text_[a-z]", name) for name in names):
        return None  # another version of the node
    texts = [_text(argument(name)) for name in names]
    if argument("clean_whitespace") in ("true", True):
        texts = [text.strip() for text in texts]
    delimiter = _text(argument("delimiter"))
    return ("\n" if delimiter == "\\n" else delimiter).join(filter(None, texts))


def _was_text(argument: Arguments, inputs: Mapping[str, Any]) -> Any:
    """WAS Node Suite: lines with # are comments, and [words] may be tokens that it replaces."""
    text = _text(argument("text"))
    return None if re.search(r"\[|^\s*#", text, re.MULTILINE) or text != text.strip() or "\r" in text else text


def _pysssss_function(argument: Arguments, inputs: Mapping[str, Any]) -> Any:
    """Custom-Scripts: append or replace; regular expressions and tidied tags are not computed."""
    first, second, third = (_text(argument(name, "")) for name in ("text_a", "text_b", "text_c"))
    if argument("tidy_tags") != "no":
        return None
    if argument("action") == "append":
        return first + second + third
    if argument("action") != "replace" or (second.startswith("/") and second.endswith("/")):
        return None
    return replaced(first, second, third)


def _joined(*names: str, delimiter: str) -> Callable[[Arguments, Mapping[str, Any]], Any]:
    """Nodes that join texts; one that is empty is left out by some versions, so that nothing is certain then."""

    def compute(argument: Arguments, inputs: Mapping[str, Any]) -> Any:
        texts = [_text(argument(name)) for name in names]
        return _text(argument(delimiter)).join(texts) if all(texts) else None

    return compute


def _one_line(argument: Arguments, inputs: Mapping[str, Any]) -> Any:
    """KJNodes strips line ends, or doubles them: certain only without them."""
    text = _text(argument("string"))
    return text if len(text.splitlines()) <= 1 else None


def _populated(argument: Arguments, inputs: Mapping[str, Any]) -> Any:
    """Impact Pack: the text that wildcards were replaced in, which is processed again."""
    text = _text(argument("populated_text"))
    return None if re.search(r"[{}<>]|__|^\s*#", text, re.MULTILINE) else text


_NODES: dict[str, Callable[[Arguments, Mapping[str, Any]], Any]] = {
    **{
        kind: _held("value")
        for kind in (
            "PrimitiveString", "PrimitiveStringMultiline", "PrimitiveInt", "PrimitiveFloat", "PrimitiveBoolean",
            "PrimitiveNode", "INTConstant", "FloatConstant", "easy string", "easy int", "easy float",
        )
    },
    **{kind: _held("text") for kind in ("CR Text", "ttN text", "ShowText|pysssss")},
    **{kind: _held("seed") for kind in ("Seed (rgthree)", "easy seed", "CR Seed", "Seed Everywhere", "ttN seed")},
    **{kind: _held("string") for kind in ("String Literal", "StringConstant")},
    "CR Prompt Text": _held("prompt"),
    "easy positive": _held("positive"),
    "easy negative": _held("negative"),
    "Int Literal": _held("int"),
    "Int Literal (Image Saver)": _held("int"),
    "Float Literal": _held("float"),
    "StringConcatenate": _concatenated,
    "StringReplace": _replaced,
    "StringTrim": _trimmed,
    "CaseConverter": _cased,
    "StringSubstring": _substring,
    "Text Concatenate": _was_concatenated,
    "Text Multiline": _was_text,
    "CR Text Concatenate": _joined("text1", "text2", delimiter="separator"),
    "JoinStrings": _joined("string1", "string2", delimiter="delimiter"),
    "StringConstantMultiline": _one_line,
    "StringFunction|pysssss": _pysssss_function,
    "ImpactWildcardProcessor": _populated,
}  # fmt: skip
"""ComfyUI's `class_type` -> what it computes, None for a value that is not certain."""
