"""A whole fleet for tests: every role its own process, supervised from one thread, and what PostgreSQL says of it."""

from __future__ import annotations

import asyncio
import os
import queue
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import orjson
import pika
from sqlalchemy import text

from contracts.events import event_id_of
from contracts.failures import InfrastructureError
from contracts.tenancy import TenantScope
from contracts.topology import METRICS_QUEUE, topology_of
from deploy import local, relayout, stream
from deploy.fleet import Fleet
from deploy.provision import DemoCredentials
from deploy.runtime import SystemClock
from deploy.servers import NativeServers
from deploy.settings import Settings, environment_of
from governance.postgres import AuditReport, Counts, PostgresAuditLog, counts, create_engine, transaction

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")


def show(*words: object) -> None:
    """What a person wants to see of a run (`pytest -s`, or any failure): seeds, and what was found."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def eventually(what: str, look: Callable[[], Awaitable[T]], good: Callable[[T], bool], within_s: float) -> T:
    """The first answer of `look` that is good; fails with the last one at the deadline. A server that restarts is
    asked again.
    """
    deadline = time.monotonic() + within_s
    last: object = "no answer"
    while True:
        with suppress(InfrastructureError):
            answer = await look()
            if good(answer):
                return answer
            last = answer
        assert time.monotonic() < deadline, f"{what}: not within {within_s:.0f} s; last seen: {last!r:.2000}"
        await asyncio.sleep(0.1)


class FleetThread:
    """A `Fleet` with all its life in one thread: children die with the thread that started them."""

    def __init__(self, build: Callable[[], Fleet]) -> None:
        self._build = build
        self._calls: queue.Queue[tuple[Callable[[Fleet], Any], Future[Any]]] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet")
        self._error: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Drain and end every role."""
        self._stop.set()
        self._thread.join(120)
        assert not self._thread.is_alive(), "the fleet did not stop within two minutes"
        if self._error is not None:
            raise self._error

    def call(self, work: Callable[[Fleet], T]) -> T:
        """Run `work` between two looks of the supervisor, whose methods belong to its thread."""
        future: Future[T] = Future()
        self._calls.put((work, future))
        assert self._thread.is_alive(), f"the supervisor ended: {self._error!r}"
        return future.result(60)

    def _run(self) -> None:
        try:
            fleet = self._build()
            try:
                fleet.start()
                while not self._stop.is_set():
                    fleet.tick()
                    self._serve(fleet)
            finally:
                fleet.stop()
        except BaseException as error:  # noqa: BLE001 - raised again by stop(), in the test's thread
            self._error = error

    def _serve(self, fleet: Fleet) -> None:
        with suppress(queue.Empty):
            work, future = self._calls.get(timeout=0.05)
            try:
                future.set_result(work(fleet))
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                future.set_exception(error)


@dataclass(frozen=True)
class Login:
    """A user and the password."""

    user: str
    password: str


@dataclass
class RunningFleet:
    """The fleet that the tests of a module share."""

    settings: Settings
    thread: FleetThread
    native: NativeServers | None
    upstreams: dict[str, DemoCredentials]
    admin: Login
    said: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The gateway."""
        return f"http://{self.settings.http_host}:{self.settings.http_port}"

    def amqp_url(self, name: str) -> str:
        """The broker as a tenant's own user sees it."""
        made = self.upstreams[name]
        return stream.as_user(self.settings.need("rabbitmq_url"), made.broker_user, made.broker_password)

    def scope(self, name: str) -> TenantScope:
        return TenantScope(self.upstreams[name].tenant)

    async def wait_ready(self) -> None:
        """Until the gateway says that it is ready."""

        async def look() -> int:
            try:
                async with httpx.AsyncClient(timeout=5) as client:
                    return (await client.get(f"{self.url}/health/ready")).status_code
            except httpx.TransportError:
                return 0

        await eventually("gateway ready", look, lambda status: status == 200, 60)

    async def send(self, name: str, events: Sequence[dict[str, Any]], tick: Callable[[], None] = lambda: None) -> None:
        """Half of the events through each door."""
        made, half = self.upstreams[name], len(events) // 2
        await asyncio.gather(
            stream.submit_http(self.url, made.api_key, events[:half], tick),
            stream.submit_amqp(self.amqp_url(name), made.broker_user, made.tenant, events[half:], tick),
        )

    async def rows(self, scope: TenantScope | None, sql: str, **values: Any) -> list[Any]:
        """The rows that a tenant (None: the system) sees."""
        engine = create_engine(self.settings.need("database_url"), pool_size=1)
        try:
            async with transaction(engine, [scope]) as connection:
                return list(await connection.execute(text(sql), values))
        finally:
            await engine.dispose()

    async def decided(self, name: str, events: Sequence[dict[str, Any]]) -> dict[str, int]:
        """Event id to number of first decisions, of those events that have one."""
        scope = self.scope(name)
        found = await self.rows(
            scope,
            "SELECT event_id, count(*) FROM decisions WHERE revision = 1 AND event_id = ANY(:ids) GROUP BY event_id",
            ids=[event_id_of(scope, event["id"]) for event in events],
        )
        return {row[0]: row[1] for row in found}

    async def wait_decided(
        self, name: str, events: Sequence[dict[str, Any]], wanted: int | None = None, within_s: float = 60
    ) -> dict[str, int]:
        """Until so many of the events (default: all) are decided."""
        least = len(events) if wanted is None else wanted
        return await eventually(
            f"{least} decisions", lambda: self.decided(name, events), lambda found: len(found) >= least, within_s
        )

    async def verified(self, scope: TenantScope | None, within_s: float = 60) -> AuditReport:
        """The report once no record is on its way any more; a broken chain fails at once."""

        async def look() -> AuditReport:
            engine = create_engine(self.settings.need("database_url"), pool_size=1)
            try:
                return await PostgresAuditLog(engine, SystemClock()).verify(scope)
            finally:
                await engine.dispose()

        report = await eventually("audit complete", look, lambda r: r.missing == 0 or not r.decisions, within_s)
        assert report.intact, report.problem
        return report

    async def counts(self, name: str) -> Counts:
        engine = create_engine(self.settings.need("database_url"), pool_size=1)
        try:
            return await counts(engine, [self.scope(name)])
        finally:
            await engine.dispose()

    async def refusals(self, scope: TenantScope | None) -> set[tuple[str, str]]:
        """(problem, door) of every audited refusal."""
        rows = await self.rows(scope, "SELECT body FROM audit_records WHERE event_id = ''")
        # Read here and not by the server: a chain may hold bytes that no database takes for JSON.
        bodies = [orjson.loads(row[0]) for row in rows if b'"refusals"' in bytes(row[0])]
        return {(body["refusals"]["problem"], body["refusals"]["door"]) for body in bodies}

    async def assert_empty(self) -> None:
        """Every queue and rung holds nothing, delivered or waiting. The metrics queue has a sink that never ends."""
        assert await stream.wait_until_empty(self.settings) == 0
        async with relayout.opened(self.settings) as (_, layouts):
            names = [q.name for q in topology_of(layouts.running).queues if q.name != METRICS_QUEUE]
        names += [self.scope(name).ingest_queue for name in self.upstreams]
        with pika.BlockingConnection(pika.URLParameters(self.settings.need("rabbitmq_url"))) as connection:
            channel = connection.channel()
            depths = {n: channel.queue_declare(n, passive=True).method.message_count for n in names}
        assert {n: depth for n, depth in depths.items() if depth} == {}

    def kill_role(self, name: str) -> int:
        """SIGKILL a role of this fleet; returns the number of the process that was killed."""

        def kill(fleet: Fleet) -> int:
            pid = fleet.pids()[name]
            os.kill(pid, signal.SIGKILL)
            return pid

        return self.thread.call(kill)

    def pids(self) -> dict[str, int]:
        return self.thread.call(lambda fleet: fleet.pids())

    async def wait_restarted(self, name: str, killed: int) -> None:
        """Until the supervisor has started the role again."""

        async def look() -> int | None:
            return self.pids().get(name)

        await eventually(f"{name} again", look, lambda pid: pid is not None and pid != killed, 40)

    def kill_server(self, name: str) -> None:
        """SIGKILL a private server. In the supervisor's thread, which also starts it again."""
        native = self.native
        assert native is not None
        self.thread.call(lambda _: native.kill(name))

    async def wait_server_restarted(self, name: str) -> None:
        native = self.native
        assert native is not None

        async def look() -> dict[str, int]:
            return self.thread.call(lambda _: native.pids())

        await eventually(f"{name} again", look, lambda pids: name in pids, 30)


def build_fleet(settings: Settings, native: NativeServers | None, said: list[str]) -> Fleet:
    """Every role of a local fleet; their logs lie below the data directory."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RISKFLEET_")}
    environment = kept | environment_of(settings) | {"PYTHONPATH": str(ROOT)}
    scaled = settings.workers_max > 1

    def look() -> None:
        if native is not None:
            native.ensure_alive()
        if scaled:
            local.obey(settings, fleet)

    fleet = Fleet(local.roles(0, scaled=scaled), environment, settings.data_dir / "logs", said.append, on_tick=look)
    return fleet


def some_events(prefix: str, number: int, seed: int) -> list[dict[str, Any]]:
    """Events of both kinds that meet every outcome, the same for the same seed."""
    chance = random.Random(seed)
    return [_event(f"{prefix}-{i:04d}", chance) for i in range(number)]


def _event(identity: str, chance: random.Random) -> dict[str, Any]:
    event: dict[str, Any] = {
        "id": identity,
        "kind": chance.choice(("risk", "compliance")),
        "type": chance.choice(("payment.transfer", "loan.application")),
        "occurred_at": "2026-01-31T12:00:00Z",
        "subject": {"type": "customer", "id": f"customer-{chance.randrange(20)}"},
        "amount": {"value": str(chance.choice((5, 120, 4_000, 90_000, 2_000_000))), "currency": "EUR"},
        "risk_score": float(chance.randrange(101)),
    }
    if event["kind"] == "compliance":
        levels = chance.choice(((), ("low",), ("high",)))
        event["regulatory_flags"] = [{"code": "SANCTIONS_HIT", "level": level} for level in levels]
    return event
