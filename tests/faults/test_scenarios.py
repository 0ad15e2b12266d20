"""Named scenarios of failure on a real fleet, one promise each, short enough for every run of the tests.

Longer outages by variable: SCENARIO_OUTAGE_S=600 keeps PostgreSQL away for ten minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pika
import pytest
import pytest_asyncio

from contracts.codec import Entry, encode_carrier, entry_of
from contracts.events import Event, event_id_of
from contracts.state import begin
from contracts.topology import STAGES, WORK, Stage, stage_queue
from deploy import stream
from deploy.native import RabbitServer
from tests.conftest import need_binaries
from tests.faults import observing
from tests.faults.proxy import Way, Weather
from tests.faults.rig import ChaosRig, chaos_rig, own_servers
from tests.integration.fleet_fixture import Login, RunningFleet, eventually, show, some_events

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

SEED = 20_260_201
OUTAGE_S = float(os.environ.get("SCENARIO_OUTAGE_S", "6"))
SETTLED_S = 90.0


class Scene(RunningFleet):
    """The fleet of this module: the checks of `RunningFleet` on a rig that can be tormented."""

    rig: ChaosRig

    async def settle(self, events: list[dict[str, Any]], *, letters: int = 0, within_s: float = SETTLED_S) -> None:
        """Every event decided once, audited, and nothing left anywhere."""
        decided = await self.wait_decided("acme", events, within_s=within_s)
        assert set(decided.values()) == {1}
        report = await self.verified(self.scope("acme"), within_s=within_s)
        assert report.missing == 0
        assert (await self.counts("acme")).dead_letters == letters
        await self.assert_empty()

    async def assert_empty(self) -> None:
        """Every queue and rung comes to hold nothing, delivered or waiting."""
        scopes, partitions = [self.scope("acme")], self.settings.partitions
        url = self.settings.need("rabbitmq_management_url")

        async def left() -> dict[str, int]:
            found = await asyncio.to_thread(observing.depths, self.settings.need("rabbitmq_url"), scopes, partitions)
            found["delivered"] = await observing.unacked(url, scopes, partitions)
            return {name: count for name, count in found.items() if count}

        await eventually("queues empty", left, lambda found: not found, 60)

    async def post(self, event: dict[str, Any], **headers: str) -> httpx.Response:
        """One request, answered or not."""
        key = {"Authorization": f"Bearer {self.upstreams['acme'].api_key}"}
        async with httpx.AsyncClient(base_url=self.url, timeout=15) as client:
            return await client.post("/v1/events", json=event, headers=key | headers)

    async def post_until_accepted(self, events: list[dict[str, Any]]) -> None:
        """As a client that repeats with the same identity."""
        await stream.submit_http(self.url, self.upstreams["acme"].api_key, events, lambda: None)


def place() -> Path:
    """A directory that PostgreSQL's account can pass through."""
    directory = Path(tempfile.mkdtemp(prefix="riskfleet-scenes-"))
    directory.chmod(0o711)
    (directory / "fleet").mkdir()
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene() -> AsyncIterator[Scene]:
    need_binaries()
    directory = place()
    with own_servers(directory / "servers") as native:
        async with chaos_rig(native, directory / "servers", directory / "fleet", tenants=["acme"]) as rig:
            made = Scene(rig.settings, rig.thread, native, {"acme": rig.tenants[0]}, Login("", ""), rig.said)
            made.rig = rig
            yield made
    shutil.rmtree(directory, ignore_errors=True)


def events_of(name: str, number: int = 60) -> list[dict[str, Any]]:
    return some_events(name, number, SEED)


async def test_a_workflow_failure_is_classified_and_harms_no_neighbour(scene: Scene) -> None:
    """What cannot be read is parked with its category, its problem and its record, whole or alone."""
    events = events_of("failure", 20)
    partition = scene.scope("acme").partition(scene.settings.partitions)

    def poison() -> None:
        with pika.BlockingConnection(pika.URLParameters(scene.settings.need("rabbitmq_url"))) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            for stage in STAGES:
                channel.basic_publish(WORK, stage_queue(stage, partition), b"no carrier at all", mandatory=True)

    await asyncio.to_thread(poison)
    await scene.send("acme", events)

    async def letters() -> set[tuple[str, str, str]]:
        rows = await scene.rows(None, "SELECT stage, category, problem FROM dead_letters")
        return {(row[0], row[1], row[2]) for row in rows}

    found = await eventually("dead letters", letters, lambda rows: len(rows) == len(STAGES), 30)
    assert {stage for stage, _, _ in found} == set(STAGES)
    assert {problem for _, _, problem in found} == {"invalid-workflow-state"}
    show("classified as", {category for _, category, _ in found})
    await scene.settle(events)


async def test_a_messaging_failure_keeps_the_identity(scene: Scene) -> None:
    """The confirm of an accepted event is lost: 503 that names the event, and a repeat is the same event."""
    (event,) = events_of("messaging", 1)
    event_id = event_id_of(scene.scope("acme"), event["id"])
    await scene.rig.proxies["rabbitmq"].set(Weather(cut_confirms=True))
    answers: list[httpx.Response] = []
    try:
        async with asyncio.timeout(30):
            while not answers or answers[-1].status_code != 503:
                answers.append(await scene.post(event))
    finally:
        await scene.rig.proxies["rabbitmq"].heal()
    assert answers[-1].json()["event_id"] == event_id
    await scene.post_until_accepted([event])
    await scene.settle([event])
    again = await scene.post(event)
    assert (again.status_code, again.json()["event_id"]) == (200, event_id)
    assert again.headers["idempotency-replayed"] == "true"
    changed = await scene.post(event | {"type": "payment.other"})
    assert (changed.status_code, changed.json()["type"]) == (422, "urn:riskfleet:problem:idempotency-conflict")


async def test_redis_away_is_503_and_a_flush_loses_nothing(scene: Scene) -> None:
    events = events_of("redis")
    before, during, after = events[:30], events[30:31], events[31:]
    await scene.send("acme", before)
    proxy = scene.rig.proxies["redis"]
    await proxy.set(Weather(refuse=True))
    proxy.reset()
    try:
        refused = await scene.post(during[0])
        assert refused.status_code == 503
        assert refused.json()["event_id"] == event_id_of(scene.scope("acme"), during[0]["id"])
    finally:
        await proxy.heal()
    sending = asyncio.create_task(scene.send("acme", after))
    await scene.rig.flush()
    await asyncio.sleep(0)
    await sending
    await scene.post_until_accepted(during)
    await scene.settle(events)
    await scene.rig.flush()
    # Redis forgot every identity; PostgreSQL did not.
    again = await scene.post(before[0] | {"type": "payment.other"})
    await scene.settle(events)
    if again.status_code == 202:  # parked as a conflict; its letter is closed, for its event is decided

        async def letters() -> list[str]:
            return [row[0] for row in await scene.rows(scene.scope("acme"), "SELECT problem FROM dead_letters")]

        await eventually("the other body is parked", letters, lambda found: found == ["idempotency-conflict"], 30)


async def test_a_door_leaves_a_hanging_redis_alone_and_asks_it_again(scene: Scene) -> None:
    """Redis takes connections and answers nothing: each request would wait for its time to run out."""
    events = events_of("breaker", 40)
    proxy = scene.rig.proxies["redis"]
    await proxy.set(Weather(swallow=frozenset(Way)))
    try:

        async def refused() -> tuple[httpx.Response, float]:
            began = time.monotonic()
            return await scene.post(events[0]), time.monotonic() - began

        answer, took = await eventually(
            "the breaker opens",
            refused,
            lambda found: found[0].json().get("type") == "urn:riskfleet:problem:dependency-unavailable",
            60,
        )
        assert (answer.status_code, took < 1.0) == (503, True)
        assert int(answer.headers["Retry-After"]) >= 1
    finally:
        await proxy.heal()
        proxy.reset()
    accepted = await eventually("the breaker closes", lambda: scene.post(events[0]), lambda one: one.is_success, 30)
    assert accepted.json()["event_id"] == event_id_of(scene.scope("acme"), events[0]["id"])
    await scene.send("acme", events[1:])
    await scene.settle(events, letters=(await scene.counts("acme")).dead_letters)


async def test_one_node_with_a_worker_of_each_stage_dies(scene: Scene) -> None:
    before = (await scene.counts("acme")).dead_letters
    events = events_of("node", 120)
    sending = asyncio.create_task(scene.send("acme", events))
    await scene.wait_decided("acme", events, 3)
    pids = await scene.rig.pids()
    for stage in STAGES:
        os.kill(pids[f"{stage}-1"], signal.SIGKILL)
    await sending
    await scene.settle(events, letters=before)
    await scene.rig.all_back(60)


async def test_postgresql_down_parks_nobody_and_the_audit_catches_up(scene: Scene) -> None:
    before = (await scene.counts("acme")).dead_letters
    events = events_of("database", max(80, int(2 * OUTAGE_S)))
    proxy, made = scene.rig.proxies["postgresql"], scene.upstreams["acme"]
    await scene.send("acme", events[:20])
    await proxy.set(Weather(refuse=True))
    proxy.reset()
    began = time.monotonic()
    try:
        # The broker takes them whatever happens behind it.
        await stream.submit_amqp(scene.amqp_url("acme"), made.broker_user, made.tenant, events[20:], lambda: None)
        await asyncio.sleep(max(0.0, OUTAGE_S - (time.monotonic() - began)))  # the outage's length is the scenario
    finally:
        await proxy.heal()
    healed = time.monotonic()
    await scene.settle(events, letters=before, within_s=120)
    took = time.monotonic() - healed
    show(f"PostgreSQL was away for {healed - began:.0f} s; settled after {took:.1f} s")
    assert took <= 120


def rabbitmqctl(scene: Scene, *words: str) -> None:
    """On our own node, with its cookie and its port mapper."""
    native = scene.rig.native
    server = native._processes["rabbitmq"].server
    assert isinstance(server, RabbitServer)
    program = str(server._binaries.rabbitmq_server.parent / "rabbitmqctl")
    environment = dict(server.environment())
    del environment["RABBITMQ_DIST_PORT"]  # the node's, which the command may not take
    subprocess.run([program, *words], env=environment, check=True, capture_output=True, timeout=60, cwd="/")


async def test_a_memory_alarm_blocks_the_doors_and_loses_nothing(scene: Scene) -> None:
    before = (await scene.counts("acme")).dead_letters
    events = events_of("memory", 40)
    await asyncio.to_thread(rabbitmqctl, scene, "set_vm_memory_high_watermark", "absolute", "1MB")
    try:
        # A 503 without an event's id is another's: the directory's connection from before the last scenario, say.
        blocked = await eventually(
            "blocked",
            lambda: scene.post(events[0]),
            lambda answer: answer.status_code == 503 and "event_id" in answer.json(),
            30,
        )
        assert blocked.json()["event_id"] == event_id_of(scene.scope("acme"), events[0]["id"])
    finally:
        await asyncio.to_thread(rabbitmqctl, scene, "set_vm_memory_high_watermark", "0.3")
    await scene.post_until_accepted(events)
    await scene.settle(events, letters=before)


async def test_a_full_queue_is_said_at_the_door_and_nothing_of_what_was_accepted_is_lost(scene: Scene) -> None:
    before = (await scene.counts("acme")).dead_letters
    events = events_of("full", 60)
    pids = await scene.rig.pids()
    stopped = [pids["retrieval-1"], pids["retrieval-2"]]
    url = scene.settings.need("rabbitmq_management_url")
    partition = scene.scope("acme").partition(scene.settings.partitions)
    name = stage_queue("retrieval", partition).replace(".", r"\.")
    policy = {"pattern": f"^{name}$", "definition": {"max-length": 1, "overflow": "reject-publish"}, "priority": 99}
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    async with httpx.AsyncClient(timeout=15) as client:
        try:
            put = await client.put(f"{url}/api/policies/%2F/chaos-full", json=policy | {"apply-to": "queues"})
            put.raise_for_status()
            statuses = []
            # Prefetched messages count too, so the queue fills once more than the prefetch has come.
            async with asyncio.timeout(40):
                while 503 not in statuses and 429 not in statuses:
                    answers = await asyncio.gather(*(scene.post(event) for event in events[:20]))
                    statuses += [answer.status_code for answer in answers]
            assert set(statuses) <= {202, 429, 503}
        finally:
            (await client.delete(f"{url}/api/policies/%2F/chaos-full")).raise_for_status()
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
    await scene.post_until_accepted(events)
    await scene.settle(events, letters=before)


async def test_a_message_of_an_unknown_release_is_parked_and_not_guessed_at(scene: Scene) -> None:
    """There is one schema so far, so N−1 is nobody's; what comes from another release waits for one that reads it."""
    before = (await scene.counts("acme")).dead_letters
    scope = scene.scope("acme")
    event = Event.model_validate(some_events("release", 1, SEED)[0])
    state = begin(
        scope,
        event_id_of(scope, "release-0000"),
        event,
        received_at="2026-02-01T00:00:00.000000Z",
        source="http",
        correlation_id="release",
    )
    made = entry_of(state, Stage.RETRIEVAL, None)
    document = json.loads(made.body)
    strange = Entry(made.header, json.dumps(document | {"schema": 99}).encode())

    def publish() -> None:
        with pika.BlockingConnection(pika.URLParameters(scene.settings.need("rabbitmq_url"))) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            queue = stage_queue(Stage.RETRIEVAL, scope.partition(scene.settings.partitions))
            channel.basic_publish(WORK, queue, encode_carrier((strange,)), mandatory=True)

    await asyncio.to_thread(publish)

    async def letters() -> int:
        return (await scene.counts("acme")).dead_letters

    await eventually("a dead letter", letters, lambda n: n == before + 1, 30)
    await scene.assert_empty()
