"""The fleet of a module's tests: every role its own process, on three real servers."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from contracts.tenancy import TenantScope
from deploy import keys, local, provision
from deploy.processes import identify
from deploy.servers import NativeServers, ServerUrls
from deploy.settings import Settings
from governance.passwords import SALT_BYTES, Passwords
from governance.postgres import create_engine, tenant_ids, transaction
from tests.integration.fleet_fixture import FleetThread, Login, RunningFleet, build_fleet, free_port, show


async def first_admin(settings: Settings) -> Login:
    """An administrator whom nobody had before; other tests of the session may have made users already."""
    login = Login(f"admin-{secrets.token_hex(4)}", secrets.token_urlsafe(18))
    stored = await Passwords().hash(login.password, secrets.token_bytes(SALT_BYTES))
    engine = create_engine(settings.need("database_url"), pool_size=1)
    try:
        async with transaction(engine, ()) as connection:
            values = {"user": login.user, "hash": stored}
            insert = "INSERT INTO users (user_id, name, password_hash) VALUES (:user, 'Fleet admin', :hash)"
            await connection.execute(text(insert), values)
            grant = "INSERT INTO memberships (user_id, tenant, role, granted_by) VALUES (:user, '*', 'ADMIN', 'tests')"
            await connection.execute(text(grant), {"user": login.user})
    finally:
        await engine.dispose()
    return login


async def clear_leftovers(settings: Settings) -> None:
    """Other suites leave what no release writes: outbox rows for exchanges that never were, policies that cannot be
    read, approvals of another century. The relay and the expiry of this fleet would work on them.
    """
    engine = create_engine(settings.need("database_url"), pool_size=1)
    try:
        async with transaction(engine, [*await tenant_ids(engine), None]) as connection:
            await connection.execute(text("DELETE FROM outbox"))
            await connection.execute(text("UPDATE approvals SET expires_at = NULL WHERE status = 'open'"))
            await connection.execute(text("UPDATE tenants SET approval_policy = '{}', limits = '{}'"))
    finally:
        await engine.dispose()
    owner = create_engine(settings.need("migration_database_url"), pool_size=1)
    try:
        async with transaction(owner, ()) as connection:
            await connection.execute(text("DELETE FROM layouts"))
    finally:
        await owner.dispose()


@pytest.fixture(scope="module")
def fleet(
    request: pytest.FixtureRequest, servers: ServerUrls, native_servers: NativeServers | None
) -> Iterator[RunningFleet]:
    """The fleet of one module, with two tenants whose names nobody had before; `SETTINGS` of the module are its own."""
    directory = Path(tempfile.mkdtemp(prefix="riskfleet-fleet-"))
    settings = local.with_servers(
        Settings(
            environment="test",
            http_port=free_port(),
            control_port=free_port(),
            scaling_port=free_port(),
            data_dir=directory,
            **getattr(request.module, "SETTINGS", {}),
        ),
        servers,
    )

    async def prepare() -> dict[str, Any]:
        await provision.migrate(settings)
        await clear_leftovers(settings)
        await provision.apply_topology(settings)
        keys.init(directory)
        tag = secrets.token_hex(4)
        return {
            name: await provision.create_upstream(settings, TenantScope(f"{name}-{tag}"), name, keys.pepper(settings))
            for name in ("acme", "globex")
        }

    upstreams, said = asyncio.run(prepare()), list[str]()
    admin = asyncio.run(first_admin(settings))
    thread = FleetThread(lambda: build_fleet(settings, native_servers, said))
    running = RunningFleet(settings, thread, native_servers, upstreams, admin, said)
    thread.start()
    try:
        asyncio.run(running.wait_ready())
        yield running
        pids = running.pids()
    finally:
        thread.stop()
        show("the supervisor said:", *said)
    assert [line for line in said if "did not drain" in line] == []
    assert [pid for pid in pids.values() if identify(pid) is not None] == []
    if request.session.testsfailed:
        show("the logs stay in", directory / "logs")
    else:
        shutil.rmtree(directory, ignore_errors=True)
