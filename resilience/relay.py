"""The relay of the outbox: what a command wrote in its own transaction, published until the broker has answered.

Promises: a row is removed only after its message was confirmed, so one may be sent twice and none is lost; the oldest
go first; a row that the broker will not take is passed over and tried again later, and holds up nothing behind it.
Of several revisions of one decision only the highest is sent, and the others are removed with it: none comes after a
newer one. Survives every server's failure with growing waits. Does not promise order between a row that was passed
over and those behind it, and does not elect: two relays send some messages twice, which their receivers allow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from contracts.failures import InfrastructureError, MessagingFailureError
from contracts.messages import arrived
from contracts.ports import Confirm, Outbox, OutboxRow, Publisher, Telemetry
from contracts.telemetry import OUTBOX, Measurement
from contracts.topology import DECISIONS

log = structlog.get_logger("outbox")

_LONGEST_WAIT_S: Final = 5.0
_LONGEST_RETRY_S: Final = 30.0
_LOG_EVERY_S: Final = 60.0


@dataclass(slots=True)
class _Stuck:
    """A row that the broker did not take: when it is tried again, and when it was last spoken of (loop time, s)."""

    wait_s: float
    due: float
    logged: float


class OutboxRelay:
    """Publishes the outbox of all tenants; one per process that has one."""

    def __init__(
        self,
        outbox: Outbox,
        publisher: Publisher,
        telemetry: Telemetry,
        *,
        batch: int = 256,
        idle_s: float = 0.2,
        retry_s: float = 1.0,
    ) -> None:
        """`batch` messages are in flight at once; `idle_s` between looks at an empty outbox; `retry_s` (doubled each
        time, 30 s at most) before a row that was passed over is tried again.
        """
        self._outbox = outbox
        self._publisher = publisher
        self._telemetry = telemetry
        self._batch = batch
        self._idle_s = idle_s
        self._retry_s = retry_s
        self._most = batch
        self._stuck: dict[int, _Stuck] = {}
        self._outdated: dict[int, list[OutboxRow]] = {}
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Look at once: something was just committed."""
        self._woken.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Publish until told to stop; what is left then stays in the table. A server's failure never ends it."""
        wait = self._idle_s
        while not stop.is_set():
            self._woken.clear()
            try:
                while not stop.is_set() and await self._round() is not None:
                    wait = self._idle_s
                # Stuck rows are read each time to see past them: twice as many are read half as often.
                wait = min(self._idle_s * (1 + len(self._stuck) / self._batch), _LONGEST_WAIT_S)
            except InfrastructureError as error:
                wait = min(wait * 2, _LONGEST_WAIT_S)
                log.warning("outbox.waiting", exception_class=type(error).__name__, reason=error.detail, seconds=wait)
            await self._rest(stop, wait)

    async def drain_once(self) -> int:
        """Publish everything that can be published now; how many rows were removed.

        Raises DatabaseError, or MessagingFailureError when the broker answers for nothing.
        """
        removed = 0
        while (done := await self._round()) is not None:
            removed += done
        return removed

    async def _round(self) -> int | None:
        """One batch; how many rows were removed, None when there was nothing to do."""
        rows = await self._due()
        if not rows:
            return None
        done = await self._publish(rows)
        await self._outbox.published(done)
        self._measure("published", len(done))
        return len(done)

    async def _due(self) -> list[OutboxRow]:
        """The oldest rows. Those that were passed over come by themselves, when all else is done and their time is up:
        one that closes the channel must not take a full batch with it again.
        """
        rows = await self._outbox.waiting(self._batch + len(self._stuck))
        there, now = {row.position for row in rows}, asyncio.get_running_loop().time()
        self._stuck = {position: stuck for position, stuck in self._stuck.items() if position in there}
        self._outdated = _outdated(rows)
        behind = {row.position for older in self._outdated.values() for row in older}
        rows = [row for row in rows if row.position not in behind]
        fresh = [row for row in rows if row.position not in self._stuck]
        again = [row for row in rows if row.position in self._stuck and self._stuck[row.position].due <= now]
        return (fresh or again)[: self._most]

    async def _publish(self, rows: Sequence[OutboxRow]) -> list[OutboxRow]:
        """Send rows; those that the broker answered for. One that it did not is passed over until later."""
        confirms = await self._publisher.publish([row.message for row in rows])
        answers = list(zip(rows, confirms, strict=True))
        silent = all(confirm is Confirm.UNKNOWN for confirm in confirms)
        if silent and len(rows) > 1:
            # The broker is down, or one row closes the channel on all in flight: fewer together will tell.
            self._most = len(rows) // 2
            raise MessagingFailureError(f"none of {len(rows)} outbox messages was confirmed")
        done = [row for row, confirm in answers if arrived(row.message, confirm)]
        for row, confirm in answers:
            if not arrived(row.message, confirm):
                self._pass_over(row, confirm)
        self._measure("again", len(rows) - len(done))
        if silent:
            raise MessagingFailureError("an outbox message was not confirmed")
        self._most = min(self._most * 2, self._batch)
        return done + [older for row in done for older in self._outdated.get(row.position, ())]

    def _pass_over(self, row: OutboxRow, confirm: Confirm) -> None:
        now = asyncio.get_running_loop().time()
        stuck = self._stuck.setdefault(row.position, _Stuck(self._retry_s / 2, now, float("-inf")))
        stuck.wait_s = min(stuck.wait_s * 2, _LONGEST_RETRY_S)
        stuck.due = now + stuck.wait_s
        if now - stuck.logged >= _LOG_EVERY_S:
            stuck.logged = now
            tenant = row.scope.tenant_id if row.scope else ""
            log.error("outbox.passed_over", reason=str(confirm), tenant=tenant, queue=row.message.routing_key)

    async def _rest(self, stop: asyncio.Event, seconds: float) -> None:
        tasks = [asyncio.ensure_future(event.wait()) for event in (stop, self._woken)]
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def _measure(self, result: str, count: int) -> None:
        if count:
            self._telemetry.record(Measurement(OUTBOX, count, {"result": result}))


def _outdated(rows: Sequence[OutboxRow]) -> dict[int, list[OutboxRow]]:
    """The older revisions of the same decision, by the position of the newest; rows are in order of writing."""
    revisions: dict[tuple[object, object], list[OutboxRow]] = {}
    for row in rows:
        if row.message.exchange == DECISIONS:
            revisions.setdefault((row.scope, row.message.headers.get("event_id")), []).append(row)
    return {several[-1].position: several[:-1] for several in revisions.values() if len(several) > 1}
