"""Both ends of a warm worker in one process: whatever fails, each job has one result, and its file the same bytes."""

from __future__ import annotations

import os
import pickle
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdcli.cli.ui.console import Console
from sdcli.cli.warm_worker import generate_events, seconds_of
from sdcli.errors import (
    CannotWrite,
    Interrupted,
    NotFound,
    OutOfMemory,
    SdcliError,
    UsageError,
    packed_error,
    unpacked_error,
)
from sdcli.generation import service
from sdcli.generation.events import Event, Progress, Result
from sdcli.generation.journal import Journal
from sdcli.generation.model_cache import ModelCache
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.resolve.resolve import resolve
from sdcli.generation.settings import OutputSettings, RunSettings, TraceSettings
from sdcli.generation.writer import Writer
from sdcli.io.files import AlreadyExists
from sdcli.models.registry import load_registry
from sdcli.request.schema import GenerationRequest
from sdcli.server.warm import place as place_module
from sdcli.server.warm.client import Worker
from sdcli.server.warm.client import generate as generate_warm
from sdcli.server.warm.identity import identity
from sdcli.server.warm.messages import Gone, Message, Wire, greeting
from sdcli.server.warm.place import Place, Unsafe, check_folder
from sdcli.server.warm.session import SessionProgress, carry_out, take_order
from sdcli.server.warm.waiting import WaitingCommands
from tests.server.warm import LINE, TINY, generate, listening, runtime_folder

RUN = RunSettings(device="cpu")
PLACE = Place("cpu", "auto")


@pytest.fixture(scope="module")
def cache() -> ModelCache:
    """The worker's; the commands of these tests share it, which saves them loading the model."""
    return ModelCache(RUN)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with runtime_folder() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
        yield folder


def jobs_of(count: int, **fields: Any) -> list[ResolvedJob]:
    spec = load_registry().find("tiny")
    requests = [GenerationRequest(prompt="fox", seed=index, **fields) for index in range(1, count + 1)]
    return [ResolvedJob(index, resolve(request, spec), spec) for index, request in enumerate(requests, start=1)]


class Dying(Wire):
    """The worker's end of a connection that breaks after some messages."""

    def __init__(self, connection: socket.socket, messages: int) -> None:
        super().__init__(connection, trusting=True)
        self._left = messages

    def send(self, *message: Any) -> None:
        if not self._left:
            self.close()
            raise Gone
        self._left -= 1
        super().send(*message)


def by_worker(
    cache: ModelCache,
    jobs: list[ResolvedJob],
    outdir: Path,
    *,
    messages: int = -1,
    stop: Callable[[], Interrupted | None] = lambda: None,
    journal: Journal | None = None,
    previews: list[bytes] | None = None,
    **output: Any,
) -> tuple[list[Event], list[str]]:
    """The events of a command whose worker is a thread, and what it notes."""
    ours, theirs = socket.socketpair()
    wire, notes = Dying(theirs, messages), list[str]()

    def work() -> None:
        order = take_order(wire)
        if order is not None:
            carry_out(order, wire, cache, SessionProgress())
        wire.close()

    thread = threading.Thread(target=work)
    thread.start()
    writer = Writer(OutputSettings(outdir=outdir, **output), journal)
    worker = Worker(Wire(ours), pid=1, patience=60)
    try:
        events = []
        options: dict[str, Any] = {"stop": stop, "note": notes.append, "previews": previews is not None}
        for event in generate_warm(jobs, RUN, writer, worker, **options):
            if previews is not None and isinstance(event, Progress):
                image = event.preview()
                assert image is not None
                previews.append(image.tobytes())
            events.append(event)
        return events, notes
    finally:
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_worker_that_dies_after_any_message_loses_and_repeats_nothing(
    cache: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcli.generation.model_cache.ModelCache", lambda run: cache)
    jobs = jobs_of(2, steps=1, width=32, height=32)
    settings: dict[str, Any] = {"trace": TraceSettings(1)}
    _, none = by_worker(cache, jobs, tmp_path / "whole", **settings)
    assert none == []
    expected = contents(tmp_path / "whole")
    assert len(expected) == 6
    died = 0
    while True:
        folder = tmp_path / str(died)
        events, notes = by_worker(cache, jobs, folder, messages=died, **settings)
        results = [event for event in events if isinstance(event, Result)]
        assert sorted(result.job.index for result in results) == [1, 2]
        assert {result.status for result in results} == {"done"}
        assert all(len(result.side_files) == 2 for result in results)
        assert contents(folder) == expected
        if not notes:
            break
        assert notes == [f"{LINE}it has died"]
        died += 1
    assert died > 15


def test_the_journal_of_a_run_that_lost_its_worker_has_each_image_once(
    cache: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcli.generation.model_cache.ModelCache", lambda run: cache)
    jobs = jobs_of(3, steps=1)
    for died in (4, 8, 12):
        folder = tmp_path / str(died)
        by_worker(cache, jobs, folder, messages=died, journal=Journal(folder))
        lines = (folder / ".sdcli-journal.jsonl").read_text().splitlines()
        assert len(lines) == len(set(lines)) == 3
        assert len(list(folder.glob("*.png"))) == 3


def test_previews_are_those_of_the_running_step(cache: ModelCache, tmp_path: Path) -> None:
    jobs, ours = jobs_of(2, steps=3, width=64, height=64), list[bytes]()
    for event in service.generate(jobs, cache, Writer(OutputSettings(outdir=tmp_path / "cold"))):
        if isinstance(event, Progress):
            image = event.preview()
            assert image is not None
            ours.append(image.tobytes())
    by_worker(cache, jobs, tmp_path / "warm", previews=(theirs := []))
    assert theirs == ours
    assert len(ours) == 3


@pytest.mark.parametrize("error", [OutOfMemory("no memory"), UsageError("no"), AlreadyExists("there"), RuntimeError()])
def test_a_failure_in_the_worker_is_that_of_the_command(
    error: Exception, cache: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody expects is tried again without the worker, which reports it if it happens again."""
    from sdcli.generation import run_batch

    before, calls = run_batch.decode_with_fallbacks, list[int]()

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return before(*arguments, **options)

    monkeypatch.setattr(run_batch, "decode_with_fallbacks", failing)
    jobs = jobs_of(2, steps=1)
    if isinstance(error, CannotWrite):  # concerns every image
        with pytest.raises(CannotWrite, match="there"):
            by_worker(cache, jobs, tmp_path)
        return
    events, notes = by_worker(cache, jobs, tmp_path)
    results = [event for event in events if isinstance(event, Result)]
    if isinstance(error, RuntimeError):
        assert notes == [f"{LINE}unexpected RuntimeError"]
        assert [result.status for result in results] == ["done", "done"]
    else:
        assert notes == []
        assert [result.status for result in results] == ["failed", "done"]
        assert type(results[0].error) is type(error)
        assert str(results[0].error) == str(error)


def test_a_stop_ends_the_worker_between_batches(cache: ModelCache, tmp_path: Path) -> None:
    reason = Interrupted("interrupted; kept")
    asked: list[int] = []

    def stop() -> Interrupted | None:
        asked.append(1)
        return reason if list(tmp_path.glob("*.png")) else None

    with pytest.raises(Interrupted) as raised:
        by_worker(cache, jobs_of(200, steps=2, width=256, height=256), tmp_path, stop=stop)
    assert raised.value is reason
    assert 1 <= len(list(tmp_path.glob("*.png"))) < 200


@pytest.mark.parametrize("kind", [UsageError, NotFound, OutOfMemory, AlreadyExists, SdcliError])
def test_an_error_keeps_its_exit_code_and_its_sentence(kind: type[SdcliError]) -> None:
    error = unpacked_error(packed_error(kind("what is wrong")))
    assert (error.exit_code, str(error)) == (kind.exit_code, "what is wrong")


def test_jobs_arrive_exactly_as_they_are_sent() -> None:
    ours, theirs = socket.socketpair()
    registry = load_registry()
    specs = [spec for spec in registry.models.values() if spec.family.supported]
    assert len(specs) > 5
    request = jobs_of(1, steps=2)[0].request
    jobs = tuple(ResolvedJob(index, request, spec) for index, spec in enumerate(specs))
    Wire(ours).send("run", jobs, RUN, OutputSettings(trace=TraceSettings((1, 2))), {1: Path("a")}, b"x")
    assert Wire(theirs, trusting=True).receive() == (
        *("run", jobs, RUN, OutputSettings(trace=TraceSettings((1, 2))), {1: Path("a")}, b"x"),
    )


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/sdcli-was-here",)


@pytest.mark.parametrize("trusting", [True, False])
@pytest.mark.parametrize(
    "value", [Evil(), pickle.Unpickler, Path.unlink, print], ids=["reduced", "class", "method", "function"]
)
def test_nothing_but_the_classes_of_a_job_is_let_in(value: Any, trusting: bool) -> None:
    ours, theirs = socket.socketpair()
    Wire(ours).send("run", value)
    with pytest.raises(Gone):
        Wire(theirs, trusting=trusting).receive()


def test_a_worker_sends_no_classes_at_all() -> None:
    ours, theirs = socket.socketpair()
    Wire(ours).send("hello", RUN)
    with pytest.raises(Gone):
        Wire(theirs).receive()


# Workers that do not fit


def notes_of(tmp_path: Path, cache: ModelCache, capsys: pytest.CaptureFixture[str], **options: Any) -> list[str]:
    """What a command prints on stderr that expects a worker, and generates without it."""
    writer, use = Writer(OutputSettings(outdir=tmp_path / "out")), {"use": True, "keep": None, **options}
    events = generate_events(jobs_of(1, steps=1), RUN, writer, Console(), stop=lambda: None, previews=False, **use)
    assert [event.status for event in events if isinstance(event, Result)] == ["done"]
    return capsys.readouterr().err.splitlines()


@pytest.fixture(autouse=True)
def _shared_cache(cache: ModelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdcli.generation.model_cache.ModelCache", lambda run: cache)


def test_without_a_socket_nothing_is_printed(
    runtime: Path, cache: ModelCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert notes_of(tmp_path, cache, capsys) == []
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version of sdcli": "0.0.0"}, "it has another version of sdcli"),
        ({"HF_HOME": "/elsewhere"}, "it has another HF_HOME"),
        ({"number of processors": "99"}, "it has another number of processors"),
    ],
)
def test_a_worker_that_would_generate_other_bytes_is_not_used(
    change: dict[str, str],
    sentence: str,
    runtime: Path,
    cache: ModelCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    facts = identity() | change

    def serve(wire: Wire) -> None:
        wire.send(*greeting(facts, seconds_left=0.0, patience=1.0))
        with pytest.raises(Gone):
            wire.receive()

    check_folder(create=True)
    with listening(PLACE, serve):
        assert notes_of(tmp_path, cache, capsys) == [LINE + sentence]


@pytest.mark.parametrize("left", [None, 30.0])
def test_a_worker_is_not_waited_for_where_starting_without_it_is_quicker(
    left: float | None, runtime: Path, cache: ModelCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_folder(create=True)
    busy = greeting(identity(), seconds_left=left, patience=2.0)
    with listening(PLACE, lambda wire: wire.send(*busy)):
        assert notes_of(tmp_path, cache, capsys) == [f"{LINE}it is busy"]


def test_a_worker_that_does_not_begin_in_time_is_left(
    runtime: Path, cache: ModelCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(wire: Wire) -> None:
        wire.send(*greeting(identity(), seconds_left=0.1, patience=0.2))
        with pytest.raises(Gone):
            wire.receive()

    check_folder(create=True)
    with listening(PLACE, serve):
        assert notes_of(tmp_path, cache, capsys) == [f"{LINE}it is busy"]


def test_a_command_shows_its_place_while_it_waits_and_sends_nothing(
    runtime: Path, cache: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []

    def serve(wire: Wire) -> None:
        wire.send(*greeting(facts, seconds_left=0.1, patience=60.0, place=2))
        sent.append(wire.wait(0.2))
        wire.send("place", 1)
        order = take_order(wire)
        assert order is not None
        carry_out(order, wire, cache, SessionProgress())

    check_folder(create=True)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # which a command sets itself
    facts = identity()
    with listening(PLACE, serve):
        done = generate(tmp_path / "out", "fox", *TINY, "--steps", "1")
    assert done.code == 0, done.err
    assert sent == [False]
    assert [line for line in done.err.splitlines() if "warm worker" in line] == [
        "waiting for the warm worker, place 2 in the queue",
        "waiting for the warm worker, place 1 in the queue",
    ]


def test_commands_that_wait_are_served_in_their_order_and_told_their_places() -> None:
    commands, heard, theirs = WaitingCommands(), list[Wire](), list[Wire]()

    def come() -> Message:
        ours, other = socket.socketpair()
        heard.append(Wire(ours))
        theirs.append(Wire(other))
        commands.add(theirs[-1], lambda place: ("hello", place))
        return heard[-1].receive()

    assert commands.take(0.0) is None
    assert [come() for _ in range(3)] == [("hello", place) for place in range(3)]
    assert commands.take(0.0) is theirs[0]
    assert [wire.receive() for wire in heard[1:]] == [("place", 1), ("place", 2)]
    assert [come(), come()] == [("hello", 3), ("hello", 4)]
    heard[2].close()
    assert commands.take(0.0) is theirs[1]
    assert not heard[0].wait(0.0)
    assert [wire.receive() for wire in heard[3:]] == [("place", 1), ("place", 2)], "who has gone has no place"
    assert len(commands) == 2


def test_the_time_of_those_who_wait_is_that_of_the_last_order(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("sdcli.server.warm.session.time.monotonic", lambda: now)
    progress = SessionProgress()
    assert progress.seconds_left() == 0.0
    progress.begin(4)
    assert progress.seconds_left() is None
    now = 2.0
    progress.note(Progress((1, 2), 1, 4, preview=lambda: None))  # half of two of the four
    assert progress.seconds_left() == 6.0
    assert progress.seconds_left(waiting=1) is None
    now = 8.0
    progress.end()
    progress.begin(2)
    now = 9.0
    assert progress.seconds_left() == 3.0, "two seconds an image, as before"
    assert progress.seconds_left(waiting=2) == 19.0
    now = 20.0
    assert progress.seconds_left() == 0.0


def test_what_answers_with_no_greeting_is_no_worker(
    runtime: Path, cache: ModelCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_folder(create=True)
    with listening(PLACE, lambda wire: None):
        assert notes_of(tmp_path, cache, capsys) == [f"{LINE}it has ended"]


def test_a_stale_socket_is_removed_after_one_line(
    runtime: Path, cache: ModelCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_folder(create=True)
    PLACE.listen().close()
    assert notes_of(tmp_path, cache, capsys) == [f"{LINE}it has died"]
    assert notes_of(tmp_path, cache, capsys) == []


def test_the_socket_is_the_users_alone(runtime: Path) -> None:
    check_folder(create=True)
    with PLACE.listen():
        assert stat.S_IMODE(PLACE.address.stat().st_mode) == 0o600
    assert stat.S_IMODE(PLACE.address.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o750, 0o701])
def test_a_folder_that_others_may_enter_is_refused(
    mode: int, runtime: Path, cache: ModelCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_folder(create=True)
    with PLACE.listen():
        PLACE.address.parent.chmod(mode)
        (line,) = notes_of(tmp_path, cache, capsys)
    assert line.startswith(f"{LINE}other users may enter {runtime / 'sdcli'}")
    (line,) = notes_of(tmp_path, cache, capsys, keep=60.0)  # nor is one started there
    assert "other users may enter" in line


def test_a_folder_or_a_socket_of_another_user_is_refused(
    runtime: Path, cache: ModelCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    check_folder(create=True)
    with PLACE.listen():
        os.chown(PLACE.address, 1234, 1234)
        assert notes_of(tmp_path, cache, capsys) == [f"{LINE}{PLACE.address} is not a socket of this user"]
        os.chown(PLACE.address.parent, 1234, 1234)
        assert notes_of(tmp_path, cache, capsys) == [f"{LINE}{runtime / 'sdcli'} is not a folder of this user"]


def test_a_link_is_no_folder(runtime: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (runtime / "sdcli").symlink_to(tmp_path)
    with pytest.raises(Unsafe):
        check_folder(create=True)


def test_the_other_end_has_to_be_a_process_of_the_same_user(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _theirs = socket.socketpair()
    place_module.check_peer(ours)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(Unsafe):
        place_module.check_peer(ours)


def test_only_one_process_holds_a_place(runtime: Path) -> None:
    first = PLACE.lock()
    assert first is not None
    assert PLACE.lock() is None
    assert Place("cpu", "float32").lock() is not None
    os.close(first)
    assert PLACE.lock() is not None


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("45", 45), ("0.5m", 30)])
def test_times_are_numbers_with_a_unit(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "0", "-1s", "5d", "nan", "inf", "1000h", "5 minutes"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--keep-warm takes a time"):
        seconds_of(text)
