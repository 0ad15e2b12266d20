"""The gate in front of a running fleet: people with passwords, a change seen within seconds, and nothing decided on a
mixture; `control` killed between commit and publish; and every command in the audit.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pika
import pytest

from contracts.events import event_id_of
from contracts.identity import Grant, Principal, Role
from contracts.topology import Layouts
from deploy import stream
from deploy.runtime import SystemClock
from governance.postgres import create_engine
from governance.postgres.approvals import Approvals
from tests.fakes import RecordingTelemetry
from tests.integration.bad_inputs import good_event
from tests.integration.fleet_fixture import RunningFleet, eventually, show, some_events

pytestmark = pytest.mark.integration

DEFAULTS = Path(__file__).resolve().parents[2] / "governance" / "defaults"
SEEN_WITHIN_S = 2.0
QUEUE = "up.{}.gate"


class Operator:
    """A person at the operator API."""

    def __init__(self, url: str, token: str) -> None:
        self.client = httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30)

    async def call(
        self, method: str, path: str, body: Any = None, want: int | tuple[int, ...] = (200, 201, 204)
    ) -> Any:
        answer = await self.client.request(method, path, json=body)
        wanted = (want,) if isinstance(want, int) else want
        assert answer.status_code in wanted, (method, path, answer.status_code, answer.text[:500])
        return answer.json() if answer.content else None


async def login(fleet: RunningFleet, user: str, password: str) -> Operator:
    url = f"http://{fleet.settings.control_host}:{fleet.settings.control_port}"
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        answer = await client.post("/ops/v1/login", json={"user": user, "password": password})
        assert answer.status_code == 200, answer.text
    return Operator(url, answer.json()["token"])


@pytest.fixture
async def people(fleet: RunningFleet) -> AsyncIterator[dict[str, Operator]]:
    """An administrator, and for tenant acme an author, an approver and a second one."""
    tag, scope = f"{time.time_ns():x}"[-8:], fleet.scope("acme")
    made: dict[str, Operator] = {}
    await ready(fleet)
    admin = fleet.admin
    made["admin"] = await login(fleet, admin.user, admin.password)
    for name, role in (("ana", "ANALYST"), ("ben", "APPROVER"), ("bea", "APPROVER")):
        user, password = f"{name}-{tag}", f"a long password of {name} {tag}"
        await made["admin"].call("POST", "/ops/v1/users", {"user": user, "name": name, "password": password})
        grant = {"tenant": scope.tenant_id, "role": role, "reason": "a test of the gate"}
        await made["admin"].call("PUT", f"/ops/v1/users/{user}/grants", grant)
        made[name] = await login(fleet, user, password)
    yield made
    for person in made.values():
        await person.client.aclose()


def registry(fleet: RunningFleet) -> str:
    return f"/ops/v1/tenants/{fleet.scope('acme').tenant_id}/registry"


def policy_content(number: int) -> dict[str, Any]:
    """The packaged policy with one rule whose id says which version this is."""
    content: dict[str, Any] = json.loads((DEFAULTS / "policy-risk.json").read_text())["content"]
    rules = [*content["rules"], dict(content["rules"][0], id=f"marker-{number}")]
    return content | {"rules": rules}


def model_content(number: int) -> dict[str, Any]:
    """The packaged model with another intercept, so that it is another version."""
    content: dict[str, Any] = json.loads((DEFAULTS / "model-base.json").read_text())["content"]
    return content | {"base": content["base"] + number / 100}


async def approved(
    fleet: RunningFleet, people: dict[str, Operator], kind: str, name: str, content: Any
) -> dict[str, Any]:
    """A version of the author's, submitted and approved by somebody else."""
    path = registry(fleet)
    draft = {
        "kind": kind,
        "name": name,
        "content": content,
        "reason": "a test of the gate",
        "owner": "risk team",
        "purpose": "tests",
        "use_tag": "fraud",
        "limitations": "none known",
        "evidence": {"auc": "0.8"},
    }
    version: dict[str, Any] = await people["ana"].call("POST", path, draft)
    at = f"{path}/{kind}/{name}/{version['version']}"
    said = {"digest": version["digest"], "reason": "as tested"}
    await people["ana"].call("POST", f"{at}/submit", said)
    await people["ana"].call("POST", f"{at}/approve", said, want=403)  # an author has no permission to approve at all
    done: dict[str, Any] = await people["ben"].call("POST", f"{at}/approve", said)
    return done


async def activate(fleet: RunningFleet, people: dict[str, Operator], versions: list[dict[str, Any]]) -> None:
    choices = [{"kind": v["kind"], "name": v["name"], "version": v["version"], "scope_key": "risk"} for v in versions]
    body = {"activations": choices, "reason": "the new set"}
    await people["ben"].call("POST", f"{registry(fleet)}/activate", body)


async def test_a_change_is_seen_within_two_seconds_and_nothing_is_decided_on_a_mixture(
    fleet: RunningFleet, people: dict[str, Operator]
) -> None:
    """Under load, four times: a model and a policy activated together are pinned together."""
    tag = f"{time.time_ns():x}"[-8:]
    sets = [
        [
            await approved(fleet, people, "model", f"m-{tag}", model_content(number)),
            await approved(fleet, people, "policy", f"p-{tag}", policy_content(number)),
        ]
        for number in range(1, 5)
    ]
    pairs = {(one[0]["version"], one[1]["version"]) for one in sets}
    made, scope = fleet.upstreams["acme"], fleet.scope("acme")
    sent: list[str] = []
    stop = asyncio.Event()

    async def load() -> None:
        n = 0
        while not stop.is_set():
            events = [event | {"kind": "risk"} for event in some_events(f"gate-{tag}-{n}", 10, n)]
            for event in events:
                event.pop("regulatory_flags", None)
            await stream.submit_http(fleet.url, made.api_key, events, lambda: None)
            sent.extend(event["id"] for event in events)
            n += 1

    loading = [asyncio.create_task(load())]
    seen_after = []
    try:
        for versions in sets:
            await asyncio.sleep(1)
            await activate(fleet, people, versions)
            seen_after.append(await pinned_after(fleet, versions[0]["name"], versions[0]["version"]))
    finally:
        stop.set()
        await asyncio.gather(*loading)
    events = [{"id": identity} for identity in sent]
    await fleet.wait_decided("acme", events, within_s=120)
    rows = await fleet.rows(
        scope,
        """SELECT convert_from(decision, 'UTF8') FROM decisions WHERE revision = 1 AND event_id = ANY(:ids)""",
        ids=[event_id_of(scope, identity) for identity in sent],
    )
    decided = Counter(versions_of(row[0]) for row in rows)
    show(f"{len(rows)} decisions under four activations: {dict(decided)}; pinned after {seen_after} s")
    mixtures = {pair for pair in decided if pair not in pairs and pair != (None, None)}
    assert mixtures == set(), mixtures
    assert pairs <= set(decided)
    assert max(seen_after) <= SEEN_WITHIN_S


def versions_of(text: str) -> tuple[int | None, int | None]:
    """The numbers of model and policy, None for the packaged ones."""
    versions = orjson.loads(text)["versions"]
    model, policy = versions["model"], versions["policy"]
    own = model["name"].startswith("m-"), policy["name"].startswith("p-")
    return (model["version"] if own[0] else None, policy["version"] if own[1] else None)


async def pinned_after(fleet: RunningFleet, name: str, version: int) -> float:
    """Seconds from the activation's commit to the first event that was pinned to it, by the fleet's own clocks."""
    scope, place = fleet.scope("acme"), {"name": name, "version": version}

    async def look() -> float | None:
        rows = await fleet.rows(
            scope,
            """SELECT min((convert_from(state, 'UTF8')::jsonb->'created'->>'at')::timestamptz) AS pinned,
                      (SELECT max(activated_at) FROM registry_activations
                        WHERE name = :name AND version = :version) AS activated
                 FROM decisions
                WHERE (convert_from(decision, 'UTF8')::jsonb->'versions'->'model'->>'name') = :name
                  AND (convert_from(decision, 'UTF8')::jsonb->'versions'->'model'->>'version')::int = :version""",
            **place,
        )
        return None if rows[0].pinned is None else (rows[0].pinned - rows[0].activated).total_seconds()

    seconds = await eventually(f"{name} {version} decides", look, lambda found: found is not None, 30)
    assert seconds is not None
    return round(seconds, 2)


async def outbox_rows(fleet: RunningFleet) -> int:
    return int((await fleet.rows(fleet.scope("acme"), "SELECT count(*) FROM outbox"))[0][0])


async def await_person(fleet: RunningFleet, prefix: str, count: int) -> list[str]:
    """Ids of so many decided events that wait for a person: their amount is above the guardrail's limit."""
    amount = {"value": "900000", "currency": "EUR"}
    events = [good_event(random.Random(i)) | {"id": f"{prefix}-{i}", "amount": amount} for i in range(count)]
    await stream.submit_http(fleet.url, fleet.upstreams["acme"].api_key, events, lambda: None)
    await fleet.wait_decided("acme", events)
    return [event_id_of(fleet.scope("acme"), event["id"]) for event in events]


async def published_and_audited(fleet: RunningFleet, ids: list[str]) -> None:
    """The outbox is empty, revision 2 of each event came to the tenant's own queue, and its record is in the chain."""
    scope = fleet.scope("acme")
    await eventually("the outbox is empty", lambda: outbox_rows(fleet), lambda left: left == 0, 40)

    async def recorded() -> set[str]:
        found = await fleet.rows(
            scope,
            """SELECT event_id FROM audit_records WHERE event_id = ANY(:ids)
                AND convert_from(body, 'UTF8')::jsonb->>'action' LIKE 'approval.approve%'""",
            ids=ids,
        )
        return {row[0] for row in found}

    await eventually("each approval in the audit", recorded, lambda found: found == set(ids), 30)
    with pika.BlockingConnection(pika.URLParameters(fleet.amqp_url("acme"))) as connection:
        channel = connection.channel()
        seen = set()
        for method, properties, _ in channel.consume(QUEUE.format(scope), inactivity_timeout=2):
            if method is None:
                break
            channel.basic_ack(method.delivery_tag)
            seen.add((properties.headers["event_id"], properties.headers["revision"]))
    assert {(event_id, 2) for event_id in ids} <= seen


def listen(fleet: RunningFleet) -> None:
    """The tenant's own queue of decisions, before anything is decided."""
    scope = fleet.scope("acme")
    with pika.BlockingConnection(pika.URLParameters(fleet.amqp_url("acme"))) as connection:
        channel = connection.channel()
        channel.queue_declare(QUEUE.format(scope), durable=True)
        channel.queue_bind(QUEUE.format(scope), "risk.decisions", f"{scope}.#")


async def test_what_was_committed_is_published_although_control_is_killed(
    fleet: RunningFleet, people: dict[str, Operator]
) -> None:
    """SIGKILL at once after each answer: the decision and the record of each command arrive all the same."""
    listen(fleet)
    ids = await await_person(fleet, f"kill-{time.time_ns():x}", 3)
    path, left = f"/ops/v1/tenants/{fleet.scope('acme').tenant_id}/approvals", []
    for event_id in ids:
        await people["ben"].call("POST", f"{path}/{event_id}/approve", {"revision": 1, "reason": "known customer"})
        killed = fleet.kill_role("control")
        left.append(await outbox_rows(fleet))
        await fleet.wait_restarted("control", killed)
        await ready(fleet)
    show(f"killed after the answer: rows left in the outbox {left}")
    await published_and_audited(fleet, ids)
    assert (await fleet.verified(fleet.scope("acme"))).missing == 0


async def test_a_commit_whose_process_died_before_it_published_is_delivered_by_the_next(
    fleet: RunningFleet, people: dict[str, Operator]
) -> None:
    """Exactly between commit and publish: a process commits and never publishes, and control is gone."""
    listen(fleet)
    ids = await await_person(fleet, f"between-{time.time_ns():x}", 3)
    killed = fleet.kill_role("control")
    engine = create_engine(fleet.settings.need("database_url"), pool_size=1)
    try:
        approvals = Approvals(engine, SystemClock(), Layouts.first(fleet.settings.partitions), RecordingTelemetry())
        person = Principal("user:dead", "dead", frozenset({Grant(fleet.scope("acme").tenant_id, Role.APPROVER)}))
        for event_id in ids:
            await approvals.approve(person, fleet.scope("acme"), event_id, revision=1, reason="before it died")
    finally:
        await engine.dispose()
    left = await outbox_rows(fleet)
    show(f"committed and not published: {left} rows")
    assert left == 2 * len(ids)  # the decision and the record of each
    await fleet.wait_restarted("control", killed)
    await published_and_audited(fleet, ids)


async def ready(fleet: RunningFleet) -> None:
    """Until the operator API answers."""
    url = f"http://{fleet.settings.control_host}:{fleet.settings.control_port}/health/ready"

    async def look() -> int:
        try:
            async with httpx.AsyncClient(timeout=5) as client:
                return (await client.get(url)).status_code
        except httpx.TransportError:
            return 0

    await eventually("the operator API answers", look, lambda status: status == 200, 40)


async def test_every_row_that_a_command_wrote_stands_in_the_audit(
    fleet: RunningFleet, people: dict[str, Operator]
) -> None:
    """Registry, halts, tenants, users and keys: as many records as commands were accepted, each with its person."""
    scope = fleet.scope("acme")
    tag = f"{time.time_ns():x}"[-8:]
    await approved(fleet, people, "policy", f"audited-{tag}", policy_content(int(tag[:4], 16)))
    halts = f"/ops/v1/tenants/{scope.tenant_id}/halts/audited-{tag}"
    await people["ben"].call("PUT", halts, {"reason": "drill"})
    await people["ben"].call("DELETE", halts, {"reason": "drill over"})
    key = await people["admin"].call("POST", f"/ops/v1/tenants/{scope.tenant_id}/keys", {"label": f"audited-{tag}"})
    name = key["key_id"]
    await people["admin"].call("DELETE", f"/ops/v1/tenants/{scope.tenant_id}/keys/{name}", {"reason": "over"})

    async def actions() -> Counter[str]:
        rows = await fleet.rows(
            scope,
            """SELECT convert_from(body, 'UTF8')::jsonb->>'action' FROM audit_records
                WHERE convert_from(body, 'UTF8') LIKE :tag OR convert_from(body, 'UTF8') LIKE :key""",
            tag=f"%audited-{tag}%",
            key=f"%{name}%",
        )
        return Counter(str(row[0]) for row in rows)

    found = await eventually("seven commands in the audit", actions, lambda seen: sum(seen.values()) >= 7, 20)
    show(dict(found))
    assert sum(found.values()) == 7, found
    rows = await fleet.rows(scope, 'SELECT count(*) FROM audit_records WHERE body LIKE \'%"person":""%\'::bytea')
    assert rows[0][0] == 0
