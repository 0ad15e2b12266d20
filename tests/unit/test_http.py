"""The HTTP door as a client sees it: statuses, problem documents, headers, and never another tenant's event."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from contracts.events import event_id_of
from contracts.failures import DatabaseError
from contracts.identity import PERMISSIONS, Role
from contracts.lifecycle import Status
from contracts.ports import Confirm, DecisionRow
from contracts.tenancy import TenantScope
from contracts.topology import Layouts
from gateway.health import HealthDoor, HealthReport, health_app, serve
from gateway.http import HttpPorts, create_app, ingest_calls
from resilience.monitor import MonitorPolicy, Readings, ServerReading, StageReading, judge
from tests.fakes import DoorParts, InMemoryLedger, event_body
from tests.fakes_doors import WholeDoor, health_door

ACME = TenantScope("acme")
AUTH = {"Authorization": "Bearer rf_acme_key"}
JSON = AUTH | {"Content-Type": "application/json"}
ORDER = event_id_of(ACME, "order-1")


def app_on(parts: DoorParts, door: HealthDoor | None = None) -> Starlette:
    ports = HttpPorts(parts.directory, parts.directory, parts.ledger, parts.store, parts.ids)
    return create_app(
        parts.intake, ports, parts.refusals, door or health_door(), layouts=Layouts.first(parts.partitions)
    )


def client_of(app: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


@pytest.fixture
def parts() -> DoorParts:
    return DoorParts()


@pytest.fixture
def whole() -> WholeDoor:
    return WholeDoor()


@pytest.fixture
async def client(parts: DoorParts) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app_on(parts)) as client:
        yield client


def assert_problem(response: httpx.Response, status: int, problem: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["type"] == f"urn:riskfleet:problem:{problem}"
    assert document["status"] == status
    assert document["detail"]
    assert document["instance"] == response.request.url.path
    assert document["correlation_id"] == response.headers["x-correlation-id"]
    return document


async def test_a_submission_is_accepted_with_202_and_its_event_id(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/risk", content=event_body(), headers=JSON | {"X-Correlation-ID": "corr-9"})
    assert response.status_code == 202
    assert response.json() == {
        "event_id": ORDER,
        "id": "order-1",
        "kind": "risk",
        "status": "received",
        "correlation_id": "corr-9",
    }
    assert response.headers["x-correlation-id"] == "corr-9"
    assert response.headers["location"] == f"/v1/events/{ORDER}"
    assert "idempotency-replayed" not in response.headers


async def test_a_repeat_says_so_and_brings_the_decision_once_there_is_one(
    client: httpx.AsyncClient, parts: DoorParts
) -> None:
    await client.post("/v1/events", content=event_body(), headers=JSON)
    again = await client.post("/v1/events", content=event_body(), headers=JSON)
    assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")
    row = parts.decided(ORDER, ACME)
    decided = await client.post("/v1/events", content=event_body(), headers=JSON)
    assert (decided.status_code, decided.headers["idempotency-replayed"]) == (200, "true")
    assert decided.json()["decision"] == json.loads(row.decision)
    assert decided.json()["status"] == "approved"


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic rf_acme_key", "ü"])
@pytest.mark.parametrize("call", [("POST", "/v1/risk"), ("GET", f"/v1/events/{ORDER}"), ("GET", "/v1/tenant")])
async def test_without_a_known_key_every_call_is_401(
    client: httpx.AsyncClient, authorization: str | None, call: tuple[str, str]
) -> None:
    headers = {} if authorization is None else {b"Authorization": authorization.encode("latin-1")}
    response = await client.request(*call, headers=headers)
    assert_problem(response, 401, "unauthenticated")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "problem"),
    [
        ("/v1/risk", b"{", {}, 400, "malformed-json"),
        ("/v1/risk", b'{"a":1,"a":1}', {}, 400, "malformed-json"),
        ("/v1/risk", b" " * 65_537, {}, 413, "body-too-large"),
        ("/v1/risk", event_body(surprise=1), {}, 422, "invalid-event"),
        ("/v1/compliance", event_body(), {}, 422, "invalid-event"),
        ("/v1/events", event_body(kind=None), {}, 422, "invalid-event"),
        ("/v1/events", event_body(tenant_id="globex"), {}, 403, "foreign-tenant"),
        ("/v1/events", event_body(schema_version="7.0"), {}, 422, "unknown-schema-version"),
        ("/v1/events", event_body(), {"Idempotency-Key": "other"}, 422, "invalid-event"),
        ("/v1/events", event_body(), {"Idempotency-Key": ""}, 422, "invalid-metadata"),
        ("/v1/events", event_body(), {"Content-Type": "text/plain"}, 415, "unsupported-media-type"),
        (
            "/v1/events",
            event_body(),
            {"Content-Type": "application/json; charset=latin-1"},
            415,
            "unsupported-media-type",
        ),
        ("/v1/events", event_body(), {"Content-Type": "application/jsonx"}, 415, "unsupported-media-type"),
    ],
)
async def test_a_client_error_is_a_problem_document(
    client: httpx.AsyncClient,
    parts: DoorParts,
    path: str,
    body: bytes,
    headers: dict[str, str],
    status: int,
    problem: str,
) -> None:
    document = assert_problem(await client.post(path, content=body, headers=JSON | headers), status, problem)
    if status == 422 and problem == "invalid-event":
        assert all(set(error) == {"pointer", "reason"} for error in document["errors"])
    assert parts.publisher.messages == []
    assert parts.telemetry.count("riskfleet_refusals_total", door="http", problem=problem) == 1


async def test_a_missing_content_type_is_415_and_json_dialects_are_read(client: httpx.AsyncClient) -> None:
    assert_problem(await client.post("/v1/risk", content=event_body(), headers=AUTH), 415, "unsupported-media-type")
    for media_type in ("application/JSON; charset=UTF-8", "application/vnd.acme.v1+json"):
        response = await client.post("/v1/risk", content=event_body(), headers=AUTH | {"Content-Type": media_type})
        assert response.status_code == 202


async def test_an_endless_body_is_refused_without_reading_it_all(client: httpx.AsyncClient) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while read < 10_000:
            read += 1
            yield b" " * 1024

    messages = endless()
    answers: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": await anext(messages), "more_body": True}

    async def send(message: Any) -> None:
        answers.append(message)

    parts = DoorParts()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/risk",
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer rf_acme_key"), (b"content-type", b"application/json")],
    }
    await app_on(parts)(scope, receive, send)
    assert answers[0]["status"] == 413
    assert read <= 66


@pytest.mark.parametrize("answer", [Confirm.UNKNOWN, Confirm.REFUSED, Confirm.UNROUTABLE])
async def test_without_a_confirm_the_answer_is_503_and_names_the_event(
    client: httpx.AsyncClient, parts: DoorParts, answer: Confirm
) -> None:
    parts.publisher.answers = [answer]
    document = assert_problem(
        await client.post("/v1/risk", content=event_body(id=None), headers=JSON), 503, "not-known-to-be-accepted"
    )
    assert document["event_id"] == event_id_of(ACME, document["id"])


async def test_a_server_that_is_away_is_503_everywhere(client: httpx.AsyncClient, parts: DoorParts) -> None:
    parts.store.down = True
    document = assert_problem(
        await client.post("/v1/risk", content=event_body(), headers=JSON), 503, "not-known-to-be-accepted"
    )
    assert document["event_id"] == ORDER
    parts.directory.error = DatabaseError()
    for method, path in (("POST", "/v1/risk"), ("GET", "/v1/tenant"), ("GET", f"/v1/events/{ORDER}")):
        assert_problem(await client.request(method, path, headers=JSON), 503, "not-known-to-be-accepted")


async def test_an_event_can_be_followed_from_receipt_to_decision(client: httpx.AsyncClient, parts: DoorParts) -> None:
    await client.post("/v1/risk", content=event_body(), headers=JSON)
    received = (await client.get(f"/v1/events/{ORDER}", headers=AUTH)).json()
    assert (received["status"], received["stage"], received["version"]) == ("received", "retrieval", 0)
    assert len(received["trail"]) == 1
    row = parts.decided(ORDER, ACME)
    decided = (await client.get("/v1/events", params={"id": "order-1"}, headers=AUTH)).json()
    assert (decided["status"], decided["stage"], decided["event_id"]) == ("approved", None, ORDER)
    assert decided["decision"] == json.loads(row.decision)


async def test_an_event_that_only_postgresql_knows_is_received(client: httpx.AsyncClient, parts: DoorParts) -> None:
    parts.ledger.owners[ACME, ORDER] = "digest"
    assert (await client.get(f"/v1/events/{ORDER}", headers=AUTH)).json()["status"] == "received"


async def test_a_tombstone_still_answers(client: httpx.AsyncClient, parts: DoorParts) -> None:
    await client.post("/v1/risk", content=event_body(), headers=JSON)
    parts.store.move_on(ACME, ORDER, 4, Status.FAILED, None)
    assert (await client.get(f"/v1/events/{ORDER}", headers=AUTH)).json() == {
        "event_id": ORDER,
        "status": "failed",
        "version": 4,
        "stage": None,
    }


@pytest.mark.parametrize("event_id", ["0" * 32, "0" * 31, "A" * 32, "..", "%00", "%F0%9F%98%80"])
async def test_an_unknown_event_and_a_foreign_one_look_the_same(
    client: httpx.AsyncClient, parts: DoorParts, event_id: str
) -> None:
    await client.post("/v1/risk", content=event_body(), headers=JSON)
    parts.decided(ORDER, ACME)
    globex = {"Authorization": "Bearer rf_globex_key"}
    foreign = assert_problem(await client.get(f"/v1/events/{ORDER}", headers=globex), 404, "not-known")
    unknown = await client.get(f"/v1/events/{event_id}", headers=globex)
    if event_id != "..":  # the client itself resolves dots
        document = assert_problem(unknown, 404, "not-known")
        differing = ("instance", "correlation_id")
        assert {k: v for k, v in document.items() if k not in differing} == {
            k: v for k, v in foreign.items() if k not in differing
        }
    assert_problem(await client.get("/v1/events", params={"id": "order-1"}, headers=globex), 404, "not-known")


@pytest.mark.parametrize("query", ["", "?id=", "?id=a&id=b", "?id=" + "x" * 257])
async def test_a_search_names_exactly_one_event(client: httpx.AsyncClient, query: str) -> None:
    assert_problem(await client.get(f"/v1/events{query}", headers=AUTH), 422, "invalid-metadata")


async def test_a_tenant_sees_itself(client: httpx.AsyncClient) -> None:
    document = (await client.get("/v1/tenant", headers=AUTH)).json()
    assert document["tenant_id"] == "acme"
    assert document["partition"] == ACME.partition(4)
    assert document["thresholds"]["review_from"] == 40
    assert document["limits"] == {
        "max_body_bytes": 65_536,
        "max_batch_bytes": 5_242_880,
        "max_batch_events": 1_000,
        "max_wait_seconds": 30,
        "undecided_events": None,
        "rate_per_s": None,
        "burst": None,
    }


async def test_an_event_under_way_names_the_process_that_holds_it(client: httpx.AsyncClient, parts: DoorParts) -> None:
    await client.post("/v1/risk", content=event_body(), headers=JSON)
    parts.store.states[ACME, ORDER] = replace(parts.store.states[ACME, ORDER], holder="boot-7")
    assert (await client.get(f"/v1/events/{ORDER}", headers=AUTH)).json()["holder"] == "boot-7"


class LateLedger(InMemoryLedger):
    """The first question comes a moment before the commit."""

    asked = 0

    async def decisions(self, keys: Sequence[tuple[TenantScope, str]]) -> Sequence[DecisionRow | None]:
        self.asked += 1
        return [None] * len(keys) if self.asked == 1 else await super().decisions(keys)


async def test_an_event_that_is_decided_between_two_questions_is_not_called_failed() -> None:
    parts = DoorParts(ledger=LateLedger())
    async with client_of(app_on(parts)) as client:
        await client.post("/v1/risk", content=event_body(), headers=JSON)
        parts.decided(ORDER, ACME)
        parts.store.move_on(ACME, ORDER, 4, Status("approved"), None)
        document = (await client.get(f"/v1/events/{ORDER}", headers=AUTH)).json()
    assert (document["status"], document["revision"]) == ("approved", 1)


# --- the feed ---------------------------------------------------------------------------------------


async def test_the_feed_brings_every_decision_of_the_tenant_once(whole: WholeDoor) -> None:
    whole.feed.decisions[ACME] = [b'{"n":%d}' % n for n in range(5)]
    whole.feed.decisions[TenantScope("globex")] = [b'{"n":"foreign"}']
    seen: list[int] = []
    cursor: str | None = None
    async with client_of(whole.app()) as client:
        for more in (True, True, False):
            query = {"limit": "2"} | ({"after": cursor} if cursor else {})
            page = (await client.get("/v1/decisions", params=query, headers=AUTH)).json()
            seen += [decision["n"] for decision in page["decisions"]]
            cursor = page["cursor"]
            assert page["more"] is more
        empty = (await client.get("/v1/decisions", params={"after": str(cursor)}, headers=AUTH)).json()
    assert seen == [0, 1, 2, 3, 4]
    assert empty == {"decisions": [], "cursor": cursor, "more": False}


async def test_an_empty_feed_has_no_cursor_yet(whole: WholeDoor) -> None:
    async with client_of(whole.app()) as client:
        page = (await client.get("/v1/decisions", headers=AUTH)).json()
    assert page == {"decisions": [], "cursor": None, "more": False}


@pytest.mark.parametrize(
    "query",
    [
        "?after=unknown",
        "?after=c99",
        "?after=",
        "?after=" + "x" * 300,
        "?after=c0&after=c0",
        "?limit=0",
        "?limit=1001",
        "?limit=-1",
        "?limit=ten",
        "?limit=%D9%A3",
        "?limit=1&limit=2",
        "?after=%00",
    ],
)
async def test_a_page_that_cannot_be_meant_is_422(whole: WholeDoor, query: str) -> None:
    async with client_of(whole.app()) as client:
        assert_problem(await client.get(f"/v1/decisions{query}", headers=AUTH), 422, "invalid-metadata")


# --- who may what -----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", Role)
async def test_the_table_of_permissions_is_what_the_calls_go_by(whole: WholeDoor, role: Role) -> None:
    calls = ingest_calls(
        whole.parts.intake,
        whole.ports,
        whole.parts.refusals,
        health_door(),
        layouts=Layouts.first(whole.parts.partitions),
    )
    headers = {"Authorization": f"Bearer rf_acme_{role.lower()}", "Content-Type": "application/json"}
    checked = 0
    async with client_of(whole.app()) as client:
        for call in calls:
            if call.permission is None:
                continue
            response = await client.request(call.method, call.path, headers=headers, content=b"x")
            assert (response.status_code == 403) is (call.permission not in PERMISSIONS[role]), (role, call.path)
            if response.status_code == 403:
                assert_problem(response, 403, "forbidden")
            checked += 1
    assert checked == 10


async def test_a_viewer_reads_and_does_not_submit(whole: WholeDoor) -> None:
    viewer = {"Authorization": "Bearer rf_acme_viewer"}
    async with client_of(whole.app()) as client:
        await client.post("/v1/risk", content=event_body(), headers=JSON)
        assert (await client.get(f"/v1/events/{ORDER}", headers=viewer)).status_code == 200
        refused = await client.post("/v1/risk", content=event_body(), headers=JSON | viewer)
        assert_problem(refused, 403, "forbidden")
    assert whole.parts.telemetry.count("riskfleet_refusals_total", door="http", problem="forbidden") == 1


async def test_a_token_that_is_bound_to_no_tenant_is_403(whole: WholeDoor) -> None:
    async with client_of(whole.app()) as client:
        response = await client.get("/v1/tenant", headers={"Authorization": "Bearer rf_unbound"})
        assert "bound to no tenant" in assert_problem(response, 403, "forbidden")["detail"]


async def test_what_this_process_does_not_have_is_no_path_of_it(client: httpx.AsyncClient) -> None:
    for method, path in (("POST", "/v1/labels"), ("POST", "/v1/simulate"), ("GET", "/v1/decisions")):
        assert_problem(await client.request(method, path, headers=JSON), 404, "no-such-path")


async def test_unknown_paths_and_methods_are_problem_documents(client: httpx.AsyncClient) -> None:
    assert_problem(await client.get("/v2/nothing"), 404, "no-such-path")
    assert_problem(await client.post("/v1/risk/", headers=JSON), 404, "no-such-path")
    response = await client.get("/v1/risk")
    assert_problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"
    response = await client.delete("/v1/events")
    assert_problem(response, 405, "method-not-allowed")
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}


async def test_head_is_answered_where_get_is(client: httpx.AsyncClient) -> None:
    response = await client.head("/v1/tenant", headers=AUTH)
    assert response.status_code == 200
    assert int(response.headers["content-length"]) > 0
    assert (await client.head("/v1/events", headers=AUTH)).status_code == 422


async def test_a_traceparent_is_taken_when_it_is_one_and_made_otherwise(client: httpx.AsyncClient) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert (await client.get("/health", headers={"traceparent": trace})).headers["traceparent"] == trace
    made = (await client.get("/health", headers={"traceparent": "x"})).headers["traceparent"]
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", made)


async def test_a_defect_is_a_500_document_without_its_text(client: httpx.AsyncClient, parts: DoorParts) -> None:
    parts.directory.error = RuntimeError("secret payload")
    response = await client.get("/v1/tenant", headers=AUTH)
    assert_problem(response, 500, "unexpected")
    assert "secret" not in response.text


async def test_strangers_cannot_write_to_the_audit(client: httpx.AsyncClient, parts: DoorParts) -> None:
    await client.post("/v1/risk", content=event_body(), headers={"Content-Type": "application/json"})
    await client.post("/v1/risk", content=b"{", headers=JSON)
    parts.clock.step(1)
    await parts.refusals.flush()
    assert len(parts.publisher.messages) == 1


async def test_health_tells_what_the_process_is_and_whether_it_is_ready() -> None:
    for make in (lambda door: app_on(DoorParts(), door), health_app):
        build: Callable[[HealthDoor], Starlette] = make
        async with client_of(build(health_door(HealthReport(ready=False, reasons=("redis is away",))))) as client:
            health = await client.get("/health")
            assert health.json() == {"status": "ok", "environment": "test", "version": "0.1.0"}
            assert (await client.get("/health/live")).status_code == 200
            ready = await client.get("/health/ready")
            assert (ready.status_code, ready.json()["reasons"]) == (503, ["redis is away"])
            assert ready.json()["health"] == "down"
            metrics = await client.get("/metrics")
            assert metrics.headers["content-type"].startswith("text/plain")
            assert "riskfleet_health 2.0" in metrics.text.splitlines()
        async with client_of(build(health_door(RuntimeError()))) as client:
            assert (await client.get("/health/ready")).status_code == 503
        async with client_of(build(health_door())) as client:
            assert (await client.get("/health/ready")).status_code == 200
            assert "riskfleet_health 0.0" in (await client.get("/metrics")).text.splitlines()


async def test_a_late_fleet_leaves_a_role_ready_and_a_pause_does_not() -> None:
    up = ServerReading(answered=True, seconds=0.01)
    readings = Readings(up, up, up, {"scoring": StageReading(20_000, 400.0)})
    report = HealthReport.of(judge(replace(readings, redis=replace(up, seconds=2.0)), MonitorPolicy()))
    async with client_of(health_app(health_door(report))) as client:
        answer = await client.get("/health/ready")
        assert (answer.status_code, answer.json()["health"]) == (200, "down")
        assert [one["cause"] for one in answer.json()["findings"]] == ["stuck", "backlog", "slow-server"]
    paused = HealthReport.of(judge(replace(readings, stages={}, paused="DatabaseError"), MonitorPolicy()))
    async with client_of(health_app(health_door(paused))) as client:
        answer = await client.get("/health/ready")
        assert (answer.status_code, answer.json()["reasons"]) == (503, ["paused: DatabaseError"])


async def test_a_real_server_answers_and_stops_when_told() -> None:
    stop, bound = asyncio.Event(), asyncio.Queue[int]()
    serving = asyncio.create_task(
        serve(health_app(health_door()), "127.0.0.1", 0, stop=stop, on_bound=bound.put_nowait)
    )
    port = await bound.get()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(100):
            try:
                response = await client.get("/health")
                break
            except httpx.ConnectError:
                await asyncio.sleep(0.01)
        else:
            pytest.fail("the server never listened")
        assert response.status_code == 200
        with pytest.raises(OSError, match="in use"):
            await serve(health_app(health_door()), "127.0.0.1", port)
    stop.set()
    await asyncio.wait_for(serving, 5)


header_text = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40)


@settings(deadline=None)
@given(
    st.sampled_from(["GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS"]),
    st.sampled_from(
        ["/v1/risk", "/v1/events", "/v1/tenant", "/v1/events/", "/v1/events/batch", "/v1/labels", "/v1/decisions"]
    ).flatmap(lambda base: st.text(max_size=4).map(lambda tail: base + tail)),
    st.binary(max_size=40),
    st.dictionaries(
        st.sampled_from(
            [
                "host",
                "content-type",
                "content-length",
                "idempotency-key",
                "x-correlation-id",
                "traceparent",
                "authorization",
                "prefer",
                "ce-id",
            ]
        ),
        header_text,
    ),
    st.booleans(),
)
def test_nothing_that_a_client_sends_is_answered_with_500(
    method: str, path: str, body: bytes, headers: dict[str, str], known: bool
) -> None:
    if known:
        headers = headers | {"authorization": "Bearer rf_acme_key", "content-type": "application/json"}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": body,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
    }
    answers: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        answers.append(message)

    asyncio.run(WholeDoor().app()(scope, receive, send))
    assert answers[0]["status"] < 500
    assert b"x-correlation-id" in dict(answers[0]["headers"])
