"""`riskfleet db upgrade`: brings a database to this release's schema, in one transaction.

Promises: may be run at any time, by any number of processes at once, and again; waits 30 s for a server that is
still starting; renews the application role's grants and adds the release's default artifacts, and never changes an
artifact or an activation that is there. Goes forward only.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import asyncpg
import orjson
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from contracts.events import canonical_json
from contracts.failures import DatabaseError, InvalidModelStateError
from governance.postgres.engine import driver_url, is_operational, translated
from governance.postgres.registry import SHARED

DEFAULTS: Final = Path(__file__).resolve().parents[2] / "governance" / "defaults"
WAIT_S: Final = 30.0
_LOCK: Final = 7_205_759_403_793
_AUTHOR, _APPROVER = "riskfleet", "riskfleet-release"

GRANTS: Final[Mapping[str, str]] = {
    "events": "SELECT, INSERT",
    "decisions": "SELECT, INSERT, UPDATE (superseded_by)",
    "approvals": "SELECT, INSERT, UPDATE",
    "audit_records": "SELECT, INSERT",
    "audit_heads": "SELECT, INSERT, UPDATE",
    "audit_checkpoints": "SELECT, INSERT",
    "dead_letters": "SELECT, INSERT, UPDATE",
    "outbox": "SELECT, INSERT, DELETE",
    "labels": "SELECT, INSERT",
    "approval_votes": "SELECT, INSERT",
    "registry_versions": "SELECT, INSERT, UPDATE (status, submitted_at, approver, approved_at, signature, key_id)",
    "registry_transitions": "SELECT",
    "registry_approvals": "SELECT, INSERT",
    "registry_active": "SELECT, INSERT, UPDATE, DELETE",
    "registry_activations": "SELECT, INSERT",
    "halts": "SELECT, INSERT, UPDATE, DELETE",
    "tenants": "SELECT, INSERT, UPDATE",
    "users": "SELECT, INSERT, UPDATE",
    "memberships": "SELECT, INSERT, DELETE",
    "api_keys": "SELECT, INSERT, UPDATE (revoked_at, expires_at)",
    "alembic_version": "SELECT",
}
"""What the application role may do; everything else is refused. Its rows are limited by policies besides."""


def role_of(database_url: str) -> str:
    """The role that connects by this URL. Raises ValueError when the URL names none."""
    name = make_url(database_url).username
    if not name:
        raise ValueError("the database URL names no user")
    return name


def upgrade(migration_url: str, app_role: str = "riskfleet_app", *, wait_s: float = WAIT_S) -> None:
    """Upgrade the database at `migration_url` (its user will own the tables), and grant to `app_role`.

    Raises DatabaseError when the server does not answer within `wait_s` seconds or the role is missing, and
    InvalidModelStateError when a default artifact was changed without a new version. Not for use inside an event loop.
    """
    asyncio.run(apply(migration_url, app_role, wait_s=wait_s))


async def apply(migration_url: str, app_role: str = "riskfleet_app", *, wait_s: float = WAIT_S) -> None:
    """`upgrade`, for callers inside an event loop."""
    settings = {"lock_timeout": "60000", "timezone": "UTC", "application_name": "riskfleet-upgrade"}
    engine = create_async_engine(
        driver_url(migration_url), poolclass=NullPool, connect_args={"timeout": 5.0, "server_settings": settings}
    )
    try:
        with translated():
            connection = await _connect(engine, time.monotonic() + wait_s)
            try:
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
                await connection.run_sync(_run_alembic)
                await _grant(connection, app_role)
                await _seed(connection, default_artifacts())
                await connection.commit()
            finally:
                await connection.close()
    finally:
        await engine.dispose()


async def _connect(engine: AsyncEngine, deadline: float) -> AsyncConnection:
    while True:
        try:
            return await engine.connect()
        except Exception as error:
            # A wrong password does not get better by waiting.
            hopeless = isinstance(error, asyncpg.InvalidAuthorizationSpecificationError)
            if hopeless or not is_operational(error) or time.monotonic() >= deadline:
                raise
            await asyncio.sleep(0.3)


def _run_alembic(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def _grant(connection: AsyncConnection, app_role: str) -> None:
    found = await connection.execute(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": app_role})
    if found.one_or_none() is None:
        raise DatabaseError(f"there is no role {app_role}; create it (LOGIN, with a password), then upgrade again")
    role = connection.dialect.identifier_preparer.quote(app_role)
    schema = (await connection.execute(text("SELECT quote_ident(current_schema())"))).scalar_one()
    statements = [
        f"REVOKE ALL ON ALL TABLES IN SCHEMA {schema} FROM PUBLIC, {role}",
        f"GRANT USAGE ON SCHEMA {schema} TO {role}",
        *(f"GRANT {rights} ON {table} TO {role}" for table, rights in GRANTS.items()),
    ]
    for statement in statements:
        await connection.execute(text(statement))


def default_artifacts(directory: Path = DEFAULTS) -> Sequence[Mapping[str, Any]]:
    """The artifacts that this release brings, in order of their file names."""
    return [orjson.loads(path.read_bytes()) for path in sorted(directory.glob("*.json"))]


_INSERT_VERSION: Final = text(
    """
    INSERT INTO registry_versions (tenant, kind, name, version, digest, content, status, author, approver, reason,
                                   approved_at)
    VALUES (:tenant, :kind, :name, :version, :digest, :content, 'active', :author, :approver, :reason, now())
    ON CONFLICT DO NOTHING
    """
)
_READ_DIGEST: Final = text(
    """
    SELECT digest FROM registry_versions
     WHERE kind = :kind AND tenant = :tenant AND name = :name AND version = :version
    """
)
_ACTIVATE: Final = text(
    """
    INSERT INTO registry_active (tenant, kind, scope_key, name, version)
    VALUES (:tenant, :kind, :scope_key, :name, :version) ON CONFLICT DO NOTHING
    """
)


async def _seed(connection: AsyncConnection, artifacts: Sequence[Mapping[str, Any]]) -> None:
    """Add versions that are new, and activate them where nothing is active yet: the choice is the operator's."""
    await connection.execute(text("SELECT set_config('rf.tenants', :tenants, true)"), {"tenants": "{" + SHARED + "}"})
    for artifact in artifacts:
        content = canonical_json(artifact["content"])
        key = {"tenant": SHARED} | {name: artifact[name] for name in ("kind", "name", "version")}
        digest = hashlib.sha256(content).hexdigest()
        about = {"author": _AUTHOR, "approver": _APPROVER, "reason": artifact.get("purpose", "")}
        await connection.execute(_INSERT_VERSION, key | about | {"digest": digest, "content": content})
        if (await connection.execute(_READ_DIGEST, key)).scalar_one() != digest:
            name = f"{artifact['kind']} {artifact['name']} version {artifact['version']}"
            raise InvalidModelStateError(f"the default {name} differs from the registered one; give it a new version")
        for scope_key in artifact["scopes"]:
            await connection.execute(_ACTIVATE, key | {"scope_key": scope_key})
