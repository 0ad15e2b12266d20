"""`riskfleet doctor`: a round trip through every dependency, its version, and whether its settings are safe."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass

from contracts.failures import InfrastructureError, MessagingFailureError
from contracts.ports import Confirm, Delivery, Message
from contracts.settlement import Ack, Settlement
from contracts.topology import topology_of
from deploy.relayout import opened
from deploy.runtime import RandomIds
from deploy.settings import Settings
from deploy.wiring import check_eviction
from governance.postgres import engine as pg
from resilience.management import BrokerManagement
from resilience.rabbit import ConsumerPolicy, RabbitConsumer, RabbitPublisher
from resilience.redis import RedisStateStore, connect


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was done, whether it went well, what was found or what to do, and how long it took (ms)."""

    check: str
    ok: bool
    found: str
    ms: float

    def to_json(self) -> dict[str, object]:
        """For `--json`."""
        return asdict(self)


async def examine(settings: Settings) -> list[Finding]:
    """Every check, one after another; a failing server fails its own checks only."""
    checks: list[tuple[str, Callable[[Settings], Awaitable[str]]]] = [
        ("PostgreSQL: insert and roll back, safe settings", _postgres),
        ("Redis: script, eviction policy", _redis),
        ("RabbitMQ: publish, consume, ack", _rabbit),
        ("RabbitMQ: topology", _topology),
    ]
    return [await _timed(name, check, settings) for name, check in checks]


async def _timed(name: str, check: Callable[[Settings], Awaitable[str]], settings: Settings) -> Finding:
    began = time.monotonic()
    try:
        async with asyncio.timeout(15):
            found, ok = await check(settings), True
    except InfrastructureError as error:
        found, ok = error.detail, False
    except TimeoutError:
        found, ok = "no answer within 15 s", False
    return Finding(name, ok, found, round((time.monotonic() - began) * 1000, 1))


async def _postgres(settings: Settings) -> str:
    engine = pg.create_engine(settings.need("database_url"))
    try:
        await pg.check_settings(engine)
        await pg.insert_and_roll_back(engine)
        return f"version {await pg.ping(engine)}"
    finally:
        await pg.dispose(engine)


async def _redis(settings: Settings) -> str:
    client = connect(settings.need("redis_url"))
    store = RedisStateStore(client, f"doctor:0:{RandomIds().token()}")
    try:
        await check_eviction(store)
        return f"version {await store.version()}, script run in {await store.script_round_trip_ms():.1f} ms"
    finally:
        await store.close()


async def _rabbit(settings: Settings) -> str:
    management = BrokerManagement(settings.need("rabbitmq_management_url"))
    publisher = RabbitPublisher(settings.need("rabbitmq_url"), name="riskfleet-doctor")
    queue = f"risk.doctor.{RandomIds().token()}"
    arrived = asyncio.Event()

    async def handle(deliveries: Sequence[Delivery]) -> Sequence[Settlement]:
        arrived.set()
        return [Ack()] * len(deliveries)

    async def probe() -> None:
        return None

    consumer = RabbitConsumer(settings.need("rabbitmq_url"), [queue], handle, probe, ConsumerPolicy())
    try:
        await management.declare_temporary(queue)
        await publisher.start()
        await consumer.start()
        (confirm,) = await publisher.publish([Message("", queue, b"doctor", queue)])
        if confirm is not Confirm.CONFIRMED:
            raise MessagingFailureError(f"a message was not confirmed but {confirm}")
        await arrived.wait()
        return f"version {await management.version()}"
    finally:
        await consumer.stop()
        await publisher.close()
        await management.delete_queue(queue)
        await management.close()


async def _topology(settings: Settings) -> str:
    async with opened(settings) as (management, layouts):
        differences = await management.differences(topology_of(layouts.running))
        running = ", ".join(f"{layout.version} with {layout.partitions} partitions" for layout in layouts.running)
    if differences:
        raise MessagingFailureError(f"{len(differences)} differences, run 'riskfleet topology apply': {differences[0]}")
    return f"as wanted, {running}"
