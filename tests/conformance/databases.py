"""What the conformance suites of the database's ports run against: the twin in memory, and PostgreSQL.

A suite asks for the fixture `database` and sees one of two `Bench`es: the ports, what tests need to look behind them,
and a way to lose the reply to the next commit. The tables of the server are shared by all tests of a session, so every
test has tenants of its own (`scope`, `fresh_scope()`).
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.events import canonical_json, event_id_of, parse_event
from contracts.failures import DatabaseError
from contracts.lifecycle import Status
from contracts.outcomes import STATUS_OF, Decision, Outcome, PolicyResult, PolicyVerdict, Reason
from contracts.ports import (
    DeadLetter,
    DeadLetters,
    DecisionFeed,
    LabelBook,
    Ledger,
    Message,
    Outbox,
    Past,
    Registry,
)
from contracts.state import (
    Created,
    Decided,
    EventState,
    Pin,
    Pins,
    Processed,
    SubjectHistory,
    Thresholds,
    Validated,
    begin,
)
from contracts.tenancy import TenantScope
from contracts.topology import Layouts
from deploy.migrations.upgrade import role_of, upgrade
from deploy.runtime import RandomIds
from deploy.servers import ServerUrls
from governance.access import KEY_BYTES, new_api_key
from governance.deadletters import LetterDesk
from governance.memory import (
    MemoryAuditLog,
    MemoryDatabase,
    MemoryDeadLetters,
    MemoryDecisionFeed,
    MemoryDirectory,
    MemoryLabelBook,
    MemoryLedger,
    MemoryLetterDesk,
    MemoryOutbox,
    MemoryRegistry,
    Transaction,
)
from governance.memory import enqueue as enqueue_in_memory
from governance.memory.ledger import APPROVALS, DECISIONS
from governance.memory.past import MemoryPast
from governance.memory.records import DEAD_LETTERS, LABELS, OUTBOX
from governance.postgres import (
    PostgresAuditLog,
    PostgresDeadLetters,
    PostgresDirectory,
    PostgresLedger,
    PostgresLetterDesk,
    PostgresRegistry,
    create_api_key,
    create_engine,
    create_tenant,
    transaction,
)
from governance.postgres.feed import PostgresDecisionFeed
from governance.postgres.labels import PostgresLabelBook
from governance.postgres.outbox import PostgresOutbox, enqueue
from governance.postgres.past import PostgresPast
from governance.registry import ANY_MODEL, SHARED, VersionStatus
from governance.signing import Signer, Statement, Verifier
from resilience.memory.time import SteppingClock

AT = "2026-01-31T12:00:00Z"
PEPPER = b"p" * 32
PARTITIONS = 4
SIGNER = Signer(b"s" * 32)
AGE_S = 5.0
"""After this many seconds no port's answer is older than the last change."""


class CommandFailedError(Exception):
    """A command that fails after its last statement: nothing of it may be seen."""


class Bench(ABC):
    """The ports on one database, and a look behind them."""

    clock: SteppingClock
    ledger: Ledger
    letters: DeadLetters
    desk: LetterDesk
    audit: MemoryAuditLog | PostgresAuditLog
    registry: Registry
    directory: MemoryDirectory | PostgresDirectory
    feed: DecisionFeed
    labels: LabelBook
    past: Past
    outbox: Outbox

    @abstractmethod
    def lose_reply(self) -> None:
        """Apply the next transaction, and lose the reply to its commit."""

    @abstractmethod
    async def approvals(self, scope: TenantScope, event_id: str) -> list[tuple[int, str, tuple[str, ...]]]:
        """(revision, status, reason codes) of an event's approvals."""

    @abstractmethod
    async def superseded(self, scope: TenantScope, event_id: str) -> list[str | None]:
        """What superseded each revision of an event's decision."""

    @abstractmethod
    async def add_revision(self, state: EventState, revision: int, outcome: Outcome) -> bytes:
        """As a person's answer does: the next revision of a decision; returns its bytes."""

    @abstractmethod
    async def letters_of(self, scope: TenantScope | None) -> list[tuple[str, str, str, int, str, bytes]]:
        """(letter, event, status, attempts, first failure, body) of each dead letter, by letter."""

    @abstractmethod
    async def written(self, scope: TenantScope | None) -> list[tuple[str, str, bytes, dict[str, Any]]]:
        """(message id, routing key, body, headers) of everything in the outbox, due or not, in order of writing."""

    @abstractmethod
    async def labels_of(self, scope: TenantScope) -> list[tuple[str, str, str, str, datetime, bytes]]:
        """(label id, event, label, source, effective at, body) of each label, by id."""

    @abstractmethod
    async def send(self, scope: TenantScope | None, messages: Sequence[Message], *, fail: bool = False) -> None:
        """A command that writes messages, and maybe fails at its end."""

    @abstractmethod
    async def create_tenant(
        self, scope: TenantScope, name: str = "", broker_user: str | None = None, thresholds: Thresholds | None = None
    ) -> bool:
        """Make a tenant."""

    @abstractmethod
    async def suspend(self, scope: TenantScope) -> None:
        """Suspend a tenant."""

    @abstractmethod
    async def create_key(self, scope: TenantScope) -> str:
        """Make an API key."""

    @abstractmethod
    async def change_key(self, key: str, *, expires_at: datetime | None = None) -> None:
        """Let a key expire at a time, or revoke it now."""

    @abstractmethod
    async def register(
        self,
        scope: TenantScope | None,
        name: str,
        content: bytes = b"{}",
        *,
        status: VersionStatus = VersionStatus.APPROVED,
        valid_until: datetime | None = None,
        at: str | None = None,
        kind: str = "model",
    ) -> Pin:
        """Add a version of this owner in this status; `at`: the place where it decides, whatever its status."""

    @abstractmethod
    async def set_status(self, scope: TenantScope, pin: Pin, status: VersionStatus) -> None:
        """Move a version on."""

    @abstractmethod
    async def halt(self, scope: TenantScope | None, model: str = ANY_MODEL, *, lift: bool = False) -> None:
        """Halt, or lift a halt."""


class MemoryBench(Bench):
    """The twin. Every call lets others run on its way, so that concurrent calls are."""

    def __init__(self) -> None:
        self.clock = SteppingClock()
        self.database = MemoryDatabase(self.clock, wire=lambda: asyncio.sleep(0))
        self.ledger = MemoryLedger(self.database)
        self.letters = MemoryDeadLetters(self.database)
        self.desk = MemoryLetterDesk(self.database, RandomIds(), Layouts.first(PARTITIONS))
        self.audit = MemoryAuditLog(self.database)
        self.memory_registry = MemoryRegistry(self.database)
        self.registry = self.memory_registry
        self.memory_directory = MemoryDirectory(self.database)
        self.directory = self.memory_directory
        self.feed = MemoryDecisionFeed(self.database)
        self.labels = MemoryLabelBook(self.database)
        self.past = MemoryPast(self.database)
        self.outbox = MemoryOutbox(self.database)

    def lose_reply(self) -> None:
        self.database.lose_replies(1)

    async def approvals(self, scope: TenantScope, event_id: str) -> list[tuple[int, str, tuple[str, ...]]]:
        rows = self.database.apply([scope], lambda tx: tx.find(APPROVALS, "event", scope.tenant_id, event_id))
        return [(row.revision, row.status, row.opening.reasons) for row in rows]

    async def superseded(self, scope: TenantScope, event_id: str) -> list[str | None]:
        rows = self.database.apply([scope], lambda tx: tx.find(DECISIONS, "event", scope.tenant_id, event_id))
        return [row.superseded_by for row in sorted(rows, key=lambda row: row.revision)]

    async def add_revision(self, state: EventState, revision: int, outcome: Outcome) -> bytes:
        answered = revised(state, revision, outcome)

        def work(tx: Transaction) -> None:
            first = tx.get(DECISIONS, state.scope.tenant_id, state.event_id, 1)
            assert first is not None
            tx.put(
                DECISIONS,
                replace(
                    first, revision=revision, outcome=outcome, decision=answered, decided_by="person", feed=tx.number
                ),
            )

        self.database.apply([state.scope], work)
        return answered

    async def letters_of(self, scope: TenantScope | None) -> list[tuple[str, str, str, int, str, bytes]]:
        rows = self.database.apply([scope], lambda tx: tx.rows(DEAD_LETTERS))
        return sorted((r.letter_id, r.event_id, r.status, r.attempts, _iso(r.first_failed_at), r.body) for r in rows)

    async def written(self, scope: TenantScope | None) -> list[tuple[str, str, bytes, dict[str, Any]]]:
        found = self.database.apply([scope], lambda tx: sorted(tx.rows(OUTBOX), key=lambda row: row.position))
        messages = [row.message for row in found]
        return [(one.message_id, one.routing_key, one.body, dict(one.headers)) for one in messages]

    async def labels_of(self, scope: TenantScope) -> list[tuple[str, str, str, str, datetime, bytes]]:
        rows = self.database.apply([scope], lambda tx: tx.rows(LABELS))
        return sorted((r.label_id, r.event_id, r.label, r.source, r.effective_at, r.body) for r in rows)

    async def send(self, scope: TenantScope | None, messages: Sequence[Message], *, fail: bool = False) -> None:
        def work(tx: Transaction) -> None:
            enqueue_in_memory(tx, scope, messages)
            if fail:
                raise CommandFailedError

        await self.database.run([scope], work)

    async def create_tenant(
        self, scope: TenantScope, name: str = "", broker_user: str | None = None, thresholds: Thresholds | None = None
    ) -> bool:
        return self.memory_directory.create_tenant(scope, name, broker_user, thresholds)

    async def suspend(self, scope: TenantScope) -> None:
        self.memory_directory.set_status(scope, "suspended")

    async def create_key(self, scope: TenantScope) -> str:
        key, _, _ = new_api_key(secrets.token_bytes(KEY_BYTES), PEPPER)
        self.memory_directory.create_api_key(scope, key)
        return key

    async def change_key(self, key: str, *, expires_at: datetime | None = None) -> None:
        if expires_at is None:
            self.memory_directory.revoke_api_key(key)
            return
        principal = await self.memory_directory.principal(key)
        assert principal is not None
        assert principal.scope is not None
        self.memory_directory.create_api_key(principal.scope, key, expires_at=expires_at)

    async def register(
        self,
        scope: TenantScope | None,
        name: str,
        content: bytes = b"{}",
        *,
        status: VersionStatus = VersionStatus.APPROVED,
        valid_until: datetime | None = None,
        at: str | None = None,
        kind: str = "model",
    ) -> Pin:
        pin = self.memory_registry.register(kind, name, content, scope=scope, status=status, valid_until=valid_until)
        if at is not None:
            self.memory_registry.activate(kind, pin, at, scope)
        return pin

    async def set_status(self, scope: TenantScope, pin: Pin, status: VersionStatus) -> None:
        self.memory_registry.set_status(pin, status)

    async def halt(self, scope: TenantScope | None, model: str = ANY_MODEL, *, lift: bool = False) -> None:
        change = self.memory_registry.resume if lift else self.memory_registry.halt
        change(scope, model)


class CommitCutter:
    """A way to a server on which the reply to a COMMIT can be lost, and its connection with it."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._armed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen; returns the port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """End every connection."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut_next(self) -> None:
        """Lose the reply to the next COMMIT."""
        self._armed = True

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._connect(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(*self._target)
        cut = asyncio.Event()

        async def there() -> None:
            while chunk := await reader.read(65_536):
                if self._armed and b"COMMIT" in chunk:
                    self._armed = False
                    cut.set()
                up_writer.write(chunk)
                await up_writer.drain()

        async def back() -> None:
            while chunk := await up_reader.read(65_536):
                if cut.is_set():  # the server has answered, so it has committed
                    return
                writer.write(chunk)
                await writer.drain()

        ways = [asyncio.ensure_future(there()), asyncio.ensure_future(back())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in (up_writer, writer):
                end.close()


class PostgresBench(Bench):
    """The server, reached through a CommitCutter."""

    def __init__(self, engine: AsyncEngine, owner: AsyncEngine, cutter: CommitCutter) -> None:
        self.engine = engine
        self._owner = owner
        self._cutter = cutter
        self.clock = SteppingClock()
        self.ledger = PostgresLedger(engine)
        self.letters = PostgresDeadLetters(engine, self.clock)
        self.desk = PostgresLetterDesk(engine, self.clock, RandomIds(), Layouts.first(PARTITIONS))
        self.audit = PostgresAuditLog(engine, self.clock)
        self.registry = PostgresRegistry(engine, self.clock, Verifier([SIGNER.public]))
        self.directory = PostgresDirectory(engine, self.clock, PEPPER)
        self.feed = PostgresDecisionFeed(engine)
        self.labels = PostgresLabelBook(engine)
        self.past = PostgresPast(engine)
        self.outbox = PostgresOutbox(engine)

    def lose_reply(self) -> None:
        self._cutter.cut_next()

    async def rows(self, scope: TenantScope | None, sql: str, **values: Any) -> list[Any]:
        """What a statement gives in a transaction of this tenant."""
        async with transaction(self.engine, [scope]) as connection:
            return list((await connection.execute(text(sql), values)).all())

    async def approvals(self, scope: TenantScope, event_id: str) -> list[tuple[int, str, tuple[str, ...]]]:
        sql = "SELECT revision, status, reasons FROM approvals WHERE event_id = :id ORDER BY revision"
        return [(r.revision, r.status, tuple(r.reasons)) for r in await self.rows(scope, sql, id=event_id)]

    async def superseded(self, scope: TenantScope, event_id: str) -> list[str | None]:
        sql = "SELECT superseded_by FROM decisions WHERE event_id = :id ORDER BY revision"
        return [row.superseded_by for row in await self.rows(scope, sql, id=event_id)]

    async def add_revision(self, state: EventState, revision: int, outcome: Outcome) -> bytes:
        answered = revised(state, revision, outcome)
        sql = """
            INSERT INTO decisions (tenant, event_id, revision, outcome, decided_by, body_digest, digest, decision,
                                   state, score, decided_at, superseded_by, corrects)
            SELECT tenant, event_id, :revision, :outcome, 'person', body_digest, digest, :decision, state, score,
                   decided_at, superseded_by, corrects FROM decisions WHERE event_id = :id AND revision = 1 RETURNING 1
        """
        values = {"revision": revision, "outcome": outcome.value, "decision": answered, "id": state.event_id}
        assert await self.rows(state.scope, sql, **values)
        return answered

    async def letters_of(self, scope: TenantScope | None) -> list[tuple[str, str, str, int, str, bytes]]:
        sql = "SELECT letter_id, event_id, status, attempts, first_failed_at, body FROM dead_letters"
        rows = await self.rows(scope, sql)
        return sorted((*row[:4], _iso(row.first_failed_at), bytes(row.body)) for row in rows)

    async def written(self, scope: TenantScope | None) -> list[tuple[str, str, bytes, dict[str, Any]]]:
        rows = await self.rows(scope, "SELECT message_id, routing_key, body, headers FROM outbox ORDER BY position")
        return [(row[0], row[1], bytes(row[2]), row[3]) for row in rows]

    async def labels_of(self, scope: TenantScope) -> list[tuple[str, str, str, str, datetime, bytes]]:
        rows = await self.rows(scope, "SELECT label_id, event_id, label, source, effective_at, body FROM labels")
        return sorted((*row[:5], bytes(row.body)) for row in rows)

    async def send(self, scope: TenantScope | None, messages: Sequence[Message], *, fail: bool = False) -> None:
        async with transaction(self.engine, [scope]) as connection:
            await enqueue(connection, scope, messages)
            if fail:
                raise CommandFailedError

    async def create_tenant(
        self, scope: TenantScope, name: str = "", broker_user: str | None = None, thresholds: Thresholds | None = None
    ) -> bool:
        return await create_tenant(self.engine, scope, name, broker_user, thresholds)

    async def suspend(self, scope: TenantScope) -> None:
        sql = "UPDATE tenants SET status = 'suspended' WHERE tenant_id = :id RETURNING 1"
        assert await self.rows(scope, sql, id=scope.tenant_id)

    async def create_key(self, scope: TenantScope) -> str:
        key, key_id, mac = new_api_key(secrets.token_bytes(KEY_BYTES), PEPPER)
        await create_api_key(self.engine, scope, key_id, mac)
        return key

    async def change_key(self, key: str, *, expires_at: datetime | None = None) -> None:
        change = "revoked_at = now()" if expires_at is None else "expires_at = :at"
        sql = f"UPDATE api_keys SET {change} WHERE key_id = :id RETURNING 1"
        values = {} if expires_at is None else {"at": expires_at}
        assert await self.rows(None, sql, id=key.rsplit("_", 1)[0][:16], **values)

    async def register(
        self,
        scope: TenantScope | None,
        name: str,
        content: bytes = b"{}",
        *,
        status: VersionStatus = VersionStatus.APPROVED,
        valid_until: datetime | None = None,
        at: str | None = None,
        kind: str = "model",
    ) -> Pin:
        digest, tenant = hashlib.sha256(content).hexdigest(), scope.tenant_id if scope else SHARED
        approved_at = datetime(2026, 1, 31, tzinfo=UTC)
        statement = Statement(kind, tenant, name, 1, digest, "ann", "bob", approved_at, valid_until)
        values: dict[str, Any] = {"tenant": tenant, "kind": kind, "name": name, "digest": digest, "content": content}
        values |= {"status": status.value, "until": valid_until, "approved_at": approved_at}
        values |= {"signature": SIGNER.sign(statement), "key_id": SIGNER.key_id}
        # Only the owner adds what is no draft, and lets something decide that may not; triggers are back at the end.
        async with transaction(self._owner, [scope], shared=True) as connection:
            await connection.execute(text("ALTER TABLE registry_active DISABLE TRIGGER gate"))
            await connection.execute(
                text(
                    "INSERT INTO registry_versions (tenant, kind, name, version, digest, content, status, author,"
                    " approver, reason, approved_at, valid_until, signature, key_id)"
                    " VALUES (:tenant, :kind, :name, 1, :digest, :content, :status, 'ann', 'bob', 'test',"
                    " :approved_at, :until, :signature, :key_id)"
                ),
                values,
            )
            if at is not None:
                await connection.execute(
                    text(
                        "INSERT INTO registry_active (tenant, kind, scope_key, name, version)"
                        " VALUES (:tenant, :kind, :at, :name, 1)"
                    ),
                    {"tenant": tenant, "kind": kind, "name": name, "at": at},
                )
            await connection.execute(text("ALTER TABLE registry_active ENABLE ALWAYS TRIGGER gate"))
        return Pin(name=name, version=1, digest=digest)

    async def set_status(self, scope: TenantScope, pin: Pin, status: VersionStatus) -> None:
        sql = "UPDATE registry_versions SET status = :status WHERE name = :name AND digest = :digest RETURNING 1"
        assert await self.rows(scope, sql, status=status.value, name=pin.name, digest=pin.digest)

    async def halt(self, scope: TenantScope | None, model: str = ANY_MODEL, *, lift: bool = False) -> None:
        sql = (
            "DELETE FROM halts WHERE tenant = :tenant AND model = :model"
            if lift
            else "INSERT INTO halts (tenant, model, reason, set_by, set_at) VALUES (:tenant, :model, '', '', now())"
        )
        async with transaction(self.engine, [scope], shared=True) as connection:
            await connection.execute(text(sql), {"tenant": scope.tenant_id if scope else SHARED, "model": model})


@functools.cache
def upgraded(migration_url: str, role: str) -> None:
    """Upgrade a database once per session."""
    upgrade(migration_url, role)


@pytest.fixture(params=["twin", pytest.param("postgresql", marks=pytest.mark.integration)])
def bench_name(request: pytest.FixtureRequest) -> str:
    """Which of the two, before anything is made: a server is not started for the twin."""
    name: str = request.param
    return name


@pytest.fixture
def urls(bench_name: str, request: pytest.FixtureRequest) -> ServerUrls | None:
    """The upgraded servers, if this test needs them. Not async: an upgrade runs a loop of its own."""
    if bench_name == "twin":
        return None
    servers: ServerUrls = request.getfixturevalue("servers")
    upgraded(servers.migration_database, role_of(servers.database))
    return servers


@pytest.fixture
async def database(urls: ServerUrls | None) -> AsyncIterator[Bench]:
    """The ports of the database, on either."""
    if urls is None:
        yield MemoryBench()
        return
    async with postgres_bench(urls) as bench:
        yield bench


@asynccontextmanager
async def postgres_bench(urls: ServerUrls) -> AsyncIterator[PostgresBench]:
    """The ports on PostgreSQL."""
    url = urlsplit(urls.database)
    cutter = CommitCutter(url.hostname or "127.0.0.1", url.port or 5432)
    port = await cutter.start()
    login = url.netloc.rpartition("@")[0]
    engine = create_engine(url._replace(netloc=f"{login}@127.0.0.1:{port}").geturl(), pool_size=8)
    owner = create_engine(urls.migration_database, pool_size=1)
    try:
        yield PostgresBench(engine, owner, cutter)
    finally:
        await engine.dispose()
        await owner.dispose()
        await cutter.stop()


@pytest.fixture(params=[1, 2, 64])
def size(request: pytest.FixtureRequest) -> int:
    """How many things one call carries."""
    number: int = request.param
    return number


@pytest.fixture
def scope() -> TenantScope:
    """A tenant of this test alone."""
    return fresh_scope()


def fresh_scope() -> TenantScope:
    return TenantScope("t" + secrets.token_hex(6))


async def lost(bench: Bench, call: Callable[[], Awaitable[object]]) -> None:
    """Make a call that is applied and whose reply is lost."""
    bench.lose_reply()
    with pytest.raises(DatabaseError):
        await call()


# --- what is written --------------------------------------------------------------------------------


def received(scope: TenantScope, identity: str = "e1", **fields: Any) -> EventState:
    document = {
        "id": identity,
        "kind": "risk",
        "type": "payment.card",
        "occurred_at": AT,
        "subject": {"type": "customer", "id": "c1"},
        "amount": {"value": "12.50", "currency": "EUR"},
    } | fields
    event_id = event_id_of(scope, identity)
    return begin(scope, event_id, parse_event(document), received_at=AT, source="http", correlation_id="corr")


def decided(state: EventState, outcome: Outcome = Outcome.APPROVED, score: float = 20.5) -> EventState:
    pins = Pins(now=AT, model=None, policy=None, guardrail=None, thresholds=Thresholds())
    policy = PolicyVerdict(result=PolicyResult.PASS)
    decision = Decision(
        event_id=state.event_id,
        tenant_id=state.scope.tenant_id,
        kind="risk",
        outcome=outcome,
        score=score,
        reasons=(Reason(code="R1", text="amount", weight=3.5), Reason(code="R2\0", text="age", weight=1)),
        policy=policy,
        guardrails=(),
        versions={"schema": 1},
        decided_at=AT,
    )
    first = state.transition(
        Status.CREATED, Created(at=AT, pins=pins, history=SubjectHistory()), stage="retrieval", detail={}
    )
    second = first.transition(
        Status.VALIDATED, Validated(at=AT, policy=policy, score=score, reasons=()), stage="scoring", detail={}
    )
    third = second.transition(Status.PROCESSING, Processed(at=AT, checks=()), stage="guardrail", detail={})
    return third.transition(
        STATUS_OF[outcome], Decided(at=AT, decision=decision), stage="decision", detail={"outcome": outcome}
    )


def canonical(state: EventState) -> bytes:
    """The canonical decision of a decided state."""
    assert state.decided is not None
    return canonical_json(state.decided.decision.model_dump(mode="json", exclude_none=True))


def revised(state: EventState, revision: int, outcome: Outcome) -> bytes:
    """A person's answer to a decision."""
    assert state.decided is not None
    changes = {"revision": revision, "outcome": outcome, "decided_by": "person"}
    return canonical_json(state.decided.decision.model_copy(update=changes).model_dump(mode="json", exclude_none=True))


def letter(scope: TenantScope | None, event_id: str, **changes: Any) -> DeadLetter:
    name = "l" + secrets.token_hex(8)
    made = DeadLetter(name, scope, event_id, "scoring", "c", "p", "E", "f", 3, AT, AT, b"b")
    return replace(made, **changes)


def _iso(at: datetime) -> str:
    return at.astimezone(UTC).isoformat()
