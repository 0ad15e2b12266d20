"""Tenants, API keys and users: read before a tenant is known, so these three tables have no row-level security.

Promises: a key is compared in constant time; an answer, the negative one too, is at most 4 s old, so that with the
way to the caller a revocation holds within 5 s; an expiry holds at once; a flood of invented keys neither grows the
memory nor drives known keys out of it. What a key may do is decided elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Generic, TypeVar

from pydantic import ValidationError
from sqlalchemy import Row, TextClause, func, insert, select, text
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.failures import InvalidMetadataError, InvalidModelStateError, InvalidTenantError
from contracts.identity import EVERYWHERE, Grant, Person, Principal, Role
from contracts.limits import TenantLimits
from contracts.ports import Clock, TenantProfile
from contracts.state import Thresholds
from contracts.tenancy import TenantScope
from governance.access import matches, parse_api_key
from governance.postgres.engine import sqlstate, transaction
from governance.postgres.schema import api_keys, memberships, tenants, users

MAX_AGE_S: Final = 4.0
_MAX_KEYS: Final = 10_000
_UNIQUE_VIOLATION: Final = "23505"
_FOREIGN_KEY_VIOLATION: Final = "23503"
_FIRST_ADMIN_LOCK: Final = 7_205_759_403_792

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Aging(Generic[K, V]):
    """Values that are forgotten after `max_age_s` seconds, `size` of them at most; the oldest gives way."""

    __slots__ = ("_max_age_s", "_size", "_values")

    def __init__(self, max_age_s: float, size: int) -> None:
        self._max_age_s = max_age_s
        self._size = size
        self._values: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def get(self, key: K, now: float) -> V | None:
        """The value, if it is young enough; `now` is monotonic seconds."""
        found = self._values.get(key)
        return None if found is None or now - found[0] >= self._max_age_s else found[1]

    def put(self, key: K, value: V, now: float) -> None:
        """Remember a value that was read at `now`."""
        self._values[key] = (now, value)
        self._values.move_to_end(key)
        while len(self._values) > self._size:
            self._values.popitem(last=False)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True, slots=True)
class _StoredKey:
    mac: bytes
    principal: Principal
    expires_at: datetime | None

    def lives(self, now: datetime) -> bool:
        """Whether the key has not expired."""
        return self.expires_at is None or now < self.expires_at


@dataclass(frozen=True, slots=True)
class _Tenants:
    profiles: tuple[TenantProfile, ...]
    active: frozenset[TenantScope]


_PERSON: Final = """
    SELECT u.user_id, u.disabled_at, u.tokens_valid_from,
           array(SELECT ARRAY[m.tenant, m.role] FROM memberships m WHERE m.user_id = u.user_id) AS grants
      FROM users u WHERE
"""
_BY_ID: Final = text(_PERSON + "u.user_id = :user_id")
_BY_SUBJECT: Final = text(_PERSON + "u.oidc_issuer = :issuer AND u.oidc_subject = :subject")


class PostgresDirectory:
    """The ports Directory and PersonBook over `tenants`, `users` and `memberships`, and the API keys of Credentials.

    `pepper` is the key of the stored MACs.
    """

    def __init__(self, engine: AsyncEngine, clock: Clock, pepper: bytes) -> None:
        self._engine = engine
        self._clock = clock
        self._pepper = pepper
        self._known: Aging[str, _StoredKey] = Aging(MAX_AGE_S, _MAX_KEYS)
        self._unknown: Aging[str, bool] = Aging(MAX_AGE_S, _MAX_KEYS)
        self._tenants: Aging[str, _Tenants] = Aging(MAX_AGE_S, 1)
        self._people: Aging[tuple[str, ...], tuple[Person | None]] = Aging(MAX_AGE_S, _MAX_KEYS)

    async def principal(self, api_key: str) -> Principal | None:
        """The owner of an API key; None when it is malformed, unknown, revoked, or its tenant is not active."""
        presented = parse_api_key(api_key)
        if presented is None:
            return None
        now = self._clock.monotonic()
        if self._unknown.get(presented.key_id, now):
            return None
        stored = self._known.get(presented.key_id, now)
        if stored is None:
            stored = await self._read_key(presented.key_id)
            if stored is None:
                self._unknown.put(presented.key_id, True, now)
                return None
            self._known.put(presented.key_id, stored, now)
        known = matches(presented, stored.mac, self._pepper) and stored.lives(self._clock.now())
        return stored.principal if known else None

    async def _read_key(self, key_id: str) -> _StoredKey | None:
        query = (
            select(api_keys.c.tenant, api_keys.c.mac, api_keys.c.role, api_keys.c.owner, api_keys.c.expires_at)
            .join(tenants, tenants.c.tenant_id == api_keys.c.tenant)
            .where(api_keys.c.key_id == key_id, api_keys.c.revoked_at.is_(None), tenants.c.status == "active")
        )
        async with transaction(self._engine, ()) as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            return None
        return _StoredKey(bytes(row.mac), _key_owner(TenantScope(row.tenant), key_id, row), row.expires_at)

    async def tenants(self) -> Sequence[TenantProfile]:
        """Every tenant, in order of its id; at most 4 s old.

        Suspended ones too: what their broker user had published before is confirmed, so it is still taken up.
        """
        return (await self._read_tenants()).profiles

    async def serves(self, scope: TenantScope) -> bool:
        """Whether the tenant exists and is not suspended; at most 4 s old."""
        return scope in (await self._read_tenants()).active

    async def _read_tenants(self) -> _Tenants:
        now = self._clock.monotonic()
        cached = self._tenants.get("", now)
        if cached is not None:
            return cached
        async with transaction(self._engine, ()) as connection:
            rows = (await connection.execute(select(tenants).order_by(tenants.c.tenant_id))).all()
        active = frozenset(TenantScope(row.tenant_id) for row in rows if row.status == "active")
        found = _Tenants(tuple(_profile(row) for row in rows), active)
        self._tenants.put("", found, now)
        return found

    async def person(self, user_id: str) -> Person | None:
        """A user by id, with every grant; at most 4 s old."""
        return await self._person(("id", user_id), _BY_ID, {"user_id": user_id})

    async def person_of(self, issuer: str, subject: str) -> Person | None:
        """A user by what an OpenID Connect issuer calls them; at most 4 s old."""
        return await self._person(("oidc", issuer, subject), _BY_SUBJECT, {"issuer": issuer, "subject": subject})

    async def _person(self, key: tuple[str, ...], query: TextClause, values: dict[str, str]) -> Person | None:
        now = self._clock.monotonic()
        cached = self._people.get(key, now)
        if cached is not None:
            return cached[0]
        person = None
        # A NUL fits no column, so nobody is called that.
        if not any("\0" in value for value in values.values()):
            async with transaction(self._engine, ()) as connection:
                row = (await connection.execute(query, values)).one_or_none()
            person = None if row is None else _person(row)
        self._people.put(key, (person,), now)
        return person


def _key_owner(scope: TenantScope, key_id: str, row: Any) -> Principal:
    return Principal(f"key:{key_id}", row.owner, frozenset({Grant(scope.tenant_id, Role(row.role))}), scope)


def _person(row: Row[Any]) -> Person:
    grants = frozenset(Grant(tenant, Role(role)) for tenant, role in row.grants)
    return Person(row.user_id, grants, row.disabled_at is not None, row.tokens_valid_from)


def _profile(row: Row[Any]) -> TenantProfile:
    try:
        limits = TenantLimits.model_validate(row.limits)
    except ValidationError:
        raise InvalidModelStateError("a tenant's stored limits cannot be read; set them again") from None
    return TenantProfile(TenantScope(row.tenant_id), row.name, row.broker_user, thresholds_of(row.thresholds), limits)


def thresholds_of(stored: dict[str, Any]) -> Thresholds:
    """A tenant's thresholds as they are stored. Raises InvalidModelStateError when they cannot be read."""
    try:
        return Thresholds.model_validate(stored)
    except ValidationError:
        raise InvalidModelStateError("a tenant's stored thresholds cannot be read; set them again") from None


async def create_tenant(
    engine: AsyncEngine,
    scope: TenantScope,
    name: str,
    broker_user: str | None = None,
    thresholds: Thresholds | None = None,
) -> bool:
    """Make a tenant; False when it is there already, which changes nothing.

    Raises InvalidMetadataError when the broker user belongs to another tenant.
    """
    values = {
        "tenant_id": scope.tenant_id,
        "name": name,
        "broker_user": broker_user,
        "thresholds": (thresholds or Thresholds()).model_dump(mode="json"),
    }
    statement = upsert(tenants).values(**values).on_conflict_do_nothing(index_elements=["tenant_id"])
    try:
        async with transaction(engine, [scope]) as connection:
            return (await connection.execute(statement.returning(tenants.c.tenant_id))).one_or_none() is not None
    except IntegrityError as error:
        if sqlstate(error) != _UNIQUE_VIOLATION:
            raise
        raise InvalidMetadataError(f"the broker user of tenant {scope} belongs to another tenant") from None


async def create_api_key(
    engine: AsyncEngine, scope: TenantScope, key_id: str, mac: bytes, role: str = "SERVICE"
) -> None:
    """Store a key that `governance.access.new_api_key` made. Raises InvalidTenantError for an unknown tenant."""
    try:
        async with transaction(engine, [scope]) as connection:
            values = {"key_id": key_id, "tenant": scope.tenant_id, "mac": mac, "role": role}
            await connection.execute(insert(api_keys).values(**values))
    except IntegrityError as error:
        if sqlstate(error) != _FOREIGN_KEY_VIOLATION:
            raise
        raise InvalidTenantError(f"there is no tenant {scope}; create it first") from None


async def has_users(engine: AsyncEngine) -> bool:
    """Whether anybody can operate this installation."""
    async with transaction(engine, ()) as connection:
        return bool((await connection.execute(select(func.count()).select_from(users))).scalar_one())


@dataclass(frozen=True, slots=True)
class FirstUser:
    """A user whom the installation itself makes, before there is anybody to make one."""

    user_id: str
    name: str
    grants: frozenset[Grant]
    password_hash: str | None = None


async def create_first_admin(
    engine: AsyncEngine, user_id: str, name: str, password_hash: str | None = None, role: Role = Role.ADMIN
) -> bool:
    """Make the first user; False when there is any user already, however many call this at once."""
    return await create_first_users(
        engine, [FirstUser(user_id, name, frozenset({Grant(EVERYWHERE, role)}), password_hash)]
    )


async def create_first_users(engine: AsyncEngine, people: Sequence[FirstUser]) -> bool:
    """Make the first users, all or none; False when there is any user already, however many call this at once."""
    async with transaction(engine, ()) as connection:
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _FIRST_ADMIN_LOCK})
        if (await connection.execute(select(func.count()).select_from(users))).scalar_one():
            return False
        for user in people:
            values = {"user_id": user.user_id, "name": user.name, "password_hash": user.password_hash}
            await connection.execute(insert(users).values(**values))
            for grant in sorted(user.grants, key=lambda grant: (grant.tenant, grant.role)):
                row = {"user_id": user.user_id, "tenant": grant.tenant, "role": grant.role}
                await connection.execute(insert(memberships).values(**row, granted_by="installation"))
        return True


async def tenant_ids(engine: AsyncEngine) -> tuple[TenantScope, ...]:
    """Every tenant, whatever its status, in order of its id."""
    async with transaction(engine, ()) as connection:
        rows = await connection.execute(select(tenants.c.tenant_id).order_by(tenants.c.tenant_id))
        return tuple(TenantScope(row.tenant_id) for row in rows)
