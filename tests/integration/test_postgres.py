"""What PostgreSQL promises the fleet: one owner, one outcome, one chain, and no row of another tenant."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

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
from deploy import keys, local, provision
from deploy.migrations.upgrade import role_of, upgrade
from deploy.servers import ServerUrls
from deploy.settings import Settings
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
from governance.postgres.corrections import lock_events
from governance.postgres.schema import metadata
from governance.registry import release_artifacts
from governance.signing import Signer, Statement, Verifier

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
        versions={"schema": 1, "model": {"name": "sample", "version": 1, "digest": "0" * 64}},
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


async def test_a_letter_waits_for_whoever_decides_its_event(
    engine: AsyncEngine, scope: TenantScope, clock: SetClock
) -> None:
    """Else neither would see the other, and the letter of a decided event would stay open."""
    at = "2026-01-31T12:00:00Z"
    name = f"waits-{scope.tenant_id}"
    one = DeadLetter(name, scope, "e" * 32, "scoring", "c", "p", "E", "f", 3, at, at, b"b")
    async with transaction(engine, [scope]) as connection:
        await lock_events(connection, [(scope, "e" * 32)])
        parking = asyncio.create_task(PostgresDeadLetters(engine, clock).park([one]))
        done, _ = await asyncio.wait({parking}, timeout=0.3)
        assert not done
    await parking
    assert len(await rows(engine, [scope], "SELECT 1 FROM dead_letters")) == 1


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


OF_NO_TENANT = {
    "tenants",  # these four are read before a tenant is known: by them it is found out who calls, and for whom
    "users",
    "memberships",
    "api_keys",
    "replay_pace",  # one row, the pace of the whole installation
    "probes",  # of partitions
    "layouts",  # the versions of the installation's queues
    "registry_transitions",  # the rules themselves: the same for everybody, and only the owner may write them
}


@pytest.mark.parametrize("table", [t for t in metadata.tables if t not in OF_NO_TENANT])
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


async def test_a_data_directory_of_an_older_release_gets_the_keys_that_roles_need_now(
    database: ServerUrls, engine: AsyncEngine, tmp_path: Path
) -> None:
    """There are users already, so nothing else is made: 0.1.0 had a pepper, and no artifact or token keys."""
    await create_first_admin(engine, "first", "Ada")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "pepper").write_text("p" * 64)
    settings = local.with_servers(Settings(data_dir=tmp_path), database)
    assert await provision.demo(settings) is None
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == [
        *("artifact.key", "artifact.pub", "pepper", "token.key", "token.pub"),
    ]
    keys.artifact_verifier(settings)
    assert (tmp_path / "keys" / "pepper").read_text() == "p" * 64


# --- registry -----------------------------------------------------------------------------------------

Register = Callable[..., Any]
SIGNER = Signer(b"s" * 32)
TRUSTED = Verifier([SIGNER.public])


@pytest.fixture
def register(owner: AsyncEngine, scope: TenantScope) -> Register:
    """Registered and active at once, as only the owner of the tables can; signed as the gate would."""

    async def register(name: str, scope_key: str, content: bytes = b"{}", *, signed: bool = True) -> Pin:
        digest = hashlib.sha256(content).hexdigest()
        at = datetime(2026, 1, 31, tzinfo=UTC)
        statement = Statement("model", scope.tenant_id, name, 1, digest, "ann", "bob", at)
        values: dict[str, Any] = {"tenant": scope.tenant_id, "name": name, "digest": digest, "key": scope_key}
        values |= {"content": content, "at": at, "signature": SIGNER.sign(statement) if signed else None}
        async with transaction(owner, [scope]) as connection:
            await connection.execute(
                text(
                    "INSERT INTO registry_versions (tenant, kind, name, version, digest, content, status, author,"
                    " approver, reason, approved_at, signature, key_id)"
                    " VALUES (:tenant, 'model', :name, 1, :digest, :content, 'active', 'ann', 'bob', 'test', :at,"
                    " CAST(:signature AS bytea), :key_id)"
                ),
                values | {"key_id": SIGNER.key_id if signed else None},
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
    assert not active.halted
    released = {artifact.pin: artifact for artifact in release_artifacts()}
    pins = [pin for pin in (active.model, active.policy, active.guardrail) if pin is not None]
    assert len(pins) == 3
    for artifact in await registry.artifacts(pins):
        assert canonical_json(artifact.content) == released[artifact.pin].content


async def test_the_most_specific_row_decides(
    engine: AsyncEngine, scope: TenantScope, clock: SetClock, register: Register
) -> None:
    await create_tenant(engine, scope, "Acme", thresholds=Thresholds(hard_limit=80))
    mine = await register("own", "risk", b'{"a":1}')
    special = await register("special", "risk:loan.application", b'{"b":2}')
    registry, other = PostgresRegistry(engine, clock, TRUSTED), fresh_scope()
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
    registry = PostgresRegistry(engine, clock, TRUSTED)
    pin = await register("own", "risk", secrets.token_hex(8).encode())
    assert (await registry.active([scope], "risk", ["login"]))[0].model == pin
    assert list(await registry.revoked([pin])) == [False]
    await rows(engine, [scope], "UPDATE registry_versions SET status = 'revoked' WHERE name = 'own' RETURNING 1")
    clock.seconds += 0.9
    assert (await registry.active([scope], "risk", ["login"]))[0].model == pin
    clock.seconds += 0.1
    assert (await registry.active([scope], "risk", ["login"]))[0].model is None
    assert list(await registry.revoked([pin, pin])) == [True, True]


async def test_a_tenants_copy_cannot_revoke_what_every_tenant_uses(
    engine: AsyncEngine, scope: TenantScope, clock: SetClock, register: Register
) -> None:
    """A pin names no tenant, and everybody knows the content of a default."""
    shared = next(artifact for artifact in release_artifacts() if artifact.kind == "model")
    assert await register(shared.name, "risk", shared.content) == shared.pin
    await rows(engine, [scope], "UPDATE registry_versions SET status = 'revoked' WHERE version = 1 RETURNING 1")
    assert list(await PostgresRegistry(engine, clock).revoked([shared.pin])) == [False]


@asynccontextmanager
async def rewriting(owner: AsyncEngine, scope: TenantScope) -> AsyncIterator[AsyncConnection]:
    """What only the owner of the tables can do: change a version behind the triggers' and the constraint's back."""
    content = "registry_versions_content"
    async with transaction(owner, [scope]) as connection:
        await connection.execute(text("ALTER TABLE registry_versions DISABLE TRIGGER gate"))
        await connection.execute(text(f"ALTER TABLE registry_versions DROP CONSTRAINT {content}"))
        yield connection
        await connection.execute(text("ALTER TABLE registry_versions ENABLE ALWAYS TRIGGER gate"))
        check = "CHECK (digest = encode(sha256(content), 'hex')) NOT VALID"
        await connection.execute(text(f"ALTER TABLE registry_versions ADD CONSTRAINT {content} {check}"))


SWAPPED = b'{"swapped":true}'


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("content = :content", "does not match its digest"),
        ("content = :content, digest = :digest", "does not fit what is registered"),
        ("author = 'eve'", "does not fit"),
        ("valid_until = now() + interval '1 year'", "does not fit"),
        ("signature = NULL, key_id = NULL", "is not signed"),
        ("key_id = '0123456789abcdef'", "not trusted"),
        ("signature = decode(repeat('00', 64), 'hex')", "does not fit"),
    ],
)
async def test_what_the_owner_of_the_tables_changed_is_not_used(
    engine: AsyncEngine,
    owner: AsyncEngine,
    scope: TenantScope,
    clock: SetClock,
    register: Register,
    change: str,
    problem: str,
) -> None:
    pin = await register("own", "risk", canonical_json({"n": secrets.token_hex(4)}))
    assert (await PostgresRegistry(engine, clock, TRUSTED).artifacts([pin]))[0].pin == pin
    digest = hashlib.sha256(SWAPPED).hexdigest()
    async with rewriting(owner, scope) as connection:
        values = {"content": SWAPPED, "digest": digest}
        used = {name: value for name, value in values.items() if f":{name}" in change}
        await connection.execute(text(f"UPDATE registry_versions SET {change} WHERE name = 'own'"), used)
    registry = PostgresRegistry(engine, clock, TRUSTED)
    (active,) = await registry.active([scope], "risk", ["login"])
    # Content is looked at when it is read, a signature before anything is pinned.
    assert active.model == (pin if "its digest" in problem else None)
    stored = Pin(name="own", version=1, digest=digest) if ":digest" in change else pin
    with pytest.raises(InvalidModelStateError, match=problem):
        await registry.artifacts([stored])


@pytest.mark.parametrize("everywhere", [False, True])
async def test_what_one_tenant_approved_decides_in_no_other_place(
    engine: AsyncEngine, owner: AsyncEngine, scope: TenantScope, clock: SetClock, register: Register, everywhere: bool
) -> None:
    """A pin names no tenant: the content of a copy is signed, but for another tenant than the copy's."""
    pin = await register("own", "risk", canonical_json({"n": secrets.token_hex(8)}))
    victim, place = fresh_scope(), "risk:copied." + secrets.token_hex(4)
    copied = "kind, name, version, digest, content, status, author, approver, reason, approved_at, signature, key_id"
    values = {"own": scope.tenant_id, "to": "*" if everywhere else victim.tenant_id}
    async with transaction(owner, [scope, victim], shared=everywhere) as connection:
        for statement, more in [
            (
                (
                    f"INSERT INTO registry_versions (tenant, {copied}) SELECT :to, {copied} FROM registry_versions"
                    " WHERE tenant = :own AND name = 'own'"
                ),
                {"own": values["own"]},
            ),
            (
                (
                    "INSERT INTO registry_active (tenant, kind, scope_key, name, version)"
                    " VALUES (:to, 'model', :place, 'own', 1)"
                ),
                {"place": place},
            ),
        ]:
            await connection.execute(text(statement), {"to": values["to"]} | more)
    registry = PostgresRegistry(engine, clock, TRUSTED)
    try:
        found, own = await registry.active([victim, scope], "risk", [place.removeprefix("risk:"), "login"])
        assert (found.model, own.model) == (None, pin)
    finally:
        async with transaction(owner, [victim], shared=True) as connection:
            await connection.execute(text("DELETE FROM registry_active WHERE scope_key = :place"), {"place": place})
            await connection.execute(
                text("DELETE FROM registry_versions WHERE tenant = :to AND digest = :digest"),
                {"to": values["to"], "digest": pin.digest},
            )


async def test_only_approved_and_signed_content_comes_out(
    engine: AsyncEngine, scope: TenantScope, clock: SetClock, register: Register
) -> None:
    content = canonical_json({"secret": secrets.token_hex(8)})
    draft = Pin(name="draft", version=1, digest=hashlib.sha256(content).hexdigest())
    insert = (
        "INSERT INTO registry_versions (tenant, kind, name, version, digest, content, author, reason)"
        " VALUES (:tenant, 'model', 'draft', 1, :digest, :content, 'ann', '') RETURNING 1"
    )
    await rows(engine, [scope], insert, tenant=scope.tenant_id, digest=draft.digest, content=content)
    registry = PostgresRegistry(engine, clock, TRUSTED)
    with pytest.raises(ModelNotApprovedError):
        await registry.artifacts([draft])
    unsigned = await register("unsigned", "risk", b'{"u":1}', signed=False)
    with pytest.raises(InvalidModelStateError, match="is not signed"):
        await registry.artifacts([unsigned])
    signed = await register("signed", "compliance", canonical_json({"n": secrets.token_hex(8)}))
    with pytest.raises(InvalidModelStateError, match="not trusted"):
        await PostgresRegistry(engine, clock).artifacts([signed])
    with pytest.raises(InvalidModelStateError, match="SHA-256"):
        await registry.artifacts([Pin(name="x", version=1, digest="{}")])


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
