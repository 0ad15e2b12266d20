"""Entries of two topology versions at once: each stays on its own, new ones go to the newest, and nothing is parked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from contracts.codec import decode_carrier, encode_carrier, entry_of
from contracts.failures import MessagingFailureError
from contracts.messages import next_probe, probe_message, stage_message
from contracts.ports import Delivery
from contracts.settlement import Ack, Pause
from contracts.tenancy import TenantScope
from contracts.topology import RUNGS, STAGES, Layout, Layouts, Stage, rung_exchange
from gateway.intake import Admission, Intake, IntakePorts
from governance.deadletters import resend
from governance.postgres.layouts import LayoutRow, running_of
from tests.fakes import DoorParts
from tests.fakes_state import CrashError
from tests.unit.test_deadletters import of_state
from tests.unit.test_intake import POST
from tests.unit.test_runner import Fleet, entry_in, new_state

ACME = TenantScope("acme")
V1, V2 = Layout("v1", 4), Layout("v2", 13)
BOTH, ANNOUNCED = Layouts((V1, V2)), Layouts((V1, V2), filling="v1")


def carrier(version: str, stage: Stage = Stage.RETRIEVAL) -> bytes:
    return encode_carrier([entry_of(new_state(), stage, topology=version)])


@pytest.mark.parametrize("layout", [V1, V2])
async def test_an_entry_goes_on_to_the_queue_of_its_own_version_and_its_records_to_the_newest(layout: Layout) -> None:
    fleet = Fleet(layouts=BOTH)
    body = carrier(layout.version)
    for stage in STAGES[1:]:
        before = STAGES[STAGES.index(stage) - 1]
        assert await fleet.worker.deliver(before, body) == Ack()
        (message,) = fleet.broker.to_stage(stage)
        assert message.routing_key == layout.stage_queue(stage, ACME)
        body = message.body
        assert entry_in(body).header.topology == layout.version
    assert await fleet.worker.deliver(Stage.DECISION, body) == Ack()
    fleet.check_settled()
    audits = {m.routing_key for m in fleet.broker.messages if ".audit." in m.routing_key}
    assert audits == {V2.audit_queue(ACME)}


async def test_a_repeated_entry_whose_output_is_stored_goes_on_on_its_own_version() -> None:
    fleet = Fleet(layouts=BOTH)
    for layout in (V1, V2):
        assert await fleet.worker.deliver(Stage.RETRIEVAL, carrier(layout.version)) == Ack()
    assert [m.routing_key for m in fleet.broker.to_stage("scoring")] == [
        layout.stage_queue("scoring", ACME) for layout in (V1, V2)
    ]


@pytest.mark.parametrize("layout", [V1, V2])
async def test_a_failing_entry_waits_on_the_ladder_of_its_own_version(layout: Layout) -> None:
    fleet = Fleet(layouts=BOTH)
    assert await fleet.worker.deliver(Stage.RETRIEVAL, carrier(layout.version)) == Ack()
    (message,) = fleet.broker.to_stage("scoring")
    fleet.registry.errors += [ValueError("defect")]
    assert await fleet.worker.deliver(Stage.SCORING, message.body) == Ack()
    (waiting,) = fleet.broker.ladder()
    assert waiting.exchange == rung_exchange(next(name for name, ttl in RUNGS if ttl >= 1_000), layout.version)
    assert waiting.routing_key == layout.stage_queue("scoring", ACME)


async def test_a_suspect_goes_round_on_its_own_version() -> None:
    fleet = Fleet(layouts=BOTH)
    fleet.kill_in_gather()
    with pytest.raises(CrashError):
        await fleet.worker.deliver(Stage.RETRIEVAL, carrier("v1"))
    fleet.restart()
    assert await fleet.worker.deliver(Stage.RETRIEVAL, carrier("v1"), redelivered=True) == Ack()
    (again,) = fleet.broker.to_stage("retrieval")
    assert again.routing_key == V1.stage_queue("retrieval", ACME)
    assert entry_in(again.body).header.suspect


async def test_an_entry_of_a_version_that_is_not_known_yet_waits_and_is_never_parked() -> None:
    fleet = Fleet(layouts=Layouts((V1,)))
    assert isinstance(await fleet.worker.deliver(Stage.RETRIEVAL, carrier("v2")), Pause)
    assert not fleet.broker.messages
    fleet.layouts = BOTH
    assert await fleet.worker.deliver(Stage.RETRIEVAL, carrier("v2")) == Ack()
    assert not fleet.broker.parked()


async def test_a_word_that_can_be_no_version_is_parked_and_holds_up_nobody() -> None:
    fleet = Fleet(layouts=BOTH)
    assert await fleet.worker.deliver(Stage.RETRIEVAL, carrier("v2.retrieval")) == Ack()
    assert len(fleet.broker.parked()) == 1


@pytest.mark.parametrize(("layouts", "layout"), [(ANNOUNCED, V1), (BOTH, V2)])
async def test_a_door_sends_new_events_to_the_version_that_takes_them(layouts: Layouts, layout: Layout) -> None:
    parts = DoorParts()
    ports = IntakePorts(
        parts.store, parts.publisher, parts.ledger, parts.telemetry, parts.clock, parts.ids, parts.directory
    )
    assert isinstance(await Intake(ports, parts.refusals, layouts).admit(POST), Admission)
    (message,) = parts.publisher.messages
    assert message.routing_key == layout.stage_queue("retrieval", ACME)
    (entry,) = decode_carrier(message.body)
    assert entry_in(message.body).header.topology == layout.version
    assert entry == entry_in(message.body)


def test_a_dead_letter_is_sent_again_on_the_newest_version() -> None:
    message = resend(of_state(new_state()), BOTH)
    assert message.routing_key == V2.stage_queue("retrieval", ACME)
    assert entry_in(message.body).header.topology == "v2"


def test_a_probe_stays_on_its_version() -> None:
    message = probe_message(12, "2026-01-31T12:00:00+00:00", "v2")
    for stage in STAGES:
        assert message.routing_key == f"risk.v2.{stage}.p12"
        delivery = Delivery(message.routing_key, message.body, message.routing_key, headers=message.headers)
        message = next_probe(stage, delivery, "2026-01-31T12:00:00+00:00")
    assert message.routing_key == "risk.v2.audit.p12"


def test_a_message_for_a_version_that_is_not_known_is_not_made() -> None:
    with pytest.raises(MessagingFailureError, match="topology v2 is not known here"):
        stage_message(entry_of(new_state(), Stage.RETRIEVAL, topology="v2"), Layouts((V1,)))


def test_without_rows_the_first_version_runs_alone() -> None:
    assert running_of((), 4) == Layouts.first(4)


def test_what_runs_follows_the_rows() -> None:
    old = LayoutRow(V1, fills=True, retired=False, removed=False)
    new = LayoutRow(V2, fills=False, retired=False, removed=False)
    assert running_of((old, new), 7) == ANNOUNCED
    assert running_of((old, replace(new, fills=True)), 7) == Layouts((V1, V2), filling="v2")
    assert running_of((replace(old, retired=True), replace(new, fills=True)), 7) == Layouts((V2,), filling="v2")
