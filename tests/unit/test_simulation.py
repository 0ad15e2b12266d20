"""A simulation decides as the pipeline does, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pytest

from contracts.codec import entry_of, state_from_bytes
from contracts.events import Event, event_id_of, parse_event
from contracts.failures import DatabaseError, LimitExceededError
from contracts.messages import stage_message
from contracts.outcomes import Decision
from contracts.ports import ActiveSet, Delivery
from contracts.state import EventState, SubjectHistory, begin
from contracts.tenancy import TenantScope
from contracts.topology import STAGES, Layouts, Stage, stage_queue
from tests.fakes import CountingIds, RecordingTelemetry, SteppingClock
from tests.fakes_state import DefaultsRegistry, StateWorld, TwinBroker, TwinLedger, TwinStateStore
from workers.pipeline import PIPELINE
from workers.runner import RunnerPorts, StageRunner
from workers.simulation import StageSimulator
from workers.stages import StagePorts

ACME, GLOBEX = TenantScope("acme"), TenantScope("globex")
AT = "2026-01-31T12:00:00+00:00"


@dataclass
class KnownSubject(TwinLedger):
    """A ledger that knows something of the subject."""

    async def histories(self, states: Sequence[EventState]) -> Sequence[SubjectHistory]:
        await super().histories(states)
        known = SubjectHistory(events_1d=40, events_30d=90, amount_30d="90000", first_seen_at="2026-01-30T00:00:00Z")
        return [known for _ in states]


class Halting(DefaultsRegistry):
    """The packaged versions, halted or revoked when told to."""

    halted: bool = False
    revoked_names: frozenset[str] = frozenset()

    async def active(self, scopes: Sequence[TenantScope], kind: str, event_types: Sequence[str]) -> Sequence[ActiveSet]:
        sets = await super().active(scopes, kind, event_types)
        return [ActiveSet(s.model, s.policy, s.guardrail, s.thresholds, self.halted) for s in sets]

    async def revoked(self, pins: Sequence[Any]) -> Sequence[bool]:
        return [pin.name in self.revoked_names for pin in pins]


def event_of(**fields: Any) -> Event:
    body: dict[str, Any] = {
        "id": "order-1",
        "kind": "risk",
        "type": "payment.card",
        "occurred_at": "2026-01-31T11:59:00Z",
        "subject": {"type": "person", "id": "p-1"},
        "amount": {"value": "12.50", "currency": "EUR"},
    } | fields
    return parse_event(body)


async def through_the_pipeline(event: Event, ledger: TwinLedger, registry: DefaultsRegistry) -> Decision:
    """The same event through the real runner of each stage."""
    broker, clock, ids = TwinBroker(), SteppingClock(), CountingIds()
    store = TwinStateStore(StateWorld())
    state = begin(ACME, "e" * 32, event, received_at="2026-01-31T12:00:00Z", source="http", correlation_id="c-1")
    broker.queues[stage_queue(STAGES[0], 0)].append(
        stage_message(entry_of(state, Stage.RETRIEVAL), Layouts.first(1)).body
    )
    for stage in STAGES:
        ports = RunnerPorts(store, ledger, broker, StagePorts(ledger, registry), RecordingTelemetry(), clock, ids)
        queue = stage_queue(stage, 0)
        clock.step(1)
        await StageRunner(stage, ports, layouts=Layouts.first(1)).handle(
            [Delivery(queue, broker.queues[queue].popleft(), queue)]
        )
    decided = state_from_bytes(ledger.rows[ACME, "e" * 32].state).decided
    assert decided is not None
    return decided.decision


def comparable(decision: Decision) -> dict[str, Any]:
    """All but ids, times and latencies."""
    document: dict[str, Any] = orjson.loads(decision.model_dump_json())
    for name in ("event_id", "correlation_id", "decided_at"):
        del document[name]
    del document["evidence"]["pins_now"]
    for check in document["guardrails"]:
        del check["latency_ms"]
    return document


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"amount": {"value": "99999.00", "currency": "EUR"}},
        {"risk_score": 95.0},
        {"text": "a text"},
        {"kind": "compliance", "regulatory_flags": [{"code": "PEP", "level": "high"}]},
        {"corrects": "f" * 32},
    ],
)
@pytest.mark.parametrize("halted", [False, True])
@pytest.mark.parametrize("revoked", [frozenset[str](), frozenset({"model-base"})])
async def test_a_simulation_decides_as_the_pipeline_does(
    fields: dict[str, Any], halted: bool, revoked: frozenset[str]
) -> None:
    registry = Halting()
    registry.halted, registry.revoked_names = halted, revoked
    simulator = StageSimulator(StagePorts(KnownSubject(), registry), SteppingClock(), CountingIds(), permits=4)
    simulated = await simulator.simulate(ACME, event_of(**fields))
    real = await through_the_pipeline(event_of(**fields), KnownSubject(), registry)
    assert comparable(simulated) == comparable(real)
    assert simulated.tenant_id == "acme"


async def test_every_version_is_carried_on_to_the_decision_of_its_event() -> None:
    """The same one from each; a halt that was set since holds for events under way, as in their stages."""
    ledger, registry = KnownSubject(), Halting()
    simulator = StageSimulator(StagePorts(ledger, registry), SteppingClock(), CountingIds(), permits=4)
    event = event_of()
    state = begin(ACME, event_id_of(ACME, "order-1"), event, received_at=AT, source="http", correlation_id="c")
    wanted = comparable(await simulator.redecide(state))
    versions = [state]
    for stage in PIPELINE["risk"][:3]:
        (facts,) = await stage.gather([versions[-1]], StagePorts(ledger, registry))
        step = stage.decide(versions[-1], facts, AT, lambda: 0.0)
        versions.append(versions[-1].transition(step.target, step.section, stage=stage.stage, detail=step.detail))
    assert [comparable(await simulator.redecide(version)) for version in versions] == [wanted] * 4
    registry.halted = True
    for version in versions:
        codes = [reason.code for reason in (await simulator.redecide(version)).reasons]
        assert "HALTED" in codes
    assert (dict(ledger.rows), dict(ledger.owners)) == ({}, {})


async def test_a_simulation_records_nothing() -> None:
    ledger = KnownSubject()
    simulator = StageSimulator(StagePorts(ledger, DefaultsRegistry()), SteppingClock(), CountingIds(), permits=4)
    first = await simulator.simulate(ACME, event_of())
    again = await simulator.simulate(ACME, event_of())
    nameless = [await simulator.simulate(ACME, event_of(id=None)) for _ in range(2)]
    assert (dict(ledger.rows), dict(ledger.owners), ledger.approvals) == ({}, {}, [])
    assert first.event_id == again.event_id
    assert len({first.event_id, *(decision.event_id for decision in nameless)}) == 3
    assert first.correlation_id != again.correlation_id


class Gate(DefaultsRegistry):
    """A registry that answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = asyncio.Event()

    async def active(self, scopes: Sequence[TenantScope], kind: str, event_types: Sequence[str]) -> Sequence[ActiveSet]:
        await self.opened.wait()
        return await super().active(scopes, kind, event_types)


@pytest.mark.parametrize(("permits", "share"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4)])
async def test_no_tenant_takes_more_than_half_and_all_together_no_more_than_the_permits(
    permits: int, share: int
) -> None:
    registry = Gate()
    simulator = StageSimulator(StagePorts(TwinLedger(), registry), SteppingClock(), CountingIds(), permits)
    running = [asyncio.ensure_future(simulator.simulate(ACME, event_of())) for _ in range(share)]
    await asyncio.sleep(0)
    with pytest.raises(LimitExceededError):
        await asyncio.wait_for(simulator.simulate(ACME, event_of()), 1)
    others = [TenantScope(f"tenant-{number}") for number in range(permits - share)]
    running += [asyncio.ensure_future(simulator.simulate(scope, event_of())) for scope in others]
    await asyncio.sleep(0)
    with pytest.raises(LimitExceededError):
        await asyncio.wait_for(simulator.simulate(GLOBEX, event_of()), 1)
    registry.opened.set()
    await asyncio.gather(*running)
    await simulator.simulate(ACME, event_of())


async def test_a_simulation_that_fails_or_is_cancelled_gives_its_permit_back() -> None:
    ledger, registry = TwinLedger(), Gate()
    ledger.down = True
    simulator = StageSimulator(StagePorts(ledger, registry), SteppingClock(), CountingIds(), permits=1)
    with pytest.raises(DatabaseError):
        await simulator.simulate(ACME, event_of())
    ledger.down = False
    waiting = asyncio.ensure_future(simulator.simulate(ACME, event_of()))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    registry.opened.set()
    assert (await simulator.simulate(ACME, event_of())).outcome == "APPROVED"


def test_a_simulator_without_permits_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="permit"):
        StageSimulator(StagePorts(TwinLedger(), DefaultsRegistry()), SteppingClock(), CountingIds(), permits=0)
