"""The relay of the outbox: a committed message is sent, perhaps twice, never lost, and waits behind nobody for ever."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest

from contracts.failures import DatabaseError, MessagingFailureError
from contracts.ports import Confirm, Message, OutboxRow
from contracts.tenancy import TenantScope
from resilience.relay import OutboxRelay
from tests.fakes import RecordingTelemetry

ACME = TenantScope("acme")


def row(position: int, *, mandatory: bool = True) -> OutboxRow:
    message = Message("x", f"to-{position}", b"body", f"message-{position}", mandatory=mandatory)
    return OutboxRow(position, ACME if position % 2 else None, message)


class CrashError(BaseException):
    """The process dies here."""


@dataclass
class Table:
    """The outbox as its port shows it. `down` = PostgreSQL does not answer; `crash` = dies before it deletes."""

    rows: dict[int, OutboxRow] = field(default_factory=dict)
    down: bool = False
    crash: bool = False
    looks: int = 0
    read: int = 0

    def add(self, *rows: OutboxRow) -> None:
        self.rows |= {each.position: each for each in rows}

    async def waiting(self, limit: int) -> Sequence[OutboxRow]:
        self.looks += 1
        if self.down:
            raise DatabaseError
        found = [self.rows[position] for position in sorted(self.rows)][:limit]
        self.read += len(found)
        return found

    async def published(self, rows: Sequence[OutboxRow]) -> None:
        if self.crash:
            self.crash = False
            raise CrashError
        if self.down:
            raise DatabaseError
        for each in rows:
            self.rows.pop(each.position, None)


Answer = Callable[[Message], Confirm]


@dataclass
class Broker:
    """Keeps what arrived, in order; `answer` says what its sender hears, `arrives` whether it was true."""

    answer: Answer = lambda message: Confirm.CONFIRMED
    arrives: Callable[[Message], bool] | None = None
    together: Callable[[Sequence[Message]], bool] = lambda messages: False
    got: list[str] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)

    async def publish(self, messages: Sequence[Message]) -> Sequence[Confirm]:
        self.calls.append(len(messages))
        if self.together(messages):
            return [Confirm.UNKNOWN] * len(messages)
        answers = [self.answer(message) for message in messages]
        for message, answer in zip(messages, answers, strict=True):
            if self.arrives(message) if self.arrives else answer is Confirm.CONFIRMED:
                self.got.append(message.message_id)
        return answers


@dataclass
class Parts:
    """A relay on fakes, with waits of milliseconds."""

    table: Table = field(default_factory=Table)
    broker: Broker = field(default_factory=Broker)
    telemetry: RecordingTelemetry = field(default_factory=RecordingTelemetry)
    batch: int = 256
    retry_s: float = 30.0

    def __post_init__(self) -> None:
        self.relay = self.new()

    def new(self) -> OutboxRelay:
        """Another process's relay."""
        return OutboxRelay(
            self.table, self.broker, self.telemetry, batch=self.batch, idle_s=0.002, retry_s=self.retry_s
        )


def ids(*positions: int) -> list[str]:
    return [f"message-{position}" for position in positions]


async def until(what: Callable[[], bool], within_s: float = 5.0) -> None:
    """Wait on a condition with a deadline."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not what():
        assert asyncio.get_running_loop().time() < deadline, f"not within {within_s} s"
        await asyncio.sleep(0.001)


async def running(relay: OutboxRelay, meanwhile: Callable[[], Awaitable[None]]) -> None:
    """Run the relay while something else happens, then stop it."""
    stop = asyncio.Event()
    task = asyncio.create_task(relay.run(stop))
    try:
        await meanwhile()
        assert not task.done()
    finally:
        stop.set()
        await asyncio.wait_for(task, 5)


async def test_everything_that_waits_is_sent_in_order_and_removed() -> None:
    parts = Parts(batch=3)
    parts.table.add(*(row(position) for position in (5, 1, 4, 2, 3, 9, 7)))
    assert await parts.relay.drain_once() == 7
    assert parts.broker.got == ids(1, 2, 3, 4, 5, 7, 9)
    assert parts.broker.calls == [3, 3, 1]
    assert not parts.table.rows
    assert parts.telemetry.count("riskfleet_outbox_published_total", result="published") == 7
    assert await parts.relay.drain_once() == 0


async def test_a_message_that_nobody_binds_is_done_unless_it_must_be_bound() -> None:
    parts = Parts()
    parts.broker.answer = lambda message: Confirm.UNROUTABLE
    parts.table.add(row(1, mandatory=False), row(2))
    assert await parts.relay.drain_once() == 1
    assert list(parts.table.rows) == [2]


@pytest.mark.parametrize("answer", [Confirm.REFUSED, Confirm.UNROUTABLE, Confirm.UNKNOWN])
async def test_rows_that_the_broker_does_not_take_hold_up_nobody(answer: Confirm) -> None:
    """Even when they fill more than a whole batch."""
    parts = Parts(batch=4)
    bad = {f"message-{position}" for position in range(1, 10)} if answer is not Confirm.UNKNOWN else {"message-1"}
    parts.broker.answer = lambda message: answer if message.message_id in bad else Confirm.CONFIRMED
    parts.table.add(*(row(position) for position in range(1, 31)))
    await parts.relay.drain_once()
    assert {f"message-{position}" for position in parts.table.rows} == bad
    assert parts.broker.got == [each for each in ids(*range(1, 31)) if each not in bad]


async def test_a_row_that_was_passed_over_is_tried_again_later_and_not_all_the_time() -> None:
    parts = Parts(retry_s=0.02)
    parts.broker.answer = lambda message: Confirm.REFUSED
    parts.table.add(row(1))
    assert await parts.relay.drain_once() == 0
    assert await parts.relay.drain_once() == 0
    assert len(parts.broker.calls) == 1

    async def healed() -> None:
        await until(lambda: len(parts.broker.calls) >= 3)
        parts.broker.answer = lambda message: Confirm.CONFIRMED
        await until(lambda: not parts.table.rows)

    await running(parts.relay, healed)
    assert parts.broker.got == ids(1)


async def test_a_stuck_row_is_spoken_of_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    parts = Parts(retry_s=0.001)
    parts.broker.answer = lambda message: Confirm.REFUSED
    parts.table.add(row(1))

    async def tried_often() -> None:
        await until(lambda: len(parts.broker.calls) >= 4)

    await running(parts.relay, tried_often)
    out = capsys.readouterr()
    assert (out.out + out.err).count("outbox.passed_over") == 1


async def test_one_row_that_closes_the_channel_on_all_in_flight_is_found_and_passed_over() -> None:
    parts = Parts(batch=16)
    parts.broker.together = lambda messages: any(message.message_id == "message-6" for message in messages)
    parts.table.add(*(row(position) for position in range(1, 31)))

    async def others_sent() -> None:
        await until(lambda: len(parts.table.rows) == 1)

    await running(parts.relay, others_sent)
    assert list(parts.table.rows) == [6]
    assert sorted(parts.broker.got) == sorted(each for each in ids(*range(1, 31)) if each != "message-6")


async def test_a_row_that_was_passed_over_comes_by_itself_when_its_time_is_up() -> None:
    """It may be the one that closes the channel on whatever is in flight beside it."""
    parts = Parts(retry_s=0.001)
    parts.broker.together = lambda messages: any(message.message_id == "message-6" for message in messages)
    parts.table.add(row(6))
    with pytest.raises(MessagingFailureError):
        await parts.relay.drain_once()
    await asyncio.sleep(0.01)  # its time is up
    parts.table.add(row(7), row(8), row(9))
    with pytest.raises(MessagingFailureError):
        await parts.relay.drain_once()
    assert parts.broker.got == ids(7, 8, 9)


@pytest.mark.parametrize("arrived", [True, False])
async def test_lost_confirms_lose_no_message(arrived: bool) -> None:
    parts = Parts(retry_s=0.001)
    lost = {"message-2": 2, "message-5": 1}

    def answer(message: Message) -> Confirm:
        lost[message.message_id] = lost.get(message.message_id, 0) - 1
        return Confirm.UNKNOWN if lost[message.message_id] >= 0 else Confirm.CONFIRMED

    parts.broker.answer = answer
    parts.broker.arrives = lambda message: arrived or lost[message.message_id] < 0
    parts.table.add(*(row(position) for position in range(1, 8)))

    async def sent() -> None:
        await until(lambda: not parts.table.rows)

    await running(parts.relay, sent)
    assert set(parts.broker.got) == set(ids(*range(1, 8)))
    assert (len(parts.broker.got) > 7) is arrived  # sent twice is allowed


async def test_a_crash_between_publish_and_delete_sends_twice_and_loses_nothing() -> None:
    parts = Parts(table=Table(crash=True))
    parts.table.add(row(1), row(2))
    with pytest.raises(CrashError):
        await parts.relay.drain_once()
    assert await parts.new().drain_once() == 2
    assert parts.broker.got == ids(1, 2, 1, 2)


async def test_a_broker_that_answers_for_nothing_keeps_every_row() -> None:
    parts = Parts(broker=Broker(answer=lambda message: Confirm.UNKNOWN), retry_s=0.001)
    parts.table.add(row(1), row(2), row(3))
    with pytest.raises(MessagingFailureError):
        await parts.relay.drain_once()
    assert len(parts.table.rows) == 3

    async def comes_back() -> None:
        await until(lambda: len(parts.broker.calls) >= 4)
        parts.broker.answer = lambda message: Confirm.CONFIRMED
        await until(lambda: not parts.table.rows)

    await running(parts.relay, comes_back)
    assert set(parts.broker.got) == set(ids(1, 2, 3))


async def test_a_database_that_does_not_answer_is_asked_ever_more_slowly_and_ends_nothing() -> None:
    parts = Parts(table=Table(down=True))
    looked: list[int] = []

    async def comes_back() -> None:
        await until(lambda: parts.table.looks >= 4)  # waits of 4, 8, 16 … ms
        before = parts.table.looks
        await asyncio.sleep(0.04)
        looked.append(parts.table.looks - before)
        parts.table.down = False
        parts.table.add(row(1))
        parts.relay.wake()
        await until(lambda: not parts.table.rows)

    await running(parts.relay, comes_back)
    assert looked[0] <= 2  # at the idle pace it would have been about twenty


async def test_waking_it_makes_it_look_at_once() -> None:
    parts = Parts()
    relay = OutboxRelay(parts.table, parts.broker, parts.telemetry, idle_s=3600)

    async def committed() -> None:
        await until(lambda: parts.table.looks == 1)
        parts.table.add(row(1))
        relay.wake()
        await until(lambda: not parts.table.rows, 2)

    await running(relay, committed)


async def test_it_stops_at_once_and_between_two_batches() -> None:
    parts = Parts(batch=1)
    stop = asyncio.Event()

    def answer(message: Message) -> Confirm:
        stop.set()
        return Confirm.CONFIRMED

    parts.broker.answer = answer
    parts.table.add(row(1), row(2))
    await asyncio.wait_for(parts.relay.run(stop), 5)
    assert list(parts.table.rows) == [2]


async def test_many_stuck_rows_are_read_less_often() -> None:
    """To see past them they are read each time; that must not become a scan of all of them every few milliseconds."""
    parts = Parts(batch=2, broker=Broker(answer=lambda message: Confirm.REFUSED))
    parts.table.add(*(row(position) for position in range(200)))
    await parts.relay.drain_once()
    parts.table.looks = 0

    async def a_while() -> None:
        await asyncio.sleep(0.1)

    await running(parts.relay, a_while)
    assert parts.table.looks <= 2  # a wait is 101 times the idle one


@pytest.mark.parametrize("seed", range(20))
async def test_any_run_of_faults_ends_with_every_message_sent(seed: int) -> None:
    chance = random.Random(seed)
    parts = Parts(batch=4, retry_s=0.001)
    moods = [*([Confirm.CONFIRMED] * 3), Confirm.UNKNOWN, Confirm.REFUSED, Confirm.UNROUTABLE]
    parts.broker.answer = lambda message: chance.choice(moods)
    committed: list[str] = []

    async def life() -> None:
        for position in chance.sample(range(60), 60):  # transactions do not commit in the order of their positions
            parts.table.add(row(position))
            committed.append(f"message-{position}")
            parts.table.crash = False
            parts.table.down = chance.random() < 0.1
            await asyncio.sleep(0)
            if chance.random() < 0.3:
                parts.relay.wake()
        parts.table.down = False
        parts.broker.answer = lambda message: Confirm.CONFIRMED
        await until(lambda: not parts.table.rows, 10)

    await running(parts.relay, life)
    assert set(parts.broker.got) == set(committed)
