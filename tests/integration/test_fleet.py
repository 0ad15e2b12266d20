"""The fleet as it runs: nine processes behind two doors, three real servers, and kill -9 for all of them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pika
import pytest

from contracts.events import event_id_of
from contracts.topology import DECISIONS, INGEST, REJECTED, STAGES
from deploy.settings import environment_of
from resilience.management import BrokerManagement
from tests.integration.fleet_fixture import (
    RunningFleet,
    eventually,
    show,
    some_events,
)

pytestmark = pytest.mark.integration

SEED = 20260131


class Upstream:
    """A client that knows the published contract and `pika`, and nothing of ours."""

    def __init__(self, url: str, tenant: str, user: str) -> None:
        self.tenant, self.user = tenant, user
        self.received: list[tuple[pika.BasicProperties, bytes]] = []
        self._url = url
        self._queue = f"up.{tenant}.decisions"
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        channel = self._connection.channel()
        channel.queue_declare(self._queue, durable=True, arguments={"x-queue-type": "quorum"})
        for exchange in ("risk.decisions", "risk.rejected"):
            channel.queue_bind(self._queue, exchange, f"{tenant}.#")
        channel.basic_consume(self._queue, self._take, auto_ack=False)

    def _take(self, channel: Any, method: Any, properties: pika.BasicProperties, body: bytes) -> None:
        self.received.append((properties, body))
        channel.basic_ack(method.delivery_tag)

    def publish(
        self, body: bytes, message_id: str, *, key: str | None = None, user_id: str | None = "", kind: str = "risk"
    ) -> None:
        """One confirmed message on a channel of its own. `user_id` "" is the user's own name."""
        channel = self._connection.channel()
        channel.confirm_delivery()
        properties = pika.BasicProperties(
            message_id=message_id,
            user_id=self.user if user_id == "" else user_id,
            content_type="application/json",
            delivery_mode=2,
        )
        channel.basic_publish("risk.ingest", key or f"{self.tenant}.{kind}", body, properties, mandatory=True)
        channel.close()

    def wait(self, number: int, within_s: float = 30) -> None:
        """Until so many messages have come in all."""
        deadline = time.monotonic() + within_s
        while len(self.received) < number:
            assert time.monotonic() < deadline, f"{len(self.received)} of {number} messages came"
            self._connection.process_data_events(0.1)

    def close(self) -> None:
        self._connection.close()


def upstream(fleet: RunningFleet, name: str) -> Upstream:
    made = fleet.upstreams[name]
    return Upstream(fleet.amqp_url(name), made.tenant, made.broker_user)


def body_of(identity: str, **fields: Any) -> bytes:
    (event,) = some_events(identity, 1, SEED)
    return json.dumps(event | {"id": identity, "kind": "risk"} | fields).encode()


def problems(messages: list[tuple[pika.BasicProperties, bytes]]) -> list[str]:
    return [json.loads(body)["type"] for properties, body in messages if "problem+json" in properties.content_type]


async def test_every_event_of_both_doors_ends_in_one_decision_with_its_whole_trail(fleet: RunningFleet) -> None:
    show("seed", SEED)
    events = some_events("plain", 60, SEED)
    await fleet.send("acme", events)
    decided = await fleet.wait_decided("acme", events)
    scope = fleet.scope("acme")
    assert decided == {event_id_of(scope, event["id"]): 1 for event in events}

    report = await fleet.verified(scope)
    assert (report.missing, report.orphans) == (0, 0)
    audited = await fleet.rows(
        scope,
        "SELECT d.event_id, count(r.record_id), (SELECT count(*) FROM approvals a WHERE a.tenant = d.tenant"
        " AND a.event_id = d.event_id) FROM decisions d LEFT JOIN audit_records r USING (tenant, event_id)"
        " GROUP BY d.tenant, d.event_id",
    )
    assert len(audited) == len(events)
    assert [row for row in audited if row[1] != 5 + row[2]] == []
    found = await fleet.counts("acme")
    show("outcomes", dict(found.by_outcome), "approvals", sum(row[2] for row in audited))
    assert (found.events, found.decisions, found.dead_letters) == (60, 60, 0)
    await fleet.assert_empty()


async def told(fleet: RunningFleet, *words: str) -> tuple[int | None, dict[str, Any], str]:
    """Exit code, answer and complaint of a command of `riskfleet`."""
    command = (sys.executable, "-m", "deploy.cli", *words, "--json")
    process = await asyncio.create_subprocess_exec(
        *command, env=dict(os.environ) | environment_of(fleet.settings), stdout=PIPE, stderr=PIPE
    )
    out, err = await process.communicate()
    return process.returncode, json.loads(out or b"{}"), err.decode()


async def test_every_decision_is_made_again_to_the_byte(fleet: RunningFleet) -> None:
    tenant, scope = fleet.upstreams["acme"].tenant, fleet.scope("acme")
    code, found, _ = await told(fleet, "redecide", "--tenant", tenant)
    assert (code, found["decided_again"], found["identical"], found["different"]) == (0, 60, 60, [])
    code, found, _ = await told(
        fleet, "redecide", "--tenant", tenant, "plain-0007", event_id_of(scope, "plain-0008"), "nobody"
    )
    assert (code, found["identical"], found["not_decided"]) == (1, 2, ["nobody"])
    code, _, complaint = await told(fleet, "redecide", "--tenant", "nobody-at-all")
    assert code == 2
    assert "there is no tenant nobody-at-all" in complaint


async def test_a_rule_that_nobody_registered_is_tried_on_what_was_decided(fleet: RunningFleet, tmp_path: Path) -> None:
    tenant = fleet.upstreams["acme"].tenant
    rule = {"id": "never", "when": "false", "result": "DENY", "code": "NEVER", "text": "never"}
    candidate = tmp_path / "candidate.json"

    async def tried(**changes: Any) -> tuple[int | None, dict[str, Any], str]:
        content = {"type": "cel", "rules": [rule | changes]}
        candidate.write_text(json.dumps({"kind": "policy", "name": "mine", "content": content}))
        return await told(fleet, "backtest", "--tenant", tenant, "--candidate", str(candidate))

    code, found, _ = await tried(id="all", when="true")
    assert (code, found["events"], found["problems"]) == (0, 60, 0)
    assert {now for _, now, _ in found["outcomes"]} == {"REJECTED"}
    assert found["rules"]["all"] == [0, 60]
    assert len(found["flipped"]) == found["flips"] > 0
    code, found, _ = await tried()
    assert (code, found["rules"].get("never")) == (0, None)
    code, _, complaint = await tried(when="1 +")
    assert code == 1
    assert "could not be submitted" in complaint


async def test_another_tenant_sees_nothing_of_it(fleet: RunningFleet) -> None:
    found = await fleet.counts("globex")
    assert (found.events, found.decisions, found.audit_records, found.dead_letters) == (0, 0, 0, 0)


def test_a_plain_client_gets_its_decision_and_the_stored_one_again(fleet: RunningFleet) -> None:
    client = upstream(fleet, "acme")
    try:
        body = body_of("pika-1")
        client.publish(body, "pika-1")
        client.wait(1)
        client.publish(body, "pika-1")
        client.wait(2)
        event_id = event_id_of(fleet.scope("acme"), "pika-1")
        (first, stored), (second, again) = client.received
        assert first.message_id == second.message_id == f"{event_id}:1"
        assert stored == again
        assert json.loads(stored)["event_id"] == event_id

        client.publish(body_of("pika-1", type="payment.other"), "pika-1")
        client.wait(3)
        assert problems(client.received) == ["urn:riskfleet:problem:idempotency-conflict"]
        document = json.loads(client.received[2][1])
        assert (document["message_id"], document["event_id"], document["status"]) == ("pika-1", event_id, 422)
    finally:
        client.close()


def test_a_message_without_a_user_is_answered_to_nobody_and_audited_on_the_system_chain(fleet: RunningFleet) -> None:
    before = asyncio.run(fleet.counts("acme")).events
    clients = [upstream(fleet, "acme"), upstream(fleet, "globex")]
    try:
        clients[0].publish(body_of("nobody-1"), "nobody-1", user_id=None)
        # What comes after it in the same queue is answered, so it has been handled by then.
        clients[0].publish(body_of("nobody-2"), "nobody-2")
        clients[1].publish(body_of("nobody-3"), "nobody-3")
        for client, identity, name in ((clients[0], "nobody-2", "acme"), (clients[1], "nobody-3", "globex")):
            client.wait(1)
            assert [p.message_id for p, _ in client.received] == [f"{event_id_of(fleet.scope(name), identity)}:1"]
    finally:
        for client in clients:
            client.close()
    wanted = ("unauthenticated", "amqp")
    asyncio.run(eventually("refusal audited", lambda: fleet.refusals(None), lambda found: wanted in found, 15))
    asyncio.run(fleet.verified(None))
    assert asyncio.run(fleet.counts("acme")).events == before + 1


def test_the_broker_refuses_another_tenants_key_and_a_forged_user(fleet: RunningFleet) -> None:
    client, other = upstream(fleet, "acme"), fleet.upstreams["globex"]
    try:
        with pytest.raises(pika.exceptions.ChannelClosedByBroker) as refused:
            client.publish(body_of("foreign-1"), "foreign-1", key=f"{other.tenant}.risk")
        assert refused.value.reply_code == 403
        with pytest.raises(pika.exceptions.ChannelClosedByBroker) as forged:
            client.publish(body_of("foreign-2"), "foreign-2", user_id=other.broker_user)
        assert forged.value.reply_code == 406
    finally:
        client.close()


def test_where_the_broker_lets_it_through_the_ingress_refuses_another_tenants_key(fleet: RunningFleet) -> None:
    made, other = fleet.upstreams["acme"], fleet.upstreams["globex"]
    widen_topic_permissions(fleet, made.broker_user)
    try:
        clients = upstream(fleet, "acme"), upstream(fleet, "globex")
        try:
            clients[0].publish(body_of("wide-1"), "wide-1", key=f"{other.tenant}.risk")
            clients[0].wait(1)
            clients[1].publish(body_of("wide-2"), "wide-2")
            clients[1].wait(1)
            assert problems(clients[0].received) == ["urn:riskfleet:problem:foreign-tenant"]
            document = json.loads(clients[0].received[0][1])
            assert (document["message_id"], document["status"]) == ("wide-1", 403)
            assert other.tenant not in clients[0].received[0][1].decode()
            assert [p.message_id for p, _ in clients[1].received] == [
                f"{event_id_of(fleet.scope('globex'), 'wide-2')}:1"
            ]
        finally:
            for client in clients:
                client.close()
    finally:
        asyncio.run(restore_topic_permissions(fleet, "acme"))
    wanted = ("foreign-tenant", "amqp")
    asyncio.run(
        eventually("refusal audited", lambda: fleet.refusals(fleet.scope("acme")), lambda got: wanted in got, 15)
    )
    assert wanted not in asyncio.run(fleet.refusals(fleet.scope("globex")))


def widen_topic_permissions(fleet: RunningFleet, user: str) -> None:
    """As an operator may by mistake: without topic permissions, the exchange's permission is for every key."""
    parts = urlsplit(fleet.settings.need("rabbitmq_management_url"))
    answer = httpx.delete(
        f"http://{parts.hostname}:{parts.port}/api/topic-permissions/%2F/{user}",
        auth=(parts.username or "", parts.password or ""),
    )
    assert answer.status_code == 204


async def restore_topic_permissions(fleet: RunningFleet, name: str) -> None:
    made, management = fleet.upstreams[name], BrokerManagement(fleet.settings.need("rabbitmq_management_url"))
    try:
        await management.create_upstream_user(
            made.broker_user, made.broker_password, made.tenant, (INGEST, DECISIONS, REJECTED)
        )
    finally:
        await management.close()


async def test_bad_input_is_refused_with_a_problem_document_and_audited(fleet: RunningFleet) -> None:
    made, other = fleet.upstreams["acme"], fleet.upstreams["globex"]
    json_type = {"Content-Type": "application/json"}
    key = json_type | {"Authorization": f"Bearer {made.api_key}"}
    good = body_of("bad-1")
    cases: list[tuple[str, dict[str, str], bytes, int, str]] = [
        ("malformed JSON", key, b'{"id": "x"', 400, "malformed-json"),
        ("not UTF-8", key, b'{"id": "\xff"}', 400, "malformed-json"),
        ("an array", key, b"[]", 422, "invalid-event"),
        ("unknown field", key, body_of("bad-1", colour="red"), 422, "invalid-event"),
        ("wrong type", key, body_of("bad-1", risk_score="high"), 422, "invalid-event"),
        ("70 KiB", key, body_of("bad-1", text="x" * 70 * 1024), 413, "body-too-large"),
        ("foreign tenant", key, body_of("bad-1", tenant_id=other.tenant), 403, "foreign-tenant"),
        ("unknown version", key, body_of("bad-1", schema_version="9.9"), 422, "unknown-schema-version"),
        ("content type", key | {"Content-Type": "text/plain"}, good, 415, "unsupported-media-type"),
        ("no key", json_type, good, 401, "unauthenticated"),
        ("unknown key", json_type | {"Authorization": "Bearer rf_nobody_x"}, good, 401, "unauthenticated"),
    ]
    async with httpx.AsyncClient(base_url=fleet.url, timeout=15) as client:
        for name, headers, body, status, problem in cases:
            answer = await client.post("/v1/events", content=body, headers=headers)
            assert (name, answer.status_code) == (name, status)
            assert answer.headers["content-type"].startswith("application/problem+json"), name
            assert answer.json()["type"] == f"urn:riskfleet:problem:{problem}", name
            assert answer.json()["status"] == status

        (event,) = some_events("good", 1, SEED)
        answer = await client.post("/v1/events", json=event, headers=key)
        assert answer.status_code == 202
        await fleet.wait_decided("acme", [event])
        path = answer.headers["location"]
        assert (await client.get(path, headers=key)).json()["revision"] == 1
        foreign = await client.get(path, headers={"Authorization": f"Bearer {other.api_key}"})
        assert (foreign.status_code, foreign.json()["type"]) == (404, "urn:riskfleet:problem:not-known")

    # A stranger's refusal is not audited, or anybody could write the audit full.
    wanted = {(problem, "http") for *_, status, problem in cases if status != 401}
    found = await eventually(
        "refusals audited", lambda: fleet.refusals(fleet.scope("acme")), lambda got: wanted <= got, 15
    )
    assert ("unauthenticated", "http") not in found
    assert await fleet.decided("acme", [{"id": "bad-1"}]) == {}
    await fleet.verified(fleet.scope("acme"))


async def settle(fleet: RunningFleet, name: str, events: list[dict[str, Any]]) -> None:
    """All decided once, audited completely, nothing left anywhere. Orphans are allowed: a killed worker may have
    audited what another then did again.
    """
    decided = await fleet.wait_decided(name, events, within_s=60)
    assert set(decided.values()) == {1}
    assert len(decided) == len(events)
    report = await fleet.verified(fleet.scope(name), within_s=60)
    found = await fleet.counts(name)
    show("events", found.events, "audit records", report.records, "missing", report.missing, "orphans", report.orphans)
    assert found.events == found.decisions
    assert (report.missing, found.dead_letters) == (0, 0)
    await fleet.assert_empty()


async def during(
    fleet: RunningFleet, events: list[dict[str, Any]], faults: list[tuple[str, Callable[[], Any], bool]]
) -> None:
    """Send the events in as many slices as there are faults; a fault comes when its slice is partly accepted
    (True) or partly decided (False), and the sender goes on meanwhile.
    """
    size = -(-len(events) // len(faults))
    for i, (name, fault, at_the_door) in enumerate(faults):
        part, accepted = events[i * size : (i + 1) * size], [0]

        def tick(accepted: list[int] = accepted) -> None:
            accepted[0] += 1

        sending = asyncio.create_task(fleet.send("globex", part, tick))
        try:
            if at_the_door:

                async def look(accepted: list[int] = accepted) -> int:
                    return accepted[0]

                await eventually("accepted", look, lambda n: n >= 3, 30)
            else:
                await fleet.wait_decided("globex", part, 3)
            began, now = time.monotonic(), len(await fleet.decided("globex", events))
            await fault()
            show(f"{name}: killed after {now} decisions, again there after {time.monotonic() - began:.1f} s")
            await sending
        finally:
            sending.cancel()


async def test_no_event_is_lost_when_roles_are_killed(fleet: RunningFleet) -> None:
    if fleet.native is None:
        pytest.skip("faults are for our own servers and roles only, and servers were given")
    show("seed", SEED + 1)
    events = some_events("roles", 252, SEED + 1)
    names = ["gateway", "ingress", *map(str, STAGES), "sink-audit", "sink-parking", "sink-metrics"]
    killed: dict[str, int] = {}

    def fault(name: str) -> Callable[[], Any]:
        async def kill() -> None:
            killed[name] = fleet.kill_role(name)
            await fleet.wait_restarted(name, killed[name])

        return kill

    await during(fleet, events, [(name, fault(name), name in ("gateway", "ingress")) for name in names])
    await settle(fleet, "globex", events)
    pids = fleet.pids()
    assert {name for name in names if pids.get(name, killed[name]) == killed[name]} == set()


async def test_no_event_is_lost_when_servers_are_killed(fleet: RunningFleet) -> None:
    if fleet.native is None:
        pytest.skip("faults are for our own servers and roles only, and servers were given")
    show("seed", SEED + 2)
    events = some_events("servers", 252, SEED + 2)

    def fault(name: str) -> Callable[[], Any]:
        async def kill() -> None:
            fleet.kill_server(name)
            await fleet.wait_server_restarted(name)

        return kill

    names = ("rabbitmq", "redis", "postgresql")
    await during(fleet, events, [(name, fault(name), True) for name in names])
    await settle(fleet, "globex", events)
