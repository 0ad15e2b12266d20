"""Tenants, API keys and users: read before a tenant is known, so these three tables have no row-level security.

Promises: a key is compared in constant time; an answer, the negative one too, is at most 5 s old; a flood of
invented keys neither grows the memory nor drives known keys out of it. What a key may do is decided elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from pydantic import ValidationError
from sqlalchemy import Row, func, insert, select, text
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.failures import InvalidMetadataError, InvalidModelStateError, InvalidTenantError
from contracts.identity import EVERYWHERE, Grant, Principal, Role
from contracts.ports import Clock, TenantProfile
from contracts.state import Thresholds
from contracts.tenancy import TenantScope
from governance.access import matches, parse_api_key
from governance.postgres.engine import sqlstate, transaction
from governance.postgres.schema import api_keys, memberships, tenants, users

MAX_AGE_S: Final = 5.0
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


class PostgresDirectory:
    """The port Directory over the tables `tenants` and `api_keys`; `pepper` is the key of the stored MACs."""

    def __init__(self, engine: AsyncEngine, clock: Clock, pepper: bytes) -> None:
        self._engine = engine
        self._clock = clock
        self._pepper = pepper
        self._known: Aging[str, _StoredKey] = Aging(MAX_AGE_S, _MAX_KEYS)
        self._unknown: Aging[str, bool] = Aging(MAX_AGE_S, _MAX_KEYS)
        self._tenants: Aging[str, tuple[TenantProfile, ...]] = Aging(MAX_AGE_S, 1)

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
        return stored.principal if matches(presented, stored.mac, self._pepper) else None

    async def _read_key(self, key_id: str) -> _StoredKey | None:
        query = (
            select(api_keys.c.tenant, api_keys.c.mac, api_keys.c.role, api_keys.c.owner)
            .join(tenants, tenants.c.tenant_id == api_keys.c.tenant)
            .where(api_keys.c.key_id == key_id, api_keys.c.revoked_at.is_(None), tenants.c.status == "active")
            .where((api_keys.c.expires_at.is_(None)) | (api_keys.c.expires_at > func.now()))
        )
        async with transaction(self._engine, ()) as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            return None
        return _StoredKey(bytes(row.mac), _key_owner(TenantScope(row.tenant), key_id, row))

    async def tenants(self) -> Sequence[TenantProfile]:
        """Every active tenant, in order of its id; at most 5 s old."""
        now = self._clock.monotonic()
        cached = self._tenants.get("", now)
        if cached is not None:
            return cached
        query = select(tenants).where(tenants.c.status == "active").order_by(tenants.c.tenant_id)
        async with transaction(self._engine, ()) as connection:
            rows = (await connection.execute(query)).all()
        profiles = tuple(_profile(row) for row in rows)
        self._tenants.put("", profiles, now)
        return profiles


def _key_owner(scope: TenantScope, key_id: str, row: Any) -> Principal:
    return Principal(f"key:{key_id}", row.owner, frozenset({Grant(scope.tenant_id, Role(row.role))}), scope)


def _profile(row: Row[Any]) -> TenantProfile:
    return TenantProfile(TenantScope(row.tenant_id), row.name, row.broker_user, thresholds_of(row.thresholds))


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


async def create_first_admin(
    engine: AsyncEngine, user_id: str, name: str, password_hash: str | None = None, role: Role = Role.ADMIN
) -> bool:
    """Make the first user; False when there is any user already, however many call this at once."""
    async with transaction(engine, ()) as connection:
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _FIRST_ADMIN_LOCK})
        if (await connection.execute(select(func.count()).select_from(users))).scalar_one():
            return False
        values = {"user_id": user_id, "name": name, "password_hash": password_hash}
        await connection.execute(insert(users).values(**values))
        grant = {"user_id": user_id, "tenant": EVERYWHERE, "role": role, "granted_by": "installation"}
        await connection.execute(insert(memberships).values(**grant))
        return True


async def tenant_ids(engine: AsyncEngine) -> tuple[TenantScope, ...]:
    """Every tenant, whatever its status, in order of its id."""
    async with transaction(engine, ()) as connection:
        rows = await connection.execute(select(tenants.c.tenant_id).order_by(tenants.c.tenant_id))
        return tuple(TenantScope(row.tenant_id) for row in rows)
