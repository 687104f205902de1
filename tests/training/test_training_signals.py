"""Signals and faults while a run trains, validates, generates samples and logs: the checkpoint always comes first."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sdcli.cli.ui.console import Console
from sdcli.cli.ui.training_signals import TrainingStop
from sdcli.errors import CannotWrite, Interrupted, NotFound, SdcliError, Terminated
from sdcli.request.schema import GenerationRequest
from sdcli.training import run_log
from sdcli.training.events import CheckpointSaved, Event, RunEnd, RunNote, SamplesSaved, StepMetrics, ValidationMetrics
from sdcli.training.loop import Trainer
from sdcli.training.reporting import Reporting
from sdcli.training.run_log import RunLog, read_log
from sdcli.training.sample_images import default_prompts
from sdcli.training.state.checkpoint import newest_checkpoint
from sdcli.training.task import Networks
from sdcli.training.watching import Watching, abandoned_if
from tests.conftest import REPOSITORY
from tests.forked import Forked, run_forked
from tests.training.test_training_loop import ToyTask, all_tensors, settings, trainer
from tests.training_runs import fresh_accelerator, grey_images, same_checkpoint, train_pixels

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    fresh_accelerator()


@pytest.fixture
def stop() -> Iterator[TrainingStop]:
    """The handlers of a training command, in this process."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in NAMES}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where nohup started the tests
    yield TrainingStop(Console(), kept="complete checkpoints are kept").install()
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.fixture
def greys(tmp_path: Path) -> Path:
    return grey_images(tmp_path / "greys")


def send(name: str) -> None:
    """Send a signal to this process; Python runs its handler before the next line."""
    os.kill(os.getpid(), getattr(signal, name))


class Watched(ToyTask):
    """A toy whose validation and samples call its network many times, and which does something at one of the calls."""

    def __init__(self, *, during: str = "", call: int = 0, do: Any = lambda: None, batch: int = 4) -> None:
        super().__init__(batch=batch)
        self.during, self.call, self.do = during, call, do
        self.calls = {"validate": 0, "samples": 0, "loss": 0}

    def _work(self, during: str, network: Any) -> None:
        for call in range(20):
            network(torch.ones(2, 3))
            self.calls[during] += 1
            if (during, call) == (self.during, self.call):
                self.do()

    def validate(self, networks: Networks) -> dict[str, float]:
        self._work("validate", networks["unet"])
        return super().validate(networks)

    def samples(self, networks: Networks, step: int, folder: Path) -> list[Path]:
        self._work("samples", networks["unet"])
        folder.mkdir(exist_ok=True)
        (folder / f"step-{step}.png").touch()
        return [folder / f"step-{step}.png"]


def run_to_its_end(
    made: Trainer,
    stop: TrainingStop,
    events: list[Event],
    *,
    done: int = 0,
    see: Callable[[Event], None] = lambda event: None,
) -> None:
    """Train, and collect what happens up to the exception that ends the run."""
    for event in made.train(done=done, stop=stop, save=stop.save):
        events.append(event)
        see(event)


PLAN: dict[str, Any] = {"validate_every": 4, "sample_every": 4, "checkpoint_every": 4}


@cache
def straight() -> dict[str, torch.Tensor]:
    """The state of an uninterrupted run of 8 steps."""
    with tempfile.TemporaryDirectory() as folder:
        list(trainer(Path(folder), Watched(), settings(), **PLAN).train())
        return all_tensors(Path(folder), 8)


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Signals


@pytest.mark.parametrize(
    ("name", "kind"),
    [("SIGINT", Interrupted), ("SIGTERM", Terminated), ("SIGHUP", Terminated), ("SIGUSR2", Terminated)],
)
def test_a_signal_ends_the_run_after_the_step_in_hand_with_a_checkpoint(
    tmp_path: Path, stop: TrainingStop, name: str, kind: type[Interrupted]
) -> None:
    def after_two(event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step == 2:
            send(name)

    events: list[Event] = []
    with pytest.raises(kind, match="checkpoint at step 3; --resume continues") as caught:
        run_to_its_end(trainer(tmp_path / "run", Watched(), settings(), **PLAN), stop, events, see=after_two)
    assert type(caught.value) is kind
    assert newest_checkpoint(tmp_path / "run").step == 3
    assert not any(isinstance(event, SamplesSaved | ValidationMetrics) for event in events)


def test_sigusr1_saves_and_the_run_goes_on(tmp_path: Path, stop: TrainingStop) -> None:
    saved = []
    for event in trainer(tmp_path / "run", Watched(), settings(), **PLAN).train(stop=stop, save=stop.save):
        if isinstance(event, StepMetrics) and event.step == 2:
            send("SIGUSR1")
        if isinstance(event, CheckpointSaved):
            saved.append(event.step)
    assert saved == [3, 4, 8]
    assert same(straight(), all_tensors(tmp_path / "run", 8))


@pytest.mark.parametrize("during", ["validate", "samples"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2"])
def test_a_signal_during_validation_or_samples_is_heard_at_the_next_layer(
    tmp_path: Path, stop: TrainingStop, during: str, name: str
) -> None:
    run = tmp_path / "run"

    def now() -> None:
        assert newest_checkpoint(run).step == 4, "the checkpoint is on the disk already"
        send(name)

    task = Watched(during=during, call=3, do=now)
    events: list[Event] = []
    with pytest.raises(Interrupted, match="checkpoint at step 4"):
        run_to_its_end(trainer(run, task, settings(), **PLAN), stop, events)
    assert task.calls[during] == 4, "no further call of the network after the signal"
    assert any(isinstance(event, RunNote) and "a signal came first" in event.text for event in events)

    made = trainer(run, Watched(), settings(), **PLAN)
    rest = list(made.train(done=made.resume(newest_checkpoint(run).path), owed=("validation", "samples")))
    assert [event.step for event in rest if isinstance(event, SamplesSaved)] == [4, 8]
    assert same(straight(), all_tensors(run, 8))


@pytest.mark.parametrize("checkpoint_every", [4, 100])
def test_sigusr1_during_samples_saves_what_is_not_saved_yet(
    tmp_path: Path, stop: TrainingStop, checkpoint_every: int
) -> None:
    task = Watched(during="samples", call=3, do=lambda: send("SIGUSR1"))
    plan = {**PLAN, "checkpoint_every": checkpoint_every}
    events = list(trainer(tmp_path / "run", task, settings(), **plan).train(stop=stop, save=stop.save))
    saved = [event.step for event in events if isinstance(event, CheckpointSaved)]
    sheets = [event.step for event in events if isinstance(event, SamplesSaved)]
    assert saved == [4, 8]
    assert sheets == ([4, 8] if checkpoint_every == 4 else [8]), "a sheet gives way where there was something to save"
    assert same(straight(), all_tensors(tmp_path / "run", 8))


@pytest.mark.parametrize(("step", "hurried"), [(3, True), (4, False), (8, False)])
def test_only_a_checkpoint_that_was_not_due_is_hurried(
    tmp_path: Path, stop: TrainingStop, step: int, hurried: bool
) -> None:
    """A train-vae run then measures less; the model at its end is always measured in full."""

    class Measuring(Watched):
        hurried = False

        def save(self, folder: Path, networks: Networks, averages: Mapping[str, torch.nn.Module]) -> None:
            super().save(folder, networks, averages)
            seen.append(self.hurried)

    def before(event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step == step - 1:
            send("SIGTERM")

    seen: list[bool] = []
    with pytest.raises(Terminated):
        run_to_its_end(trainer(tmp_path / "run", Measuring(), settings(), **PLAN), stop, [], see=before)
    assert seen[-1] == hurried
    assert not any(seen[:-1])


def test_only_the_thread_that_watches_is_interrupted() -> None:
    import threading

    results: list[str] = []
    network = torch.nn.Linear(1, 1)
    with abandoned_if(lambda: bool(results)):
        results.append("urgent")
        other = threading.Thread(target=lambda: results.append(str(network(torch.ones(1)).shape)))
        other.start()
        other.join()
    assert len(results) == 2


def test_signals_that_systems_send_together_are_one_request(
    stop: TrainingStop, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SIGTERM", "SIGHUP", "SIGHUP", "SIGUSR2", "SIGUSR1"):  # systemd sends the first two
        send(name)
    assert isinstance(stop(), Terminated)
    assert stop.save.wanted
    with pytest.raises(Terminated, match="terminated; complete checkpoints are kept"):
        send("SIGTERM")
    assert capsys.readouterr().err.count("stopping after the current step") == 1


def test_a_hangup_first_leaves_the_first_sigterm_gentle(stop: TrainingStop) -> None:
    send("SIGHUP")
    send("SIGTERM")
    assert "SIGHUP" in str(stop())
    with pytest.raises(Terminated):
        send("SIGTERM")


def test_a_run_under_nohup_ignores_the_hangup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in NAMES}
    try:
        stop = TrainingStop(Console(quiet=True), kept="").install()
        send("SIGHUP")
        assert stop() is None
    finally:
        for name, handler in handlers.items():
            signal.signal(getattr(signal, name), handler)
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_heard_although_the_terminal_has_gone(stop: TrainingStop, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Console, text: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Console, "warn", gone)
    send("SIGHUP")
    assert isinstance(stop(), Terminated)


def check_sequence(names: list[str]) -> None:
    """The answer to any sequence of signals: what ends, what saves, and when it ends at once."""
    stop = TrainingStop(Console(quiet=True), kept="complete checkpoints are kept")
    stop._tell = lambda text: None  # type: ignore[method-assign]
    direct = [place for place, name in enumerate(names) if name in {"SIGINT", "SIGTERM"}]
    at_once = direct[1] if len(direct) > 1 else None
    for place, name in enumerate(names):
        if place == at_once:
            with pytest.raises(
                Terminated if name == "SIGTERM" else Interrupted, match="checkpoints are kept"
            ) as caught:
                stop._handle(getattr(signal, name), None)
            assert caught.value.exit_code == (143 if name == "SIGTERM" else 130)
            return
        stop._handle(getattr(signal, name), None)
    ending = [name for name in names if name != "SIGUSR1"]
    reason = stop()
    assert (reason is not None) == bool(ending)
    if reason is not None:
        assert reason.exit_code == (130 if ending[0] == "SIGINT" else 143)
    assert stop.save.wanted == ("SIGUSR1" in names)


SEQUENCES = st.lists(st.sampled_from(NAMES), max_size=6)


@hypothesis_settings(max_examples=100, deadline=None)
@given(names=SEQUENCES)
def test_any_sequence_of_signals_is_understood(names: list[str]) -> None:
    check_sequence(names)


@pytest.mark.slow
@hypothesis_settings(max_examples=3000, deadline=None)
@given(names=SEQUENCES)
def test_any_of_many_sequences_of_signals_is_understood(names: list[str]) -> None:
    check_sequence(names)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["validate", "samples", "loss"]),
        st.integers(0, 45),
        st.sampled_from(["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "fault", "disk"]),
    ),
    max_size=4,
)
INTERVALS = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9))


def check_schedule(root: Path, intervals: tuple[int, int, int], events: list[tuple[str, int, str]]) -> None:
    """A run with any intervals, with signals and faults at any calls, resumed until it ends: not a bit differs."""
    plan = dict(zip(("validate_every", "sample_every", "checkpoint_every"), intervals, strict=True))
    expected, run = straight(), root / "run"
    left = list(events)
    for attempt in range(len(events) + 1):
        fresh_accelerator()
        stop = TrainingStop(Console(quiet=True), kept="")
        stop._tell = lambda text: None  # type: ignore[method-assign]
        task = Scheduled(left, stop)
        made = trainer(run, task, settings(), **plan)
        done = made.resume(newest_checkpoint(run).path) if attempt and any(run.glob("checkpoint-*")) else 0
        happened: list[Event] = []
        with contextlib.suppress(Interrupted):
            run_to_its_end(made, stop, happened, done=done)
        (end,) = [event for event in happened if isinstance(event, RunEnd)]
        assert newest_checkpoint(run).step == end.step
        if end.reason == "finished":
            break
    assert same(expected, all_tensors(run, 8))


class Scheduled(Watched):
    """Does what is due at the call of its number in a run; each event happens once."""

    def __init__(self, left: list[tuple[str, int, str]], stop: TrainingStop) -> None:
        super().__init__()
        self.left, self.stop = left, stop

    def _work(self, during: str, network: Any) -> None:
        for _ in range(20):
            network(torch.ones(2, 3))
            self._happen(during)

    def _happen(self, during: str) -> None:
        self.calls[during] += 1
        for event in [one for one in self.left if one[:2] == (during, self.calls[during] - 1)]:
            self.left.remove(event)
            if event[2] == "fault" and during != "loss":
                raise RuntimeError("a bug")
            if event[2] == "disk" and during != "loss":
                raise OSError(errno.ENOSPC, "No space left on device")
            if event[2].startswith("SIG"):
                self.stop._direct = False  # a second signal ends at once, which is tested elsewhere
                self.stop._handle(getattr(signal, event[2]), None)

    def _loss(self, name: str) -> Any:
        real = super()._loss(name)

        def loss(networks: Networks, batch: Any) -> Any:
            self._happen("loss")
            return real(networks, batch)

        return loss


@pytest.mark.slow
@hypothesis_settings(max_examples=10, deadline=None)
@given(intervals=INTERVALS, events=EVENTS)
def test_any_schedule_with_signals_and_faults_gives_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, intervals: tuple[int, int, int], events: list[tuple[str, int, str]]
) -> None:
    check_schedule(tmp_path_factory.mktemp("schedule"), intervals, events)


@pytest.mark.slow
@hypothesis_settings(max_examples=30, deadline=None)
@given(intervals=INTERVALS, events=EVENTS)
def test_any_of_many_schedules_gives_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, intervals: tuple[int, int, int], events: list[tuple[str, int, str]]
) -> None:
    check_schedule(tmp_path_factory.mktemp("schedule"), intervals, events)


# Faults


FAULTS = [
    RuntimeError("a bug"),
    OSError(errno.ENOSPC, "No space left on device"),
    MemoryError(),
    KeyError("name"),
    CannotWrite("cannot write samples: No space left on device"),
    NotFound("no file data/5.png"),
]


@pytest.mark.parametrize("during", ["validate", "samples"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_what_fails_in_validation_and_samples_is_a_warning_and_counted(
    tmp_path: Path, during: str, fault: Exception
) -> None:
    def fail() -> None:
        raise fault

    events = list(trainer(tmp_path / "run", Watched(during=during, call=5, do=fail), settings(), **PLAN).train())
    end = events[-1]
    assert isinstance(end, RunEnd)
    assert end.reason == "finished"
    assert end.failed == {"validation" if during == "validate" else "samples": 2}
    notes = [event.text for event in events if isinstance(event, RunNote)]
    assert len(notes) == 2
    assert all(note.startswith("no ") and "the run goes on" in note and "Error" not in note for note in notes)
    assert same(straight(), all_tensors(tmp_path / "run", 8))


@pytest.mark.slow
@pytest.mark.parametrize("during", ["validate", "samples"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_fault_at_any_call_of_validation_and_samples_costs_no_bit(
    tmp_path: Path, during: str, fault: Exception
) -> None:
    def fail() -> None:
        raise fault

    expected = straight()
    for call in range(20):
        task = Watched(during=during, call=call, do=fail)
        list(trainer(tmp_path / str(call), task, settings(), **PLAN).train())
        assert same(expected, all_tensors(tmp_path / str(call), 8))


@pytest.mark.slow
@pytest.mark.parametrize("during", ["validate", "samples"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_at_any_call_of_validation_and_samples_costs_no_bit(
    tmp_path: Path, stop: TrainingStop, during: str, name: str
) -> None:
    expected = straight()
    for call in range(20):
        task = Watched(during=during, call=call, do=lambda: send(name))
        run, fresh = tmp_path / str(call), TrainingStop(Console(quiet=True), kept="").install()
        try:
            list(trainer(run, task, settings(), **PLAN).train(stop=fresh, save=fresh.save))
        except Terminated:
            made = trainer(run, Watched(), settings(), **PLAN)
            list(made.train(done=made.resume(newest_checkpoint(run).path)))
        assert same(expected, all_tensors(run, 8))


def test_a_caption_with_a_nul_is_no_prompt_of_the_sheet() -> None:
    with pytest.raises(ValueError, match="prompt"):
        GenerationRequest(prompt="a\0cat", prompt_syntax="plain")
    captions = [("a\0cat",), ("a dog",)]
    assert default_prompts(captions, (), unconditional=False) == ["a dog"]
    assert default_prompts(captions[:1], (), unconditional=False) == [""]


def test_a_request_that_cannot_be_made_costs_the_sheet_and_nothing_else(tmp_path: Path) -> None:
    def fail() -> None:
        GenerationRequest(prompt="a cat", steps=-1)

    task = Watched(during="samples", call=0, do=fail)
    watching = Watching(task, tmp_path, lambda: task.networks)
    (note,) = watching.report(4, validate=False, sample=True, give_way=lambda: False)
    assert isinstance(note, RunNote)
    assert note.text == "no samples at step 4: steps: should be greater than or equal to 1, not -1; the run goes on"


@pytest.mark.slow
def test_a_log_that_fails_at_any_line_costs_those_lines_only(
    tmp_path: Path, greys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_pixels(greys, tmp_path / "straight")
    lines = len((tmp_path / "straight" / "log.jsonl").read_text().splitlines())
    assert lines >= 5
    real = run_log.append_row
    for failing in (0, 1, lines // 2, lines - 1):
        calls = iter(range(10_000))

        def append(descriptor: int, values: Mapping[str, Any], failing: int = failing, calls: Any = calls) -> None:
            if next(calls) == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor, values)

        monkeypatch.setattr(run_log, "append_row", append)
        run = tmp_path / str(failing)
        events = train_pixels(greys, run)
        notes = [event.text for event in events if isinstance(event, RunNote)]
        assert sum("No space left on device; the run goes on" in note for note in notes) == 1, failing
        assert same_checkpoint(tmp_path / "straight" / "checkpoint-2", run / "checkpoint-2")
        log = read_log(run)
        if failing < lines - 1:
            assert any("1 lines of log.jsonl are missing" in entry["text"] for entry in log.of("note")), failing
            assert log.of("end")[-1]["failed"] == {"lines of log.jsonl": 1}


def test_a_tracker_and_a_sync_that_fail_are_told_once_in_a_row(tmp_path: Path) -> None:
    class Broken:
        def log(self, values: Mapping[str, Any], step: int) -> None:
            raise ConnectionError("no route to host")

    with RunLog.open(tmp_path) as log:
        reporting = Reporting(log, Broken(), trackers=True)  # type: ignore[arg-type]
        told = [note.text for step in (1, 2) for note in reporting.report(ValidationMetrics(step, {"loss": 1.0}))]
    assert told == ["reports to trackers: no route to host; the run goes on"]
    assert reporting.lost == {"reports to trackers": 2}
    assert len(read_log(tmp_path).of("validation")) == 2
    reporting.sync()  # of a closed file
    assert reporting.lost["syncs of log.jsonl"] == 1


@pytest.mark.slow
def test_an_image_that_vanishes_ends_the_run_with_a_checkpoint_and_a_sentence(tmp_path: Path, greys: Path) -> None:
    train_pixels(greys, tmp_path / "straight", max_train_steps=30)
    run, image = tmp_path / "run", greys / "3.png"
    content = image.read_bytes()

    def vanish(event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step == 4:
            image.unlink()

    sentence = r"no file .*3\.png.* \(after step (\d+), which is saved; --resume continues from there, with the same"
    with pytest.raises(NotFound, match=sentence) as caught:
        train_pixels(greys, run, max_train_steps=30, checkpointing_steps=1000, see=vanish)
    done = int(str(caught.value).split("after step ")[1].split(",")[0])
    assert done >= 4
    assert newest_checkpoint(run).step == done
    assert read_log(run).of("end")[-1]["step"] == done
    with pytest.raises(SdcliError, match="changed since the run started"):
        train_pixels(greys, run, max_train_steps=30, resume=True)
    image.write_bytes(content)
    train_pixels(greys, run, max_train_steps=30, resume=True)
    assert same_checkpoint(tmp_path / "straight" / "checkpoint-30", run / "checkpoint-30")


def test_samples_that_a_signal_prevented_are_made_by_the_resume(
    tmp_path: Path, greys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[Interrupted] = []

    def report(self: Watching, done: int, **options: Any) -> Iterator[Event]:
        stopped.append(Terminated("terminated after the current step"))
        return real(self, done, **options)

    real = Watching.report
    monkeypatch.setattr(Watching, "report", report)
    often = {"checkpointing_steps": 2, "sample_every_n_steps": 2, "max_train_steps": 4}
    with pytest.raises(Terminated, match="checkpoint at step 2"):
        train_pixels(greys, tmp_path / "run", stop=lambda: stopped[0] if stopped else None, **often)
    monkeypatch.setattr(Watching, "report", real)
    assert not (tmp_path / "run" / "samples").exists()
    train_pixels(greys, tmp_path / "run", resume=True, **often)
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == ["step-2.png", "step-4.png"]
    events = train_pixels(greys, tmp_path / "run", resume=True, **often)
    assert not any(isinstance(event, SamplesSaved) for event in events), "nothing is made twice"


def test_the_orders_of_a_run_in_one_process_are_its_own() -> None:
    from sdcli.training.orders import agree_on_failure

    class One:
        num_processes = 1

    assert agree_on_failure(One(), None) is None  # type: ignore[arg-type]
    sentence = agree_on_failure(One(), OSError(errno.ESTALE, "Stale file handle"))  # type: ignore[arg-type]
    assert str(sentence) == "the samples of the next step cannot be prepared: [Errno 116] Stale file handle"


# Processes


def command(data: Path, run: Path, *more: str) -> list[str]:
    line = [
        "train-unet",
        str(data),
        "-o",
        str(run),
        "--space",
        "pixel",
        "--from-scratch",
        str(data.parent / "micro.json"),
    ]
    line += ["--resolution", "8", "--train-batch-size", "2", "--device", "cpu", "--validation-split", "0.3", "-q"]
    return [*line, "--cache-dir", str(data.parent / "cache"), *more]


def started(line: list[str]) -> Forked:
    return Forked(line, cwd=REPOSITORY, session=True)


def wait_for_steps(run: Path, process: Forked, *, count: int = 3) -> None:
    deadline = time.monotonic() + 200
    while not (run / "log.jsonl").exists() or (run / "log.jsonl").read_text().count('"event": "train"') < count:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


ENDLESS = ("--max-train-steps", "1000000", "--checkpointing-steps", "1000000", "--sample-every-n-steps", "1000000")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 143), ("SIGUSR2", 143), ("SIGINT", 130)])
def test_the_whole_group_is_signalled_and_the_workers_live_until_the_save(
    tmp_path: Path, greys: Path, name: str, code: int
) -> None:
    run = tmp_path / "run"
    process = started(command(greys, run, *ENDLESS, "--dataloader-num-workers", "2"))
    wait_for_steps(run, process)
    os.killpg(process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 60
    while not any(run.glob("checkpoint-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first = newest_checkpoint(run).step
    os.killpg(process.pid, getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert newest_checkpoint(run).step > first
    assert "Traceback" not in said


@pytest.mark.slow
def test_signals_at_any_moment_cost_no_bit(tmp_path: Path, greys: Path) -> None:
    often = (
        "--max-train-steps",
        "60",
        "--checkpointing-steps",
        "7",
        "--sample-every-n-steps",
        "5",
        "--sample-steps",
        "20",
    )
    whole = run_forked(command(greys, tmp_path / "straight", *often), cwd=REPOSITORY, timeout=240)
    assert whole.returncode == 0, whole.stderr
    chance, run = random.Random(11), tmp_path / "run"
    codes = []
    for _ in range(30):
        resume = ("--resume",) if any(run.glob("checkpoint-*")) else ()
        process = started(command(greys, run, *often, *resume))
        name = chance.choice(["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGKILL"])
        before = (run / "log.jsonl").stat().st_size if (run / "log.jsonl").exists() else 0
        deadline, after = time.monotonic() + 120, chance.randrange(4000)
        while process.poll() is None and time.monotonic() < deadline:
            if (run / "log.jsonl").exists() and (run / "log.jsonl").stat().st_size > before + after:
                break
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(getattr(signal, name))
        said = process.communicate(timeout=120)[1]
        assert "Traceback" not in said
        codes.append(process.returncode)
        if process.returncode == 0:
            break
    assert codes[-1] == 0, codes
    assert len(codes) > 2
    assert same_checkpoint(tmp_path / "straight" / "checkpoint-60", run / "checkpoint-60")


def ranks_of(process: Forked) -> list[int]:
    """The processes of the ranks, by /proc, rank 0 first."""
    ranks = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == process.pid:
                words = dict(word.split("=", 1) for word in (entry / "environ").read_text().split("\0") if "=" in word)
                ranks[int(words["RANK"])] = int(entry.name)
        except (OSError, KeyError, ValueError):
            continue
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "rank 1"])
def test_all_processes_save_and_end_for_a_signal_to_one(tmp_path: Path, greys: Path, to: str) -> None:
    run = tmp_path / "run"
    process = started(command(greys, run, *ENDLESS, "--num-processes", "2"))
    wait_for_steps(run, process)
    process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 60
    while not any(run.glob("checkpoint-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first = newest_checkpoint(run).step
    if to == "launcher":
        process.send_signal(signal.SIGHUP)
    else:
        os.kill(ranks_of(process)[1], signal.SIGUSR2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert newest_checkpoint(run).step > first
    assert "Traceback" not in said


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_ends_all_with_a_checkpoint(tmp_path: Path, greys: Path) -> None:
    run = tmp_path / "run"
    process = started(command(greys, run, *ENDLESS, "--num-processes", "2"))
    wait_for_steps(run, process)
    (greys / "2.png").unlink()
    _, said = process.communicate(timeout=90)
    assert process.returncode == 3, said
    assert "2.png" in said
    assert newest_checkpoint(run).step >= 3
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_run_whose_readers_went_away_goes_on_to_its_end(tmp_path: Path, greys: Path) -> None:
    run = tmp_path / "run"
    process = started([*command(greys, run, "--max-train-steps", "6", "--checkpointing-steps", "2"), "-v"])
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) in {0, 141}
    assert newest_checkpoint(run).step == 6
