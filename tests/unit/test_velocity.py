"""Velocity heals from the tables, and until it has, no event is decided on what is left of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from contracts.codec import state_from_bytes
from contracts.events import event_id_of, parse_event
from contracts.labels import Label, parse_label
from contracts.ports import Artifact
from contracts.state import Created, EventState, Pin, Validated, begin
from contracts.tenancy import TenantScope
from contracts.velocity import Mark, Observation, Sighting, VelocityPolicy, sighting_of, since_1900
from governance.memory import MemoryDatabase, MemoryLabelBook, MemoryLedger
from governance.memory.past import MemoryPast
from resilience.memory import CountingIds, MemoryFeatureStore, MemoryRedis, SteppingClock
from tests.fakes_state import DefaultsRegistry
from workers.stages import StagePorts, retrieval, scoring
from workers.velocity import AT_ONCE, HealingFeatures, LabelFeed

ACME, GLOBEX = TenantScope("acme"), TenantScope("globex")
AT = "2026-01-31T12:00:00+00:00"


class Parts:
    """A store, the tables that it caches, and both together."""

    def __init__(self) -> None:
        self.clock = SteppingClock()
        self.server, self.database = MemoryRedis(self.clock), MemoryDatabase(self.clock)
        self.store = MemoryFeatureStore(self.server, CountingIds())
        self.ledger, self.past = MemoryLedger(self.database), MemoryPast(self.database)
        self.healing = HealingFeatures(self.store, self.past)
        self.ports = StagePorts(self.ledger, DefaultsRegistry(), self.healing)

    async def accept(self, *states: EventState, ports: StagePorts | None = None) -> Sequence[Any]:
        """As retrieval does: the rows first, then the facts."""
        await self.ledger.record_events(states)
        return await retrieval.gather(states, ports or self.ports)

    async def samples(self, scope: TenantScope = ACME) -> Observation:
        (seen,) = await self.store.observe([sighting(state(999, scope))], record=False)
        return seen


def state(number: int, scope: TenantScope = ACME, **fields: Any) -> EventState:
    body = {
        "id": f"order-{number}",
        "kind": "risk",
        "type": "payment.card",
        "occurred_at": f"2026-01-31T11:{number // 60 % 60:02}:{number % 60:02}Z",
        "subject": {"type": "customer", "id": "c-1"},
        "counterparty": {"type": "terminal", "id": "t-1"},
        "amount": {"value": "12.50", "currency": "EUR"},
    }
    event = parse_event(body | fields)
    event_id = event_id_of(scope, f"order-{number}")
    return begin(scope, event_id, event, received_at=AT, source="http", correlation_id="c")


def sighting(one: EventState) -> Sighting:
    at = datetime(2026, 1, 31, 12, tzinfo=UTC)
    return sighting_of(one.scope, one.event_id, one.event, at, VelocityPolicy().attribute)


def label(number: int, kind: str = "chargeback", at: str = "2026-01-31T11:59:00Z") -> Label:
    return parse_label(ACME, {"event": f"order-{number}", "label": kind, "source": "bank", "effective_at": at}, AT)


async def test_facts_hold_the_features_and_when_they_were_observed() -> None:
    parts = Parts()
    first, second = await parts.accept(state(1), state(2))
    assert (first.velocity.sequence, second.velocity.sequence) == (1, 2)
    assert [row[0] for row in second.velocity.subject.windows] == [1] * 5
    assert second.velocity.subject.windows[0][:4] == (1, 1, 12.5, 12.5)
    step = retrieval.decide(state(2), second, AT, lambda: 0.0)
    assert isinstance(step.section, Created)
    assert step.detail["observed"] == f"{second.velocity.epoch}:2"


async def test_what_a_flush_forgot_is_read_back_before_anything_is_decided() -> None:
    parts = Parts()
    await parts.accept(*(state(n) for n in range(30)))
    before = await parts.samples()
    parts.server.flush()
    (facts,) = await parts.accept(state(30))
    assert facts.velocity.complete
    assert facts.velocity.epoch != before.epoch
    assert [row[0] for row in facts.velocity.subject.windows][1:] == [30] * 4
    after = await parts.samples()
    assert [s[:2] for s in after.subject][:30] == [s[:2] for s in before.subject]


async def test_a_history_that_is_not_rebuilt_yet_is_named_and_ends_with_the_rebuild() -> None:
    """As after a FLUSHALL of a tenant with many events. What reads no velocity goes on meanwhile."""
    parts = Parts()
    bare = replace(parts.ports, features=parts.store)
    (facts,) = await parts.accept(state(1), ports=bare)
    assert not facts.velocity.complete
    step = retrieval.decide(state(1), facts, AT, lambda: 0.0)
    assert str(step.detail["observed"]).endswith(":incomplete")
    assert isinstance(step.section, Created)
    assert step.section.unavailable == ()
    assert await parts.healing.rebuild(ACME)
    (whole,) = await parts.accept(state(2), ports=bare)
    assert whole.velocity.complete


async def test_the_loop_rebuilds_every_tenant_that_is_not_whole() -> None:
    parts = Parts()
    await parts.accept(state(1), state(2))
    parts.server.flush()
    looked = []

    async def sleep(seconds: float) -> None:
        looked.append(seconds)
        if len(looked) == 2:
            raise asyncio.CancelledError

    async def tenants() -> list[TenantScope]:
        return [ACME, GLOBEX]

    with pytest.raises(asyncio.CancelledError):
        await parts.healing.run(tenants, sleep)
    assert [mark.complete for mark in await parts.store.marks([ACME, GLOBEX])] == [True, True]


async def test_a_tenant_with_many_events_is_not_rebuilt_while_its_events_wait() -> None:
    parts = Parts()
    await parts.ledger.record_events([state(n) for n in range(AT_ONCE + 1)])
    (facts,) = await parts.accept(state(5))
    assert not facts.velocity.complete
    heard: list[int] = []
    assert await parts.healing.rebuild(ACME, heard.append)
    assert heard == [AT_ONCE, AT_ONCE + 1]
    (again,) = await parts.accept(state(5))
    assert again.velocity.complete


async def test_a_tenant_with_many_events_is_counted_once_and_not_for_every_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts, asked = Parts(), list[str]()
    await parts.ledger.record_events([state(n) for n in range(AT_ONCE + 1)])
    for name in ("count", "imported", "events", "labels"):
        real = getattr(MemoryPast, name)

        async def counted(*args: Any, name: str = name, real: Any = real, **named: Any) -> Any:
            asked.append(name)
            return await real(*args, **named)

        monkeypatch.setattr(MemoryPast, name, counted)
    for n in range(4):
        (facts,) = await parts.accept(state(n))
        assert not facts.velocity.complete
        parts.server.flush()
    assert asked == ["count"]


async def test_an_epoch_that_ended_meanwhile_is_not_called_complete() -> None:
    parts = Parts()
    await parts.accept(state(1))
    (mark,) = await parts.store.marks([ACME])
    parts.server.flush()
    assert not await parts.healing._rebuild(Mark(ACME, mark.epoch), lambda _: None)
    assert not (await parts.samples()).complete


async def test_a_lost_tail_of_writes_is_treated_as_a_lost_history() -> None:
    parts = Parts()
    parts.server = MemoryRedis(parts.clock, undo_s=10)
    parts.store = MemoryFeatureStore(parts.server, CountingIds())
    parts.ports = replace(parts.ports, features=HealingFeatures(parts.store, parts.past))
    await parts.accept(state(1))
    moment = parts.clock.now()
    parts.clock.step(1)
    await parts.accept(state(2))
    parts.server.forget_since(moment)
    assert not (await parts.samples()).complete
    (facts,) = await parts.accept(state(3))
    assert facts.velocity.complete
    assert facts.velocity.subject.windows[0][0] == 2


@pytest.mark.parametrize("early", [False, True])
async def test_labels_reach_the_histories_of_their_events_also_when_they_come_first(early: bool) -> None:
    parts = Parts()
    feed, book = LabelFeed(parts.store, parts.past), MemoryLabelBook(parts.database)
    labels = [label(1), label(1, "cleared", "2026-01-31T11:58:00Z"), label(2, "cleared")]
    if not early:
        await parts.accept(state(1), state(2))
    for _ in range(2):
        await book.record(labels)
        await feed.feed(labels)
    if early:
        await parts.accept(state(1), state(2))
    known = since_1900(datetime(2026, 1, 31, 11, 59, tzinfo=UTC))
    wanted = [(2, known), (1, known)]
    assert [s[5:7] for s in (await parts.samples()).subject] == wanted
    parts.server.flush()
    assert await parts.healing.rebuild(ACME)
    assert [s[5:7] for s in (await parts.samples()).subject] == wanted


async def test_tenants_are_healed_alone() -> None:
    parts = Parts()
    await parts.accept(state(1), state(1, GLOBEX))
    mine = await parts.samples(GLOBEX)
    assert [len(mine.subject), mine.complete] == [1, True]
    assert mine.subject[0][1].hex() == event_id_of(GLOBEX, "order-1")


async def test_a_model_names_velocity_and_has_no_score_without_a_whole_one() -> None:
    parts = Parts()
    factor = {
        "feature": "subject.count.10m",
        "bins": [{"below": 2, "points": 0}, {"points": 30, "code": "BUSY", "text": "Many events"}],
        "missing": {"points": 0},
    }
    pin = Pin(name="busy", version=1, digest="velocity-busy")
    model = Artifact("model", pin, {"type": "scorecard", "base": 10, "factors": [factor]})
    for complete, wanted in ((True, [10, 10, 40]), (False, [None] * 3)):
        ports = parts.ports if complete else replace(parts.ports, features=parts.store)
        if not complete:
            parts.server.flush()
        states = [state(n) for n in range(3)]
        scores: list[float | None] = []
        missing: set[str] = set()
        for one, facts in zip(states, await parts.accept(*states, ports=ports), strict=True):
            step = retrieval.decide(one, facts, AT, lambda: 0.0)
            moved = one.transition(step.target, step.section, stage="retrieval", detail=step.detail)
            assert state_from_bytes(moved.to_bytes()) == moved
            section = scoring.decide(moved, scoring.ScoringFacts(model, None), AT, lambda: 0.0).section
            assert isinstance(section, Validated)
            scores.append(section.score)
            missing.update(section.unavailable)
        assert scores == wanted
        assert missing == ({"policy"} if complete else {"velocity", "policy"})
