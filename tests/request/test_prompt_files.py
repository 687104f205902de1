"""Prompts files as people's tools write them: what an entry means, whatever the file is called; what is refused."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdcli.errors import SdcliError, UsageError
from sdcli.request.jobs import Line, read_lines
from sdcli.request.prompt_options import text_line
from sdcli.request.schedulers import SCHEDULERS, scheduler_of

TWO = '{"prompt": "a", "seed": 1}\n{"prompt": "b", "cfg_scale": 5}\n'
READ: list[dict[str, Any]] = [{"prompt": "a", "seed": 1}, {"prompt": "b", "guidance_scale": 5}]


def lines_of(path: Path, data: str | bytes, name: str = "jobs.txt") -> list[Line]:
    (path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_lines(str(path / name)))


def fields_of(lines: list[Line]) -> list[dict[str, Any]]:
    assert [line.problem for line in lines] == [None] * len(lines)
    return [dict(line.fields) for line in lines]


@pytest.mark.parametrize("name", ["jobs.jsonl", "jobs.txt", "jobs.json", "jobs", "jobs.csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_json_lines_are_json_whatever_the_file_is_called(tmp_path: Path, name: str, encoding: str, end: str) -> None:
    lines = lines_of(tmp_path, f"# two\n\n{TWO}".replace("\n", end).encode(encoding), name)
    assert fields_of(lines) == READ
    assert [line.number for line in lines] == [3, 4]


@pytest.mark.parametrize("name", ["jobs.json", "jobs.txt"])
@pytest.mark.parametrize("indent", [None, 1])
def test_lists_objects_and_objects_with_a_list_are_json(tmp_path: Path, name: str, indent: int | None) -> None:
    objects = [json.loads(line) for line in TWO.splitlines()]
    assert fields_of(lines_of(tmp_path, json.dumps(objects, indent=indent), name)) == READ
    whole = {"steps": 9, "prompts": [*objects, "c --s 3"]}
    entries = fields_of(lines_of(tmp_path, json.dumps(whole, indent=indent), name))
    assert entries == [{**READ[0], "steps": 9}, {**READ[1], "steps": 9}, {"prompt": "c", "steps": "3"}]
    assert fields_of(lines_of(tmp_path, json.dumps(objects[0], indent=indent), name)) == READ[:1]
    stream = "\n".join(json.dumps(one, indent=indent) for one in objects)
    assert fields_of(lines_of(tmp_path, stream, name)) == READ


def test_a_line_that_is_no_text_costs_itself_only(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, "caf\u00e9\n".encode() + b"caf\xe9\nok\n")
    assert [(line.fields.get("prompt"), line.problem) for line in lines] == [
        ("café", None),
        (None, "is not UTF-8 text"),
        ("ok", None),
    ]
    (half,) = lines_of(tmp_path, b"\xff\xfea")
    assert half.problem == "is not UTF-8 text"


def test_entries_of_a_list_have_the_lines_in_which_they_begin(tmp_path: Path) -> None:
    numbers = [line.number for line in lines_of(tmp_path, '[\n{"prompt":\n"a"},\n\n{"prompt": "b"}\n]')]
    assert numbers == [2, 5]
    within = lines_of(tmp_path, '{"steps": 1,\n"jobs": [\n{"prompt": "a"},\n7]}')
    assert [(line.number, line.problem) for line in within] == [(3, None), (4, "is not a JSON object (a number)")]


@pytest.mark.parametrize(
    "text",
    [
        "{red|blue} car\na castle",
        "[cat:dog:0.5] x",
        "[cat|dog]\n[1]",
        "[1]",
        "[]",
        "prompt, seed and a cat\nb",
        "prompt",
    ],
)
def test_a_text_that_begins_like_json_or_a_table_is_text(tmp_path: Path, text: str) -> None:
    assert fields_of(lines_of(tmp_path, text)) == [{"prompt": line} for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("jobs.csv", "prompt,seed\n\"a, b\",3\n"),
        ("jobs.csv", "\ufeffprompt;seed\r\na, b;3\r\n;\r\n"),
        ("jobs.csv", "sep=;\nprompt;seed\na, b;3\n"),
        ("jobs.csv", 'prompt,seed\r"a, b",3\r'),
        ("jobs.csv", "Prompt,Seed,\n\"a, b\",3,\n"),
        ("jobs.csv", "prompt\tseed\na, b\t3\n"),
        ("jobs.tsv", "prompt\tseed\na, b\t3\n"),
        ("jobs.txt", "prompt\tseed\na, b\t3\n"),
        ("jobs.txt", "prompt,seed\n\"a, b\",3\n"),
        ("jobs", "\nseed;prompt\n3;a, b\n"),
    ],
)  # fmt: skip
def test_tables_are_read_with_the_separator_of_their_header(tmp_path: Path, name: str, text: str) -> None:
    assert fields_of(lines_of(tmp_path, text, name)) == [{"prompt": "a, b", "seed": "3"}]


def test_a_table_of_one_column_is_told_by_its_header(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, 'prompt\n"a fox,\nred"\na hen\n', "jobs.txt")
    assert fields_of(lines) == [{"prompt": "a fox,\nred"}, {"prompt": "a hen"}]
    assert fields_of(lines_of(tmp_path, "prompt\n", "jobs.txt")) == [{"prompt": "prompt"}]


def test_kohyas_toml_is_read_and_what_all_prompts_have_is_in_each(tmp_path: Path) -> None:
    text = (
        '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a"\nscale = 3.5\nsample_steps = 9\n'
        '[[prompt.subset]]\nprompt = "b"\nsample_sampler = "k_euler_a"\n'
    )
    lines = lines_of(tmp_path, text, "jobs.toml")
    assert fields_of(lines) == [
        {"width": 64, "prompt": "a", "guidance_scale": 3.5, "steps": 9},
        {"width": 64, "prompt": "b", "scheduler": "euler-a"},
    ]
    assert [line.number for line in lines] == [3, 7]


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.csv", "prompt,seed,prompt\na,1,b\n", "a.csv, line 1: prompt is given twice"),
        ("a.csv", "\nprompt,cfg,cfg_scale,guidance\n", "a.csv, line 2: guidance_scale is given twice"),
        ("a.csv", "a red fox\na blue fox\n", "a.csv, line 1: the header names the columns"),
        ("a.csv", "promt\na\n", "did you mean 'prompt'"),
        ("a.json", '[{"prompt": "a",}]', "a.json is not JSON: line 1, column 17"),
        ("a.txt", '[{"prompt": "a"}\n{"prompt": "b"}]', "a.txt is not JSON: line 2"),
        ("a.json", '{"prompts": [], "jobs": []}', "has two lists, prompts and jobs"),
        ("a.jsonl", TWO.encode("utf-16-le"), "has NUL bytes"),
        ("a.yaml", "- prompt: a", "is a YAML file"),
        ("a.toml", "a = 1", "should hold kohya's"),
        ("a.toml", "a =", "is not TOML"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_refused_in_a_sentence(
    tmp_path: Path, name: str, data: str | bytes, sentence: str
) -> None:
    with pytest.raises(UsageError) as error:
        lines_of(tmp_path, data, name)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a", "seed": 1, "seed": 2}', "seed is given twice"),
        ('{"prompt": "a", "loras": [{"path": "x", "path": "y"}]}', "path is given twice"),
        ('{"prompt": "a", "cfg_scale": 1, "guidance": 2}', "guidance_scale is given twice"),
        ('{"prompt": "a", "guidance_scale": NaN}', "guidance_scale: should be a finite number, not nan"),
        ('{"prompt": "a", "steps": 1e999}', "steps: should be a finite number, not inf"),
        ('{"prompt": "a", "stepz": 1}', "did you mean 'steps'"),
        ('{"prompt": "a", "n_iter": true}', "n_iter: should be a whole number"),
        ('{"prompt": "a", "batch_size": 2.7}', "batch_size: should be a whole number"),
        ('{"prompt": "a", "n": 2, "n_iter": 2}', "num_images is given twice"),
        ('{"prompt": "a", "tiling": true}', "tiling: images that tile"),
        ('{"prompt": "a", "sampler_name": "Restart"}', "sampler_name: no scheduler for Restart"),
        ('{"prompt": "a", "sampler_name": "DDIM", "sampler": "Euler"}', "scheduler is given twice"),
        ('{"prompt": "a"', "is not a JSON object"),
        ("{'prompt': 'a'}", "is not a JSON object"),
        ('--prompt "a --seed 1', "--prompt: the quote is not closed"),
        ("--prompt a --prompt b", "prompt is given twice"),
        ("a --cfg_scale 1 --l 2", "guidance_scale is given twice"),
        ("a --n", "--n has no value"),
        ("a --d 1,2", "several seeds"),
        ("a --nl 3", "--nl: a guidance scale of the negative prompt"),
        ("a --am 1.0", "--am: weights of LoRAs"),
        ("a --ow 64", "--ow: the sizes"),
        ("a --glt 500", "--glt: Gradual Latent"),
        ("a --f x.png", "--f: names of files"),
        ("a --ss dpmsingle", "no scheduler for dpmsingle"),
        ("a --ar 16:9", "no field 'ar'"),
        ("--prompt a --sampler_index 3", "sampler_index: a number of a sampler"),
        ("--prompt a --restore_faces true", "restore_faces: faces are not restored"),
        ("--prompt a --styles x", "styles: styles are not read"),
        ("--prompt a --outpath_samples x", "outpath_samples: the folder is named by --outdir"),
        ("--prompt a --sd_model x", "sd_model: a model is named by --model"),
    ],
)  # fmt: skip
def test_a_bad_line_costs_itself_and_says_what_is_wrong(tmp_path: Path, line: str, problem: str) -> None:
    good, bad = lines_of(tmp_path, f"good\n{line}\n")
    assert (good.fields, good.problem) == ({"prompt": "good"}, None)
    assert bad.number == 2
    assert problem in (bad.problem or "")


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ('--prompt "a \\"b\\" \\\\ c" --seed -1', {"prompt": 'a "b" \\ c', "seed": None}),
        ("--prompt a  red fox --steps 3", {"prompt": "a  red fox", "steps": "3"}),
        ("--prompt it's a fox, it's red --steps 3", {"prompt": "it's a fox, it's red", "steps": "3"}),
        ("--prompt 'it'\"'\"'s' --steps 3", {"prompt": "it's", "steps": "3"}),
        ('--prompt "a" "b" c --steps 3', {"prompt": "a b c", "steps": "3"}),
        ('--prompt "a --steps 9" --steps 3', {"prompt": "a --steps 9", "steps": "3"}),
        ('--prompt a --negative_prompt ""', {"prompt": "a", "negative_prompt": ""}),
        ("--prompt=a --cfg_scale=5", {"prompt": "a", "guidance_scale": "5"}),
        ("--prompt a (b:1.2) \\(c\\)", {"prompt": "a (b:1.2) \\(c\\)"}),
        ("--prompt a --sampler_name DPM++ 2M Karras", {"prompt": "a", "scheduler": "dpmpp-2m-karras"}),
        ("--subseed 3 --subseed_strength 0.5", {"variation_seed": "3", "variation_strength": "0.5"}),
        ("--prompt a --n_iter 2 --batch_size 3", {"prompt": "a", "num_images": 6}),
        ("--prompt a --tiling false --restore_faces false --do_not_save_grid true", {"prompt": "a"}),
        ("a --N a dog --W 64 --h 96", {"prompt": "a", "negative_prompt": "a dog", "width": "64", "height": "96"}),
        ("--L 2.5 --ss k_lms --t 0.5", {"guidance_scale": "2.5", "scheduler": "lms", "strength": "0.5"}),
        ('a cat --n "x, --y" --s 3', {"prompt": "a cat", "negative_prompt": "x, --y", "steps": "3"}),
        ("a cat --n it's \"bad\"", {"prompt": "a cat", "negative_prompt": "it's \"bad\""}),
        ("what -- a cat --1", {"prompt": "what -- a cat --1"}),
        ("'tis a fox", {"prompt": "'tis a fox"}),
    ],
)  # fmt: skip
def test_options_of_a_line_are_read_as_their_tools_read_them(tmp_path: Path, line: str, fields: dict[str, Any]) -> None:
    assert fields_of(lines_of(tmp_path, line)) == [fields]


def test_the_web_uis_own_json_is_read(tmp_path: Path) -> None:
    line = '{"prompt": "a", "sampler_name": "DPM++ 2M", "scheduler": "Karras", "n_iter": 2, "seed": -1, "styles": []}'
    (fields,) = fields_of(lines_of(tmp_path, line))
    assert fields == {"prompt": "a", "scheduler": "dpmpp-2m-karras", "num_images": 2, "seed": None}


@pytest.mark.parametrize("schedule", ["Automatic", "Karras", "Exponential"])
def test_the_schedule_in_a_samplers_name_wins_over_the_one_beside_it(tmp_path: Path, schedule: str) -> None:
    line = json.dumps({"prompt": "a", "sampler_name": "DPM++ 2M Karras", "scheduler": schedule, "n_iter": None})
    assert fields_of(lines_of(tmp_path, line)) == [{"prompt": "a", "scheduler": "dpmpp-2m-karras"}]


def test_every_scheduler_is_found_by_its_own_and_by_the_web_uis_name() -> None:
    for name, row in SCHEDULERS.items():
        assert scheduler_of(name) == name
        assert scheduler_of(row.a1111, row.a1111_type) == name
        assert scheduler_of(f"{row.a1111} {row.a1111_type}".removesuffix(" None").upper()) == name
    assert scheduler_of("DPM++ 2M", "Automatic") == "dpmpp-2m-karras"
    assert scheduler_of("DPM++ 2M", "Uniform") == "dpmpp-2m"
    assert scheduler_of("Euler", "Karras") is None


# Models of the writers

LETTERS = st.characters(codec="utf-8", exclude_characters="\0\ufeff")
PROMPT = st.text(LETTERS, min_size=1, max_size=40).filter(lambda text: bool(text.strip()))
LINE = st.text("a '\"\\,é(", min_size=1, max_size=12) | st.text(
    st.characters(codec="utf-8", exclude_characters="\0\ufeff\n\r"), min_size=1, max_size=40
)
SEED, STEPS = st.integers(0, 2**63 - 1), st.integers(1, 1000)
ENTRY = st.fixed_dictionaries({"prompt": PROMPT}, optional={"negative_prompt": PROMPT, "seed": SEED, "steps": STEPS})
ENTRIES = st.lists(ENTRY, min_size=1, max_size=4)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"])
ENDS = st.sampled_from(["\n", "\r\n"])


@st.composite
def json_files(draw: st.DrawFn) -> tuple[str, bytes, list[dict[str, Any]]]:
    """Python's json module and PowerShell's redirection: name, bytes, and what was written."""
    entries = draw(ENTRIES)
    ascii_only, indent = draw(st.booleans()), draw(st.sampled_from([None, 2]))
    if draw(st.booleans()):
        text = json.dumps(entries, ensure_ascii=ascii_only, indent=indent)
    else:
        text = "\n".join(json.dumps(entry, ensure_ascii=ascii_only, indent=indent) for entry in entries) + "\n"
    name = draw(st.sampled_from(["jobs.json", "jobs.jsonl", "jobs.txt", "jobs"]))
    return name, text.replace("\n", draw(ENDS)).encode(draw(ENCODINGS)), entries


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, bytes, list[dict[str, Any]]]:
    """Excel's CSV and its Unicode text: name, bytes, and what was written."""
    entries = [
        {key: value.replace("\r", "r") if isinstance(value, str) else value for key, value in entry.items()}
        for entry in draw(ENTRIES)  # Python's writer leaves a carriage return alone without quotes
    ]
    kinds = [("jobs.csv", ","), ("jobs.csv", ";"), ("jobs.tsv", "\t"), ("jobs.txt", "\t")]
    name, delimiter = draw(st.sampled_from(kinds))
    columns = draw(st.permutations(["prompt", "seed", "steps", "negative_prompt"]))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, delimiter=delimiter, lineterminator=draw(ENDS), restval="")
    writer.writeheader()
    writer.writerows(entries)
    read = [{key: str(value) for key, value in entry.items()} for entry in entries]
    return name, out.getvalue().encode(draw(ENCODINGS)), read


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@st.composite
def option_lines(draw: st.DrawFn) -> tuple[str, bytes, list[dict[str, Any]]]:
    """The web UI's "Prompts from file" and kohya's lines: name, bytes, and what was written."""
    lines, read = [], []
    for _ in range(draw(st.integers(1, 4))):
        prompt, negative = draw(LINE.filter(lambda text: not text.startswith("-"))), draw(LINE)
        seed, steps = draw(st.integers(0, 2**32)), draw(st.integers(1, 99))
        if draw(st.booleans()):
            quote = draw(st.sampled_from([quoted, shlex.quote]))
            line = f"--prompt {quote(prompt)} --negative_prompt {quoted(negative)} --seed {seed} --steps {steps}"
            assert shlex.split(line)[1:4:2] == [prompt, negative]
        else:
            prompt, negative = (" ".join(text.replace("--", "-").split()) for text in (f"a {prompt}", f"b {negative}"))
            line = f"{prompt} --n {negative} --d {seed} --s {steps}"
        lines.append(line)
        read.append({"prompt": prompt, "negative_prompt": negative, "seed": str(seed), "steps": str(steps)})
    return "jobs.txt", draw(ENDS).join(lines).encode(draw(ENCODINGS)), read


FILES = json_files() | tables() | option_lines()
FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
MANY = settings(FEW, max_examples=900)


def check_file(folder: Path, file: tuple[str, bytes, list[dict[str, Any]]]) -> None:
    name, data, written = file
    assert fields_of(lines_of(folder, data, name)) == written


@FEW
@given(file=FILES)
def test_what_a_tool_writes_is_read(tmp_path: Path, file: tuple[str, bytes, list[dict[str, Any]]]) -> None:
    check_file(tmp_path, file)


@pytest.mark.slow
@MANY
@given(file=FILES)
def test_what_a_tool_writes_is_read_many_times(tmp_path: Path, file: tuple[str, bytes, list[dict[str, Any]]]) -> None:
    check_file(tmp_path, file)


SIGNS = '{ } [ ] " \' : , ; # \\ -- --n --seed prompt seed "prompt": {"prompt": 1 -1 true NaN null é sep=;'
ANY = st.lists(st.sampled_from([*SIGNS.split(), " ", "\n", "\r\n", "\t", "\ufeff"]), max_size=20).map(
    lambda pieces: "".join(pieces).encode()
) | st.binary(max_size=60)  # fmt: skip
NAMES = st.sampled_from(["jobs.txt", "jobs.json", "jobs.jsonl", "jobs.csv", "jobs.tsv", "jobs.toml", "jobs"])


def check_any(folder: Path, name: str, data: bytes) -> None:
    with contextlib.suppress(SdcliError):  # no other error
        for line in lines_of(folder, data, name):
            assert line.number >= 0


@FEW
@given(name=NAMES, data=ANY)
def test_any_bytes_are_read_or_refused_in_a_sentence(tmp_path: Path, name: str, data: bytes) -> None:
    check_any(tmp_path, name, data)


@pytest.mark.slow
@MANY
@given(name=NAMES, data=ANY)
def test_many_bytes_are_read_or_refused_in_a_sentence(tmp_path: Path, name: str, data: bytes) -> None:
    check_any(tmp_path, name, data)


@given(st.text(max_size=60))
def test_a_line_without_options_is_the_prompt_unchanged(text: str) -> None:
    if "--" not in text:
        assert text_line(text) == ({"prompt": text.strip()} if text.strip() else {})


def test_long_lines_are_read_in_linear_time() -> None:
    quotes = ("--prompt " + "' " * 100_000, "a --n " + '"' * 99_999, '--prompt "' + "a " * 200_000)
    for text in ("--a " * 50_000, "-" * 200_000, *quotes):
        with contextlib.suppress(UsageError):
            text_line(text)
