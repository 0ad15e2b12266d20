"""Dead letters of a running fleet: really parked, tried, sent again by two people at once, and decided once."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any

import httpx
import orjson
import pika
import pytest

from contracts.codec import entry_of
from contracts.events import event_id_of, parse_event
from contracts.messages import stage_message
from contracts.state import EventState, begin
from contracts.topology import Layouts, stage_queue
from tests.integration import test_gate_running as gate
from tests.integration.fleet_fixture import ROOT, RunningFleet, eventually, some_events
from tests.integration.test_gate_running import Operator

pytestmark = pytest.mark.integration

people = gate.people


def misrouted(fleet: RunningFleet, events: list[dict[str, Any]]) -> list[EventState]:
    """Put accepted events on the queue of a stage that they have not reached: it cannot hold them, and parks them."""
    scope, now = fleet.scope("acme"), datetime.now(UTC).isoformat()
    states = [
        begin(scope, event_id_of(scope, e["id"]), parse_event(e), received_at=now, source="http", correlation_id="c")
        for e in events
    ]
    with pika.BlockingConnection(pika.URLParameters(fleet.settings.need("rabbitmq_url"))) as connection:
        channel = connection.channel()
        for state in states:
            message = stage_message(entry_of(state, "retrieval"), Layouts.first(fleet.settings.partitions))
            queue = stage_queue("scoring", scope.partition(fleet.settings.partitions))
            channel.basic_publish("", queue, message.body, pika.BasicProperties(headers=dict(message.headers)))
    return states


async def letters_of(fleet: RunningFleet, states: list[EventState]) -> dict[str, tuple[str, str]]:
    """Event id → (letter id, status)."""
    sql = "SELECT event_id, letter_id, status FROM dead_letters WHERE event_id = ANY(:ids)"
    rows = await fleet.rows(fleet.scope("acme"), sql, ids=[state.event_id for state in states])
    return {row[0]: (row[1], row[2]) for row in rows}


async def parked(fleet: RunningFleet, states: list[EventState]) -> list[str]:
    """Their letters, once all of them have come."""
    found = await eventually(
        "the letters", lambda: letters_of(fleet, states), lambda some: len(some) == len(states), 30
    )
    assert {status for _, status in found.values()} == {"open"}
    return sorted(name for name, _ in found.values())


async def dlq(fleet: RunningFleet, person: Operator, *words: str) -> tuple[int, Any]:
    """The command line in a process of its own: exit code, and what it printed as JSON."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RISKFLEET_")}
    token = person.client.headers["Authorization"].removeprefix("Bearer ")
    environment = kept | {
        "RISKFLEET_CONTROL_URL": str(person.client.base_url).rstrip("/"),
        "RISKFLEET_TOKEN": token,
        "RISKFLEET_DATA_DIR": str(fleet.settings.data_dir),
        "PYTHONPATH": str(ROOT),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.cli", "dlq", *words, "--json"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, orjson.loads(out) if out.strip() else err.decode()


async def acts(fleet: RunningFleet, states: list[EventState]) -> list[str]:
    """What the audit chain says that people did about these letters."""
    sql = "SELECT body FROM audit_records WHERE event_id = ANY(:ids) ORDER BY seq"
    rows = await fleet.rows(fleet.scope("acme"), sql, ids=[state.event_id for state in states])
    found = [orjson.loads(bytes(row[0])).get("action") for row in rows]
    return sorted(action for action in found if action)


async def test_letters_are_tried_sent_again_by_two_people_and_decided_once(
    fleet: RunningFleet, people: dict[str, Operator]
) -> None:
    events = some_events(f"replay-{time.time_ns():x}", 12, 7)
    states = misrouted(fleet, events)
    names = await parked(fleet, states)

    code, found = await dlq(fleet, people["ana"], "groups", "--tenant", fleet.scope("acme").tenant_id)
    assert code == 0
    (group,) = [one for one in found["groups"] if one["open"] >= len(states)]
    assert (group["problem"], group["stages"]) == ("invalid-workflow-state", ["retrieval"])

    code, ran = await dlq(fleet, people["ana"], "dry-run", *names)
    assert (code, ran["counts"]) == (0, {"decides": len(names)}), ran
    assert sum(ran["changes"].values()) == len(names)
    assert await fleet.decided("acme", events) == {}
    code, said = await dlq(fleet, people["ana"], "replay", *names, "--reason", "curious", "--yes")
    assert (code, "deadletters:resolve" in said) == (1, True), said

    words = ("--fingerprint", group["fingerprint"], "--reason", "routing is mended", "--yes", "--batch", "5")
    answers = await asyncio.gather(*(dlq(fleet, people[name], "replay", *words) for name in ("ben", "bea")))
    results = [each for code, answer in answers for each in answer["results"] if code == 0]
    assert sorted(each["letter_id"] for each in results if each["result"] == "replayed") == names, answers
    assert set((await fleet.wait_decided("acme", events)).values()) == {1}
    dry = {each["event_id"]: each["then"] for each in ran["results"]}
    sql = "SELECT event_id, outcome FROM decisions WHERE revision = 1 AND event_id = ANY(:ids)"
    rows = await fleet.rows(fleet.scope("acme"), sql, ids=list(dry))
    assert {row[0]: row[1] for row in rows} == dry

    code, again = await dlq(fleet, people["ben"], "replay", *names, "--reason", "once more", "--yes")
    assert (code, again["counts"]) == (0, {"noop": len(names)})
    assert all("is decided" in each["why"] for each in again["results"])
    wanted = ["deadletter.left"] * len(names) + ["deadletter.replayed"] * len(names)

    async def told() -> bool:
        have = await acts(fleet, states)
        return have.count("deadletter.replayed") == len(names) and len(have) >= len(wanted)

    await eventually("every act in the audit", told, bool, 30)
    await fleet.verified(fleet.scope("acme"))
    assert set((await fleet.decided("acme", events)).values()) == {1}


async def test_a_discarded_event_has_failed_and_its_sender_can_read_so(
    fleet: RunningFleet, people: dict[str, Operator]
) -> None:
    events = some_events(f"discard-{time.time_ns():x}", 1, 8)
    (state,) = states = misrouted(fleet, events)
    names = await parked(fleet, states)
    code, done = await dlq(fleet, people["bea"], "discard", *names, "--reason", "a test of ours", "--yes")
    assert (code, done["counts"], done["results"][0]["failed"]) == (0, {"discarded": 1}, True)
    key = {"Authorization": f"Bearer {fleet.upstreams['acme'].api_key}"}
    async with httpx.AsyncClient(base_url=fleet.url, headers=key) as client:
        shown = (await client.get(f"/v1/events/{state.event_id}")).json()
        assert (shown["event_id"], shown["status"], shown["stage"]) == (state.event_id, "failed", None)
        looked = await people["ana"].call(
            "GET", f"/ops/v1/tenants/{fleet.scope('acme').tenant_id}/events/{state.event_id}"
        )
        assert looked["place"]["where"] == "failed"
        # Its sender may give the same event again: then it is decided, and the decision stands.
        assert (await client.post("/v1/events", json=events[0])).status_code == 202
        await fleet.wait_decided("acme", events)
        assert (await client.get(f"/v1/events/{state.event_id}")).json()["status"] != "failed"


async def test_what_is_not_the_caller_s_is_not_known(fleet: RunningFleet, people: dict[str, Operator]) -> None:
    foreign = fleet.scope("globex").tenant_id
    for path in (f"?tenant={foreign}", "?tenant=_system", f"/groups?tenant={foreign}", "/nothing", "/%00"):
        await people["ben"].call("GET", f"/ops/v1/dead-letters{path}", want=404)
    for path in ("?status=bad", "?after=%00", "?limit=0", "?parked_from=yesterday", "?after=nonsense"):
        await people["ben"].call("GET", f"/ops/v1/dead-letters{path}", want=422)
    await people["admin"].call("GET", "/ops/v1/dead-letters?tenant=_system")
    body = {"letter_ids": ["nothing"], "reason": "x"}
    await people["ben"].call("POST", "/ops/v1/dead-letters/replay", body, want=404)
    for wrong in ({}, body | {"letter_ids": []}, body | {"rate_per_s": 0}, body | {"more": 1}):
        await people["ben"].call("POST", "/ops/v1/dead-letters/replay", wrong, want=422)
    await people["ben"].call("POST", "/ops/v1/dead-letters/discard", {"letter_ids": ["x"]}, want=422)
