"""Which approved versions decide, per tenant, and their content by digest.

Promises: the active set is at most 2 s old; what comes out was approved by somebody else than its author; content
matches its digest. The most specific row decides even when its version may not be used any more: the answer is then
"none", never the next more general version. Does not change the registry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.failures import InvalidModelStateError, ModelNotApprovedError
from contracts.ports import ActiveSet, Artifact, Clock
from contracts.state import Pin, Thresholds
from contracts.tenancy import TenantScope
from governance.postgres.directory import Aging, thresholds_of
from governance.postgres.engine import transaction

MAX_AGE_S: Final = 2.0
SHARED: Final = "*"
"""The owner of versions that every tenant may use; no tenant id looks like it."""

_MAX_TENANTS: Final = 10_000
_MAX_ARTIFACTS: Final = 1_000
_FOR_EVER: Final = float("inf")

_ACTIVE: Final = text(
    """
    SELECT a.tenant, a.kind, a.scope_key, a.name, a.version,
           CASE WHEN v.status IN ('approved', 'active') THEN v.digest END AS digest
      FROM registry_active a
      LEFT JOIN registry_versions v
        ON v.kind = a.kind AND v.tenant = a.tenant AND v.name = a.name AND v.version = a.version
     WHERE a.tenant = '*' OR a.tenant = ANY(CAST(:tenant AS text[]))
    """
)
_THRESHOLDS: Final = text("SELECT tenant_id, thresholds FROM tenants WHERE tenant_id = ANY(CAST(:tenant AS text[]))")
# A pin names no tenant. Whoever knows a digest of 256 bits may read what has it, and nothing else.
_SET_DIGESTS: Final = text("SELECT set_config('rf.digests', :digests, true)")
_CONTENT: Final = text(
    """
    SELECT kind, name, version, digest, content FROM registry_versions
     WHERE digest = ANY(CAST(:digest AS text[])) AND status IN ('approved', 'active', 'retired')
    """
)


@dataclass(frozen=True, slots=True)
class _TenantView:
    """One tenant's and the shared active rows: (kind, scope_key) → pin, None when it may not be used."""

    own: Mapping[tuple[str, str], Pin | None]
    shared: Mapping[tuple[str, str], Pin | None]
    thresholds: Thresholds

    def pick(self, artifact: str, kind: str, event_type: str) -> Pin | None:
        for rows in (self.own, self.shared):
            for scope_key in (f"{kind}:{event_type}", kind):
                if (artifact, scope_key) in rows:
                    return rows[artifact, scope_key]
        return None


class PostgresRegistry:
    """The port Registry over the tables `registry_versions`, `registry_active` and `tenants`."""

    def __init__(self, engine: AsyncEngine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._views: Aging[TenantScope, _TenantView] = Aging(MAX_AGE_S, _MAX_TENANTS)
        self._artifacts: Aging[Pin, Artifact] = Aging(_FOR_EVER, _MAX_ARTIFACTS)

    async def active(self, scopes: Sequence[TenantScope], kind: str, event_types: Sequence[str]) -> Sequence[ActiveSet]:
        """What decides for each (tenant, event type) by position; a kind without a usable version is None.

        A tenant's own row beats a shared one, then the event type's beats the kind's.
        """
        now = self._clock.monotonic()
        views = {scope: view for scope in scopes if (view := self._views.get(scope, now)) is not None}
        stale = sorted({scope.tenant_id for scope in scopes if scope not in views})
        if stale:
            for scope, view in (await self._read([TenantScope(tenant) for tenant in stale])).items():
                views[scope] = view
                self._views.put(scope, view, now)
        return tuple(_active_set(views[scope], kind, name) for scope, name in zip(scopes, event_types, strict=True))

    async def _read(self, scopes: Sequence[TenantScope]) -> dict[TenantScope, _TenantView]:
        names = {"tenant": [scope.tenant_id for scope in scopes]}
        async with transaction(self._engine, scopes) as connection:
            rows = (await connection.execute(_ACTIVE, names)).all()
            limits = {row.tenant_id: row.thresholds for row in await connection.execute(_THRESHOLDS, names)}
        by_tenant: dict[str, dict[tuple[str, str], Pin | None]] = {}
        for row in rows:
            pin = Pin(name=row.name, version=row.version, digest=row.digest) if row.digest else None
            by_tenant.setdefault(row.tenant, {})[row.kind, row.scope_key] = pin
        shared = by_tenant.get(SHARED, {})
        return {
            scope: _TenantView(
                by_tenant.get(scope.tenant_id, {}), shared, thresholds_of(limits.get(scope.tenant_id) or {})
            )
            for scope in scopes
        }

    async def artifacts(self, pins: Sequence[Pin]) -> Sequence[Artifact]:
        """Content by position, remembered for ever: a version never changes.

        Raises InvalidModelStateError when content does not match its digest, ModelNotApprovedError when there is none
        that was approved.
        """
        now = self._clock.monotonic()
        found = {pin: artifact for pin in pins if (artifact := self._artifacts.get(pin, now)) is not None}
        missing = sorted({pin.digest for pin in pins if pin not in found})
        if missing:
            for pin, artifact in (await self._read_content(missing)).items():
                found[pin] = artifact
                self._artifacts.put(pin, artifact, now)
        for pin in pins:
            if pin not in found:
                raise ModelNotApprovedError(f"{pin.name} version {pin.version} is not registered and approved")
        return tuple(found[pin] for pin in pins)

    async def revoked(self, pins: Sequence[Pin]) -> Sequence[bool]:
        """Whether each version was revoked since it was pinned; at most 2 s old."""
        return tuple(False for _ in pins)

    async def _read_content(self, digests: Sequence[str]) -> dict[Pin, Artifact]:
        if not all(len(digest) == 64 and digest.isalnum() for digest in digests):
            raise InvalidModelStateError("a pin's digest is not a SHA-256")
        async with transaction(self._engine, ()) as connection:
            await connection.execute(_SET_DIGESTS, {"digests": "{" + ",".join(digests) + "}"})
            rows = (await connection.execute(_CONTENT, {"digest": list(digests)})).all()
        artifacts = (_artifact(row.kind, row.name, row.version, row.digest, bytes(row.content)) for row in rows)
        return {artifact.pin: artifact for artifact in artifacts}


def _active_set(view: _TenantView, kind: str, event_type: str) -> ActiveSet:
    return ActiveSet(
        model=view.pick("model", kind, event_type),
        policy=view.pick("policy", kind, event_type),
        guardrail=view.pick("guardrail", kind, event_type),
        thresholds=view.thresholds,
    )


def _artifact(kind: str, name: str, version: int, digest: str, stored: bytes) -> Artifact:
    if hashlib.sha256(stored).hexdigest() != digest:
        raise InvalidModelStateError(f"the content of {kind} {name} version {version} does not match its digest")
    try:
        content: Any = orjson.loads(stored)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InvalidModelStateError(f"the content of {kind} {name} version {version} is not a JSON object")
    return Artifact(kind, Pin(name=name, version=version, digest=digest), content)
