"""Pauses on real servers: what is paused waits, everything else goes on, and after it all is decided once."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.failures import AuthorizationError, DatabaseError, NotKnownError
from contracts.identity import EVERYWHERE, Grant, Principal, Role
from contracts.tenancy import TenantScope
from contracts.topology import Layouts
from deploy import stream
from deploy.migrations.upgrade import role_of, upgrade
from deploy.servers import ServerUrls
from governance.postgres import create_engine, create_tenant, transaction
from governance.postgres.pauses import MAX_AGE_S, PostgresPauses
from resilience.memory.time import SteppingClock
from tests.integration.fleet_fixture import RunningFleet, eventually, show, some_events
from tests.integration.test_gate_running import Operator, login, ready

pytestmark = pytest.mark.integration

ANN = Principal("user:ann", "ann", frozenset({Grant(EVERYWHERE, Role.ADMIN)}))
NOBODY = Principal("key:rfk_1", "", frozenset({Grant(EVERYWHERE, Role.ADMIN)}))
HOLDS_WITHIN_S = 5.0


@pytest.fixture
async def engine(servers: ServerUrls) -> AsyncIterator[AsyncEngine]:
    await asyncio.to_thread(upgrade, servers.migration_database, role_of(servers.database))
    engine = create_engine(servers.database, pool_size=4)
    yield engine
    await engine.dispose()


async def new_tenant(engine: AsyncEngine) -> TenantScope:
    scope = TenantScope(f"held-{secrets.token_hex(4)}")
    await create_tenant(engine, scope, "a test", None)
    return scope


async def test_a_pause_is_seen_within_its_time_and_so_is_its_end(engine: AsyncEngine) -> None:
    clock, ours, theirs = SteppingClock(), await new_tenant(engine), await new_tenant(engine)
    desk, reader = PostgresPauses(engine, clock, Layouts.first(4)), PostgresPauses(engine, clock, Layouts.first(4))
    assert await reader.doors([ours, theirs]) == [None, None]
    await desk.pause(ANN, ours, "doors", "an incident")
    clock.step(MAX_AGE_S)
    first, second = await reader.doors([ours, theirs])
    assert first is not None
    assert (first.reason, first.seconds, second) == ("an incident", None, None)
    (shown,) = await desk.standing(frozenset({ours.tenant_id}))
    assert (shown.tenant, shown.place, shown.set_by) == (ours.tenant_id, "doors", "ann")
    assert ours.tenant_id not in {pause.tenant for pause in await desk.standing(frozenset({theirs.tenant_id}))}
    assert ours.tenant_id in {pause.tenant for pause in await desk.standing(frozenset({EVERYWHERE}))}
    await desk.resume(ANN, ours, "doors", "over")
    clock.step(MAX_AGE_S)
    assert await reader.doors([ours]) == [None]
    with pytest.raises(NotKnownError):
        await desk.resume(ANN, ours, "doors", "twice")


async def test_the_park_breaker_pauses_for_a_while_and_never_shortens_what_a_person_paused(engine: AsyncEngine) -> None:
    clock, scope = SteppingClock(), await new_tenant(engine)
    desk = PostgresPauses(engine, clock, Layouts.first(4))
    assert await desk.trip(scope, "too many parks", 120)
    assert await desk.trip(scope, "too many parks again", 120)
    (notice,) = await desk.doors([scope])
    assert notice is not None
    assert notice.seconds == 120
    clock.step(120)
    assert await desk.doors([scope]) == [None]
    with pytest.raises(NotKnownError):
        await desk.resume(ANN, scope, "doors", "it was over")
    await desk.pause(ANN, scope, "doors", "an incident")
    assert not await desk.trip(scope, "too many parks", 120)
    clock.step(500)
    (notice,) = await desk.doors([scope])
    assert notice is not None
    assert (notice.reason, notice.seconds) == ("an incident", None)


async def test_while_postgresql_does_not_answer_the_last_answer_holds(servers: ServerUrls, engine: AsyncEngine) -> None:
    clock, scope = SteppingClock(), await new_tenant(engine)
    own = create_engine(servers.database, pool_size=1)
    reader = PostgresPauses(own, clock, Layouts.first(4))
    await PostgresPauses(engine, clock, Layouts.first(4)).pause(ANN, scope, "doors", "an incident")
    (before,) = await reader.doors([scope])
    gone = create_engine("postgresql://nobody:x@127.0.0.1:1/none")
    reader._engine = gone
    for _ in range(3):
        clock.step(60)
        assert await reader.doors([scope]) == [before]
    with pytest.raises(DatabaseError):
        await PostgresPauses(gone, clock, Layouts.first(4)).doors([scope])
    await own.dispose()


@pytest.mark.parametrize("place", ["scoring", "door", ""])
async def test_only_a_person_pauses_only_what_there_is(engine: AsyncEngine, place: str) -> None:
    scope = await new_tenant(engine)
    desk = PostgresPauses(engine, SteppingClock(), Layouts.first(4))
    with pytest.raises(NotKnownError):
        await desk.pause(ANN, scope, place, "why")
    with pytest.raises(NotKnownError):
        await desk.pause(ANN, None, "doors", "why")
    with pytest.raises(AuthorizationError):
        await desk.pause(NOBODY, scope, "doors", "why")
    sql = text("INSERT INTO pauses VALUES ('*', :place, 'r', 'p', now(), NULL)")
    async with contextlib.AsyncExitStack() as stack:
        connection = await stack.enter_async_context(transaction(engine, [scope]))
        with pytest.raises(DBAPIError, match="row-level security"):
            await connection.execute(sql, {"place": place})


# --- in a running fleet -----------------------------------------------------------------------------------


@pytest.fixture
async def admin(fleet: RunningFleet) -> AsyncIterator[Operator]:
    await ready(fleet)
    operator = await login(fleet, fleet.admin.user, fleet.admin.password)
    yield operator
    await operator.client.aclose()


async def post(fleet: RunningFleet, name: str, event: dict[str, Any]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {fleet.upstreams[name].api_key}"}
    async with httpx.AsyncClient(base_url=fleet.url, headers=headers, timeout=10) as client:
        return await client.post("/v1/events", json=event)


async def by_amqp(fleet: RunningFleet, name: str, events: list[dict[str, Any]]) -> None:
    made = fleet.upstreams[name]
    await stream.submit_amqp(fleet.amqp_url(name), made.broker_user, made.tenant, events, lambda: None)


async def test_a_paused_tenant_waits_its_neighbour_goes_on_and_after_it_all_is_decided_once(
    fleet: RunningFleet, admin: Operator
) -> None:
    scope, path = fleet.scope("acme"), f"/ops/v1/tenants/{fleet.scope('acme').tenant_id}/pauses/doors"
    ours, theirs = some_events("held-ours", 40, 1), some_events("held-theirs", 40, 2)
    tried = some_events("held-tried", 1, 3)[0]
    began = time.monotonic()
    await admin.call("PUT", path, {"reason": "a test of pauses"})
    refused = await eventually(
        "the HTTP door refuses", lambda: post(fleet, "acme", tried), lambda r: r.status_code == 503, HOLDS_WITHIN_S
    )
    assert refused.json()["type"] == "urn:riskfleet:problem:tenant-paused"
    assert int(refused.headers["retry-after"]) == 30
    show(f"paused at the HTTP door after {time.monotonic() - began:.1f} s")
    await asyncio.sleep(max(0.0, began + HOLDS_WITHIN_S - time.monotonic()))  # the promise of the other door
    await by_amqp(fleet, "acme", ours)
    await fleet.send("globex", theirs)
    await fleet.wait_decided("globex", theirs)
    assert await fleet.decided("acme", ours) == {}
    listed = await admin.call("GET", "/ops/v1/pauses")
    assert scope.tenant_id in {pause["tenant"] for pause in listed["pauses"]}
    await admin.call("DELETE", path, {"reason": "the test is over"})
    decided = await fleet.wait_decided("acme", ours)
    assert set(decided.values()) == {1}
    again = await eventually(
        "the HTTP door accepts", lambda: post(fleet, "acme", tried), lambda r: r.status_code != 503, HOLDS_WITHIN_S
    )
    assert again.status_code in (200, 202)
    await fleet.wait_decided("acme", [tried])
    assert (await fleet.verified(scope)).intact
    rows = await fleet.rows(scope, "SELECT body FROM audit_records WHERE event_id = ''")
    actions = [orjson.loads(row[0]).get("action") for row in rows]
    assert (actions.count("pause.set"), actions.count("pause.cleared")) == (1, 1)
    assert await fleet.rows(scope, "SELECT 1 FROM dead_letters") == []


async def test_a_paused_stage_keeps_what_comes_and_works_it_off_later(fleet: RunningFleet, admin: Operator) -> None:
    path, events = "/ops/v1/tenants/_shared/pauses/scoring", some_events("held-stage", 40, 4)
    await admin.call("PUT", path, {"reason": "a test of pauses"})
    try:
        await asyncio.sleep(HOLDS_WITHIN_S)  # the promise
        await fleet.send("acme", events)

        async def arrived() -> int:
            sql = "SELECT count(*) FROM events WHERE event_id NOT IN (SELECT event_id FROM decisions)"
            return int((await fleet.rows(fleet.scope("acme"), sql))[0][0])

        await eventually("all have passed retrieval", arrived, lambda count: count == len(events), 30)
        await asyncio.sleep(1)  # time in which a stage that is not paused decides all of them many times over
        assert await fleet.decided("acme", events) == {}
    finally:
        await admin.call("DELETE", path, {"reason": "the test is over"})
    decided = await fleet.wait_decided("acme", events)
    assert set(decided.values()) == {1}
    assert await fleet.rows(fleet.scope("acme"), "SELECT 1 FROM dead_letters") == []
    await fleet.assert_empty()
