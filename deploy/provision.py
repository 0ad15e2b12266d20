"""Makes what a first run needs: schema, topology, and the demo tenant with its credentials.

`demo()` writes directly, as only an installation without any user allows: afterwards tenants, users
and keys are made through the operator API by somebody with a name.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from contracts.tenancy import TenantScope
from contracts.topology import DECISIONS, INGEST, REJECTED, tenant_ingest, topology
from deploy import keys
from deploy.migrations.upgrade import apply as apply_migrations
from deploy.migrations.upgrade import role_of
from deploy.settings import Settings
from governance.access import KEY_BYTES, new_api_key
from governance.postgres import engine as pg
from governance.postgres.directory import create_api_key, create_first_admin, create_tenant, has_users
from resilience.management import BrokerManagement

DEMO = TenantScope("demo")


@dataclass(frozen=True, slots=True)
class DemoCredentials:
    """The demo tenant's API key and broker user; kept in a file that only its owner reads."""

    tenant: str
    api_key: str
    broker_user: str
    broker_password: str


def credentials_file(data_dir: Path) -> Path:
    """Where the demo tenant's credentials lie."""
    return data_dir / "keys" / "demo.json"


def demo_credentials(data_dir: Path) -> DemoCredentials | None:
    """The demo tenant's credentials, None when `db upgrade --demo` made none here."""
    path = credentials_file(data_dir)
    return DemoCredentials(**json.loads(path.read_text())) if path.exists() else None


async def migrate(settings: Settings) -> None:
    """Bring the schema to this release. Raises DatabaseError."""
    await apply_migrations(settings.need("migration_database_url"), role_of(settings.need("database_url")))


async def apply_topology(settings: Settings) -> int:
    """Make the whole topology; returns the number of things asserted. Raises MessagingFailureError."""
    management = BrokerManagement(settings.need("rabbitmq_management_url"))
    try:
        return await management.apply(topology(settings.partitions))
    finally:
        await management.close()


async def create_upstream(settings: Settings, scope: TenantScope, name: str, pepper: bytes) -> DemoCredentials:
    """A tenant with an API key, a broker user of its own name and its ingest queue; the secrets are shown once."""
    engine = pg.create_engine(settings.need("database_url"))
    management = BrokerManagement(settings.need("rabbitmq_management_url"))
    try:
        api_key, key_id, mac = new_api_key(secrets.token_bytes(KEY_BYTES), pepper)
        made = DemoCredentials(scope.tenant_id, api_key, f"up-{scope.tenant_id}", secrets.token_urlsafe(24))
        await management.apply(tenant_ingest(scope.ingest_queue, scope.tenant_id))
        await management.create_upstream_user(
            made.broker_user, made.broker_password, scope.tenant_id, (INGEST, DECISIONS, REJECTED)
        )
        await create_tenant(engine, scope, name, made.broker_user)
        await create_api_key(engine, scope, key_id, mac)
        return made
    finally:
        await management.close()
        await pg.dispose(engine)


async def demo(settings: Settings) -> DemoCredentials | None:
    """The demo tenant and the first admin, made only while no user exists; None when there is one already."""
    engine = pg.create_engine(settings.need("database_url"))
    try:
        if await has_users(engine):
            return None
    finally:
        await pg.dispose(engine)
    keys.init(settings.data_dir)
    made = await create_upstream(settings, DEMO, "Demo lender", keys.pepper(settings))
    path = credentials_file(settings.data_dir)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(made), file)
    # Last, so that a run which was cut off before is done again.
    engine = pg.create_engine(settings.need("database_url"))
    try:
        await create_first_admin(engine, "admin", "First administrator")
    finally:
        await pg.dispose(engine)
    return made
