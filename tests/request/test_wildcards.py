"""Dynamic prompts: what may be drawn, that a seed draws the same for ever, and what is hostile."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcli.errors import NotFound, UsageError
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob, expand
from sdcli.models.registry import load_registry
from sdcli.request.jobs import Line, combinations
from sdcli.request.wildcards import MAX_COMBINATIONS, Wildcards


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fox", ["a fox"]),
        ("{red|blue} fox", ["red fox", "blue fox"]),
        ("{a|{b|c}} {d|e}", ["a d", "a e", "b d", "b e", "c d", "c e"]),
        ("a {|very} b", ["a  b", "a very b"]),
        ("{a} {b|b}", ["a b"]),
        ("{2$$a|b|c}", ["a,b", "a,c", "b,a", "b,c", "c,a", "c,b"]),
        ("{1-2$$ and $$a|b}", ["a", "b", "a and b", "b and a"]),
        ("{-1$$a|b}", ["a", "b"]),
        ("{2-$$a|{b|c}}", ["a,b", "a,c", "b,a", "c,a"]),
        ("{0.5::a|2::b}", ["a", "b"]),
        (r"\{a\|b\} \__c__ [d|e] (f:1.2) \(g", [r"{a|b} __c__ [d|e] (f:1.2) \(g"]),
        ("snake_case __ ____ http://x #1", ["snake_case __ ____ http://x #1"]),
    ],
)
def test_all_combinations_come_once_and_in_order_and_each_can_be_drawn(text: str, expected: list[str]) -> None:
    wildcards = Wildcards()
    assert wildcards.combinations(text) == expected
    assert {wildcards.choose(text, seed=seed, purpose="prompt") for seed in range(60)} == set(expected)
    assert wildcards.has_choices(text) == ("{" in text and not text.startswith("\\"))


def test_a_seed_draws_the_same_for_ever() -> None:
    drawn = [Wildcards().choose("{a|b|c} {2$$x|y|z}", seed=seed, purpose="prompt") for seed in range(4)]
    assert drawn == ["c y,x", "c z,y", "c y,z", "b y,z"]
    negative = [Wildcards().choose("{a|b|c} {2$$x|y|z}", seed=seed, purpose="negative_prompt") for seed in range(4)]
    assert drawn != negative


def test_options_are_drawn_by_their_weights() -> None:
    drawn = Counter(Wildcards().choose("{3::a|b}", seed=seed, purpose="") for seed in range(4000))
    assert drawn["a"] / 4000 == pytest.approx(0.75, abs=0.03)


def folder(path: Path, **files: str) -> Wildcards:
    (path / "sea").mkdir(exist_ok=True)
    for name, text in files.items():
        (path / f"{name.replace('__', '/')}.txt").write_text(text, encoding="utf-8")
    return Wildcards(path)


def test_a_wildcard_is_a_line_of_its_file_and_lines_hold_choices(tmp_path: Path) -> None:
    wildcards = folder(
        tmp_path, animals="# animals\n\n fox \r\n{big|small} __sea/fish__\n", sea__fish="cod\nFüchsin\n", my_x="x"
    )
    expected = ["a fox", "a big cod", "a big Füchsin", "a small cod", "a small Füchsin"]
    assert wildcards.combinations("a __animals__") == expected
    assert {wildcards.choose("a __animals__", seed=seed, purpose="") for seed in range(60)} == set(expected)
    assert wildcards.combinations("__my_x____my_x__") == ["xx"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a {b", r"a { in the prompt is never closed; \\{"),
        ("a b}", "a } in the prompt has no {"),
        ("{3$$a|b}", "cannot be taken of 2"),
        ("{2-1$$a|b}", "cannot be taken of 2"),
        ("{0$$a|b}", "cannot be taken of 2"),
        ("{x$$a|b}", "should begin with how many"),
        ("{0::a|b}", "never be chosen"),
        ("{1-$$" + "a|" * 101 + "}", "at most 100 can be taken"),
        ("{" * 100 + "a" + "}" * 100, "nested over"),
        ("__animls__", "no animls.txt in .*; did you mean 'animals'"),
        ("__a/../../x__", "leaves the folder"),
        ("__link__", "leaves the folder"),
        ("__empty__", "has no lines"),
        ("__latin__", "not UTF-8"),
        ("__broken__", "broken.txt: a { in the prompt is never closed"),
        ("__loop__", "names itself: loop > back > loop"),
        ("__deep0__", "40 deep: deep0 > deep1 > deep2"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    inside = tmp_path / "wild"
    inside.mkdir()
    wildcards = folder(inside, animals="fox", empty="# nothing\n", broken="{a", loop="__back__", back="__loop__")
    (inside / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "x.txt").write_text("secret")
    (inside / "link.txt").symlink_to(tmp_path / "x.txt")
    for number in range(50):
        (inside / f"deep{number}.txt").write_text(f"__deep{number + 1}__")
    for read in (wildcards.combinations, lambda text: wildcards.choose(text, seed=1, purpose="")):
        with pytest.raises(UsageError, match=sentence):
            read(text)
    with pytest.raises(NotFound, match="no folder"):
        Wildcards(tmp_path / "none")
    with pytest.raises(UsageError, match="--wildcards DIR names it"):
        Wildcards().combinations("__animals__")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("{a|b|c}" * 19, "1,162,261,467"),
        ("{a|b}" * 10_000, "over 1,000,000,000,000,000,000"),
        ("{1-99$$" + "|".join(map(str, range(5000))) + "}", "over 1,000,000,000,000,000,000"),
        ("__twice0__", "1,073,741,824"),
    ],
)
def test_too_many_combinations_are_counted_and_refused(tmp_path: Path, text: str, count: str) -> None:
    for number in range(30):
        (tmp_path / f"twice{number}.txt").write_text(f"__twice{number + 1}__ {{a|b}}")
    (tmp_path / "twice30.txt").write_text("a")
    with pytest.raises(UsageError, match=f"has {count} combinations; it may be up to {MAX_COMBINATIONS:,}"):
        Wildcards(tmp_path).combinations(text)


def test_files_that_double_each_other_are_refused(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"d{number}.txt").write_text(f"__d{number + 1}__ __d{number + 1}__")
    (tmp_path / "d30.txt").write_text("a")
    with pytest.raises(UsageError, match="has over 10,000 pieces"):
        Wildcards(tmp_path).choose("__d0__", seed=1, purpose="")
    with pytest.raises(UsageError, match="come to over 20,000,000 characters"):
        Wildcards(tmp_path).combinations("__d0__")
    assert len(Wildcards(tmp_path).combinations("__d20__")) == 1


@given(st.text(alphabet="ab{}|$:_\\1-2", max_size=30), st.integers(0, 99))
def test_what_is_drawn_is_one_of_all_combinations(text: str, seed: int) -> None:
    wildcards = Wildcards()
    try:
        everything = wildcards.combinations(text)
    except UsageError:
        return
    assert wildcards.choose(text, seed=seed, purpose="") in everything


# Jobs


def jobs_of(line: dict[str, object], **options: object) -> list[ResolvedJob | BadJob]:
    lines = [Line(0, line)]
    return list(expand(lines, {}, load_registry(), **{"num_images": 1, "base_seed": 5, **options}))  # type: ignore[arg-type]


def test_each_image_draws_by_its_own_seed_and_its_request_holds_what_was_drawn() -> None:
    fields = {"prompt": "a {red|blue|green} {cat|dog}", "negative_prompt": "{x|y|z}", "model": "tiny", "seed": 7}
    many = [job.request for job in jobs_of(fields, num_images=8, wildcards=Wildcards()) if isinstance(job, ResolvedJob)]
    assert [request.seed for request in many] == list(range(7, 15))
    assert len({request.prompt for request in many}) > 2
    assert not any("{" in request.prompt + (request.negative_prompt or "") for request in many)
    (alone,) = jobs_of({**fields, "seed": 9}, wildcards=Wildcards())
    assert isinstance(alone, ResolvedJob)
    assert alone.request == many[2]


def test_without_being_asked_braces_are_text() -> None:
    (job,) = jobs_of({"prompt": "a {red|blue} __cat__", "model": "tiny"})
    assert isinstance(job, ResolvedJob)
    assert job.request.prompt == "a {red|blue} __cat__"


def test_a_line_becomes_a_line_for_each_combination_of_its_prompts() -> None:
    lines = list(combinations([Line(3, {"negative_prompt": "{x|y}", "seed": 1})], {"prompt": "{a|b}"}, Wildcards()))
    assert [(line.fields["prompt"], line.fields["negative_prompt"]) for line in lines] == [
        ("a", "x"),
        ("a", "y"),
        ("b", "x"),
        ("b", "y"),
    ]
    assert {line.number for line in lines} == {3}
    (bad,) = combinations([Line(3, {"prompt": "{a"})], {}, Wildcards())
    assert "never closed" in (bad.problem or "")
    (many,) = combinations([Line(3, {"prompt": "{a|b}" * 10, "negative_prompt": "{a|b}" * 10})], {}, Wildcards())
    assert "1,048,576 combinations" in (many.problem or "")
