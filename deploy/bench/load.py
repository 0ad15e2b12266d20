"""The load: a backlog laid down by the door's own admission, or events sent open loop at a rate.

Open loop: the moment of each event is fixed before the run, a slow answer delays nobody, and a latency counts from that
moment, not from when the event could be sent; so a stall of the fleet is seen by every event that it meets
(coordinated omission: G. Tene, "How NOT to Measure Latency"). The HTTP client keeps connections and parses with
httptools, because the load shares the cores with what it measures.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools
import orjson

from contracts.codec import Entry, decode_carrier
from contracts.events import event_id_of
from contracts.messages import stage_message
from contracts.ports import Confirm, Message
from contracts.telemetry import Measurement
from contracts.tenancy import TenantScope
from contracts.topology import INGEST, Layouts
from deploy import stream
from deploy.provision import DemoCredentials
from deploy.runtime import RandomIds, SystemClock
from deploy.settings import Settings
from gateway.intake import Intake, IntakePorts, Refusal, Submission
from gateway.refusals import RefusalCounter, RefusalLog, RefusalPolicy
from governance.postgres import PostgresLedger, create_engine
from resilience.rabbit import RabbitPublisher
from resilience.redis import RedisStateStore, StatePolicy, connect, new_boot_id

Tick = Callable[[int], None]
Load = Sequence[tuple[DemoCredentials, bytes]]

_PUBLISH_AT_ONCE = 256
_MOST_CONNECTIONS = 1_000
_HOLD_S = 30


@dataclass(slots=True)
class Sent:
    """What the sender saw: refused and lost answers by status, and of each accepted event (tenant, event id) the
    intended time (wall clock, s) and the latency of its answer (s).
    """

    intended: dict[tuple[str, str], float] = field(default_factory=dict)
    latencies: dict[tuple[str, str], float] = field(default_factory=dict)
    decided: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    late_s: float = 0.0

    def note(self, status: int) -> None:
        """Count an answer."""
        self.statuses[status] = self.statuses.get(status, 0) + 1


class _Kept:
    """Publisher that keeps what the door would send, so that the backlog goes out when it is complete."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def publish(self, messages: Sequence[Message]) -> Sequence[Confirm]:
        self.messages += messages
        return [Confirm.CONFIRMED] * len(messages)


class _Silent:
    """Telemetry of a load generator: none."""

    def record(self, *measurements: Measurement) -> None:  # noqa: ARG002 - the port's signature
        return


async def backlog(settings: Settings, load: Load, *, single: bool, tick: Tick) -> int:
    """Admit every event as the gateway does (reserved in Redis) and publish the carriers; how many were admitted.

    `single` publishes one message per event, as a door without group commit would.
    """
    engine, clock, ids, kept = create_engine(settings.need("database_url")), SystemClock(), RandomIds(), _Kept()
    policy = StatePolicy(settings.lease_ms, settings.state_ttl, settings.tombstone_ttl)
    boot = new_boot_id(ids.token())
    store = RedisStateStore(connect(settings.need("redis_url")), boot, policy)
    publisher = RabbitPublisher(settings.need("rabbitmq_url"), name="riskfleet-bench", timeout_s=30)
    await publisher.start()
    layouts = Layouts.first(settings.partitions)  # its servers are its own and new
    try:
        refusals = RefusalLog(RefusalCounter(RefusalPolicy(boot)), publisher, _Silent(), clock, layouts)
        ports = IntakePorts(store, kept, PostgresLedger(engine), _Silent(), clock, ids)
        intake, admitted = Intake(ports, refusals, layouts), 0
        for start in range(0, len(load), 64):
            group = load[start : start + 64]
            verdicts = await asyncio.gather(*(intake.admit(_submission(*item)) for item in group))
            admitted += sum(not isinstance(verdict, Refusal) for verdict in verdicts)
            tick(admitted)
        messages = _singles(kept.messages, layouts) if single else kept.messages
        for start in range(0, len(messages), _PUBLISH_AT_ONCE):
            confirms = await publisher.publish(messages[start : start + _PUBLISH_AT_ONCE])
            if any(confirm is not Confirm.CONFIRMED for confirm in confirms):
                raise ConnectionError("RabbitMQ did not confirm the backlog")
        return admitted
    finally:
        await publisher.close()
        await store.close()
        await engine.dispose()


def _submission(tenant: DemoCredentials, body: bytes) -> Submission:
    return Submission(TenantScope(tenant.tenant), None, body, None, None, None, "http")


def _singles(messages: Sequence[Message], layouts: Layouts) -> list[Message]:
    entries = (entry for message in messages for entry in decode_carrier(message.body))
    return [stage_message(entry, layouts) for entry in entries if isinstance(entry, Entry)]


async def open_loop(load: Load, rate: float, send: Callable[[int, float], Awaitable[None]], tick: Tick) -> float:
    """Call `send(number, intended)` at its moment for each event; returns by how many seconds the sender itself was
    late at worst. A late sender is the load generator's fault, and the report says so.
    """
    loop, tasks, late = asyncio.get_running_loop(), set[asyncio.Task[None]](), 0.0
    began = loop.time() + 0.1
    for number in range(len(load)):
        moment = began + number / rate
        if (pause := moment - loop.time()) > 0:
            await asyncio.sleep(pause)
        late = max(late, loop.time() - moment)
        task = asyncio.ensure_future(send(number, moment))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        tick(number + 1)
    await asyncio.gather(*tasks)
    return late


async def by_http(url: str, load: Load, rate: float, sent: Sent, tick: Tick) -> None:
    """POST each event with `Prefer: wait`, so that its latency ends when the caller holds the decision."""
    connections, loop = _Connections(url), asyncio.get_running_loop()
    offset = time.time() - loop.time()

    async def send(number: int, moment: float) -> None:
        tenant, body = load[number]
        status, answer = await connections.post("/v1/events", tenant.api_key, body)
        sent.note(status)
        if status not in (200, 202):
            return
        key = (tenant.tenant, str(orjson.loads(answer)["event_id"]))
        sent.intended[key] = moment + offset
        if status == 200:
            sent.decided += 1
            sent.latencies[key] = loop.time() - moment

    try:
        sent.late_s = await open_loop(load, rate, send, tick)
    finally:
        connections.close()


async def by_amqp(settings: Settings, load: Load, rate: float, sent: Sent, tick: Tick) -> None:
    """Publish each event as its tenant's own broker user; its latency ends at the decision's own time."""
    loop, publishers = asyncio.get_running_loop(), dict[str, RabbitPublisher]()
    offset = time.time() - loop.time()

    async def send(number: int, moment: float) -> None:
        tenant, body = load[number]
        event = orjson.loads(body)
        message = Message(
            INGEST,
            TenantScope(tenant.tenant).routing_key(event["kind"]),
            body,
            event["id"],
            content_type="application/json",
            user_id=tenant.broker_user,
        )
        (confirm,) = await publishers[tenant.tenant].publish([message])
        sent.note(202 if confirm is Confirm.CONFIRMED else 503)
        if confirm is Confirm.CONFIRMED:
            sent.intended[tenant.tenant, event_id_of(TenantScope(tenant.tenant), event["id"])] = moment + offset

    try:
        for tenant in {item[0].tenant: item[0] for item in load}.values():
            url = stream.as_user(settings.need("rabbitmq_url"), tenant.broker_user, tenant.broker_password)
            publishers[tenant.tenant] = RabbitPublisher(url, name="riskfleet-bench")
            await publishers[tenant.tenant].start()
        sent.late_s = await open_loop(load, rate, send, tick)
    finally:
        for publisher in publishers.values():
            await publisher.close()


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection with one request under way at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._begin()

    def _begin(self) -> None:
        self._parser, self._body = httptools.HttpResponseParser(self), b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class, which is none of asyncio's

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        status, body = self._parser.get_status_code(), self._body
        if status >= 200 and self._answer is not None and not self._answer.done():
            self._answer.set_result((status, body))
        self._body = b""

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((0, b""))

    @property
    def usable(self) -> bool:
        """Whether another request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body; status 0 when the connection was lost."""
        if self._transport is None:
            return 0, b""
        self._answer = asyncio.get_running_loop().create_future()
        self._begin()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.close()


class _Connections:
    """Kept connections to one gateway; as many as requests are under way, up to a bound."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._idle: list[_Connection] = []
        self._room = asyncio.Semaphore(_MOST_CONNECTIONS)

    async def post(self, path: str, key: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of one POST; status 0 when there is no answer."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nPrefer: wait={_HOLD_S}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        async with self._room:
            connection = await self._take()
            if connection is None:
                return 0, b""
            answer = await connection.ask(head.encode() + body)
            if connection.usable:
                self._idle.append(connection)
            return answer

    async def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        try:
            _, made = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        except OSError:
            return None
        return made

    def close(self) -> None:
        """Close what is idle."""
        for connection in self._idle:
            connection.close()
