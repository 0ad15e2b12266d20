"""Makes what a first run needs: schema, topology, the first people, and the demo tenant with its credentials.

`demo()` writes directly, as only an installation without any user allows: afterwards tenants, users
and keys are made through the operator API by somebody with a name. Passwords are random and lie in files that only
their owner reads.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from contracts.identity import EVERYWHERE, Grant, Role
from contracts.tenancy import TenantScope
from contracts.topology import topology_of
from deploy import keys, relayout
from deploy.migrations.upgrade import apply as apply_migrations
from deploy.migrations.upgrade import role_of
from deploy.settings import Settings
from governance.access import KEY_BYTES, new_api_key
from governance.passwords import SALT_BYTES, Passwords
from governance.postgres import engine as pg
from governance.postgres.directory import FirstUser, create_api_key, create_first_users, create_tenant, has_users
from governance.postgres.tenants import upstream_user
from resilience.management import BrokerManagement

DEMO = TenantScope("demo")


ADMIN = "admin"
DEMO_PEOPLE = (
    FirstUser("ana", "Ana, demo analyst", frozenset({Grant(DEMO.tenant_id, Role.ANALYST)})),
    FirstUser("ben", "Ben, demo approver", frozenset({Grant(DEMO.tenant_id, Role.APPROVER)})),
)
"""Two people of the demo tenant, so that four eyes can be tried."""


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


@dataclass(frozen=True, slots=True)
class FirstLogin:
    """The first administrator's password, and those of the demo tenant's people by user."""

    user: str
    password: str
    people: dict[str, str]


def first_login_file(data_dir: Path) -> Path:
    """Where the first administrator's password lies until somebody changes it and removes the file."""
    return data_dir / "keys" / "admin.json"


def first_login(data_dir: Path) -> FirstLogin | None:
    """The first passwords, None when `db upgrade --demo` made none here."""
    path = first_login_file(data_dir)
    return FirstLogin(**json.loads(path.read_text())) if path.exists() else None


async def migrate(settings: Settings) -> None:
    """Bring the schema to this release. Raises DatabaseError."""
    await apply_migrations(settings.need("migration_database_url"), role_of(settings.need("database_url")))


async def apply_topology(settings: Settings) -> int:
    """Make the whole topology of the versions that run; returns the number of things asserted.

    Raises MessagingFailureError, DatabaseError.
    """
    async with relayout.opened(settings) as (management, layouts):
        return await management.apply(topology_of(layouts.running))


async def create_upstream(settings: Settings, scope: TenantScope, name: str, pepper: bytes) -> DemoCredentials:
    """A tenant with an API key, a broker user of its own name and its ingest queue; the secrets are shown once."""
    engine = pg.create_engine(settings.need("database_url"))
    management = BrokerManagement(settings.need("rabbitmq_management_url"))
    try:
        api_key, key_id, mac = new_api_key(secrets.token_bytes(KEY_BYTES), pepper)
        made = DemoCredentials(scope.tenant_id, api_key, upstream_user(scope), secrets.token_urlsafe(24))
        await management.open_upstream(scope, made.broker_user, made.broker_password)
        await create_tenant(engine, scope, name, made.broker_user)
        await create_api_key(engine, scope, key_id, mac)
        return made
    finally:
        await management.close()
        await pg.dispose(engine)


async def demo(settings: Settings) -> DemoCredentials | None:
    """The demo tenant and the first admin, made only while no user exists; None when there is one already."""
    # First and always: a data directory of an older release has users, but not every key that roles need now.
    keys.init(settings.data_dir)
    engine = pg.create_engine(settings.need("database_url"))
    try:
        if await has_users(engine):
            return None
    finally:
        await pg.dispose(engine)
    made = await create_upstream(settings, DEMO, "Demo lender", keys.pepper(settings))
    _write_private(credentials_file(settings.data_dir), asdict(made))
    passwords = {user_id: secrets.token_urlsafe(18) for user_id in (ADMIN, *(user.user_id for user in DEMO_PEOPLE))}
    first = FirstLogin(ADMIN, passwords[ADMIN], {name: text for name, text in passwords.items() if name != ADMIN})
    _write_private(first_login_file(settings.data_dir), asdict(first))
    # Last, so that a run which was cut off before is done again.
    await _create_people(settings, passwords)
    return made


async def _create_people(settings: Settings, passwords: dict[str, str]) -> None:
    hasher = Passwords()
    hashes = {name: await hasher.hash(text, secrets.token_bytes(SALT_BYTES)) for name, text in passwords.items()}
    admin = FirstUser(ADMIN, "First administrator", frozenset({Grant(EVERYWHERE, Role.ADMIN)}))
    people = [replace(user, password_hash=hashes[user.user_id]) for user in (admin, *DEMO_PEOPLE)]
    engine = pg.create_engine(settings.need("database_url"))
    try:
        await create_first_users(engine, people)
    finally:
        await pg.dispose(engine)


def _write_private(path: Path, document: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(document, file)
