"""The reconciler on a running fleet: without loss it counts 0; what is purged by hand is decided once, and counted."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pika
import pytest

from contracts.topology import Layouts, stage_queue
from deploy.runtime import SystemClock
from governance.postgres import create_engine
from governance.postgres.missing import PostgresMissing
from resilience.rabbit import RabbitPublisher
from resilience.reconciler import Reconciler, ReconcilerPolicy
from tests.fakes import RecordingTelemetry
from tests.integration.fleet_fixture import RunningFleet, eventually, show, some_events

pytestmark = pytest.mark.integration

SEED = 20261125
POLICY = ReconcilerPolicy(every_s=0.5, settle_s=3.0, probe_s=5.0)
"""The rule is the product's; its minutes are seconds here."""


@asynccontextmanager
async def reconciling(fleet: RunningFleet) -> AsyncIterator[tuple[Reconciler, RecordingTelemetry]]:
    """A reconciler of this test's own beside the fleet's, which is slower."""
    telemetry, settings = RecordingTelemetry(), fleet.settings
    engine = create_engine(settings.need("database_url"), pool_size=1)
    publisher = RabbitPublisher(settings.need("rabbitmq_url"))
    await publisher.start()
    missing = PostgresMissing(engine)
    made = Reconciler(missing, publisher, telemetry, SystemClock(), Layouts.first(settings.partitions), POLICY)
    working = asyncio.create_task(made.run())
    try:
        yield made, telemetry
    finally:
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working
        await publisher.close()
        await engine.dispose()


def purge(fleet: RunningFleet, stage: str) -> int:
    """Purge a stage's queues by hand; how many messages they held."""
    with pika.BlockingConnection(pika.URLParameters(fleet.settings.need("rabbitmq_url"))) as connection:
        channel = connection.channel()
        queues = [stage_queue(stage, partition) for partition in range(fleet.settings.partitions)]
        return sum(channel.queue_purge(queue).method.message_count for queue in queues)


async def empty(fleet: RunningFleet) -> None:
    """Until nothing waits anywhere, not on a rung either: there an entry waits for its dead holder's lease."""

    async def look() -> bool:
        with suppress(AssertionError):
            await fleet.assert_empty()
            return True
        return False

    await eventually("empty queues", look, bool, 60)


async def undecided(fleet: RunningFleet, events: list[dict[str, Any]]) -> int:
    """How many events have no decision, once that number stands still: deliveries in hand are in no queue's count."""
    seen: list[int] = []

    async def look() -> bool:
        await asyncio.sleep(1)
        await empty(fleet)
        seen.append(len(events) - len(await fleet.decided("acme", events)))
        return len(seen) > 8 and len(set(seen[-8:])) == 1

    await eventually("no more decisions", look, bool, 90)
    return seen[-1]


async def test_without_loss_nothing_is_sent_again(fleet: RunningFleet) -> None:
    events = some_events("whole", 200, SEED)
    async with reconciling(fleet) as (_, telemetry):
        await fleet.send("acme", events)
        await fleet.wait_decided("acme", events)
        await asyncio.sleep(2 * POLICY.settle_s)
        assert (await fleet.verified(fleet.scope("acme"))).missing == 0
    assert telemetry.count("riskfleet_reconciled_total") == 0


async def test_what_is_purged_from_a_stages_queue_is_decided_once_and_counted(fleet: RunningFleet) -> None:
    events = some_events("purged", 200, SEED)
    pid = fleet.pids()["scoring"]
    os.kill(pid, signal.SIGSTOP)  # everything gathers before it
    await fleet.send("acme", events)
    fleet.kill_role("scoring")  # what it held comes back to its queues, and nobody takes it for a moment
    purged = 0
    while fleet.pids().get("scoring") in (None, pid):
        purged += await asyncio.to_thread(purge, fleet, "scoring")
    await fleet.wait_restarted("scoring", pid)
    await empty(fleet)
    lost = await undecided(fleet, events)
    show("purged", purged, "messages with", lost, "events")
    assert lost
    async with reconciling(fleet) as (_, telemetry):
        found = await fleet.wait_decided("acme", events, within_s=60)
        await asyncio.sleep(2 * POLICY.settle_s)
    assert set(found.values()) == {1}
    assert telemetry.count("riskfleet_reconciled_total", what="event") == lost
    assert telemetry.count("riskfleet_reconciled_total", what="trail") == 0
    assert (await fleet.verified(fleet.scope("acme"))).missing == 0
    await empty(fleet)


async def test_records_that_are_purged_on_their_way_to_the_audit_are_sent_again(fleet: RunningFleet) -> None:
    events = some_events("trail", 200, SEED)
    sending = asyncio.create_task(fleet.send("globex", events))
    pid = fleet.pids()["sink-audit"]
    await fleet.wait_decided("globex", events, 1)
    fleet.kill_role("sink-audit")
    purged = 0
    while fleet.pids().get("sink-audit") in (None, pid):
        purged += await asyncio.to_thread(purge, fleet, "audit")
    await sending
    await fleet.wait_decided("globex", events)
    show("purged", purged, "messages")
    assert purged
    async with reconciling(fleet) as (_, telemetry):

        async def look() -> float:
            return telemetry.count("riskfleet_reconciled_total", what="trail")

        await eventually("trails sent again", look, bool, 60)
        assert (await fleet.verified(fleet.scope("globex"))).missing == 0
    assert telemetry.count("riskfleet_reconciled_total", what="event") == 0
