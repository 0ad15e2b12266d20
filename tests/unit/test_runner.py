"""The runner's promises, on in-memory ports: crash points, claim rows, conflicts, suspects, and random schedules.

`Fleet` carries published messages back to the stages by routing key; each `Worker` is one process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.codec import Entry, decode_carrier, encode_carrier, entry_of, state_from_bytes
from contracts.events import parse_event
from contracts.failures import InvalidWorkflowStateError, ModelNotApprovedError, StateStoreError
from contracts.lifecycle import Status
from contracts.messages import probe_message, probe_of, stage_message, undelivered
from contracts.ports import Advance, Confirm, DecisionRow, Delivery, Message
from contracts.settlement import Ack, Pause, Settlement, letter_from
from contracts.state import EventState, begin
from contracts.tenancy import TenantScope
from contracts.topology import (
    DECISIONS,
    DELIVERY_QUEUE,
    REJECTED,
    RUNGS,
    STAGES,
    Layouts,
    Stage,
    delivery_rung,
    reply_queue,
    rung_exchange,
    stage_queue,
)
from resilience.memory.state_store import Suspect
from tests.fakes import CountingIds, RecordingTelemetry, SteppingClock
from tests.fakes_state import CrashError, DefaultsRegistry, StateWorld, TwinBroker, TwinLedger, TwinStateStore
from workers.pipeline import stage_of
from workers.runner import RunnerPorts, StageRunner
from workers.settling import RetryPolicy
from workers.sinks.delivery import DeliverySink
from workers.stages import StagePorts
from workers.stages.decision import DecisionFacts

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
    layouts: Layouts = field(default_factory=lambda: Layouts.first(1))

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
        message = stage_message(entry_of(state, RETRIEVAL), Layouts.first(1))
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
        return StageRunner(stage, ports, f.layouts)

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
    assert fleet.telemetry.count("riskfleet_decision_conflicts_total") == 1


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
    step = stage_of(state.KIND, DECISION).decide(state, DecisionFacts(), fleet.clock.now().isoformat(), lambda: 0.0)
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


async def backlog(fleet: Fleet) -> list[int]:
    return [one.events for one in await fleet.worker.store.backlog([ACME], fleet.clock.now())]


async def test_an_event_is_in_the_backlog_of_its_stage_until_it_is_decided() -> None:
    fleet = Fleet()
    seen = []
    for stage in STAGES:
        if stage is RETRIEVAL:
            fleet.submit(new_state())
        await fleet.worker.deliver(stage, fleet.take(stage))
        seen.append(await backlog(fleet))
    assert seen == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


async def test_what_is_parked_leaves_the_backlog_and_its_replay_brings_it_back() -> None:
    fleet = Fleet()
    body = await fleet.to(SCORING)
    (last,) = [entry_in(body).evolve(attempts=len(RetryPolicy().waits_ms))]
    fleet.registry.errors += [ValueError("defect")]
    assert await fleet.worker.deliver(SCORING, encode_carrier([last])) == Ack()
    assert fleet.broker.parked()
    assert await backlog(fleet) == [0, 0, 0, 0]
    assert await fleet.worker.deliver(SCORING, body) == Ack()  # as its dead letter holds it
    assert await backlog(fleet) == [0, 0, 1, 0]
    await fleet.drain()
    fleet.check_settled()


async def test_a_parked_newcomer_leaves_and_the_owner_of_its_identity_stays() -> None:
    fleet = Fleet()
    owner, newcomer = new_state(), new_state(amount={"value": "99999.00", "currency": "EUR"})
    assert await fleet.worker.deliver(RETRIEVAL, await fleet.to(RETRIEVAL, owner)) == Ack()
    assert await fleet.worker.deliver(RETRIEVAL, encode_carrier([entry_of(newcomer, RETRIEVAL)])) == Ack()
    assert await backlog(fleet) == [0, 1, 0, 0]
    fleet.world.flush()
    await fleet.worker.store.reserve([entry_of(newcomer, RETRIEVAL)])  # Redis forgot whose identity it is
    assert await backlog(fleet) == [1, 0, 0, 0]
    assert await fleet.worker.deliver(RETRIEVAL, encode_carrier([entry_of(newcomer, RETRIEVAL)])) == Ack()
    assert await backlog(fleet) == [0, 0, 0, 0]


async def test_a_decided_event_that_a_forgetful_door_took_again_leaves_the_backlog() -> None:
    fleet = Fleet()
    body = await fleet.to(RETRIEVAL)
    assert await fleet.worker.deliver(RETRIEVAL, body) == Ack()
    await fleet.drain()
    fleet.world.flush()
    await fleet.worker.store.reserve([entry_in(body)])
    assert await backlog(fleet) == [1, 0, 0, 0]
    assert await fleet.worker.deliver(RETRIEVAL, body) == Ack()
    assert await backlog(fleet) == [0, 0, 0, 0]


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


async def test_what_only_waited_in_a_dead_process_travels_on_together_but_not_for_ever() -> None:
    fleet = Fleet()
    states = [new_state(f"{number:032x}") for number in range(8)]
    body = encode_carrier([entry_of(state, RETRIEVAL) for state in states])
    queue = stage_queue(RETRIEVAL, 0)
    back = Delivery(queue, body, queue, headers={"x-delivery-count": 2}, redelivered=True)
    assert await fleet.worker.deliver_all(RETRIEVAL, [back]) == [Ack()]
    assert len(decode_carrier(fleet.take(SCORING))) == 8
    assert not fleet.waiting()

    fleet = Fleet()
    often = replace(back, headers={"x-delivery-count": 3})
    assert await fleet.worker.deliver_all(RETRIEVAL, [often]) == [Ack()]
    alone = [entry_in(fleet.take(RETRIEVAL)) for _ in states]
    assert all(entry.header.suspect for entry in alone)
    assert not fleet.waiting()


async def test_what_is_ready_together_travels_in_one_carrier_per_partition() -> None:
    fleet = Fleet()
    tenants = [TenantScope(f"tenant-{number}") for number in range(5)]
    states = [new_state(f"{number:032x}", tenant) for number in range(20) for tenant in tenants]
    body = encode_carrier([entry_of(state, RETRIEVAL) for state in states[:64]])
    rest = encode_carrier([entry_of(state, RETRIEVAL) for state in states[64:]])
    queue = stage_queue(RETRIEVAL, 0)
    assert await fleet.worker.deliver_all(RETRIEVAL, [Delivery(queue, body, queue), Delivery(queue, rest, queue)])
    messages = fleet.broker.to_stage(SCORING)
    assert [message.headers["x-riskfleet-events"] for message in messages] == [64, 36]
    assert [len(decode_carrier(message.body)) for message in messages] == [64, 36]


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


async def test_a_decision_is_sent_however_often_its_senders_died() -> None:
    """It stands in PostgreSQL: parked, its event would be decided and a dead letter, and nobody would hear of it."""
    fleet = Fleet()
    body = encode_carrier([entry_in(await fleet.to(DECISION)).evolve(suspect=True)])
    assert await fleet.worker.deliver(DECISION, body) == Ack()
    sent, audited = len(fleet.broker.decisions()), set(fleet.broker.audited())
    fleet.world.alone[ACME, EVENT, DECISION] = Suspect("gone", 3)
    assert await fleet.worker.deliver(DECISION, body, redelivered=True) == Ack()
    assert not fleet.broker.parked()
    assert len(fleet.broker.decisions()) == sent + 1
    assert set(fleet.broker.audited()) >= audited
    assert not fleet.world.alone


async def test_a_decision_that_cannot_be_read_is_parked_after_three_dead_holders() -> None:
    fleet = Fleet()
    body = encode_carrier([entry_in(await fleet.to(DECISION)).evolve(suspect=True)])
    assert await fleet.worker.deliver(DECISION, body) == Ack()
    fleet.ledger.rows[ACME, EVENT] = replace(fleet.ledger.rows[ACME, EVENT], state=b"another release's")
    fleet.world.alone[ACME, EVENT, DECISION] = Suspect("gone", 3)
    assert await fleet.worker.deliver(DECISION, body, redelivered=True) == Ack()
    assert len(fleet.broker.parked()) == 1
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


# --- upstream that does not take its decisions, callers that wait -----------------------------------------


def take_all(message: Message) -> Confirm | None:
    return None


def refuse_decisions(message: Message) -> Confirm | None:
    return Confirm.REFUSED if message.exchange == DECISIONS else None


@dataclass
class PickyBroker(TwinBroker):
    """Answers some messages otherwise than "confirmed"; what it does not confirm it does not have."""

    picky: Callable[[Message], Confirm | None] = take_all
    asked: list[Message] = field(default_factory=list)

    async def publish(self, messages: Sequence[Message]) -> Sequence[Confirm]:
        self.asked += messages
        answers = [self.picky(message) for message in messages]
        confirms = iter(
            await super().publish([m for m, answer in zip(messages, answers, strict=True) if answer is None])
        )
        return [answer or next(confirms) for answer in answers]

    def delivery_rounds(self) -> list[Message]:
        return [message for message in self.messages if message.routing_key.startswith(f"{DELIVERY_QUEUE}.")]


def picky_fleet(picky: Callable[[Message], Confirm | None]) -> tuple[Fleet, PickyBroker]:
    broker = PickyBroker(picky=picky)
    return Fleet(broker=broker), broker


@pytest.mark.parametrize(("answer", "tries"), [(Confirm.REFUSED, 1), (Confirm.UNKNOWN, 3)])
@pytest.mark.parametrize("late", [False, True])
async def test_a_decision_that_the_broker_does_not_take_holds_up_no_stage(
    answer: Confirm, tries: int, late: bool
) -> None:
    fleet, broker = picky_fleet(lambda message: answer if message.exchange == DECISIONS else None)
    body = await fleet.to(DECISION)
    if late:  # the same delivery again, decided already
        assert await fleet.worker.deliver(DECISION, body) == Ack()
        broker.messages.clear()
        broker.asked.clear()
    assert await fleet.worker.deliver(DECISION, body) == Ack()
    (sent,) = broker.delivery_rounds()
    assert sent.routing_key == delivery_rung(1_000)
    asked = [message for message in broker.asked if message.exchange == DECISIONS]
    assert len(asked) == tries
    assert undelivered(sent.headers, sent.body) == (asked[0], 1)
    row = fleet.ledger.rows[ACME, EVENT]
    assert sent.body == row.decision
    assert {record.record_id for record in state_from_bytes(row.state).records()} >= broker.audited()
    assert fleet.telemetry.count("riskfleet_decision_deliveries_total", result="again") == 1 + late


async def test_an_unroutable_decision_is_delivered_to_everybody_who_wants_it() -> None:
    fleet, broker = picky_fleet(lambda message: Confirm.UNROUTABLE if message.exchange == DECISIONS else None)
    body = await fleet.to(DECISION)
    assert await fleet.worker.deliver(DECISION, body) == Ack()
    assert not broker.delivery_rounds()


async def test_an_unroutable_entry_is_not_sent() -> None:
    fleet, _ = picky_fleet(lambda message: Confirm.UNROUTABLE if ".scoring." in message.routing_key else None)
    body = await fleet.to(RETRIEVAL)
    assert await fleet.worker.deliver(RETRIEVAL, body) == Pause("MessagingFailureError")


async def test_a_rejection_that_the_broker_refuses_holds_up_no_stage() -> None:
    fleet, broker = picky_fleet(lambda message: Confirm.REFUSED if message.exchange == REJECTED else None)
    await fleet.to(SCORING)
    newcomer = new_state(amount={"value": "99999.00", "currency": "EUR"})
    carrier = encode_carrier([entry_of(newcomer, RETRIEVAL)])
    assert await fleet.worker.deliver(RETRIEVAL, carrier) == Ack()
    (sent,) = broker.delivery_rounds()
    assert undelivered(sent.headers, sent.body)[0].routing_key == "acme.idempotency-conflict"


def _refusing_decisions(ladder: Confirm) -> Callable[[Message], Confirm | None]:
    def picky(message: Message) -> Confirm | None:
        if message.exchange == DECISIONS:
            return Confirm.REFUSED
        return ladder if message.routing_key == delivery_rung(1_000) else None

    return picky


async def test_a_delivery_ladder_that_is_full_holds_up_no_stage() -> None:
    """A tenant whose queue refuses for a day fills the ladder: its decisions are rows, and the feed has them."""
    fleet, broker = picky_fleet(_refusing_decisions(Confirm.REFUSED))
    body = await fleet.to(DECISION)
    assert await fleet.worker.deliver(DECISION, body) == Ack()
    assert fleet.telemetry.count("riskfleet_decision_deliveries_total", result="left") == 1
    assert (ACME, EVENT) in fleet.ledger.rows
    assert not broker.delivery_rounds()


@pytest.mark.parametrize("ladder", [Confirm.UNKNOWN, Confirm.UNROUTABLE])
async def test_a_delivery_ladder_that_does_not_answer_pauses_the_stage(ladder: Confirm) -> None:
    picky = _refusing_decisions(ladder)

    fleet, broker = picky_fleet(picky)
    body = await fleet.to(DECISION)
    assert await fleet.worker.deliver(DECISION, body) == Pause("MessagingFailureError")
    broker.picky = take_all
    assert await fleet.worker.deliver(DECISION, body) == Ack()
    fleet.check_settled()


@pytest.mark.parametrize("unconfirmed", [".audit.", ""])
async def test_the_ladder_is_only_for_decisions_while_all_else_is_confirmed(unconfirmed: str) -> None:
    """A broker that confirms nothing is down, and no ladder helps; a record that is not confirmed is owed as ever."""

    def picky(message: Message) -> Confirm | None:
        owed = message.exchange == DECISIONS or unconfirmed in message.routing_key
        return Confirm.REFUSED if owed and ".retry." not in message.exchange else None

    fleet, broker = picky_fleet(take_all)
    body = await fleet.to(DECISION)
    broker.picky = picky
    assert await fleet.worker.deliver(DECISION, body) == Pause("MessagingFailureError")
    assert not broker.delivery_rounds()
    broker.picky = take_all
    assert await fleet.worker.deliver(DECISION, body) == Ack()
    fleet.check_settled()


def asking(state: EventState, reply_to: str, stage: Stage = RETRIEVAL) -> bytes:
    return encode_carrier([entry_of(state, stage, reply_to)])


def replies(fleet: Fleet, reply_to: str) -> list[Message]:
    return [m for m in fleet.broker.messages if m.exchange == "" and m.routing_key == reply_to]


HERE, THERE = reply_queue("here"), reply_queue("there")


async def test_a_waiting_caller_gets_one_transient_copy_of_the_decision() -> None:
    fleet = Fleet()
    assert await fleet.worker.deliver(RETRIEVAL, asking(new_state(), HERE)) == Ack()
    await fleet.drain()
    fleet.check_settled()
    (reply,) = replies(fleet, HERE)
    (decision,) = fleet.broker.decisions()
    assert (reply.body, reply.headers) == (decision.body, decision.headers)
    assert (reply.persistent, reply.mandatory, reply.confirm) == (False, False, False)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("wiped", [True, False])
async def test_the_caller_of_a_repeat_gets_its_copy_too(stage: Stage, wiped: bool) -> None:
    fleet = Fleet()
    body = await fleet.to(stage)
    fleet.broker.queues[stage_queue(stage, 0)].append(body)
    await fleet.drain()
    if wiped:
        fleet.world.flush()
    repeat = encode_carrier([entry_in(body).evolve(reply_to=THERE)])
    assert await fleet.worker.deliver(stage, repeat) == Ack()
    assert [reply.body for reply in replies(fleet, THERE)] == [fleet.ledger.rows[ACME, EVENT].decision]


@pytest.mark.parametrize("stage", [RETRIEVAL, SCORING, GUARDRAIL])
async def test_a_repeat_that_overtakes_nothing_still_carries_its_own_caller(stage: Stage) -> None:
    """The event is further on and undecided: what is stored goes out again, for the caller of this very entry."""
    fleet = Fleet()
    body = await fleet.to(stage)
    assert await fleet.worker.deliver(stage, encode_carrier([entry_in(body).evolve(reply_to=HERE)])) == Ack()
    assert await fleet.worker.deliver(stage, encode_carrier([entry_in(body).evolve(reply_to=THERE)])) == Ack()
    assert await fleet.worker.deliver(stage, body) == Ack()
    await fleet.drain()
    assert replies(fleet, HERE)
    assert len(replies(fleet, THERE)) == 1


@pytest.mark.parametrize("reply_to", ["risk.v1.parked.decision", "risk.v1.decision.p00", "amq.gen-1", ""])
async def test_only_a_gateways_own_queue_gets_copies(reply_to: str) -> None:
    fleet = Fleet()
    assert await fleet.worker.deliver(RETRIEVAL, asking(new_state(), reply_to)) == Ack()
    await fleet.drain()
    fleet.check_settled()
    assert not [message for message in fleet.broker.messages if message.exchange == ""]


async def test_nobody_gets_a_copy_of_the_decision_about_another_body() -> None:
    fleet = Fleet()
    fleet.submit(new_state())
    await fleet.drain()
    newcomer = new_state(amount={"value": "99999.00", "currency": "EUR"})
    for wiped in (False, True):
        if wiped:
            fleet.world.flush()
        assert await fleet.worker.deliver(RETRIEVAL, asking(newcomer, HERE)) == Ack()
    assert not replies(fleet, HERE)


@pytest.mark.parametrize("stage", [SCORING, GUARDRAIL, DECISION])
async def test_another_body_further_down_gets_neither_the_decision_nor_a_copy(stage: Stage) -> None:
    """Its owner decided while Redis forgot both: the row says whose decision it is."""
    fleet, elsewhere = Fleet(), Fleet()
    newcomer = await elsewhere.to(stage, new_state(amount={"value": "99999.00", "currency": "EUR"}))
    fleet.submit(new_state())
    await fleet.drain()
    fleet.world.flush()
    before = len(fleet.broker.decisions())
    asked = encode_carrier([entry_in(newcomer).evolve(reply_to=HERE)])
    assert await fleet.worker.deliver(stage, asked) == Ack()
    assert len(fleet.broker.parked()) == 1
    assert (len(fleet.broker.decisions()), replies(fleet, HERE)) == (before, [])


async def test_a_lost_copy_is_nothing() -> None:
    fleet, broker = picky_fleet(lambda message: Confirm.UNKNOWN if message.exchange == "" else None)
    assert await fleet.worker.deliver(RETRIEVAL, asking(new_state(), HERE)) == Ack()
    await fleet.drain()
    fleet.check_settled()
    assert len([message for message in broker.asked if message.exchange == ""]) == 1
    assert not broker.ladder()


async def test_a_copy_is_sent_once_however_often_its_wave_is() -> None:
    fleet, broker = picky_fleet(take_all)
    assert await fleet.worker.deliver(RETRIEVAL, asking(new_state(), HERE)) == Ack()
    await fleet.drain(GUARDRAIL)
    broker.lost = 2
    assert await fleet.worker.deliver(DECISION, fleet.take(DECISION)) == Ack()
    fleet.check_settled()
    assert len(fleet.broker.decisions()) == 3
    assert len(replies(fleet, HERE)) == 1


async def test_a_copy_does_not_stand_for_the_wave() -> None:
    """A copy is confirmed by nobody: with nothing else confirmed the stage pauses."""
    fleet, broker = picky_fleet(take_all)
    assert await fleet.worker.deliver(RETRIEVAL, asking(new_state(), HERE)) == Ack()
    await fleet.drain(GUARDRAIL)
    broker.picky = lambda message: Confirm.UNKNOWN if message.confirm else None
    assert await fleet.worker.deliver(DECISION, fleet.take(DECISION)) == Pause("MessagingFailureError")
    assert not broker.delivery_rounds()


async def test_a_trace_is_carried_onto_the_decision_and_its_repeats() -> None:
    fleet = Fleet()
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    body = await fleet.to(DECISION, replace(new_state(), traceparent=trace))
    for _ in range(2):
        assert await fleet.worker.deliver(DECISION, body) == Ack()
    assert [message.headers["traceparent"] for message in fleet.broker.decisions()] == [trace, trace]


async def test_a_correction_names_the_decision_that_it_supersedes() -> None:
    fleet = Fleet()
    fleet.submit(new_state())
    await fleet.drain()
    correction, undecided = new_state("c" * 32, corrects=EVENT), new_state("d" * 32, corrects="f" * 32)
    elsewhere = new_state("b" * 32, GLOBEX, corrects=EVENT)
    for state in (correction, undecided, elsewhere):
        fleet.submit(state)
    await fleet.drain()
    found = []
    for state in (correction, undecided, elsewhere):
        decided = fleet.check_settled(state.scope, state.event_id).decided
        assert decided is not None
        assert decided.decision.supersedes is not None
        found.append((decided.decision.supersedes.event_id, decided.decision.supersedes.revision))
    assert found == [(EVENT, 1), ("f" * 32, 0), (EVENT, 0)]  # another tenant's event is nobody's to correct


# --- random schedules ---------------------------------------------------------------------------------------

ACTIONS = (
    *("deliver", "deliver", "deliver", "redeliver", "flush", "crash", "crash-in-gather"),
    *("lost", "unsent", "lease", "refused"),
)


async def _run_schedule(actions: Sequence[tuple[str, int]]) -> None:
    fleet, broker = picky_fleet(take_all)
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
            broker.picky = refuse_decisions if action == "refused" else take_all
            if action == "crash-in-gather":
                fleet.kill_in_gather()
            await deliver(stage, fleet.take(stage))
            fleet.broker.crash, fleet.broker.lost, broker.picky = False, 0, take_all
            fleet.registry.errors.clear()
            fleet.worker.store.fuse = False
    fleet.broker.crash, fleet.broker.lost, fleet.broker.arrives = False, 0, True
    fleet.step(11)
    await fleet.drain()
    back = [Delivery(DELIVERY_QUEUE, m.body, DELIVERY_QUEUE, headers=m.headers) for m in broker.delivery_rounds()]
    assert await DeliverySink(fleet.ledger, broker, fleet.telemetry).handle(back) == [Ack()] * len(back)
    for state in states:
        fleet.check_settled(state.scope, state.event_id)
    assert set(fleet.ledger.rows) == {(state.scope, state.event_id) for state in states}
    assert fleet.ledger.approvals == [(GLOBEX, "b" * 32)]
    assert not fleet.broker.parked()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 31)), max_size=30))
def test_any_schedule_of_faults_ends_in_one_decision_each_with_its_trail(actions: list[tuple[str, int]]) -> None:
    asyncio.run(_run_schedule(actions))


@pytest.mark.parametrize("stage", STAGES)
async def test_a_probe_leaves_a_stage_behind_everything_that_came_with_it(stage: Stage) -> None:
    fleet = Fleet()
    body = await fleet.to(stage)
    fleet.broker.messages.clear()
    sent_at = "2026-01-31T12:00:00+00:00"
    probe = probe_message(0, sent_at)
    queue = stage_queue(stage, 0)
    deliveries = [Delivery(queue, b"", queue, headers=probe.headers), Delivery(queue, body, queue)]
    assert await fleet.worker.deliver_all(stage, deliveries) == [Ack(), Ack()]
    last = fleet.broker.messages[-1]
    assert probe_of(Delivery(last.routing_key, last.body, last.routing_key, headers=last.headers)) == sent_at
    assert len(fleet.broker.messages) > 1
    assert not fleet.broker.parked()
