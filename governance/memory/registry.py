"""Which approved versions decide, in memory: the release's own, and what the embedded mode or a test adds.

The rules of reading are those of `governance.postgres.registry`, but for age: answers are never older than the last
change. Changing it is direct and asks nobody: the gate with its four eyes, its signatures and its history is the
server's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

import orjson

from contracts.events import canonical_json
from contracts.failures import InvalidModelStateError, ModelNotApprovedError
from contracts.ports import ActiveSet, Artifact
from contracts.state import Pin, Thresholds
from contracts.tenancy import TenantScope
from governance.memory.database import MemoryDatabase, Table, Transaction
from governance.memory.directory import TENANTS
from governance.registry import ANY_MODEL, SHARED, VersionStatus, release_artifacts

_USABLE: Final = frozenset({VersionStatus.APPROVED, VersionStatus.ACTIVE})
_READABLE: Final = _USABLE | {VersionStatus.RETIRED}
_DIGEST: Final = re.compile(r"[0-9A-Za-z]{64}")


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A row of `registry_versions`; `tenant` is "*" for what every tenant uses."""

    kind: str
    tenant: str
    pin: Pin
    content: bytes
    status: VersionStatus
    valid_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class StoredActive:
    """A row of `registry_active`: what decides at a place."""

    kind: str
    tenant: str
    scope_key: str
    name: str
    version: int


@dataclass(frozen=True, slots=True)
class StoredHalt:
    """A row of `halts`."""

    tenant: str
    model: str


# A pin names no tenant: whoever knows a digest of 256 bits may read what has it.
VERSIONS: Final[Table[StoredVersion]] = Table(
    "registry_versions",
    key=lambda row: (row.kind, row.tenant, row.pin.name, row.pin.version),
    indexes={"digest": lambda row: (row.pin.digest,)},
)
ACTIVE: Final[Table[StoredActive]] = Table(
    "registry_active",
    key=lambda row: (row.kind, row.tenant, row.scope_key),
    tenant=lambda row: row.tenant,
    shared=True,
)
HALTS: Final[Table[StoredHalt]] = Table(
    "halts", key=lambda row: (row.tenant, row.model), tenant=lambda row: row.tenant, shared=True
)


class MemoryRegistry:
    """The port Registry on a database in memory; the release's own artifacts decide until something else does.

    A scope of None is the whole installation.
    """

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database
        database.apply((), _bring_release, shared=True)

    async def active(self, scopes: Sequence[TenantScope], kind: str, event_types: Sequence[str]) -> Sequence[ActiveSet]:
        """What decides for each (tenant, event type) by position; a kind without a usable version is None.

        A tenant's own row beats a shared one, then the event type's beats the kind's; the row that decides does so
        even when its version may not be used any more.
        """
        now = self._database.clock.now()
        asked = tuple(zip(scopes, event_types, strict=True))
        return await self._database.run(
            scopes, lambda tx: tuple(_active_set(tx, scope, (f"{kind}:{name}", kind), now) for scope, name in asked)
        )

    async def artifacts(self, pins: Sequence[Pin]) -> Sequence[Artifact]:
        """Content by position.

        Raises InvalidModelStateError when content does not match its digest, ModelNotApprovedError when there is none
        that was approved.
        """
        _check_digests(pins)
        return await self._database.run((), lambda tx: tuple(_artifact(_readable(tx, pin), pin) for pin in pins))

    async def revoked(self, pins: Sequence[Pin]) -> Sequence[bool]:
        """Whether each version was revoked since it was pinned.

        A pin names no tenant. Where the whole installation has the very same version, its status counts; else any
        revocation counts.
        """
        _check_digests(pins)
        return await self._database.run((), lambda tx: tuple(_revoked(tx, pin) for pin in pins))

    def register(
        self,
        kind: str,
        name: str,
        content: Mapping[str, Any] | bytes,
        *,
        version: int = 1,
        scope: TenantScope | None = None,
        status: VersionStatus = VersionStatus.APPROVED,
        valid_until: datetime | None = None,
    ) -> Pin:
        """Add a version, approved unless `status` says otherwise; the pin by which events name it.

        Raises InvalidModelStateError when this version exists with another content.
        """
        stored = content if isinstance(content, bytes) else canonical_json(dict(content))
        pin = Pin(name=name, version=version, digest=hashlib.sha256(stored).hexdigest())
        row = StoredVersion(kind, _tenant(scope), pin, stored, status, valid_until)

        def work(tx: Transaction) -> None:
            there = tx.get(VERSIONS, kind, row.tenant, name, version)
            if there is not None and there.pin != pin:
                raise InvalidModelStateError(f"{kind} {name} version {version} exists; a version never changes")
            tx.insert(VERSIONS, row)

        self._database.apply((), work)
        return pin

    def activate(self, kind: str, pin: Pin, scope_key: str, scope: TenantScope | None = None) -> None:
        """Let a registered version of this owner decide at a place: an event kind, or `kind:type`.

        Raises ModelNotApprovedError when it is not there; whether it may be used is asked when it is read.
        """
        tenant = _tenant(scope)

        def work(tx: Transaction) -> None:
            if tx.get(VERSIONS, kind, tenant, pin.name, pin.version) is None:
                raise ModelNotApprovedError(f"{kind} {pin.name} version {pin.version} is not registered; register it")
            tx.put(ACTIVE, StoredActive(kind, tenant, scope_key, pin.name, pin.version))

        self._change(scope, work)

    def set_status(self, pin: Pin, status: VersionStatus) -> None:
        """Move every version of this pin, such as to `revoked`; unlike the gate, from anywhere to anywhere."""

        def work(tx: Transaction) -> None:
            for row in _pinned(tx, pin):
                tx.put(VERSIONS, replace(row, status=status))

        self._change(None, work)

    def revoke(self, pin: Pin) -> None:
        """Take an approval back: the version decides nothing from now on."""
        self.set_status(pin, VersionStatus.REVOKED)

    def halt(self, scope: TenantScope | None, model: str = ANY_MODEL) -> None:
        """Stop automatic decisions of a tenant: all ("*"), or those of the model of that name."""
        self._change(scope, lambda tx: tx.put(HALTS, StoredHalt(_tenant(scope), model)))

    def resume(self, scope: TenantScope | None, model: str = ANY_MODEL) -> None:
        """Lift a halt; one that is not there is no error."""
        self._change(scope, lambda tx: tx.delete(HALTS, _tenant(scope), model))

    def _change(self, scope: TenantScope | None, work: Callable[[Transaction], object]) -> None:
        self._database.apply(() if scope is None else (scope,), work, shared=True)


def _bring_release(tx: Transaction) -> None:
    """As an upgrade does: add versions that are new, and activate them where nothing is active yet."""
    for brought in release_artifacts():
        tx.insert(VERSIONS, StoredVersion(brought.kind, SHARED, brought.pin, brought.content, VersionStatus.ACTIVE))
        for scope_key in brought.scopes:
            tx.insert(ACTIVE, StoredActive(brought.kind, SHARED, scope_key, brought.name, brought.version))


def _tenant(scope: TenantScope | None) -> str:
    return SHARED if scope is None else scope.tenant_id


def _active_set(tx: Transaction, scope: TenantScope, places: Sequence[str], now: datetime) -> ActiveSet:
    model, _ = _pick(tx, "model", scope, places, now)
    optional = {name: _pick(tx, name, scope, places, now) for name in ("lists", "reasons")}
    tenant = tx.get(TENANTS, scope.tenant_id)
    return ActiveSet(
        model=model,
        policy=_pick(tx, "policy", scope, places, now)[0],
        guardrail=_pick(tx, "guardrail", scope, places, now)[0],
        lists=optional["lists"][0],
        reasons=optional["reasons"][0],
        lost=tuple(name for name, (pin, chosen) in optional.items() if chosen and pin is None),
        trial=_pick(tx, "trial", scope, places, now)[0],
        thresholds=tenant.thresholds if tenant else Thresholds(),
        halted=_halted(tx, scope, model),
    )


def _pick(
    tx: Transaction, kind: str, scope: TenantScope, places: Sequence[str], now: datetime
) -> tuple[Pin | None, bool]:
    """What is chosen, None when it may not be used, and whether anything is chosen at all."""
    for tenant in (scope.tenant_id, SHARED):
        for place in places:
            active = tx.get(ACTIVE, kind, tenant, place)
            if active is not None:
                version = tx.get(VERSIONS, kind, tenant, active.name, active.version)
                return (version.pin if version is not None and _usable(version, now) else None), True
    return None, False


def _usable(version: StoredVersion, now: datetime) -> bool:
    return version.status in _USABLE and (version.valid_until is None or version.valid_until > now)


def _halted(tx: Transaction, scope: TenantScope, model: Pin | None) -> bool:
    models = {ANY_MODEL} if model is None else {ANY_MODEL, model.name}
    return any(tx.get(HALTS, tenant, name) is not None for tenant in (scope.tenant_id, SHARED) for name in models)


def _pinned(tx: Transaction, pin: Pin) -> list[StoredVersion]:
    return [row for row in tx.find(VERSIONS, "digest", pin.digest) if row.pin == pin]


def _revoked(tx: Transaction, pin: Pin) -> bool:
    rows = _pinned(tx, pin)
    decisive = [row for row in rows if row.tenant == SHARED] or rows
    return any(row.status == VersionStatus.REVOKED for row in decisive)


def _check_digests(pins: Sequence[Pin]) -> None:
    if not all(_DIGEST.fullmatch(pin.digest) for pin in pins):
        raise InvalidModelStateError("a pin's digest is not a SHA-256")


def _readable(tx: Transaction, pin: Pin) -> StoredVersion:
    for row in _pinned(tx, pin):
        if row.status in _READABLE:
            return row
    raise ModelNotApprovedError(f"{pin.name} version {pin.version} is not registered and approved")


def _artifact(row: StoredVersion, pin: Pin) -> Artifact:
    if hashlib.sha256(row.content).hexdigest() != pin.digest:
        raise InvalidModelStateError(f"the content of {row.kind} {pin.name} version {pin.version} is not its digest's")
    try:
        content: Any = orjson.loads(row.content)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InvalidModelStateError(f"the content of {row.kind} {pin.name} version {pin.version} is no JSON object")
    until = None if row.valid_until is None else row.valid_until.isoformat()
    return Artifact(row.kind, pin, content, valid_until=until)
