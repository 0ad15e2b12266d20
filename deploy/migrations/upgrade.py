"""`riskfleet db upgrade`: brings a database to this release's schema, in one transaction.

Promises: may be run at any time, by any number of processes at once, and again; waits 30 s for a server that is
still starting; renews the application role's grants and adds the release's default artifacts, and never changes an
artifact or an activation that is there. Goes forward only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from contracts.events import canonical_json
from contracts.failures import DatabaseError, InvalidModelStateError
from governance.postgres.engine import driver_url, is_operational, translated
from governance.registry import RELEASE_APPROVER, RELEASE_AUTHOR, SHARED, ReleaseArtifact, release_artifacts

WAIT_S: Final = 30.0
_LOCK: Final = 7_205_759_403_793
_REASON: Final = "brought by the release"

GRANTS: Final[Mapping[str, str]] = {
    "events": "SELECT, INSERT",
    "decisions": "SELECT, INSERT, UPDATE (superseded_by)",
    "approvals": "SELECT, INSERT, UPDATE",
    "audit_records": "SELECT, INSERT",
    "audit_heads": "SELECT, INSERT, UPDATE",
    "audit_checkpoints": "SELECT, INSERT",
    "dead_letters": "SELECT, INSERT, UPDATE",
    "outbox": "SELECT, INSERT, DELETE",
    "letter_history": "SELECT, INSERT",
    "letter_requests": "SELECT, INSERT, UPDATE (status, expires_at, answered_by, answered_at)",
    "replay_pace": "SELECT, UPDATE (next_due_at)",
    "labels": "SELECT, INSERT",
    "approval_votes": "SELECT, INSERT",
    "registry_versions": "SELECT, INSERT, UPDATE (status, submitted_at, approver, approved_at, signature, key_id)",
    "registry_transitions": "SELECT",
    "registry_approvals": "SELECT, INSERT",
    "registry_active": "SELECT, INSERT, UPDATE (name, version, activated_at, activated_by), DELETE",
    "registry_activations": "SELECT, INSERT",
    "halts": "SELECT, INSERT, UPDATE, DELETE",
    "pauses": "SELECT, INSERT, UPDATE, DELETE",
    "probes": "SELECT, INSERT, UPDATE",
    "layouts": "SELECT, INSERT, UPDATE (retired_at, removed_at)",
    "imported_history": "SELECT, INSERT",
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
                await _seed(connection, release_artifacts())
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


_INSERT_VERSION: Final = text(
    """
    INSERT INTO registry_versions (tenant, kind, name, version, digest, content, status, author, approver, reason,
                                   approved_at, owner, purpose, use_tag, limitations, evidence)
    VALUES (:tenant, :kind, :name, :version, :digest, :content, 'approved', :author, :approver, :reason, now(), :author,
            :purpose, :use_tag, :limitations, CAST(CAST(:evidence AS text) AS jsonb))
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
    WITH placed AS (
        INSERT INTO registry_active (tenant, kind, scope_key, name, version, activated_by)
        SELECT tenant, kind, :scope_key, name, version, :author FROM registry_versions
         WHERE tenant = :tenant AND kind = :kind AND name = :name AND version = :version
           AND status IN ('approved', 'active')
        ON CONFLICT DO NOTHING RETURNING *)
    INSERT INTO registry_activations (tenant, kind, scope_key, action, name, version, activated_by, reason,
                                      activated_at)
    SELECT tenant, kind, scope_key, 'activate', name, version, activated_by, :reason, activated_at FROM placed
    """
)
_MARK_ACTIVE: Final = text(
    """
    UPDATE registry_versions v SET status = 'active'
     WHERE v.tenant = :tenant AND v.kind = :kind AND v.name = :name AND v.version = :version AND v.status = 'approved'
       AND EXISTS (SELECT 1 FROM registry_active a WHERE a.tenant = v.tenant AND a.kind = v.kind AND a.name = v.name
                                                     AND a.version = v.version)
    """
)


async def _seed(connection: AsyncConnection, artifacts: Sequence[ReleaseArtifact]) -> None:
    """Add versions that are new, and activate them where nothing is active yet: the choice is the operator's."""
    await connection.execute(text("SELECT set_config('rf.tenants', :tenants, true)"), {"tenants": "{" + SHARED + "}"})
    for artifact in artifacts:
        key = {"tenant": SHARED, "kind": artifact.kind, "name": artifact.name, "version": artifact.version}
        about = {
            "author": RELEASE_AUTHOR,
            "approver": RELEASE_APPROVER,
            "reason": _REASON,
            "purpose": artifact.purpose,
            "use_tag": artifact.use_tag,
            "limitations": artifact.limitations,
            "evidence": canonical_json(artifact.evidence).decode(),
        }
        content = {"digest": artifact.digest, "content": artifact.content}
        await connection.execute(_INSERT_VERSION, key | about | content)
        if (await connection.execute(_READ_DIGEST, key)).scalar_one() != artifact.digest:
            name = f"{artifact.kind} {artifact.name} version {artifact.version}"
            raise InvalidModelStateError(f"the default {name} differs from the registered one; give it a new version")
        for scope_key in artifact.scopes:
            placing = {"scope_key": scope_key, "author": RELEASE_AUTHOR, "reason": _REASON}
            await connection.execute(_ACTIVATE, key | placing)
        await connection.execute(_MARK_ACTIVE, key)
