"""A tenant's limits at both doors: refused at one, waiting at the other, and never a neighbour's affair."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from contracts.failures import (
    DatabaseError,
    LimitExceededError,
    RiskfleetError,
    UndecidedLimitError,
    problem_document,
)
from contracts.ports import Confirm, Delivery
from contracts.settlement import Ack, Hold, Settlement
from contracts.tenancy import TenantScope
from contracts.topology import REJECTED
from gateway.intake import Admission, Refusal, Submission
from gateway.submitting import _result
from resilience.memory import MemoryBroker, SteppingClock
from resilience.rabbit import ConsumerPolicy
from tests.fakes import DoorParts, event_body
from tests.unit.test_ingress import SENT, settled
from tests.unit.test_intake import POST

ACME, GLOBEX = TenantScope("acme"), TenantScope("globex")


def post(name: str, scope: TenantScope = ACME) -> Submission:
    return replace(POST, scope=scope, body=event_body(id=name))


async def outcomes(parts: DoorParts, *submissions: Submission) -> list[str]:
    verdicts = [await parts.intake.admit(one) for one in submissions]
    return ["in" if isinstance(one, Admission) else type(one.error).__name__ for one in verdicts]


async def test_what_is_beyond_the_limit_is_refused_repeats_pass_and_a_decision_makes_room() -> None:
    parts = DoorParts()
    parts.limit(ACME, 2)
    names = [post(name) for name in ("a", "b", "c")]
    assert await outcomes(parts, *names) == ["in", "in", "UndecidedLimitError"]
    assert await outcomes(parts, post("a"), post("c", GLOBEX)) == ["in", "in"]
    assert len(parts.publisher.messages) == 4  # nothing was sent for what was refused
    parts.limit(ACME, None)
    assert await outcomes(parts, post("c")) == ["in"]
    assert parts.telemetry.count("riskfleet_refusals_total", door="http", problem="too-many-undecided") == 1


async def test_submissions_at_once_do_not_slip_past_the_limit() -> None:
    parts = DoorParts()
    parts.limit(ACME, 10)
    verdicts = await asyncio.gather(*(parts.intake.admit(post(f"at-once-{n}")) for n in range(50)))
    assert sum(isinstance(one, Admission) for one in verdicts) == 10
    assert {type(one.error) for one in verdicts if isinstance(one, Refusal)} == {UndecidedLimitError}


async def test_what_was_not_known_to_be_accepted_takes_no_room() -> None:
    parts = DoorParts()
    parts.limit(ACME, 1)
    parts.publisher.answers = [Confirm.UNKNOWN]
    assert await outcomes(parts, post("a"), post("b")) == ["MessagingFailureError", "in"]
    assert await outcomes(parts, post("a")) == ["in"]  # known: a repeat passes whatever the limit
    assert await outcomes(parts, post("c")) == ["UndecidedLimitError"]


async def test_while_the_directory_is_away_the_limits_stay_as_it_last_told_them() -> None:
    parts = DoorParts()
    parts.limit(ACME, 1)
    await outcomes(parts, post("a"))
    parts.directory.error = DatabaseError()
    assert await outcomes(parts, post("b"), post("c", GLOBEX)) == ["UndecidedLimitError", "in"]


async def test_at_the_amqp_door_the_tenant_waits_and_is_neither_told_nor_counted_as_refused() -> None:
    parts = DoorParts()
    parts.limit(ACME, 1)
    more = replace(SENT, body=event_body(id="more"), message_id="more")
    other = replace(SENT, user_id="up-globex", routing_key="globex.risk")
    first, waits, neighbour = await settled(parts, SENT, more, other)
    assert (first, waits, neighbour) == (Ack(), Hold("too-many-undecided", 1.0), Ack())
    assert parts.publisher.to(REJECTED) == []
    assert parts.telemetry.count("riskfleet_refusals_total", door="amqp", problem="too-many-undecided") == 0
    parts.limit(ACME, 2)
    assert await settled(parts, more) == [Ack()]


async def test_what_is_beyond_the_rate_is_refused_until_its_time_and_repeats_pass() -> None:
    parts = DoorParts()
    parts.limit(ACME, None, rate_per_s=0.4, burst=2)
    assert await outcomes(parts, post("a"), post("a"), post("b")) == ["in", "in", "in"]
    refused = await parts.intake.admit(post("c"))
    assert isinstance(refused, Refusal)
    assert isinstance(refused.error, LimitExceededError)
    assert refused.error.retry_after_s == 2.5
    assert problem_document(refused.error)["retry_after_s"] == 3
    assert await outcomes(parts, post("b"), post("c"), post("c", GLOBEX)) == ["in", "LimitExceededError", "in"]
    assert len(parts.publisher.messages) == 5  # nothing was sent for what was refused
    assert parts.telemetry.count("riskfleet_refusals_total", door="http", problem="limit-exceeded") == 2
    assert parts.telemetry.count("riskfleet_limiter_refusals_total", limit="submit", tenant="acme") == 2
    parts.store.clock.step(2.5)
    assert await outcomes(parts, post("c"), post("d")) == ["in", "LimitExceededError"]


async def test_items_of_a_batch_beyond_the_rate_say_when_to_come_again() -> None:
    parts = DoorParts()
    parts.limit(ACME, None, rate_per_s=1, burst=2)
    items: list[bytes | RiskfleetError] = [event_body(id=f"item-{number}") for number in range(4)]
    found = await parts.intake.admit_batch(items, POST)
    assert [isinstance(one, Admission) for one in found] == [True, True, False, False]
    assert [_result(0, one)["problem"]["retry_after_s"] for one in found[2:]] == [1, 1]


async def test_at_the_amqp_door_the_rate_makes_a_delivery_wait_and_loses_none() -> None:
    parts = DoorParts()
    parts.limit(ACME, None, rate_per_s=0.5, burst=1)
    more = replace(SENT, body=event_body(id="more"), message_id="more")
    assert await settled(parts, SENT, more) == [Ack(), Hold("limit-exceeded", 2.0)]
    assert parts.publisher.to(REJECTED) == []
    assert parts.telemetry.count("riskfleet_refusals_total", door="amqp", problem="limit-exceeded") == 0
    parts.limit(ACME, None)
    assert await settled(parts, more) == [Ack()]


async def test_a_delivery_waits_no_longer_than_until_a_raised_limit_should_hold() -> None:
    parts = DoorParts()
    parts.limit(ACME, None, rate_per_s=0.01, burst=1)
    more = replace(SENT, body=event_body(id="more"), message_id="more")
    assert await settled(parts, SENT, more) == [Ack(), Hold("limit-exceeded", 5.0)]


async def test_a_waiting_delivery_comes_again_and_holds_up_no_other_queue() -> None:
    from contracts.topology import Queue, Topology

    clock = SteppingClock()
    broker = MemoryBroker(Topology((), (Queue("slow"), Queue("quick")), (), ()), clock, sleep=clock.sleep)
    seen: list[str] = []

    async def handle(deliveries: list[Delivery]) -> list[Settlement]:
        seen.extend(one.queue for one in deliveries)
        return [Hold("full", 1.0) if one.queue == "slow" and seen.count("slow") < 3 else Ack() for one in deliveries]

    async def up() -> None:
        return None

    consumer = broker.consumer(["slow", "quick"], handle, up, ConsumerPolicy())  # type: ignore[arg-type]  # lists
    await consumer.start()
    await publish(broker, "slow")
    await until(lambda: seen == ["slow"], broker, clock)
    await publish(broker, "quick")
    await until(lambda: seen[:2] == ["slow", "quick"], broker, clock)
    await until(lambda: seen.count("slow") == 3, broker, clock)
    await consumer.stop()


async def publish(broker: MemoryBroker, queue: str) -> None:
    from contracts.ports import Message

    assert await broker.publisher().publish([Message("", queue, b"x", queue)]) == [Confirm.CONFIRMED]


async def until(good: object, broker: MemoryBroker, clock: SteppingClock) -> None:
    for _ in range(1_000):
        if good():  # type: ignore[operator]
            return
        clock.step(0.01)
        await broker.advance()
        await asyncio.sleep(0)
    raise AssertionError("it did not come")
