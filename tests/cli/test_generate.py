"""`sdcli generate` as a user runs it: real processes, really interrupted, killed, and out of disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from sdcli.errors import UsageError
from sdcli.request.jobs import combinations, read_lines
from sdcli.request.schedulers import SCHEDULERS
from sdcli.request.sweep import parse_axis, swept
from sdcli.request.wildcards import Wildcards
from tests.conftest import REPOSITORY, Disk, Run
from tests.forked import Forked

TINY = ("-m", "tiny", "--steps", "2", "-q")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.png"))}


def whole(folder: Path) -> int:
    """How many images there are; every one must decode."""
    paths = list(folder.glob("*.png"))
    for path in paths:
        with Image.open(path) as image:
            image.load()
    return len(paths)


def start(folder: Path, *arguments: str) -> Forked:
    return Forked(["generate", *arguments], cwd=folder)


def jobs_file(folder: Path, count: int, **fields: object) -> Path:
    path = folder / "jobs.jsonl"
    lines = [json.dumps({"prompt": f"thing number {n}", "custom_id": f"job-{n}", **fields}) for n in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_first_command_of_the_readme_paints_an_astronaut(sdcli: Run, tmp_path: Path) -> None:
    result = sdcli("generate", "an astronaut riding a horse", "--steps", "3", "--offline", env={})
    assert result.returncode == 0, result.stderr
    (path,) = result.stdout.splitlines()
    with Image.open(tmp_path / path) as image:
        assert image.size == (256, 256)
        assert "an astronaut riding a horse" in image.text["parameters"]


def test_results_are_lines_of_json_with_the_seed_and_the_path(sdcli: Run, tmp_path: Path) -> None:
    result = sdcli("generate", "a cat", "a dog", *TINY, "-n", "2", "--seed", "5", "--json")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["status"], line["index"], line["seed"]) for line in lines] == [
        ("done", 1, 5), ("done", 2, 6), ("done", 3, 5), ("done", 4, 6),
    ]  # fmt: skip
    assert all((tmp_path / line["path"]).is_file() for line in lines)
    assert result.stderr == ""


def test_a_dry_run_prints_the_resolved_request_and_paints_nothing(sdcli: Run, tmp_path: Path) -> None:
    result = sdcli("generate", "a cat", "--size", "64x128", "--seed", "0", "--dry-run")
    request = json.loads(result.stdout)
    assert request["width"], request["height"] == (64, 128)
    assert request["seed"] == 0
    assert request["model"] == "starter"
    assert None not in request.values()
    assert list(tmp_path.iterdir()) == []


def test_the_schedulers_are_listed_with_a_line_each(sdcli: Run) -> None:
    result = sdcli("generate", "--scheduler", "help")
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(SCHEDULERS)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "nothing to generate"),
        (["x", "--steps", "0"], 2, "--steps"),
        (["x", "--steps", "many"], 2, "--steps"),
        (["x", "--size", "100x100"], 2, "multiple of 16"),
        (["x", "--size", "big"], 2, "WIDTHxHEIGHT"),
        (["x", "--size", "64x64", "--width", "64"], 2, "either --size or --width"),
        (["x", "--scheduler", "eulr"], 2, "did you mean 'euler'"),
        (["x", "--eta", "0.5", "--scheduler", "euler"], 2, "eta has no effect"),
        (["x", "--negative-prompt", "y", "--guidance-scale", "1"], 2, "no effect"),
        (["x", "--prompt-template", "y"], 2, "{prompt}"),
        (["x\udcff"], 2, "half a character"),
        (["x", "-m", "sd51"], 3, "did you mean"),
        (["x", "-m", "sdxl"], 4, "sdcli models pull sdxl` (6.9 GB)"),
        (["x", "-m", "tiny", "--refiner", "tiny"], 2, "not of a family with refiners"),
        (["--from", "x.png", "--verify", "--dry-run"], 2, "--verify goes with --from IMAGE alone"),
        (["x", "-m", "y" * 300], 3, "no model"),
        (["x", "-m", "~nobody-here/x"], 3, "no file or folder"),
        (["x", "--init-image", "~nobody-here.png"], 3, "no file ~nobody-here.png"),
        (["x", "--refiner-start", "0.5"], 2, "no effect without --refiner"),
        (["x", "--refiner", "tiny", "--refiner-start", "1"], 2, "refiner_start"),
        (["x", "--refiner", "tiny", "--scheduler", "pndm"], 2, "cannot begin in the middle"),
        (["x", "-m", "sd15"], 4, "sdcli models pull sd15"),
        (["x", "-m", "some/thing"], 4, "sdcli models pull some/thing"),
        (["x", "-m", "./nowhere"], 3, "no file or folder"),
        (["x", "-o", "../{seed}.png", "--outdir", "here"], 2, "leaves the output folder"),
        (["x", "-o", "{prompt.__class__}.png"], 2, "no field"),
        (["x", "-o", "x.png", "--format", "jpeg"], 2, "--format asks for jpeg"),
        (["x", "--resume"], 2, "--resume needs --prompts-file"),
        (["x", "--verify"], 2, "--verify goes with --from"),
        (["x", "--prompts-file", "y.txt"], 2, "either prompts or --prompts-file"),
        (["--prompts-file", "y.txt"], 3, "cannot read"),
        (["--from", "y.png"], 3, "y.png"),
        (["x", "--models-file", "y.yaml"], 3, "y.yaml"),
        (["x", "--device", "cuda"], 2, "no cuda device"),
        (["x", "-m", "tiny", "--dtype", "float16"], 2, "float16 does not work on the CPU"),
    ],
)
def test_bad_input_gets_its_exit_code_and_a_sentence(
    sdcli: Run, arguments: list[str], code: int, sentence: str
) -> None:
    if "cuda" in arguments:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a cuda device here")
    result = sdcli("generate", *arguments)
    said = " ".join(result.stderr.replace("│", " ").split())
    assert (result.returncode, sentence in said) == (code, True), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_any_prompt_is_painted_and_stays_in_its_folder(sdcli: Run, tmp_path: Path) -> None:
    prompts = [
        "", "🐎" * 30, "ركوب حصان", "a" * 100_000, "x/../../y", "CON", "two\nlines", "<|endoftext|> cat", "-rf *",
        "a\u202egnp.exe",
    ]  # fmt: skip
    result = sdcli("generate", *TINY, "--seed", "1", "--", *prompts)
    assert result.returncode == 0, result.stderr
    names = sorted(result.stdout.splitlines())
    assert len(names) == len(prompts)
    for name in names:
        assert (tmp_path / name).resolve().parent == (tmp_path / "outputs").resolve()
        assert len(Path(name).name.encode()) < 255
    told = sdcli("info", *names, "--json")
    assert told.returncode == 0
    assert [json.loads(line)["request"]["prompt"] for line in told.stdout.splitlines()] == prompts


def test_a_bad_line_is_reported_with_its_number_and_the_rest_goes_on(sdcli: Run, tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text(
        '{"prompt": "a cat", "seed": 1, "custom_id": "one"}\n'
        "not json\n"
        '{"prompt": "a dog", "stepz": 3}\n'
        '{"prompt": "a fox", "size": "64x96", "custom_id": "four"}\n'
    )
    result = sdcli("generate", "--prompts-file", "jobs.jsonl", *TINY, "--json")
    assert result.returncode == 7
    lines = {line["index"]: line for line in map(json.loads, result.stdout.splitlines())}
    assert {index: line["status"] for index, line in lines.items()} == {1: "done", 2: "failed", 3: "failed", 4: "done"}
    assert lines[1]["custom_id"] == "one"
    assert lines[4]["height"] == 96
    assert "line 2" in lines[2]["error"]
    assert "did you mean 'steps'" in lines[3]["error"]


def test_prompts_come_from_stdin_as_text_or_jsonl(sdcli: Run) -> None:
    text = sdcli(
        "generate", "--prompts-file", "-", *TINY, "--dry-run", input="# no\n\na cat --n a dog --s 3 --w 64 --h 64\n"
    )
    lines = sdcli("generate", "--prompts-file", "-", *TINY, "--dry-run", input='{"prompt": "a cat", "steps": 3}\n')
    request = json.loads(text.stdout)
    assert (request["prompt"], request["negative_prompt"], request["steps"]) == ("a cat", "a dog", 3)
    assert json.loads(lines.stdout)["steps"] == 3


@pytest.mark.parametrize(
    "image_format", ["png", *(pytest.param(name, marks=pytest.mark.slow) for name in ("webp", "jpeg"))]
)
@pytest.mark.slow
def test_from_paints_an_image_again_and_verify_proves_it(sdcli: Run, tmp_path: Path, image_format: str) -> None:
    first = sdcli("generate", "a cat", *TINY, "--format", image_format, "--scheduler", "ddpm")
    path = first.stdout.strip()
    again = sdcli("generate", "--from", path, "-o", "again", "--format", image_format, "-q")
    changed = sdcli("generate", "--from", path, "--steps", "3", "-o", "changed", "--format", image_format, "-q")
    assert (tmp_path / again.stdout.strip()).read_bytes() == (tmp_path / path).read_bytes()
    assert (tmp_path / changed.stdout.strip()).read_bytes() != (tmp_path / path).read_bytes()
    verdict = sdcli("generate", "--from", path, "--verify")
    assert (verdict.returncode, verdict.stdout.strip()) == (0, f"{path}: identical")


def test_from_leaves_out_what_is_named_and_what_needs_it(sdcli: Run, tmp_path: Path) -> None:
    first = sdcli("generate", "a cat", *TINY, "--variation-strength", "0.3", "--clip-skip", "1", "-o", "first.png")
    assert first.returncode == 0, first.stderr
    again = ("generate", "--from", "first.png", "--dry-run")
    whole = json.loads(sdcli(*again).stdout)
    left = json.loads(sdcli(*again, "--without", "variation-strength,clip_skip").stdout)
    assert whole.keys() - left.keys() == {"variation_strength", "variation_seed", "clip_skip"}
    assert left == {name: value for name, value in whole.items() if name in left}
    unknown = sdcli(*again, "--without", "variation-strenght")
    assert (unknown.returncode, "did you mean 'variation_strength'" in unknown.stderr) == (2, True)
    alone = sdcli("generate", "a cat", "--without", "lora")
    assert (alone.returncode, "--without needs --from" in alone.stderr) == (2, True)


def test_what_is_not_downloaded_is_told_once_whatever_needs_it(sdcli: Run, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "map.png")
    for needing in (["-m", "sd15", "-n", "3"], ["-m", "tiny", "--control", "canny=map.png"]):
        done = sdcli("generate", "a cat", "--size", "64x64", *needing)
        assert (done.returncode, len(done.stderr.splitlines())) == (4, 1), done.stderr
        assert "is not in the cache" in done.stderr


def test_one_line_with_a_model_that_cannot_be_loaded_does_not_end_the_others(sdcli: Run, tmp_path: Path) -> None:
    wrong = [{"prompt": "a", "model": "tiny", "refiner": "tiny"}, {"prompt": "b"}]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in wrong))
    done = sdcli("generate", "--prompts-file", "jobs.jsonl", *TINY, "--json")
    assert done.returncode == 7, done.stderr
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["failed", "done"]


def test_an_image_too_long_for_its_format_is_refused_before_it_is_painted(sdcli: Run) -> None:
    done = sdcli("generate", "a cat", *TINY, "--size", "2560x64", "--upscale", "8x", "--format", "webp")
    assert (done.returncode, "20480x512 is too long for webp; use png" in done.stderr) == (2, True)


def test_the_sheet_of_a_sweep_leaves_its_images_alone(sdcli: Run, tmp_path: Path) -> None:
    done = sdcli("generate", "a", *TINY, "--size", "64x64", "--sweep", "seed=1,2", "-o", "sweep.png", "--overwrite")
    assert len(set(done.stdout.splitlines())) == 3, done.stderr


def test_a_dry_run_of_a_resume_shows_the_seeds_that_will_be_painted(sdcli: Run, tmp_path: Path) -> None:
    (tmp_path / "jobs.txt").write_text("a cat\n")
    options = ("generate", "--prompts-file", "jobs.txt", *TINY, "--outdir", "out")
    first = json.loads(sdcli(*options, "--json").stdout)["seed"]
    for again in (("--device", "cuda:7"), ("--dry-run",)):  # a run that generates nothing replaces no base seed
        sdcli(*options, *again)
    assert json.loads(sdcli(*options, "--resume", "--dry-run").stdout)["seed"] == first


def test_no_metadata_leaves_nothing(sdcli: Run, tmp_path: Path) -> None:
    result = sdcli("generate", "secretword", *TINY, "--no-metadata", "-o", "x.png")
    data = (tmp_path / "x.png").read_bytes()
    assert result.returncode == 0
    assert b"secretword" not in data
    assert b"tEXt" not in data


@pytest.mark.slow
def test_a_closed_stdout_ends_quietly(tmp_path: Path) -> None:
    command = f"{sys.executable} -m sdcli generate a b c d {' '.join(TINY)} --batch-size 1 | head -1"
    result = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert whole(tmp_path / "outputs") >= 1


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGINT], 130),
        pytest.param([signal.SIGTERM], 143, marks=pytest.mark.slow),
        pytest.param([signal.SIGINT] * 2, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_whole_images_and_its_exit_code(tmp_path: Path, signals: list[int], code: int) -> None:
    process = start(tmp_path, *[f"picture {n}" for n in range(400)], *TINY, "--steps", "20", "--batch-size", "1")
    assert process.stdout is not None
    process.stdout.readline()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == code, talk
    assert "Traceback" not in talk
    assert 1 <= whole(tmp_path / "outputs") < 400
    assert not list((tmp_path / "outputs").glob(".sdcli-*.tmp"))


@pytest.mark.slow
def test_a_batch_killed_again_and_again_is_resumed_to_the_set_of_one_that_ran_through(
    sdcli: Run, tmp_path: Path
) -> None:
    """SIGKILL at random moments; no seeds are given, so the drawn ones must survive too."""
    folder, jobs, kills = tmp_path, 100, 12
    options = (*TINY, "--prompts-file", str(jobs_file(folder, jobs)), "--resume", "--batch-size", "4", "--steps", "6")
    rng = random.Random(7)
    for _ in range(kills):
        process = start(folder, *options, "--outdir", "killed")
        assert process.stdout is not None
        for _ in range(rng.randrange(1, 6)):
            process.stdout.readline()
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.communicate()
        whole(folder / "killed")
    result = sdcli("generate", *options, "--outdir", "killed", "--json")
    assert result.returncode == 0, result.stderr
    statuses = [json.loads(line)["status"] for line in result.stdout.splitlines()]
    assert len(statuses) == jobs
    assert statuses.count("skipped") >= kills
    journal = (folder / "killed" / ".sdcli-journal.jsonl").read_text().splitlines()
    (folder / "through").mkdir()
    base = next(line for line in journal if "base_seed" in line)
    (folder / "through" / ".sdcli-journal.jsonl").write_text(base + "\n")
    assert sdcli("generate", *options, "--outdir", "through").returncode == 0
    assert digests(folder / "killed") == digests(folder / "through")
    assert len(digests(folder / "through")) == jobs
    assert not list((folder / "killed").glob(".sdcli-*.tmp"))


@pytest.mark.slow
def test_a_resume_in_another_format_writes_the_images_in_it_and_says_how_many_stay(sdcli: Run, tmp_path: Path) -> None:
    options = (
        "generate",
        "--prompts-file",
        jobs_file(tmp_path, 2).name,
        "-m",
        "tiny",
        "--steps",
        "2",
        "--outdir",
        "out",
    )
    assert sdcli(*options).returncode == 0
    same = sdcli(*options, "--resume")
    assert (same.returncode, same.stdout, "2 of 2 images were finished before" in same.stderr) == (0, "", True)
    other = sdcli(*options, "--resume", "--format", "webp")
    assert len(other.stdout.splitlines()) == len(list((tmp_path / "out").glob("*.webp"))) == 2


def test_a_dry_run_says_once_what_is_wrong_with_its_only_request(sdcli: Run) -> None:
    found = sdcli("generate", "x", "-m", "tiny", "--size", "100x101", "--dry-run")
    assert (found.returncode, found.stderr.count("should be a multiple")) == (2, 1), found.stderr


def test_stdin_is_not_both_the_prompts_file_and_an_image(sdcli: Run) -> None:
    lines = '{"prompt": "a"}\n'
    found = sdcli("generate", "--prompts-file", "-", "--init-image", "-", *TINY, "--dry-run", input=lines)
    assert (found.returncode, "read already as the prompts file" in found.stderr) == (1, True), found.stderr


def test_alternatives_in_a_typed_negative_prompt_are_noted_too(sdcli: Run) -> None:
    found = sdcli("generate", "a", "-m", "tiny", "--negative-prompt", "{x|y}", "--dry-run")
    assert "{x|y} is text in the prompt" in found.stderr


@pytest.mark.slow
def test_resume_goes_by_the_request_and_not_by_name_or_order(sdcli: Run, tmp_path: Path) -> None:
    path = jobs_file(tmp_path, 4)
    options = ("generate", "--prompts-file", path.name, *TINY, "--outdir", "out", "--resume", "--json")
    sdcli(*options)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*reversed(lines), '{"prompt": "one more"}']) + "\n")
    statuses = [json.loads(line)["status"] for line in sdcli(*options).stdout.splitlines()]
    assert statuses.count("skipped") == 4
    assert statuses.count("done") == 1
    damaged = sorted((tmp_path / "out").glob("*.png"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    statuses = [json.loads(line)["status"] for line in sdcli(*options).stdout.splitlines()]
    assert statuses.count("done") == 1


@pytest.mark.slow
def test_two_processes_sharing_a_folder_lose_nothing(tmp_path: Path) -> None:
    processes = [start(tmp_path, "a cat", *TINY, "-n", "12", "-o", "{index}.png", "--outdir", "out") for _ in range(3)]
    names = [name for process in processes for name in process.communicate(timeout=120)[0].splitlines()]
    assert len(set(names)) == 36
    assert whole(tmp_path / "out") == 36


def test_a_full_disk_is_exit_code_8_and_leaves_nothing_half_written(sdcli: Run, disk: Disk) -> None:
    disk.resize(256 << 10)
    result = sdcli(
        "generate", "a cat", *TINY, "--size", "128x128", "-n", "30", "--outdir", disk.path, "--batch-size", "2"
    )
    assert result.returncode == 8
    assert "No space left" in result.stderr
    assert "Traceback" not in result.stderr
    assert 1 <= whole(disk.path) < 30
    assert not list(disk.path.glob(".sdcli-*.tmp"))


def test_a_folder_that_cannot_be_written_is_exit_code_8_before_anything_is_loaded(sdcli: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    started = time.monotonic()
    result = sdcli("generate", "a cat", *TINY, "--outdir", "file/below")
    assert result.returncode == 8
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_files_follow_the_umask(tmp_path: Path) -> None:
    process = subprocess.run(
        f"umask 027; {sys.executable} -m sdcli generate x {' '.join(TINY)} -o x.png",
        shell=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert process.returncode == 0
    assert (tmp_path / "x.png").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "variable", [{}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({"NO_COLOR": "1"}, {"TERM": "dumb"}))]
)
def test_talk_without_a_terminal_is_plain_lines_on_stderr(sdcli: Run, variable: dict[str, str]) -> None:
    result = sdcli("generate", "a cat", "-m", "tiny", env=variable)
    assert "denoising" in result.stderr
    assert "\x1b" not in result.stderr + result.stdout


def test_a_line_s_fields_have_our_names_whatever_it_calls_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a {b|c}", "negative": "{x|y}", "cfg_scale": 9, "num-images": 2}\n'
        '{"prompt": "a", "size": "64x32", "custom_id": 7}\n'
        '{"prompt": "a", "size": "64x32", "width": 8, "custom_id": 8}\n'
    )
    first, sized, twice = read_lines(str(tmp_path / "a.jsonl"))
    assert first.fields == {"prompt": "a {b|c}", "negative_prompt": "{x|y}", "guidance_scale": 9, "num_images": 2}
    assert len(list(combinations([first], {}, Wildcards()))) == 4
    with pytest.raises(UsageError, match="guidance_scale has a value already"):
        swept([first], [parse_axis("cfg-scale=2,3")], {}, base_seed=0)
    assert sized.fields == {"prompt": "a", "width": 64, "height": 32, "custom_id": 7}
    assert (twice.problem, twice.fields) == ("width is given twice", {"custom_id": 8})
    (tmp_path / "a.txt").write_text("a --lora x --loras y --embedding v --embedding w\na --s 3 --steps 4\n")
    several, twice = read_lines(str(tmp_path / "a.txt"))
    assert several.fields == {"prompt": "a", "loras": ["x", "y"], "embeddings": ["v", "w"]}
    assert twice.problem == "steps is given twice"
