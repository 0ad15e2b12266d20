"""What the HTTP door takes in beside one plain event: batches, CloudEvents, labels, try-outs, and callers that wait."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import orjson
import pytest

from contracts.codec import Entry
from contracts.events import canonical_json, event_id_of
from contracts.lifecycle import Status
from contracts.outcomes import Outcome
from contracts.ports import Confirm, PauseNotice
from contracts.tenancy import TenantScope
from contracts.topology import LABELS_QUEUE
from gateway.health import serve
from gateway.intake import item_identity
from gateway.submitting import BatchView, Receipt
from gateway.waiting import WaitPolicy
from tests.fakes import event_body
from tests.fakes_doors import WholeDoor, settle

ACME = TenantScope("acme")
AUTH = {"Authorization": "Bearer rf_acme_key"}
JSON = AUTH | {"Content-Type": "application/json"}
ORDER = event_id_of(ACME, "order-1")


def typed(media_type: str) -> dict[str, str]:
    return AUTH | {"Content-Type": media_type}


NDJSON, CSV = typed("application/x-ndjson"), typed("text/csv")
CLOUDEVENT, CLOUDEVENTS = typed("application/cloudevents+json"), typed("application/cloudevents-batch+json")


@pytest.fixture
def whole() -> WholeDoor:
    return WholeDoor()


@pytest.fixture
async def client(whole: WholeDoor) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(whole.app()), base_url="http://gateway") as client:
        yield client


def assert_problem(response: httpx.Response, status: int, problem: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["type"] == f"urn:riskfleet:problem:{problem}"
    return document


def results_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The results of a batch, in their order, checked against the documented model."""
    assert response.status_code == 200, response.text
    BatchView.model_validate_json(response.content)
    results: list[dict[str, Any]] = response.json()["results"]
    assert [result["index"] for result in results] == list(range(len(results)))
    for result in results:
        assert (result["status"] >= 400) is ("problem" in result)
        if "problem" in result:
            assert result["problem"]["status"] == result["status"]
    return results


def array(*items: bytes) -> bytes:
    return b"[" + b",".join(items) + b"]"


def published(whole: WholeDoor) -> list[Entry]:
    return whole.parts.publisher.entries()


# --- batches ----------------------------------------------------------------------------------------


async def test_a_bad_item_never_harms_its_neighbours(client: httpx.AsyncClient, whole: WholeDoor) -> None:
    items = (event_body(id="a"), b'{"a":1,"a":1}', event_body(id="b", surprise=1), event_body(id="c"), b"NaN", b'"x"')
    response = await client.post("/v1/events/batch", content=array(*items), headers=JSON)
    results = results_of(response)
    assert [result["status"] for result in results] == [202, 400, 422, 202, 400, 422]
    assert results[0]["event_id"] == event_id_of(ACME, "a")
    assert (results[3]["id"], results[3]["kind"], results[3]["replayed"]) == ("c", "risk", False)
    assert results[2]["problem"]["errors"][0]["pointer"] == "/surprise"
    assert len(published(whole)) == 2


@pytest.mark.parametrize("headers", [JSON, NDJSON, CLOUDEVENTS])
async def test_a_batch_is_read_in_each_of_its_forms(
    client: httpx.AsyncClient, whole: WholeDoor, headers: dict[str, str]
) -> None:
    events = [event_body(id=f"e-{n}") for n in range(3)]
    wrapped = [
        canonical_json(
            {"specversion": "1.0", "id": str(n), "source": "/s", "type": "payment.card", "data": orjson.loads(event)}
        )
        for n, event in enumerate(events)
    ]
    body = {id(JSON): array(*events), id(NDJSON): b"\n".join(events), id(CLOUDEVENTS): array(*wrapped)}[id(headers)]
    results = results_of(await client.post("/v1/events/batch", content=body, headers=headers))
    assert [(result["status"], result["id"]) for result in results] == [(202, f"e-{n}") for n in range(3)]
    assert len(published(whole)) == 3


async def test_a_csv_file_is_mapped_by_the_query(client: httpx.AsyncClient) -> None:
    maps = ("id=no", "type=type", "occurred_at=at", "subject.type=who", "subject.id=name")
    body = (
        b"no,type,at,who,name\r\n7,login,2026-01-31T11:59:59Z,customer,c-1\r\n8,login,yesterday,customer,c-2\r\n9,x\r\n"
    )
    query = {"map": maps, "kind": "risk"}
    results = results_of(await client.post("/v1/events/batch", params=query, content=body, headers=CSV))
    assert [result["status"] for result in results] == [202, 422, 422]
    assert (results[0]["id"], results[0]["kind"]) == ("7", "risk")


@pytest.mark.parametrize(
    ("query", "body", "headers", "status", "problem"),
    [
        ("", b"", JSON, 400, "malformed-json"),
        ("", b"{}", JSON, 400, "malformed-json"),
        ("", b"[]", JSON, 422, "invalid-event"),
        ("", b"[", JSON, 400, "malformed-json"),
        ("", b"[1,]", JSON, 400, "malformed-json"),
        ("", b"\n\n", NDJSON, 422, "invalid-event"),
        ("", b"a,b\n1,2\n", CSV, 422, "invalid-event"),
        ("?map=id", b"a,b\n1,2\n", CSV, 422, "invalid-event"),
        ("?map=id=missing", b"a,b\n1,2\n", CSV, 422, "invalid-event"),
        ("?map=id=a&map=id=b", b"a,b\n1,2\n", CSV, 422, "invalid-event"),
        ("?map=id=a", b'a,b\n"1,2\n', CSV, 400, "malformed-json"),
        ("?kind=other", b"[1]", JSON, 422, "invalid-metadata"),
        ("?kind=risk&kind=risk", b"[1]", JSON, 422, "invalid-metadata"),
        ("", array(event_body()), typed("text/plain"), 415, "unsupported-media-type"),
        ("", array(event_body()), typed("application/json; charset=latin-1"), 415, "unsupported-media-type"),
        ("", array(event_body()), CLOUDEVENT, 415, "unsupported-media-type"),
        ("", array(event_body()), AUTH, 415, "unsupported-media-type"),
        ("", array(*[b"1"] * 1_001), JSON, 422, "invalid-event"),
        ("", b"1\n" * 1_001, NDJSON, 422, "invalid-event"),
        ("?map=id=a", b"a\n" + b"1\n" * 1_001, CSV, 422, "invalid-event"),
        ("", b" " * (5 * 1024 * 1024 + 1), JSON, 413, "body-too-large"),
    ],
)
async def test_a_batch_whose_items_cannot_be_told_apart_is_refused_whole(
    client: httpx.AsyncClient,
    whole: WholeDoor,
    query: str,
    body: bytes,
    headers: dict[str, str],
    status: int,
    problem: str,
) -> None:
    response = await client.post(f"/v1/events/batch{query}", content=body, headers=headers)
    assert_problem(response, status, problem)
    assert whole.parts.publisher.messages == []
    assert whole.parts.telemetry.count("riskfleet_refusals_total", door="http", problem=problem) == 1


async def test_a_thousand_events_are_one_batch(client: httpx.AsyncClient) -> None:
    body = array(*(event_body(id=f"e-{n}") for n in range(1_000)))
    results = results_of(await client.post("/v1/events/batch", content=body, headers=JSON))
    assert {result["status"] for result in results} == {202}
    assert len({result["event_id"] for result in results}) == 1_000


async def test_a_batch_sent_again_with_its_key_is_a_repeat(client: httpx.AsyncClient, whole: WholeDoor) -> None:
    body = array(event_body(id=None), event_body(id=None))
    headers = JSON | {"Idempotency-Key": "batch-1"}
    first = results_of(await client.post("/v1/events/batch", content=body, headers=headers))
    again = results_of(await client.post("/v1/events/batch", content=body, headers=headers))
    assert [r["event_id"] for r in first] == [event_id_of(ACME, item_identity("batch-1", n)) for n in (0, 1)]
    assert [r["event_id"] for r in again] == [r["event_id"] for r in first]
    assert [r["replayed"] for r in again] == [True, True]
    whole.parts.decided(first[0]["event_id"], ACME)
    decided = results_of(await client.post("/v1/events/batch", content=body, headers=headers))
    assert [r["status"] for r in decided] == [200, 202]
    assert decided[0]["decision"]["outcome"] == "APPROVED"


async def test_an_item_without_identity_in_a_batch_without_key_is_refused(client: httpx.AsyncClient) -> None:
    results = results_of(await client.post("/v1/events/batch", content=array(event_body(id=None)), headers=JSON))
    assert (results[0]["status"], results[0]["problem"]["errors"][0]["pointer"]) == (422, "/id")


async def test_an_item_that_names_another_tenant_is_403(client: httpx.AsyncClient) -> None:
    body = array(event_body(tenant_id="globex"), event_body())
    results = results_of(await client.post("/v1/events/batch", content=body, headers=JSON))
    assert [result["status"] for result in results] == [403, 202]


async def test_an_item_that_was_not_confirmed_is_503_and_named(client: httpx.AsyncClient, whole: WholeDoor) -> None:
    whole.parts.publisher.answers = [Confirm.UNKNOWN]
    body = array(event_body(id="a"), event_body(id="b"))
    results = results_of(await client.post("/v1/events/batch", content=body, headers=JSON))
    assert [result["status"] for result in results] == [503, 503]  # one carrier, one confirm
    assert all(result["event_id"] for result in results)
    results = results_of(await client.post("/v1/events/batch", content=body, headers=JSON))
    assert [result["status"] for result in results] == [202, 202]


# --- CloudEvents ------------------------------------------------------------------------------------


def cloudevent(**changes: object) -> bytes:
    document = {"specversion": "1.0", "id": "7", "source": "/shop", "type": "payment.card"} | changes
    return canonical_json({name: value for name, value in document.items() if value is not None})


async def test_a_structured_cloudevent_is_an_event(client: httpx.AsyncClient) -> None:
    body = cloudevent(data=orjson.loads(event_body()), correlationid="corr-ce")
    response = await client.post("/v1/risk", content=body, headers=CLOUDEVENT)
    assert (response.status_code, response.json()["event_id"]) == (202, ORDER)
    assert response.json()["correlation_id"] == response.headers["x-correlation-id"] == "corr-ce"
    encoded = cloudevent(data_base64=base64.b64encode(event_body()).decode())
    again = await client.post("/v1/risk", content=encoded, headers=CLOUDEVENT)
    assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")


async def test_a_binary_cloudevent_is_an_event_with_the_envelopes_identity(client: httpx.AsyncClient) -> None:
    headers = JSON | {"ce-specversion": "1.0", "ce-id": "7", "ce-source": "/shop", "ce-type": "payment.card"}
    response = await client.post("/v1/risk", content=event_body(id=None, type=None), headers=headers)
    assert (response.status_code, response.json()["id"]) == (202, "/shop|7")


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", CLOUDEVENT, 400),
        (b"[]", CLOUDEVENT, 422),
        (cloudevent(), CLOUDEVENT, 422),
        (cloudevent(data=7), CLOUDEVENT, 422),
        (cloudevent(data={}, specversion="0.3"), CLOUDEVENT, 422),
        (cloudevent(data_base64="%"), CLOUDEVENT, 400),
        (event_body(), JSON | {"ce-id": "7"}, 422),
        (event_body(), JSON | {"ce-id": "%ff", "ce-source": "/s"}, 422),
    ],
)
async def test_a_broken_cloudevent_is_a_problem_document(
    client: httpx.AsyncClient, whole: WholeDoor, body: bytes, headers: dict[str, str], status: int
) -> None:
    response = await client.post("/v1/risk", content=body, headers=headers)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert published(whole) == []


# --- labels -----------------------------------------------------------------------------------------


def label_body(**changes: object) -> bytes:
    document = {"event": "order-1", "label": "chargeback", "source": "psp", "effective_at": "2026-02-20T00:00:00Z"}
    return canonical_json({name: value for name, value in (document | changes).items() if value is not None})


async def test_a_label_is_accepted_before_its_event_and_names_it(client: httpx.AsyncClient, whole: WholeDoor) -> None:
    response = await client.post("/v1/labels", content=label_body(), headers=JSON | {"X-Correlation-ID": "c"})
    assert response.status_code == 202
    document = response.json()
    assert (document["event_id"], document["correlation_id"]) == (ORDER, "c")
    (message,) = whole.parts.publisher.messages
    assert (message.routing_key, message.message_id) == (LABELS_QUEUE, f"label:{document['label_id']}")


@pytest.mark.parametrize(
    ("body", "headers", "status", "problem"),
    [
        (b"{", JSON, 400, "malformed-json"),
        (b"[]", JSON, 422, "invalid-event"),
        (label_body(label="unknown"), JSON, 422, "invalid-event"),
        (label_body(event_id=ORDER), JSON, 422, "invalid-event"),
        (label_body(event=None), JSON, 422, "invalid-event"),
        (label_body(tenant_id="globex"), JSON, 403, "foreign-tenant"),
        (label_body(), typed("text/csv"), 415, "unsupported-media-type"),
        (b" " * 65_537, JSON, 413, "body-too-large"),
    ],
)
async def test_a_label_that_cannot_be_used_is_a_problem_document(
    client: httpx.AsyncClient, whole: WholeDoor, body: bytes, headers: dict[str, str], status: int, problem: str
) -> None:
    assert_problem(await client.post("/v1/labels", content=body, headers=headers), status, problem)
    assert whole.parts.publisher.messages == []


async def test_a_label_without_a_confirm_is_503(client: httpx.AsyncClient, whole: WholeDoor) -> None:
    whole.parts.publisher.answers = [Confirm.UNKNOWN]
    document = assert_problem(
        await client.post("/v1/labels", content=label_body(), headers=JSON), 503, "not-known-to-be-accepted"
    )
    assert document["event_id"] == ORDER


# --- trying out -------------------------------------------------------------------------------------


async def test_a_simulation_decides_and_leaves_nothing_behind(client: httpx.AsyncClient, whole: WholeDoor) -> None:
    response = await client.post("/v1/simulate", content=event_body(), headers=JSON)
    assert (response.status_code, response.json()["outcome"]) == (200, "APPROVED")
    assert whole.parts.publisher.messages == []
    assert whole.parts.store.states == {}


@pytest.mark.parametrize(
    ("body", "headers", "status", "problem"),
    [
        (b"{", JSON, 400, "malformed-json"),
        (event_body(kind=None), JSON, 422, "invalid-event"),
        (event_body(tenant_id="globex"), JSON, 403, "foreign-tenant"),
        (event_body(), typed("text/csv"), 415, "unsupported-media-type"),
        (b" " * 65_537, JSON, 413, "body-too-large"),
    ],
)
async def test_a_simulation_of_what_is_no_event_is_a_problem_document(
    client: httpx.AsyncClient, body: bytes, headers: dict[str, str], status: int, problem: str
) -> None:
    assert_problem(await client.post("/v1/simulate", content=body, headers=headers), status, problem)


async def test_too_many_simulations_are_told_when_to_come_back(client: httpx.AsyncClient, whole: WholeDoor) -> None:
    whole.simulator.full = True
    response = await client.post("/v1/simulate", content=event_body(), headers=JSON)
    assert_problem(response, 429, "limit-exceeded")
    assert int(response.headers["retry-after"]) >= 1


# --- waiting ----------------------------------------------------------------------------------------

WAIT = JSON | {"Prefer": "wait=10"}


async def begun(client: httpx.AsyncClient, body: bytes, headers: dict[str, str]) -> asyncio.Task[httpx.Response]:
    task = asyncio.ensure_future(client.post("/v1/risk", content=body, headers=headers))
    await settle()
    return task


def reply_to(whole: WholeDoor) -> str | None:
    entry = published(whole)[-1]
    assert isinstance(entry, Entry)
    return entry.header.reply_to


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (event_body(), WAIT),
        (event_body(id=None), WAIT),
        (event_body(id=None), WAIT | {"Idempotency-Key": "k"}),
        (event_body(kind=None), WAIT),
        (cloudevent(data=orjson.loads(event_body(id=None))), WAIT | CLOUDEVENT),
        (event_body(id=None), WAIT | {"ce-specversion": "1.0", "ce-id": "7", "ce-source": "/s", "ce-type": "login"}),
    ],
)
async def test_whoever_waits_gets_the_decision_as_soon_as_its_copy_arrives(
    client: httpx.AsyncClient, whole: WholeDoor, body: bytes, headers: dict[str, str]
) -> None:
    task = await begun(client, body, headers)
    assert not task.done()
    assert reply_to(whole) == whole.replies.address
    ((_, event_id),) = whole.parts.store.states
    assert list(whole.replies.waits) == [event_id]
    row = whole.parts.decided(event_id, ACME, Outcome.REQUIRE_APPROVAL)
    whole.replies.arrive(event_id, row.decision)
    await settle()
    response = await asyncio.wait_for(task, 5)
    assert response.status_code == 200
    assert response.headers["preference-applied"] == "wait=10"
    assert response.headers["location"] == f"/v1/events/{event_id}"
    assert response.json()["decision"] == json.loads(row.decision)
    assert response.json()["status"] == "awaiting_approval"
    Receipt.model_validate_json(response.content)


async def test_a_lost_copy_costs_a_second(client: httpx.AsyncClient, whole: WholeDoor) -> None:
    task = await begun(client, event_body(), WAIT)
    whole.parts.decided(ORDER, ACME)
    await settle()
    assert not task.done()
    await whole.time.step(1)
    assert (await asyncio.wait_for(task, 5)).status_code == 200


async def test_at_the_deadline_the_answer_is_202(client: httpx.AsyncClient, whole: WholeDoor) -> None:
    task = await begun(client, event_body(), JSON | {"Prefer": "wait=2"})
    await whole.time.step(1)
    await whole.time.step(1)
    response = await asyncio.wait_for(task, 5)
    assert (response.status_code, response.headers["preference-applied"]) == (202, "wait=2")
    assert response.json()["status"] == "received"


async def test_a_longer_wait_is_clamped_and_says_so(client: httpx.AsyncClient, whole: WholeDoor) -> None:
    task = await begun(client, event_body(), JSON | {"Prefer": "wait=3600"})
    for _ in range(30):
        await whole.time.step(1)
    response = await asyncio.wait_for(task, 5)
    assert (response.status_code, response.headers["preference-applied"]) == (202, "wait=30")


@pytest.mark.parametrize("prefer", ["wait=0", "wait=soon", "wait", "respond-async", "=", 'wait="'])
async def test_a_preference_that_cannot_be_honoured_is_ignored(
    client: httpx.AsyncClient, whole: WholeDoor, prefer: str
) -> None:
    response = await client.post("/v1/risk", content=event_body(), headers=JSON | {"Prefer": prefer})
    assert response.status_code == 202
    assert "preference-applied" not in response.headers
    assert reply_to(whole) is None


async def test_beyond_the_limit_of_waiters_there_is_a_plain_202() -> None:
    whole = WholeDoor(policy=WaitPolicy(max_waiters=1))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(whole.app()), base_url="http://gateway") as client:
        first = await begun(client, event_body(id="a"), WAIT)
        second = await client.post("/v1/risk", content=event_body(id="b"), headers=WAIT)
        assert second.status_code == 202
        assert "preference-applied" not in second.headers
        assert not first.done()
        whole.stopping.set()
        assert (await asyncio.wait_for(first, 5)).status_code == 202


@pytest.mark.parametrize(
    ("body", "status"), [(b"{", 400), (event_body(surprise=1), 422), (event_body(tenant_id="globex"), 403)]
)
async def test_what_is_refused_is_not_waited_for(
    client: httpx.AsyncClient, whole: WholeDoor, body: bytes, status: int
) -> None:
    response = await asyncio.wait_for(client.post("/v1/risk", content=body, headers=WAIT), 5)
    assert response.status_code == status
    assert whole.waiting.open == 0
    assert all(future.done() for future in whole.replies.waits.values())


async def test_a_repeat_of_a_decided_event_waits_for_nothing(client: httpx.AsyncClient, whole: WholeDoor) -> None:
    await client.post("/v1/risk", content=event_body(), headers=JSON)
    whole.parts.decided(ORDER, ACME)
    response = await asyncio.wait_for(client.post("/v1/risk", content=event_body(), headers=WAIT), 5)
    assert (response.status_code, response.headers["idempotency-replayed"]) == (200, "true")


async def test_a_repeat_of_an_event_under_way_waits_for_it(client: httpx.AsyncClient, whole: WholeDoor) -> None:
    await client.post("/v1/risk", content=event_body(), headers=JSON)
    stored = whole.parts.store.states[ACME, ORDER].stored
    whole.parts.store.move_on(ACME, ORDER, 2, Status.VALIDATED, stored)
    task = await begun(client, event_body(), WAIT)
    whole.parts.decided(ORDER, ACME)
    await whole.time.step(1)
    response = await asyncio.wait_for(task, 5)
    assert (response.status_code, response.headers["idempotency-replayed"]) == (200, "true")


async def test_nobody_receives_the_decision_about_another_body(client: httpx.AsyncClient, whole: WholeDoor) -> None:
    await client.post("/v1/risk", content=event_body(), headers=JSON)
    row = whole.parts.decided(ORDER, ACME)
    whole.parts.store.states.clear()  # Redis forgets who owns the identity
    task = await begun(client, event_body(type="login"), WAIT)
    whole.replies.arrive(ORDER, row.decision)
    document = assert_problem(await asyncio.wait_for(task, 5), 422, "idempotency-conflict")
    assert document["event_id"] == ORDER


async def eventually(holds: Callable[[], bool]) -> None:
    for _ in range(400):
        if holds():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it never came true")


async def connected(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a server that is bound, and may not listen yet."""
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            return await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.01)
    pytest.fail("the server never listened")


async def test_over_a_real_connection_a_wait_ends_with_its_caller_and_with_the_process(whole: WholeDoor) -> None:
    bound = asyncio.Queue[int]()
    serving = asyncio.create_task(
        serve(whole.app(), "127.0.0.1", 0, stop=whole.stopping, on_bound=bound.put_nowait), name="serving"
    )
    port = await bound.get()
    request = b"POST /v1/risk HTTP/1.1\r\nHost: gateway\r\nPrefer: wait=30\r\nAuthorization: Bearer rf_acme_key\r\n"
    request += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    try:
        async with asyncio.timeout(5):
            writers = []
            for name in ("a", "b"):
                reader, writer = await connected(port)
                writer.write(request % (len(event_body(id=name)), event_body(id=name)))
                writers.append((reader, writer))
            await eventually(lambda: whole.waiting.open == 2)
            writers[0][1].close()
            await eventually(lambda: whole.waiting.open == 1)
            whole.stopping.set()
            assert (await writers[1][0].readline()).startswith(b"HTTP/1.1 202")
            await serving
            writers[1][1].close()
    finally:
        serving.cancel()


async def test_a_caller_that_goes_away_ends_its_wait(whole: WholeDoor) -> None:
    gone = asyncio.Event()
    body = event_body()
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/risk",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in WAIT.items()],
    }
    task = asyncio.ensure_future(whole.app()(scope, receive, send))
    await settle()
    assert (whole.waiting.open, task.done()) == (1, False)
    gone.set()
    await asyncio.wait_for(task, 5)
    assert whole.waiting.open == 0
    assert len(published(whole)) == 1


# --- a paused tenant ------------------------------------------------------------------------------------


class PausedDoors:
    """The port Pauses: every tenant is paused, for so many seconds."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    async def doors(self, scopes: Sequence[TenantScope]) -> Sequence[PauseNotice | None]:
        return [PauseNotice("not for the tenant's eyes", self.seconds)] * len(scopes)

    async def stage(self, stage: str) -> PauseNotice | None:
        return None


@pytest.mark.parametrize(("seconds", "retry_after"), [(None, "30"), (41.2, "42"), (0.1, "1")])
@pytest.mark.parametrize("path", ["/v1/risk", "/v1/events", "/v1/events/batch"])
async def test_a_paused_tenant_is_told_when_to_come_back_and_nothing_is_taken_in(
    whole: WholeDoor, path: str, seconds: float | None, retry_after: str
) -> None:
    whole.ports = replace(whole.ports, pauses=PausedDoors(seconds))
    body = b"[" + event_body() + b"]" if path.endswith("batch") else event_body()
    transport = httpx.ASGITransport(whole.app())
    async with httpx.AsyncClient(transport=transport, base_url="http://door", headers=AUTH) as client:
        response = await client.post(path, content=body, headers=JSON)
        label = await client.post("/v1/labels", content=b"{}", headers=JSON)
    assert_problem(response, 503, "tenant-paused")
    assert response.headers["retry-after"] == retry_after
    assert "eyes" not in response.text
    assert whole.parts.store.states == {}
    assert label.status_code == 422, "labels are about events that were taken in before"
