"""The table `pauses`: commands of people, the park breaker's own entries, and the port Pauses over it.

Promises: a command is audited in its own transaction; an answer to `doors` and `stage` is at most 2 s old, and while
PostgreSQL does not answer the last one holds; what a person paused, the park breaker neither shortens nor explains
anew. Pauses nothing by itself: consumers and doors ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.failures import AuthorizationError, DatabaseError, InvalidRequestError, NotKnownError
from contracts.identity import EVERYWHERE, Principal
from contracts.ports import Clock, PauseNotice
from contracts.tenancy import TenantScope
from contracts.topology import RunningLayouts
from governance.audit import operator_record
from governance.pauses import BREAKER, DOORS, PLACES, StandingPause
from governance.postgres.directory import tenant_ids
from governance.postgres.engine import transaction
from governance.postgres.outbox import enqueue_records

MAX_AGE_S: Final = 2.0
_SYSTEM: Final = Principal("system:park-breaker", "", frozenset())

_SET: Final = text(
    """
    INSERT INTO pauses (tenant, place, reason, set_by, set_at, until)
    VALUES (:tenant, :place, :reason, :set_by, CAST(CAST(:set_at AS text) AS timestamptz),
            CAST(CAST(:until AS text) AS timestamptz))
    ON CONFLICT (tenant, place) DO UPDATE
       SET reason = excluded.reason, set_by = excluded.set_by, set_at = excluded.set_at, until = excluded.until
     WHERE excluded.until IS NULL OR pauses.until IS NOT NULL
    RETURNING place
    """
)
_CLEAR: Final = text("DELETE FROM pauses WHERE tenant = :tenant AND place = :place RETURNING until")
_STANDING: Final = text(
    """
    SELECT tenant, place, reason, set_by, set_at, until FROM pauses
     WHERE until IS NULL OR until > CAST(:at AS timestamptz) ORDER BY tenant = '*' DESC, tenant, place
    """
)


class PostgresPauses:
    """The port Pauses, and the commands behind it. A scope of None is a stage's, for every tenant."""

    def __init__(self, engine: AsyncEngine, clock: Clock, layouts: RunningLayouts) -> None:
        self._engine = engine
        self._clock = clock
        self._layouts = layouts
        self._rows: dict[tuple[str, str], Row[Any]] = {}
        self._read_at: dict[str, float] = {}

    # --- asked by consumers and doors -----------------------------------------------------------------

    async def doors(self, scopes: Sequence[TenantScope]) -> Sequence[PauseNotice | None]:
        """Whether each tenant is paused at the doors."""
        await self._refresh([scope.tenant_id for scope in scopes], scopes)
        return [self._notice(scope.tenant_id, DOORS) for scope in scopes]

    async def stage(self, stage: str) -> PauseNotice | None:
        """Whether a stage is paused."""
        await self._refresh([EVERYWHERE], ())
        return self._notice(EVERYWHERE, stage)

    async def _refresh(self, tenants: Sequence[str], scopes: Sequence[TenantScope]) -> None:
        now = self._clock.monotonic()
        old = [name for name in tenants if now - self._read_at.get(name, -MAX_AGE_S) >= MAX_AGE_S]
        if not old:
            return
        known = all(name in self._read_at for name in old)
        if known:  # one caller looks, all others go on with what was read last, however long the server takes
            self._read_at |= dict.fromkeys(old, now)
        try:
            rows = await self._standing(scopes)
        except DatabaseError:
            if not known:
                raise
            return
        # What was read for other tenants stays: the row-level policy showed these and the stages.
        read = {*tenants, EVERYWHERE}
        self._rows = {key: row for key, row in self._rows.items() if key[0] not in read}
        self._rows |= {(row.tenant, row.place): row for row in rows}
        self._read_at |= dict.fromkeys(read, now)

    def _notice(self, tenant: str, place: str) -> PauseNotice | None:
        row = self._rows.get((tenant, place))
        if row is None:
            return None
        seconds = None if row.until is None else (row.until - self._clock.now()).total_seconds()
        return None if seconds is not None and seconds <= 0 else PauseNotice(row.reason, seconds)

    async def _standing(self, scopes: Sequence[TenantScope]) -> Sequence[Row[Any]]:
        async with transaction(self._engine, scopes) as connection:
            return (await connection.execute(_STANDING, {"at": self._clock.now()})).all()

    # --- commands of people -----------------------------------------------------------------------------

    async def standing(self, tenants: frozenset[str]) -> Sequence[StandingPause]:
        """Every pause of these tenants ("*": of all), and those of stages, which everybody may see."""
        scopes = [TenantScope(name) for name in tenants - {EVERYWHERE}]
        if EVERYWHERE in tenants:
            scopes = list(await tenant_ids(self._engine))
        return [_document(row) for row in await self._standing(scopes)]

    async def pause(self, caller: Principal, scope: TenantScope | None, place: str, reason: str) -> StandingPause:
        """Pause until somebody resumes it; seen within 5 s. Raises NotKnownError for no such place."""
        _check(caller, scope, place, reason)
        pause = self._new(scope, place, reason, caller.person)
        await self._set(caller, scope, pause)
        return pause

    async def resume(self, caller: Principal, scope: TenantScope | None, place: str, reason: str) -> None:
        """Let it go on, whoever paused it. Raises NotKnownError when it is not paused."""
        _check(caller, scope, place, reason)
        at = self._clock.now()
        async with transaction(self._engine, [scope], shared=scope is None) as connection:
            key = {"tenant": _owner(scope), "place": place}
            row = (await connection.execute(_CLEAR, key)).one_or_none()
            if row is None or (row.until is not None and row.until <= at):
                raise NotKnownError(f"{place} is not paused here")
            record = operator_record(scope, "pause.cleared", caller, _said(at), {"place": place}, {"reason": reason})
            await enqueue_records(connection, scope, [record], self._layouts)

    async def trip(self, scope: TenantScope, reason: str, seconds: float) -> bool:
        """The park breaker pauses a tenant for a while; False when a person's pause holds already."""
        return await self._set(_SYSTEM, scope, self._new(scope, DOORS, reason, BREAKER, seconds))

    def _new(
        self, scope: TenantScope | None, place: str, reason: str, set_by: str, seconds: float | None = None
    ) -> StandingPause:
        at = self._clock.now()
        return StandingPause(
            tenant=scope.tenant_id if scope else None,
            place=place,
            reason=reason,
            set_by=set_by,
            set_at=_said(at),
            until=None if seconds is None else _said(at + timedelta(seconds=seconds)),
        )

    async def _set(self, caller: Principal, scope: TenantScope | None, pause: StandingPause) -> bool:
        values = pause.model_dump() | {"tenant": _owner(scope)}
        detail: dict[str, str | int] = {"reason": pause.reason}
        if pause.until is not None:
            detail["until"] = pause.until
        async with transaction(self._engine, [scope], shared=scope is None) as connection:
            if (await connection.execute(_SET, values)).one_or_none() is None:
                return False
            record = operator_record(scope, "pause.set", caller, pause.set_at, {"place": pause.place}, detail)
            await enqueue_records(connection, scope, [record], self._layouts)
        return True


def _check(caller: Principal, scope: TenantScope | None, place: str, reason: str) -> None:
    if not caller.person:
        raise AuthorizationError("a person must answer for a pause; this credential belongs to nobody")
    if place not in PLACES or (place == DOORS) != (scope is not None):
        raise NotKnownError(f"there is no such place: a tenant has {DOORS}, _shared has {', '.join(PLACES[1:])}")
    if not reason.strip():
        raise InvalidRequestError("say why", pointers=(("/reason", "must not be empty"),))


def _owner(scope: TenantScope | None) -> str:
    return EVERYWHERE if scope is None else scope.tenant_id


def _document(row: Row[Any]) -> StandingPause:
    return StandingPause(
        tenant=None if row.tenant == EVERYWHERE else row.tenant,
        place=row.place,
        reason=row.reason,
        set_by=row.set_by,
        set_at=_said(row.set_at),
        until=_said(row.until) if row.until else None,
    )


def _said(at: datetime) -> str:
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")
