"""The reconciler: the safety net below everything that confirms, which finds nothing as long as nothing is lost.

Promises: an event that PostgreSQL knows and that has no decision is sent to retrieval again, but only once a probe that
was sent through its partition after the event was first seen undecided has come through, and `settle_s` more have
passed: until then its entry may simply wait in a queue before the probe. A decision whose trail lacks records has them
sent again by the same rule. At most `per_second` a second. Asks PostgreSQL alone what is missing: it works when Redis
forgot all. A repeat is harmless: claims and record ids make one decision and one record of it, so two of these may run
side by side. Does not send undelivered decisions again (the feed has them), and leaves what is parked where it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog

from contracts.codec import entry_of
from contracts.failures import InfrastructureError
from contracts.messages import arrived, audit_message, probe_message, stage_messages
from contracts.ports import Clock, EventKey, Message, Missing, Publisher, Telemetry
from contracts.state import EventState
from contracts.telemetry import RECONCILED, Measurement
from contracts.topology import RunningLayouts, Stage

log = structlog.get_logger("reconciler")

_LONGEST_WAIT_S: Final = 60.0
_NEVER: Final = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class ReconcilerPolicy:
    """Seconds, and bounds. A round looks at what is new since the last one, from `recent_s` ago at first, and at one
    slice of the past (`events_s`, `trails_s`; a trail costs more to look at), so that all of `past_s` is seen in turn.

    `probe_s`: a probe that has not come through by then is sent again: it may have been lost as well. `most` bounds
    what is watched at a time, and with it memory.
    """

    every_s: float = 10.0
    settle_s: float = 60.0
    probe_s: float = 60.0
    per_second: int = 50
    most: int = 1_000
    recent_s: float = 900.0
    past_s: float = 604_800.0
    events_s: float = 900.0
    trails_s: float = 60.0


@dataclass(slots=True)
class Watch:
    """One thing that is missing: since when it is known, and when the first probe behind it was seen to be through."""

    first_seen: datetime
    passed: datetime | None = None

    def look(self, probe: datetime | None, now: datetime) -> None:
        """Note the latest probe that has come through; later ones change nothing, else the wait would never end."""
        if self.passed is None and probe is not None and probe >= self.first_seen:
            self.passed = now

    def due(self, now: datetime, settle_s: float) -> bool:
        """Whether it is lost and not only late. All times are of one clock, whatever the probes' readers have."""
        return self.passed is not None and now >= self.passed + timedelta(seconds=settle_s)


@dataclass(slots=True)
class _Search:
    """One kind of missing things: where to look, and what to send for them."""

    what: str
    window: Callable[[datetime, datetime, int], Awaitable[Sequence[EventState]]]
    again: Callable[[Sequence[EventKey]], Awaitable[Sequence[EventState]]]
    messages: Callable[[Sequence[EventState]], list[Message]]
    slice_s: float
    fresh: datetime | None = None
    past: datetime | None = None
    watched: dict[EventKey, Watch] = field(default_factory=dict)


class Reconciler:
    """Looks, waits and sends again; one per process that has one."""

    def __init__(
        self,
        missing: Missing,
        publisher: Publisher,
        telemetry: Telemetry,
        clock: Clock,
        layouts: RunningLayouts,
        policy: ReconcilerPolicy | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Probes and what is sent again go to the newest of `layouts`; `sleep` waits so many seconds of the clock."""
        self._missing = missing
        self._publisher = publisher
        self._telemetry = telemetry
        self._clock = clock
        self._layouts = layouts
        self._policy = policy or ReconcilerPolicy()
        self._sleep = sleep
        self._probed: dict[int, datetime] = {}
        events, trails = self._policy.events_s, self._policy.trails_s
        self._searches = (
            _Search("event", missing.undecided, missing.still_undecided, self._entries, events),
            _Search("trail", missing.incomplete, missing.still_incomplete, self._records, trails),
        )

    async def run(self) -> None:
        """Look every `every_s` until cancelled; a server that is away makes the waits longer, and ends nothing."""
        wait = self._policy.every_s
        while True:
            try:
                await self.round()
                wait = self._policy.every_s
            except InfrastructureError as error:
                wait = min(wait * 2, _LONGEST_WAIT_S)
                log.warning("reconciler.waiting", exception_class=type(error).__name__, seconds=wait)
            await self._sleep(wait)

    async def round(self) -> int:
        """One look; how many events and trails were sent again. Raises DatabaseError, MessagingFailureError."""
        now = self._clock.now()
        probes = await self._missing.probes()
        sent = 0
        for search in self._searches:
            states = await self._look(search, now)
            for key, watch in search.watched.items():
                watch.look(probes.get(self._partition(key)), now)
            due = [k for k, watch in search.watched.items() if k in states and watch.due(now, self._policy.settle_s)]
            sent += await self._send(search, sorted(due, key=lambda key: search.watched[key].first_seen), states)
        await self._probe(probes, now)
        return sent

    async def _look(self, search: _Search, now: datetime) -> dict[EventKey, EventState]:
        """What is missing now, with a watch on each; what is there by now is forgotten."""
        policy = self._policy
        known = await search.again(list(search.watched))
        # What is younger than a round is mostly on its way.
        until, oldest = now - timedelta(seconds=policy.every_s), now - timedelta(seconds=policy.past_s)
        fresh = search.fresh or now - timedelta(seconds=policy.recent_s)
        past = search.past if search.past and oldest <= search.past < fresh else oldest
        upto = min(past + timedelta(seconds=search.slice_s), until)
        found = list(known)
        for since, before in ((fresh, until), (past, upto)):
            if len(found) < policy.most:
                found += await search.window(since, before, policy.most - len(found))
        search.fresh, search.past = until, upto
        states = {(state.scope, state.event_id): state for state in found}
        search.watched = {key: search.watched.get(key) or Watch(now) for key in states}
        return states

    async def _send(self, search: _Search, due: Sequence[EventKey], states: dict[EventKey, EventState]) -> int:
        sent, step = 0, self._policy.per_second
        for start in range(0, len(due), step):
            keys = due[start : start + step]
            messages = search.messages([states[key] for key in keys])
            confirms = await self._publisher.publish(messages)
            if not all(arrived(message, confirm) for message, confirm in zip(messages, confirms, strict=True)):
                log.warning("reconciler.not_confirmed", count=len(keys), kind=search.what)
                break  # still due at the next round
            for key in keys:
                scope, event_id = key
                search.watched[key] = Watch(self._clock.now())
                log.warning("reconciler.sent_again", kind=search.what, tenant=scope.tenant_id, event_id=event_id)
            self._telemetry.record(Measurement(RECONCILED, len(keys), {"what": search.what}))
            sent += len(keys)
            await self._sleep(1.0)
        return sent

    async def _probe(self, through: Mapping[int, datetime], now: datetime) -> None:
        """Send a probe through each partition in which something waits for one, and none is on its way."""
        waiting = {self._partition(key) for key, watch in self._watches() if watch.passed is None}
        again = timedelta(seconds=self._policy.probe_s)
        under_way = {p for p, at in self._probed.items() if now < at + again and through.get(p, _NEVER) < at}
        partitions = sorted(waiting - under_way)
        messages = [probe_message(partition, now.isoformat(), self._layouts.newest.version) for partition in partitions]
        confirms = await self._publisher.publish(messages) if messages else ()
        for partition, message, confirm in zip(partitions, messages, confirms, strict=True):
            if arrived(message, confirm):
                self._probed[partition] = now

    def _watches(self) -> Iterable[tuple[EventKey, Watch]]:
        return ((key, watch) for search in self._searches for key, watch in search.watched.items())

    def _partition(self, key: EventKey) -> int:
        return self._layouts.newest.partition(key[0])

    def _entries(self, states: Sequence[EventState]) -> list[Message]:
        version = self._layouts.newest.version
        return stage_messages((entry_of(state, Stage.RETRIEVAL, topology=version) for state in states), self._layouts)

    def _records(self, states: Sequence[EventState]) -> list[Message]:
        return audit_message([record for state in states for record in state.records()], self._layouts)
