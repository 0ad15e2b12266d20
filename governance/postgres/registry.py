"""Which approved versions decide, per tenant, and their content by digest.

Promises: the active set is at most 2 s old, and all of one tenant's comes from one snapshot, so that versions that
became active together are never seen half; what is active somewhere was signed for exactly that tenant and kind by a
trusted key, or is the release's own; content was approved by somebody else than its author, is signed so too, and
matches its digest. The most specific row decides even when its version may not be used any more: the answer is then
"none", never the next more general version. Does not change the registry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
import structlog
from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.failures import InvalidModelStateError, ModelNotApprovedError
from contracts.ports import ActiveSet, Artifact, Clock
from contracts.state import Pin, Thresholds
from contracts.tenancy import TenantScope
from governance.postgres.directory import Aging, thresholds_of
from governance.postgres.engine import transaction
from governance.registry import ANY_MODEL, SHARED, digest_of, release_artifacts
from governance.signing import Statement, Verifier

log = structlog.get_logger(__name__)

MAX_AGE_S: Final = 1.0
"""Half of what is promised: the read itself takes its time too."""

_MAX_TENANTS: Final = 10_000
_MAX_ARTIFACTS: Final = 1_000
_MAX_REVOKED: Final = 10_000
_MAX_SIGNED: Final = 10_000
_FOR_EVER: Final = float("inf")
_TELL_AGAIN_S: Final = 60.0

# One statement is one snapshot, whatever commits between two of them.
_VIEW: Final = text(
    """
    SELECT 'active' AS part, a.tenant, a.kind, a.scope_key, a.name, a.version,
           CASE WHEN v.status IN ('approved', 'active') AND (v.valid_until IS NULL OR v.valid_until > now())
                THEN v.digest END AS digest,
           CAST(NULL AS jsonb) AS thresholds, v.author, v.approver, v.approved_at, v.valid_until, v.signature, v.key_id
      FROM registry_active a
      LEFT JOIN registry_versions v
        ON v.kind = a.kind AND v.tenant = a.tenant AND v.name = a.name AND v.version = a.version
     WHERE a.tenant = '*' OR a.tenant = ANY(CAST(:tenant AS text[]))
    UNION ALL
    SELECT 'halt', h.tenant, NULL, NULL, h.model, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL FROM halts h
     WHERE h.tenant = '*' OR h.tenant = ANY(CAST(:tenant AS text[]))
    UNION ALL
    SELECT 'tenant', t.tenant_id, NULL, NULL, NULL, NULL, NULL, t.thresholds, NULL, NULL, NULL, NULL, NULL, NULL
      FROM tenants t
     WHERE t.tenant_id = ANY(CAST(:tenant AS text[]))
    """
)
# A pin names no tenant. Whoever knows a digest of 256 bits may read what has it, and nothing else.
_SET_DIGESTS: Final = text("SELECT set_config('rf.digests', :digests, true)")
_CONTENT: Final = text(
    """
    SELECT tenant, kind, name, version, digest, content, author, approver, approved_at, valid_until, signature, key_id
      FROM registry_versions
     WHERE digest = ANY(CAST(:digest AS text[])) AND status IN ('approved', 'active', 'retired')
    """
)
_REVOKED: Final = text(
    """
    SELECT name, version, digest, coalesce(bool_or(status = 'revoked') FILTER (WHERE tenant = '*'),
                                           bool_or(status = 'revoked')) AS revoked
      FROM registry_versions WHERE digest = ANY(CAST(:digest AS text[])) GROUP BY name, version, digest
    """
)


@dataclass(frozen=True, slots=True)
class _TenantView:
    """One tenant's and the shared active rows: (kind, scope_key) → pin, None when it may not be used."""

    own: Mapping[tuple[str, str], Pin | None]
    shared: Mapping[tuple[str, str], Pin | None]
    thresholds: Thresholds
    halts: frozenset[str]

    def pick(self, artifact: str, kind: str, event_type: str) -> tuple[Pin | None, bool]:
        """What is chosen, None when it may not be used, and whether anything is chosen at all."""
        for rows in (self.own, self.shared):
            for scope_key in (f"{kind}:{event_type}", kind):
                if (artifact, scope_key) in rows:
                    return rows[artifact, scope_key], True
        return None, False

    def active_set(self, kind: str, event_type: str) -> ActiveSet:
        model, _ = self.pick("model", kind, event_type)
        optional = {name: self.pick(name, kind, event_type) for name in ("lists", "reasons")}
        return ActiveSet(
            model=model,
            policy=self.pick("policy", kind, event_type)[0],
            guardrail=self.pick("guardrail", kind, event_type)[0],
            lists=optional["lists"][0],
            reasons=optional["reasons"][0],
            lost=tuple(name for name, (pin, chosen) in optional.items() if chosen and pin is None),
            trial=self.pick("trial", kind, event_type)[0],
            thresholds=self.thresholds,
            halted=ANY_MODEL in self.halts or (model is not None and model.name in self.halts),
        )


class PostgresRegistry:
    """The port Registry over the registry's tables, `halts` and `tenants`.

    `verifier` knows the keys whose signatures count; without one only what this release brings is used.
    """

    def __init__(self, engine: AsyncEngine, clock: Clock, verifier: Verifier | None = None) -> None:
        self._engine = engine
        self._clock = clock
        self._verifier = verifier or Verifier(())
        self._released = frozenset((artifact.kind, artifact.pin) for artifact in release_artifacts())
        self._views: Aging[TenantScope, _TenantView] = Aging(MAX_AGE_S, _MAX_TENANTS)
        self._artifacts: Aging[Pin, Artifact] = Aging(_FOR_EVER, _MAX_ARTIFACTS)
        self._revoked: Aging[Pin, bool] = Aging(MAX_AGE_S, _MAX_REVOKED)
        # A signature that is good for a statement stays so: it is checked once, not at every look at what is active.
        self._signed: Aging[tuple[Statement, str | None, bytes | None], bool] = Aging(_FOR_EVER, _MAX_SIGNED)
        self._told: Aging[tuple[str, str], bool] = Aging(_TELL_AGAIN_S, _MAX_SIGNED)

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
        return tuple(views[scope].active_set(kind, name) for scope, name in zip(scopes, event_types, strict=True))

    async def _read(self, scopes: Sequence[TenantScope]) -> dict[TenantScope, _TenantView]:
        async with transaction(self._engine, scopes) as connection:
            rows = (await connection.execute(_VIEW, {"tenant": [scope.tenant_id for scope in scopes]})).all()
        active: dict[str, dict[tuple[str, str], Pin | None]] = {}
        halts: dict[str, set[str]] = {}
        thresholds: dict[str, Any] = {}
        for row in rows:
            if row.part == "active":
                pin = _pin(row) if row.digest and self._is_vouched(row) else None
                active.setdefault(row.tenant, {})[row.kind, row.scope_key] = pin
            elif row.part == "halt":
                halts.setdefault(row.tenant, set()).add(row.name)
            else:
                thresholds[row.tenant] = row.thresholds
        shared, everywhere = active.get(SHARED, {}), halts.get(SHARED, set())
        return {
            scope: _TenantView(
                active.get(scope.tenant_id, {}),
                shared,
                thresholds_of(thresholds.get(scope.tenant_id) or {}),
                frozenset(everywhere | halts.get(scope.tenant_id, set())),
            )
            for scope in scopes
        }

    async def artifacts(self, pins: Sequence[Pin]) -> Sequence[Artifact]:
        """Content by position, remembered for ever: a version never changes, and `revoked` tells the rest.

        Raises InvalidModelStateError when content does not match its digest or its signature, ModelNotApprovedError
        when there is none that was approved.
        """
        now = self._clock.monotonic()
        found = {pin: artifact for pin in pins if (artifact := self._artifacts.get(pin, now)) is not None}
        missing = [pin for pin in dict.fromkeys(pins) if pin not in found]
        if missing:
            rows = await self._by_digest(_CONTENT, missing)
            for pin in missing:
                found[pin] = self._trusted(pin, [row for row in rows if _pin(row) == pin])
                self._artifacts.put(pin, found[pin], now)
        return tuple(found[pin] for pin in pins)

    async def revoked(self, pins: Sequence[Pin]) -> Sequence[bool]:
        """Whether each version was revoked since it was pinned; at most 2 s old.

        A pin names no tenant. Where the whole installation has the very same version, its status counts, so that no
        tenant's copy of it can stop the others; else any revocation counts.
        """
        now = self._clock.monotonic()
        known = {pin: answer for pin in pins if (answer := self._revoked.get(pin, now)) is not None}
        asked = [pin for pin in dict.fromkeys(pins) if pin not in known]
        if asked:
            rows = {_pin(row): bool(row.revoked) for row in await self._by_digest(_REVOKED, asked)}
            for pin in asked:
                known[pin] = rows.get(pin, False)
                self._revoked.put(pin, known[pin], now)
        return tuple(known[pin] for pin in pins)

    async def _by_digest(self, statement: Any, pins: Iterable[Pin]) -> Sequence[Row[Any]]:
        digests = sorted({pin.digest for pin in pins})
        if not all(len(digest) == 64 and digest.isascii() and digest.isalnum() for digest in digests):
            raise InvalidModelStateError("a pin's digest is not a SHA-256")
        async with transaction(self._engine, ()) as connection:
            await connection.execute(_SET_DIGESTS, {"digests": "{" + ",".join(digests) + "}"})
            return (await connection.execute(statement, {"digest": digests})).all()

    def _trusted(self, pin: Pin, rows: Sequence[Row[Any]]) -> Artifact:
        """The first of a pin's rows that stands up to its digest and its signature; two tenants may have the same."""
        problem: InvalidModelStateError | None = None
        for row in rows:
            try:
                return self._artifact(row)
            except InvalidModelStateError as error:
                problem = error
        raise problem or ModelNotApprovedError(f"{pin.name} version {pin.version} is not registered and approved")

    def _artifact(self, row: Row[Any]) -> Artifact:
        what, stored = f"{row.kind} {row.name} version {row.version}", bytes(row.content)
        if digest_of(stored) != row.digest:
            raise InvalidModelStateError(f"the content of {what} does not match its digest")
        self._vouch(row, what)
        try:
            content: Any = orjson.loads(stored)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise InvalidModelStateError(f"the content of {what} is not a JSON object")
        approved, until = (None if at is None else at.isoformat() for at in (row.approved_at, row.valid_until))
        return Artifact(row.kind, _pin(row), content, approved, until)

    def _vouch(self, row: Row[Any], what: str) -> None:
        """Return when this very row, tenant and kind included, is the release's or signed. Raises as `artifacts`."""
        if row.tenant == SHARED and row.signature is None and (row.kind, _pin(row)) in self._released:
            return
        if row.approver is None or row.approved_at is None:
            raise InvalidModelStateError(f"{what} names nobody who approved it")
        signature, statement = None if row.signature is None else bytes(row.signature), _statement(row)
        claim = (statement, row.key_id, signature)
        if self._signed.get(claim, 0.0) is None:
            self._verifier.check(statement, row.key_id, signature)
            self._signed.put(claim, True, 0.0)

    def _is_vouched(self, row: Row[Any]) -> bool:
        """Whether an active row was signed for the place where it is active.

        A pin names no tenant, so without this a copy of what one tenant approved would pass in another by the
        signature that the first one has.
        """
        what = f"{row.kind} {row.name} version {row.version}"
        try:
            self._vouch(row, what)
        except InvalidModelStateError as error:
            now = self._clock.monotonic()
            if self._told.get((row.tenant, what), now) is None:  # not with every look: it is refused every second
                self._told.put((row.tenant, what), True, now)
                log.error("registry.active_version_refused", tenant=row.tenant, reason=error.detail)
            return False
        return True


def _pin(row: Row[Any]) -> Pin:
    return Pin(name=row.name, version=row.version, digest=row.digest)


def _statement(row: Row[Any]) -> Statement:
    return Statement(
        kind=row.kind,
        tenant=row.tenant,
        name=row.name,
        version=row.version,
        digest=row.digest,
        author=row.author,
        approver=row.approver,
        approved_at=row.approved_at,
        valid_until=row.valid_until,
    )
