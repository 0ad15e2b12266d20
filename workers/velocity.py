"""Velocity that heals: a FeatureStore that is rebuilt from `events` and `labels` once it has forgotten them.

    epoch begins, incomplete → read labels, events and imports → merge them by event → the same epoch is complete

Promises: an epoch is completed only when everything that was observed before it is merged: retrieval writes an event's
row before it observes the event, so that what an epoch began without is in the tables when they are read. Until then
observations say that they are incomplete, and nobody decides on them. A tenant with few events is rebuilt where it is
first missed; one with many by `run`, so that no event waits for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final

import structlog

from contracts.failures import InfrastructureError
from contracts.labels import Label
from contracts.ports import FeatureStore, Past
from contracts.tenancy import TenantScope
from contracts.velocity import (
    NO_VERDICT,
    Mark,
    Marking,
    Observation,
    Sighting,
    VelocityPolicy,
    Verdict,
    sighting_of,
    verdict_of,
)

Sleep = Callable[[float], Awaitable[None]]

log = structlog.get_logger("velocity")

_PAGE: Final = 2_000
_LOOK_EVERY_S: Final = 5.0
AT_ONCE: Final = 2_000
"""A tenant with at most so many events is rebuilt while its events wait: some tenths of a second."""


class HealingFeatures:
    """The port FeatureStore over another one and the tables that it caches."""

    def __init__(self, store: FeatureStore, past: Past, policy: VelocityPolicy | None = None) -> None:
        self._store, self._past = store, past
        self._policy = policy or VelocityPolicy()
        self._large: set[TenantScope] = set()
        self.merge, self.mark, self.marks, self.complete = store.merge, store.mark, store.marks, store.complete

    async def observe(self, sightings: Sequence[Sighting], *, record: bool = True) -> Sequence[Observation]:
        """As the store; incomplete histories of small tenants are rebuilt first, which a repeat then sees."""
        seen = await self._store.observe(sightings, record=record)
        lost = [s.scope for s, one in zip(sightings, seen, strict=True) if not one.complete]
        if not lost:
            return seen
        healed = [await self._heal(scope) for scope in dict.fromkeys(lost)]
        return await self._store.observe(sightings, record=record) if any(healed) else seen

    async def _heal(self, scope: TenantScope) -> bool:
        """Rebuild a small tenant. A large one stays large: it is counted once, or every group of events would wait."""
        if scope in self._large:
            return False
        if await self._past.count(scope, AT_ONCE + 1) > AT_ONCE or len(await self._past.imported(scope, None, 2)) > 1:
            self._large.add(scope)
            log.warning("velocity.incomplete", tenant=scope.tenant_id, reason="many events: they are read meanwhile")
            return False
        return await self.rebuild(scope)

    async def rebuild(self, scope: TenantScope, merged: Callable[[int], None] = lambda _: None) -> bool:
        """Merge a tenant's events and labels; False when its epoch ended meanwhile. `merged` hears how many so far."""
        (mark,) = await self._store.marks([scope])
        return await self._rebuild(mark, merged)

    async def run(self, tenants: Callable[[], Awaitable[Sequence[TenantScope]]], sleep: Sleep = asyncio.sleep) -> None:
        """Rebuild every tenant whose history is incomplete, one by one, for ever; survives servers that are away."""
        while True:
            try:
                for mark in await self._store.marks(await tenants()):
                    if not mark.complete:
                        whole = await self._rebuild(mark, lambda _: None)
                        log.info("velocity.rebuilt", tenant=mark.scope.tenant_id, result="whole" if whole else "again")
            except InfrastructureError as error:
                log.warning("velocity.rebuild_paused", exception_class=type(error).__name__)
            await sleep(_LOOK_EVERY_S)

    async def _rebuild(self, mark: Mark, merged: Callable[[int], None]) -> bool:
        scope, verdicts, count = mark.scope, await self._verdicts(mark.scope), 0
        after: str | None = None
        while page := await self._past.events(scope, after, _PAGE):
            after = page[-1].event_id
            sightings = [
                sighting_of(scope, past.event_id, past.event, past.received_at, self._policy.attribute) for past in page
            ]
            await self._store.merge([replace(s, verdict=verdicts.pop(s.event_id, NO_VERDICT)) for s in sightings])
            count += len(page)
            merged(count)
        place: tuple[str, int] | None = None
        while parts := await self._past.imported(scope, place, 8):
            place = (parts[-1].source, parts[-1].part)
            some = [sighting for part in parts for sighting in part.sightings()]
            await self._store.merge(some)
            count += len(some)
            merged(count)
        await self._store.mark([Marking(scope, event_id, verdict) for event_id, verdict in verdicts.items()])
        (whole,) = await self._store.complete([mark])
        return whole

    async def _verdicts(self, scope: TenantScope) -> dict[str, Verdict]:
        """What holds of each labelled event."""
        found: dict[str, Verdict] = {}
        after: str | None = None
        while page := await self._past.labels(scope, after, _PAGE):
            after = page[-1].label_id
            for label in page:
                said = verdict_of(label)
                if said.rank > found.get(label.event_id, NO_VERDICT).rank:
                    found[label.event_id] = said
        return found


class LabelFeed:
    """Brings recorded labels into the histories of their events' entities."""

    def __init__(self, store: FeatureStore, past: Past, policy: VelocityPolicy | None = None) -> None:
        self._store, self._past = store, past
        self._policy = policy or VelocityPolicy()

    async def feed(self, labels: Sequence[Label]) -> None:
        """Mark the samples of labelled events; may be repeated. Raises InfrastructureError."""
        events = await self._past.known([(label.scope, label.event_id) for label in labels])
        await self._store.mark(
            [
                Marking(
                    label.scope,
                    label.event_id,
                    verdict_of(label),
                    None
                    if past is None
                    else sighting_of(past.scope, past.event_id, past.event, past.received_at, self._policy.attribute),
                )
                for label, past in zip(labels, events, strict=True)
            ]
        )
