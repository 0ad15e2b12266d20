"""One tenant offers more than its partition serves; tenants of other partitions must not feel it, no rate set.

Minutes, so only where RISKFLEET_TEST_LOAD is set; RISKFLEET_TEST_NOISY_S is how long the flood lasts (s).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time

import orjson
import pytest

from contracts.tenancy import TenantScope
from deploy import keys, provision
from deploy.bench.load import Load, Sent, by_http
from deploy.provision import DemoCredentials
from tests.integration.conftest import fleet  # noqa: F401 - the fixture of a running fleet
from tests.integration.fleet_fixture import RunningFleet, show, some_events

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif("RISKFLEET_TEST_LOAD" not in os.environ, reason="set RISKFLEET_TEST_LOAD=1: takes minutes"),
]
SECONDS = int(os.environ.get("RISKFLEET_TEST_NOISY_S", "20"))
SEED = 20261127
NEIGHBOURS, QUIET_RATE, TOO_MUCH = 3, 20.0, 3.0
"""Quiet tenants, their events per second together, and what the noisy one offers as a multiple of its capacity."""


async def test_a_tenant_beyond_its_partition_slows_no_tenant_of_another(fleet: RunningFleet) -> None:  # noqa: F811
    noisy = next(iter(fleet.upstreams.values()))
    quiet = await neighbours(fleet, TenantScope(noisy.tenant))
    capacity = await capacity_of(fleet.url, noisy)
    baseline = await served(fleet.url, quiet, "baseline")
    flood = [(noisy, orjson.dumps(event)) for event in some_events("flood", int(SECONDS * TOO_MUCH * capacity), SEED)]
    noise = Sent()
    # A loop of its own: the sender of the flood must not hold up the clock of the others.
    flooding = asyncio.create_task(
        asyncio.to_thread(lambda: asyncio.run(by_http(fleet.url, flood, TOO_MUCH * capacity, noise, lambda _: None)))
    )
    beside = await served(fleet.url, quiet, "beside")
    assert not flooding.done(), "the flood ended before the neighbours were measured"
    await flooding
    show("seed", SEED, "capacity", round(capacity), "flood", noise.statuses)
    show("baseline p99_s, decided", baseline, "beside the flood", beside)
    assert beside[0] <= max(2 * baseline[0], 0.1)
    assert beside[1] >= 0.9 * baseline[1]


async def neighbours(running: RunningFleet, noisy: TenantScope) -> list[DemoCredentials]:
    """New tenants whose partitions are not the noisy one's."""
    settings, made = running.settings, list[DemoCredentials]()
    while len(made) < NEIGHBOURS:
        scope = TenantScope(f"quiet-{secrets.token_hex(4)}")
        if scope.partition(settings.partitions) != noisy.partition(settings.partitions):
            made.append(await provision.create_upstream(settings, scope, scope.tenant_id, keys.pepper(settings)))
    return made


async def capacity_of(url: str, tenant: DemoCredentials) -> float:
    """Decisions per second of one tenant alone, offered all at once."""

    async def all_at_once(prefix: str) -> float:
        load = [(tenant, orjson.dumps(event)) for event in some_events(prefix, 400, SEED)]
        began = time.monotonic()
        await by_http(url, load, 10_000.0, Sent(), lambda _: None)
        return time.monotonic() - began

    await all_at_once("warm")
    return 400 / await all_at_once("capacity")


async def served(url: str, tenants: list[DemoCredentials], prefix: str) -> tuple[float, int]:
    """99th percentile (s) from an event's moment to its decision, and how many were decided within the time.

    An event without a decision counts as one that took for ever.
    """
    events = some_events(prefix, int(SECONDS * QUIET_RATE * 0.9), SEED)
    load: Load = [(tenants[number % len(tenants)], orjson.dumps(event)) for number, event in enumerate(events)]
    sent = Sent()
    await by_http(url, load, QUIET_RATE, sent, lambda _: None)
    show(prefix, "answers", sent.statuses, "sender late by at most", round(sent.late_s, 3))
    took = sorted(sent.latencies.values())
    took += [float("inf")] * (len(load) - len(took))
    end = max(sent.intended.values(), default=0.0)
    within = sum(sent.intended[key] + seconds <= end + 1.0 for key, seconds in sent.latencies.items())
    return round(took[int(len(took) * 0.99)], 4), within
