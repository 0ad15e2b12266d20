"""The documents say what the code does: committed ones have not drifted, served ones are whole and let nothing in."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from contracts.failures import FAILURES
from contracts.identity import PERMISSIONS, Permission
from contracts.messages import decision_message
from contracts.ports import DecisionRow
from contracts.tenancy import TenantScope
from contracts.topology import Layouts, topology
from deploy.documents import DOCUMENTS, drifted, main, write
from gateway.asyncapi import asyncapi
from gateway.calls import Answer, Call, openapi, routes
from gateway.documents import REMEDIES, problems
from gateway.http import HttpPorts, ingest_calls, openapi_document
from gateway.web import ROUTER_PROBLEMS
from tests.fakes_doors import WholeDoor, health_door

ROOT = Path(__file__).resolve().parents[2]
SPEC: dict[str, Any] = json.loads(openapi_document())
CALLS = [(method, path, call) for path, methods in SPEC["paths"].items() for method, call in methods.items()]


def references(value: Any) -> Iterator[str]:
    """Every `$ref` in a document."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for held in value.values():
            yield from references(held)
    elif isinstance(value, list):
        for held in value:
            yield from references(held)


def resolved(document: Any, reference: str) -> Any:
    assert reference.startswith("#/")
    for part in reference[2:].split("/"):
        document = document[part.replace("~1", "/").replace("~0", "~")]
    return document


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(WholeDoor().app()), base_url="http://gateway") as client:
        yield client


# --- committed documents ----------------------------------------------------------------------------


def test_the_committed_documents_are_what_the_code_says() -> None:
    assert drifted() == [], "run python -m deploy.documents"


def test_a_document_that_differs_is_found_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"], tmp_path) == 1
    assert main([], tmp_path) == 0
    assert main(["--check"], tmp_path) == 0
    (tmp_path / "docs/problems.md").write_text("by hand")
    assert main(["--check"], tmp_path) == 1
    assert "docs/problems.md: differs" in capsys.readouterr().out
    assert write(tmp_path) == ["docs/problems.md"]
    assert main(["--wrong"], tmp_path) == 2


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_is_the_same_bytes_every_time(name: str) -> None:
    assert DOCUMENTS[name]() == DOCUMENTS[name]()


# --- OpenAPI ----------------------------------------------------------------------------------------


def test_every_call_of_the_public_contract_is_documented() -> None:
    wanted = {
        ("post", "/v1/risk"),
        ("post", "/v1/compliance"),
        ("post", "/v1/events"),
        ("post", "/v1/events/batch"),
        ("post", "/v1/simulate"),
        ("post", "/v1/labels"),
        ("get", "/v1/events"),
        ("get", "/v1/events/{event_id}"),
        ("get", "/v1/decisions"),
        ("get", "/v1/tenant"),
        ("get", "/health"),
        ("get", "/health/live"),
        ("get", "/health/ready"),
        ("get", "/metrics"),
        ("get", "/openapi.json"),
        ("get", "/asyncapi.json"),
        ("get", "/docs"),
        ("get", "/docs/page.css"),
        ("get", "/docs/page.js"),
        ("get", "/docs/problems"),
    }
    assert {(method, path) for method, path, _ in CALLS} == wanted


def test_the_openapi_document_refers_to_nothing_that_it_does_not_hold() -> None:
    assert SPEC["openapi"].startswith("3.1")
    for reference in references(SPEC):
        assert resolved(SPEC, reference), reference
    operations = [call["operationId"] for _, _, call in CALLS]
    assert len(operations) == len(set(operations))
    for _, path, call in CALLS:
        named = {p["name"] for p in call.get("parameters", []) if p["in"] == "path"}
        assert named == set(re.findall(r"{(\w+)}", path))


def test_every_call_below_v1_needs_a_permission_that_some_role_has_and_the_others_need_none() -> None:
    for _, path, call in CALLS:
        if path.startswith("/v1/"):
            permission = Permission(call["x-permission"])
            assert any(permission in held for held in PERMISSIONS.values())
            assert call["security"] == [{"bearer": []}]
            assert {"401", "403", "503"} <= set(call["responses"])
        else:
            assert "security" not in call


def test_a_call_that_this_process_cannot_answer_is_neither_routed_nor_documented() -> None:
    whole = WholeDoor()
    bare = whole.parts
    ports = HttpPorts(bare.directory, bare.directory, bare.ledger, bare.store, bare.ids)
    calls = ingest_calls(bare.intake, ports, bare.refusals, health_door(), layouts=Layouts.first(4))
    assert not {call.path for call in calls} & {"/v1/labels", "/v1/simulate", "/v1/decisions"}
    document = openapi("t", "1", "a", calls)
    assert "Prefer" not in json.dumps(document)
    assert "LabelBody" not in document["components"]["schemas"]


async def _nothing(_: Any) -> Any:
    raise NotImplementedError


def test_a_table_that_contradicts_itself_is_refused() -> None:
    call = Call("GET", "/a", "getA", "", _nothing, None, {200: Answer("")})
    with pytest.raises(ValueError, match="twice"):
        routes([call, Call("GET", "/a", "getB", "", _nothing, None, {200: Answer("")})])
    with pytest.raises(ValueError, match="one operation"):
        routes([call, Call("GET", "/b", "getA", "", _nothing, None, {200: Answer("")})])


# --- AsyncAPI ---------------------------------------------------------------------------------------


def test_the_asyncapi_document_has_what_version_3_requires() -> None:
    document = asyncapi("1.0.0")
    assert document["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= set(document["info"])
    for server in document["servers"].values():
        assert {"host", "protocol"} <= set(server)
        assert set(re.findall(r"{(\w+)}", server["host"])) == set(server["variables"])
    for name, channel in document["channels"].items():
        assert set(re.findall(r"{(\w+)}", channel["address"])) == set(channel["parameters"]), name
        assert channel["messages"]
        assert channel["bindings"]["amqp"]["is"] == "routingKey"
    for operation in document["operations"].values():
        assert operation["action"] in ("send", "receive")
        assert resolved(document, operation["channel"]["$ref"]) in document["channels"].values()
    for message in document["components"]["messages"].values():
        assert message["headers"]["type"] == "object"
        assert resolved(document, message["payload"]["$ref"])
    for reference in references(document):
        assert resolved(document, reference), reference


def test_the_channels_are_exchanges_of_the_topology() -> None:
    described = {
        channel["bindings"]["amqp"]["exchange"]["name"]: channel["bindings"]["amqp"]["exchange"]["type"]
        for channel in asyncapi("1")["channels"].values()
    }
    declared = {exchange.name: exchange.type for exchange in topology(1).exchanges}
    assert described.items() <= declared.items()


async def test_a_decision_message_has_the_headers_that_the_document_requires() -> None:
    row = DecisionRow("", 2, "APPROVED", b'{"event_id": "e"}', b"")
    message = decision_message(TenantScope("acme"), "risk", row, "corr", "00-trace")
    schema = asyncapi("1")["components"]["messages"]["decision"]["headers"]
    assert set(message.headers) == set(schema["properties"])
    assert set(schema["required"]) <= set(message.headers)


# --- problems ---------------------------------------------------------------------------------------


def test_every_problem_says_what_it_means_and_what_to_do() -> None:
    rows = problems()
    names = {row.problem for row in FAILURES.values()} | {name for name, _ in ROUTER_PROBLEMS.values()}
    assert {row.name for row in rows} == names == set(REMEDIES)
    assert all(row.meaning and row.remedy for row in rows)


# --- what is served ---------------------------------------------------------------------------------


async def test_the_served_documents_are_the_committed_ones(client: httpx.AsyncClient) -> None:
    for name in ("openapi.json", "asyncapi.json"):
        response = await client.get(f"/{name}")
        assert response.headers["content-type"] == "application/json"
        assert response.content == (ROOT / "docs" / name).read_bytes()


async def test_the_page_loads_nothing_from_elsewhere_and_runs_no_inline_script(client: httpx.AsyncClient) -> None:
    for path in ("/docs", "/docs/problems"):
        response = await client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        page = response.text
        for source in re.findall(r'(?:src|href)="([^"]+)"', page):
            assert source.startswith("/"), source
            assert not source.startswith("//")
            assert (await client.get(source)).status_code == 200
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|style=", page)
        assert "</table>" in page or "/docs/page.js" in page
    script = (await client.get("/docs/page.js")).text
    assert "innerHTML" not in script
    assert re.findall(r"fetch\(([^)]*)\)", script) == ['"/openapi.json"']
    assert sum(path.stat().st_size for path in (ROOT / "gateway/pages").iterdir()) < 15_000


async def test_every_problem_has_an_anchor(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs/problems")).text
    assert all(f'id="{row.name}"' in page and row.type in page for row in problems())
