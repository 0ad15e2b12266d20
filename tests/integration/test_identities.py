"""One identity is one event: pairs of concurrent submissions, changed bodies, two tenants, and Redis wiped in between.

RISKFLEET_TEST_PAIRS says how many pairs (default 200; the figure of the documentation was made with 10,000).
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from contracts.events import event_id_of
from resilience.redis import connect
from tests.integration.bad_inputs import good_event
from tests.integration.fleet_fixture import RunningFleet, eventually, show

pytestmark = pytest.mark.integration

PAIRS = int(os.environ.get("RISKFLEET_TEST_PAIRS", "200"))
SEED = 20261124
SENDERS = 16


@asynccontextmanager
async def clients(fleet: RunningFleet, name: str) -> AsyncIterator[list[httpx.AsyncClient]]:
    """One connection per sender: a shared pool would make the client the slowest part."""
    headers = {"Authorization": f"Bearer {fleet.upstreams[name].api_key}"}
    made = [httpx.AsyncClient(base_url=fleet.url, headers=headers, timeout=60) for _ in range(2 * SENDERS)]
    try:
        yield made
    finally:
        await asyncio.gather(*(client.aclose() for client in made))


async def post(client: httpx.AsyncClient, event: dict[str, Any]) -> httpx.Response:
    """One submission; what is not known to be accepted is repeated with the same identity, as every client does."""
    while True:
        answer = await client.post("/v1/events", json=event)
        if answer.status_code != 503:
            return answer
        await asyncio.sleep(0.2)


async def pairs(
    fleet: RunningFleet, name: str, couples: list[tuple[dict[str, Any], dict[str, Any]]], halfway: Any = None
) -> list[tuple[httpx.Response, httpx.Response]]:
    """Both of each couple at the same time; `halfway` is awaited in the middle of the stream, which goes on."""
    answers: list[Any] = [None] * len(couples)
    waiting = iter(range(len(couples)))
    async with clients(fleet, name) as made:

        async def sender(number: int) -> None:
            one, other = made[2 * number], made[2 * number + 1]
            for i in waiting:
                if halfway is not None and i == len(couples) // 2:
                    await halfway()
                answers[i] = await asyncio.gather(post(one, couples[i][0]), post(other, couples[i][1]))

        await asyncio.gather(*(sender(number) for number in range(SENDERS)))
    return answers


async def test_a_pair_with_one_identity_is_one_event_across_a_wiped_redis(fleet: RunningFleet) -> None:
    chance, began = random.Random(SEED), time.monotonic()
    tag = f"pair-{chance.getrandbits(32):08x}-{PAIRS}"
    events = [good_event(chance) | {"id": f"{tag}-{i}"} for i in range(PAIRS)]

    async def flush() -> None:
        client = connect(fleet.settings.need("redis_url"))
        await client.flushall()
        await client.aclose()

    answers = await pairs(fleet, "acme", [(event, event) for event in events], flush)
    for event, (one, other) in zip(events, answers, strict=True):
        assert {one.status_code, other.status_code} <= {200, 202}, (one.text, other.text)
        assert one.json()["event_id"] == other.json()["event_id"] == event_id_of(fleet.scope("acme"), event["id"])
    decided = await fleet.wait_decided("acme", events, within_s=60 + PAIRS / 20)
    assert set(decided.values()) == {1}
    show(f"seed {SEED}: {PAIRS} pairs, {len(decided)} events, each decided once, {time.monotonic() - began:.1f} s")


async def test_a_changed_body_is_refused_and_never_decided(fleet: RunningFleet) -> None:
    """Refused at the door while Redis knows the first body; after FLUSHALL met in retrieval, parked and answered."""
    chance = random.Random(SEED + 1)
    count = max(PAIRS // 10, 20)
    tag = f"changed-{chance.getrandbits(32):08x}-{count}"
    events = [good_event(chance) | {"id": f"{tag}-{i}"} for i in range(count)]
    changed = [event | {"text": "another body"} for event in events]
    wiped = asyncio.Event()

    async def flush() -> None:
        client = connect(fleet.settings.need("redis_url"))
        await client.flushall()
        await client.aclose()
        wiped.set()

    answers = await pairs(fleet, "acme", list(zip(events, changed, strict=True)), flush)
    seen = Counter(tuple(sorted((one.status_code, other.status_code))) for one, other in answers)
    show(f"seed {SEED + 1}: {count} pairs with different bodies: {dict(seen)}")
    assert wiped.is_set()
    refused = [answer for pair in answers for answer in pair if answer.status_code == 422]
    assert all(answer.json()["type"].endswith(":idempotency-conflict") for answer in refused)
    decided = await fleet.wait_decided("acme", events, within_s=60 + count / 20)
    assert set(decided.values()) == {1}
    # Two acceptances for one identity: Redis was wiped between the two. One body owns it, the other is answered.
    both = [
        event
        for event, (one, other) in zip(events, answers, strict=True)
        if 422 not in (one.status_code, other.status_code)
    ]
    await conflicts_answered(fleet, both)


async def test_a_conflict_that_redis_forgot_is_parked_and_the_first_body_decided(fleet: RunningFleet) -> None:
    chance = random.Random(SEED + 2)
    tag = f"forgot-{chance.getrandbits(32):08x}"
    events = [good_event(chance) | {"id": f"{tag}-{i}"} for i in range(20)]
    async with clients(fleet, "acme") as made:
        for event in events:
            assert (await post(made[0], event)).status_code == 202
        first = await fleet.wait_decided("acme", events)
        client = connect(fleet.settings.need("redis_url"))
        await client.flushall()
        await client.aclose()
        for event in events:
            answer = await post(made[0], event | {"text": "another body"})
            assert answer.status_code == 202, answer.text
    await conflicts_answered(fleet, events)
    assert await fleet.decided("acme", events) == first


async def conflicts_answered(fleet: RunningFleet, events: list[dict[str, Any]]) -> None:
    """Each of these events has a dead letter for the body that lost, and is decided once."""
    scope = fleet.scope("acme")
    ids = [event_id_of(scope, event["id"]) for event in events]

    async def look() -> set[str]:
        sql = "SELECT event_id FROM dead_letters WHERE problem = 'idempotency-conflict' AND event_id = ANY(:ids)"
        return {row[0] for row in await fleet.rows(scope, sql, ids=ids)}

    await eventually("the losing bodies parked", look, lambda found: found == set(ids), 60)


async def test_the_same_identity_in_two_tenants_is_two_events(fleet: RunningFleet) -> None:
    chance = random.Random(SEED + 3)
    tag = f"shared-{chance.getrandbits(32):08x}"
    events = [good_event(chance) | {"id": f"{tag}-{i}"} for i in range(20)]
    changed = [event | {"text": "the other tenant's own"} for event in events]
    mine, theirs = await asyncio.gather(
        pairs(fleet, "acme", list(zip(events, events, strict=True))),
        pairs(fleet, "globex", list(zip(changed, changed, strict=True))),
    )
    assert {answer.status_code for pair in (*mine, *theirs) for answer in pair} <= {200, 202}
    for name, bodies in (("acme", events), ("globex", changed)):
        assert set((await fleet.wait_decided(name, bodies)).values()) == {1}
