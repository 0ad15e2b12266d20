"""The gateway answers as its OpenAPI document says, to what the document allows and to what it forbids.

In process, on the fakes of the doors. `RISKFLEET_TEST_EXAMPLES` raises the number of examples per call and mode;
the seed is fixed and printed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import orjson
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks
from schemathesis.python import asgi

from contracts.events import canonical_json, event_id_of
from contracts.tenancy import TenantScope
from gateway.http import openapi_document
from tests.fakes import event_body
from tests.fakes_doors import WholeDoor

pytestmark = pytest.mark.conformance

EXAMPLES = int(os.environ.get("RISKFLEET_TEST_EXAMPLES", "8"))
SEED = int(os.environ.get("RISKFLEET_TEST_SEED", "20260131"))
ACME = TenantScope("acme")
ORDER = event_id_of(ACME, "order-1")
AUTH = {"Authorization": "Bearer rf_acme_key"}
JSON = AUTH | {"Content-Type": "application/json"}
CHECKS: list[Any] = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
# What the schema cannot say of a moment: an offset, and a year that anybody can mean.
schemathesis.openapi.format(
    "date-time",
    st.datetimes(datetime(1900, 1, 2), datetime(2199, 12, 30), timezones=st.just(UTC)).map(datetime.isoformat),  # noqa: DTZ001 - bounds
)
DOCUMENT: dict[str, Any] = orjson.loads(openapi_document())
OPERATIONS = [(path, method.upper()) for path, methods in DOCUMENT["paths"].items() for method in methods]


@pytest.fixture(scope="module")
def whole() -> WholeDoor:
    """A gateway with an event that is decided and one that is under way; its waits end at once."""
    return WholeDoor(time_passes=True)


@pytest.fixture(scope="module")
def client(whole: WholeDoor) -> Iterator[asgi.ASGIClient]:
    app: Any = whole.app()
    with asgi.get_client(app) as client:
        for name in ("order-1", "order-2"):
            assert client.post("/v1/risk", data=event_body(id=name), headers=JSON).status_code == 202
        whole.feed.decisions[ACME] = [whole.parts.decided(ORDER, ACME).decision]
        yield client


@pytest.fixture(scope="module")
def schema(whole: WholeDoor) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", whole.app())


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(
    ("path", "method"), [o for o in OPERATIONS if o[0].startswith("/v1/") and o[0] != "/v1/tenant"]
)
def test_every_answer_is_one_that_the_document_names(
    schema: Any, client: asgi.ASGIClient, path: str, method: str, mode: GenerationMode
) -> None:
    operation = schema[path][method]

    @seed(SEED)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def conforms(case: Any) -> None:
        response = case.call(session=client, headers=AUTH)
        case.validate_response(response, checks=CHECKS)

    print(f"{method} {path}: seed {SEED}, {EXAMPLES} examples, {mode}")  # noqa: T201 - shown with a failure
    conforms()


async def test_every_documented_success_is_answered_and_conforms(schema: Any) -> None:
    """What random examples cannot find by themselves: known events, decisions, and each form of a body."""
    whole = WholeDoor(time_passes=True)
    event, batch = event_body(), b"[" + event_body(id="b-1") + b",{}]"
    wrapped = {
        "specversion": "1.0",
        "id": "1",
        "source": "/s",
        "type": "login",
        "data": orjson.loads(event_body(id="c")),
    }
    label = canonical_json({"event": "x", "label": "cleared", "source": "s", "effective_at": "2026-01-31T00:00:00Z"})
    compliance = event_body(id="d", kind="compliance", regulatory_flags=[])
    ndjson, csv = JSON | {"Content-Type": "application/x-ndjson"}, JSON | {"Content-Type": "text/csv"}
    structured = JSON | {"Content-Type": "application/cloudevents+json"}
    batched = JSON | {"Content-Type": "application/cloudevents-batch+json"}
    requests: list[tuple[str, str, str, bytes, dict[str, str], int]] = [
        ("POST", "/v1/risk", "", event, JSON, 202),
        ("POST", "/v1/risk", "", event, JSON | {"Prefer": "wait=1"}, 202),
        ("POST", "/v1/risk", "", canonical_json(wrapped), structured, 202),
        ("POST", "/v1/compliance", "", compliance, JSON, 202),
        ("POST", "/v1/events", "", event_body(id="e"), JSON, 202),
        ("POST", "/v1/events/batch", "", batch, JSON, 200),
        ("POST", "/v1/events/batch", "", event_body(id="f") + b"\n", ndjson, 200),
        ("POST", "/v1/events/batch", "?map=id=a&kind=risk", b"a\n1\n", csv, 200),
        ("POST", "/v1/events/batch", "", b"[" + canonical_json(wrapped) + b"]", batched, 200),
        ("POST", "/v1/simulate", "", event, JSON, 200),
        ("POST", "/v1/labels", "", label, JSON, 202),
        ("GET", "/v1/events/{event_id}", "", b"", AUTH, 200),
        ("GET", "/v1/events", "?id=order-1", b"", AUTH, 200),
        ("GET", "/v1/tenant", "", b"", AUTH, 200),
        ("GET", "/v1/decisions", "", b"", AUTH, 200),
        *(("GET", path, "", b"", {}, 200) for path, _ in OPERATIONS if not path.startswith("/v1/")),
    ]
    covered = set()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(whole.app()), base_url="http://gateway") as client:

        async def walk(*, decided: bool) -> None:
            for method, path, query, body, headers, status in requests:
                url = path.replace("{event_id}", ORDER) + query
                response = await client.request(method, url, content=body, headers=headers)
                wanted = 200 if decided and path == "/v1/risk" and body == event else status
                assert response.status_code == wanted, (url, response.text)
                schema[path][method].validate_response(response)
                covered.add((method, path, response.status_code))

        await walk(decided=False)
        whole.feed.decisions[ACME] = [whole.parts.decided(ORDER, ACME).decision]
        await walk(decided=True)
    documented = {
        (method.upper(), path, int(status))
        for path, methods in DOCUMENT["paths"].items()
        for method, call in methods.items()
        for status in call["responses"]
        if int(status) < 300
    }
    same_endpoint = {("POST", path, 200) for path in ("/v1/compliance", "/v1/events")}  # as /v1/risk
    assert documented - covered == same_endpoint
