"""Thousands of bad submissions and poison messages through a running fleet: refused or parked, and nobody else waits.

RISKFLEET_TEST_BAD_INPUTS says how many (default 1,600; the figure of the documentation was made with 20,000).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aio_pika
import httpx
import pika
import pytest

from contracts.codec import encode_carrier, entry_of
from contracts.events import event_id_of, parse_event
from contracts.state import begin
from contracts.tenancy import TenantScope
from contracts.topology import STAGES, WORK, stage_queue
from deploy import stream
from tests.integration.bad_inputs import FAULTS, BadInput, bad_inputs, good_event
from tests.integration.fleet_fixture import RunningFleet, eventually, show

pytestmark = pytest.mark.integration

COUNT = int(os.environ.get("RISKFLEET_TEST_BAD_INPUTS", "1600"))
SEED = 20261124
CORPORA = Path(__file__).resolve().parents[3] / "shared" / "corpora"


def corpus() -> list[BadInput]:
    """Every file of the JSON corpus that must be refused, and each naughty string in place of a whole body."""
    files = sorted((CORPORA / "json" / "test_parsing").glob("n_*.json"))
    strings = CORPORA / "naughty-strings" / "blns.json"
    naughty = json.loads(strings.read_text()) if strings.exists() else []
    return [BadInput(path.name, path.read_bytes(), statuses=frozenset({400, 413, 422})) for path in files] + [
        BadInput("naughty string", json.dumps(text).encode()) for text in naughty
    ]


def naughty_events(prefix: str) -> list[dict[str, Any]]:
    """Each naughty string in every field that takes free text: each is accepted or refused, never a defect."""
    strings = CORPORA / "naughty-strings" / "blns.json"
    events = []
    for i, text in enumerate(json.loads(strings.read_text()) if strings.exists() else []):
        event = good_event(random.Random(i)) | {"id": f"{prefix}-{i}", "text": text}
        event["subject"] = {"type": "customer", "id": text or "-", "name": text}
        event["attributes"] = {"note": text, (text or "-")[:128]: 1}
        event["metadata"] = {"note": text}
        events.append(event)
    return events


async def send_http(fleet: RunningFleet, inputs: list[BadInput]) -> Counter[int]:
    """The statuses; each must be one that its input allows."""
    made, seen, queue = fleet.upstreams["acme"], Counter[int](), list(enumerate(inputs))
    queue.reverse()
    headers = {"Authorization": f"Bearer {made.api_key}"}

    async def sender() -> None:
        async with httpx.AsyncClient(base_url=fleet.url, headers=headers, timeout=30) as client:
            while queue:
                i, item = queue.pop()
                path = "/v1/events" if i % 2 else "/v1/risk"
                answer = await client.post(path, content=item.body, headers={"Content-Type": item.content_type})
                seen[answer.status_code] += 1
                assert answer.status_code in item.statuses, (i, item.why, answer.status_code, answer.text[:300])
                assert answer.headers["content-type"] == "application/problem+json"

    await asyncio.gather(*(sender() for _ in range(8)))
    return seen


async def send_amqp(fleet: RunningFleet, inputs: list[BadInput], prefix: str) -> None:
    """Publish each as the tenant's own broker user, confirmed."""
    made = fleet.upstreams["acme"]
    connection = await aio_pika.connect(fleet.amqp_url("acme"))
    async with connection:
        channel = await connection.channel(publisher_confirms=True)
        exchange = await channel.get_exchange("risk.ingest", ensure=False)
        for start in range(0, len(inputs), 100):
            await asyncio.gather(
                *(
                    exchange.publish(
                        aio_pika.Message(
                            item.body,
                            message_id=f"{prefix}-{start + i}",
                            user_id=made.broker_user,
                            content_type=item.content_type,
                            delivery_mode=2,
                        ),
                        f"{made.tenant}.risk",
                    )
                    for i, item in enumerate(inputs[start : start + 100])
                )
            )


class Rejections(threading.Thread):
    """A consumer of the tenant's rejection documents: message ids of what was rejected."""

    def __init__(self, url: str, tenant: str) -> None:
        super().__init__(daemon=True)
        self.rejected: Counter[str] = Counter()
        self.done = threading.Event()
        self._url, self._tenant = url, tenant
        self.ready = threading.Event()

    def run(self) -> None:
        with pika.BlockingConnection(pika.URLParameters(self._url)) as connection:
            channel = connection.channel()
            name = f"up.{self._tenant}.rejections"
            channel.queue_declare(name, durable=True)
            channel.queue_bind(name, "risk.rejected", f"{self._tenant}.#")
            self.ready.set()
            for method, _, body in channel.consume(name, inactivity_timeout=0.5):
                if method is not None:
                    self.rejected[str(json.loads(body).get("message_id"))] += 1
                    channel.basic_ack(method.delivery_tag)
                if self.done.is_set() and method is None:
                    break


class Neighbour:
    """Another tenant's good events all the while, half through each door."""

    def __init__(self, fleet: RunningFleet, prefix: str) -> None:
        self.sent: list[str] = []
        self._fleet, self._prefix, self._stop = fleet, prefix, asyncio.Event()

    async def run(self) -> None:
        made, n = self._fleet.upstreams["globex"], 0
        while not self._stop.is_set():
            event = good_event(random.Random(n)) | {"id": f"{self._prefix}-{n}"}
            if n % 2:
                await stream.submit_http(self._fleet.url, made.api_key, [event], lambda: None)
            else:
                await stream.submit_amqp(
                    self._fleet.amqp_url("globex"), made.broker_user, made.tenant, [event], lambda: None
                )
            self.sent.append(event["id"])
            n += 1
            await asyncio.sleep(0.1)

    def stop(self) -> None:
        self._stop.set()

    async def delays(self) -> list[float]:
        """Seconds from receipt to decision of each, once all are decided."""
        scope = self._fleet.scope("globex")
        ids = [event_id_of(scope, identity) for identity in self.sent]

        async def look() -> list[float]:
            sql = """SELECT extract(epoch FROM d.decided_at - e.received_at) FROM events e JOIN decisions d
                      USING (tenant, event_id) WHERE d.revision = 1 AND event_id = ANY(:ids)"""
            return [float(row[0]) for row in await self._fleet.rows(scope, sql, ids=ids)]

        found = await eventually("neighbours decided", look, lambda found: len(found) == len(ids), 60)
        return sorted(found)


def poison(scope: TenantScope, chance: random.Random, stage: str) -> bytes:
    """A message that no stage can work: noise, a cut carrier, a foreign entry, or bytes that are no state."""
    event = parse_event(good_event(chance))
    at = "2026-01-31T12:00:00Z"
    state = begin(scope, f"{chance.getrandbits(128):032x}", event, received_at=at, source="amqp", correlation_id="c")
    entry = entry_of(state, stage)
    match chance.randrange(4):
        case 0:
            return chance.randbytes(64)
        case 1:
            return encode_carrier((entry,))[:-10]
        case 2:
            return encode_carrier((entry.evolve(stage="nowhere", n=7),))
        case _:
            broken = type(entry)(entry.header, b'{"schema": 1}')
            return encode_carrier((broken,))


async def test_bad_input_is_refused_parked_or_accepted_and_holds_up_nobody(fleet: RunningFleet) -> None:
    inputs = [*bad_inputs(SEED, COUNT), *corpus()]
    if not CORPORA.exists():
        show("NOT RUN: the JSON and naughty-string corpora are not beside the project")
    show(f"seed {SEED}: {COUNT} inputs by {len(FAULTS)} faults, {len(inputs) - COUNT} of corpora, through both doors")
    before, began = fleet.pids(), time.monotonic()
    acme, scope = fleet.upstreams["acme"], fleet.scope("acme")
    listener = Rejections(fleet.amqp_url("acme"), acme.tenant)
    listener.start()
    assert listener.ready.wait(10)
    neighbour = Neighbour(fleet, f"neighbour-{SEED}")
    beside = asyncio.create_task(neighbour.run())
    statuses = await send_http(fleet, inputs)
    await send_amqp(fleet, inputs, "bad")
    poisons = await plant_poison(fleet, scope)
    naughty = naughty_events("naughty")
    odd = await stream_answers(fleet, naughty)

    async def rejected() -> int:
        return sum(1 for name in list(listener.rejected) if name.startswith("bad-"))

    await eventually("every bad message answered", rejected, lambda n: n == len(inputs), 120)
    await eventually("every poison message parked", lambda: letters(fleet, poisons), lambda n: n == len(poisons), 60)
    neighbour.stop()
    await beside
    delays = await neighbour.delays()
    listener.done.set()
    show(f"HTTP {dict(statuses)}; AMQP {len(inputs)} rejected; {len(poisons)} poison messages parked")
    show(f"naughty events: {dict(odd)}; neighbours: {len(delays)} events, slowest {delays[-1]:.2f} s")
    show(f"{time.monotonic() - began:.1f} s")
    assert not [status for status in (*statuses, *odd) if status >= 500]
    assert delays[-1] <= 5.0
    assert fleet.pids() == before, "a process died"
    assert not [line for line in fleet.said if "ended" in line]


async def plant_poison(fleet: RunningFleet, scope: TenantScope) -> list[bytes]:
    """Poison straight into the stages' queues, as only the fleet's own broker user can."""
    chance, bodies = random.Random(SEED), []
    connection = await aio_pika.connect(fleet.settings.need("rabbitmq_url"))
    async with connection:
        channel = await connection.channel(publisher_confirms=True)
        exchange = await channel.get_exchange(WORK, ensure=False)
        for i in range(40):
            stage = STAGES[i % len(STAGES)]
            bodies.append(poison(scope, chance, stage))
            key = stage_queue(stage, scope.partition(fleet.settings.partitions))
            await exchange.publish(aio_pika.Message(bodies[-1], delivery_mode=2), key)
    return bodies


async def letters(fleet: RunningFleet, bodies: list[bytes]) -> int:
    """How many of the poison bodies lie in `dead_letters`, of the tenant or of nobody."""
    found: set[bytes] = set()
    for scope in (fleet.scope("acme"), None):
        rows = await fleet.rows(scope, "SELECT body FROM dead_letters WHERE body = ANY(:bodies)", bodies=bodies)
        found |= {bytes(row[0]) for row in rows}
    return len(found)


async def stream_answers(fleet: RunningFleet, events: list[dict[str, Any]]) -> Counter[int]:
    """The statuses of events that may be good or bad."""
    made, seen = fleet.upstreams["acme"], Counter[int]()
    headers = {"Authorization": f"Bearer {made.api_key}"}
    async with httpx.AsyncClient(base_url=fleet.url, headers=headers, timeout=30) as client:
        for event in events:
            body = json.dumps(event).encode()
            answer = await client.post("/v1/events", content=body, headers={"Content-Type": "application/json"})
            seen[answer.status_code] += 1
    return seen
