"""What PostgreSQL promises the fleet: one owner, one outcome, one chain, and no row of another tenant."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contracts.codec import state_from_bytes
from contracts.events import canonical_json, event_id_of, parse_event
from contracts.failures import (
    DatabaseError,
    InvalidMetadataError,
    InvalidModelStateError,
    InvalidTenantError,
    ModelNotApprovedError,
)
from contracts.lifecycle import Status
from contracts.outcomes import STATUS_OF, Decision, Outcome, PolicyResult, PolicyVerdict, Reason
from contracts.ports import DeadLetter
from contracts.state import (
    AuditRecord,
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
from deploy.migrations.upgrade import default_artifacts, role_of, upgrade
from deploy.servers import ServerUrls
from governance.access import KEY_BYTES, new_api_key
from governance.postgres import (
    PostgresAuditLog,
    PostgresDeadLetters,
    PostgresDirectory,
    PostgresLedger,
    PostgresRegistry,
    UnsafeDatabaseError,
    check_settings,
    counts,
    create_api_key,
    create_engine,
    create_first_admin,
    create_tenant,
    event_summary,
    has_users,
    insert_and_roll_back,
    ping,
    tenant_ids,
    transaction,
)
from governance.postgres.schema import metadata

pytestmark = pytest.mark.integration

AT = "2026-01-31T12:00:00Z"
PEPPER = b"p" * 32


@dataclass
class SetClock:
    """A clock that a test moves by hand."""

    seconds: float = 100.0

    def now(self) -> datetime:
        return datetime(2026, 1, 31, 12, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture(scope="module")
def database(servers: ServerUrls) -> ServerUrls:
    upgrade(servers.migration_database, role_of(servers.database))
    return servers


@pytest.fixture
async def engine(database: ServerUrls) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(database.database, pool_size=8)
    yield engine
    await engine.dispose()


@pytest.fixture
async def owner(database: ServerUrls) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(database.migration_database, pool_size=1)
    yield engine
    await engine.dispose()


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def scope() -> TenantScope:
    """Every test has a tenant of its own: the tables are shared, and the audit cannot be emptied."""
    return fresh_scope()


def fresh_scope() -> TenantScope:
    return TenantScope("t" + secrets.token_hex(6))


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
        reasons=(Reason(code="R1", text="amount", weight=3.5), Reason(code="R2", text="age", weight=1)),
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


async def rows(engine: AsyncEngine, scopes: Sequence[TenantScope | None], sql: str, **values: Any) -> list[Any]:
    async with transaction(engine, scopes) as connection:
        return list((await connection.execute(text(sql), values)).all())


# --- schema and settings ------------------------------------------------------------------------------


async def test_tables_are_what_the_schema_module_says(database: ServerUrls, owner: AsyncEngine) -> None:
    def differences(connection: Connection) -> list[Any]:
        options = {"compare_type": True, "include_name": lambda name, kind, parents: name != "alembic_version"}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))

    async with owner.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_an_upgrade_may_be_repeated(database: ServerUrls) -> None:
    await asyncio.gather(
        *(asyncio.to_thread(upgrade, database.migration_database, role_of(database.database)) for _ in range(2))
    )


async def test_the_application_role_passes_and_the_owner_is_refused(engine: AsyncEngine, owner: AsyncEngine) -> None:
    await check_settings(engine)
    assert (await ping(engine))[0].isdigit()
    await insert_and_roll_back(engine)
    assert await rows(engine, [], "SELECT 1 FROM users WHERE user_id = 'doctor'") == []
    with pytest.raises(UnsafeDatabaseError, match="owns tables"):
        await check_settings(owner)


async def test_synchronous_commit_off_is_refused(engine: AsyncEngine, database: ServerUrls) -> None:
    careless = create_engine(database.database)

    @event.listens_for(careless.sync_engine, "connect")
    def careless_session(connection: Any, record: object) -> None:
        connection.cursor().execute("SET synchronous_commit = off")
        connection.commit()

    try:
        with pytest.raises(UnsafeDatabaseError, match="synchronous_commit is off"):
            await check_settings(careless)
    finally:
        await careless.dispose()


# --- ledger -------------------------------------------------------------------------------------------


async def test_the_first_body_owns_the_identity(engine: AsyncEngine, scope: TenantScope) -> None:
    ledger = PostgresLedger(engine)
    first, other = received(scope), received(scope, text="another body")
    (row,) = await ledger.record_events([first])
    assert row.body_digest == first.body_digest
    assert row.decision is None
    (again,) = await ledger.record_events([other])
    assert again.body_digest == first.body_digest != other.body_digest
    assert list(await ledger.known([(scope, first.event_id), (scope, "0" * 32)])) == [True, False]


async def test_a_batch_with_one_key_twice_is_answered_by_position(engine: AsyncEngine, scope: TenantScope) -> None:
    first, other, third = received(scope), received(scope, text="x"), received(scope, "e0")
    answers = await PostgresLedger(engine).record_events([first, other, third, first])
    assert [a.body_digest for a in answers] == [first.body_digest] * 2 + [third.body_digest, first.body_digest]


async def test_odd_texts_do_not_fail_their_batch(engine: AsyncEngine, scope: TenantScope) -> None:
    """The doors refuse such texts today; a row from an older door must still not take its neighbours with it."""
    plain, last = received(scope, "odd"), received(scope, "late", amount=None)
    party = plain.event.subject.model_copy(update={"type": "a\0b", "id": "x\0"})
    changes = {"id": "nul\0", "subject": party, "occurred_at": "0001-01-01T00:00:00+14:00"}
    odd = replace(plain, event=plain.event.model_copy(update=changes), correlation_id="c\0")
    late = replace(last, event=last.event.model_copy(update={"occurred_at": "9999-12-31T23:59:59-14:00"}))
    answers = await PostgresLedger(engine).record_events([odd, late])
    assert [a.body_digest for a in answers] == [odd.body_digest, late.body_digest]
    histories = await PostgresLedger(engine).histories([odd, late])
    assert histories[0] == SubjectHistory()


async def test_the_first_decision_stands(engine: AsyncEngine, scope: TenantScope) -> None:
    ledger = PostgresLedger(engine)
    state = received(scope)
    await ledger.record_events([state])
    winner, loser = decided(state, Outcome.REQUIRE_APPROVAL), decided(state, Outcome.REJECTED, 99)
    (won,) = await ledger.decide([winner])
    (lost,) = await ledger.decide([loser])
    assert won == lost
    assert won.state == winner.to_bytes()
    assert winner.decided is not None
    assert won.decision == canonical_json(winner.decided.decision.model_dump(mode="json", exclude_none=True))
    assert (won.revision, won.outcome, won.body_digest) == (1, "REQUIRE_APPROVAL", state.body_digest)
    assert (await ledger.record_events([state]))[0].decision == won
    assert list(await ledger.decisions([(scope, "f" * 32), (scope, state.event_id)])) == [None, won]
    approvals = await rows(engine, [scope], "SELECT event_id, status, reasons FROM approvals")
    assert [tuple(row) for row in approvals] == [(state.event_id, "open", ["R1", "R2"])]


async def test_only_the_winner_opens_an_approval(engine: AsyncEngine, scope: TenantScope) -> None:
    ledger = PostgresLedger(engine)
    state = received(scope)
    both = [decided(state, Outcome.APPROVED), decided(state, Outcome.REQUIRE_APPROVAL)]
    answers = await ledger.decide(both)
    assert [row.outcome for row in answers] == ["APPROVED", "APPROVED"]
    assert await rows(engine, [scope], "SELECT 1 FROM approvals") == []


async def test_concurrent_decisions_agree(engine: AsyncEngine, scope: TenantScope) -> None:
    ledger = PostgresLedger(engine)
    events = [received(scope, f"e{i}") for i in range(20)]
    batches = [[decided(e, outcome) for e in events[:: 1 if i % 2 else -1]] for i, outcome in enumerate(Outcome)]
    answers = await asyncio.gather(*(ledger.decide(batch) for batch in batches))
    by_event: dict[str, set[bytes]] = {}
    for batch, answer in zip(batches, answers, strict=True):
        for state, row in zip(batch, answer, strict=True):
            by_event.setdefault(state.event_id, set()).add(row.decision)
    assert all(len(decisions) == 1 for decisions in by_event.values())
    need = await rows(engine, [scope], "SELECT event_id FROM decisions WHERE outcome = 'REQUIRE_APPROVAL'")
    opened = await rows(engine, [scope], "SELECT event_id FROM approvals")
    assert sorted(need) == sorted(opened)


async def test_histories_count_the_subject_before_the_event(engine: AsyncEngine, scope: TenantScope) -> None:
    ledger = PostgresLedger(engine)
    at = datetime(2026, 1, 31, 12, tzinfo=UTC)

    def earlier(name: str, ago: timedelta, **fields: Any) -> EventState:
        return received(scope, name, occurred_at=(at - ago).isoformat(), **fields)

    now = earlier("now", timedelta())
    await ledger.record_events(
        [
            now,
            earlier("hour", timedelta(hours=1)),
            earlier("just-outside-a-day", timedelta(hours=24)),
            earlier("week", timedelta(days=7), amount={"value": "0.000000001", "currency": "EUR"}),
            earlier("dollars", timedelta(days=7), amount={"value": "1000", "currency": "USD"}),
            earlier("old", timedelta(days=40)),
            earlier("later", timedelta(hours=-1)),
            earlier("somebody-else", timedelta(hours=1), subject={"type": "customer", "id": "c2"}),
            received(fresh_scope(), "foreign"),
        ]
    )
    history, nothing = await ledger.histories([now, received(scope, "new", subject={"type": "customer", "id": "c9"})])
    assert history == SubjectHistory(
        events_1d=1, events_30d=4, amount_30d="25.000000001", first_seen_at="2025-12-22T12:00:00Z"
    )
    assert nothing == SubjectHistory(events_1d=0, events_30d=0, amount_30d="0", first_seen_at=None)


async def test_a_decision_closes_the_dead_letters_of_its_event(
    engine: AsyncEngine, scope: TenantScope, clock: SetClock
) -> None:
    state = received(scope)
    letter = DeadLetter(
        "l" + secrets.token_hex(8), scope, state.event_id, "scoring", "c", "p", "E", "f", 3, AT, "?", b"b"
    )
    letters = PostgresDeadLetters(engine, clock)
    await letters.park([letter, replace(letter, letter_id=letter.letter_id + "b", event_id="other"), letter])
    await letters.park([replace(letter, attempts=9)])
    assert (await counts(engine, [scope])).dead_letters == 2
    await PostgresLedger(engine).decide([decided(state)])
    found = await rows(engine, [scope], "SELECT event_id, status, attempts, body FROM dead_letters ORDER BY letter_id")
    assert [tuple(row) for row in found] == [(state.event_id, "closed", 3, b"b"), ("other", "open", 3, b"b")]


# --- isolation ----------------------------------------------------------------------------------------


async def test_a_transaction_sees_the_rows_of_its_tenants_only(engine: AsyncEngine, scope: TenantScope) -> None:
    other = fresh_scope()
    mine, theirs = received(scope), received(other)
    await PostgresLedger(engine).record_events([mine, theirs])
    sql = "SELECT tenant FROM events WHERE tenant = ANY(CAST(:both AS text[]))"
    both = [scope.tenant_id, other.tenant_id]
    assert await rows(engine, [scope], sql, both=both) == [(scope.tenant_id,)]
    assert len(await rows(engine, [scope, other], sql, both=both)) == 2
    assert await rows(engine, [], sql, both=both) == []
    async with engine.connect() as connection:  # never set, and set by an earlier transaction: nothing, no error
        assert (await connection.execute(text(sql), {"both": both})).all() == []
    assert list(await PostgresLedger(engine).decisions([(scope, theirs.event_id)])) == [None]


async def test_a_row_for_another_tenant_cannot_be_written(engine: AsyncEngine, scope: TenantScope) -> None:
    insert = "INSERT INTO audit_heads (tenant, seq, hash) VALUES (:tenant, 0, '')"
    with pytest.raises(DBAPIError, match="row-level security"):
        async with transaction(engine, [scope]) as connection:
            await connection.execute(text(insert), {"tenant": fresh_scope().tenant_id})


@pytest.mark.parametrize("table", [t for t in metadata.tables if t not in {"tenants", "users", "api_keys"}])
async def test_every_tenant_table_forces_row_level_security(engine: AsyncEngine, table: str) -> None:
    sql = "SELECT relrowsecurity, relforcerowsecurity FROM pg_class WHERE oid = CAST(:name AS regclass)"
    assert await rows(engine, [], sql, name=table) == [(True, True)]


# --- failures of the server ---------------------------------------------------------------------------


async def test_a_server_that_is_not_there_is_a_database_error() -> None:
    engine = create_engine("postgresql://nobody:x@127.0.0.1:1/none")
    with pytest.raises(DatabaseError):
        await PostgresLedger(engine).known([(TenantScope("acme"), "e")])


async def test_a_killed_connection_is_a_database_error_and_the_next_call_works(engine: AsyncEngine) -> None:
    async def interrupted() -> None:
        async with transaction(engine, []) as connection:
            pid = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            await rows(engine, [], "SELECT pg_terminate_backend(:pid)", pid=pid)
            await connection.execute(text("SELECT 1"))

    with pytest.raises(DatabaseError):
        await interrupted()
    assert await rows(engine, [], "SELECT 1") == [(1,)]


async def test_a_lock_that_is_not_given_is_a_database_error(
    engine: AsyncEngine, scope: TenantScope, clock: SetClock
) -> None:
    log = PostgresAuditLog(engine, clock)
    record = received(scope).records()[0]
    await log.append([record])
    async with transaction(engine, [scope]) as connection:
        await connection.execute(text("SELECT * FROM audit_heads FOR UPDATE"))
        with pytest.raises(DatabaseError, match="55P03"):
            await log.append([replace(record, record_id="another")])


async def test_a_cancelled_call_never_uses_its_connection_again(database: ServerUrls) -> None:
    engine = create_engine(database.database, pool_size=1, max_overflow=0)
    try:
        (before,) = await rows(engine, [], "SELECT pg_backend_pid()")
        call = asyncio.create_task(rows(engine, [], "SELECT pg_sleep(5)"))
        await asyncio.sleep(0.2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        (after,) = await rows(engine, [], "SELECT pg_backend_pid()")
        assert before != after
    finally:
        await engine.dispose()


# --- audit --------------------------------------------------------------------------------------------


async def test_a_record_is_appended_once(engine: AsyncEngine, scope: TenantScope, clock: SetClock) -> None:
    log = PostgresAuditLog(engine, clock)
    state = decided(received(scope), Outcome.REQUIRE_APPROVAL)
    records = state.records()
    assert len(records) == 6
    assert list(await log.append([records[0], records[0], records[1]])) == [True, False, True]
    assert list(await log.append(records)) == [False, False, True, True, True, True]
    assert list(await PostgresAuditLog(engine, clock).append(records)) == [False] * 6
    assert await rows(engine, [scope], "SELECT seq FROM audit_records ORDER BY seq") == [(i,) for i in range(1, 7)]
    report = await log.verify(scope, batch=2)
    assert (report.records, report.intact, report.problem) == (6, True, None)


async def test_concurrent_appends_leave_no_gap_and_no_fork(
    engine: AsyncEngine, scope: TenantScope, clock: SetClock
) -> None:
    other = fresh_scope()
    states = [decided(received(s, f"e{i}")) for i in range(10) for s in (scope, other)]

    async def sink(step: int) -> int:
        log = PostgresAuditLog(engine, clock)
        return sum([sum(await log.append(state.records())) for state in states[::step]])

    appended = await asyncio.gather(*(sink(step) for step in (1, -1, 1, -1)))
    assert sum(appended) == 100
    for tenant in (scope, other):
        report = await PostgresAuditLog(engine, clock).verify(tenant, batch=7)
        assert (report.records, report.intact, report.problem) == (50, True, None)


async def test_records_of_no_tenant_go_to_the_system_chain(engine: AsyncEngine, clock: SetClock) -> None:
    log = PostgresAuditLog(engine, clock)
    record = AuditRecord(None, secrets.token_hex(16), "", 0, "", b'{"problem":"\\u0000 unauthenticated"}')
    assert list(await log.append([record])) == [True]
    assert list(await log.append([record])) == [False]
    report = await log.verify(None)
    assert report.tenant == "_system"
    assert report.intact


@pytest.mark.parametrize("table", ["audit_records", "audit_checkpoints", "audit_heads"])
@pytest.mark.parametrize("change", ["UPDATE {} SET hash = ''", "DELETE FROM {}", "TRUNCATE {}"])
async def test_the_audit_refuses_changes(engine: AsyncEngine, owner: AsyncEngine, table: str, change: str) -> None:
    statement = text(change.format(table))
    if (table, change[:6]) != ("audit_heads", "UPDATE"):
        with pytest.raises(DBAPIError, match="permission denied"):
            async with transaction(engine, []) as connection:
                await connection.execute(statement)
        with pytest.raises(DBAPIError, match="append-only"):
            async with transaction(owner, []) as connection:
                await connection.execute(statement)


async def test_a_head_moves_forward_only(engine: AsyncEngine, scope: TenantScope, clock: SetClock) -> None:
    await PostgresAuditLog(engine, clock).append(received(scope).records())
    with pytest.raises(DBAPIError, match="forward only"):
        async with transaction(engine, [scope]) as connection:
            await connection.execute(text("UPDATE audit_heads SET seq = 0"))


@asynccontextmanager
async def tampering(owner: AsyncEngine, scope: TenantScope) -> AsyncIterator[AsyncConnection]:
    """What only the owner of the tables can do: take the triggers away, change, and put them back."""
    async with transaction(owner, [scope]) as connection:
        for table in ("audit_records", "audit_heads"):
            await connection.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER USER"))
        yield connection
        for table, names in (
            ("audit_records", ("refuse_update", "refuse_truncate")),
            ("audit_heads", ("refuse_delete", "refuse_truncate", "forward_only")),
        ):
            for name in names:
                await connection.execute(text(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {name}"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("UPDATE audit_records SET body = body || '\\x20' WHERE seq = 3", "record 3 was changed"),
        ("UPDATE audit_records SET record_id = 'x' WHERE seq = 3", "record 3 is filed under another id"),
        ("DELETE FROM audit_records WHERE seq = 3", "record 3 is missing"),
        ("DELETE FROM audit_records WHERE seq >= 4", "tail is missing"),
        ("UPDATE audit_heads SET seq = 4", "records outside 1 to 4"),
        ("UPDATE audit_heads SET hash = '\\x00'", "is not the head's"),
        ("DELETE FROM audit_heads", "records outside 1 to 0"),
        ("UPDATE audit_records SET seq = 1000 - seq; UPDATE audit_records SET seq = seq - 994", "does not stand"),
        ("UPDATE audit_records SET seq = seq - 1", "records outside"),
    ],
)
async def test_verify_notices_tampering(
    engine: AsyncEngine, owner: AsyncEngine, scope: TenantScope, clock: SetClock, change: str, problem: str
) -> None:
    log = PostgresAuditLog(engine, clock)
    await log.append(decided(received(scope)).records())
    async with tampering(owner, scope) as connection:
        for statement in change.split(";"):
            await connection.execute(text(statement.replace(":", r"\:")))
    report = await log.verify(scope)
    assert not report.intact
    assert problem in (report.problem or "")


async def test_verify_compares_trails_with_the_chain(engine: AsyncEngine, scope: TenantScope, clock: SetClock) -> None:
    ledger, log = PostgresLedger(engine), PostgresAuditLog(engine, clock)
    whole, partial = decided(received(scope, "whole")), decided(received(scope, "partial"))
    sibling = decided(received(scope, "whole"), Outcome.REJECTED)
    await ledger.decide([whole, partial])
    await log.append([*whole.records(), *partial.records(0, 2), *sibling.records(), *received(scope, "open").records()])
    report = await log.verify(scope, batch=1)
    assert (report.decisions, report.missing, report.intact) == (2, 2, False)
    assert report.orphans == len({r.record_id for r in sibling.records()} - {r.record_id for r in whole.records()}) > 0
    early = await log.verify(scope, decided_before=datetime(2026, 1, 1, tzinfo=UTC))
    assert (early.decisions, early.intact) == (0, True)
    stored = (await ledger.decisions([(scope, partial.event_id)]))[0]
    assert stored is not None
    await log.append(state_from_bytes(stored.state).records())
    assert (await log.verify(scope)).intact


# --- directory ----------------------------------------------------------------------------------------


async def test_a_key_names_its_tenant(engine: AsyncEngine, scope: TenantScope, clock: SetClock) -> None:
    directory = PostgresDirectory(engine, clock, PEPPER)
    key, key_id, mac = new_api_key(secrets.token_bytes(KEY_BYTES), PEPPER)
    assert await directory.principal(key) is None
    with pytest.raises(InvalidTenantError):
        await create_api_key(engine, scope, key_id, mac)
    assert await create_tenant(engine, scope, "Acme", f"up-{scope}", Thresholds(review_from=30))
    await create_api_key(engine, scope, key_id, mac)
    assert await directory.principal(key) is None  # remembered as unknown, for 5 s at most
    clock.seconds += 5
    principal = await directory.principal(key)
    assert principal is not None
    assert (principal.scope, principal.actor) == (scope, f"key:{key_id}")
    assert await directory.principal(key[:-1] + ("A" if key[-1] != "A" else "B")) is None
    assert await directory.principal("nonsense") is None
    await rows(engine, [], "UPDATE api_keys SET revoked_at = now() WHERE key_id = :id RETURNING 1", id=key_id)
    clock.seconds += 5
    assert await directory.principal(key) is None


async def test_tenants_are_listed_and_made_once(engine: AsyncEngine, scope: TenantScope, clock: SetClock) -> None:
    directory = PostgresDirectory(engine, clock, PEPPER)
    assert scope not in {profile.scope for profile in await directory.tenants()}
    assert await create_tenant(engine, scope, "Acme", f"up-{scope}", Thresholds(review_from=30))
    assert not await create_tenant(engine, scope, "Other")
    with pytest.raises(InvalidMetadataError):
        await create_tenant(engine, fresh_scope(), "Thief", f"up-{scope}")
    assert scope not in {profile.scope for profile in await directory.tenants()}
    clock.seconds += 5
    (profile,) = [p for p in await directory.tenants() if p.scope == scope]
    assert (profile.name, profile.broker_user, profile.thresholds.review_from) == ("Acme", f"up-{scope}", 30)
    assert scope in await tenant_ids(engine)


async def test_there_is_one_first_admin(engine: AsyncEngine) -> None:
    made = await asyncio.gather(*(create_first_admin(engine, f"u{i}", "Ada") for i in range(4)))
    assert sum(made) <= 1
    assert await has_users(engine)


# --- registry -----------------------------------------------------------------------------------------

Register = Callable[..., Any]


@pytest.fixture
def register(engine: AsyncEngine, scope: TenantScope) -> Register:
    async def register(name: str, scope_key: str, status: str = "approved", content: bytes = b"{}") -> Pin:
        digest = hashlib.sha256(content if status != "broken" else b"other").hexdigest()
        values = {"tenant": scope.tenant_id, "name": name, "digest": digest, "content": content, "key": scope_key}
        async with transaction(engine, [scope]) as connection:
            await connection.execute(
                text(
                    "INSERT INTO registry_versions (tenant, kind, name, version, digest, content, status, author,"
                    " approver, reason, approved_at)"
                    " VALUES (:tenant, 'model', :name, 1, :digest, :content, :status, 'ann', 'bob', 'test', now())"
                ),
                values | {"status": "approved" if status == "broken" else status},
            )
            await connection.execute(
                text(
                    "INSERT INTO registry_active (tenant, kind, scope_key, name, version)"
                    " VALUES (:tenant, 'model', :key, :name, 1)"
                ),
                values,
            )
        return Pin(name=name, version=1, digest=digest)

    return register


async def test_default_artifacts_decide_for_a_new_tenant(
    engine: AsyncEngine, scope: TenantScope, clock: SetClock
) -> None:
    registry = PostgresRegistry(engine, clock)
    (active,) = await registry.active([scope], "risk", ["payment.card"])
    assert active.thresholds == Thresholds()
    seeded = {(a["kind"], a["name"]): a for a in default_artifacts()}
    pins = [pin for pin in (active.model, active.policy, active.guardrail) if pin is not None]
    assert bool(pins) == bool(seeded)
    for artifact in await registry.artifacts(pins):
        assert artifact.content == seeded[artifact.kind, artifact.pin.name]["content"]


async def test_the_most_specific_row_decides(
    engine: AsyncEngine, scope: TenantScope, clock: SetClock, register: Register
) -> None:
    await create_tenant(engine, scope, "Acme", thresholds=Thresholds(hard_limit=80))
    mine = await register("own", "risk", content=b'{"a":1}')
    special = await register("special", "risk:loan.application", content=b'{"b":2}')
    registry, other = PostgresRegistry(engine, clock), fresh_scope()
    types = ["payment.card", "loan.application", "payment.card"]
    first, second, third = await registry.active([scope, scope, other], "risk", types)
    assert (first.model, second.model) == (mine, special)
    assert third.model not in (mine, special)
    assert first.thresholds.hard_limit == 80
    contents = [artifact.content for artifact in await registry.artifacts([special, mine])]
    assert contents == [{"b": 2}, {"a": 1}]


async def test_a_revoked_version_is_replaced_by_none_and_not_by_a_general_one(
    engine: AsyncEngine, scope: TenantScope, clock: SetClock, register: Register
) -> None:
    registry = PostgresRegistry(engine, clock)
    pin = await register("own", "risk")
    assert (await registry.active([scope], "risk", ["login"]))[0].model == pin
    await rows(engine, [scope], "UPDATE registry_versions SET status = 'revoked' WHERE name = 'own' RETURNING 1")
    clock.seconds += 1.9
    assert (await registry.active([scope], "risk", ["login"]))[0].model == pin
    clock.seconds += 0.1
    assert (await registry.active([scope], "risk", ["login"]))[0].model is None


async def test_content_is_checked_and_must_be_approved(
    engine: AsyncEngine, scope: TenantScope, clock: SetClock, register: Register
) -> None:
    registry = PostgresRegistry(engine, clock)
    draft = await register("draft", "risk", "draft", content=b'{"secret":1}')
    broken = await register("broken", "compliance", "broken", content=secrets.token_bytes(9))
    assert (await registry.active([scope], "risk", ["login"]))[0].model is None
    with pytest.raises(ModelNotApprovedError):
        await registry.artifacts([draft])
    with pytest.raises(InvalidModelStateError):
        await registry.artifacts([broken])


async def test_nobody_approves_their_own_version(engine: AsyncEngine, scope: TenantScope) -> None:
    with pytest.raises(DBAPIError, match="four_eyes"):
        async with transaction(engine, [scope]) as connection:
            await connection.execute(
                text(
                    "INSERT INTO registry_versions (tenant, kind, name, version, digest, content, author, approver,"
                    " reason) VALUES (:tenant, 'model', 'm', 1, 'd', '', 'ann', 'ann', '')"
                ),
                {"tenant": scope.tenant_id},
            )


# --- reports ------------------------------------------------------------------------------------------


async def test_counts_and_summary_tell_the_same_story(engine: AsyncEngine, scope: TenantScope, clock: SetClock) -> None:
    ledger, log = PostgresLedger(engine), PostgresAuditLog(engine, clock)
    states = [decided(received(scope, f"e{i}"), outcome) for i, outcome in enumerate(Outcome)]
    await ledger.record_events(states)
    await ledger.decide(states[:2])
    await log.append(states[0].records())
    found = await counts(engine, [scope])
    assert (found.events, found.decisions, found.audit_records, found.dead_letters) == (3, 2, 5, 0)
    assert found.by_outcome == {"APPROVED": 1, "REQUIRE_APPROVAL": 1}
    summary = await event_summary(engine, scope, states[0].event_id)
    assert summary is not None
    assert summary.audit_records == 5
    assert summary.decision == (await ledger.decisions([(scope, states[0].event_id)]))[0]
    assert await event_summary(engine, fresh_scope(), states[0].event_id) is None
