"""Many writers in one folder: parts of the journal, and names that were chosen before."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sdcli.cluster.generate_worker import ReservedWriter
from sdcli.generation.journal import NAME, Journal, entry_of
from sdcli.generation.resolve.jobs import ResolvedJob, expand
from sdcli.generation.settings import OutputSettings
from sdcli.generation.writer import Writer
from sdcli.models.registry import load_registry
from sdcli.request.jobs import Line


def jobs_of(*prompts: str) -> list[ResolvedJob]:
    lines = [Line(0, {"prompt": prompt, "model": "tiny", "seed": 1}) for prompt in prompts]
    return [
        one for one in expand(lines, {}, load_registry(), num_images=1, base_seed=0) if isinstance(one, ResolvedJob)
    ]


def writer_of(folder: Path, names: dict[int, str], part: str = "a") -> ReservedWriter:
    return ReservedWriter(OutputSettings(outdir=folder), Journal(folder, part), names)


def test_the_parts_of_a_journal_are_read_as_one_and_taken_in(tmp_path: Path) -> None:
    main, one, two = Journal(tmp_path), Journal(tmp_path, "run-1"), Journal(tmp_path, "run-2")
    for number, journal in enumerate((main, one, two)):
        (tmp_path / f"{number}.png").write_bytes(b"%d" % number)
        journal.note("key", None, f"{number}.png", b"%d" % number)
    assert len(list(tmp_path.glob(".sdcli-journal*"))) == 3
    for _ in range(2):
        read = Journal(tmp_path)
        taken: set[str] = set()
        while (path := read.finished("key", lambda: None, taken=taken)) is not None:
            taken.add(path)
        assert taken == {"0.png", "1.png", "2.png"}
        read.take_in_parts()
        assert [path.name for path in tmp_path.glob(".sdcli-journal*")] == [NAME]


@pytest.mark.parametrize("later", ["part", "journal"])
def test_the_base_seed_is_that_of_the_last_run_wherever_it_was_noted(later: str, tmp_path: Path) -> None:
    journals = {"journal": Journal(tmp_path), "part": Journal(tmp_path, "run-1")}
    for seconds, name in enumerate(sorted(journals, key=lambda name: name == later)):
        journals[name].begin_run("prompts.txt", 100 + seconds)
        journals[name].note("key", None, "x.png", b"x")
        file = tmp_path / (NAME if name == "journal" else ".sdcli-journal-run-1.jsonl")
        os.utime(file, (1000 + seconds, 1000 + seconds))
    for _ in range(2):
        read = Journal(tmp_path)
        assert read.base_seed("prompts.txt") == 101
        read.take_in_parts()


def test_a_file_that_an_earlier_attempt_wrote_is_as_good_as_written(tmp_path: Path) -> None:
    (job,) = jobs_of("a fox")
    for part in "ab":
        writer = writer_of(tmp_path, {1: "fox.png"}, part)
        writer.begin([job])
        assert writer.write(job, b"image") == tmp_path / "fox.png"
        assert writer.entries[1]["path"] == "fox.png"
    assert [path.name for path in tmp_path.glob("*.png")] == ["fox.png"]
    assert not (tmp_path / ".sdcli-journal-b.jsonl").exists()


def test_a_file_of_the_same_request_with_other_bytes_is_taken_where_a_journal_vouches_for_it(tmp_path: Path) -> None:
    """As from a GPU, whose sums may differ in their last bits from one run to the next."""
    (job,) = jobs_of("a fox")
    (tmp_path / "fox.png").write_bytes(b"image!")
    Journal(tmp_path, "a").add([entry_of(job.request.key(), None, "fox.png", b"image!")])
    writer = writer_of(tmp_path, {1: "fox.png"}, "b")
    writer.begin([job])
    assert writer.write(job, b"image") == tmp_path / "fox.png"
    assert writer.entries[1]["sha256"] == entry_of("", None, "", b"image!")["sha256"]


def test_a_file_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    (job,) = jobs_of("a fox")
    (tmp_path / "fox.png").write_bytes(b"not ours")
    writer = writer_of(tmp_path, {1: "fox.png"})
    writer.begin([job])
    assert writer.write(job, b"image") == tmp_path / "fox-2.png"
    assert (tmp_path / "fox.png").read_bytes() == b"not ours"
    rows = [json.loads(line) for line in (tmp_path / ".sdcli-journal-a.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["fox-2.png"]


def test_reserved_names_are_those_that_one_writer_would_choose(tmp_path: Path) -> None:
    jobs = jobs_of("a fox", "a cat", "a fox", "a dog")
    output = OutputSettings(outdir=tmp_path, template="{seed}/{prompt}")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "a-cat.png").write_bytes(b"")
    reserved = Writer(output).reserve(jobs)
    writer = Writer(output)
    written = {job.index: writer.write(job, b"x").relative_to(tmp_path).as_posix() for job in jobs}
    assert reserved == written == {1: "1/a-fox.png", 2: "1/a-cat-2.png", 3: "1/a-fox-2.png", 4: "1/a-dog.png"}
