"""The sinks: acked only when it is written down, one bad row alone, and a message to upstream sent until it arrives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import orjson
import pytest

from contracts.codec import Entry, decode_carrier, encode_carrier, entry_of_record
from contracts.failures import DatabaseError
from contracts.labels import Label, parse_label
from contracts.messages import decision_message, delivery_message, label_from, label_message, undelivered
from contracts.ports import Confirm, DeadLetter, DecisionRow, Delivery, Message
from contracts.settlement import REPLAYS_HEADER, Ack, Pause, failure_headers, letter_from
from contracts.state import AuditRecord
from contracts.tenancy import TenantScope
from contracts.topology import DELIVERY_QUEUE, LABELS_QUEUE, WORK, parked_queue
from tests.fakes import InMemoryLedger, RecordingPublisher, RecordingTelemetry, SteppingClock
from workers.settling import park_bytes
from workers.sinks.audit import AuditSink
from workers.sinks.delivery import MOST_ATTEMPTS, DeliverySink
from workers.sinks.labels import LabelsSink
from workers.sinks.parking import ParkingSink

ACME = TenantScope("acme")
EVENT = "e" * 32


def as_delivery(message: Message) -> Delivery:
    """The message as its queue hands it on."""
    return Delivery(message.routing_key, message.body, message.routing_key, message.message_id, headers=message.headers)


@dataclass
class Table:
    """Rows that are written once, all or none of a call; `poison` says which row is refused."""

    poison: Callable[[object], bool] = lambda row: False
    rows: list[object] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    down: bool = False

    async def write(self, rows: Sequence[object]) -> Sequence[bool]:
        self.calls.append(len(rows))
        if self.down:
            raise DatabaseError
        if any(self.poison(row) for row in rows):
            raise ValueError("one of them cannot be written")
        fresh = []
        for row in rows:
            fresh.append(row not in self.rows)
            self.rows += [row] if fresh[-1] else []
        return fresh


class Book(Table):
    """As the port LabelBook."""

    async def record(self, labels: Sequence[Label]) -> Sequence[bool]:
        return await self.write(labels)


class Chain(Table):
    """As the port AuditLog."""

    async def append(self, records: Sequence[AuditRecord]) -> Sequence[bool]:
        return await self.write(records)

    async def probed(self, partition: int, sent_at: str) -> None:
        """Probes are another test's."""


def label(number: int = 0, kind: str = "chargeback") -> Label:
    document = {
        "event": f"order-{number}",
        "label": kind,
        "source": "issuer",
        "effective_at": "2026-01-30T00:00:00Z",
        "note": "an überweisung",
    }
    return parse_label(ACME, document, "2026-01-31T12:00:00Z")


@dataclass
class LabelParts:
    """A labels sink on fakes."""

    book: Book = field(default_factory=Book)
    publisher: RecordingPublisher = field(default_factory=RecordingPublisher)
    telemetry: RecordingTelemetry = field(default_factory=RecordingTelemetry)

    def __post_init__(self) -> None:
        self.sink = LabelsSink(self.book, self.publisher, self.telemetry, SteppingClock())

    def count(self, result: str) -> float:
        return self.telemetry.count("riskfleet_labels_total", door="sink", result=result)


async def test_labels_are_recorded_in_one_call_and_once_each() -> None:
    parts = LabelParts()
    deliveries = [as_delivery(label_message(label(number))) for number in (1, 2, 3)]
    assert await parts.sink.handle(deliveries) == [Ack()] * 3
    assert (parts.book.rows, parts.book.calls) == ([label(1), label(2), label(3)], [3])
    assert await parts.sink.handle(deliveries[:2]) == [Ack()] * 2
    assert (parts.count("stored"), parts.count("present")) == (3, 2)
    assert len(parts.book.rows) == 3
    assert not parts.publisher.messages


async def test_a_label_that_postgresql_refuses_is_parked_alone_and_can_be_replayed() -> None:
    parts = LabelParts()
    parts.book.poison = lambda row: row == label(5)
    deliveries = [as_delivery(label_message(label(number))) for number in range(8)]
    assert await parts.sink.handle(deliveries) == [Ack()] * 8
    assert parts.book.rows == [label(number) for number in range(8) if number != 5]
    (parked,) = parts.publisher.messages
    letter = letter_from(parked.headers, parked.body)
    assert parked.routing_key == parked_queue("labels")
    assert (letter.scope, letter.event_id, letter.stage) == (ACME, label(5).event_id, "labels")
    assert label_from(letter.body) == label(5)
    assert parts.count("stored") == 7
    await parts.sink.handle(deliveries)
    assert parts.publisher.messages[1].message_id == parked.message_id  # the same letter, whatever is repeated


async def test_a_label_that_cannot_be_read_is_parked_as_it_came() -> None:
    parts = LabelParts()
    body = label_message(label()).body
    bad = [b"", b"[]", b"\xff", body.replace(b'"acme"', b'"Not A Tenant"'), body.replace(b"received_at", b"received")]
    deliveries = [Delivery(LABELS_QUEUE, each, LABELS_QUEUE) for each in (*bad, body)]
    assert await parts.sink.handle(deliveries) == [Ack()] * 6
    assert parts.book.rows == [label()]
    assert [message.body for message in parts.publisher.messages] == bad
    assert {letter_from(m.headers, m.body).scope for m in parts.publisher.messages} == {None}


async def test_labels_wait_while_postgresql_does_not_answer() -> None:
    parts = LabelParts(Book(down=True))
    delivery = as_delivery(label_message(label()))
    assert await parts.sink.handle([delivery, delivery]) == [Pause("DatabaseError")] * 2
    assert parts.book.calls == [2]  # a server that is down refuses no row: nothing is halved
    assert not parts.publisher.messages
    parts.book.down = False
    assert await parts.sink.handle([delivery]) == [Ack()]


async def test_a_label_is_acked_only_after_its_parking_was_confirmed() -> None:
    parts = LabelParts()
    parts.publisher.answers = [Confirm.UNKNOWN]
    deliveries = [Delivery(LABELS_QUEUE, b"bad", LABELS_QUEUE), as_delivery(label_message(label()))]
    assert await parts.sink.handle(deliveries) == [Pause("MessagingFailureError")] * 2
    assert await parts.sink.handle(deliveries) == [Ack()] * 2


# --- audit --------------------------------------------------------------------------------------------------


def record(number: int) -> AuditRecord:
    return AuditRecord(ACME, f"{number:032x}", EVENT, number, f"{number:064x}", b"{}")


async def test_a_record_that_the_chain_refuses_is_parked_alone() -> None:
    chain, publisher, telemetry = Chain(), RecordingPublisher(), RecordingTelemetry()
    chain.poison = lambda row: row == record(3)
    sink = AuditSink(chain, publisher, telemetry, SteppingClock())
    records = [record(number) for number in range(7)]
    carrier = encode_carrier([entry_of_record(each) for each in records])
    assert await sink.handle([Delivery("q", carrier, "q"), Delivery("q", b"bad", "q")]) == [Ack()] * 2
    assert chain.rows == [each for each in records if each != record(3)]
    bodies = [message.body for message in publisher.messages]
    assert bodies[0] == b"bad"
    (entry,) = decode_carrier(bodies[1])
    assert isinstance(entry, Entry)
    assert entry.header.digest == record(3).record_id
    assert telemetry.count("riskfleet_audit_records_total", result="appended") == 6
    chain.down = True
    assert await sink.handle([Delivery("q", carrier, "q")]) == [Pause("DatabaseError")]


# --- delivery -----------------------------------------------------------------------------------------------

DECISION = decision_message(
    ACME, "risk", DecisionRow("d", 1, "APPROVED", b'{"event_id":"' + EVENT.encode() + b'"}', b""), "c-1", "00-trace"
)


NO_HEADERS = {"exchange": "risk.decisions", "routing_key": "k", "message_id": "m", "headers": 3, "attempt": 1}


@dataclass
class DeliveryParts:
    """A delivery sink on fakes."""

    publisher: RecordingPublisher = field(default_factory=RecordingPublisher)
    telemetry: RecordingTelemetry = field(default_factory=RecordingTelemetry)

    def __post_init__(self) -> None:
        self.sink = DeliverySink(InMemoryLedger(), self.publisher, self.telemetry)

    def count(self, result: str) -> float:
        return self.telemetry.count("riskfleet_decision_deliveries_total", result=result)


def came_back(attempt: int, message: Message = DECISION) -> Delivery:
    return as_delivery(delivery_message(message, attempt, 1_000))


@pytest.mark.parametrize("answer", [Confirm.CONFIRMED, Confirm.UNROUTABLE])
async def test_a_decision_that_comes_back_is_sent_as_it_was(answer: Confirm) -> None:
    parts = DeliveryParts()
    parts.publisher.answers = [answer]
    assert await parts.sink.handle([came_back(1)]) == [Ack()]
    assert parts.publisher.messages == [DECISION]
    assert (parts.count("delivered"), parts.count("again")) == (1, 0)


@pytest.mark.parametrize("answer", [Confirm.REFUSED, Confirm.UNKNOWN])
@pytest.mark.parametrize(
    ("attempt", "rung"), [(1, "5s"), (2, "15s"), (3, "30s"), (4, "30s"), (MOST_ATTEMPTS - 1, "30s")]
)
async def test_what_is_not_taken_goes_round_again_and_slower(answer: Confirm, attempt: int, rung: str) -> None:
    parts = DeliveryParts()
    parts.publisher.answers = [answer]
    assert await parts.sink.handle([came_back(attempt)]) == [Ack()]
    sent, again = parts.publisher.messages
    assert sent == DECISION
    assert (again.exchange, again.routing_key) == (WORK, f"{DELIVERY_QUEUE}.{rung}")
    assert undelivered(again.headers, again.body) == (DECISION, attempt + 1)
    assert parts.count("again") == 1


async def test_a_day_of_refusals_ends_without_a_message_and_is_counted() -> None:
    parts = DeliveryParts()
    parts.publisher.answers = [Confirm.REFUSED]
    assert await parts.sink.handle([came_back(MOST_ATTEMPTS)]) == [Ack()]
    assert parts.publisher.messages == [DECISION]
    assert parts.count("given_up") == 1


async def test_a_ladder_that_is_full_leaves_the_decision_to_the_feed_and_holds_up_no_other_tenant() -> None:
    parts = DeliveryParts()
    other = replace(DECISION, message_id="other:1")
    parts.publisher.answers = [Confirm.REFUSED, Confirm.CONFIRMED, Confirm.REFUSED]
    assert await parts.sink.handle([came_back(1), came_back(1, other)]) == [Ack(), Ack()]
    assert (parts.count("left"), parts.count("delivered"), parts.count("again")) == (1, 1, 0)


async def test_a_round_that_the_ladder_does_not_take_keeps_its_delivery_and_no_other() -> None:
    parts = DeliveryParts()
    other = replace(DECISION, message_id="other:1")
    parts.publisher.answers = [Confirm.REFUSED, Confirm.CONFIRMED, Confirm.UNKNOWN]
    settled = await parts.sink.handle([came_back(1), came_back(1, other)])
    assert settled == [Pause("MessagingFailureError"), Ack()]
    assert (parts.count("delivered"), parts.count("again")) == (1, 0)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-riskfleet-delivery": "not json"},
        {"x-riskfleet-delivery": 7},
        dict(delivery_message(replace(DECISION, exchange="risk.v1.work"), 1, 0).headers),
        {"x-riskfleet-delivery": '{"exchange":"risk.decisions","attempt":1}'},
        {"x-riskfleet-delivery": orjson.dumps(NO_HEADERS).decode()},
    ],
)
async def test_what_is_no_delivery_is_counted_and_sent_nowhere(headers: dict[str, object]) -> None:
    parts = DeliveryParts()
    assert await parts.sink.handle([Delivery(DELIVERY_QUEUE, b"{}", DELIVERY_QUEUE, headers=headers)]) == [Ack()]
    assert not parts.publisher.messages
    assert parts.count("undecodable") == 1


# --- parking ------------------------------------------------------------------------------------------


@dataclass
class Letters:
    """A table that refuses letters of some problems, and maybe those of nobody."""

    refused: frozenset[str] = frozenset()
    nobody: bool = True
    rows: list[DeadLetter] = field(default_factory=list)

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        if any(one.problem in self.refused or (one.scope is None and not self.nobody) for one in letters):
            raise ValueError("a value does not fit")
        self.rows += letters


def parking(number: int, problem: str) -> Delivery:
    body = b"body %d" % number
    plain = park_bytes(body, "scoring", ValueError(), "2026-01-31T12:00:00Z").letter
    letter = replace(plain, problem=problem, scope=ACME)
    return Delivery("risk.v1.parked.scoring", body, "", headers=failure_headers(letter))


async def test_a_letter_that_postgresql_refuses_harms_no_other_and_keeps_its_bytes() -> None:
    table = Letters(frozenset({"bad"}))
    deliveries = [parking(i, "bad" if i == 3 else "good") for i in range(8)]
    assert await ParkingSink(table, SteppingClock()).handle(deliveries) == [Ack()] * 8
    good, plain = [row for row in table.rows if row.scope], [row for row in table.rows if row.scope is None]
    assert sorted(row.body for row in good) == [b"body %d" % i for i in range(8) if i != 3]
    assert [(row.body, row.stage, row.exception_class) for row in plain] == [(b"body 3", "parking", "ValueError")]


async def test_a_letter_that_cannot_be_kept_at_all_stays_on_its_queue_alone() -> None:
    table = Letters(frozenset({"bad"}), nobody=False)
    deliveries = [parking(i, "bad" if i == 1 else "good") for i in range(3)]
    assert await ParkingSink(table, SteppingClock()).handle(deliveries) == [Ack(), Pause("parking"), Ack()]
    assert sorted(row.body for row in table.rows) == [b"body 0", b"body 2"]


async def test_a_replayed_label_or_record_that_fails_again_is_another_letter() -> None:
    parts = LabelParts()
    parts.book.poison = lambda row: row == label()
    for count in (0, 1):
        message = replace(label_message(label()), headers={REPLAYS_HEADER: count})
        await parts.sink.handle([as_delivery(message), Delivery(LABELS_QUEUE, b"bad", "", headers=message.headers)])
    chain, publisher = Chain(poison=lambda row: True), RecordingPublisher()
    sink = AuditSink(chain, publisher, RecordingTelemetry(), SteppingClock())
    for count in (0, 1):
        entries = [entry_of_record(each).evolve(replays=count) for each in (record(1), replace(record(2), scope=None))]
        await sink.handle([Delivery("q", encode_carrier(entries), "q")])
    letters = [letter_from(m.headers, m.body) for m in (*parts.publisher.messages, *publisher.messages)]
    assert [one.replays for one in letters] == [0, 0, 1, 1] * 2
    assert len({one.letter_id for one in letters}) == 8
