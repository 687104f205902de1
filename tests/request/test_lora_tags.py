"""Tags in prompts: LoRAs are taken out, all others are named, and text stays text."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcli.errors import UsageError
from sdcli.generation.resolve.jobs import BadJob, expand
from sdcli.models.registry import load_registry
from sdcli.request.jobs import Line
from sdcli.request.lora_tags import check_negative, read_tags, take_tags


@pytest.mark.parametrize(
    ("tag", "sentence"),
    [
        ("<lora:x:0.7:lbw=IN02>", "lbw=IN02: weights for single blocks are not supported"),
        ("<lora:x:1:start=10:stop=20>", "start=10: a LoRA for a part of the steps"),
        ("<lyco:x:1:dyn=8>", "dyn=8: a rank of its own"),
        ("<lora:x:0@0.2,1@0.6>", "should be a valid number"),
        ("<lora:x:nan>", "should be a finite number"),
        ("<lora:x:1", "is not understood; a tag is <lora:NAME:WEIGHT>"),
        ("<Lora:x:1>", "is not understood; a tag is <lora:NAME:WEIGHT>"),
        ("< lora : x : 1 >", "is not understood; a tag is <lora:NAME:WEIGHT>"),
        ("<loar:x:1>", "there is no tag <loar:...>; did you mean 'lora'?"),
        ("<hypernett:x:1>", "did you mean 'hypernet'?"),
        ("<style:x>", "there is no tag <style:...>; a LoRA is <lora:NAME:WEIGHT>"),
        ("<hypernet:x:1>", "hypernetworks are not supported"),
        ("<embedding:x>", "--embedding FILE=WORD loads an embedding"),
        ("<embed:x>", "--embedding FILE=WORD loads an embedding"),
        ("<random:red, blue>", "write {red|blue}, with --dynamic-prompts"),
        ("<wildcard[1-3]:animals>", "write __name__, with --wildcards DIR"),
        ("<wc:animals>", "write __name__, with --wildcards DIR"),
        ("<alternate:cat, dog>", "write [cat|dog]"),
        ("<fromto[0.5]:cat, dog>", "write [cat:dog:0.5]"),
        ("<setvar[c]:<random:a,b>>", "write ${name=!value}"),
        ("<var:c>", "write ${name}, with --dynamic-prompts"),
        ("<segment:face,0.6>", "it has no counterpart"),
        ("<param[steps]:3>", "settings are options"),
        ("<preset:x>", "settings are options"),
        ("<break>", "write BREAK"),
        ("<trigger>", "write the words themselves"),
    ],
)
def test_a_tag_that_is_no_lora_is_named_in_every_prompt(tag: str, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        take_tags(f"a {tag} cat")
    assert str(error.value).startswith(tag[:5])
    assert sentence in str(error.value)
    tags = read_tags(f"a {tag} cat")
    assert sentence in tags.refused[0]
    assert tag not in tags.text
    with pytest.raises(UsageError, match=r"^negative_prompt: <"):
        check_negative(f"a {tag} cat")
    assert take_tags(f"a {tag.replace('<', chr(92) + '<')} cat")[1] == ()


@pytest.mark.parametrize(
    "text",
    ["I <3 cats", "a < b", "a <b> c", "<sks> dog", "x <- y: z", "a < b: c >", "<3:4>", "<ftp://x>", ">:( <:3", "<p: x"],
)  # fmt: skip
def test_text_with_such_signs_is_text(text: str) -> None:
    assert take_tags(text) == (text, ())
    check_negative(text)


def test_a_lora_in_the_negative_prompt_is_refused_and_none_in_plain_text() -> None:
    with pytest.raises(UsageError, match=r"negative_prompt: <lora:x:0.5> stands in the prompt"):
        check_negative("blurry <lora:x:0.5>")
    check_negative("blurry <lora:x:0.5>", syntax="plain")
    assert take_tags("a <random:b> <lora:x>", syntax="plain")[0] == "a <random:b>"
    (job,) = expand(
        [Line(3, {"prompt": "a", "negative_prompt": "<lyco:x:1>", "model": "tiny"})],
        {},
        load_registry(),
        num_images=1,
        base_seed=1,
    )
    assert isinstance(job, BadJob)
    assert str(job.error).startswith("line 3: negative_prompt: <lora:x:1> stands in the prompt")


SIGNS = ["<", ">", ":", "lora", "lyco", "random", "[", "]", "=", "te", "1", "0.5", " ", "\\", "a", "<lora:"]
TEXTS = st.lists(st.sampled_from(SIGNS)).map("".join) | st.text(max_size=30)


def check_any(text: str) -> None:
    tags = read_tags(text)
    assert bool(tags.loras or tags.refused) or tags.text == text
    with contextlib.suppress(UsageError):  # no other error
        assert take_tags(text) == (tags.text, tags.loras)
    if "<" not in text:
        assert take_tags(text) == (text, ())


@given(TEXTS)
def test_any_text_is_read_or_refused_in_a_sentence(text: str) -> None:
    check_any(text)


@pytest.mark.slow
@settings(max_examples=1000)
@given(TEXTS)
def test_many_texts_are_read_or_refused_in_a_sentence(text: str) -> None:
    check_any(text)


def test_tags_are_read_in_linear_time() -> None:
    for text in ("<a" * 100_000, "<a" + " " * 200_000, "<a[" * 50_000, "<lora:" * 50_000, "<a:" + ":=" * 100_000):
        read_tags(text)
