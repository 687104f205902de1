"""Jobs: what a line of a prompts file comes to, what a job's key covers, and how often things are read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sdcli.errors import UsageError
from sdcli.generation.journal import NAME, Journal
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob, expand, key_of
from sdcli.generation.resolve.resolve import resolve
from sdcli.models.registry import Registry, load_registry
from sdcli.request import prompt_syntax
from sdcli.request.input_files import read_pinned
from sdcli.request.jobs import read_lines
from sdcli.request.schema import GenerationRequest, parse_request
from tests.conftest import Run


def jobs_of(file: Path, **typed: Any) -> list[ResolvedJob | BadJob]:
    return list(expand(read_lines(str(file)), {"model": "tiny", **typed}, load_registry(), num_images=1, base_seed=1))


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ('"n": 2.9', "num_images: should be a whole number from 1 to 100000, not 2.9"),
        ('"n": 2.0', "num_images: should be a whole number from 1 to 100000, not 2.0"),
        ('"n": true', "num_images: should be a whole number from 1 to 100000, not True"),
        ('"seed": true', "seed: should be a number, not true"),
        ('"seed": 1.0', "seed: should be a whole number, not 1.0"),
        ('"steps": 2.5', "steps: should be a whole number, not 2.5"),
        ('"steps": "x"', "steps: should be a valid integer"),
        ('"guidance_scale": false', "guidance_scale: should be a number, not false"),
        ('"invert_mask": 1', "invert_mask: should be true or false, not 1"),
        ('"extend": {"left": true}', "extend.left: should be a number, not true"),
        ('"loras": [{"path": "a", "unet_weight": true}]', "loras.0.unet_weight: should be a number, not true"),
    ],
)
def test_a_number_of_another_kind_in_json_is_refused_with_its_line(tmp_path: Path, entry: str, problem: str) -> None:
    (tmp_path / "jobs.jsonl").write_text(f'{{"prompt": "a"}}\n{{"prompt": "b", {entry}}}\n')
    good, bad = jobs_of(tmp_path / "jobs.jsonl")
    assert isinstance(good, ResolvedJob)
    assert isinstance(bad, BadJob)
    assert str(bad.error).startswith(f"line 2: {problem}")


def test_how_many_images_is_said_once_and_may_be_null_or_as_tables_write_it(tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a", "n": 3, "num_images": 1}\n{"prompt": "b", "n": null}\n')
    twice, one = jobs_of(tmp_path / "jobs.jsonl")
    assert (isinstance(twice, BadJob), isinstance(one, ResolvedJob)) == (True, True)
    assert "num_images is given twice" in str(twice.error)  # type: ignore[union-attr]
    (tmp_path / "jobs.csv").write_text("prompt,num_images\na,2.0\n")
    assert len(jobs_of(tmp_path / "jobs.csv")) == 2


def test_a_random_seed_of_a_line_is_not_the_typed_one(tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text(
        '{"prompt": "a", "seed": -1}\n{"prompt": "a", "seed": null}\n{"prompt": "a"}\n'
    )
    seeds = [job.request.seed for job in jobs_of(tmp_path / "jobs.jsonl", seed=7) if isinstance(job, ResolvedJob)]
    assert len(set(seeds)) == 3
    assert [seed == 7 for seed in seeds] == [False, False, True]


@pytest.mark.parametrize("cell", ["2.9", "true", "two"])
def test_a_csv_cell_that_is_no_whole_number_is_refused_with_its_line(tmp_path: Path, cell: str) -> None:
    for column in ("n", "seed"):
        (tmp_path / "jobs.csv").write_text(f"prompt,{column}\na,2\nb,{cell}\n")
        *good, bad = jobs_of(tmp_path / "jobs.csv")
        assert len(good) == (2 if column == "n" else 1)
        assert isinstance(bad, BadJob)
        assert str(bad.error).startswith("line 3: ")


def test_numerals_as_text_are_numbers_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a", "n": "2", "steps": "3", "guidance_scale": "7..3"}\n')
    (tmp_path / "jobs.csv").write_text("prompt,n,steps,guidance_scale\na,2,3,7..3\n")
    (tmp_path / "jobs.txt").write_text("a --num_images 2 --steps 3 --guidance_scale 7..3\n")
    for kind in ("jsonl", "csv", "txt"):
        jobs = jobs_of(tmp_path / f"jobs.{kind}")
        assert [isinstance(job, ResolvedJob) and job.request.steps for job in jobs] == [3, 3]


def test_a_model_is_looked_up_once_and_a_prompt_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    find, schedule = Registry.find, prompt_syntax.schedule

    def counted_find(self: Registry, name: str | None) -> Any:
        calls["find"] += 1
        return find(self, name)

    def counted_schedule(text: str, *, steps: int) -> Any:
        calls[text] += 1
        return schedule(text, steps=steps)

    monkeypatch.setattr(Registry, "find", counted_find)
    monkeypatch.setattr(prompt_syntax, "schedule", counted_schedule)
    (tmp_path / "jobs.txt").write_text("a [cat:dog:3] --num_images 4\na fox AND an owl\n")
    jobs = jobs_of(tmp_path / "jobs.txt")
    assert len(jobs) == 5
    assert calls == {"find": 1, "a [cat:dog:3]": 1, "a fox ": 1, " an owl": 1, "": 2}
    assert all(isinstance(job, ResolvedJob) and len(job.request.prompts) == 1 for job in jobs)


def test_a_changed_prompt_is_parsed_anew_and_another_seed_is_not() -> None:
    request = resolve(parse_request({"prompt": "a (cat:1.2)", "seed": 1}), load_registry().find("tiny"))
    assert request.model_copy(update={"seed": 2}).prompts is request.prompts
    (prompts,) = request.model_copy(update={"prompt": "a dog"}).prompts.values()
    assert prompts.positive[0].at(1).text == "a dog"
    (prompts,) = request.prompts.values()
    assert prompts.positive[0].at(1).unweighted == "a cat"


def retrained(folder: Path, part: str = "unet") -> None:
    """Other weights of the same size, in another file of the same name."""
    path = folder / part / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    (folder / "new").write_bytes(data)
    os.replace(folder / "new", path)


def test_the_key_of_a_job_covers_the_weights_of_all_its_models(tiny_folder: Path, tmp_path: Path) -> None:
    model, refiner = (shutil.copytree(tiny_folder, tmp_path / name) for name in ("model", "refiner"))
    control = shutil.copytree(tiny_folder / "unet", tmp_path / "control" / "controlnet").parent
    registry = load_registry()
    request = resolve(parse_request({"prompt": "a", "seed": 1}), registry.find(str(model)))
    controlnets = {"control": registry.find_controlnet(str(control))}
    job = ResolvedJob(1, request, registry.find(str(model)), registry.find(str(refiner)), controlnets)
    keys = [job.key()]
    assert key_of(job) == keys[0]
    for folder, part in ((model, "unet"), (refiner, "vae"), (control, "controlnet")):
        retrained(folder, part)
        keys.append(job.key())
    assert len(set(keys)) == 4
    shutil.rmtree(model)
    assert key_of(job) is None


@pytest.mark.slow
def test_a_resumed_run_generates_again_with_weights_that_have_changed(
    sdcli: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_folder, tmp_path / "run")
    (tmp_path / "jobs.txt").write_text("a cat --seed 1\na dog --seed 2\n")
    line = [
        "generate",
        "-m",
        run,
        "--prompts-file",
        "jobs.txt",
        "--steps",
        "1",
        "--size",
        "32x32",
        "--json",
        "--resume",
    ]

    def statuses() -> list[str]:
        result = sdcli(*line)
        assert result.returncode == 0, result.stderr
        return [json.loads(row)["status"] for row in result.stdout.splitlines()]

    assert statuses() == ["done", "done"]
    assert statuses() == ["skipped", "skipped"]
    retrained(run)
    assert statuses() == ["done", "done"]
    assert statuses() == ["skipped", "skipped"]
    assert len(list((tmp_path / "outputs").glob("*.png"))) == 4
    shutil.rmtree(run / "unet")
    shutil.copytree(tiny_folder / "unet", run / "unet")
    assert statuses() == ["skipped", "skipped"], "the first images are those of these weights"


def test_an_old_entry_of_the_journal_counts_whatever_the_weights_are(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"old")
    (tmp_path / "2.png").write_bytes(b"new")
    old = {"request": "r", "path": "1.png", "sha256": hashlib.sha256(b"old").hexdigest()}
    (tmp_path / NAME).write_text(json.dumps(old) + "\n")
    journal = Journal(tmp_path)
    assert journal.finished("r", lambda: pytest.fail("no weights are asked for"), taken=set()) == "1.png"
    journal.note("r", "key", "2.png", b"new")
    journal = Journal(tmp_path)
    assert journal.finished("r", lambda: "other", taken={"1.png"}) is None
    assert journal.finished("r", lambda: "key", taken={"1.png"}) == "2.png"
    assert journal.finished("r", lambda: None, taken={"1.png"}) == "2.png", "there are no weights to compare"


def test_an_image_in_memory_is_known_by_its_digest_and_never_names_a_file() -> None:
    spec = load_registry().find("tiny")
    digest = hashlib.sha256(b"an image").hexdigest()
    request = resolve(parse_request({"prompt": "a", "seed": 1, "init_image": b"an image"}), spec)
    assert read_pinned(request.init_image) == b"an image"  # type: ignore[arg-type]
    assert request.typed()["init_image"] == {"sha256": digest}
    assert read_pinned(request.changed(seed=2).init_image) == b"an image"  # type: ignore[arg-type]
    other = resolve(parse_request({"prompt": "a", "seed": 1, "init_image": b"another"}), spec)
    assert request.key() != other.key()
    for part in ({"controls": [{"model": "m", "image": b"an image"}]}, {"mask": b"an image", "init_image": b"x"}):
        assert digest in json.dumps(resolve(parse_request({"prompt": "a", **part}), spec).typed())


def test_bytes_cannot_be_given_in_json_nor_taken_from_a_record() -> None:
    spec = load_registry().find("tiny")
    digest = hashlib.sha256(b"an image").hexdigest()
    with pytest.raises(UsageError, match="init_image"):
        parse_request({"prompt": "a", "init_image": {"data": "an image", "sha256": digest}})
    with pytest.raises(ValueError, match="not the digest"):
        GenerationRequest(prompt="a", init_image={"data": b"other", "sha256": digest})  # type: ignore[arg-type]
    recorded = parse_request({"prompt": "a", "init_image": {"sha256": digest}})
    with pytest.raises(UsageError, match=r"image [0-9a-f]{12} was not a file but bytes"):
        resolve(recorded, spec)
