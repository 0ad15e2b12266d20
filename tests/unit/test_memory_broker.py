"""What only the twin of the broker can be asked for: faults on request, a clock that is told, exact limits.

What it has in common with RabbitMQ is in tests/conformance/test_broker.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.failures import MessagingFailureError
from contracts.ports import Confirm, Delivery, Message, Publisher
from contracts.settlement import Ack, Pause, Settlement
from contracts.topology import (
    INGEST,
    METRICS_QUEUE,
    UNROUTED,
    WORK,
    Binding,
    Exchange,
    Policy,
    Queue,
    Stage,
    Topology,
    parked_queue,
    rung_exchange,
    rung_queue,
    stage_queue,
    tenant_ingest,
    topology,
)
from resilience.memory import Faults, MemoryBroker, MemoryConsumer, MemoryReplies, QueueDepth, SteppingClock
from resilience.memory.broker import topic_matches
from resilience.rabbit import ConsumerPolicy, PausePolicy

SCORING = stage_queue(Stage.SCORING, 0)


def message(place: int = 0, key: str = SCORING, exchange: str = WORK, *, persistent: bool = True) -> Message:
    return Message(exchange, key, f"body {place}".encode(), f"id-{place}", persistent=persistent)


async def publish(publisher: Publisher, *some: Message) -> list[Confirm]:
    return list(await publisher.publish(some))


@dataclass
class Twin:
    """The fleet's own topology in memory, with everything of the broker at hand."""

    clock: SteppingClock = field(default_factory=SteppingClock)
    wanted: Topology = field(default_factory=lambda: topology(1))
    got: list[Delivery] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.broker = MemoryBroker(self.wanted, self.clock, sleep=self.clock.sleep)
        self.publisher = self.broker.publisher()

    async def pass_time(self, seconds: float) -> None:
        self.clock.step(seconds)
        await self.broker.advance()
        await self.idle()

    async def idle(self) -> None:
        """Until nobody has anything left to do at this moment."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def consumer(
        self, *queues: str, handler: Callable[[Sequence[Delivery]], Awaitable[Sequence[Settlement]]] | None = None
    ) -> MemoryConsumer:
        async def keep(group: Sequence[Delivery]) -> Sequence[Settlement]:
            self.got += group
            return [Ack()] * len(group)

        async def probe() -> None:
            return

        policy = ConsumerPolicy(pause=PausePolicy(first_probe_s=0.1, longest_probe_s=0.1))
        consumer = self.broker.consumer(queues or [SCORING], handler or keep, probe, policy)
        await consumer.start()
        await self.idle()
        return consumer

    def bodies(self) -> list[bytes]:
        return [delivery.body for delivery in self.got]


async def never(_group: Sequence[Delivery]) -> Sequence[Settlement]:
    """A handler that does not come back."""
    await asyncio.Event().wait()
    return []


# --- faults on request ------------------------------------------------------------------------------------


async def test_a_lost_confirm_is_unknown_and_the_message_is_there() -> None:
    twin = Twin()
    twin.broker.faults.lose_confirms = 2
    assert await publish(twin.publisher, *map(message, range(3))) == [
        Confirm.UNKNOWN,
        Confirm.UNKNOWN,
        Confirm.CONFIRMED,
    ]
    assert [m.message_id for m in twin.broker.ready(SCORING)] == ["id-0", "id-1", "id-2"]


async def test_a_lost_message_is_unknown_and_a_refused_one_refused_and_neither_is_there() -> None:
    twin = Twin()
    twin.broker.faults.lose_messages = twin.broker.faults.refuse = 1
    assert await publish(twin.publisher, *map(message, range(3))) == [
        Confirm.UNKNOWN,
        Confirm.REFUSED,
        Confirm.CONFIRMED,
    ]
    assert [m.message_id for m in twin.broker.ready(SCORING)] == ["id-2"]


async def test_faults_strike_the_publisher_and_the_messages_that_they_are_meant_for() -> None:
    twin = Twin()
    faults = Faults(lose_confirms=9, only=lambda m: m.message_id == "id-1")
    mine = twin.broker.publisher("mine", faults=faults)
    assert await publish(mine, message(0), message(1)) == [Confirm.CONFIRMED, Confirm.UNKNOWN]
    assert await publish(twin.publisher, message(1)) == [Confirm.CONFIRMED]
    assert faults.lose_confirms == 8


async def test_under_a_memory_alarm_publishes_hang_and_arrive_when_it_ends() -> None:
    twin = Twin()
    twin.broker.alarm(True)
    waiting = asyncio.create_task(publish(twin.publisher, message(0)))
    await twin.idle()
    assert not waiting.done()
    await twin.pass_time(5.0)
    assert await waiting == [Confirm.UNKNOWN]
    hanging = asyncio.create_task(publish(twin.publisher, message(1)))
    await twin.idle()
    assert not twin.broker.ready(SCORING)
    twin.broker.alarm(False)
    assert await hanging == [Confirm.CONFIRMED]
    assert [m.message_id for m in twin.broker.ready(SCORING)] == ["id-0", "id-1"]


async def test_a_blocked_connection_that_is_cut_takes_its_messages_with_it() -> None:
    twin = Twin()
    twin.broker.alarm(True)
    hanging = asyncio.create_task(publish(twin.publisher, message(0)))
    await twin.idle()
    assert twin.broker.cut("publisher") == 1
    assert await hanging == [Confirm.UNKNOWN]
    twin.broker.alarm(False)
    assert not twin.broker.ready(SCORING)
    assert await publish(twin.publisher, message(1)) == [Confirm.CONFIRMED]


async def test_consumers_are_not_blocked_by_an_alarm() -> None:
    twin = Twin()
    await publish(twin.publisher, message())
    twin.broker.alarm(True)
    await twin.consumer()
    assert twin.bodies() == [b"body 0"]


async def test_a_restart_keeps_what_is_durable() -> None:
    """A quorum queue keeps every message; a classic one only persistent ones; deliveries come again."""
    twin = Twin()
    await twin.consumer(handler=never)
    for place, persistent in enumerate((True, False)):
        sent = [message(place, queue, persistent=persistent) for queue in (SCORING, METRICS_QUEUE)]
        assert await publish(twin.publisher, *sent) == [Confirm.CONFIRMED] * 2
    await twin.idle()
    assert twin.broker.lookup(SCORING) == QueueDepth(SCORING, 0, 2, 1, 0)
    twin.broker.restart()
    assert twin.broker.lookup(SCORING) == QueueDepth(SCORING, 2, 0, 0, 0)
    assert [m.message_id for m in twin.broker.ready(METRICS_QUEUE)] == ["id-0"]
    assert twin.broker.dropped[METRICS_QUEUE, "restart"] == 1


async def test_while_the_broker_is_down_nothing_is_known_and_consumers_come_back_by_themselves() -> None:
    twin = Twin()
    consumer = await twin.consumer()
    twin.broker.crash()
    await twin.idle()
    assert consumer.paused_reason is not None
    assert await publish(twin.publisher, message()) == [Confirm.UNKNOWN]
    with pytest.raises(MessagingFailureError):
        await twin.publisher.ping()
    with pytest.raises(MessagingFailureError):
        await twin.consumer()
    twin.broker.recover()
    await twin.publisher.ping()
    assert await publish(twin.publisher, message()) == [Confirm.CONFIRMED]
    await twin.pass_time(0.1)
    assert twin.bodies() == [b"body 0"]
    assert consumer.paused_reason is None


async def test_a_killed_consumer_settles_nothing_any_more() -> None:
    twin, free = Twin(), asyncio.Event()

    async def slow(group: Sequence[Delivery]) -> Sequence[Settlement]:
        await free.wait()
        return [Ack()] * len(group)

    consumer = await twin.consumer(handler=slow)
    await publish(twin.publisher, message())
    await twin.idle()
    consumer.kill()
    free.set()
    await twin.idle()
    assert twin.broker.lookup(SCORING) == QueueDepth(SCORING, 1, 0, 0, 0)


async def test_a_closed_publisher_knows_nothing() -> None:
    twin = Twin()
    await twin.publisher.close()
    assert await publish(twin.publisher, message()) == [Confirm.UNKNOWN]
    await twin.publisher.start()
    assert await publish(twin.publisher, message()) == [Confirm.CONFIRMED]


# --- the fleet's topology ---------------------------------------------------------------------------------


async def test_every_rung_brings_an_entry_back_after_its_time() -> None:
    twin = Twin()
    await twin.consumer()
    await publish(twin.publisher, message(0, SCORING, rung_exchange("5s")), message(1, SCORING, rung_exchange("100ms")))
    assert twin.broker.next_due() == pytest.approx(0.1)
    await twin.pass_time(0.1)
    assert twin.bodies() == [b"body 1"]
    assert twin.broker.next_due() == pytest.approx(5.0)
    await twin.pass_time(4.8)
    assert len(twin.got) == 1
    await twin.pass_time(0.1)
    assert twin.bodies() == [b"body 1", b"body 0"]
    assert twin.broker.next_due() is None


async def test_the_twentieth_return_is_the_last_one() -> None:
    twin = Twin()
    await publish(twin.publisher, message())
    for _ in range(21):
        (await twin.consumer(handler=never)).kill()
    (parked,) = twin.broker.ready(parked_queue("scoring"))
    assert (parked.body, parked.routing_key) == (b"body 0", parked_queue("scoring"))
    assert parked.headers["x-first-death-queue"] == SCORING
    assert await twin.broker.depth([SCORING, parked_queue("scoring")]) == 1


async def test_a_queue_that_drops_counts_it() -> None:
    drops = {"max-length": 2, "overflow": "drop-head"}
    twin = Twin(wanted=Topology((), (Queue("m", "classic"),), (), (Policy("m", "^m$", drops),)))
    await publish(twin.publisher, *(message(place, "m", "") for place in range(5)))
    assert twin.broker.dropped["m", "maxlen"] == 3
    assert [m.message_id for m in twin.broker.ready("m")] == ["id-3", "id-4"]


async def test_a_queue_limited_in_bytes_refuses_softly() -> None:
    """It takes the message that crosses the limit, and takes again once it is down to four fifths."""
    twin = Twin(wanted=topology(1, queue_bytes=10))
    sent = [Message(WORK, SCORING, b"123456", f"id-{place}") for place in range(4)]
    assert [(await publish(twin.publisher, one))[0] for one in sent] == [
        Confirm.CONFIRMED,
        Confirm.CONFIRMED,
        Confirm.REFUSED,
        Confirm.REFUSED,
    ]
    await twin.consumer()
    assert await publish(twin.publisher, sent[2]) == [Confirm.CONFIRMED]


async def test_one_queue_that_refuses_makes_the_answer_and_the_others_have_the_message() -> None:
    full = Policy("full", "^full$", {"max-length": 0, "overflow": "reject-publish"})
    bindings = tuple(Binding("x", queue, "") for queue in ("full", "free"))
    wanted = Topology((Exchange("x", "fanout"),), (Queue("full", "classic"), Queue("free")), bindings, (full,))
    twin = Twin(wanted=wanted)
    assert await publish(twin.publisher, message(0, "", "x")) == [Confirm.REFUSED]
    assert len(twin.broker.ready("free")) == 1


async def test_what_follows_a_forged_message_on_its_channel_does_not_arrive() -> None:
    twin = Twin()
    forged = Message(WORK, SCORING, b"forged", "forged", user_id="somebody-else")
    answers = await publish(twin.publisher, message(0), forged, message(1))
    assert answers == [Confirm.CONFIRMED, Confirm.UNKNOWN, Confirm.UNKNOWN]
    assert [m.message_id for m in twin.broker.ready(SCORING)] == ["id-0"]
    assert await publish(twin.publisher, message(1)) == [Confirm.CONFIRMED]


async def test_a_tenants_ingest_queue_is_made_at_run_time() -> None:
    twin = Twin()
    event = message(0, "acme.risk", INGEST)
    await publish(twin.publisher, event)
    await twin.broker.apply(tenant_ingest("risk.ingest.acme", "acme"))
    await twin.broker.apply(tenant_ingest("risk.ingest.acme", "acme"))
    await publish(twin.publisher, message(1, "acme.risk", INGEST))
    assert [len(twin.broker.ready(name)) for name in (UNROUTED, "risk.ingest.acme")] == [1, 1]
    twin.broker.unbind(Binding(INGEST, "risk.ingest.acme", "acme.#"))
    await publish(twin.publisher, message(2, "acme.risk", INGEST))
    assert [len(twin.broker.ready(name)) for name in (UNROUTED, "risk.ingest.acme")] == [2, 1]


async def test_a_temporary_queue_goes_after_a_minute_without_consumers() -> None:
    twin = Twin()
    await twin.broker.declare_temporary("doctor")
    consumer = await twin.consumer("doctor")
    await twin.pass_time(120)
    assert twin.broker.lookup("doctor") is not None
    consumer.kill()
    await twin.pass_time(59)
    assert twin.broker.lookup("doctor") is not None
    await twin.pass_time(1)
    assert twin.broker.lookup("doctor") is None


async def test_an_exclusive_queue_is_one_connections_and_dies_with_it() -> None:
    twin = Twin()
    mine, other = (twin.broker.connect(name, lambda: None) for name in ("mine", "other"))
    twin.broker.declare_exclusive(mine, "reply", max_length=2)
    assert (
        await publish(twin.publisher, *(message(place, "reply", "") for place in range(3))) == [Confirm.CONFIRMED] * 3
    )
    assert [m.message_id for m in twin.broker.ready("reply")] == ["id-1", "id-2"]
    with pytest.raises(MessagingFailureError):
        twin.broker.declare_exclusive(other, "reply")
    with pytest.raises(MessagingFailureError):
        await twin.consumer("reply")
    twin.broker.disconnect(mine)
    assert await publish(twin.publisher, message(9, "reply", "")) == [Confirm.UNROUTABLE]


async def test_another_policy_holds_at_once() -> None:
    twin = Twin()
    await publish(twin.publisher, *(message(place) for place in range(5)))
    tighter = Policy("tight", r"\.scoring\.", {"max-length": 2, "overflow": "drop-head"}, priority=99)
    await twin.broker.apply(Topology((), (), (), (tighter,)))
    assert [m.message_id for m in twin.broker.ready(SCORING)] == ["id-3", "id-4"]


async def test_a_dead_letter_goes_in_no_circle() -> None:
    """RabbitMQ drops a dead letter that comes to a queue that it expired in; at least once it waits there."""
    circle = {"message-ttl": 1000, "dead-letter-exchange": "", "dead-letter-routing-key": "circle"}
    wanted = Topology((), (Queue("circle"),), (), (Policy("circle", "^circle$", circle),))
    twin = Twin(wanted=wanted)
    await publish(twin.publisher, message(0, "circle", ""))
    await twin.pass_time(1)
    assert await twin.broker.depth(["circle"]) == 0
    assert twin.broker.dropped["circle", "expired"] == 1


async def test_a_queue_of_one_message_serves_waiting_consumers_in_turn() -> None:
    twin, turns = Twin(), list[str]()

    def named(name: str) -> Callable[[Sequence[Delivery]], Awaitable[Sequence[Settlement]]]:
        async def take(group: Sequence[Delivery]) -> Sequence[Settlement]:
            turns.append(name)
            return [Ack()] * len(group)

        return take

    for name in ("a", "b", "c"):
        await twin.consumer(handler=named(name))
    for place in range(6):
        await publish(twin.publisher, message(place))
        await twin.idle()
    assert turns == ["a", "b", "c"] * 2


# --- replies ----------------------------------------------------------------------------------------------


def copy_for(replies: MemoryReplies, event_id: str = "e1") -> Message:
    return Message("", replies.address, b"decision", "m", {"event_id": event_id}, confirm=False, mandatory=False)


async def test_a_copy_reaches_everybody_who_waits_for_its_event() -> None:
    twin = Twin()
    replies = MemoryReplies(twin.broker, "boot")
    await replies.start()
    waits = [replies.wait(event_id, 5) for event_id in ("e1", "e1", "e2")]
    await publish(twin.publisher, copy_for(replies))
    assert [await waits[0], await waits[1], waits[2].done()] == [b"decision", b"decision", False]
    await twin.pass_time(5)
    assert await waits[2] is None
    assert twin.broker.lookup(replies.address) == QueueDepth(replies.address, 0, 0, 1, 0)
    last = replies.wait("e3", 5)
    await replies.close()
    assert await last is None
    assert twin.broker.lookup(replies.address) is None


async def test_a_restart_of_the_broker_costs_the_copies_that_came_meanwhile() -> None:
    twin = Twin()
    replies = MemoryReplies(twin.broker, "boot")
    await replies.start()
    wait = replies.wait("e1", 5)
    twin.broker.restart()
    await publish(twin.publisher, copy_for(replies))
    await twin.pass_time(0.2)
    assert not wait.done()
    await publish(twin.publisher, copy_for(replies))
    assert await wait == b"decision"
    await replies.close()


# --- whatever happens -------------------------------------------------------------------------------------


@dataclass
class Storm(Twin):
    """Random publishes, crashes and faults; `trace` is everything that a client could see."""

    seed: int = 0
    sent: dict[str, Confirm] = field(default_factory=dict)
    trace: list[object] = field(default_factory=list)
    consumers: list[MemoryConsumer] = field(default_factory=list)

    async def handle(self, group: Sequence[Delivery]) -> Sequence[Settlement]:
        self.trace += [(d.queue, d.message_id, d.redelivered, d.seen) for d in group]
        if self.chance.random() < 0.2:
            await self.clock.sleep(self.chance.choice((0.05, 0.5)))
        self.got += group
        return [Pause("chance") if self.chance.random() < 0.1 else Ack() for _ in group]

    async def run(self, steps: int) -> list[object]:
        self.chance = random.Random(self.seed)
        for _ in range(2):
            self.consumers.append(await self.consumer(SCORING, METRICS_QUEUE, handler=self.handle))
        for step in range(steps):
            await self.step(step)
            await self.pass_time(self.chance.choice((0, 0.01, 0.1, 1)))
        self.broker.alarm(False)
        self.broker.recover()
        for _ in range(20):
            await self.pass_time(1)
        return self.trace

    async def step(self, step: int) -> None:
        match self.chance.randrange(12):
            case 0:
                self.broker.faults.lose_confirms = self.chance.randrange(3)
            case 1:
                self.broker.faults.lose_messages = self.chance.randrange(3)
            case 2:
                self.broker.cut(self.chance.choice(("consumer", "publisher")))
            case 3:
                self.broker.restart()
            case 4:
                dead = self.consumers.pop(0)
                dead.kill()
                self.consumers.append(await self.consumer(SCORING, METRICS_QUEUE, handler=self.handle))
            case 5:
                self.broker.alarm(self.chance.random() < 0.3)
            case _:
                exchange = self.chance.choice((WORK, WORK, rung_exchange("100ms"), rung_exchange("1s")))
                some = [
                    Message(exchange, SCORING, b"x", f"{step}-{place}") for place in range(self.chance.randrange(1, 9))
                ]
                publishing = asyncio.create_task(publish(self.publisher, *some))
                await self.pass_time(0)
                if not publishing.done():
                    await self.pass_time(5)
                answers = await publishing
                self.trace += answers
                self.sent |= dict(zip((one.message_id for one in some), answers, strict=True))


@pytest.mark.parametrize("seed", range(8))
async def test_what_is_confirmed_is_worked_and_the_same_seed_tells_the_same_story(seed: int) -> None:
    storm = Storm(seed=seed)
    trace = await storm.run(40)
    worked = {delivery.message_id for delivery in storm.got}
    parked = {m.message_id for m in storm.broker.ready(parked_queue("scoring"))}
    assert {i for i, answer in storm.sent.items() if answer is Confirm.CONFIRMED} <= worked | parked
    assert worked <= set(storm.sent)
    left = {name for name, depth in storm.broker.depths().items() if depth.ready + depth.unacked + depth.stuck}
    assert left <= {parked_queue("scoring")}
    assert await Storm(seed=seed).run(40) == trace


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Topology((Exchange("x", "headers"),), (), (), ()), "unknown type"),
        (Topology((), (Queue("q", "stream"),), (), ()), "unknown type"),
        (Topology((), (Queue("q"),), (Binding("x", "q", ""),), ()), "missing"),
        (Topology((Exchange("x", "topic"),), (), (Binding("x", "q", ""),), ()), "missing"),
        (Topology((), (), (), (Policy("p", "q", {"max-age": 1}),)), "max-age"),
        (Topology((), (), (), (Policy("p", "q", {"overflow": "explode"}),)), "explode"),
        (Topology((), (), (), (Policy("p", "q", {"dead-letter-strategy": "never"}),)), "never"),
    ],
)
async def test_a_topology_that_does_not_fit_is_refused(wanted: Topology, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MemoryBroker(wanted, SteppingClock())
    with pytest.raises(MessagingFailureError, match=says):
        await Twin().broker.apply(wanted)


async def test_an_existing_thing_of_another_kind_is_refused() -> None:
    for wanted in (
        Topology((), (Queue(SCORING, "classic"),), (), ()),
        Topology((Exchange(INGEST, "direct"),), (), (), ()),
    ):
        with pytest.raises(MessagingFailureError):
            await Twin().broker.apply(wanted)


async def test_forged_death_headers_do_no_harm() -> None:
    twin = Twin()
    for place, forged in enumerate([None, "x", [1, "two"], {"queue": SCORING}]):
        headers = {"x-death": forged, "x-first-death-queue": 7}
        await publish(twin.publisher, Message(rung_exchange("100ms"), SCORING, b"x", f"id-{place}", headers))
    await twin.consumer()
    await twin.pass_time(0.1)
    assert len(twin.got) == 4
    assert {delivery.headers["x-death"][0]["queue"] for delivery in twin.got} == {rung_queue("100ms")}


# --- time -------------------------------------------------------------------------------------------------


async def test_run_wakes_for_what_is_due_first_even_when_it_came_later() -> None:
    twin = Twin()
    await twin.consumer()
    running = asyncio.create_task(twin.broker.run())
    await publish(twin.publisher, message(0, SCORING, rung_exchange("30s")))
    await twin.idle()
    await publish(twin.publisher, message(1, SCORING, rung_exchange("100ms")))
    await twin.idle()
    twin.clock.step(0.1)
    await twin.idle()
    assert twin.bodies() == [b"body 1"]
    twin.clock.step(29.9)
    await twin.idle()
    assert twin.bodies() == [b"body 1", b"body 0"]
    running.cancel()


async def test_linger_gathers_one_group() -> None:
    twin, groups = Twin(), list[int]()

    async def count(group: Sequence[Delivery]) -> Sequence[Settlement]:
        groups.append(len(group))
        return [Ack()] * len(group)

    async def probe() -> None:
        return

    consumer = twin.broker.consumer([SCORING], count, probe, ConsumerPolicy(group=64, linger_s=0.05))
    await consumer.start()
    for place in range(5):
        await publish(twin.publisher, message(place))
        await twin.pass_time(0.005)
    assert groups == []
    await twin.pass_time(0.05)
    assert groups == [5]
    await consumer.stop()


async def test_a_stepping_clock_wakes_sleepers_in_order_and_never_goes_back() -> None:
    clock, woken = SteppingClock(), list[float]()

    async def sleep(seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(seconds)

    tasks = [asyncio.create_task(sleep(seconds)) for seconds in (3, 1, 2)]
    await asyncio.sleep(0)
    assert clock.next_wake() == 1
    clock.step(2.5)
    await asyncio.sleep(0)
    assert woken == [1, 2]
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert clock.next_wake() is None
    with pytest.raises(ValueError, match="back"):
        clock.step(-1)


words = st.lists(st.sampled_from(["a", "b", ""]), max_size=4)
patterns = st.lists(st.sampled_from(["a", "b", "", "*", "#"]), max_size=4)


@settings(deadline=None)
@given(patterns, words)
def test_topic_patterns_match_by_their_definition(pattern: list[str], key: list[str]) -> None:
    def fits(pattern: list[str], key: list[str]) -> bool:
        if not pattern:
            return not key
        if pattern[0] == "#":
            return any(fits(pattern[1:], key[at:]) for at in range(len(key) + 1))
        return bool(key) and pattern[0] in ("*", key[0]) and fits(pattern[1:], key[1:])

    assert topic_matches(pattern, key) == fits(pattern, key)
