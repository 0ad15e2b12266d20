"""Schedules that once told two stories, held somebody else up or left a gap: each as a test, on the twins."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from contracts.codec import decode_carrier, encode_carrier, entry_of, entry_of_record
from contracts.events import canonical_json, event_id_of
from contracts.failures import InvalidWorkflowStateError
from contracts.messages import decision_message, delivery_message, parked_message, undelivered
from contracts.outcomes import Outcome
from contracts.ports import ActiveSet, Confirm, DecisionRow, Delivery, Message, OutboxRow
from contracts.settlement import Ack, Pause, letter_from
from contracts.state import AuditRecord
from contracts.tenancy import TenantScope
from contracts.topology import DECISIONS, REJECTED, delivery_rung, parked_queue
from gateway.intake import Admission, Refusal, Submission
from tests.fakes import DoorParts, InMemoryLedger, RecordingPublisher, RecordingTelemetry, SteppingClock, event_body
from tests.unit.test_ingress import SENT, settled
from tests.unit.test_relay import Parts as RelayParts
from tests.unit.test_runner import ACME, DECISION, EVENT, Fleet, new_state
from tests.unit.test_sinks import Chain, as_delivery
from workers.settling import park
from workers.sinks.audit import AuditSink
from workers.sinks.delivery import DeliverySink
from workers.sinks.parking import ParkingSink

ORDER = event_id_of(ACME, "order-1")


def row_of(revision: int, outcome: str) -> DecisionRow:
    body = canonical_json({"event_id": EVENT, "revision": revision, "outcome": outcome})
    return DecisionRow("d", revision, outcome, body, b"{}")


def sent_decision(revision: int, outcome: str) -> Message:
    return decision_message(ACME, "risk", row_of(revision, outcome), "c-1", "00-trace")


# --- an older revision after a newer one ----------------------------------------------------------------


@dataclass
class Deliveries:
    """A delivery sink beside the table of decisions."""

    def __post_init__(self) -> None:
        self.ledger, self.publisher, self.telemetry = InMemoryLedger(), RecordingPublisher(), RecordingTelemetry()
        self.sink = DeliverySink(self.ledger, self.publisher, self.telemetry)

    async def come_back(self, message: Message) -> object:
        (answer,) = await self.sink.handle([as_delivery(delivery_message(message, 1, 1_000))])
        return answer


async def test_the_delivery_ladder_sends_what_a_person_decided_meanwhile() -> None:
    """Revision 1 is refused and waits; a person decides, the relay sends revision 2; then the ladder comes back."""
    parts = Deliveries()
    parts.ledger.rows[ACME, EVENT] = row_of(2, "REJECTED")
    assert await parts.come_back(sent_decision(1, "REQUIRE_APPROVAL")) == Ack()
    assert parts.publisher.messages == [sent_decision(2, "REJECTED")]


async def test_the_delivery_ladder_goes_on_with_the_revision_that_it_read() -> None:
    parts = Deliveries()
    parts.ledger.rows[ACME, EVENT] = row_of(2, "REJECTED")
    parts.publisher.answers = [Confirm.REFUSED]
    assert await parts.come_back(sent_decision(1, "REQUIRE_APPROVAL")) == Ack()
    again = parts.publisher.messages[1]
    assert undelivered(again.headers, again.body) == (sent_decision(2, "REJECTED"), 2)


async def test_the_delivery_ladder_sends_nothing_that_it_cannot_compare() -> None:
    parts = Deliveries()
    parts.ledger.down = True
    assert await parts.come_back(sent_decision(1, "REQUIRE_APPROVAL")) == Pause("DatabaseError")
    assert not parts.publisher.messages
    parts.ledger.down = False
    assert await parts.come_back(sent_decision(1, "REQUIRE_APPROVAL")) == Ack()  # no row: what came is sent
    assert parts.publisher.messages == [sent_decision(1, "REQUIRE_APPROVAL")]


def outbox(position: int, revision: int, outcome: str, scope: TenantScope = ACME) -> OutboxRow:
    return OutboxRow(position, scope, sent_decision(revision, outcome))


async def test_the_relay_never_sends_an_older_revision_after_a_newer_one() -> None:
    """Revision 2 is refused and passed over; a person looks again and decides revision 3, which goes out."""
    parts = RelayParts()
    parts.table.add(outbox(1, 2, "REJECTED"))
    parts.broker.answer = lambda message: Confirm.REFUSED
    assert await parts.relay.drain_once() == 0
    parts.table.add(outbox(2, 3, "APPROVED"))
    parts.broker.answer = lambda message: Confirm.CONFIRMED
    await parts.relay.drain_once()
    assert parts.broker.got == [f"{EVENT}:3"]
    assert not parts.table.rows  # the older one is done with: nobody may send it any more


@pytest.mark.parametrize("stuck", [Confirm.REFUSED, Confirm.UNKNOWN])
async def test_an_older_revision_stays_behind_while_its_newer_one_is_not_taken(stuck: Confirm) -> None:
    """Of two revisions in one batch only the newer is sent; both stay until it has arrived."""
    parts = RelayParts()
    other = OutboxRow(3, TenantScope("globex"), sent_decision(2, "REJECTED"))
    parts.table.add(outbox(1, 2, "REJECTED"), outbox(2, 3, "APPROVED"), other)
    parts.broker.answer = lambda m: stuck if m.message_id == f"{EVENT}:3" else Confirm.CONFIRMED
    await parts.relay.drain_once()
    assert parts.broker.got == [f"{EVENT}:2"]  # the other tenant's: an event's id is its tenant's
    assert sorted(parts.table.rows) == [1, 2]


# --- somebody else is held up ---------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [DECISIONS, REJECTED])
async def test_a_tenant_whose_queue_takes_nothing_does_not_hold_up_the_door(refused: str) -> None:
    """A queue that refuses what is for one tenant paused the ingress, and with it every other tenant's events."""
    parts = DoorParts()
    assert await settled(parts, SENT) == [Ack()]
    parts.decided(ORDER, ACME)
    parts.publisher.messages.clear()
    delivery = SENT if refused == DECISIONS else replace(SENT, body=b"{")
    parts.publisher.answers = [Confirm.REFUSED]
    assert await settled(parts, delivery) == [Ack()]
    asked, again = [message for message in parts.publisher.messages if ".audit." not in message.routing_key]
    assert asked.exchange == refused
    assert again.routing_key == delivery_rung(1_000)
    assert undelivered(again.headers, again.body) == (asked, 1)


async def test_a_delivery_ladder_that_is_full_does_not_hold_up_the_door_either() -> None:
    parts = DoorParts()
    parts.publisher.answers = [Confirm.REFUSED, Confirm.REFUSED]
    assert await settled(parts, replace(SENT, body=b"{")) == [Ack()]


async def test_what_is_for_a_tenant_is_kept_until_its_round_is_confirmed() -> None:
    parts = DoorParts()
    parts.publisher.answers = [Confirm.REFUSED, Confirm.UNKNOWN]
    (answer,) = await settled(parts, replace(SENT, body=b"{"))
    assert isinstance(answer, Pause)
    parts.publisher.answers = [Confirm.UNKNOWN]  # not refused: the broker may be away
    (answer,) = await settled(parts, replace(SENT, body=b"{"))
    assert isinstance(answer, Pause)


async def test_a_system_record_that_the_chain_refuses_is_parked_and_blocks_no_record() -> None:
    """It belongs to no tenant: to park it as a tenant's entry raised, for ever, and the partition stood still."""
    chain, publisher = Chain(), RecordingPublisher()
    bad = AuditRecord(None, "0" * 32, "", 0, "", b"{}")
    good = AuditRecord(ACME, "1" * 32, EVENT, 1, "", b"{}")
    chain.poison = lambda row: row == bad
    sink = AuditSink(chain, publisher, RecordingTelemetry(), SteppingClock())
    carrier = encode_carrier([entry_of_record(bad), entry_of_record(good)])
    assert await sink.handle([Delivery("q", carrier, "q")]) == [Ack()]
    assert chain.rows == [good]
    (message,) = publisher.messages
    letter = letter_from(message.headers, message.body)
    assert (letter.scope, letter.stage) == (None, "audit")
    assert decode_carrier(letter.body) == (entry_of_record(bad),)


# --- more permissive --------------------------------------------------------------------------------------


async def test_a_halt_that_was_set_on_the_way_sends_the_event_to_a_person() -> None:
    """Pinned before the halt, decided after it: on a ladder, behind a backlog, or after ten minutes of outage."""
    fleet = Fleet()
    body = await fleet.to(DECISION)
    active = fleet.registry.active

    async def halted(*asked: object) -> list[ActiveSet]:
        return [replace(one, halted=True) for one in await active(*asked)]  # type: ignore[arg-type]

    fleet.registry.active = halted  # type: ignore[method-assign,assignment]
    assert await fleet.worker.deliver(DECISION, body) == Ack()
    state = fleet.check_settled()
    assert state.decided is not None
    decision = state.decided.decision
    assert decision.outcome is Outcome.REQUIRE_APPROVAL
    assert [reason.code for reason in decision.reasons].count("HALTED") == 1
    assert decision.evidence["halted"] is True
    assert fleet.ledger.approvals == [(ACME, EVENT)]


# --- another's body, another's letter -----------------------------------------------------------------------


def submission(body: bytes) -> Submission:
    return Submission(ACME, "risk", body, None, None, None, "http")


async def test_whoever_owns_an_identity_is_answered_although_another_body_took_its_reservation() -> None:
    """Decided; Redis forgets; another body reserves the identity and will be parked; then the owner repeats."""
    parts = DoorParts()
    assert isinstance(await parts.intake.admit(submission(event_body())), Admission)
    row = parts.decided(ORDER, ACME)
    parts.store.server.cells.clear()
    newcomer = event_body(amount={"value": "99.00", "currency": "EUR"})
    assert isinstance(await parts.intake.admit(submission(newcomer)), Admission)
    answer = await parts.intake.admit(submission(event_body()))
    assert isinstance(answer, Admission)
    assert (answer.decision, answer.replayed) == (row, True)
    third = await parts.intake.admit(submission(event_body(amount={"value": "1.00", "currency": "EUR"})))
    assert isinstance(third, Refusal)  # and nobody else is


class Letters:
    """As the port DeadLetters."""

    def __init__(self) -> None:
        self.rows: list[object] = []

    async def park(self, letters: list[object]) -> None:
        self.rows += letters


@pytest.mark.parametrize("queue", ["risk.ingest.acme", "risk.ingest.unrouted"])
async def test_what_the_broker_parks_for_a_sender_is_no_letter_of_its_choosing(queue: str) -> None:
    """A submission that was returned too often keeps its sender's headers and body: neither names a tenant."""
    globex = new_state(tenant=TenantScope("globex"))
    entry = entry_of(globex, DECISION)
    forged = parked_message(park(entry, InvalidWorkflowStateError("x"), "2026-01-31T12:00:00Z").letter, "decision")
    letters, dead = Letters(), {"x-first-death-queue": queue, "x-death": [{"queue": queue, "count": 1}]}
    sink = ParkingSink(letters, SteppingClock())  # type: ignore[arg-type]
    for headers in (dict(forged.headers) | dead, dead):
        delivery = Delivery(parked_queue("ingress"), forged.body, parked_queue("ingress"), headers=headers)
        assert await sink.handle([delivery]) == [Ack()]
    assert {(letter.scope, letter.event_id, letter.stage) for letter in letters.rows} == {(None, "", "ingress")}  # type: ignore[attr-defined]
