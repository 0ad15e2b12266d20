"""The local supervisor obeys the autoscaler: a backlog brings a second worker, its end takes it away, none is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import httpx
import pytest

from contracts.topology import STAGES
from tests.integration.fleet_fixture import RunningFleet, eventually, show, some_events

pytestmark = pytest.mark.integration

SETTINGS = {"workers_max": 2, "scaling_period_s": 0.5, "scaling_slo_s": 1.0, "group": 8, "prefetch": 8}
EVENTS = 1_500


async def scaling(fleet: RunningFleet, stage: str) -> tuple[int, dict[str, Any]]:
    url = f"http://{fleet.settings.health_host}:{fleet.settings.scaling_port}/ops/v1/scaling/{stage}"
    try:
        async with httpx.AsyncClient(timeout=5) as client:
            answer = await client.get(url)
    except httpx.TransportError:
        return 0, {}
    return answer.status_code, answer.json()


async def test_a_backlog_starts_a_second_worker_and_its_end_stops_it_with_nothing_lost(fleet: RunningFleet) -> None:
    def names() -> set[str]:
        return {name for name in fleet.pids() if name.startswith("scoring")}

    async def look() -> set[str]:
        return names()

    for stage in STAGES:
        await eventually(f"{stage} seen", lambda s=stage: scaling(fleet, s), lambda a: a[0] == 200, 60)  # type: ignore[misc]
    assert names() == {"scoring"}
    scoring = fleet.pids()["scoring"]
    os.kill(scoring, signal.SIGSTOP)  # so that a backlog there is certain, however fast the machine
    events = some_events("scaled", EVENTS, 7)
    try:
        await fleet.send("acme", events)
        waiting = await eventually(
            "a backlog at scoring",
            lambda: scaling(fleet, "scoring"),
            lambda answer: answer[0] == 200 and answer[1]["backlog_events"] >= EVENTS,
            60,
        )
    finally:
        os.kill(scoring, signal.SIGCONT)
    show("scoring while it stood still:", waiting[1])
    assert waiting[1]["backlog_events"] >= waiting[1]["backlog_messages"] > 0
    assert waiting[1]["oldest_age_s"] > 0
    assert not waiting[1]["estimated"]
    await eventually("a second scoring worker", look, lambda found: found == {"scoring", "scoring-2"}, 60)
    decided = await fleet.wait_decided("acme", events, within_s=90)
    assert set(decided.values()) == {1}
    await eventually("one scoring worker again", look, lambda found: found == {"scoring"}, 60)
    await fleet.verified(fleet.scope("acme"))
    await fleet.assert_empty()
    empty = await eventually(
        "no backlog", lambda: scaling(fleet, "scoring"), lambda a: a[0] == 200 and a[1]["backlog_events"] == 0, 30
    )
    assert empty[1]["oldest_age_s"] == 0
    assert [line for line in fleet.said if "did not drain" in line or "killing" in line] == []
    assert "stopping scoring-2" in fleet.said


async def test_a_stage_that_there_is_not_is_a_clear_404_and_the_public_port_does_not_answer(
    fleet: RunningFleet,
) -> None:
    status, problem = await scaling(fleet, "nowhere")
    assert status == 404
    assert "retrieval, scoring, guardrail, decision" in problem["detail"]
    async with httpx.AsyncClient(timeout=5) as client:
        assert (await client.get(f"{fleet.url}/ops/v1/scaling/scoring")).status_code == 404


async def test_after_flushall_the_answer_says_that_it_is_estimated_until_the_queues_were_empty(
    fleet: RunningFleet,
) -> None:
    scoring = fleet.pids()["scoring"]
    os.kill(scoring, signal.SIGSTOP)
    events = some_events("flushed", 200, 8)
    try:
        await fleet.send("acme", events)
        await eventually(
            "a backlog", lambda: scaling(fleet, "scoring"), lambda a: a[0] == 200 and a[1]["backlog_events"] >= 200, 60
        )
        await asyncio.to_thread(flush, fleet)
        _, answer = await eventually(
            "estimated", lambda: scaling(fleet, "scoring"), lambda a: a[0] == 200 and a[1]["estimated"], 30
        )
        assert answer["backlog_events"] >= answer["backlog_messages"] > 0
    finally:
        os.kill(scoring, signal.SIGCONT)
    await fleet.wait_decided("acme", events)
    await eventually(
        "whole again",
        lambda: scaling(fleet, "scoring"),
        lambda a: a[0] == 200 and not a[1]["estimated"] and a[1]["backlog_events"] == 0,
        60,
    )


def flush(fleet: RunningFleet) -> None:
    import redis

    client = redis.Redis.from_url(fleet.settings.need("redis_url"))
    client.flushdb()
    client.close()
