"""The syntax of prompts as pure text: what A1111 reads, what is malformed, and what is hostile."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcli.errors import UsageError
from sdcli.request.prompt_syntax import (
    MAX_PARTS,
    Chunk,
    Span,
    SubPrompt,
    Text,
    chunked,
    schedule,
    sections,
    subprompts,
    used,
    wrapped,
)

MANY = 20_000
"""What takes quadratic time takes minutes with it."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fox", [(10, "a fox")]),
        ("a [fox:owl:4] here", [(4, "a fox here"), (10, "a owl here")]),
        ("a [fox:owl:.25]", [(2, "a fox"), (10, "a owl")]),
        ("a [hat:0.5]", [(5, "a "), (10, "a hat")]),
        ("a [hat::3]", [(3, "a hat"), (10, "a ")]),
        ("[a: b : 1 ]", [(1, "a"), (10, " b ")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-3]", [(10, "b")]),
        ("[a:b:99]", [(10, "a")]),
        ("[a:b:1e999]", [(10, "a")]),
        ("x[a:[b:c:6]:2]y", [(2, "xay"), (6, "xby"), (10, "xcy")]),
        ("[(a:1.2):(b:0.8):5] [[c]]", [(5, "(a:1.2) [[c]]"), (10, "(b:0.8) [[c]]")]),
        ("[a|b]", [(step, "ab"[(step - 1) % 2]) for step in range(1, 11)]),
        (
            "[a|][c:d:2]",
            [(1, "ac"), (2, "c"), (3, "ad"), (4, "d"), (5, "ad"), (6, "d"), (7, "ad"), (8, "d"), (9, "ad"), (10, "d")],
        ),
        (
            "[a|b|[c:d:5]]",
            [(1, "a"), (2, "b"), (3, "c"), (4, "a"), (5, "b"), (6, "d"), (7, "a"), (8, "b"), (9, "d"), (10, "a")],
        ),
        # malformed: text
        ("a [fox", [(10, "a [fox")]),
        ("[a:b:c:4]", [(10, "[a:b:c:4]")]),
        ("[a:b]", [(10, "[a:b]")]),
        ("[a|b:4]", [(10, "[a|b:4]")]),
        ("[a (b:c:4]", [(10, "[a (b:c:4]")]),
        (r"[a\:b\]:4", [(10, r"[a\:b\]:4")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        (") [a:b:3]", [(3, ") a"), (10, ") b")]),
        ("tail\\", [(10, "tail\\")]),
    ],
)
def test_editing_and_alternation_are_spelled_out_step_by_step(text: str, expected: list[tuple[int, str]]) -> None:
    assert list(schedule(text, steps=10)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fox", [("a fox", 1)]),
        ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
        ("a (red:1.3) [hat]", [("a ", 1), ("red", 1.3), (" ", 1), ("hat", 1 / 1.1)]),
        ("((a (b:1.5)) c)", [("a ", 1.21), ("b", 1.815), (" c", 1.1)]),
        ("(a: 0.5 )(b:.5)", [("ab", 0.5)]),
        ("(a:-2)", [("a", -2)]),
        (r"\(a\) \[b\] \\", [("(a) [b] \\", 1)]),
        ("(a", [("a", 1.1)]),
        ("[a", [("a", 1 / 1.1)]),
        ("a) b] c:1.3) 5:4", [("a) b] c:1.3) 5:4", 1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("", []),
        ("()", []),
    ],
)
def test_brackets_weigh_what_is_in_them(text: str, expected: list[tuple[str, float]]) -> None:
    (spans,) = sections(text)
    assert [span.text for span in spans] == [text for text, _ in expected]
    assert [span.weight for span in spans] == pytest.approx([weight for _, weight in expected])


def test_break_ends_a_chunk_and_only_as_a_word() -> None:
    assert sections("a BREAK b") == [[Span("a ", 1)], [Span(" b", 1)]]
    assert sections("(a BREAK b:2)") == [[Span("a ", 2)], [Span(" b", 2)]]
    assert sections("BREAKFAST break") == [[Span("BREAKFAST break", 1)]]


@given(st.text(alphabet=st.characters(exclude_characters="()[]|:\\")).filter(lambda text: "BREAK" not in text))
def test_a_prompt_without_syntax_is_one_span_of_weight_one(text: str) -> None:
    assert schedule(text, steps=7) == ((7, text),)
    assert sections(text) == [[Span(text, 1.0)] if text else []]


@given(st.text(alphabet="a ()[]:\\.,"))
def test_without_a_number_and_an_alternative_nothing_changes_over_the_steps(text: str) -> None:
    assert schedule(text, steps=7) == ((7, text),)


@settings(max_examples=300)
@given(st.text(alphabet="ab ()[]:|\\05", max_size=40))
def test_any_text_is_read_and_no_letter_is_invented(text: str) -> None:
    for last, spelled in schedule(text, steps=5):
        assert 1 <= last <= 5
        try:
            letters = "".join(span.text for spans in sections(spelled) for span in spans)
        except UsageError:
            continue
        assert letters.count("a") == spelled.count("a") <= text.count("a")


@pytest.mark.parametrize(
    "text",
    [
        "(" * MANY + ")" * MANY,
        "[a|" * MANY + "b" + "]" * MANY,
        "[a:" * MANY + "b" + ":3]" * MANY,
        "([)]" * MANY,
        ":" * MANY,
        ": " + " " * MANY * 5 + ")",
        ":" + "1" * MANY,
        (" " * 1000 + "BREAKx") * 500,
    ],
    ids=lambda text: text[:6],
)
def test_twenty_thousand_brackets_are_read_in_linear_time(text: str) -> None:
    assert all(sections(spelled) for _, spelled in schedule(text, steps=3))


@pytest.mark.parametrize(
    ("text", "steps", "sentence"),
    [
        ("(" * 200 + "a", 5, "a weight in the prompt comes to 1.899e\\+08"),
        ("(" * MANY + "a", 5, "comes to inf"),
        ("(a:1001)", 5, "comes to 1001; it may be up to 1000"),
        ("a AND b:" + "9" * 400, 5, "comes to inf"),
        (" AND ".join("abc" * 20), 5, f"AND joins 60 prompts; it may be up to {MAX_PARTS}"),
        ("[a|b]" + "x" * MANY, 1000, "changes 1,000 times"),
    ],
)
def test_what_is_absurd_is_refused(text: str, steps: int, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        used(subprompts(text, steps=steps), ())


def test_and_joins_prompts_with_weights_but_not_in_a_negative_prompt() -> None:
    assert subprompts("a cat AND [a:b:2] dog :0.7", steps=4) == (
        SubPrompt(1.0, ((4, Text.of("a cat ")),)),
        SubPrompt(0.7, ((2, Text.of(" a dog ")), (4, Text.of(" b dog ")))),
    )
    assert subprompts("a AND b:-.5", steps=1)[1].weight == -0.5
    assert subprompts("at 12:30", steps=1) == (SubPrompt(1.0, ((1, Text.of("at 12:30")),)),)
    assert subprompts("a SANDY AND", steps=1)[1] == SubPrompt(1.0, ((1, Text.of("")),))
    assert len(subprompts("a AND b", steps=1, compose=False)) == 1


def test_a_template_wraps_each_prompt_that_and_joins() -> None:
    assert wrapped("a cat", "{prompt}, glossy") == "a cat, glossy"
    assert wrapped("a cat AND a dog:0.7", "{prompt}, glossy") == "a cat, glossy AND a dog, glossy:0.7"


WORDS = {",": 0}


def words(text: str) -> list[int]:
    return [WORDS.setdefault(word, len(WORDS)) for word in text.replace(",", " , ").split()]


def spelled(chunks: tuple[Chunk, ...]) -> list[str]:
    by_id = {number: word for word, number in WORDS.items()} | {-1: "<0>", -2: "<1>"}
    return [" ".join(by_id[id] for id in chunk.ids) for chunk in chunks]


def cut(text: str, **options: object) -> list[str]:
    return spelled(chunked(Text.of(text), words, **{"room": 6, "comma": 0, **options}))  # type: ignore[arg-type]


def test_chunks_are_filled_and_end_after_a_near_comma() -> None:
    assert cut("") == [""]
    assert cut("a b c d e f") == ["a b c d e f"]
    assert cut("a b c d e f g") == ["a b c d e f", "g"]
    assert cut("a b , c d e f g") == ["a b ,", "c d e f g"]
    assert cut("a b c d e f , g") == ["a b c d e f", ", g"]
    assert cut("a , " + "b " * 30, room=25)[0] == "a , " + " ".join("b" * 23), "the comma is too far away"
    assert cut("a BREAK b") == ["a", "b"]
    assert cut("a BREAK") == ["a"]
    assert cut("BREAK a") == ["", "a"]


@given(st.text(alphabet="ab ,", max_size=60), st.integers(1, 9))
def test_chunks_lose_no_token_and_hold_no_more_than_fits(text: str, room: int) -> None:
    chunks = chunked(Text.of(f"({text}:0.5)"), words, room=room, comma=0)
    assert [id for chunk in chunks for id in chunk.ids] == words(text)
    assert all(len(chunk.ids) <= room and chunk.weights == (0.5,) * len(chunk.ids) for chunk in chunks)


def test_a_word_of_an_embedding_becomes_its_rows_in_any_case_and_within_weights() -> None:
    tokens = {"my-cat": range(2)}
    assert cut("a My-Cat hat", tokens=tokens) == ["a <0> <1> hat"]
    assert cut("my-cats, xmy-cat", tokens=tokens) == ["my-cats , xmy-cat"]
    assert cut("a b c d e my-cat f", tokens=tokens) == ["a b c d e", "<0> <1> f"]
    (chunk,) = chunked(Text.of("a (my-cat:1.5)"), words, room=6, tokens=tokens)
    assert (chunk.ids[1:], chunk.weights) == ((-1, -2), (1.0, 1.5, 1.5))
    assert used(subprompts("a [fox:my-cat:3]", steps=9), ["my-cat", "cat", "owl"]) == {"my-cat", "cat"}
