"""The reconciler in virtual time: nothing is sent again that may only be late, and all of what is lost is, slowly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import pytest

from contracts.codec import Entry, decode_carrier
from contracts.events import event_id_of, parse_event
from contracts.messages import next_probe, probe_message, probe_of
from contracts.ports import Confirm, Delivery, EventKey, Message
from contracts.state import EventState, begin
from contracts.tenancy import TenantScope
from contracts.topology import STAGES, Layouts, audit_queue, stage_queue
from gateway.intake import rfc3339
from governance.memory import MemoryAuditLog, MemoryDatabase
from resilience.reconciler import Reconciler, ReconcilerPolicy, Watch
from tests.fakes import RecordingPublisher, RecordingTelemetry, SteppingClock, event_body
from workers.sinks.audit import AuditSink

ACME = TenantScope("acme")
POLICY = ReconcilerPolicy()
PARTITIONS = 4


@dataclass
class Tables:
    """What PostgreSQL would say is missing."""

    lost: dict[EventKey, EventState] = field(default_factory=dict)
    trails: dict[EventKey, EventState] = field(default_factory=dict)
    through: dict[int, datetime] = field(default_factory=dict)

    async def undecided(self, since: datetime, before: datetime, limit: int) -> Sequence[EventState]:
        return _within(self.lost, since, before)[:limit]

    async def still_undecided(self, keys: Sequence[EventKey]) -> Sequence[EventState]:
        return [self.lost[key] for key in keys if key in self.lost]

    async def incomplete(self, since: datetime, before: datetime, limit: int) -> Sequence[EventState]:
        return _within(self.trails, since, before)[:limit]

    async def still_incomplete(self, keys: Sequence[EventKey]) -> Sequence[EventState]:
        return [self.trails[key] for key in keys if key in self.trails]

    async def probes(self) -> Mapping[int, datetime]:
        return dict(self.through)


def _within(rows: dict[EventKey, EventState], since: datetime, before: datetime) -> list[EventState]:
    return [state for state in rows.values() if since <= datetime.fromisoformat(state.received_at) < before]


@dataclass
class Parts:
    """A reconciler on fakes; `probes_pass`: whether a probe comes through at once."""

    tables: Tables = field(default_factory=Tables)
    publisher: RecordingPublisher = field(default_factory=RecordingPublisher)
    telemetry: RecordingTelemetry = field(default_factory=RecordingTelemetry)
    clock: SteppingClock = field(default_factory=SteppingClock)
    sent_at: list[float] = field(default_factory=list)
    probes_pass: bool = True

    def __post_init__(self) -> None:
        self.reconciler = self.made()

    def made(self) -> Reconciler:
        async def sleep(seconds: float) -> None:
            self.clock.step(seconds)

        return Reconciler(
            self.tables, self.publisher, self.telemetry, self.clock, Layouts.first(PARTITIONS), POLICY, sleep=sleep
        )

    def lose(self, name: str = "order-1", ago_s: float = 30, scope: TenantScope = ACME) -> EventKey:
        at = rfc3339(self.clock.now() - timedelta(seconds=ago_s))
        event = parse_event(json.loads(event_body(id=name)))
        state = begin(scope, event_id_of(scope, name), event, received_at=at, source="http", correlation_id="c")
        self.tables.lost[scope, state.event_id] = state
        return scope, state.event_id

    async def run(self, seconds: float) -> int:
        """Rounds for so many seconds; how many things were sent again."""
        end, sent = self.clock.elapsed + seconds, 0
        while self.clock.elapsed < end:
            sent += await self.reconciler.round()
            if self.probes_pass:
                for message in self.probes():
                    at = datetime.fromisoformat(message.headers["x-riskfleet-probe"])
                    self.tables.through[int(message.routing_key[-2:])] = at
            self.clock.step(POLICY.every_s)
        return sent

    def probes(self) -> list[Message]:
        return [message for message in self.publisher.messages if message.message_id.startswith("probe:")]

    def entries(self) -> list[Entry]:
        found = [decode_carrier(m.body) for m in self.publisher.messages if ".retrieval." in m.routing_key and m.body]
        return [entry for carrier in found for entry in carrier if isinstance(entry, Entry)]


async def test_while_nothing_is_missing_nothing_is_sent() -> None:
    parts = Parts()
    assert await parts.run(7_200) == 0
    assert parts.publisher.messages == []


async def test_an_event_is_sent_again_only_a_minute_after_a_probe_behind_it_has_come_through() -> None:
    parts = Parts()
    key = parts.lose()
    assert await parts.run(POLICY.settle_s) == 0
    assert len(parts.probes()) == 1
    assert await parts.run(2 * POLICY.every_s) == 1
    (entry,) = parts.entries()
    assert (entry.header.event, entry.header.stage, entry.header.n) == (key[1], "retrieval", 0)
    assert entry.body == parts.tables.lost[key].to_bytes()
    assert parts.telemetry.count("riskfleet_reconciled_total", what="event") == 1


async def test_without_its_probe_an_event_only_waits_however_long_the_queues_are() -> None:
    parts = Parts(probes_pass=False)
    parts.lose()
    assert await parts.run(3_600) == 0
    assert len(parts.probes()) > 10  # the probe itself may have been lost
    assert parts.entries() == []


async def test_a_probe_from_before_the_event_was_seen_proves_nothing() -> None:
    parts = Parts(probes_pass=False)
    parts.tables.through = dict.fromkeys(range(PARTITIONS), parts.clock.now() - timedelta(seconds=1))
    parts.lose()
    assert await parts.run(600) == 0


async def test_an_event_that_is_decided_meanwhile_is_left_alone() -> None:
    parts = Parts()
    key = parts.lose()
    assert await parts.run(POLICY.settle_s) == 0
    del parts.tables.lost[key]
    assert await parts.run(600) == 0
    assert parts.telemetry.count("riskfleet_reconciled_total") == 0


async def test_events_that_others_wait_behind_are_not_put_off_by_later_probes() -> None:
    """Each new event asks for another probe; the first that passed an event counts for it."""
    parts = Parts()
    parts.lose("order-0")
    sent = 0
    for number in range(1, 30):
        parts.lose(f"order-{number}")
        sent += await parts.run(POLICY.every_s)
        if sent:
            break
    assert sent
    assert parts.clock.elapsed <= POLICY.settle_s + 3 * POLICY.every_s


async def test_what_is_sent_again_and_lost_again_waits_for_another_probe() -> None:
    parts = Parts()
    parts.lose()
    assert await parts.run(POLICY.settle_s + 2 * POLICY.every_s) == 1
    assert await parts.run(POLICY.settle_s) == 0
    assert await parts.run(2 * POLICY.every_s) == 1
    assert len(parts.probes()) >= 2


async def test_no_more_than_fifty_a_second_are_sent_again() -> None:
    parts = Parts()
    for number in range(230):
        parts.lose(f"order-{number}")
    await parts.run(POLICY.settle_s)
    began = parts.clock.elapsed
    assert await parts.run(2 * POLICY.every_s) == 230
    assert len(parts.entries()) == 230
    assert parts.clock.elapsed - began >= 230 / POLICY.per_second


async def test_an_old_loss_is_found_in_its_turn() -> None:
    parts = Parts()
    parts.lose(ago_s=5 * 86_400)
    rounds = POLICY.past_s / POLICY.events_s
    assert await parts.run((rounds + 1) * POLICY.every_s + POLICY.settle_s) >= 1


async def test_a_trail_that_lacks_records_is_sent_to_the_audit_by_the_same_rule() -> None:
    parts = Parts()
    key = parts.lose()
    parts.tables.trails = {key: parts.tables.lost.pop(key)}
    assert await parts.run(POLICY.settle_s) == 0
    assert await parts.run(2 * POLICY.every_s) == 1
    (message,) = [m for m in parts.publisher.messages if ".audit." in m.routing_key]
    entries = [entry.header.digest for entry in decode_carrier(message.body) if isinstance(entry, Entry)]
    assert entries == [record.record_id for record in parts.tables.trails[key].records()]
    assert parts.telemetry.count("riskfleet_reconciled_total", what="trail") == 1


@pytest.mark.parametrize("answer", [Confirm.REFUSED, Confirm.UNKNOWN])
async def test_what_the_broker_does_not_take_is_still_due(answer: Confirm) -> None:
    parts = Parts()
    parts.lose()
    await parts.run(POLICY.settle_s + POLICY.every_s)
    parts.publisher.answers = [answer]
    assert await parts.reconciler.round() == 0
    assert parts.telemetry.count("riskfleet_reconciled_total") == 0
    parts.clock.step(POLICY.every_s)
    assert await parts.reconciler.round() == 1


async def test_a_second_reconciler_sends_the_same_bytes() -> None:
    parts = Parts()
    parts.lose()
    await parts.run(POLICY.settle_s + 2 * POLICY.every_s)
    parts.reconciler = parts.made()
    await parts.run(POLICY.settle_s + 2 * POLICY.every_s)
    first, second = parts.entries()
    assert first == second


def test_a_watch_counts_by_its_own_clock_alone() -> None:
    """A reader of probes whose clock is an hour off moves nothing."""
    now = datetime.fromisoformat("2026-01-31T12:00:00+00:00")
    watch = Watch(now)
    watch.look(now + timedelta(hours=1), now)
    assert not watch.due(now + timedelta(seconds=59), 60)
    assert watch.due(now + timedelta(seconds=60), 60)


async def test_a_probe_goes_through_every_queue_of_its_partition_and_is_noted_behind_the_audit() -> None:
    clock = SteppingClock()
    sent_at = clock.now().isoformat()
    message = probe_message(2, sent_at)
    for stage in STAGES:
        assert message.routing_key == stage_queue(stage, 2)
        delivery = Delivery(message.routing_key, message.body, message.routing_key, headers=message.headers)
        assert probe_of(delivery) == sent_at
        message = next_probe(stage, delivery, sent_at)
    assert message.routing_key == audit_queue(2)
    log, publisher = MemoryAuditLog(MemoryDatabase(clock)), RecordingPublisher()
    delivery = Delivery(message.routing_key, message.body, message.routing_key, headers=message.headers)
    await AuditSink(log, publisher, RecordingTelemetry(), clock).handle([delivery])
    assert log.probes == {2: clock.now()}
    assert publisher.messages == []
