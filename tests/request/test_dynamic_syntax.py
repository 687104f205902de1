"""sd-dynamic-prompts' templates: what each may become, by a model of the syntax, and what no template breaks."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdcli.errors import UsageError
from sdcli.request.wildcards import Wildcards

SEEDS = range(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wildcards of every kind of file."""
    path = tmp_path_factory.mktemp("wildcards")
    for name, text in {
        "pets": "cat\n# no\n\ndog # a comment\n",
        "head": "20::hat\n0.1::turban\n0::never\n",
        "hair colour": "blond\r\nginger\r\n",
        "colours-cold": "green\rteal\r",
        "colours-warm": "red\norange",
        "sea/fish": "cod\n",
        "sea/deep/fish": "angler",
        "clothes": "in ${season:dry}, ${season:dry} shirts\n",
        "story": "${hero?=!{fox|owl}} ${hero} and ${hero}",
        "poses (2)": "sitting",
    }.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / f"{name}.txt").write_bytes(text.encode())
    (path / "utf16.txt").write_bytes("fjord\n".encode("utf-16"))
    (path / "list.json").write_text('["x1", "x2"]')
    (path / "sea" / "more.yaml").write_text(
        "boats:\n  - sloop\n  - 3::{big|small} ship\n  - {text: raft, weight: 2}\n"
        "far:\n  away:\n  - |\n    # what it is\n    an atoll\n  one: isle\n"
    )
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a __head__", ["a hat", "a turban"]),
        ("__colours*__", ["green", "teal", "red", "orange"]),
        ("__c?lours-[cw]*__", ["green", "teal", "red", "orange"]),
        ("__**/fish__", ["angler", "cod"]),
        ("__sea/**__", ["sloop", "big ship", "small ship", "raft", "angler", "an atoll", "isle", "cod"]),
        ("__deep/fish__", ["angler"]),
        ("__sea\\fish__", ["cod"]),
        ("__hair colour__ hair", ["blond hair", "ginger hair"]),
        ("__poses (2)__", ["sitting"]),
        ("__utf16__", ["fjord"]),
        ("__list__", ["x1", "x2"]),
        ("__sea/boats__", ["sloop", "big ship", "small ship", "raft"]),
        ("__sea/far/away__ __sea/far/one__", ["an atoll isle"]),
        ("{2$$__pets__}", ["cat,dog", "dog,cat"]),
        ("{1-5$$ & $$ __pets__ }", ["cat", "dog", "cat & dog", "dog & cat"]),
        ("{1-$$__pets__}", ["cat", "dog"]),
        ("{2$$|$$a|b}", ["a|b", "b|a"]),
        ("{2:: a | .5::b}", [" a ", "b"]),
        ("{2 ::a|b}", ["2 ::a", "b"]),
        ("${s=!{a|b}} ${s} ${s}", [" a a", " b b"]),
        ("${s={a|b}} ${s}${s}", [" aa", " ab", " ba", " bb"]),
        ("${s} ${s=x}", ["x "]),
        ("${s:x} ${ t : {y|z} }", ["x y ", "x z "]),
        ("${s=}[${s}]", ["[]"]),
        ("${a=!{x|y}}${b=!${a}${a}}${b}", ["xx", "yy"]),
        ("__clothes__", ["in dry, dry shirts"]),
        ("__clothes(season=wet)__", ["in wet, wet shirts"]),
        ("__clothes(season={a|b})__", ["in a, a shirts", "in a, b shirts", "in b, a shirts", "in b, b shirts"]),
        ("${season=!wet}__clothes__", ["in wet, wet shirts"]),
        ("__story__", [" fox and fox", " owl and owl"]),
        ("${hero=cat}__story__", [" cat and cat"]),
        ("__${what:pets}__ __li{st|st}__", ["cat x1", "cat x2", "dog x1", "dog x2"]),
        ("%{a ... b$$x}", ["a x b"]),
        ("%{ {a|b} … $$ x}", ["a x ", "b x "]),
        ("100%{2$$a|b} $5 50% a $$ b", ["100%a,b $5 50% a $$ b", "100%b,a $5 50% a $$ b"]),
        (r"\${5|6}  {\~a} \_\_b__", ["$5  ~a __b__", "$6  ~a __b__"]),
    ],
)  # fmt: skip
def test_a_template_becomes_what_it_becomes_in_sd_dynamic_prompts(folder: Path, text: str, expected: list[str]) -> None:
    wildcards = Wildcards(folder)
    assert sorted(wildcards.combinations(text)) == sorted(expected)
    drawn = {wildcards.choose(text, seed=seed, purpose="prompt") for seed in SEEDS}
    assert drawn <= set(expected)
    assert len(drawn) >= min(len(expected), 3) or "head" in text


def test_lines_are_drawn_by_their_weights(folder: Path) -> None:
    wildcards = Wildcards(folder)
    boats = [wildcards.choose("__sea/boats__", seed=seed, purpose="") for seed in range(3000)]
    shares = [sum(boat.endswith(name) for boat in boats) / 3000 for name in ("sloop", "ship", "raft")]
    assert shares == pytest.approx([1 / 6, 3 / 6, 2 / 6], abs=0.04)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("${s}", r"variable \$\{s\} has no value"),
        ("${s=${s}}${s}", r"variable \$s names itself"),
        ("${1}", r"is no variable"),
        ("${s!}", r"is no variable"),
        ("${s=a", r"a \$\{ in the prompt is never closed"),
        ("${s=a|b}", "alternatives stand in braces of their own"),
        ("{a|${s=b}}", "a variable is set outside of all braces"),
        ("%{a$$b}", "has dots"),
        ("{3$$__pets__}", "cannot be taken of 2 lines"),
        ("{2-$$__pets__}", "say how many at most"),
        ("{2-1$$__pets__}", "the fewest and the most"),
        ("{-1::a|b}", "has the weight -1"),
        ("{@a|b}", r"\{@\.\.\.\} takes its options one after the other"),
        ("__@pets__", r"__@\.\.\.__ takes its options one after the other"),
        ("3#__pets__", "3#__pets__: a wildcard several times over"),
        ("a __pets", "__pets: the __ belongs to no wildcard"),
        ("a pets__, b", "pets__, b: the __ belongs to no wildcard"),
        ("__clothes(season=wet,x)__", "in the brackets stand variables"),
        ("__colors*__", r"no wildcard in .* matches colors\*"),
        ("__pets.txt__", "no pets.txt.txt in"),
    ],
)
def test_what_means_nothing_is_named(folder: Path, text: str, sentence: str) -> None:
    for read in (Wildcards(folder).combinations, lambda text: Wildcards(folder).choose(text, seed=1, purpose="")):
        with pytest.raises(UsageError, match=sentence):
            read(text)


def test_a_sampler_that_does_not_fit_is_named(folder: Path) -> None:
    wildcards = Wildcards(folder)
    assert wildcards.combinations("{!a|b} __!pets__") == ["a cat", "a dog", "b cat", "b dog"]
    assert {wildcards.choose("{~a|b}", seed=seed, purpose="") for seed in SEEDS} == {"a", "b"}
    with pytest.raises(UsageError, match="--all-combinations generates them"):
        wildcards.choose("{!a|b}", seed=1, purpose="")
    with pytest.raises(UsageError, match="at random; all combinations take every one"):
        wildcards.combinations("__~pets__")


@pytest.mark.parametrize(
    ("files", "name", "sentence"),
    [
        ({"x.yaml": "a: [b, {c: d}]"}, "a", "item 2 of a wildcard is not text but {'c': 'd'}"),
        ({"x.yaml": "a: [1990]"}, "a", "item 1 of a wildcard is not text but 1990; put it in quotes"),
        ({"x.yaml": "a: 3"}, "a", "a wildcard is a list of texts, not 3"),
        ({"x.yaml": "a: [{text: b, weight: much}]"}, "a", "has the weight 'much'"),
        ({"x.yaml": "a: [b"}, "a", r"x.yaml cannot be read: line"),
        ({"x.yaml": "a: [b"}, "*", r"x.yaml cannot be read: line"),
        ({"x.json": '{"a": ["b",]}'}, "a", "x.json cannot be read"),
        ({"x.yaml": "a: [b]", "a.txt": "c"}, "a", "is in .*a.txt and in .*x.yaml; rename one"),
        ({"x.yaml": "a: [b]", "y.json": '{"a": ["b"]}'}, "a", "is in .*x.yaml and in .*y.json; rename one"),
        ({"a.csv": "b"}, "a", "a.csv is there, but wildcards are .txt, .yaml or .json files"),
        ({"a.txt": "0::b\n"}, "a", "all lines have the weight 0"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_wildcard_is_named(tmp_path: Path, files: dict[str, str], name: str, sentence: str) -> None:
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(UsageError, match=sentence):
        Wildcards(tmp_path).choose(f"__{name}__", seed=1, purpose="")


# A model of the syntax


@dataclass(frozen=True)
class Piece:
    """A template as it is written, and all that it may become."""

    text: str
    outcomes: frozenset[str]


LITERALS = st.text(alphabet="ab (),.:'-é[]狐", min_size=1, max_size=6)
LINES = {"pets": ["cat", "dog"], "hair colour": ["blond", "ginger"], "colours-*": ["green", "teal", "red", "orange"]}


def literal(text: str) -> Piece:
    return Piece(text, frozenset({text}))


def chosen(options: list[Piece], weights: list[str], low: int, high: int, separator: str) -> Piece:
    written = "|".join(weight + option.text for weight, option in zip(weights, options, strict=False))
    amount = "" if (low, high) == (1, 1) else f"{low}$$" if low == high else f"{low}-{high}$$"
    joint = f"{separator}$$" if amount and separator != "," else ""
    outcomes = {
        (separator if amount else ",").join(picked)
        for count in range(low, high + 1)
        for some in itertools.permutations([option.outcomes for option in options], count)
        for picked in itertools.product(*some)
    }
    return Piece(f"{{{amount}{joint}{written}}}", frozenset(outcomes))


@st.composite
def choices(draw: st.DrawFn, inner: st.SearchStrategy[Piece]) -> Piece:
    options = draw(st.lists(inner, min_size=2, max_size=3))
    weights = draw(st.lists(st.sampled_from(["", "2::", "0.5::", " .5::"]), min_size=3, max_size=3))
    low = draw(st.integers(1, len(options)))
    high = draw(st.integers(low, len(options)))
    if math.prod(len(option.outcomes) + 1 for option in options) > 40:
        return options[0]
    return chosen(options, weights, low, high, draw(st.sampled_from([",", " and ", "|", " ; "])))


@st.composite
def wildcard(draw: st.DrawFn) -> Piece:
    name = draw(st.sampled_from(sorted(LINES)))
    several = chosen([literal(line) for line in LINES[name]], [""] * 9, 2, 2, ",").outcomes
    return draw(st.sampled_from([Piece(f"__{name}__", frozenset(LINES[name])), Piece(f"{{2$$__{name}__}}", several)]))


def default(piece: Piece) -> Piece:
    name = f"unset{len(piece.text)}"  # another one than those within it
    return Piece(f"${{{name}:{piece.text}}}", piece.outcomes) if not piece.text[:1].isspace() else piece


PIECES = st.recursive(
    LITERALS.map(literal) | wildcard(), lambda inner: choices(inner) | inner.map(default), max_leaves=5
)


@st.composite
def templates(draw: st.DrawFn) -> Piece:
    """Pieces one after the other, and perhaps a variable that is set and used twice."""
    pieces = draw(st.lists(PIECES, min_size=1, max_size=3))
    if math.prod(len(piece.outcomes) for piece in pieces) > 500:
        pieces = pieces[:1]
    text = "".join(piece.text for piece in pieces)
    texts = {"".join(some) for some in itertools.product(*(piece.outcomes for piece in pieces))}
    variable = draw(st.none() | PIECES.filter(lambda piece: not piece.text[:1].isspace()))
    if variable is None or len(variable.outcomes) ** 2 * len(texts) > 1000:
        return Piece(text, frozenset(texts))
    once = draw(st.booleans())
    pairs = (
        zip(variable.outcomes, variable.outcomes, strict=True)
        if once
        else itertools.product(variable.outcomes, repeat=2)
    )
    whole = {f"{first}+{text}+{second}" for first, second in pairs for text in texts}
    return Piece(f"${{v={'!' * once}{variable.text}}}${{v}}+{text}+${{v}}", frozenset(whole))


def check_template(folder: Path, piece: Piece, seed: int) -> None:
    wildcards = Wildcards(folder)
    assert set(wildcards.combinations(piece.text)) == piece.outcomes
    assert wildcards.choose(piece.text, seed=seed, purpose="prompt") in piece.outcomes


FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
MANY = settings(FEW, max_examples=1000)


@FEW
@given(piece=templates(), seed=st.integers(0, 99))
def test_any_template_becomes_what_the_model_says(folder: Path, piece: Piece, seed: int) -> None:
    check_template(folder, piece, seed)


@pytest.mark.slow
@settings(FEW, max_examples=800)
@given(piece=templates(), seed=st.integers(0, 99))
def test_many_templates_become_what_the_model_says(folder: Path, piece: Piece, seed: int) -> None:
    check_template(folder, piece, seed)


SIGNS = "{ } | $$ ${ = ! : __ pets %{ ... \\ 2 - :: # ( ) * v / ~ @ é"
SYNTAX = st.lists(st.sampled_from([*SIGNS.split(), " ", "\n"]), max_size=14).map("".join) | st.text(max_size=20)


def check_any(folder: Path, text: str) -> None:
    wildcards = Wildcards(folder)
    for read in (wildcards.combinations, lambda text: wildcards.choose(text, seed=3, purpose="")):
        with contextlib.suppress(UsageError):  # no other error
            read(text)
    if not set(text) & set("{}|_$%\\"):
        assert wildcards.combinations(text) == [text]
        assert not wildcards.has_choices(text)


@FEW
@given(text=SYNTAX)
def test_any_text_is_a_prompt_or_is_refused_in_a_sentence(folder: Path, text: str) -> None:
    check_any(folder, text)


@pytest.mark.slow
@MANY
@given(text=SYNTAX)
def test_many_texts_are_prompts_or_are_refused_in_a_sentence(folder: Path, text: str) -> None:
    check_any(folder, text)


# What worked before draws as before

PINNED = {
    "a {red|blue} fox": "192f4c6ffd183ad0",
    "{a|{b|c}} {d|e}": "bd98d3997314a07b",
    "{2$$a|b|c|d}": "c7eb1c7a516e2ade",
    "{1-3$$ and $$a|b|c|d}": "2064511991ecfdd2",
    "{-2$$a|b|c}": "4e4df1e9aef5bd0b",
    "{2-$$a|{b|c}|d}": "51a63dd6f762f259",
    "{0.5::a|2::b|c}": "1f5c386a1d16e8ef",
    "{3::red|blue} {2$$x|y|z}": "a606a7b7696373f1",
    "a __animals__": "c5865b5d2b558b07",
    "__sea/fish__ and __animals__": "2aa76cc4a3de55d8",
    "{__animals__|__sea/fish__} {1-2$$, $$__animals__|{x|y}|z}": "eaa157259600d2d8",
    "__my_x____my_x__ {|very} big": "97c595ac3a9b5f1a",
    "{__animals__}": "3c3f0d8489ce165a",
    "{1$$__animals__}": "3c3f0d8489ce165a",
    "{0-1$$__animals__}": "bf9e0619cb4860f2",
    "\\{a\\|b\\} \\__c\\__ {x|y} snake_case __ (f:1.2) [d|e]": "1fb8c8d3f246beb9",
    "{0-2$$a|b|c}": "28aa51b7c43129ca",
    "cost $5 {a|b} 50% off": "e2b218e0cc6760cc",
    "{2$$ $ $$a|b|c}": "1e2e006bd76f9152",
    "{2$$\\|$$a|b|c}": "8ed04536128e5c73",
    "{cheap|$$$ dear} x #1 http://x": "847d0400e0a707f3",
}
"""Digests of 40 seeds' choices and all combinations, recorded before the syntax grew."""


def test_templates_that_worked_draw_as_they_did_before(tmp_path: Path) -> None:
    (tmp_path / "sea").mkdir()
    (tmp_path / "animals.txt").write_text("cat\ndog\nred fox\n{small|large} owl\n")
    (tmp_path / "sea" / "fish.txt").write_text("cod\nFüchsin\n# no\n\n__animals__ in water\n", encoding="utf-8")
    (tmp_path / "my_x.txt").write_text("x\n")
    wildcards = Wildcards(tmp_path)
    for text, digest in PINNED.items():
        drawn: list[object] = [
            wildcards.choose(text, seed=seed, purpose=purpose)
            for seed in range(40)
            for purpose in ("prompt", "negative_prompt")
        ]
        drawn.append(wildcards.combinations(text))
        assert hashlib.sha256(json.dumps(drawn, ensure_ascii=False).encode()).hexdigest()[:16] == digest, text
