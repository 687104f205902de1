"""ComfyUI's prompts mean here what they mean there, and keep their text where both tools read the same."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdcli.errors import UsageError
from sdcli.metadata.comfyui.syntax import ConvertedPrompt, converted
from sdcli.request.lora_tags import Tags, read_tags
from sdcli.request.prompt_syntax import subprompts

PIECES = [
    "a", "cat", " ", ", ", "(", ")", "((", "))", "[", "]", "|", ":", ":1.2)", ":0.5)", ":1.2:", ":-1)", ":1e2)", "1.3",
    "\\(", "\\)", "\\", "\\\\", "\\[", "AND", " AND ", "BREAK", "\n", "<lora:x:1>", "<hypernet:", "<break>",
    "<", ">", "{a|b}", "狐", "%",
]  # fmt: skip


def comfyui_reads(text: str) -> list[tuple[str, float]]:
    """What ComfyUI makes of a text: a model of `token_weights` in comfy/sd1_clip.py, letter by letter."""
    hidden = re.sub(r"\\([()])", lambda match: "\0" + match[1], text)
    found: list[tuple[str, float]] = []

    def walk(part: str, weight: float) -> None:
        level, held = 0, ""
        letters = re.findall(r"\0.|[^\0]", part, re.DOTALL)
        for letter in letters:
            if letter == "(" and level == 0 and held:
                leaf_or_group(held, weight)
                held = ""
            level += (letter == "(") - (letter == ")")
            held += letter
            if letter == ")" and level == 0:
                leaf_or_group(held, weight)
                held = ""
        if held:
            leaf_or_group(held, weight)

    def leaf_or_group(part: str, weight: float) -> None:
        if not (len(part) >= 2 and part[0] == "(" and part[-1] == ")" and part[-2:-1] != "\0"):
            found.extend((letter[-1], weight) for letter in re.findall(r"\0.|[^\0]", part, re.DOTALL))
            return
        inner = part[1:-1]
        before, colon, number = inner.rpartition(":")
        try:
            walk(before, float(number)) if colon and before else walk(inner, weight * 1.1)
        except ValueError:
            walk(inner, weight * 1.1)

    walk(hidden, 1.0)
    return [(letter, round(weight, 4)) for letter, weight in found]


def sdcli_reads(text: str) -> list[tuple[str, float]]:
    """Letters with their weights; there is one text at all steps, and no AND, BREAK or tag."""
    (part,) = subprompts(text, steps=20)
    ((_, read),) = part.texts
    (spans,) = read.sections
    assert read_tags(text) == Tags(text)
    return [(letter, round(span.weight, 4)) for span in spans for letter in span.text]


def check(text: str) -> bool:
    """Whether the text has a prompt here; if so, it is read as ComfyUI reads it."""
    try:
        found = converted(text)
    except UsageError:
        return False
    assert sdcli_reads(found.text) == comfyui_reads(text), text
    return True


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@example("a (b \\) c:1.2) d")
@example("\\AND \\(BREAK\\)")
@settings(max_examples=100, deadline=None)
def test_a_prompt_is_read_as_comfyui_reads_it(text: str) -> None:
    check(text)


@pytest.mark.slow
def test_many_prompts_are_read_as_comfyui_reads_them() -> None:
    draw = random.Random(5)
    texts = ["".join(draw.choices(PIECES, k=draw.randint(1, 14))) for _ in range(5_000)]
    assert sum(map(check, texts)) > 4_900


@pytest.mark.parametrize(
    "text", ["a cat", "a (red:1.2) cat", "((a))", "a \\(b\\)", "(a:0.5), (b)", "at 12:30", "{a|b}", "", "a, __x__ \n b"]
)
def test_a_text_that_both_read_the_same_stays_as_it_is(text: str) -> None:
    assert converted(text) == ConvertedPrompt(text)


@pytest.mark.parametrize(
    ("text", "prompt", "escaped"),
    [
        ("a cat AND a dog", "a cat A\\ND a dog", ("AND",)),
        ("[a|b] [c:d:0.5] BREAK", "\\[a|b\\] \\[c:d:0.5\\] B\\REAK", ("BREAK", "[ ]")),
        ("<lora:ink:1> fox", "\\<lora:ink:1> fox", ("<name:>",)),
        ("((a:1.2) b:1.5)", "(a:1.2)( b:1.5)", ()),  # an inner weight replaces the outer one
        ("(a", "\\(a", ()),
        ("a\\b", "a\\\\b", ()),
        ("(a [b]:1.3)", "(a \\[b\\]:1.3)", ("[ ]",)),
    ],
)
def test_what_means_nothing_to_comfyui_is_escaped_and_said(text: str, prompt: str, escaped: tuple[str, ...]) -> None:
    assert converted(text) == ConvertedPrompt(prompt, escaped)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("embedding:ink, a fox", "ink, a fox"),
        ("(embedding:sub/ink.safetensors:1.2)", "(ink:1.2)"),
        ("a embedding:sub\\ink.pt", "a ink"),
    ],
)
def test_embeddings_become_words(text: str, prompt: str) -> None:
    assert converted(text) == ConvertedPrompt(prompt, (), ("ink",))


@pytest.mark.parametrize("text", ["(a:nan)", "(a:inf)", "(a:1e9)", "(" * 200 + "a" + ")" * 200, "a" * 200_000])
def test_weights_and_lengths_without_a_meaning_here_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"weight|nested|characters"):
        converted(text)
