"""Refusals: counted for everybody, audited for those that are authenticated, one record per second.

One audit record per (tenant, problem, door, second) with a count: a sender that hammers a door cannot
write the audit full. A record of a closed second never changes, so sending it again is harmless.
Counts that were not yet flushed are lost when the process dies, unless a door waits for them: the AMQP door keeps a
refused delivery until the record that counts it is confirmed (`mark`, `audited`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from contracts.events import canonical_json
from contracts.failures import InfrastructureError, RiskfleetError, classify
from contracts.messages import audit_message
from contracts.ports import Clock, Confirm, Publisher, Telemetry
from contracts.state import AuditRecord
from contracts.telemetry import REFUSALS, REQUESTS, Measurement
from contracts.tenancy import TenantScope
from contracts.topology import RunningLayouts

log = structlog.get_logger(__name__)

FLUSH_SECONDS = 1.0
_SECOND = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class RefusalPolicy:
    """`boot` makes record ids differ between processes; above `max_open` seconds the last one stays open."""

    boot: str
    max_open: int = 10_000


@dataclass(frozen=True, slots=True)
class _Source:
    scope: TenantScope | None
    problem: str
    door: str


class RefusalCounter:
    """Counts by source and second; pure, `now` (aware, UTC) is an argument."""

    def __init__(self, policy: RefusalPolicy) -> None:
        self._policy = policy
        self._counts: dict[tuple[_Source, datetime], int] = {}
        self._last: dict[_Source, datetime] = {}
        self._open_from: datetime | None = None
        self.latest: datetime | None = None

    @property
    def open_from(self) -> datetime | None:
        """Every second before this one is closed; None before the first `take`."""
        return self._open_from

    def note(self, scope: TenantScope | None, problem: str, door: str, now: datetime) -> None:
        """Count one refusal; `scope` None is the system chain."""
        source = _Source(scope, problem, door)
        second = now.replace(microsecond=0)
        if self._open_from is not None:
            second = max(second, self._open_from)  # a closed second stays closed when the clock steps back
        if len(self._counts) >= self._policy.max_open:
            second = self._last.get(source, second)
        self._last[source] = second
        self.latest = second if self.latest is None else max(second, self.latest)
        self._counts[source, second] = self._counts.get((source, second), 0) + 1

    def take(self, now: datetime, *, final: bool = False) -> tuple[AuditRecord, ...]:
        """Close the seconds before `now` (the current one too when `final`) and return their records, once.

        When the clock went back, the seconds go on from where they were, one with each call: nobody waits an hour for
        the clock to come there again.
        """
        limit = now.replace(microsecond=0) + (_SECOND if final else timedelta())
        if not self._counts:
            self._open_from = max(self._open_from or limit, limit)
            return ()
        reached = max(self._open_from or limit, *(second for _, second in self._counts), limit)
        if reached > limit:
            limit = reached + (_SECOND if self._counts else timedelta())
        closed = sorted(
            (key for key in self._counts if final or key[1] < limit), key=lambda key: (key[1], key[0].problem)
        )
        self._open_from = limit
        records = tuple(self._record(source, second, self._counts.pop((source, second))) for source, second in closed)
        self._last = {source: second for source, second in self._last.items() if (source, second) in self._counts}
        return records

    def _record(self, source: _Source, second: datetime, count: int) -> AuditRecord:
        tenant = source.scope.tenant_id if source.scope else None
        at = second.strftime("%Y-%m-%dT%H:%M:%SZ")
        name = f"refusals|{tenant or ''}|{source.problem}|{at}|{source.door}|{self._policy.boot}"
        record_id = hashlib.sha256(name.encode()).hexdigest()[:32]
        refusals = {"problem": source.problem, "count": count, "second": at, "door": source.door}
        body = canonical_json({"v": 1, "record_id": record_id, "tenant": tenant, "refusals": refusals})
        return AuditRecord(source.scope, record_id, "", 0, "", body)


class RefusalLog:
    """What both doors tell about a refusal: metrics at once, the audit within a second or two."""

    def __init__(
        self, counter: RefusalCounter, publisher: Publisher, telemetry: Telemetry, clock: Clock, layouts: RunningLayouts
    ) -> None:
        self._counter = counter
        self._publisher = publisher
        self._telemetry = telemetry
        self._clock = clock
        self._layouts = layouts
        self._pending: tuple[AuditRecord, ...] = ()
        self._taken = self._through = datetime.min.replace(tzinfo=UTC)

    def note(self, scope: TenantScope | None, error: RiskfleetError, door: str, *, audited: bool = True) -> None:
        """Count a refusal by its problem. A 503 is no refusal to audit: nobody decided anything."""
        row = classify(error)
        result = "refused" if row.status < 500 else "unavailable"
        self._telemetry.record(
            Measurement(REQUESTS, labels={"door": door, "result": result}),
            Measurement(REFUSALS, labels={"door": door, "problem": row.problem}),
        )
        log.info("submission_refused", door=door, problem=row.problem, category=str(row.category))
        if audited and row.status < 500:
            self._counter.note(scope, row.problem, door, self._clock.now())

    def mark(self) -> datetime:
        """The second by whose record everything that was noted so far is counted."""
        return self._counter.latest or self._through

    def audited(self, mark: datetime) -> bool:
        """Whether the records up to a mark are confirmed on their way to the audit."""
        return mark < self._through

    async def flush(self, *, final: bool = False) -> int:
        """Publish the records of closed seconds; returns how many still wait for a confirm."""
        if not self._pending or final:  # while the broker is away nothing is closed, so memory stays bounded
            self._pending += self._counter.take(self._clock.now(), final=final)
            self._taken = max(self._taken, self._counter.open_from or self._taken)
        taken = self._taken
        messages = audit_message(self._pending, self._layouts)
        if not messages:
            self._through = taken
            return 0
        try:
            confirms: Sequence[Confirm] = await self._publisher.publish(messages)
        except InfrastructureError:
            return len(self._pending)
        if all(confirm is Confirm.CONFIRMED for confirm in confirms):
            self._pending = ()
            self._through = taken
        return len(self._pending)

    async def run(self, stop: asyncio.Event) -> None:
        """Flush once a second until `stop`, and then once more. Stop the doors first."""
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), FLUSH_SECONDS)
            await self._flush_or_log()
        await self._flush_or_log(final=True)

    async def _flush_or_log(self, *, final: bool = False) -> None:
        try:
            waiting = await self.flush(final=final)
        except Exception as error:  # noqa: BLE001 - the loop must outlive a defect; the records stay pending
            log.error("refusals_not_flushed", exception_class=type(error).__name__)
            return
        if waiting:
            log.warning("refusals_not_confirmed", count=waiting)
