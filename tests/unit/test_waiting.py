"""Waiting for a decision: what wakes it, what ends it, and that only the row of the right body is an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.failures import IdempotencyConflictError
from contracts.ports import DecisionRow
from contracts.tenancy import TenantScope
from gateway.waiting import Expected, Waiting, WaitPolicy, preferred_wait
from tests.fakes import InMemoryLedger
from tests.fakes_doors import HeldReplies, HeldTime, settle

ACME = TenantScope("acme")
EVENT = "0" * 31 + "1"
EXPECTED = Expected(ACME, EVENT, "digest")


def row_of(body_digest: str = "digest", revision: int = 1, outcome: str = "APPROVED") -> DecisionRow:
    document = {"event_id": EVENT, "tenant_id": "acme", "revision": revision, "outcome": outcome}
    return DecisionRow(body_digest, revision, outcome, orjson.dumps(document), b"")


@dataclass
class Parts:
    replies: HeldReplies = field(default_factory=HeldReplies)
    ledger: InMemoryLedger = field(default_factory=InMemoryLedger)
    time: HeldTime = field(default_factory=HeldTime)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    policy: WaitPolicy | None = None

    def __post_init__(self) -> None:
        self.waiting = Waiting(
            self.replies, self.ledger, self.time.clock, self.policy, stopping=self.stopping, pause=self.time.pause
        )

    def begin(
        self, seconds: float = 10, published: Callable[[], None] = lambda: None
    ) -> tuple[asyncio.Task[DecisionRow | None], asyncio.Event]:
        gone = asyncio.Event()

        async def work() -> DecisionRow | None:
            async with self.waiting.registered(EXPECTED, seconds) as wait:
                assert wait is not None
                published()
                return await wait.decision(gone.wait())

        return asyncio.ensure_future(work()), gone

    def decide(self, row: DecisionRow) -> None:
        self.ledger.rows[ACME, EVENT] = row


@pytest.fixture
def parts() -> Parts:
    return Parts()


async def test_a_copy_that_is_faster_than_the_publish_is_not_missed(parts: Parts) -> None:
    def published() -> None:
        parts.decide(row_of())
        parts.replies.arrive(EVENT, row_of().decision)

    task, _ = parts.begin(published=published)
    await settle()
    assert task.done()
    assert await task == row_of()
    assert parts.time.clock.elapsed == 0
    assert parts.waiting.open == 0


async def test_a_lost_copy_costs_a_second(parts: Parts) -> None:
    task, _ = parts.begin()
    await parts.time.step(0.5)
    parts.decide(row_of())
    await parts.time.step(0.4)
    assert not task.done()
    await parts.time.step(0.1)
    assert task.done()
    assert await task == row_of()


async def test_the_row_is_the_answer_when_a_person_was_faster_than_the_copy(parts: Parts) -> None:
    task, _ = parts.begin()
    await settle()
    parts.decide(row_of(revision=2, outcome="REJECTED"))
    parts.replies.arrive(EVENT, row_of().decision)
    await settle()
    assert await task == row_of(revision=2, outcome="REJECTED")


@pytest.mark.parametrize(
    "copy",
    [
        None,
        b"",
        b"[]",
        b"{}",
        b"not json",
        row_of().decision.replace(b"acme", b"evil"),
        row_of().decision.replace(EVENT.encode(), b"f" * 32),
    ],
)
async def test_what_is_no_copy_of_this_tenants_event_answers_nothing_and_ends_nothing(
    parts: Parts, copy: bytes | None
) -> None:
    task, _ = parts.begin()
    await settle()
    parts.decide(row_of())
    parts.replies.arrive(EVENT, copy)
    await settle()
    assert not task.done()  # not even a look
    await parts.time.step(1)
    assert await task == row_of()


async def test_a_reply_queue_that_fails_leaves_the_looks(parts: Parts) -> None:
    task, _ = parts.begin()
    await settle()
    parts.replies.waits[EVENT].set_exception(OSError("gone"))
    parts.decide(row_of())
    await parts.time.step(1)
    assert await task == row_of()


async def test_a_copy_without_its_row_is_no_answer(parts: Parts) -> None:
    task, _ = parts.begin(seconds=2)
    await settle()
    parts.replies.arrive(EVENT, row_of().decision)
    await parts.time.step(1)
    await parts.time.step(1)
    assert await task is None


async def test_at_the_deadline_there_is_one_last_look(parts: Parts) -> None:
    task, _ = parts.begin(seconds=1.5)
    await parts.time.step(1)
    parts.decide(row_of())
    parts.time.clock.step(0.5)
    parts.replies.arrive(EVENT, None)  # the port's own time-out, a moment before the pause ends
    await settle()
    assert task.done()
    assert await task == row_of()


async def test_without_a_decision_the_wait_ends_at_its_deadline(parts: Parts) -> None:
    task, _ = parts.begin(seconds=2)
    await parts.time.step(1)
    assert not task.done()
    await parts.time.step(1)
    assert task.done()
    assert await task is None


async def test_a_database_that_is_away_for_a_while_does_not_end_a_wait(parts: Parts) -> None:
    task, _ = parts.begin()
    parts.ledger.down = True
    await parts.time.step(1)
    assert not task.done()
    parts.ledger.down = False
    parts.decide(row_of())
    await parts.time.step(1)
    assert await task == row_of()


async def test_nobody_receives_the_decision_about_another_body(parts: Parts) -> None:
    task, _ = parts.begin()
    await settle()
    parts.decide(row_of(body_digest="another"))
    parts.replies.arrive(EVENT, row_of().decision)
    await settle()
    with pytest.raises(IdempotencyConflictError):
        await task


async def test_a_caller_that_goes_away_ends_its_wait(parts: Parts) -> None:
    task, gone = parts.begin()
    await settle()
    gone.set()
    await settle()
    assert task.done()
    assert await task is None
    assert parts.replies.waits[EVENT].cancelled()
    assert parts.waiting.open == 0


async def test_a_process_that_stops_ends_every_wait_and_begins_none(parts: Parts) -> None:
    task, _ = parts.begin()
    await settle()
    parts.stopping.set()
    await settle()
    assert task.done()
    assert await task is None
    async with parts.waiting.registered(EXPECTED, 10) as wait:
        assert wait is None


async def test_only_so_many_wait_at_once() -> None:
    parts = Parts(policy=WaitPolicy(max_waiters=2))
    tasks = [parts.begin()[0] for _ in range(2)]
    await settle()
    assert parts.waiting.open == 2
    async with parts.waiting.registered(EXPECTED, 10) as wait:
        assert wait is None
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert parts.waiting.open == 0
    async with parts.waiting.registered(EXPECTED, 10) as wait:
        assert wait is not None


async def test_nothing_that_a_wait_began_outlives_it(parts: Parts) -> None:
    before = asyncio.all_tasks()
    task, _ = parts.begin(seconds=1)
    await parts.time.step(1)
    await task
    await settle()
    assert asyncio.all_tasks() - before == set()


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ([], None),
        (["wait=10"], 10),
        (["WAIT = 10"], 10),
        (['wait="7"'], 7),
        (["respond-async, wait=5;x=1"], 5),
        (["respond-async", "wait=5"], 5),
        (["wait=31"], 30),
        (["wait=999999999"], 30),
        (["wait=0"], None),
        (["wait=5, wait=9"], 5),
        (["wait=x, wait=9"], None),  # the first one counts, and it cannot be read
        (["wait"], None),
        (["wait="], None),
        (["wait=-1"], None),
        (["wait=1.5"], None),
        (["wait=9999999999"], None),
        (["wait=٣"], None),
        (["waiting=5"], None),
        (['foo="a, wait=5"'], None),
        (['foo="a\\", wait=5"'], None),
        (['foo="never closed, wait=5'], None),
        ([",,;=,wait=4"], 4),
        (["x" * 2_000 + ",wait=4"], None),
    ],
)
def test_a_preference_is_read_as_rfc_7240_says(values: list[str], seconds: int | None) -> None:
    assert preferred_wait(values) == seconds


@given(st.lists(st.text('wait=0123456789",;\\ ', max_size=40), max_size=4))
def test_any_preference_is_a_number_of_seconds_or_nothing(values: list[str]) -> None:
    seconds = preferred_wait(values)
    assert seconds is None or 1 <= seconds <= 30
