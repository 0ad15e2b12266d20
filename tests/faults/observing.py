"""What outsiders see of a run: the tenants' own queues, HTTP, PostgreSQL through a role that only reads, and counters.

Promises to read nothing from a process of the fleet but its answers and its published counters, and to count
conservatively: what a counter lost when its process died is not made up for. Judges nothing.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import orjson
import pika
import pika.exceptions
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.failures import InfrastructureError
from contracts.tenancy import TenantScope
from contracts.topology import METRICS_QUEUE, topology
from deploy import stream
from deploy.provision import DemoCredentials
from deploy.runtime import SystemClock
from governance.postgres import PostgresAuditLog, create_engine, transaction
from tests.faults.checker import Chain, EventSeen, Key, Letter, Rejection, Seen
from tests.faults.clients import PROBLEM
from tests.faults.load import canary, shown_in

_PAGE: Final = 1_000
OBSERVER: Final = "chaos_observer"


class Listener:
    """A tenant's own bound queue, read by a client of another make than the fleet's, in a thread of its own."""

    def __init__(self, amqp: str, tenant: DemoCredentials) -> None:
        """`amqp` is the broker's URL with any user."""
        self._url = stream.as_user(amqp, tenant.broker_user, tenant.broker_password)
        self._tenant = tenant.tenant
        self._queue = f"up.{tenant.tenant}.chaos"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=self._queue, daemon=True)
        self.seen: dict[tuple[str, int, str], Seen] = {}
        self.rejections: dict[str, Rejection] = {}
        self.foreign: list[str] = []
        self.messages = 0
        self.canaries: tuple[bytes, ...] = ()

    def start(self, canaries: Collection[str]) -> None:
        """Bind, and read from now on; `canaries` are the other tenants'."""
        self.canaries = tuple(word.encode() for word in canaries)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(20)

    def _run(self) -> None:
        while not self._stop.is_set():
            with suppress(pika.exceptions.AMQPError, OSError):
                self._listen()
            time.sleep(0.3)  # the broker restarts

    def _listen(self) -> None:
        parameters = pika.URLParameters(self._url)
        parameters.socket_timeout = parameters.blocked_connection_timeout = 5
        connection = pika.BlockingConnection(parameters)
        try:
            channel = connection.channel()
            channel.queue_declare(self._queue, durable=True, arguments={"x-queue-type": "quorum"})
            for exchange in ("risk.decisions", "risk.rejected"):
                channel.queue_bind(self._queue, exchange, f"{self._tenant}.#")
            channel.basic_qos(prefetch_count=200)
            channel.basic_consume(self._queue, self._take)
            while not self._stop.is_set():
                connection.process_data_events(0.2)
        finally:
            with suppress(pika.exceptions.AMQPError, OSError):
                connection.close()

    def _take(self, channel: Any, method: Any, properties: pika.BasicProperties, body: bytes) -> None:
        self.messages += 1
        self.foreign += [f"{self._tenant}'s queue holds another's canary" for word in self.canaries if word in body]
        document = orjson.loads(body)
        if "problem+json" in properties.content_type:
            self.rejections[str(properties.message_id)] = Rejection(
                self._tenant,
                document.get("event_id") or "",
                document.get("id") or document.get("message_id") or "",
                document["type"].removeprefix(PROBLEM),
            )
        else:
            shown = shown_in(document)
            assert shown is not None
            one = Seen("queue", (self._tenant, document["event_id"]), *shown)
            self.seen[one.key[1], one.revision, one.digest] = one
        channel.basic_ack(method.delivery_tag)


class Sampler:
    """Reads counters every second: what the metrics sink shows, and the broker's own count of redeliveries."""

    def __init__(self, metrics_url: str, management_url: str) -> None:
        """`metrics_url` is the sink's; `management_url` holds the user."""
        self._metrics_url = metrics_url
        parts = urlsplit(management_url)
        self._auth = (parts.username or "", parts.password or "")
        self._overview = f"http://{parts.hostname}:{parts.port}/api/overview?columns=message_stats"
        self._sums: Counter[str] = Counter()
        self._last: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """One last look, and end."""
        if self._task is not None:
            self._task.cancel()
        async with httpx.AsyncClient(timeout=5) as client:
            await self._look(client)

    def total(self, metric: str) -> int:
        """A counter over all its labels."""
        return int(sum(n for name, n in self._sums.items() if name.partition("{")[0] == metric))

    def labelled(self, metric: str, label: str) -> int:
        """A counter over the rows that hold this label's text."""
        return int(sum(n for name, n in self._sums.items() if name.startswith(metric) and label in name))

    @property
    def redelivered(self) -> int:
        """Messages that the broker delivered again."""
        return int(self._sums["broker:redeliver"])

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=2) as client:
            while True:
                await self._look(client)
                await asyncio.sleep(1.0)

    async def _look(self, client: httpx.AsyncClient) -> None:
        with suppress(httpx.HTTPError, ValueError):
            for line in (await client.get(self._metrics_url)).text.splitlines():
                name, _, value = line.rpartition(" ")
                if not line.startswith("#") and name.partition("{")[0].endswith("_total"):
                    self._add(name, float(value))
        with suppress(httpx.HTTPError, ValueError, AttributeError):
            stats = (await client.get(self._overview, auth=self._auth)).json().get("message_stats") or {}
            self._add("broker:redeliver", float(stats.get("redeliver", 0)))

    def _add(self, name: str, value: float) -> None:
        last = self._last.get(name, 0.0)
        self._sums[name] += int(value - last if value >= last else value)  # its process began anew
        self._last[name] = value


async def make_observer(migration_url: str, database_url: str) -> str:
    """A role that may read and do nothing else, bound by row-level security as everybody; answers its URL."""
    password, name = secrets.token_hex(16), urlsplit(database_url).path.strip("/")
    engine = create_engine(migration_url, pool_size=1)
    try:
        async with transaction(engine, ()) as connection:
            for statement in (
                f"CREATE ROLE {OBSERVER} LOGIN NOSUPERUSER NOBYPASSRLS PASSWORD '{password}'",
                f"GRANT CONNECT ON DATABASE {name} TO {OBSERVER}",
                f"ALTER ROLE {OBSERVER} SET default_transaction_read_only = on",
                f"GRANT SELECT ON events, decisions, dead_letters, audit_records, audit_heads, approvals TO {OBSERVER}",
            ):
                await connection.execute(text(statement))
    finally:
        await engine.dispose()
    parts = urlsplit(database_url)
    return f"postgresql://{OBSERVER}:{password}@{parts.hostname}:{parts.port}{parts.path}"


@dataclass(frozen=True, slots=True)
class Tables:
    """What the tables hold of some tenants."""

    events: list[EventSeen]
    decisions: list[Seen]
    letters: list[Letter]
    trails: dict[Key, tuple[int, int]]
    foreign: list[str]


class Database:
    """PostgreSQL as the observer's role sees it."""

    def __init__(self, url: str, scopes: Sequence[TenantScope]) -> None:
        """Nothing is connected yet."""
        self._engine: AsyncEngine = create_engine(url, pool_size=2, application_name="chaos-observer")
        self._scopes = list(scopes)

    async def close(self) -> None:
        """Close the connections."""
        await self._engine.dispose()

    async def progress(self) -> tuple[int, int, int]:
        """Events, first decisions and open letters, of all tenants together."""
        statement = text(
            "SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM decisions WHERE revision = 1),"
            " (SELECT count(*) FROM dead_letters WHERE status = 'open')"
        )
        async with transaction(self._engine, self._scopes) as connection:
            row = (await connection.execute(statement)).one()
        return int(row[0]), int(row[1]), int(row[2])

    async def ended(self) -> set[Key]:
        """Events that are decided or have a dead letter."""
        statement = text("SELECT tenant, event_id FROM decisions UNION SELECT tenant, event_id FROM dead_letters")
        async with transaction(self._engine, self._scopes) as connection:
            return {(row[0], row[1]) for row in await connection.execute(statement)}

    async def chains(self) -> list[Chain]:
        """What `riskfleet audit verify` does, with the observer's eyes."""
        found = []
        for scope in self._scopes:
            report = await PostgresAuditLog(self._engine, SystemClock()).verify(scope)
            found.append(
                Chain(
                    scope.tenant_id,
                    report.intact,
                    report.missing,
                    report.orphans,
                    report.records,
                    report.decisions,
                    report.problem or "",
                )
            )
        return found

    async def tables(self) -> Tables:
        """Everything, tenant by tenant."""
        tables = Tables([], [], [], {}, [])
        for scope in self._scopes:
            others = [canary(other.tenant_id).encode() for other in self._scopes if other != scope]
            await self._events(scope, others, tables)
            await self._letters(scope, others, tables)
            digests = await self._records(scope, others, tables)
            await self._decisions(scope, others, tables, digests)
        return tables

    async def _events(self, scope: TenantScope, others: Sequence[bytes], tables: Tables) -> None:
        async for event_id, body in self._rows(
            scope, "SELECT event_id AS k, body FROM events WHERE event_id > :k", "event_id"
        ):
            metadata = orjson.loads(body)["metadata"]
            tables.events.append(EventSeen((scope.tenant_id, event_id), metadata["variant"], int(metadata["shape"])))
            _look_for(others, body, f"{scope.tenant_id}'s event {event_id}", tables.foreign)

    async def _letters(self, scope: TenantScope, others: Sequence[bytes], tables: Tables) -> None:
        sql = "SELECT letter_id AS k, body, event_id, stage, problem, status FROM dead_letters WHERE letter_id > :k"
        async for letter_id, body, event_id, stage, problem, status in self._rows(scope, sql, "letter_id"):
            tables.letters.append(Letter((scope.tenant_id, event_id), stage, problem, status))
            _look_for(others, body, f"{scope.tenant_id}'s letter {letter_id}", tables.foreign)

    async def _records(self, scope: TenantScope, others: Sequence[bytes], tables: Tables) -> dict[str, set[str]]:
        """The digests of every event's audit records."""
        digests: dict[str, set[str]] = {}
        sql = "SELECT seq AS k, event_id, digest, body FROM audit_records WHERE seq > CAST(:k AS bigint)"
        async for seq, event_id, digest, body in self._rows(scope, sql, "seq", first=0):
            digests.setdefault(event_id, set()).add(digest)
            _look_for(others, body, f"{scope.tenant_id}'s audit record {seq}", tables.foreign)
        return digests

    async def _decisions(
        self, scope: TenantScope, others: Sequence[bytes], tables: Tables, digests: Mapping[str, set[str]]
    ) -> None:
        sql = (
            "SELECT event_id || ':' || revision AS k, event_id, revision, decision, state FROM decisions"
            " WHERE event_id || ':' || revision > :k"
        )
        async for _, event_id, revision, decision, state in self._rows(scope, sql, "event_id || ':' || revision"):
            key = (scope.tenant_id, event_id)
            shown = shown_in(orjson.loads(decision))
            assert shown is not None
            assert shown[0] == revision
            tables.decisions.append(Seen("rows", key, *shown))
            trail = {entry["digest"] for entry in orjson.loads(state)["trail"]}
            tables.trails[key] = (len(trail), len(trail & digests.get(event_id, set())))
            _look_for(others, bytes(decision) + bytes(state), f"{key}'s decision", tables.foreign)

    async def _rows(self, scope: TenantScope, sql: str, order: str, first: Any = "") -> AsyncIterator[tuple[Any, ...]]:
        last: Any = first
        statement = text(f"{sql} AND tenant = :tenant ORDER BY {order} LIMIT {_PAGE}")
        while True:
            async with transaction(self._engine, [scope]) as connection:
                rows = (await connection.execute(statement, {"k": last, "tenant": scope.tenant_id})).all()
            for row in rows:
                yield tuple(bytes(value) if isinstance(value, memoryview) else value for value in row)
            if len(rows) < _PAGE:
                return
            last = rows[-1][0]


def _look_for(others: Sequence[bytes], where: bytes, name: str, found: list[str]) -> None:
    found += [f"{name} holds another tenant's canary" for word in others if word in where]


async def read_feed(url: str, tenant: DemoCredentials, others: Sequence[str]) -> tuple[list[Seen], list[str]]:
    """Every decision of a tenant's feed from its beginning, and foreign canaries in it."""
    headers = {"Authorization": f"Bearer {tenant.api_key}"}
    seen: list[Seen] = []
    foreign: list[str] = []
    cursor: str | None = None
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as client:
        while True:
            after = {} if cursor is None else {"after": cursor}
            answer = await client.get("/v1/decisions", params={"limit": "500"} | after)
            answer.raise_for_status()
            _look_for([word.encode() for word in others], answer.content, f"{tenant.tenant}'s feed", foreign)
            page = answer.json()
            for document in page["decisions"]:
                shown = shown_in(document)
                assert shown is not None
                seen.append(Seen("feed", (tenant.tenant, document["event_id"]), *shown))
            if not page["decisions"]:
                return seen, foreign
            cursor = page["cursor"]


async def get_events(url: str, tenant: DemoCredentials, events: Sequence[str]) -> list[Seen]:
    """What GET says about some events' decisions; an event without one is left out."""
    headers = {"Authorization": f"Bearer {tenant.api_key}"}
    found: list[Seen] = []
    waiting = iter(events)

    async def reader() -> None:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as client:
            for event_id in waiting:
                answer = await client.get(f"/v1/events/{event_id}")
                if answer.status_code == 200 and (shown := shown_in(answer.json().get("decision"))):
                    found.append(Seen("get", (tenant.tenant, event_id), *shown))

    await asyncio.gather(*(reader() for _ in range(8)))
    return found


async def foreign_reads(url: str, reader: DemoCredentials, events: Sequence[str]) -> list[str]:
    """Events of another tenant that a tenant can see by their ids: none."""
    headers = {"Authorization": f"Bearer {reader.api_key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as client:
        answers = [(event_id, (await client.get(f"/v1/events/{event_id}")).status_code) for event_id in events]
    return [
        f"{reader.tenant} was answered {status} about another's {event_id}"
        for event_id, status in answers
        if status != 404
    ]


def depths(amqp: str, scopes: Sequence[TenantScope], partitions: int) -> dict[str, int]:
    """Ready messages of every queue but the metrics', as a passive declare tells them (the management API lags)."""
    names = [queue.name for queue in topology(partitions).queues if queue.name != METRICS_QUEUE]
    names += [scope.ingest_queue for scope in scopes]
    with pika.BlockingConnection(pika.URLParameters(amqp)) as connection:
        channel = connection.channel()
        return {name: int(channel.queue_declare(name, passive=True).method.message_count) for name in names}


async def unacked(management_url: str, scopes: Sequence[TenantScope], partitions: int) -> int:
    """Messages, delivered ones too, in all queues but the metrics', as the management API counts them."""
    parts = urlsplit(management_url)
    names = {queue.name for queue in topology(partitions).queues if queue.name != METRICS_QUEUE}
    names |= {scope.ingest_queue for scope in scopes}
    async with httpx.AsyncClient(auth=(parts.username or "", parts.password or ""), timeout=10) as client:
        answer = await client.get(f"http://{parts.hostname}:{parts.port}/api/queues?columns=name,messages")
    return sum(int(row.get("messages", 0)) for row in answer.json() if row["name"] in names)


async def until(look: Callable[[], Awaitable[bool]], within_s: float) -> float | None:
    """Seconds until `look` answered true; None when it never did. A server that does not answer is asked again."""
    began = time.monotonic()
    while time.monotonic() - began < within_s:
        with suppress(InfrastructureError, OSError, pika.exceptions.AMQPError, httpx.HTTPError):
            if await look():
                return round(time.monotonic() - began, 1)
        await asyncio.sleep(0.5)
    return None
