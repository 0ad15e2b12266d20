"""Streams events into a running fleet through both doors, and reports what became of them.

Open to read as a client: HTTP with an API key, AMQP with the tenant's own broker user. Reports only
what PostgreSQL holds, so a number in the table is a row that anybody may count.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import orjson
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_exponential

from contracts.failures import MessagingFailureError
from contracts.ports import Confirm, Message
from contracts.tenancy import TenantScope
from contracts.topology import INGEST, METRICS_QUEUE, topology_of
from deploy.provision import DemoCredentials
from deploy.relayout import opened
from deploy.runtime import SystemClock
from deploy.settings import Settings
from governance.audit import AuditReport
from governance.postgres import engine as pg
from governance.postgres.audit import PostgresAuditLog
from governance.postgres.reports import Counts, Latencies, counts, latencies
from resilience.rabbit import RabbitPublisher

_CONCURRENCY = 32
_PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What a stream came to; times in seconds, `queued` = messages left in any queue or rung."""

    sent: int
    sending_s: float
    settled_s: float
    counts: Counts
    latencies: Latencies
    audit: AuditReport
    queued: int

    @property
    def complete(self) -> bool:
        """Every event decided exactly once, the audit verified, every queue empty."""
        c = self.counts
        return c.events == c.decisions >= self.sent and self.audit.intact and self.audit.missing == 0 == self.queued


async def submit_http(url: str, api_key: str, events: Sequence[dict[str, Any]], tick: Callable[[], None]) -> None:
    """POST events until each is answered 202; a 503 or a lost connection is repeated with the same identity.

    Raises MessagingFailureError when the gateway refuses an event or stays away for 2 minutes.
    """
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    waiting = iter(events)
    trusted = ssl.create_default_context()  # made once: each client would read the certificates again

    async def sender() -> None:
        # A client each: one pool shared by all costs several times the CPU, which is the fleet's here.
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30, verify=trusted) as client:
            for event in waiting:
                await _post(client, event)
                tick()

    await asyncio.gather(*(sender() for _ in range(_CONCURRENCY)))


async def _post(client: httpx.AsyncClient, event: dict[str, Any]) -> None:
    async for attempt in _patiently():
        with attempt:
            answer = await client.post("/v1/events", content=orjson.dumps(event))
            if answer.status_code in (429, 503):
                raise ConnectionError
            if answer.status_code not in (200, 202):
                raise MessagingFailureError(f"the gateway answered {answer.status_code}: {answer.text[:300]}")


async def submit_amqp(
    url: str, user: str, tenant: str, events: Sequence[dict[str, Any]], tick: Callable[[], None]
) -> None:
    """Publish events to the ingest exchange as the tenant's broker user, each until it is confirmed."""
    publisher = RabbitPublisher(url, name=f"upstream-{tenant}")
    try:
        async for attempt in _patiently():
            with attempt:
                try:
                    await publisher.start()
                except MessagingFailureError as error:
                    raise ConnectionError(error.detail) from error
        for start in range(0, len(events), _CONCURRENCY):
            pending = [
                Message(
                    exchange=INGEST,
                    routing_key=f"{tenant}.{event['kind']}",
                    body=orjson.dumps(event),
                    message_id=event["id"],
                    content_type="application/json",
                    user_id=user,
                )
                for event in events[start : start + _CONCURRENCY]
            ]
            async for attempt in _patiently():
                with attempt:
                    confirms = await publisher.publish(pending)
                    for confirm in confirms:
                        if confirm is Confirm.CONFIRMED:
                            tick()
                    pending = [m for m, c in zip(pending, confirms, strict=True) if c is not Confirm.CONFIRMED]
                    if pending:
                        raise ConnectionError
    finally:
        await publisher.close()


def _patiently() -> AsyncRetrying:
    return AsyncRetrying(
        retry=retry_if_exception_type((ConnectionError, httpx.TransportError)),
        wait=wait_exponential(multiplier=0.1, max=2),
        stop=stop_after_delay(_PATIENCE_S),
        reraise=True,
    )


def as_user(url: str, user: str, password: str) -> str:
    """An AMQP URL with other credentials."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{parts.hostname}:{parts.port or 5672}"))


async def stream(
    settings: Settings, credentials: DemoCredentials, events: Sequence[dict[str, Any]], *, show: bool
) -> StreamReport:
    """Send half of the events through each door, wait until all is settled, and report."""
    scope = TenantScope(credentials.tenant)
    half = (len(events) + 1) // 2
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    began = time.monotonic()
    with Progress(*columns, disable=not show) as progress:
        by_http = progress.add_task("sent by HTTP", total=half)
        by_amqp = progress.add_task("sent by AMQP", total=len(events) - half)
        decided = progress.add_task("decided", total=len(events))
        url = f"http://{settings.http_host}:{settings.http_port}"
        amqp = as_user(settings.need("rabbitmq_url"), credentials.broker_user, credentials.broker_password)
        watching = asyncio.create_task(
            _watch(settings, scope, len(events), lambda n: progress.update(decided, completed=n))
        )
        await asyncio.gather(
            submit_http(url, credentials.api_key, events[:half], lambda: progress.advance(by_http)),
            submit_amqp(
                amqp, credentials.broker_user, credentials.tenant, events[half:], lambda: progress.advance(by_amqp)
            ),
        )
        sending_s = time.monotonic() - began
        await watching
    queued = await wait_until_empty(settings)
    return await report(settings, scope, len(events), (sending_s, time.monotonic() - began), queued)


async def _watch(settings: Settings, scope: TenantScope, wanted: int, show: Callable[[int], None]) -> None:
    engine = pg.create_engine(settings.need("database_url"))
    best, last_change = -1, time.monotonic()
    try:
        while best < wanted and time.monotonic() - last_change < _PATIENCE_S:
            try:
                now = (await counts(engine, [scope])).decisions
            except Exception as error:  # the database may be restarting: the next look will tell
                if type(error).__name__ != "DatabaseError":
                    raise
                now = best
            if now > best:
                best, last_change = now, time.monotonic()
                show(min(best, wanted))
            await asyncio.sleep(0.25)
    finally:
        await pg.dispose(engine)


async def wait_until_empty(settings: Settings, patience_s: float = 60.0) -> int:
    """Wait until every queue and rung is empty; returns the messages that were left at the deadline."""
    deadline = time.monotonic() + patience_s
    async with opened(settings) as (management, layouts):
        names = [q.name for q in topology_of(layouts.running).queues if q.name != METRICS_QUEUE]
        while True:
            left = await management.depth(names)
            if left == 0 or time.monotonic() > deadline:
                return left
            await asyncio.sleep(0.25)


async def report(
    settings: Settings, scope: TenantScope, sent: int, seconds: tuple[float, float], queued: int
) -> StreamReport:
    """Count rows, and verify the tenant's audit chain against its decisions."""
    engine = pg.create_engine(settings.need("database_url"))
    audit_log, deadline = PostgresAuditLog(engine, SystemClock()), time.monotonic() + _PATIENCE_S
    try:
        # The last records may still be on their way to the chain.
        audit = await audit_log.verify(scope)
        while audit.missing and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
            audit = await audit_log.verify(scope)
        return StreamReport(
            sent, *seconds, await counts(engine, [scope]), await latencies(engine, scope), audit, queued
        )
    finally:
        await pg.dispose(engine)
