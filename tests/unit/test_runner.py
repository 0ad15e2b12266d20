"""The runner's promises, on in-memory ports: crash points, claim rows, conflicts, suspects, and random schedules.

`Fleet` carries published messages back to the stages by routing key; each `Worker` is one process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.codec import Entry, decode_carrier, encode_carrier, entry_of, state_from_bytes
from contracts.events import parse_event
from contracts.failures import InvalidWorkflowStateError, ModelNotApprovedError, StateStoreError
from contracts.lifecycle import Status
from contracts.messages import stage_message
from contracts.ports import Advance, DecisionRow, Delivery
from contracts.settlement import Ack, Pause, Settlement, letter_from
from contracts.state import EventState, begin
from contracts.tenancy import TenantScope
from contracts.topology import RUNGS, STAGES, Stage, rung_exchange, stage_queue
from tests.fakes import CountingIds, RecordingTelemetry, SteppingClock
from tests.fakes_state import CrashError, DefaultsRegistry, StateWorld, TwinBroker, TwinLedger, TwinStateStore
from workers.pipeline import stage_of
from workers.runner import RunnerPorts, StageRunner
from workers.settling import RetryPolicy
from workers.stages import StagePorts

ACME, GLOBEX = TenantScope("acme"), TenantScope("globex")
EVENT = "e" * 32
RETRIEVAL, SCORING, GUARDRAIL, DECISION = STAGES


def new_state(event_id: str = EVENT, tenant: TenantScope = ACME, **fields: Any) -> EventState:
    body: dict[str, Any] = {
        "id": f"order-{event_id[:4]}",
        "kind": "risk",
        "type": "payment.card",
        "occurred_at": "2026-01-31T11:59:00Z",
        "subject": {"type": "person", "id": "p-1"},
        "amount": {"value": "12.50", "currency": "EUR"},
    } | fields
    received = "2026-01-31T12:00:00Z"
    return begin(tenant, event_id, parse_event(body), received_at=received, source="http", correlation_id="c-1")


def entry_in(body: bytes) -> Entry:
    """The only entry of a carrier."""
    (entry,) = decode_carrier(body)
    assert isinstance(entry, Entry)
    return entry


@dataclass
class Fleet:
    """Servers that all workers share, and their clock."""

    world: StateWorld = field(default_factory=StateWorld)
    ledger: TwinLedger = field(default_factory=TwinLedger)
    broker: TwinBroker = field(default_factory=TwinBroker)
    registry: DefaultsRegistry = field(default_factory=DefaultsRegistry)
    clock: SteppingClock = field(default_factory=SteppingClock)
    ids: CountingIds = field(default_factory=CountingIds)
    telemetry: RecordingTelemetry = field(default_factory=RecordingTelemetry)

    def __post_init__(self) -> None:
        self._boots = 0
        self.worker = self.start()

    def start(self) -> Worker:
        """One more process; it beats until it is killed."""
        self._boots += 1
        return Worker(self, TwinStateStore(self.world, f"boot-{self._boots}"))

    def restart(self) -> None:
        """The process died and its successor runs."""
        self.worker.kill()
        self.worker = self.start()

    def kill_in_gather(self) -> None:
        """The worker will die in the next gather, with its lock in hand."""
        self.registry.errors.append(CrashError())
        self.worker.store.fuse = True

    def step(self, seconds: float) -> None:
        self.clock.step(seconds)
        self.world.now_ms += int(seconds * 1000)

    def submit(self, state: EventState) -> None:
        message = stage_message(entry_of(state, RETRIEVAL), 1)
        self.broker.queues[message.routing_key].append(message.body)

    def take(self, stage: Stage) -> bytes:
        return self.broker.queues[stage_queue(stage, 0)].popleft()

    def waiting(self) -> list[Stage]:
        return [stage for stage in STAGES if self.broker.queues[stage_queue(stage, 0)]]

    async def drain(self, upto: Stage = DECISION) -> None:
        """Deliver until the queues up to this stage are empty; what pauses is delivered again."""
        for _ in range(500):
            stages = [stage for stage in self.waiting() if STAGES.index(stage) <= STAGES.index(upto)]
            if not stages:
                return
            body = self.take(stages[0])
            self.step(1)
            if not isinstance(await self.worker.deliver(stages[0], body), Ack):
                self.broker.queues[stage_queue(stages[0], 0)].append(body)
        raise AssertionError("the queues do not run empty")

    async def to(self, stage: Stage, state: EventState | None = None) -> bytes:
        """Bring a new event up to a stage; the carrier that waits there."""
        self.submit(state or new_state())
        if stage is not RETRIEVAL:
            await self.drain(STAGES[STAGES.index(stage) - 1])
        return self.take(stage)

    def check_settled(self, scope: TenantScope = ACME, event_id: str = EVENT) -> EventState:
        """One decision, published as it stands in PostgreSQL, and its whole trail audited."""
        row = self.ledger.rows[scope, event_id]
        published = [m.body for m in self.broker.decisions() if m.message_id == f"{event_id}:1"]
        assert published
        assert set(published) == {row.decision}
        state = state_from_bytes(row.state)
        assert {record.record_id for record in state.records()} <= self.broker.audited()
        return state


@dataclass
class Worker:
    """One process that can run every stage."""

    fleet: Fleet
    store: TwinStateStore

    def __post_init__(self) -> None:
        self.fleet.world.beats.add(self.store.boot)

    def kill(self) -> None:
        self.store.dead = True
        self.fleet.world.beats.discard(self.store.boot)

    def runner(self, stage: Stage) -> StageRunner:
        f = self.fleet
        stage_ports = StagePorts(f.ledger, f.registry)
        ports = RunnerPorts(self.store, f.ledger, f.broker, stage_ports, f.telemetry, f.clock, f.ids)
        return StageRunner(stage, ports, partitions=1)

    async def deliver_all(self, stage: Stage, deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
        return await self.runner(stage).handle(deliveries)

    async def deliver(self, stage: Stage, body: bytes, *, redelivered: bool = False) -> Settlement:
        """One delivery; `redelivered` = another process had it before."""
        queue = stage_queue(stage, 0)
        (settled,) = await self.deliver_all(stage, [Delivery(queue, body, queue, redelivered=redelivered)])
        return settled


# --- the happy way --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "records"),
    [
        ({}, Status.APPROVED, 5),
        ({"kind": "compliance", "regulatory_flags": []}, Status.APPROVED, 5),
        ({"regulatory_flags": [{"code": "PEP", "level": "high"}]}, Status.AWAITING_APPROVAL, 6),
    ],
)
async def test_an_event_goes_through_all_stages_once(fields: dict[str, Any], status: Status, records: int) -> None:
    fleet = Fleet()
    fleet.submit(new_state(**fields))
    await fleet.drain()
    state = fleet.check_settled()
    assert state.status is status
    assert len(fleet.broker.decisions()) == 1
    assert fleet.broker.audited() == {record.record_id for record in state.records()}
    assert len(fleet.broker.audited()) == records
    assert fleet.ledger.approvals == ([(ACME, EVENT)] if status is Status.AWAITING_APPROVAL else [])
    assert not fleet.broker.parked() + fleet.broker.ladder() + fleet.broker.rejections()
    assert all(cell.lock is None for cell in fleet.world.cells.values())


async def test_carriers_of_many_tenants_and_kinds_settle_together() -> None:
    fleet = Fleet()
    states = [new_state(f"{n:032x}", ACME if n % 2 else GLOBEX, kind="risk") for n in range(20)]
    states += [new_state(f"{n:032x}", ACME, kind="compliance", regulatory_flags=[]) for n in range(20, 30)]
    carrier = encode_carrier([entry_of(state, RETRIEVAL) for state in states])
    assert await fleet.worker.deliver(RETRIEVAL, carrier) == Ack()
    await fleet.drain()
    for state in states:
        fleet.check_settled(state.scope, state.event_id)
    assert len(fleet.broker.decisions()) == 30


# --- crash points ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("arrives", [True, False])
async def test_unknown_confirms_pause_and_the_stored_output_goes_out_again(stage: Stage, arrives: bool) -> None:
    fleet = Fleet()
    body = await fleet.to(stage)
    before = len(fleet.broker.messages)
    fleet.broker.lost, fleet.broker.arrives = 3, arrives
    assert await fleet.worker.deliver(stage, body) == Pause("MessagingFailureError")
    stored = fleet.world.cells[ACME, EVENT].digest
    sent_before = fleet.broker.messages[before:]
    assert bool(sent_before) is arrives
    fleet.step(60)  # a recomputation would have another time in it, hence another digest
    fleet.restart()
    again = len(fleet.broker.messages)
    assert await fleet.worker.deliver(stage, body) == Ack()
    assert fleet.world.cells[ACME, EVENT].digest == stored
    sent = [m for m in fleet.broker.messages[again:] if ".audit." not in m.routing_key]
    assert len(sent) == 1
    if stage is DECISION:
        assert state_from_bytes(fleet.ledger.rows[ACME, EVENT].state).digest == stored
    else:
        assert entry_in(sent[0].body).header.digest == stored
    if arrives:
        assert sent[0].body in {m.body for m in sent_before}
    await fleet.drain()
    fleet.check_settled()


@pytest.mark.parametrize("stage", STAGES)
async def test_two_unknown_confirms_are_only_the_same_messages_again(stage: Stage) -> None:
    fleet = Fleet()
    body = await fleet.to(stage)
    before = len(fleet.broker.messages)
    fleet.broker.lost = 2
    assert await fleet.worker.deliver(stage, body) == Ack()
    sent = fleet.broker.messages[before:]
    assert len(sent) == 3 * len({m.message_id for m in sent})
    assert len({(m.message_id, m.body) for m in sent}) == len({m.message_id for m in sent})


@pytest.mark.parametrize("stage", [SCORING, GUARDRAIL, DECISION])
async def test_after_flushall_the_message_is_installed_and_the_whole_trail_is_owed(stage: Stage) -> None:
    fleet = Fleet()
    body = await fleet.to(stage)
    fleet.world.flush()
    fleet.broker.messages.clear()
    assert await fleet.worker.deliver(stage, body) == Ack()
    owed = {record.record_id for record in state_from_bytes(entry_in(body).body).records()}
    assert owed < fleet.broker.audited()
    await fleet.drain()
    fleet.check_settled()


async def test_the_whole_trail_is_still_owed_when_the_installer_dies() -> None:
    fleet = Fleet()
    body = await fleet.to(GUARDRAIL)
    fleet.world.flush()
    fleet.kill_in_gather()
    with pytest.raises(CrashError):
        await fleet.worker.deliver(GUARDRAIL, body)
    fleet.restart()
    fleet.broker.messages.clear()
    fleet.step(11)
    assert await fleet.worker.deliver(GUARDRAIL, body) == Ack()
    owed = {record.record_id for record in state_from_bytes(entry_in(body).body).records()}
    assert owed < fleet.broker.audited()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("wiped", [True, False])
async def test_a_late_message_of_a_decided_event_sends_the_decision_again(stage: Stage, wiped: bool) -> None:
    fleet = Fleet()
    body = await fleet.to(stage)
    fleet.broker.queues[stage_queue(stage, 0)].append(body)
    await fleet.drain()
    row = fleet.ledger.rows[ACME, EVENT]
    if wiped:
        fleet.world.flush()
    fleet.broker.messages.clear()
    fleet.step(60)
    assert await fleet.worker.deliver(stage, body) == Ack()
    fleet.check_settled()
    assert fleet.ledger.rows == {(ACME, EVENT): row}
    assert len(fleet.broker.messages) == 2  # the decision and one carrier of its trail: nothing was computed


async def test_the_loser_of_a_decision_publishes_the_winners_row() -> None:
    fleet = Fleet()
    body = await fleet.to(DECISION)
    other = Fleet(clock=SteppingClock(), ledger=fleet.ledger)
    other.clock.step(500)

    def other_wins() -> None:
        state = state_from_bytes(entry_in(body).body)
        winner = _decided(other, state)
        assert winner.decided is not None
        decision = winner.decided.decision
        fleet.ledger.rows[ACME, EVENT] = _row(winner, decision.model_dump_json().encode())

    fleet.ledger.before_decide = other_wins
    fleet.broker.messages.clear()
    assert await fleet.worker.deliver(DECISION, body) == Ack()
    state = fleet.check_settled()
    assert state.digest == fleet.world.cells[ACME, EVENT].digest
    assert fleet.broker.audited() == {record.record_id for record in state.records()}
    assert fleet.telemetry.count("riskfleet_decisions_total") == 0  # the winner counts it


async def test_a_decider_that_was_overtaken_after_its_lease_publishes_the_winners_row() -> None:
    fleet = Fleet()
    body = await fleet.to(DECISION)
    late, early = fleet.start(), fleet.start()
    settled: list[Settlement] = []

    def overtaken() -> None:
        fleet.step(11)
        coroutine = early.deliver(DECISION, body)
        with pytest.raises(StopIteration) as stop:
            coroutine.send(None)  # nothing in memory waits
        settled.append(stop.value.value)

    fleet.ledger.before_decide = overtaken
    assert await late.deliver(DECISION, body) == Ack()
    assert settled == [Ack()]
    fleet.check_settled()
    assert len({m.body for m in fleet.broker.decisions()}) == 1


def _decided(fleet: Fleet, state: EventState) -> EventState:
    step = stage_of(state.KIND, DECISION).decide(state, None, fleet.clock.now().isoformat(), lambda: 0.0)
    return state.transition(step.target, step.section, stage=DECISION, detail=step.detail)


def _row(state: EventState, decision: bytes) -> DecisionRow:
    assert state.decided is not None
    return DecisionRow(state.body_digest, 1, state.decided.decision.outcome, decision, state.to_bytes())


# --- bodies, failures, poison -----------------------------------------------------------------------------


async def test_a_changed_body_is_parked_and_answered_and_its_owner_is_not_touched() -> None:
    fleet = Fleet()
    owner, newcomer = new_state(), new_state(amount={"value": "99999.00", "currency": "EUR"})
    body = await fleet.to(RETRIEVAL, owner)
    assert await fleet.worker.deliver(RETRIEVAL, body) == Ack()
    changed = encode_carrier([entry_of(newcomer, RETRIEVAL)])
    assert await fleet.worker.deliver(RETRIEVAL, changed) == Ack()
    (parked,), (rejected,) = fleet.broker.parked(), fleet.broker.rejections()
    letter = letter_from(parked.headers, parked.body)
    assert (letter.problem, letter.scope, letter.event_id) == ("idempotency-conflict", ACME, EVENT)
    assert entry_in(parked.body).body == newcomer.to_bytes()
    assert rejected.routing_key == "acme.idempotency-conflict"
    assert orjson.loads(rejected.body)["event_id"] == EVENT
    assert letter.letter_id in fleet.broker.audited()
    await fleet.drain()
    assert fleet.check_settled().body_digest == owner.body_digest
    fleet.world.flush()
    assert await fleet.worker.deliver(RETRIEVAL, changed) == Ack()
    assert fleet.check_settled().body_digest == owner.body_digest


async def test_a_failing_entry_climbs_the_ladder_and_is_parked_with_a_record() -> None:
    fleet = Fleet()
    body, waits = await fleet.to(SCORING), RetryPolicy().waits_ms
    for attempt, wait in enumerate(waits, start=1):
        fleet.registry.errors += [ValueError("defect")]
        assert await fleet.worker.deliver(SCORING, body) == Ack()
        message = fleet.broker.ladder()[-1]
        assert message.exchange == rung_exchange(next(name for name, ttl in RUNGS if ttl >= wait))
        body = fleet.take(SCORING)
        assert entry_in(body).header.attempts == attempt
        assert not fleet.broker.parked()
        fleet.step(60)
    fleet.registry.errors += [ValueError("defect")]
    assert await fleet.worker.deliver(SCORING, body) == Ack()
    assert len(fleet.broker.ladder()) == len(waits)
    letter = letter_from(fleet.broker.parked()[0].headers, fleet.broker.parked()[0].body)
    assert (letter.attempts, letter.problem, letter.exception_class) == (5, "unexpected", "ValueError")
    assert letter.first_failed_at < letter.last_failed_at
    assert letter.letter_id in fleet.broker.audited()
    assert fleet.world.cells[ACME, EVENT].lock is None


async def test_a_failing_entry_harms_no_other_of_its_group() -> None:
    fleet = Fleet()
    states = [new_state(f"{n:032x}") for n in range(3)]
    bodies = [await fleet.to(SCORING, state) for state in states]
    fleet.registry.errors += [ValueError("together"), ModelNotApprovedError("first alone")]
    deliveries = [Delivery("q", body, "q") for body in bodies]
    # The registry's ModelNotApprovedError degrades its entry; a ValueError while alone would climb the ladder.
    assert await fleet.worker.deliver_all(SCORING, deliveries) == [Ack()] * 3
    await fleet.drain()
    for state in states:
        fleet.check_settled(ACME, state.event_id)
    assert not fleet.broker.parked()


async def test_an_undecodable_carrier_is_parked_whole() -> None:
    fleet = Fleet()
    assert await fleet.worker.deliver(SCORING, b"RFC1 nonsense") == Ack()
    (parked,) = fleet.broker.parked()
    letter = letter_from(parked.headers, parked.body)
    assert (parked.body, letter.scope) == (b"RFC1 nonsense", None)
    assert letter.letter_id in fleet.broker.audited()


async def test_a_bad_entry_is_parked_alone() -> None:
    fleet = Fleet()
    good = await fleet.to(RETRIEVAL)
    bad = entry_of(new_state("b" * 32), RETRIEVAL)
    carrier = encode_carrier([bad, entry_in(good)]).replace(b'"attempts":0', b'"attempts":"', 1)
    assert await fleet.worker.deliver(RETRIEVAL, carrier) == Ack()
    assert len(fleet.broker.parked()) == 1
    await fleet.drain()
    fleet.check_settled()


@pytest.mark.parametrize("change", [{"stage": "scoring"}, {"n": 1}, {"tenant": "Not A Tenant"}])
async def test_an_entry_that_does_not_fit_its_stage_is_parked_alone(change: dict[str, Any]) -> None:
    fleet = Fleet()
    good = await fleet.to(RETRIEVAL)
    carrier = encode_carrier([entry_of(new_state("b" * 32), RETRIEVAL).evolve(**change), entry_in(good)])
    assert await fleet.worker.deliver(RETRIEVAL, carrier) == Ack()
    assert len(fleet.broker.parked()) == 1
    await fleet.drain()
    fleet.check_settled()


async def test_an_unreadable_body_is_parked_and_its_neighbour_settles() -> None:
    fleet = Fleet()
    good = await fleet.to(RETRIEVAL)
    bad = Entry(entry_of(new_state("b" * 32), RETRIEVAL).header, b"{}")
    assert await fleet.worker.deliver(RETRIEVAL, encode_carrier([bad, entry_in(good)])) == Ack()
    assert letter_from(fleet.broker.parked()[0].headers, b"").event_id == "b" * 32
    await fleet.drain()
    fleet.check_settled()


async def test_a_port_that_chokes_on_one_entry_does_not_hold_up_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """`handle` never raises for what an entry contains, wherever it is found out."""
    fleet = Fleet()
    good = await fleet.to(RETRIEVAL)
    bad = entry_of(new_state("b" * 32), RETRIEVAL)
    record = fleet.ledger.record_events

    async def choke(states: Sequence[EventState]) -> Any:
        if any(state.event_id == "b" * 32 for state in states):
            raise InvalidWorkflowStateError("this one cannot be written")
        return await record(states)

    monkeypatch.setattr(fleet.ledger, "record_events", choke)
    assert await fleet.worker.deliver(RETRIEVAL, encode_carrier([bad, entry_in(good)])) == Ack()
    (parked,) = fleet.broker.parked()
    assert letter_from(parked.headers, parked.body).event_id == "b" * 32
    await fleet.drain()
    fleet.check_settled()


# --- redelivery -------------------------------------------------------------------------------------------


async def test_a_redelivered_carrier_whose_holder_lives_is_worked_as_it_is() -> None:
    fleet = Fleet()
    body = await fleet.to(SCORING)
    holder = fleet.start()
    cell = fleet.world.cells[ACME, EVENT]
    cell.lock, cell.until, cell.holder = "f" * 32, fleet.world.now_ms, holder.store.boot
    assert await fleet.worker.deliver(SCORING, body, redelivered=True) == Ack()
    assert not fleet.telemetry.count("riskfleet_suspects_total")
    await fleet.drain()
    fleet.check_settled()


async def test_a_suspect_is_parked_undecoded_after_three_dead_holders() -> None:
    fleet = Fleet()
    body = await fleet.to(SCORING)

    async def dies(body: bytes) -> None:
        fleet.kill_in_gather()
        with pytest.raises(CrashError):
            await fleet.worker.deliver(SCORING, body, redelivered=entry_in(body).header.suspect)
        fleet.registry.errors.clear()
        fleet.worker = fleet.start()

    await dies(body)
    assert await fleet.worker.deliver(SCORING, body, redelivered=True) == Ack()
    suspect = fleet.take(SCORING)
    assert entry_in(suspect).header.suspect
    assert entry_in(suspect).body == entry_in(body).body
    for _ in range(3):
        fleet.step(11)  # the dead holder's lease has run out
        await dies(suspect)
    assert await fleet.worker.deliver(SCORING, suspect, redelivered=True) == Ack()
    (parked,) = fleet.broker.parked()
    letter = letter_from(parked.headers, parked.body)
    assert (letter.event_id, letter.problem) == (EVENT, "invalid-workflow-state")
    assert letter.letter_id in fleet.broker.audited()
    assert not fleet.world.alone


async def test_deaths_are_not_forgotten_while_a_suspect_waits_for_its_dead_holders_lease() -> None:
    """RabbitMQ redelivers at once, so the next process meets the lease of the dead one: that is no settlement."""
    fleet = Fleet()
    body = encode_carrier([entry_in(await fleet.to(SCORING)).evolve(suspect=True)])
    for _ in range(3):
        fleet.kill_in_gather()
        with pytest.raises(CrashError):
            await fleet.worker.deliver(SCORING, body)
        fleet.worker = fleet.start()
        assert await fleet.worker.deliver(SCORING, body, redelivered=True) == Ack()  # locked, or parked at last
        if fleet.broker.parked():
            break
        body = fleet.take(SCORING)
        fleet.step(15)
    assert len(fleet.broker.parked()) == 1


async def test_a_suspect_that_settles_is_forgotten() -> None:
    fleet = Fleet()
    body = encode_carrier([entry_in(await fleet.to(SCORING)).evolve(suspect=True)])
    assert await fleet.worker.deliver(SCORING, body) == Ack()
    assert not fleet.world.alone
    assert not entry_in(fleet.broker.to_stage(GUARDRAIL)[-1].body).header.suspect


# --- locks, twins, servers that fail ----------------------------------------------------------------------


async def test_an_entry_that_another_holds_waits_on_the_ladder_uncounted() -> None:
    fleet = Fleet()
    body = await fleet.to(SCORING)
    cell = fleet.world.cells[ACME, EVENT]
    cell.lock, cell.until, cell.holder = "f" * 32, fleet.world.now_ms + 7_000, "elsewhere"
    assert await fleet.worker.deliver(SCORING, body) == Ack()
    (message,) = fleet.broker.ladder()
    assert message.exchange == rung_exchange("15s")
    assert message.routing_key == stage_queue(SCORING, 0)
    assert entry_in(message.body) == entry_in(body)
    assert cell.lock == "f" * 32
    fleet.step(15)
    await fleet.drain()
    fleet.check_settled()


@pytest.mark.parametrize("stage", STAGES)
async def test_one_event_twice_in_a_group_settles_twice_and_decides_once(stage: Stage) -> None:
    fleet = Fleet()
    body = await fleet.to(stage)
    twice = encode_carrier([entry_in(body), entry_in(body)])
    group = [Delivery("q", body, "q"), Delivery("q", twice, "q")]
    assert await fleet.worker.deliver_all(stage, group) == [Ack(), Ack()]
    assert not fleet.broker.ladder()
    await fleet.drain()
    fleet.check_settled()
    assert len(fleet.ledger.rows) == 1


async def test_two_bodies_of_one_event_in_a_group_settle_each_as_its_own() -> None:
    fleet = Fleet()
    owner, newcomer = new_state(), new_state(amount={"value": "99999.00", "currency": "EUR"})
    carrier = encode_carrier([entry_of(owner, RETRIEVAL), entry_of(newcomer, RETRIEVAL)])
    assert await fleet.worker.deliver(RETRIEVAL, carrier) == Ack()
    assert [entry_in(m.body).body for m in fleet.broker.parked()] == [newcomer.to_bytes()]
    await fleet.drain()
    assert fleet.check_settled().body_digest == owner.body_digest


@pytest.mark.parametrize("stage", [RETRIEVAL, SCORING, GUARDRAIL])
@pytest.mark.parametrize("flushed", [True, False])
async def test_who_lost_the_lock_sends_only_what_is_stored(
    stage: Stage, flushed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paused beyond its lease, or across a FLUSHALL: its own version goes nowhere."""
    fleet = Fleet()
    body = await fleet.to(stage)
    late, early = fleet.start(), fleet.start()
    advance = late.store.advance
    overtaken: list[bool] = []

    async def pause_first(moves: Sequence[Advance]) -> Sequence[bool]:
        if not overtaken:
            overtaken.append(True)
            fleet.step(11)
            if flushed:
                fleet.world.flush()
            assert await early.deliver(stage, body) == Ack()
        return await advance(moves)

    monkeypatch.setattr(late.store, "advance", pause_first)
    fleet.broker.messages.clear()
    assert await late.deliver(stage, body) == Ack()
    assert fleet.telemetry.count("riskfleet_stale_writes_refused_total") == 1
    sent = {entry_in(m.body).header.digest for m in fleet.broker.to_stage(STAGES[STAGES.index(stage) + 1])}
    assert sent == {fleet.world.cells[ACME, EVENT].digest}
    await fleet.drain()
    fleet.check_settled()


async def test_a_sibling_goes_on_with_what_is_stored() -> None:
    fleet = Fleet()
    sibling = await fleet.to(SCORING)
    fleet.world.flush()
    fleet.step(30)
    body = await fleet.to(SCORING)
    assert entry_in(body).header.digest != entry_in(sibling).header.digest
    assert await fleet.worker.deliver(SCORING, sibling) == Ack()
    follower = state_from_bytes(entry_in(fleet.broker.to_stage(GUARDRAIL)[-1].body).body)
    assert follower.parent == entry_in(body).header.digest
    await fleet.drain()
    fleet.check_settled()


@pytest.mark.parametrize("stage", [RETRIEVAL, SCORING, GUARDRAIL])
async def test_a_failing_server_in_gather_pauses_and_gives_the_lock_back(stage: Stage) -> None:
    fleet = Fleet()
    body = await fleet.to(stage)
    before = len(fleet.broker.messages)
    fleet.registry.errors.append(StateStoreError())
    assert await fleet.worker.deliver(stage, body) == Pause("StateStoreError")
    assert len(fleet.broker.messages) == before
    assert fleet.world.cells[ACME, EVENT].lock is None
    assert await fleet.worker.deliver(stage, body) == Ack()
    await fleet.drain()
    fleet.check_settled()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("server", ["redis", "postgresql"])
async def test_a_server_that_is_down_pauses_and_counts_no_attempt(stage: Stage, server: str) -> None:
    fleet = Fleet()
    body = await fleet.to(stage)
    before = len(fleet.broker.messages)
    if server == "postgresql":
        fleet.world.flush()
    fleet.worker.store.down, fleet.ledger.down = server == "redis", server == "postgresql"
    for _ in range(10):
        assert isinstance(await fleet.worker.deliver(stage, body), Pause)
    assert len(fleet.broker.messages) == before
    fleet.worker.store.down = fleet.ledger.down = False
    assert await fleet.worker.deliver(stage, body) == Ack()
    await fleet.drain()
    fleet.check_settled()
    assert not fleet.broker.parked() + fleet.broker.ladder()


# --- random schedules ---------------------------------------------------------------------------------------

ACTIONS = ("deliver", "deliver", "deliver", "redeliver", "flush", "crash", "crash-in-gather", "lost", "unsent", "lease")


async def _run_schedule(actions: Sequence[tuple[str, int]]) -> None:
    fleet = Fleet()
    states = [new_state("a" * 32), new_state("b" * 32, GLOBEX, regulatory_flags=[{"code": "PEP", "level": "high"}])]
    for state in states:
        fleet.submit(state)
    delivered: list[tuple[Stage, bytes]] = []

    async def deliver(stage: Stage, body: bytes, *, redelivered: bool = False) -> None:
        fleet.step(1)
        delivered.append((stage, body))
        settled: Settlement | None = None
        try:
            settled = await fleet.worker.deliver(stage, body, redelivered=redelivered)
        except CrashError:
            fleet.restart()
        if not isinstance(settled, Ack):
            fleet.broker.queues[stage_queue(stage, 0)].append(body)

    for action, number in actions:
        waiting = fleet.waiting()
        fleet.broker.arrives = action == "lost"
        if action == "flush":
            fleet.world.flush()
        elif action == "lease":
            fleet.step(11)
        elif action == "redeliver" and delivered:
            await deliver(*delivered[number % len(delivered)], redelivered=number % 2 == 0)
        elif waiting:
            stage = waiting[number % len(waiting)]
            fleet.broker.crash = action == "crash"
            fleet.broker.lost = 3 if action in ("lost", "unsent") else 0
            if action == "crash-in-gather":
                fleet.kill_in_gather()
            await deliver(stage, fleet.take(stage))
            fleet.broker.crash, fleet.broker.lost = False, 0
            fleet.registry.errors.clear()
            fleet.worker.store.fuse = False
    fleet.broker.crash, fleet.broker.lost, fleet.broker.arrives = False, 0, True
    fleet.step(11)
    await fleet.drain()
    for state in states:
        fleet.check_settled(state.scope, state.event_id)
    assert set(fleet.ledger.rows) == {(state.scope, state.event_id) for state in states}
    assert fleet.ledger.approvals == [(GLOBEX, "b" * 32)]
    assert not fleet.broker.parked()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 31)), max_size=30))
def test_any_schedule_of_faults_ends_in_one_decision_each_with_its_trail(actions: list[tuple[str, int]]) -> None:
    asyncio.run(_run_schedule(actions))
