"""What the conformance suites run against: the in-memory twin, and the real adapter on a private server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import pytest

from contracts.ports import Publisher, StateStore
from contracts.topology import Topology
from deploy.servers import ServerUrls
from resilience.management import BrokerManagement
from resilience.memory import MemoryBroker, MemoryConsumer, MemoryRedis, MemoryStateStore, SteppingClock
from resilience.rabbit import ConsumerPolicy, Handler, PausePolicy, Probe, RabbitConsumer, RabbitPublisher, _close
from resilience.redis import RedisStateStore, StatePolicy, connect

LEASE_MS = 10_000
SHORT_LEASE_MS = 60
DATABASE = 9  # the integration tests use 0


@pytest.fixture(params=[1, 2, 64])
def size(request: pytest.FixtureRequest) -> int:
    """How many entries one call carries."""
    number: int = request.param
    return number


# --- state store ------------------------------------------------------------------------------------------


@dataclass
class StateStores:
    """Makes processes on one server. `wipe` is FLUSHALL, `wait` lets its time pass, `silence` ends a heartbeat.

    `lose_reply`: the next answer to this process is lost after the server carried the call out.
    """

    make: Callable[[str, StatePolicy], StateStore]
    wipe: Callable[[], Awaitable[object]]
    wait: Callable[[int], Awaitable[None]]
    silence: Callable[[str], Awaitable[object]]
    lose_reply: Callable[[StateStore], None]

    def process(self, boot: str = "one", lease_ms: int = LEASE_MS, **times: int) -> StateStore:
        """`times`: other fields of the StatePolicy."""
        return self.make(f"elsewhere:{boot}:1", StatePolicy(lease_ms=lease_ms, **times))

    async def expire(self) -> None:
        """A short lease runs out."""
        await self.wait(SHORT_LEASE_MS)


@pytest.fixture(params=["twin", pytest.param("redis", marks=pytest.mark.integration)])
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[StateStores]:
    """State stores on an empty server."""
    if request.param == "twin":
        yield twin_stores()
        return
    url: str = request.getfixturevalue("servers").redis
    async with wire_to(url) as wire, redis_stores(wire.url(url, f"/{DATABASE}"), wire) as found:
        yield found


def twin_stores() -> StateStores:
    clock = SteppingClock()
    server = MemoryRedis(clock)

    async def wipe() -> None:
        server.flush()

    async def wait(milliseconds: int) -> None:
        clock.step((milliseconds + 1) / 1000)

    async def silence(boot: str) -> None:
        server.silence(f"elsewhere:{boot}:1")

    def lose_reply(store: StateStore) -> None:
        assert isinstance(store, MemoryStateStore)
        store.lose_replies = 1

    return StateStores(lambda boot, policy: MemoryStateStore(server, boot, policy), wipe, wait, silence, lose_reply)


@contextlib.asynccontextmanager
async def redis_stores(url: str, wire: LossyWire) -> AsyncIterator[StateStores]:
    client = connect(url)

    async def wait(milliseconds: int) -> None:
        # Redis keeps the time: a key of the same length that is gone says that it passed.
        await client.set("lease", b"1", px=milliseconds + 1)
        async with asyncio.timeout(5 + milliseconds / 1000):
            while await client.exists("lease"):  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.005)

    async def silence(boot: str) -> None:
        await client.delete(f"rf:hb:elsewhere:{boot}:1")

    def lose_reply(store: StateStore) -> None:
        wire.swallow = 1

    await client.flushdb()
    try:
        yield StateStores(
            lambda boot, policy: RedisStateStore(client, boot, policy), client.flushdb, wait, silence, lose_reply
        )
    finally:
        await client.flushdb()
        await client.aclose()
        await client.connection_pool.disconnect()


def wire_to(url: str) -> LossyWire:
    """A wire to the server of a URL."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return LossyWire(parts.hostname, parts.port)


@dataclass
class LossyWire:
    """A TCP relay in front of a server: cuts every connection, or instead of handing on the next `swallow` replies."""

    host: str
    server_port: int
    swallow: int = 0
    port: int = 0
    _ends: set[asyncio.StreamWriter] = field(default_factory=set)
    _server: asyncio.Server | None = None

    def url(self, url: str, path: str | None = None) -> str:
        """The server's URL through this wire."""
        parts = urlsplit(url)
        there = f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{self.port}"
        return parts._replace(netloc=there, path=parts.path if path is None else path).geturl()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1")
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Abort every connection that runs through here now."""
        for end in self._ends:
            end.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self.host, self.server_port)
        self._ends |= {writer, back}
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer, replies=True))
        self._ends -= {writer, back}

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, replies: bool = False) -> None:
        with contextlib.suppress(ConnectionError):
            while some := await source.read(65_536):
                if replies and self.swallow:
                    self.swallow -= 1
                    break
                target.write(some)
                await target.drain()
        target.close()


# --- broker -----------------------------------------------------------------------------------------------


class Consumer(Protocol):
    """What RabbitConsumer and its twin have in common."""

    paused_reason: str | None

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    @property
    def queues(self) -> tuple[str, ...]: ...

    async def add_queue(self, queue: str) -> None: ...
    async def drop_queue(self, queue: str) -> None: ...


class Topologies(Protocol):
    """What BrokerManagement and the twin have in common."""

    async def apply(self, wanted: Topology) -> int: ...
    async def declare_temporary(self, name: str) -> None: ...
    async def delete_queue(self, name: str) -> None: ...


async def nothing() -> None:
    """A probe that always finds every server up."""


@dataclass
class Brokers:
    """Clients of one broker. `kill` ends a consumer as kill -9 does, `cut` its connection only; `waiting` is what it
    was given and its handler was not.

    `pass_time` lets so many seconds of the broker's time pass, which `now` tells (seconds).
    """

    management: Topologies
    make_consumer: Callable[[Sequence[str], Handler, Probe, ConsumerPolicy], Consumer]
    make_publisher: Callable[[], Awaitable[Publisher]]
    kill: Callable[[Consumer], Awaitable[None]]
    cut: Callable[[Consumer], Awaitable[None]]
    waiting: Callable[[Consumer], int]
    pass_time: Callable[[float], Awaitable[None]]
    now: Callable[[], float]
    user: str
    started: list[Consumer] = field(default_factory=list)

    async def publisher(self) -> Publisher:
        return await self.make_publisher()

    async def consumer(
        self, queues: Sequence[str], handler: Handler, probe: Probe = nothing, **changes: Any
    ) -> Consumer:
        """A started consumer; `changes` of the policy."""
        pause = PausePolicy(first_probe_s=0.02, longest_probe_s=0.1)
        consumer = self.make_consumer(queues, handler, probe, replace(ConsumerPolicy(pause=pause), **changes))
        await consumer.start()
        self.started.append(consumer)
        return consumer

    async def until(self, what: str, good: Callable[[], bool], within_s: float = 10.0) -> None:
        """Let time pass until something is so; fails at the deadline."""
        deadline = asyncio.get_running_loop().time() + within_s
        while not good():
            assert asyncio.get_running_loop().time() < deadline, f"not within {within_s:.0f} s: {what}"
            await self.pass_time(0.01)


@pytest.fixture(scope="module", params=["twin", pytest.param("rabbitmq", marks=pytest.mark.integration)])
def broker_urls(request: pytest.FixtureRequest) -> Iterator[ServerUrls | None]:
    """A real broker that holds the suite's topology in new queues; None for the twin."""
    if request.param == "twin":
        yield None
        return
    servers: ServerUrls = request.getfixturevalue("servers")
    wanted: Topology = request.module.TOPOLOGY

    async def renew(*, apply: bool) -> None:
        management = BrokerManagement(servers.rabbitmq_management)
        await asyncio.gather(*(management.delete_queue(queue.name) for queue in wanted.queues))
        if apply:
            await management.apply(wanted)
        await management.close()

    asyncio.run(renew(apply=True))
    yield servers
    asyncio.run(renew(apply=False))


@pytest.fixture
async def brokers(request: pytest.FixtureRequest, broker_urls: ServerUrls | None) -> AsyncIterator[Brokers]:
    """A broker with the suite's topology and empty queues."""
    wanted: Topology = request.module.TOPOLOGY
    if broker_urls is None:
        found = twin_brokers(wanted)
        yield found
        await _end(found)
        return
    management = BrokerManagement(broker_urls.rabbitmq_management)
    for queue in wanted.queues:
        await management._call("DELETE", f"queues/%2F/{queue.name}/contents")
    async with wire_to(broker_urls.rabbitmq) as wire:
        found, publishers = rabbit_brokers(broker_urls.rabbitmq, management, wire)
        try:
            yield found
        finally:
            await _end(found)
            await asyncio.gather(*(publisher.close() for publisher in publishers))
    # The client tells the channels of a closed connection of it in tasks of their own, which outlive the close.
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=2)


async def _end(brokers: Brokers) -> None:
    await asyncio.gather(*(brokers.kill(consumer) for consumer in brokers.started))


def twin_brokers(wanted: Topology) -> Brokers:
    clock = SteppingClock()
    broker = MemoryBroker(wanted, clock, sleep=clock.sleep)

    async def make_publisher() -> Publisher:
        return broker.publisher()

    async def kill(consumer: Consumer) -> None:
        assert isinstance(consumer, MemoryConsumer)
        consumer.kill()

    async def cut(consumer: Consumer) -> None:
        broker.cut("consumer")

    def waiting(consumer: Consumer) -> int:
        assert isinstance(consumer, MemoryConsumer)
        return consumer._waiting.qsize()

    async def pass_time(seconds: float) -> None:
        clock.step(seconds)
        await broker.advance()

    return Brokers(broker, broker.consumer, make_publisher, kill, cut, waiting, pass_time, clock.monotonic, broker.user)


def rabbit_brokers(url: str, management: BrokerManagement, wire: LossyWire) -> tuple[Brokers, list[RabbitPublisher]]:
    publishers: list[RabbitPublisher] = []

    def make_consumer(queues: Sequence[str], handler: Handler, probe: Probe, policy: ConsumerPolicy) -> Consumer:
        return RabbitConsumer(wire.url(url), queues, handler, probe, policy)

    async def make_publisher() -> Publisher:
        publishers.append(RabbitPublisher(url, name="conformance"))
        await publishers[-1].start()
        return publishers[-1]

    async def kill(consumer: Consumer) -> None:
        """Its tasks end without settling anything, then the connection: what a dead process leaves."""
        assert isinstance(consumer, RabbitConsumer)
        tasks = [task for task in (consumer._loop, consumer._watcher) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        broker, consumer._broker = consumer._broker, None
        if broker is not None:
            await _close(broker, consumer._losses)

    async def cut(consumer: Consumer) -> None:
        wire.cut()

    def waiting(consumer: Consumer) -> int:
        assert isinstance(consumer, RabbitConsumer)
        return consumer._waiting.qsize()

    user = str(urlsplit(url).username)
    return Brokers(
        management, make_consumer, make_publisher, kill, cut, waiting, asyncio.sleep, time.monotonic, user
    ), publishers
