"""The broker's promises as publishers and consumers see them: the same tests on RabbitMQ and on its twin."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest

from contracts.codec import Entry, EntryHeader, encode_carrier
from contracts.failures import MessagingFailureError, StateStoreError
from contracts.ports import Confirm, Delivery, Message, Publisher
from contracts.settlement import Ack, Hold, Pause, Settlement, undelivered_letters
from contracts.topology import Binding, Exchange, Policy, Queue, Topology
from resilience.rabbit import PausePolicy
from tests.conformance.conftest import Brokers, Consumer

pytestmark = pytest.mark.conformance

INGEST, UNROUTED, WORK, LADDER = "conf.ingest", "conf.unrouted", "conf.work", "conf.ladder"
A, B, C, SMALL, HEAD, TAIL = "conf.a", "conf.b", "conf.c", "conf.small", "conf.head", "conf.tail"
NETTED, PARKED, RUNG, LATE = "conf.v1.scoring.p00", "conf.parked", "conf.rung", "conf.late"
RUNG_MS = 150

_RUNG = {
    "message-ttl": RUNG_MS,
    "dead-letter-exchange": WORK,
    "dead-letter-strategy": "at-least-once",
    "overflow": "reject-publish",
}
_NETTED = {
    "delivery-limit": 2,
    "dead-letter-exchange": WORK,
    "dead-letter-routing-key": PARKED,
    "dead-letter-strategy": "at-least-once",
    "overflow": "reject-publish",
}
TOPOLOGY = Topology(
    exchanges=(
        Exchange(INGEST, "topic", {"alternate-exchange": UNROUTED}),
        Exchange(UNROUTED, "fanout"),
        Exchange(WORK, "direct"),
        Exchange(LADDER, "topic"),
    ),
    queues=(
        *(Queue(name) for name in (A, B, C, UNROUTED, SMALL, TAIL, NETTED, PARKED, RUNG)),
        Queue(HEAD, "classic"),
    ),
    bindings=(
        Binding(INGEST, A, "acme.*"),
        Binding(INGEST, B, "acme.#"),
        Binding(INGEST, C, "#.end"),
        Binding(UNROUTED, UNROUTED, ""),
        *(Binding(WORK, name, name) for name in (A, SMALL, NETTED, PARKED)),
        Binding(LADDER, RUNG, "#"),
    ),
    policies=(
        Policy("conf-small", r"^conf\.small$", {"max-length": 5, "overflow": "reject-publish"}, priority=20),
        Policy("conf-s", r"^conf\.s", {"max-length": 1, "overflow": "drop-head"}),
        Policy("conf-head", r"^conf\.(head|tail)$", {"max-length": 3, "overflow": "drop-head"}),
        Policy("conf-netted", r"^conf\.v1\.", _NETTED),
        Policy("conf-rung", r"^conf\.rung$", _RUNG),
    ),
)


def message(place: int, key: str = A, exchange: str = "", *, mandatory: bool = True) -> Message:
    """The message of that number; the default exchange takes the queue's name as its key."""
    return Message(exchange, key, f"body {place}".encode(), f"id-{place}", mandatory=mandatory)


def messages(size: int, key: str = A, exchange: str = "", *, first: int = 0) -> list[Message]:
    return [message(place, key, exchange) for place in range(first, first + size)]


async def publish(publisher: Publisher, some: Sequence[Message]) -> set[Confirm]:
    confirms = await publisher.publish(some)
    assert len(confirms) == len(some)
    return set(confirms)


async def publish_at_last(publisher: Publisher, one: Message) -> None:
    """Publish the same message again until it is confirmed, as every publisher does."""
    async with asyncio.timeout(10):
        while await publish(publisher, [one]) != {Confirm.CONFIRMED}:  # noqa: ASYNC110 - there is nothing to wait for
            await asyncio.sleep(0.02)


@dataclass
class Inbox:
    """A handler that keeps and acks what it is given; `settle` may answer otherwise."""

    got: list[Delivery] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    settle: Callable[[Sequence[Delivery]], Sequence[Settlement]] = lambda group: [Ack()] * len(group)

    async def handle(self, group: Sequence[Delivery]) -> Sequence[Settlement]:
        self.got += group
        self.groups.append(len(group))
        return self.settle(group)

    def bodies(self, queue: str = A) -> list[bytes]:
        return [d.body for d in self.got if d.queue == queue]


@dataclass
class Stuck:
    """A handler that never comes back until it is told to; `held` is what it has."""

    held: list[Delivery] = field(default_factory=list)
    free: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, group: Sequence[Delivery]) -> Sequence[Settlement]:
        self.held += group
        await self.free.wait()
        return [Ack()] * len(group)


async def inbox(brokers: Brokers, *queues: str) -> Inbox:
    box = Inbox()
    await brokers.consumer(queues, box.handle)
    return box


async def held_by_a_stuck_consumer(brokers: Brokers, queue: str, number: int) -> tuple[Consumer, Stuck]:
    """A consumer that was given everything in the queue and has no room for more; its handler has some of it."""
    stuck = Stuck()
    consumer = await brokers.consumer([queue], stuck.handle, prefetch=number)
    await brokers.until(
        "all delivered", lambda: bool(stuck.held) and len(stuck.held) + brokers.waiting(consumer) == number
    )
    return consumer, stuck


def bodies_of(some: Sequence[Message]) -> list[bytes]:
    return [one.body for one in some]


# --- routing and confirms ---------------------------------------------------------------------------------


async def test_a_message_reaches_what_its_key_matches(brokers: Brokers, size: int) -> None:
    wanted = {
        "acme.risk": {A, B},
        "acme": {B},
        "acme.risk.more": {B},
        "acme.": {A, B},
        "acme.end": {A, B, C},
        "end": {C},
        "x.y.end": {C},
        "x.end.y": {UNROUTED},
        "acmes.risk": {UNROUTED},
        "": {UNROUTED},
    }
    publisher = await brokers.publisher()
    box = await inbox(brokers, A, B, C, UNROUTED)
    each = -(-size // 8)
    some = [message(place * each + i, key, INGEST) for place, key in enumerate(wanted) for i in range(each)]
    assert await publish(publisher, some) == {Confirm.CONFIRMED}
    total = each * sum(map(len, wanted.values()))
    await brokers.until("all arrived", lambda: len(box.got) >= total)
    found = defaultdict(set)
    for delivery in box.got:
        found[delivery.routing_key].add(delivery.queue)
    assert found == wanted
    assert set(Counter((d.queue, d.message_id) for d in box.got).values()) == {1}


async def test_only_a_mandatory_message_without_a_queue_is_unroutable(brokers: Brokers, size: int) -> None:
    publisher = await brokers.publisher()
    for exchange in ("", WORK):
        some = [message(place, "conf.nobody", exchange) for place in range(size)]
        assert await publish(publisher, some) == {Confirm.UNROUTABLE}
        loose = [message(place, "conf.nobody", exchange, mandatory=False) for place in range(size)]
        assert await publish(publisher, loose) == {Confirm.CONFIRMED}
    mixed = [message(0), message(1, "conf.nobody"), message(2)]
    assert list(await publisher.publish(mixed)) == [Confirm.CONFIRMED, Confirm.UNROUTABLE, Confirm.CONFIRMED]


async def test_what_closes_the_channel_is_unknown_and_the_publisher_recovers(brokers: Brokers) -> None:
    """An exchange that does not exist, and a user_id that is not the publisher's own."""
    publisher = await brokers.publisher()
    box = await inbox(brokers, A)
    for number, wrong in enumerate(
        [
            message(100, A, "conf.missing"),
            Message("", A, b"forged", "forged", user_id="somebody-else"),
        ]
    ):
        assert await publish(publisher, [wrong]) == {Confirm.UNKNOWN}
        await publish_at_last(publisher, message(number))
    await brokers.until("both arrived", lambda: len(set(box.bodies())) >= 2)
    assert set(box.bodies()) == {b"body 0", b"body 1"}


async def test_the_users_own_name_and_everything_else_survives(brokers: Brokers, size: int) -> None:
    headers = {
        "x-riskfleet-events": 3,
        "text": "größer",
        "yes": True,
        "none": None,
        "list": [1, "two"],
        "deep": {"a": 1},
    }
    some = [
        Message(
            INGEST,
            "acme.risk",
            bytes(range(256)),
            f"id-{place}",
            headers,
            content_type="application/json",
            correlation_id=f"c-{place}",
            user_id=brokers.user,
        )
        for place in range(size)
    ]
    publisher = await brokers.publisher()
    box = await inbox(brokers, A)
    assert await publish(publisher, some) == {Confirm.CONFIRMED}
    await brokers.until("all arrived", lambda: len(box.got) >= size)
    for place, delivery in enumerate(box.got):
        assert delivery == Delivery(
            queue=A,
            body=bytes(range(256)),
            routing_key="acme.risk",
            message_id=f"id-{place}",
            user_id=brokers.user,
            correlation_id=f"c-{place}",
            content_type="application/json",
            headers=headers,
        )


# --- limits -----------------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_and_loses_nothing(brokers: Brokers) -> None:
    """Of two policies that match, the one of higher priority holds. A queue's refusal comes a message late."""
    publisher = await brokers.publisher()
    confirms = [(await publisher.publish([message(place, SMALL)]))[0] for place in range(12)]
    taken = [place for place, confirm in enumerate(confirms) if confirm is Confirm.CONFIRMED]
    assert set(confirms) == {Confirm.CONFIRMED, Confirm.REFUSED}
    assert taken == list(range(len(taken)))
    assert 5 <= len(taken) <= 8
    box = await inbox(brokers, SMALL)
    await brokers.until("drained", lambda: len(box.got) >= len(taken))
    await publish_at_last(publisher, message(100, SMALL))
    await brokers.until("taken again", lambda: len(box.got) >= len(taken) + 1)
    assert box.bodies(SMALL) == [*(f"body {place}".encode() for place in taken), b"body 100"]


@pytest.mark.parametrize("queue", [HEAD, TAIL])
async def test_a_queue_that_drops_keeps_the_newest(brokers: Brokers, size: int, queue: str) -> None:
    publisher = await brokers.publisher()
    some = messages(size + 2, queue)
    for one in some:
        assert await publish(publisher, [one]) == {Confirm.CONFIRMED}
    box = await inbox(brokers, queue)
    await brokers.until("all arrived", lambda: len(box.got) >= 3)
    assert box.bodies(queue) == bodies_of(some)[-3:]


async def test_deliveries_do_not_fill_a_queue(brokers: Brokers) -> None:
    """Only ready messages count."""
    publisher = await brokers.publisher()
    stuck = Stuck()
    await brokers.consumer([SMALL], stuck.handle, group=1)
    assert await publish(publisher, messages(20, SMALL)) == {Confirm.CONFIRMED}
    await brokers.until("one is worked on", lambda: bool(stuck.held))
    assert await publish(publisher, messages(3, SMALL, first=20)) == {Confirm.CONFIRMED}


# --- ladder and dead letters ------------------------------------------------------------------------------


async def test_an_entry_on_the_ladder_comes_back_under_its_own_key(brokers: Brokers, size: int) -> None:
    publisher = await brokers.publisher()
    box = await inbox(brokers, A, NETTED)
    some = [*messages(size, A, LADDER), *messages(size, NETTED, LADDER, first=size)]
    began = brokers.now()
    assert await publish(publisher, some) == {Confirm.CONFIRMED}
    await brokers.until("one came back", lambda: bool(box.got))
    assert brokers.now() - began >= RUNG_MS / 1000
    await brokers.until("all came back", lambda: len(box.got) >= 2 * size)
    assert (box.bodies(A), box.bodies(NETTED)) == (bodies_of(some)[:size], bodies_of(some)[size:])
    for delivery in box.got:
        assert delivery.routing_key == delivery.queue
        assert not delivery.redelivered
        assert "x-delivery-count" not in delivery.headers
        assert delivery.headers["x-first-death-queue"] == RUNG
        assert delivery.headers["x-first-death-reason"] == "expired"
        (death,) = delivery.headers["x-death"]
        assert (death["queue"], death["reason"], death["count"]) == (RUNG, "expired", 1)
        assert (death["exchange"], death["routing-keys"]) == (LADDER, [delivery.queue])


@pytest.fixture
async def late(brokers: Brokers) -> AsyncIterator[Callable[[], Awaitable[object]]]:
    """Makes the queue that a test's dead letters wait for."""
    wanted = Topology((), (Queue(LATE),), (Binding(WORK, LATE, LATE),), ())
    await brokers.management.delete_queue(LATE)
    yield lambda: brokers.management.apply(wanted)
    await brokers.management.delete_queue(LATE)


async def test_an_expired_entry_waits_for_a_target_that_is_missing(
    brokers: Brokers, late: Callable[[], Awaitable[object]]
) -> None:
    """And holds up no other, up to 31 of them."""
    publisher = await brokers.publisher()
    box = await inbox(brokers, A)
    waiting, there = messages(31, LATE, LADDER), messages(64, A, LADDER, first=31)
    assert await publish(publisher, [*waiting, *there]) == {Confirm.CONFIRMED}
    await brokers.until("what has a target came back", lambda: len(box.got) >= len(there))
    await late()
    lates = await inbox(brokers, LATE)
    await brokers.until("all came back", lambda: len(lates.got) >= len(waiting))
    assert sorted(lates.bodies(LATE)) == sorted(bodies_of(waiting))
    assert box.bodies() == bodies_of(there)


async def test_32_entries_without_a_target_hold_up_a_rung_and_lose_nothing(
    brokers: Brokers, late: Callable[[], Awaitable[object]]
) -> None:
    publisher = await brokers.publisher()
    box = await inbox(brokers, A)
    waiting, there = messages(32, LATE, LADDER), messages(5, A, LADDER, first=32)
    assert await publish(publisher, [*waiting, *there]) == {Confirm.CONFIRMED}
    await brokers.pass_time(3 * RUNG_MS / 1000)
    assert not box.got
    await late()
    lates = await inbox(brokers, LATE)
    await brokers.until("all came back", lambda: len(lates.got) >= len(waiting) and len(box.got) >= len(there))
    assert sorted(lates.bodies(LATE)) == sorted(bodies_of(waiting))
    assert sorted(box.bodies()) == sorted(bodies_of(there))


async def test_an_expired_entry_waits_for_room_in_its_target(brokers: Brokers) -> None:
    publisher = await brokers.publisher()
    filling = [message(place, SMALL) for place in range(20)]
    confirms = [(await publisher.publish([one]))[0] for one in filling]
    taken = [one for one, confirm in zip(filling, confirms, strict=True) if confirm is Confirm.CONFIRMED]
    late = messages(3, SMALL, LADDER, first=100)
    assert await publish(publisher, late) == {Confirm.CONFIRMED}
    await brokers.pass_time(3 * RUNG_MS / 1000)
    box = await inbox(brokers, SMALL)
    await brokers.until("all came", lambda: len(box.got) >= len(taken) + len(late))
    assert box.bodies(SMALL)[: len(taken)] == bodies_of(taken)
    assert sorted(box.bodies(SMALL)[len(taken) :]) == sorted(bodies_of(late))


async def test_what_is_delivered_too_often_is_parked(brokers: Brokers, size: int) -> None:
    """Delivered three times with a limit of two: the parked message names its queue, and its entries can be read."""
    publisher = await brokers.publisher()
    entry = Entry(EntryHeader("acme", "e" * 32, "risk", "scoring", 1, "d", "b"), b"stored")
    some = [Message(WORK, NETTED, encode_carrier((entry,)), f"id-{place}") for place in range(size)]
    assert await publish(publisher, some) == {Confirm.CONFIRMED}
    for count in range(3):
        consumer, stuck = await held_by_a_stuck_consumer(brokers, NETTED, size)
        assert {d.headers.get("x-delivery-count") for d in stuck.held} == {count or None}
        assert {d.redelivered for d in stuck.held} == {count > 0}
        await brokers.kill(consumer)
    parked = await inbox(brokers, PARKED)
    await brokers.until("all parked", lambda: len(parked.got) >= size)
    assert sorted(str(d.message_id) for d in parked.got) == sorted(one.message_id for one in some)
    for delivery in parked.got:
        (letter,) = undelivered_letters(delivery.headers, delivery.body, "2026-01-31T12:00:00Z")
        assert (letter.stage, letter.event_id, letter.problem) == ("scoring", "e" * 32, "delivery-limit")
        assert letter.scope is not None
        assert delivery.headers["x-first-death-reason"] == "delivery_limit"
        assert delivery.routing_key == PARKED


# --- consuming --------------------------------------------------------------------------------------------


async def test_one_consumer_sees_a_queue_in_order(brokers: Brokers, size: int) -> None:
    publisher = await brokers.publisher()
    some = messages(size * 8)
    assert await publish(publisher, some) == {Confirm.CONFIRMED}
    box = Inbox()
    await brokers.consumer([A], box.handle, prefetch=16, group=5)
    await brokers.until("all arrived", lambda: len(box.got) >= len(some))
    assert box.bodies() == bodies_of(some)
    assert max(box.groups) <= 5


async def test_a_dead_consumers_deliveries_come_again_in_order(brokers: Brokers, size: int) -> None:
    """Before what was never delivered, with their count; a new process has not seen them."""
    publisher = await brokers.publisher()
    await publish(publisher, messages(size))
    consumer, _ = await held_by_a_stuck_consumer(brokers, A, size)
    await publish(publisher, messages(2, first=size))
    await brokers.kill(consumer)
    box = await inbox(brokers, A)
    await brokers.until("all came again", lambda: len(box.got) >= size + 2)
    assert box.bodies() == bodies_of(messages(size + 2))
    again, fresh = box.got[:size], box.got[size:]
    assert {(d.redelivered, d.seen, d.headers.get("x-delivery-count")) for d in again} == {(True, False, 1)}
    assert {(d.redelivered, d.seen, d.headers.get("x-delivery-count")) for d in fresh} == {(False, False, None)}


async def test_after_a_lost_connection_the_process_knows_what_it_has_seen(brokers: Brokers, size: int) -> None:
    publisher = await brokers.publisher()
    await publish(publisher, messages(size))
    consumer, stuck = await held_by_a_stuck_consumer(brokers, A, size)
    first = len(stuck.held)
    await brokers.cut(consumer)
    await brokers.until("the loss is known", lambda: consumer.paused_reason is not None)
    stuck.free.set()  # these acks are lost with their connection
    await brokers.until("all came again", lambda: len(stuck.held) >= first + size)
    assert {(d.redelivered, d.seen) for d in stuck.held[:first]} == {(False, False)}
    assert {(d.redelivered, d.seen) for d in stuck.held[first:]} == {(True, True)}
    assert [d.body for d in stuck.held[first:]] == bodies_of(messages(size))
    await brokers.until("going on", lambda: consumer.paused_reason is None)


async def test_two_consumers_share_a_queue(brokers: Brokers, size: int) -> None:
    publisher = await brokers.publisher()
    boxes = [Inbox(), Inbox()]
    for box in boxes:
        await brokers.consumer([A], box.handle, prefetch=4)
    some = messages(size + 9)
    await publish(publisher, some)
    await brokers.until("all arrived", lambda: sum(len(box.got) for box in boxes) >= len(some))
    assert sorted(body for box in boxes for body in box.bodies()) == sorted(bodies_of(some))
    assert all(box.got for box in boxes)


async def test_prefetch_bounds_what_a_consumer_holds(brokers: Brokers) -> None:
    publisher = await brokers.publisher()
    first, second = Stuck(), Inbox()
    await brokers.consumer([A], first.handle, prefetch=3, group=1)
    await publish(publisher, messages(10))
    await brokers.until("one is worked on", lambda: bool(first.held))
    await brokers.consumer([A], second.handle)
    await brokers.until("the others arrived", lambda: len(second.got) >= 7)
    assert second.bodies() == bodies_of(messages(10))[3:]


async def test_pause_keeps_the_deliveries_and_finishes_them_later(brokers: Brokers, size: int) -> None:
    publisher = await brokers.publisher()
    pauses, probes = [True], [StateStoreError(), StateStoreError()]

    async def probe() -> None:
        if probes:
            assert consumer.paused_reason in ("redis", "StateStoreError")
            raise probes.pop()

    def settle(group: Sequence[Delivery]) -> Sequence[Settlement]:
        if pauses and pauses.pop():
            return [Pause("redis")] * len(group)
        return [Ack()] * len(group)

    box = Inbox(settle=settle)
    await publish(publisher, messages(size))
    consumer = await brokers.consumer([A], box.handle, probe, group=size)
    await brokers.until("all finished", lambda: bool(box.groups) and len(box.got) >= size + box.groups[0])
    assert not probes
    tried, again = box.got[: box.groups[0]], box.got[box.groups[0] :]
    assert again[: len(tried)] == tried  # the same deliveries, not redelivered ones
    assert [d.body for d in again] == bodies_of(messages(size))
    await brokers.until("going on", lambda: consumer.paused_reason is None)


@pytest.mark.parametrize("error", [StateStoreError(), ValueError("a defect")])
async def test_a_handler_that_raises_pauses_and_loses_nothing(brokers: Brokers, error: Exception) -> None:
    publisher = await brokers.publisher()
    errors = [error]

    def settle(group: Sequence[Delivery]) -> Sequence[Settlement]:
        if errors:
            raise errors.pop()
        return [Ack()] * len(group)

    box = Inbox(settle=settle)
    await brokers.consumer([A], box.handle)
    await publish(publisher, messages(1))
    await brokers.until("tried again", lambda: len(box.got) >= 2)
    assert box.got[0] == box.got[1]


async def test_part_of_a_group_may_pause(brokers: Brokers) -> None:
    publisher = await brokers.publisher()
    refusals = [b"body 1"]

    def settle(group: Sequence[Delivery]) -> Sequence[Settlement]:
        answers: list[Settlement] = []
        for delivery in group:
            if delivery.body in refusals:
                refusals.remove(delivery.body)
                answers.append(Pause("redis"))
            else:
                answers.append(Ack())
        return answers

    box = Inbox(settle=settle)
    await publish(publisher, messages(3))
    consumer = await brokers.consumer([A], box.handle)
    await brokers.until("all finished", lambda: len(box.got) >= 4)
    assert Counter(box.bodies()) == {b"body 0": 1, b"body 1": 2, b"body 2": 1}
    await brokers.kill(consumer)
    rest = await inbox(brokers, A)
    await publish(publisher, [message(9)])
    await brokers.until("only the new one", lambda: bool(rest.got))
    assert rest.bodies() == [b"body 9"]


async def test_a_delivery_that_waits_comes_again_unreturned_and_holds_up_no_other_queue(brokers: Brokers) -> None:
    publisher = await brokers.publisher()
    full = [True]

    def settle(group: Sequence[Delivery]) -> Sequence[Settlement]:
        return [Hold("full", 0.05) if d.queue == A and full else Ack() for d in group]

    box = Inbox(settle=settle)
    await publish(publisher, messages(5))
    consumer = await brokers.consumer([A, B], box.handle, prefetch=2)
    await brokers.until("several tries", lambda: len(box.bodies()) >= 6)
    assert set(box.bodies()) == {b"body 0", b"body 1"}  # no more than the prefetch is held
    await publish(publisher, messages(20, B))
    await brokers.until("the neighbour's are through", lambda: len(box.bodies(B)) == 20)
    full.clear()
    await brokers.until("all came in", lambda: set(box.bodies()) == {f"body {n}".encode() for n in range(5)})
    assert not any(d.redelivered for d in box.got)
    assert consumer.paused_reason is None


async def test_a_delivery_that_is_held_waits_alone_and_is_given_again(brokers: Brokers) -> None:
    """Others go on meanwhile, of its queue and of others; a consumer that dies loses nothing of it."""
    publisher = await brokers.publisher()
    full = {b"body 0"}

    def settle(group: Sequence[Delivery]) -> Sequence[Settlement]:
        return [Hold("full", 0.05) if delivery.body in full else Ack() for delivery in group]

    box = Inbox(settle=settle)
    consumer = await brokers.consumer([A, B], box.handle)
    await publish(publisher, [message(0), *messages(3, B, first=1), message(4)])
    await brokers.until("the others are done", lambda: {b"body 4", b"body 3"} <= {d.body for d in box.got})
    await brokers.until("given again", lambda: box.bodies().count(b"body 0") >= 3)
    assert consumer.paused_reason is None
    assert Counter(d.body for d in box.got if d.body not in full) == {f"body {i}".encode(): 1 for i in (1, 2, 3, 4)}
    assert len({id(d) for d in box.got if d.body in full}) == 1  # the very same delivery
    await brokers.kill(consumer)
    other = await inbox(brokers, A)
    await brokers.until("another has it", lambda: bool(other.got))
    assert other.bodies() == [b"body 0"]


async def test_a_long_pause_gives_the_deliveries_to_others(brokers: Brokers, size: int) -> None:
    publisher = await brokers.publisher()
    down = asyncio.Event()

    async def probe() -> None:
        if not down.is_set():
            raise StateStoreError

    def pause(group: Sequence[Delivery]) -> Sequence[Settlement]:
        return [Ack() if down.is_set() else Pause("redis")] * len(group)

    paused = Inbox(settle=pause)
    await publish(publisher, messages(size))
    consumer = await brokers.consumer([A], paused.handle, probe, pause=PausePolicy(0.02, 0.05, 0.1))
    await brokers.until("tried", lambda: bool(paused.got))
    other = await inbox(brokers, A)
    await brokers.until("the other has all", lambda: len(other.got) >= size)
    assert sorted(other.bodies()) == sorted(bodies_of(messages(size)))
    assert consumer.paused_reason is not None
    down.set()
    await brokers.until("going on", lambda: consumer.paused_reason is None)
    await brokers.kill(brokers.started[1])
    await publish(publisher, [message(9_000)])
    await brokers.until("consuming again", lambda: b"body 9000" in paused.bodies())
    assert set(Counter(paused.bodies()).values()) == {1}  # what it gave back it did not try again


async def test_a_queue_is_added_to_a_running_consumer(brokers: Brokers, size: int) -> None:
    publisher = await brokers.publisher()
    box = Inbox()
    consumer = await brokers.consumer([A], box.handle)
    await consumer.add_queue(B)
    await consumer.add_queue(B)
    await publish(publisher, [*messages(size, A), *messages(size, B, first=size)])
    await brokers.until("all arrived", lambda: len(box.got) >= 2 * size)
    assert Counter(d.queue for d in box.got) == {A: size, B: size}
    await brokers.cut(consumer)
    await publish(publisher, [message(9_000, B)])
    await brokers.until("the added queue is consumed again", lambda: b"body 9000" in box.bodies(B))


async def test_a_dropped_queue_keeps_what_comes_until_it_is_added_again(brokers: Brokers, size: int) -> None:
    publisher = await brokers.publisher()
    stuck, box = Stuck(), Inbox()
    consumer = await brokers.consumer([A, B], box.handle)
    await publish(publisher, messages(1, B))
    await brokers.until("it is consumed", lambda: len(box.bodies(B)) == 1)
    for _ in range(2):
        await consumer.drop_queue(B)
    await publish(publisher, [*messages(size, B, first=1), *messages(size, A, first=100)])
    await brokers.until("the other goes on", lambda: len(box.bodies(A)) == size)
    assert len(box.bodies(B)) == 1
    await brokers.cut(consumer)
    await publish(publisher, [message(9_000, A)])
    await brokers.until("the other goes on with a new connection", lambda: b"body 9000" in box.bodies(A))
    assert len(box.bodies(B)) == 1
    await consumer.add_queue(B)
    await brokers.until("it goes on", lambda: len(box.bodies(B)) == 1 + size)
    # What was in hand when its queue was dropped is finished, and never given twice.
    await publish(publisher, [message(9_001, C)])
    slow = await brokers.consumer([C], stuck.handle)
    await brokers.until("one is in hand", lambda: bool(stuck.held))
    await slow.drop_queue(C)
    stuck.free.set()
    await slow.add_queue(C)
    await publish(publisher, [message(9_002, C)])
    await brokers.until("the next came", lambda: len(stuck.held) >= 2)
    assert [d.body for d in stuck.held] == [b"body 9001", b"body 9002"]


async def test_a_queue_that_is_not_there_yet_can_be_added_later(
    brokers: Brokers, late: Callable[[], Awaitable[object]]
) -> None:
    publisher = await brokers.publisher()
    box = Inbox()
    consumer = await brokers.consumer([A], box.handle)
    with pytest.raises(MessagingFailureError):
        await consumer.add_queue(LATE)
    await late()
    await consumer.add_queue(LATE)
    await publish(publisher, [message(0, LATE), message(1, A)])
    await brokers.until("both arrived", lambda: len(box.got) >= 2)
    assert Counter(d.queue for d in box.got) == {LATE: 1, A: 1}


async def test_a_queue_that_is_not_there_sends_nothing_back_that_is_in_hand(brokers: Brokers, size: int) -> None:
    publisher = await brokers.publisher()
    stuck = Stuck()
    consumer = await brokers.consumer([A], stuck.handle)
    await publish(publisher, messages(size))
    await brokers.until("one is in hand", lambda: bool(stuck.held))
    for _ in range(3):
        with pytest.raises(MessagingFailureError):
            await consumer.add_queue(LATE)
    stuck.free.set()
    await publish(publisher, [message(9_000)])
    await brokers.until("the last came", lambda: b"body 9000" in [d.body for d in stuck.held])
    assert Counter(d.body for d in stuck.held) == Counter(bodies_of([*messages(size), message(9_000)]))
    assert not [d for d in stuck.held if d.redelivered]


async def test_a_deleted_queue_holds_up_no_other_after_a_lost_connection(
    brokers: Brokers, late: Callable[[], Awaitable[object]]
) -> None:
    await late()
    publisher = await brokers.publisher()
    box = Inbox()
    consumer = await brokers.consumer([LATE, A], box.handle)
    await brokers.management.delete_queue(LATE)
    await brokers.cut(consumer)
    await publish(publisher, [message(0, A)])
    await brokers.until("the other goes on", lambda: b"body 0" in box.bodies(A))
    assert consumer.queues == (A,)
    await late()
    await consumer.add_queue(LATE)
    await publish(publisher, [message(1, LATE)])
    await brokers.until("it goes on", lambda: b"body 1" in box.bodies(LATE))


async def test_a_queue_that_does_not_exist_is_not_made(brokers: Brokers) -> None:
    publisher = await brokers.publisher()
    with pytest.raises(MessagingFailureError):
        await brokers.consumer(["conf.nobody"], Inbox().handle)
    assert await publish(publisher, [message(0, "conf.nobody")]) == {Confirm.UNROUTABLE}


async def test_a_temporary_queue_works_like_any_other(brokers: Brokers, size: int) -> None:
    publisher = await brokers.publisher()
    await brokers.management.declare_temporary(LATE)
    try:
        assert await publish(publisher, messages(size, LATE)) == {Confirm.CONFIRMED}
        box = await inbox(brokers, LATE)
        await brokers.until("all arrived", lambda: len(box.got) >= size)
    finally:
        await brokers.management.delete_queue(LATE)
    assert await publish(publisher, messages(size, LATE)) == {Confirm.UNROUTABLE}


async def test_stop_finishes_the_group_in_hand_and_returns_the_rest(brokers: Brokers, size: int) -> None:
    publisher = await brokers.publisher()
    stuck = Stuck()
    consumer = await brokers.consumer([A], stuck.handle, group=1)
    await publish(publisher, messages(size + 3))
    await brokers.until("one is worked on", lambda: bool(stuck.held))
    stopping = asyncio.create_task(consumer.stop())
    await asyncio.sleep(0)
    stuck.free.set()
    await stopping
    assert [d.body for d in stuck.held] == [b"body 0"]
    box = await inbox(brokers, A)
    await brokers.until("the rest arrived", lambda: len(box.got) >= size + 2)
    assert box.bodies() == bodies_of(messages(size + 2, first=1))
    assert {(d.redelivered, d.headers.get("x-delivery-count")) for d in box.got} == {(True, 1)}
