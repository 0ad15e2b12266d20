"""Load on whole fleets. Minutes each, so only where RISKFLEET_TEST_LOAD is set; RISKFLEET_TEST_LOAD_EVENTS scales them.

What is fast on a quiet machine is slow on a busy one, so bars are ratios and absences, seldom rates.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter

import orjson
import pytest

from deploy.bench.load import Sent, by_http
from deploy.bench.machine import costs
from tests.integration.conftest import fleet  # noqa: F401 - the fixture of a running fleet
from tests.integration.fleet_fixture import RunningFleet, show, some_events
from tests.load.bench_run import run_bench

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif("RISKFLEET_TEST_LOAD" not in os.environ, reason="set RISKFLEET_TEST_LOAD=1: takes minutes"),
]
EVENTS = int(os.environ.get("RISKFLEET_TEST_LOAD_EVENTS", "2000"))
SEED = 20261125


async def test_no_tenant_finds_a_canary_of_another(fleet: RunningFleet) -> None:  # noqa: F811
    """Both tenants send at once, with the same identities; every event carries the name of its owner in attributes."""
    names = list(fleet.upstreams)
    load = []
    for number, event in enumerate(some_events("canary", EVENTS // 2, SEED)):
        for name in names:
            marked = event | {"attributes": {"canary": f"canary-of-{name}-{number}"}}
            load.append((fleet.upstreams[name], orjson.dumps(marked)))
    sent = Sent()
    await by_http(fleet.url, load, 50.0, sent, lambda _: None)
    assert set(sent.statuses) <= {200, 202}, sent.statuses
    for name in names:
        await fleet.wait_decided(name, some_events("canary", EVENTS // 2, SEED), within_s=300)
        scope = fleet.scope(name)
        others = [f"canary-of-{other}-".encode() for other in names if other != name]
        for table, column in (("decisions", "state"), ("events", "body"), ("audit_records", "body")):
            rows = await fleet.rows(scope, f"SELECT tenant, {column} AS held FROM {table}")
            assert {row.tenant for row in rows} == {scope.tenant_id}, table
            assert [row.held for row in rows if any(mark in bytes(row.held) for mark in others)] == [], table
        await fleet.verified(scope)


async def test_a_flood_is_refused_before_it_is_accepted_and_nothing_accepted_is_lost(fleet: RunningFleet) -> None:  # noqa: F811
    """Ten times what the fleet decides in a second, for as long as EVENTS lasts."""
    name = next(iter(fleet.upstreams))
    upstream = fleet.upstreams[name]
    warm = [(upstream, orjson.dumps(event)) for event in some_events("warm", 200, SEED)]
    began = time.monotonic()
    await by_http(fleet.url, warm, 1_000.0, Sent(), lambda _: None)
    capacity = 200 / (time.monotonic() - began)
    events = some_events("flood", EVENTS, SEED)
    before, peak, sent = costs(_kinds(fleet)), Counter[str](), Sent()
    flood = asyncio.create_task(
        by_http(fleet.url, [(upstream, orjson.dumps(e)) for e in events], 10 * capacity, sent, lambda _: None)
    )
    while not flood.done():
        for kind, cost in costs(_kinds(fleet)).items():
            peak[kind] = max(peak[kind], cost.rss)
        await asyncio.sleep(0.5)
    await flood
    show("seed", SEED, "capacity", round(capacity), "answers", sent.statuses)
    assert set(sent.statuses) <= {200, 202, 429, 503}, sent.statuses
    decided = await fleet.wait_decided(name, events, wanted=len(sent.intended), within_s=300)
    assert {event for _, event in sent.intended} <= set(decided)
    assert set(decided.values()) == {1}
    assert {kind: size for kind, size in peak.items() if size > before[kind].rss + 200 * 2**20} == {}


def _kinds(running: RunningFleet) -> dict[str, list[int]]:
    return {name: [pid] for name, pid in running.pids().items()}


def test_memory_and_descriptors_stay_flat_over_a_soak() -> None:
    """The same fleet from its first tenth on: growth is bounded by a small part of what it held then."""
    found = run_bench("--rate", "100", "--events", str(10 * EVENTS), "--patience", "120", within_s=3_600)
    samples = found["samples"]
    early, late = samples[len(samples) // 10 + 2], samples[-1]
    # PostgreSQL's backends map the shared buffers page by page, so its memory grows until all were touched.
    for kind in set(late["costs"]) - {"postgresql", "redis", "rabbitmq"}:
        then, now = early["costs"][kind], late["costs"][kind]
        assert now["rss"] < then["rss"] * 1.15 + 8 * 2**20, f"{kind}: {then['rss']} → {now['rss']} bytes"
        assert now["descriptors"] <= then["descriptors"] + 8, f"{kind}: {then['descriptors']} → {now['descriptors']}"


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_more_workers_of_a_stage_lose_and_double_nothing(workers: int) -> None:
    found = run_bench("--drain", "--events", str(EVENTS), "--tenants", "16", "--stages", str(workers))
    assert found["decided"] == EVENTS


def test_partitions_cost_little() -> None:
    """The same backlog over 1 and over 32 partitions; CPU per event, since that is not the machine's mood."""
    cost = {
        partitions: run_bench("--drain", "--events", str(EVENTS), "--tenants", "64", "--partitions", str(partitions))
        for partitions in (1, 32)
    }
    assert cost[32]["cpu_s_per_1000"] < 2 * cost[1]["cpu_s_per_1000"]
