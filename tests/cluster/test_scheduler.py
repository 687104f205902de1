"""Who does which unit, with workers that only answer: any order of failures ends with one outcome for each item."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator

import pytest

from sdcli.cluster.run import run_units
from sdcli.cluster.scheduler import ATTEMPTS, STRIKES, UnitScheduler
from sdcli.cluster.units import (
    Attempt,
    FromWorker,
    ItemDone,
    ItemRow,
    Program,
    RunEvent,
    Trouble,
    Unit,
    UnitEnded,
    UnitFailed,
    WorkerDied,
    WorkerReady,
    WorkerUnusable,
)
from sdcli.errors import BadWeights, CannotWrite, Interrupted, NotFound, SdcliError, packed_error

PROGRAM = Program("nowhere:start", None, ".")
Answer = Callable[[int, Attempt], list[FromWorker]]


def units(count: int, *, size: int = 2, needs: str = "model") -> list[Unit]:
    return [Unit(n, tuple(range(n * size, n * size + size)), n, needs) for n in range(count)]


def done(worker: int, attempt: Attempt) -> list[FromWorker]:
    return [*(ItemRow(item, {}) for item in attempt.items if item not in attempt.done), UnitEnded()]


def failed(error: SdcliError) -> Answer:
    return lambda worker, attempt: [UnitEnded(packed_error(error))]


class Workers:
    """An engine whose workers answer at once; `answer` says what."""

    def __init__(self, workers: int, answer: Answer, *, unusable: dict[int, FromWorker] | None = None) -> None:
        self.seconds, self.workers = 0.0, workers
        self._answer, self._unusable = answer, unusable or {}
        self._messages: deque[tuple[int, FromWorker]] = deque()
        self.started: Counter[int] = Counter()
        self.attempts: list[tuple[int, Attempt]] = []
        self.cancelled: list[int] = []
        self.alive: set[int] = set()

    def start(self, number: int, program: Program) -> None:
        self.kill(number)
        self.alive.add(number)
        self.started[number] += 1
        self._messages.append((number, self._unusable.get(number, WorkerReady("node", number, 0.1))))

    def submit(self, number: int, attempt: Attempt) -> None:
        assert number in self.alive
        self.attempts.append((number, attempt))
        self._messages.extend((number, message) for message in self._answer(number, attempt))

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def kill(self, number: int) -> None:
        self.alive.discard(number)
        self._messages = deque(one for one in self._messages if one[0] != number)

    def poll(self, seconds: float) -> Iterator[tuple[int, FromWorker]]:
        if self._messages:
            number, message = self._messages.popleft()
            if isinstance(message, WorkerDied):
                self.kill(number)
            yield number, message


def run(engine: Workers, scheduler: UnitScheduler) -> list[RunEvent]:
    return list(run_units(engine, scheduler, PROGRAM, stop=lambda: None))


def items_done(events: list[RunEvent]) -> list[int]:
    return [event.item for event in events if isinstance(event, ItemDone)]


def items_failed(events: list[RunEvent]) -> list[int]:
    return [item for event in events if isinstance(event, UnitFailed) for item in event.items]


@pytest.mark.parametrize("seed", range(60))
def test_whatever_fails_each_item_has_exactly_one_outcome_and_no_unit_is_tried_too_often(seed: int) -> None:
    chance = random.Random(seed)
    poisoned = {n for n in range(20) if chance.random() < 0.2}

    def answer(worker: int, attempt: Attempt) -> list[FromWorker]:
        rows: list[FromWorker] = [ItemRow(item, {}) for item in attempt.items if item not in attempt.done]
        if attempt.payload in poisoned or chance.random() < 0.1:
            some = rows[: chance.randrange(len(rows) + 1)] if attempt.payload not in poisoned else []
            end = [
                WorkerDied("killed"),
                UnitEnded(packed_error(SdcliError("no"))),
                UnitEnded(packed_error(SdcliError("odd")), True),
            ]
            return [*some, chance.choice(end)]
        return [*rows, UnitEnded()]

    engine = Workers(chance.randrange(2, 6), answer)
    events = run(engine, UnitScheduler(units(20)))
    outcomes = Counter(items_done(events) + items_failed(events))
    assert outcomes == Counter(range(40))
    tries = Counter(attempt.payload for _, attempt in engine.attempts)
    assert max(tries.values()) <= ATTEMPTS
    assert set(items_failed(events)) >= {item for n in poisoned for item in (2 * n, 2 * n + 1)}
    assert all(tries[n] == ATTEMPTS for n in poisoned)


def test_a_unit_is_tried_again_on_another_worker_and_after_all_that_is_sound() -> None:
    def answer(worker: int, attempt: Attempt) -> list[FromWorker]:
        return [UnitEnded(packed_error(SdcliError("no")))] if attempt.payload == 0 else done(worker, attempt)

    engine = Workers(3, answer)
    events = run(engine, UnitScheduler(units(9)))
    tried = [worker for worker, attempt in engine.attempts if attempt.payload == 0]
    assert len(set(tried)) == len(tried) == ATTEMPTS
    assert [attempt.payload for _, attempt in engine.attempts][-2:] == [0, 0]
    assert items_failed(events) == [0, 1]
    (failure,) = (event for event in events if isinstance(event, UnitFailed))
    assert str(failure.error) == f"no (tried {ATTEMPTS} times)"


def test_the_only_worker_is_a_new_process_when_it_tries_a_unit_again() -> None:
    engine = Workers(1, failed(SdcliError("no")))
    run(engine, UnitScheduler(units(1)))
    assert engine.started[1] == ATTEMPTS


def test_rows_that_came_before_a_death_are_not_asked_for_again() -> None:
    def answer(worker: int, attempt: Attempt) -> list[FromWorker]:
        if attempt.number == 1:
            return [ItemRow(attempt.items[0], {}), WorkerDied("killed")]
        assert attempt.done == {attempt.items[0]}
        return done(worker, attempt)

    events = run(Workers(2, answer), UnitScheduler(units(4)))
    assert sorted(items_done(events)) == list(range(8))
    assert len([event for event in events if isinstance(event, Trouble)]) == 4


def test_a_worker_that_cannot_write_is_left_out_where_others_can() -> None:
    def answer(worker: int, attempt: Attempt) -> list[FromWorker]:
        return [UnitEnded(packed_error(CannotWrite("disk full")))] if worker == 2 else done(worker, attempt)

    engine = Workers(3, answer)
    events = run(engine, UnitScheduler(units(40)))
    assert sorted(items_done(events)) == list(range(80))
    assert [worker for worker, _ in engine.attempts].count(2) == STRIKES
    assert any("worker 2 is not used any more" in event.text for event in events if isinstance(event, Trouble))


def test_where_no_worker_can_write_the_run_ends_with_that() -> None:
    engine = Workers(3, failed(CannotWrite("disk full")))
    with pytest.raises(CannotWrite, match="disk full"):
        run(engine, UnitScheduler(units(40)))
    assert len(engine.attempts) < 10


@pytest.mark.parametrize("others", ["start", "cannot be used", "never start"])
def test_a_worker_that_cannot_write_waits_for_those_that_have_not_started(
    others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcli.cluster.run.PATIENCE", 0.2)

    class Late(Workers):
        """Of which the second one starts, if ever, when the first has failed."""

        asked = False

        def start(self, number: int, program: Program) -> None:
            if number == 1 or self.attempts:
                super().start(number, program)

        def poll(self, seconds: float) -> Iterator[tuple[int, FromWorker]]:
            yield from super().poll(seconds)
            if self.attempts and not self._messages and not self.asked and others != "never start":
                self.asked = True
                self.start(2, PROGRAM)
            time.sleep(0.001)

    def answer(worker: int, attempt: Attempt) -> list[FromWorker]:
        return [UnitEnded(packed_error(CannotWrite("disk full")))] if worker == 1 else done(worker, attempt)

    reason = WorkerUnusable(packed_error(NotFound("node has no folder /data")))
    engine = Late(2, answer, unusable={2: reason} if others == "cannot be used" else None)
    if others == "start":
        assert sorted(items_done(run(engine, UnitScheduler(units(10))))) == list(range(20))
    else:
        with pytest.raises(CannotWrite, match="disk full"):
            run(engine, UnitScheduler(units(10)))
        assert len(engine.attempts) == 2


def test_what_all_units_need_and_nobody_can_load_ends_the_run() -> None:
    engine = Workers(3, failed(BadWeights("damaged")))
    with pytest.raises(BadWeights, match="damaged"):
        run(engine, UnitScheduler(units(40), one_need=True))


def test_what_some_units_need_and_nobody_can_load_is_tried_for_one_of_them_and_the_others_go_on() -> None:
    def answer(worker: int, attempt: Attempt) -> list[FromWorker]:
        bad = attempt.payload < 20
        return [UnitEnded(packed_error(NotFound("no model")))] if bad else done(worker, attempt)

    mixed = [*units(20, needs="bad"), *(Unit(n, (2 * n,), n, "good") for n in range(20, 40))]
    engine = Workers(1, answer)
    events = run(engine, UnitScheduler(mixed))
    assert sorted(items_failed(events)) == list(range(40))
    assert len(items_done(events)) == 20
    assert len(engine.attempts) == ATTEMPTS + 20


def test_nothing_that_succeeds_ends_the_run_instead_of_trying_a_million_units() -> None:
    engine = Workers(2, lambda worker, attempt: [WorkerDied("killed")])
    with pytest.raises(SdcliError, match=r"on every worker, at last: worker \d on node died: killed"):
        run(engine, UnitScheduler(units(1000)))
    assert len(engine.attempts) < 100


def test_workers_that_cannot_be_used_are_left_out_and_without_any_the_run_ends_with_the_reason() -> None:
    reason = WorkerUnusable(packed_error(NotFound("node has no folder /data")))
    events = run(Workers(2, done, unusable={1: reason}), UnitScheduler(units(3)))
    assert sorted(items_done(events)) == list(range(6))
    with pytest.raises(NotFound, match="/data"):
        run(Workers(2, done, unusable={1: reason, 2: reason}), UnitScheduler(units(3)))
    dying = Workers(1, done, unusable={1: WorkerDied("it cannot start")})
    with pytest.raises(SdcliError, match="it cannot start"):
        run(dying, UnitScheduler(units(3)))
    assert dying.started[1] == 3


def test_a_stop_cancels_what_runs_keeps_its_rows_and_is_raised() -> None:
    engine = Workers(2, lambda worker, attempt: [ItemRow(attempt.items[0], {}), UnitEnded()])
    reasons = iter([None, None, None, Interrupted("stop")])
    events: list[RunEvent] = []
    running = run_units(engine, UnitScheduler(units(50)), PROGRAM, stop=lambda: next(reasons, Interrupted("late")))
    with pytest.raises(Interrupted, match="stop"):
        events.extend(running)
    assert engine.cancelled
    assert set(engine.cancelled) == {worker for worker, _ in engine.attempts}
    assert len(items_done(events)) == len(engine.attempts)
    assert not items_failed(events)


def test_units_are_taken_from_their_source_only_as_they_are_needed() -> None:
    taken = 0

    def source() -> Iterator[Unit]:
        nonlocal taken
        for unit in units(1000):
            taken += 1
            yield unit

    for count, event in enumerate(run_units(Workers(2, done), UnitScheduler(source()), PROGRAM, stop=lambda: None)):
        if isinstance(event, ItemDone):
            assert taken <= event.unit.number + 4
        if count == 200:
            break
