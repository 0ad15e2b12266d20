"""Connections and transactions: timeouts on every connection, tenants on every transaction, errors translated once.

Promises: a transaction sees the rows of exactly the tenants it was opened for; a server that hangs, restarts or
refuses is a DatabaseError within seconds; a connection whose call was cancelled is never used again, since the
next caller would read the answer to somebody else's question. Does not repeat anything: that is the caller's.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final
from uuid import uuid4

import asyncpg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from contracts.failures import DatabaseError, InfrastructureError
from contracts.identity import EVERYWHERE
from contracts.tenancy import TenantScope
from governance.audit import chain_of

CONNECT_TIMEOUT_S: Final = 5.0
COMMAND_TIMEOUT_S: Final = 15.0
"""Longer than the server's own statement_timeout: it ends a call whose server has gone silent."""

_SETTINGS: Final = {
    "statement_timeout": "10000",
    "lock_timeout": "2000",
    # A process that stops inside a transaction would hold its chain heads, and with them every other sink.
    "idle_in_transaction_session_timeout": "5000",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "timezone": "UTC",
    "jit": "off",
}

_SET_TENANTS: Final = text("SELECT set_config('rf.tenants', :tenants, true)")

# SQLSTATE classes in which the server, the way to it or a neighbour is at fault, never the rows that we sent:
# connection, login, no such database, rollback (deadlock, serialization), resources, operator intervention, system.
_OPERATIONAL_CLASSES: Final = frozenset({"08", "28", "3D", "40", "53", "57", "58"})
# Read-only (a standby after a failover), idle in transaction, lock timeout, a schema that was not upgraded yet,
# a plan made before an upgrade.
_OPERATIONAL_CODES: Final = frozenset({"25006", "25P03", "25P04", "55P03", "42P01", "0A000"})


class UnsafeDatabaseError(InfrastructureError):
    """PostgreSQL is set so that rows can be lost or tenants can see each other; riskfleet does not start."""


def create_engine(
    url: str, *, pool_size: int = 4, max_overflow: int = 4, application_name: str = "riskfleet"
) -> AsyncEngine:
    """A pool of connections to a `postgresql://` URL; nothing is connected yet.

    `pool_size` connections are kept, `max_overflow` more are opened under load; a caller waits 5 s for one at most.
    """
    return create_async_engine(
        driver_url(url),
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=CONNECT_TIMEOUT_S,
        pool_recycle=1800,
        hide_parameters=True,  # an exception text must never hold a payload
        connect_args={
            "timeout": CONNECT_TIMEOUT_S,
            "command_timeout": COMMAND_TIMEOUT_S,
            "server_settings": _SETTINGS | {"application_name": application_name},
        },
    )


def driver_url(url: str) -> str:
    """The same URL for SQLAlchemy over asyncpg; a bare `postgresql://` would mean another driver."""
    return re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql+asyncpg://", url)


async def dispose(engine: AsyncEngine) -> None:
    """Close every connection of the pool."""
    await engine.dispose()


@asynccontextmanager
async def transaction(
    engine: AsyncEngine, scopes: Iterable[TenantScope | None], *, shared: bool = False
) -> AsyncIterator[AsyncConnection]:
    """One transaction that sees the rows of exactly these tenants (None: the system chain); commits at the end.

    `shared`: it may also write what every tenant uses (tenant "*"). Raises DatabaseError for every failure of the
    server. With no scope at all, tenant tables look empty.
    """
    names = {chain_of(scope) for scope in scopes} | ({EVERYWHERE} if shared else set())
    tenants = "{" + ",".join(sorted(names)) + "}"
    with translated():
        async with _connection(engine) as connection:
            await connection.execute(_SET_TENANTS, {"tenants": tenants})
            yield connection


@asynccontextmanager
async def _connection(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    connection = await engine.connect()
    try:
        await connection.begin()
        yield connection
        await connection.commit()
    except Exception as error:
        if isinstance(error, OSError | TimeoutError) or connection.invalidated:
            await connection.invalidate()
        raise  # close() rolls back
    except BaseException:
        # Cancelled in the middle of a call: an answer may still be on its way on this connection.
        await connection.invalidate()
        raise
    finally:
        await connection.close()


@contextmanager
def translated() -> Iterator[None]:
    """Turn every failure of the server inside the block into a DatabaseError; defects pass as they are."""
    try:
        yield
    except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        if not is_operational(error):
            raise
        raise DatabaseError(f"PostgreSQL does not answer as it should ({_name(error)})") from error


def is_operational(error: BaseException) -> bool:
    """Whether the server or the way to it is at fault, so that the same call may succeed later."""
    if isinstance(error, OSError | TimeoutError | PoolTimeoutError):
        return True
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return True
        causes = [error.orig, error.orig.__cause__ if error.orig else None]
        return any(is_operational(cause) for cause in causes if cause is not None)
    state = sqlstate(error)
    if state is not None:
        return state[:2] in _OPERATIONAL_CLASSES or state in _OPERATIONAL_CODES
    # asyncpg's DataError is an InterfaceError too, but says that *our* value does not fit.
    return isinstance(error, asyncpg.InterfaceError) and not isinstance(error, ValueError)


def sqlstate(error: BaseException) -> str | None:
    """The SQLSTATE of a driver's error, if it has one."""
    source = error.orig if isinstance(error, DBAPIError) else error
    state = getattr(source, "sqlstate", None)
    return state if isinstance(state, str) else None


def _name(error: BaseException) -> str:
    source = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    cause = source.__cause__ if isinstance(source.__cause__, asyncpg.PostgresError) else source
    return " ".join(filter(None, (type(cause).__name__, sqlstate(error))))


_READ_SETTINGS: Final = text(
    """
    SELECT current_setting('fsync') AS fsync, current_setting('synchronous_commit') AS synchronous_commit,
           r.rolname AS role, r.rolsuper AS superuser, r.rolbypassrls AS bypass,
           (SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE n.nspname = current_schema() AND c.relkind IN ('r', 'p')
               AND pg_has_role(current_user, c.relowner, 'MEMBER')) AS owned,
           to_regclass('audit_heads') IS NOT NULL AS upgraded
      FROM pg_roles r WHERE r.rolname = current_user
    """
)


async def check_settings(engine: AsyncEngine) -> None:
    """Refuse a server that may lose acknowledged rows, and a role that row-level security does not bind.

    Raises UnsafeDatabaseError with everything that is wrong, or DatabaseError when the server does not answer.
    """
    async with transaction(engine, ()) as connection:
        row = (await connection.execute(_READ_SETTINGS)).one()
    wrong = []
    if row.fsync != "on":
        wrong.append("fsync is off: a crash of the machine loses decisions; set fsync = on")
    if row.synchronous_commit not in ("on", "remote_apply"):
        wrong.append(f"synchronous_commit is {row.synchronous_commit}; set it to on (or remote_apply)")
    if row.superuser:
        wrong.append(f"role {row.role} is a superuser: row-level security does not bind it")
    if row.bypass:
        wrong.append(f"role {row.role} has BYPASSRLS: row-level security does not bind it")
    if row.owned and not row.superuser:
        wrong.append(f"role {row.role} owns tables and could drop what protects them; use the application role")
    if not row.upgraded:
        wrong.append("the tables are missing; run riskfleet db upgrade")
    if wrong:
        raise UnsafeDatabaseError("; ".join(wrong))


async def insert_and_roll_back(engine: AsyncEngine) -> None:
    """Insert a row as the application role and roll it back. Raises DatabaseError when it cannot be written."""
    async with transaction(engine, ()) as connection, connection.begin_nested() as savepoint:
        await connection.execute(
            text("INSERT INTO users (user_id, name) VALUES (:id, 'doctor')"), {"id": f"doctor-{uuid4().hex}"}
        )
        await savepoint.rollback()


async def ping(engine: AsyncEngine) -> str:
    """The server's version, such as "15.9". Raises DatabaseError."""
    async with transaction(engine, ()) as connection:
        return str((await connection.execute(text("SHOW server_version"))).scalar_one()).split(" ")[0]


def columns(rows: Sequence[Sequence[Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    """Rows turned into one array per column, for `unnest`: one statement for any number of rows."""
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}
